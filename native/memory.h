// Memory straight from the operating system: zeroed, page-aligned, resident only once touched.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <utility>
#include <vector>

#include "error.h"
#include "kernels.h"

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

// Hands out pieces of large mappings, so that small weights too lie on huge pages.
class Arena {
public:
    void* take(size_t bytes) {
        bytes = round_up(bytes, 64);
        if (bytes > left_) {
            const size_t chunk = round_up(bytes > kChunk ? bytes : kChunk, kHugePage);
            chunks_.emplace_back(chunk + kHugePage, true);
            const size_t address = reinterpret_cast<size_t>(chunks_.back().as<char>());
            next_ = chunks_.back().as<char>() + (round_up(address, kHugePage) - address);
            left_ = chunk;
        }
        void* piece = next_;
        next_ += bytes;
        left_ -= bytes;
        return piece;
    }

private:
    static constexpr size_t kHugePage = size_t{2} << 20, kChunk = size_t{64} << 20;

    std::vector<Mapping> chunks_;
    char* next_ = nullptr;
    size_t left_ = 0;
};

}  // namespace octavo
