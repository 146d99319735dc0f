// Codes of four bits that are held in another order than in the file, for processors with AVX-512: by sixteen rows and
// four columns, as besa.kernels.held_fours has them laid out.
//
// The registers then hold the sums of sixteen rows, one in each lane, and a group ends for all of them at once. In the
// order of the file a register is of one row: closing its groups, of 64 columns, takes as long as the products. Codes of
// even runs are in the lower halves of the bytes of a band and those of odd runs in the higher ones, so that nothing need
// be shuffled apart (docs/log.md).
#if defined(__x86_64__)
#include "avx512.hpp"

namespace {

constexpr int64_t HIGH = 16;   // rows of a band
constexpr int64_t SHORT = 32;  // columns of the only group that is shorter than 64
constexpr uint64_t EVEN = 0x0f0f0f0f0f0f0f0f;  // of a mask of 64 columns, the columns of even runs

// How a band lies in memory. Of each group: sixteen steps, sixteen codes of zero unless all are one, and the masks of its
// runs, whose bit 4·r + i stands for column i of row r.
struct Layout {
    int64_t groups, runs;        // of a row; of a group
    int64_t steps, zeros, size;  // bytes: of the steps of a group, of its codes of zero, of a band

    explicit Layout(const Weight& weight) : groups(weight.groups) {
        const int64_t group = weight.columns / groups;
        runs = groups > 1 && group == SHORT ? SHORT / 4 : (group + 63) / 64 * 16;
        steps = HIGH * (weight.scale_type ? 2 : 4);
        zeros = weight.zeros ? HIGH : 0;
        size = groups * (steps + zeros + 8 * runs);
    }
};

int64_t bands_of(const Weight& weight) { return (weight.rows + HIGH - 1) / HIGH; }

// The masks of a row in the order of the file.
struct Row {
    const uint64_t* masks;
    int64_t chunks;

    Row(const Weight& weight, int64_t row) : chunks((weight.columns + 63) / 64) {
        masks = static_cast<const uint64_t*>(weight.masks) + row / ROWS * chunks * ROWS + row % ROWS;
    }
    uint64_t mask(int64_t c) const { return masks[c * ROWS]; }
};

// Bytes of the codes of a band.
TARGET int64_t length(const Weight& weight, int64_t band) {
    int64_t even = 0, odd = 0;
    for (int64_t row = HIGH * band; row < std::min(weight.rows, HIGH * (band + 1)); ++row) {
        const Row of(weight, row);
        for (int64_t c = 0; c < of.chunks; ++c) {
            even += _mm_popcnt_u64(of.mask(c) & EVEN);
            odd += _mm_popcnt_u64(of.mask(c) & ~EVEN);
        }
    }
    return std::max(even, odd);
}

// Lays out a band; `codes` begin as zeros.
TARGET void lay_out(const Weight& weight, int64_t band, uint8_t* heads, uint8_t* codes) {
    const Layout layout(weight);
    const int64_t first = HIGH * band, count = std::min(HIGH, weight.rows - first), chunks = (weight.columns + 63) / 64;
    const int64_t step = layout.steps / HIGH, part = layout.steps + layout.zeros;  // bytes of one; before a group's masks
    std::memset(heads, 0, size_t(layout.size));
    for (int64_t g = 0; g < layout.groups; ++g)
        for (int64_t r = 0; r < count; ++r) {
            const int64_t at = (first + r) * layout.groups + g;
            uint8_t* group = heads + g * (part + 8 * layout.runs);
            std::memcpy(group + r * step, static_cast<const uint8_t*>(weight.scales) + at * step, size_t(step));
            if (layout.zeros) group[layout.steps + r] = weight.zeros[at];
        }
    const uint8_t* from[HIGH / ROWS];  // where the next run begins, of the bands of the file
    for (int64_t i = 0; ROWS * i < count; ++i) from[i] = weight.values + weight.offsets[first / ROWS + i];
    uint8_t* to[2] = {codes, codes};
    for (int64_t c = 0; c < chunks; ++c) {
        uint8_t tile[16][HIGH][4];  // runs, rows, columns
        uint64_t masks[16] = {};
        for (int64_t r = 0; r < count; ++r) {
            const uint64_t mask = Row(weight, first + r).mask(c);
            for (int64_t q = 0; q < 16; ++q) masks[q] |= (mask >> 4 * q & 15) << 4 * r;
            int64_t kept = 0;
            for (uint64_t left = mask; left; left &= left - 1, ++kept) {
                const int place = __builtin_ctzll(left);
                tile[place / 4][r][place % 4] = from[r / ROWS][kept / 2] >> kept % 2 * 4 & 15;
            }
            from[r / ROWS] += (kept + 1) / 2;
        }
        for (int64_t q = 0; q < 16 && 16 * c + q < layout.groups * layout.runs; ++q) {
            const int64_t run = 16 * c + q, group = run / layout.runs;
            std::memcpy(heads + (group + 1) * part + 8 * run, &masks[q], 8);
            for (uint64_t left = masks[q]; left; left &= left - 1) {
                const int place = __builtin_ctzll(left);
                *to[q % 2]++ |= uint8_t(tile[q][place / 4][place % 4] << q % 2 * 4);
            }
        }
    }
}

// Sums of N rows of x, by digit; with one row of x even and odd runs have sums of their own, so that an addition need not
// wait for the last one.
template <int N> struct Sums {
    static constexpr int APART = N == 1 ? 2 : 1;
    __m512i of[2][N][APART], third[N];
};

// A band as it is read.
struct Stream {
    const uint8_t *heads, *even, *odd;
};

INLINE void add(__m512i& sum, __m512i codes, const int8_t* four) {
    // Written out, as with the intrinsic gcc 12 copies every sum to and fro.
    asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(codes), "m"(*reinterpret_cast<const int32_t*>(four)));
}

// The products of some runs and N rows of x, whose digits are `x` and 64 bytes after each other. THIRD: some number has a
// third one there.
template <int RUNS, int N, Fetch FETCH, bool THIRD>
INLINE void meet(Stream& at, __m512i fill, const int8_t* const (&x)[N], int64_t ahead, Sums<N>& sums) {
    constexpr auto HINT = decltype(_MM_HINT_T1)(FETCH);
    const __m512i low = _mm512_set1_epi8(15);
#pragma GCC unroll 16
    for (int run = 0; run < RUNS; ++run) {
        const bool odd = run % 2;
        if (run % 8 == 0) _mm_prefetch(reinterpret_cast<const char*>(at.heads + 8 * run + ahead / 2), HINT);
        if (!odd) _mm_prefetch(reinterpret_cast<const char*>(at.even + ahead), HINT);
        uint64_t mask;
        std::memcpy(&mask, at.heads + 8 * run, sizeof mask);
        const uint8_t*& from = odd ? at.odd : at.even;
        const __m512i pairs = _mm512_loadu_si512(from);
        __m512i codes = _mm512_and_si512(odd ? _mm512_srli_epi16(pairs, 4) : pairs, low);
        codes = _mm512_mask_expand_epi8(fill, mask, codes);
        from += _mm_popcnt_u64(mask);
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) {
            const int8_t* four = x[n] + 4 * run;
            add(sums.of[0][n][odd % Sums<N>::APART], codes, four);
            add(sums.of[1][n][odd % Sums<N>::APART], codes, four + 64);
            if constexpr (THIRD) add(sums.third[n], codes, four + 128);
        }
    }
    at.heads += 8 * RUNS;
}

template <int N> INLINE bool wide(const Digits* x, int64_t stride) {
    int64_t found = 0;
    for (int n = 0; n < N; ++n) found |= x[n * stride].wide;
    return found != 0;
}

// The steps of sixteen rows, and their codes of zero.
INLINE __m512 steps_at(const Weight& weight, const uint8_t* at) {
    if (weight.scale_type == 0) return _mm512_loadu_ps(at);
    const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at));
    if (weight.scale_type == 2) return _mm512_cvtph_ps(halves);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}
INLINE __m512i zeros_at(const Weight& weight, const uint8_t* at) {
    if (!weight.zeros) return _mm512_set1_epi32(int32_t(weight.zero));
    return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
}

// Rows of x, and the sums of their groups by digit.
struct Grouped : FixedPoint {
    struct Group {
        int32_t sums[3];
        bool wide;
    };
    std::vector<Group> groups;  // by row

    TARGET Grouped(const Weight& weight, const float* x, int64_t batch)
        : FixedPoint(weight, x, batch), groups(size_t(batch * weight.groups)) {
        const int64_t runs = Layout(weight).runs;  // of a group: half of the 64 columns of digits, or some of these
        for (int64_t n = 0; n < batch; ++n)
            for (int64_t g = 0; g < weight.groups; ++g) {
                Group& group = groups[size_t(n * weight.groups + g)];
                for (int64_t run = g * runs; run < (g + 1) * runs; run += 16) {
                    const Digits& digits = numbers[size_t(n * stride + run / 16)];
                    const auto lanes = __mmask16(runs > 8 ? 0xffff : g % 2 ? 0xff00 : 0x00ff);
                    for (int k = 0; k < 3; ++k) group.sums[k] += _mm512_mask_reduce_add_epi32(lanes, summed(digits, k));
                    group.wide |= digits.wide != 0;
                }
            }
    }
};

// What the sums of a group begin with: what its codes of zero add, taken off.
template <int N> INLINE void start(__m512i zeros, const Grouped::Group* x, int64_t groups, Sums<N>& sums) {
    for (int n = 0; n < N; ++n) {
        const auto off = [&](int digit) TARGET {
            return _mm512_mullo_epi32(zeros, _mm512_set1_epi32(-x[n * groups].sums[digit]));
        };
        for (int digit = 0; digit < 2; ++digit) {
            sums.of[digit][n][0] = off(digit);
            if (Sums<N>::APART > 1) sums.of[digit][n][Sums<N>::APART - 1] = _mm512_setzero_si512();
        }
        sums.third[n] = off(2);
    }
}

// Adds a group that has ended, as often as its steps are worth.
template <int N>
INLINE void finish(const Sums<N>& sums, __m512 steps, const Grouped::Group* x, int64_t groups, __m512 (&all)[N]) {
    const __m512 base = _mm512_set1_ps(256);
    for (int n = 0; n < N; ++n) {
        __m512i of[2] = {sums.of[0][n][0], sums.of[1][n][0]};
        for (int digit = 0; digit < 2 && Sums<N>::APART > 1; ++digit)
            of[digit] = _mm512_add_epi32(of[digit], sums.of[digit][n][Sums<N>::APART - 1]);
        __m512 higher = _mm512_cvtepi32_ps(of[1]);
        if (x[n * groups].wide) higher = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums.third[n]), base, higher);
        const __m512 sum = _mm512_fmadd_ps(higher, base, _mm512_cvtepi32_ps(of[0]));
        all[n] = _mm512_fmadd_ps(sum, steps, all[n]);
    }
}

// Some bands times N rows of x: BANDS at once from as many places, as memory gives more then, each RUNS runs at a time.
template <int RUNS, int N, int BANDS, Fetch FETCH>
TARGET void together(const Weight& weight, const Grouped& x, float* y, int64_t first, int64_t count) {
    const Layout layout(weight);
    const int64_t ahead = weight.ahead ? weight.ahead : AHEAD;
    const __m512i four_times = _mm512_set1_epi32(0x01010101);
    for (int64_t band = first; band < first + count; ++band) {
        Stream streams[BANDS];
        const uint8_t* groups[BANDS];  // heads of those that are read
        Sums<N> unfinished[BANDS] = {};
        __m512 all[BANDS][N];
        for (int b = 0; b < BANDS; ++b) {
            const int64_t index = band + b * count;
            const uint8_t* codes = weight.values + weight.offsets[index];
            streams[b] = {static_cast<const uint8_t*>(weight.masks) + index * layout.size, codes, codes};
            for (int n = 0; n < N; ++n) all[b][n] = _mm512_setzero_ps();
        }
        const Grouped::Group* group = x.groups.data();
        int64_t begun = 0;  // runs of the group
        for (int64_t run = 0; run < layout.groups * layout.runs; run += RUNS) {
            const Digits* digits = x.numbers.data() + run / 16;
#pragma GCC unroll 4
            for (int b = 0; b < BANDS; ++b) {
                Stream stream = streams[b];
                Sums<N> sums = unfinished[b];
                if (begun == 0) {
                    groups[b] = stream.heads;
                    stream.heads += layout.steps + layout.zeros;
                }
                const __m512i zeros = zeros_at(weight, groups[b] + layout.steps);
                if (begun == 0) start<N>(zeros, group, layout.groups, sums);
                const int8_t* of[N];
                for (int n = 0; n < N; ++n) {
                    of[n] = digits[n * x.stride].of[0] + run % 16 * 4;
                    asm("" : "+r"(of[n]));  // or gcc computes all addresses before, and keeps them in vectors
                }
                const __m512i fill = _mm512_mullo_epi32(zeros, four_times);
                if (__builtin_expect(wide<N>(digits, x.stride), 0))
                    meet<RUNS, N, FETCH, true>(stream, fill, of, ahead, sums);
                else
                    meet<RUNS, N, FETCH, false>(stream, fill, of, ahead, sums);
                if (begun + RUNS < layout.runs)
                    unfinished[b] = sums;
                else
                    finish<N>(sums, steps_at(weight, groups[b]), group, layout.groups, all[b]);
                streams[b] = stream;
            }
            begun += RUNS;
            if (begun == layout.runs) begun = 0, ++group;
        }
        for (int b = 0; b < BANDS; ++b) {
            const int64_t row = HIGH * (band + b * count);
            for (int n = 0; n < N; ++n)
                _mm512_mask_storeu_ps(y + n * weight.rows + row, inside(weight.rows - row),
                                      _mm512_mul_ps(all[b][n], _mm512_set1_ps(x.factors[size_t(n)])));
        }
    }
}

template <int RUNS, int N, int BANDS, Fetch FETCH>
TARGET void direct(const Weight& weight, const Grouped& x, float* y, int64_t first, int64_t last) {
    const int64_t count = (last - first) / BANDS;
    together<RUNS, N, BANDS, FETCH>(weight, x, y, first, count);
    together<RUNS, N, 1, FETCH>(weight, x, y, first + BANDS * count, last - first - BANDS * count);
}

template <int RUNS, Fetch FETCH> auto kernel(const Weight& weight, int64_t batch) {
    return batch == 4          ? direct<RUNS, 4, 1, FETCH>
           : batch == 3        ? direct<RUNS, 3, 1, FETCH>
           : batch == 2        ? direct<RUNS, 2, 1, FETCH>
           : weight.bands == 1 ? direct<RUNS, 1, 1, FETCH>
           : weight.bands == 2 ? direct<RUNS, 1, 2, FETCH>
                               : direct<RUNS, 1, 4, FETCH>;
}

template <int RUNS> auto kernel(const Weight& weight, int64_t batch) {
    return (weight.first ? kernel<RUNS, FIRST> : weight.past ? kernel<RUNS, PAST> : kernel<RUNS, OUTER>)(weight, batch);
}

void multiply(const Weight& weight, const float* x, int64_t batch, float* y, int64_t threads) {
    const Grouped rows(weight, x, batch);
    const auto work = Layout(weight).runs == 8 ? kernel<8>(weight, batch) : kernel<16>(weight, batch);
    const int64_t size = Layout(weight).size, all = bands_of(weight);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t part = 0; part < threads; ++part)
        work(weight, rows, y, first_of(weight.offsets, all, size, part, threads),
             first_of(weight.offsets, all, size, part + 1, threads));
}

}  // namespace

// The bytes of the codes of each band of a weight in the order of the file; gives those of a band's head.
extern "C" int64_t held_lengths_avx512(const Weight* weight, int64_t* lengths, int64_t threads) {
    (void)threads;  // without OpenMP
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t band = 0; band < bands_of(*weight); ++band) lengths[band] = length(*weight, band);
    return Layout(*weight).size;
}
// Lays out its bands, whose codes begin at `offsets`, where there are zeros.
extern "C" void held_laid_out_avx512(const Weight* weight, uint8_t* heads, const int64_t* offsets, uint8_t* codes,
                                     int64_t threads) {
    (void)threads;  // without OpenMP
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t band = 0; band < bands_of(*weight); ++band)
        lay_out(*weight, band, heads + band * Layout(*weight).size, codes + offsets[band]);
}
// y (batch, rows) of x (batch, columns), up to four rows, for a weight whose masks, values and offsets are as laid out.
extern "C" void multiply_held_int4_avx512(const Weight* weight, const float* x, int64_t batch, float* y, int64_t threads) {
    multiply(*weight, x, batch, y, threads);
}
extern "C" void halves_held_int4_avx512(const Weight* weight, const uint16_t* x, int64_t batch, uint16_t* y, int64_t threads) {
    in_halves(multiply_held_int4_avx512, weight, x, batch, y, threads);
}

// Whether the processor can run them.
extern "C" int has_avx512() { return has_all(); }
#endif
