// 16-bit floats as bits, the same on the device and in the host build that the tests run.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define SURGERY_DEVICE __device__ __forceinline__
#else
#define SURGERY_DEVICE inline
#endif

struct Half {
  uint16_t bits;
};

struct BFloat16 {
  uint16_t bits;
};

// 16 bytes: what one thread moves at once
struct alignas(16) Bytes16 {
  uint32_t word[4];
};

template <typename To, typename From>
SURGERY_DEVICE To as(From x) {
  static_assert(sizeof(To) == sizeof(From), "as() reinterprets");
  To y;
  memcpy(&y, &x, sizeof(To));
  return y;
}

// A store to device memory that stays one: left alone, the compiler splits it into the words it was put together from.
SURGERY_DEVICE void store_global(void* to, const Bytes16& x) {
#ifdef __CUDACC__
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)), "r"(x.word[0]),
               "r"(x.word[1]), "r"(x.word[2]), "r"(x.word[3])
               : "memory");
#else
  *static_cast<Bytes16*>(to) = x;
#endif
}

SURGERY_DEVICE float to_float(float x) { return x; }

SURGERY_DEVICE float to_float(BFloat16 x) { return as<float>(uint32_t(x.bits) << 16); }

SURGERY_DEVICE float to_float(Half x) {
#ifdef __CUDACC__
  return __half2float(as<__half>(x));
#else
  const uint32_t sign = uint32_t(x.bits & 0x8000u) << 16, exponent = (x.bits >> 10) & 31u, mantissa = x.bits & 1023u;
  if (exponent == 31) return as<float>(sign | 0x7f800000u | mantissa << 13);
  if (exponent != 0) return as<float>(sign | (exponent + 112) << 23 | mantissa << 13);
  const float small = float(mantissa) * 5.9604644775390625e-8f;  // 2^-24
  return sign ? -small : small;
#endif
}

template <typename T>
SURGERY_DEVICE T from_float(float x);

template <>
SURGERY_DEVICE float from_float<float>(float x) {
  return x;
}

template <>
SURGERY_DEVICE BFloat16 from_float<BFloat16>(float x) {
#ifdef __CUDACC__
  return as<BFloat16>(__float2bfloat16_rn(x));
#else
  const uint32_t bits = as<uint32_t>(x);
  if (x != x) return BFloat16{0x7fc0};
  return BFloat16{uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
#endif
}

template <>
SURGERY_DEVICE Half from_float<Half>(float x) {
#ifdef __CUDACC__
  return as<Half>(__float2half_rn(x));
#else
  const uint32_t bits = as<uint32_t>(x), sign = (bits >> 16) & 0x8000u, size = bits & 0x7fffffffu;
  if (size > 0x7f800000u) return Half{0x7e00};
  if (size >= 0x477ff000u) return Half{uint16_t(sign | 0x7c00u)};  // 65520 and more round to infinity
  if (size >= 0x38800000u) return Half{uint16_t(sign | (((size + 0xfffu + ((size >> 13) & 1u)) >> 13) - (112u << 10)))};
  // below 2^-14 halves are multiples of 2^-24: adding 0.5 in float rounds to one
  return Half{uint16_t(sign | (as<uint32_t>(as<float>(size) + 0.5f) - 0x3f000000u))};
#endif
}
