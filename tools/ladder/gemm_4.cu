// gemm_4: tensor cores
//   idea      One mma.sync multiplies 16 x 16 by 16 x 8: 2048 products from six registers a lane.
//             ldmatrix brings four 8 x 8 matrices in the order in which mma wants them.
//   expected  A step takes an H200's tensor cores 413 clocks, a GB10's 1024. Its 32 KB of ldmatrix
//             come at 32 bytes a clock (8 rows of 64 bytes lie in 8 of 32 banks): 1024 clocks, so at
//             most 0.4 of the peak on an H200; and nothing is fetched while a block multiplies.
//   measured  0.976 ms, 140.85 TFLOP/s, 0.220 of mma.sync (NVIDIA H200)
//   taught    The faster the multiplier, the more of the work is carrying things to it.
#include "harness.cuh"

using namespace ladder;

constexpr int kTile = 128, kTileK = 32, kThreads = 128;  // a warp has 64 x 64 of y

__device__ int place(int row, int chunk) { return row * kTileK + chunk * 8; }

__global__ void __launch_bounds__(kThreads) gemm_kernel(const Gemm g) {
    __shared__ __align__(128) bf16 s_tile[2 * kTile * kTileK];  // rows of x, then rows of w
    const int t = threadIdx.x, lane = t % 32, m0 = blockIdx.y * kTile, n0 = blockIdx.x * kTile;
    const int warp_m = t / 64 * 64, warp_n = t / 32 % 2 * 64;
    float sum[4][8][4] = {};
    for (int k0 = 0; k0 < g.K; k0 += kTileK) {
        for (int i = 0; i < 2 * kTile; i += kThreads / 4) {  // 16 bytes a thread
            const bf16* from = i < kTile ? g.x + (m0 + i) * g.K : g.w + (n0 + i - kTile) * g.K;
            *reinterpret_cast<uint4*>(s_tile + place(i + t / 4, t % 4)) =
                *reinterpret_cast<const uint4*>(from + t / 4 * g.K + k0 + t % 4 * 8);
        }
        __syncthreads();                           // the tile is whole
        for (int c = 0; c < kTileK / 8; c += 2) {  // 16 of K, two chunks of 8
            std::uint32_t a[4][4], b[4][4];
            for (int i = 0; i < 4; ++i) {
                const int row_b = kTile + warp_n + i * 16 + lane / 16 * 8 + lane % 8;
                ldmatrix_x4(a[i], s_tile + place(warp_m + i * 16 + lane % 16, c + lane / 16));
                ldmatrix_x4(b[i], s_tile + place(row_b, c + lane / 8 % 2));
            }
            mma_64x64(sum, a, b);
        }
        __syncthreads();  // and read by all
    }
    store_64x64(g.y + (m0 + warp_m) * g.N + n0 + warp_n, g.N, sum);
}

void launch(const Gemm& g) {
    start(gemm_kernel, dim3(g.N / kTile, g.M / kTile), dim3(kThreads), 0, g);
}

int main(int argc, char** argv) { return run_gemm(__FILE__, argc, argv, launch); }
