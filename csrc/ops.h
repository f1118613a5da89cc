// The ops on one kind of device: their schemas, and their arguments checked, here alone and for every device alike.
// This is PyTorch's stable ABI: one binary serves every PyTorch since 2.11 and, having nothing of Python in it, every
// Python and none.
//
// A Device is made of a call's first tensor. It says which tensors it `holds`, their place's `name` in messages, is
// told of fresh results (`prepare`) and runs the kernels of an op on its arguments (`run`).
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <optional>
#include <string>
#include <vector>

#include "arguments.h"

namespace ocr_kernels {

using Argument = torch::stable::Tensor;
using torch::headeronly::ScalarType;
using Shape = std::vector<int64_t>;
constexpr int64_t kAny = -1;  // in a shape that is expected: any size but 0

inline std::string text(const Shape& shape) {
  std::string result;
  for (const int64_t size : shape)
    result += (result.empty() ? "" : ", ") + (size == kAny ? ">= 1" : std::to_string(size));
  return "[" + result + "]";
}

inline Shape shape_of(const Argument& tensor) { return {tensor.sizes().begin(), tensor.sizes().end()}; }

inline Dtype dtype_of(const char* name, const Argument& tensor) {
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
  if (tensor.numel() == 0) return 1;
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

inline Tensor view_of(const Argument& tensor, Dtype dtype) {
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  int64_t pixels = 1;
  for (size_t d = 2; d < sizes.size(); ++d) pixels *= sizes[d];
  return {nullptr, dtype, sizes[0], sizes[1], pixels, strides[0], strides[1], pixel_stride(tensor).value()};
}

// One call of an op. Every argument is checked before anything is written.
template <class Device>
class Call {
 public:
  explicit Call(const Argument& first) : device_(first) {}

  // What is read: in place where its pixels lie at one stride, else from a copy, which lives as long as the call.
  Tensor input(const char* name, const Argument& tensor, const Shape& shape, std::optional<Dtype> dtype = {}) {
    check(name, tensor, shape, dtype);
    inputs_.push_back(pixel_stride(tensor) ? tensor : torch::stable::flatten(tensor, 2));
    Tensor view = view_of(inputs_.back(), dtype_of(name, tensor));
    view.data = const_cast<void*>(inputs_.back().const_data_ptr());
    return view;
  }
  // A matrix that is read or written, in place; without data where there is none.
  Tensor matrix(const char* name, const std::optional<Argument>& tensor, const Shape& shape, Dtype dtype,
                bool is_written = false) {
    if (!tensor) return {};
    check(name, *tensor, shape, dtype);
    const auto sizes = tensor->sizes(), strides = tensor->strides();
    void* const data = is_written ? tensor->mutable_data_ptr() : const_cast<void*>(tensor->const_data_ptr());
    return {data, dtype, 1, sizes[0], sizes[1], 0, strides[0], strides[1]};
  }
  // The first: a [B, rows, *S] tensor of any sizes.
  Tensor input(const char* name, const Argument& tensor) {
    STD_TORCH_CHECK(tensor.dim() >= 3, name, " must have 3 dimensions or more, but has ", tensor.dim());
    Shape shape = shape_of(tensor);
    shape[1] = kAny;
    return input(name, tensor, shape);
  }
  // What is written; without data where it is not wanted.
  Tensor output(const char* name, const std::optional<Argument>& tensor, const Shape& shape, Dtype dtype) {
    if (!tensor) return {};
    check(name, *tensor, shape, dtype);
    STD_TORCH_CHECK(pixel_stride(*tensor), name, " must have its pixels at one stride");
    outputs_.push_back(*tensor);
    Tensor view = view_of(*tensor, dtype);
    view.data = tensor->mutable_data_ptr();
    return view;
  }

  template <class Arguments>
  void run(const Arguments& arguments) {
    device_.run(arguments);
  }
  template <class Arguments>
  void run(const Arguments& arguments, const Tensor& pixels) {
    if (pixels.batch == 0 || pixels.columns == 0) {  // nothing but sums over no images or pixels
      for (Argument& output : outputs_) torch::stable::zero_(output);
      return;
    }
    for (const Argument& output : outputs_)
      Device::prepare(output.mutable_data_ptr(), output.numel() * int64_t(output.element_size()));
    run(arguments);
  }

 private:
  void check(const char* name, const Argument& tensor, const Shape& shape, std::optional<Dtype> dtype) const {
    STD_TORCH_CHECK(device_.holds(tensor), name, " must be on ", Device::name);
    const Shape found = shape_of(tensor);
    bool same = found.size() == shape.size();
    for (size_t d = 0; same && d < found.size(); ++d) same = shape[d] == kAny ? found[d] >= 1 : found[d] == shape[d];
    STD_TORCH_CHECK(same, name, " must have shape ", text(shape), ", but has ", text(found));
    const Dtype own = dtype_of(name, tensor);
    static const char* const names[] = {"float64", "float32", "bfloat16", "float16"};
    STD_TORCH_CHECK(own == dtype.value_or(own), name, " must be ", names[int(dtype.value_or(own))],
                    " beside the other arguments, but is ", names[int(own)]);
  }

  Device device_;
  std::vector<Argument> inputs_, outputs_;
};

// The shape of `tensor` with another number of rows.
inline Shape with_rows(const Argument& tensor, int64_t rows) {
  Shape shape = shape_of(tensor);
  shape[1] = rows;
  return shape;
}

inline Dtype statistics_dtype(const Tensor& feats, const Tensor& logits) {
  return feats.dtype == Dtype::Float64 || logits.dtype == Dtype::Float64 ? Dtype::Float64 : Dtype::Float32;
}

template <class Device>
struct Ops {
  static void gather_forward(const Argument& out, const Argument& stats, const Argument& feats, const Argument& logits,
                             double scale) {
    Call<Device> call(feats);
    GatherForward a{};
    a.feats = call.input("feats", feats);
    a.logits = call.input("logits", logits, with_rows(feats, kAny));
    const int64_t B = a.feats.batch, C = a.feats.rows, K = a.logits.rows;
    a.out = call.output("out", out, {B, C, K}, a.feats.dtype);
    a.stats = call.output("stats", stats, {B, C + 2, K}, statistics_dtype(a.feats, a.logits));
    a.scale = scale;
    call.run(a, a.feats);
  }

  static void gather_backward(const std::optional<Argument>& dfeats, const std::optional<Argument>& dlogits,
                              const Argument& grad, const Argument& feats, const Argument& logits,
                              const Argument& stats, double scale) {
    Call<Device> call(feats);
    GatherBackward a{};
    a.feats = call.input("feats", feats);
    a.logits = call.input("logits", logits, with_rows(feats, kAny));
    const int64_t B = a.feats.batch, C = a.feats.rows, K = a.logits.rows;
    a.grad = call.input("grad", grad, {B, C, K}, a.feats.dtype);
    a.stats = call.input("stats", stats, {B, C + 2, K}, statistics_dtype(a.feats, a.logits));
    a.dfeats = call.output("dfeats", dfeats, shape_of(feats), a.feats.dtype);
    a.dlogits = call.output("dlogits", dlogits, shape_of(logits), a.logits.dtype);
    a.scale = scale;
    call.run(a, a.feats);
  }

  static void attention_forward(const Argument& out, const Argument& query, const Argument& key, const Argument& value,
                                double scale) {
    Call<Device> call(query);
    AttentionForward a{};
    a.query = call.input("query", query);
    const int64_t B = a.query.batch, D = a.query.rows;
    a.key = call.input("key", key, {B, D, kAny}, a.query.dtype);
    a.value = call.input("value", value, {B, kAny, a.key.columns}, a.query.dtype);
    a.out = call.output("out", out, with_rows(query, a.value.rows), a.query.dtype);
    a.scale = scale;
    call.run(a, a.query);
  }

  static void attention_backward(const std::optional<Argument>& dquery, const std::optional<Argument>& dkey,
                                 const std::optional<Argument>& dvalue, const Argument& grad, const Argument& query,
                                 const Argument& key, const Argument& value, double scale) {
    Call<Device> call(query);
    AttentionBackward a{};
    a.query = call.input("query", query);
    const int64_t B = a.query.batch, D = a.query.rows;
    a.key = call.input("key", key, {B, D, kAny}, a.query.dtype);
    a.value = call.input("value", value, {B, kAny, a.key.columns}, a.query.dtype);
    a.grad = call.input("grad", grad, with_rows(query, a.value.rows), a.query.dtype);
    a.dquery = call.output("dquery", dquery, shape_of(query), a.query.dtype);
    a.dkey = call.output("dkey", dkey, shape_of(key), a.query.dtype);
    a.dvalue = call.output("dvalue", dvalue, shape_of(value), a.query.dtype);
    a.scale = scale;
    call.run(a, a.query);
  }

  // For C++, where nothing stands before the kernels: results are allocated here.

  static Argument spatial_gather(const Argument& feats, const Argument& logits, double scale) {
    STD_TORCH_CHECK(feats.dim() >= 3 && logits.dim() >= 3, "feats must be [B, C, *S] and logits [B, K, *S]");
    const Tensor x = {nullptr, dtype_of("feats", feats)}, m = {nullptr, dtype_of("logits", logits)};
    const auto dtype = statistics_dtype(x, m) == Dtype::Float64 ? ScalarType::Double : ScalarType::Float;
    const int64_t B = feats.size(0), C = feats.size(1), K = logits.size(1);
    const Argument out = torch::stable::new_empty(feats, {B, C, K});
    gather_forward(out, torch::stable::new_empty(feats, {B, C + 2, K}, dtype), feats, logits, scale);
    return out;
  }

  static Argument pixel_region_attention(const Argument& query, const Argument& key, const Argument& value,
                                         std::optional<double> scale) {
    STD_TORCH_CHECK(query.dim() >= 3 && value.dim() == 3, "query must be [B, D, *S] and value [B, Dv, K]");
    const Argument out = torch::stable::new_empty(query, with_rows(query, value.size(1)));
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
