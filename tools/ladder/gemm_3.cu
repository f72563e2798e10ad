// gemm_3: 8 x 8 sums in a thread's registers
//   idea      16 values from shared memory make 64 products, where gemm_2 read two for each.
//   expected  A warp's 64 multiply-adds take 16 clocks, its four loads of 16 bytes 6 or 8: the limit
//             is that of the FMA units, 128 per clock and SM: 67 TFLOP/s on an H200, 8 times gemm_2, a
//             tenth of what its tensor cores do.
//   measured  3.826 ms, 35.92 TFLOP/s, 0.056 of mma.sync (NVIDIA H200)
//   taught    Registers are the fastest memory: the larger a thread's part of y, the less it loads.
#include "harness.cuh"

using namespace ladder;

constexpr int kTile = 128, kTileK = 16, kThreads = 256;  // of y, both ways; of K

// A thread's 8 rows, or columns: 4 here and 4 in the other half, for loads of 16 bytes.
__device__ constexpr int eighth(int i) { return i / 4 * (kTile / 2) + i % 4; }

__global__ void __launch_bounds__(kThreads) gemm_kernel(const Gemm g) {
    __shared__ __align__(16) float s_x[kTileK][kTile + 4], s_w[kTileK][kTile + 4];  // row k
    const int t = threadIdx.x, m0 = blockIdx.y * kTile, n0 = blockIdx.x * kTile;
    const int tm = t / 16 * 4, tn = t % 16 * 4;
    float sum[8][8] = {};
    for (int k0 = 0; k0 < g.K; k0 += kTileK) {
        for (int i = 0; i < kTile; i += kThreads / kTileK) {
            const int row = i + t / kTileK, k = t % kTileK;
            s_x[k][row] = float(g.x[(m0 + row) * g.K + k0 + k]);
            s_w[k][row] = float(g.w[(n0 + row) * g.K + k0 + k]);
        }
        __syncthreads();  // the tile is whole
        for (int k = 0; k < kTileK; ++k)
#pragma unroll
            for (int i = 0; i < 64; ++i)
                sum[i / 8][i % 8] += s_x[k][tm + eighth(i / 8)] * s_w[k][tn + eighth(i % 8)];
        __syncthreads();  // and read by all
    }
#pragma unroll
    for (int i = 0; i < 64; ++i)
        g.y[(m0 + tm + eighth(i / 8)) * g.N + n0 + tn + eighth(i % 8)] = bf16(sum[i / 8][i % 8]);
}

void launch(const Gemm& g) {
    start(gemm_kernel, dim3(g.N / kTile, g.M / kTile), dim3(kThreads), 0, g);
}

int main(int argc, char** argv) { return run_gemm(__FILE__, argc, argv, launch); }
