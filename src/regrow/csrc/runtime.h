// What the files of the module share: addresses, errors, the instruction set in use, scratch memory and threads.
#pragma once
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>
#include <string>
#include <vector>
#if defined(REGROW_SANITIZE_THREAD)
#include <thread>
#elif defined(_OPENMP)
#include <omp.h>
#endif

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "fence.h"
#include "table.h"

namespace nb = nanobind;
using namespace nb::literals;

using Address = uintptr_t;
template <class T>
T* at(Address address) {
    return reinterpret_cast<T*>(address);
}

[[noreturn]] inline void fail(const std::string& message) { throw nb::value_error(message.c_str()); }

inline const KernelTable* g_table = &kGenericTable;  // the instruction set in use

// ---- scratch and threads ----------------------------------------------------------------------

// Memory kept by a calling thread between calls. It only grows, up to what its largest call needed: a copy
// of the weight's blocks (spmm; transposed, with an index for each) or two (sddmm), and per thread the panels of one
// tile, in the transposed product an index for every block column, and for single elements the ends of rows in chunks,
// rounded up to 2 MB.
class Scratch {
  public:
    ~Scratch() { std::free(data_); }
    float* reserve(size_t floats) {
        if (floats > size_) {
            std::free(data_);
            data_ = nullptr;
            size_ = 0;
            const size_t bytes = (floats * sizeof(float) + kHugePage - 1) / kHugePage * kHugePage;
            data_ = static_cast<float*>(std::aligned_alloc(kHugePage, bytes));
            if (!data_) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
            // A tile is read block by block, in no order: with small pages it outgrows the first-level TLB.
            madvise(data_, bytes, MADV_HUGEPAGE);
#endif
            size_ = bytes / sizeof(float);
        }
        fence(data_, floats, size_);
        return data_;
    }

  private:
    static constexpr size_t kHugePage = 2 << 20;
    float* data_ = nullptr;
    size_t size_ = 0;
};
inline thread_local Scratch t_scratch;

inline size_t padded(size_t floats) { return (floats + kGap + 1023) / 1024 * 1024; }  // whole pages: no false sharing

// f(part) for part in [0, n). The split depends on n alone, so results do not depend on how many threads
// come. With n == 1 OpenMP is never entered, which keeps a forked child of a threaded parent safe.
template <class F>
void parallel(int n, F&& f) {
#if defined(REGROW_SANITIZE_THREAD)
    // ThreadSanitizer does not see how libgomp's threads wait for each other, and would call that a race. Of these it
    // sees everything. A thread for every part: each order that OpenMP may choose is possible here.
    if (n > 1) {
        std::vector<std::thread> others;
        for (int part = 1; part < n; ++part) others.emplace_back([&f, part] { f(part); });
        f(0);
        for (std::thread& other : others) other.join();
        return;
    }
#elif defined(_OPENMP)
    if (n > 1) {
#pragma omp parallel num_threads(n)
        for (int part = omp_get_thread_num(); part < n; part += omp_get_num_threads()) f(part);
        return;
    }
#endif
    for (int part = 0; part < n; ++part) f(part);
}

inline int64_t cut(int64_t total, int part, int parts) { return total * part / parts; }
