// Compiled with -O0; compares what it sees of nanogpt.hpp with what fast.cpp sees. Two files of one
// program may be compiled with different flags, and the linker keeps one body of each inline function.
#include "probe.hpp"

// The helpers' messages need no test runner here.
#define DOCTEST_CONFIG_DISABLE
#include <cmath>   // abs
#include <cstdio>  // printf

#include "helpers.hpp"

odr::View odr::plain_view(const std::string& checkpoint) { return make_view(checkpoint); }

// Two orders of the same sums, at most some 100 of them: fast.cpp may have inlined what it reordered.
constexpr float kTolerance = 1e-4f;

int main() {
    const test::TempDir dir;
    const std::string checkpoint =
        test::make_checkpoint(dir.path(), test::CheckpointSpec{}).string();
    const odr::View plain = odr::plain_view(checkpoint), fast = odr::fast_view(checkpoint);
    int failures = 0;
    for (std::size_t i = 0; i < plain.layout.size(); ++i) {
        const auto& [name, bytes] = plain.layout[i];
        if (fast.layout.at(i).second == bytes) continue;
        std::printf("%s: %zu bytes in one file, %zu in the other\n", name.c_str(), bytes,
                    fast.layout[i].second);
        ++failures;
    }
    if (plain.text != fast.text) {
        std::printf("text: '%s' and '%s'\n", plain.text.c_str(), fast.text.c_str());
        ++failures;
    }
    const test::Difference worst = test::difference(plain.logits, fast.logits);
    std::printf("logits: %zu values, the largest difference is %g\n", plain.logits.size(),
                worst.largest);
    if (plain.logits.empty() || !(worst.largest <= double{kTolerance})) ++failures;
    std::printf("odr: %zu sizes and offsets compared, %d differences\n", plain.layout.size(),
                failures);
    return failures == 0 ? 0 : 1;
}
