// Where one piece of scratch memory ends. A thread's scratch is one allocation, so AddressSanitizer would not see a piece
// overflow into the next; its build leaves gaps between pieces and forbids them. In every other build this is nothing.
#pragma once
#include <stddef.h>
#include <stdint.h>
#ifdef REGROW_SANITIZE_ADDRESS
#include <sanitizer/asan_interface.h>
#endif

namespace {

#ifdef REGROW_SANITIZE_ADDRESS
constexpr size_t kGap = 64;  // floats between two pieces, at least
inline void fence(float* piece, size_t used, size_t room) {
    __asan_unpoison_memory_region(piece, used * sizeof(float));
    __asan_poison_memory_region(piece + used, (room - used) * sizeof(float));
}
#else
constexpr size_t kGap = 0;
// The piece has `room`, of which `used` may be touched.
inline void fence(float*, size_t, size_t) {}
#endif
// n pieces, one behind the other.
inline void fence_each(float* pieces, int n, size_t used, size_t room) {
    for (int i = 0; i < n; ++i) fence(pieces + i * room, used, room);
}

// Scratch memory, handed out piece by piece; without memory the pieces are only counted.
struct ScratchPieces {
    float* memory;
    int64_t floats = 0;  // of all pieces so far
    explicit ScratchPieces(float* begin) : memory(begin) {}
    float* take(int64_t n) {
        const int64_t room = (n + 15) / 16 * 16 + kGap;
        float* piece = memory ? memory + floats : nullptr;
        if (piece) fence(piece, n, room);
        floats += room;
        return piece;
    }
};

}  // namespace
