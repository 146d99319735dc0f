// The matrix unit of Intel's processors (AMX): its instructions, and how a bitmask is read that few rows of x meet.
//
// An instruction multiplies 16 rows of W by 16 rows of x, and 64 bytes of each: of bfloat16, it sums the even and the odd
// columns apart, 16 pairs at a time, and adds both to what was there; of codes, it adds whole numbers.
#include "panels.hpp"

namespace {

// The unit's instructions on its tiles, of which there are eight; `apart`: bytes from row to row in memory.
template <int TILE> INLINE void load(const void* at, int64_t apart) {
    asm volatile("tileloadd (%1,%2,1), %%tmm%c0" ::"n"(TILE), "r"(at), "r"(apart) : "memory");
}
template <int TILE> INLINE void store(void* at, int64_t apart) {
    asm volatile("tilestored %%tmm%c0, (%1,%2,1)" ::"n"(TILE), "r"(at), "r"(apart) : "memory");
}
template <int TILE> INLINE void clear() { asm volatile("tilezero %%tmm%c0" ::"n"(TILE)); }
template <int SUM, int W, int X> INLINE void add() {  // numbers of bfloat16
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"n"(SUM), "n"(W), "n"(X));
}
template <int SUM, int W, int X> INLINE void add_codes() {  // bytes of W without sign, of x with one
    asm volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"n"(SUM), "n"(W), "n"(X));
}

// While it lives, this thread has eight tiles of 16 rows of 64 bytes.
struct Tiles {
    Tiles() {
        alignas(64) uint8_t shape[64] = {1};
        for (int i = 0; i < 8; ++i) shape[16 + 2 * i] = 64, shape[48 + i] = 16;
        asm volatile("ldtilecfg %0" ::"m"(shape));
    }
    ~Tiles() { asm volatile("tilerelease"); }
    Tiles(const Tiles&) = delete;
    Tiles& operator=(const Tiles&) = delete;
};


constexpr int64_t SOON = 1536;    // bytes that are fetched before they are met, to the first cache
constexpr int64_t REGISTERS = 4;  // of 16 rows of x, at most
typedef uint8_t Tile[16][64];

// Four bands that are read at once, from as many places, as memory gives more then.
template <typename Kind> struct Places {
    int64_t first, apart, last;  // band of the first place, bands from place to place, the last band that counts
    const typename Kind::Word* masks[ROWS];
    const uint8_t* values[ROWS];

    TARGET Places(const Weight& weight, int64_t first, int64_t apart, int64_t last)
        : first(first), apart(apart), last(last) {
        const int64_t chunks = (weight.columns + Kind::LENGTH - 1) / Kind::LENGTH;
        for (int64_t b = 0; b < ROWS; ++b) {
            masks[b] = static_cast<const typename Kind::Word*>(weight.masks) + band(b) * chunks * ROWS;
            values[b] = weight.values + weight.offsets[band(b)];
        }
    }
    int64_t band(int64_t b) const { return std::min(first + b * apart, last); }
    // Calls `put` with the mask and the values of the next run of each of 16 rows.
    template <typename Put> TARGET inline void step(Put put) {
#pragma GCC unroll 4
        for (int b = 0; b < ROWS; ++b) _mm_prefetch(reinterpret_cast<const char*>(masks[b]) + SOON / 4, _MM_HINT_T0);
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
            for (int b = 0; b < ROWS; ++b) {
                _mm_prefetch(reinterpret_cast<const char*>(values[b] + SOON), _MM_HINT_T0);
                const uint64_t mask = *masks[b]++;
                put(ROWS * b + r, mask, values[b]);
                values[b] += Kind::size(mask);
            }
    }
    // Writes the sums of 16 rows of W and those of x from n on.
    TARGET void write(const Weight& weight, const float (&sums)[16][LANES], int64_t n, int64_t batch, char* y,
                      bool rounded) const {
        __m512i part[16];
        for (int i = 0; i < 16; ++i) part[i] = _mm512_castps_si512(_mm512_load_ps(sums[i]));
        transpose(part);
        for (int64_t i = 0; i < std::min(LANES, batch - n); ++i)
            for (int64_t b = 0; b < ROWS && first + b * apart <= last; ++b) {
                const int64_t row = ROWS * band(b), at = (n + i) * weight.rows + row - ROWS * b;
                const auto which = __mmask16(0xf << ROWS * b) & inside(ROWS * b + weight.rows - row);
                if (rounded)
                    put(reinterpret_cast<uint16_t*>(y) + at, _mm512_castsi512_ps(part[i]), which);
                else
                    _mm512_mask_storeu_epi32(reinterpret_cast<float*>(y) + at, which, part[i]);
            }
    }
};

}  // namespace
