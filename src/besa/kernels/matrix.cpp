// The products of panels.hpp on the matrix unit of Intel's processors (AMX): 16 rows of W by 16 rows of x and 32 columns in
// an instruction. A row of a panel is a row of a tile as it stands, and so are the words of a slice of x. Of each pair of
// columns the unit sums the even and the odd ones apart, 16 pairs at a time, and adds both to what was there. Few rows of
// x meet a bitmask of bfloat16 without panels.
#if defined(__x86_64__)
#include "panels.hpp"

#if defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

// The unit's instructions on its tiles, of which there are eight; `apart`: bytes from row to row in memory.
template <int TILE> INLINE void load(const void* at, int64_t apart) {
    asm volatile("tileloadd (%1,%2,1), %%tmm%c0" ::"n"(TILE), "r"(at), "r"(apart) : "memory");
}
template <int TILE> INLINE void store(void* at, int64_t apart) {
    asm volatile("tilestored %%tmm%c0, (%1,%2,1)" ::"n"(TILE), "r"(at), "r"(apart) : "memory");
}
template <int TILE> INLINE void clear() { asm volatile("tilezero %%tmm%c0" ::"n"(TILE)); }
template <int SUM, int W, int X> INLINE void add() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"n"(SUM), "n"(W), "n"(X));
}

// Tiles 0 to 3: sums, of 64 rows of W and 16 of x; 4 and 5: of W, in turn; 6: of x.
struct Matrix {
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

    Matrix() {  // all tiles are of 16 rows of 64 bytes
        alignas(64) uint8_t shape[64] = {1};
        for (int i = 0; i < 8; ++i) shape[16 + 2 * i] = 64, shape[48 + i] = 16;
        asm volatile("ldtilecfg %0" ::"m"(shape));
    }
    ~Matrix() { asm volatile("tilerelease"); }
    Matrix(const Matrix&) = delete;
    Matrix& operator=(const Matrix&) = delete;

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

// Few rows of x. Four bands are read at once, from as many places, as memory gives more then. A step of them, 32 columns of
// 16 rows, is written to a tile in the first cache, and multiplied two steps later: what was just written cannot be loaded
// at once.

constexpr int64_t AHEAD = 1536;   // bytes that are fetched before they are met, to the first cache
constexpr int64_t REGISTERS = 4;  // of 16 rows of x, at most
typedef uint8_t Tile[16][64];

struct Places {
    const uint32_t* masks[ROWS];
    const uint8_t* values[ROWS];

    TARGET Places(const Weight& weight, int64_t first, int64_t apart, int64_t last) {
        for (int64_t b = 0; b < ROWS; ++b) {
            const int64_t band = std::min(first + b * apart, last), chunks = (weight.columns + 31) / 32;
            masks[b] = static_cast<const uint32_t*>(weight.masks) + band * chunks * ROWS;
            values[b] = weight.values + weight.offsets[band];
        }
    }
    TARGET inline void step(Tile& tile) {
#pragma GCC unroll 4
        for (int b = 0; b < ROWS; ++b) _mm_prefetch(reinterpret_cast<const char*>(masks[b]) + AHEAD / 4, _MM_HINT_T0);
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
            for (int b = 0; b < ROWS; ++b) {
                _mm_prefetch(reinterpret_cast<const char*>(values[b] + AHEAD), _MM_HINT_T0);
                const uint64_t mask = *masks[b]++;
                _mm512_store_si512(tile[ROWS * b + r], BFloat16::expand(mask, values[b]));
                values[b] += BFloat16::size(mask);
            }
    }
};

// Adds the products of a step and R registers of x.
template <int R> INLINE void multiplied(const Tile& tile, const uint32_t* x, int64_t apart) {
    load<4>(tile, 64);
    load<5>(x, 64);
    add<0, 4, 5>();
    if constexpr (R > 1) load<6>(x + apart, 64), add<1, 4, 6>();
    if constexpr (R > 2) load<5>(x + 2 * apart, 64), add<2, 4, 5>();
    if constexpr (R > 3) load<6>(x + 3 * apart, 64), add<3, 4, 6>();
}

// Some bands times R registers of x. Products are added in the order of panels.
template <int R>
TARGET void few(const Weight& weight, const Columns<Matrix>& x, char* y, bool rounded, int64_t first, int64_t last) {
    const Matrix unit;
    alignas(64) Tile tiles[4];
    alignas(64) uint32_t sums[REGISTERS][16][LANES];
    const int64_t steps = (weight.columns + 31) / 32, count = (last - first + ROWS - 1) / ROWS, apart = x.steps * LANES;
    for (int64_t band = first; band < first + count; ++band) {
        Places places(weight, band, count, last - 1);
        clear<0>(), clear<1>(), clear<2>(), clear<3>();
        for (int64_t s = 0; s < steps + 2; ++s) {
            if (s < steps) places.step(tiles[s % 4]);
            if (s >= 2) multiplied<R>(tiles[(s - 2) % 4], x.words + (s - 2) * 16 * LANES, apart);
        }
        store<0>(sums[0], 64), store<1>(sums[1], 64), store<2>(sums[2], 64), store<3>(sums[3], 64);
        for (int r = 0; r < R; ++r) {
            __m512i part[16];
            for (int i = 0; i < 16; ++i) part[i] = _mm512_load_si512(sums[r][i]);
            transpose(part);
            for (int64_t i = 0; i < std::min(LANES, x.batch - r * LANES); ++i)
                for (int64_t b = 0; b < ROWS && band + b * count < last; ++b) {
                    const int64_t row = ROWS * (band + b * count), at = (r * LANES + i) * weight.rows + row - ROWS * b;
                    const auto which = __mmask16(0xf << ROWS * b) & inside(ROWS * b + weight.rows - row);
                    if (rounded)
                        put(reinterpret_cast<uint16_t*>(y) + at, _mm512_castsi512_ps(part[i]), which);
                    else
                        _mm512_mask_storeu_epi32(reinterpret_cast<float*>(y) + at, which, part[i]);
                }
        }
    }
}

void multiply_few(const Weight& weight, const uint16_t* x, int64_t batch, char* y, bool rounded, int64_t threads) {
    Columns<Matrix> laid(batch, weight.columns);
    const auto work = laid.registers == 1   ? few<1>
                      : laid.registers == 2 ? few<2>
                      : laid.registers == 3 ? few<3>
                                            : few<4>;
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static) collapse(2)
        for (int64_t r = 0; r < laid.registers; ++r)
            for (int64_t step = 0; step < laid.steps; step += 16) laid.lay(x, weight.columns, r, step);
#pragma omp for schedule(static)
        for (int64_t part = 0; part < threads; ++part)
            work(weight, laid, y, rounded, first_band<uint32_t>(weight, part, threads),
                 first_band<uint32_t>(weight, part + 1, threads));
    }
}

}  // namespace

extern "C" void tiles_bfloat16_matrix(const Weight* weight, const uint16_t* x, int64_t batch, char* y, int64_t rounded,
                                      int64_t threads) {
    const auto all = batch <= REGISTERS * LANES ? multiply_few : multiply<Matrix, Sparse<Matrix, BFloat16>>;
    all(*weight, x, batch, y, rounded, threads);
}
TILES(int8, matrix, Matrix, Sparse, Int8)
TILES(int4, matrix, Matrix, Sparse, Int4)
TILES(dense_bfloat16, matrix, Matrix, Dense, BFloat16)

// Whether the processor has the unit, and the system lets this process use it, which must be asked for.
extern "C" int has_matrix() {
#if defined(__linux__)
    constexpr unsigned int BF16 = 1u << 22, TILE = 1u << 24, STATES = 3u << 17;
    constexpr long REQUEST = 0x1023, TILE_DATA = 18;
    unsigned int a, b, c, d, enabled, high;
    if (!__builtin_cpu_supports("avx512bf16") || !__builtin_cpu_supports("avx512vbmi2")) return 0;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & BF16) || !(d & TILE)) return 0;
    asm volatile("xgetbv" : "=a"(enabled), "=d"(high) : "c"(0));
    return (enabled & STATES) == STATES && syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
#else
    return 0;
#endif
}
#endif
