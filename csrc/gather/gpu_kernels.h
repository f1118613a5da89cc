// The gather's kernels for GPUs. In every one a block has 256 threads and a tile of the result.
#pragma once

#include "../gpu/splits.h"

namespace ocr_kernels::gpu {

template <class Number>
struct GatherForward {
  Tensor feats, logits;
  Number scale;
  Number* partial;  // [B, parts, C, K]: sums over the part's pixels of exp(score - maximum) x, not normalised
  Number* stats;    // [B, parts, 3, K]: the part's maximum, sum of weights, and sum of weights as they were rounded
  Parts parts;
};

template <class T, int REGIONS>
constexpr int kGatherForwardBytes = Transfer<T, kChannels<T>, kInner<T>>::kBytes + tile_bytes<T>(REGIONS, kInner<T>) +
                                    REGIONS * int(sizeof(NumberOf<T>));

// Pixels come in tiles; what was summed of the ones before is rescaled whenever a tile raises a region's maximum.
template <class T, int REGIONS>
OCR_KERNEL gather_forward_kernel(GatherForward<NumberOf<T>> a) {
  using Number = NumberOf<T>;
  constexpr int CHANNELS = kChannels<T>, PIXELS = kInner<T>;
  constexpr int kRows = REGIONS / kWarps, kEach = PIXELS / 32;  // regions of a warp, pixels of a lane
  const int64_t channels = a.feats.rows, regions = a.logits.rows;
  const PartTile tile(a.feats, regions, a.parts, CHANNELS, REGIONS);
  const int64_t region = tile.region, channel = tile.channel, task = tile.task, image = tile.image;
  const int64_t first = tile.first, end = tile.end;
  const int lane = thread_index() % 32, row = thread_index() / 32 * kRows;

  Transfer<T, CHANNELS, PIXELS> feats(a.feats, image);
  const Image logits(a.logits, image);
  unsigned char* const shared = shared_memory();
  const Tile<T, REGIONS, PIXELS> weights{reinterpret_cast<T*>(shared + feats.kBytes), false};
  Number* const decays = reinterpret_cast<Number*>(shared + feats.kBytes + tile_bytes<T>(REGIONS, PIXELS));

  Sums<T, CHANNELS, REGIONS> sums;
  sums.clear();
  Number maximum[kRows], total[kRows], rounded_total[kRows], scores[kRows][kEach];
  const auto fetch = [&](int64_t pixel) {
    feats.fetch(channel, pixel);
    const int rows = int(regions - region < REGIONS ? regions - region : REGIONS) - row;
    const int pixels = int(end - pixel < PIXELS ? end - pixel : PIXELS) - lane;
    with_type(logits.dtype, [&](auto type) {
      const auto* from = logits.at<decltype(type)>(region + row, pixel + lane);
      OCR_UNROLL
      for (int r = 0; r < kRows; ++r, from += logits.stride_row) OCR_UNROLL
      for (int e = 0; e < kEach; ++e)
        scores[r][e] = r < rows && e * 32 < pixels ? a.scale * Number(to_number(from[e * 32 * logits.stride_column]))
                                                   : -Number(INFINITY);
    });
  };
  OCR_UNROLL
  for (int r = 0; r < kRows; ++r) {
    maximum[r] = -Number(INFINITY);
    total[r] = rounded_total[r] = 0;
  }
  fetch(first);
  for (int64_t pixel = first; pixel < end; pixel += PIXELS) {
    OCR_UNROLL
    for (int r = 0; r < kRows; ++r) {
      Number largest = maximum[r];
      OCR_UNROLL
      for (int e = 0; e < kEach; ++e) largest = larger(largest, scores[r][e]);
      OCR_UNROLL
      for (int mask = 16; mask > 0; mask /= 2) largest = larger(largest, shuffle_xor(largest, mask));
      const Number subtracted = shift(largest), decay = exponential(maximum[r] - subtracted);
      maximum[r] = largest;
      total[r] *= decay;
      rounded_total[r] *= decay;
      OCR_UNROLL
      for (int e = 0; e < kEach; ++e) {
        const Number weight = exponential(scores[r][e] - subtracted);
        const T rounded = Narrow<T>::value(weight * Arithmetic<T>::lift);
        weights.at(row + r, lane + e * 32) = rounded;
        total[r] += weight;
        rounded_total[r] += to_number(rounded);
      }
      if (lane == 0) decays[row + r] = decay;
    }
    const auto pixels = feats.put(shared);
    synchronize();
    if (pixel + PIXELS < end) fetch(pixel + PIXELS);
    sums.for_each([&](int, int k, Number& sum) { sum *= decays[k]; });
    sums.add_product(pixels.by_rows(), weights.by_rows(), PIXELS);
    synchronize();
  }

  write_part(sums, a.partial + task * channels * regions, channels, regions, channel, region);
  OCR_UNROLL
  for (int r = 0; r < kRows; ++r) {
    OCR_UNROLL
    for (int mask = 16; mask > 0; mask /= 2) {
      total[r] += shuffle_xor(total[r], mask);
      rounded_total[r] += shuffle_xor(rounded_total[r], mask);
    }
    const int64_t k = region + row + r;
    if (channel > 0 || lane > 0 || k >= regions) continue;
    Number* const stats = a.stats + task * 3 * regions + k;
    stats[0] = maximum[r];
    stats[regions] = total[r];
    stats[2 * regions] = rounded_total[r];
  }
}

template <class Number>
struct GatherStatistics {
  Tensor stats;         // [B, C + 2, K]
  const Number* parts;  // [B, count, 3, K]
  Number* shares;       // [B, count, K]: what each part counts in the sum of all
  int64_t count;
};

// A warp joins the statistics of the parts of a region.
template <class Number>
OCR_KERNEL gather_statistics_kernel(GatherStatistics<Number> a) {
  const int64_t regions = a.stats.columns, blocks = tiles(regions, kWarps);
  const int64_t image = block_index() / blocks, k = block_index() % blocks * kWarps + thread_index() / 32;
  if (k >= regions) return;
  const int lane = thread_index() % 32;
  const Number* const parts = a.parts + image * a.count * 3 * regions + k;
  Number maximum = -Number(INFINITY), total = 0, rounded_total = 0;
  for (int64_t p = lane; p < a.count; p += 32) maximum = larger(maximum, parts[p * 3 * regions]);
  for (int mask = 16; mask > 0; mask /= 2) maximum = larger(maximum, shuffle_xor(maximum, mask));
  for (int64_t p = lane; p < a.count; p += 32) {
    const Number share = exponential(parts[p * 3 * regions] - shift(maximum));
    total += share * parts[(p * 3 + 1) * regions];
    rounded_total += share * parts[(p * 3 + 2) * regions];
  }
  for (int mask = 16; mask > 0; mask /= 2) {
    total += shuffle_xor(total, mask);
    rounded_total += shuffle_xor(rounded_total, mask);
  }
  for (int64_t p = lane; p < a.count; p += 32)
    a.shares[(image * a.count + p) * regions + k] =
        exponential(parts[p * 3 * regions] - shift(maximum)) / rounded_total;
  if (lane > 0) return;
  const Image stats(a.stats, image);
  *stats.at<Number>(stats.rows - 2, k) = maximum;
  *stats.at<Number>(stats.rows - 1, k) = total;
}

template <class T, int REGIONS>
void gather_forward(const Tensor& out, const Tensor& stats, const Tensor& feats, const Tensor& logits, double scale,
                    const Queue& queue) {
  using Number = NumberOf<T>;
  const int64_t batch = feats.batch, channels = feats.rows, regions = logits.rows;
  const int64_t blocks = batch * tiles(channels, kChannels<T>) * tiles(regions, REGIONS);
  const Parts parts = parts_of(feats.columns, kInner<T>, blocks);
  Number* const partial = queue.scratch<Number>(batch * parts.count * channels * regions);
  Number* const partial_stats = queue.scratch<Number>(batch * parts.count * 3 * regions);
  Number* const shares = queue.scratch<Number>(batch * parts.count * regions);
  launch(gather_forward_kernel<T, REGIONS>, blocks * parts.count, kGatherForwardBytes<T, REGIONS>, queue,
         GatherForward<Number>{feats, logits, Number(scale), partial, partial_stats, parts});
  launch(gather_statistics_kernel<Number>, batch * tiles(regions, kWarps), 0, queue,
         GatherStatistics<Number>{stats, partial_stats, shares, parts.count});
  join_parts(JoinParts<Number>{out, stats, partial, shares, parts.count, Number(1)}, queue);
}

template <class Number>
struct GatherDelta {
  Tensor grad, stats;  // [B, C, K], [B, C + 2, K]
  Number* delta;       // [B, K]
};

// delta = the sum over channels of grad * the unrounded result, which all pixels of a region share in the softmax's
// derivative.
template <class Number>
OCR_KERNEL gather_delta_kernel(GatherDelta<Number> a) {
  const int64_t channels = a.grad.rows, regions = a.grad.columns, blocks = tiles(regions, 32);
  const int64_t image = block_index() / blocks;
  const int lane = thread_index() % 32, warp = thread_index() / 32;
  const int64_t k = block_index() % blocks * 32 + lane;
  const Image grad(a.grad, image), stats(a.stats, image);
  Number* const sums = reinterpret_cast<Number*>(shared_memory());  // [warps, 32]
  Number sum = 0;
  if (k < regions)
    for (int64_t c = warp; c < channels; c += kWarps) sum += grad.number<Number>(c, k) * *stats.at<Number>(c, k);
  sums[warp * 32 + lane] = sum;
  synchronize();
  if (warp > 0 || k >= regions) return;
  for (int w = 1; w < kWarps; ++w) sum += sums[w * 32 + lane];
  a.delta[image * regions + k] = sum;
}

// P = exp(scale * M - maximum) / sum: a region's softmax over pixels, from its saved statistics.
template <class Number>
struct GatherWeights {
  Tensor logits, stats;
  Number scale;
};

// The same, times what T lifts weights by, as a factor of a product.
template <class T>
class GatherWeightsTile {
  using Number = NumberOf<T>;
  static constexpr int REGIONS = kRegionStep, PIXELS = kPixels<T>, kEach = REGIONS * PIXELS / kThreads;

 public:
  using Source = GatherWeights<Number>;
  static constexpr int kBytes = tile_bytes<T>(REGIONS, PIXELS);

  OCR_DEVICE GatherWeightsTile(const Source& source, int64_t image)
      : logits_(source.logits, image), stats_(source.stats, image), scale_(source.scale) {}

  OCR_DEVICE void fetch(int64_t region, int64_t pixel) {
    first_region_ = region;
    with_type(logits_.dtype, [&](auto type) {
      const auto* from = logits_.at<decltype(type)>(region + region_of(0), pixel + pixel_of(0));
      const int64_t step =
          logits_.turned() ? kThreads / REGIONS * logits_.stride_column : kThreads / PIXELS * logits_.stride_row;
      OCR_UNROLL
      for (int e = 0; e < kEach; ++e, from += step)
        scores_[e] =
            logits_.has(region + region_of(e), pixel + pixel_of(e)) ? scale_ * Number(to_number(*from)) : Number(0);
    });
  }
  OCR_DEVICE Tile<T, REGIONS, PIXELS> put(void* shared) const {
    const Tile<T, REGIONS, PIXELS> tile{static_cast<T*>(shared), logits_.turned()};
    OCR_UNROLL
    for (int e = 0; e < kEach; ++e) {
      const int64_t k = first_region_ + region_of(e);
      Number weight = 0;
      if (k < logits_.rows)
        weight =
            exponential(scores_[e] - *stats_.at<Number>(stats_.rows - 2, k)) / *stats_.at<Number>(stats_.rows - 1, k);
      tile.at(region_of(e), pixel_of(e)) = Narrow<T>::value(weight * Arithmetic<T>::lift);
    }
    return tile;
  }

 private:
  // neighbouring threads have neighbours in memory
  OCR_DEVICE int region_of(int e) const {
    return logits_.turned() ? thread_index() % REGIONS : e * (kThreads / PIXELS) + thread_index() / PIXELS;
  }
  OCR_DEVICE int pixel_of(int e) const {
    return logits_.turned() ? e * (kThreads / REGIONS) + thread_index() / REGIONS : thread_index() % PIXELS;
  }

  Image logits_, stats_;
  int64_t first_region_ = 0;
  Number scale_, scores_[kEach];
};

template <class Number>
struct GatherBackwardLogits {
  Tensor dlogits, grad, feats;
  GatherWeights<Number> weights;
  const Number* delta;  // [B, K]
};

template <class T, int REGIONS>
constexpr int kGatherBackwardLogitsBytes =
    most(kSumOverChannels<T, REGIONS, kPixels<T>>, Result<NumberOf<T>, REGIONS, kPixels<T>>::kBytes);

// dM = scale * P * (dF^T X - delta)
template <class T, int REGIONS>
OCR_KERNEL gather_backward_logits_kernel(GatherBackwardLogits<NumberOf<T>> a) {
  using Number = NumberOf<T>;
  constexpr int PIXELS = kPixels<T>;
  const int64_t regions = a.dlogits.rows;
  const int64_t region_tiles = tiles(regions, REGIONS), pixel_tiles = tiles(a.feats.columns, PIXELS);
  const int64_t region = block_index() % region_tiles * REGIONS;
  const int64_t pixel = block_index() / region_tiles % pixel_tiles * PIXELS;
  const int64_t image = block_index() / region_tiles / pixel_tiles;
  unsigned char* const shared = shared_memory();

  Transfer<T, kInner<T>, REGIONS> grad(a.grad, image);
  Transfer<T, kInner<T>, PIXELS> feats(a.feats, image);
  Sums<T, REGIONS, PIXELS> dweights;
  dweights.clear();
  add_sum_over_channels(dweights, grad, region, feats, pixel, shared);

  const Result<Number, REGIONS, PIXELS> dlogits(a.dlogits, image, shared);
  dweights.for_each([&](int k, int i, Number sum) { dlogits.tile.at(k, i) = sum; });
  synchronize();
  const Image logits(a.weights.logits, image), stats(a.weights.stats, image);
  const Number* const delta = a.delta + image * regions;
  dlogits.write(region, pixel, [&](int64_t k, int64_t i, Number dweight) {
    const Number weight =
        exponential(a.weights.scale * logits.number<Number>(k, i) - *stats.at<Number>(stats.rows - 2, k)) /
        *stats.at<Number>(stats.rows - 1, k);
    return a.weights.scale * weight * (dweight - delta[k]);
  });
}

template <class T, int REGIONS>
void gather_backward(const Tensor& dfeats, const Tensor& dlogits, const Tensor& grad, const Tensor& feats,
                     const Tensor& logits, const Tensor& stats, double scale, const Queue& queue) {
  using Number = NumberOf<T>;
  const int64_t batch = feats.batch, regions = logits.rows;
  const GatherWeights<Number> weights{logits, stats, Number(scale)};
  if (dlogits.data) {
    Number* const delta = queue.scratch<Number>(batch * regions);
    launch(gather_delta_kernel<Number>, batch * tiles(regions, 32), int(sizeof(Number)) * kThreads, queue,
           GatherDelta<Number>{grad, stats, delta});
    launch(gather_backward_logits_kernel<T, REGIONS>,
           batch * tiles(regions, REGIONS) * tiles(feats.columns, kPixels<T>), kGatherBackwardLogitsBytes<T, REGIONS>,
           queue, GatherBackwardLogits<Number>{dlogits, grad, feats, weights, delta});
  }
  if (dfeats.data)
    sum_over_regions<T, GatherWeightsTile<T>>({dfeats, grad, weights, Number(1) / Arithmetic<T>::lift}, queue);
}

}  // namespace ocr_kernels::gpu
