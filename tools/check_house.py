#!/usr/bin/env python3
"""Checks the rules of the house that a program can check, and prints what it measured.

    python3 tools/check_house.py            exit code 1 if a rule is broken

One header that is read from the top: its contents list is true, its functions are short, its
includes say what they are for, it leaves no macro behind and depends on no switch.
Standard library only.
"""
import os
import re
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
HEADER = "nanogpt.hpp"
ROOT_ENTRIES = {"CMakeLists.txt", HEADER, "kernels.cuh", "demo.cpp", "tools", "tests", "LICENSE",
                "README.md"}
TEXT = (".hpp", ".cpp", ".cuh", ".cu", ".py", ".sh", ".md", ".txt", ".cmake", ".html", ".js",
        ".css")
# The aim for the header is 4000 lines. It has more: this number only ever goes down.
MAX_LINES = {HEADER: 5270}
MAX_FUNCTION, MAX_STORY = 60, 120  # the functions named forward tell the story and may be longer
BANNER = re.compile(r"^// ==== (\d+)\. ([a-z0-9_]+) =*$")

# Not in the header: slow to include, different between libraries, or not needed.
FORBIDDEN_INCLUDES = {"iostream", "regex", "random", "map", "ranges", "format", "cassert"}
# A body that depends on one of these may differ between two files of one program.
SWITCHES = re.compile(r"\b(NDEBUG|_OPENMP|__OPTIMIZE__|__FAST_MATH__|__CUDACC__|__SANITIZE\w*"
                      r"|__AVX\w*|__FMA__|__SSE[34]\w*)\b")
CUDA_WORD = re.compile(r"cuda|nvcc|nvidia|__global__|__device__|__host__", re.IGNORECASE)
ENDS_PROGRAM = re.compile(r"(?<![\w.>])(?:std::)?(exit|abort|_Exit|quick_exit|terminate|assert|printf"
                          r"|puts)\s*\(|std::c(out|err)\b")
# Written in pieces, so that this file does not break its own rules.
LEFTOVER = re.compile(r"\b(TO" r"DO|FIX" r"ME|XX" r"X|HA" r"CK)\b")
ABSOLUTE = re.compile(r"(?<![\w.}/\-])/(home|root|work|workspace|Users|mnt|media|srv|tmp)/"
                      r"|\b[A-Z]:\\\\?(Users|Windows)")
REGISTRY = re.compile(r"\b(deb\.debian|archive\.ubuntu|security\.debian|ports\.ubuntu|pypi|npmjs"
                      r"|crates|ghcr|docker|quay)\.(org|com|io)\b")

problems = []


def problem(path, line, text):
    problems.append(f"{path}:{line}: {text}" if line else f"{path}: {text}")


def read(path):
    with open(os.path.join(ROOT, path), encoding="utf-8") as file:
        return file.read()


def our_files():
    """Paths of all text files of the project, relative to its root."""
    for folder, folders, files in os.walk(ROOT):
        folders[:] = sorted(d for d in folders if d not in (".git", "__pycache__", ".cache")
                            and not d.startswith("build")
                            and not os.path.exists(os.path.join(folder, d, "CMakeCache.txt")))
        for name in sorted(files):
            path = os.path.relpath(os.path.join(folder, name), ROOT)
            if name.endswith(TEXT) or path == os.path.join(".ci", "run"):
                yield path


def blank(match):
    return re.sub(r"[^\n]", " ", match.group())


def code_only(source):
    """The source with comments, literals and preprocessor lines replaced by blanks."""
    source = re.sub(r'R"(\w*)\((?:.|\n)*?\)\1"'
                    r'|//[^\n]*|/\*(?:.|\n)*?\*/'
                    r'|"(?:\\.|[^"\\\n])*"'
                    r"|(?<![0-9a-fA-F])'(?:\\.|[^'\\\n])+'", blank, source)
    return re.sub(r"^[ \t]*#(?:[^\n]*\\\n)*[^\n]*", blank, source, flags=re.MULTILINE)


def closing(code, at):
    """Index of the } that closes the { at index `at`."""
    depth = 0
    for i in range(at, len(code)):
        depth += (code[i] == "{") - (code[i] == "}")
        if depth == 0:
            return i
    return len(code) - 1


def without_templates(head):
    """Drops template <...> in front of a declaration; its class T is no class."""
    match = re.match(r"\s*template\s*<", head)
    if not match:
        return head
    depth, i = 1, match.end()
    while i < len(head) and depth:
        depth += (head[i] == "<") - (head[i] == ">" and head[i - 1] != "-")
        i += 1
    return without_templates(head[i:])


def functions(source):
    """(name, first line, number of lines) of every function defined outside of functions."""
    code = code_only(source)
    start = at = 0
    while at < len(code):
        c = code[at]
        if c in ";}":
            start = at + 1
        elif c == "{":
            head = re.sub(r"\b(public|private|protected)\s*:(?!:)", blank, code[start:at])
            first = start + len(head) - len(head.lstrip())
            text = without_templates(head)
            text = re.sub(r"\[\[.*?\]\]|__attribute__\s*\(\(.*?\)\)|alignas\s*\(.*?\)", " ", text,
                          flags=re.DOTALL).strip()
            scope = re.match(r"(inline\s+)?namespace\b|extern\b|(struct|class|union|enum)\b", text)
            if scope and not text.endswith(")"):
                start = at + 1
            elif "(" in text:
                end = closing(code, at)
                after = code[end + 1:].lstrip()[:1]
                if after in (",", "{"):  # a member in a constructor's list: a_{1}, b_{2} {
                    at = end + 1
                    continue
                name = re.search(r"(operator\s*\S+?|[~\w]+)\s*\(", text)
                yield (name.group(1) if name else "?", code.count("\n", 0, first) + 1,
                       code.count("\n", first, end) + 1)
                at, start = end, end + 1
            else:  # a table or an initialiser
                at = closing(code, at)
        at += 1


def check_functions(path, source):
    longest = (0, "", 0)
    for name, line, length in functions(source):
        longest = max(longest, (length, name, line))
        limit = MAX_STORY if name == "forward" else MAX_FUNCTION
        if length > limit and name not in ("TEST_CASE", "TEST_CASE_TEMPLATE", "TEST_SUITE"):
            problem(path, line, f"{name} has {length} lines, at most {limit} are allowed")
    return longest


def check_contents(lines):
    """The contents list of the manual is the list of banners, in order."""
    banners = []
    for number, line in enumerate(lines, 1):
        if line.startswith("// ==== "):
            match = BANNER.match(line)
            if not match or len(line) != 100:
                problem(HEADER, number, "a banner is '// ==== N. slug ====...', 100 columns wide")
            if match:
                banners.append((int(match.group(1)), match.group(2), number))
    listed = [b[:2] for b in banners if b[0] > 0]
    if [n for n, _ in listed] != list(range(1, len(listed) + 1)):
        problem(HEADER, 0, f"the sections are numbered {[n for n, _ in listed]}")
    manual = lines[:next((b[2] - 1 for b in banners if b[0] > 0), 0)]
    begin = next((i for i, line in enumerate(manual)
                  if re.match(r"^//.*\bcontents\b", line, re.IGNORECASE)), None)
    if begin is None:
        problem(HEADER, 0, "the manual has no line with the word Contents and a list below it")
        return banners
    contents = []
    for line in manual[begin:]:
        contents += [(int(n), slug) for n, slug in
                     re.findall(r"(?:^//|\s{2})\s*(\d+)\.?\s+([a-z][a-z0-9_]*)\b", line)]
        if contents and line.strip() == "//":
            break
    contents = [entry for entry in contents if entry[0] > 0]
    if contents != listed:
        problem(HEADER, begin + 1, f"the contents list differs from the banners: only in the list "
                f"{[e for e in contents if e not in listed]}, only as banner "
                f"{[e for e in listed if e not in contents]}")
    return banners


def print_sections(lines, banners):
    """Comment lines per code line; 0.30 to 0.60 is the aim."""
    print(f"{'section':<18}{'lines':>6}{'code':>6}{'comment':>9}{'ratio':>7}")
    ends = [b[2] - 1 for b in banners[1:]] + [len(lines)]
    for (number, slug, line), end in zip(banners, ends):
        part = [text.strip() for text in lines[line - 1:end]]
        comment = sum(text.startswith("//") or "  // " in text for text in part)
        code = sum(bool(text) and not text.startswith("//") for text in part)
        print(f"{number:>2}. {slug:<14}{end - line + 1:>6}{code:>6}{comment:>9}"
              f"{comment / max(code, 1):>7.2f}")


def check_header(source):
    lines = source.split("\n")
    if lines and not lines[-1]:
        lines.pop()
    banners = check_contents(lines)
    print_sections(lines, banners)
    code_lines = code_only(source).split("\n")
    defined = {}
    for number, line in enumerate(lines, 1):
        if CUDA_WORD.search(line):
            problem(HEADER, number, "the header knows nothing of " + CUDA_WORD.search(line).group())
        if ENDS_PROGRAM.search(code_lines[number - 1]):
            problem(HEADER, number, "the library does not print, exit, abort or assert")
        directive = re.match(r"\s*#\s*(\w+)\s*(.*)", line)
        if not directive:
            continue
        word, rest = directive.groups()
        if word == "include":
            name = re.match(r"<(.*?)>", rest)
            if name and name.group(1) in FORBIDDEN_INCLUDES:
                problem(HEADER, number, f"<{name.group(1)}> is not for this header")
        elif word == "define":
            defined[re.match(r"\w+", rest).group()] = number
        elif word == "undef":
            defined.pop(re.match(r"\w+", rest).group(), None)
        elif word in ("if", "ifdef", "ifndef", "elif") and SWITCHES.search(rest):
            problem(HEADER, number, f"the header depends on {SWITCHES.search(rest).group()}")
    for name, number in defined.items():
        if name != "NANOGPT_VERSION":
            problem(HEADER, number, f"the macro {name} is left defined")


def check_includes(path, source):
    for number, line in enumerate(source.split("\n"), 1):
        if re.match(r"\s*#\s*include\s*<", line) and "//" not in line:
            problem(path, number, "an include says what it is for: // name, name")


def main():
    for entry in sorted(os.listdir(ROOT)):
        if not (entry.startswith((".", "build")) or entry in ROOT_ENTRIES):
            problem(entry, 0, "not one of the entries of the root")
    for path in ("tools/chat.sh", "tools/test.sh", ".ci/run"):
        if not os.access(os.path.join(ROOT, path), os.X_OK):
            problem(path, 0, "cannot be executed")
    check_header(read(HEADER))
    print()
    for path in our_files():
        source = read(path)
        count = source.count("\n")
        for number, line in enumerate(source.split("\n"), 1):
            for rule, what in ((LEFTOVER, "left over"), (ABSOLUTE, "an absolute path"),
                               (REGISTRY, "a registry's host")):
                if rule.search(line):
                    problem(path, number, f"{what}: {rule.search(line).group()}")
        if count > MAX_LINES.get(path, count):
            problem(path, 0, f"{count} lines, at most {MAX_LINES[path]} are allowed")
        if path.endswith((".hpp", ".cpp", ".cuh", ".cu")):
            if path.startswith("tests" + os.sep):
                continue  # tables of cases may be long
            length, name, line = check_functions(path, source)
            if os.sep not in path:
                check_includes(path, source)
                print(f"{path}: {count} lines, longest function {name} with {length} (line {line})")
    for text in problems:
        print(text)
    print(f"house: {len(problems)} problems" if problems else "house: all rules hold")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
