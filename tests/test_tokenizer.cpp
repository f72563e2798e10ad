// The tokenizer: splitting, merging, decoding, and the files it refuses to be (group A3).
// References: nanochat's specification (the table of splits, fixture C), tiktoken itself (the
// golden files of NANOGPT_SHARED), and a second implementation here, slow and obvious.
#include "helpers.hpp"

#include <chrono>
#include <thread>

using namespace test;
using nanogpt::Token;
using nanogpt::Tokenizer;
using nanogpt::detail::kSplitRules;
using nanogpt::detail::SplitRule;

namespace {

// Written by CPython 3.11 from a tiktoken.Encoding of 276 ranks.
// clang-format off
constexpr std::string_view kFixtureC =
    "gASVOwgAAAAAAACMDXRpa3Rva2VuLmNvcmWUjAhFbmNvZGluZ5STlCmBlH2UKIwEbmFtZZSMB3J1c3RicGWUjAdwYXRf"
    "c3RylIxtJyg/aTpbc2RtdF18bGx8dmV8cmUpfFteXHJcblxwe0x9XHB7Tn1dPytccHtMfSt8XHB7Tn17MSwyfXwgP1te"
    "XHNccHtMfVxwe059XSsrW1xyXG5dKnxccypbXHJcbl18XHMrKD8hXFMpfFxzK5SMD21lcmdlYWJsZV9yYW5rc5R9lChD"
    "AQCUSwBDAQGUSwFDAQKUSwJDAQOUSwNDAQSUSwRDAQWUSwVDAQaUSwZDAQeUSwdDAQiUSwhDAQmUSwlDAQqUSwpDAQuU"
    "SwtDAQyUSwxDAQ2USw1DAQ6USw5DAQ+USw9DARCUSxBDARGUSxFDARKUSxJDAROUSxNDARSUSxRDARWUSxVDARaUSxZD"
    "AReUSxdDARiUSxhDARmUSxlDARqUSxpDARuUSxtDARyUSxxDAR2USx1DAR6USx5DAR+USx9DASCUSyBDASGUSyFDASKU"
    "SyJDASOUSyNDASSUSyRDASWUSyVDASaUSyZDASeUSydDASiUSyhDASmUSylDASqUSypDASuUSytDASyUSyxDAS2USy1D"
    "AS6USy5DAS+USy9DATCUSzBDATGUSzFDATKUSzJDATOUSzNDATSUSzRDATWUSzVDATaUSzZDATeUSzdDATiUSzhDATmU"
    "SzlDATqUSzpDATuUSztDATyUSzxDAT2USz1DAT6USz5DAT+USz9DAUCUS0BDAUGUS0FDAUKUS0JDAUOUS0NDAUSUS0RD"
    "AUWUS0VDAUaUS0ZDAUeUS0dDAUiUS0hDAUmUS0lDAUqUS0pDAUuUS0tDAUyUS0xDAU2US01DAU6US05DAU+US09DAVCU"
    "S1BDAVGUS1FDAVKUS1JDAVOUS1NDAVSUS1RDAVWUS1VDAVaUS1ZDAVeUS1dDAViUS1hDAVmUS1lDAVqUS1pDAVuUS1tD"
    "AVyUS1xDAV2US11DAV6US15DAV+US19DAWCUS2BDAWGUS2FDAWKUS2JDAWOUS2NDAWSUS2RDAWWUS2VDAWaUS2ZDAWeU"
    "S2dDAWiUS2hDAWmUS2lDAWqUS2pDAWuUS2tDAWyUS2xDAW2US21DAW6US25DAW+US29DAXCUS3BDAXGUS3FDAXKUS3JD"
    "AXOUS3NDAXSUS3RDAXWUS3VDAXaUS3ZDAXeUS3dDAXiUS3hDAXmUS3lDAXqUS3pDAXuUS3tDAXyUS3xDAX2US31DAX6U"
    "S35DAX+US39DAYCUS4BDAYGUS4FDAYKUS4JDAYOUS4NDAYSUS4RDAYWUS4VDAYaUS4ZDAYeUS4dDAYiUS4hDAYmUS4lD"
    "AYqUS4pDAYuUS4tDAYyUS4xDAY2US41DAY6US45DAY+US49DAZCUS5BDAZGUS5FDAZKUS5JDAZOUS5NDAZSUS5RDAZWU"
    "S5VDAZaUS5ZDAZeUS5dDAZiUS5hDAZmUS5lDAZqUS5pDAZuUS5tDAZyUS5xDAZ2US51DAZ6US55DAZ+US59DAaCUS6BD"
    "AaGUS6FDAaKUS6JDAaOUS6NDAaSUS6RDAaWUS6VDAaaUS6ZDAaeUS6dDAaiUS6hDAamUS6lDAaqUS6pDAauUS6tDAayU"
    "S6xDAa2US61DAa6US65DAa+US69DAbCUS7BDAbGUS7FDAbKUS7JDAbOUS7NDAbSUS7RDAbWUS7VDAbaUS7ZDAbeUS7dD"
    "AbiUS7hDAbmUS7lDAbqUS7pDAbuUS7tDAbyUS7xDAb2US71DAb6US75DAb+US79DAcCUS8BDAcGUS8FDAcKUS8JDAcOU"
    "S8NDAcSUS8RDAcWUS8VDAcaUS8ZDAceUS8dDAciUS8hDAcmUS8lDAcqUS8pDAcuUS8tDAcyUS8xDAc2US81DAc6US85D"
    "Ac+US89DAdCUS9BDAdGUS9FDAdKUS9JDAdOUS9NDAdSUS9RDAdWUS9VDAdaUS9ZDAdeUS9dDAdiUS9hDAdmUS9lDAdqU"
    "S9pDAduUS9tDAdyUS9xDAd2US91DAd6US95DAd+US99DAeCUS+BDAeGUS+FDAeKUS+JDAeOUS+NDAeSUS+RDAeWUS+VD"
    "AeaUS+ZDAeeUS+dDAeiUS+hDAemUS+lDAeqUS+pDAeuUS+tDAeyUS+xDAe2US+1DAe6US+5DAe+US+9DAfCUS/BDAfGU"
    "S/FDAfKUS/JDAfOUS/NDAfSUS/RDAfWUS/VDAfaUS/ZDAfeUS/dDAfiUS/hDAfmUS/lDAfqUS/pDAfuUS/tDAfyUS/xD"
    "Af2US/1DAf6US/5DAf+US/9DAiB0lE0AAUMCaGWUTQEBQwJpbpRNAgFDAiBhlE0DAUMEIHRoZZRNBAFDAmVylE0FAUMC"
    "b26UTQYBQwIgIJRNBwFDAmxslE0IAUMCb3KUTQkBQwIgd5RNCgFDAgoKlE0LAUMEaGVsbJRNDAFDBWhlbGxvlE0NAUMC"
    "w6mUTQ4BQwLwn5RNDwFDAmFhlE0QAUMDYWFhlE0RAUMCcmWUTRIBQwJhdJRNEwF1jA5zcGVjaWFsX3Rva2Vuc5R9lCiM"
    "Bzx8Ym9zfD6UTRQBjA48fHVzZXJfc3RhcnR8PpRNFQGMDDx8dXNlcl9lbmR8PpRNFgGMEzx8YXNzaXN0YW50X3N0YXJ0"
    "fD6UTRcBjBE8fGFzc2lzdGFudF9lbmR8PpRNGAGMEDx8cHl0aG9uX3N0YXJ0fD6UTRkBjA48fHB5dGhvbl9lbmR8PpRN"
    "GgGMEDx8b3V0cHV0X3N0YXJ0fD6UTRsBjA48fG91dHB1dF9lbmR8PpRNHAF1dWIu";
// clang-format on

constexpr std::string_view kR50k =
    R"('(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s)";
constexpr std::string_view kCl100k =
    R"('(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|)"
    R"(\s++$|\s*[\r\n]|\s+(?!\S)|\s)";

using Pieces = std::vector<std::string>;
using Ids = std::vector<Token>;

// Without a file in between; messages lack the file's name then.
Tokenizer load(std::string_view pickle) {
    const nanogpt::detail::PickleTree tree =
        nanogpt::detail::parse_pickle(bytes_of(pickle), nanogpt::detail::PickleFor::tokenizer);
    return Tokenizer(nanogpt::detail::TokenizerReader(tree).read());
}
Tokenizer load(const TokenizerSpec& spec) { return load(tokenizer_pickle(spec)); }

Pieces split(std::string_view pattern, std::string_view text) {
    nanogpt::detail::Splitter splitter(nanogpt::detail::split_rule(pattern), text);
    Pieces pieces;
    for (auto piece = splitter.next(); !piece.empty(); piece = splitter.next()) {
        pieces.emplace_back(piece);
    }
    return pieces;
}
Pieces split(std::string_view text) { return split(TokenizerSpec().pattern, text); }

std::string pattern_of(const SplitRule& rule) {
    return std::string(rule.head).append(rule.numbers).append(rule.tail);
}

std::string with_digits(const std::string& count) {  // nanochat's pattern with another \p{N}{1,2}
    std::string pattern = TokenizerSpec().pattern;
    return pattern.replace(pattern.find("{1,2}"), 5, count);
}

// The rule read aloud: of all adjacent pairs join the one whose bytes have the lowest rank, the
// leftmost of equal ones, until there is none. Cubic, and so for short texts only.
Ids slow_encode(const TokenizerSpec& spec, std::string_view text) {
    const auto rank = [&](const std::string& bytes) -> Token {
        for (const auto& [token, id] : spec.ranks) {
            if (token == bytes) return static_cast<Token>(id);
        }
        return -1;
    };
    Ids out;
    for (const std::string& piece : split(spec.pattern, text)) {
        Pieces parts;
        for (const char c : piece) parts.emplace_back(1, c);
        while (rank(piece) < 0) {
            std::size_t best = parts.size();
            Token best_rank = -1;
            for (std::size_t i = 0; i + 1 < parts.size(); ++i) {
                const Token r = rank(parts[i] + parts[i + 1]);
                if (r >= 0 && (best_rank < 0 || r < best_rank)) best = i, best_rank = r;
            }
            if (best_rank < 0) break;
            parts[best] += parts[best + 1];
            parts.erase(parts.begin() + static_cast<std::ptrdiff_t>(best) + 1);
        }
        if (rank(piece) >= 0) parts = {piece};
        for (const std::string& part : parts) out.push_back(rank(part));
    }
    return out;
}

// A vocabulary over few letters, grown by random merges, so that every kind of overlap occurs.
TokenizerSpec random_tokenizer(Random& random, int merges) {
    TokenizerSpec spec;
    for (int byte = 0; byte < 256; ++byte) {
        spec.ranks.emplace_back(std::string(1, static_cast<char>(byte)), byte);
    }
    for (const char c : {'a', 'b', ' '})
        spec.ranks.emplace_back(std::string("a") + c, spec.ranks.size());
    while (static_cast<int>(spec.ranks.size()) < 256 + merges) {
        const auto pick = [&] {
            return random.below(3) == 0
                       ? std::string(1, "abc "[random.below(4)])
                       : spec.ranks[256 + random.below(spec.ranks.size() - 256)].first;
        };
        const std::string joined = pick() + pick();
        bool known = joined.size() > 40;
        for (const auto& [token, id] : spec.ranks) known = known || token == joined;
        if (!known) spec.ranks.emplace_back(joined, spec.ranks.size());
    }
    for (const std::string& name : special_names()) {
        spec.specials.emplace_back(name, spec.ranks.size() + spec.specials.size());
    }
    return spec;
}

std::string random_text(Random& random, std::size_t length) {
    constexpr std::string_view kParts[] = {"a", "b",      "c",      "aa",         "ab", "abc",
                                           " ", "  ",     "\n",     "'s",         "12", "\t",
                                           ".", "\u00E9", "\u4F60", "\U0001F30D", "'LL"};
    std::string text;
    while (text.size() < length) text += kParts[random.below(std::size(kParts))];
    return text;
}

std::string repeat(std::string_view s, std::size_t n) {
    std::string out;
    for (std::size_t i = 0; i < n; ++i) out += s;
    return out;
}

}  // namespace

// ==== splitting ==================================================================================

TEST_CASE("tokenizer: nanochat's pattern splits as its specification's table says") {
    const std::pair<std::string_view, Pieces> table[] = {
        {"Hello world! I'm 12345 years old.",
         {"Hello", " world", "!", " I", "'m", " ", "12", "34", "5", " years", " old", "."}},
        {"you're it's IT'S 'sure 'Twas don't",
         {"you", "'re", " it", "'s", " IT", "'S", " '", "sure", " '", "Twas", " don", "'t"}},
        {"don\u2019t", {"don", "\u2019t"}},
        {"'\u017F x 'S", {"'\u017F", " x", " '", "S"}},
        {" 'll 'LL 'Ve", {" '", "ll", " '", "LL", " '", "Ve"}},
        {"a'b c's", {"a", "'b", " c", "'s"}},
        {"a  b   c", {"a", " ", " b", "  ", " c"}},
        {"a\tb\n\n  c", {"a", "\tb", "\n\n", " ", " c"}},
        {"  \n  \n   x", {"  \n  \n", "  ", " x"}},
        {"\r\n\r\nfoo", {"\r\n\r\n", "foo"}},
        {"foo   ", {"foo", "   "}},
        {"   ", {"   "}},
        {"\n", {"\n"}},
        {"foo\n", {"foo", "\n"}},
        {"end \n", {"end", " \n"}},
        {" \n x", {" \n", " x"}},
        {"x = y+1;\n\n\tz", {"x", " =", " y", "+", "1", ";\n\n", "\tz"}},
        {"  ,  .", {" ", " ,", " ", " ."}},
        {"!!!\n\n\nabc", {"!!!\n\n\n", "abc"}},
        {"(hello)[world]", {"(hello", ")[", "world", "]"}},
        {"_foo __bar", {"_foo", " __", "bar"}},
        {"3.14159 1,000", {"3", ".", "14", "15", "9", " ", "1", ",", "00", "0"}},
        {"\u0661\u0662\u0663 \u00BD\u2167\u00B2",
         {"\u0661\u0662", "\u0663", " ", "\u00BD\u2167", "\u00B2"}},
        {"\u4F60\u597D\u4E16\u754C \U0001F30D!", {"\u4F60\u597D\u4E16\u754C", " \U0001F30D!"}},
        {"na\u00EFve caf\u00E9", {"na\u00EFve", " caf\u00E9"}},
        {"e\u0301a", {"e", "\u0301a"}},
        {"\u00A0abc\u00A0 \u00A0d", {"\u00A0abc", "\u00A0 ", "\u00A0d"}},
        {"tab\t\tend", {"tab", "\t", "\tend"}},
        {"A\u0085"
         "B",
         {"A",
          "\u0085"
          "B"}},
        {"\u3000x", {"\u3000x"}},
        {"\u200Bx", {"\u200Bx"}},
        {"$100 #tag @user", {"$", "10", "0", " #", "tag", " @", "user"}},
        {"<|bos|>", {"<|", "bos", "|>"}},
        {"", {}}};
    for (const auto& row : table) {
        CAPTURE(row.first);
        CHECK(split(row.first) == row.second);
    }
}

TEST_CASE("tokenizer: the number rule takes as many digits as the pattern says") {
    CHECK(split(with_digits("{1,3}"), "1234567 x") == Pieces{"123", "456", "7", " x"});
    CHECK(split(with_digits("{1,1}"), "123") == Pieces{"1", "2", "3"});
    CHECK(split(with_digits(""), "123") == Pieces{"1", "2", "3"});
    CHECK(split(kCl100k, "12345") == Pieces{"123", "45"});
    CHECK(split(kR50k, "12345 67") == Pieces{"12345", " 67"});
}

TEST_CASE("tokenizer: GPT-2's pattern knows small contractions, spaces in front, no newline rule") {
    CHECK(split(kR50k, "I'm IT'S\u00A0x") == Pieces{"I", "'m", " IT", "'", "S", "\u00A0", "x"});
    CHECK(split(kR50k, "a 1!  b\n\n c\td") ==
          Pieces{"a", " 1", "!", " ", " b", "\n\n", " c", "\t", "d"});
    CHECK(split(kR50k, "x \n ") == Pieces{"x", " \n "});
    CHECK(split(kR50k, " 's '") == Pieces{" '", "s", " '"});
    CHECK(split(kR50k, "'\u017F") == Pieces{"'", "\u017F"});
}

TEST_CASE("tokenizer: cl100k's pattern of today keeps all spaces at the end together") {
    CHECK(split(kCl100k, "a \n  ") == Pieces{"a", " \n  "});
    CHECK(split(kCl100k, "a \n  b") == Pieces{"a", " \n", " ", " b"});
    CHECK(split("a \n  ") == Pieces{"a", " \n", "  "});  // nanochat does not
}

TEST_CASE("tokenizer: the pieces of a text are never empty and join to the text") {
    Random random(7);
    for (const SplitRule& rule : kSplitRules) {
        for (int round = 0; round < 500; ++round) {
            const std::string text = random_text(random, random.below(60));
            std::string joined;
            for (const std::string& piece : split(pattern_of(rule), text)) joined += piece;
            REQUIRE(joined == text);
        }
    }
}

// ==== merging ====================================================================================

TEST_CASE("tokenizer: fixture C, as Python wrote it, encodes as the specification lists") {
    const Tokenizer tokenizer = load(from_base64(kFixtureC));
    CHECK(tokenizer.vocab_size() == 285);
    CHECK(tokenizer.pattern_name() == "nanochat");
    CHECK(tokenizer.warnings().empty());
    const std::pair<std::string_view, Ids> table[] = {
        {"hello the aaa aaaa", {269, 260, 259, 272, 259, 273}},
        {"the there  then", {116, 257, 260, 274, 32, 260, 110}},
        {"caf\u00E9 \U0001F30D", {99, 97, 102, 270, 32, 271, 140, 141}},
        {"a\n\n\nb", {97, 267, 10, 98}},
        {"I'll'LL", {73, 39, 264, 39, 76, 76}},
        {"hell no", {268, 32, 110, 111}},
        {"aaaaa", {272, 273}},
        {"<|bos|>", {60, 124, 98, 111, 115, 124, 62}},
        {"12345", {49, 50, 51, 52, 53}},
        {"x   ", {120, 263, 32}},
        {"", {}}};
    for (const auto& row : table) {
        CAPTURE(row.first);
        CHECK(tokenizer.encode(row.first) == row.second);
        CHECK(tokenizer.decode(row.second) == row.first);
    }
}

TEST_CASE("tokenizer: merging equals the rule read aloud, for short and for long pieces") {
    Random random(11);
    for (int vocabulary = 0; vocabulary < 25; ++vocabulary) {
        const TokenizerSpec spec =
            random_tokenizer(random, 10 + static_cast<int>(random.below(70)));
        const Tokenizer tokenizer = load(spec);
        for (int round = 0; round < 100; ++round) {
            std::string text = random_text(random, random.below(50));
            if (round % 10 == 0) {  // one piece, longer than what is merged by scanning
                text.clear();
                for (std::size_t n = 50 + random.below(100); n > 0; --n)
                    text += "abc"[random.below(3)];
            }
            const Ids ids = tokenizer.encode(text);
            REQUIRE(ids == slow_encode(spec, text));
            REQUIRE(tokenizer.decode(ids) == text);
        }
    }
}

TEST_CASE("tokenizer: a piece that is a token is that token even if merging would not reach it") {
    TokenizerSpec spec = make_tokenizer(265);
    spec.ranks.emplace_back("xyz", 256);
    for (auto& special : spec.specials) ++special.second;
    const Tokenizer tokenizer = load(spec);
    CHECK(tokenizer.encode("xyz") == Ids{256});
    CHECK(tokenizer.encode("xyzx") == Ids{'x', 'y', 'z', 'x'});
    REQUIRE(tokenizer.warnings().size() == 1);
    CHECK(
        contains(tokenizer.warnings()[0], "token \"xyz\", id 256, and perhaps others are no join"));
}

TEST_CASE("tokenizer: a million equal characters are no slower than other text") {
    const Tokenizer tokenizer = load(from_base64(kFixtureC));
    const std::string_view kinds[] = {"a", " ",      "\n",     "7",          ".",      "\t",
                                      "'", "\u00E9", "\u4F60", "\U0001F30D", "\u0301", "ab"};
    for (const std::string_view kind : kinds) {
        const std::string text = repeat(kind, 1'000'000);
        const auto start = std::chrono::steady_clock::now();
        const Ids ids = tokenizer.encode(text);
        const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
        CAPTURE(kind);
        CHECK(seconds.count() < 20);  // a quadratic merge takes hours
        CHECK(tokenizer.decode(ids) == text);
    }
}

TEST_CASE("tokenizer: any number of threads may use one tokenizer") {
    const Tokenizer tokenizer = load(make_tokenizer(4000));
    Random random(3);
    const std::string text = random_text(random, 20000);
    const Ids ids = tokenizer.encode(text);
    std::vector<Ids> results(8);
    {
        std::vector<std::jthread> threads;
        for (Ids& result : results) threads.emplace_back([&] { result = tokenizer.encode(text); });
    }
    for (const Ids& result : results) CHECK(result == ids);
}

// ==== decoding ===================================================================================

TEST_CASE("tokenizer: text that looks like a special token is plain text") {
    const Tokenizer tokenizer = load(make_tokenizer(512));
    for (const std::string& name : special_names()) {
        const Ids ids = tokenizer.encode("a" + name);
        for (const Token id : ids) CHECK_FALSE(tokenizer.is_special(id));
        CHECK(tokenizer.decode(ids) == "a" + name);
    }
}

TEST_CASE("tokenizer: special tokens are found by name and decode to it") {
    const Tokenizer tokenizer = load(make_tokenizer(512));
    CHECK(tokenizer.special("<|bos|>") == 503);
    CHECK(tokenizer.special("<|output_end|>") == 511);
    CHECK(tokenizer.is_special(503));
    CHECK_FALSE(tokenizer.is_special(502));
    CHECK_FALSE(tokenizer.is_special(512));
    CHECK(tokenizer.decode(Ids{503, 'h', 'i', 507}) == "<|bos|>hi<|assistant_end|>");
    CHECK(
        contains(error_of([&] { tokenizer.special("<|pad|>"); }), "no special token \"<|pad|>\""));
}

TEST_CASE("tokenizer: an id outside the vocabulary is an error and names itself") {
    const Tokenizer tokenizer = load(make_tokenizer(512));
    for (const Token id : {-1, 512, 1 << 30, INT32_MIN, INT32_MAX}) {
        CAPTURE(id);
        CHECK(
            contains(error_of([&] { tokenizer.decode(Ids{id}); }), "token " + std::to_string(id)));
        CHECK_FALSE(tokenizer.is_special(id));
    }
}

TEST_CASE("tokenizer: every single token decodes to its bytes, and every byte has a token") {
    const TokenizerSpec spec = make_tokenizer(1000);
    const Tokenizer tokenizer = load(spec);
    for (const auto& [bytes, id] : spec.ranks)
        CHECK(tokenizer.piece(static_cast<Token>(id)) == bytes);
}

TEST_CASE("tokenizer: invalid UTF-8 is encoded as its replacement") {
    const Tokenizer tokenizer = load(make_tokenizer(512));
    for (const std::string bytes : {"a\xFF"
                                    "b",
                                    "\xC3", "\xED\xA0\x80", "x\xF0\x9F\x8C y", "\x80\x80"}) {
        const Ids ids = tokenizer.encode(bytes);
        CHECK(ids == tokenizer.encode(nanogpt::to_utf8(bytes)));
        CHECK(tokenizer.decode(ids) == nanogpt::to_utf8(bytes));
    }
}

TEST_CASE("tokenizer: pieces streamed one by one join to the decode of all") {
    const Tokenizer tokenizer = load(make_tokenizer(512));
    Random random(5);
    for (int round = 0; round < 500; ++round) {
        Ids ids;
        for (std::size_t n = random.below(60); n > 0; --n)
            ids.push_back(static_cast<Token>(random.below(512)));
        nanogpt::Utf8Stream stream;
        std::string text;
        for (const Token id : ids) text += stream.push(tokenizer.piece(id));
        REQUIRE(text + stream.finish() == nanogpt::to_utf8(tokenizer.decode(ids)));
    }
}

// ==== loading ====================================================================================

TEST_CASE("tokenizer: every known pattern is accepted and named") {
    for (const SplitRule& rule : kSplitRules) {
        TokenizerSpec spec = make_tokenizer(300);
        spec.pattern = pattern_of(rule);
        CHECK(load(spec).pattern_name() == rule.name);
    }
}

TEST_CASE("tokenizer: an unknown pattern is unsupported and quoted, never run") {
    TokenizerSpec spec = make_tokenizer(300);
    for (const std::string pattern : {"", "(a+)+$", "\x1b[2J", "\\p{N}{1,4}"}) {
        spec.pattern = pattern;
        try {
            load(spec);
            FAIL("accepted");
        } catch (const nanogpt::Error& e) {
            CHECK(e.kind == nanogpt::ErrorKind::unsupported);
            CHECK(contains(e.what(), "split pattern " + nanogpt::detail::quote(pattern)));
        }
    }
    spec.pattern = std::string(60000, 'x');
    CHECK(error_of([&] { load(spec); }).size() < 400);
}

TEST_CASE(
    "tokenizer: merges that made the same bytes are accepted with a warning, as by nanochat") {
    TokenizerSpec spec = make_tokenizer(300);  // 291 ranks
    spec.ranks.erase(spec.ranks.begin() + 270);
    for (auto& special : spec.specials) --special.second;  // they begin at the size of the dict
    const Tokenizer tokenizer = load(spec);
    REQUIRE(tokenizer.warnings().size() == 1);
    CHECK(contains(tokenizer.warnings()[0], "rank 270 is left out"));
    CHECK(tokenizer.vocab_size() == 299);
    CHECK(tokenizer.special("<|bos|>") == 290);
    CHECK(tokenizer.is_special(290));
    CHECK(tokenizer.piece(290) == spec.ranks.back().first);  // decoding prefers the ordinary token
    CHECK(tokenizer.piece(291) == "<|user_start|>");
    CHECK(tokenizer.encode(spec.ranks.back().first) == Ids{290});
    CHECK(contains(error_of([&] { tokenizer.piece(270); }), "token 270"));
}

TEST_CASE("tokenizer: special ids are read from the file, in whatever order they are") {
    TokenizerSpec spec = make_tokenizer(300);
    std::reverse(spec.specials.begin(), spec.specials.end());
    std::swap(spec.specials[0].second, spec.specials[4].second);
    spec.specials.emplace_back("<|mine|>", 300);
    const Tokenizer tokenizer = load(spec);
    for (const auto& [name, id] : spec.specials) {
        CHECK(tokenizer.special(name) == id);
        CHECK(tokenizer.piece(static_cast<Token>(id)) == name);
    }
    CHECK(tokenizer.vocab_size() == 301);
}

TEST_CASE("tokenizer: a missing file is not found, a folder is refused") {
    const TempDir dir;
    CHECK(contains(error_of([&] { nanogpt::load_tokenizer(dir / "tokenizer.pkl"); }),
                   "tokenizer.pkl"));
    CHECK(error_of([&] { nanogpt::load_tokenizer(dir.path()); }) != "");
    write_file(dir / "tokenizer.pkl", "");
    CHECK(contains(error_of([&] { nanogpt::load_tokenizer(dir / "tokenizer.pkl"); }),
                   "tokenizer.pkl"));
}

namespace {

struct BadTokenizer {
    std::string name;
    std::string reason;  // what the message must say
    std::string pickle;
};

using Edit = std::function<void(TokenizerSpec&)>;

// Edits of what a good tokenizer of 300 tokens says: ranks 0 to 290, special tokens 291 to 299.
std::vector<BadTokenizer> bad_vocabularies() {
    const std::string x257(257, 'x');
    const std::tuple<std::string, std::string, Edit> edits[] = {
        {"a rank left out", "no token has rank 260",
         [](auto& s) { s.ranks.erase(s.ranks.begin() + 260); }},
        {"rank 0 left out", "no token has rank 0",
         [](auto& s) {
             for (auto* list : {&s.ranks, &s.specials}) {
                 for (auto& entry : *list) ++entry.second;
             }
         }},
        {"a rank twice", "rank 260 is there twice", [](auto& s) { s.ranks[261].second = 260; }},
        {"a token twice", "is there twice",
         [](auto& s) { s.ranks[261].first = s.ranks[260].first; }},
        {"a token twice, far apart", "is there twice",
         [](auto& s) { s.ranks.emplace_back("a", 291); }},
        {"a negative rank", "is no integer from 0 to 1048575",
         [](auto& s) { s.ranks[260].second = -1; }},
        {"a rank of 2^20", "is no integer from 0 to 1048575",
         [](auto& s) { s.ranks[260].second = 1 << 20; }},
        {"a rank of 2^31", "is no integer from 0 to 1048575",
         [](auto& s) { s.ranks[260].second = 1LL << 31; }},
        {"a rank of 2^32", "is no integer from 0 to 1048575",
         [](auto& s) { s.ranks[260].second = 1LL << 32; }},
        {"the least rank", "is no integer from 0 to 1048575",
         [](auto& s) { s.ranks[260].second = INT64_MIN; }},
        {"an empty token", "a token of 0 bytes", [](auto& s) { s.ranks[260].first.clear(); }},
        {"a token of 257 bytes", "a token of 257 bytes",
         [&](auto& s) { s.ranks[260].first = x257; }},
        {"byte 00 missing", "single byte \"\\x00\"", [](auto& s) { s.ranks[0].first = "zzz"; }},
        {"byte ff missing", "single byte \"\\xff\"", [](auto& s) { s.ranks[255].first = "zzz"; }},
        {"no ranks at all", "single byte", [](auto& s) { s.ranks.clear(); }},
        {"no special tokens", "special token \"<|bos|>\" is missing",
         [](auto& s) { s.specials.clear(); }},
        {"bos missing", "special token \"<|bos|>\" is missing",
         [](auto& s) { s.specials.erase(s.specials.begin()); }},
        {"output_end missing", "special token \"<|output_end|>\" is missing",
         [](auto& s) { s.specials.pop_back(); }},
        {"user_end misspelt", "special token \"<|user_end|>\" is missing",
         [](auto& s) { s.specials[2].first = "<|User_end|>"; }},
        {"a special name twice", "\"<|bos|>\" is there twice",
         [](auto& s) { s.specials.emplace_back("<|bos|>", 300); }},
        {"a special id twice", "\"<|user_start|>\" has id 292, 293 is",
         [](auto& s) { s.specials[2].second = 292; }},
        {"a gap before the special ids", "\"<|bos|>\" has id 292, 291 is the next",
         [](auto& s) {
             for (auto& p : s.specials) ++p.second;
         }},
        {"a gap among the special ids", "\"<|output_end|>\" has id 300, 299 is",
         [](auto& s) { s.specials[8].second = 300; }},
        {"a special id of an ordinary token", "\"<|bos|>\" has id 97, 291 is",
         [](auto& s) { s.specials[0].second = 97; }},
        {"special ids one too low", "\"<|bos|>\" has id 290, 291 is",
         [](auto& s) {
             for (auto& p : s.specials) --p.second;
         }},
        {"special ids at 0", "\"<|bos|>\" has id 0, 291 is",
         [](auto& s) {
             for (auto& p : s.specials) p.second -= 291;
         }},
        {"a negative special id", "is no integer from 0 to 1048575",
         [](auto& s) { s.specials[3].second = -5; }},
        {"a special id of 2^40", "is no integer from 0 to 1048575",
         [](auto& s) { s.specials[3].second = 1LL << 40; }},
        {"a special token without name", "no text of 1 to 256 bytes",
         [](auto& s) { s.specials.emplace_back("", 300); }},
        {"a special name of 257 bytes", "no text of 1 to 256 bytes",
         [&](auto& s) { s.specials.emplace_back(x257, 300); }},
        {"a special name that is not UTF-8", "not UTF-8",
         [](auto& s) { s.specials.emplace_back("\xFF", 300); }},
        {"1025 special tokens", "over 1024",
         [](auto& s) {
             for (int i = 0; i < 1016; ++i)
                 s.specials.emplace_back("x" + std::to_string(i), 300 + i);
         }},
        {"another pattern", "the split pattern \"\\x5cw+\"", [](auto& s) { s.pattern = "\\w+"; }},
        {"a pattern with one space more", "the split pattern", [](auto& s) { s.pattern += " "; }},
        {"a pattern that is not UTF-8", "not UTF-8", [](auto& s) { s.pattern = "\xC3"; }},
        {"a pattern with a NUL", "the split pattern", [](auto& s) { s.pattern += '\0'; }},
    };
    std::vector<BadTokenizer> out;
    for (const auto& [name, reason, edit] : edits) {
        TokenizerSpec spec = make_tokenizer(300);
        edit(spec);
        out.push_back({name, reason, tokenizer_pickle(spec)});
    }
    return out;
}

// A pickle around the given state: opcodes that leave one value on the stack.
std::string with_state(std::string_view state, int protocol = 4) {
    PickleWriter p;
    p.proto(protocol).short_unicode("tiktoken.core").short_unicode("Encoding").stack_global();
    return p.empty_tuple().newobj().raw(state).build().stop().out;
}

// A state dict with the fields given as opcodes; "" leaves one out.
std::string fields(const std::string& name, const std::string& pattern, const std::string& ranks,
                   const std::string& specials, const std::string& more = "") {
    PickleWriter p;
    p.empty_dict().mark();
    if (!name.empty()) p.short_unicode("name").raw(name);
    if (!pattern.empty()) p.short_unicode("pat_str").raw(pattern);
    if (!ranks.empty()) p.short_unicode("mergeable_ranks").raw(ranks);
    if (!specials.empty()) p.short_unicode("special_tokens").raw(specials);
    return p.raw(more).setitems().out;
}

// Pickles of another shape: fields missing or of another type.
std::vector<BadTokenizer> bad_states() {
    const std::string text = PickleWriter().short_unicode("rustbpe").out;
    const std::string number = PickleWriter().binint1(7).out, none = "N", list = "]", dict = "}";
    const std::string pattern = PickleWriter().short_unicode(TokenizerSpec().pattern).out;
    const auto entry = [](const PickleWriter& key, const PickleWriter& value) {
        return PickleWriter().empty_dict().raw(key.out).raw(value.out).setitem().out;
    };
    const auto bytes = PickleWriter().short_bytes("a"), one = PickleWriter().binint1(1);
    const auto state = [&](const std::string& ranks) {
        return with_state(fields(text, pattern, ranks, dict));
    };
    return {
        {"a registered name for a state", "only names the encoding \"gpt2\"",
         with_state(PickleWriter().short_unicode("gpt2").out)},
        {"a list for a state", "no dict", with_state(list)},
        {"None for a state", "no dict", with_state(none)},
        {"no state", "no tiktoken.Encoding",
         PickleWriter()
             .proto(4)
             .short_unicode("tiktoken.core")
             .short_unicode("Encoding")
             .stack_global()
             .empty_tuple()
             .newobj()
             .stop()
             .out},
        {"a dict, not an Encoding", "no tiktoken.Encoding",
         PickleWriter().proto(4).empty_dict().stop().out},
        {"name missing", "field \"name\" is missing", with_state(fields("", pattern, dict, dict))},
        {"pat_str missing", "field \"pat_str\" is missing",
         with_state(fields(text, "", dict, dict))},
        {"mergeable_ranks missing", "field \"mergeable_ranks\" is missing",
         with_state(fields(text, pattern, "", dict))},
        {"special_tokens missing", "field \"special_tokens\" is missing",
         with_state(fields(text, pattern, dict, ""))},
        {"a number for the name", "field \"name\" is of a wrong type",
         with_state(fields(number, pattern, dict, dict))},
        {"None for the pattern", "field \"pat_str\" is of a wrong type",
         with_state(fields(text, none, dict, dict))},
        {"a list of ranks", "field \"mergeable_ranks\" is of a wrong type",
         with_state(fields(text, pattern, list, dict))},
        {"a text for the special tokens", "field \"special_tokens\" is of a wrong type",
         with_state(fields(text, pattern, dict, text))},
        {"an unknown field", "unknown fields",
         with_state(fields(text, pattern, dict, dict,
                           PickleWriter().short_unicode("extra").raw(none).out))},
        {"a field twice", "field \"name\" is there twice",
         with_state(fields(text, pattern, dict, dict,
                           PickleWriter().short_unicode("name").raw(text).out))},
        {"a number for a field's name", "unknown fields",
         with_state(fields(text, pattern, dict, dict, number + none))},
        {"a token that is text", "a token is not bytes",
         state(entry(PickleWriter().short_unicode("a"), one))},
        {"a token that is a number", "a token is not bytes", state(entry(one, one))},
        {"a rank that is text", "is no integer from 0 to 1048575",
         state(entry(bytes, PickleWriter().short_unicode("1")))},
        {"a rank that is a float", "is no integer from 0 to 1048575",
         state(entry(bytes, PickleWriter().binfloat(1)))},
        {"a rank that is True", "is no integer from 0 to 1048575",
         state(entry(bytes, PickleWriter().new_true()))},
        {"a rank of 72 bits", "more than 64 bits",
         state(entry(bytes, PickleWriter().long1("123456789")))},
        {"another class", "tiktoken.core.CoreBPE",
         PickleWriter()
             .proto(4)
             .short_unicode("tiktoken.core")
             .short_unicode("CoreBPE")
             .stack_global()
             .empty_tuple()
             .newobj()
             .raw(dict)
             .build()
             .stop()
             .out},
        {"os.system", "os.system",
         PickleWriter()
             .proto(4)
             .short_unicode("os")
             .short_unicode("system")
             .stack_global()
             .short_unicode("true")
             .tuple1()
             .reduce()
             .stop()
             .out},
        {"bytes as protocol 2 writes them", "_codecs.encode",
         PickleWriter().proto(2).global("_codecs", "encode").stop().out},
        {"an Encoding with arguments", "NEWOBJ",
         PickleWriter()
             .proto(4)
             .short_unicode("tiktoken.core")
             .short_unicode("Encoding")
             .stack_global()
             .short_unicode("x")
             .tuple1()
             .newobj()
             .raw(dict)
             .build()
             .stop()
             .out},
        {"REDUCE instead of NEWOBJ", "REDUCE",
         PickleWriter()
             .proto(4)
             .short_unicode("tiktoken.core")
             .short_unicode("Encoding")
             .stack_global()
             .empty_tuple()
             .reduce()
             .raw(dict)
             .build()
             .stop()
             .out},
        {"protocol 6", "protocol 6", with_state(dict, 6)},
        {"a JSON file", "pickle", "{\"name\": \"rustbpe\"}"},
        {"an empty file", "cut off", ""},
        {"bytes after the end", "after the end", tokenizer_pickle(make_tokenizer(300)) + "x"},
        {"a file cut in half", "pickle", tokenizer_pickle(make_tokenizer(300)).substr(0, 1500)},
    };
}

}  // namespace

TEST_CASE(
    "tokenizer: bad files are refused, each with its own reason, and a good one loads after it") {
    const TempDir dir;
    const fs::path file = dir / "tokenizer.pkl";
    std::vector<BadTokenizer> all = bad_vocabularies();
    for (BadTokenizer& bad : bad_states()) all.push_back(std::move(bad));
    std::size_t refused = 0;
    for (const BadTokenizer& bad : all) {
        CAPTURE(bad.name);
        write_file(file, bad.pickle);
        const std::string message = error_of([&] { nanogpt::load_tokenizer(file); });
        CAPTURE(message);
        CHECK(contains(message, "\"tokenizer.pkl\": "));
        CHECK(contains(message, bad.reason));
        CHECK_FALSE(contains(message, "\n"));
        refused += contains(message, bad.reason);
        write_tokenizer(file, make_tokenizer(300));
        CHECK(nanogpt::load_tokenizer(file).vocab_size() == 300);
    }
    CHECK(all.size() >= 48);
    report("A3", refused, all.size());
}

TEST_CASE("tokenizer: a vocabulary made to collide in the hash table is refused, not slow") {
    // Keys of 7 bytes are the bytes themselves; these are such that their hash ends in zeros.
    TokenizerSpec spec = make_tokenizer(265);
    std::uint64_t inverse = 1;  // of the multiplier, modulo 2^64
    for (int i = 0; i < 6; ++i) inverse *= 2 - 0x9E3779B97F4A7C15u * inverse;
    CHECK(inverse * 0x9E3779B97F4A7C15u == 1);
    for (std::uint64_t high = 1; spec.ranks.size() < 5000; ++high) {
        const std::uint64_t key = (high << 32 | high) * inverse;
        if (key >> 56 != 7) continue;
        std::string bytes;
        put64(bytes, key);
        spec.ranks.emplace_back(bytes.substr(0, 7), spec.ranks.size());
    }
    for (auto& special : spec.specials)
        special.second += static_cast<std::int64_t>(spec.ranks.size()) - 256;
    CHECK(contains(error_of([&] { load(spec); }), "share a hash"));
}

TEST_CASE("tokenizer: a file cut at any byte is refused") {
    const std::string good = tokenizer_pickle(make_tokenizer(280));
    std::size_t refused = 0;
    for (std::size_t n = 0; n < good.size(); ++n) {
        refused += !error_of([&] { load(std::string_view(good).substr(0, n)); }).empty();
    }
    CHECK(refused == good.size());
    report("A6 tokenizer", refused, good.size());
}

TEST_CASE("tokenizer: a file with changed bytes is refused or loads, and what loads works") {
    const std::string good = tokenizer_pickle(make_tokenizer(280));
    Random random(17);
    const int rounds = exhaustive() ? 1'000'000 : quick() ? 2000 : 20000;
    for (int round = 0; round < rounds; ++round) {
        std::string bad = good;
        for (std::size_t n = 1 + random.below(4); n > 0; --n) {
            const std::size_t at = random.below(bad.size());
            switch (random.below(4)) {
                case 0:
                    bad[at] = static_cast<char>(random.next());
                    break;
                case 1:
                    bad[at] = "\x00\x7F\x80\xFF"[random.below(4)];
                    break;
                case 2:
                    bad.erase(at, random.below(8));
                    break;
                default:
                    bad.insert(at, good.substr(random.below(good.size()), random.below(8)));
                    break;
            }
        }
        error_of([&] {
            const Tokenizer tokenizer = load(bad);
            const std::string text = "the 12 \u00E9tudes'll\n\n be\u2026";
            REQUIRE(tokenizer.decode(tokenizer.encode(text)) == text);
        });
    }
    report("A8 tokenizer", static_cast<std::size_t>(rounds), static_cast<std::size_t>(rounds));
}

// ==== golden files ===============================================================================

namespace {

struct Golden {
    std::string text;
    Ids ids;
};

// The lines of a .jsonl.gz; empty if gzip is not there.
std::vector<Golden> read_golden(const fs::path& file) {
    const std::string command = "gzip -dc '" + file.string() + "' 2>/dev/null";
    std::FILE* pipe = ::popen(command.c_str(), "r");
    if (pipe == nullptr) return {};
    std::string lines;
    char buffer[65536];
    for (std::size_t n = 1; n > 0;) {
        n = std::fread(buffer, 1, sizeof buffer, pipe);
        lines.append(buffer, n);
    }
    if (::pclose(pipe) != 0) return {};
    std::vector<Golden> out;
    for (std::size_t at = 0, end; (end = lines.find('\n', at)) != lines.npos; at = end + 1) {
        const nanogpt::Json line =
            nanogpt::parse_json(std::string_view(lines).substr(at, end - at));
        out.push_back({line.find("text")->string, {}});
        for (const nanogpt::Json& id : line.find("ids")->array) {
            out.back().ids.push_back(static_cast<Token>(id.number));
        }
    }
    return out;
}

}  // namespace

TEST_CASE("tokenizer: tiktoken's ids of thousands of texts of every script") {
    if (shared_dir().empty()) {
        MESSAGE("skipped: no golden files; set NANOGPT_SHARED to their directory");
        return;
    }
    std::size_t same = 0, total = 0;
    for (const char* name : {"small_1031", "large_32768"}) {
        const fs::path dir = shared_dir() / "fixtures" / "tokenizer";
        const Tokenizer tokenizer = nanogpt::load_tokenizer(dir / name / "tokenizer.pkl");
        CHECK(tokenizer.warnings().empty());
        const std::vector<Golden> golden = read_golden(dir / (std::string(name) + ".jsonl.gz"));
        if (golden.empty()) MESSAGE("skipped: cannot read ", name, ".jsonl.gz; is gzip installed?");
        for (const Golden& g : golden) {
            CAPTURE(g.text);
            CHECK(tokenizer.encode(g.text) == g.ids);
            CHECK(tokenizer.decode(g.ids) == g.text);
            same += tokenizer.encode(g.text) == g.ids;
        }
        total += golden.size();
    }
    report("E4", same, total);
}
