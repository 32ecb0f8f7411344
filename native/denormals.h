// Denormal numbers count as zero in products of bf16 and in attention: they take a hundred times as long as others on
// some processors, matrix tiles know nothing else, and nothing is that small there on purpose. int8 is scaled with them,
// since all its levels give the bits of the definition; float32 rows are left alone.
#pragma once

#if defined(__SSE2__)
#include <xmmintrin.h>
#endif

namespace octavo {

// For the thread that makes it, until it goes.
class FlushDenormals {
public:
#if defined(__SSE2__)
    explicit FlushDenormals(bool on = true) : before_(_mm_getcsr()) {
        if (on) _mm_setcsr(before_ | 0x8040u);  // results, operands
    }
    ~FlushDenormals() { _mm_setcsr(before_); }
#else
    explicit FlushDenormals(bool = true) {}
    ~FlushDenormals() {}
#endif
    FlushDenormals(const FlushDenormals&) = delete;
    FlushDenormals& operator=(const FlushDenormals&) = delete;

private:
    [[maybe_unused]] unsigned before_ = 0;
};

}  // namespace octavo
