// Zeroed memory in huge pages where the system has them.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstring>
#include <memory>
#include <new>
#include <utility>

namespace tokenmill {

// Owns an anonymous mapping, all zeros at first. Starts on a boundary of 2 MiB if it is that large, else of a page.
// Throws std::bad_alloc where the system has no memory left.
class Memory {
  public:
    Memory() = default;

    explicit Memory(std::size_t bytes) : size_(bytes) {
        if (bytes == 0) {
            return;
        }
#ifdef __SANITIZE_ADDRESS__
        // The sanitizer watches the bounds of what the allocator gave, not those of mappings.
        data_ = base_ = static_cast<char *>(::operator new(bytes, ALIGNMENT));
        std::memset(data_, 0, bytes);
        return;
#endif
        mapped_ = bytes < HUGE_PAGE ? bytes : bytes + HUGE_PAGE;
        void *address = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (address == MAP_FAILED) {
            throw std::bad_alloc();
        }
        base_ = static_cast<char *>(address);
        data_ = base_;
        if (bytes >= HUGE_PAGE) {
            const auto offset = reinterpret_cast<std::size_t>(base_) % HUGE_PAGE;
            data_ = offset == 0 ? base_ : base_ + (HUGE_PAGE - offset);
#ifdef MADV_HUGEPAGE
            madvise(data_, bytes, MADV_HUGEPAGE);  // a wish: small pages do as well
#endif
        }
    }

    Memory(Memory &&other) noexcept { swap(other); }
    Memory &operator=(Memory &&other) noexcept {
        swap(other);
        return *this;
    }
    Memory(const Memory &) = delete;
    Memory &operator=(const Memory &) = delete;

    ~Memory() {
#ifdef __SANITIZE_ADDRESS__
        ::operator delete(base_, ALIGNMENT);
        return;
#endif
        if (base_ != nullptr) {
            munmap(base_, mapped_);
        }
    }

    template <typename T>
    T *as() const {
        return reinterpret_cast<T *>(data_);
    }
    std::size_t size() const { return size_; }

  private:
    static constexpr std::size_t HUGE_PAGE = std::size_t{1} << 21;
    [[maybe_unused]] static constexpr std::align_val_t ALIGNMENT{64};

    void swap(Memory &other) noexcept {
        std::swap(base_, other.base_);
        std::swap(data_, other.data_);
        std::swap(size_, other.size_);
        std::swap(mapped_, other.mapped_);
    }

    char *base_ = nullptr;
    char *data_ = nullptr;
    std::size_t size_ = 0;
    std::size_t mapped_ = 0;
};

// Memory that many weights share, so that small ones lie in huge pages too. Hands out zeroed pieces, each on a cache line
// of its own, which keep their memory alive.
class Arena {
  public:
    struct Piece {
        std::shared_ptr<Memory> memory;
        char *data = nullptr;
        std::size_t bytes = 0;
    };

    // Throws std::bad_alloc.
    Piece take(std::size_t bytes) {
#ifdef __SANITIZE_ADDRESS__
        constexpr bool apart = true;  // so that the sanitizer sees where each ends
#else
        const bool apart = bytes > CHUNK / 2;
#endif
        if (apart) {
            auto memory = std::make_shared<Memory>(bytes);
            return {memory, memory->as<char>(), bytes};
        }
        if (chunk_ == nullptr || used_ + bytes > chunk_->size()) {
            chunk_ = std::make_shared<Memory>(CHUNK);
            used_ = 0;
        }
        const Piece piece{chunk_, chunk_->as<char>() + used_, bytes};
        used_ += (bytes + LINE - 1) / LINE * LINE;
        return piece;
    }

  private:
    static constexpr std::size_t CHUNK = std::size_t{64} << 20;
    static constexpr std::size_t LINE = 64;

    std::shared_ptr<Memory> chunk_;
    std::size_t used_ = 0;
};

}  // namespace tokenmill
