"""The process of `test_sanitizers.py`: kernels with the sanitizers' checks in them, on weights of odd shapes.

Give `overrun` to have a kernel write beyond its output, which the sanitizers must see.
"""

import random
import sys

import torch

from besa.kernels import (
    attention,
    build,
    decoding,
    dense,
    held,
    native,
    norm,
    reference,
    row_codes,
    sparse_native,
    tiles_native,
)
from besa.storage.formats import bitmask
from besa.storage.formats.row_codes import RowCodes

build.FLAGS = ("-O1", "-g", *build.FLAGS[1:], "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
from tests.unit.test_sparse import codes_weight, half_pruned, row_of_x  # noqa: E402 (it loads the kernels)

CALLS = 1500  # of each kind


def masks(draw: random.Random, generator: torch.Generator) -> int:
    """Both kernels of masks.cpp, by every path."""
    rows, columns = draw.randint(1, 20), draw.choice([draw.randint(1, 70), draw.randint(1, 3000)])
    dtype = draw.choice(list(native.NUMBERS))
    w_OI, gradient_OI = torch.randn(2, rows, columns, generator=generator).to(dtype)
    ranks_OI = torch.rand(rows, columns, generator=generator).argsort(dim=1)
    ranks_OI = ranks_OI.to(draw.choice([torch.int16, torch.int32]))
    counts_O = torch.randint(columns + 1, (rows,), generator=generator)
    bins = draw.choice([1, 2, 11, 101])
    bins_I = torch.randint(bins, (columns,), generator=generator).sort().values.to(torch.int16)
    expected_OI, expected_OB = torch.empty_like(w_OI), torch.empty(rows, bins)
    reference.masked(w_OI, ranks_OI, counts_O, expected_OI)
    reference.binned(gradient_OI, w_OI, ranks_OI, bins_I, expected_OB)
    for path in native.paths():
        out_OI, out_OB = torch.empty_like(w_OI), torch.empty(rows, bins)
        native.masked(w_OI, ranks_OI, counts_O, out_OI, path=path)
        native.binned(gradient_OI, w_OI, ranks_OI, bins_I, out_OB, path=path)
        assert torch.equal(out_OI, expected_OI)
        assert torch.equal(out_OB, expected_OB)
        kept_K = torch.empty(int(torch.count_nonzero(expected_OI)))
        native.gathered(expected_OI, gradient_OI, kept_K, path=path)
        native.spread(expected_OI, kept_K, out_OI, path=path)
        assert torch.equal(out_OI, torch.where(expected_OI != 0, gradient_OI, 0))
    return 4 * len(native.paths())


def products(draw: random.Random, generator: torch.Generator) -> int:
    """Products with a bitmask and its expansion, by every path."""
    rows, seed = draw.randint(1, 40), draw.randint(0, 10**6)
    if draw.random() < 0.5:
        columns = draw.choice([draw.randint(1, 70), draw.randint(1, 2500)])
        weight = bitmask.pack(half_pruned(rows, columns, seed).to(draw.choice(list(bitmask.FLOATS))))
    else:
        group = draw.choice([0, 4, 8, 16, 32, 64, 128])  # 0: a row is one
        columns = group * draw.randint(1, 20) or draw.randint(1, 1500)
        weight = codes_weight(
            rows, columns, columns // group if group else 1, draw.randint(2, 8), draw.random() < 0.5, seed
        )
    x_NI = row_of_x(weight, draw.choice([1, 2, 3, 4, 5, 7, 8, 9, 33, 63]), seed).float()
    first = draw.randrange(len(weight.masks_BCR))
    bands = slice(first, draw.randint(first + 1, len(weight.masks_BCR)))
    assert sparse_native.serves(weight)
    for path in sparse_native.paths():
        assert sparse_native.multiply(x_NI, weight, path).isfinite().all()
        sparse_native.expand(weight, bands, path)
    if most := held.most(weight):
        assert held.Product(weight)(x_NI[:most]).isfinite().all()
    many_NI, dense_OI = row_of_x(weight, draw.choice([1, 4, 16, 17, 40, 64, 70]), seed), weight.unpack()
    for path in tiles_native.paths():
        if path not in tiles_native.HALVES or weight.dtype == torch.bfloat16:
            for multiply, of in ((tiles_native.multiply, weight), (tiles_native.multiply, dense_OI)):
                assert multiply(many_NI, of, path).isfinite().all()
    for path in dense.paths():
        if path not in tiles_native.HALVES or weight.dtype == torch.bfloat16:
            assert dense.multiply(many_NI, dense_OI, path).isfinite().all()
    return 2 * len(sparse_native.paths())


def steps(draw: random.Random, generator: torch.Generator) -> int:
    """What decoding computes besides products with bitmasks: attention, norms and a head in codes, by every path."""
    dtype = draw.choice([torch.float32, torch.bfloat16])
    sequences, shared, groups, tokens = (draw.randint(1, most) for most in (3, 4, 3, 70))
    width, value_width = draw.randint(1, 140), draw.randint(1, 140)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    query_NH1D = drawn(sequences, groups * shared, 1, width)
    keys_NKTD, values_NKTD = drawn(sequences, shared, tokens, width), drawn(sequences, shared, tokens, value_width)
    allowed_N11T = torch.rand(draw.choice([1, sequences]), 1, 1, tokens, generator=generator) < 0.7
    allowed = allowed_N11T if draw.random() < 0.5 else None
    assert attention.serves(query_NH1D, keys_NKTD, values_NKTD, allowed)
    for path in attention.paths():
        assert attention.attend(query_NH1D, keys_NKTD, values_NKTD, allowed, 0.3, path).isfinite().all()
    x_NI, weight_I = drawn(draw.randint(1, 5), width), drawn(width)
    for path in norm.paths():
        assert norm.normed(x_NI, weight_I, 1e-5, draw.choice(norm.FORMS), path).isfinite().all()
    codes_OI = torch.randint(-127, 128, (draw.randint(1, 40), width), generator=generator, dtype=torch.int8)
    matrix = RowCodes(codes_OI, drawn(len(codes_OI), 1).abs())
    for path in row_codes.paths():
        assert row_codes.multiply(x_NI.float(), matrix, path).isfinite().all()
    return len(attention.paths()) + len(norm.paths()) + len(row_codes.paths())


def modules(draw: random.Random, generator: torch.Generator) -> int:
    """An attention module of odd sizes as one call, with what may be there or not; and blocks with such modules."""
    dtype, scale = draw.choice([torch.float32, torch.bfloat16]), 0.3
    shared, groups, tokens, width = draw.randint(1, 3), draw.randint(1, 3), draw.randint(1, 70), 2 * draw.randint(1, 40)
    value_width, columns, inner = draw.randint(1, 70), draw.randint(1, 90), draw.randint(1, 90)
    turned, heads, seed = 2 * draw.randint(1, width // 2), shared * groups, draw.randint(0, 10**6)
    form = draw.choice(norm.FORMS)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    def product(size: tuple[int, int]) -> sparse_native.Product | dense.Product:
        w_OI = half_pruned(*size, seed).to(dtype)
        return sparse_native.Product(bitmask.pack(w_OI), 1, dtype) if draw.random() < 0.5 else dense.Product(w_OI)

    def linears(*sizes: tuple[int, int]) -> list[decoding.Linear]:
        return [
            decoding.Linear(product(size).entry, drawn(size[0]) if draw.random() < 0.5 else None, size)
            for size in sizes
        ]

    def norms(*lengths: int) -> list[decoding.Norm | None]:
        return [decoding.Norm(drawn(length), 1e-5, form) if draw.random() < 0.5 else None for length in lengths]

    inputs = [(rows, columns) for rows in (heads * width, shared * width, shared * value_width)]
    lengths = draw.choice([(width, width), (heads * width, shared * width)])
    out = (columns, heads * value_width)
    step = decoding.Step(linears(*inputs, out), norms(*lengths), width, scale, dtype)
    keys, values = drawn(1, shared, tokens + 3, width), drawn(1, shared, tokens + 1, value_width)
    place = decoding.Place(keys.data_ptr(), values.data_ptr(), keys.stride(1), values.stride(1))
    allowed = torch.ones(1, 1, 1, tokens, dtype=torch.bool) if draw.random() < 0.5 else None
    token = decoding.Token((drawn(1, 1, turned).cos(), drawn(1, 1, turned).sin()), allowed, tokens)
    assert step(drawn(1, 1, columns), token, place).isfinite().all()
    if dtype == torch.bfloat16:
        mlp = linears((inner, columns), (inner, columns), (columns, inner))
        table = torch.arange(-(2**15), 2**15).to(torch.int16).roll(2**15)  # each number as it is
        block = decoding.Block(step, norms(*[columns] * 4), mlp, table)
        count = draw.randint(1, 3)
        passed = decoding.passed([block] * count, drawn(1, 1, columns), token, [place] * count)
        assert passed.shape == (count, 1, 1, columns)
    return 1


def overrun() -> None:
    """A call that says more columns than its tensors have."""
    tensors = (
        torch.ones(4, 8),
        torch.zeros(4, 8, dtype=torch.int32),
        torch.zeros(4, dtype=torch.int64),
        torch.ones(4, 8),
    )
    native._call("masked_32_32_plain", *tensors, 4, 8 + 64)


if __name__ == "__main__":
    if sys.argv[1:] == ["overrun"]:
        overrun()
    draw, generator = random.Random(0), torch.Generator().manual_seed(0)
    called = 0
    for _ in range(CALLS):
        torch.set_num_threads(draw.randint(1, 3))
        called += sum(kind(draw, generator) for kind in (masks, products, steps, modules))
    print(called, *sparse_native.paths(), *native.paths())
