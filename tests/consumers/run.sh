#!/bin/sh
# Programs of other people that use nanogpt.hpp, built the way they would build them: the README's
# example, as it stands there, by every way the README names and every compiler that is here. The other
# compiler reads the program too.
#
#   CXX=g++ CMAKE=cmake CUDACXX=nvcc tests/consumers/run.sh <work folder> <build folder of nanogpt>
#
# CUDACXX set to nothing leaves nvcc out. Each program answers one question with the sample model; at
# temperature 0 all have to give the same answer.
set -eu

here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
cxx=${CXX:-c++}
cmake=${CMAKE:-cmake}
nvcc=${CUDACXX-$(command -v nvcc || echo /usr/local/cuda/bin/nvcc)}
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
skip() { echo "skipped $*"; }

# Runs a command; its output is shown only when it fails.
quietly() { "$@" > "$work/log" 2>&1 || { cat "$work/log"; fail "$*"; }; }

# same <command...>: the program gives the answer that the first one gave.
same() {
    "$@" "$model" "$tokenizer" > "$work/other" || fail "$* on the sample model: exit code $?"
    cmp -s "$work/answer" "$work/other" || fail "$* answers otherwise: $(head -c 200 "$work/other")"
}

# 1. The README's example, in a folder with the header: one line, no build system.
mkdir "$work/plain"
cd "$work/plain"
cp "$root/nanogpt.hpp" "$here"/*.cpp .
[ "$(grep -c '^```cpp$' "$root/README.md")" -eq 1 ] || fail "README.md has not one example"
awk '/^```$/ { on = 0 } on { print } /^```cpp$/ { on = 1 }' "$root/README.md" > main.cpp
line='g++ -std=c++20 -O3 main.cpp'
for file in README.md nanogpt.hpp; do
    grep -qF "$line" "$root/$file" || fail "$file does not say: $line"
done
quietly "$cxx" -std=c++20 -O3 main.cpp
ok "one line: $line"
./a.out "$model" "$tokenizer" > drawn || fail "the program on the sample model: exit code $?"
[ -s drawn ] || fail "the program on the sample model printed nothing"
ok "it answers: $(head -c 60 drawn | tr '\n' ' ')"
# shellcheck disable=SC2086
quietly "$cxx" -std=c++20 $warnings -fsyntax-only main.cpp
ok "the same without a warning"

# What is drawn may differ between compilers in the last bits; the likeliest token hardly does.
sed 's/temperature = 0.6f/temperature = 0.0f/' main.cpp > greedy.cpp
! cmp -s main.cpp greedy.cpp || fail "the example has no temperature = 0.6f"
quietly "$cxx" -std=c++20 -O1 greedy.cpp other.cpp -o greedy
./greedy "$model" "$tokenizer" > "$work/answer" || fail "two files: exit code $?"
[ -s "$work/answer" ] || fail "two files: no answer"
ok "two files of one program: $(head -c 60 "$work/answer" | tr '\n' ' ')"

# 2. Alone, and twice, as Debug users would compile it.
quietly "$cxx" -std=c++20 -Wall -Wextra -Werror alone.cpp -o alone
ok "included alone"
quietly "$cxx" -std=c++20 -O0 -g -Wall -Wextra -Werror twice.cpp other.cpp -o twice
./twice || fail "two files of one program disagree"
ok "included twice, and by two files"

# 3. The other compiler.
for other in g++ clang++; do
    if ! command -v $other > "$work/log"; then
        skip "$other: it is not here"
    elif [ "$(readlink -f "$(command -v $other)")" != "$(readlink -f "$(command -v "$cxx")")" ]; then
        # shellcheck disable=SC2086
        quietly $other -std=c++20 -O1 $warnings greedy.cpp other.cpp -o "greedy-$other"
        same "./greedy-$other"
        ok "$other: no warning, the same answer"
        # shellcheck disable=SC2086
        quietly $other -std=c++20 $warnings -fsyntax-only "$root/demo.cpp"
        ok "$other: the program without a warning"
    fi
done

# 4. add_subdirectory.
quietly "$cmake" -S "$here/subdirectory" -B "$work/subdirectory" -DNANOGPT_ROOT="$root" \
    -DEXAMPLE="$work/plain/greedy.cpp"
quietly "$cmake" --build "$work/subdirectory"
same "$work/subdirectory/consumer"
ok "add_subdirectory"

# 5. install, then find_package: the same version, and not a later one.
quietly "$cmake" --install "$build" --prefix "$work/prefix"
version=$(sed -n 's/^#define NANOGPT_VERSION \([0-9]*\).*/\1/p' "$root/nanogpt.hpp")
version=$((version / 10000)).$((version / 100 % 100)).$((version % 100))
quietly "$cmake" -S "$here/package" -B "$work/package" -DCMAKE_PREFIX_PATH="$work/prefix" \
    -DNANOGPT_WANTED="$version" -DEXAMPLE="$work/plain/greedy.cpp"
quietly "$cmake" --build "$work/package"
same "$work/package/consumer"
if "$cmake" -S "$here/package" -B "$work/later" -DCMAKE_PREFIX_PATH="$work/prefix" \
    -DNANOGPT_WANTED=99.0 > "$work/log" 2>&1; then
    fail "find_package(nanogpt 99.0) was satisfied by $version"
fi
ok "install and find_package(nanogpt $version)"
[ -f "$work/prefix/share/doc/nanogpt/LICENSE" ] || fail "no LICENSE installed"
if [ -x "$build/nanogpt" ]; then
    [ -x "$work/prefix/bin/nanogpt" ] || fail "no program installed"
    quietly "$work/prefix/bin/nanogpt" --version
    cmp -s "$tokenizer" "$work/prefix/share/nanogpt/sample/tokenizer/tokenizer.pkl" ||
        fail "no sample model installed"
    ok "the installed program starts"
fi

# 6. The GPU: one file for nvcc, all else by the C++ compiler. PTX alone, so that nvcc is soon done.
if [ -n "$nvcc" ] && [ -x "$(command -v "$nvcc")" ]; then
    mkdir "$work/gpu"
    cd "$work/gpu"
    cp "$root/nanogpt.hpp" "$root/kernels.cuh" "$here/open_gpu.cu" .
    sed -e 's/nanogpt::open_cpu(/open_gpu(/' -e '/^#include "nanogpt.hpp"/a\
std::unique_ptr<nanogpt::Backend> open_gpu(std::shared_ptr<const nanogpt::Model> model);' \
        ../plain/greedy.cpp > main.cpp
    [ "$(grep -c open_gpu main.cpp)" -eq 2 ] || fail "the example has no open_cpu"
    [ "$(grep -vc '^//' open_gpu.cu)" -le 4 ] || fail "open_gpu.cu is no longer short"
    quietly "$cxx" -std=c++20 -O1 -c main.cpp
    quietly "$nvcc" -std=c++20 -O1 -ccbin "$cxx" -arch=compute_80 -code=compute_80 -c open_gpu.cu
    quietly "$nvcc" -ccbin "$cxx" main.o open_gpu.o -o gpu
    # ... and a .cu file that has the example itself.
    cp ../plain/greedy.cpp example.cu
    quietly "$nvcc" -std=c++20 -O1 -ccbin "$cxx" -arch=compute_80 -code=compute_80 example.cu -o example
    same ./example
    ok "nvcc: the example as a .cu file"
    if ./gpu "$model" "$tokenizer" > answer 2> error; then
        [ -s answer ] || fail "the program with open_cuda printed nothing"
        ok "nvcc: kernels.cuh in three lines; the GPU answers: $(head -c 60 answer | tr '\n' ' ')"
    else  # the example catches nothing: what it ends with is the Error's own text
        grep -q 'nanogpt::.*Error.*' error || { cat error; fail "open_cuda ended without an Error"; }
        grep -q 'Use .*open_cpu' error || { cat error; fail "the Error does not say what to do"; }
        ok "nvcc: kernels.cuh in three lines; no GPU here: $(sed -n 's/.*what(): *//p' error)"
    fi
else
    skip "nvcc: it is not here"
fi

# 7. Another processor: the same answer, in the emulator.
if command -v aarch64-linux-gnu-g++ > "$work/log" && command -v qemu-aarch64 > "$work/log"; then
    cd "$work/plain"
    quietly aarch64-linux-gnu-g++ -std=c++20 -O2 greedy.cpp -o greedy-aarch64
    same qemu-aarch64 -L /usr/aarch64-linux-gnu ./greedy-aarch64
    ok "aarch64: the same answer in qemu"
else
    skip "aarch64: no aarch64-linux-gnu-g++ or no qemu-aarch64 is here"
fi

# 8. The release: what is in it is enough, and the same commit gives the same bytes.
if ! git -C "$root" diff --quiet HEAD -- nanogpt.hpp kernels.cuh LICENSE 2> "$work/log"; then
    skip "the release: this is no clean git checkout"
else
    mkdir "$work/one" "$work/two"
    quietly "$root/tools/release.sh" "$work/one"
    sleep 1.1  # a time that found its way into it differs now
    (umask 077 && cd "$work/two" && TZ=Asia/Tokyo quietly "$root/tools/release.sh")
    cmp "$work/one/nanogpt-$version.tar.gz" "$work/two/nanogpt-$version.tar.gz" ||
        fail "two releases of one commit differ"
    cd "$work/one"
    tar xzf "nanogpt-$version.tar.gz"
    cd "nanogpt-$version"
    [ "$(echo *)" = "LICENSE kernels.cuh nanogpt.hpp" ] || fail "the release holds: $(echo *)"
    # The program is what the manual of the header shows; there is nothing else to go by.
    {
        echo '#include <cstdio>'
        sed -n '/^\/\/     #include "nanogpt.hpp"/s/^\/\/ *//p' nanogpt.hpp
        echo 'int main() {'
        sed -n '/^\/\/     auto tokenizer/,/^\/\/     });/s/^\/\/     //p' nanogpt.hpp
        echo '}'
    } | sed 's/temperature = 0.6f/temperature = 0.0f/' > main.cpp
    quietly "$cxx" -std=c++20 -O3 main.cpp
    ln -s "$root/tools/sample/tokenizer" tokenizer
    mkdir chatsft_checkpoints
    ln -s "$model" chatsft_checkpoints/d12
    same ./a.out
    ok "nanogpt-$version.tar.gz: the same bytes twice; its manual's program gives the same answer"
fi

# 9. A student's file with the line that tools/EXERCISES.md gives.
mkdir "$work/student"
cd "$work/student"
ln -s "$root/nanogpt.hpp" "$root/tests" "$root/tools" "$root/README.md" .
cp tests/exercises/solutions.cpp mine.cpp
line=$(grep '^g++ .*mine\.cpp' tools/EXERCISES.md) || fail "tools/EXERCISES.md has no line with mine.cpp"
printf 'CXX=$1\n"$CXX" %s\n' "${line#g++ }" > line.sh
quietly sh line.sh "$cxx"
ok "the exercises: ${line%% mine.cpp*}..."
echo "consumers: all work"
