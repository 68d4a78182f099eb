// The C functions of the library: one launch each, or two. No torch, no Python: pointers, a plain struct, a stream.
#include <type_traits>

#ifdef __CUDACC__
#define SURGERY_SHARED(name) extern __shared__ __align__(16) char name[]
#else
#include "host.h"
#endif
#include "sink.cuh"

namespace {

#ifdef __CUDACC__
int launch(void (*kernel)(SinkParams), dim3 grid, size_t shared, void* stream, const SinkParams& params) {
  if (shared > 48 * 1024) {
    const auto error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared));
    if (error != cudaSuccess) return error;
  }
  kernel<<<grid, kThreads, shared, static_cast<cudaStream_t>(stream)>>>(params);
  return cudaGetLastError();
}
#endif

constexpr int kInvalid = -1;

dim3 grid_of(const SinkParams& p) {
  return dim3(unsigned(p.n_splits), unsigned(p.n_heads / p.group), unsigned(p.batch));
}

// sink keys and values, and their positions
template <typename L>
size_t sinks_bytes(const SinkParams& p) {
  return size_t(p.n_sinks) * 2 * L::kDim * sizeof(typename L::T) + size_t(p.n_sinks + 3) / 4 * 16;
}

template <typename L>
int forward(const SinkParams& p, void* stream) {
  return launch(sink_forward_kernel<L>, grid_of(p), sinks_bytes<L>(p), stream, p);
}

// fp16 has not the range: delta / dout overflows
template <typename L>
int fold(const SinkParams& p, void* stream) {
  if constexpr (std::is_same<typename L::T, Half>::value) return kInvalid;
  else return launch(sink_fold_kernel<L>, grid_of(p), 0, stream, p);
}

template <typename L>
int backward(const SinkParams& p, void* stream) {
  const size_t tiles = L::kTile * (2 * L::kDim * sizeof(typename L::T) + 2 * p.n_sinks * sizeof(float));
  const auto kernel = p.n_sinks <= 1   ? sink_backward_kernel<L, 1>
                      : p.n_sinks <= 4 ? sink_backward_kernel<L, 4>
                                       : sink_backward_kernel<L, kMaxSinks>;
  const int error = launch(kernel, grid_of(p), sinks_bytes<L>(p) + tiles, stream, p);
  if (error) return error;
  const dim3 grid(1, unsigned(p.n_heads / p.group), unsigned(p.batch));
  return launch(sink_reduce_kernel<typename L::T>, grid, 0, stream, p);
}

// The narrowest layout that holds a row.
#define SURGERY_DISPATCH(function, params, stream)                                                \
  switch (params->dtype) {                                                                        \
    case kFloat32:                                                                                \
      if (params->head_dim <= 64) return function<Layout<float, 16, 1>>(*params, stream);         \
      if (params->head_dim <= 128) return function<Layout<float, 32, 1>>(*params, stream);        \
      return function<Layout<float, 32, 2>>(*params, stream);                                     \
    case kFloat16:                                                                                \
      if (params->head_dim <= 64) return function<Layout<Half, 8, 1>>(*params, stream);           \
      if (params->head_dim <= 128) return function<Layout<Half, 16, 1>>(*params, stream);         \
      return function<Layout<Half, 32, 1>>(*params, stream);                                      \
    case kBFloat16:                                                                               \
      if (params->head_dim <= 64) return function<Layout<BFloat16, 8, 1>>(*params, stream);       \
      if (params->head_dim <= 128) return function<Layout<BFloat16, 16, 1>>(*params, stream);     \
      return function<Layout<BFloat16, 32, 1>>(*params, stream);                                  \
  }                                                                                               \
  return kInvalid

bool wrong(const SinkParams* p) {
  return p->head_dim < 8 || p->head_dim > 256 || p->head_dim % 8 || p->n_sinks < 0 || p->n_sinks > kMaxSinks;
}

}  // namespace

extern "C" {

// Size of the struct: a library of another version is not called.
int surgery_params_size() { return int(sizeof(SinkParams)); }

const char* surgery_error_string(int error) {
#ifdef __CUDACC__
  if (error > 0) return cudaGetErrorString(cudaError_t(error));
#endif
  return error == kInvalid ? "dtype, head_dim or n_sinks out of range" : "no error";
}

int surgery_sink_forward(const SinkParams* params, void* stream) {
  if (wrong(params)) return kInvalid;
  SURGERY_DISPATCH(forward, params, stream);
}

int surgery_sink_fold(const SinkParams* params, void* stream) {
  if (wrong(params)) return kInvalid;
  SURGERY_DISPATCH(fold, params, stream);
}

int surgery_sink_backward(const SinkParams* params, void* stream) {
  if (wrong(params)) return kInvalid;
  SURGERY_DISPATCH(backward, params, stream);
}
}
