// The kernels of sparse.cpp for processors with AVX-512: the word of a mask is the mask register that expands a run of
// kept values to a vector. docs/formats.md says how a weight lies in memory.
//
// Three things make it three times as fast as the obvious code: an expansion is kept apart from its load (the form that
// does both is slow), it goes to a register made for it (otherwise it waits for what was there before), and the
// stream of values is fetched 4096 bytes ahead.
#if defined(__x86_64__)
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vbmi2,avx512vnni,f16c,popcnt")))
#define INLINE TARGET __attribute__((always_inline)) static inline

struct Weight {  // as besa.kernels.sparse_native fills it in
    const void* masks;
    const uint8_t* values;
    const int64_t* offsets;
    int64_t rows, columns;
    // Of codes only:
    const void* scales;    // (rows, groups)
    const uint8_t* zeros;  // (rows, groups); none where all are `zero`
    int64_t scale_type;    // 0 float32, 1 bfloat16, 2 float16
    int64_t groups, zero;
};

namespace {

constexpr int64_t ROWS = 4;                // of a band
constexpr int64_t TILE = 1024;             // columns expanded at a time where a batch shares them
constexpr int64_t AHEAD = 4096;            // bytes
constexpr float LARGEST = 127 * 65793.0f;  // number of three digits between -128 and 127, to the base 256

INLINE __m512i loaded(const void* at) {
    __m512i values = _mm512_loadu_si512(at);
    asm volatile("" : "+v"(values));
    return values;
}
INLINE __m512i fresh() {
    __m512i zero;
    asm volatile("vpxord %0, %0, %0" : "=v"(zero));
    return zero;
}

// What a kind of weight is: how a run is expanded to a Vector, what it meets of x (Inputs), how products are summed.

struct Floats {
    using Sum = __m512;
    static constexpr bool CODES = false;
    static constexpr int TOGETHER = 4;  // rows of x whose sums, with those of a band, the registers hold
    INLINE Sum none() { return _mm512_setzero_ps(); }
    INLINE __m512 total(Sum sum) { return sum; }
};

struct Float32 : Floats {
    using Word = uint16_t;
    using X = float;
    using Vector = __m512;
    using Inputs = __m512;
    static constexpr int64_t LENGTH = 16, STRIDE = 16;  // columns of a chunk, numbers of x that meet it
    INLINE int64_t size(uint64_t mask) { return 4 * _mm_popcnt_u64(mask); }
    INLINE Vector expand(Word mask, const uint8_t* at, __m512i) {
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
    static constexpr int64_t LENGTH = 32, STRIDE = 32;
    INLINE int64_t size(uint64_t mask) { return 2 * _mm_popcnt_u64(mask); }
    INLINE Vector expand(Word mask, const uint8_t* at, __m512i) {
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

// Codes are multiplied as whole numbers, with x in fixed point, as three digits of eight bits: nothing is rounded until
// the end of a group. A pruned weight has its row's code of zero, times which the sum of x is taken off in the end.
struct Int8 {
    using Word = uint64_t;
    using X = int8_t;
    using Vector = __m512i;
    struct Inputs {
        __m512i digits[3];
    };
    using Sum = Inputs;
    static constexpr bool CODES = true;
    static constexpr int TOGETHER = 2;
    static constexpr int64_t LENGTH = 64, STRIDE = 192;
    INLINE int64_t size(uint64_t mask) { return _mm_popcnt_u64(mask); }
    INLINE Vector expand(Word mask, const uint8_t* at, __m512i fill) {
        return _mm512_mask_expand_epi8(fill, mask, loaded(at));
    }
    INLINE Inputs inputs(const X* x) {
        return {{_mm512_loadu_si512(x), _mm512_loadu_si512(x + 64), _mm512_loadu_si512(x + 128)}};
    }
    INLINE Sum none() { return {{_mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512()}}; }
    INLINE Sum add(Sum sum, Vector w, Inputs x) {
        for (int k = 0; k < 3; ++k) sum.digits[k] = _mm512_dpbusd_epi32(sum.digits[k], w, x.digits[k]);
        return sum;
    }
    INLINE __m512 total(Sum sum) {
        const __m512 low = _mm512_cvtepi32_ps(sum.digits[0]), middle = _mm512_cvtepi32_ps(sum.digits[1]);
        const __m512 high = _mm512_cvtepi32_ps(sum.digits[2]), base = _mm512_set1_ps(256);
        return _mm512_fmadd_ps(_mm512_fmadd_ps(high, base, middle), base, low);
    }
};

struct Int4 : Int8 {
    INLINE int64_t size(uint64_t mask) { return (_mm_popcnt_u64(mask) + 1) / 2; }
    INLINE Vector expand(Word mask, const uint8_t* at, __m512i fill) {
        const __m512i pairs = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)));
        const __m512i codes = _mm512_or_si512(pairs, _mm512_slli_epi16(pairs, 4));
        return _mm512_mask_expand_epi8(fill, mask, _mm512_and_si512(codes, _mm512_set1_epi8(15)));
    }
};

// The rows of x as the kernels read them, with zeros to the end of the last chunk.
template <typename Kind> struct Rows {
    int64_t stride;               // numbers of one row
    std::vector<typename Kind::X> numbers;
    std::vector<float> factors;   // what a unit of the last digit is worth, by row
    std::vector<float> sums;      // of each group, in such units, by row

    TARGET Rows(const Weight& weight, const float* x, int64_t batch) {
        const int64_t columns = weight.columns;
        stride = (columns + Kind::LENGTH - 1) / Kind::LENGTH * Kind::STRIDE;
        numbers.resize(size_t(batch * stride));
        for (int64_t n = 0; n < batch; ++n) {
            typename Kind::X* to = numbers.data() + n * stride;
            if constexpr (Kind::CODES)
                split(weight, x + n * columns, to);
            else if constexpr (sizeof(typename Kind::X) == 2)
                for (int64_t i = 0; i < columns; ++i) std::memcpy(to + i, reinterpret_cast<const char*>(x + n * columns + i) + 2, 2);
            else
                std::memcpy(to, x + n * columns, size_t(columns) * sizeof(float));
        }
    }

    TARGET void split(const Weight& weight, const float* x, int8_t* to) {
        const int64_t columns = weight.columns, group = columns / weight.groups;
        float most = 0, sound = 0;
        for (int64_t i = 0; i < columns; ++i) {
            most = std::max(most, std::fabs(x[i]));
            sound += x[i] * 0;  // not a number, as the result must be, where x is infinite or no number
        }
        const float step = most / LARGEST;
        const float inverse = sound == 0 && step > 0 ? 1 / step : 0;
        factors.push_back(step + sound);
        int64_t sum = 0;
        for (int64_t i = 0; i < columns; ++i) {
            const float number = std::min(LARGEST, std::max(-LARGEST, std::nearbyint(x[i] * inverse)));
            int32_t rest = int32_t(number);
            sum += rest;
            for (int k = 0; k < 3; ++k) {
                const int8_t digit = int8_t(rest);
                to[i / 64 * 192 + k * 64 + i % 64] = digit;
                rest = (rest - digit) >> 8;
            }
            if ((i + 1) % group == 0) {
                sums.push_back(float(sum));
                sum = 0;
            }
        }
    }
};

// How a band is summed: by segments of whole chunks that share a step, or whose groups have each some lanes of their own.
struct Grid {
    int64_t chunks, segment;      // of a row; of a segment
    int64_t groups, each;         // of a row; of a segment
    __m512i lanes, places;        // which group of a segment a lane of sums, and of codes, belongs to
    std::vector<float> scales;    // by row, with room for a vector after it
    std::vector<uint8_t> zeros;

    TARGET Grid(const Weight& weight, int64_t length) : groups(weight.groups) {
        chunks = segment = (weight.columns + length - 1) / length;
        each = 1;
        const int64_t group = weight.columns / groups;
        if (groups > 1) {
            segment = std::max<int64_t>(1, group / length);
            each = std::max<int64_t>(1, length / group);
        }
        int32_t lane[16];
        int8_t place[64];
        for (int i = 0; i < 64; ++i) lane[i / 4] = place[i] = int8_t(each > 1 ? i / group : 0);
        lanes = _mm512_loadu_si512(lane);
        places = _mm512_loadu_si512(place);
        scales.resize(size_t(ROWS * (groups + 16)));
        zeros.resize(size_t(ROWS * (groups + 64)));
    }
    TARGET void read(const Weight& weight, int64_t band) {
        const int64_t rows = std::min(ROWS, weight.rows - ROWS * band);
        for (int64_t r = 0; r < rows; ++r)
            for (int64_t g = 0, at = (ROWS * band + r) * groups; g < groups; ++g, ++at) {
                scales[size_t(r * (groups + 16) + g)] = scale(weight, at);
                zeros[size_t(r * (groups + 64) + g)] = weight.zeros ? weight.zeros[at] : uint8_t(weight.zero);
            }
    }
    INLINE float scale(const Weight& weight, int64_t at) {
        if (weight.scale_type == 0) return static_cast<const float*>(weight.scales)[at];
        const int half = static_cast<const uint16_t*>(weight.scales)[at];
        if (weight.scale_type == 1) return _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128(half << 16)));
        return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(half)));
    }
    INLINE __m512 steps(const Grid& grid, int64_t r, int64_t s) {
        const float* scales = grid.scales.data() + r * (grid.groups + 16) + s * grid.each;
        return _mm512_permutexvar_ps(grid.lanes, _mm512_loadu_ps(scales));
    }
    INLINE __m512i fill(const Grid& grid, int64_t r, int64_t s) {
        const uint8_t* zeros = grid.zeros.data() + r * (grid.groups + 64) + s * grid.each;
        return _mm512_permutexvar_epi8(grid.places, _mm512_loadu_si512(zeros));
    }
    // What the codes of zero add to a row.
    TARGET float excess(int64_t r, const float* sums) const {
        float result = 0;
        for (int64_t g = 0; g < groups; ++g)
            result += scales[size_t(r * (groups + 16) + g)] * zeros[size_t(r * (groups + 64) + g)] * sums[g];
        return result;
    }
};

// A band of a weight, expanded as it is read.
template <typename Kind> struct Stream {
    const typename Kind::Word* masks;
    const uint8_t* values;
    __m512i fills[ROWS];

    INLINE Stream of(const Weight& weight, int64_t band) {
        const int64_t chunks = (weight.columns + Kind::LENGTH - 1) / Kind::LENGTH;
        const auto* masks = static_cast<const typename Kind::Word*>(weight.masks);
        return {masks + band * chunks * ROWS, weight.values + weight.offsets[band], {}};
    }
    INLINE void enter(Stream& stream, const Grid& grid, int64_t s) {
        if constexpr (Kind::CODES)
            for (int64_t r = 0; r < ROWS; ++r) stream.fills[r] = Grid::fill(grid, r, s);
    }
    INLINE typename Kind::Vector next(Stream& stream, int64_t, int64_t r) {
        if (r % 2 == 0) _mm_prefetch(reinterpret_cast<const char*>(stream.values + AHEAD), _MM_HINT_T0);
        typename Kind::Word mask = *stream.masks++;
        asm volatile("" : "+r"(mask));  // one load for both its uses
        const typename Kind::Vector w = Kind::expand(mask, stream.values, stream.fills[r]);
        stream.values += Kind::size(mask);
        return w;
    }
};

// Chunks of a band that were expanded before.
template <typename Kind> struct Tile {
    static constexpr int64_t CHUNKS = TILE / Kind::LENGTH;
    alignas(64) typename Kind::Vector chunks[CHUNKS][ROWS];
    INLINE typename Kind::Vector next(Tile& tile, int64_t c, int64_t r) { return tile.chunks[c][r]; }
};

struct alignas(64) Totals {
    __m512 of[ROWS];
};

// Adds the product of some chunks of a segment and N rows of x.
template <typename Kind, int N, typename Source>
INLINE void add(Source& source, const Grid& grid, int64_t s, int64_t chunks, const typename Kind::X* x, int64_t stride,
                Totals* totals) {
    typename Kind::Sum sums[N][ROWS];
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n)
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; ++r) sums[n][r] = Kind::none();
    for (int64_t c = 0; c < chunks; ++c, x += Kind::STRIDE) {
        typename Kind::Inputs inputs[N];
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) inputs[n] = Kind::inputs(x + n * stride);
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; ++r) {
            const typename Kind::Vector w = Source::next(source, c, r);
#pragma GCC unroll 4
            for (int n = 0; n < N; ++n) sums[n][r] = Kind::add(sums[n][r], w, inputs[n]);
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) {
        __m512 steps = _mm512_set1_ps(1);
        if constexpr (Kind::CODES) steps = Grid::steps(grid, r, s);
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n)
            totals[n].of[r] = _mm512_fmadd_ps(Kind::total(sums[n][r]), steps, totals[n].of[r]);
    }
}

// Some bands times `batch` rows of x; a few (N, if there is one) at once as the band is read, or more from its tiles.
template <typename Kind, int N>
TARGET void bands(const Weight& weight, const Rows<Kind>& rows, int64_t batch, float* y, int64_t first, int64_t last) {
    Grid grid(weight, Kind::LENGTH);
    Tile<Kind> tile;
    std::vector<Totals> totals(static_cast<size_t>(batch));
    const int64_t most = N ? grid.segment : std::min(grid.segment, Tile<Kind>::CHUNKS);
    for (int64_t band = first; band < last; ++band) {
        if constexpr (Kind::CODES) grid.read(weight, band);
        Stream<Kind> stream = Stream<Kind>::of(weight, band);
        for (Totals& each : totals)
            for (__m512& total : each.of) total = _mm512_setzero_ps();
        for (int64_t begin = 0; begin < grid.chunks;) {
            const int64_t s = begin / grid.segment, end = std::min({grid.chunks, begin + most, (s + 1) * grid.segment});
            const typename Kind::X* x = rows.numbers.data() + begin * Kind::STRIDE;
            Stream<Kind>::enter(stream, grid, s);
            if constexpr (N > 0) {
                add<Kind, N>(stream, grid, s, end - begin, x, rows.stride, totals.data());
            } else {
                for (int64_t c = 0; c < end - begin; ++c)
                    for (int64_t r = 0; r < ROWS; ++r) tile.chunks[c][r] = Stream<Kind>::next(stream, c, r);
                int64_t n = 0;
                for (; n + Kind::TOGETHER <= batch; n += Kind::TOGETHER)
                    add<Kind, Kind::TOGETHER>(tile, grid, s, end - begin, x + n * rows.stride, rows.stride, &totals[size_t(n)]);
                for (; n < batch; ++n)
                    add<Kind, 1>(tile, grid, s, end - begin, x + n * rows.stride, rows.stride, &totals[size_t(n)]);
            }
            begin = end;
        }
        for (int64_t n = 0; n < batch; ++n)
            for (int64_t r = 0; r < std::min(ROWS, weight.rows - ROWS * band); ++r) {
                float result = _mm512_reduce_add_ps(totals[size_t(n)].of[r]);
                if constexpr (Kind::CODES)
                    result = rows.factors[size_t(n)] * (result - grid.excess(r, rows.sums.data() + n * grid.groups));
                y[n * weight.rows + ROWS * band + r] = result;
            }
    }
}

// The first band of a part, if the parts have the same number of bytes to read: learned rows differ in what they keep.
template <typename Kind> int64_t first_band(const Weight& weight, int64_t part, int64_t parts) {
    const int64_t all = (weight.rows + ROWS - 1) / ROWS;
    const int64_t masks = (weight.columns + Kind::LENGTH - 1) / Kind::LENGTH * ROWS * int64_t(sizeof(typename Kind::Word));
    const int64_t aim = (weight.offsets[all] + all * masks) * part / parts;
    int64_t low = 0, high = all;
    while (low < high) {
        const int64_t middle = (low + high) / 2;
        if (weight.offsets[middle] + middle * masks < aim)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

template <typename Kind> void multiply(const Weight& weight, const float* x, int64_t batch, float* y, int64_t threads) {
    const Rows<Kind> rows(weight, x, batch);
    constexpr void (*KERNELS[])(const Weight&, const Rows<Kind>&, int64_t, float*, int64_t, int64_t) = {
        bands<Kind, 0>, bands<Kind, 1>, bands<Kind, 2>, bands<Kind, Kind::TOGETHER == 4 ? 3 : 0>, bands<Kind, Kind::TOGETHER == 4 ? 4 : 0>};
    const auto kernel = KERNELS[batch <= 4 ? batch : 0];
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t part = 0; part < threads; ++part)
        kernel(weight, rows, batch, y, first_band<Kind>(weight, part, threads), first_band<Kind>(weight, part + 1, threads));
}

INLINE void store(void* to, __m512i v, uint64_t kept) { _mm512_mask_storeu_epi8(to, kept, v); }
INLINE void store(void* to, __m512 v, uint64_t kept) { store(to, _mm512_castps_si512(v), kept); }

// Some bands dense, as values or as codes.
template <typename Kind> TARGET void expanded(const Weight& weight, int64_t band, int64_t start, char* out) {
    Grid grid(weight, Kind::LENGTH);
    if constexpr (Kind::CODES) grid.read(weight, band);
    Stream<Kind> stream = Stream<Kind>::of(weight, band);
    const int64_t width = weight.columns * (64 / Kind::LENGTH);  // bytes of a row
    for (int64_t c = 0; c < grid.chunks; ++c) {
        if (c % grid.segment == 0) Stream<Kind>::enter(stream, grid, c / grid.segment);
        const int64_t left = std::min<int64_t>(64, width - 64 * c);
        for (int64_t r = 0; r < ROWS; ++r) {
            const typename Kind::Vector w = Stream<Kind>::next(stream, c, r);
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

#define KIND(NAME, PATH, KERNEL)                                                                                       \
    extern "C" void multiply_##NAME##_##PATH(const Weight* weight, const float* x, int64_t batch, float* y,            \
                                             int64_t threads) {                                                        \
        multiply<KERNEL>(*weight, x, batch, y, threads);                                                               \
    }                                                                                                                  \
    extern "C" void expand_##NAME##_##PATH(const Weight* weight, int64_t first, int64_t last, char* out,               \
                                           int64_t threads) {                                                          \
        expand<KERNEL>(*weight, first, last, out, threads);                                                            \
    }

#define ALL(PATH, BFLOAT16)         \
    KIND(float32, PATH, Float32)    \
    KIND(bfloat16, PATH, BFLOAT16)  \
    KIND(float16, PATH, Float16)    \
    KIND(int8, PATH, Int8)          \
    KIND(int4, PATH, Int4)

ALL(avx512, BFloat16)
ALL(avx512bf16, BFloat16Pairs)

extern "C" int has_avx512() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vbmi2") &&
           __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("popcnt");
}
extern "C" int has_avx512bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
#endif
