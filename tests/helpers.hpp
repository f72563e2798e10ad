// helpers.hpp: what the tests share. Writers of genuine-looking checkpoints, tokenizers and
// metadata with a knob on every field, comparison of numbers, temporary directories.
//
// A byte buffer is a std::string here: literals append to it, and `bytes_of` makes the span that
// the parsers take. Letters of dimensions are those at the top of nanogpt.hpp (DEFINITIONS).
#pragma once

#include <doctest/doctest.h>
#include <unistd.h>  // rmdir through filesystem, getpid

#include <algorithm>   // max, min
#include <bit>         // bit_cast
#include <cstddef>     // byte
#include <cstdint>     // uint32_t
#include <cstdio>      // printf, snprintf
#include <cstdlib>     // getenv, mkdtemp
#include <filesystem>  // path
#include <fstream>     // ifstream, ofstream
#include <functional>  // function
#include <limits>      // infinity
#include <map>
#include <optional>
#include <span>
#include <stdexcept>  // runtime_error
#include <string>
#include <string_view>
#include <utility>  // pair
#include <vector>

#include "nanogpt.hpp"

namespace test {

namespace fs = std::filesystem;

// ==== numbers ====================================================================================

// By the exponent bits, so that -ffast-math cannot fold it away.
inline bool is_finite(float x) {
    return (std::bit_cast<std::uint32_t>(x) & 0x7F800000u) != 0x7F800000u;
}

struct Difference {
    double largest = 0;     // infinity if a value is not finite or the sizes differ
    std::size_t index = 0;  // where
};

inline Difference difference(std::span<const float> got, std::span<const float> want) {
    constexpr double kInfinity = std::numeric_limits<double>::infinity();
    if (got.size() != want.size()) return {kInfinity, std::min(got.size(), want.size())};
    Difference d;
    for (std::size_t i = 0; i < got.size(); ++i) {
        if (!is_finite(got[i]) || !is_finite(want[i])) return {kInfinity, i};
        const double delta = std::abs(double{got[i]} - double{want[i]});
        if (delta > d.largest) d = {delta, i};
    }
    return d;
}

// |got - want| <= atol + rtol * |want| for every element; otherwise says where and by how much.
inline bool close(std::span<const float> got, std::span<const float> want, double atol,
                  double rtol = 0) {
    const Difference worst = difference(got, want);
    if (got.size() != want.size()) {
        MESSAGE("close: ", got.size(), " values, wanted ", want.size());
        return false;
    }
    for (std::size_t i = 0; i < got.size(); ++i) {
        const bool finite = is_finite(got[i]) && is_finite(want[i]);
        const double delta = finite ? std::abs(double{got[i]} - double{want[i]}) : 0;
        if (finite && delta <= atol + rtol * std::abs(double{want[i]})) continue;
        MESSAGE("close: at ", i, " of ", got.size(), " got ", got[i], ", wanted ", want[i],
                "; the largest difference is ", worst.largest, " at ", worst.index);
        return false;
    }
    return true;
}

inline bool close(float got, float want, double atol, double rtol = 0) {
    return close(std::span<const float>(&got, 1), std::span<const float>(&want, 1), atol, rtol);
}

// Equal bit for bit; otherwise says where.
inline bool same_bits(std::span<const float> got, std::span<const float> want) {
    if (got.size() != want.size()) {
        MESSAGE("same_bits: ", got.size(), " values, wanted ", want.size());
        return false;
    }
    for (std::size_t i = 0; i < got.size(); ++i) {
        if (std::bit_cast<std::uint32_t>(got[i]) == std::bit_cast<std::uint32_t>(want[i])) continue;
        MESSAGE("same_bits: at ", i, " of ", got.size(), " got ", got[i], ", wanted ", want[i]);
        return false;
    }
    return true;
}

// xorshift64*: the same sequence everywhere.
class Random {
public:
    explicit Random(std::uint64_t seed) : state_(seed * 0x9E3779B97F4A7C15u + 1) {}
    std::uint64_t next() {
        state_ ^= state_ >> 12;
        state_ ^= state_ << 25;
        state_ ^= state_ >> 27;
        return state_ * 0x2545F4914F6CDD1Du;
    }
    std::size_t below(std::size_t n) { return n == 0 ? 0 : (next() >> 11) % n; }
    float uniform() { return static_cast<float>(next() >> 40) * 0x1p-24f; }  // [0, 1)

private:
    std::uint64_t state_;
};

// ==== environment ================================================================================

inline bool env_is_set(const char* name) {
    const char* value = std::getenv(name);
    return value != nullptr && *value != '\0' && std::string_view(value) != "0";
}
inline bool quick() { return env_is_set("NANOGPT_QUICK"); }
inline bool exhaustive() { return env_is_set("NANOGPT_EXHAUSTIVE"); }

inline fs::path source_dir() {
#ifdef NANOGPT_SOURCE_DIR
    return fs::path(NANOGPT_SOURCE_DIR);
#else
    return fs::absolute(fs::path(__FILE__)).parent_path().parent_path();
#endif
}
inline fs::path data_dir() { return source_dir() / "tests" / "data"; }
inline fs::path sample_dir() { return source_dir() / "tools" / "sample"; }

// Optional large fixtures: $NANOGPT_SHARED, else ../shared beside the source tree. Empty if absent.
inline fs::path shared_dir() {
    const char* given = std::getenv("NANOGPT_SHARED");
    const fs::path dir = given != nullptr && *given != '\0' ? fs::path(given)
                                                            : source_dir().parent_path() / "shared";
    std::error_code ignored;
    return fs::is_directory(dir / "fixtures", ignored) ? dir : fs::path();
}

// One line per group of product tests, as "A1 72/72".
inline void report(const char* group, std::size_t passed, std::size_t total) {
    std::printf("%s %zu/%zu\n", group, passed, total);
    std::fflush(stdout);
}

// Checks of a part of a group, as "B6 cuts", counted; the groups are told by report_tallies().
inline std::map<std::string, std::pair<std::size_t, std::size_t>>& tallies() {
    static std::map<std::string, std::pair<std::size_t, std::size_t>> all;
    return all;
}
inline void tally(const std::string& part, std::size_t passed, std::size_t total) {
    auto& sum = tallies()[part.substr(0, part.find(' '))];
    sum.first += passed;
    sum.second += total;
    if (part.find(' ') != part.npos) report(part.c_str(), passed, total);
}
inline void report_tallies() {
    for (const auto& [group, sum] : tallies()) report(group.c_str(), sum.first, sum.second);
}

// Whether there is no program to test; says so.
inline bool no_binary(std::string_view program) {
    if (program.empty()) MESSAGE("skipped: the program was not built");
    return program.empty();
}

// ==== files ======================================================================================

class TempDir {
public:
    TempDir() {
        std::error_code ignored;
        const bool memory = ::access("/dev/shm", W_OK) == 0;
        const fs::path parent = memory ? fs::path("/dev/shm") : fs::temp_directory_path();
        std::string pattern = (parent / "nanogpt-test-").string() + std::string(6, 'X');
        if (::mkdtemp(pattern.data()) == nullptr) throw std::runtime_error("mkdtemp failed");
        path_ = pattern;
    }
    ~TempDir() {
        std::error_code ignored;
        fs::remove_all(path_, ignored);
    }
    TempDir(const TempDir&) = delete;
    TempDir& operator=(const TempDir&) = delete;
    const fs::path& path() const { return path_; }
    fs::path operator/(const fs::path& name) const { return path_ / name; }

private:
    fs::path path_;
};

inline std::span<const std::byte> bytes_of(std::string_view s) {
    return {reinterpret_cast<const std::byte*>(s.data()), s.size()};
}

inline void write_file(const fs::path& path, std::string_view bytes) {
    fs::create_directories(path.parent_path());
    std::ofstream out(path, std::ios::binary | std::ios::trunc);
    out.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
    out.close();
    if (!out) throw std::runtime_error("cannot write " + path.string());
}

inline std::string read_file(const fs::path& path) {
    std::ifstream in(path, std::ios::binary);
    if (!in) throw std::runtime_error("cannot read " + path.string());
    return std::string(std::istreambuf_iterator<char>(in), std::istreambuf_iterator<char>());
}

inline std::string from_base64(std::string_view text) {
    std::string out;
    std::uint32_t bits = 0;
    int count = 0;
    for (const char c : text) {
        constexpr std::string_view kAlphabet =
            "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
        const std::size_t value = kAlphabet.find(c);
        if (value == std::string_view::npos) continue;
        bits = bits << 6 | static_cast<std::uint32_t>(value);
        if ((count += 6) < 8) continue;
        count -= 8;
        out += static_cast<char>(bits >> count & 0xFF);
    }
    return out;
}

// ==== errors =====================================================================================

// The message of the Error that f throws, "" if it throws none. Any other exception is passed on.
template <class F>
std::string error_of(F&& f) {
    try {
        f();
    } catch (const nanogpt::Error& e) {
        return e.what();
    }
    return {};
}

inline bool contains(std::string_view text, std::string_view part) {
    return text.find(part) != std::string_view::npos;
}

// ==== zip ========================================================================================

inline void put16(std::string& out, std::uint64_t x) {
    for (int i = 0; i < 2; ++i) out += static_cast<char>(x >> (8 * i) & 0xFF);
}
inline void put32(std::string& out, std::uint64_t x) {
    for (int i = 0; i < 4; ++i) out += static_cast<char>(x >> (8 * i) & 0xFF);
}
inline void put64(std::string& out, std::uint64_t x) {
    for (int i = 0; i < 8; ++i) out += static_cast<char>(x >> (8 * i) & 0xFF);
}

inline std::uint32_t crc32(std::string_view bytes) {
    static const std::vector<std::uint32_t> table = [] {
        std::vector<std::uint32_t> t(256);
        for (std::uint32_t i = 0; i < 256; ++i) {
            t[i] = i;
            for (int bit = 0; bit < 8; ++bit) t[i] = (t[i] & 1u) * 0xEDB88320u ^ t[i] >> 1;
        }
        return t;
    }();
    std::uint32_t crc = 0xFFFFFFFFu;
    for (const char c : bytes)
        crc = table[(crc ^ static_cast<unsigned char>(c)) & 0xFFu] ^ crc >> 8;
    return ~crc;
}

// One record. What torch writes is the default; an optional that is set replaces it.
struct ZipEntry {
    std::string name, data;
    std::uint32_t local_signature = 0x04034B50, central_signature = 0x02014B50;
    std::uint16_t flags = 0x0808, method = 0, version = 0, disk = 0;
    std::optional<std::uint16_t> local_flags, local_method;  // default: as central
    std::optional<std::string> local_name, local_extra;      // default: name, FB padding
    std::optional<std::uint16_t> local_name_length, local_extra_length;
    std::uint32_t local_crc = 0, local_size = 0, local_stored = 0;  // zero, since flag bit 3 is set
    std::optional<std::uint32_t> crc;
    std::optional<std::uint32_t> size, stored, offset;  // the 32-bit fields of the directory
    std::optional<std::uint16_t> name_length, extra_length, comment_length;
    std::string extra, comment;             // of the directory
    std::optional<std::string> descriptor;  // after the data
};

// The end records. What torch writes is the default.
struct ZipEnd {
    bool zip64 = true;    // end record and locator of 64 bits
    bool classic = true;  // the end record itself
    std::uint32_t zip64_signature = 0x06064B50, locator_signature = 0x07064B50,
                  signature = 0x06054B50;
    std::uint64_t zip64_length = 44;
    std::uint32_t zip64_disk = 0, zip64_directory_disk = 0;
    std::optional<std::uint64_t> zip64_entries_here, zip64_entries, zip64_size, zip64_offset;
    std::uint32_t locator_disk = 0, locator_disks = 1;
    std::optional<std::uint64_t> locator_offset;
    std::uint16_t disk = 0, directory_disk = 0;
    std::optional<std::uint16_t> entries_here, entries;
    std::optional<std::uint32_t> size, offset;
    std::optional<std::uint16_t> comment_length;
    std::string comment;
};

// Writes a zip as torch.save does: stored records whose data begins at a multiple of 64, sizes and
// CRC in data descriptors and in the central directory only, end records of 64 bits always.
struct ZipWriter {
    std::vector<ZipEntry> entries;
    ZipEnd end;
    std::string prefix, between, suffix;  // junk before all, before the directory, after all

    ZipEntry& add(std::string name, std::string data) {
        entries.push_back({});
        entries.back().name = std::move(name);
        entries.back().data = std::move(data);
        return entries.back();
    }

    ZipEntry& operator[](std::string_view name_end) {
        for (ZipEntry& e : entries) {
            if (e.name.size() >= name_end.size() &&
                e.name.compare(e.name.size() - name_end.size(), name_end.size(), name_end) == 0) {
                return e;
            }
        }
        throw std::runtime_error("no record ends in " + std::string(name_end));
    }

    std::string bytes() const {
        std::string out = prefix;
        std::vector<std::uint64_t> offsets;
        for (const ZipEntry& e : entries) {
            offsets.push_back(out.size());
            write_local(out, e);
        }
        out += between;
        const std::uint64_t begin = out.size();
        for (std::size_t i = 0; i < entries.size(); ++i) write_central(out, entries[i], offsets[i]);
        write_end(out, begin, out.size() - begin);
        return out + suffix;
    }

private:
    static void write_local(std::string& out, const ZipEntry& e) {
        const std::string& name = e.local_name.value_or(e.name);
        const std::string extra = e.local_extra.value_or(padding(out.size() + 30 + name.size()));
        put32(out, e.local_signature);
        put16(out, e.version);
        put16(out, e.local_flags.value_or(e.flags));
        put16(out, e.local_method.value_or(e.method));
        put32(out, 0);  // time, date
        put32(out, e.local_crc);
        put32(out, e.local_stored);
        put32(out, e.local_size);
        put16(out, e.local_name_length.value_or(static_cast<std::uint16_t>(name.size())));
        put16(out, e.local_extra_length.value_or(static_cast<std::uint16_t>(extra.size())));
        out += name + extra + e.data;
        if (e.descriptor) {
            out += *e.descriptor;
            return;
        }
        put32(out, 0x08074B50);
        put32(out, e.crc.value_or(crc32(e.data)));
        put32(out, e.data.size());
        put32(out, e.data.size());
    }

    // The FB field that moves the data to a multiple of 64; `at` is where the field begins.
    static std::string padding(std::size_t at) {
        const std::size_t n = (64 - (at + 4) % 64) % 64;
        std::string out = "FB";
        put16(out, n);
        return out + std::string(n, 'Z');
    }

    static void write_central(std::string& out, const ZipEntry& e, std::uint64_t offset) {
        put32(out, e.central_signature);
        put16(out, 0);  // made by
        put16(out, e.version);
        put16(out, e.flags);
        put16(out, e.method);
        put32(out, 0);  // time, date
        put32(out, e.crc.value_or(crc32(e.data)));
        put32(out, e.stored.value_or(static_cast<std::uint32_t>(e.data.size())));
        put32(out, e.size.value_or(static_cast<std::uint32_t>(e.data.size())));
        put16(out, e.name_length.value_or(static_cast<std::uint16_t>(e.name.size())));
        put16(out, e.extra_length.value_or(static_cast<std::uint16_t>(e.extra.size())));
        put16(out, e.comment_length.value_or(static_cast<std::uint16_t>(e.comment.size())));
        put16(out, e.disk);
        put16(out, 0);  // internal attributes
        put32(out, 0);  // external attributes
        put32(out, e.offset.value_or(static_cast<std::uint32_t>(offset)));
        out += e.name + e.extra + e.comment;
    }

    void write_end(std::string& out, std::uint64_t begin, std::uint64_t length) const {
        const std::uint64_t at = out.size();
        if (end.zip64) {
            put32(out, end.zip64_signature);
            put64(out, end.zip64_length);
            put16(out, 0x031E);  // made by
            put16(out, 45);      // needs
            put32(out, end.zip64_disk);
            put32(out, end.zip64_directory_disk);
            put64(out, end.zip64_entries_here.value_or(entries.size()));
            put64(out, end.zip64_entries.value_or(entries.size()));
            put64(out, end.zip64_size.value_or(length));
            put64(out, end.zip64_offset.value_or(begin));
            put32(out, end.locator_signature);
            put32(out, end.locator_disk);
            put64(out, end.locator_offset.value_or(at));
            put32(out, end.locator_disks);
        }
        if (!end.classic) return;
        put32(out, end.signature);
        put16(out, end.disk);
        put16(out, end.directory_disk);
        put16(out, end.entries_here.value_or(static_cast<std::uint16_t>(entries.size())));
        put16(out, end.entries.value_or(static_cast<std::uint16_t>(entries.size())));
        put32(out, end.size.value_or(static_cast<std::uint32_t>(length)));
        put32(out, end.offset.value_or(static_cast<std::uint32_t>(begin)));
        put16(out, end.comment_length.value_or(static_cast<std::uint16_t>(end.comment.size())));
        out += end.comment;
    }
};

// ==== pickle =====================================================================================

// One method per opcode; `out` is the pickle so far.
struct PickleWriter {
    std::string out;
    std::uint32_t memo = 0;  // next free index of put()

    PickleWriter& raw(std::string_view s) {
        out += s;
        return *this;
    }
    PickleWriter& op(int code) {
        out += static_cast<char>(code);
        return *this;
    }
    PickleWriter& proto(int version) { return op(0x80).op(version); }
    PickleWriter& stop() { return op('.'); }
    PickleWriter& mark() { return op('('); }
    PickleWriter& none() { return op('N'); }
    PickleWriter& new_true() { return op(0x88); }
    PickleWriter& new_false() { return op(0x89); }
    PickleWriter& empty_tuple() { return op(')'); }
    PickleWriter& empty_dict() { return op('}'); }
    PickleWriter& empty_list() { return op(']'); }
    PickleWriter& tuple() { return op('t'); }
    PickleWriter& tuple1() { return op(0x85); }
    PickleWriter& tuple2() { return op(0x86); }
    PickleWriter& tuple3() { return op(0x87); }
    PickleWriter& reduce() { return op('R'); }
    PickleWriter& build() { return op('b'); }
    PickleWriter& binpersid() { return op('Q'); }
    PickleWriter& setitem() { return op('s'); }
    PickleWriter& setitems() { return op('u'); }
    PickleWriter& append() { return op('a'); }
    PickleWriter& appends() { return op('e'); }
    PickleWriter& stack_global() { return op(0x93); }
    PickleWriter& newobj() { return op(0x81); }
    PickleWriter& memoize() { return op(0x94); }
    PickleWriter& binint1(std::uint32_t x) { return op('K').op(static_cast<int>(x & 0xFF)); }
    PickleWriter& binint2(std::uint32_t x) {
        op('M');
        put16(out, x);
        return *this;
    }
    PickleWriter& binint(std::int32_t x) {
        op('J');
        put32(out, static_cast<std::uint32_t>(x));
        return *this;
    }
    PickleWriter& long1(std::string_view little_endian) {
        return op(0x8A).op(static_cast<int>(little_endian.size())).raw(little_endian);
    }
    // The shortest form, as Python's pickler picks it.
    PickleWriter& integer(std::int64_t x) {
        if (x >= 0 && x < 256) return binint1(static_cast<std::uint32_t>(x));
        if (x >= 0 && x < 65536) return binint2(static_cast<std::uint32_t>(x));
        if (x >= INT32_MIN && x <= INT32_MAX) return binint(static_cast<std::int32_t>(x));
        std::string bytes;
        put64(bytes, static_cast<std::uint64_t>(x));
        const char sign = x < 0 ? '\xFF' : '\0';
        while (bytes.size() > 1 && bytes.back() == sign &&
               ((bytes[bytes.size() - 2] ^ sign) & 0x80) == 0) {
            bytes.pop_back();
        }
        return long1(bytes);
    }
    PickleWriter& binfloat(double x) {
        const std::uint64_t bits = std::bit_cast<std::uint64_t>(x);
        op('G');
        for (int i = 7; i >= 0; --i) out += static_cast<char>(bits >> (8 * i) & 0xFF);
        return *this;
    }
    PickleWriter& unicode(std::string_view s) {
        op('X');
        put32(out, s.size());
        return raw(s);
    }
    PickleWriter& short_unicode(std::string_view s) {
        return op(0x8C).op(static_cast<int>(s.size())).raw(s);
    }
    PickleWriter& short_bytes(std::string_view s) {
        return op('C').op(static_cast<int>(s.size())).raw(s);
    }
    PickleWriter& binbytes(std::string_view s) {
        op('B');
        put32(out, s.size());
        return raw(s);
    }
    PickleWriter& global(std::string_view module, std::string_view name) {
        return op('c').raw(module).raw("\n").raw(name).raw("\n");
    }
    PickleWriter& binput(std::uint32_t i) { return op('q').op(static_cast<int>(i)); }
    PickleWriter& long_binput(std::uint32_t i) {
        op('r');
        put32(out, i);
        return *this;
    }
    PickleWriter& binget(std::uint32_t i) { return op('h').op(static_cast<int>(i)); }
    PickleWriter& long_binget(std::uint32_t i) {
        op('j');
        put32(out, i);
        return *this;
    }
    PickleWriter& put() {  // into the next free memo index
        const std::uint32_t i = memo++;
        return i < 256 ? binput(i) : long_binput(i);
    }
    PickleWriter& get(std::uint32_t i) { return i < 256 ? binget(i) : long_binget(i); }
    PickleWriter& frame(std::uint64_t length) {
        op(0x95);
        put64(out, length);
        return *this;
    }
};

// ==== state dict =================================================================================

using nanogpt::DType;

// A tensor as it will lie in the file: values already rounded to what dtype can hold.
struct NamedTensor {
    std::string name;
    std::vector<std::int64_t> shape;
    DType dtype = DType::f32;
    std::vector<float> values;
};

inline std::uint16_t to_bf16(float x) {  // nearest, ties to even
    const std::uint32_t bits = std::bit_cast<std::uint32_t>(x);
    return static_cast<std::uint16_t>((bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16);
}
inline float from_bf16(std::uint16_t x) {
    return std::bit_cast<float>(static_cast<std::uint32_t>(x) << 16);
}
// Normal numbers of half precision only; smaller ones become zero.
inline std::uint16_t to_f16(float x) {
    const std::uint32_t bits = std::bit_cast<std::uint32_t>(x);
    const std::uint32_t sign = bits >> 16 & 0x8000u;
    const std::uint32_t magnitude = (bits & 0x7FFFFFFFu) + 0x0FFFu + (bits >> 13 & 1u);
    if (magnitude < 0x38800000u) return static_cast<std::uint16_t>(sign);
    return static_cast<std::uint16_t>(sign | (magnitude - 0x38000000u) >> 13);
}
inline float from_f16(std::uint16_t x) {
    const std::uint32_t magnitude = x & 0x7FFFu;
    const std::uint32_t bits = magnitude == 0 ? 0 : (magnitude << 13) + 0x38000000u;
    return std::bit_cast<float>(bits | static_cast<std::uint32_t>(x & 0x8000u) << 16);
}

inline float round_to(DType dtype, float x) {
    if (dtype == DType::bf16) return from_bf16(to_bf16(x));
    if (dtype == DType::f16) return from_f16(to_f16(x));
    return x;
}

inline std::string tensor_bytes(const NamedTensor& t) {
    std::string out;
    for (const float x : t.values) {
        if (t.dtype == DType::bf16) put16(out, to_bf16(x));
        if (t.dtype == DType::f16) put16(out, to_f16(x));
        if (t.dtype == DType::f32) put32(out, std::bit_cast<std::uint32_t>(x));
        if (t.dtype == DType::f64) put64(out, std::bit_cast<std::uint64_t>(double{x}));
    }
    return out;
}

inline std::string_view storage_class(DType dtype) {
    switch (dtype) {
        case DType::f32:
            return "FloatStorage";
        case DType::bf16:
            return "BFloat16Storage";
        case DType::f16:
            return "HalfStorage";
        case DType::f64:
            return "DoubleStorage";
        case DType::i64:
            return "LongStorage";
        case DType::i32:
            return "IntStorage";
        case DType::i16:
            return "ShortStorage";
        case DType::i8:
            return "CharStorage";
        case DType::u8:
            return "ByteStorage";
        case DType::boolean:
            return "BoolStorage";
    }
    return "";
}

// Writes the pickle that torch.save makes of module.state_dict(): every string and tuple goes into
// the memo, repeated names come out of it, batches of 1000 items.
class StateDictPickle {
public:
    struct Options {
        std::string location = "cpu";
        bool plain_dict = false;             // a dict instead of an OrderedDict, without _metadata
        std::vector<std::string> modules{};  // names in _metadata, in order
    };

    static std::string write(std::span<const NamedTensor> tensors, const Options& options) {
        StateDictPickle self;
        self.all(tensors, options);
        return self.p_.out;
    }

private:
    void all(std::span<const NamedTensor> tensors, const Options& options) {
        p_.proto(2);
        if (options.plain_dict) {
            p_.empty_dict().put();
        } else {
            ordered_dict();
        }
        for (std::size_t i = 0; i < tensors.size(); ++i) {
            if (tensors.size() > 1 && i % 1000 == 0) p_.mark();
            once(tensors[i].name);
            tensor(tensors[i], std::to_string(i), options.location);
            if (tensors.size() > 1 && (i % 1000 == 999 || i + 1 == tensors.size())) p_.setitems();
        }
        if (tensors.size() == 1) p_.setitem();
        if (!options.plain_dict) metadata(options.modules);
        p_.stop();
    }

    void metadata(std::span<const std::string> modules) {
        p_.empty_dict().put();
        once("_metadata");
        ordered_dict();
        if (modules.size() > 1) p_.mark();
        for (const std::string& module : modules) {
            p_.unicode(module).put().empty_dict().put();
            once("version");
            p_.binint1(1).setitem();
        }
        if (modules.size() > 1) p_.setitems();
        if (modules.size() == 1) p_.setitem();
        p_.setitem().build();
    }

    void tensor(const NamedTensor& t, const std::string& key, const std::string& location) {
        std::int64_t numel = 1;
        for (const std::int64_t n : t.shape) numel *= n;
        named("torch._utils", "_rebuild_tensor_v2");
        p_.mark().mark();
        once("storage");
        named("torch", std::string(storage_class(t.dtype)));
        p_.unicode(key).put();
        if (location == "cpu") {
            once(location);
        } else {  // made anew by torch for every tensor, so the memo does not know it
            p_.unicode(location).put();
        }
        p_.integer(numel).tuple().put().binpersid().integer(0);
        std::vector<std::int64_t> strides(t.shape.size(), 1);
        for (std::size_t i = strides.size(); i-- > 1;) strides[i - 1] = strides[i] * t.shape[i];
        integers(t.shape);
        integers(strides);
        p_.new_false();
        ordered_dict();
        p_.tuple().put().reduce().put();
    }

    void integers(std::span<const std::int64_t> xs) {
        if (xs.empty()) {
            p_.empty_tuple();
            return;
        }
        if (xs.size() > 3) p_.mark();
        for (const std::int64_t x : xs) p_.integer(x);
        if (xs.size() > 3) p_.tuple().put();
        if (xs.size() <= 3) p_.op(0x84 + static_cast<int>(xs.size())).put();
    }

    void ordered_dict() {
        named("collections", "OrderedDict");
        p_.empty_tuple().reduce().put();
    }

    // A global or string: written and put into the memo the first time, taken from there later.
    void named(const std::string& module, const std::string& name) {
        if (!known(module + " " + name)) p_.global(module, name).put();
    }
    void once(const std::string& text) {
        if (!known(text)) p_.unicode(text).put();
    }
    bool known(const std::string& text) {
        for (const auto& [name, index] : memo_) {
            if (name != text) continue;
            p_.get(index);
            return true;
        }
        memo_.emplace_back(text, p_.memo);
        return false;
    }

    PickleWriter p_;
    std::vector<std::pair<std::string, std::uint32_t>> memo_;
};

// Names of the modules that hold these parameters, in the order of module.state_dict()'s _metadata.
inline std::vector<std::string> modules_of(std::span<const NamedTensor> tensors) {
    std::vector<std::string> out{""};
    for (const NamedTensor& t : tensors) {
        for (std::size_t dot = t.name.find('.'); dot != std::string::npos;
             dot = t.name.find('.', dot + 1)) {
            const std::string module = t.name.substr(0, dot);
            if (std::find(out.begin(), out.end(), module) == out.end()) out.push_back(module);
        }
    }
    return out;
}

// The records of a file of torch 2.6 or later, around a pickle and the storages data/0, data/1, ...
inline ZipWriter torch_zip(const std::string& stem, std::string pickle,
                           std::vector<std::string> storages) {
    ZipWriter zip;
    zip.add(stem + "/data.pkl", std::move(pickle));
    zip.add(stem + "/.format_version", "1");
    zip.add(stem + "/.storage_alignment", "64");
    zip.add(stem + "/byteorder", "little");
    for (std::size_t i = 0; i < storages.size(); ++i) {
        zip.add(stem + "/data/" + std::to_string(i), std::move(storages[i]));
    }
    zip.add(stem + "/version", "3\n");
    zip.add(stem + "/.data/serialization_id", "1518876940331354893300028853039917577246");
    return zip;
}

inline ZipWriter state_dict_zip(const std::string& stem, std::span<const NamedTensor> tensors,
                                StateDictPickle::Options options = {}) {
    if (options.modules.empty()) options.modules = modules_of(tensors);
    std::vector<std::string> storages;
    for (const NamedTensor& t : tensors) storages.push_back(tensor_bytes(t));
    return torch_zip(stem, StateDictPickle::write(tensors, options), std::move(storages));
}

inline void write_state_dict(const fs::path& file, std::span<const NamedTensor> tensors,
                             const StateDictPickle::Options& options = {}) {
    write_file(file, state_dict_zip(file.stem().string(), tensors, options).bytes());
}

// ==== tokenizer ==================================================================================

inline const std::vector<std::string>& special_names() {
    static const std::vector<std::string> names{
        "<|bos|>",           "<|user_start|>",   "<|user_end|>",   "<|assistant_start|>",
        "<|assistant_end|>", "<|python_start|>", "<|python_end|>", "<|output_start|>",
        "<|output_end|>"};
    return names;
}

struct TokenizerSpec {
    std::string name = "rustbpe";
    std::string pattern =
        "'(?i:[sdmt]|ll|ve|re)|[^\\r\\n\\p{L}\\p{N}]?+\\p{L}+|\\p{N}{1,2}| "
        "?[^\\s\\p{L}\\p{N}]++[\\r\\n]*|\\s*[\\r\\n]|\\s+(?!\\S)|\\s+";
    std::vector<std::pair<std::string, std::int64_t>> ranks;     // bytes, id
    std::vector<std::pair<std::string, std::int64_t>> specials;  // name, id
};

// 256 single bytes, then pairs and triples of frequent letters, then the nine special tokens:
// vocab_size ids in all, at least 265 and at most 4617.
inline TokenizerSpec make_tokenizer(int vocab_size) {
    constexpr std::string_view kLetters = " etaoinshrdlcumw";
    TokenizerSpec spec;
    const int ordinary = vocab_size - static_cast<int>(special_names().size());
    for (int id = 0; id < ordinary; ++id) {
        const std::size_t n = static_cast<std::size_t>(id < 256 ? 0 : id - 256);
        std::string piece(1, static_cast<char>(id));
        if (n < 256 && id >= 256) piece = {kLetters[n / 16], kLetters[n % 16]};
        if (n >= 256) {
            piece = {kLetters[(n - 256) / 256], kLetters[(n - 256) / 16 % 16], kLetters[n % 16]};
        }
        spec.ranks.emplace_back(piece, id);
    }
    std::int64_t id = ordinary;
    for (const std::string& name : special_names()) spec.specials.emplace_back(name, id++);
    return spec;
}

// What pickle.dump(encoding, protocol=4) writes, without the frame.
inline std::string tokenizer_pickle_body(const TokenizerSpec& spec) {
    PickleWriter p;
    const auto text = [&](std::string_view s) {
        s.size() < 256 ? p.short_unicode(s) : p.unicode(s);
        p.memoize();
    };
    text("tiktoken.core");
    text("Encoding");
    p.stack_global().memoize().empty_tuple().newobj().memoize().empty_dict().memoize().mark();
    text("name");
    text(spec.name);
    text("pat_str");
    text(spec.pattern);
    text("mergeable_ranks");
    p.empty_dict().memoize();
    for (std::size_t i = 0; i < spec.ranks.size(); ++i) {
        if (i % 1000 == 0) p.mark();
        const std::string& piece = spec.ranks[i].first;
        piece.size() < 256 ? p.short_bytes(piece) : p.binbytes(piece);
        p.memoize().integer(spec.ranks[i].second);
        if (i % 1000 == 999 || i + 1 == spec.ranks.size()) p.setitems();
    }
    text("special_tokens");
    p.empty_dict().memoize().mark();
    for (const auto& [name, id] : spec.specials) {
        text(name);
        p.integer(id);
    }
    p.setitems().setitems().build().stop();
    return p.out;
}

// In one frame, whatever its length: readers skip frame headers.
inline std::string tokenizer_pickle(const TokenizerSpec& spec) {
    const std::string body = tokenizer_pickle_body(spec);
    return PickleWriter().proto(4).frame(body.size()).raw(body).out;
}

inline void write_tokenizer(const fs::path& file, const TokenizerSpec& spec) {
    write_file(file, tokenizer_pickle(spec));
}

// ==== checkpoints ================================================================================

enum class Gen : std::uint8_t { g0, g0p, g1, g2, g2e, g3, g4 };  // g0p: g0 with padded rows
inline constexpr Gen kAllGenerations[] = {Gen::g0,  Gen::g0p, Gen::g1, Gen::g2,
                                          Gen::g2e, Gen::g3,  Gen::g4};

inline const char* name_of(Gen gen) {
    constexpr const char* kNames[] = {"G0", "G0p", "G1", "G2", "G2e", "G3", "G4"};
    return kNames[static_cast<std::size_t>(gen)];
}

inline nanogpt::Generation generation_of(Gen gen) {
    using nanogpt::Generation;
    constexpr Generation kOf[] = {Generation::g0,  Generation::g0, Generation::g1, Generation::g2,
                                  Generation::g2e, Generation::g3, Generation::g4};
    return kOf[static_cast<std::size_t>(gen)];
}

// model_config of a metadata file.
struct Shape {
    int sequence_len = 64;
    int vocab_size = 512;
    int n_layer = 2;
    int n_head = 4;
    int n_kv_head = 2;
    int n_embd = 64;
    std::string window_pattern = "SL";
};
inline const Shape kTiny{};
inline const Shape kMicro{32, 320, 1, 2, 1, 16, "L"};       // too narrow for G2 and G4
inline const Shape kGolden{1024, 70, 4, 4, 2, 32, "SSSL"};  // section 3 of the specification

enum class Save : std::uint8_t { f32, bf16, f16, trained };  // trained: bf16 embeddings, rest f32

using Fill = std::function<void(std::string_view name, std::span<float> values)>;

// The specification's formula: a hash of name and index gives u in [-0.5, 0.5).
inline float golden_unit(std::uint32_t name_hash, std::uint32_t n) {
    std::uint32_t h = name_hash ^ n * 0x9E3779B1u;
    h ^= h >> 16;
    h *= 0x7FEB352Du;
    h ^= h >> 15;
    h *= 0x846CA68Bu;
    h ^= h >> 16;
    return static_cast<float>(h >> 8) * 0x1p-24f - 0.5f;
}

inline std::uint32_t fnv1a(std::string_view name) {
    std::uint32_t h = 2166136261u;
    for (const char c : name) h = (h ^ static_cast<unsigned char>(c)) * 16777619u;
    return h;
}

inline void golden_fill(std::string_view name, std::span<float> values) {
    float scale = 0.5f, bias = 0;
    if (name == "transformer.wte.weight" || name == "lm_head.weight") scale = 2.0f;
    if (name == "resid_lambdas") scale = 0.25f, bias = 1.0f;
    if (name == "x0_lambdas" || name == "bigram_lambdas") scale = 0.25f, bias = 0.25f;
    if (name == "smear_lambda") scale = 0, bias = 0.5f;
    if (name == "backout_lambda") scale = 0, bias = 0.25f;
    if (contains(name, "ve_gate") || contains(name, "smear_gate") || contains(name, "embeds.") ||
        contains(name, "bigram_embed")) {
        scale = 1.0f;
    }
    const std::uint32_t h = fnv1a(name);
    for (std::size_t n = 0; n < values.size(); ++n) {
        values[n] = golden_unit(h, static_cast<std::uint32_t>(n)) * scale + bias;
    }
}

inline int padded_rows(Gen gen, int vocab_size) {
    return gen == Gen::g0 ? vocab_size : (vocab_size + 63) / 64 * 64;
}

// Every tensor of a generation, in state_dict order, filled and rounded to the dtype it is saved in.
inline std::vector<NamedTensor> make_weights(Gen gen, const Shape& s, Save save = Save::f32,
                                             const Fill& fill = golden_fill) {
    std::vector<NamedTensor> out;
    const std::int64_t L = s.n_layer, D = s.n_embd, V = s.vocab_size;
    const std::int64_t rows = padded_rows(gen, s.vocab_size);
    const std::int64_t kv = D / s.n_head * s.n_kv_head;
    const auto add = [&](const std::string& name, std::vector<std::int64_t> shape, bool lookup) {
        NamedTensor t{name, std::move(shape), DType::f32, {}};
        if (save == Save::bf16 || (save == Save::trained && lookup)) t.dtype = DType::bf16;
        if (save == Save::f16) t.dtype = DType::f16;
        std::size_t count = 1;
        for (const std::int64_t n : t.shape) count *= static_cast<std::size_t>(n);
        t.values.resize(count);
        fill(name, t.values);
        for (float& x : t.values) x = round_to(t.dtype, x);
        out.push_back(std::move(t));
    };
    const auto has_value_embed = [&](std::int64_t i) {
        return gen >= Gen::g2 && i % 2 == (L - 1) % 2;
    };
    if (gen >= Gen::g1) add("resid_lambdas", {L}, false);
    if (gen >= Gen::g1) add("x0_lambdas", {L}, false);
    if (gen == Gen::g2e) add("bigram_lambdas", {L}, false);
    if (gen == Gen::g4) add("smear_lambda", {1}, false);
    if (gen == Gen::g4) add("backout_lambda", {1}, false);
    add("transformer.wte.weight", {rows, D}, true);
    for (std::int64_t i = 0; i < L; ++i) {
        const std::string h = "transformer.h." + std::to_string(i) + ".";
        add(h + "attn.c_q.weight", {D, D}, false);
        add(h + "attn.c_k.weight", {kv, D}, false);
        add(h + "attn.c_v.weight", {kv, D}, false);
        add(h + "attn.c_proj.weight", {D, D}, false);
        const std::int64_t gate = gen >= Gen::g3 ? 12 : 32;
        if (has_value_embed(i)) add(h + "attn.ve_gate.weight", {s.n_kv_head, gate}, false);
        add(h + "mlp.c_fc.weight", {4 * D, D}, false);
        add(h + "mlp.c_proj.weight", {D, 4 * D}, false);
    }
    add("lm_head.weight", {rows, D}, false);
    if (gen == Gen::g4) add("smear_gate.weight", {1, 24}, false);
    if (gen == Gen::g2e) add("bigram_embed.embed.weight", {5 * V, D}, true);
    for (std::int64_t i = 0; i < L; ++i) {
        if (has_value_embed(i))
            add("value_embeds." + std::to_string(i) + ".weight", {rows, kv}, true);
    }
    return out;
}

// The metadata text. G0 has no window_pattern; `extra` is put in front of model_config verbatim.
inline std::string meta_json(Gen gen, const Shape& s, std::int64_t step,
                             const std::string& extra = "\"val_bpb\": 1.25,") {
    const auto field = [](const char* key, int value) {
        return "    \"" + std::string(key) + "\": " + std::to_string(value) + ",\n";
    };
    std::string out = "{\n  \"step\": " + std::to_string(step) + ",\n  " + extra +
                      "\n  \"model_config\": {\n" + field("sequence_len", s.sequence_len) +
                      field("vocab_size", s.vocab_size) + field("n_layer", s.n_layer) +
                      field("n_head", s.n_head) + field("n_kv_head", s.n_kv_head) +
                      "    \"n_embd\": " + std::to_string(s.n_embd);
    if (gen >= Gen::g1) out += ",\n    \"window_pattern\": \"" + s.window_pattern + "\"";
    return out + "\n  }\n}";
}

inline void write_meta(const fs::path& file, Gen gen, const Shape& s, std::int64_t step,
                       const std::string& extra = "\"val_bpb\": 1.25,") {
    write_file(file, meta_json(gen, s, step, extra));
}

struct CheckpointSpec {
    Gen gen = Gen::g4;
    Shape shape = kTiny;
    Save save = Save::f32;
    std::string prefix = "";  // before every tensor name, as "_orig_mod."
    std::string directory = "base_checkpoints";
    std::string tag = "d2";
    std::int64_t step = 200;
    Fill fill = golden_fill;
    bool tokenizer = true;  // where the vocabulary is large enough for one
};

inline std::string step_name(const char* kind, std::int64_t step, const char* ending) {
    char text[64];
    std::snprintf(text, sizeof text, "%s_%06lld%s", kind, static_cast<long long>(step), ending);
    return text;
}

// Writes model, metadata and tokenizer as a nanochat base directory; returns the model's directory.
inline fs::path make_checkpoint(const fs::path& base, const CheckpointSpec& spec) {
    const fs::path dir = base / spec.directory / spec.tag;
    std::vector<NamedTensor> tensors = make_weights(spec.gen, spec.shape, spec.save, spec.fill);
    for (NamedTensor& t : tensors) t.name = spec.prefix + t.name;
    write_state_dict(dir / step_name("model", spec.step, ".pt"), tensors);
    write_meta(dir / step_name("meta", spec.step, ".json"), spec.gen, spec.shape, spec.step);
    if (spec.tokenizer && spec.shape.vocab_size >= 265) {
        write_tokenizer(base / "tokenizer" / "tokenizer.pkl",
                        make_tokenizer(spec.shape.vocab_size));
    }
    return dir;
}

inline fs::path make_checkpoint(const fs::path& base, Gen gen, const Shape& shape,
                                Save save = Save::f32, const std::string& prefix = "",
                                const Fill& fill = golden_fill) {
    CheckpointSpec spec;
    spec.gen = gen;
    spec.shape = shape;
    spec.save = save;
    spec.prefix = prefix;
    spec.fill = fill;
    return make_checkpoint(base, spec);
}

// The input of the specification's golden vectors.
inline std::vector<nanogpt::Token> golden_ids(int T) {
    std::vector<nanogpt::Token> ids;
    for (int t = 0; t < T; ++t) ids.push_back((7 * t * t + 13 * t + 5) % 70);
    return ids;
}

inline int argmax(std::span<const float> x) {  // the lowest index of the largest value
    return static_cast<int>(std::max_element(x.begin(), x.end()) - x.begin());
}

}  // namespace test
