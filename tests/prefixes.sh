#!/bin/sh
# Every section of nanogpt.hpp uses only sections above it: the header cut at each banner, with its
# namespaces closed, compiles. So it can be read from the top and stopped anywhere.
#
#   CXX=g++ tests/prefixes.sh [work folder]
set -eu

root=$(cd "$(dirname "$0")/.." && pwd)
header=$root/nanogpt.hpp
cxx=${CXX:-c++}
work=${1:-}
if [ -z "$work" ]; then
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
fi
mkdir -p "$work"
rm -f "$work"/prefix_* "$work/failed"
command -v "$cxx" >/dev/null || { echo "prefixes: no compiler $cxx: skipped"; exit 77; }

# One file per cut: the lines above the next banner, then a } for each namespace and an #endif for
# each #if that is open there. Namespaces begin at column 0, and '}  // namespace ...' closes each.
awk -v work="$work" '
    function cut(name,    file, i) {
        file = work "/prefix_" name ".hpp"
        printf "%s", text > file
        for (i = 0; i < open; ++i) print "}" > file
        for (i = 0; i < conditions; ++i) print "#endif" > file
        close(file)
    }
    /^\/\/ ==== [0-9]+\. [a-z0-9_]+ =/ { if (last != "") cut(last); last = sprintf("%02d_%s", $3, $4) }
    /^(inline )?namespace [a-z0-9_:]+ \{/ { ++open }
    /^\}  *\/\/ (inline )?namespace/ { --open }
    /^ *# *if/ { ++conditions }
    /^ *# *endif/ { --conditions }
    { text = text $0 "\n" }
    END { if (last == "") exit 1; cut(last) }
' "$header" || { echo "prefixes: $header: no banner '// ==== N. slug ====' found"; exit 1; }

# Compiles one cut; its messages, if any, are left in a file and shown.
check() {
    name=$(basename "$1" .hpp)
    printf '#include "%s.hpp"\nint main() {}\n' "$name" > "$work/$name.cpp"
    if "$cxx" -std=c++20 -Wall -Wextra -fsyntax-only -I "$work" "$work/$name.cpp" \
        > "$work/$name.err" 2>&1 && ! [ -s "$work/$name.err" ]; then
        echo "ok      ${name#prefix_}"
    else
        echo "FAILED  ${name#prefix_}: the header up to the end of this section does not compile alone"
        sed -n 1,12p "$work/$name.err"
        : > "$work/failed"
    fi
}

count=0
for file in "$work"/prefix_*.hpp; do
    check "$file" &
    count=$((count + 1))
    [ $((count % 2)) -ne 0 ] || wait
done
wait
if [ -e "$work/failed" ]; then
    echo "prefixes: FAILED"
    exit 1
fi
echo "prefixes: all $count compile"
