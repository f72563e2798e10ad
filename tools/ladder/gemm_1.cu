// gemm_1: one thread per element of y
//   idea      The definition, as it stands: each thread walks along a row of x and a row of w.
//   expected  A warp's load of w touches 32 rows, so 32 lines of the L1 cache, which looks up one in
//             a clock: 32 products in 33 clocks, 2 flops per clock and SM, 0.5 TFLOP/s on an H200.
//   measured  276.037 ms, 0.50 TFLOP/s, 0.001 of mma.sync (NVIDIA H200)
//   taught    The order of the threads is the order of the addresses: lanes should differ in k.
#include "harness.cuh"

using namespace ladder;

constexpr int kTile = 32;  // of y, both ways

__global__ void __launch_bounds__(kTile* kTile) gemm_kernel(const Gemm g) {
    const int n = blockIdx.x * kTile + threadIdx.x, m = blockIdx.y * kTile + threadIdx.y;
    float sum = 0;
    for (int k = 0; k < g.K; ++k) sum += float(g.x[m * g.K + k]) * float(g.w[n * g.K + k]);
    g.y[m * g.N + n] = bf16(sum);
}

void launch(const Gemm& g) {
    start(gemm_kernel, dim3(g.N / kTile, g.M / kTile), dim3(kTile, kTile), 0, g);
}

int main(int argc, char** argv) { return run_gemm(__FILE__, argc, argv, launch); }
