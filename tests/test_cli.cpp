// The program as people and scripts use it: every case starts the binary and looks at its exit code, its
// stdout and its stderr; the conversation runs in a pseudo-terminal. Models: the bundled sample, and
// small ones written here. No case sees a GPU but those about it, so that answers are the same on
// every machine.
#include <doctest/doctest.h>

#include <fcntl.h>
#include <poll.h>
#include <pty.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <string>
#include <string_view>
#include <thread>
#include <utility>
#include <vector>

#include "helpers.hpp"
#include "nanogpt.hpp"

#ifndef NANOGPT_BINARY
#define NANOGPT_BINARY ""
#endif

namespace {

namespace fs = std::filesystem;
using nanogpt::Json;
using nanogpt::parse_json;
using test::contains;
using Words = std::vector<std::string>;

// ---- starting the program -----------------------------------------------------------------------

Words words(std::string_view text) {  // at blanks
    Words out;
    for (std::size_t end = 0; !text.empty(); text.remove_prefix(std::min(end + 1, text.size()))) {
        end = std::min(text.find(' '), text.size());
        if (end > 0) out.emplace_back(text.substr(0, end));
    }
    return out;
}
Words operator+(Words a, const Words& b) {
    a.insert(a.end(), b.begin(), b.end());
    return a;
}

struct Result {
    int code = -1;  // 128 + signal if it was ended by one
    std::string out, err;
};
int exit_code(int status) {
    return WIFSIGNALED(status) ? 128 + WTERMSIG(status) : WEXITSTATUS(status);
}

const fs::path& home() {  // an empty home directory: no nanochat there
    static const test::TempDir dir;
    return dir.path();
}

// What shows the GPUs to the program again.
Words gpu() {
    static const char* all = std::getenv("CUDA_VISIBLE_DEVICES");
    return {std::string("CUDA_VISIBLE_DEVICES=") + (all == nullptr ? "0" : all)};
}

// Replaces this process by the program. `env` holds "NAME=value".
[[noreturn]] void start(const Words& args, const Words& env) {
    for (const char* name : {"NANOCHAT_BASE_DIR", "NO_COLOR", "CLICOLOR_FORCE", "COLUMNS"})
        ::unsetenv(name);
    ::setenv("HOME", home().c_str(), 1);
    ::setenv("TERM", "xterm", 1);
    ::setenv("CUDA_VISIBLE_DEVICES", "-1", 1);
    for (const std::string& e : env) ::putenv(::strdup(e.c_str()));
    const char* runner = std::getenv("NANOGPT_RUNNER");
    Words all = words(runner == nullptr ? "" : runner) + Words{NANOGPT_BINARY} + args;
    std::vector<char*> pointers;
    for (std::string& word : all) pointers.push_back(word.data());
    pointers.push_back(nullptr);
    ::execvp(pointers[0], pointers.data());
    ::_exit(127);
}

Result run_as_is(const Words& args, std::string_view in = "", const Words& env = {}) {
    const test::TempDir dir;
    test::write_file(dir / "in", in);
    const pid_t child = ::fork();
    if (child == 0) {
        const std::string out = (dir / "out").string(), err = (dir / "err").string();
        ::dup2(::open((dir / "in").c_str(), O_RDONLY), 0);
        ::dup2(::open(out.c_str(), O_WRONLY | O_CREAT, 0600), 1);
        ::dup2(::open(err.c_str(), O_WRONLY | O_CREAT, 0600), 2);
        start(args, env);
    }
    int status = 0;
    ::waitpid(child, &status, 0);
    return {exit_code(status), test::read_file(dir / "out"), test::read_file(dir / "err")};
}
// Without the note of a program made for GPUs that none is there.
const std::string kOnCpu = "note: computing on the CPU: ";
std::string without_note(std::string err) {
    const std::size_t at = err.find(kOnCpu);
    if (at != std::string::npos) err.erase(at, err.find('\n', at) + 1 - at);
    return err;
}
Result run(const Words& args, std::string_view in = "", const Words& env = {}) {
    Result r = run_as_is(args, in, env);
    r.err = without_note(r.err);
    return r;
}
Result run(std::string_view args, std::string_view in = "", const Words& env = {}) {
    return run(words(args), in, env);
}

// The program in a pseudo-terminal of 80 columns.
class Screen {
public:
    explicit Screen(const Words& args, const Words& env = {}) {
        const winsize size = {24, 80, 0, 0};
        child_ = ::forkpty(&fd_, nullptr, nullptr, &size);
        if (child_ == 0) start(args, env);
    }
    Screen(const Screen&) = delete;
    Screen& operator=(const Screen&) = delete;
    ~Screen() {
        if (child_ > 0) ::kill(child_, SIGKILL), ::waitpid(child_, nullptr, 0);
        ::close(fd_);
    }
    void type(std::string_view keys) {
        if (::write(fd_, keys.data(), keys.size()) < 0) FAIL("the terminal is gone");
    }
    // Waits until the text appears behind what was waited for before.
    bool shows(std::string_view text) {
        const auto start = std::chrono::steady_clock::now();
        while (all_.find(text, seen_) == std::string::npos) {
            if (std::chrono::steady_clock::now() - start > std::chrono::seconds(60) || !read())
                return false;
        }
        seen_ = all_.find(text, seen_) + text.size();
        return true;
    }
    int wait() {  // exit code
        while (read()) {
        }
        int status = 0;
        ::waitpid(std::exchange(child_, -1), &status, 0);
        return exit_code(status);
    }
    const std::string& all() const { return all_; }

private:
    bool read() {
        pollfd wait = {fd_, POLLIN, 0};
        if (::poll(&wait, 1, 60'000) <= 0) return false;
        char bytes[4096];
        const ssize_t n = ::read(fd_, bytes, sizeof bytes);  // EIO: the other side is closed
        if (n > 0) all_.append(bytes, static_cast<std::size_t>(n));
        return n > 0;
    }
    int fd_ = -1;
    pid_t child_ = -1;
    std::string all_;
    std::size_t seen_ = 0;
};

bool no_binary() { return test::no_binary(NANOGPT_BINARY); }

Words sample() { return {"--base-dir", test::sample_dir().string()}; }
const std::string kHello = "Hello! How can I help you today?\n";

std::size_t lines_of(std::string_view text) {
    return static_cast<std::size_t>(std::count(text.begin(), text.end(), '\n'));
}
Words split_lines(std::string_view text) {
    Words out;
    for (; !text.empty(); text.remove_prefix(out.back().size() + 1))
        out.emplace_back(text.substr(0, text.find('\n')));
    return out;
}
bool is_one_error(std::string_view err) {
    return err.starts_with("nanogpt: ") && lines_of(err) == 1 && err.ends_with('\n');
}
std::string text_of(const Json& json, std::string_view key) {
    const Json* value = json.find(key);
    return value == nullptr ? "(missing)" : value->string;
}
double number_of(const Json& json, std::string_view key) {
    const Json* value = json.find(key);
    return value == nullptr || value->kind != Json::Kind::number ? -1 : value->number;
}

// No byte that a terminal would obey: no C0 but line ends and tabs, no DEL, no C1, no bidi override.
bool is_clean(std::string_view text) {
    for (std::size_t i = 0; i < text.size(); i++) {
        const auto at = [&](std::size_t k) -> unsigned {
            return i + k < text.size() ? static_cast<unsigned char>(text[i + k]) : 0u;
        };
        if ((at(0) < 0x20 && at(0) != '\n' && at(0) != '\t' && at(0) != '\r') || at(0) == 0x7f)
            return false;
        if (at(0) == 0xc2 && at(1) >= 0x80 && at(1) < 0xa0) return false;
        const bool bidi = at(0) == 0xe2 && ((at(1) == 0x80 && at(2) >= 0xaa && at(2) <= 0xae) ||
                                            (at(1) == 0x81 && at(2) >= 0xa6 && at(2) <= 0xa9));
        if (bidi) return false;
    }
    return true;
}

struct Case {
    const char *args, *says;
};

}  // namespace

// ---- flags, errors, exit codes ------------------------------------------------------------------

TEST_CASE("cli: wrong usage is one line on stderr, nothing on stdout, exit 2") {
    if (no_binary()) return;
    const Case cases[] = {{"-k 5x", "\"5x\" is not a whole number"},
                          {"-k -1", "-k"},
                          {"-k 1.5", "-k"},
                          {"-k 99999999999", "-k"},
                          {"-k=5", "-k"},
                          {"-t nan", "\"nan\""},
                          {"-t inf", "\"inf\""},
                          {"-t 1e999", "\"1e999\""},
                          {"-t 1e-50", "\"1e-50\""},
                          {"-t -0.1", "-t"},
                          {"-t 0x1p3", "-t"},
                          {"--temperature=", "\"\""},
                          {"-s -1", "\"-1\""},
                          {"-s 1e3", "-s"},
                          {"-s 9999999999999", "-s"},
                          {"-m 0", "-m"},
                          {"-m 5.0", "-m"},
                          {"--top-p 0", "--top-p"},
                          {"--top-p 1.01", "--top-p"},
                          {"--seed -2", "--seed"},
                          {"--seed 9223372036854775808", "--seed"},
                          {"--threads 0", "--threads"},
                          {"--threads 2000", "--threads"},
                          {"-i foo", "one of base, mid, sft, rl"},
                          {"-d float16", "bfloat16, float32"},
                          {"--device-type tpu", "--device-type"},
                          {"--color sometimes", "auto, always, never"},
                          {"--softcap 0", "--softcap"},
                          {"--softcap abc", "--softcap"},
                          {"--gen g9", "--gen"},
                          {"--window-pattern SXL", "--window-pattern"},
                          {"--short-window 0", "--short-window"},
                          {"--rope-base -1", "--rope-base"},
                          {"--qk-scale 0", "--qk-scale"},
                          {"--seq-len 0", "--seq-len"},
                          {"--rope-table fp64", "--rope-table"},
                          {"-g", "is missing"},
                          {"--model", "is missing"},
                          {"--json=1", "takes no value"},
                          {"--stats=off", "takes no value"},
                          {"-q1", "takes no value"},
                          {"--tempreture 1", "did you mean --temperature?"},
                          {"--jsn", "did you mean --json?"},
                          {"--temp 1", "did you mean --temperature?"},
                          {"--zzzzzzzz", "unknown flag --zzzzzzzz."},
                          {"-z", "unknown flag -z"},
                          {"--num-samples 2", "sample"},
                          {"-p x extra", "unexpected argument"},
                          {"chat hello", "-p"},
                          {"chta", "did you mean chat?"},
                          {"model", "did you mean models?"},
                          {"frobnicate", "nanogpt help"},
                          {"help nothing", "unknown command"},
                          {"models -p x", "-p is no flag of models"},
                          {"models extra", "unexpected"},
                          {"models --type foo", "--type"},
                          {"models --type ,", "--type"},
                          {"models --sort size", "--sort"},
                          {"sample", "no prompt"},
                          {"sample -n 0 -p x", "-n"},
                          {"--device-type cuda -d float32 -p x", "bfloat16"},
                          {"models --device-type cuda -d float32", "bfloat16"},
                          {"bench --batch-sizes 0", "--batch-sizes"},
                          {"bench --batch-sizes 1,x", "\"x\" is not a whole number"},
                          {"bench --batch-sizes ,", "a list such as"},
                          {"bench --batch-sizes 5000", "from 1 to 4096"},
                          {"bench --decode-tokens 1", "--decode-tokens"},
                          {"bench --prompt-tokens 0", "--prompt-tokens"},
                          {"bench -p x", "-p is no flag of bench"},
                          {"bench x", "unexpected"},
                          {"chat --batch-sizes 1", "but of bench"},
                          {"doctor x", "unexpected"},
                          {"doctor -g d4", "no flag of doctor"},
                          {"doctr", "did you mean doctor?"},
                          {"logits", "--ids"},
                          {"logits --ids 1 --ids-file x", "--ids"},
                          {"check", "a file or a directory"},
                          {"show a b", "unexpected"},
                          {"--model sft -g d4 -p x", "leave out"},
                          {"--model a/b/c/d -p x", "--model"},
                          {"--model sft/d4/x -p x", "--model"},
                          {"--stop", "is missing"}};
    std::size_t passed = 0;
    for (const Case& c : cases) {
        INFO(std::string(c.args));
        const Result r = run(c.args);
        CHECK(r.code == 2);
        CHECK(r.out == "");
        CHECK(is_one_error(r.err));
        CHECK(contains(r.err, c.says));
        passed += r.code == 2 && r.out.empty() && is_one_error(r.err) && contains(r.err, c.says);
    }
    test::report("E1 usage", passed, std::size(cases));
}

TEST_CASE("cli: empty texts and too many stop texts are wrong usage") {
    if (no_binary()) return;
    for (const char* flag : {"-k", "-t", "-s", "-m", "--seed", "-g", "--model", "--base-dir",
                             "--stop", "--tokenizer"}) {
        CAPTURE(std::string(flag));
        CHECK(run(Words{flag, "", "-p", "x"}).code == 2);
    }
    CHECK(run(Words{"-p", ""}).code == 2);
    Words nine = {"-p", "x"};
    for (int i = 0; i < 9; i++) nine = nine + Words{"--stop", "x"};
    CHECK(contains(run(nine).err, "--stop"));
    CHECK(run(Words{"-p", "x", "--stop", std::string(65, 'x')}).code == 2);
}

TEST_CASE("cli: what is not there is exit 3 and says what is") {
    if (no_binary()) return;
    const std::string base = test::sample_dir().string(), none = (home() / "none").string();
    const std::vector<std::pair<Words, std::string>> cases = {
        {words("-p x -g d99") + sample(), "sft/d99\": found sft/d4 (step 2600)"},
        {words("-p x -s 1") + sample(), "step"},
        {words("-p x -i rl") + sample(), "\"rl\": found sft/d4"},
        {words("-p x --model sft/d4/1") + sample(), "sft/d4/1"},
        {words("-p x --model d99") + sample(), "d99"},
        {words("-p x --model d4_step1") + sample(), "found sft/d4"},
        {words("-p x -i base"), "\"base\""},
        {words("-p x -g d4"), "no directory"},
        {words("-p x -s 5"), "no directory"},
        {words("-p x --model sft"), "no directory"},
        {words("-p x --base-dir " + none), "~/none"},
        {words("-p x --model ./nowhere/model_000001.pt"), "nowhere"},
        {words("models --base-dir " + none), "--base-dir"},
        {words("models"), "chatsft_checkpoints"},
        {words("models --base-dir " + home().string()), "no checkpoint in"},
        {words("models --type rl") + sample(), "rl"},
        {words("show"), "no directory"},
        {words("tokenize x"), "no directory"},
        {words("tokenize x --tokenizer " + none), "none"},
        {words("logits --ids-file " + none) + sample(), "none"},
        {words("-p x --tokenizer " + none) + sample(), "none"}};
    for (const auto& [args, says] : cases) {
        const Result r = run(args);
        INFO(r.err);
        CHECK(r.code == 3);
        CHECK(r.out == "");
        CHECK(contains(r.err, says));
    }
}

TEST_CASE("cli: a device that is not there is exit 6") {
    if (no_binary()) return;
    const Result mps = run("-p x --device-type mps");
    CHECK(mps.code == 6);
    CHECK(contains(mps.err, "Apple"));
    const Result cpu = run_as_is(words("-p Hello -t 0 --device-type cpu") + sample());
    CHECK(cpu.out == kHello);
    CHECK(cpu.err == "");
    for (const char* args :
         {"-p Hello --device-type cuda", "models --device-type cuda", "bench --device-type cuda",
          "logits --ids 1 --device-type cuda", "-p Hello --device-type cuda -d bfloat16"}) {
        CAPTURE(std::string(args));
        const Result r = run_as_is(words(args) + sample());
        CHECK(r.code == 6);
        CHECK(r.out == "");
        CHECK(is_one_error(r.err));
        CHECK(contains(r.err, "--device-type cuda: "));
        CHECK(contains(r.err, "--device-type cpu"));
    }
}

TEST_CASE("cli: without a GPU the CPU answers, and the reason can be seen") {
    if (no_binary()) return;
    const Json* cuda = nullptr;
    const Json version = parse_json(run("version --json").out);
    REQUIRE((cuda = version.find("cuda")) != nullptr);
    const bool made_for_gpus = cuda->kind != Json::Kind::null;
    const Result r = run_as_is(words("-p Hello -t 0") + sample());
    CHECK(r.out == kHello);
    CHECK(r.err.starts_with(made_for_gpus ? kOnCpu : ""));
    CHECK(lines_of(r.err) == (made_for_gpus ? 1 : 0));
    CHECK(run_as_is(words("-q -p Hello -t 0") + sample()).err == "");
    CHECK(contains(run_as_is(words("-v -p Hello -t 0") + sample()).err, kOnCpu));
    const Result turns = run_as_is(words("-t 0") + sample(), "/model sft/d4\nHello\n");
    CHECK(turns.out == kHello);
    CHECK(lines_of(turns.err) == (made_for_gpus ? 1 : 0));  // said once, though opened twice
    const auto device = [](const std::string& flags) {
        return *parse_json(run(words("models --json " + flags) + sample()).out).find("device");
    };
    CHECK(text_of(device(""), "type") == "cpu");
    CHECK(text_of(device(""), "dtype") == "float32");
    CHECK(text_of(device(""), "fallback_reason").size() > 10);
    CHECK(text_of(device("-d bfloat16"), "dtype") == "bfloat16");
    CHECK(device("--device-type cpu").find("fallback_reason")->kind == Json::Kind::null);
    for (const char* dtype : {"float32", "bfloat16"}) {
        const Words flags = words("-p Hello -t 0 --json -d") + Words{dtype};
        const Json json = parse_json(run(flags + sample()).out);
        CHECK(text_of(json, "dtype") == dtype);
        CHECK(text_of(json, "device").starts_with("CPU ("));
    }
}

TEST_CASE("cli: help and version go to stdout with exit 0") {
    if (no_binary()) return;
    for (const char* args : {"help", "--help", "-h", "help chat", "chat --help", "models -h",
                             "version", "--version", "-p x --help", "list --help", ""}) {
        CAPTURE(std::string(args));
        const Result r = run(args);
        CHECK(r.code == 0);
        CHECK(r.err == "");
        CHECK(r.out.starts_with("nanogpt "));
    }
    const std::string all = run("help").out;
    for (const char* command : {"chat", "sample", "models", "show", "tokenize", "detokenize",
                                "logits", "bench", "check", "doctor", "help", "version", "serve"}) {
        CAPTURE(std::string(command));
        CHECK(contains(all, std::string("nanogpt ") + command));
        CHECK(run(Words{"help", command}).out.starts_with(std::string("nanogpt ") + command));
    }
    CHECK(contains(run("").out, "0 checkpoints"));
    const std::string chat = run("help chat").out;
    for (const char* flag : {"-i, --source", "-g, --model-tag", "-s, --step", "-p, --prompt",
                             "-t, --temperature", "-k, --top-k", "-m, --max-tokens"}) {
        CAPTURE(std::string(flag));
        CHECK(contains(chat, flag));
    }
    CHECK(!contains(chat, "--num-samples"));
    for (const std::string& line : split_lines(run("help chat", "", {"COLUMNS=50"}).out))
        CHECK(line.size() <= 60);
}

// ---- one answer ---------------------------------------------------------------------------------

TEST_CASE("cli: without a nanochat directory the bundled model answers, and stderr says so") {
    if (no_binary()) return;
    const Result r = run("-i sft -p Hello -t 0");
    CHECK(r.code == 0);
    CHECK(r.out == kHello);
    CHECK(lines_of(r.err) == 1);
    CHECK(contains(r.err, "sample model"));
    const Result env = run("-p Hello -t 0", "", {"NANOCHAT_BASE_DIR=" + home().string()});
    CHECK(env.out == kHello);
    const Result completion = run("sample -p Hello -t 0 -m 4 -q");
    CHECK(completion.code == 0);
    CHECK(lines_of(completion.out) >= 1);
}

TEST_CASE("cli: every spelling of the flags gives the same answer") {
    if (no_binary()) return;
    for (const char* args : {"-p Hello -t 0",
                             "-pHello -t0",
                             "--prompt=Hello --temperature=0",
                             "chat --prompt Hello --temperature 0",
                             "-t 1 -t 0 -p bye -p Hello",
                             "-p Hello -t 0 -i sft -g d4 -s 2600",
                             "-p Hello --model sft/d4/2600 -t 0",
                             "-p Hello --model sft/d4 -t 0",
                             "-p Hello --model sft -t 0",
                             "-p Hello --model d4 -t 0",
                             "-p Hello --model d4_step2600 -t 0",
                             "-p Hello --model default -t 0",
                             "-p Hello --model gpt-4o-mini -t 0",
                             "-p Hello -k 1 -t 1",
                             "-p Hello --top-p 0.0001",
                             "-p Hello -t 0 --threads 1",
                             "-p Hello -t 0 -d float32",
                             "-p Hello -t 0 --seed 7",
                             "-p Hello -t 0 --gen g4",
                             "-p Hello -t 0 --softcap 15",
                             "-p Hello -t 0 --window-pattern SSSL",
                             "-p Hello -t 0 --short-window 256",
                             "-p Hello -t 0 --rope-base 100000",
                             "-p Hello -t 0 --qk-scale 1.2",
                             "-p Hello -t 0 --seq-len 1024",
                             "-p Hello -t 0 --rope-table fp32",
                             "-p Hello -t 0 -v",
                             "-p Hello -t 0 --color always",
                             "-p - -t 0"}) {
        CAPTURE(std::string(args));
        const Result r = run(words(args) + sample(), "Hello\n");
        CHECK(r.code == 0);
        CHECK(r.out == kHello);
    }
    const Result quiet = run(words("-q -p Hello -t 0") + sample());
    CHECK(quiet.err == "");
    CHECK(contains(run(words("-v -p Hello -t 0") + sample()).err, "qk_scale 1.2 (implied)"));
    CHECK(contains(run(words("-v -p Hello -t 0 --softcap 20") + sample()).err,
                   "softcap 20 (overridden)"));
    const std::string model = (test::sample_dir() / "chatsft_checkpoints" / "d4").string();
    CHECK(run(Words{"-p", "Hello", "-t", "0", "--model", model}).out == kHello);
    CHECK(run(Words{"-p", "Hello", "-t", "0", "--model", model + "/model_002600.pt"}).out ==
          kHello);
    CHECK(run(words("-p Hello -t 0 -d bfloat16") + sample()).code == 0);
}

TEST_CASE("cli: the base directory is --base-dir, else NANOCHAT_BASE_DIR, else ~/.cache/nanochat") {
    if (no_binary()) return;
    const std::string base = test::sample_dir().string(), none = (home() / "none").string();
    CHECK(run("models", "", {"NANOCHAT_BASE_DIR=" + base}).code == 0);
    CHECK(run("models --base-dir " + base, "", {"NANOCHAT_BASE_DIR=" + none}).code == 0);
    CHECK(run("models --base-dir " + none, "", {"NANOCHAT_BASE_DIR=" + base}).code == 3);
    const test::TempDir other;
    fs::create_directories(other / ".cache");
    fs::create_directory_symlink(base, other / ".cache" / "nanochat");
    const Result r = run("models", "", {"HOME=" + other.path().string()});
    CHECK(r.code == 0);
    CHECK(contains(r.out, "in ~/.cache/nanochat"));
}

TEST_CASE("cli: --json is one object with text, usage, timings and seed") {
    if (no_binary()) return;
    const Result r = run(words("-p Hello -t 0 --json") + sample());
    CHECK(lines_of(r.out) == 1);
    const Json json = parse_json(r.out);
    CHECK(text_of(json, "model") == "sft/d4/2600");
    CHECK(text_of(json, "prompt") == "Hello");
    CHECK(text_of(json, "text") + "\n" == kHello);
    CHECK(text_of(json, "finish_reason") == "stop");
    CHECK(number_of(json, "seed") == 42);
    CHECK(text_of(json, "dtype") == "float32");
    REQUIRE(json.find("usage") != nullptr);
    CHECK(number_of(*json.find("usage"), "prompt_tokens") == 7);
    CHECK(number_of(*json.find("usage"), "completion_tokens") == 12);
    CHECK(number_of(*json.find("usage"), "total_tokens") == 19);
    REQUIRE(json.find("timings") != nullptr);
    for (const char* key : {"load_ms", "prefill_ms", "decode_ms", "ttft_ms", "tokens_per_second"})
        CHECK(number_of(*json.find("timings"), key) >= 0);
    const Json cut = parse_json(run(words("-p Hello -t 0 --json -m 3") + sample()).out);
    CHECK(text_of(cut, "finish_reason") == "length");
    CHECK(number_of(*cut.find("usage"), "completion_tokens") == 3);
    const Json random = parse_json(run(words("-p Hello --seed -1 --json -m 1") + sample()).out);
    CHECK(number_of(random, "seed") >= 0);
}

TEST_CASE("cli: --stream-json is one object per line, and the pieces joined are the text") {
    if (no_binary()) return;
    for (const Words& command : {Words{}, Words{"sample"}}) {
        const Result r = run(command + words("-p Hello -t 0 -m 9 --stream-json -q") + sample());
        std::string joined;
        const Words lines = split_lines(r.out);
        REQUIRE(lines.size() > 2);
        for (std::size_t i = 0; i + 1 < lines.size(); i++)
            joined += text_of(parse_json(lines[i]), "text");
        const Json last = parse_json(lines.back());
        CHECK(last.find("done") != nullptr);
        CHECK(text_of(last, "text") == joined);
    }
}

TEST_CASE("cli: with --json errors are JSON on stdout too, wherever the flag stands") {
    if (no_binary()) return;
    const std::vector<std::pair<std::string, int>> cases = {
        {"-k 5x --json", 2},
        {"--json -k 5x", 2},
        {"models --json --base-dir " + (home() / "none").string(), 3},
        {"-p x --json --device-type mps", 6},
        {"-p x --stream-json -g d99 --base-dir " + test::sample_dir().string(), 3},
        {"show nothing --json", 3}};
    for (const auto& c : cases) {
        CAPTURE(c.first);
        const Result r = run(c.first);
        CHECK(r.code == c.second);
        const Json json = parse_json(r.out);
        REQUIRE(json.find("error") != nullptr);
        for (const char* key : {"message", "type", "code"})
            CHECK(text_of(*json.find("error"), key).size() > 1);
        CHECK(is_one_error(r.err));
    }
}

TEST_CASE("cli: seed, stop texts and the system text do what they say") {
    if (no_binary()) return;
    const auto answer = [](const std::string& args) {
        return run(words("-p Tell -m 24 -t 1 -q " + args) + sample()).out;
    };
    CHECK(answer("--seed 1") == answer("--seed 1"));
    CHECK(answer("--seed 1") != answer("--seed 2"));
    CHECK(answer("") == answer("--seed 42"));
    CHECK(run(words("-p Hello -t 0 --stop help") + sample()).out == "Hello! How can I \n");
    CHECK(run(words("-p Hello -t 0 --stop zzz --stop How") + sample()).out == "Hello! \n");
    const Json with = parse_json(run(words("-p Hello -t 0 --json --system Be.") + sample()).out);
    CHECK(number_of(*with.find("usage"), "prompt_tokens") > 7);
}

TEST_CASE("cli: -p - reads stdin to its end, and broken UTF-8 is noted") {
    if (no_binary()) return;
    CHECK(text_of(parse_json(run(words("-p - --json -m 1") + sample(), "a\nb\n").out), "prompt") ==
          "a\nb");
    CHECK(run(words("-p -") + sample(), "").code == 2);
    const Result r = run(Words{"-p", "a\xff", "--json", "-m", "1"} + sample());
    CHECK(text_of(parse_json(r.out), "prompt") == "a\xef\xbf\xbd");
    CHECK(contains(r.err, "not valid UTF-8"));
    const std::string special = "<|assistant_end|>";
    CHECK(number_of(*parse_json(run(Words{"-p", special, "--json", "-m", "1"} + sample()).out)
                         .find("usage"),
                    "prompt_tokens") > 10);
    const Result longer = run(words("-p - -q") + sample(), std::string(20000, 'x'));
    CHECK(longer.code == 2);
    CHECK(contains(longer.err, "context"));
}

TEST_CASE("cli: lines of stdin are turns; quit, exit, clear and commands work there") {
    if (no_binary()) return;
    const auto chat = [](std::string_view lines) {
        return run(words("-t 0 -m 12") + sample(), lines);
    };
    CHECK(chat("Hello\n").out == kHello);
    CHECK(chat("Hello").out == kHello);
    CHECK(chat("\n  \nHello\n\n").out == kHello);
    CHECK(chat("Hello\nquit\nHello\n").out == kHello);
    CHECK(chat("EXIT\nHello\n").out == "");
    CHECK(chat("/bye\nHello\n").out == "");
    CHECK(chat("Hello\nclear\nHello\n").out == kHello + kHello);
    CHECK(chat("Hello\n/clear\nHello\n").out == kHello + kHello);
    CHECK(chat("Hello\r\n").out == kHello);
    const Result unknown = chat("/helo\nHello\n");
    CHECK(unknown.out == kHello);
    CHECK(contains(unknown.err, "unknown command /helo; did you mean /help?"));
    CHECK(unknown.code == 2);
    CHECK(lines_of(run(words("--json -t 0 -m 2") + sample(), "a\nb\n").out) == 2);
}

TEST_CASE("cli: slash commands show, set, save and load") {
    if (no_binary()) return;
    const test::TempDir dir;
    const std::string file = (dir / "chat.json").string();
    const auto err = [](const std::string& lines) {
        return run(words("-t 0 -m 12") + sample(), lines).err;
    };
    CHECK(contains(err("/help\n"), "/temperature [X]"));
    CHECK(contains(err("/?\n"), "/temperature [X]"));
    CHECK(contains(err("/temperature\n"), "temperature 0\n"));
    CHECK(contains(err("/temperature 0.5\n/temperature\n"), "temperature 0.5\n"));
    CHECK(contains(err("/temperature 1x\n"), "\"1x\" is not a number"));
    CHECK(contains(err("/topk 7\n/topk\n"), "topk 7\n"));
    CHECK(contains(err("/topp 0.9\n/topp\n"), "topp 0.9\n"));
    CHECK(contains(err("/max 9\n/max\n"), "max 9\n"));
    CHECK(contains(err("/seed 3\n/seed\n"), "seed 3\n"));
    CHECK(contains(err("/system Be brief\n/system\n"), "system Be brief\n"));
    CHECK(contains(err("/model\n"), "sft/d4/2600\n"));
    CHECK(contains(err("/model d99\n"), "no checkpoint"));
    CHECK(contains(err("/model sft/d4\n/model\n"), "sft/d4/2600\n"));
    CHECK(contains(err("/models\n"), "VAL LOSS"));
    CHECK(contains(err("/stats on\nHello\n"), "[12 tokens · "));
    CHECK(contains(err("/stats on\nHello\n"), "context 19/1024 · stop · seed 42]"));
    CHECK(contains(err("/stats maybe\n"), "one of on, off"));
    CHECK(contains(err("/tokens Hello\n"), "\"H\""));
    CHECK(contains(err("Hello\n/tokens\n"), "<|assistant_end|>"));
    CHECK(contains(err("Hello\n/context\n"), "of 1024 tokens"));
    CHECK(contains(err("/undo\n"), "empty"));
    CHECK(contains(err("Hello\n/undo\n/undo\n"), "empty"));
    CHECK(contains(err("Hello\n/edit\nHello\n"), "the last message was: Hello"));
    CHECK(contains(err("/regen\n"), "empty"));
    CHECK(contains(err("/stats on\nHello\n/regen\n"), "seed 43]"));
    CHECK(contains(err("/save\n"), "file name"));
    CHECK(contains(err("/load\n"), "file name"));
    CHECK(contains(err("/load " + file + "\n"), "No such file"));
    CHECK(contains(err("Hello\n/save " + file + "\n"), "saved"));
    const Json json = parse_json(test::read_file(file));
    REQUIRE(json.find("messages") != nullptr);
    CHECK(json.find("messages")->array.size() == 2);
    CHECK(text_of(json.find("messages")->array[1], "content") + "\n" == kHello);
    CHECK(contains(err("/load " + file + "\n/context\n"), "loaded 2 messages"));
    for (const char* bad : {"{}", "[", "{\"messages\":[{\"role\":\"user\",\"content\":1}]}",
                            "{\"messages\":[{\"role\":\"king\",\"content\":\"x\"}]}",
                            "{\"messages\":[{\"role\":\"assistant\",\"content\":\"x\"}]}"}) {
        test::write_file(file, bad);
        const Result r = run(words("-t 0") + sample(), "/load " + file + "\nHello\n");
        CHECK(contains(r.err, "nanogpt: "));
        CHECK(r.out == kHello);
    }
}

TEST_CASE("cli: blocks in triple quotes are one message, //text is /text") {
    if (no_binary()) return;
    const test::TempDir dir;
    const std::string file = (dir / "chat.json").string();
    run(words("-t 0 -m 2") + sample(),
        "\"\"\"one\ntwo\"\"\"\n//x y\n\"\"\"\nquit\n\"\"\"\n/save " + file + "\n");
    const Json json = parse_json(test::read_file(file));
    const auto& messages = json.find("messages")->array;
    REQUIRE(messages.size() == 6);
    CHECK(text_of(messages[0], "content") == "one\ntwo");
    CHECK(text_of(messages[2], "content") == "/x y");
    CHECK(contains(text_of(messages[4], "content"), "quit"));
}

TEST_CASE("cli: sample writes n continuations from one prompt") {
    if (no_binary()) return;
    const Result r = run(words("sample -i sft -p Once -m 24 -t 1.5 -n 3 --seed 5") + sample());
    CHECK(r.code == 0);
    CHECK(r.err == "");
    Words parts = split_lines(r.out);
    CHECK(std::count(parts.begin(), parts.end(), "-----") == 2);
    const Json json = parse_json(
        run(words("sample -i sft -p Once -m 24 -t 1.5 -n 3 --seed 5 --json") + sample()).out);
    REQUIRE(json.find("samples") != nullptr);
    REQUIRE(json.find("samples")->array.size() == 3);
    const std::string first = text_of(json.find("samples")->array[0], "text");
    CHECK(r.out.starts_with(first));
    CHECK(text_of(json.find("samples")->array[1], "text") != first);
    CHECK(text_of(
              parse_json(
                  run(words("sample -i sft -p Once -m 24 -t 1.5 --seed 5 --json") + sample()).out),
              "text") == first);
    const Result fallback = run(words("sample -p Once -m 2") + sample());
    CHECK(contains(fallback.err, "no base checkpoint, using sft/d4/2600"));
    CHECK(run(Words{"sample", "-p", "", "-m", "2", "-q"} + sample()).code == 0);
    CHECK(run(words("sample -p - -q") + sample(), std::string(20000, 'x')).code == 2);
}

TEST_CASE("cli: whoever closes the pipe ends the program quietly") {
    if (no_binary()) return;
    const std::string binary = NANOGPT_BINARY;
    const test::TempDir dir;
    const std::string err = (dir / "err").string();
    int ends[2];
    REQUIRE(::pipe(ends) == 0);
    const pid_t child = ::fork();
    if (child == 0) {
        ::dup2(ends[1], 1);
        ::close(ends[0]), ::close(ends[1]);
        ::dup2(::open(err.c_str(), O_WRONLY | O_CREAT, 0600), 2);
        start(words("sample -i sft -p Once -m 50 -n 100 -t 1") + sample(), {});
    }
    ::close(ends[1]);
    char byte = 0;
    CHECK(::read(ends[0], &byte, 1) == 1);
    ::close(ends[0]);
    int status = 0;
    ::waitpid(child, &status, 0);
    CHECK(exit_code(status) == 128 + SIGPIPE);
    CHECK(without_note(test::read_file(err)) == "");
}

TEST_CASE("cli: a full disk is an error, not silence") {
    if (no_binary() || ::access("/dev/full", W_OK) != 0) return;
    const pid_t child = ::fork();
    if (child == 0) {
        ::dup2(::open("/dev/full", O_WRONLY), 1);
        ::dup2(::open("/dev/null", O_WRONLY), 2);
        start(words("-p Hello") + sample(), {});
    }
    int status = 0;
    ::waitpid(child, &status, 0);
    CHECK(exit_code(status) == 1);
}

TEST_CASE("cli: SIGTERM ends with 143, SIGINT with 130") {
    if (no_binary()) return;
    for (const int signal : {SIGTERM, SIGINT}) {
        int ends[2];
        REQUIRE(::pipe(ends) == 0);
        const pid_t child = ::fork();
        if (child == 0) {
            ::dup2(ends[1], 1);
            ::dup2(::open("/dev/null", O_WRONLY), 2);
            start(words("sample -i sft -p Once -m 500 -n 10000 -t 1") + sample(), {});
        }
        ::close(ends[1]);
        char byte = 0;
        CHECK(::read(ends[0], &byte, 1) == 1);
        ::kill(child, signal);
        char rest[4096];
        while (::read(ends[0], rest, sizeof rest) > 0) {
        }
        ::close(ends[0]);
        int status = 0;
        ::waitpid(child, &status, 0);
        CHECK(exit_code(status) == 128 + signal);
    }
}

// ---- the small commands -------------------------------------------------------------------------

namespace {

// A base directory with several small checkpoints.
struct Zoo {
    test::TempDir dir;
    Zoo() {
        add("chatsft_checkpoints", "d2", 500);
        add("chatsft_checkpoints", "d2", 1000);
        add("chatsft_checkpoints", "d10", 300);
        add("chatsft_checkpoints", "d10", 1000);
        add("chatsft_checkpoints", "wild", 9000);
        add("base_checkpoints", "d2", 1000);
        add("base_checkpoints", "d20", 40);
        fs::remove(file("base_checkpoints", "d20", "meta", 40, ".json"));  // incomplete
        add("mid_checkpoints", "d2", 7);
        const fs::path model = file("mid_checkpoints", "d2", "model", 7, ".pt");
        fs::resize_file(model, fs::file_size(model) / 2);  // cut off
        add("chatrl_checkpoints", "d2", 8);
        test::write_file(file("chatrl_checkpoints", "d2", "model", 8, ".pt"), "this is no zip");
    }
    fs::path file(const char* folder, const char* tag, const char* kind, int step,
                  const char* ending) const {
        return dir / folder / tag / test::step_name(kind, step, ending);
    }
    void add(const char* folder, const char* tag, int step) {
        test::CheckpointSpec spec;
        spec.directory = folder;
        spec.tag = tag;
        spec.step = step;
        test::make_checkpoint(dir.path(), spec);
    }
    Words base() const { return {"--base-dir", dir.path().string()}; }
};
const Zoo& zoo() {
    static const Zoo made;
    return made;
}
std::string chosen(const std::string& flags) {  // the id of the model that a command takes
    const Result r = run(words("show --json " + flags) + zoo().base());
    const Json json = parse_json(r.out);
    return json.find("error") ? "error " + std::to_string(r.code) : text_of(json, "id");
}

}  // namespace

TEST_CASE("cli: the default is the largest d-number's last step, as nanochat chooses") {
    if (no_binary()) return;
    const std::vector<std::pair<std::string, std::string>> cases = {
        {"", "sft/d10/1000"},
        {"-i sft", "sft/d10/1000"},
        {"-g d2", "sft/d2/1000"},
        {"-g d2 -s 500", "sft/d2/500"},
        {"-s 300", "sft/d10/300"},
        {"-i base", "base/d2/1000"},
        {"--model d10", "sft/d10/1000"},
        {"--model base/d2", "base/d2/1000"},
        {"--model wild", "sft/wild/9000"},
        {"-s 9000", "sft/wild/9000"},
        {"--model d2_step500", "sft/d2/500"},
        {"--model nanochat", "sft/d10/1000"},
        {"sft/d2/500", "sft/d2/500"},
        {"d2_step1000", "error 2"},
        {"-i base -g d20", "error 4"},
        {"-i mid", "error 4"},
        {"-i rl", "error 4"},
        {"--model base/d20/40", "error 4"},
        {"-g d3", "error 3"},
        {"-i base -g d10", "error 3"},
        {"--model ../d2", "error 3"},
        {"--model sft/..", "error 3"}};
    for (const auto& c : cases) {
        CAPTURE(c.first);
        CHECK(chosen(c.first) == c.second);
    }
    CHECK(contains(run(words("show -i base -g d20") + zoo().base()).err, "still being written"));
    CHECK(contains(run(words("-p x -g d9") + zoo().base()).err, "sft/d2 (steps 500, 1000)"));
}

TEST_CASE("cli: models lists everything in the width there is") {
    if (no_binary()) return;
    const Result r = run(words("models") + zoo().base(), "", {"COLUMNS=140"});
    CHECK(r.code == 0);
    CHECK(r.err == "");
    const Words lines = split_lines(r.out);
    CHECK(lines[0].starts_with("TYPE  MODEL"));
    CHECK(contains(lines[1], "SFT   d10"));
    CHECK(contains(lines[1], "ready *"));
    CHECK(contains(lines[1], "1.250 bits/byte"));
    CHECK(contains(lines[1], "2 layers, 64 wide, 4 heads (2 kv), ctx 64"));
    CHECK(contains(r.out, "incomplete: still being written"));
    CHECK(contains(r.out,
                   "8 checkpoints"));  // the ninth is refused
    CHECK(contains(r.out, "refused: --all"));
    CHECK(contains(run(words("models --all") + zoo().base(), "", {"COLUMNS=140"}).out, "RL"));
    for (const char* command : {"list", "ls"})
        CHECK(run(Words{command} + zoo().base(), "", {"COLUMNS=140"}).out == r.out);
    for (const char* width : {"40", "60", "80", "100", "120"}) {
        CAPTURE(std::string(width));
        for (const std::string& line : split_lines(
                 run(words("models --all") + zoo().base(), "", {std::string("COLUMNS=") + width})
                     .out)) {
            const bool footer = contains(line, "checkpoints in");
            std::size_t columns = 0;
            for (const char c : line) columns += (static_cast<unsigned char>(c) & 0xc0) != 0x80;
            CHECK((footer || columns <= std::stoul(width)));
        }
    }
    const auto order = [](const std::string& flags) {
        std::string ids;
        const Json json =
            parse_json(run(words("models --json --type sft " + flags) + zoo().base()).out);
        for (const Json& m : json.find("models")->array)
            ids += text_of(m, "tag") + "." + m.find("step")->string + " ";
        return ids;
    };
    CHECK(order("") == "d10.1000 d10.300 d2.1000 d2.500 wild.9000 ");
    CHECK(order("--sort step").starts_with("wild.9000 "));
    CHECK(order("--sort name").starts_with("d10."));
    CHECK(order("--sort loss").size() == order("").size());
    CHECK(order("--sort date").size() == order("").size());
}

TEST_CASE("cli: models --json is the list of the HTTP interface") {
    if (no_binary()) return;
    const Result r = run(words("models --json") + zoo().base());
    const Json json = parse_json(r.out);
    CHECK(number_of(json, "count") == 9);
    CHECK(text_of(json, "default") == "sft/d10/1000");
    CHECK(text_of(*json.find("tokenizer"), "status") == "ready");
    CHECK(number_of(*json.find("tokenizer"), "vocab_size") == 512);
    CHECK(text_of(*json.find("device"), "type") == "cpu");
    REQUIRE(json.find("models")->array.size() == 9);
    const Json& first = json.find("models")->array[0];
    for (const char* key :
         {"id",         "name",         "type",    "source",   "tag",          "step",
          "val_loss",   "val_bpb",      "loss",    "metrics",  "architecture", "parameters",
          "size_bytes", "memory_bytes", "file",    "modified", "status",       "reason",
          "loaded",     "can_chat",     "default", "best"}) {
        CAPTURE(std::string(key));
        CHECK(first.find(key) != nullptr);
    }
    CHECK(text_of(first, "name") == "d10_step1000");
    CHECK(text_of(first, "type") == "SFT");
    CHECK(text_of(first, "file") == "chatsft_checkpoints/d10/model_001000.pt");
    CHECK(number_of(*first.find("loss"), "value") == 1.25);
    CHECK(text_of(*first.find("loss"), "unit") == "bits/byte");
    CHECK(number_of(*first.find("architecture"), "head_dim") == 16);
    CHECK(first.find("default")->boolean);
    for (const auto& [dtype, bytes] : {std::pair("float32", 4), std::pair("bfloat16", 2)}) {
        const Json typed =
            parse_json(run(words(std::string("models --json -d ") + dtype) + zoo().base()).out);
        const Json& same = typed.find("models")->array[0];
        CHECK(number_of(same, "memory_bytes") == bytes * number_of(same, "parameters"));
    }
    const Json& broken = json.find("models")->array.back();
    CHECK(broken.find("status")->string == "ready");  // base/d2; base/d20 stands before it
    CHECK(text_of(json.find("models")->array[7], "status") == "incomplete");
    CHECK(json.find("models")->array[7].find("architecture")->kind == Json::Kind::null);
}

TEST_CASE("cli: the best checkpoint of a family is one that can be run") {
    if (no_binary()) return;
    const test::TempDir dir;
    test::CheckpointSpec spec;
    spec.directory = "chatsft_checkpoints";
    const fs::path folder = dir / spec.directory / spec.tag;
    const char* const losses[] = {"", "1.25", "1.0", "0.5"};
    for (spec.step = 1; spec.step <= 3; ++spec.step) {
        test::make_checkpoint(dir.path(), spec);
        test::Shape shape = spec.shape;
        if (spec.step == 3) shape.n_layer *= 2;  // more than the file has
        test::write_meta(folder / test::step_name("meta", spec.step, ".json"), spec.gen, shape,
                         spec.step, "\"val_bpb\": " + std::string(losses[spec.step]) + ",");
    }
    const Result r = run({"models", "--json", "--base-dir", dir.path().string()});
    const Json json = parse_json(r.out);
    REQUIRE(json.find("models")->array.size() == 3);
    for (const Json& model : json.find("models")->array) {
        CHECK((text_of(model, "status") == "ready") == (number_of(model, "step") != 3));
        CHECK(number_of(model, "val_bpb") ==
              std::stod(losses[static_cast<int>(number_of(model, "step"))]));
        CHECK(model.find("best")->boolean == (number_of(model, "step") == 2));
    }
}

TEST_CASE("cli: show tells settings with their origin, tensors and sizes") {
    if (no_binary()) return;
    const Result r = run(words("show") + sample());
    CHECK(r.code == 0);
    for (const char* text : {"sft/d4/2600", "7,340,114", "transformer.wte.weight", "(4096, 256)",
                             "bfloat16", "softcap", "implied", "stored", "window_pattern"}) {
        CAPTURE(std::string(text));
        CHECK(contains(r.out, text));
    }
    CHECK(contains(run(words("show --softcap 20") + sample()).out, "overridden"));
    const Json json = parse_json(run(words("show d4 --json") + sample()).out);
    CHECK(json.find("tensors")->array.size() == 35);
    CHECK(json.find("settings")->array.size() >= 7);
    CHECK(run(words("show sft --model sft") + sample()).code == 2);
}

TEST_CASE("cli: tokenize and detokenize are each other's reverse") {
    if (no_binary()) return;
    const std::string text = "Hello <|bos|> 12*7 h\xc3\xa9 \xf0\x9f\x91\x8b";
    const Json json = parse_json(run(Words{"tokenize", "--json", text} + sample()).out);
    std::string ids;
    for (const Json& id : json.find("ids")->array) ids += id.string + ",";
    CHECK(number_of(json, "count") == double(json.find("tokens")->array.size()));
    CHECK(json.find("tokens")->array[0].find("bytes")->array[0].number == 'H');
    CHECK(run(Words{"detokenize", ids} + sample()).out == text + "\n");
    CHECK(run(words("detokenize") + sample(), ids).out == text + "\n");
    CHECK(text_of(parse_json(run(Words{"detokenize", "--json", ids} + sample()).out), "text") ==
          text);
    CHECK(run(words("tokenize --json") + sample(), "Hello").out ==
          run(words("tokenize --json Hello") + sample()).out);
    CHECK(contains(run(words("tokenize Hi") + sample()).out, "\"H\"    48"));
    CHECK(run(words("detokenize 240") + sample()).out == "\xef\xbf\xbd\n");
    for (const char* bad : {"detokenize 4096", "detokenize -- -1", "detokenize 1.5", "detokenize x",
                            "tokenize a b"}) {
        CAPTURE(std::string(bad));
        CHECK(run(words(bad), "", {"NANOCHAT_BASE_DIR=" + test::sample_dir().string()}).code == 2);
    }
}

TEST_CASE("cli: logits are (T, V) float32 and agree with their argmax") {
    if (no_binary()) return;
    const test::TempDir dir;
    const std::string file = (dir / "logits.f32").string(), list = (dir / "ids.json").string();
    test::write_file(list, "[4087, 4088, 72, 501, 111, 4089, 4090]\n");
    for (const auto& [bad, code] :
         {std::pair("[1, 23", 4), {"5", 2}, {"[1, \"2\"]", 2}, {"1,2", 4}}) {
        CAPTURE(std::string(bad));
        const test::TempDir other;
        test::write_file(other / "bad.json", bad);
        CHECK(run(Words{"logits", "--ids-file", other / "bad.json"} + sample()).code == code);
    }
    const Result r = run(Words{"logits", "--json", "--ids-file", list, "--out", file} + sample());
    CHECK(r.code == 0);
    const Json json = parse_json(r.out);
    CHECK(json.find("shape")->array[0].number == 7);
    CHECK(json.find("shape")->array[1].number == 4096);
    const std::string bytes = test::read_file(file);
    REQUIRE(bytes.size() == 7 * 4096 * 4);
    std::vector<float> values(7 * 4096);
    std::memcpy(values.data(), bytes.data(), bytes.size());
    for (std::size_t t = 0; t < 7; t++) {
        const auto row = std::span(values).subspan(t * 4096, 4096);
        CHECK(test::argmax(row) == int(json.find("argmax")->array[t].number));
        CHECK(std::abs(row[0]) < 15.0f);
    }
    CHECK(json.find("argmax")->array[6].number == 72);  // "H" of "Hello!"
    CHECK(fs::exists(dir / "logits.f32"));
    CHECK(std::distance(fs::directory_iterator(dir.path()), {}) == 2);  // no temporary file is left
    const Result text = run(words("logits --ids 4087,4088") + sample());
    CHECK(lines_of(text.out) == 3);
    CHECK(run(words("logits --ids 4087 --out /dev/null") + sample()).code == 0);
    CHECK(fs::is_character_file("/dev/null"));
    for (const char* bad : {"--ids 4096", "--ids -1", "--ids 1,x", "--ids ,", "--ids 1.0"}) {
        CAPTURE(std::string(bad));
        CHECK(run(words(std::string("logits ") + bad) + sample()).code == 2);
    }
    CHECK(run(Words{"logits", "--ids", "1", "--out", (dir / "no" / "where").string()} + sample())
              .code == 1);
    CHECK(run(words("logits --ids 1 --softcap 20 --json") + sample()).code == 0);
}

namespace {

// The status of one line of the doctor.
std::string status_of(const Json& json, std::string_view name) {
    for (const Json& check : json.find("checks")->array) {
        if (text_of(check, "name") == name) return text_of(check, "status");
    }
    return "(missing)";
}
Json doctor(const Words& args, int code, const Words& env = {}) {
    const Result r = run(words("doctor --json") + args, "", env);
    CHECK(r.code == code);
    CHECK(lines_of(r.out) == 1);
    Json json = parse_json(r.out);
    CHECK(json.find("ok")->boolean == (code == 0));
    for (const Json& check : json.find("checks")->array)
        CHECK(text_of(check, "message").size() > 3);
    return json;
}
bool no_gpu() {
    const Json json = parse_json(run(words("models --json") + sample(), "", gpu()).out);
    const bool none = text_of(*json.find("device"), "type") != "cuda";
    if (none) MESSAGE("skipped: no GPU, or the program is not made for it");
    return none;
}
const char* const kBenchKeys[] = {"source",
                                  "step",
                                  "model_config",
                                  "gpu",
                                  "device",
                                  "peak_bandwidth_bytes_per_sec",
                                  "read_bandwidth_bytes_per_sec",
                                  "total_vram_bytes",
                                  "num_params",
                                  "param_dtypes",
                                  "weight_bytes",
                                  "kv_bytes_per_token",
                                  "kv_read_bytes_per_step",
                                  "bytes_per_step",
                                  "context_mid",
                                  "peak_flops_per_sec",
                                  "decode_flops_per_token",
                                  "ceiling_bs1_tok_per_sec",
                                  "max_full_context_rows",
                                  "prompt_tokens",
                                  "decode_tokens",
                                  "temperature",
                                  "sweep",
                                  "prefill"};

}  // namespace

TEST_CASE("cli: doctor looks at everything, and only what failed makes it exit 1") {
    if (no_binary()) return;
    const Json good = doctor(sample(), 0);
    for (const char* name : {"program", "cpu", "memory", "bandwidth", "base dir", "models",
                             "tokenizer", "self-test"}) {
        CAPTURE(std::string(name));
        const bool known = status_of(good, name) == "ok" || std::string(name) == "memory";
        CHECK(known);
    }
    CHECK(status_of(good, "cuda") != "FAIL");
    const Result text = run(words("doctor") + sample());
    CHECK(text.code == 0);
    CHECK(lines_of(text.out) == good.find("checks")->array.size());
    for (const std::string& line : split_lines(text.out)) {
        const bool marked = line.starts_with("ok    ") || line.starts_with("warn  ");
        CHECK(marked);
    }
    const Json nothing = doctor({}, 0);  // no directory: the sample model is looked at
    CHECK(status_of(nothing, "base dir") == "warn");
    CHECK(status_of(nothing, "models") == "warn");
    CHECK(status_of(nothing, "self-test") == "ok");
    const Json some = doctor(zoo().base(), 0);
    CHECK(status_of(some, "models") == "warn");  // those that are not ready
    CHECK(status_of(some, "self-test") == "ok");
    CHECK(status_of(doctor(words("--device-type cuda") + sample(), 1), "cuda") == "FAIL");
    CHECK(status_of(doctor(words("--device-type cpu") + sample(), 0), "self-test") == "ok");
    CHECK(run("doctor --device-type mps").code == 6);
    const test::TempDir dir;
    fs::create_directory_symlink(test::sample_dir() / "chatsft_checkpoints",
                                 dir / "chatsft_checkpoints");
    fs::create_directory(dir / "tokenizer");
    test::write_file(dir / "tokenizer" / "tokenizer.pkl", "this is no pickle");
    CHECK(status_of(doctor({"--base-dir", dir.path().string()}, 1), "tokenizer") == "FAIL");
}

TEST_CASE("cli: bench ends with one JSON object that has nanochat's fields") {
    if (no_binary()) return;
    const Words tiny = words("bench --prompt-tokens 16 --decode-tokens 4 --batch-sizes 1,3");
    const Result r = run(tiny + sample());
    CHECK(r.code == 0);
    CHECK(contains(r.err, "no base checkpoint, using sft/d4/2600"));
    const Words lines = split_lines(r.out);
    REQUIRE(lines.size() > 4);
    const Json json = parse_json(lines.back());
    for (const char* key : kBenchKeys) {
        CAPTURE(std::string(key));
        CHECK(json.find(key) != nullptr);
    }
    CHECK(json.find("gpu")->kind == Json::Kind::null);
    CHECK(number_of(json, "num_params") == 7340114);
    CHECK(number_of(json, "weight_bytes") == 2 * 7340114);
    CHECK(number_of(json, "prompt_tokens") == 16);
    CHECK(number_of(json, "context_mid") == 18);
    CHECK(number_of(json, "kv_bytes_per_token") == 2 * 4 * 2 * 128 * 4);
    CHECK(number_of(json, "kv_read_bytes_per_step") == 18 * 2 * 4 * 2 * 128 * 4);
    CHECK(number_of(json, "read_bandwidth_bytes_per_sec") > 1e6);
    CHECK(number_of(*json.find("prefill"), "time_sec") > 0);
    const auto& sweep = json.find("sweep")->array;
    REQUIRE(sweep.size() == 2);
    for (const char* key : {"ttft_sec", "tpot_sec", "tok_per_sec", "mbu_percent"})
        CHECK(number_of(sweep[1], key) > 0);
    CHECK(number_of(sweep[1], "batch_size") == 3);
    CHECK(number_of(sweep[1], "decode_steps") == 3);
    // bfloat16 matrices: 12 D^2 per layer, the output, the gates of values (2 layers) and smear
    const double weights = 2 * (4 * 12 * 256 * 256 + 4096 * 256 + 2 * 2 * 12 + 24);
    const double kv = number_of(json, "kv_read_bytes_per_step");
    CHECK(number_of(sweep[0], "bytes_per_step") == weights + kv);
    CHECK(number_of(sweep[1], "bytes_per_step") == weights + 3 * kv);
    CHECK(number_of(json, "decode_flops_per_token") == weights + 4 * 4 * 256 * 18);
    const Result cut = run(words("bench --prompt-tokens 5000 --decode-tokens 4 --batch-sizes 1 "
                                 "-t 0.8 --json -i sft") +
                           sample());
    CHECK(lines_of(cut.out) == 1);
    CHECK(number_of(parse_json(cut.out), "prompt_tokens") == 1020);
    CHECK(contains(cut.err, "cut to 1020 tokens"));
    CHECK(run(words("bench --decode-tokens 1024") + sample()).code == 2);
    CHECK(run(words("bench -g d99") + sample()).code == 3);
    CHECK(run(tiny + zoo().base()).code == 0);  // of random weights
}

TEST_CASE("cli: with a GPU the GPU answers, and --device-type cpu is as without") {
    if (no_binary() || no_gpu()) return;
    const Result r = run_as_is(words("-p Hello -t 0 --json") + sample(), "", gpu());
    CHECK(r.code == 0);
    CHECK(r.err == "");
    const Json json = parse_json(r.out);
    CHECK(!text_of(json, "device").starts_with("CPU"));
    CHECK(text_of(json, "dtype") == "bfloat16");
    CHECK(text_of(json, "text") + "\n" == kHello);
    CHECK(run_as_is(words("-p Hello -t 0 --device-type cuda") + sample(), "", gpu()).out == kHello);
    const Words cpu = words("-p Hello -t 0 --device-type cpu --json") + sample();
    CHECK(text_of(parse_json(run(cpu, "", gpu()).out), "dtype") == "float32");
    const Result wide = run_as_is(words("-p Hello -t 0 -d float32") + sample(), "", gpu());
    CHECK(wide.out == kHello);
    CHECK(contains(wide.err, kOnCpu));
    const std::string ids = "--ids 4087,4088,72,501,111,4089,4090";
    const Json logits = parse_json(run(words("logits --json " + ids) + sample(), "", gpu()).out);
    CHECK(logits.find("argmax")->array.at(6).number == 72);
    const Json checks = doctor(sample(), 0, gpu());
    CHECK(status_of(checks, "cuda") == "ok");
    CHECK(status_of(checks, "gpu") == "ok");
    CHECK(status_of(checks, "self-test") == "ok");
    const Words tiny = words("bench --prompt-tokens 100 --decode-tokens 9 --batch-sizes 1,3");
    const Json bench = parse_json(split_lines(run(tiny + sample(), "", gpu()).out).back());
    CHECK(bench.find("gpu")->kind == Json::Kind::string);
    CHECK(number_of(bench, "total_vram_bytes") > 1e9);
    CHECK(bench.find("sweep")->array.size() == 2);
}

TEST_CASE("cli: a GPU that fails ends a conversation from a pipe at once, with exit code 6") {
    if (no_binary() || no_gpu()) return;
#ifdef NANOGPT_TRAP
    const test::TempDir dir;
    const std::string file = (dir / "now").string();
    Words env = gpu();
    fs::create_symlink(NANOGPT_TRAP, dir / "trap.so");  // a name without spaces
    env.push_back("LD_PRELOAD=" + (dir / "trap.so").string());
    env.push_back("NANOGPT_TRAP=" + file);
    std::string lines;
    for (int i = 0; i < 20'000; i++) lines += "What is 37 times 41?\n";
    CHECK(std::system(("(sleep 2; touch '" + file + "') &").c_str()) == 0);
    const Result r = run(words("-t 0 --device-type cuda") + sample(), lines, env);
    CHECK(r.code == 6);
    CHECK(contains(r.err, "CUDA: "));
    CHECK(r.err.find("CUDA: ") == r.err.rfind("CUDA: "));  // said once
#endif
}

TEST_CASE("cli: a walk on a GPU has the numbers of one on the CPU") {
    if (no_binary() || no_gpu()) return;
    const Words walk = words("walk -p Hello --json --no-png -d bfloat16") + sample();
    const Json cpu = parse_json(run(walk + words("--device-type cpu"), "", gpu()).out);
    const Json json = parse_json(run(walk, "", gpu()).out);
    CHECK(text_of(json, "device") != text_of(cpu, "device"));
    const auto &stages = json.find("stages")->array, &wanted = cpu.find("stages")->array;
    REQUIRE(stages.size() == wanted.size());
    for (std::size_t i = 0; i < stages.size(); i++) {
        CAPTURE(text_of(stages[i], "name"));
        CHECK(text_of(stages[i], "name") == text_of(wanted[i], "name"));
        const double rms = number_of(wanted[i], "rms");
        CHECK(number_of(stages[i], "rms") == doctest::Approx(rms).epsilon(0.03).scale(0));
        CHECK(number_of(stages[i], "not_finite") == 0);
    }
    const auto& heads = json.find("attention")->array;
    CHECK(heads.size() == 8);
    for (const Json& head : heads) {
        for (const Json& row : head.find("map")->array) {
            double sum = 0;
            for (const Json& weight : row.array) sum += weight.number;
            CHECK(sum == doctest::Approx(1).epsilon(1e-3));
        }
    }
    const Json& output = json.find("lens")->array.back();
    CHECK(output.find("is_output")->boolean);
    const double choice = number_of(*json.find("choice"), "token");
    CHECK(number_of(output.find("cells")->array.back(), "token") == choice);
    CHECK(number_of(*cpu.find("choice"), "token") == choice);
}

TEST_CASE("cli: check reads every byte and executes nothing") {
    if (no_binary()) return;
    const test::TempDir dir;
    const fs::path source = test::sample_dir() / "chatsft_checkpoints" / "d4",
                   model = dir / "model_002600.pt";
    fs::copy_file(source / "model_002600.pt", model);
    const auto check = [&](const Words& args) { return run(Words{"check"} + args); };
    const Result good = check({test::sample_dir().string()});
    CHECK(good.code == 0);
    CHECK(lines_of(good.out) == 4);
    CHECK(!contains(good.out, "refused"));
    CHECK(check({model.string()}).code == 0);
    CHECK(contains(check({model.string()}).out, "no metadata"));
    std::string bytes = test::read_file(model);
    bytes[bytes.size() / 2] = static_cast<char>(bytes[bytes.size() / 2] ^ 1);
    test::write_file(model, bytes);
    const Result damaged = check({model.string()});
    CHECK(damaged.code == 4);
    CHECK(contains(damaged.out, "checksum"));
    CHECK(contains(damaged.out, "at byte"));
    test::write_file(model, bytes.substr(0, bytes.size() / 3));
    CHECK(check({model.string()}).code == 4);
    const std::string evil = (dir / "tokenizer.pkl").string();
    test::write_file(evil, "cos\nsystem\n(S'touch /dev/shm/owned'\ntR.");
    CHECK(check({evil}).code == 4);
    test::write_file(dir / "meta_000001.json", "{\"step\": 1, \"model_config\": {}}");
    CHECK(check({(dir / "meta_000001.json").string()}).code == 4);
    CHECK(check({(dir / "none.pt").string()}).code == 3);
    CHECK(check({(dir / "none.pt").string(), evil}).code == 4);
    CHECK(check({(dir / "none.pt").string(), source.string()}).code == 3);
    CHECK(check({home().string()}).code == 3);
    CHECK(check({"/dev/null"}).code == 4);
    const Result listed = check({"--json", dir.path().string(), (dir / "none.pt").string()});
    const Json json = parse_json(listed.out);
    CHECK(listed.code == 4);
    CHECK(number_of(json, "refused") == 3);
    CHECK(number_of(json, "missing") == 1);
    CHECK(json.find("files")->array.size() == 4);
}

TEST_CASE("cli: check --values counts what is not finite") {
    if (no_binary()) return;
    const test::TempDir dir;
    test::CheckpointSpec spec;
    spec.fill = [](std::string_view name, std::span<float> values) {
        test::golden_fill(name, values);
        if (name == "lm_head.weight")
            values[3] = std::numeric_limits<float>::quiet_NaN(),
            values[5] = -std::numeric_limits<float>::infinity();
    };
    const std::string model = test::make_checkpoint(dir.path(), spec).string();
    const Json json =
        parse_json(run(Words{"check", "--values", "--json", model + "/model_000200.pt"}).out);
    const auto& values = json.find("files")->array.at(0).find("values")->array;
    REQUIRE(values.size() == 1);
    CHECK(text_of(values[0], "tensor") == "lm_head.weight");
    CHECK(number_of(values[0], "nan") == 1);
    CHECK(number_of(values[0], "infinite") == 1);
}

TEST_CASE(
    "cli: colour follows NO_COLOR, CLICOLOR_FORCE and --color, and is never in a pipe by itself") {
    if (no_binary()) return;
    const auto coloured = [](const std::string& flags, const Words& env) {
        return contains(run(words("models " + flags) + sample(), "", env).out, "\x1b[");
    };
    CHECK(!coloured("", {}));
    CHECK(coloured("--color always", {}));
    CHECK(coloured("--color=always", {"NO_COLOR=1"}));
    CHECK(coloured("", {"CLICOLOR_FORCE=1"}));
    CHECK(!coloured("", {"CLICOLOR_FORCE=0"}));
    CHECK(!coloured("", {"CLICOLOR_FORCE=1", "NO_COLOR=1"}));
    CHECK(!coloured("--color never", {"CLICOLOR_FORCE=1"}));
    Screen screen(words("models") + sample());
    CHECK(screen.wait() == 0);
    CHECK(contains(screen.all(), "\x1b[1m"));
    Screen plain(words("models") + sample(), {"NO_COLOR=1"});
    CHECK(plain.wait() == 0);
    CHECK(!contains(plain.all(), "\x1b"));
    Screen dumb(words("models") + sample(), {"TERM=dumb"});
    CHECK(dumb.wait() == 0);
    CHECK(!contains(dumb.all(), "\x1b"));
}

// ---- what terminals must never see --------------------------------------------------------------

TEST_CASE("cli: no control character of others reaches a terminal") {
    if (no_binary()) return;
    const Words hostile = {"\x1b[31mred",
                           "\x1b]0;title\x07",
                           "\x1b[2J",
                           "a\rb",
                           "bell\x07",
                           "back\bspace",
                           "del\x7f",
                           "c1 \xc2\x9b"
                           "31m",
                           "nel\xc2\x85x",
                           "rtl \xe2\x80\xae"
                           "evil",
                           "lri \xe2\x81\xa6x",
                           "\x1bP1$r\x1b\\",
                           "\x0e\x0f",
                           "\x1b[?1049h",
                           "form\x0c"
                           "feed",
                           "vt\x0b",
                           "\x1b(0",
                           "raw \x9b"
                           "31m",
                           "line\nbreak",
                           "\x05"};
    std::size_t passed = 0, total = 0;
    const auto clean = [&](const Result& r, bool one_line) {
        CAPTURE(r.err);
        const bool good = is_clean(r.err) && (!one_line || lines_of(r.err) == 1);
        CHECK(good);
        passed += good, total++;
    };
    const Words plain = words("--color never");
    for (const std::string& text : hostile) {
        clean(run(Words{"-g", text, "-p", "x"} + plain + sample()), true);
        clean(run(Words{"--model", text, "-p", "x"} + plain + sample()), true);
        clean(run(Words{"-k", text} + plain), true);
        clean(run(Words{text} + plain), true);
        clean(run(Words{"--" + text} + plain), true);
        clean(run(Words{"--base-dir", "/" + text, "models"} + plain), true);
        clean(run(words("-q -t 0") + plain + sample(), "/" + text + "\n"), false);
        const Result checked = run(Words{"check", text} + plain);
        CHECK(is_clean(checked.out));
        CHECK(lines_of(checked.out) == 1);
        passed += is_clean(checked.out), total++;
        std::string ids;
        for (const char c : text) ids += std::to_string(int(static_cast<unsigned char>(c))) + " ";
        Screen screen(words("detokenize --color never " + ids) +
                      sample());  // ids 0 to 255 are the bytes
        CHECK(screen.wait() == 0);
        CHECK(is_clean(screen.all()));
        passed += is_clean(screen.all()), total++;
    }
    const std::string raw = "\x1b[31m";
    CHECK(run(words("detokenize 27 91 51 49 109") + sample()).out ==
          raw + "\n");  // no terminal: unchanged
    test::report("E3", passed, total);
}

TEST_CASE("cli: hostile folder names and metadata are listed safely") {
    if (no_binary()) return;
    const test::TempDir dir;
    test::CheckpointSpec spec;
    const fs::path good = test::make_checkpoint(dir.path(), spec);
    fs::create_directories(dir / "base_checkpoints" / "d3\x1b[31m");
    test::write_file(dir / "base_checkpoints" / "d4" / "model_000001.pt", "PK\x03\x04");
    test::write_file(dir / "base_checkpoints" / "d4" / "meta_000001.json",
                     "{\"\x1b[31m\": \"\\u001b]0;x\\u0007\"");
    const Result r = run(Words{"models", "--all", "--base-dir", dir.path().string()});
    CHECK(r.code == 0);
    CHECK(is_clean(r.out));
    CHECK(is_clean(r.err));
    CHECK(contains(r.err, "\\x1b[31m"));
    CHECK(is_clean(run(Words{"models", "--json", "--base-dir", dir.path().string()}).out));
}

// ---- the conversation in a terminal -------------------------------------------------------------

TEST_CASE("cli: the conversation in a terminal: banner, answer, clear, unknown command, quit") {
    if (no_binary()) return;
    Screen screen(words("-t 0 --color never") + sample());
    CHECK(screen.shows("nanogpt chat · sft/d4 step 2600 · val loss 1.228 bits/byte · CPU"));
    CHECK(screen.shows("Type 'quit' or 'exit' to end, 'clear' to start over, /help for more."));
    CHECK(screen.shows("User: "));
    screen.type("Hello\n");
    CHECK(screen.shows("Assistant: Hello! How can I help you today?"));
    CHECK(screen.shows("[12 tokens · "));
    CHECK(screen.shows("User: "));
    screen.type("/context\n");
    CHECK(screen.shows("of 1024 tokens"));
    screen.type("clear\n");
    CHECK(screen.shows("conversation cleared"));
    screen.type("/nonsense\n");
    CHECK(screen.shows("unknown command /nonsense"));
    screen.type("\"\"\"two\n");
    CHECK(screen.shows("... "));
    screen.type("lines\"\"\"\n");
    CHECK(screen.shows("Assistant: "));
    CHECK(screen.shows("User: "));
    screen.type("QUIT\n");
    CHECK(screen.shows("Goodbye!"));
    CHECK(screen.wait() == 0);
    CHECK(!contains(screen.all(), "\x1b"));
}

TEST_CASE("cli: Ctrl-D leaves; Ctrl-C twice at the prompt leaves with 130") {
    if (no_binary()) return;
    Screen end(words("-t 0") + sample());
    CHECK(end.shows("User:"));
    end.type("\x04");
    CHECK(end.shows("Goodbye!"));
    CHECK(end.wait() == 0);
    Screen screen(words("-t 0") + sample());
    CHECK(screen.shows("User:"));
    screen.type("\x03");
    CHECK(screen.shows("Ctrl-C again, or Ctrl-D, to leave"));
    CHECK(screen.shows("User:"));
    screen.type("Hello\n");  // still there
    CHECK(screen.shows("How can I help you today?"));
    CHECK(screen.shows("User:"));
    std::this_thread::sleep_for(std::chrono::milliseconds(2100));
    screen.type("\x03");
    CHECK(screen.shows("to leave"));
    CHECK(screen.shows("User:"));
    screen.type("\x03");
    CHECK(screen.wait() == 130);
}

TEST_CASE("cli: Ctrl-C during an answer stops it and keeps what there is of it") {
    if (no_binary()) return;
    const test::TempDir dir;
    const std::string file = (dir / "chat.json").string();
    test::CheckpointSpec
        spec;  // random weights, special tokens never the likeliest: it goes on and on
    spec.directory = "chatsft_checkpoints";
    spec.fill = [](std::string_view name, std::span<float> values) {
        test::golden_fill(name, values);
        const auto specials = values.last(name == "lm_head.weight" ? values.size() * 9 / 512 : 0);
        std::fill(specials.begin(), specials.end(), 0.0f);
    };
    test::make_checkpoint(dir.path(), spec);
    const Words endless = {"-t",     "0",       "-m",    "1000000",    "--seq-len",
                           "200000", "--color", "never", "--base-dir", dir.path().string()};
    Screen screen(endless);
    CHECK(screen.shows("User:"));
    screen.type("go\n");
    CHECK(screen.shows("Assistant: "));
    std::this_thread::sleep_for(std::chrono::milliseconds(300));
    screen.type("\x03");
    CHECK(screen.shows("cancelled"));
    CHECK(screen.shows("stopped"));
    CHECK(screen.shows("User:"));
    screen.type("/save " + file + "\n");
    CHECK(screen.shows("saved"));
    screen.type("/quit\n");
    CHECK(screen.wait() == 0);
    CHECK(is_clean(screen.all()));
    const Json json = parse_json(test::read_file(file));
    REQUIRE(json.find("messages")->array.size() == 2);
    CHECK(text_of(json.find("messages")->array[1], "content").size() > 10);
    Screen once(endless + Words{"-p", "go"});
    std::this_thread::sleep_for(std::chrono::milliseconds(700));
    once.type("\x03");
    CHECK(once.wait() == 130);
}
