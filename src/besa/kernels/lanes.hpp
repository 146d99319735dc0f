// Numbers in registers, by the instruction sets that a processor may have; float32 or bfloat16 in memory.
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#define AVX2 __attribute__((target("avx2,fma"), flatten))
#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,fma"), flatten))
#endif
#define PLAIN __attribute__((flatten))

namespace {

inline float wide(float number) { return number; }
inline float wide(uint16_t half) {
    const uint32_t bits = uint32_t(half) << 16;
    float number;
    std::memcpy(&number, &bits, sizeof number);
    return number;
}
inline void narrow(float number, float* to) { *to = number; }
inline void narrow(float number, uint16_t* to) {  // rounded to the nearest, as torch does
    uint32_t bits;
    std::memcpy(&bits, &number, sizeof bits);
    *to = uint16_t(number != number ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// As many numbers as a register has; compilers make single ones of more, and of those that a conversion of vectors gives.
template <int64_t COUNT> struct Register {
    static constexpr int64_t LANES = COUNT;
    typedef float Floats __attribute__((vector_size(4 * COUNT)));
    typedef uint32_t Bits __attribute__((vector_size(4 * COUNT)));  // whole numbers that may overflow

    static void widen(const float* at, Floats& to) { std::memcpy(&to, at, sizeof to); }
    static float total(const Floats& of) {
        float lanes[LANES];
        std::memcpy(lanes, &of, sizeof lanes);
        for (int64_t half = LANES / 2; half; half /= 2)
            for (int64_t i = 0; i < half; ++i) lanes[i] += lanes[i + half];
        return lanes[0];
    }
};
struct Plain : Register<4> {
    using Register::widen;
    static void widen(const uint16_t* at, Floats& to) {
        float numbers[LANES];
        for (int64_t i = 0; i < LANES; ++i) numbers[i] = wide(at[i]);
        std::memcpy(&to, numbers, sizeof to);
    }
};
#if defined(__x86_64__)
struct Avx2 : Register<8> {
    using Register::widen;
    AVX2 static void widen(const uint16_t* at, Floats& to) {
        const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(at));
        const __m256i numbers = _mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16);
        std::memcpy(&to, &numbers, sizeof numbers);
    }
};
struct Avx512 : Register<16> {
    using Register::widen;
    AVX512 static void widen(const uint16_t* at, Floats& to) {
        const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at));
        const __m512i numbers = _mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16);
        std::memcpy(&to, &numbers, sizeof numbers);
    }
};
#endif

}  // namespace

// Whether the processor can run a path.
extern "C" int has_plain() { return 1; }
#if defined(__x86_64__)
extern "C" int has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
extern "C" int has_avx512() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
#endif

// CALL(dtype, number, path, way, attribute), as a file defines it: for both dtypes, by every path.
#define BOTH(PATH, WAY, ATTRIBUTE)             \
    CALL(float32, float, PATH, WAY, ATTRIBUTE) \
    CALL(bfloat16, uint16_t, PATH, WAY, ATTRIBUTE)
#if defined(__x86_64__)
#define ALL BOTH(plain, Plain, PLAIN) BOTH(avx2, Avx2, AVX2) BOTH(avx512, Avx512, AVX512)
#else
#define ALL BOTH(plain, Plain, PLAIN)
#endif
