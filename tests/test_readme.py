#!/usr/bin/env python3
"""README.md against the program: its commands run, its transcript comes out word for word, what it
names exists, its speeds are those of SPEED.md. (Its example is compiled and run by consumers/run.sh.)

    test_readme.py NANOGPT ROOT

Every piece of code in the text has to be a command, a flag, an address, a file or a name of the
source; one that is none of these fails. The last line is "N passed, N failed". Standard library only.
"""
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request

NANOGPT, ROOT = map(os.path.abspath, sys.argv[1:3])
SAMPLE = os.path.join(ROOT, "tools", "sample")
FIRST_COMMAND = 15  # the line by which a reader has something to type
MOST_WORDS = 900

passed = failed = 0


def check(name, good, shown=""):
    global passed, failed
    passed, failed = passed + bool(good), failed + (not good)
    if not good:
        print(f"FAILED: {name}: {shown!r}")


def read(path):
    with open(os.path.join(ROOT, path), encoding="utf-8") as file:
        return file.read()


README, SPEED = read("README.md"), read("tools/SPEED.md")
SOURCES = "".join(read(path) for path in ("nanogpt.hpp", "kernels.cuh", "demo.cpp", "CMakeLists.txt"))


def run(arguments, home, **more):
    """The program with a home of its own and no GPU."""
    env = {"PATH": os.environ["PATH"], "HOME": home, "CUDA_VISIBLE_DEVICES": "-1", **more}
    return subprocess.run([NANOGPT, *arguments], env=env, stdin=subprocess.DEVNULL,
                          capture_output=True, text=True, timeout=300, cwd=home)


HELP = {}  # command -> the text of its flags


def read_help(home):
    for name in re.findall(r"^  nanogpt ([a-z]+) ", run(["help"], home).stdout.split("\n\n")[1] + "\n", re.M):
        HELP[name] = run(["help", name], home).stdout


def arguments_of(line):
    """What the program gets by a line of the README, or None: chat.sh hands its own on to `chat`."""
    words = shlex.split(line, comments=True)
    if words and words[0] in ("nanogpt", "./build/nanogpt"):
        return words[1:]
    return ["chat", *words[1:]] if words[:1] == ["./tools/chat.sh"] else None


# ---- commands

def status_of(url, data=b"{}"):
    """Of a POST of an empty object, which is no question: known addresses answer that, too."""
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    try:
        return urllib.request.urlopen(request, timeout=60).status
    except urllib.error.HTTPError as error:
        return error.code


def serve(arguments, home, base):
    """Starts the server on a free port, asks for every address that the README names, and ends it."""
    env = {"PATH": os.environ["PATH"], "HOME": home, "NANOCHAT_BASE_DIR": base,
           "CUDA_VISIBLE_DEVICES": "-1"}
    server = subprocess.Popen([NANOGPT, *arguments, "--port", "0"], env=env, text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    try:
        found = re.search(r"http://127\.0\.0\.1:\d+", server.stdout.readline())
        check("serve prints its address", found)
        paths = re.findall(r"`(/[a-z0-9/_]+)`", README)
        check("addresses are named", len(paths) >= 3, paths)
        for path in ["/", *paths]:
            check(f"serve knows {path}", status_of(found.group() + path) not in (404, 500))
        check("serve knows no others", status_of(found.group() + "/v1/no/such/thing") == 404)
        check("the page", status_of(found.group() + "/", None) == 200)
        server.send_signal(signal.SIGTERM)
        check("serve ends", server.wait(60) == 0, server.returncode)
    finally:
        server.kill()


def commands(home, base):
    blocks = re.findall(r"^```sh\n(.*?)^```$", README, re.M | re.S)
    lines = [line for block in blocks for line in block.splitlines() if line.strip()]
    check("there are commands", len(lines) >= 4, lines)
    for line in lines:
        arguments = arguments_of(line)
        check(f"{line}: a command of this program", arguments is not None)
        if arguments is None:
            continue
        if arguments[:1] == ["serve"]:
            serve(arguments, home, base)
            continue
        result = run(arguments, home, NANOCHAT_BASE_DIR=base)
        check(line, result.returncode == 0, result.stderr)
        asks = "-p" in arguments or arguments[0] != "chat"
        check(f"{line}: prints something", bool(result.stdout.strip()) or not asks, result.stdout)


def transcripts(home):
    """Indented lines: a command after $, and its whole output. No checkpoint is there but the sample."""
    found = re.findall(r"^    \$ (.*)\n((?:    .*\n)+)", README, re.M)
    check("there is a transcript", found)
    for line, output in found:
        result = run(arguments_of(line), home)
        wanted = re.sub("^    ", "", output, flags=re.M)
        check(line, result.stdout == wanted, result.stdout)


def table_of_commands():
    table = README.split("| command | |\n", 1)[1].split("\n\n", 1)[0]
    rows = [re.findall(r"`([a-z]+)`", row.split("|")[1]) for row in table.splitlines()[1:]]
    named = [name for row in rows for name in row]
    check("the table of commands is the program's list", sorted(named) == sorted(set(HELP) - {"help", "version"}),
          set(named) ^ set(HELP))
    with_json = [name for name, text in HELP.items() if "--json" in text]
    check("most commands have --json", 2 * len(with_json) > len(HELP), with_json)


# ---- names

def is_file(name):
    return any(os.path.exists(os.path.join(ROOT, folder, name)) for folder in ("", "tests"))


def is_known(span):
    """Is this piece of code anything?"""
    words = span.split()
    if span in HELP or span == "g++ -std=c++20 -O3 main.cpp" or is_file(words[0]):
        return True
    if arguments_of(span) is not None:
        command = (arguments_of(span) + ["chat"])[0]
        return command in HELP and all(name == "COMMAND" or name in HELP for name in words[2:])
    if words[0].startswith("-D"):
        return words[0][2:].split("=")[0] in SOURCES
    if words[0].startswith("-"):
        return any(re.search(rf"(^|[ ,]){re.escape(words[0])}[ ,\n]", text) for text in HELP.values())
    # a name of the source, with or without its namespace; a folder of nanochat's
    plain = re.sub(r"^(nanogpt::|\$|~/)|\(.*\)$|/$", "", span)
    return plain in SOURCES


def names():
    text = re.sub(r"^```.*?^```$|^    .*?$", "", README, flags=re.M | re.S)
    for span in sorted(set(re.findall(r"`([^`\n]+)`", text))):
        for part in span.split(" && "):
            check(f"`{part}` is known", part.startswith("./a.out ") or is_known(part))
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        check(f"{target} exists", target.startswith("https://") or is_file(target))
    for script in set(re.findall(r"\./(tools/\w+\.sh)", README)):
        check(f"{script} can be run", os.access(os.path.join(ROOT, script), os.X_OK))


# ---- speed

per_ms, per_us = (lambda ms: 1e3 / ms), (lambda us: 1e6 / us)  # to tokens a second
same, seconds = (lambda value: value), (lambda ms: ms / 1e3)

# Lines of the README with # for each figure, and where those stem from: table, row and column of
# SPEED.md, and what makes the one of the other.
MEASURED = {
    "| decoding, float32 | # tok/s, # of what the memory delivers | nanochat in PyTorch: # tok/s |": [
        ("forward", "nanogpt, float32", "decode ms/token", per_ms),
        ("forward", "nanogpt, float32", "of the read bandwidth", same),
        ("forward", "nanochat, PyTorch float32", "decode ms/token", per_ms)],
    "| decoding, bfloat16 weights | # tok/s, # | |": [
        ("forward", "nanogpt, bfloat16", "decode ms/token", per_ms),
        ("forward", "nanogpt, bfloat16", "of the read bandwidth", same)],
    "| reading a prompt of 512 tokens | # s | nanochat in PyTorch: # s |": [
        ("forward", "nanogpt, float32", "prefill 512 ms", seconds),
        ("forward", "nanochat, PyTorch float32", "prefill 512 ms", seconds)],
    "| tokenizer, English | # MB/s | tiktoken: # MB/s |": [
        ("tokenizer", "English", "nanogpt MB/s", same),
        ("tokenizer", "English", "tiktoken MB/s", same)],
    "| start, one answer, exit (sample) | # s | nanochat: # s |": [
        ("start", "`nanogpt", "seconds", same), ("start", "nanochat", "seconds", same)],
    "NVIDIA H200, bfloat16, context 1,024, one sequence: d12 # tok/s, d20 #, d32 # "
    "(compiled PyTorch in a CUDA graph: #, #, #).": [
        ("cuda_model", row, depth, per_us)
        for row in ("decoding, batch 1", "the peer: prompt; batch 1") for depth in ("d12", "d20", "d32")],
}
NUMBER = r"([\d,]*\.?\d+)"
MOST_APART = 0.01  # what rounding may do


def lines_of(text, table):
    return text.split(f"<!-- {table} -->\n", 1)[1].split(f"<!-- /{table} -->", 1)[0].splitlines()


def figure(table, row, column):
    """Of SPEED.md, in the first row of that beginning; of several figures in one cell the second."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")]
            for line in lines_of(SPEED, table) if line.startswith("|")]
    cell = next(one for one in rows if one[0].startswith(row))[rows[0].index(column)]
    return float(re.match(NUMBER, cell.split("; ")[";" in cell])[0].replace(",", ""))


def speed():
    rows = [line for line in lines_of(README, "speed") if line.startswith("| ")][1:]
    for line, sources in MEASURED.items():
        found = re.search("^" + re.escape(line).replace(r"\#", NUMBER) + "$", README, re.M)
        check(f"{line} is there", found and len(found.groups()) == len(sources))
        if not found:
            continue
        rows = [row for row in rows if row != found[0]]
        for shown, (*place, convert) in zip(found.groups(), sources):
            measured = convert(figure(*place))
            check(f"{line}: {shown} is what SPEED.md has",
                  abs(float(shown.replace(",", "")) / measured - 1) <= MOST_APART, (place, measured))
    check("every line of the table of speeds has its source", not rows, rows)


def form():
    lines = README.splitlines()
    first = lines.index("```sh") + 2
    check(f"the first command stands by line {FIRST_COMMAND}", first <= FIRST_COMMAND, first)
    words = len(README.split())
    check(f"fewer than {MOST_WORDS} words", words < MOST_WORDS, words)


def main():
    with tempfile.TemporaryDirectory() as folder:
        home, base = os.path.join(folder, "home"), os.path.join(folder, "nanochat")
        os.makedirs(home)
        shutil.copytree(os.path.join(SAMPLE, "tokenizer"), os.path.join(base, "tokenizer"))
        shutil.copytree(os.path.join(SAMPLE, "chatsft_checkpoints", "d4"),
                        os.path.join(base, "chatsft_checkpoints", "d12"))
        read_help(home)
        commands(home, base)
        transcripts(home)
        table_of_commands()
    names()
    speed()
    form()
    print(f"{passed} passed, {failed} failed")
    return 1 if failed or not passed else 0


if __name__ == "__main__":
    sys.exit(main())
