// Memory of large CPU tensors: what is freed is kept and given out again, and never more is mapped than was once alive.
//
// glibc 2.36 cannot give a freed place to an aligned tensor of the same size once a small allocation has taken the
// splinter beside it, so a heap grows to 1.1 to 1.5 times what is alive, by luck; mapping every tensor anew instead
// costs a page fault for each 4 kB of each of them. Here freed neighbours become one place again, and a block is cut
// from the smallest place that is enough: micro-batches differ in size, and so would blocks that fit only as a whole.
// If none is enough, freed places are unmapped until the new block has room below the most that was ever alive.
// New blocks lie one behind the other in ranges of addresses, so that the weights of a model share large pages: where
// each is mapped for itself its ends lie in small ones, and all of it where it is smaller than a large page.

#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <malloc.h>
#include <pthread.h>
#include <sys/mman.h>

#include <cstring>
#include <iterator>
#include <map>
#include <mutex>
#include <set>
#include <unordered_map>
#include <utility>

namespace {

constexpr size_t kLarge = size_t(1) << 17;  // smaller ones are left to torch's own allocator
constexpr size_t kGrain = size_t(1) << 12;
constexpr size_t kRange = size_t(1) << 26;  // addresses that are taken at once

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
    shrink(0);
  }

  std::mutex& lock() { return lock_; }

 private:
  void* take(size_t size) {
    std::lock_guard<std::mutex> guard(lock_);
    char* place = cut(size);
    if (place == nullptr) place = grow(size);
    if (place == nullptr) return nullptr;
    sizes_.emplace(place, size);
    alive_ += size;
    most_ = std::max(most_, alive_);
    return place;
  }

  // The front of the smallest freed place that is enough, or null.
  char* cut(size_t size) {
    auto found = by_size_.lower_bound({size, nullptr});
    if (found == by_size_.end()) return nullptr;
    auto [whole, place] = *found;
    forget(place, whole);
    if (whole > size) keep(place + size, whole - size);
    return place;
  }

  // New memory, once as much as needed is given back for it.
  char* grow(size_t size) {
    most_ = std::max(most_, alive_ + size);
    shrink(most_ - size);
    char* place = map(size);
    if (place != nullptr) return place;
    shrink(0);
    return map(size);
  }

  // Unmaps freed places, largest first, until no more than `most` is mapped, or nothing is left to unmap.
  void shrink(size_t most) {
    while (alive_ + kept_ > most && !by_size_.empty()) {
      auto [whole, place] = *std::prev(by_size_.end());
      const size_t excess = std::min(whole, alive_ + kept_ - most);
      forget(place, whole);
      munmap(place + whole - excess, excess);
      if (whole > excess) keep(place, whole - excess);
    }
  }

  // Notes a freed place.
  void keep(char* place, size_t size) {
    by_place_.emplace(place, size);
    by_size_.emplace(size, place);
    kept_ += size;
  }

  void forget(char* place, size_t size) {
    by_place_.erase(place);
    by_size_.erase({size, place});
    kept_ -= size;
  }

  // Notes a freed place as one with the freed places beside it.
  void join(char* place, size_t size) {
    auto after = by_place_.lower_bound(place);
    if (after != by_place_.end() && place + size == after->first) {
      const size_t more = after->second;
      forget(after->first, more);
      size += more;
    }
    auto before = by_place_.lower_bound(place);
    if (before != by_place_.begin() && (--before)->first + before->second == place) {
      const size_t more = before->second;
      place = before->first;
      forget(place, more);
      size += more;
    }
    keep(place, size);
  }

  // New memory, behind what was mapped last while there are addresses left; pages take memory once they are used.
  char* map(size_t size) {
    if (size > left_ && size < kRange) {
      if (left_ > 0) munmap(front_, left_);
      front_ = addresses(kRange);
      left_ = front_ == nullptr ? 0 : kRange;
    }
    if (size > left_) return addresses(size);
    char* place = front_;
    front_ += size;
    left_ -= size;
    return place;
  }

  static char* addresses(size_t size) {
    void* place = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (place == MAP_FAILED) return nullptr;
    madvise(place, size, MADV_HUGEPAGE);  // fewer faults where the system allows it, and no harm where not
    return static_cast<char*>(place);
  }

  static void free(void* place);

  c10::Allocator* small_;
  std::mutex lock_;
  std::map<char*, size_t> by_place_;            // freed places, none beside another
  std::set<std::pair<size_t, char*>> by_size_;  // the same ones
  std::unordered_map<void*, size_t> sizes_;
  size_t alive_ = 0, kept_ = 0, most_ = 0;
  char* front_ = nullptr;  // addresses that no block has had yet
  size_t left_ = 0;
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
      the_pool->join(static_cast<char*>(place), size);
      c10::profiledCPUMemoryReporter().Delete(place);
      return;
    }
  }
  if (place != nullptr) the_pool->small_->raw_deleter()(place);
}

}  // namespace

extern "C" void pool_install() {
#ifdef __GLIBC__
  malloc_trim(0);  // what was freed before, as the weights that were packed, would stay with the heap
  // Set, it stays: glibc would raise it whenever a larger piece is freed, and the scratch of kernels would then lie
  // among what is small and long-lived, and leave holes there.
  mallopt(M_MMAP_THRESHOLD, kLarge);
#endif
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
