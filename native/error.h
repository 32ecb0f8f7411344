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

}  // namespace octavo
