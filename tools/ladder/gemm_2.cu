// gemm_2: tiles in shared memory
//   idea      A block fetches 32 x 32 values of x and of w, neighbouring lanes neighbouring k, and
//             multiplies them from shared memory: each value is fetched once for 32 products.
//   expected  A product reads two words of shared memory, which gives a warp one row of 32 words in
//             a clock: 16 products per clock and SM, 8.4 TFLOP/s on an H200, 16 times gemm_1.
//   measured  18.837 ms, 7.30 TFLOP/s, 0.011 of mma.sync (NVIDIA H200)
//   taught    Without the column of padding, 32 lanes would read 32 rows from one bank, in 32 turns.
#include "harness.cuh"

using namespace ladder;

constexpr int kTile = 32;  // of y, both ways, and of K

__global__ void __launch_bounds__(kTile* kTile) gemm_kernel(const Gemm g) {
    __shared__ float s_x[kTile][kTile + 1], s_w[kTile][kTile + 1];  // row m or n, column k
    const int tx = threadIdx.x, ty = threadIdx.y, m0 = blockIdx.y * kTile, n0 = blockIdx.x * kTile;
    float sum = 0;
    for (int k0 = 0; k0 < g.K; k0 += kTile) {
        s_x[ty][tx] = float(g.x[(m0 + ty) * g.K + k0 + tx]);
        s_w[ty][tx] = float(g.w[(n0 + ty) * g.K + k0 + tx]);
        __syncthreads();  // the tile is whole
        for (int k = 0; k < kTile; ++k) sum += s_x[ty][k] * s_w[tx][k];
        __syncthreads();  // and read by all
    }
    g.y[(m0 + ty) * g.N + n0 + tx] = bf16(sum);
}

void launch(const Gemm& g) {
    start(gemm_kernel, dim3(g.N / kTile, g.M / kTile), dim3(kTile, kTile), 0, g);
}

int main(int argc, char** argv) { return run_gemm(__FILE__, argc, argv, launch); }
