// gemm_5: copies that run ahead, and no bank conflicts
//   idea      cp.async fetches two steps ahead into a ring of three stages while this one is
//             multiplied; chunk c of row r lies at c ^ (r / 2 % 4), so that 8 rows fill 32 banks.
//   expected  ldmatrix takes 256 clocks of a step's 413 on an H200. Left is the way from the L2: 16 KB
//             a step, 1 byte for 64 flops, 5.5 to 7 TB/s there: 350 to 450 TFLOP/s.
//   measured  0.422 ms, 325.78 TFLOP/s, 0.509 of mma.sync (NVIDIA H200)
//   taught    A latency that cannot be shortened can be filled with work that was asked for early.
#include "harness.cuh"

using namespace ladder;

constexpr int kTile = 128, kTileK = 32, kThreads = 128;  // a warp has 64 x 64 of y
constexpr int kStages = 3, kStage = 2 * kTile * kTileK;  // values of a stage: 16 KB

__device__ int place(int row, int chunk) { return row * kTileK + (chunk ^ row / 2 % 4) * 8; }

__global__ void __launch_bounds__(kThreads) gemm_kernel(const Gemm g) {
    extern __shared__ __align__(128) bf16 s_ring[];  // kStages times rows of x, rows of w
    const int t = threadIdx.x, lane = t % 32, m0 = blockIdx.y * kTile, n0 = blockIdx.x * kTile;
    const int warp_m = t / 64 * 64, warp_n = t / 32 % 2 * 64;
    const auto copy = [&](int k0, bf16* s_tile) {
        for (int i = 0; k0 < g.K && i < 2 * kTile; i += kThreads / 4) {
            const bf16* from = i < kTile ? g.x + (m0 + i) * g.K : g.w + (n0 + i - kTile) * g.K;
            cp_async_16(s_tile + place(i + t / 4, t % 4), from + t / 4 * g.K + k0 + t % 4 * 8);
        }
        cp_async_commit();  // an empty group past the end: they are counted
    };
    for (int i = 0; i < kStages - 1; ++i) copy(i * kTileK, s_ring + i * kStage);
    float sum[4][8][4] = {};
    for (int k0 = 0, stage = 0; k0 < g.K; k0 += kTileK, stage = (stage + 1) % kStages) {
        cp_async_wait<kStages - 2>();
        __syncthreads();  // this stage is whole, and the one before is read by all
        copy(k0 + (kStages - 1) * kTileK, s_ring + (stage + kStages - 1) % kStages * kStage);
        const bf16* const s_tile = s_ring + stage * kStage;
        for (int c = 0; c < kTileK / 8; c += 2) {  // 16 of K, two chunks of 8
            std::uint32_t a[4][4], b[4][4];
            for (int i = 0; i < 4; ++i) {
                const int row_b = kTile + warp_n + i * 16 + lane / 16 * 8 + lane % 8;
                ldmatrix_x4(a[i], s_tile + place(warp_m + i * 16 + lane % 16, c + lane / 16));
                ldmatrix_x4(b[i], s_tile + place(row_b, c + lane / 8 % 2));
            }
            mma_64x64(sum, a, b);
        }
    }
    store_64x64(g.y + (m0 + warp_m) * g.N + n0 + warp_n, g.N, sum);
}

void launch(const Gemm& g) {
    start(gemm_kernel, dim3(g.N / kTile, g.M / kTile), dim3(kThreads), kStages * kStage * 2, g);
}

int main(int argc, char** argv) { return run_gemm(__FILE__, argc, argv, launch); }
