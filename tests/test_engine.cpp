// The engine, with a backend that counts instead of computing: what is fed, when it stops, what stays.
#include "helpers.hpp"

using namespace test;
using nanogpt::Backend;
using nanogpt::Chunk;
using nanogpt::generate;
using nanogpt::Generated;
using nanogpt::GenerateParams;
using nanogpt::Sequence;
using nanogpt::StopReason;
using nanogpt::Token;

namespace {

struct MockSequence : Sequence {
    explicit MockSequence(int n) : capacity_(n) {}
    std::span<const Token> tokens() const override { return tokens_; }
    int capacity() const override { return capacity_; }
    void rewind(int length) override {
        if (length < 0 || length > static_cast<int>(tokens_.size())) {
            throw nanogpt::Error(nanogpt::ErrorKind::usage, "rewind");
        }
        tokens_.resize(static_cast<std::size_t>(length));
    }
    std::vector<Token> tokens_;
    int capacity_;
};

// After token t the likeliest is t + 1, modulo the vocabulary of 100.
struct MockBackend : Backend {
    MockBackend() { config_.vocab_size = 100; }
    const nanogpt::Config& config() const override { return config_; }
    std::string device() const override { return "mock"; }
    nanogpt::DType dtype() const override { return DType::f32; }
    std::unique_ptr<Sequence> new_sequence(int capacity) override {
        return std::make_unique<MockSequence>(capacity);
    }
    std::span<const float> step(std::span<const Chunk> batch, nanogpt::Observer*) override {
        if (++steps == fail_at)
            throw nanogpt::Error(nanogpt::ErrorKind::device, "the device failed");
        logits.assign(100 * batch.size(), 0.0f);
        for (std::size_t i = 0; i < batch.size(); ++i) {
            auto& sequence = dynamic_cast<MockSequence&>(*batch[i].sequence);
            for (const Token t : batch[i].tokens) sequence.tokens_.push_back(t);
            if (static_cast<int>(sequence.tokens_.size()) > sequence.capacity_)
                throw std::logic_error("full");
            fed += batch[i].tokens.size();
            prompts += batch[i].prompt ? batch[i].tokens.size() : 0;
            longest = std::max(longest, batch[i].tokens.size());
            logits[100 * i + static_cast<std::size_t>((batch[i].tokens.back() + 1) % 100)] = 5;
        }
        return logits;
    }
    nanogpt::Config config_;
    std::vector<float> logits;
    std::size_t fed = 0, longest = 0, prompts = 0;
    int steps = 0, fail_at = -1;
};

// Forces a list of tokens once it has seen `after`.
struct MockTool : nanogpt::Tool {
    void on_token(Token t) override {
        seen.push_back(t);
        if (t == after) queue = forced;
    }
    std::optional<Token> next_forced() override {
        if (queue.empty()) return std::nullopt;
        const Token t = queue.front();
        queue.erase(queue.begin());
        return t;
    }
    Token after = -1;
    std::vector<Token> forced, queue, seen;
};

GenerateParams greedy(int max_tokens, std::vector<Token> stop = {}) {
    GenerateParams p;
    p.max_tokens = max_tokens;
    p.sampling.temperature = 0;
    p.stop = std::move(stop);
    return p;
}

struct Run {
    StopReason reason;
    std::vector<Token> tokens;
    std::vector<bool> forced;
};

Run run(Backend& backend, Sequence& sequence, const std::vector<Token>& prompt,
        const GenerateParams& params, nanogpt::Tool* tool = nullptr,
        std::size_t cancel_after = 1000) {
    Run out{};
    out.reason = generate(
        backend, sequence, prompt, params,
        [&](Generated g) {
            out.tokens.push_back(g.token);
            out.forced.push_back(g.forced);
            return out.tokens.size() < cancel_after;
        },
        tool);
    return out;
}

using Tokens = std::vector<Token>;

}  // namespace

TEST_CASE("engine: an answer ends after max_tokens, and the last token is not read") {
    MockBackend backend;
    const auto sequence = backend.new_sequence(50);
    const Run r = run(backend, *sequence, {1, 2, 3}, greedy(4));
    CHECK(r.reason == StopReason::max_tokens);
    CHECK(r.tokens == Tokens{4, 5, 6, 7});
    CHECK(backend.fed == 3 + 3);
    CHECK(sequence->tokens().size() == 6);
}

TEST_CASE("engine: no tokens are generated when none are asked for") {
    MockBackend backend;
    const auto sequence = backend.new_sequence(50);
    const Run r = run(backend, *sequence, {1}, greedy(0));
    CHECK(r.reason == StopReason::max_tokens);
    CHECK(r.tokens.empty());
}

TEST_CASE("engine: an answer ends after any stop token, which is shown as nanochat yields it") {
    MockBackend backend;
    const auto sequence = backend.new_sequence(50);
    Run r = run(backend, *sequence, {1}, greedy(20, {90, 5, 7}));
    CHECK(r.reason == StopReason::stop_token);
    CHECK(r.tokens == Tokens{2, 3, 4, 5});
    r = run(backend, *sequence, {4}, greedy(20, {5}));
    CHECK(r.tokens == Tokens{5});
}

TEST_CASE("engine: a stop token on the last allowed place counts as a stop") {
    MockBackend backend;
    const auto sequence = backend.new_sequence(50);
    CHECK(run(backend, *sequence, {1}, greedy(3, {4})).reason == StopReason::stop_token);
}

TEST_CASE("engine: returning false cancels after that token") {
    MockBackend backend;
    const auto sequence = backend.new_sequence(50);
    const Run r = run(backend, *sequence, {1}, greedy(20), nullptr, 3);
    CHECK(r.reason == StopReason::cancelled);
    CHECK(r.tokens == Tokens{2, 3, 4});
    CHECK(sequence->tokens().size() == 3);  // 1 2 3
}

TEST_CASE("engine: an answer ends when the context is full") {
    MockBackend backend;
    const auto sequence = backend.new_sequence(5);
    const Run r = run(backend, *sequence, {1, 2, 3}, greedy(20));
    CHECK(r.reason == StopReason::context_full);
    CHECK(r.tokens == Tokens{4, 5, 6});
    CHECK(sequence->tokens().size() == 5);
    const Run full = run(backend, *sequence, {1, 2, 3, 4, 5}, greedy(20));
    CHECK(full.reason == StopReason::context_full);
    CHECK(full.tokens == Tokens{6});
}

TEST_CASE("engine: a prompt longer than the context is refused, and the sequence still works") {
    MockBackend backend;
    const auto sequence = backend.new_sequence(3);
    const std::string why = error_of([&] { run(backend, *sequence, {1, 2, 3, 4}, greedy(5)); });
    CHECK(contains(why, "4 tokens"));
    CHECK(error_of([&] { run(backend, *sequence, {}, greedy(5)); }) != "");
    CHECK(run(backend, *sequence, {1}, greedy(2)).tokens == Tokens{2, 3});
}

TEST_CASE("engine: what the sequence holds of a prompt is not read again") {
    MockBackend backend;
    const auto sequence = backend.new_sequence(50);
    run(backend, *sequence, {1, 2, 3, 4}, greedy(3));  // holds 1 2 3 4 5 6
    struct Case {
        Tokens prompt;
        std::size_t fed;
        Token next;
    };
    const Case cases[] = {
        {{1, 2, 3, 4, 5, 6, 7, 20}, 2, 21},  // its own answer and a new question
        {{1, 2, 3, 4, 5, 6, 7, 20}, 1, 21},  // the same again: only the last, for its logits
        {{1, 2, 3, 4}, 1, 5},                // a prefix of it
        {{1, 2, 30, 4}, 2, 5},               // differs in the middle
        {{9, 2, 3, 4}, 4, 5},                // differs at once
        {{9}, 1, 10},
    };
    for (const Case& c : cases) {
        CAPTURE(c.prompt.size());
        backend.fed = 0;
        const Run r = run(backend, *sequence, c.prompt, greedy(1));
        CHECK(backend.fed == c.fed);
        CHECK(r.tokens == Tokens{c.next});
        CHECK(Tokens(sequence->tokens().begin(), sequence->tokens().end()) == c.prompt);
    }
}

TEST_CASE("engine: a long prompt is read in pieces, each token once") {
    MockBackend backend;
    const auto sequence = backend.new_sequence(5000);
    const Tokens prompt(3000, 7);
    run(backend, *sequence, prompt, greedy(1));
    CHECK(backend.fed == 3000);
    CHECK(backend.longest <= 1024);
    CHECK(sequence->tokens().size() == 3000);
    CHECK(backend.prompts == 3000);  // the last piece too is one of a prompt
    run(backend, *sequence, {1}, greedy(3));
    CHECK(backend.prompts == 3001);  // a prompt of one token is a prompt, what is drawn is none
}

TEST_CASE(
    "engine: a tool's tokens replace the sampled ones, are shown, and are read by the model") {
    MockBackend backend;
    const auto sequence = backend.new_sequence(50);
    MockTool tool;
    tool.after = 4;
    tool.forced = {50, 60, 70};
    const Run r = run(backend, *sequence, {1}, greedy(8), &tool);
    CHECK(r.tokens == Tokens{2, 3, 4, 50, 60, 70, 71, 72});
    CHECK(r.forced == std::vector<bool>{false, false, false, true, true, true, false, false});
    CHECK(tool.seen == r.tokens);
    CHECK(r.reason == StopReason::max_tokens);
    CHECK(sequence->tokens().size() == 8);
}

TEST_CASE("engine: a forced token may be a stop token, and counts toward max_tokens") {
    MockBackend backend;
    const auto sequence = backend.new_sequence(50);
    MockTool tool;
    tool.after = 2;
    tool.forced = {50, 60};
    CHECK(run(backend, *sequence, {1}, greedy(20, {60}), &tool).tokens == Tokens{2, 50, 60});
    tool.queue.clear();
    CHECK(run(backend, *sequence, {1}, greedy(2), &tool).tokens == Tokens{2, 50});
}

TEST_CASE("engine: forced tokens take their random numbers, so what follows them is the same") {
    struct Flat : MockBackend {  // every token equally likely
        std::span<const float> step(std::span<const Chunk> batch, nanogpt::Observer* o) override {
            MockBackend::step(batch, o);
            logits.assign(logits.size(), 0.0f);
            return logits;
        }
    } backend;
    GenerateParams params = greedy(10);
    params.sampling.temperature = 1;
    const auto sequence = backend.new_sequence(50);
    const Run plain = run(backend, *sequence, {1}, params);
    struct Third : nanogpt::Tool {
        void on_token(Token) override { ++n; }
        std::optional<Token> next_forced() override {
            return n == 2 ? std::optional<Token>(99) : std::nullopt;
        }
        int n = 0;
    } tool;
    const Run with = run(backend, *sequence, {1}, params, &tool);
    for (std::size_t i = 0; i < 10; ++i) CHECK(with.tokens[i] == (i == 2 ? 99 : plain.tokens[i]));
    CHECK(run(backend, *sequence, {1}, params).tokens == plain.tokens);
    params.sampling.seed = 7;
    CHECK(run(backend, *sequence, {1}, params).tokens != plain.tokens);
}

TEST_CASE("engine: samples of one prompt differ by their stream") {
    MockBackend backend;
    const auto sequence = backend.new_sequence(50);
    GenerateParams params = greedy(10);
    params.sampling.temperature = 50;
    const auto sample = [&](std::uint64_t stream) {
        Tokens out;
        const Tokens prompt{1};
        generate(
            backend, *sequence, prompt, params,
            [&](Generated g) {
                out.push_back(g.token);
                return true;
            },
            nullptr, stream);
        return out;
    };
    CHECK(sample(0) == sample(0));
    CHECK(sample(0) != sample(1));
    CHECK(sample(1) != sample(2));
}

TEST_CASE("engine: a step that fails is reported, and the sequence goes on from where it was") {
    MockBackend backend;
    const auto sequence = backend.new_sequence(50);
    const Tokens want = run(backend, *sequence, {1, 2, 3}, greedy(5)).tokens;
    for (int fail_at = 1; fail_at <= 5; ++fail_at) {
        CAPTURE(fail_at);
        sequence->rewind(0);
        backend.steps = 0;
        backend.fail_at = fail_at;
        CHECK(contains(error_of([&] { run(backend, *sequence, {1, 2, 3}, greedy(5)); }), "failed"));
        CHECK(sequence->tokens().size() ==
              (fail_at == 1 ? 0u : 3u + static_cast<std::size_t>(fail_at) - 2));
        backend.fail_at = -1;
        CHECK(run(backend, *sequence, {1, 2, 3}, greedy(5)).tokens == want);
    }
}

TEST_CASE(
    "engine: an exception of the caller's function passes through and leaves a usable sequence") {
    MockBackend backend;
    const auto sequence = backend.new_sequence(50);
    const Tokens prompt{1};
    CHECK_THROWS_AS(generate(backend, *sequence, prompt, greedy(5),
                             [](Generated) -> bool { throw std::runtime_error("mine"); }),
                    std::runtime_error);
    CHECK(run(backend, *sequence, prompt, greedy(2)).tokens == Tokens{2, 3});
}

TEST_CASE("engine: bad sampling parameters are refused before anything is read") {
    MockBackend backend;
    const auto sequence = backend.new_sequence(50);
    GenerateParams params = greedy(5);
    params.sampling.temperature = -1;
    CHECK(contains(error_of([&] { run(backend, *sequence, {1}, params); }), "temperature"));
    CHECK(backend.steps == 0);
}
