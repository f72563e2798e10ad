// Included twice, between standard headers, and by two files of one program (this and other.cpp).
#include <cmath>

#include "nanogpt.hpp"
// On purpose: again.
#include "nanogpt.hpp"

#include <algorithm>

float other(std::uint16_t bits);

int main() {
    const std::uint16_t bits = 0x3fc0;  // 1.5 in bfloat16
    return other(bits) == nanogpt::bf16_to_f32(bits) ? 0 : 1;
}
