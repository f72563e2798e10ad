// bench_cpu: how fast the forward pass runs on this CPU, against what its memory can deliver.
//
//   bench_cpu CHECKPOINT_DIR [threads] [float32|bfloat16]
//
// Measures a prompt of 512 tokens, then in turns, with the same threads, the read bandwidth over a buffer as
// large as the weights and decoding (one token a step: every weight is read once). Medians; the last line is
// JSON.
#include <cstdio>
#include <string>
#include <vector>

#include "nanogpt.hpp"

namespace {

double seconds() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch())
        .count();
}
double median(std::vector<double> v) {
    std::sort(v.begin(), v.end());
    return v[v.size() / 2];
}

// Bytes of weights that one decoded token reads: all matrices but the embedding tables.
double weight_bytes(const nanogpt::Model& model) {
    double bytes = static_cast<double>(model.config().vocab_size) *
                   static_cast<double>(model.weights().lm_head.cols()) *
                   static_cast<double>(nanogpt::size_of(model.weights().lm_head.dtype));
    for (const nanogpt::Layer& l : model.weights().layers) {
        for (const nanogpt::Tensor* t :
             {&l.c_q, &l.c_k, &l.c_v, &l.attn_c_proj, &l.c_fc, &l.mlp_c_proj}) {
            bytes += static_cast<double>(t->bytes());
        }
    }
    return bytes;
}

// A buffer as large as the weights, which no cache holds; read() reads all of it once.
class Memory {
public:
    Memory(nanogpt::ThreadPool& pool, std::size_t bytes)
        : pool_(pool), parts_(bytes / kPart), buffer_(nanogpt::detail::allocate(parts_ * kPart)) {
        auto* words = reinterpret_cast<std::uint64_t*>(buffer_.get());
        for (std::size_t i = 0; i < parts_ * kPart / 8; ++i) words[i] = i * 0x9e3779b97f4a7c15u;
    }
    double read() {  // bytes per second
        const double start = seconds();
        pool_.run(parts_, [&](std::size_t part) {
            const auto* p = reinterpret_cast<const std::uint64_t*>(buffer_.get() + part * kPart);
            std::uint64_t sum[16] = {};
            for (std::size_t i = 0; i < kPart / 8; i += 16) {
                for (std::size_t l = 0; l < 16; ++l) sum[l] += p[i + l];
            }
            for (const std::uint64_t s : sum) all_.fetch_add(s, std::memory_order_relaxed);
        });
        return static_cast<double>(parts_ * kPart) / (seconds() - start);
    }

private:
    static constexpr std::size_t kPart = std::size_t{256} << 10;
    nanogpt::ThreadPool& pool_;
    std::size_t parts_;
    std::shared_ptr<std::byte> buffer_;
    std::atomic<std::uint64_t> all_{0};  // so that the sums are used
};

int run(int argc, char** argv) {
    const int threads = argc > 2 ? std::stoi(argv[2]) : 0;
    const bool bf16 = argc > 3 && std::string(argv[3]) == "bfloat16";
    const auto model = nanogpt::load_model(
        argv[1], {.dtype = bf16 ? nanogpt::DType::bf16 : nanogpt::DType::f32, .threads = threads});
    std::vector<nanogpt::Token> prompt(512);
    for (std::size_t i = 0; i < prompt.size(); ++i) {
        prompt[i] = static_cast<nanogpt::Token>(
            i * 7919 % static_cast<std::size_t>(model->config().vocab_size));
    }
    nanogpt::KVCache cache(*model, 1024);
    std::vector<double> prefill, decode;
    for (int i = 0; i < 4; ++i) {
        cache.rewind(0);
        const double start = seconds();
        nanogpt::forward(*model, cache, prompt);
        if (i > 0) prefill.push_back(seconds() - start);  // the first touches fresh pages
    }
    const double bytes = weight_bytes(*model);
    Memory memory(model->pool(), static_cast<std::size_t>(bytes));
    std::vector<double> bandwidth;
    cache.rewind(64);
    for (int i = 0; i < 120; ++i) {  // the two take turns: what else the machine does slows both
        if (i % 4 == 0) bandwidth.push_back(memory.read());
        const double start = seconds();
        nanogpt::forward(*model, cache, {&prompt[static_cast<std::size_t>(i)], 1});
        decode.push_back(seconds() - start);
    }
    const double limit = median(bandwidth);
    const double token = median(decode), prompt_time = median(prefill), reached = bytes / token;
    std::printf("%s, %d threads, weights %s\n", nanogpt::cpu_features().c_str(),
                model->pool().size(), bf16 ? "bfloat16" : "float32");
    std::printf("read bandwidth   %8.2f GB/s\n", limit * 1e-9);
    std::printf(
        "decode           %8.2f ms a token, %.1f MB of weights, %.2f GB/s = %.2f of the "
        "bandwidth\n",
        token * 1e3, bytes * 1e-6, reached * 1e-9, reached / limit);
    std::printf("prefill of 512   %8.1f ms, %.1f tok/s\n", prompt_time * 1e3, 512 / prompt_time);
    std::printf(
        "{\"threads\":%d,\"dtype\":\"%s\",\"bandwidth\":%.4g,\"bytes\":%.6g,\"token_s\":%.5g,"
        "\"share\":%.3f,\"prefill_s\":%.5g}\n",
        model->pool().size(), bf16 ? "bfloat16" : "float32", limit, bytes, token, reached / limit,
        prompt_time);
    return 0;
}

}  // namespace

int main(int argc, char** argv) {
    if (argc < 2) return std::puts("bench_cpu CHECKPOINT_DIR [threads] [float32|bfloat16]"), 2;
    try {
        return run(argc, argv);
    } catch (const std::exception& e) {
        std::fprintf(stderr, "bench_cpu: %s\n", e.what());
        return 1;
    }
}
