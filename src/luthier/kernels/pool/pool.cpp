// Memory of large CPU tensors: what is freed is kept and given out again, and never more is mapped than was once alive.
//
// glibc 2.36 cannot give a freed place to an aligned tensor of the same size once a small allocation has taken the
// splinter beside it, so a heap grows to 1.1 to 1.5 times what is alive, by luck; mapping every tensor anew instead
// costs a page fault for each 4 kB of each of them. Here a block comes from the freed ones if one fits to an eighth.
// If none does, freed blocks are unmapped until the new one has room below the most that was ever alive.

#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <pthread.h>
#include <sys/mman.h>

#include <cstring>
#include <iterator>
#include <map>
#include <mutex>
#include <unordered_map>

namespace {

constexpr size_t kLarge = size_t(1) << 17;  // smaller ones are left to torch's own allocator
constexpr size_t kGrain = size_t(1) << 12;

class Pool final : public c10::Allocator {
 public:
  explicit Pool(c10::Allocator* small) : small_(small) {}

  c10::DataPtr allocate(size_t bytes) override {
    if (bytes < kLarge) return small_->allocate(bytes);
    void* place = take((bytes + kGrain - 1) / kGrain * kGrain);
    TORCH_CHECK(place != nullptr, "DefaultCPUAllocator: can't allocate memory: you tried to allocate ", bytes, " bytes.");
    c10::profiledCPUMemoryReporter().New(place, bytes);
    return {place, place, &free, c10::Device(c10::DeviceType::CPU)};
  }

  c10::DeleterFnPtr raw_deleter() const override { return &free; }

  void copy_data(void* to, const void* from, size_t count) const override { std::memcpy(to, from, count); }

  // Unmaps what nobody holds, and forgets how much was once alive.
  void release() {
    std::lock_guard<std::mutex> guard(lock_);
    most_ = alive_;
    shrink();
  }

  std::mutex& lock() { return lock_; }

 private:
  void* take(size_t size) {
    std::lock_guard<std::mutex> guard(lock_);
    auto found = freed_.lower_bound(size);
    if (found != freed_.end() && found->first <= size + size / 8) {
      auto [whole, place] = *found;
      freed_.erase(found);
      kept_ -= whole;
      hold(place, whole);
      return place;
    }
    most_ = std::max(most_, alive_ + size);
    alive_ += size;
    shrink();
    alive_ -= size;
    void* place = map(size);
    if (place == nullptr) {
      while (!freed_.empty()) unmap(std::prev(freed_.end()));
      place = map(size);
    }
    if (place != nullptr) hold(place, size);
    return place;
  }

  void hold(void* place, size_t size) {
    sizes_.emplace(place, size);
    alive_ += size;
    most_ = std::max(most_, alive_);
  }

  // The smallest freed block that is enough, else the largest, until no more is mapped than was once alive.
  void shrink() {
    while (alive_ + kept_ > most_ && !freed_.empty()) {
      auto enough = freed_.lower_bound(alive_ + kept_ - most_);
      unmap(enough == freed_.end() ? std::prev(enough) : enough);
    }
  }

  void unmap(std::multimap<size_t, void*>::iterator block) {
    munmap(block->second, block->first);
    kept_ -= block->first;
    freed_.erase(block);
  }

  static void* map(size_t size) {
    void* place = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (place == MAP_FAILED) return nullptr;
    madvise(place, size, MADV_HUGEPAGE);  // fewer faults where the system allows it, and no harm where not
    return place;
  }

  static void free(void* place);

  c10::Allocator* small_;
  std::mutex lock_;
  std::multimap<size_t, void*> freed_;
  std::unordered_map<void*, size_t> sizes_;
  size_t alive_ = 0, kept_ = 0, most_ = 0;
};

Pool* the_pool = nullptr;  // never deleted: tensors outlive every order of destruction at exit

void Pool::free(void* place) {
  {
    std::lock_guard<std::mutex> guard(the_pool->lock_);
    auto found = the_pool->sizes_.find(place);
    if (found != the_pool->sizes_.end()) {
      const size_t size = found->second;
      the_pool->sizes_.erase(found);
      the_pool->alive_ -= size;
      the_pool->kept_ += size;
      the_pool->freed_.emplace(size, place);
      c10::profiledCPUMemoryReporter().Delete(place);
      return;
    }
  }
  if (place != nullptr) the_pool->small_->raw_deleter()(place);
}

}  // namespace

extern "C" void pool_install() {
  if (the_pool != nullptr) return;
  the_pool = new Pool(c10::GetCPUAllocator());
  // A child that is forked while another thread allocates must not wait for that thread, which it does not have.
  pthread_atfork([] { the_pool->lock().lock(); }, [] { the_pool->lock().unlock(); },
                 [] { the_pool->lock().unlock(); });
  c10::SetCPUAllocator(the_pool, 255);
}

extern "C" void pool_release() {
  if (the_pool != nullptr) the_pool->release();
}
