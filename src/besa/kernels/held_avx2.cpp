// Codes that are held dense, for processors with AVX2: by eight rows and four bytes of each, as besa.kernels.held_dense
// lays them out.
//
// The registers then hold the sums of eight rows, one in each lane, and a group ends for all of them at once. A band is one
// stream of bytes: of each group its steps, its codes of zero unless all are one, and its codes.
#if defined(__x86_64__)
#include "avx2.hpp"

namespace {

constexpr int64_t HIGH = 8;      // rows of a band
constexpr int64_t VECTOR = 32;   // bytes: a step, of eight rows
constexpr int64_t AHEAD = 4096;  // bytes that are fetched before they are met

INLINE __m256i loaded(const uint8_t* at) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)); }
INLINE __m256i everywhere(const void* four) {  // the same four bytes in every lane
    int32_t bytes;
    std::memcpy(&bytes, four, sizeof bytes);
    return _mm256_set1_epi32(bytes);
}

// Adds to a sum, which stays in its register: compilers put such additions into another order, and sums into memory.
INLINE void increase(__m256i& sum, __m256i more) { asm("vpaddd %1, %0, %0" : "+x"(sum) : "x"(more)); }
INLINE void increase_16(__m256i& sums, __m256i more) { asm("vpaddw %1, %0, %0" : "+x"(sums) : "x"(more)); }

// Kinds of codes. A step has COLUMNS columns; the sums of LONGEST steps fit into 32 bits, and few of such pieces of x have a
// higher part. X is what meets a step, of the lower part of x, which is worth 1, or of the higher one.
struct Int4 {
    static constexpr int64_t COLUMNS = 8, LONGEST = 32;
    struct X {
        int8_t of[2][8];  // digits to the base 256, the last one first
    };
    // The lower parts of whole numbers: what their last two digits are worth. A digit is a byte of a number made positive.
    INLINED static __m256i lower(__m256i numbers) {
        const __m256i middle = _mm256_set1_epi32(0x8080), bytes = _mm256_add_epi32(numbers, middle);
        return _mm256_sub_epi32(_mm256_and_si256(bytes, _mm256_set1_epi32(0xffff)), middle);
    }
    // Eight numbers.
    INLINED static void split(__m256i numbers, X* low, X* high) {
        const __m256i middle = _mm256_set1_epi32(0x808080);
        const __m256i by_digit = _mm256_broadcastsi128_si256(
            _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, -1, -1, -1, -1));
        __m256i digits = _mm256_xor_si256(_mm256_add_epi32(numbers, middle), middle);
        digits = _mm256_shuffle_epi8(digits, by_digit);
        digits = _mm256_permutevar8x32_epi32(digits, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(low), _mm256_castsi256_si128(digits));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(high), _mm256_extracti128_si256(digits, 1));
    }

    // Adds the products of STEPS steps: sums of so many fit into 16 bits.
    template <int STEPS, int BANDS, int N>
    INLINED static void add(const uint8_t* const (&codes)[BANDS], const X* const (&x)[N], __m256i (&sums)[BANDS][N]) {
        static_assert(STEPS <= 4);
        const __m256i four = _mm256_set1_epi8(15);
        __m256i of[2][BANDS][N] = {};
        times<STEPS>([&](auto s) INLINED {
            __m256i halves[2][BANDS];
            times<BANDS>([&](auto b) INLINED {
                const __m256i pairs = loaded(codes[b] + VECTOR * s);
                halves[0][b] = _mm256_and_si256(pairs, four);
                halves[1][b] = _mm256_and_si256(_mm256_srli_epi16(pairs, 4), four);
            });
            times<4 * N>([&](auto i) INLINED {
                constexpr int D = i % 2, H = i / 2 % 2, K = i / 4;
                const __m256i digits = everywhere(x[K][s].of[D] + 4 * H);
                times<BANDS>([&](auto b) INLINED {
                    increase_16(of[D][b][K], _mm256_maddubs_epi16(halves[H][b], digits));
                });
            });
        });
        times<BANDS * N>([&](auto i) INLINED {
            constexpr int B = i / N, K = i % N;
            increase(sums[B][K], _mm256_madd_epi16(of[0][B][K], _mm256_set1_epi16(1)));
            increase(sums[B][K], _mm256_madd_epi16(of[1][B][K], _mm256_set1_epi16(256)));
        });
    }
};

struct Int8 {
    static constexpr int64_t COLUMNS = 4, LONGEST = 64;
    struct X {
        int16_t of[2][2];  // the even columns and the odd ones
    };
    // The lower parts of whole numbers: of sixteen bits.
    INLINED static __m256i lower(__m256i numbers) { return _mm256_srai_epi32(_mm256_slli_epi32(numbers, 16), 16); }
    // Eight numbers.
    INLINED static void split(__m256i numbers, X* low, X* high) {
        const __m256i by_part = _mm256_broadcastsi128_si256(
            _mm_setr_epi8(0, 1, 8, 9, 4, 5, 12, 13, 2, 3, 10, 11, 6, 7, 14, 15));
        __m256i parts = _mm256_sub_epi32(numbers, lower(numbers));
        parts = _mm256_blend_epi16(numbers, parts, 0xaa);
        parts = _mm256_permute4x64_epi64(_mm256_shuffle_epi8(parts, by_part), 0xd8);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(low), _mm256_castsi256_si128(parts));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(high), _mm256_extracti128_si256(parts, 1));
    }

    template <int STEPS, int BANDS, int N>
    INLINED static void add(const uint8_t* const (&codes)[BANDS], const X* const (&x)[N], __m256i (&sums)[BANDS][N]) {
        times<STEPS>([&](auto s) INLINED {
            __m256i halves[2][BANDS];
            times<BANDS>([&](auto b) INLINED {
                const __m256i bytes = loaded(codes[b] + VECTOR * s);
                halves[0][b] = _mm256_and_si256(bytes, _mm256_set1_epi16(255));
                halves[1][b] = _mm256_srli_epi16(bytes, 8);
            });
            times<2 * N>([&](auto i) INLINED {
                constexpr int H = i % 2, K = i / 2;
                const __m256i numbers = everywhere(x[K][s].of[H]);
                times<BANDS>([&](auto b) INLINED {
                    increase(sums[b][K], _mm256_madd_epi16(halves[H][b], numbers));
                });
            });
        });
    }
};

// How a band lies in memory.
template <typename Kind> struct Layout {
    int64_t groups, steps;       // of a row; of a group
    int64_t scales, zeros, size;  // bytes: of the steps of a group's rows, of their codes of zero, of a band

    explicit Layout(const Weight& weight) : groups(weight.groups) {
        const int64_t four = 4 * Kind::COLUMNS;
        steps = groups > 1 ? weight.columns / groups / Kind::COLUMNS : (weight.columns + four - 1) / four * 4;
        scales = HIGH * (weight.scale_type ? 2 : 4);
        zeros = weight.zeros ? HIGH : 0;
        size = groups * (scales + zeros + VECTOR * steps);
    }
    int64_t pieces() const { return (steps + Kind::LONGEST - 1) / Kind::LONGEST; }  // of a group
};

// Rows of x, and of each piece of a group the sums of both parts.
template <typename Kind> struct Rows {
    struct Piece {
        int32_t low, high;  // the opposite, by the code of zero if all rows have the same
        bool wide;          // whether a number has a higher part: few are so much larger than the rest
    };
    int64_t stride;  // steps of a row
    std::vector<typename Kind::X> low, high;
    std::vector<Piece> pieces;
    std::vector<float> factors;

    TARGET Rows(const Weight& weight, const Layout<Kind>& layout, const float* x, int64_t batch)
        : stride(layout.groups * layout.steps), low(size_t(batch * stride)), high(low.size()) {
        pieces.reserve(size_t(batch * layout.groups * layout.pieces()));
        for (int64_t n = 0; n < batch; ++n) {
            const Whole row(weight, x + n * weight.columns, stride * Kind::COLUMNS);
            factors.push_back(row.factor);
            for (int64_t g = 0; g < layout.groups; ++g)
                for (int64_t done = 0; done < layout.steps; done += Kind::LONGEST) {
                    const int64_t first = g * layout.steps + done, steps = std::min(Kind::LONGEST, layout.steps - done);
                    pieces.push_back(split(weight, &row.numbers[size_t(first * Kind::COLUMNS)], steps,
                                           &low[size_t(n * stride + first)], &high[size_t(n * stride + first)]));
                }
        }
    }
    TARGET static Piece split(const Weight& weight, const int32_t* from, int64_t steps, typename Kind::X* low,
                              typename Kind::X* high) {
        constexpr int64_t EIGHT = 8 / Kind::COLUMNS;  // columns, in steps
        __m256i lower = _mm256_setzero_si256(), higher = lower, any = lower;
        for (int64_t step = 0; step < steps; step += EIGHT, from += 8) {
            const __m256i numbers = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
            const __m256i part = Kind::lower(numbers);
            const __m256i rest = _mm256_srai_epi32(_mm256_sub_epi32(numbers, part), 16);
            lower = _mm256_add_epi32(lower, part);
            higher = _mm256_add_epi32(higher, rest);
            any = _mm256_or_si256(any, rest);
            Kind::split(numbers, low + step, high + step);
        }
        const int32_t zero = weight.zeros ? 1 : int32_t(weight.zero);
        return {-zero * summed(lower), -zero * summed(higher), !_mm256_testz_si256(any, any)};
    }
    TARGET static int32_t summed(__m256i lanes) {
        int32_t of[8];
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(of), lanes);
        return std::accumulate(of, of + 8, 0);
    }
};

// The steps of eight rows.
INLINE __m256 scales_at(const Weight& weight, const uint8_t* at) {
    if (weight.scale_type == 0) return _mm256_loadu_ps(reinterpret_cast<const float*>(at));
    const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(at));
    if (weight.scale_type == 2) return _mm256_cvtph_ps(halves);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
}
// What sums begin with: what codes of zero add, taken off.
INLINE __m256i begun(const Weight& weight, const uint8_t* zeros, int32_t x) {
    const __m256i taken = _mm256_set1_epi32(x);
    if (!weight.zeros) return taken;
    return _mm256_mullo_epi32(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(zeros))), taken);
}

// Adds the products of some steps of BANDS bands with N rows of x, STEPS at a time.
template <typename Kind, int STEPS, int BANDS, int N>
INLINE void meet(const uint8_t* const (&codes)[BANDS], const typename Kind::X* const (&x)[N], int64_t steps,
                 __m256i (&sums)[BANDS][N]) {
    const uint8_t* from[BANDS];
    const typename Kind::X* here[N];
    for (int b = 0; b < BANDS; ++b) from[b] = codes[b];
    for (int n = 0; n < N; ++n) here[n] = x[n];
    for (int64_t step = 0; step < steps; step += STEPS) {
        for (int b = 0; b < BANDS; ++b)
            for (int64_t line = 0; line < VECTOR * STEPS; line += 64)
                _mm_prefetch(reinterpret_cast<const char*>(from[b] + line + AHEAD), _MM_HINT_T0);
        Kind::template add<STEPS, BANDS, N>(from, here, sums);
        for (int b = 0; b < BANDS; ++b) from[b] += VECTOR * STEPS;
        for (int n = 0; n < N; ++n) here[n] += STEPS;
    }
}

// Some bands times N rows of x from the n-th on: BANDS at once from as many places, as memory gives more then.
template <typename Kind, int STEPS, int BANDS, int N>
TARGET void together(const Weight& weight, const Layout<Kind>& layout, const Rows<Kind>& rows, float* y, int64_t band,
                     int64_t apart, int64_t n) {
    const uint8_t* at[BANDS];
    __m256 all[BANDS][N];
    for (int b = 0; b < BANDS; ++b) {
        at[b] = weight.values + (band + b * apart) * layout.size;
        for (int k = 0; k < N; ++k) all[b][k] = _mm256_setzero_ps();
    }
    const int64_t pieces = layout.pieces(), of_row = layout.groups * pieces;
    const auto* piece = &rows.pieces[size_t(n * of_row)];
    int64_t first = n * rows.stride;
    for (int64_t g = 0; g < layout.groups; ++g) {
        const uint8_t* heads[BANDS];
        for (int b = 0; b < BANDS; ++b) heads[b] = at[b], at[b] += layout.scales + layout.zeros;
        for (int64_t done = 0; done < layout.steps; done += Kind::LONGEST, ++piece) {
            const int64_t steps = std::min(Kind::LONGEST, layout.steps - done);
            const typename Kind::X *low[N], *high[N];
            bool wide = false;
            for (int k = 0; k < N; ++k) {
                low[k] = &rows.low[size_t(first + k * rows.stride)];
                high[k] = &rows.high[size_t(first + k * rows.stride)];
                wide |= piece[k * of_row].wide;
            }
            __m256i sums[BANDS][N];
            __m256 total[BANDS][N];
            for (int i = 0; i < BANDS * N; ++i)
                sums[i / N][i % N] = begun(weight, heads[i / N] + layout.scales, piece[i % N * of_row].low);
            meet<Kind, STEPS, BANDS, N>(at, low, steps, sums);
            for (int i = 0; i < BANDS * N; ++i) total[i / N][i % N] = _mm256_cvtepi32_ps(sums[i / N][i % N]);
            if (__builtin_expect(wide, 0)) {
                for (int i = 0; i < BANDS * N; ++i)
                    sums[i / N][i % N] = begun(weight, heads[i / N] + layout.scales, piece[i % N * of_row].high);
                meet<Kind, STEPS, BANDS, N>(at, high, steps, sums);
                for (int i = 0; i < BANDS * N; ++i) {
                    const __m256 higher = _mm256_cvtepi32_ps(sums[i / N][i % N]);
                    total[i / N][i % N] = _mm256_fmadd_ps(higher, _mm256_set1_ps(65536), total[i / N][i % N]);
                }
            }
            for (int b = 0; b < BANDS; ++b) {
                const __m256 scales = scales_at(weight, heads[b]);
                for (int k = 0; k < N; ++k) all[b][k] = _mm256_fmadd_ps(total[b][k], scales, all[b][k]);
                at[b] += VECTOR * steps;
            }
            first += steps;
        }
    }
    for (int b = 0; b < BANDS; ++b)
        for (int k = 0; k < N; ++k) {
            const int64_t row = HIGH * (band + b * apart);
            float eight[HIGH];
            _mm256_storeu_ps(eight, _mm256_mul_ps(all[b][k], _mm256_set1_ps(rows.factors[size_t(n + k)])));
            std::memcpy(y + (n + k) * weight.rows + row, eight,
                        size_t(std::min(HIGH, weight.rows - row)) * sizeof(float));
        }
}

// Some bands times all rows of x.
template <typename Kind, int STEPS>
void some(const Weight& weight, const Layout<Kind>& layout, const Rows<Kind>& rows, float* y, int64_t first, int64_t last) {
    const int64_t batch = int64_t(rows.factors.size()), half = batch == 1 ? (last - first) / 2 : 0;
    for (int64_t band = first; band < first + half; ++band)
        together<Kind, STEPS, 2, 1>(weight, layout, rows, y, band, half, 0);
    for (int64_t band = first + 2 * half; band < last; ++band) {
        int64_t n = 0;
        for (; n + 4 <= batch; n += 4) together<Kind, STEPS, 1, 4>(weight, layout, rows, y, band, 0, n);
        for (; n < batch; ++n) together<Kind, STEPS, 1, 1>(weight, layout, rows, y, band, 0, n);
    }
}

template <typename Kind>
void multiply(const Weight& weight, const float* x, int64_t batch, float* y, int64_t threads) {
    const Layout<Kind> layout(weight);
    const Rows<Kind> rows(weight, layout, x, batch);
    const auto work = layout.steps % 4 ? some<Kind, 1> : some<Kind, 4>;
    const int64_t all = (weight.rows + HIGH - 1) / HIGH;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t part = 0; part < threads; ++part)
        work(weight, layout, rows, y, all * part / threads, all * (part + 1) / threads);
}

}  // namespace

// y (batch, rows) of x (batch, columns) for a weight whose values are as laid out; x and y in float32, or in bfloat16.
#define HELD(NAME, KIND)                                                                                               \
    extern "C" void multiply_held_##NAME##_avx2(const Weight* weight, const float* x, int64_t batch, float* y,         \
                                                int64_t threads) {                                                     \
        multiply<KIND>(*weight, x, batch, y, threads);                                                                 \
    }                                                                                                                  \
    extern "C" void halves_held_##NAME##_avx2(const Weight* weight, const uint16_t* x, int64_t batch, uint16_t* y,     \
                                              int64_t threads) {                                                       \
        in_halves(multiply_held_##NAME##_avx2, weight, x, batch, y, threads);                                          \
    }
HELD(int4, Int4)
HELD(int8, Int8)

// Whether the processor can run them.
extern "C" int has_avx2() { return has_all(); }
#endif
