// gemm_8: larger tiles, in an order that shares
//   idea      128 x 256 of y in a block, eight warps; blocks run down super-rows of 16 tiles, so that
//             those that run at one time cover nearly a square and find each other's rows in the L2.
//   expected  1 byte from the L2 for 85 flops, not 64: at most a third, if that is the limit; and eight
//             warps meet at one barrier with no other block to fill in. A GB10's 48 blocks share 2816
//             rows, not 4480: from memory 1.0 ms, not 1.7, and its tensor cores need 1.2.
//   measured  0.340 ms, 404.75 TFLOP/s, 0.631 of mma.sync (NVIDIA H100 80GB HBM3)
//   taught    A square has the least rim for its area: in registers, in shared memory, in the L2. Here
//             the L2 was not the limit; without gemm_7's fragments the large tile even lost, with 326
//             TFLOP/s against gemm_6's 364. It is made for a GB10, whose memory is 18 times as slow.
#include "harness.cuh"

using namespace ladder;

constexpr int kTile = 128, kTileN = 256, kTileK = 32, kThreads = 256, kSuperRow = 16;
constexpr int kStages = 4, kStage = (kTile + kTileN) * kTileK;  // values of a stage: 24 KB
constexpr int kPass = kThreads / 4;  // rows that the block copies at once

__device__ int place(int row, int chunk) { return row * kTileK + (chunk ^ row / 2 % 4) * 8; }

__global__ void __launch_bounds__(kThreads) gemm_kernel(const Gemm g) {
    extern __shared__ __align__(128) bf16 s_ring[];  // kStages times rows of x, rows of w
    const int rows = min(kSuperRow, g.M / kTile), columns = g.N / kTileN, block = blockIdx.x;
    const int m0 = (block / (rows * columns) * rows + block % rows) * kTile;
    const int n0 = block / rows % columns * kTileN, t = threadIdx.x, lane = t % 32;
    const int warp_m = t / 128 * 64, warp_n = t / 32 % 4 * 64;
    // Of this thread: where it copies from and to, where its warp reads. 16 rows on, chunk c lies at
    // the same c ^ (r / 2 % 4).
    const bf16* const x = g.x + (m0 + t / 4) * g.K + t % 4 * 8;
    const bf16* const w = g.w + (n0 + t / 4) * g.K + t % 4 * 8;
    const int to = place(t / 4, t % 4), at_a = place(warp_m + lane % 16, lane / 16);
    const int at_b = place(kTile + warp_n + lane / 16 * 8 + lane % 8, lane / 8 % 2);
    const auto copy = [&](int k0, bf16* s_tile) {
        for (int i = 0; k0 < g.K && i < kTile / kPass; ++i)
            cp_async_16(s_tile + to + i * kPass * kTileK, x + i * kPass * g.K + k0);
        for (int i = 0; k0 < g.K && i < kTileN / kPass; ++i)
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
    const auto multiply = [&](int s) {
        for (int i = 0; i < 16; ++i) mma_16x16(&sum[i / 4][i % 4 * 2], a[s][i / 4], b[s][i % 4]);
    };
    cp_async_wait<kStages - 2>();
    __syncthreads();
    read(0, s_ring, 0);
    for (int k0 = 0, stage = 0; k0 < g.K; k0 += kTileK, stage = (stage + 1) % kStages) {
        read(1, s_ring + stage * kStage, 2);  // two chunks of 8 on
        copy(k0 + (kStages - 1) * kTileK, s_ring + (stage + kStages - 1) % kStages * kStage);
        multiply(0);
        cp_async_wait<kStages - 2>();
        __syncthreads();  // the next stage is whole, and this one is read by all
        read(0, s_ring + (stage + 1) % kStages * kStage, 0);
        multiply(1);
    }
    bf16* const y = g.y + (m0 + warp_m) * g.N + n0 + warp_n;
    for (int i = 0; i < 32; ++i)
        store_sums(y + i / 8 * 16 * g.N + i % 8 * 8, g.N, sum[i / 8][i % 8]);
}

void launch(const Gemm& g) {
    start(gemm_kernel, g.M / kTile * g.N / kTileN, kThreads, kStages * kStage * 2, g);
}

int main(int argc, char** argv) { return run_gemm(__FILE__, argc, argv, launch); }
