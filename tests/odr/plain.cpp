// Compiled with -O0; compares what it sees of nanogpt.hpp with what fast.cpp sees. Two files of one
// program may be compiled with different flags, and the linker keeps one body of each inline function.
#include "probe.hpp"

// The helpers' messages need no test runner here.
#define DOCTEST_CONFIG_DISABLE
#include <cstdio>  // printf

#include "helpers.hpp"

odr::Layout odr::plain_layout() { return make_layout(); }
odr::Result odr::plain_result(const std::string& checkpoint) { return make_result(checkpoint); }

namespace {

// Two orders of the same sums, some 100 of them each: fast.cpp may have inlined what it reordered.
constexpr double kTolerance = 1e-4;

int compare_layouts() {
    const odr::Layout plain = odr::plain_layout(), fast = odr::fast_layout();
    int differences = 0;
    for (std::size_t i = 0; i < plain.size(); ++i) {
        if (fast.at(i) == plain[i]) continue;
        std::printf("%s: %zu bytes in one file, %zu in the other\n", plain[i].first.c_str(),
                    plain[i].second, fast[i].second);
        ++differences;
    }
    std::printf("odr: %zu sizes and offsets, %d differ\n", plain.size(), differences);
    return differences;
}

int compare_results() {
    const test::TempDir dir;
    const test::CheckpointSpec tiny;
    const std::string checkpoint = test::make_checkpoint(dir.path(), tiny).string();
    const odr::Result plain = odr::plain_result(checkpoint), fast = odr::fast_result(checkpoint);
    const test::Difference worst = test::difference(plain.logits, fast.logits);
    const bool same_text = plain.text == fast.text;
    std::printf("odr: %zu logits, the largest difference is %g; the texts %s\n",
                plain.logits.size(), worst.largest, same_text ? "agree" : "differ");
    return same_text && !plain.logits.empty() && worst.largest <= kTolerance ? 0 : 1;
}

}  // namespace

// Nothing is run on structs that the two files see differently.
int main() { return compare_layouts() == 0 && compare_results() == 0 ? 0 : 1; }
