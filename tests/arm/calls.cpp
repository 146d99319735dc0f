// Runs kernels on another processor than the tests: reads calls from standard input, writes what they give to standard
// output. test_sparse_on_arm.py writes the calls and compares the results.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "sparse.hpp"

using Expand = void(const Weight*, int64_t, int64_t, char*, int64_t);

#define KIND(NAME, PATH)                        \
    extern "C" Multiply multiply_##NAME##_##PATH; \
    extern "C" Expand expand_##NAME##_##PATH;
#define PATH(PATH)                                                                                           \
    extern "C" int has_##PATH();                                                                             \
    KIND(float32, PATH) KIND(bfloat16, PATH) KIND(float16, PATH) KIND(int8, PATH) KIND(int4, PATH)
PATH(plain)
PATH(neon)
PATH(neondot)
PATH(neonbf16)

struct Kernel {
    const char* name;
    Multiply* multiply;
    Expand* expand;
};
#define ENTRY(NAME, PATH) {#NAME "_" #PATH, multiply_##NAME##_##PATH, expand_##NAME##_##PATH},
#define ENTRIES(PATH) \
    ENTRY(float32, PATH) ENTRY(bfloat16, PATH) ENTRY(float16, PATH) ENTRY(int8, PATH) ENTRY(int4, PATH)
const Kernel KERNELS[] = {ENTRIES(plain) ENTRIES(neon) ENTRIES(neondot) ENTRIES(neonbf16)};

struct Call {
    char name[32];
    int64_t rows, columns, scale_type, groups, zero, batch, threads, first, last;
    int64_t masks, values, offsets, scales, zeros;  // bytes that follow, as do the rows of x
};

// So many bytes in memory of their own, whose end qemu or a sanitizer may watch.
std::vector<char> taken(size_t bytes) {
    std::vector<char> result(bytes);
    if (std::fread(result.data(), 1, bytes, stdin) != bytes) std::exit(2);
    return result;
}

int main() {
    std::printf("%d%d%d%d", has_plain(), has_neon(), has_neondot(), has_neonbf16());
    for (Call call; std::fread(&call, sizeof call, 1, stdin) == 1;) {
        const auto masks = taken(size_t(call.masks)), values = taken(size_t(call.values));
        const auto offsets = taken(size_t(call.offsets)), scales = taken(size_t(call.scales));
        const auto zeros = taken(size_t(call.zeros)), x = taken(size_t(call.batch * call.columns) * sizeof(float));
        const Weight weight{masks.data(),
                            reinterpret_cast<const uint8_t*>(values.data()),
                            reinterpret_cast<const int64_t*>(offsets.data()),
                            call.rows,
                            call.columns,
                            scales.empty() ? nullptr : scales.data(),
                            zeros.empty() ? nullptr : reinterpret_cast<const uint8_t*>(zeros.data()),
                            call.scale_type,
                            call.groups,
                            call.zero,
                            0,
                            0};
        for (const Kernel& kernel : KERNELS) {
            if (std::strcmp(kernel.name, call.name)) continue;
            std::vector<float> y(size_t(call.batch * call.rows));
            kernel.multiply(&weight, reinterpret_cast<const float*>(x.data()), call.batch, y.data(), call.threads);
            std::fwrite(y.data(), sizeof(float), y.size(), stdout);
            const int64_t size = std::strstr(call.name, "int") ? 1 : std::strstr(call.name, "32") ? 4 : 2;
            const int64_t rows = std::min(ROWS * call.last, call.rows) - ROWS * call.first;
            std::vector<char> dense(size_t(rows * call.columns * size));
            kernel.expand(&weight, call.first, call.last, dense.data(), call.threads);
            std::fwrite(dense.data(), 1, dense.size(), stdout);
        }
    }
}
