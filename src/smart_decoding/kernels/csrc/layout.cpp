// What this compiler made of abi.h's structures, for Python to compare (abi.py).

#include <cstddef>
#include <string>

#include "abi.h"

static std::string describe() {
    std::string text;
#define STRUCT(S) text += #S " " + std::to_string(sizeof(S)) + ":";
#define FIELD(S, F) text += " " #F " " + std::to_string(offsetof(S, F));
#define END text += "\n";
#include "layout.inc"
#undef STRUCT
#undef FIELD
#undef END
    return text;
}

extern "C" const char* smart_layout() {
    static const std::string text = describe();
    return text.c_str();
}
