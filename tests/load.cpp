// nanogpt_load: load for `nanogpt serve`, and what became of it.
//
//   nanogpt_load [--quick] [--port N [--pid N]] [--seconds N] [scenario...]
//
// Scenarios: streams many overload aborts rude turns overhead; soak and gaps (which judges a GPU) only
// where they are named. Each starts a server of its own with the bundled sample model, or uses the one
// on 127.0.0.1:N. One line per scenario, and last "N passed, N failed". --quick: fewer of everything; times are shown but
// decide nothing, so that a busy machine does not fail a test, and the ratios of turns and overhead have
// wider bounds. Only loopback is ever connected to,
// every loop has a limit in count or time, and the servers end with this program.
#include <sys/epoll.h>

#include <atomic>
#include <cmath>
#include <functional>
#include <map>
#include <memory>
#include <thread>

#include "http.hpp"

#ifndef NANOGPT_BINARY
#define NANOGPT_BINARY ""
#endif

namespace {

using http::Clock;
using http::json_of;
using http::ms_since;
using http::number_at;
using http::Response;
using http::Words;

bool quick = false;
int given_port = 0, given_pid = 0;
double soak_seconds = 600;

// xorshift64*: the same sequence everywhere.
class Random {
public:
    explicit Random(std::uint64_t seed) : state_(seed * 0x9E3779B97F4A7C15u + 1) {}
    std::size_t below(std::size_t n) {
        state_ ^= state_ >> 12;
        state_ ^= state_ << 25;
        state_ ^= state_ >> 27;
        return (state_ * 0x2545F4914F6CDD1Du >> 11) % n;
    }

private:
    std::uint64_t state_;
};

double quantile(std::vector<double> values, double q) {
    if (values.empty()) return 0;
    std::sort(values.begin(), values.end());
    const double at = std::ceil(q * static_cast<double>(values.size())) - 1;
    return values[std::min(values.size() - 1, static_cast<std::size_t>(std::max(at, 0.0)))];
}
double median(const std::vector<double>& values) { return quantile(values, 0.5); }

std::string format(const char* pattern, auto... values) {
    char text[512];
    std::snprintf(text, sizeof text, pattern, values...);
    return text;
}

// ---- the server ---------------------------------------------------------------------------------

class Target {
public:
    explicit Target(const Words& flags) {
        if (given_port != 0) return;
        static int number = 0;
        Words args = {"--base-dir", std::string(NANOGPT_SOURCE_DIR) + "/tools/sample"};
        args.insert(args.end(), flags.begin(), flags.end());
        const std::string log =
            format("nanogpt-load-%d-%d.log", static_cast<int>(::getpid()), number++);
        const char* folder = std::getenv("TMPDIR");
        log_ = (folder != nullptr ? std::string(folder) : std::string(P_tmpdir)) + "/" + log;
        const char* binary = std::getenv("NANOGPT_BINARY");
        own_ =
            std::make_unique<http::Server>(binary != nullptr ? binary : NANOGPT_BINARY, args, log_);
    }
    Target(const Target&) = delete;
    Target& operator=(const Target&) = delete;
    ~Target() {
        if (own_) ::unlink(log_.c_str());
    }
    int port() const { return own_ ? own_->port() : given_port; }
    int pid() const { return own_ ? static_cast<int>(own_->pid()) : given_pid; }
    // Whether SIGTERM ends it with 0.
    bool stop() {
        if (!own_) return true;
        own_->signal(SIGTERM);
        return own_->wait(20'000) == 0;
    }

private:
    std::string log_;
    std::unique_ptr<http::Server> own_;
};

struct Usage {
    double memory_mib = 0;
    int descriptors = 0, threads = 0;
};
int entries(const std::string& folder) {
    std::error_code ignored;
    return static_cast<int>(
        std::distance(std::filesystem::directory_iterator(folder, ignored), {}));
}
Usage usage_of(int pid) {
    Usage out;
    if (pid == 0) return out;
    const std::string folder = "/proc/" + std::to_string(pid);
    std::FILE* file = std::fopen((folder + "/status").c_str(), "r");
    char line[256];
    long kib = 0;
    while (file != nullptr && std::fgets(line, sizeof line, file) != nullptr)
        if (std::sscanf(line, "VmRSS: %ld", &kib) == 1)
            out.memory_mib = static_cast<double>(kib) / 1024;
    if (file != nullptr) std::fclose(file);
    out.descriptors = entries(folder + "/fd");
    out.threads = entries(folder + "/task");
    return out;
}

// A value of /metrics, summed over its labels; those that hold `label` only. -1 if there is none, so
// that nothing passes for want of it.
double metric(const std::string& metrics, const std::string& name, const std::string& label = "") {
    double sum = -1;
    for (std::size_t at = 0; (at = metrics.find("\n" + name, at)) != std::string::npos; at++) {
        const std::string line = metrics.substr(at + 1, metrics.find('\n', at + 1) - at - 1);
        const char next = line[name.size()];
        if ((next == ' ' || next == '{') && line.find(label) != std::string::npos)
            sum = std::max(sum, 0.0) + std::atof(line.c_str() + line.rfind(' '));
    }
    return sum;
}
// Milliseconds until nothing runs, waits or is connected but this question and `probes`, and
// stays so for 100 ms, as the server counts every 50; -1 if longer than `most`.
double idle_after(int port, double most, int probes = 0) {
    const auto start = Clock::now();
    double since = -1, now = 0;
    do {
        const std::string metrics = http::ask(port, http::get("/metrics")).body;
        now = ms_since(start);
        const double connected = metric(metrics, "nanogpt_connections");
        const bool idle = metric(metrics, "nanogpt_active_sequences") == 0 &&
                          metric(metrics, "nanogpt_queued") == 0 &&
                          metric(metrics, "nanogpt_kv_blocks_used") == 0 && connected >= 1 &&
                          connected <= 1 + probes;
        since = !idle ? -1 : since < 0 ? now : since;
        if (since >= 0 && now >= since + 100) return since;
        http::sleep_ms(2);
    } while (now < most + 100);
    return -1;
}

// ---- requests -----------------------------------------------------------------------------------

const char* const kQuestions[] = {"Hello",
                                  "What is the capital of France?",
                                  "Tell me a story about a dog.",
                                  "Why is the sky blue?",
                                  "Who are you?",
                                  "What do plants need to grow?",
                                  "Give me three colours.",
                                  "How does a bicycle work?",
                                  "What is a poem?",
                                  "Write a short letter to a friend.",
                                  "What is the largest ocean?",
                                  "Explain rain to a child."};

std::string request_of(std::size_t number, int tokens) {
    const std::string question = kQuestions[number % std::size(kQuestions)];
    return http::post("/chat/completions", R"({"messages":[{"role":"user","content":)" +
                                               http::json_string(question) +
                                               R"(}],"temperature":1,"top_k":50,"max_tokens":)" +
                                               std::to_string(tokens) + R"(,"seed":)" +
                                               std::to_string(1000 + number) + "}");
}

// One request and what came of it, driven by `Loop`. What a rude client does is written down here too.
struct Exchange {
    std::string request;
    int client = 1;
    double start_ms = 0;          // after the loop has begun
    double leave_ms = -1;         // goes away so long after its start
    std::size_t leave_bytes = 0;  // or once so much of the body has come
    bool reset = false;           // by RST
    bool leave_when_sent = false, half_close = false, never_reads = false;
    std::string drip;  // sent again and again
    double drip_ms = 100, next_drip = 0;
    bool stays = false;  // waits for the server to close, answer or not

    enum class Outcome {
        waiting,
        running,
        complete,
        refused,
        left,
        broken
    } outcome = Outcome::waiting;
    int fd = -1;
    std::size_t sent = 0;
    Response response;
    Clock::time_point started, first, last, ended;  // first: the first piece of text
    std::vector<double> gaps;                       // ms, between two pieces
    bool has_text = false, server_closed = false;

    double duration() const {
        return std::chrono::duration<double, std::milli>(ended - started).count();
    }
    double first_ms() const {
        return std::chrono::duration<double, std::milli>(first - started).count();
    }
    double longest_gap() const { return quantile(gaps, 1); }
    bool over() const { return outcome != Outcome::waiting && outcome != Outcome::running; }
};

class Loop {
public:
    explicit Loop(int port) : port_(port), epoll_(::epoll_create1(EPOLL_CLOEXEC)) {}
    Loop(const Loop&) = delete;
    Loop& operator=(const Loop&) = delete;
    ~Loop() { ::close(epoll_); }
    // Called with each exchange that is over; may add new ones.
    std::function<void(Exchange&)> on_over;
    // Never sleeps: to be woken takes milliseconds at times, which would be counted.
    bool awake = false;

    Exchange& add(Exchange x) {
        all_.push_back(std::make_unique<Exchange>(std::move(x)));
        all_.back()->start_ms += begun_ ? ms_since(start_) : 0;
        waiting_.push_back(all_.back().get());
        return *all_.back();
    }
    // Until all are over, or for so long; what is not over by then is broken.
    void run(double most_ms) {
        start_ = Clock::now();
        begun_ = true;
        while ((!waiting_.empty() || !open_.empty()) && ms_since(start_) < most_ms) turn();
        for (Exchange* x : std::vector<Exchange*>(open_)) finish(*x, Exchange::Outcome::broken);
    }
    const std::vector<std::unique_ptr<Exchange>>& all() const { return all_; }
    double elapsed() const { return ms_since(start_); }

private:
    void turn() {
        const double now = ms_since(start_);
        for (std::size_t i = 0; i < waiting_.size();) {
            if (waiting_[i]->start_ms > now) {
                i++;
                continue;
            }
            Exchange* x = waiting_[i];
            waiting_.erase(waiting_.begin() + static_cast<std::ptrdiff_t>(i));
            begin(*x);
        }
        epoll_event events[256];
        const int n = ::epoll_wait(epoll_, events, 256, awake ? 0 : tick_ms_);
        for (int i = 0; i < n; i++)
            serve(*static_cast<Exchange*>(events[i].data.ptr), events[i].events);
        if (ms_since(looked_) >= tick_ms_) look_at_clocks();
    }
    void begin(Exchange& x) {
        x.started = x.last = Clock::now();
        x.fd = http::open_socket(port_, x.client, x.never_reads ? 4096 : 0);
        x.outcome = Exchange::Outcome::running;
        if (x.fd < 0) return finish(x, Exchange::Outcome::broken);
        if (x.leave_ms >= 0 || !x.drip.empty())
            tick_ms_ = std::min(tick_ms_, x.leave_ms >= 0 ? 1 : 10);
        ::fcntl(x.fd, F_SETFL, O_NONBLOCK);
        open_.push_back(&x);
        epoll_event event{};
        event.events = x.never_reads ? EPOLLOUT | EPOLLRDHUP : EPOLLIN | EPOLLOUT;
        event.data.ptr = &x;
        ::epoll_ctl(epoll_, EPOLL_CTL_ADD, x.fd, &event);
    }
    void serve(Exchange& x, std::uint32_t what) {
        if (x.over()) return;
        if ((what & EPOLLOUT) != 0 && x.sent < x.request.size()) {
            const ssize_t n =
                ::send(x.fd, x.request.data() + x.sent, x.request.size() - x.sent, MSG_NOSIGNAL);
            if (n > 0) x.sent += static_cast<std::size_t>(n);
            if (n < 0 && errno != EAGAIN) x.sent = x.request.size();  // what it says is still read
        }
        if (x.sent >= x.request.size() && (what & EPOLLOUT) != 0) {
            if (x.leave_when_sent) return finish(x, Exchange::Outcome::left);
            if (x.half_close) ::shutdown(x.fd, SHUT_WR);
            epoll_event event{};
            event.events = x.never_reads ? EPOLLRDHUP : EPOLLIN;
            event.data.ptr = &x;
            ::epoll_ctl(epoll_, EPOLL_CTL_MOD, x.fd, &event);
        }
        if (x.never_reads && (what & (EPOLLRDHUP | EPOLLHUP | EPOLLERR)) != 0) {
            x.server_closed = true;
            return finish(x, Exchange::Outcome::complete);
        }
        if ((what & (EPOLLIN | EPOLLHUP | EPOLLERR)) != 0 && !x.never_reads) read(x);
    }
    void read(Exchange& x) {
        char bytes[65536];
        const ssize_t n = ::recv(x.fd, bytes, sizeof bytes, 0);
        if (n < 0 && errno == EAGAIN) return;
        const std::size_t before = x.response.body.size();
        if (n > 0) x.response.take({bytes, static_cast<std::size_t>(n)});
        if (n <= 0) x.response.end(), x.server_closed = true;
        if (x.response.body.size() > before) take_text(x, before);
        if (x.leave_bytes > 0 && x.response.body.size() >= x.leave_bytes)
            return finish(x, Exchange::Outcome::left);
        if (x.stays ? n <= 0 : x.response.complete || n <= 0 || !x.response.broken.empty()) {
            const bool whole = x.response.complete && x.response.broken.empty();
            const bool good =
                whole && x.response.status == 200 &&
                (!x.has_text || x.response.body.find("\"done\": true") != std::string::npos);
            finish(x, good                                ? Exchange::Outcome::complete
                      : whole && x.response.status != 200 ? Exchange::Outcome::refused
                                                          : Exchange::Outcome::broken);
        }
    }
    void take_text(Exchange& x, std::size_t from) {
        if (x.response.body.find("data: {\"token\"", from > 16 ? from - 16 : 0) ==
            std::string::npos)
            return;
        const auto now = Clock::now();
        if (x.has_text)
            x.gaps.push_back(std::chrono::duration<double, std::milli>(now - x.last).count());
        if (!x.has_text) x.first = now;
        x.has_text = true;
        x.last = now;
    }
    void look_at_clocks() {
        looked_ = Clock::now();
        for (Exchange* x : std::vector<Exchange*>(open_)) {
            const double age = ms_since(x->started);
            if (x->leave_ms >= 0 && age >= x->leave_ms) {
                finish(*x, Exchange::Outcome::left);
            } else if (!x->drip.empty() && age >= x->next_drip) {
                x->next_drip = age + x->drip_ms;
                ::send(x->fd, x->drip.data(), x->drip.size(), MSG_NOSIGNAL | MSG_DONTWAIT);
            }
        }
    }
    void finish(Exchange& x, Exchange::Outcome outcome) {
        x.outcome = outcome;
        x.ended = Clock::now();
        const linger now = {1, 0};
        if (x.reset) ::setsockopt(x.fd, SOL_SOCKET, SO_LINGER, &now, sizeof now);
        if (x.fd >= 0) ::close(x.fd);
        std::erase(open_, &x);
        if (on_over) on_over(x);
    }

    int port_, epoll_;
    bool begun_ = false;
    int tick_ms_ = 20;  // between looks at the clocks, which take their share of the server's cores
    Clock::time_point start_ = Clock::now(), looked_ = start_;
    std::vector<std::unique_ptr<Exchange>> all_;
    std::vector<Exchange*> waiting_, open_;
};

// Asks for /health and the model list in turn, on a thread and a connection of its own.
class Probe {
public:
    explicit Probe(int port) : thread_([this, port] { work(port); }) {}
    ~Probe() { stop(); }
    Probe(const Probe&) = delete;
    Probe& operator=(const Probe&) = delete;
    void stop() {
        stopping_ = true;
        if (thread_.joinable()) thread_.join();
    }
    std::string text() const {
        return format(
            "/health p50 %.1f p99 %.1f ms, models p50 %.1f p99 %.1f ms (%zu probes, %d failed)",
            median(health_), quantile(health_, 0.99), median(models_), quantile(models_, 0.99),
            health_.size() + models_.size(), failed_);
    }
    double worst() const { return std::max(quantile(health_, 0.99), quantile(models_, 0.99)); }
    bool good() const { return failed_ == 0 && !health_.empty() && (quick || worst() <= 50); }

private:
    void work(int port) {
        http::Connection c(port, 250);
        for (int i = 0; !stopping_; i++) {
            const auto start = Clock::now();
            c.send(http::get(i % 2 == 0   ? "/health"
                             : i % 4 == 1 ? "/v1/models"
                                          : "/api/v1/inference/models"));
            const Response r = c.receive(10'000);
            (i % 2 == 0 ? health_ : models_).push_back(ms_since(start));
            if (r.status != 200) failed_++;
            if (r.status != 200 || r.says_close()) c = http::Connection(port, 250);
            http::sleep_ms(20);
        }
    }
    std::atomic<bool> stopping_ = false;
    std::vector<double> health_, models_;
    int failed_ = 0;
    std::thread thread_;
};

// The texts of requests asked for one at a time.
class Solo {
public:
    Solo(int port, int tokens) : port_(port), tokens_(tokens) {}
    const std::string& text(std::size_t number) {
        const auto known = texts_.find(number);
        if (known != texts_.end()) return known->second;
        const Response r = http::ask(port_, request_of(number, tokens_));
        const http::Stream s = http::read_stream(r.body);
        return texts_[number] = s.done ? s.text : "(no answer to " + std::to_string(number) + ")";
    }

private:
    int port_, tokens_;
    std::map<std::size_t, std::string> texts_;
};
std::string text_of(const Exchange& x) { return http::read_stream(x.response.body).text; }
double tokens_of(const Exchange& x) {
    const http::Stream s = http::read_stream(x.response.body);
    return s.data.empty()
               ? 0
               : std::max(0.0, number_at(json_of(s.data.back()), "usage.completion_tokens"));
}

// ---- scenarios ----------------------------------------------------------------------------------

struct Result {
    bool passed;
    std::string figures;
};

// C1, C2, C6: so many streams at once, so many rounds, each text identical to its solo run.
Result streams(int at_once, int rounds, int tokens) {
    Target target({"--slots", std::to_string(at_once)});
    Solo solo(target.port(), tokens);
    for (int i = 0; i < at_once; i++) solo.text(static_cast<std::size_t>(i));
    int complete = 0, same = 0;
    std::vector<double> first, gaps, rates;
    Probe probe(target.port());
    for (int round = 0; round < rounds; round++) {
        Loop loop(target.port());
        for (int i = 0; i < at_once; i++) {
            Exchange x;
            x.request = request_of(static_cast<std::size_t>(i), tokens);
            x.client = 2 + i / 8;
            loop.add(x);
        }
        loop.run(300'000);
        double written = 0;
        const double seconds = loop.elapsed() / 1000;
        for (std::size_t i = 0; i < loop.all().size(); i++) {
            const Exchange& x = *loop.all()[i];
            const bool whole = x.outcome == Exchange::Outcome::complete;
            complete += whole;
            same += whole && text_of(x) == solo.text(i);
            written += tokens_of(x);
            if (x.has_text) first.push_back(x.first_ms()), gaps.push_back(x.longest_gap());
        }
        rates.push_back(written / seconds);
    }
    probe.stop();
    const int all = at_once * rounds;
    const bool ended = target.stop();
    return {
        complete == all && same == all && probe.good() && ended,
        format(
            "%d at once, %d rounds: %d/%d complete, %d/%d identical to solo; first text p50 %.0f "
            "p95 %.0f ms, longest gap p50 %.0f p99 %.0f ms, %.0f tokens/s; ",
            at_once, rounds, complete, all, same, all, median(first), quantile(first, 0.95),
            median(gaps), quantile(gaps, 0.99), median(rates)) +
            probe.text()};
}

// 32 chats at once: nobody waits for more than three of the usual steps, also while prompts are read.
Result gaps() {
    Target target({"--slots", "32"});
    const int chats = 32, tokens = quick ? 32 : 512;
    http::ask(target.port(), request_of(0, 4));  // the model is there
    Loop loop(target.port());
    loop.awake = true;
    for (int i = 0; i < chats; i++) {
        Exchange x;
        x.request = request_of(static_cast<std::size_t>(i), tokens);
        x.client = 2 + i / 8;
        loop.add(x);
    }
    loop.run(300'000);
    std::vector<double> all, worst;
    int complete = 0;
    double written = 0;
    for (const auto& x : loop.all()) {
        complete += x->outcome == Exchange::Outcome::complete;
        written += tokens_of(*x);
        all.insert(all.end(), x->gaps.begin(), x->gaps.end());
        worst.push_back(x->longest_gap());
    }
    const double usual = median(all), ratio = quantile(worst, 1) / std::max(usual, 1e-3);
    return {complete == chats && target.stop() && (quick || ratio <= 3),
            format("%d/%d complete, gaps between tokens p50 %.2f p99 %.2f longest %.2f ms (%.1f x "
                   "the median), %.0f tokens/s",
                   complete, chats, usual, quantile(all, 0.99), quantile(worst, 1), ratio,
                   written / (loop.elapsed() / 1000))};
}

// C3: each of 1,024 requests gets exactly one outcome, the counts add up, the server is idle after.
Result overload() {
    Target target({"--slots", "8", "--queue", "512"});
    const int all = 1024, tokens = quick ? 4 : 16;
    const auto answered = [&] {  // no line before the first
        const std::string metrics = http::ask(target.port(), http::get("/metrics")).body;
        return std::max(0.0, metric(metrics, "nanogpt_requests_total", "/chat/completions"));
    };
    const double before = answered();
    Loop loop(target.port());
    for (int i = 0; i < all; i++) {
        Exchange x;
        x.request = request_of(static_cast<std::size_t>(i), tokens);
        x.client = 2 + i / 16;
        loop.add(x);
    }
    loop.run(400'000);
    int complete = 0, full = 0, many = 0, other = 0, connections = 0;
    for (const auto& x : loop.all()) {
        const int status = x->response.status;
        complete += x->outcome == Exchange::Outcome::complete;
        const bool refused = x->outcome == Exchange::Outcome::refused;
        full += refused && status == 503 && !x->response.body.empty();
        connections += refused && status == 503 && x->response.body.empty();
        many += refused && status == 429;
        other += !(x->outcome == Exchange::Outcome::complete ||
                   (refused && (status == 503 || status == 429)));
    }
    const double idle = idle_after(target.port(), 5'000);
    const double counted = answered() - before;
    const bool good = complete + full + connections + many == all && other == 0 &&
                      complete >= 512 && full + connections + many > 0 &&
                      counted + connections == all && idle >= 0 && (quick || idle <= 1'000);
    const bool ended = target.stop();
    return {
        good && ended,
        format("%d requests: %d complete, %d queue full, %d too many of one client, %d without a "
               "connection, %d other; the server counts %.0f; idle after %.0f ms, %.1f s in all",
               all, complete, full, many, connections, other, counted, idle,
               loop.elapsed() / 1000)};
}

// C5: clients that go away at random moments beside 32 that stay.
Result aborts() {
    Target target({"--slots", "40", "--queue", "512"});
    const int good_count = quick ? 8 : 32, all = quick ? 150 : 1000, tokens = quick ? 24 : 48;
    Solo solo(target.port(), tokens);
    for (int i = 0; i < good_count; i++) solo.text(static_cast<std::size_t>(i));
    Random random(5);
    int started = 0, left = 0, late = 0, good = 0, same = 0, broken = 0;
    Loop loop(target.port());
    const auto add_rude = [&] {
        Exchange x;
        x.request = request_of(1000 + static_cast<std::size_t>(started), tokens);
        x.client = 100 + started % 100;
        x.reset = random.below(2) == 0;
        switch (random.below(4)) {
            case 0:
                x.leave_ms = static_cast<double>(random.below(10));
                break;  // queued, in prefill
            case 1:
                x.leave_ms = static_cast<double>(random.below(500));
                break;  // somewhere
            case 2:
                x.leave_bytes = 1 + random.below(900);
                break;  // while decoding
            default:
                x.leave_bytes = 25 * static_cast<std::size_t>(tokens);
                break;  // near the last token
        }
        started++;
        loop.add(x);
    };
    const auto add_good = [&](std::size_t number) {
        Exchange x;
        x.request = request_of(number, tokens);
        x.client = 2 + static_cast<int>(number);
        loop.add(x);
    };
    loop.on_over = [&](Exchange& x) {
        const bool is_good = x.client < 100;
        if (is_good) {
            const auto number = static_cast<std::size_t>(x.client - 2);
            good++;
            same += x.outcome == Exchange::Outcome::complete && text_of(x) == solo.text(number);
            if (started < all) add_good(number);
            x.response = Response();
            return;
        }
        left += x.outcome == Exchange::Outcome::left;
        late += x.outcome == Exchange::Outcome::complete;  // the answer was shorter
        broken += x.outcome != Exchange::Outcome::left && x.outcome != Exchange::Outcome::complete;
        if (started < all) add_rude();
    };
    for (int i = 0; i < good_count; i++) add_good(static_cast<std::size_t>(i));
    for (int i = 0; i < (quick ? 16 : 64); i++) add_rude();
    loop.run(400'000);
    const double idle = idle_after(target.port(), 5'000);
    const std::string metrics = http::ask(target.port(), http::get("/metrics")).body;
    const double cancelled = metric(metrics, "nanogpt_cancelled_total");
    const bool passed = same == good && good >= good_count && broken == 0 && left + late == all &&
                        left > all / 2 && cancelled > left / 4 && idle >= 0 &&
                        (quick || idle <= 1'000);
    const bool ended = target.stop();
    return {
        passed && ended,
        format(
            "%d went away, %.0f of them while their answer was made (%d were answered before, %d "
            "broken) beside %d good answers: %d/%d identical; all free after %.0f ms",
            left, cancelled, late, broken, good, same, good, idle)};
}

// B5: many kinds of slow and rude clients beside 8 streams.
struct Kind {
    const char* name;
    Exchange example;
    double limit_ms;  // the server has closed it by then
};
std::vector<Kind> kinds() {
    std::vector<Kind> out;
    // Few tokens: what rude clients cost by what they make the model write is not the question here.
    const std::string good = request_of(7, 4), head = good.substr(0, good.find("\r\n\r\n") + 4);
    const auto add = [&](const char* name, double limit, auto change) {
        Exchange x;
        x.stays = true;
        change(x);
        out.push_back({name, x, limit});
    };
    add("says nothing", 15'000, [](Exchange&) {});
    add("half a head", 10'000, [&](Exchange& x) { x.request = head.substr(0, 30); });
    add("a head byte by byte", 10'000, [](Exchange& x) { x.request = "G", x.drip = "e"; });
    add("a body that stops", 30'000, [&](Exchange& x) { x.request = head + "{"; });
    add("a body byte by byte", 30'000, [&](Exchange& x) { x.request = head, x.drip = " "; });
    add("never reads its stream", 45'000,
        [&](Exchange& x) { x.request = good, x.never_reads = true; });
    add("asks for pages and reads none", 45'000, [](Exchange& x) {
        for (int i = 0; i < 5'000; i++) x.request += http::get("/");
        x.never_reads = true;
    });
    add("closes its half", 15'000, [&](Exchange& x) { x.request = good, x.half_close = true; });
    add("resets at once", 0, [](Exchange& x) { x.leave_when_sent = x.reset = true; });
    add("resets within the head", 0,
        [&](Exchange& x) { x.request = head.substr(0, 40), x.leave_when_sent = x.reset = true; });
    add("resets within the stream", 0,
        [&](Exchange& x) { x.request = good, x.leave_bytes = 30, x.reset = true; });
    add("garbage", 5'000, [](Exchange& x) {
        x.request = std::string("\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03", 11) +
                    std::string(200, '\x80') + "\r\n";
    });
    add("a body without end", 5'000, [&](Exchange& x) {
        x.request =
            "POST /chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: "
            "application/json\r\n"
            "Transfer-Encoding: chunked\r\n\r\n";
        for (int i = 0; i < 300; i++) x.request += "1000\r\n" + std::string(4096, ' ') + "\r\n";
    });
    return out;
}
Result rude() {
    Target target({"--slots", "32"});  // so that the rude ones take no place from the others
    const int of_each = quick ? 6 : 50, tokens = 64;
    const double alone_ms = quick ? 4'000 : 20'000, spread_ms = quick ? 1'000 : 10'000;
    Solo solo(target.port(), tokens);
    for (std::size_t i = 0; i < 8; i++) solo.text(i);
    int wrong = 0;
    // The durations of streams, 8 at a time, while `going`.
    const auto good_ones = [&](Loop& loop, std::vector<double>& out,
                               const std::function<bool()>& going) {
        loop.on_over = [&, going](Exchange& x) {
            if (x.client > 9) return;
            const auto number = static_cast<std::size_t>(x.client - 2);
            if (x.outcome != Exchange::Outcome::complete || text_of(x) != solo.text(number))
                wrong++;
            const double tokens_written = std::max(1.0, tokens_of(x));
            out.push_back(x.duration() / tokens_written);
            x.response = Response();
            if (!going()) return;
            Exchange again;
            again.request = x.request;
            again.client = x.client;
            loop.add(again);
        };
        for (std::size_t i = 0; i < 8; i++) {
            Exchange x;
            x.request = request_of(i, tokens);
            x.client = 2 + static_cast<int>(i);
            loop.add(x);
        }
    };
    std::vector<double> alone, beside;
    const auto measure_alone = [&] {
        Loop loop(target.port());
        good_ones(loop, alone, [&] { return loop.elapsed() < alone_ms; });
        loop.run(300'000);
    };
    measure_alone();
    Loop loop(target.port());
    Random random(6);
    std::vector<std::pair<Exchange*, const Kind*>> bad;
    const std::vector<Kind> all = kinds();
    good_ones(loop, beside, [&] {
        return std::any_of(bad.begin(), bad.end(),
                           [](const auto& b) { return !b.first->over() && !b.first->never_reads; });
    });
    int client = 0;
    for (const Kind& kind : all)
        for (int i = 0; i < of_each; i++) {
            Exchange x = kind.example;
            x.client = 20 + client++ % 200;
            x.start_ms = static_cast<double>(random.below(static_cast<std::size_t>(spread_ms)));
            bad.push_back({&loop.add(x), &kind});
        }
    loop.run(quick ? 60'000 : 120'000);
    measure_alone();  // again: half before, half after
    std::size_t in_time = 0;
    std::map<std::string, int> late;
    for (const auto& [x, kind] : bad) {
        const bool left = x->outcome == Exchange::Outcome::left;
        const bool good = left || (x->server_closed && x->duration() <= kind->limit_ms + 3'000);
        in_time += good;
        if (!good) late[kind->name]++;
    }
    std::string which;
    for (const auto& [name, count] : late) which += format("; %d late: %s", count, name.c_str());
    const double slower = median(beside) / median(alone) - 1;
    const double idle = idle_after(target.port(), 5'000);
    const bool ended = target.stop();
    return {
        wrong == 0 && in_time == bad.size() && idle >= 0 && ended && (quick || slower <= 0.10),
        format(
            "%zu kinds x %d: %zu/%zu closed in time; %zu good answers beside them, %d wrong, %.2f "
            "ms per token against %.2f alone (%+.1f %%)",
            all.size(), of_each, in_time, bad.size(), beside.size(), wrong, median(beside),
            median(alone), 100 * slower) +
            which};
}

// The second turn of a long conversation begins as soon as a short one.
struct Turn {
    double first_ms = 0, prompt = 0, cached = 0;
    std::string text;
};
Turn ask_turn(int port, const std::string& messages, int tokens) {
    const std::string body = R"({"messages":[)" + messages + R"(],"temperature":0,"max_tokens":)" +
                             std::to_string(tokens) +
                             R"(,"stream":true,"stream_options":{"include_usage":true}})";
    http::Connection c(port);
    const auto start = Clock::now();
    c.send(http::post("/v1/chat/completions", body));
    // the role comes at once or with the text; text is what counts
    Response r(false);
    double first = 0;
    std::string rest;
    char bytes[65536];
    while (!r.complete) {
        const ssize_t n = ::recv(c.fd(), bytes, sizeof bytes, 0);
        if (n <= 0) break;
        r.take({bytes, static_cast<std::size_t>(n)});
        const std::size_t role = r.body.find("\"role\"");
        if (first == 0 && role != std::string::npos &&
            (r.body.find("\"delta\":{\"content\":", role) != std::string::npos ||
             r.body.find("\"finish_reason\":\"", role) != std::string::npos))
            first = ms_since(start);
    }
    const http::Stream s = http::read_stream(r.body);
    Turn out{first, 0, 0, s.text};
    for (const std::string& data : s.data) {
        const nanogpt::Json json = json_of(data);
        if (number_at(json, "usage.prompt_tokens") > 0)
            out.prompt = number_at(json, "usage.prompt_tokens");
        if (number_at(json, "usage.prompt_tokens_details.cached_tokens") > 0)
            out.cached = number_at(json, "usage.prompt_tokens_details.cached_tokens");
    }
    return out;
}
Result turns() {
    Target target({});
    std::vector<double> first_turn, second_turn, short_one;
    Turn second, small;
    const auto user = [](const std::string& text) {
        return R"({"role":"user","content":)" + http::json_string(text) + "}";
    };
    ask_turn(target.port(), user("Hello"), 4);
    for (int i = 0; i < (quick ? 5 : 25); i++) {
        std::string text = format("Chapter %d.", i);
        for (int k = 0; k < 102; k++) text += " The dog and the cat went to the park.";
        text = text.substr(0, 3'560);
        const Turn first = ask_turn(target.port(), user(text), 12);
        small = ask_turn(
            target.port(),
            user(
                format("%d birds sat on a tree and sang a song about the sea and the sun, and then "
                       "it was dark. Why?",
                       100 + i)),
            12);
        second = ask_turn(target.port(),
                          user(text) + R"(,{"role":"assistant","content":)" +
                              http::json_string(first.text) + "}," + user("And what then?"),
                          12);
        first_turn.push_back(first.first_ms);
        second_turn.push_back(second.first_ms);
        short_one.push_back(small.first_ms);
    }
    const double ratio = median(second_turn) / median(short_one);
    const bool reused =
        second.cached >= 0.9 * second.prompt && second.prompt > 800 && second.prompt < 1000;
    const bool ended = target.stop();
    return {reused && ended && ratio <= (quick ? 2.5 : 1.3),
            format("second turn of %.0f tokens (%.0f of them kept): first text after %.1f ms; a "
                   "new prompt "
                   "of %.0f tokens: %.1f ms; ratio %.2f (the first turn took %.0f ms)",
                   second.prompt, second.cached, median(second_turn), small.prompt,
                   median(short_one), ratio, median(first_turn))};
}

// What HTTP and the scheduler cost: 8 streams through them, and the same 8 through the library.
Result overhead() {
    constexpr int kStreams = 8;
    const int tokens = quick ? 64 : 128, rounds = quick ? 3 : 15;
    Target target({});
    const std::filesystem::path base =
        std::filesystem::path(NANOGPT_SOURCE_DIR) / "tools" / "sample";
    const auto tokenizer = nanogpt::load_tokenizer(base / "tokenizer" / "tokenizer.pkl");
    const auto backend = nanogpt::open_cpu(
        nanogpt::load_model(base / "chatsft_checkpoints" / "d4", {.dtype = nanogpt::DType::f32}));
    const std::vector<nanogpt::Token> stop = nanogpt::chat_stop_tokens(tokenizer);
    const auto library = [&] {  // tokens per second
        const auto start = Clock::now();
        struct Row {
            std::unique_ptr<nanogpt::Sequence> sequence;
            std::unique_ptr<nanogpt::Sampler> sampler;
            std::vector<nanogpt::Token> next;
            int written = 0;
        };
        std::vector<Row> rows(kStreams);
        for (std::size_t i = 0; i < rows.size(); i++) {
            const nanogpt::Message message{nanogpt::Role::user,
                                           kQuestions[i % std::size(kQuestions)]};
            rows[i].next = nanogpt::render_chat(tokenizer, {&message, 1});
            rows[i].sequence = backend->new_sequence(1024);
            nanogpt::SamplingParams params;
            params.temperature = 1, params.top_k = 50, params.seed = 1000 + i;
            rows[i].sampler = std::make_unique<nanogpt::Sampler>(params);
        }
        double written = 0;
        for (;;) {
            std::vector<nanogpt::Chunk> chunks;
            std::vector<nanogpt::Sampler*> samplers;
            std::vector<Row*> active;
            for (Row& r : rows) {
                if (r.next.empty()) continue;
                chunks.push_back({r.sequence.get(), r.next, r.written == 0});
                samplers.push_back(r.sampler.get());
                active.push_back(&r);
            }
            if (active.empty()) break;
            const auto drawn = backend->sample(chunks, samplers);
            for (std::size_t i = 0; i < active.size(); i++) {
                Row& r = *active[i];
                const nanogpt::Token token = drawn[i];
                r.written++, written++;
                const bool ends =
                    std::find(stop.begin(), stop.end(), token) != stop.end() || r.written == tokens;
                r.next.assign(ends ? 0 : 1, token);
            }
        }
        return written / (ms_since(start) / 1000);
    };
    double http_tokens = 0;
    const auto through_http = [&] {
        Loop loop(target.port());
        for (std::size_t i = 0; i < kStreams; i++) {
            Exchange x;
            x.request = request_of(i, tokens);
            x.client = 2 + static_cast<int>(i);
            loop.add(x);
        }
        loop.run(120'000);
        const double seconds = loop.elapsed() / 1000;
        http_tokens = 0;
        for (const auto& x : loop.all()) http_tokens += tokens_of(*x);
        return http_tokens / seconds;
    };
    through_http(), library();
    std::vector<double> served, direct, ratios;
    for (int i = 0; i < rounds; i++) {  // in turns, so that what else the machine does hits both
        served.push_back(through_http());
        direct.push_back(library());
        ratios.push_back(served.back() / direct.back());
    }
    const bool ended = target.stop();
    const double ratio = median(ratios);
    return {ended && http_tokens > 0 && ratio >= (quick ? 0.5 : 0.90),
            format("%d streams: %.0f tokens/s through HTTP, %.0f through the library; ratio %.3f "
                   "(median of %d "
                   "pairs, %.3f to %.3f)",
                   kStreams, median(served), median(direct), ratio, rounds, quantile(ratios, 0.001),
                   quantile(ratios, 1))};
}

// C8: everything mixed for long; what the process holds must not grow.
Result soak() {
    Target target({});
    const double seconds = quick ? std::min(soak_seconds, 10.0) : soak_seconds;
    const double warm_up = std::min(90.0, seconds * 0.3), part = quick ? 2'000 : 10'000;
    constexpr std::size_t kTexts = 24;
    const int tokens = 32;
    Solo solo(target.port(), tokens);
    for (std::size_t i = 0; i < kTexts; i++) solo.text(i);
    Random random(8);
    std::size_t number = 0, good = 0, same = 0, left = 0, bad = 0, bad_right = 0, broken = 0;
    const auto start = Clock::now();
    std::vector<Usage> after;  // at quiet moments
    Probe probe(target.port());
    const std::string bad_ones[] = {"GET /health HTTP/1.1\r\n\r\n",
                                    "GET /../x HTTP/1.1\r\nHost: localhost\r\n\r\n",
                                    http::post("/chat/completions", "{"),
                                    http::post("/v1/chat/completions", R"({"messages":[]})"),
                                    http::get("/nothing"),
                                    http::post("/v1/chat/completions", R"({"messages":7})"),
                                    std::string(9'000, 'x')};
    const auto make = [&](Loop& loop) {
        Exchange x;
        const std::size_t what = random.below(10);
        x.client = 2 + static_cast<int>(number++ % 48);
        if (what < 6) {
            const std::size_t text = random.below(kTexts);
            x.request = request_of(text, tokens);
            x.leave_ms = -1;
            x.next_drip = static_cast<double>(text);  // remembered; nothing drips
        } else if (what < 8) {
            x.request = request_of(5'000 + number, tokens);
            if (random.below(2) == 0)
                x.leave_ms = static_cast<double>(random.below(300));
            else
                x.leave_bytes = 1 + random.below(600);
            x.reset = random.below(2) == 0;
            x.drip_ms = -2;
        } else if (what < 9) {
            x.request = bad_ones[random.below(std::size(bad_ones))];
            x.drip_ms = -3;
        } else {  // slow: half of it, the rest later, or never
            x.request = http::post("/chat/completions", "{").substr(0, 40);
            x.leave_ms = 500 + static_cast<double>(random.below(1'000));
            x.drip_ms = -2;
        }
        loop.add(x);
    };
    while (ms_since(start) < seconds * 1000) {
        Loop loop(target.port());
        loop.on_over = [&](Exchange& x) {
            using Outcome = Exchange::Outcome;
            if (x.drip_ms == -2) {
                left += x.outcome == Outcome::left || x.outcome == Outcome::complete;
                broken += x.outcome == Outcome::broken;
            } else if (x.drip_ms == -3) {
                bad++;
                bad_right += x.outcome == Outcome::refused && x.response.status >= 400 &&
                             x.response.body.find("\"error\"") != std::string::npos;
            } else {
                good++;
                same += x.outcome == Outcome::complete &&
                        text_of(x) == solo.text(static_cast<std::size_t>(x.next_drip));
            }
            x.response = Response();
            x.request = {};
            if (loop.elapsed() < part) make(loop);
        };
        for (int i = 0; i < 24; i++) make(loop);
        loop.run(part + 120'000);
        if (idle_after(target.port(), 10'000, 1) < 0) broken++;
        http::sleep_ms(300);
        if (ms_since(start) >= warm_up * 1000) after.push_back(usage_of(target.pid()));
        if (!quick && !after.empty()) {
            std::fprintf(stderr,
                         "soak: %.0f s, %zu requests, %.1f MiB, %d descriptors, %d threads\n",
                         ms_since(start) / 1000, number, after.back().memory_mib,
                         after.back().descriptors, after.back().threads);
        }
    }
    probe.stop();
    const Usage first = after.empty() ? Usage{} : after.front();
    double growth = 0;
    bool constant = !after.empty();
    for (const Usage& u : after) {
        growth = std::max(growth, u.memory_mib - first.memory_mib);
        constant = constant && u.descriptors == first.descriptors && u.threads == first.threads;
    }
    const bool ended = target.stop();
    return {
        same == good && bad_right == bad && broken == 0 && constant && ended && probe.good() &&
            (quick || growth <= 16),
        format(
            "%.0f s, %zu requests: %zu/%zu good identical, %zu went away, %zu/%zu bad refused, %zu "
            "broken; memory %.1f MiB after warm-up, %+.1f MiB at most later; %d descriptors, %d "
            "threads, %s; ",
            seconds, number, same, good, left, bad_right, bad, broken, first.memory_mib, growth,
            first.descriptors, first.threads, constant ? "constant" : "NOT constant") +
            probe.text()};
}

}  // namespace

int main(int argc, char** argv) {
    const std::pair<std::string, std::function<Result()>> scenarios[] = {
        {"streams", [] { return quick ? streams(16, 2, 16) : streams(32, 20, 48); }},
        {"many", [] { return quick ? streams(64, 1, 8) : streams(256, 4, 32); }},
        {"overload", overload},
        {"aborts", aborts},
        {"rude", rude},
        {"turns", turns},
        {"overhead", overhead},
        {"gaps", gaps},
        {"soak", soak}};
    Words chosen;
    for (int i = 1; i < argc; i++) {
        const std::string word = argv[i];
        const auto number = [&] { return i + 1 < argc ? std::atoi(argv[++i]) : 0; };
        if (word == "--quick")
            quick = true;
        else if (word == "--port")
            given_port = number();
        else if (word == "--pid")
            given_pid = number();
        else if (word == "--seconds")
            soak_seconds = number();
        else
            chosen.push_back(word);
    }
    ::signal(SIGPIPE, SIG_IGN);
    int passed = 0, failed = 0;
    for (const auto& [name, run] : scenarios) {
        const bool asked = std::find(chosen.begin(), chosen.end(), name) != chosen.end();
        const bool only_named = name == "soak" || name == "gaps";
        if (!asked && (!chosen.empty() || only_named)) continue;
        std::erase(chosen, name);
        Result result;
        try {
            result = run();
        } catch (const std::exception& e) {
            result = {false, e.what()};
        }
        std::printf("%s: %s: %s\n", name.c_str(), result.passed ? "passed" : "FAILED",
                    result.figures.c_str());
        std::fflush(stdout);
        (result.passed ? passed : failed)++;
        if (chosen.empty() && asked) chosen.push_back("");  // the named ones only
    }
    for (const std::string& name : chosen)
        if (!name.empty()) std::printf("%s: FAILED: no such scenario\n", name.c_str()), failed++;
    std::printf("%d passed, %d failed\n", passed, failed);
    return failed == 0 && passed > 0 ? 0 : 1;
}
