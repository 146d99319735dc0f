// y = x Wᵀ for many rows of x, W a bitmask (docs/formats.md) or dense: what kernels for processors with AVX-512 share.
//
// The rows of x lie side by side, 16 of them in a register, and all of them meet a weight. So a weight is read as it stands
// in its row, and what is unpacked need not be transposed: some columns of a panel of rows are unpacked into the second
// cache, where all rows of x meet them. x is laid out once for all panels.
//
// How they meet is a Unit's, which lives while a thread is at work. It says what a Number is, how many columns a step
// multiplies (DEPTH), and what is unpacked at a time: how many columns (BLOCK), rows (a PANEL, in multiples of FEWEST; for up
// to FEW registers of x, FEWEST) and BANDS in turn. Its `meet` adds the products of some rows of a panel and a SLICE of so
// many registers of x to sums; those of a register lie row by row, and of the next register `apart` numbers later.
//
// What the next block reads of a weight is fetched meanwhile, a bit at a time, as all at once would stop everything else: by
// `meet`, if it FETCHES (from `ahead`, which is none where that is done), or while a block is unpacked.
#include <memory>

#include "avx512.hpp"

namespace {

constexpr int64_t LANES = 16;  // rows of x in a register
constexpr int64_t PASS = 512;  // rows of x for which a panel is unpacked once

// Memory of a thread for a USE, kept for the next call: new pages of the system cost more than what is done here.
enum Use { OF_X, UNPACKED, SUMS };
template <Use USE> void* kept(size_t bytes) {
    thread_local std::unique_ptr<void, decltype(&std::free)> memory(nullptr, std::free);
    thread_local size_t size = 0;
    if (bytes > size) {
        memory.reset();
        memory.reset(std::aligned_alloc(64, (bytes + 63) / 64 * 64));
        size = bytes;
    }
    return memory.get();
}

INLINE __m256i rounded(__m512 w) {  // to bfloat16
    __m256i halves;
    asm("vcvtneps2bf16 %1, %0" : "=v"(halves) : "v"(w));
    return halves;
}

// Writes 16 columns, or 32, to a row of a panel.
INLINE void put(float* to, __m512 w) { _mm512_storeu_ps(to, w); }
INLINE void put(uint16_t* to, __m512 w, __mmask16 kept = 0xffff) {
    _mm256_mask_storeu_epi16(to, kept, rounded(w));
}

// What a kind of weight is: how a run becomes a chunk of numbers. A run is expanded to a vector, and that widened.

struct Float32 {
    using Word = uint16_t;
    static constexpr bool CODES = false, STORED = true;
    static constexpr int64_t LENGTH = 16, SIZE = 64;  // columns of a chunk, its bytes when dense
    INLINE int64_t size(uint64_t mask) { return 4 * _mm_popcnt_u64(mask); }
    INLINE __m512i expand(uint64_t mask, const uint8_t* at) {
        return _mm512_mask_expand_epi32(fresh(), __mmask16(mask), loaded(at));
    }
    INLINE void widen(float* to, __m512i w) { _mm512_storeu_si512(to, w); }
};

struct Half {
    using Word = uint32_t;
    static constexpr bool CODES = false, STORED = true;
    static constexpr int64_t LENGTH = 32, SIZE = 64;
    INLINE int64_t size(uint64_t mask) { return 2 * _mm_popcnt_u64(mask); }
    INLINE __m512i expand(uint64_t mask, const uint8_t* at) {
        return _mm512_mask_expand_epi16(fresh(), __mmask32(mask), loaded(at));
    }
};

struct Float16 : Half {
    INLINE void widen(float* to, __m512i w) {
        _mm512_storeu_ps(to, _mm512_cvtph_ps(_mm512_castsi512_si256(w)));
        _mm512_storeu_ps(to + 16, _mm512_cvtph_ps(_mm512_extracti64x4_epi64(w, 1)));
    }
};

struct BFloat16 : Half {
    INLINE void widen(uint16_t* to, __m512i w) { _mm512_storeu_si512(to, w); }
    INLINE __m512i wide(__m256i w) { return _mm512_slli_epi32(_mm512_cvtepu16_epi32(w), 16); }
    INLINE void widen(float* to, __m512i w) {
        _mm512_storeu_si512(to, wide(_mm512_castsi512_si256(w)));
        _mm512_storeu_si512(to + 16, wide(_mm512_extracti64x4_epi64(w, 1)));
    }
};

struct Int8 {
    using Word = uint64_t;
    static constexpr bool CODES = true, FEW_CODES = false;
    static constexpr int64_t LENGTH = 64;
    INLINE int64_t size(uint64_t mask) { return _mm_popcnt_u64(mask); }
    INLINE __m512i expand(uint64_t mask, const uint8_t* at, __m512i fill) {
        return _mm512_mask_expand_epi8(fill, mask, loaded(at));
    }
};

struct Int4 : Int8 {
    static constexpr bool FEW_CODES = true;
    INLINE int64_t size(uint64_t mask) { return (_mm_popcnt_u64(mask) + 1) / 2; }
    INLINE __m512i expand(uint64_t mask, const uint8_t* at, __m512i fill) {
        const __m512i pairs = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)));
        const __m512i codes = _mm512_or_si512(pairs, _mm512_slli_epi16(pairs, 4));
        return _mm512_mask_expand_epi8(fill, mask, _mm512_and_si512(codes, _mm512_set1_epi8(15)));
    }
};

// The grids of the rows of a panel, as float32.
struct Grids {
    int64_t groups, width;       // of a row; columns of one
    bool whole;                  // a run has one group
    std::vector<int32_t> which;  // is the group of every sixteenth column, or the first of its groups
    std::vector<float> steps, zeros;

    TARGET explicit Grids(const Weight& weight) : groups(weight.groups), width(weight.columns / weight.groups) {
        whole = groups == 1 || width % 64 == 0;
        for (int64_t column = 0; column < weight.columns; column += LANES) which.push_back(int32_t(column / width));
    }
    TARGET void read(const Weight& weight, int64_t first, int64_t last) {
        steps.resize(size_t((last - first + ROWS) * groups + LANES));
        zeros.resize(steps.size());
        for (int64_t at = first * groups, i = 0; at < last * groups; ++at, ++i) {
            steps[size_t(i)] = step(weight, at);
            zeros[size_t(i)] = float(weight.zeros ? weight.zeros[at] : weight.zero);
        }
    }
    INLINE float step(const Weight& weight, int64_t at) {
        if (weight.scale_type == 0) return static_cast<const float*>(weight.scales)[at];
        const int half = static_cast<const uint16_t*>(weight.scales)[at];
        if (weight.scale_type == 1) return _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128(half << 16)));
        return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(half)));
    }
    // Of 16 columns of a row, from a multiple of 16 on: one for all, or one for each 8 or 4.
    INLINE __m512 of(const Grids& grids, const std::vector<float>& numbers, int64_t row, int64_t column) {
        const float* at = numbers.data() + row * grids.groups + grids.which[size_t(column / LANES)];
        if (grids.groups == 1 || grids.width >= 16) return _mm512_set1_ps(*at);
        const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        return _mm512_permutexvar_ps(_mm512_srli_epi32(lanes, grids.width == 8 ? 3 : 2), _mm512_loadu_ps(at));
    }
};

// Panels of a bitmask. All bands of one are unpacked side by side, some columns at a time.
template <typename Unit, typename Kind> struct Sparse {
    using Number = typename Unit::Number;
    static constexpr int64_t BLOCK = Unit::BLOCK;
    const Weight& weight;
    int64_t chunks, part;  // of a row; of it a block, in 1 / 2^16
    Grids grids;
    int64_t first = 0, next = 0;         // band of the panel, and of the one after it
    std::vector<const uint8_t*> values;  // where the next run of each band begins

    TARGET explicit Sparse(const Weight& weight)
        : weight(weight),
          chunks((weight.columns + Kind::LENGTH - 1) / Kind::LENGTH),
          part((BLOCK << 16) / weight.columns),
          grids(weight) {}

    TARGET void begin(int64_t band, int64_t last, int64_t after) {
        first = band;
        next = after;
        values.clear();
        for (; band < last; ++band) values.push_back(weight.values + weight.offsets[band]);
        if constexpr (Kind::CODES) grids.read(weight, ROWS * first, std::min(ROWS * last, weight.rows));
    }
    // Where a band's next block begins, in this panel or the next one; `at` is where its present one ends.
    TARGET const uint8_t* after(int64_t b, int64_t left, const uint8_t* at) const {
        const int64_t bands = (weight.rows + ROWS - 1) / ROWS;
        return left + BLOCK < weight.columns ? at : weight.values + weight.offsets[std::min(next + b, bands - 1)];
    }
    // About how many bytes a block of a band has.
    TARGET int64_t bytes(int64_t b) const {
        return (weight.offsets[first + b + 1] - weight.offsets[first + b]) * part >> 16;
    }
    // Where a quarter of what the next block reads of a row's band begins; `left` is of the present block.
    TARGET const uint8_t* ahead(int64_t row, int64_t left) const {
        const int64_t b = std::min(row / ROWS, int64_t(values.size()) - 1);
        return after(b, left, values[size_t(b)]) + row % ROWS * bytes(b) / ROWS;
    }
    // The columns from `left` on of some rows of the panel; `to` has rows of BLOCK numbers. Rows beyond the last are left.
    TARGET void block(int64_t top, int64_t bottom, int64_t left, Number* to) {
        int64_t b = top / ROWS;
        for (; ROWS * (b + Unit::BANDS) <= bottom; b += Unit::BANDS, to += Unit::BANDS * ROWS * BLOCK)
            bands<Unit::BANDS>(b, left, to);
        for (; ROWS * b < bottom; ++b, to += ROWS * BLOCK) bands<1>(b, left, to);
    }
    // Some bands in turn, as where a run begins depends on those before it in its band.
    template <int BANDS> TARGET void bands(int64_t b, int64_t left, Number* to) {
        const int64_t from = left / Kind::LENGTH, until = std::min(chunks, from + BLOCK / Kind::LENGTH);
        const typename Kind::Word* masks[BANDS];
        const uint8_t* at[BANDS];
        int64_t coming[BANDS];  // how far from there what the next block reads is
        for (int i = 0; i < BANDS; ++i) {
            masks[i] = static_cast<const typename Kind::Word*>(weight.masks) + ((first + b + i) * chunks + from) * ROWS;
            at[i] = values[size_t(b + i)];
            coming[i] = after(b + i, left, at[i] + bytes(b + i)) - at[i];
        }
        for (int64_t c = from; c < until; ++c)
#pragma GCC unroll 4
            for (int64_t r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
                for (int64_t i = 0; i < BANDS; ++i) {
                    if (!Unit::FETCHES) _mm_prefetch(reinterpret_cast<const char*>(at[i] + coming[i]), _MM_HINT_T1);
                    const uint64_t mask = *masks[i]++;
                    Number* out = to + (ROWS * i + r) * BLOCK + (c - from) * Kind::LENGTH;
                    if constexpr (Kind::CODES)
                        run(out, mask, at[i], ROWS * (b + i) + r, c * Kind::LENGTH);
                    else
                        Kind::widen(out, Kind::expand(mask, at[i]));
                    at[i] += Kind::size(mask);
                }
        for (int i = 0; i < BANDS; ++i) {
            values[size_t(b + i)] = at[i];
            for (int64_t line = 0; line <= BLOCK * ROWS / 8 / 64; ++line)
                _mm_prefetch(reinterpret_cast<const char*>(masks[i]) + 64 * line, _MM_HINT_T1);
        }
    }
    // A run of codes as numbers. A pruned weight gets code 0, and is set to zero as a number.
    TARGET inline void run(Number* to, uint64_t mask, const uint8_t* at, int64_t row, int64_t column) {
        const __m512i codes = Kind::expand(mask, at, fresh());
        if constexpr (Kind::FEW_CODES && sizeof(Number) == 2)
            if (grids.whole) return looked_up(to, mask, codes, row, column);
        const int64_t last = weight.columns - 1;
        const __m128i quarters[4] = {_mm512_castsi512_si128(codes), _mm512_extracti32x4_epi32(codes, 1),
                                     _mm512_extracti32x4_epi32(codes, 2), _mm512_extracti32x4_epi32(codes, 3)};
        __m512 zero = Grids::of(grids, grids.zeros, row, column), step = Grids::of(grids, grids.steps, row, column);
#pragma GCC unroll 4
        for (int q = 0; q < 4; ++q) {
            if (q && !grids.whole) {
                const int64_t here = std::min(column + 16 * q, last);  // beyond the last column all is pruned
                zero = Grids::of(grids, grids.zeros, row, here), step = Grids::of(grids, grids.steps, row, here);
            }
            const __m512 code = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(quarters[q]));
            put(to + 16 * q, _mm512_maskz_mul_ps(__mmask16(mask >> 16 * q), _mm512_sub_ps(code, zero), step));
        }
    }
    // The same of codes that have one grid, of which there are 16: by a table of their numbers.
    TARGET inline void looked_up(Number* to, uint64_t mask, __m512i codes, int64_t row, int64_t column) {
        const __m512 code = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        const __m512 zero = Grids::of(grids, grids.zeros, row, column), step = Grids::of(grids, grids.steps, row, column);
        const __m512i numbers = _mm512_castsi256_si512(rounded(_mm512_mul_ps(_mm512_sub_ps(code, zero), step)));
        const __m512i low = _mm512_cvtepu8_epi16(_mm512_castsi512_si256(codes));
        const __m512i high = _mm512_cvtepu8_epi16(_mm512_extracti64x4_epi64(codes, 1));
        _mm512_storeu_si512(to, _mm512_maskz_permutexvar_epi16(__mmask32(mask), low, numbers));
        _mm512_storeu_si512(to + 32, _mm512_maskz_permutexvar_epi16(__mmask32(mask >> 32), high, numbers));
    }
};

// Panels of a dense weight, whose values lie row by row.
template <typename Unit, typename Kind> struct Dense {
    using Number = typename Unit::Number;
    static constexpr int64_t BLOCK = Unit::BLOCK;
    const Weight& weight;
    int64_t first = 0, next = 0;  // row of the panel, and of the one after it

    TARGET explicit Dense(const Weight& weight) : weight(weight) {}
    TARGET void begin(int64_t band, int64_t, int64_t after) { first = ROWS * band, next = ROWS * after; }
    TARGET const uint8_t* ahead(int64_t row, int64_t left) const {
        const bool more = left + BLOCK < weight.columns;
        const int64_t of = std::min((more ? first : next) + row, weight.rows - 1);
        return weight.values + (of * weight.columns + (more ? left + BLOCK : 0)) * Kind::SIZE / Kind::LENGTH;
    }
    TARGET void block(int64_t top, int64_t bottom, int64_t left, Number* to) {
        constexpr int64_t size = Kind::SIZE / Kind::LENGTH;  // bytes of a number
        const int64_t width = std::min(BLOCK, weight.columns - left);
        for (int64_t r = first + top; r < first + bottom; ++r, to += BLOCK) {
            const uint8_t* at = weight.values + (r * weight.columns + left) * size;
            for (int64_t i = 0; i < width; i += Kind::LENGTH) {
                const int64_t bytes = std::min<int64_t>(Kind::SIZE, (width - i) * size);
                Kind::widen(to + i, _mm512_maskz_loadu_epi8(~uint64_t(0) >> (64 - bytes), at + i * size));
            }
        }
    }
};

// The columns of 16 rows of 16 words each.
INLINE void transpose(__m512i (&v)[16]) {
    __m512i w[16];
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
        w[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
        w[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
        v[i] = _mm512_unpacklo_epi64(w[i], w[i + 2]);
        v[i + 1] = _mm512_unpackhi_epi64(w[i], w[i + 2]);
        v[i + 2] = _mm512_unpacklo_epi64(w[i + 1], w[i + 3]);
        v[i + 3] = _mm512_unpackhi_epi64(w[i + 1], w[i + 3]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        w[i] = _mm512_shuffle_i32x4(v[i], v[i + 4], 0x88);
        w[i + 4] = _mm512_shuffle_i32x4(v[i], v[i + 4], 0xdd);
        w[i + 8] = _mm512_shuffle_i32x4(v[i + 8], v[i + 12], 0x88);
        w[i + 12] = _mm512_shuffle_i32x4(v[i + 8], v[i + 12], 0xdd);
    }
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
        v[i] = _mm512_shuffle_i32x4(w[i], w[i + 8], 0x88);
        v[i + 8] = _mm512_shuffle_i32x4(w[i], w[i + 8], 0xdd);
    }
}

// Rows of x in slices of some registers: step by step (columns of a step: DEPTH), the words of all rows of the slice.
template <typename Unit> struct Columns {
    static constexpr int64_t SLICE = Unit::SLICE;
    int64_t batch, registers, steps;  // rows of x; registers of them; steps of a row, whole blocks
    uint32_t* words;

    Columns(int64_t batch, int64_t columns)
        : batch(batch),
          registers((batch + LANES - 1) / LANES),
          steps((columns + Unit::BLOCK - 1) / Unit::BLOCK * Unit::BLOCK / Unit::DEPTH),
          words(static_cast<uint32_t*>(kept<OF_X>(size_t(registers * steps * 64)))) {}

    int64_t width(int64_t slice) const { return std::min(SLICE, registers - slice * SLICE); }  // registers of a slice
    const uint32_t* at(int64_t slice, int64_t step) const {
        return words + (slice * SLICE * steps + step * width(slice)) * LANES;
    }
    // Lays out 16 steps of 16 rows.
    TARGET void lay(const typename Unit::Number* x, int64_t columns, int64_t r, int64_t step) {
        __m512i rows[16];
        const int64_t left = step * Unit::DEPTH;
        for (int64_t n = 0; n < 16; ++n) {
            const int64_t row = r * LANES + n, rest = columns - left;
            const int64_t bytes = std::min<int64_t>(64, rest * int64_t(sizeof(typename Unit::Number)));
            const uint64_t here = row < batch && rest > 0 ? ~uint64_t(0) >> (64 - bytes) : 0;
            rows[n] = _mm512_maskz_loadu_epi8(here, x + (row < batch ? row : 0) * columns + left);
        }
        transpose(rows);
        const int64_t slice = r / SLICE;
        uint32_t* to = words + (at(slice, step) - words) + r % SLICE * LANES;
        for (int64_t i = 0; i < 16; ++i) _mm512_store_si512(to + i * width(slice) * LANES, rows[i]);
    }
};

// Some bands times all rows of x.
template <typename Unit, typename Source>
TARGET void panels(const Weight& weight, const Columns<Unit>& x, int64_t panel, void* y, bool rounded, int64_t first,
                   int64_t last) {
    using Number = typename Unit::Number;
    constexpr int64_t BLOCK = Unit::BLOCK, FEWEST = Unit::FEWEST, SLICE = Unit::SLICE;
    const Unit unit;
    const int64_t apart = panel * LANES;
    // What is unpacked meets one slice at once, in the first cache; for more, the whole panel goes to the second.
    const int64_t some = !Unit::FETCHES || x.registers <= SLICE ? FEWEST : panel;
    auto* unpacked = static_cast<Number*>(kept<UNPACKED>(size_t(some * BLOCK) * sizeof(Number)));
    auto* sums = static_cast<float*>(kept<SUMS>(size_t(x.registers * apart) * sizeof(float)));
    std::fill_n(unpacked, some * BLOCK, Number(0));
    Source source(weight);
    for (int64_t band = first; band < last; band += panel / ROWS) {
        const int64_t end = std::min(last, band + panel / ROWS);
        const int64_t top = ROWS * band, rows = std::min(ROWS * end, weight.rows) - top;
        std::fill_n(sums, x.registers * apart, 0.0f);
        source.begin(band, end, end);
        for (int64_t left = 0; left < weight.columns; left += BLOCK) {
            const int64_t steps = (std::min(BLOCK, weight.columns - left) + Unit::DEPTH - 1) / Unit::DEPTH;
            for (int64_t above = 0; above < rows; above += some) {
                const int64_t here = std::min(some, rows - above);
                source.block(above, above + here, left, unpacked);
                const uint8_t* ahead[Unit::PANEL];
                for (int64_t r = 0; Unit::FETCHES && r < some; ++r) ahead[r] = source.ahead(above + r, left);
                for (int64_t slice = 0; slice * SLICE < x.registers; ++slice) {
                    const uint32_t* of_x = x.at(slice, left / Unit::DEPTH);
                    float* to = sums + slice * SLICE * apart + above * LANES;
                    unit.meet(unpacked, here, of_x, x.width(slice), steps, to, apart, slice ? nullptr : ahead);
                }
            }
        }
        for (int64_t n = 0; n < x.batch; n += LANES)
            for (int64_t r = 0; r < rows; r += LANES) {
                __m512i part[16];
                for (int64_t i = 0; i < 16; ++i)
                    part[i] = r + i < rows ? _mm512_load_si512(sums + n * panel + (r + i) * LANES) : __m512i{};
                transpose(part);
                for (int64_t i = 0; i < std::min(LANES, x.batch - n); ++i) {
                    const int64_t at = (n + i) * weight.rows + top + r;
                    if (rounded)
                        put(static_cast<uint16_t*>(y) + at, _mm512_castsi512_ps(part[i]), inside(rows - r));
                    else
                        _mm512_mask_storeu_epi32(static_cast<float*>(y) + at, inside(rows - r), part[i]);
                }
            }
    }
}

template <typename Unit, typename Source>
void multiply(const Weight& weight, const typename Unit::Number* x, int64_t batch, char* y, bool rounded,
              int64_t threads) {
    const int64_t bands = (weight.rows + ROWS - 1) / ROWS, columns = weight.columns;
    const int64_t share = (weight.rows + threads - 1) / threads;
    for (int64_t n = 0; n < batch; n += PASS, x += PASS * columns, y += PASS * weight.rows * (rounded ? 2 : 4)) {
        Columns<Unit> laid(std::min(PASS, batch - n), columns);
        const int64_t most = laid.registers > Unit::FEW ? Unit::PANEL : Unit::FEWEST;
        const int64_t panel = std::min(most, (share + Unit::FEWEST - 1) / Unit::FEWEST * Unit::FEWEST);
        const int64_t all = (weight.rows + panel - 1) / panel, each = panel / ROWS;
#pragma omp parallel num_threads(threads)
        {
#pragma omp for schedule(static) collapse(2)
            for (int64_t r = 0; r < laid.registers; ++r)
                for (int64_t step = 0; step < laid.steps; step += 16) laid.lay(x, columns, r, step);
#pragma omp for schedule(static)
            for (int64_t part = 0; part < threads; ++part)
                panels<Unit, Source>(weight, laid, panel, y, rounded, all * part / threads * each,
                                     std::min(bands, all * (part + 1) / threads * each));
        }
    }
}

}  // namespace

// tiles_<kind>_<path>: y (batch, rows) of x (batch, columns) in the Unit's numbers. y is float32, or rounded to bfloat16 if
// these are.
#define TILES(NAME, PATH, UNIT, SOURCE, KIND)                                                                          \
    extern "C" void tiles_##NAME##_##PATH(const Weight* weight, const UNIT::Number* x, int64_t batch, char* y,         \
                                          int64_t rounded, int64_t threads) {                                          \
        multiply<UNIT, SOURCE<UNIT, KIND>>(*weight, x, batch, y, rounded, threads);                                    \
    }
