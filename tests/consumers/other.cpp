#include "nanogpt.hpp"

float other(std::uint16_t bits);
float other(std::uint16_t bits) { return nanogpt::bf16_to_f32(bits); }
