// The kernels of sparse.cpp for processors with AVX-512: the word of a mask is the mask register that expands a run of
// kept values to a vector. docs/formats.md says how a weight lies in memory.
//
// Three things make it three times as fast as the obvious code: an expansion is kept apart from its load (the form that
// does both is slow), it goes to a register made for it (otherwise it waits for what was there before), and the
// streams are fetched thousands of bytes ahead (docs/log.md). How far ahead, how many bands are read at once, and where to
// they are fetched (Fetch) differs between processors: besa.kernels.reading, besa.kernels.fetching.
#if defined(__x86_64__)
#include <numeric>
#include <type_traits>

#include "avx512.hpp"

namespace {

constexpr int64_t TILE = 64;               // chunks expanded at a time where a batch shares them: half a first cache

// What a kind of weight is: how a run is expanded to a Vector, what it meets of x (Inputs), how products are summed.

struct Floats {
    using Sum = __m512;
    static constexpr bool CODES = false;
    // The registers hold the sums of a band and so many rows of x, as the band is read and from a tile; or of so many
    // bands and one row.
    static constexpr int DIRECT = 4, TOGETHER = 4, BANDS = 4;
    INLINE Sum none() { return _mm512_setzero_ps(); }
    INLINE __m512 total(Sum sum) { return sum; }
};

struct Float32 : Floats {
    using Word = uint16_t;
    using X = float;
    using Vector = __m512;
    using Inputs = __m512;
    static constexpr int64_t LENGTH = 16, STRIDE = 16;  // columns of a chunk, numbers of x that meet it
    static constexpr int64_t LINE = 1;                  // rows of a chunk whose values take 64 bytes at most
    INLINE int64_t size(uint64_t mask) { return 4 * _mm_popcnt_u64(mask); }
    INLINE Vector expand(Word mask, const uint8_t* at) {
        return _mm512_castsi512_ps(_mm512_mask_expand_epi32(fresh(), mask, loaded(at)));
    }
    INLINE Inputs inputs(const X* x) { return _mm512_loadu_ps(x); }
    INLINE Sum add(Sum sum, Vector w, Inputs x) { return _mm512_fmadd_ps(w, x, sum); }
};

struct Float16 : Floats {
    using Word = uint32_t;
    using X = float;
    using Vector = __m512i;
    struct Inputs {
        __m512 low, high;
    };
    static constexpr int64_t LENGTH = 32, STRIDE = 32, LINE = 1;
    INLINE int64_t size(uint64_t mask) { return 2 * _mm_popcnt_u64(mask); }
    INLINE Vector expand(Word mask, const uint8_t* at) {
        return _mm512_mask_expand_epi16(fresh(), mask, loaded(at));
    }
    INLINE Inputs inputs(const X* x) { return {_mm512_loadu_ps(x), _mm512_loadu_ps(x + 16)}; }
    INLINE Sum add(Sum sum, Vector w, Inputs x) {
        sum = _mm512_fmadd_ps(_mm512_cvtph_ps(_mm512_castsi512_si256(w)), x.low, sum);
        return _mm512_fmadd_ps(_mm512_cvtph_ps(_mm512_extracti64x4_epi64(w, 1)), x.high, sum);
    }
};

struct BFloat16 : Float16 {
    INLINE __m512 wide(__m256i w) {
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(w), 16));
    }
    INLINE Sum add(Sum sum, Vector w, Inputs x) {
        sum = _mm512_fmadd_ps(wide(_mm512_castsi512_si256(w)), x.low, sum);
        return _mm512_fmadd_ps(wide(_mm512_extracti64x4_epi64(w, 1)), x.high, sum);
    }
};

struct BFloat16Pairs : Float16 {  // exact products, two at a time
    using X = uint16_t;
    using Inputs = __m512i;
    INLINE Inputs inputs(const X* x) { return _mm512_loadu_si512(x); }
    INLINE Sum add(Sum sum, Vector w, Inputs x) {
        // Written out, so that the rest can be compiled for processors that have all but this instruction.
        asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(w), "v"(x));
        return sum;
    }
};

// Codes are multiplied as whole numbers, with x in fixed point, as digits of eight bits: nothing is rounded until the end
// of a group. A pruned weight has its row's code of zero, times which the sum of x is taken off in the end.
struct Int8 {
    using Word = uint64_t;
    using X = Digits;
    using Vector = __m512i;
    struct Inputs {
        __m512i low, middle;
        const X* all;
    };
    struct Sum {  // by digit; few numbers have a third, and so its products are summed in memory
        __m512i low, middle;
    };
    static constexpr bool CODES = true;
    static constexpr int DIRECT = 4, TOGETHER = 1, BANDS = 1;
    static constexpr int64_t LENGTH = 64, STRIDE = 1, LINE = 1;
    INLINE int64_t size(uint64_t mask) { return _mm_popcnt_u64(mask); }
    INLINE Vector expand(Word mask, const uint8_t* at, __m512i fill) {
        return _mm512_mask_expand_epi8(fill, mask, loaded(at));
    }
    INLINE Inputs inputs(const X* x) {
        return {_mm512_load_si512(x->of[0]), _mm512_load_si512(x->of[1]), x};
    }
    INLINE Sum none() { return {_mm512_setzero_si512(), _mm512_setzero_si512()}; }
    INLINE Sum add(Sum sum, Vector w, Inputs x) {
        add(sum.low, w, x.low);
        add(sum.middle, w, x.middle);
        return sum;
    }
    INLINE void add(__m512i& sum, Vector w, __m512i digits) {
        // Written out, as with the intrinsic gcc 12 copies every sum to and fro.
        asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(w), "vm"(digits));
    }
    INLINE __m512 total(Sum sum) {
        return _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum.middle), _mm512_set1_ps(256), _mm512_cvtepi32_ps(sum.low));
    }
    INLINE __m512 total(Sum sum, __m512i third) {
        const __m512 low = _mm512_cvtepi32_ps(sum.low), middle = _mm512_cvtepi32_ps(sum.middle);
        const __m512 high = _mm512_cvtepi32_ps(third), base = _mm512_set1_ps(256);
        return _mm512_fmadd_ps(_mm512_fmadd_ps(high, base, middle), base, low);
    }
};

struct Int4 : Int8 {
    static constexpr int TOGETHER = 2;
    static constexpr int64_t LINE = 2;
    INLINE int64_t size(uint64_t mask) { return (_mm_popcnt_u64(mask) + 1) / 2; }
    INLINE Vector unpacked(const uint8_t* at) {
        const __m512i pairs = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)));
        const __m512i low = _mm512_set1_epi8(15), higher = _mm512_slli_epi16(pairs, 4);
        return _mm512_ternarylogic_epi64(pairs, higher, low, 0xa8);  // (pairs | higher) & low
    }
    INLINE Vector expand(Word mask, const uint8_t* at, __m512i fill) {
        return _mm512_mask_expand_epi8(fill, mask, unpacked(at));
    }
};

// The rows of x as the kernels read them, with zeros to the end of the last chunk: numbers,
template <typename Kind> struct Numbers {
    int64_t batch, stride;  // rows; numbers of one
    std::vector<typename Kind::X> numbers;

    TARGET Numbers(const Weight& weight, const float* x, int64_t batch) : batch(batch) {
        const int64_t columns = weight.columns;
        stride = (columns + Kind::LENGTH - 1) / Kind::LENGTH * Kind::STRIDE;
        numbers.resize(size_t(batch * stride));
        for (int64_t n = 0; n < batch; ++n) {
            typename Kind::X* to = numbers.data() + n * stride;
            if constexpr (sizeof(typename Kind::X) == 2)
                for (int64_t i = 0; i < columns; ++i) to[i] = upper_half(x[n * columns + i]);
            else
                std::memcpy(to, x + n * columns, size_t(columns) * sizeof(float));
        }
    }
    static uint16_t upper_half(float number) {
        uint32_t bits;
        std::memcpy(&bits, &number, sizeof bits);
        return uint16_t(bits >> 16);
    }
};
// or digits, and the sums of each group in units of the last digit.
struct Summed : FixedPoint {
    std::vector<float> sums;  // by row
    const float* sums_of(int64_t n) const { return sums.data() + n * int64_t(sums.size()) / batch; }

    TARGET Summed(const Weight& weight, const float* x, int64_t batch) : FixedPoint(weight, x, batch) {
        const int64_t group = weight.columns / weight.groups, all = weight.groups == 1 ? 16 * stride : weight.columns / 4;
        std::vector<int32_t> fours(size_t(16 * stride));
        for (int64_t n = 0; n < batch; ++n) {
            for (int64_t c = 0; c < stride; ++c) {
                const Digits& x = numbers[size_t(n * stride + c)];
                __m512i sum = _mm512_add_epi32(summed(x, 0), _mm512_slli_epi32(summed(x, 1), 8));
                sum = _mm512_add_epi32(sum, _mm512_slli_epi32(summed(x, 2), 16));
                _mm512_storeu_si512(fours.data() + 16 * c, sum);
            }
            const int64_t each = weight.groups == 1 ? all : group / 4;
            for (const int32_t* at = fours.data(); at < fours.data() + all; at += each)
                sums.push_back(float(std::accumulate(at, at + each, int64_t(0))));
        }
    }
};
template <typename Kind> using Rows = std::conditional_t<Kind::CODES, Summed, Numbers<Kind>>;

struct Totals {  // of the rows of a band, in lanes
    float of[ROWS][16];
};

// How a band is summed: by segments of whole chunks that share a step, or a chunk whose groups have lanes of their own.
struct Grid {
    static constexpr uint32_t FOUR_TIMES = 0x01010101;
    int64_t chunks, segment;      // of a row; of a segment
    int64_t groups, each;         // of a row; of a segment
    int64_t width;                // of a row of what follows: the groups, and room for a vector after them
    int32_t lanes[16];            // which group of a segment a lane of sums belongs to, and of codes
    int8_t places[64];
    std::vector<float> scales;    // of a band
    std::vector<uint32_t> zeros;  // each code four times, so that one load fills a register with it
    bool alike;                   // all codes of zero are

    TARGET Grid(const Weight& weight, int64_t length) : groups(weight.groups), alike(!weight.zeros) {
        chunks = segment = (weight.columns + length - 1) / length;
        each = 1;
        const int64_t group = weight.columns / groups;
        if (groups > 1) {
            segment = std::max<int64_t>(1, group / length);
            each = std::max<int64_t>(1, length / group);
        }
        for (int i = 0; i < 64; ++i) {
            lanes[i / 4] = int32_t(each > 1 ? i / group : 0);
            places[i] = int8_t(4 * lanes[i / 4]);
        }
        width = groups + 16;
        scales.resize(size_t(ROWS * width));
        zeros.assign(size_t(ROWS * width), uint32_t(weight.zero) * FOUR_TIMES);
    }
    TARGET void read(const Weight& weight, int64_t band) {
        const int64_t last = weight.rows - 1;  // stands for the rows beyond it, too: no branch depends on their number
        for (int64_t g = 0; g < groups; g += 16)
#pragma GCC unroll 4
            for (int64_t r = 0; r < ROWS; ++r) {
                const int64_t at = std::min(ROWS * band + r, last) * groups + g;
                const __mmask16 which = inside(groups - g);
                _mm512_storeu_ps(&scales[size_t(r * width + g)], some(weight, at, which));
                if (alike) continue;
                const __m512i codes = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(which, weight.zeros + at));
                _mm512_storeu_si512(&zeros[size_t(r * width + g)],
                                    _mm512_mullo_epi32(codes, _mm512_set1_epi32(FOUR_TIMES)));
            }
    }
    // What a band begins with, given the sums of x by group: what its codes of zero add, taken off.
    TARGET void start(const float* sums, Totals& totals) const {
        __m512 results[ROWS] = {};
        for (int64_t g = 0; g < groups; g += 16) {
            const __m512 of_x = _mm512_maskz_loadu_ps(inside(groups - g), sums + g);
#pragma GCC unroll 4
            for (int64_t r = 0; r < ROWS; ++r) {
                const __m512i codes = _mm512_srli_epi32(_mm512_loadu_si512(&zeros[size_t(r * width + g)]), 24);
                const __m512 lowered = _mm512_cvtepi32_ps(codes);
                const __m512 values = _mm512_mul_ps(_mm512_loadu_ps(&scales[size_t(r * width + g)]), lowered);
                results[r] = _mm512_fnmadd_ps(values, of_x, results[r]);
            }
        }
#pragma GCC unroll 4
        for (int64_t r = 0; r < ROWS; ++r) _mm512_storeu_ps(totals.of[r], results[r]);
    }
    INLINE __m512 some(const Weight& weight, int64_t at, __mmask16 which) {
        if (weight.scale_type == 0) return _mm512_maskz_loadu_ps(which, static_cast<const float*>(weight.scales) + at);
        const __m256i halves = _mm256_maskz_loadu_epi16(which, static_cast<const uint16_t*>(weight.scales) + at);
        if (weight.scale_type == 2) return _mm512_cvtph_ps(halves);
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
    }
    // PARTS: several groups share a chunk.
    template <bool PARTS> INLINE __m512 steps(const Grid& grid, int64_t r, int64_t s) {
        const float* scales = grid.scales.data() + r * grid.width + s * grid.each;
        if (!PARTS) return _mm512_set1_ps(*scales);
        return _mm512_permutexvar_ps(_mm512_loadu_si512(grid.lanes), _mm512_loadu_ps(scales));
    }
    INLINE __m512i fill(const Grid& grid, int64_t r, int64_t s) {
        const uint32_t* zeros = grid.zeros.data() + r * grid.width + s * grid.each;
        if (grid.each == 1) return _mm512_set1_epi32(int32_t(*zeros));
        return _mm512_permutexvar_epi8(_mm512_loadu_si512(grid.places), _mm512_loadu_si512(zeros));
    }
};

// A band of a weight, expanded as it is read.
template <typename Kind, Fetch FETCH> struct Stream {
    static constexpr auto HINT = decltype(_MM_HINT_T1)(FETCH);
    const typename Kind::Word* masks;
    const uint8_t* values;
    int64_t ahead;
    __m512i fills[ROWS];  // of pruned codes

    INLINE Stream of(const Weight& weight, int64_t band) {
        const int64_t chunks = (weight.columns + Kind::LENGTH - 1) / Kind::LENGTH;
        const auto* masks = static_cast<const typename Kind::Word*>(weight.masks);
        Stream result = {masks + band * chunks * ROWS, weight.values + weight.offsets[band],
                         weight.ahead ? weight.ahead : AHEAD, {}};
        for (int64_t r = 0; r < ROWS; ++r) result.fills[r] = _mm512_set1_epi8(char(weight.zero));
        return result;
    }
    INLINE void enter(Stream& stream, const Grid& grid, int64_t s) {
        if (Kind::CODES && !grid.alike)
            for (int64_t r = 0; r < ROWS; ++r) stream.fills[r] = Grid::fill(grid, r, s);
    }
    INLINE typename Kind::Vector next(Stream& stream, int64_t, int64_t r) {
        if (r % Kind::LINE == 0) _mm_prefetch(reinterpret_cast<const char*>(stream.values + stream.ahead), HINT);
        if (r == 0) _mm_prefetch(reinterpret_cast<const char*>(stream.masks) + stream.ahead / 4, HINT);
        uint64_t mask = *stream.masks++;
        asm("" : "+r"(mask));
        typename Kind::Vector w;
        if constexpr (Kind::CODES)
            w = Kind::expand(mask, stream.values, stream.fills[r]);
        else
            w = Kind::expand(mask, stream.values);
        stream.values += Kind::size(mask);
        return w;
    }
};

// Chunks of a band that were expanded before.
template <typename Kind> struct Tile {
    const typename Kind::Vector (*chunks)[ROWS];
    int64_t first;  // of the chunks
    INLINE void enter(const Tile&, const Grid&, int64_t) {}
    INLINE typename Kind::Vector next(const Tile& tile, int64_t c, int64_t r) { return tile.chunks[c - tile.first][r]; }
};

// Adds the products of some chunks of BANDS bands and N rows of x. Every way through it adds in the same order.
template <typename Kind, int SHAPE, int N, int BANDS, typename Source>
INLINE std::enable_if_t<!Kind::CODES> add(Source* sources, const Grid*, int64_t begin, int64_t end,
                                          const typename Kind::X* x, int64_t stride, Totals* totals) {
    asm("" : "+r"(totals));  // in memory: the registers are for the sums
    Source own[BANDS];
#pragma GCC unroll 4
    for (int b = 0; b < BANDS; ++b) own[b] = sources[b];
    __m512 sums[BANDS][N][ROWS];
#pragma GCC unroll 16
    for (int i = 0; i < BANDS * N * ROWS; ++i)
        sums[i / ROWS / N][i / ROWS % N][i % ROWS] = _mm512_loadu_ps(totals[i / ROWS].of[i % ROWS]);
    x += begin * Kind::STRIDE;
    for (int64_t c = begin; c < end; ++c, x += Kind::STRIDE) {
        typename Kind::Inputs inputs[N];
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) inputs[n] = Kind::inputs(x + n * stride);
#pragma GCC unroll 4
        for (int b = 0; b < BANDS; ++b)
#pragma GCC unroll 4
            for (int r = 0; r < ROWS; ++r) {
                const typename Kind::Vector w = Source::next(own[b], c, r);
#pragma GCC unroll 4
                for (int n = 0; n < N; ++n) sums[b][n][r] = Kind::add(sums[b][n][r], w, inputs[n]);
            }
    }
#pragma GCC unroll 4
    for (int b = 0; b < BANDS; ++b) sources[b] = own[b];
#pragma GCC unroll 16
    for (int i = 0; i < BANDS * N * ROWS; ++i)
        _mm512_storeu_ps(totals[i / ROWS].of[i % ROWS], sums[i / ROWS / N][i / ROWS % N][i % ROWS]);
}

// A chunk of codes. THIRD: some number of x has a third digit there.
template <typename Kind, int N, int BANDS, bool THIRD, typename Source>
INLINE void meet(Source* own, int64_t c, const typename Kind::Inputs (&inputs)[N],
                 typename Kind::Sum (&sums)[BANDS][N][ROWS], __m512i (&third)[BANDS][N][ROWS]) {
#pragma GCC unroll 4
    for (int b = 0; b < BANDS; ++b)
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; ++r) {
            const typename Kind::Vector w = Source::next(own[b], c, r);
#pragma GCC unroll 4
            for (int n = 0; n < N; ++n) {
                sums[b][n][r] = Kind::add(sums[b][n][r], w, inputs[n]);
                if constexpr (THIRD) Kind::add(third[b][n][r], w, _mm512_load_si512(inputs[n].all->of[2]));
            }
        }
}

// A segment of codes, from some chunk of it on: whole numbers to its end, which is met by its steps.
template <typename Kind, bool PARTS, int N, int BANDS, typename Source>
INLINE void meet(Source* own, const Grid* grids, int64_t s, int64_t c, int64_t end, const typename Kind::X* x,
                 int64_t stride, __m512 (&all)[BANDS][N][ROWS]) {
    __m512i third[BANDS][N][ROWS];
    typename Kind::Sum sums[BANDS][N][ROWS];
#pragma GCC unroll 16
    for (int i = 0; i < BANDS * N * ROWS; ++i) sums[i / ROWS / N][i / ROWS % N][i % ROWS] = Kind::none();
    bool wide = false;
    for (; c < end; ++c, x += Kind::STRIDE) {
        typename Kind::Inputs inputs[N];
        bool here = false;
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) {
            inputs[n] = Kind::inputs(x + n * stride);
            here |= inputs[n].all->wide != 0;
        }
        if (here && !wide) {
            wide = true;
            std::memset(third, 0, sizeof third);
        }
        if (here)
            meet<Kind, N, BANDS, true>(own, c, inputs, sums, third);
        else
            meet<Kind, N, BANDS, false>(own, c, inputs, sums, third);
    }
#pragma GCC unroll 4
    for (int b = 0; b < BANDS; ++b)
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; ++r) {
            const __m512 steps = Grid::steps<PARTS>(grids[b], r, s);
#pragma GCC unroll 4
            for (int n = 0; n < N; ++n) {
                const __m512 sum = wide ? Kind::total(sums[b][n][r], third[b][n][r]) : Kind::total(sums[b][n][r]);
                all[b][n][r] = _mm512_fmadd_ps(sum, steps, all[b][n][r]);
            }
        }
}

// The same of a whole segment of one or two chunks without third digits, to the bit, with one sum for both digits: the
// products with the higher one are there first, and become 256 times as much.
template <typename Kind, bool PARTS, int SEGMENT, int N, int BANDS, typename Source>
INLINE void meet_few(Source* own, const Grid* grids, int64_t s, int64_t c, const typename Kind::X* x, int64_t stride,
                     __m512 (&all)[BANDS][N][ROWS]) {
    typename Kind::Inputs inputs[SEGMENT][N];
#pragma GCC unroll 4
    for (int i = 0; i < SEGMENT * N; ++i) inputs[i / N][i % N] = Kind::inputs(x + i / N * Kind::STRIDE + i % N * stride);
#pragma GCC unroll 4
    for (int b = 0; b < BANDS; ++b) {
        typename Kind::Vector w[SEGMENT][ROWS];
#pragma GCC unroll 8
        for (int i = 0; i < SEGMENT * ROWS; ++i) w[i / ROWS][i % ROWS] = Source::next(own[b], c + i / ROWS, i % ROWS);
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; ++r) {
            const __m512 steps = Grid::steps<PARTS>(grids[b], r, s);
#pragma GCC unroll 4
            for (int n = 0; n < N; ++n) {
                __m512i sum = _mm512_setzero_si512();
#pragma GCC unroll 2
                for (int i = 0; i < SEGMENT; ++i) Kind::add(sum, w[i][r], inputs[i][n].middle);
                sum = _mm512_slli_epi32(sum, 8);
#pragma GCC unroll 2
                for (int i = 0; i < SEGMENT; ++i) Kind::add(sum, w[i][r], inputs[i][n].low);
                all[b][n][r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), steps, all[b][n][r]);
            }
        }
    }
}

// The same of codes. SHAPE of a segment: its chunks if they are one or two, otherwise 0; -1 if groups share a chunk.
template <typename Kind, int SHAPE, int N, int BANDS, typename Source>
INLINE std::enable_if_t<Kind::CODES> add(Source* sources, const Grid* grids, int64_t begin, int64_t end,
                                         const typename Kind::X* x, int64_t stride, Totals* totals) {
    constexpr bool PARTS = SHAPE < 0;
    Source own[BANDS];
#pragma GCC unroll 4
    for (int b = 0; b < BANDS; ++b) own[b] = sources[b];
    __m512 all[BANDS][N][ROWS];
#pragma GCC unroll 16
    for (int i = 0; i < BANDS * N * ROWS; ++i)
        all[i / ROWS / N][i / ROWS % N][i % ROWS] = _mm512_loadu_ps(totals[i / ROWS].of[i % ROWS]);
    const int64_t segment = SHAPE ? std::abs(SHAPE) : grids->segment;
    for (int64_t c = begin, s = begin / segment; c < end; ++s) {
#pragma GCC unroll 4
        for (int b = 0; b < BANDS; ++b) Source::enter(own[b], grids[b], s);
        const int64_t right = std::min(end, (s + 1) * segment);
        const typename Kind::X* at = x + c * Kind::STRIDE;
        bool wide = SHAPE == 0;
        if constexpr (SHAPE != 0)
            for (int i = 0; i < std::abs(SHAPE) * N; ++i) wide |= at[i / N * Kind::STRIDE + i % N * stride].wide != 0;
        if (__builtin_expect(wide, SHAPE == 0))
            meet<Kind, PARTS, N, BANDS>(own, grids, s, c, right, at, stride, all);
        else
            meet_few<Kind, PARTS, std::max(1, std::abs(SHAPE)), N, BANDS>(own, grids, s, c, at, stride, all);
        c = right;
    }
#pragma GCC unroll 4
    for (int b = 0; b < BANDS; ++b) sources[b] = own[b];
#pragma GCC unroll 16
    for (int i = 0; i < BANDS * N * ROWS; ++i)
        _mm512_storeu_ps(totals[i / ROWS].of[i % ROWS], all[i / ROWS / N][i / ROWS % N][i % ROWS]);
}

// The sums of four vectors.
INLINE __m128 summed(const float (&of)[ROWS][16]) {
    __m512 pairs[2];
    for (int i = 0; i < 2; ++i) {
        const __m512 a = _mm512_loadu_ps(of[2 * i]), b = _mm512_loadu_ps(of[2 * i + 1]);
        pairs[i] = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    }
    const __m512d a = _mm512_castps_pd(pairs[0]), b = _mm512_castps_pd(pairs[1]);
    const __m512 four = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
    const __m256 two = _mm256_add_ps(_mm512_castps512_ps256(four), _mm512_extractf32x8_ps(four, 1));
    return _mm_add_ps(_mm256_castps256_ps128(two), _mm256_extractf128_ps(two, 1));
}

template <typename Kind>
INLINE void write(const Weight& weight, const Rows<Kind>& rows, int64_t band, int64_t n, const Totals& totals, float* y) {
    __m128 result = summed(totals.of);
    if constexpr (Kind::CODES) result = _mm_mul_ps(result, _mm_set1_ps(rows.factors[size_t(n)]));
    const auto which = __mmask8(inside(std::min(ROWS, weight.rows - ROWS * band)));
    _mm_mask_storeu_ps(y + n * weight.rows + ROWS * band, which, result);
}

// Some bands times N rows of x, as the bands are read: BANDS at once from as many places, as memory gives more then.
template <typename Kind, int SHAPE, int N, int BANDS, Fetch FETCH>
TARGET void together(const Weight& weight, const Rows<Kind>& rows, float* y, int64_t first, int64_t count) {
    std::vector<Grid> grids(BANDS, Grid(weight, Kind::LENGTH));
    for (int64_t band = first; band < first + count; ++band) {
        Stream<Kind, FETCH> streams[BANDS];
        Totals totals[BANDS * N] = {};
        for (int64_t b = 0; b < BANDS; ++b) {
            if constexpr (Kind::CODES) {
                grids[size_t(b)].read(weight, band + b * count);
                for (int64_t n = 0; n < N; ++n) grids[size_t(b)].start(rows.sums_of(n), totals[b * N + n]);
            }
            streams[b] = Stream<Kind, FETCH>::of(weight, band + b * count);
        }
        add<Kind, SHAPE, N, BANDS>(streams, grids.data(), 0, grids[0].chunks, rows.numbers.data(), rows.stride, totals);
        for (int64_t i = 0; i < BANDS * N; ++i)
            write<Kind>(weight, rows, band + i / N * count, i % N, totals[i], y);
    }
}

template <typename Kind, int SHAPE, int N, int BANDS, Fetch FETCH>
TARGET void direct(const Weight& weight, const Rows<Kind>& rows, float* y, int64_t first, int64_t last) {
    const int64_t count = (last - first) / BANDS;
    together<Kind, SHAPE, N, BANDS, FETCH>(weight, rows, y, first, count);
    together<Kind, SHAPE, N, 1, FETCH>(weight, rows, y, first + BANDS * count, last - first - BANDS * count);
}

// Some bands times any number of rows of x, all of which meet a tile of a band after the other.
template <typename Kind, int SHAPE, Fetch FETCH>
TARGET void tiled(const Weight& weight, const Rows<Kind>& rows, float* y, int64_t first, int64_t last) {
    Grid grid(weight, Kind::LENGTH);
    alignas(64) typename Kind::Vector expanded[TILE][ROWS];
    Tile<Kind> tile{expanded, 0};
    std::vector<Totals> totals(static_cast<size_t>(rows.batch));
    for (int64_t band = first; band < last; ++band) {
        std::fill(totals.begin(), totals.end(), Totals{});
        if constexpr (Kind::CODES) {
            grid.read(weight, band);
            for (int64_t n = 0; n < rows.batch; ++n) grid.start(rows.sums_of(n), totals[size_t(n)]);
        }
        Stream<Kind, FETCH> stream = Stream<Kind, FETCH>::of(weight, band);
        for (int64_t left = 0; left < grid.chunks; left += TILE) {
            const int64_t right = std::min(grid.chunks, left + TILE);
            tile.first = left;
            for (int64_t c = left; c < right; ++c) {
                if (c % grid.segment == 0) Stream<Kind, FETCH>::enter(stream, grid, c / grid.segment);
                for (int64_t r = 0; r < ROWS; ++r) expanded[c - left][r] = Stream<Kind, FETCH>::next(stream, c, r);
            }
            int64_t n = 0;
            for (constexpr int some = Kind::TOGETHER; n + some <= rows.batch; n += some)
                add<Kind, SHAPE, some, 1>(&tile, &grid, left, right, rows.numbers.data() + n * rows.stride, rows.stride,
                                   &totals[size_t(n)]);
            for (; n < rows.batch; ++n)
                add<Kind, SHAPE, 1, 1>(&tile, &grid, left, right, rows.numbers.data() + n * rows.stride, rows.stride,
                                &totals[size_t(n)]);
        }
        for (int64_t n = 0; n < rows.batch; ++n) write<Kind>(weight, rows, band, n, totals[size_t(n)], y);
    }
}

template <typename Kind, int SHAPE, Fetch FETCH> auto for_one(int64_t bands) {
    return bands == 1   ? direct<Kind, SHAPE, 1, 1, FETCH>
           : bands == 2 ? direct<Kind, SHAPE, 1, 2, FETCH>
                        : direct<Kind, SHAPE, 1, 4, FETCH>;
}

template <typename Kind, int SHAPE, Fetch FETCH>
void multiply(const Weight& weight, const Rows<Kind>& rows, float* y, int64_t threads) {
    constexpr int most = Kind::DIRECT, usual = Kind::BANDS;
    const int64_t bands = weight.bands ? weight.bands : usual;
    const auto kernel = rows.batch > most ? tiled<Kind, SHAPE, FETCH>
                        : rows.batch == 1 ? (weight.first ? for_one<Kind, SHAPE, FIRST>(bands)
                                                          : for_one<Kind, SHAPE, FETCH>(bands))
                        : rows.batch == 2 ? direct<Kind, SHAPE, 2, std::max(1, usual / 2), FETCH>
                        : rows.batch == 3 ? direct<Kind, SHAPE, std::min(3, most), 1, FETCH>
                                          : direct<Kind, SHAPE, most, 1, FETCH>;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t part = 0; part < threads; ++part)
        kernel(weight, rows, y, first_band<typename Kind::Word>(weight, part, threads),
               first_band<typename Kind::Word>(weight, part + 1, threads));
}

template <typename Kind, Fetch FETCH>
void multiply(const Weight& weight, const Rows<Kind>& rows, float* y, int64_t threads) {
    if constexpr (Kind::CODES) {
        const Grid grid(weight, Kind::LENGTH);
        if (grid.each > 1) return multiply<Kind, -1, FETCH>(weight, rows, y, threads);
        if (grid.segment == 1) return multiply<Kind, 1, FETCH>(weight, rows, y, threads);
        if (grid.segment == 2) return multiply<Kind, 2, FETCH>(weight, rows, y, threads);
    }
    multiply<Kind, 0, FETCH>(weight, rows, y, threads);
}

template <typename Kind> void multiply(const Weight& weight, const float* x, int64_t batch, float* y, int64_t threads) {
    const Rows<Kind> rows(weight, x, batch);
    weight.past ? multiply<Kind, PAST>(weight, rows, y, threads) : multiply<Kind, OUTER>(weight, rows, y, threads);
}

INLINE void store(void* to, __m512i v, uint64_t kept) { _mm512_mask_storeu_epi8(to, kept, v); }
INLINE void store(void* to, __m512 v, uint64_t kept) { store(to, _mm512_castps_si512(v), kept); }

// Some bands dense, as values or as codes.
template <typename Kind> TARGET void expanded(const Weight& weight, int64_t band, int64_t start, char* out) {
    Grid grid(weight, Kind::LENGTH);
    if constexpr (Kind::CODES) grid.read(weight, band);
    Stream<Kind, OUTER> stream = Stream<Kind, OUTER>::of(weight, band);
    const int64_t width = weight.columns * (64 / Kind::LENGTH);  // bytes of a row
    for (int64_t c = 0; c < grid.chunks; ++c) {
        if (c % grid.segment == 0) Stream<Kind, OUTER>::enter(stream, grid, c / grid.segment);
        const int64_t left = std::min<int64_t>(64, width - 64 * c);
        for (int64_t r = 0; r < ROWS; ++r) {
            const typename Kind::Vector w = Stream<Kind, OUTER>::next(stream, c, r);
            const int64_t row = ROWS * band + r;
            if (row < weight.rows) store(out + (row - start) * width + 64 * c, w, ~uint64_t(0) >> (64 - left));
        }
    }
}

template <typename Kind> void expand(const Weight& weight, int64_t first, int64_t last, char* out, int64_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t band = first; band < last; ++band) expanded<Kind>(weight, band, ROWS * first, out);
}

}  // namespace

#define ALL(PATH, BFLOAT16)         \
    CALLS(float32, PATH, Float32)   \
    CALLS(bfloat16, PATH, BFLOAT16) \
    CALLS(float16, PATH, Float16)   \
    CALLS(int8, PATH, Int8)         \
    CALLS(int4, PATH, Int4)

ALL(avx512, BFloat16)
ALL(avx512bf16, BFloat16Pairs)

// Whether the processor can run a path.
extern "C" int has_avx512() { return has_all(); }
extern "C" int has_avx512bf16() { return has_all() && __builtin_cpu_supports("avx512bf16"); }
#endif
