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

bool no_binary() {
    if (std::string_view(NANOGPT_BINARY).empty()) MESSAGE("skipped: the program was not built");
    return std::string_view(NANOGPT_BINARY).empty();
}

// Checks of a group of the product's table, counted; told by the last case.
std::map<std::string, std::pair<std::size_t, std::size_t>>& tallies() {
    static std::map<std::string, std::pair<std::size_t, std::size_t>> all;
    return all;
}
void check(const char* group, bool passed, const std::string& what) {
    INFO(what);
    CHECK(passed);
    tallies()[group].first += passed;
    tallies()[group].second++;
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
    Truth t{nanogpt::load_model(model, options), nanogpt::load_tokenizer(tokenizer), {}, {}, {},
            {}, {}};
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
        same = row.array.size() == t.T() &&
               near(row.array[i % t.T()].number, double{want[i]}, 1e-6);
    }
    g1(same, what);
}

// ---- the lens

// softcap * tanh(lm_head norm(x) / softcap), in float64, and its softmax.
std::vector<double> said_of(const Truth& t, std::span<const float> x, bool normed) {
    const std::vector<double> h =
        normed ? std::vector<double>(x.begin(), x.end()) : rms_norm(x);
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
        const std::string name = output ? "output" : i == 0 ? "embed" : std::to_string(i - 1);
        const Json* flag = rows.array[i].find("is_output");
        g1(right && word(rows.array[i], "after") == name && flag != nullptr &&
               flag->boolean == output,
           of + "lens after " + name + ": tokens, probabilities, entropies, ranks");
    }
    const Json &last = list(rows.array[t.L()], "cells"), &end = list(rows.array[t.L() + 1], "cells");
    bool equal = true;
    for (std::size_t c = 0; c < columns; c++)
        equal = equal && number(last.array[c], "probability") == number(end.array[c], "probability") &&
                number(last.array[c], "entropy") == number(end.array[c], "entropy");
    g1(equal == (t.c().generation != nanogpt::Generation::g4),
       of + "the last layer's row is the output, unless the middle layer is subtracted");
    g1(number(end.array.back(), "probability") == number(list(json, "next").array[0], "probability") &&
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
    for (std::size_t id = 0; id < p.size(); id++) right = right && (told.contains(id) || p[id] <= before);
    g1(right, of + "the next tokens are the ten likeliest of the softmax");
    g1(std::memcmp(t.plain.data(), t.watched.data(), t.plain.size() * sizeof(float)) == 0 &&
           std::memcmp(t.plain.data(), t.all.data() + (t.T() - 1) * t.V(),
                       t.V() * sizeof(float)) == 0,
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
    const Words model = Words{"-q", "--base-dir", s.base.string(), "-i",
                              s.name == "sample" ? "sft" : "base"} +
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
            case HookPoint::smear:  // a dot product of 24 and a weighted sum, unless it is the first
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
           (us == 0 || (near(number(got, "gflops"), want.flops / us / 1e3) &&
                        near(number(got, "gbs"), want.bytes / us / 1e3) &&
                        near(number(got, "percent_of_peak"),
                             1e8 * std::max(by_memory, by_rate) / us))) &&
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
            const Count want =
                counter.of(s.point, static_cast<std::size_t>(std::max(s.layer, 0)));
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
}  // namespace
