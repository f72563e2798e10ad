// The implementation of doctest, alone in its file: it costs 4 s here once and next to nothing in
// the files that only use it.
#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include <doctest/doctest.h>
