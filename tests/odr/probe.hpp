// What a file sees of nanogpt.hpp under its own compiler flags: the layout of the public structs and
// the logits of one forward pass. plain.cpp and fast.cpp each make one and must see the same.
//
// Everything here is static on purpose: an inline function would be one for both files, and so hide
// what is looked for.
#pragma once

#include <cstddef>  // size_t, byte
#include <string>
#include <utility>  // pair
#include <vector>

#include "nanogpt.hpp"
// On purpose: the header a second time, which must change nothing.
#include "nanogpt.hpp"

namespace odr {

using Layout = std::vector<std::pair<std::string, std::size_t>>;  // bytes: a size or an offset

struct Result {
    std::vector<float> logits;  // (V)
    std::string text;           // of pure functions
};

// The two files, the same two functions each.
Layout plain_layout();
Layout fast_layout();
Result plain_result(const std::string& checkpoint);
Result fast_result(const std::string& checkpoint);

namespace {

template <class T, class Member>
std::size_t offset_in(const T& object, const Member& member) {
    return static_cast<std::size_t>(reinterpret_cast<const std::byte*>(&member) -
                                    reinterpret_cast<const std::byte*>(&object));
}

// Sizes, and offsets of last members: those move when any member before them does.
Layout make_layout() {
    using namespace nanogpt;
    Layout layout;
    const auto add = [&](const char* name, std::size_t n) { layout.emplace_back(name, n); };
    const auto last = [&](const char* name, const auto& object, const auto& member) {
        add(name, sizeof object);
        add(name, offset_in(object, member));
    };
    const Error error(ErrorKind::usage, "");
    const TensorInfo info{};
    const Tensor tensor{};
    const Json json{};
    const Config config{};
    const Overrides overrides{};
    const ModelInfo model{};
    const LoadOptions load{};
    const SamplingParams sampling{};
    const GenerateParams params{};
    const ReplyStats stats{};
    last("Error", error, error.offset);
    last("TensorInfo", info, info.shape);
    last("Tensor", tensor, tensor.data);
    last("Json", json, json.object);
    last("Config", config, config.bf16_rope_tables);
    last("Overrides", overrides, overrides.bf16_rope_tables);
    last("ModelInfo", model, model.modified);
    last("LoadOptions", load, load.progress);
    last("SamplingParams", sampling, sampling.seed);
    last("GenerateParams", params, params.stop);
    last("ReplyStats", stats, stats.stop_text);
    add("Activation", sizeof(Activation));
    add("Chunk", sizeof(Chunk));
    add("Generated", sizeof(Generated));
    add("Message", sizeof(Message));
    add("Model", sizeof(Model));
    add("KVCache", sizeof(KVCache));
    add("ThreadPool", sizeof(ThreadPool));
    add("Sampler", sizeof(Sampler));
    add("Tokenizer", sizeof(Tokenizer));
    add("Utf8Stream", sizeof(Utf8Stream));
    add("TextStream", sizeof(TextStream));
    add("CalculatorTool", sizeof(CalculatorTool));
    add("Chat", sizeof(Chat));
    return layout;
}

Result make_result(const std::string& checkpoint) {
    Result result;
    result.text = nanogpt::to_utf8("a\xff\xc3\xa9") + nanogpt::calculate("2+3*4").value_or("none");
    const auto model = nanogpt::load_model(checkpoint, {.threads = 2});
    nanogpt::KVCache cache(*model, 8);
    const std::vector<nanogpt::Token> tokens = {1, 2, 3, 5, 8};
    const auto logits = nanogpt::forward(*model, cache, tokens);
    result.logits.assign(logits.begin(), logits.end());
    return result;
}

}  // namespace
}  // namespace odr
