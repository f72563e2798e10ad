// kernels.cuh: nanochat models on NVIDIA GPUs. Hand-written kernels, and open_cuda, which makes of
// them the same Backend that nanogpt.hpp has for the CPU. Compile with nvcc 12.8 or later.
// ==== 0. manual ==================================================================================
//
//   #include "kernels.cuh"                                            // includes nanogpt.hpp
//   auto model = nanogpt::load_model(dir, {.dtype = nanogpt::DType::bf16});
//   auto gpu = nanogpt::open_cuda(model);                             // throws Error if it cannot
//   auto sequence = gpu->new_sequence(1024);                          // then as with open_cpu
//   nvcc -std=c++20 -O3 -arch=native app.cu -o app
//
// GPUs: Ampere (compute capability 8.0) and later. Tuned for the GB10 (sm_121: 48 multiprocessors,
// 99 KB of shared memory for a block, 235 GB/s) and proven on an H200 (sm_90); both run the same
// tensor-core instruction, mma.sync. CMake builds native code for these two and PTX for the others.
//
// Contents
//   0. manual
//   1. device     errors, memory, launches
//   2. ptx        functions for machine instructions without a C++ word; mma_m16n8k16: tensor cores
//   3. reduce     sums over lanes, pairs of bf16
//   4. embed      rows of wte, normalised and smeared
//   5. norm       RMSNorm, with the residual stream's mixing
//   6. rotary     prompts: rotation, QK norm, value embedding, keys and values into the KV cache
//   7. gemv       products with a few rows: decoding
//   8. gemm       products with many rows: prompts
//   9. attention  prompts (flash attention); decoding (over shares of the keys, with 6 in it)
//   10. logits    the draw of a token: draw_kernel
//   11. backend   weights, memory, passes, graphs (capture); gpu_info (can it run?), open_cuda
//
// Notation: nanogpt.hpp's alphabet (B, T, S, D, L, H, K, hd, V), R rows of a decode step, HD the
// head size rounded up to 64, 128 or 256 with zeros; M, N, K inside gemm and gemv as BLAS has them.
// A shape is (rows, columns) type, row-major. `ld` is a row stride in values.
//
// Precision: weights, activations between kernels and the cache are bf16; sums, the residual stream
// and logits are float32.
//
// Same bits: a row's result does not depend on what else is in the step. Every product sums K in
// one order that M does not change, every reduction has a fixed order, no float is added atomically,
// and keys are visited by position. Prompts and single tokens go through different kernels: between
// the two, and against the CPU, bf16's tolerance holds (about 0.005 of the logits' length).
//
// Threads and streams: one backend, one stream, one thread at a time. Sequences may outlive their
// backend but cannot be stepped then. A step allocates no device memory, unless an observer watches
// it; an observed step sends single tokens through the prompt's kernels too.
//
// Overlap: on Hopper and later a kernel may start while the one before it still runs. Every block
// calls ptx::pdl_wait() before it lets the next kernel start, so only the kernel just before can
// still be running; before its wait a block reads nothing that that one writes.

#pragma once
#ifndef __CUDACC__
#error "kernels.cuh holds CUDA kernels: compile with nvcc (nanogpt.hpp alone needs no CUDA)"
#endif

#include <cuda_bf16.h>     // __nv_bfloat16
#include <cuda_runtime.h>  // cudaMalloc, cudaLaunchKernelEx

#include <algorithm>         // sort, min, max, find_if
#include <climits>           // INT_MAX
#include <cmath>             // sqrt
#include <cstdint>           // int64_t
#include <initializer_list>  // initializer_list
#include <iterator>          // begin, size
#include <limits>            // numeric_limits
#include <memory>            // unique_ptr
#include <optional>          // optional
#include <span>              // span
#include <string>            // string
#include <string_view>       // string_view
#include <type_traits>       // integral_constant
#include <utility>           // exchange, swap
#include <vector>            // vector

#include "nanogpt.hpp"  // Backend, Model, Config, Error

// ==== 1. device ==================================================================================
// What every launch needs: errors that name the call, memory that frees itself, one way to launch.

#define NANOGPT_CUDA_CHECK(call) ::nanogpt::cuda::check((call), #call, __FILE__, __LINE__)

namespace nanogpt {
inline namespace v0 {
namespace cuda {

using bf16 = __nv_bfloat16;

// Throws device, or out_of_memory, with CUDA's name of the error and the call that gave it.
inline void check(cudaError_t error, const char* call, const char* file, int line) {
    if (error == cudaSuccess) return;
    cudaGetLastError();  // an error that is not sticky must not be found again by the next check
    const std::string_view path = file;
    throw Error(error == cudaErrorMemoryAllocation ? ErrorKind::out_of_memory : ErrorKind::device,
                std::string("CUDA: ") + cudaGetErrorName(error) + " (" + cudaGetErrorString(error) +
                    ") from " + call + " in " + std::string(path.substr(path.rfind('/') + 1)) +
                    ":" + std::to_string(line));
}

// Memory for n values, freed by its owner: the device's, all bytes zero, or if pinned the host's,
// which the GPU reads and writes by itself.
template <class T, bool pinned = false>
class Buffer {
public:
    Buffer() = default;
    explicit Buffer(std::size_t n) : n_(n) {
        if (n == 0) return;
        if constexpr (pinned) {
            NANOGPT_CUDA_CHECK(cudaHostAlloc(&data_, n * sizeof(T), cudaHostAllocMapped));
            std::fill_n(data_, n, T{});
        } else {
            NANOGPT_CUDA_CHECK(cudaMalloc(&data_, n * sizeof(T)));
            NANOGPT_CUDA_CHECK(cudaMemset(data_, 0, n * sizeof(T)));
            NANOGPT_CUDA_CHECK(cudaDeviceSynchronize());  // our stream does not wait for this one
        }
    }
    Buffer(Buffer&& other) noexcept
        : data_(std::exchange(other.data_, nullptr)), n_(std::exchange(other.n_, 0)) {}
    Buffer& operator=(Buffer&& other) noexcept {
        std::swap(data_, other.data_), std::swap(n_, other.n_);
        return *this;
    }
    ~Buffer() { pinned ? cudaFreeHost(data_) : cudaFree(data_); }
    T* get() const { return data_; }
    T& operator[](std::size_t i) const { return data_[i]; }  // of pinned memory
    std::size_t size() const { return n_; }                  // in values

private:
    T* data_ = nullptr;
    std::size_t n_ = 0;
};
template <class T>
using Pinned = Buffer<T, true>;

template <class T>
__host__ __device__ constexpr T cdiv(T a, T b) {
    return (a + b - 1) / b;
}

// Launches kernel<<<grid, block, shared_bytes, stream>>>(args...). With `overlap` the kernel may
// start while its predecessor in the stream still runs ("programmatic dependent launch", Hopper
// and later): it then must not touch what that one writes before it has called ptx::pdl_wait().
struct Launch {
    dim3 grid, block;
    std::size_t shared_bytes = 0;
    cudaStream_t stream = nullptr;
    bool overlap = false;
};
template <class... Parameters, class... Arguments>
void launch(const Launch& l, void (*kernel)(Parameters...), Arguments&&... arguments) {
    if (l.shared_bytes > 48 * 1024) {  // more has to be asked for
        NANOGPT_CUDA_CHECK(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                static_cast<int>(l.shared_bytes)));
    }
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = l.grid;
    config.blockDim = l.block;
    config.dynamicSmemBytes = l.shared_bytes;
    config.stream = l.stream;
    config.attrs = &attribute;
    config.numAttrs = l.overlap ? 1 : 0;
    NANOGPT_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...));
}

}  // namespace cuda

// ==== 2. ptx =====================================================================================
// One wrapper per machine instruction that C++ has no word for. Section numbers are those of
// NVIDIA's "Parallel Thread Execution ISA".

namespace cuda::ptx {

// Address of shared memory as the instructions below want it.
__device__ inline std::uint32_t shared(const void* p) {
    return static_cast<std::uint32_t>(__cvta_generic_to_shared(p));
}

// cp.async (9.7.9.25.3): 16 bytes from global to shared memory, past the registers. Copies
// `bytes` (0 to 16) of them and fills up with zeros.
__device__ inline void cp_async_16(std::uint32_t to, const void* from, int bytes = 16) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
                 "r"(bytes)
                 : "memory");
}
__device__ inline void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most `groups` of this thread's latest groups are still on their way.
template <int groups>
__device__ inline void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(groups) : "memory");
}

// ldmatrix (9.7.14.5.15): four 8x8 matrices of 16-bit values. Lane i gives the address of a row of
// 16 bytes: lanes 0-7 rows of matrix 0, lanes 8-15 of matrix 1 ... Lane i receives in r[m] the two
// values (i / 4, 2 * (i % 4)) and (.., + 1) of matrix m; transposed: of its transpose.
__device__ inline void ldmatrix_x4(std::uint32_t (&r)[4], std::uint32_t row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(row));
}
__device__ inline void ldmatrix_x4_trans(std::uint32_t (&r)[4], std::uint32_t row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(row));
}

// mma (9.7.14.5.14): c (16, 8) f32 += a (16, 16) bf16 * b (16, 8) bf16. With g = lane / 4 and
// t = lane % 4, a lane holds, low half of a register first:
//   a[0] (g; 2t, 2t+1)   a[1] (g+8; 2t, 2t+1)   a[2] (g; 2t+8, 2t+9)   a[3] (g+8; 2t+8, 2t+9)
//   b0 (2t, 2t+1; g)     b1 (2t+8, 2t+9; g)
//   c[0], c[1] (g; 2t, 2t+1)                    c[2], c[3] (g+8; 2t, 2t+1)
__device__ inline void mma_m16n8k16(float (&c)[4], const std::uint32_t (&a)[4], std::uint32_t b0,
                                    std::uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, "
        "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// ex2.approx (9.7.3.21): 2^x, within 2 units in the last place.
__device__ inline float exp2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// griddepcontrol (9.7.13.13): the next kernel of the stream may start now; and wait until the
// previous one has ended and its writes can be seen. Before the wait nothing may be read that the
// kernel just before this one writes; all earlier ones have ended (see Overlap in the manual).
__device__ inline void pdl_launch() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}
__device__ inline void pdl_wait() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

}  // namespace cuda::ptx

// ==== 3. reduce ==================================================================================
// Sums over lanes in one fixed order: whatever else runs, the same bits.

namespace cuda {

__device__ inline float warp_sum(float x) {  // over 32 lanes, in every lane
    for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(~0u, x, step);
    return x;
}

// Two floats as a pair of bf16, the first in the low half; rounded to nearest even.
__device__ inline std::uint32_t pack(float low, float high) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const std::uint32_t*>(&pair);
}
__device__ inline float low_half(std::uint32_t pair) { return __uint_as_float(pair << 16); }
__device__ inline float high_half(std::uint32_t pair) {
    return __uint_as_float(pair & 0xffff0000u);
}

}  // namespace cuda

// ==== 4. embed ===================================================================================
// The first values of the residual stream: rows of wte, normalised, smeared with the previous token.

namespace cuda {

// What every launch needs to know about the GPU.
struct Device {
    int sms = 0;                    // multiprocessors
    int shared_bytes = 0;           // that one block may ask for
    cudaStream_t stream = nullptr;  // everything runs in this one
    bool overlap = false;           // programmatic dependent launch is there (Hopper and later)
    int* counters = nullptr;        // (kGemmCounters), zero between launches
};

struct RowInfo {                // one token of a step
    int id = 0, previous = -1;  // previous: -1 at position 0
    int pos = 0;
    int slot = -1;   // of its sequence in the page table; -1: an unused row
    int bigram = 0;  // row of the bigram table
};

inline constexpr float kEpsilon = 1.1920929e-7f;  // of the norms: 2^-23, torch's for float32
inline constexpr int kSumColumns = 16;            // columns whose squares one partial sum covers

// What a layer does to the residual stream at its entry: x = resid * x + x0 * x0 + bigram * b.
struct Entry {
    float resid = 1, x0 = 0, bigram = 0;
    const bf16* bigram_embed = nullptr;  // (5V, D); null where the generation has none
};
__device__ inline float enter(const Entry& e, float x, float x0, const RowInfo& row, int D, int j) {
    float y = e.resid * x + e.x0 * x0;
    if (e.bigram_embed != nullptr && j < D)
        y += e.bigram * __bfloat162float(e.bigram_embed[std::int64_t{row.bigram} * D + j]);
    return y;
}

struct EmbedTraits {
    static constexpr int kThreads = 256;  // one row
    static_assert(kThreads % 32 == 0, "whole warps");
};
struct EmbedArgs {
    const RowInfo* rows;
    const bf16* wte;         // (Vp, D)
    const bf16* smear_gate;  // (channels); null: no smear
    int smear_channels;
    float smear_lambda;
    int D, ld;                    // ld: row stride of the outputs
    float* x0;                    // (rows, ld)
    float* embed_norm = nullptr;  // (rows, ld): before the smear, if not null
    // of a decode step: the residual stream as layer 0 sees it, as bf16 too, and its squares
    Entry entry = {};
    float* x = nullptr;
    bf16* xb = nullptr;
    float* squares = nullptr;  // (rows, ld / kSumColumns): their sum is that of the row's squares
};

// Sum over a block, in every thread; the same order for any row.
__device__ inline float block_sum(float value) {
    __shared__ float s_part[32];
    value = warp_sum(value);
    __syncthreads();
    if (threadIdx.x % 32 == 0) s_part[threadIdx.x / 32] = value;
    __syncthreads();
    float sum = 0;
    for (unsigned w = 0; w < blockDim.x / 32; ++w) sum += s_part[w];
    return sum;
}

// embed: x0[r] = e(id) + lambda * sigmoid(gate . e(id)[0:channels]) * e(previous), e = rms_norm(wte)
//   rows (R), wte (Vp, D) bf16 -> x0 (R, ld) f32; decode: x (R, ld) f32, xb (R, ld) bf16
//   grid: one block per row; threads stride over the columns
//   cost: reads 4*D bytes a row, writes 4*D (decode 10*D); latency-bound, a few rows
//   order: thread sums left to right, warps by xor-shuffle, then warp 0 .. 7
//   source: nanochat gpt.py GPT.forward; CPU twin detail::Pass::embed, smear
template <bool decode>
__global__ void __launch_bounds__(EmbedTraits::kThreads) embed_kernel(EmbedArgs a) {
    ptx::pdl_wait();
    ptx::pdl_launch();
    const std::int64_t r = blockIdx.x;
    const RowInfo row = a.rows[r];
    if (row.slot < 0) return;
    const bf16* const own = a.wte + std::int64_t{row.id} * a.D;
    const bf16* const before = a.smear_gate != nullptr && row.previous >= 0
                                   ? a.wte + std::int64_t{row.previous} * a.D
                                   : nullptr;
    float sum = 0, sum_before = 0;
    for (int j = threadIdx.x; j < a.D; j += EmbedTraits::kThreads) {
        const float v = __bfloat162float(own[j]);
        sum += v * v;
        if (before != nullptr) {
            const float b = __bfloat162float(before[j]);
            sum_before += b * b;
        }
    }
    const float n = static_cast<float>(a.D);
    const float scale = rsqrtf(block_sum(sum) / n + kEpsilon);
    float mix = 0;
    if (before != nullptr) {
        float dot = 0;
        if (threadIdx.x < static_cast<unsigned>(a.smear_channels)) {
            dot = __bfloat162float(a.smear_gate[threadIdx.x]) *
                  (__bfloat162float(own[threadIdx.x]) * scale);
        }
        dot = block_sum(dot);
        const float scale_before = rsqrtf(block_sum(sum_before) / n + kEpsilon);
        mix = a.smear_lambda / (1 + __expf(-dot)) * scale_before;
    }
    float squares = 0;
    for (int j = threadIdx.x; j < a.D; j += EmbedTraits::kThreads) {
        const float plain = __bfloat162float(own[j]) * scale;
        const float v = before != nullptr ? plain + mix * __bfloat162float(before[j]) : plain;
        a.x0[r * a.ld + j] = v;
        if (a.embed_norm != nullptr) a.embed_norm[r * a.ld + j] = plain;
        if (decode) {
            const float x = enter(a.entry, v, v, row, a.D, j);
            a.x[r * a.ld + j] = x;
            a.xb[r * a.ld + j] = __float2bfloat16_rn(x);
            squares += x * x;
        }
    }
    if (decode) {
        squares = block_sum(squares);
        for (int j = threadIdx.x; j < a.ld / kSumColumns; j += EmbedTraits::kThreads)
            a.squares[r * (a.ld / kSumColumns) + j] = j == 0 ? squares : 0.0f;
    }
}

inline void embed(const Device& d, const EmbedArgs& a, int rows, bool decode) {
    const Launch l{.grid = dim3(static_cast<unsigned>(rows)),
                   .block = EmbedTraits::kThreads,
                   .stream = d.stream,
                   .overlap = d.overlap};
    decode ? launch(l, embed_kernel<true>, a) : launch(l, embed_kernel<false>, a);
}

}  // namespace cuda

// ==== 5. norm ====================================================================================
// RMSNorm without weights, with what happens to the residual stream just before it.

namespace cuda {

struct NormTraits {
    static constexpr int kThreads = 128;              // of one row: a warp alone waits too long
    static constexpr int kVector = 4;                 // values of one 16-byte load
    static constexpr int kStep = kThreads * kVector;  // values that a block loads at once
    static constexpr int kMaxSteps = 8;               // so D <= 4096 stays in registers
    static_assert(kVector * sizeof(float) == 16, "16-byte loads");
};
enum class NormInput { plain, entry, backout };
struct NormArgs {
    bf16* y;                    // (T, ld)
    const float* x;             // (T, ld)
    const float* x0 = nullptr;  // (T, ld) entry; backout: the middle layer's x
    float* x_out = nullptr;  // (T, ld): x after the entry; after the backout, if not null (watched)
    const RowInfo* rows = nullptr;
    const int* gather = nullptr;  // y[t] is made of x[gather[t]] if not null
    Entry entry = {};
    float backout_lambda = 0;
    int T, D, ld;
};

// rms_norm: y[t,:] = x[t,:] / sqrt(mean_c x[t,c]^2 + eps), x first mixed with x0 or relieved of x_mid
//   x, x0 (T, ld) f32 -> y (T, ld) bf16, x (T, ld) f32; ld % 64 == 0, columns beyond D are zeros
//   grid: one block per row; a thread holds ld/128 values, read 16 bytes at a time
//   cost: plain 6*D bytes a row, entry 14*D; bandwidth-bound
//   order: thread sums left to right, warps by xor-shuffle, then warp 0 .. 3: the same for any T
//   source: nanochat gpt.py norm(); eps is torch's for fp32; CPU twin ops::rms_norm
template <NormInput input, int steps>
__global__ void __launch_bounds__(NormTraits::kThreads) rms_norm_kernel(NormArgs a) {
    using N = NormTraits;
    ptx::pdl_wait();
    ptx::pdl_launch();
    const auto t = static_cast<int>(blockIdx.x), me = static_cast<int>(threadIdx.x);
    const std::int64_t from = (a.gather != nullptr ? a.gather[t] : t) * std::int64_t{a.ld};
    float4 v[steps];
    float sum = 0;
#pragma unroll
    for (int i = 0; i < steps; ++i) {
        const int j = i * N::kStep + me * N::kVector;
        v[i] = j < a.ld ? *reinterpret_cast<const float4*>(a.x + from + j) : float4{};
    }
    if constexpr (input != NormInput::plain) {
        RowInfo row{};
        if (input == NormInput::entry && a.entry.bigram_embed != nullptr) row = a.rows[t];
#pragma unroll
        for (int i = 0; i < steps; ++i) {
            const int j = i * N::kStep + me * N::kVector;
            if (j >= a.ld) continue;
            const float4 o = *reinterpret_cast<const float4*>(a.x0 + from + j);
            if constexpr (input == NormInput::entry) {
                const Entry& e = a.entry;
                v[i] = {enter(e, v[i].x, o.x, row, a.D, j), enter(e, v[i].y, o.y, row, a.D, j + 1),
                        enter(e, v[i].z, o.z, row, a.D, j + 2),
                        enter(e, v[i].w, o.w, row, a.D, j + 3)};
                *reinterpret_cast<float4*>(a.x_out + from + j) = v[i];
            } else {
                const float b = a.backout_lambda;
                v[i] = {v[i].x - b * o.x, v[i].y - b * o.y, v[i].z - b * o.z, v[i].w - b * o.w};
                if (a.x_out != nullptr)
                    *reinterpret_cast<float4*>(a.x_out + std::int64_t{t} * a.ld + j) = v[i];
            }
        }
    }
#pragma unroll
    for (int i = 0; i < steps; ++i)
        sum += v[i].x * v[i].x + v[i].y * v[i].y + v[i].z * v[i].z + v[i].w * v[i].w;
    const float scale = rsqrtf(block_sum(sum) / static_cast<float>(a.D) + kEpsilon);
#pragma unroll
    for (int i = 0; i < steps; ++i) {
        const int j = i * N::kStep + me * N::kVector;
        if (j >= a.ld) continue;
        const uint2 half = {pack(v[i].x * scale, v[i].y * scale),
                            pack(v[i].z * scale, v[i].w * scale)};
        *reinterpret_cast<uint2*>(a.y + std::int64_t{t} * a.ld + j) = half;
    }
}

template <NormInput input>
void rms_norm(const Device& d, const NormArgs& a) {
    using N = NormTraits;
    const Launch l{.grid = dim3(static_cast<unsigned>(a.T)),
                   .block = N::kThreads,
                   .stream = d.stream,
                   .overlap = d.overlap};
    const int steps = cdiv(a.ld, N::kStep);
    if (steps <= 2)
        launch(l, rms_norm_kernel<input, 2>, a);
    else if (steps <= 4)
        launch(l, rms_norm_kernel<input, 4>, a);
    else
        launch(l, rms_norm_kernel<input, N::kMaxSteps>, a);
}

}  // namespace cuda

// ==== 6. rotary ==================================================================================
// Queries, keys and values of prompts as attention wants them, in one pass: rotation, norm and scale
// of heads, value embedding, the way into the KV cache. Of single tokens: decode_attention_kernel.

namespace cuda {

inline constexpr int kPage = 64;  // positions of one page of the KV cache

// Where keys and values are: pages of kPage positions, each holding all layers and heads.
struct Cache {
    bf16* pages = nullptr;
    const int* table = nullptr;  // (slots, max_pages): page of positions 64 i .. 64 i + 63
    int max_pages = 0;
    std::int64_t page_stride = 0;   // values of a page: L * K * 2 * kPage * HD
    std::int64_t layer_offset = 0;  // of this layer in a page

    // Row of `pos` among the keys of a kv head; its values are kPage * HD further on.
    template <int HD>
    __device__ bf16* key(int slot, int head, int pos) const {
        const std::int64_t page = table[std::int64_t{slot} * max_pages + pos / kPage];
        return pages + page * page_stride + layer_offset +
               (std::int64_t{head} * 2 * kPage + pos % kPage) * HD;
    }
};

struct HeadArgs {
    const RowInfo* rows;
    const float* cos;  // (positions, hd / 2); the same table for all layers
    const float* sin;
    int n_head, n_kv_head, hd;
    float qk_scale;
    // value embedding of this layer; null: it has none
    const bf16* value_embed;  // (Vp, K * hd)
    const float* ve_gate;     // (K, 32)
    int gate_channels;
    float gate_scale;
};

// Sum over groups of `lanes` neighbouring lanes, in each of them; only they take part.
template <int lanes>
__device__ inline float group_sum(float x) {
    const unsigned first = threadIdx.x % 32 / lanes * lanes;
    const unsigned group = lanes == 32 ? ~0u : ((1u << lanes % 32) - 1) << first;
    for (int step = lanes / 2; step > 0; step /= 2) x += __shfl_xor_sync(group, x, step, lanes);
    return x;
}

// The gate of a value embedding, in every lane of a group: scale * sigmoid(Wg[head] . h[0:channels])
// with h = scale_h * x.
template <int lanes>
__device__ inline float value_gate(const HeadArgs& a, int head, const bf16* x, float scale_h) {
    float dot = 0;
    for (int c = static_cast<int>(threadIdx.x) % lanes; c < a.gate_channels; c += lanes)
        dot += a.ve_gate[head * 32 + c] * (__bfloat162float(x[c]) * scale_h);
    return a.gate_scale / (1 + __expf(-group_sum<lanes>(dot)));
}

// `wide`: hd % 16 == 0, every half of a head begins at a multiple of 16 bytes.
template <int head_size, bool wide>
struct RotaryTraits {
    static constexpr int HD = head_size;
    static constexpr bool kWide = wide;
    static constexpr int kThreads = 96;
    // per SM: much of a block's life is waiting; with more, registers would spill
    static constexpr int kBlocks = HD == 128 ? 8 : 6;
    static constexpr int kPairs = wide ? 8 : 4;       // of a lane: 16 bytes of either half
    static constexpr int kLanes = HD / 2 / kPairs;    // of a head
    static constexpr int kHeads = kThreads / kLanes;  // at once
    static constexpr int kAhead = wide ? 2 : 1;       // of a lane's heads, on their way together
    static_assert(kLanes <= 32 && 32 % kLanes == 0, "a head belongs to one warp");
};
struct RotaryArgs {
    HeadArgs head;
    Cache cache;
    const bf16* qkv;  // (T, ld): H heads of q, K of k, K of v, hd each
    int ld;
    const bf16* h;  // (T, ld_h): the layer's normalised input, for the gate
    int ld_h;
    bf16* q;      // (T, H, HD)
    float* gate;  // (T, K), if not null (watched)
    int T;
};

// A lane's part of half a head: n elements as they lie in memory, `count` of them inside the half.
template <int n>
struct alignas(2 * n) Part {
    std::uint32_t words[n / 2] = {};
    __device__ float operator[](int i) const {
        return i % 2 == 0 ? low_half(words[i / 2]) : high_half(words[i / 2]);
    }
};
template <bool wide, int n>
__device__ inline Part<n> load_part(const bf16* in, int count) {
    Part<n> x;
    for (int i = 0; i < (wide ? 0 : n); ++i)
        if (i < count) x.words[i / 2] |= std::uint32_t{__bfloat16_as_ushort(in[i])} << i % 2 * 16;
    return wide && count > 0 ? *reinterpret_cast<const Part<n>*>(in) : x;
}
template <bool wide, int n>
__device__ inline void store_part(bf16* out, const float (&x)[n], int count) {
    Part<n> packed;
    for (int i = 0; i < n; i += 2) packed.words[i / 2] = pack(x[i], x[i + 1]);
    if (wide && count > 0) *reinterpret_cast<Part<n>*>(out) = packed;
    for (int i = 0; i < (wide ? 0 : n) && i < count; ++i) out[i] = __float2bfloat16_rn(x[i]);
}

template <class R>
struct Pairs {  // (j, j + hd/2) of a head, for a lane's j
    Part<R::kPairs> lo, hi;
    static __device__ Pairs load(const bf16* in, int j, int half) {
        return {load_part<R::kWide, R::kPairs>(in + j, half - j),
                load_part<R::kWide, R::kPairs>(in + j + half, half - j)};
    }
};

// v += gate * value_embed[id], for a lane's part of value head `kv` of row t.
template <class R>
__device__ inline void add_value_embed(const RotaryArgs& a, const RowInfo& row, int t, int kv,
                                       int j, float (&lo)[R::kPairs], float (&hi)[R::kPairs]) {
    const HeadArgs& p = a.head;
    if (p.value_embed == nullptr) return;
    const auto extra = Pairs<R>::load(
        p.value_embed + (std::int64_t{row.id} * p.n_kv_head + kv) * p.hd, j, p.hd / 2);
    const float gate = value_gate<R::kLanes>(p, kv, a.h + std::int64_t{t} * a.ld_h, 1);
    if (a.gate != nullptr && j == 0) a.gate[std::int64_t{t} * p.n_kv_head + kv] = gate;
#pragma unroll
    for (int i = 0; i < R::kPairs; ++i) lo[i] += gate * extra.lo[i], hi[i] += gate * extra.hi[i];
}

// rotary: q, k = scale * rms_norm(rotate(q, k)); v += gate * value_embed[id]; k, v into the cache
//   qkv (T, (H + 2K) * hd) bf16 -> q (T, H, HD) bf16, cache pages; pairs (j, j + hd/2), angle -theta
//   grid: one block per row; HD/16 lanes take a head at a time, eight pairs each (not wide: HD/8, 4)
//   cost: reads and writes 2*(H + 2K)*hd bytes a row; bandwidth-bound
//   order: a lane's squares left to right, then xor-shuffle: the same for any T
//   source: nanochat gpt.py apply_rotary_emb, CausalSelfAttention.forward; CPU rotate_and_norm
template <class R>
__global__ void __launch_bounds__(R::kThreads, R::kBlocks)
    rotary_kernel(const __grid_constant__ RotaryArgs a) {
    constexpr int HD = R::HD, kPairs = R::kPairs;
    const HeadArgs& p = a.head;
    const int heads = p.n_head + 2 * p.n_kv_head, half = p.hd / 2;
    const auto t = static_cast<int>(blockIdx.x);
    const int j = kPairs * (static_cast<int>(threadIdx.x) % R::kLanes);
    const RowInfo row = p.rows[t];
    ptx::pdl_wait();
    ptx::pdl_launch();
    const auto load = [&](int head) {
        if (head >= heads) return Pairs<R>{};
        return Pairs<R>::load(a.qkv + std::int64_t{t} * a.ld + head * p.hd, j, half);
    };
    int head = static_cast<int>(threadIdx.x) / R::kLanes;
    Pairs<R> next[R::kAhead];  // asked for before the angles, which wait for the row
#pragma unroll
    for (int i = 0; i < R::kAhead; ++i) next[i] = load(head + i * R::kHeads);
    bf16* const cached = a.cache.key<HD>(row.slot, 0, row.pos);  // kv head 0; the others follow
    float cos[kPairs] = {}, sin[kPairs] = {};
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
        if (j + i >= half) continue;
        cos[i] = p.cos[std::int64_t{row.pos} * half + j + i];
        sin[i] = p.sin[std::int64_t{row.pos} * half + j + i];
    }
#pragma unroll 1
    for (; head < heads; head += R::kHeads) {
        const Pairs<R> x = next[0];
#pragma unroll
        for (int i = 1; i < R::kAhead; ++i) next[i - 1] = next[i];
        next[R::kAhead - 1] = load(head + R::kAhead * R::kHeads);
        const int key = head - p.n_head, value = key - p.n_kv_head;  // which; below 0: it is none
        float lo[kPairs], hi[kPairs], sum = 0;
#pragma unroll
        for (int i = 0; i < kPairs; ++i) {
            const float x1 = x.lo[i], x2 = x.hi[i];
            lo[i] = value < 0 ? x1 * cos[i] + x2 * sin[i] : x1;
            hi[i] = value < 0 ? x2 * cos[i] - x1 * sin[i] : x2;
            sum += lo[i] * lo[i] + hi[i] * hi[i];
        }
        const auto store = [&](bf16* out) {
            store_part<R::kWide>(out + j, lo, half - j);
            store_part<R::kWide>(out + j + half, hi, half - j);
        };
        if (value >= 0) {
            add_value_embed<R>(a, row, t, value, j, lo, hi);
            store(cached + (value * 2 + 1) * kPage * HD);
            continue;
        }
        const float mean = group_sum<R::kLanes>(sum) / static_cast<float>(p.hd);
        const float scale = rsqrtf(mean + kEpsilon) * p.qk_scale;
        for (int i = 0; i < kPairs; ++i) lo[i] *= scale, hi[i] *= scale;
        store(key < 0 ? a.q + (std::int64_t{t} * p.n_head + head) * HD
                      : cached + key * 2 * kPage * HD);
    }
}

template <int HD>
void rotary(const Device& d, const RotaryArgs& a) {
    const auto run = [&](auto traits) {
        using R = decltype(traits);
        launch({.grid = dim3(static_cast<unsigned>(a.T)),
                .block = R::kThreads,
                .stream = d.stream,
                .overlap = d.overlap},
               rotary_kernel<R>, a);
    };
    a.head.hd % 16 == 0 ? run(RotaryTraits<HD, true>{}) : run(RotaryTraits<HD, false>{});
}

}  // namespace cuda

// ==== 7. gemv ====================================================================================
// Products for decoding: a few rows of activations times weights that are read once, so the bytes
// of the weights are the time. The tensor cores multiply 8 rows as fast as one: one order of
// summation for every batch, and so the same bits.

namespace cuda {

enum class GemvOutput { scaled_f32, relu2, residual };

// Rows and tokens of one block in tiles of mma; steps of K whose weights are on their way, and whose
// activations are; blocks per SM, the bound for registers. More tokens need more rows, or reading
// the activations (from L2) costs more than reading the weights.
template <int token_tiles, int row_tiles, int stages, int ahead, int blocks>
struct GemvTraits {
    static constexpr int kTokenTiles = token_tiles, kRowTiles = row_tiles;
    static constexpr int kStages = stages, kAhead = ahead;
    static constexpr int kBlocks = blocks;
    static constexpr int kM = 8 * token_tiles, kN = 16 * row_tiles;  // n8 and m16 of one product
    static constexpr int kWarps = 8, kThreads = 32 * kWarps;         // each takes an eighth of K
    static constexpr int kStep = 32;  // columns of K: 16 bytes of a row for each of four lanes
    static constexpr int kStageBytes = 2 * row_tiles * 32 * 16;  // of one warp
    static constexpr int kLine = kM + 1;  // of the sums; odd, so that no bank is met twice
    static constexpr int kWarpBytes = std::max(stages * kStageBytes, kN* kLine * 4);
    static constexpr int kPerThread = cdiv(kM * kN, kThreads);
    static constexpr int kSharedBytes = kWarps * kWarpBytes + kM * static_cast<int>(sizeof(float));
    static_assert(stages % ahead == 0, "a round of the loop is `ahead` steps");
    static_assert(kWarps == 8, "warp w sums the squares of tokens w, w + 8 ..");
    static_assert(kSharedBytes <= 99 * 1024, "GB10 gives a block 99 KB");
};

struct GemvArgs {
    const bf16* x;  // (M, K), row stride K
    const bf16* w;  // (N, K)
    int M, N, K;    // K % 64 == 0
    int ld;         // row stride of the outputs
    // (M, K / kSumColumns): partial sums of the squares of x; null: rstd = 1
    const float* squares = nullptr;
    int D = 0;          // columns of x that count in its mean square
    void* y = nullptr;  // scaled_f32: (M, ld) f32; relu2: (M, ld) bf16
    float softcap = 0;  // scaled_f32, if not 0: y = softcap * tanh(y / softcap), as ops::softcap
    // residual: x_out = entry(x_out + y), as bf16 too, and its squares
    float* x_out = nullptr;
    bf16* xb_out = nullptr;
    float* squares_out = nullptr;
    const float* x0 = nullptr;
    const RowInfo* rows = nullptr;
    Entry entry = {};              // of the next layer
    float* middle = nullptr;       // the middle layer keeps its x here
    float backout_lambda = 0;      // the last layer: x -= lambda * x_mid
    const float* x_mid = nullptr;  // null where there is no backout
};

// The last step of gemv for one sum: 16 neighbouring lanes hold 16 columns of one row.
template <GemvOutput output>
__device__ inline void gemv_store(const GemvArgs& a, int m, int n, float sum, float rstd, float x,
                                  float x0) {
    const std::int64_t at = std::int64_t{m} * a.ld + n;
    const bool there = m < a.M && n < a.N;
    if constexpr (output == GemvOutput::scaled_f32) {
        x = sum * rstd;
        if (a.softcap > 0) x = a.softcap * tanhf(x / a.softcap);
        if (there) static_cast<float*>(a.y)[at] = x;
    } else if constexpr (output == GemvOutput::relu2) {
        const float h = fmaxf(sum * rstd, 0.0f);
        if (there) static_cast<bf16*>(a.y)[at] = __float2bfloat16_rn(h * h);
    } else {
        if (there) {
            x += sum;
            if (a.middle != nullptr) a.middle[at] = x;
            if (a.x_mid != nullptr) x -= a.backout_lambda * (a.middle != nullptr ? x : a.x_mid[at]);
            x = enter(a.entry, x, x0, a.rows[m], a.N, n);
            a.x_out[at] = x;
            a.xb_out[at] = __float2bfloat16_rn(x);
        }
        const float squares = group_sum<kSumColumns>(there ? x * x : 0.0f);
        if (there && n % kSumColumns == 0)
            a.squares_out[std::int64_t{m} * (a.ld / kSumColumns) + n / kSumColumns] = squares;
    }
}

// gemv: y[m,n] = rstd[m] * sum_k x[m,k] w[n,k], then: soft cap | relu^2 | added to the residual
//   x (M, K) bf16, w (N, K) bf16 -> y (M, N) f32 or bf16; rstd from the squares of x (RMSNorm)
//   grid: (groups of kM tokens, groups of kN rows); the 8 warps of a block share K
//   cost: reads 2*N*K bytes once; bandwidth-bound for all M <= 32
//   order: warp w sums steps [w*S/8, (w+1)*S/8) of 32 columns, then warps 0 .. 7: whatever M is
//   source: weights as A and tokens as B of mma.m16n8k16, both with the columns in the same
//     permuted order, so that 16 bytes of a row are a lane's operands. CPU twin ops::linear
template <GemvOutput output, class T>
__global__ void __launch_bounds__(T::kThreads, T::kBlocks)
    gemv_kernel(const __grid_constant__ GemvArgs a) {
    extern __shared__ __align__(128) unsigned char s_gemv[];
    float* const s_rstd = reinterpret_cast<float*>(s_gemv + T::kWarps * T::kWarpBytes);
    const int warp = static_cast<int>(threadIdx.x / 32), lane = static_cast<int>(threadIdx.x % 32);
    const int g = lane / 4, t = lane % 4;
    const int m0 = static_cast<int>(blockIdx.x) * T::kM, n0 = static_cast<int>(blockIdx.y) * T::kN;
    const int steps = a.K / T::kStep;
    const int first = warp * steps / T::kWarps, last = (warp + 1) * steps / T::kWarps;

    // Weights go through a ring in shared memory. A lane reads only what it copied itself, so the
    // ring needs no barrier.
    unsigned char* const ring = s_gemv + warp * T::kWarpBytes + lane * 16;
    const bf16* const w = a.w + std::int64_t{n0} * a.K;
    int w_row[2 * T::kRowTiles];  // rows beyond N repeat the last: nobody stores their sums
#pragma unroll
    for (int i = 0; i < 2 * T::kRowTiles; ++i)
        w_row[i] = min(8 * i + g, a.N - 1 - n0) * a.K + 8 * t;
    const auto slot = [&](int step, int i) {
        return ring + (step - first) % T::kStages * T::kStageBytes + i * (32 * 16);
    };
    const auto copy_w = [&](int step) {
#pragma unroll
        for (int i = 0; step < last && i < 2 * T::kRowTiles; ++i)
            ptx::cp_async_16(ptx::shared(slot(step, i)), w + w_row[i] + step * T::kStep);
        ptx::cp_async_commit();
    };
    const bf16* const x_row = a.x + std::int64_t{m0} * a.K;
    const auto load_x = [&](uint4(&x)[T::kAhead][T::kTokenTiles], int step) {
#pragma unroll
        for (int s = 0; s < T::kAhead; ++s)
#pragma unroll
            for (int j = 0; j < T::kTokenTiles; ++j)
                x[s][j] = step + s < last && m0 + 8 * j + g < a.M
                              ? *reinterpret_cast<const uint4*>(x_row + (8 * j + g) * a.K + 8 * t +
                                                                (step + s) * T::kStep)
                              : uint4{};
    };
#pragma unroll
    for (int s = 0; s < T::kStages; ++s) copy_w(first + s);  // nobody's output: no need to wait
    // the residual stream was written by the kernel before the previous one or earlier, and that
    // has ended: the previous one let this one start only after it had waited for it
    float r_x[T::kPerThread] = {}, r_x0[T::kPerThread] = {};
    if constexpr (output == GemvOutput::residual) {
#pragma unroll
        for (int i = 0; i < T::kPerThread; ++i) {
            const int e = i * T::kThreads + static_cast<int>(threadIdx.x);
            const int m = m0 + e / T::kN, n = n0 + e % T::kN;
            if (m >= a.M || n >= a.N) continue;
            r_x[i] = a.x_out[std::int64_t{m} * a.ld + n];
            r_x0[i] = a.x0[std::int64_t{m} * a.ld + n];
        }
    }
    ptx::pdl_wait();
    ptx::pdl_launch();
    uint4 r_now[T::kAhead][T::kTokenTiles], r_next[T::kAhead][T::kTokenTiles];
    load_x(r_now, first);
    if constexpr (output != GemvOutput::residual) {
        const int parts = a.squares != nullptr ? a.K / kSumColumns : 0;
        float sum[T::kTokenTiles] = {};  // of tokens warp, warp + 8 ..
        for (int p = 4 * lane; p < parts; p += 4 * 32)
#pragma unroll
            for (int i = 0; i < T::kTokenTiles; ++i) {
                const std::int64_t m = m0 + warp + 8 * i;
                if (m >= a.M) continue;
                const float4 v = *reinterpret_cast<const float4*>(a.squares + m * parts + p);
                sum[i] += (v.x + v.y) + (v.z + v.w);
            }
#pragma unroll
        for (int i = 0; i < T::kTokenTiles; ++i) {
            const float mean = warp_sum(sum[i]) / static_cast<float>(a.D);
            if (lane == 0) s_rstd[warp + 8 * i] = parts > 0 ? rsqrtf(mean + kEpsilon) : 1.0f;
        }
    }

    float acc[T::kRowTiles][T::kTokenTiles][4] = {};
    for (int round = first; round < last; round += T::kAhead) {
        load_x(r_next, round + T::kAhead);
#pragma unroll
        for (int s = 0; s < T::kAhead; ++s) {
            const int step = round + s;
            if (step >= last) break;
            ptx::cp_async_wait<T::kStages - 1>();
#pragma unroll
            for (int i = 0; i < T::kRowTiles; ++i) {
                const uint4 u = *reinterpret_cast<const uint4*>(slot(step, 2 * i));
                const uint4 v = *reinterpret_cast<const uint4*>(slot(step, 2 * i + 1));
                const std::uint32_t a1[4] = {u.x, v.x, u.y, v.y}, a2[4] = {u.z, v.z, u.w, v.w};
#pragma unroll
                for (int j = 0; j < T::kTokenTiles; ++j) {
                    ptx::mma_m16n8k16(acc[i][j], a1, r_now[s][j].x, r_now[s][j].y);
                    ptx::mma_m16n8k16(acc[i][j], a2, r_now[s][j].z, r_now[s][j].w);
                }
            }
            copy_w(step + T::kStages);  // into the place of what has just been used
        }
#pragma unroll
        for (int s = 0; s < T::kAhead; ++s)
#pragma unroll
            for (int j = 0; j < T::kTokenTiles; ++j) r_now[s][j] = r_next[s][j];
    }

    const auto sums_of = [&](int w) {
        return reinterpret_cast<float*>(s_gemv + w * T::kWarpBytes);
    };
    __syncwarp();
#pragma unroll
    for (int i = 0; i < T::kRowTiles; ++i)
#pragma unroll
        for (int j = 0; j < T::kTokenTiles; ++j)
#pragma unroll
            for (int c = 0; c < 4; ++c)
                sums_of(warp)[(i * 16 + g + 8 * (c / 2)) * T::kLine + j * 8 + 2 * t + c % 2] =
                    acc[i][j][c];
    __syncthreads();
#pragma unroll
    for (int i = 0; i < T::kPerThread; ++i) {
        const int e = i * T::kThreads + static_cast<int>(threadIdx.x);
        if (e >= T::kM * T::kN) break;  // whole warps
        const int m = e / T::kN, n = e % T::kN;
        float sum = 0;
#pragma unroll
        for (int w = 0; w < T::kWarps; ++w) sum += sums_of(w)[n * T::kLine + m];
        gemv_store<output>(a, m0 + m, n0 + n, sum,
                           output == GemvOutput::residual ? 1.0f : s_rstd[m], r_x[i], r_x0[i]);
    }
}

// All shapes that gemv chooses from, for one token tile, two, or more; any gives the same bits.
using GemvFew = GemvTraits<1, 1, 4, 2, 4>;
using GemvFewNarrow = GemvTraits<1, 1, 8, 4, 1>;  // a block to a multiprocessor: it may look far
using GemvSome = GemvTraits<2, 1, 4, 2, 3>;
using GemvManyNarrow = GemvTraits<4, 1, 4, 4, 1>;
template <GemvOutput output>  // the residual stream takes the registers of a second step
using GemvMany = GemvTraits<4, 2, 4, output == GemvOutput::residual ? 1 : 2, 2>;
template <GemvOutput output, class F>
void gemv_shapes(F f) {
    f(GemvFew{}), f(GemvFewNarrow{}), f(GemvSome{}), f(GemvManyNarrow{}), f(GemvMany<output>{});
}

template <GemvOutput output>
void gemv(const Device& d, const GemvArgs& a) {
    const auto run = [&](auto traits) {
        using T = decltype(traits);
        launch({.grid = dim3(static_cast<unsigned>(cdiv(a.M, T::kM)),
                             static_cast<unsigned>(cdiv(a.N, T::kN))),
                .block = T::kThreads,
                .shared_bytes = T::kSharedBytes,
                .stream = d.stream,
                .overlap = d.overlap},
               gemv_kernel<output, T>, a);
    };
    // with few rows of weights it is better to read the activations more often than to leave
    // multiprocessors without work
    const bool narrow = a.N <= 16 * d.sms;
    if (a.M <= 8 && narrow)
        run(GemvFewNarrow{});
    else if (a.M <= 8)
        run(GemvFew{});
    else if (a.M <= 16)
        run(GemvSome{});
    else if (narrow)
        run(GemvManyNarrow{});
    else
        run(GemvMany<output>{});
}

}  // namespace cuda

// ==== 8. gemm ====================================================================================
// y = x w^T for many rows: prefill and large batches. M, N, K as BLAS has them: rows of x, rows of
// w, length of both.

namespace cuda::ptx {

// threadIdx.x, read anew at every call: what is computed from it need not be kept in a register.
__device__ inline int thread_again() {
    int t;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(t));
    return t;
}

// ld.acquire, st.release (9.7.9.8, 9.7.9.11): who reads what was stored here also sees what was
// written before the store, by the same thread or, across a __syncthreads(), by its block.
__device__ inline int load_acquire(const int* p) {
    int v;
    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
    return v;
}
__device__ inline void store_release(int* p, int v) {
    asm volatile("st.release.gpu.global.s32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}

}  // namespace cuda::ptx

namespace cuda {

enum class Epilogue { store, relu2, add, store_f32 };

// Row strides in values. K % 64 == 0, N is even; strides are multiples of 8, pointers of 16 bytes.
struct GemmShape {
    int M, N, K, ldx, ldw, ldy;
};

// A long `add` is two sums, y = (y + first) + second, so that two blocks can share the work on a
// tile where there are few. A rule of K alone, or else a row's bits would depend on the others.
inline constexpr int kSplitK = 3072;        // from here on: the way down of an MLP from d12 on
inline constexpr int kGemmCounters = 4096;  // one for every tile whose halves are two blocks' work
__host__ __device__ constexpr int first_sum(Epilogue epilogue, int K) {  // its values of K
    return epilogue == Epilogue::add && K >= kSplitK ? K / 128 * 64 : K;
}

// One way to cut the work: a block makes tiles of kTileM x kTileN, its warps kWarpM x kWarpN each,
// kStepK of K at a time, with kStages steps in shared memory. The last three numbers are fitted to
// 468 timings on an H200 (6 % rms): the share of the tensor peak (in percent) that an SM reaches
// with kBlocks blocks, with one, and what a sum costs besides its K steps, as so many values of K.
template <int tile_m, int tile_n, int step_k, int warp_m, int warp_n, int stages, int blocks,
          int full, int alone, int start, int super_row = 2048,
          bool turns = (warp_m * warp_n > 64 * 64)>
struct GemmTraits {
    static constexpr int kTileM = tile_m, kTileN = tile_n, kStepK = step_k;
    static constexpr int kWarpM = warp_m, kWarpN = warp_n;
    static constexpr int kStages = stages, kBlocks = blocks;
    static constexpr int kFull = full, kAlone = alone, kStart = start;
    static constexpr int kMmaM = 16, kMmaN = 8, kMmaK = 16;  // the shape of one mma
    static constexpr int kWarpsN = tile_n / warp_n, kThreads = 32 * (tile_m / warp_m) * kWarpsN;
    static constexpr int kRowBytes = step_k * 2;      // a row of a stage
    static constexpr int kChunk = 8;                  // values in the 16 bytes of one copy
    static constexpr int kChunks = step_k / kChunk;   // copies in a row of a stage
    static constexpr int kPass = kThreads / kChunks;  // rows that the block copies at once
    static constexpr int kCopiesX = tile_m / kPass, kCopies = (tile_m + tile_n) / kPass;
    static constexpr int kStageBytes = (tile_m + tile_n) * kRowBytes;
    static constexpr int kSharedBytes = stages * kStageBytes;
    static constexpr int kDepth = step_k / kMmaK;  // mma steps in a stage
    static constexpr int kFragmentsM = warp_m / kMmaM, kFragmentsN = warp_n / (2 * kMmaN);
    // Fragments: two sets, so that step k + 1 is read while k is multiplied. Where the accumulators
    // leave no room: two single ones of w in turns and, beyond 64 x 80, one set of x.
    static constexpr bool kTurns = turns;
    static constexpr int kHeldN = kTurns ? 1 : kFragmentsN;
    static constexpr int kSets = warp_m * warp_n > 64 * 80 ? 1 : 2;
    static constexpr int kSuperRow = super_row / tile_m;  // see place_of
    // The end: rows of 8 of y that are on their way at a time, in registers that fragments had.
    static constexpr int kRows = 2 * kFragmentsM, kFree = 212 - warp_m * warp_n / 32;
    static constexpr int kOld = std::clamp(kFree / (4 * kFragmentsN), 1, kRows);
    // Which 16-byte chunk of a row lies where, see GemmCopier.
    static constexpr int kKeyShift = kChunks == 8 ? 0 : 1, kKeys = kChunks - 1;
    static_assert(step_k == 32 || step_k == 64, "the swizzle knows rows of 64 and of 128 bytes");
    static_assert(tile_m % warp_m == 0 && tile_n % warp_n == 0, "warps tile the block");
    static_assert(warp_m % kMmaM == 0 && warp_n % (2 * kMmaN) == 0, "fragments tile the warp");
    static_assert(tile_m % kPass == 0 && tile_n % kPass == 0, "every thread copies equally much");
    static_assert(kPass % (2 * kMmaN) == 0, "swizzle and order of w repeat every 16 rows");
};

// What a block has to do: tiles first, first + gridDim.x, ..., of each the sums over values
// [from, middle) and [middle, to) of K, or the only one. `apart`: there are two blocks per tile.
template <class T>
struct GemmWork {
    int tiles_m, tiles_n, tiles, first, from, middle, to;
    bool apart, second;
    __device__ GemmWork(const GemmShape& s, Epilogue epilogue)
        : tiles_m(cdiv(s.M, T::kTileM)), tiles_n(cdiv(s.N, T::kTileN)), tiles(tiles_m * tiles_n) {
        const int block = blockIdx.x;
        apart = static_cast<int>(gridDim.x) > tiles, second = block >= tiles;
        first = second ? block - tiles : block, middle = first_sum(epilogue, s.K);
        from = second ? middle : 0, to = apart && !second ? middle : s.K;
    }
    // Where the i-th tile is. They run down the columns of a super-row of 2,048 rows of y: what 132
    // blocks of 128 x 256 work on at one time is then nearly square and shares its operands.
    __device__ int2 place(int i) const {
        const int above = i / (T::kSuperRow * tiles_n) * T::kSuperRow;
        const int rows = min(T::kSuperRow, tiles_m - above), rest = i - above * tiles_n;
        return {above + rest % rows, rest / rows};
    }
};

// The copying side of a block: it runs ahead by kStages - 1 steps and straight on into the next
// tile. Within a row of a stage, 16 bytes number c lie at c ^ key: the 8 rows that one phase of
// ldmatrix reads then lie in all 32 banks, as do the 8 chunks that 8 threads copy. In every 16 rows
// of w, place 8b+2a+c holds row 4a+2b+c: two neighbouring mma then give one lane 4 neighbouring
// columns of y.
template <class T>
struct GemmCopier {
    const GemmShape& s;
    const GemmWork<T>& work;
    const bf16 *x, *w;
    const std::uint32_t s_begin;
    const bf16 *from_x = nullptr, *from_w = nullptr;  // this thread's first row in the present step
    int rows_x = 0, rows_w = 0;                       // rows left from there on
    int tile = work.first, steps = (work.to - work.from) / T::kStepK, steps_left = steps;
    std::uint32_t fill = s_begin;  // the stage
    // This thread copies chunk thread % kChunks of rows thread / kChunks, + kPass, ...
    std::uint32_t to = place_of(threadIdx.x / T::kChunks, threadIdx.x % T::kChunks);

    __device__ static std::uint32_t place_of(int line, int chunk) {
        return line * T::kRowBytes + ((chunk ^ (line >> T::kKeyShift & T::kKeys)) << 4);
    }
    __device__ void aim() {
        const int2 place = work.place(min(tile, work.tiles - 1));
        const int thread = ptx::thread_again(), line = thread / T::kChunks;
        const int line_w = (line & ~15) | (line & 6) << 1 | (line & 8) >> 2 | (line & 1);
        const int m = place.x * T::kTileM + line, n = place.y * T::kTileN + line_w;
        const int k = work.from + thread % T::kChunks * T::kChunk;
        from_x = x + static_cast<std::size_t>(m) * s.ldx + k;
        from_w = w + static_cast<std::size_t>(n) * s.ldw + k;
        rows_x = tile < work.tiles ? s.M - m : 0;  // none: beyond the last tile only zeros go
        rows_w = tile < work.tiles ? s.N - n : 0;
    }
    // The i-th of kCopies, in order: addresses run along, for want of registers to keep them all.
    __device__ void copy(int i, std::uint32_t stage) {
        const bool of_x = i < T::kCopiesX;
        const int row = (of_x ? i : i - T::kCopiesX) * T::kPass, ld = of_x ? s.ldx : s.ldw;
        const bf16*& from = of_x ? from_x : from_w;
        ptx::cp_async_16(stage + to + i * T::kPass * T::kRowBytes, from,
                         row < (of_x ? rows_x : rows_w) ? 16 : 0);
        from += static_cast<std::ptrdiff_t>(T::kPass) * ld;
        if (row + T::kPass == (of_x ? T::kTileM : T::kTileN)) {  // back up and on to the next step
            from += T::kStepK - static_cast<std::ptrdiff_t>(row + T::kPass) * ld;
        }
    }
    __device__ void copied() {
        ptx::cp_async_commit();
        fill += T::kStageBytes;
        if (fill == s_begin + T::kSharedBytes) fill = s_begin;
        if (--steps_left == 0) {
            steps_left = steps;
            tile += gridDim.x;
            aim();
        }
    }
    // Nobody writes weights: their first stages are asked for before the predecessor has ended.
    __device__ void start() {
        aim();
#pragma unroll 1
        for (int stage = 0; stage < min(T::kStages - 1, steps); ++stage) {
#pragma unroll
            for (int i = T::kCopiesX; i < T::kCopies; ++i) {
                copy(i, s_begin + stage * T::kStageBytes);
            }
        }
        ptx::pdl_wait();
        ptx::pdl_launch();
#pragma unroll 1
        for (int stage = 0; stage < T::kStages - 1; ++stage) {
#pragma unroll
            for (int i = 0; i < T::kCopies; ++i) {
                if (i < T::kCopiesX || stage >= steps) copy(i, fill);
            }
            copied();
        }
    }
};

template <class T>
using GemmSums = float[T::kFragmentsM][2 * T::kFragmentsN][4];  // a warp's, see ptx::mma_m16n8k16

// The sums of a warp go to y. Lane (g, t) owns columns 4t to 4t+3 of every 16, rows g and g + 8: a
// row of 16 leaves as 32 or 64 whole bytes, without a way through shared memory. `add` keeps kOld
// rows of y on their way (a row at a time, a tile of 128 x 256 waited 8 times for the L2).
template <class T, Epilogue epilogue>
__device__ inline void gemm_write(void* y, const GemmShape& s, int2 place, const GemmSums<T>& acc) {
    constexpr bool kAdds = epilogue == Epilogue::add;
    const int thread = ptx::thread_again(), warp = thread / 32, lane = thread % 32;
    const int row0 = place.x * T::kTileM + warp / T::kWarpsN * T::kWarpM + lane / 4;
    const int column0 = place.y * T::kTileN + warp % T::kWarpsN * T::kWarpN + lane % 4 * 4;
    const std::size_t down = static_cast<std::size_t>(s.ldy) * (T::kMmaM / 2);
    using Value = std::conditional_t<kAdds || epilogue == Epilogue::store_f32, float, bf16>;
    Value* to = static_cast<Value*>(y) + static_cast<std::size_t>(row0) * s.ldy + column0;
    const Value* from = to;
    const auto left = [&](int i, int j) {  // values of the row from here on
        return row0 + i * (T::kMmaM / 2) < s.M ? s.N - column0 - j * (2 * T::kMmaN) : 0;
    };
    float4 old[T::kOld][T::kFragmentsN] = {};
    const auto load = [&](int i) {
        for (int j = 0; kAdds && j < T::kFragmentsN; ++j) {  // past N is still within ldy
            const auto p = reinterpret_cast<const float4*>(from + j * (2 * T::kMmaN));
            if (left(i, j) > 0) old[i % T::kOld][j] = __ldcg(p);
        }
        from += down;
    };
    for (int i = 0; i < T::kOld; ++i) load(i);
#pragma unroll
    for (int i = 0; i < T::kRows; ++i) {
#pragma unroll
        for (int j = 0; j < T::kFragmentsN; ++j) {
            const float *p = acc[i / 2][2 * j] + i % 2 * 2, *q = acc[i / 2][2 * j + 1] + i % 2 * 2;
            const float4& o = old[i % T::kOld][j];
            float4 v = {p[0], p[1], q[0], q[1]};
            if (kAdds) v = {o.x + v.x, o.y + v.y, o.z + v.z, o.w + v.w};
            if (epilogue == Epilogue::relu2) {
                v = {fmaxf(v.x, 0.0f), fmaxf(v.y, 0.0f), fmaxf(v.z, 0.0f), fmaxf(v.w, 0.0f)};
                v = {v.x * v.x, v.y * v.y, v.z * v.z, v.w * v.w};
            }
            Value* at = to + j * (2 * T::kMmaN);
            if constexpr (sizeof(Value) == sizeof(bf16)) {
                const uint2 pairs = {pack(v.x, v.y), pack(v.z, v.w)};
                if (left(i, j) >= 4) *reinterpret_cast<uint2*>(at) = pairs;
                if (left(i, j) == 2) *reinterpret_cast<std::uint32_t*>(at) = pairs.x;
            } else {
                if (left(i, j) >= 4) *reinterpret_cast<float4*>(at) = v;
                if (left(i, j) == 2) *reinterpret_cast<float2*>(at) = {v.x, v.y};
            }
        }
        to += down;
        if (i + T::kOld < T::kRows) load(i + T::kOld);
    }
}

// gemm: y[m,n] (+)= f(sum_k x[m,k] w[n,k]), f the identity or max(.,0)^2
//   x (M, K) bf16, w (N, K) bf16 -> y (M, N) bf16 or f32; K % 64 == 0, N even, M any
//   grid: one block per tile or as many as run at once, which take tiles b, b + grid, ...; or two
//     per tile, all of them running: the second waits until the first has added its sum
//   cost: 2*M*N*K flops; tensor-bound above a few hundred rows
//   order: fp32, k ascending by 16, one sum or see first_sum: the same bits for any tile and M
//   source: swizzle and pipeline as in spatters/mma-matmul and CUTLASS's sm80 mainloop
template <class T>
__global__ void __launch_bounds__(T::kThreads, T::kBlocks)
    gemm_kernel(void* y, const bf16* x, const bf16* w, GemmShape s, Epilogue epilogue,
                int* counters) {
    extern __shared__ __align__(128) unsigned char s_stages[];  // [kStages][x rows, w rows][kStepK]
    const std::uint32_t s_begin = ptx::shared(s_stages);
    const GemmWork<T> work(s, epilogue);
    GemmCopier<T> copier{s, work, x, w, s_begin};

    // The multiplying side. Lanes of ldmatrix: 16 rows of x, then their second 8 values of k; 8
    // rows of w, then their second 8 values, then the next 8 rows.
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int row_a = warp / T::kWarpsN * T::kWarpM + lane % 16;
    const int row_b = T::kTileM + warp % T::kWarpsN * T::kWarpN + lane / 16 * 8 + lane % 8;
    const int key = lane % 8 >> T::kKeyShift & T::kKeys;
    const std::uint32_t at_a = row_a * T::kRowBytes + ((lane / 16 ^ key) << 4);
    const std::uint32_t at_b = row_b * T::kRowBytes + ((lane / 8 % 2 ^ key) << 4);
    constexpr int kNext = T::kMmaM * T::kRowBytes;  // from a fragment to the next
    std::uint32_t a[T::kSets][T::kFragmentsM][4], b[2][T::kHeldN][4];
    std::uint32_t use = s_begin;              // the stage
    const auto fetch_a = [&](int k, int i) {  // the i-th fragment of mma step k
        ptx::ldmatrix_x4(a[k % T::kSets][i], ((use + at_a) ^ (k * 32)) + i * kNext);
    };
    const auto fetch_b = [&](std::uint32_t(&to)[4], int k, int j) {
        ptx::ldmatrix_x4(to, ((use + at_b) ^ (k * 32)) + j * kNext);
    };
    const auto fetch_all = [&](int k) {
        for (int i = 0; i < T::kFragmentsM; ++i) fetch_a(k, i);
        for (int j = 0; j < T::kHeldN; ++j) fetch_b(b[k % 2][j], k, j);
    };
    const auto arrive = [&] {  // the next stage has come, and everyone has read the one before
        ptx::cp_async_wait<T::kStages - 2>();
        __syncthreads();
    };
    copier.start();
    arrive();

    int tile = work.first, k0 = work.from;
#pragma unroll 1
    while (tile < work.tiles) {
        const int k1 = k0 < work.middle ? work.middle : work.to;
        fetch_all(0);  // again, after the last sum's end has done it: writing needs the registers
        float acc[T::kFragmentsM][2 * T::kFragmentsN][4] = {};
#pragma unroll 1
        for (; k0 < k1; k0 += T::kStepK) {
#pragma unroll
            for (int k = 0; k < T::kDepth; ++k) {
                const int next = (k + 1) % T::kDepth;
                const auto turn = [&] {
                    if (next != 0) return;
                    arrive();
                    use += T::kStageBytes;
                    if (use == s_begin + T::kSharedBytes) use = s_begin;
                };
                if (!T::kTurns) turn(), fetch_all(next);
#pragma unroll
                for (int i = 0; i < T::kCopies; ++i) {
                    if (i * (T::kDepth - 1) / T::kCopies == k) copier.copy(i, copier.fill);
                }
                if (k == T::kDepth - 2) copier.copied();
#pragma unroll
                for (int j = 0; j < T::kFragmentsN; ++j) {
                    const bool last = j == T::kFragmentsN - 1;
                    const int held = (k * T::kFragmentsN + j) % 2;
                    if (T::kTurns && last) turn();
                    if (T::kTurns) fetch_b(b[1 - held][0], last ? next : k, last ? 0 : j + 1);
                    const auto& r = T::kTurns ? b[held][0] : b[k % 2][j % T::kHeldN];
                    for (int i = 0; i < T::kFragmentsM; ++i) {
                        for (int n = 0; n < 2; ++n) {  // left and right, then right and left
                            const int h = (i + n) % 2;
                            ptx::mma_m16n8k16(acc[i][2 * j + h], a[k % T::kSets][i], r[h * 2],
                                              r[h * 2 + 1]);
                        }
                        if (T::kTurns && last) fetch_a(next, i);
                    }
                }
            }
        }
        const int2 place = work.place(tile);
        if (work.second) {  // the tile's other block has added the first sum
            while (threadIdx.x == 0 && ptx::load_acquire(counters + tile) == 0) continue;
            __syncthreads();
            if (threadIdx.x == 0) counters[tile] = 0;  // for the next launch
        }
        constexpr auto kStore = Epilogue::store, kRelu2 = Epilogue::relu2;
        constexpr auto kAdd = Epilogue::add, kStoreF32 = Epilogue::store_f32;
        if (epilogue == kStore) gemm_write<T, kStore>(y, s, place, acc);
        if (epilogue == kRelu2) gemm_write<T, kRelu2>(y, s, place, acc);
        if (epilogue == kAdd) gemm_write<T, kAdd>(y, s, place, acc);
        if (epilogue == kStoreF32) gemm_write<T, kStoreF32>(y, s, place, acc);
        if (work.apart && !work.second) {
            __syncthreads();
            if (threadIdx.x == 0) ptx::store_release(counters + tile, 1);
        }
        if (k0 == work.to) k0 = work.from, tile += gridDim.x;
    }
}

// Blocks that fit on an SM; the system takes 1 KB of shared memory beside each.
template <class T>
int gemm_resident(const Device& d) {
    constexpr int kReserved = 1024;
    return std::min(T::kBlocks, (d.shared_bytes + kReserved) / (T::kSharedBytes + kReserved));
}
template <class T>
int gemm_blocks(const Device& d, const GemmShape& s, bool apart) {
    const int tiles = cdiv(s.M, T::kTileM) * cdiv(s.N, T::kTileN);
    return apart ? 2 * tiles : std::min(tiles, d.sms * gemm_resident<T>(d));
}
// Two blocks per tile: only while all run at once, since one waits for the other.
template <class T>
bool gemm_parts(const Device& d, const GemmShape& s, Epilogue epilogue) {
    const int room = std::min(d.sms * gemm_resident<T>(d), 2 * kGemmCounters);
    return first_sum(epilogue, s.K) < s.K && gemm_blocks<T>(d, s, true) <= room;
}

// Time for y on the fullest SM, in a unit common to all T; infinite where it cannot run.
template <class T>
double gemm_cost(const Device& d, const GemmShape& s, Epilogue epilogue, bool apart) {
    const int at_once = gemm_resident<T>(d), sums = first_sum(epilogue, s.K) < s.K ? 2 : 1;
    if (at_once == 0 || (apart && !gemm_parts<T>(d, s, epilogue))) return HUGE_VAL;
    const auto share = [](int n) {  // of the peak, with n blocks on the SM
        return T::kAlone + (T::kFull - T::kAlone) * (n - 1.0) / std::max(T::kBlocks - 1, 1);
    };
    const int tiles = cdiv(s.M, T::kTileM) * cdiv(s.N, T::kTileN), halves = apart ? 2 : 1;
    const int items = cdiv(tiles * halves, d.sms), rest = items % at_once;
    // what y has must be read first: nothing hides that where a block is alone
    const int add = epilogue != Epilogue::add ? 0 : T::kBlocks == 1 ? 450 : 100;
    const double ends = (T::kStart + add) * (apart ? 1.5 : sums);  // 1.5: one waits for the other
    const double item = double{T::kTileM} * T::kTileN * (s.K / halves + ends);
    return item * ((items - rest) / share(at_once) + (rest > 0 ? rest / share(rest) : 0.0));
}

template <class T>
void gemm_launch(const Device& d, void* y, const bf16* x, const bf16* w, const GemmShape& s,
                 Epilogue epilogue, bool apart) {
    launch({.grid = dim3(gemm_blocks<T>(d, s, apart)),
            .block = dim3(T::kThreads),
            .shared_bytes = T::kSharedBytes,
            .stream = d.stream,
            .overlap = d.overlap},
           gemm_kernel<T>, y, x, w, s, epilogue, d.counters);
}

// The tiles to choose from. Widths that are not powers of two are there for the sake of the last
// wave: 2048 x 1280 is 128 tiles of 128 x 160 for 132 SMs, and 160 tiles of 128 x 128.
template <class... Ts>
struct GemmTiles {
    template <class F>  // f(T{}, apart) for the cheapest
    static void choose(const Device& d, const GemmShape& s, Epilogue epilogue, F&& f) {
        double cost[2 * sizeof...(Ts)], *end = cost;
        ((*end++ = gemm_cost<Ts>(d, s, epilogue, false),
          *end++ = gemm_cost<Ts>(d, s, epilogue, true)),
         ...);
        int best = static_cast<int>(std::min_element(cost, end) - cost);
        ((best == 0 || best == 1 ? f(Ts{}, best == 1) : void(), best -= 2), ...);
    }
    template <class F>  // f(T{}) for each
    static void each(F&& f) {
        (f(Ts{}), ...);
    }
};
using GemmAll = GemmTiles<  // K step, warp tile, stages, blocks; fitted
    GemmTraits<256, 128, 64, 64, 64, 4, 1, 84, 84, 150>,  // 192 KB
    GemmTraits<128, 256, 32, 64, 64, 4, 1, 84, 84, 150>,  // 96 KB: fits GB10
    GemmTraits<128, 320, 64, 64, 80, 4, 1, 83, 83, 150>,  // 224 KB
    GemmTraits<128, 192, 64, 64, 48, 4, 1, 84, 84, 200>,  // 160 KB
    GemmTraits<128, 160, 64, 32, 80, 5, 1, 78, 78, 200>,  // 180 KB
    GemmTraits<128, 128, 64, 64, 64, 3, 2, 82, 73, 200>,  // 96 KB
    GemmTraits<128, 128, 32, 64, 64, 3, 2, 72, 47, 50>,   // 48 KB: two fit a GB10 SM
    GemmTraits<128, 96, 64, 64, 48, 4, 2, 72, 65, 150>,   // 112 KB
    GemmTraits<64, 128, 64, 32, 64, 4, 2, 66, 57, 200>>;  // 96 KB

// y = epilogue(x w^T), see gemm_kernel; bf16 y for store and relu2, f32 for the others.
template <Epilogue epilogue>
void gemm(const Device& d, void* y, const bf16* x, const bf16* w, const GemmShape& s) {
    GemmAll::choose(d, s, epilogue, [&](auto traits, bool apart) {
        gemm_launch<decltype(traits)>(d, y, x, w, s, epilogue, apart);
    });
}

// Which tile a GPU would use: "128x256x32", with " halves" where two blocks make it.
template <class T>
const char* gemm_name(bool apart) {
    static const std::string whole = std::to_string(T::kTileM) + "x" + std::to_string(T::kTileN) +
                                     "x" + std::to_string(T::kStepK);
    static const std::string halves = whole + " halves";
    return apart ? halves.c_str() : whole.c_str();
}
inline const char* gemm_tile_name(int sms, int shared_bytes, int M, int N, int K, bool adds) {
    const char* name = nullptr;
    GemmAll::choose({.sms = sms, .shared_bytes = shared_bytes}, {M, N, K, K, K, N},
                    adds ? Epilogue::add : Epilogue::store,
                    [&](auto traits, bool apart) { name = gemm_name<decltype(traits)>(apart); });
    return name;
}

// f(name, kernel, threads, shared bytes, needs more than the 99 KB of a GB10) for every choice.
template <class F>
void for_each_gemm(F f) {
    GemmAll::each([&](auto traits) {
        using T = decltype(traits);
        f("gemm_kernel<" + std::string(gemm_name<T>(false)) + ">",
          reinterpret_cast<const void*>(&gemm_kernel<T>), T::kThreads, T::kSharedBytes,
          T::kSharedBytes > 99 * 1024);
    });
}

}  // namespace cuda

// ==== 9. attention ===============================================================================
// Prefill: many queries against the pages of the KV cache. After QK-norm every score is within
// qk_scale^2 * sqrt(hd) (16.3 for nanochat), so softmax needs no running maximum: a constant shift
// keeps exp2 in range, and what one key adds to a query's sums does not depend on the other keys.

namespace cuda {

inline constexpr int kQueryRows = 128;  // rows of a query tile, at most

// Rows first_row ... first_row + rows - 1 of q are positions pos, pos + 1, ... of sequence `slot`.
struct QueryTile {
    int first_row, rows, pos, slot;
};

struct AttentionArgs {
    bf16* z;  // out: row r, query head h at z + r * ldz + h * hd
    int ldz;
    const bf16* q;  // row r, query head h at q + r * ldq + h * HD, zero from hd to HD
    int ldq;
    const bf16* pages;          // page p begins at pages + p * page_stride
    std::int64_t page_stride;   // values from page to page
    std::int64_t layer_offset;  // in a page: kv head g has k (64, HD) at + g * 2 * 64 * HD, then v
    const int* page_table;      // positions 64 i ... 64 i + 63 of `slot`: [slot * max_pages + i]
    int max_pages;
    const QueryTile* tiles;  // on the device, longest (largest pos) first
    int n_tiles;
    int n_head, n_kv_head, hd;     // query head h reads kv head h / (n_head / n_kv_head)
    int window;                    // query t sees key s if 0 <= t - s <= window
    float scale_log2, shift_log2;  // weight = exp2(score * scale_log2 - shift_log2)
};

// How a block does its share; the results have the same bits for every choice.
struct AttentionShape {
    int HD;               // head dimension, padded
    int row_tiles;        // query rows of a warp / 16; with 2, k and v fragments serve twice
    int keys;             // of a step: 32 or 64
    bool q_in_registers;  // else in shared memory
    int blocks;           // per SM, the bound for registers
};

template <AttentionShape shape>
struct AttentionTraits {
    static constexpr int HD = shape.HD, kKeys = shape.keys, kRowTiles = shape.row_tiles;
    static constexpr int kWarps = 4, kThreads = 32 * kWarps, kBlocks = shape.blocks;
    static constexpr int kWarpRows = 16 * kRowTiles, kRows = kWarps * kWarpRows;
    static constexpr int kSplit = kQueryRows / kRows;  // blocks per query tile
    static constexpr int kRowBytes = 2 * HD, kStageBytes = kKeys * kRowBytes;
    static constexpr int kQBytes = shape.q_in_registers ? 0 : kRows * kRowBytes;
    static constexpr int kSharedBytes = kQBytes + 4 * kStageBytes;  // two stages of k, two of v
    static constexpr int kGroups = kKeys / 16;                      // of 16 keys
    static constexpr bool kQInRegisters = shape.q_in_registers;
    static_assert(HD == 64 || HD == 128 || HD == 256, "rows of 128 bytes or more are swizzled");
    static_assert(kPage % kKeys == 0 && kKeys % 16 == 0, "a step must not cross a page");
    static_assert(kQueryRows % kRows == 0, "a query tile is cut into whole blocks");
    static_assert(kStageBytes % (16 * kThreads) == 0, "each thread copies as many pieces");
    static_assert(kSharedBytes <= 99 * 1024, "limit of GB10");
};

// Address of the 16-byte piece (row, piece) of a tile in shared memory. Eight rows of one piece
// lie in eight different groups of four banks, as both cp.async and ldmatrix want it.
template <int HD>
__device__ inline std::uint32_t swizzled(int row, int piece) {
    return static_cast<std::uint32_t>(row * 2 * HD + (piece ^ (row & 7)) * 16);
}
// From the address of piece 0 or 1 to that of the piece 2 * pair further on (swizzled): bits 5 and
// 6 are exchanged within 128 bytes, the rest is a constant for the instruction.
__device__ inline std::uint32_t piece_pair(std::uint32_t address, int pair) {
    return (address ^ static_cast<std::uint32_t>(pair % 4 * 32)) + pair / 4 * 128;
}

inline constexpr float kWeightless = -127.0f;  // an exponent whose weight is exactly zero

// The registers of one warp. Lane (g, t) = (lane / 4, lane % 4) holds rows g and g + 8 of each row
// tile and columns 2t, 2t + 1 of each 8 keys (x) or 8 dimensions (o).
template <class Traits>
struct AttentionWarp {
    static constexpr int HD = Traits::HD, kRowTiles = Traits::kRowTiles;
    static constexpr int kKeyTiles = Traits::kKeys / 8, kSteps = HD / 16;
    static constexpr int kQ = Traits::kQInRegisters ? kSteps : 1;
    float o[kRowTiles][HD / 8][4] = {};
    float x[kRowTiles][kKeyTiles][4];                // exponents: score * scale_log2 - shift_log2
    std::uint32_t p[kRowTiles][Traits::kGroups][4];  // weights, as A fragments of the value product
    std::uint32_t q[kQ][kRowTiles][4];
    float sum[kRowTiles][2] = {};  // of rows g and g + 8

    // Query fragments straight from memory; rows beyond `last_row` repeat it.
    __device__ __forceinline__ void load_q(const bf16* from, int ldq, int warp_row, int last_row) {
        const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
            for (int c = 0; c < 4; ++c) {
                const int row = min(warp_row + m * 16 + c % 2 * 8 + lane / 4, last_row);
                const bf16* const at = from + std::int64_t{row} * ldq + lane % 4 * 2 + c / 2 * 8;
#pragma unroll
                for (int i = 0; i < kQ; ++i)
                    q[i][m][c] = *reinterpret_cast<const std::uint32_t*>(at + i * 16);
            }
        }
    }

    // x = exponents of the scores of q with the keys at k.
    __device__ __forceinline__ void score(std::uint32_t k, std::uint32_t q_shared, float scale,
                                          float shift) {
        float s[kRowTiles][kKeyTiles][4] = {};
#pragma unroll
        for (int i = 0; i < kSteps; ++i) {  // 16 dimensions
            const int iq = Traits::kQInRegisters ? i : 0;
            if constexpr (!Traits::kQInRegisters) {
#pragma unroll
                for (int m = 0; m < kRowTiles; ++m)
                    ptx::ldmatrix_x4(q[0][m], piece_pair(q_shared, i) + m * 16 * Traits::kRowBytes);
            }
#pragma unroll
            for (int n = 0; n < Traits::kGroups; ++n) {  // 16 keys
                std::uint32_t b[4];
                ptx::ldmatrix_x4(b, piece_pair(k, i) + n * 16 * Traits::kRowBytes);
#pragma unroll
                for (int m = 0; m < kRowTiles; ++m) {
                    ptx::mma_m16n8k16(s[m][2 * n], q[iq][m], b[0], b[1]);
                    ptx::mma_m16n8k16(s[m][2 * n + 1], q[iq][m], b[2], b[3]);
                }
            }
        }
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
            for (int n = 0; n < kKeyTiles; ++n)
#pragma unroll
                for (int c = 0; c < 4; ++c) x[m][n][c] = fmaf(s[m][n][c], scale, -shift);
    }

    // Weight zero for every key that is not visible. `distance` is t - s of element 0.
    __device__ __forceinline__ void mask(int distance, int window) {
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
            for (int n = 0; n < kKeyTiles; ++n)
#pragma unroll
                for (int c = 0; c < 4; ++c) {
                    const int d = distance + 16 * m + 8 * (c / 2) - 8 * n - c % 2;
                    const bool visible = static_cast<unsigned>(d) <= static_cast<unsigned>(window);
                    if (!visible) x[m][n][c] = kWeightless;
                }
    }

    // Weights of 8 keys. The sum takes them rounded, as the value product does.
    __device__ __forceinline__ void weigh(int tile) {
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) {
            const float(&e)[4] = x[m][tile];
            const std::uint32_t upper = pack(ptx::exp2(e[0]), ptx::exp2(e[1]));
            const std::uint32_t lower = pack(ptx::exp2(e[2]), ptx::exp2(e[3]));
            p[m][tile / 2][tile % 2 * 2] = upper;
            p[m][tile / 2][tile % 2 * 2 + 1] = lower;
            sum[m][0] += low_half(upper), sum[m][1] += low_half(lower);
            sum[m][0] += high_half(upper), sum[m][1] += high_half(lower);
        }
    }

    // o += exp2(x) v, the exponentials of 16 keys computed under the product of the 16 before.
    __device__ __forceinline__ void add_values(std::uint32_t v) {
        weigh(0), weigh(1);
#pragma unroll
        for (int i = 0; i < Traits::kGroups; ++i) {  // 16 keys
            if (i + 1 < Traits::kGroups) weigh(2 * i + 2), weigh(2 * i + 3);
#pragma unroll
            for (int n = 0; n < kSteps; ++n) {  // 16 dimensions
                std::uint32_t b[4];
                ptx::ldmatrix_x4_trans(b, piece_pair(v, n) + i * 16 * Traits::kRowBytes);
#pragma unroll
                for (int m = 0; m < kRowTiles; ++m) {
                    ptx::mma_m16n8k16(o[m][2 * n], p[m][i], b[0], b[1]);
                    ptx::mma_m16n8k16(o[m][2 * n + 1], p[m][i], b[2], b[3]);
                }
            }
        }
    }

    // z = o / sum. Four lanes hold columns 2t, 2t + 1 of the same four 8 dimensions: transposed
    // among them, lane t has all 8 of the t-th, one store of 16 bytes.
    __device__ __forceinline__ void store(bf16* to, int ldz, int hd, int warp_row, int rows) {
        const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
        for (int mh = 0; mh < 2 * kRowTiles; ++mh) {
            const int m = mh / 2, half = mh % 2;
            float all = sum[m][half];
            all += __shfl_xor_sync(~0u, all, 1);
            all += __shfl_xor_sync(~0u, all, 2);
            const float inverse = 1.0f / all;
            const int row = warp_row + m * 16 + half * 8 + lane / 4;
            bf16* const z = to + std::int64_t{row} * ldz;
#pragma unroll
            for (int n = 0; n < HD / 8; n += 4) {
                std::uint32_t r[4];
#pragma unroll
                for (int i = 0; i < 4; ++i)
                    r[i] =
                        pack(o[m][n + i][2 * half] * inverse, o[m][n + i][2 * half + 1] * inverse);
#pragma unroll
                for (int bit = 1; bit <= 2; bit *= 2) {
                    const bool odd = (lane & bit) != 0;
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        if ((i & bit) != 0) continue;
                        const std::uint32_t got =
                            __shfl_xor_sync(~0u, odd ? r[i] : r[i + bit], bit);
                        r[i] = odd ? got : r[i];
                        r[i + bit] = odd ? r[i + bit] : got;
                    }
                }
                const int column = (n + lane % 4) * 8;
                if (hd % 8 == 0) {
                    if (row < rows && column < hd)
                        *reinterpret_cast<uint4*>(z + column) = {r[0], r[1], r[2], r[3]};
                } else {
#pragma unroll
                    for (int i = 0; i < 4; ++i)
                        if (row < rows && column + 2 * i < hd)
                            *reinterpret_cast<std::uint32_t*>(z + column + 2 * i) = r[i];
                }
            }
        }
    }
};

// prefill_attention: z[t,h,:] = sum_s w[t,s] v[s,:] / sum_s w[t,s], w = exp2(q.k scale - shift)
//   q (rows, H, HD) bf16, k and v in pages (64, HD) bf16, z (rows, H, hd) bf16; keys s of the same
//     sequence with 0 <= t - s <= window
//   grid: one block per (query tile part, head); a warp owns 16 or 32 rows and all their keys
//   cost: 4*hd flops per visible pair and head; tensor-bound, one exponential per pair beside it
//   order: keys ascend in steps at absolute multiples of 32 or 64; a masked key weighs exactly 0,
//     so a query's bits depend neither on its tile nor on what else is in the batch
//   source: FlashAttention-2 (Dao 2023) without its running maximum
template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kBlocks)
    prefill_attention_kernel(const AttentionArgs a, const int heads_together) {
    constexpr int HD = Traits::HD, kKeys = Traits::kKeys, kPieces = HD / 8;
    extern __shared__ __align__(128) unsigned char s_attention[];
    ptx::pdl_wait();
    ptx::pdl_launch();

    // Block -> (heads_together heads) of one part of one tile, tiles in the host's order.
    unsigned index = blockIdx.x;
    const int head_inside = static_cast<int>(index % heads_together);
    index /= heads_together;
    const int part = Traits::kSplit - 1 - static_cast<int>(index % Traits::kSplit);
    index /= Traits::kSplit;
    const int head = static_cast<int>(index / a.n_tiles) * heads_together + head_inside;
    const QueryTile tile = a.tiles[index % a.n_tiles];
    const int rows = min(tile.rows - part * Traits::kRows, Traits::kRows);
    if (rows <= 0) return;
    const int pos = tile.pos + part * Traits::kRows;
    const std::int64_t first_row = tile.first_row + part * Traits::kRows;

    // Steps of keys that the block needs (pos - window cannot overflow: pos >= 0), and the warp's
    // queries; a warp without rows sees nothing.
    const int first = max(pos - a.window, 0) / kKeys, last = (pos + rows - 1) / kKeys;
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const int warp_row = static_cast<int>(threadIdx.x) / 32 * Traits::kWarpRows;
    const int t_first = warp_row < rows ? pos + warp_row : -(1 << 30);
    const int t_last = t_first + Traits::kWarpRows - 1;

    // Copies: a thread moves 16 bytes of every kRowsAtOnce-th row.
    constexpr int kRowsAtOnce = Traits::kThreads / kPieces;
    const int copy_row = static_cast<int>(threadIdx.x) / kPieces;
    const int copy_piece = static_cast<int>(threadIdx.x) % kPieces;
    const std::uint32_t s_q = ptx::shared(s_attention);
    const std::uint32_t s_k = s_q + Traits::kQBytes, s_v = s_k + 2 * Traits::kStageBytes;
    const int* const table = a.page_table + static_cast<std::int64_t>(tile.slot) * a.max_pages;
    const int kv_head = head / (a.n_head / a.n_kv_head);
    const bf16* const kv = a.pages + a.layer_offset +
                           static_cast<std::int64_t>(kv_head) * (2 * kPage * HD) + copy_row * HD +
                           copy_piece * 8;
    const auto page_of = [&](int j) { return table[min(j, last) * kKeys / kPage]; };
    const auto copy = [&](std::uint32_t stages, int page, int j, int offset) {
        const bf16* const from =
            kv + page * a.page_stride + offset + (j * kKeys & (kPage - 1)) * HD;
        const std::uint32_t to = stages + (j & 1) * Traits::kStageBytes;
        const int here = pos + rows - j * kKeys - copy_row;  // beyond lies what others left there
#pragma unroll
        for (int r = 0; r < kKeys; r += kRowsAtOnce) {
            ptx::cp_async_16(to + swizzled<HD>(copy_row + r, copy_piece), from + r * HD,
                             r < here ? 16 : 0);  // zeros: a weight of 0 times NaN is not 0
        }
    };
    constexpr int kValues = kPage * HD;  // from k to v in a page

    // Queries, and the first copies.
    AttentionWarp<Traits> w;
    const bf16* const q = a.q + first_row * a.ldq + head * HD;
    if constexpr (Traits::kQInRegisters) {
        w.load_q(q, a.ldq, warp_row, rows - 1);
    } else {
#pragma unroll
        for (int r = 0; r < Traits::kRows; r += kRowsAtOnce) {
            const std::int64_t row = min(copy_row + r, rows - 1);
            ptx::cp_async_16(s_q + swizzled<HD>(copy_row + r, copy_piece),
                             q + row * a.ldq + copy_piece * 8);
        }
    }
    copy(s_k, page_of(first), first, 0);
    copy(s_v, page_of(first), first, kValues);
    ptx::cp_async_commit();
    int page = page_of(first + 1);

    // Row and piece of this lane for ldmatrix: q as (16 rows, 16 dimensions), k as (16 keys, 16
    // dimensions), v as (16 keys, 16 dimensions) to be transposed.
    const std::uint32_t lane_q = s_q + swizzled<HD>(warp_row + lane % 16, lane / 16);
    const std::uint32_t lane_k = s_k + swizzled<HD>(lane % 8 + lane / 16 * 8, lane / 8 % 2);
    const std::uint32_t lane_v = s_v + swizzled<HD>(lane % 16, lane / 16);
    const int distance = t_first + lane / 4 - lane % 4 * 2;

    // One barrier a step: it says that this step's copies are there and that every warp is done
    // with the stages of the step before, which the next copies overwrite.
    for (int j = first; j <= last; ++j) {
        ptx::cp_async_wait<0>();
        __syncthreads();
        if (j < last) {
            copy(s_k, page, j + 1, 0);
            copy(s_v, page, j + 1, kValues);
        }
        ptx::cp_async_commit();
        page = page_of(j + 2);
        if (j * kKeys > t_last || t_first - ((j + 1) * kKeys - 1) > a.window) continue;
        w.score(lane_k + (j & 1) * Traits::kStageBytes, lane_q, a.scale_log2, a.shift_log2);
        // only a step that holds a pair that is not visible pays for the mask
        if ((j + 1) * kKeys - 1 > t_first || t_last - j * kKeys > a.window)
            w.mask(distance - j * kKeys, a.window);
        w.add_values(lane_v + (j & 1) * Traits::kStageBytes);
    }
    w.store(a.z + first_row * a.ldz + head * a.hd, a.ldz, a.hd, warp_row, rows);
}

// Heads whose blocks run side by side: as many as keep their keys and values in 16 MB of L2 (less
// than GB10's 24 MB and a half of H200's), so that long tiles of all of them start first.
inline int heads_together(const AttentionArgs& a, int HD) {
    constexpr std::int64_t kL2Bytes = 16 << 20;
    const std::int64_t bytes = std::int64_t{4} * kQueryRows * a.n_tiles * HD * a.n_kv_head;
    int heads = a.n_head;  // a divisor of n_head
    while (heads > 1 && (a.n_head % heads != 0 || bytes / a.n_head * heads > kL2Bytes)) --heads;
    return heads;
}

template <AttentionShape shape>
void prefill_attention_shape(const Device& d, const AttentionArgs& a) {
    using Traits = AttentionTraits<shape>;
    if (a.n_tiles == 0) return;
    const unsigned blocks = static_cast<unsigned>(a.n_tiles * Traits::kSplit * a.n_head);
    launch({.grid = blocks,
            .block = Traits::kThreads,
            .shared_bytes = Traits::kSharedBytes,
            .stream = d.stream,
            .overlap = d.overlap},
           prefill_attention_kernel<Traits>, a, heads_together(a, Traits::HD));
}

// Tall blocks read k and v half as often; small work takes short ones, so that every SM has some.
template <int HD>
void prefill_attention(const Device& d, const AttentionArgs& a) {
    constexpr bool kNarrow = HD == 64;
    const bool small = std::int64_t{a.n_tiles} * a.n_head < std::int64_t{4} * d.sms;
    if constexpr (HD == 256)
        prefill_attention_shape<AttentionShape{256, 1, 32, false, 2}>(d, a);
    else if (small)
        prefill_attention_shape<AttentionShape{HD, 1, 64, true, kNarrow ? 3 : 2}>(d, a);
    else
        prefill_attention_shape<AttentionShape{HD, 2, kNarrow ? 64 : 32, kNarrow, 2}>(d, a);
}

}  // namespace cuda

// ---- decode attention

namespace cuda {

struct DecodeAttentionTraits {
    static constexpr int kThreads = 256;
    static constexpr int kBlocks = 4;    // per SM: the tail of one hides behind the loads of others
    static constexpr int kSplits = 16;   // blocks that share one head's keys, at most
    static constexpr int kMinKeys = 96;  // that are worth a block
    static constexpr int kAhead = 3;     // keys a group of lanes has on their way
    static_assert(kThreads >= 256 && kThreads % 32 == 0, "a thread for every value of a head");
};
struct DecodeAttentionArgs {
    HeadArgs head;
    Cache cache;
    const float* qkv;  // (R, ld): H heads of q, K of k, K of v
    int ld;
    const bf16* xb;        // (R, ld_x): the layer's input before its norm, for the gate
    const float* squares;  // (R, ld_x / kSumColumns)
    int ld_x, D;
    int window;
    float scale_log2, shift_log2;  // p = 2^(score * scale - shift)
    float* partial;  // (R, H, kSplits, HD + 1): weighted values, and the sum of the weights
    int* arrived;    // (R, H): blocks that are done; zero between launches
    bf16* z;         // (R, ld_z)
    int ld_z;
};

// Rotation, norm and scale of one head, by one warp: in (hd) f32 -> out (HD) f32, rounded to bf16.
template <int HD>
__device__ inline void rotate_head(float* out, const float* in, const HeadArgs& p, int pos) {
    constexpr int kPairs = HD / 2 / 32;
    const int lane = static_cast<int>(threadIdx.x % 32), half = p.hd / 2;
    const std::int64_t at = std::int64_t{pos} * half;
    float lo[kPairs], hi[kPairs], sum = 0;
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
        const int j = lane + 32 * i;
        const bool there = j < half;
        const float x1 = there ? in[j] : 0, x2 = there ? in[j + half] : 0;
        const float c = there ? p.cos[at + j] : 0, s = there ? p.sin[at + j] : 0;
        lo[i] = x1 * c + x2 * s;
        hi[i] = x2 * c - x1 * s;
        sum += lo[i] * lo[i] + hi[i] * hi[i];
    }
    const float scale = rsqrtf(warp_sum(sum) / static_cast<float>(p.hd) + kEpsilon) * p.qk_scale;
    for (int j = p.hd + lane; j < HD; j += 32) out[j] = 0;
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
        const int j = lane + 32 * i;
        if (j >= half) continue;
        out[j] = __bfloat162float(__float2bfloat16_rn(lo[i] * scale));
        out[j + half] = __bfloat162float(__float2bfloat16_rn(hi[i] * scale));
    }
}

// The new position's value with its value embedding, by one warp: out (HD) f32, rounded to bf16.
template <int HD>
__device__ inline void gated_value(float* out, const DecodeAttentionArgs& a, const RowInfo& row,
                                   int r, int kv) {
    const HeadArgs& p = a.head;
    const int lane = static_cast<int>(threadIdx.x % 32);
    const float* const in = a.qkv + std::int64_t{r} * a.ld + (p.n_head + p.n_kv_head + kv) * p.hd;
    const bf16* extra = nullptr;
    float gate = 0;
    if (p.value_embed != nullptr) {
        extra = p.value_embed + (std::int64_t{row.id} * p.n_kv_head + kv) * p.hd;
        const int parts = a.ld_x / kSumColumns;
        float sum = 0;
        for (int i = lane; i < parts; i += 32) sum += a.squares[std::int64_t{r} * parts + i];
        const float rstd = rsqrtf(warp_sum(sum) / static_cast<float>(a.D) + kEpsilon);
        gate = value_gate<32>(p, kv, a.xb + std::int64_t{r} * a.ld_x, rstd);
    }
    for (int j = lane; j < HD; j += 32) {
        float v = j < p.hd ? in[j] : 0.0f;
        if (extra != nullptr && j < p.hd) v += gate * __bfloat162float(extra[j]);
        out[j] = __bfloat162float(__float2bfloat16_rn(v));
    }
}

// decode_attention: z = softmax(q k^T / sqrt(hd)) v for one new token per sequence; k, v are cached
//   qkv (R, (H + 2K) hd) f32 -> z (R, H * hd) bf16; cache pages (.., 64, HD) bf16
//   grid: (splits of the keys, H, R); HD/8 lanes read a key, 16 bytes each
//   cost: reads 4*HD bytes per visible key and head; bandwidth-bound
//   order: keys by (split, group of lanes, distance), groups then splits in order: only pos decides
//   source: Flash-Decoding (Dao et al. 2023); no running maximum: QK norm bounds the scores. CPU
//           twin ops::attention
template <int HD>
__global__ void __launch_bounds__(DecodeAttentionTraits::kThreads, DecodeAttentionTraits::kBlocks)
    decode_attention_kernel(const __grid_constant__ DecodeAttentionArgs a) {
    using A = DecodeAttentionTraits;
    constexpr int kLanes = HD / 8;                 // that share one key
    constexpr int kGroups = A::kThreads / kLanes;  // keys read at once
    __shared__ float s_q[HD], s_k[HD], s_v[HD];
    __shared__ float s_z[kGroups][HD], s_l[kGroups];
    __shared__ bool s_last;
    // only the product just before may still run: all but its qkv can be read already
    const auto leave = [] { ptx::pdl_wait(), ptx::pdl_launch(); };
    const int r = static_cast<int>(blockIdx.z), head = static_cast<int>(blockIdx.y);
    const int split = static_cast<int>(blockIdx.x), warp = static_cast<int>(threadIdx.x / 32);
    const HeadArgs& p = a.head;
    const RowInfo row = p.rows[r];
    if (row.slot < 0) return leave();
    const int lowest = row.pos > a.window ? row.pos - a.window : 0;  // first visible key
    const int visible = row.pos - lowest;                            // in the cache
    const int share = max(A::kMinKeys, cdiv(cdiv(visible, A::kSplits), A::kMinKeys) * A::kMinKeys);
    const int splits = max(1, cdiv(visible, share));
    if (split >= splits) return leave();
    const bool newest = split == splits - 1;  // this block adds the new position
    const int ratio = p.n_head / p.n_kv_head, kv = head / ratio;
    const int begin = lowest + split * share, end = min(row.pos, begin + share);

    const int group = static_cast<int>(threadIdx.x) / kLanes;
    const int part = static_cast<int>(threadIdx.x) % kLanes;
    uint4 r_k[A::kAhead], r_v[A::kAhead];
    const auto load = [&](uint4& to, int s, int offset) {
        if (s >= end) return;
        to = *reinterpret_cast<const uint4*>(a.cache.key<HD>(row.slot, kv, s) + 8 * part + offset);
    };
#pragma unroll
    for (int i = 0; i < A::kAhead; ++i) {  // on their way while the query is made
        load(r_k[i], begin + group + i * kGroups, 0);
        load(r_v[i], begin + group + i * kGroups, kPage * HD);
    }
    ptx::pdl_wait();
    ptx::pdl_launch();
    const float* const qkv = a.qkv + std::int64_t{r} * a.ld;
    if (warp == 0) rotate_head<HD>(s_q, qkv + head * p.hd, p, row.pos);
    if (newest && warp == 1) rotate_head<HD>(s_k, qkv + (p.n_head + kv) * p.hd, p, row.pos);
    if (newest && warp == 2) gated_value<HD>(s_v, a, row, r, kv);
    __syncthreads();
    if (newest && head % ratio == 0) {
        bf16* const key = a.cache.key<HD>(row.slot, kv, row.pos);
        for (int j = static_cast<int>(threadIdx.x); j < HD; j += A::kThreads) {
            key[j] = __float2bfloat16_rn(s_k[j]);
            key[j + kPage * HD] = __float2bfloat16_rn(s_v[j]);
        }
    }
    float q[8], z[8] = {}, l = 0;
#pragma unroll
    for (int j = 0; j < 8; ++j) q[j] = s_q[8 * part + j];
    const auto weight = [&](float dot) {
#pragma unroll
        for (int step = kLanes / 2; step > 0; step /= 2)
            dot += __shfl_xor_sync(~0u, dot, step, kLanes);
        return ptx::exp2(dot * a.scale_log2 - a.shift_log2);
    };
    constexpr int kRound = A::kAhead * kGroups;
    for (int from = begin; from < end; from += kRound) {
        float dot[A::kAhead];
#pragma unroll
        for (int i = 0; i < A::kAhead; ++i) {
            const std::uint32_t k[4] = {r_k[i].x, r_k[i].y, r_k[i].z, r_k[i].w};
            dot[i] = 0;
#pragma unroll
            for (int j = 0; j < 4; ++j)
                dot[i] += q[2 * j] * low_half(k[j]) + q[2 * j + 1] * high_half(k[j]);
            load(r_k[i], from + kRound + group + i * kGroups, 0);
        }
#pragma unroll
        for (int i = 0; i < A::kAhead; ++i) {
            const float e = weight(dot[i]);
            const bool there = from + group + i * kGroups < end;
            const std::uint32_t v[4] = {r_v[i].x, r_v[i].y, r_v[i].z, r_v[i].w};
#pragma unroll
            for (int j = 0; there && j < 4; ++j) {
                z[2 * j] += e * low_half(v[j]);
                z[2 * j + 1] += e * high_half(v[j]);
            }
            l += there ? e : 0.0f;
            load(r_v[i], from + kRound + group + i * kGroups, kPage * HD);
        }
    }
    if (newest) {  // every group does the sum (shuffles want all lanes), group 0 keeps it
        float dot = 0;
#pragma unroll
        for (int j = 0; j < 8; ++j) dot += q[j] * s_k[8 * part + j];
        const float w = weight(dot), e = group == 0 ? w : 0.0f;
#pragma unroll
        for (int j = 0; j < 8; ++j) z[j] += e * s_v[8 * part + j];
        l += e;
    }
#pragma unroll
    for (int j = 0; j < 8; ++j) s_z[group][8 * part + j] = z[j];
    if (part == 0) s_l[group] = l;
    __syncthreads();
    const std::int64_t task = std::int64_t{r} * p.n_head + head;
    float* const mine = a.partial + (task * A::kSplits + split) * (HD + 1);
    for (int j = static_cast<int>(threadIdx.x); j <= HD; j += A::kThreads) {
        float total = 0;
        for (int i = 0; i < kGroups; ++i) total += j < HD ? s_z[i][j] : s_l[i];
        mine[j] = total;
    }
    if (splits > 1) {  // the last block to arrive adds up, in the order of the splits
        __threadfence();
        __syncthreads();
        if (threadIdx.x == 0) s_last = atomicAdd(a.arrived + task, 1) == splits - 1;
        __syncthreads();
        if (!s_last) return;
        if (threadIdx.x == 0) a.arrived[task] = 0;
        __threadfence();
    } else {
        __syncthreads();
    }
    const float* const all = a.partial + task * A::kSplits * (HD + 1);
    if (const int j = static_cast<int>(threadIdx.x); j < p.hd) {
        float r_z[A::kSplits], r_l[A::kSplits], sum = 0, weights = 0;
#pragma unroll
        for (int s = 0; s < A::kSplits; ++s) {  // all on their way before the first is used
            r_z[s] = s < splits ? __ldcg(all + s * (HD + 1) + j) : 0.0f;
            r_l[s] = s < splits ? __ldcg(all + s * (HD + 1) + HD) : 0.0f;
        }
#pragma unroll
        for (int s = 0; s < A::kSplits; ++s) sum += r_z[s], weights += r_l[s];
        a.z[std::int64_t{r} * a.ld_z + head * p.hd + j] = __float2bfloat16_rn(sum / weights);
    }
}

template <int HD>
void decode_attention(const Device& d, const DecodeAttentionArgs& a, int rows) {
    using A = DecodeAttentionTraits;
    const int splits = std::clamp((a.window - 1) / A::kMinKeys + 1, 1, A::kSplits);
    const dim3 grid(static_cast<unsigned>(splits), static_cast<unsigned>(a.head.n_head),
                    static_cast<unsigned>(rows));
    launch({.grid = grid, .block = A::kThreads, .stream = d.stream, .overlap = d.overlap},
           decode_attention_kernel<HD>, a);
}

}  // namespace cuda

// ==== 10. logits =================================================================================
// A draw from a row of logits leaves only the token to send.

namespace cuda {

struct Draw {               // how one row's token is drawn; the rules of nanogpt.hpp's Sampler
    double uniform = 0;     // in [0, 1)
    float temperature = 0;  // 0: the largest logit
    float top_p = 1;
    int top_k = 1;
    bool operator==(const Draw&) const = default;
};

struct DrawTraits {
    static constexpr int kThreads = 1024;
    static constexpr int kMaxTopK = 128;  // candidates; a longer list is drawn from on the CPU
    static constexpr int kList = 1024;    // logits that are looked at more closely
    static_assert(kMaxTopK <= kList && kList <= kThreads,
                  "the candidates are listed, a thread each");
};

// a < b  <=>  ordered(a) < ordered(b); what is not a finite number comes below all
__device__ inline std::uint32_t ordered(float v) {
    const std::uint32_t u = __float_as_uint(v + 0.0f);  // so that -0 is as large as 0
    if ((u & 0x7f800000u) == 0x7f800000u) return 0;
    return u ^ (static_cast<std::uint32_t>(static_cast<std::int32_t>(u) >> 31) | 0x80000000u);
}

// The largest key that k values reach; count(key) tells every thread how many do. A radix selection
// takes 63 us instead of 13: most logits share a few exponents, so their counts wait for each other.
template <class Key, class Count>
__device__ inline Key kth_largest(int k, int bits, Count count) {
    Key key = 0;
    for (int bit = bits - 1; bit >= 0; --bit)
        if (count(key | Key{1} << bit) >= k) key |= Key{1} << bit;
    return key;
}

// The rows whose tokens were drawn become the rows of the next step.
struct DrawArgs {
    const float* logits;  // (rows, ld)
    int V, ld;
    const Draw* draws;  // (rows)
    RowInfo* rows;      // each that is in use moves on by its token
    int* tokens;        // (rows) for the host; -1 if no logit is a number
    int bigram_mod;     // of G2e's hash; 0: there is none
};

__device__ inline void move_on(const DrawArgs& a, int r, int token) {
    a.tokens[r] = token;
    RowInfo& row = a.rows[r];
    if (row.slot < 0 || token < 0) return;
    const int mix = static_cast<int>(36313u * static_cast<std::uint32_t>(token) ^
                                     27191u * static_cast<std::uint32_t>(row.id));
    row.bigram = a.bigram_mod > 0 ? (mix % a.bigram_mod + a.bigram_mod) % a.bigram_mod : 0;
    row.previous = row.id;
    row.id = token;
    ++row.pos;
}

// draw: a token from softmax(logits / temperature) cut to top_k, then to top_p
//   logits (R, V) f32 -> tokens (R) i32, rows (R)
//   grid: one block per row
//   cost: reads 4*V bytes a row, once more (from L2) where it is not greedy
//   order: candidates by falling logit, then rising id; sums in that order, in float64
//   source: nanochat engine.py sample_next_token; CPU twin Sampler::sample
template <int kThreads>
__global__ void __launch_bounds__(kThreads, 1) draw_kernel(DrawArgs a) {
    using T = DrawTraits;
    static_assert(kThreads == T::kThreads);
    __shared__ unsigned long long s_list[T::kList], s_key[T::kMaxTopK];
    __shared__ int s_count;
    __shared__ double s_weight[T::kMaxTopK];
    ptx::pdl_wait();
    ptx::pdl_launch();
    const int r = static_cast<int>(blockIdx.x), me = static_cast<int>(threadIdx.x);
    const float* const row = a.logits + std::int64_t{r} * a.ld;
    const Draw draw = a.draws[r];
    // a key: the logit in its order, then the lowest id first; no two are equal
    using Key = unsigned long long;
    const auto key_of = [](float logit, int id) {
        return static_cast<Key>(ordered(logit)) << 32 | (~0u - unsigned(id));
    };
    const auto each_key = [&](auto f) {
        const int wide = a.ld % 4 == 0 ? a.V / 4 : 0;  // logits that can be read four at a time
#pragma unroll 8
        for (int j = me; j < wide; j += kThreads) {
            const float4 v = reinterpret_cast<const float4*>(row)[j];
            f(key_of(v.x, 4 * j)), f(key_of(v.y, 4 * j + 1));
            f(key_of(v.z, 4 * j + 2)), f(key_of(v.w, 4 * j + 3));
        }
        for (int j = 4 * wide + me; j < a.V; j += kThreads) f(key_of(row[j], j));
    };
    Key best = 0;  // of this thread
    each_key([&](Key key) { best = max(best, key); });
    if (draw.temperature == 0 || draw.top_k == 1) {
        for (int step = 16; step > 0; step /= 2) best = max(best, __shfl_xor_sync(~0u, best, step));
        if (me % 32 == 0) s_list[me / 32] = best;
        __syncthreads();
        if (me >= 32) return;
        best = s_list[me];
        for (int step = 16; step > 0; step /= 2) best = max(best, __shfl_xor_sync(~0u, best, step));
        if (me != 0) return;
        move_on(a, r, best >> 32 == 0 ? -1 : static_cast<int>(~0u - unsigned(best)));
        return;
    }
    // What the k-th largest of the threads' best reaches, the k largest of all reach too, and few
    // others: those are listed. If they are many (equal logits), only the k largest, slowly.
    const int k = min(draw.top_k, a.V);
    const auto list = [&](Key least) {
        __syncthreads();
        if (me == 0) s_count = 0;
        __syncthreads();
        each_key([&](Key key) {
            if (key < least) return;
            if (const int i = atomicAdd(&s_count, 1); i < T::kList) s_list[i] = key;
        });
        __syncthreads();
        return s_count;
    };
    const auto reaching = [&](std::uint32_t key) { return __syncthreads_count(best >> 32 >= key); };
    int listed = list(static_cast<Key>(kth_largest<std::uint32_t>(k, 32, reaching)) << 32);
    if (listed > T::kList) listed = list(kth_largest<Key>(k, 64, list));
    // sorted by counting how many are larger
    const int count = min(k, listed);
    if (me < listed) {
        int rank = 0;
        for (int i = 0; i < listed; ++i) rank += s_list[i] > s_list[me];
        if (rank < count) s_key[rank] = s_list[me];
    }
    __syncthreads();
    const auto logit = [&](int i) { return double(row[~0u - unsigned(s_key[i])]); };
    if (me < count) s_weight[me] = exp((logit(me) - logit(0)) / double(draw.temperature));
    __syncthreads();
    if (me != 0) return;
    double total = 0;
    int n = 0;  // candidates that are numbers: they come first
    while (n < count && s_key[n] >> 32 != 0) total += s_weight[n++];
    if (n == 0) return move_on(a, r, -1);
    if (draw.top_p < 1) {
        double sum = 0;
        int kept = 0;
        while (kept < n && sum < double(draw.top_p) * total) sum += s_weight[kept++];
        n = max(kept, 1);
        total = sum;
    }
    double left = draw.uniform * total;
    int chosen = 0;
    for (; chosen < n - 1; ++chosen) {
        left -= s_weight[chosen];
        if (left < 0) break;
    }
    move_on(a, r, static_cast<int>(~0u - unsigned(s_key[chosen])));
}

inline void draw(const Device& d, const DrawArgs& a, int rows) {
    launch({.grid = dim3(static_cast<unsigned>(rows)),
            .block = DrawTraits::kThreads,
            .stream = d.stream,
            .overlap = d.overlap},
           draw_kernel<DrawTraits::kThreads>, a);
}

}  // namespace cuda

// ==== 11. backend ================================================================================
// A model on the GPU behind nanogpt.hpp's Backend. A step splits its chunks: pieces of prompts go
// through large products (sections 8, 9), single tokens through those of section 7, and each of the
// two computes a row the same way whatever else is there.

struct GpuInfo {
    int device = 0;  // CUDA's number
    std::string name;
    int major = 0, minor = 0, sms = 0;  // compute capability, multiprocessors
    std::uint64_t memory_bytes = 0, free_bytes = 0, l2_bytes = 0, shared_bytes = 0;
    std::uint64_t reserve_bytes = 0;  // to be left to others
    bool integrated = false;          // one memory with the CPU
    bool overlap = false;             // kernels may start while the one before still runs
    std::string problem;              // empty: the kernels run on it; else why not
};

struct CudaOptions {
    int device = 0;
    // room for keys and values, in tokens; 0: 32 full contexts, or as many as fit, these at least
    std::uint64_t kv_tokens = 0, least_contexts = 1;
    std::optional<std::uint64_t> reserve_bytes = {};  // left to others; unset: GpuInfo's
    bool self_test = true;                            // compare a few tokens with the CPU
};

namespace cuda {

struct BackendTraits {
    static constexpr int kRows = 2048;         // of one pass through the prompt's kernels
    static constexpr int kDecodeRows = 128;    // of one pass through the decode kernels
    static constexpr int kMaxVocab = 1 << 19;  // rows of lm_head are blocks in grid.y
    static constexpr int kSlots = 256;         // sequences that are open at once
    static constexpr int kAlign = 256;         // bytes, of every tensor in the slab
    static constexpr int kPad = 64;  // columns of weights and activations come in multiples
    static constexpr std::uint64_t kStaging = std::uint64_t{32} << 20;  // bytes of one buffer
    static constexpr float kMaxScore = 40;          // e^(-2 * 40) is still a normal float
    static constexpr double kTolerance = 0.03;      // of the self-test; bf16 gives 0.003 to 0.01
    static constexpr std::uint64_t kContexts = 32;  // of keys and values, where nobody says more
    static constexpr int kBuckets[] = {1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128};
    static_assert(kBuckets[10] == kDecodeRows, "the largest graph takes a whole pass");
};

inline int pad(int n, int to) { return cdiv(n, to) * to; }

// What can be taken of a memory that the GPU shares with the CPU, in bytes: what the CPU calls
// available, or what CUDA calls free with what the file cache would give back, which CUDA counts as
// taken. `unused` are the bytes that nobody holds, not even that cache.
inline std::uint64_t shared_memory_free(std::uint64_t cuda_free, std::uint64_t available,
                                        std::uint64_t unused) {
    return std::min(available, cuda_free + available - std::min(available, unused));
}
// Running out of a memory that is the CPU's too stalls the machine.
inline std::uint64_t default_reserve(bool integrated, std::uint64_t total_bytes) {
    return integrated ? std::max<std::uint64_t>(std::uint64_t{8} << 30, total_bytes / 10)
                      : std::uint64_t{512} << 20;
}
// Pages of the KV cache for `tokens` tokens, or if that is 0 for kContexts contexts of S tokens, or
// for as many as fit into `room` bytes, `least` of them at least. 0: they do not fit.
inline std::uint64_t plan_pages(std::uint64_t room, std::uint64_t page_bytes, std::uint64_t S,
                                std::uint64_t tokens, std::uint64_t least) {
    const std::uint64_t context = cdiv<std::uint64_t>(S, kPage), fits = room / page_bytes;
    const std::uint64_t asked = tokens / kPage + (tokens % kPage != 0);
    if (tokens != 0) return asked <= fits ? asked : 0;  // by division: nothing can overflow
    return least * context <= fits ? std::min(BackendTraits::kContexts * context, fits) : 0;
}

class Event {
public:
    Event() { NANOGPT_CUDA_CHECK(cudaEventCreateWithFlags(&event_, cudaEventDisableTiming)); }
    Event(const Event&) = delete;
    Event& operator=(const Event&) = delete;
    ~Event() { cudaEventDestroy(event_); }
    void record(cudaStream_t stream) { NANOGPT_CUDA_CHECK(cudaEventRecord(event_, stream)); }
    void wait() { NANOGPT_CUDA_CHECK(cudaEventSynchronize(event_)); }

private:
    cudaEvent_t event_ = nullptr;
};

class Stream {  // that waits for no other
public:
    Stream() { NANOGPT_CUDA_CHECK(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking)); }
    Stream(const Stream&) = delete;
    Stream& operator=(const Stream&) = delete;
    ~Stream() { cudaStreamSynchronize(stream_), cudaStreamDestroy(stream_); }
    cudaStream_t get() const { return stream_; }

private:
    cudaStream_t stream_ = nullptr;
};

class Graph {  // launches that are replayed as one
public:
    Graph() = default;
    Graph(const Graph&) = delete;
    Graph& operator=(const Graph&) = delete;
    ~Graph() {
        if (graph_ != nullptr) cudaGraphExecDestroy(graph_);
    }
    template <class F>
    void capture(cudaStream_t stream, F launches) {
        cudaGraph_t graph = nullptr;
        NANOGPT_CUDA_CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
        try {
            launches();
        } catch (...) {  // a stream that is left capturing lets no memory go
            if (cudaStreamEndCapture(stream, &graph) == cudaSuccess) cudaGraphDestroy(graph);
            cudaGetLastError();
            throw;
        }
        NANOGPT_CUDA_CHECK(cudaStreamEndCapture(stream, &graph));
        const cudaError_t error = cudaGraphInstantiate(&graph_, graph, 0);
        cudaGraphDestroy(graph);
        NANOGPT_CUDA_CHECK(error);
        NANOGPT_CUDA_CHECK(cudaGraphUpload(graph_, stream));
    }
    void launch(cudaStream_t stream) { NANOGPT_CUDA_CHECK(cudaGraphLaunch(graph_, stream)); }

private:
    cudaGraphExec_t graph_ = nullptr;
};

struct DeviceLayer {
    const bf16 *qkv, *attn_c_proj, *c_fc, *mlp_c_proj, *value_embed;
    const float* ve_gate;  // (K, 32)
    Entry entry;
};

// The weights on the device: one slab, columns padded with zeros to multiples of 64, queries, keys
// and values of a layer one below the other.
class DeviceWeights {
public:
    DeviceWeights(const Model& model, cudaStream_t stream) : model_(model), stream_(stream) {
        lay_out(false);
        slab_ = Buffer<std::byte>(bytes_);
        for (Pinned<std::byte>& s : staging_) s = Pinned<std::byte>(BackendTraits::kStaging);
        lay_out(true);
        NANOGPT_CUDA_CHECK(cudaDeviceSynchronize());
        for (Pinned<std::byte>& s : staging_) s = {};
    }
    static std::uint64_t bytes(const Model& model) {
        DeviceWeights plan(model);
        return plan.bytes_;
    }

    const bf16 *wte = nullptr, *lm_head = nullptr, *smear_gate = nullptr;
    std::vector<DeviceLayer> layers;

private:
    explicit DeviceWeights(const Model& model) : model_(model) { lay_out(false); }

    void lay_out(bool copy) {
        const Weights& w = model_.weights();
        const Config& c = model_.config();
        copy_ = copy, bytes_ = 0, layers.clear();
        const auto table = [&](const Tensor& t) {
            return t ? place({&t}, static_cast<int>(t.cols())) : nullptr;
        };
        const auto matrix = [&](std::initializer_list<const Tensor*> parts) {
            return place(parts,
                         pad(static_cast<int>((*parts.begin())->cols()), BackendTraits::kPad));
        };
        wte = table(w.wte);
        lm_head = matrix({&w.lm_head});
        smear_gate = c.generation == Generation::g4 ? table(w.smear_gate) : nullptr;
        const bf16* const bigram = table(w.bigram_embed);
        for (const Layer& l : w.layers) {
            layers.push_back(
                {.qkv = matrix({&l.c_q, &l.c_k, &l.c_v}),
                 .attn_c_proj = matrix({&l.attn_c_proj}),
                 .c_fc = matrix({&l.c_fc}),
                 .mlp_c_proj = matrix({&l.mlp_c_proj}),
                 .value_embed = table(l.value_embed),
                 .ve_gate = gates(l.ve_gate),
                 .entry = {c.has_lambdas() ? l.resid_lambda : 1.0f,
                           c.has_lambdas() ? l.x0_lambda : 0.0f, l.bigram_lambda, bigram}});
        }
    }

    template <class T>
    T* claim(std::uint64_t count) {
        T* const at = slab_.get() != nullptr ? reinterpret_cast<T*>(slab_.get() + bytes_) : nullptr;
        bytes_ += nanogpt::detail::round_up(count * sizeof(T), BackendTraits::kAlign);
        return at;
    }
    const bf16* place(std::initializer_list<const Tensor*> parts, int ld) {
        std::uint64_t rows = 0;
        for (const Tensor* t : parts) rows += t->rows();
        bf16* const to = claim<bf16>(rows * static_cast<std::uint64_t>(ld));
        std::uint64_t row = 0;
        for (const Tensor* t : parts) {
            if (copy_) upload(to + row * static_cast<std::uint64_t>(ld), *t, ld);
            row += t->rows();
        }
        return to;
    }
    const float* gates(const Tensor& t) {  // small: float32, 32 columns
        if (!t) return nullptr;
        float* const to = claim<float>(t.rows() * 32);
        std::vector<float> rows(t.rows() * 32);
        for (std::size_t r = 0; copy_ && r < t.rows(); ++r)
            nanogpt::detail::copy_row(&rows[r * 32], t, r);
        if (copy_)
            NANOGPT_CUDA_CHECK(
                cudaMemcpy(to, rows.data(), rows.size() * sizeof(float), cudaMemcpyHostToDevice));
        return to;
    }
    // Through one of two pinned buffers: one is filled by all threads while the other is copied.
    void upload(bf16* to, const Tensor& t, int ld) {
        const std::size_t cols = t.cols(), row_bytes = static_cast<std::size_t>(ld) * sizeof(bf16);
        const std::size_t step = std::max<std::size_t>(1, BackendTraits::kStaging / row_bytes);
        constexpr std::size_t kTask = 64;  // rows
        for (std::size_t r = 0; r < t.rows(); r += step) {
            const std::size_t n = std::min(step, t.rows() - r);
            turn_ = 1 - turn_;
            sent_[turn_].wait();
            auto* const out = reinterpret_cast<std::uint16_t*>(staging_[turn_].get());
            model_.pool().run(cdiv(n, kTask), [&](std::size_t task) {
                for (std::size_t i = task * kTask; i < std::min(n, (task + 1) * kTask); ++i) {
                    std::uint16_t* const row = out + i * static_cast<std::size_t>(ld);
                    if (t.dtype == DType::bf16) {
                        std::copy_n(t.bf16() + (r + i) * cols, cols, row);
                    } else {
                        for (std::size_t j = 0; j < cols; ++j)
                            row[j] = f32_to_bf16(t.f32()[(r + i) * cols + j]);
                    }
                    std::fill(row + cols, row + ld, std::uint16_t{0});
                }
            });
            NANOGPT_CUDA_CHECK(cudaMemcpyAsync(to + r * static_cast<std::size_t>(ld), out,
                                               n * row_bytes, cudaMemcpyHostToDevice, stream_));
            sent_[turn_].record(stream_);
        }
    }

    const Model& model_;
    cudaStream_t stream_ = nullptr;
    Buffer<std::byte> slab_;
    std::uint64_t bytes_ = 0;
    bool copy_ = false;
    Pinned<std::byte> staging_[2];
    Event sent_[2];
    int turn_ = 0;
};

// Pages of the KV cache and who has them. Shared by the backend and its sequences, so that either
// may go first.
struct Pool {
    Buffer<bf16> memory;
    Buffer<int> table;  // (kSlots, max_pages)
    std::int64_t page_stride = 0;
    int max_pages = 0;
    cudaStream_t stream = nullptr;
    std::vector<int> free_pages, free_slots;
    std::uint64_t next_serial = 0;
};

class CudaSequence final : public Sequence {
public:
    CudaSequence(std::shared_ptr<Pool> pool, int capacity)
        : capacity_(capacity), pool_(std::move(pool)) {
        const auto n = static_cast<std::size_t>(cdiv(capacity, kPage));
        Pool& p = *pool_;
        if (p.free_slots.empty())
            throw Error(
                ErrorKind::out_of_memory,
                {BackendTraits::kSlots, " sequences are open on the GPU already. Close one first"});
        if (n > p.free_pages.size())
            throw Error(ErrorKind::out_of_memory,
                        {"no room for the keys and values of ", capacity,
                         " more tokens on the GPU: ", p.free_pages.size() * kPage,
                         " are free. Close a sequence or ask for a shorter one"});
        tokens_.reserve(static_cast<std::size_t>(capacity));  // append() must not throw
        pages_.assign(p.free_pages.end() - static_cast<std::ptrdiff_t>(n), p.free_pages.end());
        slot_ = p.free_slots.back();
        NANOGPT_CUDA_CHECK(cudaMemcpyAsync(p.table.get() + std::int64_t{slot_} * p.max_pages,
                                           pages_.data(), n * sizeof(int), cudaMemcpyHostToDevice,
                                           p.stream));
        p.free_pages.resize(p.free_pages.size() - n);
        p.free_slots.pop_back();
        serial = p.next_serial++;
    }
    CudaSequence(const CudaSequence&) = delete;
    CudaSequence& operator=(const CudaSequence&) = delete;
    ~CudaSequence() override {
        pool_->free_slots.push_back(slot_);
        pool_->free_pages.insert(pool_->free_pages.end(), pages_.begin(), pages_.end());
    }
    std::span<const Token> tokens() const override { return tokens_; }
    int capacity() const override { return capacity_; }
    void rewind(int length) override {
        if (length < 0 || length > static_cast<int>(tokens_.size()))
            throw Error(ErrorKind::usage, "rewind to a position that was not read");
        tokens_.resize(static_cast<std::size_t>(length));
    }
    int length() const { return static_cast<int>(tokens_.size()); }
    int slot() const { return slot_; }
    int page(int pos) const { return pages_[static_cast<std::size_t>(pos / kPage)]; }
    const Pool* pool() const { return pool_.get(); }
    void append(std::span<const Token> tokens) {
        tokens_.insert(tokens_.end(), tokens.begin(), tokens.end());
    }
    std::uint64_t serial = 0;  // never used twice

private:
    int capacity_, slot_ = -1;
    std::vector<Token> tokens_;
    std::vector<int> pages_;
    std::shared_ptr<Pool> pool_;
};

// Sizes that all kernels are launched with.
struct Sizes {
    explicit Sizes(const Config& c)
        : D(c.n_embd),
          F(4 * c.n_embd),
          H(c.n_head),
          K(c.n_kv_head),
          hd(c.head_dim()),
          HD(hd <= 64    ? 64
             : hd <= 128 ? 128
                         : 256),
          V(c.vocab_size),
          L(c.n_layer),
          qkv((H + 2 * K) * hd),
          ld(pad(D, BackendTraits::kPad)),
          ld_f(pad(F, BackendTraits::kPad)),
          ld_qkv(pad(qkv, 8)) {}
    int D, F, H, K, hd, HD, V, L, qkv;
    int ld, ld_f, ld_qkv;  // row strides, in values
    std::int64_t layer_values() const { return std::int64_t{2} * K * kPage * HD; }  // of a page
};

// Activations of a pass; sizes in values per row.
struct Activations {
    Activations() = default;
    Activations(const Sizes& s, std::size_t rows, bool decode)
        : rows_info(rows),
          x(rows * static_cast<std::size_t>(s.ld)),
          x0(x.size()),
          middle(x.size()),
          n(x.size()),
          z(x.size()),
          mlp(rows * static_cast<std::size_t>(s.ld_f)) {
        const auto qkv = static_cast<std::size_t>(s.ld_qkv), H = static_cast<std::size_t>(s.H),
                   HD = static_cast<std::size_t>(s.HD);
        if (decode) {
            qkv_f32 = Buffer<float>(rows * qkv);
            squares = Buffer<float>(x.size() / kSumColumns);
            partial = Buffer<float>(rows * H * DecodeAttentionTraits::kSplits * (HD + 1));
            arrived = Buffer<int>(rows * H);
        } else {
            qkv_bf16 = Buffer<bf16>(rows * qkv);
            q = Buffer<bf16>(rows * H * HD);
            tiles = Buffer<QueryTile>(2 * rows);
            gather = Buffer<int>(BackendTraits::kSlots);
        }
    }
    Buffer<RowInfo> rows_info;
    Buffer<float> x, x0, middle;
    Buffer<bf16> n, z, mlp;  // n: the normalised x; in decode x itself as bf16
    Buffer<float> qkv_f32, squares, partial;
    Buffer<int> arrived;
    Buffer<bf16> qkv_bf16, q;
    Buffer<QueryTile> tiles;
    Buffer<int> gather;
};

struct ScoresTraits {
    static constexpr int kThreads = 256;  // keys of a block
    static_assert(kThreads % 32 == 0 && kThreads <= 1024, "whole warps");
};
// scores: scores[h,t,s] = q[t,h] . k[s] / sqrt(hd), -infinity where masked; for an observer
//   q (T, H, HD) bf16, cache -> scores (H, T, keys) f32
//   grid: (blocks of 256 keys, T, H)
//   cost: reads 2*HD bytes a score from the caches; only for people who look
//   order: columns left to right
//   source: nanochat gpt.py CausalSelfAttention.forward; CPU twin ops::attention
template <int HD>
__global__ void __launch_bounds__(ScoresTraits::kThreads)
    scores_kernel(float* scores, const bf16* q, Cache cache, const RowInfo* rows, int first_row,
                  int keys, int H, int ratio, int window, float scale) {
    ptx::pdl_wait();
    const int s =
        static_cast<int>(blockIdx.x) * ScoresTraits::kThreads + static_cast<int>(threadIdx.x);
    const int t = static_cast<int>(blockIdx.y), h = static_cast<int>(blockIdx.z);
    if (s >= keys) return;
    const RowInfo row = rows[first_row + t];
    const bf16* const key = cache.key<HD>(row.slot, h / ratio, s);
    const bf16* const query = q + (std::int64_t{first_row + t} * H + h) * HD;
    float dot = 0;
    for (int j = 0; j < HD; ++j) dot += __bfloat162float(query[j]) * __bfloat162float(key[j]);
    const bool visible = s <= row.pos && row.pos - s <= window;
    scores[(std::int64_t{h} * gridDim.y + t) * keys + s] = visible ? dot * scale : -INFINITY;
}

// Runs `f` with the head size as a constant.
template <class F>
void with_head_size(int HD, F f) {
    if (HD == 64) return f(std::integral_constant<int, 64>{});
    if (HD == 128) return f(std::integral_constant<int, 128>{});
    f(std::integral_constant<int, 256>{});
}

struct Piece {  // tokens of one chunk that a pass reads
    CudaSequence* sequence;
    std::span<const Token> tokens;
    int pos, begin;  // of its first token: in the sequence, among the rows
    int output;      // row of the logits for its last token; -1: more of the chunk follows
};

// Every kernel with what it is launched with and the instructions it must consist of: 1 HMMA,
// 2 LDSM, 4 LDGSTS, 8 16-byte loads, 16: too large for a GB10 on purpose. For tools/sm121.py.
struct KernelInfo {
    std::string name;
    const void* function;
    int threads, shared_bytes, wants;
};
inline std::vector<KernelInfo> kernel_table();

class CudaBackend final : public Backend {
public:
    CudaBackend(std::shared_ptr<const Model> model, const CudaOptions& options, const GpuInfo& gpu);
    const Config& config() const override { return config_; }
    std::string device() const override {
        return gpu_.name + " (sm_" + std::to_string(gpu_.major) + std::to_string(gpu_.minor) + ")";
    }
    DType dtype() const override { return DType::bf16; }
    bool decode_equals_prompt() const override { return false; }
    std::unique_ptr<Sequence> new_sequence(int capacity) override;
    std::span<const float> step(std::span<const Chunk> batch, Observer* observer) override;
    std::span<const Token> sample(std::span<const Chunk> batch,
                                  std::span<Sampler* const> samplers) override;

private:
    // A step that was begun before anybody asked for it, in the hope that the batch goes on.
    struct Ahead {
        std::vector<std::uint64_t> serials;
        std::vector<Token> tokens;  // that it reads: those drawn last
        std::vector<int> lengths;   // of the sequences before it
        std::vector<Draw> draws;
        int ring = 0;
        bool valid = false;
    };

    void plan_memory(const Model& model, const CudaOptions& options);
    void claim(std::uint64_t pages);
    void fill_rotary(const Model& model);
    void capture();
    void check(std::span<const Chunk> batch);
    void run(std::span<const Chunk> batch, Observer* observer);
    void prompt_pass(std::span<const Piece> pieces, Observer* observer);
    void prompt_layer(int i, std::span<const Piece> pieces, int T, Observer* observer);
    void prompt_attention(int i, std::span<const Piece> pieces, int T, Observer* observer);
    void prompt_mlp(int i, std::span<const Piece> pieces, int T, Observer* observer);
    void final_norm(int T, const int* gather, float* x_out);
    void head(float* logits, const bf16* x, const float* squares, int rows, float softcap);
    void prompt_head(std::span<const Piece> pieces, Observer* observer);
    void observe_head(std::span<const Piece> pieces, Observer* observer);
    void observe_attention(int i, std::span<const Piece> pieces, Observer* observer);
    void decode_pass(std::span<const Piece> pieces);
    void decode_kernels(int rows);
    void decode_layer(int i, int rows);
    void launch_draw(std::span<const Draw> draws, RowInfo* rows, int ring);
    static Draw draw_of(const Sampler& s, std::uint64_t ahead) {
        const SamplingParams& p = s.params();
        return {s.uniform(ahead), p.temperature, p.top_p, p.top_k};
    }
    bool continues(std::span<const Chunk> batch, std::span<const Draw> draws);
    void go_ahead(std::span<const Chunk> batch, std::span<Sampler* const> samplers);
    void upload_rows(const Activations& a, std::span<const Piece> pieces, int padded_rows);
    void upload_tiles(std::span<const Piece> pieces);
    void append(std::span<const Chunk> batch);

    EmbedArgs embed_args(const Activations& a) const;
    HeadArgs head_args(const RowInfo* rows, int layer) const;
    std::size_t bucket(std::size_t rows) const;
    Cache cache(int layer) const {
        return {pool_->memory.get(), pool_->table.get(), pool_->max_pages, pool_->page_stride,
                layer * s_.layer_values()};
    }
    float scale_log2() const { return 1.4426950408889634f / std::sqrt(static_cast<float>(s_.hd)); }
    float shift_log2() const {  // the largest score there can be, rounding included
        return 1.4426950408889634f * 1.01f * config_.qk_scale * config_.qk_scale *
               std::sqrt(static_cast<float>(s_.hd));
    }
    // n values in the stream's order, in any direction; the host has them after synchronize()
    template <class T>
    void copy(T* to, const T* from, std::size_t n) {
        NANOGPT_CUDA_CHECK(cudaMemcpyAsync(to, from, n * sizeof(T), cudaMemcpyDefault, d_.stream));
    }
    void synchronize() { NANOGPT_CUDA_CHECK(cudaStreamSynchronize(d_.stream)); }
    static bool wanted(Observer* o, HookPoint point, int layer) {
        return o != nullptr && o->wants(point, layer);
    }
    template <class T>
    void tap(Observer* o, HookPoint point, int layer, std::span<const Piece> pieces, const T* from,
             int ld, std::initializer_list<int> tail, int spacing = 0);
    void tap_cache(Observer* o, HookPoint point, int layer, std::span<const Piece> pieces);

    std::unique_ptr<Stream> stream_;  // first, so that it ends last
    GpuInfo gpu_;
    Config config_;
    Sizes s_;
    Device d_;
    Buffer<int> counters_;
    float smear_lambda_ = 0, backout_lambda_ = 0;
    std::unique_ptr<DeviceWeights> w_;
    std::shared_ptr<Pool> pool_;
    int max_positions_ = 0;
    Buffer<float> cos_, sin_, logits_, decode_logits_;  // (kSlots, V), (kDecodeRows, V)
    Buffer<float> scratch_;                             // what only an observer sees
    float* result_ = nullptr;                           // the logits of the last run
    Buffer<RowInfo> parked_;  // rows not in use, for a draw whose tokens the host must take up
    Activations prompt_, decode_;
    Pinned<RowInfo> rows_host_;
    Pinned<QueryTile> tiles_host_;
    Pinned<int> gather_host_;
    Pinned<float> logits_host_;
    Pinned<Draw> draws_host_;  // (2, kSlots)
    Pinned<int> tokens_host_;  // (2, kSlots)
    Buffer<Draw> draws_;
    std::unique_ptr<Event> uploaded_, drawn_event_[2];
    Graph graphs_[std::size(BackendTraits::kBuckets)];
    int n_tiles_ = 0;
    std::vector<int> order_;                     // chunk of the batch for each row of the logits
    std::vector<std::uint64_t> last_, serials_;  // sequences of the last draw, and of this one
    Ahead ahead_;
    // what a step works with; here and with room for kSlots, so that a step allocates nothing
    std::vector<const Sequence*> seen_;
    std::vector<Piece> pieces_;
    std::vector<Draw> asked_, in_order_;
    std::vector<std::size_t> kept_;
    int ring_ = 0;
};

inline CudaBackend::CudaBackend(std::shared_ptr<const Model> model, const CudaOptions& options,
                                const GpuInfo& gpu)
    : gpu_(gpu), config_(model->config()), s_(config_) {
    const float bound = config_.qk_scale * config_.qk_scale * std::sqrt(float(s_.hd));
    if (s_.hd > 256 || bound > BackendTraits::kMaxScore || s_.ld > 4096 ||
        s_.V > BackendTraits::kMaxVocab) {
        throw Error(
            ErrorKind::unsupported,
            {"the GPU kernels take heads of up to 256, widths of up to 4096, scores of up "
             "to 40 and half a million tokens; this model has ",
             s_.hd, ", ", s_.D, ", ", std::to_string(bound), " and ", s_.V, ". Use the CPU"});
    }
    NANOGPT_CUDA_CHECK(cudaSetDevice(gpu.device));
    stream_ = std::make_unique<Stream>();
    d_.stream = stream_->get();
    d_.sms = gpu.sms;
    d_.shared_bytes = static_cast<int>(gpu.shared_bytes);
    d_.overlap = gpu.overlap;
    counters_ = Buffer<int>(kGemmCounters);
    d_.counters = counters_.get();
    smear_lambda_ = model->weights().smear_lambda;
    backout_lambda_ = model->weights().backout_lambda;
    plan_memory(*model, options);
    w_ = std::make_unique<DeviceWeights>(*model, d_.stream);
    fill_rotary(*model);
    for (const KernelInfo& kernel : kernel_table()) {  // loaded now, not in the first step
        cudaFuncAttributes attributes{};
        NANOGPT_CUDA_CHECK(cudaFuncGetAttributes(&attributes, kernel.function));
    }
    capture();
}

// All memory is claimed here, once, after the sum was found to fit: on a machine whose GPU shares
// the CPU's memory, running out stalls it.
inline void CudaBackend::plan_memory(const Model& model, const CudaOptions& options) {
    using B = BackendTraits;
    const std::uint64_t available = gpu_.free_bytes;
    const std::uint64_t reserve = options.reserve_bytes.value_or(gpu_.reserve_bytes);
    const auto S = static_cast<std::uint64_t>(config_.sequence_len);
    // nanochat's own tables end at 10 contexts; whole pages, as a sequence's capacity
    max_positions_ = pad(static_cast<int>(std::max<std::uint64_t>(10 * S, 4096)), kPage);
    const auto row = static_cast<std::uint64_t>(s_.ld) * (3 * 4 + 2 * 2) +
                     static_cast<std::uint64_t>(s_.ld_f) * 2 +
                     static_cast<std::uint64_t>(s_.ld_qkv) * 4 +
                     static_cast<std::uint64_t>(s_.H * s_.HD) * 2;
    const std::uint64_t partial = std::uint64_t{B::kDecodeRows} * static_cast<unsigned>(s_.H) * 4 *
                                  DecodeAttentionTraits::kSplits * static_cast<unsigned>(s_.HD + 1);
    const std::uint64_t logits = std::uint64_t{B::kSlots} * static_cast<unsigned>(s_.V) * 4;
    const std::uint64_t fixed =
        DeviceWeights::bytes(model) + row * (B::kRows + B::kDecodeRows) + partial + 3 * logits +
        2 * B::kStaging +
        static_cast<std::uint64_t>(max_positions_) * 4 * static_cast<unsigned>(s_.hd);
    const std::uint64_t page_bytes = static_cast<std::uint64_t>(s_.layer_values() * s_.L) * 2;
    const std::uint64_t usable = available - std::min(available, reserve);
    const std::uint64_t pages = plan_pages(usable - std::min(usable, fixed), page_bytes, S,
                                           options.kv_tokens, options.least_contexts);
    if (pages == 0) {
        const std::uint64_t tokens =
            options.kv_tokens != 0 ? options.kv_tokens : S * options.least_contexts;
        throw Error(ErrorKind::out_of_memory,
                    {nanogpt::detail::quote(model.info().id), " needs ", fixed >> 20,
                     " MiB on the GPU and ", page_bytes >> 10, " KiB for every 64 of ", tokens,
                     " tokens of cache; ", available >> 20, " MiB are free and ", reserve >> 20,
                     " MiB of them stay reserved. Close other programs or use the CPU"});
    }
    claim(pages);
}

inline void CudaBackend::claim(std::uint64_t pages) {
    using B = BackendTraits;
    const std::size_t slots = B::kSlots, V = static_cast<std::size_t>(s_.V);
    pool_ = std::make_shared<Pool>();
    pool_->stream = d_.stream;
    pool_->page_stride = s_.layer_values() * s_.L;
    pool_->max_pages = std::min(static_cast<int>(pages), cdiv(max_positions_, kPage));
    pool_->memory = Buffer<bf16>(pages * static_cast<std::uint64_t>(pool_->page_stride));
    pool_->table = Buffer<int>(slots * static_cast<std::size_t>(pool_->max_pages));
    for (int p = static_cast<int>(pages); p-- > 0;) pool_->free_pages.push_back(p);
    for (int i = B::kSlots; i-- > 0;) pool_->free_slots.push_back(i);
    prompt_ = Activations(s_, B::kRows, false);
    decode_ = Activations(s_, B::kDecodeRows, true);
    logits_ = Buffer<float>(slots * V);
    decode_logits_ = Buffer<float>(B::kDecodeRows * V);
    parked_ = Buffer<RowInfo>(B::kSlots);
    // all bytes 255: every slot is -1
    NANOGPT_CUDA_CHECK(cudaMemset(parked_.get(), 255, B::kSlots * sizeof(RowInfo)));
    draws_ = Buffer<Draw>(B::kSlots);
    logits_host_ = Pinned<float>(slots * V);
    rows_host_ = Pinned<RowInfo>(B::kRows);
    tiles_host_ = Pinned<QueryTile>(2 * B::kRows);
    gather_host_ = Pinned<int>(B::kSlots);
    draws_host_ = Pinned<Draw>(2 * B::kSlots);
    tokens_host_ = Pinned<int>(2 * B::kSlots);
    const auto keep = [&](auto&... lists) { (lists.reserve(slots), ...); };
    keep(drawn_, seen_, pieces_, asked_, in_order_, kept_, order_, last_, serials_, ahead_.serials,
         ahead_.tokens, ahead_.lengths, ahead_.draws);
    uploaded_ = std::make_unique<Event>();
    for (auto& e : drawn_event_) e = std::make_unique<Event>();
}

// Tables of all angles, by the CPU's own function: cos, sin (positions, hd / 2).
inline void CudaBackend::fill_rotary(const Model& model) {
    const auto half = static_cast<std::size_t>(s_.hd / 2);
    const auto n = static_cast<std::size_t>(max_positions_);
    std::vector<float> cos(n * half), sin(n * half);
    constexpr std::size_t kTask = 256;  // positions
    model.pool().run(cdiv(n, kTask), [&](std::size_t task) {
        for (std::size_t t = task * kTask; t < std::min(n, (task + 1) * kTask); ++t)
            ops::rotary_angles(&cos[t * half], &sin[t * half], static_cast<int>(t), 2 * half,
                               config_.rope_base, config_.bf16_rope_tables);
    });
    cos_ = Buffer<float>(cos.size()), sin_ = Buffer<float>(sin.size());
    copy<float>(cos_.get(), cos.data(), cos.size());
    copy<float>(sin_.get(), sin.data(), sin.size());
    synchronize();
}

inline std::unique_ptr<Sequence> CudaBackend::new_sequence(int capacity) {
    NANOGPT_CUDA_CHECK(cudaSetDevice(gpu_.device));
    if (capacity < 1)
        throw Error(ErrorKind::usage, "a cache must have room for at least one token");
    if (capacity > pool_->max_pages * kPage)
        throw Error(ErrorKind::usage, {"a sequence of ", capacity,
                                       " tokens was asked for; this GPU backend has room for ",
                                       pool_->max_pages * kPage});
    return std::make_unique<CudaSequence>(pool_, capacity);
}

inline EmbedArgs CudaBackend::embed_args(const Activations& a) const {
    return {.rows = a.rows_info.get(),
            .wte = w_->wte,
            .smear_gate = config_.generation == Generation::g4 ? w_->smear_gate : nullptr,
            .smear_channels = nanogpt::detail::kSmearChannels,
            .smear_lambda = smear_lambda_,
            .D = s_.D,
            .ld = s_.ld,
            .x0 = a.x0.get()};
}

inline HeadArgs CudaBackend::head_args(const RowInfo* rows, int layer) const {
    const DeviceLayer& w = w_->layers[static_cast<std::size_t>(layer)];
    return {.rows = rows,
            .cos = cos_.get(),
            .sin = sin_.get(),
            .n_head = s_.H,
            .n_kv_head = s_.K,
            .hd = s_.hd,
            .qk_scale = config_.qk_scale,
            .value_embed = config_.has_value_embed(layer) ? w.value_embed : nullptr,
            .ve_gate = w.ve_gate,
            .gate_channels = config_.ve_gate_channels,
            .gate_scale = config_.ve_gate_scale};
}

// ---- prompts

// The model, top to bottom, for pieces of prompts: the same story as detail::Pass::forward.
inline void CudaBackend::prompt_pass(std::span<const Piece> pieces, Observer* o) {
    Activations& a = prompt_;
    const int T = pieces.back().begin + static_cast<int>(pieces.back().tokens.size());
    upload_rows(a, pieces, T);
    const bool smears = config_.generation == Generation::g4;
    const bool watched = wanted(o, HookPoint::embed_norm, -1);
    if (wanted(o, HookPoint::embed, -1)) {  // rows of wte, gathered by copies
        for (int r = 0; r < T; ++r)
            copy(a.n.get() + std::int64_t{r} * s_.ld,
                 w_->wte + std::int64_t{rows_host_[static_cast<std::size_t>(r)].id} * s_.D,
                 static_cast<std::size_t>(s_.D));
        tap(o, HookPoint::embed, -1, pieces, a.n.get(), s_.ld, {s_.D});
    }
    EmbedArgs first = embed_args(a);
    first.embed_norm = watched ? a.middle.get() : nullptr;
    embed(d_, first, T, false);
    if (watched) tap(o, HookPoint::embed_norm, -1, pieces, a.middle.get(), s_.ld, {s_.D});
    if (smears) tap(o, HookPoint::smear, -1, pieces, a.x0.get(), s_.ld, {s_.D});
    for (int i = 0; i < s_.L; ++i) prompt_layer(i, pieces, T, o);
    prompt_head(pieces, o);
}

inline void CudaBackend::prompt_layer(int i, std::span<const Piece> pieces, int T, Observer* o) {
    Activations& a = prompt_;
    float* const x = a.x.get();
    // the residual stream and the embedding, weighed; its norm
    NormArgs norm{.y = a.n.get(),
                  .x = i == 0 ? a.x0.get() : x,
                  .x0 = a.x0.get(),
                  .x_out = x,
                  .rows = a.rows_info.get(),
                  .entry = w_->layers[static_cast<std::size_t>(i)].entry,
                  .T = T,
                  .D = s_.D,
                  .ld = s_.ld};
    rms_norm<NormInput::entry>(d_, norm);
    tap(o, HookPoint::resid_pre, i, pieces, x, s_.ld, {s_.D});
    tap(o, HookPoint::attn_in, i, pieces, a.n.get(), s_.ld, {s_.D});
    prompt_attention(i, pieces, T, o);
    tap(o, HookPoint::resid_mid, i, pieces, x, s_.ld, {s_.D});
    norm.x = x;
    rms_norm<NormInput::plain>(d_, norm);
    tap(o, HookPoint::mlp_in, i, pieces, a.n.get(), s_.ld, {s_.D});
    prompt_mlp(i, pieces, T, o);
    tap(o, HookPoint::resid_post, i, pieces, x, s_.ld, {s_.D});
    if (config_.generation == Generation::g4 && i == s_.L / 2)
        copy(a.middle.get(), x, static_cast<std::size_t>(T) * static_cast<std::size_t>(s_.ld));
}

// Queries, keys and values; rotated, normalised, cached; every query looks back over its window.
inline void CudaBackend::prompt_attention(int i, std::span<const Piece> pieces, int T,
                                          Observer* o) {
    Activations& a = prompt_;
    const DeviceLayer& w = w_->layers[static_cast<std::size_t>(i)];
    gemm<Epilogue::store>(d_, a.qkv_bf16.get(), a.n.get(), w.qkv,
                          {T, s_.qkv, s_.ld, s_.ld, s_.ld, s_.ld_qkv});
    tap(o, HookPoint::q, i, pieces, a.qkv_bf16.get(), s_.ld_qkv, {s_.H, s_.hd});
    tap(o, HookPoint::k, i, pieces, a.qkv_bf16.get() + s_.H * s_.hd, s_.ld_qkv, {s_.K, s_.hd});
    const bool gates = wanted(o, HookPoint::ve_gate, i) && config_.has_value_embed(i);
    const Cache c = cache(i);
    with_head_size(s_.HD, [&](auto HD) {
        rotary<HD.value>(d_, {.head = head_args(a.rows_info.get(), i),
                              .cache = c,
                              .qkv = a.qkv_bf16.get(),
                              .ld = s_.ld_qkv,
                              .h = a.n.get(),
                              .ld_h = s_.ld,
                              .q = a.q.get(),
                              .gate = gates ? scratch_.get() : nullptr,
                              .T = T});
        if (gates) tap(o, HookPoint::ve_gate, i, pieces, scratch_.get(), s_.K, {s_.K});
        observe_attention(i, pieces, o);
        prefill_attention<HD.value>(
            d_, {a.z.get(), s_.ld, a.q.get(), s_.H * s_.HD, c.pages, c.page_stride, c.layer_offset,
                 c.table, c.max_pages, a.tiles.get(), n_tiles_, s_.H, s_.K, s_.hd,
                 config_.window(i), scale_log2(), shift_log2()});
    });
    tap(o, HookPoint::z, i, pieces, a.z.get(), s_.ld, {s_.H, s_.hd});
    const GemmShape shape{T, s_.D, s_.ld, s_.ld, s_.ld, s_.ld};
    if (wanted(o, HookPoint::attn_out, i)) {
        gemm<Epilogue::store_f32>(d_, scratch_.get(), a.z.get(), w.attn_c_proj, shape);
        tap(o, HookPoint::attn_out, i, pieces, scratch_.get(), s_.ld, {s_.D});
    }
    gemm<Epilogue::add>(d_, a.x.get(), a.z.get(), w.attn_c_proj, shape);
}

// Up to 4D, relu^2, down again.
inline void CudaBackend::prompt_mlp(int i, std::span<const Piece> pieces, int T, Observer* o) {
    Activations& a = prompt_;
    const DeviceLayer& w = w_->layers[static_cast<std::size_t>(i)];
    const GemmShape up{T, s_.F, s_.ld, s_.ld, s_.ld, s_.ld_f};
    const GemmShape down{T, s_.D, s_.ld_f, s_.ld_f, s_.ld_f, s_.ld};
    if (wanted(o, HookPoint::mlp_pre, i)) {
        gemm<Epilogue::store>(d_, a.mlp.get(), a.n.get(), w.c_fc, up);
        tap(o, HookPoint::mlp_pre, i, pieces, a.mlp.get(), s_.ld_f, {s_.F});
    }
    gemm<Epilogue::relu2>(d_, a.mlp.get(), a.n.get(), w.c_fc, up);
    tap(o, HookPoint::mlp_post, i, pieces, a.mlp.get(), s_.ld_f, {s_.F});
    if (wanted(o, HookPoint::mlp_out, i)) {
        gemm<Epilogue::store_f32>(d_, scratch_.get(), a.mlp.get(), w.mlp_c_proj, down);
        tap(o, HookPoint::mlp_out, i, pieces, scratch_.get(), s_.ld, {s_.D});
    }
    gemm<Epilogue::add>(d_, a.x.get(), a.mlp.get(), w.mlp_c_proj, down);
}

// Norms the last layer's output, of T rows or of the rows that `gather` names, into n.
inline void CudaBackend::final_norm(int T, const int* gather, float* x_out) {
    Activations& a = prompt_;
    const NormArgs norm{.y = a.n.get(),
                        .x = a.x.get(),
                        .x0 = a.middle.get(),
                        .x_out = x_out,
                        .rows = a.rows_info.get(),
                        .gather = gather,
                        .backout_lambda = backout_lambda_,
                        .T = T,
                        .D = s_.D,
                        .ld = s_.ld};
    config_.generation == Generation::g4 ? rms_norm<NormInput::backout>(d_, norm)
                                         : rms_norm<NormInput::plain>(d_, norm);
}

// Logits of `rows` rows of x; where x is not normalised yet, `squares` has the sums for that.
inline void CudaBackend::head(float* logits, const bf16* x, const float* squares, int rows,
                              float softcap) {
    gemv<GemvOutput::scaled_f32>(d_, {.x = x,
                                      .w = w_->lm_head,
                                      .M = rows,
                                      .N = s_.V,
                                      .K = s_.ld,
                                      .ld = s_.V,
                                      .squares = squares,
                                      .D = s_.D,
                                      .y = logits,
                                      .softcap = softcap});
}

// Logits after the last token of each chunk that ends in this pass.
inline void CudaBackend::prompt_head(std::span<const Piece> pieces, Observer* o) {
    Activations& a = prompt_;
    int last = 0;
    for (const Piece& p : pieces)
        if (p.output >= 0)
            gather_host_[static_cast<std::size_t>(last++)] =
                p.begin + static_cast<int>(p.tokens.size()) - 1;
    if (o != nullptr) observe_head(pieces, o);
    if (last == 0) return;
    copy(a.gather.get(), gather_host_.get(), static_cast<std::size_t>(last));
    uploaded_->record(d_.stream);
    final_norm(last, a.gather.get(), nullptr);
    int first = INT_MAX;  // a pass fills rows of the logits in order
    for (const Piece& p : pieces)
        if (p.output >= 0) first = std::min(first, p.output);
    head(logits_.get() + std::int64_t{first} * s_.V, a.n.get(), nullptr, last, config_.softcap);
}

// ---- single tokens

// The graph for so many rows: the smallest that has them.
inline std::size_t CudaBackend::bucket(std::size_t rows) const {
    const auto* const first = std::begin(BackendTraits::kBuckets);
    return static_cast<std::size_t>(
        std::lower_bound(first, std::end(BackendTraits::kBuckets), static_cast<int>(rows)) - first);
}

inline void CudaBackend::decode_pass(std::span<const Piece> pieces) {
    const std::size_t b = bucket(pieces.size());
    upload_rows(decode_, pieces, BackendTraits::kBuckets[b]);
    graphs_[b].launch(d_.stream);
}

// Everything between the tokens and the logits of `rows` single tokens: what a graph replays.
inline void CudaBackend::decode_kernels(int rows) {
    Activations& a = decode_;
    EmbedArgs first = embed_args(a);
    first.entry = w_->layers[0].entry;
    first.x = a.x.get(), first.xb = a.n.get(), first.squares = a.squares.get();
    embed(d_, first, rows, true);
    for (int i = 0; i < s_.L; ++i) decode_layer(i, rows);
    head(decode_logits_.get(), a.n.get(), a.squares.get(), rows, config_.softcap);
}

// Five kernels a layer; the norms are sums of squares that the kernel before left behind.
inline void CudaBackend::decode_layer(int i, int rows) {
    Activations& a = decode_;
    const DeviceLayer& w = w_->layers[static_cast<std::size_t>(i)];
    const bool final_layer = i + 1 == s_.L, g4 = config_.generation == Generation::g4;
    GemvArgs g{.x = a.n.get(),
               .w = w.qkv,
               .M = rows,
               .N = s_.qkv,
               .K = s_.ld,
               .ld = s_.ld_qkv,
               .squares = a.squares.get(),
               .D = s_.D,
               .y = a.qkv_f32.get(),
               .x_out = a.x.get(),
               .xb_out = a.n.get(),
               .squares_out = a.squares.get(),
               .x0 = a.x0.get(),
               .rows = a.rows_info.get(),
               .backout_lambda = backout_lambda_};
    gemv<GemvOutput::scaled_f32>(d_, g);
    with_head_size(s_.HD, [&](auto HD) {
        decode_attention<HD.value>(d_,
                                   {.head = head_args(a.rows_info.get(), i),
                                    .cache = cache(i),
                                    .qkv = a.qkv_f32.get(),
                                    .ld = s_.ld_qkv,
                                    .xb = a.n.get(),
                                    .squares = a.squares.get(),
                                    .ld_x = s_.ld,
                                    .D = s_.D,
                                    .window = config_.window(i),
                                    .scale_log2 = scale_log2(),
                                    .shift_log2 = shift_log2(),
                                    .partial = a.partial.get(),
                                    .arrived = a.arrived.get(),
                                    .z = a.z.get(),
                                    .ld_z = s_.ld},
                                   rows);
    });
    g.x = a.z.get(), g.w = w.attn_c_proj, g.N = s_.D, g.ld = s_.ld;
    gemv<GemvOutput::residual>(d_, g);
    g.x = a.n.get(), g.w = w.c_fc, g.N = s_.F, g.ld = s_.ld_f, g.y = a.mlp.get();
    gemv<GemvOutput::relu2>(d_, g);
    g.x = a.mlp.get(), g.w = w.mlp_c_proj, g.N = s_.D, g.K = s_.ld_f, g.ld = s_.ld;
    g.middle = g4 && i == s_.L / 2 ? a.middle.get() : nullptr;
    g.x_mid = g4 && final_layer ? a.middle.get() : nullptr;
    if (!final_layer) g.entry = w_->layers[static_cast<std::size_t>(i) + 1].entry;
    gemv<GemvOutput::residual>(d_, g);
}

// One graph for every number of rows that decode steps are padded to.
inline void CudaBackend::capture() {
    for (std::size_t b = 0; b < std::size(BackendTraits::kBuckets); ++b) {
        graphs_[b].capture(d_.stream, [&] { decode_kernels(BackendTraits::kBuckets[b]); });
    }
    synchronize();
}

// ---- steps

inline void CudaBackend::upload_rows(const Activations& a, std::span<const Piece> pieces,
                                     int padded_rows) {
    uploaded_->wait();  // the copy before has been read
    int n = 0;
    for (const Piece& p : pieces) {
        const auto past = p.sequence->tokens();
        for (std::size_t t = 0; t < p.tokens.size(); ++t, ++n) {
            const int pos = p.pos + static_cast<int>(t);
            // the token before is in this piece, in what the sequence holds, or in an earlier
            // piece of the same chunk, which lies just before this one in memory
            const Token previous = pos == 0 ? -1
                                   : t > 0  ? p.tokens[t - 1]
                                   : pos <= static_cast<int>(past.size())
                                       ? past[std::size_t(pos) - 1]
                                       : *(p.tokens.data() - 1);
            const nanogpt::detail::Row row{p.tokens[t], previous, pos};
            const bool hashed = config_.generation == Generation::g2e;
            rows_host_[static_cast<std::size_t>(n)] = {
                row.id, row.previous, pos, p.sequence->slot(),
                hashed ? static_cast<int>(nanogpt::detail::bigram_row(row, s_.V)) : 0};
        }
    }
    for (; n < padded_rows; ++n) rows_host_[static_cast<std::size_t>(n)] = {};
    copy(a.rows_info.get(), rows_host_.get(), static_cast<std::size_t>(n));
    if (a.tiles.get() != nullptr) upload_tiles(pieces);
    uploaded_->record(d_.stream);
}

// Query tiles, those with the most keys first: the last to finish should be a short one.
inline void CudaBackend::upload_tiles(std::span<const Piece> pieces) {
    const int step = kQueryRows;
    QueryTile* const tiles = tiles_host_.get();
    n_tiles_ = 0;
    for (const Piece& p : pieces) {
        const auto T = static_cast<int>(p.tokens.size());
        for (int t = 0; t < T; t += step)
            tiles[n_tiles_++] = {p.begin + t, std::min(step, T - t), p.pos + t, p.sequence->slot()};
    }
    std::sort(tiles, tiles + n_tiles_, [](const QueryTile& a, const QueryTile& b) {
        return a.pos != b.pos ? a.pos > b.pos : a.first_row < b.first_row;
    });
    copy(prompt_.tiles.get(), tiles, static_cast<std::size_t>(n_tiles_));
}

inline void CudaBackend::check(std::span<const Chunk> batch) {
    if (batch.size() > static_cast<std::size_t>(BackendTraits::kSlots))
        throw Error(ErrorKind::usage,
                    {"a step takes at most ", BackendTraits::kSlots, " sequences"});
    seen_.clear();
    for (const Chunk& chunk : batch) {
        const auto* s = dynamic_cast<const CudaSequence*>(chunk.sequence);
        if (s == nullptr || s->pool() != pool_.get())
            throw Error(ErrorKind::usage, "a sequence of another backend was given to this one");
        nanogpt::detail::check_tokens(chunk.tokens, s->length(), s->capacity(), s_.V);
        seen_.push_back(s);
    }
    std::sort(seen_.begin(), seen_.end());
    if (std::adjacent_find(seen_.begin(), seen_.end()) != seen_.end())
        throw Error(ErrorKind::usage, "a sequence is twice in one step");
}

// Computes the logits of all chunks into rows of result_; order_ says whose each row is. An
// observer sees everything through the prompt's kernels.
inline void CudaBackend::run(std::span<const Chunk> batch, Observer* o) {
    using B = BackendTraits;
    ahead_.valid = false;
    order_.clear(), pieces_.clear();
    const auto single = [&](const Chunk& c) {
        return o == nullptr && !c.prompt && c.tokens.size() == 1;
    };
    const auto piece = [&](const Chunk& c, std::size_t from, std::size_t n, int begin, int output) {
        auto* const s = static_cast<CudaSequence*>(c.sequence);
        pieces_.push_back(
            {s, c.tokens.subspan(from, n), s->length() + static_cast<int>(from), begin, output});
    };
    const auto flush_decode = [&] {
        if (pieces_.empty()) return;
        decode_pass(pieces_);
        result_ = decode_logits_.get();
        if (pieces_.size() != batch.size()) {  // others have rows too
            result_ = logits_.get();
            copy(logits_.get() + std::int64_t{pieces_[0].output} * s_.V, decode_logits_.get(),
                 pieces_.size() * static_cast<std::size_t>(s_.V));
        }
        pieces_.clear();
    };
    for (std::size_t i = 0; i < batch.size(); ++i) {
        if (!single(batch[i])) continue;
        piece(batch[i], 0, 1, static_cast<int>(pieces_.size()), static_cast<int>(order_.size()));
        order_.push_back(static_cast<int>(i));
        if (pieces_.size() == static_cast<std::size_t>(B::kDecodeRows)) flush_decode();
    }
    flush_decode();
    int rows = 0;
    for (std::size_t i = 0; i < batch.size(); ++i) {
        const Chunk& c = batch[i];
        if (single(c)) continue;
        result_ = logits_.get();
        for (std::size_t from = 0; from < c.tokens.size();) {
            const std::size_t n =
                std::min(c.tokens.size() - from, static_cast<std::size_t>(B::kRows - rows));
            const bool last = from + n == c.tokens.size();
            piece(c, from, n, rows, last ? static_cast<int>(order_.size()) : -1);
            if (last) order_.push_back(static_cast<int>(i));
            rows += static_cast<int>(n), from += n;
            if (rows == B::kRows) prompt_pass(pieces_, o), pieces_.clear(), rows = 0;
        }
    }
    if (!pieces_.empty()) prompt_pass(pieces_, o);
}

inline void CudaBackend::append(std::span<const Chunk> batch) {
    for (const Chunk& c : batch) static_cast<CudaSequence*>(c.sequence)->append(c.tokens);
}

inline std::span<const float> CudaBackend::step(std::span<const Chunk> batch, Observer* observer) {
    NANOGPT_CUDA_CHECK(cudaSetDevice(gpu_.device));
    check(batch);
    if (batch.empty()) return {};
    const auto V = static_cast<std::size_t>(s_.V);
    if (observer != nullptr && scratch_.get() == nullptr)
        scratch_ = Buffer<float>(prompt_.x.size());
    run(batch, observer);
    for (std::size_t row = 0, n = 1; row < order_.size(); row += n, n = 1) {
        while (row + n < order_.size() && order_[row + n] == order_[row] + static_cast<int>(n)) ++n;
        copy(logits_host_.get() + static_cast<std::size_t>(order_[row]) * V, result_ + row * V,
             n * V);
    }
    synchronize();
    append(batch);
    last_.clear();
    return {logits_host_.get(), batch.size() * V};
}

inline std::span<const Token> CudaBackend::sample(std::span<const Chunk> batch,
                                                  std::span<Sampler* const> samplers) {
    bool here = !batch.empty();
    NANOGPT_CUDA_CHECK(cudaSetDevice(gpu_.device));
    check(batch);
    asked_.clear(), serials_.clear();
    for (std::size_t i = 0; i < batch.size(); ++i) {
        asked_.push_back(draw_of(*samplers[i], 0));
        const bool greedy = asked_[i].temperature == 0;
        here &= greedy || (asked_[i].top_k > 0 && asked_[i].top_k <= DrawTraits::kMaxTopK);
        serials_.push_back(static_cast<CudaSequence*>(batch[i].sequence)->serial);
    }
    if (!here) return Backend::sample(batch, samplers);  // a long list of candidates
    const auto joins = std::find_if(batch.begin(), batch.end(), [](const Chunk& c) {
        return c.prompt || c.tokens.size() != 1;
    });
    const auto singles = static_cast<std::size_t>(joins - batch.begin());
    const bool single = singles == batch.size() && singles <= BackendTraits::kDecodeRows;
    // the first rows may have been begun ahead, with others that have left; who joins is to be read
    const std::size_t begun = continues(batch.first(singles), asked_) ? singles : 0;
    const int ring = begun == batch.size() ? ring_ : 1 - ring_, begun_ring = ahead_.ring;
    ahead_.valid = false, order_.clear();
    if (begun < batch.size()) {
        run(batch.subspan(begun), nullptr);
        in_order_.clear();
        for (const int i : order_) in_order_.push_back(asked_[begun + static_cast<std::size_t>(i)]);
        launch_draw(in_order_, single ? decode_.rows_info.get() : parked_.get(), ring_ = ring);
    }
    if (single && serials_ == last_) go_ahead(batch, samplers);
    drawn_.assign(batch.size(), 0);
    const auto take = [&](int from, std::size_t row, std::size_t to) {
        drawn_[to] = tokens_host_[static_cast<std::size_t>(from * BackendTraits::kSlots) + row];
    };
    if (begun > 0) drawn_event_[begun_ring]->wait();
    for (std::size_t i = 0; i < begun; ++i) take(begun_ring, kept_[i], i);
    if (begun < batch.size()) drawn_event_[ring]->wait();
    for (std::size_t row = 0; row < order_.size(); ++row)
        take(ring, row, begun + static_cast<std::size_t>(order_[row]));
    if (std::find_if(drawn_.begin(), drawn_.end(), [](Token t) { return t < 0; }) != drawn_.end()) {
        ahead_.valid = false;
        nanogpt::detail::refuse("the model's logits are not numbers: the checkpoint is damaged");
    }
    append(batch);
    for (Sampler* s : samplers) s->skip();
    ahead_.tokens = drawn_;
    last_.swap(serials_);
    return drawn_;
}

inline void CudaBackend::launch_draw(std::span<const Draw> draws, RowInfo* rows, int ring) {
    const std::size_t at = static_cast<std::size_t>(ring) * BackendTraits::kSlots;
    drawn_event_[ring]->wait();  // a step begun for nothing may still read its list
    std::copy(draws.begin(), draws.end(), draws_host_.get() + at);
    copy(draws_.get(), draws_host_.get() + at, draws.size());
    draw(d_,
         {.logits = result_,
          .V = s_.V,
          .ld = s_.V,
          .draws = draws_.get(),
          .rows = rows,
          .tokens = tokens_host_.get() + at,
          .bigram_mod = config_.generation == Generation::g2e ? 5 * s_.V - 1 : 0},
         static_cast<int>(draws.size()));
    drawn_event_[ring]->record(d_.stream);
}

// Whether the step that was begun ahead has all that is asked for now; kept_ says in which rows.
inline bool CudaBackend::continues(std::span<const Chunk> batch, std::span<const Draw> draws) {
    if (!ahead_.valid) return false;
    kept_.clear();
    std::size_t row = 0;
    for (std::size_t i = 0; i < batch.size(); ++i, ++row) {
        const auto* s = static_cast<const CudaSequence*>(batch[i].sequence);
        while (row < ahead_.serials.size() && s->serial != ahead_.serials[row]) ++row;  // has left
        if (row == ahead_.serials.size() || s->length() != ahead_.lengths[row] ||
            batch[i].tokens[0] != ahead_.tokens[row] || draws[i] != ahead_.draws[row])
            return false;
        kept_.push_back(row);
    }
    return true;
}

// Begins the step after this one, while the GPU is still busy with this one: its tokens are already
// there, put by the draw. If something else is asked for then, it was for nothing and harms nobody.
inline void CudaBackend::go_ahead(std::span<const Chunk> batch,
                                  std::span<Sampler* const> samplers) {
    ahead_.serials.clear(), ahead_.lengths.clear(), ahead_.draws.clear();
    for (std::size_t i = 0; i < batch.size(); ++i) {
        const auto* s = static_cast<const CudaSequence*>(batch[i].sequence);
        if (s->length() + 2 > s->capacity()) return;
        ahead_.serials.push_back(s->serial);
        ahead_.lengths.push_back(s->length() + 1);
        ahead_.draws.push_back(draw_of(*samplers[i], 1));
    }
    graphs_[bucket(batch.size())].launch(d_.stream);
    result_ = decode_logits_.get();
    ahead_.ring = ring_ = 1 - ring_;
    launch_draw(ahead_.draws, decode_.rows_info.get(), ahead_.ring);
    ahead_.valid = true;
}

// ---- watching

// Shows rows of a buffer: `tail` values a row, in groups of its last number that are `spacing`
// values apart.
template <class T>
void CudaBackend::tap(Observer* o, HookPoint point, int layer, std::span<const Piece> pieces,
                      const T* from, int ld, std::initializer_list<int> tail, int spacing) {
    if (!wanted(o, point, layer)) return;
    std::size_t width = 1;
    for (const int n : tail) width *= static_cast<std::size_t>(n);
    const std::size_t group = spacing > 0 ? static_cast<std::size_t>(*(tail.end() - 1)) : width;
    for (const Piece& p : pieces) {
        const std::size_t rows = p.tokens.size(), stride = static_cast<std::size_t>(ld);
        std::vector<T> raw((rows - 1) * stride +
                           width / group *
                               std::max<std::size_t>(group, static_cast<std::size_t>(spacing)));
        copy(raw.data(), from + static_cast<std::size_t>(p.begin) * stride, raw.size());
        synchronize();
        std::vector<float> values;
        for (std::size_t t = 0; t < rows; ++t)
            for (std::size_t j = 0; j < width; ++j)
                values.push_back(static_cast<float>(
                    raw[t * stride + j / group * static_cast<std::size_t>(spacing) + j % group]));
        std::vector<int> shape{static_cast<int>(rows)};
        shape.insert(shape.end(), tail.begin(), tail.end());
        o->on({point, layer, p.pos, shape, values});
    }
}

// Shows keys (rot_k) or values (v) as the cache holds them: (T, K, hd).
inline void CudaBackend::tap_cache(Observer* o, HookPoint point, int layer,
                                   std::span<const Piece> pieces) {
    if (!wanted(o, point, layer)) return;
    const auto HD = static_cast<std::size_t>(s_.HD);
    for (const Piece& p : pieces) {
        const auto T = static_cast<int>(p.tokens.size());
        std::vector<float> values;
        std::vector<bf16> row(HD);
        for (int pos = p.pos; pos < p.pos + T; ++pos) {
            for (int head = 0; head < s_.K; ++head) {
                const bf16* const from = pool_->memory.get() +
                                         p.sequence->page(pos) * pool_->page_stride +
                                         layer * s_.layer_values() +
                                         (std::int64_t{head} * 2 * kPage + pos % kPage +
                                          (point == HookPoint::v ? kPage : 0)) *
                                             s_.HD;
                copy(row.data(), from, HD);
                synchronize();
                for (int j = 0; j < s_.hd; ++j)
                    values.push_back(__bfloat162float(row[static_cast<std::size_t>(j)]));
            }
        }
        const int shape[] = {T, s_.K, s_.hd};
        o->on({point, layer, p.pos, shape, values});
    }
}

inline void CudaBackend::observe_attention(int i, std::span<const Piece> pieces, Observer* o) {
    if (o == nullptr) return;
    tap_cache(o, HookPoint::v, i, pieces);
    tap(o, HookPoint::rot_q, i, pieces, prompt_.q.get(), s_.H * s_.HD, {s_.H, s_.hd}, s_.HD);
    tap_cache(o, HookPoint::rot_k, i, pieces);
    const bool scores = wanted(o, HookPoint::attn_scores, i);
    const bool pattern = wanted(o, HookPoint::pattern, i);
    if (!scores && !pattern) return;
    for (const Piece& p : pieces) {
        const auto T = static_cast<int>(p.tokens.size());
        const int keys = p.pos + T, shape[] = {s_.H, T, keys};
        const std::size_t n = static_cast<std::size_t>(s_.H * T) * static_cast<std::size_t>(keys);
        if (scratch_.size() < n) scratch_ = Buffer<float>(n);
        with_head_size(s_.HD, [&](auto HD) {
            launch({.grid = dim3(static_cast<unsigned>(cdiv(keys, ScoresTraits::kThreads)),
                                 static_cast<unsigned>(T), static_cast<unsigned>(s_.H)),
                    .block = ScoresTraits::kThreads,
                    .stream = d_.stream},
                   scores_kernel<HD.value>, scratch_.get(), prompt_.q.get(), cache(i),
                   prompt_.rows_info.get(), p.begin, keys, s_.H, s_.H / s_.K, config_.window(i),
                   1 / std::sqrt(static_cast<float>(s_.hd)));
        });
        std::vector<float> values(n);
        copy<float>(values.data(), scratch_.get(), n);
        synchronize();
        if (scores) o->on({HookPoint::attn_scores, i, p.pos, shape, values});
        if (!pattern) continue;
        const auto width = static_cast<std::size_t>(keys);
        std::vector<float> row(nanogpt::detail::round_up(width, nanogpt::detail::kLanes));
        for (auto at = values.begin(); at != values.end(); at += keys) {
            std::copy_n(at, keys, row.begin());
            ops::softmax(row.data(), width);
            std::copy_n(row.begin(), keys, at);
        }
        o->on({HookPoint::pattern, i, p.pos, shape, values});
    }
}

inline void CudaBackend::observe_head(std::span<const Piece> pieces, Observer* o) {
    Activations& a = prompt_;
    const int T = pieces.back().begin + static_cast<int>(pieces.back().tokens.size());
    final_norm(T, nullptr, a.x0.get());  // nobody reads x0 after the last layer
    if (config_.generation == Generation::g4)
        tap(o, HookPoint::backout, -1, pieces, a.x0.get(), s_.ld, {s_.D});
    tap(o, HookPoint::final_norm, -1, pieces, a.n.get(), s_.ld, {s_.D});
    const auto V = static_cast<std::size_t>(s_.V);
    for (const HookPoint point : {HookPoint::logits_raw, HookPoint::logits}) {
        if (!wanted(o, point, -1)) continue;
        std::vector<float> values(static_cast<std::size_t>(T) * V);
        for (int t = 0; t < T; t += BackendTraits::kDecodeRows) {
            const int rows = std::min(BackendTraits::kDecodeRows, T - t);
            head(decode_logits_.get(), a.n.get() + std::int64_t{t} * s_.ld, nullptr, rows,
                 point == HookPoint::logits ? config_.softcap : 0);
            copy(values.data() + static_cast<std::size_t>(t) * V, decode_logits_.get(),
                 static_cast<std::size_t>(rows) * V);
        }
        synchronize();
        for (const Piece& p : pieces) {
            const int shape[] = {static_cast<int>(p.tokens.size()), s_.V};
            const float* const from = values.data() + static_cast<std::size_t>(p.begin) * V;
            o->on({point, -1, p.pos, shape, {from, p.tokens.size() * V}});
        }
    }
}

struct ReadTraits {
    static constexpr int kThreads = 512;
    static constexpr int kAhead = 8;  // 16-byte values on their way in every thread
    static_assert(kThreads * kAhead * 16 >= 64 * 1024, "of a block: enough to hide the latency");
};
// read: nothing of what it reads is kept
//   p (n) uint4 -> nothing, but for one pattern in 2^64
//   grid: any number of blocks of 512 threads
//   cost: reads 16*n bytes; bandwidth-bound, which is its purpose
//   order: none
//   source: the usual copy kernel without the copy
template <class T = ReadTraits>
__global__ void __launch_bounds__(T::kThreads)
    read_kernel(const uint4* p, std::size_t n, uint4* out) {
    constexpr int kAhead = T::kAhead;
    uint4 sum{};
    const std::size_t step = std::size_t{gridDim.x} * blockDim.x;
    for (std::size_t i = blockIdx.x * std::size_t{blockDim.x} + threadIdx.x; i < n;
         i += kAhead * step) {
        uint4 v[kAhead];
#pragma unroll
        for (int k = 0; k < kAhead; ++k)
            v[k] = i + k * step < n ? __ldcs(p + i + k * step) : uint4{};
#pragma unroll
        for (int k = 0; k < kAhead; ++k)
            sum.x ^= v[k].x, sum.y ^= v[k].y, sum.z ^= v[k].z, sum.w ^= v[k].w;
    }
    if (sum.x == 0x12345 && sum.y == 0x777) *out = sum;
}

inline std::vector<KernelInfo> kernel_table() {
    std::vector<KernelInfo> table;
    const auto add = [&](std::string name, auto kernel, int threads, int shared_bytes, int wants) {
        table.push_back(
            {std::move(name), reinterpret_cast<const void*>(kernel), threads, shared_bytes, wants});
    };
    const auto add_gemv = [&]<GemvOutput output>(const std::string& name) {
        gemv_shapes<output>([&]<class T>(T) {
            add("gemv_kernel<" + name + std::to_string(T::kM) + "x" + std::to_string(T::kN) + ">",
                gemv_kernel<output, T>, T::kThreads, T::kSharedBytes, 13);
        });
    };
    const auto add_norm = [&]<NormInput input>(std::integral_constant<NormInput, input>) {
        add("rms_norm_kernel 2", rms_norm_kernel<input, 2>, NormTraits::kThreads, 0, 8);
        add("rms_norm_kernel 4", rms_norm_kernel<input, 4>, NormTraits::kThreads, 0, 8);
        add("rms_norm_kernel 8", rms_norm_kernel<input, 8>, NormTraits::kThreads, 0, 8);
    };
    const auto add_attention = [&]<AttentionShape s>() {
        using T = AttentionTraits<s>;
        add("prefill_attention_kernel " + std::to_string(s.HD), prefill_attention_kernel<T>,
            T::kThreads, T::kSharedBytes, 7);
    };
    for_each_gemm(
        [&](std::string name, const void* function, int threads, int shared_bytes, bool large) {
            table.push_back({std::move(name), function, threads, shared_bytes, large ? 23 : 7});
        });
    add_gemv.operator()<GemvOutput::scaled_f32>("scaled_f32 ");
    add_gemv.operator()<GemvOutput::relu2>("relu2 ");
    add_gemv.operator()<GemvOutput::residual>("residual ");
    add_norm(std::integral_constant<NormInput, NormInput::plain>{});
    add_norm(std::integral_constant<NormInput, NormInput::entry>{});
    add_norm(std::integral_constant<NormInput, NormInput::backout>{});
    add_attention.operator()<AttentionShape{64, 1, 64, true, 3}>();
    add_attention.operator()<AttentionShape{64, 2, 64, true, 2}>();
    add_attention.operator()<AttentionShape{128, 1, 64, true, 2}>();
    add_attention.operator()<AttentionShape{128, 2, 32, false, 2}>();
    add_attention.operator()<AttentionShape{256, 1, 32, false, 2}>();
    for (const int HD : {64, 128, 256}) {
        with_head_size(HD, [&](auto size) {
            constexpr int kHD = decltype(size)::value;
            add("rotary_kernel", rotary_kernel<RotaryTraits<kHD, true>>, 96, 0, 8);
            add("rotary_kernel, any size", rotary_kernel<RotaryTraits<kHD, false>>, 96, 0, 0);
            add("decode_attention_kernel", decode_attention_kernel<kHD>,
                DecodeAttentionTraits::kThreads, 0, 8);
            add("scores_kernel", scores_kernel<kHD>, ScoresTraits::kThreads, 0, 0);
        });
    }
    add("embed_kernel<false>", embed_kernel<false>, EmbedTraits::kThreads, 0, 0);
    add("embed_kernel<true>", embed_kernel<true>, EmbedTraits::kThreads, 0, 0);
    add("draw_kernel", draw_kernel<DrawTraits::kThreads>, DrawTraits::kThreads, 0, 8);
    add("read_kernel", read_kernel<ReadTraits>, ReadTraits::kThreads, 0, 8);
    return table;
}

}  // namespace cuda

// One GPU, with what keeps the kernels from running on it, if anything does. Makes it the calling
// thread's device.
inline GpuInfo gpu_info(int device) {
    cudaDeviceProp p{};
    cudaFuncAttributes attributes{};
    std::size_t free_bytes = 0, total = 0;
    GpuInfo gpu;
    gpu.device = device;
    cudaError_t e = cudaGetDeviceProperties(&p, device);
    if (e == cudaSuccess) e = cudaSetDevice(device);
    if (e == cudaSuccess) e = cudaMemGetInfo(&free_bytes, &total);
    if (e == cudaSuccess && p.major >= 8)
        e = cudaFuncGetAttributes(&attributes,
                                  reinterpret_cast<const void*>(&cuda::embed_kernel<true>));
    cudaGetLastError();
    gpu.name = p.name;
    gpu.major = p.major, gpu.minor = p.minor, gpu.sms = p.multiProcessorCount;
    gpu.memory_bytes = p.totalGlobalMem;
    gpu.l2_bytes = static_cast<std::uint64_t>(p.l2CacheSize);
    gpu.shared_bytes = p.sharedMemPerBlockOptin;
    gpu.integrated = p.integrated != 0;
    gpu.free_bytes = gpu.integrated
                         ? cuda::shared_memory_free(free_bytes, detail::available_memory(),
                                                    detail::memory_info("MemFree:").value_or(0))
                         : free_bytes;
    gpu.reserve_bytes = cuda::default_reserve(gpu.integrated, gpu.memory_bytes);
    // code made from PTX for Ampere has no instruction to wait for the kernel before
    gpu.overlap = p.major >= 9 && attributes.ptxVersion >= 90;
    if (e != cudaSuccess) {
        gpu.problem = cudaGetErrorString(e);
    } else if (p.major < 8) {
        gpu.problem = "compute capability " + std::to_string(p.major) + "." +
                      std::to_string(p.minor) + ", 8.0 (Ampere) or later is needed";
    }
    return gpu;
}

// All GPUs that CUDA shows. Empty where there is no driver or no GPU.
inline std::vector<GpuInfo> find_gpus() {
    std::vector<GpuInfo> gpus;
    int count = 0, current = 0;
    if (cudaGetDeviceCount(&count) != cudaSuccess) count = 0;
    cudaGetDevice(&current);
    for (int i = 0; i < count; ++i) gpus.push_back(gpu_info(i));
    if (count > 0) cudaSetDevice(current);
    cudaGetLastError();
    return gpus;
}

// Why GPU `device` cannot be used, or nothing.
inline std::string cuda_problem(int device = 0) {
    int count = 0, driver = 0;
    cudaDriverGetVersion(&driver);
    const cudaError_t e = cudaGetDeviceCount(&count);
    cudaGetLastError();
    if (driver == 0) return "no NVIDIA driver is loaded";
    if (e != cudaSuccess) return cudaGetErrorString(e);
    if (device < 0 || device >= count)
        return "there is no GPU " + std::to_string(device) + ", CUDA shows " +
               std::to_string(count);
    const GpuInfo gpu = gpu_info(device);
    return gpu.problem.empty() ? "" : gpu.name + ": " + gpu.problem;
}

inline std::string cuda_versions() {
    int driver = 0, runtime = 0;
    cudaDriverGetVersion(&driver);
    cudaRuntimeGetVersion(&runtime);
    const auto text = [](int v) {
        return std::to_string(v / 1000) + "." + std::to_string(v % 1000 / 10);
    };
    std::string targets;
#ifdef __CUDA_ARCH_LIST__
    for (const int arch : {__CUDA_ARCH_LIST__})
        targets += (targets.empty() ? " for " : ", ") + std::to_string(arch / 100) + "." +
                   std::to_string(arch / 10 % 10);
#endif
    return (driver == 0 ? "no driver" : "driver " + text(driver)) + ", runtime " + text(runtime) +
           ", compiled by nvcc " + std::to_string(__CUDACC_VER_MAJOR__) + "." +
           std::to_string(__CUDACC_VER_MINOR__) + targets;
}

// Bytes per second of a plain read of 1 GiB, or of half of what is free: the median of nine.
inline double cuda_read_bandwidth(int device = 0) {
    using T = cuda::ReadTraits;
    const GpuInfo gpu = gpu_info(device);
    if (!gpu.problem.empty()) throw Error(ErrorKind::device, gpu.name + ": " + gpu.problem);
    const std::size_t bytes =
        std::min<std::size_t>(std::size_t{1} << 30, gpu.free_bytes / 2) / 4096 * 4096;
    if (bytes < 8 * gpu.l2_bytes)
        throw Error(ErrorKind::out_of_memory,
                    "too little memory is free on the GPU to measure how fast it is read");
    const cuda::Buffer<std::byte> memory(bytes), out(sizeof(uint4));
    NANOGPT_CUDA_CHECK(cudaMemset(memory.get(), 1, bytes));
    cudaEvent_t begin = nullptr, end = nullptr;
    NANOGPT_CUDA_CHECK(cudaEventCreate(&begin));
    NANOGPT_CUDA_CHECK(cudaEventCreate(&end));
    std::vector<float> ms(9);
    for (float& m : ms) {
        NANOGPT_CUDA_CHECK(cudaEventRecord(begin));
        cuda::launch({.grid = dim3(static_cast<unsigned>(4 * gpu.sms)), .block = T::kThreads},
                     cuda::read_kernel<T>, reinterpret_cast<const uint4*>(memory.get()),
                     bytes / sizeof(uint4), reinterpret_cast<uint4*>(out.get()));
        NANOGPT_CUDA_CHECK(cudaEventRecord(end));
        NANOGPT_CUDA_CHECK(cudaEventSynchronize(end));
        NANOGPT_CUDA_CHECK(cudaEventElapsedTime(&m, begin, end));
    }
    cudaEventDestroy(begin), cudaEventDestroy(end);
    std::sort(ms.begin(), ms.end());
    return static_cast<double>(bytes) / (static_cast<double>(ms[4]) * 1e-3);
}

// How far the GPU's logits are from the CPU's on a short prompt and one more token: the relative L2
// distance, the larger of the two. NaN if anything is not a number.
inline double cuda_self_test(Backend& gpu, const std::shared_ptr<const Model>& model) {
    constexpr int kTokens = 6;
    Token ids[kTokens + 1];
    for (int i = 0; i <= kTokens; ++i) ids[i] = (1 + i * 7919) % model->config().vocab_size;
    const std::unique_ptr<Backend> cpu = open_cpu(model);
    const std::unique_ptr<Sequence> a = cpu->new_sequence(kTokens + 1),
                                    b = gpu.new_sequence(kTokens + 1);
    double worst = 0;
    for (const std::span<const Token> tokens :
         {std::span<const Token>(ids, kTokens), std::span<const Token>(ids + kTokens, 1)}) {
        const Chunk of_cpu{a.get(), tokens}, of_gpu{b.get(), tokens};
        const std::span<const float> want = cpu->step({&of_cpu, 1}), got = gpu.step({&of_gpu, 1});
        double difference = 0, size = 0;
        for (std::size_t i = 0; i < want.size(); ++i) {
            const double x = static_cast<double>(want[i]), y = static_cast<double>(got[i]);
            difference += (x - y) * (x - y);
            size += x * x;
        }
        const double relative = std::sqrt(difference / size);
        if (std::isnan(relative)) return relative;
        worst = std::max(worst, relative);
    }
    return worst;
}

// The model on a GPU. The backend keeps nothing of `model`: drop it to free the CPU's copy. Throws
// device (no GPU, or one that does not compute what the CPU computes), unsupported, out_of_memory.
inline std::unique_ptr<Backend> open_cuda(std::shared_ptr<const Model> model,
                                          const CudaOptions& options = {}) {
    if (model == nullptr) throw Error(ErrorKind::usage, "open_cuda needs a model");
    const std::string problem = cuda_problem(options.device);
    if (!problem.empty())
        throw Error(ErrorKind::device, problem + ". Use --device-type cpu or open_cpu");
    const GpuInfo gpu = gpu_info(options.device);
    auto backend = std::make_unique<cuda::CudaBackend>(model, options, gpu);
    if (options.self_test) {
        const double off = cuda_self_test(*backend, model);
        if (!(off <= cuda::BackendTraits::kTolerance))
            throw Error(ErrorKind::device, {gpu.name, ": its logits are ", std::to_string(off),
                                            " away from the CPU's (relative), at most ",
                                            std::to_string(cuda::BackendTraits::kTolerance),
                                            " is right. Use the CPU, and update the driver"});
    }
    return backend;
}

}  // namespace v0
}  // namespace nanogpt
