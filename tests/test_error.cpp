// Errors: one line, fit for a terminal, with the offset where there is one.
#include "helpers.hpp"

using namespace test;
using nanogpt::Error;
using nanogpt::ErrorKind;
using nanogpt::detail::quote;

TEST_CASE("error: an Error keeps its kind, its message and its offset") {
    const Error e(ErrorKind::unsupported, "a file: found x, needs y", 12);
    CHECK(e.kind == ErrorKind::unsupported);
    CHECK(std::string(e.what()) == "a file: found x, needs y");
    CHECK(e.offset == 12);
    CHECK(Error(ErrorKind::usage, "x").offset == -1);
}

TEST_CASE("error: text from outside is quoted, escaped and cut") {
    CHECK(quote("d12") == "\"d12\"");
    CHECK(quote("") == "\"\"");
    CHECK(quote("a\"b\\c") == "\"a\\x22b\\x5cc\"");
    CHECK(quote("\x1b[31m\n\xFF") == "\"\\x1b[31m\\x0a\\xff\"");
    CHECK(quote(std::string_view("\0", 1)) == "\"\\x00\"");
    CHECK(quote("abcdef", 3) == "\"abc...\"");
    for (int c = 0; c < 256; ++c) {
        for (const char out : quote(std::string(1, static_cast<char>(c))))
            CHECK((out >= 0x20 && out < 0x7F));
    }
}

TEST_CASE("error: a refusal names the byte, if there is one") {
    CHECK(error_of([] { nanogpt::detail::refuse("bad", 7); }) == "bad at byte 7");
    CHECK(error_of([] { nanogpt::detail::refuse("bad"); }) == "bad");
    try {
        nanogpt::detail::refuse("bad", 7);
    } catch (const Error& e) {
        CHECK(e.kind == ErrorKind::refused);
        CHECK(e.offset == 7);
    }
}

TEST_CASE("error: the file's name is put in front, the kind and the offset stay") {
    try {
        nanogpt::detail::naming("/a/b/model_1.pt",
                                []() -> int { throw Error(ErrorKind::unsupported, "why", 3); });
        FAIL("nothing thrown");
    } catch (const Error& e) {
        CHECK(std::string(e.what()) == "\"model_1.pt\": why");
        CHECK(e.kind == ErrorKind::unsupported);
        CHECK(e.offset == 3);
    }
    CHECK(nanogpt::detail::naming("x", [] { return 5; }) == 5);
}

TEST_CASE("error: sums and products of sizes that pass 64 bits are refused") {
    using nanogpt::detail::checked_add;
    using nanogpt::detail::checked_mul;
    CHECK(checked_add(UINT64_MAX - 1, 1) == UINT64_MAX);
    CHECK(checked_mul(UINT64_MAX, 1) == UINT64_MAX);
    CHECK(checked_mul(UINT64_MAX, 0) == 0);
    CHECK(checked_mul(0, UINT64_MAX) == 0);
    CHECK(checked_mul(1ull << 32, (1ull << 32) - 1) == 0xFFFFFFFF00000000u);
    CHECK(error_of([] { checked_add(UINT64_MAX, 1); }) != "");
    CHECK(error_of([] { checked_mul(1ull << 32, 1ull << 32); }) != "");
    CHECK(error_of([] { checked_mul(UINT64_MAX, 2); }) != "");
}
