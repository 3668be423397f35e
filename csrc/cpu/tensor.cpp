#include "tensor.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <array>
#include <string_view>

extern "C" int omp_in_parallel();
extern "C" int omp_get_max_threads();
extern "C" void omp_set_num_threads(int);

namespace fusedrnn {
namespace {

using torch::stable::detail::from;

AtenTensorHandle new_reference(AtenTensorHandle handle) {
  AtenTensorHandle copy = nullptr;
  FUSEDRNN_TORCH(aoti_torch_new_tensor_handle(handle, &copy));
  return copy;
}

// One operator of torch by its name; its arguments go with it, its first result comes back.
template <size_t N>
StableIValue call(const char* name, const char* overload, std::array<StableIValue, N> stack) {
  check_torch(torch_call_dispatcher(name, overload, stack.data(), TORCH_ABI_VERSION), name);
  return stack[0];
}

StableIValue argument(const Tensor& t) { return reinterpret_cast<uintptr_t>(new_reference(t.handle())); }

// The C library gives what is freed at the end of the heap back to the system as soon as that is twice the largest
// block that it saw freed, and each page that comes again costs a fault: a step of training lost a third of its time to
// them. It learns from one block, of which no page is touched; 32 MiB are the most that it learns, with what it writes
// in front. Who sets MALLOC_TRIM_THRESHOLD_ or MALLOC_MMAP_THRESHOLD_ has the last word.
constexpr int64_t kKept = (32 << 20) - (64 << 10);
void keep_pages() {
  static const bool once = [] {
    void* volatile block = malloc(kKept);
    free(block);
    return true;
  }();
  static_cast<void>(once);
}

// Larger blocks are given back each time: of pages of 2 MiB, where Linux has them, a page costs a fault, not of 4 KiB.
void want_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] int64_t bytes) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t kPage = 2 << 20;
  const uintptr_t from = (reinterpret_cast<uintptr_t>(data) + kPage - 1) / kPage * kPage;
  const uintptr_t to = (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes)) / kPage * kPage;
  if (to > from) madvise(reinterpret_cast<void*>(from), to - from, MADV_HUGEPAGE);
#endif
}

// After a fork the threads of GNU's OpenMP are gone, and whoever forked would wait for them for ever.
bool forked = false;
[[maybe_unused]] const int watched = pthread_atfork(nullptr, nullptr, [] { forked = true; });

// Around calls of torch: there, they get one thread as well.
class Alone {
 public:
  Alone() : threads_(forked ? omp_get_max_threads() : 0) {
    if (!threads_) return;
    omp_set_num_threads(1);
    if (mkl()) mkl_threads_ = mkl()(1);
  }
  ~Alone() {
    if (!threads_) return;
    omp_set_num_threads(threads_);
    if (mkl()) mkl()(mkl_threads_);
  }
  Alone(const Alone&) = delete;
  Alone& operator=(const Alone&) = delete;

 private:
  using SetThreads = int (*)(int);
  // What torch.set_num_threads told MKL has precedence over OpenMP's number; this over both.
  static SetThreads mkl() {
    static const auto found = reinterpret_cast<SetThreads>(dlsym(RTLD_DEFAULT, "MKL_Set_Num_Threads_Local"));
    return found;
  }

  const int threads_;
  int mkl_threads_ = 0;
};

void drop(StableIValue tensor) { aoti_torch_delete_tensor_object(reinterpret_cast<AtenTensorHandle>(tensor)); }

}  // namespace

void check_torch(AOTITorchError error, const char* what) {
  if (error == AOTI_TORCH_SUCCESS) return;
  // Since torch 2.12; before, torch writes its message to stderr.
  using Message = const char* (*)();
  static const auto message =
      reinterpret_cast<Message>(dlsym(RTLD_DEFAULT, "torch_exception_get_what_without_backtrace"));
  const char* text = message ? message() : nullptr;
  if (text && *text) {
    // Of an error of Python, the message alone.
    std::string_view said(text), prefix("RuntimeError: ");
    said = said.substr(0, said.find("\n\nAt:\n"));
    fail(said.starts_with(prefix) ? said.substr(prefix.size()) : said);
  }
  fail("fusedrnn: torch refused ", std::string(what).substr(0, std::string(what).find('(')));
}

const char* name_of(int32_t dtype) {
  static const char* const names[] = {"uint8",   "int8",    "int16",     "int32",     "int64",      "float16",
                                      "float32", "float64", "complex32", "complex64", "complex128", "bool"};
  if (dtype >= 0 && dtype <= kBool) return names[dtype];
  return dtype == kBFloat16 ? "bfloat16" : "another dtype";
}

int64_t bytes_of(int32_t dtype) {
  switch (dtype) {
    case kDouble:
    case kInt64:
      return 8;
    case kFloat:
      return 4;
    case kBool:
    case kUint8:
    case kInt8:
      return 1;
    default:
      return 2;
  }
}

std::ostream& operator<<(std::ostream& out, const Sizes& s) {
  out << '[';
  for (int64_t k = 0; k < s.count; ++k) out << (k ? ", " : "") << s.data[k];
  return out << ']';
}

Tensor Tensor::borrow(AtenTensorHandle handle) {
  Tensor t;
  if (!handle) return t;
  t.handle_ = handle;
  int64_t *sizes = nullptr, *strides = nullptr;
  FUSEDRNN_TORCH(aoti_torch_get_dim(handle, &t.dim_));
  FUSEDRNN_TORCH(aoti_torch_get_dtype(handle, &t.dtype_));
  FUSEDRNN_TORCH(aoti_torch_get_sizes(handle, &sizes));
  std::copy_n(sizes, std::min<int64_t>(t.dim_, kDims), t.sizes_);
  if (!t.is_strided() || !t.on_cpu()) return t;
  FUSEDRNN_TORCH(aoti_torch_get_strides(handle, &strides));
  std::copy_n(strides, std::min<int64_t>(t.dim_, kDims), t.strides_);
  if (t.numel()) FUSEDRNN_TORCH(torch_get_const_data_ptr(handle, &t.data_));
  return t;
}

Tensor Tensor::own(AtenTensorHandle handle) {
  Tensor t;
  try {
    t = borrow(handle);
  } catch (...) {
    aoti_torch_delete_tensor_object(handle);
    throw;
  }
  t.owned_ = handle != nullptr;
  return t;
}

Tensor Tensor::empty(Sizes sizes, int32_t dtype) {
  Tensor t;
  t.dim_ = sizes.count;
  t.dtype_ = dtype;
  int64_t stride = 1;
  for (int64_t k = t.dim_ - 1; k >= 0; --k) {
    t.sizes_[k] = sizes.data[k];
    t.strides_[k] = stride;
    stride *= std::max<int64_t>(sizes.data[k], 1);
  }
  if (stride * t.element_size() >= 1 << 20) keep_pages();
  static const int32_t cpu = aoti_torch_device_type_cpu();
  FUSEDRNN_TORCH(aoti_torch_empty_strided(t.dim_, t.sizes_, t.strides_, dtype, cpu, 0, &t.handle_));
  t.owned_ = true;
  if (t.numel()) FUSEDRNN_TORCH(torch_get_const_data_ptr(t.handle_, &t.data_));
  const int64_t bytes = stride * t.element_size();
  if (bytes > kKept && t.data_) want_huge_pages(t.writable(), bytes);
  return t;
}

bool Tensor::has_sizes(Sizes sizes) const {
  return sizes.count == dim_ && dim_ <= kDims && std::equal(sizes_, sizes_ + dim_, sizes.data);
}

int64_t Tensor::numel() const {
  int64_t count = handle_ ? 1 : 0;
  for (int64_t k = 0; k < std::min<int64_t>(dim_, kDims); ++k) count *= sizes_[k];
  return count;
}

bool Tensor::is_contiguous() const {
  int64_t stride = 1;
  for (int64_t k = dim_ - 1; k >= 0; --k) {
    if (sizes_[k] != 1 && strides_[k] != stride) return numel() == 0;
    stride *= sizes_[k];
  }
  return true;
}

bool Tensor::on_cpu() const {
  static const int32_t cpu = aoti_torch_device_type_cpu();
  int32_t device = 0;
  FUSEDRNN_TORCH(aoti_torch_get_device_type(handle_, &device));
  return device == cpu;
}

bool Tensor::is_strided() const {
  static const int32_t strided = aoti_torch_layout_strided();
  int32_t layout = 0;
  FUSEDRNN_TORCH(aoti_torch_get_layout(handle_, &layout));
  return layout == strided;
}

Tensor Tensor::with_dims(int64_t dims) const {
  Tensor t;
  t.handle_ = handle_;
  t.data_ = data_;
  t.offset_ = offset_;
  t.dtype_ = dtype_;
  t.dim_ = dims;
  const int64_t shift = dims - dim_;
  for (int64_t k = 0; k < dims; ++k) {
    t.sizes_[k] = k < shift ? 1 : sizes_[k - shift];
    t.strides_[k] = k < shift ? 0 : strides_[k - shift];
  }
  return t;
}

Tensor Tensor::select(int64_t k) const {
  Tensor t = with_dims(dim_ - 1);
  std::copy_n(sizes_ + 1, dim_ - 1, t.sizes_);
  std::copy_n(strides_ + 1, dim_ - 1, t.strides_);
  t.offset_ += k * strides_[0];
  if (data_) t.data_ = static_cast<const char*>(data_) + k * strides_[0] * element_size();
  return t;
}

Tensor Tensor::narrow(int64_t first, int64_t count) const {
  if (!handle_) return {};
  Tensor t = with_dims(dim_);
  t.sizes_[0] = count;
  t.offset_ += first * strides_[0];
  if (data_) t.data_ = static_cast<const char*>(data_) + first * strides_[0] * element_size();
  return t;
}

Tensor Tensor::transposed() const {
  Tensor t = with_dims(dim_);
  std::swap(t.sizes_[0], t.sizes_[1]);
  std::swap(t.strides_[0], t.strides_[1]);
  return t;
}

Tensor Tensor::contiguous() const {
  if (!handle_ || is_contiguous()) return with_dims(dim_);
  const Alone alone;
  Tensor copy = empty({sizes_, dim_}, dtype_);
  // Without what autograd knows of it.
  AtenTensorHandle view = nullptr;
  FUSEDRNN_TORCH(aoti_torch__reinterpret_tensor(handle_, dim_, sizes_, strides_, offset_, &view));
  const Tensor from = own(view);
  FUSEDRNN_TORCH(aoti_torch_copy_(copy.handle(), from.handle(), 0));
  return copy;
}

Matrix Matrix::rows_of(const Tensor& t) {
  const int64_t columns = t.size(-1);
  int64_t rows = 1;
  for (int64_t k = 0; k + 1 < t.dim(); ++k) rows *= t.size(k);
  return {&t, rows, columns, columns, 1};
}

Tensor Matrix::view() const {
  const int64_t sizes[] = {rows, columns}, strides[] = {row_stride, column_stride};
  AtenTensorHandle handle = nullptr;
  FUSEDRNN_TORCH(aoti_torch__reinterpret_tensor(base->handle(), 2, sizes, strides, base->offset() + offset, &handle));
  return Tensor::own(handle);
}

// The variants with `out`: autocast, which is for the outside of an op, leaves them alone.
void torch_mm_out(const Matrix& c, const Matrix& a, const Matrix& b) {
  const Alone alone;
  const Tensor to = c.view(), left = a.view(), right = b.view();
  drop(call<3>("aten::mm", "out", {argument(left), argument(right), argument(to)}));
}

bool torch_addmm(const Matrix& c, const Matrix& a, const Matrix& b) {
  // The dispatcher's C function takes no Scalar. This one is of what AOTInductor's programs call: not promised.
  using Addmm =
      AOTITorchError (*)(AtenTensorHandle, AtenTensorHandle, AtenTensorHandle, AtenTensorHandle, double, double);
  static const auto addmm = reinterpret_cast<Addmm>(dlsym(RTLD_DEFAULT, "aoti_torch_cpu_addmm_out"));
  if (!addmm) return false;
  const Alone alone;
  const Tensor to = c.view(), left = a.view(), right = b.view();
  check_torch(addmm(to.handle(), to.handle(), left.handle(), right.handle(), 1.0, 1.0), "aoti_torch_cpu_addmm_out");
  return true;
}

void torch_copy(const Matrix& to, const Matrix& from) {
  const Alone alone;
  const Tensor target = to.view(), source = from.view();
  FUSEDRNN_TORCH(aoti_torch_copy_(target.handle(), source.handle(), 0));
}

Tensor torch_sum_rows(const Matrix& a) {
  const Alone alone;
  Tensor sum = Tensor::empty({a.columns}, a.dtype());
  const Tensor of = a.view();
  drop(call<5>("aten::sum", "IntList_out",
               {argument(of), from(std::optional(std::vector<int64_t>{0})), from(false),
                from(std::optional<torch::headeronly::ScalarType>()), argument(sum)}));
  return sum;
}

bool is_forked() { return forked; }

int torch_threads() {
  if (forked) return 1;
  uint32_t threads = 1;
  FUSEDRNN_TORCH(torch_get_num_threads(&threads));
  return static_cast<int>(threads);
}

bool in_parallel_region() { return omp_in_parallel() != 0; }

}  // namespace fusedrnn
