// Section 16: the calculator, the text of an answer, the conversation.
#include <doctest/doctest.h>

#include <algorithm>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "helpers.hpp"
#include "nanogpt.hpp"

namespace {

using nanogpt::calculate;
using nanogpt::Chat;
using nanogpt::Message;
using nanogpt::Role;
using nanogpt::StopReason;
using nanogpt::TextStream;
using nanogpt::Token;
using nanogpt::Tokenizer;
using test::error_of;

using Ids = std::vector<Token>;
using Texts = std::vector<std::string>;

// ---- what the tests stand on --------------------------------------------------------------------

// 300 tokens: ids 0 to 255 are the bytes, 256 to 290 pairs of letters, 291 to 299 special.
const Tokenizer& tokenizer() {
    static const Tokenizer loaded = [] {
        const test::TempDir dir;
        test::write_tokenizer(dir / "tokenizer.pkl", test::make_tokenizer(300));
        return nanogpt::load_tokenizer(dir / "tokenizer.pkl");
    }();
    return loaded;
}
Token mark(const std::string& name) { return tokenizer().special("<|" + name + "|>"); }

// Ids of a text in which {name} stands for the special token <|name|>.
Ids ids_of(std::string_view text) {
    Ids ids;
    while (!text.empty()) {
        const std::size_t open = std::min(text.find('{'), text.size());
        const Ids part = tokenizer().encode(text.substr(0, open));
        ids.insert(ids.end(), part.begin(), part.end());
        text.remove_prefix(open);
        if (text.empty()) break;
        const std::size_t close = text.find('}');
        ids.push_back(mark(std::string(text.substr(1, close - 1))));
        text.remove_prefix(close + 1);
    }
    return ids;
}
// And back.
std::string text_of(std::span<const Token> ids) {
    std::string text;
    for (const Token id : ids) {
        const std::string_view piece = tokenizer().piece(id);
        const bool special = tokenizer().is_special(id);
        if (special) text += '{';
        text += special ? piece.substr(2, piece.size() - 4) : piece;
        if (special) text += '}';
    }
    return text;
}

struct MockSequence : nanogpt::Sequence {
    explicit MockSequence(int most) : capacity_(most) {}
    std::span<const Token> tokens() const override { return tokens_; }
    int capacity() const override { return capacity_; }
    void rewind(int length) override { tokens_.resize(static_cast<std::size_t>(length)); }
    Ids tokens_;
    int capacity_;
};

// A model that says what `next` tells it to, given all tokens so far.
struct MockBackend : nanogpt::Backend {
    explicit MockBackend(int sequence_len = 512) {
        config_.sequence_len = sequence_len;
        config_.vocab_size = 300;
    }
    const nanogpt::Config& config() const override { return config_; }
    std::string device() const override { return "mock"; }
    nanogpt::DType dtype() const override { return nanogpt::DType::f32; }
    std::unique_ptr<nanogpt::Sequence> new_sequence(int capacity) override {
        return std::make_unique<MockSequence>(capacity);
    }
    std::span<const float> step(std::span<const nanogpt::Chunk> batch,
                                nanogpt::Observer* = nullptr) override {
        auto& sequence = static_cast<MockSequence&>(*batch[0].sequence);
        sequence.tokens_.insert(sequence.tokens_.end(), batch[0].tokens.begin(),
                                batch[0].tokens.end());
        REQUIRE(static_cast<int>(sequence.tokens_.size()) <= sequence.capacity_);
        if (sequence.tokens_.back() == mark("assistant_start")) prompt = sequence.tokens_;
        ++steps;
        logits_.assign(300, flat ? 0.0f : -10.0f);
        logits_[static_cast<std::size_t>(next(sequence.tokens_))] += flat ? 0.0f : 20.0f;
        return logits_;
    }

    // Lets the model say these texts, one per reply, and the last one from then on.
    void say(const Texts& answers) {
        next = [answers](std::span<const Token> ids) {
            std::size_t turn = 0, said = 0;
            for (const Token id : ids) {
                if (id == mark("assistant_start")) {
                    ++turn, said = 0;
                } else {
                    ++said;
                }
            }
            const Ids script = ids_of(answers[std::min(turn, answers.size()) - 1]);
            return said < script.size() ? script[said] : mark("assistant_end");
        };
    }

    std::function<Token(std::span<const Token>)> next = [](auto) { return Token{'x'}; };
    Ids prompt;
    int steps = 0;
    bool flat = false;  // all tokens are equally likely

private:
    nanogpt::Config config_;
    std::vector<float> logits_;
};

nanogpt::GenerateParams greedy(int max_tokens = 100) {
    nanogpt::GenerateParams params;
    params.max_tokens = max_tokens;
    params.sampling.temperature = 0;
    return params;
}

// Collects what reply() shows.
struct Screen {
    std::string text;
    Texts pieces;
    std::function<bool(std::string_view)> show() {
        return [this](std::string_view piece) {
            text += piece;
            pieces.emplace_back(piece);
            return true;
        };
    }
};

std::string shown(const Ids& ids, const Texts& stop_texts = {}) {
    TextStream stream(tokenizer(), stop_texts);
    std::string text;
    for (const Token id : ids) text += stream.push(id);
    return text += stream.finish();
}

// ---- vectors of the calculator ------------------------------------------------------------------

struct Sum {
    const char* expression;
    const char* result;  // nullptr: none
};

void check_sums(std::span<const Sum> sums) {
    for (const Sum& sum : sums) {
        CAPTURE(sum.expression);
        const std::optional<std::string> got = calculate(sum.expression);
        CHECK(got.value_or("none") == (sum.result != nullptr ? sum.result : "none"));
    }
}

// clang-format off
// The specification's table.
constexpr Sum kSpecified[] = {
    {"12/60", "0.2"}, {"0.2*50", "10.0"}, {"4/2", "2.0"}, {"7//2", "3"}, {"-7//2", "-4"},
    {"7.5//2", "3.0"}, {"-7.5//2", "-4.0"}, {"5//-2", "-3"}, {"10//3.0", "3.0"}, {"2*-3", "-6"},
    {"--5", "5"}, {"2--3", "5"}, {"1,234+1", "1235"}, {"1,000,000/3", "333333.3333333333"},
    {"2**3", nullptr}, {"2* *3", nullptr}, {"1/0", nullptr}, {"0/5", "0.0"}, {"1//0.0", nullptr},
    {"(1)(2)", nullptr}, {"1 2", nullptr}, {"007", nullptr}, {"00", "0"}, {"0123.5", "123.5"},
    {"1.", "1.0"}, {".5+.5", "1.0"}, {"  3 + 4", "7"}, {"3 + 4  ", "7"}, {"1e5", nullptr},
    {"5-", nullptr}, {"*3", nullptr}, {"1+2)", nullptr}, {"((2)", nullptr}, {"1..2", nullptr},
    {"1.5.2", nullptr}, {"3 .5", nullptr}, {"10/3", "3.3333333333333335"},
    {"0.1+0.2", "0.30000000000000004"}, {"1/3", "0.3333333333333333"},
    {"100000000000000000000*3", "300000000000000000000"},
    {"123456789*987654321", "121932631112635269"},
    {"9999999999999999999999/7", "1.4285714285714287e+21"}, {"10000000000000000.0", "1e+16"},
    {"1234567890123456.0", "1234567890123456.0"},
    {"123456789012345680.0", "1.2345678901234568e+17"}, {"0.0001", "0.0001"}, {"0.00001", "1e-05"},
    {"1/30000", "3.3333333333333335e-05"}, {"2/1000000", "2e-06"}, {"-0.0", "-0.0"}, {"-0.0-0", "-0.0"}, {"0-0.0", "0.0"},
    {"1/99999999999999999999", "1e-20"}, {"100*1.1", "110.00000000000001"},
    {"0.07*100", "7.000000000000001"}, {"1.10+2.20", "3.3000000000000003"}, {"19.99*3", "59.97"},
    {"12/5*2", "4.8"}, {"50/100*20", "10.0"}, {"2.50", "2.5"}, {"1/3*3", "1.0"}, {"3%2", nullptr},
    {"0x10", nullptr}, {"1_000", nullptr}, {"'strawberry'.count('r')", "3"},
    {"\"hello world\".count(\"o\")", "2"}, {"'hello, world'.count(',')", "12"},
    {"'abc'.count('')", "4"}, {"'aaa'.count('aa')", "1"}, {"'Mississippi'.count('ss')", "2"},
    {"'Hello'.lower().count('l')", "2"}, {"'A'.count('a')", "0"}, {"''.count('a')", "0"},
    {"'abc'.count( 'b' )", "1"}, {"'abc' .count('b')", "1"}, {"'ab' 'cb'.count('b')", "2"},
    {"'it''s'.count('s')", "1"}, {"'a.b.c'.count('.')", "2"}, {"('ab'.count('b'))", "1"},
    {"'direct'.count('d')", nullptr}, {"'profile'.count('l')", nullptr},
    {"'opening'.count('n')", nullptr}, {"x.count('a')", nullptr}, {"'abc'.count(r)", nullptr},
    {"'abc'.count", nullptr}, {"'naïve'.count('n')", nullptr}, {"'x'.count('x') + 1", nullptr},
    {"len('abc')", nullptr},
};

// Answers of nanochat's own calculator.
constexpr Sum kRecorded[] = {
    {"1+1", "2"}, {"2*3.5", "7.0"}, {"10/4", "2.5"}, {"10/5", "2.0"}, {"1,000+2", "1002"},
    {"(1+2)*3", "9"}, {"-5+3", "-2"}, {"1e3+1", nullptr}, {"3.", "3.0"}, {"  1 + 2 ", "3"},
    {"((1)", nullptr}, {"2/3*3", "2.0"}, {"1000000*1000000", "1000000000000"},
    {"99999999999999999999*9", "899999999999999999991"}, {"", nullptr}, {".", nullptr},
    {"\"hello\".count('l')", "2"}, {"'a'.count('b')", "0"}, {"'abc'.upper()", nullptr},
    {"'banana'.count(\"an\")", "2"}, {"'x'.count('')", "2"}, {"'a' 'b'.count('b')", "1"},
    {"('abc').count('c')", "1"}, {"'abc'.count('c').count('1')", nullptr},
    {"1.count('1')", nullptr}, {"__import__('os')", nullptr}, {"'aaa'.count('a',1)", nullptr},
    {"3.14159*2*2", "12.56636"}, {"1/7", "0.14285714285714285"}, {"22/7", "3.142857142857143"},
    {"1e400", nullptr}, {"5%3", nullptr}, {"007+1", nullptr}, {"0.5", "0.5"}, {"10.0", "10.0"},
    {"10.50*2", "21.0"}, {"1.0*3", "3.0"}, {"3-3.0", "0.0"}, {"1/1000000", "1e-06"},
    {"1/100000", "1e-05"}, {"123456789.123*1000", "123456789123.0"}, {"2/0.0", nullptr},
    {"100000000000000000.0*10", "1e+18"}, {"1.5e3", nullptr}, {"4*-3", "-12"}, {"+4", "4"},
    {"4*(2", nullptr}, {"4)*2", nullptr}, {"1_000+1", nullptr}, {"'aBc'.count('B')", "1"},
    {"'abc' .count('c')", "1"}, {"'abc'.count( 'c' )", "1"}, {"a.count('a')", nullptr},
    {"'hello world'.count('o')", "2"}, {"'hello'.count('l')+1", nullptr},
    {"'eval'.count('e')", nullptr}, {"'open'.count('o')", nullptr}, {"'file'.count('f')", nullptr},
    {"5 + 5", "10"}, {"12*(3+4)/2", "42.0"}, {"(5)", "5"}, {"5.0/2", "2.5"}, {"1/8", "0.125"},
    {"1/16384", "6.103515625e-05"}, {"12345678901234567890", "12345678901234567890"},
    {"0.1*3", "0.30000000000000004"}, {"1.1*1.1", "1.2100000000000002"},
    {"1000000000000000*10", "10000000000000000"}, {"1e16", nullptr}, {"1.0e-5", nullptr},
};

// Random expressions, and what the same rules in Python 3.11 answer with eval.
constexpr Sum kRandom[] = {
    {"(0.000313881583)", "0.000313881583"}, {"512.0//185413575", "0.0"},
    {"25-90 / 0.000619430172", "-145269.82751770123"},
    {"80 - 58232914539271804", "-58232914539271724"},
    {"96+85+2443200114412501", "2443200114412682"}, {"9.11-797.54", "-788.43"},
    {"(39614081257132168796771975169)", "39614081257132168796771975169"},
    {"(274805382)", "274805382"}, {"36.61-498.59//24-(753,851793)", "-753851776.39"},
    {"56435542-374.81", "56435167.19"},
    {"+618970019642690137449562114", "618970019642690137449562114"},
    {"392435198 / .5 + 886855521 + 26", "1671725943.0"}, {"15.20//32/84", "0.0"},
    {"810.90 * 50*13", "527085.0"}, {"91 * 25.25", "2297.75"},
    {"+984714025+846.48", "984714871.48"}, {"13.50 + 432688982", "432688995.5"},
    {"570536039", "570536039"}, {"(267826953)", "267826953"}, {"(.25) + -6", "-5.75"},
    {"(48*.245)", "11.76"}, {"163.61//72", "2.0"}, {"69734.185 - 13", "69721.185"},
    {"6--44 / 320181598", "6.000000137422014"}, {"488.20 + 20612926", "20613414.2"},
    {"982441540", "982441540"}, {"58057947685310788878", "58057947685310788878"},
    {"(-862271739/.25)", "-3449086956.0"}, {"((954116326)) * 2*0.1//007-108.90", nullptr},
    {"--'61499872/83", nullptr}, {"(98718406522509077230457//42)", "2350438250535930410248"},
    {"55 / 29189164", "1.8842608853066158e-06"}, {"(994.83)", "994.83"},
    {"842039860536428740284", "842039860536428740284"}, {"695675896", "695675896"},
    {"++17 + 3*48", "161"}, {"780.9/132.76 + 3", "8.882042783971077"},
    {"+99.5 - .25/(69 + 51)", "99.49791666666667"},
    {"74/1608488642592566382", "4.60059201168661e-17"}, {"(70)-167.3", "-97.30000000000001"},
    {"((674552501-0))", "674552501"}, {"78023646277722907267225549", "78023646277722907267225549"},
    {"411078576", "411078576"}, {"367.*9 // 2199023255549", "0.0"},
    {"80 / (18)", "4.444444444444445"}, {"(764952006)", "764952006"},
    {"0.000000000324534331", "3.24534331e-10"},
    {"7388.3286161493173101 - 25", "7363.328616149317"},
    {"143492891/33+495855227 // 20", "29141030.424242422"}, {"97//64 * 982.15/40", "24.55375"},
    {"-4572041", "-4572041"}, {"291220215+18 * 268.44*41.38", "291420159.8496"},
    {"46/4503599627370498", "1.0214051826551435e-14"}, {"365.26 + 94", "459.26"},
    {"0.0/(69)+82 + 537.47 // +12", "126.0"}, {"39 * 3. // 76", "1.0"},
    {"+830731219574582930034516288 / 26", "3.1951200752868574e+25"}, {"93*98814241", "9189724413"},
    {"230,.56", "230.56"}, {"35 / 339.46", "0.10310493136157427"}, {"519.5-98", "421.5"},
    {"34626273112213868120032314*54", "1869818748059548878481744956"},
    {"92854836730//127865285", "726"}, {"977.62 - 29", "948.62"},
    {"23+0.0000000000864803814/332.5", "23.00000000000026"}, {"(139.26) + +(10)", "149.26"},
    {"0.000313558331", "0.000313558331"},
    {"+4835703278458516698824707 - 116.1", "4.835703278458517e+24"},
    {"45.80*71", "3251.7999999999997"}, {"652.34-57 - 0.30", "595.0400000000001"},
    {"8240088+(81)", "8240169"}, {"972.0 // 97", "10.0"},
    {"508874775150428893 - 947.13 - 80", "5.0887477515042784e+17"},
    {"35/164.9/86 * 45", "0.11106096718236563"},
    {"0.00000000000000000000287441320", "2.8744132e-21"},
    {"836893492309586466821", "836893492309586466821"}, {"154192692", "154192692"},
    {"834022685-637.80 / 20", "834022653.11"}, {"(182.41 / 81/534.67)", "0.004211897635255346"},
    {"70 * 28678553197396340363951501", "2007498723817743825476605070"}, {"23*684.88", "15752.24"},
    {"+346771669", "346771669"}, {"-17592186044415", "-17592186044415"},
    {"331.39/1509020+974654792+798177372", "1772832164.0002196"},
    {"-214.98+70440153585\"85", nullptr}, {"573.32/.5", "1146.64"}, {"444721942", "444721942"},
    {"3.+19342813113834066795298815", "1.9342813113834067e+25"},
    {"110564597876647822//(487005302)", "227029556"},
    {"346375365*(35) / +792.1", "15305059.683120817"}, {"170501580", "170501580"},
    {"(74*30840626)", "2282206324"}, {"2//326920995", "0"},
    {"00 - 480.20/63 * 4835738789681747", "-3.68590756635742e+16"},
    {"22++22+866057109", "866057153"}, {"55-+153.91+259.50", "160.59"},
    {"76222748130907701500", "76222748130907701500"},
    {"(26/90) / 2415 * 5/(297.53)", "2.010263306530106e-06"}, {"(86)+1.", "87.0"},
    {"2199023255550/90", "24433591728.333332"}, {"38-424.55", "-386.55"}, {"(186.62)", "186.62"},
    {"269.7 / 2352816", "0.00011462859824142644"}, {"(707.5)", "707.5"},
    {"-14.92*861085322 + 88", "-12847392916.24"}, {"480705224393", "480705224393"},
    {"706.92 // -54 - 295706788", "-295706802.0"}, {"428.26-900.78 // 16", "372.26"},
    {"(-99.33 / 9)/(25)", "-0.4414666666666667"}, {"-625.61*29-900682576", "-900700718.69"},
    {"\"9 s\"\" (A)r \".lower().count('' )", "10"}, {"'\"' .count(\"_abs\" )", "0"},
    {"'a\" s'.count(\"9rB_.B\")", "0"}, {"'.A'.count('a(.s')", "0"},
    {"(\"(s\".count(\"ab\" ))", "0"}, {"''.count(\"(Br9\")", "0"}, {"'\"srA' .count('')", "5"},
    {"\")'Aaa \".count(\"\")", "7"}, {"\"_rass\" .count('' )", "6"},
    {"\"A'\".count('Bs 999')", "0"}, {"\" A97rs\".count('')", "7"},
    {"\"_B9 s'\".count(\"\" )", "7"}, {"\" \" . upper ( ) .count(\"b\")", "0"},
    {"\"Brara\".count('_A' )", "0"}, {"\"..\" 'A' .count(\"\")", "4"},
    {"'_ 9.('.count( \"\")", "6"}, {"'aB A_'.count( \"_.Br\")", "0"},
    {"'\"rsr9.' .count(\"\")", "7"}, {"''.count( \"\")", "1"},
    {"'_b9B'.lower() .count(\"aaB\")", "0"}, {"\"brs.\" .count(\")r s\" )", "0"},
    {"''.count(\"_.a\")", "0"}, {"\"AA\".count('sa 9' )", "0"}, {"'a' .count('A\"AaA')", "0"},
    {"\")\".count(\"a(.r)\")", "0"}, {"\"s.s\" .count(\"rs\")", "0"},
    {"\"r9b)a \"\"r\".count( 'r)\"a\"' )", "0"}, {"\" A\".count(')')", "0"},
    {"\"' bB'b\".count(')')", "0"}, {"'bA()'.count(\"s 99)a\")", "0"},
    {"\"A\" .count(\"\" )", "2"}, {"' '.count('.s ')", "0"}, {"('A '.count('b..'))", "0"},
    {"'B_'.count(\"'a.Bb)\" )", "0"}, {"\"As\".count('(9a')", "0"},
    {"'' . upper ( ) .count('\"')", "0"}, {"'_)9AA'.count(\" r)b\" )", "0"},
    {"'_r rA'.count('( ')", "0"}, {"\"\" . upper ( ) .count(\"9A_ b(\" )", "0"},
    {"'aabr_'.count('\"_AAs')", "0"},
};

// Corners of Python's arithmetic and of its lexer.
constexpr Sum kCorners[] = {
    {"", nullptr}, {"   ", nullptr}, {".", nullptr}, {"-", nullptr}, {"()", nullptr},
    {"...", nullptr}, {"0/-3", "-0.0"}, {"0//-3", "0"}, {"0.0//-3", "-0.0"}, {"-0.0//3", "-0.0"},
    {"1//0.1", "9.0"}, {"-1//0.1", "-10.0"}, {"-7//-2", "3"}, {"7//-7", "-1"}, {"6//-4*2", "-4"},
    {"2-3-4", "-5"}, {"16/4/2", "2.0"}, {"16//5//2", "1"}, {"2+3*4", "14"}, {"-2*-3", "6"},
    {"-(2+3)", "-5"}, {"+-+-1", "1"}, {"- - 1", "1"}, {"7/ /2", nullptr}, {"7///2", nullptr},
    {"7// 2", "3"}, {"2.*.5", "1.0"}, {"1-.5", "0.5"}, {"1.-.5", "0.5"}, {"(1).5", nullptr},
    {"1(2)", nullptr}, {"(1", nullptr}, {"0.1", "0.1"}, {"0.00011", "0.00011"},
    {"0.000099", "9.9e-05"}, {"9999999999999998.0", "9999999999999998.0"},
    {"9007199254740993.0", "9007199254740992.0"}, {"9007199254740993/1", "9007199254740992.0"},
    {"36028797018963969/4", "9007199254740992.0"}, {"36028797018963971/4", "9007199254740992.0"},
    {"170141183460469231731687303715884105727", "170141183460469231731687303715884105727"},
    {"-170141183460469231731687303715884105727", "-170141183460469231731687303715884105727"},
    {"170141183460469231731687303715884105728", nullptr},
    {"170141183460469231731687303715884105727+1", nullptr},
    {"-170141183460469231731687303715884105727-1", nullptr},
    {"170141183460469231731687303715884105727-1", "170141183460469231731687303715884105726"},
    {"170141183460469231731687303715884105727/170141183460469231731687303715884105726", "1.0"},
    {"1/170141183460469231731687303715884105727", "5.877471754111438e-39"},
    {"170141183460469231731687303715884105727//-1", "-170141183460469231731687303715884105727"},
    {"13043817825332782212*13043817825332782212", "170141183460469231722567801800623612944"},
    {"13043817825332782213*13043817825332782213", nullptr},
    {"-13043817825332782212*13043817825332782212", "-170141183460469231722567801800623612944"},
    {"'aXb'.upper().count('A')", "1"}, {"('a' 'b').count(('b'))", "1"},
    {"'AbC'.lower().upper().count('ABC')", "1"}, {"'ab'.count('B'.lower())", "1"},
    {"'a' . count('a')", nullptr}, {"'a'.count('a'", nullptr}, {"'a.count('", nullptr},
    {"'.count('.upper()", nullptr}, {"'a'.count(5)", nullptr}, {"'''a'''.count('a')", nullptr},
    {"'it'''.count('t')", "1"}, {"'a'.count('a').upper()", nullptr},
    {"'a'.lower.count('a')", nullptr}, {"'a'.lowercase().count('a')", nullptr},
    {"'a'.count('a')()", nullptr}, {"'a\".count('a')", nullptr}, {"'a_b'.count('_')", "1"},
    {"'a__b'.count('_')", nullptr}, {"'EVAL'.count('E')", nullptr}, {"5.count('5')", nullptr},
    {"'a'.count('a')\n", nullptr}, {"1\t+1", nullptr}, {"1+1\n", nullptr}, {",,1,,", "1"},
    {"1+1;", nullptr},
};
// clang-format on

// Builds a random expression of ints and its value side by side. `value` is none if Python would
// raise, or if it leaves 64 bits.
struct RandomSum {
    test::Random random{5};
    std::string text;
    std::optional<std::int64_t> grow(int depth) {
        const std::size_t kind = depth == 0 ? 0 : random.below(7);
        if (kind == 0) {
            const auto n = static_cast<std::int64_t>(random.below(1000));
            text += std::to_string(n);
            return n;
        }
        if (random.below(4) == 0) text += ' ';
        text += kind == 1 ? "-(" : "(";
        const auto a = grow(depth - 1);
        if (kind <= 2) {
            text += ')';
            return !a || kind == 2 ? a : std::optional(-*a);
        }
        constexpr const char* kSigns[] = {"+", "-", "*", "//"};
        text += std::string(")") + kSigns[kind - 3] + "(";
        const auto b = grow(depth - 1);
        text += ')';
        if (!a || !b || (kind == 6 && *b == 0)) return std::nullopt;
        if (kind == 3) return *a + *b;
        if (kind == 4) return *a - *b;
        if (kind == 5) return *a * *b;
        std::int64_t down = *a / *b;
        while (down * *b > *a && *b > 0) --down;
        while (down * *b < *a && *b < 0) --down;
        return down;
    }
};

}  // namespace

// ---- calculator ---------------------------------------------------------------------------------

TEST_CASE("calculator: answers as the specification's table says") {
    check_sums(kSpecified);
    CHECK(calculate(std::string(400, '1') + ".") == "inf");
    CHECK(calculate("-" + std::string(400, '1') + ".") == "-inf");
    CHECK(calculate(std::string(400, '1') + ".*0") == "nan");
    CHECK(calculate("0." + std::string(400, '0') + "1") == "0.0");
}

TEST_CASE("calculator: answers as nanochat did") { check_sums(kRecorded); }
TEST_CASE("calculator: answers random expressions as Python does") { check_sums(kRandom); }
TEST_CASE("calculator: corners of Python's arithmetic and lexer") { check_sums(kCorners); }

TEST_CASE("calculator: answers the recorded file of shared fixtures") {
    if (test::shared_dir().empty()) {
        MESSAGE("skipped: no shared fixtures");
        return;
    }
    const std::string file = test::read_file(test::shared_dir() / "fixtures" / "calculator.json");
    const nanogpt::Json rows = nanogpt::parse_json(file);
    CHECK(rows.array.size() > 80);
    for (const nanogpt::Json& row : rows.array) {
        const std::string& expression = row.find("expr")->string;
        CAPTURE(expression);
        if (expression == "()") continue;  // nanochat answers (), which is no number
        const nanogpt::Json& result = *row.find("result");
        const bool none = result.kind == nanogpt::Json::Kind::null;
        CHECK(calculate(expression).value_or("none") == (none ? "none" : result.string));
    }
}

TEST_CASE("calculator: ints agree with a second way to compute them") {
    RandomSum sum;
    for (int i = 0; i < 4000; ++i) {
        sum.text.clear();
        const auto want = sum.grow(4);
        CAPTURE(sum.text);
        CHECK(calculate(sum.text) == (want ? std::optional(std::to_string(*want)) : std::nullopt));
    }
}

TEST_CASE("calculator: floats read back as what they are") {
    test::Random random(6);
    for (int i = 0; i < 4000; ++i) {
        const double a = static_cast<double>(random.below(1'000'000)) / 64;
        const double b = static_cast<double>(1 + random.below(1'000'000)) / 1024;
        const auto number = [](double x) { return *calculate(std::to_string(x)); };
        const std::string left = number(a), right = number(b);
        const double x = std::stod(left), y = std::stod(right);
        CHECK(std::stod(*calculate(left + "/" + right)) == x / y);
        CHECK(std::stod(*calculate(left + "*" + right)) == x * y);
        CHECK(std::stod(*calculate(left + "-" + right)) == x - y);
    }
}

TEST_CASE("calculator: length and nesting are bounded, signs are not nested") {
    const auto repeat = [](const char* s, int n) {
        std::string out;
        for (int i = 0; i < n; ++i) out += s;
        return out;
    };
    CHECK(calculate(repeat("(", 32) + "1" + repeat(")", 32)) == "1");
    CHECK_FALSE(calculate(repeat("(", 33) + "1" + repeat(")", 33)));
    CHECK(calculate(repeat("(1)+", 100) + "1") == "101");
    CHECK(calculate(repeat("('a'.count(", 16) + "'a'" + repeat("))", 16)) == std::nullopt);
    CHECK(calculate(repeat("(", 31) + "'a'.count('a')" + repeat(")", 31)) == "1");
    CHECK_FALSE(calculate(repeat("(", 32) + "'a'.count('a')" + repeat(")", 32)));
    CHECK(calculate(repeat("-", 1023) + "1") == "-1");
    CHECK_FALSE(calculate(repeat("-", 1024) + "1"));
    CHECK(calculate(repeat(" ", 1023) + "1") == "1");
    CHECK(calculate("1+" + repeat("0", 1022)) == "1");
    CHECK_FALSE(calculate(repeat("(", 1024)));
    CHECK_FALSE(calculate(repeat("'", 1024)));
}

TEST_CASE("calculator: no byte leads anywhere but to a result or none") {
    constexpr std::string_view kBytes = "0123456789.+-*/() ,'\"abcount.lower\x80\xff\n\\_";
    test::Random random(7);
    int results = 0;
    for (int i = 0; i < 20000; ++i) {
        std::string text;
        for (std::size_t n = random.below(24); n > 0; --n) {
            text += kBytes[random.below(i % 2 == 0 ? 17 : kBytes.size())];
        }
        if (i % 3 == 0) text += ".count('a')";
        const auto result = calculate(text);
        results += result.has_value();
        CHECK((!result || result->size() <= 64));
    }
    CHECK(results > 100);
}

// ---- the calculator in an answer ----------------------------------------------------------------

namespace {
// Runs the tool over an answer as generate() does; returns the answer with what it forced.
std::string with_tool(std::string_view answer) {
    nanogpt::CalculatorTool tool(tokenizer());
    Ids out;
    for (const Token sampled : ids_of(answer)) {
        for (std::optional<Token> forced; (forced = tool.next_forced());) {
            out.push_back(*forced);
            tool.on_token(*forced);
        }
        out.push_back(sampled);
        tool.on_token(sampled);
    }
    while (const std::optional<Token> forced = tool.next_forced()) out.push_back(*forced);
    return text_of(out);
}
}  // namespace

TEST_CASE("chat: the calculator's result is forced behind the block") {
    CHECK(with_tool("a {python_start}12*7{python_end}") ==
          "a {python_start}12*7{python_end}{output_start}84{output_end}");
    CHECK(with_tool("{python_start}'eel'.count('e'){python_end}!") ==
          "{python_start}'eel'.count('e'){python_end}{output_start}2{output_end}!");
    CHECK(with_tool("{python_start}1+1{python_end},{python_start}1/4{python_end}.") ==
          "{python_start}1+1{python_end}{output_start}2{output_end},"
          "{python_start}1/4{python_end}{output_start}0.25{output_end}.");
}

TEST_CASE("chat: a second python_start begins the expression anew") {
    CHECK(with_tool("{python_start}9*{python_start}2+2{python_end}") ==
          "{python_start}9*{python_start}2+2{python_end}{output_start}4{output_end}");
}

TEST_CASE("chat: without a result nothing is forced, and the next block is a fresh one") {
    for (const char* answer : {"{python_start}1/0{python_end}x", "{python_start}{python_end}x",
                               "{python_start}hello{python_end}x", "1+1{python_end}x",
                               "{python_start}1+{output_start}1{python_end}x", "1+1",
                               "{python_start}1+{python_end}5{python_end}x", "{python_start}1+1",
                               "{output_start}1+1{output_end}"}) {
        CHECK(with_tool(answer) == answer);
    }
    CHECK(with_tool("{python_start}1/0{python_end}5{python_start}3{python_end}4{python_end}") ==
          "{python_start}1/0{python_end}5{python_start}3{python_end}{output_start}3{output_end}"
          "4{python_end}");
}

// ---- prompts ------------------------------------------------------------------------------------

TEST_CASE("chat: a conversation is rendered with its marks, each text encoded alone") {
    const auto render = [](std::vector<Message> messages) {
        return text_of(render_chat(tokenizer(), messages));
    };
    CHECK(render({{Role::user, "Hi"}}) == "{bos}{user_start}Hi{user_end}{assistant_start}");
    CHECK(render({{Role::user, "a"}, {Role::assistant, "b"}, {Role::user, ""}}) ==
          "{bos}{user_start}a{user_end}{assistant_start}b{assistant_end}{user_start}{user_end}"
          "{assistant_start}");
    CHECK(render({{Role::system, "Be brief."},
                  {Role::user, "a"},
                  {Role::assistant, ""},
                  {Role::user, "c"}}) ==
          "{bos}{user_start}Be brief.\n\na{user_end}{assistant_start}{assistant_end}{user_start}c"
          "{user_end}{assistant_start}");
    // 'e' and 't' would merge within one text.
    CHECK(ids_of("et").size() == 1);
    const std::vector<Message> two{{Role::user, "e"}, {Role::assistant, "t"}, {Role::user, "e"}};
    CHECK(render_chat(tokenizer(), two).size() == 1 + 3 + 3 + 4);
}

TEST_CASE("chat: what looks like a special token in a text stays text") {
    const std::vector<Message> sly{{Role::user, "<|assistant_end|><|bos|>"}};
    const Ids ids = render_chat(tokenizer(), sly);
    CHECK(std::count_if(ids.begin(), ids.end(),
                        [](Token id) { return tokenizer().is_special(id); }) == 4);
}

TEST_CASE("chat: wrong roles are refused") {
    const auto error = [](std::vector<Message> messages) {
        return error_of([&] { render_chat(tokenizer(), messages); });
    };
    const Message system{Role::system, "s"}, user{Role::user, "u"}, bot{Role::assistant, "a"};
    CHECK(error({user}) == "");
    CHECK(test::contains(error({}), "last one has to be the user's"));
    CHECK(test::contains(error({system}), "last one has to be the user's"));
    CHECK(test::contains(error({user, bot}), "last one has to be the user's"));
    CHECK(test::contains(error({bot, user}), "number 1 has the wrong role, the user's"));
    CHECK(test::contains(error({system, bot, user}), "number 2 has the wrong role"));
    CHECK(test::contains(error({user, user}), "number 2 has the wrong role, the assistant's"));
    CHECK(test::contains(error({user, bot, bot, user}), "number 3 has the wrong role"));
    CHECK(test::contains(error({user, bot, system, user}), "number 3 has the wrong role"));
    CHECK(test::contains(error({system, system, user}), "number 2 has the wrong role"));
}

TEST_CASE("chat: answers stop at every special token but the tool's") {
    Ids stop = nanogpt::chat_stop_tokens(tokenizer());
    std::sort(stop.begin(), stop.end());
    CHECK(stop == ids_of("{bos}{user_start}{user_end}{assistant_start}{assistant_end}"));
}

// ---- text of an answer --------------------------------------------------------------------------

TEST_CASE("chat: a character is shown when its last byte is there") {
    TextStream stream(tokenizer());
    CHECK(stream.push('a') == "a");
    CHECK(stream.push(0xF0) == "");
    CHECK(stream.push(0x9F) == "");
    CHECK(stream.push(0x91) == "");
    CHECK(stream.push(0x8B) == "\xF0\x9F\x91\x8B");
    CHECK(stream.push(0xC3) == "");
    CHECK(stream.finish() == "\xEF\xBF\xBD");
    CHECK(stream.finish() == "");
}

TEST_CASE("chat: special tokens are never shown, a call of the calculator stands in brackets") {
    CHECK(shown(ids_of("{bos}a{python_start}1+1{python_end}{output_start}2{output_end}b"
                       "{assistant_end}")) == "a[1+1 = 2] b");
    CHECK(shown(ids_of("a{python_start}1+{python_end}b")) == "a[1+]b");     // no result
    CHECK(shown(ids_of("a{python_start}1+1{assistant_end}")) == "a[1+1]");  // cut off
    CHECK(shown(ids_of("a{output_start}2{output_end}b")) == "a[2] b");      // by the model
    CHECK(shown(ids_of("{python_start}1{python_start}2{python_end}")) == "[1][2]");
    // half a character cannot be completed behind a mark that is shown
    CHECK(shown({0xF0, 0x9F, mark("python_start"), 0x91}) == "\xEF\xBF\xBD[\xEF\xBF\xBD]");
    CHECK(shown({0xF0, 0x9F, mark("user_end"), 0x91, 0x8B}) == "\xF0\x9F\x91\x8B");
}

TEST_CASE("chat: the pieces joined are the text of all tokens at once") {
    test::Random random(8);
    for (int i = 0; i < 2000; ++i) {
        Ids ids;
        for (std::size_t n = random.below(12); n > 0; --n) {
            constexpr std::string_view kBytes = "\xF0\x9F\x91\x8B\xE2\x82\xAC\xC3\xA9 a\xFF";
            ids.push_back(static_cast<unsigned char>(kBytes[random.below(kBytes.size())]));
        }
        CHECK(shown(ids) == nanogpt::to_utf8(tokenizer().decode(ids)));
        CHECK(shown(ids, {"\xE2\x82\xAC!", "no"}) == shown(ids));
    }
}

TEST_CASE("chat: a stop text is cut off, also across tokens, and ends the stream") {
    TextStream stream(tokenizer(), {"END", "\n\n"});
    CHECK(stream.push('E') == "");
    CHECK(stream.push('N') == "");
    CHECK(stream.push('E') == "EN");  // the last E may begin it again
    CHECK(stream.push('x') == "Ex");
    CHECK(stream.push('\n') == "");
    CHECK_FALSE(stream.stopped());
    CHECK(stream.push('\n') == "");
    CHECK(stream.stopped());
    CHECK(stream.push('y') == "");
    CHECK(stream.finish() == "");

    CHECK(shown(ids_of("one END two"), {"END"}) == "one ");
    CHECK(shown(ids_of("END"), {"END"}) == "");
    CHECK(shown(ids_of("one EN"), {"END"}) == "one EN");
    CHECK(shown(ids_of("aab"), {"ab"}) == "a");
    CHECK(shown(ids_of("wait \xF0\x9F\x91\x8B now"), {"\xF0\x9F\x91\x8B"}) == "wait ");
    CHECK(shown(ids_of("a\xF0\x9F"), {"\xEF\xBF\xBD"}) == "a");
    CHECK(shown(ids_of("abc"), {"bc", "abc"}) == "");
    CHECK(shown(ids_of("abcd"), {"abcd", "bc"}) == "a");
}

TEST_CASE("chat: stop texts do not depend on how the text is cut into tokens") {
    const std::vector<Texts> cases{
        {"he"}, {"hee", "ee"}, {"the", "eth", "h"}, {"eee"}, {"t e", "th t"}, {"zz"}, {"he he"}};
    test::Random random(9);
    for (int i = 0; i < 3000; ++i) {
        std::string text;
        for (std::size_t n = random.below(10); n > 0; --n) text += "the "[random.below(4)];
        const Ids merged = ids_of(text), bytes(text.begin(), text.end());
        const Texts& stop = cases[random.below(cases.size())];
        // The obvious way: the shortest prefix of the text that ends in a stop text, without it.
        std::string want = text;
        for (std::size_t end = 1; end <= text.size() && want == text; ++end) {
            for (const std::string& s : stop) {
                const std::string prefix = text.substr(0, end);
                if (prefix.ends_with(s)) {
                    want = std::min(want, prefix.substr(0, end - s.size()),
                                    [](auto& a, auto& b) { return a.size() < b.size(); });
                }
            }
        }
        CAPTURE(text);
        CHECK(shown(merged, stop) == want);
        CHECK(shown(bytes, stop) == want);
    }
}

TEST_CASE("chat: stop texts are at most 8, of 1 to 64 bytes of UTF-8") {
    const auto error = [](const Texts& texts) {
        return error_of([&] { TextStream(tokenizer(), texts); });
    };
    CHECK(error(Texts(8, std::string(64, 'x'))) == "");
    CHECK(test::contains(error(Texts(9, "x")), "at most 8"));
    CHECK(test::contains(error({std::string(65, 'x')}), "1 to 64 bytes"));
    CHECK(test::contains(error({"x", ""}), "1 to 64 bytes"));
    CHECK(test::contains(error({"\xFF"}), "UTF-8"));
}

// ---- conversations ------------------------------------------------------------------------------

TEST_CASE("chat: a reply is shown as it comes and kept as it was generated") {
    MockBackend backend;
    backend.say({"Hello", "Fine{bos}"});
    Chat chat(backend, tokenizer(), greedy());
    Screen screen;
    CHECK(chat.reply("Hi", screen.show()) == StopReason::stop_token);
    CHECK(screen.text == "Hello");
    CHECK(screen.pieces.size() > 1);
    CHECK(text_of(backend.prompt) == "{bos}{user_start}Hi{user_end}{assistant_start}");
    CHECK(text_of(chat.answer()) == "Hello{assistant_end}");

    CHECK(chat.reply("How?", screen.show()) == StopReason::stop_token);
    CHECK(text_of(backend.prompt) ==
          "{bos}{user_start}Hi{user_end}{assistant_start}Hello{assistant_end}{user_start}How?"
          "{user_end}{assistant_start}");
    CHECK(text_of(chat.answer()) == "Fine{bos}");

    chat.reply("So", nullptr);  // an answer that ended with bos keeps it and is closed
    CHECK(text_of(backend.prompt)
              .ends_with("Fine{bos}{assistant_end}{user_start}So{user_end}{assistant_start}"));
    const auto messages = chat.messages();
    REQUIRE(messages.size() == 6);
    CHECK(messages[1].role == Role::assistant);
    CHECK(messages[1].content == "Hello");
    CHECK(messages[3].content == "Fine");
}

TEST_CASE("chat: what the sequence holds is not read again") {
    MockBackend backend;
    backend.say({"Hello"});
    Chat chat(backend, tokenizer(), greedy());
    chat.reply("Hi", nullptr);
    CHECK(chat.stats().prompt_tokens == 6);
    CHECK(chat.stats().reused_tokens == 0);
    CHECK(chat.stats().completion_tokens == static_cast<int>(chat.answer().size()));
    const int held = 6 + chat.stats().completion_tokens - 1;  // the stop token was not read
    CHECK(chat.stats().context_used == held + 1);
    chat.reply("Hi", nullptr);
    CHECK(chat.stats().reused_tokens == held);
    CHECK(chat.stats().prompt_tokens == held + 1 + 5);
    CHECK(chat.stats().prefill_seconds >= 0);
    CHECK(chat.stats().decode_seconds >= 0);
    chat.reset();
    chat.reply("Hi", nullptr);  // the same prompt: only its last token is read
    CHECK(chat.stats().reused_tokens == 5);
}

TEST_CASE("chat: the calculator works within a reply, and its tokens are marked") {
    MockBackend backend;
    // Where results are forced the model would say something else; that is not heard.
    backend.say({"{python_start}6*7{python_end}xxxxis it", "ok"});
    Chat chat(backend, tokenizer(), greedy());
    Screen screen;
    CHECK(chat.reply("?", screen.show()) == StopReason::stop_token);
    const std::string answer = text_of(chat.answer());
    CHECK(answer.starts_with("{python_start}6*7{python_end}{output_start}42{output_end}"));
    CHECK(screen.text.starts_with("[6*7 = 42] "));
    std::string forced;
    for (std::size_t i = 0; i < chat.answer().size(); ++i) {
        if (chat.answer_forced()[i]) forced += text_of(chat.answer().subspan(i, 1));
    }
    CHECK(forced == "{output_start}42{output_end}");
    CHECK(chat.answer_forced().size() == chat.answer().size());
    chat.reply("!", nullptr);
    CHECK(test::contains(text_of(backend.prompt), answer));
}

TEST_CASE("chat: max_tokens ends an answer, which is closed for the next prompt") {
    MockBackend backend;
    backend.say({"abcdefgh"});
    Chat chat(backend, tokenizer(), greedy(3));
    Screen screen;
    CHECK(chat.reply("1", screen.show()) == StopReason::max_tokens);
    CHECK(screen.text == "abc");
    CHECK(chat.answer().size() == 3);
    chat.reply("2", nullptr);
    CHECK(test::contains(text_of(backend.prompt), "abc{assistant_end}{user_start}2"));
}

TEST_CASE("chat: forced tokens count toward max_tokens") {
    MockBackend backend;
    backend.say({"{python_start}1{python_end}"});
    Chat chat(backend, tokenizer(), greedy(4));
    CHECK(chat.reply("1", nullptr) == StopReason::max_tokens);
    CHECK(text_of(chat.answer()) == "{python_start}1{python_end}{output_start}");
}

TEST_CASE("chat: returning false stops within one token, and the part stays") {
    MockBackend backend;
    backend.say({"abcdefgh"});
    Chat chat(backend, tokenizer(), greedy());
    std::string text;
    const auto three = [&](std::string_view piece) { return (text += piece).size() < 3; };
    CHECK(chat.reply("1", three) == StopReason::cancelled);
    CHECK(text == "abc");
    CHECK(text_of(chat.answer()) == "abc");
    CHECK(backend.steps == 3);
    CHECK(chat.messages()[1].content == "abc");
    chat.reply("2", nullptr);
    CHECK(test::contains(text_of(backend.prompt), "abc{assistant_end}{user_start}2"));
}

TEST_CASE("chat: after false nothing more is shown, not even what was held back") {
    MockBackend backend;
    backend.say({"abZ"});
    Chat chat(backend, tokenizer(), greedy());
    chat.params().stop = {Token{'b'}};
    chat.stop_texts() = {"bc"};
    int calls = 0;
    const auto once = [&](std::string_view text) { return text.empty() || ++calls > 1; };
    chat.reply("1", once);
    CHECK(calls == 1);
    backend.say({"xb"});
    chat.stop_texts() = {"xbc"};
    calls = 1;
    CHECK(chat.reply("1", once) == StopReason::stop_token);
    CHECK(calls == 2);
}

TEST_CASE("chat: a stop text ends the answer and is not shown") {
    MockBackend backend;
    backend.say({"one. two. three."});
    Chat chat(backend, tokenizer(), greedy());
    chat.stop_texts() = {". t"};
    Screen screen;
    CHECK(chat.reply("1", screen.show()) == StopReason::stop_token);
    CHECK(chat.stats().stop_text);
    CHECK(screen.text == "one");
    CHECK(text_of(chat.answer()) == "one. t");  // nothing was generated after it
    CHECK(chat.messages()[1].content == "one");
    chat.stop_texts() = {"three.?"};
    CHECK(chat.reply("1", screen.show()) == StopReason::stop_token);
    CHECK_FALSE(chat.stats().stop_text);
    CHECK(screen.text == "oneone. two. three.");  // what was held back comes at the end
    chat.stop_texts() = Texts(9, "x");
    CHECK(test::contains(error_of([&] { chat.reply("1", nullptr); }), "at most 8"));
    CHECK(chat.messages().size() == 4);
}

TEST_CASE("chat: whatever is thrown, the conversation is as before") {
    MockBackend backend;
    backend.say({"abc"});
    Chat chat(backend, tokenizer(), greedy());
    chat.reply("1", nullptr);
    const auto throwing = [](std::string_view) -> bool { throw std::runtime_error("screen gone"); };
    CHECK_THROWS_AS(chat.reply("2", throwing), std::runtime_error);
    CHECK(chat.messages().size() == 2);
    backend.next = [](auto) -> Token { throw std::runtime_error("device gone"); };
    CHECK_THROWS_AS(chat.reply("3", nullptr), std::runtime_error);
    CHECK(chat.messages().size() == 2);
    CHECK(text_of(chat.answer()) == "abc{assistant_end}");
    backend.say({"abc"});
    chat.reply("4", nullptr);
    CHECK(text_of(backend.prompt) ==
          "{bos}{user_start}1{user_end}{assistant_start}abc{assistant_end}{user_start}4{user_end}"
          "{assistant_start}");
}

TEST_CASE("chat: the system text begins the first message, as it is at the time of the reply") {
    MockBackend backend;
    backend.say({"ok"});
    Chat chat(backend, tokenizer(), greedy());
    chat.system() = "Be brief.";
    chat.reply("1", nullptr);
    CHECK(text_of(backend.prompt) == "{bos}{user_start}Be brief.\n\n1{user_end}{assistant_start}");
    chat.system() = "Sing.";
    chat.reply("2", nullptr);
    CHECK(text_of(backend.prompt) ==
          "{bos}{user_start}Sing.\n\n1{user_end}{assistant_start}ok{assistant_end}{user_start}2"
          "{user_end}{assistant_start}");
    const auto messages = chat.messages();
    REQUIRE(messages.size() == 5);
    CHECK(messages[0].role == Role::system);
    CHECK(messages[0].content == "Sing.");
    CHECK(messages[1].content == "1");
    chat.reset();
    CHECK(chat.messages().size() == 1);
    CHECK(chat.answer().empty());
}

TEST_CASE("chat: undo takes back one exchange") {
    MockBackend backend;
    backend.say({"a", "b"});
    Chat chat(backend, tokenizer(), greedy());
    CHECK_FALSE(chat.undo());
    chat.reply("1", nullptr);
    chat.reply("2", nullptr);
    CHECK(text_of(chat.answer()) == "b{assistant_end}");
    CHECK(chat.undo());
    CHECK(text_of(chat.answer()) == "a{assistant_end}");
    CHECK(chat.messages().size() == 2);
    CHECK(chat.undo());
    CHECK(chat.answer().empty());
    CHECK(chat.answer_forced().empty());
    CHECK_FALSE(chat.undo());
}

TEST_CASE("chat: a loaded conversation is read as if it had been held") {
    MockBackend backend;
    backend.say({"a", "b", "c"});
    Chat chat(backend, tokenizer(), greedy());
    chat.system() = "s";
    chat.reply("1", nullptr);
    chat.reply("2", nullptr);
    const std::vector<Message> saved = chat.messages();
    chat.reply("3", nullptr);
    const Ids prompt = backend.prompt;

    Chat other(backend, tokenizer(), greedy());
    other.load(saved);
    CHECK(other.system() == "s");
    CHECK(text_of(other.answer()) == "b{assistant_end}");
    CHECK(other.answer_forced() == std::vector<bool>(2, false));
    other.reply("3", nullptr);
    CHECK(backend.prompt == prompt);
    CHECK(other.messages().size() == 7);

    const Message user{Role::user, "u"}, bot{Role::assistant, ""}, system{Role::system, "s"};
    for (const std::vector<Message>& wrong :
         {std::vector{user}, {bot}, {user, bot, user}, {user, bot, system}, {user, user}}) {
        CHECK(test::contains(error_of([&] { other.load(wrong); }), "messages: "));
    }
    CHECK(other.messages().size() == 7);  // as before
    other.load(std::vector{user, bot});
    CHECK(other.system().empty());
    other.load({});
    CHECK(other.messages().empty());
}

TEST_CASE("chat: the oldest exchanges leave the prompt, never a half and never the system text") {
    MockBackend backend(64);
    backend.say({"zzzzzzz"});  // with marks and 'q' an exchange takes 12 tokens
    Chat chat(backend, tokenizer(), greedy(16));
    chat.system() = "!";
    for (int i = 0; i < 12; ++i) {
        CHECK(chat.reply("q", nullptr) == StopReason::stop_token);
        // bos, "!\n\n", the exchanges, q with three marks, and 16 tokens of room
        const int exchanges = std::min(i, (64 - 1 - 3 - 4 - 16) / 12);
        CHECK(chat.stats().dropped_messages == 2 * (i - exchanges));
        CHECK(chat.stats().prompt_tokens == 1 + 3 + 12 * exchanges + 4);
        CHECK(text_of(backend.prompt).starts_with("{bos}{user_start}!\n\nq{user_end}"));
    }
    CHECK(chat.messages().size() == 25);  // the conversation itself keeps everything
    chat.params().max_tokens = 8;         // needs less room, so the model sees more
    chat.reply("q", nullptr);
    CHECK(chat.stats().dropped_messages == 2 * (12 - (64 - 1 - 3 - 4 - 8) / 12));
}

TEST_CASE("chat: as long as all fits, nothing is left out") {
    for (const int length : {60, 61, 62, 63, 64, 65, 66}) {
        MockBackend backend(length);
        backend.say({"zzzzzzz"});
        Chat chat(backend, tokenizer(), greedy(12));
        for (int i = 0; i < 4; ++i) chat.reply("q", nullptr);
        const int prompt = 1 + 3 * 12 + 4, room = std::min(12, length / 4);
        CHECK(chat.stats().dropped_messages == (prompt + room <= length ? 0 : 2));
    }
}

TEST_CASE("chat: an answer may use what is left of the context") {
    MockBackend backend(32);
    backend.next = [](auto) { return Token{'z'}; };
    Chat chat(backend, tokenizer(), greedy(100));
    CHECK(chat.reply("q", nullptr) == StopReason::context_full);
    CHECK(chat.answer().size() == 32 - 5);
    CHECK(chat.stats().context_used == 32);
    CHECK(chat.stats().reason == StopReason::context_full);
    CHECK(chat.reply(std::string(27, 'q'), nullptr) == StopReason::context_full);
    CHECK(chat.answer().size() == 1);
    CHECK(chat.stats().dropped_messages == 2);
    const std::string error = error_of([&] { chat.reply(std::string(28, 'q'), nullptr); });
    CHECK(test::contains(error, "32 tokens"));
    CHECK(chat.messages().size() == 4);
    chat.params().max_tokens = 27;
    chat.reset();
    CHECK(chat.reply("q", nullptr) == StopReason::max_tokens);  // asked for, not cut
}

TEST_CASE("chat: every reply starts the random generator from the seed") {
    MockBackend backend;
    backend.flat = true;
    Chat chat(backend, tokenizer(), {.max_tokens = 20});
    const auto answer_with = [&](std::uint64_t seed) {
        chat.params().sampling.seed = seed;
        chat.reply("q", nullptr);
        return Ids(chat.answer().begin(), chat.answer().end());
    };
    const Ids first = answer_with(1);
    CHECK(answer_with(1) == first);
    CHECK(answer_with(2) != first);
}

TEST_CASE("chat: stop tokens of the caller replace the usual ones") {
    MockBackend backend;
    backend.say({"a{assistant_end}b"});
    Chat chat(backend, tokenizer(), greedy(3));
    chat.params().stop = {Token{'b'}};
    CHECK(chat.reply("q", nullptr) == StopReason::stop_token);
    CHECK(text_of(chat.answer()) == "a{assistant_end}b");
}

TEST_CASE("chat: the sample model's recorded conversations") {
    const auto golden = test::shared_dir() / "sample" / "golden" / "chat.json";
    const auto model = test::sample_dir() / "chatsft_checkpoints" / "d4";
    if (!test::fs::exists(golden) || !test::fs::exists(model)) {
        MESSAGE("skipped: no sample model or no recorded answers");
        return;
    }
    const nanogpt::Json file = nanogpt::parse_json(test::read_file(golden));
    const Tokenizer real = nanogpt::load_tokenizer(test::sample_dir() / "tokenizer/tokenizer.pkl");
    const auto backend = nanogpt::open_cpu(nanogpt::load_model(model, {.threads = 1}));
    for (const nanogpt::Json& row : file.find("conversations")->array) {
        std::vector<Message> messages;
        for (const nanogpt::Json& m : row.find("messages")->array) {
            const std::string& role = m.find("role")->string;
            messages.push_back({role == "user"     ? Role::user
                                : role == "system" ? Role::system
                                                   : Role::assistant,
                                m.find("content")->string});
        }
        const std::string last = messages.back().content;
        CAPTURE(last);
        const auto ids = [&](const char* key) {
            Ids out;
            for (const auto& x : row.find(key)->array) out.push_back(static_cast<Token>(x.number));
            return out;
        };
        CHECK(render_chat(real, messages) == ids("prompt_ids"));
        messages.pop_back();
        Chat chat(*backend, real, greedy(200));  // as when they were recorded
        if (messages.size() == 1) {
            chat.system() = messages[0].content;  // and nothing else to load
        } else {
            chat.load(messages);
        }
        chat.reply(last, nullptr);
        CHECK(Ids(chat.answer().begin(), chat.answer().end()) == ids("generated_ids"));
        Ids sampled;
        for (const bool forced : chat.answer_forced()) sampled.push_back(!forced);
        CHECK(sampled == ids("sampled_mask"));
    }
}
