#!/bin/sh
# Writes nanogpt-<version>.tar.gz: the two headers, each with its manual at the top, and the licence.
# All that a program of one's own needs. The same commit gives the same bytes.
#
#   tools/release.sh [output folder]        (default: the current folder)
set -eu

out=$(cd "${1:-.}" && pwd)
cd "$(dirname "$0")/.."
version=$(sed -n 's/^#define NANOGPT_VERSION \([0-9]*\).*/\1/p' nanogpt.hpp)
name=nanogpt-$((version / 10000)).$((version / 100 % 100)).$((version % 100))
if ! git diff --quiet HEAD -- nanogpt.hpp kernels.cuh LICENSE; then
    echo "release: nanogpt.hpp, kernels.cuh or LICENSE is not as committed" >&2
    exit 1
fi
# git archive sorts, sets owner and mode, and takes the time of the commit; gzip -n adds no time.
git -c tar.umask=0022 archive --prefix="$name/" HEAD LICENSE kernels.cuh nanogpt.hpp | gzip -9n > "$out/$name.tar.gz"
echo "$out/$name.tar.gz"
