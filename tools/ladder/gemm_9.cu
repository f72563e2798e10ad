// gemm_9: the production kernel
//   idea      As gemm_8, with the rest of the waiting taken out: steps of 64 of K where shared memory
//             has room for them, copies spread between the mma, the next tile fetched while the sums
//             of this one are written.
//   expected  Half the barriers, some 50 clocks of 826 each: 6 percent; no end of a tile with idle
//             tensor cores, 2 of 70 us: 3 percent.
//   measured  0.273 ms, 503.84 TFLOP/s, 0.777 of mma.sync (NVIDIA H100 80GB HBM3)
//   taught    The last part costs more code than all before: 300 lines in kernels.cuh, section 8. Steps
//             of 64 in gemm_8 (192 KB, so not on a GB10) bring it to 458 TFLOP/s, half of the way.
#include "../../kernels.cuh"
#include "harness.cuh"

using namespace ladder;

void launch(const Gemm& g) {
    using namespace nanogpt::cuda;
    static const nanogpt::GpuInfo gpu = nanogpt::gpu_info(0);
    static const Buffer<int> counters(kGemmCounters);
    const Device device = {gpu.sms, int(gpu.shared_bytes), nullptr, false, counters.get()};
    gemm<Epilogue::store>(device, g.y, g.x, g.w, {g.M, g.N, g.K, g.K, g.K, g.N});
}

int main(int argc, char** argv) { return run_gemm(__FILE__, argc, argv, launch); }
