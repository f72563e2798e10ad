// Section 12: every operation against plain loops in float64, at sizes that are no multiples of 16.
#include <doctest/doctest.h>

#include <atomic>
#include <cmath>
#include <cstring>
#include <initializer_list>
#include <stdexcept>
#include <vector>

#include "helpers.hpp"
#include "nanogpt.hpp"

namespace {

namespace ops = nanogpt::ops;
using nanogpt::DType;
using nanogpt::Tensor;
using nanogpt::ThreadPool;

// Deterministic numbers from -1 to 1, their mean away from zero.
std::vector<float> numbers(std::size_t n, std::uint32_t seed) {
    std::vector<float> out(n);
    for (float& x : out) {
        seed = seed * 1664525u + 1013904223u;
        x = static_cast<float>(seed >> 8) * 0x1p-23f - 0.9f;
    }
    return out;
}
// Largest difference, NaN counting as infinite.
double difference(std::span<const float> got, const std::vector<double>& want) {
    REQUIRE(got.size() == want.size());
    double most = 0;
    for (std::size_t i = 0; i < got.size(); ++i) {
        if (!nanogpt::is_finite(got[i])) return HUGE_VAL;
        most = std::max(most, std::abs(static_cast<double>(got[i]) - want[i]));
    }
    return most;
}
Tensor matrix(const std::vector<float>& values, std::size_t rows, DType dtype) {
    const std::vector<std::int64_t> shape = {static_cast<std::int64_t>(rows),
                                             static_cast<std::int64_t>(values.size() / rows)};
    const auto memory = nanogpt::detail::allocate(values.size() * 4);
    for (std::size_t i = 0; i < values.size(); ++i) {
        const std::uint16_t half = nanogpt::f32_to_bf16(values[i]);
        if (dtype == DType::bf16)
            std::memcpy(memory.get() + 2 * i, &half, 2);
        else
            std::memcpy(memory.get() + 4 * i, &values[i], 4);
    }
    return {dtype, shape, memory};
}

}  // namespace

TEST_CASE("ops: a matrix product is right at every size, and one row alone gets the same bits") {
    ThreadPool pool(3);
    for (const DType dtype : {DType::f32, DType::bf16}) {
        for (const std::size_t K : std::initializer_list<std::size_t>{8, 33, 200}) {
            for (const std::size_t T : std::initializer_list<std::size_t>{1, 2, 5, 9, 37}) {
                const std::size_t N = 131;
                const auto x = numbers(T * K, 1), w = numbers(N * K, 2);
                const Tensor weights = matrix(w, N, dtype);
                std::vector<float> y(T * N, std::nanf("")), alone(N);
                ops::linear(pool, y.data(), x.data(), weights, T, N);
                std::vector<double> want(T * N);
                for (std::size_t t = 0; t < T; ++t) {
                    for (std::size_t n = 0; n < N; ++n) {
                        for (std::size_t k = 0; k < K; ++k) {
                            const float v = w[n * K + k];
                            const float kept = dtype == DType::f32
                                                   ? v
                                                   : nanogpt::bf16_to_f32(nanogpt::f32_to_bf16(v));
                            want[t * N + n] +=
                                static_cast<double>(x[t * K + k]) * static_cast<double>(kept);
                        }
                    }
                }
                CAPTURE(K);
                CAPTURE(T);
                CHECK(difference(y, want) < 3e-5);  // 200 products of size 1, 24 bits each
                ops::linear(pool, alone.data(), &x[(T - 1) * K], weights, 1, N);
                CHECK(std::equal(alone.begin(), alone.end(), &y[(T - 1) * N]));
                ops::linear(pool, y.data(), x.data(), weights, T, N, true);
                for (double& v : want) v = v > 0 ? v * v : 0;
                CHECK(difference(y, want) < 3e-3);  // of squares up to about 50
            }
        }
    }
}

TEST_CASE("ops: attention sees its window, and every way to cut the queries gives the same bits") {
    for (const std::size_t hd : std::initializer_list<std::size_t>{8, 32, 40}) {
        const std::size_t hdp = nanogpt::detail::round_up(hd, 16), T = 23, window = 7;
        const auto q = numbers(T * hd, 3);
        auto k = numbers(T * hdp, 4), v = numbers(T * hdp, 5);
        for (std::size_t t = 0; t < T; ++t) {
            std::fill(&k[t * hdp + hd], &k[t * hdp] + hdp, 0.0f);
            std::fill(&v[t * hdp + hd], &v[t * hdp] + hdp, 0.0f);
        }
        std::vector<float> z(T * hd, std::nanf("")), one(hd);
        ops::attention(z.data(), hd, q.data(), hd, k.data(), v.data(), T, 0, hd, window);
        std::vector<double> want(T * hd);
        for (std::size_t t = 0; t < T; ++t) {
            double sum = 0;
            for (std::size_t s = t > window ? t - window : 0; s <= t; ++s) {
                double dot = 0;
                for (std::size_t j = 0; j < hd; ++j)
                    dot += static_cast<double>(q[t * hd + j]) * static_cast<double>(k[s * hdp + j]);
                const double p = std::exp(dot / std::sqrt(static_cast<double>(hd)));
                sum += p;
                for (std::size_t j = 0; j < hd; ++j)
                    want[t * hd + j] += p * static_cast<double>(v[s * hdp + j]);
            }
            for (std::size_t j = 0; j < hd; ++j) want[t * hd + j] /= sum;
        }
        CHECK(difference(z, want) < 2e-6);
        for (std::size_t t = 0; t < T; ++t) {
            ops::attention(one.data(), hd, &q[t * hd], hd, k.data(), v.data(), 1, t, hd, window);
            CHECK(std::equal(one.begin(), one.end(), &z[t * hd]));
        }
    }
}

TEST_CASE("ops: norm, softmax, relu squared and rotation") {
    auto x = numbers(37, 6);
    std::vector<double> want(x.begin(), x.end());
    double squares = 0;
    for (const double v : want) squares += v * v;
    for (double& v : want) v /= std::sqrt(squares / 37 + 0x1p-23);
    std::vector<float> y(37, std::nanf(""));
    ops::rms_norm(y.data(), x.data(), 1, 37);
    CHECK(difference(y, want) < 1e-6);

    std::vector<float> p(48, 9.0f);
    for (std::size_t i = 0; i < 37; ++i) p[i] = 40 * x[i];
    double total = 0;
    for (std::size_t i = 0; i < 37; ++i) total += std::exp(static_cast<double>(p[i]) - 44);
    for (std::size_t i = 0; i < 37; ++i) want[i] = std::exp(static_cast<double>(p[i]) - 44) / total;
    ops::softmax(p.data(), 37);
    CHECK(difference(std::span(p).first(37), want) < 1e-6);
    CHECK(std::all_of(p.begin() + 37, p.end(), [](float v) { return v == 0; }));

    float pair[] = {3, 4};
    const float cos[] = {0.6f}, sin[] = {0.8f};
    ops::rotary(pair, cos, sin, 1, 2);  // by minus the angle
    CHECK(pair[0] == doctest::Approx(5.0));
    CHECK(pair[1] == doctest::Approx(0.0).epsilon(1e-6));
    float r[] = {-2, 0, 3};
    ops::relu2(r, 3);
    CHECK((r[0] == 0 && r[1] == 0 && r[2] == 9));
}

TEST_CASE("ops: the soft cap follows tanh for every cap, and passes NaN on") {
    for (const float cap : {0.5f, 15.0f, 20.0f, 99.0f, 101.0f, 1e6f, 1e9f}) {
        CAPTURE(cap);
        auto x = numbers(101, 7);
        for (float& v : x) v *= 60;
        std::vector<double> want;
        for (const float v : x) {
            const auto c = static_cast<double>(cap);
            want.push_back(c * std::tanh(static_cast<double>(v) / c));
        }
        ops::softcap(x.data(), x.size(), cap);
        CHECK(difference(x, want) <
              2e-7 * std::max(60.0, std::min(static_cast<double>(cap), 100.0)));
    }
    float bad[] = {1, std::nanf(""), 2};
    ops::softcap(bad, 3, 15);
    CHECK(std::isnan(bad[1]));
    CHECK(std::isfinite(bad[0]));
}

TEST_CASE("ops: a thread pool runs every task once, and hands on the first exception") {
    for (const int threads : {1, 2, 5}) {
        ThreadPool pool(threads);
        CHECK(pool.size() == threads);
        for (int round = 0; round < 200; ++round) {
            std::vector<std::atomic<int>> runs(33);
            pool.run(runs.size(), [&](std::size_t i) { runs[i].fetch_add(1); });
            CHECK(std::all_of(runs.begin(), runs.end(), [](const auto& n) { return n == 1; }));
        }
        CHECK_THROWS_WITH(pool.run(9,
                                   [](std::size_t i) {
                                       if (i == 3) throw std::runtime_error("three");
                                   }),
                          "three");
        pool.run(2, [](std::size_t) {});  // works on
    }
}
