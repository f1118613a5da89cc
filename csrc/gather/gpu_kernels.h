// The gather's kernels for GPUs. In every one a block has 256 threads and a tile of the result.
#pragma once

#include "../gpu/splits.h"

namespace ocr_kernels::gpu {

template <class Accumulator>
struct GatherSplits {
  Splits splits;
  Accumulator* sums;    // [B, splits, C, K]: of exp(score - maximum) x, not normalised
  Accumulator* stats;   // [B, splits, 3, K]: maxima, sums of weights, sums of weights as they were rounded
  Accumulator* shares;  // [B, splits, K]: what each split counts in the sum of all
};

template <class T, int REGIONS>
constexpr int kGatherForwardBytes = Transfer<T, kChannels<T>, kInner<T>>::kBytes + tile_bytes<T>(REGIONS, kInner<T>) +
                                    REGIONS * int(sizeof(AccumulatorOf<T>));

// Pixels come in tiles; what was summed of the ones before is rescaled whenever a tile raises a region's maximum.
template <class T, int REGIONS>
OCR_KERNEL gather_forward_kernel(GatherForward a, GatherSplits<AccumulatorOf<T>> to) {
  using Accumulator = AccumulatorOf<T>;
  constexpr int CHANNELS = kChannels<T>, PIXELS = kInner<T>;
  constexpr bool one_chain = sizeof(T) == 8 || REGIONS > 32;    // no registers are left for another
  constexpr int kRows = REGIONS / kWarps, kEach = PIXELS / 32;  // regions of a warp, pixels of a lane
  const int64_t channels = a.feats.rows, regions = a.logits.rows;
  const SplitTile tile(a.feats, regions, to.splits, CHANNELS, REGIONS);
  const int64_t region = tile.region, channel = tile.channel, task = tile.task, image = tile.image;
  const int64_t first = tile.first, end = tile.end;
  const int lane = thread_index() % 32, row = thread_index() / 32 * kRows;
  const Accumulator scale(a.scale);

  Transfer<T, CHANNELS, PIXELS> feats(a.feats, image);
  const Image logits(a.logits, image);
  unsigned char* const shared = shared_memory();
  const Tile<T, REGIONS, PIXELS> weights{reinterpret_cast<T*>(shared + feats.kBytes), false};
  Accumulator* const decays = reinterpret_cast<Accumulator*>(shared + feats.kBytes + tile_bytes<T>(REGIONS, PIXELS));

  Sums<T, CHANNELS, REGIONS> sums;
  sums.clear();
  Accumulator maximum[kRows], total[kRows], rounded_total[kRows], scores[kRows][kEach];
  const auto fetch = [&](int64_t pixel) {
    feats.fetch(channel, pixel);
    const int rows = int(regions - region < REGIONS ? regions - region : REGIONS) - row;
    const int pixels = int(end - pixel < PIXELS ? end - pixel : PIXELS) - lane;
    with_type(logits.dtype, [&](auto type) {
      const auto* from = logits.at<decltype(type)>(region + row, pixel + lane);
      OCR_UNROLL
      for (int r = 0; r < kRows; ++r, from += logits.stride_row) OCR_UNROLL
      for (int e = 0; e < kEach; ++e)
        scores[r][e] = r < rows && e * 32 < pixels
                           ? scale * Accumulator(to_accumulator(from[e * 32 * logits.stride_column]))
                           : -Accumulator(INFINITY);
    });
  };
  OCR_UNROLL
  for (int r = 0; r < kRows; ++r) {
    maximum[r] = -Accumulator(INFINITY);
    total[r] = rounded_total[r] = 0;
  }
  fetch(first);
  for (int64_t pixel = first; pixel < end; pixel += PIXELS) {
    OCR_UNROLL
    for (int r = 0; r < kRows; ++r) {
      Accumulator new_maximum = maximum[r];
      OCR_UNROLL
      for (int e = 0; e < kEach; ++e) new_maximum = max(new_maximum, scores[r][e]);
      OCR_UNROLL
      for (int mask = 16; mask > 0; mask /= 2) new_maximum = max(new_maximum, shuffle_xor(new_maximum, mask));
      const Accumulator subtracted = shift(new_maximum), decay = exponential(maximum[r] - subtracted);
      maximum[r] = new_maximum;
      total[r] *= decay;
      rounded_total[r] *= decay;
      OCR_UNROLL
      for (int e = 0; e < kEach; ++e) {
        const Accumulator weight = exponential(scores[r][e] - subtracted);
        const T rounded = Narrow<T>::value(weight * Arithmetic<T>::lift);
        weights.at(row + r, lane + e * 32) = rounded;
        total[r] += weight;
        rounded_total[r] += to_accumulator(rounded);
      }
      if (lane == 0) decays[row + r] = decay;
    }
    const auto pixels = feats.put(shared);
    synchronize();
    if (pixel + PIXELS < end) fetch(pixel + PIXELS);
    sums.for_each([&](int, int k, Accumulator& sum) { sum *= decays[k]; });
    sums.add_product(pixels.by_rows(), weights.by_rows(), PIXELS, one_chain);
    synchronize();
  }

  write_split(sums, to.sums + task * channels * regions, channels, regions, channel, region);
  OCR_UNROLL
  for (int r = 0; r < kRows; ++r) {
    OCR_UNROLL
    for (int mask = 16; mask > 0; mask /= 2) {
      total[r] += shuffle_xor(total[r], mask);
      rounded_total[r] += shuffle_xor(rounded_total[r], mask);
    }
    const int64_t k = region + row + r;
    if (channel > 0 || lane > 0 || k >= regions) continue;
    Accumulator* const stats = to.stats + task * 3 * regions + k;
    stats[0] = maximum[r];
    stats[regions] = total[r];
    stats[2 * regions] = rounded_total[r];
  }
}

// A warp reduces the statistics of a region's splits.
template <class Accumulator>
OCR_KERNEL gather_statistics_kernel(GatherForward a, GatherSplits<Accumulator> from) {
  const int64_t regions = a.stats.columns, count = from.splits.count, blocks = tiles(regions, kWarps);
  const int64_t image = block_index() / blocks, k = block_index() % blocks * kWarps + thread_index() / 32;
  if (k >= regions) return;
  const int lane = thread_index() % 32;
  const Accumulator* const splits = from.stats + image * count * 3 * regions + k;
  Accumulator maximum = -Accumulator(INFINITY), total = 0, rounded_total = 0;
  for (int64_t p = lane; p < count; p += 32) maximum = max(maximum, splits[p * 3 * regions]);
  for (int mask = 16; mask > 0; mask /= 2) maximum = max(maximum, shuffle_xor(maximum, mask));
  for (int64_t p = lane; p < count; p += 32) {
    const Accumulator share = exponential(splits[p * 3 * regions] - shift(maximum));
    total += share * splits[(p * 3 + 1) * regions];
    rounded_total += share * splits[(p * 3 + 2) * regions];
  }
  for (int mask = 16; mask > 0; mask /= 2) {
    total += shuffle_xor(total, mask);
    rounded_total += shuffle_xor(rounded_total, mask);
  }
  for (int64_t p = lane; p < count; p += 32)
    from.shares[(image * count + p) * regions + k] =
        exponential(splits[p * 3 * regions] - shift(maximum)) / rounded_total;
  if (lane > 0) return;
  const Image stats(a.stats, image);
  *stats.at<Accumulator>(stats.rows - 2, k) = maximum;
  *stats.at<Accumulator>(stats.rows - 1, k) = total;
}

template <class T, int REGIONS>
void gather_forward(const GatherForward& a, const Queue& queue) {
  using Accumulator = AccumulatorOf<T>;
  const int64_t batch = a.feats.batch, channels = a.feats.rows, regions = a.logits.rows;
  const int64_t blocks = batch * tiles(channels, kChannels<T>) * tiles(regions, REGIONS);
  const Splits splits = splits_of(a.feats.columns, kInner<T>, blocks);
  const GatherSplits<Accumulator> partial{splits, queue.scratch<Accumulator>(batch, splits.count, channels, regions),
                                          queue.scratch<Accumulator>(batch, splits.count, 3, regions),
                                          queue.scratch<Accumulator>(batch, splits.count, regions)};
  launch(gather_forward_kernel<T, REGIONS>, blocks * splits.count, kGatherForwardBytes<T, REGIONS>, queue, a, partial);
  launch(gather_statistics_kernel<Accumulator>, batch * tiles(regions, kWarps), 0, queue, a, partial);
  reduce_splits(ReduceSplits<Accumulator>{a.out, a.stats, partial.sums, partial.shares, splits.count, Accumulator(1)},
                queue);
}

// delta = the sum over channels of grad * the unrounded result, which all pixels of a region share in the softmax's
// derivative.
template <class Accumulator>
OCR_KERNEL gather_delta_kernel(GatherBackward a, Accumulator* delta, int64_t* peaks) {
  const int64_t channels = a.grad.rows, regions = a.grad.columns, blocks = tiles(regions, 32);
  const int64_t image = block_index() / blocks;
  const int lane = thread_index() % 32, warp = thread_index() / 32;
  const int64_t k = block_index() % blocks * 32 + lane;
  const Image grad(a.grad, image), stats(a.stats, image);
  Accumulator* const sums = reinterpret_cast<Accumulator*>(shared_memory());  // [warps, 32]
  Accumulator sum = 0;
  if (k < regions)
    for (int64_t c = warp; c < channels; c += kWarps) sum += grad.get<Accumulator>(c, k) * *stats.at<Accumulator>(c, k);
  sums[warp * 32 + lane] = sum;
  synchronize();
  if (warp > 0 || k >= regions) return;
  for (int w = 1; w < kWarps; ++w) sum += sums[w * 32 + lane];
  delta[image * regions + k] = sum;
  peaks[image * regions + k] = -1;
}

// exp(score - maximum) / sum: a pixel's weight in region k, from its saved statistics.
template <class Accumulator>
OCR_DEVICE Accumulator gather_weight(Accumulator score, const Image& stats, int64_t k) {
  return exponential(score - *stats.at<Accumulator>(stats.rows - 2, k)) / *stats.at<Accumulator>(stats.rows - 1, k);
}

// P = softmax_i(scale * M), times what T lifts weights by, as a factor of a product.
template <class T>
class GatherWeightsTile {
  using Accumulator = AccumulatorOf<T>;
  static constexpr int REGIONS = kRegionStep, PIXELS = kPixels<T>, kEach = REGIONS * PIXELS / kThreads;

 public:
  using Source = GatherBackward;
  static constexpr int kBytes = tile_bytes<T>(REGIONS, PIXELS);

  OCR_DEVICE GatherWeightsTile(const Source& source, int64_t image)
      : logits_(source.logits, image), stats_(source.stats, image), scale_(source.scale) {}

  OCR_DEVICE void fetch(int64_t region, int64_t pixel) {
    first_region_ = region;
    with_type(logits_.dtype, [&](auto type) {
      const auto* from = logits_.at<decltype(type)>(region + region_of(0), pixel + pixel_of(0));
      const int64_t step =
          logits_.channels_last() ? kThreads / REGIONS * logits_.stride_column : kThreads / PIXELS * logits_.stride_row;
      OCR_UNROLL
      for (int e = 0; e < kEach; ++e, from += step)
        scores_[e] = logits_.has(region + region_of(e), pixel + pixel_of(e))
                         ? scale_ * Accumulator(to_accumulator(*from))
                         : Accumulator(0);
    });
  }
  OCR_DEVICE Tile<T, REGIONS, PIXELS> put(void* shared) const {
    const Tile<T, REGIONS, PIXELS> tile{static_cast<T*>(shared), logits_.channels_last()};
    OCR_UNROLL
    for (int e = 0; e < kEach; ++e) {
      const int64_t k = first_region_ + region_of(e);
      Accumulator weight = 0;
      if (k < logits_.rows) weight = gather_weight(scores_[e], stats_, k);
      tile.at(region_of(e), pixel_of(e)) = Narrow<T>::value(weight * Arithmetic<T>::lift);
    }
    return tile;
  }

 private:
  // neighbouring threads have neighbours in memory
  OCR_DEVICE int region_of(int e) const {
    return logits_.channels_last() ? thread_index() % REGIONS : e * (kThreads / PIXELS) + thread_index() / PIXELS;
  }
  OCR_DEVICE int pixel_of(int e) const {
    return logits_.channels_last() ? e * (kThreads / REGIONS) + thread_index() / REGIONS : thread_index() % PIXELS;
  }

  Image logits_, stats_;
  int64_t first_region_ = 0;
  Accumulator scale_, scores_[kEach];
};

template <class T, int REGIONS>
constexpr int kGatherBackwardLogitsBytes =
    max(kSumOverChannels<T, REGIONS, kPixels<T>>, Result<AccumulatorOf<T>, REGIONS, kPixels<T>>::kBytes);

// dM = scale * P * (dF^T X - delta). A softmax's gradients add up to zero: that of a peak, the pixel with more than
// half of a region's weight, in which nearly equal numbers are subtracted, is left to `gather_peaks_kernel`, with the
// sums of the others over the pixels of each tile [B, tiles, K].
template <class T, int REGIONS>
OCR_KERNEL gather_backward_logits_kernel(GatherBackward a, AccumulatorOf<T>* deltas, int64_t* peaks,
                                         AccumulatorOf<T>* others) {
  using Accumulator = AccumulatorOf<T>;
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

  const Result<Accumulator, REGIONS, PIXELS> dlogits(a.dlogits, image, shared);
  dweights.for_each([&](int k, int i, Accumulator sum) { dlogits.tile.at(k, i) = sum; });
  synchronize();
  const Image logits(a.logits, image), stats(a.stats, image);
  const Accumulator* const delta = deltas + image * regions;
  const Accumulator scale(a.scale);
  dlogits.write(region, pixel, [&](int64_t k, int64_t i, Accumulator dweight) {
    const Accumulator weight = gather_weight(scale * logits.get<Accumulator>(k, i), stats, k);
    const Accumulator dscore = weight * (dweight - delta[k]);
    const bool is_peak = weight > Accumulator(0.5);
    if (is_peak) peaks[image * regions + k] = i;
    dlogits.tile.at(int(k - region), int(i - pixel)) = is_peak ? dscore - dscore : dscore;  // 0 of a peak, or NaN
    return scale * dscore;
  });
  synchronize();
  const int lane = thread_index() % 32;
  const int64_t left = a.feats.columns - pixel, pixels = left < PIXELS ? left : PIXELS;
  for (int r = thread_index() / 32; r < REGIONS && region + r < regions; r += kWarps) {
    Accumulator sum = 0;
    for (int i = lane; i < pixels; i += 32) sum += dlogits.tile.at(r, i);
    for (int mask = 16; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
    if (lane == 0) others[(block_index() / region_tiles) * regions + region + r] = sum;
  }
}

// The gradient of a region's peak: minus the sum of its other pixels'. A warp has a region.
template <class Accumulator>
OCR_KERNEL gather_peaks_kernel(GatherBackward a, const int64_t* peaks, const Accumulator* others, int64_t pixel_tiles) {
  const int64_t regions = a.dlogits.rows, blocks = tiles(regions, kWarps);
  const int64_t image = block_index() / blocks, k = block_index() % blocks * kWarps + thread_index() / 32;
  if (k >= regions) return;
  const int lane = thread_index() % 32;
  Accumulator sum = 0;
  for (int64_t tile = lane; tile < pixel_tiles; tile += 32) sum += others[(image * pixel_tiles + tile) * regions + k];
  for (int mask = 16; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
  const int64_t peak = peaks[image * regions + k];
  if (lane == 0 && peak >= 0) Image(a.dlogits, image).set(k, peak, -Accumulator(a.scale) * sum);
}

template <class T, int REGIONS>
void gather_backward(const GatherBackward& a, const Queue& queue) {
  using Accumulator = AccumulatorOf<T>;
  const int64_t batch = a.feats.batch, regions = a.logits.rows;
  if (a.dlogits.data) {
    Accumulator* const delta = queue.scratch<Accumulator>(batch, regions);
    int64_t* const peaks = queue.scratch<int64_t>(batch, regions);
    const int64_t pixel_tiles = tiles(a.feats.columns, kPixels<T>);
    Accumulator* const others = queue.scratch<Accumulator>(batch, pixel_tiles, regions);
    launch(gather_delta_kernel<Accumulator>, batch * tiles(regions, 32), int(sizeof(Accumulator)) * kThreads, queue, a,
           delta, peaks);
    launch(gather_backward_logits_kernel<T, REGIONS>, batch * tiles(regions, REGIONS) * pixel_tiles,
           kGatherBackwardLogitsBytes<T, REGIONS>, queue, a, delta, peaks, others);
    launch(gather_peaks_kernel<Accumulator>, batch * tiles(regions, kWarps), 0, queue, a,
           static_cast<const int64_t*>(peaks), static_cast<const Accumulator*>(others), pixel_tiles);
  }
  if (a.dfeats.data)
    sum_over_regions<T, GatherWeightsTile<T>>({a.dfeats, a.grad, a, Accumulator(1) / Arithmetic<T>::lift}, queue);
}

}  // namespace ocr_kernels::gpu
