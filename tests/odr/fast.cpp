// Compiled with -O3 -ffast-math -DNDEBUG and for this very processor.
#include "probe.hpp"

odr::View odr::fast_view(const std::string& checkpoint) { return make_view(checkpoint); }
