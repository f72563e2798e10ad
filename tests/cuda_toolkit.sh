#!/usr/bin/env bash
# Finds a CUDA toolkit that compiles for a GB10, and nvdisasm, which small toolkits leave out. What
# is missing comes from NVIDIA's Python packages and is kept in a folder for the next time. Needs
# no GPU.
#
#   PATH=$(tests/cuda_toolkit.sh build-cuda-toolkit):$PATH
#
# Prints the folders of both programs, separated by a colon.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/../tools/setup.sh"

folder=$(mkdir -p "$1" && cd "$1" && pwd)
release=13.0

# Installs wheels, and nothing they depend on, below the folder. Debian's Python has no pip.
get() {
    python3 -m pip --version >/dev/null 2>&1 || install_packages python3-pip
    say "fetching $*"
    quietly "pip" python3 -m pip --disable-pip-version-check install --quiet --no-deps \
        --root-user-action=ignore --upgrade --target "$folder" "$@"
}

# works <nvcc>: it compiles for a GB10, and what it makes can be linked: headers and libraries are
# there.
works() {
    local work result=1
    work=$(mktemp -d)
    printf '%s\n' '#include <cuda_bf16.h>' '__global__ void k(float* x) { x[threadIdx.x] *= 2; }' \
        'int main() { k<<<1, 32>>>(nullptr); return cudaGetLastError(); }' >"$work/a.cu"
    (cd "$work" && "$1" -std=c++20 -gencode arch=compute_121,code=sm_121 -o a a.cu) \
        >"$work/log" 2>&1 && result=0
    [ $result -eq 0 ] || sed 's/^/    /' "$work/log" >&2
    rm -rf "$work"
    return $result
}

nvcc=
for candidate in "${CUDACXX:-}" nvcc /usr/local/cuda/bin/nvcc "$folder/nvidia/cu13/bin/nvcc"; do
    candidate=$(command -v "$candidate" 2>/dev/null) || continue
    if works "$candidate"; then
        nvcc=$candidate
        break
    fi
    say "$candidate does not do"
done
if [ -z "$nvcc" ]; then
    get "nvidia-cuda-nvcc==$release.*" "nvidia-cuda-crt==$release.*" "nvidia-nvvm==$release.*" \
        "nvidia-cuda-runtime==$release.*" "nvidia-cuda-cccl==$release.*" nvidia-cuda-nvdisasm
    nvcc=$folder/nvidia/cu13/bin/nvcc
    # nvcc and CMake look for the libraries where an installed toolkit has them.
    ln -sfn lib "$folder/nvidia/cu13/lib64"
    works "$nvcc" || { say "the packages give no toolkit that works"; exit 1; }
fi

nvcc_folder=$(dirname "$(realpath "$nvcc")")
nvdisasm=$(PATH="$nvcc_folder:$PATH:$folder/nvidia/cu13/bin" command -v nvdisasm) || {
    get nvidia-cuda-nvdisasm
    nvdisasm=$folder/nvidia/cu13/bin/nvdisasm
}
"$nvdisasm" --version >/dev/null
printf '%s:%s\n' "$nvcc_folder" "$(dirname "$nvdisasm")"
