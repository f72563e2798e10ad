// UTF-8 and the classes of characters, against Python's decoder and Unicode 16.0.0. The two long
// checks compare one hash over all of their cases with the hash of what Python gives for them:
// bytes.decode("utf-8", "replace"), and unicodedata2 16.0.0's category().
#include "helpers.hpp"

using namespace test;
using nanogpt::to_utf8;
using nanogpt::Utf8Stream;
using nanogpt::detail::CharClass;
using nanogpt::detail::decode_utf8;

namespace {

const std::string kBad = "\xEF\xBF\xBD";  // U+FFFD

CharClass char_class(char32_t code) {
    const auto classes = nanogpt::detail::char_classes();  // those beyond are `other`
    return code < classes.size() ? classes[code] : CharClass::other;
}

struct Fnv {  // FNV-1a, 64 bits
    std::uint64_t value = 0xCBF29CE484222325u;
    void add(std::uint8_t byte) { value = (value ^ byte) * 0x100000001B3u; }
    void add(std::string_view s) {
        for (const char c : s) add(static_cast<std::uint8_t>(c));
    }
};

std::string repeat(const std::string& s, int n) {
    std::string out;
    for (int i = 0; i < n; ++i) out += s;
    return out;
}

std::string streamed(std::string_view bytes, std::size_t step) {
    Utf8Stream stream;
    std::string out;
    for (std::size_t i = 0; i < bytes.size(); i += step) out += stream.push(bytes.substr(i, step));
    return out + stream.finish();
}

}  // namespace

TEST_CASE("unicode: valid UTF-8 passes unchanged, U+FFFD and the ends of each length included") {
    for (const std::string text : {"", "abc", "\u0080\u07FF", "\u0800\uD7FF\uE000\uFFFF", "\uFFFD",
                                   "\U00010000\U0010FFFF", "na\u00EFve \U0001F30D!"}) {
        CAPTURE(text);
        CHECK(to_utf8(text) == text);
        CHECK(nanogpt::detail::valid_utf8_length(text) == text.size());
    }
}

TEST_CASE("unicode: each maximal invalid subpart becomes one U+FFFD") {
    const std::pair<std::string, int> cases[] = {
        {"\xF0\x9F\x8C", 1},     {"\x80\x80", 2}, {"\xED\xA0\x80", 3}, {"\xF4\x90\x80\x80", 4},
        {"\xC0\xAF", 2},         {"\xE2\x82", 1}, {"\xFF", 1},         {"\xF0\x80\x80", 3},
        {"\xE0\x80", 2},         {"\xC3", 1},     {"\xF5\x80", 2},     {"\xE2\x82\xE2\x82", 2},
        {"\xF0\x9F\xF0\x9F", 2}, {"\xC1\xBF", 2}, {"\xF1\x80\x80", 1}, {"\xE0\x9F\xBF", 3}};
    for (const auto& row : cases) {
        CAPTURE(row.first);
        CHECK(to_utf8(row.first) == repeat(kBad, row.second));
        CHECK(to_utf8("a" + row.first + "b") == "a" + repeat(kBad, row.second) + "b");
    }
}

TEST_CASE("unicode: every string of four bytes out of 25 is replaced as Python does it") {
    const std::string bytes(
        "\x00\x41\x7F\x80\x8F\x90\x9F\xA0\xBF\xC0\xC1\xC2\xDF\xE0\xE1\xEC\xED\xEE\xEF\xF0\xF1\xF3"
        "\xF4"
        "\xF5\xFF",
        25);
    Fnv hash;
    std::string four(4, '\0');
    for (const char a : bytes) {
        for (const char b : bytes) {
            for (const char c : bytes) {
                for (const char d : bytes) {
                    four = {a, b, c, d};
                    hash.add(to_utf8(four));
                    hash.add('\n');
                }
            }
        }
    }
    CHECK(hash.value == 0x2E00705B7E282A71u);
}

TEST_CASE("unicode: a stream gives the same text however the bytes are cut") {
    Random random(1);
    for (int round = 0; round < 2000; ++round) {
        std::string bytes;
        for (std::size_t n = random.below(40); n > 0; --n) {
            constexpr std::string_view kParts[] = {"a",    "\u00E9", "\u4F60", "\U0001F30D",
                                                   "\x80", "\xF0",   "\xE2",   "\xC3"};
            bytes += kParts[random.below(std::size(kParts))];
        }
        const std::string whole = to_utf8(bytes);
        for (const std::size_t step : {1u, 2u, 3u, 7u}) REQUIRE(streamed(bytes, step) == whole);
    }
}

TEST_CASE("unicode: a stream shows a character when it is complete and not before") {
    Utf8Stream stream;
    CHECK(stream.push("a\xF0\x9F") == "a");
    CHECK(stream.push("\x8C") == "");
    CHECK(stream.push("\x8D!") == "\U0001F30D!");
    CHECK(stream.push("\xE2\x82") == "");
    CHECK(stream.push("x") == kBad + "x");
    CHECK(stream.push("\xC3") == "");
    CHECK(stream.finish() == kBad);
    CHECK(stream.finish() == "");  // and is empty then
    CHECK(stream.push("ok") == "ok");
}

TEST_CASE("unicode: every well-formed character decodes to its code point") {
    std::uint32_t wrong = 0;
    for (std::uint32_t code = 0; code < 0x110000; ++code) {
        if (code >= 0xD800 && code < 0xE000) continue;
        std::string s;
        nanogpt::detail::append_utf8(s, code);
        const nanogpt::detail::Utf8Char c = decode_utf8(s + "x");
        wrong += c.code != code || c.length != s.size() || c.cut;
    }
    CHECK(wrong == 0);
}

TEST_CASE(
    "unicode: letters, numbers and spaces are those of Unicode 16.0.0, all 1,114,112 of them") {
    Fnv hash;
    std::size_t counts[5] = {};
    for (char32_t code = 0; code < 0x110000; ++code) {
        const auto what = static_cast<std::uint8_t>(char_class(code));
        hash.add(what);
        ++counts[what];
    }
    CHECK(counts[1] == 141028);  // letters
    CHECK(counts[2] == 1911);    // numbers
    CHECK(counts[3] == 25);      // spaces
    CHECK(hash.value == 0x48B1698009766D10u);
}

TEST_CASE("unicode: marks, controls and what later versions assign are other characters") {
    for (const char32_t code :
         {U'_', U'\'', U'\u0301', U'\u200B', U'\uFFFD', U'\u001C', U'\u0000', U'\u180E',
          char32_t{0x16EA0}, char32_t{0x323B0}, char32_t{0x10FFFF}}) {
        CAPTURE(static_cast<std::uint32_t>(code));
        CHECK(char_class(code) == CharClass::other);
    }
    CHECK(char_class(0x1C89) == CharClass::letter);   // new in 16.0
    CHECK(char_class(0x10D40) == CharClass::number);  // new in 16.0
    CHECK(char_class(0x2EBF0) == CharClass::letter);  // new in 15.1
    CHECK(char_class(0x323AF) == CharClass::letter);  // the last letter
    CHECK(char_class(0x85) == CharClass::space);
    CHECK(char_class(U'\u2163') == CharClass::number);
}
