"""A server for the page's bad days: the real page and the real list of models, but answers written by
the test. What is asked decides what comes."""
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

HOSTILE = ("<script>document.title='taken'</script><img src=x onerror=\"document.title='taken'\">"
           "<a href=\"javascript:alert(1)\">link</a> [click](javascript:alert(1)) <style>*{color:red}"
           "</style>\n\n# <b>head</b>\n- <i>item</i>\n\n```html\n</pre></code><script>alert(1)</script>"
           "\n```\n\n`<u>x</u>` **<s>y</s>** &lt;&amp; <iframe src=http://192.0.2.1/></iframe>")
ESCAPES = "\x1b[31mred\x1b]0;title\x07 \u202etxet\u202c \u0000|\ufffd|\ud7ff \u200bzero"
SPLIT = "Grüße 👋🏽, 你好, naïve café 🏳️‍🌈 — done."


class Stub:
    """`gate` lets an answer go on, step by step; `asked` holds the bodies of the questions."""

    def __init__(self, page, headers, models, port=0):
        self.page, self.headers, self.models = page, headers, models
        self.asked, self.gone = [], 0
        self.busy, self.busy_status = 0, 503  # how many questions are refused, and how
        self.tabs = []  # what each question named as its tab
        self.gate = threading.Semaphore(0)
        stub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def do_GET(self):
                stub.get(self)

            def do_POST(self):
                length = int(self.headers["Content-Length"])
                stub.post(self, json.loads(self.rfile.read(length)))

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_):
                pass  # clients that go away belong to the test

        self.server = Server(("127.0.0.1", port), Handler)
        self.port = self.server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}/"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05},
                         daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()

    def send(self, handler, status, data, **headers):
        body = data if isinstance(data, bytes) else json.dumps(data).encode()
        handler.send_response(status)
        for name, value in {"Content-Type": "application/json", "Connection": "close",
                            **headers}.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)
        handler.close_connection = True

    def get(self, handler):
        if handler.path == "/":
            self.send(handler, 200, self.page, **self.headers)
        elif handler.path.startswith("/api/v1/inference/models"):
            self.send(handler, 200, self.models)
        elif handler.path == "/props":
            self.send(handler, 200, {"base_dir": None, "sample": False})
        else:
            self.send(handler, 404, {"detail": "no such route"})

    def post(self, handler, body):
        self.asked.append(body)
        self.tabs.append(handler.headers["X-Client-Id"])
        question = body["messages"][-1]["content"] if "messages" in body else body.get("prompt", "")
        if question == "refuse":
            return self.send(handler, 400, {"error": {"message": "temperature must be <b>warm</b>",
                                                      "code": "out_of_range"}})
        if self.busy > 0:
            self.busy -= 1
            return self.send(handler, self.busy_status, {"error": {
                "message": "the queue is full", "code": "queue_full"}}, Retry_After="1")
        handler.send_response(200)
        handler.send_header("Content-Type", "text/event-stream; charset=utf-8")
        handler.send_header("Connection", "close")
        handler.end_headers()
        handler.close_connection = True
        try:
            self.answer(handler, question, body)
        except OSError:
            self.gone += 1  # the page has closed the connection
        return None

    def answer(self, handler, question, body):
        def write(data):
            handler.wfile.write(data)
            handler.wfile.flush()

        def token(text):
            write(b"data: " + json.dumps({"token": text, "gpu": 0}, ensure_ascii=False).encode()
                  + b"\n\n")

        def done(tokens=1, **more):
            write(b"data: " + json.dumps({
                "done": True, "finish_reason": "stop", "seed": 4711, "model": body.get("model"),
                "usage": {"prompt_tokens": 7, "completion_tokens": tokens,
                          "total_tokens": 7 + tokens}, **more}).encode() + b"\n\n")

        if question == "wait":
            for comment in (": queued 3", ": loading 62", ": reading 40", ": ping"):
                write(comment.encode() + b"\n\n")
                self.gate.acquire(timeout=20)
            token("There.")
        elif question == "half a call":
            for text in ("It is ", "<|python_start|>", "6*7"):
                token(text)
            self.gate.acquire(timeout=20)
            token("<|python_end|>")
            for text in ("<|output_start|>", "42", "<|output_end|>", "42."):
                token(text)
        elif question == "an empty call":
            for text in ("Well", "<|python_start|>", "<|python_end|>", "."):
                token(text)
        elif question == "split":
            text = json.dumps({"token": SPLIT, "gpu": 0}, ensure_ascii=False).encode()
            for byte in b": ping\n\ndata: " + text + b"\n\n":  # every cut there is
                write(bytes([byte]))
                time.sleep(0.001)
        elif question == "endless":
            for i in range(100000):
                token(f"word{i} ")
                time.sleep(0.005)
        elif question == "break":
            for text in ("One ", "two ", "three"):
                token(text)
            return
        elif question == "three":  # the beginning of an answer, to be continued
            token(" four.")
        elif question == "fail":
            token("A beginning")
            write(b'data: {"error": {"message": "the GPU was lost", "code": "device_lost"}}\n\n')
            return
        elif question == "nothing":
            return done(0)
        elif question == "hostile":
            for i in range(0, len(HOSTILE), 7):
                token(HOSTILE[i:i + 7])
        elif question == "escapes":
            token(ESCAPES)
        elif question == "a million":
            for _ in range(16):
                token("*a_`b<" * 10923)
        elif question == "marks":
            token("*a **b __c _d `e " * 5000)
        elif question == "lines":
            for i in range(120):
                token(f"line {i}\n\n")
            self.gate.acquire(timeout=20)
            token("the last line\n\n")
            self.gate.acquire(timeout=20)
        elif question == "many lines":
            token("line\n\n" * 120)
        elif question == "long ago":
            token("Too long.")
            return done(dropped_messages=2)
        elif question == "full":
            token("To the brim.")
            return done(1017, finish_reason="length")
        elif question == "line ends":
            token("```py\r\ncode\r\n```\r\nbehind\u2028it")
        elif question == "markdown":
            token("# Head\n\nSome *italic* and **bold** and `code` and 2*3*4 and snake_case_name.\n\n"
                  "1. one\n2. two\n   - inner\n\n```python\nprint('<b>')\n```\n[text](http://x.org)")
        else:
            token("You said: " + question)
        return done()
