// Denormal numbers count as zero in matrix products and attention: they take a hundred times as long as others on some
// processors, matrix tiles know nothing else, and nothing is that small there on purpose.
#pragma once

#if defined(__SSE2__)
#include <xmmintrin.h>
#endif

namespace octavo {

// For the thread that makes it, until it goes.
class FlushDenormals {
public:
#if defined(__SSE2__)
    FlushDenormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ | 0x8040u); }  // results, operands
    ~FlushDenormals() { _mm_setcsr(before_); }
#else
    FlushDenormals() {}
    ~FlushDenormals() {}
#endif
    FlushDenormals(const FlushDenormals&) = delete;
    FlushDenormals& operator=(const FlushDenormals&) = delete;

private:
    [[maybe_unused]] unsigned before_ = 0;
};

}  // namespace octavo
