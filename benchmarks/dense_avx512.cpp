// What the sparse kernels are measured against: the best dense kernels that we could write, for one row of x, and the
// rate at which memory can be read. Eight rows are read at once, and the eight after them fetched; they meet x as those of a
// bitmask do.
#include "sparse_avx512.cpp"

namespace {

// A band of a dense weight.
template <typename Kind> struct Dense {
    static constexpr int64_t SIZE = std::is_same_v<Kind, Int4> ? 32 : 64;  // bytes of a chunk
    const uint8_t* place;
    int64_t width;  // bytes of a row
    INLINE void enter(const Dense&, const Grid&, int64_t) {}
    INLINE typename Kind::Vector next(Dense& dense, int64_t, int64_t r) {
        const uint8_t* at = dense.place + r * dense.width;
        _mm_prefetch(reinterpret_cast<const char*>(at + 2 * ROWS * dense.width), _MM_HINT_T1);
        if (r == ROWS - 1) dense.place += SIZE;
        if constexpr (std::is_same_v<Kind, Float32>)
            return _mm512_loadu_ps(at);
        else if constexpr (std::is_same_v<Kind, Int4>)
            return Int4::unpacked(at);
        else
            return _mm512_loadu_si512(at);
    }
};

// Some bands, BANDS of them at once; rows of whole segments.
template <typename Kind, int SHAPE, int BANDS>
TARGET void dense_bands(const Weight& weight, const Rows<Kind>& rows, float* y, int64_t first, int64_t last) {
    std::vector<Grid> grids(BANDS, Grid(weight, Kind::LENGTH));
    const int64_t chunks = grids[0].chunks;
    for (int64_t band = first; band < last; band += BANDS) {
        Dense<Kind> dense[BANDS];
        Totals totals[BANDS] = {};
        for (int64_t b = 0; b < BANDS; ++b) {
            if constexpr (Kind::CODES) {
                grids[size_t(b)].read(weight, band + b);
                grids[size_t(b)].start(rows.sums_of(0), totals[b]);
            }
            dense[b] = {weight.values + (band + b) * ROWS * chunks * Dense<Kind>::SIZE, chunks * Dense<Kind>::SIZE};
        }
        add<Kind, SHAPE, 1, BANDS>(dense, grids.data(), 0, chunks, rows.numbers.data(), 0, totals);
        for (int64_t b = 0; b < BANDS; ++b) write<Kind>(weight, rows, band + b, 0, totals[b], y);
    }
}

// From eight places at once.
TARGET int64_t read_part(const char* from, int64_t bytes) {
    __m512i seen[8] = {};
    for (int64_t i = 0; i < bytes / 8; i += 64)
#pragma GCC unroll 8
        for (int k = 0; k < 8; ++k) {
            const char* at = from + bytes / 8 * k + i;
            _mm_prefetch(at + 4096, _MM_HINT_T1);
            seen[k] = _mm512_xor_si512(seen[k], _mm512_loadu_si512(at));
        }
    for (int k = 1; k < 8; ++k) seen[0] = _mm512_xor_si512(seen[0], seen[k]);
    return _mm512_reduce_add_epi64(seen[0]);
}

}  // namespace

// Of weights whose rows are a multiple of 8 × threads, in groups of 128 columns or one for a row.
#define DENSE(NAME, KIND, SHAPE)                                                                                      \
    extern "C" void dense_##NAME(const Weight* weight, const float* x, float* y, int64_t threads) {                   \
        const Rows<KIND> rows(*weight, x, 1);                                                                         \
        const int64_t all = weight->rows / ROWS / 2;                                                                  \
        _Pragma("omp parallel for num_threads(threads) schedule(static)")                                             \
        for (int64_t part = 0; part < threads; ++part)                                                                \
            dense_bands<KIND, SHAPE, 2>(*weight, rows, y, all * part / threads * 2, all * (part + 1) / threads * 2);  \
    }
DENSE(float32, Float32, 0)
DENSE(bfloat16, BFloat16Pairs, 0)
DENSE(int8, Int8, 0)
DENSE(int4, Int4, 2)

// Reads all bytes once, a number of them that 512 × threads divides.
extern "C" int64_t read_all(const char* from, int64_t bytes, int64_t threads) {
    int64_t seen = 0;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(+ : seen)
    for (int64_t part = 0; part < threads; ++part) seen += read_part(from + bytes / threads * part, bytes / threads);
    return seen;
}
