// What the kernels for AVX-512 share: vectors, and rows of x in fixed point, which codes meet as whole numbers.
#include <immintrin.h>

#include "sparse.hpp"

#define TARGET \
    __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vbmi2,avx512vnni,f16c,popcnt")))
#define INLINE TARGET __attribute__((always_inline)) static inline

namespace {

constexpr int64_t AHEAD = 6144;  // bytes that are fetched before they are met

enum Fetch { OUTER = _MM_HINT_T1, FIRST = _MM_HINT_T0, PAST = _MM_HINT_NTA };  // caches; or past the outer ones

// Whether the processor has what TARGET asks for.
inline bool has_all() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vbmi2") &&
           __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("popcnt");
}

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

INLINE __mmask16 inside(int64_t left) { return left < 16 ? __mmask16((1 << left) - 1) : __mmask16(-1); }

// 64 columns of a row of x.
struct alignas(64) Digits {
    int8_t of[3][64];  // from the last digit to the first, to the base 256
    int64_t wide;      // whether a number has a third digit: few are so much larger than the rest
};

// Rows of x as digits, with zeros to the end of the last 64 columns: in float32 as fine as three digits are, in half
// precision in units that let most numbers do with two. Where a row has an infinite number, or one that is none, its unit
// is no number.
struct FixedPoint {
    int64_t batch, stride;  // rows; chunks of 64 columns
    std::vector<Digits> numbers;
    std::vector<float> factors;  // what a unit of the last digit is worth, by row

    TARGET FixedPoint(const Weight& weight, const float* x, int64_t batch)
        : batch(batch), stride((weight.columns + 63) / 64), numbers(size_t(batch * stride)) {
        for (int64_t n = 0; n < batch; ++n) split(weight, x + n * weight.columns, numbers.data() + n * stride);
    }
    TARGET void split(const Weight& weight, const float* x, Digits* to) {
        const int64_t columns = weight.columns;
        __m512 most = _mm512_setzero_ps(), all = most, sound = most;
        for (int64_t i = 0; i < columns; i += 16) {
            const __m512 part = _mm512_maskz_loadu_ps(inside(columns - i), x + i);
            most = _mm512_max_ps(most, _mm512_abs_ps(part));
            all = _mm512_add_ps(all, _mm512_abs_ps(part));
            sound = _mm512_fmadd_ps(part, _mm512_setzero_ps(), sound);
        }
        const float trouble = _mm512_reduce_add_ps(sound), largest = _mm512_reduce_max_ps(most);
        const float fine = weight.scale_type ? _mm512_reduce_add_ps(all) / float(columns) / FINE : 0;
        const float unit = std::max(largest / THREE, std::min(largest / TWO, fine));
        const __m512 inverse = _mm512_set1_ps(trouble == 0 && unit > 0 ? 1 / unit : 0);
        const __m512i limit = _mm512_set1_epi32(int32_t(THREE)), opposite = _mm512_set1_epi32(-int32_t(THREE));
        for (int64_t i = 0; i < columns; i += 16) {
            const __m512 part = _mm512_maskz_loadu_ps(inside(columns - i), x + i);
            __m512i number = _mm512_cvtps_epi32(_mm512_mul_ps(part, inverse));
            number = _mm512_max_epi32(_mm512_min_epi32(number, limit), opposite);
            for (int64_t k = 0; k < 3; ++k) {
                const __m128i digits = _mm512_cvtepi32_epi8(number);
                _mm_store_si128(reinterpret_cast<__m128i*>(&to[i / 64].of[k][i % 64]), digits);
                if (k == 2) to[i / 64].wide |= _mm512_test_epi32_mask(number, number);
                number = _mm512_srai_epi32(_mm512_sub_epi32(number, _mm512_cvtepi8_epi32(digits)), 8);
            }
        }
        factors.push_back(unit + trouble);
    }
    // The sum of a digit over the 64 columns from one of them on, in lanes of four columns each.
    INLINE __m512i summed(const Digits& of, int64_t digit) {
        return _mm512_dpbusd_epi32(_mm512_setzero_si512(), _mm512_set1_epi8(1), _mm512_load_si512(of.of[digit]));
    }
};

}  // namespace
