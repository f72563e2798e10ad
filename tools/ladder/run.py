#!/usr/bin/env python3
"""Climbs the ladder: builds every rung, runs it, and prints the table of README.md.

    python3 tools/ladder/run.py                     build with nvcc for the GPU at hand, run, print
    python3 tools/ladder/run.py --bin build/ladder  run what CMake has built (target nanogpt_ladder)
    python3 tools/ladder/run.py --check             only whether every rung computes the right thing
    python3 tools/ladder/run.py --write             and put the table into README.md, and each rung's
                                                    figures into the line "measured" at its top
    python3 tools/ladder/run.py --write --from LOG  the same from the saved output of a run

Every rung ends its output with one JSON object, which is all that is read of it; so the output of a
run on another machine can be saved and taken from there. Exit code 1 if a rung is wrong or fails, 2
for bad usage, 77 if there is no nvcc or no GPU. Standard library only.
"""
import argparse
import ctypes
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile

HERE = os.path.dirname(os.path.abspath(__file__))
README = os.path.join(HERE, "README.md")
BEGIN, END = "<!-- ladder -->", "<!-- /ladder -->"
SKIPPED = 77
FIGURES = ("ms", "min_ms", "max_ms", "tflops", "peak_tflops", "share", "error")


def rungs():
    """Names of all rungs, from the bottom: gemm first."""
    names = [name[:-3] for name in os.listdir(HERE) if re.fullmatch(r"(gemm|attention)_\d+\.cu", name)]
    return sorted(names, key=lambda name: (name.startswith("attention"), int(name.split("_")[1])))


def find_nvcc():
    """nvcc, if there is one and a GPU to compile for: without one it does not know for which."""
    gpus = ctypes.c_int(0)
    try:
        driver = ctypes.CDLL("libcuda.so.1")
        if driver.cuInit(0) == 0:
            driver.cuDeviceGetCount(ctypes.byref(gpus))
    except OSError:
        pass
    if gpus.value == 0:
        print("skipped: no GPU can be used")
        sys.exit(SKIPPED)
    nvcc = shutil.which(os.environ.get("CUDACXX", "nvcc"))
    nvcc = nvcc or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if nvcc is None:
        print("skipped: no nvcc, neither in PATH nor in CUDACXX")
        sys.exit(SKIPPED)
    return nvcc


def climb(folder, nvcc, check):
    """Builds each rung, unless nvcc is None, and runs it with its output shown; their last lines."""
    results = []
    for rung in rungs():
        program = os.path.join(folder, rung)
        if nvcc and subprocess.run([nvcc, "-std=c++20", "-O3", "-arch=native", "-o", program,
                                    os.path.join(HERE, rung + ".cu")]).returncode != 0:
            sys.exit(f"run.py: {rung} does not compile")
        try:
            done = subprocess.run([program] + (["--check"] if check else []),
                                  stdout=subprocess.PIPE, encoding="utf-8")
        except OSError as error:
            sys.exit(f"run.py: {rung} cannot be run: {error.strerror}")
        print(done.stdout, end="", flush=True)
        if done.returncode == SKIPPED:
            sys.exit(SKIPPED)
        if done.returncode != 0:
            sys.exit(f"run.py: {rung} failed with code {done.returncode}")
        results += parse(done.stdout)[-1:]
    return results


def parse(text):
    """The JSON objects in the output of rungs."""
    return [json.loads(line) for line in text.splitlines() if line.startswith('{"rung"')]


def verify(results):
    """Complains unless there are whole figures of every rung once, from one kind of GPU."""
    names = [r["rung"] for r in results]
    if names != rungs():
        sys.exit(f"run.py: the rungs are {', '.join(rungs())}; there are figures of "
                 f"{', '.join(names) or 'none'}")
    for r in results:
        bad = [f for f in FIGURES if not isinstance(r.get(f), float) or not 0 < r[f] < 1e9]
        if bad:
            sys.exit(f"run.py: {r['rung']}: not a figure: {', '.join(bad)}")
    if len({r["gpu"] for r in results}) != 1:
        sys.exit("run.py: the figures are of several kinds of GPU")


def title(rung):
    """What the first line of a rung's file calls it."""
    with open(os.path.join(HERE, rung + ".cu"), encoding="utf-8") as file:
        return file.readline().split(": ", 1)[1].strip()


def table(results):
    lines = []
    for kind in ("gemm", "attention"):
        part = [r for r in results if r["rung"].startswith(kind)]
        peaks = sorted(r["peak_tflops"] for r in part)
        lines += [f"{part[0]['gpu']}, {part[0]['shape']}; mma.sync in these runs: "
                  f"{peaks[0]:.1f} to {peaks[-1]:.1f} TFLOP/s", "",
                  "| rung | | ms, least to greatest | TFLOP/s | of mma.sync | x the one before |",
                  "|---|---|---|---|---|---|"]
        for before, r in zip([None] + part, part):
            gain = f"{before['ms'] / r['ms']:.2f}" if before else ""
            lines.append(f"| [{r['rung']}]({r['rung']}.cu) | {title(r['rung'])} | {r['ms']:.3f}, "
                         f"{r['min_ms']:.3f} to {r['max_ms']:.3f} | {r['tflops']:.2f} | "
                         f"{r['share']:.3f} | {gain} |")
        lines.append("")
    return "\n".join(lines[:-1])


def measured(r):
    return (f"//   measured  {r['ms']:.3f} ms, {r['tflops']:.2f} TFLOP/s, {r['share']:.3f} of "
            f"mma.sync ({r['gpu']})")


def replace(path, pattern, text):
    with open(path, encoding="utf-8") as file:
        source = file.read()
    changed, n = re.subn(pattern, lambda _: text, source, flags=re.MULTILINE | re.DOTALL)
    if n != 1:
        sys.exit(f"run.py: {path} has {n} places for its figures, there should be one")
    with open(path, "w", encoding="utf-8") as file:
        file.write(changed)


def write(results):
    replace(README, f"^{BEGIN}$.*?^{END}$", f"{BEGIN}\n{table(results)}\n{END}")
    for r in results:
        replace(os.path.join(HERE, r["rung"] + ".cu"), r"^//   measured  [^\n]*$", measured(r))


def main():
    parser = argparse.ArgumentParser(description="Builds and runs every rung of the ladder.")
    parser.add_argument("--bin", metavar="FOLDER", help="where the rungs are built already")
    parser.add_argument("--check", action="store_true", help="only check, at a small size")
    parser.add_argument("--write", action="store_true", help="write README.md and the rungs' files")
    parser.add_argument("--from", metavar="LOG", dest="log", help="the saved output of a run")
    args = parser.parse_args()
    if args.check and (args.write or args.log):
        parser.error("--check makes no figures")
    if args.log:
        with open(args.log, encoding="utf-8") as file:
            results = parse(file.read())
    elif args.bin:
        results = climb(args.bin, None, args.check)
    else:
        with tempfile.TemporaryDirectory() as folder:
            results = climb(folder, find_nvcc(), args.check)
    if args.check:
        print(f"{len(results)} rungs are right")
        return
    verify(results)
    print("\n" + table(results))
    if args.write:
        write(results)


if __name__ == "__main__":
    main()
