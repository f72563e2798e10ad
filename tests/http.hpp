// http.hpp: what test_server.cpp and load.cpp share: a server started as a child, an HTTP client
// that sends any bytes at all, a reader of responses and of event streams. Loopback only.
//
// Clients are told apart by their address, and all of 127.0.0.0/8 is this machine: `Connection`
// takes the last number, so that one program can be as many clients as a test needs.
#pragma once

#include <arpa/inet.h>    // htons, htonl
#include <fcntl.h>        // open
#include <netinet/in.h>   // sockaddr_in
#include <netinet/tcp.h>  // TCP_NODELAY
#include <poll.h>
#include <signal.h>     // kill
#include <sys/prctl.h>  // PR_SET_PDEATHSIG
#include <sys/socket.h>
#include <sys/wait.h>  // waitpid
#include <unistd.h>    // fork, execvp, pipe

#include <algorithm>  // max, min
#include <cerrno>
#include <charconv>   // from_chars
#include <chrono>     // steady_clock
#include <cstdio>     // snprintf
#include <cstdlib>    // getenv, setenv
#include <cstring>    // strlen
#include <stdexcept>  // runtime_error
#include <string>
#include <string_view>
#include <utility>  // pair, exchange
#include <vector>

#include "nanogpt.hpp"

namespace http {

using Clock = std::chrono::steady_clock;
using Words = std::vector<std::string>;

inline double ms_since(Clock::time_point start) {
    return std::chrono::duration<double, std::milli>(Clock::now() - start).count();
}
inline void sleep_ms(double ms) { ::usleep(static_cast<useconds_t>(ms * 1000)); }

// ==== responses ==================================================================================

// One response, read in pieces of any size. Says what was wrong with the framing instead of
// guessing: `broken` is empty for a good one.
class Response {
public:
    explicit Response(bool to_head = false) : to_head_(to_head) {}

    int status = 0;                                           // 0: no whole head has come
    std::string line;                                         // "HTTP/1.1 200 OK"
    std::vector<std::pair<std::string, std::string>> fields;  // names in lower case
    std::string body;                                         // chunks joined
    std::string broken;
    bool complete = false;  // to the end that its framing says
    bool closed = false;    // the connection has ended

    std::string field(std::string_view name) const {  // "(none)" if it is not there
        for (const auto& [key, value] : fields)
            if (key == name) return value;
        return "(none)";
    }
    bool has(std::string_view name) const {
        for (const auto& f : fields)
            if (f.first == name) return true;
        return false;
    }
    bool says_close() const { return field("connection") == "close"; }

    // Takes what belongs to this response; returns how much that was.
    std::size_t take(std::string_view bytes) {
        std::size_t taken = 0;
        while (!complete && broken.empty() && taken < bytes.size()) {
            const std::size_t n = step(bytes.substr(taken));
            taken += n;
        }
        return taken;
    }
    // The connection has ended: which completes a body without a length.
    void end() {
        closed = true;
        if (!complete && status != 0 && mode_ == Mode::to_end) complete = true;
    }

private:
    enum class Mode { head, length, to_end, chunk_size, chunk_data, chunk_end, trailer };

    std::size_t step(std::string_view bytes) {
        if (mode_ == Mode::to_end) return body += bytes, bytes.size();
        if (mode_ == Mode::length || mode_ == Mode::chunk_data) {
            const std::size_t n = std::min(left_, bytes.size());
            body += bytes.substr(0, n);
            left_ -= n;
            if (left_ == 0 && mode_ == Mode::length) complete = true;
            if (left_ == 0 && mode_ == Mode::chunk_data) mode_ = Mode::chunk_end;
            return n;
        }
        const std::size_t end = bytes.find('\n');  // all else is lines
        if (end == std::string_view::npos) return text_ += bytes, bytes.size();
        text_ += bytes.substr(0, end + 1);
        if (!text_.ends_with("\r\n")) {
            broken = "a line ends without CR: " + text_;
        } else {
            text_.resize(text_.size() - 2);
            take_line(std::exchange(text_, {}));
        }
        return end + 1;
    }
    void take_line(const std::string& text) {
        if (mode_ == Mode::head) return head_line(text);
        if (mode_ == Mode::chunk_end) {
            if (!text.empty()) broken = "a chunk is longer than it says";
            mode_ = Mode::chunk_size;
        } else if (mode_ == Mode::chunk_size) {
            const char* end = text.data() + text.size();
            const auto [at, error] = std::from_chars(text.data(), end, left_, 16);
            if (text.empty() || error != std::errc() || at != end) broken = "chunk size " + text;
            mode_ = left_ == 0 ? Mode::trailer : Mode::chunk_data;
        } else if (text.empty()) {  // the end of the trailer
            complete = true;
        }
    }
    void head_line(const std::string& text) {
        if (line.empty()) {
            line = text;
            if (!text.starts_with("HTTP/1.1 ") || text.size() < 12) broken = "status line: " + text;
            return;
        }
        if (!text.empty()) {
            const std::size_t colon = text.find(": ");
            if (colon == std::string::npos) {
                broken = "field: " + text;
                return;
            }
            std::string name = text.substr(0, colon);
            for (char& c : name)
                if (c >= 'A' && c <= 'Z') c = static_cast<char>(c + 32);
            fields.emplace_back(name, text.substr(colon + 2));
            return;
        }
        status = std::atoi(line.c_str() + 9);
        const bool chunked = field("transfer-encoding") == "chunked", sized = has("content-length");
        if (chunked && sized) broken = "both a length and chunks";
        if (to_head_ || status < 200 || status == 204 || status == 304) {
            complete = true;
        } else if (chunked) {
            mode_ = Mode::chunk_size;
        } else if (sized) {
            left_ = static_cast<std::size_t>(
                std::strtoull(field("content-length").c_str(), nullptr, 10));
            mode_ = Mode::length;
            complete = left_ == 0;
        } else {
            mode_ = Mode::to_end;
        }
    }

    Mode mode_ = Mode::head;
    std::string text_;  // of the line that has begun
    std::size_t left_ = 0;
    bool to_head_ = false;
};

// ==== connections ================================================================================

inline sockaddr_in loopback(int port, int client = 1) {
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_port = htons(static_cast<std::uint16_t>(port));
    address.sin_addr.s_addr = htonl(0x7F000000u + static_cast<std::uint32_t>(client));
    return address;
}

// Opens a socket from 127.0.0.0 + client; -1 if it cannot connect. `buffer`: of what is received; with
// small segments, by which the other side's kernel measures the buffer of what it sends.
inline int open_socket(int port, int client = 1, int buffer = 0) {
    const int fd = ::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    const int on = 1;
    const int segment = 536;
    if (buffer > 0) {
        ::setsockopt(fd, SOL_SOCKET, SO_RCVBUF, &buffer, sizeof buffer);
        ::setsockopt(fd, IPPROTO_TCP, TCP_MAXSEG, &segment, sizeof segment);
    }
    ::setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
#ifdef IP_BIND_ADDRESS_NO_PORT
    ::setsockopt(fd, IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, &on, sizeof on);
#endif
    const sockaddr_in from = loopback(0, client), to = loopback(port);
    const auto* a = reinterpret_cast<const sockaddr*>(&from);
    const auto* b = reinterpret_cast<const sockaddr*>(&to);
    if (::bind(fd, a, sizeof from) == 0 && ::connect(fd, b, sizeof to) == 0) return fd;
    ::close(fd);
    return -1;
}

// One connection that sends whatever it is told to and waits for what comes.
class Connection {
public:
    explicit Connection(int port, int client = 1, int buffer = 0)
        : fd_(open_socket(port, client, buffer)) {}
    Connection(Connection&& other) noexcept
        : fd_(std::exchange(other.fd_, -1)), rest_(std::move(other.rest_)) {}
    Connection& operator=(Connection&& other) noexcept {
        close();
        fd_ = std::exchange(other.fd_, -1);
        rest_ = std::move(other.rest_);
        return *this;
    }
    ~Connection() { close(); }

    int fd() const { return fd_; }
    bool is_open() const { return fd_ >= 0; }
    bool send(std::string_view bytes) {  // false: the other side does not take it
        while (!bytes.empty()) {
            const ssize_t n = ::send(fd_, bytes.data(), bytes.size(), MSG_NOSIGNAL);
            if (n <= 0) return false;
            bytes.remove_prefix(static_cast<std::size_t>(n));
        }
        return true;
    }
    void half_close() { ::shutdown(fd_, SHUT_WR); }
    void close() {
        if (fd_ >= 0) ::close(fd_);
        fd_ = -1;
    }
    void reset() {  // RST instead of FIN
        const linger now = {1, 0};
        if (fd_ >= 0) ::setsockopt(fd_, SOL_SOCKET, SO_LINGER, &now, sizeof now);
        close();
    }

    // One response, or what has come of it after `ms` (or of its body, once there are `enough` bytes).
    Response receive(double ms = 30'000, bool to_head = false,
                     std::size_t enough = std::string::npos) {
        Response r(to_head);
        const auto start = Clock::now();
        for (;;) {
            rest_.erase(0, r.take(rest_));
            if (r.complete || !r.broken.empty() || r.body.size() >= enough) return r;
            if (!fill(ms - ms_since(start))) {
                if (ended_) r.end();
                return r;
            }
        }
    }
    // Whether a byte comes within `ms`; it stays for receive().
    bool begins(double ms = 60'000) {
        const auto start = Clock::now();
        while (rest_.empty() && fill(ms - ms_since(start))) {
        }
        return !rest_.empty();
    }
    // Whether the other side ends the connection within `ms`, with nothing more to say.
    bool ends(double ms = 5'000) {
        const auto start = Clock::now();
        while (rest_.empty() && !ended_ && fill(ms - ms_since(start))) {
        }
        return rest_.empty() && ended_;
    }
    // Whether it does, whatever it has to say.
    bool drains(double ms) {
        const auto start = Clock::now();
        while (!ended_ && fill(ms - ms_since(start))) rest_.clear();
        return ended_;
    }
    const std::string& rest() const { return rest_; }  // came after the last response

private:
    bool fill(double ms) {  // false: nothing came, or nothing more will
        if (fd_ < 0 || ended_) return !(ended_ = true);
        pollfd wait = {fd_, POLLIN, 0};
        if (::poll(&wait, 1, static_cast<int>(std::ceil(std::max(ms, 0.0)))) <= 0) return false;
        char bytes[65536];
        const ssize_t n = ::recv(fd_, bytes, sizeof bytes, 0);
        if (n <= 0) return !(ended_ = true);
        rest_.append(bytes, static_cast<std::size_t>(n));
        return true;
    }
    int fd_ = -1;
    bool ended_ = false;
    std::string rest_;
};

inline std::string get(std::string_view target, std::string_view more = "") {
    return "GET " + std::string(target) + " HTTP/1.1\r\nHost: localhost\r\n" + std::string(more) +
           "\r\n";
}
inline std::string post(std::string_view target, std::string_view body,
                        std::string_view more = "") {
    return "POST " + std::string(target) +
           " HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n" +
           std::string(more) + "Content-Length: " + std::to_string(body.size()) + "\r\n\r\n" +
           std::string(body);
}
// One request on a connection of its own.
inline Response ask(int port, std::string_view request, int client = 1, double ms = 60'000) {
    Connection c(port, client);
    c.send(request);
    return c.receive(ms, request.starts_with("HEAD "));
}

// ==== JSON and event streams =====================================================================

inline std::string json_string(std::string_view text) {
    std::string out = "\"";
    for (const char c : text) {
        char escape[8];
        const auto byte = static_cast<unsigned>(static_cast<unsigned char>(c));
        if (c == '"' || c == '\\') {
            out += '\\', out += c;
        } else if (byte < 0x20) {
            std::snprintf(escape, sizeof escape, "\\u%04x", byte);
            out += escape;
        } else {
            out += c;
        }
    }
    return out + '"';
}

inline nanogpt::Json json_of(std::string_view text) {
    try {
        return nanogpt::parse_json(text);
    } catch (const nanogpt::Error&) {
        return {};
    }
}
// The value at a path such as "choices.0.delta.content"; nullptr if there is none.
inline const nanogpt::Json* at(const nanogpt::Json& json, std::string_view path) {
    const nanogpt::Json* here = &json;
    while (here != nullptr && !path.empty()) {
        const std::string key(path.substr(0, path.find('.')));
        path.remove_prefix(std::min(path.size(), key.size() + 1));
        if (here->kind == nanogpt::Json::Kind::array) {
            const std::size_t i = static_cast<std::size_t>(std::atoi(key.c_str()));
            here = key.find_first_not_of("0123456789") == key.npos && i < here->array.size()
                       ? &here->array[i]
                       : nullptr;
        } else {
            here = here->find(key);
        }
    }
    return here;
}
inline std::string text_at(const nanogpt::Json& json, std::string_view path) {
    const nanogpt::Json* value = at(json, path);
    if (value == nullptr) return "(missing)";
    return value->kind == nanogpt::Json::Kind::null ? "(null)" : value->string;
}
inline double number_at(const nanogpt::Json& json, std::string_view path) {
    const nanogpt::Json* value = at(json, path);
    return value == nullptr || value->kind != nanogpt::Json::Kind::number ? -1 : value->number;
}

struct Stream {
    Words data, comments;  // in order; what stands after "data: ", ": "
    std::string text;      // of all events, joined
    std::string finish;    // "" if none came
    std::string broken;    // what is no event
    bool done = false;     // nanochat's or OpenAI's last event came, and came last
    bool error = false;    // an error event came
};

inline Stream read_stream(std::string_view body) {
    Stream s;
    while (!body.empty()) {
        const std::size_t end = body.find("\n\n");
        if (end == std::string_view::npos) {
            s.broken = std::string(body);
            return s;
        }
        const std::string event(body.substr(0, end));
        body.remove_prefix(end + 2);
        if (event.starts_with(":")) {
            s.comments.push_back(event.substr(std::min<std::size_t>(event.size(), 2)));
            continue;
        }
        if (!event.starts_with("data: ") || event.find('\n') != std::string::npos || s.done) {
            s.broken = event;
            return s;
        }
        s.data.push_back(event.substr(6));
        if (s.data.back() == "[DONE]") {
            s.done = true;
            continue;
        }
        const nanogpt::Json json = json_of(s.data.back());
        if (json.kind != nanogpt::Json::Kind::object) s.broken = event;
        if (at(json, "error") != nullptr) s.error = true;
        if (at(json, "done") != nullptr) s.done = true;
        for (const char* path : {"token", "choices.0.delta.content", "choices.0.text"})
            if (const nanogpt::Json* piece = at(json, path)) s.text += piece->string;
        for (const char* path : {"finish_reason", "choices.0.finish_reason"})
            if (const nanogpt::Json* why = at(json, path)) s.finish += why->string;
    }
    return s;
}

// ==== the server =================================================================================

// `nanogpt serve` as a child on a port that the system chose. Its output goes to a file.
class Server {
public:
    // `args` after "serve"; throws if no address is printed within a minute.
    explicit Server(const std::string& binary, const Words& args, const std::string& log,
                    const Words& env = {})
        : log_(log) {
        Words all;
        if (const char* runner = std::getenv("NANOGPT_RUNNER"))
            for (std::string_view rest = runner; !rest.empty();) {
                const std::size_t end = std::min(rest.find(' '), rest.size());
                if (end > 0) all.emplace_back(rest.substr(0, end));
                rest.remove_prefix(std::min(end + 1, rest.size()));
            }
        for (const std::string& word : Words{binary, "serve", "--port", "0"}) all.push_back(word);
        all.insert(all.end(), args.begin(), args.end());
        pid_ = ::fork();
        if (pid_ == 0) {
            ::prctl(PR_SET_PDEATHSIG, SIGKILL);  // it never outlives the program that wanted it
            const int out = ::open(log.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_APPEND, 0600);
            ::dup2(::open("/dev/null", O_RDONLY), 0);
            ::dup2(out, 1);
            ::dup2(out, 2);
            ::unsetenv("NANOCHAT_BASE_DIR");
            ::setenv("CUDA_VISIBLE_DEVICES", "-1", 0);
            for (const std::string& e : env) ::putenv(::strdup(e.c_str()));
            std::vector<char*> pointers;
            for (std::string& word : all) pointers.push_back(word.data());
            pointers.push_back(nullptr);
            ::execvp(pointers[0], pointers.data());
            ::_exit(127);
        }
        const auto start = Clock::now();
        while (!(port_ = printed_port())) {
            if (has_ended() || ms_since(start) > 120'000)
                throw std::runtime_error("the server does not start: " + output());
            sleep_ms(2);
        }
    }
    Server(const Server&) = delete;
    Server& operator=(const Server&) = delete;
    ~Server() {
        if (pid_ <= 0 || has_ended()) return;
        ::kill(pid_, SIGKILL);
        ::waitpid(pid_, &status_, 0);
    }

    int port() const { return port_; }
    pid_t pid() const { return pid_; }
    void signal(int number) const { ::kill(pid_, number); }
    bool has_ended() {
        if (!ended_) ended_ = ::waitpid(pid_, &status_, WNOHANG) == pid_;
        return ended_;
    }
    // The exit code, 128 + signal, or -1 if it does not end within `ms`.
    int wait(double ms) {
        for (const auto start = Clock::now(); !has_ended(); sleep_ms(2))
            if (ms_since(start) > ms) return -1;
        return WIFSIGNALED(status_) ? 128 + WTERMSIG(status_) : WEXITSTATUS(status_);
    }
    std::string output() const {
        std::string out;
        const int fd = ::open(log_.c_str(), O_RDONLY | O_CLOEXEC);
        char bytes[65536];
        for (ssize_t n = 0; (n = ::read(fd, bytes, sizeof bytes)) > 0;)
            out.append(bytes, static_cast<std::size_t>(n));
        ::close(fd);
        return out;
    }

private:
    int printed_port() const {  // of the first "http://host:port" that is followed by a line's end
        const std::string text = output();
        const std::size_t begin = text.find("http://");
        if (begin == std::string::npos || text.find('\n', begin) == std::string::npos) return 0;
        const std::size_t colon =
            text.find(':', text.find(']', begin) < text.find('\n', begin) ? text.find(']', begin)
                                                                          : begin + 7);
        return colon == std::string::npos ? 0 : std::atoi(text.c_str() + colon + 1);
    }
    std::string log_;
    pid_t pid_ = -1;
    int port_ = 0, status_ = 0;
    bool ended_ = false;
};

}  // namespace http
