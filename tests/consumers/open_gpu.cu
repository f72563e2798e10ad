// All of a program that nvcc has to compile; the rest of it includes nanogpt.hpp alone.
#include "kernels.cuh"
std::unique_ptr<nanogpt::Backend> open_gpu(std::shared_ptr<const nanogpt::Model> model) {
    return nanogpt::open_cuda(std::move(model));
}
