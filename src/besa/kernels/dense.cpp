// y = x Wᵀ for a few rows of x and a dense W, as torch keeps it, for processors with AVX-512: at the rate at which memory
// gives it.
#if defined(__x86_64__)
#include <immintrin.h>

#include <algorithm>
#include <cstdint>

#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,f16c")))
#define INLINE TARGET __attribute__((always_inline)) static inline

namespace {

// What a kind of weight is: the columns that a step multiplies, and how. `left` columns are left; fewer than WIDTH at the
// end of a row.

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

// One step of R rows of W and N rows of x. Rows of W are `apart` numbers apart, and fetched `ahead` numbers before.
template <typename Kind, int R, int N>
INLINE void step(const typename Kind::Number* w, int64_t apart, int64_t ahead, const typename Kind::X* x,
                 int64_t columns, int64_t left, __m512 (&sums)[R][N]) {
    decltype(Kind::of_x(x, 0)) inputs[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) inputs[n] = Kind::of_x(x + n * columns, left);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
        const typename Kind::Number* at = w + r * apart;
        _mm_prefetch(reinterpret_cast<const char*>(at + ahead), _MM_HINT_NTA);
        const auto of_w = Kind::of_w(at, left);
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) sums[r][n] = Kind::add(sums[r][n], of_w, inputs[n]);
    }
}

// R rows of W, each so many after the last, times N rows of x. U sums for each: they do not wait for each other.
template <typename Kind, int R, int N, int U>
INLINE void together(const typename Kind::Number* w, int64_t each, int64_t ahead, const typename Kind::X* x,
                     int64_t columns, int64_t rows, float* y) {
    constexpr int64_t WIDTH = Kind::WIDTH;
    __m512 sums[U][R][N];
#pragma GCC unroll 16
    for (int i = 0; i < U * R * N; ++i) sums[i / N / R][i / N % R][i % N] = _mm512_setzero_ps();
    int64_t c = 0;
    for (; c + U * WIDTH <= columns; c += U * WIDTH)
#pragma GCC unroll 4
        for (int u = 0; u < U; ++u)
            step<Kind, R, N>(w + c + u * WIDTH, each * columns, ahead, x + c + u * WIDTH, columns, WIDTH, sums[u]);
#pragma GCC unroll 4
    for (int u = 0; u < U; ++u, c += WIDTH)
        if (c < columns) step<Kind, R, N>(w + c, each * columns, ahead, x + c, columns, columns - c, sums[u]);
#pragma GCC unroll 16
    for (int i = 0; i < R * N; ++i) {
        __m512 sum = sums[0][i / N][i % N];
#pragma GCC unroll 4
        for (int u = 1; u < U; ++u) sum = _mm512_add_ps(sum, sums[u][i / N][i % N]);
        y[i % N * rows + i / N * each] = _mm512_reduce_add_ps(sum);
    }
}

// Neighbouring rows at once, while those after them are fetched.
template <typename Kind, int R, int N>
TARGET void near(const typename Kind::Number* w, const typename Kind::X* x, int64_t columns, int64_t rows, int64_t first,
                 int64_t last, float* y) {
    for (; first + R <= last; first += R)
        together<Kind, R, N, 1>(w + first * columns, 1, R * columns, x, columns, rows, y + first);
    for (; first < last; ++first) together<Kind, 1, N, 1>(w + first * columns, 1, columns, x, columns, rows, y + first);
}

// Rows from R places at once, each read to its end and on: memory gives more then.
template <typename Kind, int R, int N>
TARGET void far(const typename Kind::Number* w, const typename Kind::X* x, int64_t columns, int64_t rows, int64_t first,
                int64_t last, float* y) {
    constexpr int64_t AHEAD = 1536 / sizeof(typename Kind::Number);
    const int64_t each = (last - first) / R;
    for (int64_t row = first; row < first + each; ++row)
        together<Kind, R, N, 2>(w + row * columns, each, AHEAD, x, columns, rows, y + row);
    for (int64_t row = first + R * each; row < last; ++row)
        together<Kind, 1, N, 2>(w + row * columns, 1, AHEAD, x, columns, rows, y + row);
}

template <typename Kind>
void multiply(const typename Kind::Number* w, const typename Kind::X* x, int64_t batch, int64_t columns, int64_t rows,
              float* y, int64_t threads) {
    constexpr int64_t EIGHT = 8;  // rows of W that stay in the caches while all rows of x pass
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t thread = 0; thread < threads; ++thread) {
        const int64_t all = (rows + EIGHT - 1) / EIGHT, end = std::min(rows, all * (thread + 1) / threads * EIGHT);
        const int64_t begin = all * thread / threads * EIGHT;
        if (batch <= 4) {
            const auto kernel = batch == 1   ? far<Kind, 4, 1>
                                : batch == 2 ? far<Kind, 4, 2>
                                : batch == 3 ? far<Kind, 2, 3>
                                             : far<Kind, 2, 4>;
            kernel(w, x, columns, rows, begin, end, y);
            continue;
        }
        for (int64_t first = begin; first < end; first += EIGHT) {
            const int64_t last = std::min(end, first + EIGHT);
            int64_t n = 0;
            for (; n + 4 <= batch; n += 4)
                near<Kind, 4, 4>(w, x + n * columns, columns, rows, first, last, y + n * rows);
            for (; n + 2 <= batch; n += 2)
                near<Kind, 8, 2>(w, x + n * columns, columns, rows, first, last, y + n * rows);
            for (; n < batch; ++n) near<Kind, 8, 1>(w, x + n * columns, columns, rows, first, last, y + n * rows);
        }
    }
}

}  // namespace

// dense_<kind>_<path>: y (batch, rows), float32, of x (batch, columns) in bfloat16 (pairs) or float32 (singles).
#define DENSE(NAME, KIND)                                                                                           \
    extern "C" void dense_##NAME(const KIND::Number* w, const KIND::X* x, int64_t batch, int64_t columns,           \
                                 int64_t rows, float* y, int64_t threads) {                                         \
        multiply<KIND>(w, x, batch, columns, rows, y, threads);                                                     \
    }
DENSE(float32_singles, Float32)
DENSE(float16_singles, Float16)
DENSE(bfloat16_singles, BFloat16)
DENSE(bfloat16_pairs, BFloat16Pairs)

// Whether the processor can run a path.
extern "C" int has_singles() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
extern "C" int has_pairs() { return has_singles() && __builtin_cpu_supports("avx512bf16"); }
#endif
