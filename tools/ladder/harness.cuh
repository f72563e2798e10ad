// harness.cuh: the same problem, check and clock for every rung of the ladder.
//
// A rung is a program: it fills in launch() and calls run_gemm or run_attention.
//
//   gemm_1            checks a small problem whole and a large one in part, then times the large one
//   gemm_1 --check    only the small one: does it compute the right thing?
//
// The check: random data, rounded to bf16, multiplied on the CPU in float64. The output is filled
// with NaN before, so that what was not written is wrong. Of the large problem one element of every
// 8 x 8 of y is checked, or one row of z of every 64 positions of every head.
//
// The clock: CUDA events around one launch, with the L2 cache overwritten before each; median of 20,
// with least and greatest. Beside it what mma.sync does from registers, measured in the same run.
//
// The last line of the output is one JSON object. Exit code 0: right; 1: wrong, or CUDA failed;
// 2: usage; 77: there is no GPU.
#pragma once

#include <cuda_runtime.h>  // cudaMalloc, cudaEventRecord

#include <algorithm>    // max, sort
#include <cmath>        // sqrt, fabs
#include <cstdint>      // uint64_t
#include <cstdio>       // printf
#include <stdexcept>    // runtime_error
#include <string>       // string
#include <string_view>  // string_view
#include <vector>       // vector

#include "ptx.cuh"  // bf16, mma_m16n8k16

namespace ladder {

// ---- the problems -------------------------------------------------------------------------------
// No array has 2^31 values, so an int is enough for an index.

// y (M, N) bf16 = x (M, K) bf16 * w (N, K)^T bf16, sums in float32. M and K are multiples of 128, N
// of 256.
struct Gemm {
    bf16* y;
    const bf16 *x, *w;
    int M, N, K;
};

inline constexpr int kHead = 128, kPage = 64;          // values of a head; positions of a page
inline constexpr int kPageValues = 2 * kPage * kHead;  // k (64, 128), then v (64, 128)

// z[b,t,h,:] = sum_s p[s] v[b,s,h,:], p = softmax over s <= t of q[b,t,h,:] . k[b,s,h,:] / sqrt(128).
// q, z (B, T, H, 128) bf16; k and v in pages as kernels.cuh has them, (B * T/64, H, 2, 64, 128) bf16.
// T is a multiple of 64. Rows of q and k have length 1.2 * sqrt(128), as nanochat's QK norm
// makes them, so no score is beyond 1.44 * sqrt(128) = 16.3.
struct Attention {
    bf16* z;
    const bf16 *q, *pages;
    int B, H, T;
    // for kernels.cuh: the pages' numbers, and which rows are whose, 128 at a time (QueryTile)
    const int* page_table = nullptr;  // (B * T/64), 0, 1, 2 ...
    const int4* tiles = nullptr;      // (n_tiles), longest first
    int n_tiles = 0;
    // where q, z of position t begin, and k of position t; v is kPage * kHead values further on
    __host__ __device__ int row(int b, int h, int t) const { return ((b * T + t) * H + h) * kHead; }
    __host__ __device__ int key(int b, int h, int t) const {
        return ((b * T + t) / kPage * H + h) * kPageValues + t % kPage * kHead;
    }
};
inline constexpr float kScale = 0.08838835f;          // 1 / sqrt(128)
inline constexpr float kLog2e = 1.4426950f;           // exp(x) = exp2(x * log2(e))
inline constexpr float kScaleLog2 = kScale * kLog2e;  // of a product in the exponent of 2
inline constexpr float kBoundLog2 = 16.3f * kLog2e;   // no score is larger

// ---- CUDA ---------------------------------------------------------------------------------------

inline void check(cudaError_t error, const char* what) {
    if (error != cudaSuccess)
        throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

// Device memory for n values; it is the process's until its end.
template <class T>
T* device_array(std::size_t n) {
    T* p = nullptr;
    check(cudaMalloc(&p, n * sizeof(T)), "cudaMalloc");
    return p;
}
template <class T>
T* upload(const std::vector<T>& from) {
    T* const p = device_array<T>(from.size());
    check(cudaMemcpy(p, from.data(), from.size() * sizeof(T), cudaMemcpyHostToDevice), "upload");
    return p;
}
template <class T>
std::vector<T> download(const T* from, std::size_t n) {
    std::vector<T> to(n);
    check(cudaMemcpy(to.data(), from, n * sizeof(T), cudaMemcpyDeviceToHost), "download");
    return to;
}

template <class... Parameters, class... Arguments>
void start(void (*kernel)(Parameters...), dim3 grid, dim3 block, int shared_bytes,
           Arguments... arguments) {
    if (shared_bytes > 48 * 1024)  // more has to be asked for
        check(
            cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes),
            "cudaFuncSetAttribute");
    kernel<<<grid, block, static_cast<std::size_t>(shared_bytes)>>>(arguments...);
    check(cudaGetLastError(), "launch");
}

// ---- the clock ----------------------------------------------------------------------------------

struct Timing {
    double ms, low, high;  // median, least, greatest
};

class Clock {
public:
    Clock() {
        cudaDeviceProp gpu{};
        check(cudaGetDeviceProperties(&gpu, 0), "cudaGetDeviceProperties");
        bytes_ = std::max(std::size_t{64} << 20, 4 * static_cast<std::size_t>(gpu.l2CacheSize));
        rubbish_ = device_array<char>(bytes_);
        check(cudaEventCreate(&begin_), "cudaEventCreate");
        check(cudaEventCreate(&end_), "cudaEventCreate");
    }
    template <class F>
    Timing time(F&& launch) {
        constexpr int kWarmUp = 2, kRuns = 20;
        std::vector<double> ms;
        for (int i = 0; i < kWarmUp + kRuns; ++i) {
            check(cudaMemsetAsync(rubbish_, i, bytes_), "cudaMemset");
            check(cudaEventRecord(begin_), "cudaEventRecord");
            launch();
            check(cudaEventRecord(end_), "cudaEventRecord");
            check(cudaEventSynchronize(end_), "kernel");
            float elapsed = 0;
            check(cudaEventElapsedTime(&elapsed, begin_, end_), "cudaEventElapsedTime");
            if (i >= kWarmUp) ms.push_back(double{elapsed});
        }
        std::sort(ms.begin(), ms.end());
        return {(ms[kRuns / 2 - 1] + ms[kRuns / 2]) / 2, ms.front(), ms.back()};
    }

private:
    std::size_t bytes_;
    char* rubbish_;
    cudaEvent_t begin_, end_;
};

// Products from registers, eight sums in turns: what mma.sync can do at most.
inline constexpr int kPeakThreads = 512, kPeakRounds = 20000, kPeakSums = 8;
static __global__ void __launch_bounds__(kPeakThreads) mma_peak_kernel(float* out) {
    float c[kPeakSums][4] = {};
    std::uint32_t a[4];
    for (unsigned i = 0; i < 4; ++i) a[i] = 0x3f803f80u + threadIdx.x + i;  // pairs of about 1
    for (int i = 0; i < kPeakRounds; ++i)
#pragma unroll
        for (unsigned j = 0; j < kPeakSums; ++j)
            mma_m16n8k16(c[j], a, 0x3f803f80u + threadIdx.x * j, 0x3f803f80u + threadIdx.x * j);
    float sum = 0;
    for (const auto& row : c)
        for (const float v : row) sum += v;
    out[blockIdx.x * blockDim.x + threadIdx.x] = sum;
}

inline double mma_peak(Clock& clock) {  // flops per second
    int sms = 0;
    check(cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, 0), "attribute");
    const int blocks = 2 * sms;
    float* const out = device_array<float>(static_cast<std::size_t>(blocks) * kPeakThreads);
    const Timing t = clock.time([&] { start(mma_peak_kernel, blocks, kPeakThreads, 0, out); });
    const double warps = blocks * (kPeakThreads / 32.0);
    return warps * kPeakRounds * kPeakSums * (2.0 * 16 * 8 * 16) / (t.ms * 1e-3);
}

// ---- data and check -----------------------------------------------------------------------------

// 64 random bits that depend on i alone (splitmix64, Steele et al. 2014).
inline std::uint64_t random_bits(std::uint64_t i) {
    i = (i + 1) * 0x9e3779b97f4a7c15u;
    i = (i ^ i >> 30) * 0xbf58476d1ce4e5b9u;
    i = (i ^ i >> 27) * 0x94d049bb133111ebu;
    return i ^ i >> 31;
}
// Mean 0, variance 1, nearly normal: the sum of four uniform numbers of 16 bits.
inline float random_normal(std::uint64_t i) {
    const std::uint64_t bits = random_bits(i);
    double sum = -2.0 * 65535;
    for (int k = 0; k < 64; k += 16) sum += static_cast<double>(bits >> k & 0xffff);
    return static_cast<float>(sum / 37837.2);  // 65536 / sqrt(3)
}
inline std::vector<bf16> random_array(std::size_t n, std::uint64_t seed) {
    std::vector<bf16> v(n);
    for (std::size_t i = 0; i < n; ++i) v[i] = __float2bfloat16_rn(random_normal((seed << 40) + i));
    return v;
}
inline std::vector<float> as_floats(const std::vector<bf16>& v) {
    std::vector<float> f(v.size());
    for (std::size_t i = 0; i < v.size(); ++i) f[i] = __bfloat162float(v[i]);
    return f;
}

// Collects got - want. `allowed` bounds a single error; over all, |got - want| / |want| has to be
// below `limit` in the Euclidean norm: one rounding to bf16 makes 0.0017 of it.
class Errors {
public:
    explicit Errors(double limit) : limit_(limit) {}
    void add(double got, double want, double allowed) {
        const double error = got - want;
        ++n_, error_ += error * error, size_ += want * want;
        if (!(std::fabs(error) <= allowed)) ++wrong_;  // a NaN is not <= anything
    }
    double relative() const { return std::sqrt(error_ / size_); }
    bool good() const { return n_ > 0 && wrong_ == 0 && relative() <= limit_; }
    void print(const std::string& what) const {
        std::printf("%s: %s, %lld values compared, %lld wrong, relative error %.5f\n", what.c_str(),
                    good() ? "right" : "WRONG", n_, wrong_, relative());
    }

private:
    double limit_, error_ = 0, size_ = 0;
    long long n_ = 0, wrong_ = 0;
};

class GemmCase {
public:
    GemmCase(int M, int N, int K)
        : x_(random_array(std::size_t(M) * K, 1)), w_(random_array(std::size_t(N) * K, 2)) {
        problem = {device_array<bf16>(std::size_t(M) * N), upload(x_), upload(w_), M, N, K};
    }
    Gemm problem = {};
    bf16* output() const { return problem.y; }
    std::size_t output_size() const { return std::size_t(problem.M) * problem.N; }
    double flops() const { return 2.0 * problem.M * problem.N * problem.K; }
    std::string shape() const {
        return std::to_string(problem.M) + " x " + std::to_string(problem.N) + " x " +
               std::to_string(problem.K);
    }
    Errors compare(const std::vector<bf16>& y, bool all) const {
        const auto [unused_y, unused_x, unused_w, M, N, K] = problem;
        const std::vector<float> x = as_floats(x_), w = as_floats(w_);
        Errors errors(0.0025);
        const int step = all ? 1 : 8;
        for (int m0 = 0; m0 < M; m0 += step) {
            for (int n0 = 0; n0 < N; n0 += step) {
                const auto bits =
                    random_bits((std::uint64_t{3} << 40) + m0 * std::uint64_t(N) + n0);
                const int m = m0 + int(bits % step), n = n0 + int(bits / 8 % step);
                const float *const row_x = &x[std::size_t(m) * K], *row_w = &w[std::size_t(n) * K];
                double want = 0;
                for (int k = 0; k < K; ++k) want += double{row_x[k]} * row_w[k];
                // half a unit of bf16; and of |x| |w|, which is K or so, what float32 sums lose
                errors.add(double{__bfloat162float(y[std::size_t(m) * N + n])}, want,
                           std::fabs(want) / 256 + 1e-5 * K);
            }
        }
        return errors;
    }

private:
    std::vector<bf16> x_, w_;
};

class AttentionCase {
public:
    AttentionCase(int B, int H, int T) : q_(std::size_t(B) * H * T * kHead), pages_(2 * q_.size()) {
        problem.B = B, problem.H = H, problem.T = T;
        for (int b = 0; b < B; ++b)
            for (int h = 0; h < H; ++h)
                for (int t = 0; t < T; ++t) fill(b, h, t);
        // A quarter of the queries equals a key that it sees, so that key's value is the answer; for
        // another quarter it is a key that must not be seen.
        for (int b = 0; b < B; ++b)
            for (int h = 0; h < H; ++h)
                for (int t = 0; t + 1 < T; ++t) {
                    const auto bits = random_bits((std::uint64_t{4} << 40) + problem.row(b, h, t));
                    const int seen = int(bits / 4 % (t + 1)),
                              hidden = std::min(t + 1 + seen, T - 1);
                    if (bits % 4 > 1) continue;
                    const auto from =
                        pages_.begin() + problem.key(b, h, bits % 4 == 0 ? seen : hidden);
                    std::copy(from, from + kHead, q_.begin() + problem.row(b, h, t));
                }
        problem.z = device_array<bf16>(q_.size());
        problem.q = upload(q_), problem.pages = upload(pages_);
        add_tables();
    }
    Attention problem = {};
    bf16* output() const { return problem.z; }
    std::size_t output_size() const { return q_.size(); }
    double flops() const {  // of the pairs that are seen
        return 4.0 * kHead * problem.B * problem.H * (0.5 * problem.T * (problem.T + 1.0));
    }
    std::string shape() const {
        return "B " + std::to_string(problem.B) + " H " + std::to_string(problem.H) + " T " +
               std::to_string(problem.T) + " hd " + std::to_string(kHead) + ", causal";
    }
    Errors compare(const std::vector<bf16>& z, bool all) const {
        Errors errors(0.004);  // the weights are rounded to bf16 too
        const int step = all ? 1 : kPage;
        for (int b = 0; b < problem.B; ++b)
            for (int h = 0; h < problem.H; ++h)
                for (int t = 0; t < problem.T; t += step) {
                    const auto bits = random_bits((std::uint64_t{5} << 40) + problem.row(b, h, t));
                    compare_row(errors, z, b, h, t + int(bits % step));
                }
        return errors;
    }

private:
    void fill(int b, int h, int t) {
        const int row = problem.row(b, h, t), key = problem.key(b, h, t);
        const float length = 1.2f * std::sqrt(float{kHead});
        for (const bool is_q : {true, false}) {
            float v[kHead], squares = 0;
            const std::uint64_t seed = std::uint64_t{is_q ? 6u : 7u} << 40;
            for (int i = 0; i < kHead; ++i) {
                v[i] = random_normal(seed + row + i);
                squares += v[i] * v[i];
            }
            bf16* const to = is_q ? &q_[row] : &pages_[key];
            for (int i = 0; i < kHead; ++i)
                to[i] = __float2bfloat16_rn(v[i] * length / std::sqrt(squares));
        }
        for (int i = 0; i < kHead; ++i)
            pages_[key + kPage * kHead + i] =
                __float2bfloat16_rn(random_normal((std::uint64_t{8} << 40) + row + i));
    }
    void add_tables() {
        constexpr int kRows = 128;
        std::vector<int> table(std::size_t(problem.B) * problem.T / kPage);
        for (std::size_t i = 0; i < table.size(); ++i) table[i] = int(i);
        std::vector<int4> tiles;
        for (int t = (problem.T - 1) / kRows * kRows; t >= 0; t -= kRows)
            for (int b = 0; b < problem.B; ++b)
                tiles.push_back({b * problem.T + t, std::min(kRows, problem.T - t), t, b});
        problem.page_table = upload(table), problem.tiles = upload(tiles);
        problem.n_tiles = int(tiles.size());
    }
    void compare_row(Errors& errors, const std::vector<bf16>& z, int b, int h, int t) const {
        const int row = problem.row(b, h, t);
        double sum = 0, want[kHead] = {}, size[kHead] = {};  // size: of |v| instead of v
        for (int s = 0; s <= t; ++s) {
            const bf16* const k = &pages_[problem.key(b, h, s)];
            double score = 0;
            for (int i = 0; i < kHead; ++i)
                score += double{__bfloat162float(q_[row + i])} * __bfloat162float(k[i]);
            const double weight = std::exp(score / std::sqrt(double{kHead}));
            sum += weight;
            for (int i = 0; i < kHead; ++i) {
                const double v = __bfloat162float(k[kPage * kHead + i]);
                want[i] += weight * v, size[i] += weight * std::fabs(v);
            }
        }
        for (int i = 0; i < kHead; ++i)  // roundings to bf16: of the result, of each weight
            errors.add(double{__bfloat162float(z[row + i])}, want[i] / sum,
                       (std::fabs(want[i]) + size[i]) / sum / 256 + 1e-4);
    }
    std::vector<bf16> q_, pages_;
};

// ---- a rung -------------------------------------------------------------------------------------

template <class Case, class Problem>
bool is_right(const Case& c, void (*launch)(const Problem&), bool all, double* error = nullptr) {
    const std::size_t bytes = c.output_size() * sizeof(bf16);
    check(cudaMemset(c.output(), 0xff, bytes), "cudaMemset");  // NaN
    launch(c.problem);
    check(cudaDeviceSynchronize(), "kernel");
    const Errors errors = c.compare(download(c.output(), c.output_size()), all);
    errors.print(c.shape());
    if (error != nullptr) *error = errors.relative();
    return errors.good();
}

template <class Case, class Problem>
int climb(const std::string& rung, bool only_check, const Case& small, Case (*make_large)(),
          void (*launch)(const Problem&)) {
    if (!is_right(small, launch, true)) return 1;
    if (only_check) {
        std::printf("{\"rung\": \"%s\", \"checked\": true}\n", rung.c_str());
        return 0;
    }
    const Case large = make_large();
    double error = 0;
    if (!is_right(large, launch, false, &error)) return 1;
    cudaDeviceProp gpu{};
    check(cudaGetDeviceProperties(&gpu, 0), "cudaGetDeviceProperties");
    Clock clock;
    const double peak = mma_peak(clock) / 1e12;
    const Timing t = clock.time([&] { launch(large.problem); });
    const double rate = large.flops() / (t.ms * 1e-3) / 1e12;
    std::printf("%s: %.3f ms (%.3f to %.3f), %.2f TFLOP/s, %.3f of mma.sync's %.1f\n", rung.c_str(),
                t.ms, t.low, t.high, rate, rate / peak, peak);
    std::printf(
        "{\"rung\": \"%s\", \"gpu\": \"%s\", \"shape\": \"%s\", \"ms\": %.4f, "
        "\"min_ms\": %.4f, \"max_ms\": %.4f, \"tflops\": %.3f, \"peak_tflops\": %.2f, "
        "\"share\": %.4f, \"error\": %.6f}\n",
        rung.c_str(), gpu.name, large.shape().c_str(), t.ms, t.low, t.high, rate, peak, rate / peak,
        error);
    return 0;
}

template <class Case, class Problem>
int run(std::string_view file, int argc, char** argv, Case (*make_small)(), Case (*make_large)(),
        void (*launch)(const Problem&)) {
    file = file.substr(file.rfind('/') + 1);
    const std::string rung(file.substr(0, file.find('.')));
    const bool only_check = argc == 2 && std::string_view(argv[1]) == "--check";
    if (argc > 1 && !only_check) {
        std::fprintf(stderr, "usage: %s [--check]\n", rung.c_str());
        return 2;
    }
    int gpus = 0;
    if (const cudaError_t error = cudaGetDeviceCount(&gpus); error != cudaSuccess || gpus == 0) {
        std::printf("skipped: no GPU can be used (%s)\n", cudaGetErrorString(error));
        return 77;
    }
    try {
        return climb(rung, only_check, make_small(), make_large, launch);
    } catch (const std::exception& e) {
        std::fprintf(stderr, "%s: %s\n", rung.c_str(), e.what());
        return 1;
    }
}

inline int run_gemm(const char* file, int argc, char** argv, void (*launch)(const Gemm&)) {
    return run<GemmCase>(
        file, argc, argv, +[] { return GemmCase(256, 512, 384); },
        +[] { return GemmCase(4096, 4096, 4096); }, launch);
}
inline int run_attention(const char* file, int argc, char** argv,
                         void (*launch)(const Attention&)) {
    return run<AttentionCase>(
        file, argc, argv, +[] { return AttentionCase(2, 2, 320); },
        +[] { return AttentionCase(4, 16, 4096); }, launch);
}

}  // namespace ladder
