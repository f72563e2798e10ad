// The functions that tools/EXERCISES.md asks for. Declared weak: a file that defines only some of
// them links with tests/test_exercises.cpp, and the tests of the others say so and fail.
#pragma once

#include "nanogpt.hpp"

namespace exercises {

using nanogpt::Backend;
using nanogpt::Model;
using nanogpt::Sequence;
using nanogpt::Token;
using nanogpt::Tokenizer;

// 1. How much each token of `ids` (T) looks at each other one: (T, T), row t of query t. The model
//    has this layer and this head, both counted from 0.
[[gnu::weak]] std::vector<float> attention_map(const Model& model, std::span<const Token> ids,
                                               int layer, int head);

// 2. Draws from softmax(logits / temperature) without the tokens that are less likely in it, so
//    after the temperature, than min_p times the likeliest. u in [0, 1) says which: tokens take
//    their shares of it in order of ids.
[[gnu::weak]] Token sample_min_p(std::span<const float> logits, float temperature, float min_p,
                                 double u);

// 3. The tokens of one piece of text, by byte-pair encoding: from single bytes on, the two
//    neighbours that make the lowest token are joined, of equal ones the leftmost.
[[gnu::weak]] std::vector<Token> merge_by_hand(const Tokenizer& tokenizer, std::string_view piece);

// 4. How many tokens of `prompt` prefill() will not read again.
[[gnu::weak]] std::size_t tokens_kept(const Sequence& sequence, std::span<const Token> prompt);

// 5. -log2 p(text) per byte of text, its first token after <|bos|>.
[[gnu::weak]] double bits_per_byte(const Model& model, const Tokenizer& tokenizer,
                                   std::string_view text);

// 6. The logits (L, V) after the last token, had the model ended after layer 0, 1, ...
[[gnu::weak]] std::vector<float> logit_lens(const Model& model, std::span<const Token> ids);

// 7. The continuation of `length` tokens that beam search finds: of all extensions of the kept ones
//    by one token, the `beams` with the largest sum of log probabilities are kept.
[[gnu::weak]] std::vector<Token> beam_search(Backend& backend, std::span<const Token> prompt,
                                             int beams, int length);

// 8. Speculative decoding, greedy. draft[0] was drawn and is not read yet, the others are guesses.
//    One step reads all. Returns the guesses before the first wrong one, then the model's own next
//    token. The sequence then holds draft[0] and those guesses, and nothing of the others.
[[gnu::weak]] std::vector<Token> verify_draft(Backend& backend, Sequence& sequence,
                                              std::span<const Token> draft);

// 9. Causal attention of one head with a penalty on distance (Press et al. 2022):
//    z[t] = sum over s <= t of softmax_s(q[t] . k[s] / sqrt(hd) - slope * (t - s)) v[s].
//    z, q, k, v (T, hd)
[[gnu::weak]] void alibi_attention(float* z, const float* q, const float* k, const float* v,
                                   std::size_t T, std::size_t hd, float slope);
//    The mean of -ln p(ids[t + 1] | ids[0 ... t]) over t, with that attention, on rotated queries
//    and keys, in every head of a model of generation G0 whose H = K.
[[gnu::weak]] double alibi_loss(const Model& model, std::span<const Token> ids, float slope);

// 10. y (T, N) = x (T, K) w (N, K)^T, with four rows of x for each row of w that is loaded.
[[gnu::weak]] void matmul_rung(float* y, const float* x, const float* w, std::size_t T,
                               std::size_t N, std::size_t K);

}  // namespace exercises
