// Up to 16 rows of x and a bitmask of codes, on the matrix unit: x is in fixed point, and a tile of codes meets its digits,
// one after the other, as whole numbers. A step is 64 columns. As what was just written cannot be loaded, a step is
// multiplied two steps after it was expanded, and what a segment of steps has given is closed when the next one has.
namespace {

constexpr int64_t LONGEST = 64;    // steps of a segment: sums stay whole numbers of 32 bits
typedef int32_t Whole[16][LANES];  // sums of 16 rows of W and of x

// The rows of x as tiles, by digit: 16 times four columns, and of each of these 16 rows.
struct DigitTiles {
    struct Step {
        Tile digits[3];
        alignas(64) float sums[LANES];  // of the rows of x
        int64_t wide;                   // whether there are third digits
    };
    int64_t batch, steps;
    std::vector<float> numbers;
    std::vector<Unit> units;
    Step* tiles;

    DigitTiles(const Weight& weight, int64_t batch)
        : batch(batch),
          steps((weight.columns + 63) / 64),
          numbers(size_t(batch * weight.columns)),
          units(size_t(LANES)),
          tiles(static_cast<Step*>(kept<OF_X>(size_t(steps) * sizeof(Step)))) {}

    TARGET void measure(const Weight& weight, const uint16_t* x, int64_t n) {
        const int64_t first = n * weight.columns;
        for (int64_t i = first; i < first + weight.columns; ++i) numbers[size_t(i)] = from_bfloat16(x[i]);
        units[size_t(n)] = Unit(weight, numbers.data() + first);
    }
    TARGET void lay(const Weight& weight, int64_t s) {
        Step& step = tiles[s];
        Digits rows[LANES] = {};
        step.wide = 0;
        for (int64_t n = 0; n < batch; ++n) {
            units[size_t(n)].split(numbers.data() + n * weight.columns + 64 * s, weight.columns - 64 * s, rows[n]);
            step.wide |= rows[n].wide;
        }
        __m512 sum = _mm512_setzero_ps();
        for (int64_t digit = 2; digit >= 0; --digit) {
            __m512i words[16], whole = _mm512_setzero_si512();
            for (int64_t n = 0; n < LANES; ++n) words[n] = _mm512_load_si512(rows[n].of[digit]);
            transpose(words);
            for (int64_t i = 0; i < 16; ++i) {
                _mm512_store_si512(step.digits[digit][i], words[i]);
                whole = _mm512_dpbusd_epi32(whole, _mm512_set1_epi8(1), words[i]);
            }
            sum = _mm512_fmadd_ps(sum, _mm512_set1_ps(256), _mm512_cvtepi32_ps(whole));
        }
        _mm512_store_ps(step.sums, sum);
    }
};

// A segment of 16 rows: their grids, and what is summed.
struct Segment {
    float steps[16], zeros[16];
    uint32_t fills[16];             // the codes of zero, four times each
    bool wide;                      // whether there are third digits
    alignas(64) float of_x[LANES];  // the sums of the rows of x
    alignas(64) Whole sums[3];      // by digit

    template <typename Kind> void read(const Weight& weight, const Places<Kind>& places, int64_t group) {
        for (int64_t b = 0; b < ROWS; ++b)
            for (int64_t r = 0; r < ROWS; ++r) {
                const int64_t row = std::min(ROWS * places.band(b) + r, weight.rows - 1), i = ROWS * b + r;
                const uint32_t zero = zero_of(weight, row * weight.groups + group);
                steps[i] = step_of(weight, row * weight.groups + group);
                zeros[i] = float(zero);
                fills[i] = zero * 0x01010101;
            }
        wide = false;
        std::memset(of_x, 0, sizeof of_x);
    }
    // Adds the products of a step to the tiles.
    INLINE void multiply(Segment& segment, const Tile& codes, const DigitTiles::Step& x) {
        load<4>(codes, 64);
        load<5>(x.digits[0], 64);
        add_codes<0, 4, 5>();
        load<6>(x.digits[1], 64);
        add_codes<1, 4, 6>();
        if (x.wide) load<7>(x.digits[2], 64), add_codes<2, 4, 7>();
        segment.wide |= x.wide != 0;
        _mm512_store_ps(segment.of_x, _mm512_add_ps(_mm512_load_ps(segment.of_x), _mm512_load_ps(x.sums)));
    }
    TARGET void keep() {
        store<0>(sums[0], 64), store<1>(sums[1], 64);
        if (wide) store<2>(sums[2], 64);
    }
    // Adds what the sums are worth.
    TARGET void close(float (&all)[16][LANES]) const {
        const __m512 base = _mm512_set1_ps(256);
        for (int i = 0; i < 16; ++i) {
            __m512 sum = _mm512_cvtepi32_ps(_mm512_load_si512(sums[1][i]));
            if (wide) sum = _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_load_si512(sums[2][i])), base, sum);
            sum = _mm512_fmadd_ps(sum, base, _mm512_cvtepi32_ps(_mm512_load_si512(sums[0][i])));
            sum = _mm512_fnmadd_ps(_mm512_set1_ps(zeros[i]), _mm512_load_ps(of_x), sum);
            _mm512_store_ps(all[i], _mm512_fmadd_ps(sum, _mm512_set1_ps(steps[i]), _mm512_load_ps(all[i])));
        }
    }
};

// Some bands times all rows of x.
template <typename Kind>
TARGET void codes(const Weight& weight, const DigitTiles& x, char* y, bool rounded, int64_t first, int64_t last) {
    const Tiles unit;
    alignas(64) Tile tiles[4];
    alignas(64) float all[16][LANES], factors[LANES];
    Segment segments[4];
    for (int64_t n = 0; n < LANES; ++n) factors[n] = x.units[size_t(n)].factor;
    const int64_t count = (last - first + ROWS - 1) / ROWS;
    const int64_t group = weight.groups == 1 ? x.steps : weight.columns / weight.groups / 64;
    const auto end_of = [&](int64_t step) { return std::min({step + LONGEST, (step / group + 1) * group, x.steps}); };
    for (int64_t band = first; band < first + count; ++band) {
        Places<Kind> places(weight, band, count, last - 1);
        std::memset(all, 0, sizeof all);
        // Segments that are expanded and multiplied, and their ends; up to four are in the making.
        int64_t expanded = 0, until = 0, multiplied = 0, end = 0;
        for (int64_t s = 0; s < x.steps + 2; ++s) {
            if (s < x.steps) {
                if (s == until) {
                    segments[expanded++ % 4].read(weight, places, s / group);
                    until = end_of(s);
                }
                const Segment& segment = segments[(expanded - 1) % 4];
                places.step([&](int row, uint64_t mask, const uint8_t* at) INLINED {
                    const __m512i fill = _mm512_set1_epi32(int32_t(segment.fills[row]));
                    _mm512_store_si512(tiles[s % 4][row], Kind::expand(mask, at, fill));
                });
            }
            if (s < 2) continue;
            if (s - 2 == end) {
                clear<0>(), clear<1>(), clear<2>();
                end = end_of(s - 2);
            }
            Segment& segment = segments[multiplied % 4];
            Segment::multiply(segment, tiles[(s - 2) % 4], x.tiles[s - 2]);
            if (s - 1 < end) continue;
            segment.keep();
            if (multiplied++) segments[(multiplied - 2) % 4].close(all);
        }
        segments[(multiplied - 1) % 4].close(all);
        for (auto& row : all) _mm512_store_ps(row, _mm512_mul_ps(_mm512_load_ps(row), _mm512_load_ps(factors)));
        places.write(weight, all, 0, x.batch, y, rounded);
    }
}

template <typename Kind>
void multiply_codes(const Weight& weight, const uint16_t* x, int64_t batch, char* y, bool rounded, int64_t threads) {
    DigitTiles laid(weight, batch);
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (int64_t n = 0; n < batch; ++n) laid.measure(weight, x, n);
#pragma omp for schedule(static)
        for (int64_t s = 0; s < laid.steps; ++s) laid.lay(weight, s);
#pragma omp for schedule(static)
        for (int64_t part = 0; part < threads; ++part)
            codes<Kind>(weight, laid, y, rounded, first_band<uint64_t>(weight, part, threads),
                        first_band<uint64_t>(weight, part + 1, threads));
    }
}

// Whether such a product is for so many rows of x, and for the groups of a weight.
inline bool for_codes(const Weight& weight, int64_t batch) {
    return batch <= LANES && (weight.groups == 1 || weight.columns / weight.groups % 64 == 0);
}

}  // namespace
