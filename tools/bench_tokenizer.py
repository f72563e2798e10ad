#!/usr/bin/env python3
"""Compares the speed of Tokenizer::encode with tiktoken's encode_ordinary, one thread each.

    tools/bench_tokenizer.py <tokenizer.pkl> [--megabytes 20] [--rounds 5] [--cxx g++]

Builds two corpora from what is installed here (English prose: manual pages, documentation; code:
C headers and Python's library), compiles tools/bench_tokenizer.cpp, and lets both encode the same
files, in turns, so that whatever else the machine does slows both. Prints the medians. The ids
must be equal. Needs tiktoken (pip install tiktoken) and a C++ compiler.
"""
import argparse
import gzip
import html
import os
import pathlib
import pickle
import re
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent

# In this order until there is enough. Other installations have other documentation.
PROSE = ["/usr/share/man/man1", "/usr/share/man/man8", "/usr/share/man/man7", "/usr/share/man/man5",
         "/usr/share/man/man3", "/usr/share/man/man2", "/usr/share/doc", "/usr/share/info",
         "/usr/share/perl", str(pathlib.Path(os.__file__).parent),
         *map(str, pathlib.Path.home().glob(".rustup/toolchains/*/share/doc")), "/usr/include"]
CODE = ["/usr/include", str(pathlib.Path(os.__file__).parent), "/usr/lib/python3"]
COMMON_WORDS = {"the", "of", "and", "to", "is", "in", "that", "a", "for", "be"}


def files_under(folders):
    for folder in folders:
        for directory, names, files in os.walk(folder):
            names.sort()
            for name in sorted(files):
                yield os.path.join(directory, name)


def read_text(path):
    """The text of a file, None if it is not UTF-8 or too large."""
    try:
        with (gzip.open if path.endswith(".gz") else open)(path, "rb") as file:
            data = file.read(30_000_000)
        return data.decode("utf-8") if len(data) < 30_000_000 else None
    except (OSError, EOFError, UnicodeDecodeError):
        return None


def without_markup(path, text):
    if "/man/" in path:  # roff: lines of macros, then font changes and escapes
        text = re.sub(r"^[.'].*$", "", text, flags=re.M)
        text = re.sub(r"\\s[-+]?\d|\\f\(..|\\f\[.*?\]|\\f.|\\&", "", text)
        return re.sub(r"\\\(..|\\.", lambda m: "-" if m[0] == "\\-" else "", text)
    if path.endswith(".html"):
        text = re.sub(r"<(script|style)\b.*?</\1>", "", text, flags=re.S)
        text = re.sub(r"</?(p|div|li|h\d|pre|td|tr|br|dd|dt|details|section)\b[^>]*>", "\n\n", text)
        return html.unescape(re.sub(r"<[^>]*>", "", text))
    return text


def is_prose(paragraph):
    words = paragraph.lower().split()
    return (len(paragraph) >= 200
            and sum(word in COMMON_WORDS for word in words) >= 0.12 * len(words)
            and sum(c.isalpha() or c == " " for c in paragraph) >= 0.88 * len(paragraph))


def build_prose(size):
    """Paragraphs that read like English, each once."""
    seen, parts, total = set(), [], 0
    for path in files_under(PROSE):
        text = read_text(path)
        for paragraph in re.split(r"\n\s*\n", without_markup(path, text)) if text else []:
            paragraph = paragraph.strip()
            key = re.sub(r"\W+", "", paragraph.lower())
            if key not in seen and is_prose(paragraph):
                seen.add(key)
                parts.append(paragraph)
                total += len(paragraph.encode()) + 2
        if total >= size:
            break
    return "\n\n".join(parts), f"{len(parts)} different paragraphs of manuals and documentation"


def build_code(size):
    seen, parts, total = set(), [], 0
    for path in files_under(CODE):
        text = read_text(path) if path.endswith((".h", ".hpp", ".py")) else None
        if text and text not in seen:
            seen.add(text)
            parts.append(text)
            total += len(text.encode())
        if total >= size:
            break
    return "\n".join(parts), f"{len(parts)} different C headers and Python modules"


def fnv(ids):
    value = 0xCBF29CE484222325
    for i in ids:
        value = ((value ^ i) * 0x100000001B3) & 0xFFFFFFFFFFFFFFFF
    return f"{value:016x}"


def compare(encoding, driver, tokenizer, path, what, rounds):
    text = pathlib.Path(path).read_bytes().decode("utf-8")  # newlines as they are
    size = os.path.getsize(path)
    ids = encoding.encode_ordinary(text)
    theirs, ours = [], []
    for _ in range(rounds):
        start = time.perf_counter()
        encoding.encode_ordinary(text)
        theirs.append(time.perf_counter() - start)
        out = subprocess.run([driver, tokenizer, "1", path], check=True, stdout=subprocess.PIPE)
        _, tokens, digest, seconds = out.stdout.decode().splitlines()[1].split()
        ours.append(float(seconds))
    if int(tokens) != len(ids) or digest != fnv(ids):
        sys.exit(f"{path}: the ids differ from tiktoken's")
    their_speed, our_speed = (size / statistics.median(t) / 1e6 for t in (theirs, ours))
    print(f"{pathlib.Path(path).stem}: {size / 1e6:.1f} MB, {what}, "
          f"{size / len(ids):.2f} bytes/token")
    print(f"  tiktoken {their_speed:6.1f} MB/s   nanogpt {our_speed:6.1f} MB/s   "
          f"ratio {our_speed / their_speed:.2f}   (median of {rounds}, same ids)")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tokenizer")
    parser.add_argument("--megabytes", type=float, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cxx", default="g++")
    options = parser.parse_args()
    try:
        import tiktoken
    except ImportError:
        sys.exit("bench_tokenizer.py: tiktoken is needed: pip install tiktoken")
    with open(options.tokenizer, "rb") as file:
        encoding = pickle.load(file)  # the file is one's own: pickle runs what is in it
    print(f"tiktoken {tiktoken.__version__}, {encoding.n_vocab} tokens")
    with tempfile.TemporaryDirectory() as folder:
        driver = os.path.join(folder, "bench_tokenizer")
        subprocess.run([options.cxx, "-std=c++20", "-O3", f"-I{ROOT}", "-o", driver,
                        str(ROOT / "tools" / "bench_tokenizer.cpp")], check=True)
        for name, build in [("prose", build_prose), ("code", build_code)]:
            text, what = build(options.megabytes * 1e6)
            path = os.path.join(folder, name + ".txt")
            pathlib.Path(path).write_bytes(text.encode())
            compare(encoding, driver, options.tokenizer, path, what, options.rounds)


main()
