// Rows divided by the root of their mean square, times a weight: what most families do before each linear.
#include <cmath>

#include "lanes.hpp"

namespace {

// ROUNDED: a number is rounded before it meets its weight, as most families do it; `more` is added to each weight.
template <typename Number, typename Way>
inline void normed(const Number* x, const Number* weight, int64_t width, float epsilon, float more, bool rounded,
                   Number* y) {
    constexpr int64_t LANES = Way::LANES;
    const int64_t whole = width / LANES * LANES;
    typename Way::Floats squares = {}, some, factors;
    for (int64_t i = 0; i < whole; i += LANES) {
        Way::widen(x + i, some);
        squares += some * some;
    }
    float sum = Way::total(squares);
    for (int64_t i = whole; i < width; ++i) sum += wide(x[i]) * wide(x[i]);
    const float inverse = 1 / std::sqrt(sum / float(width) + epsilon);
    for (int64_t i = 0; i < width; i += LANES) {
        float numbers[LANES] = {}, weights[LANES] = {};
        const int64_t count = i < whole ? LANES : width - whole;
        if (i < whole) {
            Way::widen(x + i, some);
            Way::widen(weight + i, factors);
            std::memcpy(numbers, &some, sizeof numbers);
            std::memcpy(weights, &factors, sizeof weights);
        } else
            for (int64_t k = 0; k < count; ++k) numbers[k] = wide(x[i + k]), weights[k] = wide(weight[i + k]);
        Number results[LANES];
        for (int64_t k = 0; k < LANES; ++k) {
            float number = numbers[k] * inverse;
            Number half;
            narrow(number, &half);
            number = rounded ? wide(half) : number;
            narrow(number * (weights[k] + more), &results[k]);
        }
        std::memcpy(y + i, results, size_t(count) * sizeof(Number));
    }
}

}  // namespace

// norm_<dtype>_<path>: y (rows, width) of x (rows, width).
#define CALL(NAME, NUMBER, PATH, WAY, ATTRIBUTE)                                                                      \
    ATTRIBUTE static void row_##NAME##_##PATH(const NUMBER* x, const NUMBER* weight, int64_t width, float epsilon,    \
                                              float more, bool rounded, NUMBER* y) {                                  \
        normed<NUMBER, WAY>(x, weight, width, epsilon, more, rounded, y);                                             \
    }                                                                                                                 \
    extern "C" void norm_##NAME##_##PATH(const NUMBER* x, const NUMBER* weight, NUMBER* y, int64_t rows, int64_t width, \
                                         float epsilon, float more, int64_t rounded) {                                \
        for (int64_t row = 0; row < rows; ++row)                                                                      \
            row_##NAME##_##PATH(x + row * width, weight, width, epsilon, more, rounded != 0, y + row * width);        \
    }

ALL
