// attention_6: the production kernel
//   idea      32 queries in a warp, so that every fragment of k and v serves two mma; only the keys on
//             the diagonal are masked; exponentials are computed under the products of others.
//   expected  512 clocks of shared memory for 826 of products on an H200, and then 256 clocks of
//             exponentials count: 0.8 of the peak, less the diagonal, of which half is not seen.
//   measured  nothing yet
//   taught    It also serves paged caches, windows and shared heads: kernels.cuh, section 9.
#include "../../kernels.cuh"
#include "harness.cuh"

using namespace ladder;

void launch(const Attention& a) {
    using namespace nanogpt::cuda;
    static const nanogpt::GpuInfo gpu = nanogpt::gpu_info(0);
    AttentionArgs p{};
    p.z = a.z, p.q = a.q, p.pages = a.pages, p.page_table = a.page_table;
    p.tiles = reinterpret_cast<const QueryTile*>(a.tiles), p.n_tiles = a.n_tiles;
    p.n_head = p.n_kv_head = a.H, p.hd = kHead, p.window = a.T, p.max_pages = a.T / kPage;
    p.ldz = p.ldq = a.H * kHead, p.page_stride = std::int64_t{a.H} * kPageValues;
    p.scale_log2 = kScaleLog2, p.shift_log2 = kBoundLog2;
    prefill_attention<kHead>({gpu.sms, int(gpu.shared_bytes)}, p);
}

int main(int argc, char** argv) { return run_attention(__FILE__, argc, argv, launch); }
