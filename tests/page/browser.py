"""Drives a headless Chromium with the standard library only: messages of the DevTools protocol, each
ended by a zero byte, through two pipes (file descriptors 3 and 4 of the browser)."""
import base64
import json
import os
import shutil
import subprocess
import tempfile
import threading
import time

NAMES = ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome", "chrome",
         "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome")
KEYS = {"Enter": ("Enter", 13, "\r"), "Tab": ("Tab", 9, ""), "Escape": ("Escape", 27, ""),
        "ArrowUp": ("ArrowUp", 38, ""), "ArrowLeft": ("ArrowLeft", 37, ""),
        "ArrowRight": ("ArrowRight", 39, ""), "ArrowDown": ("ArrowDown", 40, ""),
        " ": ("Space", 32, " "), "?": ("Slash", 191, "?")}
ALT, SHIFT = 1, 8


def find_browser():
    wanted = os.environ.get("NANOGPT_BROWSER")
    return next((path for path in map(shutil.which, [wanted] if wanted else NAMES) if path), None)


class Browser:
    def __init__(self, path):
        self.profile = tempfile.mkdtemp(prefix="nanogpt-page-")
        to_read, self.to_browser = os.pipe()
        self.from_browser, to_write = os.pipe()

        def pipes_to_3_and_4():
            first, second = os.dup(to_read), os.dup(to_write)  # 3 or 4 may be one of them already
            os.dup2(first, 3)
            os.dup2(second, 4)

        # Names of hosts lead nowhere: what the page needs it has.
        flags = ["--headless=new", "--remote-debugging-pipe", "--no-first-run", "--disable-gpu",
                 "--disable-dev-shm-usage", "--disable-background-networking", "--mute-audio",
                 "--disable-component-update", "--user-data-dir=" + self.profile,
                 "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", "--hide-scrollbars"]
        if os.geteuid() == 0:
            flags.append("--no-sandbox")
        self.process = subprocess.Popen([path, *flags, "about:blank"], pass_fds=(3, 4),
                                        preexec_fn=pipes_to_3_and_4, stdin=subprocess.DEVNULL,
                                        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        os.close(to_read)
        os.close(to_write)
        self.number, self.answers, self.listeners = 0, {}, []
        self.changed = threading.Condition()
        self.alive = True
        threading.Thread(target=self.listen, daemon=True).start()

    def listen(self):
        rest = b""
        while True:
            data = os.read(self.from_browser, 1 << 20)
            if not data:
                break
            *messages, rest = (rest + data).split(b"\0")
            for message in map(json.loads, messages):
                with self.changed:
                    if "id" in message:
                        self.answers[message["id"]] = message
                    for listener in self.listeners:
                        listener(message)
                    self.changed.notify_all()
        with self.changed:
            self.alive = False
            self.changed.notify_all()

    def call(self, method, params=None, session=None, timeout=60):
        with self.changed:
            self.number += 1
            number = self.number
        message = {"id": number, "method": method, "params": params or {}}
        if session:
            message["sessionId"] = session
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self.to_browser, data):]
        with self.changed:
            if not self.changed.wait_for(lambda: number in self.answers or not self.alive, timeout):
                raise TimeoutError(method)
            if number not in self.answers:
                raise RuntimeError("the browser has ended")
            answer = self.answers.pop(number)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']['message']}")
        return answer["result"]

    def close(self):
        try:
            self.call("Browser.close", timeout=5)
            self.process.wait(5)
        except (TimeoutError, RuntimeError, OSError, subprocess.TimeoutExpired):
            self.process.kill()
            self.process.wait()
        shutil.rmtree(self.profile, ignore_errors=True)


class Page:
    """One tab with storage of its own. `faults` collects what must not happen."""

    def __init__(self, browser, url=None, width=1440, height=900, touch=False, **features):
        self.browser = browser
        context = browser.call("Target.createBrowserContext")["browserContextId"]
        target = browser.call("Target.createTarget", {"url": "about:blank",
                                                      "browserContextId": context})["targetId"]
        self.context = context
        self.session = browser.call("Target.attachToTarget",
                                    {"targetId": target, "flatten": True})["sessionId"]
        self.requests, self.faults = [], []
        browser.listeners.append(self.hear)
        for domain in ("Page", "Runtime", "Log", "Network", "Audits"):
            self.call(domain + ".enable")
        self.call("Page.addScriptToEvaluateOnNewDocument", {"source": "window.reports = [];"
                  "addEventListener('securitypolicyviolation', (e) => reports.push("
                  "e.violatedDirective + ' ' + e.blockedURI));"})
        self.size(width, height, touch)
        self.features(**features)
        if url:
            self.open(url)

    def hear(self, message):
        if message.get("sessionId") != self.session:
            return
        method, params = message.get("method"), message.get("params", {})
        if method == "Network.requestWillBeSent":
            self.requests.append(params["request"])
        elif method == "Runtime.exceptionThrown":
            details = params["exceptionDetails"]
            self.faults.append("exception: " + details.get("exception", details).get(
                "description", details["text"]))
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning"):
            self.faults.append("console: " + str(params["args"]))
        elif method == "Log.entryAdded" and params["entry"]["level"] == "error":
            entry = params["entry"]
            if entry["source"] != "network":  # refusals and lost connections, which are tested here
                self.faults.append("log: " + entry["text"])
        elif method == "Audits.issueAdded" and "Content" in params["issue"]["code"]:
            self.faults.append("policy: " + json.dumps(params["issue"]["details"]))
        elif method == "Page.javascriptDialogOpening":
            self.faults.append("dialog: " + params["message"])

    def call(self, method, params=None, timeout=60):
        return self.browser.call(method, params, self.session, timeout)

    def size(self, width, height, touch=False, scale=1):
        self.call("Emulation.setDeviceMetricsOverride", {"width": width, "height": height,
                                                         "deviceScaleFactor": scale,
                                                         "mobile": touch})
        self.call("Emulation.setTouchEmulationEnabled", {"enabled": touch, "maxTouchPoints": 5}
                  if touch else {"enabled": False})

    def features(self, **features):
        self.call("Emulation.setEmulatedMedia", {"features": [
            {"name": name.replace("_", "-"), "value": value} for name, value in features.items()]})

    def open(self, url):
        self.call("Page.navigate", {"url": url})
        self.wait("document.readyState === 'complete'")

    def js(self, code, timeout=60):
        answer = self.call("Runtime.evaluate", {"expression": code, "awaitPromise": True,
                                                "returnByValue": True, "userGesture": True}, timeout)
        if "exceptionDetails" in answer:
            raise RuntimeError(answer["exceptionDetails"].get("exception", {}).get(
                "description", code))
        return answer["result"].get("value")

    def wait(self, code, timeout=20):
        """Waits until it is true; gives its value, or None after the time."""
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            try:
                value = self.js(code)
                if value:
                    return value
            except RuntimeError:
                pass  # between two documents
            time.sleep(0.02)
        return None

    def key(self, key, modifiers=0):
        code, number, text = KEYS.get(key) or ("Key" + key.upper(), ord(key.upper()), key)
        event = {"key": key, "code": code, "windowsVirtualKeyCode": number, "modifiers": modifiers}
        if text and not modifiers & ALT:
            event["text"] = text
        self.call("Input.dispatchKeyEvent", {"type": "keyDown", **event})
        event.pop("text", None)
        self.call("Input.dispatchKeyEvent", {"type": "keyUp", **event})

    def type(self, text):
        self.call("Input.insertText", {"text": text})

    def click(self, selector):
        """A real click in the middle; what lies above it would get it."""
        spot = self.js(f"""(() => {{ const node = document.querySelector({json.dumps(selector)});
            node.scrollIntoView({{block: 'center'}});
            const box = node.getBoundingClientRect();
            return [box.x + box.width / 2, box.y + box.height / 2]; }})()""")
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", {"type": kind, "x": spot[0], "y": spot[1],
                                                   "button": "left", "clickCount": 1})

    def names(self):
        """(role, name) of everything a screen reader finds."""
        nodes = self.call("Accessibility.getFullAXTree")["nodes"]
        return [(node["role"]["value"], node.get("name", {}).get("value", ""))
                for node in nodes if not node.get("ignored") and "role" in node]

    def screenshot(self, path):
        with open(path, "wb") as file:
            file.write(base64.b64decode(self.call("Page.captureScreenshot")["data"]))

    def close(self):
        self.faults += ["policy: " + report for report in self.js("window.reports") or []]
        self.browser.listeners.remove(self.hear)
        self.browser.call("Target.disposeBrowserContext", {"browserContextId": self.context})
