// What the kernels are called with: plain data, the same bytes in Python (backends/sink_epilogue/library.py).
//
// Shapes: B sequences, T rows, H query heads, H_kv key heads, D head dim, n sinks. Dense tensors are [B, T, H, D],
// packed ones [total, H, D] with `cu_q` and `cu_k`; channels are contiguous, everything else has a stride.
#pragma once

#include <cstdint>

struct TensorRef {
  void* data;  // nullptr: there is none
  int64_t batch, token, head;  // strides in elements
};

enum DType : int32_t { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

struct SinkParams {
  TensorRef q, k, v, out, dout;
  TensorRef dq_in;  // the vendor's dq; rows before `dq_in_first` are not in it and count as 0
  TensorRef dq, dk, dv;  // written: dq whole, dk and dv at the sink keys only
  TensorRef folded_out, folded_dout;  // without the rows before `folded_first`

  // one fp32 number a row: [B, H, Tq] or [H, total_q], strides `rows_batch` and `rows_head`
  const float* lse;
  const float* g;  // dL/d sink_mass, 0 for rows that see no key
  const float* extra;  // added to rowsum(dout * out): g * sink_mass - dlse, 0 for rows that see no key
  float* delta;  // rowsum(dout * out) + extra: written by the fold, read by the backward unless `out` is given
  float* sink_mass;
  float* partial;  // [B, H_kv, n_splits, 2, n, D] fp32: dk and dv of the sinks, before the reduction

  // int32 [B + 1], [B + 1], [B], [B], [B], [B, n]; nullptr where the default holds
  const int32_t *cu_q, *cu_k, *first_key, *used_q, *used_k, *positions;

  int64_t rows_batch, rows_head;
  int32_t batch, len_q, len_k;  // dense lengths; packed: the longest
  int32_t n_heads, group, head_dim, n_sinks;
  int32_t left, right;  // window with causal folded into right, -1 is unbounded
  int32_t dtype, dq_in_first, folded_first, rows_per_block, n_splits;
  float scale, softcap;
};
