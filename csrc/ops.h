// The ops on one kind of device: their schemas, and what becomes of their arguments. This is PyTorch's stable ABI: one
// binary serves every PyTorch since 2.11 and, having nothing of Python in it, every Python and none.
//
// A Device says which tensors it `holds` and its `name` in messages, makes the `resources` that its kernels take last,
// is told of fresh results (`prepare`), and names its kernels: gather_forward and so on.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <cstdint>
#include <optional>
#include <vector>

#include "tensor.h"

namespace ocr_kernels {

using Argument = torch::stable::Tensor;
using torch::headeronly::ScalarType;

inline Dtype dtype_of(const Argument& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Double:
      return Dtype::Float64;
    case ScalarType::Float:
      return Dtype::Float32;
    case ScalarType::BFloat16:
      return Dtype::BFloat16;
    case ScalarType::Half:
      return Dtype::Float16;
    default:
      STD_TORCH_CHECK(false, name, " must be float64, float32, bfloat16 or float16");
  }
}

// The one stride of the pixels of a [B, rows, *S] tensor, if there is one.
inline std::optional<int64_t> pixel_stride(const Argument& tensor) {
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  std::optional<int64_t> stride;
  int64_t next = 0;
  for (size_t d = sizes.size(); d-- > 2;) {
    if (sizes[d] == 1) continue;
    if (stride && strides[d] != next) return std::nullopt;
    if (!stride) stride = strides[d];
    next = strides[d] * sizes[d];
  }
  return stride.value_or(1);
}

// A [B, rows, *S] tensor whose pixels lie at one stride, as [B, rows, N] without its data.
template <class Device>
Tensor shape_of(const Device& device, const Argument& tensor, const char* name) {
  STD_TORCH_CHECK(device.holds(tensor), name, " must be on ", Device::name);
  STD_TORCH_CHECK(tensor.dim() >= 3, name, " must have 3 dimensions or more, but has ", tensor.dim());
  const auto stride = pixel_stride(tensor);
  STD_TORCH_CHECK(stride, name, " must have its pixels at one stride");
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  int64_t pixels = 1;
  for (size_t d = 2; d < sizes.size(); ++d) pixels *= sizes[d];
  return {nullptr, dtype_of(tensor, name), sizes[0], sizes[1], pixels, strides[0], strides[1], *stride};
}

inline void expect(const Tensor& t, const char* name, int64_t batch, int64_t rows, int64_t columns, Dtype dtype) {
  STD_TORCH_CHECK(t.batch == batch && t.rows == rows && t.columns == columns, name, " must have shape [", batch, ", ",
                  rows, ", ", columns, "], its pixels counted as one dimension, but has [", t.batch, ", ", t.rows, ", ",
                  t.columns, "]");
  STD_TORCH_CHECK(t.dtype == dtype, name, " has not the dtype that the other arguments call for");
}

// What is read: in place where its pixels lie at one stride, else from a copy, which lives as long as this does.
template <class Device>
class Input {
 public:
  Input(const Device& device, const Argument& tensor, const char* name)
      : argument_(tensor.dim() < 3 || pixel_stride(tensor) ? tensor : torch::stable::flatten(tensor, 2)),
        view_(shape_of(device, argument_, name)) {
    view_.data = const_cast<void*>(argument_.const_data_ptr());
  }
  Input(const Device& device, const Argument& tensor, const char* name, int64_t batch, int64_t rows, int64_t columns,
        Dtype dtype)
      : Input(device, tensor, name) {
    expect(view_, name, batch, rows, columns, dtype);
  }
  operator const Tensor&() const { return view_; }
  const Tensor* operator->() const { return &view_; }

 private:
  Argument argument_;
  Tensor view_;
};

template <class Device>
Tensor output(const Device& device, const Argument& tensor, const char* name, int64_t batch, int64_t rows,
              int64_t columns, Dtype dtype) {
  Tensor view = shape_of(device, tensor, name);
  expect(view, name, batch, rows, columns, dtype);
  view.data = tensor.mutable_data_ptr();
  const int64_t size = dtype == Dtype::Float64 ? 8 : dtype == Dtype::Float32 ? 4 : 2;
  Device::prepare(view.data, size * batch * rows * columns);
  return view;
}

// A gradient of `input`, in whose shape and dtype it comes; null where it is not wanted.
template <class Device>
Tensor gradient(const Device& device, const std::optional<Argument>& tensor, const char* name, const Tensor& input) {
  return tensor ? output(device, *tensor, name, input.batch, input.rows, input.columns, input.dtype) : Tensor{};
}

inline Dtype statistics_dtype(const Tensor& feats, const Tensor& logits) {
  return feats.dtype == Dtype::Float64 || logits.dtype == Dtype::Float64 ? Dtype::Float64 : Dtype::Float32;
}

template <class Device>
struct Ops {
  static void gather_forward(const Argument& out, const Argument& stats, const Argument& feats, const Argument& logits,
                             double scale) {
    const Device device(feats);
    const Input<Device> x(device, feats, "feats"), m(device, logits, "logits");
    expect(m, "logits", x->batch, m->rows, x->columns, m->dtype);
    STD_TORCH_CHECK(x->columns >= 1, "feats must have a pixel");
    Device::gather_forward(output(device, out, "out", x->batch, x->rows, m->rows, x->dtype),
                           output(device, stats, "stats", x->batch, x->rows + 2, m->rows, statistics_dtype(x, m)), x, m,
                           scale, device.resources());
  }

  static void gather_backward(const std::optional<Argument>& dfeats, const std::optional<Argument>& dlogits,
                              const Argument& grad, const Argument& feats, const Argument& logits,
                              const Argument& stats, double scale) {
    const Device device(feats);
    const Input<Device> x(device, feats, "feats"), m(device, logits, "logits");
    expect(m, "logits", x->batch, m->rows, x->columns, m->dtype);
    STD_TORCH_CHECK(x->columns >= 1, "feats must have a pixel");
    const Input<Device> g(device, grad, "grad", x->batch, x->rows, m->rows, x->dtype);
    const Input<Device> s(device, stats, "stats", x->batch, x->rows + 2, m->rows, statistics_dtype(x, m));
    Device::gather_backward(gradient(device, dfeats, "dfeats", x), gradient(device, dlogits, "dlogits", m), g, x, m, s,
                            scale, device.resources());
  }

  static void attention_forward(const Argument& out, const Argument& query, const Argument& key, const Argument& value,
                                double scale) {
    const Device device(query);
    const Input<Device> q(device, query, "query"), k(device, key, "key"), v(device, value, "value");
    expect(k, "key", q->batch, q->rows, k->columns, q->dtype);
    expect(v, "value", q->batch, v->rows, k->columns, q->dtype);
    STD_TORCH_CHECK(q->columns >= 1, "query must have a pixel");
    Device::attention_forward(output(device, out, "out", q->batch, v->rows, q->columns, q->dtype), q, k, v, scale,
                              device.resources());
  }

  static void attention_backward(const std::optional<Argument>& dquery, const std::optional<Argument>& dkey,
                                 const std::optional<Argument>& dvalue, const Argument& grad, const Argument& query,
                                 const Argument& key, const Argument& value, double scale) {
    const Device device(query);
    const Input<Device> q(device, query, "query"), k(device, key, "key"), v(device, value, "value");
    expect(k, "key", q->batch, q->rows, k->columns, q->dtype);
    expect(v, "value", q->batch, v->rows, k->columns, q->dtype);
    STD_TORCH_CHECK(q->columns >= 1, "query must have a pixel");
    const Input<Device> g(device, grad, "grad", q->batch, v->rows, q->columns, q->dtype);
    Device::attention_backward(gradient(device, dquery, "dquery", q), gradient(device, dkey, "dkey", k),
                               gradient(device, dvalue, "dvalue", v), g, q, k, v, scale, device.resources());
  }

  // For C++, where nothing stands before the kernels: results are allocated here.

  static Argument spatial_gather(const Argument& feats, const Argument& logits, double scale) {
    const Device device(feats);
    const Tensor x = Input<Device>(device, feats, "feats"), m = Input<Device>(device, logits, "logits");
    const auto wide = statistics_dtype(x, m) == Dtype::Float64 ? ScalarType::Double : ScalarType::Float;
    Argument out = torch::stable::new_empty(feats, {x.batch, x.rows, m.rows});
    const Argument stats = torch::stable::new_empty(feats, {x.batch, x.rows + 2, m.rows}, wide);
    gather_forward(out, stats, feats, logits, scale);
    return out;
  }

  static Argument pixel_region_attention(const Argument& query, const Argument& key, const Argument& value,
                                         std::optional<double> scale) {
    STD_TORCH_CHECK(query.dim() >= 3 && value.dim() == 3, "query must be [B, D, *S] and value [B, Dv, K]");
    const auto sizes = query.sizes();
    std::vector<int64_t> shape(sizes.begin(), sizes.end());
    shape[1] = value.size(1);
    const Argument out = torch::stable::new_empty(query, shape);
    attention_forward(out, query, key, value, scale.value_or(1 / std::sqrt(static_cast<double>(query.size(1)))));
    return out;
  }

  static void implement(torch::stable::detail::StableLibrary& m) {
    m.impl("gather_forward", TORCH_BOX(&gather_forward));
    m.impl("gather_backward", TORCH_BOX(&gather_backward));
    m.impl("attention_forward", TORCH_BOX(&attention_forward));
    m.impl("attention_backward", TORCH_BOX(&attention_backward));
    m.impl("spatial_gather", TORCH_BOX(&spatial_gather));
    m.impl("pixel_region_attention", TORCH_BOX(&pixel_region_attention));
  }
};

// The ops of the namespace ocr_kernels, which are Python's, call the first four.
inline void define_schemas(torch::stable::detail::StableLibrary& m) {
  m.def("gather_forward(Tensor(a!) out, Tensor(b!) stats, Tensor feats, Tensor logits, float scale) -> ()");
  m.def(
      "gather_backward(Tensor(a!)? dfeats, Tensor(b!)? dlogits, Tensor grad, Tensor feats, Tensor logits, Tensor stats,"
      " float scale) -> ()");
  m.def("attention_forward(Tensor(a!) out, Tensor query, Tensor key, Tensor value, float scale) -> ()");
  m.def(
      "attention_backward(Tensor(a!)? dquery, Tensor(b!)? dkey, Tensor(c!)? dvalue, Tensor grad, Tensor query,"
      " Tensor key, Tensor value, float scale) -> ()");
  m.def("spatial_gather(Tensor feats, Tensor logits, float scale=1.0) -> Tensor");
  m.def("pixel_region_attention(Tensor query, Tensor key, Tensor value, float? scale=None) -> Tensor");
}

}  // namespace ocr_kernels
