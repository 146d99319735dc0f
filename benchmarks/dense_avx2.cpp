// What dense_avx512.cpp is, for processors with AVX2: two bands are read at once, from as many places.
#include "sparse_avx2.cpp"

namespace {

constexpr int BANDS = 2;

// One row of x as a kind of dense weight meets it.
template <typename Kind> struct Inputs {
    Rows<Kind> rows;
    Inputs(const Weight& weight, const float* x) : rows(weight, x, 1) {}
};

// Digits of eight bits, whose products with four bits are summed in sixteen.
struct Digits {
    alignas(32) int8_t low[2][32], high[2][32];  // of 64 columns: the even ones and the odd ones
};
template <> struct Inputs<Int4> {
    Rows<Int4> rows;
    std::vector<Digits> digits;
    Inputs(const Weight& weight, const float* x) : rows(weight, x, 1), digits(rows.numbers.size()) {
        for (size_t c = 0; c < digits.size(); ++c)
            for (int i = 0; i < 64; ++i) {
                const int16_t number = rows.numbers[c].low[i / 2 / 8][i % 2][i / 2 % 8];
                digits[c].low[i % 2][i / 2] = int8_t(number);
                digits[c].high[i % 2][i / 2] = int8_t((number - int8_t(number)) >> 8);
            }
    }
};

// The products of eight bytes at least of some rows, each added to the sums of its row.
template <typename Kind>
INLINE void multiply_rows(const uint8_t* const (&at)[BANDS * ROWS], int64_t width, const BandOf<Kind>* bands,
                          const Inputs<Kind>& inputs, __m256 (&all)[BANDS * ROWS]) {
    constexpr int COUNT = BANDS * ROWS;
    if constexpr (std::is_same_v<Kind, Int4>) {  // in groups of 128
        for (int64_t g = 0; g < width / 64; ++g)
            times<COUNT>([&](auto i) INLINED {
                const __m256i four = _mm256_set1_epi8(15);
                __m256i sums[2][2];
                times<2>([&](auto c) INLINED {
                    const Digits& digits = inputs.digits[size_t(2 * g + c)];
                    const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at[i] + 64 * g + 32 * c));
                    const __m256i even = _mm256_and_si256(bytes, four);
                    const __m256i odd = _mm256_and_si256(_mm256_srli_epi16(bytes, 4), four);
                    const auto products = [&](const int8_t(&x)[2][32]) INLINED {
                        const auto* of = reinterpret_cast<const __m256i*>(x);
                        return _mm256_add_epi16(_mm256_maddubs_epi16(even, of[0]), _mm256_maddubs_epi16(odd, of[1]));
                    };
                    sums[c][0] = products(digits.low);
                    sums[c][1] = products(digits.high);
                });
                const __m256i low = _mm256_add_epi16(sums[0][0], sums[1][0]), high = _mm256_add_epi16(sums[0][1], sums[1][1]);
                const __m256i sum = _mm256_add_epi32(_mm256_madd_epi16(low, _mm256_set1_epi16(1)),
                                                     _mm256_madd_epi16(high, _mm256_set1_epi16(256)));
                const BandOf<Kind>& band = bands[i / ROWS];
                const __m256 scale = _mm256_broadcast_ss(&band.scales[size_t(i % ROWS * band.width + g)]);
                all[i] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum), scale, all[i]);
            });
    } else if constexpr (Kind::CODES) {  // a row is a group
        for (int64_t left = 0; left < width; left += 1024) {
            __m256i sums[COUNT / 2] = {};
            for (int64_t c = left; c < std::min(width, left + 1024); c += 64)
                times<COUNT / 2 * 4>([&](auto k) INLINED {
                    constexpr int I = k % (COUNT / 2), J = k / (COUNT / 2);
                    const __m256i w = pair(loaded(at[2 * I] + c + 16 * J), loaded(at[2 * I + 1] + c + 16 * J));
                    sums[I] = Kind::add(sums[I], w, inputs.rows.numbers[size_t(c / 64)].low[J]);
                });
            times<COUNT / 2>([&](auto i) INLINED {
                const __m256 sum = _mm256_mul_ps(_mm256_cvtepi32_ps(sums[i]), bands[2 * i / ROWS].scale(i % 2, 0));
                all[2 * i] = _mm256_add_ps(all[2 * i], _mm256_permute2f128_ps(sum, sum, 0x80));
                all[2 * i + 1] = _mm256_add_ps(all[2 * i + 1], _mm256_permute2f128_ps(sum, sum, 0x81));
            });
        }
    } else {
        const float* x = inputs.rows.numbers.data();
        for (int64_t c = 0; c < width; c += 8 * Kind::SIZE, x += 8)
            times<COUNT>([&](auto i) INLINED {
                __m256 w;
                if constexpr (Kind::SIZE == 4)
                    w = _mm256_loadu_ps(reinterpret_cast<const float*>(at[i] + c));
                else
                    w = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(loaded(at[i] + c)), 16));
                all[i] = _mm256_fmadd_ps(w, _mm256_loadu_ps(x), all[i]);
            });
    }
}

template <typename Kind>
TARGET void dense_bands(const Weight& weight, const Inputs<Kind>& inputs, float* y, int64_t first, int64_t last) {
    std::vector<BandOf<Kind>> bands(BANDS, BandOf<Kind>(weight));
    const int64_t width = std::is_same_v<Kind, Int4> ? weight.columns / 2 : weight.columns * Kind::SIZE;
    const int64_t count = (last - first) / BANDS;
    for (int64_t index = first; index < first + count; ++index) {
        const uint8_t* at[BANDS * ROWS];
        __m256 all[BANDS * ROWS] = {};
        for (int64_t i = 0; i < BANDS * ROWS; ++i) at[i] = weight.values + (ROWS * (index + i / ROWS * count) + i % ROWS) * width;
        if constexpr (Kind::CODES)
            for (int64_t b = 0; b < BANDS; ++b) bands[size_t(b)].read(weight, index + b * count);
        multiply_rows<Kind>(at, width, bands.data(), inputs, all);
        for (int64_t b = 0; b < BANDS; ++b) {
            Totals totals;
            for (int64_t r = 0; r < ROWS; ++r) {
                const __m256 of = all[b * ROWS + r];
                if (Kind::CODES)
                    _mm_storeu_ps(totals.of[r / 2] + r % 2 * 4,
                                  _mm_add_ps(_mm256_castps256_ps128(of), _mm256_extractf128_ps(of, 1)));
                else
                    _mm256_store_ps(totals.of[r], of);
            }
            write<Kind>(weight, inputs.rows, bands[size_t(b)], index + b * count, 0, totals, y);
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

// Of weights whose rows are a multiple of 8 × threads and columns of 128, in groups of 128 columns (int4) or one for a row.
// Of x, the numbers must not differ so much that some would need more than sixteen bits.
#define DENSE(NAME, KIND)                                                                                          \
    extern "C" void dense_##NAME(const Weight* weight, const float* x, float* y, int64_t threads) {                \
        const Inputs<KIND> inputs(*weight, x);                                                                     \
        const int64_t all = weight->rows / ROWS / BANDS;                                                           \
        _Pragma("omp parallel for num_threads(threads) schedule(static)")                                          \
        for (int64_t part = 0; part < threads; ++part)                                                             \
            dense_bands<KIND>(*weight, inputs, y, all * part / threads * BANDS, all * (part + 1) / threads * BANDS); \
    }
DENSE(float32, Float32)
DENSE(bfloat16, BFloat16)
DENSE(int8, Int8)
DENSE(int4, Int4)

// Reads all bytes once, a number of them that 256 × threads divides.
extern "C" int64_t read_all(const char* from, int64_t bytes, int64_t threads) {
    int64_t seen = 0;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(+ : seen)
    for (int64_t part = 0; part < threads; ++part) seen += read_part(from + bytes / threads * part, bytes / threads);
    return seen;
}
