#!/usr/bin/env python3
"""Writes the tables of letters, numbers and spaces in section 10 of nanogpt.hpp.

The tables follow Unicode 16.0.0, the version of the regular expression engine that nanochat's
tokenizer runs on, whatever version the installed data has:

  newer data   what was assigned after 16.0 is left out (DerivedAge.txt tells)
  older data   what 16.0 has more is in the list ADDED below (complete from 15.0 on)

    tools/unicode_tables.py            rewrite the table between the two marker lines
    tools/unicode_tables.py --check    compare only; exit status 1 if they differ

Data: Debian's package unicode-data, in /usr/share/unicode (another folder: --data).
"""
import argparse
import pathlib
import sys
import textwrap

VERSION = (16, 0)

# Letters (L) and numbers (N) that Unicode 16.0.0 has and 15.0.0 has not: first, last, class.
# 2EBF0 to 2EE5D came with 15.1, all others with 16.0. Between 15.0 and 16.0 no code point that was
# assigned before changed from or to letter, number or space.
ADDED = [
    (0x1C89, 0x1C8A, "L"),  # Cyrillic tje
    (0xA7CB, 0xA7CD, "L"),  # Latin rams horn, s with diagonal stroke
    (0xA7DA, 0xA7DC, "L"),  # Latin lambda, lambda with stroke
    (0x105C0, 0x105F3, "L"),  # Todhri
    (0x10D40, 0x10D49, "N"),  # Garay digits
    (0x10D4A, 0x10D65, "L"),  # Garay letters
    (0x10D6F, 0x10D85, "L"),  # Garay letters
    (0x10EC2, 0x10EC4, "L"),  # Arabic dal, tah, kaf with two dots vertically below
    (0x11380, 0x11389, "L"),  # Tulu-Tigalari
    (0x1138B, 0x1138B, "L"),
    (0x1138E, 0x1138E, "L"),
    (0x11390, 0x113B5, "L"),
    (0x113B7, 0x113B7, "L"),
    (0x113D1, 0x113D1, "L"),
    (0x113D3, 0x113D3, "L"),
    (0x116D0, 0x116E3, "N"),  # Myanmar Pa'o and Eastern Pwo Karen digits
    (0x11BC0, 0x11BE0, "L"),  # Sunuwar letters
    (0x11BF0, 0x11BF9, "N"),  # Sunuwar digits
    (0x13460, 0x143FA, "L"),  # Egyptian hieroglyphs, extended A
    (0x16100, 0x1611D, "L"),  # Gurung Khema letters
    (0x16130, 0x16139, "N"),  # Gurung Khema digits
    (0x16D40, 0x16D6C, "L"),  # Kirat Rai letters
    (0x16D70, 0x16D79, "N"),  # Kirat Rai digits
    (0x18CFF, 0x18CFF, "L"),  # Khitan small script
    (0x1CCF0, 0x1CCF9, "N"),  # outlined digits
    (0x1E5D0, 0x1E5ED, "L"),  # Ol Onal letters
    (0x1E5F0, 0x1E5F0, "L"),  # Ol Onal hoddond
    (0x1E5F1, 0x1E5FA, "N"),  # Ol Onal digits
    (0x2EBF0, 0x2EE5D, "L"),  # CJK extension I
]

# How many of each Unicode 16.0.0 has: a check on data and list together.
COUNTS = {"L": 141028, "N": 1911, "S": 25}

BEGIN = "// ---- begin of what tools/unicode_tables.py wrote"
END = "// ---- end of what tools/unicode_tables.py wrote"


def read_classes(data):
    """UnicodeData.txt: code point; name; general category; ... Big blocks: first and last only."""
    classes = {}
    first = None
    for line in (data / "UnicodeData.txt").read_text(encoding="utf-8").splitlines():
        code, name, category = line.split(";")[:3]
        if name.endswith(", First>"):
            first = int(code, 16)
            continue
        start = first if name.endswith(", Last>") else int(code, 16)
        for c in range(start, int(code, 16) + 1):
            classes[c] = category[0]
    return classes


def read_ranges(path):
    """Yields (first, last, value) of a file with lines `0009..000D ; value # comment`."""
    for line in path.read_text(encoding="utf-8").splitlines():
        fields = line.split("#")[0].split(";")
        if len(fields) >= 2:
            first, _, last = fields[0].strip().partition("..")
            yield int(first, 16), int(last or first, 16), fields[1].strip()


def sets_of_unicode_16(data):
    """Returns {"L": letters, "N": numbers, "S": spaces}, each a set of code points."""
    classes = read_classes(data)
    for first, last, age in read_ranges(data / "DerivedAge.txt"):
        if tuple(int(part) for part in age.split(".")) > VERSION:
            for c in range(first, last + 1):
                classes.pop(c, None)
    for first, last, new in ADDED:
        for c in range(first, last + 1):
            if classes.setdefault(c, new) != new:
                sys.exit(f"unicode_tables.py: U+{c:04X} is {classes[c]}, {new} in ADDED")
    sets = {k: {c for c, have in classes.items() if have == k} for k in "LN"}
    sets["S"] = {c for first, last, name in read_ranges(data / "PropList.txt")
                 if name == "White_Space" for c in range(first, last + 1)}
    for kind, wanted in COUNTS.items():
        if len(sets[kind]) != wanted:
            sys.exit(f"unicode_tables.py: {len(sets[kind])} code points of class {kind}, "
                     f"Unicode 16.0.0 has {wanted}; is the data older than 15.0?")
    return sets


def runs_of(code_points):
    """{65, 66, 67, 70} -> [65, 3, 2, 1]: gap, run, gap, run, ..."""
    runs = []
    position = 0  # end of the last run
    for c in sorted(code_points):
        if runs and c == position:
            runs[-1] += 1
        else:
            runs += [c - position, 1]
        position = c + 1
    return runs


def table(data):
    lines = [f"{BEGIN} from Unicode 16.0.0"]
    sets = sets_of_unicode_16(data)
    for name, kind in [("kLetterRuns", "L"), ("kNumberRuns", "N"), ("kSpaceRuns", "S")]:
        runs = runs_of(sets[kind])
        assert max(runs) < 65536
        lines.append(f"inline constexpr std::uint16_t {name}[] = {{")
        lines += textwrap.wrap(", ".join(map(str, runs)), 100, initial_indent="    ",
                               subsequent_indent="    ")
        lines.append("};")
    lines.append(END)
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare only")
    parser.add_argument("--data", type=pathlib.Path, default=pathlib.Path("/usr/share/unicode"))
    parser.add_argument("--header", type=pathlib.Path,
                        default=pathlib.Path(__file__).resolve().parent.parent / "nanogpt.hpp")
    options = parser.parse_args()
    if not (options.data / "UnicodeData.txt").exists():
        sys.exit(f"unicode_tables.py: {options.data}/UnicodeData.txt is not there; "
                 "apt-get install unicode-data")

    text = options.header.read_text(encoding="utf-8")
    begin, end = text.find(BEGIN), text.find(END)
    if begin < 0 or end < begin:
        sys.exit(f"unicode_tables.py: {options.header} has no marker lines '{BEGIN}', '{END}'")
    new = text[:begin] + table(options.data) + text[end + len(END):]
    if options.check:
        if new != text:
            sys.exit(f"unicode_tables.py: the tables in {options.header} are not those of the data")
        print("unicode_tables.py: the tables are right")
    elif new != text:
        options.header.write_text(new, encoding="utf-8")


main()
