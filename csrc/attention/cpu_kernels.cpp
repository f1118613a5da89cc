// The attention's kernels for CPUs, compiled once per instruction set; cpu/registration.cpp chooses among them.
//
// A task takes its pixels in tiles. A tile of the query is read once, and all that is made of it stays in the caches:
// its scores [K, pixels], their softmax over regions, and the strips of the context on their way out.
#include "../arguments.h"
#include "../cpu/softmax.h"

namespace ocr_kernels {
inline namespace OCR_ISA {
namespace {

constexpr int64_t kForwardTasks = 256;  // at most, where there are fewer images
constexpr int64_t kMaxSplits = 64;      // of an image, each with sums [K, D + Dv]

// Runs body with the number of pixels of a tile: longer runs of memory for products of pairs, while what is held of a
// tile, so many bytes a pixel, stays in the second cache.
template <int64_t pixels>
struct Tile {
  static constexpr int64_t kPixels = pixels;
  static_assert(kPixels % (kColumns * Vec<float>::size) == 0, "a tile is made of whole groups of vectors");
};
template <class Lane, class Body>
void with_tile(int64_t bytes_of_pixel, Body body) {
  if constexpr (Holds<Lane>::elements > 1)
    if (product(128, bytes_of_pixel) <= (int64_t(512) << 10)) return body(Tile<128>());
  body(Tile<64>());
}

template <class Lane, int64_t kPixels>
void forward(const AttentionForward& a, Parallel parallel) {
  using A = AccumulatorOf<Lane>;
  const int64_t B = a.query.batch, D = a.query.rows, K = a.key.columns;
  const Splits splits(a.query.columns, kPixels, kForwardTasks / B);  // nothing is summed over pixels
  const SmallMatrix<Lane> keys(transposed(a.key), parallel);
  const OutputProduct<Lane> out(a.out, a.value, parallel);

  run_tasks(parallel, product(B, splits.count), [&](int64_t task) {
    const Buffer<Lane> query(lanes<Lane>(D), kPixels), across(lanes<Lane>(K), kPixels);
    const Buffer<A> weights(K, kPixels);
    A reciprocals[kPixels];
    splits.for_each_tile(task, [&](int64_t image, int64_t first, int64_t count) {
      const Window w{image, 0, D, first, count};
      read_across(query.data(), kPixels, kPixels, a.query, w);
      multiply(false, weights.data(), kPixels, keys.from(image, 0), query.data(), kPixels, K, lanes<Lane>(D), kPixels);
      exponentials<kPixels>(weights.data(), K, A(a.scale), lift<A>(K), reciprocals, Lane());
      out.write(w, lanes_across(across.data(), weights.data(), K, kPixels), kPixels, reciprocals);
    });
  });
}

// A tile of query or grad [channels, pixels] as both factors of products.
template <class Lane, int64_t kPixels>
struct PixelTile {
  const Tensor& tensor;
  const int64_t stride = row_stride<Lane>(tensor.rows);
  const Buffer<Lane> by_channel{lanes<Lane>(tensor.rows), kPixels};  // [channels, kPixels], lanes across the channels
  const Buffer<Lane> by_pixel{lanes<Lane>(kPixels), stride};         // [kPixels, channels], lanes across the pixels

  void read(Window w) const {
    w.rows = tensor.rows;
    read_across(by_channel.data(), kPixels, kPixels, tensor, w);
    if (!channels_last(tensor))
      return turn(by_pixel.data(), stride, by_channel.data(), kPixels, lanes<Lane>(w.rows), kPixels);
    if (w.columns < kPixels) fill(by_pixel.data(), lanes<Lane>(kPixels) * stride, Lane(0));
    read_across(by_pixel.data(), stride, round_up(w.rows, Vec<Lane>::size), transposed(tensor), transposed(w));
  }
};

template <class Lane, int64_t kPixels>
void backward(const AttentionBackward& a, Parallel parallel) {
  using A = AccumulatorOf<Lane>;
  const int64_t B = a.query.batch, D = a.query.rows, Dv = a.value.rows, K = a.key.columns;
  const bool dscores_wanted = a.dquery.data || a.dkey.data;
  const int64_t min_pixels = max(512, K);  // of a split, so that its sums are small beside them
  const Splits splits(a.query.columns, kPixels, min(a.query.columns / min_pixels, kMaxSplits));

  const SmallMatrix<Lane> keys(transposed(a.key), parallel), values(transposed(a.value), parallel, dscores_wanted);
  const OutputProduct<Lane> dquery(a.dquery, a.key, parallel);
  const int64_t dkey_stride = row_stride<A>(D), dvalue_stride = row_stride<A>(Dv);
  const int64_t sums = product(K, (a.dkey.data ? dkey_stride : 0) + (a.dvalue.data ? dvalue_stride : 0));
  const int64_t group = images_at_a_time(B, product(int64_t(sizeof(A)), splits.count, sums));
  const Buffer<A> dkey_sums(a.dkey.data ? group : 0, splits.count, K, dkey_stride);
  const Buffer<A> dvalue_sums(a.dvalue.data ? group : 0, splits.count, K, dvalue_stride);

  const auto sum_split = [&](int64_t first_image, int64_t task) {
    const PixelTile<Lane, kPixels> query{a.query}, grad{a.grad};
    const Buffer<A> weights(K, kPixels), dscores(K, kPixels);
    const Buffer<Lane> made(K, kPixels);  // lanes of weights and dscores
    A reciprocals[kPixels];
    A* const dkey_sum = dkey_sums.data() + task * K * dkey_stride;
    A* const dvalue_sum = dvalue_sums.data() + task * K * dvalue_stride;
    if (a.dkey.data) fill(dkey_sum, K * dkey_stride, A(0));
    if (a.dvalue.data) fill(dvalue_sum, K * dvalue_stride, A(0));

    // sums [K, channels] += matrix [K, kPixels] pixels^T
    const auto add_sums = [&](A* sums, int64_t stride, const A* matrix, const PixelTile<Lane, kPixels>& pixels) {
      const Left<Lane> left{lanes_along(made.data(), matrix, K, kPixels), lanes<Lane>(kPixels), 1};
      multiply(true, sums, stride, left, pixels.by_pixel.data(), pixels.stride, K, lanes<Lane>(kPixels),
               pixels.tensor.rows);
    };

    splits.for_each_tile(first_image * splits.count + task, [&](int64_t image, int64_t first, int64_t count) {
      const Window w{image, 0, 0, first, count};
      query.read(w);
      grad.read(w);
      multiply(false, weights.data(), kPixels, keys.from(image, 0), query.by_channel.data(), kPixels, K, lanes<Lane>(D),
               kPixels);
      exponentials<kPixels>(weights.data(), K, A(a.scale), A(1), reciprocals, A());
      scale_pixels<kPixels>(weights.data(), K, reciprocals, count);
      if (a.dvalue.data) add_sums(dvalue_sum, dvalue_stride, weights.data(), grad);
      if (!dscores_wanted) return;
      multiply(false, dscores.data(), kPixels, values.from(image, 0), grad.by_channel.data(), kPixels, K,
               lanes<Lane>(Dv), kPixels);
      softmax_backward<kPixels>(dscores.data(), weights.data(), K, A(a.scale), count);
      if (a.dkey.data) add_sums(dkey_sum, dkey_stride, dscores.data(), query);
      if (a.dquery.data) dquery.write(w, lanes_across(made.data(), dscores.data(), K, kPixels), kPixels);
    });
  };
  const A* const same = nullptr;
  for (int64_t first = 0; first < B; first += group) {
    const int64_t images = min(group, B - first);
    run_tasks(parallel, images * splits.count, [&](int64_t task) { sum_split(first, task); });
    if (a.dkey.data)
      reduce(parallel, images_of(a.dkey, first, images), {}, splits.count, dkey_sums.data(), dkey_stride, same, 0);
    if (a.dvalue.data)
      reduce(parallel, images_of(a.dvalue, first, images), {}, splits.count, dvalue_sums.data(), dvalue_stride, same,
             0);
  }
}

}  // namespace

void run(const AttentionForward& a, Parallel parallel) {
  with_lanes(a.query.dtype, a.query.dtype == Dtype::BFloat16 && fits_pairs(a.key) && fits_pairs(a.value),
             [&](auto lane) {
               using Lane = decltype(lane);
               const int64_t bytes = 2 * a.query.rows + 6 * a.key.columns;  // of query, weights and their lanes
               with_tile<Lane>(bytes, [&](auto tile) { forward<Lane, decltype(tile)::kPixels>(a, parallel); });
             });
}

void run(const AttentionBackward& a, Parallel parallel) {
  with_lanes(a.query.dtype, a.query.dtype == Dtype::BFloat16 && fits_pairs(a.key) && fits_pairs(a.value),
             [&](auto lane) {
               using Lane = decltype(lane);
               // of query and grad, each twice, weights, dscores and their lanes
               const int64_t bytes = 4 * (a.query.rows + a.value.rows) + 10 * a.key.columns;
               with_tile<Lane>(bytes, [&](auto tile) { backward<Lane, decltype(tile)::kPixels>(a, parallel); });
             });
}

}  // namespace OCR_ISA
}  // namespace ocr_kernels
