// What the emulated device refuses. Reading rules always hold; the others can be switched off and on.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/enum_tag.h>
#include <ATen/ops/isinf.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <initializer_list>

#include "device_memory.h"

namespace chipset_device {

struct Rules {
  std::atomic<bool> int64{true}, negative_index{true}, host_index{true}, infinity{false};

  std::atomic<bool>& named(const std::string& name) {
    if (name == "int64") return int64;
    if (name == "negative_index") return negative_index;
    if (name == "host_index") return host_index;
    if (name == "infinity") return infinity;
    TORCH_CHECK_VALUE(false, "no rule ", name, "; there are int64, negative_index, host_index and infinity");
  }
};

inline Rules rules;
inline thread_local int permits = 0;

// What the rules need to know of an operator; found once a thread.
struct Traits {
  std::string name;
  bool reads = false;       // its result depends on data in a way the host must see
  bool sizes = false;       // the shape of its result does
  bool orders = false;      // its int64 result is the index of something
  bool compares = false;    // may be told an infinity: the result is bool
  bool moves = false;       // makes no values of its own, so an infinity in its result was there before
  bool flat = false;        // its index counts through the flattened tensor
  bool only_int64 = false;  // torch's kernel takes no int32 index, hardware does
  std::vector<bool> is_index, is_written;

  explicit Traits(const c10::OperatorHandle& op) : name(op.schema().name()) {
    const auto base = stripped(name);
    auto among = [&](std::initializer_list<const char*> names) {
      return std::any_of(names.begin(), names.end(), [&](const char* other) { return base == other; });
    };
    auto starts = [&](std::initializer_list<const char*> names) {
      return std::any_of(names.begin(), names.end(), [&](const char* start) { return base.rfind(start, 0) == 0; });
    };
    reads = op.hasTag(at::Tag::data_dependent_output);
    sizes = op.hasTag(at::Tag::dynamic_output_shape) && base != "index";  // index: only with a boolean one
    orders = among({"argmax", "argmin", "topk", "sort", "max", "min"});
    compares = among({"eq", "ne", "lt", "le", "gt", "ge"});
    moves = among({"index", "index_select", "gather", "embedding", "cat", "clone", "take", "flip", "roll", "repeat",
                   "scatter", "index_put", "index_put_impl", "index_copy"});
    flat = among({"take", "put"});
    only_int64 = flat || among({"index_copy", "index_fill"});
    const bool indexes = starts({"index", "gather", "scatter", "embedding", "take", "put", "unsafe_index"});
    for (const auto& argument : op.schema().arguments()) {
      is_index.push_back(indexes && (argument.name() == "index" || argument.name() == "indices"));
      is_written.push_back(argument.alias_info() != nullptr && argument.alias_info()->isWrite());
    }
  }

  static const Traits& of(const c10::OperatorHandle& op) {
    thread_local std::unordered_map<const c10::FunctionSchema*, Traits> known;
    const auto& schema = op.schema();
    const auto found = known.find(&schema);
    // the address may belong to another operator by now, where a library of Python's was unloaded
    if (found != known.end() && found->second.name == schema.name() &&
        found->second.is_index.size() == schema.arguments().size()) {
      return found->second;
    }
    return known.insert_or_assign(&schema, Traits(op)).first->second;
  }

 private:
  static std::string stripped(const std::string& full) {
    const size_t start = full.find_first_not_of('_', full.rfind(':') + 1);
    return full.substr(start, full.find_last_not_of('_') + 1 - start);
  }
};

inline bool is_here(const at::Tensor& tensor) { return tensor.device().type() == kDevice; }

inline void check_not_int64(at::ScalarType dtype, const char* what, const std::string& name = "") {
  if (dtype == at::kLong && rules.int64) refuse("int64", std::string("int64 ") + what + name);
}

inline void check_read(const at::Tensor& source, const char* how) {
  if (permits == 0) refuse("read", std::string("reading without a permit: ") + how);
  check_not_int64(source.scalar_type(), "tensor read: ", how);
  ++ledger.reads;
}

inline void check_operator(const Traits& op) {
  if (op.reads) refuse("data_dependent", op.name + ": its result depends on data");
  if (op.sizes) refuse("dynamic_shape", op.name + ": the shape of its result depends on data");
}

// How many places an index may name, -1 where that is unknown. `position` counts in a list of indices.
inline int64_t index_bound(const Traits& op, const c10::FunctionSchema& schema, const c10::IValue* arguments,
                           size_t position) {
  const std::string& first = schema.arguments()[0].name();
  if (first != "self" && first != "weight") return -1;
  const at::Tensor& self = arguments[0].toTensor();
  if (op.flat) return self.numel();
  auto dim = static_cast<int64_t>(position);
  if (const auto at = schema.argumentIndexWithName("dim")) dim = arguments[*at].toInt();
  if (dim < 0) dim += self.dim();
  return dim < self.dim() ? self.size(dim) : 1;
}

template <typename T>
void check_range(const at::Tensor& index, int64_t bound, const std::string& name) {
  const T* values = index.const_data_ptr<T>();
  for (int64_t i = 0; i < index.numel(); ++i) {
    if (values[i] < 0) refuse("negative_index", name + ": negative index " + std::to_string(values[i]));
    if (bound >= 0 && values[i] >= bound) {
      refuse("negative_index",
             name + ": index " + std::to_string(values[i]) + " out of " + std::to_string(bound) + " places");
    }
  }
}

// `host` is the kernels' view of `index`.
inline void check_index(const at::Tensor& index, const at::Tensor& host, int64_t bound, const std::string& name) {
  const auto dtype = index.scalar_type();
  if (dtype == at::kBool || dtype == at::kByte) refuse("boolean_index", name + ": boolean index");
  if (!rules.negative_index) return;
  const at::Tensor dense = host.contiguous();
  if (dtype == at::kInt) check_range<int32_t>(dense, bound, name);
  if (dtype == at::kLong) check_range<int64_t>(dense, bound, name);
}

// A tensor that the operator takes from the host: numbers pass, as torch wraps Python's into such tensors.
inline void check_host_tensor(const at::Tensor& tensor, const Traits& op, bool is_index) {
  if (tensor.dim() == 0) return;
  if (!is_index) refuse("host_argument", op.name + ": host tensor as argument");
  if (rules.host_index) refuse("host_index", op.name + ": host tensor as index");
}

inline void check_constant(const Traits& op, double value) {
  if (rules.infinity && std::isinf(value) && !op.compares) refuse("infinity", op.name + ": infinite argument");
}

// `host` is the kernels' view.
inline void check_constant(const Traits& op, const at::Tensor& host) {
  if (rules.infinity && host.dim() == 0 && at::isFloatingType(host.scalar_type()) && host.numel() == 1) {
    check_constant(op, host.item<double>());
  }
}

inline void check_finite(const std::string& name, const at::Tensor& host) {
  if (rules.infinity && at::isFloatingType(host.scalar_type()) && at::isinf(host).any().item<bool>()) {
    refuse("infinity", name + ": infinity in its result");
  }
}

}  // namespace chipset_device
