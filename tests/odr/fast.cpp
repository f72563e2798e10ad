// Compiled with -O3 -ffast-math -DNDEBUG and for this very processor.
#include "probe.hpp"

odr::Layout odr::fast_layout() { return make_layout(); }
odr::Result odr::fast_result(const std::string& checkpoint) { return make_result(checkpoint); }
