// gpu.cuh: what the tests of kernels.cuh share. Without a GPU every test case says so and passes.
#pragma once

#include <cmath>   // sqrt, abs
#include <memory>  // shared_ptr

#include "helpers.hpp"
#include "kernels.cuh"

namespace test {

// Says why and returns true if there is no GPU to test on. First line of every test case.
inline bool no_gpu() {
    static const std::string problem = nanogpt::cuda_problem();
    if (!problem.empty()) MESSAGE("skipped: ", problem);
    return !problem.empty();
}

// ---- where things are: the program may run on another machine than it was compiled on

// The source tree: $NANOGPT_SOURCE, else where it was compiled, else the working directory.
inline fs::path repository() {
    std::error_code ignored;
    const char* given = std::getenv("NANOGPT_SOURCE");
    for (const fs::path& dir :
         {fs::path(given != nullptr ? given : ""), source_dir(), fs::current_path(ignored)}) {
        if (!dir.empty() && fs::is_directory(dir / "tools" / "sample", ignored)) return dir;
    }
    return {};
}

// The large fixtures: $NANOGPT_SHARED, else shared/ beside the source tree or in it. Empty if
// absent.
inline fs::path fixtures() {
    std::error_code ignored;
    const char* given = std::getenv("NANOGPT_SHARED");
    for (const fs::path& dir : {fs::path(given != nullptr ? given : ""),
                                repository().parent_path() / "shared", repository() / "shared"}) {
        if (!dir.empty() && fs::is_directory(dir / "fixtures", ignored)) return dir;
    }
    return {};
}

// ---- numbers

// |got - want| / |want| in the Euclidean norm, over all that was added; infinity once a value is
// not finite or is missing.
class Distance {
public:
    template <class Want>
    void add(std::span<const float> got, std::span<const Want> want) {
        if (got.size() != want.size()) bad_ = true;
        for (std::size_t i = 0; i < std::min(got.size(), want.size()); ++i) {
            const double w = static_cast<double>(want[i]), d = double{got[i]} - w;
            if (!is_finite(got[i])) bad_ = true;
            difference_ += d * d, size_ += w * w;
        }
    }
    double relative() const {
        if (bad_) return std::numeric_limits<double>::infinity();
        return difference_ == 0 ? 0 : std::sqrt(difference_ / size_);
    }

private:
    double difference_ = 0, size_ = 0;
    bool bad_ = false;
};

template <class Want>
double relative_l2(std::span<const float> got, std::span<const Want> want) {
    Distance d;
    d.add(got, want);
    return d.relative();
}
inline double relative_l2(const std::vector<float>& got, const std::vector<double>& want) {
    return relative_l2<double>(std::span(got), std::span(want));
}
inline double relative_l2(const std::vector<float>& got, const std::vector<float>& want) {
    return relative_l2<float>(std::span(got), std::span(want));
}

}  // namespace test
