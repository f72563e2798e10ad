#!/usr/bin/env bash
# Chats with your newest nanochat model, or with the bundled sample if there is none:
#
#   ./tools/chat.sh [options of nanogpt chat]
#
# Installs a compiler and CMake if they are missing and builds the program if it is not up to date.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

build=$root/build
program=$build/nanogpt

# Nothing the program is made of is newer than it.
up_to_date() {
    [ -x "$program" ] && [ -f "$build/CMakeCache.txt" ] &&
        grep -qsxF "CMAKE_HOME_DIRECTORY:INTERNAL=$root" "$build/CMakeCache.txt" &&
        [ -z "$(find "$root" -maxdepth 1 -type f \( -name '*.hpp' -o -name '*.cuh' -o -name '*.cpp' \
            -o -name CMakeLists.txt \) -newer "$program" -print)" ]
}

if ! up_to_date; then
    lock_tree
    require
    if ! [ -x "$program" ]; then
        say "building (one to three minutes; only this once)"
    else
        say "building what has changed"
    fi
    quietly "cmake" configure "$build" -DNANOGPT_BUILD_DEMO=ON
    quietly "the build" cmake --build "$build" --target nanogpt -j "$jobs"
    # A comment changed in a build file makes no new program, and would be looked at every time.
    touch -c "$program"
    unlock_tree
fi
exec "$program" chat "$@"
