// The products of panels.hpp in registers: 16 rows of x in each, and every weight broadcast to them. Numbers of bfloat16 are
// multiplied in pairs where the processor can (Pairs), all others as float32 (Singles).
#if defined(__x86_64__)
#include "panels.hpp"

namespace {

constexpr int64_t PACE = 16;  // steps in which a line of each row is fetched for the next block

// Adds some columns of R rows of a panel times V registers of rows of x.
template <typename Unit, int R, int V>
TARGET void tile(const typename Unit::Number* w, const uint32_t* x, int64_t steps, float* sums, int64_t apart,
                 const uint8_t* const* ahead) {
    __m512 of[R][V];
#pragma GCC unroll 32
    for (int i = 0; i < R * V; ++i) of[i / V][i % V] = _mm512_setzero_ps();
    for (int64_t s = 0; s < steps; ++s, x += V * LANES) {
        if (ahead && s % PACE == 0)
#pragma GCC unroll 24
            for (int r = 0; r < R; ++r)
                _mm_prefetch(reinterpret_cast<const char*>(ahead[r] + s * (64 / PACE)), _MM_HINT_T1);
        __m512i here[V];
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) here[v] = _mm512_load_si512(x + v * LANES);
#pragma GCC unroll 24
        for (int r = 0; r < R; ++r) {
            const __m512i all = _mm512_set1_epi32(reinterpret_cast<const int32_t*>(w + r * Unit::BLOCK)[s]);
#pragma GCC unroll 4
            for (int v = 0; v < V; ++v) of[r][v] = Unit::add(of[r][v], all, here[v]);
        }
    }
#pragma GCC unroll 32
    for (int i = 0; i < R * V; ++i) {
        float* to = sums + i % V * apart + i / V * LANES;
        _mm512_store_ps(to, _mm512_add_ps(_mm512_load_ps(to), of[i / V][i % V]));
    }
}

template <typename Unit, int R, int V>
TARGET void tiles(const typename Unit::Number* w, int64_t rows, const uint32_t* x, int64_t steps, float* sums,
                  int64_t apart, const uint8_t* const* ahead) {
    for (int64_t r = 0; r < rows; r += R)
        tile<Unit, R, V>(w + r * Unit::BLOCK, x, steps, sums + r * LANES, apart, ahead ? ahead + r : nullptr);
}

template <typename Unit> struct Registers {
    static constexpr int64_t BLOCK = 256;  // a slice of x of so many columns fills most of the first cache
    static constexpr int64_t PANEL = 192;  // a multiple of all numbers of rows below
    static constexpr int64_t FEWEST = 24;
    static constexpr int64_t FEW = 0;
    static constexpr int64_t BANDS = 2;
    static constexpr int64_t SLICE = 4;
    static constexpr bool FETCHES = true;
    template <typename Number>
    TARGET void meet(const Number* w, int64_t rows, const uint32_t* x, int64_t width, int64_t steps, float* sums,
                     int64_t apart, const uint8_t* const* ahead) const {
        switch (width) {
            case 1: tiles<Unit, 24, 1>(w, rows, x, steps, sums, apart, ahead); break;
            case 2: tiles<Unit, 12, 2>(w, rows, x, steps, sums, apart, ahead); break;
            case 3: tiles<Unit, 8, 3>(w, rows, x, steps, sums, apart, ahead); break;
            default: tiles<Unit, 4, 4>(w, rows, x, steps, sums, apart, ahead);
        }
    }
};

struct Pairs : Registers<Pairs> {
    using Number = uint16_t;
    static constexpr int64_t DEPTH = 2;
    INLINE __m512 add(__m512 sum, __m512i w, __m512i x) {
        // Written out, so that the rest can be compiled for processors that have all but this instruction.
        asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(x), "v"(w));
        return sum;
    }
};

struct Singles : Registers<Singles> {
    using Number = float;
    static constexpr int64_t DEPTH = 1;
    INLINE __m512 add(__m512 sum, __m512i w, __m512i x) {
        return _mm512_fmadd_ps(_mm512_castsi512_ps(w), _mm512_castsi512_ps(x), sum);
    }
};

}  // namespace

#define SINGLES(NAME, KIND) TILES(NAME, singles, Singles, Sparse, KIND)
SINGLES(float32, Float32)
SINGLES(float16, Float16)
SINGLES(bfloat16, BFloat16)
SINGLES(int8, Int8)
SINGLES(int4, Int4)
TILES(bfloat16, pairs, Pairs, Sparse, BFloat16)
TILES(int8, pairs, Pairs, Sparse, Int8)
TILES(int4, pairs, Pairs, Sparse, Int4)
TILES(dense_float32, singles, Singles, Dense, Float32)
TILES(dense_float16, singles, Singles, Dense, Float16)
TILES(dense_bfloat16, singles, Singles, Dense, BFloat16)
TILES(dense_bfloat16, pairs, Pairs, Dense, BFloat16)

extern "C" int has_singles() { return has_all(); }
extern "C" int has_pairs() { return has_all() && __builtin_cpu_supports("avx512bf16"); }
#endif
