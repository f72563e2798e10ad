// attention_1: all scores to memory and back
//   idea      The definition: one kernel makes the scores of all pairs, the next turns each row of
//             them into weights and adds up the values.
//   expected  4.3 GB of scores, half of them used, go out once and come back 128 lanes wide and twice:
//             2.1 ms of traffic on an H200. But as in gemm_1 each lane walks along a row of its own:
//             32 products in 33 clocks, 0.3 s for 69 G of them.
//   measured  335.549 ms, 0.82 TFLOP/s, 0.001 of mma.sync (NVIDIA H200)
//   taught    T x T scores are memory that grows with the square, for numbers used once.
#include "harness.cuh"

using namespace ladder;

constexpr int kThreads = 64;

// scores (B, H, T, T) f32: of 64 keys with one query
__global__ void __launch_bounds__(kThreads) score_kernel(const Attention a, float* scores) {
    const int s = blockIdx.x * kThreads + threadIdx.x, t = blockIdx.y;
    const int h = blockIdx.z % a.H, b = blockIdx.z / a.H;
    const bf16 *const q = a.q + a.row(b, h, t), *const k = a.pages + a.key(b, h, s);
    float score = 0;
    for (int i = 0; s <= t && i < kHead; ++i) score += float(q[i]) * float(k[i]);
    scores[(std::size_t{blockIdx.z} * a.T + t) * a.T + s] = s <= t ? score * kScaleLog2 : -INFINITY;
}

__global__ void __launch_bounds__(kHead) value_kernel(const Attention a, const float* scores) {
    const int i = threadIdx.x, t = blockIdx.x, h = blockIdx.y % a.H, b = blockIdx.y / a.H;
    const float* const row = scores + (std::size_t{blockIdx.y} * a.T + t) * a.T;
    float top = -INFINITY, sum = 0, z = 0;
    for (int s = 0; s <= t; ++s) top = fmaxf(top, row[s]);
    for (int s = 0; s <= t; ++s) {
        const float weight = fast_exp2(row[s] - top);
        sum += weight, z += weight * float(a.pages[a.key(b, h, s) + kPage * kHead + i]);
    }
    a.z[a.row(b, h, t) + i] = bf16(z / sum);
}

void launch(const Attention& a) {
    static std::size_t size = 0;
    static float* scores = nullptr;
    const std::size_t needed = std::size_t(a.B) * a.H * a.T * a.T;
    if (size < needed) scores = device_array<float>(size = needed);
    start(score_kernel, dim3(a.T / kThreads, a.T, a.B * a.H), kThreads, 0, a, scores);
    start(value_kernel, dim3(a.T, a.B * a.H), kHead, 0, a, scores);
}

int main(int argc, char** argv) { return run_attention(__FILE__, argc, argv, launch); }
