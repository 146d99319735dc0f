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

constexpr int64_t TOGETHER = 4;  // rows of the matrix, and rows of x, that meet at most
constexpr int64_t AHEAD = 1536;  // bytes

// Some numbers in a register, by instruction set. SUMS: as many sums as registers hold beside what is added.
struct Plain {
    static constexpr int64_t LANES = 16, SUMS = 16;
    float of[LANES];
    void read(const float* x) { std::memcpy(of, x, sizeof of); }
    void widen(const int8_t* codes) {
        for (int64_t lane = 0; lane < LANES; ++lane) of[lane] = float(codes[lane]);
    }
    void add(const Plain& a, const Plain& b) {
        for (int64_t lane = 0; lane < LANES; ++lane) of[lane] += a.of[lane] * b.of[lane];
    }
    void write(float* to) const { std::memcpy(to, of, sizeof of); }
};
#if defined(__x86_64__)
struct Avx2 {
    static constexpr int64_t LANES = 8, SUMS = 8;
    __m256 of;
    AVX2 void read(const float* x) { of = _mm256_loadu_ps(x); }
    AVX2 void widen(const int8_t* codes) {
        const __m128i raw = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes));
        of = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(raw));
    }
    AVX2 void add(const Avx2& a, const Avx2& b) { of = _mm256_fmadd_ps(a.of, b.of, of); }
    AVX2 void write(float* to) const { _mm256_storeu_ps(to, of); }
};
struct Avx512 {
    static constexpr int64_t LANES = 16, SUMS = 16;
    __m512 of;
    AVX512 void read(const float* x) { of = _mm512_loadu_ps(x); }
    AVX512 void widen(const int8_t* codes) {
        const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes));
        of = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(raw));
    }
    AVX512 void add(const Avx512& a, const Avx512& b) { of = _mm512_fmadd_ps(a.of, b.of, of); }
    AVX512 void write(float* to) const { _mm512_storeu_ps(to, of); }
};
#endif

// The products of R rows of the matrix, each so many after the last, and N rows of x, whose columns are as many.
template <int R, int N, typename Numbers>
inline void multiplied(const int8_t* codes, int64_t each, int64_t ahead, const float* x, int64_t columns, int64_t rows,
                       float* y) {
    const int64_t apart = each * columns;
    constexpr int64_t LANES = Numbers::LANES;
    Numbers sums[R][N] = {};
    int64_t i = 0;
    for (; i + LANES <= columns; i += LANES) {
        Numbers of_x[N], of_w[R];
        for (int n = 0; n < N; ++n) of_x[n].read(x + n * columns + i);
        for (int r = 0; r < R; ++r) {
            if (i % 64 == 0) __builtin_prefetch(codes + r * apart + i + ahead);
            of_w[r].widen(codes + r * apart + i);
        }
        for (int r = 0; r < R; ++r)
            for (int n = 0; n < N; ++n) sums[r][n].add(of_w[r], of_x[n]);
    }
    for (int r = 0; r < R; ++r)
        for (int n = 0; n < N; ++n) {
            float lanes[LANES], sum = 0;
            sums[r][n].write(lanes);
            for (int64_t lane = 0; lane < LANES; ++lane) sum += lanes[lane];
            for (int64_t rest = i; rest < columns; ++rest) sum += float(codes[r * apart + rest]) * x[n * columns + rest];
            y[n * rows + r * each] = sum;
        }
}

// Rows of the matrix that meet N rows of x at once.
template <int N, typename Numbers> constexpr int SOME = int(std::min(TOGETHER, Numbers::SUMS / N));

// Neighbouring rows at once, while those after them are fetched.
template <int N, typename Numbers>
inline void near(const int8_t* codes, const float* x, int64_t columns, int64_t rows, int64_t first, int64_t last,
                 float* y) {
    constexpr int R = SOME<N, Numbers>;
    int64_t row = first;
    for (; row + R <= last; row += R)
        multiplied<R, N, Numbers>(codes + row * columns, 1, R * columns, x, columns, rows, y + row);
    for (; row < last; ++row) multiplied<1, N, Numbers>(codes + row * columns, 1, columns, x, columns, rows, y + row);
}

// Rows from some places at once, each read to its end and on: memory gives more then.
template <int N, typename Numbers>
inline void far(const int8_t* codes, const float* x, int64_t columns, int64_t rows, int64_t first, int64_t last,
                float* y) {
    constexpr int R = SOME<N, Numbers>;
    const int64_t each = (last - first) / R;
    int64_t row = first;
    for (; row < first + each; ++row)
        multiplied<R, N, Numbers>(codes + row * columns, each, AHEAD, x, columns, rows, y + row);
    for (row += (R - 1) * each; row < last; ++row)
        multiplied<1, N, Numbers>(codes + row * columns, 1, AHEAD, x, columns, rows, y + row);
}

// Some rows of the matrix and all rows of x.
template <typename Numbers>
inline void all(const int8_t* codes, const float* x, int64_t batch, int64_t columns, int64_t rows, int64_t first,
                int64_t last, float* y) {
    if (batch == 1) return far<1, Numbers>(codes, x, columns, rows, first, last, y);
    if (batch == 2) return far<2, Numbers>(codes, x, columns, rows, first, last, y);
    if (batch == 3) return far<3, Numbers>(codes, x, columns, rows, first, last, y);
    if (batch == 4) return far<4, Numbers>(codes, x, columns, rows, first, last, y);
    constexpr int64_t BLOCK = 16 * TOGETHER;  // rows of the matrix that stay in the first caches while rows of x pass
    for (int64_t begin = first; begin < last; begin += BLOCK) {
        const int64_t end = std::min(last, begin + BLOCK);
        int64_t n = 0;
        for (; n + TOGETHER <= batch; n += TOGETHER)
            near<TOGETHER, Numbers>(codes, x + n * columns, columns, rows, begin, end, y + n * rows);
        for (; n < batch; ++n) near<1, Numbers>(codes, x + n * columns, columns, rows, begin, end, y + n * rows);
    }
}

}  // namespace

// multiply_<path>: y (batch, rows) = x (batch, columns) times the codes (rows, columns), without the steps.
#define PATH(NAME, NUMBERS, ATTRIBUTE)                                                                                 \
    ATTRIBUTE static void part_##NAME(const int8_t* codes, const float* x, int64_t batch, int64_t columns,             \
                                      int64_t rows, int64_t first, int64_t last, float* y) {                           \
        all<NUMBERS>(codes, x, batch, columns, rows, first, last, y);                                                  \
    }                                                                                                                  \
    extern "C" void multiply_##NAME(const int8_t* codes, const float* x, float* y, int64_t batch, int64_t columns,     \
                                    int64_t rows, int64_t threads) {                                                   \
        const int64_t each = (rows + threads - 1) / threads;                                                           \
        _Pragma("omp parallel for num_threads(threads) schedule(static)") for (int64_t t = 0; t < threads; ++t)        \
            part_##NAME(codes, x, batch, columns, rows, std::min(rows, t * each), std::min(rows, (t + 1) * each), y);  \
    }

PATH(plain, Plain, PLAIN)
extern "C" int has_plain() { return 1; }
#if defined(__x86_64__)
PATH(avx2, Avx2, AVX2)
PATH(avx512, Avx512, AVX512)
extern "C" int has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
extern "C" int has_avx512() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
}
#endif
