// Tensors: shapes, counts, and the memory they share.
#include "helpers.hpp"

using namespace test;
using nanogpt::Tensor;
using nanogpt::detail::count;

TEST_CASE("tensor: rows, columns, elements and bytes follow the shape") {
    const Tensor matrix{DType::bf16, {3, 5}, nullptr};
    CHECK(matrix.rows() == 3);
    CHECK(matrix.cols() == 5);
    CHECK(matrix.numel() == 15);
    CHECK(matrix.bytes() == 30);
    const Tensor vector{DType::f32, {7}, nullptr};
    CHECK(vector.rows() == 1);
    CHECK(vector.cols() == 7);
    CHECK(vector.bytes() == 28);
    CHECK(Tensor{}.numel() == 1);  // a scalar
    CHECK(!Tensor{});
}

TEST_CASE("tensor: a copy shares the bytes and keeps them alive") {
    Tensor copy;
    {
        const auto memory = nanogpt::detail::allocate(16);
        reinterpret_cast<float*>(memory.get())[1] = 2.5f;
        const Tensor t{DType::f32, {4}, memory};
        copy = t;
        CHECK(copy.f32() == t.f32());
    }
    CHECK(copy.f32()[1] == 2.5f);
}

TEST_CASE("tensor: elements are counted, and impossible shapes refused") {
    const auto counted = [](std::vector<std::int64_t> shape) { return count(shape); };
    CHECK(counted({}) == 1);
    CHECK(counted({0}) == 0);
    CHECK(counted({2, 3, 4}) == 24);
    CHECK(counted({INT64_MAX, 2}) == 0xFFFFFFFFFFFFFFFEu);
    CHECK(contains(error_of([&] { counted({3, -1}); }), "negative dimension -1"));
    CHECK(contains(error_of([&] { counted({INT64_MIN}); }), "negative dimension"));
    CHECK(contains(error_of([&] { counted({INT64_MAX, 3}); }), "64 bits"));
}

TEST_CASE("tensor: a shape is written as Python writes it") {
    CHECK(nanogpt::detail::to_string(std::vector<std::int64_t>{2, 3}) == "(2, 3)");
    CHECK(nanogpt::detail::to_string(std::vector<std::int64_t>{}) == "()");
}

TEST_CASE("tensor: memory that cannot be had is an Error, not a crash") {
    for (const std::uint64_t bytes :
         {UINT64_MAX, UINT64_MAX - (std::uint64_t{4} << 20), std::uint64_t{1} << 63}) {
        try {
            nanogpt::detail::allocate(bytes);
            FAIL("allocated");
        } catch (const nanogpt::Error& e) {
            CHECK((e.kind == nanogpt::ErrorKind::out_of_memory ||
                   e.kind == nanogpt::ErrorKind::refused));
        }
    }
    CHECK(nanogpt::detail::allocate(0) != nullptr);
}
