// What the kernels for AVX-512 share: vectors, and rows of x in fixed point, which codes meet as whole numbers.
#include <immintrin.h>

#include "sparse.hpp"

#define TARGET \
    __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vbmi2,avx512vnni,f16c,popcnt")))
#define INLINE TARGET __attribute__((always_inline)) static inline
#define INLINED TARGET __attribute__((always_inline))  // of a lambda

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

INLINE __m512i loaded(const void* at) {  // kept apart from an expansion, as the form that does both is slow
    __m512i values = _mm512_loadu_si512(at);
    asm volatile("" : "+v"(values));
    return values;
}
INLINE __m512i fresh() {  // a register made for an expansion, which otherwise waits for what was there before
    __m512i zero;
    asm volatile("vpxord %0, %0, %0" : "=v"(zero));
    return zero;
}
INLINE __mmask16 inside(int64_t left) { return left < 16 ? __mmask16((1 << std::max<int64_t>(left, 0)) - 1) : 0xffff; }

// 64 columns of a row of x.
struct alignas(64) Digits {
    int8_t of[3][64];  // from the last digit to the first, to the base 256
    int64_t wide;      // whether a number has a third digit: few are so much larger than the rest
};

// How a row of x becomes whole numbers: in float32 as fine as three digits are, in half precision in units that let most
// numbers do with two. Where it has an infinite number, or one that is none, the unit is no number.
struct Unit {
    float factor, inverse;  // what a unit is worth; how many one is

    Unit() = default;
    TARGET Unit(const Weight& weight, const float* x) {
        __m512 most = _mm512_setzero_ps(), all = most, sound = most;
        for (int64_t i = 0; i < weight.columns; i += 16) {
            const __m512 part = _mm512_maskz_loadu_ps(inside(weight.columns - i), x + i);
            most = _mm512_max_ps(most, _mm512_abs_ps(part));
            all = _mm512_add_ps(all, _mm512_abs_ps(part));
            sound = _mm512_fmadd_ps(part, _mm512_setzero_ps(), sound);
        }
        const float trouble = _mm512_reduce_add_ps(sound), largest = _mm512_reduce_max_ps(most);
        const float fine = weight.scale_type ? _mm512_reduce_add_ps(all) / float(weight.columns) / FINE : 0;
        const float unit = std::max(largest / THREE, std::min(largest / TWO, fine));
        factor = unit + trouble;
        inverse = trouble == 0 && unit > 0 ? 1 / unit : 0;
    }
    // The digits of so many columns, and zeros after them. Each is a byte of a number that is made positive.
    TARGET void split(const float* x, int64_t columns, Digits& to) const {
        const __m512i limit = _mm512_set1_epi32(int32_t(THREE)), opposite = _mm512_set1_epi32(-int32_t(THREE));
        const __m512i bytes = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
        __m512i of[4];  // 16 columns, of each lane the last bytes, those before them, and so on
        for (int64_t i = 0; i < 4; ++i) {
            const __m512 part = _mm512_maskz_loadu_ps(inside(columns - 16 * i), x + 16 * i);
            __m512i number = _mm512_cvtps_epi32(_mm512_mul_ps(part, _mm512_set1_ps(inverse)));
            number = _mm512_max_epi32(_mm512_min_epi32(number, limit), opposite);
            of[i] = _mm512_shuffle_epi8(_mm512_add_epi32(number, _mm512_set1_epi32(0x808080)), bytes);
        }
        const __m512i first = _mm512_unpacklo_epi32(of[0], of[1]), second = _mm512_unpacklo_epi32(of[2], of[3]);
        const __m512i digits[3] = {
            _mm512_unpacklo_epi64(first, second), _mm512_unpackhi_epi64(first, second),
            _mm512_unpacklo_epi64(_mm512_unpackhi_epi32(of[0], of[1]), _mm512_unpackhi_epi32(of[2], of[3]))};
        const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
        const __m512i sign = _mm512_set1_epi8(-128);
        for (int k = 0; k < 3; ++k)
            _mm512_store_si512(to.of[k], _mm512_xor_si512(_mm512_permutexvar_epi32(order, digits[k]), sign));
        to.wide = _mm512_cmpneq_epi8_mask(digits[2], sign) != 0;
    }
};

// The sum of a digit over 64 columns, in lanes of four columns each.
INLINE __m512i summed(const Digits& of, int64_t digit) {
    return _mm512_dpbusd_epi32(_mm512_setzero_si512(), _mm512_set1_epi8(1), _mm512_load_si512(of.of[digit]));
}

// Rows of x as digits.
struct FixedPoint {
    int64_t batch, stride;  // rows; chunks of 64 columns
    std::vector<Digits> numbers;
    std::vector<float> factors;  // of a row

    TARGET FixedPoint(const Weight& weight, const float* x, int64_t batch)
        : batch(batch), stride((weight.columns + 63) / 64), numbers(size_t(batch * stride)) {
        for (int64_t n = 0; n < batch; ++n, x += weight.columns) {
            const Unit unit(weight, x);
            factors.push_back(unit.factor);
            for (int64_t c = 0; c < stride; ++c)
                unit.split(x + 64 * c, weight.columns - 64 * c, numbers[size_t(n * stride + c)]);
        }
    }
};

}  // namespace
