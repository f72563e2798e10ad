// JSON: the strict grammar of RFC 8259, and Python's dialect of it.
#include <cmath>  // isnan, isinf

#include "helpers.hpp"

using namespace test;
using nanogpt::Json;
using nanogpt::JsonDialect;
using nanogpt::parse_json;

namespace {

struct BadText {
    std::string text;
    std::string reason;  // must be part of the message
};

const std::vector<BadText>& bad_texts() {
    static const std::vector<BadText> cases{
        {"", "is empty"},
        {" ", "ends too early"},
        {"[", "ends too early"},
        {"{", "key that is no string"},
        {"[1", "without , or ]"},
        {"[1,", "ends too early"},
        {"[1,]", "no value"},
        {"[,1]", "no value"},
        {"[1 2]", "without , or ]"},
        {"{\"a\":1", "without , or }"},
        {"{\"a\":1,}", "key that is no string"},
        {"{\"a\" 1}", "key without :"},
        {"{\"a\"}", "key without :"},
        {"{\"a\":}", "no value"},
        {"{a:1}", "key that is no string"},
        {"{'a':1}", "key that is no string"},
        {"{1:1}", "key that is no string"},
        {"{,}", "key that is no string"},
        {"{\"a\":1,\"a\":2}", "\"a\" twice"},
        {"{\"x\":{\"b\":1,\"c\":2,\"b\":1}}", "\"b\" twice"},
        {"{\"a\":1,\"\\u0061\":2}", "\"a\" twice"},
        {"1 2", "goes on after its end"},
        {"{} x", "goes on after its end"},
        {"null,", "goes on after its end"},
        {"[]]", "goes on after its end"},
        {"nul", "no value"},
        {"True", "no value"},
        {"tru", "no value"},
        {"NULL", "no value"},
        {"undefined", "no value"},
        {"/* no */ 1", "no value"},
        {"1 // no", "goes on after its end"},
        {"+1", "no value"},
        {"-", "no value"},
        {".5", "no value"},
        {"01", "goes on after its end"},
        {"-01", "goes on after its end"},
        {"1.", "number without digits"},
        {"1.e1", "number without digits"},
        {"1e", "number without digits"},
        {"1e+", "number without digits"},
        {"1E-", "number without digits"},
        {"0x10", "goes on after its end"},
        {"1_000", "goes on after its end"},
        {"1e999", "out of range"},
        {"-1e999", "out of range"},
        {std::string(65, '1'), "more than 64 characters"},
        {"\"", "string without end"},
        {"\"abc", "string without end"},
        {"\"a\\", "escape"},
        {"\"\\x41\"", "unknown escape"},
        {"\"\\'\"", "unknown escape"},
        {"\"\\u12\"", "bad \\u escape"},
        {"\"\\u12G4\"", "bad \\u escape"},
        {"\"\\u-123\"", "bad \\u escape"},
        {"\"\\u+123\"", "bad \\u escape"},
        {"\"\\u", "bad \\u escape"},
        {"\"\\ud800\"", "half a surrogate"},
        {"\"\\udc00\"", "half a surrogate"},
        {"\"\\ud800\\n\"", "half a surrogate"},
        {"\"\\ud800\\ud800\"", "half a surrogate"},
        {"\"\\udc00\\ud800\"", "half a surrogate"},
        {"\"a\nb\"", "control character"},
        {"\"a\tb\"", "control character"},
        {std::string("\"a\0b\"", 5), "control character"},
        {std::string("1\0", 2), "goes on after its end"},
        {"\xEF\xBB\xBF{}", "byte order mark"},
        {std::string("\xFF\xFE{\0}\0", 6), "not UTF-8"},
        {std::string("\xFE\xFF\0{\0}", 6), "not UTF-8"},
        {"\"\xFF\"", "not UTF-8"},
        {"\"\xC0\x80\"", "not UTF-8"},
        {"\"\xED\xA0\x80\"", "not UTF-8"},
        {"\"\xF4\x90\x80\x80\"", "not UTF-8"},
        {"\"\xE2\x82\"", "not UTF-8"},
        {"\xC2\xA0"
         "1",
         "no value"},
        {"\f1", "no value"},
        {std::string(33, '[') + "1" + std::string(33, ']'), "deeper than 32"},
        {std::string(100000, '['), "deeper than 32"},
    };
    return cases;
}

Json python(std::string_view text) { return parse_json(text, JsonDialect::python); }

}  // namespace

TEST_CASE("json: values of every kind are read") {
    const Json j = parse_json(
        " {\"a\": [1, -2.5e3, true, false, null], \"b\": {\"c\": \"x\"}, \"\": 0, \"e\": {}, "
        "\"f\": []}\n");
    REQUIRE(j.kind == Json::Kind::object);
    REQUIRE(j.object.size() == 5);
    CHECK(j.object[0].first == "a");
    CHECK(j.object[2].first == "");
    const Json& a = *j.find("a");
    REQUIRE(a.array.size() == 5);
    CHECK(a.array[0].number == 1);
    CHECK(a.array[0].string == "1");
    CHECK(a.array[1].number == -2500);
    CHECK(a.array[1].string == "-2.5e3");
    CHECK(a.array[2].boolean);
    CHECK(a.array[3].kind == Json::Kind::boolean);
    CHECK(!a.array[3].boolean);
    CHECK(a.array[4].kind == Json::Kind::null);
    CHECK(j.find("b")->find("c")->string == "x");
    CHECK(j.find("nothing") == nullptr);
    CHECK(j.find("f")->kind == Json::Kind::array);
}

TEST_CASE("json: numbers keep their text and their nearest double") {
    const std::pair<const char*, double> cases[] = {{"0", 0.0},
                                                    {"-0", -0.0},
                                                    {"0.1", 0.1},
                                                    {"1E2", 100.0},
                                                    {"1e+2", 100.0},
                                                    {"25e-1", 2.5},
                                                    {"-0.0", -0.0},
                                                    {"1e-300", 1e-300},
                                                    {"9007199254740993", 9007199254740992.0},
                                                    {"4.705832481384277", 4.705832481384277}};
    for (const auto& [text, want] : cases) {
        CAPTURE(std::string(text));
        const Json j = parse_json(text);
        CHECK(j.kind == Json::Kind::number);
        CHECK(j.number == want);
        CHECK(std::signbit(j.number) == std::signbit(want));
        CHECK(j.string == text);
    }
}

TEST_CASE("json: escapes and characters outside ASCII become UTF-8") {
    const std::pair<const char*, std::string> cases[] = {
        {R"("\"\\\/\b\f\n\r\t")", "\"\\/\b\f\n\r\t"},
        {R"("\u0041\u00e9\u20AC")", "A\xC3\xA9\xE2\x82\xAC"},
        {R"("\ud83c\udf0d")", "\xF0\x9F\x8C\x8D"},
        {R"("\u0000")", std::string(1, '\0')},
        {"\"\xF0\x9F\x8C\x8D\x7F\"", "\xF0\x9F\x8C\x8D\x7F"},
        {R"("\uFFFF")", "\xEF\xBF\xBF"}};
    for (const auto& [text, want] : cases) {
        CAPTURE(std::string(text));
        CHECK(parse_json(text).string == want);
    }
}

TEST_CASE("json: everything outside the grammar is refused for its own reason") {
    for (const BadText& bad : bad_texts()) {
        CAPTURE(bad.text.substr(0, 60));
        for (const auto dialect : {JsonDialect::strict, JsonDialect::python}) {
            const std::string why = error_of([&] { parse_json(bad.text, dialect); });
            CHECK_MESSAGE(contains(why, bad.reason), "refused with: ", why);
            CHECK(error_of([&] { parse_json("{\"good\": 1}", dialect); }) == "");
        }
    }
}

TEST_CASE("json: NaN and Infinity are numbers of Python's dialect only") {
    CHECK(std::isnan(python("NaN").number));
    CHECK(std::isinf(python("Infinity").number));
    CHECK(python("-Infinity").number < 0);
    CHECK(python("{\"a\": NaN}").find("a")->kind == Json::Kind::number);
    for (const char* text : {"NaN", "Infinity", "-Infinity", "[NaN]", "{\"a\": Infinity}"}) {
        CHECK(contains(error_of([&] { parse_json(text); }), "no value"));
    }
    for (const char* text : {"nan", "NAN", "-NaN", "+Infinity", "Inf", "-inf", "infinity"}) {
        CAPTURE(std::string(text));
        CHECK(error_of([&] { python(text); }) != "");
    }
    CHECK(contains(error_of([&] { python("NaNs"); }), "goes on after its end"));
}

TEST_CASE("json: the depth is bounded by the caller") {
    const auto nested = [](std::size_t n) { return std::string(n, '[') + std::string(n, ']'); };
    CHECK(error_of([&] { parse_json(nested(3), JsonDialect::strict, 3); }) == "");
    CHECK(contains(error_of([&] { parse_json(nested(5), JsonDialect::strict, 3); }),
                   "deeper than 3"));
    CHECK(error_of([&] { parse_json(nested(64), JsonDialect::python, 64); }) == "");
    std::string objects;
    for (int i = 0; i < 40; ++i) objects += "{\"a\":";
    CHECK(contains(error_of([&] { parse_json(objects); }), "deeper than 32"));
}

TEST_CASE("json: a refusal carries the offset") {
    try {
        parse_json("{\"a\": 1, \"b\": x}");
        FAIL("not refused");
    } catch (const nanogpt::Error& e) {
        CHECK(e.kind == nanogpt::ErrorKind::refused);
        CHECK(e.offset == 14);
    }
}

TEST_CASE("json: every truncation and every changed byte of a document survives") {
    const std::string good =
        "{\"a\": [1, 2.5e-3, \"x\\u00e9\\n\", true, null], \"b\": {\"c\": -0}}";
    for (std::size_t n = 0; n < good.size(); ++n) {
        CHECK(error_of([&] { parse_json(good.substr(0, n)); }) != "");
    }
    for (std::size_t i = 0; i < good.size(); ++i) {
        for (int byte = 0; byte < 256; ++byte) {
            std::string bad = good;
            bad[i] = static_cast<char>(byte);
            error_of([&] { parse_json(bad); });
        }
    }
    CHECK(error_of([&] { parse_json(good); }) == "");
}
