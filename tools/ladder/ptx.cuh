// ptx.cuh: the instructions from which the tensor-core rungs are made. Section 2 of kernels.cuh has
// them too; here they stand alone, so that a rung compiles in seconds.
#pragma once

#include <cuda_bf16.h>  // __nv_bfloat16

#include <cstdint>  // uint32_t

namespace ladder {

using bf16 = __nv_bfloat16;

// ---- one function per instruction ---------------------------------------------------------------

// Address of shared memory as the instructions below want it.
__device__ inline std::uint32_t shared(const void* p) {
    return static_cast<std::uint32_t>(__cvta_generic_to_shared(p));
}

// Four 8x8 matrices of bf16. Lane i gives the address of a row of 16 bytes: lanes 0-7 the rows of
// matrix 0, lanes 8-15 of matrix 1 ... Lane i receives in r[m] the two values (i / 4, 2 * (i % 4))
// and (.., + 1) of matrix m; transposed: of its transpose.
__device__ inline void ldmatrix_x4(std::uint32_t (&r)[4], const bf16* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared(row))
                 : "memory");
}
__device__ inline void ldmatrix_x4_trans(std::uint32_t (&r)[4], const bf16* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared(row))
                 : "memory");
}

// c (16, 8) f32 += a (16, 16) bf16 * b (16, 8) bf16. With g = lane / 4 and t = lane % 4 a lane holds
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

// 16 bytes from global to shared memory, past the registers, while the thread goes on.
__device__ inline void cp_async_16(bf16* to, const bf16* from) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(shared(to)), "l"(from)
                 : "memory");
}
__device__ inline void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most `groups` of this thread's latest groups are still on their way.
template <int groups>
__device__ inline void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(groups) : "memory");
}

// 2^x, within 2 units in the last place; 0 for minus infinity.
__device__ inline float fast_exp2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// ---- what is made of them -----------------------------------------------------------------------

// Two floats as a pair of bf16, the first in the low half; rounded to nearest even.
__device__ inline std::uint32_t pack(float low, float high) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const std::uint32_t*>(&pair);
}

// c[0], c[1] (16, 16) += a (16, 16) * b (16, 16): two mma, b as one ldmatrix_x4 brings it.
__device__ inline void mma_16x16(float (*c)[4], const std::uint32_t (&a)[4],
                                 const std::uint32_t (&b)[4]) {
    mma_m16n8k16(c[0], a, b[0], b[1]);
    mma_m16n8k16(c[1], a, b[2], b[3]);
}

// A product's sums c[0], c[1] (16, 16), rounded, are the left factor of the next one: in an mma a
// lane holds the same elements of c as of a.
__device__ inline void as_factor(std::uint32_t (&a)[4], const float (*c)[4]) {
    for (int i = 0; i < 4; ++i) a[i] = pack(c[i / 2][i % 2 * 2], c[i / 2][i % 2 * 2 + 1]);
}

// The left factor of an mma straight from memory: `from` (16, 16) bf16 with row stride ld.
__device__ inline void load_factor(std::uint32_t (&a)[4], const bf16* from, int ld) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    for (int i = 0; i < 4; ++i) {
        const bf16* const at = from + (lane / 4 + i % 2 * 8) * ld + lane % 4 * 2 + i / 2 * 8;
        a[i] = *reinterpret_cast<const std::uint32_t*>(at);
    }
}

// Rows of 128 values in shared memory: chunk c of 8 values of row r lies at c ^ (r % 8), so that 8
// rows of a chunk fill the 32 banks. The right factor (16, 16) of an mma_16x16 from there: of rows
// n ... n + 15 chunks c and c + 1, as columns, or, transposed, as rows.
__device__ inline int swizzled(int row, int chunk) { return row * 128 + (chunk ^ row % 8) * 8; }
__device__ inline void load_columns(std::uint32_t (&b)[4], const bf16* s_rows, int n, int c) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    ldmatrix_x4(b, s_rows + swizzled(n + lane / 16 * 8 + lane % 8, c + lane / 8 % 2));
}
__device__ inline void load_rows(std::uint32_t (&b)[4], const bf16* s_rows, int n, int c) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    ldmatrix_x4_trans(b, s_rows + swizzled(n + lane % 16, c + lane / 16));
}

// The sums of an mma, a lane's two rows times f[0] and f[1], rounded: `to` (16, 8) with row stride ld.
__device__ inline void store_sums(bf16* to, int ld, const float (&c)[4],
                                  const float (&f)[2] = {1, 1}) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    to += lane / 4 * ld + lane % 4 * 2;
    *reinterpret_cast<std::uint32_t*>(to) = pack(c[0] * f[0], c[1] * f[0]);
    *reinterpret_cast<std::uint32_t*>(to + 8 * ld) = pack(c[2] * f[1], c[3] * f[1]);
}

// The 64 x 64 of y that a warp of a product has, as fragments: sums += a * b, and their end.
__device__ inline void mma_64x64(float (&sum)[4][8][4], const std::uint32_t (&a)[4][4],
                                 const std::uint32_t (&b)[4][4]) {
    for (int i = 0; i < 16; ++i) mma_16x16(&sum[i / 4][i % 4 * 2], a[i / 4], b[i % 4]);
}
__device__ inline void store_64x64(bf16* y, int ld, const float (&sum)[4][8][4]) {
    for (int i = 0; i < 32; ++i) store_sums(y + i / 8 * 16 * ld + i % 8 * 8, ld, sum[i / 8][i % 8]);
}

// Four values, 8 bytes, as floats.
__device__ inline void load_4(float (&v)[4], const bf16* from) {
    const uint2 pairs = *reinterpret_cast<const uint2*>(from);
    v[0] = __uint_as_float(pairs.x << 16), v[1] = __uint_as_float(pairs.x & 0xffff0000u);
    v[2] = __uint_as_float(pairs.y << 16), v[3] = __uint_as_float(pairs.y & 0xffff0000u);
}

// Sum over the four lanes that hold the same rows of an mma's sums.
__device__ inline float row_sum(float x) {
    x += __shfl_xor_sync(~0u, x, 1);
    return x + __shfl_xor_sync(~0u, x, 2);
}

}  // namespace ladder
