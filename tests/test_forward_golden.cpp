// The forward pass against numbers of nanochat's own code: the specification's toy model in every
// generation, seven trained fixtures, and the bundled chat model with its calculator.
#include <cmath>  // log, exp

#include "helpers.hpp"

using namespace test;
using nanogpt::Activation;
using nanogpt::HookPoint;
using nanogpt::Json;
using nanogpt::KVCache;
using nanogpt::Model;
using nanogpt::Token;

namespace {

constexpr double kToy = 2e-3;      // the specification's tolerance for float32 code
constexpr double kFixture = 2e-4;  // the other kind of rotary table is 5e-4 to 2e-3 away

// Keeps every value of one hook point, one vector per layer (index 0 outside the blocks).
struct Keep : nanogpt::Observer {
    explicit Keep(HookPoint wanted) : point(wanted) {}
    bool wants(HookPoint p, int) override { return p == point; }
    void on(const Activation& a) override {
        const std::size_t i = a.layer < 0 ? 0 : static_cast<std::size_t>(a.layer);
        if (values.size() <= i) values.resize(i + 1);
        values[i].assign(a.values.begin(), a.values.end());
    }
    HookPoint point;
    std::vector<std::vector<float>> values;
};

// Logits (T, V) of all positions, read in one piece.
std::vector<float> all_logits(const Model& model, std::span<const Token> ids) {
    KVCache cache(model, static_cast<int>(ids.size()));
    Keep keep(HookPoint::logits);
    nanogpt::forward(model, cache, ids, &keep);
    return std::move(keep.values.at(0));
}

std::vector<Token> greedy(const Model& model, std::span<const Token> prompt, std::size_t n) {
    KVCache cache(model, static_cast<int>(prompt.size() + n));
    std::vector<Token> out{argmax(nanogpt::forward(model, cache, prompt))};
    while (out.size() < n) {
        out.push_back(argmax(nanogpt::forward(model, cache, {&out.back(), 1})));
    }
    return out;
}

// ---- the specification's toy model

struct GoldenRow {
    int p, argmax;
    float l0, l1, l69, max, sum;
};
struct Golden {
    std::string name;
    Gen gen;
    const char* pattern;
    bool bf16_tables;
    float softcap;
    double sum, sum_of_absolutes;  // of all 600 x 70 logits
    std::vector<GoldenRow> rows;
};

const std::vector<Golden>& goldens() {
    // clang-format off
    static const std::vector<Golden> table{
        {"G0 bf16 tables", Gen::g0, "", true, 15, -7179.900, 109425.151, {
            {0, 24, 1.72529f, 3.39879f, -5.97873f, 8.35192f, 10.2517f},
            {1, 51, -6.56284f, -0.78755f, 0.51569f, 7.22754f, -6.9865f},
            {2, 39, 0.19713f, 3.43504f, -2.38949f, 6.22807f, -43.5189f},
            {129, 31, 0.30641f, 1.25017f, -4.87129f, 6.69558f, -5.1386f},
            {300, 24, 0.32874f, 1.31945f, -0.46588f, 6.75302f, 1.7918f},
            {599, 24, 4.52580f, 2.33328f, -6.53400f, 6.46063f, -31.5128f}}},
        {"G0 padded, bf16 tables", Gen::g0p, "", true, 15, -7179.900, 109425.151, {
            {0, 24, 1.72529f, 3.39879f, -5.97873f, 8.35192f, 10.2517f},
            {599, 24, 4.52580f, 2.33328f, -6.53400f, 6.46063f, -31.5128f}}},
        {"G0 fp32 tables", Gen::g0, "", false, 15, -7179.728, 109425.143, {
            {1, 51, -6.56314f, -0.78864f, 0.51717f, 7.22518f, -7.0016f},
            {599, 24, 4.52600f, 2.33324f, -6.53466f, 6.46093f, -31.5172f}}},
        {"G1 SSSL, bf16 tables", Gen::g1, "SSSL", true, 15, -4929.015, 107813.150, {
            {0, 24, 0.96927f, 2.73660f, -4.37484f, 7.65897f, 12.5673f},
            {1, 51, -5.66131f, -1.64467f, 0.74112f, 8.41407f, 10.4844f},
            {2, 31, 0.51209f, 3.19260f, -2.43602f, 6.41688f, -30.2351f},
            {129, 28, -0.97080f, 1.94532f, -2.07738f, 6.05561f, -45.6028f},
            {300, 24, 0.35922f, 1.69057f, -1.47698f, 7.48809f, 3.9326f},
            {599, 22, 4.16431f, 1.79560f, -5.29292f, 5.95589f, -17.0159f}}},
        {"G1 L, bf16 tables", Gen::g1, "L", true, 15, -4929.241, 107810.756, {
            {599, 22, 4.15135f, 1.80031f, -5.25233f, 5.94179f, -17.0103f}}},
        {"G1 SSSL, fp32 tables", Gen::g1, "SSSL", false, 15, -4928.781, 107813.230, {
            {1, 51, -5.66096f, -1.64577f, 0.74163f, 8.41330f, 10.4778f},
            {599, 22, 4.16446f, 1.79556f, -5.29346f, 5.95556f, -17.0176f}}},
        {"G2 cap 15, bf16 tables", Gen::g2, "SSSL", true, 15, -5769.242, 107867.680, {
            {0, 24, 1.63845f, 2.57051f, -4.19442f, 7.73156f, 6.2761f},
            {1, 51, -5.26753f, -2.62023f, 1.97188f, 8.76732f, 13.1989f},
            {2, 31, 1.26733f, 3.15229f, -2.26173f, 6.00037f, -38.2836f},
            {129, 28, -1.10167f, 2.01311f, -1.90295f, 5.70564f, -47.3224f},
            {300, 24, 0.29184f, 1.54223f, -1.18771f, 7.32273f, 2.6811f},
            {599, 22, 4.19422f, 1.81064f, -5.20298f, 5.91353f, -18.5444f}}},
        {"G2 cap 15, fp32 tables", Gen::g2, "SSSL", false, 15, -5769.004, 107867.694, {
            {1, 51, -5.26706f, -2.62145f, 1.97244f, 8.76641f, 13.1862f},
            {599, 22, 4.19433f, 1.81066f, -5.20343f, 5.91319f, -18.5465f}}},
        {"G2 cap 20, fp32 tables", Gen::g2, "SSSL", false, 20, -5874.988, 109198.379, {
            {0, 24, 1.64132f, 2.58164f, -4.24372f, 8.06593f, 5.8543f},
            {1, 51, -5.36645f, -2.63326f, 1.97744f, 9.27173f, 13.6110f},
            {2, 31, 1.26804f, 3.17335f, -2.26927f, 6.15082f, -39.1198f},
            {300, 24, 0.29222f, 1.54402f, -1.18855f, 7.60342f, 2.6210f},
            {599, 22, 4.24362f, 1.81453f, -5.29915f, 6.05571f, -19.3367f}}},
        {"G3 SSSL", Gen::g3, "SSSL", false, 15, -6245.962, 107445.997, {
            {0, 24, 1.77862f, 2.37050f, -4.27073f, 7.88124f, 5.4545f},
            {1, 51, -4.47688f, -2.71957f, 2.19661f, 9.46087f, 22.8259f},
            {2, 31, 1.30634f, 2.82348f, -1.86037f, 5.70075f, -43.0255f},
            {129, 48, -0.31148f, 1.60657f, -1.99760f, 5.33811f, -51.0367f},
            {300, 24, 0.06264f, 1.80018f, -1.52283f, 7.18750f, -1.3327f},
            {599, 22, 4.60835f, 2.05742f, -5.01144f, 5.46799f, -24.4219f}}},
        {"G4 SSSL", Gen::g4, "SSSL", false, 15, -4513.499, 106852.485, {
            {0, 24, 1.31289f, 1.92433f, -4.70031f, 8.81397f, 9.9110f},
            {1, 51, -5.24797f, -2.42836f, 1.86526f, 8.98002f, 16.7484f},
            {2, 31, -0.73798f, 2.08998f, -1.88412f, 6.21913f, -24.5233f},
            {127, 52, -5.78366f, -0.43781f, 3.39434f, 7.95391f, -8.8506f},
            {128, 30, -2.66651f, 0.01300f, -2.36837f, 4.09428f, -48.6962f},
            {129, 34, 2.05643f, -0.48298f, -3.93143f, 5.64168f, -51.1158f},
            {300, 24, -0.09391f, 0.60625f, -1.53698f, 7.32395f, 10.0784f},
            {599, 58, 3.12385f, 2.07039f, -4.39400f, 6.86441f, -23.6354f}}},
        {"G4 L", Gen::g4, "L", false, 15, -4544.184, 106928.653, {
            {300, 24, -0.00365f, 0.65440f, -1.57431f, 7.36304f, 9.7919f},
            {599, 58, 3.03674f, 2.13421f, -4.41227f, 6.98221f, -22.8366f}}},
        {"G2e SSSL, bf16 tables", Gen::g2e, "SSSL", true, 15, -6505.368, 108576.198, {
            {0, 24, 1.80167f, 2.64451f, -4.13652f, 7.55161f, 7.8058f},
            {1, 51, -5.87469f, -2.47631f, 2.40974f, 8.83795f, 6.3895f},
            {129, 31, 1.78465f, 2.40093f, -3.14011f, 5.78622f, -51.3456f},
            {300, 24, -0.14673f, 2.75434f, -1.89153f, 6.90345f, -2.7097f},
            {599, 58, 4.32134f, 1.55277f, -5.22438f, 5.82996f, -20.7168f}}},
    };
    // clang-format on
    return table;
}

std::shared_ptr<const Model> toy_model(Gen gen, const char* pattern, bool bf16_tables,
                                       float softcap = 15) {
    TempDir dir;
    const fs::path at = make_checkpoint(dir.path(), gen, kGolden);
    nanogpt::LoadOptions options;
    options.threads = 2;
    const bool windows = gen != Gen::g0 && gen != Gen::g0p;  // insisting on one there is refused
    if (windows && *pattern != '\0') options.overrides.window_pattern = pattern;
    options.overrides.bf16_rope_tables = bf16_tables;
    options.overrides.softcap = softcap;
    return nanogpt::load_model(at, options);
}

// ---- golden.json

std::vector<Token> tokens_of(const Json& list) {
    std::vector<Token> out;
    for (const Json& j : list.array) out.push_back(static_cast<Token>(j.number));
    return out;
}

std::vector<float> read_floats(const fs::path& file) {
    const std::string bytes = read_file(file);
    std::vector<float> out(bytes.size() / 4);
    for (std::size_t i = 0; i < out.size(); ++i) {
        out[i] = std::bit_cast<float>(
            static_cast<std::uint32_t>(nanogpt::detail::little_endian<4>(bytes_of(bytes), 4 * i)));
    }
    return out;
}

double log_probability(std::span<const float> logits, Token token) {
    double top = double{logits[0]}, sum = 0;
    for (const float x : logits) top = std::max(top, double{x});
    for (const float x : logits) sum += std::exp(double{x} - top);
    return double{logits[static_cast<std::size_t>(token)]} - top - std::log(sum);
}

struct Fixture {
    std::string name;
    bool bf16_tables;
    float softcap;
};

struct Worst {
    double logit = 0, log_probability = 0;
    int argmax_differs = 0;  // where the two best are further apart than 1e-3
};

Worst compare_sequences(const Model& model, const Json& golden, std::span<const float> want) {
    Worst worst;
    const auto V = static_cast<std::size_t>(model.config().vocab_size);
    for (const Json& sequence : golden.find("sequences")->array) {
        const std::vector<Token> ids = tokens_of(*sequence.find("ids"));
        const std::vector<float> logits = all_logits(model, ids);
        const auto row = [&](std::size_t t) { return std::span(logits).subspan(t * V, V); };
        auto at = static_cast<std::size_t>(sequence.find("logits_offset_floats")->number);
        for (const Token position : tokens_of(*sequence.find("logit_positions"))) {
            const auto d = difference(row(static_cast<std::size_t>(position)), want.subspan(at, V));
            worst.logit = std::max(worst.logit, d.largest);
            at += V;
        }
        const std::vector<Json>& logprobs = sequence.find("logprob_of_next")->array;
        const std::vector<Token> best = tokens_of(*sequence.find("argmax"));
        REQUIRE(best.size() == ids.size());
        for (std::size_t t = 0; t < ids.size(); ++t) {
            const int ours = argmax(row(t));
            const float margin =
                row(t)[static_cast<std::size_t>(ours)] - row(t)[static_cast<std::size_t>(best[t])];
            worst.argmax_differs += !(margin <= 1e-3f);
            if (t >= logprobs.size()) continue;
            const double d = std::abs(log_probability(row(t), ids[t + 1]) - logprobs[t].number);
            worst.log_probability = d <= worst.log_probability ? worst.log_probability : d;
        }
    }
    return worst;
}

// Steps of the greedy continuations that are equal up to the first near tie; checks them.
int compare_greedy(const Model& model, const Json& golden) {
    int equal = 0;
    for (const Json& one : golden.find("greedy")->array) {
        const std::vector<Token> want = tokens_of(*one.find("tokens"));
        const std::vector<Token> got = greedy(model, tokens_of(*one.find("prompt")), want.size());
        for (std::size_t i = 0; i < want.size(); ++i) {
            if (one.find("margin")->array[i].number < 1e-3) break;
            CHECK(got[i] == want[i]);
            if (got[i] != want[i]) break;
            ++equal;
        }
    }
    return equal;
}

std::shared_ptr<const Model> fixture_model(const fs::path& base, bool bf16_tables, float softcap) {
    const auto models = nanogpt::find_models(base);
    REQUIRE(models.size() == 1);
    REQUIRE(models[0].status == nanogpt::Status::ready);
    nanogpt::LoadOptions options;
    options.threads = 2;
    options.overrides.bf16_rope_tables = bf16_tables;
    options.overrides.softcap = softcap;
    return nanogpt::load_model(models[0], options);
}

}  // namespace

TEST_CASE("golden: the toy weights are those of the specification") {
    CHECK(fnv1a("transformer.wte.weight") == 0xDAC3CA0Eu);
    CHECK(fnv1a("lm_head.weight") == 0xAE5AB6EDu);
    CHECK(fnv1a("resid_lambdas") == 0x127D499Fu);
    const float wte[] = {-0.139789045f, 0.113797903f, 0.278929114f, -0.287487507f};
    const float lambdas[] = {-0.048714101f, -0.367834508f, 0.313240409f, -0.282983184f};
    for (std::uint32_t n = 0; n < 4; ++n) {
        CHECK(close(golden_unit(0xDAC3CA0Eu, n), wte[n], 1e-8));
        CHECK(close(golden_unit(0x127D499Fu, n), lambdas[n], 1e-8));
    }
    const std::vector<Token> ids = golden_ids(16);
    const std::vector<Token> want{5, 25, 59, 37, 29, 35, 55, 19, 67, 59, 65, 15, 49, 27, 19, 25};
    CHECK(ids == want);
}

TEST_CASE("golden: logits of the toy model agree with nanochat's in every generation") {
    const std::vector<Token> ids = golden_ids(600);
    for (const Golden& g : goldens()) {
        CAPTURE(g.name);
        const auto model = toy_model(g.gen, g.pattern, g.bf16_tables, g.softcap);
        const std::vector<float> logits = all_logits(*model, ids);
        REQUIRE(logits.size() == 600 * 70);
        double worst = 0, sum = 0, absolutes = 0;
        for (const GoldenRow& r : g.rows) {
            CAPTURE(r.p);
            const auto row = std::span(logits).subspan(static_cast<std::size_t>(r.p) * 70, 70);
            double row_sum = 0;
            for (const float x : row) row_sum += double{x};
            const float got[] = {row[0], row[1], row[69],
                                 *std::max_element(row.begin(), row.end())};
            const float want[] = {r.l0, r.l1, r.l69, r.max};
            CHECK(close(got, want, kToy));
            CHECK(argmax(row) == r.argmax);
            CHECK(std::abs(row_sum - double{r.sum}) <= 5 * kToy);
            worst = std::max(worst, difference(got, want).largest);
        }
        for (const float x : logits) sum += double{x}, absolutes += std::abs(double{x});
        CHECK(std::abs(sum - g.sum) <= 0.1);
        CHECK(std::abs(absolutes - g.sum_of_absolutes) <= 0.1);
        std::printf("golden %-24s largest difference %.1e, of the totals %.1e %.1e\n",
                    g.name.c_str(), worst, std::abs(sum - g.sum),
                    std::abs(absolutes - g.sum_of_absolutes));
    }
}

TEST_CASE("golden: the residual stream of G4 agrees after every block") {
    struct Row {
        int layer, p;  // layer -1: the row of wte
        float first[4], sum;
    };
    static const Row kRows[] = {{-1, 0, {0.17783f, 0.06464f, -0.28336f, -0.70912f}, 0.5014f},
                                {-1, 1, {0.24507f, 0.21379f, 0.12961f, -0.43645f}, -5.4927f},
                                {-1, 299, {0.46195f, -0.41318f, 0.04327f, -0.99271f}, -7.7541f},
                                {0, 0, {0.60053f, -0.64313f, -0.22970f, -2.08442f}, -2.4378f},
                                {0, 1, {1.12497f, 2.08429f, -0.07332f, -0.25625f}, -9.0665f},
                                {0, 299, {-1.24176f, -1.19538f, 2.04612f, -0.67757f}, -19.8946f},
                                {1, 0, {2.49780f, -1.83642f, 1.22244f, -4.06120f}, -1.3490f},
                                {1, 1, {1.89235f, -0.87105f, 2.04222f, -2.48909f}, -5.9176f},
                                {1, 299, {-0.49977f, -5.41143f, 2.66470f, -1.12091f}, -21.9149f},
                                {2, 0, {3.06844f, -3.74270f, -2.93378f, -4.68820f}, -27.3381f},
                                {2, 1, {1.88601f, 0.82911f, 0.09389f, -3.03856f}, -11.4535f},
                                {2, 299, {-1.02229f, -2.17089f, 1.76957f, -1.93398f}, -13.1314f},
                                {3, 0, {2.17194f, -2.23230f, -3.71070f, -3.02166f}, -16.3182f},
                                {3, 1, {0.28348f, 0.87229f, -0.05664f, -2.99102f}, -21.4410f},
                                {3, 299, {-1.75599f, -2.59464f, 2.87699f, -3.53356f}, -18.0912f}};
    const auto model = toy_model(Gen::g4, "SSSL", false);
    const std::vector<Token> ids = golden_ids(300);
    Keep blocks(HookPoint::resid_post), embed(HookPoint::embed);
    for (Keep* keep : {&blocks, &embed}) {
        KVCache cache(*model, 300);
        nanogpt::forward(*model, cache, ids, keep);
    }
    REQUIRE(blocks.values.size() == 4);
    for (const Row& r : kRows) {
        CAPTURE(r.layer);
        CAPTURE(r.p);
        const std::vector<float>& all =
            r.layer < 0 ? embed.values[0] : blocks.values[static_cast<std::size_t>(r.layer)];
        const auto row = std::span(all).subspan(static_cast<std::size_t>(r.p) * 32, 32);
        float sum = 0;
        for (const float x : row) sum += x;
        CHECK(close(row.first(4), r.first, kToy));
        CHECK(close(sum, r.sum, kToy));
    }
}

TEST_CASE("golden: greedy continuations of the toy model are nanochat's") {
    struct Case {
        Gen gen;
        std::vector<const char*> patterns;
        bool bf16_tables;
        std::vector<Token> want;
    };
    // clang-format off
    const std::vector<Token> g2{51, 39, 52, 66, 60, 44, 45, 44, 45, 44, 45, 44, 45, 44, 45, 44, 45, 44, 45, 44, 45, 44, 45, 44};
    const Case cases[] = {
        {Gen::g0, {""}, true, {48, 28, 53, 24, 24, 24, 45, 55, 24, 24, 51, 39, 52, 65, 27, 51, 39, 52, 0, 60, 29, 24, 45, 55}},
        {Gen::g1, {"SSSL", "L"}, true, {51, 39, 52, 66, 60, 29, 22, 49, 22, 41, 55, 24, 45, 55, 24, 45, 55, 24, 45, 55, 24, 45, 55, 24}},
        {Gen::g2, {"SSSL"}, true, g2},
        {Gen::g3, {"SSSL"}, false, g2},
        {Gen::g4, {"SSSL", "L"}, false, {51, 18, 54, 55, 24, 45, 31, 51, 22, 41, 49, 22, 46, 55, 24, 45, 31, 51, 22, 41, 49, 46, 46, 46}},
        {Gen::g2e, {"SSSL"}, true, {51, 39, 52, 56, 65, 61, 37, 24, 45, 55, 24, 45, 31, 51, 39, 52, 63, 29, 22, 49, 22, 41, 52, 66}}};
    // clang-format on
    const std::vector<Token> prompt = golden_ids(16);
    for (const Case& c : cases) {
        CAPTURE(std::string(name_of(c.gen)));
        for (const char* pattern : c.patterns) {
            CHECK(greedy(*toy_model(c.gen, pattern, c.bf16_tables), prompt, 24) == c.want);
        }
    }
    CHECK(greedy(*toy_model(Gen::g2, "SSSL", false, 20), prompt, 24) == g2);
}

TEST_CASE("golden: cached decoding equals the full forward at the end of 600 tokens") {
    const std::vector<Token> ids = golden_ids(600);
    for (const Gen gen : kAllGenerations) {
        CAPTURE(std::string(name_of(gen)));
        const auto model = toy_model(gen, "SSSL", false);
        const std::vector<float> full = all_logits(*model, ids);
        KVCache cache(*model, 600);
        nanogpt::forward(*model, cache, std::span(ids).first(590));
        for (std::size_t t = 590; t < 600; ++t) {
            const auto row = nanogpt::forward(*model, cache, std::span(ids).subspan(t, 1));
            CHECK(same_bits(row, std::span(full).subspan(t * 70, 70)));
        }
    }
}

TEST_CASE("golden: seven fixtures trained and saved by nanochat agree with its own logits") {
    const fs::path shared = shared_dir();
    if (shared.empty()) {
        MESSAGE("skipped: no shared fixtures");
        return;
    }
    const Fixture fixtures[] = {{"oct25", true, 15}, {"dec25", true, 15},  {"jan15", true, 15},
                                {"jan30", true, 15}, {"mar04", false, 20}, {"mar09", false, 15},
                                {"jul26", false, 15}};
    for (const Fixture& f : fixtures) {
        CAPTURE(f.name);
        const fs::path base = shared / "fixtures" / f.name;
        const Json golden = nanogpt::parse_json(read_file(base / "golden/golden.json"));
        const std::vector<float> want = read_floats(base / "golden/logits.f32");
        const auto model = fixture_model(base, f.bf16_tables, f.softcap);
        const Worst worst = compare_sequences(*model, golden, want);
        CHECK(worst.logit <= kFixture);
        CHECK(worst.log_probability <= kFixture);
        CHECK(worst.argmax_differs == 0);
        const int equal = compare_greedy(*model, golden);
        const auto other = fixture_model(base, !f.bf16_tables, f.softcap);
        const double otherwise = compare_sequences(*other, golden, want).logit;
        CHECK(otherwise > worst.logit);  // so the kind of table is told apart
        std::printf(
            "fixture %s: logits %.1e, log-probabilities %.1e, %d greedy steps equal; logits %.1e "
            "with "
            "the other rotary table\n",
            f.name.c_str(), worst.logit, worst.log_probability, equal, otherwise);
    }
}

TEST_CASE("golden: the base sample model continues greedily as nanochat does") {
    const fs::path shared = shared_dir();
    if (shared.empty()) {
        MESSAGE("skipped: no shared sample");
        return;
    }
    const fs::path sample = shared / "sample";
    const auto model = nanogpt::load_model(sample / "base_checkpoints/d4");
    const auto tokenizer = nanogpt::load_tokenizer(find_tokenizer(model->info()));
    for (const Json& one : nanogpt::parse_json(read_file(sample / "golden/base.json")).array) {
        const std::string& text = one.find("prompt")->string;
        CAPTURE(text);
        std::vector<Token> prompt{tokenizer.special("<|bos|>")};
        for (const Token t : tokenizer.encode(text)) prompt.push_back(t);
        const std::vector<Token> want = tokens_of(*one.find("ids"));
        REQUIRE(prompt.size() < want.size());
        std::vector<Token> got = prompt;
        for (const Token t : greedy(*model, prompt, want.size() - prompt.size())) got.push_back(t);
        CHECK(got == want);
        CHECK(tokenizer.decode(std::span(got).subspan(1)) == one.find("text")->string);
    }
}

TEST_CASE("golden: the chat sample answers token for token as nanochat does, calculator included") {
    const auto model = nanogpt::load_model(sample_dir() / "chatsft_checkpoints/d4");
    const auto tokenizer = nanogpt::load_tokenizer(find_tokenizer(model->info()));
    const auto backend = nanogpt::open_cpu(model);
    const auto sequence = backend->new_sequence(1024);
    const Json golden = nanogpt::parse_json(read_file(data_dir() / "chat.json"));
    nanogpt::GenerateParams params;
    params.max_tokens = static_cast<int>(golden.find("max_tokens")->number);
    params.sampling.temperature = 0;
    params.stop = nanogpt::chat_stop_tokens(tokenizer);
    for (const Json& one : golden.find("conversations")->array) {
        std::vector<nanogpt::Message> messages;
        for (const Json& m : one.find("messages")->array) {
            const std::string& role = m.find("role")->string;
            messages.push_back({role == "system" ? nanogpt::Role::system
                                : role == "user" ? nanogpt::Role::user
                                                 : nanogpt::Role::assistant,
                                m.find("content")->string});
        }
        CAPTURE(messages.back().content);
        const std::vector<Token> want = tokens_of(*one.find("generated_ids"));
        if (quick() && want.size() > 50) continue;
        const std::vector<Token> prompt = nanogpt::render_chat(tokenizer, messages);
        CHECK(prompt == tokens_of(*one.find("prompt_ids")));
        nanogpt::CalculatorTool tool(tokenizer);
        std::vector<Token> got, sampled;
        nanogpt::generate(
            *backend, *sequence, prompt, params,
            [&](nanogpt::Generated g) {
                got.push_back(g.token);
                sampled.push_back(g.forced ? 0 : 1);
                return true;
            },
            &tool);
        CHECK(got == want);
        CHECK(sampled == tokens_of(*one.find("sampled_mask")));
    }
}

TEST_CASE("golden: a Chat gives the same answers as the engine, over several turns") {
    const auto model = nanogpt::load_model(sample_dir() / "chatsft_checkpoints/d4");
    const auto tokenizer = nanogpt::load_tokenizer(find_tokenizer(model->info()));
    const auto backend = nanogpt::open_cpu(model);
    nanogpt::GenerateParams params;
    params.max_tokens = 200;
    params.sampling.temperature = 0;
    nanogpt::Chat chat(*backend, tokenizer, params);
    const Json golden = nanogpt::parse_json(read_file(data_dir() / "chat.json"));
    for (const std::size_t i : {0u, 2u, 5u}) {  // single questions, one with the calculator
        const Json& one = golden.find("conversations")->array[i];
        chat.reset();
        std::string text;
        chat.reply(one.find("messages")->array[0].find("content")->string, [&](std::string_view s) {
            text += s;
            return true;
        });
        const std::vector<Token> want = tokens_of(*one.find("generated_ids"));
        CHECK(std::vector<Token>(chat.answer().begin(), chat.answer().end()) == want);
        const std::vector<Token> mask = tokens_of(*one.find("sampled_mask"));
        for (std::size_t t = 0; t < mask.size() && t < chat.answer_forced().size(); ++t) {
            CHECK(chat.answer_forced()[t] == (mask[t] == 0));
        }
        CHECK(!contains(text, "<|"));
    }
}
