#!/usr/bin/env python3
"""Checks the rules of the house that a program can check, and prints what it measured.

    python3 tools/check_house.py            exit code 1 if a rule is broken

Headers that are read from the top: their contents lists are true, their functions are short, their
includes say what they are for, they leave no macro behind and depend on no switch. Above each CUDA
kernel stands what it computes, on what, by whom, at what cost and in which order. The texts that
teach (tools/MODEL.md, tools/EXERCISES.md) quote what is there. On the ladder of kernels each rung is
a small step from the one before and says what it is for.
Standard library only.
"""
import os
import re
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
HEADER, KERNELS = "nanogpt.hpp", "kernels.cuh"
ROOT_ENTRIES = {"CMakeLists.txt", HEADER, KERNELS, "demo.cpp", "tools", "tests", "LICENSE",
                "README.md"}
TEXT = (".hpp", ".cpp", ".cuh", ".cu", ".py", ".sh", ".md", ".txt", ".cmake", ".html", ".js",
        ".css")
# The aim for the header is 4000 lines. It has more: this number only ever goes down.
MAX_LINES = {HEADER: 5093, KERNELS: 3729}
MAX_FUNCTION, MAX_STORY = 60, 120  # the functions named forward tell the story and may be longer
LADDER, MAX_STEP = os.path.join("tools", "ladder"), 60  # lines, as `diff | grep -c '^[<>]'` counts
MAX_KERNEL = 130  # a pipeline in pieces is harder to follow than in one
MAY_STAY_DEFINED = {HEADER: {"NANOGPT_VERSION"}, KERNELS: {"NANOGPT_CUDA_CHECK"}}
BANNER = re.compile(r"^// ==== (\d+)\. ([a-z0-9_]+) =*$")

# Not in the headers: slow to include, different between libraries, or not needed.
FORBIDDEN_INCLUDES = {"iostream", "regex", "random", "map", "ranges", "format", "cassert"}
# A body that depends on one of these may differ between two files of one program. __CUDACC__ is for
# the one question, at the top of kernels.cuh, whether this is a CUDA compiler at all.
SWITCHES = re.compile(r"\b(NDEBUG|_OPENMP|__OPTIMIZE__|__FAST_MATH__|__CUDACC__|__SANITIZE\w*"
                      r"|__AVX\w*|__FMA__|__SSE[34]\w*)\b")
ASKS_FOR_NVCC = re.compile(r"#\s*(ifndef\s+|if\s+!\s*defined\s*\(?\s*)__CUDACC__\s*\)?\s*$")
LAUNCH_BOUNDS = r"__launch_bounds__\s*\((?:[^()]|\([^()]*\))*\)"
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
    """(name, first line, number of lines, whether it is a CUDA kernel) of every function defined
    outside of functions."""
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
            text = re.sub(r"\[\[.*?\]\]|__attribute__\s*\(\(.*?\)\)|alignas\s*\(.*?\)"
                          r"|" + LAUNCH_BOUNDS, " ", text, flags=re.DOTALL).strip()
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
                       code.count("\n", first, end) + 1, "__global__" in text)
                at, start = end, end + 1
            else:  # a table or an initialiser
                at = closing(code, at)
        at += 1


def check_functions(path, source):
    longest = (0, "", 0)
    for name, line, length, is_kernel in functions(source):
        longest = max(longest, (length, name, line))
        limit = MAX_KERNEL if is_kernel else MAX_STORY if name == "forward" else MAX_FUNCTION
        if length > limit and name not in ("TEST_CASE", "TEST_CASE_TEMPLATE", "TEST_SUITE"):
            problem(path, line, f"{name} has {length} lines, at most {limit} are allowed")
    return longest


def check_contents(path, lines):
    """The contents list of the manual is the list of banners, in order."""
    banners = []
    for number, line in enumerate(lines, 1):
        if line.startswith("// ==== "):
            match = BANNER.match(line)
            if not match or len(line) != 100:
                problem(path, number, "a banner is '// ==== N. slug ====...', 100 columns wide")
            if match:
                banners.append((int(match.group(1)), match.group(2), number))
    listed = [b[:2] for b in banners if b[0] > 0]
    if [n for n, _ in listed] != list(range(1, len(listed) + 1)):
        problem(path, 0, f"the sections are numbered {[n for n, _ in listed]}")
    manual = lines[:next((b[2] - 1 for b in banners if b[0] > 0), 0)]
    begin = next((i for i, line in enumerate(manual)
                  if re.match(r"^//.*\bcontents\b", line, re.IGNORECASE)), None)
    if begin is None:
        problem(path, 0, "the manual has no line with the word Contents and a list below it")
        return banners
    contents = []
    for line in manual[begin:]:
        contents += [(int(n), slug) for n, slug in
                     re.findall(r"(?:^//|\s{2})\s*(\d+)\.?\s+([a-z][a-z0-9_]*)\b", line)]
        if contents and line.strip() == "//":
            break
    contents = [entry for entry in contents if entry[0] > 0]
    if contents != listed:
        problem(path, begin + 1, f"the contents list differs from the banners: only in the list "
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


def check_header(path, source):
    lines = source.split("\n")
    if lines and not lines[-1]:
        lines.pop()
    banners = check_contents(path, lines)
    print_sections(lines, banners)
    print()
    code_lines = code_only(source).split("\n")
    defined = {}
    for number, line in enumerate(lines, 1):
        if path == HEADER and CUDA_WORD.search(line):
            problem(path, number, "the header knows nothing of " + CUDA_WORD.search(line).group())
        if ENDS_PROGRAM.search(code_lines[number - 1]):
            problem(path, number, "the library does not print, exit, abort or assert")
        directive = re.match(r"\s*#\s*(\w+)\s*(.*)", line)
        if not directive:
            continue
        word, rest = directive.groups()
        if word == "include":
            name = re.match(r"<(.*?)>", rest)
            if name and name.group(1) in FORBIDDEN_INCLUDES:
                problem(path, number, f"<{name.group(1)}> is not for this header")
        elif word == "define":
            defined[re.match(r"\w+", rest).group()] = number
        elif word == "undef":
            defined.pop(re.match(r"\w+", rest).group(), None)
        elif word in ("if", "ifdef", "ifndef", "elif") and SWITCHES.search(rest):
            if path != KERNELS or not ASKS_FOR_NVCC.match(line):
                problem(path, number, f"the header depends on {SWITCHES.search(rest).group()}")
    for name, number in defined.items():
        if name not in MAY_STAY_DEFINED[path]:
            problem(path, number, f"the macro {name} is left defined")


def check_asks_for_nvcc(source):
    """Compiled as C++, kernels.cuh says what it needs before anything else can fail."""
    directives = [line for line in source.split("\n") if re.match(r"#", line)
                  and not re.match(r"#\s*pragma\s+once", line)]
    if not (len(directives) > 1 and ASKS_FOR_NVCC.match(directives[0])
            and re.match(r"#\s*error\b", directives[1])):
        problem(KERNELS, 0, "its first lines of code are not: #ifndef __CUDACC__, #error ...")


def check_kernels(source):
    """Each kernel is a template or static, so that two files of a program may both have it, has its
    sizes from a traits struct, which asserts something about them, and has the comment of six
    parts: name: formula / shapes / grid: / cost: / order: / source:"""
    lines, code = source.split("\n"), code_only(source)
    for match in re.finditer(r"\bstruct (\w*Traits) \{", code):
        if "static_assert" not in code[match.end():closing(code, match.end() - 1)]:
            problem(KERNELS, code.count("\n", 0, match.start()) + 1,
                    f"{match.group(1)} asserts nothing")
    for match in re.finditer(r"\b__global__\b", code):
        start = max(code.rfind(c, 0, match.start()) for c in ";{}") + 1
        head = code[start:match.start()]
        number = code.count("\n", 0, start + len(head) - len(head.lstrip())) + 1
        declaration = re.sub(LAUNCH_BOUNDS, "", code[match.end():].split("{")[0])
        name = re.search(r"(\w+)\s*\(", declaration).group(1)
        if not re.match(r"\s*void\s+__launch_bounds__\(\s*(\w+::)?k[A-Z]", code[match.end():]):
            problem(KERNELS, number, f"{name} has no __launch_bounds__ from a traits struct")
        if not re.search(r"\b(template|static)\b", head):
            problem(KERNELS, number, f"{name} is neither a template nor static")
        above = number - 1
        while above > 0 and lines[above - 1].startswith("//"):
            above -= 1
        comment = lines[above:number - 1]
        slug = name.removesuffix("_kernel")
        parts = [m.group(1) for m in (re.match(r"//   (grid|cost|order|source): \S", line)
                                      for line in comment) if m]
        if not comment or not comment[0].startswith(f"// {slug}: "):
            problem(KERNELS, number, f"above {name} stands no comment that begins '// {slug}: '")
        elif (parts != ["grid", "cost", "order", "source"]
              or not re.match(r"//   (?!grid: )\S", comment[1])):
            problem(KERNELS, number, f"{name}: the comment has shapes, grid:, cost:, order: and "
                    f"source:, in this order; found {', '.join(parts) or 'none'}")


def differing_lines(a, b):
    """How many lines are only in a or only in b: what is not in their longest common subsequence."""
    row = [0] * (len(b) + 1)
    for line in a:
        diagonal = 0
        for j, other in enumerate(b, 1):
            diagonal, row[j] = row[j], diagonal + 1 if line == other else max(row[j], row[j - 1])
    return len(a) + len(b) - 2 * row[-1]


def check_ladder(names, read_rung, readme):
    """Rungs gemm_1.cu, gemm_2.cu ... and attention_1.cu ... without a gap: each says what it is, its
    neighbour is near, the last calls the production kernel, and README.md knows all."""
    for kind in ("gemm", "attention"):
        count = sum(name.startswith(kind + "_") and name.endswith(".cu") for name in names)
        wanted = [f"{kind}_{i}.cu" for i in range(1, count + 1)]
        if count < 2 or not set(wanted) <= set(names):
            problem(LADDER, 0, f"the rungs of {kind} are not {kind}_1.cu, {kind}_2.cu, ...")
            continue
        before = None
        for name in wanted:
            path, lines = os.path.join(LADDER, name), read_rung(name).splitlines()
            top = [line for line in lines[:next((i for i, line in enumerate(lines)
                                                 if not line.startswith("//")), 0)]]
            parts = [m.group(1) for m in (re.match(r"//   (\w+) +\S", line) for line in top) if m]
            if not top or not re.match(rf"// {name[:-3]}: \S", top[0]):
                problem(path, 1, f"the first line is not '// {name[:-3]}: what it is'")
            if parts != ["idea", "expected", "measured", "taught"]:
                problem(path, 1, f"the top tells idea, expected, measured and taught; found {parts}")
            if ('#include "../../kernels.cuh"' in lines) != (name == wanted[-1]):
                problem(path, 0, "the last rung includes ../../kernels.cuh, and no other")
            if before and differing_lines(before, lines) > MAX_STEP:
                problem(path, 0, f"{differing_lines(before, lines)} lines differ from the rung before, "
                        f"at most {MAX_STEP} are allowed")
            if f"({name})" not in readme:
                problem(os.path.join(LADDER, "README.md"), 0, f"has no link to {name}")
            before = lines


def check_includes(path, source):
    for number, line in enumerate(source.split("\n"), 1):
        if re.match(r"\s*#\s*include\s*<", line) and "//" not in line:
            problem(path, number, "an include says what it is for: // name, name")


def section_numbers(source):
    return {number: slug for number, slug in
            re.findall(r"^// ==== (\d+)\. ([a-z0-9_]+) =", source, flags=re.MULTILINE)}


def check_text(path, sources):
    """A text that teaches: what it quotes is in the sources, its sections and files are there."""
    text, source = read(path), "\n".join(read(name) for name in sources)
    squeezed, sections = re.sub(r"\s", "", source), section_numbers(read(HEADER))
    own, block = " ".join(re.findall(r"```.*?```", text, flags=re.DOTALL)), None
    for number, line in enumerate(text.split("\n"), 1):
        if line.startswith("```"):
            block = line[3:] if block is None else None
            continue
        if block == "cpp" and re.sub(r"\s", "", line) not in squeezed:
            problem(path, number, f"not in {', '.join(sources)}: {line.strip()}")
        if block is not None:
            continue
        for word, slug in re.findall(r"[Ss]ection (\d+)(?: \((\w+)\))?", line):
            if sections.get(word) != slug:
                problem(path, number, f"there is no section {word} ({slug})")
        for code in re.findall(r"`([^`]+)`", line):
            whole = rf"(?<!\w){re.escape(code)}(?!\w)"  # Pass::smear is not Pass::smears
            if not (re.search(whole, source) or code in own or there(code)):
                problem(path, number, f"neither code nor a file: {code}")
        for link in re.findall(r"\]\(([^)]+)\)", line):
            if not there(os.path.join(os.path.dirname(path), link)):
                problem(path, number, f"leads nowhere: {link}")


def there(path):
    """The pictures and the ladder may be left out of a copy, whole."""
    folder = re.match(r"tools/(walk|ladder)\b", path)
    return (os.path.exists(os.path.join(ROOT, path))
            or bool(folder) and not os.path.exists(os.path.join(ROOT, folder.group())))


def check_model_text(path, header):
    """It names every hook point, and the constants of the generations are the header's."""
    text = read(path)
    points = re.search(r"enum class HookPoint[^{]*\{(.*?)\};", header, re.DOTALL).group(1)
    for point in re.findall(r"^ +(\w+)", points, flags=re.MULTILINE):
        if not re.search(rf"`HookPoint::{point}`", text):
            problem(path, 0, f"does not name HookPoint::{point}")
    facts = re.findall(r'\{Generation::\w+, "(\w+)", "([^"]+)", (\d+), ([\d.]+)f?, (\d), (\d+), '
                       r"(\d), (\d+), (true|false)\}", header)
    for name, dates, base, scale, gate, channels, divisor, multiple, bf16 in facts:
        window = "none" if divisor == "0" else f"S/{divisor}"
        window += f", up to {multiple}" if multiple != "1" else ""
        row = [name.capitalize(), dates, f"{int(base):,}", scale, gate if gate != "0" else "-",
               channels if channels != "0" else "-", window,
               "bfloat16" if bf16 == "true" else "float32"]
        if f"| {' | '.join(row)} |" not in text:
            problem(path, 0, f"the table of generations has no row | {' | '.join(row)} |")
    if len(facts) != len(re.findall(r"\{Generation::", header)):
        problem(path, 0, "not all rows of kGenerations can be read")


def check_exercises(path, tests):
    """Each exercise has its test and each test its exercise."""
    asked = set(re.findall(r"^## (\d+)\.", read(path), flags=re.MULTILINE))
    tested = set(re.findall(r'TEST_CASE\(\s*"exercise (\d+):', read(tests)))
    if asked != tested or not asked:
        problem(path, 0, f"exercises {sorted(asked)}, tests of {sorted(tested)}")


def main():
    for entry in sorted(os.listdir(ROOT)):
        if not (entry.startswith((".", "build")) or entry in ROOT_ENTRIES):
            problem(entry, 0, "not one of the entries of the root")
    for path in ("tools/chat.sh", "tools/test.sh", ".ci/run"):
        if not os.access(os.path.join(ROOT, path), os.X_OK):
            problem(path, 0, "cannot be executed")
    check_header(HEADER, read(HEADER))
    if os.path.exists(os.path.join(ROOT, KERNELS)):
        source = read(KERNELS)
        check_header(KERNELS, source)
        check_asks_for_nvcc(source)
        check_kernels(source)
    exercises = ("tests/exercises/exercises.hpp", "tests/test_exercises.cpp")
    check_text("tools/MODEL.md", (HEADER,))
    check_model_text("tools/MODEL.md", read(HEADER))
    check_text("tools/EXERCISES.md", (HEADER, *exercises))
    check_exercises("tools/EXERCISES.md", exercises[1])
    check_ladder(os.listdir(os.path.join(ROOT, LADDER)),
                 lambda name: read(os.path.join(LADDER, name)),
                 read(os.path.join(LADDER, "README.md")))
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
