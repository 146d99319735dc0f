// What the kernels for AVX2 share: vectors, and rows of x as whole numbers, which codes meet.
#include <cpuid.h>
#include <immintrin.h>

#include <numeric>
#include <utility>

#include "sparse.hpp"

#define TARGET __attribute__((target("avx2,bmi2,fma,f16c,popcnt")))
#define INLINED __attribute__((target("avx2,bmi2,fma,f16c,popcnt"), always_inline))
#define INLINE INLINED static inline

namespace {

// Whether the processor has what TARGET asks for.
inline bool has_all() {
    unsigned a, b, c, d;  // f16c is no name that all compilers know
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("fma") &&
           __builtin_cpu_supports("popcnt") && __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}

// Calls `work` with each number below COUNT, as a constant.
template <typename Work, int... I> INLINE void each(Work work, std::integer_sequence<int, I...>) {
    (work(std::integral_constant<int, I>()), ...);
}
template <int COUNT, typename Work> INLINE void times(Work work) {
    each(work, std::make_integer_sequence<int, COUNT>());
}

// A row of x as whole numbers, with zeros to the end: in float32 as fine as three digits to the base 256 are, in half
// precision in units that let most do with two. Where it has an infinite number, or one that is none, the unit is no number.
struct Whole {
    std::vector<int32_t> numbers;
    float factor;  // what a unit is worth

    TARGET Whole(const Weight& weight, const float* x, int64_t padded) : numbers(static_cast<size_t>(padded)) {
        const int64_t columns = weight.columns;
        std::vector<float> all_of_x(static_cast<size_t>(padded));
        std::memcpy(all_of_x.data(), x, size_t(columns) * sizeof(float));
        __m256 most = _mm256_setzero_ps(), all = most, sound = most;
        for (size_t i = 0; i < all_of_x.size(); i += 8) {
            const __m256 part = _mm256_loadu_ps(&all_of_x[i]), size = _mm256_andnot_ps(_mm256_set1_ps(-0.0f), part);
            most = _mm256_max_ps(most, size);
            all = _mm256_add_ps(all, size);
            sound = _mm256_fmadd_ps(part, _mm256_setzero_ps(), sound);
        }
        float lanes[3][8];
        _mm256_storeu_ps(lanes[0], most);
        _mm256_storeu_ps(lanes[1], all);
        _mm256_storeu_ps(lanes[2], sound);
        const float largest = *std::max_element(lanes[0], lanes[0] + 8);
        const float mean = std::accumulate(lanes[1], lanes[1] + 8, 0.0f) / float(columns);
        const float trouble = std::accumulate(lanes[2], lanes[2] + 8, 0.0f);
        const float fine = weight.scale_type ? mean / FINE : 0;
        const float unit = std::max(largest / THREE, std::min(largest / TWO, fine));
        factor = unit + trouble;
        const __m256 inverse = _mm256_set1_ps(trouble == 0 && unit > 0 ? 1 / unit : 0);
        const __m256i limit = _mm256_set1_epi32(int32_t(THREE)), opposite = _mm256_set1_epi32(-int32_t(THREE));
        for (size_t i = 0; i < all_of_x.size(); i += 8) {
            const __m256i number = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(&all_of_x[i]), inverse));
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(&numbers[i]),
                                _mm256_max_epi32(_mm256_min_epi32(number, limit), opposite));
        }
    }
};

}  // namespace
