// The gather's kernels for CPUs, compiled once per instruction set; cpu/registration.cpp chooses among them.
#include "../arguments.h"
#include "../cpu/products.h"

namespace ocr_kernels {
inline namespace OCR_ISA {
namespace {

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

// Sums over pixels, in lanes of whole rows where pixels are neighbours, else of channels. The former's are kept as
// `dot_block` makes them, a block after the other, until a split is done.
template <class Lane>
struct Forward {
  using A = AccumulatorOf<Lane>;
  static constexpr int64_t kElements = Holds<Lane>::elements;
  static constexpr int64_t kPixels = 64 * kElements;  // whose channels are held at a time

  const GatherForward& a;
  const int64_t B = a.feats.batch, C = a.feats.rows, K = a.logits.rows, N = a.feats.columns;
  const A scale = A(a.scale), lift = ocr_kernels::lift<A>(N);
  const bool by_channel = channels_last(a.feats);
  const int64_t slab = channels_last(a.logits) ? 16 : 4;  // regions whose scores are read at a time
  const int64_t tile = by_channel ? 512 : (K <= 32 ? 1024 : 512) * kElements;
  const int64_t weights_stride = tile / kElements;
  const int64_t feats_stride = by_channel ? row_stride<Lane>(C) : weights_stride;
  const int64_t group = round_up(divide_up(K, divide_up(K, 192)), kDotColumns);  // regions weighed at a time
  const int64_t sums_stride = row_stride<A>(C);
  const int64_t channel_blocks = divide_up(C, kDotRows);
  const int64_t max_splits = max(4, (int64_t(16) << 20) / int64_t(sizeof(A)) / product(K, sums_stride));
  const Splits splits{N, tile, min(64, max_splits)};
  const int64_t group_images = images_at_a_time(B, product(int64_t(sizeof(A)), splits.count, K, sums_stride));
  const Buffer<A> all_sums{group_images, splits.count, K, sums_stride};
  const Buffer<A> all_stats{group_images, splits.count, 2, K};  // of each split maxima, then sums of weights

  struct Scratch {
    A *maximum, *total, *sums;
    Buffer<A> scores, blocks;
    Buffer<Lane> weights, feats;
  };

  void sum_split(int64_t first_image, int64_t task) const {
    A* maximum = all_stats.data() + task * 2 * K;
    const Scratch s{maximum,
                    maximum + K,
                    all_sums.data() + task * K * sums_stride,
                    Buffer<A>(slab, tile),
                    Buffer<A>(by_channel ? 0 : divide_up(K, kDotColumns), channel_blocks, kDotSums<A>),
                    Buffer<Lane>(group, weights_stride),
                    Buffer<Lane>(by_channel ? lanes<Lane>(kPixels) : kDotRows, feats_stride)};
    fill(s.maximum, K, A(-INFINITY));
    fill(s.total, K, A(0));
    by_channel ? fill(s.sums, K * sums_stride, A(0)) : fill(s.blocks.data(), block(round_up(K, kDotColumns)), A(0));
    splits.for_each_tile(first_image * splits.count + task, [&](int64_t image, int64_t first, int64_t count) {
      for (int64_t k = 0; k < K; k += group) {
        const Window w{image, k, min(group, K - k), first, count};
        weigh(s, w);
        by_channel ? sum_along_channels(s, w) : sum_along_pixels(s, w);
      }
    });
    if (!by_channel) unblock(s);
  }

  // Where the sums of region k begin, all of its channels in turn, among those of kDotColumns regions.
  int64_t block(int64_t k, int64_t c = 0) const {
    return (k / kDotColumns * channel_blocks + c / kDotRows) * kDotSums<A> + k % kDotColumns * kDotRows;
  }

  void unblock(const Scratch& s) const {
    for (int64_t k = 0; k < K; ++k)
      for (int64_t c = 0; c < C; c += kDotRows) {
        const A* const from = s.blocks.data() + block(k, c);
        for (int64_t r = 0; r < min(kDotRows, C - c); ++r) s.sums[k * sums_stride + c + r] = from[r];
      }
  }

  void rescale(const Scratch& s, int64_t k, A factor) const {
    if (by_channel)
      for (int64_t c = 0; c < C; ++c) s.sums[k * sums_stride + c] *= factor;
    else
      for (int64_t c = 0; c < C; c += kDotRows)
        for (int64_t r = 0; r < kDotRows; ++r) s.blocks.data()[block(k, c) + r] *= factor;
  }

  int64_t padded(int64_t pixels) const { return round_up(pixels, Vec<A>::size * kElements); }

  // weights[k][i] = exp(scale * logits - running maximum) * lift; the sums so far are rescaled to that maximum
  void weigh(const Scratch& s, Window w) const {
    const int64_t rows_of_dots = round_up(w.rows, kDotColumns);
    fill(s.weights.data() + w.rows * weights_stride, (rows_of_dots - w.rows) * weights_stride, Lane(0));
    for (int64_t first = 0; first < w.rows; first += slab) {
      const int64_t rows = min(slab, w.rows - first);
      read_across(s.scores.data(), tile, padded(w.columns), a.logits,
                  {w.batch, w.row + first, rows, w.column, w.columns});
      for (int64_t r = first; r < first + rows; ++r) {
        const int64_t k = w.row + r;
        const A factor = weigh_region(s.weights.data() + r * weights_stride, s.scores.data() + (r - first) * tile,
                                      w.columns, s.maximum[k], s.total[k]);
        if (factor != A(1)) rescale(s, k, factor);
      }
    }
  }

  // Returns what the sums so far are multiplied by.
  A weigh_region(Lane* weights, A* scores, int64_t pixels, A& maximum, A& total) const {
    const int64_t length = padded(pixels);
    const A before = maximum;
    Vec<A> maxima = broadcast(before), sums = broadcast(A(0));
    for (int64_t i = 0; i < pixels; i += Vec<A>::size) {
      store(scores + i, load<A>(scores + i) * broadcast(scale));
      for (int64_t j = pixels; j < i + Vec<A>::size; ++j) scores[j] = A(-INFINITY);
      maxima = max(maxima, load<A>(scores + i));
    }
    for (int64_t i = round_up(pixels, Vec<A>::size); i < length; ++i) scores[i] = A(-INFINITY);
    maximum = max_lane(maxima);
    const Vec<A> subtracted = broadcast(shift(maximum));
    for (int64_t i = 0; i < length; i += Vec<A>::size) {
      const Vec<A> weight = exp(load<A>(scores + i) - subtracted) * broadcast(lift);
      sums = sums + rounded(weight, Lane());  // the sum that the rounded weights are divided by: they add up to one
      store_along(weights, i, weight);
    }
    const A factor = maximum > before ? exp_of(before - maximum) : A(1);
    total = total * factor + sum(sums);
    return factor;
  }

  // blocks += weights[k] . feats[c]
  void sum_along_pixels(const Scratch& s, Window w) const {
    const int64_t length = padded(w.columns) / kElements;
    for (int64_t c = 0; c < C; c += kDotRows) {
      const char* rows[kDotRows];
      const Window here{w.batch, c, min(kDotRows, C - c), w.column, w.columns};
      const Window next{w.batch, c + here.rows, min(kDotRows, C - c - here.rows), w.column, w.columns};
      dot_rows(rows, s.feats.data(), weights_stride, length, a.feats, here);
      for (int64_t k = 0; k < w.rows; k += kDotColumns) {
        prefetch_share(a.feats, next, k, min(k + kDotColumns, w.rows), w.rows);
        A of_tile[kDotSums<A>];
        dot_block(of_tile, rows, s.weights.data() + k * weights_stride, weights_stride, length);
        A* const sums = s.blocks.data() + block(w.row + k, c);
        for (int64_t i = 0; i < kDotSums<A>; i += Vec<A>::size)
          store(sums + i, load<A>(sums + i) + load<A>(of_tile + i));
      }
    }
  }

  // sums[k][:] += weights[k][i] feats[i][:]
  void sum_along_channels(const Scratch& s, Window w) const {
    for (int64_t i = 0; i < w.columns; i += kPixels) {
      const Window pixels{w.batch, w.column + i, min(kPixels, w.columns - i), 0, C};
      read_across(s.feats.data(), feats_stride, round_up(C, kPanel<Lane>), transposed(a.feats), pixels);
      const Left<Lane> weights{s.weights.data() + i / kElements, weights_stride, 1};
      multiply(true, s.sums + w.row * sums_stride, sums_stride, weights, s.feats.data(), feats_stride, w.rows,
               lanes<Lane>(pixels.rows), C);
    }
  }

  // The image's maxima and sums of weights, and in place of each split's maxima what its sums are multiplied by.
  void reduce_stats(int64_t first_image, int64_t b) const {
    A* of_split = all_stats.data() + b * splits.count * 2 * K;
    const A* end = of_split + splits.count * 2 * K;
    for (int64_t k = 0; k < K; ++k) {
      A maximum = A(-INFINITY), total = A(0);
      for (const A* p = of_split + k; p < end; p += 2 * K) maximum = *p > maximum ? *p : maximum;
      for (A* p = of_split + k; p < end; p += 2 * K) {
        *p = *p == A(-INFINITY) ? A(0) : exp_of(*p - maximum);
        total += *p * p[K];
      }
      for (A* p = of_split + k; p < end; p += 2 * K) *p /= total;
      *element<A>(a.stats, first_image + b, C, k) = maximum;
      *element<A>(a.stats, first_image + b, C + 1, k) = total / lift;
    }
  }

  void operator()(Parallel parallel) const {
    for (int64_t first = 0; first < B; first += group_images) {
      const int64_t images = min(group_images, B - first);
      run_tasks(parallel, images * splits.count, [&](int64_t task) { sum_split(first, task); });
      run_tasks(parallel, images, [&](int64_t b) { reduce_stats(first, b); });
      reduce(parallel, images_of(a.out, first, images), images_of(a.stats, first, images), splits.count,
             all_sums.data(), sums_stride, all_stats.data(), 2 * K);
    }
  }
};

// dX = dF P and dM = scale * P * (dP - delta) with dP = dF^T X and delta = sum_c dF F: no sum runs over pixels, so
// tiles are independent.
template <class Lane>
struct Backward {
  using A = AccumulatorOf<Lane>;
  static constexpr int64_t kElements = Holds<Lane>::elements;
  static constexpr int64_t kChannels = 64, kPixels = 64;  // held at a time, of all pixels or channels of a tile

  const GatherBackward& a;
  const Parallel parallel;
  const int64_t B = a.feats.batch, C = a.feats.rows, K = a.logits.rows, N = a.feats.columns;
  const A scale = A(a.scale);
  const int64_t tile = K <= 64 ? 384 : 192;  // whole panels, whole blocks of rows
  const int64_t stride = row_stride<A>(tile);
  const Splits splits{N, tile, 64};  // in any batch: an image's bits are the same
  const OutputProduct<Lane> dfeats{a.dfeats, a.grad, parallel};
  const SmallMatrix<Lane> grad{transposed(a.grad), parallel, a.dlogits.data != nullptr};  // [K, C]
  const Buffer<A> deltas{B, K};
  const Buffer<A> others{B, splits.count, K};  // what the logits' gradients add up to, less those of the peaks
  const Buffer<int64_t> peaks{B, K};           // the pixel with more than half of a region's weight, or -1

  struct Scratch {
    Buffer<A> weights, dweights;
    Buffer<Lane> across, feats;
  };

  // In float64: where a pixel has nearly all the weight, little is left of what delta is subtracted from.
  void sum_delta(int64_t b) const {
    constexpr int size = Vec<double>::size;
    const int64_t slab_stride = row_stride<double>(K), padded = round_up(K, size);
    const Buffer<double> gradient(kChannels, slab_stride), result(kChannels, slab_stride), delta(slab_stride);
    fill(delta.data(), slab_stride, 0.);
    for (int64_t c = 0; c < C; c += kChannels) {
      const Window w{b, c, min(kChannels, C - c), 0, K};
      read_across(gradient.data(), slab_stride, padded, a.grad, w);
      read_across(result.data(), slab_stride, padded, a.stats, w);
      for (int64_t at = 0; at < w.rows * slab_stride; at += slab_stride)
        for (int64_t k = 0; k < padded; k += size)
          store(delta.data() + k, fma(load<double>(gradient.data() + at + k), load<double>(result.data() + at + k),
                                      load<double>(delta.data() + k)));
    }
    for (int64_t k = 0; k < K; ++k) deltas.data()[b * K + k] = A(delta.data()[k]);
  }

  void differentiate_split(int64_t task) const {
    const Scratch s{Buffer<A>(K, stride), Buffer<A>(round_up(K, kDotColumns), stride),
                    Buffer<Lane>(kElements == 2 ? lanes<Lane>(K) : 0, stride),
                    Buffer<Lane>(max(lanes<Lane>(kChannels) * stride, product(lanes<Lane>(C), kPixels)))};
    fill(others.data() + task * K, K, A(0));
    splits.for_each_tile(task, [&](int64_t image, int64_t first, int64_t count) {
      const Window w{image, 0, K, first, count};
      weigh(s, w);
      if (a.dlogits.data) differentiate_logits(s, w, others.data() + task * K);
      if (a.dfeats.data) dfeats.write(w, lanes_across(s.across.data(), s.weights.data(), K, stride), stride);
    });
  }

  // weights[k][i] = exp(scale * logits - maximum) / sum
  void weigh(const Scratch& s, Window w) const {
    read_across(s.weights.data(), stride, round_up(w.columns, Vec<A>::size), a.logits, w);
    for (int64_t k = 0; k < K; ++k) {
      const Vec<A> maximum = broadcast(*element<A>(a.stats, w.batch, C, k));
      const Vec<A> reciprocal = broadcast(A(1) / *element<A>(a.stats, w.batch, C + 1, k));
      for (A* p = s.weights.data() + k * stride; p < s.weights.data() + k * stride + w.columns; p += Vec<A>::size)
        store(p, exp(load<A>(p) * broadcast(scale) - maximum) * reciprocal);
    }
  }

  // A softmax's gradients add up to zero: that of a peak, in which nearly equal numbers are subtracted, is left to
  // `differentiate_peaks`.
  void differentiate_logits(const Scratch& s, Window w, A* sums) const {
    channels_last(a.feats) ? dweights_along_channels(s, w) : dweights_along_pixels(s, w);
    for (int64_t k = 0; k < K; ++k) {
      A* const weights = s.weights.data() + k * stride;
      A* const dweights = s.dweights.data() + k * stride;
      const Vec<A> delta = broadcast(deltas.data()[w.batch * K + k]);
      for (int64_t i = w.columns; i < round_up(w.columns, Vec<A>::size); ++i) weights[i] = dweights[i] = 0;
      Vec<A> sum_of_others = broadcast(A(0)), highest = broadcast(A(0));
      for (int64_t i = 0; i < w.columns; i += Vec<A>::size) {
        const Vec<A> weight = load<A>(weights + i), term = weight * (load<A>(dweights + i) - delta);
        sum_of_others = sum_of_others + (term - if_above(weight, A(0.5), term));  // 0 of a peak, or NaN
        highest = max(highest, weight);
        store(dweights + i, broadcast(scale) * term);
      }
      sums[k] += sum(sum_of_others);
      if (max_lane(highest) > A(0.5))
        for (int64_t i = 0; i < w.columns; ++i)
          if (weights[i] > A(0.5)) peaks.data()[w.batch * K + k] = w.column + i;
    }
    write_tile(a.dlogits, w, s.dweights.data(), stride);
  }

  void differentiate_peaks(int64_t b) const {
    for (int64_t k = 0; k < K; ++k) {
      const int64_t peak = peaks.data()[b * K + k];
      if (peak < 0) continue;
      A total = 0;
      for (int64_t split = 0; split < splits.count; ++split) total += others.data()[(b * splits.count + split) * K + k];
      with_element_type(a.dlogits.dtype, [&](auto type) {
        using T = decltype(type);
        *element<T>(a.dlogits, b, k, peak) = from_float<T>(-scale * total);
      });
    }
  }

  // dweights[k][:] = sum_c grad[k][c] feats[c][:]
  void dweights_along_pixels(const Scratch& s, Window w) const {
    for (int64_t c = 0; c < C; c += kChannels) {
      const int64_t channels = min(kChannels, C - c);
      read_across(s.feats.data(), stride, round_up(w.columns, Vec<A>::size), a.feats,
                  {w.batch, c, channels, w.column, w.columns});
      multiply(c > 0, s.dweights.data(), stride, grad.from(w.batch, 0, c / kElements), s.feats.data(), stride, K,
               lanes<Lane>(channels), w.columns);
    }
  }

  // the same, of a few pixels and all channels at a time, in their order in memory
  void dweights_along_channels(const Scratch& s, Window w) const {
    for (int64_t i = 0; i < w.columns; i += kPixels) {
      read_across(s.feats.data(), kPixels, kPixels, a.feats,
                  {w.batch, 0, C, w.column + i, min(kPixels, w.columns - i)});
      multiply(false, s.dweights.data() + i, stride, grad.from(w.batch, 0), s.feats.data(), kPixels, K, lanes<Lane>(C),
               kPixels);
    }
  }

  void operator()() const {
    fill(peaks.data(), B * K, int64_t(-1));
    if (a.dlogits.data) run_tasks(parallel, B, [this](int64_t b) { sum_delta(b); });
    run_tasks(parallel, B * splits.count, [this](int64_t task) { differentiate_split(task); });
    if (a.dlogits.data) run_tasks(parallel, B, [this](int64_t b) { differentiate_peaks(b); });
  }
};

}  // namespace

void run(const GatherForward& a, Parallel parallel) {
  with_lanes(a.stats.dtype, a.feats.dtype == Dtype::BFloat16, [&](auto lane) { Forward<decltype(lane)>{a}(parallel); });
}

void run(const GatherBackward& a, Parallel parallel) {
  with_lanes(a.stats.dtype, a.feats.dtype == Dtype::BFloat16 && fits_pairs(a.grad),
             [&](auto lane) { Backward<decltype(lane)>{a, parallel}(); });
}

}  // namespace OCR_ISA
}  // namespace ocr_kernels
