// A torch device whose memory the host cannot read, so that a test can prove how often a backend waits for its device.
//
// Every operator that torch's CPU has runs here on CPU tensors over the same memory: arguments are wrapped, not copied,
// what was written in place is in place, and only fresh results are moved. There are no Python headers in here; the
// controls at the end are torch operators.
#include <ATen/core/DimVector.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/ops/_local_scalar_dense.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <set>

#include "device_rules.h"

namespace chipset_device {
namespace {

using at::Tensor;
using torch::jit::Stack;

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return kDevice; }
  c10::Device exchangeDevice(c10::Device device) const override {
    return {kDevice, switch_device(device.index())};
  }
  c10::Device getDevice() const override { return {kDevice, current_device}; }
  void setDevice(c10::Device device) const override { switch_device(device.index()); }
  void uncheckedSetDevice(c10::Device device) const noexcept override { switch_device(device.index()); }
  c10::Stream getStream(c10::Device device) const override { return c10::Stream(c10::Stream::DEFAULT, device); }
  c10::Stream getDefaultStream(c10::Device device) const override { return c10::Stream(c10::Stream::DEFAULT, device); }
  c10::Stream exchangeStream(c10::Stream stream) const override { return stream; }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override { ++ledger.synchronizes; }
  void synchronizeDevice(c10::DeviceIndex) const override { ++ledger.synchronizes; }
  c10::DeviceIndex deviceCount() const noexcept override { return static_cast<c10::DeviceIndex>(num_devices); }
};

const c10::impl::DeviceGuardImplRegistrar register_guard(kDevice, new Guard);

// Only PrivateUse1 has hooks that torch asks for; a plugin's own key brings its own.
struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return static_cast<c10::DeviceIndex>(num_devices); }
  c10::DeviceIndex getCurrentDevice() const override { return current_device; }
  void setCurrentDevice(c10::DeviceIndex index) const override { switch_device(index); }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex index) const override { return switch_device(index); }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex index) const override { return switch_device(index); }
  c10::Allocator* getPinnedMemoryAllocator() const override { return c10::GetAllocator(c10::kCPU); }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t bytes) const override { grow(storage, bytes); }
};

const bool register_memory = [] {
  c10::SetAllocator(kDevice, &allocator);
  if constexpr (kDevice == c10::DeviceType::PrivateUse1) at::RegisterPrivateUse1HooksInterface(new Hooks);
  return true;
}();

// One call of an operator on its way through the CPU.
class Call {
 public:
  Call(const c10::OperatorHandle& op, Stack& stack) : op_(op), traits_(Traits::of(op)), stack_(stack) {}

  void run() {
    check_operator(traits_);
    const size_t count = op_.schema().arguments().size();
    c10::IValue* arguments = stack_.data() + stack_.size() - count;
    for (size_t i = 0; i < count; ++i) arguments[i] = lowered(arguments[i], arguments, i);
    ++ledger.kernels;
    {
      at::AutoDispatchBelowADInplaceOrView plain;
      op_.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), &stack_);
      for (const auto& pair : pairs_) {
        if (pair.written) settle(pair);
      }
    }
    const size_t results = op_.schema().returns().size();
    for (size_t i = stack_.size() - results; i < stack_.size(); ++i) stack_[i] = raised(stack_[i]);
  }

 private:
  struct Pair {
    Tensor device, host;
    bool written;
  };

  c10::IValue lowered(const c10::IValue& value, const c10::IValue* arguments, size_t i) {
    if (value.isTensor()) return lowered(value.toTensor(), arguments, i, 0);
    if (value.isTensorList()) {
      c10::List<Tensor> list;
      for (const Tensor& tensor : value.toTensorVector()) list.push_back(lowered(tensor, arguments, i, 0));
      return list;
    }
    if (value.isOptionalTensorList()) {
      c10::List<std::optional<Tensor>> list;
      size_t position = 0;
      for (const std::optional<Tensor> tensor : value.toOptionalTensorList()) {
        list.push_back(tensor ? std::make_optional(lowered(*tensor, arguments, i, position)) : std::nullopt);
        ++position;
      }
      return list;
    }
    if (value.isDevice() && value.toDevice().type() == kDevice) {
      index_ = value.toDevice().has_index() ? value.toDevice().index() : current_device;
      return c10::Device(c10::kCPU);
    }
    if (value.isDouble()) check_constant(traits_, value.toDouble());
    return value;
  }

  Tensor lowered(const Tensor& tensor, const c10::IValue* arguments, size_t i, size_t position) {
    if (!tensor.defined()) return tensor;
    const bool is_index = traits_.is_index[i];
    if (!is_here(tensor)) {
      if (tensor.device().is_cpu()) {
        check_host_tensor(tensor, traits_, is_index);
        check_constant(traits_, tensor);
      }
      return tensor;
    }
    check_not_int64(tensor.scalar_type(), "argument of ", traits_.name);
    const auto device = tensor.device().index();
    if (index_.value_or(device) != device && tensor.dim() > 0) {
      refuse("other_device", traits_.name + ": tensors of two devices");
    }
    index_ = index_.value_or(device);
    Tensor host = host_view(tensor);
    check_constant(traits_, host);
    if (is_index) {
      check_index(tensor, host, index_bound(traits_, op_.schema(), arguments, position), traits_.name);
      if (traits_.only_int64) return host.to(at::kLong);
    }
    pairs_.push_back({tensor, host, traits_.is_written[i]});
    return host;
  }

  // Where the kernel gave an output another shape, the device tensor follows.
  void settle(const Pair& pair) {
    if (pair.host.sizes() != pair.device.sizes()) {
      const auto bytes = at::detail::computeStorageNbytes(pair.host.sizes(), pair.host.strides(),
                                                          pair.host.itemsize(), pair.device.storage_offset());
      grow(pair.device.storage(), bytes);
      pair.device.unsafeGetTensorImpl()->set_sizes_and_strides(pair.host.sizes(), pair.host.strides());
      host_view(pair.device).copy_(pair.host);
    }
    if (!traits_.moves) check_finite(traits_.name, pair.host);
  }

  c10::IValue raised(const c10::IValue& value) {
    if (value.isTensor()) return raised(value.toTensor());
    if (value.isTensorList()) {
      c10::List<Tensor> list;
      for (const Tensor& tensor : value.toTensorVector()) list.push_back(raised(tensor));
      return list;
    }
    return value;
  }

  Tensor raised(const Tensor& result) {
    if (!result.defined()) return result;
    for (const auto& pair : pairs_) {
      if (result.is_same(pair.host)) return pair.device;
    }
    for (const auto& pair : pairs_) {
      if (result.storage().is_alias_of(pair.host.storage())) return view_like(result, pair.device);
    }
    if (!traits_.orders) check_not_int64(result.scalar_type(), "result of ", traits_.name);
    if (!traits_.moves) check_finite(traits_.name, result);
    return moved_to_device(result, index_.value_or(current_device));
  }

  static Tensor view_like(const Tensor& host, const Tensor& base) {
    auto view = at::detail::make_tensor<c10::TensorImpl>(c10::Storage(base.storage()), c10::DispatchKeySet(kKey),
                                                         host.dtype());
    view.unsafeGetTensorImpl()->set_sizes_and_strides(host.sizes(), host.strides(), host.storage_offset());
    return view;
  }

  const c10::OperatorHandle& op_;
  const Traits& traits_;
  Stack& stack_;
  c10::SmallVector<Pair, 6> pairs_;
  std::optional<c10::DeviceIndex> index_;  // of the first device that the arguments name
};

void run_on_cpu(const c10::OperatorHandle& op, Stack* stack) { Call(op, *stack).run(); }

at::DimVector contiguous_strides(at::IntArrayRef sizes) {
  at::DimVector strides(sizes.size(), 1);
  for (size_t i = sizes.size(); i > 1; --i) strides[i - 2] = strides[i - 1] * std::max<int64_t>(sizes[i - 1], 1);
  return strides;
}

Tensor empty_strided(at::IntArrayRef sizes, at::IntArrayRef strides, std::optional<at::ScalarType> dtype,
                     std::optional<at::Layout>, std::optional<at::Device> device, std::optional<bool>) {
  const auto scalar_type = at::dtype_or_default(dtype);
  check_not_int64(scalar_type, "tensor allocated");
  const bool named = device.has_value() && device->has_index();
  return device_tensor(sizes, strides, c10::scalarTypeToTypeMeta(scalar_type),
                       named ? device->index() : current_device);
}

Tensor empty(at::IntArrayRef sizes, std::optional<at::ScalarType> dtype, std::optional<at::Layout> layout,
             std::optional<at::Device> device, std::optional<bool> pinned, std::optional<at::MemoryFormat> format) {
  at::detail::check_size_nonnegative(sizes);
  auto made = empty_strided(sizes, contiguous_strides(sizes), dtype, layout, device, pinned);
  made.unsafeGetTensorImpl()->empty_tensor_restride(format.value_or(at::MemoryFormat::Contiguous));
  return made;
}

const Tensor& resize(const Tensor& self, at::IntArrayRef sizes, std::optional<at::MemoryFormat> format) {
  if (self.sizes() == sizes) return self;
  grow(self.storage(), at::detail::computeStorageNbytesContiguous(sizes, self.itemsize(), self.storage_offset()));
  self.unsafeGetTensorImpl()->set_sizes_contiguous(sizes);
  if (format) self.unsafeGetTensorImpl()->empty_tensor_restride(*format);
  return self;
}

Tensor& set_storage(Tensor& self, at::Storage storage, int64_t offset, at::IntArrayRef sizes, at::IntArrayRef strides) {
  const at::DimVector packed = contiguous_strides(sizes);
  if (strides.empty()) strides = packed;
  grow(storage, at::detail::computeStorageNbytes(sizes, strides, self.itemsize(), offset));
  self.unsafeGetTensorImpl()->set_storage_keep_dtype(std::move(storage));
  self.unsafeGetTensorImpl()->set_sizes_and_strides(sizes, strides, offset);
  return self;
}

Tensor& set_whole_storage(Tensor& self, at::Storage storage) {
  const auto count = static_cast<int64_t>(storage.nbytes() / self.itemsize());
  return set_storage(self, std::move(storage), 0, {count}, {});
}

// Between devices, and whatever of copy_ is not the CPU's own.
Tensor copy_from(const Tensor& source, const Tensor& target, bool) {
  if (!is_here(target)) {
    check_read(source, "a copy to the host");
    target.copy_(host_view(source));
    return target;
  }
  if (is_here(source)) {
    if (target.scalar_type() != at::kInt) check_not_int64(source.scalar_type(), "argument of aten::copy_");
    check_not_int64(target.scalar_type(), "argument of aten::copy_");
    host_view(target).copy_(host_view(source));
    ++ledger.kernels;
    return target;
  }
  check_not_int64(target.scalar_type(), "tensor put on the device");
  check_finite("upload", source);
  host_view(target).copy_(source);
  ++ledger.uploads;
  ++ledger.uploads_by_dtype[static_cast<size_t>(target.scalar_type())];
  ledger.uploaded_bytes += static_cast<int64_t>(target.nbytes());
  return target;
}

Tensor copy_from_and_resize(const Tensor& source, const Tensor& target) {
  if (is_here(target)) {
    resize(target, source.sizes(), std::nullopt);
  } else {
    target.resize_(source.sizes());
  }
  return copy_from(source, target, false);
}

at::Scalar read_scalar(const Tensor& self) {
  check_read(self, "the value of a tensor (item, bool, int, float, an index)");
  return at::_local_scalar_dense(host_view(self));
}

// The rest of what the CPU implements goes through it, in one piece: composites of torch would allocate int64 results
// and dispatch twice. Scaled dot product attention is a composite that asks which device it is on.
void register_kernels(torch::Library& m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("resize_", &resize);
  m.impl("as_strided", &at::native::as_strided_tensorimpl);
  m.impl("view", &at::native::view);
  m.impl("_reshape_alias", &at::native::_reshape_alias);
  m.impl("set_.source_Storage_storage_offset", &set_storage);
  m.impl("set_.source_Storage", &set_whole_storage);
  m.impl("set_.source_Tensor", &at::native::set_tensor_);
  m.impl("_copy_from", &copy_from);
  m.impl("_copy_from_and_resize", &copy_from_and_resize);
  m.impl("_local_scalar_dense", &read_scalar);
  const auto through_cpu = [&m](const std::string& name) {
    m.impl(name.c_str(), torch::CppFunction::makeFromBoxedFunction<&run_on_cpu>());
  };
  through_cpu("scaled_dot_product_attention");
  const std::set<std::string> own = {"empty.memory_format", "empty_strided", "resize_", "as_strided", "view",
                                     "_reshape_alias", "set_.source_Storage_storage_offset", "set_.source_Storage",
                                     "set_.source_Tensor", "set_", "_local_scalar_dense"};
  for (const auto& name : c10::Dispatcher::singleton().getRegistrationsForDispatchKey(c10::DispatchKey::CPU)) {
    if (name.name.rfind("aten::", 0) != 0) continue;
    const std::string full = c10::toString(name).substr(6);
    if (own.count(full) == 0) through_cpu(full);
  }
}

c10::Dict<std::string, int64_t> counts() {
  c10::Dict<std::string, int64_t> all;
  all.insert("reads", ledger.reads);
  all.insert("uploads", ledger.uploads);
  all.insert("uploaded_bytes", ledger.uploaded_bytes);
  all.insert("kernels", ledger.kernels);
  all.insert("synchronizes", ledger.synchronizes);
  for (size_t i = 0; i < ledger.uploads_by_dtype.size(); ++i) {
    const auto dtype = static_cast<at::ScalarType>(i);
    if (ledger.uploads_by_dtype[i] != 0) {
      all.insert("uploads." + std::string(c10::getDtypeNames(dtype).first), ledger.uploads_by_dtype[i]);
    }
  }
  std::lock_guard lock(ledger.mutex);
  for (const auto& [kind, count] : ledger.refused) all.insert("refused." + kind, count);
  return all;
}

Usage& usage_of(int64_t index) {
  TORCH_CHECK_INDEX(index >= 0 && index < num_devices, "no device sim:", index, "; there are ", num_devices.load());
  return usage[static_cast<size_t>(index)];
}

}  // namespace

TORCH_LIBRARY(chipset_device, m) {
  m.def("counts() -> Dict(str, int)", &counts);
  m.def("permit(int change) -> ()", [](int64_t change) { permits += static_cast<int>(change); });
  m.def("set_rule(str name, bool on) -> bool", [](std::string name, bool on) { return rules.named(name).exchange(on); });
  m.def("memory(int device) -> (int allocated, int peak, int total)", [](int64_t index) {
    const auto& used = usage_of(index);
    return std::make_tuple<int64_t, int64_t, int64_t>(used.allocated, used.peak, total_bytes.load());
  });
  m.def("reset_peak(int device) -> ()", [](int64_t index) { usage_of(index).peak = usage_of(index).allocated.load(); });
  m.def("set_total(int bytes) -> ()", [](int64_t bytes) { total_bytes = bytes; });
  m.def("synchronize() -> ()", [] { ++ledger.synchronizes; });
  m.def("device_count() -> int", []() -> int64_t { return num_devices; });
  m.def("set_device_count(int count) -> ()", [](int64_t count) {
    TORCH_CHECK_VALUE(count >= 1 && count <= kMaxDevices, "from 1 to ", kMaxDevices, " devices, not ", count);
    num_devices = static_cast<int>(count);
  });
  m.def("current_device() -> int", []() -> int64_t { return current_device; });
  m.def("set_device(int index) -> ()", [](int64_t index) {
    usage_of(index);
    current_device = static_cast<c10::DeviceIndex>(index);
  });
}

TORCH_LIBRARY_IMPL(_, CHIPSET_DEVICE_KEY, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&run_on_cpu>()); }

TORCH_LIBRARY_IMPL(aten, CHIPSET_DEVICE_KEY, m) { register_kernels(m); }

}  // namespace chipset_device
