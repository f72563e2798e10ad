// gemm_7: the production kernel
//   idea      As gemm_6, with the rest of the waiting taken out: fragments of the next mma are read
//             during this one, and the next tile is fetched while the sums of this one are written.
//   expected  A warp of gemm_6 waits twice a step for ldmatrix, some 60 clocks of 826: 7 percent.
//   measured  nothing yet
//   taught    The last tenth costs more code than all before: 300 lines in kernels.cuh, section 8.
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
