// y = x Wᵀ for a few rows of x and a dense W, as torch keeps it, for processors with AVX-512 or AVX2: at the rate at which
// memory gives it.
#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>

#include <type_traits>

#include "sparse.hpp"

// What a kind of weight is: the columns that a step multiplies, and how. `left` columns are left; fewer than WIDTH at the
// end of a row.

namespace {
namespace avx512 {

#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,f16c")))
#define INLINE TARGET __attribute__((always_inline)) static inline

typedef __m512 Vector;
constexpr int SUMS = 16;

INLINE Vector none() { return _mm512_setzero_ps(); }
INLINE Vector plus(Vector a, Vector b) { return _mm512_add_ps(a, b); }
INLINE float total(Vector v) { return _mm512_reduce_add_ps(v); }

INLINE __m512 floats(const float* at, int64_t left) {
    return left >= 16 ? _mm512_loadu_ps(at) : _mm512_maskz_loadu_ps(__mmask16((1 << left) - 1), at);
}
INLINE __m256i halves(const uint16_t* at, int64_t left) {
    return left >= 16 ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at))
                      : _mm256_maskz_loadu_epi16(__mmask16((1 << left) - 1), at);
}

struct Float32 {
    using Number = float;
    using X = float;
    static constexpr int64_t WIDTH = 16;
    INLINE __m512 of_w(const Number* at, int64_t left) { return floats(at, left); }
    INLINE __m512 of_x(const X* at, int64_t left) { return floats(at, left); }
    INLINE __m512 add(__m512 sum, __m512 w, __m512 x) { return _mm512_fmadd_ps(w, x, sum); }
};

struct Float16 : Float32 {
    using Number = uint16_t;
    INLINE __m512 of_w(const Number* at, int64_t left) { return _mm512_cvtph_ps(halves(at, left)); }
};

struct BFloat16 : Float32 {
    using Number = uint16_t;
    INLINE __m512 of_w(const Number* at, int64_t left) {
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves(at, left)), 16));
    }
};

struct BFloat16Pairs {  // exact products, two at a time
    using Number = uint16_t;
    using X = uint16_t;
    static constexpr int64_t WIDTH = 32;
    INLINE __m512i of_w(const Number* at, int64_t left) {
        return left >= 32 ? _mm512_loadu_si512(at) : _mm512_maskz_loadu_epi16((__mmask32(1) << left) - 1, at);
    }
    INLINE __m512i of_x(const X* at, int64_t left) { return of_w(at, left); }
    INLINE __m512 add(__m512 sum, __m512i w, __m512i x) {
        // Written out, so that the rest can be compiled for processors that have all but this instruction.
        asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(w), "v"(x));
        return sum;
    }
};

#include "dense.hpp"

#undef TARGET
}  // namespace avx512

namespace avx2 {

#define TARGET __attribute__((target("avx2,fma,f16c")))

typedef __m256 Vector;
constexpr int SUMS = 8;

INLINE Vector none() { return _mm256_setzero_ps(); }
INLINE Vector plus(Vector a, Vector b) { return _mm256_add_ps(a, b); }
INLINE float total(Vector v) {
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

INLINE __m128i halves(const uint16_t* at, int64_t left) {
    if (left >= 8) return _mm_loadu_si128(reinterpret_cast<const __m128i*>(at));
    uint16_t some[8] = {};
    std::memcpy(some, at, size_t(left) * sizeof *at);
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(some));
}

struct Float32 {
    using Number = float;
    using X = float;
    static constexpr int64_t WIDTH = 8;
    INLINE Vector of_w(const Number* at, int64_t left) {
        if (left >= 8) return _mm256_loadu_ps(at);
        const __m256i place = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
        return _mm256_maskload_ps(at, _mm256_cmpgt_epi32(_mm256_set1_epi32(int(left)), place));
    }
    INLINE Vector of_x(const X* at, int64_t left) { return of_w(at, left); }
    INLINE Vector add(Vector sum, Vector w, Vector x) { return _mm256_fmadd_ps(w, x, sum); }
};

struct Float16 : Float32 {
    using Number = uint16_t;
    INLINE Vector of_w(const Number* at, int64_t left) { return _mm256_cvtph_ps(halves(at, left)); }
};

struct BFloat16 : Float32 {
    using Number = uint16_t;
    INLINE Vector of_w(const Number* at, int64_t left) {
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves(at, left)), 16));
    }
};

#include "dense.hpp"

}  // namespace avx2
}  // namespace

// dense_<kind>_<path>: y (batch, rows), float32, of x (batch, columns) in bfloat16 (pairs) or float32 (singles, eights);
// `past`: w is fetched past the outer caches.
#define DENSE(NAME, SET, KIND)                                                                                      \
    extern "C" void dense_##NAME(const SET::KIND::Number* w, const SET::KIND::X* x, int64_t batch, int64_t columns, \
                                 int64_t rows, float* y, int64_t past, int64_t threads) {                           \
        const auto multiply = past ? SET::multiply<SET::KIND, true> : SET::multiply<SET::KIND, false>;              \
        multiply(w, x, batch, columns, rows, y, threads);                                                           \
    }
DENSE(float32_singles, avx512, Float32)
DENSE(float16_singles, avx512, Float16)
DENSE(bfloat16_singles, avx512, BFloat16)
DENSE(bfloat16_pairs, avx512, BFloat16Pairs)
DENSE(float32_eights, avx2, Float32)
DENSE(float16_eights, avx2, Float16)
DENSE(bfloat16_eights, avx2, BFloat16)

namespace {

// The same with a dense weight as besa.kernels.sparse_native passes it, and with x and y in its numbers: float32, or
// bfloat16, which X is as well or not.
template <typename Number, typename X>
void alike(void (*dense)(const Number*, const X*, int64_t, int64_t, int64_t, float*, int64_t, int64_t), const Weight& of,
           const Number* x, int64_t batch, Number* y, int64_t threads) {
    const auto multiply = [&](const X* x, float* y) {
        dense(reinterpret_cast<const Number*>(of.values), x, batch, of.columns, of.rows, y, of.past, threads);
    };
    if constexpr (std::is_same_v<Number, float>)
        multiply(x, y);
    else {
        std::vector<float> sums(size_t(batch * of.rows));
        if constexpr (std::is_same_v<X, Number>)
            multiply(x, sums.data());
        else {
            std::vector<float> wide(size_t(batch * of.columns));
            for (size_t i = 0; i < wide.size(); ++i) wide[i] = from_bfloat16(x[i]);
            multiply(wide.data(), sums.data());
        }
        for (size_t i = 0; i < sums.size(); ++i) y[i] = to_bfloat16(sums[i]);
    }
}

}  // namespace

// alike_<kind>_<path>: for code that calls products of any kind of weight.
#define ALIKE(NAME, SET, KIND)                                                                                       \
    extern "C" void alike_##NAME(const Weight* of, const SET::KIND::Number* x, int64_t batch, SET::KIND::Number* y, \
                                 int64_t threads) {                                                                  \
        alike(dense_##NAME, *of, x, batch, y, threads);                                                              \
    }
ALIKE(float32_singles, avx512, Float32)
ALIKE(bfloat16_singles, avx512, BFloat16)
ALIKE(bfloat16_pairs, avx512, BFloat16Pairs)
ALIKE(float32_eights, avx2, Float32)
ALIKE(bfloat16_eights, avx2, BFloat16)

// Whether the processor can run a path.
extern "C" int has_singles() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
extern "C" int has_pairs() { return has_singles() && __builtin_cpu_supports("avx512bf16"); }
extern "C" int has_eights() {
    unsigned int a, b, c, d;  // compilers know no name for the last of these instructions
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __get_cpuid(1, &a, &b, &c, &d) &&
           (c & bit_F16C);
}
#endif
