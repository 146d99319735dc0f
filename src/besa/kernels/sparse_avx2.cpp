// The kernels of sparse.cpp for processors with AVX2 that lack what sparse_avx512.cpp needs. docs/formats.md says how a
// weight lies in memory.
//
// Floats: a table says for every mask of eight columns which of the kept bytes belongs where, and one instruction moves
// them there. Codes: the places of 128 columns are computed at once, from half a byte of the masks for every four. Sums
// are kept in registers. For one row of x, two bands are read at once, as memory gives more then; nothing is fetched
// ahead, as that costs more than it gains (docs/log.md).
#if defined(__x86_64__)
#include "avx2.hpp"

namespace {

constexpr int64_t TILE = 128;  // steps expanded at a time where a batch shares them
constexpr uint8_t NONE = 128;  // no byte of a vector; nor is what comes up to 64 after it

INLINE __m128i loaded(const void* at) { return _mm_loadu_si128(static_cast<const __m128i*>(at)); }
INLINE __m256i both(const void* at) { return _mm256_broadcastsi128_si256(loaded(at)); }
INLINE __m256i pair(__m128i low, __m128i high) { return _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1); }
INLINE uint64_t count(uint64_t mask) {
    uint64_t bits;
    asm("popcnt %1, %0" : "=r"(bits) : "r"(mask));  // compilers clear the result first, for the sake of old processors
    return bits;
}

// The sums of four vectors.
INLINE __m128 summed(const __m256 (&of)[4]) {
    const __m256 four = _mm256_hadd_ps(_mm256_hadd_ps(of[0], of[1]), _mm256_hadd_ps(of[2], of[3]));
    return _mm_add_ps(_mm256_castps256_ps128(four), _mm256_extractf128_ps(four, 1));
}

// For every mask of eight columns: which byte of the kept values is each byte of a vector. A value of SIZE bytes stands at
// the end of its WIDTH bytes; so many COLUMNS are moved from one place.
template <int SIZE, int WIDTH, int COLUMNS> struct Places {
    alignas(64) uint8_t of[256][8 * WIDTH];
    constexpr Places() : of() {
        for (int mask = 0; mask < 256; ++mask)
            for (int i = 0, kept = 0; i < 8; kept += mask >> i++ & 1) {
                if (i % COLUMNS == 0) kept = 0;
                for (int byte = 0; byte < WIDTH; ++byte) {
                    const bool there = mask >> i & 1 && byte >= WIDTH - SIZE;
                    of[mask][i * WIDTH + byte] = there ? uint8_t(kept * SIZE + byte - (WIDTH - SIZE)) : NONE;
                }
            }
    }
};
template <int SIZE, int WIDTH, int COLUMNS> constexpr Places<SIZE, WIDTH, COLUMNS> PLACES{};

// Kinds of weights. A chunk has STEPS steps, each of which gives VECTORS vectors of a band. Of floats, a vector is eight
// columns of a row, as numbers; Raw is what they are stored as.
struct Floats {
    using X = float;
    using Vector = __m256;
    static constexpr bool CODES = false;
    static constexpr int COLUMNS = 8, VECTORS = 4, TOGETHER = 2;  // of a step; rows of x that meet a tile together
};

struct Float32 : Floats {
    using Word = uint16_t;
    using Raw = __m256;
    static constexpr int STEPS = 2, SIZE = 4;
    INLINE Raw moved(uint64_t mask, const uint8_t* at) {  // `mask`: 32 times the bits of eight columns
        const __m256i values = pair(loaded(at), loaded(at + 4 * count(mask & 15 << 5)));
        const auto* places = reinterpret_cast<const char*>(PLACES<4, 4, 4>.of) + mask;
        return _mm256_castsi256_ps(
            _mm256_shuffle_epi8(values, _mm256_load_si256(reinterpret_cast<const __m256i*>(places))));
    }
    INLINE Vector wide(Raw raw) { return raw; }
    INLINE void store(uint8_t* to, Raw raw) { _mm256_storeu_ps(reinterpret_cast<float*>(to), raw); }
};

struct BFloat16 : Floats {
    using Word = uint32_t;
    using Raw = __m256i;
    static constexpr int STEPS = 4, SIZE = 2;
    INLINE Raw moved(uint64_t mask, const uint8_t* at) {
        const auto* places = reinterpret_cast<const char*>(PLACES<2, 4, 8>.of) + mask;
        return _mm256_shuffle_epi8(both(at), _mm256_load_si256(reinterpret_cast<const __m256i*>(places)));
    }
    INLINE Vector wide(Raw raw) { return _mm256_castsi256_ps(raw); }
    INLINE void store(uint8_t* to, Raw raw) {
        const __m256i halves = _mm256_srli_epi32(raw, 16);
        const __m128i low = _mm256_castsi256_si128(halves), high = _mm256_extracti128_si256(halves, 1);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm_packus_epi32(low, high));
    }
};

struct Float16 : Floats {
    using Word = uint32_t;
    using Raw = __m128i;
    static constexpr int STEPS = 4, SIZE = 2;
    INLINE Raw moved(uint64_t mask, const uint8_t* at) {
        const auto* places = reinterpret_cast<const char*>(PLACES<2, 2, 8>.of) + mask / 2;
        return _mm_shuffle_epi8(loaded(at), _mm_load_si128(reinterpret_cast<const __m128i*>(places)));
    }
    INLINE Vector wide(Raw raw) { return _mm256_cvtph_ps(raw); }
    INLINE void store(uint8_t* to, Raw raw) { _mm_storeu_si128(reinterpret_cast<__m128i*>(to), raw); }
};

// Codes are multiplied as whole numbers, with x in fixed point: nothing is rounded until the end of a group. A pruned
// weight has its row's code of zero, times which the sum of x is taken off in the end. A vector is sixteen columns of two
// rows; a lane of its sums is of four columns.
struct Int8 {
    using Word = uint64_t;
    struct alignas(64) X {  // what meets a chunk: of each step, the even columns and the odd ones
        int16_t low[4][2][8], high[4][2][8];
        int64_t wide;  // whether a number has a higher part: few are so much larger than the rest
    };
    using Vector = __m256i;
    static constexpr bool CODES = true;
    static constexpr int COLUMNS = 16, VECTORS = 2, TOGETHER = 2, STEPS = 4, SIZE = 1;
    static constexpr int64_t LONGEST = 64;  // steps whose sums are whole numbers of 32 bits
    INLINE uint64_t size(uint64_t kept) { return kept; }
    INLINE __m256i even(Vector w) { return _mm256_and_si256(w, _mm256_set1_epi16(255)); }
    INLINE __m256i odd(Vector w) { return _mm256_srli_epi16(w, 8); }
    INLINE __m256i add(__m256i sum, Vector w, const int16_t (&x)[2][8]) {
        sum = _mm256_add_epi32(sum, _mm256_madd_epi16(even(w), both(x[0])));
        return _mm256_add_epi32(sum, _mm256_madd_epi16(odd(w), both(x[1])));
    }
};

struct Int4 : Int8 {  // of a band whose codes were put in bytes
    INLINE uint64_t size(uint64_t kept) { return (kept + 1) & ~uint64_t(1); }
};

template <typename Kind> constexpr int64_t LENGTH = 8 * sizeof(typename Kind::Word);
template <typename Kind> int64_t chunks_of(const Weight& weight) {
    return (weight.columns + LENGTH<Kind> - 1) / LENGTH<Kind>;
}

// A band, read chunk after chunk. `work` gets each vector, and as constants its step and place among the step's vectors.
template <typename Kind> struct Stream {
    const typename Kind::Word* masks;
    const uint8_t* values;

    template <typename Work> INLINED void next(Work work) {
        constexpr int BYTES = ROWS * Kind::STEPS;
        uint64_t words[BYTES / 8];  // of masks, whose bytes are taken from registers: loads limit this loop
        std::memcpy(words, masks, BYTES);
        uint64_t kept = 0;  // so far
        times<BYTES>([&](auto i) INLINED {
            constexpr int I = decltype(i)::value;
            uint64_t some;
            asm("rorx %2, %1, %0" : "=r"(some) : "r"(words[I / 8]), "i"((8 * I + 59) % 64));
            some &= 255 << 5;
            const std::integral_constant<int, I % Kind::STEPS> step{};
            const std::integral_constant<int, I / Kind::STEPS> row{};
            work(step, row, Kind::moved(some, values + Kind::SIZE * kept));
            kept += count(some);
            asm("" : "+r"(kept));  // as a number: compilers would add to an address, which takes a cycle more
        });
        values += Kind::SIZE * kept;
        masks += ROWS;
    }
};

// The numbers of half a byte of a mask's kept columns: all, and for each column those before it, or none if it is pruned.
struct Counts {
    alignas(32) uint8_t all[32], before[4][32];
    constexpr Counts() : all(), before() {
        for (int mask = 0; mask < 32; ++mask)
            for (int i = 0; i < 4; all[mask] += mask >> i++ & 1) before[i][mask] = mask >> i & 1 ? all[mask] : NONE;
    }
};
constexpr Counts COUNTS{};
INLINE __m256i looked_up(const uint8_t (&table)[32], __m256i halves) {
    return _mm256_shuffle_epi8(_mm256_load_si256(reinterpret_cast<const __m256i*>(table)), halves);
}

template <typename Kind> struct CodeStream {
    const uint64_t* masks;
    const uint8_t* values;

    // `fill` gives what is there for pruned codes, by step and vector.
    template <typename Fill, typename Work> INLINED void next(Fill fill, Work work) {
        const __m256i four = _mm256_set1_epi8(15);
        times<ROWS / 2>([&](auto v) INLINED {
            const uint64_t* two = masks + 2 * v;
            const __m256i bytes = _mm256_cvtepu8_epi16(loaded(two));
            const __m256i halves = _mm256_and_si256(_mm256_or_si256(bytes, _mm256_slli_epi16(bytes, 4)), four);
            __m256i sums = looked_up(COUNTS.all, halves);  // of all up to each, among sixteen columns
            sums = _mm256_add_epi8(sums, _mm256_slli_epi32(sums, 8));
            sums = _mm256_add_epi8(sums, _mm256_slli_epi32(sums, 16));
            sums = _mm256_slli_epi32(sums, 8);  // of those before it
            __m256i of[4];
            times<4>([&](auto i) INLINED { of[i] = _mm256_add_epi8(looked_up(COUNTS.before[i], halves), sums); });
            __m256i places[4];  // of sixteen columns each
            times<2>([&](auto i) INLINED {
                const __m256i first = i ? _mm256_unpackhi_epi8(of[0], of[1]) : _mm256_unpacklo_epi8(of[0], of[1]);
                const __m256i last = i ? _mm256_unpackhi_epi8(of[2], of[3]) : _mm256_unpacklo_epi8(of[2], of[3]);
                places[2 * i] = _mm256_unpacklo_epi16(first, last);
                places[2 * i + 1] = _mm256_unpackhi_epi16(first, last);
            });
            const uint8_t* at[] = {values, values + Kind::size(count(two[0]))};
            values = at[1] + Kind::size(count(two[1]));
            times<4>([&](auto j) INLINED {
                constexpr int J = decltype(j)::value;
                const auto begin = [&](int r) INLINED { return J ? at[r] + count(two[r] << (64 - 16 * J) % 64) : at[r]; };
                const __m256i codes = pair(loaded(begin(0)), loaded(begin(1)));
                work(j, v, _mm256_blendv_epi8(_mm256_shuffle_epi8(codes, places[J]), fill(j, v), places[J]));
            });
        });
        masks += ROWS;
    }
};

// The rows of x as the kernels read them, with zeros to the end of the last chunk.
template <typename Kind> struct Rows {
    int64_t batch, stride;  // rows; numbers of one
    std::vector<typename Kind::X> numbers;
    std::vector<float> factors;  // what a unit is worth, by row
    int64_t width;               // of what follows: the groups, and zeros after them for a vector
    std::vector<float> sums;     // of each group, in units, by row

    TARGET Rows(const Weight& weight, const float* x, int64_t batch) : batch(batch), width(weight.groups + 8) {
        const int64_t columns = weight.columns;
        stride = Kind::CODES ? chunks_of<Kind>(weight) : chunks_of<Kind>(weight) * LENGTH<Kind>;
        numbers.resize(size_t(batch * stride));
        if (Kind::CODES) sums.resize(size_t(batch * width));
        for (int64_t n = 0; n < batch; ++n) {
            typename Kind::X* to = numbers.data() + n * stride;
            if constexpr (Kind::CODES)
                split(weight, x + n * columns, to, &sums[size_t(n * width)]);
            else
                std::memcpy(to, x + n * columns, size_t(columns) * sizeof(float));
        }
    }
    TARGET void split(const Weight& weight, const float* x, typename Kind::X* to, float* sums_of_groups) {
        const Whole row(weight, x, stride * LENGTH<Kind>);
        const std::vector<int32_t>& whole = row.numbers;
        for (size_t i = 0; i < whole.size(); i += 16) {
            typename Kind::X& chunk = to[i / 64];
            const auto put = [&](int16_t(&part)[2][8], __m256i low, __m256i high) INLINED {
                const __m256i odd_last = _mm256_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15,  //
                                                          0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15);
                __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(low, high), 0xd8);
                words = _mm256_permute4x64_epi64(_mm256_shuffle_epi8(words, odd_last), 0xd8);
                _mm256_store_si256(reinterpret_cast<__m256i*>(part), words);
            };
            __m256i low[2], high[2];
            for (size_t k = 0; k < 2; ++k) {
                const __m256i number = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(&whole[i + 8 * k]));
                low[k] = _mm256_srai_epi32(_mm256_slli_epi32(number, 16), 16);
                high[k] = _mm256_srai_epi32(_mm256_sub_epi32(number, low[k]), 16);
            }
            put(chunk.low[i % 64 / 16], low[0], low[1]);
            put(chunk.high[i % 64 / 16], high[0], high[1]);
            const __m256i any = _mm256_or_si256(high[0], high[1]);
            chunk.wide |= !_mm256_testz_si256(any, any);
        }
        factors.push_back(row.factor);
        const int64_t group = weight.columns / weight.groups;
        for (const int32_t* at = whole.data(); at < whole.data() + weight.columns; at += group)
            *sums_of_groups++ = float(std::accumulate(at, at + group, int64_t(0)));
    }
};

struct alignas(32) Totals {  // in lanes
    float of[ROWS][8];
};

// How a band is read and summed. A unit is a group, or a step if groups are smaller.
template <typename Kind> struct Band {
    int64_t steps, unit;  // of a row; of a unit

    explicit Band(const Weight& weight) : steps(chunks_of<Kind>(weight) * Kind::STEPS), unit(steps) {}
    Stream<Kind> begin(const Weight& weight, int64_t band) {
        const auto* masks = static_cast<const typename Kind::Word*>(weight.masks);
        return {masks + band * steps / Kind::STEPS * ROWS, weight.values + weight.offsets[band]};
    }
    // The first step after this one at which sums must be read.
    int64_t end(int64_t) const { return steps; }
};

template <typename Kind> struct CodeBand {
    int64_t steps, unit;
    int64_t shift;         // that makes a step of a chunk the unit that it is in, counted from the chunk's first
    int64_t groups, each;  // of a row; of a unit
    int64_t width;         // of a row of what follows: the groups, and room after them: for the end of a chunk, and a vector
    std::vector<float> scales;
    std::vector<uint8_t> zeros;
    std::vector<uint8_t> codes;  // of four bits, in bytes
    int32_t lanes[4];            // which group of a unit the lanes of sums belong to, and codes
    uint8_t places[16];

    explicit CodeBand(const Weight& weight)
        : steps(chunks_of<Kind>(weight) * Kind::STEPS), unit(steps), groups(weight.groups), each(1), width(groups + 32) {
        const int64_t group = weight.columns / groups;
        if (groups > 1) {
            unit = std::max<int64_t>(1, group / 16);
            each = std::max<int64_t>(1, 16 / group);
        }
        shift = std::min<int64_t>(unit, Kind::STEPS) / 2;
        for (int i = 0; i < 16; ++i) lanes[i / 4] = places[i] = uint8_t(each > 1 ? i / group : 0);
        scales.resize(size_t(ROWS * width));
        zeros.assign(size_t(ROWS * width), uint8_t(weight.zero));
    }
    TARGET void read(const Weight& weight, int64_t band) {
        for (int64_t r = 0; r < ROWS; ++r) {
            const int64_t at = std::min(ROWS * band + r, weight.rows - 1) * groups;
            float* to = &scales[size_t(r * width)];
            int64_t g = 0;
            if (weight.scale_type == 1)
                for (; g + 8 <= groups; g += 8) {
                    const __m128i halves = loaded(static_cast<const uint16_t*>(weight.scales) + at + g);
                    const __m256i wide = _mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16);
                    _mm256_storeu_ps(to + g, _mm256_castsi256_ps(wide));
                }
            for (; g < groups; ++g) to[g] = step_of(weight, at + g);
            if (weight.zeros) std::memcpy(&zeros[size_t(r * width)], weight.zeros + at, size_t(groups));
        }
    }
    TARGET CodeStream<Kind> begin(const Weight& weight, int64_t band) {
        read(weight, band);
        const auto* masks = static_cast<const uint64_t*>(weight.masks) + band * steps / Kind::STEPS * ROWS;
        const uint8_t* values = weight.values + weight.offsets[band];
        if constexpr (!std::is_same_v<Kind, Int4>) return {masks, values};
        const int64_t bytes = weight.offsets[band + 1] - weight.offsets[band];
        codes.resize(size_t(2 * (bytes + 32)));
        for (int64_t i = 0; i < bytes; i += 16) {
            const __m256i pairs = _mm256_cvtepu8_epi16(loaded(values + i));
            const __m256i some = _mm256_or_si256(pairs, _mm256_slli_epi16(pairs, 4));
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(&codes[size_t(2 * i)]),
                                _mm256_and_si256(some, _mm256_set1_epi8(15)));
        }
        return {masks, codes.data()};
    }
    // What codes of zero add to each row, given the sums of x by group, with zeros after them.
    TARGET void lowered(const float* sums, float* out) const {
        __m256 all[ROWS] = {};
        for (int64_t g = 0; g < groups; g += 8)
            for (int64_t r = 0; r < ROWS; ++r) {
                const __m128i some = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(&zeros[size_t(r * width + g)]));
                const __m256 zero = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(some));
                const __m256 value = _mm256_mul_ps(zero, _mm256_loadu_ps(&scales[size_t(r * width + g)]));
                all[r] = _mm256_fmadd_ps(value, _mm256_loadu_ps(sums + g), all[r]);
            }
        _mm_storeu_ps(out, summed(all));
    }
    INLINED __m256 scale(int v, int64_t u) const {
        const __m128i which = loaded(lanes);
        const auto row = [&](int64_t r) INLINED {
            return _mm_castps_si128(_mm_permutevar_ps(_mm_loadu_ps(&scales[size_t(r * width + u * each)]), which));
        };
        return _mm256_castsi256_ps(pair(row(2 * v), row(2 * v + 1)));
    }
    INLINED __m256i fill(int v, int64_t u) const {
        const __m128i which = loaded(places);
        const auto row = [&](int64_t r) INLINED {
            return _mm_shuffle_epi8(loaded(&zeros[size_t(r * width + u * each)]), which);
        };
        return pair(row(2 * v), row(2 * v + 1));
    }
    // No sum goes on beyond a unit, or too far for whole numbers.
    int64_t end(int64_t step) const {
        return std::min({steps, (step / unit + 1) * unit, (step / Kind::LONGEST + 1) * Kind::LONGEST});
    }
};
template <typename Kind> using BandOf = std::conditional_t<Kind::CODES, CodeBand<Kind>, Band<Kind>>;
template <typename Kind> using StreamOf = std::conditional_t<Kind::CODES, CodeStream<Kind>, Stream<Kind>>;

// Adds the sums of whole numbers of a unit, of both parts of x, as numbers.
INLINE void add_up(const __m256i (&sums)[2], __m256 scale, float* total) {
    const __m256 high = _mm256_cvtepi32_ps(sums[1]), low = _mm256_cvtepi32_ps(sums[0]);
    const __m256 sum = _mm256_fmadd_ps(high, _mm256_set1_ps(65536), low);
    _mm256_store_ps(total, _mm256_fmadd_ps(sum, scale, _mm256_load_ps(total)));
}

// BANDS bands times one row of x, as they are read. No unit may end within a chunk.
template <typename Kind, int BANDS>
INLINE void read(StreamOf<Kind>* streams, const BandOf<Kind>* bands, const typename Kind::X* x, Totals* totals) {
    constexpr int VECTORS = Kind::VECTORS;
    StreamOf<Kind> own[BANDS];
    for (int b = 0; b < BANDS; ++b) own[b] = streams[b];
    if constexpr (Kind::CODES) {
        for (int64_t step = 0; step < bands->steps; step = bands->end(step)) {
            const int64_t end = bands->end(step), u = step / bands->unit;
            __m256i sums[BANDS][VECTORS][2] = {}, fills[BANDS][VECTORS];
            times<BANDS * VECTORS>([&](auto i) INLINED {
                constexpr int I = decltype(i)::value;
                fills[I / VECTORS][I % VECTORS] = bands[I / VECTORS].fill(I % VECTORS, u);
            });
            for (int64_t at = step; at < end; at += Kind::STEPS, ++x) {
                const auto add = [&](auto wide) INLINED {
                    times<BANDS>([&](auto b) INLINED {
                        own[b].next([&](auto, auto v) INLINED { return fills[b][v]; },
                                    [&](auto j, auto v, __m256i w) INLINED {
                                        sums[b][v][0] = Kind::add(sums[b][v][0], w, x->low[j]);
                                        if constexpr (decltype(wide)::value)
                                            sums[b][v][1] = Kind::add(sums[b][v][1], w, x->high[j]);
                                    });
                    });
                };
                if (x->wide)
                    add(std::true_type());
                else
                    add(std::false_type());
            }
            times<BANDS * VECTORS>([&](auto i) INLINED {
                constexpr int B = i / VECTORS, V = i % VECTORS;
                add_up(sums[B][V], bands[B].scale(V, u), totals[B].of[V]);
            });
        }
    } else {
        __m256 sums[BANDS][VECTORS] = {};
        for (int64_t step = 0; step < bands->steps; step += Kind::STEPS, x += Kind::STEPS * Kind::COLUMNS)
            times<BANDS>([&](auto b) INLINED {
                own[b].next([&](auto j, auto r, typename Kind::Raw w) INLINED {
                    sums[b][r] = _mm256_fmadd_ps(Kind::wide(w), _mm256_loadu_ps(x + j * Kind::COLUMNS), sums[b][r]);
                });
            });
        for (int i = 0; i < BANDS * VECTORS; ++i)
            _mm256_store_ps(totals[i / VECTORS].of[i % VECTORS], sums[i / VECTORS][i % VECTORS]);
    }
}

// Some steps of a band that are expanded, times N rows of x.
template <typename Kind, int N>
INLINE void meet(const typename Kind::Vector (*w)[Kind::VECTORS], const BandOf<Kind>& band, int64_t step, int64_t end,
                 const typename Kind::X* x, int64_t stride, Totals* totals) {
    constexpr int VECTORS = Kind::VECTORS;
    if constexpr (Kind::CODES) {
        __m256i sums[N][VECTORS][2] = {};
        for (int64_t at = step; at < end; ++at, ++w) {
            const typename Kind::X* here = x + at / Kind::STEPS;
            bool wide = false;
            for (int n = 0; n < N; ++n) wide |= here[n * stride].wide != 0;
            times<N * VECTORS>([&](auto i) INLINED {
                __m256i* sum = sums[i / VECTORS][i % VECTORS];
                const typename Kind::X& of = here[i / VECTORS * stride];
                sum[0] = Kind::add(sum[0], (*w)[i % VECTORS], of.low[at % Kind::STEPS]);
                if (wide) sum[1] = Kind::add(sum[1], (*w)[i % VECTORS], of.high[at % Kind::STEPS]);
            });
        }
        times<N * VECTORS>([&](auto i) INLINED {
            constexpr int V = i % VECTORS;
            add_up(sums[i / VECTORS][V], band.scale(V, step / band.unit), totals[i / VECTORS].of[V]);
        });
    } else {
        __m256 sums[N][VECTORS];
        times<N * VECTORS>(
            [&](auto i) INLINED { sums[i / VECTORS][i % VECTORS] = _mm256_load_ps(totals[i / VECTORS].of[i % VECTORS]); });
        x += step * Kind::COLUMNS;
        for (int64_t at = step; at < end; ++at, ++w, x += Kind::COLUMNS)
            times<N * VECTORS>([&](auto i) INLINED {
                constexpr int V = i / N, M = i % N;
                sums[M][V] = _mm256_fmadd_ps((*w)[V], _mm256_loadu_ps(x + M * stride), sums[M][V]);
            });
        times<N * VECTORS>(
            [&](auto i) INLINED { _mm256_store_ps(totals[i / VECTORS].of[i % VECTORS], sums[i / VECTORS][i % VECTORS]); });
    }
}

template <typename Kind>
TARGET void write(const Weight& weight, const Rows<Kind>& rows, BandOf<Kind>& band, int64_t index, int64_t n,
                  const Totals& totals, float* y) {
    float sums[ROWS], less[ROWS] = {}, factor = 1;
    if constexpr (Kind::CODES) {
        for (int64_t r = 0; r < ROWS; ++r) {
            const float* lanes = totals.of[r / 2] + r % 2 * 4;
            sums[r] = (lanes[0] + lanes[2]) + (lanes[1] + lanes[3]);
        }
        band.lowered(&rows.sums[size_t(n * rows.width)], less);
        factor = rows.factors[size_t(n)];
    } else {
        __m256 of[ROWS];
        for (int64_t r = 0; r < ROWS; ++r) of[r] = _mm256_load_ps(totals.of[r]);
        _mm_storeu_ps(sums, summed(of));
    }
    for (int64_t r = 0; r < std::min(ROWS, weight.rows - ROWS * index); ++r)
        y[n * weight.rows + ROWS * index + r] = factor * (sums[r] - less[r]);
}

// Some bands times one row of x, BANDS at once from as many places.
template <typename Kind, int BANDS>
TARGET void together(const Weight& weight, const Rows<Kind>& rows, float* y, int64_t first, int64_t count) {
    std::vector<BandOf<Kind>> bands(BANDS, BandOf<Kind>(weight));
    for (int64_t index = first; index < first + count; ++index) {
        StreamOf<Kind> streams[BANDS];
        Totals totals[BANDS] = {};
        for (int64_t b = 0; b < BANDS; ++b) streams[b] = bands[size_t(b)].begin(weight, index + b * count);
        read<Kind, BANDS>(streams, bands.data(), rows.numbers.data(), totals);
        for (int64_t b = 0; b < BANDS; ++b) write<Kind>(weight, rows, bands[size_t(b)], index + b * count, 0, totals[b], y);
    }
}

template <typename Kind>
TARGET void direct(const Weight& weight, const Rows<Kind>& rows, float* y, int64_t first, int64_t last) {
    const int64_t count = (last - first) / 2;
    together<Kind, 2>(weight, rows, y, first, count);
    together<Kind, 1>(weight, rows, y, first + 2 * count, last - first - 2 * count);
}

// Some bands times any number of rows of x, all of which meet a tile of a band after the other.
template <typename Kind>
TARGET void tiled(const Weight& weight, const Rows<Kind>& rows, float* y, int64_t first, int64_t last) {
    BandOf<Kind> band(weight);
    alignas(64) typename Kind::Vector tile[TILE][Kind::VECTORS];
    std::vector<Totals> totals(static_cast<size_t>(rows.batch));
    for (int64_t index = first; index < last; ++index) {
        auto stream = band.begin(weight, index);
        std::fill(totals.begin(), totals.end(), Totals{});
        for (int64_t left = 0; left < band.steps; left += TILE) {
            const int64_t right = std::min(band.steps, left + TILE);
            for (int64_t at = left; at < right; at += Kind::STEPS) {
                if constexpr (Kind::CODES)
                    stream.next([&](auto j, auto v) INLINED { return band.fill(v, at / band.unit + (j >> band.shift)); },
                                [&](auto j, auto v, __m256i w) INLINED { tile[at - left + j][v] = w; });
                else
                    stream.next([&](auto j, auto r, auto w) INLINED { tile[at - left + j][r] = Kind::wide(w); });
            }
            for (int64_t step = left; step < right;) {
                const int64_t end = std::min(right, band.end(step));
                const typename Kind::X* x = rows.numbers.data();
                int64_t n = 0;
                for (constexpr int some = Kind::TOGETHER; n + some <= rows.batch; n += some)
                    meet<Kind, some>(tile + step - left, band, step, end, x + n * rows.stride, rows.stride,
                                     &totals[size_t(n)]);
                if (n < rows.batch)
                    meet<Kind, 1>(tile + step - left, band, step, end, x + n * rows.stride, rows.stride,
                                  &totals[size_t(n)]);
                step = end;
            }
        }
        for (int64_t n = 0; n < rows.batch; ++n) write<Kind>(weight, rows, band, index, n, totals[size_t(n)], y);
    }
}

template <typename Kind> void multiply(const Weight& weight, const float* x, int64_t batch, float* y, int64_t threads) {
    const Rows<Kind> rows(weight, x, batch);
    const auto kernel = batch == 1 && BandOf<Kind>(weight).unit % Kind::STEPS == 0 ? direct<Kind> : tiled<Kind>;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t part = 0; part < threads; ++part)
        kernel(weight, rows, y, first_band<typename Kind::Word>(weight, part, threads),
               first_band<typename Kind::Word>(weight, part + 1, threads));
}

// A band dense, as values or as codes; `start` is the first row of `out`.
template <typename Kind> TARGET void expanded(const Weight& weight, int64_t index, int64_t start, char* out) {
    BandOf<Kind> band(weight);
    auto stream = band.begin(weight, index);
    const int64_t width = weight.columns * Kind::SIZE, rows = std::min(ROWS, weight.rows - ROWS * index);
    out += (ROWS * index - start) * width;
    for (int64_t at = 0; at < band.steps; at += Kind::STEPS) {
        constexpr int64_t STEP = Kind::COLUMNS * Kind::SIZE;  // bytes
        uint8_t bytes[ROWS][Kind::STEPS * STEP];
        if constexpr (Kind::CODES)
            stream.next([&](auto j, auto v) INLINED { return band.fill(v, at / band.unit + (j >> band.shift)); },
                        [&](auto j, auto v, __m256i w) INLINED {
                            _mm256_storeu2_m128i(reinterpret_cast<__m128i*>(bytes[2 * v + 1] + STEP * j),
                                                 reinterpret_cast<__m128i*>(bytes[2 * v] + STEP * j), w);
                        });
        else
            stream.next([&](auto j, auto r, auto w) INLINED { Kind::store(bytes[r] + STEP * j, w); });
        for (int64_t r = 0; r < rows; ++r)
            std::memcpy(out + r * width + STEP * at, bytes[r],
                        size_t(std::min<int64_t>(Kind::STEPS * STEP, width - STEP * at)));
    }
}

template <typename Kind> void expand(const Weight& weight, int64_t first, int64_t last, char* out, int64_t threads) {
    (void)threads;  // without OpenMP
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t band = first; band < last; ++band) expanded<Kind>(weight, band, ROWS * first, out);
}

}  // namespace

CALLS(float32, avx2, Float32)
CALLS(bfloat16, avx2, BFloat16)
CALLS(float16, avx2, Float16)
CALLS(int8, avx2, Int8)
CALLS(int4, avx2, Int4)

// Whether the processor can run this path.
extern "C" int has_avx2() { return has_all(); }
#endif
