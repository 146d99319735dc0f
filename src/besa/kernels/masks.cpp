// The passes over a weight that learning steps need: two of those that learn masks, two of those that learn what a mask
// keeps. The Python beside it says what they compute.
//
// Each is written once, as a template that is compiled for several instruction sets; the caller chooses one that the
// processor has. All give the same bits: a row's sums are taken in the order of its columns, without fused
// multiply-adds.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__x86_64__)
#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq"), flatten))
#define AVX2 __attribute__((target("avx2"), flatten))
#endif
#define PLAIN __attribute__((flatten))

namespace {

constexpr int64_t ROWS = 4;      // histograms filled side by side, so that none waits for its own last addition
constexpr int64_t COLUMNS = 64;  // products computed at a time

struct BFloat16 {
    uint16_t bits;
};

inline float wide(float value) { return value; }
inline float wide(BFloat16 value) {
    const uint32_t bits = uint32_t(value.bits) << 16;
    float result;
    std::memcpy(&result, &bits, sizeof result);
    return result;
}

inline void narrow(float value, float& to) { to = value; }
inline void narrow(float value, BFloat16& to) {  // rounded to the nearest, as torch does
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    to.bits = uint16_t(value != value ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// Word: as many bits as a weight has; which numbers they are does not matter here.
template <typename Word, typename Rank>
inline void masked_rows(const Word* w, const Rank* ranks, const int64_t* counts, Word* out, int64_t first, int64_t last,
                        int64_t columns) {
    for (int64_t row = first; row < last; ++row) {
        const Word* w_row = w + row * columns;
        const Rank* ranks_row = ranks + row * columns;
        Word* out_row = out + row * columns;
        const Rank count = Rank(counts[row]);
        for (int64_t column = 0; column < columns; ++column)
            out_row[column] = w_row[column] & Word(-Word(ranks_row[column] >= count));  // no branch: it would not vectorise
    }
}

template <typename Number, typename Rank>
inline void binned_rows(const Number* gradient, const Number* w, const Rank* ranks, const int16_t* bins, float* sums,
                        int64_t first, int64_t last, int64_t columns, int64_t n_bins) {
    std::vector<float> scratch(size_t(ROWS * n_bins));
    float products[ROWS][COLUMNS];
    for (int64_t top = first; top < last; top += ROWS) {
        const int64_t rows = last - top < ROWS ? last - top : ROWS;
        std::memset(scratch.data(), 0, scratch.size() * sizeof(float));
        for (int64_t left = 0; left < columns; left += COLUMNS) {
            const int64_t width = columns - left < COLUMNS ? columns - left : COLUMNS;
            for (int64_t row = 0; row < rows; ++row) {
                const int64_t at = (top + row) * columns + left;
                for (int64_t column = 0; column < width; ++column)
                    products[row][column] = wide(gradient[at + column]) * wide(w[at + column]);
            }
            const Rank* corner = ranks + top * columns + left;
            if (rows == ROWS) {
                for (int64_t column = 0; column < width; ++column)
                    for (int64_t row = 0; row < ROWS; ++row)
                        scratch[size_t(row * n_bins + bins[corner[row * columns + column]])] += products[row][column];
            } else {
                for (int64_t row = 0; row < rows; ++row)
                    for (int64_t column = 0; column < width; ++column)
                        scratch[size_t(row * n_bins + bins[corner[row * columns + column]])] += products[row][column];
            }
        }
        std::memcpy(sums + top * n_bins, scratch.data(), size_t(rows * n_bins) * sizeof(float));
    }
}

template <typename Number> inline int64_t kept_of_row(const Number* w, int64_t columns) {
    int64_t kept = 0;
    for (int64_t column = 0; column < columns; ++column) kept += wide(w[column]) != 0;
    return kept;
}

// Where the kept weights of every row begin, and after them all their end.
template <typename Number, auto COUNT>
std::vector<int64_t> starts_of(const Number* w, int64_t rows, int64_t columns, int64_t threads) {
    std::vector<int64_t> starts(size_t(rows + 1));
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = 0; row < rows; ++row) starts[size_t(row + 1)] = COUNT(w + row * columns, columns);
    for (size_t row = 1; row < starts.size(); ++row) starts[row] += starts[row - 1];
    return starts;
}

template <typename Number, typename Word>
inline void spread_row(const Number* w, const float* kept, int64_t count, Number* out, int64_t columns) {
    const float nothing = 0;
    const float* from = count ? kept : &nothing;
    int64_t met = 0;
    for (int64_t column = 0; column < columns; ++column) {
        Number value;
        narrow(from[std::min(met, std::max<int64_t>(count - 1, 0))], value);
        Word bits;
        std::memcpy(&bits, &value, sizeof bits);
        const bool is = wide(w[column]) != 0;
        bits &= Word(-Word(is));  // no branch: half of the time it would go another way than expected
        std::memcpy(out + column, &bits, sizeof bits);
        met += is;
    }
}

template <typename Number> inline void gathered_row(const Number* w, const Number* x, float* out, int64_t columns) {
    float some[COLUMNS];
    for (int64_t left = 0; left < columns; left += COLUMNS) {
        const int64_t right = std::min(columns, left + COLUMNS);
        int64_t met = 0;
        for (int64_t column = left; column < right; ++column) {
            some[met] = wide(x[column]);
            met += wide(w[column]) != 0;
        }
        out = std::copy_n(some, met, out);
    }
}

}  // namespace

// One function for each kind of number, width of ranks and instruction set, called as
// masked_<bits>_<rank bits>_<path> and binned_<number>_<rank bits>_<path>. Rows are shared out evenly to the threads.
#define MASKED(NAME, WORD, RANK, PATH, ATTRIBUTE)                                                                      \
    ATTRIBUTE static void masked_##NAME##_##PATH##_part(const WORD* w, const RANK* ranks, const int64_t* counts,       \
                                                        WORD* out, int64_t first, int64_t last, int64_t columns) {     \
        masked_rows<WORD, RANK>(w, ranks, counts, out, first, last, columns);                                          \
    }                                                                                                                  \
    extern "C" void masked_##NAME##_##PATH(const WORD* w, const RANK* ranks, const int64_t* counts, WORD* out,         \
                                           int64_t rows, int64_t columns, int64_t threads) {                           \
        _Pragma("omp parallel for num_threads(threads) schedule(static)") for (int64_t part = 0; part < threads;       \
                                                                               ++part)                                 \
            masked_##NAME##_##PATH##_part(w, ranks, counts, out, rows* part / threads, rows*(part + 1) / threads,      \
                                          columns);                                                                    \
    }

#define BINNED(NAME, NUMBER, RANK, PATH, ATTRIBUTE)                                                                    \
    ATTRIBUTE static void binned_##NAME##_##PATH##_part(const NUMBER* gradient, const NUMBER* w, const RANK* ranks,    \
                                                        const int16_t* bins, float* sums, int64_t first, int64_t last, \
                                                        int64_t columns, int64_t n_bins) {                             \
        binned_rows<NUMBER, RANK>(gradient, w, ranks, bins, sums, first, last, columns, n_bins);                       \
    }                                                                                                                  \
    extern "C" void binned_##NAME##_##PATH(const NUMBER* gradient, const NUMBER* w, const RANK* ranks,                 \
                                           const int16_t* bins, float* sums, int64_t rows, int64_t columns,            \
                                           int64_t n_bins, int64_t threads) {                                          \
        _Pragma("omp parallel for num_threads(threads) schedule(static)") for (int64_t part = 0; part < threads;       \
                                                                               ++part)                                 \
            binned_##NAME##_##PATH##_part(gradient, w, ranks, bins, sums, rows* part / threads,                        \
                                          rows*(part + 1) / threads, columns, n_bins);                                 \
    }

#define KEPT(NAME, NUMBER, WORD, PATH, ATTRIBUTE)                                                                      \
    ATTRIBUTE static int64_t kept_##NAME##_##PATH(const NUMBER* w, int64_t columns) {                                  \
        return kept_of_row<NUMBER>(w, columns);                                                                        \
    }                                                                                                                  \
    ATTRIBUTE static void spread_##NAME##_##PATH##_row(const NUMBER* w, const float* kept, int64_t count, NUMBER* out, \
                                                       int64_t columns) {                                              \
        spread_row<NUMBER, WORD>(w, kept, count, out, columns);                                                              \
    }                                                                                                                  \
    extern "C" void spread_##NAME##_##PATH(const NUMBER* w, const float* kept, NUMBER* out, int64_t rows,              \
                                           int64_t columns, int64_t threads) {                                         \
        const auto starts = starts_of<NUMBER, kept_##NAME##_##PATH>(w, rows, columns, threads);                        \
        _Pragma("omp parallel for num_threads(threads) schedule(static)") for (int64_t row = 0; row < rows; ++row)     \
            spread_##NAME##_##PATH##_row(w + row * columns, kept + starts[size_t(row)],                                \
                                         starts[size_t(row + 1)] - starts[size_t(row)], out + row * columns, columns); \
    }                                                                                                                  \
    ATTRIBUTE static void gathered_##NAME##_##PATH##_row(const NUMBER* w, const NUMBER* x, float* out,                 \
                                                         int64_t columns) {                                            \
        gathered_row<NUMBER>(w, x, out, columns);                                                                      \
    }                                                                                                                  \
    extern "C" void gathered_##NAME##_##PATH(const NUMBER* w, const NUMBER* x, float* out, int64_t rows,               \
                                             int64_t columns, int64_t threads) {                                       \
        const auto starts = starts_of<NUMBER, kept_##NAME##_##PATH>(w, rows, columns, threads);                        \
        _Pragma("omp parallel for num_threads(threads) schedule(static)") for (int64_t row = 0; row < rows; ++row)     \
            gathered_##NAME##_##PATH##_row(w + row * columns, x + row * columns, out + starts[size_t(row)], columns);  \
    }

#define ALL(PATH, ATTRIBUTE)                                    \
    MASKED(32_16, uint32_t, int16_t, PATH, ATTRIBUTE)           \
    MASKED(32_32, uint32_t, int32_t, PATH, ATTRIBUTE)           \
    MASKED(16_16, uint16_t, int16_t, PATH, ATTRIBUTE)           \
    MASKED(16_32, uint16_t, int32_t, PATH, ATTRIBUTE)           \
    BINNED(float32_16, float, int16_t, PATH, ATTRIBUTE)         \
    BINNED(float32_32, float, int32_t, PATH, ATTRIBUTE)         \
    BINNED(bfloat16_16, BFloat16, int16_t, PATH, ATTRIBUTE)     \
    BINNED(bfloat16_32, BFloat16, int32_t, PATH, ATTRIBUTE)     \
    KEPT(float32, float, uint32_t, PATH, ATTRIBUTE)             \
    KEPT(bfloat16, BFloat16, uint16_t, PATH, ATTRIBUTE)

ALL(plain, PLAIN)
#if defined(__x86_64__)
ALL(avx2, AVX2)
ALL(avx512, AVX512)
#endif

// Whether the processor can run a path.
extern "C" int has_plain() { return 1; }
#if defined(__x86_64__)
extern "C" int has_avx2() { return __builtin_cpu_supports("avx2"); }
extern "C" int has_avx512() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
#endif
