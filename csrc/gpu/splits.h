// Kernels of both ops: sums over regions, and the parts of sums over pixels joined.
#pragma once

#include <type_traits>

#include "tiles.h"

namespace ocr_kernels::gpu {

// How an image's pixels are divided among blocks that each sum a part of them: by the shape alone, so that a result is
// the same on every GPU.
struct Parts {
  int64_t pixels, count;
};
inline Parts parts_of(int64_t pixels, int64_t step, int64_t blocks_of_a_part) {
  const int64_t steps = tiles(pixels, step);
  const int64_t wanted = tiles(512, blocks_of_a_part < 1 ? 1 : blocks_of_a_part);  // some blocks for every GPU's units
  const int64_t length = tiles(steps, wanted < steps ? wanted : steps) * step;
  return {length, tiles(pixels, length)};
}

// What a block has of the sums over pixels: a tile of channels and regions, and a part of an image's pixels.
struct PartTile {
  int64_t region, channel, task, image, first, end;

  // region tiles vary fastest: blocks that share pixels run together
  OCR_DEVICE PartTile(const Tensor& pixels, int64_t regions, const Parts& parts, int channel_tile, int region_tile) {
    const int64_t region_tiles = tiles(regions, region_tile), channel_tiles = tiles(pixels.rows, channel_tile);
    region = block_index() % region_tiles * region_tile;
    channel = block_index() / region_tiles % channel_tiles * channel_tile;
    task = block_index() / region_tiles / channel_tiles;
    image = task / parts.count;
    first = task % parts.count * parts.pixels;
    end = first + parts.pixels < pixels.columns ? first + parts.pixels : pixels.columns;
  }
};

// Writes the sums [channels, regions] of a part: partial [channels, regions] in memory, from (channel, region) on.
template <class T, int CHANNELS, int REGIONS>
OCR_DEVICE void write_part(Sums<T, CHANNELS, REGIONS>& sums, NumberOf<T>* partial, int64_t channels, int64_t regions,
                           int64_t channel, int64_t region) {
  sums.for_each([&](int c, int k, NumberOf<T> sum) {
    if (channel + c < channels && region + k < regions) partial[(channel + c) * regions + region + k] = sum;
  });
}

template <class Number>
struct JoinParts {
  Tensor out;            // [B, channels, regions]
  Tensor unrounded;      // the same in Number, in its first rows; null data where it is not wanted
  const Number* parts;   // [B, count, channels, regions]
  const Number* shares;  // [B, count, regions], what each part counts; all count 1 where this is null
  int64_t count;
  Number factor;
};

// out = factor * the sum of the parts. A block has 32 neighbours of an image's results, its warps a part each in turn.
template <class Number>
OCR_KERNEL join_parts_kernel(JoinParts<Number> a) {
  const int64_t regions = a.out.columns, size = a.out.rows * regions, blocks = tiles(size, 32);
  const int64_t image = block_index() / blocks;
  const int lane = thread_index() % 32, warp = thread_index() / 32;
  const int64_t at = block_index() % blocks * 32 + lane;
  Number* const sums = reinterpret_cast<Number*>(shared_memory());  // [warps, 32]
  Number sum = 0;
  if (at < size)
    for (int64_t part = image * a.count + warp; part < (image + 1) * a.count; part += kWarps)
      sum += a.parts[part * size + at] * (a.shares ? a.shares[part * regions + at % regions] : Number(1));
  sums[warp * 32 + lane] = sum;
  synchronize();
  if (warp > 0 || at >= size) return;
  for (int w = 1; w < kWarps; ++w) sum += sums[w * 32 + lane];
  const Image out(a.out, image), unrounded(a.unrounded, image);
  out.set(at / regions, at % regions, a.factor * sum);
  if (a.unrounded.data) *unrounded.at<Number>(at / regions, at % regions) = a.factor * sum;
}

template <class Number>
void join_parts(const JoinParts<Number>& a, const Queue& queue) {
  launch(join_parts_kernel<Number>, a.out.batch * tiles(a.out.rows * a.out.columns, 32), int(sizeof(Number)) * kThreads,
         queue, a);
}

// out [B, channels, pixels] = factor * matrix [B, channels, regions] weights [B, regions, pixels].
// Weights is how a tile [kRegionStep, kPixels] of them comes to shared memory: `fetch(region, pixel)`, then
// `put(shared)`.
template <class Source, class Number>
struct SumOverRegions {
  Tensor out, matrix;
  Source source;
  Number factor;
};

template <class T, class Weights>
constexpr int kSumOverRegionsBytes = most(Transfer<T, kChannels<T>, kRegionStep>::kBytes + Weights::kBytes,
                                          Result<NumberOf<T>, kChannels<T>, kPixels<T>>::kBytes);

template <class T, class Weights>
OCR_KERNEL sum_over_regions_kernel(SumOverRegions<typename Weights::Source, NumberOf<T>> a) {
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
  const Result<NumberOf<T>, CHANNELS, PIXELS> out(a.out, image, shared);
  sums.for_each([&](int c, int i, NumberOf<T> sum) { out.tile.at(c, i) = sum; });
  synchronize();
  out.write(channel, pixel, [&](int64_t, int64_t, NumberOf<T> sum) { return a.factor * sum; });
}

template <class T, class Weights>
void sum_over_regions(const SumOverRegions<typename Weights::Source, NumberOf<T>>& a, const Queue& queue) {
  launch(sum_over_regions_kernel<T, Weights>,
         a.out.batch * tiles(a.out.rows, kChannels<T>) * tiles(a.out.columns, kPixels<T>),
         kSumOverRegionsBytes<T, Weights>, queue, a);
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
    default:
      return regions <= 32 ? run(Float16(), narrow) : run(Float16(), wide);
  }
}

}  // namespace ocr_kernels::gpu
