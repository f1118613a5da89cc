// What the block does to a tile of pixels between two products, as ops. Tiles are [channels, pixels], and in all maps
// of a call either pixels or channels are neighbours in memory. What is not one of the maps is contiguous, in the dtype
// of statistics.
#pragma once

#include "../ops.h"

namespace ocr_kernels {

template <class Device>
class Passes {
  using Optional = std::optional<Argument>;

  // A call whose first map is h.
  struct Tile {
    Call<Device> call;
    const Dtype dtype, exact;
    const Shape shape;
    bool along_pixels = true, along_channels = true;

    Tile(const char* name, const Argument& h)
        : call(h),
          dtype(dtype_of(name, h)),
          exact(statistics_dtype({nullptr, dtype}, {nullptr, dtype})),
          shape(shape_of(h)) {
      STD_TORCH_CHECK(shape.size() == 2, name, " must be [channels, pixels]");
    }
    // In the dtype of h, or where `is_exact` allows it in that of statistics.
    Tensor map(const char* name, const Optional& tensor, bool is_exact = false, bool is_written = false) {
      if (!tensor) return {};
      const bool other = is_exact && dtype_of(name, *tensor) == exact;
      const Tensor result = call.matrix(name, tensor, shape, other ? exact : dtype, is_written);
      along_pixels = along_pixels && (result.stride_column == 1 || result.columns == 1);
      along_channels = along_channels && (result.stride_row == 1 || result.rows == 1);
      STD_TORCH_CHECK(along_pixels || along_channels, name,
                      " must have its pixels or its channels side by side in memory, as the other maps have");
      return result;
    }
    Tensor vectors(const char* name, const Argument& tensor, int64_t count, bool is_written = false) {
      return contiguous(name, tensor, {count, shape[0]}, is_written);
    }
    Tensor contiguous(const char* name, const Argument& tensor, const Shape& sizes, bool is_written = false) {
      STD_TORCH_CHECK(tensor.is_contiguous(), name, " must be contiguous");
      return call.matrix(name, tensor, sizes, exact, is_written);
    }
  };

 public:
  static void activate(const Argument& out, const Argument& h, const Argument& vectors, double slope) {
    Tile tile("h", h);
    BlockActivate a{};
    a.h = tile.map("h", h);
    a.out = tile.map("out", out, true, true);
    a.vectors = tile.vectors("vectors", vectors, 3);
    a.slope = slope;
    run(tile, a, a.h, a.out);
  }

  static void moments(const Argument& out, const Argument& h) {
    Tile tile("h", h);
    BlockMoments a{};
    a.h = tile.map("h", h);
    a.out = tile.vectors("out", out, 2, true);
    run(tile, a, a.h);
  }

  static void gradient(const Optional& out, const Argument& sums, const Argument& grad, const Argument& h,
                       const Argument& vectors, double slope) {
    Tile tile("h", h);
    BlockGradient a{};
    a.h = tile.map("h", h);
    a.grad = tile.map("grad", grad, true);
    a.out = tile.map("out", out, true, true);
    a.sums = tile.vectors("sums", sums, 2, true);
    a.vectors = tile.vectors("vectors", vectors, 4);
    a.slope = slope;
    run(tile, a, a.h, a.grad, a.out);
  }

  static void through(const Argument& out, const Argument& grad, const Argument& h, const Argument& vectors,
                      double slope) {
    Tile tile("h", h);
    BlockThrough a{};
    a.h = tile.map("h", h);
    a.grad = tile.map("grad", grad, true);
    a.out = tile.map("out", out, true, true);
    a.vectors = tile.vectors("vectors", vectors, 7);
    a.slope = slope;
    run(tile, a, a.h, a.grad, a.out);
  }

  static void softmax(const Argument& out, const Argument& scores) {
    Tile tile("out", out);
    BlockSoftmax a{};
    a.out = tile.map("out", out, false, true);
    a.scores = tile.map("scores", scores, true);
    run(tile, a, a.out, a.scores);
  }

  static void softmax_backward(const Argument& out, const Argument& weights, const Argument& dweights,
                               const Argument& matrix, double scale) {
    Tile tile("weights", weights);
    BlockSoftmaxBackward a{};
    a.weights = tile.map("weights", weights);
    a.dweights = tile.map("dweights", dweights, true);
    a.out = tile.map("out", out, true, true);
    a.matrix = tile.contiguous("matrix", matrix, {tile.shape[0], tile.shape[0] + 1});
    a.scale = scale;
    run(tile, a, a.weights, a.dweights, a.out);
  }

  static void define(torch::stable::detail::StableLibrary& m) {
    m.def("block_activate(Tensor(a!) out, Tensor h, Tensor vectors, float slope) -> ()");
    m.def("block_moments(Tensor(a!) out, Tensor h) -> ()");
    m.def("block_gradient(Tensor(a!)? out, Tensor(b!) sums, Tensor grad, Tensor h, Tensor vectors, float slope) -> ()");
    m.def("block_through(Tensor(a!) out, Tensor grad, Tensor h, Tensor vectors, float slope) -> ()");
    m.def("block_softmax(Tensor(a!) out, Tensor scores) -> ()");
    m.def("block_softmax_backward(Tensor(a!) out, Tensor weights, Tensor dweights, Tensor matrix, float scale) -> ()");
  }

  static void implement(torch::stable::detail::StableLibrary& m) {
    m.impl("block_activate", TORCH_BOX(&activate));
    m.impl("block_moments", TORCH_BOX(&moments));
    m.impl("block_gradient", TORCH_BOX(&gradient));
    m.impl("block_through", TORCH_BOX(&through));
    m.impl("block_softmax", TORCH_BOX(&softmax));
    m.impl("block_softmax_backward", TORCH_BOX(&softmax_backward));
  }

 private:
  template <class Arguments, class... Maps>
  static void run(Tile& tile, const Arguments& a, Maps&... maps) {
    (((tile.along_pixels ? maps.stride_column : maps.stride_row) = 1), ...);  // of one element, too
    tile.call.run(a);
  }
};

}  // namespace ocr_kernels
