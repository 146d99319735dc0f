// What the sparse kernels are measured against: the best dense kernels that we could write, for one row of x, and the
// rate at which memory can be read. Weights are read in order, fetched ahead, and meet x as those of a bitmask do.
#include "sparse_avx512.cpp"

namespace {

template <typename Kind> INLINE typename Kind::Vector whole(const uint8_t* at) {
    _mm_prefetch(reinterpret_cast<const char*>(at + AHEAD), _MM_HINT_T0);
    if constexpr (std::is_same_v<Kind, Float32>)
        return _mm512_loadu_ps(at);
    else if constexpr (std::is_same_v<Kind, Int4>)
        return Int4::expand(~uint64_t(0), at, _mm512_setzero_si512());
    else
        return _mm512_loadu_si512(at);
}

// Rows of whole segments, of STEP chunks at a time.
template <typename Kind, int STEP>
TARGET void dense_rows(const Weight& weight, const Rows<Kind>& rows, float* y, int64_t first, int64_t last) {
    constexpr int64_t size = std::is_same_v<Kind, Int4> ? 32 : 64;
    Grid grid(weight, Kind::LENGTH);
    for (int64_t row = first; row < last; ++row) {
        if (Kind::CODES && row % ROWS == 0) grid.read(weight, row / ROWS);
        const uint8_t* at = weight.values + row * grid.chunks * size;
        const typename Kind::X* x = rows.numbers.data();
        __m512 total = _mm512_setzero_ps();
        for (int64_t begin = 0, s = 0; begin < grid.chunks; begin += grid.segment, ++s) {
            typename Kind::Sum sums[STEP];
            for (int k = 0; k < STEP; ++k) sums[k] = Kind::none();
            for (int64_t c = 0; c < grid.segment; c += STEP)
#pragma GCC unroll 4
                for (int k = 0; k < STEP; ++k, at += size, x += Kind::STRIDE)
                    sums[k] = Kind::add(sums[k], whole<Kind>(at), Kind::inputs(x));
            __m512 sum = Kind::total(sums[0], grid.segment);
            for (int k = 1; k < STEP; ++k) sum = _mm512_add_ps(sum, Kind::total(sums[k], grid.segment));
            if constexpr (Kind::CODES) sum = _mm512_mul_ps(sum, Grid::steps(grid, row % ROWS, s));
            total = _mm512_add_ps(total, sum);
        }
        y[row] = _mm512_reduce_add_ps(total);
        if constexpr (Kind::CODES) y[row] = rows.factors[0] * (y[row] - grid.excess(row % ROWS, rows.sums.data()));
    }
}

TARGET int64_t read_part(const char* from, const char* to) {
    __m512i seen = _mm512_setzero_si512();
    for (; from < to; from += 64) {
        _mm_prefetch(from + AHEAD, _MM_HINT_T0);
        seen = _mm512_xor_si512(seen, _mm512_loadu_si512(from));
    }
    return _mm512_reduce_add_epi64(seen);
}

}  // namespace

#define DENSE(NAME, KIND)                                                                              \
    extern "C" void dense_##NAME(const Weight* weight, const float* x, float* y, int64_t threads) {    \
        const Rows<KIND> rows(*weight, x, 1);                                                          \
        const int64_t bands = weight->rows / ROWS;                                                     \
        _Pragma("omp parallel for num_threads(threads) schedule(static)")                              \
        for (int64_t part = 0; part < threads; ++part)                                                 \
            (weight->groups > 1 ? dense_rows<KIND, 1> : dense_rows<KIND, 4>)(                          \
                *weight, rows, y, bands * part / threads * ROWS, bands * (part + 1) / threads * ROWS); \
    }
DENSE(float32, Float32)
DENSE(bfloat16, BFloat16Pairs)
DENSE(int8, Int8)
DENSE(int4, Int4)

// Reads all bytes once, a number of them that 64 × threads divides.
extern "C" int64_t read_all(const char* from, int64_t bytes, int64_t threads) {
    int64_t seen = 0;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(+ : seen)
    for (int64_t part = 0; part < threads; ++part)
        seen += read_part(from + bytes / threads * part, from + bytes / threads * (part + 1));
    return seen;
}
