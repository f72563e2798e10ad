// walkthrough: the whole transformer once more, one token at a time, one layer at a time.
//
//   g++ -std=c++20 -O3 -I. tools/walkthrough.cpp -o walkthrough
//   ./walkthrough <model dir> <tokenizer.pkl> "text"        prints the 5 likeliest next tokens
//
// Pass::forward of nanogpt.hpp without batches and hooks; tests/test_walkthrough.cpp holds the
// logits equal to the last bit, in every generation. Steps have the numbers of tools/MODEL.md,
// which has the formulas. D width, H query heads, K key/value heads, hd = D / H, V vocabulary.
#include <cstdio>

#include "nanogpt.hpp"

namespace walkthrough {

namespace ops = nanogpt::ops;
using nanogpt::Token;
using Vector = std::vector<float>;

// What is kept of the tokens read so far.
struct State {
    std::vector<Token> tokens;
    Vector before;                     // (D), normed embedding of the last token, for the smear
    std::vector<Vector> keys, values;  // per layer and kv head: (tokens, hd padded to 16)
};

inline Vector row(const nanogpt::Tensor& table, std::size_t r) {  // (rows, n) -> (n)
    const bool half = table.dtype == nanogpt::DType::bf16;
    Vector out;
    for (std::size_t at = r * table.cols(); at < (r + 1) * table.cols(); ++at)
        out.push_back(half ? nanogpt::bf16_to_f32(table.bf16()[at]) : table.f32()[at]);
    return out;
}

inline Vector normed(Vector x) {  // x / sqrt(mean(x^2) + eps)
    ops::rms_norm(x.data(), x.data(), 1, x.size());
    return x;
}

inline void add(Vector& x, const Vector& y, float weight = 1) {  // x += weight * y
    for (std::size_t j = 0; j < x.size(); ++j) x[j] += weight * y[j];
}

inline float gate(const Vector& w, const Vector& x) {  // of the first channels of x, in (0, 1)
    float dot = 0;
    for (std::size_t j = 0; j < w.size(); ++j) dot += w[j] * x[j];
    return ops::sigmoid(dot);
}

inline std::size_t bigram_row(Token id, Token before, int vocab_size) {  // G2e
    const std::int32_t mod = 5 * vocab_size - 1;
    const auto hash = static_cast<std::int32_t>(36313u * static_cast<std::uint32_t>(id) ^
                                                27191u * static_cast<std::uint32_t>(before));
    return static_cast<std::size_t>(before < 0 ? mod : (hash % mod + mod) % mod);
}

// Reads one token after those of the state; returns the logits (V) of the next one.
inline Vector forward(const nanogpt::Model& model, State& state, Token id) {
    const nanogpt::Config& c = model.config();
    const nanogpt::Weights& w = model.weights();
    if (id < 0 || id >= c.vocab_size) throw std::out_of_range("a token outside the vocabulary");
    const auto D = static_cast<std::size_t>(c.n_embd), H = static_cast<std::size_t>(c.n_head),
               K = static_cast<std::size_t>(c.n_kv_head), hd = D / H, hdp = (hd + 15) / 16 * 16;
    const std::size_t pos = state.tokens.size(), token = static_cast<std::size_t>(id);
    const Token previous = pos > 0 ? state.tokens.back() : -1;
    state.keys.resize(w.layers.size() * K), state.values.resize(w.layers.size() * K);
    const auto matvec = [&](const nanogpt::Tensor& a, const Vector& x, std::size_t n) {
        Vector y(n);  // y = a x: the first n rows of a
        ops::linear(model.pool(), y.data(), x.data(), a, 1, n);
        return y;
    };
    Vector cos(hd / 2), sin(hd / 2);  // this position's angles, for all layers
    ops::rotary_angles(cos.data(), sin.data(), static_cast<int>(pos), hd, c.rope_base,
                       c.bf16_rope_tables);

    // 1 to 3. The token's row of the table, normed. G4 smears in a little of the token before.
    Vector x = normed(row(w.wte, token));
    const Vector own = x;
    if (c.generation == nanogpt::Generation::g4 && pos > 0)
        add(x, state.before, w.smear_lambda * gate(row(w.smear_gate, 0), own));
    Vector x0 = x, middle;
    for (int i = 0; i < c.n_layer; ++i) {
        const nanogpt::Layer& layer = w.layers[static_cast<std::size_t>(i)];
        // 4, 5. The residual stream, weighed, with some of the embedding; G2e adds the pair of ids.
        for (std::size_t j = 0; c.has_lambdas() && j < D; ++j)
            x[j] = layer.resid_lambda * x[j] + layer.x0_lambda * x0[j];
        if (c.generation == nanogpt::Generation::g2e)
            add(x, row(w.bigram_embed, bigram_row(id, previous, c.vocab_size)),
                layer.bigram_lambda);
        // 6 to 8. Queries, keys, values; in every other layer the token's value embedding, gated.
        const Vector h = normed(x);
        Vector q = matvec(layer.c_q, h, D), k = matvec(layer.c_k, h, K * hd),
               v = matvec(layer.c_v, h, K * hd);
        for (std::size_t head = 0; c.has_value_embed(i) && head < K; ++head) {
            const float g = c.ve_gate_scale * gate(row(layer.ve_gate, head), h);
            const Vector embed = row(layer.value_embed, token);
            for (std::size_t j = head * hd; j < (head + 1) * hd; ++j) v[j] += g * embed[j];
        }
        // 9, 10. Position: queries and keys are turned, then each head normed, then scaled.
        for (Vector* qk : {&q, &k}) {
            ops::rotary(qk->data(), cos.data(), sin.data(), qk->size() / hd, hd);
            ops::rms_norm(qk->data(), qk->data(), qk->size() / hd, hd);
            for (float& value : *qk) value *= c.qk_scale;
        }
        // 11 to 13. Keys and values are kept; every query head looks back at those of its group:
        //    z = sum over s of softmax_s(q . k[s] / sqrt(hd)) v[s], for pos - window <= s <= pos.
        Vector z(D);
        for (std::size_t head = 0; head < H; ++head) {
            const std::size_t kv = head / (H / K), at = static_cast<std::size_t>(i) * K + kv;
            Vector &keys = state.keys[at], &values = state.values[at];
            keys.resize((pos + 1) * hdp), values.resize((pos + 1) * hdp);
            std::copy_n(&k[kv * hd], hd, &keys[pos * hdp]);
            std::copy_n(&v[kv * hd], hd, &values[pos * hdp]);
            ops::attention(&z[head * hd], D, &q[head * hd], D, keys.data(), values.data(), 1, pos,
                           hd, static_cast<std::size_t>(c.window(i)));
        }
        add(x, matvec(layer.attn_c_proj, z, D));
        // 14 to 16. The MLP: up to 4D, relu^2, down again. The middle layer's stream is kept.
        Vector mlp = matvec(layer.c_fc, normed(x), 4 * D);
        for (float& m : mlp) m = std::max(m, 0.0f), m *= m;
        add(x, matvec(layer.mlp_c_proj, mlp, D));
        if (i == c.n_layer / 2) middle = x;
    }
    // 17 to 19. G4 backs out some of the middle layer. Then norm, a score for every token, cap.
    if (c.generation == nanogpt::Generation::g4) add(x, middle, -w.backout_lambda);
    Vector logits = matvec(w.lm_head, normed(x), static_cast<std::size_t>(c.vocab_size));
    ops::softcap(logits.data(), logits.size(), c.softcap);
    state.tokens.push_back(id), state.before = own;
    return logits;
}

}  // namespace walkthrough

int main(int argc, char** argv) try {
    if (argc != 4) return std::puts("walkthrough <model dir> <tokenizer.pkl> \"text\""), 2;
    const auto model = nanogpt::load_model(argv[1]);
    const nanogpt::Tokenizer tokenizer = nanogpt::load_tokenizer(argv[2]);
    walkthrough::State state;
    auto p = walkthrough::forward(*model, state, tokenizer.special("<|bos|>"));
    for (const int id : tokenizer.encode(argv[3])) p = walkthrough::forward(*model, state, id);
    p.resize(p.size() + 15), nanogpt::ops::softmax(p.data(), p.size() - 15);  // pads to 16
    for (int n = 0; n < 5; ++n) {
        const auto best = std::max_element(p.begin(), p.end());
        const auto id = static_cast<nanogpt::Token>(best - p.begin());
        std::printf("%6.2f %%  %6d  %s\n", 100 * static_cast<double>(std::exchange(*best, 0.0f)),
                    id, nanogpt::detail::quote(tokenizer.piece(id)).c_str());
    }
    return 0;
} catch (const std::exception& e) {
    return std::fprintf(stderr, "walkthrough: %s\n", e.what()), 1;
}
