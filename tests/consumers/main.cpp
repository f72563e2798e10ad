#include <cstdio>

#include "nanogpt.hpp"

int main(int argc, char** argv) {
    if (argc != 3) return 2;
    auto tokenizer = nanogpt::load_tokenizer(argv[2]);
    auto backend = nanogpt::open_cpu(nanogpt::load_model(argv[1]));
    nanogpt::Chat chat(*backend, tokenizer, {.sampling = {.temperature = 0.6f, .top_k = 50}});
    chat.reply("Why is the sky blue?", [](std::string_view text) {
        return std::fwrite(text.data(), 1, text.size(), stdout) == text.size();
    });
}
