// The gather's kernels, compiled once per instruction set; cpu.cpp chooses among the compilations.
#include "../cpu/tiles.h"
#include "cpu_products.h"

namespace ocr_kernels {
inline namespace OCR_ISA {
namespace {

// An image's pixels are cut into chunks, the threads' tasks, by the shape alone: results do not depend on the threads.
struct Chunks {
  int64_t pixels, per_image;
  Chunks(int64_t batch, int64_t pixels_of_image, int64_t tile, int64_t at_most) {
    const int64_t wanted = smaller(at_most, divide_up(64, batch));
    pixels = round_up(divide_up(pixels_of_image, wanted), tile);
    per_image = divide_up(pixels_of_image, pixels);
  }
};

template <class A>
A exp_of(A x) {
  A lane[Vec<A>::size];
  store(lane, exp(broadcast(x)));
  return lane[0];
}

// What is subtracted for a maximum: while all scores are -inf the weights are exp(-inf - 0) = 0, not NaN.
template <class A>
A shift(A maximum) {
  return maximum == A(-INFINITY) ? A(0) : maximum;
}

constexpr int kSlab = 16;             // regions whose scores are read at a time
constexpr int kRegionsMultiple = 12;  // a multiple of kDotColumns and kOuterRows

// ---- lanes: tensors' tiles laid out as the operands of products. Where a lane is a pair, `along` pairs neighbours in
// a row and `across` pairs neighbouring rows.

template <class A>
void read_along(A* to, int64_t stride, int64_t padded, const Tensor& tensor, Window w) {
  read_tile(plain_tile(to, stride), padded, tensor, w);
}
template <class A>
void read_across(Tile<A> to, int64_t padded, const Tensor& tensor, Window w) {
  read_tile(to, padded, tensor, w);
}
template <class A>
OCR_INLINE Vec<A> store_weights(A* to, int64_t i, Vec<A> p) {
  store(to + i, p);
  return p;
}
// [K, tile] as the factor of a sum over regions
template <class A>
A* weights_across(A*, A* weights, int64_t, int64_t) {
  return weights;
}

#if defined(__AVX512BF16__)
using Half = Lanes<uint16_t, kVectorBytes / 2>;

OCR_INLINE Vec<Pair> interleave(Half even, Half odd) {
  return {__builtin_convertvector(even, Lanes<Pair>) | __builtin_convertvector(odd, Lanes<Pair>) << 16};
}
OCR_INLINE Half rounded(Vec<float> x) { return bit_cast<Half>(_mm512_cvtneps_pbh((__m512)x.v)); }

void read_along(Pair* to, int64_t stride, int64_t padded, const Tensor& tensor, Window w) {
  for (int64_t r = 0; r < w.rows; ++r) {
    const BFloat16* from = element<BFloat16>(tensor, w.batch, w.row + r, w.column);
    BFloat16* row = reinterpret_cast<BFloat16*>(to + r * stride);
    if (tensor.stride_column == 1) memcpy(row, from, size_t(w.columns) * sizeof *row);
    else
      for (int64_t i = 0; i < w.columns; ++i) row[i] = from[i * tensor.stride_column];
    fill(row + w.columns, padded - w.columns, BFloat16{0});
  }
}

void read_across(Tile<Pair> to, int64_t padded, const Tensor& tensor, Window w) {
  constexpr int size = Vec<Pair>::size;
  const int64_t step = tensor.stride_column;
  for (int64_t r = 0; r < w.rows; r += 2) {
    const BFloat16* even = element<BFloat16>(tensor, w.batch, w.row + r, w.column);
    const BFloat16* odd = r + 1 < w.rows ? even + tensor.stride_row : nullptr;
    for (int64_t first = 0; first < padded; first += to.panel) {
      Pair* pairs = to.at(r / 2, first);
      const int64_t last = smaller(first + to.panel, w.columns);
      int64_t i = first;
      if (step == 1 && odd)
        for (; i + size <= last; i += size, pairs += size) {
          Half lower, upper;
          memcpy(&lower, even + i, sizeof lower);
          memcpy(&upper, odd + i, sizeof upper);
          store(pairs, interleave(lower, upper));
        }
      for (; i < last; ++i) *pairs++ = Pair(even[i * step].bits) | (odd ? Pair(odd[i * step].bits) << 16 : 0);
      for (; i < smaller(first + to.panel, padded); ++i) *pairs++ = 0;
    }
  }
}

// The sum that the weights are divided by is that of the rounded weights: they add up to one.
OCR_INLINE Vec<float> store_weights(Pair* to, int64_t i, Vec<float> p) {
  const Half bf16 = rounded(p);
  memcpy(reinterpret_cast<BFloat16*>(to) + i, &bf16, sizeof bf16);
  return {bit_cast<Lanes<float>>(__builtin_convertvector(bf16, Lanes<Pair>) << 16)};
}

Pair* weights_across(Pair* to, float* weights, int64_t regions, int64_t tile) {
  for (int64_t k = 0; k < regions; k += 2)
    for (int64_t i = 0; i < tile; i += Vec<Pair>::size) {
      const float* from = weights + k * tile + i;
      store(to + k / 2 * tile + i, interleave(rounded(load<float>(from)), rounded(load<float>(from + tile))));
    }
  return to;
}
#endif

// Rows of the tensor as operands of dot_block: where they lie if they can stay there, else copied to `buffer`.
template <class Lane>
void dot_rows(const char** rows, Lane* buffer, int64_t stride, int64_t padded, const Tensor& tensor, Window w) {
  using Element = typename Holds<Lane>::Element;
  const bool in_place = tensor.dtype == Holds<Lane>::dtype && tensor.stride_column == 1 && w.columns == padded;
  if (!in_place) read_along(buffer, stride, padded, tensor, w);
  for (int64_t r = 0; r < kDotRows; ++r) {
    const int64_t row = smaller(r, w.rows - 1);  // rows that do not exist repeat the last
    rows[r] = in_place ? reinterpret_cast<const char*>(element<Element>(tensor, w.batch, w.row + row, w.column))
                       : reinterpret_cast<const char*>(buffer + row * stride);
  }
}

template <class Lane>
struct Forward {
  using A = AccumulatorOf<Lane>;
  static constexpr int kElements = Holds<Lane>::elements, kPanel = kPanelOf<Lane>;

  const Tensor &out, &stats, &feats, &logits;
  const A scale;

  const int64_t B = feats.batch, C = feats.rows, K = logits.rows, N = feats.columns;
  const bool channels_last = neighbours_are_rows(feats);
  // Where channels are contiguous all of a tile's are copied, 128 KiB, so that memory is read in order.
  const int64_t tile_of_all_channels = (131072 * kElements / int64_t(sizeof(Lane)) / C) / 64 * 64;
  const int64_t tile =
      channels_last ? larger(64, smaller(512, tile_of_all_channels)) : (K <= 32 ? 1024 : 512) * kElements;
  const int64_t stride = tile / kElements;                                            // of a row of weights, in lanes
  const int64_t group = round_up(divide_up(K, divide_up(K, 192)), kRegionsMultiple);  // regions weighed at a time
  // A chunk's sums are [C, K] where pixels are contiguous, [K, C] where channels are; padded to whole blocks.
  const int64_t sums_rows = channels_last ? round_up(K, kRegionsMultiple) : round_up(C, kDotRows);
  const int64_t sums_columns = channels_last ? round_up(C, kPanel) : round_up(K, kRegionsMultiple);
  const int64_t sums_size = sums_rows * sums_columns;
  const Chunks chunks{B, N, tile, larger(4, (int64_t(16) << 20) / (sums_size * int64_t(sizeof(A))))};
  const Buffer<A> all_sums{B * chunks.per_image * sums_size};
  const Buffer<A> all_stats{B * chunks.per_image * 2 * K};  // maxima, then sums of weights

  struct Scratch {
    A *maximum, *total, *sums;
    Buffer<A> scores, factors;
    Buffer<Lane> weights, feats;
  };

  void sum_chunk(int64_t task) const {
    const int64_t b = task / chunks.per_image, first = task % chunks.per_image * chunks.pixels;
    const int64_t last = smaller(first + chunks.pixels, N);
    A* maximum = all_stats.data() + task * 2 * K;
    const Scratch s{maximum,
                    maximum + K,
                    all_sums.data() + task * sums_size,
                    Buffer<A>(kSlab * tile),
                    Buffer<A>(group),
                    Buffer<Lane>(group * stride),
                    Buffer<Lane>(stride * (channels_last ? sums_columns : kDotRows))};
    fill(s.maximum, K, A(-INFINITY));
    fill(s.total, K, A(0));
    fill(s.sums, sums_size, A(0));
    for (int64_t i = first; i < last; i += tile)
      for (int64_t k = 0; k < K; k += group) {
        const Window w{b, k, smaller(group, K - k), i, smaller(tile, last - i)};
        weigh(s, w);
        channels_last ? sum_along_channels(s, w) : sum_along_pixels(s, w);
      }
  }

  int64_t padded(int64_t pixels) const { return round_up(pixels, Vec<A>::size * kElements); }

  // weights[k][i] = exp(scale * logits - running maximum); the sums so far are rescaled to that maximum
  void weigh(const Scratch& s, Window w) const {
    bool rescale = false;
    fill(s.factors.data(), w.rows, A(1));
    fill(s.weights.data() + w.rows * stride, (round_up(w.rows, kRegionsMultiple) - w.rows) * stride, Lane(0));
    for (int64_t slab = 0; slab < w.rows; slab += kSlab) {
      const int64_t rows = smaller(kSlab, w.rows - slab);
      read_tile(plain_tile(s.scores.data(), tile), padded(w.columns), logits,
                {w.batch, w.row + slab, rows, w.column, w.columns});
      for (int64_t r = slab; r < slab + rows; ++r) {
        const A before = s.maximum[w.row + r];
        weigh_region(s.weights.data() + r * stride, s.scores.data() + (r - slab) * tile, w.columns,
                     s.maximum[w.row + r], s.total[w.row + r], s.factors.data()[r]);
        rescale |= s.maximum[w.row + r] > before;
      }
    }
    if (rescale) rescale_sums(s, w);
  }

  void weigh_region(Lane* weights, A* scores, int64_t pixels, A& maximum_so_far, A& total_so_far, A& factor) const {
    const int64_t length = padded(pixels);
    const A before = maximum_so_far;
    Vec<A> largest = broadcast(before), total = broadcast(A(0));
    for (int64_t i = 0; i < pixels; i += Vec<A>::size) store(scores + i, load<A>(scores + i) * broadcast(scale));
    for (int64_t i = pixels; i < length; ++i) scores[i] = A(-INFINITY);
    for (int64_t i = 0; i < length; i += Vec<A>::size) largest = max(largest, load<A>(scores + i));
    maximum_so_far = maximum(largest);
    const Vec<A> subtracted = broadcast(shift(maximum_so_far));
    for (int64_t i = 0; i < length; i += Vec<A>::size)
      total = total + store_weights(weights, i, exp(load<A>(scores + i) - subtracted));
    if (maximum_so_far > before) factor = before == A(-INFINITY) ? A(0) : exp_of(before - maximum_so_far);
    total_so_far = total_so_far * factor + sum(total);
  }

  void rescale_sums(const Scratch& s, Window w) const {
    const A* factors = s.factors.data();
    if (channels_last) {
      for (int64_t r = 0; r < w.rows; ++r)
        for (int64_t c = 0; c < C; ++c) s.sums[(w.row + r) * sums_columns + c] *= factors[r];
    } else {
      for (int64_t c = 0; c < C; ++c)
        for (int64_t r = 0; r < w.rows; ++r) s.sums[c * sums_columns + w.row + r] *= factors[r];
    }
  }

  // sums[c][k] += feats[c] . weights[k]
  void sum_along_pixels(const Scratch& s, Window w) const {
    const int64_t length = padded(w.columns);
    for (int64_t c = 0; c < C; c += kDotRows) {
      const char* rows[kDotRows];
      dot_rows(rows, s.feats.data(), stride, length, feats,
               {w.batch, c, smaller(kDotRows, C - c), w.column, w.columns});
      for (int64_t k = 0; k < w.rows; k += kDotColumns) {
        A block[kDotSums<A>];
        dot_block(block, rows, s.weights.data() + k * stride, stride, length / kElements);
        for (int64_t r = 0; r < kDotRows; ++r)
          for (int64_t q = 0; q < kDotColumns; ++q)
            s.sums[(c + r) * sums_columns + w.row + k + q] += block[r * kDotColumns + q];
      }
    }
  }

  // sums[k][:] += weights[k][i] feats[i][:]
  void sum_along_channels(const Scratch& s, Window w) const {
    read_across(Tile<Lane>{s.feats.data(), kPanel, kPanel, stride * kPanel}, sums_columns, transposed(feats),
                {w.batch, w.column, w.columns, 0, C});
    for (int64_t c = 0; c < C; c += kPanel)
      for (int64_t k = 0; k < w.rows; k += kOuterRows)
        outer_block(true, s.sums + (w.row + k) * sums_columns + c, sums_columns, s.weights.data() + k * stride, stride,
                    1, s.feats.data() + c * stride, kPanel, divide_up(w.columns, kElements));
  }

  // The image's maxima and sums of weights, and in place of each chunk's maxima what its sums are multiplied by.
  void merge_stats(int64_t b) const {
    A* of_chunk = all_stats.data() + b * chunks.per_image * 2 * K;
    const A* end = of_chunk + chunks.per_image * 2 * K;
    for (int64_t k = 0; k < K; ++k) {
      A largest = A(-INFINITY), total = A(0);
      for (const A* p = of_chunk + k; p < end; p += 2 * K) largest = *p > largest ? *p : largest;
      for (A* p = of_chunk + k; p < end; p += 2 * K) {
        *p = *p == A(-INFINITY) ? A(0) : exp_of(*p - largest);
        total += *p * p[K];
      }
      if (largest == A(-INFINITY)) total = A(NAN);
      for (A* p = of_chunk + k; p < end; p += 2 * K) *p /= total;
      *element<A>(stats, b, C, k) = largest;
      *element<A>(stats, b, C + 1, k) = total;
    }
  }

  void merge_sums(int64_t task) const {
    const int64_t slabs = divide_up(sums_rows, kSlab), b = task / slabs, first = task % slabs * kSlab;
    const int64_t rows = smaller(kSlab, (channels_last ? K : C) - first), columns = channels_last ? C : K;
    const Buffer<A> merged(kSlab * sums_columns);
    fill(merged.data(), kSlab * sums_columns, A(0));
    for (int64_t chunk = b * chunks.per_image; chunk < (b + 1) * chunks.per_image; ++chunk)
      for (int64_t r = 0; r < rows; ++r) {
        const A* sums = all_sums.data() + chunk * sums_size + (first + r) * sums_columns;
        const A* factors = all_stats.data() + chunk * 2 * K;
        A* to = merged.data() + r * sums_columns;
        if (channels_last)
          for (int64_t c = 0; c < C; ++c) to[c] += sums[c] * factors[first + r];
        else
          for (int64_t k = 0; k < K; ++k) to[k] += sums[k] * factors[k];
      }
    if (rows <= 0) return;
    const Tensor both[] = {out, stats};
    for (const Tensor& target : both)
      write_tile(channels_last ? transposed(target) : target, {b, first, rows, 0, columns},
                 plain_tile(merged.data(), sums_columns));
  }

  void operator()(Parallel parallel) const {
    run_tasks(parallel, B * chunks.per_image, [this](int64_t task) { sum_chunk(task); });
    run_tasks(parallel, B, [this](int64_t b) { merge_stats(b); });
    run_tasks(parallel, B * divide_up(sums_rows, kSlab), [this](int64_t task) { merge_sums(task); });
  }
};

// dX = dF P and dM = scale * P * (dF^T X - delta) with delta = sum_c dF F: no sum runs over pixels, so tiles are
// independent.
template <class Lane>
struct Backward {
  using A = AccumulatorOf<Lane>;
  static constexpr int kElements = Holds<Lane>::elements, kPanel = kPanelOf<Lane>;
  static constexpr int kChannels = 64;  // whose pixels are held at a time

  const Tensor &dfeats, &dlogits, &grad, &feats, &logits, &stats;
  const A scale;

  const int64_t B = feats.batch, C = feats.rows, K = logits.rows, N = feats.columns;
  const int64_t tile = K <= 64 ? 384 : 192;  // whole panels, whole blocks of rows
  const Chunks chunks{B, N, tile, 64};
  // The gradient as an operand: [C, K], [K, C], and [K, C] with pairs of regions; rows padded off the powers of two.
  const int64_t padded_C = round_up(C, 128) + 32, padded_K = round_up(round_up(K, kRegionsMultiple), 32);
  const int64_t channels_size = round_up(C, kOuterRows) * padded_K, regions_size = padded_K * padded_C;
  const Buffer<Lane> by_channel{B * channels_size}, by_region{B * regions_size}, by_pair{B * regions_size};
  const Buffer<A> delta{B * K};

  struct Scratch {
    Buffer<A> weights, dweights, result;
    Buffer<Lane> weights_across, feats;
  };

  void prepare(int64_t b) const {
    fill(by_channel.data() + b * channels_size, channels_size, Lane(0));
    fill(by_region.data() + b * regions_size, regions_size, Lane(0));
    fill(by_pair.data() + b * regions_size, regions_size, Lane(0));
    constexpr int whole = Vec<Lane>::size * kElements;
    read_along(by_channel.data() + b * channels_size, padded_K / kElements, round_up(K, whole), grad, {b, 0, C, 0, K});
    read_along(by_region.data() + b * regions_size, padded_C / kElements, round_up(C, whole), transposed(grad),
               {b, 0, K, 0, C});
    read_across(plain_tile(by_pair.data() + b * regions_size, padded_C), padded_C, transposed(grad), {b, 0, K, 0, C});
    const Buffer<A> rows(2 * padded_C);
    for (int64_t k = 0; k < K; ++k) {
      read_tile(plain_tile(rows.data(), padded_C), padded_C, transposed(grad), {b, k, 1, 0, C});
      read_tile(plain_tile(rows.data() + padded_C, padded_C), padded_C, transposed(stats), {b, k, 1, 0, C});
      Vec<A> total = broadcast(A(0));
      for (const A* p = rows.data(); p < rows.data() + padded_C; p += Vec<A>::size)
        total = fma(load<A>(p), load<A>(p + padded_C), total);
      delta.data()[b * K + k] = sum(total);
    }
  }

  void differentiate_chunk(int64_t task) const {
    const int64_t b = task / chunks.per_image, first = task % chunks.per_image * chunks.pixels;
    const int64_t last = smaller(first + chunks.pixels, N);
    const Scratch s{Buffer<A>(padded_K * tile), Buffer<A>(padded_K * tile),
                    Buffer<A>(tile * larger(kPanel, kOuterRows)),
                    Buffer<Lane>(kElements == 2 ? padded_K * tile / 2 : 0),
                    Buffer<Lane>(larger(kChannels * tile, kDotRows * padded_C))};
    fill(s.weights.data(), padded_K * tile, A(0));
    for (int64_t i = first; i < last; i += tile) {
      const Window w{b, 0, K, i, smaller(tile, last - i)};
      weigh(s, w);
      if (dlogits.data) differentiate_logits(s, w);
      if (dfeats.data) differentiate_feats(s, w);
    }
  }

  // weights[k][i] = exp(scale * logits - maximum) / sum
  void weigh(const Scratch& s, Window w) const {
    read_tile(plain_tile(s.weights.data(), tile), round_up(w.columns, Vec<A>::size), logits, w);
    for (int64_t k = 0; k < K; ++k) {
      const Vec<A> maximum = broadcast(*element<A>(stats, w.batch, C, k));
      const Vec<A> reciprocal = broadcast(A(1) / *element<A>(stats, w.batch, C + 1, k));
      for (A* p = s.weights.data() + k * tile; p < s.weights.data() + k * tile + w.columns; p += Vec<A>::size)
        store(p, exp(load<A>(p) * broadcast(scale) - maximum) * reciprocal);
    }
  }

  void differentiate_logits(const Scratch& s, Window w) const {
    neighbours_are_rows(feats) ? dweights_along_channels(s, w) : dweights_along_pixels(s, w);
    for (int64_t k = 0; k < K; ++k) {
      const Vec<A> subtracted = broadcast(delta.data()[w.batch * K + k]);
      for (int64_t i = k * tile; i < k * tile + w.columns; i += Vec<A>::size)
        store(s.dweights.data() + i,
              broadcast(scale) * load<A>(s.weights.data() + i) * (load<A>(s.dweights.data() + i) - subtracted));
    }
    write_tile(dlogits, w, plain_tile(s.dweights.data(), tile));
  }

  // dweights[k][:] = sum_c grad[k][c] feats[c][:]
  void dweights_along_pixels(const Scratch& s, Window w) const {
    constexpr int panel_size = kChannels / kElements * kPanel;
    const int64_t grad_stride = padded_C / kElements;
    for (int64_t c = 0; c < C; c += kChannels) {
      const int64_t channels = smaller(kChannels, C - c);
      read_across(Tile<Lane>{s.feats.data(), kPanel, kPanel, panel_size}, round_up(w.columns, kPanel), feats,
                  {w.batch, c, channels, w.column, w.columns});
      for (int64_t i = 0; i < w.columns; i += kPanel)
        for (int64_t k = 0; k < K; k += kOuterRows)
          outer_block(c > 0, s.dweights.data() + k * tile + i, tile,
                      by_region.data() + w.batch * regions_size + k * grad_stride + c / kElements, grad_stride, 1,
                      s.feats.data() + i / kPanel * panel_size, kPanel, divide_up(channels, kElements));
    }
  }

  // dweights[k][i] = feats[i] . grad[k]
  void dweights_along_channels(const Scratch& s, Window w) const {
    const int64_t length = round_up(C, Vec<Lane>::size * kElements), grad_stride = padded_C / kElements;
    for (int64_t i = 0; i < w.columns; i += kDotRows) {
      const char* rows[kDotRows];
      dot_rows(rows, s.feats.data(), grad_stride, length, transposed(feats),
               {w.batch, w.column + i, smaller(kDotRows, w.columns - i), 0, C});
      for (int64_t k = 0; k < K; k += kDotColumns) {
        A block[kDotSums<A>];
        dot_block(block, rows, by_region.data() + w.batch * regions_size + k * grad_stride, grad_stride,
                  length / kElements);
        for (int64_t q = 0; q < kDotColumns; ++q)
          for (int64_t r = 0; r < kDotRows; ++r) s.dweights.data()[(k + q) * tile + i + r] = block[r * kDotColumns + q];
      }
    }
  }

  // dfeats[c][i] = sum_k grad[c][k] weights[k][i], in vectors of pixels or of channels
  void differentiate_feats(const Scratch& s, Window w) const {
    const Lane* weights = weights_across(s.weights_across.data(), s.weights.data(), K, tile);
    const int64_t regions = divide_up(K, kElements), grad_stride = padded_K / kElements;
    A* result = s.result.data();
    if (neighbours_are_rows(dfeats)) {
      for (int64_t c = 0; c < C; c += kPanel) {
        for (int64_t i = 0; i < w.columns; i += kOuterRows)
          outer_block(false, result + i * kPanel, kPanel, weights + i, 1, tile,
                      by_pair.data() + w.batch * regions_size + c, padded_C, regions);
        write_tile(transposed(dfeats), {w.batch, w.column, w.columns, c, smaller(kPanel, C - c)},
                   plain_tile(result, kPanel));
      }
    } else {
      for (int64_t c = 0; c < C; c += kOuterRows) {
        for (int64_t i = 0; i < w.columns; i += kPanel)
          outer_block(false, result + i, tile, by_channel.data() + w.batch * channels_size + c * grad_stride,
                      grad_stride, 1, weights + i, tile, regions);
        write_tile(dfeats, {w.batch, c, smaller(kOuterRows, C - c), w.column, w.columns}, plain_tile(result, tile));
      }
    }
  }

  void operator()(Parallel parallel) const {
    run_tasks(parallel, B, [this](int64_t b) { prepare(b); });
    run_tasks(parallel, B * chunks.per_image, [this](int64_t task) { differentiate_chunk(task); });
  }
};

}  // namespace

void gather_forward(const Tensor& out, const Tensor& stats, const Tensor& feats, const Tensor& logits, double scale,
                    Parallel parallel) {
  if (stats.dtype == Dtype::Float64) return Forward<double>{out, stats, feats, logits, scale}(parallel);
#if defined(__AVX512BF16__)
  if (feats.dtype == Dtype::BFloat16) return Forward<Pair>{out, stats, feats, logits, float(scale)}(parallel);
#endif
  Forward<float>{out, stats, feats, logits, float(scale)}(parallel);
}

void gather_backward(const Tensor& dfeats, const Tensor& dlogits, const Tensor& grad, const Tensor& feats,
                     const Tensor& logits, const Tensor& stats, double scale, Parallel parallel) {
  if (stats.dtype == Dtype::Float64)
    return Backward<double>{dfeats, dlogits, grad, feats, logits, stats, scale}(parallel);
#if defined(__AVX512BF16__)
  if (feats.dtype == Dtype::BFloat16 && grad.dtype == Dtype::BFloat16)
    return Backward<Pair>{dfeats, dlogits, grad, feats, logits, stats, float(scale)}(parallel);
#endif
  Backward<float>{dfeats, dlogits, grad, feats, logits, stats, float(scale)}(parallel);
}

}  // namespace OCR_ISA
}  // namespace ocr_kernels
