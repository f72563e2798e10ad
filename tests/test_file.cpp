// Files: regular ones only, read by position, and watched for changes.
#include <sys/stat.h>  // mkfifo

#include "helpers.hpp"

using namespace test;
using nanogpt::Error;
using nanogpt::ErrorKind;
using nanogpt::File;

namespace {

std::string read_part(const File& file, std::uint64_t offset, std::size_t n) {
    std::vector<std::byte> bytes(n);
    file.read(offset, bytes);
    return std::string(nanogpt::detail::as_text(bytes));
}

ErrorKind kind_of(const std::function<void()>& f) {
    try {
        f();
    } catch (const Error& e) {
        return e.kind;
    }
    return ErrorKind::device;  // never thrown here
}

}  // namespace

TEST_CASE("file: parts are read by position, and nothing past the end") {
    TempDir dir;
    write_file(dir / "a", "0123456789");
    const File file(dir / "a");
    CHECK(file.size() == 10);
    CHECK(read_part(file, 0, 10) == "0123456789");
    CHECK(read_part(file, 3, 4) == "3456");
    CHECK(read_part(file, 10, 0) == "");
    for (const auto& [offset, n] : {std::pair{std::uint64_t{0}, std::size_t{11}},
                                    {9, 2},
                                    {10, 1},
                                    {11, 0},
                                    {UINT64_MAX, 1}}) {
        CHECK(contains(error_of([&, o = offset, m = n] { read_part(file, o, m); }),
                       "ends at byte 10"));
    }
}

TEST_CASE("file: what is missing is not_found, what is no regular file is refused") {
    TempDir dir;
    write_file(dir / "a", "x");
    REQUIRE(::mkfifo((dir / "fifo").c_str(), 0600) == 0);
    fs::create_symlink("loop", dir / "loop");
    fs::create_symlink("a", dir / "link");
    CHECK(kind_of([&] { File(dir / "none"); }) == ErrorKind::not_found);
    CHECK(kind_of([&] { File(dir / "a/b"); }) == ErrorKind::not_found);
    CHECK(kind_of([&] { File(dir.path()); }) == ErrorKind::refused);
    CHECK(kind_of([&] { File(dir / "fifo"); }) == ErrorKind::refused);
    CHECK(kind_of([&] { File(dir / "loop"); }) == ErrorKind::refused);
    CHECK(kind_of([&] { File("/dev/zero"); }) == ErrorKind::refused);
    CHECK(kind_of([&] { File(std::string(5000, 'a')); }) == ErrorKind::refused);
    CHECK(File(dir / "link").size() == 1);
}

TEST_CASE("file: a change of size or time is seen, and a cut while reading is an Error") {
    TempDir dir;
    write_file(dir / "a", std::string(1000, 'a'));
    const File file(dir / "a");
    CHECK(file.unchanged());
    fs::resize_file(dir / "a", 500);
    CHECK(!file.unchanged());
    CHECK(file.size() == 1000);
    CHECK(contains(error_of([&] { read_part(file, 0, 1000); }), "cut short"));
    CHECK(read_part(file, 0, 500).size() == 500);
}

TEST_CASE("file: moving a File moves its descriptor") {
    TempDir dir;
    write_file(dir / "a", "abc");
    File first(dir / "a");
    const File second(std::move(first));
    CHECK(read_part(second, 1, 2) == "bc");
}

TEST_CASE("file: a small file is read whole, a larger one refused with both sizes") {
    TempDir dir;
    write_file(dir / "a", "abc");
    CHECK(nanogpt::detail::as_text(nanogpt::detail::read_file(dir / "a", 3)) == "abc");
    const std::string why = error_of([&] { nanogpt::detail::read_file(dir / "a", 2); });
    CHECK(contains(why, "3 bytes"));
    CHECK(contains(why, "at most 2"));
    write_file(dir / "empty", "");
    CHECK(nanogpt::detail::read_file(dir / "empty", 10).empty());
}

TEST_CASE("file: numbers are read low byte first") {
    const std::string s = "\x01\x02\x03\x04\x05\x06\x07\x88";
    using nanogpt::detail::little_endian;
    CHECK(little_endian<2>(bytes_of(s), 1) == 0x0302);
    CHECK(little_endian<4>(bytes_of(s), 0) == 0x04030201);
    CHECK(little_endian<8>(bytes_of(s), 0) == 0x8807060504030201u);
}
