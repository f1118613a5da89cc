// The attention's kernels, compiled once per instruction set; cpu.cpp chooses among the compilations.
//
// A task takes its pixels in tiles. A tile of the query is read once, and all that is made of it stays in the caches:
// its scores [K, pixels], their softmax over regions, and the strips of the context on their way out.
#include "cpu_operands.h"

namespace ocr_kernels {
inline namespace OCR_ISA {
namespace {

constexpr int64_t kForwardTasks = 256;  // at most, where there are fewer images
constexpr int64_t kBackwardTasks = 64;  // each with partial sums [K, D + Dv]

// The pixels of the images in chunks of whole tiles, one for each task. They depend on the shape alone.
struct Chunks {
  int64_t pixels, tiles, per_image;

  Chunks(int64_t pixels_, int64_t most_per_image)
      : pixels(pixels_), tiles(divide_up(pixels_, kPixels)), per_image(larger(1, smaller(tiles, most_per_image))) {}

  int64_t first_tile(int64_t chunk) const { return tiles * chunk / per_image; }

  // tile(image, first pixel, number of pixels)
  template <class Tile>
  OCR_INLINE void for_each_tile(int64_t task, Tile tile) const {
    const int64_t image = task / per_image, chunk = task % per_image;
    for (int64_t t = first_tile(chunk); t < first_tile(chunk + 1); ++t)
      tile(image, t * kPixels, smaller(kPixels, pixels - t * kPixels));
  }
};

constexpr int kVectors = 4;  // of pixels at a time: each sum over regions is a chain of additions
static_assert(kPixels % (kVectors * Vec<float>::size) == 0, "a tile is made of whole groups of vectors");

// scores [K, kPixels] become exp(score - max), rounded to what products take if so asked; reciprocals of their sums.
template <class Op, bool round>
void exponentials(typename Op::Number* scores, int64_t regions, typename Op::Number* reciprocals) {
  using Number = typename Op::Number;
  constexpr int size = Vec<Number>::size;
  for (int64_t i = 0; i < kPixels; i += kVectors * size) {
    Vec<Number> most[kVectors], sum[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      most[v] = load<Number>(scores + i + v * size);
      sum[v] = broadcast(Number(0));
    }
    for (int64_t k = 1; k < regions; ++k)
      for (int v = 0; v < kVectors; ++v) most[v] = max(most[v], load<Number>(scores + k * kPixels + i + v * size));
    for (int64_t first = 0; first < regions; first += kChain) {
      Vec<Number> part[kVectors];
      for (int v = 0; v < kVectors; ++v) part[v] = broadcast(Number(0));
      for (int64_t k = first; k < smaller(first + kChain, regions); ++k)
        for (int v = 0; v < kVectors; ++v) {
          Number* p = scores + k * kPixels + i + v * size;
          const Vec<Number> e = exp(load<Number>(p) - most[v]), weight = round ? Op::rounded(e) : e;
          part[v] = part[v] + weight;
          store(p, weight);
        }
      for (int v = 0; v < kVectors; ++v) sum[v] = sum[v] + part[v];
    }
    for (int v = 0; v < kVectors; ++v) store(reciprocals + i + v * size, broadcast(Number(1)) / sum[v]);
  }
}

// matrix[k, i] *= factors[i]; pixels that do not exist get 0, also where a region has made them NaN.
template <class Number>
void scale_pixels(Number* matrix, int64_t regions, const Number* factors, int64_t pixels) {
  constexpr int size = Vec<Number>::size;
  for (int64_t k = 0; k < regions; ++k, matrix += kPixels) {
    for (int64_t i = 0; i < kPixels; i += size) store(matrix + i, load<Number>(matrix + i) * load<Number>(factors + i));
    for (int64_t i = pixels; i < kPixels; ++i) matrix[i] = 0;
  }
}

// dweights become dscores = scale * weights * (dweights - sum_k weights dweights).
template <class Number>
void softmax_backward(Number* dweights, const Number* weights, int64_t regions, Number scale, int64_t pixels) {
  constexpr int size = Vec<Number>::size;
  for (int64_t i = 0; i < kPixels; i += kVectors * size) {
    Vec<Number> dot[kVectors];
    for (int v = 0; v < kVectors; ++v) dot[v] = broadcast(Number(0));
    for (int64_t first = 0; first < regions; first += kChain) {
      Vec<Number> part[kVectors];
      for (int v = 0; v < kVectors; ++v) part[v] = broadcast(Number(0));
      for (int64_t k = first; k < smaller(first + kChain, regions); ++k)
        for (int v = 0; v < kVectors; ++v) {
          const int64_t at = k * kPixels + i + v * size;
          part[v] = fma(load<Number>(weights + at), load<Number>(dweights + at), part[v]);
        }
      for (int v = 0; v < kVectors; ++v) dot[v] = dot[v] + part[v];
    }
    for (int64_t k = 0; k < regions; ++k)
      for (int v = 0; v < kVectors; ++v) {
        const int64_t at = k * kPixels + i + v * size;
        const Vec<Number> weight = broadcast(scale) * load<Number>(weights + at);
        store(dweights + at, weight * (load<Number>(dweights + at) - dot[v]));
      }
  }
  for (int64_t k = 0; k < regions; ++k)
    for (int64_t i = pixels; i < kPixels; ++i) dweights[k * kPixels + i] = 0;
}

// [K, kPixels] scores, exponentials, weights or dscores, with the units that the products take of them.
template <class T>
class RegionTile {
  using Op = Arithmetic<T>;
  using Number = typename Op::Number;
  using Unit = typename Op::Unit;

 public:
  explicit RegionTile(int64_t regions)
      : regions_(regions),
        numbers_(regions * kPixels),
        units_(Op::group == 1 ? 0 : divide_up(regions, Op::group) * kPixels) {}

  Number* data() const { return numbers_.data(); }
  const Unit* by_region() const { return Op::by_region(data(), regions_, units_.data()); }

  // sums [K, width] += this times pixels^T
  void add_products(Number* sums, const PixelTile<T>& pixels) const {
    const Unit* rows = Op::by_pixel(data(), regions_, units_.data());
    const int64_t width = pixels.width();
    multiply<Op, Rows<Op>, Finish::Add>(regions_, kPixels / Op::group, width, rows, pixels.by_pixel(), width, sums,
                                        width, nullptr);
  }

 private:
  int64_t regions_;
  Buffer<Number> numbers_;
  Buffer<Unit> units_;
};

template <class T>
void forward(const Tensor& out, const Tensor& query, const Tensor& key, const Tensor& value, double scale,
             Parallel parallel) {
  using Op = Arithmetic<T>;
  using Number = typename Op::Number;
  const int64_t regions = key.columns;
  const Chunks chunks(query.columns, kForwardTasks / query.batch);
  const PackedMatrix<T> keys(transposed(key), parallel), values(value, parallel);

  run_tasks(parallel, query.batch * chunks.per_image, [&](int64_t task) {
    PixelTile<T> q(query);
    RegionTile<T> weights(regions);
    StripWriter<T> writer(out);
    Number scales[kPixels], reciprocals[kPixels];
    fill(scales, kPixels, Number(scale));
    chunks.for_each_tile(task, [&](int64_t image, int64_t first, int64_t count) {
      q.load(image, first, count);
      keys.multiply_rows(image, 0, regions, q.by_channel(), weights.data(), scales);
      exponentials<Op, true>(weights.data(), regions, reciprocals);
      writer.write_product(image, first, count, values, weights.by_region(), reciprocals);
    });
  });
}

// out[:, k] of each image = the sum over its chunks of sums [chunk, K, width], in their order
template <class T, class Number = typename Arithmetic<T>::Number>
void merge_chunks(const Tensor& out, Number* sums, int64_t chunks, Parallel parallel) {
  const int64_t regions = out.columns, width = round_up(out.rows, kWidth);
  run_tasks(parallel, out.batch * regions, [&](int64_t task) {
    const int64_t image = task / regions, region = task % regions;
    Number* const total = sums + (image * chunks * regions + region) * width;
    for (int64_t chunk = 1; chunk < chunks; ++chunk) {
      const Number* part = total + chunk * regions * width;
      for (int64_t d = 0; d < width; d += Vec<Number>::size)
        store(total + d, load<Number>(total + d) + load<Number>(part + d));
    }
    copy_line(element<T>(out, image, 0, region), out.stride_row, total, 1, out.rows);
  });
}

template <class T>
void backward(const Tensor& dquery, const Tensor& dkey, const Tensor& dvalue, const Tensor& grad, const Tensor& query,
              const Tensor& key, const Tensor& value, double scale, Parallel parallel) {
  using Op = Arithmetic<T>;
  using Number = typename Op::Number;
  const bool dscores_wanted = dquery.data || dkey.data;
  const int64_t regions = key.columns;
  const int64_t least_pixels = larger(256, regions / 2);  // of a chunk, so that its sums are small beside them
  const Chunks chunks(query.columns, smaller(query.columns / least_pixels, kBackwardTasks / query.batch));
  const int64_t tasks = query.batch * chunks.per_image;

  const PackedMatrix<T> keys(transposed(key), parallel);
  const PackedMatrix<T> values(transposed(value), parallel, dscores_wanted);
  const PackedMatrix<T> keys_by_channel(key, parallel, dquery.data);
  const int64_t dkey_size = regions * round_up(key.rows, kWidth), dvalue_size = regions * round_up(value.rows, kWidth);
  const Buffer<Number> dkey_sums(dkey.data ? tasks * dkey_size : 0), dvalue_sums(dvalue.data ? tasks * dvalue_size : 0);

  run_tasks(parallel, tasks, [&](int64_t task) {
    PixelTile<T> q(query), dy(grad);
    RegionTile<T> weights(regions), dscores(regions);
    StripWriter<T> writer(dquery);
    Number scales[kPixels], reciprocals[kPixels], ones[kPixels];
    fill(scales, kPixels, Number(scale));
    fill(ones, kPixels, Number(1));
    Number* const dkey_sum = dkey_sums.data() + task * dkey_size;
    Number* const dvalue_sum = dvalue_sums.data() + task * dvalue_size;
    if (dkey.data) fill(dkey_sum, dkey_size, Number(0));
    if (dvalue.data) fill(dvalue_sum, dvalue_size, Number(0));

    chunks.for_each_tile(task, [&](int64_t image, int64_t first, int64_t count) {
      q.load(image, first, count);
      dy.load(image, first, count);
      keys.multiply_rows(image, 0, regions, q.by_channel(), weights.data(), scales);
      exponentials<Op, false>(weights.data(), regions, reciprocals);
      scale_pixels(weights.data(), regions, reciprocals, count);
      if (dvalue.data) weights.add_products(dvalue_sum, dy);
      if (!dscores_wanted) return;
      values.multiply_rows(image, 0, regions, dy.by_channel(), dscores.data(), ones);
      softmax_backward(dscores.data(), weights.data(), regions, Number(scale), count);
      if (dkey.data) dscores.add_products(dkey_sum, q);
      if (dquery.data) writer.write_product(image, first, count, keys_by_channel, dscores.by_region(), ones);
    });
  });
  if (dkey.data) merge_chunks<T>(dkey, dkey_sums.data(), chunks.per_image, parallel);
  if (dvalue.data) merge_chunks<T>(dvalue, dvalue_sums.data(), chunks.per_image, parallel);
}

}  // namespace

void attention_forward(const Tensor& out, const Tensor& query, const Tensor& key, const Tensor& value, double scale,
                       Parallel parallel) {
  with_element_type(query.dtype, [&](auto type) { forward<decltype(type)>(out, query, key, value, scale, parallel); });
}

void attention_backward(const Tensor& dquery, const Tensor& dkey, const Tensor& dvalue, const Tensor& grad,
                        const Tensor& query, const Tensor& key, const Tensor& value, double scale, Parallel parallel) {
  with_element_type(query.dtype, [&](auto type) {
    backward<decltype(type)>(dquery, dkey, dvalue, grad, query, key, value, scale, parallel);
  });
}

}  // namespace OCR_ISA
}  // namespace ocr_kernels
