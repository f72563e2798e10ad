// gemm_7: fragments of the next mma are read during this one
//   idea      Two sets: 16 of K are multiplied while ldmatrix brings the next, also across the barrier.
//   expected  gemm_6 waits for it twice a step, 60 clocks of 413, half of it alone: 7 percent.
//   measured  0.344 ms, 399.83 TFLOP/s, 0.625 of mma.sync (NVIDIA H200)
//   taught    The same trick at every level: memory to shared memory, shared memory to registers.
#include "harness.cuh"

using namespace ladder;

constexpr int kTile = 128, kTileK = 32, kThreads = 128, kPass = kThreads / 4;  // rows at once
constexpr int kStages = 4, kStage = 2 * kTile * kTileK;  // values of a stage: 16 KB

__device__ int place(int row, int chunk) { return row * kTileK + (chunk ^ row / 2 % 4) * 8; }

__global__ void __launch_bounds__(kThreads) gemm_kernel(const Gemm g) {
    extern __shared__ __align__(128) bf16 s_ring[];  // kStages times rows of x, rows of w
    const int t = threadIdx.x, lane = t % 32, m0 = blockIdx.y * kTile, n0 = blockIdx.x * kTile;
    const int warp_m = t / 64 * 64, warp_n = t / 32 % 2 * 64;
    // Of this thread: copies go from x, w to `to`; its warp reads at_a, at_b. Swizzles repeat in 16 rows.
    const bf16* const x = g.x + (m0 + t / 4) * g.K + t % 4 * 8;
    const bf16* const w = g.w + (n0 + t / 4) * g.K + t % 4 * 8;
    const int to = place(t / 4, t % 4), at_a = place(warp_m + lane % 16, lane / 16);
    const int at_b = place(kTile + warp_n + lane / 16 * 8 + lane % 8, lane / 8 % 2);
    const auto copy = [&](int k0, bf16* s_tile) {
        for (int i = 0; k0 < g.K && i < kTile / kPass; ++i)
            cp_async_16(s_tile + to + i * kPass * kTileK, x + i * kPass * g.K + k0);
        for (int i = 0; k0 < g.K && i < kTile / kPass; ++i)
            cp_async_16(s_tile + to + (kTile + i * kPass) * kTileK, w + i * kPass * g.K + k0);
        cp_async_commit();  // an empty group past the end: they are counted
    };
    for (int i = 0; i < kStages - 1; ++i) copy(i * kTileK, s_ring + i * kStage);
    float sum[4][8][4] = {};
    std::uint32_t a[2][4][4], b[2][4][4];  // fragments of 16 of K and of the next
    const auto read = [&](int s, const bf16* s_tile, int c) {
        for (int i = 0; i < 4; ++i) ldmatrix_x4(a[s][i], s_tile + (at_a ^ c * 8) + i * 16 * kTileK);
        for (int i = 0; i < 4; ++i) ldmatrix_x4(b[s][i], s_tile + (at_b ^ c * 8) + i * 16 * kTileK);
    };
    cp_async_wait<kStages - 2>();
    __syncthreads();
    read(0, s_ring, 0);
    for (int k0 = 0, stage = 0; k0 < g.K; k0 += kTileK, stage = (stage + 1) % kStages) {
        read(1, s_ring + stage * kStage, 2);  // two chunks of 8 on
        copy(k0 + (kStages - 1) * kTileK, s_ring + (stage + kStages - 1) % kStages * kStage);
        mma_64x64(sum, a[0], b[0]);
        cp_async_wait<kStages - 2>();
        __syncthreads();  // the next stage is whole, and this one is read by all
        read(0, s_ring + (stage + 1) % kStages * kStage, 0);
        mma_64x64(sum, a[1], b[1]);
    }
    store_64x64(g.y + (m0 + warp_m) * g.N + n0 + warp_n, g.N, sum);
}

void launch(const Gemm& g) {
    start(gemm_kernel, dim3(g.N / kTile, g.M / kTile), dim3(kThreads), kStages * kStage * 2, g);
}

int main(int argc, char** argv) { return run_gemm(__FILE__, argc, argv, launch); }
