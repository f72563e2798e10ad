// attention_2: one pass, one warp a query
//   idea      Softmax needs no second look: keep the greatest score so far, and shrink what has been
//             summed when a greater one comes (Milakov and Gimelshein 2018). No score leaves the chip.
//   expected  A key costs a warp some 57 instructions, of which an SM starts four in a clock, for 512
//             flops: 36 per clock and SM, 9 TFLOP/s on an H200.
//   measured  35.736 ms, 7.69 TFLOP/s, 0.012 of mma.sync (NVIDIA H200)
//   taught    Fusing removed the memory; what is left is instructions, 9 flops for each.
#include "harness.cuh"

using namespace ladder;

constexpr int kWarps = 8, kOwn = 4;  // queries of a block; values of a lane

__global__ void __launch_bounds__(kWarps * 32) attention_kernel(const Attention a) {
    const int t = (gridDim.x - 1 - blockIdx.x) * kWarps + threadIdx.x / 32;  // longest first
    const int own = threadIdx.x % 32 * kOwn, h = blockIdx.y, b = blockIdx.z;
    float q[kOwn], k[kOwn], v[kOwn], z[kOwn] = {}, top = -INFINITY, sum = 0;
    load_4(q, a.q + a.row(b, h, t) + own);
    for (int s = 0; s <= t; ++s) {
        load_4(k, a.pages + a.key(b, h, s) + own);
        load_4(v, a.pages + a.key(b, h, s) + kPage * kHead + own);
        float score = 0;
        for (int i = 0; i < kOwn; ++i) score += q[i] * k[i];
        for (int step = 16; step > 0; step /= 2) score += __shfl_xor_sync(~0u, score, step);
        const float higher = fmaxf(top, score), shrink = fast_exp2((top - higher) * kScaleLog2);
        const float weight = fast_exp2((score - higher) * kScaleLog2);
        top = higher, sum = sum * shrink + weight;
        for (int i = 0; i < kOwn; ++i) z[i] = z[i] * shrink + weight * v[i];
    }
    for (int i = 0; i < kOwn; ++i) a.z[a.row(b, h, t) + own + i] = bf16(z[i] / sum);
}

void launch(const Attention& a) {
    start(attention_kernel, dim3(a.T / kWarps, a.H, a.B), kWarps * 32, 0, a);
}

int main(int argc, char** argv) { return run_attention(__FILE__, argc, argv, launch); }
