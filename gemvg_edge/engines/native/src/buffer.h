// Memory on cache lines that only grows: what a request took is there for the next.
#pragma once
#include <cstdlib>
#include <cstring>
#include <new>
#include <utility>

#include <sys/mman.h>

// Large blocks start on a large page and ask for such: rows of a matrix lie in pages of their own otherwise, and looking
// these up takes longer than the arithmetic.
constexpr size_t LARGE_PAGE = 1 << 21;

template <class T>
class Buffer {
  public:
    Buffer() = default;
    explicit Buffer(size_t count) { need(count); }
    Buffer(Buffer&& other) noexcept { *this = std::move(other); }
    Buffer& operator=(Buffer&& other) noexcept {
        std::swap(at_, other.at_), std::swap(count_, other.count_);
        return *this;
    }
    ~Buffer() { std::free(at_); }

    // At least so many; what was there is lost if there were fewer.
    T* need(size_t count) {
        if (count > count_) {
            std::free(at_);
            at_ = nullptr, count_ = 0;
            const size_t wanted = count * sizeof(T) + 64;  // a vector past the last may be read
            const size_t page = wanted < LARGE_PAGE ? 64 : LARGE_PAGE;
            const size_t bytes = (wanted + page - 1) / page * page;
            at_ = (T*)std::aligned_alloc(page, bytes);
            if (!at_) throw std::bad_alloc();
            if (page == LARGE_PAGE) madvise(at_, bytes, MADV_HUGEPAGE);
            count_ = count;
        }
        return at_;
    }
    T* zeros(size_t count) {
        std::memset((void*)need(count), 0, count * sizeof(T));
        return at_;
    }
    T* get() const { return at_; }
    size_t bytes() const { return count_ * sizeof(T); }

  private:
    T* at_ = nullptr;
    size_t count_ = 0;
};
