// `nanogpt serve` over real sockets: HTTP by hand, every split of good requests, each field of each
// request, who may ask, the streams byte by byte, the same answer on every way to it, cancelling,
// draining, keys. Models: the bundled sample, and one written here whose answers are known.
#include <doctest/doctest.h>

#include <sys/ioctl.h>
#include <sys/resource.h>  // prlimit

#include <functional>
#include <map>
#include <memory>
#include <set>
#include <sstream>  // istringstream

#include "helpers.hpp"
#include "http.hpp"

#ifndef NANOGPT_BINARY
#define NANOGPT_BINARY ""
#endif

namespace {

namespace fs = std::filesystem;
using http::ask;
using http::at;
using http::Clock;
using http::Connection;
using http::get;
using http::json_of;
using http::json_string;
using http::number_at;
using http::post;
using http::read_stream;
using http::Response;
using http::Server;
using http::Stream;
using http::text_at;
using http::Words;
using nanogpt::Json;
using test::contains;
using test::tally;

bool no_binary() { return test::no_binary(NANOGPT_BINARY); }

// ---- a model whose answers are known ------------------------------------------------------------

// Each token of a chain makes the next one certain; so the model says what is written here, one
// token after the other, whatever it was asked. Single bytes are tokens, so every border between
// the bytes of a character is a border between tokens. A token may stand in one chain only.
const Words kAnswer = {"H",    "\xC3", "\xA9", "l",    "lo",   " ", "\xF0", "\x9F",
                       "\x91", "\x8B", "a",    "b",    "c",    "d", "e",    "f",
                       "\xFF", "g",    "\xE2", "\x82", "\xAC", "!", "\xC2", "h"};
const int kAnswerTokens = 25;  // with the token that ends it
const std::string kAnswerText = "H\u00e9llo \U0001F44Babcdef\uFFFDg\u20ac!\uFFFDh";
const Words kCompletion = {"X", "Y", "Z"};  // ends after Z
const Words kLoop = {"q", "r", "s"};        // never ends: "qrsqrs..."

int id_of(const std::string& piece) {
    const test::TokenizerSpec tokenizer = test::make_tokenizer(512);
    for (const auto& [bytes, id] : tokenizer.ranks)
        if (bytes == piece) return static_cast<int>(id);
    for (const auto& [name, id] : tokenizer.specials)
        if (name == piece) return static_cast<int>(id);
    throw std::runtime_error("no token is " + piece);
}
std::vector<std::pair<int, int>> steps() {  // from token to token
    std::vector<std::pair<int, int>> out;
    const auto chain = [&](Words pieces) {
        for (std::size_t i = 1; i < pieces.size(); i++)
            out.emplace_back(id_of(pieces[i - 1]), id_of(pieces[i]));
    };
    Words answer = {"<|assistant_start|>"};
    answer.insert(answer.end(), kAnswer.begin(), kAnswer.end());
    answer.push_back("<|assistant_end|>");
    chain(answer);
    chain({"X", "Y", "Z", "<|bos|>"});
    chain({"q", "r", "s", "q"});
    chain({"v", "w", "<|python_start|>"});
    return out;
}
test::CheckpointSpec chain_model(const std::string& directory, const std::string& tag, int layers,
                                 int width) {
    test::CheckpointSpec spec;
    spec.gen = test::Gen::g0;
    spec.shape = {4096, 512, layers, 4, 4, width, "L"};
    spec.save = test::Save::bf16;
    spec.directory = directory;
    spec.tag = tag;
    spec.step = 100;
    // Nothing is added to the residual: after the norms it is the embedding, a one at the step's
    // number, and there the output has the next token's weight.
    spec.fill = [width](std::string_view name, std::span<float> values) {
        const bool in = name == "transformer.wte.weight", out = name == "lm_head.weight";
        if (!in && !out) return;
        std::size_t number = 0;
        for (const auto& [from, to] : steps()) {
            const auto row = static_cast<std::size_t>(in ? from : to);
            values[row * static_cast<std::size_t>(width) + number++] = in ? 1.0f : 4.0f;
        }
    };
    return spec;
}

// sft/d9 answers at once, sft/d2 says the same with a thousand times the work, base/d9 completes;
// base/d20 is still being written.
const fs::path& zoo() {
    static const test::TempDir dir;
    static const bool made = [] {
        test::make_checkpoint(dir.path(), chain_model("chatsft_checkpoints", "d9", 1, 64));
        test::make_checkpoint(dir.path(), chain_model("chatsft_checkpoints", "d2", 6, 256));
        test::make_checkpoint(dir.path(), chain_model("base_checkpoints", "d9", 1, 64));
        test::write_file(dir / "base_checkpoints" / "d20" / "model_000040.pt", "PK");
        return true;
    }();
    return made ? dir.path() : dir.path();
}
const std::string kChain = "sft/d9/100", kSlow = "sft/d2/100", kSample = "sft/d4/2600";

// ---- servers ------------------------------------------------------------------------------------

const test::TempDir& logs() {
    static const test::TempDir dir;
    return dir;
}
std::unique_ptr<Server> start(const fs::path& base, const Words& more = {},
                              const std::string& binary = NANOGPT_BINARY) {
    static int number = 0;
    Words args = {"--base-dir", base.string()};
    args.insert(args.end(), more.begin(), more.end());
    auto s = std::make_unique<Server>(binary, args,
                                      (logs() / ("log" + std::to_string(number++))).string(),
                                      Words{"CUDA_VISIBLE_DEVICES=-1"});
    const auto begin = Clock::now();  // it listens before the model is in memory
    while (contains(ask(s->port(), get("/health")).body, "loading") &&
           http::ms_since(begin) < 60'000)
        http::sleep_ms(5);
    return s;
}
// The two that most cases share; the last case ends them.
std::unique_ptr<Server>& shared(bool sample) {
    static std::unique_ptr<Server> servers[2];
    if (!servers[sample]) servers[sample] = start(sample ? test::sample_dir() : zoo());
    return servers[sample];
}
int port() { return shared(false)->port(); }
int sample_port() { return shared(true)->port(); }

// ---- requests -----------------------------------------------------------------------------------

const std::string kHi = R"("messages":[{"role":"user","content":"Hi"}])";
std::string chat_body(std::string_view more = "") {
    return "{" + kHi + R"(,"temperature":0)" + std::string(more) + "}";
}
std::string chat(std::string_view more = "") {
    return post("/v1/chat/completions", chat_body(more));
}
std::string nanochat(std::string_view more = "") {
    return post("/chat/completions", chat_body(more));
}
// Goes on with an answer that never ends.
std::string endless(int tokens, std::string_view more = "", const std::string& model = kChain) {
    return post(
        "/v1/chat/completions",
        R"({"model":")" + model +
            R"(","messages":[{"role":"user","content":"Hi"},{"role":"assistant","content":"q"}],)"
            R"("temperature":0,"max_tokens":)" +
            std::to_string(tokens) + std::string(more) + "}");
}

std::string shown(std::string_view bytes) {  // for messages
    std::string out = json_string(bytes.substr(0, 300));
    return bytes.size() > 300 ? out + "... (" + std::to_string(bytes.size()) + " bytes)" : out;
}
// "" if the body is the documented error, in both forms, and says nothing that it should not.
std::string fault_of_error(const Response& r) {
    const Json json = json_of(r.body);
    if (r.field("content-type").rfind("application/json", 0) != 0) return "not JSON: " + r.body;
    for (const char* path : {"error.message", "error.type", "error.code", "detail", "request_id"}) {
        const Json* value = at(json, path);
        if (value == nullptr || value->kind != Json::Kind::string || value->string.empty())
            return std::string(path) + " is missing: " + r.body;
    }
    if (at(json, "error.param") == nullptr) return "error.param is missing: " + r.body;
    if (text_at(json, "error.message") != text_at(json, "detail")) return "detail: " + r.body;
    if (text_at(json, "request_id") != r.field("x-request-id")) return "request_id: " + r.body;
    if (contains(r.body, zoo().string())) return "a path: " + r.body;
    for (const char c : r.body)
        if (static_cast<unsigned char>(c) < 0x20 && c != '\n') return "a control: " + r.body;
    return text_at(json, "error.message").size() > 600 ? "too long: " + r.body : "";
}
std::string code_of(const Response& r) { return text_at(json_of(r.body), "error.code"); }

// A request with one more line in its head.
std::string with_line(std::string request, const std::string& line) {
    return request.insert(request.find("\r\n") + 2, line + "\r\n");
}

// Waits until nothing is running or waiting; false if that takes longer than `ms`.
bool idle(int where, double ms = 5'000) {
    for (const auto start = Clock::now(); http::ms_since(start) < ms; http::sleep_ms(5)) {
        const Json json = json_of(ask(where, get("/health")).body);
        if (number_at(json, "active") == 0 && number_at(json, "queued") == 0) return true;
    }
    return false;
}

// Waits until it is true; false if that takes longer than a machine can be busy.
bool soon(const std::function<bool()>& is_true) {
    for (const auto start = Clock::now(); http::ms_since(start) < 30'000; http::sleep_ms(5))
        if (is_true()) return true;
    return false;
}

// Waits until something is running.
bool busy(int where) {
    for (const auto start = Clock::now(); http::ms_since(start) < 60'000; http::sleep_ms(5))
        if (number_at(json_of(ask(where, get("/health")).body), "active") > 0) return true;
    return false;
}

// By name and labels.
std::map<std::string, double> metrics_of(int where) {
    std::map<std::string, double> out;
    std::istringstream lines(ask(where, get("/metrics")).body);
    for (std::string line; std::getline(lines, line);) {
        const std::size_t space = line.rfind(' ');
        if (line[0] != '#') out[line.substr(0, space)] = std::atof(line.c_str() + space + 1);
    }
    return out;
}

// ---- HTTP by hand -------------------------------------------------------------------------------

struct Hand {
    std::string name, bytes;
    int status;
    char after;  // 'o': the connection stays open, 'c': it is closed
};
using Table = std::vector<Hand>;

// Sends the bytes; "" if exactly one response comes, as expected, and the connection is as said.
std::string fault_of(const Hand& c, int where) {
    Connection connection(where);
    if (!connection.is_open()) return "no connection";
    connection.send(c.bytes);
    const Response r = connection.receive(20'000, c.bytes.starts_with("HEAD "));
    if (r.status != c.status) return "status " + std::to_string(r.status) + " " + r.body;
    if (!r.broken.empty()) return r.broken;
    if (!r.complete) return "incomplete: " + r.body;
    for (const char* name : {"date", "server", "x-request-id"})
        if (!r.has(name)) return std::string("no field ") + name;
    if (r.status >= 400 && !c.bytes.starts_with("HEAD ") && !fault_of_error(r).empty())
        return fault_of_error(r);
    if (r.says_close() != (c.after == 'c'))
        return c.after == 'c' ? "does not say close" : "says close: " + r.body;
    if (c.after == 'c') return connection.ends() ? "" : "goes on with " + shown(connection.rest());
    if (!connection.rest().empty()) return "and then " + shown(connection.rest());
    connection.send(get("/health"));
    return connection.receive(10'000).status == 200 ? "" : "the next request fails";
}
void run_table(const char* group, const Table& table, int where = port()) {
    std::size_t passed = 0;
    for (const Hand& c : table) {
        const std::string fault = fault_of(c, where);
        INFO(c.name);
        INFO(shown(c.bytes));
        CHECK(fault == "");
        passed += fault.empty();
    }
    tally(group, passed, table.size());
}

std::string head_of(std::string_view line, std::string_view fields = "Host: localhost\r\n") {
    return std::string(line) + "\r\n" + std::string(fields) + "\r\n";
}
std::string with_field(std::string_view field) {  // one more line, with its line end
    return get("/health", field);
}
const std::string kBody = chat_body(R"(,"max_tokens":1)");
// A POST with these fields instead of Content-Length, and what follows the head.
std::string with_body(std::string_view fields, std::string_view body,
                      std::string_view version = "1.1") {
    return "POST /v1/chat/completions HTTP/" + std::string(version) +
           "\r\nHost: localhost\r\nContent-Type: application/json\r\n" + std::string(fields) +
           "\r\n" + std::string(body);
}
std::string chunk(std::string_view bytes, std::string_view extension = "") {
    char size[16];
    std::snprintf(size, sizeof size, "%zx", bytes.size());
    return size + std::string(extension) + "\r\n" + std::string(bytes) + "\r\n";
}
const std::string kChunked = "Transfer-Encoding: chunked\r\n", kLast = "0\r\n\r\n";
std::string in_chunks(std::string_view chunks, std::string_view more = "") {
    return with_body(kChunked + std::string(more), chunks);
}
std::string length_of(std::size_t n) { return "Content-Length: " + std::to_string(n) + "\r\n"; }
const std::string kLength = length_of(kBody.size());

std::string repeated(std::string_view text, int count) {
    std::string out;
    for (int i = 0; i < count; i++) out += text;
    return out;
}
std::string one(char c) { return std::string(1, c); }
std::string hex(int byte) {
    char text[8];
    std::snprintf(text, sizeof text, "0x%02x", static_cast<unsigned>(byte));
    return text;
}

Table request_lines() {
    Table t;
    const auto add = [&](std::string line, int status, char after) {
        t.push_back({"line " + line.substr(0, 60), head_of(line), status, after});
    };
    add("GET /health HTTP/1.1", 200, 'o');
    add("HEAD /health HTTP/1.1", 200, 'o');
    add("GET /health HTTP/1.0", 200, 'c');
    for (const char* method : {"PUT", "DELETE", "PATCH", "POST", "TRACE", "get", "X",
                               "G-E.T_~!#$%&'*+", "ABCDEFGHIJKLMNOP"})
        add(std::string(method) + " /health HTTP/1.1", std::string(method) == "POST" ? 411 : 405,
            std::string(method) == "POST" ? 'c' : 'o');
    add("GET /v1/chat/completions HTTP/1.1", 405, 'o');
    add("HEAD /chat/completions HTTP/1.1", 405, 'o');
    add("DELETE /v1/models HTTP/1.1", 405, 'o');
    for (const char* line : {"GET  /health HTTP/1.1",
                             "GET /health  HTTP/1.1",
                             " GET /health HTTP/1.1",
                             "GET\t/health HTTP/1.1",
                             "GET /health\tHTTP/1.1",
                             "GET /health HTTP/1.1 ",
                             "GET /health HTTP/1.1 x",
                             "GET /health",
                             "GET",
                             "/health HTTP/1.1",
                             "GET HTTP/1.1",
                             "GET /health HTTP/1.10",
                             "GET /health HTTP/11",
                             "GET /health HTTP/1",
                             "GET /health HTTP/x.y",
                             "GET /health http/1.1",
                             "GET /health HTTP /1.1",
                             "GET /health HTTP/1.1x",
                             "GET /health HTTP/01.1",
                             "GET /health HTTP/-1.1",
                             "GET /health HTTP/",
                             "GET /health XTTP/1.1",
                             "GET /health HTTP/1,1",
                             "ABCDEFGHIJKLMNOPQ /health HTTP/1.1",
                             "",
                             "\xff\xfe\xfd"})
        add(line, 400, 'c');
    for (const char* version : {"HTTP/2.0", "HTTP/3.0", "HTTP/0.9", "HTTP/9.9"})
        add(std::string("GET /health ") + version, 505, 'c');
    for (int c = 0; c < 128; c++) {  // in the method: what is no character of a token
        const bool token =
            std::isalnum(c) ||
            std::string("!#$%&'*+-.^_`|~").find(static_cast<char>(c)) != std::string::npos;
        if (token || c == '\r' || c == '\n' || c == ' ' || c == '\t') continue;
        add("G" + one(static_cast<char>(c)) + "T /health HTTP/1.1", 400, 'c');
        t.back().name = "method with " + hex(c);
    }
    return t;
}

Table targets() {
    Table t;
    const auto add = [&](std::string target, int status, char after) {
        t.push_back({"target " + target.substr(0, 60), head_of("GET " + target + " HTTP/1.1"),
                     status, after});
    };
    for (const char* target :
         {"/health?", "/health?a=b&c=%20", "/h%65alth", "/%68%65%61lth", "http://localhost/health",
          "http://LOCALHOST/health", "/health?x=/../"})
        add(target, 200, 'o');
    for (const char* target :
         {"/nothing", "/health/", "/HEALTH", "/health%c3%a9", "/health%2f", "/health;x",
          "/index.html", "/etc/passwd", "/v1", "/v1/", "/v1/models/none", "/%252e%252e/x",
          "/.git/config", "/api/v1/inference/models/none", "/health%20"})
        add(target, 404, 'o');
    for (const char* target : {"health",
                               "*",
                               "localhost:80",
                               "https://localhost/health",
                               "ftp://localhost/health",
                               "//health",
                               "/health//",
                               "/../health",
                               "/a/../health",
                               "/..",
                               "/%2e%2e/health",
                               "/%2E./health",
                               "/.%2e/health",
                               "/health%00",
                               "/%00",
                               "/health%",
                               "/health%2",
                               "/health%zz",
                               "/health%2g",
                               "/health%-1",
                               "/health%ff",
                               "/health%c3",
                               "/health%c0%af",
                               "/health%ed%a0%80",
                               "/health%f4%90%80%80",
                               "/he\\alth",
                               "/he%5calth",
                               "/%2fhealth",
                               "/v1%2f%2fmodels",
                               "/v1/models/..%2f..%2fetc",
                               "/v1/models/..%252f",
                               "/health#x",
                               "?x",
                               "http://",
                               "http://localhost",
                               "/a%2f..%2fb"})
        add(target, 400, 'c');
    for (int c = 1; c < 256; c++) {  // raw, within the target
        const bool line = c == '\r' || c == '\n' || c == ' ';
        if (line || (c > 0x20 && c < 0x7f) || (c >= 0x80 && c % 16 != 0)) continue;
        add("/he" + one(static_cast<char>(c)) + "alth", 400, 'c');
        t.back().name = "target with " + hex(c);
    }
    return t;
}

Table field_lines() {
    Table t;
    const auto add = [&](std::string name, std::string field, int status, char after) {
        t.push_back({"field " + name, with_field(field), status, after});
    };
    const auto fine = [&](std::string field) { add(field, field + "\r\n", 200, 'o'); };
    for (const char* field :
         {"X: y", "X:y", "X:", "X: ", "X:  y  ", "X:\ty\t", "x: a\tb", "X: \xe9", "X: \x80\xff",
          "X-1_2.3~!#$%&'*+^`|: y", "X: a: b", "Cookie: a=b; c=d", "Upgrade: websocket",
          "Connection: Upgrade, HTTP2-Settings", "Connection: keep-alive", "X: \"unclosed",
          "Content-Length: 0", "Accept: */*", "Referer: http://x/y"})
        fine(field);
    for (const char* field : {"Connection: close", "connection: CLOSE",
                              "Connection: keep-alive, close", "Connection: close, x"})
        add(field, std::string(field) + "\r\n", 200, 'c');
    for (const char* field :
         {"X : y", "X\t: y", ": y", " X: y", "\tX: y", "garbage", "X y: z", "X", "=", "X\x80: y",
          "Host : localhost", "X: y\r\n folded", "X: y\r\n\tfolded", "X: y\r\n : z"})
        add(field, std::string(field) + "\r\n", 400, 'c');
    for (int c = 0; c < 128; c++) {  // in the name: what is no character of a token
        const bool token =
            std::isalnum(c) ||
            std::string("!#$%&'*+-.^_`|~").find(static_cast<char>(c)) != std::string::npos;
        if (token || c == '\r' || c == '\n' || c == ':') continue;
        add("name with " + hex(c), "X" + one(static_cast<char>(c)) + "Y: z\r\n", 400, 'c');
    }
    for (int c = 0; c < 128; c++)  // in the value: controls
        if ((c < 0x20 || c == 0x7f) && c != '\r' && c != '\n' && c != '\t')
            add("value with " + hex(c), "X: a" + one(static_cast<char>(c)) + "b\r\n", 400, 'c');
    add("value with a bare CR", "X: a\rb\r\n", 400, 'c');
    add("value with a bare CR at its end", "X: a\r\r\n", 400, 'c');
    add("a bare LF", "X: a\n", 400, 'c');
    add("a bare LF within", "X: a\nY: b\r\n", 400, 'c');
    t.push_back({"all line ends are LF", "GET /health HTTP/1.1\nHost: localhost\n\n", 400, 'c'});
    t.push_back(
        {"the last line end is LF", "GET /health HTTP/1.1\r\nHost: localhost\r\n\n", 400, 'c'});
    t.push_back(
        {"the first line end is LF", "GET /health HTTP/1.1\nHost: localhost\r\n\r\n", 400, 'c'});
    t.push_back(
        {"a bare CR ends the line", "GET /health HTTP/1.1\rHost: localhost\r\n\r\n", 400, 'c'});
    t.push_back({"no Host", head_of("GET /health HTTP/1.1", ""), 400, 'c'});
    t.push_back({"no Host in 1.0", head_of("GET /health HTTP/1.0", ""), 400, 'c'});
    t.push_back({"two Hosts", with_field("Host: localhost\r\n"), 400, 'c'});
    t.push_back({"two Hosts that differ", with_field("Host: evil.example\r\n"), 400, 'c'});
    t.push_back({"1.0 that stays",
                 head_of("GET /health HTTP/1.0", "Host: localhost\r\nConnection: keep-alive\r\n"),
                 200, 'o'});
    return t;
}

Table bodies() {
    Table t;
    const auto add = [&](std::string name, std::string bytes, int status, char after) {
        t.push_back({name, bytes, status, after});
    };
    add("a length", with_body(kLength, kBody), 200, 'o');
    add("a length in 1.0", with_body(kLength, kBody, "1.0"), 200, 'c');
    add("a length with blanks around",
        with_body("Content-Length:  " + std::to_string(kBody.size()) + " \t\r\n", kBody), 200, 'o');
    const std::string zeros = std::string(18, '0') + std::to_string(kBody.size());
    add("a length of 18 digits",
        with_body("Content-Length: " + zeros.substr(zeros.size() - 18) + "\r\n", kBody), 200, 'o');
    add("a length of 19 digits",
        with_body("Content-Length: " + zeros.substr(zeros.size() - 19) + "\r\n", kBody), 400, 'c');
    add("the largest length", with_body("Content-Length: 999999999999999999\r\n", ""), 413, 'c');
    add("a length of 2^64", with_body("Content-Length: 18446744073709551616\r\n", ""), 400, 'c');
    add("neither length nor chunks", with_body("", ""), 411, 'c');
    const std::string n = std::to_string(kBody.size());
    for (const std::string& value :
         {std::string(""), "+" + n, "-" + n, n + " " + n, n + "," + n, n + ", " + n, "0x" + n,
          n + ".0", n + "e0", n + "x", std::string("x"), std::string("-1"), std::string("\"5\""),
          n + ";", std::string("\xd9\xa1")})
        add("length " + value, with_body("Content-Length: " + value + "\r\n", kBody), 400, 'c');
    add("two lengths", with_body(kLength + kLength, kBody), 400, 'c');
    add("two lengths that differ", with_body(kLength + "Content-Length: 0\r\n", kBody), 400, 'c');
    add("a body of no bytes", with_body(length_of(0), ""), 400, 'o');
    add("a GET with a body", get("/health", length_of(5)) + "hello", 200, 'o');
    add("a GET with chunks", get("/health", kChunked) + chunk("hello") + kLast, 200, 'o');
    // It is refused before its body is read, and then nobody knows where the next one would begin.
    add("the body of a request that is refused", post("/nothing", kBody), 404, 'c');

    add("a chunk", in_chunks(chunk(kBody) + kLast), 200, 'o');
    std::string singles;
    for (const char c : kBody) singles += chunk(one(c));
    add("chunks of one byte", in_chunks(singles + kLast), 200, 'o');
    add("capital hex digits",
        in_chunks("0000002A\r\n" + kBody.substr(0, 42) + "\r\n" + chunk(kBody.substr(42)) + kLast),
        200, 'o');
    add("small hex digits",
        in_chunks("2a\r\n" + kBody.substr(0, 42) + "\r\n" + chunk(kBody.substr(42)) + kLast), 200,
        'o');
    add("a last chunk of 8 zeros", in_chunks(chunk(kBody) + "00000000\r\n\r\n"), 200, 'o');
    add("a last chunk of 9 zeros", in_chunks(chunk(kBody) + "000000000\r\n\r\n"), 400, 'c');
    for (const char* size :
         {"+2a", "-2a", " 2a", "2a ", "2a\t", "0x2a", "", "g", "2g", "2a.", "2 a", "00000002a",
          "FFFFFFFFF", "123456789", ";", ";a", "\x80", "'2a'"})
        add(std::string("chunk size ") + size,
            in_chunks(std::string(size) + "\r\n" + kBody.substr(0, 42) + "\r\n" +
                      chunk(kBody.substr(42)) + kLast),
            400, 'c');
    for (const char* size : {"100001", "7fffffff", "80000000", "ffffffff"})
        add(std::string("chunk size ") + size, in_chunks(std::string(size) + "\r\nx"), 413, 'c');
    add("chunks beyond the limit in sum", in_chunks(chunk(std::string(600'000, ' ')) + "70000\r\n"),
        413, 'c');
    for (const char* extension : {";a", ";a=b", ";a=\"b c\"", ";a;b;c=d"})
        add(std::string("extension ") + extension, in_chunks(chunk(kBody, extension) + kLast), 200,
            'o');
    add("an extension of 256 bytes", in_chunks(chunk(kBody, ";" + std::string(255, 'x')) + kLast),
        200, 'o');
    add("an extension of 257 bytes", in_chunks(chunk(kBody, ";" + std::string(256, 'x')) + kLast),
        400, 'c');
    add("extensions of 256 bytes on every chunk",
        in_chunks(chunk(kBody.substr(0, 9), ";" + std::string(255, 'x')) +
                  chunk(kBody.substr(9), ";" + std::string(255, 'y')) + kLast),
        200, 'o');
    for (const char* extension : {";a\x01", ";a\rb", ";a\n", ";a\x7f"})
        add("extension " + shown(extension), in_chunks(chunk(kBody, extension) + kLast), 400, 'c');
    add("a chunk size that ends in LF", in_chunks("2a\n" + kBody.substr(0, 42) + "\r\n" + kLast),
        400, 'c');
    add("a chunk that ends in LF",
        in_chunks(chunk(kBody).substr(0, chunk(kBody).size() - 2) + "\n" + kLast), 400, 'c');
    add("a chunk that is longer than its size",
        in_chunks("29\r\n" + kBody.substr(0, 42) + "\r\n" + kLast), 400, 'c');
    add("a chunk that is shorter than its size",
        in_chunks("2b\r\n" + kBody.substr(0, 42) + "\r\n" + kLast), 400, 'c');
    add("a trailer", in_chunks(chunk(kBody) + "0\r\nX: y\r\n\r\n"), 200, 'o');
    add("a trailer that lies",
        in_chunks(chunk(kBody) + "0\r\nContent-Length: 5\r\nHost: x\r\n\r\n"), 200, 'o');
    add("a trailer of 4,000 bytes",
        in_chunks(chunk(kBody) + "0\r\nX: " + std::string(3'995, 'y') + "\r\n\r\n"), 200, 'o');
    add("a trailer beyond 4 KiB",
        in_chunks(chunk(kBody) + "0\r\nX: " + std::string(4'096, 'y') + "\r\n\r\n"), 400, 'c');
    for (const char* line : {"X : y", "garbage", " X: y", ": y"})  // nobody looks at them
        add(std::string("trailer ") + line, in_chunks(chunk(kBody) + "0\r\n" + line + "\r\n\r\n"),
            200, 'o');
    add("a trailer with a control", in_chunks(chunk(kBody) + "0\r\nX: \x01\r\n\r\n"), 400, 'c');
    for (const std::size_t size : {4'090u, 4'091u, 4'092u, 4'093u, 4'094u, 4'095u, 4'096u})
        add("trailers, one of them of " + std::to_string(size) + " bytes, beyond 4 KiB",
            in_chunks(chunk(kBody) + "0\r\n" + std::string(size, 'x') + "\r\n" +
                      std::string(9'000, 'y') + "\r\n\r\n"),
            400, 'c');
    add("many trailers beyond 4 KiB",
        in_chunks(chunk(kBody) + "0\r\n" + repeated("X: y\r\n", 700) + "\r\n"), 400, 'c');
    add("a trailer that ends in LF", in_chunks(chunk(kBody) + "0\r\nX: y\n\r\n"), 400, 'c');
    add("a last chunk that ends in LF", in_chunks(chunk(kBody) + "0\r\n\n"), 400, 'c');

    for (const char* value : {"gzip", "gzip, chunked", "chunked, gzip", "chunked, chunked",
                              "identity", "chunked, identity", "chunked;q=1", "xchunked",
                              "chunkedx", "chunked,", ",chunked", "\"chunked\"",
                              "\x0b"
                              "chunked",
                              "chunked\x0b", "", "chun ked"})
        add("Transfer-Encoding " + shown(value),
            with_body("Transfer-Encoding: " + std::string(value) + "\r\n", chunk(kBody) + kLast),
            400, 'c');
    add("two Transfer-Encodings", with_body(kChunked + kChunked, chunk(kBody) + kLast), 400, 'c');
    add("two that differ",
        with_body("Transfer-Encoding: identity\r\n" + kChunked, chunk(kBody) + kLast), 400, 'c');
    add("chunks in 1.0", with_body(kChunked, chunk(kBody) + kLast, "1.0"), 400, 'c');
    add("Transfer-Encoding with a blank",
        with_body("Transfer-Encoding : chunked\r\n", chunk(kBody) + kLast), 400, 'c');
    add("Expect what nobody knows", with_body("Expect: the-unexpected\r\n" + kLength, kBody), 417,
        'c');
    return t;
}

// A second request hidden in what one reader takes for a body: only one response ever comes.
Table smuggling() {
    const std::string hidden = get("/v1/models");
    Table t;
    const auto add = [&](std::string name, std::string fields, std::string body) {
        t.push_back({"smuggling: " + name, with_body(fields, body), 400, 'c'});
    };
    const std::string whole = chunk(kBody) + kLast;
    add("length, then chunks", length_of(whole.size()) + kChunked, whole + hidden);
    add("chunks, then length", kChunked + length_of(whole.size()), whole + hidden);
    add("a length for the chunks' head", length_of(4) + kChunked, whole + hidden);
    add("length zero and chunks", length_of(0) + kChunked, kLast + hidden);
    add("length and a chunked that is spelt oddly", kLength + "Transfer-Encoding: Chunked\r\n",
        kBody + hidden);
    add("length and xchunked", kLength + "Transfer-Encoding: xchunked\r\n", kBody + hidden);
    add("length and identity", kLength + "Transfer-Encoding: identity\r\n", kBody + hidden);
    add("length and an empty encoding", kLength + "Transfer-Encoding:\r\n", kBody + hidden);
    add("a blank before the colon", kLength + "Transfer-Encoding : chunked\r\n", kBody + hidden);
    add("a tab before the colon", kLength + "Transfer-Encoding\t: chunked\r\n", kBody + hidden);
    add("a folded encoding", kLength + "Transfer-Encoding:\r\n chunked\r\n", kBody + hidden);
    add("a line feed hides the encoding", kLength + "X: y\nTransfer-Encoding: chunked\r\n",
        kBody + hidden);
    add("a carriage return hides it", kLength + "X: y\rTransfer-Encoding: chunked\r\n",
        kBody + hidden);
    add("a zero hides it", kLength + "X: y" + one('\0') + "\r\nTransfer-Encoding: chunked\r\n",
        kBody + hidden);
    add("two lengths, one for each reader", kLength + length_of(kBody.size() + hidden.size()),
        kBody + hidden);
    add("a length with a sign", "Content-Length: +" + std::to_string(kBody.size()) + "\r\n",
        kBody + hidden);
    add("a length in a list", "Content-Length: " + std::to_string(kBody.size()) + ", 0\r\n",
        kBody + hidden);
    add("a length of digits that are none", "Content-Length: 1_0\r\n", kBody + hidden);
    add("a length cut by a zero", "Content-Length: 5" + one('\0') + "0\r\n", kBody + hidden);
    add("a chunk size that wraps around", kChunked, "100000000\r\n" + hidden);
    add("a chunk size with an odd end", kChunked, "0\r\r\n\r\n" + hidden);
    add("a chunk extension with a line feed", kChunked, "2;a\nxx\r\n0\r\n\r\n" + hidden);
    add("an underscore for the dash", "Content_Length: 5\r\nTransfer-Encoding: chunked, x\r\n",
        whole + hidden);
    return t;
}

}  // namespace

TEST_CASE("server: http: the request line is exact or refused") {
    if (no_binary()) return;
    run_table("B1 lines", request_lines());
}
TEST_CASE("server: http: a target is a path that is known, or a refusal") {
    if (no_binary()) return;
    run_table("B1 targets", targets());
}
TEST_CASE("server: http: fields are exact or refused") {
    if (no_binary()) return;
    run_table("B1 fields", field_lines());
}
TEST_CASE("server: http: bodies are as long as exactly one field says") {
    if (no_binary()) return;
    run_table("B1 bodies", bodies());
}
TEST_CASE("server: http: no second request hides in a first one") {
    if (no_binary()) return;
    run_table("B1 smuggling", smuggling());
}

// ---- limits, order, interim answers -------------------------------------------------------------

namespace {

// A line of so many bytes, without its end; the method and the version stay what they are.
std::string line_of(std::size_t bytes) {
    return "GET /" + std::string(bytes - 14, 'x') + " HTTP/1.1";
}
// A head whose fields take so many bytes with their line ends.
std::string fields_of(std::size_t bytes) {
    const std::string host = "Host: localhost\r\n";
    return host + "X: " + std::string(bytes - host.size() - 5, 'y') + "\r\n";
}
std::string many_fields(int count) {
    std::string out = "Host: localhost\r\n";
    for (int i = 1; i < count; i++) out += "X" + std::to_string(i) + ": y\r\n";
    return out;
}
// A good body, made so long with blanks.
std::string padded(std::size_t bytes) { return kBody + std::string(bytes - kBody.size(), ' '); }

constexpr std::size_t kLine = 8192, kFields = 16384, kBodyLimit = 1048576;

Table limits() {
    Table t;
    const auto add = [&](std::string name, std::string bytes, int status, char after) {
        t.push_back({name, bytes, status, after});
    };
    add("a line of 8 KiB - 1", head_of(line_of(kLine - 1)), 404, 'o');
    add("a line of 8 KiB", head_of(line_of(kLine)), 404, 'o');
    add("a line of 8 KiB + 1", head_of(line_of(kLine + 1)), 414, 'c');
    add("a line without end", "GET /" + std::string(3 * kLine, 'x'), 414, 'c');
    add("fields of 16 KiB - 1", head_of("GET /health HTTP/1.1", fields_of(kFields - 1)), 200, 'o');
    add("fields of 16 KiB", head_of("GET /health HTTP/1.1", fields_of(kFields)), 200, 'o');
    add("fields of 16 KiB + 1", head_of("GET /health HTTP/1.1", fields_of(kFields + 1)), 431, 'c');
    add("fields without end", "GET /health HTTP/1.1\r\nX: " + std::string(3 * kFields, 'x'), 431,
        'c');
    add("line and fields at their limits", head_of(line_of(kLine), fields_of(kFields)), 404, 'o');
    add("63 fields", head_of("GET /health HTTP/1.1", many_fields(63)), 200, 'o');
    add("64 fields", head_of("GET /health HTTP/1.1", many_fields(64)), 200, 'o');
    add("65 fields", head_of("GET /health HTTP/1.1", many_fields(65)), 431, 'c');
    add("1,000 fields", head_of("GET /health HTTP/1.1", many_fields(1000)), 431, 'c');
    add("a method of 16", head_of("ABCDEFGHIJKLMNOP /health HTTP/1.1"), 405, 'o');
    add("a method of 17", head_of("ABCDEFGHIJKLMNOPQ /health HTTP/1.1"), 400, 'c');
    add("a body of 1 MiB - 1", with_body(length_of(kBodyLimit - 1), padded(kBodyLimit - 1)), 200,
        'o');
    add("a body of 1 MiB", with_body(length_of(kBodyLimit), padded(kBodyLimit)), 200, 'o');
    add("a body of 1 MiB + 1", with_body(length_of(kBodyLimit + 1), padded(kBodyLimit + 1)), 413,
        'c');
    add("a body of 1 MiB + 1 that never comes", with_body(length_of(kBodyLimit + 1), ""), 413, 'c');
    add("chunks of 1 MiB", in_chunks(chunk(padded(kBodyLimit)) + kLast), 200, 'o');
    add("chunks of 1 MiB in two", in_chunks(chunk(padded(kBodyLimit - 1)) + chunk(" ") + kLast),
        200, 'o');
    add("chunks of 1 MiB + 1", in_chunks(chunk(padded(kBodyLimit + 1)) + kLast), 413, 'c');
    add("chunks of 1 MiB + 1 in two", in_chunks(chunk(padded(kBodyLimit)) + chunk(" ") + kLast),
        413, 'c');
    return t;
}

}  // namespace

TEST_CASE("server: http: every limit holds at its border") {
    if (no_binary()) return;
    run_table("B1 limits", limits());
}

TEST_CASE("server: http: requests that come together are answered in order") {
    if (no_binary()) return;
    for (const int count : {2, 8, 9, 30}) {
        CAPTURE(count);
        Connection c(port());
        std::string all;
        for (int i = 0; i < count; i++) {
            all += i % 3 == 1 ? chat(R"(,"max_tokens":1)")
                              : get(i % 3 == 0 ? "/nothing/" + std::to_string(i) : "/v1/models");
        }
        c.send(all);
        for (int i = 0; i < count; i++) {
            CAPTURE(i);
            const Response r = c.receive();
            CHECK(r.status == (i % 3 == 0 ? 404 : 200));
            const char* has[] = {"no_such_route", "chat.completion", "\"list\""};
            CHECK(contains(r.body, has[i % 3]));
        }
        CHECK(c.rest() == "");
        c.send(get("/health"));
        CHECK(c.receive().status == 200);
    }
    Connection closing(port());  // what follows a request that closes is not looked at
    closing.send(get("/health", "Connection: close\r\n") + get("/v1/models"));
    CHECK(closing.receive().status == 200);
    CHECK(closing.ends());
    Connection after(port());  // a stream, then another request
    after.send(chat(R"(,"stream":true)") + get("/health"));
    CHECK(read_stream(after.receive().body).done);
    CHECK(after.receive().status == 200);
    Connection garbage(port());
    garbage.send(in_chunks(chunk(kBody) + kLast) + "garbage\r\n\r\n");
    CHECK(garbage.receive().status == 200);
    CHECK(garbage.receive().status == 400);
    CHECK(garbage.ends());
}

TEST_CASE("server: http: a connection is for 1,000 requests, and the last answer says so") {
    if (no_binary()) return;
    Connection c(port());
    const std::string request = get("/health");
    int kept = 0;
    for (int i = 1; i < 1'000; i++) {
        c.send(request);
        const Response r = c.receive();
        kept += r.status == 200 && !r.says_close();
    }
    CHECK(kept == 999);
    c.send(request + request);
    const Response last = c.receive();
    CHECK(last.status == 200);
    CHECK(last.says_close());
    CHECK(c.ends());  // the 1,001st gets nothing
    CHECK(ask(port(), request).status == 200);
}

TEST_CASE("server: http: 100-continue comes after the checks, or not at all") {
    if (no_binary()) return;
    const std::string expect = "Expect: 100-continue\r\n";
    for (const std::string& fields : {expect + kLength, "eXPECT: 100-Continue\r\n" + kLength}) {
        Connection c(port());
        c.send(with_body(fields, ""));
        CHECK(c.receive(5'000).status == 100);
        c.send(kBody);
        CHECK(c.receive().status == 200);
        c.send(get("/health"));
        CHECK(c.receive().status == 200);
    }
    Connection chunks(port());
    chunks.send(in_chunks("", expect));
    CHECK(chunks.receive(5'000).status == 100);
    chunks.send(chunk(kBody) + kLast);
    CHECK(chunks.receive().status == 200);
    const std::vector<std::pair<std::string, int>> refused = {
        {with_body(expect + length_of(kBodyLimit + 1), ""), 413},
        {with_body(expect + kLength + kChunked, ""), 400},
        {"POST /nothing HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n" +
             expect + kLength + "\r\n",
         404},
        {"POST /v1/models HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n" +
             expect + kLength + "\r\n",
         405},
        {"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n" + expect + kLength + "\r\n",
         415},
        {"POST /v1/chat/completions HTTP/1.1\r\nHost: evil.example\r\nContent-Type: "
         "application/json\r\n" +
             expect + kLength + "\r\n",
         403}};
    for (const auto& [request, status] : refused) {
        const std::string& bytes = request;  // clang 14 captures no structured binding
        INFO(shown(bytes));
        Connection c(port());
        c.send(bytes);
        CHECK(c.receive(5'000).status == status);
        CHECK(c.ends());  // nobody knows whether the body comes
    }
    Connection whole(port());  // it did not wait
    whole.send(with_body(expect + kLength, kBody));
    Response r = whole.receive();
    if (r.status == 100) r = whole.receive();
    CHECK(r.status == 200);
    CHECK(ask(port(), get("/health", expect)).status == 200);
}

TEST_CASE("server: http: HEAD is GET without the body, and a wrong method is told the right ones") {
    if (no_binary()) return;
    for (const char* path : {"/", "/inference", "/health", "/stats", "/v1/models",
                             "/v1/models/sft/d9/100", "/api/v1/inference/models", "/nothing"}) {
        CAPTURE(std::string(path));
        const std::string whole = get(path);
        Connection c(port());
        c.send("HEAD" + whole.substr(3));
        const Response head = c.receive(10'000, true);
        c.send(whole);
        const Response r = c.receive();
        CHECK(head.status == r.status);
        CHECK(head.field("content-type") == r.field("content-type"));
        CHECK(head.has("content-length") == r.has("content-length"));
        CHECK(r.complete);
    }
    const std::vector<std::pair<std::string, std::string>> wrong = {
        {"POST /health", "GET"},
        {"DELETE /v1/models", "GET"},
        {"PUT /", "GET"},
        {"GET /chat/completions", "POST"},
        {"GET /v1/chat/completions", "POST"},
        {"GET /v1/completions", "POST"},
        {"PATCH /api/v1/inference/models", "GET"}};
    for (const auto& [request, allow] : wrong) {
        const std::string& line = request;
        CAPTURE(line);
        const Response r = ask(port(), head_of(line + " HTTP/1.1",
                                               "Host: localhost\r\nContent-Length: 0\r\n"
                                               "Content-Type: application/json\r\n"));
        CHECK(r.status == 405);
        CHECK(code_of(r) == "method_not_allowed");
        CHECK(contains(r.field("allow"), allow));
    }
}

// ---- every split --------------------------------------------------------------------------------

namespace {

// What a stream tells while one waits may be there or not.
std::string without_comments(std::string body) {
    for (std::size_t begin = 0; (begin = body.find("\n: ")) != std::string::npos;) {
        const std::size_t end = body.find("\n\n", begin + 1);
        body.erase(begin + 1, end == std::string::npos ? end : end + 1 - begin);
    }
    if (body.starts_with(": ")) body.erase(0, body.find("\n\n") + 2);
    return body;
}
// Without what differs from answer to answer.
std::string constant_part(std::string body) {
    body = without_comments(body);
    for (const char* key : {"\"id\":", "\"created\":", "\"request_id\":", "\"uptime_s\":",
                            "\"scanned_at\":", "\"queue_ms\":", "\"prefill_ms\":", "\"decode_ms\":",
                            "\"ttft_ms\":", "\"tokens_per_second\":", "\"cached_tokens\":",
                            "\"available_workers\":", "\"busy_workers\":", "\"active\":"})
        for (std::size_t begin = 0; (begin = body.find(key, begin)) != std::string::npos;) {
            begin += std::strlen(key);
            body.erase(begin, body.find_first_of(",}", begin) - begin);
        }
    return body;
}

// What a browser's head is like.
const std::string kBrowser =
    "User-Agent: Mozilla/5.0 (X11; Linux x86_64; rv:140.0) Gecko/20100101 Firefox/140.0\r\n"
    "Accept: text/html,application/xhtml+xml,*/*;q=0.8\r\nAccept-Language: "
    "de,en-US;q=0.7,en;q=0.3\r\n"
    "Accept-Encoding: gzip, deflate, br, zstd\r\nDNT: 1\r\nConnection: keep-alive\r\n"
    "Sec-Fetch-Dest: empty\r\nSec-Fetch-Mode: cors\r\nSec-Fetch-Site: same-origin\r\nPriority: "
    "u=0\r\n";

std::vector<std::string> good_requests() {
    const std::string few = R"(,"max_tokens":2,"seed":1)";
    std::vector<std::string> all = {
        get("/health"),
        get("/stats", kBrowser),
        get("/v1/models", kBrowser),
        get("/v1/models/sft/d9/100"),
        get("/v1/models/sft%2Fd9%2F100"),
        get("/api/v1/inference/models"),
        get("/nothing", kBrowser),
        get("/v1/nothing?x=y", kBrowser),
        get("/health?a=b%20c", kBrowser),
        get("http://localhost/health"),
        "HEAD" + get("/health").substr(3),
        "HEAD" + get("/v1/models").substr(3),
        get("/health", "X: a\tb\r\nY:\r\nZ:  c  \r\n"),
        get("/health", "Connection: keep-alive\r\nCookie: a=b\r\n"),
        get("/health", length_of(5)) + "hello",
        get("/health", kChunked) + chunk("hello") + kLast,
        chat(few),
        nanochat(few),
        chat(few + R"(,"stream":true)"),
        chat(few + R"(,"stream":true,"stream_options":{"include_usage":true})"),
        in_chunks(chunk(chat_body(few)) + kLast),
        in_chunks(chunk(chat_body(few), ";a=b") + "0\r\nX: y\r\n\r\n"),
        in_chunks(chunk(chat_body(few).substr(0, 20)) + chunk(chat_body(few).substr(20)) + kLast),
        post("/v1/chat/completions", chat_body(few + R"(,"user":"\u00e9\ud83d\udc4b h\u00e9")")),
        post("/v1/completions",
             R"({"prompt":"X","max_tokens":2,"seed":1,"temperature":0,"model":"base/d9/100"})"),
        post("/v1/chat/completions", "{"),
        post("/v1/chat/completions", "[]"),
        post("/v1/chat/completions", ""),
        post("/v1/chat/completions", "{}", kBrowser),
        post("/chat/completions", R"({"messages":[]})", kBrowser),
        post("/chat/completions", R"({"messages":7})", kBrowser),
        post("/v1/chat/completions", chat_body(R"(,"model":"no")")),
        post("/v1/chat/completions", chat_body(R"(,"temperature":7)")),
        post("/nothing", "{}"),
        post("/v1/models", "{}", kBrowser),
        post("/health", "x"),
        post("/api/v1/inference/tokenize", R"({"text":"Hi there"})"),
        post("/v1/chat/completions",
             R"({"messages":[{"role":"user","content":[{"type":"text","text":"Hi"}]}],)"
             R"("temperature":0,"max_tokens":2,"seed":1})"),
        head_of("PUT /health HTTP/1.1"),
        "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: text/plain\r\n" +
            length_of(2) + "\r\n{}"};
    return all;
}

// Sends each list of pieces on a connection of its own, some at a time, and leaves the server time
// to read each piece before the next is sent. Returns the answers.
std::vector<std::string> answers_of(const std::vector<Words>& requests, bool to_head) {
    std::vector<std::string> out;
    constexpr std::size_t kAtOnce = 32;
    for (std::size_t begin = 0; begin < requests.size(); begin += kAtOnce) {
        const std::size_t end = std::min(begin + kAtOnce, requests.size());
        std::vector<Connection> open;
        std::size_t longest = 0;
        for (std::size_t i = begin; i < end; i++) {
            open.emplace_back(port(), 2);
            longest = std::max(longest, requests[i].size());
        }
        for (std::size_t piece = 0; piece < longest; piece++) {
            for (std::size_t i = begin; i < end; i++)
                if (piece < requests[i].size()) open[i - begin].send(requests[i][piece]);
            http::sleep_ms(0.3);
        }
        for (Connection& c : open) {
            const Response r = c.receive(20'000, to_head);
            out.push_back(r.complete && r.broken.empty() && c.rest().empty()
                              ? std::to_string(r.status) + " " + constant_part(r.body)
                              : "broken: " + r.broken + c.rest());
        }
    }
    return out;
}

}  // namespace

TEST_CASE("server: http: a request cut anywhere, or sent byte by byte, is the same request") {
    if (no_binary()) return;
    const std::vector<std::string> all = good_requests();
    CHECK(all.size() == 40);
    const std::size_t stride = test::quick() ? 23 : 1;
    std::size_t passed = 0, total = 0;
    for (const std::string& request : all) {
        const bool head = request.starts_with("HEAD ");
        const std::string whole = answers_of({{request}}, head)[0];
        std::vector<Words> cut;
        for (std::size_t at = 1; at < request.size(); at += stride)
            cut.push_back({request.substr(0, at), request.substr(at)});
        Words bytes;
        for (const char c : request) bytes.push_back(one(c));
        cut.push_back(bytes);
        const std::vector<std::string> answers = answers_of(cut, head);
        for (std::size_t i = 0; i < cut.size(); i++) {
            const bool same = answers[i] == whole;
            passed += same;
            total++;
            if (same) continue;
            INFO("cut into " << shown(cut[i][0]) << " and the rest");
            CHECK(answers[i] == whole);
        }
        const bool answered = whole.size() > 3 && whole[3] == ' ';
        INFO(shown(request));
        CHECK(answered);
    }
    CHECK(passed == total);
    tally("B2", passed, total);
}

// ---- who may ask --------------------------------------------------------------------------------

namespace {

struct Asks {
    std::string host, fields;  // of a POST; without Content-Type there is none
    int status;
    const char* code;  // of the error; "" if there is none
};

Response ask_as(const Asks& c, bool with_get) {
    const std::string host = "Host: " + c.host + "\r\n";
    if (with_get) return ask(port(), "GET /v1/models HTTP/1.1\r\n" + host + c.fields + "\r\n");
    return ask(port(), "POST /v1/chat/completions HTTP/1.1\r\n" + host + c.fields + kLength +
                           "\r\n" + kBody);
}

}  // namespace

TEST_CASE("server: who may ask: this machine's own pages and programs, nobody else's") {
    if (no_binary()) return;
    const std::string json = "Content-Type: application/json\r\n", p = ":" + std::to_string(port());
    const auto origin = [](const std::string& o) { return "Origin: " + o + "\r\n"; };
    const auto site = [](const std::string& s) { return "Sec-Fetch-Site: " + s + "\r\n"; };
    std::vector<Asks> t;
    for (const std::string& host :
         {std::string("localhost"), "localhost" + p, "LocalHost" + p, std::string("127.0.0.1"),
          "127.0.0.1" + p, std::string("[::1]"), "[::1]" + p, std::string("127.8.9.10"),
          std::string("localhost:1")})
        t.push_back({host, json, 200, ""});
    for (const char* host :
         {"evil.example", "evil.example:8000", "localhost.evil.example", "evil.localhost.example",
          "127.0.0.1.evil.example", "notlocalhost", "192.0.2.1", "0.0.0.0", "2130706433",
          "0x7f000001", "127.1.evil", "[::2]", "[fe80::1]", "169.254.169.254", "128.0.0.1"})
        t.push_back({host, json, 403, "host_not_allowed"});
    for (const char* host : {"", "local host", "a@localhost", "localhost/x", "localhost,evil",
                             "[::1", "::1", "localhost:80:80"})
        t.push_back({host, json, 0, ""});  // 400 or 403: refused
    for (const std::string& o : {"http://localhost" + p, "https://localhost" + p})  // or a proxy's
        t.push_back({"localhost" + p, json + origin(o), 200, ""});
    t.push_back({"127.0.0.1" + p, json + origin("http://127.0.0.1" + p), 200, ""});
    t.push_back({"[::1]" + p, json + origin("http://[::1]" + p), 200, ""});
    for (const std::string& o :
         {std::string("null"), std::string("http://evil.example"),
          std::string("https://evil.example"), std::string("http://localhost:1"),
          std::string("http://localhost"), "ftp://localhost" + p, "http://localhost" + p + "/",
          "http://localhost" + p + ".evil.example", "http://evil.example" + p,
          "http://x@localhost" + p, std::string("file://"), std::string(""),
          "http://localhost" + p + ", http://evil.example", std::string("chrome-extension://abc"),
          "http://localhost" + p + "0"})
        t.push_back({"localhost" + p, json + origin(o), 403, "origin_not_allowed"});
    t.push_back({"localhost" + p, json + site("same-origin"), 200, ""});
    t.push_back({"localhost" + p, json + site("none"), 200, ""});
    t.push_back({"localhost" + p, json + site("cross-site"), 403, "origin_not_allowed"});
    t.push_back({"localhost" + p, json + site("same-origin") + origin("http://evil.example"), 403,
                 "origin_not_allowed"});
    t.push_back({"evil.example", json + origin("http://evil.example"), 403, "host_not_allowed"});
    for (const char* type :
         {"application/json", "application/json; charset=utf-8", "APPLICATION/JSON",
          "application/json;charset=UTF-8", "application/json ; charset=\"utf-8\""})
        t.push_back({"localhost", "Content-Type: " + std::string(type) + "\r\n", 200, ""});
    t.push_back({"localhost", "", 415, "unsupported_media_type"});
    for (const char* type :
         {"text/plain", "text/plain; application/json", "application/x-www-form-urlencoded",
          "multipart/form-data; boundary=x", "application/jsonx", "xapplication/json", "json",
          "application/json-patch+json", "application/ld+json", "", "application/json, text/plain",
          "text/json"})
        t.push_back({"localhost", "Content-Type: " + std::string(type) + "\r\n", 415,
                     "unsupported_media_type"});
    std::size_t passed = 0;
    for (const Asks& c : t) {
        INFO("Host: " << c.host << ", " << shown(c.fields));
        const Response r = ask_as(c, false);
        bool good = c.status == 0 ? r.status == 400 || r.status == 403 : r.status == c.status;
        CHECK_MESSAGE(good, r.status, " ", r.body);
        if (r.status >= 400) CHECK(fault_of_error(r) == "");
        if (c.code[0] != '\0') CHECK(code_of(r) == c.code);
        const Response g = ask_as(c, true);  // reading is no different, but needs no Content-Type
        const int want = c.status == 415 ? 200 : c.status;
        const bool same = want == 0 ? g.status == 400 || g.status == 403 : g.status == want;
        CHECK_MESSAGE(same, g.status, " ", g.body);
        CHECK(!r.has("access-control-allow-origin"));
        passed += good && same;
    }
    tally("B4", passed, t.size());
}

// ---- the fields of requests ---------------------------------------------------------------------

namespace {

struct FieldCase {
    std::string field, value;  // as JSON; the whole body if the field is ""
    int status;
    const char* code;   // of the error
    bool none = false;  // the error names no field
};

const char* const kRange = "out_of_range";
const char* const kType = "wrong_type";
const char* const kJson = "invalid_json";
const char* const kMissing = "missing_field";
const char* const kUnsupported = "unsupported_parameter";

std::string nested(int depth) {
    return std::string(static_cast<std::size_t>(depth), '[') +
           std::string(static_cast<std::size_t>(depth), ']');
}
std::string message(std::string_view role, std::string_view content) {
    return R"({"role":)" + std::string(role) + R"(,"content":)" + std::string(content) + "}";
}
std::string user(std::string_view text) { return message("\"user\"", json_string(text)); }
std::string many(int count) {
    std::string out = "[" + user("x");
    for (int i = 1; i < count; i++)
        out += "," + message(i % 2 ? "\"assistant\"" : "\"user\"", "\"x\"");
    return out + "]";
}

// Bodies that are no request at all, on every route.
std::vector<FieldCase> no_requests() {
    std::vector<FieldCase> t;
    for (const char* body : {"",
                             "{",
                             "}",
                             "[",
                             "{]",
                             "nul",
                             "{\"messages\"}",
                             "{\"messages\":}",
                             "{\"a\":1,}",
                             "{,}",
                             "{\"a\":1 \"b\":2}",
                             "{'a':1}",
                             "{a:1}",
                             "{\"a\":NaN}",
                             "{\"a\":Infinity}",
                             "{\"a\":-Infinity}",
                             "{\"a\":+1}",
                             "{\"a\":01}",
                             "{\"a\":1.}",
                             "{\"a\":.5}",
                             "{\"a\":1e}",
                             "{\"a\":0x1}",
                             "{\"a\":tru}",
                             "{\"a\":\"\\x\"}",
                             "{\"a\":\"\\u12\"}",
                             "{\"a\":\"\\ud800\"}",
                             "{\"a\":\"\\udc00\"}",
                             "{\"a\":\"\\ud800\\u0041\"}",
                             "{\"a\":\"\xff\"}",
                             "{\"a\":\"\xc3\"}",
                             "{\"a\":\"\xed\xa0\x80\"}",
                             "{\"a\":\"\xc0\x80\"}",
                             "{\"a\":\"b",
                             "{\"a\":\"\n\"}",
                             "{\"a\":\"\t\"}",
                             "{} {}",
                             "{}x",
                             "{} // no",
                             "/* no */{}",
                             "{\"a\":1,\"a\":2}",
                             "\xef\xbb\xbf{}",
                             "{\"a\":{\"b\":1,\"b\":1}}",
                             "{\"a\":[1,]}",
                             "{\"a\":[1 2]}",
                             "\xff\xfe{\0}\0"})
        t.push_back({"", body, 400, kJson, true});
    t.push_back({"", "{\"a\":" + std::string(65, '1') + "}", 400, kJson, true});
    t.push_back({"", "{\"a\":" + nested(40) + "}", 400, kJson, true});
    t.push_back({"", nested(100'000), 400, kJson, true});
    t.push_back({"", "{\"a\":" + std::string("\"") + one('\0') + "\"}", 400, kJson, true});
    return t;
}

std::vector<FieldCase> openai_fields() {
    std::vector<FieldCase> t;
    const auto fine = [&](const char* field, std::initializer_list<std::string> values) {
        for (const std::string& value : values) t.push_back({field, value, 200, ""});
    };
    const auto bad = [&](const char* field, const char* code,
                         std::initializer_list<std::string> values) {
        for (const std::string& value : values) t.push_back({field, value, 400, code});
    };
    bad("messages", kMissing, {""});
    bad("messages", kType,
        {"7", "\"x\"", "{}", "true", "[7]", "[null]", "[\"x\"]", "[[]]",
         "[" + message("7", "\"x\"") + "]", "[" + message("\"user\"", "7") + "]",
         "[" + message("\"user\"", "{}") + "]",
         "[" + message("\"user\"", R"([{"type":"text","text":7}])") + "]"});
    bad("messages", kRange, {"[]", many(501)});
    fine("messages",
         {many(3), "[" + user("") + "]",
          "[" + message("\"system\"", "\"x\"") + "," + user("x") + "]",
          "[" + message("\"developer\"", "\"x\"") + "," + user("x") + "]",
          "[" + message("\"user\"", R"([{"type":"text","text":"a"},{"type":"text","text":"b"}])") +
              "]",
          "[" + user("x") + "," + message("\"assistant\"", "\"q\"") + "]",
          R"([{"role":"user","content":"x","name":"me","more":[1]}])", "[" + user("<|bos|>") + "]",
          "[" + user("\xf0\x9f\x91\x8b") + "]"});
    for (const char* role : {"\"tool\"", "\"function\"", "\"User\"", "\"\""})
        t.push_back({"messages", "[" + message(role, "\"x\"") + "]", 400, ""});
    for (const char* content :
         {"[7]", R"([{"type":"image_url","image_url":{"url":"x"}}])", R"([{"type":"input_audio"}])",
          R"([{"type":"text"}])", R"([{"text":"x"}])"})
        t.push_back({"messages", "[" + message("\"user\"", content) + "]", 400, ""});
    bad("messages", kMissing,
        {R"([{"content":"x"}])", R"([{"role":"user"}])", "[{}]", R"([{"role":null,"content":"x"}])",
         R"([{"role":"user","content":[{"type":"text"}]}])"});
    t.push_back(
        {"messages", "[" + user(repeated("xy ", 5'000)) + "]", 400, "context_length_exceeded"});
    for (const char* name : {"max_tokens", "max_completion_tokens"}) {
        bad(name, kType, {"\"5\"", "true", "[5]", "{}", "\"\""});
        bad(name, kRange, {"0", "-1", "99999999999999999999"});
        for (const char* no : {"2.9", "2.0", "1e1", "1e99", "-1e99"})
            t.push_back({name, no, 400, ""});
        fine(name, {"null", "1", "2", "4096"});
    }
    bad("temperature", kType, {"\"1\"", "true", "[]", "{}"});
    bad("temperature", kRange, {"-0.1", "2.01", "7", "1e99", "-1e99"});
    fine("temperature", {"null", "0", "0.0", "2", "2.0", "1.5", "1e-3", "-0.0"});
    bad("top_p", kType, {"\"1\"", "true", "[]"});
    bad("top_p", kRange, {"0", "-1", "1.01", "1e99"});
    fine("top_p", {"null", "1", "0.5", "0.0001"});
    bad("top_k", kType, {"\"1\"", "true", "[]"});
    bad("top_k", kRange, {"-1", "9999999"});
    for (const char* no : {"1.5", "1e99"}) t.push_back({"top_k", no, 400, ""});
    fine("top_k", {"null", "0", "1", "50", "512"});
    bad("seed", kType, {"\"1\"", "true", "[]"});
    bad("seed", kRange, {"99999999999999999999"});
    for (const char* no : {"1.5", "1e99"}) t.push_back({"seed", no, 400, ""});
    fine("seed", {"null", "0", "1", "42", "9007199254740991", "9223372036854775807"});
    bad("stop", kType, {"7", "true", "{}", "[7]", "[null]", "[[]]"});
    bad("stop", kRange,
        {"\"\"", "[\"\"]", R"(["a","b","c","d","e"])", json_string(std::string(65, 'x'))});
    fine("stop", {"null", "[]", "\"x\"", "[\"x\"]", R"(["w","x","y","z"])",
                  json_string(std::string(64, 'x'))});
    bad("stream", kType, {"7", "\"true\"", "[]"});
    fine("stream", {"null", "false"});
    bad("stream_options", kType, {"7", "\"x\"", "[]"});
    fine("stream_options", {"null"});
    bad("n", kType, {"\"1\"", "true"});
    for (const char* no : {"0", "-1", "9", "1e99"}) t.push_back({"n", no, 400, ""});
    fine("n", {"null", "1"});
    for (const char* name : {"presence_penalty", "frequency_penalty"}) {
        bad(name, kUnsupported, {"0.5", "-1", "2"});
        fine(name, {"null", "0", "0.0"});
        bad(name, kType, {"\"x\""});
    }
    bad("logit_bias", kUnsupported, {R"({"5":1})"});
    fine("logit_bias", {"null", "{}"});
    bad("tools", kUnsupported, {R"([{"type":"function"}])"});
    fine("tools", {"null", "[]"});
    bad("functions", kUnsupported, {R"([{"name":"x"}])"});
    fine("functions", {"null"});
    bad("response_format", kUnsupported,
        {R"({"type":"json_object"})", R"({"type":"json_schema"})"});
    fine("response_format", {"null", R"({"type":"text"})"});
    bad("modalities", kUnsupported,
        {R"(["audio"])", R"(["text","audio"])", "\"audio\"", "{}", "[7]"});
    fine("modalities", {"null", "[]", R"(["text"])"});
    for (const char* name : {"tool_choice", "function_call"}) {
        bad(name, kUnsupported, {"\"required\"", "\"f\"", R"({"name":"f"})", "7"});
        fine(name, {"null", "\"none\"", "\"auto\""});
    }
    bad("audio", kUnsupported, {R"({"voice":"x"})"});
    fine("audio", {"null"});
    for (const char* name : {"user", "metadata", "store", "unknown", "x_y", "parallel_tool_calls"})
        fine(name, {"null", "\"x\"", "{}", "[1,{\"a\":null}]"});
    bad("model", kType, {"7", "true", "[]", "{}"});
    for (const char* model : {"no", "sft/d9/101", "sft/d77", "../d9", "sft/../d9", "/etc/passwd",
                              "sft/d9/100/x", "d9\\u0000", "rl", "gpt-5"})
        t.push_back({"model", "\"" + std::string(model) + "\"", 404, "model_not_found"});
    t.push_back({"model", json_string(std::string(10'000, 'x')), 404, "model_not_found"});
    t.push_back({"model", "\"base/d20/40\"", 409, "model_not_ready"});
    fine("model", {"null", "\"sft/d9/100\"", "\"sft/d9\"", "\"sft\"", "\"default\"", "\"nanochat\"",
                   "\"gpt-3.5-turbo\"", "\"gpt-4o-mini\"", "\"base/d9/100\""});
    return t;
}

std::vector<FieldCase> nanochat_fields() {
    std::vector<FieldCase> t;
    const auto add = [&](const char* field, int status, std::initializer_list<std::string> values) {
        for (const std::string& value : values) t.push_back({field, value, status, ""});
    };
    const std::string x7999(7'999, 'x'), wide = repeated("\u00e9", 8'000);
    add("messages", 422,
        {"", "7", "\"x\"", "{}", "null", "[7]", "[null]", "[\"x\"]", "[{}]", R"([{"content":"x"}])",
         R"([{"role":"user"}])", "[" + message("7", "\"x\"") + "]",
         "[" + message("\"user\"", "7") + "]", "[" + message("\"user\"", "null") + "]"});
    add("messages", 400,
        {"[]", many(501), "[" + user("") + "]", "[" + user(x7999 + "xx") + "]",
         "[" + user(wide + "x") + "]", "[" + message("\"tool\"", "\"x\"") + "]",
         "[" + message("\"\"", "\"x\"") + "]",
         "[" + repeated(user(x7999) + ",", 4) + user("12345") + "]"});
    add("messages", 200,
        {many(3), "[" + user("x") + "]",
         "[" + message("\"system\"", "\"x\"") + "," + user("x") + "]"});
    add("temperature", 400, {"-0.1", "2.01", "1e99"});
    add("temperature", 422, {"\"x\"", "[]", "{}"});
    add("temperature", 200, {"null", "0", "2", "1.5"});
    add("top_k", 400, {"-1", "201"});
    add("top_k", 422, {"\"x\"", "[]", "1.5"});
    add("top_k", 200, {"null", "0", "1", "200"});
    add("max_tokens", 400, {"0", "-1", "4097"});
    add("max_tokens", 422, {"\"x\"", "[]", "2.9"});
    add("max_tokens", 200, {"null", "1", "4096"});
    add("seed", 200, {"null", "0", "7"});
    add("stop", 200, {"null", "\"x\"", "[\"x\",\"y\"]"});
    add("unknown", 200, {"null", "7", "{}"});
    t.push_back({"model", "\"no\"", 404, "model_not_found"});
    t.push_back({"model", "\"base/d20/40\"", 409, "model_not_ready"});
    return t;
}

std::vector<FieldCase> completion_fields() {
    std::vector<FieldCase> t;
    const auto add = [&](const char* field, int status, const char* code,
                         std::initializer_list<std::string> values) {
        for (const std::string& value : values) t.push_back({field, value, status, code});
    };
    add("prompt", 400, kMissing, {""});
    add("prompt", 400, kType, {"7", "{}", "true", "[{}]", "[[1]]"});
    add("prompt", 400, "", {"[512]", "[-1]", "[1.5]", "[1e99]"});
    add("prompt", 200, "", {"\"X\"", "[88]", "\"\"", "[72,101,88]"});
    add("echo", 400, kUnsupported, {"true"});
    add("best_of", 400, kUnsupported, {"2"});
    add("suffix", 400, kUnsupported, {"\"x\""});
    add("echo", 200, "", {"false", "null"});
    add("suffix", 200, "", {"null"});
    add("max_tokens", 400, kRange, {"0", "-1"});
    add("temperature", 400, kRange, {"3"});
    add("temperature", 400, kType, {"\"x\""});
    return t;
}

// The body with one field replaced, or left out where its value is "".
std::string body_with(const FieldCase& c, const char* asks, const std::string& value) {
    if (c.field.empty()) return c.value;
    std::string out = "{";
    const auto put = [&](const std::string& key, const std::string& json) {
        const std::string& shown_value = key == c.field ? c.value : json;
        if (!shown_value.empty())
            out += (out.size() > 1 ? "," : "") + json_string(key) + ":" + shown_value;
    };
    put(asks, value);
    put("temperature", "0");
    put("max_tokens", "1");
    const bool there = c.field == asks || c.field == "temperature" || c.field == "max_tokens";
    if (!there) put(c.field, "");
    return out + "}";
}
std::string fault_of(const FieldCase& c, const Response& r) {
    if (r.status != c.status) return "status " + std::to_string(r.status) + " " + r.body;
    if (r.status == 200) return r.complete ? "" : "incomplete";
    if (const std::string fault = fault_of_error(r); !fault.empty()) return fault;
    if (c.code[0] != '\0' && code_of(r) != c.code) return "code " + r.body;
    if (code_of(r) == kType && !contains(r.body, " must be "))
        return "what was expected: " + r.body;
    if (code_of(r) == kType && !contains(r.body, " (got ")) return "what was got: " + r.body;
    const std::string param = text_at(json_of(r.body), "error.param");
    if (c.none) return param == "(null)" ? "" : "param " + r.body;
    return param.rfind(c.field, 0) == 0 || c.field.empty() ? "" : "param " + r.body;
}
void run_fields(const char* group, const char* route, const char* asks, const std::string& value,
                const std::vector<FieldCase>& table) {
    std::size_t passed = 0;
    Connection c(port(), 3);
    for (const FieldCase& row : table) {
        const std::string body = body_with(row, asks, value);
        c.send(post(route, body));
        const Response r = c.receive();
        std::string fault = fault_of(row, r);
        if (r.says_close() || !r.complete)
            fault += " the connection is closed", c = Connection(port(), 3);
        INFO(std::string(route) << " " << row.field << ": " << shown(row.value));
        CHECK(fault == "");
        passed += fault.empty();
    }
    tally(group, passed, table.size());
}

}  // namespace

TEST_CASE("server: requests: each field is right, or the error names it") {
    if (no_binary()) return;
    run_fields("B3 chat", "/v1/chat/completions", "messages", "[" + user("Hi") + "]",
               openai_fields());
    run_fields("B3 nanochat", "/chat/completions", "messages", "[" + user("Hi") + "]",
               nanochat_fields());
    run_fields("B3 completions", "/v1/completions", "prompt", "\"X\"", completion_fields());
    std::vector<FieldCase> form = no_requests();
    run_fields("B3 JSON", "/v1/chat/completions", "messages", "[]", form);
    run_fields("B3 JSON completions", "/v1/completions", "prompt", "[]", form);
    for (const char* body : {"[]", "7", "null", "\"x\"", "true"}) {
        CAPTURE(std::string(body));
        CHECK(ask(port(), post("/v1/chat/completions", body)).status == 400);
        CHECK(ask(port(), post("/chat/completions", body)).status == 422);
    }
    for (FieldCase& c : form) c.status = 422;
    run_fields("B3 JSON nanochat", "/chat/completions", "messages", "[]", form);
}

TEST_CASE("server: requests: nanochat's limits have nanochat's words") {
    if (no_binary()) return;
    const std::vector<std::pair<std::string, std::string>> cases = {
        {R"({"messages":[]})", "At least one message is required"},
        {R"({"messages":)" + many(501) + "}",
         "Too many messages. Maximum 500 messages allowed per request"},
        {R"({"messages":[)" + user("x") + "," + message("\"assistant\"", "\"\"") + "]}",
         "Message 1 has empty content"},
        {R"({"messages":[)" + user("x") + "," + user(std::string(8'001, 'x')) + "]}",
         "Message 1 is too long. Maximum 8000 characters allowed per message"},
        {R"({"messages":[)" + repeated(user(std::string(8'000, 'x')) + ",", 4) + user("x") + "]}",
         "Total conversation is too long. Maximum 32000 characters allowed"},
        {R"({"messages":[)" + message("\"robot\"", "\"x\"") + "]}",
         "Message 0 has invalid role. Must be 'user', 'assistant', or 'system'"},
        {R"({"messages":[)" + user("x") + R"(],"temperature":2.5})",
         "Temperature must be between 0.0 and 2.0"},
        {R"({"messages":[)" + user("x") + R"(],"top_k":201})", "top_k must be between 0 and 200"},
        {R"({"messages":[)" + user("x") + R"(],"max_tokens":4097})",
         "max_tokens must be between 1 and 4096"}};
    for (const auto& [body, sentence] : cases) {
        const std::string words = sentence;
        INFO(words);
        const Response r = ask(port(), post("/chat/completions", body));
        CHECK(r.status == 400);
        CHECK(text_at(json_of(r.body), "detail") == words);
        CHECK(fault_of_error(r) == "");
    }
}

TEST_CASE("server: requests: an error says what was expected and what was got") {
    if (no_binary()) return;
    const std::string a = "/v1/chat/completions", b = "/chat/completions", c = "/v1/completions",
                      walk = "/api/v1/inference/walk";
    struct Says {
        std::string route, body, param, sentence;
    };
    const std::vector<Says> t = {
        {a, chat_body(R"(,"top_p":"x")"), "top_p", R"(top_p must be a number (got "x"))"},
        {a, chat_body(R"(,"top_k":1.5)"), "top_k", "top_k must be a whole number (got 1.5)"},
        {a, chat_body(R"(,"stream":[1])"), "stream", "stream must be true or false (got an array)"},
        {a, chat_body(R"(,"stop":{})"), "stop", "stop must be a string or strings (got an object)"},
        {a, chat_body(R"(,"model":true)"), "model", "model must be a string (got true)"},
        {a, "[]", "the body", "the body must be a JSON object (got an array)"},
        {a, R"({"messages":[null]})", "messages[0]",
         "messages[0] must be a JSON object (got null)"},
        {a, R"({"messages":[{"content":"x"}]})", "messages[0].role",
         "messages[0].role is required"},
        {a, R"({"messages":[{"role":"user"}]})", "messages[0].content",
         "messages[0].content is required"},
        {a, R"({"messages":[{"role":"user","content":7}]})", "messages[0].content",
         "messages[0].content must be a string or an array of text parts (got 7)"},
        {b, R"({"messages":[{"role":"user","content":[]}]})", "messages[0].content",
         "messages[0].content must be a string (got an array)"},
        {b, R"({"messages":[{"role":"user"}]})", "messages[0].content",
         "messages[0].content is required"},
        {c, R"({"prompt":false})", "prompt",
         "prompt must be a string or an array of numbers (got false)"},
        {c, R"({"prompt":[1,"x"]})", "prompt",
         R"(prompt must be a string or an array of numbers (got "x"))"},
        {c, R"({"prompt":[-1]})", "prompt", R"(prompt: "-1" is not a token id from 0 to 511)"},
        {walk, R"({"prompt":"x","layers":[-1]})", "layers",
         R"(layers: "-1" is not a layer from 0 to 0)"},
        {walk, R"({"prompt":"x","layers":7})", "layers",
         "layers must be an array of numbers (got 7)"}};
    for (const Says& says : t) {
        INFO(says.route << " " << says.body);
        const Response r = ask(port(), post(says.route, says.body));
        CHECK(r.status == (says.route == b ? 422 : 400));
        CHECK(text_at(json_of(r.body), "detail") == says.sentence);
        CHECK(text_at(json_of(r.body), "error.param") == says.param);
        CHECK(fault_of_error(r) == "");
    }
    const Response far =
        ask(port(), post(a, chat_body(R"(,"top_p":")" + std::string(9'999, 'x') + "\"")));
    CHECK(text_at(json_of(far.body), "detail").size() < 200);
}

TEST_CASE("server: requests: what an error shows of a request is short and harmless") {
    if (no_binary()) return;
    for (const std::string& value : {std::string(100'000, 'x'), std::string("\x1b[2J\x07\x7f"),
                                     std::string("\u202e\u2066"), std::string("\u0085\u009b")}) {
        const Response r = ask(
            port(), post("/v1/chat/completions", chat_body(R"(,"model":)" + json_string(value))));
        INFO(shown(r.body));
        CHECK(r.status == 404);
        CHECK(fault_of_error(r) == "");
        CHECK(r.body.size() < 3'000);
        const std::string says = text_at(json_of(r.body), "error.message");
        for (const char* raw : {"\x1b", "\x07", "\x7f", "\u202e", "\u2066", "\u0085", "\u009b"})
            CHECK(!contains(says, raw));
    }
}

namespace {

// How long the sockets' thread, and so everybody, is held up by a request that gets no tokens.
double took(const std::string& request, Response& r, int where = port()) {
    const auto begin = Clock::now();
    r = ask(where, request);
    return http::ms_since(begin);
}
std::string answered(const std::string& text) {  // a conversation that ends with this answer
    return R"({"messages":[)" + user("x") + "," + message("\"assistant\"", json_string(text)) +
           "]}";
}

}  // namespace

TEST_CASE("server: requests: what cannot fit the context is refused at once, and holds up nobody") {
    if (no_binary()) return;
    const char *chat = "/v1/chat/completions", *why = "/api/v1/inference/why";
    struct Big {
        const char *route, *param;
        std::string body;
        bool encoded = false;  // its bytes alone would fit
    };
    std::vector<Big> t;
    for (const char* route : {chat, why}) {
        for (const char* mark : {"[", "[ ", "<|python_start|>", "[1 = 1", "[ = ]"}) {
            const int size = static_cast<int>(std::strlen(mark));
            t.push_back({route, "messages", answered(repeated(mark, 1'000'000 / size))});
            t.push_back({route, "messages", answered(repeated(mark, 70'000 / size)), true});
        }
    }
    t.push_back({chat, "messages", R"({"messages":[)" + user(std::string(1'000'000, 'a')) + "]}"});
    t.push_back(
        {chat, "messages",
         R"({"messages":)" + many(3).insert(1, user(std::string(90'000, 'a')) + ",") + "}"});
    t.push_back(
        {"/v1/completions", "prompt", R"({"prompt":")" + std::string(1'000'000, 'a') + "\"}"});
    t.push_back(
        {"/v1/completions", "prompt", R"({"prompt":")" + repeated("xy ", 5'000) + "\"}", true});
    t.push_back(
        {"/v1/completions", "prompt", R"({"prompt":[5)" + repeated(",5", 90'000) + "]}", true});
    for (const Big& b : t) {
        INFO(b.route << " " << b.body.size() << " " << shown(b.body));
        Response r;
        double fastest = 1e9, unread = 1e9;  // of three; the latter with a fault that is seen first
        std::string faulty = b.body;
        faulty.insert(faulty.size() - 1, R"(,"n":2)");
        for (int i = 0; i < 3; i++) {
            unread = std::min(unread, took(post(b.route, faulty), r));
            fastest = std::min(fastest, took(post(b.route, b.body), r));
        }
        CHECK(fastest < 20 * unread + 200);
        CHECK(r.status == 400);
        CHECK(code_of(r) == "context_length_exceeded");
        CHECK(text_at(json_of(r.body), "error.param") == b.param);
        CHECK(contains(r.body, "at least") != b.encoded);
        CHECK(fault_of_error(r) == "");
    }
    const Response walk =
        ask(sample_port(),
            post("/api/v1/inference/walk", R"({"prompt":")" + std::string(1'000'000, 'a') + "\"}"));
    CHECK(contains(text_at(json_of(walk.body), "detail"),
                   "has at least 16385 tokens, 64 are the most"));
}

TEST_CASE("server: requests: of hundreds of messages those that fit are found at once") {
    if (no_binary()) return;
    const auto body = [](const std::string& more) {
        const std::string four = "\u6f22\u5b57\u5047\u540d";
        std::string list = message("\"system\"", json_string(repeated(four, 500)));
        for (int i = 0; i < 499; i++)
            list += "," +
                    message(i % 2 ? "\"assistant\"" : "\"user\"", json_string(repeated(four, 14)));
        return post("/chat/completions", R"({"messages":[)" + list + "]" + more + "}");
    };
    double kept = 1e9, unread = 1e9;  // the fastest of five
    for (int i = 0; i < 5; i++) {
        Response r;
        kept = std::min(kept, took(body(""), r, sample_port()));
        CHECK(code_of(r) == "context_length_exceeded");  // the system's message alone is too long
        unread = std::min(unread, took(body(R"(,"top_k":-1)"), r, sample_port()));
        CHECK(code_of(r) == kRange);
    }
    INFO(kept << " ms, and " << unread << " without looking at the tokens");
    CHECK(kept < 10 * unread + 20);

    // What is left out is the least that has to be, whole exchanges and no more.
    const auto tokens = [](const std::string& list, const char* route) {
        const std::string asks = R"({"messages":[)" + list + R"(],"max_tokens":1,"temperature":0})";
        return ask(sample_port(), post(route, asks)).body;
    };
    const std::string call = "<|python_start|>1+1<|python_end|><|output_start|>2<|output_end|>";
    for (const char* system : {"", "You are kind. "}) {
        Words turns;
        for (int i = 0; i < 61; i++)
            turns.push_back(i % 2 ? message("\"assistant\"", json_string("so " + call + " it is"))
                                  : user(call + " is [12*7 = 84]" +
                                         std::string(1, static_cast<char>('a' + i % 26))));
        const auto from = [&](std::size_t first) {
            std::string list =
                *system == '\0' ? "" : message("\"system\"", json_string(system)) + ",";
            for (std::size_t i = first; i < turns.size(); i++)
                list += turns[i] + (i + 1 < turns.size() ? "," : "");
            return list;
        };
        const Stream all = read_stream(tokens(from(0), "/chat/completions"));
        REQUIRE(!all.data.empty());
        const auto gone =
            static_cast<std::size_t>(number_at(json_of(all.data.back()), "dropped_messages"));
        REQUIRE(gone > 0);
        CHECK(gone % 2 == 0);
        const Json same = json_of(tokens(from(gone), "/v1/chat/completions"));
        CHECK(number_at(same, "usage.prompt_tokens") ==
              number_at(json_of(all.data.back()), "usage.prompt_tokens"));
        CHECK(code_of(ask(sample_port(), post("/v1/chat/completions",
                                              R"({"messages":[)" + from(gone - 2) + "]}"))) ==
              "context_length_exceeded");
    }
}

TEST_CASE("server: requests: a calculator's call in an answer is read back, and nothing else is") {
    if (no_binary()) return;
    const auto marks = [](const std::string& text) {  // special tokens within the answer
        const Response r = ask(port(), post("/api/v1/inference/why", answered(text)));
        const Json json = json_of(r.body);
        std::string out, all;
        REQUIRE(at(json, "tokens") != nullptr);
        for (const Json& token : at(json, "tokens")->array) {
            const std::string piece = text_at(token, "text");
            all += piece;
            if (piece.size() > 4 && piece.starts_with("<|")) out += piece;
        }
        CAPTURE(all);
        CHECK(out.ends_with("<|assistant_end|>"));
        return out.substr(0, out.size() - 17);
    };
    const std::string one = "<|python_start|><|python_end|><|output_start|><|output_end|>";
    for (const std::string& text : std::vector<std::string>{
             "[12*7 = 84]", "so [12*7 = 84] it is", "[12*7 = 84] ", "[[12*7 = 84]]",
             "[ 12*7  = 84]", "[1,000*2 = 2000]", "['abc'.count('b') = 1]", "< [12*7 = 84] >",
             "[12*7 = 84", "[ = [12*7 = 84]"}) {
        CAPTURE(text);
        CHECK(marks(text) == (text == "[12*7 = 84" ? "" : one));
    }
    CHECK(marks("[12*7 = 84][1+1 = 2]") == one + one);
    CHECK(marks("<|python_start|>12*7<|python_end|><|output_start|>84<|output_end|>") == one);
    CHECK(marks("[1+" + std::string(1'022, ' ') + "1 = 2]") == "");  // over 1024 bytes
    CHECK(marks("[1+" + std::string(1'021, ' ') + "1 = 2]") == one);
    for (const char* text :
         {"[]", "[ = ]", "[12*7 = 85]", "[12*7=84]", "[12*7 = 84 ]", "[a = b]", "[1 = 1 = 1]",
          "[=1 = 1]", "[ = 1]", "<|python_start|>12*7",
          "<|python_start|>12*7<|python_end|>84<|output_end|>", "<|python_start|>12*7 = 84]"}) {
        CAPTURE(std::string(text));
        CHECK(marks(text) == "");
    }
}

// ---- streams ------------------------------------------------------------------------------------

namespace {

Response stream_of(const std::string& request, int where = port()) {
    Response r = ask(where, request);
    r.body = without_comments(r.body);
    INFO(r.body);
    CHECK(r.status == 200);
    CHECK(r.field("content-type") == "text/event-stream; charset=utf-8");
    CHECK(r.field("cache-control") == "no-store");
    CHECK(r.field("x-accel-buffering") == "no");
    CHECK(r.field("transfer-encoding") == "chunked");
    CHECK(r.complete);
    return r;
}
// The events of the route of nanochat as they must be, spaced as Python writes them, from the pieces
// that came and what only the server knows of the last.
std::string nanochat_events(const Stream& s, const char* finish) {
    std::string out;
    const Json last = json_of(s.data.empty() ? "" : s.data.back());
    const auto end = [&](const char* name) {
        return json_string(name) + ": " + text_at(last, "usage." + std::string(name));
    };
    for (const std::string& data : s.data) {
        const Json event = json_of(data);
        if (const Json* token = at(event, "token"))
            out += "data: {\"token\": " + json_string(token->string) + ", \"gpu\": 0}\n\n";
    }
    return out + "data: {\"done\": true, \"finish_reason\": " + json_string(finish) +
           ", \"seed\": " + text_at(last, "seed") +
           ", \"model\": " + json_string(text_at(last, "model")) + ", \"usage\": {" +
           end("prompt_tokens") + ", " + end("completion_tokens") + ", " + end("total_tokens") +
           ", \"prompt_tokens_details\": {\"cached_tokens\": " +
           text_at(last, "usage.prompt_tokens_details.cached_tokens") + "}}}\n\n";
}
// The events of OpenAI's, with what only the server knows taken from the first.
std::string openai_events(const Stream& s, const char* finish, const std::string& usage) {
    const Json first = json_of(s.data.empty() ? "" : s.data[0]);
    const std::string begin =
        "data: {\"id\":" + json_string(text_at(first, "id")) +
        ",\"object\":\"chat.completion.chunk\",\"created\":" + text_at(first, "created") +
        ",\"model\":" + json_string(text_at(first, "model")) + ",\"system_fingerprint\":" +
        json_string(ask(port(), get("/health")).field("server").replace(7, 1, "-") +
                    "-cpu-float32") +
        ",\"choices\":[";
    const std::string end = usage.empty() ? "}\n\n" : ",\"usage\":null}\n\n";
    const auto event = [&](const std::string& delta, const std::string& why) {
        return begin + "{\"index\":0,\"delta\":" + delta +
               ",\"logprobs\":null,\"finish_reason\":" + why + "}]" + end;
    };
    std::string out = event(R"({"role":"assistant","content":""})", "null");
    for (std::size_t i = 1; i < s.data.size(); i++) {
        const Json json = json_of(s.data[i]);
        if (const Json* piece = at(json, "choices.0.delta.content"))
            out += event("{\"content\":" + json_string(piece->string) + "}", "null");
    }
    out += event("{}", json_string(finish));
    if (!usage.empty()) out += begin + "],\"usage\":" + usage + "}\n\n";
    return out + "data: [DONE]\n\n";
}
bool is_utf8(const std::string& text) {
    return json_of(json_string(text)).kind == Json::Kind::string;
}

}  // namespace

TEST_CASE("server: streams: every byte is as specified, and pieces are whole characters") {
    if (no_binary()) return;
    const std::string seed = R"(,"seed":7)";
    const Response n = stream_of(nanochat(seed));
    Stream s = read_stream(n.body);
    CHECK(s.text == kAnswerText);
    const Json last = json_of(s.data.back());
    const int prompt = static_cast<int>(number_at(last, "usage.prompt_tokens"));
    CHECK(prompt >= 5);
    CHECK(n.body == nanochat_events(s, "stop"));
    const Response shorter = stream_of(nanochat(seed + R"(,"max_tokens":9)"));
    CHECK(shorter.body == nanochat_events(read_stream(shorter.body), "length"));
    CHECK(text_at(last, "model") == kChain);
    CHECK(number_at(last, "seed") == 7);
    CHECK(number_at(last, "usage.completion_tokens") == kAnswerTokens);
    CHECK(number_at(last, "usage.total_tokens") == prompt + kAnswerTokens);
    const Response plain = stream_of(chat(seed + R"(,"stream":true)"));
    s = read_stream(plain.body);
    CHECK(s.text == kAnswerText);
    CHECK(plain.body == openai_events(s, "stop", ""));
    CHECK(s.data.size() > 10);  // in pieces, not at once
    for (const std::string& data : s.data) {
        const Json json = json_of(data);
        if (const Json* piece = at(json, "choices.0.delta.content")) CHECK(is_utf8(piece->string));
    }
    const Response usage =
        stream_of(chat(seed + R"(,"stream":true,"stream_options":{"include_usage":true})"));
    s = read_stream(usage.body);
    const Json counted = json_of(s.data.at(s.data.size() - 2));
    CHECK(number_at(counted, "usage.prompt_tokens") == prompt);
    CHECK(number_at(counted, "usage.completion_tokens") == double(kAnswerTokens));
    CHECK(number_at(counted, "usage.total_tokens") == prompt + double(kAnswerTokens));
    const std::size_t at_usage = usage.body.rfind("\"usage\":");
    const std::size_t end = usage.body.find("}\n\n", at_usage);
    CHECK(usage.body ==
          openai_events(s, "stop", usage.body.substr(at_usage + 8, end - at_usage - 8)));
    const Response cut = stream_of(chat(seed + R"(,"stream":true,"max_tokens":9)"));
    CHECK(cut.body == openai_events(read_stream(cut.body), "length", ""));
    CHECK(read_stream(cut.body).text.rfind("H\u00e9llo ", 0) == 0);
}

TEST_CASE("server: streams: 1.0 gets a stream too, up to the end of the connection") {
    if (no_binary()) return;
    const std::string body = chat_body(R"(,"stream":true,"seed":7)");
    const Response r = ask(port(), with_body(length_of(body.size()), body, "1.0"));
    CHECK(r.status == 200);
    CHECK(!r.has("transfer-encoding"));
    CHECK(r.says_close());
    CHECK(r.closed);
    CHECK(read_stream(r.body).text == kAnswerText);
    CHECK(read_stream(r.body).done);
}

TEST_CASE(
    "server: streams: any cut of the answer is the same text, streamed or not, on every route") {
    if (no_binary()) return;
    std::size_t passed = 0, total = 0;
    for (int tokens = 1; tokens <= kAnswerTokens; tokens++) {
        CAPTURE(tokens);
        const std::string limit = R"(,"max_tokens":)" + std::to_string(tokens);
        const Json json = json_of(ask(port(), chat(limit)).body);
        const std::string whole = text_at(json, "choices.0.message.content");
        const Stream a = read_stream(ask(port(), chat(limit + R"(,"stream":true)")).body);
        const Stream b = read_stream(ask(port(), nanochat(limit)).body);
        const bool ends = tokens == kAnswerTokens;
        CHECK(a.text == whole);
        CHECK(b.text == whole);
        CHECK(is_utf8(whole));
        CHECK(a.finish == (ends ? "stop" : "length"));
        CHECK(b.finish == a.finish);
        CHECK(text_at(json, "choices.0.finish_reason") == a.finish);
        CHECK(number_at(json, "usage.completion_tokens") ==
              std::min<double>(tokens, double(kAnswerTokens)));
        passed += a.text == whole && b.text == whole && a.done && b.done;
        total++;
    }
    tally("B6 cuts", passed, total);
}

TEST_CASE(
    "server: streams: a stop text never appears, nor its beginning, nor is anything else lost") {
    if (no_binary()) return;
    const auto until = [](std::string_view text) {
        return kAnswerText.substr(0, kAnswerText.find(text));
    };
    struct Stops {
        std::string stop, text;
        const char* finish = "stop";
    };
    std::vector<Stops> t = {{R"("def")", until("def")},
                            {R"("a")", until("a")},
                            {R"("f")", until("f")},
                            {R"("H")", ""},
                            {R"("H\u00e9llo")", ""},
                            {R"("llo ")", until("llo ")},
                            {R"("\ud83d\udc4b")", until("\U0001F44B")},
                            {R"(" \ud83d\udc4ba")", until(" \U0001F44Ba")},
                            {R"("\u20ac!")", until("\u20ac!")},
                            {R"(["xyz","cd","d"])", until("cd")},
                            {R"(["bcdx","c"])", until("c")},
                            {R"(["abcdefx","bcx"])", kAnswerText},
                            {R"("dex")", kAnswerText},
                            {R"("hx")", kAnswerText},
                            {R"("\ufffdh!")", kAnswerText},
                            {R"("Hello")", kAnswerText},
                            {R"("bcdefgh")", kAnswerText},
                            {R"(["x","y","z","w"])", kAnswerText},
                            {R"("\ufffdg")", until("\uFFFDg")},
                            {R"("\ufffdh")", until("\uFFFDh")}};
    for (std::size_t i = 0; i < 6; i++)  // every piece of "abcdef"
        for (std::size_t n = 1; n + i <= 6; n++) {
            const std::string piece = std::string("abcdef").substr(i, n);
            t.push_back({json_string(piece), until(piece)});
        }
    std::size_t passed = 0;
    for (const Stops& c : t) {
        CAPTURE(c.stop);
        const std::string more = R"(,"stop":)" + c.stop;
        const Json json = json_of(ask(port(), chat(more)).body);
        const Stream a = read_stream(ask(port(), chat(more + R"(,"stream":true)")).body);
        const Stream b = read_stream(ask(port(), nanochat(more)).body);
        CHECK(text_at(json, "choices.0.message.content") == c.text);
        CHECK(a.text == c.text);
        CHECK(b.text == c.text);
        CHECK(a.finish == c.finish);
        CHECK(text_at(json, "choices.0.finish_reason") == c.finish);
        passed += a.text == c.text && b.text == c.text &&
                  text_at(json, "choices.0.message.content") == c.text;
    }
    tally("B6 stops", passed, t.size());
}

TEST_CASE(
    "server: streams: a reader that stops is not written ahead for, and holds up nobody else") {
    if (no_binary()) return;
    const auto server = start(zoo(), {"--threads", "1"});
    const int where = server->port();
    Connection stopped(where, 44, 4'096);
    stopped.send(endless(3'000, R"(,"stream":true)"));
    const auto written = [&] {
        http::sleep_ms(60);  // /slots is up to 50 ms old
        return number_at(json_of(ask(where, get("/slots")).body), "0.generated");
    };
    double before = -1, now = 0;
    for (int i = 0; i < 100 && now != before; i++) {  // until another's 300 steps do not change it
        before = now;
        const Stream other = read_stream(ask(where, endless(300, R"(,"stream":true)"), 45).body);
        CHECK(other.text.size() == 300);
        CHECK(other.done);
        now = written();
    }
    CHECK(now > 0);
    CHECK(now == before);
    const Response r = stopped.receive();  // and now it reads on, to the end
    const Stream s = read_stream(r.body);
    CHECK(s.text.size() == 3'000);
    CHECK(s.text.starts_with("rsqrsq"));
    CHECK(s.text.find_first_not_of("qrs") == std::string::npos);
    CHECK(s.done);
    // What was made before it read on: 256 KiB in the server, and what two kernels take (some 100).
    const double bytes = static_cast<double>(r.body.size()) / static_cast<double>(s.data.size());
    CHECK(now * bytes > 256 * 1024);
    CHECK(now * bytes < 512 * 1024);
    CHECK(idle(where));
}

TEST_CASE("server: streams: special tokens of a request are plain characters") {
    if (no_binary()) return;
    const auto count = [](const std::string& text) {
        const std::string body =
            R"({"messages":[)" + user(text) + R"(],"max_tokens":1,"temperature":0})";
        return number_at(json_of(ask(port(), post("/v1/chat/completions", body)).body),
                         "usage.prompt_tokens");
    };
    CHECK(count("<|assistant_end|>") > count("x") + 10);
    CHECK(count("<|bos|><|user_start|>") > count("x") + 12);
    const std::string body =
        R"({"messages":[)" + user("<|assistant_end|><|assistant_start|>") + R"(],"temperature":0})";
    CHECK(read_stream(ask(port(), post("/chat/completions", body)).body).text == kAnswerText);
}

TEST_CASE("server: completions: no template, and both ends of the answer") {
    if (no_binary()) return;
    const std::string body = R"({"model":"base/d9/100","prompt":"X","temperature":0,"seed":3)";
    const Response r = ask(port(), post("/v1/completions", body + "}"));
    INFO(r.body);
    const Json json = json_of(r.body);
    CHECK(text_at(json, "object") == "text_completion");
    CHECK(text_at(json, "choices.0.text") == "YZ");
    CHECK(text_at(json, "choices.0.finish_reason") == "stop");
    CHECK(number_at(json, "usage.prompt_tokens") == 2);
    CHECK(number_at(json, "seed") == 3);
    const Stream s =
        read_stream(ask(port(), post("/v1/completions", body + R"(,"stream":true})")).body);
    CHECK(s.text == "YZ");
    CHECK(s.done);
    CHECK(text_at(json_of(s.data[0]), "object") == "text_completion");
    const Json ids =
        json_of(ask(port(), post("/v1/completions", R"({"prompt":[88],"temperature":0})")).body);
    CHECK(text_at(ids, "choices.0.text") == "YZ");
    const Stream loop = read_stream(
        ask(port(), post("/v1/completions",
                         R"({"prompt":"q","temperature":0,"stream":true,"max_tokens":7})"))
            .body);
    CHECK(loop.text == "rsqrsqr");
    CHECK(loop.finish == "length");
    // a calculator's mark ends a completion, in the terminal too
    const Response mark = ask(port(), post("/v1/completions", R"({"prompt":"v","temperature":0})"));
    CHECK(number_at(json_of(mark.body), "usage.completion_tokens") == 2);
    CHECK(text_at(json_of(mark.body), "choices.0.finish_reason") == "stop");
    CHECK(text_at(json_of(mark.body), "choices.0.text") == "w");  // no empty brackets
    const std::string command = std::string(NANOGPT_BINARY) + " sample --base-dir " +
                                zoo().string() + " -g d9 -p v -t 0 -m 9 --device-type cpu -q";
    FILE* const pipe = ::popen(command.c_str(), "r");
    REQUIRE(pipe != nullptr);
    char line[64] = "";
    CHECK(std::fread(line, 1, sizeof line - 1, pipe) > 0);
    CHECK(::pclose(pipe) == 0);
    CHECK(line == text_at(json_of(mark.body), "choices.0.text") + "\n");
    CHECK(text_at(json_of(ask(port(), endless(5)).body), "choices.0.message.content") == "rsqrs");
}

// ---- what else can be asked ---------------------------------------------------------------------

TEST_CASE("server: models: the class's list, OpenAI's list, and one of each") {
    if (no_binary()) return;
    const Json all = json_of(ask(port(), get("/api/v1/inference/models")).body);
    CHECK(number_at(all, "count") == 4);
    CHECK(text_at(all, "default") == kChain);
    Words ids, ready;
    for (const Json& m : at(all, "models")->array) {
        ids.push_back(text_at(m, "id"));
        if (text_at(m, "status") == "ready") ready.push_back(ids.back());
        CHECK(at(m, "can_chat")->boolean ==
              (text_at(m, "status") == "ready" && text_at(m, "type") != "BASE"));
        for (const char* key :
             {"name",       "type",       "source",       "tag",      "step",
              "val_loss",   "val_bpb",    "loss",         "metrics",  "architecture",
              "parameters", "size_bytes", "memory_bytes", "file",     "modified",
              "status",     "reason",     "loaded",       "can_chat", "default"}) {
            CAPTURE(std::string(key));
            CHECK(at(m, key) != nullptr);
        }
        CHECK(text_at(m, "file").rfind("/", 0) != 0);
    }
    CHECK(ids == Words{kChain, kSlow, "base/d20/40", "base/d9/100"});
    CHECK(number_at(json_of(ask(port(), get("/api/v1/inference/models?type=SFT")).body), "count") ==
          2);
    CHECK(number_at(json_of(ask(port(), get("/api/v1/inference/models?refresh=1")).body),
                    "count") == 4);
    const Json one_of = json_of(ask(port(), get("/api/v1/inference/models/sft/d9/100")).body);
    CHECK(text_at(one_of, "id") == kChain);
    CHECK(at(one_of, "tensors")->array.size() > 5);
    CHECK(ask(port(), chat()).status == 200);
    const Json again = json_of(ask(port(), get("/api/v1/inference/models")).body);
    for (const Json& m : at(again, "models")->array) {
        const std::string id = text_at(m, "id");
        const Json one = json_of(ask(port(), get("/api/v1/inference/models/" + id)).body);
        const bool loaded = at(m, "loaded")->boolean;
        CHECK((loaded || id != kChain));
        if (text_at(m, "status") != "ready") continue;
        REQUIRE(at(one, "loaded") != nullptr);
        CHECK(at(one, "loaded")->boolean == loaded);
    }

    const Json list = json_of(ask(port(), get("/v1/models")).body);
    CHECK(text_at(list, "object") == "list");
    Words listed;
    for (const Json& m : at(list, "data")->array) {
        listed.push_back(text_at(m, "id"));
        CHECK(text_at(m, "object") == "model");
        CHECK(text_at(m, "owned_by") == "local");
        CHECK(number_at(m, "created") > 1.5e9);
    }
    REQUIRE(!listed.empty());
    CHECK(listed[0] == kChain);
    CHECK(std::set(listed.begin(), listed.end()) == std::set(ready.begin(), ready.end()));
    for (const char* path :
         {"/v1/models/sft/d9/100", "/v1/models/sft%2Fd9%2F100", "/v1/models/sft%2fd9/100"})
        CHECK(text_at(json_of(ask(port(), get(path)).body), "id") == kChain);
    CHECK(code_of(ask(port(), get("/v1/models/none"))) == "model_not_found");
}

TEST_CASE("server: health, stats, slots, props and metrics say what is going on") {
    if (no_binary()) return;
    REQUIRE(idle(port()));
    const Json health = json_of(ask(port(), get("/health")).body);
    CHECK(text_at(health, "status") == "ok");
    CHECK(at(health, "ready")->boolean);
    CHECK(number_at(health, "num_gpus") == 1);
    CHECK(number_at(health, "available_workers") == 8);
    CHECK(text_at(health, "device") == "cpu");
    CHECK(number_at(health, "uptime_s") >= 0);
    const Json stats = json_of(ask(port(), get("/stats")).body);
    CHECK(number_at(stats, "total_workers") == 8);
    CHECK(number_at(stats, "available_workers") == 8);
    CHECK(number_at(stats, "busy_workers") == 0);
    CHECK(number_at(stats, "workers.0.gpu_id") == 0);
    CHECK(at(stats, "workers.0.device") != nullptr);
    Connection running(port(), 4);
    running.send(endless(4'000, R"(,"stream":true,"user":"secret words")", kSlow));
    CHECK(running.receive(60'000, false, 600).status == 200);
    Json slots;
    for (int i = 0; i < 100 && (i == 0 || at(slots, "0") == nullptr); i++, http::sleep_ms(20)) {
        const Response r = ask(port(), get("/slots"));
        slots = json_of(r.body);
        if (const Json* list = at(slots, "slots")) slots = Json(*list);
        CHECK(!contains(r.body, "secret"));
    }
    CHECK(text_at(slots, "0.model") == kSlow);
    const Json busy = json_of(ask(port(), get("/health")).body);
    CHECK(number_at(busy, "active") == 1);
    CHECK(number_at(busy, "available_workers") == 7);
    std::map<std::string, double> now = metrics_of(port());
    CHECK(now["nanogpt_active_sequences"] == 1);
    CHECK(now["nanogpt_kv_blocks_used"] >= 1);
    CHECK(now["nanogpt_kv_blocks_used"] <= 64);
    CHECK(now["nanogpt_kv_blocks_total"] >= 8 * 64);  // of each model 8 contexts of 4096 tokens
    const std::string gone = "nanogpt_cancelled_total{why=\"client\"}";
    const double left = now[gone];
    running.close();
    CHECK(soon([&] { return metrics_of(port())[gone] == left + 1; }));
    CHECK(idle(port()));
    CHECK(ask(port(), get("/props")).status == 200);
    const Response metrics = ask(port(), get("/metrics"));
    CHECK(metrics.field("content-type").rfind("text/plain", 0) == 0);
    // Known requests, and by how much each number has grown.
    const std::string none = post("/v1/chat/completions", R"({"model":"no",)" + kHi + "}");
    now = metrics_of(port());
    std::map<std::string, double> before = now;
    const double prompt = number_at(json_of(ask(port(), chat()).body), "usage.prompt_tokens");
    for (int i = 0; i < 2; i++) CHECK(ask(port(), chat()).status == 200);
    CHECK(ask(port(), none).status == 404);
    CHECK(ask(port(), get("/nothing")).status == 404);
    Connection leaves(port(), 4);
    leaves.send(endless(4'000, R"(,"stream":true)", kSlow));
    CHECK(leaves.receive(60'000, false, 600).status == 200);
    leaves.close();
    const auto grown = [&](const std::string& name) {
        return now.count("nanogpt_" + name) == 0
                   ? -1
                   : now["nanogpt_" + name] - before["nanogpt_" + name];
    };
    soon([&] {  // monitors see what was 50 ms ago
        now = metrics_of(port());
        return grown("cancelled_total{why=\"client\"}") == 1;
    });
    const std::string route = "requests_total{route=\"/v1/chat/completions\",code=\"";
    CHECK(grown(route + "200\"}") == 3);
    CHECK(grown(route + "404\"}") == 1);
    CHECK(grown(route + "499\"}") == 1);
    CHECK(grown("requests_total{route=\"other\",code=\"404\"}") == 1);
    CHECK(grown("cancelled_total{why=\"client\"}") == 1);
    CHECK(grown("generated_tokens_total{model=\"" + kChain + "\"}") == 3 * kAnswerTokens);
    const double slow = grown("generated_tokens_total{model=\"" + kSlow + "\"}");
    CHECK(slow >= 1);
    CHECK(grown("prompt_tokens_total") == 4 * prompt + 1);  // endless() has one token more
    CHECK(grown("active_sequences") == 0);
    CHECK(now["nanogpt_active_sequences"] == 0);
    CHECK(now["nanogpt_queued"] == 0);
    CHECK(grown("queued") == 0);
    CHECK(now["nanogpt_connections"] >= 1);
    CHECK(now["nanogpt_memory_available_bytes"] > 1e6);
    CHECK(now["nanogpt_kv_blocks_used"] == 0);
    for (const std::string name : {"time_to_first_token_seconds", "inter_token_seconds"}) {
        CAPTURE(name);
        const bool first = name[0] == 't';
        CHECK(grown(name + "_count") == (first ? 4 : 3 * (kAnswerTokens - 1) + slow - 1));
        CHECK(grown(name + "_bucket{le=\"+Inf\"}") == grown(name + "_count"));
        CHECK(grown(name + "_sum") > 0);
        CHECK(grown(name + "_sum") < 60);
        CHECK(grown(name + "_bucket{le=\"10\"}") <= grown(name + "_count"));
        CHECK(grown(name + "_bucket{le=\"10\"}") >= grown(name + "_bucket{le=\"0.001\"}"));
        CHECK(contains(metrics.body, "# TYPE nanogpt_" + name + " histogram\n"));
    }
    for (const char* type : {"requests_total counter", "prompt_tokens_total counter",
                             "rejected_total counter", "queued gauge", "kv_blocks_used gauge"})
        CHECK(contains(metrics.body, "# TYPE nanogpt_" + std::string(type) + "\n"));
}

TEST_CASE("server: the page comes with its rules, and again only if it has changed") {
    if (no_binary()) return;
    const Response page = ask(port(), get("/"));
    CHECK(page.status == 200);
    CHECK(page.field("content-type").rfind("text/html", 0) == 0);
    CHECK(page.body.size() <= 96 * 1024);
    const std::string rules = page.field("content-security-policy");
    for (const char* rule :
         {"default-src 'none'", "script-src 'nonce-", "style-src 'nonce-", "connect-src 'self'",
          "base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'"}) {
        CAPTURE(std::string(rule));
        CHECK(contains(rules, rule));
    }
    CHECK(page.field("x-content-type-options") == "nosniff");
    CHECK(page.field("referrer-policy") == "no-referrer");
    CHECK(page.field("cross-origin-opener-policy") == "same-origin");
    CHECK(page.field("cross-origin-resource-policy") == "same-origin");
    CHECK(page.field("cache-control") == "no-cache");
    CHECK(!page.has("set-cookie"));
    CHECK(ask(port(), get("/inference")).status == 200);
    const Response same = ask(port(), get("/", "If-None-Match: " + page.field("etag") + "\r\n"));
    CHECK(same.status == 304);
    CHECK(same.body.empty());
    for (const char* path : {"/favicon.ico", "/logo.svg"})
        CHECK(ask(port(), get(path)).status == 200);
}

TEST_CASE("server: tokenize and detokenize") {
    if (no_binary()) return;
    const Json json = json_of(
        ask(port(), post("/api/v1/inference/tokenize", "{\"text\":\"H \U0001F44B\"}")).body);
    CHECK(number_at(json, "count") == 6);
    CHECK(number_at(json, "tokens.0.id") == 'H');
    CHECK(text_at(json, "tokens.0.text") == "H");
    CHECK(text_at(json, "tokens.2.text") == "(null)");
    CHECK(number_at(json, "tokens.2.bytes.0") == 0xf0);
    const Response back =
        ask(port(), post("/api/v1/inference/detokenize", R"({"tokens":[72,240,159,145,139]})"));
    CHECK(text_at(json_of(back.body), "text") == "H\U0001F44B");
    for (const char* body : {"{}", R"({"text":7})", R"({"text":null})"})
        CHECK(ask(port(), post("/api/v1/inference/tokenize", body)).status == 400);
    for (const char* body : {"{}", R"({"tokens":7})", R"({"tokens":[512]})", R"({"tokens":[-1]})",
                             R"({"tokens":[1.5]})"})
        CHECK(ask(port(), post("/api/v1/inference/detokenize", body)).status == 400);
    // Up to a limit that is told: an answer has 40 bytes for each of the text, and more may be asked.
    const Json limits = json_of(ask(port(), get("/props")).body);
    CHECK(number_at(limits, "limits.tokenize_bytes") == 16'384);
    CHECK(number_at(limits, "limits.detokenize_ids") == 16'384);
    const auto sized = [](const char* what, int n) {
        const bool text = std::string(what) == "text";
        return post(
            std::string("/api/v1/inference/") + (text ? "tokenize" : "detokenize"),
            std::string("{\"") + what + "\":" +
                (text ? json_string(repeated("~", n)) : "[7" + repeated(",7", n - 1) + "]") + "}");
    };
    for (const char* what : {"text", "tokens", "ids"}) {
        CAPTURE(std::string(what));
        const Response most = ask(port(), sized(what, 16'384));
        CHECK(most.status == 200);
        CHECK(number_at(json_of(most.body), "count") == 16'384);
        CHECK(most.body.size() < (1 << 20));
        for (const int n : {16'385, 49'000}) {
            const Response r = ask(port(), sized(what, n));
            CHECK(r.status == 400);
            CHECK(code_of(r) == kRange);
            CHECK(text_at(json_of(r.body), "error.param") == what);
            CHECK(contains(text_at(json_of(r.body), "detail"), "at most 16384"));
            CHECK(contains(text_at(json_of(r.body), "detail"), "(got " + std::to_string(n) + ")"));
        }
    }
}

// ---- the same answer on every way ---------------------------------------------------------------

namespace {

std::string from_cli(const Words& args) {  // stdout
    const test::TempDir dir;
    const std::string out = (dir / "out").string();
    const pid_t child = ::fork();
    if (child == 0) {
        ::dup2(::open("/dev/null", O_RDWR), 0);
        ::dup2(::open(out.c_str(), O_WRONLY | O_CREAT, 0600), 1);
        ::dup2(0, 2);
        ::setenv("CUDA_VISIBLE_DEVICES", "-1", 1);
        Words all = {NANOGPT_BINARY, "--base-dir", test::sample_dir().string()};
        all.insert(all.end(), args.begin(), args.end());
        std::vector<char*> pointers;
        for (std::string& word : all) pointers.push_back(word.data());
        pointers.push_back(nullptr);
        ::execvp(pointers[0], pointers.data());
        ::_exit(127);
    }
    int status = 0;
    ::waitpid(child, &status, 0);
    return test::read_file(out);
}

struct Draw {
    std::string prompt;
    int seed;
    const char* temperature;
    int tokens;
};
std::string body_of(const Draw& d, std::string_view more = "") {
    return R"({"messages":[)" + user(d.prompt) + R"(],"temperature":)" + d.temperature +
           R"(,"top_k":50,"max_tokens":)" + std::to_string(d.tokens) + R"(,"seed":)" +
           std::to_string(d.seed) + std::string(more) + "}";
}
std::string streamed(const Draw& d) {
    return post("/v1/chat/completions", body_of(d, R"(,"stream":true)"));
}

// What nanochat's route shows by name of a calculator's call, as the others show it.
std::string with_brackets(std::string text) {
    const std::pair<std::string, std::string> marks[] = {{"<|python_end|><|output_start|>", " = "},
                                                         {"<|output_end|>", "] "},
                                                         {"<|python_end|>", "]"},
                                                         {"<|python_start|>", "["},
                                                         {"<|output_start|>", "["}};
    for (const auto& [mark, shown] : marks)
        for (std::size_t at; (at = text.find(mark)) != std::string::npos;)
            text.replace(at, mark.size(), shown);
    const std::size_t open = text.rfind('[');  // of a call that the end cut
    const bool cut = open != std::string::npos && text.find(']', open) == std::string::npos;
    return text + (cut ? "]" : "");
}

std::vector<Draw> draws() {
    const char* prompts[] = {"Hello", "What is the capital of France?", "Tell me a story.",
                             "What is 12*7?", "Why is the sky blue?"};
    const char* temperatures[] = {"0", "0.7", "1.5"};
    std::vector<Draw> out;
    for (int i = 0; i < (test::quick() ? 5 : 15); i++)
        out.push_back({prompts[i % 5], 1 + 997 * i, temperatures[i % 3], 24});
    return out;
}
// Sends all at once, each on its own connection, and returns their texts.
std::vector<Stream> at_once(const std::vector<std::string>& requests, int where) {
    std::vector<Connection> open;
    std::vector<Stream> out;
    for (std::size_t i = 0; i < requests.size(); i++)
        open.emplace_back(where, 10 + static_cast<int>(i / 4));
    for (std::size_t i = 0; i < requests.size(); i++) open[i].send(requests[i]);
    for (Connection& c : open) out.push_back(read_stream(c.receive(120'000).body));
    return out;
}

}  // namespace

TEST_CASE(
    "server: the same seed gives the same text: terminal, both routes, streamed or not, in any "
    "company") {
    if (no_binary()) return;
    const int where = sample_port();
    std::size_t passed = 0, total = 0, calls = 0;
    const auto count = [&](bool good) { passed += good, total++; };
    std::vector<std::string> solo;
    const std::vector<Draw> all = draws();
    for (const Draw& d : all) {
        INFO(d.prompt << ", seed " << d.seed << ", temperature " << d.temperature);
        const std::string cli = from_cli({"-p", d.prompt, "-t", d.temperature, "-k", "50", "--seed",
                                          std::to_string(d.seed), "-m", std::to_string(d.tokens)});
        const Json json = json_of(ask(where, post("/v1/chat/completions", body_of(d))).body);
        solo.push_back(text_at(json, "choices.0.message.content"));
        const Stream a = read_stream(ask(where, streamed(d)).body);
        const Stream b = read_stream(ask(where, post("/chat/completions", body_of(d))).body);
        CHECK(cli == solo.back() + "\n");
        CHECK(a.text == solo.back());
        CHECK(number_at(json, "seed") == d.seed);
        CHECK(number_at(json_of(b.data.back()), "seed") == d.seed);
        CHECK(with_brackets(b.text) == solo.back());
        calls += contains(b.text, "<|python_start|>");
        count(cli == solo.back() + "\n"), count(a.text == solo.back());
        count(with_brackets(b.text) == solo.back());
    }
    CHECK(calls > 0);
    for (const std::size_t company : {2u, 3u, 8u, 31u}) {
        CAPTURE(company);
        std::vector<std::string> requests;
        for (std::size_t i = 0; i < company; i++)
            requests.push_back(streamed(all[i * 7 % all.size()]));
        const std::vector<Stream> texts = at_once(requests, where);
        for (std::size_t i = 0; i < company; i++) {
            CHECK(texts[i].text == solo[i * 7 % all.size()]);
            CHECK(texts[i].done);
            count(texts[i].text == solo[i * 7 % all.size()]);
        }
    }
    tally("C7", passed, total);
}

TEST_CASE("server: without a seed each answer has its own, and that gives it again") {
    if (no_binary()) return;
    const std::string body =
        R"({"messages":[)" + user("Tell me a story.") + R"(],"max_tokens":16,"temperature":1)";
    std::set<double> seeds;
    for (int i = 0; i < 3; i++) {
        const Json json =
            json_of(ask(sample_port(), post("/v1/chat/completions", body + "}")).body);
        const double seed = number_at(json, "seed");
        seeds.insert(seed);
        char text[32];
        std::snprintf(text, sizeof text, "%.0f", seed);
        const Json again = json_of(
            ask(sample_port(), post("/v1/chat/completions", body + R"(,"seed":)" + text + "}"))
                .body);
        CHECK(text_at(again, "choices.0.message.content") ==
              text_at(json, "choices.0.message.content"));
    }
    CHECK(seeds.size() == 3);
}

TEST_CASE("server: nanochat's page would work: its requests in its order") {
    if (no_binary()) return;
    CHECK(ask(sample_port(), get("/")).status == 200);
    const Json health = json_of(ask(sample_port(), get("/health")).body);
    CHECK(at(health, "ready")->boolean);
    // the page's own Host, so that Origin is this server's
    std::string request = post(
        "/chat/completions",
        R"({"messages":[)" + user("Hello") + R"(],"temperature":0.8,"top_k":50,"max_tokens":512})",
        "Origin: http://127.0.0.1:" + std::to_string(sample_port()) + "\r\n");
    request.replace(request.find("localhost"), 9, "127.0.0.1:" + std::to_string(sample_port()));
    const Stream first = read_stream(ask(sample_port(), request).body);
    CHECK(first.done);
    CHECK(first.text != "");
    const std::string more = user("Hello") + "," +
                             message("\"assistant\"", json_string(first.text)) + "," + user("Why?");
    const Response second =
        ask(sample_port(),
            post("/chat/completions",
                 R"({"messages":[)" + more + R"(],"temperature":0.8,"top_k":50,"max_tokens":64})"));
    CHECK(read_stream(second.body).done);
    CHECK(read_stream(second.body).broken == "");
    for (const std::string& data : read_stream(second.body).data) {  // what the page looks at
        const Json json = json_of(data);
        const bool known = at(json, "token") != nullptr || at(json, "done") != nullptr;
        CHECK(known);
    }
}

TEST_CASE("server: the second turn of a conversation reads only what is new, and says the same") {
    if (no_binary()) return;
    REQUIRE(idle(sample_port()));
    const std::string words = repeated("The quick brown fox jumps over the lazy dog. ", 12);
    const auto turn = [](const std::string& messages, int where) {
        const std::string body =
            R"({"messages":[)" + messages + R"(],"temperature":0,"max_tokens":12,"seed":1})";
        return json_of(ask(where, post("/v1/chat/completions", body)).body);
    };
    const Json first = turn(user(words), sample_port());
    const std::string two =
        user(words) + "," +
        message("\"assistant\"", json_string(text_at(first, "choices.0.message.content"))) + "," +
        user("And then?");
    const Json second = turn(two, sample_port());
    const double cached = number_at(second, "usage.prompt_tokens_details.cached_tokens");
    const double before = number_at(first, "usage.prompt_tokens");
    CHECK(cached >= before - 16);
    CHECK(cached < number_at(second, "usage.prompt_tokens"));
    int kept_some = 0;
    const auto fresh = start(test::sample_dir());
    const Json again = turn(two, fresh->port());
    CHECK(number_at(again, "usage.prompt_tokens_details.cached_tokens") == 0);
    CHECK(text_at(again, "choices.0.message.content") ==
          text_at(second, "choices.0.message.content"));
    // Another end of the same beginning: what the first end left behind is not read.
    for (const char* end : {"snow", "grass", "a dog", "Paris", "water", "one hundred", "snow"}) {
        CAPTURE(std::string(end));
        const Draw d = {
            "Here is a question about the world for you. Tell me all that you know about " +
                std::string(end) + ".",
            5, "1", 24};
        const Json kept =
            json_of(ask(sample_port(), post("/v1/chat/completions", body_of(d))).body);
        CHECK(text_at(kept, "choices.0.message.content") + "\n" ==
              from_cli({"-p", d.prompt, "-t", "1", "-k", "50", "--seed", "5", "-m", "24"}));
        kept_some += number_at(kept, "usage.prompt_tokens_details.cached_tokens") >= 15;
    }
    CHECK(kept_some >= 5);
    MESSAGE("cached ", cached, " of ", number_at(second, "usage.prompt_tokens"), " tokens");
}

// ---- cancelling, waiting, draining --------------------------------------------------------------

TEST_CASE("server: whoever goes away frees the place, and nobody else's") {
    if (no_binary()) return;
    REQUIRE(idle(port()));
    enum class Way { close, reset, half };
    for (const Way way : {Way::close, Way::reset, Way::half}) {
        CAPTURE(static_cast<int>(way));
        for (const bool stream : {true, false}) {
            CAPTURE(stream);
            Connection other(port(), 5);
            other.send(endless(300, R"(,"stream":true)"));
            std::vector<Connection> leaving;
            for (int i = 0; i < 12; i++) {  // more than there are slots: some wait
                leaving.emplace_back(port(), 6);
                leaving.back().send(endless(4'000, stream ? R"(,"stream":true)" : "", kSlow));
            }
            http::sleep_ms(30);
            for (Connection& c : leaving) {
                if (way == Way::close) c.close();
                if (way == Way::reset) c.reset();
                if (way == Way::half) c.half_close();
            }
            CHECK(idle(port(), 20'000));
            const Stream s = read_stream(other.receive().body);
            CHECK(s.text.size() == 300);
            CHECK(s.done);
            if (way != Way::half) continue;
            for (Connection& c : leaving) CHECK(c.receive(5'000).closed);
        }
    }
}

TEST_CASE(
    "server: a full queue and a greedy client are told so, and every request has one outcome") {
    if (no_binary()) return;
    const auto small = start(zoo(), {"--slots", "2", "--queue", "4"});
    std::vector<Connection> open;
    for (int i = 0; i < 20; i++) {
        open.emplace_back(small->port(), 10 + i);
        open.back().send(endless(test::quick() ? 20 : 60, "", kSlow));
    }
    int good = 0, full = 0, other = 0;
    for (Connection& c : open) {
        const Response r = c.receive(120'000);
        good += r.status == 200;
        full += r.status == 503 && code_of(r) == "queue_full" && r.field("retry-after") != "(none)";
        other += r.status != 200 && r.status != 503;
    }
    CHECK(good >= 6);
    CHECK(full >= 1);
    CHECK(good + full == 20);
    CHECK(other == 0);
    CHECK(idle(small->port()));
    CHECK(metrics_of(small->port())["nanogpt_rejected_total{why=\"queue_full\"}"] == full);
    const auto wide = start(zoo(), {"--slots", "1"});
    open.clear();
    for (int i = 0; i < 60; i++) {  // one client: 16 may run and 32 wait, the others are too many
        open.emplace_back(wide->port(), 9);
        open.back().send(endless(i > 0 ? 1 : test::quick() ? 300 : 600, "", kSlow));
        if (i == 0) CHECK(busy(wide->port()));
    }
    int many = 0;
    good = 0;
    for (Connection& c : open) {
        const Response r = c.receive(120'000);
        good += r.status == 200;
        many += r.status == 429 && code_of(r) == "too_many_requests" &&
                r.field("retry-after") != "(none)";
    }
    CHECK(good >= 32);
    CHECK(many >= 12);
    CHECK(good + many == 60);
    CHECK(idle(wide->port()));
    CHECK(metrics_of(wide->port())["nanogpt_rejected_total{why=\"too_many_requests\"}"] == many);
}

namespace {

// "" if a stream began and ended with this error of a busy server, and the connection with it.
std::string fault_of_cut(const Response& r, const std::string& code) {
    const Stream s = read_stream(r.body);
    if (r.status != 200 || s.data.size() < 2) return "no stream: " + r.body;
    const Json last = json_of(s.data.back());
    if (text_at(last, "error.code") != code || text_at(last, "error.type") != "overloaded_error")
        return "the last event is " + s.data.back();
    if (s.done || !s.broken.empty() || r.complete) return "it says that it is whole";
    return r.closed ? "" : "the connection goes on";
}

}  // namespace

TEST_CASE("server: who waits for too long is sent away, and what takes too long is cut") {
    if (no_binary()) return;
    const std::string stream = R"(,"stream":true)";
    {
        const auto s = start(zoo(), {"--threads", "1", "--slots", "1", "--queue-timeout", "1"});
        Connection running(s->port(), 2), waits(s->port(), 3), streams(s->port(), 4);
        running.send(endless(4'000, stream, kSlow));
        CHECK(busy(s->port()));
        const auto begin = Clock::now();
        waits.send(endless(5));
        streams.send(endless(5, stream));
        for (Connection* c : {&waits, &streams}) {
            const Response r = c->receive(60'000);
            const double waited = http::ms_since(begin);
            INFO(r.body);
            CHECK(waited >= 1'000);
            CHECK(waited < 10'000);
            const Words events = read_stream(r.body).data;  // if it was told how many are before it
            const Json json = json_of(events.empty() ? r.body : events.back());
            CHECK(text_at(json, "error.code") == "queue_full");
            CHECK(contains(text_at(json, "detail"), "waited 1 s "));
            if (c == &streams && !events.empty()) {
                CHECK(fault_of_cut(r, "queue_full") == "");
                continue;
            }
            CHECK(r.status == 503);
            CHECK(r.has("retry-after"));
            CHECK(fault_of_error(r) == "");
            CHECK(!r.says_close());
        }
        const Json health = json_of(ask(s->port(), get("/health")).body);
        CHECK(number_at(health, "active") == 1);  // who was there before is not touched
        CHECK(number_at(health, "queued") == 0);
        CHECK(read_stream(running.receive(0).body).error == false);
        running.close();
        CHECK(idle(s->port()));
        waits.send(endless(5));
        CHECK(waits.receive(60'000).status == 200);
    }
    const auto s = start(zoo(), {"--threads", "1", "--slots", "2", "--request-timeout", "3"});
    ask(s->port(), endless(1, "", kSlow));  // loads the model
    Connection whole(s->port(), 2), streams(s->port(), 3);
    const auto begin = Clock::now();
    whole.send(endless(4'000, "", kSlow));
    streams.send(endless(4'000, stream, kSlow));
    const Response r = whole.receive(60'000), cut = streams.receive(60'000);
    const double took = http::ms_since(begin);
    INFO(r.body);
    CHECK(took >= 3'000);
    CHECK(took < 30'000);
    CHECK(r.status == 503);
    CHECK(code_of(r) == "request_timeout");
    CHECK(contains(r.body, "more than 3 s"));
    CHECK(r.has("retry-after"));
    CHECK(fault_of_error(r) == "");
    CHECK(fault_of_cut(cut, "request_timeout") == "");
    const std::string text = read_stream(cut.body).text;
    CHECK(text.size() > 0);
    CHECK(text == repeated("rsq", 4'000).substr(0, text.size()));
    CHECK(idle(s->port()));
    whole.send(endless(5));
    CHECK(whole.receive(60'000).status == 200);
}

TEST_CASE("server: a client with many requests does not keep the others waiting") {
    if (no_binary()) return;
    const auto one_slot = start(zoo(), {"--threads", "1", "--slots", "1"});
    for (const bool tabs : {false, true}) {  // of one address
        CAPTURE(tabs);
        std::vector<Connection> greedy;
        for (int i = 0; i < 12; i++) {
            greedy.emplace_back(one_slot->port(), 20);
            greedy.back().send(with_line(endless(60, "", kSlow), "X-Client-Id: one"));
        }
        http::sleep_ms(50);
        Connection modest(one_slot->port(), tabs ? 20 : 21);
        modest.send(with_line(endless(60, "", kSlow), "X-Client-Id: two"));
        CHECK(modest.receive(120'000).status == 200);
        int answered = 0;
        for (Connection& c : greedy) answered += c.receive(0).status == 200;
        CHECK(answered <= 5);  // round-robin over clients: about 2, and not all 12
        greedy.clear();
        CHECK(idle(one_slot->port()));
    }
}

TEST_CASE("server: fairness: 64 requests of one client do not double what 31 others wait") {
    if (no_binary()) return;
    const auto s = start(zoo(), {"--threads", "1", "--slots", "4", "--queue-timeout", "3600",
                                 "--request-timeout", "3600"});
    const std::string request = endless(test::quick() ? 8 : 16, "", kSlow);
    std::size_t passed = 0;
    // Milliseconds until the last of the 31 is answered, beside one who was there before.
    const auto round = [&](int many) {
        std::vector<Connection> greedy, others;
        for (int i = 0; i < many; i++) {
            greedy.emplace_back(s->port(), 20);
            greedy.back().send(request);
        }
        const auto begin = Clock::now();
        for (int i = 0; i < 31; i++) {
            others.emplace_back(s->port(), 21 + i);
            others.back().send(request);
        }
        int good = 0, refused = 0;
        for (Connection& c : others) good += c.receive(600'000).status == 200;
        const double ms = http::ms_since(begin);
        CHECK(good == 31);
        for (Connection& c : greedy) {  // of whose only 48 may wait or run
            const Response r = c.receive(600'000);
            good += r.status == 200;
            refused += r.status == 429;
        }
        CHECK(good + refused == 31 + many);
        CHECK(refused <= many / 4);
        passed += good + refused == 31 + many && refused <= many / 4;
        return ms;
    };
    const auto median = [](std::vector<double> ms) {
        std::sort(ms.begin(), ms.end());
        return ms[(ms.size() - 1) / 2];
    };
    round(1);  // loads the model
    const auto begin = Clock::now();
    const std::size_t rounds = test::quick() ? 2 : 20;  // fewer on a slow machine, but two
    std::vector<double> equal, beside;                  // in turn, so that both have the same noise
    while (beside.size() < 2 || (beside.size() < rounds && http::ms_since(begin) < 90'000)) {
        equal.push_back(round(1));
        beside.push_back(round(64));
    }
    MESSAGE("the last of 31 waits ", median(beside), " ms, with equal shares ", median(equal));
    CHECK(median(beside) <= 2 * median(equal));
    tally("C4", passed, 2 * beside.size() + 1);
}

TEST_CASE("server: who asks with a long prompt is told when it is read, and how far") {
    if (no_binary()) return;
    std::string words = "Hi";
    for (int i = 0; i < 700; i++) words += " " + std::to_string(i % 10);
    const auto comments = [&](const std::string& text) {
        const std::string body = R"({"messages":[{"role":"user","content":")" + text +
                                 R"("}],"max_tokens":2,"stream":true})";
        const Stream s = read_stream(ask(port(), post("/v1/chat/completions", body)).body);
        CHECK(s.done);
        return s.comments;
    };
    CHECK(comments("Hi").empty());
    const Words told = comments(words);
    REQUIRE(told.size() >= 3);
    CHECK(told[0] == "reading 0");
    int last = 0;
    for (std::size_t i = 1; i < told.size(); i++) {
        REQUIRE(told[i].starts_with("reading "));
        const int now = std::stoi(told[i].substr(8));
        CHECK(last < now);
        CHECK(now < 100);
        last = now;
    }
}

TEST_CASE(
    "server: addresses take turns, in each its clients, and all are told how many are before") {
    if (no_binary()) return;
    const auto s = start(zoo(), {"--threads", "1", "--slots", "1"});
    struct {
        int address;
        const char* client;
        std::size_t place;
    } const line[] = {
        {20, "one", 0}, {20, "one", 4}, {20, "two", 2}, {21, "one", 1}, {21, "one", 3}};
    constexpr int kTokens =
        40;  // of the first: each writes another number, by which the log names it
    Connection first(s->port(), 22);
    first.send(endless(4'000, R"(,"stream":true)", kSlow));
    CHECK(busy(s->port()));
    std::vector<Connection> waiting;
    for (const auto& one : line) {
        const int come = static_cast<int>(waiting.size());
        waiting.emplace_back(s->port(), one.address);
        waiting.back().send(with_line(endless(kTokens + come, R"(,"stream":true)", kSlow),
                                      std::string("X-Client-Id: ") + one.client));
        for (int i = 0; i < 1'000; i++, http::sleep_ms(2))
            if (number_at(json_of(ask(s->port(), get("/health")).body), "queued") > come) break;
    }
    http::sleep_ms(1'500);  // they are told once a second
    first.close();
    Words want(waiting.size()), served;
    for (std::size_t i = 0; i < waiting.size(); i++) {
        const Response r = waiting[i].receive();
        CHECK(r.status == 200);
        std::size_t most = 0;
        for (const std::string& comment : read_stream(r.body).comments) {
            if (comment.starts_with("queued "))
                most = std::max<std::size_t>(most, std::stoul(comment.substr(7)));
        }
        CHECK(most == line[i].place);
        want[line[i].place] = std::to_string(kTokens + static_cast<int>(i));
    }
    http::sleep_ms(100);
    std::istringstream log(s->output());
    for (std::string text; std::getline(log, text);) {
        if (!contains(text, " /v1/chat/completions 200 ")) continue;
        const std::size_t end = text.rfind(' '), begin = text.rfind(' ', end - 1) + 1;
        served.push_back(text.substr(begin, end - begin));
    }
    CHECK(served == want);
}

TEST_CASE("server: a client that makes up names for itself keeps to the limits of one client") {
    if (no_binary()) return;
    const auto s = start(zoo(), {"--threads", "1", "--slots", "20"});
    for (const std::string name : {"X-Client-Id: tab-", "X-Forwarded-For: 192.0.2."}) {
        CAPTURE(name);
        std::vector<Connection> open;
        for (int i = 0; i < 52; i++) {  // 16 run, 32 wait, 4 are too many
            open.emplace_back(s->port(), 60);
            open.back().send(
                with_line(endless(4'000, R"(,"stream":true)", kSlow), name + std::to_string(i)));
        }
        Json health;
        for (int i = 0; i < 1'000 && number_at(health, "active") < 16; i++, http::sleep_ms(5))
            health = json_of(ask(s->port(), get("/health"), 61).body);
        CHECK(ask(s->port(), chat(), 61).status == 200);  // there are places for others
        health = json_of(ask(s->port(), get("/health"), 61).body);
        CHECK(number_at(health, "active") == 16);
        CHECK(number_at(health, "queued") == 32);
        int many = 0;
        for (Connection& c : open) {
            const Response r = c.receive(0);
            many += r.status == 429 && code_of(r) == "too_many_requests";
        }
        CHECK(many == 4);
        open.clear();
        CHECK(idle(s->port(), 20'000));
    }
}

TEST_CASE("server: more connections than there may be are refused at once, and the others live") {
    if (no_binary()) return;
    std::vector<Connection> open;
    for (int i = 0; i < 64; i++) open.emplace_back(port(), 30);
    http::sleep_ms(50);
    Connection one_more(port(), 30);
    const Response r = one_more.receive(5'000);
    CHECK(r.status == 503);
    CHECK(one_more.ends());
    open[63].send(get("/health"));
    CHECK(open[63].receive().status == 200);
    CHECK(ask(port(), get("/health"), 31).status == 200);
    open.clear();
    http::sleep_ms(50);
    CHECK(ask(port(), get("/health"), 30).status == 200);
}

namespace {

// Seconds of a CPU that the thread of the sockets, which is the first one, has taken.
double socket_seconds(const Server& s) {
    const std::string pid = std::to_string(s.pid());
    std::ifstream file("/proc/" + pid + "/task/" + pid + "/stat");
    std::string text;
    std::getline(file, text);
    std::istringstream words(text.substr(text.rfind(')') + 1));
    for (int i = 0; i < 11; i++) words >> text;
    double user = 0, system = 0;
    words >> user >> system;
    return (user + system) / static_cast<double>(::sysconf(_SC_CLK_TCK));
}

}  // namespace

TEST_CASE("server: without descriptors it refuses who comes, disturbs nobody, and does not spin") {
    if (no_binary()) return;
    const auto s = start(zoo(), {"--threads", "1"});
    const std::string look = get("/health"), pid = std::to_string(s->pid());
    rlimit files{};
    REQUIRE(::prlimit(s->pid(), RLIMIT_NOFILE, nullptr, &files) == 0);
    const auto limit = [&](rlim_t most) {
        const rlimit less = {most, files.rlim_max};
        REQUIRE(::prlimit(s->pid(), RLIMIT_NOFILE, &less, nullptr) == 0);
    };
    const auto begin = Clock::now();
    const int tokens = test::quick() ? 90 : 300;
    std::vector<Connection> streams, open;
    for (int i = 0; i < 2; i++) {
        streams.emplace_back(s->port(), 5);
        streams.back().send(endless(tokens, R"(,"stream":true)", kSlow));
    }
    for (Connection& c : streams) CHECK(c.begins());
    Connection inside(s->port(), 6);
    const auto active = [&] {
        inside.send(look);
        return number_at(json_of(inside.receive().body), "active");
    };
    CHECK(active() == 2);
    const auto held = std::distance(fs::directory_iterator("/proc/" + pid + "/fd"), {});
    // 48 connections where there is room for some 8.
    const auto crowd = [&](int running) {
        const auto come = Clock::now();
        for (int i = 0; i < 48; i++) {
            open.emplace_back(s->port(), 50);
            open.back().send(look);
        }
        CHECK(active() == running);
        int good = 0, refused = 0;
        for (Connection& c : open) {
            const Response r = c.receive(20'000 - http::ms_since(come));
            good += r.status == 200;
            refused += r.status == 503 && r.has("retry-after") && r.says_close() && c.ends();
        }
        CHECK(good >= 6);
        CHECK(refused >= 36);
        CHECK(good + refused == 48);
        CHECK(http::ms_since(come) < 6'000);
    };
    limit(static_cast<rlim_t>(held) + 8);
    crowd(2);
    for (Connection& c : streams) {
        const Stream all = read_stream(c.receive(300'000).body);
        CHECK(all.text == repeated("rsq", tokens / 3));
        CHECK(all.done);
    }
    limit(files.rlim_cur);
    http::sleep_ms(500);                // until nobody is refused any more
    inside = Connection(s->port(), 6);  // the old one may have been idle for too long
    CHECK(active() == 0);
    // Not even the one that is kept for refusing: it comes when there is one again.
    limit(3);
    Connection waits(s->port(), 7);
    waits.send(look);
    http::sleep_ms(500);
    const double before = socket_seconds(*s);
    http::sleep_ms(1'000);
    CHECK(socket_seconds(*s) - before < 0.5);
    CHECK(!waits.begins(0));
    limit(files.rlim_cur);
    CHECK(waits.receive().status == 200);
    // The one that is kept was lost, and is there again.
    open.clear();
    http::sleep_ms(500);
    limit(static_cast<rlim_t>(held) + 8);
    crowd(0);
    open.clear();
    http::sleep_ms(500);
    CHECK(ask(s->port(), chat()).status == 200);
    int complaints = 0;
    const std::string log = s->output(), words = "cannot accept a connection";
    for (std::size_t at = 0; (at = log.find(words, at)) != log.npos; at++) complaints++;
    CHECK(complaints >= 2);
    CHECK(complaints <= 2 + http::ms_since(begin) / 1'000);  // one a second
}

TEST_CASE("server: draining: what is asked now is refused, what was asked before is answered") {
    if (no_binary()) return;
    const auto s = start(zoo(), {"--threads", "1", "--drain-seconds", "600"});
    Connection running(s->port(), 2), asks(s->port(), 3), looks(s->port(), 4);
    running.send(endless(200, R"(,"stream":true)", kSlow));
    CHECK(busy(s->port()));
    const std::string question = chat(), look = get("/health");
    asks.send(question.substr(0, question.size() - 1));  // begun, or they would be closed as idle
    looks.send(look.substr(0, look.size() - 1));
    CHECK(ask(s->port(), look).status == 200);
    s->signal(SIGTERM);
    while (Connection(s->port()).is_open()) http::sleep_ms(5);
    asks.send(question.substr(question.size() - 1));
    looks.send(look.substr(look.size() - 1));
    const Response refused = asks.receive(), health = looks.receive();
    CHECK(refused.status == 503);
    CHECK(code_of(refused) == "draining");
    CHECK(fault_of_error(refused) == "");
    CHECK(refused.has("retry-after"));
    CHECK(refused.says_close());
    CHECK(health.status == 503);
    CHECK(text_at(json_of(health.body), "status") == "draining");
    CHECK(!at(json_of(health.body), "ready")->boolean);
    const Stream rest = read_stream(running.receive(60'000).body);
    CHECK(rest.text.size() == 200);
    CHECK(rest.done);
    CHECK(s->wait(60'000) == 0);
}

TEST_CASE("server: signals end it with 0, whatever it is doing") {
    if (no_binary()) return;
    std::size_t passed = 0, total = 0;
    const auto ends = [&](Server& s) {
        const int code = s.wait(60'000);
        CHECK(code == 0);
        passed += code == 0, total++;
    };
    for (const int number : {SIGTERM, SIGINT}) {
        CAPTURE(number);
        {
            Server loading(NANOGPT_BINARY, {"--base-dir", test::sample_dir().string()},
                           (logs() / ("loading" + std::to_string(number))).string());
            loading.signal(number);
            ends(loading);
        }
        const auto s = start(zoo(), {"--threads", "1", "--slots", "33", "--drain-seconds", "600"});
        std::vector<Connection> open;
        for (int i = 0; i < 32; i++) {
            open.emplace_back(s->port(), 10 + i / 8);
            open.back().send(endless(150, R"(,"stream":true)"));
        }
        Connection leaves(s->port(), 20);
        leaves.send(endless(4'000, R"(,"stream":true)", kSlow));
        for (Connection& c : open) CHECK(c.begins());
        s->signal(number);
        leaves.reset();
        int whole = 0;
        for (Connection& c : open) whole += contains(c.receive(60'000).body, "[DONE]");
        CHECK(whole == 32);
        ends(*s);
    }
    tally("D5", passed, total);
}

TEST_CASE("server: SIGTERM: idle ends at once, a stream may finish, a queue is sent away, exit 0") {
    if (no_binary()) return;
    {
        const auto s = start(zoo());
        Connection kept(s->port());
        kept.send(get("/health"));
        CHECK(kept.receive().status == 200);
        s->signal(SIGTERM);
        CHECK(s->wait(10'000) == 0);
        CHECK(kept.ends());
    }
    {
        const auto s = start(zoo(), {"--slots", "1"});
        Connection running(s->port(), 2), waiting(s->port(), 3), probe(s->port(), 4);
        running.send(endless(400, R"(,"stream":true)", kSlow));
        CHECK(running.receive(60'000, false, 300).status == 200);
        waiting.send(endless(5, "", kSlow));
        http::sleep_ms(100);
        s->signal(SIGTERM);
        const Response sent_away = waiting.receive(10'000);
        CHECK(sent_away.status == 503);
        CHECK(code_of(sent_away) == "draining");
        CHECK(!Connection(s->port()).is_open());
        CHECK(s->wait(60'000) == 0);
    }
    {
        const auto s = start(zoo(), {"--drain-seconds", "60"});
        Connection running(s->port());
        running.send(endless(200, R"(,"stream":true)", kSlow));
        CHECK(busy(s->port()));
        s->signal(SIGINT);
        const Stream all = read_stream(running.receive(60'000).body);
        CHECK(all.done);
        CHECK(all.text.size() == 200);
        CHECK(s->wait(60'000) == 0);
    }
    {
        const auto s = start(zoo(), {"--drain-seconds", "1"});
        Connection running(s->port());
        running.send(endless(4'000, R"(,"stream":true)", kSlow));
        CHECK(busy(s->port()));
        http::sleep_ms(100);
        s->signal(SIGTERM);
        CHECK(fault_of_cut(running.receive(60'000), "draining") == "");
        CHECK(s->wait(60'000) == 0);
    }
    {
        const auto s = start(zoo(), {"--drain-seconds", "600"});
        Connection running(s->port());
        running.send(endless(4'000, R"(,"stream":true)", kSlow));
        CHECK(busy(s->port()));
        http::sleep_ms(100);
        s->signal(SIGTERM);
        http::sleep_ms(100);
        CHECK(!s->has_ended());
        s->signal(SIGTERM);  // again: at once
        CHECK(fault_of_cut(running.receive(60'000), "draining") == "");
        CHECK(s->wait(60'000) == 0);
    }
    {
        const auto s = start(zoo());
        s->signal(SIGHUP);
        s->signal(SIGPIPE);
        http::sleep_ms(100);
        CHECK(ask(s->port(), get("/health")).status == 200);
        test::make_checkpoint(zoo(), chain_model("mid_checkpoints", "d3", 1, 64));
        s->signal(SIGHUP);
        const auto seen = [&] {
            return contains(ask(s->port(), get("/api/v1/inference/models?refresh=1")).body,
                            "mid/d3/100");
        };
        for (int i = 0; i < 100 && !seen(); i++) http::sleep_ms(50);
        CHECK(seen());
        fs::remove_all(zoo() / "mid_checkpoints");
        CHECK(ask(s->port(), post("/v1/chat/completions", chat_body(R"(,"model":"mid/d3/100")")))
                  .status >= 400);
    }
}

TEST_CASE("server: slow clients are closed in their time, all at once, and a good one is not") {
    if (no_binary()) return;
    struct Slow {
        const char* kind;
        std::string first, drip;   // sent at once; then again and again
        double at_least, at_most;  // seconds until it is closed
        int status;                // before that; 0: nothing
    };
    const Slow kinds[] = {
        {"says nothing", "", "", 14, 19, 0},
        {"sends half a line", "GET /hea", "", 9, 14, 408},
        {"sends a field after the other", "GET /health HTTP/1.1\r\n", "X: y\r\n", 9, 14, 408},
        {"sends a line byte by byte", "", "x", 9, 14, 408},
        {"sends empty lines", "", "\r\n", 9, 17, 408},
        {"stops within the body", with_body(kLength, "{"), "", 5, 10, 408},
        {"sends a body byte by byte", with_body(kLength, "{"), " ", 5, 10, 408},
        {"stops within a chunk", in_chunks("5\r\n{"), "", 5, 10, 408},
        {"stays after an answer", get("/health"), "", 14, 19, 200}};
    struct Open {
        const Slow* kind;
        Connection connection;
        Clock::time_point start = Clock::now();
        double closed = 0;
        int status = 0;
    };
    // The only place of another server is held by one who does not read; somebody waits for it.
    const auto narrow = start(zoo(), {"--threads", "1", "--slots", "1"});
    Connection stuck(narrow->port(), 2, 4'096), waits(narrow->port(), 3);
    stuck.send(endless(4'000, R"(,"stream":true)"));
    CHECK(busy(narrow->port()));
    const auto stopped = Clock::now();
    waits.send(endless(5, R"(,"stream":true)"));
    std::vector<Open> open;
    for (const Slow& kind : kinds)
        for (int i = 0; i < 3; i++) {
            open.push_back({&kind, Connection(port(), 40)});
            open.back().connection.send(kind.first);
        }
    Connection good(port(), 41);
    int answered = 0, asked = 0;
    for (const auto begin = Clock::now(); http::ms_since(begin) < 20'000;) {
        bool left = false;
        for (Open& o : open) {
            if (o.closed > 0) continue;
            left = true;
            const Response r = o.connection.receive(0);
            if (r.status != 0) o.status = r.status;
            if (o.connection.ends(0)) o.closed = http::ms_since(o.start) / 1000;
            if (!o.kind->drip.empty() && asked % 5 == 0) o.connection.send(o.kind->drip);
        }
        if (!left) break;
        good.send(get("/health"));
        answered += good.receive(5'000).status == 200;
        asked++;
        http::sleep_ms(100);
    }
    CHECK(answered == asked);
    std::size_t passed = 0;
    for (const Open& o : open) {
        INFO(std::string(o.kind->kind)
             << ": closed after " << o.closed << " s, status " << o.status);
        const bool status =
            o.status == o.kind->status || (o.kind->status == 408 && o.status == 0 &&
                                           std::string_view(o.kind->kind) == "sends empty lines");
        const double most = o.kind->at_most + (test::quick() ? 5 : 0);
        const bool in_time = o.closed >= o.kind->at_least && o.closed <= most;
        CHECK(status);
        CHECK(in_time);
        passed += status && in_time;
    }
    const Response r = waits.receive(60'000);
    const Stream s = read_stream(r.body);
    INFO(r.body);
    CHECK(http::ms_since(stopped) >= 29'000);  // 30 s without progress
    CHECK(s.text == "rsqrs");
    CHECK(s.done);
    REQUIRE(s.comments.size() >= 3);
    CHECK(s.comments[0] == "queued 0");
    for (std::size_t i = 1; i < s.comments.size(); i++)
        CHECK(s.comments[i] == "ping");  // every 10 s
    CHECK(s.comments.size() <= 4);
    const Response cut = stuck.receive();
    CHECK(cut.closed);
    CHECK(!cut.complete);
    CHECK(!read_stream(cut.body).done);
    CHECK(idle(narrow->port()));
    tally("B5", passed + (s.done && !cut.complete), open.size() + 1);
}

// ---- keys, other origins, the log, wrong usage --------------------------------------------------

TEST_CASE("server: with a key nothing is answered without it but health and the page") {
    if (no_binary()) return;
    const auto s = start(zoo(), {"--api-key", "open-sesame"});
    const auto with = [](const std::string& value) { return "Authorization: " + value + "\r\n"; };
    for (const char* path : {"/health", "/stats", "/", "/favicon.ico"}) {
        CAPTURE(std::string(path));
        CHECK(ask(s->port(), get(path)).status == 200);
    }
    for (const char* path :
         {"/v1/models", "/api/v1/inference/models", "/slots", "/props", "/metrics"}) {
        CAPTURE(std::string(path));
        const Response r = ask(s->port(), get(path));
        CHECK(r.status == 401);
        CHECK(code_of(r) == "invalid_api_key");
        CHECK(r.field("www-authenticate").rfind("Bearer", 0) == 0);
        CHECK(ask(s->port(), get(path, with("Bearer open-sesame"))).status == 200);
    }
    for (const char* wrong :
         {"Bearer wrong", "Bearer open-sesam", "Bearer open-sesame2", "Bearer ",
          "Basic open-sesame", "open-sesame", "Bearer open-sesame x", "Bearer OPEN-SESAME"}) {
        CAPTURE(std::string(wrong));
        CHECK(ask(s->port(), get("/v1/models", with(wrong))).status == 401);
    }
    CHECK(ask(s->port(), chat()).status == 401);
    CHECK(ask(s->port(), nanochat()).status == 401);
    const std::string body = chat_body();
    CHECK(ask(s->port(), post("/v1/chat/completions", body, with("Bearer open-sesame"))).status ==
          200);
    CHECK(ask(s->port(), post("/v1/chat/completions", body, with("bearer open-sesame"))).status ==
          200);
    CHECK(!contains(s->output(), "sesame"));
    const test::TempDir dir;
    test::write_file(dir / "keys", " one-key \r\n\n \nanother key\n");
    const auto filed = start(zoo(), {"--api-key-file", (dir / "keys").string()});
    for (const auto& [key, status] :
         {std::pair("one-key", 200), {"another key", 200}, {"one-key another key", 401}}) {
        CAPTURE(std::string(key));
        CHECK(ask(filed->port(), get("/v1/models", with(std::string("Bearer ") + key))).status ==
              status);
    }
}

TEST_CASE(
    "server: on any other address than loopback it makes up a key and prints it in the link") {
    if (no_binary()) return;
    const auto key_of = [](const Server& s) {
        const std::string out = s.output();
        const std::size_t at = std::min(out.find("#key="), out.size());
        return at == out.size() ? "" : out.substr(at + 5, out.find('\n', at) - at - 5);
    };
    const auto status = [](const Server& s, const std::string& key) {
        const std::string field = key.empty() ? "" : "Authorization: Bearer " + key + "\r\n";
        const int list = ask(s.port(), get("/v1/models", field)).status;
        const std::string body = chat_body(R"(,"max_tokens":1)");
        const int answer = ask(s.port(), post("/v1/chat/completions", body, field)).status;
        return list == answer ? list : -1;
    };
    const auto made = start(zoo(), {"--host", "0.0.0.0"});
    const auto other = start(zoo(), {"--host", "0.0.0.0"});
    const std::string key = key_of(*made);
    CHECK(key.size() == 32);
    CHECK(key.find_first_not_of("0123456789abcdef") == std::string::npos);
    CHECK(status(*made, "") == 401);
    CHECK(status(*made, key_of(*other)) == 401);
    CHECK(status(*made, key) == 200);
    CHECK(ask(made->port(), get("/")).status ==
          200);  // the page, which takes the key from the link
    CHECK(!contains(ask(made->port(), get("/")).body, key));
    const std::string out = made->output();
    CHECK(out.find(key) == out.rfind(key));  // in the link and not in the log
    const auto set = start(zoo(), {"--host", "0.0.0.0", "--api-key", "open-sesame"});
    CHECK(key_of(*set) == "");
    CHECK(status(*set, "") == 401);
    CHECK(status(*set, "open-sesame") == 200);
    const auto open = start(zoo(), {"--host", "0.0.0.0", "--open"});
    CHECK(key_of(*open) == "");
    CHECK(status(*open, "") == 200);
    CHECK(key_of(*shared(false)) == "");
}

TEST_CASE("server: another origin may ask if it was allowed, and no other") {
    if (no_binary()) return;
    const std::string site = "http://localhost:3006", origin = "Origin: " + site + "\r\n";
    const auto s = start(zoo(), {"--allow-origin", site, "--allow-host", "chat.example"});
    const auto preflight = [&](const std::string& from) {
        return ask(s->port(),
                   "OPTIONS /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nOrigin: " + from +
                       "\r\nAccess-Control-Request-Method: POST\r\n"
                       "Access-Control-Request-Headers: content-type, authorization\r\n\r\n");
    };
    const Response yes = preflight(site);
    CHECK(yes.status == 204);
    CHECK(yes.field("access-control-allow-origin") == site);
    CHECK(contains(yes.field("access-control-allow-methods"), "POST"));
    CHECK(contains(yes.field("access-control-allow-headers"), "Content-Type"));
    CHECK(contains(yes.field("access-control-allow-headers"), "Authorization"));
    CHECK(contains(yes.field("vary"), "Origin"));
    CHECK(yes.body.empty());
    for (const char* other :
         {"http://evil.example", "http://localhost:3007", "https://localhost:3006", "null",
          "http://localhost:3006.evil.example"}) {
        CAPTURE(std::string(other));
        const Response no = preflight(other);
        CHECK(no.status == 403);
        CHECK(!no.has("access-control-allow-origin"));
    }
    const Response r = ask(s->port(), post("/v1/chat/completions", chat_body(),
                                           origin + "Sec-Fetch-Site: same-site\r\n"));
    CHECK(r.status == 200);
    CHECK(r.field("access-control-allow-origin") == site);
    CHECK(!r.has("access-control-allow-credentials"));
    const Response stream = ask(s->port(), post("/chat/completions", chat_body(), origin));
    CHECK(stream.field("access-control-allow-origin") == site);
    CHECK(ask(s->port(), post("/v1/chat/completions", "{", origin))
              .field("access-control-allow-origin") == site);
    CHECK(ask(s->port(), "GET /health HTTP/1.1\r\nHost: chat.example\r\n\r\n").status == 200);
    CHECK(ask(s->port(), "GET /health HTTP/1.1\r\nHost: chat.example:8000\r\n\r\n").status == 200);
    CHECK(ask(s->port(), "GET /health HTTP/1.1\r\nHost: other.example\r\n\r\n").status == 403);
}

TEST_CASE("server: a proxy on this machine may say whom it asks for, if it was told so") {
    if (no_binary()) return;
    const auto s = start(zoo(), {"--trust-proxy", "--slots", "1"});
    std::vector<Connection> open;
    for (int i = 0; i < 80;
         i++) {  // clients behind one address: more than one client's connections
        open.emplace_back(s->port(), 1);
        open.back().send(post("/v1/chat/completions", chat_body(R"(,"max_tokens":3)"),
                              "X-Forwarded-For: 192.0.2." + std::to_string(i) + "\r\n"));
    }
    int good = 0;
    for (Connection& c : open) good += c.receive().status == 200;
    CHECK(good == 80);
    open.clear();
    const std::string slow = endless(4'000, R"(,"stream":true)", kSlow);
    for (int i = 0; i < 52; i++) {  // of one of them 48 run or wait, 4 are too many
        open.emplace_back(s->port(), 1);
        open.back().send(with_line(slow, "X-Forwarded-For: 192.0.2.200"));
    }
    for (int other = 0; other < 2; other++) {
        Connection c(s->port(), 1);
        c.send(with_line(slow, "X-Forwarded-For: 192.0.2." + std::to_string(200 + other)));
        CHECK(c.receive(10'000, false, 1).status == (other == 0 ? 429 : 200));
    }
    int many = 0;
    for (Connection& c : open) many += c.receive(0).status == 429;
    CHECK(many == 4);
    open.clear();
    CHECK(idle(s->port(), 20'000));
}

TEST_CASE("server: one line per request is logged, without its words and without controls") {
    if (no_binary()) return;
    const auto s = start(zoo());
    const std::string secret =
        R"({"messages":[{"role":"user","content":"xyzzy plugh"}],"temperature":0})";
    CHECK(ask(s->port(), post("/v1/chat/completions", secret)).status == 200);
    CHECK(ask(s->port(), post("/chat/completions", secret)).status == 200);
    CHECK(ask(s->port(), get("/none%1b%5b2J%e2%80%ae")).status >= 400);
    CHECK(ask(s->port(), get("/health", "User-Agent: \x9b\xe2\x80\xae\r\n")).status == 200);
    CHECK(ask(s->port(), head_of("GET /\x1b[2J HTTP/1.1")).status == 400);
    http::sleep_ms(100);
    const std::string log = s->output();
    INFO(log);
    CHECK(contains(log, "POST /v1/chat/completions 200"));
    CHECK(contains(log, "POST /chat/completions 200"));
    CHECK(!contains(log, "xyzzy"));
    CHECK(!contains(log, "llo"));
    for (const char* raw : {"\x1b", "\u202e", "\x9b"}) CHECK(!contains(log, raw));
}

TEST_CASE("server: --log-content logs words, --json a line of JSON for each request") {
    if (no_binary()) return;
    const std::string asked =
        R"({"messages":[{"role":"user","content":"xyzzy \u001b[2J"}],"temperature":0})";
    const auto words = start(zoo(), {"--log-content"}), lines = start(zoo(), {"--json"});
    for (const auto* s : {&words, &lines})
        CHECK(ask((*s)->port(), post("/v1/chat/completions", asked)).status == 200);
    for (const auto* s : {&words, &lines})
        CHECK(soon([&] { return contains((*s)->output(), "/v1/chat/completions"); }));
    const std::string log = words->output();
    INFO(log);
    CHECK(contains(log, "xyzzy"));
    CHECK(contains(log, "llo"));
    CHECK(!contains(log, "\x1b"));
    int found = 0;
    std::istringstream all(lines->output());
    for (std::string line; std::getline(all, line);) {
        if (!contains(line, "/v1/chat/completions")) continue;
        const Json json = json_of(line);
        CHECK(text_at(json, "method") == "POST");
        CHECK(text_at(json, "client") == "127.0.0.1");
        CHECK(number_at(json, "code") == 200);
        CHECK(number_at(json, "new_tokens") == kAnswerTokens);
        CHECK(text_at(json, "finish") == "stop");
        CHECK(number_at(json, "ms") > 0);
        CHECK(!contains(line, "xyzzy"));
        found++;
    }
    CHECK(found == 1);
}

namespace {

int times(std::string_view text, std::string_view part) {
    int n = 0;
    for (std::size_t at = 0; (at = text.find(part, at)) != text.npos; at += part.size()) n++;
    return n;
}
bool in_memory(const Server& s, const std::string& model) {
    const Json one = json_of(ask(s.port(), get("/api/v1/inference/models/" + model)).body);
    return at(one, "loaded")->boolean;
}
std::string asking(const std::string& model) { return R"(,"model":")" + model + "\""; }

}  // namespace

TEST_CASE(
    "server: several models: the one that was used longest ago makes room, each is read once") {
    if (no_binary()) return;
    const auto s = start(zoo(), {"--max-models", "2"});
    const auto answers = [&](const std::string& model) {
        const Json r =
            json_of(ask(s->port(), post("/v1/completions",
                                        R"({"prompt":"X","temperature":0)" + asking(model) + "}"))
                        .body);
        return text_at(r, "choices.0.text") == "YZ";
    };
    CHECK(in_memory(*s, kChain));  // the default is loaded at once
    std::vector<Connection> both;  // two ask for one that is not in memory
    for (int i = 0; i < 2; i++) {
        both.emplace_back(s->port(), 5 + i);
        both.back().send(chat(asking(kSlow)));
    }
    for (Connection& c : both) CHECK(c.receive(60'000).status == 200);
    CHECK(answers(kChain));  // the slow one is now the one used longest ago
    CHECK(answers("base/d9/100"));
    CHECK(soon([&] { return in_memory(*s, "base/d9/100"); }));
    CHECK(in_memory(*s, kChain));
    CHECK(!in_memory(*s, kSlow));
    CHECK(times(s->output(), "loaded " + kSlow) == 1);
    CHECK(answers(kSlow));
    CHECK(soon([&] { return !in_memory(*s, kChain); }));
    CHECK(times(s->output(), "loaded " + kSlow) == 2);
}

TEST_CASE("server: a checkpoint that was written anew is read anew, one that broke is told") {
    if (no_binary()) return;
    const test::TempDir base;
    test::make_checkpoint(base.path(), chain_model("chatsft_checkpoints", "d9", 1, 64));
    test::make_checkpoint(base.path(), chain_model("chatsft_checkpoints", "d2", 1, 64));
    const auto s = start(base.path());
    const auto answer = [&] {
        return text_at(json_of(ask(s->port(), chat(asking(kChain))).body),
                       "choices.0.message.content");
    };
    const auto look = [&] { ask(s->port(), get("/api/v1/inference/models?refresh=1")); };
    CHECK(answer() == kAnswerText);
    test::CheckpointSpec other = chain_model("chatsft_checkpoints", "d9", 1, 64);
    other.fill = [](std::string_view name, std::span<float> values) {  // says "s" and no more
        const auto row = [&](const char* piece) {
            return 64 * static_cast<std::size_t>(id_of(piece));
        };
        if (name == "transformer.wte.weight")
            values[row("<|assistant_start|>")] = values[row("s") + 1] = 1;
        if (name == "lm_head.weight") values[row("s")] = values[row("<|assistant_end|>") + 1] = 4;
    };
    test::make_checkpoint(base.path(), other);
    const fs::path file = base / "chatsft_checkpoints" / "d9" / "model_000100.pt";
    fs::last_write_time(file, fs::last_write_time(file) + std::chrono::seconds(2));
    look();
    CHECK(answer() == "s");
    test::write_file(file, "PK");
    look();
    const Response broken = ask(s->port(), chat(asking(kChain)));
    CHECK(broken.status == 409);
    CHECK(code_of(broken) == "model_not_ready");
    CHECK(ask(s->port(), chat(asking("sft/d2/100"))).status == 200);
}

TEST_CASE(
    "server: a conversation that is too long loses its oldest exchanges, and the answer says so") {
    if (no_binary()) return;
    const auto conversation = [](int from) {  // of 60 exchanges, of about 25 tokens each
        std::string body = R"({"temperature":0,"max_tokens":16,"messages":[)";
        for (int i = from; i < 60; i++)
            body += R"({"role":"user","content":"Question number )" + std::to_string(i) +
                    R"(?"},{"role":"assistant","content":"This is the answer to it, )" +
                    std::to_string(i) + R"( as you see."},)";
        return body + R"({"role":"user","content":"Hi"}]})";
    };
    const auto told = [&](int from) {
        return read_stream(ask(sample_port(), post("/chat/completions", conversation(from))).body);
    };
    const Stream all = told(0);
    REQUIRE(all.done);
    const auto dropped = static_cast<int>(number_at(json_of(all.data.back()), "dropped_messages"));
    CHECK(dropped > 0);
    CHECK(dropped % 2 == 0);
    const Stream rest = told(dropped / 2), more = told(dropped / 2 - 1);
    CHECK(at(json_of(rest.data.back()), "dropped_messages") == nullptr);   // all of it fits
    CHECK(number_at(json_of(more.data.back()), "dropped_messages") == 2);  // and no more would
    CHECK(rest.text == all.text);
    CHECK(number_at(json_of(rest.data.back()), "usage.prompt_tokens") ==
          number_at(json_of(all.data.back()), "usage.prompt_tokens"));
}

TEST_CASE("server: 1,024 connections, and the next one is told that there are no more") {
    if (no_binary()) return;
    rlimit files{};
    ::getrlimit(RLIMIT_NOFILE, &files);
    const rlimit more = {std::min<rlim_t>(files.rlim_max, 2'048), files.rlim_max};
    if (more.rlim_cur < 1'200 || ::setrlimit(RLIMIT_NOFILE, &more) != 0) {
        MESSAGE("skipped: no process may have so many descriptors here");
        return;
    }
    const auto s = start(zoo());
    std::vector<Connection> open;
    for (int i = 0; i < 1'024; i++) open.emplace_back(s->port(), 100 + i / 64);
    Connection last(s->port(), 120);
    CHECK(last.receive(10'000).status == 503);
    CHECK(last.ends());
    for (const std::size_t i : {std::size_t{0}, open.size() - 1}) {
        open[i].send(get("/health"));
        CHECK(open[i].receive().status == 200);
    }
    open.erase(open.begin() + 1'000, open.end());
    CHECK(soon([&] { return ask(s->port(), get("/health"), 120).status == 200; }));
    open.clear();
    ::setrlimit(RLIMIT_NOFILE, &files);
}

TEST_CASE("server: wrong usage and ports that cannot be had") {
    if (no_binary()) return;
    const auto exit_of = [](const std::string& flags) {
        Words all = {NANOGPT_BINARY, "serve"};
        for (std::string_view rest = flags; !rest.empty();) {
            const std::size_t end = std::min(rest.find(' '), rest.size());
            all.emplace_back(rest.substr(0, end));
            rest.remove_prefix(std::min(end + 1, rest.size()));
        }
        const pid_t child = ::fork();
        if (child == 0) {
            ::dup2(::open("/dev/null", O_RDWR), 0);
            ::dup2(0, 1);
            ::dup2(0, 2);
            ::alarm(30);
            ::setenv("CUDA_VISIBLE_DEVICES", "-1", 1);
            std::vector<char*> pointers;
            for (std::string& word : all) pointers.push_back(word.data());
            pointers.push_back(nullptr);
            ::execvp(pointers[0], pointers.data());
            ::_exit(127);
        }
        int status = 0;
        ::waitpid(child, &status, 0);
        return WIFSIGNALED(status) ? 128 + WTERMSIG(status) : WEXITSTATUS(status);
    };
    const std::string base = " --base-dir " + zoo().string();
    for (const char* flags : {"-p 70000",
                              "-p -1",
                              "-p x",
                              "-p 8000x",
                              "-n 2",
                              "-n 0",
                              "--slots 0",
                              "--slots x",
                              "--queue -1",
                              "--queue-timeout 0",
                              "--queue-timeout x",
                              "--request-timeout 0",
                              "--request-timeout 86401",
                              "--max-models 0",
                              "--drain-seconds -1",
                              "--drain-seconds x",
                              "--mem-reserve x",
                              "--host",
                              "--nothing",
                              "extra",
                              "--allow-origin nonsense"}) {
        CAPTURE(std::string(flags));
        CHECK(exit_of(flags + base) == 2);
    }
    const std::string keys = (logs() / "keys").string();
    CHECK(exit_of("-p 0 --api-key-file " + keys + base) == 3);
    for (const char* wrong : {"", "\n \n", "\xEF\xBB\xBFkey\n", "a\tkey\n"}) {
        test::write_file(keys, wrong);
        CHECK(exit_of("-p 0 --api-key-file " + keys + base) == 2);
    }
    CHECK(exit_of("-p " + std::to_string(port()) + base) == 7);
    CHECK(exit_of("--host 192.0.2.1 -p 0 --open" + base) == 7);
    CHECK(exit_of("--host no.such.host.invalid -p 0 --open" + base) == 7);
}

TEST_CASE("server: with no checkpoint it still serves, and says what is missing") {
    if (no_binary()) return;
    const test::TempDir empty;
    const auto s = start(empty.path());
    int score = 0;  // where memory runs out, it ends before what else runs on the machine
    std::ifstream("/proc/" + std::to_string(s->pid()) + "/oom_score_adj") >> score;
    CHECK(score >= 500);
    CHECK(ask(s->port(), get("/")).status == 200);
    CHECK(number_at(json_of(ask(s->port(), get("/api/v1/inference/models")).body), "count") == 0);
    CHECK(at(json_of(ask(s->port(), get("/v1/models")).body), "data")->array.empty());
    const Response r = ask(s->port(), chat());
    CHECK(r.status == 404);
    CHECK(code_of(r) == "model_not_found");
    CHECK(fault_of_error(r) == "");
    const auto says = [&](int status, const char* word) {
        const Response health = ask(s->port(), get("/health"));
        const Json json = json_of(health.body);
        return health.status == status && text_at(json, "status") == word &&
               at(json, "ready")->boolean == (status == 200);
    };
    CHECK(says(503, "degraded"));
    test::make_checkpoint(empty.path(), chain_model("chatsft_checkpoints", "d9", 1, 64));
    // one that comes is seen by who asks nothing else
    for (const auto begin = Clock::now(); http::ms_since(begin) < 20'000 && !says(200, "ok");)
        http::sleep_ms(50);
    CHECK(says(200, "ok"));
    CHECK(ask(s->port(), chat()).status == 200);
}

// ---- damaged models, memory ---------------------------------------------------------------------

TEST_CASE(
    "server: why these words: the ten likeliest of the softmax, and the one that was chosen") {
    if (no_binary()) return;
    const fs::path sample = test::sample_dir();
    const nanogpt::Tokenizer tokenizer =
        nanogpt::load_tokenizer(sample / "tokenizer" / "tokenizer.pkl");
    const auto model = nanogpt::load_model(sample / "chatsft_checkpoints" / "d4");
    const std::string body =
        R"({"messages":[{"role":"user","content":"Hi"},{"role":"assistant","content":"The sky"}],)"
        R"("position":1})";
    const Response r = ask(sample_port(), post("/api/v1/inference/why", body));
    CHECK(r.status == 200);
    const Json reply = json_of(r.body);
    // What the model had read when it chose the second token of the answer.
    std::vector<nanogpt::Token> read = {tokenizer.special("<|bos|>"),
                                        tokenizer.special("<|user_start|>")};
    for (const nanogpt::Token id : tokenizer.encode("Hi")) read.push_back(id);
    for (const char* mark : {"<|user_end|>", "<|assistant_start|>"})
        read.push_back(tokenizer.special(mark));
    const std::vector<nanogpt::Token> answer = tokenizer.encode("The sky");
    REQUIRE(answer.size() >= 2);
    read.push_back(answer[0]);
    nanogpt::KVCache cache(*model, 64);
    const std::span<const float> logits = nanogpt::forward(*model, cache, read);
    double sum = 0;
    for (const float x : logits) sum += std::exp(double{x});
    const auto probability = [&](double id) {
        return std::exp(double{logits[static_cast<std::size_t>(id)]}) / sum;
    };
    CHECK(number_at(reply, "chosen.id") == answer[1]);
    CHECK(std::abs(number_at(reply, "chosen.probability") - probability(answer[1])) < 1e-5);
    std::vector<float> sorted(logits.begin(), logits.end());
    std::sort(sorted.rbegin(), sorted.rend());
    REQUIRE(reply.find("candidates") != nullptr);
    CHECK(reply.find("candidates")->array.size() == 10);
    for (std::size_t i = 0; i < 10; i++) {
        const std::string at_i = "candidates." + std::to_string(i);
        const double id = number_at(reply, at_i + ".id");
        REQUIRE((id >= 0 && id < static_cast<double>(logits.size())));
        CHECK(std::abs(double{logits[static_cast<std::size_t>(id)]} - double{sorted[i]}) < 1e-3);
        CHECK(std::abs(number_at(reply, at_i + ".probability") - probability(id)) < 1e-5);
    }
}

TEST_CASE("server: a damaged model ends the answers that meet the damage, and no others") {
    if (no_binary()) return;
    const test::TempDir base;
    test::CheckpointSpec spec = chain_model("chatsft_checkpoints", "d1", 1, 64);
    spec.fill = [fill = spec.fill](std::string_view name, std::span<float> values) {
        fill(name, values);
        if (name == "transformer.wte.weight")
            values[static_cast<std::size_t>(id_of("b")) * 64] = std::nanf("");
    };
    test::make_checkpoint(base.path(), spec);
    test::make_checkpoint(base.path(), chain_model("base_checkpoints", "d9", 1, 64));
    const auto s = start(base.path(), {"--threads", "1"});
    const std::string damaged = R"(,"model":"sft/d1/100")";
    const std::string good = kAnswerText.substr(0, kAnswerText.find('c'));
    for (int round = 0; round < 2; round++) {  // again: nothing of it is kept
        Connection beside(s->port(), 7);       // in one batch with them
        beside.send(endless(800, R"(,"stream":true)", "sft/d1/100"));
        CHECK(beside.begins());
        for (const std::string& request :
             {chat(damaged + R"(,"stream":true)"), nanochat(damaged)}) {
            const Response r = ask(s->port(), request);
            const Stream cut = read_stream(r.body);
            INFO(r.body);
            CHECK(r.status == 200);
            CHECK(cut.text == good);
            CHECK(!cut.done);
            CHECK(r.closed);
            const Json last = json_of(cut.data.empty() ? "" : cut.data.back());
            CHECK(text_at(last, "error.type") == "server_error");
            CHECK(text_at(last, "error.code") == "internal");
            CHECK(contains(text_at(last, "detail"), "damaged"));
        }
        const Response whole = ask(s->port(), chat(damaged));
        CHECK(whole.status == 500);
        CHECK(code_of(whole) == "internal");
        CHECK(fault_of_error(whole) == "");
        CHECK(read_stream(beside.receive(60'000).body).text.size() == 800);
    }
    const std::string body = R"({"model":"base/d9/100","prompt":"X","temperature":0})";
    const Json other = json_of(ask(s->port(), post("/v1/completions", body)).body);
    CHECK(text_at(other, "choices.0.text") == "YZ");
    CHECK(idle(s->port()));
}

TEST_CASE("server: without the memory for a model it says how much is missing, and lives") {
    if (no_binary()) return;
    const auto s = start(zoo(), {"--mem-reserve", "1000000G"});
    for (const std::string& request : {chat(), nanochat()}) {
        const Response r = ask(s->port(), request);
        const Stream stream = read_stream(r.body);  // the route's head is sent while it waits
        const Json json = json_of(stream.data.empty() ? r.body : stream.data.back());
        INFO(r.body);
        CHECK(text_at(json, "error.code") == "out_of_memory");
        CHECK(contains(text_at(json, "detail"), "of memory"));
        CHECK(!stream.done);
    }
    CHECK(ask(s->port(), get("/")).status == 200);
    CHECK(ask(s->port(), get("/v1/models")).status == 200);
    s->signal(SIGTERM);
    CHECK(s->wait(60'000) == 0);
}

TEST_CASE("server: memory that others take: no new answers, no idle models, and at last an end") {
    if (no_binary()) return;
    // The server sees a file of ours as /proc/meminfo: a mount in a namespace of its own.
    const test::TempDir dir;
    const std::string info = (dir / "meminfo").string(), script = (dir / "serve").string();
    const auto available = [&](int mib) {  // in place and of one length: it is read at any time
        char line[64];
        std::snprintf(line, sizeof line, "MemAvailable: %12d kB\n", mib * 1024);
        const int fd = ::open(info.c_str(), O_WRONLY | O_CREAT | O_CLOEXEC, 0600);
        CHECK(::pwrite(fd, line, std::strlen(line), 0) == std::ssize(std::string_view(line)));
        ::close(fd);
    };
    available(4'096);
    const std::string mount =
        "exec unshare -r -m sh -c 'mount --bind \"$0\" /proc/meminfo && exec "
        "\"$@\"' '" +
        info + "' ";
    if (std::system((mount + "true 2>/dev/null").c_str()) != 0) {
        MESSAGE("skipped: this user may not mount in a namespace of its own");
        return;
    }
    test::write_file(script, "#!/bin/sh\n" + mount + NANOGPT_BINARY + " \"$@\"\n");
    fs::permissions(script, fs::perms::owner_all);
    const auto s = start(zoo(), {"--threads", "1", "--mem-reserve", "2G"}, script);
    const auto models = [&] {
        return at(json_of(ask(s->port(), get("/stats")).body), "models")->array.size();
    };
    Connection running(s->port(), 2);
    running.send(endless(1'500, R"(,"stream":true)"));
    CHECK(running.begins());
    available(1'500);  // below the reserve
    const Response other = ask(s->port(), chat(R"(,"model":"sft/d2/100")"));
    CHECK(other.status == 503);
    CHECK(code_of(other) == "out_of_memory");
    CHECK(other.has("retry-after"));
    INFO(other.body);
    for (const char* number : {"1.6 GB", "2.1 GB"}) CHECK(contains(other.body, number));
    CHECK(contains(running.receive(60'000).body, "[DONE]"));  // it has what it needs
    CHECK(models() == 1);
    available(900);  // below half of the reserve
    for (int i = 0; i < 1'000 && models() > 0; i++) http::sleep_ms(10);
    CHECK(models() == 0);
    CHECK(code_of(ask(s->port(), chat())) == "out_of_memory");
    available(4'096);
    CHECK(ask(s->port(), chat()).status == 200);
    available(0);  // below an eighth
    CHECK(s->wait(60'000) == 5);
    CHECK(contains(s->output(), "memory is used up"));
}

TEST_CASE("server: a GPU that fails ends every answer with an error, and the server with 1") {
    if (no_binary()) return;
#ifdef NANOGPT_TRAP
    const test::TempDir dir;
    const std::string script = (dir / "serve").string(), file = (dir / "now").string();
    const std::string trap =
        (dir / "trap.so").string();  // a name without spaces, as LD_PRELOAD is a list
    fs::create_symlink(NANOGPT_TRAP, trap);
    const char* const all = std::getenv("CUDA_VISIBLE_DEVICES");
    test::write_file(script, std::string("#!/bin/sh\nexec env CUDA_VISIBLE_DEVICES=") +
                                 (all == nullptr ? "0" : all) + " LD_PRELOAD='" + trap +
                                 "' NANOGPT_TRAP='" + file + "' " NANOGPT_BINARY " \"$@\"\n");
    fs::permissions(script, fs::perms::owner_all);
    auto spec = chain_model("chatsft_checkpoints", "d9", 1, 64);
    spec.fill = [chain = spec.fill](std::string_view name, std::span<float> values) {
        chain(name, values);
        if (name != "transformer.wte.weight" && name != "lm_head.weight") return;
        // without it most logits are zero, and the self-test has nothing to compare
        for (std::size_t i = 63; i < values.size(); i += 64) values[i] += 0.01f;
    };
    test::make_checkpoint(dir.path(), spec);
    const auto s = start(dir.path(), {"--slots", "3"}, script);
    const Json health = json_of(ask(s->port(), get("/health")).body);
    if (text_at(health, "device") != "cuda") {
        MESSAGE("skipped: no GPU can be used");
        return;
    }
    CHECK(ask(s->port(), chat()).status == 200);
    CHECK(contains(ask(s->port(), get("/stats")).body, "(sm_"));  // the model is on it
    std::vector<std::unique_ptr<Connection>> clients;
    for (int i = 0; i < 6; i++) {  // three are answered, three wait
        clients.push_back(std::make_unique<Connection>(s->port(), i + 1));
        clients[static_cast<std::size_t>(i)]->send(
            endless(3'900, i % 2 == 0 ? R"(,"stream":true)" : ""));
    }
    CHECK(busy(s->port()));
    test::write_file(file, "");
    int failed = 0;
    for (const auto& client : clients) {
        const Response r = client->receive(60'000);
        INFO(shown(r.body));
        CHECK(!contains(r.body, "[DONE]"));
        failed += contains(r.body, "device_lost");
        CHECK((r.status == 200 || r.status == 503));
    }
    CHECK(failed == 6);
    CHECK(s->wait(60'000) == 1);
    CHECK(contains(s->output(), "device failed: CUDA: "));
#else
    MESSAGE("skipped: built without CUDA");
#endif
}

// ---- bytes without sense ------------------------------------------------------------------------

TEST_CASE("server: random changes of good requests never hang or end the server") {
    if (no_binary()) return;
    const std::vector<std::string> all = good_requests();
    test::Random random(20260114);
    const int count = test::exhaustive() ? 1'000'000 : test::quick() ? 200 : 4'000;
    int answered = 0, ended = 0;
    for (int i = 0; i < count; i++) {
        std::string bytes = all[random.below(all.size())];
        for (std::size_t n = 1 + random.below(4); n > 0 && !bytes.empty(); n--) {
            const std::size_t where = random.below(bytes.size());
            const std::string& other = all[random.below(all.size())];
            const std::size_t from = random.below(other.size());
            switch (random.below(5)) {
                case 0:
                    bytes[where] = static_cast<char>(random.next());
                    break;
                case 1:
                    bytes.erase(where, random.below(20));
                    break;
                case 2:
                    bytes.insert(where, other, from, random.below(40));
                    break;
                case 3:
                    bytes.insert(where, bytes, where, random.below(30));
                    break;
                default:
                    bytes[where] = static_cast<char>(bytes[where] ^ (1 << random.below(8)));
            }
        }
        Connection c(port(), 50 + i % 8);
        c.send(bytes);
        c.half_close();  // so that nothing waits for more
        for (int k = 0; k < 64; k++) {
            const Response r = c.receive(10'000);
            if (r.closed || !r.broken.empty()) break;
            answered += r.status != 0;
        }
        ended += c.drains(10'000);
        if (ended == i + 1) continue;
        INFO(shown(bytes));
        CHECK(ended == i + 1);
        break;
    }
    CHECK(answered > count / 4);
    CHECK(ask(port(), chat()).status == 200);
    CHECK(idle(port()));
    tally("A8 HTTP", static_cast<std::size_t>(ended), static_cast<std::size_t>(count));
}

TEST_CASE("server: after all that both servers are well, and end with 0") {
    if (no_binary()) return;
    for (const bool sample : {false, true}) {
        if (!shared(sample)) continue;
        Server& s = *shared(sample);
        CHECK(!s.has_ended());
        CHECK(idle(s.port()));
        CHECK(ask(s.port(), chat(R"(,"max_tokens":1)")).status == 200);
        s.signal(SIGTERM);
        CHECK(s.wait(20'000) == 0);
        const std::string log = s.output();
        for (const char* sign :
             {"AddressSanitizer", "runtime error", "LeakSanitizer", "ThreadSanitizer", "terminate"})
            CHECK_MESSAGE(!contains(log, sign), log.substr(log.find(sign)));
        shared(sample).reset();
    }
    test::report_tallies();
}