// attention_6: the production kernel
//   idea      32 queries a warp: a fragment of k or v serves two mma. Only the diagonal is masked.
//   expected  768 clocks of shared memory for 64 queries and a page, beside 826 of products.
//   measured  0.751 ms, 366.05 TFLOP/s, 0.571 of mma.sync (NVIDIA H200)
//   taught    It also serves paged caches, windows and shared heads: kernels.cuh, section 9.
#include "../../kernels.cuh"
#include "harness.cuh"

using namespace ladder;

void launch(const Attention& a) {
    using namespace nanogpt::cuda;
    static const nanogpt::GpuInfo gpu = nanogpt::gpu_info(0);
    AttentionArgs p{};
    p.z = a.z, p.q = a.q, p.pages = a.pages, p.page_table = a.page_table, p.hd = kHead;
    p.tiles = reinterpret_cast<const QueryTile*>(a.tiles), p.n_tiles = a.n_tiles, p.window = a.T;
    p.n_head = p.n_kv_head = a.H, p.max_pages = a.T / ladder::kPage, p.scale_log2 = kScaleLog2;
    p.ldz = p.ldq = a.H * kHead, p.page_stride = a.H * kPageValues, p.shift_log2 = kBoundLog2;
    prefill_attention<kHead>({gpu.sms, int(gpu.shared_bytes)}, p);
}

int main(int argc, char** argv) { return run_attention(__FILE__, argc, argv, launch); }
