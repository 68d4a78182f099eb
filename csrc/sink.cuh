// Sink mass around an attention kernel that knows nothing of it. README.md has the derivation.
//
//   forward    sink_mass_i = sum_{j in S} p_ij,  p_ij = exp(s_ij - lse_i)
//   fold       out' with rowsum(dout' * out') = delta_i = rowsum(dout * out) + extra_i, for a backward whose only use
//              of `out` is delta
//   backward   the whole gradient of the sink keys, which the vendor's backward was not shown:
//              ds_ij = p_ij (dp_ij + g_i - delta_i)
//              dq_i += ds_ij k_j,  dk_j = sum_i ds_ij q_i,  dv_j = sum_i p_ij dout_i
//
// A row is held by kLanes neighbouring threads in vectors of 16 bytes. A block owns `rows_per_block` rows of one
// sequence for all query heads of one kv head, so the sums over rows and heads need no atomics: each block writes its
// partial sums, and `sink_reduce` adds them in order. q, dout and dq are read once, and dq is written once.
#pragma once

#include "numbers.cuh"
#include "params.h"

constexpr int kThreads = 256;
constexpr int kMaxSinks = 16;
constexpr float kNegInf = -__builtin_inff();

// kLanes threads with kVectors 16-byte vectors each: head dims up to kDim
template <typename Element, int kLanes_, int kVectors_>
struct Layout {
  using T = Element;
  static constexpr int kLanes = kLanes_, kVectors = kVectors_;
  static constexpr int kVec = 16 / sizeof(T);
  static constexpr int kDim = kLanes * kVectors * kVec;
  static constexpr int kGroups = kThreads / kLanes;
  // rows a group holds at once, so that loads overlap; wide rows leave no registers for two
  static constexpr int kRows = kDim > 128 ? 1 : 2;
  static constexpr int kTile = kGroups * kRows;
};

// One sequence: its rows and keys, and which of them are real.
struct Sequence {
  int64_t start_q, start_k, batch;
  int rows, end_q, first_key, end_k;
};

SURGERY_DEVICE Sequence sequence_of(const SinkParams& p, int b) {
  Sequence s;
  if (p.cu_q) {
    s.start_q = p.cu_q[b], s.start_k = p.cu_k[b], s.batch = 0;
    s.rows = s.end_q = p.cu_q[b + 1] - p.cu_q[b];
    s.first_key = 0, s.end_k = p.cu_k[b + 1] - p.cu_k[b];
  } else {
    s.start_q = s.start_k = 0, s.batch = b;
    s.rows = p.len_q, s.end_q = p.used_q ? p.used_q[b] : p.len_q;
    s.first_key = p.first_key ? p.first_key[b] : 0;
    s.end_k = p.used_k ? p.used_k[b] : p.len_k;
  }
  return s;
}

template <typename T>
SURGERY_DEVICE T* row_of(const TensorRef& x, const Sequence& s, int64_t start, int row, int head) {
  return static_cast<T*>(x.data) + s.batch * x.batch + (start + row) * x.token + head * x.head;
}

// Key of sink slot j, or -1: no such key, or the same as an earlier slot's.
SURGERY_DEVICE int sink_key(const SinkParams& p, const Sequence& s, int b, int j) {
  const int* positions = p.positions ? p.positions + int64_t(b) * p.n_sinks : nullptr;
  const int offset = positions ? positions[j] : j;
  bool valid = offset >= 0 && s.first_key + offset < s.end_k;
  for (int i = 0; positions && i < j; ++i) valid = valid && positions[i] != offset;
  return valid ? s.first_key + offset : -1;
}

SURGERY_DEVICE bool sees(const SinkParams& p, const Sequence& s, int row, int key) {
  const int position = row + s.end_k - s.end_q;
  return key >= 0 && row < s.end_q && (p.right < 0 || key <= position + p.right) &&
         (p.left < 0 || key >= position - p.left);
}

// A row as its group of threads holds it.
template <typename L>
struct Row {
  Bytes16 raw[L::kVectors];

  SURGERY_DEVICE void load(const typename L::T* x, bool wanted, int lane, int head_dim) {
#pragma unroll
    for (int i = 0; i < L::kVectors; ++i) {
      const int channel = (i * L::kLanes + lane) * L::kVec;
      raw[i] = wanted && channel < head_dim ? *reinterpret_cast<const Bytes16*>(x + channel) : Bytes16{};
    }
  }

  SURGERY_DEVICE void store(typename L::T* x, int lane, int head_dim) const {
#pragma unroll
    for (int i = 0; i < L::kVectors; ++i) {
      const int channel = (i * L::kLanes + lane) * L::kVec;
      if (channel < head_dim) store_global(x + channel, raw[i]);
    }
  }

  SURGERY_DEVICE void store_shared(typename L::T* x, int lane) const {
#pragma unroll
    for (int i = 0; i < L::kVectors; ++i) *reinterpret_cast<Bytes16*>(x + (i * L::kLanes + lane) * L::kVec) = raw[i];
  }

  SURGERY_DEVICE float get(int i, int e) const {
    typename L::T x[L::kVec];
    memcpy(x, &raw[i], 16);
    return to_float(x[e]);
  }

  SURGERY_DEVICE void set(int i, int e, float value) {
    typename L::T x[L::kVec];
    memcpy(x, &raw[i], 16);
    x[e] = from_float<typename L::T>(value);
    memcpy(&raw[i], x, 16);
  }

  SURGERY_DEVICE static int channel(int i, int e, int lane) { return (i * L::kLanes + lane) * L::kVec + e; }
};

template <typename L>
SURGERY_DEVICE float group_sum(float x) {
#pragma unroll
  for (int step = L::kLanes / 2; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
  return x;
}

template <typename L>
SURGERY_DEVICE float dot(const Row<L>& a, const Row<L>& b) {
  float sum = 0.f;
#pragma unroll
  for (int i = 0; i < L::kVectors; ++i)
#pragma unroll
    for (int e = 0; e < L::kVec; ++e) sum = fmaf(a.get(i, e), b.get(i, e), sum);
  return group_sum<L>(sum);
}

// What a block works on, and its sink keys in shared memory.
template <typename L>
struct Block {
  const SinkParams& p;
  Sequence s;
  int batch, kv_head, first_row, n_rows, lane, group;
  int* keys;  // [n]
  Bytes16 *k, *v;  // [n, kLanes * kVectors]

  SURGERY_DEVICE Block(const SinkParams& params, char* shared) : p(params) {
    batch = blockIdx.z, kv_head = blockIdx.y;
    s = sequence_of(p, batch);
    first_row = blockIdx.x * p.rows_per_block;
    n_rows = min(s.rows - first_row, p.rows_per_block);
    n_rows = max(n_rows, 0);
    lane = threadIdx.x % L::kLanes, group = threadIdx.x / L::kLanes;
    k = reinterpret_cast<Bytes16*>(shared);
    v = k + p.n_sinks * L::kLanes * L::kVectors;
    keys = reinterpret_cast<int*>(v + p.n_sinks * L::kLanes * L::kVectors);
  }

  SURGERY_DEVICE void load_sinks(bool with_v) {
    for (int j = group; j < p.n_sinks; j += L::kGroups) {
      const int key = sink_key(p, s, batch, j);
      if (lane == 0) keys[j] = key;
      const int at = max(key, 0);
      Row<L> row;
      row.load(row_of<typename L::T>(p.k, s, s.start_k, at, kv_head), key >= 0, lane, p.head_dim);
      for (int i = 0; i < L::kVectors; ++i) k[(j * L::kVectors + i) * L::kLanes + lane] = row.raw[i];
      if (!with_v) continue;
      row.load(row_of<typename L::T>(p.v, s, s.start_k, at, kv_head), key >= 0, lane, p.head_dim);
      for (int i = 0; i < L::kVectors; ++i) v[(j * L::kVectors + i) * L::kLanes + lane] = row.raw[i];
    }
    __syncthreads();
  }

  SURGERY_DEVICE Row<L> shared_row(const Bytes16* x, int j) const {
    Row<L> row;
#pragma unroll
    for (int i = 0; i < L::kVectors; ++i) row.raw[i] = x[(j * L::kVectors + i) * L::kLanes + lane];
    return row;
  }

  SURGERY_DEVICE int items() const { return n_rows * p.group; }

  // Row and head of an item: neighbouring groups take neighbouring rows of one head.
  SURGERY_DEVICE void locate(int item, int& row, int& head) const {
    row = first_row + item % max(n_rows, 1);
    head = kv_head * p.group + item / max(n_rows, 1);
  }

  SURGERY_DEVICE int64_t rows_index(int row, int head) const {
    return s.batch * p.rows_batch + head * p.rows_head + s.start_q + row;
  }

  // Scaled, softcapped score, and d score / d (q . k).
  SURGERY_DEVICE float score(const Row<L>& q, const Row<L>& key, float& slope) const {
    const float s_raw = dot(q, key) * p.scale;
    slope = p.scale;
    if (p.softcap == 0.f) return s_raw;
    const float t = tanhf(s_raw / p.softcap);
    slope *= 1.f - t * t;
    return p.softcap * t;
  }
};

template <typename L>
__global__ void __launch_bounds__(kThreads, 4) sink_forward_kernel(const SinkParams p) {
  SURGERY_SHARED(shared);
  Block<L> block(p, shared);
  block.load_sinks(false);
  const int items = block.items();
  for (int base = 0; base < items; base += L::kTile) {
    Row<L> q[L::kRows];
    int row[L::kRows], head[L::kRows];
    bool active[L::kRows];
#pragma unroll
    for (int r = 0; r < L::kRows; ++r) {
      const int item = base + r * L::kGroups + block.group;
      active[r] = item < items;
      block.locate(active[r] ? item : 0, row[r], head[r]);
      q[r].load(row_of<typename L::T>(p.q, block.s, block.s.start_q, row[r], head[r]), active[r], block.lane,
                p.head_dim);
    }
#pragma unroll
    for (int r = 0; r < L::kRows; ++r) {
      const float lse = active[r] ? p.lse[block.rows_index(row[r], head[r])] : kNegInf;
      float mass = 0.f;
      for (int j = 0; j < p.n_sinks; ++j) {
        float slope;
        const float score = block.score(q[r], block.shared_row(block.k, j), slope);
        if (!isinf(lse) && sees(p, block.s, row[r], block.keys[j])) mass += expf(score - lse);
      }
      if (active[r] && block.lane == 0) p.sink_mass[block.rows_index(row[r], head[r])] = mass;
    }
  }
}

// The channel with the largest |x| but `other`, or kDim when there is none.
template <typename L>
SURGERY_DEVICE int largest_channel(const Row<L>& x, int lane, int head_dim, int other) {
  float best = -1.f;
  int at = L::kDim;
#pragma unroll
  for (int i = 0; i < L::kVectors; ++i)
#pragma unroll
    for (int e = 0; e < L::kVec; ++e) {
      const int channel = Row<L>::channel(i, e, lane);
      const float size = fabsf(x.get(i, e));
      if (channel < head_dim && channel != other && size > best) best = size, at = channel;
    }
#pragma unroll
  for (int step = L::kLanes / 2; step > 0; step /= 2) {
    const float best_there = __shfl_xor_sync(0xffffffffu, best, step);
    const int at_there = __shfl_xor_sync(0xffffffffu, at, step);
    if (best_there > best || (best_there == best && at_there < at)) best = best_there, at = at_there;
  }
  return at;
}

// out' is 0 but in two channels: the first carries delta rounded to T, the second what the rounding left. Where dout
// is smaller than kTiny there, dout' is kTiny instead, which changes dv by kTiny.
template <typename L>
__global__ void __launch_bounds__(kThreads, 4) sink_fold_kernel(const SinkParams p) {
  constexpr float kTiny = 8.673617379884035e-19f;  // 2^-60
  SURGERY_SHARED(shared);
  Block<L> block(p, shared);
  const int items = block.items();
  for (int base = 0; base < items; base += L::kGroups) {
    const int item = base + block.group;
    const bool active = item < items;
    int row, head;
    block.locate(active ? item : 0, row, head);
    Row<L> out, dout;
    out.load(row_of<typename L::T>(p.out, block.s, block.s.start_q, row, head), active, block.lane, p.head_dim);
    dout.load(row_of<typename L::T>(p.dout, block.s, block.s.start_q, row, head), active, block.lane, p.head_dim);
    const int64_t at = block.rows_index(row, head);
    const float delta = dot(out, dout) + (active ? p.extra[at] : 0.f);
    Row<L> folded{};
    float rest = delta;
    int other = -1;
#pragma unroll
    for (int part = 0; part < 2; ++part) {
      const int channel = largest_channel(dout, block.lane, p.head_dim, other);
      float carried = 0.f;
#pragma unroll
      for (int i = 0; i < L::kVectors; ++i)
#pragma unroll
        for (int e = 0; e < L::kVec; ++e) {
          if (Row<L>::channel(i, e, block.lane) != channel || rest == 0.f) continue;
          if (fabsf(dout.get(i, e)) < kTiny) dout.set(i, e, kTiny);
          folded.set(i, e, rest / dout.get(i, e));
          carried = folded.get(i, e) * dout.get(i, e);
        }
      rest -= group_sum<L>(carried);
      other = channel;
    }
    if (active && block.lane == 0) p.delta[at] = delta;
    const int to = row - p.folded_first;
    if (!active || to < 0) continue;
    folded.store(row_of<typename L::T>(p.folded_out, block.s, block.s.start_q, to, head), block.lane, p.head_dim);
    dout.store(row_of<typename L::T>(p.folded_dout, block.s, block.s.start_q, to, head), block.lane, p.head_dim);
  }
}

// For up to kSinks sinks: how many sums a thread holds must be known when it is compiled.
template <typename L, int kSinks>
__global__ void __launch_bounds__(kThreads, 2) sink_backward_kernel(const SinkParams p) {
  using T = typename L::T;
  // each thread sums one channel of dk or dv (both where D is 256) for every kStride-th sink
  constexpr int kSums = 2 * L::kDim > kThreads ? 2 : 1;
  constexpr int kStride = 2 * L::kDim < kThreads ? kThreads / (2 * L::kDim) : 1;
  constexpr int kEach = (kSinks + kStride - 1) / kStride;
  SURGERY_SHARED(shared);
  Block<L> block(p, shared);
  const int n = p.n_sinks;
  T* q_tile = reinterpret_cast<T*>(block.keys + (n + 3) / 4 * 4);  // [kTile, kDim]
  T* dout_tile = q_tile + L::kTile * L::kDim;
  float* ds_tile = reinterpret_cast<float*>(dout_tile + L::kTile * L::kDim);  // [kTile, n]
  float* p_tile = ds_tile + L::kTile * n;
  block.load_sinks(true);

  float sums[kSums][kEach] = {};
  const int items = block.items();
  for (int base = 0; base < items; base += L::kTile) {
    Row<L> q[L::kRows], dout[L::kRows], dq[L::kRows];
    float delta[L::kRows];
    int row[L::kRows], head[L::kRows];
    bool active[L::kRows], live[L::kRows];
#pragma unroll
    for (int r = 0; r < L::kRows; ++r) {
      const int item = base + r * L::kGroups + block.group;
      active[r] = item < items;
      block.locate(active[r] ? item : 0, row[r], head[r]);
      // a row that sees nothing takes part in nothing, whatever its memory holds
      live[r] = active[r] && row[r] < block.s.end_q && !isinf(p.lse[block.rows_index(row[r], head[r])]);
      q[r].load(row_of<T>(p.q, block.s, block.s.start_q, row[r], head[r]), live[r], block.lane, p.head_dim);
      dout[r].load(row_of<T>(p.dout, block.s, block.s.start_q, row[r], head[r]), live[r] && p.dout.data, block.lane,
                   p.head_dim);
      const bool has_dq = live[r] && p.dq_in.data && row[r] >= p.dq_in_first;
      dq[r].load(row_of<T>(p.dq_in, block.s, block.s.start_q, row[r] - (has_dq ? p.dq_in_first : 0), head[r]), has_dq,
                 block.lane, p.head_dim);
    }
#pragma unroll
    for (int r = 0; r < L::kRows; ++r) {
      const int64_t at = block.rows_index(row[r], head[r]);
      if (p.out.data) {
        Row<L> out;
        out.load(row_of<T>(p.out, block.s, block.s.start_q, row[r], head[r]), live[r], block.lane, p.head_dim);
        delta[r] = dot(out, dout[r]) + (live[r] ? p.extra[at] : 0.f);
      } else {
        delta[r] = live[r] ? p.delta[at] : 0.f;
      }
    }
#pragma unroll
    for (int r = 0; r < L::kRows; ++r) {
      const int64_t at = block.rows_index(row[r], head[r]);
      const float lse = live[r] ? p.lse[at] : kNegInf, g = live[r] ? p.g[at] : 0.f;
      const int tile_row = r * L::kGroups + block.group;
      float dq_sum[L::kVectors][L::kVec];
#pragma unroll
      for (int i = 0; i < L::kVectors; ++i)
#pragma unroll
        for (int e = 0; e < L::kVec; ++e) dq_sum[i][e] = dq[r].get(i, e);
#pragma unroll 1
      for (int j = 0; j < n; ++j) {
        const Row<L> key = block.shared_row(block.k, j);
        float slope;
        const float score = block.score(q[r], key, slope);
        const float dp = dot(dout[r], block.shared_row(block.v, j));
        const bool seen = live[r] && sees(p, block.s, row[r], block.keys[j]);
        const float prob = seen ? expf(score - lse) : 0.f;
        const float ds = seen ? prob * (dp + g - delta[r]) * slope : 0.f;
#pragma unroll
        for (int i = 0; i < L::kVectors; ++i)
#pragma unroll
          for (int e = 0; e < L::kVec; ++e) dq_sum[i][e] = fmaf(ds, key.get(i, e), dq_sum[i][e]);
        if (block.lane == 0) ds_tile[tile_row * n + j] = ds, p_tile[tile_row * n + j] = prob;
      }
#pragma unroll
      for (int i = 0; i < L::kVectors; ++i)
#pragma unroll
        for (int e = 0; e < L::kVec; ++e) dq[r].set(i, e, dq_sum[i][e]);
      if (active[r]) dq[r].store(row_of<T>(p.dq, block.s, block.s.start_q, row[r], head[r]), block.lane, p.head_dim);
      q[r].store_shared(q_tile + tile_row * L::kDim, block.lane);
      dout[r].store_shared(dout_tile + tile_row * L::kDim, block.lane);
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kSums; ++i) {
      const int unit = (threadIdx.x + i * kThreads) % (2 * L::kDim), first = threadIdx.x / (2 * L::kDim);
      const bool of_v = unit >= L::kDim;
      const T* x_tile = (of_v ? dout_tile : q_tile) + unit % L::kDim;
      const float* weights = of_v ? p_tile : ds_tile;
#pragma unroll 1
      for (int t = 0; t < L::kTile; ++t) {
        const float x = to_float(x_tile[t * L::kDim]);
#pragma unroll
        for (int j = 0; j < kEach; ++j)
          if (first + j * kStride < n) sums[i][j] = fmaf(weights[t * n + first + j * kStride], x, sums[i][j]);
      }
    }
    __syncthreads();
  }

  float* partial = p.partial + ((int64_t(block.batch) * gridDim.y + block.kv_head) * p.n_splits + blockIdx.x) *
                                   (2 * n * p.head_dim);
#pragma unroll
  for (int i = 0; i < kSums; ++i) {
    const int unit = (threadIdx.x + i * kThreads) % (2 * L::kDim), first = threadIdx.x / (2 * L::kDim);
    const int channel = unit % L::kDim, of_v = unit / L::kDim;
    if (channel >= p.head_dim) continue;
#pragma unroll
    for (int j = 0; j < kEach; ++j)
      if (first + j * kStride < n) partial[(of_v * n + first + j * kStride) * p.head_dim + channel] = sums[i][j];
  }
}

// dk and dv of the sinks of one kv head: the blocks' partial sums, added in order. A grid of (1, H_kv, B).
template <typename T>
__global__ void __launch_bounds__(kThreads) sink_reduce_kernel(const SinkParams p) {
  const int batch = blockIdx.z, kv_head = blockIdx.y, n = p.n_sinks;
  const Sequence s = sequence_of(p, batch);
  const int size = 2 * n * p.head_dim;
  const float* partial = p.partial + (int64_t(batch) * gridDim.y + kv_head) * p.n_splits * size;
  for (int at = threadIdx.x; at < size; at += kThreads) {
    const int channel = at % p.head_dim, j = at / p.head_dim % n;
    const int key = sink_key(p, s, batch, j);
    if (key < 0) continue;
    float sum = 0.f;
    for (int split = 0; split < p.n_splits; ++split) sum += partial[int64_t(split) * size + at];
    row_of<T>(at < n * p.head_dim ? p.dk : p.dv, s, s.start_k, key, kv_head)[channel] = from_float<T>(sum);
  }
}
