// y = x Wᵀ for a bitmask weight, and such weights made dense; docs/formats.md says how one lies in memory.
//
// The kernels in plain C++, for processors without AVX-512 (sparse_avx512.cpp), AVX2 (sparse_avx2.cpp) and NEON
// (sparse_neon.cpp): some columns of a band are expanded into the first cache, where all rows of x meet them.
#include <type_traits>

#include "sparse.hpp"

#define FLAT __attribute__((flatten))

namespace {

constexpr int64_t TILE = 1024;  // columns expanded at a time
typedef float Lanes __attribute__((vector_size(32)));
constexpr int64_t LANES = 8;

// Kinds of weights. Raw: a value as it is stored, or a code in a byte.
struct Float32 {
    using Raw = uint32_t;
    using Word = uint16_t;
    static float wide(Raw raw) { return bits_as_float(raw); }
};
struct BFloat16 {
    using Raw = uint16_t;
    using Word = uint32_t;
    static float wide(Raw raw) { return from_bfloat16(raw); }
};
struct Float16 {
    using Raw = uint16_t;
    using Word = uint32_t;
    static float wide(Raw raw) { return from_float16(raw); }
};
struct Int8 {
    using Raw = uint8_t;
    using Word = uint64_t;
    static float wide(Raw raw) { return float(raw); }
};
struct Int4 : Int8 {};

template <typename Kind> constexpr int64_t LENGTH = 8 * sizeof(typename Kind::Word);
template <typename Kind> constexpr bool HALVES = std::is_same_v<Kind, Int4>;
template <typename Kind> constexpr bool CODES = sizeof(typename Kind::Raw) == 1;

template <typename Kind> struct Tile {
    typename Kind::Raw of[ROWS][TILE];
};

// Writes what some chunks of a band keep to their places in a tile; gives where the next run begins.
template <typename Kind>
const uint8_t* spread(const typename Kind::Word* masks, const uint8_t* at, int64_t chunks, Tile<Kind>& tile) {
    constexpr int64_t size = sizeof(typename Kind::Raw);
    for (int64_t run = 0; run < chunks * ROWS; ++run) {
        typename Kind::Raw* out = tile.of[run % ROWS] + run / ROWS * LENGTH<Kind>;
        int64_t kept = 0;
        for (uint64_t mask = masks[run]; mask; mask &= mask - 1, ++kept) {
            const int place = __builtin_ctzll(mask);
            if constexpr (HALVES<Kind>)
                out[place] = at[kept / 2] >> (kept % 2 * 4) & 15;
            else
                std::memcpy(out + place, at + kept * size, size_t(size));
        }
        at += HALVES<Kind> ? (kept + 1) / 2 : kept * size;
    }
    return at;
}

// A band, whose columns are expanded a tile at a time.
template <typename Kind> struct Band {
    const Weight& weight;
    int64_t first, rows, chunks;  // its first row, its number of rows, the chunks of a row
    const typename Kind::Word* masks;
    const uint8_t* values;

    Band(const Weight& weight, int64_t band) : weight(weight), first(ROWS * band) {
        rows = std::min(ROWS, weight.rows - first);
        chunks = (weight.columns + LENGTH<Kind> - 1) / LENGTH<Kind>;
        masks = static_cast<const typename Kind::Word*>(weight.masks) + band * chunks * ROWS;
        values = weight.values + weight.offsets[band];
    }
    int64_t group(int64_t column) const { return column * weight.groups / weight.columns; }
    int64_t end_of(int64_t group) const { return (group + 1) * (weight.columns / weight.groups); }
    int zero(int64_t r, int64_t g) const { return zero_of(weight, (first + r) * weight.groups + g); }
    float step(int64_t r, int64_t g) const { return step_of(weight, (first + r) * weight.groups + g); }

    // The next columns, from `left` on, as they are stored; tiles come in order.
    void next(int64_t left, int64_t right, Tile<Kind>& tile) {
        for (int64_t r = 0; r < ROWS; ++r) {
            std::memset(tile.of[r], 0, sizeof tile.of[r]);
            if constexpr (CODES<Kind>)
                for (int64_t at = left; r < rows && at < right;) {
                    const int64_t end = std::min(right, end_of(group(at)));
                    std::memset(tile.of[r] + at - left, zero(r, group(at)), size_t(end - at));
                    at = end;
                }
        }
        const int64_t begin = left / LENGTH<Kind>, end = std::min(chunks, (left + TILE) / LENGTH<Kind>);
        values = spread(masks + begin * ROWS, values, end - begin, tile);
    }
    // The same columns as numbers; those beyond the row are zero.
    void widen(int64_t left, int64_t right, const Tile<Kind>& tile, float (*out)[TILE]) const {
        for (int64_t r = 0; r < ROWS; ++r) {
            for (int64_t i = 0; i < TILE; ++i) out[r][i] = Kind::wide(tile.of[r][i]);
            if constexpr (CODES<Kind>)
                for (int64_t at = left; r < rows && at < right;) {
                    const int64_t end = std::min(right, end_of(group(at)));
                    const float lowered = float(zero(r, group(at))), times = step(r, group(at));
                    for (int64_t i = at - left; i < end - left; ++i) out[r][i] = (out[r][i] - lowered) * times;
                    at = end;
                }
        }
    }
};

// Adds the products of a tile of a band and a row of x.
inline void add(const float (*w)[TILE], const float* x, int64_t columns, float* sums) {
    Lanes totals[ROWS] = {}, of_w, of_x;
    for (int64_t i = 0; i < columns; i += LANES) {
        std::memcpy(&of_x, x + i, sizeof of_x);
        for (int64_t r = 0; r < ROWS; ++r) {
            std::memcpy(&of_w, w[r] + i, sizeof of_w);
            totals[r] += of_w * of_x;
        }
    }
    for (int64_t r = 0; r < ROWS; ++r)
        for (int64_t lane = 0; lane < LANES; ++lane) sums[r] += totals[r][lane];
}

// Some bands times rows of x that are `stride` apart, with zeros after their columns.
template <typename Kind>
FLAT void multiplied(const Weight& weight, const float* x, int64_t stride, int64_t batch, float* y, int64_t first,
                     int64_t last) {
    Tile<Kind> tile;
    float numbers[ROWS][TILE];
    std::vector<float> sums(static_cast<size_t>(batch * ROWS));
    for (int64_t index = first; index < last; ++index) {
        Band<Kind> band(weight, index);
        std::fill(sums.begin(), sums.end(), 0.0f);
        for (int64_t left = 0; left < weight.columns; left += TILE) {
            const int64_t right = std::min(weight.columns, left + TILE);
            band.next(left, right, tile);
            band.widen(left, right, tile, numbers);
            for (int64_t n = 0; n < batch; ++n)
                add(numbers, x + n * stride + left, right - left, &sums[size_t(n * ROWS)]);
        }
        for (int64_t n = 0; n < batch; ++n)
            std::copy_n(&sums[size_t(n * ROWS)], band.rows, y + n * weight.rows + band.first);
    }
}

// A band dense, as values or as codes; `out` is where the first row of all would be.
template <typename Kind> FLAT void expanded(const Weight& weight, char* out, int64_t index) {
    constexpr int64_t size = sizeof(typename Kind::Raw);
    Tile<Kind> tile;
    Band<Kind> band(weight, index);
    for (int64_t left = 0; left < weight.columns; left += TILE) {
        const int64_t right = std::min(weight.columns, left + TILE);
        band.next(left, right, tile);
        for (int64_t r = 0; r < band.rows; ++r) {
            char* to = out + ((band.first + r) * weight.columns + left) * size;
            std::memcpy(to, tile.of[r], size_t((right - left) * size));
        }
    }
}

template <typename Kind> void multiply(const Weight& weight, const float* x, int64_t batch, float* y, int64_t threads) {
    const int64_t stride = (weight.columns + LANES - 1) / LANES * LANES;
    std::vector<float> padded(static_cast<size_t>(batch * stride));
    for (int64_t n = 0; n < batch; ++n)
        std::copy_n(x + n * weight.columns, weight.columns, &padded[size_t(n * stride)]);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t part = 0; part < threads; ++part)
        multiplied<Kind>(weight, padded.data(), stride, batch, y, first_band<typename Kind::Word>(weight, part, threads),
                         first_band<typename Kind::Word>(weight, part + 1, threads));
}

template <typename Kind> void expand(const Weight& weight, int64_t first, int64_t last, char* out, int64_t threads) {
    (void)threads;  // without OpenMP
    out -= ROWS * first * weight.columns * int64_t(sizeof(typename Kind::Raw));
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t band = first; band < last; ++band) expanded<Kind>(weight, out, band);
}

}  // namespace

CALLS(float32, plain, Float32)
CALLS(bfloat16, plain, BFloat16)
CALLS(float16, plain, Float16)
CALLS(int8, plain, Int8)
CALLS(int4, plain, Int4)

// Whether the processor can run this path.
extern "C" int has_plain() { return 1; }
