// The attention's kernels for GPUs. In every one a block has 256 threads and a tile of the result.
#pragma once

#include "../gpu/splits.h"

namespace ocr_kernels::gpu {

// The threads that share a pixel in what is done along regions: neighbours in a warp, with every kPixelThreads-th
// region.
template <class T>
constexpr int kPixelThreads = kThreads / kPixels<T>;

template <class T, class Accumulator>
OCR_DEVICE Accumulator sum_over_pixel(Accumulator x) {
  OCR_UNROLL
  for (int mask = kPixelThreads<T> / 2; mask > 0; mask /= 2) x += shuffle_xor(x, mask);
  return x;
}
template <class T, class Accumulator>
OCR_DEVICE Accumulator max_over_pixel(Accumulator x) {
  OCR_UNROLL
  for (int mask = kPixelThreads<T> / 2; mask > 0; mask /= 2) x = max(x, shuffle_xor(x, mask));
  return x;
}

// Shared memory of the forward: factors of the products, scores, the weights made of them (in their place, where they
// are as large), and a decay or total of every pixel.
template <class T, int REGIONS>
struct AttentionForwardMemory {
  static constexpr int kColumns = 64;  // of value, in a product with the weights
  static constexpr bool kInPlace = sizeof(T) == sizeof(AccumulatorOf<T>);
  static constexpr int kFactors = max(kSumOverChannels<T, REGIONS, kPixels<T>>, Transfer<T, kColumns, REGIONS>::kBytes);
  static constexpr int kScores = tile_bytes<AccumulatorOf<T>>(REGIONS, kPixels<T>);
  static constexpr int kWeights = kInPlace ? 0 : tile_bytes<T>(REGIONS, kPixels<T>);
  static constexpr int kBytes =
      max(kFactors + kScores + kWeights, Result<AccumulatorOf<T>, kColumns, kPixels<T>>::kBytes) +
      kPixels<T> * int(sizeof(AccumulatorOf<T>));
};

constexpr int kColumnTiles = 4;  // of value, whose sums a block has

// A block has a tile of pixels and up to 256 channels of their context. Regions come in tiles; what was summed of the
// ones before is rescaled whenever a tile raises a pixel's maximum.
template <class T, int REGIONS>
OCR_KERNEL attention_forward_kernel(AttentionForward a) {
  using Accumulator = AccumulatorOf<T>;
  using Memory = AttentionForwardMemory<T, REGIONS>;
  constexpr int PIXELS = kPixels<T>, COLUMNS = Memory::kColumns, kEach = REGIONS / kPixelThreads<T>;
  const int64_t regions = a.key.columns, channels = a.out.rows;
  const Accumulator scale(a.scale);
  // channel tiles vary fastest: blocks that share pixels run together
  const int64_t channel_tiles = tiles(channels, COLUMNS * kColumnTiles), pixel_tiles = tiles(a.out.columns, PIXELS);
  const int64_t channel = block_index() % channel_tiles * (COLUMNS * kColumnTiles);
  const int64_t pixel = block_index() / channel_tiles % pixel_tiles * PIXELS;
  const int64_t image = block_index() / channel_tiles / pixel_tiles;
  unsigned char* const shared = shared_memory();
  const Tile<Accumulator, REGIONS, PIXELS> scores{reinterpret_cast<Accumulator*>(shared + Memory::kFactors), false};
  const Tile<T, REGIONS, PIXELS> weights{
      reinterpret_cast<T*>(shared + Memory::kFactors + (Memory::kInPlace ? 0 : Memory::kScores)), false};
  Accumulator* const of_pixel = reinterpret_cast<Accumulator*>(shared + Memory::kBytes) - PIXELS;
  const int i = thread_index() / kPixelThreads<T>, first = thread_index() % kPixelThreads<T>;

  Transfer<T, COLUMNS, REGIONS> value(a.value, image);
  Sums<T, COLUMNS, PIXELS> sums[kColumnTiles];
  OCR_UNROLL
  for (int c = 0; c < kColumnTiles; ++c) sums[c].clear();
  Accumulator maximum = -Accumulator(INFINITY), total = 0;
  for (int64_t region = 0; region < regions; region += REGIONS) {
    {
      Transfer<T, kInner<T>, REGIONS> key(a.key, image);
      Transfer<T, kInner<T>, PIXELS> query(a.query, image);
      Sums<T, REGIONS, PIXELS> products;
      products.clear();
      add_sum_over_channels(products, key, region, query, pixel, shared);
      products.for_each([&](int k, int j, Accumulator sum) { scores.at(k, j) = scale * sum; });
    }
    value.fetch(channel, region);
    synchronize();
    Accumulator new_maximum = maximum;
    OCR_UNROLL_BY(4)
    for (int e = 0; e < kEach; ++e) {
      const int k = first + e * kPixelThreads<T>;
      if (region + k < regions) new_maximum = max(new_maximum, scores.at(k, i));
    }
    new_maximum = max_over_pixel<T>(new_maximum);
    const Accumulator subtracted = shift(new_maximum), decay = exponential(maximum - subtracted);
    maximum = new_maximum;
    Accumulator sum = 0;
    OCR_UNROLL_BY(4)
    for (int e = 0; e < kEach; ++e) {
      const int k = first + e * kPixelThreads<T>;
      const Accumulator weight = region + k < regions ? exponential(scores.at(k, i) - subtracted) : Accumulator(0);
      const T rounded = Narrow<T>::value(weight * Arithmetic<T>::lift);
      weights.at(k, i) = rounded;
      sum += to_accumulator(rounded);
    }
    total = total * decay + sum;
    if (region && first == 0) of_pixel[i] = decay;
    OCR_UNROLL
    for (int c = 0; c < kColumnTiles; ++c) {
      const bool wanted = channel + c * COLUMNS < channels;
      if (!wanted) continue;
      const auto rows = value.put(shared);
      synchronize();
      if (channel + (c + 1) * COLUMNS < channels && c + 1 < kColumnTiles)
        value.fetch(channel + (c + 1) * COLUMNS, region);
      if (region) sums[c].for_each([&](int, int j, Accumulator& x) { x *= of_pixel[j]; });
      sums[c].add_product(rows.by_rows(), weights.by_columns(), REGIONS);
      synchronize();
    }
  }

  total = sum_over_pixel<T>(total);
  if (first == 0) of_pixel[i] = total;
  const Result<Accumulator, COLUMNS, PIXELS> out(a.out, image, shared);
  OCR_UNROLL
  for (int c = 0; c < kColumnTiles; ++c) {
    synchronize();
    sums[c].for_each([&](int row, int j, Accumulator sum) { out.tile.at(row, j) = sum / of_pixel[j]; });
    synchronize();
    out.write(channel + c * COLUMNS, pixel, [](int64_t, int64_t, Accumulator sum) { return sum; });
  }
}

template <class T, int REGIONS>
struct AttentionScoresMemory {
  static constexpr int kFactors = kSumOverChannels<T, REGIONS, kPixels<T>>;
  static constexpr int kScores = tile_bytes<AccumulatorOf<T>>(REGIONS, kPixels<T>);
  static constexpr int kBytes = kFactors + 2 * kScores;
};

// w = softmax_k(scale * q . k), times what T lifts weights by, and dS = w * (dw - sum_k w dw) with dw = v . dY. A block
// has a tile of pixels and goes over their regions: once for the softmax's maximum, its sum and that of w dw, and where
// one tile does not hold all regions once more for the results [B, K, N], which are not wanted where they have no data.
template <class T, int REGIONS>
OCR_KERNEL attention_scores_kernel(AttentionBackward a, Tensor to_weights, Tensor to_dscores) {
  using Accumulator = AccumulatorOf<T>;
  using Memory = AttentionScoresMemory<T, REGIONS>;
  constexpr int PIXELS = kPixels<T>, kEach = REGIONS / kPixelThreads<T>;
  const int64_t regions = a.key.columns, pixel_tiles = tiles(a.query.columns, PIXELS);
  const int64_t pixel = block_index() % pixel_tiles * PIXELS, image = block_index() / pixel_tiles;
  const Accumulator scale(a.scale);
  unsigned char* const shared = shared_memory();
  const Result<Accumulator, REGIONS, PIXELS> weights(to_weights, image, shared + Memory::kFactors);
  const Result<Accumulator, REGIONS, PIXELS> dscores(to_dscores, image, shared + Memory::kFactors + Memory::kScores);
  const int i = thread_index() / kPixelThreads<T>, first = thread_index() % kPixelThreads<T>;

  // scores and dweights of the tile, in the place of what becomes of them
  const auto make_tile = [&](int64_t region) {
    Transfer<T, kInner<T>, REGIONS> key(a.key, image);
    Transfer<T, kInner<T>, PIXELS> query(a.query, image);
    Sums<T, REGIONS, PIXELS> sums;
    sums.clear();
    add_sum_over_channels(sums, key, region, query, pixel, shared);
    sums.for_each([&](int k, int j, Accumulator sum) { weights.tile.at(k, j) = scale * sum; });
    if (to_dscores.data) {
      Transfer<T, kInner<T>, REGIONS> value(a.value, image);
      Transfer<T, kInner<T>, PIXELS> grad(a.grad, image);
      sums.clear();
      add_sum_over_channels(sums, value, region, grad, pixel, shared);
      sums.for_each([&](int k, int j, Accumulator sum) { dscores.tile.at(k, j) = sum; });
    }
    synchronize();
  };

  const int64_t region_tiles = tiles(regions, REGIONS), steps = region_tiles == 1 ? 1 : 2 * region_tiles;
  // dot is of what dw exceeds that of the highest weight by: nearly nothing is left of dw - dot where that is nearly 1
  Accumulator maximum = -Accumulator(INFINITY), total = 0, highest = 0, dot = 0;
  OCR_UNROLL_BY(1)
  for (int64_t step = 0; step < steps; ++step) {
    const int64_t region = step % region_tiles * REGIONS;
    make_tile(region);
    if (step < region_tiles) {
      Accumulator new_maximum = maximum;
      OCR_UNROLL_BY(4)
      for (int e = 0; e < kEach; ++e) {
        const int k = first + e * kPixelThreads<T>;
        if (region + k < regions) new_maximum = max(new_maximum, weights.tile.at(k, i));
      }
      new_maximum = max_over_pixel<T>(new_maximum);
      const Accumulator subtracted = shift(new_maximum), decay = exponential(maximum - subtracted);
      maximum = new_maximum;
      Accumulator new_highest = -Accumulator(INFINITY);
      if (to_dscores.data) OCR_UNROLL_BY(4)
      for (int e = 0; e < kEach; ++e) {
        const int k = first + e * kPixelThreads<T>;
        if (region + k < regions && weights.tile.at(k, i) == new_maximum)
          new_highest = max(new_highest, dscores.tile.at(k, i));
      }
      new_highest = max_over_pixel<T>(new_highest);
      if (new_highest == -Accumulator(INFINITY)) new_highest = highest;
      dot += total * (highest - new_highest);
      highest = new_highest;
      Accumulator tile_total = 0, tile_dot = 0;
      OCR_UNROLL_BY(4)
      for (int e = 0; e < kEach; ++e) {
        const int k = first + e * kPixelThreads<T>;
        if (region + k >= regions) continue;
        const Accumulator weight = exponential(weights.tile.at(k, i) - subtracted);
        tile_total += weight;
        if (to_dscores.data) tile_dot += weight * (dscores.tile.at(k, i) - highest);
      }
      total = total * decay + tile_total;
      dot = dot * decay + tile_dot;
    }
    if (step == region_tiles - 1) {
      total = sum_over_pixel<T>(total);
      dot = sum_over_pixel<T>(dot) / total;
    }
    if (step == steps - 1 || step >= region_tiles) {
      OCR_UNROLL_BY(4)
      for (int e = 0; e < kEach; ++e) {
        const int k = first + e * kPixelThreads<T>;
        const Accumulator weight = exponential(weights.tile.at(k, i) - maximum) / total;
        weights.tile.at(k, i) = weight * Arithmetic<T>::lift;
        if (to_dscores.data) dscores.tile.at(k, i) = weight * (dscores.tile.at(k, i) - highest - dot);
      }
      synchronize();
      const auto same = [](int64_t, int64_t, Accumulator x) { return x; };
      if (to_weights.data) weights.write(region, pixel, same);
      if (to_dscores.data) dscores.write(region, pixel, same);
    }
    synchronize();
  }
}

// A tile of such a map, as a factor of a sum over regions.
template <class T>
struct MapTile : Transfer<T, kRegionStep, kPixels<T>> {
  using Source = Tensor;
  using Transfer<T, kRegionStep, kPixels<T>>::Transfer;
};

template <class Accumulator>
struct SumOverPixels {
  Tensor pixels, map;    // [B, channels, N], [B, K, N]
  Accumulator* partial;  // [B, splits, channels, K]
  Splits splits;
};

template <class T, int REGIONS>
constexpr int kSumOverPixelsBytes =
    Transfer<T, kChannels<T>, kInner<T>>::kBytes + Transfer<T, REGIONS, kInner<T>>::kBytes;

// partial = pixels map^T over a split of the pixels
template <class T, int REGIONS>
OCR_KERNEL sum_over_pixels_kernel(SumOverPixels<AccumulatorOf<T>> a) {
  constexpr int CHANNELS = kChannels<T>, PIXELS = kInner<T>;
  const int64_t channels = a.pixels.rows, regions = a.map.rows;
  const SplitTile tile(a.pixels, regions, a.splits, CHANNELS, REGIONS);
  const int64_t region = tile.region, channel = tile.channel, task = tile.task, image = tile.image;
  const int64_t first = tile.first, end = tile.end;
  unsigned char* const shared = shared_memory();

  Transfer<T, CHANNELS, PIXELS> pixels(a.pixels, image);
  Transfer<T, REGIONS, PIXELS> map(a.map, image);
  Sums<T, CHANNELS, REGIONS> sums;
  sums.clear();
  pixels.fetch(channel, first);
  map.fetch(region, first);
  for (int64_t pixel = first; pixel < end; pixel += PIXELS) {
    const auto rows = pixels.put(shared);
    const auto columns = map.put(shared + pixels.kBytes);
    synchronize();
    if (pixel + PIXELS < end) {
      pixels.fetch(channel, pixel + PIXELS);
      map.fetch(region, pixel + PIXELS);
    }
    sums.add_product(rows.by_rows(), columns.by_rows(), PIXELS);
    synchronize();
  }
  write_split(sums, a.partial + task * channels * regions, channels, regions, channel, region);
}

// out [B, channels, K] = factor * pixels map^T
template <class T, int REGIONS>
void sum_over_pixels(const Tensor& out, const Tensor& pixels, const Tensor& map, double factor, const Queue& queue) {
  using Accumulator = AccumulatorOf<T>;
  const int64_t blocks = out.batch * tiles(out.rows, kChannels<T>) * tiles(out.columns, REGIONS);
  const Splits splits = splits_of(pixels.columns, kInner<T>, blocks);
  Accumulator* const partial = queue.scratch<Accumulator>(out.batch, splits.count, out.rows, out.columns);
  launch(sum_over_pixels_kernel<T, REGIONS>, blocks * splits.count, kSumOverPixelsBytes<T, REGIONS>, queue,
         SumOverPixels<Accumulator>{pixels, map, partial, splits});
  reduce_splits(ReduceSplits<Accumulator>{out, {}, partial, nullptr, splits.count, Accumulator(factor)}, queue);
}

template <class T, int REGIONS>
void attention_forward(const AttentionForward& a, const Queue& queue) {
  using Memory = AttentionForwardMemory<T, REGIONS>;
  const int64_t channel_tiles = tiles(a.out.rows, Memory::kColumns * kColumnTiles);
  launch(attention_forward_kernel<T, REGIONS>, a.out.batch * tiles(a.out.columns, kPixels<T>) * channel_tiles,
         Memory::kBytes, queue, a);
}

template <class T, int REGIONS>
void attention_backward(const AttentionBackward& a, const Queue& queue) {
  const int64_t batch = a.query.batch, regions = a.key.columns, pixels = a.query.columns;
  const int64_t line = tiles(pixels, kGap<T>) * kGap<T>;  // of a map: whole pieces of 16 bytes
  const auto map = [&](bool wanted) {
    if (!wanted) return Tensor{};
    return Tensor{
        queue.scratch<T>(batch, regions, line), a.query.dtype, batch, regions, pixels, product(regions, line), line, 1};
  };
  const Tensor weights = map(a.dvalue.data), dscores = map(a.dquery.data || a.dkey.data);
  if (weights.data || dscores.data)
    launch(attention_scores_kernel<T, REGIONS>, batch * tiles(pixels, kPixels<T>),
           AttentionScoresMemory<T, REGIONS>::kBytes, queue, a, weights, dscores);
  if (a.dvalue.data) sum_over_pixels<T, REGIONS>(a.dvalue, a.grad, weights, 1 / double(Arithmetic<T>::lift), queue);
  if (a.dkey.data) sum_over_pixels<T, REGIONS>(a.dkey, a.query, dscores, a.scale, queue);
  if (a.dquery.data) sum_over_regions<T, MapTile<T>>({a.dquery, a.key, dscores, AccumulatorOf<T>(a.scale)}, queue);
}

}  // namespace ocr_kernels::gpu
