// What the block does between its products on CPUs, compiled once per instruction set: one pass over a tile each.
//
// A task has some channels, or where nothing is summed and channels are neighbours in memory some pixels. So every sum
// is one task's, in an order that no number of threads changes.
#include "../arguments.h"
#include "../cpu/softmax.h"

namespace ocr_kernels {
inline namespace OCR_ISA {
namespace {

constexpr int64_t kTaskElements = 1 << 14;  // of a tile, at least, for a task
constexpr int64_t kPixels = 64;             // of the softmax at a time
constexpr int64_t kPixelChain = 32;  // vectors that are added up one after the other: tiles have about as many chains

// body(first, Whole) for whole vectors of `count` elements, and body(first, Part) for the rest
template <class A, class Body>
OCR_INLINE void for_each_vector(int64_t count, Body body) {
  int64_t i = 0;
  for (; i + Vec<A>::size <= count; i += Vec<A>::size) body(i, Whole());
  if (i < count) body(i, Part{count - i});
}

// Runs body(channel, pixel, part, vectors, sums) for each vector of the tile. `vectors` are those of its channels, and
// what body adds to sums[s] is, over pixels, row s of `totals`.
template <int kGiven, int kSums, class A, class Body>
void for_each_place(Parallel parallel, const Tensor& tile, const A* vectors, A* totals, Body body) {
  const int64_t channels = tile.rows, pixels = tile.columns, size = Vec<A>::size;
  if (!channels_last(tile)) {
    const int64_t rows = max(1, kTaskElements / max(1, pixels));
    run_tasks(parallel, divide_up(channels, rows), [&](int64_t task) {
      for (int64_t c = task * rows; c < min(channels, (task + 1) * rows); ++c) {
        Vec<A> of_channel[kGiven + 1], sums[kSums + 1];
        for (int v = 0; v < kGiven; ++v) of_channel[v] = broadcast(vectors[v * channels + c]);
        for (int s = 0; s < kSums; ++s) sums[s] = broadcast(A(0));
        for (int64_t first = 0; first < pixels; first += kPixelChain * size) {
          Vec<A> chain[kSums + 1];
          for (int s = 0; s < kSums; ++s) chain[s] = broadcast(A(0));
          for_each_vector<A>(min(kPixelChain * size, pixels - first),
                             [&](int64_t i, auto part) { body(c, first + i, part, of_channel, chain); });
          for (int s = 0; s < kSums; ++s) sums[s] = sums[s] + chain[s];
        }
        for (int s = 0; s < kSums; ++s) totals[s * channels + c] = sum(sums[s]);
      }
    });
    return;
  }
  const auto vectors_at = [&](Vec<A>* to, int64_t c, auto part) {
    for (int v = 0; v < kGiven; ++v) to[v] = load<A>(vectors + v * channels + c, part);
  };
  if constexpr (kSums == 0) {
    const int64_t count = max(1, kTaskElements / max(1, channels));
    run_tasks(parallel, divide_up(pixels, count), [&](int64_t task) {
      for (int64_t i = task * count; i < min(pixels, (task + 1) * count); ++i)
        for_each_vector<A>(channels, [&](int64_t c, auto part) {
          Vec<A> of_channels[kGiven + 1];
          vectors_at(of_channels, c, part);
          body(c, i, part, of_channels, of_channels);
        });
    });
  } else {
    constexpr int kBlock = 4;
    run_tasks(parallel, divide_up(channels, kBlock * size), [&](int64_t task) {
      const int64_t begin = task * kBlock * size, width = min(kBlock * size, channels - begin);
      Vec<A> of_channels[kBlock][kGiven + 1], sums[kBlock][kSums];
      for_each_vector<A>(width, [&](int64_t c, auto part) { vectors_at(of_channels[c / size], begin + c, part); });
      for (int b = 0; b < kBlock; ++b)
        for (int s = 0; s < kSums; ++s) sums[b][s] = broadcast(A(0));
      for (int64_t first = 0; first < pixels; first += kPixelChain) {
        Vec<A> chain[kBlock][kSums];
        for (int b = 0; b < kBlock; ++b)
          for (int s = 0; s < kSums; ++s) chain[b][s] = broadcast(A(0));
        const int64_t last = min(pixels, first + kPixelChain);
        if (width == kBlock * size) {
          for (int64_t i = first; i < last; ++i) {
            OCR_UNROLL
            for (int b = 0; b < kBlock; ++b) body(begin + b * size, i, Whole(), of_channels[b], chain[b]);
          }
        } else {
          for (int64_t i = first; i < last; ++i)
            for_each_vector<A>(
                width, [&](int64_t c, auto part) { body(begin + c, i, part, of_channels[c / size], chain[c / size]); });
        }
        for (int b = 0; b < kBlock; ++b)
          for (int s = 0; s < kSums; ++s) sums[b][s] = sums[b][s] + chain[b][s];
      }
      for_each_vector<A>(width, [&](int64_t c, auto part) {
        for (int s = 0; s < kSums; ++s) store(totals + s * channels + begin + c, sums[c / size][s], part);
      });
    });
  }
}

// ReLU or leaky ReLU, with NaN and infinity as PyTorch has them. 0 * infinity is NaN, so that a slope of 0 is no
// factor.
template <class A>
struct Activation {
  const bool is_relu;
  const Vec<A> slope;
  explicit Activation(double slope_) : is_relu(slope_ == 0), slope(broadcast(A(slope_))) {}
  OCR_INLINE Vec<A> forward(Vec<A> x) const { return if_at_most(x, A(0), is_relu ? broadcast(A(0)) : x * slope, x); }
  OCR_INLINE Vec<A> backward(Vec<A> taken, Vec<A> grad) const {
    return is_relu ? if_at_most(taken, A(0), broadcast(A(0)), grad) : if_above(taken, A(0), grad, grad * slope);
  }
};

// Runs body with the lanes, the type of h, and that of the other map, which is the same or the lanes' own.
template <class Body>
void with_types(const Tensor& h, const Tensor& other, Body body) {
  with_element_type(h.dtype, [&](auto type) {
    using T = decltype(type);
    using A = decltype(to_float(T()));
    if (other.dtype == h.dtype) body(A(), T(), T());
    else body(A(), T(), A());
  });
}

template <class A>
const A* rows_of(const Tensor& vectors) {
  return static_cast<const A*>(vectors.data);
}

// Fills out, where it is wanted, with body(h, d, part, vectors, sums), d = grad * mask through the activation.
template <int kGiven, int kSums, class Arguments, class Body>
void for_each_gradient(Parallel parallel, const Arguments& a, void* sums, Body body) {
  with_types(a.h, a.grad, [&](auto lane, auto type, auto gradient) {
    using A = decltype(lane);
    using T = decltype(type);
    using Grad = decltype(gradient);
    const Activation<A> activation(a.slope);
    const auto pass = [&](auto out) {
      using Out = decltype(out);
      for_each_place<kGiven, kSums>(parallel, a.h, rows_of<A>(a.vectors), static_cast<A*>(sums),
                                    [&](int64_t c, int64_t i, auto part, const Vec<A>* vectors, Vec<A>* chain) {
                                      const Vec<A> h = load<A>(element<T>(a.h, 0, c, i), part);
                                      const Vec<A> grad = load<A>(element<Grad>(a.grad, 0, c, i), part) * vectors[2];
                                      const Vec<A> d = activation.backward(fma(h, vectors[0], vectors[1]), grad);
                                      const Vec<A> result = body(h, d, part, vectors, chain);
                                      if (a.out.data) store(element<Out>(a.out, 0, c, i), result, part);
                                    });
    };
    if (!a.out.data || a.out.dtype == a.h.dtype) pass(type);
    else pass(lane);
  });
}

}  // namespace

void run(const BlockActivate& a, Parallel parallel) {
  with_types(a.h, a.out, [&](auto lane, auto type, auto out) {
    using A = decltype(lane);
    using T = decltype(type);
    using Out = decltype(out);
    const Activation<A> activation(a.slope);
    for_each_place<3, 0>(parallel, a.h, rows_of<A>(a.vectors), static_cast<A*>(nullptr),
                         [&](int64_t c, int64_t i, auto part, const Vec<A>* vectors, Vec<A>*) {
                           const Vec<A> h = load<A>(element<T>(a.h, 0, c, i), part);
                           const Vec<A> taken = fma(h, vectors[0], vectors[1]);
                           store(element<Out>(a.out, 0, c, i), activation.forward(taken) * vectors[2], part);
                         });
  });
}

void run(const BlockMoments& a, Parallel parallel) {
  with_types(a.h, a.h, [&](auto lane, auto type, auto) {
    using A = decltype(lane);
    using T = decltype(type);
    A* const means = static_cast<A*>(a.out.data);
    for_each_place<0, 1>(parallel, a.h, means, means,
                         [&](int64_t c, int64_t i, auto part, const Vec<A>*, Vec<A>* sums) {
                           sums[0] = sums[0] + load<A>(element<T>(a.h, 0, c, i), part);
                         });
    for (int64_t c = 0; c < a.h.rows; ++c) means[c] /= A(max(1, a.h.columns));
    for_each_place<1, 1>(parallel, a.h, means, means + a.h.rows,
                         [&](int64_t c, int64_t i, auto part, const Vec<A>* vectors, Vec<A>* sums) {
                           const Vec<A> h = only(load<A>(element<T>(a.h, 0, c, i), part) - vectors[0], part);
                           sums[0] = fma(h, h, sums[0]);
                         });
  });
}

void run(const BlockGradient& a, Parallel parallel) {
  for_each_gradient<4, 2>(parallel, a, a.sums.data, [](auto h, auto d, auto part, const auto* vectors, auto* sums) {
    sums[0] = sums[0] + d;
    sums[1] = fma(d, only(h - vectors[3], part), sums[1]);
    return d;
  });
}

void run(const BlockThrough& a, Parallel parallel) {
  for_each_gradient<7, 0>(parallel, a, nullptr, [](auto h, auto d, auto, const auto* vectors, auto*) {
    return fma(vectors[3], d, fma(vectors[4], h - vectors[6], vectors[5]));
  });
}

void run(const BlockSoftmax& a, Parallel parallel) {
  with_types(a.out, a.scores, [&](auto lane, auto, auto) {
    using A = decltype(lane);
    const int64_t K = a.scores.rows;
    run_tasks(parallel, divide_up(a.scores.columns, kPixels), [&](int64_t task) {
      const Window w{0, 0, K, task * kPixels, min(kPixels, a.scores.columns - task * kPixels)};
      const Buffer<A> scores(K, kPixels);
      A reciprocals[kPixels];
      read_across(scores.data(), kPixels, kPixels, a.scores, w);
      exponentials<kPixels>(scores.data(), K, A(1), A(1), reciprocals, A());
      scale_pixels<kPixels>(scores.data(), K, reciprocals, w.columns);
      write_tile(a.out, w, scores.data(), kPixels);
    });
  });
}

void run(const BlockSoftmaxBackward& a, Parallel parallel) {
  with_types(a.weights, a.out, [&](auto lane, auto, auto) {
    using A = decltype(lane);
    const int64_t K = a.weights.rows, stride = a.matrix.stride_row;
    const A* const matrix = rows_of<A>(a.matrix);
    run_tasks(parallel, divide_up(a.weights.columns, kPixels), [&](int64_t task) {
      const Window w{0, 0, K, task * kPixels, min(kPixels, a.weights.columns - task * kPixels)};
      const Buffer<A> weights(K, kPixels), dweights(K, kPixels);
      read_across(weights.data(), kPixels, kPixels, a.weights, w);
      read_across(dweights.data(), kPixels, kPixels, a.dweights, w);
      for (int64_t k = 0; k < K; ++k)
        for (int64_t i = 0; i < kPixels; i += Vec<A>::size) {
          A* const to = dweights.data() + k * kPixels + i;
          store(to, load<A>(to) + broadcast(matrix[k * stride + K]));
        }
      multiply(true, dweights.data(), kPixels, Left<A>{matrix, stride, 1}, weights.data(), kPixels, K, K, kPixels);
      softmax_backward<kPixels>(dweights.data(), weights.data(), K, A(a.scale), w.columns);
      write_tile(a.out, w, dweights.data(), kPixels);
    });
  });
}

}  // namespace OCR_ISA
}  // namespace ocr_kernels
