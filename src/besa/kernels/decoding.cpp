// What an attention module does for one new token, from its input to its output. The parts are kernels of other files.
//
// Between them, results are rounded as torch rounds them, so that they are equal to the bit to what its operators give.
#include "attention.hpp"
#include "lanes.hpp"

// As besa.kernels.decoding fills them in.
struct Linear {
    void (*multiply)(const void* weight, const void* x, int64_t batch, void* y, int64_t threads);
    const void *weight, *bias;  // or no bias
    int64_t rows;
};
struct Norm {
    void (*normed)(const void* x, const void* weight, void* y, int64_t rows, int64_t width, float epsilon, float more,
                   int64_t rounded);  // or none
    const void* weight;
    int64_t width;
    float epsilon, more;
    int64_t rounded;
};
struct Step {
    Linear query, key, value, out;
    Norm query_norm, key_norm;
    const void *x, *cosines, *sines;
    void *new_key, *new_value;  // their first heads in the cache
    void *keys, *values, *y;    // room for all heads of each; the output
    int64_t turned, threads;    // numbers of a head that the rotary embedding turns
    void (*attend)(const Attention* of, int64_t threads);
    int64_t attention_threads;
    Attention attention;
};

namespace {

template <typename Number> Number rounded(float number) {
    Number half;
    narrow(number, &half);
    return half;
}

template <typename Number> void multiplied(const Linear& linear, const void* x, void* y, int64_t threads) {
    linear.multiply(linear.weight, x, 1, y, threads);
    auto* numbers = static_cast<Number*>(y);
    const auto* bias = static_cast<const Number*>(linear.bias);
    for (int64_t i = 0; bias && i < linear.rows; ++i) narrow(wide(numbers[i]) + wide(bias[i]), numbers + i);
}

void normed(const Norm& norm, void* x, int64_t numbers) {
    if (norm.normed)
        norm.normed(x, norm.weight, x, numbers / norm.width, norm.width, norm.epsilon, norm.more, norm.rounded);
}

// The rotary embedding of a head: pairs of numbers that are half of `turned` apart are turned. Those behind it stay.
template <typename Number>
void turn(const Number* x, const Number* cosines, const Number* sines, int64_t width, int64_t turned, Number* y) {
    const int64_t half = turned / 2;
    for (int64_t i = 0; i < half; ++i) {
        const float first = wide(x[i]), second = wide(x[i + half]);
        const Number left = rounded<Number>(first * wide(cosines[i]));
        const Number right = rounded<Number>(-second * wide(sines[i]));
        const Number up = rounded<Number>(second * wide(cosines[i + half]));
        const Number down = rounded<Number>(first * wide(sines[i + half]));
        narrow(wide(left) + wide(right), y + i);
        narrow(wide(up) + wide(down), y + i + half);
    }
    for (int64_t i = turned; i < width; ++i) y[i] = x[i];
}

template <typename Number> void decoded(const Step& of) {
    const Attention& attention = of.attention;
    const auto *cosines = static_cast<const Number*>(of.cosines), *sines = static_cast<const Number*>(of.sines);
    auto* queries = static_cast<Number*>(const_cast<void*>(attention.query));
    auto *keys = static_cast<Number*>(of.keys), *values = static_cast<Number*>(of.values);
    multiplied<Number>(of.query, of.x, queries, of.threads);
    multiplied<Number>(of.key, of.x, keys, of.threads);
    multiplied<Number>(of.value, of.x, values, of.threads);
    normed(of.query_norm, queries, of.query.rows);
    normed(of.key_norm, keys, of.key.rows);
    const int64_t width = attention.width;
    for (int64_t h = 0; h < attention.heads; ++h, queries += width)
        turn(queries, cosines, sines, width, of.turned, queries);
    for (int64_t h = 0; h < attention.shared; ++h) {
        auto* key = static_cast<Number*>(of.new_key) + h * attention.key_head;
        auto* value = static_cast<Number*>(of.new_value) + h * attention.value_head;
        turn(keys + h * width, cosines, sines, width, of.turned, key);
        std::memcpy(value, values + h * attention.value_width, size_t(attention.value_width) * sizeof(Number));
    }
    of.attend(&attention, of.attention_threads);
    multiplied<Number>(of.out, attention.out, of.y, of.threads);
}

}  // namespace

extern "C" void decode_float32(const Step* of) { decoded<float>(*of); }
extern "C" void decode_bfloat16(const Step* of) { decoded<uint16_t>(*of); }
