// tools/walkthrough.cpp against nanogpt::forward: the same logits to the last bit, after every token.
#include <cmath>    // exp
#include <cstdio>   // sscanf
#include <sstream>  // istringstream

#include "helpers.hpp"

// The program's main becomes a function that a test can call.
#define main walkthrough_main
#include "../tools/walkthrough.cpp"
#undef main

using namespace test;
using nanogpt::HookPoint;
using nanogpt::KVCache;
using nanogpt::LoadOptions;
using nanogpt::Model;
using nanogpt::Token;

namespace {

// Logits (T, V) of all positions, read in one piece.
struct AllLogits : nanogpt::Observer {
    bool wants(HookPoint point, int) override { return point == HookPoint::logits; }
    void on(const nanogpt::Activation& a) override {
        values.assign(a.values.begin(), a.values.end());
    }
    std::vector<float> values;
};

std::vector<Token> ids_of(int vocab_size, int T) {
    Random random(7);
    std::vector<Token> ids;
    for (int t = 0; t < T; ++t)
        ids.push_back(static_cast<Token>(random.below(static_cast<std::size_t>(vocab_size))));
    return ids;
}

// How many positions have another bit, of ids.size().
int different(const Model& model, std::span<const Token> ids) {
    const auto V = static_cast<std::size_t>(model.config().vocab_size);
    KVCache cache(model, static_cast<int>(ids.size()));
    AllLogits want;
    nanogpt::forward(model, cache, ids, &want);
    REQUIRE(want.values.size() == ids.size() * V);
    walkthrough::State state;
    int wrong = 0;
    for (std::size_t t = 0; t < ids.size(); ++t) {
        const std::vector<float> got = walkthrough::forward(model, state, ids[t]);
        wrong += !same_bits(got, std::span(want.values).subspan(t * V, V));
        REQUIRE(close(got, got, 0));  // all are numbers
    }
    return wrong;
}

std::shared_ptr<const Model> toy(Gen gen, const Shape& shape, Save save, LoadOptions options) {
    TempDir dir;
    options.threads = 2;
    return nanogpt::load_model(make_checkpoint(dir.path(), gen, shape, save), options);
}

const Shape kShapes[] = {
    // S, V, L, H, K, D, pattern
    {24, 71, 3, 4, 2, 40, "SL"},    // head size 10
    {16, 66, 5, 3, 1, 36, "SSL"},   // three queries of one key
    {40, 129, 1, 6, 6, 36, "S"},    // one layer
    {9, 65, 4, 16, 4, 32, "SSSL"},  // heads of 2
    {32, 320, 2, 4, 2, 64, "SL"},   // head size 16, no padding
};

}  // namespace

TEST_CASE("walkthrough: the logits are forward's to the last bit, in all generations") {
    const int T = quick() ? 12 : 45;  // beyond most contexts and all short windows
    for (const Gen gen : kAllGenerations) {
        int compared = 0, wrong = 0;
        for (const Shape& shape : kShapes) {
            for (const Save save : {Save::f32, Save::trained}) {
                CAPTURE(name_of(gen));
                CAPTURE(shape.n_embd);
                LoadOptions options;
                if (gen >= Gen::g1) options.overrides.short_window = 7;
                const auto model = toy(gen, shape, save, options);
                const int here = different(*model, ids_of(shape.vocab_size, T));
                CHECK(here == 0);
                wrong += here, compared += T;
            }
        }
        std::printf("walkthrough %-3s %d tokens, %d with other logits\n", name_of(gen), compared,
                    wrong);
    }
}

TEST_CASE("walkthrough: what a user insists on is followed") {
    LoadOptions options;
    options.dtype = nanogpt::DType::bf16;
    options.overrides.bf16_rope_tables = true;
    options.overrides.softcap = 120.0f;  // another way through ops::softcap
    options.overrides.rope_base = 500.0f;
    options.overrides.qk_scale = 0.8f;
    options.overrides.short_window = 3;
    options.overrides.sequence_len = 11;
    for (const Gen gen : {Gen::g2e, Gen::g4})
        CHECK(different(*toy(gen, kShapes[0], Save::f32, options), ids_of(71, 40)) == 0);
}

TEST_CASE("walkthrough: the bundled model, and trained ones of every generation") {
    const auto sample = nanogpt::load_model(sample_dir() / "chatsft_checkpoints" / "d4");
    CHECK(different(*sample, ids_of(sample->config().vocab_size, quick() ? 20 : 150)) == 0);
    const fs::path shared = shared_dir();
    if (shared.empty()) {
        MESSAGE("skipped: the trained fixtures; ../shared and $NANOGPT_SHARED are not there");
        return;
    }
    int models = 0;
    for (const char* name : {"oct25", "dec25", "jan15", "jan30", "mar04", "mar09", "jul26"}) {
        CAPTURE(name);
        const auto found = nanogpt::find_models(shared / "fixtures" / name);
        REQUIRE(found.size() == 1);
        const auto model = nanogpt::load_model(found[0]);
        CHECK(different(*model, ids_of(model->config().vocab_size, quick() ? 12 : 60)) == 0);
        ++models;
    }
    std::printf("walkthrough: %d trained models\n", models);
}

TEST_CASE("walkthrough: the program prints the five likeliest tokens, or what is wrong") {
    const TempDir dir;
    const fs::path model = sample_dir() / "chatsft_checkpoints" / "d4";
    const fs::path pickle = sample_dir() / "tokenizer" / "tokenizer.pkl";
    const auto run = [&](std::vector<std::string> args) {  // exit code; the output goes to a file
        std::vector<char*> argv;
        for (std::string& arg : args) argv.push_back(arg.data());
        std::fflush(stdout);
        const int out = ::dup(1), file = ::creat((dir / "out").c_str(), 0600);
        ::dup2(file, 1);
        const int code = walkthrough_main(static_cast<int>(argv.size()), argv.data());
        std::fflush(stdout);
        ::dup2(out, 1), ::close(out), ::close(file);
        return code;
    };
    REQUIRE(run({"walkthrough", model, pickle, "Why is the sky"}) == 0);
    const auto backend = nanogpt::open_cpu(nanogpt::load_model(model));
    const auto sequence = backend->new_sequence(16);
    const auto tokenizer = nanogpt::load_tokenizer(pickle);
    std::vector<Token> ids = tokenizer.encode("Why is the sky");
    ids.insert(ids.begin(), tokenizer.special("<|bos|>"));
    const auto logits = nanogpt::prefill(*backend, *sequence, ids);
    std::vector<Token> order(logits.size());
    for (std::size_t i = 0; i < order.size(); ++i) order[i] = static_cast<Token>(i);
    std::ranges::stable_sort(order, std::greater<>(),
                             [&](Token id) { return logits[static_cast<std::size_t>(id)]; });
    double sum = 0;
    for (const float x : logits) sum += std::exp(double{x});
    std::istringstream lines(read_file(dir / "out"));
    std::string line;
    for (std::size_t n = 0; std::getline(lines, line); ++n) {
        double percent = 0;
        Token id = -1;
        REQUIRE(std::sscanf(line.c_str(), "%lf %% %d", &percent, &id) == 2);
        REQUIRE(n < 5);
        CHECK(id == order[n]);
        const double want = 100 * std::exp(double{logits[static_cast<std::size_t>(id)]}) / sum;
        CHECK(std::abs(percent - want) <= 0.006);
        CHECK(contains(line, nanogpt::detail::quote(tokenizer.piece(id))));
    }
    CHECK(std::ranges::count(read_file(dir / "out"), '\n') == 5);
    CHECK(run({"walkthrough", model, pickle}) == 2);
    CHECK(run({"walkthrough", "no/model", pickle, "x"}) == 1);
}
