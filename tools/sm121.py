#!/usr/bin/env python3
"""What every kernel of kernels.cuh will be on a GB10 (sm_121), found out without one.

    python3 tools/sm121.py                  a table; exit code 1 if a kernel has a problem
    python3 tools/sm121.py --markdown       the tables of SPEED.md
    python3 tools/sm121.py --arch 90        the same for an H200

Compiles kernels.cuh for that GPU, reads from the compiler's report, its PTX and the disassembled
machine code what each kernel needs, and works out how many blocks share an SM. A small program that
needs no GPU prints kernel_table() (of each kernel its name, function, threads, dynamic shared
memory and the instructions it has to be made of) and the tiles that gemm_tile_name() picks for the
products of nanochat's models.

A problem is: registers spilled or local memory used, an instruction of the table missing, threads
or memory that the GPU does not have, a kernel that the table has not, or the reverse.
Exit code 77, with a message, if nvcc or nvdisasm is not there. nvdisasm is looked for beside nvcc,
in PATH, in $NANOGPT_CUDA_TOOLS (a folder) and in this Python's package nvidia-cuda-nvdisasm.
Standard library only.
"""
import argparse
import glob
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, field

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SKIPPED = 77


@dataclass
class Gpu:
    name: str
    sms: int
    shared_per_block: int  # bytes, with cudaFuncSetAttribute
    shared_per_sm: int     # bytes, of which every block there takes 1 KiB for the system
    threads_per_sm: int
    blocks_per_sm: int


# CUDA C++ Programming Guide, "Technical Specifications per Compute Capability".
GPUS = {"121": Gpu("GB10", 48, 101376, 102400, 1536, 24),
        "90": Gpu("H200", 132, 232448, 233472, 2048, 32)}
REGISTERS_PER_SM = 65536

# Bits of KernelInfo::wants. The last one is no instruction: a kernel that has it is for GPUs with
# more shared memory, and not fitting here is no fault.
WANTS = {1: ("HMMA", "hmma"), 2: ("LDSM", "ldsm"), 4: ("LDGSTS or UBLKCP", "copy"),
         8: ("LDG.E.128", "ldg")}
WANTS_MORE_SHARED = 16

DEPTHS = (12, 20, 26, 32)
ROWS = (64, 256, 512, 1024, 2048)


@dataclass
class Kernel:
    name: str
    symbol: str
    registers: int = 0
    spill: int = 0          # bytes stored and loaded
    stack: int = 0          # bytes a thread
    static_shared: int = 0  # bytes a block
    max_threads: int = 0    # of __launch_bounds__; 0: none given
    threads: int = 0
    dynamic_shared: int = 0
    wants: int = 0
    in_table: bool = False
    hmma: int = 0           # instructions in the code, not executed ones
    ldsm: int = 0
    copy: int = 0
    ldg: int = 0            # of 16 bytes or more
    stg: int = 0
    local: int = 0          # loads and stores of local memory
    blocks: int = 0         # on one SM
    limit: str = ""         # what allows no more
    problems: list = field(default_factory=list)


def skip(text):
    print(f"sm121: skipped: {text}")
    sys.exit(SKIPPED)


def find_tool(name, given, beside):
    """Path of a program of the toolkit, or None."""
    folders = [os.path.dirname(os.path.realpath(beside))] if beside else []
    path = given or os.environ.get("NANOGPT_CUDA_TOOLS", "")
    if given and not os.path.isdir(given):
        return shutil.which(given)
    folders += [path] if path else []
    found = [shutil.which(name, path=folder) for folder in folders] + [shutil.which(name)]
    for folder in sys.path + ["/usr/local/cuda/bin"]:
        found += [shutil.which(name, path=bin_folder)
                  for bin_folder in [folder] + glob.glob(os.path.join(folder, "nvidia/*/bin"))]
    return next((f for f in found if f), None)


def run(command, folder=None):
    result = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            encoding="utf-8", errors="replace")
    if result.returncode != 0:
        sys.stderr.write(result.stdout)
        sys.exit(f"sm121: {os.path.basename(command[0])} failed with code {result.returncode}")
    return result.stdout


# ---- compile ------------------------------------------------------------------------------------

def program(source):
    """A program without which no kernel would be compiled, and which prints what only C++ knows."""
    with open(source, encoding="utf-8") as file:
        has_tiles = re.search(r"\bgemm_tile_name\s*\(", file.read())
    tiles = r"""
    for (const int depth : {%s}) {
        const long long D = 64ll * depth;
        const Product products[] = {
            {"qkv", 3 * D, D, false}, {"out", D, D, true}, {"fc", 4 * D, D, false},
            {"proj", D, 4 * D, true}};
        for (const Product& p : products) {
            for (const int M : {%s}) {
                std::printf("tile\t%%d\t%%s\t%%d\t%%lld\t%%lld\t%%s\n", depth, p.name, M, p.N, p.K,
                            nanogpt::cuda::gemm_tile_name(sms, shared_bytes, M, p.N, p.K, p.adds));
            }
        }
    }""" % (", ".join(map(str, DEPTHS)), ", ".join(map(str, ROWS)))
    return r"""#include <cstdio>
#include <cstdlib>
#include <string>
#include "%s"
struct Product { const char* name; long long N, K; bool adds; };
extern "C" void anchor() {}  // other functions' addresses are told relative to it
template <class Info>
void print(const Info& k) {
    const char* at = nullptr;
    if constexpr (requires { k.function; }) at = reinterpret_cast<const char*>(k.function);
    std::printf("kernel\t%%s\t%%d\t%%d\t%%d\t%%td\n", std::string(k.name).c_str(), int(k.threads),
                int(k.shared_bytes), int(k.wants),
                at ? at - reinterpret_cast<const char*>(&anchor) : 0);
}
int main(int, char** arguments) {
    auto* volatile keep = &nanogpt::open_cuda;  // everything the backend uses
    (void)keep;
    for (const auto& k : nanogpt::cuda::kernel_table()) print(k);
    const int sms = std::atoi(arguments[1]), shared_bytes = std::atoi(arguments[2]);
    (void)sms, (void)shared_bytes;%s
}
""" % (os.path.abspath(source), tiles if has_tiles else "")


def compiled(nvcc, source, arch, folder):
    """nvcc's report; leaves the program, its PTX and its machine code in the folder."""
    with open(os.path.join(folder, "all.cu"), "w", encoding="utf-8") as file:
        file.write(program(source))
    return run([nvcc, "-std=c++20", "-I", ROOT, "-gencode", f"arch=compute_{arch},code=sm_{arch}",
                "-L", os.path.join(os.path.dirname(os.path.dirname(os.path.realpath(nvcc))), "lib"),
                "-Xptxas", "-v", "--keep", "-o", "all", "all.cu"], folder)


# ---- read ---------------------------------------------------------------------------------------

def demangled(symbols):
    """Names as C++ has them; without c++filt (it comes with g++) the symbols themselves."""
    tool = shutil.which("c++filt") or shutil.which("cu++filt")
    if not tool or not symbols:
        return dict(zip(symbols, symbols))
    out = subprocess.run([tool], input="\n".join(symbols), stdout=subprocess.PIPE, check=True,
                         encoding="utf-8").stdout
    return dict(zip(symbols, out.splitlines()))


def plain(name):
    """Without namespaces, return type, parameters and all that two demanglers write differently."""
    name = re.sub(r"^(static |void )+", "", name.strip()).replace("(anonymous namespace)::", "")
    depth = 0
    for i, c in enumerate(name):
        depth += (c == "<") - (c == ">")
        if c == "(" and depth == 0:
            name = name[:i]
            break
    name = re.sub(r"\b(nanogpt|v0|cuda)::", "", name)
    name = re.sub(r"\((?:unsigned |long |short )*(?:int|long)\)(?=-?\d)", "", name)
    name = name.replace("(bool)1", "true").replace("(bool)0", "false")
    name = re.sub(r"\b(\d+)[uUlL]+\b", r"\1", name)
    return re.sub(r",\s*", ", ", re.sub(r"\s+(?=[>,])|(?<=<)\s+", "", name))


def key(name):
    """A plain name for comparing: g++ leaves out the last members of a struct that are 0."""
    return re.sub(r"(?:(?:, |(?<=\{))(?:false|0|\(\w+\)0))+(?=\})", "", name)


def read_report(report, kernels):
    """Registers and memory, from `ptxas -v`. Returns the warnings that name no kernel."""
    at = None
    for line in report.splitlines():
        entry = re.search(r"Compiling entry function '(\S+)'", line)
        if entry:
            at = kernels.setdefault(entry.group(1), Kernel("", entry.group(1)))
        elif at and "bytes stack frame" in line:  # of the kernel, and of functions it calls
            stack, stores, loads = map(int, re.findall(r"(\d+) bytes", line))
            at.stack = max(at.stack, stack)
            at.spill += stores + loads
        elif at and re.search(r"Used \d+ registers", line):
            at.registers = int(re.search(r"Used (\d+) registers", line).group(1))
            shared = re.search(r"(\d+) bytes smem", line)
            at.static_shared = int(shared.group(1)) if shared else 0
    warnings = re.findall(r"ptxas warning\s*: (.*)", report)
    words = {text: set(re.findall(r"[\w$]+", text)) for text in warnings}
    for k in kernels.values():
        k.problems += [f"ptxas: {text}" for text in warnings if k.symbol in words[text]]
    return [f"ptxas: {text}" for text in warnings if not kernels.keys() & words[text]]


def read_ptx(text, kernels):
    for symbol, head in re.findall(r"\.entry\s+([\w$]+)\s*\((.*?)\n\{", text, re.DOTALL):
        bounds = re.search(r"\.maxntid\s+(\d+)(?:\s*,\s*(\d+))?(?:\s*,\s*(\d+))?", head)
        if symbol in kernels and bounds:
            x, y, z = (int(n or 1) for n in bounds.groups())
            kernels[symbol].max_threads = x * y * z


def read_code(text, kernels):
    """Counts instructions in what nvdisasm prints."""
    at = None
    for line in text.splitlines():
        section = re.match(r"\s*\.section\s+(\S+?)[,\s]", line)
        if section:
            at = kernels.get(section.group(1).removeprefix(".text."))
            continue
        # /*0070*/  @!P0 LDG.E.NA.LTC128B.128.CONSTANT R4, desc[UR4][R4.64] ;
        code = re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", line)
        if not at or not code:
            continue
        word, *rest = code.group(1).split(".")
        wide = "128" in rest or "256" in rest
        at.hmma += word == "HMMA"
        at.ldsm += word == "LDSM"
        at.copy += word in ("LDGSTS", "UBLKCP", "UTMALDG")
        at.ldg += word == "LDG" and wide
        at.stg += word == "STG" and wide
        at.local += word in ("LDL", "STL")


def functions_of(program_path):
    """Plain name of the function at each address of the program, counted from anchor()."""
    if not shutil.which("nm"):
        return {}
    found = [line.split(None, 2) for line in run(["nm", "-C", program_path]).splitlines()]
    found = {words[2]: int(words[0], 16) for words in found if words[1:2] in (["t"], ["T"], ["W"])}
    return {address - found["anchor"]: key(plain(name)) for name, address in found.items()}


def read_table(lines, kernels, functions):
    """Gives each kernel its row of kernel_table(): a kernel and the function that launches it from
    the host have the same name. A row without function has the kernels whose name begins with its
    name and with no longer one of the table. Returns the rows that no kernel has."""
    by_name = {key(k.name): k for k in kernels.values()}
    rows, missing = [], []
    for _, name, threads, shared, wants, offset in (l.split("\t") for l in lines):
        row = (plain(name), int(threads), int(shared), int(wants))
        k = by_name.get(functions.get(int(offset))) if int(offset) else None
        if k:
            k.threads, k.dynamic_shared, k.wants, k.in_table = *row[1:], True
        elif int(offset) and functions:
            missing.append(row[0])
        else:
            rows.append(row)
    unused = {row[0] for row in rows}
    for k in kernels.values():
        fits = [row for row in rows if k.name.startswith(row[0])
                and not re.match(r"\w", k.name[len(row[0]):])]
        if fits and not k.in_table:
            name, k.threads, k.dynamic_shared, k.wants = max(fits, key=lambda row: len(row[0]))
            k.in_table = True
            unused.discard(name)
        k.threads = k.threads or k.max_threads
    return missing + sorted(unused)


# ---- judge --------------------------------------------------------------------------------------

def rounded_up(n, unit):
    return (n + unit - 1) // unit * unit


def count_blocks(k, gpu):
    """Blocks that share an SM, and what keeps it from being more."""
    warps = max(1, (k.threads + 31) // 32)
    # A warp gets registers in units of 256, out of one of four files.
    per_warp = max(256, rounded_up(k.registers * 32, 256))
    shared = rounded_up(k.static_shared + k.dynamic_shared + 1024, 128)
    limits = [(gpu.blocks_per_sm, "blocks"), (gpu.threads_per_sm // 32 // warps, "threads"),
              (gpu.shared_per_sm // shared, "shared"),
              (REGISTERS_PER_SM // 4 // per_warp * 4 // warps, "registers")]
    return min(limits, key=lambda limit: limit[0])


def judge(k, gpu):
    shared = k.static_shared + k.dynamic_shared
    k.blocks, k.limit = count_blocks(k, gpu)
    say = k.problems.append
    if not k.in_table:
        say("kernel_table() does not have it")
    if k.spill:
        say(f"{k.spill} bytes of spilled registers")
    if k.local or k.stack:
        say(f"local memory: {k.stack} bytes a thread, {k.local} loads and stores")
    for bit, (name, count) in WANTS.items():
        if k.wants & bit and not getattr(k, count):
            say(f"no {name}")
    if k.max_threads and k.threads > k.max_threads:
        say(f"{k.threads} threads, but __launch_bounds__ says {k.max_threads}")
    if shared > gpu.shared_per_block and not k.wants & WANTS_MORE_SHARED:
        say(f"{shared} bytes of shared memory, a block can have {gpu.shared_per_block}")
    elif shared <= gpu.shared_per_block and k.blocks == 0:
        say(f"cannot be launched: too many {k.limit}")


def read_tiles(lines, kernels, gpu):
    """Rows of the tile table with the number of waves: tiles over the tiles that run at once."""
    tiles = []
    for _, depth, product, M, N, K, name in (l.split("\t") for l in lines):
        size = re.search(r"(\d+)x(\d+)", name)
        row = {"depth": int(depth), "product": product, "M": int(M), "N": int(N), "K": int(K),
               "tile": name, "short": name, "waves": None}
        if size:
            bm, bn = map(int, size.groups())
            split = re.search(r"(?:split|/)\s*(\d+)", name)
            row["short"] = size.group() + (f"/{split.group(1)}" if split else "")
            count = -(-int(M) // bm) * -(-int(N) // bn) * (int(split.group(1)) if split else 1)
            same = [k.blocks for k in kernels if "gemm" in k.name
                    and re.search(rf"\b{bm}, {bn}\b|\b{bm}x{bn}\b", k.name)]
            row["waves"] = round(count / (gpu.sms * max(1, min(same, default=1))), 2)
        tiles.append(row)
    return tiles


# ---- print --------------------------------------------------------------------------------------

COLUMNS = (("threads", 8, lambda k: k.threads), ("regs", 5, lambda k: k.registers),
           ("spill", 6, lambda k: k.spill), ("stack", 6, lambda k: k.stack),
           ("static", 7, lambda k: k.static_shared), ("dynamic", 8, lambda k: k.dynamic_shared),
           ("blocks", 7, lambda k: k.blocks or "-"), ("HMMA", 6, lambda k: k.hmma),
           ("LDSM", 5, lambda k: k.ldsm), ("copy", 5, lambda k: k.copy),
           ("LDG", 4, lambda k: k.ldg), ("STG", 4, lambda k: k.stg))
NAME_WIDTH = 28


def limit_letter(k):
    letters = {"registers": "r", "shared": "s", "threads": "t"}
    return letters.get(k.limit, "") if k.blocks else ""


def print_text(gpu, arch, version, kernels, tiles):
    print(f"{gpu.name}, sm_{arch}: {len(kernels)} kernels, {version}")
    print("Bytes of spills, stack (a thread), static and dynamic shared memory (a block); blocks on"
          " an SM,\nlimited by (r)egisters, (s)hared memory or (t)hreads; number of instructions in"
          " the code: copy is\nLDGSTS or UBLKCP, LDG and STG are those of 16 bytes or more.\n")
    print(f"{'kernel':<{NAME_WIDTH}}" + "".join(f"{title:>{width}}" for title, width, _ in COLUMNS))
    for k in kernels:
        cells = "".join(f"{f'{get(k)}{limit_letter(k)}' if title == 'blocks' else get(k):>{width}}"
                        for title, width, get in COLUMNS)
        if len(k.name) >= NAME_WIDTH:
            print(k.name)
        print(f"{k.name if len(k.name) < NAME_WIDTH else '':<{NAME_WIDTH}}{cells}")
    if tiles:
        print(f"\nTile of each matrix product of M rows (/2: K in two parts) and waves of blocks "
              f"on {gpu.sms} SMs:\n" + ", ".join(sorted({t["tile"] for t in tiles})) + "\n")
        print(f"{'':<4}{'product':<8}{'N x K':<13}" + "".join(f"{f'M = {M}':>15}" for M in ROWS))
        for row in grouped(tiles):
            first = row[0]
            print(f"{'d%d' % first['depth']:<4}{first['product']:<8}"
                  f"{'%d x %d' % (first['N'], first['K']):<13}"
                  + "".join(f"{t['short']:>10}{waves(t):>5}" for t in row))
    print()


def print_markdown(gpu, arch, version, kernels, tiles):
    print(f"{gpu.name}, sm_{arch}, {version}; `tools/sm121.py --arch {arch} --markdown`\n")
    print("| kernel | " + " | ".join(title for title, _, _ in COLUMNS) + " |")
    print("|---" * (len(COLUMNS) + 1) + "|")
    for k in kernels:
        print(f"| `{k.name}` | " + " | ".join(str(get(k)) for _, _, get in COLUMNS) + " |")
    if tiles:
        print("\n| model | product | " + " | ".join(f"M = {M}" for M in ROWS) + " |")
        print("|---" * (len(ROWS) + 2) + "|")
        for row in grouped(tiles):
            print(f"| d{row[0]['depth']} | {row[0]['product']} | "
                  + " | ".join(f"{t['short']} ({waves(t)})" for t in row) + " |")
    print()


def waves(tile):
    return "" if tile["waves"] is None else f"{tile['waves']:.1f}"


def grouped(tiles):
    return [tiles[i:i + len(ROWS)] for i in range(0, len(tiles), len(ROWS))]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--arch", choices=GPUS, default="121")
    parser.add_argument("--json", action="store_true", help="all that was found, as one object")
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--nvcc", metavar="PATH")
    parser.add_argument("--nvdisasm", metavar="PATH", help="the program or its folder")
    parser.add_argument("--source", metavar="FILE", default=os.path.join(ROOT, "kernels.cuh"))
    given = parser.parse_args()
    gpu = GPUS[given.arch]
    nvcc = find_tool("nvcc", given.nvcc or os.environ.get("CUDACXX"), None)
    if not nvcc:
        skip("no nvcc in PATH, $CUDACXX or --nvcc")
    nvdisasm = find_tool("nvdisasm", given.nvdisasm, nvcc)
    if not nvdisasm:
        skip("no nvdisasm; the Python package nvidia-cuda-nvdisasm has it")

    kernels = {}
    with tempfile.TemporaryDirectory() as folder:
        problems = read_report(compiled(nvcc, given.source, given.arch, folder), kernels)
        for path in glob.glob(os.path.join(folder, "all*.ptx")):
            with open(path, encoding="utf-8") as file:
                read_ptx(file.read(), kernels)
        for path in glob.glob(os.path.join(folder, "all*.cubin")):
            if "dlink" not in path:
                read_code(run([nvdisasm, "-c", path]), kernels)
        lines = run([os.path.join(folder, "all"), str(gpu.sms),
                     str(gpu.shared_per_block)]).splitlines()
        functions = functions_of(os.path.join(folder, "all"))
    names = demangled(sorted(kernels))
    for k in kernels.values():
        k.name = plain(names[k.symbol])
    missing = read_table([l for l in lines if l.startswith("kernel\t")], kernels, functions)
    kernels = sorted(kernels.values(), key=lambda k: k.name)
    for k in kernels:
        judge(k, gpu)
    tiles = read_tiles([l for l in lines if l.startswith("tile\t")], kernels, gpu)
    version = "nvcc " + re.search(r"V([\d.]+)", run([nvcc, "--version"])).group(1)

    problems += [f"{k.name}: {text.replace(k.symbol, 'it')}"
                 for k in kernels for text in k.problems]
    problems += [f"{name}: in kernel_table(), but no such kernel was compiled" for name in missing]
    if not kernels:
        problems.append("no kernel was compiled")
    failed = sum(bool(k.problems) for k in kernels) + len(missing)
    if given.json:
        print(json.dumps({"gpu": asdict(gpu), "arch": given.arch, "compiler": version,
                          "kernels": [asdict(k) for k in kernels], "tiles": tiles,
                          "problems": problems}, indent=1))
    elif given.markdown:
        print_markdown(gpu, given.arch, version, kernels, tiles)
    else:
        print_text(gpu, given.arch, version, kernels, tiles)
    for text in problems:
        print(f"sm121: {text}", file=sys.stderr if given.json or given.markdown else sys.stdout)
    if not (given.json or given.markdown):
        print(f"{len(kernels) - sum(bool(k.problems) for k in kernels)} passed, {failed} failed")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
