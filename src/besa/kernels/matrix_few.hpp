// Few rows of x and a bitmask of bfloat16, on the matrix unit. A step of four bands, 32 columns of 16 rows, is written to a
// tile in the first cache, and multiplied two steps later: what was just written cannot be loaded at once.
namespace {

// Adds the products of a step and R registers of x.
template <int R> INLINE void multiplied(const Tile& tile, const uint32_t* x, int64_t apart) {
    load<4>(tile, 64);
    load<5>(x, 64);
    add<0, 4, 5>();
    if constexpr (R > 1) load<6>(x + apart, 64), add<1, 4, 6>();
    if constexpr (R > 2) load<5>(x + 2 * apart, 64), add<2, 4, 5>();
    if constexpr (R > 3) load<6>(x + 3 * apart, 64), add<3, 4, 6>();
}

// Some bands times R registers of x. Products are added in the order of panels.
template <int R>
TARGET void few(const Weight& weight, const Columns<Matrix>& x, char* y, bool rounded, int64_t first, int64_t last) {
    const Tiles unit;
    alignas(64) Tile tiles[4];
    alignas(64) float sums[REGISTERS][16][LANES];
    const int64_t steps = (weight.columns + 31) / 32, count = (last - first + ROWS - 1) / ROWS, apart = x.steps * LANES;
    for (int64_t band = first; band < first + count; ++band) {
        Places<BFloat16> places(weight, band, count, last - 1);
        clear<0>(), clear<1>(), clear<2>(), clear<3>();
        for (int64_t s = 0; s < steps + 2; ++s) {
            if (s < steps)
                places.step([&](int row, uint64_t mask, const uint8_t* at) INLINED {
                    _mm512_store_si512(tiles[s % 4][row], BFloat16::expand(mask, at));
                });
            if (s >= 2) multiplied<R>(tiles[(s - 2) % 4], x.words + (s - 2) * 16 * LANES, apart);
        }
        store<0>(sums[0], 64), store<1>(sums[1], 64), store<2>(sums[2], 64), store<3>(sums[3], 64);
        for (int r = 0; r < R; ++r) places.write(weight, sums[r], r * LANES, x.batch, y, rounded);
    }
}

void multiply_few(const Weight& weight, const uint16_t* x, int64_t batch, char* y, bool rounded, int64_t threads) {
    Columns<Matrix> laid(batch, weight.columns);
    const auto work = laid.registers == 1   ? few<1>
                      : laid.registers == 2 ? few<2>
                      : laid.registers == 3 ? few<3>
                                            : few<4>;
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static) collapse(2)
        for (int64_t r = 0; r < laid.registers; ++r)
            for (int64_t step = 0; step < laid.steps; step += 16) laid.lay(x, weight.columns, r, step);
#pragma omp for schedule(static)
        for (int64_t part = 0; part < threads; ++part)
            work(weight, laid, y, rounded, first_band<uint32_t>(weight, part, threads),
                 first_band<uint32_t>(weight, part + 1, threads));
    }
}

}  // namespace
