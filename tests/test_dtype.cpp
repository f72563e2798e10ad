// Number formats: sizes, names, and conversions over every 16-bit pattern.
#include <cmath>  // isnan, ldexp

#include "helpers.hpp"

using namespace test;
using nanogpt::bf16_to_f32;
using nanogpt::f16_to_f32;
using nanogpt::f32_to_bf16;

TEST_CASE("dtype: sizes and names are torch's") {
    const struct {
        DType dtype;
        std::size_t size;
        std::string name;
    } cases[] = {{DType::f32, 4, "float32"}, {DType::bf16, 2, "bfloat16"},
                 {DType::f16, 2, "float16"}, {DType::f64, 8, "float64"},
                 {DType::i64, 8, "int64"},   {DType::i32, 4, "int32"},
                 {DType::i16, 2, "int16"},   {DType::i8, 1, "int8"},
                 {DType::u8, 1, "uint8"},    {DType::boolean, 1, "bool"}};
    for (const auto& c : cases) {
        CHECK(nanogpt::size_of(c.dtype) == c.size);
        CHECK(nanogpt::name_of(c.dtype) == c.name);
        CHECK(nanogpt::is_float(c.dtype) == contains(c.name, "float"));
    }
}

TEST_CASE("dtype: every bfloat16 goes to float32 and back unchanged") {
    for (std::uint32_t h = 0; h < 65536; ++h) {
        const float x = bf16_to_f32(static_cast<std::uint16_t>(h));
        const std::uint16_t back = f32_to_bf16(x);
        if (std::isnan(x)) {
            CHECK_UNARY(std::isnan(bf16_to_f32(back)));
        } else if (back != h) {
            FAIL_CHECK("pattern ", h, " became ", back);
        }
    }
}

TEST_CASE("dtype: float32 is rounded to the nearest bfloat16, ties to even") {
    const std::pair<std::uint32_t, std::uint16_t> cases[] = {
        {0x3F800000, 0x3F80}, {0x3F807FFF, 0x3F80}, {0x3F808000, 0x3F80}, {0x3F808001, 0x3F81},
        {0x3F818000, 0x3F82}, {0x3F817FFF, 0x3F81}, {0xBF808001, 0xBF81}, {0x7F7FFFFF, 0x7F80},
        {0x7F800000, 0x7F80}, {0xFF800000, 0xFF80}, {0x00000001, 0x0000}, {0x80000000, 0x8000},
        {0x00018000, 0x0002}, {0x7F800001, 0x7FC0}, {0x7FFFFFFF, 0x7FFF}, {0xFFC00000, 0xFFC0}};
    for (const auto& [bits, want] : cases) {
        CAPTURE(bits);
        CHECK(f32_to_bf16(std::bit_cast<float>(bits)) == want);
    }
}

TEST_CASE("dtype: every float16 becomes the float32 of its value") {
    for (std::uint32_t h = 0; h < 65536; ++h) {
        const int exponent = static_cast<int>(h >> 10 & 31u);
        const auto mantissa = static_cast<double>(h & 1023u);
        double want =
            exponent == 0 ? std::ldexp(mantissa, -24) : std::ldexp(1024 + mantissa, exponent - 25);
        if (exponent == 31) want = std::numeric_limits<double>::infinity();
        if ((h & 0x8000u) != 0) want = -want;
        const float got = f16_to_f32(static_cast<std::uint16_t>(h));
        const bool ok = exponent == 31 && mantissa > 0
                            ? std::isnan(got)
                            : double{got} == want && std::signbit(got) == std::signbit(want);
        if (!ok) FAIL_CHECK("pattern ", h, " became ", got);
    }
}
