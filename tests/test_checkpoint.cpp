// Checkpoints on disk: metadata (group A4), directory trees (A5), every generation (A9), and the
// rules by which a generation and its constants are told from the tensors.
#include <sys/stat.h>  // mkfifo, chmod

#include <chrono>  // steady_clock
#include <climits>
#include <cmath>  // isnan

#include "helpers.hpp"

using namespace test;
using nanogpt::Config;
using nanogpt::find_models;
using nanogpt::Generation;
using nanogpt::inspect_model;
using nanogpt::ModelInfo;
using nanogpt::Origin;
using nanogpt::Overrides;
using nanogpt::Status;

namespace {

const Shape kNarrow{64, 300, 2, 2, 1, 32, "SL"};  // the least width that every generation allows

CheckpointSpec micro_spec() {
    CheckpointSpec spec;
    spec.gen = Gen::g1;
    spec.shape = kMicro;
    spec.tag = "d1";
    return spec;
}

std::string setting(const ModelInfo& info, std::string_view name) {
    for (const auto& s : info.settings) {
        if (s.name == name) return s.value + " " + std::string(name_of(s.origin));
    }
    return "(none)";
}

bool warns(const ModelInfo& info, std::string_view part) {
    for (const std::string& w : info.warnings) {
        if (contains(w, part)) return true;
    }
    return false;
}

std::string replaced(std::string text, std::string_view from, std::string_view to) {
    const std::size_t at = text.find(from);
    if (at == std::string::npos) throw std::runtime_error("no " + std::string(from));
    return text.replace(at, from.size(), to);
}

struct BadMeta {
    std::string name, text, reason;
};

std::string micro_meta() { return meta_json(Gen::g1, kMicro, 200); }

std::vector<BadMeta> bad_documents() {
    const std::string good = micro_meta();
    std::string deep, utf16;
    for (int i = 0; i < 70; ++i) deep += "{\"a\":";
    for (const char c : good) utf16 += {c, '\0'};
    return {
        {"empty", "", "JSON is empty"},
        {"blank", " \n", "ends too early"},
        {"null", "null", "no JSON object"},
        {"a list", "[" + good + "]", "no JSON object"},
        {"a number", "1", "no JSON object"},
        {"text", "\"model_config\"", "no JSON object"},
        {"NaN", "NaN", "no JSON object"},
        {"cut off", good.substr(0, good.size() - 1), "without , or }"},
        {"cut in a string", good.substr(0, 6), "string without end"},
        {"two documents", good + good, "goes on after its end"},
        {"byte order mark", "\xEF\xBB\xBF" + good, "byte order mark"},
        {"UTF-16", "\xFF\xFE" + utf16, "not UTF-8"},
        {"Latin-1", replaced(good, "\"step\"", "\"st\xE9p\""), "not UTF-8"},
        {"zeros", std::string(300, '\0'), "no value"},
        {"a pickle", "\x80\x02}.", "not UTF-8"},
        {"a web page", "<html>", "no value"},
        {"a comment", "// meta\n" + good, "no value"},
        {"a trailing comma", replaced(good, "\n  }\n}", "\n  },\n}"), "key that is no string"},
        {"single quotes", "{'model_config': {}}", "key that is no string"},
        {"deep", deep, "deeper than 64"},
        {"5 MiB", std::string(std::size_t{5} << 20, ' ') + good, "at most 4194304"},
        {"a key twice", replaced(good, "\"step\": 200,", "\"step\": 200, \"step\": 200,"), "twice"},
        {"model_config twice", replaced(good, "\"step\": 200,", "\"model_config\": {},"), "twice"},
        {"a key of model_config twice",
         replaced(good, "\"n_head\": 2,", "\"n_head\": 2, \"n_head\": 4,"), "twice"},
        {"1e999", replaced(good, "1.25", "1e999"), "out of range"},
        {"no model_config", "{\"step\": 200}", "no object model_config"},
        {"model_config null", "{\"model_config\": null}", "no object model_config"},
        {"model_config a list", "{\"model_config\": []}", "no object model_config"},
        {"model_config text", "{\"model_config\": \"d12\"}", "no object model_config"},
        {"model_config empty", "{\"model_config\": {}}", "model_config.sequence_len is missing"},
    };
}

// Each of the six integers, with values that are no such integer.
std::vector<BadMeta> bad_integers() {
    static const std::pair<const char*, int> kKeys[] = {{"sequence_len", 32}, {"vocab_size", 320},
                                                        {"n_layer", 1},       {"n_head", 2},
                                                        {"n_kv_head", 1},     {"n_embd", 16}};
    static const char* const kValues[] = {
        "null", "\"12\"", "true", "2.5", "2.0",      "1e1", "-1",
        "0",    "1e99",   "NaN",  "[1]", "Infinity", "{}",  "99999999999999999999",
        "-0",   "\"\""};
    std::vector<BadMeta> out;
    for (const auto& [key, value] : kKeys) {
        const std::string field = "\"" + std::string(key) + "\": ";
        const std::string have = field + std::to_string(value);
        const std::string want = "model_config." + std::string(key);
        for (const char* bad : kValues) {
            out.push_back({std::string(key) + " = " + bad,
                           replaced(micro_meta(), have, field + bad),
                           want + " must be an integer"});
        }
        out.push_back({std::string(key) + " missing",
                       replaced(micro_meta(), "\"" + std::string(key) + "\"", "\"other\""),
                       want + " is missing"});
    }
    return out;
}

std::vector<BadMeta> bad_values() {
    const auto with = [](const char* from, const std::string& to) {
        return replaced(micro_meta(), from, to);
    };
    const auto pattern = [&](const std::string& value) {
        return with("\"window_pattern\": \"L\"", "\"window_pattern\": " + value);
    };
    const char* const range = "must be an integer";
    return {
        {"context too long", with("\"sequence_len\": 32", "\"sequence_len\": 1048577"), range},
        {"vocabulary too large", with("\"vocab_size\": 320", "\"vocab_size\": 1048577"), range},
        {"too many layers", with("\"n_layer\": 1", "\"n_layer\": 257"), range},
        {"too many heads", with("\"n_head\": 2", "\"n_head\": 513"), range},
        {"too wide", with("\"n_embd\": 16", "\"n_embd\": 32769"), range},
        {"too narrow", with("\"n_embd\": 16", "\"n_embd\": 7"), range},
        {"heads do not divide the width", with("\"n_head\": 2", "\"n_head\": 3"),
         "n_head must divide n_embd"},
        {"kv heads do not divide the heads", with("\"n_kv_head\": 1", "\"n_kv_head\": 3"),
         "n_kv_head must divide n_head"},
        {"odd head size", with("\"n_head\": 2", "\"n_head\": 16"), "must be even"},
        {"head size of 1024", with("\"n_embd\": 16", "\"n_embd\": 2048"), "at most 512"},
        {"another width", with("\"n_embd\": 16", "\"n_embd\": 32"), "the config needs"},
        {"another number of kv heads", with("\"n_kv_head\": 1", "\"n_kv_head\": 2"),
         "the config needs (16, 16)"},
        {"more layers than the file", with("\"n_layer\": 1", "\"n_layer\": 2"), "lacks 6 tensors"},
        {"256 layers", with("\"n_layer\": 1", "\"n_layer\": 256"), "lacks 1530 tensors"},
        {"a larger vocabulary", with("\"vocab_size\": 320", "\"vocab_size\": 321"),
         "has 320 rows, vocab_size is 321"},
        {"pattern empty", pattern("\"\""), "window_pattern \"\""},
        {"pattern of another letter", pattern("\"SLX\""), "window_pattern \"SLX\""},
        {"pattern with a space", pattern("\"S L\""), "window_pattern \"S L\""},
        {"pattern with a NUL", pattern("\"L\\u0000\""), "window_pattern"},
        {"pattern of 300 letters", pattern("\"" + std::string(300, 'L') + "\""),
         "must be 1 to 256 letters"},
        {"pattern a number", pattern("1"), "window_pattern must be a string"},
        {"pattern a list", pattern("[\"L\"]"), "window_pattern must be a string"},
        {"pattern a boolean", pattern("true"), "window_pattern must be a string"},
        {"mixture of experts", with("\"n_head\": 2", "\"num_experts\": 8, \"n_head\": 2"),
         "mixture-of-experts"},
    };
}

// The status and the loss of the only model, with this text in place of `"val_bpb": 1.25,`.
ModelInfo with_loss(const TempDir& dir, const std::string& extra) {
    write_meta(dir / "base_checkpoints/d1/meta_000200.json", Gen::g1, kMicro, 200, extra);
    return inspect_model(dir / "base_checkpoints/d1");
}

}  // namespace

TEST_CASE("checkpoint: A4, every bad metadata file is refused for its own reason") {
    TempDir dir;
    CheckpointSpec spec = micro_spec();
    const fs::path bad_dir = make_checkpoint(dir.path(), spec);
    spec.tag = "d2";
    make_checkpoint(dir.path(), spec);
    std::size_t total = 0, passed = 0;
    for (const auto& table : {bad_documents(), bad_integers(), bad_values()}) {
        for (const BadMeta& bad : table) {
            CAPTURE(bad.name);
            write_file(bad_dir / "meta_000200.json", bad.text);
            const std::string why = error_of([&] { inspect_model(bad_dir); });
            const bool named = contains(why, bad.reason) && contains(why, "000200");
            CHECK_MESSAGE(named, "refused with: ", why);
            const std::vector<ModelInfo> models = find_models(dir.path());
            REQUIRE(models.size() == 2);
            CHECK(models[0].tag == "d2");
            CHECK(models[0].status == Status::ready);
            CHECK(models[1].status != Status::ready);
            CHECK(models[1].reason == why);
            ++total;
            passed += named;
        }
    }
    CHECK(total >= 64);
    report("A4", passed, total);
}

TEST_CASE("checkpoint: a missing or non-finite loss is no loss, and hides nothing") {
    TempDir dir;
    make_checkpoint(dir.path(), micro_spec());
    for (const char* extra :
         {"", "\"val_bpb\": null,", "\"val_bpb\": NaN,", "\"val_bpb\": Infinity,",
          "\"val_bpb\": -Infinity,", "\"val_bpb\": \"low\",", "\"val_bpb\": [1],",
          "\"loop_state\": {\"min_val_bpb\": Infinity, \"smooth_train_loss\": NaN},"}) {
        CAPTURE(std::string(extra));
        const ModelInfo info = with_loss(dir, extra);
        CHECK(std::isnan(info.loss));
        CHECK(info.loss_metric == "");
        CHECK(find_models(dir.path())[0].status == Status::ready);
    }
}

TEST_CASE(
    "checkpoint: losses have their unit, other numbers are metrics, unknown keys are kept out") {
    TempDir dir;
    make_checkpoint(dir.path(), micro_spec());
    ModelInfo info = with_loss(dir, "\"val_bpb\": 1.25, \"user_config\": {\"run\": \"x\"},");
    CHECK(info.loss == 1.25);
    CHECK(info.loss_metric == "val_bpb");
    CHECK(info.loss_unit == "bits/byte");
    info = with_loss(dir, "\"val_loss\": 2.5, \"mmlu_acc\": 0.31, \"arc_easy_acc\": 0.4,");
    CHECK(info.loss == 2.5);
    CHECK(info.loss_metric == "val_loss");
    CHECK(info.loss_unit == "nats/token");
    REQUIRE(info.metrics.size() == 2);
    CHECK(info.metrics[0].first == "mmlu_acc");
    CHECK(info.metrics[0].second == 0.31);
}

TEST_CASE(
    "checkpoint: a step that disagrees with the file's name is a warning; a missing one is none") {
    TempDir dir;
    const fs::path at = make_checkpoint(dir.path(), micro_spec());
    CHECK(inspect_model(at).warnings.empty());
    write_meta(at / "meta_000200.json", Gen::g1, kMicro, 300);
    ModelInfo info = inspect_model(at);
    CHECK(info.step == 200);
    CHECK(warns(info, "300"));
    write_file(at / "meta_000200.json", replaced(micro_meta(), "\"step\": 200,", ""));  // chat_rl
    CHECK(inspect_model(at).warnings.empty());
}

// ---- A5: directory trees ------------------------------------------------------------------------

namespace {

// Spoils the directory of tag d1 (model and metadata are there) or what is around it.
struct BadTree {
    std::string name;
    std::function<void(const fs::path& base, const fs::path& d1)> spoil;
    std::string status;  // of d1's model; "" if it must not be listed
    std::string reason;  // must be part of the reason
};

void spoil_model(const fs::path& d1, std::string_view bytes) {
    write_file(d1 / "model_000200.pt", bytes);
}

std::vector<BadTree> bad_models() {
    const fs::path model = "model_000200.pt";
    return {
        {"half-written model",
         [=](const fs::path&, const fs::path& d1) { fs::resize_file(d1 / model, 20000); },
         "incomplete", "ends early"},
        {"model without its last byte",
         [=](const fs::path&, const fs::path& d1) {
             fs::resize_file(d1 / model, fs::file_size(d1 / model) - 1);
         },
         "incomplete", "ends early"},
        {"empty model", [](const fs::path&, const fs::path& d1) { spoil_model(d1, ""); },
         "incomplete", "ends early"},
        {"model without metadata",
         [](const fs::path&, const fs::path& d1) { fs::remove(d1 / "meta_000200.json"); },
         "incomplete", "no metadata file yet"},
        {"a GGUF file", [](const fs::path&, const fs::path& d1) { spoil_model(d1, "GGUF....."); },
         "refused", "GGUF"},
        {"a web page",
         [](const fs::path&, const fs::path& d1) { spoil_model(d1, "<!doctype html>"); }, "refused",
         "web page"},
        {"a Git LFS pointer",
         [](const fs::path&, const fs::path& d1) {
             spoil_model(d1, "version https://git-lfs.github.com/spec/v1\n");
         },
         "refused", "LFS"},
        {"random bytes",
         [](const fs::path&, const fs::path& d1) { spoil_model(d1, std::string(5000, 'q')); },
         "refused", "not a file of torch.save"},
        {"a zip that is no checkpoint",
         [](const fs::path&, const fs::path& d1) {
             ZipWriter zip;
             zip.add("hello.txt", "hello");
             spoil_model(d1, zip.bytes());
         },
         "refused", "no entry data.pkl"},
        {"a model that is a FIFO",
         [=](const fs::path&, const fs::path& d1) {
             fs::remove(d1 / model);
             REQUIRE(::mkfifo((d1 / model).c_str(), 0600) == 0);
         },
         "refused", "not a regular file"},
        {"a model that is a directory",
         [=](const fs::path&, const fs::path& d1) {
             fs::remove(d1 / model);
             fs::create_directory(d1 / model);
         },
         "refused", "not a regular file"},
        {"a model that is a device",
         [=](const fs::path&, const fs::path& d1) {
             fs::remove(d1 / model);
             fs::create_symlink("/dev/zero", d1 / model);
         },
         "refused", "not a regular file"},
        {"a link to nothing",
         [=](const fs::path&, const fs::path& d1) {
             fs::remove(d1 / model);
             fs::create_symlink("/nonexistent/file", d1 / model);
         },
         "refused", "cannot open"},
        {"a link to itself",
         [=](const fs::path&, const fs::path& d1) {
             fs::remove(d1 / model);
             fs::create_symlink(model, d1 / model);
         },
         "refused", "cannot open"},
        {"a link to a good model",
         [=](const fs::path& base, const fs::path& d1) {
             fs::remove(d1 / model);
             fs::create_symlink(base / "base_checkpoints/d9/model_000200.pt", d1 / model);
         },
         "ready", ""},
        {"metadata that is a directory",
         [](const fs::path&, const fs::path& d1) {
             fs::remove(d1 / "meta_000200.json");
             fs::create_directory(d1 / "meta_000200.json");
         },
         "refused", "not a regular file"},
        {"metadata that is a FIFO",
         [](const fs::path&, const fs::path& d1) {
             fs::remove(d1 / "meta_000200.json");
             REQUIRE(::mkfifo((d1 / "meta_000200.json").c_str(), 0600) == 0);
         },
         "refused", "not a regular file"},
        {"metadata that is an endless device",
         [](const fs::path&, const fs::path& d1) {
             fs::remove(d1 / "meta_000200.json");
             fs::create_symlink("/dev/zero", d1 / "meta_000200.json");
         },
         "refused", "not a regular file"},
        {"metadata half-written",
         [](const fs::path&, const fs::path& d1) { fs::resize_file(d1 / "meta_000200.json", 60); },
         "refused", "JSON"},
        {"metadata empty",
         [](const fs::path&, const fs::path& d1) { fs::resize_file(d1 / "meta_000200.json", 0); },
         "refused", "JSON is empty"},
    };
}

void rename_tag(const fs::path& d1, const std::string& name) {
    fs::rename(d1, d1.parent_path() / name);
}

std::vector<BadTree> bad_directories() {
    std::vector<BadTree> out{
        {"a tag that is a file",
         [](const fs::path& base, const fs::path& d1) {
             fs::remove_all(d1);
             write_file(base / "base_checkpoints/d1", "x");
         },
         "", ""},
        {"a tag that is a FIFO",
         [](const fs::path&, const fs::path& d1) {
             fs::remove_all(d1);
             REQUIRE(::mkfifo(d1.c_str(), 0600) == 0);
         },
         "", ""},
        {"a tag that is a link to itself",
         [](const fs::path&, const fs::path& d1) {
             fs::remove_all(d1);
             fs::create_symlink("d1", d1);
         },
         "", ""},
        {"a tag that is a link to its parent",
         [](const fs::path& base, const fs::path& d1) {
             fs::remove_all(d1);
             fs::create_directory_symlink(base / "base_checkpoints", d1);
         },
         "", ""},
        {"an empty tag",
         [](const fs::path&, const fs::path& d1) {
             fs::remove_all(d1);
             fs::create_directory(d1);
         },
         "", ""},
        {"a source that is a file",
         [](const fs::path& base, const fs::path& d1) {
             fs::remove_all(d1);
             write_file(base / "chatsft_checkpoints", "x");
         },
         "", ""},
        {"a source that is a loop",
         [](const fs::path& base, const fs::path& d1) {
             fs::remove_all(d1);
             fs::create_symlink("mid_checkpoints", base / "mid_checkpoints");
         },
         "", ""},
        {"a tag that cannot be read",
         [](const fs::path&, const fs::path& d1) {
             fs::remove_all(d1);
             fs::create_directory(d1);
             ::chmod(d1.c_str(), 0);
         },
         "", ""},
        {"metadata and optimizer without a model",
         [](const fs::path&, const fs::path& d1) {
             fs::rename(d1 / "model_000200.pt", d1 / "optim_000200_rank0.pt");
         },
         "", ""},
    };
    for (const char* tag : {"\x1b[31mred", "a\nb", ".hidden", "-rf", "d 12", "d12\xFF",
                            "caf\xC3\xA9", "d12;rm", "_x", "a'b"}) {
        out.push_back({"a tag's name that is none",
                       [tag](const fs::path&, const fs::path& d1) { rename_tag(d1, tag); }, "",
                       ""});
    }
    out.push_back(
        {"a tag of 129 letters",
         [](const fs::path&, const fs::path& d1) { rename_tag(d1, std::string(129, 'a')); }, "",
         ""});
    for (const char* name : {"model_abc.pt", "model_.pt", "model_000200.pt.tmp", "model_-00200.pt",
                             "model_1234567890123.pt", "Model_000200.pt", "xmodel_000200.pt",
                             "model_0x10.pt", "model_ 200.pt"}) {
        out.push_back({"a model's name that is none",
                       [name](const fs::path&, const fs::path& d1) {
                           fs::rename(d1 / "model_000200.pt", d1 / name);
                       },
                       "", ""});
    }
    return out;
}

}  // namespace

TEST_CASE("checkpoint: A5, whatever lies in the tree, the other checkpoints are still listed") {
    std::size_t total = 0, passed = 0;
    for (const auto& table : {bad_models(), bad_directories()}) {
        for (const BadTree& bad : table) {
            CAPTURE(bad.name);
            TempDir dir;
            CheckpointSpec spec = micro_spec();
            const fs::path d1 = make_checkpoint(dir.path(), spec);
            spec.tag = "d9";
            make_checkpoint(dir.path(), spec);
            bad.spoil(dir.path(), d1);
            const std::vector<ModelInfo> models = find_models(dir.path());
            const std::string_view status = bad.status;
            REQUIRE(models.size() == (status.empty() ? 1 : 2));
            CHECK(models[0].id == "base/d9/200");
            CHECK(models[0].status == Status::ready);
            const bool ok = status.empty() || (name_of(models[1].status) == status &&
                                               contains(models[1].reason, bad.reason));
            CHECK_MESSAGE(ok, models.back().reason);
            ++total;
            passed += ok;
        }
    }
    CHECK(total >= 28);
    report("A5", passed, total);
}

TEST_CASE("checkpoint: a base directory that is none holds no models") {
    TempDir dir;
    CHECK(find_models(dir / "nothing").empty());
    CHECK(find_models(dir.path()).empty());
    write_file(dir / "file", "x");
    CHECK(find_models(dir / "file").empty());
    CHECK(find_models("/dev/null").empty());
}

TEST_CASE("checkpoint: folders that are no tags are named in the warnings, without raw bytes") {
    TempDir dir;
    fs::create_directories(dir / "base_checkpoints/\x1b[31mred");
    std::vector<std::string> warnings;
    CHECK(find_models(dir.path(), {}, &warnings).empty());
    REQUIRE(warnings.size() == 1);
    CHECK(contains(warnings[0], "x1b"));
    CHECK(!contains(warnings[0], "\x1b"));
}

TEST_CASE("checkpoint: 100,001 entries in a directory are survived") {
    if (quick()) return;
    TempDir dir;
    CheckpointSpec spec = micro_spec();
    spec.tag = "d9";
    make_checkpoint(dir.path(), spec);
    fs::create_directories(dir / "base_checkpoints/d1");
    for (int i = 0; i <= 100000; ++i) {
        std::ofstream(dir / "base_checkpoints/d1" / ("x" + std::to_string(i)));
    }
    const std::vector<ModelInfo> models = find_models(dir.path());
    REQUIRE(models.size() == 1);
    CHECK(models[0].status == Status::ready);
}

TEST_CASE("checkpoint: models come SFT, RL, MID, BASE; larger tags first, later steps first") {
    TempDir dir;
    CheckpointSpec spec = micro_spec();
    const char* const kWant[] = {"sft/d20/9", "sft/d12/1000000", "sft/d12/999999", "sft/d12/700",
                                 "sft/d12/2", "sft/fork/1",      "rl/d4/3",        "mid/d26_feb2/1",
                                 "mid/d20/1", "base/d12/5"};
    const std::pair<const char*, const char*> kFolders[] = {{"sft", "chatsft_checkpoints"},
                                                            {"rl", "chatrl_checkpoints"},
                                                            {"mid", "mid_checkpoints"},
                                                            {"base", "base_checkpoints"}};
    for (std::size_t i = std::size(kWant); i-- > 0;) {
        const std::string id = kWant[(i * 7 + 3) % std::size(kWant)];  // written in another order
        const std::size_t a = id.find('/'), b = id.rfind('/');
        for (const auto& [source, folder] : kFolders) {
            if (id.substr(0, a) == source) spec.directory = folder;
        }
        spec.tag = id.substr(a + 1, b - a - 1);
        spec.step = std::stoll(id.substr(b + 1));
        make_checkpoint(dir.path(), spec);
    }
    const std::vector<ModelInfo> models = find_models(dir.path());
    REQUIRE(models.size() == std::size(kWant));
    for (std::size_t i = 0; i < models.size(); ++i) {
        CHECK(models[i].id == kWant[i]);
        CHECK(models[i].status == Status::ready);
        CHECK(models[i].file_bytes > 50000);
    }
}

TEST_CASE("checkpoint: the folder of two days, sft_checkpoints, is SFT too") {
    TempDir dir;
    CheckpointSpec spec = micro_spec();
    spec.directory = "sft_checkpoints";
    make_checkpoint(dir.path(), spec);
    const std::vector<ModelInfo> models = find_models(dir.path());
    REQUIRE(models.size() == 1);
    CHECK(models[0].id == "sft/d1/200");
}

TEST_CASE("checkpoint: 1,000 checkpoints are listed in a time that grows with their number only") {
    TempDir dir;
    const fs::path first = make_checkpoint(dir.path(), micro_spec());
    const int count = quick() ? 100 : 1000;
    for (int i = 1; i < count; ++i) {
        fs::create_hard_link(first / "model_000200.pt",
                             first / step_name("model", 1000 + i, ".pt"));
        fs::create_hard_link(first / "meta_000200.json",
                             first / step_name("meta", 1000 + i, ".json"));
    }
    const auto begin = std::chrono::steady_clock::now();
    const std::vector<ModelInfo> models = find_models(dir.path());
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - begin;
    CHECK(models.size() == static_cast<std::size_t>(count));
    CHECK(models[0].step == 1000 + count - 1);
    CHECK(seconds.count() < 20);  // 1 s is the aim; sanitizers and emulators take their share
    MESSAGE(count, " checkpoints listed in ", seconds.count(), " s");
}

TEST_CASE("checkpoint: a directory means its last step, or the one asked for") {
    TempDir dir;
    CheckpointSpec spec = micro_spec();
    for (const std::int64_t step : {2, 999999, 1000000}) {
        spec.step = step;
        make_checkpoint(dir.path(), spec);
    }
    const fs::path at = dir / "base_checkpoints/d1";
    CHECK(inspect_model(at).step == 1000000);
    CHECK(inspect_model(at, 2).step == 2);
    CHECK(inspect_model(at / "model_999999.pt").step == 999999);
    CHECK(contains(error_of([&] { inspect_model(at, 3); }), "step 3"));
    CHECK(contains(error_of([&] { inspect_model(dir / "base_checkpoints"); }), "no model_"));
    CHECK(contains(error_of([&] { inspect_model(dir / "nowhere"); }), "cannot open"));
}

TEST_CASE("checkpoint: the tokenizer is beside the model, or beside the checkpoints") {
    TempDir dir;
    const fs::path at = make_checkpoint(dir.path(), micro_spec());
    CHECK(fs::equivalent(find_tokenizer(inspect_model(at)), dir / "tokenizer/tokenizer.pkl"));
    write_tokenizer(at / "tokenizer.pkl", make_tokenizer(320));
    CHECK(fs::equivalent(find_tokenizer(inspect_model(at)), at / "tokenizer.pkl"));
    TempDir alone;
    CheckpointSpec spec = micro_spec();
    spec.tokenizer = false;
    const ModelInfo info = inspect_model(make_checkpoint(alone.path(), spec));
    ::setenv("NANOCHAT_BASE_DIR", alone.path().c_str(), 1);
    try {
        find_tokenizer(info);
        FAIL("found");
    } catch (const nanogpt::Error& e) {
        CHECK(e.kind == nanogpt::ErrorKind::not_found);
        CHECK(contains(e.what(), "tokenizer.pkl"));
    }
    ::unsetenv("NANOCHAT_BASE_DIR");
}

TEST_CASE(
    "checkpoint: the base directory is the one given, then the environment's, then the cache's") {
    ::setenv("NANOCHAT_BASE_DIR", "/some/where", 1);
    CHECK(nanogpt::base_dir() == "/some/where");
    CHECK(nanogpt::base_dir("/else") == "/else");
    ::setenv("NANOCHAT_BASE_DIR", "", 1);
    CHECK(nanogpt::base_dir().parent_path().filename() == ".cache");
    CHECK(nanogpt::base_dir().filename() == "nanochat");
    ::unsetenv("NANOCHAT_BASE_DIR");
}

// ---- A9 and the rules of detection ---------------------------------------------------------------

namespace {

struct Constants {
    Generation generation;
    float rope_base, qk_scale, softcap, ve_gate_scale;
    int ve_gate_channels;
    bool bf16_rope_tables;
};

Constants constants_of(Gen gen) {
    switch (gen) {
        case Gen::g0:
        case Gen::g0p:
            return {Generation::g0, 10000, 1, 15, 0, 0, true};
        case Gen::g1:
            return {Generation::g1, 10000, 1, 15, 0, 0, true};
        case Gen::g2:
            return {Generation::g2, 10000, 1, 15, 2, 32, true};
        case Gen::g2e:
            return {Generation::g2e, 10000, 1, 15, 2, 32, true};
        case Gen::g3:
            return {Generation::g3, 100000, 1.15f, 15, 3, 12, false};
        case Gen::g4:
            return {Generation::g4, 100000, 1.2f, 15, 3, 12, false};
    }
    return {};
}

bool right_constants(const Config& c, Gen gen, const Shape& s) {
    const Constants want = constants_of(gen);
    return c.generation == want.generation && c.rope_base == want.rope_base &&
           c.qk_scale == want.qk_scale && c.softcap == want.softcap &&
           c.ve_gate_scale == want.ve_gate_scale && c.ve_gate_channels == want.ve_gate_channels &&
           c.bf16_rope_tables == want.bf16_rope_tables && c.sequence_len == s.sequence_len &&
           c.vocab_size == s.vocab_size && c.n_layer == s.n_layer && c.n_head == s.n_head &&
           c.n_kv_head == s.n_kv_head && c.n_embd == s.n_embd &&
           c.vocab_rows == padded_rows(gen, s.vocab_size);
}

// The tensors of the checkpoint as the file has them: names, dtypes, shapes and every element.
bool right_tensors(const ModelInfo& info, const std::vector<NamedTensor>& want) {
    const nanogpt::detail::ZipFile zip{nanogpt::File(info.model_file)};
    const auto stored = nanogpt::detail::read_state_dict(zip);
    if (stored.size() != want.size() || info.tensors.size() != want.size()) return false;
    for (const NamedTensor& t : want) {
        const auto* s = nanogpt::detail::find_tensor(stored, t.name);
        if (s == nullptr || s->info.dtype != t.dtype || s->info.shape != t.shape) return false;
        const auto bytes = zip.read(*s->entry, 1u << 24);
        if (nanogpt::detail::as_text(bytes) != tensor_bytes(t)) return false;
    }
    return true;
}

std::vector<NamedTensor> narrow(Gen gen) { return make_weights(gen, kNarrow); }

NamedTensor& find(std::vector<NamedTensor>& tensors, const std::string& name) {
    for (NamedTensor& t : tensors) {
        if (t.name == name) return t;
    }
    throw std::runtime_error("no tensor " + name);
}
void drop(std::vector<NamedTensor>& tensors, const std::string& name) {
    std::erase_if(tensors, [&](const NamedTensor& t) { return t.name == name; });
}
void add(std::vector<NamedTensor>& tensors, const std::string& name,
         std::vector<std::int64_t> shape = {1}) {
    std::size_t count = 1;
    for (const std::int64_t n : shape) count *= static_cast<std::size_t>(n);
    tensors.push_back({name, std::move(shape), DType::f32, std::vector<float>(count, 0.5f)});
}

// Writes these tensors with the metadata of kNarrow, and inspects them.
ModelInfo inspect_tensors(const std::vector<NamedTensor>& tensors, const Overrides& overrides = {},
                          Gen meta = Gen::g4) {
    static const TempDir dir;
    const fs::path at = dir / "base_checkpoints/d2";
    write_state_dict(at / "model_000001.pt", tensors);
    write_meta(at / "meta_000001.json", meta, kNarrow, 1);
    return inspect_model(at, -1, overrides);
}

}  // namespace

TEST_CASE("checkpoint: A9, good files of every generation, dtype, prefix and depth are read") {
    std::size_t total = 0, passed = 0;
    for (const Gen gen : kAllGenerations) {
        for (const Save save : {Save::f32, Save::bf16, Save::trained, Save::f16}) {
            for (const char* prefix : {"", "_orig_mod.", "module."}) {
                for (const int layers : {2, 12}) {
                    if ((save == Save::f16 || *prefix == 'm') && layers == 12) continue;
                    CAPTURE(std::string(name_of(gen)));
                    CAPTURE(std::string(prefix));
                    CAPTURE(layers);
                    TempDir dir;
                    Shape shape = kNarrow;
                    shape.n_layer = layers;
                    const fs::path at = make_checkpoint(dir.path(), gen, shape, save, prefix);
                    const ModelInfo info = inspect_model(at);
                    const bool constants = right_constants(info.config, gen, shape);
                    const bool tensors = right_tensors(info, make_weights(gen, shape, save));
                    CHECK(constants);
                    CHECK(tensors);
                    CHECK(find_models(dir.path())[0].status == Status::ready);
                    ++total;
                    passed += constants && tensors;
                }
            }
        }
    }
    CHECK(total >= 40);
    report("A9", passed, total);
}

TEST_CASE("checkpoint: parameters and bytes are counted, embeddings as they are stored") {
    TempDir dir;
    const Shape shape = kNarrow;
    const ModelInfo info =
        inspect_model(make_checkpoint(dir.path(), Gen::g4, shape, Save::trained));
    std::uint64_t parameters = 0, bytes = 0;
    for (const NamedTensor& t : make_weights(Gen::g4, shape, Save::trained)) {
        parameters += t.values.size();
        bytes += t.values.size() * (t.dtype == DType::bf16 ? 2 : 4);
    }
    CHECK(static_cast<std::uint64_t>(info.parameters) == parameters);
    CHECK(info.memory_bytes == bytes);
    CHECK(info.file_bytes == fs::file_size(info.model_file));
    CHECK(info.modified > 1500000000);
}

TEST_CASE("checkpoint: short windows follow the generation and the context") {
    const int kContext[] = {256, 512, 1024, 2048, 4096};
    const std::pair<Gen, std::vector<int>> kWant[] = {{Gen::g1, {128, 256, 512, 1024, 2048}},
                                                      {Gen::g2, {128, 256, 512, 1024, 2048}},
                                                      {Gen::g2e, {128, 256, 512, 1024, 2048}},
                                                      {Gen::g3, {128, 256, 384, 768, 1408}},
                                                      {Gen::g4, {128, 128, 256, 512, 1024}}};
    for (const auto& [gen, want] : kWant) {
        for (std::size_t i = 0; i < want.size(); ++i) {
            TempDir dir;
            Shape shape = kNarrow;
            shape.sequence_len = kContext[i];
            const Config c = inspect_model(make_checkpoint(dir.path(), gen, shape)).config;
            CHECK(c.short_window == want[i]);
            CHECK(c.window(0) == want[i]);
            CHECK(c.window(1) == kContext[i]);
        }
    }
}

TEST_CASE("checkpoint: a pattern is tiled, in any case, and the last layer is always full") {
    TempDir dir;
    Shape shape = kNarrow;
    shape.n_layer = 6;
    shape.window_pattern = "sSl";
    const Config c = inspect_model(make_checkpoint(dir.path(), Gen::g4, shape)).config;
    const int S = shape.sequence_len, s = c.short_window;
    const int want[] = {s, s, S, s, s, S};
    for (int i = 0; i < 6; ++i) CHECK(c.window(i) == want[i]);
    shape.window_pattern = "S";
    const Config d = inspect_model(make_checkpoint(dir.path(), Gen::g1, shape)).config;
    CHECK(d.window(4) == 32);
    CHECK(d.window(5) == 64);
    const Config g0 = inspect_model(make_checkpoint(dir.path(), Gen::g0, shape)).config;
    CHECK(g0.window(0) == INT_MAX);
}

TEST_CASE("checkpoint: value embeddings belong to every other layer, the last one included") {
    Config c;
    c.generation = Generation::g2;
    for (const int layers : {1, 2, 5, 12}) {
        c.n_layer = layers;
        CHECK(c.has_value_embed(layers - 1));
        if (layers > 1) CHECK(!c.has_value_embed(layers - 2));
    }
    c.generation = Generation::g1;
    CHECK(!c.has_value_embed(c.n_layer - 1));
}

TEST_CASE("checkpoint: tensors of nanochat's unmerged branches are named and not run") {
    for (const char* name :
         {"v0_lambdas", "value_embed.weight", "value_embed_A.weight", "value_embed_B.weight",
          "transformer.h.0.moe.router.gate", "transformer.h.1.mlp.router.weight",
          "transformer.h.0.mlp.experts.w_up", "transformer.h.0.moe.expert_bias"}) {
        CAPTURE(std::string(name));
        auto tensors = narrow(Gen::g2);
        add(tensors, name);
        try {
            inspect_tensors(tensors);
            FAIL("not refused");
        } catch (const nanogpt::Error& e) {
            CHECK(e.kind == nanogpt::ErrorKind::unsupported);
            CHECK(contains(e.what(), name));
            CHECK(contains(e.what(), "unmerged"));
        }
    }
}

TEST_CASE("checkpoint: sets of tensors that no generation has are refused with the difference") {
    struct Case {
        Gen gen;
        std::function<void(std::vector<NamedTensor>&)> change;
        std::string reason;
    };
    const std::string q = "transformer.h.0.attn.c_q.weight";
    const std::string gate = "transformer.h.1.attn.ve_gate.weight";
    const Case cases[] = {
        {Gen::g4, [&](auto& t) { drop(t, q); }, "lacks 1 tensors: transformer.h.0.attn.c_q.weight"},
        {Gen::g4, [](auto& t) { drop(t, "lm_head.weight"); }, "lm_head.weight"},
        {Gen::g4, [](auto& t) { drop(t, "transformer.wte.weight"); }, "not a nanochat model"},
        {Gen::g4, [](auto& t) { drop(t, "smear_lambda"); }, "only some of smear_gate.weight"},
        {Gen::g4, [](auto& t) { drop(t, "smear_gate.weight"); }, "only some of smear_gate.weight"},
        {Gen::g4, [](auto& t) { drop(t, "backout_lambda"); }, "only some of smear_gate.weight"},
        {Gen::g3, [](auto& t) { add(t, "smear_lambda"); }, "only some of smear_gate.weight"},
        {Gen::g4, [](auto& t) { drop(t, "x0_lambdas"); }, "x0_lambdas"},
        {Gen::g2, [](auto& t) { drop(t, "resid_lambdas"); }, "resid_lambdas"},
        {Gen::g2e, [](auto& t) { drop(t, "bigram_lambdas"); }, "bigram_lambdas"},
        {Gen::g2e, [](auto& t) { drop(t, "bigram_embed.embed.weight"); }, "bigram_embed"},
        {Gen::g4, [](auto& t) { drop(t, "value_embeds.1.weight"); }, "value_embeds.1.weight"},
        {Gen::g1, [](auto& t) { add(t, "value_embeds.1.weight"); }, "unknown tensors"},
        {Gen::g4,
         [](auto& t) {
             add(t, "value_embeds.0.weight", {320, 16});
         },
         "unknown tensors"},
        {Gen::g4, [](auto& t) { add(t, "transformer.h.2.mlp.c_fc.weight"); }, "unknown tensors"},
        {Gen::g0, [](auto& t) { add(t, "transformer.wpe.weight"); }, "transformer.wpe.weight"},
        {Gen::g0, [](auto& t) { add(t, "lm_head.bias"); }, "lm_head.bias"},
        {Gen::g0, [](auto& t) { add(t, "\x1b[31m"); }, "\\x1b[31m"},
        {Gen::g4,
         [&](auto& t) {
             find(t, gate).shape = {12, 1};
         },
         "1 columns"},
        {Gen::g4,
         [&](auto& t) {
             find(t, q).shape = {16, 64};
         },
         "is (16, 64), the config needs"},
        {Gen::g4, [&](auto& t) { find(t, q).shape = {1024}; }, "is (1024), the config needs"},
        {Gen::g4,
         [](auto& t) {
             find(t, "resid_lambdas").shape = {2, 1};
         },
         "is (2, 1)"},
        {Gen::g4, [&](auto& t) { find(t, "transformer.wte.weight").shape = {10240}; },
         "not a nanochat model"},
    };
    for (const Case& c : cases) {
        CAPTURE(c.reason);
        auto tensors = narrow(c.gen);
        c.change(tensors);
        const std::string why = error_of([&] { inspect_tensors(tensors); });
        CHECK_MESSAGE(contains(why, c.reason), "refused with: ", why);
        CHECK(error_of([&] { inspect_tensors(narrow(c.gen)); }) == "");
    }
}

TEST_CASE("checkpoint: gates of other widths, and mixed ones, are not guessed at") {
    for (const std::int64_t width : {1, 11, 16, 24, 64}) {
        auto tensors = narrow(Gen::g2);
        NamedTensor& gate = find(tensors, "transformer.h.1.attn.ve_gate.weight");
        gate.shape = {1, width};
        gate.values.assign(static_cast<std::size_t>(width), 0.5f);
        CHECK(contains(error_of([&] { inspect_tensors(tensors); }), std::to_string(width)));
    }
    auto tensors = narrow(Gen::g2);
    add(tensors, "transformer.h.0.attn.ve_gate.weight", {1, 12});
    CHECK(contains(error_of([&] { inspect_tensors(tensors); }), "12 and of 32"));
}

TEST_CASE("checkpoint: a G1 file without one kind of lambdas is G1 all the same") {
    for (const char* name : {"resid_lambdas", "x0_lambdas"}) {
        auto tensors = narrow(Gen::g1);
        drop(tensors, name);
        CHECK(inspect_tensors(tensors).config.generation == Generation::g1);
    }
}

TEST_CASE("checkpoint: weights that are no floats are refused") {
    auto tensors = narrow(Gen::g0);
    std::vector<std::string> storages;
    for (const NamedTensor& t : tensors) storages.push_back(tensor_bytes(t));
    find(tensors, "lm_head.weight").dtype = DType::i32;
    StateDictPickle::Options options;
    options.modules = {""};
    TempDir dir;
    write_file(
        dir / "d1/model_000001.pt",
        torch_zip("model_000001", StateDictPickle::write(tensors, options), storages).bytes());
    write_meta(dir / "d1/meta_000001.json", Gen::g0, kNarrow, 1);
    CHECK(contains(error_of([&] { inspect_model(dir / "d1"); }), "holds int32"));
}

TEST_CASE("checkpoint: G0 with a window pattern ignores it with a warning, unless one insists") {
    ModelInfo info = inspect_tensors(narrow(Gen::g0), {}, Gen::g4);
    CHECK(info.config.window(0) == INT_MAX);
    CHECK(warns(info, "window_pattern"));
    CHECK(inspect_tensors(narrow(Gen::g0), {}, Gen::g0).warnings.empty());
    Overrides insist;
    insist.window_pattern = "SL";
    CHECK(error_of([&] { inspect_tensors(narrow(Gen::g0), insist, Gen::g0); }).find("no windows") !=
          std::string::npos);
    insist.window_pattern = "L";
    CHECK(inspect_tensors(narrow(Gen::g0), insist, Gen::g0).config.window(0) == INT_MAX);
}

TEST_CASE("checkpoint: a width below what the gates of a generation read is refused") {
    TempDir dir;
    for (const Gen gen : {Gen::g2, Gen::g3, Gen::g4}) {
        const Shape shape{32, 320, 1, 1, 1, 8, "L"};
        const fs::path at = make_checkpoint(dir.path(), gen, shape);
        CHECK(error_of([&] { inspect_model(at); }).find("channels") != std::string::npos);
    }
}

TEST_CASE("checkpoint: rows beyond the vocabulary other than nanochat's padding are a warning") {
    for (const std::int64_t rows : {300, 320, 304, 384}) {
        auto tensors = narrow(Gen::g0);
        for (const char* name : {"transformer.wte.weight", "lm_head.weight"}) {
            find(tensors, name).shape[0] = rows;
            find(tensors, name).values.resize(static_cast<std::size_t>(rows) * 32, 0.25f);
        }
        const ModelInfo info = inspect_tensors(tensors, {}, Gen::g0);
        CHECK(info.config.vocab_rows == rows);
        CHECK(warns(info, "padded") == (rows == 304 || rows == 384));
    }
    auto tensors = narrow(Gen::g0);
    find(tensors, "lm_head.weight").shape[0] = 320;
    find(tensors, "lm_head.weight").values.resize(320 * 32);
    CHECK(contains(error_of([&] { inspect_tensors(tensors, {}, Gen::g0); }), "lm_head.weight is"));
}

TEST_CASE("checkpoint: a missing window pattern is L, with a warning that names the base model's") {
    TempDir dir;
    CheckpointSpec spec = micro_spec();
    spec.shape = kNarrow;
    make_checkpoint(dir.path(), spec);
    spec.directory = "mid_checkpoints";
    const fs::path mid = make_checkpoint(dir.path(), spec);
    write_meta(mid / "meta_000200.json", Gen::g0, kNarrow, 200);
    const ModelInfo info = inspect_model(mid);
    CHECK(info.config.window_pattern == "L");
    CHECK(setting(info, "window_pattern") == "L assumed");
    CHECK(warns(info, "window_pattern is not stored"));
    CHECK(warns(info, "\"SL\""));
}

TEST_CASE(
    "checkpoint: the soft cap of G2 is 15, or 20 where the base model's eval_tokens says so") {
    struct Case {
        const char* extra;
        float want;
    };
    const Case cases[] = {{"", 15},
                          {"\"user_config\": {\"eval_tokens\": 10485760},", 15},
                          {"\"user_config\": {\"eval_tokens\": 20971520},", 15},
                          {"\"user_config\": {\"eval_tokens\": 41943040},", 20},
                          {"\"user_config\": {\"eval_tokens\": \"41943040\"},", 15},
                          {"\"user_config\": null,", 15},
                          {"\"user_config\": {\"eval_tokens\": 524288},", 15}};
    for (const Case& c : cases) {
        CAPTURE(std::string(c.extra));
        TempDir dir;
        CheckpointSpec spec;
        spec.gen = Gen::g2;
        spec.shape = kNarrow;
        const fs::path base = make_checkpoint(dir.path(), spec);
        write_meta(base / "meta_000200.json", Gen::g2, kNarrow, 200, c.extra);
        spec.directory = "chatsft_checkpoints";
        const fs::path sft = make_checkpoint(dir.path(), spec);
        for (const fs::path& at : {base, sft}) {
            const ModelInfo info = inspect_model(at);
            CHECK(info.config.softcap == c.want);
            CHECK(contains(setting(info, "softcap"), "assumed"));
            CHECK(warns(info, "softcap"));
        }
    }
}

TEST_CASE("checkpoint: overrides win over the file, and are marked so") {
    TempDir dir;
    const fs::path at = make_checkpoint(dir.path(), Gen::g4, kNarrow);
    Overrides o;
    o.softcap = 20.0f;
    o.rope_base = 500.0f;
    o.qk_scale = 1.5f;
    o.window_pattern = "SSL";
    o.short_window = 7;
    o.sequence_len = 48;
    o.bf16_rope_tables = true;
    const ModelInfo info = inspect_model(at, -1, o);
    CHECK(info.config.softcap == 20);
    CHECK(info.config.rope_base == 500);
    CHECK(info.config.qk_scale == 1.5f);
    CHECK(info.config.window_pattern == "SSL");
    CHECK(info.config.window(0) == 7);
    CHECK(info.config.window(1) == 48);
    CHECK(info.config.bf16_rope_tables);
    for (const char* name : {"softcap", "rope_base", "qk_scale", "window_pattern", "short_window",
                             "sequence_len", "rope_table"}) {
        CHECK(contains(setting(info, name), "overridden"));
    }
    const ModelInfo plain = inspect_model(at);
    CHECK(setting(plain, "softcap") == "15 implied");
    CHECK(setting(plain, "sequence_len") == "64 stored");
    CHECK(setting(plain, "window_pattern") == "SL stored");
    CHECK(contains(setting(plain, "generation"), "g4"));
}

TEST_CASE("checkpoint: overrides that make no sense are refused") {
    TempDir dir;
    const fs::path at = make_checkpoint(dir.path(), Gen::g4, kNarrow);
    const auto refused = [&](const std::function<void(Overrides&)>& change) {
        Overrides o;
        change(o);
        return error_of([&] { inspect_model(at, -1, o); }) != "";
    };
    constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
    constexpr float kInfinity = std::numeric_limits<float>::infinity();
    CHECK(refused([](Overrides& o) { o.window_pattern = ""; }));
    CHECK(refused([](Overrides& o) { o.window_pattern = "SX"; }));
    CHECK(refused([](Overrides& o) { o.sequence_len = 0; }));
    CHECK(refused([](Overrides& o) { o.sequence_len = -5; }));
    CHECK(refused([](Overrides& o) { o.short_window = -1; }));
    for (const float bad : {kNaN, kInfinity, 0.0f, -1.0f}) {
        CAPTURE(bad);
        CHECK(refused([=](Overrides& o) { o.softcap = bad; }));
        CHECK(refused([=](Overrides& o) { o.rope_base = bad; }));
    }
    CHECK(refused([=](Overrides& o) { o.qk_scale = kNaN; }));
    CHECK(refused([](Overrides& o) { o.generation = Generation::g3; }));
    CHECK(!refused([](Overrides& o) { o.generation = Generation::g4; }));
}

TEST_CASE("checkpoint: the container around the pickle is checked") {
    struct Case {
        std::function<void(ZipWriter&)> change;
        std::string reason;
    };
    const Case cases[] = {
        {[](ZipWriter& z) { z["data.pkl"].name = "m/data.pickle"; }, "no entry data.pkl"},
        {[](ZipWriter& z) { z.add("other/data.pkl", z["data.pkl"].data); }, "two entries data.pkl"},
        {[](ZipWriter& z) { z["byteorder"].data = "big"; }, "byte order \"big\""},
        {[](ZipWriter& z) { z["m/version"].data = "11\n"; }, "container version"},
        {[](ZipWriter& z) { z["m/version"].data = "0"; }, "container version"},
        {[](ZipWriter& z) { z["m/version"].data = "three"; }, "container version"},
        {[](ZipWriter& z) { z["m/version"].data = std::string(100, '3'); }, "at most 64"},
        {[](ZipWriter& z) { z.add("m/constants.pkl", "x"); }, "TorchScript"},
        {[](ZipWriter& z) { z.add("m/code/__torch__.py", "x"); }, "TorchScript"},
        {[](ZipWriter& z) { z.add("m/run.sh", "x"); }, "unknown entry"},
        {[](ZipWriter& z) { z.add("elsewhere/data/99", "x"); }, "outside the folder"},
        {[](ZipWriter& z) { z["data/3"].name = "m/data/333"; }, "no entry data/3"},
    };
    TempDir dir;
    const std::vector<NamedTensor> tensors = narrow(Gen::g0);
    write_meta(dir / "d1/meta_000001.json", Gen::g0, kNarrow, 1);
    for (const Case& c : cases) {
        CAPTURE(c.reason);
        ZipWriter zip = state_dict_zip("m", tensors);
        c.change(zip);
        write_file(dir / "d1/model_000001.pt", zip.bytes());
        const std::string why = error_of([&] { inspect_model(dir / "d1"); });
        CHECK_MESSAGE(contains(why, c.reason), "refused with: ", why);
    }
    ZipWriter old = state_dict_zip("archive", tensors);  // torch 1.13: three kinds of records
    std::erase_if(old.entries, [](const ZipEntry& e) {
        return contains(e.name, "/.") || contains(e.name, "byteorder");
    });
    write_file(dir / "d1/model_000001.pt", old.bytes());
    CHECK(error_of([&] { inspect_model(dir / "d1"); }) == "");
}

TEST_CASE("checkpoint: a plain dict is a state dict as well") {
    TempDir dir;
    StateDictPickle::Options options;
    options.plain_dict = true;
    write_state_dict(dir / "d1/model_000001.pt", narrow(Gen::g4), options);
    write_meta(dir / "d1/meta_000001.json", Gen::g4, kNarrow, 1);
    CHECK(inspect_model(dir / "d1").config.generation == Generation::g4);
}
