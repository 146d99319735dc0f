// Attention of one query to each sequence, which is what decoding does: softmax(q Kᵀ) V for each head.
//
// Keys and values are read once for four heads that share them. Scores, their softmax and sums are float32; the result is
// rounded in the end.
#include <algorithm>
#include <limits>
#include <vector>

#include "attention.hpp"
#include "lanes.hpp"

namespace {

constexpr int64_t TOGETHER = 4;  // heads

// e^x for x ≤ 0, within 2^-22 of it; 0 below -87, and what is not a number stays so: 2^n times a polynomial of what is left, between -ln 2 / 2 and ln 2 / 2.
template <typename Way> inline void exponential(typename Way::Floats& x) {
    using Floats = typename Way::Floats;
    using Bits = typename Way::Bits;
    const Floats in = x;
    const Floats shift = in * 1.44269504f + 12582912.0f, n = shift - 12582912.0f;  // 1.5 · 2^23: rounds to whole numbers
    const Floats rest = (in - n * 0.693359375f) + n * 2.12194440e-4f;
    Floats sum = rest * 1.9875691500e-4f + 1.3981999507e-3f;
    sum = sum * rest + 8.3334519073e-3f;
    sum = sum * rest + 4.1665795894e-2f;
    sum = sum * rest + 1.6666665459e-1f;
    sum = sum * rest + 5.0000001201e-1f;
    sum = sum * rest * rest + rest + 1.0f;
    Bits whole, bits;
    std::memcpy(&whole, &shift, sizeof whole);
    std::memcpy(&bits, &sum, sizeof bits);
    bits += (whole - 0x4b400000u) << 23;
    const Bits kept = Bits(in >= -87.0f), lost = Bits(in != in);
    std::memcpy(&whole, &in, sizeof whole);
    bits = (bits & kept) | (whole & lost);
    std::memcpy(&x, &bits, sizeof bits);
}

// Scores become shares of one, but for their sum, which is returned. Past the end there is room for a register.
template <typename Way> inline float softened(float* scores, int64_t tokens) {
    constexpr int64_t LANES = Way::LANES;
    constexpr float NEVER = -std::numeric_limits<float>::infinity();
    std::fill_n(scores + tokens, LANES, NEVER);
    float most = NEVER;
    for (int64_t t = 0; t < tokens; ++t) most = std::max(most, scores[t]);
    if (most == NEVER) most = 0;
    typename Way::Floats sum = {}, some;
    for (int64_t t = 0; t < tokens; t += LANES) {
        std::memcpy(&some, scores + t, sizeof some);
        some -= most;
        exponential<Way>(some);
        std::memcpy(scores + t, &some, sizeof some);
        sum += some;
    }
    return Way::total(sum);
}

// HEADS queries to the same keys and values; scores (HEADS, room).
template <typename Number, typename Way, int HEADS>
inline void attended(const Attention& of, const float* queries, const Number* keys, const Number* values,
                     const uint8_t* allowed, float* scores, int64_t room, Number* out) {
    using Floats = typename Way::Floats;
    constexpr int64_t LANES = Way::LANES, SPAN = LANES > 8 ? 64 : 16;  // of a value: as many sums as registers hold
    const int64_t whole = of.width / LANES * LANES;
    for (int64_t t = 0; t < of.tokens; ++t, keys += of.key_token) {
        Floats sums[HEADS] = {};
        for (int64_t i = 0; i < whole; i += LANES) {
            Floats key, query;
            Way::widen(keys + i, key);
            for (int h = 0; h < HEADS; ++h) {
                std::memcpy(&query, queries + h * of.width + i, sizeof query);
                sums[h] += key * query;
            }
        }
        for (int h = 0; h < HEADS; ++h) {
            float sum = Way::total(sums[h]);
            for (int64_t i = whole; i < of.width; ++i) sum += wide(keys[i]) * queries[h * of.width + i];
            scores[h * room + t] = allowed && !allowed[t] ? -std::numeric_limits<float>::infinity() : sum * of.scale;
        }
    }
    float parts[HEADS];
    for (int h = 0; h < HEADS; ++h) {
        const float sum = softened<Way>(scores + h * room, of.tokens);
        parts[h] = sum != 0 ? 1 / sum : 0;
    }
    int64_t first = 0;
    for (; first + SPAN <= of.value_width; first += SPAN) {
        Floats sums[HEADS][SPAN / LANES] = {};
        const Number* value = values + first;
        for (int64_t t = 0; t < of.tokens; ++t, value += of.value_token)
            for (int64_t i = 0; i < SPAN / LANES; ++i) {
                Floats some;
                Way::widen(value + i * LANES, some);
                for (int h = 0; h < HEADS; ++h) sums[h][i] += some * scores[h * room + t];
            }
        for (int h = 0; h < HEADS; ++h) {
            float numbers[SPAN];
            std::memcpy(numbers, sums[h], sizeof numbers);
            for (int64_t i = 0; i < SPAN; ++i) narrow(numbers[i] * parts[h], out + h * of.value_width + first + i);
        }
    }
    for (; first < of.value_width; ++first)
        for (int h = 0; h < HEADS; ++h) {
            float sum = 0;
            for (int64_t t = 0; t < of.tokens; ++t) sum += wide(values[t * of.value_token + first]) * scores[h * room + t];
            narrow(sum * parts[h], out + h * of.value_width + first);
        }
}

// All heads of one sequence that share keys and values.
template <typename Number, typename Way> inline void one(const Attention& of, int64_t sequence, int64_t shared) {
    const int64_t group = of.heads / of.shared, room = of.tokens + Way::LANES;
    const auto* query = static_cast<const Number*>(of.query) + sequence * of.query_sequence;
    const auto* keys = static_cast<const Number*>(of.keys) + sequence * of.key_sequence + shared * of.key_head;
    const auto* values = static_cast<const Number*>(of.values) + sequence * of.value_sequence + shared * of.value_head;
    const uint8_t* allowed = of.allowed ? of.allowed + sequence * of.allowed_sequence : nullptr;
    std::vector<float> queries(size_t(TOGETHER * of.width)), scores(size_t(TOGETHER * room));
    for (int64_t head = shared * group; head < (shared + 1) * group;) {
        const int64_t heads = std::min(TOGETHER, (shared + 1) * group - head);
        for (int64_t h = 0; h < heads; ++h)
            for (int64_t i = 0; i < of.width; ++i)
                queries[size_t(h * of.width + i)] = wide(query[(head + h) * of.query_head + i]);
        auto* out = static_cast<Number*>(of.out) + (sequence * of.heads + head) * of.value_width;
        head += heads;
        // Not by a pointer to one of them, as only what is called itself is compiled for the instruction set.
        if (heads == 4)
            attended<Number, Way, 4>(of, queries.data(), keys, values, allowed, scores.data(), room, out);
        else if (heads == 3)
            attended<Number, Way, 3>(of, queries.data(), keys, values, allowed, scores.data(), room, out);
        else if (heads == 2)
            attended<Number, Way, 2>(of, queries.data(), keys, values, allowed, scores.data(), room, out);
        else
            attended<Number, Way, 1>(of, queries.data(), keys, values, allowed, scores.data(), room, out);
    }
}

}  // namespace

// attend_<dtype>_<path>, by so many threads at most.
#define CALL(NAME, NUMBER, PATH, WAY, ATTRIBUTE)                                                                     \
    ATTRIBUTE static void one_##NAME##_##PATH(const Attention& of, int64_t sequence, int64_t shared) {               \
        one<NUMBER, WAY>(of, sequence, shared);                                                                      \
    }                                                                                                                \
    extern "C" void attend_##NAME##_##PATH(const Attention* of, int64_t most) {                                      \
        const int64_t parts = of->sequences * of->shared;                                                            \
        const int64_t products = of->sequences * of->heads * of->tokens * (of->width + of->value_width);             \
        const int64_t threads = std::max(int64_t(1), std::min(most, products / of->share));                          \
        _Pragma("omp parallel for num_threads(threads) schedule(static)") for (int64_t part = 0; part < parts;       \
                                                                               ++part)                               \
            one_##NAME##_##PATH(*of, part / of->shared, part % of->shared);                                          \
    }

ALL
