// Workspace memory that a thread keeps between calls, since large blocks are costly to allocate
// anew.

#pragma once
#include <cstdint>
#include <vector>

namespace [[gnu::visibility("hidden")]] smart {

class WorkspaceMemory {
public:
    // Anew, with room for as many floats; each `take` may add up to 15.
    void begin(size_t floats) {
        if (block.size() < floats) block = std::vector<float>(floats + floats / 4);
        used = 0;
    }

    template <class T>
    T* take(int64_t count) {
        T* p = (T*)(block.data() + used);
        used += (count * sizeof(T) + 63) / 64 * 16;
        return p;
    }

private:
    std::vector<float> block;
    size_t used = 0;
};

}  // namespace smart
