// The kernels of sparse.cpp for Arm processors of 64 bits, all of which have NEON: a table says for every mask of a few
// columns which of the kept bytes belongs where, and one instruction moves sixteen of them there.
//
// Sums are kept in registers. Codes are multiplied as whole numbers, with x in digits of eight bits. The path `neondot`
// does so with the instruction for dot products, and `neonbf16` multiplies pairs of bfloat16 with theirs.
#if defined(__aarch64__)
#include <arm_neon.h>

#include <utility>

#include "sparse.hpp"

#if defined(__APPLE__)
#include <sys/sysctl.h>
#elif defined(__linux__)
#include <sys/auxv.h>
#endif

#define INLINE __attribute__((always_inline)) static inline
#define INLINED __attribute__((always_inline))
#define FLAT __attribute__((flatten))
// sum += w · x by an instruction that is given as a number: so the rest is compiled for processors without it, and every
// assembler knows it.
#define REGISTERS ".irp n,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31\n\t"
#define MULTIPLY(CODE, SUM, W, X)                                                                            \
    asm(REGISTERS ".equ .Lv\\n, \\n\n\t.endr\n\t.inst " CODE " | (.L%2 << 16) | (.L%1 << 5) | .L%0" \
        : "+w"(SUM)                                                                                          \
        : "w"(W), "w"(X))

namespace {

constexpr int STEPS = 4;       // of a chunk, whose 64 bytes of a row are four vectors
constexpr int64_t TILE = 128;  // steps: expanded at a time where a batch shares them, and summed up as whole numbers
constexpr uint8_t NONE = 128;  // no byte of a table; nor is what comes up to 64 after it

// Calls `work` with each number below COUNT, as a constant.
template <typename Work, int... I> INLINE void each(Work work, std::integer_sequence<int, I...>) {
    (work(std::integral_constant<int, I>()), ...);
}
template <int COUNT, typename Work> INLINE void times(Work work) {
    each(work, std::make_integer_sequence<int, COUNT>());
}

// For every mask of so many columns: which of the kept bytes is each byte of the columns.
template <int COLUMNS, int SIZE> struct Places {
    alignas(16) uint8_t of[1 << COLUMNS][COLUMNS * SIZE];
    constexpr Places() : of() {
        for (int mask = 0; mask < 1 << COLUMNS; ++mask)
            for (int i = 0, kept = 0; i < COLUMNS; kept += mask >> i++ & 1)
                for (int byte = 0; byte < SIZE; ++byte)
                    of[mask][i * SIZE + byte] = mask >> i & 1 ? uint8_t(kept * SIZE + byte) : NONE;
    }
};
template <int COLUMNS, int SIZE> constexpr Places<COLUMNS, SIZE> PLACES{};

// Floats: a chunk of a band, as masks of a step each and the places where the steps' values begin.
template <typename Kind> struct FloatRuns {
    uint32x4_t masks, ends;  // by row, a byte for each step: its mask; how many bytes the run has up to its end
    const uint8_t* at[ROWS];

    INLINED FloatRuns(const typename Kind::Word* from, const uint8_t*& next) {
        const uint8x16_t split = Kind::split(reinterpret_cast<const uint8_t*>(from));
        masks = vreinterpretq_u32_u8(split);
        ends = vreinterpretq_u32_u8(vshlq_n_u8(vcntq_u8(split), Kind::SIZE / 2));
        ends = vmulq_n_u32(ends, 0x01010101);
        times<ROWS>([&](auto r) INLINED {
            at[r] = next;
            next += vgetq_lane_u32(ends, decltype(r)::value) >> 24;
        });
    }
    template <int R, int J> INLINED uint8x16_t bytes(uint8x16_t) const {
        const uint32_t mask = vgetq_lane_u32(masks, R) >> 8 * J & 255;
        const uint32_t begin = J ? vgetq_lane_u32(ends, R) >> (J ? 8 * J - 8 : 0) & 255 : 0;
        const auto& places = PLACES<Kind::LENGTH / STEPS, Kind::SIZE>.of;
        return vqtbl1q_u8(vld1q_u8(at[R] + begin), vld1q_u8(places[mask]));
    }
};

struct Floats {
    static constexpr bool CODES = false;
    static constexpr int TOGETHER = 2;  // rows of x whose sums the registers hold, as they meet a tile
};

struct Float32 : Floats {
    using Word = uint16_t;
    using X = float;
    using Runs = FloatRuns<Float32>;
    using Vector = float32x4_t;
    static constexpr int LENGTH = 16, SIZE = 4, SPAN = 4;  // columns of a chunk, bytes of a value, numbers of x in a step
    INLINE uint8x16_t split(const uint8_t* masks) {
        const uint8x8_t words = vld1_u8(masks), low = vand_u8(words, vdup_n_u8(15)), high = vshr_n_u8(words, 4);
        return vcombine_u8(vzip1_u8(low, high), vzip2_u8(low, high));
    }
    INLINE Vector wide(uint8x16_t w) { return vreinterpretq_f32_u8(w); }
    template <int J> INLINE void add(float32x4_t* sums, Vector w, const X* x) {
        sums[J % 2] = vfmaq_f32(sums[J % 2], w, vld1q_f32(x));
    }
};

struct Halves : Floats {
    using Word = uint32_t;
    static constexpr int LENGTH = 32, SIZE = 2, SPAN = 8;
    INLINE uint8x16_t split(const uint8_t* masks) { return vld1q_u8(masks); }
};

struct WideHalves : Halves {
    using X = float;
    struct Vector {
        float32x4_t low, high;
    };
    template <int J> INLINE void add(float32x4_t* sums, Vector w, const X* x) {
        sums[0] = vfmaq_f32(sums[0], w.low, vld1q_f32(x));
        sums[1] = vfmaq_f32(sums[1], w.high, vld1q_f32(x + 4));
    }
};

struct Float16 : WideHalves {
    using Runs = FloatRuns<Float16>;
    INLINE Vector wide(uint8x16_t w) {
        const float16x8_t halves = vreinterpretq_f16_u8(w);
        return {vcvt_f32_f16(vget_low_f16(halves)), vcvt_high_f32_f16(halves)};
    }
};

struct BFloat16 : WideHalves {
    using Runs = FloatRuns<BFloat16>;
    INLINE Vector wide(uint8x16_t w) {
        const uint16x8_t zero = vdupq_n_u16(0), halves = vreinterpretq_u16_u8(w);
        return {vreinterpretq_f32_u16(vzip1q_u16(zero, halves)), vreinterpretq_f32_u16(vzip2q_u16(zero, halves))};
    }
};

struct BFloat16Pairs : Halves {  // exact products, two at a time
    using X = uint16_t;
    using Runs = FloatRuns<BFloat16Pairs>;
    using Vector = uint8x16_t;
    INLINE Vector wide(uint8x16_t w) { return w; }
    template <int J> INLINE void add(float32x4_t* sums, Vector w, const X* x) {
        MULTIPLY("0x6e40fc00", sums[J % 2], w, vld1q_u16(x));  // bfdot
    }
};

// Codes: a chunk of a band. A step has two masks of eight columns.
template <typename Kind> struct CodeRuns {
    uint64_t masks[ROWS];
    // Of two rows each, a byte for every eight columns: how many codes are kept of them, and up to their end.
    uint8x16_t counts[ROWS / 2];
    uint64x2_t ends[ROWS / 2];
    const uint8_t* at[ROWS];

    INLINED CodeRuns(const uint64_t* from, const uint8_t*& next) {
        times<ROWS / 2>([&](auto i) INLINED {
            constexpr int R = 2 * i;
            masks[R] = from[R];
            masks[R + 1] = from[R + 1];
            counts[i] = vcntq_u8(vreinterpretq_u8_u64(vld1q_u64(from + R)));
            uint64x2_t sums = vreinterpretq_u64_u8(counts[i]);
            sums = vaddq_u64(sums, vshlq_n_u64(sums, 8));
            sums = vaddq_u64(sums, vshlq_n_u64(sums, 16));
            ends[i] = vaddq_u64(sums, vshlq_n_u64(sums, 32));
            at[R] = next;
            next += Kind::size(vgetq_lane_u64(ends[i], 0) >> 56);
            at[R + 1] = next;
            next += Kind::size(vgetq_lane_u64(ends[i], 1) >> 56);
        });
    }
    template <int R, int J> INLINED uint8x16_t bytes(uint8x16_t fill) const {
        const auto& places = PLACES<8, 1>.of;
        const uint8x16_t from = vcombine_u8(vld1_u8(places[masks[R] >> 16 * J & 255]),
                                            vld1_u8(places[masks[R] >> (16 * J + 8) & 255]));
        return Kind::template moved<R % 2, J>(from, counts[R / 2], ends[R / 2], at[R], fill);
    }
};

// Codes are multiplied as whole numbers, with x in fixed point, as digits of eight bits: nothing is rounded until the end
// of a group. A pruned weight has its row's code of zero, times which the digits of x are taken off then.
struct Codes {
    using Word = uint64_t;
    struct alignas(16) X {  // what meets a step
        int8_t digits[3][16];
        int32_t before[3][4];  // sums of the digits before the step, by the lane that they meet
        int64_t wide;          // whether a number of the chunk has a third digit: few are so much larger than the rest
    };
    using Vector = int8x16_t;
    static constexpr bool CODES = true;
    static constexpr int LENGTH = 64, SIZE = 1, SPAN = 1, TOGETHER = 1;
};

template <bool DOT> struct Int8 : Codes {
    using Runs = CodeRuns<Int8>;
    INLINE uint64_t size(uint64_t kept) { return kept; }
    // The codes of a step of the first or second of two rows; `from`: their places among those of eight columns.
    template <int ROW, int J>
    INLINE uint8x16_t moved(uint8x16_t from, uint8x16_t counts, uint64x2_t ends, const uint8_t* at, uint8x16_t fill) {
        alignas(16) static constexpr uint8_t SECOND[16] = {NONE, NONE, NONE, NONE, NONE, NONE, NONE, NONE};
        const uint8x16_t which = vaddq_u8(vld1q_u8(SECOND), vdupq_n_u8(8 * ROW + 2 * J));
        from = vaddq_u8(from, vqtbl1q_u8(counts, which));
        const uint64_t begin = J ? vgetq_lane_u64(ends, ROW) >> (J ? 16 * J - 8 : 0) & 255 : 0;
        return vqtbx1q_u8(fill, vld1q_u8(at + begin), from);
    }
    INLINE Vector wide(uint8x16_t codes) { return vreinterpretq_s8_u8(veorq_u8(codes, vdupq_n_u8(128))); }  // less 128
    INLINE void add(int32x4_t& sum, Vector w, Vector x) {
        if constexpr (DOT) {
            MULTIPLY("0x4e809400", sum, w, x);  // sdot
        } else {
            // Lanes as those of a dot product, so that groups of four columns keep apart.
            const int16x8_t low = vmull_s8(vget_low_s8(w), vget_low_s8(x)), high = vmull_high_s8(w, x);
            sum = vaddq_s32(sum, vpaddq_s32(vpaddlq_s16(low), vpaddlq_s16(high)));
        }
    }
};

template <bool DOT> struct Int4 : Int8<DOT> {
    using Runs = CodeRuns<Int4>;
    INLINE uint64_t size(uint64_t kept) { return (kept + 1) / 2; }
    template <int ROW, int J>
    INLINE uint8x16_t moved(uint8x16_t from, uint8x16_t, uint64x2_t ends, const uint8_t* at, uint8x16_t fill) {
        alignas(16) static constexpr uint8_t BOTH[16] = {0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1};
        const uint8x16_t which = vaddq_u8(vld1q_u8(BOTH), vdupq_n_u8(8 * ROW + 2 * J));
        from = vaddq_u8(from, vqtbl1q_u8(vreinterpretq_u8_u64(vshlq_n_u64(ends, 8)), which));
        const uint8x16x4_t codes = halves(at);  // of which a step can need no more than come up to its last column
        if constexpr (J == 0) return vqtbx1q_u8(fill, codes.val[0], from);
        if constexpr (J == 1) return vqtbx2q_u8(fill, {codes.val[0], codes.val[1]}, from);
        if constexpr (J == 2) return vqtbx3q_u8(fill, {codes.val[0], codes.val[1], codes.val[2]}, from);
        return vqtbx4q_u8(fill, codes, from);
    }
    INLINE uint8x16x4_t halves(const uint8_t* at) {
        const uint8x16_t four = vdupq_n_u8(15), first = vld1q_u8(at), second = vld1q_u8(at + 16);
        const uint8x16_t low[] = {vandq_u8(first, four), vandq_u8(second, four)};
        const uint8x16_t high[] = {vshrq_n_u8(first, 4), vshrq_n_u8(second, 4)};
        return {vzip1q_u8(low[0], high[0]), vzip2q_u8(low[0], high[0]), vzip1q_u8(low[1], high[1]),
                vzip2q_u8(low[1], high[1])};
    }
    INLINE Codes::Vector wide(uint8x16_t codes) { return vreinterpretq_s8_u8(codes); }
};

template <typename Kind> int64_t steps_of(const Weight& weight) {
    return (weight.columns + Kind::LENGTH - 1) / Kind::LENGTH * STEPS;
}

// The rows of x as the kernels read them, with zeros to the end of the last chunk.
template <typename Kind> struct Rows {
    int64_t batch, stride;  // rows; numbers of one
    std::vector<typename Kind::X> numbers;
    std::vector<float> factors;  // what a unit of the last digit is worth, by row

    Rows(const Weight& weight, const float* x, int64_t batch) : batch(batch) {
        const int64_t columns = weight.columns;
        stride = steps_of<Kind>(weight) * Kind::SPAN + Kind::CODES;  // after the last step come the sums before it
        numbers.resize(size_t(batch * stride));
        factors.resize(size_t(batch), 1.0f);
        for (int64_t n = 0; n < batch; ++n) {
            typename Kind::X* to = numbers.data() + n * stride;
            if constexpr (Kind::CODES)
                factors[size_t(n)] = split(x + n * columns, columns, weight.scale_type != 0, to);
            else if constexpr (sizeof(typename Kind::X) == 2)
                for (int64_t i = 0; i < columns; ++i) to[i] = upper_half(x[n * columns + i]);
            else
                std::memcpy(to, x + n * columns, size_t(columns) * sizeof(float));
        }
    }
    static uint16_t upper_half(float number) {
        uint32_t bits;
        std::memcpy(&bits, &number, sizeof bits);
        return uint16_t(bits >> 16);
    }
    // A row as digits: in float32 as fine as three of them are, in half precision in units that let most numbers do with
    // two. Gives the unit; where the row has an infinite number, or one that is none, that is no number.
    static float split(const float* x, int64_t columns, bool half, typename Kind::X* to) {
        std::vector<float> padded(size_t((columns + 63) / 64 * 64));
        std::memcpy(padded.data(), x, size_t(columns) * sizeof(float));
        float32x4_t most = vdupq_n_f32(0), all = most, sound = most;
        for (size_t i = 0; i < padded.size(); i += 4) {
            const float32x4_t part = vld1q_f32(&padded[i]);
            most = vmaxq_f32(most, vabsq_f32(part));
            all = vaddq_f32(all, vabsq_f32(part));
            sound = vfmaq_f32(sound, part, vdupq_n_f32(0));
        }
        const float trouble = vaddvq_f32(sound), largest = vmaxvq_f32(most);
        const float fine = half ? vaddvq_f32(all) / float(columns) / FINE : 0;
        const float unit = std::max(largest / THREE, std::min(largest / TWO, fine));
        const float inverse = trouble == 0 && unit > 0 ? 1 / unit : 0;
        const int32x4_t limit = vdupq_n_s32(int32_t(THREE));
        int32x4_t sums[3] = {};
        int32_t whole[64];
        for (size_t left = 0; left < padded.size(); left += 64, to += STEPS) {
            for (size_t i = 0; i < 64; i += 4) {
                const int32x4_t number = vcvtnq_s32_f32(vmulq_n_f32(vld1q_f32(&padded[left + i]), inverse));
                vst1q_s32(whole + i, vmaxq_s32(vminq_s32(number, limit), vnegq_s32(limit)));
            }
            int32_t highest = 0;
            for (int k = 0; k < 3; ++k)
                for (int i = 0; i < 64; ++i) {
                    const int8_t digit = int8_t(whole[i]);
                    to[i / 16].digits[k][i % 16] = digit;
                    if (k == 2) highest |= whole[i];
                    whole[i] = (whole[i] - digit) >> 8;
                }
            for (int j = 0; j < STEPS; ++j) {
                to[j].wide = highest;
                for (int k = 0; k < 3; ++k) {
                    vst1q_s32(to[j].before[k], sums[k]);
                    Int8<false>::add(sums[k], vld1q_s8(to[j].digits[k]), vdupq_n_s8(1));
                }
            }
        }
        for (int k = 0; k < 3; ++k) vst1q_s32(to->before[k], sums[k]);
        return unit + trouble;
    }
};

// What the codes of a band mean: for every unit of steps, what is there where they are pruned, and what the lanes of its
// sums are multiplied by. A unit is a group, or a step if groups are smaller.
template <typename Kind> struct Grid {
    int64_t steps, unit, units;  // of a row; of a unit; of a row
    int64_t shift;               // that makes a step of a chunk the unit that it is in, counted from the chunk's first
    int64_t group, lanes;        // columns and lanes of a group, at most those of a step
    std::vector<float> scales;
    std::vector<uint8_t> fills;

    explicit Grid(const Weight& weight) : steps(steps_of<Kind>(weight)), unit(steps), units(1), group(16), lanes(4) {
        if constexpr (Kind::CODES) {
            if (weight.groups > 1) {
                const int64_t columns = weight.columns / weight.groups;
                unit = std::max<int64_t>(1, columns / 16);
                units = steps / unit + 1;
                group = std::min<int64_t>(16, columns);
                lanes = group / 4;
            }
            scales.resize(size_t(ROWS * units * 4 + 4));
            fills.resize(size_t(ROWS * units * 16 + 16), uint8_t(weight.zero));
        }
        shift = std::min<int64_t>(unit, STEPS) / 2;
    }
    // Whole vectors are written; what is beyond a group is overwritten by the next.
    void read(const Weight& weight, int64_t band) {
        if constexpr (Kind::CODES)
            for (int64_t r = 0; r < std::min(ROWS, weight.rows - ROWS * band); ++r)
                for (int64_t g = 0, at = (ROWS * band + r) * weight.groups; g < weight.groups; ++g, ++at) {
                    vst1q_f32(&scales[size_t(r * units * 4 + g * lanes)], vdupq_n_f32(step_of(weight, at)));
                    if (weight.zeros)
                        vst1q_u8(&fills[size_t(r * units * 16 + g * group)], vdupq_n_u8(weight.zeros[at]));
                }
    }
    INLINED uint8x16_t fill(int64_t r, int64_t u) const {
        if constexpr (!Kind::CODES) return vdupq_n_u8(0);
        return vld1q_u8(&fills[size_t((r * units + u) * 16)]);
    }
    INLINED float32x4_t scale(int64_t r, int64_t u) const { return vld1q_f32(&scales[size_t((r * units + u) * 4)]); }
    // The first step after this one at which sums must be read: none goes on beyond a unit, or too far for whole numbers.
    int64_t end(int64_t step) const { return std::min({steps, (step / unit + 1) * unit, (step / TILE + 1) * TILE}); }
};

// A band of a weight, read chunk after chunk.
template <typename Kind> struct Stream {
    const typename Kind::Word* masks;
    const uint8_t* values;

    Stream(const Weight& weight, int64_t band) {
        masks = static_cast<const typename Kind::Word*>(weight.masks) + band * steps_of<Kind>(weight) / STEPS * ROWS;
        values = weight.values + weight.offsets[band];
    }
    INLINED typename Kind::Runs next() {
        const auto* from = masks;
        masks += ROWS;
        return {from, values};
    }
};

struct Totals {
    float32x4_t of[ROWS];
};

// Adds the sums of N rows of x.
template <int N> INLINE void add_up(float32x4_t (*sums)[ROWS][2], Totals* totals) {
    times<N * ROWS>([&](auto i) INLINED {
        const float32x4_t* sum = sums[i / ROWS][i % ROWS];
        float32x4_t& total = totals[i / ROWS].of[i % ROWS];
        total = vaddq_f32(total, vaddq_f32(sum[0], sum[1]));
    });
}

// Adds the sums of digits from a step to another, as numbers, less the codes of zero.
template <typename Kind>
INLINE void add_up(int32x4_t (*sums)[3], const Grid<Kind>& grid, int64_t u, const Codes::X* from, const Codes::X* to,
                   Totals& totals) {
    times<ROWS>([&](auto r) INLINED {
        const int32x4_t zero = vshrq_n_s32(vreinterpretq_s32_s8(Kind::wide(grid.fill(r, u))), 24);
        float32x4_t parts[3];
        for (int k = 0; k < 3; ++k) {
            const int32x4_t of_x = vsubq_s32(vld1q_s32(to->before[k]), vld1q_s32(from->before[k]));
            parts[k] = vcvtq_f32_s32(vmlsq_s32(sums[r][k], zero, of_x));
        }
        const float32x4_t sum = vfmaq_n_f32(parts[0], vfmaq_n_f32(parts[1], parts[2], 256), 256);
        totals.of[r] = vfmaq_f32(totals.of[r], sum, grid.scale(r, u));
    });
}

// Some steps of a band, as it is read, times one row of x.
template <typename Kind>
INLINE void read(Stream<Kind>& stream, const Grid<Kind>& grid, int64_t step, int64_t end, const typename Kind::X* x,
                 Totals& totals) {
    Stream<Kind> own = stream;
    if constexpr (Kind::CODES) {
        int32x4_t sums[ROWS][3] = {};
        const auto* from = x;
        uint8x16_t fills[ROWS];
        times<ROWS>([&](auto r) INLINED { fills[r] = grid.fill(r, step / grid.unit); });
        for (int64_t at = step; at < end; at += STEPS, x += STEPS) {
            const auto runs = own.next();
            const auto add = [&](auto digits) INLINED {
                times<ROWS * STEPS>([&](auto i) INLINED {
                    constexpr int R = i / STEPS, J = i % STEPS;
                    const auto w = Kind::wide(runs.template bytes<R, J>(fills[R]));
                    times<decltype(digits)::value>(
                        [&](auto k) INLINED { Kind::add(sums[R][k], w, vld1q_s8(x[J].digits[k])); });
                });
            };
            if (x->wide)
                add(std::integral_constant<int, 3>());
            else
                add(std::integral_constant<int, 2>());
        }
        add_up(sums, grid, step / grid.unit, from, x, totals);
    } else {
        float32x4_t sums[1][ROWS][2] = {};
        for (int64_t at = step; at < end; at += STEPS, x += STEPS * Kind::SPAN) {
            const auto runs = own.next();
            times<STEPS * ROWS>([&](auto i) INLINED {
                constexpr int R = i % ROWS, J = i / ROWS;
                const auto w = Kind::wide(runs.template bytes<R, J>(vdupq_n_u8(0)));
                Kind::template add<J>(sums[0][R], w, x + J * Kind::SPAN);
            });
        }
        add_up<1>(sums, &totals);
    }
    stream = own;
}

// Some steps of a band that are expanded, times N rows of x.
template <typename Kind, int N>
INLINE void meet(const typename Kind::Vector (*w)[ROWS], const Grid<Kind>& grid, int64_t step, int64_t end,
                 const typename Kind::X* x, int64_t stride, Totals* totals) {
    if constexpr (Kind::CODES) {
        int32x4_t sums[ROWS][3] = {};
        const auto* from = x;
        for (int64_t at = step; at < end; ++at, ++w, ++x) {
            times<ROWS * 2>([&](auto i) INLINED {
                Kind::add(sums[i / 2][i % 2], (*w)[i / 2], vld1q_s8(x->digits[i % 2]));
            });
            if (x->wide) times<ROWS>([&](auto r) INLINED { Kind::add(sums[r][2], (*w)[r], vld1q_s8(x->digits[2])); });
        }
        add_up(sums, grid, step / grid.unit, from, x, *totals);
    } else {
        float32x4_t sums[N][ROWS][2] = {};
        for (int64_t at = step; at < end; at += 2, w += 2, x += 2 * Kind::SPAN)
            times<2 * ROWS * N>([&](auto i) INLINED {
                constexpr int J = i / N / ROWS, R = i / N % ROWS;
                Kind::template add<J>(sums[i % N][R], w[J][R], x + i % N * stride + J * Kind::SPAN);
            });
        add_up<N>(sums, totals);
    }
}

template <typename Kind>
void write(const Weight& weight, const Rows<Kind>& rows, int64_t band, int64_t n, const Totals& totals, float* y) {
    for (int64_t r = 0; r < std::min(ROWS, weight.rows - ROWS * band); ++r)
        y[n * weight.rows + ROWS * band + r] = rows.factors[size_t(n)] * vaddvq_f32(totals.of[r]);
}

// Some bands times one row of x, as the bands are read. No unit may end within a chunk.
template <typename Kind>
FLAT void direct(const Weight& weight, const Rows<Kind>& rows, float* y, int64_t first, int64_t last) {
    Grid<Kind> grid(weight);
    for (int64_t band = first; band < last; ++band) {
        grid.read(weight, band);
        Stream<Kind> stream(weight, band);
        Totals totals = {};
        for (int64_t step = 0; step < grid.steps; step = grid.end(step))
            read(stream, grid, step, grid.end(step), rows.numbers.data() + step * Kind::SPAN, totals);
        write(weight, rows, band, 0, totals, y);
    }
}

// Some bands times any number of rows of x, all of which meet a tile of a band after the other.
template <typename Kind>
FLAT void tiled(const Weight& weight, const Rows<Kind>& rows, float* y, int64_t first, int64_t last) {
    Grid<Kind> grid(weight);
    typename Kind::Vector tile[TILE][ROWS];
    std::vector<Totals> totals(static_cast<size_t>(rows.batch));
    for (int64_t band = first; band < last; ++band) {
        grid.read(weight, band);
        Stream<Kind> stream(weight, band);
        std::fill(totals.begin(), totals.end(), Totals{});
        for (int64_t left = 0; left < grid.steps; left += TILE) {
            const int64_t right = std::min(grid.steps, left + TILE);
            for (int64_t at = left; at < right; at += STEPS) {
                const auto runs = stream.next();
                const int64_t u = at / grid.unit;
                times<ROWS * STEPS>([&](auto i) INLINED {
                    constexpr int R = i / STEPS, J = i % STEPS;
                    tile[at - left + J][R] = Kind::wide(runs.template bytes<R, J>(grid.fill(R, u + (J >> grid.shift))));
                });
            }
            for (int64_t step = left; step < right; step = grid.end(step)) {
                const auto* x = rows.numbers.data() + step * Kind::SPAN;
                int64_t n = 0;
                for (constexpr int some = Kind::TOGETHER; n + some <= rows.batch; n += some)
                    meet<Kind, some>(tile + step - left, grid, step, grid.end(step), x + n * rows.stride, rows.stride,
                                     &totals[size_t(n)]);
                if (n < rows.batch)
                    meet<Kind, 1>(tile + step - left, grid, step, grid.end(step), x + n * rows.stride, rows.stride,
                                  &totals[size_t(n)]);
            }
        }
        for (int64_t n = 0; n < rows.batch; ++n) write(weight, rows, band, n, totals[size_t(n)], y);
    }
}

template <typename Kind> void multiply(const Weight& weight, const float* x, int64_t batch, float* y, int64_t threads) {
    const Rows<Kind> rows(weight, x, batch);
    const auto kernel = batch == 1 && Grid<Kind>(weight).unit % STEPS == 0 ? direct<Kind> : tiled<Kind>;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t part = 0; part < threads; ++part)
        kernel(weight, rows, y, first_band<typename Kind::Word>(weight, part, threads),
               first_band<typename Kind::Word>(weight, part + 1, threads));
}

// A band dense, as values or as codes; `start` is the first row of `out`.
template <typename Kind> FLAT void expanded(const Weight& weight, int64_t band, int64_t start, char* out) {
    Grid<Kind> grid(weight);
    grid.read(weight, band);
    Stream<Kind> stream(weight, band);
    const int64_t width = weight.columns * Kind::SIZE, rows = std::min(ROWS, weight.rows - ROWS * band);
    out += (ROWS * band - start) * width;
    for (int64_t at = 0; at < grid.steps; at += STEPS) {
        const auto runs = stream.next();
        const int64_t u = at / grid.unit;
        uint8_t bytes[ROWS][64];
        times<ROWS * STEPS>([&](auto i) INLINED {
            constexpr int R = i / STEPS, J = i % STEPS;
            const uint8x16_t step = runs.template bytes<R, J>(grid.fill(R, u + (J >> grid.shift)));
            vst1q_u8(bytes[R] + 16 * J, step);
        });
        for (int64_t r = 0; r < rows; ++r)
            std::memcpy(out + r * width + 16 * at, bytes[r], size_t(std::min<int64_t>(64, width - 16 * at)));
    }
}

template <typename Kind> void expand(const Weight& weight, int64_t first, int64_t last, char* out, int64_t threads) {
    (void)threads;  // without OpenMP
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t band = first; band < last; ++band) expanded<Kind>(weight, band, ROWS * first, out);
}

}  // namespace

#define ALL(PATH, BFLOAT16, DOT)    \
    CALLS(float32, PATH, Float32)   \
    CALLS(bfloat16, PATH, BFLOAT16) \
    CALLS(float16, PATH, Float16)   \
    CALLS(int8, PATH, Int8<DOT>)    \
    CALLS(int4, PATH, Int4<DOT>)

ALL(neon, BFloat16, false)
ALL(neondot, BFloat16, true)
ALL(neonbf16, BFloat16Pairs, true)

// Whether the processor can run a path.
extern "C" int has_neon() { return 1; }
#if defined(__APPLE__)
static int says(const char* name) {
    int result = 0;
    size_t size = sizeof result;
    return sysctlbyname(name, &result, &size, nullptr, 0) == 0 && result;
}
extern "C" int has_neondot() { return says("hw.optional.arm.FEAT_DotProd"); }
extern "C" int has_neonbf16() { return has_neondot() && says("hw.optional.arm.FEAT_BF16"); }
#elif defined(__linux__)
extern "C" int has_neondot() { return getauxval(AT_HWCAP) >> 20 & 1; }                    // asimddp
extern "C" int has_neonbf16() { return has_neondot() && getauxval(AT_HWCAP2) >> 14 & 1; }  // bf16
#endif
#endif
