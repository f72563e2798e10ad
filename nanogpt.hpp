// nanogpt.hpp: run nanochat models from one C++20 header
//
// Reads the checkpoints of github.com/karpathy/nanochat as they lie on disk, of every generation,
// and continues text or chats with them on the CPU. No Python, no conversion, no other library.
// MIT licence.
//
//     #include "nanogpt.hpp"                                   // g++ -std=c++20 -O3 main.cpp
//
//     auto tokenizer = nanogpt::load_tokenizer("tokenizer/tokenizer.pkl");
//     auto backend = nanogpt::open_cpu(nanogpt::load_model("chatsft_checkpoints/d12"));
//     nanogpt::Chat chat(*backend, tokenizer, {.sampling = {.temperature = 0.6f, .top_k = 50}});
//     chat.reply("Why is the sky blue?", [](std::string_view text) {
//         return std::fwrite(text.data(), 1, text.size(), stdout) == text.size();
//     });
//
// Compile with -O3: the inner loops rely on it. No -march is needed: AVX2, AVX-512 or NEON are
// picked when the program runs.
//
// CONTENTS; a section uses only those above it, and names its parts below its title, in order
//
//    1. config      version, includes
//    2. error       the one exception, checked arithmetic, UTF-8
//    3. dtype       float32, bfloat16, float16 and their bits
//    4. tensor      a shape and a place
//    5. file        reading without surprises
//    6. zip         the container of torch.save
//    7. pickle      its contents, read as data and never run; the opcodes
//    8. json        metadata
//    9. checkpoint  finding models, names of files; which generation of nanochat a file is
//   10. unicode     whole characters; letters, numbers, spaces
//   11. tokenizer   splitting and byte-pair encoding; the special tokens
//   12. ops         threads; matrix product, norm, rotation, softmax, soft cap, attention
//   13. model       weights, KVCache (what is kept per token), and forward(): the transformer
//   14. sample      from logits to a token: temperature, top-k, top-p
//   15. engine      sequences, batches, prompts, generating
//   16. chat        conversations, their marks, and the calculator
//
// To learn how a transformer computes, read 13 from Pass::forward() on, then 12. Both stand without
// 5 to 11.
//
// DEFINITIONS
//
//   T tokens of a call    S context length   V vocabulary      L layers
//   D width (n_embd)      H query heads      K key/value heads hd head dimension, D / H
//   (in ops::linear and below it K is the depth of a product, as BLAS has it: y (T, N), x (T, K))
//
//   Shapes are row-major, last index fastest: x (T, D) f32. Weights are (out, in): y = x w^T,
//   without bias. A token is an id, a piece its bytes, text is UTF-8. A step is one call of
//   Backend::step. Prefill reads a prompt, decode one token. Capacity and length of a sequence are
//   in tokens.
//
// FILES      model_<step>.pt (zip of torch.save), meta_<step>.json beside it, tokenizer.pkl
//            (tiktoken.Encoding). Anything malformed, cut off or of an unknown kind is refused with
//            the reason. Nothing in a file is run.
// THREADS    A Model and a Tokenizer never change and may be shared. A KVCache, Sequence, Backend,
//            Sampler or Chat belongs to one thread at a time. A model's threads serve one call
//            after the other.
// RESULTS    are float32 arithmetic on float32 or bfloat16 weights, and the same to the last bit
//            for every batch, every cut of a prompt into pieces and every number of threads, on one
//            machine and compiler.
// LIFETIMES  A Backend keeps its Model. A Sequence, Chat or KVCache must not outlive its Backend or
//            Model. Spans of logits are valid until the next step.
// ERRORS     are nanogpt::Error (section 2), one line for people, and a kind. Memory that cannot be
//            had may also be std::bad_alloc. Nothing prints, exits or aborts.
// LIMITS     64-bit little-endian Linux; no training; nanochat's architectures only.

// ==== 1. config ==================================================================================
// Version, includes, and the one namespace everything lives in. There are no switches to set: the
// same source means the same program in every file that includes it, whatever the compiler flags.
#ifdef NANOGPT_VERSION
#if NANOGPT_VERSION != 100
#error "two different versions of nanogpt.hpp in one file"
#endif
#else
#define NANOGPT_VERSION 100  // 10000 * major + 100 * minor + patch

#include <fcntl.h>     // open
#include <sys/mman.h>  // madvise
#include <sys/stat.h>  // fstat
#include <unistd.h>    // pread, close, sysconf

#include <algorithm>         // sort, min, max, clamp
#include <array>             // array
#include <atomic>            // atomic
#include <bit>               // bit_cast, endian
#include <cerrno>            // errno
#include <charconv>          // from_chars, to_chars
#include <chrono>            // steady_clock
#include <climits>           // INT_MAX
#include <cmath>             // sqrt, exp, tanh
#include <concepts>          // integral
#include <cstddef>           // byte, size_t
#include <cstdint>           // int32_t
#include <cstdlib>           // getenv, aligned_alloc
#include <cstring>           // memcpy, strerror
#include <exception>         // exception_ptr
#include <filesystem>        // path
#include <functional>        // function
#include <initializer_list>  // initializer_list
#include <limits>            // numeric_limits
#include <memory>            // shared_ptr
#include <mutex>             // mutex
#include <new>               // bad_alloc
#include <optional>          // optional
#include <span>              // span
#include <stdexcept>         // runtime_error
#include <stop_token>        // stop_token
#include <string>            // string
#include <string_view>       // string_view
#include <system_error>      // error_code
#include <thread>            // jthread
#include <utility>           // move, exchange, pair
#include <vector>            // vector

#ifndef __cpp_exceptions
#error "nanogpt.hpp reports errors by exceptions: compile without -fno-exceptions"
#endif

namespace nanogpt {
inline namespace v0 {

using Token = std::int32_t;  // an id of the vocabulary

static_assert(std::endian::native == std::endian::little,
              "checkpoints are read in place, low byte first");
static_assert(sizeof(float) == 4 && sizeof(void*) == 8, "a 64-bit machine with IEEE floats");

// ==== 2. error ===================================================================================
// One exception type. Whatever comes from outside (a file, a prompt, a flag) is checked where it
// comes in, and a check throws: nothing here prints, exits or continues with half a model.
// In order: cat, Error, quote, refuse, misuse, naming; sort_by, find_by; checked_mul; decode_utf8.

enum class ErrorKind : std::uint8_t {
    usage,          // an argument makes no sense
    not_found,      // no such file, tag, step, token
    refused,        // malformed, unsafe or cut off; offset says where
    unsupported,    // well-formed, but of a kind this runtime does not run
    out_of_memory,  // refused before allocating, or the allocation failed
    device          // an accelerator failed
};

namespace detail {

// A part of a message: a text, which it only points at, or a whole number below 2^63.
struct TextPart {
    std::string_view text;
    std::optional<std::int64_t> number;
    TextPart(const char* s) : text(s) {}
    TextPart(std::string_view s) : text(s) {}
    TextPart(const std::string& s) : text(s) {}
    template <std::integral Number>
    TextPart(Number n) : number(static_cast<std::int64_t>(n)) {}
};
using TextParts = std::initializer_list<TextPart>;

// cat({"step ", 7, " of ", n}): one call, where a chain of + compiles into a string for every part.
[[gnu::cold]] inline std::string cat(TextParts parts) {
    std::string out;
    for (const TextPart& p : parts) {
        out += p.text;
        if (p.number) out += std::to_string(*p.number);
    }
    return out;
}

}  // namespace detail

// what() is one line: "<file or thing>: <what was found>, <what is needed>. <what to do>".
struct Error : std::runtime_error {
    ErrorKind kind;
    std::int64_t offset;  // byte in the file, -1 if none
    Error(ErrorKind k, const std::string& message, std::int64_t at = -1)
        : std::runtime_error(message), kind(k), offset(at) {}
    Error(ErrorKind k, detail::TextParts message) : Error(k, detail::cat(message)) {}
};

namespace detail {

// Text from outside, made fit for a message: printable ASCII in quotes, the rest as \xNN, cut at
// `most` bytes. A tensor's name may hold an escape sequence for the terminal that will show it.
[[gnu::cold]] inline std::string quote(std::string_view s, std::size_t most = 80) {
    constexpr char kHex[] = "0123456789abcdef";
    std::string out = "\"";
    for (const char c : s.substr(0, most)) {
        const auto byte = static_cast<unsigned char>(c);
        if (byte >= 0x20 && byte < 0x7f && c != '"' && c != '\\') {
            out += c;
        } else {
            out += {'\\', 'x', kHex[byte >> 4], kHex[byte & 15]};
        }
    }
    return out + (s.size() > most ? "...\"" : "\"");
}

// Refuses what was read from a file, at byte `at` of it.
[[noreturn, gnu::cold]] inline void refuse(TextParts message, std::int64_t at = -1) {
    const std::string text = cat(message);
    throw Error(ErrorKind::refused, at < 0 ? text : cat({text, " at byte ", at}), at);
}
[[noreturn]] inline void refuse(const char* s, std::int64_t at = -1) { refuse({TextPart(s)}, at); }
// Refuses what a caller asked for.
[[noreturn, gnu::cold]] inline void misuse(TextParts s) { throw Error(ErrorKind::usage, s); }
[[noreturn]] inline void misuse(const char* s) { misuse({TextPart(s)}); }
[[noreturn, gnu::cold]] inline void unsupported(TextParts message) {
    throw Error(ErrorKind::unsupported, message);
}

// Runs a reader and puts the file's name in front of whatever it complains about.
template <class Read>
auto naming(const std::filesystem::path& file, Read&& read) {
    try {
        return read();
    } catch (const Error& e) {
        throw Error(e.kind, cat({quote(file.filename().string(), 200), ": ", e.what()}), e.offset);
    } catch (const std::bad_alloc&) {
        throw Error(ErrorKind::out_of_memory,
                    {quote(file.filename().string(), 200), ": not enough memory to read it"});
    }
}

// Sorts by key(thing), a whole number or a view of a name; things of equal keys keep their order.
// Returns one whose key another has too, or null. std::sort sees pairs of key and place: two types.
template <class T, class Key>
const T* sort_by(std::vector<T>& things, Key key) {
    constexpr bool number = std::is_integral_v<decltype(key(things[0]))>;
    using Order = std::conditional_t<number, std::int64_t, std::string_view>;
    std::vector<std::pair<Order, std::size_t>> order;
    for (const T& thing : things) order.emplace_back(key(thing), order.size());
    std::sort(order.begin(), order.end());
    std::size_t twice = 0;
    for (std::size_t i = order.size(); i-- > 1;)
        twice = order[i - 1].first == order[i].first ? i : twice;
    std::vector<T> sorted;
    for (const auto& pair : order) sorted.push_back(std::move(things[pair.second]));
    things.swap(sorted);
    return twice == 0 ? nullptr : &things[twice];
}
// The thing of this name in a list sorted by `name`, or null.
template <class List, class Name>
auto find_by(const List& list, std::string_view wanted, Name name) -> decltype(&list[0]) {
    const auto below = [&](const auto& thing, std::string_view w) { return name(thing) < w; };
    const auto at = std::lower_bound(list.begin(), list.end(), wanted, below);
    return at != list.end() && name(*at) == wanted ? &*at : nullptr;
}

// Sizes from outside are only ever added and multiplied here.
inline std::uint64_t checked_add(std::uint64_t a, std::uint64_t b) {
    if (b > UINT64_MAX - a) refuse("a sum of sizes passes 64 bits");
    return a + b;
}
inline std::uint64_t checked_mul(std::uint64_t a, std::uint64_t b) {
    if (a != 0 && b > UINT64_MAX / a) refuse("a product of sizes passes 64 bits");
    return a * b;
}

// The start of some bytes read as UTF-8. Well formed: `code` is the character. Malformed: `code` is
// U+FFFD and `length` the maximal invalid subpart. `cut`: the bytes end inside a character that
// more bytes could complete; `length` is then all of them.
struct Utf8Char {
    char32_t code;
    std::uint32_t length;  // bytes, 1 to 4
    bool cut;
};

inline constexpr char32_t kReplacement = 0xFFFD;
inline constexpr std::string_view kReplacementUtf8 = "\xEF\xBF\xBD";

// Reads the character at the start of `bytes`, which must not be empty.
//   first byte   00-7F      C2-DF      E0-EF      F0-F4      (others never start a character)
//   bits         0xxxxxxx   110xxxxx   1110xxxx   11110xxx   then 10xxxxxx each
// The second byte has narrower limits after four of them, which exclude overlong forms (E0, F0),
// surrogates (ED) and what lies above U+10FFFF (F4).
inline Utf8Char decode_utf8(std::string_view bytes) {
    const auto byte = [&](std::size_t i) { return static_cast<unsigned char>(bytes[i]); };
    const std::uint32_t first = byte(0);
    if (first < 0x80) return {first, 1, false};
    if (first < 0xC2 || first > 0xF4) return {kReplacement, 1, false};
    const std::uint32_t length = first < 0xE0 ? 2 : first < 0xF0 ? 3 : 4;
    std::uint32_t least = first == 0xE0 ? 0xA0 : first == 0xF0 ? 0x90 : 0x80;
    std::uint32_t most = first == 0xED ? 0x9F : first == 0xF4 ? 0x8F : 0xBF;
    char32_t code = first & (0xFFU >> (length + 1));
    for (std::uint32_t i = 1; i < length; ++i, least = 0x80, most = 0xBF) {
        if (i == bytes.size()) return {kReplacement, i, true};
        if (byte(i) < least || byte(i) > most) return {kReplacement, i, false};
        code = code << 6 | (byte(i) & 0x3FU);
    }
    return {code, length, false};
}

// Where the first byte outside ASCII is, from `begin` on, or bytes.size(). Eight bytes at a time.
inline std::size_t skip_ascii(std::string_view bytes, std::size_t begin) {
    std::size_t i = begin;
    for (std::uint64_t eight; i + 8 <= bytes.size(); i += 8) {
        std::memcpy(&eight, bytes.data() + i, 8);
        if ((eight & 0x8080808080808080U) != 0) break;
    }
    while (i < bytes.size() && static_cast<unsigned char>(bytes[i]) < 0x80) ++i;
    return i;
}
inline char ascii_lower(char c) { return c >= 'A' && c <= 'Z' ? static_cast<char>(c + 32) : c; }
inline char ascii_upper(char c) { return c >= 'a' && c <= 'z' ? static_cast<char>(c - 32) : c; }

// Length in bytes of the longest well-formed start of `bytes`; bytes.size() if all is well formed.
// U+FFFD may stand in the bytes itself, as EF BF BD; every other way to decode to it is an error.
inline std::size_t valid_utf8_length(std::string_view bytes) {
    std::size_t i = skip_ascii(bytes, 0);
    while (i < bytes.size()) {
        const Utf8Char c = decode_utf8(bytes.substr(i));
        if (c.code == kReplacement && bytes.substr(i, 3) != kReplacementUtf8) return i;
        i = skip_ascii(bytes, i + c.length);
    }
    return i;
}
inline bool is_utf8(std::string_view s) { return valid_utf8_length(s) == s.size(); }
// The way back: a first byte above 7F begins with as many ones as the character has bytes.
inline void append_utf8(std::string& out, std::uint32_t code) {
    if (code < 0x80) return out.push_back(static_cast<char>(code));
    const int length = code < 0x800 ? 2 : code < 0x10000 ? 3 : 4;
    out += static_cast<char>(0xFF00U >> length | code >> 6 * (length - 1));
    for (int i = length - 1; i-- > 0;) out += static_cast<char>(0x80 | (code >> 6 * i & 0x3F));
}

}  // namespace detail

// ==== 3. dtype ===================================================================================
// The number formats a checkpoint may hold, and the bit pictures of the two short floats:
//
//   float32   s eeeeeeee mmmmmmmmmmmmmmmmmmmmmmm     1 + 8 + 23 bits, bias 127
//   bfloat16  s eeeeeeee mmmmmmm                     the upper half of a float32
//   float16   s eeeee mmmmmmmmmm                     1 + 5 + 10 bits, bias 15
//
// bfloat16 -> float32 is therefore a shift, exact and nearly free; that is why weights may stay
// bfloat16 in memory while all arithmetic is float32.

enum class DType : std::uint8_t { f32, bf16, f16, f64, i64, i32, i16, i8, u8, boolean };

constexpr std::size_t size_of(DType t) {
    constexpr std::size_t kBytes[] = {4, 2, 2, 8, 8, 4, 2, 1, 1, 1};
    return kBytes[static_cast<std::size_t>(t)];
}
constexpr std::string_view name_of(DType t) {  // torch's names
    constexpr std::string_view kNames[] = {"float32", "bfloat16", "float16", "float64", "int64",
                                           "int32",   "int16",    "int8",    "uint8",   "bool"};
    return kNames[static_cast<std::size_t>(t)];
}
constexpr bool is_float(DType t) { return t <= DType::f64; }

inline float bf16_to_f32(std::uint16_t h) { return std::bit_cast<float>(std::uint32_t{h} << 16); }

// Round to nearest, ties to even, as torch does; NaN stays NaN (rounding could make it infinity).
inline std::uint16_t f32_to_bf16(float x) {
    const auto u = std::bit_cast<std::uint32_t>(x);
    if ((u & 0x7fffffffu) > 0x7f800000u) return static_cast<std::uint16_t>(u >> 16 | 0x40u);
    return static_cast<std::uint16_t>((u + 0x7fffu + (u >> 16 & 1u)) >> 16);
}

// Neither NaN nor an infinity. By bits: -ffast-math drops comparisons that ask for it.
inline bool is_finite(float x) {
    return (std::bit_cast<std::uint32_t>(x) & 0x7f800000u) != 0x7f800000u;
}
inline bool is_finite(double x) {
    constexpr std::uint64_t kExponent = std::uint64_t{0x7ff} << 52;
    return (std::bit_cast<std::uint64_t>(x) & kExponent) != kExponent;
}

inline float f16_to_f32(std::uint16_t h) {
    const std::uint32_t sign = std::uint32_t{h & 0x8000u} << 16, exponent = h >> 10 & 31u;
    const std::uint32_t mantissa = h & 0x3ffu;
    // inf, NaN
    if (exponent == 31) return std::bit_cast<float>(sign | 0x7f800000u | mantissa << 13);
    if (exponent != 0) return std::bit_cast<float>(sign | (exponent + 112) << 23 | mantissa << 13);
    // subnormal: mantissa * 2^-24, exact
    const float tiny = static_cast<float>(mantissa) * 0x1p-24f;
    return sign != 0 ? -tiny : tiny;
}

// ==== 4. tensor ==================================================================================
// A tensor here is a shape and a place: no arithmetic, no strides, row-major, last index fastest.
// Copies are cheap and share the bytes; the bytes are never written after loading.

struct TensorInfo {
    std::string name;
    DType dtype = DType::f32;
    std::vector<std::int64_t> shape;
};

struct Tensor {
    DType dtype = DType::f32;
    std::vector<std::int64_t> shape;        // (rows, cols), or (n)
    std::shared_ptr<const std::byte> data;  // null: the checkpoint has no such tensor

    explicit operator bool() const { return data != nullptr; }
    std::size_t rows() const { return shape.size() < 2 ? 1 : static_cast<std::size_t>(shape[0]); }
    std::size_t cols() const { return shape.empty() ? 1 : static_cast<std::size_t>(shape.back()); }
    std::size_t numel() const { return rows() * cols(); }
    std::size_t bytes() const { return numel() * size_of(dtype); }
    const float* f32() const { return reinterpret_cast<const float*>(data.get()); }
    const std::uint16_t* bf16() const { return reinterpret_cast<const std::uint16_t*>(data.get()); }
};

namespace detail {

// Elements of a shape; refuses negative dimensions and products past 64 bits.
inline std::uint64_t count(std::span<const std::int64_t> shape) {
    std::uint64_t n = 1;
    for (const std::int64_t d : shape) {
        if (d < 0) refuse({"a tensor has the negative dimension ", d});
        n = checked_mul(n, static_cast<std::uint64_t>(d));
    }
    return n;
}
inline std::string to_string(std::span<const std::int64_t> shape) {
    std::string out = "(";
    for (std::size_t i = 0; i < shape.size(); ++i) out += cat({i ? ", " : "", shape[i]});
    return cat({out, ")"});
}

// Uninitialised memory, on a 2 MiB border so that the kernel can back weights with large pages:
// fewer TLB misses while all of them stream through. A cache fills slowly and takes small ones:
// what is not yet written then costs nothing.
inline std::shared_ptr<std::byte> allocate(std::uint64_t bytes, bool large_pages = true) {
    constexpr std::uint64_t kPage = std::uint64_t{2} << 20;
    const std::uint64_t size = checked_add(bytes, kPage - 1) / kPage * kPage;
    void* p = size > SIZE_MAX / 2 ? nullptr : std::aligned_alloc(kPage, std::max(size, kPage));
    if (p == nullptr)
        throw Error(ErrorKind::out_of_memory, {"cannot allocate ", bytes >> 20, " MiB"});
    if (large_pages) madvise(p, size, MADV_HUGEPAGE);  // a wish; ignored where it cannot be met
    return {static_cast<std::byte*>(p), [](std::byte* q) { std::free(q); }};
}

}  // namespace detail

// ==== 5. file ====================================================================================
// Files are read with pread, not mapped: another process that cuts a mapped file short turns the
// next access into SIGBUS, while a short read is an error one can report. The length at open is the
// length for good, and unchanged() tells afterwards whether training wrote over the file meanwhile.

class File {
public:
    // Throws not_found if there is none, refused if it is no regular file (a FIFO would block).
    explicit File(const std::filesystem::path& path) : path_(path) {
        fd_ = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
        const int reason = errno;
        if (fd_ < 0) {
            const bool none = reason == ENOENT || reason == ENOTDIR;
            throw Error(
                none ? ErrorKind::not_found : ErrorKind::refused,
                {"cannot open ", detail::quote(path.string(), 300), ": ", std::strerror(reason)});
        }
        struct stat s {};
        if (::fstat(fd_, &s) != 0 || !S_ISREG(s.st_mode)) {
            ::close(fd_);
            detail::refuse({detail::quote(path.string(), 300), " is not a regular file"});
        }
        size_ = static_cast<std::uint64_t>(s.st_size);
        modified_ = s.st_mtim;
    }
    File(File&& other) noexcept
        : path_(std::move(other.path_)),
          fd_(std::exchange(other.fd_, -1)),
          size_(other.size_),
          modified_(other.modified_) {}
    ~File() {
        if (fd_ >= 0) ::close(fd_);
    }

    const std::filesystem::path& path() const { return path_; }
    std::uint64_t size() const { return size_; }
    std::int64_t modified() const { return modified_.tv_sec; }  // seconds since 1970

    // Fills `out` from byte `offset` on; throws refused if the file ends too early. Thread-safe.
    void read(std::uint64_t offset, std::span<std::byte> out) const {
        if (offset > size_ || out.size() > size_ - offset) {
            detail::refuse({"the file ends at byte ", size_, ", inside what should be read"},
                           static_cast<std::int64_t>(std::min<std::uint64_t>(offset, INT64_MAX)));
        }
        while (!out.empty()) {
            const ssize_t n = ::pread(fd_, out.data(), out.size(), static_cast<off_t>(offset));
            if (n < 0 && errno == EINTR) continue;
            if (n <= 0) {
                const char* why = n < 0 ? std::strerror(errno) : "the file was cut short meanwhile";
                detail::refuse({"cannot read: ", why}, static_cast<std::int64_t>(offset));
            }
            out = out.subspan(static_cast<std::size_t>(n));
            offset += static_cast<std::uint64_t>(n);
        }
    }

    bool unchanged() const {
        struct stat s {};
        return ::fstat(fd_, &s) == 0 && static_cast<std::uint64_t>(s.st_size) == size_ &&
               s.st_mtim.tv_sec == modified_.tv_sec && s.st_mtim.tv_nsec == modified_.tv_nsec;
    }

    // The bytes just read will not be read again: leave the page cache to others. Only a wish.
    void forget(std::uint64_t offset, std::uint64_t bytes) const {
        ::posix_fadvise(fd_, static_cast<off_t>(offset), static_cast<off_t>(bytes),
                        POSIX_FADV_DONTNEED);
    }

private:
    std::filesystem::path path_;
    int fd_ = -1;
    std::uint64_t size_ = 0;
    timespec modified_ = {};
};

namespace detail {

inline std::vector<std::byte> read_bytes(const File& file, std::uint64_t offset, std::uint64_t n) {
    std::vector<std::byte> bytes(static_cast<std::size_t>(n));
    file.read(offset, bytes);
    return bytes;
}
// A whole small file. Throws not_found, or refused if it is larger than `max_bytes`.
inline std::vector<std::byte> read_file(const std::filesystem::path& path,
                                        std::uint64_t max_bytes) {
    const File file(path);
    if (file.size() > max_bytes) {
        refuse({quote(path.filename().string(), 200), " has ", file.size(), " bytes, at most ",
                max_bytes, " are accepted"});
    }
    return read_bytes(file, 0, file.size());
}
// The beginning of a file of the kernel (/proc, /sys), whose size reads wrong; "" if none is there.
inline std::string read_kernel_file(const char* path) {
    std::string text(4096, '\0');
    const int fd = ::open(path, O_RDONLY | O_CLOEXEC);
    const ssize_t n = fd < 0 ? 0 : ::read(fd, text.data(), text.size());
    if (fd >= 0) ::close(fd);
    text.resize(static_cast<std::size_t>(std::max<ssize_t>(n, 0)));
    return text;
}
inline std::string_view as_text(std::span<const std::byte> bytes) {
    return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

// A number of `Bytes` bytes, low byte first, at bytes[at]; the caller knows that it is inside.
template <int Bytes>
std::uint64_t little_endian(std::span<const std::byte> bytes, std::size_t at) {
    std::uint64_t value = 0;
    std::memcpy(&value, bytes.data() + at, Bytes);  // as on this machine
    return value;
}

}  // namespace detail

// ==== 6. zip =====================================================================================
// torch.save writes a zip archive without compression, so a tensor's bytes lie in the file as they
// will lie in memory. Only such stored entries are read: without decompression there are no zip
// bombs.
//
//   local header, name, padding | data | descriptor | ...     one after the other, then
//   central directory | zip64 end | locator | end
//
// Sizes are taken from the central directory alone: torch leaves them zero in the local headers.
// What the local headers say must agree otherwise, and the entries fill the file without overlaps.
// In order: crc32 / ZipRecord / ZipFile: find, read, verify; in its private part, the directory.

namespace detail {

struct ZipEntry {
    std::string name;
    std::uint64_t offset = 0;  // of the data, in the file
    std::uint64_t size = 0;    // in bytes
    std::uint32_t crc = 0;     // of the data; 0 if the writer had checksums switched off
    std::uint64_t header = 0;  // offset of the local header
    static std::string_view key(const ZipEntry& e) { return e.name; }
};

constexpr std::uint64_t kMaxZipEntries = 65536;
constexpr std::uint64_t kMaxZipDirectory = std::uint64_t{16} << 20;  // bytes
constexpr std::size_t kMaxZipName = 512;                             // bytes
constexpr std::uint64_t kZipFlags = 0x0808;  // known ones: sizes behind the data, names in UTF-8

// No constant, and no lambda, which g++ would try as one: 0.2 s in every file that includes this.
inline std::array<std::array<std::uint32_t, 256>, 8> crc32_tables() {
    std::array<std::array<std::uint32_t, 256>, 8> t{};
    for (std::uint32_t i = 0; i < 256; ++i) {
        std::uint32_t c = i;
        for (auto& table : t) {  // each is one zero byte further
            for (int bit = 0; bit < 8; ++bit) c = (c & 1u) != 0 ? 0xEDB88320u ^ c >> 1 : c >> 1;
            table[i] = c;
        }
    }
    return t;
}
// CRC-32 as zip uses it (polynomial 0xEDB88320), eight bytes a round: 8 tables, 2 GB/s where one
// table gives 0.4. `crc` continues an earlier call.
inline std::uint32_t crc32(std::span<const std::byte> bytes, std::uint32_t crc = 0) {
    static const auto kTables = crc32_tables();
    crc = ~crc;
    std::size_t i = 0;
    for (; i + 8 <= bytes.size(); i += 8) {
        std::uint64_t v;
        std::memcpy(&v, &bytes[i], 8);
        v ^= crc;
        crc = 0;
        for (std::size_t k = 0; k < 8; ++k) crc ^= kTables[7 - k][v >> (8 * k) & 255u];
    }
    for (; i < bytes.size(); ++i)
        crc = crc >> 8 ^ kTables[0][(crc ^ std::uint32_t(bytes[i])) & 255u];
    return ~crc;
}

// Whether a file ends as every zip does, with an end record.
inline bool has_end_record(const File& file) {
    const std::uint64_t size = file.size();
    return size >= 22 && little_endian<4>(read_bytes(file, size - 22, 4), 0) == 0x06054b50;
}
// What a file without one is instead; the usual accidents have names.
inline std::string not_a_zip(std::string_view head) {
    if (head.starts_with("PK\x03\x04")) {
        return "has no zip end record: still being written, or cut off. Wait for the save to end, "
               "or copy it again";
    }
    if (head.starts_with("\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19")) {
        return "was saved by a very old PyTorch (before 1.6). Load and save it once with a "
               "current one";
    }
    if (head.starts_with("GGUF")) return "is a GGUF file, not a nanochat checkpoint";
    if (head.starts_with("version https://git-lfs"))
        return "is a Git LFS pointer, not the checkpoint itself. Run: git lfs pull";
    if (head.starts_with("<")) return "is a web page: the download failed. Download it again";
    if (head.starts_with("{") || (head.size() > 8 && head[8] == '{'))
        return "is a safetensors or JSON file, not a checkpoint of torch.save";
    return head.empty() ? "is empty" : "is not a file of torch.save (no zip end record)";
}

// Some bytes of the archive, and where in the file they begin.
struct ZipRecord {
    std::uint64_t begin;
    std::vector<std::byte> bytes;
    ZipRecord(const File& file, std::uint64_t at, std::uint64_t n)
        : begin(at), bytes(read_bytes(file, at, n)) {}
    std::uint64_t u16(std::size_t i) const { return little_endian<2>(bytes, i); }
    std::uint64_t u32(std::size_t i) const { return little_endian<4>(bytes, i); }
    std::uint64_t u64(std::size_t i) const { return little_endian<8>(bytes, i); }
    [[noreturn]] void fail(const char* what, std::size_t i = 0) const {
        refuse({"zip: ", what}, static_cast<std::int64_t>(begin + i));
    }
};

class ZipFile {
public:
    // Reads and checks the directory; keeps the file for read(). Throws refused.
    explicit ZipFile(File file) : file_(std::move(file)) {
        find_directory();
        read_directory();
        for (ZipEntry& entry : entries_) check_local_header(entry);
        check_order();
        if (const ZipEntry* twice = sort_by(entries_, ZipEntry::key))
            refuse({"zip: two entries are called ", quote(twice->name)});
    }

    const File& file() const { return file_; }
    const std::vector<ZipEntry>& entries() const { return entries_; }  // sorted by name
    const ZipEntry* find(std::string_view name) const {
        return find_by(entries_, name, ZipEntry::key);
    }
    // All bytes of an entry of at most `max_bytes`, with its checksum verified.
    std::vector<std::byte> read(const ZipEntry& entry, std::uint64_t max_bytes) const {
        if (entry.size > max_bytes) {
            refuse({"entry ", quote(entry.name), " has ", entry.size, " bytes, at most ", max_bytes,
                    " are accepted"});
        }
        std::vector<std::byte> bytes = read_bytes(file_, entry.offset, entry.size);
        verify(entry, crc32(bytes));
        return bytes;
    }
    // 0: the writer had checksums switched off (torch.serialization.set_crc32_options).
    static void verify(const ZipEntry& entry, std::uint32_t crc) {
        if (entry.crc != 0 && crc != entry.crc) {
            refuse({"the checksum of entry ", quote(entry.name),
                    " is wrong: the file is damaged. Copy it again"},
                   static_cast<std::int64_t>(entry.offset));
        }
    }

private:
    [[noreturn, gnu::cold]] static void fail(const ZipEntry& e, const char* what,
                                             std::uint64_t at) {
        refuse({"zip: entry ", quote(e.name), " ", what},
               static_cast<std::int64_t>(at & INT64_MAX));
    }

    // The end record is the last 22 bytes (torch writes no archive comment); a zip64 end record and
    // its locator stand right before it, and their values count where the old fields are saturated.
    void find_directory() {
        const std::uint64_t size = file_.size();
        if (!has_end_record(file_))
            refuse({not_a_zip(as_text(read_bytes(file_, 0, std::min<std::uint64_t>(size, 64))))});
        const ZipRecord end(file_, size - 22, 22);
        if (end.u16(20) != 0) end.fail("the archive has a comment, torch.save writes none");
        if (end.u16(4) != 0 || end.u16(6) != 0) end.fail("spans several disks");
        if (end.u16(8) != end.u16(10)) end.fail("entry counts disagree");
        count_ = end.u16(10);
        directory_size_ = end.u32(12);
        directory_ = end.u32(16);
        std::uint64_t limit = end.begin;  // where the directory must end
        if (size >= 42) {
            const ZipRecord locator(file_, size - 42, 20);
            if (locator.u32(0) == 0x07064b50) limit = read_zip64_end(locator);
        }
        if (count_ > kMaxZipEntries) end.fail("has more than 65,536 entries");
        if (directory_size_ > kMaxZipDirectory) end.fail("the directory is larger than 16 MiB");
        if (checked_add(directory_, directory_size_) != limit)
            end.fail("the directory does not end where the end record begins");
    }
    std::uint64_t read_zip64_end(const ZipRecord& locator) {
        if (locator.u32(4) != 0 || locator.u32(16) != 1)
            locator.fail("the zip64 locator speaks of several disks");
        if (locator.begin < 56 || locator.u64(8) != locator.begin - 56)
            locator.fail("the zip64 end record is not before its locator");
        const ZipRecord end(file_, locator.begin - 56, 56);
        if (end.u32(0) != 0x06064b50 || end.u64(4) != 44)
            end.fail("the zip64 end record is malformed");
        if (end.u32(16) != 0 || end.u32(20) != 0)
            end.fail("the zip64 end record speaks of several disks");
        if (end.u64(24) != end.u64(32)) end.fail("entry counts disagree");
        const auto widen = [&](std::uint64_t& value, std::uint64_t saturated, std::uint64_t wide) {
            if (value != saturated && value != wide) end.fail("the two end records disagree");
            value = wide;
        };
        widen(count_, 0xffff, end.u64(32));
        widen(directory_size_, 0xffffffff, end.u64(40));
        widen(directory_, 0xffffffff, end.u64(48));
        return end.begin;
    }

    void read_directory() {
        const ZipRecord directory(file_, directory_, directory_size_);
        if (count_ > directory_size_ / 46)
            directory.fail("the directory is too small for its entry count");
        entries_.reserve(count_);
        std::size_t at = 0;
        for (std::uint64_t i = 0; i < count_; ++i) at = read_entry(directory, at);
        if (at != directory_size_) directory.fail("the directory holds more than its entries", at);
    }
    // Reads the entry at this byte of the directory; returns where the next one begins.
    std::size_t read_entry(const ZipRecord& d, std::size_t at) {
        const std::size_t left = d.bytes.size() - at;
        if (left < 46 || d.u32(at) != 0x02014b50)
            d.fail("a directory entry is cut off or malformed", at);
        const std::size_t name = d.u16(at + 28), extra = d.u16(at + 30), comment = d.u16(at + 32);
        if (left - 46 < name + extra + comment) d.fail("a directory entry is cut off", at);
        const auto rest = std::span(d.bytes).subspan(at + 46);
        ZipEntry e{.name = std::string(as_text(rest.first(name))),
                   .size = d.u32(at + 24),
                   .crc = static_cast<std::uint32_t>(d.u32(at + 16)),
                   .header = d.u32(at + 42)};
        const std::uint64_t begin = d.begin + at;
        std::uint64_t packed = d.u32(at + 20);
        check_name(e, begin);
        if ((d.u16(at + 8) & 0x41) != 0) fail(e, "is encrypted", begin);
        if ((d.u16(at + 8) & ~kZipFlags) != 0) fail(e, "has unknown flags", begin);
        if (d.u16(at + 10) != 0) fail(e, "is compressed, torch.save stores", begin);
        if (d.u16(at + 34) != 0) fail(e, "is on another disk", begin);
        read_zip64_extra(e, packed, rest.subspan(name, extra), begin);
        if (packed != e.size) fail(e, "has two different sizes", begin);
        entries_.push_back(std::move(e));
        return at + 46 + name + extra + comment;
    }
    static void check_name(const ZipEntry& e, std::uint64_t begin) {
        const std::string path = cat({"/", e.name, "/"});
        const bool safe = !e.name.empty() && e.name.size() <= kMaxZipName && is_utf8(e.name) &&
                          !path.starts_with("//") && path.find("/../") == path.npos &&
                          path.find('\0') == path.npos && path.find('\\') == path.npos;
        if (!safe) fail(e, "has a name that is not accepted", begin);
    }
    // Extra field 1 holds the 64-bit values of the 32-bit fields that are saturated, in this order.
    static void read_zip64_extra(ZipEntry& e, std::uint64_t& packed,
                                 std::span<const std::byte> extra, std::uint64_t begin) {
        while (extra.size() >= 4) {
            const std::size_t size = little_endian<2>(extra, 2);
            if (size > extra.size() - 4) break;
            auto field = extra.subspan(4, size);
            for (std::uint64_t* value : {&e.size, &packed, &e.header}) {
                if (little_endian<2>(extra, 0) != 1 || *value != 0xffffffff) continue;
                if (field.size() < 8) fail(e, "has a zip64 field that is cut off", begin);
                *value = little_endian<8>(field, 0);
                field = field.subspan(8);
            }
            extra = extra.subspan(4 + size);
        }
        if (!extra.empty()) fail(e, "has a malformed extra field", begin);
    }

    void check_local_header(ZipEntry& e) const {
        if (e.header > directory_ || directory_ - e.header < 30 + e.name.size())
            fail(e, "lies outside the file", e.header);
        const ZipRecord h(file_, e.header, 30 + e.name.size());
        if (h.u32(0) != 0x04034b50) fail(e, "has no local header", e.header);
        if ((h.u16(6) & ~kZipFlags) != 0 || h.u16(8) != 0)
            fail(e, "is compressed or encrypted in its local header", e.header);
        if (as_text(h.bytes).substr(30) != e.name || h.u16(26) != e.name.size())
            fail(e, "has another name in its local header", e.header);
        const std::uint64_t packed = h.u32(18), size = h.u32(22);
        // sizes follow the data
        const bool deferred = (h.u16(6) & 8) != 0 && packed == 0 && size == 0;
        const bool zip64 = packed == 0xffffffff && size == 0xffffffff;
        if (!deferred && !zip64 && (packed != e.size || size != e.size))
            fail(e, "has other sizes in its local header", e.header);
        e.offset = e.header + 30 + e.name.size() + h.u16(28);
        if (e.offset > directory_ || e.size > directory_ - e.offset)
            fail(e, "lies outside the file", e.header);
    }
    // The entries must fill the file up to the directory: no overlaps, nothing in between but the
    // descriptors (12 to 24 bytes) torch writes behind the data. No file is two things at once.
    void check_order() {
        sort_by(entries_, [](const ZipEntry& e) { return e.header; });
        std::uint64_t end = 0;
        for (std::size_t i = 0; i <= entries_.size(); ++i) {
            const std::uint64_t next = i < entries_.size() ? entries_[i].header : directory_;
            if (next < end) fail(entries_[i - 1], "overlaps with what follows it", next);
            if (next - end > (i == 0 ? 0 : 24)) {
                refuse("zip: there are bytes that belong to no entry",
                       static_cast<std::int64_t>(next));
            }
            if (i < entries_.size()) end = entries_[i].offset + entries_[i].size;
        }
    }

    File file_;
    std::uint64_t directory_ = 0, directory_size_ = 0, count_ = 0;
    std::vector<ZipEntry> entries_;
};

}  // namespace detail

// ==== 7. pickle ==================================================================================
// torch.save and tiktoken store their data as pickle programs. Run as Python they could call
// anything, so this is no unpickler: it knows the opcodes that those two writers emit (the cases of
// PickleReader::step) and fourteen names (PickleReader::global), builds a tree of plain values, and
// refuses everything else by name and offset. Nothing is looked up or called.
// In PickleReader: run / the stack, the marks and the memo / building; global (names), step.
//
// A container that has become part of another one is closed to changes. The writers never change
// one then, and so no tree can contain itself. Depth costs nothing: the stack is the machine's own.

namespace detail {

// clang-format off
enum class PickleKind : std::uint8_t {
    none, boolean, integer, real, text, bytes, tuple, list, dict, ordered_dict,
    global,   // text: "module name", one of the allowed ones
    storage,  // items: "storage", global of the class, key, location, elements
    tensor,   // items: storage, offset, shape, strides
    encoding  // items: the state of a tiktoken.Encoding
};
// clang-format on

struct PickleValue {
    PickleKind kind = PickleKind::none;
    bool closed = false;         // part of another value: unchangeable from now on
    std::uint32_t at = 0;        // offset of the opcode that made it
    std::int64_t integer = 0;    // boolean and integer
    double real = 0;             // real
    std::string_view text = {};  // text (valid UTF-8), bytes, global; points into the input
    std::vector<std::uint32_t> items = {};  // members; a dict's are key, value, key, value, ...
};

struct PickleTree {  // values name each other by index
    std::vector<PickleValue> nodes;
    std::uint32_t root = 0;
    const PickleValue& operator[](std::uint32_t i) const { return nodes[i]; }
};

enum class PickleFor : std::uint8_t { checkpoint, tokenizer };  // what is allowed in it

constexpr std::uint64_t kMaxPickle = 16 << 20;  // bytes; a real state dict has 20 to 100 KiB
constexpr std::size_t kMaxPickleValues = std::size_t{1} << 19;  // 64 bytes each
constexpr std::size_t kMaxPickleStack = 65536;
constexpr std::size_t kMaxPickleMarks = 64;
constexpr std::size_t kMaxPickleText = 65536;  // bytes of one string

constexpr std::string_view kOrderedDict = "collections OrderedDict",
                           kRebuildTensor = "torch._utils _rebuild_tensor_v2",
                           kRebuildParameter = "torch._utils _rebuild_parameter",
                           kEncoding = "tiktoken.core Encoding";
// What a checkpoint may name: storages, in the order of DType, and what puts tensors together.
constexpr std::string_view kCheckpointNames[] = {
    "torch FloatStorage", "torch BFloat16Storage", "torch HalfStorage",  "torch DoubleStorage",
    "torch LongStorage",  "torch IntStorage",      "torch ShortStorage", "torch CharStorage",
    "torch ByteStorage",  "torch BoolStorage",     kOrderedDict,         kRebuildTensor,
    kRebuildParameter};
static_assert(std::size(kCheckpointNames) == static_cast<std::size_t>(DType::boolean) + 4);

class PickleReader {
public:
    PickleReader(std::span<const std::byte> bytes, PickleFor what)
        : in_(as_text(bytes)), checkpoint_(what == PickleFor::checkpoint) {}

    PickleTree run() {
        if (in_.size() > kMaxPickle) refuse("pickle: larger than 16 MiB");
        tree_.nodes.reserve(std::min(in_.size() / 3 + 1, kMaxPickleValues));
        for (char op = 0; op != '.';) {
            op_at_ = at_;
            op = take(1)[0];
            step(static_cast<unsigned char>(op));
        }
        if (at_ != in_.size()) fail("bytes after the end");
        return std::move(tree_);
    }

private:
    using Kind = PickleKind;

    [[noreturn, gnu::cold]] void fail(TextParts message) const {
        refuse({"pickle: ", cat(message)}, static_cast<std::int64_t>(op_at_));
    }
    [[noreturn]] void fail(const char* message) const { fail({TextPart(message)}); }

    std::string_view take(std::uint64_t n) {
        if (n > in_.size() - at_) fail("cut off");
        at_ += n;
        return in_.substr(at_ - n, n);
    }
    template <int Bytes>
    std::uint64_t number() {
        const std::string_view s = take(Bytes);
        return little_endian<Bytes>(std::as_bytes(std::span(s)), 0);
    }
    std::string_view line() {  // up to a newline
        const std::size_t n = in_.substr(at_, 512).find('\n');
        if (n == in_.npos) fail("a name without end");
        return take(n + 1).substr(0, n);
    }

    // ---- the stack, the marks and the memo
    std::uint32_t push(Kind kind) {
        if (tree_.nodes.size() >= kMaxPickleValues) fail("more than 524,288 values");
        const auto i = static_cast<std::uint32_t>(tree_.nodes.size());
        tree_.nodes.push_back({.kind = kind, .at = static_cast<std::uint32_t>(op_at_)});
        push(i);
        return i;
    }
    void push(std::uint32_t i) {
        if (stack_.size() >= kMaxPickleStack) fail("more than 65,536 values on the stack");
        stack_.push_back(i);
    }
    PickleValue& node(std::uint32_t i) { return tree_.nodes[i]; }
    std::uint32_t top() const {  // above the last mark, which POPs must not pass
        const std::size_t floor = marks_.empty() ? 0 : marks_.back();
        if (stack_.size() <= floor) fail("an opcode finds too few values on the stack");
        return stack_.back();
    }
    std::uint32_t pop() {
        const std::uint32_t i = top();
        stack_.pop_back();
        return i;
    }
    std::vector<std::uint32_t> pop_to_mark() {
        if (marks_.empty()) fail("an opcode finds no mark");
        const std::size_t n = stack_.size() - marks_.back();
        marks_.pop_back();
        return pop_many(n);
    }
    std::vector<std::uint32_t> pop_many(std::size_t n) {
        std::vector<std::uint32_t> items(n);
        while (n-- > 0) items[n] = pop();
        return items;
    }
    void put(std::uint64_t i) {
        if (i >= std::min(in_.size(), 2 * kMaxPickleValues))
            fail({"memo index ", i, " is out of range"});
        if (i >= memo_.size()) memo_.resize(i + 1, kUnset);
        memo_[i] = top();
    }
    void get(std::uint64_t i) {
        if (i >= memo_.size() || memo_[i] == kUnset) fail({"memo entry ", i, " was never set"});
        push(memo_[i]);
    }

    // ---- building
    void tuple(std::vector<std::uint32_t> items) {
        const std::uint32_t t = push(Kind::tuple);
        for (const std::uint32_t i : items) node(i).closed = true;
        node(t).items = std::move(items);
    }
    void text(std::uint64_t n, Kind kind) {
        if (n > kMaxPickleText) fail({"a string of ", n, " bytes, at most 65,536 are accepted"});
        const std::string_view s = take(n);
        if (kind == Kind::text && !is_utf8(s)) fail("a string is not UTF-8");
        node(push(kind)).text = s;
    }
    void integer(std::int64_t value, Kind kind = Kind::integer) {
        node(push(kind)).integer = value;
    }
    void extend(const std::vector<std::uint32_t>& items, bool pairs) {
        const std::uint32_t target = top();
        PickleValue& t = node(target);
        const bool fits =
            pairs ? t.kind == Kind::dict || t.kind == Kind::ordered_dict : t.kind == Kind::list;
        if (!fits) fail(pairs ? "SETITEM on what is no dict" : "APPEND on what is no list");
        if (t.closed) fail("a change of a container that is part of another one");
        if (pairs && items.size() % 2 != 0) fail("SETITEMS with a key without value");
        for (const std::uint32_t i : items) {
            if (i == target) fail("a container that contains itself");
            node(i).closed = true;
        }
        t.items.insert(t.items.end(), items.begin(), items.end());
    }
    void global(std::string_view module, std::string_view name) {
        const std::string full = cat({module, " ", name});
        using Names = std::span<const std::string_view>;
        const Names allowed = checkpoint_ ? Names(kCheckpointNames) : Names(&kEncoding, 1);
        const auto at = std::find(allowed.begin(), allowed.end(), full);
        if (at == allowed.end()) {
            fail({"names ", quote(cat({module, ".", name})), ", which no ",
                  checkpoint_ ? "checkpoint" : "tokenizer", " needs. Nothing was executed"});
        }
        node(push(Kind::global)).text = *at;
    }
    bool is(std::uint32_t i, Kind kind) const { return tree_.nodes[i].kind == kind; }
    bool are(const std::vector<std::uint32_t>& items, std::initializer_list<Kind> kinds) const {
        const auto same = [&](std::uint32_t i, Kind kind) { return is(i, kind); };
        return std::equal(items.begin(), items.end(), kinds.begin(), kinds.end(), same);
    }
    bool is_global(std::uint32_t i, std::string_view name) const {
        return is(i, Kind::global) && tree_.nodes[i].text == name;
    }

    // callable(arguments): three callables, with exactly the arguments torch gives them
    void reduce() {
        const std::uint32_t args = pop(), callable = pop();
        if (!is(args, Kind::tuple)) fail("REDUCE without a tuple of arguments");
        if (node(args).items.size() > 7) fail("REDUCE with more than 7 arguments");
        std::vector<std::uint32_t> a = node(args).items;
        if (is_global(callable, kOrderedDict)) {
            if (!a.empty()) fail("OrderedDict with arguments");
            push(Kind::ordered_dict);
        } else if (is_global(callable, kRebuildTensor)) {
            if (a.size() == 7) a.pop_back();  // metadata, of no use here
            if (!are(a, {Kind::storage, Kind::integer, Kind::tuple, Kind::tuple, Kind::boolean,
                         Kind::ordered_dict}))
                fail("_rebuild_tensor_v2 with arguments of other types");
            for (const std::uint32_t t : {a[2], a[3]}) {
                if (node(t).items.size() > 4) fail("a tensor of more than 4 dimensions");
                for (const std::uint32_t i : node(t).items) {
                    if (!is(i, Kind::integer)) fail("a tensor's shape or strides are not integers");
                }
            }
            node(push(Kind::tensor)).items = {a[0], a[1], a[2], a[3]};
        } else if (is_global(callable, kRebuildParameter)) {
            if (!are(a, {Kind::tensor, Kind::boolean, Kind::ordered_dict}))
                fail("_rebuild_parameter with arguments of other types");
            push(a[0]);
        } else {
            fail("REDUCE on what is not callable here");
        }
    }
    void persistent_id() {
        const std::uint32_t id = pop();
        const std::vector<std::uint32_t> t = node(id).items;
        if (!is(id, Kind::tuple) ||
            !are(t, {Kind::text, Kind::global, Kind::text, Kind::text, Kind::integer}) ||
            node(t[0]).text != "storage" || !node(t[1]).text.ends_with("Storage"))
            fail("BINPERSID with something else than a storage");
        node(push(Kind::storage)).items = t;
    }
    void new_object() {
        const std::uint32_t args = pop(), cls = pop();
        if (!is_global(cls, kEncoding) || !is(args, Kind::tuple) || !node(args).items.empty())
            fail("NEWOBJ on what is no tiktoken.Encoding");
        push(Kind::encoding);
    }
    void build() {
        const std::uint32_t state = pop(), target = top();
        if (node(target).closed || state == target)
            fail("BUILD on a container that is part of another one");
        if (is(target, Kind::encoding) && node(target).items.empty()) {
            node(state).closed = true;
            node(target).items = {state};
            // its _metadata is of no use here
        } else if (!is(target, Kind::ordered_dict) || !is(state, Kind::dict)) {
            fail("BUILD on what is neither an OrderedDict nor a new Encoding");
        }
    }

    // ---- the opcodes
    void step(unsigned op) {
        // clang-format off
        switch (op) {
            case 0x80: return protocol(number<1>());
            case 0x95: return frame(number<8>());
            case '.': return stop();
            case '(': return mark();
            case 'q': return put(number<1>());
            case 'r': return put(number<4>());
            case 0x94: return put(memo_.size());               // MEMOIZE
            case 'h': return get(number<1>());
            case 'j': return get(number<4>());
            case 'N': push(Kind::none); return;
            case 0x88: return integer(1, Kind::boolean);
            case 0x89: return integer(0, Kind::boolean);
            case 'K': return integer(static_cast<std::int64_t>(number<1>()));
            case 'M': return integer(static_cast<std::int64_t>(number<2>()));
            case 'J': return integer(static_cast<std::int32_t>(number<4>()));
            case 0x8a: return long1(number<1>());
            case 'G': return real();
            case 'X': return text(number<4>(), Kind::text);
            case 0x8c: return text(number<1>(), Kind::text);
            case '}': push(Kind::dict); return;
            case ']': push(Kind::list); return;
            case ')': push(Kind::tuple); return;
            case 't': return tuple(pop_to_mark());
            case 0x85: case 0x86: case 0x87: return tuple(pop_many(op - 0x84));
            case 'a': return extend(pop_many(1), false);
            case 'e': return extend(pop_to_mark(), false);
            case 's': return extend(pop_many(2), true);
            case 'u': return extend(pop_to_mark(), true);
            case 'c': return global();
            case 0x93: return stack_global();
            case 'b': return build();
            case 'R': if (checkpoint_) return reduce(); break;
            case 'Q': if (checkpoint_) return persistent_id(); break;
            case 0x81: if (!checkpoint_) return new_object(); break;
            case 'B': if (!checkpoint_) return text(number<4>(), Kind::bytes); break;
            case 'C': if (!checkpoint_) return text(number<1>(), Kind::bytes); break;
            default: break;
        }
        // clang-format on
        fail({"opcode ", opcode_name(op), " is not accepted. Nothing was executed"});
    }
    void stop() {
        tree_.root = pop();
        if (!stack_.empty() || !marks_.empty()) fail("values are left on the stack");
    }
    void frame(std::uint64_t bytes) {
        if (bytes > in_.size() - at_) fail("a frame reaches past the end");
    }
    void mark() {
        if (marks_.size() >= kMaxPickleMarks) fail("more than 64 marks");
        marks_.push_back(stack_.size());
    }
    void real() {  // the one number with the high byte first
        std::uint64_t bits = 0;
        for (const char c : take(8)) bits = bits << 8 | static_cast<unsigned char>(c);
        node(push(Kind::real)).real = std::bit_cast<double>(bits);
    }
    void stack_global() {
        const std::uint32_t name = pop(), module = pop();
        if (!is(name, Kind::text) || !is(module, Kind::text))
            fail("STACK_GLOBAL without two names");
        global(node(module).text, node(name).text);
    }
    void global() {
        const std::string_view module = line();
        global(module, line());
    }
    void protocol(std::uint64_t version) {
        if (op_at_ != 0 || version < 2 || version > 5)
            fail({"protocol ", version, " is not accepted here"});
    }
    void long1(std::uint64_t n) {  // n bytes of two's complement, low byte first
        if (n > 8) fail("an integer of more than 64 bits");
        const std::string_view s = take(n);
        std::int64_t value = n > 0 && (s.back() & '\x80') != 0 ? -1 : 0;
        std::memcpy(&value, s.data(), n);
        integer(value);
    }
    static std::string opcode_name(unsigned op) {
        // clang-format off
        constexpr std::pair<unsigned, std::string_view> kNames[] = {
            {'i', "INST"}, {'o', "OBJ"}, {0x81, "NEWOBJ"}, {0x92, "NEWOBJ_EX"}, {0x82, "EXT1"},
            {0x83, "EXT2"}, {0x84, "EXT4"}, {'P', "PERSID"}, {'Q', "BINPERSID"}, {'R', "REDUCE"},
            {'0', "POP"}, {'1', "POP_MARK"}, {'2', "DUP"}, {'F', "FLOAT"}, {'I', "INT"},
            {'L', "LONG"}, {'S', "STRING"}, {'V', "UNICODE"}, {'T', "BINSTRING"},
            {'U', "SHORT_BINSTRING"}, {'B', "BINBYTES"}, {'C', "SHORT_BINBYTES"}, {0x8b, "LONG4"},
            {0x8d, "BINUNICODE8"}, {0x8e, "BINBYTES8"}, {0x8f, "EMPTY_SET"}, {0x90, "ADDITEMS"},
            {0x91, "FROZENSET"}, {0x96, "BYTEARRAY8"}, {0x97, "NEXT_BUFFER"},
            {0x98, "READONLY_BUFFER"}, {'d', "DICT"}, {'l', "LIST"}, {'g', "GET"}, {'p', "PUT"}};
        // clang-format on
        for (const auto& [code, name] : kNames) {
            if (code == op) return std::string(name);
        }
        return quote(std::string(1, static_cast<char>(static_cast<unsigned char>(op))));
    }

    static constexpr std::uint32_t kUnset = 0xffffffff;
    std::string_view in_;
    bool checkpoint_;
    std::size_t at_ = 0, op_at_ = 0;
    PickleTree tree_;
    std::vector<std::uint32_t> stack_, memo_;
    std::vector<std::size_t> marks_;
};

// The tree of a pickle; throws refused. The bytes must outlive the tree.
inline PickleTree parse_pickle(std::span<const std::byte> bytes, PickleFor what) {
    return PickleReader(bytes, what).run();
}

}  // namespace detail

// ==== 8. json ====================================================================================
// A strict reader (RFC 8259), with depth and size bounded by the caller. nanochat's metadata is
// Python's JSON, in which NaN and Infinity occur (a loss before the first evaluation); that dialect
// is asked for by name. Duplicate keys are refused: two readers could disagree about them.

struct JsonMember;
struct Json {
    enum class Kind : std::uint8_t { null, boolean, number, string, array, object };
    Kind kind = Kind::null;
    bool boolean = false;
    double number = 0;
    std::string string;  // of a number: its text
    std::vector<Json> array;
    std::vector<JsonMember> object;  // in the order of the text

    const Json* find(std::string_view key) const;  // a member of an object, or null
};

struct JsonMember {
    std::string first;  // key
    Json second;        // value
};
inline const Json* Json::find(std::string_view key) const {
    for (const JsonMember& member : object) {
        if (member.first == key) return &member.second;
    }
    return nullptr;
}

enum class JsonDialect : std::uint8_t { strict, python };

namespace detail {

constexpr std::size_t kMaxJsonValues = 100000;  // 96 bytes each

class JsonReader {
public:
    JsonReader(std::string_view text, JsonDialect dialect, int max_depth)
        : in_(text), python_(dialect == JsonDialect::python), max_depth_(max_depth) {}

    Json run() {
        if (in_.starts_with("\xef\xbb\xbf")) fail("begins with a byte order mark");
        if (!is_utf8(in_)) fail("is not UTF-8");
        Json value = read(0);
        skip(kSpaces);
        if (at_ != in_.size()) fail("goes on after its end");
        return value;
    }

private:
    [[noreturn]] void fail(std::string_view what) const {
        refuse({"JSON ", what}, static_cast<std::int64_t>(at_));
    }
    char peek() const { return at_ < in_.size() ? in_[at_] : '\0'; }
    // Passes over characters of these; returns how many.
    std::size_t skip(std::string_view characters) {
        const std::size_t begin = at_;
        at_ = std::min(in_.find_first_not_of(characters, at_), in_.size());
        return at_ - begin;
    }
    bool accept(std::string_view word) {
        if (!in_.substr(at_).starts_with(word)) return false;
        at_ += word.size();
        return true;
    }
    bool next(std::string_view symbol) {  // behind spaces
        skip(kSpaces);
        return accept(symbol);
    }

    Json read(int depth) {
        skip(kSpaces);
        if (depth > max_depth_) fail(cat({"is nested deeper than ", max_depth_}));
        if (++values_ > kMaxJsonValues) fail("has more than 100,000 values");
        Json value;
        if (at_ == in_.size()) fail(in_.empty() ? "is empty" : "ends too early");
        const char c = peek();
        if (accept("{")) {
            read_object(value, depth);
        } else if (accept("[")) {
            read_array(value, depth);
        } else if (accept("\"")) {
            value.kind = Json::Kind::string;
            value.string = read_string();
        } else if (accept("true") || accept("false")) {
            value.kind = Json::Kind::boolean;
            value.boolean = c == 't';
        } else if (!accept("null")) {
            read_number(value);
        }
        return value;
    }
    void read_array(Json& value, int depth) {
        value.kind = Json::Kind::array;
        if (next("]")) return;
        do value.array.push_back(read(depth + 1));
        while (next(","));
        if (!next("]")) fail("has an array without , or ]");
    }
    void read_object(Json& value, int depth) {
        value.kind = Json::Kind::object;
        if (next("}")) return;
        do {
            if (!next("\"")) fail("has an object with a key that is no string");
            std::string key = read_string();
            if (!next(":")) fail("has a key without :");
            value.object.push_back({std::move(key), read(depth + 1)});
        } while (next(","));
        if (!next("}")) fail("has an object without , or }");
        std::vector<std::string_view> keys;
        for (const auto& member : value.object) keys.push_back(member.first);
        if (const auto* twice = sort_by(keys, [](std::string_view key) { return key; }))
            fail(cat({"has the key ", quote(*twice), " twice"}));
    }

    std::string read_string() {  // behind its opening quote
        std::string out;
        while (!accept("\"")) {
            if (at_ == in_.size()) fail("has a string without end");
            if (static_cast<unsigned char>(in_[at_]) < 0x20)
                fail("has a control character in a string");
            accept("\\") ? read_escape(out) : out.push_back(in_[at_++]);
        }
        return out;
    }
    void read_escape(std::string& out) {
        constexpr std::string_view kFrom = "\"\\/bfnrt", kTo = "\"\\/\b\f\n\r\t";
        if (!accept("u")) {
            const std::size_t i = kFrom.find(peek());
            if (i == kFrom.npos) fail("has an unknown escape");
            out += kTo[i];
            ++at_;
            return;
        }
        std::uint32_t code = hex4();
        if (code >= 0xd800 && code < 0xdc00 && accept("\\u")) {
            const std::uint32_t low = hex4();
            if (low < 0xdc00 || low > 0xdfff) fail("has half a surrogate pair");
            code = 0x10000 + ((code - 0xd800) << 10 | (low - 0xdc00));
        }
        if (code >= 0xd800 && code <= 0xdfff) fail("has half a surrogate pair");
        append_utf8(out, code);
    }
    std::uint32_t hex4() {
        std::uint32_t code = 0;
        const std::string_view four = in_.substr(at_, 4);
        const char* const end = four.data() + four.size();
        if (four.size() < 4 || std::from_chars(four.data(), end, code, 16).ptr != end)
            fail("has a bad \\u escape");
        at_ += 4;
        return code;
    }

    void read_number(Json& value) {
        value.kind = Json::Kind::number;
        const std::size_t begin = at_;
        const bool negative = accept("-");
        if (python_ && !negative && accept("NaN"))
            return void(value.number = std::numeric_limits<double>::quiet_NaN());
        if (python_ && accept("Infinity"))
            return void(value.number = negative ? -HUGE_VAL : HUGE_VAL);
        if (!accept("0")) digits("has something that is no value");
        if (accept(".")) digits();
        if (accept("e") || accept("E")) {
            if (!accept("+")) accept("-");
            digits();
        }
        value.string = in_.substr(begin, at_ - begin);
        if (value.string.size() > 64) fail("has a number of more than 64 characters");
        // "1e999": from_chars leaves the value alone, and 0 would be a silent change
        const char* const end = value.string.data() + value.string.size();
        if (std::from_chars(value.string.data(), end, value.number).ec != std::errc{})
            fail("has a number out of range");
    }
    void digits(const char* otherwise = "has a number without digits") {
        if (skip("0123456789") == 0) fail(otherwise);
    }

    static constexpr std::string_view kSpaces = " \t\n\r";
    std::string_view in_;
    bool python_;
    int max_depth_;
    std::size_t at_ = 0, values_ = 0;
};

}  // namespace detail

// Throws refused, with the offset.
inline Json parse_json(std::string_view text, JsonDialect dialect = JsonDialect::strict,
                       int max_depth = 32) {
    return detail::JsonReader(text, dialect, max_depth).run();
}

// ==== 9. checkpoint ==============================================================================
// A nanochat base directory holds model_<step>.pt and meta_<step>.json under
// <source>_checkpoints/<tag>/. nanochat's architecture changed five times, and constants that
// changed with it are not stored. So the generation is read off the names of the tensors, by
// detect_generation() below, and gives the constants (kGenerations):
//
//   gen  recognised by          nanochat of             RoPE base  QK    softcap   gate   S window
//   G0   none of the below      2025-10-13 to 01-11      10,000    1     15        -      all full
//   G1   resid_lambdas          2026-01-11 to 01-18      10,000    1     15        -      S/2
//   G2   ve_gate, 32 columns    2026-01-18 to 03-09      10,000    1     15 or 20  2 sig  S/2
//   G2e  bigram_embed           2026-01-27 to 01-28      10,000    1     15        2 sig  S/2
//   G3   ve_gate, 12 columns    2026-03-09 to 03-14     100,000    1.15  15        3 sig  S/3 *
//   G4   smear_gate             since 2026-03-14        100,000    1.2   15        3 sig  S/4 *
//
//   (sig: sigmoid; *: rounded up to a multiple of 128)
//
// What leaves no trace has a rule here, a warning where it matters, and a switch in Overrides.
// In order: Config (window), Overrides, ModelInfo, kGenerations / state dict (read_state_dict) /
// from the tensors to the generation (detect_generation) and back (check_tensors) / the metadata
// (read_config) / names of files (step_of) / what is not stored (settle decides every setting) /
// place, examine / base_dir, find_models, inspect_model, find_tokenizer.

enum class Generation : std::uint8_t { g0, g1, g2, g2e, g3, g4 };

struct Config {
    // stored in meta_*.json, with its names
    int sequence_len = 2048;           // S, longest context trained
    int vocab_size = 32768;            // V
    int n_layer = 12;                  // L
    int n_head = 6;                    // H, query heads
    int n_kv_head = 6;                 // K, key/value heads; divides H
    int n_embd = 768;                  // D
    std::string window_pattern = "L";  // tiled over the layers: L full context, S short window
    // implied by the tensors
    Generation generation = Generation::g4;
    int vocab_rows = 32768;     // Vp >= V, rows of wte and lm_head (padded to 64)
    float rope_base = 100000;   // of the rotary embedding
    float qk_scale = 1.2f;      // on q and on k, after their norms
    float softcap = 15;         // logits = softcap * tanh(logits / softcap)
    float ve_gate_scale = 3;    // gate = scale * sigmoid(...)
    int ve_gate_channels = 12;  // leading channels that the gate reads
    int short_window = 512;     // an S layer sees this many positions back, itself besides
    // cos and sin rounded to bfloat16, as nanochat did until 2026-03-04 (assumed for all of G2)
    bool bf16_rope_tables = false;

    int head_dim() const { return n_embd / n_head; }  // hd
    // A query sees keys at most this many positions back (inclusive). The last layer is always L.
    int window(int layer) const {
        if (generation == Generation::g0) return INT_MAX;
        const char c = window_pattern[static_cast<std::size_t>(layer) % window_pattern.size()];
        return (c == 'S' || c == 's') && layer != n_layer - 1 ? short_window : sequence_len;
    }
    bool has_lambdas() const { return generation != Generation::g0; }
    bool has_value_embed(int layer) const {  // every other layer, the last one included
        return generation >= Generation::g2 && layer % 2 == (n_layer - 1) % 2;
    }
};

// What a user may insist on, where a checkpoint does not say or is not believed.
struct Overrides {
    std::optional<Generation> generation;
    std::optional<float> softcap, rope_base, qk_scale;
    std::optional<std::string> window_pattern;
    std::optional<int> short_window, sequence_len;
    std::optional<bool> bf16_rope_tables;
};

enum class Origin : std::uint8_t { stored, implied, assumed, overridden };
constexpr std::string_view name_of(Origin o) {
    constexpr std::string_view kNames[] = {"stored", "implied", "assumed", "overridden"};
    return kNames[static_cast<std::size_t>(o)];
}
struct Setting {  // one value the forward pass uses, and where it comes from
    std::string name, value;
    Origin origin = Origin::stored;
};

enum class Status { ready, incomplete, refused, unsupported, too_large, no_tokenizer };
constexpr std::string_view name_of(Status s) {
    constexpr std::string_view kNames[] = {"ready",       "incomplete", "refused",
                                           "unsupported", "too_large",  "no_tokenizer"};
    return kNames[static_cast<std::size_t>(s)];
}

struct ModelInfo {  // all that is known without reading the weights
    std::filesystem::path model_file, meta_file;
    std::string source, tag, id;  // "sft", "d12", "sft/d12/2000"
    std::int64_t step = 0;
    Status status = Status::ready;
    std::string reason;  // one sentence, if not ready
    Config config;
    bool has_config = false;
    double loss = std::numeric_limits<double>::quiet_NaN();
    std::string loss_metric, loss_unit;  // "val_bpb" in "bits/byte", "val_loss" in "nats/token"
    std::vector<std::pair<std::string, double>> metrics;  // such as mmlu_acc
    std::vector<Setting> settings;
    Overrides overrides;  // what was insisted on
    std::vector<std::string> warnings;
    std::vector<TensorInfo> tensors;
    std::int64_t parameters = 0;
    std::uint64_t file_bytes = 0;
    // of the weights, loaded as float32 (what is stored shorter stays so)
    std::uint64_t memory_bytes = 0;
    std::int64_t modified = 0;  // seconds since 1970
};

namespace detail {

inline void warn(ModelInfo& info, TextParts text) { info.warnings.push_back(cat(text)); }

constexpr int kSmearChannels = 24;  // of x, that G4's smear gate reads

struct GenerationFacts {
    Generation generation;
    std::string_view name, dates;
    float rope_base, qk_scale, ve_gate_scale;
    int ve_gate_channels;
    int window_divisor;     // of an S layer's window; 0: there are none
    int window_multiple;    // S / divisor, rounded up to a multiple of this
    bool bf16_rope_tables;  // what nanochat of the time used; of G2, until 03-04
};
constexpr GenerationFacts kGenerations[] = {
    {Generation::g0, "g0", "2025-10-13 to 2026-01-11", 10000, 1, 0, 0, 0, 1, true},
    {Generation::g1, "g1", "2026-01-11 to 2026-01-18", 10000, 1, 0, 0, 2, 1, true},
    {Generation::g2, "g2", "2026-01-18 to 2026-03-09", 10000, 1, 2, 32, 2, 1, true},
    {Generation::g2e, "g2e", "2026-01-27 to 2026-01-28", 10000, 1, 2, 32, 2, 1, true},
    {Generation::g3, "g3", "2026-03-09 to 2026-03-14", 100000, 1.15f, 3, 12, 3, 128, false},
    {Generation::g4, "g4", "since 2026-03-14", 100000, 1.2f, 3, 12, 4, 128, false}};
constexpr const GenerationFacts& facts(Generation g) {
    return kGenerations[static_cast<std::size_t>(g)];
}

constexpr int short_window(const GenerationFacts& f, int sequence_len) {
    if (f.window_divisor == 0) return INT_MAX;
    if (f.window_multiple == 1) return sequence_len / f.window_divisor;
    const int share = (sequence_len + f.window_divisor - 1) / f.window_divisor;
    return (share + f.window_multiple - 1) / f.window_multiple * f.window_multiple;
}
static_assert(short_window(facts(Generation::g1), 2048) == 1024 &&
              short_window(facts(Generation::g3), 2048) == 768 &&
              short_window(facts(Generation::g4), 2048) == 512 &&
              short_window(facts(Generation::g4), 512) == 128);

struct StoredTensor {  // where a tensor's elements lie in the file
    TensorInfo info;
    const ZipEntry* entry = nullptr;
    static std::string_view key(const StoredTensor& t) { return t.info.name; }
    std::uint64_t bytes() const { return checked_mul(count(info.shape), size_of(info.dtype)); }
};

// ---- the state dict: names and places of the tensors

// torch.compile and DataParallel put prefixes
inline std::string plain_name(std::string_view name) {
    constexpr std::string_view kPrefixes[] = {"_orig_mod.", "module."};
    for (int i = 0; i < 4; ++i) {
        for (const std::string_view p : kPrefixes)
            name.remove_prefix(name.starts_with(p) ? p.size() : 0);
    }
    return std::string(name);
}

// One tensor of the pickle, checked against the entry that holds its storage.
inline StoredTensor stored_tensor(const PickleTree& tree, const PickleValue& value,
                                  std::string name, const ZipFile& zip, const std::string& top) {
    const std::string who = cat({"tensor ", quote(name)});
    const PickleValue &storage = tree[value.items[0]], &shape = tree[value.items[2]],
                      &stride = tree[value.items[3]];
    const std::string_view global = tree[storage.items[1]].text, key = tree[storage.items[2]].text;
    const std::int64_t elements = tree[storage.items[4]].integer,
                       offset = tree[value.items[1]].integer;
    StoredTensor t;
    t.info.name = std::move(name);
    const auto* at = std::find(std::begin(kCheckpointNames), std::end(kCheckpointNames), global);
    t.info.dtype = static_cast<DType>(at - kCheckpointNames);
    if (key.empty() || key.size() > 10 || key.find_first_not_of("0123456789") != key.npos)
        refuse({who, " has the storage key ", quote(key)});
    if (tree[storage.items[3]].text == "meta")
        refuse({who, " was saved without data (device meta)"});
    if (elements < 0 || offset < 0) refuse({who, " has a negative size or offset"});
    for (const std::uint32_t i : shape.items) t.info.shape.push_back(tree[i].integer);
    if (shape.items.size() != stride.items.size())
        refuse({who, " has a shape and strides of different lengths"});
    const std::uint64_t n = count(t.info.shape), held = static_cast<std::uint64_t>(elements);
    if (n > held || static_cast<std::uint64_t>(offset) > held - n)
        refuse({who, " reaches past its storage of ", elements, " elements"});
    if (n != held) refuse({who, " is only a part of its storage"});
    std::int64_t expected = 1;  // stride of a contiguous tensor; at most n, which fits
    for (std::size_t i = shape.items.size(); i-- > 0;) {
        const std::int64_t s = tree[stride.items[i]].integer;
        if (s < 0) refuse({who, " has a negative stride"});
        if (n > 0 && t.info.shape[i] != 1 && s != expected) refuse({who, " is not contiguous"});
        if (n > 0) expected *= t.info.shape[i];
    }
    t.entry = zip.find(cat({top, "data/", key}));
    if (t.entry == nullptr) refuse({who, " has no entry data/", key, " in the file"});
    if (t.bytes() != t.entry->size) {
        refuse({who, " declares ", elements, " elements, its entry has ", t.entry->size, " bytes"},
               static_cast<std::int64_t>(t.entry->offset));
    }
    return t;
}

// The folder all entries lie in, such as "model_000650/"; checks the small entries torch adds.
inline std::string top_folder(const ZipFile& zip) {
    std::string top;
    for (const ZipEntry& e : zip.entries()) {
        if (!e.name.ends_with("/data.pkl")) continue;
        if (!top.empty()) refuse("has two entries data.pkl");
        top = e.name.substr(0, e.name.size() - 8);
    }
    if (top.empty()) refuse("has no entry data.pkl: not a checkpoint of torch.save");
    for (const ZipEntry& e : zip.entries()) {
        if (!e.name.starts_with(top))
            refuse({"entry ", quote(e.name), " lies outside the folder ", quote(top)});
        const std::string rest = e.name.substr(top.size());
        if (rest == "constants.pkl" || rest.starts_with("code/"))
            refuse("is a TorchScript archive, not a state dict");
        const bool known = rest == "data.pkl" || rest.starts_with("data/") || rest == "version" ||
                           rest == "byteorder" || rest == ".format_version" ||
                           rest == ".storage_alignment" || rest == ".data/serialization_id";
        if (!known) refuse({"has the unknown entry ", quote(e.name)});
    }
    const auto small = [&](const char* name) {
        const ZipEntry* e = zip.find(top + name);
        const auto bytes = e != nullptr ? zip.read(*e, 64) : std::vector<std::byte>{};
        return std::string(as_text(bytes));
    };
    if (const std::string order = small("byteorder"); !order.empty() && order != "little")
        refuse({"has the byte order ", quote(order), ", this runtime reads little"});
    const std::string version = small("version");
    int number = 0;
    std::from_chars(version.data(), version.data() + version.size(), number);
    if (number < 1 || number > 10)
        refuse({"has the container version ", quote(version), ", 1 to 10 are known"});
    return top;
}

inline std::vector<StoredTensor> read_state_dict(const ZipFile& zip) {
    const std::string top = top_folder(zip);
    const auto bytes = zip.read(*zip.find(cat({top, "data.pkl"})), kMaxPickle);
    const PickleTree tree = parse_pickle(bytes, PickleFor::checkpoint);
    const PickleValue& root = tree[tree.root];
    if (root.kind != PickleKind::dict && root.kind != PickleKind::ordered_dict)
        refuse("holds no dict of tensors");
    std::vector<StoredTensor> tensors;
    for (std::size_t i = 0; i < root.items.size(); i += 2) {
        const PickleValue &key = tree[root.items[i]], &value = tree[root.items[i + 1]];
        if (key.kind != PickleKind::text) refuse("has a tensor whose name is no string", key.at);
        if (value.kind != PickleKind::tensor)
            refuse({"entry ", quote(key.text), " of the state dict is no tensor"}, value.at);
        tensors.push_back(stored_tensor(tree, value, plain_name(key.text), zip, top));
    }
    // two tensors may share a storage only if they are the same
    sort_by(tensors, [](const StoredTensor& t) { return t.entry->header; });
    for (std::size_t i = 1; i < tensors.size(); ++i) {
        const TensorInfo &a = tensors[i - 1].info, &b = tensors[i].info;
        const bool same = a.dtype == b.dtype && a.shape == b.shape;
        if (tensors[i - 1].entry == tensors[i].entry && !same)
            refuse({"tensors ", quote(a.name), " and ", quote(b.name), " share a storage"});
    }
    if (const StoredTensor* twice = sort_by(tensors, StoredTensor::key))
        refuse({"has two tensors ", quote(twice->info.name)});
    return tensors;
}

inline const StoredTensor* find_tensor(const std::vector<StoredTensor>& tensors,
                                       std::string_view name) {
    return find_by(tensors, name, StoredTensor::key);
}

// ---- from the tensors to the generation, from the generation to the tensors

inline Generation detect_generation(const std::vector<StoredTensor>& tensors) {
    bool gate12 = false, gate32 = false;
    for (const StoredTensor& t : tensors) {
        const std::string_view n = t.info.name;
        const bool ve = n == "v0_lambdas" || n == "value_embed.weight" ||
                        n.starts_with("value_embed_A.") || n.starts_with("value_embed_B.");
        const bool moe = n.find(".moe.") != n.npos || n.find(".mlp.router") != n.npos ||
                         n.find(".mlp.experts") != n.npos;
        if (ve || moe) {
            unsupported({"tensor ", quote(n), " is of nanochat's unmerged ",
                         ve ? "branch ve (2026-01-16)" : "mixture-of-experts branches",
                         ", which this runtime does not run"});
        }
        if (n.ends_with(".ve_gate.weight") && t.info.shape.size() == 2) {
            gate12 = gate12 || t.info.shape[1] == 12;
            gate32 = gate32 || t.info.shape[1] == 32;
            if (t.info.shape[1] != 12 && t.info.shape[1] != 32) {
                unsupported({"tensor ", quote(n), " has ", t.info.shape[1],
                             " columns, nanochat had 12 or 32"});
            }
        }
    }
    const auto has = [&](std::string_view name) { return find_tensor(tensors, name) != nullptr; };
    if (gate12 && gate32)
        unsupported({"has ve_gate tensors of 12 and of 32 columns, nanochat never had both"});
    if (has("bigram_embed.embed.weight") || has("bigram_lambdas")) return Generation::g2e;
    const int parts =
        int(has("smear_gate.weight")) + int(has("smear_lambda")) + int(has("backout_lambda"));
    if (parts == 3) return Generation::g4;
    if (parts != 0) refuse("has only some of smear_gate.weight, smear_lambda and backout_lambda");
    if (gate12) return Generation::g3;
    if (gate32) return Generation::g2;
    return has("resid_lambdas") || has("x0_lambdas") ? Generation::g1 : Generation::g0;
}

// Every tensor a checkpoint of this config has, with its shape (nanochat gpt.py, all generations).
inline std::vector<TensorInfo> expected_tensors(const Config& c) {
    std::vector<TensorInfo> list;
    const std::int64_t D = c.n_embd, L = c.n_layer, V = c.vocab_size, Vp = c.vocab_rows;
    const std::int64_t kv = std::int64_t{c.n_kv_head} * c.head_dim();
    const auto add = [&](std::string name, std::vector<std::int64_t> shape) {
        list.push_back({std::move(name), DType::f32, std::move(shape)});
    };
    add("transformer.wte.weight", {Vp, D});
    add("lm_head.weight", {Vp, D});
    if (c.has_lambdas()) add("resid_lambdas", {L}), add("x0_lambdas", {L});
    if (c.generation == Generation::g2e)
        add("bigram_embed.embed.weight", {5 * V, D}), add("bigram_lambdas", {L});
    if (c.generation == Generation::g4)
        add("smear_gate.weight", {1, kSmearChannels}), add("smear_lambda", {1}),
            add("backout_lambda", {1});
    for (int i = 0; i < c.n_layer; ++i) {
        const std::string h = cat({"transformer.h.", i, "."});
        add(cat({h, "attn.c_q.weight"}), {D, D});
        add(cat({h, "attn.c_k.weight"}), {kv, D});
        add(cat({h, "attn.c_v.weight"}), {kv, D});
        add(cat({h, "attn.c_proj.weight"}), {D, D});
        add(cat({h, "mlp.c_fc.weight"}), {4 * D, D});
        add(cat({h, "mlp.c_proj.weight"}), {D, 4 * D});
        if (!c.has_value_embed(i)) continue;
        add(cat({h, "attn.ve_gate.weight"}), {c.n_kv_head, c.ve_gate_channels});
        add(cat({"value_embeds.", i, ".weight"}), {Vp, kv});
    }
    return list;
}

// Refuses if there are any of these names; the message shows the first three.
inline void refuse_any(const std::string& verb, const std::vector<std::string>& names,
                       const std::string& what) {
    if (names.empty()) return;
    std::string list;
    for (std::size_t i = 0; i < std::min<std::size_t>(names.size(), 3); ++i)
        list += (i ? ", " : "") + names[i];
    if (names.size() > 3) list += cat({" and ", names.size() - 3, " more"});
    refuse({verb, " ", names.size(), " ", what, ": ", list});
}

inline void check_tensors(const Config& config, const std::vector<StoredTensor>& tensors) {
    std::vector<TensorInfo> expected = expected_tensors(config);
    const auto key = [](const TensorInfo& e) { return std::string_view(e.name); };
    sort_by(expected, key);
    std::vector<std::string> missing, unknown, other;
    for (const TensorInfo& e : expected) {
        const StoredTensor* t = find_tensor(tensors, e.name);
        const bool optional = config.generation == Generation::g1 &&
                              (e.name == "resid_lambdas" || e.name == "x0_lambdas");
        if (t == nullptr) {
            // nanochat patches a missing one to ones or zeros
            if (!optional) missing.push_back(e.name);
        } else if (t->info.shape != e.shape) {
            other.push_back(cat({e.name, " is ", to_string(t->info.shape), ", the config needs ",
                                 to_string(e.shape)}));
        } else if (!is_float(t->info.dtype)) {
            other.push_back(
                cat({e.name, " holds ", name_of(t->info.dtype), ", a float type is needed"}));
        }
    }
    for (const StoredTensor& t : tensors) {
        if (find_by(expected, t.info.name, key) == nullptr) unknown.push_back(quote(t.info.name));
    }
    refuse_any("lacks", missing, "tensors");
    refuse_any("has", unknown, "unknown tensors");
    refuse_any("has", other, "tensors of the wrong form");
}

// ---- the metadata

constexpr std::uint64_t kMaxMeta = std::uint64_t{4} << 20;  // bytes

inline int read_int(const Json& object, std::string_view key, int low, int high) {
    const Json* value = object.find(key);
    const std::string who = cat({"model_config.", key});
    if (value == nullptr) refuse({who, " is missing"});
    int n = 0;
    const std::string& s = value->string;
    const auto end = s.data() + s.size();
    const auto result = std::from_chars(s.data(), end, n);
    if (value->kind != Json::Kind::number || result.ec != std::errc{} || result.ptr != end ||
        n < low || n > high)
        refuse({who, " must be an integer from ", low, " to ", high});
    return n;
}
inline void check_window_pattern(const std::string& pattern) {
    if (pattern.empty() || pattern.size() > 256 ||
        pattern.find_first_not_of("SLsl") != pattern.npos)
        refuse({"window_pattern ", quote(pattern), " must be 1 to 256 letters S or L"});
}

inline Json read_meta(const std::filesystem::path& file) {
    return parse_json(as_text(read_file(file, kMaxMeta)), JsonDialect::python, 64);
}

// The six numbers every generation stores, and the window pattern where there is one.
inline Config read_config(const Json& meta, bool& has_pattern) {
    if (meta.kind != Json::Kind::object) refuse("the metadata is no JSON object");
    const Json* mc = meta.find("model_config");
    if (mc == nullptr || mc->kind != Json::Kind::object)
        refuse("the metadata has no object model_config");
    if (mc->find("num_experts") != nullptr)
        unsupported({"model_config.num_experts: nanochat's unmerged mixture-of-experts branches ",
                     "are not run"});
    Config c;
    c.sequence_len = read_int(*mc, "sequence_len", 1, 1 << 20);
    c.vocab_size = read_int(*mc, "vocab_size", 1, 1 << 20);
    c.n_layer = read_int(*mc, "n_layer", 1, 256);
    c.n_head = read_int(*mc, "n_head", 1, 512);
    c.n_kv_head = read_int(*mc, "n_kv_head", 1, 512);
    c.n_embd = read_int(*mc, "n_embd", 8, 32768);
    const std::string sizes =
        cat({" (n_embd ", c.n_embd, ", n_head ", c.n_head, ", n_kv_head ", c.n_kv_head, ")"});
    if (c.n_embd % c.n_head != 0) refuse({"n_head must divide n_embd", sizes});
    if (c.n_head % c.n_kv_head != 0) refuse({"n_kv_head must divide n_head", sizes});
    if (c.head_dim() % 2 != 0 || c.head_dim() > 512)
        refuse({"the head size must be even and at most 512", sizes});
    const Json* pattern = mc->find("window_pattern");
    has_pattern = pattern != nullptr && pattern->kind != Json::Kind::null;
    if (has_pattern) {
        if (pattern->kind != Json::Kind::string)
            refuse("model_config.window_pattern must be a string");
        c.window_pattern = pattern->string;
        check_window_pattern(c.window_pattern);
    }
    return c;
}

inline void read_losses(const Json& meta, ModelInfo& info) {
    for (const auto& [key, value] : meta.object) {
        if (value.kind != Json::Kind::number || key == "step" || key == "device_batch_size" ||
            key == "max_seq_len" || key == "total_batch_size" || !is_finite(value.number))
            continue;
        const bool bits = key == "val_bpb", nats = key == "val_loss";
        if (!bits && !nats) info.metrics.emplace_back(key, value.number);
        // only bits per byte compare across tokenizers
        if (bits || (nats && info.loss_metric.empty())) {
            info.loss = value.number;
            info.loss_metric = key;
            info.loss_unit = bits ? "bits/byte" : "nats/token";
        }
    }
    const Json* step = meta.find("step");
    if (step != nullptr && step->kind == Json::Kind::number &&
        step->number != static_cast<double>(info.step)) {
        warn(info, {"the metadata says step ", quote(step->string), ", the file name ", info.step,
                    "; the name counts"});
    }
}

// The shortest digits that read back as the same value, as in 100000 and 1.15.
template <class Real>
std::string format(Real value, std::chars_format form = std::chars_format::fixed) {
    char buffer[400];  // a double near 0 takes 343
    return {buffer, std::to_chars(buffer, buffer + sizeof buffer, value, form).ptr};
}

// ---- names of files

// The number of "model_<number>.pt"; -1 if the name is another.
inline std::int64_t step_of(std::string_view name, std::string_view prefix = "model_",
                            std::string_view suffix = ".pt") {
    if (!name.starts_with(prefix) || !name.ends_with(suffix) ||
        name.size() <= prefix.size() + suffix.size())
        return -1;
    name = name.substr(prefix.size(), name.size() - prefix.size() - suffix.size());
    if (name.size() > 12 || name.find_first_not_of("0123456789") != name.npos) return -1;
    std::int64_t step = -1;
    std::from_chars(name.data(), name.data() + name.size(), step);
    return step;
}

// itself, if there is no working directory
inline std::filesystem::path full_path(const std::filesystem::path& path) {
    std::error_code ec;
    auto out = std::filesystem::absolute(path, ec);
    return ec ? path : out;
}

// Names in a directory; none if there is no such directory or it cannot be read.
inline std::vector<std::filesystem::path> list(const std::filesystem::path& dir) {
    constexpr std::size_t kMostEntries = 100000;
    std::vector<std::filesystem::path> paths;
    std::error_code ec;
    std::filesystem::directory_iterator it(dir, ec), end;
    for (; !ec && it != end && paths.size() < kMostEntries; it.increment(ec))
        paths.push_back(it->path());
    sort_by(paths, [](const auto& path) { return std::string_view(path.native()); });
    return paths;
}

// The file <prefix><step><suffix> of a directory: of step `wanted`, or (-1) the last; "" if none.
inline std::filesystem::path find_step(const std::filesystem::path& dir, std::string_view prefix,
                                       std::string_view suffix, std::int64_t wanted = -1) {
    std::filesystem::path best;
    std::int64_t last = -1;
    for (const auto& path : list(dir)) {
        const std::int64_t step = step_of(path.filename().string(), prefix, suffix);
        if (step > last && (wanted < 0 || step == wanted)) best = path, last = step;
    }
    return best;
}

// The model file a path means: itself, or a checkpoint directory's with that step (-1: the last).
inline std::filesystem::path model_file(const std::filesystem::path& dir_or_file,
                                        std::int64_t step) {
    std::error_code ec;
    if (!std::filesystem::is_directory(dir_or_file, ec)) return dir_or_file;
    const auto found = find_step(dir_or_file, "model_", ".pt", step);
    if (!found.empty()) return found;
    const std::string wanted = step < 0 ? "model_<step>.pt" : cat({"checkpoint of step ", step});
    throw Error(ErrorKind::not_found,
                {quote(dir_or_file.string(), 300), ": no ", wanted, " there"});
}

// ---- what is not stored

// Metadata of the base model of the same tag: it tells when the run was, and its window pattern.
inline Json base_sibling(const ModelInfo& info) {
    const auto own = full_path(info.model_file).parent_path();
    const auto dir = own.parent_path().parent_path() / "base_checkpoints" / own.filename();
    const auto newest = find_step(dir, "meta_", ".json");
    try {
        if (!newest.empty()) return read_meta(newest);
    } catch (const Error&) {  // only a hint: a broken sibling does not matter
    }
    return {};
}

// The soft cap of G2 was 15, and 20 from 2026-03-03 to 03-09; greedy answers do not depend on it.
// user_config.eval_tokens = 41,943,040 was the default only from 03-04 on: a day or two are missed.
inline bool softcap_was_20(const Json& base_meta) {
    const Json* user = base_meta.find("user_config");
    const Json* tokens = user != nullptr ? user->find("eval_tokens") : nullptr;
    return tokens != nullptr && tokens->kind == Json::Kind::number && tokens->number == 41943040;
}

// G0 had no windows. Some later programs saved no pattern: "L" then, as nanochat does.
inline void check_pattern(ModelInfo& info, const Overrides& o, bool has_pattern,
                          const Json& sibling) {
    if (info.config.generation == Generation::g0) {
        if (o.short_window ||
            o.window_pattern.value_or("").find_first_of("Ss") != std::string::npos)
            misuse({"this checkpoint is of generation g0, which had no windows. ",
                    "Add --gen g1 to insist"});
        if (has_pattern) {
            warn(info, {"window_pattern ", quote(info.config.window_pattern),
                        " is ignored: this generation had no windows"});
        }
        info.config.window_pattern = "L";
    } else if (!has_pattern && !o.window_pattern) {
        const Json* mc = sibling.find("model_config");
        const Json* theirs = mc != nullptr ? mc->find("window_pattern") : nullptr;
        std::string hint;
        if (theirs != nullptr)
            hint = cat({"; the base model of this tag has ", quote(theirs->string)});
        warn(info, {"window_pattern is not stored, \"L\" is assumed as nanochat does", hint,
                    " (--window-pattern)"});
    }
}

inline Overrides merge(Overrides first, const Overrides& second) {
    const auto fill = [](auto& value, const auto& other) { value = value ? value : other; };
    fill(first.generation, second.generation), fill(first.softcap, second.softcap);
    fill(first.rope_base, second.rope_base), fill(first.qk_scale, second.qk_scale);
    fill(first.window_pattern, second.window_pattern);
    fill(first.short_window, second.short_window), fill(first.sequence_len, second.sequence_len);
    fill(first.bf16_rope_tables, second.bf16_rope_tables);
    return first;
}

inline void check_overrides(const Overrides& o) {
    const auto check = [](const char* name, const std::optional<float>& x) {
        if (x && !(is_finite(*x) && *x > 0))  // also NaN
            misuse({"override of ", name, " must be a positive number"});
    };
    check("softcap", o.softcap);
    check("rope_base", o.rope_base);
    check("qk_scale", o.qk_scale);
    if (o.sequence_len && (*o.sequence_len < 1 || *o.sequence_len > 1 << 20))
        misuse("override of sequence_len must be from 1 to 1048576");
    if (o.short_window && *o.short_window < 0) misuse("override of short_window must be 0 or more");
}

// Completes the config from generation, metadata and overrides, and notes each value's origin.
inline void settle(ModelInfo& info, const Json& meta, bool has_pattern, Generation found,
                   const Overrides& o) {
    check_overrides(o);
    info.overrides = o;
    Config& c = info.config;
    c.generation = o.generation.value_or(found);
    const GenerationFacts& f = facts(c.generation);
    const auto note = [&](const char* name, std::string value, const auto& forced, Origin origin) {
        info.settings.push_back({name, std::move(value), forced ? Origin::overridden : origin});
    };
    const auto number = [&](const char* name, float& field, std::optional<float> forced,
                            float otherwise, Origin origin) {
        note(name, format(field = forced.value_or(otherwise)), forced, origin);
    };
    note("generation", cat({f.name, " (", f.dates, ")"}), o.generation, Origin::implied);
    c.sequence_len = o.sequence_len.value_or(c.sequence_len);
    note("sequence_len", std::to_string(c.sequence_len), o.sequence_len, Origin::stored);
    number("rope_base", c.rope_base, o.rope_base, f.rope_base, Origin::implied);
    number("qk_scale", c.qk_scale, o.qk_scale, f.qk_scale, Origin::implied);
    c.bf16_rope_tables = o.bf16_rope_tables.value_or(f.bf16_rope_tables);
    note("rope_table", c.bf16_rope_tables ? "bfloat16" : "float32", o.bf16_rope_tables,
         Origin::assumed);
    c.ve_gate_scale = f.ve_gate_scale;
    c.ve_gate_channels = f.ve_gate_channels;

    const int channels = c.generation == Generation::g4 ? kSmearChannels : f.ve_gate_channels;
    if (c.n_embd < channels)
        refuse({"n_embd is ", c.n_embd, ", the gates of this generation read ", channels,
                " channels"});

    const bool g0 = c.generation == Generation::g0, g2 = c.generation == Generation::g2;
    const Json sibling =
        (g2 || !has_pattern) && !g0 && info.source != "base" ? base_sibling(info) : Json{};
    const bool cap20 = g2 && softcap_was_20(info.source == "base" ? meta : sibling);
    number("softcap", c.softcap, o.softcap, cap20 ? 20.0f : 15.0f,
           g2 ? Origin::assumed : Origin::implied);
    if (g2 && !o.softcap) {
        warn(info, {"softcap ", format(c.softcap),
                    " is assumed: it was 15, but 20 from 2026-03-03 to 03-09, and the "
                    "file does not tell (--softcap)"});
    }
    check_pattern(info, o, has_pattern, sibling);
    c.window_pattern = o.window_pattern.value_or(c.window_pattern);
    check_window_pattern(c.window_pattern);
    const Origin without = g0 ? Origin::implied : Origin::assumed;
    note("window_pattern", c.window_pattern, o.window_pattern,
         !g0 && has_pattern ? Origin::stored : without);
    c.short_window = o.short_window.value_or(short_window(f, c.sequence_len));
    if (!g0) note("short_window", std::to_string(c.short_window), o.short_window, Origin::implied);
}

// All about one checkpoint but its weights. `info` has its files, source, tag and step; throws.
inline std::vector<StoredTensor> inspect(ModelInfo& info, const ZipFile& zip,
                                         const Overrides& overrides) {
    info.file_bytes = zip.file().size();
    info.modified = zip.file().modified();
    const Json meta = naming(info.meta_file, [&] { return read_meta(info.meta_file); });
    bool has_pattern = false;
    info.config = naming(info.meta_file, [&] { return read_config(meta, has_pattern); });
    info.has_config = true;
    read_losses(meta, info);
    return naming(info.model_file, [&] {
        std::vector<StoredTensor> tensors = read_state_dict(zip);
        const StoredTensor* wte = find_tensor(tensors, "transformer.wte.weight");
        if (wte == nullptr || wte->info.shape.size() != 2)
            refuse("has no tensor transformer.wte.weight: not a nanochat model");
        const std::int64_t V = info.config.vocab_size, rows = wte->info.shape[0];
        if (rows < V || rows > (1 << 21))
            refuse({"transformer.wte.weight has ", rows, " rows, vocab_size is ", V});
        if (rows != V && rows != (V + 63) / 64 * 64) {
            warn(info, {"the vocabulary is padded to ", rows,
                        " rows, nanochat pads to a multiple of 64"});
        }
        info.config.vocab_rows = static_cast<int>(rows);
        settle(info, meta, has_pattern, detect_generation(tensors), overrides);
        check_tensors(info.config, tensors);
        for (const StoredTensor& t : tensors) {
            info.tensors.push_back(t.info);
            info.parameters += static_cast<std::int64_t>(count(t.info.shape));
            info.memory_bytes += count(t.info.shape) * (t.info.dtype == DType::bf16 ? 2 : 4);
        }
        return tensors;
    });
}

struct SourceFolder {
    const char *folder, *source;
};
constexpr SourceFolder kSources[] = {{"chatsft_checkpoints", "sft"},
                                     {"sft_checkpoints", "sft"},  // only from 2026-01-31 to 02-01
                                     {"chatrl_checkpoints", "rl"},
                                     {"mid_checkpoints", "mid"},
                                     {"base_checkpoints", "base"}};

// A model file's place tells its source, tag and step, and where its metadata lies.
inline ModelInfo place(const std::filesystem::path& model_file) {
    ModelInfo info;
    info.model_file = model_file;
    const std::string name = model_file.filename().string();
    info.step = std::max<std::int64_t>(step_of(name), 0);
    const auto full = full_path(model_file);
    info.tag = full.parent_path().filename().string();
    for (const SourceFolder& s : kSources) {
        if (full.parent_path().parent_path().filename() == s.folder) info.source = s.source;
    }
    info.id = cat({info.source.empty() ? "file" : info.source, "/", info.tag, "/", info.step});
    std::string meta = name;
    if (meta.starts_with("model_")) meta.replace(0, 6, "meta_");
    if (meta.ends_with(".pt")) meta = meta.substr(0, meta.size() - 3);
    info.meta_file = model_file.parent_path() / (meta + ".json");
    return info;
}

inline std::uint64_t total_memory() {  // of the machine, bytes
    return static_cast<std::uint64_t>(::sysconf(_SC_PHYS_PAGES)) *
           static_cast<std::uint64_t>(::sysconf(_SC_PAGESIZE));
}

// Like inspect_model, but faults become a status and a sentence: one bad file never hides others.
inline ModelInfo examine(ModelInfo info, const Overrides& overrides) {
    const auto faulty = [&](Status status, std::string reason) {
        info.status = status, info.reason = std::move(reason);
        return info;
    };
    std::error_code ec;
    try {
        File file(info.model_file);
        info.file_bytes = file.size();
        info.modified = file.modified();
        if (!std::filesystem::exists(info.meta_file, ec))
            return faulty(Status::incomplete, "still being written: no metadata file yet");
        const auto head = read_bytes(file, 0, std::min<std::uint64_t>(file.size(), 4));
        const bool begins = head.empty() || as_text(head) == "PK\x03\x04";
        if (begins && !has_end_record(file)) {
            return faulty(Status::incomplete,
                          "the file ends early: still being written, or cut off");
        }
        inspect(info, naming(info.model_file, [&] { return ZipFile(std::move(file)); }), overrides);
        if (info.memory_bytes <= total_memory()) return info;
        return faulty(Status::too_large, cat({"needs ", info.memory_bytes >> 20,
                                              " MiB, the machine has ", total_memory() >> 20}));
    } catch (const Error& e) {
        const bool unknown = e.kind == ErrorKind::unsupported;
        return faulty(unknown ? Status::unsupported : Status::refused, e.what());
    }
}

// The number of a tag such as "d20" or "d26_feb2", or -1 (nanochat find_largest_model).
inline std::int64_t depth_of(std::string_view tag) {
    std::int64_t depth = -1;
    if (tag.starts_with("d")) std::from_chars(tag.data() + 1, tag.data() + tag.size(), depth);
    return depth;
}
inline bool is_tag(std::string_view tag) {
    constexpr std::string_view kAllowed =
        "._-0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ";
    return !tag.empty() && tag.size() <= 128 && kAllowed.substr(0, 3).find(tag[0]) == tag.npos &&
           tag.find_first_not_of(kAllowed) == tag.npos;
}

}  // namespace detail

// nanochat's base directory: the one given, else $NANOCHAT_BASE_DIR, else ~/.cache/nanochat.
inline std::filesystem::path base_dir(const std::filesystem::path& given = {}) {
    if (!given.empty()) return given;
    const char* set = std::getenv("NANOCHAT_BASE_DIR");
    if (set != nullptr && *set != '\0') return set;
    const char* home = std::getenv("HOME");
    return std::filesystem::path(home != nullptr ? home : "/") / ".cache" / "nanochat";
}

// All checkpoints below a base directory, also those that cannot be used (status and reason say
// why), in the order SFT, RL, MID, BASE; larger tags first, later steps first. Reads no weights:
// about 0.3 ms each. Never throws for what it finds; `warnings` names the directories skipped.
inline std::vector<ModelInfo> find_models(const std::filesystem::path& base,
                                          const Overrides& overrides = {},
                                          std::vector<std::string>* warnings = nullptr) {
    std::vector<ModelInfo> models;
    for (const detail::SourceFolder& source : detail::kSources) {
        const std::size_t before = models.size();
        auto dirs = detail::list(base / source.folder);
        detail::sort_by(dirs, [](auto& d) { return -detail::depth_of(d.filename().native()); });
        for (const auto& dir : dirs) {
            std::error_code ec;
            if (!std::filesystem::is_directory(dir, ec)) continue;
            const std::string tag = dir.filename().string();
            if (!detail::is_tag(tag)) {
                if (warnings != nullptr)
                    warnings->push_back(detail::cat(
                        {"skipped the folder ", detail::quote(tag), ": not a tag's name"}));
                continue;
            }
            auto files = detail::list(dir);
            detail::sort_by(files, [](auto& f) { return -detail::step_of(f.filename().native()); });
            for (const auto& file : files) {
                if (detail::step_of(file.filename().native()) < 0) continue;
                ModelInfo info = detail::place(file);
                // sft_checkpoints must not repeat an id of chatsft_checkpoints
                bool twice = false;
                for (std::size_t i = 0; i < before; ++i) twice = twice || models[i].id == info.id;
                if (!twice) models.push_back(detail::examine(std::move(info), overrides));
            }
        }
    }
    return models;
}

// One checkpoint: a directory (its last step, or `step`) or a model_<step>.pt. Throws if unusable.
inline ModelInfo inspect_model(const std::filesystem::path& dir_or_file, std::int64_t step = -1,
                               const Overrides& overrides = {}) {
    ModelInfo info = detail::place(detail::model_file(dir_or_file, step));
    const auto open = [&] { return detail::ZipFile(File(info.model_file)); };
    detail::inspect(info, detail::naming(info.model_file, open), overrides);
    return info;
}

// A checkpoint's tokenizer: beside the model, in ../../tokenizer/, or the base directory's.
inline std::filesystem::path find_tokenizer(const ModelInfo& info) {
    const auto dir = detail::full_path(info.model_file).parent_path();
    std::error_code ec;
    for (const auto& folder :
         {dir, dir.parent_path().parent_path() / "tokenizer", base_dir() / "tokenizer"}) {
        if (std::filesystem::exists(folder / "tokenizer.pkl", ec)) return folder / "tokenizer.pkl";
    }
    throw Error(ErrorKind::not_found,
                {"no tokenizer.pkl for ", detail::quote(info.id),
                 ": looked beside the model, in ../../tokenizer and in the base directory. "
                 "Copy nanochat's tokenizer/tokenizer.pkl there"});
}

// ==== 10. unicode ================================================================================
// UTF-8 in and out, and for the tokenizer the three classes of characters that its split patterns
// ask for: letters, numbers, spaces. Invalid bytes never stop anything: as in Python's
// errors="replace" each maximal invalid subpart becomes one U+FFFD (Unicode 16, chapter 3.9, table
// 3-7 and "Best Practices for Using U+FFFD"). No normalization, no case mapping, no width.
// In order: CharClass and its tables, char_classes / Utf8Stream, to_utf8.

namespace detail {

// A character as split patterns know it: \p{L}, \p{N}, White_Space (\s), other; or the text's end.
enum class CharClass : std::uint8_t { other, letter, number, space, none };

// Code points in alternation: how many are not of the class, how many are, and so on from 0.
// clang-format off
// ---- begin of what tools/unicode_tables.py wrote from Unicode 16.0.0
inline constexpr std::uint16_t kLetterRuns[] = {
    65, 26, 6, 26, 47, 1, 10, 1, 4, 1, 5, 23, 1, 31, 1, 458, 4, 12, 14, 5, 7, 1, 1, 1, 129, 5, 1, 2,
    2, 4, 1, 1, 6, 1, 1, 3, 1, 1, 1, 20, 1, 83, 1, 139, 8, 166, 1, 38, 2, 1, 6, 41, 71, 27, 4, 4,
    45, 43, 35, 2, 1, 99, 1, 1, 15, 2, 7, 2, 10, 3, 2, 1, 16, 1, 1, 30, 29, 89, 11, 1, 24, 33, 9, 2,
    4, 1, 5, 22, 4, 1, 9, 1, 3, 1, 23, 25, 7, 11, 5, 24, 1, 6, 17, 42, 58, 54, 3, 1, 18, 1, 7, 10,
    15, 16, 4, 8, 2, 2, 2, 22, 1, 7, 1, 1, 3, 4, 3, 1, 16, 1, 13, 2, 1, 3, 14, 2, 10, 1, 8, 6, 4, 2,
    2, 22, 1, 7, 1, 2, 1, 2, 1, 2, 31, 4, 1, 1, 19, 3, 16, 9, 1, 3, 1, 22, 1, 7, 1, 2, 1, 5, 3, 1,
    18, 1, 15, 2, 23, 1, 11, 8, 2, 2, 2, 22, 1, 7, 1, 2, 1, 5, 3, 1, 30, 2, 1, 3, 15, 1, 17, 1, 1,
    6, 3, 3, 1, 4, 3, 2, 1, 1, 1, 2, 3, 2, 3, 3, 3, 12, 22, 1, 52, 8, 1, 3, 1, 23, 1, 16, 3, 1, 26,
    3, 2, 1, 2, 2, 30, 1, 4, 8, 1, 3, 1, 23, 1, 10, 1, 5, 3, 1, 31, 2, 1, 2, 15, 2, 17, 9, 1, 3, 1,
    41, 2, 1, 16, 1, 5, 3, 8, 3, 24, 6, 5, 18, 3, 24, 1, 9, 1, 1, 2, 7, 58, 48, 1, 2, 12, 7, 58, 2,
    1, 1, 1, 5, 1, 24, 1, 1, 1, 10, 1, 2, 9, 1, 2, 5, 1, 1, 21, 4, 32, 1, 63, 8, 1, 36, 27, 5, 115,
    43, 20, 1, 16, 6, 4, 4, 3, 1, 3, 2, 7, 3, 4, 13, 12, 1, 17, 38, 1, 1, 5, 1, 2, 43, 1, 333, 1, 4,
    2, 7, 1, 1, 1, 4, 2, 41, 1, 4, 2, 33, 1, 4, 2, 7, 1, 1, 1, 4, 2, 15, 1, 57, 1, 4, 2, 67, 37, 16,
    16, 86, 2, 6, 3, 620, 2, 17, 1, 26, 5, 75, 6, 8, 7, 18, 13, 19, 14, 18, 14, 13, 1, 3, 15, 52,
    35, 1, 4, 1, 67, 89, 7, 5, 2, 34, 1, 1, 5, 70, 10, 31, 49, 30, 2, 5, 11, 44, 4, 26, 54, 23, 9,
    53, 82, 1, 93, 47, 17, 8, 54, 30, 13, 2, 10, 44, 26, 36, 41, 3, 10, 36, 2, 11, 5, 43, 2, 3, 41,
    4, 1, 6, 1, 2, 3, 1, 5, 192, 64, 278, 2, 6, 2, 38, 2, 6, 2, 8, 1, 1, 1, 1, 1, 1, 1, 31, 2, 53,
    1, 7, 1, 1, 3, 3, 1, 7, 3, 4, 2, 6, 4, 13, 5, 3, 1, 7, 116, 1, 13, 1, 16, 13, 101, 1, 4, 1, 2,
    10, 1, 1, 3, 5, 6, 1, 1, 1, 1, 1, 1, 4, 1, 11, 2, 4, 5, 5, 4, 1, 52, 2, 2683, 229, 6, 4, 3, 2,
    12, 38, 1, 1, 5, 1, 2, 56, 7, 1, 16, 23, 9, 7, 1, 7, 1, 7, 1, 7, 1, 7, 1, 7, 1, 7, 1, 7, 80, 1,
    469, 2, 42, 5, 5, 2, 4, 86, 6, 3, 1, 90, 1, 4, 5, 43, 1, 94, 17, 32, 48, 16, 512, 6592, 64,
    22157, 67, 46, 2, 269, 3, 16, 10, 2, 20, 47, 16, 31, 2, 70, 49, 9, 2, 103, 2, 67, 2, 2, 1, 1, 1,
    8, 21, 16, 1, 3, 1, 4, 1, 23, 29, 52, 14, 50, 62, 6, 3, 1, 1, 2, 11, 28, 10, 23, 25, 29, 7, 47,
    28, 1, 16, 5, 1, 10, 10, 5, 1, 41, 23, 3, 1, 8, 20, 23, 3, 1, 3, 50, 1, 1, 3, 2, 2, 5, 2, 1, 1,
    1, 24, 3, 2, 11, 7, 3, 12, 6, 2, 6, 2, 6, 9, 7, 1, 7, 1, 43, 1, 14, 6, 115, 29, 11172, 12, 23,
    4, 49, 8452, 366, 2, 106, 38, 7, 12, 5, 5, 1, 1, 10, 1, 13, 1, 5, 1, 1, 1, 2, 1, 2, 1, 108, 33,
    363, 18, 64, 2, 54, 40, 12, 116, 5, 1, 135, 36, 26, 6, 26, 11, 89, 3, 6, 2, 6, 2, 6, 2, 3, 35,
    12, 1, 26, 1, 19, 1, 2, 1, 15, 2, 14, 34, 123, 389, 29, 3, 49, 47, 32, 13, 20, 1, 8, 6, 38, 10,
    30, 2, 36, 4, 8, 48, 158, 18, 36, 4, 36, 4, 40, 8, 52, 12, 11, 1, 15, 1, 7, 1, 2, 1, 11, 1, 15,
    1, 7, 1, 2, 3, 52, 12, 311, 9, 22, 10, 8, 24, 6, 1, 42, 1, 9, 69, 6, 2, 1, 1, 44, 1, 2, 3, 1, 2,
    23, 10, 23, 9, 31, 65, 19, 1, 2, 10, 22, 10, 26, 70, 56, 6, 2, 64, 1, 15, 4, 1, 3, 1, 29, 42,
    29, 3, 29, 35, 8, 1, 28, 27, 54, 10, 22, 10, 19, 13, 18, 110, 73, 55, 51, 13, 51, 13, 36, 38,
    28, 9, 23, 250, 42, 6, 2, 16, 3, 59, 29, 10, 1, 8, 22, 42, 18, 46, 21, 27, 23, 12, 53, 57, 2, 2,
    1, 13, 45, 32, 25, 26, 36, 29, 1, 2, 1, 8, 35, 3, 1, 12, 48, 14, 4, 21, 1, 1, 1, 35, 18, 1, 25,
    19, 2, 63, 7, 1, 1, 1, 4, 1, 15, 1, 10, 7, 47, 38, 8, 2, 2, 2, 22, 1, 7, 1, 2, 1, 5, 3, 1, 18,
    1, 12, 5, 30, 10, 1, 1, 2, 1, 1, 38, 1, 1, 25, 1, 1, 1, 44, 53, 18, 4, 20, 3, 30, 48, 20, 2, 1,
    1, 184, 47, 41, 4, 36, 48, 20, 1, 59, 43, 13, 1, 71, 27, 37, 7, 185, 44, 116, 64, 31, 8, 2, 1,
    2, 8, 1, 2, 1, 24, 15, 1, 1, 1, 94, 8, 2, 39, 16, 1, 1, 1, 28, 1, 10, 40, 7, 1, 21, 1, 11, 46,
    19, 1, 18, 73, 199, 33, 31, 9, 1, 37, 17, 1, 49, 30, 112, 7, 1, 2, 1, 38, 21, 1, 25, 6, 1, 2, 1,
    32, 14, 1, 327, 19, 15, 1, 1, 13, 1, 34, 124, 1, 79, 922, 230, 196, 2636, 97, 15, 1072, 17, 6,
    25, 3995, 5, 583, 6841, 30, 1762, 569, 7, 31, 17, 79, 17, 30, 18, 48, 16, 4, 31, 21, 5, 19, 432,
    45, 211, 64, 128, 75, 5, 1, 66, 13, 64, 2, 1, 1, 28, 6136, 8, 1238, 41, 10, 8935, 4, 1, 7, 1, 2,
    1, 291, 15, 1, 29, 3, 2, 1, 14, 4, 8, 396, 2308, 107, 5, 13, 3, 9, 7, 10, 5990, 85, 1, 71, 1, 2,
    2, 1, 2, 2, 2, 4, 1, 12, 1, 1, 1, 7, 1, 65, 1, 4, 2, 8, 1, 7, 1, 28, 1, 4, 1, 5, 1, 1, 3, 7, 1,
    340, 2, 25, 1, 25, 1, 31, 1, 25, 1, 31, 1, 25, 1, 31, 1, 25, 1, 31, 1, 25, 1, 8, 1844, 31, 6, 6,
    261, 62, 146, 45, 10, 7, 16, 1, 321, 30, 18, 44, 484, 28, 228, 30, 2, 1, 495, 7, 1, 4, 1, 2, 1,
    15, 1, 197, 59, 68, 7, 1, 1204, 4, 1, 27, 1, 2, 1, 1, 2, 1, 1, 10, 1, 4, 1, 1, 1, 1, 6, 1, 4, 1,
    1, 1, 1, 1, 1, 3, 1, 2, 1, 1, 2, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 2, 1, 1, 2, 4, 1, 7, 1, 4, 1, 4,
    1, 1, 1, 10, 1, 17, 5, 3, 1, 5, 1, 17, 4420, 42720, 32, 4154, 6, 222, 2, 5762, 14, 7473, 15,
    622, 2466, 542, 1506, 4939, 5, 4192
};
inline constexpr std::uint16_t kNumberRuns[] = {
    48, 10, 120, 2, 5, 1, 2, 3, 1441, 10, 134, 10, 198, 10, 412, 10, 118, 10, 4, 6, 108, 10, 118,
    10, 118, 10, 2, 6, 110, 13, 115, 10, 8, 7, 103, 10, 104, 7, 7, 19, 109, 10, 96, 10, 118, 10, 70,
    20, 268, 10, 70, 10, 719, 20, 881, 3, 239, 10, 6, 10, 22, 10, 300, 10, 128, 11, 165, 10, 6, 10,
    182, 10, 86, 10, 134, 10, 6, 10, 1046, 1, 3, 6, 6, 10, 198, 51, 2, 5, 726, 60, 78, 22, 630, 30,
    1385, 1, 777, 1, 25, 9, 14, 3, 343, 4, 138, 10, 30, 8, 1, 15, 32, 10, 39, 15, 29536, 10, 188,
    10, 320, 6, 154, 10, 38, 10, 198, 10, 22, 10, 86, 10, 406, 10, 21270, 10, 493, 45, 12, 57, 17,
    2, 341, 27, 36, 4, 29, 1, 8, 1, 134, 5, 202, 10, 942, 8, 25, 7, 39, 9, 75, 5, 22, 6, 160, 2, 2,
    16, 2, 46, 64, 9, 52, 2, 30, 3, 75, 5, 104, 8, 24, 8, 41, 7, 330, 6, 48, 10, 6, 10, 278, 31,
    158, 10, 42, 4, 112, 7, 134, 30, 128, 10, 60, 10, 144, 10, 7, 20, 251, 10, 342, 10, 118, 10,
    374, 10, 102, 10, 6, 20, 76, 12, 420, 19, 93, 10, 662, 10, 86, 29, 227, 10, 70, 10, 422, 10,
    102, 21, 1067, 111, 15553, 10, 2342, 10, 86, 10, 134, 10, 1, 7, 526, 10, 262, 23, 24153, 10,
    1478, 20, 12, 20, 108, 25, 1109, 50, 2368, 10, 422, 10, 502, 10, 247, 10, 716, 9, 128, 10, 791,
    59, 1, 3, 1, 4, 76, 45, 1, 15, 962, 13, 2787, 10
};
inline constexpr std::uint16_t kSpaceRuns[] = {
    9, 5, 18, 1, 100, 1, 26, 1, 5599, 1, 2431, 11, 29, 2, 5, 1, 47, 1, 4000, 1
};
// ---- end of what tools/unicode_tables.py wrote
// clang-format on

// The runs above laid out as one byte per code point up to the last letter (0.2 MB); what lies
// beyond is `other`. On purpose no lambda: g++ takes one for constexpr and tries it for seconds.
inline std::vector<CharClass> lay_out_char_classes() {
    std::size_t end = 0;
    for (const std::uint16_t run : kLetterRuns) end += run;
    std::vector<CharClass> table(end, CharClass::other);
    const auto fill = [&](std::span<const std::uint16_t> runs, CharClass what) {
        for (std::size_t i = 0, at = 0; i + 1 < runs.size(); i += 2) {
            at += runs[i];
            for (std::uint16_t n = 0; n < runs[i + 1]; ++n) table[at++] = what;
        }
    };
    fill(kLetterRuns, CharClass::letter);
    fill(kNumberRuns, CharClass::number);
    fill(kSpaceRuns, CharClass::space);
    return table;
}
inline std::span<const CharClass> char_classes() {  // made at the first call, in about 50 us
    static const std::vector<CharClass> classes = lay_out_char_classes();
    return classes;
}

}  // namespace detail

// Turns bytes that arrive in arbitrary cuts into whole characters. What push() and finish() return,
// joined, is to_utf8() of all bytes at once. At most 3 bytes are held back.
class Utf8Stream {
public:
    // Returns the characters that are complete now, as valid UTF-8.
    std::string push(std::string_view bytes) {
        held_ += bytes;
        const std::string_view text = held_;
        std::string whole;
        std::size_t i = 0;
        while (i < text.size()) {
            const std::size_t begin = i;
            i += detail::valid_utf8_length(text.substr(i));
            whole += text.substr(begin, i - begin);
            if (i == text.size()) break;
            const detail::Utf8Char bad = detail::decode_utf8(text.substr(i));
            if (bad.cut) break;
            whole += detail::kReplacementUtf8;
            i += bad.length;
        }
        held_.erase(0, i);
        return whole;
    }

    // Ends the stream: a character that was never completed becomes one U+FFFD.
    std::string finish() {
        const bool cut = !held_.empty();
        held_.clear();
        return std::string(cut ? detail::kReplacementUtf8 : std::string_view());
    }

private:
    std::string held_;  // start of a character
};

// Returns `bytes` as valid UTF-8, each maximal invalid subpart replaced by U+FFFD, exactly as
// Python's bytes.decode("utf-8", errors="replace").
inline std::string to_utf8(std::string_view bytes) {
    Utf8Stream stream;
    std::string text = stream.push(bytes);
    return text += stream.finish();
}
// ==== 11. tokenizer ==============================================================================
// Byte-level BPE as tiktoken does it, read from nanochat's tokenizer.pkl. Two steps: a split
// pattern cuts the text into pieces (words, digits, spaces), then each piece, as bytes, is merged
// by ranks. The pattern in the file is a regular expression. It is never run: it must be one of
// those known here, and a scanner written for them matches it.
// In order: kSpecialNames, kSplitRules, Splitter (cuts) / TokenTable, Merger (merges) / Vocabulary,
// TokenizerReader (checks the file) / Tokenizer: encode, decode / load_tokenizer.

namespace detail {

inline constexpr std::int64_t kMaxVocabulary = 1 << 20;  // tokens
inline constexpr std::size_t kMaxTokenLength = 256;      // bytes
inline constexpr std::size_t kMaxSpecials = 1024;        // tokens
inline constexpr std::size_t kShortPiece = 64;           // bytes; from there on a heap is faster
inline constexpr std::size_t kMaxProbes = 256;           // of the hash table; real ones need 20
inline constexpr Token kNoToken = -1;

// Every version of nanochat has the same nine (tokenizer.py, SPECIAL_TOKENS).
inline constexpr std::string_view kSpecialNames[] = {
    "<|bos|>",           "<|user_start|>",   "<|user_end|>",   "<|assistant_start|>",
    "<|assistant_end|>", "<|python_start|>", "<|python_end|>", "<|output_start|>",
    "<|output_end|>"};

struct SplitRule {
    std::string_view name;
    bool gpt2;           // GPT-2's alternatives, otherwise cl100k's
    int max_numbers;     // numbers in a row that make one piece (cl100k)
    bool tail_is_whole;  // spaces at the end of the text stay together even with newlines in them
    std::string_view head, numbers, tail;  // the text of the pattern, joined
};

// nanochat's pattern, of which forks change the number rule, and two as tiktoken 0.14 writes them.
// clang-format off
inline constexpr std::string_view
    kHead = R"('(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N})",
    kTail = R"(| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+)";
inline constexpr SplitRule kSplitRules[] = {
    {"nanochat", false, 2, false, kHead, "{1,2}", kTail},
    {"nanochat, 3 digits", false, 3, false, kHead, "{1,3}", kTail},
    {"nanochat, 1 digit", false, 1, false, kHead, "{1,1}", kTail},
    {"nanochat, 1 digit", false, 1, false, kHead, "", kTail},
    {"cl100k", false, 3, true,
     R"('(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N})", "{1,3}+",
     R"(| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s)"},
    {"gpt2", true, 0, true, R"('(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N})", "++",
     R"(| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s)"},
};
// clang-format on

// The rule that a pattern's text stands for; throws unsupported.
inline const SplitRule& split_rule(std::string_view pattern) {
    for (const SplitRule& rule : kSplitRules) {
        std::string text(rule.head);
        if (text.append(rule.numbers).append(rule.tail) == pattern) return rule;
    }
    unsupported(
        {"the split pattern ", quote(pattern, 200), " is not one of nanochat, cl100k or GPT-2"});
}

class Splitter {  // walks over valid UTF-8, piece by piece
public:
    Splitter(const SplitRule& rule, std::string_view text) : rule_(rule), text_(text) {}

    std::string_view next() {  // the next piece; empty at the end of the text
        const std::size_t begin = at_, n = contraction(begin);
        at_ += n;
        if (n == 0 && begin < text_.size()) at_ = rule_.gpt2 ? end_gpt2(begin) : end_cl100k(begin);
        return text_.substr(begin, at_ - begin);
    }

private:
    struct Char {
        CharClass what;
        std::uint32_t length;  // bytes
    };

    char byte(std::size_t i) const { return i < text_.size() ? text_[i] : '\0'; }
    bool newline(std::size_t i) const { return byte(i) == '\n' || byte(i) == '\r'; }
    Char at(std::size_t i) const {
        if (i >= text_.size()) return {CharClass::none, 0};
        const auto first = static_cast<unsigned char>(text_[i]);
        if (first < 0x80) return {classes_[first], 1};
        const Utf8Char c = decode_utf8(text_.substr(i));
        return {c.code < classes_.size() ? classes_[c.code] : CharClass::other, c.length};
    }
    // End of the run of one class that starts at i, which may be empty.
    std::size_t run(std::size_t i, CharClass what) const {
        for (Char c = at(i); c.what == what; c = at(i)) i += c.length;
        return i;
    }

    // The other alternatives, in their order; the first that matches at i tells the end.
    std::size_t end_cl100k(std::size_t i) const {
        const Char c = at(i);
        const std::size_t after = i + c.length;
        if (c.what == CharClass::letter) return run(after, c.what);  // [^\r\n\p{L}\p{N}]?+\p{L}+
        if (c.what == CharClass::number) {                           // \p{N}{1,2}
            std::size_t end = after;
            for (int n = 1; n < rule_.max_numbers && at(end).what == c.what; ++n)
                end += at(end).length;
            return end;
        }
        const Char d = at(after);
        if (d.what == CharClass::letter && !newline(i)) return run(after, d.what);
        const std::size_t start = byte(i) == ' ' ? after : i;  // ' ?[^\s\p{L}\p{N}]++[\r\n]*'
        std::size_t end = run(start, CharClass::other);
        if (end == start) return end_space(i);
        while (newline(end)) ++end;
        return end;
    }
    std::size_t end_gpt2(std::size_t i) const {
        // ' ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+'
        const std::size_t start = byte(i) == ' ' ? i + 1 : i;
        const Char c = at(start);
        const bool space = c.what == CharClass::space || c.what == CharClass::none;
        return space ? end_space(i) : run(start, c.what);
    }

    // '(?i:[sdmt]|ll|ve|re) : bytes it matches at i, 0 if none. The long s, U+017F, is C5 BF and
    // folds to s. GPT-2 knows small letters only.
    std::size_t contraction(std::size_t i) const {
        if (byte(i) != '\'') return 0;
        const auto lower = [&](char c) { return rule_.gpt2 ? c : ascii_lower(c); };
        const char a = lower(byte(i + 1)), b = lower(byte(i + 2));
        if (a == 's' || a == 'd' || a == 'm' || a == 't') return 2;
        if ((a == 'l' && b == 'l') || ((a == 'v' || a == 'r') && b == 'e')) return 3;
        return !rule_.gpt2 && text_.substr(i + 1, 2) == "\xC5\xBF" ? 3 : 0;
    }

    // \s++$|\s*[\r\n]|\s+(?!\S)|\s+ : a run of spaces goes through its last newline; without one it
    // leaves its last character to the word behind it; at the end of the text it is whole.
    std::size_t end_space(std::size_t i) const {
        std::size_t end = i, last = i, line = i;  // ends of: the run, all but one, its last newline
        for (Char c = at(i); c.what == CharClass::space; c = at(end)) {
            last = end;
            end += c.length;
            if (newline(last)) line = end;
        }
        const bool tail = end == text_.size();
        if (line > i && !rule_.gpt2 && !(tail && rule_.tail_is_whole)) return line;
        return tail || last == i ? end : last;
    }

    const SplitRule& rule_;
    std::string_view text_;
    std::span<const CharClass> classes_ = char_classes();
    std::size_t at_ = 0;  // start of the next piece
};

// The ordinary tokens: bytes by id, and by hashing with open addressing the id by bytes.
class TokenTable {
public:
    TokenTable() = default;
    explicit TokenTable(std::size_t tokens) : slots_(std::bit_ceil(2 * tokens + 1)) {}

    // Adds a token; returns the one that has these bytes already, or kNoToken. Throws refused if
    // the tokens are chosen to fall on one spot of the table: searching would take forever.
    Token add(std::string_view bytes, Token token) {
        const std::uint64_t key = key_of(bytes);
        const std::size_t home = home_of(key), at = find_slot(bytes, key);
        Slot& slot = slots_[at & (slots_.size() - 1)];
        if (slot.token != kNoToken) return slot.token;
        if (at - home > kMaxProbes)
            refuse("more than 256 tokens share a hash, no training makes that");
        slot = {key, token};
        const auto i = static_cast<std::size_t>(token);
        if (i >= pieces_.size()) pieces_.resize(i + 1);
        pieces_[i] = {static_cast<std::uint32_t>(bytes_.size()),
                      static_cast<std::uint32_t>(bytes.size())};
        bytes_ += bytes;
        longest_ = std::max(longest_, bytes.size());
        return kNoToken;
    }
    // The token with these bytes, of which there must be some, or kNoToken.
    Token find(std::string_view bytes) const {
        if (bytes.size() > longest_) return kNoToken;
        return slots_[find_slot(bytes, key_of(bytes)) & (slots_.size() - 1)].token;
    }
    // Bytes of a token; empty if there is none with this id.
    std::string_view piece(Token token) const {
        const auto i = static_cast<std::size_t>(token);
        if (i >= pieces_.size()) return {};
        return std::string_view(bytes_).substr(pieces_[i].begin, pieces_[i].length);
    }
    Token end() const { return static_cast<Token>(pieces_.size()); }  // largest id + 1

private:
    struct Slot {
        std::uint64_t key = 0;
        Token token = kNoToken;
    };
    struct Piece {
        std::uint32_t begin = 0, length = 0;  // in bytes_
    };
    static constexpr std::uint64_t kMix = 0x9E3779B97F4A7C15U;  // 2^64 / golden ratio

    // Up to 7 bytes are their own key: the length on top, the bytes below, and nothing is left to
    // compare. Read by overlapping loads: what is or-ed twice is the same. Of longer ones a hash.
    static std::uint64_t key_of(std::string_view bytes) {
        const std::size_t n = bytes.size();
        const auto load = [&]<class Word>(std::size_t at, Word word) {
            std::memcpy(&word, bytes.data() + at, sizeof word);
            return std::uint64_t{word} << 8 * at;
        };
        if (n < 4) {
            return std::uint64_t{n} << 56 | load(0, std::uint8_t{}) | load(n / 2, std::uint8_t{}) |
                   load(n - 1, std::uint8_t{});
        }
        if (n < 8)
            return std::uint64_t{n} << 56 | load(0, std::uint32_t{}) | load(n - 4, std::uint32_t{});
        std::uint64_t h = n;
        for (std::size_t i = 0; i < n; i += 8) {
            std::uint64_t eight;
            std::memcpy(&eight, bytes.data() + std::min(i, n - 8), 8);
            h = (h ^ eight) * kMix;
            h ^= h >> 32;
        }
        return h | std::uint64_t{1} << 63;
    }
    static std::size_t home_of(std::uint64_t key) { return key * kMix ^ key * kMix >> 32; }
    // The slot that holds these bytes, or the free one where they belong; modulo the size.
    std::size_t find_slot(std::string_view bytes, std::uint64_t key) const {
        for (std::size_t i = home_of(key);; ++i) {
            const Slot& slot = slots_[i & (slots_.size() - 1)];
            const bool same = slot.key == key && (bytes.size() < 8 || piece(slot.token) == bytes);
            if (same || slot.token == kNoToken) return i;
        }
    }

    std::vector<Slot> slots_;  // a power of two, at most half of them in use
    std::string bytes_;        // all tokens, one behind the other
    std::vector<Piece> pieces_;
    std::size_t longest_ = 0;  // bytes
};

// Joins the bytes of a piece: again and again the adjacent pair whose bytes together are the token
// of lowest rank, the leftmost on equal rank, until no pair is a token (Sennrich et al. 2016, with
// tiktoken's ranks). Holds the memory for it, so that it is not allocated anew for every piece.
class Merger {
public:
    explicit Merger(const TokenTable& table) : table_(table) {}

    void append(std::vector<Token>& out, std::string_view piece) {
        const Token whole = table_.find(piece);  // even if merging would not reach it
        if (whole != kNoToken) return out.push_back(whole);
        piece_ = piece;
        const auto n = static_cast<std::uint32_t>(piece.size());
        if (parts_.size() <= n) parts_.resize(n + std::size_t{1});
        for (std::uint32_t i = 0; i < n; ++i)
            parts_[i] = {i - 1, i + 1, table_.find(piece.substr(i, 1)), kNoRank};
        for (std::uint32_t i = 0; i < n; ++i) look(i);
        n < kShortPiece ? merge_by_scan() : merge_by_heap();
        for (std::uint32_t i = 0; i < n; i = parts_[i].next) out.push_back(parts_[i].token);
    }

private:
    struct Part {                      // begins at the byte that is its index
        std::uint32_t previous, next;  // indices; the last part's next is the size of the piece
        Token token;
        std::uint32_t rank;  // of the token that it makes with the next part
    };
    // above all others
    static constexpr std::uint32_t kNoRank = static_cast<std::uint32_t>(kNoToken);

    void look(std::uint32_t i) {
        const std::uint32_t next = parts_[i].next;
        const Token joined =
            next == piece_.size() ? kNoToken : table_.find(piece_.substr(i, parts_[next].next - i));
        parts_[i].rank = static_cast<std::uint32_t>(joined);
    }
    void join(std::uint32_t i) {  // part i and the next one
        Part& part = parts_[i];
        part.token = static_cast<Token>(part.rank);
        parts_[part.next].rank = kNoRank;
        part.next = parts_[part.next].next;
        parts_[part.next].previous = i;
        look(i);
        if (i > 0) look(part.previous);
    }
    // Looks at all pairs each time: the faster way for words, but quadratic.
    void merge_by_scan() {
        for (;;) {
            std::uint32_t best = 0;
            for (std::uint32_t i = 0; i < piece_.size(); i = parts_[i].next) {
                if (parts_[i].rank < parts_[best].rank) best = i;
            }
            if (parts_[best].rank == kNoRank) return;
            join(best);
        }
    }
    // n log n, for a run of a million equal characters is one piece. The heap holds
    // rank << 32 | index: lowest rank first, then leftmost. A pair that is no more is passed over.
    void merge_by_heap() {
        heap_.clear();
        const auto push = [&](std::uint32_t i) {
            if (parts_[i].rank == kNoRank) return;
            heap_.push_back(std::uint64_t{parts_[i].rank} << 32 | i);
            std::push_heap(heap_.begin(), heap_.end(), std::greater<>());
        };
        for (std::uint32_t i = 0; i < piece_.size(); ++i) push(i);
        while (!heap_.empty()) {
            const std::uint64_t least = heap_.front();
            std::pop_heap(heap_.begin(), heap_.end(), std::greater<>());
            heap_.pop_back();
            const auto i = static_cast<std::uint32_t>(least);
            if (parts_[i].rank != least >> 32) continue;
            join(i);
            push(i);
            if (i > 0) push(parts_[i].previous);
        }
    }

    const TokenTable& table_;
    std::string_view piece_;
    std::vector<Part> parts_;
    std::vector<std::uint64_t> heap_;
};

struct Vocabulary {
    const SplitRule* rule = nullptr;
    TokenTable table;
    std::vector<std::pair<Token, std::string>> specials;  // by id; the ids follow each other
    std::vector<std::string> warnings;

    int size() const { return std::max(table.end(), specials.back().first + 1); }
    const Token* find_special(std::string_view name) const {
        for (const auto& [id, known] : specials) {
            if (known == name) return &id;
        }
        return nullptr;
    }
};

// Checks what a tokenizer.pkl says: a tiktoken.Encoding with the state {"name": text,
// "pat_str": text, "mergeable_ranks": {bytes: integer}, "special_tokens": {text: integer}}.
class TokenizerReader {
public:
    explicit TokenizerReader(const PickleTree& tree) : tree_(tree) {}

    Vocabulary read() {
        const PickleValue& root = tree_[tree_.root];
        if (root.kind != PickleKind::encoding || root.items.empty())
            refuse("holds no tiktoken.Encoding", root.at);
        const PickleValue& state = tree_[root.items[0]];
        if (state.kind == PickleKind::text)
            refuse({"only names the encoding ", quote(state.text), ", its ranks are needed"});
        if (state.kind != PickleKind::dict) refuse("the Encoding's state is no dict", state.at);
        field(state, "name", PickleKind::text);
        const PickleValue& pattern = field(state, "pat_str", PickleKind::text);
        const PickleValue& ranks = field(state, "mergeable_ranks", PickleKind::dict);
        const PickleValue& specials = field(state, "special_tokens", PickleKind::dict);
        if (state.items.size() > 8) refuse("the Encoding's state has unknown fields", state.at);
        v_.rule = &split_rule(pattern.text);
        read_ranks(ranks);
        read_specials(specials);
        check_ids(static_cast<Token>(ranks.items.size() / 2));
        look_for_orphans();
        return std::move(v_);
    }

private:
    // The value of a key that must be in the state once.
    const PickleValue& field(const PickleValue& state, std::string_view name, PickleKind kind) {
        const PickleValue* found = nullptr;
        each(state, [&](const PickleValue& key, const PickleValue& value) {
            if (key.kind != PickleKind::text || key.text != name) return;
            if (found != nullptr) refuse({"field ", quote(name), " is there twice"}, key.at);
            found = &value;
        });
        if (found == nullptr) refuse({"field ", quote(name), " is missing"}, state.at);
        if (found->kind != kind) refuse({"field ", quote(name), " is of a wrong type"}, found->at);
        return *found;
    }
    template <class Visit>  // visit(key, value)
    void each(const PickleValue& dict, Visit visit) const {
        for (std::size_t i = 0; i + 1 < dict.items.size(); i += 2)
            visit(tree_[dict.items[i]], tree_[dict.items[i + 1]]);
    }
    static Token read_id(const PickleValue& id, std::string_view owner) {
        const bool fits = id.integer >= 0 && id.integer < kMaxVocabulary;
        if (id.kind == PickleKind::integer && fits) return static_cast<Token>(id.integer);
        refuse({"the id of ", quote(owner), " is no integer from 0 to 1048575"}, id.at);
    }

    void read_ranks(const PickleValue& dict) {
        v_.table = TokenTable(dict.items.size() / 2);
        each(dict, [&](const PickleValue& token, const PickleValue& rank) {
            const std::size_t length = token.text.size();
            if (token.kind != PickleKind::bytes) refuse("a token is not bytes", token.at);
            if (length == 0 || length > kMaxTokenLength)
                refuse({"a token of ", length, " bytes, 1 to 256 fit"}, token.at);
            const Token id = read_id(rank, token.text);
            if (!v_.table.piece(id).empty()) refuse({"rank ", id, " is there twice"}, rank.at);
            if (v_.table.add(token.text, id) != kNoToken)
                refuse({"token ", quote(token.text), " is there twice"}, token.at);
        });
        for (int byte = 0; byte < 256; ++byte) {
            const std::string one(1, static_cast<char>(byte));
            if (v_.table.find(one) == kNoToken)
                refuse({"no token is the single byte ", quote(one)});
        }
    }

    void read_specials(const PickleValue& dict) {
        if (dict.items.size() / 2 > kMaxSpecials) refuse("over 1024 special tokens", dict.at);
        each(dict, [&](const PickleValue& name, const PickleValue& id) {
            const std::size_t length = name.text.size();
            if (name.kind != PickleKind::text || length == 0 || length > kMaxTokenLength)
                refuse("a special token's name is no text of 1 to 256 bytes", name.at);
            if (v_.find_special(name.text) != nullptr)
                refuse({"special token ", quote(name.text), " is there twice"}, name.at);
            v_.specials.emplace_back(read_id(id, name.text), name.text);
        });
        for (const std::string_view name : kSpecialNames) {
            if (v_.find_special(name) != nullptr) continue;
            refuse({"special token ", quote(name), " is missing"}, dict.at);
        }
        sort_by(v_.specials, [](const auto& s) { return std::string_view(s.second); });
        sort_by(v_.specials, [](const auto& s) { return s.first; });
    }

    // Ranks are 0 to N-1, special ids follow. The exception is nanochat's own: when two merges of
    // the training make the same bytes, the dict keeps one of them, a rank is left out, and the
    // special ids, which begin at the size of the dict, begin before the ranks end. Accepted, as
    // there, and decoded as tiktoken does, which prefers the ordinary token.
    void check_ids(Token count) {  // of ordinary tokens
        const Token end = v_.table.end(), first = v_.specials.front().first;
        Token gap = 0;  // the first rank without token
        while (!v_.table.piece(gap).empty()) ++gap;
        if (gap < end && first != count) refuse({"no token has rank ", gap});
        Token wanted = count;
        for (const auto& [id, name] : v_.specials) {
            if (id == wanted++) continue;
            refuse({"special token ", quote(name), " has id ", id, ", ", wanted - 1,
                    " is the next one free"});
        }
        if (gap == end) return;
        v_.warnings.push_back(
            cat({"two merges made the same bytes: rank ", gap, " is left out, and ids from ", first,
                 " on are ordinary and special tokens at once"}));
    }

    // Training makes every longer token of two lower ones. One that is not is only found where it
    // is a whole piece, and tells that the file may be damaged.
    void look_for_orphans() {
        for (Token id = 0; id < v_.table.end(); ++id) {
            const std::string_view bytes = v_.table.piece(id);
            const auto lower = [&](std::string_view part) {
                const Token found = v_.table.find(part);
                return found != kNoToken && found < id;
            };
            if (bytes.size() < 2) continue;
            std::size_t cut = bytes.size() - 1;
            while (cut > 0 && !(lower(bytes.substr(0, cut)) && lower(bytes.substr(cut)))) --cut;
            if (cut > 0) continue;
            v_.warnings.push_back(cat({"token ", quote(bytes), ", id ", id,
                                       ", and perhaps others are no join of two lower ones"}));
            return;
        }
    }

    const PickleTree& tree_;
    Vocabulary v_;
};

}  // namespace detail

// Text to tokens and back. Constant after loading: any number of threads may use one.
class Tokenizer {
public:
    explicit Tokenizer(detail::Vocabulary vocabulary) : v_(std::move(vocabulary)) {}

    // Returns the tokens of plain text. What looks like a special token is text like any other, so
    // that nobody can type one. Invalid UTF-8 is replaced as by to_utf8(). Throws usage from 4 GiB
    // on. Needs up to 24 bytes of memory for each byte of the longest piece.
    std::vector<Token> encode(std::string_view utf8) const {
        if (utf8.size() >= UINT32_MAX) detail::misuse("encode: a text of 4 GiB");
        if (detail::valid_utf8_length(utf8) < utf8.size()) return encode(to_utf8(utf8));
        std::vector<Token> tokens;
        tokens.reserve(utf8.size() / 4);
        detail::Splitter splitter(*v_.rule, utf8);
        detail::Merger merger(v_.table);
        for (std::string_view piece = splitter.next(); !piece.empty(); piece = splitter.next())
            merger.append(tokens, piece);
        return tokens;
    }

    // Returns the bytes of the tokens, special ones as their names. They may end inside a
    // character; to_utf8() or Utf8Stream make text of them. Throws usage on an unknown token.
    std::string decode(std::span<const Token> tokens) const {
        std::string bytes;
        for (const Token token : tokens) bytes += piece(token);
        return bytes;
    }

    // Returns the bytes of one token. Throws usage if there is no such token.
    std::string_view piece(Token token) const {
        if (const std::string_view bytes = v_.table.piece(token); !bytes.empty()) return bytes;
        if (is_special(token))
            return v_.specials[static_cast<std::size_t>(token - v_.specials[0].first)].second;
        detail::misuse({"there is no token ", token});
    }

    // Returns the id of a special token, as in special("<|bos|>"). Throws not_found.
    Token special(std::string_view name) const {
        if (const Token* id = v_.find_special(name)) return *id;
        throw Error(ErrorKind::not_found, {"there is no special token ", detail::quote(name)});
    }
    bool is_special(Token token) const {
        return token >= v_.specials.front().first && token <= v_.specials.back().first;
    }

    int vocab_size() const { return v_.size(); }                     // largest id + 1
    std::string_view pattern_name() const { return v_.rule->name; }  // of the split: "nanochat"
    const std::vector<std::string>& warnings() const { return v_.warnings; }

private:
    detail::Vocabulary v_;
};

// Reads nanochat's tokenizer.pkl (RustBPETokenizer.save). Throws not_found, refused, unsupported.
inline Tokenizer load_tokenizer(const std::filesystem::path& tokenizer_pkl) {
    const std::vector<std::byte> bytes = detail::read_file(tokenizer_pkl, detail::kMaxPickle);
    return detail::naming(tokenizer_pkl, [&] {
        const detail::PickleTree tree = detail::parse_pickle(bytes, detail::PickleFor::tokenizer);
        return Tokenizer(detail::TokenizerReader(tree).read());
    });
}
// ==== 12. ops ====================================================================================
// The arithmetic, on row-major float32 activations. Nearly all time goes into linear(): a decoded
// token reads every weight once, so there the memory sets the pace; a prompt's rows share each
// weight, so there the multipliers do.
// In order: ThreadPool / inner loops for AVX-512, AVX2, SSE2 and NEON (NANOGPT_KERNELS), exp16 /
// rms_norm, rotary_angles, rotary, softmax, softcap, relu2, sigmoid, linear, attention (first_key).
//
// One rule makes results independent of batch, chunking and threads: every sum has one order. Dot
// products, norms and softmax are summed in 16 lanes (lane i takes elements i, i + 16, ...), which
// meet in sum_lanes: i with i + 8, then 4, 2, 1. One AVX-512 register, two of AVX2 or four of NEON
// hold the same 16 lanes. Weighed values are summed in the order of the keys (mix), a gate's few
// channels in theirs. One task writes an output: a row has the same bits alone and among 500.

class ThreadPool {  // a few threads that wait for work; threads of several callers take turns
public:
    explicit ThreadPool(int threads = 0) {  // 0: one per physical core
        const int n = std::clamp(threads > 0 ? threads : physical_cores(), 1, 1024);
        try {
            for (int i = 1; i < n; ++i)
                workers_.emplace_back([this](std::stop_token stop) { serve(stop); });
        } catch (const std::system_error&) {
            stop();
            throw Error(ErrorKind::out_of_memory,
                        {"cannot start ", n, " threads. Try --threads 1"});
        }
    }
    ~ThreadPool() { stop(); }

    int size() const { return static_cast<int>(workers_.size()) + 1; }

    // Calls task(i) once for every i < n, on all threads, the caller's included; returns when all
    // are done. After an exception no more are started, and it is thrown here. Which thread takes
    // which i is left to chance: no result may depend on it.
    template <class Task>
    void run(std::size_t n, const Task& task) {
        const auto call = [](const void* t, std::size_t i) { (*static_cast<const Task*>(t))(i); };
        run(n, call, &task);
    }

    static int physical_cores() {
        const int logical = static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
        // two threads of one core share its multipliers and its path to memory
        const bool smt =
            detail::read_kernel_file("/sys/devices/system/cpu/smt/active").starts_with("1");
        return smt ? std::max(1, logical / 2) : logical;
    }

private:
    using Call = void (*)(const void* task, std::size_t i);
    void run(std::size_t n, Call call, const void* task) {
        if (workers_.empty() || n < 2) {
            for (std::size_t i = 0; i < n; ++i) call(task, i);
            return;
        }
        const std::lock_guard turn(turn_);
        call_ = call, task_ = task, count_ = n, error_ = nullptr;
        next_.store(0, std::memory_order_relaxed);
        busy_.store(static_cast<int>(workers_.size()), std::memory_order_relaxed);
        round_.fetch_add(1, std::memory_order_release);
        round_.notify_all();
        work();
        spin([&] { return busy_.load(std::memory_order_acquire) != 0; });
        while (const int left = busy_.load(std::memory_order_acquire))
            busy_.wait(left, std::memory_order_acquire);
        if (error_) std::rethrow_exception(error_);
    }
    // Waits for some 20 us at most: the next operation of a token comes sooner than that.
    template <class Waiting>
    static void spin(const Waiting& waiting) {
        for (int i = 0; i < 4000 && waiting(); ++i) {
#if defined(__x86_64__)
            __builtin_ia32_pause();
#elif defined(__aarch64__)
            asm volatile("yield");
#endif
        }
    }
    void stop() {
        for (std::jthread& w : workers_) w.request_stop();
        round_.fetch_add(1);
        round_.notify_all();
    }
    void work() {
        for (std::size_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < count_;) {
            try {
                call_(task_, i);
            } catch (...) {
                const std::lock_guard lock(error_mutex_);
                if (!error_) error_ = std::current_exception();
                next_.store(count_, std::memory_order_relaxed);  // nobody starts another one
            }
        }
    }
    void serve(const std::stop_token& stop) {
        for (int seen = 0;;) {
            spin([&] { return round_.load(std::memory_order_acquire) == seen; });
            round_.wait(seen, std::memory_order_acquire);
            seen = round_.load(std::memory_order_acquire);
            if (stop.stop_requested()) return;
            work();
            if (busy_.fetch_sub(1, std::memory_order_acq_rel) == 1) busy_.notify_one();
        }
    }

    std::mutex turn_, error_mutex_;
    std::atomic<int> round_{0}, busy_{0};
    std::atomic<std::size_t> next_{0};
    Call call_ = nullptr;
    const void* task_ = nullptr;
    std::size_t count_ = 0;
    std::exception_ptr error_;
    std::vector<std::jthread> workers_;  // last: they end before what they use
};

namespace detail {

constexpr std::size_t kLanes = 16;
constexpr std::size_t round_up(std::size_t n, std::size_t multiple) {
    return (n + multiple - 1) / multiple * multiple;
}

// Activations begin on a cache line: a 64-byte load across two counts twice (decode 8 % faster).
template <class T>
struct LineAllocator {
    using value_type = T;
    LineAllocator() = default;
    template <class U>
    LineAllocator(const LineAllocator<U>&) {}
    T* allocate(std::size_t n) {
        return static_cast<T*>(::operator new (n * sizeof(T), std::align_val_t{64}));
    }
    void deallocate(T* p, std::size_t) { ::operator delete (p, std::align_val_t{64}); }
    bool operator==(const LineAllocator&) const = default;
};
using Floats = std::vector<float, LineAllocator<float>>;

// The last step of every dot product: 16 lanes to one number, in the one order.
inline float sum_lanes(const float* lanes) {
    float s[8];
    for (std::size_t i = 0; i < 8; ++i) s[i] = lanes[i] + lanes[i + 8];
    for (std::size_t i = 0; i < 4; ++i) s[i] += s[i + 4];
    return (s[0] + s[2]) + (s[1] + s[3]);
}

// The two inner loops, for one instruction set. Written with the compiler's vector types, so that
// the same lines serve all; a macro, because a target attribute cannot be a template argument. W
// floats fill one register, P registers the 16 lanes, and R x C dot products run at once so that
// each load feeds several multiplications: 4 x 6 accumulators leave 8 of AVX-512's 32 registers for
// operands. With few rows the memory sets the pace, and it delivers one stream at 28 GB/s where six
// get 17 (a core of an EPYC 9004).
//
//   panel: y (T, N) = x (T, K) w (N, K)^T; rows are ldy, ldx and ldw elements apart; `stream`: w
//          comes from memory, not from a cache
//   mix:   z (T, cols) = p (T, n) v (n, cols), summed over n in order; cols a multiple of 16
#define NANOGPT_KERNELS(isa, W, R, C, attribute)                                                   \
    namespace isa {                                                                                \
    using F = float __attribute__((vector_size(4 * W)));                                           \
    using U = std::uint32_t __attribute__((vector_size(4 * W)));                                   \
    using H = std::uint16_t __attribute__((vector_size(2 * W)));                                   \
    constexpr std::size_t P = kLanes / W;                                                          \
    attribute inline F load(const float* p) {                                                      \
        F v;                                                                                       \
        std::memcpy(&v, p, sizeof v); /* one instruction; p need not be aligned */                 \
        return v;                                                                                  \
    }                                                                                              \
    attribute inline void store(float* p, F v) { std::memcpy(p, &v, sizeof v); }                   \
    attribute inline F load(const std::uint16_t* p) { /* bfloat16: the upper half of a float */    \
        H half;                                                                                    \
        std::memcpy(&half, p, sizeof half);                                                        \
        const U wide = __builtin_convertvector(half, U) << 16;                                     \
        F v;                                                                                       \
        std::memcpy(&v, &wide, sizeof v);                                                          \
        return v;                                                                                  \
    }                                                                                              \
    template <class Weight, std::size_t Rows, std::size_t Cols>                                    \
    attribute void dots(float* y, std::size_t ldy, const float* x, std::size_t ldx,                \
                        const Weight* w, std::size_t ldw, std::size_t K) {                         \
        F sum[Rows][Cols][P] = {};                                                                 \
        std::size_t k = 0;                                                                         \
        for (; k + kLanes <= K; k += kLanes) {                                                     \
            F xs[Rows][P];                                                                         \
            for (std::size_t r = 0; r < Rows; ++r)                                                 \
                for (std::size_t p = 0; p < P; ++p) xs[r][p] = load(x + r * ldx + k + p * W);      \
            for (std::size_t c = 0; c < Cols; ++c)                                                 \
                for (std::size_t p = 0; p < P; ++p) {                                              \
                    const F ws = load(w + c * ldw + k + p * W);                                    \
                    for (std::size_t r = 0; r < Rows; ++r) sum[r][c][p] += xs[r][p] * ws;          \
                }                                                                                  \
        }                                                                                          \
        float lanes[Rows * Cols]                                                                   \
                   [kLanes]; /* memory from here on: registers cannot be indexed by a variable */  \
        for (std::size_t r = 0; r < Rows; ++r)                                                     \
            for (std::size_t c = 0; c < Cols; ++c)                                                 \
                for (std::size_t p = 0; p < P; ++p)                                                \
                    store(lanes[r * Cols + c] + p * W, sum[r][c][p]);                              \
        for (std::size_t i = 0; i < Rows * Cols; ++i) {                                            \
            const std::size_t r = i / Cols, c = i % Cols;                                          \
            if (k < K) { /* the rest, padded with zeros */                                         \
                float xs[kLanes] = {};                                                             \
                Weight ws[kLanes] = {};                                                            \
                std::memcpy(xs, x + r * ldx + k, (K - k) * sizeof(float));                         \
                std::memcpy(ws, w + c * ldw + k, (K - k) * sizeof(Weight));                        \
                for (std::size_t p = 0; p < kLanes; p += W)                                        \
                    store(lanes[i] + p, load(lanes[i] + p) + load(xs + p) * load(ws + p));         \
            }                                                                                      \
            y[r * ldy + c] = sum_lanes(lanes[i]);                                                  \
        }                                                                                          \
    }                                                                                              \
    /* `tiled` outputs C at a time, the others one by one: w is read as one stream */              \
    template <class Weight, std::size_t Rows>                                                      \
    attribute void row(float* y, std::size_t ldy, const float* x, std::size_t ldx,                 \
                       const Weight* w, std::size_t ldw, std::size_t N, std::size_t K,             \
                       std::size_t tiled) {                                                        \
        for (std::size_t n = 0; n < tiled; n += C)                                                 \
            dots<Weight, Rows, C>(y + n, ldy, x, ldx, w + n * ldw, ldw, K);                        \
        for (std::size_t n = tiled; n < N; ++n)                                                    \
            dots<Weight, Rows, 1>(y + n, ldy, x, ldx, w + n * ldw, ldw, K);                        \
    }                                                                                              \
    template <class Weight>                                                                        \
    attribute void panel(float* y, std::size_t ldy, const float* x, std::size_t ldx,               \
                         const Weight* w, std::size_t ldw, std::size_t T, std::size_t N,           \
                         std::size_t K, bool stream) {                                             \
        const std::size_t tiled = stream ? 0 : N / C * C;                                          \
        std::size_t t = 0;                                                                         \
        for (; t + R <= T; t += R)                                                                 \
            row<Weight, R>(y + t * ldy, ldy, x + t * ldx, ldx, w, ldw, N, K, tiled);               \
        for (; t < T; ++t)                                                                         \
            row<Weight, 1>(y + t * ldy, ldy, x + t * ldx, ldx, w, ldw, N, K, tiled);               \
    }                                                                                              \
    template <std::size_t Rows, std::size_t Wide> /* Wide: registers of a row at once */           \
    attribute void weigh(float* z, std::size_t ldz, const float* p, std::size_t ldp,               \
                         const float* v, std::size_t ldv, std::size_t n, std::size_t cols) {       \
        for (std::size_t c = 0; c + Wide * W <= cols; c += Wide * W) {                             \
            F sum[Rows][Wide] = {};                                                                \
            for (std::size_t s = 0; s < n; ++s)                                                    \
                for (std::size_t i = 0; i < Wide; ++i) {                                           \
                    const F vs = load(v + s * ldv + c + i * W);                                    \
                    for (std::size_t r = 0; r < Rows; ++r) sum[r][i] += p[r * ldp + s] * vs;       \
                }                                                                                  \
            for (std::size_t r = 0; r < Rows; ++r)                                                 \
                for (std::size_t i = 0; i < Wide; ++i) store(z + r * ldz + c + i * W, sum[r][i]);  \
        }                                                                                          \
    }                                                                                              \
    attribute inline void mix(float* z, std::size_t ldz, const float* p, std::size_t ldp,          \
                              const float* v, std::size_t ldv, std::size_t T, std::size_t n,       \
                              std::size_t cols) {                                                  \
        std::size_t t = 0;                                                                         \
        for (; t + R <= T; t += R)                                                                 \
            weigh<R, P>(z + t * ldz, ldz, p + t * ldp, ldp, v, ldv, n, cols);                      \
        const std::size_t wide =                                                                   \
            cols / (4 * kLanes) * (4 * kLanes); /* one row: longer reads of v */                   \
        for (; t < T; ++t) {                                                                       \
            weigh<1, 4 * P>(z + t * ldz, ldz, p + t * ldp, ldp, v, ldv, n, wide);                  \
            weigh<1, P>(z + t * ldz + wide, ldz, p + t * ldp, ldp, v + wide, ldv, n, cols - wide); \
        }                                                                                          \
    }                                                                                              \
    }  // namespace isa

#if defined(__x86_64__)
NANOGPT_KERNELS(avx512, 16, 4, 6, __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq"))))
NANOGPT_KERNELS(avx2, 8, 2, 3, __attribute__((target("avx2,fma"))))
#endif
NANOGPT_KERNELS(base, 4, 2, 3, )  // SSE2, or NEON: a part of every x86-64 and every aarch64
#undef NANOGPT_KERNELS

struct Kernels {  // the instance that suits this processor
    const char* name;
    decltype(&base::panel<float>) panel_f32;
    decltype(&base::panel<std::uint16_t>) panel_bf16;
    decltype(&base::mix) mix;
};
inline const Kernels& kernels() {
    static const Kernels chosen = [] {
#if defined(__x86_64__)
        if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
            __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
            return Kernels{"avx512", avx512::panel<float>, avx512::panel<std::uint16_t>,
                           avx512::mix};
        }
        if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
            return Kernels{"avx2", avx2::panel<float>, avx2::panel<std::uint16_t>, avx2::mix};
        return Kernels{"sse2", base::panel<float>, base::panel<std::uint16_t>, base::mix};
#else
        return Kernels{"neon", base::panel<float>, base::panel<std::uint16_t>, base::mix};
#endif
    }();
    return chosen;
}

// e^x for x <= 0, 16 at a time: n = round(x / ln 2), then a polynomial on x - n ln 2 (Cephes expf,
// below 2 units in the last place). std::exp is a call per element, and differs between libraries.
inline void exp16(float* x) {
    for (std::size_t i = 0; i < kLanes; ++i) {
        const float v = x[i] > -87.0f ? x[i] : -87.0f;
        const int n = static_cast<int>(v * 1.44269504f - 0.5f);
        const float r =
            v - static_cast<float>(n) * 0.693359375f + static_cast<float>(n) * 2.12194440e-4f;
        float p = 1.9875691500e-4f;
        for (const float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f,
                              1.6666665459e-1f, 5.0000001201e-1f}) {
            p = p * r + c;
        }
        const float scale = std::bit_cast<float>((n + 127) << 23);
        const float y = x[i] < -87.0f ? 0.0f : (p * r * r + r + 1.0f) * scale;
        x[i] = x[i] == x[i] ? y : x[i];  // NaN stays NaN
    }
}

// Calls rows(begin, end) for parts of [0, n): elementwise work, too small to share below 8 rows.
template <class Rows>
void for_rows(ThreadPool& pool, std::size_t n, const Rows& rows) {
    constexpr std::size_t kPart = 8;
    pool.run((n + kPart - 1) / kPart,
             [&](std::size_t i) { rows(i * kPart, std::min(n, i * kPart + kPart)); });
}

class ModelLoader;  // section 13
}  // namespace detail

// The instruction set in use: "avx512", "avx2", "sse2" or "neon".
inline std::string cpu_features() { return detail::kernels().name; }

namespace ops {

// y[t] = x[t] / sqrt(mean(x[t]^2) + eps) by rows (nanochat norm(): no weight; torch's fp32 eps).
//   x, y (rows, cols) f32, may be the same
inline void rms_norm(float* y, const float* x, std::size_t rows, std::size_t cols) {
    constexpr float kEps = 0x1p-23f;
    for (std::size_t t = 0; t < rows; ++t, x += cols, y += cols) {
        float lanes[detail::kLanes] = {};
        std::size_t i = 0;
        for (; i + detail::kLanes <= cols; i += detail::kLanes) {
            for (std::size_t l = 0; l < detail::kLanes; ++l) lanes[l] += x[i + l] * x[i + l];
        }
        for (std::size_t l = 0; i + l < cols; ++l) lanes[l] += x[i + l] * x[i + l];
        const float scale =
            1.0f / std::sqrt(detail::sum_lanes(lanes) / static_cast<float>(cols) + kEps);
        for (std::size_t c = 0; c < cols; ++c) y[c] = x[c] * scale;
    }
}

// Angles of the rotary embedding at one position (Su et al. 2021), all in float32 as in nanochat's
// _precompute_rotary_embeddings.
//   cos, sin (hd/2) f32: of pos * base^(-2j/hd); with `bf16`, rounded to bfloat16
inline void rotary_angles(float* cos, float* sin, int pos, std::size_t hd, float base, bool bf16) {
    for (std::size_t j = 0; j < hd / 2; ++j) {
        const float frequency =
            1.0f / std::pow(base, static_cast<float>(2 * j) / static_cast<float>(hd));
        const float angle = static_cast<float>(pos) * frequency;
        cos[j] = std::cos(angle);
        sin[j] = std::sin(angle);
        if (bf16)
            cos[j] = bf16_to_f32(f32_to_bf16(cos[j])), sin[j] = bf16_to_f32(f32_to_bf16(sin[j]));
    }
}

// Rotates one row in place: pairs (j, j + hd/2), by MINUS the angle, which is nanochat's sign.
//   x (heads, hd) f32; cos, sin (hd/2) of the row's position
inline void rotary(float* x, const float* cos, const float* sin, std::size_t heads,
                   std::size_t hd) {
    const std::size_t half = hd / 2;
    for (std::size_t h = 0; h < heads; ++h, x += hd) {
        for (std::size_t j = 0; j < half; ++j) {
            const float a = x[j], b = x[j + half];
            x[j] = a * cos[j] + b * sin[j];
            x[j + half] = b * cos[j] - a * sin[j];
        }
    }
}

// Softmax of n scores in place, and zeros from there up to the next multiple of 16: x must have
// room for them. Every block of 16 takes one path, so the result is the same wherever a row lies.
inline void softmax(float* x, std::size_t n) {
    const std::size_t padded = detail::round_up(n, detail::kLanes);
    const float top = *std::max_element(x, x + n);
    float lanes[detail::kLanes] = {};
    for (std::size_t i = 0; i < padded; i += detail::kLanes) {
        for (std::size_t l = 0; l < detail::kLanes; ++l)
            x[i + l] = i + l < n ? x[i + l] - top : -1e30f;
        detail::exp16(x + i);
        for (std::size_t l = 0; l < detail::kLanes; ++l) lanes[l] += x[i + l];
    }
    const float scale = 1.0f / detail::sum_lanes(lanes);
    for (std::size_t i = 0; i < padded; ++i) x[i] *= scale;
}

// x = cap * tanh(x / cap) in place (Gemma 2, Riviere et al. 2024). tanh |z| = (1 - e) / (1 + e)
// with e = e^(-2 |z|), 16 at a time: as exact as its sum 1 - e, 6e-8 of the cap, where 32,768 calls
// of std::tanh take 0.9 ms. A cap far above all logits leaves nothing of that sum: calls, then.
inline void softcap(float* x, std::size_t n, float cap) {
    if (cap > 100) {
        for (std::size_t i = 0; i < n; ++i) x[i] = cap * std::tanh(x[i] / cap);
        return;
    }
    for (std::size_t i = 0; i < n; i += detail::kLanes) {
        const std::size_t part = std::min(detail::kLanes, n - i);
        float e[detail::kLanes] = {};
        for (std::size_t l = 0; l < part; ++l) e[l] = std::abs(x[i + l]) * (-2 / cap);
        detail::exp16(e);
        for (std::size_t l = 0; l < detail::kLanes; ++l) e[l] = cap * (1 - e[l]) / (1 + e[l]);
        for (std::size_t l = 0; l < part; ++l) x[i + l] = std::copysign(e[l], x[i + l]);
    }
}

// x = max(x, 0)^2 in place (So et al. 2021; nanochat's MLP).
inline void relu2(float* x, std::size_t n) {
    for (std::size_t i = 0; i < n; ++i) {
        const float positive = std::max(x[i], 0.0f);
        x[i] = positive * positive;
    }
}

inline float sigmoid(float x) { return 1.0f / (1.0f + std::exp(-x)); }

// y = x w^T, the model's only matrix product; with `squared`, y = relu2(x w^T), done in cache.
//   y (T, N) f32, x (T, K) f32, w (at least N, K) float32 or bfloat16: its first N rows are used
//   Tasks are panels of rows of w that fit a core's L2 cache: w is read from memory once for any T.
inline void linear(ThreadPool& pool, float* y, const float* x, const Tensor& w, std::size_t T,
                   std::size_t N, bool squared = false) {
    constexpr std::size_t kPanelBytes = std::size_t{256} << 10;
    // from so many rows on, bfloat16 is widened once per panel: 1.6 x faster
    constexpr std::size_t kWiden = 16;
    const std::size_t K = w.cols();
    const bool stream = T <= 8;  // the memory sets the pace
    const std::size_t fit = std::max<std::size_t>(kPanelBytes / (K * 4), 1);  // rows
    // one task for some 3 us of work: waking a thread takes as long
    const std::size_t threads = T * N * K < 40000 ? 1 : static_cast<std::size_t>(pool.size());
    const std::size_t share = (N + threads - 1) / threads;
    const std::size_t panel = detail::round_up(std::min(fit, share), 12);  // whole tiles
    pool.run((N + panel - 1) / panel, [&](std::size_t i) {
        const std::size_t n = i * panel, rows = std::min(panel, N - n);
        if (w.dtype == DType::bf16 && T >= kWiden) {
            const auto wide = std::make_unique_for_overwrite<float[]>(rows * K);
            for (std::size_t j = 0; j < rows * K; ++j) wide[j] = bf16_to_f32(w.bf16()[n * K + j]);
            detail::kernels().panel_f32(y + n, N, x, K, wide.get(), K, T, rows, K, false);
        } else if (w.dtype == DType::bf16) {
            detail::kernels().panel_bf16(y + n, N, x, K, w.bf16() + n * K, K, T, rows, K, stream);
        } else {
            detail::kernels().panel_f32(y + n, N, x, K, w.f32() + n * K, K, T, rows, K, stream);
        }
        for (std::size_t t = 0; squared && t < T; ++t) relu2(y + t * N + n, rows);
    });
}

// Causal attention of one head over a sliding window (Vaswani et al. 2017, eq. 1).
//   z, q (T, hd): rows of query positions pos ... pos + T - 1, ldz and ldq elements apart
//   k, v (pos + T, hdp): of positions 0 ..., hdp = hd rounded up to 16, padded with zeros
//   A query at position t sees the keys t - window ... t. `scores` and `pattern`, (T, pos + T), if
//   given, receive the scaled scores (-infinity outside the window) and their softmax (0 outside).
inline void attention(float* z, std::size_t ldz, const float* q, std::size_t ldq, const float* k,
                      const float* v, std::size_t T, std::size_t pos, std::size_t hd,
                      std::size_t window, float* scores = nullptr, float* pattern = nullptr) {
    constexpr std::size_t kBlock = 4;  // queries that share each key and value once loaded
    const std::size_t hdp = detail::round_up(hd, detail::kLanes), keys = pos + T;
    const float scale = 1.0f / std::sqrt(static_cast<float>(hd));
    const std::size_t ld =
        detail::round_up(std::min(keys, window + kBlock) + detail::kLanes, detail::kLanes);
    detail::Floats p(kBlock * ld), qs(kBlock * hdp), zs(kBlock * hdp);
    for (std::size_t t0 = 0; t0 < T; t0 += kBlock) {
        const std::size_t rows = std::min(kBlock, T - t0);
        const auto first_key = [&](std::size_t t) {
            return pos + t > window ? pos + t - window : 0;
        };
        // keys that some row of the block sees
        const std::size_t lo = first_key(t0), n = pos + t0 + rows - lo;
        for (std::size_t r = 0; r < rows; ++r) std::copy_n(q + (t0 + r) * ldq, hd, &qs[r * hdp]);
        detail::kernels().panel_f32(p.data(), ld, qs.data(), hdp, k + lo * hdp, hdp, rows, n, hdp,
                                    rows == 1);
        for (std::size_t r = 0; r < rows; ++r) {
            float* row = &p[r * ld];
            const std::size_t own = first_key(t0 + r), begin = own - lo,
                              end = pos + t0 + r + 1 - lo;
            for (std::size_t i = begin; i < end; ++i) row[i] *= scale;
            if (scores != nullptr) {
                std::fill_n(scores + (t0 + r) * keys, keys,
                            -std::numeric_limits<float>::infinity());
                std::copy(row + begin, row + end, scores + (t0 + r) * keys + own);
            }
            softmax(row + begin, end - begin);
            std::fill(row, row + begin, 0.0f);
            std::fill(row + end, row + n, 0.0f);
            if (pattern != nullptr) {
                std::fill_n(pattern + (t0 + r) * keys, keys, 0.0f);
                std::copy(row + begin, row + end, pattern + (t0 + r) * keys + own);
            }
        }
        detail::kernels().mix(zs.data(), hdp, p.data(), ld, v + lo * hdp, hdp, rows, n, hdp);
        for (std::size_t r = 0; r < rows; ++r) std::copy_n(&zs[r * hdp], hd, z + (t0 + r) * ldz);
    }
}

}  // namespace ops

// ==== 13. model ==================================================================================
// The transformer: its weights, the cache of what it has read, and forward(). Read Pass::forward
// from top to bottom; it is nanochat's gpt.py for all generations, and what it calls is below it.
// In order: Layer, Weights, LoadOptions, Model / loading: ModelLoader, load_model / watching:
// HookPoint, Observer / what changes: Workspace, KVCache, Slice, check_tokens / Pass::forward, then
// Pass::resize (angles), embed, smear, mix_residual (lambdas), add_value_embedding, rotate_and_norm,
// remember (writes the cache), attend, head (logits, soft cap) / forward for all.

struct Layer {
    Tensor c_q;              // (D, D)
    Tensor c_k, c_v;         // (K*hd, D)
    Tensor attn_c_proj;      // (D, D)
    Tensor c_fc;             // (4D, D)
    Tensor mlp_c_proj;       // (D, 4D)
    Tensor ve_gate;          // (K, 12 or 32), where the layer has a value embedding
    Tensor value_embed;      // (Vp, K*hd)
    float resid_lambda = 1;  // weight of the residual stream at the layer's entry
    float x0_lambda = 0;     // of the embedding x0
    float bigram_lambda = 0;
};
struct Weights {
    Tensor wte;           // (Vp, D)
    Tensor lm_head;       // (Vp, D), not tied to wte
    Tensor smear_gate;    // (1, 24)
    Tensor bigram_embed;  // (5V, D)
    float smear_lambda = 0, backout_lambda = 0;
    std::vector<Layer> layers;
};

struct LoadOptions {
    DType dtype = DType::f32;  // or bf16: float32 weights are rounded; bfloat16 ones stay in both
    int threads = 0;           // 0: one per physical core
    Overrides overrides = {};  // beside those that a ModelInfo was found with
    bool verify = true;        // checksums of all weights
    std::int64_t step = -1;    // of a directory's checkpoints: -1 the last
    // bytes; false stops: Error
    std::function<bool(std::uint64_t done, std::uint64_t total)> progress = {};
};

class Model {  // immutable once loaded; threads and sequences share it freely
public:
    const Config& config() const { return info_.config; }
    const ModelInfo& info() const { return info_; }
    const Weights& weights() const { return weights_; }
    std::uint64_t bytes() const { return bytes_; }  // of the weights in memory
    DType dtype() const { return dtype_; }
    ThreadPool& pool() const { return *pool_; }

private:
    friend class detail::ModelLoader;
    ModelInfo info_;
    Weights weights_;
    std::uint64_t bytes_ = 0;
    DType dtype_ = DType::f32;
    std::unique_ptr<ThreadPool> pool_;
};

namespace detail {

inline std::optional<std::uint64_t> memory_info(std::string_view name) {  // /proc/meminfo, bytes
    const std::string s = read_kernel_file("/proc/meminfo");
    const std::size_t at = s.find_first_of("0123456789", s.find(name));
    std::uint64_t kib = 0;
    if (at == s.npos) return {};
    std::from_chars(s.data() + at, s.data() + s.size(), kib);
    return kib << 10;
}
inline std::uint64_t available_memory() {  // bytes; what can be had without swapping
    return memory_info("MemAvailable:").value_or(total_memory());
}

// One row of a weight or embedding table, as float32.
inline void copy_row(float* out, const Tensor& table, std::size_t row) {
    const std::size_t n = table.cols(), at = row * n;
    for (std::size_t i = 0; i < n; ++i)
        out[i] =
            table.dtype == DType::bf16 ? bf16_to_f32(table.bf16()[at + i]) : table.f32()[at + i];
}

// Reads the weights of one checkpoint straight to where they stay: one allocation, and a MiB per
// thread for those that change their type on the way. So there are never two copies of the model.
class ModelLoader {
public:
    static std::shared_ptr<const Model> load(ModelInfo info, const LoadOptions& options) {
        if (options.dtype != DType::f32 && options.dtype != DType::bf16)
            misuse({"weights are kept as float32 or bfloat16, not ", name_of(options.dtype)});
        ModelLoader loader(std::move(info), options);
        naming(loader.model_->info_.model_file, [&] { loader.read(); });
        return std::move(loader.model_);
    }

private:
    struct Job {
        const StoredTensor* from;
        DType to;
        std::uint64_t at;  // byte of the allocation
    };

    ModelLoader(ModelInfo info, const LoadOptions& options)
        : options_(options),
          model_(std::make_shared<Model>()),
          zip_(naming(info.model_file, [&] { return ZipFile(File(info.model_file)); })) {
        ModelInfo& own = model_->info_;
        own = place(info.model_file);
        if (!info.id.empty())
            own.source = info.source, own.tag = info.tag, own.id = info.id,
            own.meta_file = info.meta_file;
        stored_ = inspect(own, zip_, merge(options.overrides, info.overrides));
        model_->pool_ = std::make_unique<ThreadPool>(options.threads);
        model_->dtype_ = options.dtype;
        plan();
    }

    // Vectors of lambdas become float32. Matrices that are bfloat16 in the file stay so: widening
    // them would double the bytes and change no result.
    void plan() {
        std::uint64_t at = 0;
        for (const StoredTensor& t : stored_) {
            const bool matrix = t.info.shape.size() > 1;
            const bool keep =
                matrix && (t.info.dtype == DType::bf16 || options_.dtype == DType::bf16);
            jobs_.push_back({&t, keep ? DType::bf16 : DType::f32, at});
            at += round_up(count(t.info.shape) * (keep ? 2u : 4u), 64);
        }
        model_->bytes_ = at;
        const std::uint64_t available = available_memory();
        if (at > available) {
            throw Error(ErrorKind::out_of_memory,
                        {quote(model_->info_.id), " needs ", at >> 20, " MiB, ", available >> 20,
                         " MiB are free. Close other programs, or try --dtype bfloat16"});
        }
    }

    void read() {
        memory_ = allocate(model_->bytes_, true);
        // the largest first, so that no thread ends up with it alone
        sort_by(jobs_, [](const Job& j) { return -static_cast<std::int64_t>(j.from->bytes()); });
        std::uint64_t total = 0;
        for (const Job& j : jobs_) total += j.from->bytes();
        model_->pool_->run(jobs_.size(), [&](std::size_t i) { read_tensor(jobs_[i], total); });
        if (!zip_.file().unchanged())
            refuse("changed while it was read: still being written. Try again when it is complete");
        constexpr std::uint64_t kLarge = std::uint64_t{1} << 30;
        if (zip_.file().size() >= kLarge) zip_.file().forget(0, zip_.file().size());
        bind();
    }

    void read_tensor(const Job& job, std::uint64_t total) {
        constexpr std::size_t kPiece = 1 << 20;  // bytes; a checksum over them hits the cache
        const DType from = job.from->info.dtype;
        const std::uint64_t bytes = job.from->bytes();
        const ZipEntry& entry = *job.from->entry;
        std::vector<std::byte> staging(from == job.to ? 0 : std::min<std::uint64_t>(kPiece, bytes));
        std::uint32_t crc = 0;
        for (std::uint64_t done = 0; done < bytes; done += kPiece) {
            const auto n = static_cast<std::size_t>(std::min<std::uint64_t>(kPiece, bytes - done));
            std::byte* out = memory_.get() + job.at + done / size_of(from) * size_of(job.to);
            const std::span<std::byte> piece(from == job.to ? out : staging.data(), n);
            zip_.file().read(entry.offset + done, piece);
            if (options_.verify) crc = crc32(piece, crc);
            if (from != job.to) convert(out, job.to, piece.data(), from, n / size_of(from));
            report(n, total);
        }
        if (options_.verify) ZipFile::verify(entry, crc);
    }
    static float element(const std::byte* in, DType type) {
        const auto as = [in](auto x) { return std::memcpy(&x, in, sizeof x), x; };
        if (type == DType::f32) return as(0.0f);
        if (type == DType::f64) return static_cast<float>(as(0.0));
        const auto h = as(std::uint16_t{0});
        return type == DType::f16 ? f16_to_f32(h) : bf16_to_f32(h);
    }
    static void convert(std::byte* out, DType to, const std::byte* in, DType from, std::size_t n) {
        for (std::size_t i = 0; i < n; ++i) {
            const float x = element(in + i * size_of(from), from);
            const std::uint16_t h = f32_to_bf16(x);
            to == DType::bf16 ? std::memcpy(out + 2 * i, &h, 2) : std::memcpy(out + 4 * i, &x, 4);
        }
    }
    void report(std::size_t bytes, std::uint64_t total) {
        if (!options_.progress) return;
        const std::lock_guard lock(progress_mutex_);
        done_ += bytes;
        if (!options_.progress(done_, total)) misuse("loading was stopped");
    }

    Tensor tensor(const std::string& name) const {
        for (const Job& j : jobs_) {
            if (j.from->info.name != name) continue;
            return {j.to, j.from->info.shape, {memory_, memory_.get() + j.at}};
        }
        return {};
    }
    float scalar(const std::string& name, std::size_t i, float otherwise) const {
        const Tensor t = tensor(name);
        const float x = t ? t.f32()[i] : otherwise;
        if (!is_finite(x))
            refuse({name, "[", i, "] is not a finite number: the checkpoint is damaged"});
        return x;
    }
    void bind() {
        Weights& w = model_->weights_;
        w.wte = tensor("transformer.wte.weight");
        w.lm_head = tensor("lm_head.weight");
        w.smear_gate = tensor("smear_gate.weight");
        w.bigram_embed = tensor("bigram_embed.embed.weight");
        w.smear_lambda = scalar("smear_lambda", 0, 0);
        w.backout_lambda = scalar("backout_lambda", 0, 0);
        for (int i = 0; i < model_->config().n_layer; ++i) {
            const auto own = [&](const char* name) {
                return tensor(cat({"transformer.h.", i, ".", name}));
            };
            const auto n = static_cast<std::size_t>(i);
            w.layers.push_back({.c_q = own("attn.c_q.weight"),
                                .c_k = own("attn.c_k.weight"),
                                .c_v = own("attn.c_v.weight"),
                                .attn_c_proj = own("attn.c_proj.weight"),
                                .c_fc = own("mlp.c_fc.weight"),
                                .mlp_c_proj = own("mlp.c_proj.weight"),
                                .ve_gate = own("attn.ve_gate.weight"),
                                .value_embed = tensor(cat({"value_embeds.", i, ".weight"})),
                                .resid_lambda = scalar("resid_lambdas", n, 1),
                                .x0_lambda = scalar("x0_lambdas", n, 0),
                                .bigram_lambda = scalar("bigram_lambdas", n, 0)});
        }
    }

    LoadOptions options_;
    std::shared_ptr<Model> model_;
    ZipFile zip_;
    std::vector<StoredTensor> stored_;
    std::vector<Job> jobs_;
    std::shared_ptr<std::byte> memory_;
    std::mutex progress_mutex_;
    std::uint64_t done_ = 0;
};

}  // namespace detail

// Loads one checkpoint: found by find_models, or a directory, or a model_<step>.pt with its meta
// beside it. Throws not_found, refused, unsupported, out_of_memory; nothing stays behind then.
inline std::shared_ptr<const Model> load_model(const ModelInfo& info,
                                               const LoadOptions& options = {}) {
    return detail::ModelLoader::load(info, options);
}
inline std::shared_ptr<const Model> load_model(const std::filesystem::path& checkpoint_dir_or_file,
                                               const LoadOptions& options = {}) {
    return load_model(detail::place(detail::model_file(checkpoint_dir_or_file, options.step)),
                      options);
}

// ---- watching

enum class HookPoint : std::uint8_t {
    embed,        // (T, D)        rows of wte
    embed_norm,   // (T, D)
    smear,        // (T, D)        x0, after mixing in the previous token
    resid_pre,    // (T, D)        after the residual and x0 lambdas
    attn_in,      // (T, D)        norm
    q,            // (T, H, hd)
    k,            // (T, K, hd)
    ve_gate,      // (T, K)        gate of the value embedding
    v,            // (T, K, hd)    with the value embedding: what the cache holds
    rot_q,        // (T, H, hd)    after rotary, QK norm and scale
    rot_k,        // (T, K, hd)    the same: what the cache holds
    attn_scores,  // (H, T, keys)  -infinity outside the window
    pattern,      // (H, T, keys)  softmax of it, 0 outside the window
    z,            // (T, H, hd)    weighted values
    attn_out,     // (T, D)
    resid_mid,    // (T, D)
    mlp_in,       // (T, D)        norm
    mlp_pre,      // (T, 4D)
    mlp_post,     // (T, 4D)       relu^2
    mlp_out,      // (T, D)
    resid_post,   // (T, D)
    backout,      // (T, D)        after subtracting the middle layer
    final_norm,   // (T, D)
    logits_raw,   // (T, V)
    logits        // (T, V)        after the soft cap
};
// TransformerLens' name of a point ("blocks.3.attn.hook_q"), or nanochat's where only it has one.
inline std::string name(HookPoint point, int layer) {
    // clang-format off
    constexpr std::string_view kNames[] = {
        "hook_embed", "hook_embed_norm", "hook_smear", "hook_resid_pre", "ln1.hook_normalized",
        "attn.hook_q", "attn.hook_k", "attn.hook_ve_gate", "attn.hook_v", "attn.hook_rot_q",
        "attn.hook_rot_k", "attn.hook_attn_scores", "attn.hook_pattern", "attn.hook_z",
        "hook_attn_out", "hook_resid_mid", "ln2.hook_normalized", "mlp.hook_pre",
        "mlp.hook_post", "hook_mlp_out", "hook_resid_post", "hook_backout",
        "ln_final.hook_normalized", "hook_logits_raw", "hook_logits"};
    // clang-format on
    const std::string plain(kNames[static_cast<std::size_t>(point)]);
    return layer < 0 ? plain : detail::cat({"blocks.", layer, ".", plain});
}
struct Activation {
    HookPoint point;
    int layer;  // -1 outside the blocks
    int pos;    // position of row 0 in its sequence
    std::span<const int> shape;
    std::span<const float> values;  // row-major; valid only during the call
};
struct Observer {
    virtual ~Observer() = default;
    // Asked first, so that only what is wanted is computed and copied.
    virtual bool wants(HookPoint, int /*layer*/) { return true; }
    virtual void on(const Activation& activation) = 0;
};

// ---- what changes while a sequence is read or written

// buffers of one forward pass, kept between calls; a few MiB for a prompt of 512
struct Workspace {
    detail::Floats embed, x, x0, middle, h, q, k, v, z, mlp, gate, cos, sin, logits, scores,
        pattern;
};

// The keys and values of every layer for the tokens read so far, and those tokens.
//   k (L, K, capacity, hdp) f32 after rotary, norm and scale; v likewise with the value embedding;
//   hdp = hd rounded up to 16. Pages that were never written take no memory.
class KVCache {
public:
    KVCache(const Model& model, int capacity)
        : model_(&model),
          capacity_(capacity),
          heads_(static_cast<std::size_t>(model.config().n_kv_head)),
          row_(detail::round_up(static_cast<std::size_t>(model.config().head_dim()),
                                detail::kLanes)) {
        if (capacity < 1) detail::misuse("a cache must have room for at least one token");
        const std::uint64_t rows = std::uint64_t{heads_} * static_cast<std::uint64_t>(capacity) *
                                   static_cast<std::uint64_t>(model.config().n_layer);
        const std::uint64_t half = detail::checked_mul(rows, row_ * sizeof(float));
        memory_ = detail::allocate(detail::checked_mul(half, 2), false);
        tokens_.reserve(static_cast<std::size_t>(capacity));  // append() must not throw
        k_ = reinterpret_cast<float*>(memory_.get());
        v_ = reinterpret_cast<float*>(memory_.get() + half);
    }
    KVCache(const KVCache&) = delete;  // a copy would share keys and values
    KVCache& operator=(const KVCache&) = delete;

    const Model& model() const { return *model_; }
    int length() const { return static_cast<int>(tokens_.size()); }  // in tokens
    int capacity() const { return capacity_; }
    std::span<const Token> tokens() const { return tokens_; }
    // Forgets all tokens from position `length` on, as if they had never been.
    void rewind(int length) {
        if (length < 0 || length > this->length())
            detail::misuse("rewind to a position that was not read");
        tokens_.resize(static_cast<std::size_t>(length));
    }

    // For backends: rows of one layer's kv head from position 0 on; and the tokens once computed.
    float* k(int layer, std::size_t head) { return k_ + offset(layer, head); }
    float* v(int layer, std::size_t head) { return v_ + offset(layer, head); }
    void append(std::span<const Token> tokens) {
        for (const Token t : tokens) tokens_.push_back(t);  // they may be some of its own
    }

private:
    std::size_t offset(int layer, std::size_t head) const {
        return (static_cast<std::size_t>(layer) * heads_ + head) *
               static_cast<std::size_t>(capacity_) * row_;
    }
    const Model* model_;
    int capacity_;
    std::size_t heads_, row_;
    std::shared_ptr<std::byte> memory_;
    float *k_ = nullptr, *v_ = nullptr;
    std::vector<Token> tokens_;
    friend std::span<const float> forward(const Model&, KVCache&, std::span<const Token>,
                                          Observer*);
    Workspace workspace_;
};

struct Slice {  // the next tokens of one sequence
    KVCache* cache;
    std::span<const Token> tokens;
};

namespace detail {

struct Row {             // one token of a step
    Token id, previous;  // previous: -1 at position 0
    int pos;
};
struct Part : Slice {  // the rows of one slice: begin ... begin + T - 1
    std::size_t begin, T;
    int pos;  // of the first
};

// Whether a sequence of `length` tokens can take these; any backend asks before it begins.
inline void check_tokens(std::span<const Token> tokens, int length, int capacity, int vocab_size) {
    if (tokens.empty()) misuse("a step of a sequence needs at least one token");
    if (tokens.size() > static_cast<std::size_t>(capacity - length))
        misuse({"the sequence has room for ", capacity, " tokens: ", length, " are read, ",
                tokens.size(), " more were given"});
    for (const Token t : tokens) {
        if (t < 0 || t >= vocab_size)
            misuse({"token ", t, " is outside the vocabulary of ", vocab_size});
    }
}

// Row of the bigram table (nanochat c88bbf8): a hash of this token and the one before; the last row
// is for a sequence's first token.
inline std::size_t bigram_row(const Row& row, int vocab_size) {
    const auto mod = static_cast<std::int32_t>(5 * vocab_size - 1);
    if (row.previous < 0) return static_cast<std::size_t>(mod);
    const auto mix = static_cast<std::int32_t>(36313u * static_cast<std::uint32_t>(row.id) ^
                                               27191u * static_cast<std::uint32_t>(row.previous));
    // Python's remainder is never negative
    return static_cast<std::size_t>((mix % mod + mod) % mod);
}

// One forward pass over the rows of all slices. The public functions below say what it gives.
class Pass {
public:
    Pass(const Model& model, std::span<const Slice> batch, Workspace& ws, Observer* observer)
        : c_(model.config()),
          w_(model.weights()),
          pool_(model.pool()),
          ws_(ws),
          observer_(observer) {
        for (const Slice& s : batch) {
            if (s.cache == nullptr || &s.cache->model() != &model)
                misuse("a sequence of another model was given to this one");
            const int pos = s.cache->length();
            check_tokens(s.tokens, pos, s.cache->capacity(), c_.vocab_size);
            for (const Part& part : parts_) {
                if (part.cache == s.cache) misuse("a sequence is twice in one step");
            }
            parts_.push_back({s, rows_.size(), s.tokens.size(), pos});
            Token previous = pos == 0 ? -1 : s.cache->tokens().back();
            for (std::size_t t = 0; t < s.tokens.size(); ++t) {
                rows_.push_back({s.tokens[t], previous, pos + static_cast<int>(t)});
                previous = s.tokens[t];
            }
        }
        T = rows_.size();
    }

    std::span<const float> forward();

private:
    void resize();
    void embed();
    void smear();
    void mix_residual(int i);
    void add_value_embedding(int i);
    void rotate_and_norm(float* x, std::size_t heads);
    void remember(int i);
    void attend(int i);
    std::span<const float> head();

    bool wanted(HookPoint point, int layer) {
        return observer_ != nullptr && observer_->wants(point, layer);
    }
    // Shows the rows of each slice; `tail` are the dimensions after T.
    void tap(HookPoint point, int layer, const float* values,
             std::initializer_list<std::size_t> tail) {
        if (!wanted(point, layer)) return;
        std::size_t width = 1;
        for (const std::size_t d : tail) width *= d;
        for (const Part& part : parts_) {
            std::vector<int> shape{static_cast<int>(part.T)};
            for (const std::size_t d : tail) shape.push_back(static_cast<int>(d));
            observer_->on(
                {point, layer, part.pos, shape, {values + part.begin * width, part.T * width}});
        }
    }
    void linear(Floats& y, const Floats& x, const Tensor& w) {
        ops::linear(pool_, y.data(), x.data(), w, T, w.rows());
    }
    void norm(Floats& y, const Floats& x) {
        for_rows(pool_, T, [&](std::size_t a, std::size_t b) {
            ops::rms_norm(&y[a * D], &x[a * D], b - a, D);
        });
    }
    void add(Floats& x, const Floats& y) {  // x += y, both (T, D)
        for_rows(pool_, T, [&](std::size_t a, std::size_t b) {
            for (std::size_t j = a * D; j < b * D; ++j) x[j] += y[j];
        });
    }

    const Config& c_;
    const Weights& w_;
    ThreadPool& pool_;
    Workspace& ws_;
    Observer* observer_;
    std::vector<Row> rows_;
    std::vector<Part> parts_;
    std::size_t T = 0;  // rows in all
    const std::size_t D = static_cast<std::size_t>(c_.n_embd),
                      H = static_cast<std::size_t>(c_.n_head);
    const std::size_t K = static_cast<std::size_t>(c_.n_kv_head),
                      hd = static_cast<std::size_t>(c_.head_dim());
    const std::size_t V = static_cast<std::size_t>(c_.vocab_size);
};

// The model, top to bottom (nanochat gpt.py, GPT.forward and Block.forward).
inline std::span<const float> Pass::forward() {
    resize();
    // x = norm(wte[id]); G4 mixes in some of the previous token's; every layer sees this x0 again
    embed();
    smear();
    std::copy_n(ws_.x.data(), T * D, ws_.x0.data());

    for (int i = 0; i < c_.n_layer; ++i) {
        const Layer& layer = w_.layers[static_cast<std::size_t>(i)];
        // the residual stream and the embedding, weighed
        mix_residual(i);
        tap(HookPoint::resid_pre, i, ws_.x.data(), {D});

        // attention: queries, keys, values; the token's value embedding joins the values
        norm(ws_.h, ws_.x);
        tap(HookPoint::attn_in, i, ws_.h.data(), {D});
        linear(ws_.q, ws_.h, layer.c_q);
        linear(ws_.k, ws_.h, layer.c_k);
        linear(ws_.v, ws_.h, layer.c_v);
        tap(HookPoint::q, i, ws_.q.data(), {H, hd});
        tap(HookPoint::k, i, ws_.k.data(), {K, hd});
        if (c_.has_value_embed(i)) add_value_embedding(i);
        tap(HookPoint::v, i, ws_.v.data(), {K, hd});
        // positions enter by rotation; the norms bound the scores
        rotate_and_norm(ws_.q.data(), H);
        rotate_and_norm(ws_.k.data(), K);
        tap(HookPoint::rot_q, i, ws_.q.data(), {H, hd});
        tap(HookPoint::rot_k, i, ws_.k.data(), {K, hd});
        remember(i);
        attend(i);  // every query looks back over its window
        tap(HookPoint::z, i, ws_.z.data(), {H, hd});
        linear(ws_.h, ws_.z, layer.attn_c_proj);
        tap(HookPoint::attn_out, i, ws_.h.data(), {D});
        add(ws_.x, ws_.h);
        tap(HookPoint::resid_mid, i, ws_.x.data(), {D});

        // MLP: up to 4D, relu^2, down again
        norm(ws_.h, ws_.x);
        tap(HookPoint::mlp_in, i, ws_.h.data(), {D});
        const bool apart = wanted(HookPoint::mlp_pre, i);
        ops::linear(pool_, ws_.mlp.data(), ws_.h.data(), layer.c_fc, T, 4 * D, !apart);
        tap(HookPoint::mlp_pre, i, ws_.mlp.data(), {4 * D});
        if (apart) ops::relu2(ws_.mlp.data(), T * 4 * D);
        tap(HookPoint::mlp_post, i, ws_.mlp.data(), {4 * D});
        linear(ws_.h, ws_.mlp, layer.mlp_c_proj);
        tap(HookPoint::mlp_out, i, ws_.h.data(), {D});
        add(ws_.x, ws_.h);
        tap(HookPoint::resid_post, i, ws_.x.data(), {D});
        if (c_.generation == Generation::g4 && i == c_.n_layer / 2)
            std::copy_n(ws_.x.data(), T * D, ws_.middle.data());
    }

    // G4 takes out some of what the middle layer knew: features the output does not need
    if (c_.generation == Generation::g4) {
        for (std::size_t j = 0; j < T * D; ++j) ws_.x[j] -= w_.backout_lambda * ws_.middle[j];
        tap(HookPoint::backout, -1, ws_.x.data(), {D});
    }
    norm(ws_.x, ws_.x);
    tap(HookPoint::final_norm, -1, ws_.x.data(), {D});
    return head();
}

inline void Pass::resize() {
    for (Floats* b : {&ws_.embed, &ws_.x, &ws_.x0, &ws_.h, &ws_.q, &ws_.z}) b->resize(T * D);
    if (c_.generation == Generation::g4) ws_.middle.resize(T * D);
    ws_.k.resize(T * K * hd), ws_.v.resize(T * K * hd);
    ws_.mlp.resize(T * 4 * D), ws_.gate.resize(T * K);
    ws_.cos.resize(T * hd / 2), ws_.sin.resize(T * hd / 2);
    for_rows(pool_, T, [&](std::size_t a, std::size_t b) {  // the same angles serve all layers
        for (std::size_t t = a; t < b; ++t) {
            ops::rotary_angles(&ws_.cos[t * hd / 2], &ws_.sin[t * hd / 2], rows_[t].pos, hd,
                               c_.rope_base, c_.bf16_rope_tables);
        }
    });
}

inline void Pass::embed() {
    for (std::size_t t = 0; t < T; ++t)
        copy_row(&ws_.x[t * D], w_.wte, static_cast<std::size_t>(rows_[t].id));
    tap(HookPoint::embed, -1, ws_.x.data(), {D});
    norm(ws_.x, ws_.x);
    tap(HookPoint::embed_norm, -1, ws_.x.data(), {D});
}

// G4: x[t] += lambda * sigmoid(Wg x[t][0:24]) * x[t-1], with x[t-1] before its own smear. At the
// start of a chunk x[t-1] is made again from the token before, so cutting a prompt changes nothing.
inline void Pass::smear() {
    if (c_.generation != Generation::g4) return;
    std::copy_n(ws_.x.data(), T * D, ws_.embed.data());
    std::vector<float> gate(kSmearChannels), before(D);
    copy_row(gate.data(), w_.smear_gate, 0);
    for (const Part& part : parts_) {
        for (std::size_t t = part.begin; t < part.begin + part.T; ++t) {
            if (rows_[t].previous < 0) continue;
            const float* previous = &ws_.embed[(t - 1) * D];
            if (t == part.begin) {
                copy_row(before.data(), w_.wte, static_cast<std::size_t>(rows_[t].previous));
                ops::rms_norm(before.data(), before.data(), 1, D);
                previous = before.data();
            }
            float dot = 0;
            for (std::size_t j = 0; j < kSmearChannels; ++j) dot += gate[j] * ws_.embed[t * D + j];
            const float g = w_.smear_lambda * ops::sigmoid(dot);
            for (std::size_t j = 0; j < D; ++j) ws_.x[t * D + j] += g * previous[j];
        }
    }
    tap(HookPoint::smear, -1, ws_.x.data(), {D});
}

inline void Pass::mix_residual(int i) {
    if (!c_.has_lambdas()) return;
    const Layer& layer = w_.layers[static_cast<std::size_t>(i)];
    for_rows(pool_, T, [&](std::size_t a, std::size_t b) {
        for (std::size_t j = a * D; j < b * D; ++j)
            ws_.x[j] = layer.resid_lambda * ws_.x[j] + layer.x0_lambda * ws_.x0[j];
    });
    if (c_.generation != Generation::g2e) return;
    std::vector<float> bigram(D);
    for (std::size_t t = 0; t < T; ++t) {
        copy_row(bigram.data(), w_.bigram_embed, bigram_row(rows_[t], c_.vocab_size));
        for (std::size_t j = 0; j < D; ++j) ws_.x[t * D + j] += layer.bigram_lambda * bigram[j];
    }
}

// v[head] += scale * sigmoid(Wg[head] h[0:channels]) * value_embed[id][head]: every other layer
// knows its token by heart (value residuals, Zhou et al. 2024, with a gate).
inline void Pass::add_value_embedding(int i) {
    const Layer& layer = w_.layers[static_cast<std::size_t>(i)];
    const auto channels = static_cast<std::size_t>(c_.ve_gate_channels);
    for_rows(pool_, T, [&](std::size_t a, std::size_t b) {
        std::vector<float> value(K * hd), gate(channels);
        for (std::size_t t = a; t < b; ++t) {
            copy_row(value.data(), layer.value_embed, static_cast<std::size_t>(rows_[t].id));
            for (std::size_t head = 0; head < K; ++head) {
                copy_row(gate.data(), layer.ve_gate, head);
                float dot = 0;
                for (std::size_t j = 0; j < channels; ++j) dot += gate[j] * ws_.h[t * D + j];
                const float g = ws_.gate[t * K + head] = c_.ve_gate_scale * ops::sigmoid(dot);
                for (std::size_t j = 0; j < hd; ++j)
                    ws_.v[(t * K + head) * hd + j] += g * value[head * hd + j];
            }
        }
    });
    tap(HookPoint::ve_gate, i, ws_.gate.data(), {K});
}

// x (T, heads, hd): first rotation, then the norm of each head, then the generation's scale.
inline void Pass::rotate_and_norm(float* x, std::size_t heads) {
    for_rows(pool_, T, [&](std::size_t a, std::size_t b) {
        for (std::size_t t = a; t < b; ++t) {
            float* row = x + t * heads * hd;
            ops::rotary(row, &ws_.cos[t * hd / 2], &ws_.sin[t * hd / 2], heads, hd);
            ops::rms_norm(row, row, heads, hd);
            for (std::size_t j = 0; j < heads * hd; ++j) row[j] *= c_.qk_scale;
        }
    });
}

// Copies the new keys and values to the caches, each row padded with zeros to a multiple of 16.
inline void Pass::remember(int i) {
    const std::size_t hdp = round_up(hd, kLanes);
    for (const Part& part : parts_) {
        for (std::size_t head = 0; head < K; ++head) {
            const std::size_t first = static_cast<std::size_t>(part.pos) * hdp;
            float *k = part.cache->k(i, head) + first, *v = part.cache->v(i, head) + first;
            for (std::size_t t = part.begin; t < part.begin + part.T; ++t, k += hdp, v += hdp) {
                std::fill(std::copy_n(&ws_.k[(t * K + head) * hd], hd, k), k + hdp, 0.0f);
                std::fill(std::copy_n(&ws_.v[(t * K + head) * hd], hd, v), v + hdp, 0.0f);
            }
        }
    }
}

// z = attention(q, cache) by slice and head; a task is a head's 64 queries, or all if watched.
inline void Pass::attend(int i) {
    struct Task {
        const Part* part;
        std::size_t head, first, map;  // query head, first row, where its map begins
    };
    const bool watched = wanted(HookPoint::attn_scores, i) || wanted(HookPoint::pattern, i);
    std::vector<Task> tasks;
    const std::size_t rows = watched ? T : 64;  // of a task
    std::size_t room = 0;                       // floats of all maps
    for (const Part& part : parts_) {
        for (std::size_t head = 0; head < H; ++head) {
            for (std::size_t t = 0; t < part.T; t += rows) tasks.push_back({&part, head, t, room});
            room += part.T * (static_cast<std::size_t>(part.pos) + part.T);
        }
    }
    if (watched) ws_.scores.resize(room), ws_.pattern.resize(room);
    pool_.run(tasks.size(), [&](std::size_t n) {
        const auto [part, head, first, map] = tasks[n];
        const std::size_t at = (part->begin + first) * D + head * hd, kv = head / (H / K);
        ops::attention(&ws_.z[at], D, &ws_.q[at], D, part->cache->k(i, kv), part->cache->v(i, kv),
                       std::min(rows, part->T - first), static_cast<std::size_t>(part->pos) + first,
                       hd, static_cast<std::size_t>(c_.window(i)),
                       watched ? &ws_.scores[map] : nullptr, watched ? &ws_.pattern[map] : nullptr);
    });
    std::size_t map = 0;
    for (const Part& part : parts_) {
        const std::size_t keys = static_cast<std::size_t>(part.pos) + part.T,
                          size = H * part.T * keys;
        const int shape[] = {c_.n_head, static_cast<int>(part.T), static_cast<int>(keys)};
        for (const HookPoint point : {HookPoint::attn_scores, HookPoint::pattern}) {
            if (!wanted(point, i)) continue;
            const Floats& maps = point == HookPoint::pattern ? ws_.pattern : ws_.scores;
            observer_->on({point, i, part.pos, shape, {maps.data() + map, size}});
        }
        map += size;
    }
}

// logits = softcap * tanh(lm_head x / softcap): of each slice's last row, of all rows if watched.
inline std::span<const float> Pass::head() {
    const bool all = wanted(HookPoint::logits_raw, -1) || wanted(HookPoint::logits, -1);
    const auto last = [&](std::size_t n) { return parts_[n].begin + parts_[n].T - 1; };
    const std::size_t rows = all ? T : parts_.size();
    for (std::size_t n = 0; !all && n < rows; ++n)
        std::copy_n(&ws_.x[last(n) * D], D, &ws_.h[n * D]);
    ws_.logits.resize(rows * V);
    ops::linear(pool_, ws_.logits.data(), all ? ws_.x.data() : ws_.h.data(), w_.lm_head, rows, V);
    if (all) tap(HookPoint::logits_raw, -1, ws_.logits.data(), {V});
    constexpr std::size_t kPart = 4096;  // logits of one row
    const std::size_t parts = (V + kPart - 1) / kPart;
    pool_.run(rows * parts, [&](std::size_t i) {
        const std::size_t begin = i % parts * kPart;
        ops::softcap(&ws_.logits[i / parts * V + begin], std::min(kPart, V - begin), c_.softcap);
    });
    if (all) {
        tap(HookPoint::logits, -1, ws_.logits.data(), {V});
        for (std::size_t n = 0; n < parts_.size(); ++n)
            std::copy_n(&ws_.logits[last(n) * V], V, &ws_.logits[n * V]);
    }
    // only now: a pass that throws changes no sequence
    for (const Part& part : parts_) part.cache->append(part.tokens);
    return {ws_.logits.data(), parts_.size() * V};
}

}  // namespace detail

// Reads the tokens of several sequences in one pass; any mix of prompts and single tokens. Returns
// the logits (batch, V) after the last token of each, valid until the workspace is used again: the
// same bits whatever else is in the batch, however the tokens are cut, with any number of threads.
// Throws usage if a token is outside the vocabulary or a cache is full; then no cache has changed.
inline std::span<const float> forward(const Model& model, std::span<const Slice> batch,
                                      Workspace& workspace, Observer* observer = nullptr) {
    return detail::Pass(model, batch, workspace, observer).forward();
}

// The same for one sequence: reads tokens (T) after what the cache holds; returns the logits (V).
inline std::span<const float> forward(const Model& model, KVCache& cache,
                                      std::span<const Token> tokens, Observer* observer = nullptr) {
    const Slice slice{&cache, tokens};
    return forward(model, {&slice, 1}, cache.workspace_, observer);
}

// ==== 14. sample =================================================================================
// From logits to a token. The generator is written out, because the standard library's
// distributions differ between implementations: the same seed gives the same text everywhere. It
// counts instead of stepping: number n of stream s is a hash of (seed, s, n), so sequences in a
// batch share nothing.
// In Sampler: uniform, sample (temperature), argmax (greedy), candidates (top-k), nucleus (top-p).

struct SamplingParams {
    float temperature = 1.0f;  // 0 = greedy
    int top_k = 0;             // 0 = off
    float top_p = 1.0f;        // 1 = off
    std::uint64_t seed = 42;
};

class Sampler {
public:
    // `stream` tells apart the samples of one prompt. Throws usage if a parameter is out of range.
    explicit Sampler(const SamplingParams& params, std::uint64_t stream = 0)
        : params_(params), key_(mix(params.seed ^ mix(stream + kGolden))) {
        // false for NaN
        const auto in = [](float x, float low, float high) { return x >= low && x <= high; };
        if (!in(params.temperature, 0, 1000))
            detail::misuse("temperature must be between 0 and 1000");
        if (params.top_k < 0) detail::misuse("top_k must not be negative");
        if (!in(params.top_p, 0, 1) || params.top_p == 0)
            detail::misuse("top_p must be above 0 and at most 1");
    }

    const SamplingParams& params() const { return params_; }
    // The random number of the draw after `ahead` more draws, in [0, 1); skip() takes one.
    double uniform(std::uint64_t ahead = 0) const {
        return static_cast<double>(mix(key_ + (count_ + 1 + ahead) * kGolden) >> 11) * 0x1p-53;
    }
    void skip() { ++count_; }

    // Draws from softmax(logits / temperature), cut to the top_k likeliest tokens and then to the
    // likeliest that together reach top_p. At temperature 0 the largest logit; of equal ones the
    // lowest id. Every call takes one random number. Throws refused if no logit is a finite number.
    Token sample(std::span<const float> logits) {
        const double u = uniform();
        skip();
        if (params_.temperature == 0) return argmax(logits);
        candidates(logits);
        const double top = static_cast<double>(logits[static_cast<std::size_t>(ids_[0])]);
        weights_.clear();
        double total = 0;
        for (const Token id : ids_) {
            const double logit = static_cast<double>(logits[static_cast<std::size_t>(id)]);
            weights_.push_back(std::exp((logit - top) / static_cast<double>(params_.temperature)));
            total += weights_.back();
        }
        if (params_.top_p < 1) total = nucleus(total);
        double left = u * total;
        for (std::size_t i = 0; i < ids_.size(); ++i) {
            left -= weights_[i];
            if (left < 0) return ids_[i];
        }
        return ids_.back();  // rounding can leave a crumb
    }

    static Token argmax(std::span<const float> logits) {
        std::size_t best = logits.size();
        for (std::size_t i = 0; i < logits.size(); ++i) {
            if (is_finite(logits[i]) && (best == logits.size() || logits[i] > logits[best]))
                best = i;
        }
        if (best == logits.size())
            detail::refuse("the model's logits are not numbers: the checkpoint is damaged");
        return static_cast<Token>(best);
    }

private:
    static constexpr std::uint64_t kGolden = 0x9e3779b97f4a7c15;  // 2^64 / golden ratio
    static std::uint64_t mix(std::uint64_t z) {                   // SplitMix64 (Steele et al. 2014)
        z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
        z = (z ^ z >> 27) * 0x94d049bb133111eb;
        return z ^ z >> 31;
    }

    // The tokens to choose from; the likeliest first, and of equal ones the lowest id first.
    void candidates(std::span<const float> logits) {
        ids_.clear();
        for (std::size_t i = 0; i < logits.size(); ++i) {
            if (is_finite(logits[i])) ids_.push_back(static_cast<Token>(i));
        }
        if (ids_.empty()) argmax(logits);  // throws
        const auto likelier = [&](Token a, Token b) {
            const float x = logits[static_cast<std::size_t>(a)],
                        y = logits[static_cast<std::size_t>(b)];
            return x != y ? x > y : a < b;
        };
        const auto k = static_cast<std::size_t>(params_.top_k);
        if (k > 0 && k < ids_.size()) {
            std::nth_element(ids_.begin(), ids_.begin() + static_cast<std::ptrdiff_t>(k - 1),
                             ids_.end(), likelier);
            ids_.resize(k);
        }
        if (ids_.size() <= 1024 || params_.top_p < 1) {
            std::sort(ids_.begin(), ids_.end(), likelier);
        } else {  // the whole vocabulary: no order is needed, but the largest must come first
            std::iter_swap(ids_.begin(), std::min_element(ids_.begin(), ids_.end(), likelier));
        }
    }
    double nucleus(double total) {  // Holtzman et al. 2020
        double sum = 0;
        std::size_t n = 0;
        while (n < ids_.size() && sum < static_cast<double>(params_.top_p) * total)
            sum += weights_[n++];
        ids_.resize(std::max<std::size_t>(n, 1));
        return sum;
    }

    SamplingParams params_;
    std::uint64_t key_, count_ = 0;
    std::vector<Token> ids_;
    std::vector<double> weights_;
};

// ==== 15. engine =================================================================================
// The seam between generating text and computing logits: one virtual call per step. A Sequence is
// one timeline (its tokens, and their keys and values on the device); callers hand over whole
// prefixes, and what the sequence holds of one is not read again. The engine knows ids, no text.
// In order: Sequence, Chunk, Backend: step, sample / CpuBackend, read_prompt, open_cpu, prefill /
// Tool, GenerateParams / Continuation: take (the token drawn, or the tool's instead) / generate.

struct Sequence {
    virtual ~Sequence() = default;
    virtual std::span<const Token> tokens() const = 0;
    virtual int capacity() const = 0;  // in tokens
    virtual void rewind(int length) = 0;
};
struct Chunk {
    Sequence* sequence;
    std::span<const Token> tokens;
    // a piece of a prompt (prefill), or the one token drawn last (decode): devices may compute the
    // two differently, and each for itself is the same whatever else is in the batch
    bool prompt = tokens.size() > 1;
};
struct Backend {  // one device
    virtual ~Backend() = default;
    virtual const Config& config() const = 0;
    virtual std::string device() const = 0;  // for people, such as "CPU (avx512, 8 threads)"
    virtual DType dtype() const = 0;         // of the weights
    // whether a token's keys and values are the same bits, read in a prompt or one by one
    virtual bool decode_equals_prompt() const { return true; }
    virtual std::unique_ptr<Sequence> new_sequence(int capacity) = 0;
    // One step of every sequence in the batch, each at most once; returns the logits (batch, V)
    // after the last token of each, valid until the next step. One that throws changes no sequence.
    virtual std::span<const float> step(std::span<const Chunk> batch,
                                        Observer* observer = nullptr) = 0;
    // The same step, then a draw from the logits of batch[i] by samplers[i]; a device may draw
    // where the logits are. The tokens are valid until the next step.
    virtual std::span<const Token> sample(std::span<const Chunk> batch,
                                          std::span<Sampler* const> samplers) {
        const std::span<const float> logits = step(batch);
        const std::size_t V = logits.size() / std::max<std::size_t>(batch.size(), 1);
        drawn_.clear();
        try {
            for (std::size_t i = 0; i < batch.size(); ++i)
                drawn_.push_back(samplers[i]->sample(logits.subspan(i * V, V)));
        } catch (...) {  // logits that are no numbers: as if there had been no step
            for (const Chunk& c : batch)
                c.sequence->rewind(static_cast<int>(c.sequence->tokens().size() - c.tokens.size()));
            throw;
        }
        return drawn_;
    }

protected:
    std::vector<Token> drawn_;
};

namespace detail {

class CpuSequence final : public Sequence {
public:
    CpuSequence(const Model& model, int capacity) : cache(model, capacity) {}
    std::span<const Token> tokens() const override { return cache.tokens(); }
    int capacity() const override { return cache.capacity(); }
    void rewind(int length) override { cache.rewind(length); }
    KVCache cache;
};

class CpuBackend final : public Backend {
public:
    explicit CpuBackend(std::shared_ptr<const Model> model) : model_(std::move(model)) {}
    const Config& config() const override { return model_->config(); }
    std::string device() const override {
        const int n = model_->pool().size();
        return cat({"CPU (", cpu_features(), ", ", n, n == 1 ? " thread)" : " threads)"});
    }
    DType dtype() const override { return model_->dtype(); }
    std::unique_ptr<Sequence> new_sequence(int capacity) override {
        return std::make_unique<CpuSequence>(*model_, capacity);
    }
    std::span<const float> step(std::span<const Chunk> batch, Observer* observer) override {
        slices_.clear();
        for (const Chunk& chunk : batch) {
            auto* sequence = dynamic_cast<CpuSequence*>(chunk.sequence);
            if (sequence == nullptr) misuse("a sequence of another backend was given to this one");
            slices_.push_back({&sequence->cache, chunk.tokens});
        }
        return forward(*model_, slices_, workspace_, observer);
    }

private:
    std::shared_ptr<const Model> model_;
    Workspace workspace_;
    std::vector<Slice> slices_;
};

// Makes the sequence hold `prompt` but for its last piece, which is returned. Reads only what is
// new, in pieces that keep the workspace small.
inline Chunk read_prompt(Backend& backend, Sequence& sequence, std::span<const Token> prompt) {
    constexpr std::size_t kPiece = 1024;  // tokens
    if (prompt.empty()) misuse("a prompt needs at least one token");
    if (prompt.size() > static_cast<std::size_t>(sequence.capacity()))
        misuse({"the prompt has ", prompt.size(), " tokens, the context ", sequence.capacity()});
    const auto held = sequence.tokens();
    const auto differ = std::mismatch(prompt.begin(), prompt.end(), held.begin(), held.end());
    auto known = static_cast<std::size_t>(differ.first - prompt.begin());
    // the last token is read again: its logits are wanted
    known = std::min(known, prompt.size() - 1);
    sequence.rewind(static_cast<int>(known));
    for (; prompt.size() - known > kPiece; known += kPiece) {
        const Chunk chunk{&sequence, prompt.subspan(known, kPiece), true};
        backend.step({&chunk, 1});
    }
    return {&sequence, prompt.subspan(known), true};
}

}  // namespace detail

inline std::unique_ptr<Backend> open_cpu(std::shared_ptr<const Model> model) {
    if (model == nullptr) detail::misuse("open_cpu needs a model");
    return std::make_unique<detail::CpuBackend>(std::move(model));
}

// Makes the sequence hold exactly `prompt`, reading only what is new in it; returns the logits (V)
// after its last token. Throws usage if it does not fit.
inline std::span<const float> prefill(Backend& backend, Sequence& sequence,
                                      std::span<const Token> prompt) {
    const Chunk last = detail::read_prompt(backend, sequence, prompt);
    return backend.step({&last, 1});
}

enum class StopReason : std::uint8_t { stop_token, max_tokens, context_full, cancelled };

// Watches one answer and may write parts of it itself (nanochat engine.py: a calculator).
struct Tool {
    virtual ~Tool() = default;
    virtual void on_token(Token token) = 0;          // every token of the answer, forced ones too
    virtual std::optional<Token> next_forced() = 0;  // asked before each token
};

struct GenerateParams {
    int max_tokens = 256;  // forced tokens count
    SamplingParams sampling = {};
    std::vector<Token> stop = {};  // the answer ends after any of these
};
struct Generated {
    Token token;
    bool forced;  // by the tool; the sampled token was discarded
};

// What happens to an answer between two steps; one that steps many answers at once keeps one of
// these for each. `stream` is the sampler's (one per sample of a prompt).
class Continuation {
public:
    Continuation(const GenerateParams& params, Tool* tool, std::uint64_t stream = 0)
        : params_(params), tool_(tool), stream_(stream), sampler_(params.sampling, stream) {}
    Sampler& sampler() { return sampler_; }
    int count() const { return count_; }                          // tokens so far
    std::span<const Token> last() const { return {&token_, 1}; }  // what the next step reads
    void restart_sampler() {  // draws anew what a step that failed has drawn
        sampler_ = Sampler(params_.sampling, stream_);
        for (int i = 0; i < count_; ++i) sampler_.skip();
    }
    // Takes the token drawn, or the tool's in its place: the generator goes on in both cases.
    // Returns why the answer ends with it, if it does.
    template <class OnToken>
    std::optional<StopReason> take(const Sequence& sequence, Token sampled, OnToken&& on_token) {
        const std::optional<Token> forced = tool_ != nullptr ? tool_->next_forced() : std::nullopt;
        token_ = forced.value_or(sampled);
        ++count_;
        if (tool_ != nullptr) tool_->on_token(token_);
        const bool go_on = on_token(Generated{token_, forced.has_value()});
        if (std::find(params_.stop.begin(), params_.stop.end(), token_) != params_.stop.end())
            return StopReason::stop_token;
        if (!go_on) return StopReason::cancelled;
        if (count_ >= params_.max_tokens) return StopReason::max_tokens;
        if (sequence.tokens().size() >= static_cast<std::size_t>(sequence.capacity()))
            return StopReason::context_full;
        return std::nullopt;
    }

private:
    const GenerateParams& params_;
    Tool* tool_;
    std::uint64_t stream_;
    Sampler sampler_;
    Token token_ = 0;
    int count_ = 0;
};

// Continues `prompt` (the whole prefix; what the sequence holds of it is reused). on_token sees
// every token of the answer, a stop token included, as nanochat yields it; returning false cancels.
// The last token given to on_token is not read by the model.
inline StopReason generate(Backend& backend, Sequence& sequence, std::span<const Token> prompt,
                           const GenerateParams& params,
                           const std::function<bool(Generated)>& on_token, Tool* tool = nullptr,
                           std::uint64_t stream = 0) {
    Continuation answer(params, tool, stream);
    Sampler* const samplers[] = {&answer.sampler()};
    Chunk chunk = detail::read_prompt(backend, sequence, prompt);
    while (params.max_tokens > 0) {
        const Token sampled = backend.sample({&chunk, 1}, samplers)[0];
        if (const auto reason = answer.take(sequence, sampled, on_token)) return *reason;
        chunk = {&sequence, answer.last()};
    }
    return StopReason::max_tokens;
}

// ==== 16. chat ===================================================================================
// A chat model has learned from conversations written down in one fixed way. This section writes
// them down so (render_chat), turns an answer's tokens back into text (TextStream), and keeps a
// conversation going (Chat). It also holds the calculator: the model writes an expression between
// two special tokens, and the runtime forces the result into the answer. Text never becomes a
// special token, and an expression is read by a small grammar, never run as code.
// In order: Expression (apply), calculate / CalculatorTool (asked in Continuation::take) /
// read_messages, render_chat, chat_stop_tokens / TextStream / Chat: reply, make_prompt, answer_last

namespace detail {

inline constexpr std::size_t kMaxExpression = 1024;  // bytes; its result has 40 at most
inline constexpr int kMaxParentheses = 32;           // open at a time
inline constexpr std::size_t kMaxStopTexts = 8;
inline constexpr std::size_t kMaxStopText = 64;  // bytes

__extension__ typedef __int128 Int128;  // not ISO C++, but the compilers have it
__extension__ typedef unsigned __int128 UInt128;
inline constexpr UInt128 kMaxInt = ~UInt128{0} >> 1;  // 2^127 - 1

inline UInt128 magnitude(Int128 x) { return static_cast<UInt128>(x < 0 ? -x : x); }

inline std::string int_text(Int128 x) {
    std::string text;
    for (UInt128 rest = magnitude(x); rest != 0 || text.empty(); rest /= 10)
        text.insert(text.begin(), static_cast<char>('0' + static_cast<int>(rest % 10)));
    return x < 0 ? cat({"-", text}) : text;
}

// As Python's repr(): the shortest digits that read back as the same value; plain if
// 1e-4 <= |x| < 1e16, then always with a point; else d.ddde+XX, as to_chars writes it too.
inline std::string float_text(double x) {
    const std::string text = format(x, std::chars_format::scientific);
    const std::size_t e = text.find('e');
    if (e == std::string::npos) return text.ends_with("nan") ? "nan" : text;  // Python has no -nan
    int exponent = 0;
    std::from_chars(text.data() + e + 2, text.data() + text.size(), exponent);
    if (text[e + 1] == '-' ? exponent > 4 : exponent >= 16) return text;
    const std::string plain = format(x);
    return plain.find('.') == std::string::npos ? cat({plain, ".0"}) : plain;
}

// a / b, correctly rounded, as Python divides ints; converting both to double first would round
// three times. Long division in binary until the quotient has 56 bits: 53 for the result, and
// below them at least one for the half and one for "something remains".
inline double divide_ints(Int128 a, Int128 b) {
    const UInt128 divisor = magnitude(b);
    UInt128 quotient = magnitude(a) / divisor, remainder = magnitude(a) % divisor;
    int exponent = 0;
    for (; a != 0 && quotient >> 55 == 0; --exponent) {
        remainder <<= 1;  // below 2 * divisor < 2^128
        quotient = quotient << 1 | static_cast<UInt128>(remainder >= divisor);
        if (remainder >= divisor) remainder -= divisor;
    }
    quotient |= static_cast<UInt128>(remainder != 0);
    const double result = std::ldexp(static_cast<double>(quotient), exponent);
    return (a < 0) == (b < 0) ? result : -result;  // 0 / -3 is -0.0
}

// a // b, as CPython's float_floor_div: by way of the remainder, because floor(a / b) is wrong
// where a / b rounds up to a whole number (1 // 0.1 is 9.0).
inline double floor_divide_floats(double a, double b) {
    const double remainder = std::fmod(a, b);
    double quotient = (a - remainder) / b;
    if (remainder != 0 && (remainder < 0) != (b < 0)) quotient -= 1;
    if (quotient == 0) return std::copysign(0.0, a / b);
    const double whole = std::floor(quotient);
    return quotient - whole > 0.5 ? whole + 1 : whole;
}

// Reads and evaluates an expression from left to right. After a failure nothing is left to read, so
// that every loop and recursion ends by itself.
//   sum     := product (('+' | '-') product)*
//   product := factor (('*' | '/' | '//') factor)*
//   factor  := ('+' | '-')* (number | literal+ | '(' sum ')') method*
//   method  := '.lower()' | '.upper()' | '.count(' sum ')'
//   number  := '0'+ | [1-9][0-9]* | digits with one point, at least one digit
//   literal := "'" characters "'" | '"' characters '"'      adjacent ones join; no escapes
// Spaces may stand between symbols. calculate() never lets operators and strings through together.
class Expression {
public:
    explicit Expression(std::string_view text) : rest_(text) {}
    std::optional<std::string> evaluate() {
        const Value x = sum();
        skip_spaces();
        if (failed_ || !rest_.empty() || x.kind == Kind::text) return std::nullopt;
        return x.kind == Kind::real ? float_text(x.real) : int_text(x.integer);
    }

private:
    enum class Kind : std::uint8_t { integer, real, text };
    struct Value {  // ints are below 2^127 in magnitude, so that negation never overflows
        Kind kind = Kind::integer;
        Int128 integer = 0;
        double real = 0;
        std::string text = {};
        double as_real() const { return kind == Kind::real ? real : static_cast<double>(integer); }
    };
    static Value make_int(Int128 x) { return {.kind = Kind::integer, .integer = x}; }
    static Value make_real(double x) { return {.kind = Kind::real, .real = x}; }
    static Value negate(const Value& x) { return {x.kind, -x.integer, -x.real}; }

    Value fail() {
        failed_ = true;
        rest_ = {};
        return {};
    }
    void skip_spaces() { take(rest_.find_first_not_of(' ')); }
    std::string_view take(std::size_t length) {
        const std::string_view taken = rest_.substr(0, length);
        rest_.remove_prefix(taken.size());
        return taken;
    }
    char next(std::string_view symbols) {  // reads one of them if it comes next, otherwise 0
        skip_spaces();
        const bool found = !rest_.empty() && symbols.find(rest_[0]) != std::string_view::npos;
        return found ? take(1)[0] : '\0';
    }

    Value sum() {
        Value x = product();
        while (const char op = next("+-")) x = apply(op, x, product());
        return x;
    }
    Value product() {
        Value x = factor();
        while (const char op = next("*/")) {
            const bool floor = op == '/' && rest_.starts_with('/');
            if (floor) take(1);
            x = apply(floor ? 'f' : op, x, factor());
        }
        return x;
    }
    Value factor() {
        bool negative = false;
        while (const char sign = next("+-")) negative ^= sign == '-';
        const bool quoted = rest_.starts_with('\'') || rest_.starts_with('"');
        Value x = next("(") ? inside() : quoted ? literals() : number();
        while (next(".")) x = call(x);
        return negative ? negate(x) : x;
    }
    Value inside() {  // of parentheses; the opening one has been read
        if (++open_ > kMaxParentheses) return fail();
        const Value x = sum();
        --open_;
        return next(")") ? x : fail();
    }
    Value number() {
        const std::string_view digits = take(rest_.find_first_not_of("0123456789."));
        const std::size_t point = digits.find('.');
        if (digits.empty() || digits == "." || point != digits.rfind('.')) return fail();
        if (point < digits.size()) {
            // from_chars leaves the value as it is if it is out of range: infinite if a digit
            // other than 0 stands before the point, else too small for a double.
            double x = digits.find_first_not_of("0.") < point ? HUGE_VAL : 0;
            std::from_chars(digits.data(), digits.data() + digits.size(), x);
            return make_real(x);
        }
        Value x;
        for (const char c : digits) x = apply('+', apply('*', x, make_int(10)), make_int(c - '0'));
        return digits[0] == '0' && x.integer != 0 ? fail() : x;  // Python takes 00, but not 007
    }
    Value literals() {
        Value x{.kind = Kind::text};
        while (const char quote = next("'\"")) {
            const std::size_t length = rest_.find(quote);
            // Three quotes begin a literal of Python's long form, which models do not write.
            const bool triple = length == 0 && rest_.substr(1).starts_with(quote);
            if (length == std::string_view::npos || triple) return fail();
            x.text += take(length);
            take(1);
        }
        return x;
    }
    Value call(Value x) {
        skip_spaces();
        const std::string_view method = take(rest_.find_first_not_of("celnoprtuw"));
        if (x.kind != Kind::text || !next("(")) return fail();
        if (method == "count") {
            const Value part = inside();
            return part.kind == Kind::text ? make_int(occurrences(x.text, part.text)) : fail();
        }
        for (char& c : x.text) c = method == "lower" ? ascii_lower(c) : ascii_upper(c);
        return (method == "lower" || method == "upper") && next(")") ? x : fail();
    }
    static Int128 occurrences(std::string_view text, std::string_view part) {
        if (part.empty()) return static_cast<Int128>(text.size() + 1);  // before each, and the end
        Int128 count = 0;
        std::size_t at = 0;
        for (; (at = text.find(part, at)) < text.size(); at += part.size()) ++count;
        return count;
    }

    // 'f' is floor division. Int with float makes float; an int past 2^127 fails: Python's grows.
    Value apply(char op, const Value& x, const Value& y) {
        if ((op == '/' || op == 'f') && y.as_real() == 0) return fail();
        if (x.kind == Kind::real || y.kind == Kind::real) {
            const double a = x.as_real(), b = y.as_real();
            if (op == 'f') return make_real(floor_divide_floats(a, b));
            if (op == '-') return make_real(a - b);
            return make_real(op == '+' ? a + b : op == '*' ? a * b : a / b);
        }
        const Int128 a = x.integer, b = y.integer, most = static_cast<Int128>(kMaxInt);
        if (op == '-') return apply('+', x, negate(y));
        if (op == '/') return make_real(divide_ints(a, b));
        if (op == 'f') {  // C++ rounds toward zero
            return make_int(a / b - static_cast<Int128>(a % b != 0 && (a < 0) != (b < 0)));
        }
        if (op == '+') return (b > 0 ? a > most - b : a < -most - b) ? fail() : make_int(a + b);
        if (b != 0 && magnitude(a) > kMaxInt / magnitude(b)) return fail();
        const auto product = static_cast<Int128>(magnitude(a) * magnitude(b));
        return make_int((a < 0) == (b < 0) ? product : -product);
    }

    std::string_view rest_;
    bool failed_ = false;
    int open_ = 0;
};

}  // namespace detail

// What nanochat's calculator answers (engine.py, use_calculator): arithmetic of decimal numbers, or
// how often one string occurs in another. Commas are removed first, as in 1,000. Anything else, and
// whatever raises an exception in Python, has no result.
inline std::optional<std::string> calculate(std::string_view expression) {
    if (expression.size() > detail::kMaxExpression) return std::nullopt;
    std::string text(expression), lower;
    std::erase(text, ',');
    if (text.find_first_not_of("0123456789*+-/.() ") == std::string::npos) {
        return detail::Expression(text).evaluate();  // which has no **
    }
    // nanochat runs the string through Python's eval, fenced in by these checks. There is nothing
    // to protect here, but that "profile" gets no answer is part of what models were trained with.
    for (const char c : text) lower += detail::ascii_lower(c);
    constexpr const char* kAllowed = "abcdefghijklmnopqrstuvwxyz0123456789'\"()._ ";
    if (lower.find_first_not_of(kAllowed) != std::string::npos) return std::nullopt;
    for (const char* word :
         {"__", "import", "exec", "eval", "compile", "open", "file", "input", "globals", "locals",
          "vars", "dir", "getattr", "setattr", "delattr", "hasattr"}) {
        if (lower.find(word) != std::string::npos) return std::nullopt;
    }
    if (text.find(".count(") == std::string::npos) return std::nullopt;
    return detail::Expression(text).evaluate();
}

// Watches an answer and forces the calculator's results into it (nanochat engine.py, RowState).
// Only the answer's own tokens call it; a prompt with tool tokens in it does not.
class CalculatorTool : public Tool {
public:
    explicit CalculatorTool(const Tokenizer& tokenizer) : tokenizer_(tokenizer) {}

    void on_token(Token token) override {
        if (token == python_start_) {  // also inside a block: it begins anew
            in_block_ = true;
            expression_.clear();
        } else if (in_block_ && token == python_end_) {
            in_block_ = false;
            const auto result = calculate(tokenizer_.decode(expression_));
            if (!result) return;  // the model goes on by itself
            forced_ = tokenizer_.encode(*result);
            forced_.insert(forced_.begin(), tokenizer_.special("<|output_start|>"));
            forced_.push_back(tokenizer_.special("<|output_end|>"));
        } else if (in_block_) {
            expression_.push_back(token);
        }
    }
    std::optional<Token> next_forced() override {
        if (forced_.empty()) return std::nullopt;
        const Token token = forced_.front();
        forced_.erase(forced_.begin());
        return token;
    }

private:
    const Tokenizer& tokenizer_;
    const Token python_start_ = tokenizer_.special("<|python_start|>");
    const Token python_end_ = tokenizer_.special("<|python_end|>");
    bool in_block_ = false;
    std::vector<Token> expression_, forced_;
};

enum class Role : std::uint8_t { system, user, assistant };
struct Message {
    Role role;
    std::string content;
};

namespace detail {

struct Exchange {  // a message of the user and the answer to it
    std::string user;
    std::vector<Token> user_ids;
    std::string text;           // of the answer, as it was shown
    std::vector<Token> answer;  // as it was generated
    std::vector<bool> forced;   // of the answer: by the calculator
};

// Returns the exchanges, the last one possibly without an answer; `system` becomes the text of a
// system message. Throws usage unless user and assistant alternate behind at most one of those.
inline std::vector<Exchange> read_messages(const Tokenizer& tokenizer,
                                           std::span<const Message> messages, std::string& system) {
    std::vector<Exchange> exchanges;
    for (std::size_t i = 0; i < messages.size(); ++i) {
        const auto& [role, content] = messages[i];
        const bool answered = exchanges.empty() || !exchanges.back().answer.empty();
        if (role == Role::system && i == 0) {
            system = content;
        } else if (role == Role::user && answered) {
            exchanges.push_back({content, tokenizer.encode(content), {}, {}, {}});
        } else if (role == Role::assistant && !answered) {
            Exchange& last = exchanges.back();
            last.text = content;
            last.answer = tokenizer.encode(content);
            last.answer.push_back(tokenizer.special("<|assistant_end|>"));
            last.forced.resize(last.answer.size());
        } else {
            misuse({"messages: number ", i + 1, " has the wrong role, ",
                    answered ? "the user's" : "the assistant's", " is needed"});
        }
    }
    return exchanges;
}

// What the model reads to answer the last of these exchanges: <|bos|>, the messages between their
// marks, <|assistant_start|>. An answer that did not end by itself is closed. There is no mark for
// a system text: it begins the first message.
inline std::vector<Token> render(const Tokenizer& tokenizer, const std::string& system,
                                 std::span<const Exchange> exchanges) {
    std::vector<Token> ids = {tokenizer.special("<|bos|>")};
    const auto add = [&](std::span<const Token> more) {
        ids.insert(ids.end(), more.begin(), more.end());
    };
    const Token end = tokenizer.special("<|assistant_end|>");
    for (const Exchange& exchange : exchanges) {
        const bool first = &exchange == &exchanges.front();
        ids.push_back(tokenizer.special("<|user_start|>"));
        if (first && !system.empty()) {
            add(tokenizer.encode(cat({system, "\n\n", exchange.user})));
        } else {
            add(exchange.user_ids);
        }
        add(std::array{tokenizer.special("<|user_end|>"),
                       tokenizer.special("<|assistant_start|>")});
        if (&exchange == &exchanges.back()) break;
        add(exchange.answer);
        if (ids.back() != end) ids.push_back(end);
    }
    return ids;
}

}  // namespace detail

// The prompt for an answer to the last message, which is the user's (nanochat tokenizer.py,
// render_for_completion). Each text is encoded by itself. Throws usage if the roles are wrong.
inline std::vector<Token> render_chat(const Tokenizer& tokenizer,
                                      std::span<const Message> messages) {
    std::string system;
    const auto exchanges = detail::read_messages(tokenizer, messages, system);
    if (exchanges.empty() || !exchanges.back().answer.empty())
        detail::misuse("messages: the last one has to be the user's");
    return detail::render(tokenizer, system, exchanges);
}

// The tokens that end an answer: nanochat's <|assistant_end|> and <|bos|>, and every other special
// token but the tool's. Some models were tuned without a loss mask and go on with the user's part.
inline std::vector<Token> chat_stop_tokens(const Tokenizer& tokenizer) {
    std::vector<Token> stop;
    for (Token id = 0; id < tokenizer.vocab_size(); ++id) {
        if (tokenizer.is_special(id)) stop.push_back(id);
    }
    for (const char* tool :
         {"<|python_start|>", "<|python_end|>", "<|output_start|>", "<|output_end|>"}) {
        std::erase(stop, tokenizer.special(tool));
    }
    return stop;
}

// Tokens in, text out as soon as it is certain: whole characters (one may spread over several
// tokens), no special tokens, nothing of a stop text nor what could still become one. A call of the
// calculator reads "[37*41 = 1517] ", or its special tokens stay as their names (`literal`, as
// nanochat's chat_web sends them). However a text is cut into tokens, the joined pieces are equal.
class TextStream {
public:
    // Throws usage unless there are at most 8 stop texts of 1 to 64 bytes of UTF-8.
    explicit TextStream(const Tokenizer& tokenizer, std::vector<std::string> stop_texts = {},
                        bool literal = false)
        : tokenizer_(tokenizer), stop_texts_(std::move(stop_texts)), literal_(literal) {
        const bool good = std::all_of(stop_texts_.begin(), stop_texts_.end(), [](const auto& s) {
            return !s.empty() && s.size() <= detail::kMaxStopText && detail::is_utf8(s);
        });
        if (good && stop_texts_.size() <= detail::kMaxStopTexts) return;
        detail::misuse("stop texts: at most 8, each of 1 to 64 bytes of UTF-8");
    }

    std::string push(Token token) {
        const std::string_view piece = tokenizer_.piece(token);
        const std::string bytes = tokenizer_.is_special(token)
                                      ? tool_mark(piece)
                                      : detail::cat({called_ ? close() : "", piece});
        return release(utf8_.push(bytes), false);
    }
    std::string finish() {  // what is still held back
        std::string rest = utf8_.push(close());
        return release(rest += utf8_.finish(), true);
    }
    bool stopped() const { return stopped_; }  // at a stop text; nothing is shown any more

private:
    std::string close() {  // the bracket of a call, if one is open
        const bool open = std::exchange(open_, false);
        called_ = false;
        return open ? "]" : "";
    }
    // "[" expression " = " result "]"; without a result, "]" comes before whatever comes instead.
    std::string tool_mark(std::string_view special) {
        const bool tool = special.starts_with("<|python_") || special.starts_with("<|output_");
        if (literal_) return std::string(tool ? special : "");
        if (special == "<|python_end|>") {
            called_ = open_;
            return {};
        }
        if (special == "<|output_start|>" && called_) {
            called_ = false;
            return " = ";
        }
        const std::string end = close() + (special == "<|output_end|>" ? " " : "");
        open_ = special == "<|python_start|>" || special == "<|output_start|>";
        return open_ ? detail::cat({end, "["}) : end;
    }
    std::string release(const std::string& text, bool last) {
        if (stopped_) return {};
        held_ += text;
        // The stop text that is complete first; of two that end together, the longer.
        std::size_t begin = 0, end = std::string::npos;
        for (const std::string& stop : stop_texts_) {
            const std::size_t at = held_.find(stop);
            if (at == std::string::npos || at + stop.size() > end) continue;
            begin = at + stop.size() < end ? at : std::min(at, begin);
            end = at + stop.size();
        }
        stopped_ = end != std::string::npos;
        const std::string shown =
            held_.substr(0, stopped_ ? begin : held_.size() - (last ? 0 : undecided()));
        held_.erase(0, stopped_ ? held_.size() : shown.size());
        return shown;
    }
    std::size_t undecided() const {  // bytes at the end that a stop text begins with
        std::size_t most = 0;
        for (const std::string& stop : stop_texts_) {
            for (std::size_t n = most + 1; n < stop.size(); ++n) {
                if (held_.ends_with(std::string_view(stop).substr(0, n))) most = n;
            }
        }
        return most;
    }

    const Tokenizer& tokenizer_;
    std::vector<std::string> stop_texts_;
    Utf8Stream utf8_;
    std::string held_;
    bool literal_ = false, stopped_ = false;
    bool open_ = false, called_ = false;  // inside a call's brackets; its expression has ended
};

struct ReplyStats {
    int prompt_tokens = 0;       // what the model was given to read
    int reused_tokens = 0;       // of these, what it had read before
    int completion_tokens = 0;   // sampled and forced, the stop token included
    int context_used = 0;        // both together; at most config().sequence_len
    int dropped_messages = 0;    // the oldest, which the model no longer sees
    double prefill_seconds = 0;  // until the first token
    double decode_seconds = 0;   // from then on
    StopReason reason = StopReason::stop_token;
    bool stop_text = false;  // a stop text ended it; reason is stop_token
};

// A conversation. It is kept as token ids, as nanochat's chat_cli does: an answer is read again as
// it was generated, forced tokens included, and the sequence can reuse what it holds of it. The
// backend and the tokenizer must outlive it; one thread at a time.
class Chat {
public:
    Chat(Backend& backend, const Tokenizer& tokenizer, GenerateParams params = {})
        : backend_(backend), tokenizer_(tokenizer), params_(std::move(params)) {
        if (tokenizer.vocab_size() == backend.config().vocab_size) return;
        detail::misuse({"the tokenizer has ", tokenizer.vocab_size(), " tokens, the model ",
                        backend.config().vocab_size, ": they do not belong together"});
    }

    // Answers a message. on_text gets whole characters as they come, "" for a token that completes
    // none, and returns false to stop; the answer then stays in the conversation as far as it came.
    // The random generator starts from params().sampling.seed each time, as in nanochat. Without
    // stop tokens in params() those of chat_stop_tokens() hold.
    // Prompt and answer share the context. Oldest exchanges are left out of the prompt while less
    // than a quarter of the context (or max_tokens, if fewer) would remain for the answer, which
    // may then use all that does remain. Throws usage if not even one token does. Whatever is
    // thrown, by on_text too, leaves the conversation as it was.
    StopReason reply(std::string_view user, const std::function<bool(std::string_view)>& on_text) {
        exchanges_.push_back({std::string(user), tokenizer_.encode(user), {}, {}, {}});
        try {
            answer_last(on_text);
        } catch (...) {
            exchanges_.pop_back();
            throw;
        }
        return stats_.reason;
    }

    void reset() { exchanges_.clear(); }  // a new conversation; the system text stays
    bool undo() {                         // takes back the last exchange, if there is one
        if (exchanges_.empty()) return false;
        exchanges_.pop_back();
        return true;
    }

    GenerateParams& params() { return params_; }
    std::string& system() { return system_; }
    std::vector<std::string>& stop_texts() { return stop_texts_; }
    const ReplyStats& stats() const { return stats_; }
    // Ids of the last answer as they were generated, and which of them the calculator forced.
    std::span<const Token> answer() const { return last().answer; }
    const std::vector<bool>& answer_forced() const { return last().forced; }

    // The conversation as text, answers as they were shown.
    std::vector<Message> messages() const {
        std::vector<Message> out;
        if (!system_.empty()) out.push_back({Role::system, system_});
        for (const detail::Exchange& exchange : exchanges_) {
            out.push_back({Role::user, exchange.user});
            out.push_back({Role::assistant, exchange.text});
        }
        return out;
    }
    // Replaces conversation and system text. Throws usage, and changes nothing, if the roles do not
    // alternate or the last message has no answer.
    void load(std::span<const Message> messages) {
        std::string system;
        auto exchanges = detail::read_messages(tokenizer_, messages, system);
        if (!exchanges.empty() && exchanges.back().answer.empty())
            detail::misuse("messages: the last one has to be the assistant's");
        system_ = std::move(system);
        exchanges_ = std::move(exchanges);
    }

private:
    int sequence_len() const { return backend_.config().sequence_len; }
    const detail::Exchange& last() const {
        static const detail::Exchange kNone;
        return exchanges_.empty() ? kNone : exchanges_.back();
    }

    // The prompt for the last exchange, as much of the conversation as fits.
    std::vector<Token> make_prompt() {
        const auto S = static_cast<std::size_t>(sequence_len());
        const auto most = static_cast<std::size_t>(std::max(params_.max_tokens, 1));
        const std::span<const detail::Exchange> all = exchanges_;
        // An exchange has 4 marks, so that older ones than these cannot fit.
        std::size_t oldest = all.size() - std::min(all.size(), S / 4 + 1);
        std::vector<Token> ids = detail::render(tokenizer_, system_, all.subspan(oldest));
        while (ids.size() + std::min(most, S / 4) > S && oldest + 1 < all.size()) {
            ids = detail::render(tokenizer_, system_, all.subspan(++oldest));
        }
        if (ids.size() >= S) {
            detail::misuse({"message: with its marks and the system text it takes ", ids.size(),
                            " tokens, the context of ", S,
                            " has to hold an answer too. Send a shorter one."});
        }
        const std::span<const Token> held = sequence_->tokens();
        std::size_t same = 0;  // the last token is always read anew, for its logits
        while (same < std::min(held.size(), ids.size() - 1) && held[same] == ids[same]) ++same;
        stats_ = {.prompt_tokens = static_cast<int>(ids.size()),
                  .reused_tokens = static_cast<int>(same),
                  .dropped_messages = static_cast<int>(2 * oldest)};
        return ids;
    }

    void answer_last(const std::function<bool(std::string_view)>& on_text) {
        using Clock = std::chrono::steady_clock;
        const std::vector<Token> prompt = make_prompt();
        GenerateParams params = params_;
        params.max_tokens = std::min(params.max_tokens, sequence_len() - stats_.prompt_tokens);
        const bool clipped = params.max_tokens < params_.max_tokens;
        if (params.stop.empty()) params.stop = stop_;

        detail::Exchange& now = exchanges_.back();
        CalculatorTool calculator(tokenizer_);
        TextStream stream(tokenizer_, stop_texts_);
        bool go_on = true;
        const auto show = [&](const std::string& text) {
            now.text += text;
            if (go_on && on_text) go_on = on_text(text);
            return go_on && !stream.stopped();
        };
        const Clock::time_point start = Clock::now();
        Clock::time_point first = start;
        const auto on_token = [&](Generated generated) {
            if (now.answer.empty()) first = Clock::now();
            now.answer.push_back(generated.token);
            now.forced.push_back(generated.forced);
            return show(stream.push(generated.token));
        };
        StopReason reason = generate(backend_, *sequence_, prompt, params, on_token, &calculator);
        stats_.prefill_seconds = std::chrono::duration<double>(first - start).count();
        stats_.decode_seconds = std::chrono::duration<double>(Clock::now() - first).count();
        stats_.completion_tokens = static_cast<int>(now.answer.size());
        stats_.context_used = stats_.prompt_tokens + stats_.completion_tokens;

        show(stream.finish());
        if (reason == StopReason::max_tokens && clipped) reason = StopReason::context_full;
        if (stream.stopped()) reason = StopReason::stop_token;
        stats_.stop_text = stream.stopped();
        stats_.reason = reason;
    }

    Backend& backend_;
    const Tokenizer& tokenizer_;
    GenerateParams params_;
    std::string system_;
    std::vector<std::string> stop_texts_;
    const std::vector<Token> stop_ = chat_stop_tokens(tokenizer_);
    std::unique_ptr<Sequence> sequence_ = backend_.new_sequence(sequence_len());
    std::vector<detail::Exchange> exchanges_;
    ReplyStats stats_;
};
}  // namespace v0
}  // namespace nanogpt

#endif  // NANOGPT_VERSION
