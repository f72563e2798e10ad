// allocations.cpp: counts what the program allocates by new. Apart, as nvcc would compile these for
// the GPU too.
#include <atomic>   // atomic
#include <cstdlib>  // malloc, free
#include <new>      // bad_alloc

extern std::atomic<long> allocations;
std::atomic<long> allocations{0};

void* operator new(std::size_t bytes) {
    ++allocations;
    if (void* const p = std::malloc(bytes)) return p;
    throw std::bad_alloc();
}
void operator delete(void* p) noexcept { std::free(p); }
void operator delete(void* p, std::size_t) noexcept { std::free(p); }
