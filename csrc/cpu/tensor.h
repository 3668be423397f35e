// Tensors of torch as the CPU kernels see them, through torch's C functions alone: those of torch 2.11, which later
// versions keep.
#pragma once

#include <stdint.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>

#include <initializer_list>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "../api.h"

namespace fusedrnn {

template <typename... Parts>
[[noreturn, gnu::cold, gnu::noinline]] void fail(const Parts&... parts) {
  std::ostringstream text;
  ((text << parts), ...);
  throw std::runtime_error(text.str());
}
#define FUSEDRNN_CHECK(condition, ...) \
  if (!(condition)) [[unlikely]]       \
  ::fusedrnn::fail(__VA_ARGS__)

// What a function of torch answers; `what` names it.
FUSEDRNN_API void check_torch(AOTITorchError error, const char* what);
#define FUSEDRNN_TORCH(call) ::fusedrnn::check_torch(call, #call)

// The dtypes of torch, by number: of torch/headeronly/core/ScalarType.h, which never change.
enum ScalarType : int32_t {
  kUint8 = 0,
  kInt8 = 1,
  kInt64 = 4,
  kHalf = 5,
  kFloat = 6,
  kDouble = 7,
  kBool = 11,
  kBFloat16 = 15
};
const char* name_of(int32_t dtype);
FUSEDRNN_API int64_t bytes_of(int32_t dtype);

// "[2, 3]"
struct Sizes {
  const int64_t* data;
  int64_t count;
  Sizes(const int64_t* data, int64_t count) : data(data), count(count) {}
  Sizes(std::initializer_list<int64_t> list) : Sizes(list.begin(), static_cast<int64_t>(list.size())) {}
  Sizes(const std::vector<int64_t>& sizes) : Sizes(sizes.data(), static_cast<int64_t>(sizes.size())) {}
  friend std::ostream& operator<<(std::ostream& out, const Sizes& s);
};

// A tensor, or none. What is asked often is read once.
class FUSEDRNN_API Tensor {
 public:
  static constexpr int kDims = 4;

  Tensor() = default;
  Tensor(Tensor&& other) noexcept { *this = static_cast<Tensor&&>(other); }
  Tensor& operator=(Tensor&& other) noexcept {
    std::swap(handle_, other.handle_);
    std::swap(owned_, other.owned_);
    std::swap(data_, other.data_);
    std::swap(offset_, other.offset_);
    std::swap(dtype_, other.dtype_);
    std::swap(dim_, other.dim_);
    std::swap(sizes_, other.sizes_);
    std::swap(strides_, other.strides_);
    return *this;
  }
  ~Tensor() {
    if (owned_) aoti_torch_delete_tensor_object(handle_);
  }

  // Of somebody else's handle, which outlives it; null: none.
  static Tensor borrow(AtenTensorHandle handle);
  static Tensor own(AtenTensorHandle handle);
  // Contiguous, on the CPU, not initialised.
  static Tensor empty(Sizes sizes, int32_t dtype);

  explicit operator bool() const { return handle_ != nullptr; }
  AtenTensorHandle handle() const { return handle_; }
  AtenTensorHandle release() {
    owned_ = false;
    return handle_;
  }

  int64_t offset() const { return offset_; }
  int64_t dim() const { return dim_; }
  int64_t size(int64_t k) const { return sizes_[k < 0 ? k + dim_ : k]; }
  int64_t stride(int64_t k) const { return strides_[k < 0 ? k + dim_ : k]; }
  Sizes sizes() const { return {sizes_, dim_ > kDims ? kDims : dim_}; }
  bool has_sizes(Sizes sizes) const;
  int64_t numel() const;
  int32_t dtype() const { return dtype_; }
  int64_t element_size() const { return bytes_of(dtype_); }
  bool is_contiguous() const;
  bool on_cpu() const;
  bool is_strided() const;

  // Null where there are no elements, or no tensor.
  const void* data() const { return data_; }
  template <typename T>
  const T* data() const {
    return static_cast<const T*>(data_);
  }
  void* writable() const { return const_cast<void*>(data_); }

  // The same memory, while this one lives: with dimensions of one element put in front or taken away there; entry k of
  // the first dimension, or some entries of it.
  Tensor with_dims(int64_t dims) const;
  Tensor select(int64_t k) const;
  Tensor narrow(int64_t first, int64_t count) const;
  // With the first two dimensions exchanged.
  Tensor transposed() const;
  // Itself, or a copy where it has gaps.
  Tensor contiguous() const;

 private:
  AtenTensorHandle handle_ = nullptr;
  bool owned_ = false;
  const void* data_ = nullptr;
  int64_t offset_ = 0;  // of data_, in elements, from the first element of the handle
  int32_t dtype_ = kFloat;
  int64_t dim_ = 0;
  int64_t sizes_[kDims] = {}, strides_[kDims] = {};
};

// A matrix in the memory of a tensor; strides and the offset from the tensor's first element are in elements.
struct Matrix {
  const Tensor* base;
  int64_t rows, columns, row_stride, column_stride, offset = 0;

  // All but the last dimension as rows; `t` is contiguous.
  static Matrix rows_of(const Tensor& t);
  Matrix t() const { return {base, columns, rows, column_stride, row_stride, offset}; }
  Matrix narrow_rows(int64_t first, int64_t count) const {
    return {base, count, columns, row_stride, column_stride, offset + first * row_stride};
  }
  Matrix narrow_columns(int64_t first, int64_t count) const {
    return {base, rows, count, row_stride, column_stride, offset + first * column_stride};
  }
  int32_t dtype() const { return base->dtype(); }
  void* data() const {
    return rows && columns ? static_cast<char*>(base->writable()) + offset * base->element_size() : nullptr;
  }
  // For a function of torch.
  Tensor view() const;
};

// c = a b by torch's GEMM.
void torch_mm_out(const Matrix& c, const Matrix& a, const Matrix& b);
// c += a b; false where this torch has no way to it.
bool torch_addmm(const Matrix& c, const Matrix& a, const Matrix& b);
void torch_copy(const Matrix& to, const Matrix& from);
// sum [columns] of the rows.
Tensor torch_sum_rows(const Matrix& a);

// In a process that was forked one thread has to do, and a product of torch's may hang.
bool is_forked();
int torch_threads();
bool in_parallel_region();

}  // namespace fusedrnn
