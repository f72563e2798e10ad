#!/bin/sh
# Programs of other people that use nanogpt.hpp, built the way they would build them.
#
#   CXX=g++ CMAKE=cmake tests/consumers/run.sh <work folder> <build folder of nanogpt>
set -eu

here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
cxx=${CXX:-c++}
cmake=${CMAKE:-cmake}
[ $# -eq 2 ] || { echo "usage: run.sh <work folder> <build folder of nanogpt>"; exit 2; }
rm -rf "$1"
mkdir -p "$1"
work=$(cd "$1" && pwd)
build=$(cd "$2" && pwd)
model=$root/tools/sample/chatsft_checkpoints/d4
tokenizer=$root/tools/sample/tokenizer/tokenizer.pkl
warnings="-Wall -Wextra -Wpedantic -Wshadow -Wconversion -Wsign-conversion -Wold-style-cast
          -Wnon-virtual-dtor -Woverloaded-virtual -Werror"
export CXX="$cxx"
unset MAKEFLAGS MAKELEVEL DESTDIR NANOCHAT_BASE_DIR

fail() { echo "FAILED  $*"; exit 1; }
ok() { echo "ok      $*"; }

# Runs a command; its output is shown only when it fails.
quietly() { "$@" > "$work/log" 2>&1 || { cat "$work/log"; fail "$*"; }; }

# 1. The header copied beside one file, one line, no build system.
mkdir "$work/plain"
cd "$work/plain"
cp "$root/nanogpt.hpp" "$here"/*.cpp .
quietly "$cxx" -std=c++20 -O3 main.cpp
ok "one line: c++ -std=c++20 -O3 main.cpp"
# shellcheck disable=SC2086
quietly "$cxx" -std=c++20 $warnings -fsyntax-only main.cpp
ok "the same without a warning"
if [ -d "$model" ] && [ -f "$tokenizer" ]; then
    ./a.out "$model" "$tokenizer" > answer || fail "the program on the sample model: exit code $?"
    [ -s answer ] || fail "the program on the sample model printed nothing"
    ok "it answers: $(head -c 60 answer | tr '\n' ' ')"
else
    ok "not run: no sample model in tools/sample"
fi

# 2. Alone, twice, in two files, as Debug users would compile it.
quietly "$cxx" -std=c++20 -Wall -Wextra -Werror alone.cpp -o alone
ok "included alone"
quietly "$cxx" -std=c++20 -O0 -g -Wall -Wextra -Werror twice.cpp other.cpp -o twice
./twice || fail "two files of one program disagree"
ok "included twice, and by two files"

# 3. add_subdirectory.
quietly "$cmake" -S "$here/subdirectory" -B "$work/subdirectory" -DNANOGPT_ROOT="$root"
quietly "$cmake" --build "$work/subdirectory"
"$work/subdirectory/consumer" || fail "the program made with add_subdirectory"
ok "add_subdirectory"

# 4. install, then find_package: the same version, and not a later one.
quietly "$cmake" --install "$build" --prefix "$work/prefix"
version=$(sed -n 's/^#define NANOGPT_VERSION \([0-9]*\).*/\1/p' "$root/nanogpt.hpp")
version=$((version / 10000)).$((version / 100 % 100)).$((version % 100))
quietly "$cmake" -S "$here/package" -B "$work/package" -DCMAKE_PREFIX_PATH="$work/prefix" \
    -DNANOGPT_WANTED="$version"
quietly "$cmake" --build "$work/package"
"$work/package/consumer" || fail "the program made with find_package"
if "$cmake" -S "$here/package" -B "$work/later" -DCMAKE_PREFIX_PATH="$work/prefix" \
    -DNANOGPT_WANTED=99.0 > "$work/log" 2>&1; then
    fail "find_package(nanogpt 99.0) was satisfied by $version"
fi
ok "install and find_package(nanogpt $version)"
[ -f "$work/prefix/share/doc/nanogpt/LICENSE" ] || fail "no LICENSE installed"
if [ -x "$build/nanogpt" ]; then
    [ -x "$work/prefix/bin/nanogpt" ] || fail "no program installed"
    quietly "$work/prefix/bin/nanogpt" --version
    [ ! -d "$model" ] || cmp -s "$tokenizer" "$work/prefix/share/nanogpt/sample/tokenizer/tokenizer.pkl" ||
        fail "no sample model installed"
    ok "the installed program starts"
fi

# 5. A student's file with the line that tools/EXERCISES.md gives.
mkdir "$work/student"
cd "$work/student"
ln -s "$root/nanogpt.hpp" "$root/tests" "$root/tools" "$root/README.md" .
cp tests/exercises/solutions.cpp mine.cpp
line=$(grep '^g++ .*mine\.cpp' tools/EXERCISES.md) || fail "tools/EXERCISES.md has no line with mine.cpp"
printf 'CXX=$1\n"$CXX" %s\n' "${line#g++ }" > line.sh
quietly sh line.sh "$cxx"
ok "the exercises: ${line%% mine.cpp*}..."
echo "consumers: all work"
