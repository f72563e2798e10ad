// `nanogpt walk` and POST /api/v1/inference/walk: every number that they tell against the header's own
// hook points in plain float64 loops, costs against a second count over the tensors, pictures decoded
// and looked at cell by cell; errors, files, text for terminals, and walks among other answers.
//
// The program computes in its own process. Both are built by one compiler with the same flags, so what
// is float32 arithmetic there has the same bits here; float64 sums have a tolerance.
#include <doctest/doctest.h>

#include <fcntl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <cmath>
#include <cstring>  // memcmp, strdup
#include <map>
#include <memory>
#include <set>

#include "helpers.hpp"
#include "http.hpp"

#if __has_include(<stb_image.h>) || __has_include(<stb/stb_image.h>)
#define NANOGPT_READS_PNG
#define STBI_ONLY_PNG
#define STBI_NO_STDIO
#define STB_IMAGE_STATIC
#define STB_IMAGE_IMPLEMENTATION
#if __has_include(<stb_image.h>)
#include <stb_image.h>  // stbi_load_from_memory
#else
#include <stb/stb_image.h>  // stbi_load_from_memory
#endif
#endif

#ifndef NANOGPT_BINARY
#define NANOGPT_BINARY ""
#endif

namespace {

namespace fs = std::filesystem;
using http::ask;
using http::at;
using http::get;
using http::json_of;
using http::json_string;
using http::number_at;
using http::post;
using http::Response;
using http::text_at;
using http::Words;
using nanogpt::DType;
using nanogpt::HookPoint;
using nanogpt::Json;
using nanogpt::Token;
using test::contains;

bool no_binary() { return test::no_binary(NANOGPT_BINARY); }

void check(const char* group, bool passed, const std::string& what) {
    INFO(what);
    CHECK(passed);
    test::tally(group, passed, 1);
}
void g1(bool passed, const std::string& what) { check("G1", passed, what); }
void g2(bool passed, const std::string& what) { check("G2", passed, what); }

// False for NaN. Sums of float64 in another order differ by less than 1e-9 of what is summed.
constexpr double kSums = 1e-9;
bool near(double got, double want, double tolerance = kSums) {
    return std::abs(got - want) <= tolerance * std::max(1.0, std::abs(want));
}

// ---- starting the program -----------------------------------------------------------------------

struct Result {
    int code = -1;  // 128 + signal if it was ended by one
    std::string out, err;
};
// In `where`, without a GPU, a home or a terminal.
Result run(const fs::path& where, Words args, const Words& env = {}) {
    const test::TempDir dir;
    const pid_t child = ::fork();
    if (child == 0) {
        ::dup2(::open("/dev/null", O_RDONLY), 0);
        ::dup2(::open((dir / "out").c_str(), O_WRONLY | O_CREAT, 0600), 1);
        ::dup2(::open((dir / "err").c_str(), O_WRONLY | O_CREAT, 0600), 2);
        for (const char* name : {"NANOCHAT_BASE_DIR", "COLUMNS", "CLICOLOR_FORCE"})
            ::unsetenv(name);
        ::setenv("HOME", dir.path().c_str(), 1);
        ::setenv("CUDA_VISIBLE_DEVICES", "-1", 1);
        for (const std::string& e : env) ::putenv(::strdup(e.c_str()));
        if (::chdir(where.c_str()) != 0) ::_exit(126);
        args.insert(args.begin(), NANOGPT_BINARY);
        if (const char* runner = std::getenv("NANOGPT_RUNNER")) {
            Words before;
            for (std::string_view rest = runner; !rest.empty();) {
                const std::size_t end = std::min(rest.find(' '), rest.size());
                if (end > 0) before.emplace_back(rest.substr(0, end));
                rest.remove_prefix(std::min(end + 1, rest.size()));
            }
            args.insert(args.begin(), before.begin(), before.end());
        }
        std::vector<char*> pointers;
        for (std::string& word : args) pointers.push_back(word.data());
        pointers.push_back(nullptr);
        ::execvp(pointers[0], pointers.data());
        ::_exit(127);
    }
    int status = 0;
    ::waitpid(child, &status, 0);
    const int code = WIFSIGNALED(status) ? 128 + WTERMSIG(status) : WEXITSTATUS(status);
    return {code, test::read_file(dir / "out"), test::read_file(dir / "err")};
}
Words operator+(Words a, const Words& b) {
    a.insert(a.end(), b.begin(), b.end());
    return a;
}
Words walk(const fs::path& base, const std::string& prompt) {
    return {"walk", "-q", "--base-dir", base.string(), "-p", prompt};
}

// ---- the truth ----------------------------------------------------------------------------------

struct Seen {
    HookPoint point;
    int layer;
    std::vector<int> shape;
    std::vector<float> values;
};
struct Copier : nanogpt::Observer {
    explicit Copier(bool of_logits) : logits(of_logits) {}
    bool wants(HookPoint point, int) override {
        return (point == HookPoint::logits_raw || point == HookPoint::logits) == logits;
    }
    void on(const nanogpt::Activation& a) override {
        seen.push_back({a.point,
                        a.layer,
                        {a.shape.begin(), a.shape.end()},
                        {a.values.begin(), a.values.end()}});
    }
    bool logits;
    std::vector<Seen> seen;
};

struct Truth {
    std::shared_ptr<const nanogpt::Model> model;
    nanogpt::Tokenizer tokenizer;
    std::vector<Token> ids;
    std::vector<Seen> seen;
    std::vector<float> plain, watched, all;  // logits: (V), (V), (T, V)
    const nanogpt::Config& c() const { return model->config(); }
    std::size_t T() const { return ids.size(); }
    std::size_t D() const { return static_cast<std::size_t>(c().n_embd); }
    std::size_t H() const { return static_cast<std::size_t>(c().n_head); }
    std::size_t L() const { return static_cast<std::size_t>(c().n_layer); }
    std::size_t V() const { return static_cast<std::size_t>(c().vocab_size); }
    const Seen& at(HookPoint point, std::size_t layer) const {
        for (const Seen& s : seen)
            if (s.point == point && s.layer == static_cast<int>(layer)) return s;
        throw std::runtime_error("not seen: " + nanogpt::name(point, static_cast<int>(layer)));
    }
    const Seen* last(HookPoint point) const {
        const Seen* found = nullptr;
        for (const Seen& s : seen)
            if (s.point == point) found = &s;
        return found;
    }
};
std::vector<float> logits_of(const Truth& t, nanogpt::Observer* observer) {
    nanogpt::KVCache cache(*t.model, static_cast<int>(t.T()));
    const std::span<const float> logits = nanogpt::forward(*t.model, cache, t.ids, observer);
    return {logits.begin(), logits.begin() + static_cast<std::ptrdiff_t>(t.V())};
}
Truth truth_of(const fs::path& model, const fs::path& tokenizer, const std::string& prompt,
               const nanogpt::LoadOptions& options = {}) {
    Truth t{nanogpt::load_model(model, options),
            nanogpt::load_tokenizer(tokenizer),
            {},
            {},
            {},
            {},
            {}};
    t.ids = t.tokenizer.encode(prompt);
    t.ids.insert(t.ids.begin(), t.tokenizer.special("<|bos|>"));
    t.plain = logits_of(t, nullptr);
    Copier copier(false), of_logits(true);
    t.watched = logits_of(t, &copier);
    t.seen = std::move(copier.seen);
    logits_of(t, &of_logits);
    t.all = of_logits.seen.back().values;
    t.seen.push_back({HookPoint::logits, -1, {1, static_cast<int>(t.V())}, t.plain});
    return t;
}

// softmax, with NaN as impossible
std::vector<double> softmax(std::span<const float> logits) {
    double top = -std::numeric_limits<double>::infinity(), sum = 0;
    for (const float x : logits)
        if (!std::isnan(x)) top = std::max(top, double{x});
    std::vector<double> p;
    for (const float x : logits) p.push_back(std::isnan(x) ? 0 : std::exp(double{x} - top));
    for (const double x : p) sum += x;
    for (double& x : p) x /= sum;
    return p;
}
std::vector<double> rms_norm(std::span<const float> x) {
    double squares = 0;
    for (const float v : x) squares += double{v} * double{v};
    std::vector<double> y;
    for (const float v : x)
        y.push_back(double{v} / std::sqrt(squares / static_cast<double>(x.size()) + 0x1p-23));
    return y;
}

const Json& list(const Json& json, const char* key) {
    static const Json nothing;
    const Json* found = json.find(key);
    return found == nullptr ? nothing : *found;
}
double number(const Json& json, const char* key) {
    const Json* found = json.find(key);
    return found == nullptr || found->kind != Json::Kind::number
               ? std::numeric_limits<double>::quiet_NaN()
               : found->number;
}
std::string word(const Json& json, const char* key) { return text_at(json, key); }

// ---- models -------------------------------------------------------------------------------------

struct Subject {
    std::string name;
    fs::path base, model, tokenizer;
    Words flags = {};
    nanogpt::LoadOptions options = {};
};
Subject sample_model() {
    const fs::path base = test::sample_dir();
    return {"sample", base, base / "chatsft_checkpoints" / "d4",
            base / "tokenizer" / "tokenizer.pkl"};
}
Subject toy(const test::TempDir& dir, const std::string& name, test::CheckpointSpec spec) {
    const fs::path base = dir / name;
    const fs::path model = test::make_checkpoint(base, spec);
    return {name, base, model, base / "tokenizer" / "tokenizer.pkl"};
}
// One of every generation, of every kind of numbers, with windows that are shorter than the text.
std::vector<Subject> subjects(const test::TempDir& dir) {
    std::vector<Subject> all = {sample_model()};
    int n = 0;
    for (const test::Gen gen : test::kAllGenerations) {
        test::CheckpointSpec spec;
        spec.gen = gen;
        spec.shape.n_layer = 3;
        constexpr test::Save kSaves[] = {test::Save::f32, test::Save::bf16, test::Save::trained,
                                         test::Save::f16};
        spec.save = kSaves[n++ % 4];
        all.push_back(toy(dir, test::name_of(gen), spec));
        if (gen < test::Gen::g1) continue;
        all.back().flags = {"--short-window", "3"};
        all.back().options.overrides.short_window = 3;
    }
    return all;
}

// `n` tokens with the first one: single bytes that no pair of the toys' tokenizer has.
std::string letters(std::size_t n, std::uint64_t seed = 7) {
    test::Random random(seed);
    std::string text;
    while (text.size() + 1 < n) text += "bfgjkpqvxyz"[random.below(11)];
    return text;
}

// ==== G1: numbers ================================================================================

void stages_are_right(const Truth& t, const Json& json, const std::string& of) {
    const Json& stages = list(json, "stages");
    g1(stages.array.size() == t.seen.size(), of + "every hook point is a stage");
    for (std::size_t i = 0; i < std::min(stages.array.size(), t.seen.size()); i++) {
        const Json& got = stages.array[i];
        const Seen& want = t.seen[i];
        const bool masked = want.point == HookPoint::attn_scores;
        double least = 1e300, most = -1e300, sum = 0, squares = 0, size = 0, zeros = 0, n = 0,
               bad = 0;
        for (const float x : want.values) {
            if (masked && std::isinf(x) && x < 0) continue;
            if (!std::isfinite(x)) {
                bad++;
                continue;
            }
            const double v = double{x};
            least = std::min(least, v), most = std::max(most, v), n++;
            sum += v, squares += v * v, size += std::abs(v), zeros += v == 0;
        }
        bool same_shape = list(got, "shape").array.size() == want.shape.size();
        for (std::size_t d = 0; same_shape && d < want.shape.size(); d++)
            same_shape = list(got, "shape").array[d].number == want.shape[d];
        const std::string name = nanogpt::name(want.point, want.layer);
        g1(word(got, "name") == name && number(got, "layer") == want.layer && same_shape &&
               number(got, "min") == least && number(got, "max") == most &&
               std::abs(number(got, "mean") - sum / n) <= kSums * size / n &&
               near(number(got, "rms"), std::sqrt(squares / n)) &&
               near(number(got, "zero"), zeros / n) && number(got, "not_finite") == bad,
           of + name + ": shape, least, most, mean, rms, zeros, not finite");
    }
}

// How the definitions read, query by query.
void heads_are_right(const Truth& t, const Json& json, const std::string& of) {
    const Json& heads = list(json, "attention");
    g1(heads.array.size() == t.L() * t.H(), of + "every head is told");
    const std::size_t T = t.T();
    for (std::size_t i = 0; i < std::min(heads.array.size(), t.L() * t.H()); i++) {
        const Json& got = heads.array[i];
        const std::size_t layer = i / t.H(), head = i % t.H();
        const Seen &pattern = t.at(HookPoint::pattern, layer),
                   &scores = t.at(HookPoint::attn_scores, layer);
        const auto back = static_cast<std::size_t>(t.c().window(static_cast<int>(layer)));
        const Json& map = list(got, "map");
        double entropy = 0, distance = 0, first = 0, previous = 0, itself = 0, queries = 0;
        bool same = map.array.size() == T, adds_up = true, is_softmax = true;
        for (std::size_t q = 0; q < T; q++) {
            const float* p = &pattern.values[(head * T + q) * T];
            const float* s = &scores.values[(head * T + q) * T];
            double sum = 0, sum_of_exp = 0;
            for (std::size_t k = 0; k <= q; k++) sum_of_exp += std::exp(double{s[k]});
            for (std::size_t k = 0; k < T; k++) {
                sum += double{p[k]};
                same = same && map.array[q].array.size() == T &&
                       static_cast<float>(map.array[q].array[k].number) == p[k];
                const bool visible = k <= q && q - k <= back;
                const double want = visible ? std::exp(double{s[k]}) / sum_of_exp : 0;
                is_softmax = is_softmax && std::abs(double{p[k]} - want) <= 1e-5 &&
                             std::isfinite(s[k]) == visible;
            }
            adds_up = adds_up && std::abs(sum - 1) < 1e-5;
            if (q == 0 && T > 1) continue;
            queries++, first += double{p[0]}, itself += double{p[q]};
            if (q > 0) previous += double{p[q - 1]};
            for (std::size_t k = 0; k <= q; k++) {
                if (p[k] > 0) entropy -= double{p[k]} * std::log(double{p[k]}) / std::log(2.0);
                distance += double{p[k]} * static_cast<double>(q - k);
            }
        }
        first /= queries, previous /= queries, itself /= queries, distance /= queries;
        const char* label = first > 0.5      ? "rests on the first token"
                            : previous > 0.5 ? "looks at the previous token"
                            : itself > 0.5   ? "looks at itself"
                            : distance < 3   ? "local"
                                             : "broad";
        const std::string name =
            of + "layer " + std::to_string(layer) + " head " + std::to_string(head) + ": ";
        g1(same, name + "the map is the observed pattern, bit for bit");
        g1(adds_up && is_softmax, name + "rows are the softmax of the scores, and add up to 1");
        g1(number(got, "layer") == static_cast<double>(layer) &&
               number(got, "head") == static_cast<double>(head) &&
               near(number(got, "entropy"), entropy / queries) &&
               near(number(got, "distance"), distance) && near(number(got, "first"), first) &&
               near(number(got, "previous"), previous) && near(number(got, "itself"), itself) &&
               word(got, "label") == label,
           name + "entropy, distance, shares, label");
    }
}

// RMS of the stream after the embedding and every layer; share of neurons that are zero.
std::vector<float> residual_of(const Truth& t) {
    const Seen* x0 = t.last(HookPoint::smear);
    std::vector<const Seen*> rows = {x0 != nullptr ? x0 : t.last(HookPoint::embed_norm)};
    for (std::size_t i = 0; i < t.L(); i++) rows.push_back(&t.at(HookPoint::resid_post, i));
    std::vector<float> out;
    for (const Seen* row : rows) {
        for (std::size_t pos = 0; pos < t.T(); pos++) {
            double squares = 0;
            for (std::size_t d = 0; d < t.D(); d++)
                squares += std::pow(double{row->values[pos * t.D() + d]}, 2);
            out.push_back(static_cast<float>(std::sqrt(squares / static_cast<double>(t.D()))));
        }
    }
    return out;
}
std::vector<float> silent_of(const Truth& t) {
    std::vector<float> out;
    for (std::size_t i = 0; i < t.L(); i++) {
        const std::vector<float>& x = t.at(HookPoint::mlp_post, i).values;
        for (std::size_t pos = 0; pos < t.T(); pos++) {
            int zeros = 0;
            for (std::size_t d = 0; d < 4 * t.D(); d++) zeros += x[pos * 4 * t.D() + d] == 0;
            out.push_back(static_cast<float>(zeros) / static_cast<float>(4 * t.D()));
        }
    }
    return out;
}
void matrix_is_right(const Truth& t, const Json& rows, const std::vector<float>& want,
                     const std::string& what) {
    bool same = rows.array.size() * t.T() == want.size();
    for (std::size_t i = 0; same && i < want.size(); i++) {
        const Json& row = rows.array[i / t.T()];
        same =
            row.array.size() == t.T() && near(row.array[i % t.T()].number, double{want[i]}, 1e-6);
    }
    g1(same, what);
}

// ---- the lens

// softcap * tanh(lm_head norm(x) / softcap), in float64, and its softmax.
std::vector<double> said_of(const Truth& t, std::span<const float> x, bool normed) {
    const std::vector<double> h = normed ? std::vector<double>(x.begin(), x.end()) : rms_norm(x);
    const double cap = double{t.c().softcap};
    std::vector<float> row(t.D());
    std::vector<double> p;
    double sum = 0;
    for (std::size_t id = 0; id < t.V(); id++) {
        nanogpt::detail::copy_row(row.data(), t.model->weights().lm_head, id);
        double dot = 0;
        for (std::size_t d = 0; d < t.D(); d++) dot += h[d] * double{row[d]};
        p.push_back(std::exp(cap * std::tanh(dot / cap)));
        sum += p.back();
    }
    for (double& v : p) v /= sum;
    return p;
}
// One cell against probabilities of another arithmetic: `slack` is the difference of float32.
bool cell_is_right(const Json& cell, const std::vector<double>& p, std::size_t final_token,
                   double slack) {
    const auto token = static_cast<std::size_t>(number(cell, "token"));
    if (token >= p.size()) return false;
    const double best = *std::max_element(p.begin(), p.end()), chosen = p[final_token];
    double entropy = 0, above = 0, not_below = 0;
    for (const double v : p) {
        if (v > 0) entropy -= v * std::log2(v);
        above += v > chosen * (1 + slack), not_below += v >= chosen * (1 - slack);
    }
    const double rank = number(cell, "rank_of_final");
    return p[token] >= best * (1 - slack) && near(number(cell, "probability"), best, slack) &&
           std::abs(number(cell, "entropy") - entropy) <= 10 * slack &&
           near(number(cell, "probability_of_final"), chosen, slack) && rank >= above + 1 &&
           rank <= not_below;
}
void lens_is_right(const Truth& t, const Json& json, const std::string& of) {
    const Json& rows = list(json, "lens");
    const std::size_t columns = std::min<std::size_t>(16, t.T()), from = t.T() - columns;
    const Json& positions = list(json, "lens_positions");
    g1(rows.array.size() == t.L() + 2 && positions.array.size() == columns &&
           positions.array[0].number == static_cast<double>(from),
       of + "the lens has a row for the embedding, each layer and the output");
    if (rows.array.size() != t.L() + 2) return;
    std::vector<std::size_t> final_token;
    for (std::size_t i = 0; i < columns; i++)
        final_token.push_back(static_cast<std::size_t>(
            test::argmax(std::span(t.all).subspan((from + i) * t.V(), t.V()))));
    const Seen* x0 = t.last(HookPoint::smear);
    if (x0 == nullptr) x0 = t.last(HookPoint::embed_norm);
    for (std::size_t i = 0; i < rows.array.size(); i++) {
        const bool output = i == t.L() + 1;
        const Seen& stream = output   ? *t.last(HookPoint::final_norm)
                             : i == 0 ? *x0
                                      : t.at(HookPoint::resid_post, i - 1);
        const Json& cells = list(rows.array[i], "cells");
        bool right = cells.array.size() == columns;
        for (std::size_t c = 0; right && c < columns; c++) {
            const auto x = std::span(stream.values).subspan((from + c) * t.D(), t.D());
            // 2e-4: logits of float32 differ by up to 1e-5 times some ten
            right = cell_is_right(cells.array[c], said_of(t, x, output), final_token[c], 2e-4);
            if (!output) continue;
            const std::vector<double> p =
                softmax(std::span(t.all).subspan((from + c) * t.V(), t.V()));
            right = right && cell_is_right(cells.array[c], p, final_token[c], 1e-12) &&
                    number(cells.array[c], "rank_of_final") == 1;
        }
        std::string name = output ? "output" : i == 0 ? "embed" : std::to_string(i - 1);
        if (i == t.L() && t.c().generation == nanogpt::Generation::g4) name += " (no backout)";
        const Json* flag = rows.array[i].find("is_output");
        g1(right && word(rows.array[i], "after") == name && flag != nullptr &&
               flag->boolean == output,
           of + "lens after " + name + ": tokens, probabilities, entropies, ranks");
    }
    const Json &last = list(rows.array[t.L()], "cells"),
               &end = list(rows.array[t.L() + 1], "cells");
    bool equal = true;
    for (std::size_t c = 0; c < columns; c++)
        equal = equal &&
                number(last.array[c], "probability") == number(end.array[c], "probability") &&
                number(last.array[c], "entropy") == number(end.array[c], "entropy");
    g1(equal == (t.c().generation != nanogpt::Generation::g4),
       of + "the last layer's row is the output, unless the middle layer is subtracted");
    g1(number(end.array.back(), "probability") ==
               number(list(json, "next").array[0], "probability") &&
           number(end.array.back(), "token") == number(list(json, "next").array[0], "token"),
       of + "the last cell is the answer, bit for bit");
}

void next_is_right(const Truth& t, const Json& json, const std::string& of) {
    const std::vector<double> p = softmax(t.plain);
    const Json& next = list(json, "next");
    std::set<std::size_t> told;
    bool right = next.array.size() == 10;
    double before = 1;
    for (const Json& c : next.array) {
        const auto token = static_cast<std::size_t>(number(c, "token"));
        right = right && token < p.size() && near(number(c, "probability"), p[token], 1e-12) &&
                p[token] <= before && told.insert(token).second;
        if (token < p.size()) before = p[token];
    }
    for (std::size_t id = 0; id < p.size(); id++)
        right = right && (told.contains(id) || p[id] <= before);
    g1(right, of + "the next tokens are the ten likeliest of the softmax");
    g1(std::memcmp(t.plain.data(), t.watched.data(), t.plain.size() * sizeof(float)) == 0 &&
           std::memcmp(t.plain.data(), t.all.data() + (t.T() - 1) * t.V(), t.V() * sizeof(float)) ==
               0,
       of + "watched or not, the logits have the same bits");
    g1(number(list(json, "choice"), "token") == test::argmax(t.plain),
       of + "the choice is the largest logit");
    bool same = list(json, "tokens").array.size() == t.T();
    for (std::size_t i = 0; same && i < t.T(); i++) {
        const Json& token = list(json, "tokens").array[i];
        std::string bytes;
        for (const Json& b : list(token, "bytes").array) bytes += static_cast<char>(b.number);
        same = number(token, "id") == t.ids[i] && bytes == t.tokenizer.piece(t.ids[i]);
    }
    g1(same, of + "the tokens of the text, begun with <|bos|>");
}
// The other commands say the same of the same text.
void others_agree(const Subject& s, const Truth& t, const Json& json, const std::string& prompt,
                  const std::string& of) {
    const test::TempDir dir;
    const Words model =
        Words{"-q", "--base-dir", s.base.string(), "-i", s.name == "sample" ? "sft" : "base"} +
        s.flags;
    const Result one =
        run(dir.path(), Words{"sample", "-p", prompt, "-t", "0", "-m", "1", "--json"} + model);
    const auto choice = static_cast<Token>(number(list(json, "choice"), "token"));
    const std::string piece(t.tokenizer.piece(choice));
    g1(one.code == 0 && (!nanogpt::detail::is_utf8(piece) ||
                         word(json_of(one.out), "text") == piece || t.tokenizer.is_special(choice)),
       of + "`sample -t 0 -m 1` writes the choice");
    std::string ids;
    for (const Token id : t.ids) ids += (ids.empty() ? "" : ",") + std::to_string(id);
    const Result raw = run(dir.path(), Words{"logits", "--ids", ids, "--out", "l.f32"} + model);
    const std::string bytes = raw.code == 0 ? test::read_file(dir / "l.f32") : "";
    g1(bytes.size() == t.T() * t.V() * 4 &&
           std::memcmp(bytes.data() + (t.T() - 1) * t.V() * 4, t.plain.data(), t.V() * 4) == 0,
       of + "`logits` has the bits behind it");
}

// ---- costs, counted over the tensors of the file and the activations that were seen

struct Count {
    double flops = 0, bytes = 0;
};
class Counter {
public:
    // A call of T tokens behind `pos` others.
    Counter(const Truth& t, std::size_t T, std::size_t pos) : t_(t), T_(T), pos_(pos) {}

    Count of(HookPoint point, std::size_t layer) {
        n_ = {};
        const std::string block = "transformer.h." + std::to_string(layer) + ".";
        const double x = size(HookPoint::embed, 0);
        switch (point) {
            case HookPoint::embed:
                rows("transformer.wte.weight", x), activations(x);
                break;
            case HookPoint::embed_norm:
            case HookPoint::attn_in:
            case HookPoint::mlp_in:
            case HookPoint::final_norm:  // squares, their sum, the product with the root
                n_.flops += 3 * x, activations(2 * x);
                break;
            case HookPoint::
                smear:  // a dot product of 24 and a weighted sum, unless it is the first
                for (std::size_t i = 0; i < T_; i++)
                    if (pos_ + i > 0) n_.flops += 2 * 24 + 2 * static_cast<double>(t_.D());
                activations(3 * x);
                break;
            case HookPoint::resid_pre:
                if (tensor("resid_lambdas") != nullptr) n_.flops += 3 * x, activations(3 * x);
                if (tensor("bigram_lambdas") != nullptr)
                    n_.flops += 2 * x, rows("bigram_embed.embed.weight", x);
                break;
            case HookPoint::q:
                for (const char* w : {"attn.c_q.weight", "attn.c_k.weight", "attn.c_v.weight"})
                    product(block + w, T_);
                activations(x + size(HookPoint::q, layer) + 2 * size(HookPoint::k, layer));
                break;
            case HookPoint::ve_gate:
                gate(block + "attn.ve_gate.weight", layer);
                break;
            case HookPoint::rot_q: {  // four products and two sums a pair, norm, scale
                const double qk = size(HookPoint::q, layer) + size(HookPoint::k, layer);
                n_.flops += 6 * qk / 2 + 3 * qk + qk, activations(2 * qk);
                break;
            }
            case HookPoint::z:
                attention(layer);
                break;
            case HookPoint::attn_out:
                product(block + "attn.c_proj.weight", T_), activations(2 * x);
                break;
            case HookPoint::resid_mid:
            case HookPoint::resid_post:
                n_.flops += x, activations(3 * x);
                break;
            case HookPoint::mlp_pre:
                product(block + "mlp.c_fc.weight", T_), activations(x + 4 * x);
                break;
            case HookPoint::mlp_post:  // the larger, its square
                n_.flops += 2 * 4 * x, activations(2 * 4 * x);
                break;
            case HookPoint::mlp_out:
                product(block + "mlp.c_proj.weight", T_), activations(x + 4 * x);
                break;
            case HookPoint::backout:
                n_.flops += 2 * x, activations(3 * x);
                break;
            case HookPoint::logits:  // the last row, without the table's padding
                n_.bytes += static_cast<double>(t_.V() * t_.D()) * held("lm_head.weight");
                for (std::size_t id = 0; id < t_.V(); id++)
                    for (std::size_t d = 0; d < t_.D(); d++) n_.flops += 2;
                activations(static_cast<double>(t_.V() + t_.D()));
                break;
            default:
                break;
        }
        return n_;
    }

private:
    const nanogpt::TensorInfo* tensor(const std::string& name) const {
        for (const nanogpt::TensorInfo& i : t_.model->info().tensors)
            if (i.name == name) return &i;
        return nullptr;
    }
    double held(const std::string& name) const {  // bytes: float16 is widened, bfloat16 is not
        return tensor(name)->dtype == DType::bf16 ? 2 : 4;
    }
    double size(HookPoint point, std::size_t layer) const {  // floats of this call
        const Seen* s = point == HookPoint::embed ? t_.last(point) : &t_.at(point, layer);
        return static_cast<double>(s->values.size() / t_.T() * T_);
    }
    void activations(double floats) { n_.bytes += 4 * floats; }
    void rows(const std::string& table, double floats) { n_.bytes += floats * held(table); }
    void product(const std::string& name, std::size_t rows_of_x) {
        const auto& shape = tensor(name)->shape;
        n_.bytes += static_cast<double>(shape[0] * shape[1]) * held(name);
        for (std::size_t row = 0; row < rows_of_x; row++)
            for (std::int64_t n = 0; n < shape[0]; n++)
                n_.flops += 2 * static_cast<double>(shape[1]);
    }
    void gate(const std::string& name, std::size_t layer) {  // the gate's own rows are not counted
        const auto& shape = tensor(name)->shape;             // (kv heads, channels)
        const double v = size(HookPoint::v, layer);
        for (std::size_t row = 0; row < T_; row++)
            for (std::int64_t head = 0; head < shape[0]; head++)
                for (std::int64_t i = 0; i < shape[1]; i++) n_.flops += 2;
        n_.flops += 2 * v, activations(2 * v);
        rows("value_embeds." + std::to_string(layer) + ".weight", v);
    }
    void attention(std::size_t layer) {
        const auto back = static_cast<std::size_t>(t_.c().window(static_cast<int>(layer)));
        const Seen& v = t_.at(HookPoint::v, layer);
        const double kv = static_cast<double>(v.shape[1] * v.shape[2]),
                     hd = static_cast<double>(v.shape[2]);
        std::set<std::size_t> keys;
        for (std::size_t i = 0; i < T_; i++) {
            const std::size_t query = pos_ + i;
            for (std::size_t key = 0; key <= query; key++) {
                if (query - key > back) continue;
                keys.insert(key);
                for (std::size_t head = 0; head < t_.H(); head++)  // score, softmax, sum
                    n_.flops += 2 * hd + 4 + 2 * hd;
            }
        }
        activations(2 * size(HookPoint::z, layer));
        activations(2 * kv * static_cast<double>(keys.size()));  // read from the cache
        activations(2 * kv * static_cast<double>(T_));           // written to it
    }
    const Truth& t_;
    std::size_t T_, pos_;
    Count n_;
};

bool cost_is_right(const Json& got, const Count& want, const Json& peak) {
    const double us = number(got, "us"), rate = number(peak, "flops_per_second"),
                 bandwidth = number(peak, "bytes_per_second");
    const double by_memory = want.bytes / bandwidth, by_rate = want.flops / rate;
    return number(got, "flops") == want.flops && number(got, "bytes") == want.bytes && us >= 0 &&
           near(number(got, "intensity"), want.flops / want.bytes) &&
           (us == 0 ||
            (near(number(got, "gflops"), want.flops / us / 1e3) &&
             near(number(got, "gbs"), want.bytes / us / 1e3) &&
             near(number(got, "percent_of_peak"), 1e8 * std::max(by_memory, by_rate) / us))) &&
           word(got, "bound") == (by_rate < by_memory ? "memory" : "compute");
}
void costs_are_right(const Truth& t, const Json& json, const std::string& of) {
    const Json &stages = list(json, "stages"), &peak = list(json, "peak");
    g1(number(peak, "bytes_per_second") > 1e6 && number(peak, "flops_per_second") > 1e6 &&
           near(number(peak, "edge"),
                number(peak, "flops_per_second") / number(peak, "bytes_per_second")),
       of + "the peak is measured");
    for (const char* side : {"prefill", "decode"}) {
        const bool prefill = std::string_view(side) == "prefill";
        Counter counter(t, prefill ? t.T() : 1, prefill ? 0 : t.T());
        std::map<std::string, Count> sums;
        std::map<std::string, double> times;
        Count whole;
        for (std::size_t i = 0; i < std::min(stages.array.size(), t.seen.size()); i++) {
            const Json& stage = stages.array[i];
            const Seen& s = t.seen[i];
            const Count want = counter.of(s.point, static_cast<std::size_t>(std::max(s.layer, 0)));
            const Json* got = stage.find(side);
            const std::string name = nanogpt::name(s.point, s.layer) + ", " + side;
            if (want.bytes == 0) {
                g1(got == nullptr, of + name + ": costs nothing");
                continue;
            }
            g1(got != nullptr && cost_is_right(*got, want, peak), of + name + ": cost");
            const std::string operation = word(stage, "operation");
            sums[operation].flops += want.flops, sums[operation].bytes += want.bytes;
            whole.flops += want.flops, whole.bytes += want.bytes;
            if (got != nullptr) times[operation] += number(*got, "us");
        }
        const Json& operations = list(json, "operations");
        g1(operations.array.size() == sums.size(), of + "every operation has a row, " + side);
        for (const Json& o : operations.array) {
            const std::string name = word(o, "name");
            g1(cost_is_right(list(o, side), sums[name], peak) &&
                   near(number(list(o, side), "us"), times[name]),
               of + name + ": the sum of its stages, " + side);
        }
        g1(cost_is_right(list(json, side), whole, peak), of + "all together, " + side);
    }
}

TEST_CASE("walk: every number is that of a plain computation, for every generation") {
    if (no_binary()) return;
    const test::TempDir dir;
    for (const Subject& s : subjects(dir)) {
        const std::string prompt =
            s.name == "sample" ? "The sky is blue because the" : "The sea, " + letters(9);
        const std::string of = s.name + ": ";
        if (test::quick() && s.name != "G4" && s.name != "G2e" && s.name != "G0") continue;
        const Result r = run(dir.path(), walk(s.base, prompt) + Words{"--json"} + s.flags);
        INFO(r.err);
        const Json json = json_of(r.out);
        g1(r.code == 0 && json.kind == Json::Kind::object, of + "one JSON object");
        const Truth t = truth_of(s.model, s.tokenizer, prompt, s.options);
        stages_are_right(t, json, of);
        heads_are_right(t, json, of);
        matrix_is_right(t, list(json, "residual_rms"), residual_of(t), of + "residual_rms");
        matrix_is_right(t, list(json, "silent"), silent_of(t), of + "silent");
        lens_is_right(t, json, of);
        next_is_right(t, json, of);
        others_agree(s, t, json, prompt, of);
        costs_are_right(t, json, of);
    }
}

// ==== G2: pictures ===============================================================================

#ifdef NANOGPT_READS_PNG
struct Color {
    int r = 0, g = 0, b = 0;
    bool operator==(const Color&) const = default;
};
constexpr Color kNotANumber{214, 40, 150};

struct Image {
    int width = 0, height = 0;
    std::vector<unsigned char> bytes;
    Color pixel(int x, int y) const {  // nothing outside: equal to no colour
        if (x < 0 || y < 0 || x >= width || y >= height) return {-1, -1, -1};
        const auto i = 3 * (static_cast<std::size_t>(y) * static_cast<std::size_t>(width) +
                            static_cast<std::size_t>(x));
        return {bytes[i], bytes[i + 1], bytes[i + 2]};
    }
};
Image decode(std::string_view png) {
    Image image;
    int channels = 0;
    unsigned char* const data = stbi_load_from_memory(
        reinterpret_cast<const unsigned char*>(png.data()), static_cast<int>(png.size()),
        &image.width, &image.height, &channels, 0);
    if (data == nullptr || channels != 3) return image.width = 0, image;
    image.bytes.assign(data, data + 3 * image.width * image.height);
    stbi_image_free(data);
    return image;
}

// ---- the colour map, taken back from sRGB to lightness, chroma and hue (Ottosson 2020)

struct Shade {
    double lightness, chroma, hue;  // hue in degrees
};
Shade shade_of(Color c) {
    const auto linear = [](int v) {
        const double x = v / 255.0;
        return x <= 0.04045 ? x / 12.92 : std::pow((x + 0.055) / 1.055, 2.4);
    };
    const double r = linear(c.r), g = linear(c.g), b = linear(c.b);
    const double l = std::cbrt(0.4122214708 * r + 0.5363325363 * g + 0.0514459929 * b),
                 m = std::cbrt(0.2119034982 * r + 0.6806995451 * g + 0.1073969566 * b),
                 s = std::cbrt(0.0883024619 * r + 0.2817188376 * g + 0.6299787005 * b);
    const double a = 1.9779984951 * l - 2.4285922050 * m + 0.4505937099 * s,
                 bb = 0.0259040371 * l + 0.7827717662 * m - 0.8086757660 * s;
    return {0.2104542553 * l + 0.7936177850 * m - 0.0040720468 * s, std::hypot(a, bb),
            std::fmod(std::atan2(bb, a) * 180 / 3.14159265358979 + 360, 360)};
}
void map_is_right(const std::vector<Color>& bar) {
    double before = 2, worst = 0, hue = 0, chroma = 0;
    bool falls = true;
    for (std::size_t i = 0; i < 256; i++) {
        const Shade s = shade_of(bar[i]);
        const double x = static_cast<double>(i) / 255;
        falls = falls && s.lightness < before;
        before = s.lightness;
        worst = std::max(worst, std::abs(s.lightness - (0.985 - 0.735 * x)));
        const double wanted = 0.004 + 0.135 * std::sin(3.14159265358979 * std::pow(x, 0.9));
        chroma = std::max(chroma, std::abs(s.chroma - wanted));
        // of almost grey colours the hue is what eight bits leave of it
        if (s.chroma > 0.05) hue = std::max(hue, std::abs(s.hue - (195 + 95 * x)));
    }
    g2(falls, "every shade is darker than the one before");
    g2(worst < 0.003,
       "lightness falls evenly: " + std::to_string(worst));  // half of 1/255, and gamma
    g2(chroma < 0.004, "chroma rises and falls: " + std::to_string(chroma));
    g2(hue < 2.5, "hue turns from green-blue to violet: " + std::to_string(hue));
    g2(shade_of(bar[0]).lightness > 0.97 && shade_of(bar[255]).lightness < 0.27,
       "from almost white to almost black");
}

// ---- the matrices of the pictures

struct Matrix {
    std::vector<double> values;
    double low = 0, high = 1;
    bool logarithmic = false;
};
// The largest of each block: rows r * m / n, in float64 from the other side.
std::vector<double> pooled(const float* map, std::size_t n, std::size_t m) {
    std::vector<double> out;
    for (std::size_t r = 0; r < m; r++) {
        for (std::size_t c = 0; c < m; c++) {
            double most = -1;
            for (std::size_t i = r * n / m; i < n && i * m / n <= r; i++)
                for (std::size_t j = c * n / m; j < n && j * m / n <= c; j++)
                    if (i * m / n == r && j * m / n == c)
                        most = std::max(most, double{map[i * n + j]});
            out.push_back(most);
        }
    }
    return out;
}
// Every grid by picture and name, "attention_L02/head 1".
std::map<std::string, Matrix> matrices_of(const Truth& t, const Json& json) {
    std::map<std::string, Matrix> all;
    const auto doubles = [](const std::vector<float>& v) {
        return std::vector<double>(v.begin(), v.end());
    };
    Matrix& residual = all["residual/residual"] = {doubles(residual_of(t)), 1e300, 0, true};
    for (const double v : residual.values) {
        if (!std::isfinite(v) || v <= 0) continue;
        residual.low = std::min(residual.low, v), residual.high = std::max(residual.high, v);
    }
    if (residual.low > residual.high) residual.low = 0, residual.high = 1;
    all["neurons/neurons"] = {doubles(silent_of(t))};
    for (std::size_t layer = 0; layer < t.L(); layer++) {
        for (std::size_t head = 0; head < t.H(); head++) {
            const float* map = &t.at(HookPoint::pattern, layer).values[head * t.T() * t.T()];
            const std::string h = "head " + std::to_string(head), l = std::to_string(layer);
            all["attention_L0" + l + "/" + h] = {
                pooled(map, t.T(), std::min<std::size_t>(t.T(), 512))};
            all["attention_all/layer " + l + " " + h] = {
                pooled(map, t.T(), std::min<std::size_t>(t.T(), 48))};
        }
    }
    for (const Json& row : list(json, "lens").array)  // G1 has compared these with a computation
        for (const Json& cell : list(row, "cells").array)
            all["lens/lens"].values.push_back(number(cell, "probability"));
    return all;
}
// Whether a cell has the colour of its number. Its middle may hold a word: then the corners count.
bool cell_is_filled(const Image& image, const std::vector<Color>& bar, const Matrix& m,
                    double value, int x, int y, int wide, int high, bool corners) {
    double share = 0;
    if (m.high > m.low) {
        const auto f = [&](double v) { return m.logarithmic ? std::log(std::max(v, 1e-30)) : v; };
        share = (f(value) - f(m.low)) / (f(m.high) - f(m.low));
    }
    const double at = 255 * std::clamp(share, 0.0, 1.0);
    for (int j = 0; j < high; j++) {
        for (int i = 0; i < wide; i++) {
            if (corners && !((i == 0 || i == wide - 1) && (j == 0 || j == high - 1))) continue;
            const Color got = image.pixel(x + i, y + j);
            // the last bit of a logarithm may be another one in the program
            const bool right = std::isnan(value)
                                   ? got == kNotANumber
                                   : got == bar[static_cast<std::size_t>(std::lround(at))] ||
                                         (std::abs(at - std::floor(at) - 0.5) < 1e-6 &&
                                          got == bar[static_cast<std::size_t>(at)]);
            if (!right) return false;
        }
    }
    return true;
}
bool grid_is_right(const Image& image, const std::vector<Color>& bar, const Json& grid,
                   const Matrix& m, bool corners) {
    const auto whole = [&](const char* key) { return static_cast<int>(number(grid, key)); };
    const int rows = whole("rows"), columns = whole("columns"), wide = whole("cell_width"),
              high = whole("cell_height");
    const Json* logarithmic = grid.find("logarithmic");
    if (static_cast<std::size_t>(rows) * static_cast<std::size_t>(columns) != m.values.size() ||
        wide < 1 || high < 1 || !near(number(grid, "low"), m.low, 1e-6) ||
        !near(number(grid, "high"), m.high, 1e-6) || logarithmic == nullptr ||
        logarithmic->boolean != m.logarithmic)
        return false;
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < columns; c++)
            if (!cell_is_filled(image, bar, m, m.values[static_cast<std::size_t>(r * columns + c)],
                                whole("x") + c * wide, whole("y") + r * high, wide, high, corners))
                return false;
    return true;
}
// Every picture of a walk; returns how many grids there were.
std::size_t pictures_are_right(const Truth& t, const Json& json, const fs::path& dir,
                               const std::string& of) {
    const std::map<std::string, Matrix> matrices = matrices_of(t, json);
    std::set<std::string> drawn;
    for (const Json& picture : list(json, "pictures").array) {
        const std::string name = word(picture, "name");
        const Image image = decode(test::read_file(dir / word(picture, "file")));
        g2(image.width > 0 && image.width == number(picture, "width") &&
               image.height == number(picture, "height") && !word(picture, "alt").empty(),
           of + name + ": decodes, of the size that is told");
        const int x = static_cast<int>(number(picture, "scale_x")),
                  y = static_cast<int>(number(picture, "scale_y"));
        const Json& grids = list(picture, "grids");
        if (grids.array.empty()) continue;
        std::vector<Color> bar;
        for (int i = 0; i < 256; i++) bar.push_back(image.pixel(x + i, y));
        if (of == "short: " && name == "lens") map_is_right(bar);
        bool straight = true;
        for (int i = 0; i < 256; i++)
            straight = straight && image.pixel(x + i, y + 11) == bar[static_cast<std::size_t>(i)];
        g2(straight, of + name + ": the scale is drawn whole");
        for (const Json& grid : grids.array) {
            const std::string what = name + "/" + word(grid, "what");
            const auto at = matrices.find(what);
            g2(at != matrices.end() && drawn.insert(what).second &&
                   grid_is_right(image, bar, grid, at->second, name == "lens"),
               of + what + ": every cell has the colour of its number");
        }
    }
    g2(drawn.size() == matrices.size(), of + "every matrix is drawn");
    return drawn.size();
}

// What stands for a picture where none is seen; empty: there is no such picture.
std::string alt_of(const Json& json, const std::string& name) {
    for (const Json& picture : list(json, "pictures").array)
        if (word(picture, "name") == name) return word(picture, "alt");
    return "";
}
// Walks a text with pictures and looks at all of them.
struct Drawn {
    Result result;
    Json json;
};
Drawn draw(const Subject& s, const std::string& prompt, const std::string& of) {
    const test::TempDir dir;
    Drawn d{run(dir.path(), walk(s.base, prompt) + Words{"--out", "w"} + s.flags), {}};
    INFO(d.result.err);
    g2(d.result.code == 0 && fs::exists(dir / "w" / "walk.json"), of + "pictures are made");
    if (d.result.code != 0) return d;
    d.json = json_of(test::read_file(dir / "w" / "walk.json"));
    const Truth t = truth_of(s.model, s.tokenizer, prompt, s.options);
    g2(list(d.json, "tokens").array.size() == t.T(), of + "tokens");
    for (const char* name : {"overview", "next_token", "lens", "residual", "neurons",
                             "attention_all", "timing", "roofline", "attention_L00"})
        g2(!alt_of(d.json, name).empty(), of + "there is the picture " + name);
    pictures_are_right(t, d.json, dir / "w", of);
    return d;
}
test::CheckpointSpec long_model() {  // reads 1024 tokens in no time
    test::CheckpointSpec spec;
    spec.gen = test::Gen::g0;
    spec.shape = test::kMicro;
    spec.shape.sequence_len = 1100;
    return spec;
}
bool draws_pictures() {
    static const bool draws = [] {
        const test::TempDir dir;  // it says so before it sees that there is such a directory
        const Result r = run("/", walk(test::sample_dir(), "") + Words{"--out", dir.path()});
        const bool without = contains(r.err, "built without stb_image_write.h");
        if (without) MESSAGE("skipped: the program was built without stb_image_write.h");
        return !without;
    }();
    return draws;
}

TEST_CASE("walk: every cell of every picture has the colour of its number") {
    if (no_binary() || !draws_pictures()) return;
    const test::TempDir dir;
    test::CheckpointSpec small;
    small.shape.n_layer = 3;
    const Subject g4 = toy(dir, "g4", small), micro = toy(dir, "long", long_model());
    draw(sample_model(), "The sky is blue because", "short: ");
    draw(g4, "", "1 token: ");
    draw(g4, letters(20), "20 tokens: ");
    if (test::quick()) return;
    const Drawn half = draw(micro, letters(512), "512 tokens: ");
    g2(!contains(alt_of(half.json, "attention_L00"), "pooled") &&
           contains(alt_of(half.json, "attention_all"), "512 positions pooled to 48"),
       "512 tokens are drawn one by one, but in the overview");
    const Drawn whole = draw(micro, letters(777), "777 tokens: ");
    g2(contains(alt_of(whole.json, "attention_L00"), "777 positions pooled to 512"),
       "more are pooled, and it is said");
}

// Fills all weights but some with one number.
test::CheckpointSpec filled(const test::Fill& fill) {
    test::CheckpointSpec spec = long_model();
    spec.fill = fill;
    return spec;
}
TEST_CASE("walk: where all numbers are equal every cell has the first colour") {
    if (no_binary() || !draws_pictures()) return;
    const test::TempDir dir;
    const Subject equal =
        toy(dir, "equal", filled([](std::string_view name, std::span<float> values) {
                std::fill(values.begin(), values.end(), contains(name, "wte") ? 0.5f : 0.0f);
            }));
    const Drawn d = draw(equal, "bfg", "all equal: ");
    const Json& cell = list(list(d.json, "lens").array.at(0), "cells").array.at(0);
    g2(near(number(cell, "probability"), 1.0 / 320) &&
           near(number(cell, "entropy"), std::log2(320.0)),
       "all equal: nothing is likelier than the rest");
    const Subject zero = toy(dir, "zero", filled([](std::string_view, std::span<float> values) {
                                 std::fill(values.begin(), values.end(), 0.0f);
                             }));
    draw(zero, "bfg", "all zero: ");
}

// An infinite neuron at the tokens "x" of the only layer: no others see it.
void infinite_at_x(std::string_view name, std::span<float> values) {
    test::golden_fill(name, values);
    const std::size_t D = 16;
    if (contains(name, "attn.c_proj") || contains(name, "mlp.c_proj"))
        std::fill(values.begin(), values.end(), 0.0f);
    if (contains(name, "mlp.c_proj"))
        for (std::size_t d = 0; d < D; d++) values[d * 4 * D] = 1;
    if (contains(name, "mlp.c_fc")) {
        std::fill(values.begin(), values.begin() + D, 0.0f);
        values[0] = 1e25f;
    }
    if (contains(name, "wte"))
        for (std::size_t id = 0; id * D < values.size(); id++) values[id * D] = id == 'x' ? 1 : -1;
}
TEST_CASE("walk: what is not a number has its own colour, or the walk is refused") {
    if (no_binary() || !draws_pictures()) return;
    const test::TempDir dir;
    const Subject infinite = toy(dir, "infinite", filled(infinite_at_x));
    const Drawn d = draw(infinite, "bxg", "an infinity: ");
    const Json& rows = list(d.json, "lens");
    const Json& cell = list(rows.array.at(2), "cells").array.at(2);
    g2(cell.find("probability")->kind == Json::Kind::null &&
           cell.find("entropy")->kind == Json::Kind::null,
       "an infinity: what the output says there is nothing");
    const Subject row = toy(dir, "row", filled([](std::string_view name, std::span<float> values) {
                                test::golden_fill(name, values);
                                if (contains(name, "lm_head"))
                                    for (std::size_t i = 0; i < 16; i++) values[7 * 16 + i] = NAN;
                            }));
    const Drawn one = draw(row, "bfg", "one NaN: ");
    bool named = false;
    for (const Json& c : list(one.json, "next").array) named = named || number(c, "token") == 7;
    g2(!named && number(list(one.json, "stages").array.back(), "not_finite") == 1 &&
           number(list(one.json, "choice"), "probability") > 0,
       "one NaN: that token is impossible, the others are told");
    for (const char* where : {"lm_head.weight", "transformer.wte.weight", "attn.c_v"}) {
        const Subject all = toy(dir, where, filled([&](std::string_view name, std::span<float> v) {
                                    test::golden_fill(name, v);
                                    if (contains(name, where)) std::fill(v.begin(), v.end(), NAN);
                                }));
        const test::TempDir out;
        const Result r = run(out.path(), walk(all.base, "bfg"));
        INFO(r.err);
        g2(r.code == 4 && r.out.empty() && std::count(r.err.begin(), r.err.end(), '\n') == 1,
           std::string("NaN in ") + where + ": refused in one line");
        g2(fs::is_empty(out.path()), std::string("NaN in ") + where + ": nothing stays behind");
    }
}
#else
TEST_CASE("walk: pictures") { MESSAGE("skipped: without stb_image.h pictures are not decoded"); }
#endif

// ==== the command ================================================================================

// Of UTF-8.
std::size_t widest(std::string_view text) {
    std::size_t most = 0, width = 0;
    for (const char c : text) {
        width = c == '\n' ? 0 : width + ((static_cast<unsigned char>(c) & 0xC0) != 0x80);
        most = std::max(most, width);
    }
    return most;
}
// The first byte or character that would do something to a terminal; "" if there is none.
std::string control_in(std::string_view text) {
    for (const char c : text) {
        const auto byte = static_cast<unsigned char>(c);
        if ((byte < 0x20 && c != '\n') || byte == 0x7F) return "byte " + std::to_string(byte);
    }
    for (const char* c : {"\xC2\x9B", "\xC2\x85", "\u202E", "\u2066", "\u200F"})
        if (contains(text, c)) return "a control character";
    return nanogpt::detail::is_utf8(text) ? "" : "not UTF-8";
}
const std::string kHostile =
    "\x1b[31m\x1b]0;title\x07 <script>alert(1)</script> \" & \xC2\x9B \u202E \x7F "
    "\u00e9\u4e16\xFF\r\t";

TEST_CASE("walk: text for a terminal is 80 columns wide and has no control bytes") {
    if (no_binary()) return;
    const test::TempDir dir;
    const fs::path base = test::sample_dir();
    for (const std::string& prompt : {std::string(), kHostile, "The " + std::string(90, '7')}) {
        const Result r = run(dir.path(), walk(base, prompt) + Words{"--no-png", "--layers", "all"});
        INFO(prompt);
        INFO(r.out);
        CHECK(r.code == 0);
        CHECK(widest(r.out) <= 80);
        CHECK(control_in(r.out) == "");
        CHECK(r.err == "");
        for (const char* part :
             {"What every stage puts out", "hook_embed", "mlp c_proj", "Logit lens", "output",
              "Where the heads look", "Next token", "chosen"})
            CHECK_MESSAGE(contains(r.out, part), part);
        CHECK(contains(r.out, prompt.empty() ? "1 token: <|bos|>" : " tokens: <|bos|>"));
    }
    CHECK(fs::is_empty(dir.path()));
    CHECK(run(dir.path(), walk(base, "A") + Words{"--no-png", "--out", "w"}).code == 0);
    CHECK(fs::exists(dir / "w" / "walk.json"));
    for (const auto& file : fs::directory_iterator(dir / "w"))
        CHECK(file.path().extension() != ".png");
    const Result narrow =
        run(dir.path(), walk(base, "The sky is blue") + Words{"--no-png"}, {"COLUMNS=20"});
    CHECK(narrow.code == 0);  // what is not the last token gives way
    CHECK(!contains(narrow.out, "·is       "));
}

TEST_CASE("walk: --json is one object, --top and --layers count, and no files are written") {
    if (no_binary()) return;
    const test::TempDir dir;
    const fs::path base = test::sample_dir();
    for (const std::string& prompt : {std::string("Hi"), kHostile}) {
        const Result r = run(
            dir.path(), walk(base, prompt) + Words{"--json", "--top", "3", "--layers", "2,0,2"});
        const Json json = nanogpt::parse_json(r.out);
        CHECK(r.code == 0);
        CHECK(std::count(r.out.begin(), r.out.end(), '\n') == 1);
        CHECK(control_in(r.out) == "");
        CHECK(list(json, "next").array.size() == 3);
        CHECK(list(json, "layers").array.size() == 2);
        CHECK(list(json, "layers").array[0].number == 0);
        CHECK(json.find("pictures") == nullptr);
        std::size_t maps = 0;
        for (const Json& head : list(json, "attention").array) maps += head.find("map") != nullptr;
        CHECK(maps == 4);
        CHECK(fs::is_empty(dir.path()));
    }
    const Result warm =
        run(dir.path(), walk(base, "Hi") + Words{"--json", "-t", "1", "-k", "5", "--seed", "3"});
    const Json json = nanogpt::parse_json(warm.out);
    bool among = false;  // of the likeliest five
    for (std::size_t i = 0; i < 5; i++)
        among = among || number(list(json, "next").array[i], "token") ==
                             number(list(json, "choice"), "token");
    CHECK(among);
}

TEST_CASE("walk: files go to a new directory; its page needs no script") {
    if (no_binary()) return;
    const test::TempDir dir;
    const test::TempDir model;
    const Subject s = toy(model, "tiny", {});
    const Words args = walk(s.base, kHostile);
    const Result first = run(dir.path(), args);
    if (contains(first.err, "built without stb_image_write.h")) {
        MESSAGE("skipped: the program was built without stb_image_write.h");
        CHECK(first.code == 2);
        CHECK(fs::is_empty(dir.path()));
        return;
    }
    CHECK(first.code == 0);
    CHECK(fs::exists(dir / "walk" / "index.html"));
    CHECK(run(dir.path(), args).code == 0);
    CHECK(fs::exists(dir / "walk-2" / "index.html"));
    CHECK(!fs::exists(dir / "walk-3"));

    const std::string page = test::read_file(dir / "walk" / "index.html");
    CHECK(!contains(page, "<script"));
    CHECK(contains(page, "&lt;script&gt;alert(1)&lt;/script&gt; &quot; &amp; "));
    CHECK(control_in(page) == "");
    const Json json = nanogpt::parse_json(test::read_file(dir / "walk" / "walk.json"));
    std::size_t images = 0, pictures = list(json, "pictures").array.size();
    for (std::size_t i = page.find("<img "); i != page.npos; i = page.find("<img ", i + 1)) {
        const std::string tag = page.substr(i, page.find('>', i) - i);
        const std::size_t alt = tag.find(" alt=\"");
        CHECK(alt != tag.npos);
        CHECK(tag[alt + 6] != '"');
        images++;
    }
    CHECK(images == pictures);
    CHECK(pictures >= 9);
    for (const Json& picture : list(json, "pictures").array) {
        CHECK(fs::file_size(dir / "walk" / word(picture, "file")) > 100);
        CHECK(contains(page, "src=\"" + word(picture, "file") + "\""));
    }
    std::size_t files = 0;
    for (const auto& entry : fs::directory_iterator(dir / "walk")) files += entry.is_regular_file();
    CHECK(files == pictures + 2);

    // never over files, unless told to
    test::write_file(dir / "mine" / "index.html", "mine");
    const Result refused = run(dir.path(), args + Words{"--out", "mine"});
    CHECK(refused.code == 2);
    CHECK(contains(refused.err, "--force"));
    CHECK(test::read_file(dir / "mine" / "index.html") == "mine");
    CHECK(!fs::exists(dir / "mine" / "walk.json"));
    CHECK(run(dir.path(), args + Words{"--out", "mine", "--force"}).code == 0);
    CHECK(contains(test::read_file(dir / "mine" / "index.html"), "<!doctype html>"));
    // with --json only where it is asked for
    const Result both = run(dir.path(), args + Words{"--json", "--out", "both"});
    CHECK(both.code == 0);
    CHECK(nanogpt::parse_json(both.out).kind == Json::Kind::object);
    CHECK(fs::exists(dir / "both" / "lens.png"));
}

TEST_CASE("walk: two at the same time have a directory each") {
    if (no_binary() || !draws_pictures()) return;
    const test::TempDir dir;
    const auto one = [&] { return run(dir.path(), walk(test::sample_dir(), "The sky")).code; };
    const pid_t other = ::fork();
    if (other == 0) ::_exit(one());
    CHECK(one() == 0);
    int status = -1;
    ::waitpid(other, &status, 0);
    CHECK(status == 0);
    for (const char* name : {"walk", "walk-2"}) CHECK(fs::exists(dir / name / "walk.json"));
}

TEST_CASE("walk: errors are one line with the reason, and write nothing") {
    if (no_binary()) return;
    const test::TempDir dir, models;
    const fs::path base = test::sample_dir();
    test::CheckpointSpec wide = long_model();
    wide.shape.n_layer = 8, wide.shape.n_head = 32, wide.shape.n_kv_head = 32;
    wide.shape.n_embd = 64;
    const Subject deep = toy(models, "wide", wide);
    struct Row {
        Words args;
        int code;
        std::string says;
    };
    const Row rows[] = {
        {{"walk", "--base-dir", base.string()}, 2, "-p TEXT"},
        {walk(base, "x") + Words{"--layers", "4"}, 2, "a layer from 0 to 3, or all"},
        {walk(base, "x") + Words{"--layers", "-1"}, 2, "a layer from 0 to 3, or all"},
        {walk(base, "x") + Words{"--layers", "a"}, 2, "a layer from 0 to 3, or all"},
        {walk(base, "x") + Words{"--layers", ","}, 2, "--layers"},
        {walk(base, "x") + Words{"--top", "0"}, 2, "--top"},
        {walk(base, "x") + Words{"--out", ""}, 2, "--out"},
        {walk(base, letters(3000)), 2, " tokens, 1023 are the most"},
        {walk(deep.base, letters(1025)), 2, "the text has 1025 tokens, 1024 are the most"},
        {walk(deep.base, letters(1024)), 2,
         "maps of 8 layers and 1024 tokens would take 1.3 GB, 1.1 GB are the most"},
        {walk(base, "x") + Words{"-g", "d99"}, 3, "d99"},
        {walk(base, "x") + Words{"--out", "/proc/none/w"}, 1, "cannot make the directory"},
    };
    for (const Row& row : rows) {
        const Result r = run(dir.path(), row.args);
        INFO(row.says);
        INFO(r.err);
        CHECK(r.code == row.code);
        CHECK(r.out == "");
        CHECK(contains(r.err, row.says));
        CHECK(r.err.starts_with("nanogpt: "));
        CHECK(std::count(r.err.begin(), r.err.end(), '\n') == 1);
        CHECK(fs::is_empty(dir.path()));
    }
}

// ==== the server =================================================================================

std::unique_ptr<http::Server> serve(const fs::path& base, const fs::path& log,
                                    const Words& more = {}) {
    auto s =
        std::make_unique<http::Server>(NANOGPT_BINARY, Words{"--base-dir", base.string()} + more,
                                       log.string(), Words{"CUDA_VISIBLE_DEVICES=-1"});
    const auto begin = http::Clock::now();  // it listens before the model is in memory
    while (contains(ask(s->port(), get("/health")).body, "loading") &&
           http::ms_since(begin) < 60'000)
        http::sleep_ms(5);
    return s;
}
std::string walk_request(const std::string& members, std::string_view more = "") {
    return post("/api/v1/inference/walk", "{" + members + "}", more);
}
bool idle(int port) {
    for (const auto start = http::Clock::now(); http::ms_since(start) < 20'000; http::sleep_ms(5)) {
        const Json json = json_of(ask(port, get("/health")).body);
        if (number_at(json, "active") == 0 && number_at(json, "queued") == 0) return true;
    }
    return false;
}
bool has_pictures(const Json& json) {
    if (!list(json, "pictures").array.empty()) return true;
    MESSAGE("skipped: the program was built without stb_image_write.h");
    return false;
}

TEST_CASE("walk: the server tells the same numbers and keeps the last 16 walks' pictures") {
    if (no_binary()) return;
    const test::TempDir dir;
    const Subject s = toy(dir, "tiny", {});
    const auto server = serve(s.base, dir / "log");
    const Response r = ask(server->port(), walk_request(R"("prompt":"The sea")"));
    REQUIRE(r.status == 200);
    const Json json = nanogpt::parse_json(r.body);
    const Truth t = truth_of(s.model, s.tokenizer, "The sea");
    stages_are_right(t, json, "server: ");
    next_is_right(t, json, "server: ");
    lens_is_right(t, json, "server: ");
    costs_are_right(t, json, "server: ");
    CHECK(list(json, "layers").array.size() == 1);
    CHECK(list(json, "layers").array[0].number == 1);  // the middle of two
    CHECK(number(json, "runs") == 1);

    const Json more = json_of(
        ask(server->port(),
            walk_request(R"("prompt":"a","layers":[1,0,1],"top":3,"temperature":1.5,"seed":5)"))
            .body);
    CHECK(list(more, "layers").array.size() == 2);
    CHECK(list(more, "next").array.size() == 3);
    if (!has_pictures(json)) return;
    const auto first_url = [](const Json& j) { return word(list(j, "pictures").array[0], "url"); };
    for (const Json& picture : list(json, "pictures").array) {
        const Response png = ask(server->port(), get(word(picture, "url")));
        CHECK(png.status == 200);
        CHECK(png.field("content-type") == "image/png");
        CHECK(contains(word(picture, "url"), word(picture, "file")));
#ifdef NANOGPT_READS_PNG
        const Image image = decode(png.body);
        g2(image.width == number(picture, "width") && image.height == number(picture, "height") &&
               image.width > 0,
           "server: " + word(picture, "name") + " decodes");
#endif
    }
    std::string unknown = first_url(json);
    unknown[unknown.find("walk/") + 5] ^= 1;
    for (const std::string& url :
         {unknown, first_url(json) + "x", std::string("/api/v1/inference/walk/")}) {
        const Response none = ask(server->port(), get(url));
        CHECK(none.status == 404);
        CHECK(text_at(json_of(none.body), "error.code") == "no_such_route");
    }
    if (test::quick()) return;
    for (int i = 0; i < 14; i++)  // 16 in all
        CHECK(ask(server->port(), walk_request(R"("prompt":"")")).status == 200);
    CHECK(ask(server->port(), get(first_url(json))).status == 200);
    CHECK(ask(server->port(), walk_request(R"("prompt":"")")).status == 200);
    CHECK(ask(server->port(), get(first_url(json))).status == 404);
    CHECK(ask(server->port(), get(first_url(more))).status == 200);
}

TEST_CASE("walk: the server's errors say which parameter is wrong") {
    if (no_binary()) return;
    const test::TempDir dir;
    const auto server =
        serve(test::sample_dir(), dir / "log", {"--api-key", "secret-of-the-class"});
    const std::string key = "Authorization: Bearer secret-of-the-class\r\n";
    struct Row {
        std::string body;
        int status;
        std::string code, param;
    };
    const Row rows[] = {
        {R"("layers":[1])", 400, "missing_field", "prompt"},
        {R"("prompt":7)", 400, "wrong_type", "prompt"},
        {R"("prompt":"x","layers":"all")", 400, "wrong_type", "layers"},
        {R"("prompt":"x","layers":[4])", 400, "out_of_range", "layers"},
        {R"("prompt":"x","layers":[-1])", 400, "out_of_range", "layers"},
        {R"("prompt":"x","layers":[])", 400, "out_of_range", "layers"},
        {R"("prompt":"x","top":0)", 400, "out_of_range", "top"},
        {R"("prompt":"x","top":101)", 400, "out_of_range", "top"},
        {R"("prompt":"x","top":"a")", 400, "wrong_type", "top"},
        {R"("prompt":"x","temperature":3)", 400, "out_of_range", "temperature"},
        {R"("prompt":")" + letters(200) + R"(")", 400, "out_of_range", "prompt"},
        {R"("prompt":"x","model":"sft/d99")", 404, "model_not_found", "model"},
    };
    for (const Row& row : rows) {
        const Response r = ask(server->port(), walk_request(row.body, key));
        const Json json = json_of(r.body);
        INFO(row.body);
        INFO(r.body);
        CHECK(r.status == row.status);
        CHECK(text_at(json, "error.code") == row.code);
        CHECK(text_at(json, "error.param") == row.param);
    }
    CHECK(ask(server->port(), walk_request(R"("prompt":"x")")).status == 401);
    const Response r = ask(server->port(), walk_request(R"("prompt":"x")", key));
    REQUIRE(r.status == 200);
    const Json json = json_of(r.body);
    if (!has_pictures(json)) return;  // an image in a page sends no key: the address is one
    CHECK(ask(server->port(), get(word(list(json, "pictures").array[0], "url"))).status == 200);
}

TEST_CASE(
    "walk: other answers keep their text meanwhile, and a client that leaves frees its place") {
    if (no_binary()) return;
    const test::TempDir dir;
    const auto server = serve(test::sample_dir(), dir / "log");
    const std::string story =
        post("/v1/completions", R"({"prompt":"Once upon a time","temperature":0,"stream":true,)"
                                R"("max_tokens":300})");
    const auto text_of = [](const Response& r) { return http::read_stream(r.body).text; };
    const std::string alone = text_of(ask(server->port(), story));
    CHECK(alone.size() > 100);
    http::Connection telling(server->port());
    telling.send(story);
    const Response walked =
        ask(server->port(), walk_request(R"("prompt":"The sky is blue because")"), 2);
    CHECK(walked.status == 200);
    CHECK(text_of(telling.receive()) == alone);

    for (int i = 0; i < 3; i++) {  // once at the very beginning, then further on
        http::Connection leaving(server->port(), 3);
        leaving.send(walk_request(R"("prompt":"The sky is blue because")"));
        http::sleep_ms(30 * i);
        leaving.reset();
        CHECK(idle(server->port()));
    }
    const Response again =
        ask(server->port(), walk_request(R"("prompt":"The sky is blue because")"), 2);
    CHECK(text_at(json_of(again.body), "choice.text") ==
          text_at(json_of(walked.body), "choice.text"));
    CHECK(text_of(ask(server->port(), story)) == alone);
}

TEST_CASE("walk: how many checks there were") { test::report_tallies(); }

}  // namespace
