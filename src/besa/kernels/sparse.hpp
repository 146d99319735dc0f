// What the kernels of all processors share: a bitmask weight as they get it, its numbers, and how threads divide it.
// docs/formats.md says how one lies in memory.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

struct Weight {  // as besa.kernels.sparse_native fills it in
    const void* masks;
    const uint8_t* values;
    const int64_t* offsets;
    int64_t rows, columns;
    // Of codes only:
    const void* scales;    // (rows, groups)
    const uint8_t* zeros;  // (rows, groups); none where all are `zero`
    int64_t scale_type;    // 0 float32, 1 bfloat16, 2 float16
    int64_t groups, zero;
    // How sparse_avx512.cpp reads it for one row of x, 0 as usual:
    int64_t bands;  // read at once: 1, 2 or 4
    int64_t ahead;  // bytes fetched before they are met
    int64_t first;  // whether they come to the first cache
    int64_t past;   // for any rows of x: whether they come past the outer caches, if not to the first one
};

namespace {

constexpr int64_t ROWS = 4;  // of a band
// Where codes meet x as whole numbers, x is in fixed point, as two or three digits to the base 256:
constexpr float TWO = 127 * 257.0f, THREE = 127 * 65793.0f;  // largest numbers of so many digits
constexpr float FINE = 2048;  // units in the mean of a row of x in half precision, at least

inline float bits_as_float(uint32_t bits) {
    float result;
    std::memcpy(&result, &bits, sizeof result);
    return result;
}
inline float from_bfloat16(uint16_t bits) { return bits_as_float(uint32_t(bits) << 16); }
inline uint16_t to_bfloat16(float number) {  // rounded to the nearest, as torch does
    uint32_t bits;
    std::memcpy(&bits, &number, sizeof bits);
    return uint16_t(number != number ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline float from_float16(uint16_t bits) {
    const uint32_t sign = uint32_t(bits & 0x8000) << 16, rest = uint32_t(bits & 0x7fff) << 13;
    const float scaled = bits_as_float(rest) * 0x1p112f;  // also where it is subnormal
    uint32_t magnitude;
    std::memcpy(&magnitude, &scaled, sizeof magnitude);
    return bits_as_float(sign | (rest >= 0x0f800000 ? rest | 0x7f800000 : magnitude));
}

// The step of a row's group; `at` counts through all rows.
inline float step_of(const Weight& weight, int64_t at) {
    if (weight.scale_type == 0) return static_cast<const float*>(weight.scales)[at];
    const uint16_t half = static_cast<const uint16_t*>(weight.scales)[at];
    return weight.scale_type == 1 ? from_bfloat16(half) : from_float16(half);
}
inline uint8_t zero_of(const Weight& weight, int64_t at) {
    return weight.zeros ? weight.zeros[at] : uint8_t(weight.zero);
}

// The first of `all` bands that a part has, if the parts have the same number of bytes to read: learned rows differ in what
// they keep. `each`: bytes of a band besides those that `offsets` tell.
inline int64_t first_of(const int64_t* offsets, int64_t all, int64_t each, int64_t part, int64_t parts) {
    const int64_t aim = (offsets[all] + all * each) * part / parts;
    int64_t low = 0, high = all;
    while (low < high) {
        const int64_t middle = (low + high) / 2;
        if (offsets[middle] + middle * each < aim)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

// The same for the bands of a weight. Word: of a mask, one bit for every column of a chunk.
template <typename Word> int64_t first_band(const Weight& weight, int64_t part, int64_t parts) {
    const int64_t length = 8 * sizeof(Word);
    const int64_t masks = (weight.columns + length - 1) / length * ROWS * int64_t(sizeof(Word));
    return first_of(weight.offsets, (weight.rows + ROWS - 1) / ROWS, masks, part, parts);
}

// A product of float32 numbers, with x and y in bfloat16.
using Multiply = void(const Weight*, const float*, int64_t, float*, int64_t);
inline void in_halves(Multiply* multiply, const Weight* weight, const uint16_t* x, int64_t batch, uint16_t* y,
                      int64_t threads) {
    std::vector<float> wide(size_t(batch * weight->columns)), sums(size_t(batch * weight->rows));
    for (size_t i = 0; i < wide.size(); ++i) wide[i] = from_bfloat16(x[i]);
    multiply(weight, wide.data(), batch, sums.data(), threads);
    for (size_t i = 0; i < sums.size(); ++i) y[i] = to_bfloat16(sums[i]);
}

}  // namespace

// For a file whose functions `multiply` and `expand` take a kind of weight, what is called of it.
// multiply_<kind>_<path>: y (batch, rows) of x (batch, columns). halves_<kind>_<path>: both in bfloat16.
// expand_<kind>_<path>: some bands, dense.
#define CALLS(NAME, PATH, ...)                                                                                         \
    extern "C" void multiply_##NAME##_##PATH(const Weight* weight, const float* x, int64_t batch, float* y,            \
                                             int64_t threads) {                                                        \
        multiply<__VA_ARGS__>(*weight, x, batch, y, threads);                                                          \
    }                                                                                                                  \
    extern "C" void halves_##NAME##_##PATH(const Weight* weight, const uint16_t* x, int64_t batch, uint16_t* y,        \
                                           int64_t threads) {                                                          \
        in_halves(multiply_##NAME##_##PATH, weight, x, batch, y, threads);                                             \
    }                                                                                                                  \
    extern "C" void expand_##NAME##_##PATH(const Weight* weight, int64_t first, int64_t last, char* out,               \
                                           int64_t threads) {                                                          \
        expand<__VA_ARGS__>(*weight, first, last, out, threads);                                                       \
    }
