// Kernels of both ops: sums over regions, and the splits of sums over pixels reduced.
#pragma once

#include <stdexcept>
#include <string>
#include <type_traits>

#include "tiles.h"

namespace ocr_kernels::gpu {

// How an image's pixels are divided among blocks that each sum a split of them: by the shape alone, so that a result is
// the same on every GPU.
struct Splits {
  int64_t pixels, count;
};
inline Splits splits_of(int64_t pixels, int64_t step, int64_t blocks_of_a_split) {
  const int64_t steps = tiles(pixels, step);
  // some blocks for every GPU's units
  const int64_t wanted = tiles(512, blocks_of_a_split < 1 ? 1 : blocks_of_a_split);
  const int64_t length = tiles(steps, wanted < steps ? wanted : steps) * step;
  return {length, tiles(pixels, length)};
}

// What a block has of the sums over pixels: a tile of channels and regions, and a split of an image's pixels.
struct SplitTile {
  int64_t region, channel, task, image, first, end;

  // region tiles vary fastest: blocks that share pixels run together
  OCR_DEVICE SplitTile(const Tensor& pixels, int64_t regions, const Splits& splits, int channel_tile, int region_tile) {
    const int64_t region_tiles = tiles(regions, region_tile), channel_tiles = tiles(pixels.rows, channel_tile);
    region = block_index() % region_tiles * region_tile;
    channel = block_index() / region_tiles % channel_tiles * channel_tile;
    task = block_index() / region_tiles / channel_tiles;
    image = task / splits.count;
    first = task % splits.count * splits.pixels;
    end = first + splits.pixels < pixels.columns ? first + splits.pixels : pixels.columns;
  }
};

// Writes the sums [channels, regions] of a split: partial [channels, regions] in memory, from (channel, region) on.
template <class T, int CHANNELS, int REGIONS>
OCR_DEVICE void write_split(Sums<T, CHANNELS, REGIONS>& sums, AccumulatorOf<T>* partial, int64_t channels,
                            int64_t regions, int64_t channel, int64_t region) {
  sums.for_each([&](int c, int k, AccumulatorOf<T> sum) {
    if (channel + c < channels && region + k < regions) partial[(channel + c) * regions + region + k] = sum;
  });
}

template <class Accumulator>
struct ReduceSplits {
  Tensor out;                 // [B, channels, regions]
  Tensor unrounded;           // the same in Accumulator, in its first rows; null data where it is not wanted
  const Accumulator* splits;  // [B, count, channels, regions]
  const Accumulator* shares;  // [B, count, regions], what each split counts; all count 1 where this is null
  int64_t count;
  Accumulator factor;
};

// out = factor * the sum of the splits. A block has 32 neighbours of an image's results; its warps take turns.
template <class Accumulator>
OCR_KERNEL reduce_splits_kernel(ReduceSplits<Accumulator> a) {
  const int64_t regions = a.out.columns, size = a.out.rows * regions, blocks = tiles(size, 32);
  const int64_t image = block_index() / blocks;
  const int lane = thread_index() % 32, warp = thread_index() / 32;
  const int64_t at = block_index() % blocks * 32 + lane;
  Accumulator* const sums = reinterpret_cast<Accumulator*>(shared_memory());  // [warps, 32]
  Accumulator sum = 0;
  if (at < size)
    for (int64_t split = image * a.count + warp; split < (image + 1) * a.count; split += kWarps)
      sum += a.splits[split * size + at] * (a.shares ? a.shares[split * regions + at % regions] : Accumulator(1));
  sums[warp * 32 + lane] = sum;
  synchronize();
  if (warp > 0 || at >= size) return;
  for (int w = 1; w < kWarps; ++w) sum += sums[w * 32 + lane];
  const Image out(a.out, image), unrounded(a.unrounded, image);
  out.set(at / regions, at % regions, a.factor * sum);
  if (a.unrounded.data) *unrounded.at<Accumulator>(at / regions, at % regions) = a.factor * sum;
}

template <class Accumulator>
void reduce_splits(const ReduceSplits<Accumulator>& a, const Queue& queue) {
  launch(reduce_splits_kernel<Accumulator>, a.out.batch * tiles(a.out.rows * a.out.columns, 32),
         int(sizeof(Accumulator)) * kThreads, queue, a);
}

// out [B, channels, pixels] = factor * matrix [B, channels, regions] weights [B, regions, pixels].
// Weights is how a tile [kRegionStep, kPixels] of them comes to shared memory: `fetch(region, pixel)`, then
// `put(shared)`.
template <class Source, class Accumulator>
struct SumOverRegions {
  Tensor out, matrix;
  Source source;
  Accumulator factor;
};

template <class T, class Weights>
constexpr int kSumOverRegionsBytes = max(Transfer<T, kChannels<T>, kRegionStep>::kBytes + Weights::kBytes,
                                         Result<AccumulatorOf<T>, kChannels<T>, kPixels<T>>::kBytes);

template <class T, class Weights>
OCR_KERNEL sum_over_regions_kernel(SumOverRegions<typename Weights::Source, AccumulatorOf<T>> a) {
  constexpr int CHANNELS = kChannels<T>, REGIONS = kRegionStep, PIXELS = kPixels<T>;
  // channel tiles vary fastest: blocks that share weights run together
  const int64_t channel_tiles = tiles(a.out.rows, CHANNELS), pixel_tiles = tiles(a.out.columns, PIXELS);
  const int64_t channel = block_index() % channel_tiles * CHANNELS;
  const int64_t pixel = block_index() / channel_tiles % pixel_tiles * PIXELS;
  const int64_t image = block_index() / channel_tiles / pixel_tiles, regions = a.matrix.columns;
  unsigned char* const shared = shared_memory();

  Transfer<T, CHANNELS, REGIONS> matrix(a.matrix, image);
  Weights weights(a.source, image);
  Sums<T, CHANNELS, PIXELS> sums;
  sums.clear();
  matrix.fetch(channel, 0);
  weights.fetch(0, pixel);
  for (int64_t region = 0; region < regions; region += REGIONS) {
    const auto rows = matrix.put(shared);
    const auto columns = weights.put(shared + matrix.kBytes);
    synchronize();
    if (region + REGIONS < regions) {
      matrix.fetch(channel, region + REGIONS);
      weights.fetch(region + REGIONS, pixel);
    }
    sums.add_product(rows.by_rows(), columns.by_columns(), REGIONS);
    synchronize();
  }
  const Result<AccumulatorOf<T>, CHANNELS, PIXELS> out(a.out, image, shared);
  sums.for_each([&](int c, int i, AccumulatorOf<T> sum) { out.tile.at(c, i) = sum; });
  synchronize();
  out.write(channel, pixel, [&](int64_t, int64_t, AccumulatorOf<T> sum) { return a.factor * sum; });
}

template <class T, class Weights>
void sum_over_regions(const SumOverRegions<typename Weights::Source, AccumulatorOf<T>>& a, const Queue& queue) {
  launch(sum_over_regions_kernel<T, Weights>,
         a.out.batch * tiles(a.out.rows, kChannels<T>) * tiles(a.out.columns, kPixels<T>),
         kSumOverRegionsBytes<T, Weights>, queue, a);
}

[[noreturn]] inline void unknown_dtype(Dtype dtype) {
  throw std::invalid_argument("dtype " + std::to_string(int(dtype)) +
                              " is none of float64, float32, bfloat16, float16");
}

// Kernels cannot name the dtype that they do not know.
template <class... Tensors>
void check_dtypes(const Tensors&... tensors) {
  for (const Dtype dtype : {tensors.dtype...}) switch (dtype) {
      case Dtype::Float64:
      case Dtype::Float32:
      case Dtype::BFloat16:
      case Dtype::Float16:
        continue;
      default:
        unknown_dtype(dtype);
    }
}

// Calls `run` with an element type and with how many regions a tile holds.
template <class Run>
void with_tiles(Dtype dtype, int64_t regions, Run run) {
  constexpr std::integral_constant<int, 32> narrow{};
  constexpr std::integral_constant<int, 64> wide{};
  switch (dtype) {
    case Dtype::Float64:
      return run(double(), narrow);
    case Dtype::Float32:
      return regions <= 32 ? run(float(), narrow) : run(float(), wide);
    case Dtype::BFloat16:
      return regions <= 32 ? run(BFloat16(), narrow) : run(BFloat16(), wide);
    case Dtype::Float16:
      return regions <= 32 ? run(Float16(), narrow) : run(Float16(), wide);
  }
  unknown_dtype(dtype);
}

}  // namespace ocr_kernels::gpu
