// y = x Wᵀ for a dense matrix of codes of eight bits, whose rows have a step each (besa.storage.formats.row_codes).
//
// Codes become floats in registers, so that nothing is rounded but sums. The matrix is read once for some rows of x, and
// fetched ahead.
#include <algorithm>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#define AVX2 __attribute__((target("avx2,fma"), flatten))
#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,fma"), flatten))
#endif
#define PLAIN __attribute__((flatten))

namespace {

constexpr int64_t TOGETHER = 4;  // rows of the matrix, and rows of x, whose sums the registers hold
constexpr int64_t LANES = 16;
constexpr int64_t AHEAD = 1536;  // bytes
typedef float Floats __attribute__((vector_size(4 * LANES)));

// Codes as floats; compilers make single ones of them where this is left to a conversion of vectors.
inline void widen_plain(const int8_t* codes, Floats& w) {
    float numbers[LANES];
    for (int64_t lane = 0; lane < LANES; ++lane) numbers[lane] = float(codes[lane]);
    std::memcpy(&w, numbers, sizeof w);
}
#if defined(__x86_64__)
AVX2 inline void widen_avx2(const int8_t* codes, Floats& w) {
    for (int64_t half = 0; half < 2; ++half) {
        const __m128i raw = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes + 8 * half));
        const __m256 numbers = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(raw));
        std::memcpy(reinterpret_cast<char*>(&w) + 32 * half, &numbers, sizeof numbers);
    }
}
AVX512 inline void widen_avx512(const int8_t* codes, Floats& w) {
    const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes));
    const __m512 numbers = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(raw));
    std::memcpy(&w, &numbers, sizeof w);
}
#endif

// The products of R rows of the matrix, each so many after the last, and N rows of x, whose columns are as many.
template <int R, int N, auto WIDEN>
inline void multiplied(const int8_t* codes, int64_t each, int64_t ahead, const float* x, int64_t columns, int64_t rows,
                       float* y) {
    const int64_t apart = each * columns;
    Floats sums[R][N] = {};
    int64_t i = 0;
    for (; i + LANES <= columns; i += LANES) {
        Floats of_x[N], of_w[R];
        for (int n = 0; n < N; ++n) std::memcpy(&of_x[n], x + n * columns + i, sizeof of_x[n]);
        for (int r = 0; r < R; ++r) {
            if (i % 64 == 0) __builtin_prefetch(codes + r * apart + i + ahead);
            WIDEN(codes + r * apart + i, of_w[r]);
        }
        for (int r = 0; r < R; ++r)
            for (int n = 0; n < N; ++n) sums[r][n] += of_w[r] * of_x[n];
    }
    for (int r = 0; r < R; ++r)
        for (int n = 0; n < N; ++n) {
            float sum = 0;
            for (int64_t lane = 0; lane < LANES; ++lane) sum += sums[r][n][lane];
            for (int64_t rest = i; rest < columns; ++rest) sum += float(codes[r * apart + rest]) * x[n * columns + rest];
            y[n * rows + r * each] = sum;
        }
}

// Neighbouring rows at once, while those after them are fetched.
template <int N, auto WIDEN>
inline void near(const int8_t* codes, const float* x, int64_t columns, int64_t rows, int64_t first, int64_t last,
                 float* y) {
    int64_t row = first;
    for (; row + TOGETHER <= last; row += TOGETHER)
        multiplied<TOGETHER, N, WIDEN>(codes + row * columns, 1, TOGETHER * columns, x, columns, rows, y + row);
    for (; row < last; ++row) multiplied<1, N, WIDEN>(codes + row * columns, 1, columns, x, columns, rows, y + row);
}

// Rows from some places at once, each read to its end and on: memory gives more then.
template <int N, auto WIDEN>
inline void far(const int8_t* codes, const float* x, int64_t columns, int64_t rows, int64_t first, int64_t last,
                float* y) {
    const int64_t each = (last - first) / TOGETHER;
    int64_t row = first;
    for (; row < first + each; ++row)
        multiplied<TOGETHER, N, WIDEN>(codes + row * columns, each, AHEAD, x, columns, rows, y + row);
    for (row += (TOGETHER - 1) * each; row < last; ++row)
        multiplied<1, N, WIDEN>(codes + row * columns, 1, AHEAD, x, columns, rows, y + row);
}

// Some rows of the matrix and all rows of x.
template <auto WIDEN>
inline void all(const int8_t* codes, const float* x, int64_t batch, int64_t columns, int64_t rows, int64_t first,
                int64_t last, float* y) {
    if (batch == 1) return far<1, WIDEN>(codes, x, columns, rows, first, last, y);
    if (batch == 2) return far<2, WIDEN>(codes, x, columns, rows, first, last, y);
    if (batch == 3) return far<3, WIDEN>(codes, x, columns, rows, first, last, y);
    if (batch == 4) return far<4, WIDEN>(codes, x, columns, rows, first, last, y);
    constexpr int64_t BLOCK = 16 * TOGETHER;  // rows of the matrix that stay in the first caches while rows of x pass
    for (int64_t begin = first; begin < last; begin += BLOCK) {
        const int64_t end = std::min(last, begin + BLOCK);
        int64_t n = 0;
        for (; n + TOGETHER <= batch; n += TOGETHER)
            near<TOGETHER, WIDEN>(codes, x + n * columns, columns, rows, begin, end, y + n * rows);
        for (; n < batch; ++n) near<1, WIDEN>(codes, x + n * columns, columns, rows, begin, end, y + n * rows);
    }
}

}  // namespace

// multiply_<path>: y (batch, rows) = x (batch, columns) times the codes (rows, columns), without the steps.
#define PATH(NAME, ATTRIBUTE)                                                                                          \
    ATTRIBUTE static void part_##NAME(const int8_t* codes, const float* x, int64_t batch, int64_t columns,             \
                                      int64_t rows, int64_t first, int64_t last, float* y) {                           \
        all<widen_##NAME>(codes, x, batch, columns, rows, first, last, y);                                                           \
    }                                                                                                                  \
    extern "C" void multiply_##NAME(const int8_t* codes, const float* x, float* y, int64_t batch, int64_t columns,     \
                                    int64_t rows, int64_t threads) {                                                   \
        const int64_t each = (rows + threads - 1) / threads;                                                           \
        _Pragma("omp parallel for num_threads(threads) schedule(static)") for (int64_t t = 0; t < threads; ++t)        \
            part_##NAME(codes, x, batch, columns, rows, std::min(rows, t * each), std::min(rows, (t + 1) * each), y);  \
    }

PATH(plain, PLAIN)
extern "C" int has_plain() { return 1; }
#if defined(__x86_64__)
PATH(avx2, AVX2)
PATH(avx512, AVX512)
extern "C" int has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
extern "C" int has_avx512() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
}
#endif
