// nanogpt: chat with nanochat checkpoints from the terminal, and look inside them.
//
// ==== 0. manual ==================================================================================
//
//   nanogpt -i sft -g d12 -p "Hello"     one answer; nanochat's flags keep their letters and meaning
//   nanogpt chat                         a conversation; /help lists what else can be typed
//   nanogpt sample -p "Once upon" -n 3   three continuations, without the chat template
//   nanogpt serve                        web page and HTTP API, for many at once
//   nanogpt models                       every checkpoint found, one row each
//   nanogpt show sft/d12                 one of them in full: settings, tensors, sizes
//   nanogpt tokenize "Hello"             ids and bytes of every token; detokenize goes back
//   nanogpt logits --ids 1,2 --out F     raw logits of all positions
//   nanogpt walk -p "Hello"              one text through the model, looked at from inside
//   nanogpt bench                        how fast prompts are read and tokens written, in numbers
//   nanogpt check FILE...                is this file safe and whole? Nothing in it is executed
//   nanogpt doctor                       what works here and what does not, with the remedy
//   nanogpt help [COMMAND]               everything else
//
// stdout carries what was asked for and nothing else; notes, progress and errors go to stderr.
// Exit codes: 0 done, 1 failed while running, 2 wrong usage, 3 not found, 4 file refused or not
// supported, 5 not enough memory, 6 device missing, 7 cannot listen, 130 Ctrl-C, 143 SIGTERM.
//
// Words: `text` is valid UTF-8, `piece` the bytes of one token, `id` a checkpoint's name such as
// sft/d12/2000. Everything that may reach a terminal passes through safe() (section 2).
//
// CONTENTS, with names to search for (the body of a member as Scheduler::step or Server::check_key);
// parts of a section begin with "// ---- name"
//
//    1. flags       Options (defaults; of serve, bench, walk: parse); kCommands: every command;
//                   kFlags: every flag, and its help
//    2. terminal    safe, table, write_answer, note; JSON written: Value, object, array; Ctrl-C:
//                   interrupted; LineReader, Progress, NewFile
//    3. pick        parse_id ("sft/d12/2000"), pick_model, bundled_sample; place_for (GPU or CPU),
//                   check_memory, open_device; Session: open_session
//    4. sample, chat         Output (text or JSON), run_sample; Repl: the slash commands; run_chat
//    5. show, models, ...    Catalog, run_show, run_models, LogitRows, run_check, Doctor
//    6. bench       plan_bench, bench_cost (the bytes of a step), BenchGroup, Bench
//    7. picture     shade_of (colours), kStrokes (the font), Picture (the canvas), Chart, matrix_chart
//    8. walk        kOperations (what each costs), StageClock; Walk (all that is kept), Walker;
//                   charts_of; walk_members (JSON); walk_text; plan_walk, run_walk
//    9. http        Limits (connections of an address); RequestReader (parsing); HttpServer: loop,
//                   accept_some, parse, send, check_time (timeouts)
//   10. scheduler   Job; Scheduler: round (one turn), admit (who is next), models in memory
//                   (begin_loading, make_room), sequence_for (what is reused), step, read_prompts
//                   (how much prompt: Pace), take (a token drawn), publish (for monitors)
//   11. routes      Form (members of a body); render; Server; who may ask: host_allowed (Host),
//                   check_origin, check_key; kRoutes; chat_completion, completion, nanochat; woken
//                   (events to clients); health, stats, metrics; run_serve
//   12. main        run_help, kFaults (exit codes), report, main
//   13. page        kPageStyle, kPageBody, kPageScript: what the browser gets

#include "nanogpt.hpp"
#ifdef __CUDACC__
#include "kernels.cuh"
namespace nanogpt::demo {
constexpr bool kHasCuda = true;
inline void cuda_wait() { NANOGPT_CUDA_CHECK(cudaDeviceSynchronize()); }
// Multiplications and additions per second of the prompt's matrix product, 4096 x 4096 x 4096: the best
// of some.
inline double cuda_product_rate() {
    constexpr int n = 4096;
    const GpuInfo gpu = gpu_info(0);
    const cuda::Buffer<cuda::bf16> x(std::size_t{n} * n), w(std::size_t{n} * n),
        y(std::size_t{n} * n);
    const cuda::Buffer<int> counters(cuda::kGemmCounters);
    const cuda::Device device{gpu.sms, static_cast<int>(gpu.shared_bytes), nullptr, false,
                              counters.get()};
    double best = 0;
    for (int pass = 0; pass < 6; pass++) {
        cuda_wait();
        const auto start = std::chrono::steady_clock::now();
        cuda::gemm<cuda::Epilogue::store>(device, y.get(), x.get(), w.get(), {n, n, n, n, n, n});
        cuda_wait();
        const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
        best = std::max(best, 2.0 * n * n * n / seconds.count());
    }
    return best;
}
}  // namespace nanogpt::demo
#else  // what kernels.cuh offers, in a program that only has the CPU
namespace nanogpt::demo {
constexpr bool kHasCuda = false;
struct GpuInfo {
    int device = 0;
    std::string name = {};
    int major = 0, minor = 0, sms = 0;
    std::uint64_t memory_bytes = 0, free_bytes = 0, reserve_bytes = 0;
    bool integrated = false;
    std::string problem = {};
};
struct CudaOptions {
    std::uint64_t kv_tokens = 0, least_contexts = 1;
    std::optional<std::uint64_t> reserve_bytes = {};
};
inline std::string cuda_problem() { return "this nanogpt was built without CUDA"; }
inline std::string cuda_versions() { return ""; }
inline std::vector<GpuInfo> find_gpus() { return {}; }
inline double cuda_read_bandwidth() { return 0; }
inline double cuda_product_rate() { return 0; }
inline void cuda_wait() {}
inline double cuda_self_test(Backend&, const std::shared_ptr<const Model>&) { return 0; }
inline std::unique_ptr<Backend> open_cuda(const std::shared_ptr<const Model>&, const CudaOptions&) {
    throw Error(ErrorKind::device, cuda_problem());
}
}  // namespace nanogpt::demo
#endif

// Pictures of `walk` need stb_image_write; without it everything else works.
#if __has_include(<stb_image_write.h>) || __has_include(<stb/stb_image_write.h>)
#define NANOGPT_PNG
#define STBI_WRITE_NO_STDIO
#define STB_IMAGE_WRITE_STATIC
#define STB_IMAGE_WRITE_IMPLEMENTATION
#if __has_include(<stb_image_write.h>)
#include <stb_image_write.h>  // stbi_write_png_to_func
#else
#include <stb/stb_image_write.h>  // stbi_write_png_to_func
#endif
#endif

#include <algorithm>           // sort, find, min, max
#include <array>               // array
#include <atomic>              // atomic
#include <cerrno>              // errno
#include <charconv>            // from_chars, to_chars
#include <chrono>              // steady_clock
#include <clocale>             // setlocale
#include <cmath>               // isfinite, round
#include <concepts>            // integral, same_as
#include <condition_variable>  // condition_variable_any
#include <cstdint>             // int64_t
#include <cstdio>              // fwrite, fputs
#include <cstdlib>             // getenv
#include <cstring>             // strerror
#include <ctime>               // strftime
#include <cwchar>              // wcwidth
#include <deque>               // deque
#include <filesystem>          // path, directory_iterator
#include <fstream>             // ofstream
#include <functional>          // function
#include <initializer_list>    // initializer_list
#include <limits>              // numeric_limits
#include <map>                 // map
#include <memory>              // unique_ptr
#include <mutex>               // mutex
#include <new>                 // bad_alloc
#include <numeric>             // iota
#include <optional>            // optional
#include <span>                // span
#include <string>              // string
#include <string_view>         // string_view
#include <thread>              // jthread, hardware_concurrency
#include <unordered_map>       // unordered_map
#include <utility>             // pair, move
#include <vector>              // vector

#include <fcntl.h>         // open, fcntl
#include <netdb.h>         // getaddrinfo, getnameinfo
#include <netinet/in.h>    // sockaddr_in6
#include <netinet/tcp.h>   // TCP_NODELAY
#include <poll.h>          // poll
#include <signal.h>        // sigaction
#include <sys/epoll.h>     // epoll_wait
#include <sys/eventfd.h>   // eventfd
#include <sys/ioctl.h>     // TIOCGWINSZ
#include <sys/resource.h>  // setrlimit
#include <sys/signalfd.h>  // signalfd
#include <sys/socket.h>    // accept4, recv, send
#include <unistd.h>        // read, write, isatty

namespace nanogpt::demo {
namespace {

namespace fs = std::filesystem;
using Clock = std::chrono::steady_clock;

// cat("step ", 3): the parts as one text. Floating-point numbers have their own words (section 2).
template <class... Parts>
std::string cat(const Parts&... parts) {
    std::string text;
    const auto add = [&](const auto& part) {
        if constexpr (std::integral<std::remove_cvref_t<decltype(part)>>) {
            text += std::to_string(part);
        } else {
            text += part;
        }
    };
    (add(parts), ...);
    return text;
}
// The texts of each(item), with a separator between them.
template <class Range, class Each = std::identity>
std::string join(const Range& items, std::string_view separator, Each each = {}) {
    std::string text;
    bool first = true;
    for (const auto& item : items) {
        if (!std::exchange(first, false)) text += separator;
        text += each(item);
    }
    return text;
}

template <class Range, class Item>
bool has(const Range& items, const Item& item) {
    return std::find(std::begin(items), std::end(items), item) != std::end(items);
}

double seconds_since(Clock::time_point start) {
    return std::chrono::duration<double>(Clock::now() - start).count();
}

// ==== 1. flags ===================================================================================
// Two tables, commands and flags. They drive parsing, help and "did you mean"; a flag that is not in
// the table does not exist.

struct Options {
    std::string command;                 // as in kCommands; empty: nothing was typed
    std::vector<std::string> arguments;  // what is no flag
    std::string source, tag, model;      // -i, -g, --model; empty: not given
    std::int64_t step = -1;              // -s; -1: the last one
    std::string base_dir, tokenizer;     // empty: found by the rules
    Overrides overrides;                 // --softcap and its kind
    std::optional<std::string> prompt;   // -p
    std::string system;                  // --system
    SamplingParams sampling = {.temperature = 0.6f, .top_k = 50};
    int max_tokens = 256;           // -m
    int num_samples = 1;            // -n
    std::vector<std::string> stop;  // --stop
    std::string device_type;        // --device-type; empty: whatever is there
    std::optional<DType> dtype;     // -d; unset: bfloat16 on a GPU, float32 on the CPU
    int threads = 0;                // 0: physical cores
    bool json = false, stream_json = false;
    std::optional<bool> stats;  // unset: if stderr is a terminal
    std::string color = "auto";
    bool quiet = false, verbose = false, help = false, version = false;
    std::vector<std::string> types;            // --type
    std::string sort;                          // --sort
    bool all = false, values = false;          // --all, --values
    std::string ids, ids_file, out, hooks;     // logits; out: walk's directory
    std::string layers;                        // walk; empty: all, one of them printed
    int top = 10;                              // --top
    bool no_png = false, force = false;        // --no-png, --force
    int prompt_tokens = 0, decode_tokens = 0;  // bench; 0: by device
    std::vector<int> batch_sizes;              // empty: by device
    std::string host = "127.0.0.1";            // serve, from here on
    int port = 8000, num_gpus = 1;
    int slots = 0;  // 0: by device
    int queue = 512, max_models = 3, drain_seconds = 10;
    int queue_timeout = 120, request_timeout = 600;
    std::optional<std::uint64_t> mem_reserve;  // bytes
    std::vector<std::string> api_keys, allow_origins, allow_hosts;
    bool open = false, trust_proxy = false, log_content = false;
};

using Run = int(Options&);  // returns the exit code
Run run_chat, run_sample, run_serve, run_models, run_show, run_tokenize, run_detokenize, run_logits,
    run_walk, run_bench, run_check, run_doctor, run_help, run_version;

// ---- commands

struct Command {
    std::string_view name, aliases, arguments, summary;
    std::size_t most_arguments;
    Run* run;
};
constexpr std::size_t kMany = 1'000'000;

// clang-format off
constexpr Command kCommands[] = {
    {"chat", "", "", "talk with a model, or one answer with -p", 0, run_chat},
    {"sample", "", "-p TEXT", "let a model continue a text, without the chat template", 0, run_sample},
    {"serve", "", "", "web page and HTTP API (nanochat's and OpenAI's), for many at once", 0, run_serve},
    {"models", "list ls", "", "every checkpoint found, one row each", 0, run_models},
    {"show", "", "[MODEL]", "one checkpoint in full: metadata, settings, tensors, sizes", 1, run_show},
    {"tokenize", "", "[TEXT]", "text to token ids, with the bytes of every token; reads stdin without TEXT", 1, run_tokenize},
    {"detokenize", "", "[ID...]", "token ids to text; reads stdin without ids", kMany, run_detokenize},
    {"logits", "", "--ids LIST", "the raw logits after every token of a sequence", 0, run_logits},
    {"walk", "", "-p TEXT", "a text through the model, stage by stage: numbers, time, pictures", 0, run_walk},
    {"bench", "", "", "speed of reading a prompt and of writing, over batch sizes; the last line is JSON", 0, run_bench},
    {"check", "", "FILE...", "is this file safe and whole? Executes nothing", kMany, run_check},
    {"doctor", "", "", "what works here: device, memory, checkpoints, tokenizer; with the remedy", 0, run_doctor},
    {"help", "", "[COMMAND]", "this text, or all flags of one command", 1, run_help},
    {"version", "", "", "the version", 0, run_version},
};
// clang-format on

[[noreturn]] void bad_usage(const std::string& message) { throw Error(ErrorKind::usage, message); }

// ---- values of flags, checked

struct Given {  // one flag on the command line, or one setting typed in the conversation
    std::string_view flag, text;
};
[[noreturn]] void bad_value(const Given& given, std::string_view wanted) {
    bad_usage(cat(given.flag, ": ", detail::quote(given.text), " is not ", wanted));
}

// Numbers are read whole and refused otherwise: "5x", "", "nan", "1e999" are nobody's wish.
template <class Number>
Number number(const Given& given, Number least, Number most, std::string_view wanted) {
    Number value{};
    const char* end = given.text.data() + given.text.size();
    const auto [stop, error] = std::from_chars(given.text.data(), end, value);
    if (error != std::errc() || stop != end || !(value >= least && value <= most))
        bad_value(given, wanted);
    return value;
}
int whole(const Given& given, int least, int most = std::numeric_limits<int>::max()) {
    const bool open = most == std::numeric_limits<int>::max();
    const std::string range = cat("a whole number from ", least, open ? " on" : cat(" to ", most));
    return number<int>(given, least, most, range);
}
float positive(const Given& given) { return number<float>(given, 1e-6f, 1e9f, "a number above 0"); }
std::string one_of(const Given& given, std::initializer_list<std::string_view> words) {
    if (!has(words, given.text)) bad_value(given, cat("one of ", join(words, ", ")));
    return std::string(given.text);
}
std::string not_empty(const Given& given, std::size_t most = 4096) {
    if (given.text.empty() || given.text.size() > most)
        bad_value(given, cat("a text of 1 to ", most, " bytes"));
    return std::string(given.text);
}
std::string_view trim(std::string_view text) {
    const std::size_t first = text.find_first_not_of(" \t");
    if (first == text.npos) return {};
    return text.substr(first, text.find_last_not_of(" \t") + 1 - first);
}
std::vector<std::string> split(std::string_view text, std::string_view separators) {
    std::vector<std::string> parts;
    while (!text.empty()) {
        const std::size_t end = std::min(text.find_first_of(separators), text.size());
        if (end > 0) parts.emplace_back(text.substr(0, end));
        text.remove_prefix(std::min(end + 1, text.size()));
    }
    return parts;
}

// -1 asks for a random seed; it is drawn here, once, so that the stats line can tell it.
void set_seed(Options& o, const Given& g) {
    constexpr auto kMost = std::numeric_limits<std::int64_t>::max();
    const auto seed = number<std::int64_t>(g, -1, kMost, "-1 (random) or a whole number from 0 on");
    o.sampling.seed = static_cast<std::uint64_t>(seed);
    if (seed >= 0) return;
    std::uint32_t random = 0;
    if (::getentropy(&random, sizeof random) != 0)
        random = static_cast<std::uint32_t>(std::time(nullptr));
    o.sampling.seed = random >> 1;  // 31 bits, as nanochat's chat_web draws
}
void set_stop(Options& o, const Given& g) {
    if (o.stop.size() == 8)
        bad_usage(std::string(g.flag) + ": found a ninth stop text, 8 are the most");
    o.stop.push_back(not_empty(g, 64));
}
void set_generation(Options& o, const Given& g) {
    const std::string name = one_of(g, {"g0", "g1", "g2", "g2e", "g3", "g4"});
    for (const auto& facts : detail::kGenerations) {
        if (facts.name == name) o.overrides.generation = facts.generation;
    }
}
void set_window_pattern(Options& o, const Given& g) {
    const bool fits = !g.text.empty() && g.text.size() <= 256;
    if (!fits || g.text.find_first_not_of("SLsl") != g.text.npos)
        bad_value(g, "made of letters S and L, as in SSSL");
    o.overrides.window_pattern = std::string(g.text);
}
void set_batch_sizes(Options& o, const Given& g) {
    o.batch_sizes.clear();
    for (const std::string& size : split(g.text, ","))
        o.batch_sizes.push_back(whole({g.flag, size}, 1, 4096));
    if (o.batch_sizes.empty()) bad_value(g, "a list such as 1,8,32");
}
void set_types(Options& o, const Given& g) {
    o.types = split(g.text, ",");
    if (o.types.empty()) bad_value(g, "a list such as base,sft");
    for (const std::string& type : o.types) one_of({g.flag, type}, {"base", "mid", "sft", "rl"});
}

void set_mem_reserve(Options& o, const Given& g) {
    constexpr std::string_view kUnits = "KMGT";
    const char last = g.text.empty() ? '\0' : detail::ascii_upper(g.text.back());
    const std::size_t unit = kUnits.find(last) + 1;  // 0: none, bytes
    const std::string_view digits = g.text.substr(0, g.text.size() - (unit > 0 ? 1 : 0));
    const Given size = {g.flag, digits};
    o.mem_reserve = number<std::uint64_t>(size, 0, 1u << 30, "a size such as 8G or 512M")
                    << 10 * unit;
}

void set_allow_origin(Options& o, const Given& g) {
    const std::size_t scheme = g.text.starts_with("http://") ? 7 : 8;
    if (!(scheme == 7 || g.text.starts_with("https://")) || g.text.size() == scheme ||
        g.text.find_first_of("/ *", scheme) != g.text.npos)
        bad_value(g, "an origin such as http://localhost:3006");
    o.allow_origins.emplace_back(g.text);
}

// Keys that do not stand in a command, which all can see who list processes.
void read_keys(Options& o, const Given& g) {
    const std::vector<std::byte> bytes = detail::read_file(not_empty(g), 64u << 10);
    const std::size_t before = o.api_keys.size();
    for (const std::string& line : split(detail::as_text(bytes), "\r\n")) {
        const std::string key(trim(line));
        const auto plain = [](char c) { return c >= ' ' && c <= '~'; };
        if (key.size() > 256 || !std::all_of(key.begin(), key.end(), plain))
            bad_value(g, "a file with a key of up to 256 plain characters in each line");
        if (!key.empty()) o.api_keys.push_back(key);
    }
    if (o.api_keys.size() == before) bad_value(g, "a file with a key in each line");
}

// ---- the table of flags

struct Flag {
    char letter;  // 0: none
    std::string_view name, value;
    std::string_view commands;  // that have it, by name
    std::string_view help;
    void (*apply)(Options&, const Given&);
};
bool belongs(const Flag& flag, const Command& command) {
    return flag.commands.empty() || has(split(flag.commands, " "), command.name);
}
constexpr std::string_view kAll = "", kRunOrShow = "chat sample logits bench serve walk show",
                           kNameModel =
                               "chat sample logits bench serve walk show tokenize detokenize";
#define SET(statement) [](Options& o, [[maybe_unused]] const Given& g) { statement; }
// clang-format off
constexpr Flag kFlags[] = {
    {'i', "source", "base|mid|sft|rl", kNameModel, "family of checkpoints (default: sft; for sample, walk and bench: base)", SET(o.source = one_of(g, {"base", "mid", "sft", "rl"}))},
    {'g', "model-tag", "TAG", kNameModel, "directory name such as d12 (default: the d with the largest number)", SET(o.tag = not_empty(g))},
    {'s', "step", "N", kNameModel, "training step (default: the last)", SET(o.step = number<std::int64_t>(g, 0, 999'999'999'999, "a whole number from 0 on"))},
    {0, "model", "ID|PATH", kNameModel, "all three in one, such as sft/d12/2000; or a model_*.pt or its directory", SET(o.model = not_empty(g))},
    {0, "base-dir", "DIR", "chat sample logits bench serve walk show tokenize detokenize models doctor", "nanochat's directory (default: $NANOCHAT_BASE_DIR, else ~/.cache/nanochat)", SET(o.base_dir = not_empty(g))},
    {0, "tokenizer", "FILE", "chat sample logits bench serve walk tokenize detokenize", "tokenizer.pkl (default: found beside the model or in the base directory)", SET(o.tokenizer = not_empty(g))},
    {'p', "prompt", "TEXT", "chat sample walk", "the text (chat: one answer, then exit); - reads it from stdin", SET(o.prompt = std::string(g.text))},
    {0, "system", "TEXT", "chat", "put in front of the first message", SET(o.system = not_empty(g, 1 << 20))},
    {'t', "temperature", "X", "chat sample bench serve walk", "0 = greedy (default 0.6; for serve: 0.8, for bench and walk: 0)", SET(o.sampling.temperature = number<float>(g, 0, 100, "a number from 0 (greedy) to 100"))},
    {'k', "top-k", "N", "chat sample serve walk", "choose among the N likeliest; 0 = whole vocabulary (default 50)", SET(o.sampling.top_k = whole(g, 0))},
    {0, "top-p", "X", "chat sample serve walk", "choose among the likeliest that make up X; 1 = off (default 1)", SET(o.sampling.top_p = number<float>(g, 1e-6f, 1, "a number above 0, at most 1 (off)"))},
    {'m', "max-tokens", "N", "chat sample serve", "most new tokens per answer (default 256; for serve: 512)", SET(o.max_tokens = whole(g, 1))},
    {'n', "num-samples", "N", "sample", "independent samples from one reading of the prompt (default 1)", SET(o.num_samples = whole(g, 1, 10'000))},
    {0, "seed", "N", "chat sample walk", "of the random generator; -1 = random (default 42)", set_seed},
    {'p', "port", "N", "serve", "to listen on; 0 = let the system choose (default 8000)", SET(o.port = whole(g, 0, 65535))},
    {0, "host", "ADDR", "serve", "address to listen on; any but a loopback one needs a key (default 127.0.0.1)", SET(o.host = not_empty(g, 255))},
    {0, "api-key", "KEY", "serve", "what clients have to know; may be repeated (default: made up if --host is not loopback)", SET(o.api_keys.push_back(not_empty(g, 256)))},
    {0, "api-key-file", "FILE", "serve", "a file with a key in each line; unlike --api-key it is not seen in the list of processes", read_keys},
    {0, "open", "", "serve", "no key, though others can reach the server", SET(o.open = true)},
    {0, "allow-origin", "URL", "serve", "a web page's origin that may use the server; may be repeated", set_allow_origin},
    {0, "allow-host", "NAME", "serve", "another name the server is known by; may be repeated", SET(o.allow_hosts.push_back(not_empty(g, 255)))},
    {0, "trust-proxy", "", "serve", "believe X-Forwarded-For of a proxy on this machine", SET(o.trust_proxy = true)},
    {0, "slots", "N", "serve", "answers at once (default 256 on a GPU, 8 on the CPU)", SET(o.slots = whole(g, 1, 256))},
    {0, "queue", "N", "serve", "answers that may wait (default 512)", SET(o.queue = whole(g, 0, 100'000))},
    {0, "queue-timeout", "N", "serve", "seconds an answer may wait to begin (default 120)", SET(o.queue_timeout = whole(g, 1, 86'400))},
    {0, "request-timeout", "N", "serve", "seconds an answer may take in all (default 600)", SET(o.request_timeout = whole(g, 1, 86'400))},
    {0, "max-models", "N", "serve", "models in memory at once (default 3)", SET(o.max_models = whole(g, 1, 64))},
    {0, "mem-reserve", "SIZE", "serve", "memory left to others, such as 8G (default: by device)", set_mem_reserve},
    {0, "drain-seconds", "N", "serve", "for running answers when the server is stopped (default 10)", SET(o.drain_seconds = whole(g, 0, 3600))},
    {0, "log-content", "", "serve", "also log what is asked and answered", SET(o.log_content = true)},
    {'n', "num-gpus", "N", "serve", "only 1, for nanochat's command lines", SET(o.num_gpus = whole(g, 1, 1024))},
    {0, "stop", "TEXT", "chat sample", "end the answer before this text; may be given 8 times", set_stop},
    {0, "prompt-tokens", "N", "bench", "length of the prompt, at most what the context leaves (default 2048; on the CPU 256)", SET(o.prompt_tokens = whole(g, 1, 1 << 20))},
    {0, "decode-tokens", "N", "bench", "tokens written per sequence (default 256; on the CPU 32)", SET(o.decode_tokens = whole(g, 2, 1 << 20))},
    {0, "batch-sizes", "LIST", "bench", "sequences written at once (default 1,8,32,128; on the CPU 1,4)", set_batch_sizes},
    {0, "ids", "LIST", "logits", "token ids such as 1,2,3", SET(o.ids = not_empty(g, 1 << 24))},
    {0, "ids-file", "FILE", "logits", "token ids as a JSON array", SET(o.ids_file = not_empty(g))},
    {0, "layers", "LIST", "walk", "layers looked at closely, such as 0,5,11, or all (default: all, one of them printed)", SET(o.layers = not_empty(g))},
    {0, "top", "N", "walk", "candidates for the next token (default 10)", SET(o.top = whole(g, 1, 1000))},
    {0, "out", "DIR", "walk", "new directory for pictures and numbers (default: walk, walk-2, ...; with --json: none)", SET(o.out = not_empty(g))},
    {0, "no-png", "", "walk", "no pictures", SET(o.no_png = true)},
    {0, "force", "", "walk", "write into a directory that exists", SET(o.force = true)},
    {0, "out", "FILE", "logits", "write the logits: float32 little-endian, (tokens, vocabulary), after the soft cap", SET(o.out = not_empty(g))},
    {0, "hooks", "FILE", "logits", "write what the forward pass computes, but for the attention maps: per value a line of JSON (name, pos, shape), then float32 little-endian", SET(o.hooks = not_empty(g))},
    {0, "type", "LIST", "models", "only these families, such as base,sft", set_types},
    {0, "sort", "KEY", "models", "loss, step, date or name", SET(o.sort = one_of(g, {"loss", "step", "date", "name"}))},
    {0, "all", "", "models", "also refused files", SET(o.all = true)},
    {0, "values", "", "check", "also count NaN and infinite values per tensor", SET(o.values = true)},
    {0, "gen", "g0|g1|g2|g2e|g3|g4", kRunOrShow, "generation of the architecture, if it is not to be recognised", set_generation},
    {0, "softcap", "X", kRunOrShow, "soft cap of the logits (nanochat of 2026-03-03 to 03-09: 20)", SET(o.overrides.softcap = positive(g))},
    {0, "window-pattern", "P", kRunOrShow, "attention windows over the layers, such as SSSL", set_window_pattern},
    {0, "short-window", "N", kRunOrShow, "positions an S layer looks back", SET(o.overrides.short_window = whole(g, 1, 1 << 20))},
    {0, "rope-base", "X", kRunOrShow, "base of the rotary angles", SET(o.overrides.rope_base = positive(g))},
    {0, "qk-scale", "X", kRunOrShow, "factor of Q and K after their norm", SET(o.overrides.qk_scale = positive(g))},
    {0, "seq-len", "N", kRunOrShow, "context the model was trained with", SET(o.overrides.sequence_len = whole(g, 1, 1 << 20))},
    {0, "rope-table", "bf16|fp32", kRunOrShow, "rounding of the rotary tables", SET(o.overrides.bf16_rope_tables = one_of(g, {"bf16", "fp32"}) == "bf16")},
    {0, "device-type", "cuda|cpu", kAll, "where to compute (default: cuda if it can be used)", SET(o.device_type = one_of(g, {"cuda", "cpu", "mps"}))},
    {'d', "dtype", "bfloat16|float32", kAll, "type of the weights (default: bfloat16 on a GPU, float32 on the CPU)", SET(o.dtype = one_of(g, {"bfloat16", "float32"}) == "float32" ? DType::f32 : DType::bf16)},
    {0, "threads", "N", kAll, "CPU threads (default: physical cores)", SET(o.threads = whole(g, 1, 1024))},
    {0, "json", "", kAll, "one JSON object on stdout instead of text", SET(o.json = true)},
    {0, "stream-json", "", "chat sample", "one JSON object per line while generating", SET(o.stream_json = true)},
    {0, "stats", "", "chat sample", "stats line on stderr (default: if stderr is a terminal)", SET(o.stats = true)},
    {0, "color", "WHEN", kAll, "auto, always or never", SET(o.color = one_of(g, {"auto", "always", "never"}))},
    {'q', "quiet", "", kAll, "no notes on stderr", SET(o.quiet = true; o.verbose = false)},
    {'v', "verbose", "", kAll, "more notes on stderr", SET(o.verbose = true; o.quiet = false)},
    {'h', "help", "", kAll, "this text", SET(o.help = true)},
    {0, "version", "", kAll, "the version", SET(o.version = true)},
};
// clang-format on
#undef SET

// ---- parsing, and "did you mean"

// Number of single-character edits between two words (Levenshtein).
std::size_t edits(std::string_view a, std::string_view b) {
    std::vector<std::size_t> row(b.size() + 1);
    for (std::size_t j = 0; j <= b.size(); j++) row[j] = j;
    for (std::size_t i = 1; i <= a.size(); i++) {
        std::size_t diagonal = row[0];
        row[0] = i;
        for (std::size_t j = 1; j <= b.size(); j++) {
            const std::size_t change = diagonal + (a[i - 1] != b[j - 1]);
            diagonal = row[j];
            row[j] = std::min({change, row[j] + 1, row[j - 1] + 1});
        }
    }
    return row[b.size()];
}
// "; did you mean X?" for the nearest of the words, or a full stop if none is near.
std::string did_you_mean(std::string_view typed, const std::vector<std::string>& words) {
    std::string nearest;
    std::size_t best = std::max<std::size_t>(2, typed.size() / 3) + 1;
    for (const std::string& word : words) {
        const bool begins = typed.size() > 3 && word.starts_with(typed);
        const std::size_t distance = begins ? 1 : edits(typed.substr(0, 64), word);
        if (distance < best) best = distance, nearest = word;
    }
    return nearest.empty() ? "." : cat("; did you mean ", nearest, "?");
}

// The entry of a table that has this name or alias.
template <class Table>
auto& find_entry(const Table& table, std::string_view mark, std::string_view word,
                 std::string_view help) {
    std::vector<std::string> names;
    for (const auto& entry : table) {
        if (entry.name == word || has(split(entry.aliases, " "), word)) return entry;
        names.push_back(cat(mark, entry.name));
    }
    const std::string typed = cat(mark, word.substr(0, 64));
    bad_usage(cat("unknown command ", mark.empty() ? detail::quote(word, 64) : typed,
                  did_you_mean(typed, names), " ", help));
}
const Command& find_command(std::string_view word) {
    return find_entry(kCommands, "", word, "Try: nanogpt help");
}

const Flag& find_flag(const Command& command, std::string_view name) {
    const bool is_long = name.starts_with("--");
    std::vector<std::string> names;
    const Flag* elsewhere = nullptr;
    for (const Flag& flag : kFlags) {
        const bool same =
            is_long ? flag.name == name.substr(2) : flag.letter != 0 && flag.letter == name[1];
        if (same && belongs(flag, command)) return flag;
        if (same) elsewhere = &flag;
        if (belongs(flag, command)) names.push_back(cat("--", flag.name));
    }
    const std::string help = cat(" Try: nanogpt help ", command.name);
    if (elsewhere == nullptr)
        bad_usage(cat("unknown flag ", name, is_long ? did_you_mean(name, names) : ".", help));
    bad_usage(cat(name, " is no flag of ", command.name, ", but of ",
                  join(split(elsewhere->commands, " "), ", "), ".", help));
}

// Reads one flag at args[at], and its value, which may be the next argument. Returns how many it took.
std::size_t parse_flag(Options& o, const Command& command, std::span<const std::string> args) {
    const std::string& typed = args[0];
    const bool is_long = typed.starts_with("--");
    const std::size_t end = is_long ? std::min(typed.find('='), typed.size()) : 2;
    const std::string name = typed.substr(0, end);
    std::optional<std::string> value;
    if (end < typed.size()) value = typed.substr(end + (is_long ? 1 : 0));
    const Flag& flag = find_flag(command, name);
    if (flag.value.empty()) {
        if (value) bad_usage(cat(name, ": it takes no value, but has ", detail::quote(*value)));
        flag.apply(o, {name, ""});
        return 1;
    }
    if (!value && args.size() < 2) bad_usage(cat(name, ": its value ", flag.value, " is missing"));
    flag.apply(o, {name, value ? *value : args[1]});
    return value ? 1 : 2;
}

// The first mistake is thrown at the end, so that --json and --color count wherever they stand.
const Command& parse(Options& o, std::span<const std::string> args) {
    const bool flag_first = !args.empty() && args[0].size() > 1 && args[0][0] == '-';
    const Command& command = args.empty() || flag_first ? kCommands[0] : find_command(args[0]);
    if (!args.empty()) o.command = command.name;
    if (command.name == "bench" || command.name == "walk") o.sampling.temperature = 0;
    if (command.name == "serve") o.sampling.temperature = 0.8f, o.max_tokens = 512;
    if (!args.empty() && !flag_first) args = args.subspan(1);
    std::optional<Error> mistake;
    bool flags_over = false;
    while (!args.empty()) {
        std::size_t took = 1;
        try {
            if (!flags_over && args[0] == "--") {
                flags_over = true;
            } else if (!flags_over && args[0].size() > 1 && args[0][0] == '-') {
                took = parse_flag(o, command, args);
            } else if (o.arguments.size() == command.most_arguments) {
                bad_usage(cat("unexpected argument ", detail::quote(args[0]), ".",
                              has(split("chat sample walk", " "), command.name)
                                  ? " A prompt goes with -p."
                                  : "",
                              " Try: nanogpt help ", command.name));
            } else {
                o.arguments.push_back(args[0]);
            }
        } catch (const Error& e) {
            if (!mistake) mistake = e;
        }
        args = args.subspan(took);
    }
    if (mistake) throw *mistake;
    if (o.version) return find_command("version");
    if (!o.help) return command;
    o.arguments.clear();
    if (!flag_first) o.arguments.emplace_back(command.name);
    return find_command("help");
}

// ==== 2. terminal ================================================================================
// What people see: safe text, colour, width, tables, JSON, progress, lines typed, Ctrl-C.

struct Stream {  // stdout or stderr; each decides for itself
    bool terminal = false, color = false;
};
struct Terminal {
    Stream out, err;
    std::size_t width = 80;  // columns of a table, and of text that is wrapped
    bool quiet = false, verbose = false;
} terminal;

std::string_view environment(const char* name) {
    const char* value = std::getenv(name);
    return value == nullptr ? "" : value;
}

void open_terminal(const Options& o) {
    const auto look = [&](int fd) {
        const bool is_terminal = ::isatty(fd) != 0;
        const std::string_view force = environment("CLICOLOR_FORCE");
        bool color = is_terminal && environment("TERM") != "dumb";
        if (!force.empty() && force != "0") color = true;
        if (!environment("NO_COLOR").empty()) color = false;
        if (o.color != "auto") color = o.color == "always";
        return Stream{is_terminal, color};
    };
    winsize size{};
    ::ioctl(1, TIOCGWINSZ, &size);
    long width = std::strtol(environment("COLUMNS").data(), nullptr, 10);
    if (width <= 0) width = size.ws_col > 0 ? size.ws_col : 80;
    terminal = {look(1), look(2), static_cast<std::size_t>(std::clamp(width, 20L, 1000L)), o.quiet,
                o.verbose};
}

// ---- safe text and its width

// Calls each(code point, its bytes) for every character of text; broken bytes count as U+FFFD.
template <class Each>
void each_character(std::string_view text, Each&& each) {
    const std::string valid = to_utf8(text);
    for (std::string_view rest = valid; !rest.empty();) {
        const auto c = detail::decode_utf8(rest);
        each(c.code, rest.substr(0, c.length));
        rest.remove_prefix(c.length);
    }
}

// Controls and bidirectional overrides: what can repaint, retitle or reorder a terminal.
bool is_unsafe(char32_t c) {
    return c < 0x20 || (c >= 0x7f && c < 0xa0) || c == 0x61c || c == 0x200e || c == 0x200f ||
           (c >= 0x2028 && c <= 0x202e) || (c >= 0x2066 && c <= 0x2069);
}
std::string hex(std::uint32_t value, int digits) {
    char text[16];
    std::snprintf(text, sizeof text, "%0*x", digits, value);
    return text;
}

// THE way of text from models, files and clients to a terminal: unsafe characters become visible
// escapes. Newline and tab stay if the text may have lines of its own.
std::string safe(std::string_view text, bool lines = false) {
    std::string out;
    each_character(text, [&](char32_t c, std::string_view bytes) {
        if (!is_unsafe(c) || (lines && (c == '\n' || c == '\t'))) {
            out += bytes;
        } else {
            out += c < 0x100 ? "\\x" + hex(c, 2) : "\\u" + hex(c, 4);
        }
    });
    return out;
}

// Columns of a character, as the C library knows them: 0 combining, 2 East Asian wide and emoji.
std::size_t columns(char32_t c) {
    static const bool known = std::setlocale(LC_CTYPE, "C.UTF-8") != nullptr;
    const int width = known ? ::wcwidth(static_cast<wchar_t>(c)) : 1;
    return width < 0 ? 1 : static_cast<std::size_t>(width);
}
std::size_t width_of(std::string_view text) {
    std::size_t width = 0;
    each_character(text, [&](char32_t c, std::string_view) { width += columns(c); });
    return width;
}
// Cut or padded with blanks to exactly `width` columns; a cut ends in "…".
std::string fit(std::string_view text, std::size_t width, bool right = false) {
    const std::size_t natural = width_of(text);
    std::string out;
    std::size_t used = 0;
    bool full = false;
    each_character(text, [&](char32_t c, std::string_view bytes) {
        full = full || (natural > width && used + columns(c) + 1 > width);
        if (!full) out += bytes, used += columns(c);
    });
    if (natural > width && width > 0) out += "…", used++;
    const std::string blanks(width - std::min(width, used), ' ');
    return right ? blanks + out : out + blanks;
}

// `text` broken at blanks into lines of the terminal's width, all but the first indented.
std::string wrapped(std::string_view text, std::size_t indent) {
    std::string out;
    std::size_t column = indent;
    for (const std::string& word : split(text, " ")) {
        const bool breaks = column > indent && column + 1 + width_of(word) > terminal.width;
        if (breaks) out += "\n" + std::string(indent, ' '), column = indent;
        if (column > indent) out += " ", column++;
        out += word, column += width_of(word);
    }
    return out + "\n";
}

std::string paint(const Stream& stream, const char* code, std::string_view text) {
    return stream.color ? cat("\x1b[", code, "m", text, "\x1b[0m") : std::string(text);
}
constexpr const char *kBold = "1", *kDim = "2", *kRed = "31", *kGreen = "32", *kYellow = "33";

// ---- writing: answers, notes

struct StreamLost : std::runtime_error {  // standard input or output cannot be used any more
    using std::runtime_error::runtime_error;
};
template <class Exception = StreamLost>
[[noreturn]] void fail_errno(std::string_view what) {
    throw Exception(cat(what, ": ", std::strerror(errno)));
}
// At once: a reader of the pipe waits for it, and a screen shows stderr too.
void write_out(std::string_view text) {
    if (std::fwrite(text.data(), 1, text.size(), stdout) != text.size() || std::fflush(stdout) != 0)
        fail_errno("cannot write to stdout");
}
// The bytes of an answer: made safe for eyes, unchanged for programs.
void write_answer(std::string_view text) {
    write_out(terminal.out.terminal ? safe(text, true) : std::string(text));
}
void write_err(std::string_view text) { std::fwrite(text.data(), 1, text.size(), stderr); }
// One line on stderr. The text may quote files and checkpoints.
void say(std::string_view text, const char* color = nullptr) {
    const std::string line = safe(text);
    write_err((color == nullptr ? line : paint(terminal.err, color, line)) + "\n");
}
void note(const std::string& text) {
    if (!terminal.quiet) say("note: " + text, kDim);
}

// ---- numbers, dates, tables

std::string decimals(double value, int digits) {
    char text[64];
    std::snprintf(text, sizeof text, "%.*f", digits, value);
    return text;
}
std::string thousands(std::int64_t value) {
    std::string text = std::to_string(value);
    for (auto at = std::ssize(text) - 3; at > 0; at -= 3)
        text.insert(static_cast<std::size_t>(at), ",");
    return text;
}
std::string human_bytes(std::uint64_t bytes) {
    static constexpr const char* kUnits[] = {"B", "kB", "MB", "GB", "TB"};
    auto value = static_cast<double>(bytes);
    std::size_t unit = 0;
    while (value >= 999.5 && unit < 4) value /= 1000, unit++;
    return decimals(value, unit > 0 && value < 9.95 ? 1 : 0) + " " + kUnits[unit];
}
std::string date_of(std::int64_t unix_seconds, const char* format, bool utc) {
    const auto time = static_cast<std::time_t>(unix_seconds);
    std::tm parts{};
    if ((utc ? ::gmtime_r(&time, &parts) : ::localtime_r(&time, &parts)) == nullptr) return "—";
    char text[64];
    return {text, std::strftime(text, sizeof text, format, &parts)};
}
std::string iso_date(std::int64_t unix_seconds) {
    return date_of(unix_seconds, "%Y-%m-%dT%H:%M:%SZ", true);
}

// A table fits the width: columns with the largest `leave` go first, then cells are cut.
struct Column {
    std::string_view title;
    bool right = false;
    int leave = 0;           // 0: stays
    std::size_t least = 12;  // it would rather keep so much than let others stay
    std::size_t width = 0;   // as its cells need
};
std::string table(std::vector<Column> head, std::vector<std::vector<std::string>> rows) {
    for (std::size_t c = 0; c < head.size(); c++) {
        Column& column = head[c];
        column.width = width_of(column.title);
        column.least = std::max(column.least, column.width);
        for (auto& row : rows)
            column.width = std::max(column.width, width_of(row[c] = safe(row[c])));
        column.least = std::min(column.least, column.width);
    }
    const auto total = [&](std::size_t Column::*columns) {
        std::size_t sum = 2 * (head.size() - 1);
        for (const Column& c : head) sum += c.*columns;
        return sum;
    };
    while (total(&Column::least) > terminal.width) {
        const auto goes = std::ranges::max_element(head, {}, &Column::leave);
        if (goes->leave == 0) break;
        for (auto& row : rows) row.erase(row.begin() + (goes - head.begin()));
        head.erase(goes);
    }
    while (total(&Column::width) > terminal.width) {  // the one furthest above its wish gives way
        const auto excess = [](const Column& c) {
            return std::pair(std::max(c.width, c.least) - c.least, c.width);
        };
        const auto widest = std::ranges::max_element(head, {}, excess);
        if (widest->width <= 4) break;
        widest->width--;
    }
    std::string text;
    const auto add_row = [&](const auto& cell, const char* color) {
        std::string line;
        for (std::size_t c = 0; c < head.size(); c++)
            line += (c ? "  " : "") + fit(cell(c), head[c].width, head[c].right);
        line.erase(line.find_last_not_of(' ') + 1);
        text += (color == nullptr ? line : paint(terminal.out, color, line)) + "\n";
    };
    add_row([&](std::size_t c) { return head[c].title; }, kBold);
    for (const auto& row : rows)
        add_row([&](std::size_t c) { return std::string_view(row[c]); }, nullptr);
    return text;
}

// ---- JSON: a Value is finished text, so a document is one expression -------------------------------
struct Value {
    std::string text;
    Value(std::nullptr_t) : text("null") {}
    template <std::same_as<bool> Bool>
    Value(Bool value) : text(value ? "true" : "false") {}
    template <std::integral Int>
    requires(!std::same_as<Int, bool>) Value(Int value) : text(std::to_string(value)) {}
    template <std::floating_point Real>
    Value(Real value) : text("null") {  // JSON has no NaN and no infinity
        char digits[32];
        const auto end = std::to_chars(digits, digits + sizeof digits, value).ptr;
        if (std::isfinite(value)) text.assign(digits, end);
    }
    Value(std::string_view value) : text("\"") {
        each_character(value, [&](char32_t c, std::string_view bytes) {
            if (c == '"' || c == '\\') {
                text += '\\', text += bytes;
            } else if (c == '\n') {
                text += "\\n";
            } else if (is_unsafe(c)) {
                text += "\\u" + hex(c, 4);
            } else {
                text += bytes;
            }
        });
        text += '"';
    }
    Value(const std::string& value) : Value(std::string_view(value)) {}
    Value(const char* value) : Value(std::string_view(value)) {}
};
using Members = std::vector<std::pair<std::string_view, Value>>;
Value raw(std::string text) {
    Value value(nullptr);
    value.text = std::move(text);
    return value;
}
Value object(const Members& members) {
    return raw(cat("{",
                   join(members, ",",
                        [](const auto& m) { return cat(Value(m.first).text, ":", m.second.text); }),
                   "}"));
}
template <class Range, class Each = std::identity>
Value array(const Range& items, Each each = {}) {
    return raw(
        cat("[", join(items, ",", [&](const auto& item) { return Value(each(item)).text; }), "]"));
}
Value merged(const Value& a, const Value& b) {  // one object with the members of both
    return raw(cat(a.text.substr(0, a.text.size() - 1), ",", b.text.substr(1)));
}
void write_json(const Value& value) { write_out(value.text + "\n"); }
double milliseconds(double seconds) { return std::round(seconds * 1e4) / 10; }
// Infinities in a loss, empty words in a reason: null.
Value or_null(std::string_view text) { return text.empty() ? Value(nullptr) : Value(text); }

// ---- Ctrl-C: a flag for loops, a pipe for poll(); a second one that nobody took up ends the program --
std::atomic<int> interrupts = 0;
int wake_pipe[2] = {-1, -1};

void on_interrupt(int) {
    const int error = errno;
    if (interrupts.fetch_add(1) > 0) {
        ::signal(SIGINT, SIG_DFL);
        ::raise(SIGINT);
    }
    [[maybe_unused]] const auto wrote = ::write(wake_pipe[1], "!", 1);  // full: it wakes anyway
    errno = error;
}
void catch_interrupts() {
    if (::pipe2(wake_pipe, O_NONBLOCK | O_CLOEXEC) != 0) fail_errno("cannot wait for Ctrl-C");
    struct sigaction action {};
    action.sa_handler = on_interrupt;
    ::sigemptyset(&action.sa_mask);
    ::sigaction(SIGINT, &action, nullptr);
}
bool interrupted() { return interrupts.load() > 0; }
void forget_interrupts() {
    char bytes[64];
    while (wake_pipe[0] >= 0 && ::read(wake_pipe[0], bytes, sizeof bytes) > 0) {
    }
    interrupts = 0;
}
// Leaves as the signal's default action would: shells report 130.
[[noreturn]] void leave_interrupted() {
    std::fflush(nullptr);
    ::signal(SIGINT, SIG_DFL);
    ::raise(SIGINT);
    ::_exit(130);
}

// ---- lines typed, progress, new files

// Lines of stdin. Ctrl-C and the end of the file are told apart.
class LineReader {
public:
    enum class Result { line, end, interrupted };
    Result read(std::string& line) {
        std::size_t end;
        while ((end = buffer_.find('\n')) == buffer_.npos && !at_end_) {
            if (!fill()) return Result::interrupted;
        }
        if (buffer_.empty()) return Result::end;
        line = buffer_.substr(0, end);
        buffer_.erase(0, end == buffer_.npos ? end : end + 1);
        if (line.ends_with('\r')) line.pop_back();
        return Result::line;
    }
    std::string rest() {  // everything to the end
        while (!at_end_) {
            if (!fill()) leave_interrupted();
        }
        return std::move(buffer_);
    }

private:
    bool fill() {  // false: Ctrl-C
        pollfd wait[2] = {{0, POLLIN, 0}, {wake_pipe[0], POLLIN, 0}};
        if (::poll(wait, 2, -1) < 0 && errno != EINTR) fail_errno("cannot wait for stdin");
        if (interrupted()) {
            buffer_.clear();
            return false;
        }
        if (wait[0].revents == 0) return true;
        if (buffer_.size() > kMostBytes) throw StreamLost("stdin: more than 16 MiB without an end");
        char bytes[65536];
        const ssize_t n = ::read(0, bytes, sizeof bytes);
        if (n < 0 && errno != EINTR && errno != EAGAIN) fail_errno("cannot read stdin");
        if (n > 0) buffer_.append(bytes, static_cast<std::size_t>(n));
        at_end_ = n == 0;
        return true;
    }
    static constexpr std::size_t kMostBytes = 16u << 20;
    std::string buffer_;
    bool at_end_ = false;
};

// A bar on a terminal, after 0.3 s and at most 10 times a second, erased when done; else a line per 5 s.
class Progress {
public:
    explicit Progress(std::string what) : what_(std::move(what)) {}
    ~Progress() {
        if (drawn_) std::fputs("\r\x1b[K", stderr);
    }
    bool operator()(std::uint64_t done, std::uint64_t total) {
        const double now = seconds_since(start_);
        const bool bar = terminal.err.terminal && environment("TERM") != "dumb";
        const bool early = now < (bar ? 0.3 : 5.0) || now - last_ < (bar ? 0.1 : 5.0);
        if (terminal.quiet || early || total == 0) return !interrupted();
        last_ = now;
        const double share = static_cast<double>(done) / static_cast<double>(total);
        const auto filled = std::min<std::size_t>(24, static_cast<std::size_t>(share * 24));
        const std::string percent = decimals(100 * share, 0) + "%";
        if (bar) {
            drawn_ = true;
            const std::string picture = std::string(filled, '#') + std::string(24 - filled, '.');
            write_err(cat("\r\x1b[K", fit(safe(what_), 30), " [", picture, "] ", percent));
        } else {
            say(cat(what_, " ", percent));
        }
        return !interrupted();
    }

private:
    std::string what_;
    Clock::time_point start_ = Clock::now();
    double last_ = 0;
    bool drawn_ = false;
};

// A file that appears whole or not at all: written beside the target, then renamed. What is no regular
// file (/dev/null, a FIFO) is written in place.
class NewFile {
public:
    explicit NewFile(const std::string& target) : target_(target) {
        std::error_code error;
        if (fs::is_symlink(target, error)) target_ = fs::canonical(target, error).string();
        const bool in_place = fs::exists(target_, error) && !fs::is_regular_file(target_, error);
        path_ = in_place ? target_ : target_ + ".part-" + std::to_string(::getpid());
        file_ = std::fopen(path_.c_str(), "wb");
        if (file_ == nullptr) fail("cannot write");
    }
    NewFile(const NewFile&) = delete;
    NewFile& operator=(const NewFile&) = delete;
    ~NewFile() {
        if (file_ == nullptr) return;
        std::fclose(file_);
        if (path_ != target_) ::unlink(path_.c_str());
    }
    void write(std::string_view bytes) {
        if (std::fwrite(bytes.data(), 1, bytes.size(), file_) != bytes.size()) fail("cannot write");
    }
    void commit() {
        if (std::fflush(file_) != 0) fail("cannot write");
        std::fclose(std::exchange(file_, nullptr));
        if (path_ != target_ && std::rename(path_.c_str(), target_.c_str()) != 0)
            fail("cannot rename to");
    }

private:
    [[noreturn]] void fail(const char* what) {
        fail_errno<std::runtime_error>(cat(what, " ", detail::quote(target_, 300)));
    }
    std::string target_, path_;
    std::FILE* file_ = nullptr;
};

// ==== 3. pick ====================================================================================
// From what was typed to a checkpoint (nanochat's rules: largest d-number, last step), from the
// checkpoint to a loaded model. When no nanochat directory is found, the model shipped with the program.

// ---- which checkpoint

struct Wanted {  // what was asked for; empty or -1: not said
    std::string source, tag;
    std::int64_t step = -1;
    bool any_source = false;  // a bare tag means it wherever it is
};
constexpr std::string_view kSourceOrder[] = {"sft", "rl", "mid", "base"};
std::string words_of(const Wanted& w) {
    std::vector<std::string> parts;
    if (!w.source.empty()) parts.push_back(w.source);
    if (!w.tag.empty()) parts.push_back(w.tag);
    if (w.step >= 0) parts.push_back(cat(parts.empty() ? "step " : "", w.step));
    return join(parts, "/");
}

// The ids of --model: sft, sft/d12, sft/d12/2000, d12, d12_step2000, default, and the names that some
// API clients insist on.
Wanted parse_id(std::string_view id) {
    if (has(split("default nanochat gpt-3.5-turbo gpt-4o-mini", " "), id)) return {};
    const std::string_view wanted = "an id such as sft/d12/2000, or the path of a model_*.pt";
    const auto step = [&](const std::string& text) {
        return number<std::int64_t>({"--model", text}, 0, 999'999'999'999, wanted);
    };
    std::vector<std::string> parts = split(id, "/");
    if (parts.empty() || parts.size() > 3) bad_value({"--model", id}, wanted);
    if (parts.size() == 1 && !has(kSourceOrder, parts[0])) {
        const std::size_t at = parts[0].find("_step");
        if (at == std::string::npos) return {"", parts[0], -1, true};
        return {"", parts[0].substr(0, at), step(parts[0].substr(at + 5)), true};
    }
    parts.resize(3);
    return {parts[0], parts[1], parts[2].empty() ? -1 : step(parts[2]), false};
}

// "sft/d12 (steps 500, 1000, 2000), base/d20 (step 15000)"
std::string found_ids(std::span<const ModelInfo* const> models) {
    std::vector<std::string> tags;
    for (std::size_t i = 0; i < models.size() && tags.size() < 6;) {
        std::vector<std::int64_t> steps;
        const ModelInfo& m = *models[i];
        for (; i < models.size() && models[i]->source == m.source && models[i]->tag == m.tag; i++)
            steps.push_back(models[i]->step);
        if (steps.size() > 8) steps.resize(8);  // the last ones: models come latest first
        std::sort(steps.begin(), steps.end());
        const auto words = [](std::int64_t step) { return std::to_string(step); };
        tags.push_back(cat(m.source, "/", m.tag, steps.size() > 1 ? " (steps " : " (step ",
                           join(steps, ", ", words), ")"));
    }
    return join(tags, ", ");
}

std::string home_relative(const fs::path& path) {
    const std::string text = path.string(), home(environment("HOME"));
    return !home.empty() && text.starts_with(home + "/") ? "~" + text.substr(home.size()) : text;
}
std::string nothing_in(const fs::path& base) {
    std::error_code error;
    return cat(fs::is_directory(base, error) ? "no checkpoint in " : "no directory ",
               home_relative(base));
}
[[noreturn]] void no_checkpoints(const fs::path& base) {
    throw Error(ErrorKind::not_found,
                cat(nothing_in(base),
                    ": looked for model_<step>.pt in base_checkpoints, mid_checkpoints, "
                    "chatsft_checkpoints and chatrl_checkpoints. Point elsewhere with --base-dir "
                    "DIR or NANOCHAT_BASE_DIR"));
}
[[noreturn]] void no_such(const Wanted& w, const std::vector<const ModelInfo*>& ready) {
    std::vector<const ModelInfo*> near;
    std::copy_if(ready.begin(), ready.end(), std::back_inserter(near),
                 [&](auto* m) { return m->source == w.source; });
    if (near.empty()) near = ready;
    const std::string found = near.empty() ? "nothing that is ready" : found_ids(near);
    throw Error(ErrorKind::not_found,
                cat("no checkpoint \"", words_of(w), "\": found ", found, ". Try: nanogpt models"));
}

ErrorKind kind_of(Status status) {
    if (status == Status::unsupported) return ErrorKind::unsupported;
    if (status == Status::too_large) return ErrorKind::out_of_memory;
    return ErrorKind::refused;
}

// The default among several: the largest d-number, else the tag changed last; of it the last step.
const ModelInfo* best_of(const std::vector<const ModelInfo*>& models) {
    const auto rank = [](const ModelInfo* m) {
        return std::pair(detail::depth_of(m->tag), m->modified);
    };
    const ModelInfo* best = *std::ranges::max_element(models, {}, rank);
    for (const ModelInfo* m : models) {
        if (m->tag == best->tag && m->step > best->step) best = m;
    }
    return best;
}

// The checkpoint that is wanted, out of all found. Only one that is ready can be chosen.
const ModelInfo& choose(const std::vector<ModelInfo>& models, Wanted w,
                        const std::string& preferred) {
    using Found = std::vector<const ModelInfo*>;
    const bool named = !words_of(w).empty();
    const auto fitting = [&](const Wanted& x, bool is_ready) {
        Found found;
        for (const ModelInfo& m : models) {
            const bool fits = (x.source.empty() || m.source == x.source) &&
                              (x.tag.empty() || m.tag == x.tag) && (x.step < 0 || m.step == x.step);
            if (fits && (m.status == Status::ready) == is_ready) found.push_back(&m);
        }
        return found;
    };
    const Found ready = fitting({}, true);
    if (w.source.empty()) {  // the first that has one, for a bare tag one of this tag
        const Found among = w.any_source ? fitting(w, true) : ready;
        if (w.any_source && w.step >= 0 && among.size() > 1)
            bad_usage(
                cat("--model: ", w.tag, "_step", w.step, " is ", found_ids(among), ". Name one"));
        const auto there = [&](std::string_view source) {
            return std::ranges::find(among, source, &ModelInfo::source) != among.end();
        };
        if (there(preferred) || !w.any_source) w.source = preferred;
        for (const std::string_view source : kSourceOrder) {
            if (!there(w.source) && there(source)) w.source = source;
        }
    }
    if (const Found found = fitting(w, true); !found.empty()) return *best_of(found);
    const Found broken = fitting(w, false);
    if (!broken.empty() && (named || ready.empty()))
        throw Error(kind_of(broken[0]->status), broken[0]->id + ": " + broken[0]->reason);
    no_such(w, ready);
}

// The model shipped with the program: in the source tree it was built from, or beside the installed
// binary. Empty if there is none.
fs::path bundled_sample() {
    std::error_code error;
    std::vector<fs::path> places;
#ifdef NANOGPT_SOURCE_DIR
    places.push_back(fs::path(NANOGPT_SOURCE_DIR) / "tools" / "sample");
#endif
    const fs::path self = fs::read_symlink("/proc/self/exe", error);
    places.push_back(self.parent_path().parent_path() / "share" / "nanogpt" / "sample");
    for (const fs::path& place : places) {
        if (fs::is_directory(place / "chatsft_checkpoints", error)) return place;
    }
    return {};
}

Wanted wanted(const Options& o) {
    if (o.model.empty()) return {.source = o.source, .tag = o.tag, .step = o.step};
    if (!o.source.empty() || !o.tag.empty() || o.step >= 0) {
        bad_usage("--model names source, tag and step: leave out -i, -g and -s beside it");
    }
    return parse_id(o.model);
}

struct Tokens {  // of the base directory's tokenizer
    int vocab_size = 0;
    std::string reason;  // why it cannot be used
};
Tokens base_tokenizer(const fs::path& base) {
    try {
        return {load_tokenizer(base / "tokenizer" / "tokenizer.pkl").vocab_size(), ""};
    } catch (const Error& e) {
        return {0, e.what()};
    }
}

// The checkpoints of a base directory; those that its tokenizer, if not known read here, does not fit
// cannot be used. Who has looked here before is told nothing twice.
std::vector<ModelInfo> models_in(const fs::path& base, const Options& o,
                                 const Tokens* known = nullptr, bool tell = true) {
    std::vector<std::string> skipped;
    std::vector<ModelInfo> models = find_models(base, o.overrides, &skipped);
    if (tell) {
        for (const std::string& warning : skipped) note(warning);
    }
    const bool any = !models.empty() && o.tokenizer.empty();
    const Tokens tokens = !any ? Tokens{} : known != nullptr ? *known : base_tokenizer(base);
    std::error_code error;
    for (ModelInfo& m : models) {
        const bool own = fs::exists(m.model_file.parent_path() / "tokenizer.pkl", error);
        if (m.status != Status::ready || own || tokens.vocab_size == 0 ||
            tokens.vocab_size == m.config.vocab_size) {
            continue;
        }
        m.status = Status::no_tokenizer;
        m.reason = cat("needs a tokenizer of ", thousands(m.config.vocab_size),
                       " tokens, the one here has ", thousands(tokens.vocab_size));
    }
    return models;
}

void tell_sample(const fs::path& base) {
    say(nothing_in(base) + ": using the sample model shipped with nanogpt", kDim);
}
bool is_path(std::string_view model) {
    return model.starts_with('/') || model.starts_with('.') || model.ends_with(".pt");
}

// `or_bundled`: chat and sample work without any checkpoint of one's own; o.base_dir then becomes the
// bundled one.
ModelInfo pick_model(Options& o, const std::string& preferred, bool or_bundled) {
    if (is_path(o.model)) {
        if (!o.source.empty() || !o.tag.empty())
            bad_usage("--model names a path: leave out -i and -g beside it");
        return inspect_model(o.model, o.step, o.overrides);
    }
    const Wanted w = wanted(o);
    const fs::path base = base_dir(o.base_dir);
    std::vector<ModelInfo> models = models_in(base, o);
    if (models.empty()) {
        const bool asked = !o.base_dir.empty() || !o.tag.empty() || o.step >= 0 || !o.model.empty();
        const fs::path sample = or_bundled && !asked ? bundled_sample() : fs::path();
        if (sample.empty()) no_checkpoints(base);
        tell_sample(base);
        o.base_dir = sample.string();
        models = find_models(sample, o.overrides);
    }
    ModelInfo chosen = choose(models, w, preferred);
    const bool left_open = w.source.empty() && !w.any_source;
    if (left_open && chosen.source != preferred)
        note("no " + preferred + " checkpoint, using " + chosen.id);
    return chosen;
}

// ---- on which device, and whether it fits

// Bytes of keys and values for one token: K heads of hd, both, in all layers; bfloat16 on a GPU.
std::uint64_t cache_bytes(const Config& c, bool cuda) {
    const std::int64_t numbers = std::int64_t{2} * c.n_layer * c.n_kv_head * c.head_dim();
    return static_cast<std::uint64_t>(numbers) * size_of(cuda ? DType::bf16 : DType::f32);
}
std::uint64_t weight_bytes(const ModelInfo& info, DType dtype) {
    return dtype == DType::f32 ? info.memory_bytes
                               : static_cast<std::uint64_t>(info.parameters) * size_of(dtype);
}

std::string capability(const GpuInfo& gpu) { return cat(gpu.major, ".", gpu.minor); }

// The GPU that is used is the first.
std::optional<GpuInfo> gpu_in_use(bool cuda) {
    return cuda ? std::optional(find_gpus().at(0)) : std::nullopt;
}

// Where to compute and with which type of weights: on the GPU if it can be used, else on the CPU.
struct Place {
    bool cuda = false;
    DType dtype = DType::f32;
    std::string reason = {};  // why the GPU is not used, if nobody asked for the CPU
};
Place place_for(const Options& o) {
    const DType on_cpu = o.dtype.value_or(DType::f32);
    if (o.device_type == "cpu") return {false, on_cpu};
    const std::string problem = cuda_problem();
    if (!problem.empty()) return {false, on_cpu, problem};
    if (o.dtype == DType::f32) return {false, on_cpu, "the GPU has no -d float32"};
    return {true, DType::bf16};
}

// --device-type cuda means it: what stands against it is an error and no note.
[[noreturn]] void no_cuda(const std::string& why) {
    throw Error(ErrorKind::device,
                cat("--device-type cuda: ", why,
                    ". nanogpt doctor tells more; --device-type cpu works everywhere"));
}
void check_device(const Options& o) {
    if (o.device_type == "mps") {
        throw Error(ErrorKind::device,
                    "--device-type mps: Apple's GPUs are not supported. Use --device-type cpu");
    }
    if (o.device_type != "cuda" || o.command == "doctor") return;
    if (o.dtype == DType::f32) {
        bad_usage(
            "--device-type cuda: the GPU computes with bfloat16 weights. Leave out -d float32, or "
            "use --device-type cpu");
    }
    if (const std::string problem = cuda_problem(); !problem.empty()) no_cuda(problem);
}
// Once per start: every answer shows the device.
void tell_reason(const std::string& reason) {
    static bool told = false;
    if (reason.empty() || !(kHasCuda || terminal.verbose) || std::exchange(told, true)) return;
    note("computing on the CPU: " + reason);
}

void tell_warnings(const ModelInfo& info) {
    for (const std::string& warning : info.warnings) note(info.id + ": " + warning);
    if (!terminal.verbose) return;
    for (const Setting& s : info.settings)
        note(cat(s.name, " ", s.value, " (", name_of(s.origin), ")"));
}

using Watch = std::function<bool(std::uint64_t done, std::uint64_t total)>;  // false stops
std::shared_ptr<const Model> load(const ModelInfo& info, const Options& o, DType dtype,
                                  const Watch& watch = {}) {
    Progress progress("loading " + info.id);
    return load_model(info, {.dtype = dtype,
                             .threads = o.threads,
                             .overrides = o.overrides,
                             .progress = watch ? watch : Watch(std::ref(progress))});
}
// Refuses before anything is allocated: weights of this type, if they are still to come, and the keys
// and values of some tokens.
void check_memory(const ModelInfo& info, std::optional<DType> weights, std::int64_t tokens) {
    const std::uint64_t need = (weights ? weight_bytes(info, *weights) : 0) +
                               cache_bytes(info.config, false) * static_cast<std::uint64_t>(tokens);
    if (const std::uint64_t have = nanogpt::detail::available_memory(); have > 0 && need > have) {
        throw Error(ErrorKind::out_of_memory,
                    cat(info.id, ": needs ", human_bytes(need), " of memory, ", human_bytes(have),
                        " is available. Close other programs or choose a smaller model"));
    }
}

// Memory left to others.
std::uint64_t default_reserve(bool cuda) {
    const std::uint64_t tenth = nanogpt::detail::total_memory() / 10, gib = std::uint64_t{1} << 30;
    const std::optional<GpuInfo> gpu = gpu_in_use(cuda);
    return gpu && gpu->integrated ? gpu->reserve_bytes : std::min(gib, tenth);
}

struct Device {
    std::unique_ptr<Backend> backend;
    bool cuda = false;
    Tensor lm_head = {};  // for who looks into the model, if it was asked for
};
// The output matrix alone, for when the model it belongs to is only on the GPU.
Tensor copy_of(const Tensor& t) {
    const std::shared_ptr<std::byte> bytes = detail::allocate(t.bytes());
    std::copy_n(t.data.get(), t.bytes(), bytes.get());
    return {t.dtype, t.shape, bytes};
}
// On the GPU the copy of the weights in the CPU's memory is gone when this returns. Too little memory
// there is an error: where the CPU shares it, it has no more.
Device open_device(const ModelInfo& info, const Options& o, const CudaOptions& options = {},
                   const Watch& watch = {}, bool with_head = false) {
    Place place = place_for(o);
    if (place.cuda) {
        std::shared_ptr<const Model> model = load(info, o, place.dtype, watch);
        Tensor head = with_head ? copy_of(model->weights().lm_head) : Tensor{};
        try {
            return {open_cuda(std::move(model), options), true, std::move(head)};
        } catch (const Error& e) {
            if (e.kind != ErrorKind::device && e.kind != ErrorKind::unsupported) throw;
            if (o.device_type == "cuda") no_cuda(e.what());
            place = {false, o.dtype.value_or(DType::f32), e.what()};
        }
    }
    tell_reason(place.reason);
    check_memory(info, place.dtype, info.config.sequence_len);
    const std::shared_ptr<const Model> model = load(info, o, place.dtype, watch);
    return {open_cpu(model), false, with_head ? model->weights().lm_head : Tensor{}};
}

Tokenizer open_tokenizer(const fs::path& path) {
    Tokenizer tokenizer = load_tokenizer(path);
    for (const std::string& warning : tokenizer.warnings()) note("tokenizer: " + warning);
    return tokenizer;
}

// ---- a session

struct Session {  // one model, ready to answer
    ModelInfo info;
    Tokenizer tokenizer;
    Device device = {};
    double load_seconds = 0;
};
// All but the device.
Session pick_session(Options& o, const std::string& preferred) {
    ModelInfo info = pick_model(o, preferred, true);
    Tokenizer tokenizer =
        open_tokenizer(o.tokenizer.empty() ? find_tokenizer(info) : fs::path(o.tokenizer));
    if (tokenizer.vocab_size() != info.config.vocab_size) {
        throw Error(ErrorKind::refused, cat(info.id, ": the tokenizer has ", tokenizer.vocab_size(),
                                            " tokens, the model ", info.config.vocab_size,
                                            ". Name the right one with --tokenizer FILE"));
    }
    tell_warnings(info);
    return {std::move(info), std::move(tokenizer)};
}
Session open_session(Options& o, const std::string& preferred) {
    Session s = pick_session(o, preferred);
    const auto start = Clock::now();
    s.device = open_device(s.info, o);
    s.load_seconds = seconds_since(start);
    return s;
}

std::string loss_words(const ModelInfo& info) {
    return std::isfinite(info.loss) ? decimals(info.loss, 3) + " " + info.loss_unit : "—";
}

// ==== 4. sample, chat ============================================================================
// The two commands that write text. An answer goes out as text, as one JSON object, or as one JSON
// object per piece; the stats line goes to stderr.

struct Answer : ReplyStats {
    std::string text;
    double first_seconds = 0;  // until the first piece of the text
};
std::string_view finish_word(StopReason reason) {
    if (reason == StopReason::stop_token) return "stop";
    return reason == StopReason::cancelled ? "cancelled" : "length";
}
double tokens_per_second(const Answer& a) {  // the first token is the prompt's
    const bool several = a.completion_tokens > 1 && a.decode_seconds > 0;
    if (several) return (a.completion_tokens - 1) / a.decode_seconds;
    return a.prefill_seconds > 0 ? a.completion_tokens / a.prefill_seconds : 0;
}

// Takes the pieces of one answer; false when Ctrl-C asks to stop.
struct Output {
    const Options& options;
    int sample = 0;
    Answer answer = {};
    Clock::time_point start = Clock::now();

    bool operator()(std::string_view piece) {
        if (piece.empty()) return !interrupted();
        if (answer.text.empty()) answer.first_seconds = seconds_since(start);
        answer.text += piece;
        if (options.stream_json) {
            Members members = {{"text", piece}};
            if (options.num_samples > 1) members.insert(members.begin(), {"sample", sample});
            write_json(object(members));
        } else if (!options.json) {
            write_answer(piece);
        }
        return !interrupted();
    }
};

void show_stats(const Options& o, const Session& s, const Answer& a) {
    if (!o.stats.value_or(terminal.err.terminal && !terminal.quiet)) return;
    const int used = a.prompt_tokens + a.completion_tokens;
    say(cat("[", a.completion_tokens, " tokens · ", decimals(tokens_per_second(a), 0),
            " tok/s · first token ", decimals(1000 * a.first_seconds, 0), " ms · context ", used,
            "/", s.info.config.sequence_len, " · ", finish_word(a.reason), " · seed ",
            o.sampling.seed, "]"),
        kDim);
}

Value usage_json(int prompt_tokens, int completion_tokens) {
    return object({{"prompt_tokens", prompt_tokens},
                   {"completion_tokens", completion_tokens},
                   {"total_tokens", prompt_tokens + completion_tokens}});
}
// `before`: what took the time before the prompt was read.
Value timings_json(std::string_view before, double seconds, const Answer& a) {
    return object({{before, milliseconds(seconds)},
                   {"prefill_ms", milliseconds(a.prefill_seconds)},
                   {"decode_ms", milliseconds(a.decode_seconds)},
                   {"ttft_ms", milliseconds(a.first_seconds)},
                   {"tokens_per_second", std::round(10 * tokens_per_second(a)) / 10}});
}
// The object of --json; with several samples their texts stand in "samples".
void write_answers(const Options& o, const Session& s, std::string_view prompt,
                   std::span<const Answer> answers) {
    const Answer& first = answers[0];
    int completion = 0;
    for (const Answer& a : answers) completion += a.completion_tokens;
    Members members = {{"model", s.info.id}, {"prompt", prompt}};
    if (answers.size() == 1) {
        members.insert(members.end(),
                       {{"text", first.text}, {"finish_reason", finish_word(first.reason)}});
    } else {
        members.emplace_back("samples", array(answers, [](const Answer& a) {
                                 return object({{"text", a.text},
                                                {"finish_reason", finish_word(a.reason)},
                                                {"completion_tokens", a.completion_tokens}});
                             }));
    }
    members.insert(members.end(), {{"seed", o.sampling.seed},
                                   {"usage", usage_json(first.prompt_tokens, completion)},
                                   {"timings", timings_json("load_ms", s.load_seconds, first)},
                                   {"device", s.device.backend->device()},
                                   {"dtype", name_of(s.device.backend->dtype())}});
    if (o.stream_json) members.insert(members.begin(), {"done", true});
    write_json(object(members));
}

// ---- sample

std::string valid_text(std::string_view what, const std::string& text) {
    const std::string valid = to_utf8(text);
    if (valid != text)
        note(cat("the ", what, " is not valid UTF-8, its broken bytes are read as U+FFFD"));
    return valid;
}
// The prompt of -p, or all of stdin but its last newline for "-p -".
std::string read_prompt(const Options& o) {
    std::string prompt = *o.prompt == "-" ? LineReader().rest() : *o.prompt;
    if (*o.prompt == "-" && prompt.ends_with('\n')) prompt.pop_back();
    if (*o.prompt == "-" && prompt.ends_with('\r')) prompt.pop_back();
    return valid_text("prompt", prompt);
}

// A continuation ends at any special token: <|bos|> begins another document.
std::vector<Token> special_tokens(const Tokenizer& tokenizer) {
    std::vector<Token> ids;
    for (Token id = 0; id < tokenizer.vocab_size(); id++) {
        if (tokenizer.is_special(id)) ids.push_back(id);
    }
    return ids;
}

// One continuation of the prompt. What the sequence holds of it is not read again, so only the first
// sample pays for the prompt.
Answer complete(const Options& o, Session& s, Sequence& sequence, std::span<const Token> prompt,
                int index) {
    const GenerateParams params = {o.max_tokens, o.sampling, special_tokens(s.tokenizer)};
    TextStream stream(s.tokenizer, o.stop);
    Output output = {o, index};
    Answer& answer = output.answer;
    answer.prompt_tokens = static_cast<int>(prompt.size());
    const auto on_token = [&](Generated generated) {
        if (answer.completion_tokens++ == 0) answer.prefill_seconds = seconds_since(output.start);
        if (s.tokenizer.is_special(generated.token)) return true;  // ends it, unseen
        return output(stream.push(generated.token)) && !stream.stopped();
    };
    answer.reason = generate(*s.device.backend, sequence, prompt, params, on_token, nullptr,
                             static_cast<std::uint64_t>(index));
    if (answer.reason != StopReason::cancelled) output(stream.finish());
    if (stream.stopped()) answer.reason = StopReason::stop_token;
    answer.decode_seconds = seconds_since(output.start) - answer.prefill_seconds;
    return answer;
}

int run_sample(Options& o) {
    if (!o.prompt)
        bad_usage(
            "sample: there is no prompt. Give one with -p TEXT, or -p - to read it from stdin");
    catch_interrupts();
    const std::string prompt = read_prompt(o);
    Session s = open_session(o, "base");
    std::vector<Token> ids = s.tokenizer.encode(prompt);
    ids.insert(ids.begin(), s.tokenizer.special("<|bos|>"));
    const std::unique_ptr<Sequence> sequence =
        s.device.backend->new_sequence(s.info.config.sequence_len);
    const bool as_text = !o.json && !o.stream_json;
    std::vector<Answer> answers;
    for (int i = 0; i < o.num_samples && !interrupted(); i++) {
        if (i > 0 && as_text) write_out("-----\n");
        answers.push_back(complete(o, s, *sequence, ids, i));
        if (as_text) write_out("\n");
        show_stats(o, s, answers.back());
    }
    if (!as_text && !answers.empty()) write_answers(o, s, prompt, answers);
    if (interrupted()) leave_interrupted();
    return 0;
}

// ---- chat

int report(const Options& o, const std::exception& e);
std::string list_models(const Options& o);
std::string token_table(const Tokenizer& tokenizer, std::span<const Token> tokens);

constexpr std::string_view kRoles[] = {"system", "user", "assistant"};
std::string_view name_of(Role role) { return kRoles[static_cast<std::size_t>(role)]; }

// The conversation: reads lines, `"""` blocks and slash commands until the end of stdin.
class Repl {
public:
    explicit Repl(Options& o) : options_(o), interactive_(::isatty(0) != 0) { open(options_); }

    int run() {
        banner();
        while (!done_) {
            try {
                if (interactive_) write_err("\n");
                std::string line;
                if (next_line("User:", line)) obey(line);
            } catch (const StreamLost&) {
                throw;
            } catch (const std::exception& e) {
                failure_ = interrupted() ? 0 : report(options_, e);
                if (failure_ == 6) {  // a GPU that failed does not come back in this process
                    if (!interactive_) break;
                    note("start again to go on; /save FILE keeps what was said");
                }
            }
            forget_interrupts();
        }
        if (interactive_ && !terminal.quiet) say("Goodbye!");
        return interactive_ ? 0 : failure_;
    }

    // Says one message and writes the answer out.
    void reply(const std::string& message) {
        Output output = {options_};
        chat_->params() = {options_.max_tokens, options_.sampling, {}};
        const int dropped = chat_->stats().dropped_messages;
        chat_->reply(message, std::ref(output));
        const Answer answer = {chat_->stats(), output.answer.text, output.answer.first_seconds};
        const bool as_text = !options_.json && !options_.stream_json;
        if (as_text) write_out("\n");
        if (answer.dropped_messages > dropped) {
            note(cat("the model no longer sees the first ", answer.dropped_messages,
                     " messages (context ", session_->info.config.sequence_len, ")"));
        }
        show_stats(options_, *session_, answer);
        if (!as_text) write_answers(options_, *session_, message, {&answer, 1});
    }

private:
    void open(Options o) {
        auto session = std::make_unique<Session>(open_session(o, "sft"));
        auto chat = std::make_unique<Chat>(*session->device.backend, session->tokenizer);
        chat->system() = o.system;
        chat->stop_texts() = o.stop;
        if (chat_) chat->load(chat_->messages());  // read again with the new model
        chat_ = std::move(chat);                   // before the session it points into
        session_ = std::move(session);
        options_ = std::move(o);
    }

    void banner() const {
        const ModelInfo& info = session_->info;
        const Backend& backend = *session_->device.backend;
        if (terminal.quiet || !interactive_) return;
        const std::string loss = std::isfinite(info.loss) ? " · val loss " + loss_words(info) : "";
        say(cat("nanogpt chat · ", info.source, "/", info.tag, " step ", info.step, loss, " · ",
                backend.device(), ", ", name_of(backend.dtype())));
        if (info.source == "base")
            note("a base model was not trained to chat; nanogpt sample lets it continue a text");
        say("Type 'quit' or 'exit' to end, 'clear' to start over, /help for more.");
    }

    // False: there is no line, after Ctrl-C or at the end.
    bool next_line(std::string_view prompt, std::string& line) {
        if (interactive_) write_err(paint(terminal.err, kGreen, prompt) + " ");
        const LineReader::Result result = input_.read(line);
        if (result == LineReader::Result::line) return true;
        done_ = result == LineReader::Result::end;
        if (interactive_) write_err("\n");
        if (done_) return false;
        const bool again = seconds_since(std::exchange(last_interrupt_, Clock::now())) < 2;
        if (again || !interactive_) leave_interrupted();
        forget_interrupts();
        say("Ctrl-C again, or Ctrl-D, to leave");
        return false;
    }

    void obey(std::string line) {
        constexpr const char* kBlanks = " \t\r\v\f";  // stripped, as nanochat does
        line.erase(0, std::min(line.find_first_not_of(kBlanks), line.size()));
        line.erase(line.find_last_not_of(kBlanks) + 1);
        if (line.starts_with("\"\"\"")) return answer_block(line.substr(3));
        std::string lower = line;
        for (char& c : lower) c = detail::ascii_lower(c);
        if (has(split("quit exit clear", " "), lower)) line = "/" + lower;
        if (line.starts_with("//")) return answer(line.substr(1));
        if (!line.starts_with("/")) return answer(line);
        const std::size_t end = std::min(line.find_first_of(" \t"), line.size());
        const std::string word = line.substr(1, end - 1);
        const std::string help = cat("/help lists them, //", word, " sends the text");
        line.erase(0, std::min(line.find_first_not_of(" \t", end), line.size()));
        (this->*find_entry(slashes(), "/", word, help).run)(line);
    }
    void answer_block(std::string block) {
        for (std::string line; !block.ends_with("\"\"\"");) {
            if (!next_line("...", line)) return;
            block += (block.empty() ? "" : "\n") + line;
        }
        answer(block.substr(0, block.size() - 3));
    }
    void answer(const std::string& message) {
        if (message.empty()) return;
        if (interactive_) write_err("\n" + paint(terminal.err, kGreen, "Assistant:") + " ");
        reply(valid_text("message", message));
        if (interrupted()) note("stopped");
    }

    // The slash commands.

    struct Slash {
        std::string_view name, aliases, argument, help;
        void (Repl::*run)(const std::string& argument);
    };
    static const std::vector<Slash>& slashes() {
        static const std::vector<Slash> kSlashes = {
            {"help", "?", "", "this list", &Repl::help},
            {"clear", "", "", "start over", &Repl::clear},
            {"quit", "exit bye", "", "leave; Ctrl-D does too", &Repl::quit},
            {"models", "", "", "list the checkpoints", &Repl::models},
            {"model", "", "[MODEL]", "show or switch the model; the conversation stays",
             &Repl::model},
            {"temperature", "", "[X]", "show or set; 0 is greedy", &Repl::temperature},
            {"topk", "", "[N]", "show or set; 0 is the whole vocabulary", &Repl::topk},
            {"topp", "", "[X]", "show or set; 1 is off", &Repl::topp},
            {"max", "", "[N]", "show or set the most new tokens", &Repl::max},
            {"seed", "", "[N]", "show or set; -1 is random", &Repl::seed},
            {"system", "", "[TEXT]", "show or set what stands in front of the first message",
             &Repl::system},
            {"regen", "", "", "answer again with the next seed", &Repl::regen},
            {"undo", "", "", "take back the last exchange", &Repl::undo},
            {"edit", "", "", "take it back and type the message anew", &Repl::edit},
            {"save", "", "FILE", "write the conversation as JSON", &Repl::save},
            {"load", "", "FILE", "read one", &Repl::load},
            {"stats", "", "[on|off]", "the line after each answer", &Repl::stats},
            {"context", "", "", "tokens of each message", &Repl::context},
            {"tokens", "", "[TEXT]", "the tokens of the text, or of the last answer",
             &Repl::tokens}};
        return kSlashes;
    }

    void help(const std::string&) {
        const auto line = [](const std::string& typed, std::string_view does) {
            say(cat("  ", fit(typed, 20), " ", does));
        };
        for (const Slash& s : slashes())
            line(cat("/", s.name, s.argument.empty() ? "" : " ", s.argument), s.help);
        line("\"\"\" ... \"\"\"", "a message of many lines");
        line("//text", "sends /text");
    }
    void clear(const std::string&) {
        chat_->reset();
        note("conversation cleared");
    }
    void quit(const std::string&) { done_ = true; }
    void models(const std::string&) { write_err(list_models(options_)); }
    void model(const std::string& id) {
        if (id.empty()) return say(session_->info.id);
        Options o = options_;
        o.source = o.tag = "", o.step = -1, o.model = id;
        open(o);
        banner();
    }
    // Sets an option as its flag does, or shows it.
    void set(std::string_view name, std::string_view flag, const std::string& typed,
             const Value& now) {
        if (typed.empty()) return say(cat(name, " ", now.text));
        find_flag(find_command("chat"), flag).apply(options_, {name, typed});
    }
    void temperature(const std::string& x) {
        set("temperature", "--temperature", x, options_.sampling.temperature);
    }
    void topk(const std::string& n) { set("topk", "--top-k", n, options_.sampling.top_k); }
    void topp(const std::string& x) { set("topp", "--top-p", x, options_.sampling.top_p); }
    void max(const std::string& n) { set("max", "--max-tokens", n, options_.max_tokens); }
    void seed(const std::string& n) { set("seed", "--seed", n, options_.sampling.seed); }
    void system(const std::string& text) {
        if (text.empty())
            return say("system " + (chat_->system().empty() ? "(none)" : chat_->system()));
        chat_->system() = options_.system = text;
    }
    // Takes back the last exchange and returns its message.
    std::string take_back() {
        const std::vector<Message> messages = chat_->messages();
        if (!chat_->undo()) bad_usage("the conversation is empty");
        return messages[messages.size() - 2].content;
    }
    void regen(const std::string&) {
        const std::string message = take_back();
        options_.sampling.seed++;
        answer(message);
    }
    void undo(const std::string&) {
        take_back();
        note("the last exchange is taken back");
    }
    void edit(const std::string&) {
        say("the last message was: " + take_back());
        say("Type what takes its place.");
    }
    void save(const std::string& file) {
        if (file.empty()) bad_usage("/save: a file name is needed");
        NewFile out(file);
        const auto as_json = [](const Message& m) {
            return object({{"role", name_of(m.role)}, {"content", m.content}});
        };
        out.write(object({{"messages", array(chat_->messages(), as_json)}}).text + "\n");
        out.commit();
        note("saved " + file);
    }
    void load(const std::string& file) {
        if (file.empty()) bad_usage("/load: a file name is needed");
        const Json json = parse_json(detail::as_text(detail::read_file(file, 16u << 20)));
        const Json* list = json.find("messages");
        if (list == nullptr) bad_usage("/load: " + detail::quote(file) + " has no \"messages\"");
        std::vector<Message> messages;
        for (const Json& item : list->array) {
            const Json *role = item.find("role"), *content = item.find("content");
            const auto* name = std::find(std::begin(kRoles), std::end(kRoles),
                                         role == nullptr ? "" : role->string);
            if (name == std::end(kRoles) || content == nullptr ||
                content->kind != Json::Kind::string) {
                bad_usage(cat("/load: a message needs a \"role\", one of ", join(kRoles, ", "),
                              ", and a text \"content\""));
            }
            messages.push_back({static_cast<Role>(name - kRoles), content->string});
        }
        chat_->load(messages);
        options_.system = chat_->system();
        note(cat("loaded ", messages.size(), " messages"));
    }
    void stats(const std::string& on) {
        if (!on.empty()) options_.stats = one_of({"/stats", on}, {"on", "off"}) == "on";
        say(options_.stats.value_or(terminal.err.terminal) ? "stats on" : "stats off");
    }
    void context(const std::string&) {
        std::size_t total = 1;  // <|bos|>
        for (const Message& m : chat_->messages()) {
            const std::size_t tokens =
                session_->tokenizer.encode(m.content).size() + (m.role == Role::system ? 0 : 2);
            total += tokens;
            std::string line = m.content.substr(0, 200);
            std::replace(line.begin(), line.end(), '\n', ' ');
            say(cat(fit(std::to_string(tokens), 7, true), "  ", fit(name_of(m.role), 9), "  ",
                    fit(safe(line), terminal.width - 20)));
        }
        say(cat(fit(std::to_string(total), 7, true), "  of ", session_->info.config.sequence_len,
                " tokens"));
    }
    void tokens(const std::string& text) {
        write_err(text.empty()
                      ? token_table(session_->tokenizer, chat_->answer())
                      : token_table(session_->tokenizer, session_->tokenizer.encode(text)));
    }

    Options& options_;
    bool interactive_;
    std::unique_ptr<Session> session_;
    std::unique_ptr<Chat> chat_;
    LineReader input_;
    Clock::time_point last_interrupt_ = {};
    bool done_ = false;
    int failure_ = 0;  // exit code of the last error, for scripts
};

int run_chat(Options& o) {
    catch_interrupts();
    if (!o.prompt) return Repl(o).run();
    const std::string prompt = read_prompt(o);
    if (prompt.empty()) bad_usage("--prompt: found no text, leave it out to start a conversation");
    Repl(o).reply(prompt);
    if (interrupted()) leave_interrupted();
    return 0;
}

// ==== 5. show, models, tokenize, check, doctor ===================================================
// The small commands: what is there, what is in it, what the model reads, what it answers in numbers.

std::string upper(std::string text) {
    for (char& c : text) c = detail::ascii_upper(c);
    return text;
}
std::string architecture(const Config& c) {
    const std::string kv = c.n_kv_head == c.n_head ? "" : cat(" (", c.n_kv_head, " kv)");
    return cat(c.n_layer, " layers, ", c.n_embd, " wide, ", c.n_head, " heads", kv, ", ctx ",
               c.sequence_len);
}
std::string file_of(const ModelInfo& info,
                    const fs::path& base) {  // no absolute path leaves the program
    const fs::path relative = info.model_file.lexically_relative(base);
    const bool inside = !relative.empty() && *relative.begin() != "..";
    return inside ? relative.string() : info.model_file.filename().string();
}
double metric(const ModelInfo& info, std::string_view name) {
    if (info.loss_metric == name) return info.loss;
    for (const auto& [key, value] : info.metrics) {
        if (key == name) return value;
    }
    return std::numeric_limits<double>::quiet_NaN();
}

// clang-format off
Value architecture_json(const ModelInfo& info) {
    if (!info.has_config) return nullptr;
    const Config& c = info.config;
    const auto& facts = detail::facts(c.generation);
    return object({{"n_layer", c.n_layer}, {"n_embd", c.n_embd}, {"n_head", c.n_head}, {"n_kv_head", c.n_kv_head},
                   {"head_dim", c.head_dim()}, {"sequence_len", c.sequence_len}, {"vocab_size", c.vocab_size},
                   {"window_pattern", c.window_pattern}, {"generation", facts.name}, {"saved_by", facts.dates},
                   {"rope_base", c.rope_base}, {"qk_scale", c.qk_scale}, {"softcap", c.softcap}});
}
// What programs read of a checkpoint.
Members model_members(const ModelInfo& info, const fs::path& base, const Place& place) {
    const bool known = !info.tensors.empty(), ready = info.status == Status::ready, has_loss = std::isfinite(info.loss);
    Members metrics;
    for (const auto& [key, value] : info.metrics) metrics.emplace_back(key, value);
    const Value loss = object({{"value", info.loss}, {"metric", info.loss_metric}, {"unit", info.loss_unit}});
    return {{"id", info.id}, {"name", cat(info.tag, "_step", info.step)}, {"type", upper(info.source)},
            {"source", info.source}, {"tag", info.tag}, {"step", info.step}, {"val_loss", metric(info, "val_loss")},
            {"val_bpb", metric(info, "val_bpb")}, {"loss", has_loss ? loss : nullptr}, {"metrics", object(metrics)},
            {"architecture", architecture_json(info)}, {"parameters", known ? Value(info.parameters) : nullptr},
            {"size_bytes", info.file_bytes}, {"memory_bytes", known ? Value(weight_bytes(info, place.dtype)) : nullptr},
            {"file", file_of(info, base)}, {"modified", iso_date(info.modified)}, {"status", name_of(info.status)},
            {"reason", or_null(info.reason)}, {"can_chat", ready && info.source != "base"}};
}
// clang-format on

std::string default_of(const std::vector<ModelInfo>& models) {
    try {
        return choose(models, {}, "sft").id;
    } catch (const Error&) {
        return "";  // none is ready
    }
}
// The best loss of its family that can be run, among losses of the same unit.
bool is_best(const ModelInfo& info, const std::vector<ModelInfo>& models) {
    return info.status == Status::ready && std::isfinite(info.loss) &&
           std::none_of(models.begin(), models.end(), [&](const ModelInfo& other) {
               return other.status == Status::ready && other.source == info.source &&
                      other.loss_unit == info.loss_unit && other.loss < info.loss;
           });
}

struct Catalog {  // the checkpoints as they were last seen
    fs::path base;
    std::vector<ModelInfo> models;
    Tokens tokens;
    fs::file_time_type tokenizer_time = {};
    std::string default_id;
    std::int64_t unix_time = std::time(nullptr);
    Clock::time_point time = Clock::now();
};
Catalog read_catalog(const Options& o) {
    Catalog c;
    c.base = base_dir(o.base_dir);
    c.tokens = base_tokenizer(c.base);
    c.models = models_in(c.base, o, &c.tokens);
    if (c.models.empty()) no_checkpoints(c.base);
    c.default_id = default_of(c.models);
    return c;
}

// The checkpoints of --type in the order of --sort.
std::vector<const ModelInfo*> listed(const Options& o, const Catalog& c) {
    std::vector<const ModelInfo*> models;
    for (const ModelInfo& m : c.models) {
        if (o.types.empty() || has(o.types, m.source)) models.push_back(&m);
    }
    if (models.empty())
        throw Error(ErrorKind::not_found, cat("no checkpoint of type ", join(o.types, ", "), " in ",
                                              home_relative(c.base)));
    const auto less = [&](const ModelInfo* a, const ModelInfo* b) {
        if (o.sort == "step") return a->step > b->step;
        if (o.sort == "date") return a->modified > b->modified;
        if (o.sort == "name") return a->tag != b->tag ? a->tag < b->tag : a->id < b->id;
        const bool x = std::isfinite(a->loss), y = std::isfinite(b->loss);
        if (!x || !y) return x && !y;
        // by loss: each unit by itself
        return a->loss_unit != b->loss_unit ? a->loss_unit < b->loss_unit : a->loss < b->loss;
    };
    if (!o.sort.empty()) std::stable_sort(models.begin(), models.end(), less);
    return models;
}

std::string list_models(const Options& o) {
    const Catalog c = read_catalog(o);
    std::vector<std::vector<std::string>> rows;
    std::size_t hidden = 0;
    for (const ModelInfo* m : listed(o, c)) {
        if (m->status == Status::refused && !o.all) {
            hidden++;
            continue;
        }
        rows.push_back({upper(m->source), m->tag, std::to_string(m->step), loss_words(*m),
                        m->has_config ? architecture(m->config) : "—", human_bytes(m->file_bytes),
                        date_of(m->modified, "%Y-%m-%d %H:%M", false),
                        cat(name_of(m->status), m->reason.empty() ? "" : ": ", m->reason,
                            m->id == c.default_id ? " *" : "")});
    }
    std::string text = table({{"TYPE"},
                              {"MODEL", false, 0, 20},
                              {"STEP", true},
                              {"VAL LOSS", false, 1, 18},
                              {"ARCHITECTURE", false, 4, 46},
                              {"SIZE", true, 2},
                              {"CHANGED", false, 3, 16},
                              {"STATUS"}},
                             rows);
    const std::string tokenizer = c.tokens.reason.empty()
                                      ? cat("tokenizer ", thousands(c.tokens.vocab_size), " tokens")
                                      : cat("no usable tokenizer: ", safe(c.tokens.reason));
    text += cat(rows.size(), rows.size() == 1 ? " checkpoint in " : " checkpoints in ",
                safe(home_relative(c.base)), ", ", tokenizer, ".");
    if (hidden > 0) text += cat(" ", hidden, " refused: --all lists them.");
    return text + " * = default for \"nanogpt chat\"\n";
}

Value device_json(const Place& place) {
    const std::optional<GpuInfo> gpu = gpu_in_use(place.cuda);
    return object({{"type", gpu ? "cuda" : "cpu"},
                   {"name", gpu ? gpu->name : cat("CPU (", cpu_features(), ")")},
                   {"compute_capability", gpu ? Value(capability(*gpu)) : nullptr},
                   {"dtype", name_of(place.dtype)},
                   {"fallback_reason", or_null(place.reason)}});
}

// The list of models, as --json and the HTTP interface tell it.
Value among_others(const ModelInfo& m, const Catalog& c, bool loaded) {
    return object(
        {{"loaded", loaded}, {"default", m.id == c.default_id}, {"best", is_best(m, c.models)}});
}
Value models_json(const Options& o, const Catalog& c, const std::vector<const ModelInfo*>& shown,
                  const std::function<bool(const std::string&)>& loaded) {
    const Place place = place_for(o);
    const auto entry = [&](const ModelInfo* m) {
        return merged(object(model_members(*m, c.base, place)), among_others(*m, c, loaded(m->id)));
    };
    const bool usable = c.tokens.reason.empty();
    return object(
        {{"models", array(shown, entry)},
         {"count", shown.size()},
         {"default", or_null(c.default_id)},
         {"tokenizer", object({{"status", usable ? "ready" : "refused"},
                               {"vocab_size", usable ? Value(c.tokens.vocab_size) : nullptr},
                               {"reason", or_null(c.tokens.reason)}})},
         {"device", device_json(place)},
         {"scanned_at", iso_date(c.unix_time)}});
}
int run_models(Options& o) {
    if (!o.json) return write_out(list_models(o)), 0;
    const Catalog c = read_catalog(o);
    write_json(models_json(o, c, listed(o, c), [](const std::string&) { return false; }));
    return 0;
}
Value openai_model_json(const ModelInfo& m) {
    return object(
        {{"id", m.id}, {"object", "model"}, {"created", m.modified}, {"owned_by", "local"}});
}

// One checkpoint in full.
Members detail_members(const ModelInfo& info, const fs::path& base, const Place& place) {
    Members members = model_members(info, base, place);
    members.emplace_back("cache_bytes_per_token", cache_bytes(info.config, place.cuda));
    members.emplace_back(
        "settings", array(info.settings, [](const Setting& s) {
            return object({{"name", s.name}, {"value", s.value}, {"origin", name_of(s.origin)}});
        }));
    members.emplace_back("warnings", array(info.warnings));
    members.emplace_back(
        "tensors", array(info.tensors, [](const TensorInfo& t) {
            return object(
                {{"name", t.name}, {"dtype", name_of(t.dtype)}, {"shape", array(t.shape)}});
        }));
    return members;
}

int run_show(Options& o) {
    if (!o.arguments.empty()) {
        if (!o.model.empty()) bad_usage("show: found a model and --model, one of them is needed");
        o.model = not_empty({"show", o.arguments[0]});
    }
    const ModelInfo info = pick_model(o, "sft", false);
    const fs::path base = base_dir(o.base_dir);
    const Place place = place_for(o);
    const std::uint64_t cache = cache_bytes(info.config, place.cuda);
    const std::uint64_t context = cache * static_cast<std::uint64_t>(info.config.sequence_len);
    if (o.json) return write_json(object(detail_members(info, base, place))), 0;
    const std::string metrics = join(
        info.metrics, ", ", [](const auto& m) { return cat(m.first, " ", Value(m.second).text); });
    std::string text = paint(terminal.out, kBold, safe(info.id)) + "\n";
    const auto line = [&](const char* name, const std::string& value) {
        text += "  " + fit(name, 12) + safe(value) + "\n";
    };
    line("file", cat(file_of(info, base), ", ", human_bytes(info.file_bytes), ", changed ",
                     date_of(info.modified, "%Y-%m-%d %H:%M", false)));
    line("val loss", loss_words(info));
    if (!metrics.empty()) line("metrics", metrics);
    line("shape", architecture(info.config) + ", vocabulary " + thousands(info.config.vocab_size));
    line("parameters", thousands(info.parameters));
    line("memory",
         cat(human_bytes(weight_bytes(info, place.dtype)), " of weights, ", human_bytes(cache),
             " of keys and values per token, ", human_bytes(context), " for a full context"));
    for (const std::string& warning : info.warnings) line("warning", warning);
    std::vector<std::vector<std::string>> rows;
    for (const Setting& s : info.settings)
        rows.push_back({s.name, s.value, std::string(name_of(s.origin))});
    text += "\n" + table({{"SETTING"}, {"VALUE"}, {"WHERE FROM"}}, rows) + "\n";
    rows.clear();
    for (const TensorInfo& t : info.tensors)
        rows.push_back({t.name, std::string(name_of(t.dtype)), detail::to_string(t.shape)});
    write_out(text + table({{"TENSOR"}, {"DTYPE"}, {"SHAPE"}}, rows));
    return 0;
}

// ---- tokenize, detokenize

Tokenizer pick_tokenizer(Options& o) {
    if (!o.tokenizer.empty()) return open_tokenizer(o.tokenizer);
    const fs::path beside_models = base_dir(o.base_dir) / "tokenizer" / "tokenizer.pkl";
    std::error_code error;
    const bool any_model = o.source.empty() && o.tag.empty() && o.step < 0 && o.model.empty();
    if (any_model && fs::exists(beside_models, error)) return open_tokenizer(beside_models);
    return open_tokenizer(find_tokenizer(pick_model(o, "sft", false)));
}
std::vector<unsigned char> bytes_of(std::string_view piece) { return {piece.begin(), piece.end()}; }
std::string token_table(const Tokenizer& tokenizer, std::span<const Token> tokens) {
    std::vector<std::vector<std::string>> rows;
    for (const Token token : tokens) {
        const std::string piece(tokenizer.piece(token));
        const std::string bytes = join(bytes_of(piece), " ", [](auto b) { return hex(b, 2); });
        const bool special = tokenizer.is_special(token);
        rows.push_back({std::to_string(token), special ? piece : "\"" + piece + "\"",
                        special ? "special" : bytes});
    }
    return table({{"ID", true}, {"PIECE"}, {"BYTES"}}, rows);
}
std::vector<Token> parse_ids(std::string_view what, const std::vector<std::string>& texts, int end,
                             std::string_view one = "a token id") {
    const std::string wanted = cat(one, " from 0 to ", end - 1);
    std::vector<Token> ids;
    for (const std::string& text : texts)
        ids.push_back(number<Token>({what, text}, 0, end - 1, wanted));
    return ids;
}
// "1,2,3", "1 2 3" and "[1, 2, 3]", as people type them.
std::vector<Token> typed_ids(std::string_view what, std::string_view list, int vocab_size) {
    return parse_ids(what, split(list, ", \t\r\n[]"), vocab_size);
}
std::vector<Token> parse_ids(std::string_view what, const Json& list, int end,
                             std::string_view one = "a token id") {
    if (list.kind != Json::Kind::array) bad_usage(cat(what, ": an array of token ids is needed"));
    std::vector<std::string> texts;
    for (const Json& id : list.array)
        texts.push_back(id.kind == Json::Kind::number ? id.string : "what stands there");
    return parse_ids(what, texts, end, one);
}

Value token_json(const Tokenizer& tokenizer, Token id) {
    const std::string piece(tokenizer.piece(id));
    return object({{"id", id},
                   {"text", detail::is_utf8(piece) ? Value(piece) : Value(nullptr)},
                   {"bytes", array(bytes_of(piece))}});
}
Value tokens_json(const Tokenizer& tokenizer, const std::vector<Token>& ids) {
    const auto entry = [&](Token id) { return token_json(tokenizer, id); };
    return object({{"tokens", array(ids, entry)}, {"ids", array(ids)}, {"count", ids.size()}});
}

int run_tokenize(Options& o) {
    const Tokenizer tokenizer = pick_tokenizer(o);
    const std::string text = to_utf8(o.arguments.empty() ? LineReader().rest() : o.arguments[0]);
    const std::vector<Token> ids = tokenizer.encode(text);
    if (o.json) return write_json(tokens_json(tokenizer, ids)), 0;
    write_out(token_table(tokenizer, ids));
    return 0;
}

int run_detokenize(Options& o) {
    const Tokenizer tokenizer = pick_tokenizer(o);
    const std::string typed = o.arguments.empty() ? LineReader().rest() : join(o.arguments, " ");
    const std::vector<Token> ids = typed_ids("ids", typed, tokenizer.vocab_size());
    const std::string text = to_utf8(tokenizer.decode(ids));
    if (o.json) return write_json(object({{"text", text}, {"count", ids.size()}})), 0;
    write_answer(text + "\n");
    return 0;
}

// ---- logits

// Logits (T, V) of a sequence, to a file and to their argmax; all other values to a file of their own.
struct LogitRows : Observer {
    std::optional<NewFile> out, hooks;
    std::vector<Token> argmax;
    std::vector<float> best;
    bool wants(HookPoint point, int) override {
        // (H, T, keys) are left out: their size grows with the square of the sequence
        const bool map = point == HookPoint::attn_scores || point == HookPoint::pattern;
        return point == HookPoint::logits || (hooks && !map);
    }
    void on(const Activation& a) override {
        const std::string_view bytes = detail::as_text(std::as_bytes(a.values));
        if (hooks) {
            const Value head = object(
                {{"name", name(a.point, a.layer)}, {"pos", a.pos}, {"shape", array(a.shape)}});
            hooks->write(head.text + "\n");
            hooks->write(bytes);
        }
        if (a.point != HookPoint::logits) return;
        const std::size_t V = static_cast<std::size_t>(a.shape[1]);
        if (out) out->write(bytes);
        for (std::size_t at = 0; at < a.values.size(); at += V) {
            const auto row = a.values.subspan(at, V);
            const auto top = std::max_element(row.begin(), row.end());
            argmax.push_back(static_cast<Token>(top - row.begin()));
            best.push_back(*top);
        }
    }
};

int run_logits(Options& o) {
    if (o.ids.empty() == o.ids_file.empty())
        bad_usage("logits: one of --ids LIST and --ids-file FILE is needed");
    catch_interrupts();
    const ModelInfo info = pick_model(o, "sft", false);
    const int V = info.config.vocab_size;
    const auto ids_of_file = [&] {
        const Json list = parse_json(detail::as_text(detail::read_file(o.ids_file, 16u << 20)));
        return parse_ids("--ids-file", list, V);
    };
    const std::vector<Token> ids = o.ids.empty() ? ids_of_file() : typed_ids("--ids", o.ids, V);
    if (ids.empty()) bad_usage("logits: at least one token id is needed");
    tell_warnings(info);
    const std::unique_ptr<Backend> backend = open_device(info, o).backend;
    const int T = static_cast<int>(ids.size());
    LogitRows rows;
    if (!o.out.empty()) rows.out.emplace(o.out);
    if (!o.hooks.empty()) rows.hooks.emplace(o.hooks);
    const std::unique_ptr<Sequence> sequence = backend->new_sequence(T);
    constexpr std::size_t kPiece = 1024;  // tokens: their logits are in memory at once
    for (std::size_t at = 0; at < ids.size(); at += kPiece) {
        const std::size_t n = std::min(kPiece, ids.size() - at);
        const Chunk chunk = {sequence.get(), std::span(ids).subspan(at, n), true};
        backend->step({&chunk, 1}, &rows);
    }
    if (rows.out) rows.out->commit();
    if (rows.hooks) rows.hooks->commit();
    if (o.json) {
        write_json(object({{"shape", array(std::array{T, V})}, {"argmax", array(rows.argmax)}}));
    } else if (rows.out) {
        note(cat("wrote ", o.out, ": float32 (", T, ", ", V, ")"));
    } else {
        std::vector<std::vector<std::string>> lines;
        for (std::size_t t = 0; t < ids.size(); t++) {
            lines.push_back({std::to_string(t), std::to_string(ids[t]),
                             std::to_string(rows.argmax[t]), decimals(double{rows.best[t]}, 4)});
        }
        write_out(table(
            {{"POSITION", true}, {"ID", true}, {"LIKELIEST NEXT", true}, {"LOGIT", true}}, lines));
    }
    return 0;
}

// ---- check: whole and safe? Every byte is read, nothing is executed.

struct Verdict {
    std::string file, status = "ok", what = {};
    std::int64_t offset = -1;
    std::vector<Value> values = {};  // --values: tensors with NaN or infinities
};

// Calls each(bytes) for `size` bytes of a file from `offset` on, at most 1 MiB at a time.
template <class Each>
void each_piece(const File& file, std::uint64_t offset, std::uint64_t size, Each&& each) {
    std::vector<std::byte> buffer(std::min<std::uint64_t>(size, 1u << 20));
    for (std::uint64_t at = 0; at < size; at += buffer.size()) {
        const auto part = std::span(buffer).first(std::min(buffer.size(), size - at));
        file.read(offset + at, part);
        each(part);
    }
}
void check_entries(const detail::ZipFile& zip) {  // all checksums
    for (const detail::ZipEntry& entry : zip.entries()) {
        std::uint32_t crc = 0;
        each_piece(zip.file(), entry.offset, entry.size,
                   [&](std::span<const std::byte> part) { crc = detail::crc32(part, crc); });
        detail::ZipFile::verify(entry, crc);
    }
}
// {NaN, infinite} values of a tensor of floats; by their bits, so no setting of the compiler can hide them.
std::pair<std::int64_t, std::int64_t> count_values(const detail::ZipFile& zip,
                                                   const detail::StoredTensor& t) {
    struct Layout {
        DType dtype;
        std::uint64_t exponent, fraction;
    };
    static constexpr Layout kLayouts[] = {{DType::f32, 0x7f800000, 0x7fffff},
                                          {DType::bf16, 0x7f80, 0x7f},
                                          {DType::f16, 0x7c00, 0x3ff},
                                          {DType::f64, 0x7ff0000000000000, 0xfffffffffffff}};
    std::pair<std::int64_t, std::int64_t> counts;
    for (const Layout& layout : kLayouts) {
        if (layout.dtype != t.info.dtype) continue;
        each_piece(zip.file(), t.entry->offset, t.bytes(), [&](std::span<const std::byte> part) {
            for (; !part.empty(); part = part.subspan(size_of(layout.dtype))) {
                std::uint64_t bits = 0;
                std::memcpy(&bits, part.data(), size_of(layout.dtype));
                if ((bits & layout.exponent) != layout.exponent) continue;
                ((bits & layout.fraction) != 0 ? counts.first : counts.second)++;
            }
        });
    }
    return counts;
}

void check_checkpoint(Verdict& v, const fs::path& path, bool values) {
    const detail::ZipFile zip{File(path)};
    check_entries(zip);
    if (path.filename() == "token_bytes.pt") {
        const auto bytes =
            zip.read(*zip.find(detail::top_folder(zip) + "data.pkl"), detail::kMaxPickle);
        detail::parse_pickle(bytes, detail::PickleFor::checkpoint);
        v.what = "table of token lengths";
        return;
    }
    const std::vector<detail::StoredTensor> tensors = detail::read_state_dict(zip);
    v.what = cat("checkpoint, ", tensors.size(), " tensors, ", human_bytes(zip.file().size()),
                 ", checksums right");
    std::error_code error;
    if (fs::exists(detail::place(path).meta_file, error)) {
        const ModelInfo info = inspect_model(path);
        v.what += cat(", ", info.id, " of generation ", info.settings[0].value);
    } else {
        v.what += ", no metadata beside it to compare the shapes with";
    }
    if (!values) return;
    std::int64_t bad = 0;
    for (const detail::StoredTensor& t : tensors) {
        const auto [nans, infinities] = count_values(zip, t);
        bad += nans + infinities;
        if (nans + infinities == 0) continue;
        v.values.push_back(
            object({{"tensor", t.info.name}, {"nan", nans}, {"infinite", infinities}}));
    }
    v.what += ", " + thousands(bad) + " values that are NaN or infinite";
}

Verdict check_file(const fs::path& path, bool values) {
    Verdict v = {path.string()};
    try {
        const std::string extension = path.extension().string();
        const File file(path);  // missing is another answer than refused
        if (extension == ".pt") {
            check_checkpoint(v, path, values);
        } else if (extension == ".pkl") {
            v.what = "tokenizer, " + thousands(load_tokenizer(path).vocab_size()) + " tokens";
        } else if (extension == ".json") {
            bool has_pattern = false;
            const Config config = detail::read_config(detail::read_meta(path), has_pattern);
            v.what = "metadata, " + architecture(config);
        } else {
            detail::unsupported({"not a file that nanogpt reads: .pt, .pkl and .json are"});
        }
    } catch (const Error& e) {
        v.status = e.kind == ErrorKind::not_found     ? "missing"
                   : e.kind == ErrorKind::unsupported ? "unsupported"
                                                      : "refused";
        v.what = e.what(), v.offset = e.offset;
    }
    return v;
}

// The files of a checkpoint's directory, or of a whole base directory.
std::vector<fs::path> files_in(const fs::path& directory) {
    std::vector<fs::path> files;
    std::error_code error;
    fs::recursive_directory_iterator it(directory, fs::directory_options::skip_permission_denied,
                                        error),
        end;
    for (; !error && it != end && files.size() < 100'000; it.increment(error)) {
        if (it.depth() >= 3) it.disable_recursion_pending();
        const std::string name = it->path().filename().string();
        const bool ours = detail::step_of(name) >= 0 ||
                          detail::step_of(name, "meta_", ".json") >= 0 || name == "tokenizer.pkl" ||
                          name == "token_bytes.pt";
        if (ours) files.push_back(it->path());
    }
    std::sort(files.begin(), files.end());
    return files;
}

int run_check(Options& o) {
    if (o.arguments.empty())
        bad_usage("check: a file or a directory is needed. Try: nanogpt help check");
    std::vector<Verdict> verdicts;
    int refused = 0, missing = 0;
    const auto add = [&](Verdict v) {
        const bool good = v.status == "ok";
        if (!good) (v.status == "missing" ? missing : refused)++;
        if (!o.json) {
            write_out(cat(paint(terminal.out, good ? kGreen : kRed, fit(v.status, 11)), "  ",
                          safe(v.file), "  ", safe(v.what), "\n"));
            for (const Value& counts : v.values) write_out(cat("             ", counts.text, "\n"));
        }
        verdicts.push_back(std::move(v));
    };
    for (const std::string& argument : o.arguments) {
        std::error_code error;
        std::vector<fs::path> files = {argument};
        if (fs::is_directory(argument, error)) files = files_in(argument);
        for (const fs::path& file : files) add(check_file(file, o.values));
        if (files.empty()) add({argument, "missing", "holds no file that nanogpt reads"});
    }
    if (o.json) {
        const auto entry = [](const Verdict& v) {
            const bool good = v.status == "ok";
            return object({{"file", v.file},
                           {"status", v.status},
                           {"what", or_null(good ? v.what : "")},
                           {"reason", or_null(good ? "" : v.what)},
                           {"offset", v.offset < 0 ? nullptr : Value(v.offset)},
                           {"values", array(v.values)}});
        };
        write_json(object(
            {{"files", array(verdicts, entry)}, {"refused", refused}, {"missing", missing}}));
    }
    return refused > 0 ? 4 : missing > 0 ? 3 : 0;
}

// ---- doctor: what works here, and what to do about the rest

std::string version() {
    constexpr int v = NANOGPT_VERSION;
    return cat(v / 10000, ".", v / 100 % 100, ".", v % 100);
}
// Bytes per second that all threads together read from memory: the best of some passes over more than
// the caches hold.
double cpu_read_bandwidth(int threads) {
    constexpr std::size_t kPart = std::size_t{1} << 17;  // numbers: 1 MiB
    const std::size_t parts = std::clamp<std::size_t>(detail::available_memory() >> 22, 1, 256);
    const std::vector<std::uint64_t> memory(parts * kPart, 1);
    std::vector<std::uint64_t> sums(parts);
    ThreadPool pool(threads);
    double best = 0;
    for (int pass = 0; pass < 6; pass++) {
        const auto start = Clock::now();
        pool.run(parts, [&](std::size_t part) {
            std::array<std::uint64_t, 8> sum = {};  // more than one chain of additions
            const std::uint64_t* numbers = memory.data() + part * kPart;
            for (std::size_t i = 0; i < kPart; i += sum.size()) {
                for (std::size_t k = 0; k < sum.size(); k++) sum[k] += numbers[i + k];
            }
            for (const std::uint64_t s : sum) sums[part] += s;
        });
        best = std::max(best, static_cast<double>(memory.size() * 8) / seconds_since(start));
    }
    return sums[0] > 0 ? best : 0;  // so that the sums are wanted
}
std::string gigabytes_per_second(double bytes) {
    return decimals(bytes / 1e9, bytes < 9.95e9 ? 1 : 0) + " GB/s";
}

class Doctor {
public:
    explicit Doctor(Options& o) : options_(o), place_(place_for(o)) {}

    int run() {
        examine("memory", &Doctor::machine);
        examine("cuda", &Doctor::cuda);
        examine("bandwidth", &Doctor::bandwidth);
        examine("base dir", &Doctor::base);
        examine("tokenizer", &Doctor::tokenizer);
        examine("self-test", &Doctor::self_test);
        const bool ok = std::ranges::find(checks_, kFail, &Check::status) == checks_.end();
        const auto entry = [](const Check& c) {
            return object({{"name", c.name}, {"status", c.status}, {"message", c.message}});
        };
        if (options_.json) write_json(object({{"checks", array(checks_, entry)}, {"ok", ok}}));
        return ok ? 0 : 1;
    }

private:
    static constexpr std::string_view kOk = "ok", kWarn = "warn", kFail = "FAIL";
    struct Check {
        std::string_view name, status;
        std::string message;
    };

    // `remedy`: added to what is not ok.
    void add(std::string_view name, std::string_view status, std::string message,
             std::string_view remedy = "") {
        const char* color = status == kOk ? kGreen : status == kFail ? kRed : kYellow;
        if (status != kOk && !remedy.empty()) message += cat(". ", remedy);
        if (!options_.json) {
            write_out(cat(paint(terminal.out, color, fit(status, 4)), "  ", fit(name, 10), "  ",
                          safe(message), "\n"));
        }
        checks_.push_back({name, status, std::move(message)});
    }
    // One that throws has failed, and the others go on.
    void examine(std::string_view name, void (Doctor::*check)()) {
        if (interrupted()) leave_interrupted();
        try {
            (this->*check)();
        } catch (const std::exception& e) {
            if (interrupted()) leave_interrupted();
            add(name, kFail, e.what());
        }
    }

    void machine() {
        add("program", kOk,
            cat("nanogpt ", version(), ", compiled by ", kHasCuda ? "nvcc and " : "", "C++ ",
                __VERSION__));
        add("cpu", kOk,
            cat(cpu_features(), ", ", ThreadPool::physical_cores(), " cores, ",
                std::thread::hardware_concurrency(), " threads"));
        const std::uint64_t have = detail::available_memory();
        add("memory", have < std::uint64_t{2} << 30 ? kWarn : kOk,
            cat(human_bytes(have), " of ", human_bytes(detail::total_memory()), " available"),
            "Close other programs");
    }

    // Without a GPU the CPU computes: that is a failure only for those who asked for the GPU, and no
    // fault at all of a program made for the CPU on a machine without a driver.
    void cuda() {
        std::error_code error;
        const std::string problem = cuda_problem();
        const bool asked = options_.device_type == "cuda";
        const bool missed = asked || kHasCuda || fs::exists("/proc/driver/nvidia/version", error);
        const std::string_view without = asked ? kFail : missed ? kWarn : kOk;
        add("cuda", problem.empty() ? kOk : without,
            problem.empty() ? cuda_versions()
                            : cat(problem, ": the CPU computes",
                                  kHasCuda ? cat(" (", cuda_versions(), ")") : ""),
            kHasCuda ? "Look whether nvidia-smi shows the GPU"
                     : "Install the CUDA toolkit, 12.8 or later, and build again");
        for (const GpuInfo& gpu : find_gpus()) {
            // only the first is used: another one that cannot be is no fault
            const std::string_view unused = gpu.device == 0 ? without : kWarn;
            add("gpu", gpu.problem.empty() ? kOk : unused,
                cat(gpu.name, ", compute capability ", capability(gpu), ", ", gpu.sms, " SMs, ",
                    human_bytes(gpu.free_bytes), " of ", human_bytes(gpu.memory_bytes), " free",
                    gpu.integrated ? ", shared with the CPU" : ""),
                cat("It is not used: ", gpu.problem));
        }
    }

    void bandwidth() {
        const double cpu = cpu_read_bandwidth(options_.threads);
        add("bandwidth", kOk, cat("the CPU reads ", gigabytes_per_second(cpu), " from memory"));
        if (!place_.cuda) return;
        const double gpu = cuda_read_bandwidth();
        // A GB10 reads 231 to 240 GB/s; some get stuck at low clocks.
        add("bandwidth", gpu_in_use(true)->integrated && gpu < 215e9 ? kWarn : kOk,
            cat("the GPU reads ", gigabytes_per_second(gpu), " from memory"),
            "A GB10 exceeds 215 GB/s when idle. Stop other programs; if it stays, update the "
            "firmware and take it off the mains for a minute");
    }

    void base() {
        const fs::path base = base_dir(options_.base_dir);
        std::error_code error;
        add("base dir", fs::is_directory(base, error) ? kOk : kWarn, home_relative(base),
            "It is not there. Name another with --base-dir or NANOCHAT_BASE_DIR");
        models_ = models_in(base, options_);
        const std::size_t found = models_.size();
        std::erase_if(models_, [](const ModelInfo& m) { return m.status != Status::ready; });
        const std::size_t ready = models_.size();
        const std::string chosen = default_of(models_);
        const fs::path sample = bundled_sample();
        add("models", ready > 0 && ready == found ? kOk : kWarn,
            cat(ready, " of ", found, " ready, by default ",
                !chosen.empty()  ? chosen
                : sample.empty() ? "none"
                                 : "the sample model answers"),
            found > 0 ? "nanogpt models --all says why others are not"
                      : "They belong in base_checkpoints, mid_checkpoints, chatsft_checkpoints or "
                        "chatrl_checkpoints");
        if (ready == 0 && !sample.empty()) models_ = find_models(sample);
    }

    void tokenizer() {
        if (models_.empty()) return;
        const fs::path file = find_tokenizer(choose(models_, {}, "sft"));
        add("tokenizer", kOk,
            cat(thousands(load_tokenizer(file).vocab_size()), " tokens, ", home_relative(file)));
    }

    // The smallest model: on the GPU its logits against those of the CPU, else whether they are numbers.
    void self_test() {
        if (models_.empty()) return add("self-test", kWarn, "skipped: there is no model");
        const ModelInfo& info = *std::ranges::min_element(models_, {}, &ModelInfo::memory_bytes);
        const int tokens = std::min(info.config.sequence_len, 16);
        check_memory(info, place_.dtype, tokens);
        const std::shared_ptr<const Model> model = load(info, options_, place_.dtype);
        if (place_.cuda) return gpu_test(info, model);
        const std::unique_ptr<Backend> cpu = open_cpu(model);
        const std::unique_ptr<Sequence> sequence = cpu->new_sequence(tokens);
        const std::vector<Token> ids(static_cast<std::size_t>(tokens), Token{1});
        const auto start = Clock::now();
        Sampler::argmax(prefill(*cpu, *sequence, ids));  // throws if none is a number
        add("self-test", kOk,
            cat(cpu->device(), " on ", info.id, ": ", tokens, " tokens in ",
                decimals(1000 * seconds_since(start), 1), " ms"));
    }
    void gpu_test(const ModelInfo& info, const std::shared_ptr<const Model>& model) try {
        CudaOptions options;
        options.kv_tokens = static_cast<std::uint64_t>(info.config.sequence_len);
        const std::unique_ptr<Backend> gpu = open_cuda(model, options);
        add("self-test", kOk,
            cat(gpu->device(), " on ", info.id, ": logits differ from the CPU's by ",
                decimals(100 * cuda_self_test(*gpu, model), 3), " %"));
    } catch (const Error& e) {
        if (e.kind != ErrorKind::unsupported) throw;
        add("self-test", kWarn, cat(info.id, ": ", e.what()), "The CPU runs this model");
    }

    Options& options_;
    Place place_;
    std::vector<Check> checks_;
    std::vector<ModelInfo> models_;  // that are ready, or the bundled one
};

int run_doctor(Options& o) {
    catch_interrupts();
    return Doctor(o).run();
}

// ==== 6. bench ===================================================================================
// Two speeds: reading a prompt (one matrix product per weight, limited by arithmetic) and writing
// (every step reads all weights again, limited by memory). Measures as nanochat's infer_bench does,
// but counts the bytes that a step really reads, and compares with the bandwidth measured here.

struct BenchPlan {
    int prompt = 0, decode = 0;  // tokens
    std::vector<int> batches;
    std::uint64_t room() const {  // tokens of one sequence, in whole blocks of the cache
        return static_cast<std::uint64_t>(prompt + decode + 63) / 64 * 64;
    }
};
BenchPlan plan_bench(const Options& o, const Config& c, bool cuda) {
    const auto or_default = [](int given, int otherwise) { return given > 0 ? given : otherwise; };
    const int S = c.sequence_len;
    BenchPlan plan;
    plan.decode = or_default(o.decode_tokens, std::clamp(S / 2, 2, cuda ? 256 : 32));
    plan.prompt = or_default(o.prompt_tokens, cuda ? 2048 : 256);
    plan.batches = o.batch_sizes;
    if (plan.batches.empty()) plan.batches = cuda ? std::vector{1, 8, 32, 128} : std::vector{1, 4};
    if (plan.decode >= S)
        bad_usage(cat("--decode-tokens: the context of this model has ", S, " tokens"));
    if (plan.prompt > S - plan.decode) {
        plan.prompt = S - plan.decode;
        note(cat("the prompt is cut to ", plan.prompt, " tokens, so that ", plan.decode,
                 " more fit the context of ", S));
    }
    return plan;
}

// What a step has to do, from the shapes. Matrices count, tables of which a step reads single rows
// do not.
struct BenchCost {
    std::uint64_t weights = 0, stored = 0;     // bytes that a step reads; of all in the file
    std::uint64_t kv_stored = 0, kv_read = 0;  // bytes per token of context; per sequence and step
    double flops = 0, prefill_flops = 0;       // per token written; of the prompt
    std::string dtypes;                        // "1,234 bfloat16, 56 float32"
    std::uint64_t step(int batch) const {      // bytes
        return weights + static_cast<std::uint64_t>(batch) * kv_read;
    }
};
BenchCost bench_cost(const ModelInfo& info, const BenchPlan& plan, bool cuda, DType dtype) {
    BenchCost cost;
    std::map<std::string_view, std::uint64_t> counts;
    for (const TensorInfo& t : info.tensors) {
        const std::uint64_t n = detail::count(t.shape);
        cost.stored += n * size_of(t.dtype);
        counts[name_of(t.dtype)] += n;
        const bool table = t.name == "transformer.wte.weight" ||
                           t.name.starts_with("value_embeds.") ||
                           t.name.starts_with("bigram_embed.");
        if (table || t.shape.size() < 2) continue;
        cost.weights += n * size_of(t.dtype == DType::bf16 ? t.dtype : dtype);
        cost.flops += 2 * static_cast<double>(n);
    }
    cost.dtypes = join(counts, ", ", [](const auto& c) {
        return cat(thousands(static_cast<std::int64_t>(c.second)), " ", c.first);
    });
    const Config& c = info.config;
    cost.kv_stored = cache_bytes(c, cuda);
    cost.prefill_flops = cost.flops * plan.prompt;
    for (int layer = 0; layer < c.n_layer; layer++) {
        const int context = std::min(plan.prompt + plan.decode / 2, c.window(layer));
        const double n = plan.prompt, w = std::min(plan.prompt, c.window(layer));
        cost.kv_read += cost.kv_stored / static_cast<std::uint64_t>(c.n_layer) *
                        static_cast<std::uint64_t>(context);
        cost.flops += 4.0 * c.n_embd * context;
        cost.prefill_flops += 4.0 * c.n_embd * (w * (w + 1) / 2 + (n - w) * w);
    }
    return cost;
}

double median(std::vector<double> times) {
    const auto middle = times.begin() + std::ssize(times) / 2;
    std::nth_element(times.begin(), middle, times.end());
    return *middle;
}

// Some sequences with the same prompt. Its calls return seconds.
class BenchGroup {
public:
    BenchGroup(Backend& backend, std::span<const Token> prompt, int decode,
               const SamplingParams& sampling, int batch)
        : backend_(backend), prompt_(prompt), tokens_(static_cast<std::size_t>(batch)) {
        for (std::size_t i = 0; i < tokens_.size(); i++) {
            const int room = static_cast<int>(prompt.size()) + decode;
            sequences_.push_back(backend.new_sequence(room));
            samplers_.push_back(std::make_unique<Sampler>(sampling, i));
            pointers_.push_back(samplers_[i].get());
            chunks_.push_back({sequences_[i].get(), {&tokens_[i], 1}});
        }
    }
    double first() {  // one prompt after the other
        const auto start = Clock::now();
        for (std::size_t i = 0; i < tokens_.size(); i++) {
            if (interrupted()) leave_interrupted();
            sequences_[i]->rewind(0);
            const Chunk last = detail::read_prompt(backend_, *sequences_[i], prompt_);
            tokens_[i] = backend_.sample({&last, 1}, {&pointers_[i], 1})[0];
        }
        first_ = tokens_;
        return seconds_since(start);
    }
    double next() {
        if (interrupted()) leave_interrupted();
        const auto start = Clock::now();
        const std::span<const Token> drawn = backend_.sample(chunks_, pointers_);
        std::copy(drawn.begin(), drawn.end(), tokens_.begin());
        return seconds_since(start);
    }
    void rewind() {  // to where first() left them
        for (const auto& sequence : sequences_) sequence->rewind(static_cast<int>(prompt_.size()));
        std::copy(first_.begin(), first_.end(), tokens_.begin());
    }

private:
    Backend& backend_;
    std::span<const Token> prompt_;
    std::vector<Token> tokens_, first_;
    std::vector<std::unique_ptr<Sequence>> sequences_;
    std::vector<std::unique_ptr<Sampler>> samplers_;
    std::vector<Sampler*> pointers_;
    std::vector<Chunk> chunks_;  // they point into tokens_
};

struct BenchRow {
    int batch = 0;
    double first = 0, step = 0, rate = 0;  // s to all first tokens; median s of the steps; tok/s
};

// infer_bench's (nanochat/scripts/infer_bench.py): a paragraph, as often as it takes.
std::vector<Token> bench_prompt(const Tokenizer& tokenizer, std::size_t length) {
    const std::vector<Token> paragraph = tokenizer.encode(
        "The history of science is the study of the development of science, including both the "
        "natural and social sciences. Science is a body of empirical, theoretical, and practical "
        "knowledge about the natural world. ");
    std::vector<Token> ids = {tokenizer.special("<|bos|>")};
    while (ids.size() < length) ids.insert(ids.end(), paragraph.begin(), paragraph.end());
    ids.resize(length);
    return ids;
}

class Bench {
public:
    Bench(const Options& o, Session& s, const BenchPlan& plan)
        : options_(o),
          s_(s),
          plan_(plan),
          prompt_(bench_prompt(s.tokenizer, static_cast<std::size_t>(plan.prompt))) {}

    int run() {
        const std::string dtype(name_of(s_.device.backend->dtype()));
        tell(cat(s_.info.id, " on ", s_.device.backend->device(), ", ", dtype, ", reading ",
                 gigabytes_per_second(bandwidth_), " (measured now)\n"));
        prefill_ = prefill();
        tell(cat("prefill: ", plan_.prompt, " tokens in ", decimals(1000 * prefill_, 2), " ms, ",
                 thousands(static_cast<std::int64_t>(plan_.prompt / prefill_)), " tok/s, ",
                 decimals(cost_.prefill_flops / prefill_ / 1e12, 2), " TFLOP/s\n"));
        tell(cat("decode: ", plan_.decode - 1, " steps from a context of ", plan_.prompt,
                 " tokens. A step reads the matrices once and the keys and values\n"
                 "of every sequence; not counted are the tables of embeddings, of which it reads "
                 "single rows.\nMore than 100 % of the measured bandwidth means that the caches "
                 "hold them.\n"));
        tell_cells({"BATCH", "FIRST", "STEP", "TOK/S", "READ/STEP", "READ", "OF MEASURED"});
        for (const int batch : plan_.batches) {
            try {
                rows_.push_back(decode(batch));
                tell_row(rows_.back());
            } catch (const Error& e) {
                if (e.kind != ErrorKind::out_of_memory) throw;
                note(cat("batch size ", batch, " is left out: ", e.what()));
            }
        }
        write_json(as_json());
        return 0;
    }

private:
    BenchGroup group(int batch) const {
        return {*s_.device.backend, prompt_, plan_.decode, options_.sampling, batch};
    }
    // Median seconds from the ids to the first token, after a warm-up.
    double prefill() const {
        BenchGroup one = group(1);
        std::vector<double> times;
        const auto start = Clock::now();
        for (int run = 0; run < 6 && (run < 2 || seconds_since(start) < 5); run++)
            times.push_back(one.first());
        times.erase(times.begin());
        return median(times);
    }
    BenchRow decode(int batch) const {
        const std::int64_t tokens = std::int64_t{batch} * (plan_.prompt + plan_.decode);
        if (!s_.device.cuda) check_memory(s_.info, std::nullopt, tokens);
        BenchGroup all = group(batch);
        const int steps = plan_.decode - 1;  // the first token is the prompt's
        BenchRow row = {batch, all.first()};
        for (int i = 0; i < std::min(steps, 8); i++) all.next();  // warm-up
        all.rewind();
        std::vector<double> times;
        double total = 0;
        for (int i = 0; i < steps; i++) total += times.emplace_back(all.next());
        row.step = median(times);
        row.rate = batch * steps / total;
        return row;
    }

    void tell(const std::string& text) const {
        if (!options_.json) write_out(text);
    }
    void tell_cells(std::initializer_list<std::string> cells) const {
        std::string line;
        for (const std::string& cell : cells) line += fit(cell, line.empty() ? 5 : 13, true);
        tell(line + "\n");
    }
    double rate(const BenchRow& r) const {  // bytes per second
        return static_cast<double>(cost_.step(r.batch)) / r.step;
    }
    void tell_row(const BenchRow& r) const {
        tell_cells({std::to_string(r.batch), decimals(1000 * r.first, 1) + " ms",
                    decimals(1000 * r.step, 3) + " ms", decimals(r.rate, r.rate < 100 ? 1 : 0),
                    human_bytes(cost_.step(r.batch)), gigabytes_per_second(rate(r)),
                    decimals(100 * rate(r) / bandwidth_, 1) + " %"});
    }

    // clang-format off
    Value as_json() const {
        const std::optional<GpuInfo> gpu = gpu_in_use(s_.device.cuda);
        const std::uint64_t full = cost_.kv_stored * static_cast<std::uint64_t>(s_.info.config.sequence_len);
        const std::uint64_t total = gpu ? gpu->memory_bytes : 0;
        const auto known = [&](Value value) { return gpu ? value : nullptr; };
        const auto row = [&](const BenchRow& r) {
            return object({{"batch_size", r.batch}, {"ttft_sec", r.first}, {"tpot_sec", r.step}, {"tok_per_sec", r.rate},
                           {"bytes_per_step", cost_.step(r.batch)}, {"mbu_percent", 100 * rate(r) / bandwidth_},
                           {"mfu_percent", nullptr}, {"peak_vram_bytes", nullptr}, {"decode_steps", plan_.decode - 1}});
        };
        return object({{"source", s_.info.source}, {"model_tag", s_.info.tag}, {"step", s_.info.step},
            {"model_config", architecture_json(s_.info)}, {"gpu", gpu ? Value(gpu->name) : nullptr},
            {"device", s_.device.backend->device()}, {"dtype", name_of(s_.device.backend->dtype())},
            {"peak_bandwidth_bytes_per_sec", nullptr}, {"read_bandwidth_bytes_per_sec", bandwidth_}, {"total_vram_bytes", known(total)},
            {"num_params", s_.info.parameters}, {"param_dtypes", cost_.dtypes}, {"weight_bytes", cost_.stored},
            {"kv_bytes_per_token", cost_.kv_stored}, {"kv_read_bytes_per_step", cost_.kv_read}, {"bytes_per_step", cost_.step(1)},
            {"context_mid", plan_.prompt + plan_.decode / 2}, {"peak_flops_per_sec", nullptr},
            {"decode_flops_per_token", cost_.flops}, {"prefill_flops", cost_.prefill_flops},
            {"ceiling_bs1_tok_per_sec", bandwidth_ / static_cast<double>(cost_.step(1))},
            {"max_full_context_rows", known((total - std::min(total, cost_.stored)) / full)},
            {"prompt_tokens", plan_.prompt}, {"decode_tokens", plan_.decode}, {"temperature", options_.sampling.temperature},
            {"sweep", array(rows_, row)},
            {"prefill", object({{"tok_per_sec", plan_.prompt / prefill_}, {"mfu_percent", nullptr}, {"time_sec", prefill_}})}});
    }
    // clang-format on

    const Options& options_;
    Session& s_;
    const BenchPlan plan_;
    const std::vector<Token> prompt_;
    const BenchCost cost_ = bench_cost(s_.info, plan_, s_.device.cuda, s_.device.backend->dtype());
    const double bandwidth_ =
        s_.device.cuda ? cuda_read_bandwidth() : cpu_read_bandwidth(options_.threads);
    double prefill_ = 0;
    std::vector<BenchRow> rows_;
};

// Opens the device with room for the largest batch; what does not fit is left out, with a note.
BenchPlan open_bench(Session& s, const Options& o) {
    BenchPlan plan = plan_bench(o, s.info.config, place_for(o).cuda);
    for (;;) {
        const auto largest = std::max_element(plan.batches.begin(), plan.batches.end());
        CudaOptions options;
        options.kv_tokens = static_cast<std::uint64_t>(*largest) * plan.room();
        try {
            s.device = open_device(s.info, o, options);
        } catch (const Error& e) {
            if (e.kind != ErrorKind::out_of_memory || plan.batches.size() < 2) throw;
            note(cat("batch size ", *largest, " is left out: ", e.what()));
            plan.batches.erase(largest);
            continue;
        }
        const bool fell_back = place_for(o).cuda && !s.device.cuda;
        return fell_back ? plan_bench(o, s.info.config, false) : plan;
    }
}

int run_bench(Options& o) {
    catch_interrupts();
    Session s = pick_session(o, "base");
    const BenchPlan plan = open_bench(s, o);
    if (!s.device.cuda && (o.batch_sizes.empty() || o.prompt_tokens == 0 || o.decode_tokens == 0))
        note("what is not given by flags is smaller on the CPU than on a GPU");
    return Bench(o, s, plan).run();
}

// ==== 7. picture =================================================================================
// Pictures of numbers: a canvas, a font of strokes, a colour map. PNG files are stb_image_write's.

struct Rgb {
    std::uint8_t r = 0, g = 0, b = 0;
};
constexpr Rgb kPaper{255, 255, 255}, kInk{28, 36, 48}, kMuted{104, 116, 131}, kRule{222, 227, 233},
    kBlue{32, 96, 214}, kOrange{222, 120, 18}, kNotANumber{214, 40, 150};

// Colours of 0 to 1 in 256 steps: lightness falls evenly from almost white to almost black while the
// hue turns from green-blue to violet, so equal steps look equal, printed in grey too. Computed in
// Oklab (Ottosson 2020), where lightness is one of the three numbers.
Rgb shade_of(double x) {
    const double turn = (195 + 95 * x) * 3.14159265358979 / 180;
    const double chroma = 0.004 + 0.135 * std::sin(3.14159265358979 * std::pow(x, 0.9));
    const double L = 0.985 - 0.735 * x, a = chroma * std::cos(turn), b = chroma * std::sin(turn);
    const auto cube = [](double v) { return v * v * v; };
    const double l = cube(L + 0.3963377774 * a + 0.2158037573 * b),
                 m = cube(L - 0.1055613458 * a - 0.0638541728 * b),
                 s = cube(L - 0.0894841775 * a - 1.2914855480 * b);
    const auto encoded = [](double v) {  // sRGB, as 8 bits
        v = std::clamp(v, 0.0, 1.0);
        v = v <= 0.0031308 ? 12.92 * v : 1.055 * std::pow(v, 1 / 2.4) - 0.055;
        return static_cast<std::uint8_t>(std::lround(255 * v));
    };
    return {encoded(4.0767416621 * l - 3.3077115913 * m + 0.2309699292 * s),
            encoded(-1.2684380046 * l + 2.6097574011 * m - 0.3413193965 * s),
            encoded(-0.0041960863 * l - 0.7034186147 * m + 1.7076147010 * s)};
}
const std::array<Rgb, 256>& shades() {
    static const std::array<Rgb, 256> table = [] {
        std::array<Rgb, 256> t;
        for (std::size_t i = 0; i < t.size(); i++) t[i] = shade_of(static_cast<double>(i) / 255);
        return t;
    }();
    return table;
}
bool is_dark(Rgb c) { return 0.299 * c.r + 0.587 * c.g + 0.114 * c.b < 140; }

// ---- the font: strokes on a grid of 5 x 9 (x right, y down, 6 is the base line), two digits a point.
// A stroke of three points or more is a curve that they pull; sharp corners begin a new one.
// clang-format off
constexpr std::string_view kStrokes[] = {
    "", "2024 26", "1012 3032", "1016 3036 0242 0444", "413010010213334445361605 2026",
    "0640 0010110100 3545463635", "4612112031320405162644", "2022", "302112142536", "102132342516",
    "2125 0244 0442", "2125 0343", "2617 26", "0343", "26", "0640",
    "103041453616050110 1531", "1120 2026 1636", "011030414206 0646", "01103041423323 23334445361605",
    "3036 3004 0444", "4000 0003 0312324345361605", "413010010516364544331304", "0040 4016",
    "103041423313020110 133344453616050413", "051636454130100102133342", "23 26", "23 2617 26",
    "4103 0345", "0242 0444", "0143 4305", "01103041422324 26",
    "461605011030414434 34241413223234", "0620 2046 1434", "0006 003041423303 033344453606",
    "4130100105163645", "0006 002041452606", "0006 0040 0333 0646", "0006 0040 0333",
    "4130100105163645 4543 4323", "0006 4046 0343", "2026 1030 1636", "404536160504",
    "0006 4004 1346", "0006 0646", "0600 0023 2340 4046", "0600 0046 4640", "103041453616050110",
    "0006 003041423303", "103041453616050110 2446", "0006 003041423303 2346",
    "413010010213334445361605", "0040 2026", "000516364540", "0026 2640", "0016 1622 2236 3640",
    "0046 4006", "0023 4023 2326", "0040 4006 0646", "3010 1016 1636", "0046", "1030 3036 3616",
    "0220 2042", "0747", "1022",
    "4332120305163645 4246", "0006 0312324345361605", "4332120305163645", "4046 4332120305163645",
    "0444 444332120305163645", "40302126 0242", "4332120305163645 4247381807", "0006 0312324346",
    "1222 2226 1636 20", "2232 3237281807 30", "0006 4205 1446", "1020 2026 1636",
    "0206 03122326 23324346", "0206 0312324346", "123243453616050312", "0208 0312324345361605",
    "4248 4332120305163645", "0206 0413223243", "43321203143445361605", "20253646 0242",
    "0205163645 4246", "0226 2642", "0216 1623 2336 3642", "0246 4206", "0226 4218",
    "0242 4206 0646", "30212213242536", "2027", "10212233242516", "0413233443",
    "24", "102031 3112 1232", "0208 0205163645 4246", "06 26 46"};  // then · ² µ …
// clang-format on

using Points = std::vector<std::pair<double, double>>;  // on the font's grid
// The curve that the points pull: corners cut twice (Chaikin 1974), ends kept.
Points rounded(Points points) {
    for (int round = 0; round < 2 && points.size() > 2; round++) {
        const bool loop = points.front() == points.back();
        Points next;
        if (!loop) next.push_back(points.front());
        for (std::size_t i = 0; i + 1 < points.size(); i++) {
            const auto [ax, ay] = points[i];
            const auto [bx, by] = points[i + 1];
            next.emplace_back(0.75 * ax + 0.25 * bx, 0.75 * ay + 0.25 * by);
            next.emplace_back(0.25 * ax + 0.75 * bx, 0.25 * ay + 0.75 * by);
        }
        next.push_back(loop ? next.front() : points.back());
        points = std::move(next);
    }
    return points;
}
std::vector<Points> strokes_of(char32_t c) {
    constexpr std::u32string_view kMore = U"\u00b7\u00b2\u00b5\u2026";
    const std::size_t more = kMore.find(c);
    std::size_t at = U'?' - 0x20;  // for what it has not
    if (c >= 0x20 && c < 0x7f) at = c - 0x20;
    if (more != kMore.npos) at = 0x5f + more;
    std::vector<Points> strokes;
    for (const std::string& stroke : split(kStrokes[at], " ")) {
        Points points;
        for (std::size_t i = 0; i + 1 < stroke.size(); i += 2)
            points.emplace_back(stroke[i] - '0', stroke[i + 1] - '0');
        strokes.push_back(rounded(std::move(points)));
    }
    return strokes;
}

// What the font can show of a token: blanks as dots, what is not ASCII as escapes; at most `most` signs.
std::string label_of(std::string_view piece, std::size_t most = 12) {
    std::string out;
    std::size_t fits = 0;  // bytes before a "…"
    const auto add = [&](const std::string& unit) {
        if (width_of(out) < most) fits = out.size();
        out += unit;
    };
    if (detail::is_utf8(piece)) {
        each_character(piece, [&](char32_t c, std::string_view bytes) {
            add(c == ' '               ? "·"
                : c == '\n'            ? "\\n"
                : c > 0x20 && c < 0x7f ? std::string(bytes)
                : c < 0x10000          ? "\\u" + hex(c, 4)
                                       : "\\U" + hex(c, 6));
        });
    } else {
        for (const char c : piece) add("\\x" + hex(static_cast<unsigned char>(c), 2));
    }
    return width_of(out) <= most ? out : out.substr(0, fits) + "…";
}

#ifdef NANOGPT_PNG
constexpr bool kHasPng = true;
#else
constexpr bool kHasPng = false;
#endif

class Picture {
public:
    Picture(int width, int height)
        : width_(width),
          height_(height),
          pixels_(static_cast<std::size_t>(width) * static_cast<std::size_t>(height), kPaper) {}
    int width() const { return width_; }
    int height() const { return height_; }

    void fill(int x, int y, int w, int h, Rgb color) {
        for (int j = std::max(y, 0); j < std::min(y + h, height_); j++) {
            for (int i = std::max(x, 0); i < std::min(x + w, width_); i++) at(i, j) = color;
        }
    }
    void frame(int x, int y, int w, int h) {  // around the rectangle
        fill(x - 1, y - 1, w + 2, 1, kRule), fill(x - 1, y + h, w + 2, 1, kRule);
        fill(x - 1, y - 1, 1, h + 2, kRule), fill(x + w, y - 1, 1, h + 2, kRule);
    }
    // A line with round ends; of no length, a dot. `half` is half its width, in pixels.
    void line(double x0, double y0, double x1, double y1, Rgb color, double half) {
        const double dx = x1 - x0, dy = y1 - y0, length = dx * dx + dy * dy, reach = half + 1;
        const auto from = [](double v) { return static_cast<int>(std::floor(v)); };
        for (int j = from(std::min(y0, y1) - reach); j <= from(std::max(y0, y1) + reach); j++) {
            for (int i = from(std::min(x0, x1) - reach); i <= from(std::max(x0, x1) + reach); i++) {
                const double px = i + 0.5 - x0, py = j + 0.5 - y0;
                const double t =
                    length > 0 ? std::clamp((px * dx + py * dy) / length, 0.0, 1.0) : 0;
                const double distance = std::hypot(px - t * dx, py - t * dy);
                blend(i, j, color, std::clamp(half + 0.5 - distance, 0.0, 1.0));
            }
        }
    }
    void dot(double x, double y, Rgb color, double radius) { line(x, y, x, y, color, radius); }
    // Signs of 6 x 10 units from the upper left corner on; upwards: from the lower left corner up.
    void text(int x, int y, std::string_view words, Rgb color = kInk, double unit = 1.5,
              bool bold = false, bool upwards = false) {
        const double half = (bold ? 0.5 : 0.36) * unit;
        double along = 0;
        each_character(words, [&](char32_t c, std::string_view) {
            const auto put = [&](std::pair<double, double> p) {  // of the grid to the picture
                const double u = along + (p.first + 1) * unit, v = (p.second + 1.2) * unit;
                return upwards ? std::pair(x + v, y - u) : std::pair(x + u, y + v);
            };
            for (const Points& stroke : strokes_of(c)) {
                auto [x0, y0] = put(stroke[0]);
                if (stroke.size() == 1) dot(x0, y0, color, 1.5 * half);
                for (std::size_t i = 1; i < stroke.size(); i++) {
                    const auto [x1, y1] = put(stroke[i]);
                    line(x0, y0, x1, y1, color, half);
                    x0 = x1, y0 = y1;
                }
            }
            along += 6 * unit;
        });
    }
    // Of words that the font can show: each sign has one column.
    static int length(std::string_view words, double unit = 1.5) {
        return static_cast<int>(std::ceil(static_cast<double>(width_of(words)) * 6 * unit));
    }
    void paste(const Picture& other, int x, int y) {
        for (int j = 0; j < other.height_ && y + j < height_; j++) {
            for (int i = 0; i < other.width_ && x + i < width_; i++)
                at(x + i, y + j) = other.at(i, j);
        }
    }
    std::string png() const {
        std::string bytes;
#ifdef NANOGPT_PNG
        const auto append = [](void* to, void* part, int size) {
            static_cast<std::string*>(to)->append(static_cast<const char*>(part),
                                                  static_cast<std::size_t>(size));
        };
        // flat areas and few colours: trying more filters and longer matches saves 3 % of the bytes
        // and made a walk with pictures a quarter slower
        stbi_write_force_png_filter = 2, stbi_write_png_compression_level = 5;
        if (stbi_write_png_to_func(append, &bytes, width_, height_, 3, pixels_.data(),
                                   3 * width_) == 0)
            throw std::bad_alloc();
#endif
        return bytes;
    }

private:
    static_assert(sizeof(Rgb) == 3, "pixels are handed on as bytes");
    std::size_t index(int x, int y) const {
        return static_cast<std::size_t>(y) * static_cast<std::size_t>(width_) +
               static_cast<std::size_t>(x);
    }
    Rgb& at(int x, int y) { return pixels_[index(x, y)]; }
    const Rgb& at(int x, int y) const { return pixels_[index(x, y)]; }
    void blend(int x, int y, Rgb color, double share) {
        if (share <= 0 || x < 0 || y < 0 || x >= width_ || y >= height_) return;
        Rgb& p = at(x, y);
        const auto mix = [share](std::uint8_t a, std::uint8_t b) {
            return static_cast<std::uint8_t>(std::lround(a + share * (b - a)));
        };
        p = {mix(p.r, color.r), mix(p.g, color.g), mix(p.b, color.b)};
    }
    int width_, height_;
    std::vector<Rgb> pixels_;
};

// ---- charts

// Numbers to colours: `low` is the first shade and `high` the last; of logarithms if `log`.
struct Scale {
    double low = 0, high = 1;
    bool log = false;
    Rgb color(double value) const {
        if (std::isnan(value)) return kNotANumber;
        const auto f = [&](double v) { return log ? std::log(std::max(v, 1e-30)) : v; };
        const double x = high > low ? (f(value) - f(low)) / (f(high) - f(low)) : 0;
        return shades()[static_cast<std::size_t>(std::lround(255 * std::clamp(x, 0.0, 1.0)))];
    }
};
// From the smallest to the largest of the finite numbers above 0, of their logarithms.
Scale logarithmic_scale(std::span<const float> values) {
    Scale scale{std::numeric_limits<double>::infinity(), 0, true};
    for (const float v : values) {
        if (!std::isfinite(v) || v <= 0) continue;
        scale.low = std::min(scale.low, double{v}), scale.high = std::max(scale.high, double{v});
    }
    return scale.low <= scale.high ? scale : Scale{0, 1, true};
}

// A matrix in a picture, its geometry kept for the picture's twin in numbers.
struct Grid {
    std::string what;
    int x = 0, y = 0, cell_width = 1, cell_height = 1, rows = 0, columns = 0;
    Scale scale = {};
};
struct Chart {
    std::string name, title, alt;
    Picture picture{1, 1};
    std::vector<Grid> grids = {};
    int bar_x = -1, bar_y = -1;  // the scale's 256 columns begin here; -1: it has none
};
constexpr int kMargin = 24, kTop = 64;  // pixels; the title's line is above kTop

// Makes room: `width` x `height` below the title, and a line for the caption.
void begin_chart(Chart& chart, int width, int height, std::string_view caption) {
    const int wide = std::max({width, Picture::length(chart.title, 2), Picture::length(caption)});
    chart.picture = Picture(wide + 2 * kMargin, kTop + height + 44 + kMargin);
    chart.picture.text(kMargin - 3, 18, chart.title, kInk, 2, true);
    chart.picture.text(kMargin - 2, kTop + height + 30, caption, kMuted);
}
std::string few_digits(double value) {  // three that count; no exponents where people read
    if (std::abs(value) >= 999.5 && std::abs(value) < 1e15) return thousands(std::llround(value));
    char text[32];
    std::snprintf(text, sizeof text, "%.3g", value);
    return text;
}
// Room for matrices; below them the 256 shades in a row, with the numbers at their ends.
void begin_matrices(Chart& chart, int width, int height, std::string_view caption,
                    const Scale& scale, std::string_view unit) {
    const std::string low = few_digits(scale.low), high = cat(few_digits(scale.high), " ", unit);
    const int left = Picture::length(low) + 6, y = kTop + height + 10;
    begin_chart(chart, std::max(width, left + 262 + Picture::length(high)), height + 26, caption);
    chart.bar_x = kMargin + left, chart.bar_y = y;
    chart.picture.text(kMargin, y - 2, low, kMuted);
    for (int i = 0; i < 256; i++)
        chart.picture.fill(chart.bar_x + i, y, 1, 12, shades()[static_cast<std::size_t>(i)]);
    chart.picture.frame(chart.bar_x, y, 256, 12);
    chart.picture.text(chart.bar_x + 262, y - 2, high, kMuted);
}
void draw_grid(Chart& chart, const Grid& grid, std::span<const float> values) {
    for (int i = 0; i < grid.rows * grid.columns; i++) {
        chart.picture.fill(grid.x + i % grid.columns * grid.cell_width,
                           grid.y + i / grid.columns * grid.cell_height, grid.cell_width,
                           grid.cell_height,
                           grid.scale.color(double{values[static_cast<std::size_t>(i)]}));
    }
    chart.picture.frame(grid.x, grid.y, grid.columns * grid.cell_width,
                        grid.rows * grid.cell_height);
    chart.grids.push_back(grid);
}

// Words beside the rows of a matrix and above its columns: upwards where a column is too narrow.
struct Labels {
    std::vector<std::string> rows, columns;
    int cell_width, cell_height;
    bool bold = false;  // what is on top, and the last row
    int left() const { return longest(rows, cell_height) + 10; }
    int top() const { return upwards() ? longest(columns, cell_width) + 6 : 20; }
    void draw(Picture& picture, int x, int y) const {  // of a matrix that begins there
        const auto middle = [](int cell) {
            return cell / 2 - static_cast<int>(4.2 * unit(cell) + 0.8);
        };
        int at = y + middle(cell_height);
        for (const std::string& row : rows) {
            const double size = unit(cell_height);
            const bool strong = bold && &row == &rows.back();
            picture.text(x - 8 - Picture::length(row, size), at, row, strong ? kInk : kMuted, size,
                         strong);
            at += cell_height;
        }
        at = x + (upwards() ? middle(cell_width) : 4);
        for (const std::string& column : columns) {
            picture.text(at, upwards() ? y - 4 : y - 19, column, bold ? kInk : kMuted,
                         unit(cell_width), bold, upwards());
            at += cell_width;
        }
    }

private:
    static double unit(int cell) { return cell >= 14 ? 1.4 : 1; }
    static int longest(const std::vector<std::string>& words, int cell) {
        int most = 0;
        for (const std::string& word : words)
            most = std::max(most, Picture::length(word, unit(cell)));
        return most;
    }
    bool upwards() const { return longest(columns, cell_width) > cell_width; }
};
Chart matrix_chart(Chart chart, const Labels& labels, std::span<const float> values,
                   const Scale& scale, std::string_view unit, std::string_view caption) {
    const int rows = static_cast<int>(labels.rows.size()),
              columns = static_cast<int>(values.size()) / rows;
    const int left = labels.left(), top = labels.top(), wide = labels.cell_width,
              high = labels.cell_height;
    begin_matrices(chart, left + columns * wide, top + rows * high, caption, scale, unit);
    labels.draw(chart.picture, kMargin + left, kTop + top);
    draw_grid(chart, {chart.name, kMargin + left, kTop + top, wide, high, rows, columns, scale},
              values);
    return chart;
}

struct Bar {
    std::string name;  // empty: it belongs to the one above it
    std::string label;
    double value;
    Rgb color;
    bool bold = false;
};
Chart bars_chart(Chart chart, const std::vector<Bar>& bars, std::string_view caption) {
    constexpr int kSide = 170, kLongest = 560, kHigh = 14;
    const auto space = [](const Bar& bar) { return bar.name.empty() ? 2 : 10; };
    int height = 0;
    double most = 1e-9;
    for (const Bar& bar : bars) height += space(bar) + kHigh, most = std::max(most, bar.value);
    begin_chart(chart, kSide + kLongest + 100, height, caption);
    int y = kTop;
    for (const Bar& bar : bars) {
        const int x = kMargin + kSide,
                  length = std::max(1, static_cast<int>(std::lround(bar.value / most * kLongest)));
        y += space(bar);
        chart.picture.text(x - 8 - Picture::length(bar.name), y - 1, bar.name, kInk, 1.5, bar.bold);
        chart.picture.fill(x, y, length, kHigh, bar.color);
        chart.picture.text(x + length + 6, y, bar.label, kMuted, 1.3);
        y += kHigh;
    }
    return chart;
}

// The largest of each block, so that one bright point among a thousand stays: (n, n) to (m, m), m <= n.
std::vector<float> max_pooled(std::span<const float> map, std::size_t n, std::size_t m) {
    std::vector<float> out(m * m, -std::numeric_limits<float>::infinity());
    for (std::size_t r = 0; r < n; r++) {
        for (std::size_t c = 0; c < n; c++) {
            float& cell = out[r * m / n * m + c * m / n];
            const float v = map[r * n + c];
            if (v > cell || std::isnan(v)) cell = v;
        }
    }
    return out;
}

// ==== 8. walk ====================================================================================
// One prompt through the forward pass, looked at from inside: for every stage what goes out, in
// numbers, in time and in pictures. What is shown are the header's hook points: the same arithmetic
// that chat computes with, observed.

// ---- what an operation costs

// Of one operation, of some, of a whole pass.
struct Cost {
    double flops = 0, bytes = 0, seconds = 0;
    Cost& operator+=(const Cost& c) {
        return flops += c.flops, bytes += c.bytes, seconds += c.seconds, *this;
    }
};
// Of the two passes that are timed: all tokens of the prompt are read, then one more.
using Costs = std::array<Cost, 2>;
constexpr std::array kPasses = {"prefill", "decode"};

struct Sizes {
    const Config& c;
    double T, pos;  // tokens of the pass, and before it
    // bytes of a number: in a matrix, in an embedding, of an activation, of a key
    double weight, table, value, kept;
    double D = c.n_embd, H = c.n_head, KV = c.n_kv_head * c.head_dim();
};
// A matrix product reads its weights once and its rows once: x (T, K), w (N, K) -> (T, N).
Cost product(const Sizes& s, double T, double K, double N) {
    return {2 * T * N * K, N * K * s.weight + T * (K + N) * s.value};
}
// `n` numbers are read, as many are written.
Cost each_number(const Sizes& s, double flops, double n) { return {flops * n, 2 * n * s.value}; }
Cost norm_cost(const Sizes& s, int) { return each_number(s, 3, s.T * s.D); }
Cost add_cost(const Sizes& s, int) { return {s.T * s.D, 3 * s.T * s.D * s.value}; }
Cost smear_cost(const Sizes& s, int) {  // the first token has none before it
    return {(s.T - (s.pos == 0)) * (48 + 2 * s.D), 3 * s.T * s.D * s.value};
}
Cost mix_cost(const Sizes& s, int) {
    const double n = s.T * s.D;
    if (s.c.generation == Generation::g2e)  // and the bigram's embedding
        return {5 * n, n * (s.table + 3 * s.value)};
    return s.c.has_lambdas() ? Cost{3 * n, 3 * n * s.value} : Cost{};
}
Cost value_cost(const Sizes& s, int) {
    const double gate = s.c.n_kv_head * 2.0 * s.c.ve_gate_channels;
    return {s.T * (gate + 2 * s.KV), s.T * s.KV * (s.table + 2 * s.value)};
}
Cost attention_cost(const Sizes& s, int layer) {
    const double S = s.pos + s.T;
    const double window = std::min(S, double{1} + std::min(s.c.window(layer), 1 << 30));
    double pairs = 0;  // of a query and a key that it sees
    for (double t = 0; t < s.T; t++) pairs += std::min(s.pos + t + 1, window);
    const double keys = std::min(S, window + s.T - 1);
    return {pairs * 4 * (s.D + s.H), 2 * s.T * s.D * s.value + 2 * (keys + s.T) * s.KV * s.kept};
}

// What is computed between the hook point of the operation before and its own. A GPU computes some in
// one kernel with others: they have no time of their own there.
struct Operation {
    HookPoint point;
    std::string_view name, kind;
    HookPoint on_gpu;  // whose time holds it there
    Cost (*cost)(const Sizes&, int layer);
    bool large() const { return kind == "product" || kind == "attention"; }
    HookPoint timed_at(bool cuda) const { return cuda ? on_gpu : point; }
};
constexpr Operation kOperations[] = {
    {HookPoint::embed, "embedding", "lookup", HookPoint::embed_norm,
     [](const Sizes& s, int) {
         return Cost{0, s.T * s.D * (s.table + s.value)};
     }},
    {HookPoint::embed_norm, "norm of it", "norm", HookPoint::embed_norm, norm_cost},
    {HookPoint::smear, "previous token", "mix", HookPoint::embed_norm, smear_cost},
    {HookPoint::resid_pre, "residual mix", "mix", HookPoint::attn_in, mix_cost},
    {HookPoint::attn_in, "norm", "norm", HookPoint::attn_in, norm_cost},
    {HookPoint::q, "q, k, v", "product", HookPoint::q,
     [](const Sizes& s, int) { return product(s, s.T, s.D, s.D + 2 * s.KV); }},
    {HookPoint::ve_gate, "value embedding", "mix", HookPoint::rot_q, value_cost},
    {HookPoint::rot_q, "rotary, QK norm", "norm", HookPoint::rot_q,
     [](const Sizes& s, int) { return each_number(s, 7, s.T * (s.D + s.KV)); }},
    {HookPoint::z, "attention", "attention", HookPoint::z, attention_cost},
    {HookPoint::attn_out, "attn c_proj", "product", HookPoint::resid_mid,
     [](const Sizes& s, int) { return product(s, s.T, s.D, s.D); }},
    {HookPoint::resid_mid, "add", "mix", HookPoint::resid_mid, add_cost},
    {HookPoint::mlp_in, "norm (MLP)", "norm", HookPoint::mlp_in, norm_cost},
    {HookPoint::mlp_pre, "mlp c_fc", "product", HookPoint::mlp_post,
     [](const Sizes& s, int) { return product(s, s.T, s.D, 4 * s.D); }},
    {HookPoint::mlp_post, "relu²", "mix", HookPoint::mlp_post,
     [](const Sizes& s, int) { return each_number(s, 2, s.T * 4 * s.D); }},
    {HookPoint::mlp_out, "mlp c_proj", "product", HookPoint::resid_post,
     [](const Sizes& s, int) { return product(s, s.T, 4 * s.D, s.D); }},
    {HookPoint::resid_post, "add (MLP)", "mix", HookPoint::resid_post, add_cost},
    {HookPoint::backout, "backout", "mix", HookPoint::final_norm,
     [](const Sizes& s, int) {
         return Cost{2 * s.T * s.D, 3 * s.T * s.D * s.value};
     }},
    {HookPoint::final_norm, "final norm", "norm", HookPoint::final_norm, norm_cost},
    {HookPoint::logits, "lm_head", "product", HookPoint::logits,  // of the last token alone
     [](const Sizes& s, int) { return product(s, 1, s.D, s.c.vocab_size); }},
};
const Operation* operation_at(HookPoint point) {
    const auto at = std::ranges::find(kOperations, point, &Operation::point);
    return at == std::end(kOperations) ? nullptr : at;
}

// Seconds of every operation of a pass. Asking whether anybody wants to watch is what a pass does there
// anyway, so a clock that wants nothing sees it as it always runs; only relu² is asked for apart.
class StageClock : public Observer {
public:
    explicit StageClock(bool cuda) : cuda_(cuda) {}
    bool wants(HookPoint point, int layer) override {
        lap(point, layer);
        return point == HookPoint::mlp_pre && !cuda_;
    }
    void on(const Activation&) override {}
    void lap(HookPoint point, int layer) {
        if (point == HookPoint::v) point = HookPoint::ve_gate;  // whose work is done only here
        if (cuda_ && point == HookPoint::smear) point = HookPoint::embed_norm;  // one kernel's
        const Operation* const op = operation_at(point);
        if (op == nullptr || op->timed_at(cuda_) != point) return;  // it is the next one's time
        if (cuda_) cuda_wait();  // a launched kernel is not a finished one
        seconds_[{layer, point}] += seconds_since(last_);
        last_ = Clock::now();
    }
    double seconds(HookPoint point, int layer) { return seconds_[{layer, point}]; }

private:
    bool cuda_;
    std::map<std::pair<int, HookPoint>, double> seconds_;
    Clock::time_point last_ = Clock::now();
};

struct Peak {  // what the device can do at best. Zeros: it could not be measured
    double bandwidth = 0, rate = 0;  // bytes read; multiplications and additions: per second
    bool known() const { return bandwidth > 0 && rate > 0; }
    // Below the roof's edge the memory sets the pace, above it the multipliers.
    bool memory_bound(const Cost& c) const { return c.flops * bandwidth < c.bytes * rate; }
    // Of the faster of the two that it could reach.
    double share(const Cost& c) const {
        return c.seconds > 0 ? std::max(c.bytes / bandwidth, c.flops / rate) / c.seconds : 0;
    }
};
// Multiplications and additions per second: the best of some products of the kind a prompt needs.
double cpu_product_rate(ThreadPool& pool) {
    constexpr std::int64_t T = 256, N = 1024, K = 1024;
    const auto values = std::make_shared<std::vector<float>>(N * K, 0.5f);
    const auto* const bytes = reinterpret_cast<const std::byte*>(values->data());
    const Tensor w{DType::f32, {N, K}, {values, bytes}};
    std::vector<float> x(T * K, 0.25f), y(T * N);
    double best = 0;
    for (int pass = 0; pass < 6; pass++) {
        const auto start = Clock::now();
        ops::linear(pool, y.data(), x.data(), w, T, N);
        best = std::max(best, 2.0 * T * N * K / seconds_since(start));
    }
    return best;
}
Peak measure_peak(bool cuda, int threads) {
    if (cuda) return {cuda_read_bandwidth(), cuda_product_rate()};
    ThreadPool pool(threads);
    return {cpu_read_bandwidth(threads), cpu_product_rate(pool)};
}

// ---- what is kept of a walk

struct WalkPlan {
    std::vector<Token> prompt;  // with what begins a text in front
    std::string text;
    std::vector<int> layers;  // those looked at closely
    int top = 10, runs = 5;
    SamplingParams sampling = {};
};
struct Stage {  // of one hook point
    HookPoint point;
    int layer;  // -1: of the whole model
    std::vector<int> shape;
    double least = 0, most = 0, mean = 0, rms = 0, zero = 0;  // zero: share of zeros
    std::size_t bad = 0;                                      // NaN and infinities
    Costs costs = {};                                         // of the operation that it ends
};
struct OperationSum {  // of all layers
    const Operation* operation;
    Costs costs = {};
};
struct Head {  // how one head looks back; means over the queries, in bits, positions, shares
    int layer, head;
    double entropy = 0, distance = 0, first = 0, previous = 0, itself = 0;
    std::vector<float> small = {};  // (m, m), pooled
    std::vector<float> map = {};    // (T, T), of the layers looked at closely
    std::string_view label() const {
        if (first > 0.5) return "rests on the first token";
        if (previous > 0.5) return "looks at the previous token";
        if (itself > 0.5) return "looks at itself";
        return distance < 3 ? "local" : "broad";
    }
};
struct Candidate {
    Token token = 0;
    double probability = 0;
    std::string piece = {};
};
struct LensCell {
    Candidate best;
    double entropy = 0;  // in bits
    int rank = 1;        // of the token that the model ends up with
    double chosen = 0;   // its probability
};
struct LensRow {
    std::string after;  // a layer, "embed" or "output": the last row
    std::vector<LensCell> cells = {};
};
constexpr std::size_t kLensColumns = 16, kSmall = 48, kMostDrawn = 512, kMostLabelled = 64;

struct Walk {
    WalkPlan plan;
    ModelInfo info;
    std::string device;
    DType dtype = DType::f32;
    bool cuda = false;
    Peak peak;
    Value tokens = nullptr;  // as JSON
    std::vector<std::string> pieces;
    std::vector<Stage> stages;
    std::vector<OperationSum> operations;
    Costs whole;                          // unobserved
    std::vector<Head> heads;              // (L, H)
    std::vector<float> residual, silent;  // (L + 1, T) RMS; (L, T) share of zeros
    std::vector<LensRow> lens;
    std::vector<Candidate> next;
    Candidate choice;
    std::size_t T() const { return plan.prompt.size(); }
    std::size_t lens_first() const { return T() - std::min(T(), kLensColumns); }  // a position
    std::size_t small() const { return std::min(T(), kSmall); }  // positions of a pooled map
};

// Masked scores are -infinity on purpose: they count as nothing.
Stage summarize(const Activation& a) {
    Stage s{a.point, a.layer, {a.shape.begin(), a.shape.end()}};
    double sum = 0, squares = 0;
    std::size_t zeros = 0, n = 0;
    s.least = std::numeric_limits<double>::infinity(), s.most = -s.least;
    for (const float v : a.values) {
        if (a.point == HookPoint::attn_scores && v == -std::numeric_limits<float>::infinity())
            continue;
        if (!std::isfinite(v)) {
            s.bad++;
            continue;
        }
        const double x = double{v};
        s.least = std::min(s.least, x), s.most = std::max(s.most, x);
        sum += x, squares += x * x, zeros += x == 0, n++;
    }
    if (n == 0) return s.least = s.most = s.mean = s.rms = std::nan(""), s;
    const auto count = static_cast<double>(n);
    s.mean = sum / count, s.rms = std::sqrt(squares / count);
    s.zero = static_cast<double>(zeros) / count;
    return s;
}
void summarize_head(Head& h, std::span<const float> map, std::size_t T) {
    const std::size_t begin = T > 1 ? 1 : 0;  // the first token has nothing to choose from
    for (std::size_t t = begin; t < T; t++) {
        for (std::size_t key = 0; key <= t; key++) {
            const double p = double{map[t * T + key]};
            if (p > 0) h.entropy -= p * std::log2(p);
            h.distance += p * static_cast<double>(t - key);
        }
        h.first += double{map[t * T]}, h.itself += double{map[t * T + t]};
        if (t > 0) h.previous += double{map[t * T + t - 1]};
    }
    for (double* sum : {&h.entropy, &h.distance, &h.first, &h.previous, &h.itself})
        *sum /= static_cast<double>(T - begin);
}

// softmax(logits). NaN is impossible, as it is to the sampler; where nothing is left all are NaN.
std::vector<double> probabilities(std::span<const float> logits) {
    double top = -std::numeric_limits<double>::infinity(), sum = 0;
    for (const float v : logits) top = double{v} > top ? double{v} : top;
    std::vector<double> p;
    for (const float v : logits)
        sum += p.emplace_back(std::isnan(v) ? 0.0 : std::exp(double{v} - top));
    for (double& x : p) x /= sum;
    return p;
}
// The likeliest tokens, and how sure the model is.
std::vector<Candidate> likeliest(std::span<const double> p, std::size_t n) {
    std::vector<Token> ids(p.size());
    std::iota(ids.begin(), ids.end(), 0);
    const auto at = [&](Token id) { return p[static_cast<std::size_t>(id)]; };
    const auto end = ids.begin() + static_cast<std::ptrdiff_t>(std::min(n, ids.size()));
    std::partial_sort(ids.begin(), end, ids.end(),
                      [&](Token a, Token b) { return at(a) != at(b) ? at(a) > at(b) : a < b; });
    std::vector<Candidate> best;
    for (auto id = ids.begin(); id != end; ++id) best.push_back({*id, at(*id)});
    return best;
}

// ---- walking

// The most memory for maps: of the layer under observation, and of the layers that are kept.
void check_maps(const Config& c, std::size_t T, std::size_t layers) {
    const std::uint64_t map = std::uint64_t{4} * static_cast<std::uint64_t>(c.n_head) * T * T;
    constexpr std::uint64_t kMost = std::uint64_t{1} << 30;
    if (map * (2 + layers) <= kMost) return;
    bad_usage(cat("walk: the attention maps of ", layers, " layers and ", T, " tokens would take ",
                  human_bytes(map * (2 + layers)), ", ", human_bytes(kMost),
                  " are the most. Choose fewer --layers or a shorter text"));
}

// Walks pass by pass, so that others may have their turn between two of them. The device (with its
// model's lm_head), the sequence (room for the text and one token more) and the threads stay the
// caller's.
class Walker : private Observer {
public:
    Walker(const Device& device, Sequence& sequence, ThreadPool& pool, const ModelInfo& info,
           const Tokenizer& tokenizer, const WalkPlan& plan)
        : device_(device), sequence_(sequence), pool_(pool), tokenizer_(tokenizer) {
        w_.plan = plan, w_.info = info, w_.cuda = device.cuda;
        w_.device = device.backend->device(), w_.dtype = device.backend->dtype();
        for (const Token t : plan.prompt) w_.pieces.emplace_back(tokenizer.piece(t));
        w_.tokens = array(plan.prompt, [&](Token t) { return token_json(tokenizer, t); });
    }
    // One more pass; false when there is none left: observed for the numbers, then the lens, then timed,
    // once more than counts, and then the same for the token that the model chose.
    bool advance() {
        const std::size_t at = done_++, lens = streams_.size();
        if (at == 0) {
            observe();
        } else if (at <= lens) {
            look_through_lens(lens - at);
        } else {
            time((at - lens - 1) / timed(), (at - lens - 1) % timed());
        }
        return done_ < passes();
    }
    std::size_t passes() const { return 1 + streams_.size() + 2 * timed(); }
    std::size_t done() const { return done_; }
    Walk take() { return std::move(w_); }

private:
    std::size_t timed() const { return static_cast<std::size_t>(w_.plan.runs) + 1; }
    std::vector<float> step(std::size_t pass, Observer* observer) {
        std::span<const Token> tokens = w_.plan.prompt;
        if (pass == 1) tokens = {&w_.choice.token, 1};
        sequence_.rewind(pass == 0 ? 0 : static_cast<int>(w_.T()));
        const Chunk chunk{&sequence_, tokens, pass == 0};
        const std::span<const float> logits = device_.backend->step({&chunk, 1}, observer);
        return {logits.begin(), logits.end()};
    }
    std::vector<Candidate> named_likeliest(std::span<const double> p, std::size_t n) const {
        std::vector<Candidate> best = likeliest(p, n);
        for (Candidate& c : best) c.piece = tokenizer_.piece(c.token);
        return best;
    }

    void observe() {
        const std::vector<float> logits = step(0, this);
        const int shape[] = {1, static_cast<int>(logits.size())};
        on({HookPoint::logits, -1, 0, shape, logits});
        const Token choice =
            Sampler(w_.plan.sampling).sample(logits);  // throws if they are no numbers
        const std::vector<double> p = probabilities(logits);
        w_.choice = {choice, p[static_cast<std::size_t>(choice)],
                     std::string(tokenizer_.piece(choice))};
        w_.next = named_likeliest(p, static_cast<std::size_t>(w_.plan.top));
        w_.lens.resize(streams_.size());
        count_costs();
    }
    bool wants(HookPoint point, int) override {
        return point != HookPoint::logits_raw && point != HookPoint::logits;
    }
    void on(const Activation& a) override {
        w_.stages.push_back(summarize(a));
        const std::size_t width = a.values.size() / w_.T();  // of a token
        const bool x0 = a.point == HookPoint::embed_norm || a.point == HookPoint::smear;
        const bool stream = x0 || a.point == HookPoint::resid_post;
        if (x0) w_.residual.clear(), streams_.clear();  // smeared, if it is
        if (stream || a.point == HookPoint::final_norm) {
            const auto columns = a.values.subspan(w_.lens_first() * width);
            streams_.emplace_back(columns.begin(), columns.end());
        }
        for (std::size_t t = 0; (stream || a.point == HookPoint::mlp_post) && t < w_.T(); t++) {
            double zeros = 0, squares = 0;
            for (const float v : a.values.subspan(t * width, width))
                zeros += v == 0, squares += double{v} * double{v};
            const auto n = static_cast<double>(width);
            if (stream) w_.residual.push_back(static_cast<float>(std::sqrt(squares / n)));
            if (a.point == HookPoint::mlp_post) w_.silent.push_back(static_cast<float>(zeros / n));
        }
        if (a.point == HookPoint::pattern) attention(a);
    }
    void attention(const Activation& a) {
        const bool close = has(w_.plan.layers, a.layer);
        const std::size_t size = w_.T() * w_.T();
        for (int head = 0; head < w_.info.config.n_head; head++) {
            const auto map = a.values.subspan(static_cast<std::size_t>(head) * size, size);
            Head& h = w_.heads.emplace_back(Head{a.layer, head});
            summarize_head(h, map, w_.T());
            h.small = max_pooled(map, w_.T(), w_.small());
            if (close) h.map.assign(map.begin(), map.end());
        }
    }
    void count_costs() {
        const auto held = [&](std::string_view tensor) {  // bfloat16 in the file stays so
            const auto at = std::ranges::find(w_.info.tensors, tensor, &TensorInfo::name);
            const bool half = at != w_.info.tensors.end() && at->dtype == DType::bf16;
            return half || w_.dtype == DType::bf16 ? 2.0 : 4.0;
        };
        const double weight = held("lm_head.weight"), table = held("transformer.wte.weight"),
                     value = w_.cuda ? 2 : 4;
        const auto T = static_cast<double>(w_.T());
        const Sizes prompt{w_.info.config, T, 0, weight, table, value, value},
            one{w_.info.config, 1, T, weight, table, value, value};
        for (Stage& s : w_.stages) {
            const Operation* const op = operation_at(s.point);
            if (op != nullptr) s.costs = {op->cost(prompt, s.layer), op->cost(one, s.layer)};
            for (std::size_t pass = 0; pass < 2; pass++) w_.whole[pass] += s.costs[pass];
        }
    }

    // Logit lens (nostalgebraist 2020): what the model would say if it ended after a layer, and how the
    // token it really ends up with stands there. The last stream is the output: it comes first, and is
    // normed already. streams_ (L + 2) of (columns, D).
    void look_through_lens(std::size_t i) {
        const Config& c = w_.info.config;
        const auto D = static_cast<std::size_t>(c.n_embd),
                   V = static_cast<std::size_t>(c.vocab_size);
        const std::size_t columns = streams_[i].size() / D;
        std::vector<float>&x = streams_[i], logits(columns * V);
        LensRow& row = w_.lens[i];
        const bool output = i + 1 == streams_.size();
        row.after = output ? "output" : i == 0 ? "embed" : std::to_string(i - 1);
        // G4 takes out some of the middle layer before the output: this row is not the output yet.
        if (i + 2 == streams_.size() && c.generation == Generation::g4)
            row.after += " (no backout)";
        if (!output) ops::rms_norm(x.data(), x.data(), columns, D);
        ops::linear(pool_, logits.data(), x.data(), device_.lm_head, columns, V);
        for (std::size_t t = 0; t < columns; t++) {
            float* const at = &logits[t * V];
            ops::softcap(at, V, c.softcap);
            const std::vector<double> p = probabilities({at, V});
            LensCell cell{named_likeliest(p, 1)[0]};
            const Token final_token = output ? cell.best.token : w_.lens.back().cells[t].best.token;
            cell.chosen = p[static_cast<std::size_t>(final_token)];
            for (std::size_t id = 0; id < V; id++) {
                if (p[id] != 0) cell.entropy -= p[id] * std::log2(p[id]);
                cell.rank += p[id] > cell.chosen ||
                             (p[id] == cell.chosen && static_cast<Token>(id) < final_token);
            }
            row.cells.push_back(cell);
        }
    }

    // One clocked and one plain pass; the first is not counted. Medians after the last.
    void time(std::size_t pass, std::size_t run) {
        StageClock clock(w_.cuda);
        step(pass, &clock);
        clock.lap(HookPoint::logits, -1);
        const auto start = Clock::now();
        step(pass, nullptr);
        whole_.push_back(seconds_since(start));
        laps_.push_back(std::move(clock));
        if (run == 0) laps_.clear(), whole_.clear();
        if (run + 1 < timed()) return;
        for (Stage& s : w_.stages) {
            std::vector<double> seconds;
            for (StageClock& lap : laps_) seconds.push_back(lap.seconds(s.point, s.layer));
            s.costs[pass].seconds = median(seconds);
        }
        w_.whole[pass].seconds = median(whole_);
        if (pass == 1) sum_up();
    }
    void sum_up() {
        for (const Operation& op : kOperations) {
            OperationSum sum{&op};
            for (const Stage& s : w_.stages) {
                const Operation* const part = operation_at(s.point);
                if (part == nullptr || part->timed_at(w_.cuda) != op.point) continue;
                for (std::size_t pass = 0; pass < 2; pass++) sum.costs[pass] += s.costs[pass];
            }
            if (sum.costs[0].bytes > 0) w_.operations.push_back(sum);
        }
    }

    const Device& device_;
    Sequence& sequence_;
    ThreadPool& pool_;
    const Tokenizer& tokenizer_;
    Walk w_;
    std::size_t done_ = 0;                     // passes
    std::vector<std::vector<float>> streams_;  // the residual stream at the lens' positions
    std::vector<StageClock> laps_;
    std::vector<double> whole_;
};

// ---- pictures

// Of the tokens from a position on.
std::vector<std::string> labels_from(const Walk& w, std::size_t first) {
    std::vector<std::string> labels;
    for (std::size_t t = first; t < w.T(); t++) labels.push_back(label_of(w.pieces[t], 10));
    return labels;
}
// Beside rows and columns of tokens; none where they would be too many.
std::vector<std::string> token_labels(const Walk& w) {
    return labels_from(w, w.T() <= kMostLabelled ? 0 : w.T());
}
std::vector<std::string> layer_labels(const Walk& w) {
    std::vector<std::string> labels;
    for (int i = 0; i < w.info.config.n_layer; i++) labels.push_back(cat("layer ", i));
    return labels;
}
// Said in the caption and the alternative text.
std::string pooled_words(std::size_t T, std::size_t drawn) {
    return T > drawn ? cat("; ", T, " positions pooled to ", drawn, " by their largest") : "";
}
std::string percent_of(double share, int digits = 0) { return decimals(100 * share, digits) + "%"; }

// All heads of one layer: what each query (a row) looked at (a column).
Chart attention_chart(const Walk& w, int layer) {
    const std::size_t drawn = std::min(w.T(), kMostDrawn);
    const int n = static_cast<int>(drawn), cell = std::clamp(420 / n, 1, 26), tile = n * cell;
    const Labels labels{token_labels(w), token_labels(w), cell, cell};
    const int count = w.info.config.n_head, across = std::clamp(2400 / tile, 1, std::min(count, 4)),
              down = (count + across - 1) / across;
    const int left = labels.left(), top = labels.top() + 24, wide = left + tile + 22,
              high = top + tile + 28;
    const std::string pooled = pooled_words(w.T(), drawn);
    Chart chart{cat("attention_L", layer < 10 ? "0" : "", layer),
                cat("Layer ", layer, ": where each head looks"),
                cat("Attention of the ", count, " heads of layer ", layer, pooled)};
    begin_matrices(chart, across * wide, down * high,
                   cat("Row: the token that looks. Column: the token looked at. Each row adds up "
                       "to 1",
                       pooled, "."),
                   {}, "share of attention");
    for (const Head& h : w.heads) {
        if (h.layer != layer) continue;
        const int x = kMargin + h.head % across * wide + left, y = kTop + h.head / across * high;
        const std::string name = cat("head ", h.head);
        chart.picture.text(x - 1, y, name, kInk, 1.5, true);
        if (tile > Picture::length(h.label()) + 80)
            chart.picture.text(x + 68, y, h.label(), kMuted);
        labels.draw(chart.picture, x, y + top);
        draw_grid(chart, {name, x, y + top, cell, cell, n, n}, max_pooled(h.map, w.T(), drawn));
    }
    return chart;
}

// Layers x heads, small: which heads do what.
Chart attention_overview(const Walk& w) {
    const int heads = w.info.config.n_head, n = static_cast<int>(w.small());
    const int cell = std::max(1, std::clamp(900 / heads, 48, 120) / n), tile = n * cell,
              step = tile + 10;
    Labels labels{layer_labels(w), {}, step, step};
    for (int head = 0; head < heads; head++) labels.columns.push_back(cat(head));
    const std::string pooled = pooled_words(w.T(), w.small());
    Chart chart{"attention_all", "Attention of all layers and heads",
                cat("Small attention maps, layers down and heads across", pooled)};
    begin_matrices(
        chart, labels.left() + heads * step, labels.top() + w.info.config.n_layer * step,
        cat("Row: a layer, the first on top. Column: a head. Diagonals look near, a left "
            "edge rests on the first token",
            pooled, "."),
        {}, "share of attention");
    const int left = kMargin + labels.left(), top = kTop + labels.top();
    labels.draw(chart.picture, left, top);
    for (const Head& h : w.heads) {
        draw_grid(chart,
                  {cat("layer ", h.layer, " head ", h.head), left + h.head * step,
                   top + h.layer * step, cell, cell, n, n},
                  h.small);
    }
    return chart;
}

// What the model would say after each layer, and how sure it would be.
Chart lens_chart(const Walk& w) {
    Labels labels{{}, labels_from(w, w.lens_first()), 104, 26, true};
    std::vector<float> values;
    for (const LensRow& row : w.lens) {
        labels.rows.push_back(row.after);
        for (const LensCell& cell : row.cells)
            values.push_back(static_cast<float>(cell.best.probability));
    }
    const std::string part = w.lens_first() == 0 ? ""
                                                 : cat(" The last ", labels.columns.size(), " of ",
                                                       w.T(), " positions.");
    Chart chart = matrix_chart(
        {"lens", "Logit lens: the next token, if the model ended here",
         "Likeliest next token and its probability, layers by positions"},
        labels, values, {}, "probability",
        cat("Column: a position, its token on top. Word: the likeliest next token. Colour: its "
            "probability.",
            part));
    const Grid grid = chart.grids[0];
    int y = grid.y + 6;
    for (const LensRow& row : w.lens) {
        int x = grid.x + 6;
        for (const LensCell& cell : row.cells) {
            const Rgb color = is_dark(grid.scale.color(cell.best.probability)) ? kPaper : kInk;
            chart.picture.text(x, y, label_of(cell.best.piece, 10), color);
            x += grid.cell_width;
        }
        y += grid.cell_height;
    }
    return chart;
}

// Layers x positions.
Labels position_labels(const Walk& w) {
    const int wide = std::clamp(1200 / static_cast<int>(w.T()), 1, 30);
    return {layer_labels(w), token_labels(w), wide, 20};
}
Chart residual_chart(const Walk& w) {
    Labels labels = position_labels(w);
    labels.rows.insert(labels.rows.begin(), "embed");
    return matrix_chart({"residual", "The residual stream grows",
                         "Root mean square of the residual stream, layers by positions"},
                        labels, w.residual, logarithmic_scale(w.residual), "RMS, logarithmic",
                        "Column: a position. Row: after the embedding and after each layer.");
}
Chart neurons_chart(const Walk& w) {
    return matrix_chart(
        {"neurons", "Silent neurons: relu² lets few through",
         "Share of the MLP's neurons that are zero, layers by positions"},
        position_labels(w), w.silent, {}, "of the neurons are zero",
        "Column: a position. Row: a layer's MLP. Dark: most of its neurons say nothing.");
}

Chart next_chart(const Walk& w) {
    std::vector<Bar> bars;
    for (const Candidate& c : w.next) {
        const bool chosen = c.token == w.choice.token;
        bars.push_back({label_of(c.piece), percent_of(c.probability, 1), c.probability,
                        chosen ? kBlue : shades()[110], chosen});
    }
    return bars_chart(
        {"next_token", "The next token", "Bars of the likeliest next tokens"}, bars,
        cat("Softmax of the logits, at temperature 1. Chosen: ", label_of(w.choice.piece)));
}

// Of the two passes that are timed.
constexpr std::array kPassColors = {kBlue, kOrange};
void draw_legend(Picture& picture) {
    int x = kMargin + 4;
    for (const std::size_t pass : {0u, 1u}) {
        picture.dot(x, 52, kPassColors[pass], 5);
        picture.text(x + 12, 44, pass == 0 ? "the prompt" : "one more token");
        x += 130;
    }
}
Chart timing_chart(const Walk& w) {
    std::vector<Bar> bars;
    for (const OperationSum& o : w.operations) {
        for (const std::size_t pass : {0u, 1u}) {
            const double seconds = o.costs[pass].seconds;
            bars.push_back({pass == 0 ? std::string(o.operation->name) : "",
                            cat(few_digits(1e6 * seconds), " µs"), seconds, kPassColors[pass]});
        }
    }
    const std::string tokens = cat(w.T(), w.T() == 1 ? " token" : " tokens");
    Chart chart =
        bars_chart({"timing", cat("Where the time goes: ", tokens, " read, then one more"),
                    "Time of every operation, reading the prompt and one more token"},
                   bars,
                   cat("Median of ", w.plan.runs, ", all layers together. In all ",
                       decimals(1e3 * w.whole[0].seconds, 2), " ms and ",
                       decimals(1e3 * w.whole[1].seconds, 2), " ms."));
    draw_legend(chart.picture);
    return chart;
}

// The height nearest to y that no label has taken.
double place(std::vector<double>& taken, double y) {
    double at = y;
    const auto near = [&](double other) { return std::abs(other - at) < 15; };
    for (int i = 1; std::ranges::any_of(taken, near); i++)
        at = y + (i % 2 ? 15 : -15) * ((i + 1) / 2);
    return taken.emplace_back(at);
}
// Points of one pass; products and attention have labels beside them.
template <class X, class Y>
void draw_points(Picture& p, const std::vector<OperationSum>& operations, std::size_t pass, X x,
                 Y y) {
    std::vector<double> taken;
    const int side = pass == 0 ? 1 : -1;
    for (const auto& [operation, costs] : operations) {
        const Cost& c = costs[pass];
        if (c.seconds <= 0 || c.flops <= 0) continue;
        const double px = x(c.flops / c.bytes), py = y(c.flops / c.seconds);
        p.dot(px, py, kPassColors[pass], operation->large() ? 5 : 2.5);
        if (!operation->large()) continue;
        const double label = place(taken, py);
        const int width = Picture::length(operation->name, 1.3);
        p.line(px + 7 * side, py, px + 22 * side, label, kRule, 0.7);
        p.text(static_cast<int>(px) + (pass == 0 ? 26 : -26 - width), static_cast<int>(label) - 7,
               operation->name, kMuted, 1.3);
    }
}
// Speed over arithmetic intensity (Williams et al. 2009), both axes logarithmic: the roof is what the
// machine can do.
Chart roofline_chart(const Walk& w) {
    constexpr int kLeft = kMargin + 96, kWide = 860, kHigh = 480;
    Chart chart{"roofline", "Roofline: what limits each operation",
                "Operations under the roof of memory and multipliers, both axes logarithmic"};
    begin_chart(chart, kLeft - kMargin + kWide, kHigh + 56,
                "Left of the edge the memory sets the pace, right of it the multipliers. Small: "
                "norms and mixes. Above the roof: caches.");
    Picture& p = chart.picture;
    const double edge = w.peak.rate / w.peak.bandwidth, top = 2 * w.peak.rate;
    const double left = 0.05, right = std::max(1000.0, 4 * edge);
    double bottom = top / 1e4;
    for (const auto& [operation, costs] : w.operations) {
        for (const Cost& c : costs) {
            if (c.seconds > 0 && operation->large())
                bottom = std::min(bottom, 0.6 * c.flops / c.seconds);
        }
    }
    const auto x = [&](double intensity) {
        return kLeft + std::log(intensity / left) / std::log(right / left) * kWide;
    };
    const auto y = [&](double speed) {  // what is below the axis stands on it
        const double share = std::log(std::max(speed, bottom) / bottom) / std::log(top / bottom);
        return kTop + kHigh - share * kHigh;
    };
    for (double at = 0.1; at < 1.01 * right; at *= 10) {
        p.fill(static_cast<int>(x(at)), kTop, 1, kHigh, kRule);
        p.text(static_cast<int>(x(at)) - 12, kTop + kHigh + 6, few_digits(at), kMuted, 1.4);
    }
    for (double at = std::pow(10, std::ceil(std::log10(bottom))); at < top; at *= 10) {
        p.fill(kLeft, static_cast<int>(y(at)), kWide, 1, kRule);
        p.text(kMargin + 20, static_cast<int>(y(at)) - 8, few_digits(at / 1e9), kMuted, 1.4);
    }
    p.text(kLeft + kWide - 190, kTop + kHigh + 26, "operations per byte", kMuted);
    p.text(kMargin - 2, kTop + kHigh / 2 + 60, "GFLOP/s", kMuted, 1.5, false, true);
    p.line(x(left), y(w.peak.bandwidth * left), x(edge), y(w.peak.rate), kInk, 1.2);
    p.line(x(edge), y(w.peak.rate), x(right), y(w.peak.rate), kInk, 1.2);
    for (const std::size_t pass : {0u, 1u}) draw_points(p, w.operations, pass, x, y);
    draw_legend(p);
    return chart;
}

// One page: the answer, how it came about, and where the time went.
Chart overview_chart(const Walk& w, std::span<const Chart> parts) {
    // Two columns; each part goes where there is less so far.
    int widest = 0;
    for (const Chart& part : parts) widest = std::max(widest, part.picture.width());
    std::array<int, 2> height = {96, 96};
    std::vector<std::pair<int, int>> places;
    for (const Chart& part : parts) {
        const std::size_t column = height[1] < height[0] ? 1 : 0;
        places.emplace_back(column == 0 ? 0 : widest, height[column]);
        height[column] += part.picture.height();
    }
    Chart chart{"overview", "", "All pictures of this walk but the single layers, on one page"};
    chart.picture = Picture(2 * widest, std::max(height[0], height[1]) + kMargin);
    for (std::size_t i = 0; i < parts.size(); i++)
        chart.picture.paste(parts[i].picture, places[i].first, places[i].second);
    chart.picture.text(kMargin - 3, 24, cat("A walk through ", w.info.id), kInk, 2.6, true);
    std::string words;
    for (const std::string& piece : w.pieces) words += label_of(piece, 16) + " ";
    chart.picture.text(kMargin - 2, 64, words, kMuted, 1.6);
    return chart;
}

std::vector<Chart> charts_of(const Walk& w) {
    std::vector<Chart> charts = {next_chart(w),    lens_chart(w),         residual_chart(w),
                                 neurons_chart(w), attention_overview(w), timing_chart(w)};
    if (w.peak.known()) charts.push_back(roofline_chart(w));
    charts.insert(charts.begin(), overview_chart(w, charts));
    for (const int layer : w.plan.layers) charts.push_back(attention_chart(w, layer));
    return charts;
}

// ---- numbers

Value cost_json(const Walk& w, const Cost& c) {
    return object({{"us", 1e6 * c.seconds},
                   {"flops", c.flops},
                   {"bytes", c.bytes},
                   {"intensity", c.flops / c.bytes},
                   {"gflops", c.flops / c.seconds / 1e9},
                   {"gbs", c.bytes / c.seconds / 1e9},
                   {"percent_of_peak", 100 * w.peak.share(c)},
                   {"bound", w.peak.memory_bound(c) ? "memory" : "compute"}});
}
void add_costs(Members& members, const Walk& w, const Costs& costs) {
    for (const std::size_t pass : {0u, 1u})
        members.emplace_back(kPasses[pass], cost_json(w, costs[pass]));
}
Members candidate_members(const Candidate& c) {  // bytes that are no text by themselves: null
    return {{"token", c.token},
            {"text", detail::is_utf8(c.piece) ? Value(c.piece) : Value(nullptr)},
            {"probability", c.probability}};
}
Value matrix_json(std::span<const float> values, std::size_t columns) {
    std::vector<Value> rows;
    for (std::size_t at = 0; at < values.size(); at += columns)
        rows.push_back(array(values.subspan(at, columns)));
    return array(rows);
}

// Which operations there were, and for each hook point what its tensor held.
Value stages_json(const Walk& w) {
    return array(w.stages, [&](const Stage& s) {
        Members members = {{"name", name(s.point, s.layer)},
                           {"layer", s.layer},
                           {"shape", array(s.shape)},
                           {"dtype", "float32"},
                           {"min", s.least},
                           {"max", s.most},
                           {"mean", s.mean},
                           {"rms", s.rms},
                           {"zero", s.zero},
                           {"not_finite", s.bad}};
        const Operation* const op = operation_at(s.point);
        if (op == nullptr) return object(members);
        members.emplace_back("operation", op->name);
        const bool timed = op->timed_at(w.cuda) == s.point;
        if (timed && s.costs[0].bytes > 0) add_costs(members, w, s.costs);
        return object(members);
    });
}
Value head_json(const Walk& w, const Head& h) {
    Members m = {{"layer", h.layer},       {"head", h.head},    {"entropy", h.entropy},
                 {"distance", h.distance}, {"first", h.first},  {"previous", h.previous},
                 {"itself", h.itself},     {"label", h.label()}};
    if (!h.map.empty() && w.T() <= kMostLabelled) m.emplace_back("map", matrix_json(h.map, w.T()));
    return object(m);
}
Value lens_json(const LensRow& row) {
    const auto cell = [](const LensCell& c) {
        Members members = candidate_members(c.best);
        members.emplace_back("entropy", c.entropy);
        members.emplace_back("rank_of_final", c.rank);
        members.emplace_back("probability_of_final", c.chosen);
        return object(members);
    };
    return object({{"after", row.after},
                   {"is_output", row.after == "output"},
                   {"cells", array(row.cells, cell)}});
}
Members walk_members(const Walk& w) {
    std::vector<std::size_t> positions(w.T() - w.lens_first());
    std::iota(positions.begin(), positions.end(), w.lens_first());
    return {
        {"model", w.info.id},
        {"device", w.device},
        {"dtype", name_of(w.dtype)},
        {"text", w.plan.text},
        {"tokens", w.tokens},
        {"layers", array(w.plan.layers)},
        {"runs", w.plan.runs},
        {"peak", object({{"bytes_per_second", w.peak.bandwidth},
                         {"flops_per_second", w.peak.rate},
                         {"edge", w.peak.rate / w.peak.bandwidth}})},
        {kPasses[0], cost_json(w, w.whole[0])},
        {kPasses[1], cost_json(w, w.whole[1])},
        {"operations",
         array(w.operations,
               [&](const OperationSum& o) {
                   Members members = {{"name", o.operation->name}, {"kind", o.operation->kind}};
                   add_costs(members, w, o.costs);
                   return object(members);
               })},
        {"stages", stages_json(w)},
        {"attention", array(w.heads, [&](const Head& h) { return head_json(w, h); })},
        {"residual_rms", matrix_json(w.residual, w.T())},
        {"silent", matrix_json(w.silent, w.T())},
        {"lens_positions", array(positions)},
        {"lens", array(w.lens, lens_json)},
        {"next", array(w.next, [](const Candidate& c) { return object(candidate_members(c)); })},
        {"choice", object(candidate_members(w.choice))}};
}

// Where each number stands in a picture: its twin for programs.
Value chart_json(const Chart& chart) {
    const auto grid = [](const Grid& g) {
        return object({{"what", g.what},
                       {"x", g.x},
                       {"y", g.y},
                       {"cell_width", g.cell_width},
                       {"cell_height", g.cell_height},
                       {"rows", g.rows},
                       {"columns", g.columns},
                       {"low", g.scale.low},
                       {"high", g.scale.high},
                       {"logarithmic", g.scale.log}});
    };
    return object({{"name", chart.name},
                   {"file", chart.name + ".png"},
                   {"title", chart.title},
                   {"alt", chart.alt},
                   {"width", chart.picture.width()},
                   {"height", chart.picture.height()},
                   {"scale_x", chart.bar_x},
                   {"scale_y", chart.bar_y},
                   {"grids", array(chart.grids, grid)}});
}

// ---- on the terminal

std::string stage_table(const Walk& w, const std::vector<int>& layers) {
    const std::vector<Column> head = {{"LAYER", true}, {"STAGE"},     {"SHAPE"},
                                      {"MIN", true},   {"MAX", true}, {"MEAN", true},
                                      {"RMS", true},   {"ZERO", true}};
    std::vector<std::vector<std::string>> rows;
    const auto number = [](double v) {
        return std::abs(v) < 1000 ? decimals(v, 2) : few_digits(v);
    };
    for (const Stage& s : w.stages) {
        if (s.layer >= 0 && !has(layers, s.layer)) continue;
        rows.push_back({s.layer < 0 ? "" : std::to_string(s.layer), name(s.point, -1),
                        join(s.shape, "x", [](int d) { return std::to_string(d); }),
                        number(s.least), number(s.most), number(s.mean), number(s.rms),
                        percent_of(s.zero) + (s.bad == 0 ? "" : cat(", ", s.bad, " NaN"))});
    }
    return table(head, rows);
}
std::string time_table(const Walk& w) {
    std::vector<Column> head = {{"OPERATION", false, 0, 15}};
    for (const int pass : {0, 1}) {
        const char* const microseconds = pass == 0 ? "READ µs" : "ONE µs";
        head.insert(
            head.end(),
            {{microseconds, true}, {"GFLOP/s", true, pass}, {"GB/s", true}, {"OF PEAK", true}});
    }
    std::vector<std::vector<std::string>> rows;
    const auto add = [&](std::string_view name, const Costs& costs) {
        std::vector<std::string>& row = rows.emplace_back(1, std::string(name));
        for (const Cost& c : costs) {  // "98% mem": how much of what memory could do at best
            row.push_back(few_digits(1e6 * c.seconds));
            row.push_back(few_digits(c.flops / c.seconds / 1e9));
            row.push_back(few_digits(c.bytes / c.seconds / 1e9));
            row.push_back(percent_of(w.peak.share(c)) + (w.peak.memory_bound(c) ? " mem" : " mul"));
        }
    };
    for (const OperationSum& o : w.operations) add(o.operation->name, o.costs);
    add("all", w.whole);
    return table(head, rows);
}
// The last positions, as many as there is room for; of many layers some.
std::string lens_table(const Walk& w) {
    const std::size_t n = w.lens.size(), shown = std::min<std::size_t>(n, 9);
    const std::vector<std::string> titles = labels_from(w, w.lens_first());
    std::vector<Column> head = {{"AFTER", false, 0, 14}};
    int leave = static_cast<int>(titles.size());
    for (const std::string& title : titles) head.push_back({title, false, --leave, 10});
    head.insert(head.end(), {{"SURE", true}, {"RANK", true}});
    std::vector<std::vector<std::string>> rows;
    for (std::size_t i = 0; i < shown; i++) {
        const LensRow& row = w.lens[i * (n - 1) / (shown - 1)];
        std::vector<std::string>& line = rows.emplace_back(1, row.after);
        for (const LensCell& cell : row.cells) line.push_back(label_of(cell.best.piece, 10));
        line.push_back(percent_of(row.cells.back().best.probability));
        line.push_back(std::to_string(row.cells.back().rank));
    }
    return table(head, rows);
}
std::string head_table(const Walk& w, const std::vector<int>& layers) {
    const std::vector<Column> head = {{"LAYER", true},    {"HEAD", true},  {"ENTROPY", true},
                                      {"DISTANCE", true}, {"FIRST", true}, {"PREVIOUS", true},
                                      {"ITSELF", true},   {"THE HEAD"}};
    std::vector<std::vector<std::string>> rows;
    for (const Head& h : w.heads) {
        if (!has(layers, h.layer)) continue;
        rows.push_back({std::to_string(h.layer), std::to_string(h.head), decimals(h.entropy, 2),
                        decimals(h.distance, 1), percent_of(h.first), percent_of(h.previous),
                        percent_of(h.itself), std::string(h.label())});
    }
    return table(head, rows);
}
std::string next_table(const Walk& w) {
    constexpr const char* kEighths[] = {"", "▏", "▎", "▍", "▌", "▋", "▊", "▉"};
    std::string text;
    for (const Candidate& c : w.next) {
        const auto eighths =
            static_cast<std::size_t>(c.probability / w.next[0].probability * 40 * 8);
        std::string bar;
        for (std::size_t i = 0; i < eighths / 8; i++) bar += "█";
        text += cat(fit(label_of(c.piece, 16), 18), fit(percent_of(c.probability, 1), 6, true), " ",
                    bar, kEighths[eighths % 8], c.token == w.choice.token ? "  chosen" : "", "\n");
    }
    return text;
}
std::string walk_text(const Walk& w, const std::vector<int>& layers) {
    const auto title = [](const std::string& words) {
        return "\n" + paint(terminal.out, kBold, wrapped(words, 0));
    };
    std::string words = cat(w.T(), w.T() == 1 ? " token:" : " tokens:");
    for (const std::string& piece : w.pieces) words += " " + label_of(piece, 24);
    const std::string numbers = join(layers, ", ", [](int i) { return std::to_string(i); });
    return cat(
        wrapped(cat(safe(w.info.id), " on ", safe(w.device), ", ", name_of(w.dtype)), 2),
        "measured now: memory ", gigabytes_per_second(w.peak.bandwidth), ", products ",
        few_digits(w.peak.rate / 1e9), " GFLOP/s\n", wrapped(words, 2),
        title(cat("What every stage puts out",
                  std::ssize(layers) == w.info.config.n_layer
                      ? ""
                      : cat(" (layer ", numbers, "; --layers for others)"))),
        stage_table(w, layers),
        title(cat("Time: the prompt read at once, and one token more (all layers, median of ",
                  w.plan.runs, ")")),
        time_table(w),
        w.cuda ? wrapped("On a GPU the host waits after every operation here; chat does not, and "
                         "reads single tokens with other kernels.",
                         0)
               : "",
        title("Logit lens: the likeliest next token, if the model ended there"), lens_table(w),
        title("Where the heads look (entropy in bits, distance in tokens)"), head_table(w, layers),
        title("Next token"), next_table(w));
}

// ---- the command

// Pictures, numbers and a page that shows them go into a directory of their own. It is made before
// the walk, so that two walks never share one; of a walk that failed no empty one stays.
class NewDirectory {
public:
    explicit NewDirectory(const Options& o) : path_(o.out.empty() ? "walk" : o.out) {
        std::error_code error, ignored;
        if (!path_.has_filename()) path_ = path_.parent_path();  // dir/
        if (path_.has_parent_path()) fs::create_directories(path_.parent_path(), ignored);
        made_ = fs::create_directory(path_, error);
        for (int n = 2; !made_ && o.out.empty() && fs::exists(path_, ignored); n++) {
            path_ = cat("walk-", n);
            made_ = fs::create_directory(path_, error);
        }
        const std::string name = detail::quote(path_.string(), 300);
        if (!made_ && !o.force && fs::exists(path_, ignored))
            bad_usage(
                cat("--out: ", name, " exists. Choose a new name, or --force to write into it"));
        if (!made_ && !fs::is_directory(path_, ignored))
            throw std::runtime_error(
                cat("cannot make the directory ", name, ": ", error.message()));
    }
    NewDirectory(const NewDirectory&) = delete;
    NewDirectory& operator=(const NewDirectory&) = delete;
    ~NewDirectory() {
        std::error_code ignored;
        if (made_) fs::remove(path_, ignored);  // which leaves one with files alone
    }
    const fs::path& path() const { return path_; }

private:
    fs::path path_;
    bool made_ = false;
};
std::string html_text(std::string_view text) {
    std::string out;
    for (const char c : safe(text)) {
        out += c == '<'   ? "&lt;"
               : c == '>' ? "&gt;"
               : c == '&' ? "&amp;"
               : c == '"' ? "&quot;"
                          : std::string(1, c);
    }
    return out;
}
std::string walk_html(const Walk& w, const std::vector<Chart>& charts) {
    const auto figure = [](const Chart& c) {
        return cat("<figure><a href=\"", c.name, ".png\"><img src=\"", c.name, ".png\" width=\"",
                   c.picture.width(), "\" alt=\"", html_text(c.alt), "\"></a></figure>\n");
    };
    const std::string title = "A walk through " + html_text(w.info.id);
    return cat("<!doctype html>\n<html lang=\"en\"><meta charset=\"utf-8\"><title>", title,
               "</title>\n<style>body{margin:2rem;font:1rem/1.5 "
               "system-ui,sans-serif;color:#1c2430;background:#fff}"
               "figure{margin:0 0 2rem}img{max-width:100%;height:auto;border:1px solid "
               "#dee3e9}</style>\n<h1>",
               title, "</h1>\n<p>", html_text(w.plan.text),
               "</p>\n<p>All numbers: <a href=\"walk.json\">walk.json</a></p>\n",
               join(charts, "", figure), "</html>\n");
}
void write_walk(const Walk& w, const fs::path& directory, bool pictures) {
    const auto write = [&](const std::string& name, std::string_view bytes) {
        NewFile file((directory / name).string());
        file.write(bytes);
        file.commit();
    };
    const std::vector<Chart> charts = pictures ? charts_of(w) : std::vector<Chart>{};
    Progress progress("drawing");
    for (std::size_t i = 0; i < charts.size(); i++) {
        if (!progress(i, charts.size())) leave_interrupted();
        write(charts[i].name + ".png", charts[i].picture.png());
    }
    Members members = walk_members(w);
    members.emplace_back("pictures", array(charts, chart_json));
    write("walk.json", object(members).text + "\n");
    write("index.html", walk_html(w, charts));
}

// "all", or a list of layers; nothing said: all are kept, one is printed.
std::vector<int> read_layers(const std::string& text, int n_layer) {
    std::vector<int> layers;
    for (int i = 0; i < n_layer && (text.empty() || text == "all"); i++) layers.push_back(i);
    if (!layers.empty()) return layers;
    for (const std::string& layer : split(text, ",")) {
        layers.push_back(number<int>({"--layers", layer}, 0, n_layer - 1,
                                     cat("a layer from 0 to ", n_layer - 1, ", or all")));
    }
    if (layers.empty()) bad_usage("--layers: a list such as 0,5,11 or all is needed");
    std::sort(layers.begin(), layers.end());
    layers.erase(std::unique(layers.begin(), layers.end()), layers.end());
    return layers;
}
constexpr std::size_t kMostWalked = 1024;  // tokens: what a GPU reads in one pass

WalkPlan plan_walk(const Tokenizer& tokenizer, const Config& c, std::string_view text,
                   std::size_t most = kMostWalked) {
    WalkPlan plan;
    plan.text = to_utf8(text);
    plan.prompt = {tokenizer.special("<|bos|>")};
    most = std::min(most, static_cast<std::size_t>(c.sequence_len - 1));
    // more bytes than these are more tokens, so the rest of a long text need not be read
    const std::string_view start =
        std::string_view(plan.text).substr(0, most * detail::kMaxTokenLength);
    const std::vector<Token> ids = tokenizer.encode(start);
    plan.prompt.insert(plan.prompt.end(), ids.begin(), ids.end());
    if (plan.prompt.size() > most)
        bad_usage(cat("walk: the text has ", start.size() < plan.text.size() ? "at least " : "",
                      plan.prompt.size(), " tokens, ", most, " are the most"));
    return plan;
}

int run_walk(Options& o) {
    if (!o.prompt) bad_usage("walk: a text is needed: -p TEXT");
    catch_interrupts();
    Session s = pick_session(o, "base");
    WalkPlan plan =
        plan_walk(s.tokenizer, s.info.config, *o.prompt == "-" ? LineReader().rest() : *o.prompt);
    plan.layers = read_layers(o.layers, s.info.config.n_layer);
    plan.top = o.top, plan.sampling = o.sampling;
    check_maps(s.info.config, plan.prompt.size(), plan.layers.size());
    const bool pictures = !o.no_png && (!o.json || !o.out.empty());
    if (pictures && !kHasPng)
        bad_usage(
            "walk: this nanogpt was built without stb_image_write.h (Debian: libstb-dev). --no-png "
            "leaves the pictures out");
    std::optional<NewDirectory> directory;
    if (pictures || !o.out.empty()) directory.emplace(o);
    const Device device = open_device(s.info, o, {}, {}, true);
    const int room = static_cast<int>(plan.prompt.size()) + 1;
    const std::unique_ptr<Sequence> sequence = device.backend->new_sequence(room);
    ThreadPool pool(o.threads);
    Walker walker(device, *sequence, pool, s.info, s.tokenizer, plan);
    {
        Progress progress("walking through " + s.info.id);
        while (walker.advance()) {
            if (!progress(walker.done(), walker.passes())) leave_interrupted();
        }
    }
    Walk w = walker.take();
    w.peak = measure_peak(device.cuda, o.threads);
    if (o.json) {
        write_json(object(walk_members(w)));
    } else {
        write_out(
            walk_text(w, o.layers.empty() ? std::vector{s.info.config.n_layer / 2} : plan.layers));
    }
    if (directory) {
        write_walk(w, directory->path(), pictures);
        note(cat(pictures ? "pictures and numbers are in " : "numbers are in ",
                 directory->path().string(), "; begin with index.html"));
    }
    return 0;
}

// ==== 9. http ====================================================================================
// Bytes in, requests; answers, bytes out. One thread waits for all sockets and never for anything
// else. Whatever could be read in two ways is refused: a proxy in front might read it the other way
// (request smuggling). Limits are the constants of Limits.

struct Limits {
    static constexpr std::size_t kLine = 8192, kFields = 16384, kFieldCount = 64;  // of a head
    static constexpr std::size_t kBody = 1 << 20, kTrailers = 4096, kExtension = 256;
    static constexpr std::size_t kBuffered = 256 << 10;  // bytes that wait for a slow reader
    static constexpr std::size_t kTokenized = 16 << 10;  // bytes of a text, or ids, to look at
    static constexpr std::size_t kConnections = 1024, kPerClient = 64;
    static constexpr int kRequests = 1000;  // of one connection
    // seconds
    static constexpr double kHead = 10, kWhole = 30, kIdle = 15, kStuck = 30, kLinger = 2;
    static constexpr double kPing = 10;  // between signs of life on a stream
};

struct HttpError : std::runtime_error {  // a request that gets no other answer
    int status;
    std::string code, param;
    HttpError(int s, std::string c, const std::string& message, std::string p = "")
        : std::runtime_error(message), status(s), code(std::move(c)), param(std::move(p)) {}
};
[[noreturn]] void malformed(const std::string& what) {
    throw HttpError(400, "malformed_request", "malformed request: " + what);
}
std::string lower(std::string text) {
    for (char& c : text) c = detail::ascii_lower(c);
    return text;
}
bool is_token(std::string_view text) {  // RFC 9110, 5.6.2
    return !text.empty() && std::all_of(text.begin(), text.end(), [](char c) {
        return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') ||
               std::string_view("!#$%&'*+-.^_`|~").find(c) != std::string_view::npos;
    });
}
bool has_controls(std::string_view text) {
    return std::any_of(text.begin(), text.end(), [](char c) {
        return (static_cast<unsigned char>(c) < 0x20 && c != '\t') || c == 0x7f;
    });
}

// ---- a request, read

struct Request {
    std::string method, target, path, query;                  // path: decoded
    int minor = 1;                                            // of HTTP/1.x
    std::vector<std::pair<std::string, std::string>> fields;  // names in lower case
    std::string body;
    bool keep_alive = true, has_body = false;

    const std::string* find(std::string_view name) const {
        for (const auto& [key, value] : fields) {
            if (key == name) return &value;
        }
        return nullptr;
    }
    std::string get(std::string_view name) const {
        const std::string* value = find(name);
        return value == nullptr ? "" : *value;
    }
};

// Reads one request from the front of what has arrived; however it was cut, the result is the same.
class RequestReader {
public:
    Request request;
    bool begun() const { return begun_; }  // a byte of it has come
    bool head_done() const { return head_done_; }
    bool expects_continue() const { return expects_continue_; }

    // True when the head is there and well formed. Throws HttpError.
    bool read_head(std::string& in) {
        std::size_t at = 0;
        begun_ = begun_ || !in.empty();
        while (!head_done_) {
            const std::size_t end = in.find('\n', at);
            std::string_view line = std::string_view(in).substr(at, end - at);
            const bool whole = end != in.npos;
            check_length(line, whole);
            if (!whole) break;
            if (!line.ends_with('\r')) malformed("a line ends without CR");
            line.remove_suffix(1);
            if (has_controls(line)) malformed("a control character in the head");
            at = end + 1;
            if (request.method.empty()) {
                if (!line.empty())
                    read_line(line);  // RFC 9112, 2.2: empty lines before are ignored
            } else if (!line.empty()) {
                read_field(line);
            } else {
                check_head();
                head_done_ = true;
            }
        }
        in.erase(0, at);
        return head_done_;
    }
    // True when the body is there too.
    bool read_body(std::string& in) {
        if (!chunked_) {
            const std::size_t n = std::min(in.size(), left_);
            request.body.append(in, 0, n);
            in.erase(0, n);
            return (left_ -= n) == 0;
        }
        std::size_t at = 0;
        while (chunk_ != Chunk::done && read_chunk(in, at)) {
        }
        in.erase(0, at);
        return chunk_ == Chunk::done;
    }

private:
    enum class Chunk { size, data, end, trailers, done };

    void check_length(std::string_view line, bool whole) {
        const std::size_t bare = line.size() - (line.ends_with('\r') ? 1 : 0);
        if (request.method.empty()) {
            if (bare > Limits::kLine)
                throw HttpError(414, "uri_too_long", "the request line has more than 8192 bytes");
        } else if (bare > 0 && (field_bytes_ += whole ? bare + 2 : 0) + (whole ? 0 : bare + 2) >
                                   Limits::kFields) {
            throw HttpError(431, "headers_too_large", "the header has more than 16384 bytes");
        }
    }
    void read_line(std::string_view line) {
        const std::size_t one = line.find(' '), two = line.rfind(' ');
        if (one == line.npos || one == two || line.find(' ', one + 1) != two)
            malformed("the request line is not METHOD TARGET HTTP/1.1");
        const std::string_view method = line.substr(0, one), version = line.substr(two + 1);
        if (!is_token(method) || method.size() > 16) malformed("the method is no token");
        const bool http = version.size() == 8 && version.starts_with("HTTP/") && version[6] == '.';
        const auto digit = [&](std::size_t i) { return version[i] >= '0' && version[i] <= '9'; };
        if (!http || !digit(5) || !digit(7)) malformed("the request line ends in no HTTP version");
        if (version != "HTTP/1.1" && version != "HTTP/1.0")
            throw HttpError(505, "http_version_not_supported", "HTTP/1.1 and HTTP/1.0 are spoken");
        request.method = method;
        request.target = line.substr(one + 1, two - one - 1);
        request.minor = version[7] - '0';
    }
    void read_field(std::string_view line) {
        if (request.fields.size() == Limits::kFieldCount)
            throw HttpError(431, "headers_too_large", "the header has more than 64 fields");
        const std::size_t colon = line.find(':');
        if (colon == line.npos || !is_token(line.substr(0, colon)))
            malformed("a header field has no proper name");
        request.fields.emplace_back(lower(std::string(line.substr(0, colon))),
                                    trim(line.substr(colon + 1)));
    }
    // The one value of a field that must not be there twice; null if it is not there.
    const std::string* single(std::string_view name) {
        const auto named = [&](const auto& field) { return field.first == name; };
        if (std::count_if(request.fields.begin(), request.fields.end(), named) > 1)
            malformed(cat("the field ", name, " is there twice"));
        return request.find(name);
    }
    void check_head() {
        Request& r = request;
        const std::string* host = single("host");
        if (host == nullptr) malformed("no Host field");
        read_target(*host);
        const std::string *length = single("content-length"), *coding = single("transfer-encoding");
        if (length != nullptr && coding != nullptr)
            malformed("Content-Length together with Transfer-Encoding");
        if (coding != nullptr && (r.minor == 0 || lower(*coding) != "chunked"))
            malformed("a Transfer-Encoding other than chunked");
        if (length != nullptr) {
            const bool digits = length->find_first_not_of("0123456789") == length->npos;
            if (length->empty() || length->size() > 18 || !digits)
                malformed("Content-Length is not a plain number");
            std::from_chars(length->data(), length->data() + length->size(), left_);
            check_body(left_);
        } else if (coding == nullptr && r.method == "POST") {
            throw HttpError(411, "length_required", "POST needs a Content-Length");
        }
        chunked_ = coding != nullptr;
        r.has_body = chunked_ || left_ > 0;
        if (const std::string* expect = r.find("expect")) {
            if (lower(*expect) != "100-continue")
                throw HttpError(417, "expectation_failed", "the only expectation is 100-continue");
            expects_continue_ = r.minor == 1 && r.has_body;
        }
        r.keep_alive = r.minor == 1;
        for (const auto& [name, value] : r.fields) {
            if (name != "connection") continue;
            for (const std::string& word : split(lower(value), ", \t")) {
                if (word == "close") close_ = true;
                if (word == "keep-alive") r.keep_alive = true;
            }
        }
        r.keep_alive = r.keep_alive && !close_;
    }
    // /path?query, or http://our-host/path; decoded once.
    void read_target(const std::string& host) {
        std::string_view target = request.target;
        const std::string prefix = "http://" + lower(host);
        if (lower(std::string(target.substr(0, prefix.size()))) == prefix)
            target.remove_prefix(prefix.size());
        if (!target.starts_with('/')) malformed("the target is not a path of this server");
        const std::size_t query = std::min(target.find('?'), target.size());
        request.query = target.substr(std::min(query + 1, target.size()));
        target = target.substr(0, query);
        std::string& path = request.path;
        for (std::size_t i = 0; i < target.size(); i++) {
            unsigned char byte = static_cast<unsigned char>(target[i]);
            if (target[i] == '%') {
                const char* hex = target.data() + i + 1;
                if (i + 2 >= target.size() ||
                    std::from_chars(hex, hex + 2, byte, 16).ptr != hex + 2)
                    malformed("a bad percent-escape in the target");
                i += 2;
            }
            path += static_cast<char>(byte);
        }
        const auto has = [&](const char* part) { return path.find(part) != path.npos; };
        if (!detail::is_utf8(path) || has_controls(path) || path.find('\t') != path.npos ||
            target.find('#') != target.npos || has("..") || has("//") || has("\\"))
            malformed("the path holds what no path here has");
    }
    void check_body(std::size_t bytes) {
        if (bytes > Limits::kBody)
            throw HttpError(413, "body_too_large", "the body has more than 1 MiB");
    }

    // One step through a chunked body (RFC 9112, 7.1); false if more bytes are needed.
    bool read_chunk(const std::string& in, std::size_t& at) {
        if (chunk_ == Chunk::data) {
            const std::size_t n = std::min(in.size() - at, left_);
            request.body.append(in, at, n);
            at += n;
            if ((left_ -= n) > 0) return false;
            chunk_ = Chunk::end;
        }
        const std::size_t end = in.find('\n', at);
        const std::string_view line = std::string_view(in).substr(at, end - at);
        const bool whole = end != in.npos;
        const std::size_t left = Limits::kTrailers - trailer_bytes_;  // with their CRLFs
        const std::size_t most = chunk_ == Chunk::end    ? 1
                                 : chunk_ == Chunk::size ? 8 + Limits::kExtension + 1
                                                         : std::max<std::size_t>(left, 2) - 1;
        if (line.size() > most) malformed("a line of the chunked body is too long");
        if (!whole) return false;
        if (!line.ends_with('\r') || has_controls(line.substr(0, line.size() - 1)))
            malformed("a line of the chunked body does not end in CRLF");
        at = end + 1;
        take_chunk_line(line.substr(0, line.size() - 1));
        return true;
    }
    void take_chunk_line(std::string_view line) {
        if (chunk_ == Chunk::end) {
            chunk_ = Chunk::size;
        } else if (chunk_ == Chunk::trailers) {
            if (line.empty()) chunk_ = Chunk::done;
            if (!line.empty()) trailer_bytes_ += line.size() + 2;
        } else {
            const std::size_t digits =
                std::min(line.find_first_not_of("0123456789abcdefABCDEF"), line.size());
            const std::string_view extension = line.substr(digits);
            if (digits == 0 || digits > 8 || !(extension.empty() || extension[0] == ';') ||
                extension.size() > Limits::kExtension)
                malformed("a bad chunk size");
            std::from_chars(line.data(), line.data() + digits, left_, 16);
            check_body(request.body.size() + left_);
            chunk_ = left_ == 0 ? Chunk::trailers : Chunk::data;
        }
    }

    bool begun_ = false, head_done_ = false, chunked_ = false, expects_continue_ = false,
         close_ = false;
    std::size_t field_bytes_ = 0, trailer_bytes_ = 0, left_ = 0;
    Chunk chunk_ = Chunk::size;
};

// ---- connections, and the server of sockets

struct Job;  // an answer that is being made (section 10)

struct Connection {
    int fd;
    std::uint64_t id;
    std::string peer, local;  // addresses, without ports
    std::string in, out;      // not yet parsed, not yet sent
    RequestReader reader;
    bool busy = false;     // an answer is being made: the next request waits in `in`
    bool chunked = false;  // the answer's coding
    bool closing = false, lingering = false;  // when all is sent; then until the peer has read it
    bool full = false;           // requests wait in `in` until the answers before them are sent
    bool ended = false;          // the peer sends no more
    std::uint32_t interest = 0;  // what epoll was told
    int requests = 0, status = 0;
    Clock::time_point since, request_start, last_sent;  // of the state; of the request; of progress
    std::string client, request_id;
    std::shared_ptr<Job> job;

    const Request& request() const { return reader.request; }
};
using Fields = std::vector<std::pair<std::string_view, std::string>>;

struct CannotListen : std::runtime_error {
    using std::runtime_error::runtime_error;
};

struct HttpStatus {
    int code;
    std::string_view words, error_type = "invalid_request_error";
};
const HttpStatus& http_status(int code) {
    static constexpr HttpStatus kKnown[] = {{200, "OK"},
                                            {204, "No Content"},
                                            {304, "Not Modified"},
                                            {400, "Bad Request"},
                                            {401, "Unauthorized", "authentication_error"},
                                            {403, "Forbidden", "permission_error"},
                                            {404, "Not Found", "not_found_error"},
                                            {405, "Method Not Allowed"},
                                            {408, "Request Timeout"},
                                            {409, "Conflict", "conflict_error"},
                                            {411, "Length Required"},
                                            {413, "Content Too Large"},
                                            {414, "URI Too Long"},
                                            {415, "Unsupported Media Type"},
                                            {417, "Expectation Failed"},
                                            {422, "Unprocessable Content"},
                                            {429, "Too Many Requests", "rate_limit_error"},
                                            {431, "Request Header Fields Too Large"},
                                            {500, "Internal Server Error", "server_error"},
                                            {503, "Service Unavailable", "overloaded_error"},
                                            {505, "HTTP Version Not Supported"},
                                            {0, "Unknown"}};  // any other
    return *std::find_if(std::begin(kKnown), std::end(kKnown) - 1,
                         [&](const HttpStatus& known) { return known.code == code; });
}

// The sockets. What a request means is decided by the class derived from this.
class HttpServer {
public:
    HttpServer() = default;
    HttpServer(const HttpServer&) = delete;
    virtual ~HttpServer() {
        for (const auto& [id, c] : connections_) ::close(c->fd);
        for (const int fd : {epoll_, listener_, spare_, wake_}) {
            if (fd >= 0) ::close(fd);
        }
    }
    void wake() {  // from any thread: woken() is called soon
        const std::uint64_t one = 1;
        if (::write(wake_, &one, sizeof one) < 0) return;  // full: it wakes anyway
    }

protected:
    virtual void check(Connection& c) = 0;   // the head is there; throws HttpError
    virtual void answer(Connection& c) = 0;  // all of it is there; throws HttpError
    virtual void refuse(Connection& c, const std::exception& e) = 0;
    virtual void gone(Connection& c) = 0;      // the client of an answer that is being made
    virtual void answered(Connection& c) = 0;  // for the log
    virtual void woken() = 0;
    virtual bool hurried() const = 0;  // the next woken() is nearer than a sleeping thread's waking
    virtual void pass(Connection&) {}  // some 4 times a second for each
    virtual bool go_on() = 0;          // before each wait: whether to

    void open(const std::string& host, int port);
    void stop_listening() {
        if (listener_ >= 0) ::close(std::exchange(listener_, -1));
    }
    void watch(int fd, std::uint64_t key, std::uint32_t events, int how = EPOLL_CTL_ADD) {
        epoll_event event{};
        event.events = events;
        event.data.u64 = key;
        if (::epoll_ctl(epoll_, how, fd, &event) != 0) fail_errno<std::runtime_error>("epoll");
    }
    void loop();

    Connection* find(std::uint64_t id) {
        const auto at = connections_.find(id);
        return at == connections_.end() ? nullptr : at->second.get();
    }
    void respond(Connection& c, int status, std::string_view type, std::string_view body,
                 const Fields& more = {}) {
        write_head(c, status, type, more, body.size());
        if (c.request().method != "HEAD" && status != 204 && status != 304) c.out += body;
        finish(c);
    }
    void begin_stream(Connection& c, std::string_view type, const Fields& more) {
        c.chunked = c.request().minor == 1;
        if (!c.chunked) c.reader.request.keep_alive = false;
        write_head(c, 200, type, more, std::nullopt);
    }
    void stream(Connection& c, std::string_view text) {
        if (c.chunked) c.out += cat(hex(static_cast<std::uint32_t>(text.size()), 1), "\r\n");
        c.out += text;
        if (c.chunked) c.out += "\r\n";
    }
    void end_stream(Connection& c, bool whole) {  // a broken one lacks its end
        if (whole && c.chunked) c.out += "0\r\n\r\n";
        if (!whole) c.reader.request.keep_alive = false;
        finish(c);
    }
    // Sends what can be sent, reads on if the connection is free, closes it if it is done.
    void move_on(Connection& c);
    int port() const { return port_; }
    std::size_t connection_count() const { return connections_.size(); }
    std::vector<std::uint64_t> ids() const {
        std::vector<std::uint64_t> ids;
        for (const auto& [id, c] : connections_) ids.push_back(id);
        return ids;
    }
    virtual Fields common_fields(const Connection&) { return {}; }
    bool from_proxy(const std::string& peer) const {  // which asks for many clients
        return trust_proxy_ && (peer.starts_with("127.") || peer == "::1");
    }
    bool trust_proxy_ = false;

    static constexpr std::uint64_t kListener = 0, kWake = 1, kOther = 2, kFirst = 16;  // keys

private:
    void write_head(Connection& c, int status, std::string_view type, const Fields& more,
                    std::optional<std::size_t> length);
    void finish(Connection& c) {
        c.busy = false;
        answered(c);
        c.closing = !c.request().keep_alive;
        c.reader = RequestReader();
        c.since = Clock::now();
    }
    void accept_some();
    bool refuse_politely(int fd);
    bool receive(Connection& c);
    bool parse(Connection& c);
    bool advance(Connection& c);
    bool send(Connection& c);
    void close(Connection& c);
    void check_time(Connection& c);
    virtual void other_event() = 0;  // of a descriptor watched as kOther

    int epoll_ = -1, listener_ = -1, wake_ = -1, spare_ = -1, port_ = 0;
    std::uint64_t next_id_ = kFirst;
    std::unordered_map<std::uint64_t, std::unique_ptr<Connection>> connections_;
    std::unordered_map<std::string, std::size_t> per_client_;
    Clock::time_point no_accept_until_ = {}, last_complaint_ = {};
};

// Numeric text of an address.
std::string address_of(const sockaddr_storage& address, socklen_t length) {
    char text[NI_MAXHOST] = "";
    ::getnameinfo(reinterpret_cast<const sockaddr*>(&address), length, text, sizeof text, nullptr,
                  0, NI_NUMERICHOST);
    const std::string_view view = text;
    return std::string(view.starts_with("::ffff:") ? view.substr(7) : view);
}

void HttpServer::open(const std::string& host, int port) {
    addrinfo hints{}, *found = nullptr;
    hints.ai_socktype = SOCK_STREAM;
    hints.ai_flags = AI_PASSIVE;
    const std::string service = std::to_string(port), where = cat(host, ":", port);
    if (const int error = ::getaddrinfo(host.c_str(), service.c_str(), &hints, &found); error != 0)
        throw CannotListen(cat("cannot listen on ", where, ": ", ::gai_strerror(error),
                               ". --host takes an address of this machine"));
    const std::unique_ptr<addrinfo, void (*)(addrinfo*)> owner(found, ::freeaddrinfo);
    const int one = 1;
    listener_ = ::socket(found->ai_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    ::setsockopt(listener_, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    if (listener_ < 0 || ::bind(listener_, found->ai_addr, found->ai_addrlen) != 0 ||
        ::listen(listener_, 1024) != 0) {
        const char* remedy =
            errno == EADDRINUSE ? ". Choose another port with -p, or stop what uses it"
            : errno == EACCES   ? ". Ports below 1024 are for root: choose another with -p"
                                : "";
        throw CannotListen(cat("cannot listen on ", where, ": ", std::strerror(errno), remedy));
    }
    sockaddr_storage address{};
    socklen_t length = sizeof address;
    ::getsockname(listener_, reinterpret_cast<sockaddr*>(&address), &length);
    port_ = ntohs(address.ss_family == AF_INET6
                      ? reinterpret_cast<const sockaddr_in6&>(address).sin6_port
                      : reinterpret_cast<const sockaddr_in&>(address).sin_port);
    epoll_ = ::epoll_create1(EPOLL_CLOEXEC);
    wake_ = ::eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    spare_ = ::open("/dev/null", O_RDONLY | O_CLOEXEC);
    if (epoll_ < 0 || wake_ < 0) fail_errno<std::runtime_error>("cannot wait for sockets");
    watch(listener_, kListener, EPOLLIN);
    watch(wake_, kWake, EPOLLIN);
}

// Text that is ready goes first, before every event of a connection: nobody who asks holds up those
// who are being answered.
void HttpServer::loop() {
    std::array<epoll_event, 256> events;
    Clock::time_point last_pass = Clock::now();
    while (go_on()) {
        const int n = ::epoll_wait(epoll_, events.data(), static_cast<int>(events.size()),
                                   hurried() ? 0 : 250);
        if (n < 0 && errno != EINTR) fail_errno<std::runtime_error>("cannot wait for sockets");
        for (int i = 0; i < n; i++) {
            const epoll_event& event = events[static_cast<std::size_t>(i)];
            std::uint64_t count = 0;
            if (::read(wake_, &count, sizeof count) > 0) woken();
            if (event.data.u64 == kListener) {
                accept_some();
            } else if (event.data.u64 == kOther) {
                other_event();
            } else if (Connection* c = find(event.data.u64)) {
                const bool ends = (event.events & (EPOLLRDHUP | EPOLLHUP | EPOLLERR)) != 0;
                if (c->busy && ends) {  // whoever reads no more needs no more
                    close(*c);
                } else if ((event.events & ~static_cast<std::uint32_t>(EPOLLOUT)) != 0 &&
                           !receive(*c)) {
                    close(*c);
                } else {
                    move_on(*c);
                }
            }
        }
        const Clock::time_point now = Clock::now();
        if (now - last_pass < std::chrono::milliseconds(250)) continue;
        last_pass = now;
        for (const std::uint64_t id : ids()) check_time(*find(id));
        if (no_accept_until_ != Clock::time_point() && now > no_accept_until_ && listener_ >= 0) {
            no_accept_until_ = {};
            if (spare_ < 0) spare_ = ::open("/dev/null", O_RDONLY | O_CLOEXEC);
            watch(listener_, kListener, EPOLLIN, EPOLL_CTL_MOD);
        }
    }
}

void HttpServer::accept_some() {
    for (int i = 0; i < 16; i++) {
        sockaddr_storage address{};
        socklen_t length = sizeof address;
        const int fd = ::accept4(listener_, reinterpret_cast<sockaddr*>(&address), &length,
                                 SOCK_NONBLOCK | SOCK_CLOEXEC);
        if (fd < 0 && (errno == EMFILE || errno == ENFILE || errno == ENOMEM || errno == ENOBUFS)) {
            const Clock::time_point now = Clock::now();
            if (now - last_complaint_ > std::chrono::seconds(1)) {
                last_complaint_ = now;
                say(cat("cannot accept a connection: ", std::strerror(errno)), kYellow);
            }
            ::close(std::exchange(spare_, -1));  // makes room for one after the other, to tell them
            while (i++ < 16 && refuse_politely(::accept(listener_, nullptr, nullptr))) {
            }
            no_accept_until_ = now + std::chrono::milliseconds(100);
            watch(listener_, kListener, 0, EPOLL_CTL_MOD);
            return;
        }
        if (fd < 0 && errno == ECONNABORTED) continue;
        if (fd < 0) return;
        auto c = std::make_unique<Connection>();
        c->fd = fd, c->id = next_id_++, c->peer = address_of(address, length);
        const auto count = per_client_.find(c->peer);
        if (connections_.size() >= Limits::kConnections ||
            (count != per_client_.end() && count->second >= Limits::kPerClient &&
             !from_proxy(c->peer))) {
            refuse_politely(fd);
            continue;
        }
        length = sizeof address;
        ::getsockname(fd, reinterpret_cast<sockaddr*>(&address), &length);
        c->local = address_of(address, length);
        const int one = 1;  // events are small and wanted at once
        ::setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
        c->since = c->last_sent = Clock::now();
        c->interest = EPOLLIN | EPOLLRDHUP;
        watch(fd, c->id, c->interest);
        per_client_[c->peer]++;
        connections_.emplace(c->id, std::move(c));
    }
}
bool HttpServer::refuse_politely(int fd) {
    if (fd < 0) return false;
    constexpr std::string_view kFull =
        "HTTP/1.1 503 Service Unavailable\r\nRetry-After: 5\r\nContent-Length: 0\r\n"
        "Connection: close\r\n\r\n";
    ::send(fd, kFull.data(), kFull.size(), MSG_NOSIGNAL | MSG_DONTWAIT);
    return ::close(fd) == 0;
}

void HttpServer::write_head(Connection& c, int status, std::string_view type, const Fields& more,
                            std::optional<std::size_t> length) {
    c.status = status;
    bool& keep = c.reader.request.keep_alive;
    keep = keep && c.requests < Limits::kRequests && listener_ >= 0;
    std::string& out = c.out;
    out += cat("HTTP/1.1 ", status, " ", http_status(status).words,
               "\r\nDate: ", date_of(std::time(nullptr), "%a, %d %b %Y %H:%M:%S GMT", true),
               "\r\nServer: nanogpt/", version(), "\r\nX-Request-Id: ", c.request_id, "\r\n");
    if (!type.empty()) out += cat("Content-Type: ", type, "\r\n");
    for (const Fields& fields : {common_fields(c), more}) {
        for (const auto& [name, value] : fields) out += cat(name, ": ", value, "\r\n");
    }
    if (length && status != 204 && status != 304) out += cat("Content-Length: ", *length, "\r\n");
    if (c.chunked && !length) out += "Transfer-Encoding: chunked\r\n";
    out += keep ? "Connection: keep-alive\r\n\r\n" : "Connection: close\r\n\r\n";
}

bool HttpServer::receive(Connection& c) {  // false: the connection is broken
    char bytes[65536];
    const ssize_t n = ::recv(c.fd, bytes, sizeof bytes, 0);
    if (n < 0) return errno == EAGAIN || errno == EINTR;
    if (n == 0) c.ended = true;
    if (c.lingering) return n > 0;
    if (!c.reader.begun() && c.in.empty()) c.since = Clock::now();  // the first byte of a request
    c.in.append(bytes, static_cast<std::size_t>(n));
    return true;
}

// One request, as far as it has arrived; true if it was whole.
bool HttpServer::parse(Connection& c) {
    RequestReader& reader = c.reader;
    if (!reader.head_done()) {
        if (!reader.read_head(c.in)) return false;
        c.since = c.request_start = Clock::now();
        c.requests++;
        check(c);
        if (reader.expects_continue() && c.in.empty()) c.out += "HTTP/1.1 100 Continue\r\n\r\n";
    }
    if (!reader.read_body(c.in)) return false;
    c.busy = true;
    answer(c);
    return true;
}
// All requests that have arrived, one after the other; true if the answers have to be sent first.
bool HttpServer::advance(Connection& c) {
    while (!c.busy && !c.closing && !c.in.empty()) {
        if (c.out.size() >= Limits::kBuffered) return true;
        try {
            if (!parse(c)) return false;
        } catch (const std::exception& e) {
            // Where the next request would begin is only known behind a whole one.
            const bool head = c.reader.head_done();
            if (!head) c.request_start = c.since;
            if (!c.busy && (!head || c.request().has_body)) c.reader.request.keep_alive = false;
            refuse(c, e);
        }
    }
    return false;
}
bool HttpServer::send(Connection& c) {  // false: the connection is broken
    std::size_t sent = 0;
    while (sent < c.out.size()) {
        const ssize_t n = ::send(c.fd, c.out.data() + sent, c.out.size() - sent, MSG_NOSIGNAL);
        if (n < 0 && errno == EINTR) continue;
        if (n < 0 && errno != EAGAIN) return false;
        if (n < 0) break;
        sent += static_cast<std::size_t>(n);
    }
    if (sent > 0) c.last_sent = Clock::now();
    c.out.erase(0, sent);
    return true;
}

void HttpServer::move_on(Connection& c) {
    c.full = advance(c);
    if (!send(c)) return close(c);
    if (c.out.empty() && c.closing && !c.lingering) {
        // Closing at once would reset the connection if bytes are on their way, and the reset could
        // overtake the answer (RFC 9112, 9.6).
        ::shutdown(c.fd, SHUT_WR);
        c.lingering = true;
        c.since = Clock::now();
    }
    if (c.ended && (c.lingering || c.busy || (c.out.empty() && !c.closing && !c.full)))
        return close(c);
    std::uint32_t interest = c.ended ? 0u : EPOLLRDHUP;
    if (!c.ended && (c.lingering || (!c.busy && !c.closing && c.out.size() < Limits::kBuffered)))
        interest |= EPOLLIN;
    if (!c.out.empty() || c.full) interest |= EPOLLOUT;
    if (interest != c.interest) watch(c.fd, c.id, c.interest = interest, EPOLL_CTL_MOD);
}

void HttpServer::close(Connection& c) {
    if (c.busy) gone(c);
    if (--per_client_[c.peer] == 0) per_client_.erase(c.peer);
    ::close(c.fd);
    connections_.erase(c.id);
}

void HttpServer::check_time(Connection& c) {
    const double waited = seconds_since(c.since);
    const auto late = [&](const char* what) {
        c.reader.request.keep_alive = false;
        if (!c.reader.head_done()) c.request_start = c.since;
        refuse(c, HttpError(408, "request_timeout", what));
        move_on(c);
    };
    if (c.out.empty() && !c.full) c.last_sent = Clock::now();
    // what it does not read would keep a plain end away
    if (seconds_since(c.last_sent) > Limits::kStuck) {
        const linger reset = {1, 0};
        ::setsockopt(c.fd, SOL_SOCKET, SO_LINGER, &reset, sizeof reset);
        return close(c);
    }
    if (c.busy) return pass(c);
    if (c.lingering) {
        if (waited > Limits::kLinger) close(c);
    } else if (c.closing || !c.out.empty() || c.full) {
        // kStuck rules
    } else if (c.reader.head_done()) {
        const double bytes = static_cast<double>(c.request().body.size() + c.in.size());
        if (waited > Limits::kWhole || (waited > 5 && bytes < 1024 * (waited - 5)))
            late("the body did not arrive in time");
    } else if (!c.reader.begun()) {
        if (waited > Limits::kIdle || listener_ < 0) close(c);
    } else if (waited > Limits::kHead) {
        late("the header did not arrive within 10 seconds");
    }
}

// ==== 10. scheduler ==============================================================================
// Many answers at once. One thread owns the models in memory, their sequences and the sampling: at
// every step each running sequence writes a token, new ones join, finished ones leave. It takes jobs
// from the sockets' thread and posts events back, and waits for neither a socket nor a disk.

// A thread for what takes long: reading checkpoints.
class Background {
public:
    Background() : thread_([this](std::stop_token stop) { work(stop); }) {}
    void post(std::function<void()> task) {
        const std::lock_guard lock(mutex_);
        tasks_.push_back(std::move(task));
        ready_.notify_one();
    }

private:
    void work(std::stop_token stop) {
        for (;;) {
            std::function<void()> task;
            {
                std::unique_lock lock(mutex_);
                if (!ready_.wait(lock, stop, [&] { return !tasks_.empty(); })) return;
                task = std::move(tasks_.front());
                tasks_.pop_front();
            }
            task();
        }
    }
    std::mutex mutex_;
    std::condition_variable_any ready_;
    std::deque<std::function<void()>> tasks_;
    std::jthread thread_;  // last, so that it ends first
};

struct Offer {  // a checkpoint that answers can be asked of
    ModelInfo info;
    std::shared_ptr<const Tokenizer> tokenizer;
    std::size_t longest_token = 1;  // bytes
};
struct Failure {  // why there is no answer
    int status;
    std::string code, message;
};

// A walk that a client asked for. Its pictures are drawn on the loading thread.
struct WalkTask {
    WalkPlan plan;
    Walk result;
    std::string key, json;                                      // of its pictures' address
    std::vector<std::pair<std::string, std::string>> pictures;  // names and PNG files
    std::atomic<bool> drawn = false;
};
void draw_walk(WalkTask& task) {
    const std::vector<Chart> charts = charts_of(task.result);
    std::vector<Value> pictures;
    for (std::size_t i = 0; kHasPng && i < charts.size(); i++) {
        const std::string file = charts[i].name + ".png";
        task.pictures.emplace_back(file, charts[i].picture.png());
        const std::string url = cat("/api/v1/inference/walk/", task.key, "/", file);
        pictures.push_back(merged(object({{"url", url}}), chart_json(charts[i])));
    }
    Members members = walk_members(task.result);
    members.emplace_back("pictures", array(pictures));
    task.json = object(members).text + "\n";
}

// What a client asked for, and what became of it. The sockets' thread fills it in and hands it over;
// the scheduler's thread writes the results before it posts the last event.
struct Job {
    std::uint64_t connection = 0, id = 0;
    std::string client, owner;  // who takes turns; whose limits it counts for: an address
    std::shared_ptr<const Offer> offer;
    std::vector<Token> prompt;
    GenerateParams params;
    std::vector<std::string> stop_texts;
    bool chat = true;  // with a calculator
    bool literal_tools = false;
    bool clipped = false;          // max_tokens is what the context has left
    bool candidates_only = false;  // the distribution behind the prompt, and no answer
    Clock::time_point created = Clock::now();

    std::atomic<bool> cancelled = false, paused = false;

    Answer answer;
    int reused_tokens = 0;
    double queue_seconds = 0;
    std::vector<Candidate> candidates;
    Candidate chosen = {};           // its token is asked for
    std::shared_ptr<WalkTask> walk;  // a walk, and no answer
    std::optional<Failure> failure;
};
struct Event {
    enum class Kind { queued, loading, reading, text, done } kind;
    std::shared_ptr<Job> job;
    std::string text;
    int number = 0;  // jobs before it; else percent
};

struct Histogram {  // of seconds
    static constexpr std::array kBounds = {0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1,
                                           0.25,  0.5,    1.0,   2.5,  5.0,   10.0};
    std::array<std::uint64_t, kBounds.size() + 1> counts{};
    double sum = 0;
    void add(double x) {
        sum += x;
        counts[static_cast<std::size_t>(std::lower_bound(kBounds.begin(), kBounds.end(), x) -
                                        kBounds.begin())]++;
    }
};
struct Snapshot {  // what monitors see
    struct Slot {
        std::uint64_t id;
        std::string model, state;
        int prompt_tokens, generated;
        double seconds;
    };
    struct OfModel {
        std::string id, device;
        std::size_t running = 0, idle = 0;
        std::uint64_t kv_blocks = 0, kv_blocks_total = 0;  // of 64 tokens, of running answers
    };
    struct Written {  // tokens since the start, whether the model is in memory or not
        std::uint64_t prompt_tokens = 0, generated = 0;
    };
    std::vector<Slot> slots;
    std::vector<OfModel> models;
    std::map<std::string, Written> written;  // by id
    std::size_t active = 0, queued = 0, cancelled = 0;
    std::uint64_t memory_available = 0;
    Histogram first_token, between_tokens;
    bool loading = false;
    std::string broken;  // a device that failed
    bool has(std::string_view id) const {
        return std::any_of(models.begin(), models.end(), [&](const auto& m) { return m.id == id; });
    }
};

class Scheduler {
public:
    Scheduler(std::size_t slots, const Options& options, std::function<void()> wake)
        : slots_(slots),
          reserve_(options.mem_reserve.value_or(default_reserve(place_for(options).cuda))),
          options_(options),
          wake_(std::move(wake)),
          thread_([this](std::stop_token stop) { work(stop); }) {}

    // ---- for the sockets' thread
    void submit(std::shared_ptr<Job> job) {
        poke([&] { arrived_.push_back(std::move(job)); });
    }
    void preload(std::shared_ptr<const Offer> offer) {
        poke([&] { preload_ = std::move(offer), snapshot_.loading = true; });
    }
    // Wakes the scheduler after a change, also one that was made before.
    void poke(const std::function<void()>& change = [] {}) {
        const std::lock_guard lock(mutex_);
        change();
        poked_ = true;
        ready_.notify_one();
    }
    // Steps shorter than a thread can take to be woken: 1.3 ms were seen, on a virtual machine.
    bool hurried() const { return hurried_; }
    int stop_code() const { return stop_code_; }  // not 0: the process cannot go on
    void drain() { draining_ = true, poke(); }    // whoever waits is sent away
    std::vector<Event> take_events() {
        const std::lock_guard lock(mutex_);
        return std::exchange(events_, {});
    }
    Snapshot snapshot() {
        const std::lock_guard lock(mutex_);
        return snapshot_;
    }

    static constexpr int kRunningPerClient = 16, kWaitingPerClient = 32;

private:
    struct Running {
        Running(std::shared_ptr<Job> j, std::unique_ptr<Sequence> s)
            : job(std::move(j)),
              sequence(std::move(s)),
              calculator(*job->offer->tokenizer),
              text(*job->offer->tokenizer, job->stop_texts, job->literal_tools),
              answer(job->params, job->chat ? &calculator : nullptr) {}
        std::shared_ptr<Job> job;
        std::unique_ptr<Sequence> sequence;
        CalculatorTool calculator;
        TextStream text;
        Continuation answer;
        std::unique_ptr<Walker> walker;
        Clock::time_point start = Clock::now(), first = {}, last = {};
        bool over = false, drawing = false;

        std::size_t read() const { return sequence->tokens().size(); }  // of the prompt
        bool reading() const { return answer.count() == 0; }
    };
    struct Idle {  // a finished sequence, for the next turn of its conversation
        std::unique_ptr<Sequence> sequence;
        std::size_t read;  // tokens that were read as a prompt
    };
    // How many tokens of prompts are read beside answers: as many as make a step take two and a half
    // times as long, so that few wait for more than three of the usual steps. Found by trying, since
    // a CPU pays for every token and a GPU mostly for the pass. Every 16 steps reads none, to learn
    // anew how long the usual one takes.
    struct Pace {
        static constexpr double kMost = 256, kLonger = 2.5;
        static constexpr int kFresh = 16;
        double least = 16;      // 64 for a GPU, which would not be done sooner with fewer
        double tokens = least;  // beside answers
        double step = 0;        // seconds of one without prompts
        int since = kFresh;     // steps with prompts since then

        std::size_t prompt_tokens(bool beside) const {
            return static_cast<std::size_t>(!beside ? kMost : since >= kFresh ? 0 : tokens);
        }
        void learn(double seconds, std::size_t read) {
            if (read == 0) {
                step = step == 0 ? seconds : std::min(seconds, 2 * step);  // one may be late
                since = 0;
                return;
            }
            since++;
            const double room = kLonger * step / seconds;
            const bool full = 2 * static_cast<double>(read) >= tokens;
            if (room < 1 || full)
                tokens = std::clamp(tokens * std::clamp(room, 0.5, 1.25), least, kMost);
        }
    };
    struct Loaded {
        std::shared_ptr<const Offer> offer;
        Device device;
        Pace pace;
        std::vector<std::unique_ptr<Running>> running;
        std::deque<Idle> idle;           // last used last
        std::optional<Failure> failure;  // why it could not be loaded
        std::size_t next_reader = 0;
        bool used = false, full = false;  // full: somebody waits for room in it
        Snapshot::Written* written = nullptr;

        Backend& backend() const { return *device.backend; }
        std::uint64_t token_bytes() const { return cache_bytes(offer->info.config, device.cuda); }
    };
    struct Client {
        std::string name, owner;
        std::deque<std::shared_ptr<Job>> waiting;
    };
    void work(std::stop_token stop);
    bool round();
    void receive();
    void admit();
    void expire();
    void look_after();
    bool start_one(Client& client);
    bool start(const std::shared_ptr<Job>& job);
    Loaded* loaded(const Offer& offer);
    Device open(const ModelInfo& info);
    void begin_loading(std::shared_ptr<const Offer> offer);
    void finish_loading();
    bool removable(const Loaded& m) const;
    bool make_room(std::uint64_t bytes, const Loaded* keep);
    std::unique_ptr<Sequence> sequence_for(Loaded& m, const Job& job);
    bool step(Loaded& m);
    std::size_t read_prompts(Loaded& m, std::vector<Running*>& rows);
    void sample(Loaded& m, std::span<Running* const> rows);
    void read_alone(Loaded& m, Running& r, std::size_t size);
    bool peak_known(const Loaded& m);
    bool walk_on(Loaded& m);
    void take(Loaded& m, Running& r, Token token);
    template <class Step>
    void guarded(std::span<Running* const> rows, Step&& step);
    void fail(Job& job, Failure failure);
    void sweep(Loaded& m);
    void trim_idle(Loaded& m);
    void tell_waiting();
    void publish(bool always);
    std::size_t running() const {
        std::size_t n = 0;
        for (const auto& m : models_) n += m->running.size();
        return n;
    }
    int running_of(const std::string& owner) const {
        int n = 0;
        for (const auto& m : models_) {
            for (const auto& r : m->running) n += r->job->owner == owner;
        }
        return n;
    }
    void event(Event::Kind kind, std::shared_ptr<Job> job, std::string text = "", int number = 0) {
        posted_.push_back({kind, std::move(job), std::move(text), number});
    }

    const std::size_t slots_;
    const std::uint64_t reserve_;  // bytes of memory left to others
    const Options options_;
    const std::function<void()> wake_;

    std::mutex mutex_;  // guards what stands here
    std::condition_variable ready_;
    std::vector<std::shared_ptr<Job>> arrived_;
    std::shared_ptr<const Offer> preload_;
    std::vector<Event> events_;
    Snapshot snapshot_;
    bool poked_ = false, load_done_ = false;

    std::atomic<bool> draining_ = false, stopping_ = false, hurried_ = false;
    std::atomic<int> load_percent_ = 0, stop_code_ = 0;

    // the scheduler's own
    std::vector<std::shared_ptr<Loaded>> models_;  // last used last
    std::shared_ptr<Loaded> loading_;
    std::vector<Client> clients_;  // who has jobs waiting; whose turn it is first
    Snapshot totals_;              // without what is counted when it is shown
    std::vector<Event> posted_;
    Clock::time_point last_second_ = {}, last_publish_ = {};
    Peak peak_;  // once measured is true
    bool measuring_ = false;
    std::atomic<bool> measured_ = false;
    ThreadPool lens_pool_{1};  // the models' own threads are busy with answers

    Background background_;
    std::jthread thread_;  // last, so that it ends first
};

void Scheduler::work(std::stop_token stop) {
    const std::stop_callback on_stop(stop, [this] { stopping_ = true, poke(); });
    while (!stop.stop_requested()) {
        const bool worked = round();
        publish(!worked);
        if (worked) continue;
        hurried_ = false;
        std::unique_lock lock(mutex_);
        ready_.wait_for(lock, std::chrono::seconds(1), [&] { return poked_; });
    }
}
bool Scheduler::round() {
    receive();
    finish_loading();
    for (const auto& m : models_) sweep(*m);
    expire();
    admit();
    look_after();
    if (!posted_.empty()) publish(false);  // before a step, which may be long
    bool worked = false;
    for (const auto& m : models_) {
        worked |= step(*m);
        sweep(*m);
    }
    return worked;
}

void Scheduler::receive() {
    std::vector<std::shared_ptr<Job>> arrived;
    std::shared_ptr<const Offer> preload;
    {
        const std::lock_guard lock(mutex_);
        arrived.swap(arrived_);
        preload.swap(preload_);
        poked_ = false;
    }
    for (std::shared_ptr<Job>& job : arrived) {
        const auto same = [&](const Client& c) { return c.name == job->client; };
        auto client = std::find_if(clients_.begin(), clients_.end(), same);
        if (client == clients_.end())
            client = clients_.insert(client, {job->client, job->owner, {}});
        client->waiting.push_back(std::move(job));
    }
    if (preload != nullptr && loaded(*preload) == nullptr) begin_loading(std::move(preload));
}

// Sends away who waited too long or for nothing, and forgets who is gone.
void Scheduler::expire() {
    const Clock::time_point now = Clock::now();
    const int most = std::min(options_.queue_timeout, options_.request_timeout);
    for (Client& client : clients_) {
        std::erase_if(client.waiting, [&](const std::shared_ptr<Job>& job) {
            if (job->cancelled) {
                fail(*job, {0, "cancelled", ""});
            } else if (draining_) {
                fail(*job, {503, "draining", "the server is stopping"});
            } else if (!totals_.broken.empty()) {
                fail(*job, {503, "device_lost", totals_.broken});
            } else if (now - job->created > std::chrono::seconds(most)) {
                fail(*job, {503, "queue_full", cat("waited ", most, " s for a free slot")});
            }
            if (!job->failure) return false;
            event(Event::Kind::done, job);
            return true;
        });
    }
    std::erase_if(clients_, [](const Client& c) { return c.waiting.empty(); });
}

// Once a second.
void Scheduler::look_after() {
    const Clock::time_point now = Clock::now();
    if (now - last_second_ < std::chrono::seconds(1)) return;
    last_second_ = now;
    totals_.memory_available = detail::available_memory();
    if (totals_.memory_available < reserve_ / 2) make_room(0, nullptr);
    if (totals_.memory_available < std::min(reserve_ / 8, std::uint64_t{1} << 30)) stop_code_ = 5;
    tell_waiting();
}

// One job of each address in turn, and there of each client, until nothing more can start.
void Scheduler::admit() {
    for (const auto& m : models_) m->full = false;
    for (auto client = clients_.begin(); client != clients_.end() && running() < slots_;) {
        if (!start_one(*client++)) continue;
        // all who share the address go to the end of the line, and this client behind them
        std::rotate(client - 1, client, clients_.end());
        const auto others = [&](const Client& c) { return c.owner != clients_.back().owner; };
        std::stable_partition(clients_.begin(), clients_.end() - 1, others);
        client = clients_.begin();
    }
}
bool Scheduler::start_one(Client& client) {
    if (running_of(client.owner) >= kRunningPerClient) return false;
    const auto job = std::find_if(client.waiting.begin(), client.waiting.end(),
                                  [this](const auto& one) { return start(one); });
    if (job == client.waiting.end()) return false;
    client.waiting.erase(job);
    return true;
}

// Starts a job if its model is in memory and has room for all that it may write; where it has not,
// nobody behind it gets what room there is. True too if it fails: it waits no more.
bool Scheduler::start(const std::shared_ptr<Job>& job) {
    Loaded* m = loaded(*job->offer);
    try {
        if (m == nullptr) {
            begin_loading(job->offer);
            return false;
        }
        if (m->full || (job->walk != nullptr && !peak_known(*m))) return false;
        std::unique_ptr<Sequence> sequence = sequence_for(*m, *job);
        if (sequence == nullptr) {
            m->full = !m->running.empty();
            if (m->full) return false;
            throw Error(ErrorKind::out_of_memory, "not enough memory for this conversation now");
        }
        job->queue_seconds = seconds_since(job->created);
        job->reused_tokens = static_cast<int>(sequence->tokens().size());
        m->written->prompt_tokens += job->prompt.size();
        m->running.push_back(std::make_unique<Running>(job, std::move(sequence)));
        Running& r = *m->running.back();
        if (job->walk != nullptr) {
            r.walker =
                std::make_unique<Walker>(m->device, *r.sequence, lens_pool_, job->offer->info,
                                         *job->offer->tokenizer, job->walk->plan);
        }
        constexpr std::size_t kLong = 64;  // tokens: fewer are read before anybody wonders
        if (job->prompt.size() - r.read() > kLong) event(Event::Kind::reading, job);
        m->used = true;
        const auto here = std::find_if(models_.begin(), models_.end(),
                                       [&](const auto& other) { return other.get() == m; });
        std::rotate(here, here + 1, models_.end());  // last used last
    } catch (const std::exception& e) {
        const auto* error = dynamic_cast<const Error*>(&e);
        const bool usage = error != nullptr && error->kind == ErrorKind::usage;
        fail(*job, usage ? Failure{400, "out_of_range", e.what()}
                         : Failure{503, "out_of_memory", "not enough memory for this answer now"});
        event(Event::Kind::done, job);
    }
    return true;
}

// ---- models

Scheduler::Loaded* Scheduler::loaded(const Offer& offer) {
    const ModelInfo& a = offer.info;
    for (const auto& m : models_) {  // a file that has changed since is another one
        const ModelInfo& b = m->offer->info;
        if (a.model_file == b.model_file && a.modified == b.modified &&
            a.file_bytes == b.file_bytes)
            return m.get();
    }
    return nullptr;
}

// On the loading thread. A GPU gets room for the keys and values of most conversations in all slots,
// or for what fits.
Device Scheduler::open(const ModelInfo& info) {
    const auto watch = [this](std::uint64_t done, std::uint64_t total) {
        load_percent_ = static_cast<int>(100 * done / std::max<std::uint64_t>(total, 1));
        return !stopping_;
    };
    const auto context = static_cast<std::uint64_t>(std::min(info.config.sequence_len, 1536));
    CudaOptions cuda;
    cuda.reserve_bytes = options_.mem_reserve;
    cuda.kv_tokens = slots_ * context;
    try {
        return open_device(info, options_, cuda, watch, true);
    } catch (const Error& e) {
        if (!place_for(options_).cuda || e.kind != ErrorKind::out_of_memory) throw;
    }
    cuda.kv_tokens = 0, cuda.least_contexts = std::min<std::uint64_t>(slots_, 8);
    return open_device(info, options_, cuda, watch, true);
}

// Idle, and not just loaded for somebody whose turn has not come.
bool Scheduler::removable(const Loaded& m) const {
    const auto wants = [&](const auto& job) { return job->offer->info.id == m.offer->info.id; };
    return m.running.empty() &&
           (m.used || std::none_of(clients_.begin(), clients_.end(), [&](const Client& c) {
                return std::any_of(c.waiting.begin(), c.waiting.end(), wants);
            }));
}

void Scheduler::begin_loading(std::shared_ptr<const Offer> offer) {
    if (loading_ != nullptr) return;
    const Place place = place_for(options_);
    const ModelInfo& info = offer->info;
    const std::uint64_t need =
        weight_bytes(info, place.dtype) +
        cache_bytes(info.config, place.cuda) * static_cast<std::uint64_t>(info.config.sequence_len);
    while (std::ssize(models_) >= options_.max_models) {
        const auto oldest = std::find_if(models_.begin(), models_.end(),
                                         [&](const auto& m) { return removable(*m); });
        if (oldest == models_.end()) return;  // until one is idle
        models_.erase(oldest);
    }
    loading_ = std::make_shared<Loaded>();
    loading_->offer = std::move(offer);
    load_percent_ = 0;
    if (!make_room(need, nullptr)) {
        loading_->failure = {503, "out_of_memory",
                             cat(info.id, " needs ", human_bytes(need), " of memory, ",
                                 human_bytes(detail::available_memory()), " is available and ",
                                 human_bytes(reserve_), " of it stay reserved")};
        return poke([&] { load_done_ = true; });
    }
    background_.post([this, m = loading_]() mutable {
        try {
            m->device = open(m->offer->info);
            if (m->device.cuda) m->pace.least = m->pace.tokens = 64;
        } catch (const Error& e) {
            const bool memory = e.kind == ErrorKind::out_of_memory;
            m->failure = {memory ? 503 : 409, memory ? "out_of_memory" : "model_not_ready",
                          e.what()};
        } catch (const std::exception&) {
            m->failure = {503, "out_of_memory",
                          cat("not enough memory to load ", m->offer->info.id)};
        }
        m.reset();  // the scheduler alone holds it, and lets it go
        poke([&] { load_done_ = true; });
    });
}
void Scheduler::finish_loading() {
    {
        const std::lock_guard lock(mutex_);
        if (!std::exchange(load_done_, false)) return;
    }
    const std::shared_ptr<Loaded> m = std::exchange(loading_, nullptr);
    const std::string& id = m->offer->info.id;
    if (!m->failure) {
        m->written = &totals_.written[id];
        models_.push_back(m);
        return note(cat("loaded ", id));
    }
    note(cat("cannot load ", id, ": ", m->failure->message));
    for (Client& client : clients_) {
        for (const auto& job : client.waiting) {
            if (job->offer->info.id == id) fail(*job, *m->failure);
        }
    }
}

// Frees what nobody needs now, oldest first, until so many bytes could be taken; false: they cannot.
bool Scheduler::make_room(std::uint64_t bytes, const Loaded* keep) {
    for (;;) {
        std::uint64_t promised = 0;  // to running sequences, which take their memory as they grow
        for (const auto& m : models_) {
            for (const auto& r : m->running)
                promised +=
                    m->device.cuda
                        ? 0
                        : m->token_bytes() * (r->job->prompt.size() +
                                              static_cast<std::size_t>(r->job->params.max_tokens) -
                                              std::min(r->job->prompt.size(), r->read()));
        }
        totals_.memory_available = detail::available_memory();
        if (totals_.memory_available >= reserve_ + promised + bytes) return true;
        const auto idle = [](const auto& m) { return !m->idle.empty(); };
        if (const auto m = std::find_if(models_.begin(), models_.end(), idle); m != models_.end()) {
            (*m)->idle.pop_front();
            continue;
        }
        const auto free = [&](const auto& m) { return m.get() != keep && removable(*m); };
        const auto m = std::find_if(models_.begin(), models_.end(), free);
        if (m == models_.end()) return false;
        note(cat("memory is short: unloaded ", (*m)->offer->info.id));
        models_.erase(m);
    }
}

// ---- sequences

// The idle sequence that begins as this prompt does, else a new one; null if there is no room yet.
std::unique_ptr<Sequence> Scheduler::sequence_for(Loaded& m, const Job& job) {
    const std::size_t need = job.prompt.size() + static_cast<std::size_t>(job.params.max_tokens);
    std::size_t best_length = 0;
    auto best = m.idle.end();
    for (auto at = m.idle.begin(); at != m.idle.end(); ++at) {
        const std::span<const Token> held = at->sequence->tokens();
        const auto differ =
            std::mismatch(job.prompt.begin(), job.prompt.end(), held.begin(), held.end());
        std::size_t same = static_cast<std::size_t>(differ.first - job.prompt.begin());
        // the same request gives the same tokens whatever was asked before: what was written one by
        // one is read again where that makes other bits
        if (!m.backend().decode_equals_prompt()) same = std::min(same, at->read);
        same = std::min(same, job.prompt.size() - 1);         // the last one is read for its logits
        if (same <= best_length || 2 * same < held.size() ||  // it rather waits for its own
            static_cast<std::size_t>(at->sequence->capacity()) < need)
            continue;
        best = at, best_length = same;
    }
    if (best != m.idle.end()) {
        std::unique_ptr<Sequence> sequence = std::move(best->sequence);
        m.idle.erase(best);
        sequence->rewind(static_cast<int>(best_length));
        return sequence;
    }
    if (!m.device.cuda && !make_room(m.token_bytes() * need, &m)) return nullptr;
    // The CPU's take memory as they fill, so all can have the whole context and grow in later turns.
    const std::size_t S = static_cast<std::size_t>(m.offer->info.config.sequence_len);
    const bool roomy = !m.device.cuda || 4 * (m.running.size() + 1) <= slots_;
    const int capacity = static_cast<int>(
        roomy ? std::max(S, need) : std::min((need + 63) / 64 * 64, std::max(S, need)));
    for (;;) {
        try {
            return m.backend().new_sequence(capacity);
        } catch (const Error& e) {
            if (e.kind != ErrorKind::out_of_memory) throw;
        }
        if (m.idle.empty()) return nullptr;
        m.idle.pop_front();
    }
}

// ---- steps

bool Scheduler::step(Loaded& m) {
    std::vector<Running*> rows;
    for (const auto& r : m.running) {  // in this order: a device may have begun the next step
        if (!r->over && !r->reading() && !r->job->paused) rows.push_back(r.get());
    }
    const bool beside = !rows.empty();
    const Clock::time_point start = Clock::now();
    const std::size_t read = read_prompts(m, rows);
    sample(m, rows);
    if (beside) {
        m.pace.learn(seconds_since(start), read);
        hurried_ = m.device.cuda && m.pace.step < 1e-3;
    }
    return walk_on(m) || beside || read > 0;
}

// How fast the device is at best: measured once, when the first walk is asked for.
bool Scheduler::peak_known(const Loaded& m) {
    if (!std::exchange(measuring_, true)) {
        background_.post([this, cuda = m.device.cuda] {
            try {
                peak_ = measure_peak(cuda, options_.threads);
            } catch (const std::exception& e) {
                note(cat("walks have no roof: ", e.what()));
            }
            measured_ = true;
            poke();
        });
    }
    return measured_;
}
// One pass of one walk, between two steps of the answers.
bool Scheduler::walk_on(Loaded& m) {
    const auto at = std::find_if(m.running.begin(), m.running.end(), [](const auto& r) {
        return r->walker && !r->over && !r->drawing;
    });
    if (at == m.running.end()) return false;
    Running* const row = at->get();
    guarded({&row, 1}, [&](std::span<Running* const>) {
        if (row->walker->advance()) return;
        row->drawing = true;
        WalkTask& task = *row->job->walk;
        task.result = row->walker->take();
        task.result.peak = peak_;
        background_.post([this, job = row->job] {
            try {
                draw_walk(*job->walk);
            } catch (const std::exception&) {
                job->walk->json.clear();  // not enough memory for the pictures
            }
            job->walk->drawn = true;
            poke();
        });
    });
    return true;
}

// What is read of prompts in a step. Whole ones go into `rows`, to be read with the others' step; a
// piece of one is read here, and only where no other is: a pass for few tokens costs a GPU as much.
std::size_t Scheduler::read_prompts(Loaded& m, std::vector<Running*>& rows) {
    const std::size_t most = m.pace.prompt_tokens(!rows.empty());
    std::size_t budget = most;
    const std::size_t n = m.running.size(), first = n == 0 ? 0 : m.next_reader++ % n;
    for (std::size_t i = 0; i < n && budget > 0; i++) {
        Running& r = *m.running[(first + i) % n];
        if (r.over || !r.reading() || r.job->paused || r.walker) continue;
        const std::size_t left = r.job->prompt.size() - r.read(), size = std::min(left, budget);
        if (size < left && budget < most) continue;
        budget -= size;
        if (size < left || r.job->candidates_only) {
            read_alone(m, r, size);
        } else {
            rows.push_back(&r);
        }
    }
    return most - budget;
}

void Scheduler::sample(Loaded& m, std::span<Running* const> rows) {
    guarded(rows, [&](std::span<Running* const> some) {
        std::vector<Chunk> chunks;
        std::vector<Sampler*> samplers;
        for (Running* r : some) {
            const std::span<const Token> prompt = r->job->prompt;
            chunks.push_back(r->reading()
                                 ? Chunk{r->sequence.get(), prompt.subspan(r->read()), true}
                                 : Chunk{r->sequence.get(), r->answer.last()});
            samplers.push_back(&r->answer.sampler());
        }
        const std::span<const Token> tokens = m.backend().sample(chunks, samplers);
        for (std::size_t i = 0; i < some.size(); i++) {
            try {
                take(m, *some[i], tokens[i]);
            } catch (const std::exception&) {
                fail(*some[i]->job, {503, "out_of_memory", "not enough memory for the answer"});
                some[i]->over = true;
            }
        }
    });
}

// A piece of a prompt; at its end, if they are asked for, the likeliest tokens behind it: of the full
// distribution, before temperature and top-k.
void Scheduler::read_alone(Loaded& m, Running& r, std::size_t size) {
    Running* const row = &r;
    guarded({&row, 1}, [&](std::span<Running* const>) {
        const auto piece = std::span(r.job->prompt).subspan(r.read(), size);
        const Chunk chunk = {r.sequence.get(), piece, true};
        const std::span<const float> logits = m.backend().step({&chunk, 1});
        const std::size_t read = r.read(), all = r.job->prompt.size();
        if (read < all)
            return event(Event::Kind::reading, r.job, "", static_cast<int>(100 * read / all));
        Sampler::argmax(logits);  // throws if they are no numbers
        const std::vector<double> p = probabilities(logits);
        r.job->candidates = likeliest(p, 10);
        r.job->chosen.probability = p[static_cast<std::size_t>(r.job->chosen.token)];
        r.over = true;
    });
}

void Scheduler::take(Loaded& m, Running& r, Token token) {
    const Clock::time_point now = Clock::now();
    if (r.reading()) {
        r.first = now;
        totals_.first_token.add(std::chrono::duration<double>(now - r.job->created).count());
    } else {
        totals_.between_tokens.add(std::chrono::duration<double>(now - r.last).count());
    }
    r.last = now;
    m.written->generated++;
    const auto reason = r.answer.take(*r.sequence, token, [&](Generated generated) {
        // A completion ends at any special token; that of a call would open an empty bracket.
        if (!r.job->chat && r.job->offer->tokenizer->is_special(generated.token)) return true;
        std::string text = r.text.push(generated.token);
        if (!text.empty()) event(Event::Kind::text, r.job, std::move(text));
        return !r.text.stopped();
    });
    if (!reason) return;
    std::string rest = r.text.finish();
    if (!rest.empty()) event(Event::Kind::text, r.job, std::move(rest));
    const bool full = reason == StopReason::max_tokens && r.job->clipped;
    r.job->answer.reason = r.text.stopped() ? StopReason::stop_token
                           : full           ? StopReason::context_full
                                            : *reason;
    r.over = true;
}

// Runs a step. If the error is of one sequence (its logits are no numbers), the others go on.
template <class Step>
void Scheduler::guarded(std::span<Running* const> rows, Step&& step) {
    if (rows.empty()) return;
    try {
        return step(rows);
    } catch (const std::exception& e) {
        const auto* error = dynamic_cast<const Error*>(&e);
        for (Running* r : rows) r->answer.restart_sampler();
        if (error != nullptr && error->kind == ErrorKind::device) {
            totals_.broken = "the device failed; the server stops";
            stop_code_ = 1;
            say(cat("device failed: ", e.what()), kRed);
            for (const auto& m : models_) {
                for (const auto& r : m->running)
                    fail(*r->job, {503, "device_lost", totals_.broken}), r->over = true;
            }
        } else if (rows.size() == 1) {
            const bool memory = error == nullptr || error->kind == ErrorKind::out_of_memory;
            fail(*rows[0]->job, memory
                                    ? Failure{503, "out_of_memory", "not enough memory for a step"}
                                    : Failure{500, "internal", e.what()});
            rows[0]->over = true;
        }
    }
    if (rows.size() == 1 || !totals_.broken.empty()) return;
    for (std::size_t i = 0; i < rows.size(); i++) guarded(rows.subspan(i, 1), step);
}

void Scheduler::fail(Job& job, Failure failure) {
    if (!job.failure) job.failure = std::move(failure);
}

// Takes out what is over; its sequence stays for the conversation's next turn.
void Scheduler::sweep(Loaded& m) {
    const Clock::time_point now = Clock::now();
    std::erase_if(m.running, [&](const std::unique_ptr<Running>& r) {
        Job& job = *r->job;
        if (job.cancelled && !r->over) fail(job, {0, "cancelled", ""}), r->over = true;
        if (r->drawing && job.walk->drawn && !r->over) {
            if (job.walk->json.empty())
                fail(job, {503, "out_of_memory", "not enough memory to draw the pictures"});
            r->over = true;
        }
        if (!r->over && now - job.created > std::chrono::seconds(options_.request_timeout)) {
            fail(job, {503, "request_timeout",
                       cat("the answer took more than ", options_.request_timeout, " s")});
            r->over = true;
        }
        if (!r->over) return false;
        const auto seconds = [](Clock::time_point a, Clock::time_point b) {
            return std::chrono::duration<double>(b - a).count();
        };
        Answer& a = job.answer;
        a.prompt_tokens = static_cast<int>(job.prompt.size());
        a.completion_tokens = r->answer.count();
        if (a.completion_tokens > 0) {
            a.prefill_seconds = seconds(r->start, r->first);
            a.decode_seconds = seconds(r->first, r->last);
            a.first_seconds = seconds(job.created, r->first);
        }
        if (job.cancelled) totals_.cancelled++;
        if (!job.failure || job.cancelled)
            m.idle.push_back({std::move(r->sequence), job.prompt.size()});
        event(Event::Kind::done, r->job);
        return true;
    });
    trim_idle(m);
}
// Idle sequences keep at most two contexts for every slot.
void Scheduler::trim_idle(Loaded& m) {
    const std::size_t most =
        2 * slots_ * static_cast<std::size_t>(m.offer->info.config.sequence_len);
    std::size_t tokens = 0;
    for (const Idle& idle : m.idle) tokens += idle.sequence->tokens().size();
    while (tokens > most || m.idle.size() > 4 * slots_) {
        tokens -= m.idle.front().sequence->tokens().size();
        m.idle.pop_front();
    }
}

// ---- what others see

// Tells who waits how many are before them, if all can start: every address has one job in the first
// round, and there the clients that come first.
void Scheduler::tell_waiting() {
    struct Turn {
        std::size_t round, of, client;  // `of`: the first client of the address
        const std::shared_ptr<Job>* job;
        auto operator<=>(const Turn&) const = default;
    };
    std::vector<Turn> line;
    std::unordered_map<std::string_view, std::size_t> first, jobs;
    for (std::size_t c = 0; c < clients_.size(); c++) {
        const std::size_t of = first.try_emplace(clients_[c].owner, c).first->second;
        for (std::size_t i = 0; i < clients_[c].waiting.size(); i++)
            line.push_back({i, of, c, &clients_[c].waiting[i]});
    }
    std::sort(line.begin(), line.end());
    for (Turn& turn : line) turn.round = jobs[clients_[turn.of].owner]++;
    std::sort(line.begin(), line.end());
    int before = 0;
    for (const Turn& turn : line) {
        const bool loading =
            loading_ != nullptr && (*turn.job)->offer->info.id == loading_->offer->info.id;
        event(loading ? Event::Kind::loading : Event::Kind::queued, *turn.job, "",
              loading ? load_percent_.load() : before);
        before++;
    }
}

void Scheduler::publish(bool always) {
    const Clock::time_point now = Clock::now();
    std::size_t queued = 0;
    for (const Client& client : clients_) queued += client.waiting.size();
    std::optional<Snapshot> fresh;
    const auto blocks = [](std::size_t tokens) { return (tokens + 63) / 64; };
    if (always || now - last_publish_ > std::chrono::milliseconds(50)) {
        last_publish_ = now;
        Snapshot& s = fresh.emplace(totals_);
        for (const auto& m : models_) {
            const std::string& id = m->offer->info.id;
            std::uint64_t held = 0;
            for (const auto& r : m->running) {
                held += blocks(r->read());
                s.slots.push_back({r->job->id, id,
                                   r->walker      ? "walk"
                                   : r->reading() ? "prefill"
                                                  : "decode",
                                   static_cast<int>(r->job->prompt.size()), r->answer.count(),
                                   std::chrono::duration<double>(now - r->start).count()});
            }
            const int S = m->offer->info.config.sequence_len;
            s.models.push_back({id, m->backend().device(), m->running.size(), m->idle.size(), held,
                                slots_ * blocks(static_cast<std::size_t>(S))});
        }
    }
    {
        const std::lock_guard lock(mutex_);
        if (fresh) snapshot_ = std::move(*fresh);
        snapshot_.loading = loading_ != nullptr || preload_ != nullptr;  // never "ok" in between
        snapshot_.active = running(), snapshot_.queued = queued;
        if (posted_.empty()) return;
        std::move(posted_.begin(), posted_.end(), std::back_inserter(events_));
        posted_.clear();
    }
    wake_();
}

// ==== 11. routes =================================================================================
// What the requests mean: nanochat's chat_web, OpenAI's interface and the class's model list, on the
// sockets' thread. Everything that needs no generation is answered at once.

extern const std::string_view kPageStyle, kPageBody, kPageScript;  // section 13
constexpr std::string_view kJson = "application/json";
constexpr std::string_view kEvents = "text/event-stream; charset=utf-8";

// The members of a JSON body, each checked: an unknown one is ignored, a known one that does not fit
// is refused.
class Form {
public:
    explicit Form(Json json, int wrong_form = 400, std::string_view name = "the body")
        : json_(std::move(json)), wrong_form_(wrong_form) {
        if (json_.kind != Json::Kind::object) wrong(name, "a JSON object", json_);
    }
    const Json* find(std::string_view name) const { return find(json_, name); }
    const Json& need(std::string_view name) const { return need(json_, name, name); }
    // A member of an object within the body; `param` is what errors call it.
    const Json& need(const Json& object, std::string_view name, std::string_view param) const {
        if (const Json* value = find(object, name)) return *value;
        throw HttpError(wrong_form_, "missing_field", cat(param, " is required"),
                        std::string(param));
    }
    [[noreturn]] void wrong(std::string_view name, std::string_view wanted, const Json& got) const {
        using Kind = Json::Kind;
        const std::string shown = got.kind == Kind::string    ? detail::quote(got.string)
                                  : got.kind == Kind::number  ? got.string
                                  : got.kind == Kind::boolean ? got.boolean ? "true" : "false"
                                  : got.kind == Kind::null    ? "null"
                                  : got.kind == Kind::array   ? "an array"
                                                              : "an object";
        throw HttpError(wrong_form_, "wrong_type",
                        cat(name, " must be ", wanted, " (got ", shown, ")"), std::string(name));
    }
    [[noreturn]] static void out_of_range(std::string_view name, const std::string& message) {
        throw HttpError(400, "out_of_range", message, std::string(name));
    }
    // `sentence`: nanochat's, for a number out of range.
    double number(std::string_view name, double least, double most, double otherwise,
                  const char* sentence = nullptr) const {
        const Json* value = find(name);
        if (value == nullptr) return otherwise;
        if (value->kind != Json::Kind::number) wrong(name, "a number", *value);
        if (value->number >= least && value->number <= most) return value->number;
        out_of_range(name, sentence != nullptr
                               ? std::string(sentence)
                               : cat(name, " must be between ", Value(least).text, " and ",
                                     Value(most).text, " (got ", value->string, ")"));
    }
    std::int64_t whole(std::string_view name, std::int64_t least, std::int64_t most,
                       std::int64_t otherwise, const char* sentence = nullptr) const {
        const Json* value = find(name);
        if (value == nullptr) return otherwise;
        if (value->kind != Json::Kind::number ||
            value->string.find_first_of(".eE") != std::string::npos)
            wrong(name, "a whole number", *value);
        const std::string& text = value->string;
        std::int64_t n = 0;
        const auto result = std::from_chars(text.data(), text.data() + text.size(), n);
        if (result.ec == std::errc() && n >= least && n <= most) return n;
        out_of_range(name, sentence != nullptr ? std::string(sentence)
                                               : cat(name, " must be between ", least, " and ",
                                                     most, " (got ", text, ")"));
    }
    bool flag(std::string_view name) const {
        const Json* value = find(name);
        if (value != nullptr && value->kind != Json::Kind::boolean)
            wrong(name, "true or false", *value);
        return value != nullptr && value->boolean;
    }
    std::string text(std::string_view name) const {
        const Json* value = find(name);
        if (value != nullptr && value->kind != Json::Kind::string) wrong(name, "a string", *value);
        return value == nullptr ? "" : value->string;
    }
    int wrong_form() const { return wrong_form_; }

private:
    static const Json* find(const Json& object, std::string_view name) {
        const Json* value = object.find(name);
        return value == nullptr || value->kind == Json::Kind::null ? nullptr : value;
    }
    Json json_;
    int wrong_form_;
};

[[noreturn]] void not_supported(std::string_view name) {
    throw HttpError(400, "unsupported_parameter", cat(name, " is not supported"),
                    std::string(name));
}
// What would change the answer and is not supported must not be dropped in silence.
void refuse_unsupported(const Form& form) {
    const auto empty = [](const Json& v) {
        return v.array.empty() && v.object.empty() && v.string.empty() && !v.boolean;
    };
    for (const char* name : {"tools", "functions", "audio", "logit_bias", "suffix", "echo",
                             "logprobs", "prediction", "web_search_options"}) {
        if (const Json* v = form.find(name); v != nullptr && !empty(*v)) not_supported(name);
    }
    for (const char* name : {"presence_penalty", "frequency_penalty", "top_logprobs"}) {
        if (form.number(name, -1e9, 1e9, 0) != 0) not_supported(name);
    }
    for (const char* name : {"n", "best_of"}) {
        if (form.whole(name, 1, 128, 1) != 1) not_supported(name);
    }
    if (const Json* format = form.find("response_format")) {
        const Json* type = format->find("type");
        if (type == nullptr || type->string != "text") not_supported("response_format");
    }
    if (const Json* modalities = form.find("modalities")) {
        const auto text = [](const Json& v) { return v.string == "text"; };
        const auto& list = modalities->array;
        if (modalities->kind == Json::Kind::array ? !std::all_of(list.begin(), list.end(), text)
                                                  : !text(*modalities))
            not_supported("modalities");
    }
    for (const char* name : {"tool_choice", "function_call"}) {
        const Json* value = form.find(name);
        if (value != nullptr && value->string != "none" && value->string != "auto")
            not_supported(name);
    }
}

// ---- conversations

// A calculator's call as it was shown, or as nanochat shows it, is what it was again: special tokens,
// if the calculator agrees. Returns its length, 0 if there is none at the beginning of `text`.
std::size_t read_call(std::string_view text, std::string_view& expression, std::string& result) {
    const auto between = [&](std::string_view open, std::string_view middle,
                             std::string_view close) -> std::size_t {
        if (!text.starts_with(open)) return 0;
        // No expression has one of these in it: a text full of them is read once, not from each again.
        expression = text.substr(open.size());
        expression = expression.substr(0, expression.find_first_of("=<["));
        if (middle.starts_with(' ') && expression.ends_with(' ')) expression.remove_suffix(1);
        const std::string_view rest = text.substr(open.size() + expression.size());
        const auto value = rest.starts_with(middle) ? calculate(expression) : std::nullopt;
        if (!value || !rest.substr(middle.size()).starts_with(cat(*value, close))) return 0;
        result = *value;
        return open.size() + expression.size() + middle.size() + result.size() + close.size();
    };
    const std::size_t literal =
        between("<|python_start|>", "<|python_end|><|output_start|>", "<|output_end|>");
    const std::size_t shown = literal > 0 ? literal : between("[", " = ", "]");
    return shown + (literal == 0 && shown > 0 && text.substr(shown).starts_with(' ') ? 1 : 0);
}
std::vector<Token> encode_answer(const Tokenizer& tokenizer, std::string_view text) {
    std::vector<Token> ids;
    const auto add = [&](std::string_view part) {
        const std::vector<Token> more = tokenizer.encode(part);
        ids.insert(ids.end(), more.begin(), more.end());
    };
    std::size_t plain = 0;  // where text begins that is not yet in ids
    for (std::size_t at = text.find_first_of("[<"); at != text.npos;
         at = text.find_first_of("[<", at)) {
        std::string_view expression;
        std::string result;
        const std::size_t length = read_call(text.substr(at), expression, result);
        if (length == 0) {
            at++;
            continue;
        }
        add(text.substr(plain, at - plain));
        ids.push_back(tokenizer.special("<|python_start|>"));
        add(expression);
        ids.push_back(tokenizer.special("<|python_end|>"));
        ids.push_back(tokenizer.special("<|output_start|>"));
        add(result);
        ids.push_back(tokenizer.special("<|output_end|>"));
        plain = at += length;
    }
    add(text.substr(plain));
    return ids;
}

std::vector<Token> encode(const Tokenizer& tokenizer, const Message& m) {
    return m.role == Role::assistant ? encode_answer(tokenizer, m.content)
                                     : tokenizer.encode(m.content);
}

// As render_chat, but calculator calls in answers are read back, roles need not alternate (nanochat's
// page repeats a message whose answer failed), and an answer at the end is gone on with.
std::vector<Token> render(const Tokenizer& tokenizer, std::span<const Message> messages) {
    std::vector<Token> ids = {tokenizer.special("<|bos|>")};
    const auto add = [&](const char* before, const std::vector<Token>& text, const char* after) {
        ids.push_back(tokenizer.special(before));
        ids.insert(ids.end(), text.begin(), text.end());
        if (*after != '\0') ids.push_back(tokenizer.special(after));
    };
    std::string system;
    for (const Message& m : messages) {
        const bool last = &m == &messages.back();
        if (m.role == Role::system) {
            system += m.content + "\n\n";
        } else if (m.role == Role::user) {
            add("<|user_start|>", tokenizer.encode(std::exchange(system, "") + m.content),
                "<|user_end|>");
        } else {
            add("<|assistant_start|>", encode(tokenizer, m), last ? "" : "<|assistant_end|>");
        }
    }
    if (messages.back().role != Role::assistant)
        ids.push_back(tokenizer.special("<|assistant_start|>"));
    return ids;
}

Role read_role(const Form& form, const Json& message, std::size_t i) {
    const std::string param = cat("messages[", i, "].role");
    const Json& role = form.need(message, "role", param);
    if (role.kind != Json::Kind::string) form.wrong(param, "a string", role);
    const std::string& name = role.string;
    if (name == "user") return Role::user;
    if (name == "assistant") return Role::assistant;
    if (name == "system" || name == "developer") return Role::system;
    throw HttpError(
        400, "out_of_range",
        cat("Message ", i, " has invalid role. Must be 'user', 'assistant', or 'system'"), param);
}
std::string read_content(const Form& form, const Json& message, std::size_t i) {
    const std::string param = cat("messages[", i, "].content");
    const Json& content = form.need(message, "content", param);
    if (content.kind == Json::Kind::string) return content.string;
    const bool nanochat = form.wrong_form() == 422;  // which knows no parts
    if (content.kind != Json::Kind::array || nanochat)
        form.wrong(param, nanochat ? "a string" : "a string or an array of text parts", content);
    std::string text;
    for (const Json& part : content.array) {
        const Json* type = part.find("type");
        if (type == nullptr || type->string != "text") not_supported(param);
        const std::string of_part = param + ".text";
        const Json& words = form.need(part, "text", of_part);
        if (words.kind != Json::Kind::string) form.wrong(of_part, "a string", words);
        text += words.string;
    }
    return text;
}
std::size_t characters(std::string_view text) {
    return static_cast<std::size_t>(std::count_if(text.begin(), text.end(), [](char c) {
        return (static_cast<unsigned char>(c) & 0xc0) != 0x80;
    }));
}
// The texts of the errors are nanochat's (chat_web.py, validate_chat_request).
std::vector<Message> read_messages(const Form& form, bool nanochat) {
    const Json& list = form.need("messages");
    if (list.kind != Json::Kind::array) form.wrong("messages", "an array", list);
    const auto bad = [](const std::string& message) { Form::out_of_range("messages", message); };
    if (list.array.empty()) bad("At least one message is required");
    if (list.array.size() > 500) bad("Too many messages. Maximum 500 messages allowed per request");
    std::vector<Message> messages;
    std::size_t total = 0;
    for (std::size_t i = 0; i < list.array.size(); i++) {
        const Json& message = list.array[i];
        if (message.kind != Json::Kind::object)
            form.wrong(cat("messages[", i, "]"), "a JSON object", message);
        const Role role = read_role(form, message, i);
        messages.push_back({role, read_content(form, message, i)});
        if (!nanochat) continue;
        const std::size_t n = characters(messages.back().content);
        if (n == 0) bad(cat("Message ", i, " has empty content"));
        if (n > 8000)
            bad(cat("Message ", i, " is too long. Maximum 8000 characters allowed per message"));
        total += n;
    }
    if (total > 32000) bad("Total conversation is too long. Maximum 32000 characters allowed");
    const auto spoken = [](const Message& m) { return m.role != Role::system; };
    if (std::none_of(messages.begin(), messages.end(), spoken) ||
        messages.back().role == Role::system)
        bad("the last message must be the user's or the assistant's");
    return messages;
}

// Leaves out the oldest exchanges while less than a quarter of the context (or max_tokens, if fewer)
// would remain for the answer, as Chat does. Returns how many messages went.
int drop_oldest(const Tokenizer& tokenizer, std::vector<Message>& messages, std::vector<Token>& ids,
                std::size_t S, std::size_t max_tokens) {
    const std::size_t most = S - std::min(max_tokens, S / 4);
    constexpr std::size_t kDoubt = 8;  // a message alone may have some tokens more or fewer
    int dropped = 0;
    while (ids.size() > most) {
        const auto first = std::find_if(messages.begin(), messages.end(),
                                        [](const Message& m) { return m.role != Role::system; });
        auto next = first;
        // Rendered again only when enough has gone: after each of hundreds it took hundreds of times.
        for (std::size_t left = ids.size(); left > most + kDoubt || next == first;) {
            const auto user = std::find_if(next + (next != messages.end()), messages.end(),
                                           [](const Message& m) { return m.role == Role::user; });
            if (user == messages.end()) break;
            for (; next != user; ++next)
                left -= std::min(left, 2 + encode(tokenizer, *next).size());
        }
        if (next == first) break;
        dropped += static_cast<int>(next - first);
        messages.erase(first, next);
        ids = render(tokenizer, messages);
    }
    return dropped;
}

std::size_t longest_token(const Tokenizer& tokenizer) {
    std::size_t longest = 1;
    for (Token id = 0; id < tokenizer.vocab_size(); id++) {
        try {
            longest = std::max(longest, tokenizer.piece(id).size());
        } catch (const Error&) {  // a rank that training left out
        }
    }
    return longest;
}
// A prompt has to leave room for an answer.
void need_room(const Offer& offer, std::string_view param, std::size_t tokens,
               std::string_view least = "") {
    const auto S = static_cast<std::size_t>(offer.info.config.sequence_len);
    if (tokens < S) return;
    throw HttpError(400, "context_length_exceeded",
                    cat("the prompt has ", least, tokens, " tokens, the context of ", S,
                        " has to hold an answer too"),
                    std::string(param));
}
// Before it is encoded, which would hold up all connections: its bytes alone may be too many.
void need_room_for_bytes(const Offer& offer, std::string_view param, std::size_t bytes) {
    need_room(offer, param, bytes / offer.longest_token, "at least ");
}
void need_room_for(const Offer& offer, std::span<const Message> messages) {
    std::size_t bytes = 0;
    for (const Message& m : messages) bytes += m.content.size();
    need_room_for_bytes(offer, "messages", bytes);
}

// ---- the server

enum class Style { nanochat, chat, completion, why, walk };
struct Exchange : Job {  // a job with how its answer is told
    Style style = Style::chat;
    bool streams = false, head_sent = false, include_usage = false;
    std::string answer_id, fingerprint, text;
    std::vector<Token> answer_tokens;  // why
    std::string last_comment;
    int position = 0, dropped_messages = 0;
    std::int64_t created_unix = std::time(nullptr);
    Clock::time_point last_event = Clock::now();
};

class Server final : public HttpServer {
public:
    explicit Server(Options& o);
    int run(int signals);

private:
    struct Route {
        std::string_view method, path;
        bool prefix, needs_key;
        void (Server::*run)(Connection&);
    };
    static std::span<const Route> routes();

    void check(Connection& c) override;
    void answer(Connection& c) override;
    void refuse(Connection& c, const std::exception& e) override;
    void gone(Connection& c) override;
    void answered(Connection& c) override;
    void woken() override;
    bool hurried() const override { return scheduler_->hurried(); }
    void pass(Connection& c) override;
    bool go_on() override;
    void begin_drain(int exit_code, const char* why);
    void other_event() override;
    Fields common_fields(const Connection& c) override;

    bool host_allowed(const Connection& c) const;
    void check_origin(const Connection& c) const;
    void check_key(const Request& r) const;
    const Route* route_of(const Request& r) const;
    void name_request(Connection& c) {
        c.request_id = cat("r-", hex(static_cast<std::uint32_t>(++next_request_), 4));
    }

    void send_json(Connection& c, const Value& value, int status = 200) {
        respond(c, status, kJson, value.text + "\n");
    }
    void page(Connection& c);
    void icon(Connection& c);
    void models(Connection& c);
    void one_model(Connection& c);
    void nanochat(Connection& c);
    void health(Connection& c);
    void stats(Connection& c);
    void openai_models(Connection& c);
    void openai_model(Connection& c);
    void chat_completion(Connection& c);
    void completion(Connection& c);
    void tokenize(Connection& c);
    void detokenize(Connection& c);
    void why(Connection& c);
    void walk(Connection& c);
    void walk_picture(Connection& c);
    void metrics(Connection& c);
    void slots(Connection& c);
    void props(Connection& c);

    bool refresh(double most_age);
    void take_catalog();
    void answer_models(Connection& c);
    const ModelInfo& find_model(const std::string& id) const;
    std::shared_ptr<const Tokenizer> tokenizer_of(const ModelInfo& info);
    std::shared_ptr<const Offer> offer_of(const std::string& id);
    std::shared_ptr<Exchange> new_exchange(const Connection& c, const Form& form, Style style);
    void submit(Connection& c, std::shared_ptr<Exchange> x, std::int64_t max_tokens);

    void begin_events(Connection& c, Exchange& x);
    void tell_text(Connection& c, Exchange& x, const std::string& text);
    void tell_end(Connection& c, Exchange& x);
    void tell_failure(Connection& c, const Exchange& x, const Failure& f);
    void send_whole(Connection& c, Exchange& x);

    Options& options_;
    std::vector<std::string> keys_, hosts_;
    std::string nonce_, page_, etag_, fingerprint_;
    std::shared_ptr<const Catalog> catalog_, fresh_;
    std::mutex fresh_mutex_;  // guards fresh_
    bool scanning_ = false;
    std::vector<std::uint64_t> parked_;  // connections that wait for a scan
    std::vector<
        std::pair<std::pair<fs::path, fs::file_time_type>, std::shared_ptr<const Tokenizer>>>
        tokenizers_;
    std::unordered_map<std::string, std::shared_ptr<const Offer>> offers_;
    std::deque<std::shared_ptr<const WalkTask>>
        walks_;  // whose pictures can be had; last made last
    std::unordered_map<std::string, std::size_t> jobs_of_;  // by client
    std::size_t live_jobs_ = 0;
    std::uint64_t next_request_ = 0;
    std::map<std::string, std::uint64_t> counts_, rejected_;  // by labels; by code
    Clock::time_point start_ = Clock::now(), drain_end_ = {};
    bool draining_ = false;
    int signals_ = -1, exit_code_ = 0;
    std::size_t slots_ = 8;
    std::unique_ptr<Scheduler> scheduler_;
    Background scanner_;
};

// clang-format off
std::span<const Server::Route> Server::routes() {
    static constexpr Route kRoutes[] = {
        {"GET", "/", false, false, &Server::page},
        {"GET", "/inference", false, false, &Server::page},
        {"GET", "/favicon.ico", false, false, &Server::icon},
        {"GET", "/logo.svg", false, false, &Server::icon},
        {"GET", "/health", false, false, &Server::health},
        {"GET", "/stats", false, false, &Server::stats},
        {"GET", "/metrics", false, true, &Server::metrics},
        {"GET", "/slots", false, true, &Server::slots},
        {"GET", "/props", false, true, &Server::props},
        {"GET", "/api/v1/inference/models", false, true, &Server::models},
        {"GET", "/api/v1/inference/models/", true, true, &Server::one_model},
        {"GET", "/v1/models", false, true, &Server::openai_models},
        {"GET", "/v1/models/", true, true, &Server::openai_model},
        {"POST", "/chat/completions", false, true, &Server::nanochat},
        {"POST", "/v1/chat/completions", false, true, &Server::chat_completion},
        {"POST", "/v1/completions", false, true, &Server::completion},
        {"POST", "/api/v1/inference/tokenize", false, true, &Server::tokenize},
        {"POST", "/api/v1/inference/detokenize", false, true, &Server::detokenize},
        {"POST", "/api/v1/inference/why", false, true, &Server::why},
        {"POST", "/api/v1/inference/walk", false, true, &Server::walk},
        {"GET", "/api/v1/inference/walk/", true, false, &Server::walk_picture},  // the address is the key
    };
    return kRoutes;
}
// clang-format on

std::string random_hex(std::size_t digits) {
    std::string text;
    while (text.size() < digits) {
        std::uint32_t random = 0;
        if (::getentropy(&random, sizeof random) != 0) fail_errno<std::runtime_error>("getentropy");
        text += hex(random, 8);
    }
    return text.substr(0, digits);
}

// ---- who may ask

// A name in Host that is not ours means a web page has pointed its own name here (DNS rebinding).
bool Server::host_allowed(const Connection& c) const {
    std::string name = lower(c.request().get("host"));
    const std::size_t port = name.find_last_of(':');
    if (port != name.npos && name.find(']', port) == name.npos) name.resize(port);
    if (name.starts_with('[') && name.ends_with(']')) name = name.substr(1, name.size() - 2);
    const bool loopback =
        name == "localhost" || name == "::1" ||
        (name.starts_with("127.") && name.find_first_not_of("0123456789.") == name.npos);
    return loopback || name == c.local || has(hosts_, name);
}
void Server::check_origin(const Connection& c) const {
    const Request& r = c.request();
    const std::string* origin = r.find("origin");
    if (origin != nullptr) {
        const std::string host = lower(r.get("host"));
        const bool own = *origin == "http://" + host || *origin == "https://" + host;
        if (own || has(options_.allow_origins, *origin)) return;
    }
    const bool link = r.method != "POST" && r.get("sec-fetch-mode") == "navigate";
    if (origin == nullptr && (link || r.get("sec-fetch-site") != "cross-site")) return;
    throw HttpError(403, "origin_not_allowed",
                    "this web page may not use the server; --allow-origin names those that may");
}
void Server::check_key(const Request& r) const {
    if (keys_.empty()) return;
    const std::string field = r.get("authorization");
    const std::string_view given =
        lower(field.substr(0, 7)) == "bearer " ? trim(std::string_view(field).substr(7)) : "";
    bool good = false;
    for (const std::string& key : keys_) {  // in a time that tells nothing of the key
        unsigned difference = key.size() != given.size();
        for (std::size_t i = 0; i < key.size(); i++) {
            const char other = given.empty() ? '\0' : given[i % given.size()];
            difference |= static_cast<unsigned char>(key[i] ^ other);
        }
        good |= difference == 0;
    }
    if (!good)
        throw HttpError(401, "invalid_api_key",
                        "the server was started with a key; send it as "
                        "Authorization: Bearer KEY");
}

const Server::Route* Server::route_of(const Request& r) const {
    const std::string_view method = r.method == "HEAD" ? "GET" : std::string_view(r.method);
    std::vector<std::string_view> others;
    for (const Route& route : routes()) {
        const bool fits = route.prefix ? r.path.starts_with(route.path) && r.path != route.path
                                       : r.path == route.path;
        if (fits && route.method == method) return &route;
        if (fits) others.push_back(route.method == "GET" ? "GET, HEAD" : route.method);
    }
    if (others.empty())
        throw HttpError(404, "no_such_route", cat("there is no ", detail::quote(r.path), " here"));
    if (r.method == "OPTIONS") return nullptr;
    throw HttpError(405, "method_not_allowed",
                    cat(r.path, " takes ", join(others, ", "), ", not ", r.method),
                    std::string(others[0]));
}

void Server::check(Connection& c) {
    const Request& r = c.request();
    name_request(c);
    c.client = c.peer;
    const std::string* forwarded = r.find("x-forwarded-for");
    if (forwarded != nullptr && from_proxy(c.peer))
        c.client = trim(std::string_view(*forwarded).substr(forwarded->find_last_of(',') + 1));
    if (!host_allowed(c))
        throw HttpError(403, "host_not_allowed",
                        "the server is not known by this name; --allow-host NAME makes it so");
    check_origin(c);
    const Route* route = route_of(r);
    if (route == nullptr) return;  // a browser that asks before it posts
    if (route->needs_key) check_key(r);
    const std::string type = lower(r.get("content-type"));
    if (r.method == "POST" && trim(type.substr(0, type.find(';'))) != kJson)
        throw HttpError(415, "unsupported_media_type", "Content-Type must be application/json");
}

Fields Server::common_fields(const Connection& c) {
    const std::string* origin = c.request().find("origin");
    const auto& allowed = options_.allow_origins;
    if (allowed.empty()) return {};
    Fields fields = {{"Vary", "Origin"}};
    if (origin != nullptr && has(allowed, *origin))
        fields.push_back({"Access-Control-Allow-Origin", *origin});
    return fields;
}

void Server::answer(Connection& c) {
    const Route* route = route_of(c.request());
    if (route != nullptr) return (this->*route->run)(c);
    respond(c, 204, "", "",
            {{"Access-Control-Allow-Methods", "GET, POST"},
             {"Access-Control-Allow-Headers", "Content-Type, Authorization"},
             {"Access-Control-Max-Age", "600"}});
}

Members error_members(int status, std::string_view code, std::string_view message,
                      std::string_view param = "") {
    const std::string shown = safe(message.substr(0, 400));
    return {{"error", object({{"message", shown},
                              {"type", http_status(status).error_type},
                              {"param", or_null(param)},
                              {"code", code}})},
            {"detail", shown}};
}
HttpError as_http(const std::exception& e) {
    if (const auto* http = dynamic_cast<const HttpError*>(&e)) return *http;
    if (const auto* error = dynamic_cast<const Error*>(&e)) {
        if (error->kind == ErrorKind::usage) return {400, "out_of_range", e.what()};
        if (error->kind == ErrorKind::not_found) return {404, "model_not_found", e.what()};
        if (error->kind != ErrorKind::device && error->kind != ErrorKind::out_of_memory)
            return {409, "model_not_ready", e.what()};
    }
    if (dynamic_cast<const std::bad_alloc*>(&e) != nullptr ||
        dynamic_cast<const Error*>(&e) != nullptr)
        return {503, "out_of_memory", "not enough memory for this request now"};
    return {500, "internal", "the server made a mistake; its log says which"};
}
void Server::refuse(Connection& c, const std::exception& e) {
    const HttpError error = as_http(e);
    if (error.status == 500) say(cat("error: ", e.what()), kRed);
    if (c.request_id.empty()) name_request(c);
    Fields more;
    std::string param = error.param;
    if (error.status == 405) more.push_back({"Allow", std::exchange(param, "")});
    if (error.status == 401) more.push_back({"WWW-Authenticate", "Bearer"});
    if (error.status == 429 || error.status == 503) more.push_back({"Retry-After", "5"});
    Members members = error_members(error.status, error.code, error.what(), param);
    members.emplace_back("request_id", c.request_id);
    respond(c, error.status, kJson, object(members).text + "\n", more);
}

// ---- the page

void Server::page(Connection& c) {
    if (c.request().get("if-none-match") == etag_)
        return respond(c, 304, "", "", {{"ETag", etag_}});
    const std::string nonce = cat("'nonce-", nonce_, "'");
    respond(c, 200, "text/html; charset=utf-8", page_,
            {{"ETag", etag_},
             {"Cache-Control", "no-cache"},
             {"Content-Security-Policy",
              cat("default-src 'none'; script-src ", nonce, "; style-src ", nonce,
                  "; connect-src 'self'; img-src 'self' data: blob:; base-uri 'none'; "
                  "form-action 'none'; frame-ancestors 'none'")},
             {"X-Content-Type-Options", "nosniff"},
             {"Referrer-Policy", "no-referrer"},
             {"Cross-Origin-Opener-Policy", "same-origin"},
             {"Cross-Origin-Resource-Policy", "same-origin"}});
}
void Server::icon(Connection& c) {
    respond(c, 200, "image/svg+xml",
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 32 32\"><rect width=\"32\" "
            "height=\"32\" rx=\"8\" fill=\"#0f766e\"/><path d=\"M9 23V9l14 14V9\" fill=\"none\" "
            "stroke=\"#fff\" stroke-width=\"3\" stroke-linejoin=\"round\"/></svg>\n",
            {{"Cache-Control", "max-age=86400"}, {"X-Content-Type-Options", "nosniff"}});
}

// ---- checkpoints

// The bundled sample stands in as long as nothing else is found and nothing else was asked for.
std::shared_ptr<const Catalog> look_around(const Options& o, const Catalog* before) {
    auto c = std::make_shared<Catalog>();
    if (is_path(o.model)) {
        c->models = {inspect_model(o.model, o.step, o.overrides)};
        c->base = c->models[0].model_file.parent_path();
        c->tokens.vocab_size = c->models[0].config.vocab_size;
        c->default_id = c->models[0].id;
        return c;
    }
    const auto look_in = [&](const fs::path& base) {
        c->base = base;
        std::error_code error;
        c->tokenizer_time = fs::last_write_time(c->base / "tokenizer" / "tokenizer.pkl", error);
        const bool same = before != nullptr && before->base == c->base &&
                          before->tokenizer_time == c->tokenizer_time;
        c->tokens = same ? before->tokens : base_tokenizer(c->base);
        c->models = models_in(c->base, o, &c->tokens, before == nullptr);
    };
    look_in(base_dir(o.base_dir));
    const Wanted w = wanted(o);
    const bool named = !w.source.empty() || !w.tag.empty() || w.step >= 0;
    const fs::path sample = o.base_dir.empty() && !named ? bundled_sample() : fs::path();
    if (c->models.empty() && !sample.empty()) {
        if (before == nullptr) tell_sample(c->base);
        look_in(sample);
    }
    try {
        if (c->models.empty()) no_checkpoints(c->base);
        c->default_id = choose(c->models, w, "sft").id;
    } catch (const Error& e) {  // one may come while the server runs
        if (before == nullptr && named) throw;
        if (before == nullptr) note(e.what());
        c->default_id = default_of(c->models);
    }
    return c;
}

// Looks again if the last look is older than so many seconds; true if a look is under way.
bool Server::refresh(double most_age) {
    if (scanning_ || seconds_since(catalog_->time) < most_age) return scanning_;
    scanning_ = true;
    scanner_.post([this, before = catalog_] {
        std::shared_ptr<const Catalog> fresh = before;
        try {
            fresh = look_around(options_, before.get());
        } catch (const std::exception&) {  // as it was
        }
        const std::lock_guard lock(fresh_mutex_);
        fresh_ = std::move(fresh);
        wake();
    });
    return true;
}
void Server::take_catalog() {
    {
        const std::lock_guard lock(fresh_mutex_);
        if (fresh_ == nullptr) return;
        catalog_ = std::exchange(fresh_, nullptr);
    }
    scanning_ = false;
    offers_.clear();
    for (const std::uint64_t id : std::exchange(parked_, {})) {
        Connection* c = find(id);
        if (c == nullptr) continue;
        answer_models(*c);
        move_on(*c);
    }
}
void Server::models(Connection& c) {
    if (!refresh(c.request().query.find("refresh=1") != std::string::npos ? 0 : 2))
        return answer_models(c);
    parked_.push_back(c.id);
}
void Server::answer_models(Connection& c) {
    const Snapshot now = scheduler_->snapshot();
    std::string type = c.request().query;
    const std::size_t at = type.find("type=");
    type = at == type.npos ? "" : lower(type.substr(at + 5, type.find('&', at) - at - 5));
    std::vector<ModelInfo const*> shown;
    for (const ModelInfo& m : catalog_->models) {
        if (type.empty() || m.source == type) shown.push_back(&m);
    }
    const auto loaded = [&](const std::string& id) { return now.has(id); };
    send_json(c, models_json(options_, *catalog_, shown, loaded));
}
void Server::one_model(Connection& c) {
    const ModelInfo& m = find_model(c.request().path.substr(25));
    send_json(c, merged(object(detail_members(m, catalog_->base, place_for(options_))),
                        among_others(m, *catalog_, scheduler_->snapshot().has(m.id))));
}

const ModelInfo& Server::find_model(const std::string& id) const {
    Wanted w;
    try {
        w = parse_id(id.empty() ? "default" : id);
    } catch (const Error&) {
        w.tag = id;  // which is then not found
        w.any_source = true;
    }
    const bool any = w.source.empty() && w.tag.empty() && w.step < 0;
    if (any && catalog_->default_id.empty())
        throw HttpError(404, "model_not_found", "there is no checkpoint that is ready");
    if (any) w = parse_id(catalog_->default_id);
    try {
        return choose(catalog_->models, w, "sft");
    } catch (const Error& e) {
        HttpError error = as_http(e);
        const std::string_view what = e.what();  // without the flag's name
        throw HttpError(error.status, error.code,
                        std::string(what.substr(what.starts_with("--model: ") ? 9 : 0)), "model");
    }
}
std::shared_ptr<const Tokenizer> Server::tokenizer_of(const ModelInfo& info) {
    const fs::path path =
        options_.tokenizer.empty() ? find_tokenizer(info) : fs::path(options_.tokenizer);
    std::error_code error;
    const std::pair key(path, fs::last_write_time(path, error));
    for (const auto& [known, tokenizer] : tokenizers_) {
        if (known == key) return tokenizer;
    }
    auto tokenizer = std::make_shared<const Tokenizer>(load_tokenizer(path));
    if (tokenizers_.size() >= 8) tokenizers_.erase(tokenizers_.begin());
    tokenizers_.emplace_back(key, tokenizer);
    return tokenizer;
}
std::shared_ptr<const Offer> Server::offer_of(const std::string& id) {
    const ModelInfo& info = find_model(id);
    std::shared_ptr<const Offer>& offer = offers_[info.id];
    if (offer != nullptr) return offer;
    const auto tokenizer = tokenizer_of(info);
    if (tokenizer->vocab_size() != info.config.vocab_size)
        throw HttpError(409, "model_not_ready", cat(info.id, ": its tokenizer does not fit"));
    return offer = std::make_shared<const Offer>(Offer{info, tokenizer, longest_token(*tokenizer)});
}

// ---- requests for answers

std::vector<std::string> read_stop(const Form& form) {
    const Json* stop = form.find("stop");
    if (stop == nullptr) return {};
    const bool many = stop->kind == Json::Kind::array;
    const auto list = many ? std::span<const Json>(stop->array) : std::span(stop, 1);
    if (list.size() > 4) Form::out_of_range("stop", "at most 4 stop texts");
    std::vector<std::string> texts;
    for (const Json& text : list) {
        if (text.kind != Json::Kind::string) form.wrong("stop", "a string or strings", text);
        if (text.string.empty() || text.string.size() > 64)
            Form::out_of_range("stop", "a stop text must have 1 to 64 bytes");
        texts.push_back(text.string);
    }
    return texts;
}

std::shared_ptr<Exchange> Server::new_exchange(const Connection& c, const Form& form, Style style) {
    const bool nanochat = style == Style::nanochat;
    auto x = std::make_shared<Exchange>();
    x->style = style;
    x->connection = c.id;
    x->id = next_request_;
    // The page's, per tab. Anybody can make one up: it takes turns within its address, no more.
    const std::string tab = c.request().get("x-client-id").substr(0, 64);
    x->client = tab.empty() ? c.client : cat(c.client, " ", tab);
    x->offer = offer_of(form.text("model"));
    x->literal_tools = nanochat;
    x->chat = style != Style::completion;
    SamplingParams& s = x->params.sampling;
    const SamplingParams& d = options_.sampling;
    s.temperature = static_cast<float>(
        form.number("temperature", 0, 2, double{d.temperature},
                    nanochat ? "Temperature must be between 0.0 and 2.0" : nullptr));
    s.top_k = static_cast<int>(
        form.whole("top_k", 0, nanochat ? 200 : x->offer->info.config.vocab_size, d.top_k,
                   nanochat ? "top_k must be between 0 and 200" : nullptr));
    s.top_p = static_cast<float>(form.number("top_p", 1e-6, 1, double{d.top_p}));
    Options given;
    const std::int64_t seed = form.whole("seed", -1, std::numeric_limits<std::int64_t>::max(), -1);
    set_seed(given, {"seed", std::to_string(seed)});  // -1: a random one
    s.seed = given.sampling.seed;
    x->stop_texts = read_stop(form);
    x->params.stop = chat_stop_tokens(*x->offer->tokenizer);
    if (style == Style::chat || style == Style::completion) {
        x->answer_id = (x->chat ? "chatcmpl-" : "cmpl-") + random_hex(24);
        x->fingerprint = fingerprint_;
        x->streams = form.flag("stream");
        if (const Json* options = form.find("stream_options"))
            x->include_usage = Form(*options, 400, "stream_options").flag("include_usage");
    }
    return x;
}

std::int64_t read_max_tokens(const Form& form, int otherwise, bool nanochat) {
    const char* sentence = nanochat ? "max_tokens must be between 1 and 4096" : nullptr;
    const char* name =
        form.find("max_completion_tokens") != nullptr ? "max_completion_tokens" : "max_tokens";
    return form.whole(name, 1, 4096, otherwise, sentence);
}
Form read_body(const Connection& c, int wrong_form = 400) {
    try {
        return Form(parse_json(c.request().body), wrong_form);
    } catch (const Error& e) {
        throw HttpError(wrong_form, "invalid_json", e.what());
    }
}

std::vector<Token> read_ids(const Form& form, std::string_view name, int end,
                            std::string_view one = "a token id") {
    const Json& list = form.need(name);
    const std::string wanted = cat(name == "prompt" ? "a string or " : "", "an array of numbers");
    if (list.kind != Json::Kind::array) form.wrong(name, wanted, list);
    for (const Json& id : list.array) {
        if (id.kind != Json::Kind::number) form.wrong(name, wanted, id);
    }
    try {
        return parse_ids(name, list, end, one);
    } catch (const Error& e) {
        Form::out_of_range(name, e.what());
    }
}

void Server::submit(Connection& c, std::shared_ptr<Exchange> x, std::int64_t max_tokens) {
    const auto S = static_cast<std::size_t>(x->offer->info.config.sequence_len);
    need_room(*x->offer, x->style == Style::completion ? "prompt" : "messages", x->prompt.size());
    const auto room = static_cast<std::int64_t>(S - x->prompt.size());
    x->params.max_tokens = static_cast<int>(std::min(max_tokens, room));
    x->clipped = room < max_tokens;
    const auto reject = [&](int status, const char* code, const char* message) {
        rejected_[code]++;
        throw HttpError(status, code, message);
    };
    if (draining_) reject(503, "draining", "the server is stopping");
    std::size_t& of_client = jobs_of_[c.client];
    constexpr int kMost = Scheduler::kRunningPerClient + Scheduler::kWaitingPerClient;
    if (of_client >= kMost)
        reject(429, "too_many_requests", "16 answers and 32 waiting are the most for one client");
    if (live_jobs_ >= slots_ + static_cast<std::size_t>(options_.queue))
        reject(503, "queue_full", "too many are waiting already");
    of_client++, live_jobs_++;
    x->owner = c.client;
    if (options_.log_content)
        say(cat(c.request_id, " prompt: ", to_utf8(x->offer->tokenizer->decode(x->prompt))));
    c.job = x;
    scheduler_->submit(std::move(x));
}

void Server::nanochat(Connection& c) {
    const Form form = read_body(c, 422);
    std::vector<Message> messages = read_messages(form, true);
    auto x = new_exchange(c, form, Style::nanochat);
    const std::int64_t most = read_max_tokens(form, options_.max_tokens, true);
    x->streams = true;
    x->prompt = render(*x->offer->tokenizer, messages);
    x->dropped_messages = drop_oldest(*x->offer->tokenizer, messages, x->prompt,
                                      static_cast<std::size_t>(x->offer->info.config.sequence_len),
                                      static_cast<std::size_t>(most));
    submit(c, std::move(x), most);
}
void Server::chat_completion(Connection& c) {
    const Form form = read_body(c);
    refuse_unsupported(form);
    const std::vector<Message> messages = read_messages(form, false);
    auto x = new_exchange(c, form, Style::chat);
    need_room_for(*x->offer, messages);
    x->prompt = render(*x->offer->tokenizer, messages);
    submit(c, std::move(x), read_max_tokens(form, options_.max_tokens, false));
}
void Server::completion(Connection& c) {
    const Form form = read_body(c);
    refuse_unsupported(form);
    const Json& prompt = form.need("prompt");
    auto x = new_exchange(c, form, Style::completion);
    const Tokenizer& tokenizer = *x->offer->tokenizer;
    need_room_for_bytes(*x->offer, "prompt", prompt.string.size());
    need_room(*x->offer, "prompt", prompt.array.size());
    const std::vector<Token> ids = prompt.kind == Json::Kind::string
                                       ? tokenizer.encode(prompt.string)
                                       : read_ids(form, "prompt", tokenizer.vocab_size());
    x->prompt = {tokenizer.special("<|bos|>")};
    x->prompt.insert(x->prompt.end(), ids.begin(), ids.end());
    x->params.stop = special_tokens(tokenizer);
    submit(c, std::move(x), read_max_tokens(form, options_.max_tokens, false));
}
// What else could have stood at one place of an answer.
void Server::why(Connection& c) {
    const Form form = read_body(c);
    std::vector<Message> messages = read_messages(form, false);
    if (messages.back().role != Role::assistant)
        Form::out_of_range("messages", "the last message must be the assistant's");
    auto x = new_exchange(c, form, Style::why);
    const Tokenizer& tokenizer = *x->offer->tokenizer;
    need_room_for(*x->offer, std::span(messages).last(1));
    x->answer_tokens = encode_answer(tokenizer, messages.back().content);
    need_room(*x->offer, "messages", x->answer_tokens.size());
    x->answer_tokens.push_back(tokenizer.special("<|assistant_end|>"));
    const std::int64_t n = std::ssize(x->answer_tokens);
    x->position = static_cast<int>(form.whole("position", 0, n - 1, -1));
    if (x->position < 0) return tell_end(c, *x);
    need_room_for(*x->offer, messages);
    x->prompt = render(tokenizer, messages);
    x->prompt.resize(x->prompt.size() - static_cast<std::size_t>(n - 1 - x->position));
    x->chosen.token = x->answer_tokens[static_cast<std::size_t>(x->position)];
    x->candidates_only = true;
    submit(c, std::move(x), 1);
}

// The layers of which every head is shown: some, for every map goes out in numbers too.
std::vector<int> read_layers(const Form& form, const Config& c, std::size_t T) {
    if (form.find("layers") == nullptr) return {c.n_layer / 2};
    std::vector<int> layers = read_ids(form, "layers", c.n_layer, "a layer");
    std::sort(layers.begin(), layers.end());
    layers.erase(std::unique(layers.begin(), layers.end()), layers.end());
    constexpr std::size_t kMost = 1'000'000;
    if (layers.empty()) Form::out_of_range("layers", "layers must name one at least");
    if (layers.size() * static_cast<std::size_t>(c.n_head) * T * T > kMost)
        Form::out_of_range(
            "layers", cat("layers: the maps of ", layers.size(), " layers are more than ", kMost,
                          " numbers; ask for fewer"));
    return layers;
}
void Server::walk(Connection& c) {
    const Form form = read_body(c);
    form.need("prompt");
    auto x = new_exchange(c, form, Style::walk);
    const Config& config = x->offer->info.config;
    x->walk = std::make_shared<WalkTask>();
    x->walk->key = random_hex(32);
    WalkPlan& plan = x->walk->plan;
    try {
        plan = plan_walk(*x->offer->tokenizer, config, form.text("prompt"), kMostLabelled);
    } catch (const Error& e) {
        Form::out_of_range("prompt", e.what());
    }
    plan.layers = read_layers(form, config, plan.prompt.size());
    plan.top = static_cast<int>(form.whole("top", 1, 100, 10));
    plan.runs = 1;
    plan.sampling = x->params.sampling;
    if (form.find("temperature") == nullptr) plan.sampling.temperature = 0;
    x->prompt = plan.prompt;
    submit(c, std::move(x), 1);
}
void Server::walk_picture(Connection& c) {
    const std::string_view path = c.request().path, prefix = "/api/v1/inference/walk/";
    for (const auto& walk : walks_) {
        for (const auto& [name, png] : walk->pictures) {
            if (path != cat(prefix, walk->key, "/", name)) continue;
            return respond(c, 200, "image/png", png,
                           {{"Cache-Control", "private, max-age=3600, immutable"},
                            {"X-Content-Type-Options", "nosniff"}});
        }
    }
    throw HttpError(404, "no_such_route", "this picture is not kept any more: walk again");
}

// ---- answers

Value with_probability(const Tokenizer& tokenizer, const Candidate& candidate) {
    return merged(token_json(tokenizer, candidate.token),
                  object({{"probability", candidate.probability}}));
}

std::string comment(const Event& e) {  // for who waits
    const bool queued = e.kind == Event::Kind::queued, loading = e.kind == Event::Kind::loading;
    return cat(queued ? ": queued " : loading ? ": loading " : ": reading ", e.number, "\n\n");
}
void Server::woken() {
    take_catalog();
    std::vector<std::uint64_t> touched;
    for (Event& event : scheduler_->take_events()) {
        auto& x = static_cast<Exchange&>(*event.job);
        Connection* c = find(x.connection);
        if (c != nullptr && c->job != event.job) c = nullptr;  // it went on without the answer
        if (event.kind == Event::Kind::done) {
            if (--jobs_of_[x.owner] == 0) jobs_of_.erase(x.owner);
            live_jobs_--;
        }
        if (c == nullptr) continue;
        if (event.kind == Event::Kind::text) {
            tell_text(*c, x, event.text);
        } else if (event.kind == Event::Kind::done) {
            x.failure ? tell_failure(*c, x, *x.failure) : tell_end(*c, x);
        } else if (std::string line = comment(event); x.streams && x.last_comment != line) {
            begin_events(*c, x);
            stream(*c, x.last_comment = std::move(line));
        }
        if (!has(touched, c->id)) touched.push_back(c->id);
    }
    for (const std::uint64_t id : touched) {
        Connection* c = find(id);
        if (c == nullptr) continue;
        if (c->job != nullptr && c->out.size() > Limits::kBuffered) c->job->paused = true;
        move_on(*c);
    }
}

// Some 4 times a second for every answer that is being made.
void Server::pass(Connection& c) {
    if (c.job == nullptr) return;
    auto& x = static_cast<Exchange&>(*c.job);
    if (x.paused && c.out.size() < Limits::kBuffered / 2) {
        x.paused = false;
        scheduler_->poke();
    }
    if (x.streams && seconds_since(x.last_event) > Limits::kPing) {
        begin_events(c, x);
        stream(c, ": ping\n\n");
        move_on(c);
    }
}

Value usage_of(const Exchange& x) {
    const Answer& a = x.answer;
    const Value details = object({{"cached_tokens", x.reused_tokens}});
    return merged(usage_json(a.prompt_tokens, a.completion_tokens),
                  object({{"prompt_tokens_details", details}}));
}
Members answer_members(const Exchange& x, const char* chat, const Value& choices) {
    return {{"id", x.answer_id},
            {"object", x.style == Style::chat ? chat : "text_completion"},
            {"created", x.created_unix},
            {"model", x.offer->info.id},
            {"system_fingerprint", x.fingerprint},
            {"choices", choices}};
}
std::string chunk(const Exchange& x, const Value& choices, const Value& usage) {
    Members members = answer_members(x, "chat.completion.chunk", choices);
    if (x.include_usage) members.emplace_back("usage", usage);
    return cat("data: ", object(members).text, "\n\n");
}
// The only one of `choices`; of a chat `part` is "delta" or "message", and `said` what is in it.
Value choices_json(const Exchange& x, std::string_view part, const Members& said,
                   std::string_view text, const Value& finish) {
    const bool chat = x.style == Style::chat;
    return array(std::array{object({{"index", 0},
                                    {chat ? part : "text", chat ? object(said) : Value(text)},
                                    {"logprobs", nullptr},
                                    {"finish_reason", finish}})});
}

void Server::begin_events(Connection& c, Exchange& x) {
    x.last_event = Clock::now();
    if (std::exchange(x.head_sent, true)) return;
    begin_stream(c, kEvents, {{"Cache-Control", "no-store"}, {"X-Accel-Buffering", "no"}});
    const Members begins = {{"role", "assistant"}, {"content", ""}};
    if (x.style == Style::chat)
        stream(c, chunk(x, choices_json(x, "delta", begins, "", nullptr), nullptr));
}
// As Python writes JSON: some of nanochat's clients look for "done": true, with the space.
std::string spaced(const Value& json) {
    std::string out;
    bool quoted = false;
    for (std::size_t i = 0; i < json.text.size(); i++) {
        const char c = json.text[i];
        out += c;
        if (quoted && c == '\\') {
            out += json.text[++i];
        } else if (c == '"') {
            quoted = !quoted;
        } else if (!quoted && (c == ':' || c == ',')) {
            out += ' ';
        }
    }
    return out;
}
void Server::tell_text(Connection& c, Exchange& x, const std::string& text) {
    if (!x.streams || options_.log_content) x.text += text;
    if (!x.streams) return;
    begin_events(c, x);
    if (x.style == Style::nanochat) {
        stream(c, cat("data: {\"token\": ", Value(text).text, ", \"gpu\": 0}\n\n"));
    } else {
        const Value piece = choices_json(x, "delta", {{"content", text}}, text, nullptr);
        stream(c, chunk(x, piece, nullptr));
    }
}
void Server::tell_end(Connection& c, Exchange& x) {
    if (options_.log_content) say(cat(c.request_id, " answer: ", x.text));
    if (!x.streams) return send_whole(c, x);
    begin_events(c, x);
    const std::string_view finish = finish_word(x.answer.reason);
    if (x.style == Style::nanochat) {
        Members members = {{"done", true},
                           {"finish_reason", finish},
                           {"seed", x.params.sampling.seed},
                           {"model", x.offer->info.id},
                           {"usage", usage_of(x)}};
        if (x.dropped_messages > 0) members.emplace_back("dropped_messages", x.dropped_messages);
        stream(c, cat("data: ", spaced(object(members)), "\n\n"));
    } else {
        stream(c, chunk(x, choices_json(x, "delta", {}, "", finish), nullptr));
        if (x.include_usage) stream(c, chunk(x, raw("[]"), usage_of(x)));
        stream(c, "data: [DONE]\n\n");
    }
    end_stream(c, true);
}
void Server::tell_failure(Connection& c, const Exchange& x, const Failure& f) {
    if (!x.head_sent) return refuse(c, HttpError(f.status, f.code, f.message));
    stream(c, cat("data: ", object(error_members(f.status, f.code, f.message)).text, "\n\n"));
    end_stream(c, false);
}
void Server::send_whole(Connection& c, Exchange& x) {
    const Tokenizer& tokenizer = *x.offer->tokenizer;
    if (x.style == Style::walk) {
        constexpr std::size_t kKept = 16;  // walks; a picture has some 50 to 300 kB
        walks_.push_back(x.walk);
        if (walks_.size() > kKept) walks_.pop_front();
        return respond(c, 200, kJson, x.walk->json);
    }
    if (x.style == Style::why) {
        const bool asked = x.position >= 0;
        CalculatorTool calculator(tokenizer);  // which writes what it wrote then
        const auto of_answer = [&](Token id) {
            const bool forced = calculator.next_forced() == id;
            calculator.on_token(id);
            return merged(token_json(tokenizer, id), object({{"forced", forced}}));
        };
        return send_json(
            c, object({{"model", x.offer->info.id},
                       {"tokens", array(x.answer_tokens, of_answer)},
                       {"position", asked ? Value(x.position) : Value(nullptr)},
                       {"chosen", asked ? with_probability(tokenizer, x.chosen) : Value(nullptr)},
                       {"candidates", array(x.candidates, [&](const Candidate& other) {
                            return with_probability(tokenizer, other);
                        })}}));
    }
    const Answer& a = x.answer;
    const Members message = {{"role", "assistant"}, {"content", x.text}, {"refusal", nullptr}};
    Members members = answer_members(
        x, "chat.completion", choices_json(x, "message", message, x.text, finish_word(a.reason)));
    members.emplace_back("usage", usage_of(x));
    members.emplace_back("seed", x.params.sampling.seed);
    members.emplace_back("timings", timings_json("queue_ms", x.queue_seconds, a));
    send_json(c, object(members));
}

void Server::gone(Connection& c) {
    if (c.job == nullptr) return;
    c.job->cancelled = true;
    scheduler_->poke();
    c.status = 499;  // nginx's word for it
    answered(c);
}

void Server::answered(Connection& c) {
    const Request& r = c.request();
    const std::string path(r.path.substr(0, 200));
    std::string route = "other";
    for (const Route& known : routes()) {
        if (r.path == known.path || (known.prefix && r.path.starts_with(known.path)))
            route = known.path;
    }
    counts_[cat("{route=\"", route, "\",code=\"", c.status, "\"}")]++;
    const auto* x = static_cast<const Exchange*>(c.job.get());
    const int prompt = x == nullptr ? 0 : static_cast<int>(x->prompt.size());
    // What became of a job is the scheduler's until it says so; of a cancelled one nobody waits for that.
    const bool cancelled = x != nullptr && x->cancelled, over = x != nullptr && !cancelled;
    std::string_view finish = !cancelled ? "" : draining_ ? "draining" : "cancelled";
    if (over)
        finish = x->failure ? std::string_view(x->failure->code) : finish_word(x->answer.reason);
    const int written = over ? x->answer.completion_tokens : 0;
    const double ms = milliseconds(seconds_since(c.request_start));
    const std::string when = iso_date(std::time(nullptr));
    c.job = nullptr;
    if (terminal.quiet) return;
    if (options_.json) {
        write_err(object({{"time", when},
                          {"id", c.request_id},
                          {"client", c.client},
                          {"method", r.method},
                          {"path", path},
                          {"code", c.status},
                          {"ms", ms},
                          {"prompt_tokens", prompt},
                          {"new_tokens", written},
                          {"finish", or_null(finish)}})
                      .text +
                  "\n");
    } else {
        say(cat(when, " ", c.request_id, " ", c.client, " ", r.method, " ", path, " ", c.status,
                " ", decimals(ms, 1), " ms ", prompt, " ", written, " ", finish));
    }
}

// ---- small routes

void Server::health(Connection& c) {
    const Snapshot s = scheduler_->snapshot();
    const auto& models = catalog_->models;
    const bool any = std::any_of(models.begin(), models.end(),
                                 [](const ModelInfo& m) { return m.status == Status::ready; });
    if (!any) refresh(2);  // who asks nothing else until it is well has to learn of one that comes
    const char* status = draining_                       ? "draining"
                         : !s.broken.empty() || !any     ? "degraded"
                         : s.models.empty() && s.loading ? "loading"
                                                         : "ok";
    const bool ready = std::string_view(status) == "ok";
    send_json(c,
              object({{"status", status},
                      {"ready", ready},
                      {"num_gpus", 1},
                      {"available_workers", slots_ - std::min(slots_, s.active)},
                      {"active", s.active},
                      {"queued", s.queued},
                      {"device", place_for(options_).cuda ? "cuda" : "cpu"},
                      {"uptime_s", static_cast<std::int64_t>(seconds_since(start_))}}),
              ready ? 200 : 503);
}
void Server::stats(Connection& c) {
    const Snapshot s = scheduler_->snapshot();
    const Value worker =
        object({{"gpu_id", 0}, {"device", place_for(options_).cuda ? "cuda:0" : "cpu"}});
    send_json(c, object({{"total_workers", slots_},
                         {"available_workers", slots_ - std::min(slots_, s.active)},
                         {"busy_workers", s.active},
                         {"workers", array(std::array{worker})},
                         {"queued", s.queued},
                         {"models", array(s.models,
                                          [](const Snapshot::OfModel& m) {
                                              return object({{"id", m.id},
                                                             {"device", m.device},
                                                             {"running", m.running},
                                                             {"cached_conversations", m.idle}});
                                          })},
                         {"tokens", array(s.written, [](const auto& written) {
                              const auto& [id, w] = written;
                              return object({{"id", id},
                                             {"prompt_tokens", w.prompt_tokens},
                                             {"generated_tokens", w.generated}});
                          })}}));
}
void Server::slots(Connection& c) {
    send_json(c, array(scheduler_->snapshot().slots, [](const Snapshot::Slot& s) {
                  return object({{"id", s.id},
                                 {"model", s.model},
                                 {"state", s.state},
                                 {"prompt_tokens", s.prompt_tokens},
                                 {"generated", s.generated},
                                 {"seconds", s.seconds}});
              }));
}
void Server::props(Connection& c) {
    const SamplingParams& d = options_.sampling;
    // For a command that finds the same checkpoints. Who asks from elsewhere is not told the path, as far
    // as that can be seen.
    const bool usual = options_.base_dir.empty() && environment("NANOCHAT_BASE_DIR").empty() &&
                       !is_path(options_.model);
    const char* const proxied[] = {"x-forwarded-for", "x-real-ip", "forwarded", "via"};
    const bool here = (c.peer.starts_with("127.") || c.peer == "::1") && !trust_proxy_ &&
                      std::none_of(std::begin(proxied), std::end(proxied), [&](const char* field) {
                          return c.request().find(field) != nullptr;
                      });
    std::error_code error;
    const std::string base = here ? fs::absolute(catalog_->base, error).string() : "DIR";
    send_json(c, object({{"version", version()},
                         {"cpu", cpu_features()},
                         {"cuda", or_null(cuda_versions())},
                         {"default_model", or_null(catalog_->default_id)},
                         {"base_dir", usual ? Value(nullptr) : Value(base)},
                         {"sample", usual && catalog_->base == bundled_sample()},
                         {"defaults", object({{"temperature", d.temperature},
                                              {"top_k", d.top_k},
                                              {"top_p", d.top_p},
                                              {"max_tokens", options_.max_tokens}})},
                         {"limits", object({{"slots", slots_},
                                            {"queue", options_.queue},
                                            {"queue_seconds", options_.queue_timeout},
                                            {"request_seconds", options_.request_timeout},
                                            {"max_models", options_.max_models},
                                            {"body_bytes", Limits::kBody},
                                            {"tokenize_bytes", Limits::kTokenized},
                                            {"detokenize_ids", Limits::kTokenized},
                                            {"running_per_client", Scheduler::kRunningPerClient},
                                            {"waiting_per_client", Scheduler::kWaitingPerClient}})},
                         {"features",
                          array(std::array{"nanochat", "openai", "stream", "why", "tokenize"})}}));
}
void Server::openai_models(Connection& c) {
    std::vector<const ModelInfo*> ready;
    for (const ModelInfo& m : catalog_->models) {
        if (m.status == Status::ready)
            ready.insert(m.id == catalog_->default_id ? ready.begin() : ready.end(), &m);
    }
    refresh(2);
    send_json(c, object({{"object", "list"}, {"data", array(ready, [](const ModelInfo* m) {
                                                  return openai_model_json(*m);
                                              })}}));
}
void Server::openai_model(Connection& c) {
    send_json(c, openai_model_json(find_model(c.request().path.substr(11))));
}

void Server::tokenize(Connection& c) {
    const Form form = read_body(c);
    form.need("text");
    const auto offer = offer_of(form.text("model"));
    const std::string text = form.text("text");
    // A byte may be a token, and a token is 40 bytes of the answer, which waits for a slow reader.
    if (text.size() > Limits::kTokenized)
        Form::out_of_range("text", cat("text must have at most ", Limits::kTokenized,
                                       " bytes (got ", text.size(), ")"));
    send_json(c, tokens_json(*offer->tokenizer, offer->tokenizer->encode(text)));
}
void Server::detokenize(Connection& c) {
    const Form form = read_body(c);
    const auto offer = offer_of(form.text("model"));
    const char* name = form.find("tokens") != nullptr ? "tokens" : "ids";
    const std::size_t count = form.need(name).array.size();
    if (count > Limits::kTokenized)
        Form::out_of_range(
            name, cat(name, " must be at most ", Limits::kTokenized, " ids (got ", count, ")"));
    const std::vector<Token> ids = read_ids(form, name, offer->tokenizer->vocab_size());
    send_json(c, object({{"text", to_utf8(offer->tokenizer->decode(ids))}, {"count", ids.size()}}));
}

void Server::metrics(Connection& c) {
    const Snapshot s = scheduler_->snapshot();
    std::string text;
    const auto head = [&](std::string_view name, std::string_view type) {
        text += cat("# TYPE nanogpt_", name, " ", type, "\n");
    };
    const auto line = [&](std::string_view name, std::string_view labels,
                          const std::string& value) {
        text += cat("nanogpt_", name, labels, " ", value, "\n");
    };
    const auto gauge = [&](std::string_view name, std::uint64_t value, const char* type = "gauge") {
        head(name, type), line(name, "", std::to_string(value));
    };
    head("requests_total", "counter");
    for (const auto& [labels, n] : counts_) line("requests_total", labels, std::to_string(n));
    gauge("active_sequences", s.active);
    gauge("queued", s.queued);
    std::uint64_t prompt_tokens = 0, held = 0, room = 0;
    for (const auto& m : s.models) held += m.kv_blocks, room += m.kv_blocks_total;
    for (const auto& [id, w] : s.written) prompt_tokens += w.prompt_tokens;
    gauge("prompt_tokens_total", prompt_tokens, "counter");
    head("generated_tokens_total", "counter");
    for (const auto& [id, w] : s.written)
        line("generated_tokens_total", cat("{model=\"", id, "\"}"), std::to_string(w.generated));
    head("cancelled_total", "counter");
    line("cancelled_total", "{why=\"client\"}", std::to_string(s.cancelled));
    head("rejected_total", "counter");
    for (const auto& [why, n] : rejected_)
        line("rejected_total", cat("{why=\"", why, "\"}"), std::to_string(n));
    const auto histogram = [&](const std::string& name, const Histogram& h) {
        head(name, "histogram");
        std::uint64_t total = 0;
        for (std::size_t i = 0; i < h.counts.size(); i++) {
            total += h.counts[i];
            const std::string bound = i < h.kBounds.size() ? Value(h.kBounds[i]).text : "+Inf";
            line(name + "_bucket", cat("{le=\"", bound, "\"}"), std::to_string(total));
        }
        line(name + "_sum", "", Value(h.sum).text);
        line(name + "_count", "", std::to_string(total));
    };
    histogram("time_to_first_token_seconds", s.first_token);
    histogram("inter_token_seconds", s.between_tokens);
    gauge("kv_blocks_used", held);
    gauge("kv_blocks_total", room);
    gauge("memory_available_bytes", s.memory_available);
    gauge("connections", connection_count());
    respond(c, 200, "text/plain; version=0.0.4; charset=utf-8", text);
}

// ---- start and end

Server::Server(Options& o) : options_(o), nonce_(random_hex(32)) {
    page_ =
        cat("<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n<meta "
            "name=\"viewport\" content=\"width=device-width, initial-scale=1, "
            "viewport-fit=cover, interactive-widget=resizes-content\">\n<title>nanogpt</title>\n"
            "<link rel=\"icon\" href=\"/logo.svg\">\n<style nonce=\"",
            nonce_, "\">", kPageStyle, "</style>\n</head>\n<body>", kPageBody, "<script nonce=\"",
            nonce_, "\">", kPageScript, "</script>\n</body>\n</html>\n");
    etag_ = cat("\"", nonce_.substr(0, 16), "\"");  // the page is the same as long as the process
    const bool local = o.host == "localhost" || o.host == "::1" || o.host.starts_with("127.");
    trust_proxy_ = o.trust_proxy;
    keys_ = o.api_keys;
    if (keys_.empty() && !local && !o.open) keys_.push_back(random_hex(32));
    hosts_ = o.allow_hosts;
    char name[256] = "";
    ::gethostname(name, sizeof name - 1);
    for (const std::string& host : {o.host, std::string(name), cat(name, ".local")})
        hosts_.push_back(lower(host));
    const Place place = place_for(o);
    const std::optional<GpuInfo> gpu = gpu_in_use(place.cuda);
    const std::string device = gpu ? cat("sm", gpu->major, gpu->minor) : "cpu";
    fingerprint_ = cat("nanogpt-", version(), "-", device, "-", name_of(place.dtype));
    slots_ = o.slots > 0 ? static_cast<std::size_t>(o.slots) : gpu ? 256 : 8;
    catalog_ = look_around(o, nullptr);
    open(o.host, o.port);
}

int Server::run(int signals) {
    signals_ = signals;
    watch(signals_, kOther, EPOLLIN);
    scheduler_ = std::make_unique<Scheduler>(slots_, options_, [this] { wake(); });
    try {
        if (!catalog_->default_id.empty()) scheduler_->preload(offer_of(""));
    } catch (const std::exception& e) {
        note(e.what());
    }
    std::string host = options_.host;
    if (host == "0.0.0.0" || host == "::") {
        char name[256] = "";
        host = ::gethostname(name, sizeof name - 1) == 0 ? name : "localhost";
    }
    if (host.find(':') != host.npos) host = cat("[", host, "]");
    const bool made_key = options_.api_keys.empty() && !keys_.empty();
    write_out(cat("nanogpt serve: http://", host, ":", port(), "/",
                  made_key ? cat("#key=", keys_[0]) : "", "\n"));
    loop();
    return exit_code_;
}

void Server::begin_drain(int exit_code, const char* why) {
    draining_ = true;
    exit_code_ = exit_code;
    drain_end_ = Clock::now() + std::chrono::seconds(options_.drain_seconds);
    stop_listening();
    scheduler_->drain();
    if (!terminal.quiet) say(cat(why, ": running answers have ", options_.drain_seconds, " s"));
}
void Server::other_event() {
    signalfd_siginfo info;
    while (::read(signals_, &info, sizeof info) == sizeof info) {
        if (info.ssi_signo == SIGHUP) {
            refresh(0);
        } else if (draining_) {
            drain_end_ = Clock::now();
        } else {
            begin_drain(0, "stopping");
        }
    }
}
bool Server::go_on() {
    if (const int code = scheduler_->stop_code(); code != 0 && !draining_)
        begin_drain(code, code == 5 ? "memory is used up" : "the device failed");
    if (!draining_) return true;
    const bool late = Clock::now() >= drain_end_;
    bool unfinished = false;
    for (const std::uint64_t id : ids()) {
        Connection& c = *find(id);
        unfinished |= c.busy || !c.out.empty();
        if (!late || c.job == nullptr) continue;
        auto& x = static_cast<Exchange&>(*c.job);
        x.cancelled = true;
        tell_failure(c, x, {503, "draining", "the server is stopping"});
        move_on(c);
    }
    return unfinished && !late;
}

int run_serve(Options& o) {
    ::signal(SIGPIPE, SIG_IGN);
    // where memory runs out, the kernel ends this before what else runs here
    std::ofstream("/proc/self/oom_score_adj") << 500;
    sigset_t set;  // before there are threads: all of them leave signals to the sockets' one
    ::sigemptyset(&set);
    for (const int signal : {SIGINT, SIGTERM, SIGHUP}) ::sigaddset(&set, signal);
    ::pthread_sigmask(SIG_BLOCK, &set, nullptr);
    rlimit files{};
    if (::getrlimit(RLIMIT_NOFILE, &files) == 0 && files.rlim_cur < 4096) {
        files.rlim_cur = std::min<rlim_t>(files.rlim_max, 4096);
        ::setrlimit(RLIMIT_NOFILE, &files);
    }
    if (o.num_gpus != 1) bad_usage("--num-gpus: only 1 is supported; one device serves all");
    Server server(o);
    const int signals = ::signalfd(-1, &set, SFD_NONBLOCK | SFD_CLOEXEC);
    return server.run(signals);
}

// ==== 12. main ===================================================================================
// Help, and the one place where an exception becomes an exit code.

std::string flags_help(const Command& command) {
    std::string text;
    for (const Flag& flag : kFlags) {
        if (!belongs(flag, command)) continue;
        const std::string letter = flag.letter ? std::string("-") + flag.letter + ", " : "    ";
        const std::string name =
            cat("  ", letter, "--", flag.name, flag.value.empty() ? "" : " ", flag.value);
        text += name.size() < 30 ? fit(name, 30) : name + "\n" + std::string(30, ' ');
        text += wrapped(flag.help, 30);
    }
    return text;
}
constexpr const char* kExamples =
    "  nanogpt chat                          talk with your newest SFT model\n"
    "  nanogpt -i sft -g d12 -p \"Hello\"      one answer\n"
    "  nanogpt models                        what there is\n";

std::string title() {
    return cat("nanogpt ", version(), ": chat with nanochat checkpoints, and look inside them\n\n");
}

int run_help(Options& o) {
    std::string text;
    if (!o.arguments.empty()) {
        const Command& command = find_command(o.arguments[0]);
        text = cat("nanogpt ", command.name, command.arguments.empty() ? "" : " ",
                   command.arguments, " [FLAGS]\n", wrapped(command.summary, 0));
        if (!command.aliases.empty()) text += cat("Also: ", command.aliases, "\n");
        text += "\n" + flags_help(command);
    } else {
        text = title();
        for (const Command& command : kCommands) {
            text += fit(cat("  nanogpt ", command.name, " ", command.arguments), 30) +
                    wrapped(command.summary, 30);
        }
        text += cat(
            "\nA flag in place of a command means chat. All flags of a command: nanogpt help "
            "COMMAND\n\n",
            kExamples,
            "\nExit codes: 0 done, 1 failed, 2 wrong usage, 3 not found, 4 file refused,\n"
            "5 not enough memory, 6 device missing, 7 cannot listen, 130 Ctrl-C, 143 SIGTERM\n");
    }
    if (o.json) return write_json(object({{"help", text}})), 0;
    write_out(text);
    return 0;
}
int run_version(Options& o) {
    if (o.json) {
        write_json(object({{"name", "nanogpt"},
                           {"version", version()},
                           {"cpu", cpu_features()},
                           {"cuda", or_null(cuda_versions())}}));
        return 0;
    }
    write_out(cat("nanogpt ", version(), " (CPU, ", cpu_features(),
                  kHasCuda ? cat("; CUDA, ", cuda_versions()) : "", ")\n"));
    return 0;
}
// Without any argument: what this is, and how many checkpoints it sees.
int run_nothing(const Options& o) {
    const fs::path base = base_dir(o.base_dir);
    const std::size_t found = find_models(base).size();
    write_out(cat(title(), kExamples, "\n", found, found == 1 ? " checkpoint" : " checkpoints",
                  " in ", safe(home_relative(base)),
                  found == 0 ? "; chat then uses the sample model shipped with nanogpt" : "",
                  ". More: nanogpt help\n"));
    return 0;
}

// ---- errors and exit codes

struct Fault {
    ErrorKind kind;
    int exit;
    const char *type, *code;  // as in the HTTP interface
};
constexpr Fault kFaults[] = {{ErrorKind::usage, 2, "invalid_request_error", "usage"},
                             {ErrorKind::not_found, 3, "not_found_error", "not_found"},
                             {ErrorKind::refused, 4, "conflict_error", "refused"},
                             {ErrorKind::unsupported, 4, "not_supported_error", "unsupported"},
                             {ErrorKind::out_of_memory, 5, "overloaded_error", "out_of_memory"},
                             {ErrorKind::device, 6, "server_error", "device"}};

// Tells an error, on stdout too if programs read along; returns its exit code.
int report(const Options& o, const std::exception& e) {
    Fault fault = {ErrorKind::usage, 1, "server_error", "internal"};
    std::string message = e.what();
    if (dynamic_cast<const std::bad_alloc*>(&e) != nullptr) {
        fault = kFaults[static_cast<std::size_t>(ErrorKind::out_of_memory)];
        message =
            "not enough memory: an allocation failed. Close other programs or choose a smaller "
            "model";
    } else if (const auto* error = dynamic_cast<const Error*>(&e)) {
        fault = kFaults[static_cast<std::size_t>(error->kind)];
        if (error->kind == ErrorKind::refused) message = "refused " + message;
    } else if (dynamic_cast<const CannotListen*>(&e) != nullptr) {
        fault.exit = 7;
    }
    std::fflush(stdout);
    const std::string line = paint(terminal.err, kRed, "nanogpt:") + " " + safe(message) + "\n";
    std::fputs(line.c_str(), stderr);
    if (o.json || o.stream_json) {
        const Value error =
            object({{"message", message}, {"type", fault.type}, {"code", fault.code}});
        std::fputs((object({{"error", error}}).text + "\n").c_str(), stdout);
        std::fflush(stdout);
    }
    return fault.exit;
}

int run(std::span<const std::string> args) {
    ::signal(SIGPIPE, SIG_DFL);  // whoever closes the pipe has read enough
    Options o;
    try {
        const Command* command = nullptr;
        try {
            command = &parse(o, args);
        } catch (const Error&) {
            open_terminal(o);  // the mistake is told in the colours asked for
            throw;
        }
        open_terminal(o);
        check_device(o);
        return args.empty() ? run_nothing(o) : command->run(o);
    } catch (const std::exception& e) {
        if (interrupted()) leave_interrupted();
        return report(o, e);
    }
}

}  // namespace
}  // namespace nanogpt::demo

int main(int argc, char** argv) {
    return nanogpt::demo::run(std::vector<std::string>(argv + std::min(argc, 1), argv + argc));
}

// ==== 13. page ===================================================================================
// What people see at /: style, body and script of one document, of this origin only and without any
// library. A policy allows this one style and this one script, by a number, and nothing written into
// elements: no style="", no onclick="".

namespace nanogpt::demo {
namespace {

const std::string_view kPageStyle = R"page(
/* Every colour once: light first, dark second. */
:root {
  color-scheme: light dark;
  --paper: light-dark(#fdfdfb, #1c1d1f);
  --side: light-dark(#f5f5f1, #161719);
  --raised: light-dark(#ffffff, #242629);
  --bubble: light-dark(#edeee9, #2b2d31);
  --line: light-dark(#e1e2dc, #34373b);
  --edge: light-dark(#85877f, #7d8187);
  --ink: light-dark(#1f211e, #ecedea);
  --soft: light-dark(#5c5f58, #a9aca6);
  --accent: light-dark(#0b6b5d, #6ed2bf);
  --on-accent: light-dark(#ffffff, #06231d);
  --tint: light-dark(#e4f1ee, #1f3632);
  --warn: light-dark(#a02c1f, #ffa494);
  --warn-tint: light-dark(#fcecea, #3a2320);
  --shade: light-dark(#20221f14, #00000066);
  --mono: ui-monospace, "SF Mono", "Cascadia Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace;
  --column: 46rem;
}
:root[data-theme="light"] { color-scheme: light; }
:root[data-theme="dark"] { color-scheme: dark; }

/* ---- all elements */
*, *::before, *::after { box-sizing: border-box; }
[hidden] { display: none !important; }
body {
  margin: 0; height: 100dvh; display: flex; -webkit-text-size-adjust: 100%; overflow: hidden;
  background: var(--paper); color: var(--ink);
  font: 1rem/1.6 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif;
  padding-bottom: var(--keyboard, 0);
}
button, input, select, textarea { font: inherit; color: inherit; }
button { background: none; border: 0; border-radius: .6rem; padding: .45rem .7rem; }
button, summary { cursor: pointer; }
button:disabled { cursor: default; opacity: .45; }
:where(button:enabled, summary, .picker, #list li):hover { background: var(--shade); }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; scroll-margin: 1rem; }
svg {
  display: block; width: 1.25rem; height: 1.25rem; flex: none; fill: none; stroke: currentColor;
  stroke-width: 1.6; stroke-linecap: round; stroke-linejoin: round;
}
h2, h3, h4, p, ul, ol, dl, dd, pre { margin: 0; }
h2 { font-size: 1.25rem; line-height: 1.3; font-weight: 620; }
h3 { font-size: .875rem; font-weight: 620; }
code, pre, kbd { font-family: var(--mono); font-size: .875em; }
kbd {
  padding: .05rem .35rem; border: 1px solid var(--line); border-radius: .3rem; color: var(--soft);
  font-size: .75rem; white-space: nowrap;
}
textarea, input[type="number"], input[type="password"] {
  border: 1px solid var(--edge); border-radius: .55rem; background: var(--raised); padding: .35rem .6rem;
}
textarea { width: 100%; resize: vertical; }
input[type="number"] { width: 6.5rem; text-align: right; font-variant-numeric: tabular-nums; }
input[type="range"] { width: 100%; margin: .2rem 0; }
input[type="range"], progress { accent-color: var(--accent); }
::placeholder { color: var(--soft); opacity: 1; }
:user-invalid { border-color: var(--warn) !important; }
img { display: block; max-width: 100%; height: auto; border: 1px solid var(--line); border-radius: .6rem; }
table { width: 100%; border-collapse: collapse; font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 400; }
.sr {
  position: absolute; width: 1px; height: 1px; margin: -1px; overflow: hidden; white-space: nowrap;
  clip-path: inset(50%);
}
.skip {
  position: fixed; z-index: 9; left: .75rem; top: -4rem; padding: .6rem 1rem; border-radius: .6rem;
  background: var(--accent); color: var(--on-accent);
}
.skip:focus { top: .75rem; }
.noscript { position: fixed; inset: 0; padding: 3rem 1.5rem; background: var(--paper); z-index: 9; }
.icon { display: inline-grid; place-items: center; width: 2.5rem; height: 2.5rem; padding: 0; }
.wide {
  display: flex; align-items: center; justify-content: center; gap: .5rem; width: 100%;
  padding: .5rem .8rem; border: 1px solid var(--line);
}
.solid { background: var(--accent); color: var(--on-accent); }
.card { border: 1px solid var(--line); border-radius: .9rem; background: var(--raised); }
.row { display: flex; align-items: center; gap: .4rem; }
.note { font-size: .8125rem; line-height: 1.5; color: var(--soft); font-weight: 400; }
.badge {
  padding: .02rem .4rem; border-radius: .35rem; background: var(--tint); color: var(--accent);
  font-size: .75rem; font-weight: 650; letter-spacing: .03em; vertical-align: .08em;
}
.best { color: var(--accent); font-weight: 600; white-space: nowrap; }

/* ---- the two sides: conversations, and model and settings */
aside {
  flex: none; display: flex; flex-direction: column; gap: .75rem; padding: .75rem 1rem 1rem;
  background: var(--side); border: 0 solid var(--line); overflow: auto;
  overscroll-behavior: contain; outline: none;
}
#chats { width: 16.5rem; border-right-width: 1px; }
#panel { width: 22rem; border-left-width: 1px; }
/* Over the page instead of beside it; its shadow darkens the rest. */
.over {
  position: fixed; z-index: 5; inset: 0 auto 0 0; max-width: 88vw; box-shadow: 0 0 0 100vmax #0007;
  padding-top: max(.75rem, env(safe-area-inset-top));
  padding-bottom: max(1rem, env(safe-area-inset-bottom));
}
#panel.over { left: auto; right: 0; }
.side-head { display: flex; align-items: center; justify-content: space-between; min-height: 2.5rem; }
.brand { display: flex; align-items: center; gap: .55rem; font-weight: 650; letter-spacing: -.01em; }
:is(.brand, .who, #empty) svg { color: var(--accent); stroke-width: 2.4; }
#new { justify-content: flex-start; background: var(--raised); }
#new kbd { margin-left: auto; }
#list { list-style: none; padding: 0; margin: 0 -.5rem; overflow: auto; flex: 1; min-height: 3rem; }
#list li { display: flex; align-items: center; border-radius: .6rem; }
#list .current { background: var(--bubble); }
#list .open {
  flex: 1; min-width: 0; text-align: left; overflow: hidden; text-overflow: ellipsis;
  white-space: nowrap; font-size: .9375rem; padding: .4rem .5rem;
}
#list .current .open { font-weight: 560; }
#list .icon { width: 2rem; height: 2rem; color: var(--soft); opacity: 0; }
#list li:hover .icon, #list .icon:focus-visible, #list .current .icon { opacity: 1; }
:is(#list, .code, .acts) svg { width: 1.05rem; height: 1.05rem; }
.menu, .side-foot { font-size: .875rem; }
.menu button { display: block; width: 100%; text-align: left; padding: .4rem .5rem; }
.side-foot {
  display: flex; justify-content: space-between; border-top: 1px solid var(--line);
  padding-top: .5rem; margin: 0 -.5rem;
}

/* ---- header */
main { flex: 1; min-width: 0; display: flex; flex-direction: column; position: relative; }
header {
  display: flex; align-items: center; gap: .35rem; padding: .6rem .75rem;
  padding-top: max(.6rem, env(safe-area-inset-top));
}
.picker {
  position: relative; display: flex; align-items: center; gap: .4rem; min-width: 0;
  padding: .3rem .6rem; border-radius: .7rem; margin-right: auto;
}
.picker:focus-within { outline: 2px solid var(--accent); outline-offset: 1px; }
.picker select { position: absolute; inset: 0; width: 100%; opacity: 0; cursor: pointer; }
.picker option, .picker optgroup { background: var(--raised); color: var(--ink); }
:is(.picker, .who) svg { width: 1rem; height: 1rem; }
.picked { min-width: 0; line-height: 1.25; }
.picked > * { display: block; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.picked b { font-weight: 620; }
#device { white-space: nowrap; }
#device::before {
  content: ""; display: inline-block; width: .5rem; height: .5rem; border-radius: 50%;
  background: var(--accent); margin-right: .45rem; vertical-align: .06em;
}
#device.fallback::before { background: none; border: 2px solid var(--soft); }
#banner { margin: 0 .75rem; }
#banner, .trouble {
  padding: .5rem .9rem; border-radius: .7rem; background: var(--warn-tint); color: var(--warn);
  font-size: .9375rem; overflow-wrap: anywhere;
}
#key-form { display: flex; flex-wrap: wrap; align-items: center; gap: .5rem; margin-top: .4rem; }
#key-form input { min-width: 0; flex: 1 1 9rem; }

/* ---- conversation */
#scroll { flex: 1; overflow: auto; overscroll-behavior: contain; outline: none; padding: 0 1.25rem; }
#log { max-width: var(--column); margin: 0 auto; padding: 1rem 0 3rem; }
.turn { margin-top: 2rem; }
.turn:first-child { margin-top: .5rem; }
.turn.user { display: flex; flex-direction: column; align-items: flex-end; }
.bubble {
  max-width: 85%; padding: .65rem 1.05rem; border-radius: 1.25rem 1.25rem .35rem 1.25rem;
  background: var(--bubble); white-space: pre-wrap; overflow-wrap: anywhere;
}
.editing { width: 100%; }
.editing .row { justify-content: flex-end; margin-top: .5rem; }
.who { display: flex; align-items: center; gap: .45rem; font-size: .8125rem; color: var(--soft); }
.body { margin-top: .35rem; overflow-wrap: anywhere; line-height: 1.68; }
.body > * + * { margin-top: .8rem; }
.body :is(p, h3, h4, li > span) { white-space: pre-wrap; }
.body h3, .body h4 { font-size: 1.0625rem; margin-top: 1.25rem; }
.body ul, .body ol { padding-left: 1.6rem; }
.body li + li, .body li > :is(ul, ol) { margin-top: .3rem; }
.body code, .why code { background: var(--bubble); padding: .1rem .35rem; border-radius: .3rem; }
.code { position: relative; background: var(--side); border-radius: .7rem; }
aside .code { background: var(--raised); }
.code pre {
  padding: .85rem 3rem .85rem 1rem; border-radius: .7rem; overflow: auto;
  border: 1px solid var(--line); line-height: 1.55; tab-size: 4;
}
aside .code pre { font-size: .78rem; white-space: pre-wrap; overflow-wrap: anywhere; }
.code pre code { background: none; padding: 0; font-size: inherit; }
.code .icon {
  position: absolute; top: .3rem; right: .3rem; width: 2.2rem; height: 2.2rem; color: var(--soft);
  background: inherit;
}
.calc {
  display: inline-block; padding: 0 .5rem; border-radius: .45rem; background: var(--tint);
  border: 1px solid color-mix(in srgb, var(--accent) 35%, transparent); margin-right: .3rem;
  font-family: var(--mono); font-size: .8125rem; line-height: 1.6;
}
.calc b { font: 600 .75rem/1 system-ui, sans-serif; color: var(--accent); margin-right: .15rem; }
.prompt { color: var(--soft); }
.live > :is(p, h3, h4):last-child::after, .live > :is(ul, ol):last-child > li:last-child > span:last-child::after {
  content: ""; display: inline-block; width: .5rem; height: 1.05em; margin-left: .15rem;
  vertical-align: -.18em; border-radius: 1px; background: var(--accent);
}
.waiting { display: flex; align-items: center; gap: .7rem; margin-top: .5rem; color: var(--soft); }
.waiting progress { width: 5rem; }
.trouble { display: flex; flex-wrap: wrap; align-items: center; gap: .3rem .6rem; margin-top: .7rem; }
.trouble.calm { background: var(--side); color: var(--soft); }
:is(.trouble, #toast, td) button { font-weight: 600; text-decoration: underline; text-underline-offset: .2em; }
.notice { text-align: center; font-size: .8125rem; color: var(--soft); margin-top: 1.5rem; }
.acts { display: flex; flex-wrap: wrap; align-items: center; gap: .1rem; margin: .3rem 0 0 -.5rem; color: var(--soft); }
.acts button { height: 2.1rem; padding: 0 .5rem; font-size: .8125rem; display: inline-flex; align-items: center; gap: .35rem; }
.acts button[aria-pressed="true"] { background: var(--tint); color: var(--accent); }
.user .acts { margin: .15rem 0 0; }
.stats { font-size: .8125rem; margin-left: auto; }
.stats summary { padding: .3rem .5rem; border-radius: .5rem; font-variant-numeric: tabular-nums; }
.stats[open] { flex-basis: 100%; }
.stats dl { padding: .4rem .5rem; max-width: 26rem; }
.facts-list { display: grid; grid-template-columns: auto 1fr; gap: .2rem 1.25rem; font-size: .875rem; }
.facts-list dt { color: var(--soft); }
.facts-list dd { text-align: right; overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }

/* ---- why these words? */
.tokens { white-space: pre-wrap; margin: .35rem 0 .8rem; line-height: 2; overflow-wrap: anywhere; }
.tokens button {
  display: inline; padding: .12rem 0; border-radius: .25rem; white-space: pre-wrap; text-align: left;
  background: var(--bubble); box-shadow: inset 0 -2px 0 var(--line);
}
.tokens button:nth-of-type(even) { background: var(--tint); }
.tokens button:hover { box-shadow: inset 0 -2px 0 var(--accent); }
.tokens button[aria-pressed="true"] { background: var(--accent); color: var(--on-accent); }
.tokens .mark { opacity: .7; }
.why { padding: 1rem 1.1rem; }
.why table { margin-top: .6rem; font-size: .9375rem; }
.why caption { caption-side: bottom; text-align: left; padding-top: .6rem; }
.why th { padding: .16rem .8rem .16rem 0; width: 1%; white-space: nowrap; }
.why td:last-child { text-align: right; width: 4.8rem; white-space: nowrap; }
.why code { white-space: pre; }
.why .chosen :is(th, td) { font-weight: 650; color: var(--accent); }
.why .bar { height: .55rem; border-radius: .3rem; background: var(--edge); min-width: 2px; }
.why .chosen .bar { background: var(--accent); }

/* ---- before the first message */
#empty { max-width: var(--column); margin: 0 auto; padding: 13vh 0 2rem; }
#empty svg { width: 2.75rem; height: 2.75rem; margin-left: -.4rem; }
#empty h2 { font-size: clamp(1.5rem, 1.1rem + 2vw, 2.1rem); letter-spacing: -.02em; margin: .6rem 0 .5rem; }
#empty p { color: var(--soft); max-width: 36rem; }
#empty .facts { color: var(--ink); font-size: .9375rem; margin-bottom: .6rem; }
#empty code { overflow-wrap: anywhere; }
#examples { display: grid; grid-template-columns: repeat(auto-fit, minmax(12.5rem, 1fr)); gap: .75rem; margin-top: 1.75rem; }
#examples button { display: flex; flex-direction: column; text-align: left; padding: .85rem 1rem; line-height: 1.4; }
#examples button:hover { border-color: var(--accent); }

/* ---- message box */
footer {
  position: relative; width: 100%; max-width: calc(var(--column) + 2.5rem); margin: 0 auto;
  padding: 0 1.25rem max(.6rem, env(safe-area-inset-bottom));
}
footer::before {
  content: ""; position: absolute; inset: -1.5rem 0 100%; pointer-events: none;
  background: linear-gradient(transparent, var(--paper));
}
.composer {
  display: flex; align-items: flex-end; gap: .4rem; padding: .4rem .4rem .4rem 1.1rem;
  border: 1px solid var(--edge); border-radius: 1.5rem; background: var(--raised);
  box-shadow: 0 4px 20px var(--shade);
}
.composer:focus-within { border-color: var(--accent); box-shadow: 0 0 0 .2rem var(--tint); }
.composer textarea {
  flex: 1; min-width: 0; border: 0; outline: 0; background: none; resize: none; padding: .42rem 0;
  line-height: 1.5; max-height: 12.9rem;
}
#send { border-radius: 50%; background: var(--accent); color: var(--on-accent); }
#send:hover { background: color-mix(in srgb, var(--accent) 85%, var(--ink)); }
#send:disabled { background: var(--bubble); color: var(--soft); opacity: 1; }
.below {
  display: flex; justify-content: space-between; gap: .2rem 1rem; flex-wrap: wrap; min-height: 1.4rem;
  padding: .35rem .6rem 0;
}
.meter { display: flex; align-items: center; gap: .5rem; margin-left: auto; }
#meter { width: 4.5rem; height: .4rem; }
#newest {
  position: absolute; left: 50%; bottom: calc(100% + .6rem); transform: translateX(-50%);
  display: flex; align-items: center; gap: .3rem; padding: .35rem .9rem .35rem .6rem;
  border-radius: 2rem; box-shadow: 0 2px 12px var(--shade); font-size: .875rem; min-height: 2.5rem;
}

/* ---- model and settings */
[role="tablist"] { display: flex; gap: .2rem; padding: .2rem; border-radius: .8rem; background: var(--bubble); }
[role="tab"] { padding: .3rem .7rem; font-size: .9375rem; color: var(--soft); }
[role="tab"][aria-selected="true"] { background: var(--raised); color: var(--ink); font-weight: 560; box-shadow: 0 1px 3px var(--shade); }
[role="tabpanel"] { display: flex; flex-direction: column; gap: .8rem; outline-offset: .4rem; }
.loss { margin: .9rem 0; padding: .9rem 1rem; }
.loss b { font-size: 1.6rem; font-weight: 620; letter-spacing: -.02em; line-height: 1.2; font-variant-numeric: tabular-nums; }
.control { display: flex; flex-direction: column; gap: .35rem; padding-bottom: 1.1rem; }
.row label { font-weight: 560; font-size: .9375rem; }
.hint {
  width: 1.5rem; height: 1.5rem; padding: 0; border-radius: 50%; color: var(--soft); font-size: .8125rem;
  border: 1px solid var(--line); line-height: 1; margin-right: auto;
}
.hint[aria-expanded="true"] { background: var(--tint); color: var(--accent); }
#walk-out p { font-size: .875rem; line-height: 1.5; margin-bottom: 1rem; }
#walk-out button { padding: 0; width: 100%; margin-bottom: 1rem; }

/* ---- dialogs and the line that comes up at the bottom */
dialog {
  border: 1px solid var(--line); border-radius: 1.1rem; padding: .85rem 1.5rem 1.5rem; color: var(--ink);
  background: var(--paper); max-width: min(60rem, calc(100vw - 1.5rem)); max-height: calc(100dvh - 2rem);
}
dialog::backdrop { background: #0007; }
dialog .side-head { margin: 0 -.6rem .5rem 0; }
#dialog-body > p { max-width: 33rem; }
dialog h3 { margin: 1.25rem 0 .5rem; }
.keys { display: grid; grid-template-columns: auto 1fr; gap: .4rem 1.2rem; font-size: .9375rem; }
.table { overflow: auto; margin-top: 1rem; border-radius: .5rem; font-size: .875rem; }
.table :is(th, td) { padding: .45rem .8rem .45rem 0; border-bottom: 1px solid var(--line); white-space: nowrap; }
.table th, .table td:last-child { color: var(--soft); }
.table td:last-child { white-space: normal; min-width: 10rem; }
.table button { padding: .1rem .4rem; margin-left: -.4rem; color: var(--accent); }
.table .current { background: var(--tint); }
#toast {
  inset: auto auto 7.5rem 50%; margin: 0; transform: translateX(-50%); width: max-content;
  max-width: calc(100vw - 2rem); padding: .55rem 1.1rem; border: 0; border-radius: .8rem;
  background: var(--ink); color: var(--paper);
  font-size: .9375rem; box-shadow: 0 6px 24px var(--shade);
}
#toast button { padding: .1rem .4rem; }

/* ---- small windows, fingers, and people who want less movement */
@media (max-width: 700px) {
  header { padding-inline: .4rem; }
  [role="tab"] { padding-inline: .35rem; }
  #device { display: none; }
  #scroll, footer { padding-inline: 1rem; }
  .picker { flex: 1; justify-content: space-between; margin-right: 0; }
  #empty { padding-top: 5vh; }
  #examples { gap: .5rem; margin-top: 1.25rem; }
  .bubble { max-width: 92%; }
  #hint, .acts button span { display: none; }
  .why th { max-width: 9rem; overflow: hidden; text-overflow: ellipsis; }
  .why .chosen th span { display: none; }
  #panel.over {
    inset: auto 0 0 0; width: 100%; max-width: none; max-height: 85dvh; border-width: 1px 0 0;
    border-radius: 1.2rem 1.2rem 0 0;
  }
}
@media (pointer: coarse) {
  .icon, .acts button, #list .icon, .code .icon { min-width: 2.75rem; min-height: 2.75rem; justify-content: center; }
  button:not(.hint), summary, input, .picker, select { min-height: 2.75rem; }
  .composer textarea { padding: .65rem 0; }
  .hint { position: relative; }
  .hint::after { content: ""; position: absolute; inset: -.625rem; }
  .tokens button { min-height: 0; padding: .3rem .1rem; }
  #list .icon { opacity: 1; }
  .stats summary { display: flex; align-items: center; }
}
@media (hover: hover) {
  .user { position: relative; }
  .user .acts { position: absolute; top: 100%; right: 0; opacity: 0; }
  .user:hover .acts, .user .acts:focus-within { opacity: 1; }
}
@media (prefers-reduced-motion: reduce) {
  progress:not([value]) { display: none; }
}
)page";

const std::string_view kPageBody = R"page(
<noscript>
  <p class="noscript">This page needs JavaScript. Without it, chat in a terminal:
  <code>nanogpt chat</code></p>
</noscript>

<a class="skip" href="#text">Skip to the message box</a>

<aside id="chats" aria-label="Conversations" tabindex="-1">
  <div class="side-head">
    <span class="brand" data-icon="logo">nanogpt</span>
    <button class="icon" id="chats-close" data-icon="close" aria-label="Close conversations"></button>
  </div>
  <button class="wide" id="new" data-icon="new">New chat <kbd>Alt N</kbd></button>
  <h2 class="note">Conversations</h2>
  <p id="list-none" class="note">None yet.</p>
  <ul id="list"></ul>
  <p id="list-note" class="note">Kept in this browser only. Nobody else sees them here.</p>
  <details class="menu">
    <summary>Save, load, delete</summary>
    <button id="save-md">Save this chat as Markdown</button>
    <button id="save-json">Save all chats as JSON</button>
    <button id="load-json">Load chats from JSON</button>
    <button id="delete-all">Delete all chats</button>
    <input type="file" id="file" accept=".json,application/json" hidden aria-label="JSON file">
  </details>
  <div class="side-foot">
    <button id="theme"></button>
    <button id="help-open">Help</button>
  </div>
</aside>

<main id="main">
  <h1 class="sr">nanogpt: chat with nanochat models</h1>
  <header>
    <button class="icon" id="chats-open" data-icon="side" aria-label="Conversations"
      aria-controls="chats"></button>
    <div class="picker">
      <span class="picked" aria-hidden="true">
        <b id="picked-name">Looking for models</b><small id="picked-loss" class="note"></small>
      </span>
      <span data-icon="down"></span>
      <select id="model" aria-label="Model"></select>
    </div>
    <button id="device" class="note" hidden aria-haspopup="dialog"></button>
    <button class="icon" id="panel-open" data-icon="tune" aria-label="Model and settings"
      aria-controls="panel"></button>
  </header>

  <div id="banner" role="alert" hidden>
    <span id="banner-text"></span>
    <form id="key-form" hidden>
      <label for="key">Access key</label>
      <input id="key" type="password" autocomplete="off" required>
      <button class="solid">Use it</button>
    </form>
  </div>

  <div id="scroll" tabindex="-1">
    <section id="empty" aria-labelledby="empty-title" hidden>
      <div data-icon="logo"></div>
      <h2 id="empty-title"></h2>
      <p id="empty-facts" class="facts"></p>
      <p id="empty-text"></p>
      <p id="empty-none">The server looks in the folder given with <code>--base-dir</code>, else in
        <code>$NANOCHAT_BASE_DIR</code>, else in <code>~/.cache/nanochat</code>, for
        <code>chatsft_checkpoints/&lt;tag&gt;/model_&lt;step&gt;.pt</code> with
        <code>meta_&lt;step&gt;.json</code> beside it (also base_, mid_ and chatrl_checkpoints) and
        for <code>tokenizer/tokenizer.pkl</code>. A new checkpoint appears here by itself.</p>
      <div id="examples" role="group" aria-label="Examples to start with"></div>
    </section>
    <div id="log" role="log" aria-live="off" aria-label="Conversation"></div>
  </div>

  <footer>
    <button id="newest" class="card" data-icon="down" hidden>Newest</button>
    <div class="composer">
      <textarea id="text" rows="1" enterkeyhint="send" autocomplete="off"
        aria-label="Message"></textarea>
      <button id="send" class="icon" data-icon="send" aria-label="Send" disabled></button>
    </div>
    <p class="below note"><span id="hint"></span>
      <span class="meter"><progress id="meter" aria-hidden="true" hidden></progress>
      <span id="meter-text"></span></span></p>
  </footer>
</main>

<aside id="panel" aria-label="Model and settings" tabindex="-1">
  <div class="side-head">
    <div role="tablist" aria-label="What to show">
      <button role="tab" id="tab-model" aria-controls="pane-model">Model</button>
      <button role="tab" id="tab-settings" aria-controls="pane-settings">Settings</button>
      <button role="tab" id="tab-walk" aria-controls="pane-walk">Walkthrough</button>
    </div>
    <button class="icon" id="panel-close" data-icon="close"
      aria-label="Close model and settings"></button>
  </div>

  <div role="tabpanel" id="pane-model" aria-labelledby="tab-model" tabindex="0">
    <div id="about"></div>
    <button class="wide" id="all-open" aria-haspopup="dialog">Compare all checkpoints</button>
    <h3>From the terminal</h3>
    <div class="code"><pre id="cli" tabindex="0"></pre></div>
    <h3>From a program</h3>
    <div class="code"><pre id="curl" tabindex="0"></pre></div>
  </div>

  <div role="tabpanel" id="pane-settings" aria-labelledby="tab-settings" tabindex="0">
    <div id="settings"></div>
    <button class="wide" id="reset">Reset to defaults</button>
  </div>

  <div role="tabpanel" id="pane-walk" aria-labelledby="tab-walk" tabindex="0">
    <form id="walk-form" class="control">
      <label for="walk-text">A text, and the model's every step through it</label>
      <textarea id="walk-text" rows="3" required>The sky is blue because</textarea>
      <p class="note">At most 63 tokens. It is read as it stands, without the words of a chat around
        it.</p>
      <div class="row"><label for="walk-layer">Layer looked at closely</label>
        <input type="number" id="walk-layer" min="0" step="1" placeholder="middle"></div>
      <button class="wide">Walk through it</button>
    </form>
    <div id="walk-out"></div>
  </div>
</aside>

<dialog id="dialog" aria-labelledby="dialog-title">
  <div class="side-head"><h2 id="dialog-title"></h2>
    <button class="icon" id="dialog-close" data-icon="close" aria-label="Close"></button>
  </div>
  <div id="dialog-body"></div>
</dialog>

<template id="help">
  <p>You are talking to a small language model trained with nanochat. It runs on the computer this
    page comes from; nothing is sent anywhere else. It writes what sounds likely, and that is often
    wrong.</p>
  <h3>Keys</h3>
  <dl class="keys">
    <dt><kbd>Enter</kbd></dt><dd>send</dd>
    <dt><kbd>Shift Enter</kbd></dt><dd>new line</dd>
    <dt><kbd>Esc</kbd></dt><dd>stop the answer</dd>
    <dt><kbd>↑</kbd></dt><dd>in an empty box: edit your last message</dd>
    <dt><kbd>Alt N</kbd></dt><dd>new chat</dd>
    <dt><kbd>Alt M</kbd></dt><dd>choose a model</dd>
    <dt><kbd>Alt S</kbd></dt><dd>settings</dd>
    <dt><kbd>?</kbd></dt><dd>this help</dd>
  </dl>
  <h3>Commands in the message box</h3>
  <dl class="keys">
    <dt><code>/temperature 0.6</code></dt><dd>0 to 2</dd>
    <dt><code>/topk 50</code></dt><dd>0 to 200</dd>
    <dt><code>/max 256</code></dt><dd>longest answer in tokens</dd>
    <dt><code>/seed 42</code></dt><dd>same dice each time; without a number: random</dd>
    <dt><code>/model d12</code></dt><dd>choose a model by name</dd>
    <dt><code>/stats</code></dt><dd>how busy the server is</dd>
    <dt><code>/clear</code></dt><dd>new chat</dd>
    <dt><code>/help</code></dt><dd>this help</dd>
  </dl>
  <h3>Why these words?</h3>
  <p>Below each answer is a button with this name. It cuts the answer into tokens; choose one to see
    the ten tokens the model thought likeliest there.</p>
</template>

<div id="toast" role="status" popover="manual"><span id="toast-text"></span>
  <button id="toast-undo">Undo</button></div>
<p id="status" class="sr" role="status"></p>
)page";

const std::string_view kPageScript = R"page(
'use strict';
// What people and models write gets into the document as text nodes only; nothing here makes HTML
// of it. Everything is asked of the server the page came from.

// ---- small helpers
const $ = (id) => document.getElementById(id);
const count = (n) => n.toLocaleString('en');
const fresh = () => Date.now().toString(36) + Math.random().toString(36).slice(2, 8);
const plural = (n, word) => `${count(n)} ${word}${n === 1 ? '' : 's'}`;

// An element with attributes (those named on... are listeners) and children; text is never markup.
function make(tag, attributes, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (name.startsWith('on')) node.addEventListener(name.slice(2), value);
    else if (value !== false && value != null) node.setAttribute(name, value === true ? '' : value);
  }
  node.append(...children.filter((child) => child != null && child !== ''));
  return node;
}

// Other children, unless they look like those there: so the focus and an open list stay.
function fill(node, ...children) {
  const other = node.cloneNode(false);
  other.append(...children);
  if (!other.isEqualNode(node)) node.replaceChildren(...other.childNodes);
}

const kIcons = {
  logo: 'M4 5.5h16M4 10h11M4 14.5h7M4 19h3.5',
  side: 'M4 5h16v14H4zM9.5 5v14',
  new: 'M12 5v14M5 12h14',
  down: 'm6 9.5 6 6 6-6',
  tune: 'M4 8h8.4m5.2 0H20M4 16h2.4m5.2 0H20M12.4 8a2.6 2.6 0 1 0 5.2 0a2.6 2.6 0 1 0-5.2 0' +
    'M6.4 16a2.6 2.6 0 1 0 5.2 0a2.6 2.6 0 1 0-5.2 0',
  copy: 'M9 9h10.5v10.5H9zM5.5 15H4.5V4.5H15v1',
  done: 'm5 12.5 5 5 9.5-11',
  again: 'M19.5 12A7.5 7.5 0 1 1 17 6.4L19.5 9M19.5 4v5h-5',
  edit: 'M5 19v-3.5L15.5 5 19 8.5 8.5 19zM13 7.5l3.5 3.5',
  why: 'M5 6h14M5 12h8.5M5 18h4.5',
  send: 'M12 19V5.5M6 11l6-6 6 6',
  stop: 'M8 8h8v8H8zM9.5 9.5h5v5h-5zM11 11h2v2h-2z',
  close: 'm6 6 12 12M18 6 6 18',
  bin: 'M5 7h14M9.5 7V4.5h5V7M7 7l.8 12.5h8.4L17 7',
};

function icon(name) {
  const [svg, path] = ['svg', 'path'].map((tag) =>
    document.createElementNS('http://www.w3.org/2000/svg', tag));
  path.setAttribute('d', kIcons[name]);
  svg.append(path);
  svg.setAttribute('viewBox', '0 0 24 24');
  svg.setAttribute('aria-hidden', 'true');
  return svg;
}
const setIcon = (node, name) => node.querySelector('path').setAttribute('d', kIcons[name]);

function iconButton(name, label, onclick, kind = 'icon') {
  return make('button', {class: kind, 'aria-label': label, title: label, onclick}, icon(name));
}

// For screen readers. Emptied first, so that the same sentence twice is said twice.
function say(text) {
  $('status').textContent = '';
  setTimeout(() => { $('status').textContent = text; }, 50);
}

let toastTimer = 0;
function toast(text, undo) {
  $('toast-text').textContent = text;
  $('toast-undo').hidden = !undo;
  $('toast-undo').onclick = () => { $('toast').hidePopover(); undo(); };
  $('toast').hidePopover();  // so that it comes up above whatever was opened since
  $('toast').showPopover();
  clearTimeout(toastTimer);
  toastTimer = setTimeout(() => $('toast').hidePopover(), undo ? 10000 : 5000);
}

function openDialog(title, ...nodes) {
  $('dialog-title').textContent = title;
  $('dialog-body').replaceChildren(...nodes);
  $('dialog').showModal();
}
const openHelp = () => openDialog('Help', $('help').content.cloneNode(true));

// A button that copies what `text` gives then.
function copyButton(label, text, kind) {
  const button = iconButton('copy', label, async () => {
    try {
      await navigator.clipboard.writeText(text());
    } catch {  // it is missing where the page comes over plain http from another computer
      const area = make('textarea', {class: 'sr', 'aria-hidden': 'true'});
      area.value = text();
      document.body.append(area);
      area.select();
      document.execCommand('copy');
      area.remove();
      button.focus();
    }
    say('Copied');
    setIcon(button, 'done');
    setTimeout(() => setIcon(button, 'copy'), 1500);
  }, kind);
  return button;
}

// ---- what the browser keeps: settings, and conversations, each under a name of its own
const kMaxChats = 50;
let local = Object.freeze({});
try { local = localStorage ?? local; } catch { /* it is off: nothing is kept, and writing tells */ }

function read(name) {
  try { return JSON.parse(local['nanogpt.' + name] ?? null); } catch { return null; }
}
function write(name, value) {
  try {
    local.setItem('nanogpt.' + name, JSON.stringify(value));
    return true;
  } catch {
    return false;
  }
}

// A chat out of what is stored or in a file, which may be anything; undefined if it is none.
function chatOf(found, id) {
  const {messages, updated} = found ?? {};  // it was a list of messages once
  const turns = !Array.isArray(messages) ? found?.turns : messages.flatMap((message, i) =>
    message?.role === 'user' ? [] : {...message, question: messages[i - 1]?.content,
      answer: message?.content});
  const good = (turn) => typeof turn?.question === 'string' && typeof turn.answer === 'string' &&
    typeof turn.about?.model === 'string';
  if (!Array.isArray(turns) || !turns.length || !turns.every(good)) return undefined;
  return {id, updated: Number(updated) || 0, turns: turns.map(checked)};
}

// What is said of a turn, where it is of the right kind.
function checked({question, answer, text, about}) {
  const numbers = ['seed', 'speed', 'first', 'tokens', 'dropped', 'prompt_tokens', 'total_tokens'];
  const right = (facts) => Object.fromEntries(Object.entries(facts ?? {}).filter(
    ([name, value]) => typeof value === (numbers.includes(name) ? 'number' : 'string')));
  return {question, answer, text: text === true, about: {...right(about), usage: right(about.usage)}};
}

function storedChats() {
  return Object.keys(local).filter((name) => name.startsWith('nanogpt.chat.'))
    .map((name) => chatOf(read(name.slice(8)), name.slice(13))).filter(Boolean)
    .sort((a, b) => b.updated - a.updated);
}
const titleOf = (one) => one.turns[0]?.question.trim().replace(/\s+/g, ' ').slice(0, 60) || 'Chat';
const forget = (one) => delete local['nanogpt.chat.' + one.id];

// Keeps a conversation, and as many of the others as there may be. False if there is no space.
function keep(one) {
  if (!one.turns.length) return false;
  one.updated = Date.now();
  const kept = write('chat.' + one.id, one);
  storedChats().slice(kMaxChats).forEach(forget);
  $('list-note').textContent = kept ? 'Kept in this browser only. Nobody else sees them here.'
    : 'The browser keeps nothing more: this chat ends with the page. Save it to keep it.';
  drawList();
  return kept;
}

// ---- the server
// Its access key stays with this tab, also when the page is loaded again, and out of the address.
let key = '';
try { key = sessionStorage.getItem('nanogpt.key') || ''; } catch { /* it is off */ }
function useKey(value) {
  key = value.replace(/[^\x21-\x7e]/g, '');  // a header can hold nothing else
  history.replaceState(null, '', location.pathname + location.search);
  try { sessionStorage.setItem('nanogpt.key', key); } catch { /* the page alone knows it */ }
}
function takeKey() {
  const found = location.hash.startsWith('#key=');
  try { if (found) useKey(decodeURIComponent(location.hash.slice(5))); } catch { /* not a key */ }
  return found;
}
takeKey();

const tab = fresh();  // tabs take turns

// An answer of the server that is not what was asked for, with the server's own sentence; an error
// without a status means that there was no answer.
const refusal = (message, status, wait) => Object.assign(new Error(message), {status, wait});

async function api(path, body, signal) {
  const headers = {'Content-Type': 'application/json', 'X-Client-Id': tab};
  if (key) headers.Authorization = 'Bearer ' + key;
  const response = await fetch(path, {cache: 'no-store', headers, signal,
    ...(body && {method: 'POST', body: JSON.stringify(body)})});
  if (response.ok) return response;
  const reply = await response.json().catch(() => null);  // not JSON: a proxy's page, perhaps
  if (response.status === 401) {
    banner('This server asks for its access key, printed where the server was started.', true);
  }
  throw refusal(reply?.error?.message || reply?.detail ||
    `the server answered ${response.status} ${response.statusText}`,
    response.status, Number(response.headers.get('Retry-After')));
}
const askFor = async (path, body) => (await api(path, body)).json();

// Reads a stream of events, each a line. One decoder for the whole of it, and only whole lines are
// looked at: the network cuts wherever it likes, also within a letter.
async function readEvents(response, onData, onComment) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = '';
  for (let part; !(part = await reader.read()).done;) {
    const lines = (rest + part.value).split('\n');
    rest = lines.pop();
    for (const line of lines) {
      if (line.startsWith(':')) onComment(line.slice(1).trim());
      else if (line.startsWith('data:')) onData(line.slice(5).trim());
    }
  }
}

function banner(text, asksForKey = false) {
  $('banner').hidden = !text;
  $('key-form').hidden = !asksForKey;
  // Written again, the same text would be read out again.
  if ($('banner-text').textContent !== text) $('banner-text').textContent = text;
}

// Asks for the checkpoints every ten seconds, for they appear while a model is being trained. It
// also shows whether the server is there: if not, it is asked after 1, 2, 4 ... 30 seconds.
let pause = 0, away = false, pollTimer = 0, seen = '';
async function poll() {
  clearTimeout(pollTimer);
  try {
    const list = await askFor('api/v1/inference/models');
    if (away) toast('The server is back.');
    banner('');
    pause = 0;
    away = false;
    const text = JSON.stringify([list.models, list.device]);
    if (text !== seen) {
      props = await askFor('props').catch(() => ({}));
      seen = text;
      takeModels(list);
    }
  } catch (error) {
    away = error.status === undefined;
    if (away) {
      banner('The server cannot be reached. What you wrote is still here; the page keeps trying.');
    } else if (error.status !== 401) {
      banner(error.message);
    }
    pause = Math.min(pause * 2 || 1, 30);
  }
  pollTimer = setTimeout(() => { if (!document.hidden) poll(); }, (pause || 10) * 1000);
}

// ---- models
const kTypes = [['SFT', 'chats'], ['RL', 'chats, trained on with rewards'],
  ['MID', 'between base and chat'], ['BASE', 'continues text']];
let models = [], model = null, device = null, props = {};
const usable = (m) => m.status === 'ready';
const continues = (m) => !!m && (m.type === 'BASE' || m.can_chat === false);
const nameOf = (m) => `${m.tag} · step ${count(m.step)}`;
const lossOf = (m) => m.loss ? `${m.loss.value.toFixed(3)} ${m.loss.unit}` : 'loss not known';
const shapeOf = (m) => m.architecture
  ? `${m.architecture.n_layer} layers × ${count(m.architecture.n_embd)}` : '';
const inShell = (word) => /[^\w\/.~+:@-]/.test(word) ? `'${word.replaceAll("'", `'\\''`)}'` : word;
const listed = (parts) => parts.filter(Boolean).join(' · ');
const badge = (m) => make('span', {class: 'badge'}, m.type);
const best = (m, text = '★ best') => m.best ? make('span', {class: 'best'}, ' ' + text) : null;

const big = (n) => n.toLocaleString('en', {notation: 'compact', compactDisplay: 'long'});
const bytes = (n) => n >= 1e9 ? (n / 1e9).toFixed(2) + ' GB' : (n / 1e6).toFixed(0) + ' MB';

function takeModels(list) {
  models = list.models;
  device = list.device;
  const option = (m) => make('option', {value: m.id, disabled: !usable(m)}, listed(usable(m)
    ? [nameOf(m), lossOf(m), shapeOf(m), m.best && '★ best']
    : [nameOf(m), `cannot be used: ${m.reason || m.status}`]));
  const groups = kTypes.map(([type, what]) => make('optgroup', {label: `${type} · ${what}`},
    ...models.filter((m) => m.type === type).map(option)));
  fill($('model'), ...groups.filter((group) => group.children.length));
  const wanted = (id) => models.find((m) => m.id === id && usable(m));
  choose(wanted(model?.id) || wanted(read('model')) || wanted(list.default) ||
    models.find(usable) || null);
  const name = deviceName();
  $('device').hidden = false;
  $('device').classList.toggle('fallback', device.type !== 'cuda');
  $('device').textContent = name + (device.fallback_reason ? ' — why?' : '');
}

function choose(m) {
  model = m;
  $('model').disabled = !m;
  if (m) $('model').value = m.id;
  $('picked-name').replaceChildren(...(m ? [badge(m), ' ' + nameOf(m)] : ['No model']));
  $('picked-loss').textContent = m ? listed([lossOf(m), m.best && '★ best']) : '';
  const label = !m ? 'No model to write to'
    : continues(m) ? 'Write the beginning of a text' : `Message ${m.tag}`;
  $('text').placeholder = label;
  $('text').ariaLabel = label;
  drawAbout();
  drawEmpty();
  drawMeter();
  drawSend();
}

function pick(m) {
  choose(m);
  write('model', m.id);
}

function deviceName() {
  const chip = device.compute_capability && 'sm_' + device.compute_capability.replace('.', '');
  return listed([device.name || 'CPU', device.type === 'cuda' && chip, device.dtype]);
}

function openDevice() {
  const what = device.type === 'cuda' ? 'graphics card' : 'processor';
  openDialog('What computes here', make('p', {}, `The models run on the ${what}: ${deviceName()}.`),
    make('p', {class: 'note'}, device.fallback_reason
      ? `The graphics card is not used: ${device.fallback_reason}`
      : 'Answers come from the computer this page comes from, and from no other.'));
}

function lossSentence({value, unit}) {
  return unit.startsWith('nats')
    ? `On text it was not trained on, the model is as unsure about the next token as if it had
      to guess among ${Math.exp(value).toFixed(1)} equally likely ones. Lower is better.`
    : `On text it was not trained on, the model needs ${value.toFixed(3)} bits for each byte, and
      a letter of English is one byte. Lower is better.`;
}

function factsList(pairs) {
  const known = pairs.filter(([, value]) => value != null && value !== '');
  return make('dl', {class: 'facts-list'}, ...known.flatMap(([name, value]) =>
    [make('dt', {}, name), make('dd', {}, String(value))]));
}

function drawAbout() {
  const m = model;
  if (!m) {
    $('about').replaceChildren(make('p', {class: 'note'}, 'No checkpoint can be used yet.'));
    return;
  }
  const a = m.architecture || {};
  const metrics = Object.entries(m.metrics || {}).filter(([, value]) => typeof value === 'number');
  $('about').replaceChildren(
    make('h2', {}, badge(m), ' ' + nameOf(m)),
    make('p', {class: 'note'}, continues(m)
      ? 'This model continues text; it was not trained to chat.' : 'This model was trained to chat.'),
    make('div', {class: 'card loss'},
      make('b', {}, m.loss ? m.loss.value.toFixed(3) : '—'), ' ' + (m.loss ? m.loss.unit : ''),
      make('div', {class: 'note'}, best(m, `★ best ${m.type} in ${m.loss?.unit}`)),
      make('p', {class: 'note'}, m.loss ? lossSentence(m.loss)
        : 'No validation loss was saved with this checkpoint.')),
    factsList([
      ['Parameters', m.parameters && big(m.parameters)],
      ['Layers × width', a.n_layer && `${a.n_layer} × ${count(a.n_embd)}`],
      ['Heads × size', a.n_head && `${a.n_head} × ${a.head_dim}`],
      ['Key-value heads', a.n_kv_head],
      ['Context', a.sequence_len && plural(a.sequence_len, 'token')],
      ['Vocabulary', a.vocab_size && plural(a.vocab_size, 'token')],
      ['Window pattern', a.window_pattern],
      ['Format', a.generation && a.generation + (a.saved_by ? ` (${a.saved_by})` : '')],
      ...metrics.map(([name, value]) => [name.replaceAll('_', ' '), +value.toFixed(4)]),
      ['Saved', m.modified && new Date(m.modified).toLocaleString('en-GB',
        {dateStyle: 'medium', timeStyle: 'short'})],
      ['File size', bytes(m.size_bytes)],
      ['In memory', m.memory_bytes && bytes(m.memory_bytes)],
      ['Status', m.status + (m.loaded ? ', loaded' : '')],
      ['File', m.file.replaceAll('/', '/\u200b')],  // a line may end after a slash
      ['Runs on', deviceName()],
      ['GPU not used', device.fallback_reason],
    ]));
  // Without a checkpoint of one's own the terminal too has the sample, which is named by nothing.
  const {base_dir: base, sample} = props;
  const flags = sample ? '' : base && !m.file.includes('/') ? ` --model ${inShell(`${base}/${m.file}`)}`
    : ` -i ${m.source} -g ${m.tag} -s ${m.step}${base ? ` --base-dir ${inShell(base)}` : ''}`;
  const [command, path, example] = continues(m)
    ? [`sample${flags} -p "Once upon a time"`, 'completions', {prompt: 'Once upon a time'}]
    : [`chat${flags}`, 'chat/completions',
      {messages: [{role: 'user', content: 'Why is the sky blue?'}]}];
  $('cli').textContent = `nanogpt ${command}`;
  $('curl').textContent = `curl ${location.origin}/v1/${path} ` +
    (key ? '-H "Authorization: Bearer $KEY" ' : '') +
    `-H 'Content-Type: application/json' -d '${JSON.stringify({model: m.id, ...example})}'`;
}

function openAll() {
  const cells = (tag, values) => values.map((value) => make(tag, {}, ...[value].flat()));
  const rows = models.map((m) => make('tr', {class: m === model && 'current'}, ...cells('td', [
    badge(m),
    !usable(m) ? m.tag : make('button', {'aria-label': `Use ${m.type} ${nameOf(m)}`,
      onclick: () => { pick(m); $('dialog').close(); }}, m.tag),
    count(m.step), [lossOf(m), best(m)], shapeOf(m), m.parameters && big(m.parameters),
    usable(m) ? m.status + (m.loaded ? ', loaded' : '') : `${m.status}: ${m.reason || ''}`])));
  openDialog('All checkpoints',
    make('p', {class: 'note'}, `★ marks the lowest loss among checkpoints of the same type whose loss
      has the same unit. Losses with different units cannot be compared: nats per token depend on the
      tokenizer, bits per byte do not.`),
    make('div', {class: 'table', tabindex: '0', role: 'region', 'aria-label': 'All checkpoints'},
      make('table', {}, make('tr', {}, ...cells('th', ['Type', 'Model', 'Step', 'Validation loss',
        'Architecture', 'Parameters', 'Status'])), ...rows)));
}

// ---- settings
const kSettings = {
  temperature: {label: 'Temperature', usual: 0.8, min: 0, max: 2, step: 0.05, slider: true,
    what: `How daring the choice of words is. At 0 the model always takes the likeliest token; the
      higher, the more often an unlikely one.`},
  top_k: {label: 'Top-k', usual: 50, min: 0, max: 200, step: 1, slider: true,
    what: 'Only the k likeliest tokens can be chosen at each step. 0 is off: every token can.'},
  max_tokens: {label: 'Max tokens', usual: 512, min: 1, max: 4096, step: 1,
    what: `The answer is cut after this many tokens. A token is a piece of a word, about four
      letters of English.`},
  seed: {label: 'Seed', usual: null, min: 0, max: Number.MAX_SAFE_INTEGER, step: 1,
    what: `Where the dice start. The same seed, question and settings give the same answer again;
      empty means new dice each time.`},
  system: {label: 'System text', usual: '',
    what: 'Put in front of your first message. Small models follow it only loosely.'},
};
const settings = {};

// Within its limits, if it is a number; nothing is the usual value, and for the seed no value.
function set(name, value, from) {
  const {usual, min, max} = kSettings[name], number = Number(value);
  settings[name] = name === 'system' ? (typeof value === 'string' ? value : usual)
    : value === '' || value == null || !Number.isFinite(number) ? usual
    : Number(Math.min(Math.max(number, min), max).toFixed(name === 'temperature' ? 2 : 0));
  write('settings', settings);
  for (const field of [$(name), $(name + '-slider')]) {
    if (field && field !== from) field.value = settings[name] ?? '';
  }
  $('top_k-off').hidden = settings.top_k !== 0;
}

function makeSetting([name, {label, usual, min, max, step, slider, what}]) {
  const rules = {min, max, step, oninput: (event) => set(name, event.target.value, event.target),
    onchange: (event) => set(name, event.target.value)};
  // The sentence of explanation comes on demand.
  const text = make('p', {id: name + '-hint', class: 'note', hidden: true}, what);
  const hint = make('button', {class: 'hint', 'aria-expanded': 'false', 'aria-controls': text.id,
    'aria-label': `What is ${label.toLowerCase()}?`, onclick: () => {
      text.hidden = !text.hidden;
      hint.setAttribute('aria-expanded', String(!text.hidden));
    }}, '?');
  const field = {id: name, 'aria-describedby': text.id, ...rules};
  const number = min !== undefined;
  return make('div', {class: 'control'},
    make('div', {class: 'row'}, make('label', {for: name}, label), hint,
      name === 'top_k' ? make('span', {id: 'top_k-off', class: 'note'}, 'off') : null,
      number ? make('input', {type: 'number', placeholder: usual === null && 'random', ...field}) : null),
    number ? null : make('textarea', {rows: 3, placeholder: 'None', ...field}),
    slider ? make('input', {type: 'range', id: name + '-slider', 'aria-label': `${label}, slider`,
      ...rules}) : null,
    text);
}

function openSettings() {
  $('settings').append(...Object.entries(kSettings).map(makeSetting));
  const kept = read('settings') || {};
  for (const name of Object.keys(kSettings)) set(name, kept[name] ?? kSettings[name].usual);
  $('reset').onclick = () => {
    for (const name of Object.keys(kSettings)) set(name, kSettings[name].usual);
    say('Settings are the defaults again');
  };
}

// ---- a small part of Markdown, made node by node
const kCall = new RegExp(
  /<\|python_start\|>(?<sum>[^<]{0,400})(?<end><\|python_end\|>)?/.source +
  /(?:<\|output_start\|>(?<result>[^<]{0,200})(?:<\|output_end\|>)?)?/.source, 'g');

// A call, `code`, **bold**, *italics*; not snake_case, not 3*4. A mark without its partner within
// 500 letters, and before the next call, is an ordinary letter: so the time stays linear.
const kWithin = String.raw`(?:(?!<\|).){1,500}?`;
const kInline = new RegExp([kCall.source,
  String.raw`(?<!\x60)(?<ticks>\x60+)(?!\x60)(?<code>${kWithin})(?<!\x60)\k<ticks>(?!\x60)`,
  String.raw`(?<![\w*])(?<mark>\*\*|__|\*(?!\*)|_(?!_))(?=\S)(?<inner>${kWithin})(?<!\s)` +
    String.raw`\k<mark>(?![\w*])`,
].join('|'), 'gs');

// Calculator calls as a person reads them; whole and unfinished ones. Of an empty one, nothing.
const callText = ({sum, end, result}) =>
  result !== undefined ? `${sum} = ${result}` : sum && `${sum} ${end ? '= ?' : '…'}`;
const readable = (text) => text.replace(kCall, (...found) =>
  callText(found.at(-1)) && `[${callText(found.at(-1))}]`);

function inline(text, into) {
  let at = 0;
  for (const {0: all, index, groups} of text.matchAll(kInline)) {
    const {sum, code, mark, inner} = groups;
    into.append(text.slice(at, index),
      sum !== undefined
        ? callText(groups) && make('span', {class: 'calc'}, make('b', {}, 'calculator:'),
          ' ' + callText(groups))
        : mark ? inline(inner, make(mark.length === 2 ? 'strong' : 'em')) : make('code', {}, code));
    at = index + all.length;
  }
  into.append(text.slice(at));
  return into;
}

// The blocks of a text: fenced code, a heading, a list, a paragraph.
const kItem = / {0,12}(?:[-*+]|\d{1,9}[.)]) /.source;
const kBlock = new RegExp([  // \x60 is `
  String.raw`^ {0,3}(?<fence>\x60{3,}|~{3,})(?=[^\x60\n]*$) *(?<language>[\w+#.-]*).*` +
    String.raw`(?<code>(?:\n(?! *\k<fence>).*)*)(?:\n.*)?`,
  '^(?<level>#{1,6}) +(?<title>.+)',
  String.raw`^(?<list>${kItem}.*(?:\n(?:${kItem}|[ \t]+\S).*)*)`,
  String.raw`^.*\S.*(?:\n(?!${kItem}| {0,3}(?:\x60{3}|~{3})|#{1,6} )(?=.*\S).*)*`,
].join('|'), 'gm');
const kMostDrawn = 100000;  // longer texts are shown as they stand

function blockNode(source, {code, language, level, title, list}) {
  if (source.length > kMostDrawn) return make('p', {}, source);
  if (code !== undefined) return codeNode(code.slice(1), language);
  if (title) return inline(title, make(level.length < 3 ? 'h3' : 'h4'));
  return list ? listNode(list) : inline(source, make('p'));
}

function listNode(source) {
  const open = [];  // the lists an item of this depth is in, outermost first
  for (const item of source.split(new RegExp(`\n(?=${kItem})`))) {
    const [, {length: depth}, number, text] = /^( *)(?:[-*+]|(\d+)[.)]) +(.*)$/s.exec(item);
    while (open.length > 1 && open.at(-1).depth > depth) open.pop();
    if (!open.length || open.at(-1).depth + 1 < depth) {
      const node = make(number ? 'ol' : 'ul', {start: number !== '1' && number});
      open.at(-1)?.node.lastChild.append(node);
      open.push({depth, node});
    }
    open.at(-1).node.append(make('li', {}, inline(text.replace(/\n\s+/g, '\n'), make('span'))));
  }
  return open[0].node;
}

function codeNode(text, language) {
  return make('div', {class: 'code'}, make('pre', {tabindex: '0', 'aria-label': `Code ${language}`},
    make('code', {}, text)), copyButton('Copy this code', () => text));
}

// Shows text in a node, and leaves the blocks alone that have not changed: a selection stays.
function showMarkdown(answer, into) {
  const text = answer.replace(/\r\n?|[\u2028\u2029]/g, '\n');
  const found = text.length > kMostDrawn ? [{0: text, groups: {}}] : [...text.matchAll(kBlock)];
  found.forEach(({0: source, groups}, i) => {
    const old = into.children[i];
    if (old?.source === source) return;
    const node = Object.assign(blockNode(source, groups), {source});
    if (old) old.replaceWith(node);
    else into.append(node);
  });
  while (into.children.length > found.length) into.lastChild.remove();
}

// ---- the conversation
// chat.turns: {question, answer, about}, about: model, seed, usage and so on. `text` is set where a
// base model continued the question.
let chat = {id: fresh(), turns: []};
let run = null;           // the answer being written: {turn, controller, ...}
const views = new Map();  // turn -> its nodes

function answerButtons(turn) {
  const {text, answer, about} = turn, usage = about.usage || {};
  const speed = about.speed && `${about.speed.toFixed(about.speed < 10 ? 1 : 0)} tok/s`;
  const whyButton = make('button', {'aria-pressed': 'false', 'aria-label': 'Why these words?',
    onclick: () => toggleWhy(turn, whyButton)}, icon('why'), 'Why', make('span', {}, 'these words?'));
  return [
    copyButton('Copy', () => (text ? turn.question : '') + readable(answer), ''),
    iconButton('again', 'Regenerate', () => again(turn), ''),
    text && iconButton('edit', 'Edit the beginning', () => edit(turn), ''),
    !text && answer && whyButton,
    about.tokens && make('details', {class: 'stats'},
      make('summary', {}, listed([plural(about.tokens, 'token'), speed])),
      factsList([
        ['Model', about.model], ['Seed', about.seed],
        ['Ended', about.error ? 'by an error' : {stop: 'by the model', length: 'at the limit',
          stopped: 'by you'}[about.finish] || about.finish],
        ['Prompt', usage.prompt_tokens && plural(usage.prompt_tokens, 'token')],
        ['Answer', plural(about.tokens, 'token')],
        ['First token after', about.first && count(Math.round(about.first)) + ' ms'],
        ['Speed', about.speed && about.speed.toFixed(1) + ' tokens/s'],
      ]),
      about.seed === undefined ? '' : make('button', {onclick: () => {
        set('seed', about.seed);
        toast(`The next answers use the seed ${about.seed}.`);
      }}, 'Use this seed again')),
  ].filter(Boolean);
}

function drawTurn(turn) {
  const found = models.find((m) => m.id === turn.about.model);
  const view = {
    body: make('div', {class: 'body', dir: 'auto'}),
    why: make('div'),
    wait: make('div', {class: 'waiting'}),
    trouble: make('div'),
    acts: make('div', {class: 'acts'}),
  };
  if (turn.text) {
    view.rest = make('span');
    view.body.append(make('p', {}, make('span', {class: 'prompt'}, turn.question), view.rest));
  } else {
    view.question = make('article', {class: 'turn user', 'aria-label': 'You'},
      make('div', {class: 'bubble', dir: 'auto'}, turn.question),
      make('div', {class: 'acts'}, iconButton('edit', 'Edit this message', () => edit(turn), ''),
        copyButton('Copy', () => turn.question, '')));
    $('log').append(view.question);
  }
  view.node = make('article', {class: 'turn', 'aria-label': 'Answer'},
    make('div', {class: 'who'}, icon('logo'),
      found ? `${found.type} ${nameOf(found)}` : turn.about.model),
    view.body, view.why, view.wait, view.trouble, view.acts);
  $('log').append(view.node);
  views.set(turn, view);
  draw(turn);
}

function draw(turn) {
  const {answer, about} = turn, view = views.get(turn), live = run?.turn === turn;
  // Half of a mark such as <|python_start|> is not shown while the other half may still come.
  const text = live ? answer.replace(/<(\|\w{0,14}\|?)?$/, '') : answer;
  if (turn.text) view.rest.textContent = text;
  else showMarkdown(text, view.body);
  view.body.classList.toggle('live', live && text !== '');
  view.wait.hidden = !live || run.tokens > 0;
  view.acts.hidden = live;
  view.acts.replaceChildren(...(live ? [] : answerButtons(turn)));
  const full = !live && fills(turn);
  const note = live ? '' : about.error || (about.finish === 'stopped' ? 'Stopped.'
    : full ? `The context is full: it holds ${plural(full, 'token')}.`
    : about.finish === 'length' ? `Cut off after ${plural(about.tokens || 0, 'token')}.`
    : answer ? '' : 'The model had nothing to say.');
  view.trouble.hidden = !note;
  view.trouble.className = about.error ? 'trouble' : 'trouble calm';
  view.trouble.replaceChildren(note,
    full ? make('button', {onclick: newChat}, 'New chat')
    : answer ? make('button', {onclick: () => proceed(turn)}, 'Continue') : '',
    about.error || !answer ? make('button', {onclick: () => regenerate(turn)}, 'Try again') : '');
}

function drawChat() {
  views.clear();
  $('log').replaceChildren();
  chat.turns.forEach(drawTurn);
  drawDropped();
  drawEmpty();
  drawMeter();
  toEnd();
}

// The server leaves out the oldest messages if the context is full, and says how many.
function drawDropped() {
  $('log').querySelector('.notice')?.remove();
  const last = chat.turns.at(-1);
  if (!last?.about.dropped) return;
  views.get(seenBy(last)[Math.ceil(last.about.dropped / 2)])?.question?.before(
    make('p', {class: 'notice'},
      'What stands above no longer fits into the context: the model does not see it.'));
}

const kExamples = {
  chat: [['Why is the sky blue?', 'Something it should know'],
    ['How many r are in strawberry?', 'It may use its calculator'],
    ['Tell me a short story about a robot.', 'Another one each time']],
  text: [['The capital of France is', 'A fact to complete'],
    ['Once upon a time, there was a small robot who', 'A story to go on with'],
    ['Ingredients:\n- 2 eggs\n- 200 g flour\n-', 'A list to fill']],
};

function drawEmpty() {
  const m = model;
  $('log').hidden = chat.turns.length === 0;
  $('empty').hidden = !$('log').hidden || !seen;  // nothing is said before the list is known
  $('empty-none').hidden = !!m;
  if (!m) {
    $('empty-title').textContent = models.length ? 'No checkpoint can be used yet'
      : 'There is no checkpoint yet';
    const why = (one) => `${one.id}: ${one.reason || one.status}`;
    $('empty-facts').textContent = listed(models.map(why));
    $('empty-text').textContent = '';
    $('examples').replaceChildren();
    return;
  }
  $('empty-title').textContent = continues(m) ? `Let ${m.tag} continue a text`
    : `Ask ${m.tag} something`;
  $('empty-facts').replaceChildren(badge(m), ' ' + listed(['step ' + count(m.step),
    m.parameters && big(m.parameters) + ' parameters', lossOf(m)]), best(m) || '');
  $('empty-text').textContent = continues(m)
    ? 'This model continues text; it was not trained to chat. Give it a beginning, not a question.'
    : `A small language model, trained with nanochat. It writes what sounds likely, which is often
      wrong. Ask twice, and look at why it chose its words.`;
  fill($('examples'), ...kExamples[continues(m) ? 'text' : 'chat'].map(([text, why]) =>
    make('button', {class: 'card', onclick: () => send(text)}, text,
      make('small', {class: 'note'}, why))));
}

// Tokens of the context in use: as the last answer's count says, and those coming in now.
function drawMeter() {
  const size = model?.architecture?.sequence_len;
  const last = chat.turns.findLast((turn) => turn.about.usage?.total_tokens);
  const used = (last?.about.usage.total_tokens || 0) + (run?.tokens || 0);
  $('meter').hidden = !size || !used;
  $('meter').value = size ? Math.min(used / size, 1) : 0;
  $('meter-text').textContent = !size ? '' : used
    ? `${run ? 'about ' : ''}${count(used)} of ${plural(size, 'token')}`
    : `context: ${plural(size, 'token')}`;
  $('hint').textContent = continues(model) ? 'The model goes on where you stop.'
    : 'It is often wrong. Check what matters.';
}

function drawSend() {
  setIcon($('send'), run ? 'stop' : 'send');
  $('send').ariaLabel = run ? 'Stop' : 'Send';
  $('send').title = run ? 'Stop (Esc)' : 'Send';
  $('send').disabled = !run && (!model || $('text').value.trim() === '');
  $('log').setAttribute('aria-busy', String(!!run));
}

// ---- scrolling: along with the answer, unless the reader went elsewhere
let following = true;
const atEnd = () => $('scroll').scrollHeight - $('scroll').scrollTop - $('scroll').clientHeight < 40;
function toEnd() {
  following = true;
  stay();
}
function stay() {
  if (following) $('scroll').scrollTop = $('scroll').scrollHeight;
  $('newest').hidden = following || atEnd();
}

// ---- asking
// What the model is to see with this turn: no continued texts, no question without an answer.
const seenBy = (turn) => chat.turns.slice(0, chat.turns.indexOf(turn) + 1)
  .filter((one) => one === turn || (!one.text && one.answer));

// The context's size if an answer ends there, and nothing before its question could be left out.
function fills(turn) {
  const {model: id, finish, usage, dropped} = turn.about;
  const size = models.find((m) => m.id === id)?.architecture?.sequence_len;
  return finish === 'length' && usage?.total_tokens >= size &&
    (turn.text || seenBy(turn).length - Math.ceil((dropped || 0) / 2) < 2) && size;
}

function wordsOf(turns, system) {
  const words = turns.flatMap(({question, answer}) => [{role: 'user', content: question},
    {role: 'assistant', content: answer}]).filter((message) => message.content);
  return system ? [{role: 'system', content: system}, ...words] : words;
}

// The server takes no more than this, and says so of a question that is too long.
const fits = (messages) => messages.length <= 500 &&
  messages.slice(0, -1).every((message) => message.content.length <= 8000) &&
  messages.reduce((sum, message) => sum + message.content.length, 0) <= 32000;

function requestFor(turn) {
  const {about} = turn, {temperature, top_k, max_tokens} = settings;
  about.seed = settings.seed ?? Math.floor(Math.random() * 2 ** 32);
  about.dropped = 0;
  const body = {model: about.model, temperature, top_k, max_tokens, seed: about.seed};
  if (turn.text) {
    return ['v1/completions', {...body, prompt: turn.question + turn.answer, stream: true,
      stream_options: {include_usage: true}}];
  }
  // A long conversation loses its beginning; the server leaves out more if the context is full.
  const turns = seenBy(turn);
  while (turns.length > 1 && !fits(wordsOf(turns, about.system))) {
    turns.shift();
    about.dropped += 2;
  }
  return ['chat/completions', {...body, messages: wordsOf(turns, about.system)}];
}

function waitLine(text, percent) {
  const {wait} = views.get(run.turn);
  wait.hidden = false;
  wait.replaceChildren(make('progress', {max: 100, value: percent, 'aria-label': text}), text);
  stay();
}

function onComment(text) {
  const [word, n] = text.split(' ');
  if (word === 'queued') waitLine(Number(n) > 0 ? `waiting, ${n} before you` : 'next in the queue');
  else if (word === 'loading') waitLine(`loading the model… ${n}%`, n);
  else if (word === 'reading') waitLine(`reading your prompt… ${n}%`, n);
}

// Draws at most sixty times a second, and in long answers less often than drawing takes.
function drawSoon(job) {
  job.timer ||= setTimeout(() => {
    const begin = performance.now();
    draw(job.turn);
    drawMeter();
    stay();
    job.rest = Math.min((performance.now() - begin) * 4, 1000);
    job.timer = 0;
  }, Math.max(job.rest, 16));
}

// One request, read to its end. Throws if it was refused or broke off.
async function stream(job) {
  const {turn} = job, {about} = turn, begin = performance.now();
  let ended = false;
  const response = await api(...requestFor(turn), job.controller.signal);
  job.begun = true;
  await readEvents(response, (data) => {
    if (run !== job) throw new Error('stopped');
    const event = data === '[DONE]' ? {done: true} : JSON.parse(data);
    if (event.error) throw refusal(event.error.message, 0);
    const choice = event.choices?.[0];
    const piece = event.token ?? choice?.text;
    if (piece) {
      const now = performance.now() - begin;
      if (!job.tokens++) {
        about.first = now;
        say('Answer started');
      }
      turn.answer += piece;
      about.tokens = job.before + job.tokens;
      // Tokens may come in one packet: too short a time says nothing about the speed.
      const took = now - about.first;
      about.speed = job.tokens > 9 && took > 150 ? (job.tokens - 1) / took * 1000 : 0;
      drawSoon(job);
    }
    ended ||= event.done;
    about.finish = event.finish_reason || choice?.finish_reason || about.finish;
    about.dropped += event.dropped_messages || 0;
    if (event.usage) {
      about.usage = event.usage;
      about.tokens = job.before + event.usage.completion_tokens;
    }
  }, onComment);
  if (!ended) throw new TypeError('closed too early');
}

// Gets an answer into `turn`, the last of the chat. A server that is busy is asked again when it
// says, up to five times.
async function answer(turn) {
  const {about} = turn;
  const job = run = {turn, controller: new AbortController(), tokens: 0, rest: 0,
    before: about.tokens || 0};
  delete about.error;
  delete about.finish;
  drawSend();
  draw(turn);
  waitLine('waiting for the server');
  toEnd();
  for (let tries = 1; run === job; ++tries) {
    try {
      await stream(job);
      break;
    } catch (error) {
      if (run !== job) return;  // stopped
      if ([429, 503].includes(error.status) && error.wait && tries <= 5) {
        for (let left = Math.min(error.wait, 60); left > 0 && run === job; --left) {
          waitLine(`${error.message}. Trying again in ${left} s (${tries} of 5)`);
          await new Promise((resolve) => setTimeout(resolve, 1000));
        }
        continue;
      }
      about.error = error.status !== undefined ? error.message
        : job.begun ? `Connection lost after ${plural(job.tokens, 'token')}.`
        : 'The server cannot be reached.';
      if (error.status === undefined) poll();
      break;
    }
  }
  if (run === job) finish();
}

function finish() {
  const {turn, timer} = run;
  clearTimeout(timer);
  run = null;
  draw(turn);
  drawDropped();
  drawMeter();
  drawSend();
  stay();
  keep(chat);
  const words = turn.answer.split(/\s+/).filter(Boolean).length;
  say(turn.about.error ? `Error: ${turn.about.error}` : turn.about.finish === 'stopped' ? 'Stopped'
    : `Answer complete, ${plural(words, 'word')}`);
}

function stop() {
  if (!run) return;
  run.turn.about.finish = 'stopped';
  run.controller.abort();
  finish();
}

// Puts a question and an empty answer at the end, and asks.
function ask(question) {
  const turn = {question, answer: '', text: continues(model), about: {model: model.id}};
  if (!turn.text) turn.about.system = settings.system.trim();
  chat.turns.push(turn);
  keep(chat);
  drawTurn(turn);
  drawEmpty();
  focusBox();
  answer(turn);
}

function send(question) {
  if (run) throw new Error('The model is still writing. Esc stops it.');
  if (!model) throw new Error('There is no model to write to.');
  if (question.trim() !== '') ask(question.trimEnd());
}

// What comes after this turn goes, and can be brought back.
function cutAfter(turn) {
  stop();
  const cut = chat, before = chat.turns, left = chat.turns.indexOf(turn) + 1;
  chat.turns = before.slice(0, left);
  if (left === before.length) return;
  toast('The messages after it were removed.', () => {
    openChat({...cut, turns: before});
    keep(chat);
  });
}

function regenerate(turn, question = turn.question) {
  if (!model) return;
  cutAfter(turn);
  chat.turns.pop();
  drawChat();
  ask(question);
}

// The same question once more. Where that cannot give another answer, it is said.
function again(turn) {
  const last = turn === chat.turns.at(-1), {temperature, seed} = settings;
  regenerate(turn);
  const [why, remedy] = temperature === 0 ? ['At temperature 0', 'Raise it']
    : seed !== null ? [`With the seed ${seed}`, 'Empty it'] : [];
  if (why && last) toast(`${why} there is one answer only. ${remedy} in the settings for others.`);
}

function proceed(turn) {
  cutAfter(turn);
  drawChat();
  focusBox();
  answer(turn);
}

// A question becomes a box to write in; sending it asks anew from there.
function edit(turn) {
  const node = views.get(turn).question || views.get(turn).node, old = [...node.children];
  const area = make('textarea', {'aria-label': 'Your message', rows: 3, dir: 'auto'});
  area.value = turn.question;
  const back = () => {
    node.replaceChildren(...old);
    node.querySelector('.acts button')?.focus();
  };
  const again = () => { if (area.value.trim()) regenerate(turn, area.value.trimEnd()); };
  node.replaceChildren(make('div', {class: 'editing', onkeydown: (event) => {
    if (event.key === 'Escape') {
      event.stopPropagation();
      back();
    } else if (entersText(event)) {
      event.preventDefault();
      again();
    }
  }}, area, make('div', {class: 'row'}, make('button', {onclick: back}, 'Cancel'),
    make('button', {class: 'solid', onclick: again}, 'Send'))));
  area.style.height = Math.min(area.scrollHeight + 4, 400) + 'px';
  area.focus();
  area.setSelectionRange(area.value.length, area.value.length);
}

// ---- why these words?
function visible(token) {
  if (token.text == null) {
    return token.bytes.map((b) => b.toString(16).padStart(2, '0')).join(' ') + ' (bytes)';
  }
  return token.text.replaceAll(' ', '␣').replaceAll('\n', '↵').replaceAll('\t', '⇥')
    .replace(/[\u0000-\u001f\u007f-\u009f\u200b-\u200f\u202a-\u202e\u2066-\u2069]/g,
      (c) => '\\u' + c.charCodeAt(0).toString(16).padStart(4, '0'));
}
const percent = (p) => p >= 0.9995 ? '> 99.9%' : p < 0.001 ? '< 0.1%' : (p * 100).toFixed(1) + '%';

function askWhy(turn, position) {
  const {model, system, dropped} = turn.about;
  const messages = wordsOf(seenBy(turn).slice(Math.ceil(dropped / 2)), system);
  return askFor('api/v1/inference/why', {model, messages, position});
}

// The answer, cut into tokens to choose from, takes the place of the answer; or goes again.
async function toggleWhy(turn, button) {
  const {body, why} = views.get(turn);
  if (why.firstChild) {
    why.replaceChildren();
  } else {
    try {
      const {tokens} = await askWhy(turn, null);
      if (turn.about.finish !== 'stop') tokens.pop();  // it was cut off: nobody chose the end
      const card = make('div', {class: 'note'},
        'Each box is a token. Choose one to see the ten likeliest there.');
      why.replaceChildren(tokenStrip(tokens, (i) => showToken(turn, i, tokens, card)), card);
      say('Choose a token to see what else was likely');
    } catch (error) {
      toast(error.message);
    }
  }
  body.hidden = !!why.firstChild;
  button.setAttribute('aria-pressed', String(body.hidden));
}

// One stop of the Tab key; arrows lead from token to token.
function tokenStrip(tokens, onchoose) {
  const buttons = tokens.map((token, i) => make('button', {'aria-pressed': 'false',
    tabindex: i ? '-1' : '0', onclick: () => {
      for (const one of buttons) one.setAttribute('aria-pressed', String(one === buttons[i]));
      onchoose(i);
    }, onfocus: () => { for (const one of buttons) one.tabIndex = one === buttons[i] ? 0 : -1; }},
  token.text == null ? make('span', {class: 'mark'}, visible(token))
    : token.text.replaceAll('\n', '↵\n')));
  return make('div', {class: 'tokens', dir: 'auto', role: 'group',
    'aria-label': 'Tokens of the answer', onkeydown: (event) => {
      const now = buttons.indexOf(document.activeElement);
      const to = {ArrowRight: now + 1, ArrowLeft: now - 1, Home: 0, End: -1}[event.key];
      if (to === undefined) return;
      event.preventDefault();
      buttons.at(to % buttons.length).focus();
    }}, ...buttons);
}

async function showToken(turn, position, {length, [position]: token}, card) {
  card.wanted = position;
  try {
    const {chosen, candidates} = token.forced ? {chosen: token} : await askWhy(turn, position);
    if (card.wanted !== position) return;  // something else was chosen
    card.className = 'why card';
    card.replaceChildren(
      make('h3', {}, `Token ${position + 1} of ${length}: `, make('code', {}, visible(chosen))),
      candidates ? candidateTable(chosen, candidates)
        : make('p', {class: 'note'}, 'Written by the calculator: the model did not choose it.'));
    say(`${visible(chosen)} ` + (candidates ? `had ${percent(chosen.probability)}`
      : 'was written by the calculator'));
  } catch (error) {
    toast(error.message);
  }
}

function candidateTable(chosen, candidates) {
  const most = Math.max(...candidates.map((c) => c.probability));
  const all = candidates.some((c) => c.id === chosen.id) ? candidates : [...candidates, chosen];
  const rows = all.map((c) => {
    const bar = make('div', {class: 'bar'}), mine = c.id === chosen.id;
    bar.style.width = `${c.probability / most * 100}%`;
    return make('tr', {class: mine && 'chosen'},
      make('th', {scope: 'row'}, make('code', {}, visible(c)), mine ? ' ✓' : null,
        mine ? make('span', {}, ' chosen') : null),
      make('td', {}, bar), make('td', {}, percent(c.probability)));
  });
  const others = 1 - candidates.reduce((sum, c) => sum + c.probability, 0);
  return make('table', {}, make('caption', {class: 'note'}, `All other tokens together:
    ${percent(Math.max(others, 0))}. These are the model's own probabilities, before temperature and
    top-k. ␣ is a space, ↵ a new line.`), ...rows);
}

// ---- the walkthrough
async function walk(event) {
  event.preventDefault();
  const out = (...nodes) => $('walk-out').replaceChildren(...nodes);
  const button = $('walk-form').querySelector('button');
  button.disabled = true;
  out(make('p', {}, 'The model reads the text…'));
  try {
    const body = {model: model.id, prompt: $('walk-text').value};
    if ($('walk-layer').value) body.layers = [Number($('walk-layer').value)];
    const {tokens, prefill, decode, pictures} = await askFor('api/v1/inference/walk', body);
    const cost = ({us, bound}) => `${(us / 1000).toFixed(2)} ms, set by ${bound === 'memory'
      ? 'how fast memory is read' : 'how fast it multiplies'}`;
    out(make('p', {}, `${plural(tokens.length, 'token')} read at once: ${cost(prefill)}. One more:
      ${cost(decode)}.`), ...pictures.slice(1).map(shot));
    say('The walk is done');
  } catch (error) {
    out(make('p', {}, error.message));
  }
  button.disabled = false;
}

function shot({title, alt, url, width, height}) {
  const src = url.slice(1);  // below wherever this page stands
  return make('button', {'aria-label': 'Larger: ' + title,
    onclick: () => openDialog(title, make('img', {src, alt}))}, make('img', {src, alt, width, height}));
}

// ---- the list of conversations
function drawList() {
  const all = storedChats();
  $('list').replaceChildren(...all.map((one) => make('li', {class: one.id === chat.id && 'current'},
    make('button', {class: 'open', 'aria-current': one.id === chat.id && 'true',
      onclick: () => one.id === chat.id ? closeOver() : openChat(one)}, titleOf(one)),
    iconButton('bin', `Delete ${titleOf(one)}`, () => discard([one])))));
  $('delete-all').textContent = `Delete all chats (${all.length})`;
  $('list-none').hidden = all.length > 0;
}

// Takes conversations away; for a while they can be brought back.
function discard(chats) {
  const open = chats.some((one) => one.id === chat.id);
  if (open) stop();  // which keeps what is written
  const gone = chats.map((one) => one.id === chat.id ? chat : one);
  gone.forEach(forget);
  if (open) newChat();
  drawList();
  $('new').focus();
  toast(`${plural(gone.length, 'chat')} deleted.`, () => {
    for (const one of gone) write('chat.' + one.id, one);
    drawList();
  });
}

function openChat(one) {
  stop();
  chat = one;
  drawChat();
  drawList();
  closeOver();
}

function newChat() {
  openChat({id: fresh(), turns: []});
  focusBox();
}

function saveFile(name, type, text) {
  const day = new Date().toISOString().slice(0, 10);
  const link = make('a', {href: URL.createObjectURL(new Blob([text], {type})),
    download: name.replace('.', `-${day}.`)});
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

function asMarkdown(one) {
  const turns = one.turns.map(({question, answer, about}) =>
    `**You:**\n\n${question}\n\n**${about.model}:**\n\n${readable(answer)}\n`);
  return `# ${titleOf(one)}\n\n${turns.join('\n')}`;
}

function fromFile(text) {
  const chats = JSON.parse(text)?.chats;
  const taken = Array.isArray(chats) ? chats.map((one) => chatOf(one, fresh())).filter(Boolean) : [];
  if (!taken.length) throw new Error('there is no conversation in it');
  return taken;
}

function openKeeping() {
  $('save-md').onclick = () => saveFile('chat.md', 'text/markdown', asMarkdown(chat));
  $('save-json').onclick = () => saveFile('chats.json', 'application/json',
    JSON.stringify({format: 'nanogpt chats', version: 2, chats: storedChats()}, null, 1));
  $('load-json').onclick = () => $('file').click();
  $('file').onchange = async () => {
    try {
      const found = fromFile(await $('file').files[0].text());
      const room = Math.max(kMaxChats - storedChats().length, 0);  // none goes for those that come
      const {length} = found.slice(0, room).filter(keep), left = found.length - length;
      toast(`${plural(length, 'chat')} loaded${left ? `; there is no room for ${left} more` : ''}.`);
    } catch (error) {
      toast(`This file cannot be loaded: ${error.message}`);
    }
    $('file').value = '';
  };
  $('delete-all').onclick = () => discard(storedChats());
}

// ---- the two sides: beside the conversation where there is room, else over it
const kSides = {chats: matchMedia('(min-width: 900px)'), panel: matchMedia('(min-width: 1200px)')};
const sideOver = () => document.querySelector('aside.over:not([hidden])');

function show(id, open) {
  const docked = kSides[id].matches;
  $(id).classList.toggle('over', !docked);
  $(id).hidden = !open;
  $(id + '-open').hidden = open && docked;
  $(id + '-open').setAttribute('aria-expanded', String(open));
  const over = sideOver();  // while one is over the page, nothing else can be reached
  for (const node of document.querySelectorAll('.skip, main, aside')) {
    node.inert = !!over && node !== over;
  }
}

function closeOver() {
  const side = sideOver();
  if (side) $(side.id + '-close').click();
}

function openSides() {
  for (const [id, room] of Object.entries(kSides)) {
    const settle = () => show(id, room.matches && read('side.' + id) !== false);
    const byHand = (open) => {
      show(id, open);
      if (room.matches) write('side.' + id, open);
      $(open ? id : id + '-open').focus();
    };
    room.addEventListener('change', settle);
    settle();
    $(id + '-open').onclick = () => byHand(true);
    $(id + '-close').onclick = () => byHand(false);
  }
  document.addEventListener('pointerdown', (event) => {
    if (event.target.contains($('main'))) closeOver();
  });
}

const kTabs = ['model', 'settings', 'walk'];
function showTab(name) {
  for (const one of kTabs) {
    $('tab-' + one).setAttribute('aria-selected', String(one === name));
    $('tab-' + one).tabIndex = one === name ? 0 : -1;
    $('pane-' + one).hidden = one !== name;
  }
}

function openTabs() {
  kTabs.forEach((name, i) => {
    $('tab-' + name).onclick = () => showTab(name);
    $('tab-' + name).onkeydown = (event) => {
      const to = $('tab-' + kTabs[(i + {ArrowLeft: 2, ArrowRight: 1}[event.key]) % 3]);
      to?.click();
      to?.focus();
    };
  });
  showTab('model');
}

// ---- keys and commands
const touch = matchMedia('(hover: none) and (pointer: coarse)');

// Enter that means "send". Not while an input method is composing: there it chooses a word.
function entersText(event) {
  return event.key === 'Enter' && !event.shiftKey && !event.isComposing && event.keyCode !== 229 &&
    !touch.matches;
}

// /temperature, /temperature 0.6 and so on: tells the value, or sets it if it is one.
const tune = (name) => (text) => {
  const {min, max} = kSettings[name];
  if (text && !(Number(text) >= min && Number(text) <= max)) {
    throw new Error(`${name} is a number from ${min} to ${max}.`);
  }
  if (text || name === 'seed') set(name, text);
  toast(`${name} is ${settings[name] ?? 'random'}.`);
};

const kCommands = {
  temperature: tune('temperature'),
  topk: tune('top_k'),
  top_k: tune('top_k'),
  max: tune('max_tokens'),
  max_tokens: tune('max_tokens'),
  seed: tune('seed'),
  clear: newChat,
  help: openHelp,
  stats: async () => {
    const {busy_workers, total_workers} = await askFor('stats');
    toast(`${busy_workers} of ${total_workers} places are busy on the server.`);
  },
  model: (text) => {
    if (!text) return toast(`The model is ${model?.id}.`);
    const found = models.find((m) => usable(m) && [m.id, m.name, m.tag, `${m.source}/${m.tag}`,
      m.source].includes(text.toLowerCase()));
    if (!found) throw new Error(`No model that can be used is named ${text}.`);
    pick(found);
    toast(`The model is now ${found.type} ${nameOf(found)}.`);
  },
};

// What is in the box is a message, or a command: a slash and a word. A path is a message. What is
// wrong stays in the box.
async function submit() {
  const text = $('text').value;
  const [, word, rest = ''] = /^\/\s*(\p{L}[^\s\/]*)(?:\s+(.*))?$/su.exec(text.trim()) || [];
  const name = word?.toLowerCase();
  try {
    if (!name) send(text);
    else if (Object.hasOwn(kCommands, name)) await kCommands[name](rest.trim());
    else throw new Error(`There is no command /${word}. /help shows them.`);
    if ($('text').value === text) $('text').value = '';  // nothing else was typed meanwhile
    grow();
  } catch (error) {
    toast(error.message);
  }
}

function focusBox() {
  if (!touch.matches) $('text').focus({preventScroll: true});  // else the keyboard would come up
}

function grow() {
  $('text').style.height = 'auto';
  $('text').style.height = $('text').scrollHeight + 'px';
  drawSend();
}

const kAltKeys = {
  KeyN: newChat,
  KeyM: () => {
    $('model').focus();
    try { $('model').showPicker(); } catch { /* then it is only focused */ }
  },
  KeyS: () => {
    showTab('settings');
    $('panel-open').click();
    $('temperature').focus();
  },
};

function onKey(event) {
  if ($('dialog').open) return;
  const nothing = event.target === $('text') && $('text').value === '' && !chat.turns.length;
  const writing = /^(INPUT|TEXTAREA|SELECT)$/.test(event.target.tagName) && !nothing;
  const act = event.altKey && !event.ctrlKey && !event.metaKey ? kAltKeys[event.code]
    : event.key === '?' && !writing ? openHelp : null;
  if (act) {
    event.preventDefault();
    closeOver();
    act();
  } else if (event.key === 'Escape' && !event.isComposing) {
    if (sideOver()) closeOver();
    else stop();
  }
}

function openBox() {
  $('text').addEventListener('input', grow);
  $('text').addEventListener('keydown', (event) => {
    if (entersText(event)) {
      event.preventDefault();
      submit();
    } else if (event.key === 'ArrowUp' && $('text').value === '' && !run && chat.turns.length) {
      event.preventDefault();
      edit(chat.turns.at(-1));
    }
  });
  $('send').onclick = () => {
    if (run) stop();
    else submit();
    focusBox();
  };
  if (touch.matches) $('text').enterKeyHint = 'enter';
}

// ---- start
const kThemes = ['automatic', 'light', 'dark'];
const root = document.documentElement;
function setTheme(name) {
  root.dataset.theme = name;
  $('theme').textContent = `Theme: ${name}`;
  write('theme', name);
}

function start() {
  for (const node of document.querySelectorAll('[data-icon]')) node.prepend(icon(node.dataset.icon));
  for (const id of ['cli', 'curl']) $(id).after(copyButton('Copy', () => $(id).textContent));
  setTheme(kThemes.find((name) => name === read('theme')) || 'automatic');
  openSettings();
  openKeeping();
  openSides();
  openTabs();
  openBox();
  const clicks = {
    'theme': () => setTheme(kThemes[(kThemes.indexOf(root.dataset.theme) + 1) % 3]),
    'all-open': openAll, 'device': openDevice, 'help-open': openHelp, 'new': newChat,
    'newest': toEnd, 'dialog-close': () => $('dialog').close(),
    'dialog': (event) => { if (event.target === $('dialog')) $('dialog').close(); },
  };
  for (const [id, onclick] of Object.entries(clicks)) $(id).onclick = onclick;
  $('walk-form').onsubmit = walk;
  $('model').onchange = () => pick(models.find((m) => m.id === $('model').value));
  $('scroll').onscroll = () => {
    following = atEnd();
    $('newest').hidden = following;
  };
  $('key-form').onsubmit = (event) => {
    event.preventDefault();
    useKey($('key').value);
    $('key').value = '';
    poll();
  };
  // On iOS the keyboard covers the page instead of making it smaller.
  const viewport = window.visualViewport;
  viewport.addEventListener('resize', () => {
    const covered = viewport.scale === 1 ? Math.max(innerHeight - viewport.height, 0) : 0;
    root.style.setProperty('--keyboard', `${covered}px`);
    stay();
  });
  document.addEventListener('keydown', onKey);
  document.addEventListener('visibilitychange', () => { if (!document.hidden) poll(); });
  addEventListener('hashchange', () => { if (takeKey()) poll(); });
  addEventListener('storage', drawList);
  addEventListener('pagehide', stop);
  drawList();
  drawChat();
  poll();
  focusBox();
}
start();
)page";

}  // namespace
}  // namespace nanogpt::demo
