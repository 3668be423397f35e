// Runs a tagger that examples/aoti/export.py wrote, without Python:
//   tagger libfusedrnn.so tagger.pt2 "3 1 4 1 5" "2 7" ...
// Prints a tag for each token of each sequence.
#include <ATen/ATen.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <algorithm>
#include <iostream>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

int main(int count, char** arguments) try {
  if (count < 4) {
    std::cerr << "usage: tagger libfusedrnn.so tagger.pt2 \"3 1 4 1 5\" ...\n";
    return 2;
  }
  // The ops register themselves when their library is opened: before the package is.
  if (dlopen(arguments[1], RTLD_NOW | RTLD_GLOBAL) == nullptr) throw std::runtime_error(dlerror());
  torch::inductor::AOTIModelPackageLoader model(arguments[2]);

  std::vector<std::vector<int64_t>> sequences;
  size_t longest = 0;
  for (int k = 3; k < count; ++k) {
    std::istringstream words(arguments[k]);
    std::vector<int64_t> sequence;
    for (int64_t token; words >> token;) sequence.push_back(token);
    longest = std::max(longest, sequence.size());
    sequences.push_back(std::move(sequence));
  }
  const auto batch = static_cast<int64_t>(sequences.size());
  at::Tensor tokens = at::zeros({batch, static_cast<int64_t>(longest)}, at::kLong);
  at::Tensor lengths = at::zeros({batch}, at::kLong);
  for (int64_t b = 0; b < batch; ++b) {
    const auto length = static_cast<int64_t>(sequences[b].size());
    lengths[b] = length;
    for (int64_t t = 0; t < length; ++t) tokens[b][t] = sequences[b][t];
  }

  const at::Tensor tags = model.run({tokens, lengths})[0].argmax(-1);
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t t = 0; t < lengths[b].item<int64_t>(); ++t) std::cout << (t ? " " : "") << tags[b][t].item<int64_t>();
    std::cout << '\n';
  }
} catch (const c10::Error& error) {
  std::cerr << error.what_without_backtrace() << '\n';
  return 1;
} catch (const std::exception& error) {
  std::cerr << error.what() << '\n';
  return 1;
}
