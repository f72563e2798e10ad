#include "nanogpt.hpp"

int main() {}
