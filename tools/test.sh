#!/usr/bin/env bash
# Builds everything and runs all tests; the last line is "N passed, N failed".
#
#   ./tools/test.sh [options of ctest, such as -R pickle]
#
# Installs a compiler, CMake and doctest if they are missing.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

build=$root/build
lock_tree
require doctest
say "building the program and the tests (some minutes the first time)"
quietly "cmake" configure "$build" -DNANOGPT_BUILD_DEMO=ON -DNANOGPT_BUILD_TESTS=ON
cmake --build "$build" -j "$jobs" >&2
unlock_tree
run_tests "$build" "$@"
