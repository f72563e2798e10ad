// One solution of each exercise in tools/EXERCISES.md. Try first.
#include <cmath>          // exp, log, log2, sqrt
#include <unordered_map>  // unordered_map

#include "exercises/exercises.hpp"

namespace exercises {

namespace ops = nanogpt::ops;
using nanogpt::Activation;
using nanogpt::Chunk;
using nanogpt::HookPoint;

namespace {

// Keeps what one hook point shows, one vector per layer.
struct Keep : nanogpt::Observer {
    explicit Keep(HookPoint wanted) : point(wanted) {}
    bool wants(HookPoint p, int) override { return p == point; }
    void on(const Activation& a) override { layers.emplace_back(a.values.begin(), a.values.end()); }
    HookPoint point;
    std::vector<std::vector<float>> layers;
};

Keep watch(const Model& model, std::span<const Token> ids, HookPoint point) {
    Keep keep(point);
    nanogpt::KVCache cache(model, static_cast<int>(ids.size()));
    nanogpt::forward(model, cache, ids, &keep);
    return keep;
}

// ln softmax(logits), in float64.
std::vector<double> log_probabilities(std::span<const float> logits) {
    const double top = static_cast<double>(*std::max_element(logits.begin(), logits.end()));
    double sum = 0;
    for (const float x : logits) sum += std::exp(static_cast<double>(x) - top);
    std::vector<double> out;
    for (const float x : logits) out.push_back(static_cast<double>(x) - top - std::log(sum));
    return out;
}

// The mean of -ln p of each next token; logits (T, V).
double mean_loss(std::span<const float> logits, std::span<const Token> ids) {
    const std::size_t V = logits.size() / ids.size();
    double sum = 0;
    for (std::size_t t = 0; t + 1 < ids.size(); ++t)
        sum -= log_probabilities(logits.subspan(t * V, V))[static_cast<std::size_t>(ids[t + 1])];
    return sum / static_cast<double>(ids.size() - 1);
}

}  // namespace

// ---- 1

std::vector<float> attention_map(const Model& model, std::span<const Token> ids, int layer,
                                 int head) {
    const Keep keep = watch(model, ids, HookPoint::pattern);
    const std::vector<float>& maps = keep.layers.at(static_cast<std::size_t>(layer));  // (H, T, T)
    const auto size = static_cast<std::ptrdiff_t>(ids.size() * ids.size());
    return {maps.begin() + head * size, maps.begin() + (head + 1) * size};
}

// ---- 2

Token sample_min_p(std::span<const float> logits, float temperature, float min_p, double u) {
    const double top = static_cast<double>(*std::max_element(logits.begin(), logits.end()));
    std::vector<double> shares;  // of the likeliest one, which has 1
    double sum = 0;
    for (const float x : logits) {
        const double share =
            std::exp((static_cast<double>(x) - top) / static_cast<double>(temperature));
        shares.push_back(share >= static_cast<double>(min_p) ? share : 0);
        sum += shares.back();
    }
    double left = u * sum;
    Token last = 0;
    for (std::size_t i = 0; i < shares.size(); ++i) {
        if (shares[i] == 0) continue;
        last = static_cast<Token>(i);
        left -= shares[i];
        if (left < 0) break;
    }
    return last;  // also if rounding leaves a crumb
}

// ---- 3

std::vector<Token> merge_by_hand(const Tokenizer& tokenizer, std::string_view piece) {
    std::unordered_map<std::string_view, Token> ids;
    for (Token id = 0; !tokenizer.is_special(id); ++id) ids.emplace(tokenizer.piece(id), id);
    std::vector<std::string_view> parts;
    for (std::size_t i = 0; i < piece.size(); ++i) parts.push_back(piece.substr(i, 1));
    for (;;) {
        std::size_t best = 0;
        Token lowest = INT_MAX;
        for (std::size_t i = 0; i + 1 < parts.size(); ++i) {
            const auto joined = ids.find({parts[i].data(), parts[i].size() + parts[i + 1].size()});
            if (joined != ids.end() && joined->second < lowest) best = i, lowest = joined->second;
        }
        if (lowest == INT_MAX) break;
        parts[best] = {parts[best].data(), parts[best].size() + parts[best + 1].size()};
        parts.erase(parts.begin() + static_cast<std::ptrdiff_t>(best) + 1);
    }
    std::vector<Token> out;
    for (const std::string_view part : parts) out.push_back(ids.at(part));
    return out;
}

// ---- 4

std::size_t tokens_kept(const Sequence& sequence, std::span<const Token> prompt) {
    const auto held = sequence.tokens();
    std::size_t n = 0;
    while (n < held.size() && n < prompt.size() && held[n] == prompt[n]) ++n;
    return std::min(n, prompt.size() - 1);  // the last one is read again, for its logits
}

// ---- 5

double bits_per_byte(const Model& model, const Tokenizer& tokenizer, std::string_view text) {
    std::vector<Token> ids = tokenizer.encode(text);
    ids.insert(ids.begin(), tokenizer.special("<|bos|>"));
    const Keep keep = watch(model, ids, HookPoint::logits);
    const double nats = mean_loss(keep.layers.at(0), ids) * static_cast<double>(ids.size() - 1);
    return nats / std::log(2.0) / static_cast<double>(text.size());
}

// ---- 6

std::vector<float> logit_lens(const Model& model, std::span<const Token> ids) {
    const auto D = static_cast<std::size_t>(model.config().n_embd),
               V = static_cast<std::size_t>(model.config().vocab_size);
    std::vector<float> out, row(D), logits(V);
    for (const std::vector<float>& x : watch(model, ids, HookPoint::resid_post).layers) {
        ops::rms_norm(row.data(), x.data() + (ids.size() - 1) * D, 1, D);
        ops::linear(model.pool(), logits.data(), row.data(), model.weights().lm_head, 1, V);
        ops::softcap(logits.data(), V, model.config().softcap);
        out.insert(out.end(), logits.begin(), logits.end());
    }
    return out;
}

// ---- 7

std::vector<Token> beam_search(Backend& backend, std::span<const Token> prompt, int beams,
                               int length) {
    struct Beam {
        std::vector<Token> tokens;  // prompt and continuation
        double score = 0;           // sum of log probabilities
    };
    const auto sequence = backend.new_sequence(static_cast<int>(prompt.size()) + length);
    std::vector<Beam> kept{{{prompt.begin(), prompt.end()}}};
    for (int step = 0; step < length; ++step) {
        std::vector<Beam> extended;
        for (const Beam& beam : kept) {
            // prefill() reads only what differs from the beam before
            const auto p = log_probabilities(nanogpt::prefill(backend, *sequence, beam.tokens));
            for (std::size_t id = 0; id < p.size(); ++id) {
                extended.push_back({beam.tokens, beam.score + p[id]});
                extended.back().tokens.push_back(static_cast<Token>(id));
            }
        }
        std::ranges::stable_sort(extended, std::greater<>(), &Beam::score);
        extended.resize(std::min(extended.size(), static_cast<std::size_t>(beams)));
        kept = std::move(extended);
    }
    const auto first = static_cast<std::ptrdiff_t>(prompt.size());
    return {kept[0].tokens.begin() + first, kept[0].tokens.end()};
}

// ---- 8

std::vector<Token> verify_draft(Backend& backend, Sequence& sequence,
                                std::span<const Token> draft) {
    const std::size_t held = sequence.tokens().size();
    Keep keep(HookPoint::logits);
    const Chunk chunk{&sequence, draft};
    backend.step({&chunk, 1}, &keep);
    const std::span<const float> logits = keep.layers.at(0);  // (draft, V)
    const std::size_t V = logits.size() / draft.size();
    std::vector<Token> out;
    for (std::size_t t = 0; t < draft.size(); ++t) {
        out.push_back(nanogpt::Sampler::argmax(logits.subspan(t * V, V)));
        if (t + 1 < draft.size() && draft[t + 1] != out.back()) break;
    }
    sequence.rewind(static_cast<int>(held + out.size()));
    return out;
}

// ---- 9

void alibi_attention(float* z, const float* q, const float* k, const float* v, std::size_t T,
                     std::size_t hd, float slope) {
    const float scale = 1 / std::sqrt(static_cast<float>(hd));
    for (std::size_t t = 0; t < T; ++t) {
        std::vector<float> p(t + 16);  // softmax wants room up to a multiple of 16
        for (std::size_t s = 0; s <= t; ++s) {
            float dot = 0;
            for (std::size_t j = 0; j < hd; ++j) dot += q[t * hd + j] * k[s * hd + j];
            p[s] = dot * scale - slope * static_cast<float>(t - s);
        }
        ops::softmax(p.data(), t + 1);
        std::fill_n(z + t * hd, hd, 0.0f);
        for (std::size_t s = 0; s <= t; ++s)
            for (std::size_t j = 0; j < hd; ++j) z[t * hd + j] += p[s] * v[s * hd + j];
    }
}

double alibi_loss(const Model& model, std::span<const Token> ids, float slope) {
    using Matrix = std::vector<float>;
    const nanogpt::Config& c = model.config();
    const auto T = ids.size(), D = static_cast<std::size_t>(c.n_embd),
               H = static_cast<std::size_t>(c.n_head), hd = D / H;
    const auto product = [&](const Matrix& x, const nanogpt::Tensor& w, std::size_t N) {
        Matrix y(T * N);
        ops::linear(model.pool(), y.data(), x.data(), w, T, N);
        return y;
    };
    const auto norm = [&](Matrix x, std::size_t width) {
        ops::rms_norm(x.data(), x.data(), x.size() / width, width);
        return x;
    };
    const auto add = [](Matrix& x, const Matrix& y) {
        for (std::size_t j = 0; j < x.size(); ++j) x[j] += y[j];
    };
    const auto rotate = [&](Matrix x) {
        for (std::size_t t = 0; t < T; ++t) {
            std::vector<float> cos(hd / 2), sin(hd / 2);
            ops::rotary_angles(cos.data(), sin.data(), static_cast<int>(t), hd, c.rope_base,
                               c.bf16_rope_tables);
            ops::rotary(&x[t * D], cos.data(), sin.data(), H, hd);
        }
        return norm(x, hd);
    };
    const auto head_of = [&](const Matrix& x, std::size_t head) {  // (T, D) -> (T, hd)
        Matrix out(T * hd);
        for (std::size_t t = 0; t < T; ++t) std::copy_n(&x[t * D + head * hd], hd, &out[t * hd]);
        return out;
    };
    Matrix x(T * D);
    for (std::size_t t = 0; t < T; ++t)
        nanogpt::detail::copy_row(&x[t * D], model.weights().wte, static_cast<std::size_t>(ids[t]));
    x = norm(x, D);
    for (const nanogpt::Layer& layer : model.weights().layers) {
        const Matrix h = norm(x, D), v = product(h, layer.c_v, D);
        const Matrix q = rotate(product(h, layer.c_q, D)), k = rotate(product(h, layer.c_k, D));
        Matrix z(T * D), own(T * hd);
        for (std::size_t head = 0; head < H; ++head) {
            alibi_attention(own.data(), head_of(q, head).data(), head_of(k, head).data(),
                            head_of(v, head).data(), T, hd, slope);
            for (std::size_t t = 0; t < T; ++t)
                std::copy_n(&own[t * hd], hd, &z[t * D + head * hd]);
        }
        add(x, product(z, layer.attn_c_proj, D));
        Matrix mlp = product(norm(x, D), layer.c_fc, 4 * D);
        ops::relu2(mlp.data(), mlp.size());
        add(x, product(mlp, layer.mlp_c_proj, D));
    }
    Matrix logits =
        product(norm(x, D), model.weights().lm_head, static_cast<std::size_t>(c.vocab_size));
    ops::softcap(logits.data(), logits.size(), c.softcap);
    return mean_loss(logits, ids);
}

// ---- 10

void matmul_rung(float* y, const float* x, const float* w, std::size_t T, std::size_t N,
                 std::size_t K) {
    constexpr std::size_t R = 4;
    for (std::size_t t = 0; t < T; t += R) {
        const std::size_t rows = std::min(R, T - t);
        for (std::size_t n = 0; n < N; ++n) {
            float sum[R] = {};
            for (std::size_t k = 0; k < K; ++k) {
                const float weight = w[n * K + k];  // loaded once for all rows
                for (std::size_t r = 0; r < rows; ++r) sum[r] += x[(t + r) * K + k] * weight;
            }
            for (std::size_t r = 0; r < rows; ++r) y[(t + r) * N + n] = sum[r];
        }
    }
}

}  // namespace exercises
