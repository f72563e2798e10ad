#!/usr/bin/env python3
"""Asks `nanogpt serve` with the official OpenAI client and with curl, as other people's programs do.

    openai_client.py NANOGPT SAMPLE_DIR

Starts the server by itself on a free port of the loopback address. The last line is
"N passed, N failed". Exit code 77, with the reason, if the package openai is not installed.
"""
import json
import os
import re
import shutil
import signal
import subprocess
import sys

try:
    import openai
except ImportError:
    print("skipped: the Python package openai is not installed")
    sys.exit(77)

passed = failed = 0


def check(name, good, shown=""):
    global passed, failed
    passed, failed = passed + bool(good), failed + (not good)
    if not good:
        print(f"FAILED: {name}: {shown!r}")


def start(binary, sample):
    env = dict(os.environ, CUDA_VISIBLE_DEVICES="-1")
    server = subprocess.Popen([binary, "serve", "--port", "0", "--base-dir", sample], env=env,
                              stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    match = re.search(r"http://[^/\s]+:(\d+)", server.stdout.readline())
    if not match:
        server.kill()
        sys.exit("the server printed no address")
    return server, int(match.group(1))


def error_of(call):
    try:
        call()
    except openai.APIStatusError as error:
        return error
    return None


USER = [{"role": "user", "content": "Hello"}]


def models(client):
    ids = [model.id for model in client.models.list().data]
    check("models.list", ids == ["sft/d4/2600"], ids)
    check("models.retrieve", client.models.retrieve(ids[0]).owned_by == "local")
    check("models.retrieve of none", isinstance(
        error_of(lambda: client.models.retrieve("none")), openai.NotFoundError))


def chats(client):
    answer = client.chat.completions.create(model="gpt-4o-mini", messages=USER, temperature=0, seed=1)
    text = answer.choices[0].message.content
    check("an answer", text == "Hello! How can I help you today?", text)
    check("its kind", answer.object == "chat.completion" and answer.choices[0].message.role == "assistant")
    check("its end", answer.choices[0].finish_reason == "stop")
    usage = answer.usage
    check("its usage", usage.total_tokens == usage.prompt_tokens + usage.completion_tokens, usage)
    stream = list(client.chat.completions.create(
        model="default", messages=USER, temperature=0, seed=1, stream=True,
        stream_options={"include_usage": True}))
    pieces = [c.choices[0].delta.content or "" for c in stream if c.choices]
    check("a stream", "".join(pieces) == text, pieces)
    check("in pieces", len(pieces) > 4, pieces)
    check("of one id", len({c.id for c in stream}) == 1)
    check("its role", stream[0].choices[0].delta.role == "assistant")
    check("its end", [c.choices[0].finish_reason for c in stream if c.choices][-1] == "stop")
    check("its usage", stream[-1].usage.completion_tokens == usage.completion_tokens, stream[-1])
    with client.chat.completions.create(model="default", messages=USER, stream=True) as left:
        next(iter(left))  # and goes away
    parts = client.chat.completions.create(
        model="sft", temperature=0, max_completion_tokens=5, user="me", metadata={"a": "b"},
        messages=[{"role": "developer", "content": "Be brief."},
                  {"role": "user", "content": [{"type": "text", "text": "Hello"}]}])
    check("parts", parts.choices[0].finish_reason == "length", parts)
    again = [client.chat.completions.create(model="sft", messages=USER, temperature=1, seed=7,
                                            max_tokens=12).choices[0].message.content for _ in range(2)]
    check("a seed", again[0] == again[1], again)
    stop = client.chat.completions.create(model="sft", messages=USER, temperature=0, stop=[" help", "x y"])
    check("a stop text", stop.choices[0].message.content == "Hello! How can I", stop)
    longer = client.chat.completions.create(
        model="sft", temperature=0, max_tokens=8,
        messages=USER + [{"role": "assistant", "content": "Hello! How"}])
    check("a prefix", longer.choices[0].message.content.startswith(" can I help"), longer)


def completions(client):
    answer = client.completions.create(model="default", prompt="The capital of France is", max_tokens=6,
                                       temperature=0)
    stream = client.completions.create(model="default", prompt="The capital of France is", max_tokens=6,
                                       temperature=0, stream=True)
    check("completions", answer.choices[0].text == "".join(c.choices[0].text for c in stream), answer)


def errors(client):
    create = client.chat.completions.create
    cases = [
        (dict(temperature=3), openai.BadRequestError, "temperature", "out_of_range"),
        (dict(max_tokens=0), openai.BadRequestError, "max_tokens", "out_of_range"),
        (dict(stop=["a"] * 5), openai.BadRequestError, "stop", "out_of_range"),
        (dict(tools=[{"type": "function", "function": {"name": "x"}}]), openai.BadRequestError, "tools",
         "unsupported_parameter"),
        (dict(response_format={"type": "json_object"}), openai.BadRequestError, "response_format",
         "unsupported_parameter"),
        (dict(frequency_penalty=1), openai.BadRequestError, "frequency_penalty", "unsupported_parameter"),
        (dict(messages=[]), openai.BadRequestError, "messages", "out_of_range"),
        (dict(messages=[{"role": "user", "content": "x " * 5000}]), openai.BadRequestError, "messages",
         "context_length_exceeded"),
        (dict(model="gpt-9"), openai.NotFoundError, "model", "model_not_found"),
    ]
    for fields, kind, param, code in cases:
        error = error_of(lambda: create(**{"model": "default", "messages": USER, **fields}))
        good = isinstance(error, kind) and error.param == param and error.code == code
        check(f"the error of {param}", good, getattr(error, "body", error))


def curl(port):
    if shutil.which("curl") is None:
        print("skipped: curl is not installed")
        return
    base = f"http://localhost:{port}"
    form = ["-H", "Content-Type: application/json", "-d"]

    def run(*args):
        return subprocess.run(["curl", "-sS", "--max-time", "60", *args], capture_output=True, text=True).stdout

    body = {"messages": USER, "temperature": 0}
    answer = json.loads(run(base + "/v1/chat/completions", *form, json.dumps(body)))
    text = answer["choices"][0]["message"]["content"]
    check("curl", text == "Hello! How can I help you today?", answer)
    stream = run("-N", base + "/v1/chat/completions", *form, json.dumps(dict(body, stream=True)))
    check("curl, a stream", stream.endswith("data: [DONE]\n\n"), stream)
    stream = run("-N", base + "/chat/completions", *form, json.dumps(body))
    pieces = [json.loads(line[6:]) for line in stream.split("\n") if line.startswith("data: ")]
    check("curl, nanochat", "".join(p.get("token", "") for p in pieces) == text, stream)
    check("curl, nanochat's end", pieces[-1]["done"] is True)
    long = json.dumps({"messages": [{"role": "user", "content": "Hello " * 300}], "max_tokens": 1})
    check("curl, Expect: 100-continue", "chat.completion" in run(
        base + "/v1/chat/completions", "-H", "Expect: 100-continue", *form, long))
    check("curl, chunks", "chat.completion" in run(
        base + "/v1/chat/completions", "-H", "Transfer-Encoding: chunked", *form, json.dumps(body)))
    check("curl, HTTP/1.0", "chat.completion" in run(
        "--http1.0", base + "/v1/chat/completions", *form, json.dumps(body)))
    check("curl, a form", "unsupported_media_type" in run(base + "/v1/chat/completions", "-d", "a=b"))
    check("curl, HEAD", "200 OK" in run("-I", base + "/health"))
    both = run(base + "/health", base + "/v1/models")
    check("curl, two on one connection", '"ok"' in both and '"list"' in both, both)


def main():
    server, port = start(sys.argv[1], sys.argv[2])
    try:
        client = openai.OpenAI(base_url=f"http://localhost:{port}/v1", api_key="none", max_retries=0,
                               timeout=60)
        for group in (models, chats, completions, errors):
            group(client)
        curl(port)
        server.send_signal(signal.SIGTERM)
        check("the server ends with 0", server.wait(30) == 0)
    finally:
        server.kill()
    print(f"{passed} passed, {failed} failed")
    return 1 if failed or not passed else 0


if __name__ == "__main__":
    sys.exit(main())
