// Files that were changed by accident or on purpose: every truncation (A6), every changed byte (A7)
// and random edits (A8) of a micro checkpoint, its metadata and its tokenizer.
//
// A run takes a sample of them. All of them: NANOGPT_EXHAUSTIVE=1 ./nanogpt_tests -tc="mutation:*"
#include <fcntl.h>  // open

#include <chrono>  // steady_clock

#include "helpers.hpp"

using namespace test;
using nanogpt::detail::as_text;

namespace {

// What is valid here: the text that `load` returns describes what was loaded. A changed file must be
// refused, or load something that `acceptable` accepts.
struct Subject {
    std::string name;
    fs::path file;
    std::function<std::string()> load;  // throws Error if refused
    std::function<bool(const std::string& loaded)> acceptable;
};

struct Tally {
    std::size_t total = 0, refused = 0, loaded = 0, wrong = 0;
    double slowest = 0;  // s, of one input
    std::string first_wrong;
};

// Loads the changed file and counts what came of it.
void try_one(const Subject& s, Tally& tally, const std::string& what) {
    const auto begin = std::chrono::steady_clock::now();
    ++tally.total;
    try {
        const std::string loaded = s.load();
        ++tally.loaded;
        if (!s.acceptable(loaded)) {
            if (tally.wrong++ == 0) tally.first_wrong = s.name + ": " + what;
        }
    } catch (const nanogpt::Error& e) {
        ++tally.refused;
        if (std::string_view(e.what()).empty() && tally.wrong++ == 0)
            tally.first_wrong = "no reason";
    }
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - begin;
    tally.slowest = std::max(tally.slowest, seconds.count());
}

void check(const Subject& s, const Tally& tally, const char* group) {
    CHECK_MESSAGE(tally.wrong == 0, tally.first_wrong);
    CHECK(tally.slowest < 5);  // 0.1 s is the aim; a busy machine must not fail this
    CHECK(s.acceptable(s.load()));
    std::printf("%s %s %zu/%zu (%zu refused, %zu loaded and valid, slowest %.1f ms)\n", group,
                s.name.c_str(), tally.total - tally.wrong, tally.total, tally.refused, tally.loaded,
                tally.slowest * 1e3);
}

// A file opened for changing single bytes in place.
class Patch {
public:
    explicit Patch(const fs::path& file) : fd_(::open(file.c_str(), O_WRONLY | O_CLOEXEC)) {
        REQUIRE(fd_ >= 0);
    }
    ~Patch() { ::close(fd_); }
    Patch(const Patch&) = delete;
    Patch& operator=(const Patch&) = delete;
    void write(std::size_t at, char byte) const {
        REQUIRE(::pwrite(fd_, &byte, 1, static_cast<off_t>(at)) == 1);
    }

private:
    int fd_;
};

// Every length below the full one, from the longest to the shortest; a sample takes the last 200,
// the first 200 and every stride-th between.
void truncations(const Subject& s, std::size_t stride) {
    const std::string good = read_file(s.file);
    Tally tally;
    for (std::size_t n = good.size(); n-- > 0;) {
        if (n % stride != 0 && n >= 200 && n + 200 < good.size()) continue;
        fs::resize_file(s.file, n);
        try_one(s, tally, "cut to " + std::to_string(n));
    }
    write_file(s.file, good);
    CHECK(tally.refused == tally.total);
    check(s, tally, "A6");
}

// Four changes of every stride-th byte of those that `wanted` names.
void changed_bytes(const Subject& s, std::size_t stride,
                   const std::function<bool(std::size_t)>& wanted) {
    const std::string good = read_file(s.file);
    const Patch patch(s.file);
    Tally tally;
    std::size_t seen = 0;
    for (std::size_t at = 0; at < good.size(); ++at) {
        if (!wanted(at) || seen++ % stride != 0) continue;
        const char was = good[at];
        for (const int byte : {0x00, 0xFF, was ^ 0x01, was ^ 0x80}) {
            if (static_cast<char>(byte) == was) continue;
            patch.write(at, static_cast<char>(byte));
            try_one(s, tally, "byte " + std::to_string(at) + " = " + std::to_string(byte & 0xFF));
        }
        patch.write(at, was);
    }
    check(s, tally, "A7");
}

// One to four random edits: bytes, blocks moved, repeated or cut out, integers at their edges.
std::string edited(std::string s, Random& random) {
    constexpr std::uint64_t kEdges[] = {0,
                                        1,
                                        0x7F,
                                        0x80,
                                        0xFF,
                                        0x7FFF,
                                        0xFFFF,
                                        0x7FFFFFFF,
                                        0x80000000,
                                        0xFFFFFFFF,
                                        0x7FFFFFFFFFFFFFFF,
                                        0xFFFFFFFFFFFFFFFF};
    for (std::size_t edits = 1 + random.below(4); edits > 0 && !s.empty(); --edits) {
        const std::size_t at = random.below(s.size()),
                          length = 1 + random.below(random.below(4) == 0 ? 200 : 12);
        const std::string block = s.substr(random.below(s.size()), length);
        switch (random.below(6)) {
            case 0:
                s[at] = static_cast<char>(random.next());
                break;
            case 1:
                s[at] = static_cast<char>(s[at] ^ 1 << random.below(8));
                break;
            case 2:
                s.insert(at, block);
                break;
            case 3:
                s.erase(at, length);
                break;
            case 4:
                s.replace(at, block.size(), block);
                break;
            default:
                for (std::size_t i = 0, n = std::size_t{1} << random.below(4), e = random.below(12);
                     i < n && at + i < s.size(); ++i) {
                    s[at + i] = static_cast<char>(kEdges[e] >> 8 * i & 0xFF);
                }
        }
    }
    return s;
}

void random_edits(const Subject& s, std::size_t count) {
    const std::string good = read_file(s.file);
    Tally tally;
    for (std::size_t i = 0; i < count; ++i) {
        Random random(i + 1);  // so that one number names the case
        std::ofstream(s.file, std::ios::binary | std::ios::trunc) << edited(good, random);
        try_one(s, tally, "edit " + std::to_string(i));
    }
    write_file(s.file, good);
    check(s, tally, "A8");
}

// ---- the subjects

std::string fingerprint(const nanogpt::Model& model) {
    const nanogpt::Config& c = model.config();
    std::string out;
    for (const int n : {c.sequence_len, c.vocab_size, c.n_layer, c.n_head, c.n_kv_head, c.n_embd,
                        c.vocab_rows, c.short_window, static_cast<int>(c.generation)}) {
        out += std::to_string(n) + " ";
    }
    std::uint32_t crc = 0;
    const auto mix = [&](const nanogpt::Tensor& t) {
        if (t) crc = nanogpt::detail::crc32({t.data.get(), t.bytes()}, crc);
    };
    const nanogpt::Weights& w = model.weights();
    mix(w.wte);
    mix(w.lm_head);
    for (const nanogpt::Layer& l : w.layers) {
        for (const auto* t : {&l.c_q, &l.c_k, &l.c_v, &l.attn_c_proj, &l.c_fc, &l.mlp_c_proj})
            mix(*t);
        out += std::to_string(l.resid_lambda) + " " + std::to_string(l.x0_lambda) + " ";
    }
    return out + std::to_string(crc);
}

// A micro base directory, and its three files as subjects.
struct Micro {
    Micro() {
        CheckpointSpec spec;
        spec.gen = Gen::g1;
        spec.shape = kMicro;
        spec.save = Save::trained;
        spec.tag = "d1";
        checkpoint = make_checkpoint(dir.path(), spec);
    }

    // Changes of the model file load the very same model, or nothing.
    Subject model() const {
        const auto load = [at = checkpoint] {
            nanogpt::LoadOptions options;
            options.threads = 1;
            return fingerprint(*nanogpt::load_model(at, options));
        };
        return {"model", checkpoint / "model_000200.pt", load,
                [good = load()](const std::string& loaded) { return loaded == good; }};
    }

    // Changes of the metadata load a model that computes numbers, or nothing.
    Subject meta() const {
        const auto load = [at = checkpoint] {
            nanogpt::LoadOptions options;
            options.threads = 1;
            const auto loaded = nanogpt::load_model(at, options);
            nanogpt::KVCache cache(*loaded, 4);
            const nanogpt::Token ids[] = {1, 2, 3};
            const auto logits = nanogpt::forward(*loaded, cache, ids);
            return std::all_of(logits.begin(), logits.end(), is_finite) ? std::string("numbers")
                                                                        : "not numbers";
        };
        return {"metadata", checkpoint / "meta_000200.json", load,
                [](const std::string& loaded) { return loaded == "numbers"; }};
    }

    // Changes of the tokenizer load one that still gives back what it was given, or nothing.
    Subject tokenizer() const {
        const auto load = [file = dir / "tokenizer/tokenizer.pkl"] {
            const std::string text = "There, the 12 tea-eaters\n\xC3\xA9t\xC3\xA9 \xF0\x9F\x8C\x8D";
            const auto tokenizer = nanogpt::load_tokenizer(file);
            for (nanogpt::Token t = 0; t < tokenizer.vocab_size(); ++t)
                (void)tokenizer.decode({&t, 1});
            return tokenizer.decode(tokenizer.encode(text)) == text ? std::string("same") : "other";
        };
        return {"tokenizer", dir / "tokenizer/tokenizer.pkl", load,
                [](const std::string& loaded) { return loaded == "same"; }};
    }

    // True for bytes of the model file that are no tensor's elements.
    std::function<bool(std::size_t)> structural() const {
        const nanogpt::detail::ZipFile zip{nanogpt::File(checkpoint / "model_000200.pt")};
        std::vector<std::pair<std::size_t, std::size_t>> data;
        for (const auto& e : zip.entries()) {
            if (e.name.find("/data/") != std::string::npos)
                data.emplace_back(e.offset, e.offset + e.size);
        }
        return [data](std::size_t at) {
            for (const auto& [begin, end] : data) {
                if (at >= begin && at < end) return false;
            }
            return true;
        };
    }

    TempDir dir;
    fs::path checkpoint;
};

// 1 of how many are tried: all, a sample, a small sample.
std::size_t one_of(std::size_t sample, std::size_t small) {
    return exhaustive() ? 1 : quick() ? small : sample;
}

}  // namespace

TEST_CASE("mutation: A6, every truncation is refused, and only the full length loads") {
    const Micro micro;
    truncations(micro.model(), one_of(53, 997));
    truncations(micro.meta(), one_of(1, 7));
    truncations(micro.tokenizer(), one_of(3, 31));
}

TEST_CASE("mutation: A7, every changed byte of structure is refused or harmless") {
    const Micro micro;
    changed_bytes(micro.model(), one_of(11, 101), micro.structural());
    changed_bytes(micro.meta(), one_of(1, 7), [](std::size_t) { return true; });
    changed_bytes(micro.tokenizer(), one_of(5, 61), [](std::size_t) { return true; });
}

TEST_CASE("mutation: A7, every changed byte of the weights is caught by a checksum") {
    const Micro micro;
    const auto structural = micro.structural();
    changed_bytes(micro.model(), one_of(997, 9973),
                  [&](std::size_t at) { return !structural(at); });
}

TEST_CASE("mutation: A8, randomly edited files are refused or valid") {
    const Micro micro;
    const std::size_t count = exhaustive() ? 1000000 : quick() ? 300 : 5000;
    random_edits(micro.model(), count / 5);  // large, so fewer of them
    random_edits(micro.meta(), count);
    random_edits(micro.tokenizer(), count);
}

TEST_CASE("mutation: A8, a randomly edited zip has its entries inside the file, or is refused") {
    TempDir dir;
    const std::vector<NamedTensor> tensors{{"a", {2, 3}, DType::f32, {1, 2, 3, 4, 5, 6}},
                                           {"b", {4}, DType::bf16, {1, -1, 0.5f, 2}}};
    write_file(dir / "m.pt", state_dict_zip("m", tensors).bytes());
    const Subject zip{"zip", dir / "m.pt",
                      [file = dir / "m.pt"] {
                          const nanogpt::detail::ZipFile z{nanogpt::File(file)};
                          bool inside = true;
                          for (const auto& e : z.entries()) {
                              inside = inside && e.offset <= z.file().size() &&
                                       e.size <= z.file().size() - e.offset;
                              (void)z.read(e, 4096);
                          }
                          return inside ? std::string("inside") : "outside";
                      },
                      [](const std::string& loaded) { return loaded == "inside"; }};
    random_edits(zip, exhaustive() ? 1000000 : quick() ? 1000 : 20000);
}

TEST_CASE(
    "mutation: A8, a randomly edited pickle gives a tree whose references exist, or is refused") {
    const Micro micro;
    const nanogpt::detail::ZipFile zip{nanogpt::File(micro.checkpoint / "model_000200.pt")};
    const auto bytes = zip.read(*zip.find("model_000200/data.pkl"), 1u << 20);
    const std::string checkpoint(as_text(bytes)), tokenizer = tokenizer_pickle(make_tokenizer(300));
    const std::size_t count = exhaustive() ? 1000000 : quick() ? 2000 : 20000;
    using nanogpt::detail::PickleFor;
    for (const auto& [good, what] :
         {std::pair{checkpoint, PickleFor::checkpoint}, {tokenizer, PickleFor::tokenizer}}) {
        std::size_t refused = 0, wrong = 0;
        for (std::size_t i = 0; i < count; ++i) {
            Random random(i + 1);
            const std::string bad = edited(good, random);
            try {
                const auto tree = nanogpt::detail::parse_pickle(bytes_of(bad), what);
                wrong += tree.root >= tree.nodes.size();
                for (const auto& node : tree.nodes) {
                    for (const std::uint32_t item : node.items) wrong += item >= tree.nodes.size();
                }
            } catch (const nanogpt::Error&) {
                ++refused;
            }
        }
        CHECK(wrong == 0);
        CHECK(refused > count / 2);
        CHECK(error_of([&] { nanogpt::detail::parse_pickle(bytes_of(good), what); }) == "");
        std::printf("A8 pickle %zu/%zu (%zu refused)\n", count - wrong, count, refused);
    }
}

TEST_CASE("mutation: A8, a randomly edited JSON text is parsed or refused") {
    const std::string good =
        meta_json(Gen::g4, kTiny, 200, "\"a\": [1, -2.5e-3, \"x\\u00e9\", null, NaN],");
    const std::size_t count = exhaustive() ? 1000000 : quick() ? 2000 : 20000;
    std::size_t refused = 0;
    for (std::size_t i = 0; i < count; ++i) {
        Random random(i + 1);
        const std::string bad = edited(good, random);
        refused += error_of([&] { nanogpt::parse_json(bad, nanogpt::JsonDialect::python); }) != "";
        refused += error_of([&] { nanogpt::parse_json(bad); }) != "";
    }
    CHECK(refused > count / 2);
    std::printf("A8 json %zu/%zu\n", count, count);
}
