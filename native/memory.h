// Memory straight from the operating system: zeroed, page-aligned, resident only once touched.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <utility>

#include "error.h"

namespace octavo {

class Mapping {
public:
    Mapping() = default;
    Mapping(size_t bytes, bool huge_pages) : size_(bytes) {
        if (bytes == 0) return;
        int flags = MAP_PRIVATE | MAP_ANONYMOUS;
#ifdef MAP_NORESERVE
        flags |= MAP_NORESERVE;
#endif
        data_ = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, flags, -1, 0);
        if (data_ == MAP_FAILED) {
            data_ = nullptr;
            throw Error{OCTAVO_OUT_OF_MEMORY, "cannot reserve " + std::to_string(bytes) + " bytes"};
        }
#ifdef MADV_HUGEPAGE
        if (huge_pages) madvise(data_, bytes, MADV_HUGEPAGE);
#else
        (void)huge_pages;
#endif
    }
    Mapping(Mapping&& other) noexcept { swap(other); }
    Mapping& operator=(Mapping&& other) noexcept {
        swap(other);
        return *this;
    }
    ~Mapping() {
        if (data_ != nullptr) munmap(data_, size_);
    }

    template <class T>
    T* as() const {
        return static_cast<T*>(data_);
    }
    size_t size() const { return size_; }

private:
    void swap(Mapping& other) {
        std::swap(data_, other.data_);
        std::swap(size_, other.size_);
    }

    void* data_ = nullptr;
    size_t size_ = 0;
};

}  // namespace octavo
