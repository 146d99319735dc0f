// The products of panels.hpp on the matrix unit of Intel's processors (AMX): 16 rows of W by 16 rows of x and 32 columns in
// an instruction. A row of a panel is a row of a tile as it stands, and so are the words of a slice of x. Of each pair of
// columns the unit sums the even and the odd ones apart, 16 pairs at a time, and adds both to what was there. Few rows of
// x meet a bitmask without panels (matrix_few.hpp, matrix_codes.hpp).
#if defined(__x86_64__)
#include "matrix.hpp"

#if defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

// Tiles 0 to 3: sums, of 64 rows of W and 16 of x; 4 and 5: of W, in turn; 6: of x.
struct Matrix : Tiles {
    using Number = uint16_t;
    static constexpr int64_t DEPTH = 2;
    static constexpr int64_t BLOCK = 256;  // 64 rows of so many, and 16 of x, stay in the first cache
    static constexpr int64_t PANEL = 512;
    static constexpr int64_t FEWEST = 64;
    static constexpr int64_t FEW = 4;
    static constexpr int64_t BANDS = 4;
    static constexpr int64_t SLICE = 1;
    static constexpr bool FETCHES = false;
    static constexpr int64_t STEPS = 16;  // that an instruction takes

    TARGET void meet(const Number* w, int64_t rows, const uint32_t* x, int64_t, int64_t steps, float* sums, int64_t,
                     const uint8_t* const*) const {
        for (int64_t r = 0; r < rows; r += FEWEST) meet(w + r * BLOCK, x, steps, sums + r * LANES);
    }
    TARGET void meet(const Number* w, const uint32_t* x, int64_t steps, float* sums) const {
        constexpr int64_t of_w = BLOCK * sizeof *w, of_x = 64, of_sums = 64;  // bytes from row to row
        load<0>(sums, of_sums);
        load<1>(sums + 16 * LANES, of_sums);
        load<2>(sums + 32 * LANES, of_sums);
        load<3>(sums + 48 * LANES, of_sums);
        for (int64_t s = 0; s < steps; s += STEPS, w += STEPS * DEPTH, x += STEPS * LANES) {
            load<6>(x, of_x);
            load<4>(w, of_w);
            add<0, 4, 6>();
            load<5>(w + 16 * BLOCK, of_w);
            add<1, 5, 6>();
            load<4>(w + 32 * BLOCK, of_w);
            add<2, 4, 6>();
            load<5>(w + 48 * BLOCK, of_w);
            add<3, 5, 6>();
        }
        store<0>(sums, of_sums);
        store<1>(sums + 16 * LANES, of_sums);
        store<2>(sums + 32 * LANES, of_sums);
        store<3>(sums + 48 * LANES, of_sums);
    }
};

}  // namespace

#include "matrix_few.hpp"
#include "matrix_codes.hpp"

#define FEW_OR_TILES(NAME, KIND, FITS, FEW)                                                                            \
    extern "C" void tiles_##NAME##_matrix(const Weight* weight, const uint16_t* x, int64_t batch, char* y,             \
                                          int64_t rounded, int64_t threads) {                                          \
        (FITS ? FEW : multiply<Matrix, Sparse<Matrix, KIND>>)(*weight, x, batch, y, rounded, threads);                 \
    }
FEW_OR_TILES(bfloat16, BFloat16, batch <= REGISTERS * LANES, multiply_few)
FEW_OR_TILES(int8, Int8, for_codes(*weight, batch), multiply_codes<Int8>)
FEW_OR_TILES(int4, Int4, for_codes(*weight, batch), multiply_codes<Int4>)
TILES(dense_bfloat16, matrix, Matrix, Dense, BFloat16)

// Whether the processor has the unit, and the system lets this process use it, which must be asked for.
extern "C" int has_matrix() {
#if defined(__linux__)
    constexpr unsigned int UNIT = 1u << 22 | 1u << 24 | 1u << 25, STATES = 3u << 17;  // bfloat16, tiles, bytes
    constexpr long REQUEST = 0x1023, TILE_DATA = 18;
    unsigned int a, b, c, d, enabled, high;
    if (!__builtin_cpu_supports("avx512bf16") || !__builtin_cpu_supports("avx512vbmi2")) return 0;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & UNIT) != UNIT) return 0;
    asm volatile("xgetbv" : "=a"(enabled), "=d"(high) : "c"(0));
    return (enabled & STATES) == STATES && syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
#else
    return 0;
#endif
}
#endif
