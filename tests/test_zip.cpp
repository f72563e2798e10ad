// The container of torch.save: what is read from it, and the lies that are refused (group A1).
#include "helpers.hpp"

using namespace test;
using nanogpt::detail::ZipFile;

namespace {

ZipWriter good_zip() {
    const std::vector<NamedTensor> tensors{
        {"a", {2, 3}, DType::f32, {1, 2, 3, 4, 5, 6}},
        {"b", {4}, DType::bf16, {1, -1, 0.5f, 2}},
        {"c", {1}, DType::f32, {7}},
    };
    return state_dict_zip("model_000010", tensors);
}

// Opens the archive and reads every entry with its checksum; returns the bytes of all of them.
std::string read_all(const fs::path& file) {
    const ZipFile zip{nanogpt::File(file)};
    std::string out;
    for (const auto& entry : zip.entries()) {
        out += nanogpt::detail::as_text(zip.read(entry, 1 << 20));
    }
    return out;
}

struct BadZip {
    std::string name;
    std::function<std::string(ZipWriter)> make;
    std::string reason;  // must be part of the message
};

// A zip64 extra field of the directory with these values.
std::string zip64_field(std::initializer_list<std::uint64_t> values, std::size_t length) {
    std::string out;
    put16(out, 1);
    put16(out, length);
    for (const std::uint64_t v : values) put64(out, v);
    return out;
}

std::vector<BadZip> not_archives() {
    const auto text = [](std::string_view s) {
        return [s](const ZipWriter&) { return std::string(s) + std::string(64, ' '); };
    };
    return {
        {"an empty file", [](ZipWriter) { return std::string(); }, "is empty"},
        {"one byte", [](ZipWriter) { return std::string("P"); }, "no zip end record"},
        {"zeros", [](ZipWriter) { return std::string(4096, '\0'); }, "no zip end record"},
        {"plain text", text("Hello, this is no checkpoint at all."), "not a file of torch.save"},
        {"a GGUF file", text("GGUF\x03"), "GGUF"},
        {"a Git LFS pointer", text("version https://git-lfs.github.com/spec/v1\n"), "git lfs pull"},
        {"a web page", text("<html><body>404"), "web page"},
        {"a web page in capitals", text("<!DOCTYPE html>"), "web page"},
        {"a JSON file", text("{\"weight\": 1}"), "JSON"},
        {"a safetensors file", text("1234567x{\"a\":1}"), "safetensors"},
        {"legacy torch",
         text("\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19.\x80\x02M\xe9\x03."),
         "very old PyTorch"},
        {"the first 100 bytes", [](const ZipWriter& z) { return z.bytes().substr(0, 100); },
         "cut off"},
        {"without the last byte",
         [](const ZipWriter& z) {
             const std::string b = z.bytes();
             return b.substr(0, b.size() - 1);
         },
         "still being written"},
        {"without the end record",
         [](ZipWriter z) {
             z.end.classic = false;
             return z.bytes();
         },
         "no zip end record"},
        {"without directory and end records",
         [](const ZipWriter& z) {
             const std::string b = z.bytes();
             return b.substr(0, b.find("PK\x01\x02"));
         },
         "no zip end record"},
        {"the end signature is wrong",
         [](ZipWriter z) {
             z.end.signature ^= 1;
             return z.bytes();
         },
         "no zip end record"},
    };
}

std::vector<BadZip> bad_ends() {
    // Saturates a field of the classic record, so that the zip64 one counts.
    return {
        {"junk after the end",
         [](ZipWriter z) {
             z.suffix = "junk";
             return z.bytes();
         },
         "no zip end record"},
        {"a comment",
         [](ZipWriter z) {
             z.end.comment = "hi";
             return z.bytes();
         },
         "no zip end record"},
        {"a comment length without a comment",
         [](ZipWriter z) {
             z.end.comment_length = 5;
             return z.bytes();
         },
         "comment"},
        {"a second end record in the comment",
         [](ZipWriter z) {
             ZipWriter other = good_zip();
             other.end.zip64 = false;
             const std::string b = other.bytes();
             z.end.comment = b.substr(b.size() - 22);
             return z.bytes();
         },
         "does not end where the end record begins"},
        {"two end records",
         [](const ZipWriter& z) {
             const std::string b = z.bytes();
             return b + b.substr(b.size() - 22);
         },
         "does not end where the end record begins"},
        {"this disk is not the first",
         [](ZipWriter z) {
             z.end.disk = 1;
             return z.bytes();
         },
         "several disks"},
        {"the directory is on another disk",
         [](ZipWriter z) {
             z.end.directory_disk = 3;
             return z.bytes();
         },
         "several disks"},
        {"fewer entries on this disk",
         [](ZipWriter z) {
             z.end.entries_here = 1;
             return z.bytes();
         },
         "entry counts disagree"},
        {"one entry too many",
         [](ZipWriter z) {
             const std::size_t n = z.entries.size() + 1;
             z.end.zip64_entries = z.end.zip64_entries_here = n;
             z.end.entries = z.end.entries_here = static_cast<std::uint16_t>(n);
             return z.bytes();
         },
         "cut off or malformed"},
        {"one entry too few",
         [](ZipWriter z) {
             const std::size_t n = z.entries.size() - 1;
             z.end.zip64_entries = z.end.zip64_entries_here = n;
             z.end.entries = z.end.entries_here = static_cast<std::uint16_t>(n);
             return z.bytes();
         },
         "holds more than its entries"},
        {"1,000 entries in a directory of a few hundred bytes",
         [](ZipWriter z) {
             z.end.zip64_entries = z.end.zip64_entries_here = 1000;
             z.end.entries = z.end.entries_here = 1000;
             return z.bytes();
         },
         "too small for its entry count"},
        {"10^18 entries",
         [](ZipWriter z) {
             z.end.zip64_entries = z.end.zip64_entries_here = 1000000000000000000u;
             z.end.entries = z.end.entries_here = 0xFFFF;
             return z.bytes();
         },
         "65,536 entries"},
        {"a directory of 17 MiB",
         [](ZipWriter z) {
             z.end.zip64_size = 17u << 20;
             z.end.size = 0xFFFFFFFF;
             return z.bytes();
         },
         "larger than 16 MiB"},
        {"a directory that begins past 64 bits",
         [](ZipWriter z) {
             z.end.zip64_offset = UINT64_MAX - 3;
             z.end.offset = 0xFFFFFFFF;
             return z.bytes();
         },
         "64 bits"},
        {"a directory one byte further on",
         [](ZipWriter z) {
             z.end.zip64_offset = z.bytes().find("PK\x01\x02") + 1;
             z.end.offset = 0xFFFFFFFF;
             return z.bytes();
         },
         "does not end where the end record begins"},
        {"a directory one byte longer",
         [](ZipWriter z) {
             const std::string b = z.bytes();
             z.end.zip64_size = b.find("PK\x06\x06") - b.find("PK\x01\x02") + 1;
             z.end.size = 0xFFFFFFFF;
             return z.bytes();
         },
         "does not end where the end record begins"},
        {"the two end records disagree about the count",
         [](ZipWriter z) {
             z.end.zip64_entries = z.end.zip64_entries_here = 3;
             return z.bytes();
         },
         "end records disagree"},
        {"the two end records disagree about the offset",
         [](ZipWriter z) {
             z.end.offset = 64;
             return z.bytes();
         },
         "end records disagree"},
        {"the two end records disagree about the size",
         [](ZipWriter z) {
             z.end.size = 64;
             return z.bytes();
         },
         "end records disagree"},
        {"bytes between directory and end",
         [](ZipWriter z) {
             z.end.zip64 = false;
             const std::string b = z.bytes();
             return b.substr(0, b.size() - 22) + "xx" + b.substr(b.size() - 22);
         },
         "does not end where the end record begins"},
    };
}

std::vector<BadZip> bad_zip64_ends() {
    return {
        {"the locator's disk",
         [](ZipWriter z) {
             z.end.locator_disk = 1;
             return z.bytes();
         },
         "locator speaks of several disks"},
        {"the locator's number of disks",
         [](ZipWriter z) {
             z.end.locator_disks = 2;
             return z.bytes();
         },
         "locator speaks of several disks"},
        {"the locator points elsewhere",
         [](ZipWriter z) {
             z.end.locator_offset = 0;
             return z.bytes();
         },
         "not before its locator"},
        {"the locator points past 64 bits",
         [](ZipWriter z) {
             z.end.locator_offset = UINT64_MAX;
             return z.bytes();
         },
         "not before its locator"},
        {"the locator's signature",
         [](ZipWriter z) {
             z.end.locator_signature ^= 1;
             return z.bytes();
         },
         "does not end where the end record begins"},
        {"the zip64 record's signature",
         [](ZipWriter z) {
             z.end.zip64_signature ^= 1;
             return z.bytes();
         },
         "zip64 end record is malformed"},
        {"the zip64 record's length",
         [](ZipWriter z) {
             z.end.zip64_length = 1u << 30;
             return z.bytes();
         },
         "zip64 end record is malformed"},
        {"the zip64 record's disk",
         [](ZipWriter z) {
             z.end.zip64_disk = 1;
             return z.bytes();
         },
         "zip64 end record speaks of several disks"},
        {"the zip64 directory's disk",
         [](ZipWriter z) {
             z.end.zip64_directory_disk = 1;
             return z.bytes();
         },
         "zip64 end record speaks of several disks"},
        {"the zip64 count on this disk",
         [](ZipWriter z) {
             z.end.zip64_entries_here = 1;
             return z.bytes();
         },
         "entry counts disagree"},
        {"a locator with nothing before it",
         [](const ZipWriter& z) {
             const std::string b = z.bytes();
             return b.substr(b.size() - 42);
         },
         "not before its locator"},
    };
}

// Changes one entry of the good archive.
BadZip entry_case(const std::string& name, std::function<void(ZipEntry&)> change,
                  const std::string& reason) {
    return {name,
            [change = std::move(change)](ZipWriter z) {
                change(z["data/1"]);
                return z.bytes();
            },
            reason};
}

std::vector<BadZip> bad_entries() {
    return {
        entry_case(
            "directory signature", [](ZipEntry& e) { e.central_signature ^= 1; },
            "cut off or malformed"),
        entry_case(
            "name longer than the directory", [](ZipEntry& e) { e.name_length = 60000; },
            "directory entry is cut off"),
        entry_case(
            "extra longer than the directory", [](ZipEntry& e) { e.extra_length = 60000; },
            "directory entry is cut off"),
        entry_case(
            "comment longer than the directory", [](ZipEntry& e) { e.comment_length = 60000; },
            "directory entry is cut off"),
        entry_case(
            "encrypted", [](ZipEntry& e) { e.flags = 0x0809; }, "is encrypted"),
        entry_case(
            "strongly encrypted", [](ZipEntry& e) { e.flags = 0x0848; }, "is encrypted"),
        entry_case(
            "masked headers", [](ZipEntry& e) { e.flags = 0x2808; }, "unknown flags"),
        entry_case(
            "deflated", [](ZipEntry& e) { e.method = 8; }, "is compressed"),
        entry_case(
            "a deflate bomb",
            [](ZipEntry& e) {
                e.method = 8;
                e.size = 0xFFFFFFF0;
            },
            "is compressed"),
        entry_case(
            "bzip2", [](ZipEntry& e) { e.method = 12; }, "is compressed"),
        entry_case(
            "AES", [](ZipEntry& e) { e.method = 99; }, "is compressed"),
        entry_case(
            "deflated in the local header only", [](ZipEntry& e) { e.local_method = 8; },
            "in its local header"),
        entry_case(
            "encrypted in the local header only", [](ZipEntry& e) { e.local_flags = 9; },
            "in its local header"),
        entry_case(
            "on another disk", [](ZipEntry& e) { e.disk = 1; }, "another disk"),
        entry_case(
            "stored size differs", [](ZipEntry& e) { e.stored = 4; }, "two different sizes"),
        entry_case(
            "size differs", [](ZipEntry& e) { e.size = 9; }, "two different sizes"),
        entry_case(
            "larger than the file", [](ZipEntry& e) { e.size = e.stored = 0x7FFFFFFF; },
            "outside the file"),
        entry_case(
            "reaches into the next", [](ZipEntry& e) { e.size = e.stored = 60; }, "overlap"),
        entry_case(
            "one byte too long", [](ZipEntry& e) { e.size = e.stored = 9; }, "checksum"),
        entry_case(
            "one byte too short", [](ZipEntry& e) { e.size = e.stored = 7; }, "checksum"),
        entry_case(
            "begins outside the file", [](ZipEntry& e) { e.offset = 0x7FFFFFFF; },
            "outside the file"),
        entry_case(
            "begins in the middle of another", [](ZipEntry& e) { e.offset = 17; },
            "no local header"),
        entry_case(
            "saturated sizes without a zip64 field",
            [](ZipEntry& e) { e.size = e.stored = 0xFFFFFFFF; }, "outside the file"),
        entry_case(
            "zip64 field cut off",
            [](ZipEntry& e) {
                e.size = e.stored = 0xFFFFFFFF;
                e.extra = zip64_field({8}, 8);
            },
            "zip64 field"),
        entry_case(
            "zip64 size past the file",
            [](ZipEntry& e) {
                e.size = e.stored = 0xFFFFFFFF;
                e.extra = zip64_field({UINT64_MAX, UINT64_MAX}, 16);
            },
            "outside the file"),
        entry_case(
            "zip64 sizes differ",
            [](ZipEntry& e) {
                e.size = e.stored = 0xFFFFFFFF;
                e.extra = zip64_field({8, 9}, 16);
            },
            "two different sizes"),
        entry_case(
            "zip64 offset past 64 bits",
            [](ZipEntry& e) {
                e.offset = 0xFFFFFFFF;
                e.extra = zip64_field({UINT64_MAX - 10}, 8);
            },
            "outside the file"),
        entry_case(
            "extra field longer than the extra",
            [](ZipEntry& e) { e.extra = zip64_field({}, 100); }, "malformed"),
        entry_case(
            "three bytes of extra", [](ZipEntry& e) { e.extra = "abc"; }, "malformed"),
        entry_case(
            "local signature", [](ZipEntry& e) { e.local_signature ^= 0x100; }, "no local header"),
        entry_case(
            "local name differs", [](ZipEntry& e) { e.local_name = "model_000010/data/7"; },
            "another name"),
        entry_case(
            "local name shorter", [](ZipEntry& e) { e.local_name_length = 3; }, "another name"),
        entry_case(
            "local extra past the file", [](ZipEntry& e) { e.local_extra_length = 65535; },
            "outside the file"),
        entry_case(
            "local sizes differ", [](ZipEntry& e) { e.local_size = e.local_stored = 1000; },
            "other sizes"),
        entry_case(
            "checksum wrong", [](ZipEntry& e) { e.crc = 0x12345678; }, "checksum"),
    };
}

std::vector<BadZip> bad_names() {
    std::vector<BadZip> out;
    const std::string names[] = {
        "",           "/etc/passwd", "../data/1",      "m/../../data/1",
        "m/..",       "..",          "m\\data\\1",     std::string("m/data/1\0x", 10),
        "m/\xFF\xFE", "m/\xC0\xAF",  "m/\xED\xA0\x80", std::string(513, 'n'),
    };
    static const char* const kLabels[] = {
        "empty",     "absolute", "parent first", "parent inside",  "parent last", "parent alone",
        "backslash", "NUL",      "not UTF-8",    "overlong UTF-8", "surrogate",   "513 bytes"};
    for (std::size_t i = 0; i < std::size(names); ++i) {
        out.push_back(entry_case(
            kLabels[i], [name = names[i]](ZipEntry& e) { e.name = name; }, "is not accepted"));
    }
    return out;
}

std::vector<BadZip> bad_archives() {
    return {
        {"two entries of one name",
         [](ZipWriter z) {
             z["data/1"].name = z["data/0"].name;
             return z.bytes();
         },
         "two entries are called"},
        {"two names for one entry",
         [](ZipWriter z) {
             z["data/1"].offset = static_cast<std::uint32_t>(z.bytes().find("PK\x03\x04"));
             return z.bytes();
         },
         "another name"},
        {"an entry inside another",
         [](ZipWriter z) {
             ZipWriter inner;
             inner.add("m/inside", "12345678").local_extra = "";
             const std::string b = inner.bytes();
             z["data/0"].data = b.substr(0, b.find("PK\x01\x02")) + std::string(32, ' ');
             const std::size_t at = z.bytes().find("m/inside") - 30;
             z.add("m/inside", "12345678");
             z.entries.back().offset = static_cast<std::uint32_t>(at);
             return z.bytes();
         },
         "overlap"},
        {"an entry that reaches into the directory",
         [](ZipWriter z) {
             ZipEntry& e = z["serialization_id"];
             e.size = e.stored = 60;
             return z.bytes();
         },
         "outside the file"},
        {"a damaged byte",
         [](ZipWriter z) {
             const std::uint32_t crc = crc32(z["data/0"].data);
             z["data/0"].data[5] ^= 0x10;
             z["data/0"].crc = crc;
             return z.bytes();
         },
         "checksum"},
        {"junk in front, with offsets that do not count it",
         [](const ZipWriter& z) { return "#!/bin/sh\n" + z.bytes(); }, "not before its locator"},
        {"junk in front, with offsets that count it",
         [](ZipWriter z) {
             z.prefix = "#!/bin/sh\n";
             return z.bytes();
         },
         "belong to no entry"},
        {"junk between the last entry and the directory",
         [](ZipWriter z) {
             z.between = "twelve bytes, then more";
             return z.bytes();
         },
         "belong to no entry"},
        {"junk between two entries",
         [](ZipWriter z) {
             z["data/0"].descriptor = std::string(25, 'x');
             return z.bytes();
         },
         "belong to no entry"},
        {"70,000 entries",
         [](ZipWriter z) {
             z.entries.clear();
             for (int i = 0; i < 70000; ++i) z.add(std::to_string(i), "").local_extra = "";
             z.end.entries = z.end.entries_here = 0xFFFF;
             return z.bytes();
         },
         "65,536 entries"},
    };
}

}  // namespace

TEST_CASE("zip: the test's writer reproduces a genuine file byte for byte") {
    const fs::path shared = shared_dir();
    if (shared.empty()) {
        MESSAGE("skipped: no shared fixtures");
        return;
    }
    const std::string genuine =
        read_file(shared / "fixtures/jul26/base_checkpoints/d4/model_000200.pt");
    std::vector<NamedTensor> tensors =
        make_weights(Gen::g4, {512, 1031, 4, 2, 1, 128, "SSSL"}, Save::trained);
    StateDictPickle::Options options;
    options.location = "cuda:0";
    ZipWriter zip = state_dict_zip("model_000200", tensors, options);
    CHECK((genuine.compare(64, zip.entries[0].data.size(), zip.entries[0].data) == 0));
    for (ZipEntry& e : zip.entries) {  // the weights and the id are not ours: take them over
        const std::size_t extra = genuine.find(e.name + "FB") + e.name.size();
        const auto padding = static_cast<unsigned char>(genuine[extra + 2]);
        e.data = genuine.substr(extra + 4 + padding, e.data.size());
    }
    CHECK((zip.bytes() == genuine));
}

TEST_CASE("zip: entries, sizes, offsets and bytes are found through the directory") {
    TempDir dir;
    const ZipWriter writer = good_zip();
    write_file(dir / "a.pt", writer.bytes());
    const ZipFile zip{nanogpt::File(dir / "a.pt")};
    CHECK(zip.entries().size() == writer.entries.size());
    for (const ZipEntry& want : writer.entries) {
        CAPTURE(want.name);
        const auto* got = zip.find(want.name);
        REQUIRE(got != nullptr);
        CHECK(got->size == want.data.size());
        CHECK(got->offset % 64 == 0);
        CHECK((nanogpt::detail::as_text(zip.read(*got, 4096)) == want.data));
    }
    CHECK(zip.find("model_000010/data/9") == nullptr);
    CHECK(zip.find("") == nullptr);
}

TEST_CASE("zip: archives of other writers are read: no zip64 end, sizes in the header, no CRC") {
    TempDir dir;
    const std::string want = [&] {
        write_file(dir / "a.pt", good_zip().bytes());
        return read_all(dir / "a.pt");
    }();
    ZipWriter zip = good_zip();
    SUBCASE("no zip64 end records") { zip.end.zip64 = false; }
    SUBCASE("no padding") {
        for (ZipEntry& e : zip.entries) e.local_extra = "";
    }
    SUBCASE("sizes in the local header") {
        for (ZipEntry& e : zip.entries) {
            e.flags = 0;
            e.local_crc = crc32(e.data);
            e.local_size = e.local_stored = static_cast<std::uint32_t>(e.data.size());
            e.descriptor = "";
        }
    }
    SUBCASE("checksums switched off") {
        for (ZipEntry& e : zip.entries) e.crc = 0;
    }
    SUBCASE("zip64 sizes and offset") {
        ZipEntry& e = zip["data/0"];
        const std::uint64_t at = good_zip().bytes().find(e.name) - 30;
        e.size = e.stored = e.offset = 0xFFFFFFFF;
        e.extra = zip64_field({24, 24, at}, 24);
    }
    SUBCASE("saturated end record") {
        zip.end.entries = zip.end.entries_here = 0xFFFF;
        zip.end.size = zip.end.offset = 0xFFFFFFFF;
    }
    SUBCASE("entry comments") { zip["data/0"].comment = "hello"; }
    write_file(dir / "b.pt", zip.bytes());
    CHECK((read_all(dir / "b.pt") == want));
}

TEST_CASE("zip: A1, every malformed archive is refused for its own reason") {
    TempDir dir;
    write_file(dir / "good.pt", good_zip().bytes());
    std::size_t total = 0, passed = 0;
    for (const auto& table : {not_archives(), bad_ends(), bad_zip64_ends(), bad_entries(),
                              bad_names(), bad_archives()}) {
        for (const BadZip& bad : table) {
            CAPTURE(bad.name);
            write_file(dir / "bad.pt", bad.make(good_zip()));
            const std::string why = error_of([&] { read_all(dir / "bad.pt"); });
            CHECK_MESSAGE(contains(why, bad.reason), "refused with: ", why);
            CHECK(error_of([&] { read_all(dir / "good.pt"); }) == "");
            ++total;
            passed += contains(why, bad.reason);
        }
    }
    CHECK(total >= 72);
    report("A1", passed, total);
}

TEST_CASE("zip: a fault of an entry is where it stands: in the directory, or in the local header") {
    for (const bool local : {false, true}) {
        ZipWriter zip;
        zip.add("m/a", "12345678");
        ZipEntry& second = zip.add("m/b", "12345678");
        if (local)
            second.local_flags = 0x0809;  // encrypted
        else
            second.flags = 0x0809, second.local_flags = 0x0808;
        const std::string bytes = zip.bytes();
        const std::string_view mark = local ? "PK\x03\x04" : "PK\x01\x02";
        const std::size_t place = bytes.find(mark, bytes.find(mark) + 4);
        CAPTURE(local);
        try {
            const TempDir dir;
            write_file(dir / "x.pt", bytes);
            const ZipFile read{nanogpt::File(dir / "x.pt")};
            FAIL_CHECK("it was accepted");
        } catch (const nanogpt::Error& e) {
            CHECK(e.offset == static_cast<std::int64_t>(place));
        }
    }
}

TEST_CASE("zip: an entry larger than what the reader allows is refused before it is read") {
    TempDir dir;
    write_file(dir / "a.pt", good_zip().bytes());
    const ZipFile zip{nanogpt::File(dir / "a.pt")};
    const auto* entry = zip.find("model_000010/data/0");
    REQUIRE(entry != nullptr);
    CHECK(contains(error_of([&] { zip.read(*entry, 23); }), "at most 23"));
    CHECK(zip.read(*entry, 24).size() == 24);
}

TEST_CASE("zip: CRC-32 is that of zip, in one piece or in several") {
    using nanogpt::detail::crc32;
    CHECK(crc32(bytes_of("")) == 0u);
    CHECK(crc32(bytes_of("123456789")) == 0xCBF43926u);
    std::string text;
    Random random(1);
    for (int i = 0; i < 1000; ++i) text += static_cast<char>(random.next());
    CHECK(crc32(bytes_of(text)) == test::crc32(text));
    for (const std::size_t cut : {0u, 1u, 7u, 8u, 9u, 500u, 999u}) {
        const std::uint32_t first = crc32(bytes_of(text.substr(0, cut)));
        CHECK(crc32(bytes_of(text.substr(cut)), first) == test::crc32(text));
    }
}
