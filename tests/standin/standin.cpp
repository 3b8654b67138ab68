// A pretended accelerator in host memory, for tests on machines without one: PyTorch's device type PrivateUse1.
//
// Whatever is computed on it is computed by the kernels of the CPU, on the same memory, so results are the CPU's. What it
// adds is what is particular to an accelerator: tensors and generators of another device are refused as on CUDA, and
// launches, copies and synchronizations are counted. It pretends to be two devices.

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/set_cpu_dispatch.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <chrono>
#include <cstdlib>
#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <unordered_map>
#include <vector>

namespace {

constexpr auto kDevice = c10::DeviceType::PrivateUse1;
constexpr c10::DeviceIndex kDevices = 2;
thread_local c10::DeviceIndex current_device = 0;

// ---------------------------------------------------------------- counts

std::mutex counts_mutex;
std::unordered_map<std::string, int64_t> counts;
std::string failing;  // the operator that raises a LinAlgError
bool narrow = false;  // whether there is no float64, as on Apple's

void count(const std::string& what, int64_t by = 1) {
  std::lock_guard<std::mutex> lock(counts_mutex);
  counts[what] += by;
}

void require_known(c10::ScalarType dtype) {
  TORCH_CHECK_TYPE(!narrow || dtype != at::kDouble, "Cannot convert a standin tensor to float64 dtype: it has none");
}

c10::Device checked(c10::Device device) {
  return c10::Device(kDevice, device.has_index() ? device.index() : current_device);
}

// ---------------------------------------------------------------- memory

struct Block {
  void* data;
  int64_t bytes;
  c10::DeviceIndex device;
};

int64_t allocated[kDevices] = {}, peak[kDevices] = {}, capacity = int64_t{1} << 40;

void release(void* context) {
  auto* block = static_cast<Block*>(context);
  {
    std::lock_guard<std::mutex> lock(counts_mutex);
    allocated[block->device] -= block->bytes;
  }
  std::free(block->data);
  delete block;
}

struct StandInAllocator final : c10::DeviceAllocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* data = bytes == 0 ? nullptr : std::aligned_alloc(64, (bytes + 63) / 64 * 64);
    auto* block = new Block{data, static_cast<int64_t>(bytes), current_device};
    {
      std::lock_guard<std::mutex> lock(counts_mutex);
      allocated[current_device] += block->bytes;
      peak[current_device] = std::max(peak[current_device], allocated[current_device]);
    }
    return {data, block, &release, c10::Device(kDevice, current_device)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
  bool initialized() override { return true; }
  void emptyCache(c10::MempoolId_t) override {}
  void recordStream(const c10::DataPtr&, c10::Stream) override {}
  c10::CachingDeviceAllocator::DeviceStats getDeviceStats(c10::DeviceIndex device) override {
    c10::CachingDeviceAllocator::DeviceStats stats;
    auto& bytes = stats.allocated_bytes[static_cast<size_t>(c10::CachingAllocator::StatType::AGGREGATE)];
    bytes.current = allocated[device];
    bytes.peak = peak[device];
    return stats;
  }
  std::pair<size_t, size_t> getMemoryInfo(c10::DeviceIndex device) override {
    return {static_cast<size_t>(std::max<int64_t>(0, capacity - allocated[device])), static_cast<size_t>(capacity)};
  }
  void resetAccumulatedStats(c10::DeviceIndex) override {}
  void resetPeakStats(c10::DeviceIndex device) override { peak[device] = allocated[device]; }
};

StandInAllocator allocator;
REGISTER_ALLOCATOR(kDevice, &allocator)

// ---------------------------------------------------------------- devices, events, generators

using Clock = std::chrono::steady_clock;

struct StandInGuard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return kDevice; }
  c10::Device exchangeDevice(c10::Device device) const override {
    auto before = getDevice();
    setDevice(device);
    return before;
  }
  c10::Device getDevice() const override { return {kDevice, current_device}; }
  void setDevice(c10::Device device) const override {
    TORCH_CHECK(device.index() < kDevices, "standin has ", int(kDevices), " devices");
    uncheckedSetDevice(device);
  }
  void uncheckedSetDevice(c10::Device device) const noexcept override {
    if (device.has_index()) current_device = device.index();
  }
  c10::Stream getStream(c10::Device device) const override { return c10::Stream(c10::Stream::DEFAULT, checked(device)); }
  c10::Stream getDefaultStream(c10::Device device) const override { return getStream(device); }
  c10::Stream getNewStream(c10::Device device, int) const override { return getStream(device); }
  c10::Stream exchangeStream(c10::Stream stream) const override { return stream; }
  c10::DeviceIndex deviceCount() const noexcept override { return kDevices; }
  void record(void** event, const c10::Stream&, c10::DeviceIndex, c10::EventFlag) const override {
    if (*event == nullptr) *event = new Clock::time_point();
    *static_cast<Clock::time_point*>(*event) = Clock::now();
  }
  void destroyEvent(void* event, c10::DeviceIndex) const noexcept override {
    delete static_cast<Clock::time_point*>(event);
  }
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override { count("synchronize"); }
  void synchronizeEvent(void*) const override { count("synchronize"); }
  void synchronizeDevice(c10::DeviceIndex) const override { count("synchronize"); }
  double elapsedTime(void* first, void* second, c10::DeviceIndex) const override {
    auto between = *static_cast<Clock::time_point*>(second) - *static_cast<Clock::time_point*>(first);
    return std::chrono::duration<double, std::milli>(between).count();
  }
};

C10_REGISTER_GUARD_IMPL(PrivateUse1, StandInGuard)

struct StandInGenerator final : c10::GeneratorImpl {
  explicit StandInGenerator(c10::DeviceIndex device, at::Generator numbers = at::detail::createCPUGenerator())
      : c10::GeneratorImpl({kDevice, device}, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1)),
        inner(std::move(numbers)) {}
  void set_current_seed(uint64_t seed) override { inner.set_current_seed(seed); }
  void set_offset(uint64_t offset) override { inner.set_offset(offset); }
  uint64_t get_offset() const override { return inner.get_offset(); }
  uint64_t current_seed() const override { return inner.current_seed(); }
  uint64_t seed() override { return inner.seed(); }
  void set_state(const c10::TensorImpl& state) override { inner.unsafeGetGeneratorImpl()->set_state(state); }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override { return inner.unsafeGetGeneratorImpl()->get_state(); }
  StandInGenerator* clone_impl() const override { return new StandInGenerator(device().index(), inner.clone()); }

  at::Generator inner;
};

at::Generator& default_generator(c10::DeviceIndex device) {
  static std::vector<at::Generator> all = {
      at::make_generator<StandInGenerator>(0), at::make_generator<StandInGenerator>(1)};
  return all.at(device < 0 ? current_device : device);
}

struct StandInHooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return kDevices; }
  c10::DeviceIndex getCurrentDevice() const override { return current_device; }
  void setCurrentDevice(c10::DeviceIndex device) const override { current_device = device; }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex device) const override { return std::exchange(current_device, device); }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex device) const override { return exchangeDevice(device); }
  at::Allocator* getPinnedMemoryAllocator() const override { return c10::GetAllocator(c10::DeviceType::CPU); }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex device) const override { return default_generator(device); }
  at::Generator getNewGenerator(c10::DeviceIndex device) const override {
    return at::make_generator<StandInGenerator>(device < 0 ? current_device : device);
  }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t bytes) const override {
    auto made = allocator.allocate(bytes);
    std::memcpy(made.get(), storage.data(), std::min(bytes, storage.nbytes()));
    storage.unsafeGetStorageImpl()->set_data_ptr(std::move(made));
    storage.unsafeGetStorageImpl()->set_nbytes(bytes);
  }
};

const bool registered = [] {
  at::RegisterPrivateUse1HooksInterface(new StandInHooks());
  return true;
}();

// ---------------------------------------------------------------- any operator, on the memory of the device

bool ours(const at::Tensor& tensor) {
  return tensor.defined() && tensor.device().type() == kDevice;
}

void describe(at::TensorImpl* to, const at::Tensor& like) {
  to->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
}

// The tensors of one call as tensors of the CPU in the same memory, and what comes of it back as the device's.
class Call {
 public:
  Call(const c10::OperatorHandle& op, torch::jit::Stack* stack) : schema(op.schema()), name(schema.name()) {
    auto arguments = torch::jit::last(stack, schema.arguments().size());
    given.assign(arguments.begin(), arguments.end());
    for (const auto& each : given) look(each);
    if (!device.has_value()) device = c10::Device(kDevice, current_device);
    for (size_t i = 0; i < given.size(); ++i) {
      (*stack)[stack->size() - given.size() + i] = on_host(given[i], schema.arguments()[i]);
    }
  }

  void finish(torch::jit::Stack* stack) {
    for (auto& [impl, mine] : written) follow(mine.first, mine.second);
    const auto& returns = schema.returns();
    bool view = !returns.empty();
    for (size_t i = 0; i < returns.size(); ++i) {
      auto& value = (*stack)[stack->size() - returns.size() + i];
      const auto* alias = returns[i].alias_info();
      if (alias != nullptr && alias->isWrite()) {
        view = false;
        value = argument_of(*alias);
      } else {
        value = on_device(value, view);
      }
    }
    if (!view) count(name);
    if (synchronizes()) count("synchronize");
  }

 private:
  const c10::FunctionSchema& schema;
  std::string name;
  std::vector<c10::IValue> given;
  std::optional<c10::Device> device;
  std::unordered_map<c10::StorageImpl*, c10::Storage> hosts;      // of storages on the device
  std::unordered_map<c10::StorageImpl*, c10::Storage> originals;  // and back
  std::unordered_map<c10::TensorImpl*, std::pair<at::Tensor, at::Tensor>> written;
  bool mask = false;  // among the indices of what is written

  void refuse(c10::Device other) const {
    TORCH_CHECK(false, "Expected all tensors to be on the same device, but found at least two devices, ", *device,
                " and ", other, "! (in ", name, ")");
  }

  // The device of the call: that of its tensors, else the one that is asked for.
  void look(const c10::IValue& value) {
    if (value.isTensor() && ours(value.toTensor())) {
      auto found = value.toTensor().device();
      if (!device.has_value() || *device == found) device = found; else refuse(found);
    } else if (value.isDevice() && value.toDevice().type() == kDevice && !device.has_value()) {
      device = checked(value.toDevice());
    } else if (value.isList()) {
      for (const c10::IValue& each : value.toListRef()) look(each);
    }
  }

  c10::IValue on_host(const c10::IValue& value, const c10::Argument& argument) {
    bool writes = argument.alias_info() != nullptr && argument.alias_info()->isWrite();
    if (value.isTensor()) return on_host(value.toTensor(), writes);
    if (value.isDevice()) return c10::Device(c10::DeviceType::CPU);
    if (value.isGenerator()) return numbers(value.toGenerator());
    if (value.isNone() && argument.type()->isSubtypeOf(*c10::OptionalType::create(c10::GeneratorType::get())) &&
        argument.type()->str().find("Generator") != std::string::npos) {
      return numbers(default_generator(device->index()));
    }
    if (value.isTensorList()) {
      c10::List<at::Tensor> made;
      for (const at::Tensor& each : value.toTensorVector()) made.push_back(on_host(each, writes));
      return made;
    }
    if (value.isOptionalTensorList()) {
      c10::List<std::optional<at::Tensor>> made;
      for (const std::optional<at::Tensor>& each : value.toOptionalTensorVector()) {
        bool given = each.has_value() && each->defined();
        mask = mask || (given && writes_to_first() && (each->scalar_type() == at::kBool || each->scalar_type() == at::kByte));
        made.push_back(given ? std::optional<at::Tensor>(on_host(*each, writes, /*indices=*/true)) : std::nullopt);
      }
      return made;
    }
    return value;
  }

  bool writes_to_first() const {
    const auto* alias = schema.arguments()[0].alias_info();
    return alias != nullptr && alias->isWrite();
  }

  c10::IValue numbers(const at::Generator& generator) const {
    TORCH_CHECK(generator.device() == *device, "Expected a '", *device, "' generator device but found '",
                generator.device(), "' (in ", name, ")");
    return static_cast<StandInGenerator*>(generator.unsafeGetGeneratorImpl())->inner;
  }

  at::Tensor on_host(const at::Tensor& tensor, bool writes, bool indices = false) {
    if (!tensor.defined()) return tensor;
    if (!ours(tensor)) {
      // As on CUDA, a number may lie on the CPU, and so may indices.
      bool allowed = tensor.dim() == 0 || indices;
      if (tensor.device().type() != c10::DeviceType::CPU || writes || !allowed) refuse(tensor.device());
      if (tensor.dim() > 0) count("copy to device");
      return tensor;
    }
    auto made = at::detail::make_tensor<c10::TensorImpl>(
        c10::Storage(host_of(tensor.storage())), c10::DispatchKeySet(c10::DispatchKey::CPU), tensor.dtype());
    describe(made.unsafeGetTensorImpl(), tensor);
    if (tensor.is_conj()) made._set_conj(true);
    if (tensor.is_neg()) made._set_neg(true);
    if (tensor.unsafeGetTensorImpl()->is_wrapped_number()) made.unsafeGetTensorImpl()->set_wrapped_number(true);
    if (writes) written.emplace(tensor.unsafeGetTensorImpl(), std::make_pair(tensor, made));
    return made;
  }

  c10::Storage host_of(const c10::Storage& storage) {
    auto& host = hosts[storage.unsafeGetStorageImpl()];
    if (!host) {
      c10::DataPtr same(storage.mutable_data(), c10::Device(c10::DeviceType::CPU));
      host = c10::Storage(c10::Storage::use_byte_size_t(), storage.nbytes(), std::move(same),
                          c10::GetAllocator(c10::DeviceType::CPU), /*resizable=*/true);
      originals[host.unsafeGetStorageImpl()] = storage;
    }
    return host;
  }

  // A tensor that was written to may have been given another size.
  static void follow(const at::Tensor& tensor, const at::Tensor& host) {
    auto* storage = tensor.storage().unsafeGetStorageImpl();
    if (host.storage().data() != storage->data() || host.storage().nbytes() != storage->nbytes()) {
      auto made = allocator.allocate(host.storage().nbytes());
      if (host.storage().nbytes() > 0) std::memcpy(made.get(), host.storage().data(), host.storage().nbytes());
      storage->set_data_ptr(std::move(made));
      storage->set_nbytes(host.storage().nbytes());
    }
    if (host.sizes() != tensor.sizes() || host.strides() != tensor.strides()) {
      describe(tensor.unsafeGetTensorImpl(), host);
    }
  }

  c10::IValue argument_of(const c10::AliasInfo& alias) const {
    for (size_t i = 0; i < given.size(); ++i) {
      const auto* own = schema.arguments()[i].alias_info();
      if (own != nullptr && own->isWrite() && own->beforeSets() == alias.beforeSets()) return given[i];
    }
    TORCH_CHECK(false, name, " returns what it was not given");
  }

  c10::IValue on_device(const c10::IValue& value, bool& view) {
    if (value.isTensor()) return on_device(value.toTensor(), view);
    if (value.isTensorList()) {
      c10::List<at::Tensor> made;
      for (const at::Tensor& each : value.toTensorVector()) made.push_back(on_device(each, view));
      return made;
    }
    view = false;
    return value;
  }

  at::Tensor on_device(const at::Tensor& tensor, bool& view) {
    if (!tensor.defined()) return tensor;
    require_known(tensor.scalar_type());
    auto known = originals.find(tensor.storage().unsafeGetStorageImpl());
    c10::Storage storage;
    if (known != originals.end()) {
      storage = known->second;
    } else {
      view = false;
      auto before = std::exchange(current_device, device->index());
      auto bytes = tensor.storage().nbytes();
      auto made = allocator.allocate(bytes);
      current_device = before;
      if (bytes > 0) std::memcpy(made.get(), tensor.storage().data(), bytes);
      storage = c10::Storage(c10::Storage::use_byte_size_t(), bytes, std::move(made), &allocator, true);
    }
    auto made = at::detail::make_tensor<c10::TensorImpl>(
        std::move(storage), c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), tensor.dtype());
    describe(made.unsafeGetTensorImpl(), tensor);
    if (tensor.is_conj()) made._set_conj(true);
    if (tensor.is_neg()) made._set_neg(true);
    if (tensor.unsafeGetTensorImpl()->is_wrapped_number()) made.unsafeGetTensorImpl()->set_wrapped_number(true);
    return made;
  }

  // Operators whose result's size depends on values, for which a kernel of CUDA waits.
  bool synchronizes() const {
    static const std::set<std::string> waiting = {
        "aten::nonzero", "aten::masked_select", "aten::equal", "aten::_unique", "aten::_unique2", "aten::unique_dim",
        "aten::unique_consecutive", "aten::bincount", "aten::linalg_eig", "aten::_linalg_eigvals"};
    return mask || waiting.count(name) > 0;
  }
};

void on_memory(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  if (!failing.empty() && op.schema().name() == failing) {
    TORCH_CHECK_LINALG(false, failing, ": The algorithm failed to converge because the input matrix is ill-conditioned");
  }
  at::AutoDispatchBelowADInplaceOrView plain;
  Call call(op, stack);
  op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
  call.finish(stack);
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&on_memory>());
}

// ---------------------------------------------------------------- what cannot be the kernel of the CPU

at::Tensor host_alias(const at::Tensor& tensor) {
  if (!ours(tensor)) return tensor;
  c10::DataPtr same(tensor.storage().mutable_data(), c10::Device(c10::DeviceType::CPU));
  c10::Storage storage(c10::Storage::use_byte_size_t(), tensor.storage().nbytes(), std::move(same), nullptr, false);
  auto made = at::detail::make_tensor<c10::TensorImpl>(
      std::move(storage), c10::DispatchKeySet(c10::DispatchKey::CPU), tensor.dtype());
  describe(made.unsafeGetTensorImpl(), tensor);
  if (tensor.is_conj()) made._set_conj(true);
  if (tensor.is_neg()) made._set_neg(true);
  return made;
}

// Empty memory on a device.
struct On {
  c10::DeviceIndex before;
  explicit On(c10::Device device) : before(std::exchange(current_device, checked(device).index())) {
    TORCH_CHECK(current_device < kDevices, "standin has ", int(kDevices), " devices");
  }
  ~On() { current_device = before; }
};

at::Tensor on_device(const at::Tensor& host, c10::Device device) {
  require_known(host.scalar_type());
  On here(device);
  at::Tensor made = at::detail::empty_strided_generic(
      host.sizes(), host.strides(), &allocator, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), host.scalar_type());
  host_alias(made).copy_(host);
  return made;
}

at::Tensor empty_memory_format(
    at::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
    std::optional<at::Device> device, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  require_known(c10::dtype_or_default(dtype));
  On here(device.value_or(c10::Device(kDevice, current_device)));
  return at::detail::empty_generic(size, &allocator, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                   c10::dtype_or_default(dtype), format);
}

at::Tensor empty_strided(
    at::IntArrayRef size, at::IntArrayRef stride, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
    std::optional<at::Device> device, std::optional<bool>) {
  require_known(c10::dtype_or_default(dtype));
  On here(device.value_or(c10::Device(kDevice, current_device)));
  return at::detail::empty_strided_generic(
      size, stride, &allocator, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), c10::dtype_or_default(dtype));
}

at::Tensor copy_from(const at::Tensor& from, const at::Tensor& to, bool) {
  at::AutoDispatchBelowADInplaceOrView plain;
  count(!ours(from) ? "copy to device" : !ours(to) ? "copy to host" : "aten::copy_");
  if (ours(from) != ours(to)) count(ours(to) ? "bytes to device" : "bytes to host", static_cast<int64_t>(to.nbytes()));
  host_alias(to).copy_(host_alias(from));
  return to;
}

at::Tensor copy_from_and_resize(const at::Tensor& from, const at::Tensor& to) {
  to.resize_(from.sizes());
  return copy_from(from, to, false);
}

at::Scalar local_scalar(const at::Tensor& tensor) {
  count("synchronize");
  count("item");
  return host_alias(tensor).item();
}

const at::Tensor& resize(const at::Tensor& tensor, at::IntArrayRef size, std::optional<at::MemoryFormat> format) {
  return at::native::resize_(tensor, size, format);
}

at::Tensor& set_storage(at::Tensor& tensor, at::Storage storage, int64_t offset, at::IntArrayRef size,
                        at::IntArrayRef stride) {
  return at::cpu::set_(tensor, std::move(storage), offset, size, stride);
}

at::Tensor& set_whole_storage(at::Tensor& tensor, at::Storage storage) {
  auto items = static_cast<int64_t>(storage.nbytes() / tensor.itemsize());
  return at::cpu::set_(tensor, std::move(storage), 0, {items}, {1});
}

at::Tensor& set_tensor(at::Tensor& tensor, const at::Tensor& like) {
  return at::cpu::set_(tensor, like.storage(), like.storage_offset(), like.sizes(), like.strides());
}

int64_t plain_attention(
    const at::Tensor&, const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&, double, bool,
    std::optional<double>, bool) {
  return 0;  // products and a softmax: the fused kernels are those of other devices
}

at::Tensor convolution(
    const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& bias, at::IntArrayRef stride,
    at::IntArrayRef padding, at::IntArrayRef dilation, bool transposed, at::IntArrayRef output_padding,
    int64_t groups) {
  at::AutoDispatchBelowADInplaceOrView plain;
  TORCH_CHECK(input.device() == weight.device() && (!bias || !bias->defined() || bias->device() == input.device()),
              "Expected all tensors to be on the same device, but found at least two devices, ", input.device(), " and ",
              weight.device(), "! (in a convolution)");
  count("aten::convolution");
  auto added = bias && bias->defined() ? std::optional<at::Tensor>(host_alias(*bias)) : std::nullopt;
  return on_device(at::convolution(host_alias(input), host_alias(weight), added, stride, padding, dilation, transposed,
                                   output_padding, groups),
                   input.device());
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> convolution_backward(
    const at::Tensor& gradient, const at::Tensor& input, const at::Tensor& weight, at::IntArrayRef stride,
    at::IntArrayRef padding, at::IntArrayRef dilation, bool transposed, at::IntArrayRef output_padding, int64_t groups,
    std::array<bool, 3> mask) {
  at::AutoDispatchBelowADInplaceOrView plain;
  count("aten::convolution_backward");
  int64_t channels = transposed ? weight.size(1) * groups : weight.size(0);
  auto [a, b, c] = at::convolution_backward(
      host_alias(gradient), host_alias(input), host_alias(weight), at::OptionalIntArrayRef(channels), stride, padding,
      dilation, transposed, output_padding, groups, mask);
  auto back = [&](const at::Tensor& each) { return each.defined() ? on_device(each, input.device()) : each; };
  return {back(a), back(b), back(c)};
}

// CUDA's histogram takes integers, the CPU's does not.
at::Tensor histogram(const at::Tensor& values, int64_t bins, const at::Scalar& least, const at::Scalar& most) {
  at::AutoDispatchBelowADInplaceOrView plain;
  count("aten::histc");
  return on_device(at::histc(host_alias(values).to(at::kDouble), bins, least, most).to(values.scalar_type()),
                   values.device());
}

// The fused cells of recurrent layers, as the operations that they fuse, so that gradients go through them.
std::tuple<at::Tensor, at::Tensor, at::Tensor> lstm_cell(
    const at::Tensor& input, const at::Tensor& hidden, const at::Tensor& state,
    const std::optional<at::Tensor>& input_bias, const std::optional<at::Tensor>& hidden_bias) {
  auto sums = input + hidden;
  if (input_bias && input_bias->defined()) sums = sums + *input_bias + *hidden_bias;
  auto gates = sums.chunk(4, 1);
  auto next = gates[1].sigmoid() * state + gates[0].sigmoid() * gates[2].tanh();
  return {gates[3].sigmoid() * next.tanh(), next, sums};
}

std::tuple<at::Tensor, at::Tensor> gru_cell(
    const at::Tensor& input, const at::Tensor& hidden, const at::Tensor& state,
    const std::optional<at::Tensor>& input_bias, const std::optional<at::Tensor>& hidden_bias) {
  bool biased = input_bias && input_bias->defined();
  auto ours = (biased ? input + *input_bias : input).chunk(3, 1);
  auto theirs = (biased ? hidden + *hidden_bias : hidden).chunk(3, 1);
  auto reset = (ours[0] + theirs[0]).sigmoid();
  auto update = (ours[1] + theirs[1]).sigmoid();
  auto fresh = (ours[2] + reset * theirs[2]).tanh();
  return {(state - fresh) * update + fresh, fresh};
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", &empty_memory_format);
  m.impl("empty_strided", &empty_strided);
  m.impl("_copy_from", &copy_from);
  m.impl("_copy_from_and_resize", &copy_from_and_resize);
  m.impl("_local_scalar_dense", &local_scalar);
  m.impl("resize_", &resize);
  m.impl("set_.source_Storage", &set_whole_storage);
  m.impl("set_.source_Tensor", &set_tensor);
  m.impl("set_.source_Storage_storage_offset", &set_storage);
  m.impl("_fused_sdp_choice", &plain_attention);
  m.impl("convolution_overrideable", &convolution);
  m.impl("convolution_backward_overrideable", &convolution_backward);
  m.impl("histc", &histogram);
  m.impl("_thnn_fused_lstm_cell", &lstm_cell);
  m.impl("_thnn_fused_gru_cell", &gru_cell);
}

TORCH_LIBRARY_IMPL(aten, AutogradPrivateUse1, m) {
  m.impl("_thnn_fused_lstm_cell", &lstm_cell);
  m.impl("_thnn_fused_gru_cell", &gru_cell);
}

// ---------------------------------------------------------------- for the tests

TORCH_LIBRARY(standin, m) {
  m.def("counts() -> Dict(str, int)", [] {
    std::lock_guard<std::mutex> lock(counts_mutex);
    c10::Dict<std::string, int64_t> found;
    for (const auto& [what, times] : counts) found.insert(what, times);
    return found;
  });
  m.def("seed(int seed) -> ()", [](int64_t seed) {
    for (c10::DeviceIndex i = 0; i < kDevices; ++i) default_generator(i).set_current_seed(static_cast<uint64_t>(seed));
  });
  m.def("rng_state(int device) -> Tensor", [](int64_t device) {
    return default_generator(static_cast<c10::DeviceIndex>(device)).get_state();
  });
  m.def("set_rng_state(Tensor state, int device) -> ()", [](const at::Tensor& state, int64_t device) {
    default_generator(static_cast<c10::DeviceIndex>(device)).set_state(state);
  });
  m.def("capacity(int bytes) -> ()", [](int64_t bytes) { capacity = bytes; });
  m.def("narrow(bool without) -> ()", [](bool without) { narrow = without; });
  m.def("fail(str operator) -> ()", [](const std::string& name) { failing = name; });
}

}  // namespace
