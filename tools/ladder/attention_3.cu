// attention_3: no running maximum
//   idea      nanochat normalises q and k, so no score is beyond 1.44 * sqrt(128) = 16.3. With that
//             bound in place of the maximum exp2 is in range, and keys do not wait for each other.
//   expected  Eight of some 57 instructions a key fall away, a sixth more speed, and no key waits.
//   measured  31.710 ms, 8.67 TFLOP/s, 0.013 of mma.sync (NVIDIA H200)
//   taught    A bound known beforehand is worth more than a maximum found on the way.
#include "harness.cuh"

using namespace ladder;

constexpr int kWarps = 8, kOwn = 4;  // queries of a block; values of a lane

__global__ void __launch_bounds__(kWarps * 32) attention_kernel(const Attention a) {
    const int t = (gridDim.x - 1 - blockIdx.x) * kWarps + threadIdx.x / 32;  // longest first
    const int own = threadIdx.x % 32 * kOwn, h = blockIdx.y, b = blockIdx.z;
    float q[kOwn], k[kOwn], v[kOwn], z[kOwn] = {}, sum = 0;
    load_4(q, a.q + a.row(b, h, t) + own);
    for (int s = 0; s <= t; ++s) {
        load_4(k, a.pages + a.key(b, h, s) + own);
        load_4(v, a.pages + a.key(b, h, s) + kPage * kHead + own);
        float score = 0;
        for (int i = 0; i < kOwn; ++i) score += q[i] * k[i];
        for (int step = 16; step > 0; step /= 2) score += __shfl_xor_sync(~0u, score, step);
        const float weight = fast_exp2(score * kScaleLog2 - kBoundLog2);
        sum += weight;
        for (int i = 0; i < kOwn; ++i) z[i] += weight * v[i];
    }
    for (int i = 0; i < kOwn; ++i) a.z[a.row(b, h, t) + own + i] = bf16(z[i] / sum);
}

void launch(const Attention& a) {
    start(attention_kernel, dim3(a.T / kWarps, a.H, a.B), kWarps * 32, 0, a);
}

int main(int argc, char** argv) { return run_attention(__FILE__, argc, argv, launch); }
