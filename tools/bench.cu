// bench: each CUDA kernel alone, over the shapes of d12, d20, d26 and d32, against what the GPU can
// do and, for matrix products, against cuBLAS. Markdown tables between marks, for SPEED.md.
//
//   cmake --build build --target bench_cuda      or, in the root of the repository:
//   nvcc -std=c++20 -O3 -arch=native -I. tools/bench.cu -o bench_cuda
//   ./bench_cuda [--group NAME] [--quick] [--no-overlap]
//
//   --group       one of gemm attention rows gemv decode logits; the limits are always measured
//   --quick       fewer repeats, d12 and d20 only, nothing large: to see that everything runs
//   --no-overlap  without programmatic dependent launch, which the model uses where there is one
//
// cuBLAS is opened while running: NANOGPT_CUBLAS (libraries or folders with ':' between them),
// CUDA_HOME, CUDA_PATH, or where the system finds it. Without it its columns say "-".
//
// A figure is the median over repeats of a graph of at least 20 launches, divided by their number;
// beside it the 10th and 90th percentile. Normal random data (zeros draw less power and run
// faster). Buffers change from launch to launch, so that 256 MB lie between two uses of one:
// nothing large is found in the L2 cache. Exit code 1 if an output is no number or not written.
#include <dlfcn.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <numeric>
#include <string>
#include <vector>

#include "kernels.cuh"

namespace {

using namespace nanogpt::cuda;
using nanogpt::cuda::bf16;

constexpr double kCold = 256 << 20;  // bytes between two uses of a buffer: 4 x the L2 of an H200
constexpr int kMinLaunches = 20, kMaxLaunches = 2000, kThreads = 256, kHead = 128, kVocab = 32768;
constexpr int kWarmBuffers = 4;    // of small activations, which the model too finds in the L2
constexpr int kStepVariants = 64;  // sets of rows that decoding's embed goes through
constexpr double kTera = 1e12, kGiga = 1e9;
constexpr float kLog2e = 1.4426950f;

// ---- kernels of the benchmark itself ------------------------------------------------------------

// Normal(0, scale) from a hash of the index (Box-Muller), the same in every run.
template <class T>
__global__ void fill_kernel(T* p, std::size_t n, unsigned seed, float scale) {
    const std::size_t step = std::size_t{gridDim.x} * blockDim.x;
    for (std::size_t i = blockIdx.x * std::size_t{blockDim.x} + threadIdx.x; i < n; i += step) {
        unsigned h = unsigned(i) * 0x9e3779b9u + unsigned(i >> 32) * 0x85ebca6bu + seed;
        h ^= h >> 16, h *= 0x7feb352du, h ^= h >> 15, h *= 0x846ca68bu, h ^= h >> 16;
        unsigned g = h * 0x2c1b3c6du + 0x297a2d39u;
        g ^= g >> 15, g *= 0x846ca68bu, g ^= g >> 16;
        const float u = (static_cast<float>(h >> 8) + 1.0f) * 0x1p-24f;  // in (0, 1]
        const float angle = 6.2831853f * static_cast<float>(g >> 8) * 0x1p-24f;
        p[i] = T(scale * sqrtf(-2 * __logf(u)) * __cosf(angle));
    }
}

// How many values are not numbers of a reasonable size.
template <class T>
__global__ void bad_kernel(const T* p, std::size_t n, unsigned* bad) {
    const std::size_t step = std::size_t{gridDim.x} * blockDim.x;
    for (std::size_t i = blockIdx.x * std::size_t{blockDim.x} + threadIdx.x; i < n; i += step)
        if (!(fabsf(static_cast<float>(p[i])) < 1e30f)) atomicAdd(bad, 1u);
}

// Products from registers, eight sums in turns: what mma.sync can do at most.
constexpr int kPeakThreads = 512, kPeakRounds = 20000, kPeakSums = 8;
static __global__ void __launch_bounds__(kPeakThreads) mma_peak_kernel(float* out) {
    float c[kPeakSums][4] = {};
    std::uint32_t a[4];
    for (unsigned i = 0; i < 4; ++i) a[i] = 0x3f803f80u + threadIdx.x + i;  // pairs of about 1
    for (int i = 0; i < kPeakRounds; ++i)
#pragma unroll
        for (unsigned j = 0; j < kPeakSums; ++j)
            ptx::mma_m16n8k16(c[j], a, 0x3f803f80u + threadIdx.x * j,
                              0x3f803f80u + threadIdx.x * j);
    float sum = 0;
    for (const auto& row : c)
        for (const float v : row) sum += v;
    out[blockIdx.x * blockDim.x + threadIdx.x] = sum;
}

static __global__ void empty_kernel() {
    ptx::pdl_wait();
    ptx::pdl_launch();
}

// The clock of an SM: its cycles in 50 us.
static __global__ void clock_kernel(double* ghz) {
    unsigned long long t0, t1;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(t0));
    const long long c0 = clock64();
    do asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(t1));
    while (t1 - t0 < 50000);
    *ghz = static_cast<double>(clock64() - c0) / static_cast<double>(t1 - t0);
}

// ---- cuBLAS, if it is there ---------------------------------------------------------------------

class Cublas {
public:
    explicit Cublas(cudaStream_t stream) {
        for (const std::string& name : candidates()) {
            std::string light = name;  // which the library itself does not always find
            if (const auto at = light.rfind("libcublas.so"); at != std::string::npos)
                light.replace(at, 9, "libcublasLt");
            dlopen(light.c_str(), RTLD_NOW | RTLD_GLOBAL);
            void* const so = dlopen(name.c_str(), RTLD_NOW | RTLD_GLOBAL);
            if (so != nullptr && open(so, stream)) {
                this->name = name.substr(name.rfind('/') + 1);
                return;
            }
        }
    }
    explicit operator bool() const { return handle_ != nullptr; }

    // y = x w^T + beta y; y is f32 or bf16
    void run(void* y, const bf16* x, const bf16* w, const GemmShape& s, bool f32, bool add) const {
        constexpr int kTransposed = 1, kPlain = 0, kF32 = 0, kBf16 = 14, kComputeF32 = 68;
        const float one = 1, beta = add ? 1 : 0;  // to cuBLAS, column-major, it is y^T = w x^T
        if (gemm_ex_(handle_, kTransposed, kPlain, s.N, s.M, s.K, &one, w, kBf16, s.ldw, x, kBf16,
                     s.ldx, &beta, y, f32 ? kF32 : kBf16, s.ldy, kComputeF32, -1) != 0)
            throw nanogpt::Error(nanogpt::ErrorKind::device, "cublasGemmEx failed");
    }

    std::string name = "none";

private:
    using GemmEx = int (*)(void*, int, int, int, int, int, const void*, const void*, int, int,
                           const void*, int, int, const void*, void*, int, int, int, int);

    static std::vector<std::string> candidates() {
        std::vector<std::string> names;
        std::string list;
        for (const char* variable : {"NANOGPT_CUBLAS", "CUDA_HOME", "CUDA_PATH"})
            if (const char* value = std::getenv(variable)) list += std::string(value) + ":";
        for (std::size_t at = 0, end; (end = list.find(':', at)) != std::string::npos; at = end + 1)
            for (const char* rest :
                 {"", "/libcublas.so.13", "/libcublas.so.12", "/lib/libcublas.so.13",
                  "/lib/libcublas.so.12", "/lib64/libcublas.so", "/nvidia/cu13/lib/libcublas.so.13",
                  "/nvidia/cublas/lib/libcublas.so.12"})
                if (end > at) names.push_back(list.substr(at, end - at) + rest);
        for (const char* name : {"libcublas.so.13", "libcublas.so.12", "libcublas.so"})
            names.emplace_back(name);
        return names;
    }

    bool open(void* so, cudaStream_t stream) {
        constexpr std::size_t kWorkspace = 64 << 20;  // or a capture would have to allocate
        const auto create = reinterpret_cast<int (*)(void**)>(dlsym(so, "cublasCreate_v2"));
        const auto set =
            reinterpret_cast<int (*)(void*, cudaStream_t)>(dlsym(so, "cublasSetStream_v2"));
        const auto space = reinterpret_cast<int (*)(void*, void*, std::size_t)>(
            dlsym(so, "cublasSetWorkspace_v2"));
        gemm_ex_ = reinterpret_cast<GemmEx>(dlsym(so, "cublasGemmEx"));
        void* handle = nullptr;
        if (!create || !set || !space || !gemm_ex_ || create(&handle) != 0) return false;
        workspace_ = Buffer<std::byte>(kWorkspace);
        if (set(handle, stream) != 0 || space(handle, workspace_.get(), kWorkspace) != 0)
            return false;
        handle_ = handle;
        return true;
    }
    GemmEx gemm_ex_ = nullptr;
    void* handle_ = nullptr;  // ends with the process
    Buffer<std::byte> workspace_;
};

// ---- timing and tables --------------------------------------------------------------------------

struct Timing {
    double us = 0, low = 0, high = 0;  // of one launch: median, 10th and 90th percentile
};
struct Limit {  // in flops or bytes per second
    const char* name;
    double rate;
};

// A Markdown table between marks. Work is in flops or bytes, per launch.
class Table {
public:
    Table(const char* mark, const char* title, const char* unit, Limit limit, bool has_peer)
        : mark_(mark), limit_(limit), scale_(*unit == 'T' ? kTera : kGiga), has_peer_(has_peer) {
        std::printf("<!-- cuda_%s -->\n%s\n\n", mark, title);
        std::printf("| kernel | shape | us | p10 to p90 | %s | of %s |%s\n", unit, limit.name,
                    has_peer ? " cuBLAS us | x cuBLAS |" : "");
        std::printf("|---|---|---|---|---|---|%s\n", has_peer ? "---|---|" : "");
    }
    Table(const Table&) = delete;
    Table& operator=(const Table&) = delete;
    ~Table() { std::printf("<!-- /cuda_%s -->\n\n", mark_); }

    // Without work only the time counts. peer.us is 0 where there is no peer.
    void row(const char* kernel, const std::string& shape, const Timing& t, double work,
             const Timing& peer = {}) const {
        const double rate = work / (t.us * 1e-6);
        std::printf("| %s | %s | %.2f | %.2f to %.2f |", kernel, shape.c_str(), t.us, t.low,
                    t.high);
        work > 0 ? std::printf(scale_ == kTera ? " %.1f | %.2f |" : " %.0f | %.2f |", rate / scale_,
                               rate / limit_.rate)
                 : std::printf(" - | - |");
        if (has_peer_)
            peer.us > 0 ? std::printf(" %.2f | %.2f |", peer.us, peer.us / t.us)
                        : std::printf(" - | - |");
        std::printf("\n");
        std::fflush(stdout);
    }

private:
    const char* mark_;
    Limit limit_;
    double scale_;
    bool has_peer_;
};

template <class... Values>
std::string text(const char* format, Values... values) {
    char line[160];
    std::snprintf(line, sizeof line, format, values...);
    return line;
}

template <class T>
Buffer<T> upload(const std::vector<T>& v) {
    Buffer<T> b(v.size());
    NANOGPT_CUDA_CHECK(cudaMemcpy(b.get(), v.data(), v.size() * sizeof(T), cudaMemcpyHostToDevice));
    return b;
}
Buffer<int> page_table(int pages) {  // of sequences that lie one after the other
    std::vector<int> table(pages);
    std::iota(table.begin(), table.end(), 0);
    return upload(table);
}
// n random tokens of each sequence, at positions first, first + 1, ...
Buffer<RowInfo> random_rows(int sequences, int n, int first = 0) {
    static_assert(kVocab == 1 << 15, "the upper 15 of 32 bits");
    std::vector<RowInfo> rows;
    std::uint32_t state = 12345;
    for (int s = 0, id = 0; s < sequences; ++s) {
        for (int t = 0; t < n; ++t) {
            const int previous = id;
            state = state * 1664525u + 1013904223u;  // the generator of Numerical Recipes
            id = static_cast<int>(state >> 17);
            rows.push_back({.id = id, .previous = previous, .pos = first + t, .slot = s});
        }
    }
    return upload(rows);
}

// Sets of buffers, `footprint` bytes each, that it takes to find them cold.
int turns_of(double footprint) { return static_cast<int>(kCold / footprint) + 1; }

// ---- the benchmark ------------------------------------------------------------------------------

class Bench {
public:
    Bench(const nanogpt::GpuInfo& gpu, bool quick, bool overlap) : quick_(quick) {
        device_ = {gpu.sms, static_cast<int>(gpu.shared_bytes), stream_.get(),
                   overlap && gpu.overlap, counters_.get()};
        events_.resize(quick ? 6 : 32);
        for (cudaEvent_t& e : events_) NANOGPT_CUDA_CHECK(cudaEventCreate(&e));
        if (!quick) models_.insert(models_.end(), {{"d26", 1664}, {"d32", 2048}});
        fill(x_, 1, 1.0f), fill(w_, 2, 0.02f), fill(f_, 3, 1.0f);
        std::printf("%s, compute capability %d.%d, %d SMs, L2 %d MB, %s; cuBLAS: %s; launches %s\n",
                    gpu.name.c_str(), gpu.major, gpu.minor, gpu.sms, int(gpu.l2_bytes >> 20),
                    nanogpt::cuda_versions().c_str(), cublas_.name.c_str(),
                    device_.overlap ? "overlap" : "do not overlap");
    }
    Bench(const Bench&) = delete;
    Bench& operator=(const Bench&) = delete;
    ~Bench() {
        for (const cudaEvent_t e : events_) cudaEventDestroy(e);
    }

    void limits() {
        warm_up();
        const auto seconds = [](const std::vector<double>& us) { return us[us.size() / 2] * 1e-6; };
        const double warps = 2.0 * device_.sms * kPeakThreads / 32;
        const double flops = warps * kPeakRounds * kPeakSums * (2 * 16 * 8 * 16);
        mma_.rate = flops / seconds(repeat([&] { peak(); }));
        read_.rate = nanogpt::cuda_read_bandwidth();
        const std::size_t bytes = f_.size() * sizeof(float);
        copy_.rate =
            2.0 * bytes / seconds(repeat([&] {
                NANOGPT_CUDA_CHECK(cudaMemcpyAsync(out_.get(), f_.get(), bytes,
                                                   cudaMemcpyDeviceToDevice, device_.stream));
            }));
        std::printf("\n<!-- cuda_limits -->\n| limit | measured |\n|---|---|\n");
        std::printf("| mma.sync bf16 with float32 sums, from registers | %.1f TFLOP/s |\n",
                    mma_.rate / kTera);
        std::printf("| read, 1 GiB | %.0f GB/s |\n", read_.rate / kGiga);
        std::printf("| copy, 512 MiB, read and written | %.0f GB/s |\n", copy_.rate / kGiga);
        for (const bool overlap : {false, true}) {
            if (overlap && !device_.overlap) continue;
            const Launch l{dim3(device_.sms), kThreads, 0, device_.stream, overlap};
            const Timing t = measure([&](int) { launch(l, empty_kernel); }, 1000);
            std::printf("| empty kernel in a graph%s | %.2f us |\n", overlap ? ", overlap" : "",
                        t.us);
        }
        std::printf("<!-- /cuda_limits -->\n\n");
    }

    void gemm_group() {
        const Table table(
            "gemm",
            "Products of prompts, M x N x K, with what the model does to the sums: "
            "store bf16, relu^2, add to float32. cuBLAS does the same but for relu^2.",
            "TFLOP/s", mma_, true);
        for (const auto& [name, D] : models_) {
            for (const int T : {1024, 2048}) {
                gemm_case(table, name, "gemm qkv, store", Epilogue::store, T, 3 * D, D);
                gemm_case(table, name, "gemm attn.c_proj, add", Epilogue::add, T, D, D);
                gemm_case(table, name, "gemm c_fc, relu2", Epilogue::relu2, T, 4 * D, D);
                gemm_case(table, name, "gemm mlp.c_proj, add", Epilogue::add, T, D, 4 * D);
            }
        }
        for (const int n : {4096, 8192})
            if (!quick_) gemm_case(table, "cube", "gemm, store", Epilogue::store, n, n, n);
    }

    void attention_group() {
        const Table table(
            "attention",
            "Attention of prompts, T tokens of B sequences. Only visible pairs count: "
            "4 hd H B sum over t of visible(t) operations.",
            "TFLOP/s", mma_, false);
        if (!quick_) attention_case<128>(table, "large", 4, 16, 4096, 4096);
        if (!quick_) attention_case<64>(table, "large", 4, 16, 4096, 4096);
        for (const auto& [name, D] : models_)
            for (const int window : {2048, 512})
                attention_case<kHead>(table, name, 1, D / kHead, 1024, window);
    }

    void rows_group() {
        const Table table(
            "rows",
            "What a prompt does row by row. Bytes: rms_norm 6 a value, with a layer's "
            "entry 14; rotary qkv in and out, and the value embedding; embed 6.",
            "GB/s", copy_, false);
        const auto all = [&](const char* name, int T, int D) {
            norm_case<NormInput::plain>(table, name, T, D);
            norm_case<NormInput::entry>(table, name, T, D);
            rotary_case(table, name, T, D / kHead, false);
            rotary_case(table, name, T, D / kHead, true);
            embed_case(table, name, T, D, false);
        };
        if (!quick_) all("large", 8192, 2048);
        for (const auto& [name, D] : models_) all(name, 1024, D);
    }

    void gemv_group() {
        using enum GemvOutput;
        const Table table(
            "gemv",
            "Products of single tokens of M sequences with N x K weights, whose bytes "
            "count. Scaling, relu^2 and the residual stream's mixing are ours alone.",
            "GB/s", read_, true);
        for (const auto& [name, D] : models_) {
            for (const int M : {1, 8, 16, 32}) {
                gemv_case<scaled_f32>(table, name, "gemv qkv", M, 3 * D, D);
                gemv_case<residual>(table, name, "gemv attn.c_proj", M, D, D);
                gemv_case<relu2>(table, name, "gemv c_fc", M, 4 * D, D);
                gemv_case<residual>(table, name, "gemv mlp.c_proj", M, D, 4 * D);
                gemv_case<scaled_f32>(table, name, "gemv lm_head", M, kVocab, D);
            }
        }
    }

    void decode_group() {
        const Table table(
            "decode",
            "Attention of single tokens of R sequences, with a value embedding (bytes: "
            "visible keys and values in the cache); and the start of a step.",
            "GB/s", read_, false);
        for (const auto& [name, D] : models_)
            for (const int R : {1, 32})
                for (const int window : {2048, 512}) decode_case(table, name, R, D / kHead, window);
        for (const auto& [name, D] : models_)
            for (const int R : {1, 32}) embed_case(table, name, R, D, true);
    }

    void logits_group() {
        const Table table("logits",
                          "From logits to tokens, R rows; the logits are in the L2 cache, where "
                          "lm_head has just put them.",
                          "GB/s", read_, false);
        for (const int R : {1, 32}) draw_case(table, R, 1), draw_case(table, R, 50);
    }

    void run(const char* name, void (Bench::*group)()) {
        warm_up();
        const double before = clock_ghz();
        (this->*group)();
        std::printf("%s: SM clock %.2f GHz before, %.2f GHz after\n\n", name, before, clock_ghz());
    }
    bool failed() const { return failed_; }

private:
    template <class T>
    void fill(const Buffer<T>& b, unsigned seed, float scale) {
        launch({dim3(4 * device_.sms), kThreads, 0, device_.stream}, fill_kernel<T>, b.get(),
               b.size(), seed, scale);
    }
    // All bits set, or none: what is not written is found to be NaN afterwards.
    void clear(std::size_t bytes, bool zero = false) {
        NANOGPT_CUDA_CHECK(cudaMemsetAsync(out_.get(), zero ? 0 : 0xff, bytes, device_.stream));
    }
    template <class T>
    T* out(std::size_t byte = 0) const {
        return reinterpret_cast<T*>(out_.get() + byte);
    }
    template <class T>
    void check_numbers(const char* what, const T* p, std::size_t n) {
        unsigned bad = 0;
        NANOGPT_CUDA_CHECK(cudaMemsetAsync(bad_.get(), 0, sizeof bad, device_.stream));
        launch({dim3(4 * device_.sms), kThreads, 0, device_.stream}, bad_kernel<T>, p, n,
               bad_.get());
        NANOGPT_CUDA_CHECK(cudaStreamSynchronize(device_.stream));
        NANOGPT_CUDA_CHECK(cudaMemcpy(&bad, bad_.get(), sizeof bad, cudaMemcpyDeviceToHost));
        if (bad == 0) return;
        std::fprintf(stderr, "bench: %s: %u of %zu values are not numbers\n", what, bad, n);
        failed_ = true;
    }
    void peak() {
        launch({dim3(2 * device_.sms), kPeakThreads, 0, device_.stream}, mma_peak_kernel,
               out<float>());
    }
    void warm_up() {  // 0.3 s, so that the clocks are those of work
        const auto begin = std::chrono::steady_clock::now();
        while (std::chrono::steady_clock::now() - begin < std::chrono::milliseconds(300)) {
            peak();
            NANOGPT_CUDA_CHECK(cudaStreamSynchronize(device_.stream));
        }
    }
    double clock_ghz() {
        double ghz = 0;
        launch({1, 1, 0, device_.stream}, clock_kernel, out<double>());
        NANOGPT_CUDA_CHECK(cudaStreamSynchronize(device_.stream));
        NANOGPT_CUDA_CHECK(cudaMemcpy(&ghz, out_.get(), sizeof ghz, cudaMemcpyDeviceToHost));
        return ghz;
    }

    // Microseconds of each repeat, sorted. All are sent before any is waited for: what the host
    // needs to send one is hidden behind the others. The first, which is not, does not count.
    std::vector<double> repeat(const std::function<void()>& work) {
        for (const cudaEvent_t e : events_) {
            work();
            NANOGPT_CUDA_CHECK(cudaEventRecord(e, device_.stream));
        }
        NANOGPT_CUDA_CHECK(cudaStreamSynchronize(device_.stream));
        std::vector<double> us;
        for (std::size_t i = 1; i + 1 < events_.size(); ++i) {
            float ms = 0;
            NANOGPT_CUDA_CHECK(cudaEventElapsedTime(&ms, events_[i], events_[i + 1]));
            us.push_back(1e3 * ms);
        }
        std::sort(us.begin(), us.end());
        return us;
    }

    // call(i) is one launch, with the buffers number i of `turns`. A graph takes a millisecond or
    // more, beside which the microsecond or two between graphs do not count.
    Timing measure(const std::function<void(int)>& call, int turns) {
        constexpr double kGraphMs = 1;
        call(0);  // loads the kernel, which a capture could not wait for
        NANOGPT_CUDA_CHECK(cudaStreamSynchronize(device_.stream));
        std::unique_ptr<Graph> graph;
        const auto capture = [&](int n) {
            graph = std::make_unique<Graph>();
            graph->capture(device_.stream, [&] {
                for (int i = 0; i < n; ++i) call(i % turns);
            });
        };
        int n = std::max(kMinLaunches, turns);
        capture(n);
        for (int i = 0; i < 2; ++i) {
            graph->launch(device_.stream);
            NANOGPT_CUDA_CHECK(cudaEventRecord(events_[i], device_.stream));
        }
        NANOGPT_CUDA_CHECK(cudaStreamSynchronize(device_.stream));
        float ms = 0;
        NANOGPT_CUDA_CHECK(cudaEventElapsedTime(&ms, events_[0], events_[1]));
        if (ms < kGraphMs) {
            n = std::max(n, std::min(kMaxLaunches, static_cast<int>(n * kGraphMs / ms) + 1));
            capture(n);
        }
        const std::vector<double> us = repeat([&] { graph->launch(device_.stream); });
        const std::size_t tenth = us.size() / 10;
        return {us[us.size() / 2] / n, us[tenth] / n, us[us.size() - 1 - tenth] / n};
    }

    // ---- prompts

    void gemm_case(const Table& table, const char* name, const char* kernel, Epilogue e, int M,
                   int N, int K) {
        const GemmShape s{M, N, K, K, K, N};
        const bool add = e == Epilogue::add;
        const auto nx = std::size_t(M) * K, nw = std::size_t(N) * K, ny = std::size_t(M) * N;
        const std::size_t bytes = ny * (add ? sizeof(float) : sizeof(bf16));
        const int turns = turns_of(2.0 * (nx + nw) + bytes);
        clear(turns * bytes, add);
        const auto ours = [&](int i) {
            void* const y = out<void>(i * bytes);
            const bf16 *const x = x_.get() + i * nx, *const w = w_.get() + i * nw;
            if (add)
                gemm<Epilogue::add>(device_, y, x, w, s);
            else if (e == Epilogue::relu2)
                gemm<Epilogue::relu2>(device_, y, x, w, s);
            else
                gemm<Epilogue::store>(device_, y, x, w, s);
        };
        const auto theirs = [&](int i) {
            cublas_.run(out<void>(i * bytes), x_.get() + i * nx, w_.get() + i * nw, s, add, add);
        };
        const Timing t = measure(ours, turns);
        add ? check_numbers(kernel, out<float>(), turns * ny)
            : check_numbers(kernel, out<bf16>(), turns * ny);
        const Timing peer = cublas_ ? measure(theirs, turns) : Timing{};
        table.row(kernel, text("%s %d x %d x %d", name, M, N, K), t, 2.0 * M * N * K, peer);
    }

    template <int HD>
    void attention_case(const Table& table, const char* name, int B, int H, int T, int window) {
        std::vector<QueryTile> tiles;  // those with the most keys first, as the backend has them
        for (int pos = (T - 1) / kQueryRows * kQueryRows; pos >= 0; pos -= kQueryRows)
            for (int b = 0; b < B; ++b)
                tiles.push_back({b * T + pos, std::min(kQueryRows, T - pos), pos, b});
        const auto d_tiles = upload(tiles);
        const auto pages = page_table(B * T / kPage);
        double pairs = 0;
        for (int t = 0; t < T; ++t) pairs += std::min(t, window) + 1;
        const std::int64_t n = std::int64_t{B} * T * H * HD;  // of q, of k, of v, of z
        const int turns = turns_of(4.0 * n * sizeof(bf16));
        const float root = std::sqrt(static_cast<float>(HD));
        AttentionArgs a{};
        a.ldz = a.ldq = H * HD, a.n_head = a.n_kv_head = H, a.hd = HD, a.window = window;
        a.page_table = pages.get(), a.max_pages = T / kPage;
        a.page_stride = std::int64_t{2} * H * kPage * HD;
        a.tiles = d_tiles.get(), a.n_tiles = static_cast<int>(tiles.size());
        a.scale_log2 = kLog2e / root, a.shift_log2 = kLog2e * 1.44f * root;
        clear(turns * n * sizeof(bf16));
        const auto call = [&](int i) {
            a.z = out<bf16>() + i * n, a.q = x_.get() + i * n;
            a.pages = x_.get() + (turns + 2 * i) * n;
            prefill_attention<HD>(device_, a);
        };
        const Timing t = measure(call, turns);
        check_numbers("prefill_attention", out<bf16>(), turns * n);
        const std::string sight = window >= T ? "causal" : text("window %d", window);
        table.row("prefill_attention",
                  text("%s B %d H %d T %d hd %d, %s", name, B, H, T, HD, sight.c_str()), t,
                  4.0 * HD * H * B * pairs);
    }

    // In place, as the model does it: x = 0.9 x + 0.1 x0 stays as large as x0.
    template <NormInput input>
    void norm_case(const Table& table, const char* name, int T, int D) {
        constexpr bool kEntry = input == NormInput::entry;
        const std::int64_t n = std::int64_t{T} * D;
        const double bytes = (kEntry ? 14.0 : 6.0) * n;
        const int turns = turns_of(bytes);
        NormArgs a{.y = nullptr, .x = nullptr, .entry = {0.9f, 0.1f}, .T = T, .D = D, .ld = D};
        clear(turns * n * sizeof(bf16));
        const auto call = [&](int i) {
            a.y = out<bf16>() + i * n;
            a.x = a.x_out = f_.get() + i * n, a.x0 = f_.get() + f_.size() / 2 + i * n;
            rms_norm<input>(device_, a);
        };
        const Timing t = measure(call, turns);
        check_numbers("rms_norm", out<bf16>(), turns * n);
        table.row(kEntry ? "rms_norm, entry" : "rms_norm", text("%s T %d D %d", name, T, D), t,
                  bytes);
    }

    HeadArgs head_args(const RowInfo* rows, int H, bool value_embed) const {
        constexpr int kGateChannels = 12;  // as G4 has them; any values do for cos and sin
        return {rows,  f_.get(), f_.get() + f_.size() / 2,         H,        H,
                kHead, 1.2f,     value_embed ? w_.get() : nullptr, f_.get(), kGateChannels,
                3.0f};
    }

    void rotary_case(const Table& table, const char* name, int T, int H, bool value_embed) {
        const std::int64_t n = std::int64_t{T} * H * kHead;  // of q, of k, of v
        const double bytes = (value_embed ? 14.0 : 12.0) * n;
        const int turns = turns_of(bytes);
        const auto pages = page_table(T / kPage);
        const auto rows = random_rows(turns, T);  // a turn has its own value embeddings
        RotaryArgs a{};
        a.cache.table = pages.get(), a.cache.max_pages = 0;  // the pages of all turns, from `pages`
        a.cache.page_stride = std::int64_t{2} * H * kPage * kHead;
        a.ld = 3 * H * kHead, a.ld_h = H * kHead, a.T = T;
        clear(3 * turns * n * sizeof(bf16));
        const auto call = [&](int i) {
            a.head = head_args(rows.get() + i * T, H, value_embed);
            a.qkv = x_.get() + i * 3 * n, a.h = w_.get() + i * n;
            a.q = out<bf16>() + i * n, a.cache.pages = out<bf16>() + (turns + 2 * i) * n;
            rotary<kHead>(device_, a);
        };
        const Timing t = measure(call, turns);
        check_numbers("rotary", out<bf16>(), 3 * turns * n);
        table.row(value_embed ? "rotary, value embedding" : "rotary",
                  text("%s T %d H %d hd %d", name, T, H, kHead), t, bytes);
    }

    void embed_case(const Table& table, const char* name, int T, int D, bool decode) {
        const std::int64_t n = std::int64_t{T} * D;
        const double bytes = 6.0 * n;  // wte once (a row is the next one's `previous`), x0
        const int turns = decode ? kStepVariants : turns_of(bytes);
        const auto rows = random_rows(turns, T);
        EmbedArgs a{};
        a.wte = w_.get(), a.smear_gate = x_.get(), a.smear_channels = 24, a.smear_lambda = 0.5f;
        a.D = a.ld = D, a.entry = {0.9f, 0.1f};
        a.x = f_.get(), a.xb = out<bf16>(out_.size() / 2),
        a.squares = out<float>(out_.size() / 4 * 3);
        clear(turns * n * sizeof(float));
        const auto call = [&](int i) {
            a.rows = rows.get() + i * T, a.x0 = out<float>() + i * n;
            embed(device_, a, T, decode);
        };
        const Timing t = measure(call, turns);
        check_numbers("embed", out<float>(), turns * n);
        table.row(decode ? "embed, decode" : "embed", text("%s T %d D %d", name, T, D), t,
                  decode ? 0 : bytes);
    }

    // ---- single tokens

    template <GemvOutput output>
    void gemv_case(const Table& table, const char* name, const char* kernel, int M, int N, int K) {
        constexpr bool kResidual = output == GemvOutput::residual,
                       kF32 = output != GemvOutput::relu2;
        const auto nx = std::size_t(M) * K, nw = std::size_t(N) * K, ny = std::size_t(M) * N;
        const std::size_t bytes = ny * (kF32 ? sizeof(float) : sizeof(bf16));
        // two launches in a row never share a residual stream: the second reads it before it waits
        const int turns = pad(turns_of(2.0 * nw), kWarmBuffers);
        const auto squares = upload(std::vector<float>(nx / kSumColumns, kSumColumns));
        const auto rows = random_rows(M, 1);
        GemvArgs a{};
        a.M = M, a.N = a.ld = N, a.K = a.D = K, a.x0 = f_.get(), a.rows = rows.get();
        a.squares = kResidual ? nullptr : squares.get();
        a.entry = {0.9f, 0.1f};  // the residual stream stays bounded
        clear(kWarmBuffers * bytes, kResidual);
        const auto ours = [&](int i) {
            const int b = i % kWarmBuffers;
            a.x = x_.get() + b * nx, a.w = w_.get() + i * nw;
            a.y = a.x_out = out<float>(b * bytes);
            a.xb_out = out<bf16>(out_.size() / 4) + b * ny;
            a.squares_out = out<float>(out_.size() / 2) + b * ny;
            gemv<output>(device_, a);
        };
        const auto theirs = [&](int i) {
            const int b = i % kWarmBuffers;
            cublas_.run(out<void>(b * bytes), x_.get() + b * nx, w_.get() + i * nw,
                        {M, N, K, K, K, N}, kF32, kResidual);
        };
        const Timing t = measure(ours, turns);
        kF32 ? check_numbers(kernel, out<float>(), kWarmBuffers * ny)
             : check_numbers(kernel, out<bf16>(), kWarmBuffers * ny);
        const Timing peer = cublas_ ? measure(theirs, turns) : Timing{};
        table.row(kernel, text("%s M %d, %d x %d", name, M, N, K), t, 2.0 * nw, peer);
    }

    void decode_case(const Table& table, const char* name, int R, int H, int window) {
        using A = DecodeAttentionTraits;
        constexpr int kContext = 1024, kPages = kContext / kPage;
        const std::int64_t page = std::int64_t{2} * H * kPage * kHead, tasks = std::int64_t{R} * H;
        const int visible = std::min(kContext - 1, window);  // the newest is not in the cache yet
        const double bytes = 4.0 * kHead * visible * tasks;
        const int turns = turns_of(bytes), D = H * kHead;
        const auto pages = page_table(R * kPages);
        const auto rows = random_rows(R, 1, kContext - 1);
        const auto squares = upload(std::vector<float>(tasks * kHead / kSumColumns, kSumColumns));
        const Buffer<float> partial(tasks * A::kSplits * (kHead + 1));
        const Buffer<int> arrived(tasks);
        const float root = std::sqrt(static_cast<float>(kHead));
        DecodeAttentionArgs a{};
        a.head = head_args(rows.get(), H, true);
        a.cache.table = pages.get(), a.cache.max_pages = kPages, a.cache.page_stride = page;
        a.qkv = f_.get(), a.ld = 3 * D, a.window = window;
        a.xb = w_.get(), a.squares = squares.get(), a.ld_x = a.D = a.ld_z = D;
        a.scale_log2 = kLog2e / root, a.shift_log2 = kLog2e * 1.44f * root;
        a.partial = partial.get(), a.arrived = arrived.get(), a.z = out<bf16>();
        clear(tasks * kHead * sizeof(bf16));
        const auto call = [&](int i) {
            a.cache.pages = x_.get() + i * R * kPages * page;
            decode_attention<kHead>(device_, a, R);
        };
        const Timing t = measure(call, turns);
        check_numbers("decode_attention", out<bf16>(), tasks * kHead);
        const std::string sight = window >= kContext ? "full" : text("window %d", window);
        table.row("decode_attention",
                  text("%s R %d H %d, context %d, %s", name, R, H, kContext, sight.c_str()), t,
                  bytes);
    }

    void draw_case(const Table& table, int R, int top_k) {
        std::vector<Draw> draws(R);
        for (int r = 0; r < R; ++r)
            draws[r] = {(r + 0.5) / R, top_k == 1 ? 0.0f : 0.8f, 1.0f, top_k};
        const auto d_draws = upload(draws);
        const auto rows = random_rows(R, 1);
        const Buffer<int> tokens(R);
        const DrawArgs a{f_.get(), kVocab, kVocab, d_draws.get(), rows.get(), tokens.get(), 0};
        const Timing t = measure([&](int) { draw(device_, a, R); }, 1);
        std::vector<int> drawn(R);
        NANOGPT_CUDA_CHECK(
            cudaMemcpy(drawn.data(), tokens.get(), R * sizeof(int), cudaMemcpyDeviceToHost));
        for (const int token : drawn) {
            if (token >= 0 && token < kVocab) continue;
            std::fprintf(stderr, "bench: draw: there is no token %d\n", token);
            failed_ = true;
        }
        table.row(top_k == 1 ? "draw, greedy" : "draw, top-k 50", text("R %d V %d", R, kVocab), t,
                  0);
    }

    struct Named {
        const char* name;
        int D;  // n_embd; the heads have 128
    };
    bool quick_, failed_ = false;
    Stream stream_;
    Buffer<int> counters_{kGemmCounters};
    Device device_;
    Cublas cublas_{stream_.get()};
    Limit mma_{"mma.sync", 0}, read_{"read", 0}, copy_{"copy", 0};
    std::vector<cudaEvent_t> events_;
    std::vector<Named> models_{{"d12", 768}, {"d20", 1280}};
    // normal values to read: activations (1 GiB), weights and float32 (512 MiB); 1 GiB to write to
    Buffer<bf16> x_{std::size_t{1} << 29}, w_{std::size_t{1} << 28};
    Buffer<float> f_{std::size_t{1} << 27};
    Buffer<std::byte> out_{std::size_t{1} << 30};
    Buffer<unsigned> bad_{1};
};

int bench(int argc, char** argv) {
    const struct {
        const char* name;
        void (Bench::*run)();
    } groups[] = {{"gemm", &Bench::gemm_group},     {"attention", &Bench::attention_group},
                  {"rows", &Bench::rows_group},     {"gemv", &Bench::gemv_group},
                  {"decode", &Bench::decode_group}, {"logits", &Bench::logits_group}};
    const auto begin = std::chrono::steady_clock::now();
    std::string only;
    bool quick = false, overlap = true, understood = true;
    for (int i = 1; i < argc; ++i) {
        const std::string word = argv[i];
        if (word == "--quick")
            quick = true;
        else if (word == "--no-overlap")
            overlap = false;
        else if (word == "--group" && i + 1 < argc)
            only = argv[++i];
        else
            understood = false;
    }
    const auto known = [&](const auto& g) { return only.empty() || only == g.name; };
    if (!understood || std::none_of(std::begin(groups), std::end(groups), known)) {
        std::fprintf(stderr, "usage: %s [--group NAME] [--quick] [--no-overlap]\n", argv[0]);
        return 2;
    }
    if (const std::string problem = nanogpt::cuda_problem(); !problem.empty()) {
        std::fprintf(stderr, "bench: %s\n", problem.c_str());
        return 1;
    }
    NANOGPT_CUDA_CHECK(cudaSetDevice(0));
    Bench b(nanogpt::find_gpus().at(0), quick, overlap);
    b.limits();
    for (const auto& g : groups)
        if (known(g)) b.run(g.name, g.run);
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - begin;
    std::printf("%s, %.1f s\n", b.failed() ? "FAILED" : "ok", seconds.count());
    return b.failed() ? 1 : 0;
}

}  // namespace

int main(int argc, char** argv) {
    try {
        return bench(argc, argv);
    } catch (const std::exception& e) {
        std::fprintf(stderr, "bench: %s\n", e.what());
        return 1;
    }
}
