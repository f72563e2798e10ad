// The exercises of tools/EXERCISES.md: each function against a second way to the same result. Linked
// with tests/exercises/solutions.cpp here, with a student's own file as EXERCISES.md says.
#include <cmath>  // exp, log2, sqrt, tanh

#include "exercises/exercises.hpp"
#include "helpers.hpp"

using namespace test;
using namespace exercises;
using nanogpt::Chunk;
using nanogpt::HookPoint;
using nanogpt::LoadOptions;

namespace {

const std::string kMissing = "this function is not written yet";

// Everything a forward pass shows.
struct Watch : nanogpt::Observer {
    void on(const nanogpt::Activation& a) override {
        shown.emplace_back(std::pair(a.point, a.layer),
                           std::vector<double>(a.values.begin(), a.values.end()));
    }
    const std::vector<double>& at(HookPoint point, int layer) const {
        for (const auto& [what, values] : shown) {
            if (what == std::pair(point, layer)) return values;
        }
        throw std::runtime_error("not shown: " + nanogpt::name(point, layer));
    }
    std::vector<std::pair<std::pair<HookPoint, int>, std::vector<double>>> shown;
};

Watch watch(const Model& model, std::span<const Token> ids) {
    nanogpt::KVCache cache(model, static_cast<int>(ids.size()));
    Watch out;
    nanogpt::forward(model, cache, ids, &out);
    return out;
}

std::shared_ptr<const Model> toy(Gen gen, const Shape& shape, LoadOptions options = {}) {
    TempDir dir;
    options.threads = 1;  // too small to share
    return nanogpt::load_model(make_checkpoint(dir.path(), gen, shape), options);
}

std::vector<Token> random_ids(std::size_t vocab, std::size_t n, std::uint64_t seed) {
    Random random(seed);
    std::vector<Token> out;
    for (std::size_t i = 0; i < n; ++i) out.push_back(static_cast<Token>(random.below(vocab)));
    return out;
}

std::vector<float> random_floats(std::size_t n, std::uint64_t seed) {  // -1 to 1
    Random random(seed);
    std::vector<float> out;
    for (std::size_t i = 0; i < n; ++i)
        out.push_back(static_cast<float>(random.below(20001)) / 10000.0f - 1);
    return out;
}

// The logits after the last token, read one by one from an empty cache.
std::vector<float> read_alone(const Model& model, std::span<const Token> ids) {
    nanogpt::KVCache cache(model, static_cast<int>(ids.size()));
    std::vector<float> out;
    for (const Token& id : ids) {
        const auto logits = nanogpt::forward(model, cache, {&id, 1});
        out.assign(logits.begin(), logits.end());
    }
    return out;
}

double log_p(std::span<const float> logits, Token id) {  // these logits are below 20: no overflow
    double sum = 0;
    for (const float x : logits) sum += std::exp(double{x});
    return double{logits[static_cast<std::size_t>(id)]} - std::log(sum);
}

// Counts what a backend is asked for.
struct Counting : Backend {
    explicit Counting(std::shared_ptr<const Model> model) : inner(nanogpt::open_cpu(model)) {}
    const nanogpt::Config& config() const override { return inner->config(); }
    std::string device() const override { return inner->device(); }
    nanogpt::DType dtype() const override { return inner->dtype(); }
    std::unique_ptr<Sequence> new_sequence(int capacity) override {
        return inner->new_sequence(capacity);
    }
    std::span<const float> step(std::span<const Chunk> batch,
                                nanogpt::Observer* observer) override {
        ++steps;
        for (const Chunk& c : batch) tokens += c.tokens.size();
        return inner->step(batch, observer);
    }
    std::unique_ptr<Backend> inner;
    std::size_t steps = 0, tokens = 0;
};

const Shape kThree{24, 71, 3, 4, 2, 40, "SL"};

}  // namespace

TEST_CASE("exercise 1: the attention map is the softmax of what queries and keys give") {
    REQUIRE_MESSAGE((&attention_map != nullptr), kMissing);
    LoadOptions options;
    options.overrides.short_window = 5;
    const auto model = toy(Gen::g4, kThree, options);
    constexpr std::size_t T = 13, H = 4, K = 2, hd = 10;
    const std::vector<Token> ids = random_ids(71, T, 1);
    const Watch seen = watch(*model, ids);
    for (int layer = 0; layer < 3; ++layer) {
        const auto &q = seen.at(HookPoint::rot_q, layer), &k = seen.at(HookPoint::rot_k, layer);
        for (std::size_t head = 0; head < H; ++head) {
            std::vector<float> want(T * T);
            for (std::size_t t = 0; t < T; ++t) {
                std::vector<double> e(T);
                double sum = 0;
                const std::size_t window = layer == 2 ? 24 : layer == 1 ? 24 : 5;  // "SL", last L
                for (std::size_t s = t > window ? t - window : 0; s <= t; ++s) {
                    double dot = 0;
                    for (std::size_t j = 0; j < hd; ++j)
                        dot += q[(t * H + head) * hd + j] * k[(s * K + head / 2) * hd + j];
                    sum += e[s] = std::exp(dot / std::sqrt(double(hd)));
                }
                for (std::size_t s = 0; s < T; ++s) want[t * T + s] = float(e[s] / sum);
            }
            CAPTURE(layer);
            CAPTURE(head);
            CHECK(close(attention_map(*model, ids, layer, static_cast<int>(head)), want, 1e-5));
        }
    }
}

TEST_CASE("exercise 2: min-p drops the unlikely tokens and keeps the shares of the others") {
    REQUIRE_MESSAGE((&sample_min_p != nullptr), kMissing);
    constexpr int kDraws = 20000;
    const std::vector<float> logits{1.0f, -2.0f, 3.0f, 2.5f, -30.0f, 0.0f, 3.0f, 1.7f};
    for (const float temperature : {0.5f, 1.0f, 2.0f}) {
        for (const float min_p : {0.0f, 0.1f, 0.3f, 0.7f, 1.0f}) {
            std::vector<double> want;
            double all = 0, kept = 0;
            for (const float x : logits)
                want.push_back(std::exp(double{x} / double{temperature})), all += want.back();
            for (double& p : want) p /= all;
            const double limit = double{min_p} * *std::ranges::max_element(want);
            for (double& p : want) kept += p = p < limit - 1e-12 ? 0 : p;
            std::vector<int> count(logits.size());
            Token before = 0;
            int backwards = 0;
            for (int i = 0; i < kDraws; ++i) {  // evenly spaced u: the shares themselves
                const Token id = sample_min_p(logits, temperature, min_p, (i + 0.5) / kDraws);
                backwards += id < before;
                if (id >= 0 && id < 8) ++count[static_cast<std::size_t>(id)];
                before = id;
            }
            CAPTURE(temperature);
            CAPTURE(min_p);
            CHECK(backwards == 0);
            for (std::size_t id = 0; id < 8; ++id) {
                CAPTURE(id);
                CHECK(std::abs(double(count[id]) / kDraws - want[id] / kept) <= 1.01 / kDraws);
                if (want[id] == 0) CHECK(count[id] == 0);
            }
        }
    }
}

TEST_CASE("exercise 3: merging by hand gives the tokenizer's tokens") {
    REQUIRE_MESSAGE((&merge_by_hand != nullptr), kMissing);
    const auto tokenizer = nanogpt::load_tokenizer(sample_dir() / "tokenizer" / "tokenizer.pkl");
    std::vector<std::string> pieces{"a", " a", "é", " naïve", std::string(23, 'a'), "aabaabaaab"};
    for (char c = 'a'; c <= 'z'; ++c) pieces.emplace_back(3, c);  // "sss" is "ss" and "s"
    std::string word;
    for (const char c : read_file(source_dir() / "README.md")) {
        const bool letter = (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z');
        if (letter) word += c;
        if (letter || word.empty()) continue;
        pieces.push_back(word), pieces.push_back(" " + word);  // with letters only, one piece
        word.clear();
        if (pieces.size() > 400) break;
    }
    REQUIRE(pieces.size() > 400);
    int wrong = 0;
    for (const std::string& piece : pieces) {
        const std::vector<Token> got = merge_by_hand(tokenizer, piece);
        wrong += got != tokenizer.encode(piece);
    }
    CHECK(wrong == 0);
}

TEST_CASE("exercise 4: the tokens kept are those that the backend is not given again") {
    REQUIRE_MESSAGE((&tokens_kept != nullptr), kMissing);
    Counting backend(toy(Gen::g1, kMicro));
    const auto sequence = backend.new_sequence(16);
    Random random(4);
    std::size_t kept_some = 0;
    for (int round = 0; round < 60; ++round) {
        // two tokens only: long common beginnings are frequent; every fifth time the same again
        std::vector<Token> prompt = random_ids(2, 1 + random.below(9), random.below(9));
        if (round % 5 == 4) prompt.assign(sequence->tokens().begin(), sequence->tokens().end());
        const std::size_t got = tokens_kept(*sequence, prompt), before = backend.tokens;
        nanogpt::prefill(backend, *sequence, prompt);
        CHECK(got == prompt.size() - (backend.tokens - before));
        kept_some += got > 0;
    }
    CHECK(kept_some > 15);
}

TEST_CASE("exercise 5: bits per byte are the surprise of each token, token by token") {
    REQUIRE_MESSAGE((&bits_per_byte != nullptr), kMissing);
    const auto model = nanogpt::load_model(sample_dir() / "chatsft_checkpoints" / "d4");
    const auto tokenizer = nanogpt::load_tokenizer(sample_dir() / "tokenizer" / "tokenizer.pkl");
    for (const std::string text : {"The sun is a star.", "é", "1 + 1 = 2\n\nYes; naïve, and 🌍!"}) {
        std::vector<Token> ids = tokenizer.encode(text);
        ids.insert(ids.begin(), tokenizer.special("<|bos|>"));
        double p = 1;  // of the whole text: these are short enough not to vanish
        nanogpt::KVCache cache(*model, 64);
        for (std::size_t n = 1; n < ids.size(); ++n)
            p *= std::exp(log_p(nanogpt::forward(*model, cache, {&ids[n - 1], 1}), ids[n]));
        const double got = bits_per_byte(*model, tokenizer, text);
        CAPTURE(text);
        CHECK(std::abs(got + std::log2(p) / double(text.size())) <= 1e-6);
    }
}

TEST_CASE("exercise 6: the lens reads each layer with the model's own head") {
    REQUIRE_MESSAGE((&logit_lens != nullptr), kMissing);
    constexpr std::size_t V = 71, D = 40, T = 9;
    const std::vector<Token> ids = random_ids(V, T, 6);
    for (const Gen gen : {Gen::g0, Gen::g3, Gen::g4}) {
        const auto model = toy(gen, kThree);
        const std::vector<NamedTensor> weights = make_weights(gen, kThree);
        const auto head = std::ranges::find(weights, "lm_head.weight", &NamedTensor::name);
        const Watch seen = watch(*model, ids);
        std::vector<float> want;
        for (int layer = 0; layer < 3; ++layer) {
            const double* x = &seen.at(HookPoint::resid_post, layer)[(T - 1) * D];
            double squares = 0;
            for (std::size_t j = 0; j < D; ++j) squares += x[j] * x[j];
            for (std::size_t id = 0; id < V; ++id) {
                double dot = 0;
                for (std::size_t j = 0; j < D; ++j) dot += x[j] * double{head->values[id * D + j]};
                want.push_back(float(15 * std::tanh(dot / std::sqrt(squares / D) / 15)));
            }
        }
        const std::vector<float> got = logit_lens(*model, ids);
        CAPTURE(name_of(gen));
        CHECK(close(got, want, 1e-4));
        if (gen == Gen::g4) continue;  // after its last layer there is still the backout
        CHECK(close(std::span(got).last(V), read_alone(*model, ids), 1e-5));
    }
}

TEST_CASE("exercise 7: wide beams find the best continuation, one beam the greedy one") {
    REQUIRE_MESSAGE((&beam_search != nullptr), kMissing);
    LoadOptions options;
    options.overrides.softcap = 1.0f;  // no token is certain, so that greedy is often not the best
    const auto model = toy(Gen::g4, {24, 5, 2, 2, 1, 32, "L"}, options);
    const auto backend = nanogpt::open_cpu(model);
    int beyond_greedy = 0;
    for (std::uint64_t seed = 0; seed < 12; ++seed) {
        CAPTURE(seed);
        const std::vector<Token> prompt = random_ids(5, 4, seed);
        std::vector<Token> greedy, best;
        double most = -1e9;
        std::vector<Token> text = prompt;
        for (int n = 0; n < 3; ++n) {
            greedy.push_back(argmax(read_alone(*model, text)));
            text.push_back(greedy.back());
        }
        std::vector<float> after[3];     // logits after the prompt, and one and two tokens more
        for (int i = 0; i < 125; ++i) {  // every continuation of three
            const std::vector<Token> tail{i / 25, i / 5 % 5, i % 5};
            text = prompt;
            double score = 0;
            for (std::size_t n = 0; n < 3; ++n) {
                if (i % (n == 0 ? 125 : n == 1 ? 25 : 5) == 0) after[n] = read_alone(*model, text);
                score += log_p(after[n], tail[n]);
                text.push_back(tail[n]);
            }
            if (score > most) most = score, best = tail;
        }
        CHECK(beam_search(*backend, prompt, 1, 3) == greedy);
        CHECK(beam_search(*backend, prompt, 25, 3) == best);  // 25 = all of two tokens
        beyond_greedy += best != greedy;
    }
    CHECK(beyond_greedy > 0);
}

TEST_CASE("exercise 8: a draft is verified in one step, as greedy decoding would have gone on") {
    REQUIRE_MESSAGE((&verify_draft != nullptr), kMissing);
    const auto model = toy(Gen::g4, kThree);
    const std::vector<Token> prompt = random_ids(71, 6, 8);
    std::vector<Token> text = prompt;  // what the model writes by itself
    for (int n = 0; n < 8; ++n) text.push_back(argmax(read_alone(*model, text)));
    const std::vector<Token> own(text.begin() + 6, text.end());
    for (std::size_t length = 1; length <= 5; ++length) {
        for (std::size_t wrong = 1; wrong <= length; ++wrong) {  // == length: no guess is wrong
            CAPTURE(length);
            CAPTURE(wrong);
            std::vector<Token> draft(own.begin(), own.begin() + std::ptrdiff_t(length));
            if (wrong < length) draft[wrong] = (draft[wrong] + 1) % 71;
            Counting backend(model);
            const auto sequence = backend.new_sequence(24);
            nanogpt::prefill(backend, *sequence, prompt);
            const std::size_t before = backend.steps;
            const std::vector<Token> got = verify_draft(backend, *sequence, draft);
            CHECK(backend.steps == before + 1);
            const std::vector<Token> want(own.begin() + 1, own.begin() + std::ptrdiff_t(wrong) + 1);
            CHECK(got == want);
            CHECK(std::ranges::equal(sequence->tokens(), std::span(text).first(6 + wrong)));
        }
    }
}

TEST_CASE("exercise 9: a penalty on distance is a coordinate more in queries and keys") {
    REQUIRE_MESSAGE((&alibi_attention != nullptr), kMissing);
    constexpr std::size_t T = 21, hd = 10, wide = hd + 1, padded = 16;
    const auto q = random_floats(T * hd, 91), k = random_floats(T * hd, 92),
               v = random_floats(T * hd, 93);
    for (const float slope : {0.0f, 0.05f, 0.7f}) {
        // softmax ignores a constant: q . k / sqrt(hd) + slope * s does the same, and is a product
        // of (q', 1) and (k, slope * s)
        std::vector<float> q1(T * wide), k1(T * padded), v1(T * padded), z1(T * wide), want;
        for (std::size_t t = 0; t < T; ++t) {
            for (std::size_t j = 0; j < hd; ++j) {
                q1[t * wide + j] = q[t * hd + j] * std::sqrt(float(wide) / float(hd));
                k1[t * padded + j] = k[t * hd + j], v1[t * padded + j] = v[t * hd + j];
            }
            q1[t * wide + hd] = std::sqrt(float(wide)), k1[t * padded + hd] = slope * float(t);
        }
        nanogpt::ops::attention(z1.data(), wide, q1.data(), wide, k1.data(), v1.data(), T, 0, wide,
                                T);
        for (std::size_t t = 0; t < T; ++t)
            for (std::size_t j = 0; j < hd; ++j) want.push_back(z1[t * wide + j]);
        std::vector<float> got(T * hd, 7.0f);
        alibi_attention(got.data(), q.data(), k.data(), v.data(), T, hd, slope);
        CAPTURE(slope);
        CHECK(close(got, want, 1e-5));
    }
}

TEST_CASE(
    "exercise 9: the loss is the model's own at slope 0, and of tokens alone at a steep one") {
    REQUIRE_MESSAGE((&alibi_loss != nullptr), kMissing);
    const auto model = toy(Gen::g0, {24, 71, 3, 4, 4, 40, "L"});
    const std::vector<Token> ids = random_ids(71, 12, 9);
    double usual = 0, alone = 0;
    for (std::size_t t = 0; t + 1 < ids.size(); ++t) {
        usual -= log_p(read_alone(*model, std::span(ids).first(t + 1)), ids[t + 1]) / 11;
        alone -= log_p(read_alone(*model, std::span(ids).subspan(t, 1)), ids[t + 1]) / 11;
    }
    CHECK(std::abs(alibi_loss(*model, ids, 0) - usual) <= 1e-5);
    CHECK(std::abs(alibi_loss(*model, ids, 1000) - alone) <= 1e-5);
}

TEST_CASE("exercise 9: in a model of one layer, the loss is what its queries and keys give") {
    REQUIRE_MESSAGE((&alibi_loss != nullptr), kMissing);
    constexpr std::size_t T = 12, D = 40, H = 4, hd = 10, V = 71;
    const Shape shape{24, V, 1, H, H, D, "L"};
    const auto model = toy(Gen::g0, shape);
    const std::vector<NamedTensor> weights = make_weights(Gen::g0, shape);
    const std::vector<Token> ids = random_ids(V, T, 9);
    const Watch seen = watch(*model, ids);  // up to the attention nothing depends on the slope
    const auto &q = seen.at(HookPoint::rot_q, 0), &k = seen.at(HookPoint::rot_k, 0),
               &v = seen.at(HookPoint::v, 0), &x0 = seen.at(HookPoint::resid_pre, 0);
    const auto times = [&](const std::string& name, const std::vector<double>& x) {
        const auto w = std::ranges::find(weights, name, &NamedTensor::name);
        std::vector<double> y(w->values.size() / x.size());
        for (std::size_t n = 0; n < w->values.size(); ++n)
            y[n / x.size()] += double{w->values[n]} * x[n % x.size()];
        return y;
    };
    const auto normed = [](std::vector<double> x) {
        double squares = 0;
        for (const double a : x) squares += a * a;
        for (double& a : x) a /= std::sqrt(squares / D + 0x1p-23);
        return x;
    };
    double before = -1;
    for (const double slope : {0.0, 0.1, 0.5, 2.0}) {
        double loss = 0;
        for (std::size_t t = 0; t + 1 < T; ++t) {
            std::vector<double> z(D),
                x(x0.begin() + std::ptrdiff_t(t * D), x0.begin() + std::ptrdiff_t((t + 1) * D));
            for (std::size_t head = 0; head < H; ++head) {
                std::vector<double> e(t + 1);
                double sum = 0;
                for (std::size_t s = 0; s <= t; ++s) {
                    double dot = 0;
                    for (std::size_t j = head * hd; j < (head + 1) * hd; ++j)
                        dot += q[t * D + j] * k[s * D + j];
                    sum += e[s] = std::exp(dot / std::sqrt(double(hd)) - slope * double(t - s));
                }
                for (std::size_t s = 0; s <= t; ++s)
                    for (std::size_t j = head * hd; j < (head + 1) * hd; ++j)
                        z[j] += e[s] / sum * v[s * D + j];
            }
            const auto a = times("transformer.h.0.attn.c_proj.weight", z);
            for (std::size_t j = 0; j < D; ++j) x[j] += a[j];
            auto m = times("transformer.h.0.mlp.c_fc.weight", normed(x));
            for (double& value : m) value = value > 0 ? value * value : 0;
            const auto b = times("transformer.h.0.mlp.c_proj.weight", m);
            for (std::size_t j = 0; j < D; ++j) x[j] += b[j];
            const auto raw = times("lm_head.weight", normed(x));
            std::vector<float> logits;
            for (const double l : raw) logits.push_back(float(15 * std::tanh(l / 15)));
            logits.resize(V);
            loss -= log_p(logits, ids[t + 1]) / (T - 1);
        }
        CAPTURE(slope);
        CHECK(std::abs(alibi_loss(*model, ids, float(slope)) - loss) <= 1e-4);
        CHECK(std::abs(loss - before) > 1e-3);  // the slopes are told apart
        before = loss;
    }
}

TEST_CASE("exercise 10: the rung multiplies at every size, and writes nowhere else") {
    REQUIRE_MESSAGE((&matmul_rung != nullptr), kMissing);
    for (const std::size_t T : {1u, 3u, 4u, 5u, 11u}) {
        for (const auto& size : {std::pair<std::size_t, std::size_t>{1, 1}, {7, 19}, {33, 64}}) {
            const std::size_t N = size.first, K = size.second;
            const auto x = random_floats(T * K, 101), w = random_floats(N * K, 102);
            std::vector<float> want(T * N, 0.5f), got(T * N + 8, 0.5f);
            for (std::size_t t = 0; t < T; ++t) {
                for (std::size_t n = 0; n < N; ++n) {
                    double sum = 0;
                    for (std::size_t j = 0; j < K; ++j)
                        sum += double{x[t * K + j]} * double{w[n * K + j]};
                    want[t * N + n] = float(sum);
                }
            }
            want.resize(T * N + 8, 0.5f);
            matmul_rung(got.data(), x.data(), w.data(), T, N, K);
            CAPTURE(T);
            CAPTURE(N);
            CHECK(close(got, want, 2e-5));
        }
    }
}
