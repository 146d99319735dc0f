// What an attention module, or a whole block, does for one new token. The parts are kernels of other files.
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
struct Step {  // of an attention module
    Linear query, key, value, out;
    Norm query_norm, key_norm;
    void (*attend)(const Attention* of, int64_t threads);
    int64_t threads;
    Attention attention;  // as far as all tokens have it in common
};
struct Block {
    Step attention;
    Norm before_attention, after_attention, before_mlp, after_mlp;
    Linear gate, up, down;
    const void* activation;  // of each number of bfloat16, by its bits
    int64_t width;
};
struct Token {
    const void *cosines, *sines;
    const uint8_t* allowed;
    int64_t turned, tokens;  // numbers of a head that the rotary embedding turns; with this one
};
struct Place {  // in a layer of the cache
    void *keys, *values;
    int64_t key_head, value_head;
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

// The numbers with their norm: y, or x itself if there is none.
const void* normed(const Norm& norm, const void* x, void* y, int64_t numbers) {
    if (!norm.normed) return x;
    norm.normed(x, norm.weight, y, numbers / norm.width, norm.width, norm.epsilon, norm.more, norm.rounded);
    return y;
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

// The output of an attention module; the cache has room for the token. `room`: for what the first three linears and
// attention give.
template <typename Number>
void attended(const Step& of, const Token& token, const Place& place, const void* x, void* room, void* y) {
    Attention attention = of.attention;
    const int64_t width = attention.width, value_width = attention.value_width, last = token.tokens - 1;
    const auto *cosines = static_cast<const Number*>(token.cosines), *sines = static_cast<const Number*>(token.sines);
    auto* queries = static_cast<Number*>(room);
    auto *keys = queries + of.query.rows, *values = keys + of.key.rows, *out = values + of.value.rows;
    multiplied<Number>(of.query, x, queries, of.threads);
    multiplied<Number>(of.key, x, keys, of.threads);
    multiplied<Number>(of.value, x, values, of.threads);
    normed(of.query_norm, queries, queries, of.query.rows);
    normed(of.key_norm, keys, keys, of.key.rows);
    for (int64_t h = 0; h < attention.heads; ++h)
        turn(queries + h * width, cosines, sines, width, token.turned, queries + h * width);
    auto* new_keys = static_cast<Number*>(place.keys) + last * attention.key_token;
    auto* new_values = static_cast<Number*>(place.values) + last * attention.value_token;
    for (int64_t h = 0; h < attention.shared; ++h) {
        turn(keys + h * width, cosines, sines, width, token.turned, new_keys + h * place.key_head);
        std::memcpy(new_values + h * place.value_head, values + h * value_width, size_t(value_width) * sizeof(Number));
    }
    attention.query = queries;
    attention.keys = place.keys;
    attention.values = place.values;
    attention.key_head = place.key_head;
    attention.value_head = place.value_head;
    attention.allowed = token.allowed;
    attention.tokens = token.tokens;
    attention.out = out;
    of.attend(&attention, of.threads);
    multiplied<Number>(of.out, out, y, of.threads);
}

// y = x + attention(x), then the same with the MLP: down(activation(gate(x)) · up(x)). `room`: for twice the numbers of x,
// gates and ups, and what attention needs.
void passed(const Block& of, const Token& token, const Place& place, const uint16_t* x, uint16_t* room, uint16_t* y) {
    const int64_t threads = of.attention.threads, width = of.width, inner = of.gate.rows;
    const auto* activation = static_cast<const uint16_t*>(of.activation);
    auto *part = room + width, *gates = part + width, *ups = gates + inner;
    const auto add = [&](const uint16_t* stream, const void* more) {
        const auto* numbers = static_cast<const uint16_t*>(more);
        for (int64_t i = 0; i < width; ++i) narrow(wide(stream[i]) + wide(numbers[i]), y + i);
    };
    attended<uint16_t>(of.attention, token, place, normed(of.before_attention, x, room, width), ups + inner, part);
    add(x, normed(of.after_attention, part, part, width));
    const void* in = normed(of.before_mlp, y, room, width);
    multiplied<uint16_t>(of.gate, in, gates, threads);
    multiplied<uint16_t>(of.up, in, ups, threads);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < inner; ++i) narrow(wide(activation[gates[i]]) * wide(ups[i]), gates + i);
    multiplied<uint16_t>(of.down, gates, part, threads);
    add(y, normed(of.after_mlp, part, part, width));
}

}  // namespace

#define ATTEND(NAME, NUMBER)                                                                                         \
    extern "C" void attend_##NAME(const Step* of, const Token* token, const Place* place, const void* x, void* room, \
                                  void* y) {                                                                         \
        attended<NUMBER>(*of, *token, *place, x, room, y);                                                           \
    }
ATTEND(float32, float)
ATTEND(bfloat16, uint16_t)

// Blocks that follow each other: y (count, width) has the output of each.
extern "C" void pass_bfloat16(const Block* const* blocks, int64_t count, const Token* token, const Place* places,
                              const uint16_t* x, uint16_t* room, uint16_t* y) {
    for (int64_t b = 0; b < count; ++b, x = y, y += blocks[0]->width)
        passed(*blocks[b], *token, places[b], x, room, y);
}
