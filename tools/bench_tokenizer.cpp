// Times Tokenizer::encode over files, one thread; bench_tokenizer.py compares it with tiktoken.
//   bench_tokenizer <tokenizer.pkl> <rounds> <file>...
// Prints a line per file: bytes, tokens, FNV-1a of the ids, and the seconds of each round; first of
// all a line with the seconds that load_tokenizer took in each of `rounds` rounds.
#include <chrono>
#include <cstdio>
#include <cstdlib>

#include "nanogpt.hpp"

static double now() {  // seconds
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch())
        .count();
}

int main(int argc, char** argv) try {
    if (argc < 4)
        return std::fputs("usage: bench_tokenizer tokenizer.pkl rounds file...\n", stderr), 2;
    const int rounds = std::atoi(argv[2]);
    std::printf("load");
    for (int i = 0; i < rounds; ++i) {
        const double start = now();
        nanogpt::load_tokenizer(argv[1]);
        std::printf(" %.6f", now() - start);
    }
    std::printf("\n");
    const nanogpt::Tokenizer tokenizer = nanogpt::load_tokenizer(argv[1]);
    for (int file = 3; file < argc; ++file) {
        const std::vector<std::byte> bytes = nanogpt::detail::read_file(argv[file], 1U << 30);
        const std::string_view text = nanogpt::detail::as_text(bytes);
        std::vector<nanogpt::Token> tokens = tokenizer.encode(text);  // a round to warm up
        std::uint64_t hash = 0xCBF29CE484222325U;
        for (const nanogpt::Token token : tokens) {
            hash = (hash ^ static_cast<std::uint32_t>(token)) * 0x100000001B3U;
        }
        std::printf("%zu %zu %016llx", text.size(), tokens.size(),
                    static_cast<unsigned long long>(hash));
        for (int i = 0; i < rounds; ++i) {
            const double start = now();
            tokens = tokenizer.encode(text);
            std::printf(" %.6f", now() - start);
        }
        std::printf("\n");
    }
} catch (const std::exception& e) {
    return std::fprintf(stderr, "bench_tokenizer: %s\n", e.what()), 1;
}
