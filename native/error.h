// Failures inside the library: thrown as Error, turned into a code and a message at the ABI (engine.cpp).
#pragma once

#include <cstdarg>
#include <cstdio>
#include <string>

#include "abi.h"

namespace octavo {

struct Error {
    OctavoCode code;
    std::string message;
};

[[noreturn, gnu::format(printf, 1, 2)]] inline void refuse(const char* format, ...) {
    char text[512];
    va_list args;
    va_start(args, format);
    std::vsnprintf(text, sizeof text, format, args);
    va_end(args);
    throw Error{OCTAVO_INVALID, text};
}

// a * b elements of `what`, which must be positive and far from overflow.
inline size_t checked_size(int64_t a, int64_t b, const char* what) {
    constexpr int64_t most = int64_t{1} << 48;  // beyond any address space
    if (a <= 0 || b <= 0 || a > most / b) refuse("%s of %lld x %lld", what, (long long)a, (long long)b);
    return static_cast<size_t>(a) * static_cast<size_t>(b);
}

}  // namespace octavo
