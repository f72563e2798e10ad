# Sourced by chat.sh and test.sh: finds the source tree, installs what is missing with the system's
# package manager, builds, and counts test results. Everything it has to say goes to stderr.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
jobs=$(nproc 2>/dev/null || echo 2)

say() { printf 'nanogpt: %s\n' "$*" >&2; }
have() { command -v "$1" >/dev/null 2>&1; }

# Prints the name of a compiler that understands C++20: $CXX, or else the first of the usual names.
# With $CXX set no other is tried.
find_compiler() {
    local cxx program='#include <charconv>
        #include <span>
        #include <string>
        template <class T> concept Sized = requires(T t) { t.size(); };
        int f(Sized auto s) { return int(std::span<char>(s).size()); }
        int main() { double d; const char* s = "1"; std::from_chars(s, s + 1, d); return f(std::string(s)); }'
    for cxx in ${CXX:-c++ g++ clang++}; do
        if have "$cxx" && "$cxx" -std=c++20 -x c++ -fsyntax-only - <<<"$program" 2>/dev/null; then
            printf '%s\n' "$cxx"
            return
        fi
    done
    return 1
}

# require [doctest]: installs what is missing to build the program (and its tests).
require() {
    local missing=()
    find_compiler >/dev/null || missing+=(g++)
    have cmake || missing+=(cmake)
    have ninja || have make || missing+=(make)
    if [ "${1:-}" = doctest ] && ! has_header doctest/doctest.h; then missing+=(doctest-dev); fi
    # For pictures. Without it all else works, so for it alone nobody is asked for a password.
    if ! has_header stb_image_write.h && ! has_header stb/stb_image_write.h && have apt-get; then
        if [ ${#missing[@]} -gt 0 ]; then missing+=(libstb-dev)
        elif [ "$(id -u)" -eq 0 ]; then install_packages libstb-dev || say "walk draws no pictures"
        fi
    fi
    [ ${#missing[@]} -eq 0 ] || install_packages "${missing[@]}"
    CXX=$(find_compiler) || { say "no C++20 compiler works (g++ 12 or later is needed)"; return 1; }
    export CXX
}

# Where the compiler and CMake look, which is not only Debian's folder.
has_header() {
    find_compiler >/dev/null &&
        "$(find_compiler)" -x c++ -E - >/dev/null 2>&1 <<<"#include <$1>"
}

# Installs packages as root or with sudo; refreshes the package lists only when they are of no use.
install_packages() {
    local as_root=() log
    if ! have apt-get; then
        say "please install, by the names your system has for them: $*"
        return 1
    fi
    if [ "$(id -u)" -ne 0 ]; then
        if ! have sudo; then
            say "not root and no sudo: please have these packages installed: $*"
            return 1
        fi
        as_root=(sudo)
    fi
    say "installing $* (apt-get)"
    log=$(mktemp)
    local install=(${as_root[@]+"${as_root[@]}"} env DEBIAN_FRONTEND=noninteractive
                   apt-get -y --no-install-recommends install "$@")
    if ! "${install[@]}" >"$log" 2>&1 </dev/null; then
        say "refreshing the package lists"
        if ! { ${as_root[@]+"${as_root[@]}"} apt-get update && "${install[@]}"; } \
            >"$log" 2>&1 </dev/null; then
            tail -n 20 "$log" >&2
            rm -f "$log"
            say "apt-get could not install $*"
            return 1
        fi
    fi
    rm -f "$log"
}

# quietly <what> <command...>: the command's output is shown only when it fails.
quietly() {
    local what=$1 log
    shift
    log=$(mktemp)
    if ! "$@" >"$log" 2>&1 </dev/null; then
        cat "$log" >&2
        rm -f "$log"
        say "$what failed"
        return 1
    fi
    rm -f "$log"
}

# configure <build folder> [cmake options]: anew if the folder was made for another place or was
# left half made.
configure() {
    local build=$1 fresh=()
    shift
    if ! grep -qsxF "CMAKE_HOME_DIRECTORY:INTERNAL=$root" "$build/CMakeCache.txt" ||
        ! { [ -f "$build/build.ninja" ] || [ -f "$build/Makefile" ]; }; then
        rm -rf "$build/CMakeCache.txt" "$build/CMakeFiles"
        if have ninja; then fresh=(-G Ninja); else fresh=(-G "Unix Makefiles"); fi
    fi
    cmake -S "$root" -B "$build" ${fresh[@]+"${fresh[@]}"} "$@"
}

# Two commands started at once would otherwise build in one folder; the second waits.
lock_tree() {
    exec 9<"$root"
    ! have flock || flock 9
}
unlock_tree() { exec 9<&-; }

# run_tests <build folder> [ctest options]: runs them, prints the group lines that tests report and,
# last, "N passed, N failed": every doctest case counts, and every test that is no doctest program.
run_tests() {
    local build status=0 report
    build=$(cd "$1" && pwd)
    report=$build/tests.xml
    shift
    rm -f "$report"
    ctest --test-dir "$build" --output-on-failure --no-tests=error -j "$jobs" \
        --output-junit "$report" --test-output-size-passed 9999999 \
        --test-output-size-failed 9999999 "$@" || status=$?
    [ -f "$report" ] || { say "ctest left no results"; return 1; }
    awk '
        function number(text) { return match(text, /[0-9]+/) ? substr(text, RSTART, RLENGTH) + 0 : 0 }
        /<testcase / {
            cases = case_passed = case_failed = skips = 0
            state = match($0, / status="[a-z]+"/) ? substr($0, RSTART + 9, RLENGTH - 10) : ""
        }
        /\[doctest\] test cases:/ {
            split($0, part, "|")
            cases = number(part[1])
            case_passed = number(part[2])
            case_failed = number(part[3])
        }
        match($0, /(^|>)[A-Z][0-9]+[a-z]? [0-9]+\/[0-9]+/) {
            line = substr($0, RSTART, RLENGTH)
            sub(/^>/, "", line)
            groups = groups line "\n"
        }
        /<skipped message="SKIP_RETURN_CODE/ { skips = 1 }
        /<\/testcase>/ {
            if (state == "run" && !cases) ++passed
            passed += case_passed
            failed += case_failed
            if (state == "fail" && !case_failed) ++failed  # no doctest, or it crashed or hung
            if (state == "notrun" && skips) skipped = skipped "skipped: a test of ctest, see above\n"
            if (state == "notrun" && !skips) ++failed  # there was nothing to run
        }
        END {
            printf "%s%s%d passed, %d failed\n", groups, skipped, passed, failed
            exit !(failed == 0 && passed > 0)
        }' "$report" || [ $status -ne 0 ] || status=1
    return $status
}
