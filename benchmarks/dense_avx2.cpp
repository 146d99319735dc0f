// What dense_avx512.cpp is, for processors with AVX2: two bands are read at once, from as many places.
#include "sparse_avx2.cpp"

namespace {

constexpr int BANDS = 2;

// The products of some rows of floats, each added to the sums of its row.
template <typename Kind>
INLINE void multiply_rows(const uint8_t* const (&at)[BANDS * ROWS], int64_t width, const float* x,
                          __m256 (&all)[BANDS * ROWS]) {
    for (int64_t c = 0; c < width; c += 8 * Kind::SIZE, x += 8)
        times<BANDS * ROWS>([&](auto i) INLINED {
            __m256 w;
            if constexpr (Kind::SIZE == 4)
                w = _mm256_loadu_ps(reinterpret_cast<const float*>(at[i] + c));
            else
                w = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(loaded(at[i] + c)), 16));
            all[i] = _mm256_fmadd_ps(w, _mm256_loadu_ps(x), all[i]);
        });
}

template <typename Kind>
TARGET void dense_bands(const Weight& weight, const Rows<Kind>& rows, float* y, int64_t first, int64_t last) {
    std::vector<BandOf<Kind>> bands(BANDS, BandOf<Kind>(weight));
    const int64_t width = weight.columns * Kind::SIZE;
    const int64_t count = (last - first) / BANDS;
    for (int64_t index = first; index < first + count; ++index) {
        const uint8_t* at[BANDS * ROWS];
        __m256 all[BANDS * ROWS] = {};
        for (int64_t i = 0; i < BANDS * ROWS; ++i) at[i] = weight.values + (ROWS * (index + i / ROWS * count) + i % ROWS) * width;
        multiply_rows<Kind>(at, width, rows.numbers.data(), all);
        for (int64_t b = 0; b < BANDS; ++b) {
            Totals totals;
            for (int64_t r = 0; r < ROWS; ++r) _mm256_store_ps(totals.of[r], all[b * ROWS + r]);
            write<Kind>(weight, rows, bands[size_t(b)], index + b * count, 0, totals, y);
        }
    }
}

// From eight places at once.
TARGET int64_t read_part(const char* from, int64_t bytes) {
    __m256i seen[8] = {};
    for (int64_t i = 0; i < bytes / 8; i += 32)
#pragma GCC unroll 8
        for (int k = 0; k < 8; ++k) {
            const auto* at = reinterpret_cast<const __m256i*>(from + bytes / 8 * k + i);
            seen[k] = _mm256_xor_si256(seen[k], _mm256_loadu_si256(at));
        }
    for (int k = 1; k < 8; ++k) seen[0] = _mm256_xor_si256(seen[0], seen[k]);
    return _mm256_extract_epi64(seen[0], 0) ^ _mm256_extract_epi64(seen[0], 1) ^ _mm256_extract_epi64(seen[0], 2) ^
           _mm256_extract_epi64(seen[0], 3);
}

}  // namespace

// Of floats whose rows are a multiple of 8 × threads and columns of 128. Codes that are held dense are multiplied by the
// runtime's own kernel.
#define DENSE(NAME, KIND)                                                                                          \
    extern "C" void dense_##NAME(const Weight* weight, const float* x, float* y, int64_t threads) {                \
        const Rows<KIND> rows(*weight, x, 1);                                                                      \
        const int64_t all = weight->rows / ROWS / BANDS;                                                           \
        _Pragma("omp parallel for num_threads(threads) schedule(static)")                                          \
        for (int64_t part = 0; part < threads; ++part)                                                             \
            dense_bands<KIND>(*weight, rows, y, all * part / threads * BANDS, all * (part + 1) / threads * BANDS); \
    }
DENSE(float32, Float32)
DENSE(bfloat16, BFloat16)

// Reads all bytes once, a number of them that 256 × threads divides.
extern "C" int64_t read_all(const char* from, int64_t bytes, int64_t threads) {
    int64_t seen = 0;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(+ : seen)
    for (int64_t part = 0; part < threads; ++part) seen += read_part(from + bytes / threads * part, bytes / threads);
    return seen;
}
