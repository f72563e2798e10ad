// attention_4: tensor cores (FlashAttention-2, Dao 2023)
//   idea      A warp takes 16 queries and 64 keys at a time: mma.sync makes their scores and, from
//             their weights, which lie in the registers as the next mma wants them, the sums.
//   expected  A page is 2.1 MFLOP for a block, 826 clocks of an H200's tensor cores, 2048 of a GB10's.
//             It comes some 800 clocks after it was asked for, and till then the block waits: half the peak.
//   measured  1.490 ms, 184.57 TFLOP/s, 0.288 of mma.sync (NVIDIA H200)
//   taught    An instruction now does 4096 flops, not 32: attention is two matrix products again.
#include "harness.cuh"

using namespace ladder;

constexpr int kWarps = 4, kQueries = 16 * kWarps, kSteps = kHead / 16;  // of a block; of an mma

__global__ void __launch_bounds__(kWarps * 32) attention_kernel(const Attention a) {
    __shared__ __align__(128) bf16 s_page[kPageValues];                             // k, then v
    const int t = (gridDim.x - 1 - blockIdx.x) * kQueries + threadIdx.x / 32 * 16;  // longest first
    const int lane = threadIdx.x % 32, h = blockIdx.y, b = blockIdx.z, ld = a.H * kHead;
    std::uint32_t q[kSteps][4], p[4], f[4];
    for (int i = 0; i < kSteps; ++i) load_factor(q[i], a.q + a.row(b, h, t) + i * 16, ld);
    float z[2 * kSteps][4] = {}, sum[2] = {};  // of a lane's two rows
    for (int s = 0; s <= t; s += kPage) {
        for (int n = 0, i = threadIdx.x * 8; n < 16; ++n, i += kPageValues / 16)
            *reinterpret_cast<uint4*>(s_page + swizzled(i / kHead, i % kHead / 8)) =
                *reinterpret_cast<const uint4*>(a.pages + a.key(b, h, s) + i);
        __syncthreads();             // the page is whole
        float x[kPage / 8][4] = {};  // scores, then weights
        for (int i = 0; i < kSteps * kPage / 16; ++i) {
            load_columns(f, s_page, i % 4 * 16, i / 4 * 2);
            mma_16x16(&x[i % 4 * 2], q[i / 4], f);
        }
        for (int i = 0; i < kPage / 2; ++i) {
            const bool seen = s + i / 4 * 8 + lane % 4 * 2 + i % 2 <= t + lane / 4 + i / 2 % 2 * 8;
            x[i / 4][i % 4] = seen ? fast_exp2(x[i / 4][i % 4] * kScaleLog2 - kBoundLog2) : 0;
            sum[i / 2 % 2] += x[i / 4][i % 4];
        }
        for (int i = 0; i < kSteps * kPage / 16; ++i) {
            if (i % kSteps == 0) as_factor(p, &x[i / kSteps * 2]);
            load_rows(f, s_page + kPage * kHead, i / kSteps * 16, i % kSteps * 2);
            mma_16x16(&z[i % kSteps * 2], p, f);
        }
        __syncthreads();  // and read by all
    }
    for (float& x : sum) x = 1 / row_sum(x);
    for (int i = 0; i < 2 * kSteps; ++i) store_sums(a.z + a.row(b, h, t) + i * 8, ld, z[i], sum);
}

void launch(const Attention& a) {
    start(attention_kernel, dim3(a.T / kQueries, a.H, a.B), kWarps * 32, 0, a);
}

int main(int argc, char** argv) { return run_attention(__FILE__, argc, argv, launch); }
