// trap.cu: a GPU that fails on demand. Preloaded into a program (LD_PRELOAD), it waits until the
// file named by NANOGPT_TRAP is there and then runs a kernel that traps, in the same context: from
// then on every CUDA call of the program fails, as after any fault on the device.
#include <cuda_runtime.h>  // cudaFuncGetAttributes, cudaDeviceSynchronize
#include <unistd.h>        // access, usleep

#include <cstdlib>  // getenv
#include <thread>   // thread

namespace {

__global__ void trap_kernel() { asm volatile("trap;"); }

struct Trap {
    Trap() {
        const char* const file = std::getenv("NANOGPT_TRAP");
        if (file == nullptr) return;
        std::thread([file] {
            cudaFuncAttributes attributes{};
            cudaFuncGetAttributes(&attributes, trap_kernel);  // loaded now, not when it is wanted
            while (::access(file, F_OK) != 0) ::usleep(1'000);
            trap_kernel<<<1, 1>>>();
            cudaDeviceSynchronize();
        }).detach();
    }
} trap;

}  // namespace
