// From logits to a token: ties, cuts, determinism, and the distribution that is drawn from.
#include <cmath>  // exp

#include "helpers.hpp"

using namespace test;
using nanogpt::Sampler;
using nanogpt::SamplingParams;
using nanogpt::Token;

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

SamplingParams params(float temperature, int top_k = 0, float top_p = 1, std::uint64_t seed = 42) {
    return {temperature, top_k, top_p, seed};
}

std::vector<Token> draw(Sampler sampler, std::span<const float> logits, int n) {
    std::vector<Token> out;
    for (int i = 0; i < n; ++i) out.push_back(sampler.sample(logits));
    return out;
}

std::vector<double> counts(std::span<const Token> tokens, std::size_t vocabulary) {
    std::vector<double> out(vocabulary);
    for (const Token t : tokens) ++out[static_cast<std::size_t>(t)];
    return out;
}

std::vector<double> softmax(std::span<const float> logits, double temperature) {
    std::vector<double> p;
    double sum = 0;
    for (const float x : logits) p.push_back(std::exp(double{x} / temperature)), sum += p.back();
    for (double& x : p) x /= sum;
    return p;
}

// Pearson's statistic; about as large as the number of free cells if the draws follow p.
double chi_square(std::span<const double> seen, std::span<const double> p, double draws) {
    double sum = 0;
    for (std::size_t i = 0; i < p.size(); ++i) {
        if (p[i] > 0) sum += (seen[i] - draws * p[i]) * (seen[i] - draws * p[i]) / (draws * p[i]);
    }
    return sum;
}

std::vector<float> some_logits(std::size_t n) {
    Random random(7);
    std::vector<float> out;
    for (std::size_t i = 0; i < n; ++i) out.push_back(6 * random.uniform() - 2);
    return out;
}

}  // namespace

TEST_CASE("sample: at temperature 0 the largest logit wins, of equal ones the lowest id") {
    const std::vector<float> logits{1, 3, -2, 3, 3};
    CHECK(draw(Sampler(params(0)), logits, 5) == std::vector<Token>(5, 1));
    CHECK(Sampler::argmax(std::vector<float>(4, 0.0f)) == 0);
    CHECK(Sampler::argmax(std::vector<float>{-5, -4}) == 1);
    CHECK(Sampler::argmax(std::vector<float>{-0.0f, 0.0f}) == 0);
}

TEST_CASE("sample: a cut to one token is greedy at any temperature") {
    const std::vector<float> logits{1, 3, -2, 3, 2.9f};
    CHECK(draw(Sampler(params(1, 1)), logits, 50) == std::vector<Token>(50, 1));
    CHECK(draw(Sampler(params(1000, 1)), logits, 50) == std::vector<Token>(50, 1));
    CHECK(draw(Sampler(params(1, 0, 1e-6f)), logits, 50) == std::vector<Token>(50, 1));
}

TEST_CASE("sample: top-k leaves exactly k tokens, the lowest ids among equal ones") {
    const std::vector<float> logits(10, 1.0f);
    for (int k = 1; k <= 10; ++k) {
        const auto seen = counts(draw(Sampler(params(1, k)), logits, 2000), 10);
        for (std::size_t i = 0; i < 10; ++i)
            CHECK((seen[i] > 0) == (i < static_cast<std::size_t>(k)));
    }
    const std::vector<float> mixed{0, 2, 1, 2, -1, 1};
    const auto seen = counts(draw(Sampler(params(5, 3)), mixed, 2000), 6);
    const bool want[] = {false, true, true, true, false, false};
    for (std::size_t i = 0; i < 6; ++i) CHECK((seen[i] > 0) == want[i]);
    const auto all =
        counts(draw(Sampler(params(1, 100)), logits, 2000), 10);  // more than there are
    for (const double n : all) CHECK(n > 0);
}

TEST_CASE("sample: top-p leaves the fewest likeliest tokens that together reach p") {
    const std::vector<float> logits{std::log(0.5f), std::log(0.3f), std::log(0.15f),
                                    std::log(0.05f)};
    const std::pair<float, std::size_t> cases[] = {{0.4f, 1},  {0.49f, 1}, {0.51f, 2}, {0.79f, 2},
                                                   {0.81f, 3}, {0.94f, 3}, {0.96f, 4}, {1.0f, 4}};
    for (const auto& [p, want] : cases) {
        CAPTURE(p);
        const auto seen = counts(draw(Sampler(params(1, 0, p)), logits, 4000), 4);
        for (std::size_t i = 0; i < 4; ++i) CHECK((seen[i] > 0) == (i < want));
    }
}

TEST_CASE("sample: draws follow the softmax of logits / temperature") {
    const std::vector<float> logits = some_logits(20);
    const int n = quick() ? 20000 : 100000;
    for (const float temperature : {0.5f, 1.0f, 2.0f}) {
        CAPTURE(temperature);
        const auto p = softmax(logits, double{temperature});
        const auto seen = counts(draw(Sampler(params(temperature)), logits, n), 20);
        CHECK(chi_square(seen, p, n) < 50);  // 19 degrees of freedom: 43.8 is passed once in 1,000
    }
}

TEST_CASE("sample: draws from a cut follow the softmax of what is left") {
    const std::vector<float> logits = some_logits(20);
    const int n = quick() ? 20000 : 100000;
    std::vector<double> p = softmax(logits, 1), order = p;
    std::sort(order.begin(), order.end(), std::greater<>());
    double sum = 0;
    for (double& x : p) x = x >= order[4] ? x : 0, sum += x;
    for (double& x : p) x /= sum;
    const auto seen = counts(draw(Sampler(params(1, 5)), logits, n), 20);
    for (std::size_t i = 0; i < 20; ++i) CHECK((seen[i] > 0) == (p[i] > 0));
    CHECK(chi_square(seen, p, n) < 25);  // 4 degrees of freedom
}

TEST_CASE("sample: the whole vocabulary is drawn from when it is large") {
    const std::vector<float> logits(5000, 0.5f);
    const auto seen = counts(draw(Sampler(params(1)), logits, 50000), 5000);
    CHECK(chi_square(seen, std::vector<double>(5000, 1.0 / 5000), 50000) < 5600);
}

TEST_CASE("sample: the same seed and stream give the same tokens, others give others") {
    const std::vector<float> logits = some_logits(300);
    const auto first = draw(Sampler(params(1)), logits, 100);
    CHECK(draw(Sampler(params(1)), logits, 100) == first);
    CHECK(draw(Sampler(params(1), 0), logits, 100) == first);
    CHECK(draw(Sampler(params(1), 1), logits, 100) != first);
    CHECK(draw(Sampler(params(1, 0, 1, 43)), logits, 100) != first);
    CHECK(draw(Sampler(params(1, 0, 1, 43), 1), logits, 100) !=
          draw(Sampler(params(1), 2), logits, 100));
}

TEST_CASE("sample: the n-th random number does not depend on the calls before it") {
    const std::vector<float> logits = some_logits(300), other(300, 1.0f);
    Sampler a(params(1)), b(params(1));
    for (int i = 0; i < 10; ++i) a.sample(logits), b.sample(other);
    CHECK(a.sample(logits) == b.sample(logits));
}

TEST_CASE("sample: NaN and infinities are impossible, whatever the cut") {
    const std::vector<float> logits{kNaN, 1, kInfinity, -kInfinity, 2, -kNaN};
    CHECK(Sampler::argmax(logits) == 4);
    for (const SamplingParams& p : {params(1), params(1, 2), params(1, 6), params(1, 0, 0.9f)}) {
        const auto seen = counts(draw(Sampler(p), logits, 500), 6);
        CHECK(seen[1] + seen[4] == 500);
    }
}

TEST_CASE("sample: logits without any number are refused, not answered") {
    for (const float temperature : {0.0f, 1.0f}) {
        for (const float bad : {kNaN, kInfinity, -kInfinity}) {
            Sampler sampler(params(temperature));
            CHECK(contains(error_of([&] { sampler.sample(std::vector<float>(4, bad)); }),
                           "not numbers"));
            CHECK(sampler.sample(std::vector<float>{1}) == 0);
        }
        Sampler sampler(params(temperature));
        CHECK(error_of([&] { sampler.sample({}); }) != "");
    }
}

TEST_CASE("sample: extreme logits and temperatures give tokens, not crashes") {
    const std::vector<float> logits{3e38f, -3e38f, 1e-38f, 15, -15};
    for (const float temperature : {1e-30f, 1e-3f, 1.0f, 1000.0f}) {
        for (const Token t : draw(Sampler(params(temperature)), logits, 20)) CHECK(t == 0);
    }
    const auto seen = counts(draw(Sampler(params(1000)), some_logits(4), 4000), 4);
    for (const double n : seen) CHECK(n > 800);  // nearly uniform
}

TEST_CASE("sample: parameters out of range are refused by name") {
    const std::pair<SamplingParams, std::string> cases[] = {
        {params(-1), "temperature"},        {params(kNaN), "temperature"},
        {params(kInfinity), "temperature"}, {params(1001), "temperature"},
        {params(1, -1), "top_k"},           {params(1, 0, 0), "top_p"},
        {params(1, 0, -0.5f), "top_p"},     {params(1, 0, 1.5f), "top_p"},
        {params(1, 0, kNaN), "top_p"}};
    for (const auto& [p, want] : cases) {
        CAPTURE(want);
        try {
            Sampler sampler(p);
            FAIL("accepted");
        } catch (const nanogpt::Error& e) {
            CHECK(e.kind == nanogpt::ErrorKind::usage);
            CHECK(contains(e.what(), want));
        }
    }
}
