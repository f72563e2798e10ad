// The model: a second, slow implementation to compare with, and the properties that hold bit for bit.
#include <cmath>  // sqrt, exp, tanh, pow, cos, sin

#include "helpers.hpp"

using namespace test;
using nanogpt::Activation;
using nanogpt::Config;
using nanogpt::HookPoint;
using nanogpt::KVCache;
using nanogpt::LoadOptions;
using nanogpt::Model;
using nanogpt::Token;

namespace {

// ---- the reference: loops in float64, straight from the formulas

using Vector = std::vector<double>;
using Record = std::function<void(HookPoint, int layer, const Vector&)>;

class Reference {
public:
    Reference(const Config& config, std::span<const NamedTensor> weights)
        : c_(config), weights_(weights) {}

    // Logits (T, V) of all positions; `record` sees every activation that a hook point has.
    Vector forward(std::span<const Token> ids, const Record& record) {
        ids_ = ids;
        T = ids.size();
        x_ = lookup("transformer.wte.weight", D);
        record(HookPoint::embed, -1, x_);
        x_ = norm(x_, D);
        record(HookPoint::embed_norm, -1, x_);
        if (is(nanogpt::Generation::g4)) smear(record);
        const Vector x0 = x_;
        Vector middle;
        for (int i = 0; i < c_.n_layer; ++i) {
            block(i, x0, record);
            if (i == c_.n_layer / 2) middle = x_;
        }
        if (is(nanogpt::Generation::g4)) {
            const double lambda = w("backout_lambda")[0];
            for (std::size_t j = 0; j < x_.size(); ++j) x_[j] -= lambda * middle[j];
            record(HookPoint::backout, -1, x_);
        }
        x_ = norm(x_, D);
        record(HookPoint::final_norm, -1, x_);
        Vector logits = linear(x_, w("lm_head.weight"), D, V);
        record(HookPoint::logits_raw, -1, logits);
        const double cap = double{c_.softcap};
        for (double& l : logits) l = cap * std::tanh(l / cap);
        record(HookPoint::logits, -1, logits);
        return logits;
    }

private:
    bool is(nanogpt::Generation g) const { return c_.generation == g; }
    std::span<const float> find(const std::string& name) const {
        for (const NamedTensor& t : weights_) {
            if (t.name == name) return t.values;
        }
        throw std::runtime_error("no weight " + name);
    }
    Vector w(const std::string& name) const {
        const auto values = find(name);
        return {values.begin(), values.end()};
    }
    Vector lookup(const std::string& name, std::size_t width) const {  // rows of the ids
        const Vector table = w(name);
        Vector out;
        for (const Token id : ids_) {
            const std::size_t row = static_cast<std::size_t>(id) * width;
            for (std::size_t j = 0; j < width; ++j) out.push_back(table[row + j]);
        }
        return out;
    }
    // x (rows, in) -> y (rows, out), with the first `out` rows of the weight
    static Vector linear(const Vector& x, const Vector& weight, std::size_t in, std::size_t out) {
        Vector y;
        for (std::size_t t = 0; t < x.size() / in; ++t) {
            for (std::size_t o = 0; o < out; ++o) {
                double sum = 0;
                for (std::size_t j = 0; j < in; ++j) sum += weight[o * in + j] * x[t * in + j];
                y.push_back(sum);
            }
        }
        return y;
    }
    static Vector norm(Vector x, std::size_t width) {
        for (std::size_t t = 0; t < x.size() / width; ++t) {
            double squares = 0;
            for (std::size_t j = 0; j < width; ++j) squares += x[t * width + j] * x[t * width + j];
            const double scale = 1 / std::sqrt(squares / double(width) + 0x1p-23);
            for (std::size_t j = 0; j < width; ++j) x[t * width + j] *= scale;
        }
        return x;
    }
    static double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

    void smear(const Record& record) {
        const Vector gate = w("smear_gate.weight"), before = x_;
        const double lambda = w("smear_lambda")[0];
        for (std::size_t t = 1; t < T; ++t) {
            double dot = 0;
            for (std::size_t j = 0; j < 24; ++j) dot += gate[j] * before[t * D + j];
            for (std::size_t j = 0; j < D; ++j) {
                x_[t * D + j] += lambda * sigmoid(dot) * before[(t - 1) * D + j];
            }
        }
        record(HookPoint::smear, -1, x_);
    }

    void mix(int i, const Vector& x0) {
        const auto n = static_cast<std::size_t>(i);
        const double r = w("resid_lambdas")[n], z = w("x0_lambdas")[n];
        for (std::size_t j = 0; j < x_.size(); ++j) x_[j] = r * x_[j] + z * x0[j];
        if (!is(nanogpt::Generation::g2e)) return;
        const Vector table = w("bigram_embed.embed.weight");
        const double b = w("bigram_lambdas")[n];
        const std::int64_t last = 5 * std::int64_t{c_.vocab_size} - 1;
        for (std::size_t t = 0; t < T; ++t) {
            std::int64_t row = last;
            if (t > 0) {  // small ids: no overflow of 32 bits
                row =
                    ((36313 * std::int64_t{ids_[t]}) ^ (27191 * std::int64_t{ids_[t - 1]})) % last;
            }
            for (std::size_t j = 0; j < D; ++j) {
                x_[t * D + j] += b * table[static_cast<std::size_t>(row) * D + j];
            }
        }
    }

    void rotate(Vector& x, std::size_t heads) const {
        for (std::size_t t = 0; t < T; ++t) {
            for (std::size_t h = 0; h < heads; ++h) {
                double* row = &x[(t * heads + h) * hd];
                for (std::size_t j = 0; j < hd / 2; ++j) {
                    const float f = 1 / std::pow(c_.rope_base, float(2 * j) / float(hd));
                    const double angle = double{float(t) * f};
                    double cos = std::cos(angle), sin = std::sin(angle);
                    if (c_.bf16_rope_tables) {
                        cos = double{round_to(DType::bf16, float(cos))};
                        sin = double{round_to(DType::bf16, float(sin))};
                    }
                    const double a = row[j], b = row[j + hd / 2];
                    row[j] = a * cos + b * sin;
                    row[j + hd / 2] = -a * sin + b * cos;
                }
            }
        }
        x = norm(x, hd);
        for (double& value : x) value *= double{c_.qk_scale};
    }

    void value_embedding(int i, const Vector& h, Vector& v, const Record& record) const {
        const std::string layer = std::to_string(i);
        const Vector embed = lookup("value_embeds." + layer + ".weight", K * hd);
        const Vector gates = w("transformer.h." + layer + ".attn.ve_gate.weight");
        const auto c = static_cast<std::size_t>(c_.ve_gate_channels);
        Vector shown;
        for (std::size_t t = 0; t < T; ++t) {
            for (std::size_t k = 0; k < K; ++k) {
                double dot = 0;
                for (std::size_t j = 0; j < c; ++j) dot += gates[k * c + j] * h[t * D + j];
                shown.push_back(double{c_.ve_gate_scale} * sigmoid(dot));
                const std::size_t at = (t * K + k) * hd;
                for (std::size_t j = 0; j < hd; ++j) v[at + j] += shown.back() * embed[at + j];
            }
        }
        record(HookPoint::ve_gate, i, shown);
    }

    Vector attention(int i, const Vector& q, const Vector& k, const Vector& v,
                     const Record& record) const {
        Vector z(T * D), pattern(H * T * T);
        for (std::size_t h = 0; h < H; ++h) {
            const std::size_t kv = h / (H / K);
            for (std::size_t t = 0; t < T; ++t) {
                double* p = &pattern[(h * T + t) * T];
                double sum = 0;
                for (std::size_t s = 0; s <= t; ++s) {
                    if (t - s > static_cast<std::size_t>(c_.window(i))) continue;
                    double dot = 0;
                    for (std::size_t j = 0; j < hd; ++j) {
                        dot += q[(t * H + h) * hd + j] * k[(s * K + kv) * hd + j];
                    }
                    sum += p[s] = std::exp(dot / std::sqrt(double(hd)));
                }
                for (std::size_t s = 0; s <= t; ++s) {
                    p[s] /= sum;
                    for (std::size_t j = 0; j < hd; ++j) {
                        z[(t * H + h) * hd + j] += p[s] * v[(s * K + kv) * hd + j];
                    }
                }
            }
        }
        record(HookPoint::pattern, i, pattern);
        return z;
    }

    void add(const Vector& y) {
        for (std::size_t j = 0; j < y.size(); ++j) x_[j] += y[j];
    }

    void block(int i, const Vector& x0, const Record& record) {
        const std::string name = "transformer.h." + std::to_string(i) + ".";
        if (c_.generation != nanogpt::Generation::g0) mix(i, x0);
        record(HookPoint::resid_pre, i, x_);
        Vector h = norm(x_, D);
        record(HookPoint::attn_in, i, h);
        Vector q = linear(h, w(name + "attn.c_q.weight"), D, D);
        Vector k = linear(h, w(name + "attn.c_k.weight"), D, K * hd);
        Vector v = linear(h, w(name + "attn.c_v.weight"), D, K * hd);
        record(HookPoint::q, i, q);
        record(HookPoint::k, i, k);
        const bool every_other = i % 2 == (c_.n_layer - 1) % 2;
        if (c_.generation >= nanogpt::Generation::g2 && every_other)
            value_embedding(i, h, v, record);
        record(HookPoint::v, i, v);
        rotate(q, H);
        rotate(k, K);
        record(HookPoint::rot_q, i, q);
        record(HookPoint::rot_k, i, k);
        const Vector z = attention(i, q, k, v, record);
        record(HookPoint::z, i, z);
        Vector y = linear(z, w(name + "attn.c_proj.weight"), D, D);
        record(HookPoint::attn_out, i, y);
        add(y);
        record(HookPoint::resid_mid, i, x_);
        h = norm(x_, D);
        record(HookPoint::mlp_in, i, h);
        Vector m = linear(h, w(name + "mlp.c_fc.weight"), D, 4 * D);
        record(HookPoint::mlp_pre, i, m);
        for (double& value : m) value = value > 0 ? value * value : 0;
        record(HookPoint::mlp_post, i, m);
        y = linear(m, w(name + "mlp.c_proj.weight"), 4 * D, D);
        record(HookPoint::mlp_out, i, y);
        add(y);
        record(HookPoint::resid_post, i, x_);
    }

    const Config& c_;
    std::span<const NamedTensor> weights_;
    std::span<const Token> ids_;
    Vector x_;  // (T, D), the residual stream
    std::size_t T = 0;
    const std::size_t D = std::size_t(c_.n_embd), H = std::size_t(c_.n_head);
    const std::size_t K = std::size_t(c_.n_kv_head), hd = D / H, V = std::size_t(c_.vocab_size);
};

// ---- models and inputs

std::shared_ptr<const Model> load(Gen gen, const Shape& shape, LoadOptions options = {},
                                  Save save = Save::f32) {
    TempDir dir;
    if (options.threads == 0) options.threads = 2;
    return nanogpt::load_model(make_checkpoint(dir.path(), gen, shape, save), options);
}

std::vector<Token> ids_of(const Shape& shape, int T, std::uint64_t seed = 1) {
    Random random(seed);
    std::vector<Token> ids;
    for (int t = 0; t < T; ++t) {
        ids.push_back(static_cast<Token>(random.below(static_cast<std::size_t>(shape.vocab_size))));
    }
    return ids;
}

// The logits after the last token, read in pieces of these lengths (the last one is repeated).
std::vector<float> read_in_pieces(const Model& model, std::span<const Token> ids,
                                  const std::vector<std::size_t>& pieces) {
    KVCache cache(model, static_cast<int>(ids.size()));
    std::vector<float> out;
    for (std::size_t at = 0, i = 0; at < ids.size(); ++i) {
        const std::size_t n = std::min(pieces[std::min(i, pieces.size() - 1)], ids.size() - at);
        const auto logits = nanogpt::forward(model, cache, ids.subspan(at, n));
        out.assign(logits.begin(), logits.end());
        at += n;
    }
    return out;
}

struct Shown {
    HookPoint point;
    int layer, pos;
    std::vector<int> shape;
    std::vector<float> values;
};
struct Watch : nanogpt::Observer {
    void on(const Activation& a) override {
        shown.push_back({a.point,
                         a.layer,
                         a.pos,
                         {a.shape.begin(), a.shape.end()},
                         {a.values.begin(), a.values.end()}});
    }
    const Shown* find(HookPoint point, int layer) const {
        for (const Shown& s : shown) {
            if (s.point == point && s.layer == layer) return &s;
        }
        return nullptr;
    }
    std::vector<Shown> shown;
};

// How far `got` is from `want`, as a share of the largest value wanted (at least 1).
double relative(const std::vector<float>& got, const Vector& want) {
    if (got.size() != want.size()) return std::numeric_limits<double>::infinity();
    double largest = 1, worst = 0;
    for (const double x : want) largest = std::max(largest, std::abs(x));
    for (std::size_t i = 0; i < got.size(); ++i) {
        if (!is_finite(got[i])) return std::numeric_limits<double>::infinity();
        worst = std::max(worst, std::abs(double{got[i]} - want[i]));
    }
    return worst / largest;
}

// The largest share over all hook points of all layers, and how many activations were compared.
std::pair<double, std::size_t> against_reference(Gen gen, const Shape& shape, int T,
                                                 const LoadOptions& options = {},
                                                 Save save = Save::f32) {
    const auto model = load(gen, shape, options, save);
    const std::vector<NamedTensor> weights = make_weights(gen, shape, save);
    const std::vector<Token> ids = ids_of(shape, T);
    KVCache cache(*model, T);
    Watch watch;
    nanogpt::forward(*model, cache, ids, &watch);
    double worst = 0;
    std::size_t compared = 0;
    Reference(model->config(), weights)
        .forward(ids, [&](HookPoint point, int layer, const Vector& want) {
            const Shown* s = watch.find(point, layer);
            CHECK_MESSAGE(s != nullptr, name(point, layer));
            if (s == nullptr) return;
            const double d = relative(s->values, want);
            CHECK_MESSAGE(d <= 1e-4, name(point, layer), " differs by ", d);
            worst = std::max(worst, d);
            ++compared;
        });
    return {worst, compared};
}

const Shape kOdd[] = {
    // S, V, L, H, K, D, pattern
    {24, 71, 3, 4, 2, 40, "SL"},    // head size 10
    {16, 66, 5, 3, 1, 36, "SSL"},   // head size 12
    {40, 129, 1, 6, 6, 36, "S"},    // one layer, head size 6
    {64, 300, 2, 1, 1, 48, "SL"},   // one head of 48
    {9, 65, 4, 16, 4, 32, "SSSL"},  // heads of 2
};

}  // namespace

TEST_CASE(
    "model: every activation agrees with a float64 reference, in all generations, at odd shapes") {
    for (const Gen gen : kAllGenerations) {
        double worst = 0;
        std::size_t compared = 0;
        for (const Shape& shape : kOdd) {
            for (const int T : {1, 2, 29, 67}) {
                if (quick() && T == 67) continue;
                CAPTURE(std::string(name_of(gen)));
                CAPTURE(shape.n_embd);
                CAPTURE(T);
                LoadOptions options;
                options.overrides.short_window = 7;
                if (gen == Gen::g0 || gen == Gen::g0p) options.overrides.short_window.reset();
                const auto [d, n] = against_reference(gen, shape, T, options);
                worst = std::max(worst, d);
                compared += n;
            }
        }
        std::printf("reference %-3s %zu activations, largest relative difference %.1e\n",
                    name_of(gen), compared, worst);
    }
}

TEST_CASE("model: saved as bfloat16 or float16, the values of the file are what is computed with") {
    for (const Save save : {Save::bf16, Save::f16, Save::trained}) {
        for (const Gen gen : {Gen::g0, Gen::g2, Gen::g4})
            against_reference(gen, kOdd[0], 20, {}, save);
    }
}

TEST_CASE("model: rotary tables, soft cap, base and scale can be overridden") {
    LoadOptions options;
    options.overrides.bf16_rope_tables = true;
    options.overrides.softcap = 20.0f;
    options.overrides.rope_base = 500.0f;
    options.overrides.qk_scale = 0.8f;
    options.overrides.window_pattern = "SSSSL";
    against_reference(Gen::g4, kOdd[0], 40, options);
}

TEST_CASE("model: a key is seen up to the window and not one position further") {
    for (const int left : {1, 5, 63, 64, 65}) {
        const int T = std::min(left + 3, 68);
        LoadOptions options;
        options.overrides.short_window = left;
        options.overrides.sequence_len = 66;  // also the window of a full layer
        const auto model = load(Gen::g4, kTiny, options);
        KVCache cache(*model, T + 4);
        Watch watch;
        nanogpt::forward(*model, cache, ids_of(kTiny, T), &watch);
        for (int step = 0; step < 2; ++step) {  // then one token of a decode step
            for (int layer = 0; layer < 2; ++layer) {
                const Shown* s = watch.find(HookPoint::pattern, layer);
                REQUIRE(s != nullptr);
                const int rows = s->shape[1], keys = s->shape[2], window = layer == 0 ? left : 66;
                int wrong = 0;
                for (int i = 0; i < 4 * rows * keys; ++i) {
                    const int t = s->pos + i / keys % rows, key = i % keys;
                    const bool seen = key <= t && t - key <= window;
                    const float p = s->values[static_cast<std::size_t>(i)];
                    wrong += seen ? !(p > 0) : p != 0;
                }
                CHECK(wrong == 0);
            }
            watch.shown.clear();
            const Token next[] = {3};
            nanogpt::forward(*model, cache, next, &watch);
        }
    }
}

TEST_CASE("model: G0 has no window, the others slide over the context they were trained for") {
    Shape shape = kOdd[4];  // S = 9
    const std::vector<Token> ids = ids_of(shape, 40);
    for (const Gen gen : {Gen::g0, Gen::g1, Gen::g4}) {
        shape.window_pattern = "L";
        const auto model = load(gen, shape);
        KVCache cache(*model, 40);
        Watch watch;
        nanogpt::forward(*model, cache, ids, &watch);
        const Shown* s = watch.find(HookPoint::pattern, 0);
        REQUIRE(s != nullptr);
        const float first_key = s->values[39 * 40], left = s->values[39 * 40 + 30],
                    beyond = s->values[39 * 40 + 29];
        CHECK(left > 0);
        CHECK((beyond > 0) == (gen == Gen::g0));
        CHECK((first_key > 0) == (gen == Gen::g0));
    }
}

TEST_CASE("model: a prompt cut anywhere gives the same logits, bit for bit") {
    for (const Gen gen : {Gen::g1, Gen::g2e, Gen::g4}) {
        const auto model = load(gen, kTiny);
        const std::vector<Token> ids = ids_of(kTiny, 70);
        const std::vector<float> want = read_in_pieces(*model, ids, {70});
        for (std::size_t cut = 1; cut < 70; cut += quick() ? 9u : 1u) {
            CAPTURE(cut);
            CHECK(same_bits(read_in_pieces(*model, ids, {cut, 70 - cut}), want));
        }
    }
}

TEST_CASE(
    "model: pieces of 1, 7 and 64 tokens give the same logits, bit for bit, in all generations") {
    const std::vector<Token> ids = ids_of(kTiny, quick() ? 70 : 200);
    for (const Gen gen : kAllGenerations) {
        CAPTURE(std::string(name_of(gen)));
        const auto model = load(gen, kTiny);
        const std::vector<float> want = read_in_pieces(*model, ids, {ids.size()});
        for (const std::size_t piece : {1u, 7u, 64u}) {
            CHECK(same_bits(read_in_pieces(*model, ids, {piece}), want));
        }
    }
}

TEST_CASE("model: 1, 2, 3 and 5 threads give the same logits, bit for bit") {
    const std::vector<Token> ids = ids_of(kTiny, 130);
    for (const Gen gen : {Gen::g2, Gen::g4}) {
        std::vector<float> want;
        for (const int threads : {1, 2, 3, 5}) {
            CAPTURE(threads);
            LoadOptions options;
            options.threads = threads;
            const auto model = load(gen, kTiny, options);
            CHECK(model->pool().size() == threads);
            for (const std::size_t piece : {130u, 33u, 1u}) {
                const std::vector<float> got = read_in_pieces(*model, ids, {piece});
                if (want.empty()) want = got;
                CHECK(same_bits(got, want));
            }
        }
    }
}

TEST_CASE("model: sequences in one batch get what each gets alone, bit for bit") {
    for (const Gen gen : {Gen::g0, Gen::g2e, Gen::g4}) {
        const auto backend = nanogpt::open_cpu(load(gen, kTiny));
        const std::size_t V = 512;
        const std::size_t lengths[] = {1, 33, 5, 64, 2, 1, 17};
        std::vector<std::unique_ptr<nanogpt::Sequence>> together, alone;
        for (std::size_t i = 0; i < std::size(lengths); ++i) {
            together.push_back(backend->new_sequence(100));
            alone.push_back(backend->new_sequence(100));
        }
        for (std::uint64_t step = 0; step < 3; ++step) {  // prompts, then mixed, then single tokens
            std::vector<std::vector<Token>> ids;
            for (std::size_t i = 0; i < std::size(lengths); ++i) {
                const std::size_t n = step == 0 || (step == 1 && i % 2 == 0) ? lengths[i] : 1;
                ids.push_back(
                    ids_of(kTiny, static_cast<int>(std::min<std::size_t>(n, 30)), 10 * step + i));
            }
            std::vector<nanogpt::Chunk> batch;
            for (std::size_t i = 0; i < ids.size(); ++i)
                batch.push_back({together[i].get(), ids[i]});
            const auto logits = backend->step(batch);
            const std::vector<float> all(logits.begin(), logits.end());
            REQUIRE(all.size() == ids.size() * V);
            for (std::size_t i = 0; i < ids.size(); ++i) {
                const nanogpt::Chunk chunk{alone[i].get(), ids[i]};
                CHECK(same_bits(std::span(all).subspan(i * V, V), backend->step({&chunk, 1})));
            }
        }
    }
}

TEST_CASE("model: a batch of 40 sequences equals 40 single steps, bit for bit") {
    const auto backend = nanogpt::open_cpu(load(Gen::g4, kTiny));
    std::vector<std::unique_ptr<nanogpt::Sequence>> sequences;
    std::vector<std::vector<Token>> ids;
    std::vector<nanogpt::Chunk> batch;
    for (std::uint64_t i = 0; i < 40; ++i) {
        sequences.push_back(backend->new_sequence(20));
        ids.push_back(ids_of(kTiny, 1 + static_cast<int>(i % 3), i));
    }
    for (std::size_t i = 0; i < 40; ++i) batch.push_back({sequences[i].get(), ids[i]});
    const auto logits = backend->step(batch);
    const std::vector<float> all(logits.begin(), logits.end());
    for (std::size_t i = 0; i < 40; ++i) {
        const auto one = backend->new_sequence(20);
        const nanogpt::Chunk chunk{one.get(), ids[i]};
        CHECK(same_bits(std::span(all).subspan(i * 512, 512), backend->step({&chunk, 1})));
    }
}

TEST_CASE("model: an observer changes nothing, bit for bit") {
    for (const Gen gen : kAllGenerations) {
        CAPTURE(std::string(name_of(gen)));
        const auto model = load(gen, kTiny);
        const std::vector<Token> ids = ids_of(kTiny, 80);
        KVCache off(*model, 90), on(*model, 90);
        Watch watch;
        const auto plain = nanogpt::forward(*model, off, ids);
        CHECK(same_bits(nanogpt::forward(*model, on, ids, &watch), plain));
        const Token next[] = {7};
        const auto step = nanogpt::forward(*model, off, next);
        CHECK(same_bits(nanogpt::forward(*model, on, next, &watch), step));
    }
}

TEST_CASE("model: rewinding and replaying is exact") {
    for (const Gen gen : {Gen::g0, Gen::g2e, Gen::g4}) {
        const auto model = load(gen, kTiny);
        const std::vector<Token> ids = ids_of(kTiny, 60), other = ids_of(kTiny, 30, 2);
        const std::vector<float> want = read_in_pieces(*model, ids, {60});
        KVCache cache(*model, 60);
        nanogpt::forward(*model, cache, ids);
        for (const int length : {59, 30, 1, 0}) {
            cache.rewind(length);
            nanogpt::forward(*model, cache,
                             std::span(other).first(1));  // something else in its place
            cache.rewind(length);
            CHECK(cache.length() == length);
            const auto rest = std::span(ids).subspan(static_cast<std::size_t>(length));
            CHECK(same_bits(nanogpt::forward(*model, cache, rest), want));
        }
        CHECK(error_of([&] { cache.rewind(61); }) != "");
        CHECK(error_of([&] { cache.rewind(-1); }) != "");
        CHECK(cache.length() == 60);
    }
}

TEST_CASE("model: a sequence may be given tokens of its own") {
    const auto model = load(Gen::g4, kTiny);
    std::vector<Token> ids = ids_of(kTiny, 10);
    KVCache cache(*model, 20);
    nanogpt::forward(*model, cache, ids);
    const auto logits = nanogpt::forward(*model, cache, cache.tokens().subspan(2, 3));
    ids.insert(ids.end(), {ids[2], ids[3], ids[4]});
    CHECK(same_bits(logits, read_in_pieces(*model, ids, {13})));
    CHECK(std::ranges::equal(cache.tokens(), ids));
}

TEST_CASE("model: a call that makes no sense is refused and leaves the cache as it was") {
    const auto model = load(Gen::g4, kTiny);
    const std::vector<Token> ids = ids_of(kTiny, 10);
    const std::vector<float> want = read_in_pieces(*model, ids, {10});
    KVCache cache(*model, 10);
    nanogpt::forward(*model, cache, std::span(ids).first(5));
    const auto refused = [&](const std::vector<Token>& tokens, const std::string& reason) {
        const std::string why = error_of([&] { nanogpt::forward(*model, cache, tokens); });
        CHECK_MESSAGE(contains(why, reason), "refused with: ", why);
        CHECK(cache.length() == 5);
    };
    refused({}, "at least one token");
    refused({1, 512}, "token 512");
    refused({-1}, "token -1");
    refused({INT32_MAX}, "outside the vocabulary");
    refused(std::vector<Token>(6, 1), "room for 10");
    CHECK(same_bits(nanogpt::forward(*model, cache, std::span(ids).subspan(5)), want));
    CHECK(error_of([&] { KVCache(*model, 0); }) != "");
    CHECK(error_of([&] { KVCache(*model, -3); }) != "");
    CHECK(error_of([&] { nanogpt::open_cpu(nullptr); }) != "");
}

TEST_CASE("model: a sequence twice in a batch, or of another backend, is refused") {
    const auto backend = nanogpt::open_cpu(load(Gen::g4, kTiny));
    const auto sequence = backend->new_sequence(10);
    struct Stranger : nanogpt::Sequence {
        std::span<const Token> tokens() const override { return {}; }
        int capacity() const override { return 10; }
        void rewind(int) override {}
    } stranger;
    const Token ids[] = {1, 2};
    const nanogpt::Chunk twice[] = {{sequence.get(), ids}, {sequence.get(), ids}};
    const nanogpt::Chunk strange[] = {{sequence.get(), ids}, {&stranger, ids}};
    CHECK(contains(error_of([&] { backend->step(twice); }), "twice"));
    CHECK(contains(error_of([&] { backend->step(strange); }), "another backend"));
    const auto other = nanogpt::open_cpu(load(Gen::g4, kTiny))->new_sequence(10);
    const nanogpt::Chunk alien[] = {{sequence.get(), ids}, {other.get(), ids}};
    CHECK(contains(error_of([&] { backend->step(alien); }), "another model"));
    CHECK(sequence->tokens().empty());
}

TEST_CASE("model: every hook point has its shape, and generations without a point never call it") {
    const int T = 6, past = 3;
    for (const Gen gen : kAllGenerations) {
        CAPTURE(std::string(name_of(gen)));
        const auto model = load(gen, kTiny);
        KVCache cache(*model, 20);
        nanogpt::forward(*model, cache, ids_of(kTiny, past));
        Watch watch;
        nanogpt::forward(*model, cache, ids_of(kTiny, T), &watch);
        std::size_t expected = 0;
        const auto has = [&](HookPoint point, int layer, const std::vector<int>& shape) {
            const Shown* s = watch.find(point, layer);
            CHECK_MESSAGE(s != nullptr, name(point, layer));
            if (s == nullptr) return;
            CHECK_MESSAGE(s->shape == shape, name(point, layer));
            CHECK(s->pos == past);
            std::size_t count = 1;
            for (const int n : shape) count *= static_cast<std::size_t>(n);
            CHECK(s->values.size() == count);
            ++expected;
        };
        const std::vector<int> D{T, 64}, M{T, 256}, V{T, 512}, Q{T, 4, 16}, K{T, 2, 16},
            A{4, T, T + past};
        for (const HookPoint p : {HookPoint::embed, HookPoint::embed_norm, HookPoint::final_norm})
            has(p, -1, D);
        if (gen == Gen::g4) has(HookPoint::smear, -1, D), has(HookPoint::backout, -1, D);
        has(HookPoint::logits_raw, -1, V);
        has(HookPoint::logits, -1, V);
        for (int i = 0; i < 2; ++i) {
            for (const HookPoint p : {HookPoint::resid_pre, HookPoint::attn_in, HookPoint::attn_out,
                                      HookPoint::resid_mid, HookPoint::mlp_in, HookPoint::mlp_out,
                                      HookPoint::resid_post}) {
                has(p, i, D);
            }
            for (const HookPoint p : {HookPoint::q, HookPoint::rot_q, HookPoint::z}) has(p, i, Q);
            for (const HookPoint p : {HookPoint::k, HookPoint::rot_k, HookPoint::v}) has(p, i, K);
            for (const HookPoint p : {HookPoint::attn_scores, HookPoint::pattern}) has(p, i, A);
            for (const HookPoint p : {HookPoint::mlp_pre, HookPoint::mlp_post}) has(p, i, M);
            if (gen >= Gen::g2 && i == 1) has(HookPoint::ve_gate, i, {T, 2});
        }
        CHECK(watch.shown.size() == expected);
    }
}

TEST_CASE("model: rows of a pattern sum to one, and scores outside the window are minus infinity") {
    const auto model = load(Gen::g1, kTiny);
    KVCache cache(*model, 60);
    Watch watch;
    nanogpt::forward(*model, cache, ids_of(kTiny, 50), &watch);
    const Shown &pattern = *watch.find(HookPoint::pattern, 0),
                &scores = *watch.find(HookPoint::attn_scores, 0);
    for (std::size_t row = 0; row < 4 * 50; ++row) {
        float sum = 0;
        for (std::size_t s = 0; s < 50; ++s) {
            const float p = pattern.values[row * 50 + s];
            sum += p;
            CHECK((p == 0) == !is_finite(scores.values[row * 50 + s]));
        }
        CHECK(close(sum, 1.0f, 1e-5));
    }
}

TEST_CASE("model: names of hook points are TransformerLens' where it has the point") {
    CHECK(name(HookPoint::embed, -1) == "hook_embed");
    CHECK(name(HookPoint::q, 3) == "blocks.3.attn.hook_q");
    CHECK(name(HookPoint::resid_post, 0) == "blocks.0.hook_resid_post");
}

// ---- loading ------------------------------------------------------------------------------------

namespace {

// All weights of the model have the values the file has, element by element.
bool same_weights(const Model& model, const std::vector<NamedTensor>& want) {
    const nanogpt::Weights& w = model.weights();
    const auto equal = [](const nanogpt::Tensor& t, const NamedTensor& n) {
        if (!t || t.shape != n.shape) return false;
        std::vector<float> got(n.values.size());
        for (std::size_t row = 0; row < t.rows(); ++row) {
            nanogpt::detail::copy_row(&got[row * t.cols()], t, row);
        }
        return same_bits(got, n.values);
    };
    for (const NamedTensor& n : want) {
        const auto is = [&](const char* name) { return n.name == name; };
        bool ok = false;
        if (is("transformer.wte.weight")) ok = equal(w.wte, n);
        if (is("lm_head.weight")) ok = equal(w.lm_head, n);
        if (is("smear_gate.weight")) ok = equal(w.smear_gate, n);
        if (is("bigram_embed.embed.weight")) ok = equal(w.bigram_embed, n);
        if (is("smear_lambda")) ok = w.smear_lambda == n.values[0];
        if (is("backout_lambda")) ok = w.backout_lambda == n.values[0];
        for (std::size_t i = 0; i < w.layers.size(); ++i) {
            const nanogpt::Layer& l = w.layers[i];
            const std::string h = "transformer.h." + std::to_string(i) + ".";
            const std::pair<std::string, const nanogpt::Tensor*> matrices[] = {
                {h + "attn.c_q.weight", &l.c_q},
                {h + "attn.c_k.weight", &l.c_k},
                {h + "attn.c_v.weight", &l.c_v},
                {h + "attn.c_proj.weight", &l.attn_c_proj},
                {h + "mlp.c_fc.weight", &l.c_fc},
                {h + "mlp.c_proj.weight", &l.mlp_c_proj},
                {h + "attn.ve_gate.weight", &l.ve_gate},
                {"value_embeds." + std::to_string(i) + ".weight", &l.value_embed}};
            for (const auto& [name, tensor] : matrices)
                ok = ok || (n.name == name && equal(*tensor, n));
            const bool first = i == 0;
            if (is("resid_lambdas")) ok = (first || ok) && l.resid_lambda == n.values[i];
            if (is("x0_lambdas")) ok = (first || ok) && l.x0_lambda == n.values[i];
            if (is("bigram_lambdas")) ok = (first || ok) && l.bigram_lambda == n.values[i];
        }
        if (!ok) {
            MESSAGE(n.name);
            return false;
        }
    }
    return true;
}

// Peak and present memory of this process in KiB; 0 where it cannot be told.
std::size_t memory_kib(const char* what) {
    std::ifstream in("/proc/self/status");
    for (std::string line; std::getline(in, line);) {
        if (line.starts_with(what))
            return std::stoul(line.substr(std::string_view(what).size() + 1));
    }
    return 0;
}

}  // namespace

TEST_CASE("model: weights are loaded exactly, in every generation and every stored type") {
    for (const Gen gen : kAllGenerations) {
        for (const Save save : {Save::f32, Save::bf16, Save::f16, Save::trained}) {
            CAPTURE(std::string(name_of(gen)));
            CHECK(same_weights(*load(gen, kTiny, {}, save), make_weights(gen, kTiny, save)));
        }
    }
}

TEST_CASE("model: loaded as bfloat16, float32 weights are rounded to nearest even") {
    LoadOptions options;
    options.dtype = DType::bf16;
    const auto model = load(Gen::g4, kTiny, options);
    std::vector<NamedTensor> want = make_weights(Gen::g4, kTiny);
    for (NamedTensor& t : want) {
        if (t.shape.size() < 2) continue;  // scalars per layer stay float32
        for (float& x : t.values) x = round_to(DType::bf16, x);
    }
    CHECK(same_weights(*model, want));
    CHECK(model->bytes() < load(Gen::g4, kTiny)->bytes() * 11 / 20);
    CHECK(model->dtype() == DType::bf16);
    options.dtype = DType::f16;
    CHECK(contains(error_of([&] { load(Gen::g4, kTiny, options); }), "float16"));
}

TEST_CASE("model: a G1 file without one kind of lambdas gets ones, or zeros") {
    TempDir dir;
    std::vector<NamedTensor> tensors = make_weights(Gen::g1, kTiny);
    std::erase_if(tensors, [](const NamedTensor& t) { return contains(t.name, "lambdas"); });
    write_meta(dir / "d2/meta_000001.json", Gen::g1, kTiny, 1);
    tensors.push_back({"x0_lambdas", {2}, DType::f32, {0.5f, 0.25f}});
    write_state_dict(dir / "d2/model_000001.pt", tensors);
    auto model = nanogpt::load_model(dir / "d2");
    CHECK(model->weights().layers[1].resid_lambda == 1);
    CHECK(model->weights().layers[1].x0_lambda == 0.25f);
    tensors.back().name = "resid_lambdas";
    write_state_dict(dir / "d2/model_000001.pt", tensors);
    model = nanogpt::load_model(dir / "d2");
    CHECK(model->weights().layers[0].resid_lambda == 0.5f);
    CHECK(model->weights().layers[0].x0_lambda == 0);
}

TEST_CASE("model: scalars that are no numbers are refused by name") {
    constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
    constexpr float kInfinity = std::numeric_limits<float>::infinity();
    for (const char* scalar : {"smear_lambda", "backout_lambda", "resid_lambdas", "x0_lambdas"}) {
        for (const float bad : {kNaN, kInfinity, -kInfinity}) {
            TempDir dir;
            const fs::path at =
                make_checkpoint(dir.path(), Gen::g4, kTiny, Save::f32, "",
                                [&](std::string_view name, std::span<float> values) {
                                    golden_fill(name, values);
                                    if (name == scalar) values.back() = bad;
                                });
            const std::string why = error_of([&] { nanogpt::load_model(at); });
            CHECK(contains(why, scalar));
            CHECK(contains(why, "not a finite number"));
        }
    }
}

TEST_CASE("model: damaged weights are refused, unless checksums are not wanted or not there") {
    TempDir dir;
    const fs::path at = make_checkpoint(dir.path(), Gen::g4, kTiny);
    const fs::path file = at / "model_000200.pt";
    std::string bytes = read_file(file);
    const std::size_t data = bytes.find("data/12FB");
    REQUIRE(data != std::string::npos);
    bytes[data + 200] = static_cast<char>(bytes[data + 200] ^ 1);
    write_file(file, bytes);
    CHECK(contains(error_of([&] { nanogpt::load_model(at); }), "checksum of entry"));
    LoadOptions options;
    options.verify = false;
    CHECK(error_of([&] { nanogpt::load_model(at, options); }) == "");
}

TEST_CASE("model: progress goes up to the total, and can stop the loading") {
    TempDir dir;
    const fs::path at = make_checkpoint(dir.path(), Gen::g4, kTiny);
    std::uint64_t last = 0, whole = 0;
    bool up = true;
    LoadOptions options;
    options.progress = [&](std::uint64_t done, std::uint64_t total) {
        up = up && done > last && done <= total;
        last = done, whole = total;
        return true;
    };
    nanogpt::load_model(at, options);
    CHECK(up);
    CHECK(last == whole);
    CHECK(whole > 100000);
    options.progress = [&](std::uint64_t done, std::uint64_t) { return done < 50000; };
    CHECK(contains(error_of([&] { nanogpt::load_model(at, options); }), "stopped"));
    CHECK(error_of([&] { nanogpt::load_model(at); }) == "");
}

TEST_CASE("model: a file that changes while it is read is not loaded") {
    for (const bool shorter : {false, true}) {
        TempDir dir;
        const fs::path at = make_checkpoint(dir.path(), Gen::g4, kTiny);
        const fs::path file = at / "model_000200.pt";
        LoadOptions options;
        options.threads = 1;
        options.progress = [&](std::uint64_t, std::uint64_t) {
            fs::resize_file(file, shorter ? 1000 : fs::file_size(file) + 1);
            return true;
        };
        const std::string why = error_of([&] { nanogpt::load_model(at, options); });
        CHECK_MESSAGE((contains(why, "changed while") || contains(why, "cut short")),
                      "refused with: ", why);
    }
}

TEST_CASE("model: a directory's step can be chosen, and find_models' answer can be loaded") {
    TempDir dir;
    CheckpointSpec spec;
    for (const std::int64_t step : {100, 300}) {
        spec.step = step;
        spec.tag = "d2";
        make_checkpoint(dir.path(), spec);
    }
    LoadOptions options;
    CHECK(nanogpt::load_model(dir / "base_checkpoints/d2")->info().step == 300);
    options.step = 100;
    CHECK(nanogpt::load_model(dir / "base_checkpoints/d2", options)->info().step == 100);
    const auto models = nanogpt::find_models(dir.path());
    REQUIRE(models.size() == 2);
    CHECK(nanogpt::load_model(models[1])->info().id == "base/d2/100");
    options.step = 200;
    CHECK(error_of([&] { nanogpt::load_model(dir / "base_checkpoints/d2", options); }) != "");
}

TEST_CASE("model: loading never holds the weights twice") {
    if (quick()) return;
    TempDir dir;
    const Shape shape{64, 600, 8, 4, 4, 512, "L"};  // 100 MiB
    const fs::path at = make_checkpoint(dir.path(), Gen::g0, shape, Save::f32, "",
                                        [](auto, std::span<float> values) {
                                            for (std::size_t i = 0; i < values.size(); i += 97)
                                                values[i] = 0.5f;
                                        });
    {
        std::ofstream reset("/proc/self/clear_refs");  // 5: the peak starts anew
        reset << 5;
        reset.close();
        if (!reset) {
            MESSAGE("skipped: the peak of this process cannot be reset");
            return;
        }
    }
    const std::size_t before = memory_kib("VmRSS");
    const auto model = nanogpt::load_model(at);
    const std::size_t peak = memory_kib("VmHWM"), grown = peak > before ? peak - before : 0;
    CHECK(before > 0);
    CHECK((model->bytes() >> 20) >= 96);
    CHECK(grown <= (model->bytes() >> 10) + 64 * 1024);
    MESSAGE("weights ", model->bytes() >> 20, " MiB, peak grown by ", grown / 1024, " MiB");
}
