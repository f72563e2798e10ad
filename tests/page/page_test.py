#!/usr/bin/env python3
"""Tests the web page of `nanogpt serve` in a headless Chromium.

    page_test.py PROGRAM SAMPLE [SHOTS]    the built program; tools/sample; a folder for screenshots

Prints each check, last "N passed, N failed". Exit code 77 if there is no browser. $NANOGPT_BROWSER
names one. Standard library only.
"""
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import urllib.request

sys.dont_write_bytecode = True
from browser import ALT, SHIFT, Browser, Page, find_browser  # noqa: E402
from stub import ESCAPES, HOSTILE, SPLIT, Stub  # noqa: E402

passed, failed = [], []
faults, origins = [], set()

# Contrast of every visible text with what is painted behind it, by the formula of WCAG 2.
CONTRAST = r"""(() => {
  const numbers = (color) => {
    const parts = color.match(/[\d.]+%?/g).map(parseFloat);
    if (color.startsWith('color(srgb')) for (const i of [0, 1, 2]) parts[i] *= 255;
    return [parts[0], parts[1], parts[2], parts[3] ?? 1];
  };
  const over = (top, below) => [0, 1, 2].map((i) => top[i] * top[3] + below[i] * (1 - top[3]))
    .concat(1);
  const behind = (node) => {
    const layers = [];
    for (let at = node; at; at = at.parentElement) {
      layers.push(numbers(getComputedStyle(at).backgroundColor));
      if (layers.at(-1)[3] === 1) break;
    }
    return layers.reverse().reduce((below, layer) => over(layer, below), [255, 255, 255, 1]);
  };
  const light = (color) => color.slice(0, 3).map((c) => c / 255)
    .map((c) => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const bad = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  let count = 0;
  while (walker.nextNode()) {
    const node = walker.currentNode.parentElement, text = walker.currentNode.data.trim();
    if (!text || !node.checkVisibility({opacityProperty: true, visibilityProperty: true}) ||
        node.closest('.sr, .skip, option, script, style, button:disabled')) continue;
    ++count;
    const back = behind(node), fore = over(numbers(getComputedStyle(node).color), back);
    const [low, high] = [light(back), light(fore)].sort((a, b) => a - b);
    const ratio = (high + 0.05) / (low + 0.05);
    if (ratio < 4.5) bad.push(ratio.toFixed(2) + ' ' + text.slice(0, 30));
  }
  return count > 20 ? bad : ['only ' + count + ' texts'];
})()"""
SIDEWAYS = """[document.documentElement.scrollWidth > innerWidth && 'page',
  ...[...document.querySelectorAll('#scroll, aside, dialog')].filter((node) =>
    node.checkVisibility() && node.scrollWidth > node.clientWidth + 1).map((node) => node.id)]
  .filter(Boolean)"""
SMALL = """[...document.querySelectorAll('button, select, input, textarea, summary')]
  .filter((node) => node.checkVisibility() && !node.closest('[inert], .tokens') &&
    !node.matches('[type=range]')).map((node) => {
      const box = node.getBoundingClientRect(), more = getComputedStyle(node, '::after');
      const extra = more.content !== 'none' && more.position === 'absolute' ? parseFloat(more.top) : 0;
      return [node.id || node.ariaLabel || node.textContent, box.width - 2 * extra,
        box.height - 2 * extra];
    }).filter(([, width, height]) => width < 43.9 || height < 43.9)"""


def check(name, good, detail=""):
    (passed if good else failed).append(name)
    print(("ok    " if good else "FAIL  ") + name, flush=True)
    if not good:
        print(f"      {str(detail)[:600]}")


def make_base(folder, sample):
    """Several checkpoints out of the one there is: types, losses in both units, one unfinished."""
    shutil.copytree(os.path.join(sample, "tokenizer"), os.path.join(folder, "tokenizer"))
    source = os.path.join(sample, "chatsft_checkpoints", "d4")
    with open(os.path.join(source, "meta_002600.json"), encoding="utf-8") as file:
        meta = json.load(file)
    for losses in ("val_loss", "val_bpb"):
        meta.pop(losses)

    def put(kind, step, losses):
        to = os.path.join(folder, kind + "_checkpoints", "d4")
        os.makedirs(to, exist_ok=True)
        shutil.copy(os.path.join(source, "model_002600.pt"),
                    os.path.join(to, f"model_{step:06d}.pt"))
        if losses is not None:
            with open(os.path.join(to, f"meta_{step:06d}.json"), "w", encoding="utf-8") as file:
                json.dump({**meta, **losses, "step": step}, file)

    put("chatsft", 2600, {"val_bpb": 1.2281})
    put("chatsft", 1300, {"val_bpb": 1.43})
    put("chatsft", 600, {"val_loss": 2.3456})
    put("chatrl", 400, {})
    put("mid", 800, {"val_loss": 1.9})
    put("base", 5000, {"val_bpb": 1.3})
    put("base", 6000, None)
    return put


class Program:
    def __init__(self, program, base, *more):
        where = ["--base-dir", base] if base else []
        self.process = subprocess.Popen([program, "serve", "--port", "0", *where, *more],
                                        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        self.url = None
        for line in self.process.stdout:
            found = re.search(r"http://127\.0\.0\.1:\d+/", line)
            if found:
                self.url = found.group()
                break
        if not self.url:
            raise RuntimeError("the server did not start")
        # Whoever does not read what a program prints makes it wait.
        threading.Thread(target=self.process.stdout.read, daemon=True).start()

    def close(self):
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()


def fetch(url):
    with urllib.request.urlopen(url, timeout=20) as reply:
        return reply.read(), dict(reply.headers)


def say(page, text, wait=True):
    """Writes a message as a person does and waits for the end of the answer."""
    page.js("$('text').focus()")
    page.type(text)
    page.key("Enter")
    if wait:
        page.wait("$('log').ariaBusy === 'false' || $('log').getAttribute('aria-busy') === 'false'")


LAST = "[...document.querySelectorAll('.turn:not(.user)')].at(-1)"
TEXT = LAST + "?.querySelector('.body').textContent"
TROUBLE = LAST + "?.querySelector('.trouble').textContent"


def act(page, label):
    """Presses the button with this label in the last answer."""
    assert page.wait(f"[...{LAST}.querySelectorAll('button')].some((b) => (b.ariaLabel || "
                     f"b.textContent) === {json.dumps(label)})"), label
    page.js(f"[...{LAST}.querySelectorAll('button')].find((b) => (b.ariaLabel || b.textContent) "
            f"=== {json.dumps(label)}).click()")


def bodies(page, path):
    return [json.loads(r["postData"]) for r in page.requests
            if r["method"] == "POST" and r["url"].endswith(path)]


# ---- the real server

def document(server):
    body, headers = fetch(server.url)
    text = body.decode()
    check("document: at most 96 KiB", len(body) <= 96 * 1024, len(body))
    rules = headers.get("Content-Security-Policy", "")
    check("document: the policy allows nothing but its own style, script and server",
          re.fullmatch(r"default-src 'none'; script-src 'nonce-[^']+'; style-src 'nonce-[^']+'; "
                       r"connect-src 'self'; img-src 'self' data: blob:; base-uri 'none'; "
                       r"form-action 'none'; frame-ancestors 'none'", rules), rules)
    markup = re.sub(r"<(script|style)[ >].*?</\1>", "", text, flags=re.DOTALL)
    check("document: no style and no listener is written into an element",
          not re.search(r"<[^>]*\s(style|on\w+)\s*=", markup))
    check("document: nothing makes HTML of a text", not re.search(
        r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|new Function", text))
    addresses = set(re.findall(r"https?://[^\s'\"`<]+", text)) - {"http://www.w3.org/2000/svg"}
    check("document: no address of another server is in it", not addresses, addresses)


def models(page, put):
    check("load: title, language, one heading of the first order", page.js(
        "document.title === 'nanogpt' && document.documentElement.lang === 'en' && "
        "document.querySelectorAll('h1').length === 1"))
    page.wait("$('model').options.length === 7")
    groups = page.js("[...$('model').querySelectorAll('optgroup')].map((g) => [g.label, "
                     "...[...g.children].map((o) => o.textContent)])")
    check("models: all are there, grouped by type",
          [(g[0].split(" ")[0], len(g) - 1) for g in groups]
          == [("SFT", 3), ("RL", 1), ("MID", 1), ("BASE", 2)], groups)
    flat = [option for group in groups for option in group[1:]]
    check("models: an entry tells step, loss with its unit and architecture",
          "d4 · step 1,300 · 1.430 bits/byte · 4 layers × 256" in flat, flat)
    check("models: the best of each type and unit is marked, never across units",
          [o.split(" · ")[1] for o in flat if "★" in o]
          == ["step 2,600", "step 600", "step 800", "step 5,000"], flat)
    check("models: an unknown loss is called so",
          "d4 · step 400 · loss not known · 4 layers × 256" in flat, flat)
    check("models: one that cannot be used is disabled and says why", page.js(
        "[...$('model').options].filter((o) => o.disabled).map((o) => o.textContent)"
        ".join().includes('step 6,000 · cannot be used: ')"), flat)
    check("models: the default is chosen", page.js("$('model').value") == "sft/d4/2600")
    page.js("$('model').value = 'sft/d4/600'; $('model').dispatchEvent(new Event('change'))")
    about = page.js("$('about').textContent")
    check("models: the information tells loss, unit, meaning, architecture, parameters, file",
          all(word in about for word in ("2.346 nats/token", "equally likely", "4 × 256", "1,024",
                                         "7.3 million", "model_000600.pt", "ready")), about)
    check("models: the command for the terminal names this checkpoint, and where it is", re.fullmatch(
        r"nanogpt chat -i sft -g d4 -s 600 --base-dir /\S+/base", page.js("$('cli').textContent")),
        page.js("$('cli').textContent"))
    page.browser.call("Browser.grantPermissions", {
        "permissions": ["clipboardReadWrite", "clipboardSanitizedWrite"],
        "browserContextId": page.context})
    page.click("#cli + button")
    check("models: and can be copied", page.wait(
        "navigator.clipboard.readText().then((text) => text.startsWith('nanogpt chat -i sft'))"))
    check("models: the line for curl is whole",
          "/v1/chat/completions" in page.js("$('curl').textContent"))
    page.click("#all-open")
    check("models: a table of all, with the reason of the one that cannot be used", page.js(
        "$('dialog').open && $('dialog').querySelectorAll('td:first-child').length === 7 && "
        "$('dialog').textContent.includes('incomplete')"))
    page.js("$('dialog').querySelector('td button').click()")
    check("models: chosen from the table", page.js("$('model').value === 'sft/d4/2600' && "
                                                   "!$('dialog').open"))
    kept = page.js("""(() => {  // in one go, so that no list that comes meanwhile is in between
        const rows = [$('model').options[3], $('examples').firstChild];
        rows[1].focus();
        const before = document.activeElement === rows[1];
        takeModels({models: models.map((m) => ({...m, loaded: !m.loaded})), device, default: model.id});
        return [before, ...rows.map((row) => row.isConnected), document.activeElement === rows[1],
          /, loaded/.test($('about').textContent) === !!model.loaded]; })()""")
    check("models: where only a flag changes, list and examples stay, with the focus", all(kept), kept)
    put("chatsft", 3000, {"val_bpb": 1.1})
    check("models: a new checkpoint appears by itself, and is the best now", page.wait(
        "[...$('model').options].some((o) => /3,000.*★/.test(o.textContent)) && "
        "$('model').value === 'sft/d4/2600'", 30))


def chatting(page):
    page.click("#tab-settings")
    page.js("for (const [name, value] of [['temperature', '0'], ['seed', '5']]) { $(name).value = "
            "value; $(name).dispatchEvent(new Event('input')); }")
    page.click("#tab-model")
    say(page, "What is 37 times 41?")
    check("chat: an answer streams in, a calculator call is a box", page.wait(
        LAST + "?.querySelector('.calc')?.textContent === 'calculator: 37*41 = 1517'"),
        page.js(TEXT))
    check("chat: no mark of a special token is seen", "<|" not in page.js(TEXT), page.js(TEXT))
    check("chat: the question stands above it and the box is empty", page.js(
        "document.querySelector('.bubble').textContent === 'What is 37 times 41?' && "
        "$('text').value === '' && $('send').disabled"))
    stats = page.js(LAST + ".querySelector('.stats').textContent")
    check("chat: tokens, seed, model and the reason of the end are told",
          all(word in stats for word in ("tokens", "sft/d4/2600", "Seed5", "by the model")), stats)
    check("chat: the meter tells the context", re.fullmatch(
        r"\d+ of 1,024 tokens", page.js("$('meter-text').textContent")))
    check("screen reader: says that the answer is complete, with its words", page.wait(
        "/^Answer complete, \\d+ words$/.test($('status').textContent)"),
        page.js("$('status').textContent"))
    say(page, "And 2 times 3?")
    sent = bodies(page, "/chat/completions")[-1]
    check("chat: what was said before goes along, calls word for word",
          [m["role"] for m in sent["messages"]] == ["user", "assistant", "user"]
          and "<|python_start|>37*41<|python_end|><|output_start|>1517<|output_end|>"
          in sent["messages"][1]["content"], sent)
    check("chat: and the settings", (sent["temperature"], sent["top_k"], sent["max_tokens"],
                                     sent["seed"]) == (0, 50, 512, 5), sent)
    first = page.js(TEXT)
    act(page, "Regenerate")
    check("chat: regenerate with the same seed gives the same answer", page.wait(
        f"!run && {TEXT} === {json.dumps(first)}"))
    check("chat: and says that it will", "At temperature 0 there is one answer only" in page.js(
        "$('toast').textContent"), page.js("$('toast').textContent"))
    page.js("set('temperature', 0.5)")
    act(page, "Regenerate")
    check("chat: with a seed too", page.wait("!run") and "With the seed 5 there is one answer only" in page.js(
        "$('toast').textContent"), page.js("$('toast').textContent"))
    page.js("set('seed', ''); $('toast').hidePopover()")
    act(page, "Regenerate")
    check("chat: without one nothing is said", page.wait("!run") and not page.js(
        "$('toast').matches(':popover-open')"))
    page.js("set('temperature', 0); set('seed', 5)")
    act(page, "Regenerate")
    page.wait(f"!run && {TEXT} === {json.dumps(first)}")
    act(page, "Copy")
    check("chat: an answer can be copied", page.wait(
        f"navigator.clipboard.readText().then((text) => text.length > 3 && !text.includes('<|'))"))
    page.js("document.querySelector('.user [aria-label^=Edit]').click()")
    page.key("Escape")
    check("edit: cancelled, nothing is lost",
          page.js("document.querySelectorAll('.turn').length === 4 && !run"))
    page.js("document.querySelector('.user [aria-label^=Edit]').click()")
    page.js("document.activeElement.select()")
    page.type("Hello")
    page.key("Enter")
    check("edit: the conversation goes on from there", page.wait(
        "!run && document.querySelectorAll('.turn').length === 2 && "
        "document.querySelector('.bubble').textContent === 'Hello'"))
    page.click("#toast-undo")
    check("edit: what was removed can be brought back", page.wait(
        "document.querySelectorAll('.turn').length === 4"))


def why(page):
    page.js("document.querySelectorAll('.turn:not(.user)')[0].querySelector("
            "'[aria-pressed]').focus(); document.activeElement.click()")
    tokens = page.wait("[...document.querySelectorAll('.tokens button')].map((b) => b.textContent)")
    check("why: the button keeps the focus", page.wait(
        "document.activeElement.ariaLabel === 'Why these words?'"))
    check("why: the answer is shown in tokens, up to its end", bool(tokens) and len(tokens) > 10
          and "".join(tokens).startswith("37 times 41 is <|python_start|>37*41")
          and tokens[-1] == "<|assistant_end|>", tokens)
    page.js("document.querySelectorAll('.tokens button')[1].click()")
    rows = page.wait("[...document.querySelectorAll('.why tr')].map((r) => r.textContent)")
    check("why: a token shows the ten likeliest there, with probabilities",
          bool(rows) and len(rows) in (10, 11) and all("%" in row for row in rows), rows)
    check("why: the chosen one is marked, not by colour alone",
          bool(rows) and sum("chosen" in row for row in rows) == 1, rows)
    shown = page.js("""(async () => { const shown = [];
        for (const button of document.querySelectorAll('.tokens button')) {
          button.click();
          for (let i = 0; i < 1000 && !document.querySelector('.why h3')?.textContent.startsWith(
            `Token ${shown.length + 1} of`); i++) await new Promise((done) => setTimeout(done, 5));
          shown.push([button.textContent, /by the calculator/.test(
            document.querySelector('.why.card').textContent)]);
        } return shown; })()""")
    words = "".join(text for text, forced in shown if forced)
    check("why: what the calculator wrote was not chosen, all else was",
          words == "<|output_start|>1517<|output_end|>", shown)
    page.js("document.querySelectorAll('.tokens button')[1].focus()")
    page.key("ArrowRight")
    page.key("Enter")
    check("why: arrows and Enter do it too", page.wait(
        "document.querySelector('.why h3').textContent.startsWith('Token 3 of')"))
    page.js("document.querySelector('[aria-pressed=true][aria-label]').click()")
    check("why: and the answer comes back",
          page.wait("!document.querySelector('.tokens') && !!document.querySelector('.calc')"))


def walk(page):
    page.click("#tab-walk")
    check("walk: the tab shows its form", page.js(
        "$('walk-text').checkVisibility() && !$('pane-settings').checkVisibility()"))
    page.js("$('walk-text').value = 'The sky is'; $('walk-layer').value = 1")
    page.click("#walk-form button")
    page.wait("$('walk-out').textContent.includes('read at once')")
    if not page.js("!!document.querySelector('#walk-out img')"):
        print("skipped  walk: the program was built without stb_image_write.h")
        page.click("#tab-model")
        return
    shots = page.wait("[...document.querySelectorAll('#walk-out img')].length >= 7 && "
                      "[...document.querySelectorAll('#walk-out img')].map((i) => i.src)")
    check("walk: the pictures of the layer that was asked for", bool(shots)
          and any(src.endswith("/attention_L01.png") for src in shots), shots)
    check("walk: all of them arrive, and each has words beside it", page.wait(
        "[...document.querySelectorAll('#walk-out img')].every((i) => i.complete && "
        "i.naturalWidth === Number(i.getAttribute('width')) && i.alt.length > 10)"))
    check("walk: how long it took, and what set the pace", page.js(
        "/4 tokens read at once: .* ms, set by/s.test($('walk-out').textContent)"),
        page.js("$('walk-out').textContent"))
    page.click("#walk-out button")
    check("walk: a picture opens large", page.wait(
        "$('dialog').open && $('dialog').querySelector('img').naturalWidth > 300 && "
        "$('dialog-title').textContent.length > 5"))
    page.key("Escape")
    check("walk: Esc closes it", page.js("!$('dialog').open"))
    page.js("$('walk-text').value = 'word '.repeat(200)")
    page.click("#walk-form button")
    check("walk: a text that is too long is refused in words", page.wait(
        "/64 are the most/.test($('walk-out').textContent)"), page.js("$('walk-out').textContent"))
    page.js("$('walk-text').value = ''; $('walk-layer').value = ''")
    page.click("#tab-model")


def settings(page):
    page.click("#tab-settings")
    page.click(".hint")
    check("settings: an explanation comes on demand", page.js(
        "$('temperature-hint').checkVisibility() && "
        "document.querySelector('.hint').ariaExpanded === 'true'"))
    page.js("$('temperature-slider').value = 1.25; "
            "$('temperature-slider').dispatchEvent(new Event('input'))")
    page.js("$('top_k').value = 0; $('top_k').dispatchEvent(new Event('input'))")
    page.js("$('max_tokens').value = 99999; $('max_tokens').dispatchEvent(new Event('change'))")
    check("settings: slider and field agree, 0 is called off, limits hold", page.js(
        "$('temperature').value === '1.25' && $('top_k-off').checkVisibility() && "
        "$('max_tokens').value === '4096'"))
    page.js("$('system').value = 'You are a pirate.'; $('system').dispatchEvent(new Event('input'));"
            "$('max_tokens').value = 3; $('max_tokens').dispatchEvent(new Event('input'))")
    page.key("n", ALT)
    say(page, "Why is the sky blue?")
    sent = bodies(page, "/chat/completions")[-1]
    check("settings: system text goes in front", sent["messages"][0] ==
          {"role": "system", "content": "You are a pirate."} and sent["max_tokens"] == 3, sent)
    check("settings: an answer that was cut off says so", page.wait(
        f"{TROUBLE}.startsWith('Cut off after 3 tokens.')"), page.js(TROUBLE))
    before = page.js(TEXT)
    act(page, "Continue")
    check("settings: and goes on where it stopped", page.wait(
        f"!run && {TEXT}.startsWith({json.dumps(before)}) && "
        f"{TEXT}.length > {len(before)} && chat.turns.length === 1"), page.js(TEXT))
    page.js("for (const [name, text] of [['chat.a', '{\"turns\":[{\"answer\":1}]}'], ['chat.b', '5'], "
            "['chat.c', '{\"messages\":[null]}'], ['chat.d', '{\"turns\":{\"length\":1}}'], ['chat.e', "
            "'{'], ['model', '{}'], ['theme', '7']]) localStorage.setItem('nanogpt.' + name, text); "
            "write('settings', {...settings, system: 5, seed: {}})")
    page.open(page.js("location.href"))
    check("reload: what is stored in a wrong form counts as not stored", page.wait(
        "settings.system === '' && settings.seed === null && root.dataset.theme === 'automatic' && "
        "$('list').children.length === 2"), page.faults)
    page.js("set('system', 'You are a pirate.')")
    check("reload: settings, model and conversations are still there", page.wait(
        "settings.temperature === 1.25 && $('list').children.length === 2 && !!model"))
    page.click("#tab-settings")
    page.click("#reset")
    check("settings: reset to the defaults", page.js(
        "JSON.stringify(settings)") == '{"temperature":0.8,"top_k":50,"max_tokens":512,'
                                       '"seed":null,"system":""}')
    page.click("#tab-model")


def commands(page):
    for text, good in (("/temperature 0.3", "settings.temperature === 0.3"),
                       ("/topk 7", "settings.top_k === 7"), ("/max 33", "settings.max_tokens === 33"),
                       ("/seed 9", "settings.seed === 9"), ("/seed", "settings.seed === null"),
                       ("/model base/d4/5000", "model.id === 'base/d4/5000'"),
                       ("/stats", "/places are busy/.test($('toast-text').textContent)"),
                       ("/Temperature 0.5", "settings.temperature === 0.5"),
                       ("/top_k 5", "settings.top_k === 5"),
                       ("/max_tokens 34", "settings.max_tokens === 34"),
                       ("/ Stats", "$('toast').matches(':popover-open')"),
                       ("/clear", "chat.turns.length === 0")):
        say(page, text)
        check(f"command: {text}", page.wait(f"{good} && $('text').value === ''"),
              page.js("$('toast-text').textContent"))
    for text in ("/temperature 3", "/nonsense 1", "/Nonsense", "/top-k 5", "/temperature=1"):
        say(page, text)
        check(f"command: {text} is refused and stays in the box", page.js(
            f"$('text').value === {json.dumps(text)} && $('toast').matches(':popover-open') && !run"))
        page.js("$('text').value = ''; grow()")
    say(page, "/usr/bin/env is what?")
    check("command: a path is none", page.wait(
        "!run && chat.turns.at(-1)?.question === '/usr/bin/env is what?'"))


def completion(page):
    page.js("set('max_tokens', 40); set('temperature', 0); newChat()")
    check("base: the page says that it continues text", page.js(
        "$('empty-text').textContent.includes('was not trained to chat') && "
        "$('text').placeholder.includes('beginning')"))
    say(page, "Once upon a time")
    sent = bodies(page, "/v1/completions")
    check("base: the text goes without a template", bool(sent) and
          sent[-1]["prompt"] == "Once upon a time" and "messages" not in sent[-1], sent)
    check("base: and is continued in place", page.wait(
        f"!run && {TEXT}.startsWith('Once upon a time') && {TEXT}.length > 40 && "
        "!document.querySelector('.turn.user')"), page.js(TEXT))
    before = page.js(TEXT)
    if page.js(TROUBLE):
        act(page, "Continue")
        page.wait("!run")
    check("base: and further", page.js(TEXT).startswith(before) and
          (len(page.js(TEXT)) > len(before) or not page.js(TROUBLE)))
    say(page, "37 times 41 is")  # greedily, the calculator's mark is next
    check("base: a calculator's mark ends the text and is not shown", page.wait(
        f"!run && {TEXT}.trim() === '37 times 41 is' && "
        "chat.turns.at(-1).about.finish === 'stop'"), page.js(TEXT))
    check("base: the command for the terminal is sample",
          page.js("$('cli').textContent").startswith("nanogpt sample -i base -g d4 -s 5000"))


def keeping(page, folder):
    page.js("window.saved = []; URL.createObjectURL = (blob) => { blob.text().then((text) => "
            "saved.push(text)); return 'blob:none'; }; HTMLAnchorElement.prototype.click = () => {}")
    page.js("openChat(storedChats().at(-1)); $('save-md').click(); $('save-json').click()")
    page.wait("saved.length === 2")
    markdown, text = sorted(page.js("saved"), key=lambda one: one.startswith("{"))
    count = page.js("storedChats().length")
    check("keep: saved as Markdown, calls readable", markdown.startswith("# ")
          and "**You:**" in markdown and "<|" not in markdown, markdown)
    check("keep: saved as JSON", len(json.loads(text)["chats"]) == count, text)
    node = page.call("DOM.getDocument")["root"]["nodeId"]
    field = page.call("DOM.querySelector", {"nodeId": node, "selector": "#file"})["nodeId"]
    good, bad = os.path.join(folder, "chats.json"), os.path.join(folder, "bad.json")
    with open(good, "w", encoding="utf-8") as file:
        file.write(text)
    with open(bad, "w", encoding="utf-8") as file:
        json.dump({"chats": [{"turns": [{"question": "x", "answer": {"x": 1}}]}]}, file)
    page.call("DOM.setFileInputFiles", {"nodeId": field, "files": [good]})
    check("keep: loaded from JSON", page.wait(f"storedChats().length === {2 * count}"))
    page.call("DOM.setFileInputFiles", {"nodeId": field, "files": [bad]})
    check("keep: a file without a conversation is refused with a reason", page.wait(
        "$('toast-text').textContent.startsWith('This file cannot be loaded')"))
    odd = os.path.join(folder, "odd.json")
    with open(odd, "w", encoding="utf-8") as file:
        json.dump({"chats": [{"turns": [{"question": "odd", "answer": "well", "text": [], "about": {
            "model": "sft/d4", "speed": "fast", "tokens": [7], "first": {}, "error": [1],
            "dropped": "2", "usage": {"total_tokens": "x", "prompt_tokens": {}}}}]},
            {"messages": [{"role": "user", "content": "old"}, {
                "role": "assistant", "content": "form", "about": {"model": "sft/d4"}}]},
            {"turns": [{"question": "cut", "answer": "x", "text": True, "about": {
                "model": "sft/d4", "finish": "length", "dropped": -1}}]}]}, file)
    page.call("DOM.setFileInputFiles", {"nodeId": field, "files": [odd]})
    page.wait(f"storedChats().length === {2 * count + 3}")
    page.js("openChat(storedChats().find((one) => one.turns[0].question === 'odd'))")
    check("keep: what a file says in a wrong kind counts as not said", page.js(
        "Object.keys(chat.turns[0].about).sort().join()") == "model,usage"
        and page.js(TEXT) == "well", page.js("JSON.stringify(chat)"))
    page.js("discard([chat])")
    for question, answer in (("old", "form"), ("cut", "x")):
        page.js(f"openChat(storedChats().find((one) => one.turns[0].question === '{question}'))")
        check(f"keep: a chat of a file is shown: {question}",
              answer in page.js(TEXT) and question in page.js("$('log').textContent"))
        page.js("discard([chat])")
    page.js("document.querySelector('#list [aria-label^=Delete]').click()")
    gone = page.js("storedChats().length")
    page.click("#toast-undo")
    check("keep: deleted, and brought back",
          gone == 2 * count - 1 and page.js("storedChats().length") == 2 * count)
    page.js("$('delete-all').click()")
    gone = page.js("storedChats().length")
    page.click("#toast-undo")
    check("keep: all deleted, and brought back",
          gone == 0 and page.js("storedChats().length") == 2 * count)
    many = os.path.join(folder, "many.json")
    with open(many, "w", encoding="utf-8") as file:
        json.dump({"chats": [{"turns": [{"question": f"many {i}", "answer": "x", "about": {
            "model": "sft/d4"}}]} for i in range(60)]}, file)
    own = page.js("window.own = storedChats().map((one) => one.id)")
    page.call("DOM.setFileInputFiles", {"nodeId": field, "files": [many]})
    check("keep: a file takes the room there is, and says how many it left out", page.wait(
        f"$('toast-text').textContent === '{50 - len(own)} chats loaded; there is no room for "
        f"{10 + len(own)} more.'"), page.js("$('toast-text').textContent"))
    check("keep: and nothing goes for it", page.js(
        "own.every((id) => storedChats().some((one) => one.id === id))"))
    page.js("$('delete-all').click()")
    page.js("for (let i = 0; i < 55; ++i) keep({id: 'x' + i, turns: [{question: "
            "'n' + i, answer: 'x', about: {model: 'y'}}]})")
    check("keep: the last 50 stay", page.js("storedChats().length") == 50)
    page.js("Storage.prototype.setItem = () => { throw new Error('full'); }; "
            "keep({id: 'full', turns: [{question: 'x', answer: 'x', about: {model: 'y'}}]})")
    check("keep: a full storage is told, and the page goes on", page.js(
        "$('list-note').textContent.includes('Save it to keep it')"))


def keyboard(page):
    page.js("document.activeElement.blur(); newChat(); document.activeElement.blur()")
    page.js("scrollTo(0, 0); document.body.focus()")
    reached, unseen = [], []
    for _ in range(60):
        page.key("Tab")
        one = page.js("(() => { const node = document.activeElement, style = getComputedStyle(node);"
                      "const ring = node.matches('#model, #text') ? getComputedStyle(node.parentNode)"
                      ": style; return [node.id || node.className || node.tagName, "
                      "ring.outlineStyle !== 'none' || ring.boxShadow !== 'none']; })()")
        reached.append(one[0])
        if not one[1] and one[0] != "BODY":
            unseen.append(one[0])
    want = {"skip", "new", "theme", "help-open", "model", "device", "text", "tab-model", "all-open",
            "cli"}
    check("keyboard: Tab reaches everything", want <= set(reached), (want - set(reached), reached))
    check("keyboard: the focus is always seen", not unseen, unseen)
    page.key("m", ALT)
    check("keyboard: Alt+M goes to the models", page.js("document.activeElement.id") == "model")
    page.key("Escape")
    page.key("s", ALT)
    check("keyboard: Alt+S goes to the settings",
          page.js("document.activeElement.id") == "temperature")
    page.js("document.activeElement.blur()")
    page.key("?", SHIFT)
    check("keyboard: ? shows the help", page.js("$('dialog').open"))
    page.key("Escape")
    check("keyboard: Esc closes it", page.js("!$('dialog').open"))
    page.js("newChat()")
    page.key("?", SHIFT)
    check("keyboard: ? on an empty page too, and writes nothing",
          page.js("$('dialog').open && $('text').value === ''"))
    page.key("Escape")
    page.type("why")
    page.key("?", SHIFT)
    check("keyboard: but in a text it is a letter",
          page.js("!$('dialog').open && $('text').value === 'why?'"))
    page.js("$('text').value = ''; grow()")
    page.js("$('tab-model').focus()")
    page.key("ArrowRight")
    check("keyboard: arrows change the tab",
          page.js("document.activeElement.id === 'tab-settings' && !$('pane-settings').hidden"))
    nameless = [role for role, name in page.names() if not name.strip() and role in (
        "button", "textbox", "combobox", "slider", "spinbutton", "tab", "tabpanel", "log", "link",
        "dialog", "searchbox", "checkbox", "DisclosureTriangle", "complementary")]
    check("screen reader: every control has a name", not nameless, nameless)
    check("screen reader: the log is not read out by itself", page.js(
        "$('log').role === 'log' && $('log').ariaLive === 'off' && $('status').role === 'status'"))


# ---- the test's own server

def typing(page, stub):
    page.js("$('text').focus()")
    page.type("two")
    page.key("Enter", SHIFT)
    page.type("lines")
    check("box: Shift+Enter is a new line", page.js("$('text').value") == "two\nlines")
    page.js("$('text').dispatchEvent(new KeyboardEvent('keydown', {key: 'Enter', bubbles: true, "
            "isComposing: true})); $('text').dispatchEvent(new KeyboardEvent('keydown', "
            "{key: 'Enter', keyCode: 229, bubbles: true}))")
    check("box: Enter of an input method does not send",
          page.js("$('text').value") == "two\nlines" and not stub.asked)
    height = page.js("$('text').clientHeight")
    page.type("\nmore" * 30)
    check("box: grows, but not for ever", height < page.js("$('text').clientHeight") < 240)
    page.js("$('text').value = ''; grow()")
    say(page, "split")
    check("stream: cut at every byte, it is still the same text",
          page.wait(f"!run && {TEXT} === {json.dumps(SPLIT)}"), page.js(TEXT))
    page.key("ArrowUp")
    check("box: up in an empty box edits the last message",
          page.js("document.activeElement.value") == "split")
    page.key("Escape")


def waiting(page, stub):
    say(page, "wait", wait=False)
    wait = LAST + ".querySelector('.waiting').textContent"
    check("wait: the place in the queue", page.wait(f"{wait} === 'waiting, 3 before you'"))
    stub.gate.release()
    check("wait: loading in percent", page.wait(f"{wait}.includes('62%') && "
                                                f"{LAST}.querySelector('progress').value === 62"))
    check("screen reader: busy while it lasts", page.js("$('log').getAttribute('aria-busy')")
          == "true")
    page.js("$('text').focus()")
    page.type("my next question")
    page.key("Enter")
    check("wait: one can go on writing, and Enter sends nothing",
          page.js("$('text').value") == "my next question" and stub.asked[-1]["messages"][-1]
          ["content"] == "wait")
    stub.gate.release()
    check("wait: reading in percent", page.wait(f"{wait} === 'reading your prompt… 40%'"))
    stub.gate.release()
    stub.gate.release()
    check("wait: then it answers", page.wait(f"!run && {TEXT} === 'There.'"))
    page.js("$('text').value = ''; grow()")
    say(page, "half a call", wait=False)
    box = LAST + ".querySelector('.calc')?.textContent"
    check("calculator: an unfinished call is one already", page.wait(f"{box} === "
                                                                     "'calculator: 6*7 …'"))
    stub.gate.release()
    check("calculator: and has its result then", page.wait(
        f"!run && {box} === 'calculator: 6*7 = 42' && {TEXT}.endsWith('42.')"))
    say(page, "an empty call")
    check("calculator: of an empty call nothing is shown, nor copied", page.wait(
        f"!run && {TEXT} === 'Well.' && !{LAST}.querySelector('.calc') && "
        "readable(chat.turns.at(-1).answer) === 'Well.'"), page.js(TEXT))


def stopping(page, stub):
    for way, stop in (("Esc", lambda: page.key("Escape")), ("the button",
                                                            lambda: page.click("#send"))):
        gone = stub.gone
        say(page, "endless", wait=False)
        page.wait(f"{TEXT}?.includes('word20 ')")
        check(f"stop: the button says so ({way})", page.js("$('send').ariaLabel") == "Stop")
        stop()
        page.wait("!run")
        end = time.monotonic() + 10
        while stub.gone == gone and time.monotonic() < end:
            time.sleep(0.02)
        check(f"stop: by {way}, the server notices", stub.gone == gone + 1, stub.gone)
        check("stop: what was written stays, marked as stopped", page.js(
            f"{TEXT}.includes('word20 ') && {TROUBLE}.startsWith('Stopped.') && "
            "$('send').ariaLabel === 'Send'"), page.js(TROUBLE))
    say(page, "again")
    check("stop: the next question is answered", page.wait(f"{TEXT} === 'You said: again'"))
    gone = stub.gone
    say(page, "endless", wait=False)
    page.wait(f"{TEXT}?.includes('word5 ')")
    page.key("n", ALT)
    end = time.monotonic() + 10
    while stub.gone == gone and time.monotonic() < end:
        time.sleep(0.02)
    check("stop: a new chat stops the answer too", stub.gone == gone + 1
          and page.js("chat.turns.length === 0 && !run"))


def races(page, stub):
    page.js("newChat()")
    say(page, "endless", wait=False)
    page.wait(f"{TEXT}?.includes('word5 ')")
    page.js("document.querySelector('#list .current .open').click()")
    check("races: choosing the chat that is written changes nothing", page.js("!!run") and
          page.wait(f"{TEXT}?.includes('word5 ') && {TEXT}.includes('word30 ')"), page.js(TEXT))
    count = page.js("storedChats().length")
    page.js("document.querySelector('#list .current [aria-label^=Delete]').click()")
    check("races: a chat that is deleted while it is written is gone",
          page.js("!run") and page.js("storedChats().length") == count - 1)
    page.js("newChat()")
    page.click("#toast-undo")
    check("races: and comes back with what was written, from another chat too", page.js(
        "storedChats()[0].turns.at(-1).answer.includes('word30 ')"))
    tabs = {tab for tab in stub.tabs[-3:]}
    check("turns: every question names its tab", len(tabs) == 1 and all(tabs), stub.tabs)


def trouble(page, stub):
    say(page, "break")
    check("error: a lost connection is told, the text stays", page.wait(
        f"{TROUBLE}?.startsWith('Connection lost after 3 tokens.') && "
        f"{TEXT} === 'One two three'"), page.js(TROUBLE))
    act(page, "Continue")
    check("error: continue sends what there is and adds to it", page.wait(
        f"!run && {TEXT}.startsWith('One two three') && {TEXT}.length > 14")
        and stub.asked[-1]["messages"][-1] == {"role": "assistant", "content": "One two three"},
        (page.js(TEXT), stub.asked[-1]))
    say(page, "fail")
    check("error: one in the middle is told in the server's words", page.wait(
        f"{TROUBLE}?.includes('the GPU was lost') && {TEXT} === 'A beginning'"), page.js(TROUBLE))
    say(page, "refuse")
    check("error: a refusal is told in the server's words, as text", page.wait(
        f"{TROUBLE}?.includes('temperature must be <b>warm</b>')"), page.js(TROUBLE))
    check("error: the question is not lost", page.js(
        "[...document.querySelectorAll('.bubble')].at(-1).textContent") == "refuse")
    check("screen reader: says the error", page.wait("$('status').textContent.startsWith('Error: ')"))
    stub.busy = 2
    say(page, "busy", wait=False)
    check("busy: counts down", page.wait(
        f"{LAST}.querySelector('.waiting').textContent.includes('the queue is full. Trying again')"))
    check("busy: and tries again by itself", page.wait(f"!run && {TEXT} === 'You said: busy'", 15)
          and stub.busy == 0)
    retries(page, stub)
    say(page, "nothing")
    check("empty answer: is told", page.wait(f"{TROUBLE}?.includes('nothing to say')"))
    say(page, "after that")
    sent = stub.asked[-1]["messages"]
    check("empty answer: nothing empty is ever sent",
          all(m["content"] for m in sent) and [m["role"] for m in sent]
          == ["user", "assistant"] * (len(sent) // 2) + ["user"], sent)
    page.js("newChat()")
    for text in ("one", "two", "long ago"):
        say(page, text)
    check("context: what the model no longer sees is told", page.wait(
        "document.querySelector('.notice + .turn.user .bubble')?.textContent === 'two'"))
    say(page, "full")
    check("context: full, but older messages can go, so it goes on", page.wait(
        f"{TROUBLE}?.startsWith('Cut off after 1,017 tokens.Continue')"), page.js(TROUBLE))
    page.js("newChat()")
    say(page, "full")
    check("context: full of this question and answer, a new chat is offered", page.wait(
        f"/^The context is full: it holds 1,024 tokens.New chat$/.test({TROUBLE})"), page.js(TROUBLE))
    act(page, "New chat")
    check("context: and begun", page.js("chat.turns.length") == 0)
    page.js("newChat()")
    for i in range(6):
        page.js(f"send('{i}' + 'long '.repeat(1500))")
        page.wait("!run")
    sent = stub.asked[-1]["messages"]
    check("context: a conversation too long for the server loses its beginning, no more",
          16990 < sum(len(m["content"]) for m in sent) <= 32000 and sent[0]["role"] == "user"
          and sent[-1]["content"][0] == "5" and page.js("!!document.querySelector('.notice')"),
          [(m["role"], len(m["content"])) for m in sent])


def retries(page, stub):
    """Of a busy server: how often it is asked again, and what is kept meanwhile."""
    wait = LAST + ".querySelector('.waiting').textContent"
    stub.busy, asked = 9, len(stub.asked)
    say(page, "for ever", wait=False)
    page.wait(f"{wait}.includes('(1 of 5)')")
    page.type("my next question")
    check("busy: counts up to the fifth time", page.wait(f"{wait}.includes('(5 of 5)')", 15))
    check("busy: then stops, and says why", page.wait(
        f"!run && {TROUBLE}.startsWith('the queue is full') && {TROUBLE}.includes('Try again')", 5),
        page.js(TROUBLE))
    time.sleep(1.5)  # longer than a pause
    words = [body["messages"] for body in stub.asked[asked:]]
    check("busy: six times in all, with the same words",
          len(words) == 6 and words == words[:1] * 6, words)
    check("busy: the question and what was typed meanwhile are kept", page.js(
        "$('text').value === 'my next question' && "
        "[...document.querySelectorAll('.bubble')].at(-1).textContent === 'for ever'"))
    stub.busy = 0
    act(page, "Try again")
    check("busy: by hand it is asked once more", page.wait(f"!run && {TEXT} === 'You said: for ever'")
          and len(stub.asked) == asked + 7)
    page.js("$('text').value = ''; grow()")

    say(page, "break")
    page.wait(f"!run && {TEXT} === 'One two three'")
    stub.busy, stub.busy_status, asked = 2, 429, len(stub.asked)
    act(page, "Continue")
    page.wait(f"{wait}.includes('(1 of 5)')")
    page.js("$('text').focus()")
    page.type("still here")
    shown = page.js(TEXT)
    check("busy: the third try succeeds, and what was written and typed stays", page.wait(
        f"!run && {TEXT} === 'One two threeYou said: One two three' && "
        "$('text').value === 'still here'", 15) and shown == "One two three"
        and len(stub.asked) == asked + 3, (shown, page.js(TEXT)))
    page.js("$('text').value = ''; grow()")

    stub.busy, stub.busy_status, asked = 9, 503, len(stub.asked)
    say(page, "not now", wait=False)
    page.wait(f"{wait}.includes('(1 of 5)')")
    page.key("Escape")
    time.sleep(1.5)
    check("busy: Esc ends the waiting, and nothing more is asked", page.js(
        f"!run && {TROUBLE}.startsWith('Stopped.')") and len(stub.asked) == asked + 1)
    stub.busy = 0


def away(page, stub, again):
    page.js("newChat()")
    port = stub.port
    stub.close()
    page.js("poll()")
    check("away: a banner says so", page.wait("$('banner').checkVisibility() && "
                                              "/cannot be reached/.test($('banner').textContent)"))
    waits = page.js("""(async () => {
        const later = setTimeout, waits = [];
        window.setTimeout = (call, ms) => later(call, waits[waits.push(ms) - 1]);
        pause = 0;
        for (let i = 0; i < 7; ++i) await poll();
        pause = 0;
        window.setTimeout = later;
        return waits; })()""")
    check("away: asks again after 1, 2, 4 ... 30 seconds",
          waits == [1000, 2000, 4000, 8000, 16000, 30000, 30000], waits)
    page.js("poll()")
    say(page, "are you there?")
    check("away: the question stays, with a way to try again", page.wait(
        f"{TROUBLE}?.includes('cannot be reached') && {TROUBLE}.includes('Try again') && "
        "document.querySelector('.bubble').textContent === 'are you there?'"), page.js(TROUBLE))
    page.type("still writing")
    check("away: the box can be used", page.js("$('text').value") == "still writing")
    page.js("$('text').value = ''; grow()")
    stub = again(port)
    check("away: it comes back by itself", page.wait("/is back/.test($('toast').textContent)", 40))
    act(page, "Try again")
    check("away: and answers", page.wait(f"!run && {TEXT} === 'You said: are you there?'"))
    return stub


def hostile(page):
    page.js("newChat()")
    say(page, "hostile")
    page.wait("!run")
    check("hostile: HTML is only text", page.js(
        f"{LAST}.querySelectorAll('.body :is(script, img, iframe, style, u, s, i, b, a)').length") == 0
        and page.js("document.title") == "nanogpt")
    shown = page.js(TEXT)
    check("hostile: and all of it is shown", all(word in shown for word in (
        "<script>document.title", "onerror=", "[click](javascript:alert(1))", "<b>head</b>",
        "<u>x</u>", "&lt;&amp;", "192.0.2.1")), shown)
    say(page, "escapes")
    check("hostile: control characters do no harm", page.wait(
        f"!run && {TEXT} === {json.dumps(ESCAPES)}"), page.js(TEXT))
    say(page, "a million")
    check("hostile: a line of a megabyte comes through whole",
          page.wait(f"!run && {TEXT}.length === {16 * 6 * 10923}", 60), page.js(TEXT + "?.length"))
    lag = page.js("new Promise((done) => { const begin = performance.now(); requestAnimationFrame("
                  "() => setTimeout(() => done(performance.now() - begin))); })")
    check("hostile: and the page is quick again", lag < 1500, lag)
    say(page, "marks")
    check("hostile: 20,000 marks without a partner are text, in time",
          page.wait(f"!run && {TEXT}.length > 60000", 20), page.js(TEXT + "?.length"))
    page.js("newChat()")
    say(page, "markdown")
    page.wait("!run")
    check("markdown: headings, emphasis, lists and code are elements, links text", page.js(f"""
        (() => {{ const body = {LAST}.querySelector('.body');
        const all = (what) => [...body.querySelectorAll(what)].map((node) => node.textContent);
        return JSON.stringify([all('h3'), all('em'), all('strong'), all('p code'), all('ol > li'),
          all('ol ul li'), all('pre'), all('a').length, body.textContent.includes('2*3*4 and '
          + 'snake_case_name') && body.textContent.includes('[text](http://x.org)')]); }})()"""
        ) == json.dumps([["Head"], ["italic"], ["bold"], ["code"], ["one", "twoinner"], ["inner"],
                         ["print('<b>')"], 0, True], separators=(",", ":")),
        page.js(LAST + ".querySelector('.body').textContent"))
    say(page, "line ends")
    check("markdown: lines may end in any way", page.wait("!run") and page.js(f"""
        {LAST}.querySelectorAll('pre').length === 1 &&
        {LAST}.querySelector('pre').textContent === 'code' &&
        {LAST}.querySelector('p').textContent === 'behind\\nit'"""), page.js(TEXT))


def scrolling(page, stub):
    page.js("newChat()")
    say(page, "lines", wait=False)
    page.wait(f"{TEXT}?.includes('line 119')")
    check("scroll: along with the answer", page.wait("atEnd()"))
    page.js("$('scroll').scrollTop = 100")
    check("scroll: a button leads back to the newest", page.wait("$('newest').checkVisibility()"))
    stub.gate.release()
    page.wait(f"{TEXT}.includes('the last line')")
    check("scroll: who reads elsewhere stays there", page.js("$('scroll').scrollTop") == 100)
    page.click("#newest")
    check("scroll: the button does", page.wait("atEnd() && !$('newest').checkVisibility()"))
    stub.gate.release()
    page.wait("!run")


def looks(browser, stub, shots):
    for theme in ("light", "dark"):
        page = Page(browser, stub.url, prefers_color_scheme=theme)
        page.wait("!!model")
        back = page.js("getComputedStyle(document.body).backgroundColor")
        check(f"{theme}: follows the system", (sum(map(int, re.findall(r"\d+", back)[:3])) > 380)
              == (theme == "light"), back)
        bad = page.js(CONTRAST)
        for text in ("markdown", "split", "break"):
            say(page, text)
        page.js("$('panel').hidden = false; showTab('settings'); banner('Something is wrong')")
        bad += page.js(CONTRAST)
        page.js("openHelp()")
        bad += page.js(CONTRAST)
        check(f"{theme}: every text has a contrast of 4.5 or more", not bad, bad)
        if shots:
            page.js("$('dialog').close(); banner('')")
            page.screenshot(os.path.join(shots, f"desktop-{theme}.png"))
        done(page)
    page = Page(browser, stub.url, prefers_reduced_motion="reduce")
    page.wait("!!model")
    page.click("#theme")
    page.click("#theme")
    check("theme: dark by hand", page.js(
        "getComputedStyle(document.documentElement).colorScheme") == "dark")
    say(page, "wait", wait=False)
    page.wait(f"{LAST}?.querySelector('.waiting').checkVisibility()")
    moving = ("[...document.querySelectorAll('progress:not([value])')]"
              ".filter((bar) => bar.checkVisibility()).length + document.getAnimations().length")
    check("reduced motion: nothing moves", page.js(moving) == 0)
    page.call("Emulation.setEmulatedMedia", {"features": []})
    check("motion: a bar while one waits", page.js(moving) == 1)
    page.key("Escape")
    done(page)


def small(browser, stub, shots):
    for width, height, what in ((320, 568, "320 px"), (720, 450, "zoom of 200 %"),
                                (390, 844, "phone")):
        page = Page(browser, stub.url, width, height, touch=width < 700)
        page.wait("!!model")
        wide = page.js(SIDEWAYS)
        for text in ("markdown", "hostile"):
            page.js(f"send({json.dumps(text)})")
            page.wait("chat.turns.length && !run")
            wide += page.js(SIDEWAYS)
        page.click("#panel-open")
        page.wait("!$('panel').hidden")
        wide += page.js(SIDEWAYS)
        little = page.js(SMALL) if width < 700 else []
        page.js("showTab('settings')")
        wide += page.js(SIDEWAYS)
        little += page.js(SMALL) if width < 700 else []
        check(f"{what}: behind the open sheet nothing can be reached", page.js("$('main').inert"))
        page.key("Escape")
        check(f"{what}: Esc closes it", page.wait("$('panel').hidden && !$('main').inert"))
        page.click("#chats-open")
        page.wait("!$('chats').hidden")
        wide += page.js(SIDEWAYS)
        little += page.js(SMALL) if width < 700 else []
        page.js("show('chats', false); openHelp()")
        wide += page.js(SIDEWAYS)
        page.js("$('dialog').close()")
        check(f"{what}: no sideways scrolling", not wide, wide)
        if width < 700:
            little += page.js(SMALL)
            check(f"{what}: targets of 44 px and more", not little, little)
            check(f"{what}: letters in boxes are large enough for iOS",
                  page.js("parseFloat(getComputedStyle($('text')).fontSize)") >= 16)
            page.js("$('text').focus()")
            page.type("a line")
            page.key("Enter")
            check(f"{what}: Enter is a new line on the screen's keyboard",
                  page.js("$('text').value") == "a line\n")
            page.js("$('text').value = ''; grow()")
        if shots:
            page.screenshot(os.path.join(shots, f"{what.replace(' ', '-')}.png"))
        done(page)


def covered(browser, stub):
    """The keyboard of a phone: it leaves the page's size alone, and covers its lower part."""
    page = Page(browser, stub.url, 390, 844, touch=True)
    page.wait("!!model")
    page.js("send('many lines'); const most = innerHeight; let height = most; "
            "Object.defineProperty(visualViewport, 'height', {get: () => height})")
    page.wait("chat.turns.length && !run && atEnd()")

    def keyboard(size):
        page.js(f"height = most - {size}; visualViewport.dispatchEvent(new Event('resize'))")
        return page.js("""['#text', '#send', 'header'].map((one) => {
            const box = document.querySelector(one).getBoundingClientRect();
            return [box.top, box.bottom]; })""")
    before, open_, after = keyboard(0), keyboard(336), keyboard(0)
    check("phone: without a keyboard the box is at the bottom", before[0][1] > 844 - 100, before)
    check("phone: the keyboard covers neither box nor button, the header stays",
          all(0 <= top < bottom <= 844 - 336 for top, bottom in open_)
          and open_[0][1] > 844 - 336 - 100 and open_[2] == before[2], (before, open_))
    check("phone: when it goes, all is as before", after == before, (before, after))
    keyboard(336)
    check("phone: the newest words stay in sight above it",
          page.js("atEnd() && $('newest').hidden"), page.js("$('scroll').scrollTop"))
    keyboard(0)
    page.js("$('scroll').scrollTop = 0")
    page.wait("!following")
    keyboard(336)
    check("phone: who reads elsewhere stays there", page.js("$('scroll').scrollTop") == 0)
    keyboard(0)
    page.js("Object.defineProperty(visualViewport, 'scale', {get: () => 2})")
    check("phone: who enlarges the page moves nothing in it", keyboard(422) == before)
    done(page)


def odd_places(browser, program, base, stub):
    was, stub.models = stub.models, {**stub.models, "models": [], "count": 0, "default": None}
    page = Page(browser, stub.url)
    check("no checkpoint: says where they are looked for, and what they are called", page.wait(
        "$('empty').checkVisibility() && /base-dir/.test($('empty').textContent) && "
        "/model_<step>.pt/.test($('empty').textContent)"), page.js("$('empty').textContent"))
    done(page)
    stub.models = was

    server = Program(program, base, "--api-key", "sesame/1+")
    page = Page(browser, server.url)
    check("key: without it the page asks", page.wait("$('key').checkVisibility()"))
    page.click("#key")
    page.type("sesame/1+")
    page.key("Enter")
    check("key: given by hand", page.wait("!!model && !$('banner').checkVisibility()"),
          page.js("$('banner').textContent"))
    done(page)
    page = Page(browser, server.url)
    page.wait("$('key').checkVisibility()")
    page.open(server.url + "#key=sesame%2F1%2B")
    check("key: a link with it, followed where the page is open already", page.wait(
        "!!model && !$('banner').checkVisibility() && location.hash === ''", 5))
    done(page)
    page = Page(browser, server.url + "#key=sesame%2F1%2B")
    check("key: given in the address, and gone from there", page.wait(
        "!!model && location.hash === ''"))
    page.js("document.querySelector('.skip').click()")
    page.call("Page.reload")
    time.sleep(0.5)
    check("key: kept when the page is loaded again",
          page.wait("!!model && !$('key').checkVisibility()"))
    done(page)
    server.close()

    models = json.loads(json.dumps(stub.models))
    models["models"][0]["tag"] = "<img src=x onerror=alert(1)>"
    models["models"][-1]["reason"] = "</option><script>alert(1)</script>"
    models["device"]["fallback_reason"] = "<b>no driver</b>"
    was, stub.models = stub.models, models
    page = Page(browser, stub.url)
    page.wait("!!model")
    check("hostile: names of models are only text", page.js(
        "document.querySelectorAll('main img, #about img, main b b, #model script').length === 0"))
    page.click("#all-open")
    check("hostile: and in the table of all of them", page.js(
        "$('dialog').open && !document.querySelector('#dialog img, #dialog script') && "
        "$('dialog').textContent.includes('<img src=x')"))
    page.key("Escape")
    page.click("#device")
    check("device: says why the GPU is not used", page.js(
        "$('dialog').open && $('device').textContent.includes('why?') && "
        "$('dialog').textContent.includes('<b>no driver</b>')"))
    done(page)
    page = Page(browser, stub.url, 390, 844, touch=True)
    page.wait("!!model")
    page.click("#panel-open")
    check("device: a phone reads it in the model's information", page.wait(
        "[...$('about').children].some((node) => node.checkVisibility() && "
        "/not used<b>no driver/.test(node.textContent))"), page.js("$('about').textContent"))
    done(page)
    stub.models = was

    pasted(browser, program, base)

    page = Page(browser)
    page.call("Emulation.setScriptExecutionDisabled", {"value": True})
    page.call("Page.navigate", {"url": stub.url})
    time.sleep(1)
    check("without script: one sentence with the command", any(
        "nanogpt chat" in name for _, name in page.names()), page.names())
    page.call("Emulation.setScriptExecutionDisabled", {"value": False})
    page.open(stub.url)
    done(page)


def pasted(browser, program, base):
    """The command for the terminal, run as it stands: for the sample, a folder with an odd name, a file."""
    odd = os.path.join(os.path.dirname(base), "it's a folder")
    os.rename(base, odd)
    kept = dict(os.environ)
    os.environ.pop("NANOCHAT_BASE_DIR", None)
    os.environ["HOME"] = os.path.dirname(base)
    file = os.path.join(odd, "chatsft_checkpoints", "d4", "model_001300.pt")
    for what, args in (("the sample", ()), ("a folder", ("--base-dir", odd)),
                       ("a file", ("--model", file))):
        server = Program(program, None, *args)
        page = Page(browser, server.url)
        page.wait("!!model")
        command = page.js("$('cli').textContent")
        ran = subprocess.run(["bash", "-c", 'nanogpt() { "$PROGRAM" "$@"; }; ' + command],
                             env={**os.environ, "PROGRAM": os.path.abspath(program)}, text=True,
                             input="Hello\n", capture_output=True, timeout=60, check=False)
        check(f"terminal: the command for {what} works", ran.returncode == 0 and ran.stdout.strip(),
              (command, ran))
        request = urllib.request.Request(server.url + "props", headers={"X-Forwarded-For": "192.0.2.1"})
        with urllib.request.urlopen(request, timeout=20) as reply:
            text = reply.read().decode()
        check(f"terminal: no path goes to another machine ({what})", "folder" not in text, text)
        done(page)
        server.close()
    os.environ.clear()
    os.environ.update(kept)
    os.rename(odd, base)


def done(page):
    page.close()
    faults.extend(page.faults)
    origins.update(re.match(r"[a-z]+:(//[^/]*)?", r["url"]).group() for r in page.requests)


def run(program, sample, shots):
    folder = tempfile.mkdtemp(prefix="nanogpt-page-")
    base = os.path.join(folder, "base")
    os.makedirs(base)
    put = make_base(base, sample)
    server = Program(program, base)
    browser = Browser(find_browser())
    stub = None

    def section(call, *parts):
        try:
            return call(*parts)
        except Exception:  # one section that ends early does not end the others
            check(f"{call.__name__}: runs to its end", False, traceback.format_exc()[-600:])
            return None
    try:
        section(document, server)
        page = Page(browser, server.url)
        for call, *more in ((models, put), (chatting,), (why,), (walk,), (settings,), (commands,),
                            (completion,), (keeping, folder)):
            section(call, page, *more)
        done(page)
        page = Page(browser, server.url)
        page.wait("!!model")
        section(keyboard, page)
        done(page)

        body, headers = fetch(server.url)
        rules = {"Content_Type": "text/html; charset=utf-8",
                 "Content_Security_Policy": headers["Content-Security-Policy"]}
        listing = json.loads(fetch(server.url + "api/v1/inference/models")[0])

        def again(port=0):
            return Stub(body, rules, listing, port)
        stub = again()
        page = Page(browser, stub.url)
        page.wait("!!model")
        for call in (typing, waiting, stopping, races, trouble):
            section(call, page, stub)
        stub = section(away, page, stub, again) or again()
        for call, *more in ((hostile,), (scrolling, stub)):
            section(call, page, *more)
        done(page)
        section(looks, browser, stub, shots)
        section(small, browser, stub, shots)
        section(covered, browser, stub)
        section(odd_places, browser, program, base, stub)
        check("no request to another origin", all(
            origin.startswith(("http://127.0.0.1:", "blob:", "data:", "about:"))
            for origin in origins), origins)
        check("no report of the policy, no error in the console", not faults, faults)
    finally:
        browser.close()
        server.close()
        if stub:
            stub.close()
        shutil.rmtree(folder, ignore_errors=True)


def main():
    if len(sys.argv) not in (3, 4):
        print(__doc__)
        return 2
    if not find_browser():
        print("skipped: no Chromium was found (chromium, google-chrome; $NANOGPT_BROWSER)")
        return 77
    begin = time.monotonic()
    run(sys.argv[1], sys.argv[2], sys.argv[3] if len(sys.argv) == 4 else None)
    print(f"{time.monotonic() - begin:.0f} s")
    print(f"{len(passed)} passed, {len(failed)} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
