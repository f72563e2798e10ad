// Every kernel by itself, against sums in float64 over the same bf16 inputs. What a kernel is to
// write is poisoned with NaN before, bands around every buffer show what it writes beside it.
#include <climits>  // INT_MAX
#include <numeric>  // iota

#include "gpu.cuh"

using namespace test;
namespace cuda = nanogpt::cuda;
using cuda::bf16;
using nanogpt::Sampler;
using nanogpt::Token;

namespace {

using Floats = std::vector<float>;
using Doubles = std::vector<double>;

constexpr double kAttention = 4e-3;   // relative L2; the weights are rounded as well as the result
constexpr double kFloat = 1e-5;       // float32 sums of exact products
constexpr double kHalfStep = 0x1p-8;  // the largest error of one bf16 rounding, relative
constexpr double kFloatStep = 0x1p-20;  // of a few float32 roundings, relative

// Relative L2 of n values that were rounded to bf16 once. On average 1.7e-3; of a few, all may be
// off by half a step.
double bf16_bound(std::size_t n) { return n < 256 ? kHalfStep : 2.5e-3; }

// ---- the GPU

const cuda::Device& device() {
    static const cuda::Device d = [] {
        const nanogpt::GpuInfo gpu = nanogpt::find_gpus().at(0);
        cuda::Device made;
        NANOGPT_CUDA_CHECK(cudaSetDevice(0));
        NANOGPT_CUDA_CHECK(cudaStreamCreateWithFlags(&made.stream, cudaStreamNonBlocking));
        made.sms = gpu.sms;
        made.shared_bytes = static_cast<int>(gpu.shared_bytes);
        made.overlap = gpu.overlap;
        static const cuda::Buffer<int> counters(cuda::kGemmCounters);
        made.counters = counters.get();
        return made;
    }();
    return d;
}
// The same GPU that says it has another number of multiprocessors: other shapes are chosen then.
cuda::Device with_sms(int sms) {
    cuda::Device d = device();
    d.sms = sms;
    return d;
}
// What is chosen on a GB10; every GPU that these kernels run on has that much shared memory.
cuda::Device like_gb10() {
    cuda::Device d = with_sms(48);
    d.shared_bytes = 99 * 1024;
    return d;
}

float to_float(float x) { return x; }
float to_float(bf16 x) { return from_bf16(std::bit_cast<std::uint16_t>(x)); }
template <class T>
T from_float(float x) {
    if constexpr (std::is_same_v<T, bf16>) {
        return std::bit_cast<bf16>(to_bf16(x));
    } else {
        return x;
    }
}

// Device memory of n values between two bands. All bits are set at first: NaN, or -1.
template <class T>
class Array {
public:
    explicit Array(std::size_t n) : n_(n) {
        NANOGPT_CUDA_CHECK(cudaMalloc(&memory_, bytes() + 2 * kBand));
        NANOGPT_CUDA_CHECK(cudaMemsetAsync(memory_, 0xFF, bytes() + 2 * kBand, device().stream));
    }
    template <class U>
    explicit Array(const std::vector<U>& values) : Array(values.size()) {
        std::vector<T> raw;
        for (const U& v : values) {
            if constexpr (std::is_same_v<U, float>) {
                raw.push_back(from_float<T>(v));
            } else {
                raw.push_back(v);
            }
        }
        NANOGPT_CUDA_CHECK(
            cudaMemcpyAsync(get(), raw.data(), bytes(), cudaMemcpyHostToDevice, device().stream));
        NANOGPT_CUDA_CHECK(cudaStreamSynchronize(device().stream));
    }
    Array(const Array&) = delete;
    Array& operator=(const Array&) = delete;
    ~Array() {
        if (memory_ == nullptr) return;
        std::vector<unsigned char> band(2 * kBand);
        cudaStreamSynchronize(device().stream);
        cudaMemcpy(band.data(), memory_, kBand, cudaMemcpyDeviceToHost);
        cudaMemcpy(band.data() + kBand, memory_ + kBand + bytes(), kBand, cudaMemcpyDeviceToHost);
        CHECK(std::count(band.begin(), band.end(), 0xFF) == 2 * std::ptrdiff_t{kBand});
        cudaFree(memory_);
    }
    T* get() const { return reinterpret_cast<T*>(memory_ + kBand); }
    std::vector<T> raw() const {
        std::vector<T> out(n_);
        NANOGPT_CUDA_CHECK(cudaStreamSynchronize(device().stream));
        NANOGPT_CUDA_CHECK(cudaMemcpy(out.data(), get(), bytes(), cudaMemcpyDeviceToHost));
        return out;
    }
    void poison(std::size_t at, std::size_t n) const {
        NANOGPT_CUDA_CHECK(cudaMemsetAsync(get() + at, 0xFF, n * sizeof(T), device().stream));
    }
    Floats read(std::size_t at, std::size_t n) const {
        std::vector<T> part(n);
        NANOGPT_CUDA_CHECK(cudaStreamSynchronize(device().stream));
        NANOGPT_CUDA_CHECK(
            cudaMemcpy(part.data(), get() + at, n * sizeof(T), cudaMemcpyDeviceToHost));
        Floats out;
        for (const T& v : part) out.push_back(to_float(v));
        return out;
    }
    Floats read() const {
        Floats out;
        for (const T& v : raw()) out.push_back(to_float(v));
        return out;
    }

private:
    static constexpr std::size_t kBand = 4096;
    std::size_t bytes() const { return n_ * sizeof(T); }
    std::size_t n_;
    unsigned char* memory_ = nullptr;
};

// ---- numbers

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// About normal, as bf16 has it.
Floats values(Random& random, std::size_t n, float scale = 1, float mean = 0) {
    Floats out(n);
    for (float& x : out) {
        const float sum = random.uniform() + random.uniform() + random.uniform() - 1.5f;
        x = round_to(DType::bf16, mean + 2 * scale * sum);
    }
    return out;
}

bool is_nan(float x) { return x != x; }
// Still what Array() filled it with.
bool untouched(float x) {
    const std::uint32_t bits = std::bit_cast<std::uint32_t>(x);
    return bits == 0xFFFFFFFFu || bits == 0xFFFF0000u;
}
std::size_t not_untouched(std::span<const float> x) {
    return static_cast<std::size_t>(
        std::count_if(x.begin(), x.end(), [](float v) { return !untouched(v); }));
}

// The columns [from, to) of a (rows, ld) matrix.
Floats columns(std::span<const float> x, std::size_t rows, std::size_t ld, std::size_t from,
               std::size_t to) {
    Floats out;
    for (std::size_t r = 0; r < rows; ++r)
        out.insert(out.end(), x.begin() + static_cast<std::ptrdiff_t>(r * ld + from),
                   x.begin() + static_cast<std::ptrdiff_t>(r * ld + to));
    return out;
}
// The other way: (rows, n) into rows of ld, filled up.
Floats spread(std::span<const float> x, std::size_t rows, std::size_t n, std::size_t ld,
              float fill = 0) {
    Floats out(rows * ld, fill);
    for (std::size_t r = 0; r < rows; ++r)
        std::copy_n(x.begin() + static_cast<std::ptrdiff_t>(r * n), n,
                    out.begin() + static_cast<std::ptrdiff_t>(r * ld));
    return out;
}

nanogpt::ThreadPool& threads() {
    static nanogpt::ThreadPool pool;
    return pool;
}

struct Product {
    Doubles y, absolute;  // sums of products, and of their absolute values
};
// x (M, K) times w (N, K) transposed.
Product product(const Floats& x, const Floats& w, std::size_t M, std::size_t N, std::size_t K) {
    Product p{Doubles(M * N), Doubles(M * N)};
    threads().run(M, [&](std::size_t m) {
        for (std::size_t n = 0; n < N; ++n) {
            double sum = 0, absolute = 0;
            for (std::size_t k = 0; k < K; ++k) {
                const double term = double{x[m * K + k]} * double{w[n * K + k]};
                sum += term, absolute += std::abs(term);
            }
            p.y[m * N + n] = sum, p.absolute[m * N + n] = absolute;
        }
    });
    return p;
}

// Largest |got - want| / (step * |want| + 4 K 2^-24 * absolute): above 1 an element is wrong, even
// one in a million, which the norm does not see.
double worst_element(const Floats& got, const Doubles& want, const Doubles& absolute, std::size_t K,
                     double step) {
    double worst = got.size() == want.size() ? 0 : 1e30;
    for (std::size_t i = 0; i < std::min(got.size(), want.size()); ++i) {
        const double bound =
            step * std::abs(want[i]) + 4 * static_cast<double>(K) * 0x1p-24 * absolute[i] + 1e-30;
        const double ratio = std::abs(double{got[i]} - want[i]) / bound;
        worst = ratio <= worst ? worst : ratio;  // NaN is worst
        if (is_nan(got[i])) worst = 1e30;
    }
    return worst;
}

void add_one(Distance& d, double got, double want) {
    const float g = static_cast<float>(got);
    d.add<double>({&g, 1}, {&want, 1});
}

std::size_t uz(int n) { return static_cast<std::size_t>(n); }
int pad64(int n) { return (n + 63) / 64 * 64; }

}  // namespace

// ==== embed ======================================================================================

namespace {

struct EmbedCase {
    int D;
    bool smear, decode, bigram, watched;
};

void test_embed(const EmbedCase& c, Random& random) {
    constexpr int R = 37, V = 50, kChannels = 24;
    const int ld = pad64(c.D);
    const std::size_t D = uz(c.D), L = uz(ld);
    const Floats wte = values(random, V * D), gate = values(random, kChannels),
                 table = values(random, 5 * V * D);
    std::vector<cuda::RowInfo> rows(R);
    for (int r = 0; r < R; ++r) {
        cuda::RowInfo& row = rows[uz(r)];
        row.id = static_cast<int>(random.below(V));
        row.previous = r % 4 == 0 ? -1 : static_cast<int>(random.below(V));
        row.pos = row.previous < 0 ? 0 : 5;
        row.slot = r % 7 == 6 ? -1 : r;
        row.bigram = static_cast<int>(random.below(5 * V));
    }
    const Array<bf16> d_wte(wte), d_gate(gate), d_table(table);
    const Array<cuda::RowInfo> d_rows(rows);
    const Array<float> x0(R * L), norm(R * L), x(R * L), squares(R * L / 16);
    const Array<bf16> xb(R * L);
    cuda::EmbedArgs a{};
    a.rows = d_rows.get(), a.wte = d_wte.get(), a.smear_gate = c.smear ? d_gate.get() : nullptr;
    a.smear_channels = kChannels, a.smear_lambda = 0.7f, a.D = c.D, a.ld = ld, a.x0 = x0.get();
    a.embed_norm = c.watched ? norm.get() : nullptr;
    a.entry.resid = 0.8f, a.entry.x0 = 0.3f, a.entry.bigram = 0.4f;
    a.entry.bigram_embed = c.bigram ? d_table.get() : nullptr;
    if (c.decode) a.x = x.get(), a.xb = xb.get(), a.squares = squares.get();
    cuda::embed(device(), a, R, c.decode);

    const Floats got_x0 = x0.read(), got_norm = norm.read(), got_x = x.read(), got_xb = xb.read(),
                 got_squares = squares.read();
    Distance off_x0, off_norm, off_x, off_xb, off_squares;
    const auto e = [&](int id) {
        Doubles out;
        double sum = 0;
        for (std::size_t j = 0; j < D; ++j) out.push_back(double{wte[uz(id) * D + j]});
        for (const double v : out) sum += v * v;
        for (double& v : out) v /= std::sqrt(sum / c.D + 0x1p-23);
        return out;
    };
    for (int r = 0; r < R; ++r) {
        const cuda::RowInfo& row = rows[uz(r)];
        const auto of = [&](const Floats& all) {
            return std::span<const float>(all).subspan(uz(r) * L, L);
        };
        if (row.slot < 0) {
            CHECK(not_untouched(of(got_x0)) + not_untouched(of(got_x)) +
                      not_untouched(of(got_xb)) ==
                  0);
            continue;
        }
        const Doubles plain = e(row.id);
        Doubles want = plain, entered(D);
        if (c.smear && row.previous >= 0) {
            const Doubles before = e(row.previous);
            double dot = 0;
            for (std::size_t j = 0; j < kChannels; ++j) dot += double{gate[j]} * plain[j];
            for (std::size_t j = 0; j < D; ++j)
                want[j] += double{0.7f} / (1 + std::exp(-dot)) * before[j];
        }
        for (std::size_t j = 0; j < D; ++j) {
            entered[j] = (double{0.8f} + double{0.3f}) * want[j];
            if (c.bigram) entered[j] += double{0.4f} * double{table[uz(row.bigram) * D + j]};
        }
        off_x0.add<double>(of(got_x0).first(D), want);
        CHECK(not_untouched(of(got_x0).subspan(D)) == 0);
        if (c.watched) off_norm.add<double>(of(got_norm).first(D), plain);
        if (!c.decode) continue;
        off_x.add<double>(of(got_x).first(D), entered);
        off_xb.add<double>(of(got_xb).first(D), entered);
        double sum = 0, want_sum = 0;
        for (std::size_t i = 0; i < L / 16; ++i) sum += double{got_squares[uz(r) * L / 16 + i]};
        for (const double v : entered) want_sum += v * v;
        add_one(off_squares, sum, want_sum);
    }
    CHECK(off_x0.relative() <= kFloat);
    CHECK(off_norm.relative() <= kFloat);
    CHECK(off_x.relative() <= kFloat);
    CHECK(off_xb.relative() <= bf16_bound(R * D));
    CHECK(off_squares.relative() <= kFloat);
}

}  // namespace

TEST_CASE("cuda kernels: embed, with and without smear, for prompts and for decoding") {
    if (no_gpu()) return;
    Random random(1);
    for (const int D : {24, 40, 64, 100, 768, 1280, 4096}) {
        if (quick() && D > 100) break;
        CAPTURE(D);
        for (int i = 0; i < 16; ++i)
            test_embed({D, (i & 1) != 0, (i & 2) != 0, (i & 4) != 0, (i & 8) != 0}, random);
    }
}

// ==== norm =======================================================================================

namespace {

struct NormCase {
    int T, D;
    bool gather = false, bigram = false, watched = false;
    int alias = 0;  // entry: 0 three buffers, 1 x_out is x, 2 x is x0
};

template <cuda::NormInput input>
void test_norm(const NormCase& c, Random& random) {
    constexpr bool kEntry = input == cuda::NormInput::entry;
    constexpr int V = 9;
    const int rows_in = c.gather ? c.T + 20 : c.T;
    const std::size_t D = uz(c.D), ld = uz(pad64(c.D)), T = uz(c.T);
    const Floats plain = values(random, uz(rows_in) * D, 2, 0.5f),
                 other = c.alias == 2 ? plain : values(random, uz(rows_in) * D);
    const Floats table = values(random, 5 * V * D);
    std::vector<cuda::RowInfo> rows(T);
    for (auto& r : rows) r.bigram = static_cast<int>(random.below(5 * V));
    std::vector<int> gather(T);
    std::iota(gather.begin(), gather.end(), 0);
    if (c.gather)
        for (int& g : gather) g = static_cast<int>(random.below(uz(rows_in)));
    const Array<float> x(spread(plain, uz(rows_in), D, ld)), x0(spread(other, uz(rows_in), D, ld)),
        x_out(T * ld);
    const Array<bf16> y(T * ld), d_table(table);
    const Array<cuda::RowInfo> d_rows(rows);
    const Array<int> d_gather(gather);
    cuda::NormArgs a{};
    a.y = y.get(), a.x = c.alias == 2 ? x0.get() : x.get(), a.x0 = x0.get();
    float* const out = kEntry && c.alias == 1 ? x.get() : x_out.get();
    a.x_out = kEntry || c.watched ? out : nullptr;
    a.rows = d_rows.get(), a.gather = c.gather ? d_gather.get() : nullptr;
    a.entry.resid = 1.1f, a.entry.x0 = -0.4f, a.entry.bigram = 0.6f;
    a.entry.bigram_embed = c.bigram ? d_table.get() : nullptr;
    a.backout_lambda = 0.3f, a.T = c.T, a.D = c.D, a.ld = static_cast<int>(ld);
    cuda::rms_norm<input>(device(), a);

    const Floats got = y.read(), mixed = kEntry && c.alias == 1 ? x.read() : x_out.read();
    Doubles want_y, want_x;
    for (std::size_t t = 0; t < T; ++t) {
        Doubles v;
        double sum = 0;
        for (std::size_t j = 0; j < D; ++j) {
            const std::size_t at = uz(gather[t]) * D + j;
            double value = double{plain[at]};
            if (kEntry) {
                value = double{1.1f} * value - double{0.4f} * double{other[at]};
                if (c.bigram) value += double{0.6f} * double{table[uz(rows[t].bigram) * D + j]};
            } else if (input == cuda::NormInput::backout) {
                value -= double{0.3f} * double{other[at]};
            }
            v.push_back(value), sum += value * value;
        }
        for (const double value : v) {
            want_x.push_back(value);
            want_y.push_back(value / std::sqrt(sum / c.D + 0x1p-23));
        }
    }
    const Floats y_there = columns(got, T, ld, 0, D);
    CHECK(relative_l2(y_there, want_y) <= bf16_bound(want_y.size()));
    CHECK(worst_element(y_there, want_y, Doubles(want_y.size(), 1), 1, kHalfStep) <= 1);
    for (const float v : columns(got, T, ld, D, ld)) CHECK(v == 0);
    if (a.x_out == nullptr) {
        CHECK(not_untouched(mixed) == 0);
    } else {
        CHECK(relative_l2(columns(mixed, T, ld, 0, D), want_x) <= 1e-6);
        for (const float v : columns(mixed, T, ld, D, ld)) CHECK(v == 0);
    }
    if (kEntry) return;  // it changes its own input
    cuda::rms_norm<input>(device(), a);
    CHECK(same_bits(y.read(), got));
}

}  // namespace

TEST_CASE("cuda kernels: rms_norm, plain, at a layer's entry and after the backout") {
    if (no_gpu()) return;
    using cuda::NormInput;
    Random random(2);
    for (const int D : {2, 24, 36, 64, 100, 288, 768, 832, 1280, 1664, 2048, 2050, 4096}) {
        if (quick() && D > 300) break;
        CAPTURE(D);
        for (const int T : {1, 2, 3, 4, 5, 63, 65, 130}) {
            CAPTURE(T);
            for (const bool gather : {false, true}) {
                test_norm<NormInput::plain>({T, D, gather}, random);
                for (const bool watched : {false, true})
                    test_norm<NormInput::backout>({T, D, gather, false, watched}, random);
            }
            for (const bool bigram : {false, true})
                for (const int alias : {0, 1, 2})
                    test_norm<NormInput::entry>({T, D, false, bigram, false, alias}, random);
        }
    }
}

TEST_CASE("cuda kernels: a row's norm has the same bits wherever it stands") {
    if (no_gpu()) return;
    Random random(3);
    for (const int D : {40, 768, 1280, 4096}) {
        const std::size_t ld = uz(pad64(D)), T = 131;
        const Array<float> x(spread(values(random, T * uz(D)), T, uz(D), ld));
        const Array<bf16> all(T * ld), one(ld);
        cuda::NormArgs a{};
        a.y = all.get(), a.x = x.get(), a.T = static_cast<int>(T), a.D = D;
        a.ld = static_cast<int>(ld);
        cuda::rms_norm<cuda::NormInput::plain>(device(), a);
        const Floats want = all.read();
        for (const std::size_t t : {0u, 1u, 2u, 3u, 77u, 130u}) {
            a.y = one.get(), a.x = x.get() + t * ld, a.T = 1;
            cuda::rms_norm<cuda::NormInput::plain>(device(), a);
            CHECK(same_bits(one.read(), std::span(want).subspan(t * ld, ld)));
        }
    }
}

// ==== the cache and the heads ====================================================================

namespace {

// Keys and values in pages that lie in no order.
struct Pages {
    int K, HD, layers, layer, slots, max_pages;
    std::vector<int> table;
    Floats values;

    // so many pages for each slot; what else the table has leads to one page more
    Pages(Random& random, int n_kv_head, int head_size, const std::vector<int>& pages, float fill)
        : K(n_kv_head),
          HD(head_size),
          layers(3),
          layer(1),
          slots(static_cast<int>(pages.size())),
          max_pages(*std::max_element(pages.begin(), pages.end()) + 1) {
        std::vector<int> order(uz(std::accumulate(pages.begin(), pages.end(), 1)));
        std::iota(order.begin(), order.end(), 0);
        for (std::size_t i = order.size(); i-- > 1;)
            std::swap(order[i], order[random.below(i + 1)]);
        values.assign(order.size() * stride(), fill);
        table.assign(uz(slots * max_pages), order[0]);
        std::size_t next = 1;
        for (std::size_t slot = 0; slot < pages.size(); ++slot)
            for (int i = 0; i < pages[slot]; ++i)
                table[slot * uz(max_pages) + uz(i)] = order[next++];
    }
    std::size_t stride() const { return uz(layers * K * 2 * 64 * HD); }
    std::size_t offset() const { return uz(layer * K * 2 * 64 * HD); }
    std::size_t key(int slot, int head, int pos) const {
        return uz(table[uz(slot * max_pages + pos / 64)]) * stride() + offset() +
               uz((head * 2 * 64 + pos % 64) * HD);
    }
    std::size_t value(int slot, int head, int pos) const {
        return key(slot, head, pos) + uz(64 * HD);
    }
    cuda::Cache cache(const Array<bf16>& pages, const Array<int>& d_table) const {
        return {pages.get(), d_table.get(), max_pages, static_cast<std::int64_t>(stride()),
                static_cast<std::int64_t>(offset())};
    }
};

int padded_head(int hd) { return hd <= 64 ? 64 : hd <= 128 ? 128 : 256; }

// Tables of angles, the rotation, the norm and the scale.
struct Rotation {
    int hd;
    Floats cos, sin;
    float scale = 1.2f;
    Rotation(int head_dim, int positions) : hd(head_dim) {
        const std::size_t half = uz(hd / 2);
        cos.resize(uz(positions) * half), sin.resize(cos.size());
        for (int p = 0; p < positions; ++p) {
            nanogpt::ops::rotary_angles(&cos[uz(p) * half], &sin[uz(p) * half], p, 2 * half, 10000,
                                        false);
        }
    }
    Doubles operator()(const float* in, int pos) const {
        const std::size_t half = uz(hd / 2);
        Doubles out(2 * half);
        double sum = 0;
        for (std::size_t j = 0; j < half; ++j) {
            const double c = double{cos[uz(pos) * half + j]}, s = double{sin[uz(pos) * half + j]};
            const double a = double{in[j]}, b = double{in[j + half]};
            out[j] = a * c + b * s, out[j + half] = b * c - a * s;
        }
        for (const double v : out) sum += v * v;
        for (double& v : out) v *= double{scale} / std::sqrt(sum / hd + 0x1p-23);
        return out;
    }
};

// Value embedding of a layer, and its gate.
struct ValueEmbed {
    static constexpr int V = 40;
    int K, hd, channels;
    Floats table, gate;  // (V, K * hd), (K, 32)
    ValueEmbed(Random& random, int n_kv_head, int head_dim, int gate_channels)
        : K(n_kv_head),
          hd(head_dim),
          channels(gate_channels),
          table(::values(random, uz(V * K * hd))),
          gate(::values(random, uz(K * 32))) {}
    double gate_of(int head, const Doubles& h) const {
        double dot = 0;
        for (std::size_t c = 0; c < uz(channels); ++c)
            dot += double{gate[uz(head * 32) + c]} * h[c];
        return 3 / (1 + std::exp(-dot));
    }
    double at(int id, int head, std::size_t j) const {
        return double{table[uz((id * K + head) * hd) + j]};
    }
};

struct HeadCase {
    int hd, H, K, channels;  // no channels: no value embedding
};
const HeadCase kHeads[] = {{64, 4, 2, 12},  {128, 2, 1, 32}, {256, 2, 2, 12}, {32, 4, 1, 32},
                           {96, 3, 3, 12},  {48, 1, 1, 0},   {128, 3, 1, 0},  {16, 4, 4, 32},
                           {10, 4, 2, 12},  {2, 16, 4, 32},  {80, 5, 5, 12},  {192, 2, 1, 12},
                           {200, 2, 1, 12}, {64, 16, 4, 0},  {6, 6, 6, 0}};

cuda::HeadArgs head_args(const HeadCase& c, const Rotation& rotation, const Array<float>& cos,
                         const Array<float>& sin, const Array<cuda::RowInfo>& rows,
                         const Array<bf16>& table, const Array<float>& gate) {
    cuda::HeadArgs a{};
    a.rows = rows.get(), a.cos = cos.get(), a.sin = sin.get();
    a.n_head = c.H, a.n_kv_head = c.K, a.hd = c.hd, a.qk_scale = rotation.scale;
    a.value_embed = c.channels > 0 ? table.get() : nullptr;
    a.ve_gate = gate.get(), a.gate_channels = c.channels, a.gate_scale = 3;
    return a;
}

void test_rotary(const HeadCase& c, int T, Random& random) {
    constexpr int kSlots = 3, kPages = 3, kPositions = 64 * kPages;
    constexpr float kMark = 77;  // what was in the cache before
    const int HD = padded_head(c.hd), heads = c.H + 2 * c.K;
    const std::size_t hd = uz(c.hd), ld = uz((heads * c.hd + 7) / 8 * 8 + 8), ld_h = 64;
    Pages pages(random, c.K, HD, std::vector<int>(kSlots, kPages), kMark);
    const Rotation rotation(c.hd, kPositions);
    const ValueEmbed embed(random, c.K, c.hd, c.channels);
    std::vector<cuda::RowInfo> rows(uz(T));
    std::vector<int> next(kSlots, 0);
    for (std::size_t t = 0; t < rows.size(); ++t) {  // no place in the cache twice
        cuda::RowInfo& r = rows[t];
        do {
            r.slot = static_cast<int>(random.below(kSlots));
        } while (next[uz(r.slot)] >= kPositions);
        r.pos = next[uz(r.slot)]++;
        r.id = static_cast<int>(random.below(ValueEmbed::V));
    }
    const Floats qkv = values(random, uz(T) * ld), h = values(random, uz(T) * ld_h);
    const Array<bf16> d_qkv(qkv), d_h(h), d_pages(pages.values), d_embed(embed.table),
        q(uz(T * c.H * HD));
    const Array<float> cos(rotation.cos), sin(rotation.sin), d_gate(embed.gate), gate(uz(T * c.K));
    const Array<int> table(pages.table);
    const Array<cuda::RowInfo> d_rows(rows);
    cuda::RotaryArgs a{};
    a.head = head_args(c, rotation, cos, sin, d_rows, d_embed, d_gate);
    a.cache = pages.cache(d_pages, table);
    a.qkv = d_qkv.get(), a.ld = static_cast<int>(ld), a.h = d_h.get();
    a.ld_h = static_cast<int>(ld_h), a.q = q.get(), a.gate = gate.get(), a.T = T;
    cuda::with_head_size(HD, [&](auto size) { cuda::rotary<size.value>(device(), a); });

    const Floats got_q = q.read(), got_cache = d_pages.read(), got_gate = gate.read();
    Floats rest = got_cache;  // what must be as it was
    Distance off_q, off_k, off_v, off_gate;
    double worst = 0;
    const auto compare = [&](Distance& off, const float* got, const Doubles& want) {
        const Floats g(got, got + hd);
        off.add<double>(g, want);
        worst = std::max(worst, worst_element(g, want, Doubles(hd, 1), 4, kHalfStep));
    };
    for (std::size_t t = 0; t < rows.size(); ++t) {
        const cuda::RowInfo& r = rows[t];
        const float* const in = &qkv[t * ld];
        for (int i = 0; i < c.H; ++i) {
            const std::size_t at = (t * uz(c.H) + uz(i)) * uz(HD);
            compare(off_q, &got_q[at], rotation(in + uz(i) * hd, r.pos));
            CHECK(not_untouched(std::span(got_q).subspan(at + hd, uz(HD) - hd)) == 0);
        }
        for (int i = 0; i < c.K; ++i) {
            const std::size_t k = pages.key(r.slot, i, r.pos), v = pages.value(r.slot, i, r.pos);
            compare(off_k, &got_cache[k], rotation(in + uz(c.H + i) * hd, r.pos));
            Doubles want, gates;
            for (std::size_t j = 0; j < 32; ++j) gates.push_back(double{h[t * ld_h + j]});
            const double g = c.channels > 0 ? embed.gate_of(i, gates) : 0;
            for (std::size_t j = 0; j < hd; ++j) {
                want.push_back(double{in[uz(c.H + c.K + i) * hd + j]});
                if (c.channels > 0) want.back() += g * embed.at(r.id, i, j);
            }
            compare(off_v, &got_cache[v], want);
            std::fill_n(&rest[k], hd, kMark), std::fill_n(&rest[v], hd, kMark);
            if (c.channels > 0) {
                add_one(off_gate, double{got_gate[t * uz(c.K) + uz(i)]}, g);
            }
        }
    }
    CHECK(off_q.relative() <= bf16_bound(uz(T * c.H) * hd));
    CHECK(off_k.relative() <= bf16_bound(uz(T * c.K) * hd));
    CHECK(off_v.relative() <= bf16_bound(uz(T * c.K) * hd));
    CHECK(off_gate.relative() <= kFloat);
    CHECK(worst <= 1);
    CHECK(std::count(rest.begin(), rest.end(), kMark) == static_cast<std::ptrdiff_t>(rest.size()));
    if (c.channels == 0) CHECK(not_untouched(got_gate) == 0);
    // one row alone
    const std::size_t t = rows.size() - 1;
    const Array<bf16> one(uz(c.H * HD));
    a.head.rows = d_rows.get() + t, a.qkv = d_qkv.get() + t * ld, a.h = d_h.get() + t * ld_h;
    a.q = one.get(), a.gate = nullptr, a.T = 1;
    cuda::with_head_size(HD, [&](auto size) { cuda::rotary<size.value>(device(), a); });
    CHECK(same_bits(one.read(), std::span(got_q).subspan(t * uz(c.H * HD))));
    CHECK(same_bits(d_pages.read(), got_cache));
}

}  // namespace

TEST_CASE("cuda kernels: rotary, with the cache's pages, value embedding and gates") {
    if (no_gpu()) return;
    Random random(4);
    for (const HeadCase& c : kHeads) {
        CAPTURE(c.hd);
        CAPTURE(c.H);
        for (const int T : {1, 2, 3, 65, 190}) {
            if (quick() && T > 3) break;
            CAPTURE(T);
            test_rotary(c, T, random);
        }
    }
}

// ==== gemv =======================================================================================

namespace {

struct GemvCase {
    int N, K;
};
// Everything that one product with M rows gave, bit for bit.
struct GemvResult {
    Floats plain, scaled, relu2, x, xb, squares, middle;
};

// Inputs of all products of one size; kM rows, of which a product uses the first M.
class Gemv {
public:
    static constexpr std::size_t kM = 256;
    static constexpr int V = 11;

    Gemv(const GemvCase& c, Random& random)
        : N(uz(c.N)),
          K(uz(c.K)),
          ld(uz(pad64(c.N))),
          x(values(random, kM * K)),
          w(values(random, N * K, 0.5f)),
          squares(kM * K / 16),
          old(values(random, kM * N, 3)),
          x0(values(random, kM * N)),
          mid(values(random, kM * N)),
          table(values(random, 5 * V * N)),
          rows(kM),
          d_w(w),
          d_table(table) {
        for (float& s : squares) s = 16 * random.uniform();
        for (auto& r : rows) r.bigram = static_cast<int>(random.below(5 * V));
    }

    // mode: what the residual does besides, see `residual`.
    GemvResult run(const cuda::Device& d, std::size_t M, int mode) const {
        // rows beyond M are read, up to a multiple of 32, and must not matter
        const std::size_t padded = (M + 31) / 32 * 32;
        const auto rows_of = [&](const Floats& all, std::size_t width) {
            Floats out(all.begin(), all.begin() + static_cast<std::ptrdiff_t>(M * width));
            out.resize(padded * width, kNaN);
            return out;
        };
        const Array<bf16> d_x(rows_of(x, K)), relu2(M * ld), xb(M * ld);
        const Array<float> d_squares(rows_of(squares, K / 16)), plain(M * (N + 3)),
            scaled(M * (N + 3)), x_out(spread(old, M, N, ld, kNaN)),
            d_x0(spread(x0, M, N, ld, kNaN)), d_mid(spread(mid, M, N, ld, kNaN)), middle(M * ld),
            squares_out(M * ld / 16);
        const Array<cuda::RowInfo> d_rows(
            std::vector<cuda::RowInfo>(rows.begin(), rows.begin() + static_cast<int>(M)));
        cuda::GemvArgs a{};
        a.x = d_x.get(), a.w = d_w.get(), a.M = static_cast<int>(M), a.N = static_cast<int>(N);
        a.K = static_cast<int>(K), a.ld = static_cast<int>(N + 3), a.y = plain.get();
        cuda::gemv<cuda::GemvOutput::scaled_f32>(d, a);
        a.squares = d_squares.get(), a.D = static_cast<int>(K) - 5, a.y = scaled.get();
        a.softcap = kCap;
        cuda::gemv<cuda::GemvOutput::scaled_f32>(d, a);
        a.ld = static_cast<int>(ld), a.y = relu2.get();
        cuda::gemv<cuda::GemvOutput::relu2>(d, a);
        a.x_out = x_out.get(), a.xb_out = xb.get(), a.squares_out = squares_out.get();
        a.x0 = d_x0.get(), a.rows = d_rows.get(), a.backout_lambda = kLambda;
        if (mode & 1) a.entry.resid = kResid, a.entry.x0 = kX0;
        if (mode & 2) a.entry.bigram = kBigram, a.entry.bigram_embed = d_table.get();
        if (mode & 4) a.middle = middle.get();
        if (mode & 8) a.x_mid = d_mid.get();
        cuda::gemv<cuda::GemvOutput::residual>(d, a);
        return {plain.read(), scaled.read(),      relu2.read(), x_out.read(),
                xb.read(),    squares_out.read(), middle.read()};
    }

    static constexpr float kCap = 15, kLambda = 0.3f, kResid = 0.9f, kX0 = 0.2f, kBigram = 0.5f;
    std::size_t N, K, ld;
    Floats x, w, squares, old, x0, mid, table;
    std::vector<cuda::RowInfo> rows;
    Array<bf16> d_w, d_table;
};

// The result of kM rows against float64.
void check_gemv(const Gemv& g, const GemvResult& r, int mode) {
    const std::size_t M = Gemv::kM, N = g.N, ld = g.ld;
    const Product p = product(g.x, g.w, M, N, g.K);
    Doubles scaled, absolute, relu2, relu2_absolute, x, middle;
    for (std::size_t m = 0; m < M; ++m) {
        double sum = 0;
        for (std::size_t i = 0; i < g.K / 16; ++i) sum += double{g.squares[m * g.K / 16 + i]};
        const double rstd = 1 / std::sqrt(sum / (static_cast<double>(g.K) - 5) + 0x1p-23);
        for (std::size_t n = 0; n < N; ++n) {
            const std::size_t at = m * N + n;
            const double y = p.y[at] * rstd, cap = double{Gemv::kCap};
            scaled.push_back(cap * std::tanh(y / cap)), absolute.push_back(p.absolute[at] * rstd);
            const double h = std::max(0.0, y);
            relu2.push_back(h * h);
            // an error e of h becomes 2 h e + e^2
            const double e = 4 * static_cast<double>(g.K) * 0x1p-24 * absolute.back();
            relu2_absolute.push_back((2 * h * e + e * e) /
                                     (4 * static_cast<double>(g.K) * 0x1p-24));
            double v = double{g.old[at]} + p.y[at];
            middle.push_back(v);
            if (mode & 8) v -= double{Gemv::kLambda} * ((mode & 4) ? v : double{g.mid[at]});
            if (mode & 1) v = double{Gemv::kResid} * v + double{Gemv::kX0} * double{g.x0[at]};
            if (mode & 2)
                v += double{Gemv::kBigram} * double{g.table[uz(g.rows[m].bigram) * N + n]};
            x.push_back(v);
        }
    }
    const Floats plain_there = columns(r.plain, M, N + 3, 0, N),
                 scaled_there = columns(r.scaled, M, N + 3, 0, N),
                 relu2_there = columns(r.relu2, M, ld, 0, N), x_there = columns(r.x, M, ld, 0, N),
                 xb_there = columns(r.xb, M, ld, 0, N);
    CHECK(relative_l2(plain_there, p.y) <= kFloat);
    CHECK(worst_element(plain_there, p.y, p.absolute, g.K, kFloatStep) <= 1);
    CHECK(relative_l2(scaled_there, scaled) <= kFloat);
    CHECK(worst_element(scaled_there, scaled, absolute, g.K, kFloatStep) <= 1);
    CHECK(relative_l2(relu2_there, relu2) <= bf16_bound(relu2.size()));
    CHECK(worst_element(relu2_there, relu2, relu2_absolute, g.K, kHalfStep) <= 1);
    CHECK(relative_l2(x_there, x) <= kFloat);
    CHECK(not_untouched(columns(r.plain, M, N + 3, N, N + 3)) == 0);
    CHECK(not_untouched(columns(r.relu2, M, ld, N, ld)) == 0);
    CHECK(not_untouched(columns(r.xb, M, ld, N, ld)) == 0);
    if (mode & 4) {
        CHECK(relative_l2(columns(r.middle, M, ld, 0, N), middle) <= kFloat);
    } else {
        CHECK(not_untouched(r.middle) == 0);
    }
    std::size_t wrong = 0, wrong_squares = 0;
    for (std::size_t i = 0; i < x_there.size(); ++i)
        wrong += round_to(DType::bf16, x_there[i]) != xb_there[i];
    for (std::size_t m = 0; m < M; ++m) {
        for (std::size_t i = 0; i < ld / 16; ++i) {
            const float got = r.squares[m * ld / 16 + i];
            double want = 0;
            for (std::size_t n = 16 * i; n < std::min(N, 16 * i + 16); ++n)
                want += double{r.x[m * ld + n]} * double{r.x[m * ld + n]};
            if (16 * i >= N) {
                wrong_squares += !untouched(got);
            } else {
                wrong_squares += !(std::abs(double{got} - want) <= 1e-6 * want);
            }
        }
    }
    CHECK(wrong == 0);
    CHECK(wrong_squares == 0);
}

bool same_rows(const Floats& got, const Floats& all) {
    return got.size() <= all.size() && same_bits(got, std::span(all).first(got.size()));
}

}  // namespace

TEST_CASE("cuda kernels: gemv, all outputs, and a row's bits are the same in every batch") {
    if (no_gpu()) return;
    const GemvCase cases[] = {{1, 64},     {2, 128},  {15, 64},    {16, 192},   {17, 2048},
                              {24, 64},    {40, 320}, {65, 768},   {100, 1664}, {127, 5120},
                              {130, 1280}, {515, 64}, {1031, 128}, {300, 704}};
    std::vector<std::size_t> batches(70);
    std::iota(batches.begin(), batches.end(), std::size_t{1});
    if (quick()) batches = {1, 2, 7, 8, 9, 16, 17, 32, 33, 70};
    for (const std::size_t M : {96u, 127u, 128u, 129u, 255u}) batches.push_back(M);
    Random random(5);
    int mode = 0;
    for (const GemvCase& c : cases) {
        if (quick() && c.N * c.K > 20000) continue;
        CAPTURE(c.N);
        CAPTURE(c.K);
        const Gemv g(c, random);
        mode = (mode + 5) % 16;
        CAPTURE(mode);
        const GemvResult want = g.run(device(), Gemv::kM, mode);
        check_gemv(g, want, mode);
        const cuda::Device devices[] = {device(), with_sms(1), with_sms(100000)};
        std::size_t i = 0;
        for (const std::size_t M : batches) {
            CAPTURE(M);
            const GemvResult got = g.run(devices[i++ % 3], M, mode);
            CHECK(same_rows(got.plain, want.plain));
            CHECK(same_rows(got.scaled, want.scaled));
            CHECK(same_rows(got.relu2, want.relu2));
            CHECK(same_rows(got.x, want.x));
            CHECK(same_rows(got.xb, want.xb));
            CHECK(same_rows(got.squares, want.squares));
            CHECK(same_rows(got.middle, want.middle));
        }
    }
}

TEST_CASE("cuda kernels: gemv, the residual's ways with the middle layer, x0 and the bigrams") {
    if (no_gpu()) return;
    Random random(6);
    const Gemv g({72, 128}, random);
    for (int mode = 0; mode < 16; ++mode) {
        CAPTURE(mode);
        check_gemv(g, g.run(device(), Gemv::kM, mode), mode);
    }
}

TEST_CASE("cuda kernels: gemv of one-hot rows gives the weights themselves") {
    if (no_gpu()) return;
    Random random(7);
    const std::size_t K = 832, N = 131, M = 64;
    const Floats w = values(random, N * K);
    Floats x(M * K);
    for (std::size_t m = 0; m < M; ++m) x[m * K + (m * 37 + 11) % K] = 1;
    const Array<bf16> d_x(x), d_w(w);
    const Array<float> y(M * N);
    cuda::GemvArgs a{};
    a.x = d_x.get(), a.w = d_w.get(), a.M = static_cast<int>(M), a.N = static_cast<int>(N);
    a.K = static_cast<int>(K), a.ld = static_cast<int>(N), a.y = y.get();
    cuda::gemv<cuda::GemvOutput::scaled_f32>(device(), a);
    Floats want;
    for (std::size_t m = 0; m < M; ++m)
        for (std::size_t n = 0; n < N; ++n) want.push_back(w[n * K + (m * 37 + 11) % K]);
    const Floats got = y.read();
    std::size_t wrong = 0;
    for (std::size_t i = 0; i < want.size(); ++i) wrong += got[i] != want[i];
    CHECK(wrong == 0);
}

// ==== gemm =======================================================================================

namespace {

// Ways to cut the work: way 2 i + 1 is that of i with two blocks to a tile. f(way, traits) for each.
template <class F>
void each_way(F f) {
    int way = 0;
    cuda::GemmAll::each([&](auto traits) {
        f(way++, traits);
        f(way++, traits);
    });
}
int ways() {
    int n = 0;
    each_way([&](int, auto) { ++n; });
    return n;
}
bool can_run(const cuda::Device& d, const cuda::GemmShape& s, cuda::Epilogue epilogue, int wanted) {
    bool can = false;
    each_way([&](int way, auto traits) {
        using T = decltype(traits);
        if (way != wanted) return;
        can =
            cuda::gemm_resident<T>(d) > 0 && (way % 2 == 0 || cuda::gemm_parts<T>(d, s, epilogue));
    });
    return can;
}
void launch_way(int wanted, const cuda::Device& d, void* y, const bf16* x, const bf16* w,
                const cuda::GemmShape& s, cuda::Epilogue epilogue) {
    each_way([&](int way, auto traits) {
        if (way == wanted)
            cuda::gemm_launch<decltype(traits)>(d, y, x, w, s, epilogue, way % 2 == 1);
    });
}

struct GemmCase {
    int M, N, K;
    int extra = 8;  // beyond the least row strides
};

class Gemm {
public:
    Gemm(const GemmCase& c, Random& random, float mean = 0)
        : M(uz(c.M)),
          N(uz(c.N)),
          K(uz(c.K)),
          ldy(uz((c.N + 7) / 8 * 8 + c.extra)),
          shape{c.M, c.N, c.K, c.K + c.extra, c.K + c.extra, static_cast<int>(ldy)},
          x(values(random, M * K, 1, mean)),
          w(values(random, N * K, 0.5f)),
          old(values(random, M * N, 3)),
          d_x(spread(x, M, K, uz(shape.ldx), kNaN)),
          d_w(spread(w, N, K, uz(shape.ldw), kNaN)) {}

    // way: -1 as the device chooses, or where it cannot be gone
    template <cuda::Epilogue epilogue>
    Floats run(const cuda::Device& d, std::size_t rows, int way = -1) const {
        constexpr bool kHalf =
            epilogue == cuda::Epilogue::store || epilogue == cuda::Epilogue::relu2;
        using T = std::conditional_t<kHalf, bf16, float>;
        cuda::GemmShape s = shape;
        s.M = static_cast<int>(rows);
        const auto call = [&](const Array<T>& y) {
            if (way < 0 || !can_run(d, s, epilogue, way)) {
                cuda::gemm<epilogue>(d, y.get(), d_x.get(), d_w.get(), s);
            } else {
                launch_way(way, d, y.get(), d_x.get(), d_w.get(), s, epilogue);
            }
            return y.read();
        };
        if constexpr (epilogue == cuda::Epilogue::add) {
            return call(Array<T>(spread(old, rows, N, ldy, kNaN)));
        } else {
            return call(Array<T>(rows * ldy));
        }
    }

    std::size_t M, N, K, ldy;
    cuda::GemmShape shape;
    Floats x, w, old;
    Array<bf16> d_x, d_w;
};

struct GemmResult {
    Floats store, relu2, add, f32;
};
GemmResult run_all(const Gemm& g, const cuda::Device& d, std::size_t rows, int way = -1) {
    using cuda::Epilogue;
    return {g.run<Epilogue::store>(d, rows, way), g.run<Epilogue::relu2>(d, rows, way),
            g.run<Epilogue::add>(d, rows, way), g.run<Epilogue::store_f32>(d, rows, way)};
}
void check_same_rows(const GemmResult& got, const GemmResult& all) {
    CHECK(same_rows(got.store, all.store));
    CHECK(same_rows(got.relu2, all.relu2));
    CHECK(same_rows(got.add, all.add));
    CHECK(same_rows(got.f32, all.f32));
}

void check_gemm(const Gemm& g, const GemmResult& r) {
    const std::size_t M = g.M, N = g.N;
    const Product p = product(g.x, g.w, M, N, g.K);
    Doubles relu2, relu2_absolute, add, add_absolute;
    const double c = 4 * static_cast<double>(g.K) * 0x1p-24;
    for (std::size_t i = 0; i < p.y.size(); ++i) {
        const double h = std::max(0.0, p.y[i]), e = c * p.absolute[i];
        relu2.push_back(h * h);
        relu2_absolute.push_back((2 * h * e + e * e) / c);
        add.push_back(double{g.old[i]} + p.y[i]);
        add_absolute.push_back(p.absolute[i] + std::abs(double{g.old[i]}));
    }
    const auto check = [&](const Floats& y, const Doubles& want, const Doubles& absolute,
                           double bound, double step) {
        const Floats there = columns(y, M, g.ldy, 0, N);
        CHECK(relative_l2(there, want) <= bound);
        CHECK(worst_element(there, want, absolute, g.K, step) <= 1);
        const Floats beyond = columns(y, M, g.ldy, N, g.ldy);
        CHECK(std::count_if(beyond.begin(), beyond.end(), is_nan) ==
              static_cast<std::ptrdiff_t>(beyond.size()));
    };
    check(r.store, p.y, p.absolute, bf16_bound(p.y.size()), kHalfStep);
    check(r.relu2, relu2, relu2_absolute, bf16_bound(p.y.size()), kHalfStep);
    check(r.add, add, add_absolute, kFloat, kFloatStep);
    check(r.f32, p.y, p.absolute, kFloat, kFloatStep);
}

}  // namespace

TEST_CASE("cuda kernels: gemm, all epilogues at odd shapes, and a row's bits do not depend on M") {
    if (no_gpu()) return;
    const GemmCase cases[] = {
        {1, 2, 64, 0},    {2, 6, 64},      {17, 40, 128},   {33, 130, 192, 0}, {64, 64, 64},
        {65, 66, 320},    {127, 256, 768}, {129, 96, 1664}, {257, 322, 64},    {300, 128, 832, 0},
        {300, 1030, 128}, {513, 200, 256}, {128, 72, 5120}, {1000, 24, 64}};
    Random random(8);
    for (const GemmCase& c : cases) {
        if (quick() && c.M * c.K > 50000) continue;
        CAPTURE(c.M);
        CAPTURE(c.N);
        CAPTURE(c.K);
        const Gemm g(c, random, c.K == 832 ? 2 : 0);
        const GemmResult want = run_all(g, device(), g.M);
        check_gemm(g, want);
        for (const cuda::Device& d : {device(), like_gb10(), with_sms(1), with_sms(1000)})
            check_same_rows(run_all(g, d, g.M), want);
        for (const std::size_t rows : {1u, 2u, 63u, 64u, 65u, 128u, 255u})
            if (rows < g.M) check_same_rows(run_all(g, device(), rows), want);
    }
}

TEST_CASE("cuda kernels: gemm, every number of rows up to 70") {
    if (no_gpu()) return;
    Random random(9);
    const Gemm g({70, 138, 192}, random);
    const GemmResult want = run_all(g, device(), 70);
    check_gemm(g, want);
    for (std::size_t M = 1; M < 70; M += quick() ? 13u : 1u) {
        CAPTURE(M);
        check_same_rows(run_all(g, device(), M), want);
    }
}

TEST_CASE("cuda kernels: gemm, all ways to cut the work give the same bits") {
    if (no_gpu()) return;
    Random random(10);
    // several tiles for every block; less than one tile; many K steps; sums in two halves
    for (const GemmCase& c : {GemmCase{700, 644, 128}, GemmCase{37, 30, 64},
                              GemmCase{150, 326, 1024}, GemmCase{200, 330, 3072}}) {
        if (quick() && c.M > 100) continue;
        CAPTURE(c.M);
        const Gemm g(c, random);
        const GemmResult want = run_all(g, device(), g.M);
        check_gemm(g, want);
        for (int way = 0; way < ways(); ++way) {
            CAPTURE(way);
            check_same_rows(run_all(g, device(), g.M, way), want);
            check_same_rows(run_all(g, with_sms(1), g.M, way), want);
            check_same_rows(run_all(g, with_sms(3), g.M, way), want);
            check_same_rows(run_all(g, device(), 1, way), want);
        }
    }
}

TEST_CASE("cuda kernels: on paper: on a GB10 gemm chooses only what 99 KB of shared memory hold") {
    cuda::Device gb10;
    gb10.sms = 48, gb10.shared_bytes = 99 * 1024;
    for (const int M : {1, 64, 128, 300, 1024, 2048})
        for (const int N : {64, 768, 1280, 2560, 5120, 8192})
            for (const int K : {64, 768, 2048, 5120})
                cuda::GemmAll::choose(
                    gb10, {M, N, K, K, K, N}, cuda::Epilogue::add,
                    [&](auto traits, bool) { CHECK(decltype(traits)::kSharedBytes <= 99 * 1024); });
}

TEST_CASE("cuda kernels: gemm of one-hot rows gives the weights themselves") {
    if (no_gpu()) return;
    Random random(11);
    const std::size_t K = 448, N = 266, M = 200;
    const Floats w = values(random, N * K);
    Floats x(M * K);
    for (std::size_t m = 0; m < M; ++m) x[m * K + (m * 37 + 11) % K] = 1;
    const Array<bf16> d_x(x), d_w(w);
    const int ldy = 272;
    const cuda::GemmShape s{static_cast<int>(M), static_cast<int>(N), static_cast<int>(K),
                            static_cast<int>(K), static_cast<int>(K), ldy};
    for (int way = 0; way < ways(); ++way) {
        if (!can_run(device(), s, cuda::Epilogue::store, way)) continue;
        CAPTURE(way);
        const Array<bf16> y(M * uz(ldy));
        launch_way(way, device(), y.get(), d_x.get(), d_w.get(), s, cuda::Epilogue::store);
        const Floats got = y.read();
        std::size_t wrong = 0;
        for (std::size_t m = 0; m < M; ++m)
            for (std::size_t n = 0; n < N; ++n)
                wrong += got[m * uz(ldy) + n] != w[n * K + (m * 37 + 11) % K];
        CHECK(wrong == 0);
    }
}

// ==== attention ==================================================================================

namespace {

constexpr float kLog2e = 1.4426950408889634f;
constexpr int kWindows[] = {0, 1, 127, 512, INT_MAX};
constexpr int kContexts[] = {1, 2, 63, 64, 65, 513, 1025};

// A vector of length scale * sqrt(hd), as queries and keys are after their norm.
Floats unit(Random& random, std::size_t hd, float scale) {
    Floats out = values(random, hd);
    double sum = 1e-9;
    for (const float v : out) sum += double{v} * double{v};
    for (float& v : out)
        v = round_to(DType::bf16, v * static_cast<float>(double{scale} *
                                                         std::sqrt(static_cast<double>(hd) / sum)));
    return out;
}

// softmax(q k / sqrt(hd)) v over the keys lowest .. pos
Doubles attend(const Pages& p, const double* q, std::size_t hd, int slot, int head, int lowest,
               int pos) {
    Doubles z(hd);
    double total = 0;
    for (int s = lowest; s <= pos; ++s) {
        const float* const k = &p.values[p.key(slot, head, s)];
        const float* const v = &p.values[p.value(slot, head, s)];
        double dot = 0;
        for (std::size_t j = 0; j < hd; ++j) dot += q[j] * double{k[j]};
        const double weight = std::exp(dot / std::sqrt(static_cast<double>(hd)));
        total += weight;
        for (std::size_t j = 0; j < hd; ++j) z[j] += weight * double{v[j]};
    }
    for (double& x : z) x /= total;
    return z;
}

std::vector<int> pages_for(int longest) {  // pages of each context
    std::vector<int> out;
    for (const int n : kContexts) out.push_back((std::min(n, longest) + 63) / 64);
    return out;
}
int lowest_key(int pos, int window) { return pos > window ? pos - window : 0; }

struct PrefillCase {
    int hd, H, K;
    float scale = 1.2f;
    bool adversarial = false;  // all keys of a head are plus or minus its query: the largest scores
};

class Prefill {
public:
    Prefill(const PrefillCase& c, Random& random)
        : c_(c),
          HD_(padded_head(c.hd)),
          longest_(quick() ? 130 : kContexts[std::size(kContexts) - 1]),
          pages_(random, c.K, HD_, pages_for(longest_), kNaN) {
        const std::size_t hd = uz(c.hd);
        Floats direction = unit(random, hd, c.scale);
        for (std::size_t i = 0; i < std::size(kContexts); ++i) {
            const int slot = static_cast<int>(i), context = std::min(kContexts[i], longest_);
            const int begin = i % 2 == 0 ? 0 : static_cast<int>(random.below(uz(context)));
            pieces_.push_back({rows_, context - begin, begin, slot});
            rows_ += context - begin;
            for (int pos = 0; pos < context; ++pos) {
                for (int head = 0; head < c.K; ++head) {
                    Floats k = c.adversarial ? direction : unit(random, hd, c.scale);
                    if (c.adversarial && pos % 3 == 1)
                        for (float& v : k) v = -v;
                    put(pages_.key(slot, head, pos), k);
                    put(pages_.value(slot, head, pos), values(random, hd));
                }
            }
        }
        for (int r = 0; r < rows_ * c.H; ++r) {
            const Floats one = c.adversarial ? direction : unit(random, hd, c.scale);
            q_.insert(q_.end(), one.begin(), one.end());
            q_.resize(q_.size() + uz(HD_) - hd, 0.0f);
        }
        d_pages_.emplace(pages_.values), d_q_.emplace(q_);
    }

    // tile rows: 0 as the backend cuts, else cut at random into tiles of at most so many
    Floats run(const cuda::Device& d, int window, Random* random = nullptr) const {
        std::vector<cuda::QueryTile> tiles;
        for (const cuda::QueryTile& p : pieces_) {
            for (int t = 0; t < p.rows;) {
                int n = cuda::kQueryRows;
                if (random != nullptr) n = 1 + static_cast<int>(random->below(uz(n)));
                n = std::min(n, p.rows - t);
                tiles.push_back({p.first_row + t, n, p.pos + t, p.slot});
                t += n;
            }
        }
        std::sort(tiles.begin(), tiles.end(),
                  [](const cuda::QueryTile& a, const cuda::QueryTile& b) {
                      return a.pos != b.pos ? a.pos > b.pos : a.first_row < b.first_row;
                  });
        const Array<cuda::QueryTile> d_tiles(tiles);
        const Array<bf16> z(uz(rows_) * ldz());
        const Array<int> table(pages_.table);
        cuda::AttentionArgs a{};
        a.z = z.get(), a.ldz = static_cast<int>(ldz()), a.q = d_q_->get(), a.ldq = c_.H * HD_;
        a.pages = d_pages_->get(), a.page_stride = static_cast<std::int64_t>(pages_.stride());
        a.layer_offset = static_cast<std::int64_t>(pages_.offset());
        a.page_table = table.get(), a.max_pages = pages_.max_pages, a.tiles = d_tiles.get();
        a.n_tiles = static_cast<int>(tiles.size()), a.n_head = c_.H, a.n_kv_head = c_.K;
        a.hd = c_.hd, a.window = window;
        const float root = std::sqrt(static_cast<float>(c_.hd));
        a.scale_log2 = kLog2e / root;
        a.shift_log2 = kLog2e * 1.01f * c_.scale * c_.scale * root;
        cuda::with_head_size(HD_, [&](auto size) { cuda::prefill_attention<size.value>(d, a); });
        return z.read();
    }

    void check(const Floats& z, int window) const {
        const std::size_t hd = uz(c_.hd), width = uz(c_.H) * hd;
        Doubles want(uz(rows_) * width);
        for (const cuda::QueryTile& p : pieces_) {
            threads().run(uz(p.rows), [&](std::size_t t) {
                for (int h = 0; h < c_.H; ++h) {
                    const std::size_t row = uz(p.first_row) + t;
                    const int pos = p.pos + static_cast<int>(t);
                    const auto first = q_.begin() + static_cast<std::ptrdiff_t>(
                                                        (row * uz(c_.H) + uz(h)) * uz(HD_));
                    const Doubles q(first, first + c_.hd);
                    const Doubles one = attend(pages_, q.data(), hd, p.slot, h / (c_.H / c_.K),
                                               lowest_key(pos, window), pos);
                    std::copy(one.begin(), one.end(),
                              want.begin() + static_cast<std::ptrdiff_t>(row * width + uz(h) * hd));
                }
            });
        }
        const Floats there = columns(z, uz(rows_), ldz(), 0, width);
        CHECK(not_untouched(columns(z, uz(rows_), ldz(), width, ldz())) == 0);
        double worst_piece = 0, worst_row = 0;
        for (const cuda::QueryTile& p : pieces_) {
            Distance piece;
            for (int t = 0; t < p.rows; ++t) {
                const std::size_t at = uz(p.first_row + t) * width;
                Distance row;
                row.add<double>(std::span(there).subspan(at, width),
                                std::span(want).subspan(at, width));
                piece.add<double>(std::span(there).subspan(at, width),
                                  std::span(want).subspan(at, width));
                worst_row = std::max(worst_row, row.relative());
            }
            // of few values the norm is not yet what it is on average
            if (uz(p.rows) * width >= 64) worst_piece = std::max(worst_piece, piece.relative());
        }
        CHECK(worst_piece <= kAttention);
        CHECK(worst_row <= 2 * kAttention);
    }

private:
    std::size_t ldz() const { return uz((c_.H * c_.hd + 7) / 8 * 8 + 8); }
    void put(std::size_t at, const Floats& x) {
        std::copy(x.begin(), x.end(), pages_.values.begin() + static_cast<std::ptrdiff_t>(at));
        // beyond hd the backend has zeros
        std::fill_n(pages_.values.begin() + static_cast<std::ptrdiff_t>(at + x.size()),
                    uz(HD_) - x.size(), 0.0f);
    }
    PrefillCase c_;
    int HD_, longest_, rows_ = 0;
    Pages pages_;
    std::vector<cuda::QueryTile> pieces_;
    Floats q_;
    std::optional<Array<bf16>> d_pages_, d_q_;
};

}  // namespace

TEST_CASE("cuda kernels: prefill attention, all windows and groups; no cut changes a bit") {
    if (no_gpu()) return;
    const PrefillCase cases[] = {{64, 4, 4},
                                 {64, 4, 2},
                                 {64, 4, 1},
                                 {128, 4, 2},
                                 {128, 2, 2},
                                 {128, 4, 1},
                                 {256, 2, 1},
                                 {256, 4, 1},
                                 {96, 3, 3},
                                 {48, 2, 1},
                                 {32, 4, 4},
                                 {10, 4, 2},
                                 {2, 16, 4},
                                 {80, 5, 5},
                                 {64, 4, 2, 1.2f, true},
                                 {128, 2, 1, 1.2f, true},
                                 {256, 2, 2, 1, true},
                                 {64, 13, 13, 1}};
    Random random(12);
    for (const PrefillCase& c : cases) {
        if (quick() && random.below(3) != 0) continue;
        CAPTURE(c.hd);
        CAPTURE(c.H);
        CAPTURE(c.K);
        const Prefill p(c, random);
        for (const int window : kWindows) {
            CAPTURE(window);
            const Floats want = p.run(device(), window);
            p.check(want, window);
            // much work and little for the multiprocessors there are, then other tiles
            CHECK(same_bits(p.run(with_sms(1), window), want));
            CHECK(same_bits(p.run(with_sms(100000), window), want));
            CHECK(same_bits(p.run(device(), window, &random), want));
            CHECK(same_bits(p.run(with_sms(1), window, &random), want));
        }
    }
}

namespace {

class Decode {
public:
    Decode(const HeadCase& c, int window, Random& random)
        : c_(c),
          window_(window),
          HD_(padded_head(c.hd)),
          rotation_(c.hd, longest() + 1),
          embed_(random, c.K, c.hd, c.channels),
          // what is not to be read is NaN: beyond the context, and before the window
          pages_(random, c.K, HD_, pages_for(longest()), kNaN),
          ld_(uz((c.H + 2 * c.K) * c.hd + 8)),
          rows_(uz(count() + 1)) {
        const std::size_t hd = uz(c.hd);
        for (int i = 0; i < count(); ++i) {
            cuda::RowInfo& r = rows_[uz(i)];
            r.slot = i, r.pos = context(i) - 1;
            r.id = static_cast<int>(random.below(ValueEmbed::V));
            for (int s = lowest_key(r.pos, window); s < r.pos; ++s) {
                for (int head = 0; head < c.K; ++head) {
                    put(pages_.key(r.slot, head, s), unit(random, hd, 1.2f));
                    put(pages_.value(r.slot, head, s), values(random, hd));
                }
            }
        }
        rows_.back().slot = -1;  // a row that fills up the batch
        qkv_ = values(random, rows_.size() * ld_);
        for (float& x : qkv_) x += 1e-4f * random.uniform();  // these are float32
        xb_ = values(random, rows_.size() * kLdX);
        squares_.resize(rows_.size() * kLdX / 16);
        for (float& s : squares_) s = 16 * random.uniform();
        std::swap(rows_[0], rows_[4]);  // not in the order of slots and lengths
        std::swap(rows_[1], rows_[6]);
        d_pages_.emplace(pages_.values);
    }

    // z of rows first .. first + n - 1 in one batch. What they write into the cache is poisoned
    // before.
    Floats run(std::size_t first, std::size_t n) const {
        for (std::size_t r = first; r < first + n; ++r)
            for (const std::size_t at : places(r)) d_pages_->poison(at, uz(HD_));
        const auto part = [&](const Floats& all, std::size_t width) {
            return Floats(all.begin() + static_cast<std::ptrdiff_t>(first * width),
                          all.begin() + static_cast<std::ptrdiff_t>((first + n) * width));
        };
        const std::size_t H = uz(c_.H);
        const Array<float> qkv(part(qkv_, ld_)), squares(part(squares_, kLdX / 16)),
            cos(rotation_.cos), sin(rotation_.sin), gate(embed_.gate),
            partial(n * H * cuda::DecodeAttentionTraits::kSplits * uz(HD_ + 1));
        const Array<bf16> xb(part(xb_, kLdX)), embed(embed_.table), z(n * ldz());
        const Array<int> arrived(std::vector<int>(n * H, 0)), table(pages_.table);
        const Array<cuda::RowInfo> rows(
            std::vector<cuda::RowInfo>(rows_.begin() + static_cast<std::ptrdiff_t>(first),
                                       rows_.begin() + static_cast<std::ptrdiff_t>(first + n)));
        cuda::DecodeAttentionArgs a{};
        a.head = head_args(c_, rotation_, cos, sin, rows, embed, gate);
        a.cache = pages_.cache(*d_pages_, table);
        a.qkv = qkv.get(), a.ld = static_cast<int>(ld_), a.xb = xb.get();
        a.squares = squares.get(), a.ld_x = static_cast<int>(kLdX), a.D = kD;
        a.window = window_;
        const float root = std::sqrt(static_cast<float>(c_.hd));
        a.scale_log2 = kLog2e / root, a.shift_log2 = kLog2e * 1.01f * 1.2f * 1.2f * root;
        a.partial = partial.get(), a.arrived = arrived.get(), a.z = z.get();
        a.ld_z = static_cast<int>(ldz());
        cuda::with_head_size(HD_, [&](auto size) {
            cuda::decode_attention<size.value>(device(), a, static_cast<int>(n));
        });
        const std::vector<int> left = arrived.raw();
        CHECK(std::count(left.begin(), left.end(), 0) == static_cast<std::ptrdiff_t>(left.size()));
        return z.read();
    }

    void check(const Floats& got) const {
        const std::size_t hd = uz(c_.hd), width = uz(c_.H) * hd;
        Pages after = pages_;  // with the new keys and values
        const Floats cache = d_pages_->read();
        Floats rest = cache;
        Distance off_k, off_v;
        double worst = 0;
        for (std::size_t r = 0; r + 1 < rows_.size(); ++r) {
            const cuda::RowInfo& row = rows_[r];
            for (int head = 0; head < c_.K; ++head)
                remember(r, head, after, cache, rest, off_k, off_v);
            Doubles want;
            for (int h = 0; h < c_.H; ++h) {
                Doubles q = rotation_(&qkv_[r * ld_ + uz(h) * hd], row.pos);
                for (double& v : q) v = rounded(v);
                const Doubles z = attend(after, q.data(), hd, row.slot, h / (c_.H / c_.K),
                                         lowest_key(row.pos, window_), row.pos);
                want.insert(want.end(), z.begin(), z.end());
            }
            const auto z = std::span(got).subspan(r * ldz(), ldz());
            worst = std::max(worst, relative_l2<double>(z.first(width), want));
            CHECK(not_untouched(z.subspan(width)) == 0);
        }
        CHECK(worst <= kAttention);
        CHECK(off_k.relative() <= bf16_bound(uz(count() * c_.K) * hd));
        CHECK(off_v.relative() <= bf16_bound(uz(count() * c_.K) * hd));
        CHECK(not_untouched(std::span(got).last(ldz())) == 0);  // the row without a sequence
        std::size_t changed = 0;
        for (std::size_t i = 0; i < rest.size(); ++i)
            changed +=
                !(rest[i] == pages_.values[i] || (is_nan(rest[i]) && is_nan(pages_.values[i])));
        CHECK(changed == 0);
    }

    std::size_t rows() const { return rows_.size(); }
    std::size_t ldz() const { return uz((c_.H * c_.hd + 7) / 8 * 8 + 8); }
    // Keys and values that row r wrote into the cache.
    Floats written(std::size_t r) const {
        Floats out;
        for (const std::size_t at : places(r)) {
            const Floats one = d_pages_->read(at, uz(HD_));
            out.insert(out.end(), one.begin(), one.end());
        }
        return out;
    }

private:
    static constexpr std::size_t kLdX = 128;
    static constexpr int kD = 120;
    static int count() { return static_cast<int>(std::size(kContexts)); }
    static int longest() { return quick() ? 300 : kContexts[std::size(kContexts) - 1]; }
    static int context(int i) { return std::min(kContexts[i], longest()); }
    static double rounded(double v) { return double{round_to(DType::bf16, static_cast<float>(v))}; }
    void put(std::size_t at, const Floats& x) {
        std::copy(x.begin(), x.end(), pages_.values.begin() + static_cast<std::ptrdiff_t>(at));
        std::fill_n(pages_.values.begin() + static_cast<std::ptrdiff_t>(at + x.size()),
                    uz(HD_) - x.size(), 0.0f);
    }
    std::vector<std::size_t> places(std::size_t r) const {
        std::vector<std::size_t> out;
        for (int head = 0; head < c_.K && rows_[r].slot >= 0; ++head) {
            out.push_back(pages_.key(rows_[r].slot, head, rows_[r].pos));
            out.push_back(pages_.value(rows_[r].slot, head, rows_[r].pos));
        }
        return out;
    }
    // The new key and value of one row and head, compared with what the kernel left in the cache.
    void remember(std::size_t r, int head, Pages& after, const Floats& cache, Floats& rest,
                  Distance& off_k, Distance& off_v) const {
        const std::size_t hd = uz(c_.hd);
        const cuda::RowInfo& row = rows_[r];
        const std::size_t k = pages_.key(row.slot, head, row.pos),
                          v = pages_.value(row.slot, head, row.pos);
        const float* const in = &qkv_[r * ld_];
        const Doubles key = rotation_(in + uz(c_.H + head) * hd, row.pos);
        double sum = 0;
        for (std::size_t i = 0; i < kLdX / 16; ++i) sum += double{squares_[r * kLdX / 16 + i]};
        Doubles h, value;
        for (std::size_t j = 0; j < 32; ++j)
            h.push_back(double{xb_[r * kLdX + j]} / std::sqrt(sum / kD + 0x1p-23));
        const double gate = c_.channels > 0 ? embed_.gate_of(head, h) : 0;
        for (std::size_t j = 0; j < hd; ++j) {
            value.push_back(double{in[uz(c_.H + c_.K + head) * hd + j]});
            if (c_.channels > 0) value.back() += gate * embed_.at(row.id, head, j);
        }
        off_k.add<double>(std::span(cache).subspan(k, hd), key);
        off_v.add<double>(std::span(cache).subspan(v, hd), value);
        for (std::size_t j = 0; j < uz(HD_); ++j) {
            after.values[k + j] = j < hd ? static_cast<float>(rounded(key[j])) : 0;
            after.values[v + j] = j < hd ? static_cast<float>(rounded(value[j])) : 0;
            if (j >= hd) CHECK((cache[k + j] == 0 && cache[v + j] == 0));
            rest[k + j] = pages_.values[k + j], rest[v + j] = pages_.values[v + j];
        }
    }

    HeadCase c_;
    int window_, HD_;
    Rotation rotation_;
    ValueEmbed embed_;
    Pages pages_;
    std::size_t ld_;
    std::vector<cuda::RowInfo> rows_;
    Floats qkv_, xb_, squares_;
    std::optional<Array<bf16>> d_pages_;
};

}  // namespace

TEST_CASE("cuda kernels: decode attention, all windows; a row's bits are those it has alone") {
    if (no_gpu()) return;
    Random random(13);
    for (const HeadCase& c : kHeads) {
        CAPTURE(c.hd);
        CAPTURE(c.H);
        for (const int window : kWindows) {
            if (quick() && random.below(3) != 0) continue;
            CAPTURE(window);
            const Decode d(c, window, random);
            const Floats all = d.run(0, d.rows());
            d.check(all);
            CHECK(same_bits(d.run(0, d.rows()), all));
            for (std::size_t r = 0; r + 1 < d.rows(); ++r) {
                const Floats together = d.written(r), alone = d.run(r, 1);
                CHECK(same_bits(alone, std::span(all).subspan(r * d.ldz(), d.ldz())));
                CHECK(same_bits(d.written(r), together));
            }
        }
    }
}

// ==== logits =====================================================================================

namespace {

enum class Kind { normal, ties, gaps, few, equal, zeros, nothing };

Floats some_logits(Kind kind, std::size_t V, Random& random) {
    Floats out(V);
    for (float& x : out) {
        const float normal =
            random.uniform() + random.uniform() + random.uniform() + random.uniform() - 2;
        x = 6 * normal;
        if (kind == Kind::ties) x = std::round(2 * normal);
        if (kind == Kind::gaps && random.below(3) == 0) {
            const float bad[] = {kNaN, -kNaN, kInfinity, -kInfinity};
            x = bad[random.below(4)];
        }
        if (kind == Kind::few && random.below(V) > 2) x = -kInfinity;
        if (kind == Kind::equal) x = -3.25f;
        if (kind == Kind::zeros) x = random.below(2) == 0 ? 0.0f : -0.0f;
        if (kind == Kind::nothing) x = random.below(2) == 0 ? kNaN : kInfinity;
    }
    return out;
}

struct Drawn {
    std::vector<int> tokens;
    std::vector<cuda::RowInfo> rows;
};
Drawn draw(const Floats& logits, int V, int ld, const std::vector<cuda::Draw>& draws,
           const std::vector<cuda::RowInfo>& rows, int bigram_mod) {
    const Array<float> d_logits(logits);
    const Array<cuda::Draw> d_draws(draws);
    const Array<cuda::RowInfo> d_rows(rows);
    const Array<int> tokens(draws.size());
    cuda::DrawArgs a{};
    a.logits = d_logits.get(), a.V = V, a.ld = ld, a.draws = d_draws.get();
    a.rows = d_rows.get(), a.tokens = tokens.get(), a.bigram_mod = bigram_mod;
    cuda::draw(device(), a, static_cast<int>(draws.size()));
    return {tokens.raw(), d_rows.raw()};
}

struct DrawCase {
    Kind kind;
    int V;
    float temperature;
    int top_k;
    float top_p;
};

// Draws of 64 rows of logits, so many times; how many were not the sampler's.
std::size_t wrong_draws(const DrawCase& c, int times, Random& random) {
    const std::size_t R = 64, V = uz(c.V), ld = V + 5;
    Floats logits;
    for (std::size_t r = 0; r < R; ++r) {
        const Floats one = some_logits(c.kind, V, random);
        logits.insert(logits.end(), one.begin(), one.end());
    }
    const Floats padded = spread(logits, R, V, ld, 1e30f);  // what is beyond must not be drawn
    std::vector<Sampler> samplers;
    for (std::size_t r = 0; r < R; ++r)
        samplers.emplace_back(nanogpt::SamplingParams{c.temperature, c.top_k, c.top_p, 7}, r);
    std::size_t wrong = 0;
    for (int n = 0; n < times; ++n) {
        std::vector<cuda::Draw> draws;
        std::vector<cuda::RowInfo> rows(R);
        for (std::size_t r = 0; r < R; ++r) {
            draws.push_back({samplers[r].uniform(), c.temperature, c.top_p, c.top_k});
            rows[r].id = static_cast<int>(random.below(V));
            rows[r].pos = static_cast<int>(random.below(1000));
            rows[r].slot = r % 5 == 4 ? -1 : static_cast<int>(r);
            rows[r].bigram = 3;
        }
        const int mod = n % 2 == 0 ? 5 * c.V - 1 : 0;
        const Drawn got = draw(padded, c.V, static_cast<int>(ld), draws, rows, mod);
        for (std::size_t r = 0; r < R; ++r) {
            int want = -1;
            try {
                want = samplers[r].sample(std::span(logits).subspan(r * V, V));
            } catch (const nanogpt::Error&) {
            }
            wrong += got.tokens[r] != want;
            cuda::RowInfo next = rows[r];
            if (next.slot >= 0 && want >= 0) {
                const nanogpt::detail::Row row{want, rows[r].id, rows[r].pos + 1};
                next.previous = rows[r].id, next.id = want, ++next.pos;
                next.bigram = mod > 0 ? static_cast<int>(nanogpt::detail::bigram_row(row, c.V)) : 0;
            }
            const cuda::RowInfo& is = got.rows[r];
            wrong += is.id != next.id || is.previous != next.previous || is.pos != next.pos ||
                     is.slot != next.slot || is.bigram != next.bigram;
        }
    }
    return wrong;
}

}  // namespace

TEST_CASE(
    "cuda kernels: draws are the sampler's, at any temperature and cut, whatever the logits") {
    if (no_gpu()) return;
    Random random(15);
    std::size_t draws = 0;
    const int times = quick() ? 1 : 5;
    for (const Kind kind :
         {Kind::normal, Kind::ties, Kind::gaps, Kind::few, Kind::equal, Kind::nothing}) {
        CAPTURE(static_cast<int>(kind));
        for (const int V : {1, 2, 70, 515, 1024, 4099}) {
            if (quick() && V > 600) break;
            CAPTURE(V);
            for (const float temperature : {0.0f, 1e-3f, 0.5f, 1.0f, 1000.0f}) {
                CAPTURE(temperature);
                for (const int top_k : {1, 2, 3, 17, 50, 127, 128}) {
                    if (quick() && random.below(12) != 0) continue;
                    CAPTURE(top_k);
                    const float top_p = random.below(2) == 0 ? 1 : random.uniform() * 0.99f + 1e-3f;
                    CAPTURE(top_p);
                    CHECK(wrong_draws({kind, V, temperature, top_k, top_p}, times, random) == 0);
                    draws += 64 * uz(times);
                }
            }
        }
    }
    CHECK(wrong_draws({Kind::normal, 65536, 1, 50, 1}, 2, random) == 0);
    CHECK(wrong_draws({Kind::normal, 32768, 0, 50, 1}, 2, random) == 0);
    std::printf("cuda draw: %zu draws of the kernel compared with the sampler's\n", draws);
}

TEST_CASE("cuda kernels: to a draw, minus zero is as good as zero") {
    if (no_gpu()) return;
    Random random(16);
    for (const float temperature : {0.0f, 1.0f})
        for (const int top_k : {1, 3, 50})
            CHECK(wrong_draws({Kind::zeros, 200, temperature, top_k, 1}, 3, random) == 0);
}

TEST_CASE("cuda kernels: all draws follow the softmax that is left, also at its ends") {
    if (no_gpu()) return;
    // uniform numbers at both ends of [0, 1) never leave the candidates
    const Floats logits{0, 1, 2, kNaN, 2, -5, kInfinity, 1};
    for (const double u : {0.0, 0x1p-53, 0.5, 1 - 0x1p-53}) {
        for (const int top_k : {2, 3, 5, 8, 100}) {
            const Drawn got =
                draw(logits, 8, 8, {{u, 1, 1, top_k}}, {cuda::RowInfo{1, -1, 0, 0, 0}}, 0);
            CHECK(got.tokens[0] >= 0);
            CHECK(is_finite(logits[uz(std::max(got.tokens[0], 0))]));
            if (u == 0) CHECK(got.tokens[0] == 2);
        }
    }
}
