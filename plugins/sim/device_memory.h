// Memory of the emulated device, and what is counted about it.
//
//     host's view of a tensor   data_ptr() -> [ PROT_NONE      ]  a read kills the process
//                                                  | one memfd
//     kernels' view of it       Block::host -> [ READ | WRITE  ]
//
// CHIPSET_DEVICE_KEY names torch's dispatch key and device type, PrivateUse1 unless the compiler is told otherwise.
#pragma once

#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <c10/core/Allocator.h>
#include <c10/core/Storage.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <cstring>
#include <map>
#include <mutex>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#ifndef CHIPSET_DEVICE_KEY
#define CHIPSET_DEVICE_KEY PrivateUse1
#endif

namespace chipset_device {

constexpr auto kDevice = c10::DeviceType::CHIPSET_DEVICE_KEY;
constexpr auto kKey = c10::DispatchKey::CHIPSET_DEVICE_KEY;
constexpr int kMaxDevices = 16;
constexpr size_t kPage = 4096;
// Blocks up to this size are kept for the next of their size: mapping and first touch cost more than a small kernel.
constexpr size_t kMaxPooled = 64 << 20;

// What happened since the process started.
struct Ledger {
  std::atomic<int64_t> reads{0}, uploads{0}, uploaded_bytes{0}, kernels{0}, synchronizes{0};
  std::array<std::atomic<int64_t>, c10::NumScalarTypes> uploads_by_dtype{};
  std::mutex mutex;
  std::map<std::string, int64_t> refused;  // by kind; under mutex
};

inline Ledger ledger;

[[noreturn]] inline void refuse(const std::string& kind, const std::string& what) {
  {
    std::lock_guard lock(ledger.mutex);
    ++ledger.refused[kind];
  }
  throw c10::AcceleratorError({__func__, __FILE__, __LINE__}, 1, "sim device refuses: " + what);
}

// Bytes as they were asked for, without what rounding to pages adds.
struct Usage {
  std::atomic<int64_t> allocated{0}, peak{0};
};

inline std::array<Usage, kMaxDevices> usage;  // by device
inline std::atomic<int64_t> total_bytes{int64_t{8} << 30};
inline std::atomic<int> num_devices{1};
inline thread_local c10::DeviceIndex current_device = 0;

// The device before; an index below 0 stands for the current one.
inline c10::DeviceIndex switch_device(c10::DeviceIndex index) {
  return index < 0 ? current_device : std::exchange(current_device, index);
}

struct Segment {
  char* device;
  char* host;
  size_t mapped;
};

inline Segment map_segment(size_t mapped) {
  const int file = memfd_create("chipset_device", MFD_CLOEXEC);
  void *device = MAP_FAILED, *host = MAP_FAILED;
  if (file >= 0 && ftruncate(file, static_cast<off_t>(mapped)) == 0) {
    device = mmap(nullptr, mapped, PROT_NONE, MAP_SHARED, file, 0);
    host = mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  }
  if (file >= 0) close(file);
  TORCH_CHECK_WITH(OutOfMemoryError, device != MAP_FAILED && host != MAP_FAILED,
                   "sim device is out of memory: the host cannot map ", mapped, " bytes more");
  return {static_cast<char*>(device), static_cast<char*>(host), mapped};
}

inline void unmap_segment(const Segment& segment) {
  munmap(segment.device, segment.mapped);
  munmap(segment.host, segment.mapped);
}

// Freed segments by size. Never destroyed, for tensors may outlive the library's statics.
class Pool {
 public:
  static Pool& instance() {
    static Pool* pool = new Pool;
    return *pool;
  }

  Segment take(size_t bytes) {
    if (bytes > kMaxPooled) return map_segment((bytes + kPage - 1) / kPage * kPage);
    const size_t mapped = std::max(std::bit_ceil(bytes), kPage);
    {
      std::lock_guard lock(mutex_);
      auto& free = free_[mapped];
      if (!free.empty()) {
        const Segment found = free.back();
        free.pop_back();
        return found;
      }
    }
    return map_segment(mapped);
  }

  void give_back(const Segment& segment) {
    if (segment.mapped > kMaxPooled) return unmap_segment(segment);
    std::lock_guard lock(mutex_);
    free_[segment.mapped].push_back(segment);
  }

 private:
  std::mutex mutex_;
  std::unordered_map<size_t, std::vector<Segment>> free_;
};

// The context of a device tensor's data pointer.
struct Block {
  Segment segment;
  int64_t asked;
  c10::DeviceIndex index;
  // The kernels' view as storage of a CPU tensor: shared by all tensors on this block, so that torch sees who overlaps
  // whom.
  c10::Storage host;

  static void release(void* context) {
    auto* block = static_cast<Block*>(context);
    usage[block->index].allocated -= block->asked;
    Pool::instance().give_back(block->segment);
    delete block;
  }
};

inline c10::DataPtr allocate_bytes(size_t bytes, c10::DeviceIndex index) {
  const c10::Device device(kDevice, index);
  TORCH_CHECK_INDEX(index >= 0 && index < num_devices, "no device ", device, "; there are ", num_devices.load());
  if (bytes == 0) return {nullptr, device};
  auto& used = usage[index];
  const auto asked = static_cast<int64_t>(bytes);
  const int64_t now = used.allocated += asked;
  if (now > total_bytes) {
    used.allocated -= asked;
    TORCH_CHECK_WITH(OutOfMemoryError, false, "sim device is out of memory: ", asked, " bytes asked, ", now - asked,
                     " of ", total_bytes.load(), " in use");
  }
  Segment segment{};
  try {
    segment = Pool::instance().take(bytes);
  } catch (...) {
    used.allocated -= asked;
    throw;
  }
  int64_t peak = used.peak;
  while (now > peak && !used.peak.compare_exchange_weak(peak, now)) {
  }
  c10::Storage host(c10::Storage::use_byte_size_t{}, bytes, c10::DataPtr(segment.host, c10::kCPU));
  auto* block = new Block{segment, asked, index, std::move(host)};
  return {segment.device, block, &Block::release, device};
}

class DeviceAllocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override { return allocate_bytes(bytes, current_device); }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }  // a pointer without its context is no block
  void copy_data(void*, const void*, size_t) const override { refuse("read", "a copy between bare pointers"); }
};

inline DeviceAllocator allocator;

// Null where the storage is empty; refused where its memory was made by somebody else.
inline Block* block_of(const c10::Storage& storage) {
  const auto& pointer = storage.data_ptr();
  if (auto* block = pointer.cast_context<Block>(&Block::release)) return block;
  if (storage.nbytes() != 0) refuse("foreign_memory", "memory that it did not allocate");
  return nullptr;
}

inline at::Tensor device_tensor(at::IntArrayRef sizes, at::IntArrayRef strides, caffe2::TypeMeta dtype,
                                c10::DeviceIndex index) {
  const size_t bytes = at::detail::computeStorageNbytes(sizes, strides, dtype.itemsize());
  c10::Storage storage(c10::Storage::use_byte_size_t{}, bytes, allocate_bytes(bytes, index), &allocator, true);
  auto made = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), c10::DispatchKeySet(kKey), dtype);
  made.unsafeGetTensorImpl()->set_sizes_and_strides(sizes, strides);
  return made;
}

// The same elements as a CPU tensor; it must not outlive `tensor`.
inline at::Tensor host_view(const at::Tensor& tensor) {
  Block* block = block_of(tensor.storage());
  if (block == nullptr) {
    return at::detail::empty_strided_generic(tensor.sizes(), tensor.strides(), c10::GetAllocator(c10::kCPU),
                                             c10::DispatchKeySet(c10::DispatchKey::CPU), tensor.scalar_type());
  }
  auto view = at::detail::make_tensor<c10::TensorImpl>(c10::Storage(block->host),
                                                       c10::DispatchKeySet(c10::DispatchKey::CPU), tensor.dtype());
  view.unsafeGetTensorImpl()->set_sizes_and_strides(tensor.sizes(), tensor.strides(), tensor.storage_offset());
  return view;
}

// A new device tensor with the elements and, where they leave no gaps, the strides of a CPU tensor.
inline at::Tensor moved_to_device(const at::Tensor& host, c10::DeviceIndex index) {
  const at::Tensor dense = host.is_non_overlapping_and_dense() ? host : host.contiguous();
  auto made = device_tensor(dense.sizes(), dense.strides(), dense.dtype(), index);
  if (auto* block = block_of(made.storage())) {
    std::memcpy(block->segment.host, dense.const_data_ptr(), dense.nbytes());
  }
  return made;
}

// Make room for `bytes`, keeping what is there.
inline void grow(const c10::Storage& storage, size_t bytes) {
  if (bytes <= storage.nbytes()) return;
  auto fresh = allocate_bytes(bytes, storage.device().index());
  if (Block* old = block_of(storage)) {
    std::memcpy(static_cast<Block*>(fresh.get_context())->segment.host, old->segment.host, storage.nbytes());
  }
  storage.unsafeGetStorageImpl()->set_data_ptr_noswap(std::move(fresh));
  storage.unsafeGetStorageImpl()->set_nbytes(bytes);
}

}  // namespace chipset_device
