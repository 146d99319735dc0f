// The kernels of dense.cpp, once for each instruction set that includes this. It has defined TARGET and INLINE; Vector with
// none, plus and total; SUMS, how many of them its registers hold; and the kinds of weights.

// One step of R rows of W and N rows of x. Rows of W are `apart` numbers apart, and fetched `ahead` numbers before; PAST the
// outer caches where that is fast (besa.kernels.fetching).
template <typename Kind, bool PAST, int R, int N>
INLINE void step(const typename Kind::Number* w, int64_t apart, int64_t ahead, const typename Kind::X* x,
                 int64_t columns, int64_t left, Vector (&sums)[R][N]) {
    decltype(Kind::of_x(x, 0)) inputs[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) inputs[n] = Kind::of_x(x + n * columns, left);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
        const typename Kind::Number* at = w + r * apart;
        _mm_prefetch(reinterpret_cast<const char*>(at + ahead), PAST ? _MM_HINT_NTA : _MM_HINT_T1);
        const auto of_w = Kind::of_w(at, left);
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) sums[r][n] = Kind::add(sums[r][n], of_w, inputs[n]);
    }
}

// R rows of W, each so many after the last, times N rows of x. U sums for each: they do not wait for each other.
template <typename Kind, bool PAST, int R, int N, int U>
INLINE void together(const typename Kind::Number* w, int64_t each, int64_t ahead, const typename Kind::X* x,
                     int64_t columns, int64_t rows, float* y) {
    constexpr int64_t WIDTH = Kind::WIDTH;
    Vector sums[U][R][N];
#pragma GCC unroll 16
    for (int i = 0; i < U * R * N; ++i) sums[i / N / R][i / N % R][i % N] = none();
    int64_t c = 0;
    for (; c + U * WIDTH <= columns; c += U * WIDTH)
#pragma GCC unroll 4
        for (int u = 0; u < U; ++u)
            step<Kind, PAST, R, N>(w + c + u * WIDTH, each * columns, ahead, x + c + u * WIDTH, columns, WIDTH, sums[u]);
#pragma GCC unroll 4
    for (int u = 0; u < U; ++u, c += WIDTH)
        if (c < columns) step<Kind, PAST, R, N>(w + c, each * columns, ahead, x + c, columns, columns - c, sums[u]);
#pragma GCC unroll 16
    for (int i = 0; i < R * N; ++i) {
        Vector sum = sums[0][i / N][i % N];
#pragma GCC unroll 4
        for (int u = 1; u < U; ++u) sum = plus(sum, sums[u][i / N][i % N]);
        y[i % N * rows + i / N * each] = total(sum);
    }
}

// Neighbouring rows at once, while those after them are fetched.
template <typename Kind, bool PAST, int R, int N>
TARGET void near(const typename Kind::Number* w, const typename Kind::X* x, int64_t columns, int64_t rows, int64_t first,
                 int64_t last, float* y) {
    for (; first + R <= last; first += R)
        together<Kind, PAST, R, N, 1>(w + first * columns, 1, R * columns, x, columns, rows, y + first);
    for (; first < last; ++first) together<Kind, PAST, 1, N, 1>(w + first * columns, 1, columns, x, columns, rows, y + first);
}

// Rows from R places at once, each read to its end and on: memory gives more then.
template <typename Kind, bool PAST, int R, int N>
TARGET void far(const typename Kind::Number* w, const typename Kind::X* x, int64_t columns, int64_t rows, int64_t first,
                int64_t last, float* y) {
    constexpr int64_t AHEAD = 1536 / sizeof(typename Kind::Number);
    const int64_t each = (last - first) / R;
    for (int64_t row = first; row < first + each; ++row)
        together<Kind, PAST, R, N, 2>(w + row * columns, each, AHEAD, x, columns, rows, y + row);
    for (int64_t row = first + R * each; row < last; ++row)
        together<Kind, PAST, 1, N, 2>(w + row * columns, 1, AHEAD, x, columns, rows, y + row);
}

template <typename Kind, bool PAST>
void multiply(const typename Kind::Number* w, const typename Kind::X* x, int64_t batch, int64_t columns, int64_t rows,
              float* y, int64_t threads) {
    constexpr int64_t EIGHT = 8;  // rows of W that stay in the caches while all rows of x pass
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t thread = 0; thread < threads; ++thread) {
        const int64_t all = (rows + EIGHT - 1) / EIGHT, end = std::min(rows, all * (thread + 1) / threads * EIGHT);
        const int64_t begin = all * thread / threads * EIGHT;
        if (batch <= 4) {
            const auto kernel = batch == 1   ? far<Kind, PAST, std::min(4, SUMS / 2), 1>
                                : batch == 2 ? far<Kind, PAST, SUMS / 4, 2>
                                : batch == 3 ? far<Kind, PAST, SUMS / 6, 3>
                                             : far<Kind, PAST, SUMS / 8, 4>;
            kernel(w, x, columns, rows, begin, end, y);
            continue;
        }
        for (int64_t first = begin; first < end; first += EIGHT) {
            const int64_t last = std::min(end, first + EIGHT);
            int64_t n = 0;
            for (; n + 4 <= batch; n += 4)
                near<Kind, PAST, SUMS / 4, 4>(w, x + n * columns, columns, rows, first, last, y + n * rows);
            for (; n + 2 <= batch; n += 2)
                near<Kind, PAST, SUMS / 2, 2>(w, x + n * columns, columns, rows, first, last, y + n * rows);
            for (; n < batch; ++n) near<Kind, PAST, 8, 1>(w, x + n * columns, columns, rows, first, last, y + n * rows);
        }
    }
}
