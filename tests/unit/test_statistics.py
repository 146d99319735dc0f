"""What is gathered of a linear's inputs, against the inputs themselves."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from transformers.pytorch_utils import Conv1D

from besa.errors import BesaError
from besa.models.blocks import Block
from besa.models.prunable import Prunable, find_prunables
from besa.models.units import Unit
from besa.observing import input_statistics
from besa.observing.input_statistics import InputStatistics, collect, look
from besa.system.ranks import Share


class Attention(nn.Module):
    """Three linears that share their input, and one that does not."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(6, 6, bias=False) for _ in range(4))

    def forward(self, x):
        x = x * 2
        return self.o(self.q(x) * self.k(x).tanh() + self.v(x))


@pytest.fixture
def attention():
    torch.manual_seed(0)
    return Attention().requires_grad_(False)


@pytest.fixture
def batches():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(n, 5, 6, generator=generator) for n in (3, 2, 1)]


def collected(gram, **modules: nn.Module):
    """`collect` on a block of these modules; the statistics come under their names."""
    block = nn.ModuleDict(modules)
    return collect(block, find_prunables(block), gram)


@pytest.mark.parametrize(("gram", "panel"), [(False, 512), (True, 512), (True, 1), (True, 4), (True, 6)])
def test_sums_over_all_tokens(attention, batches, gram, panel, monkeypatch):
    """Panels of a Gram matrix may be narrower than it, and need not divide it."""
    monkeypatch.setattr(input_statistics, "PANEL", panel)
    with collect(attention, find_prunables(attention), gram) as statistics:
        for x in batches:
            attention(x)
    x_TI = torch.cat(batches).reshape(-1, 6).double() * 2
    y_TI = attention.q(x_TI.float()) * attention.k(x_TI.float()).tanh() + attention.v(x_TI.float())
    for name, inputs_TI in [("q", x_TI), ("k", x_TI), ("v", x_TI), ("o", y_TI.double())]:
        found = statistics[name]
        assert found.tokens == 30
        assert found.squares_I.dtype == torch.float64
        torch.testing.assert_close(found.squares_I, inputs_TI.square().sum(dim=0), rtol=1e-5, atol=0)
        if gram:
            assert found.gram_II.dtype == torch.float32
            torch.testing.assert_close(found.gram_II.double(), inputs_TI.T @ inputs_TI, rtol=1e-5, atol=1e-4)
            assert torch.equal(found.gram_II, found.gram_II.T)
        else:
            assert found.gram_II is None


def test_linears_of_one_input_share_the_work(attention, batches, monkeypatch):
    added = []
    add = InputStatistics.add

    def counted(self, x_TI, *held_out):
        added.append(len(x_TI))
        add(self, x_TI, *held_out)

    monkeypatch.setattr(InputStatistics, "add", counted)
    with collect(attention, find_prunables(attention), gram=True) as statistics:
        for x in batches:
            attention(x)
    assert statistics["q"] is statistics["k"] is statistics["v"]
    assert statistics["o"] is not statistics["q"]
    assert added == [15, 15, 10, 10, 5, 5]


def test_equal_inputs_that_are_not_the_same_tensor_count_apart():
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    with collected(gram=False, first=first, second=second) as statistics:
        first(torch.ones(3, 2))
        second(torch.ones(3, 2))
    assert statistics["first"] is not statistics["second"]
    assert statistics["first"].tokens == statistics["second"].tokens == 3


def test_every_pass_counts_even_of_the_same_tensor():
    linear, x = nn.Linear(2, 2), torch.tensor([[1.0, 2.0]])
    with collected(gram=True, linear=linear) as statistics:
        linear(x)
        linear(x)
    assert statistics["linear"].tokens == 2
    assert statistics["linear"].squares_I.tolist() == [2, 8]
    assert statistics["linear"].gram_II.tolist() == [[2, 4], [4, 8]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_are_summed_in_full(dtype):
    x = torch.full((4000, 1), 1.5, dtype=dtype)
    with collected(gram=True, linear=(linear := nn.Linear(1, 1).to(dtype))) as statistics:
        linear(x)
    assert statistics["linear"].squares_I.tolist() == [9000]
    assert statistics["linear"].gram_II.tolist() == [[9000]]


def in_tf32(x):
    """Float32 rounded to the ten stored bits of TF32, halves to even."""
    bits = x.view(torch.int32)
    return ((bits + 0xFFF + (bits >> 13 & 1)) & ~0x1FFF).view(torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_tf32_holds_every_number_of_half_precision(dtype):
    """Subnormal ones too."""
    every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype).float()
    every = every[every.isfinite()]
    assert len(every) > 60_000
    assert torch.equal(in_tf32(every).view(torch.int32), every.view(torch.int32))


@pytest.mark.parametrize(("dtype", "most"), [(torch.bfloat16, 1e-6), (torch.float16, 1e-6), (torch.float32, 1e-4)])
def test_the_error_of_a_gram_in_tf32(dtype, most):
    """Of half precision it is that of float32 sums. Of float32 it would be a hundred times that."""
    x_TI = torch.randn(2048, 48, generator=torch.Generator().manual_seed(0)).to(dtype)
    exact_II = x_TI.double().T @ x_TI.double()
    rounded_TI = in_tf32(x_TI.float())
    gram_II = rounded_TI.T @ rounded_TI
    scale_I = exact_II.diagonal().sqrt()
    error = float(((gram_II - exact_II).abs() / (scale_I[:, None] * scale_I)).max())
    assert (most / 10 if dtype == torch.float32 else 0) < error < most


@pytest.mark.parametrize(
    ("dtype", "precision"),
    [(torch.bfloat16, ("tf32", "bf16")), (torch.float16, ("tf32", "ieee")), (torch.float32, ("ieee", "ieee"))],
)
def test_only_the_gram_of_half_precision_uses_its_units(dtype, precision):
    seen = {}

    def now():
        return torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision

    class Seeing(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen[func._schema.name] = now()
            return func(*args, **(kwargs or {}))

    before = now()
    statistics = InputStatistics.empty(4, gram=True, device=torch.device("cpu"))
    with Seeing():
        statistics.add(torch.ones(3, 4, dtype=dtype))
    assert seen["aten::mm"] == precision
    assert seen["besa::add_squares"] == before == now()


def test_the_units_of_half_precision_lose_nothing_of_a_gram():
    x_TI = torch.randn(700, 96, generator=torch.Generator().manual_seed(2)).bfloat16()
    statistics = gathered(x_TI)
    exact_II = x_TI.double().T @ x_TI.double()
    scale_I = exact_II.diagonal().sqrt()
    assert float(((statistics.gram_II - exact_II).abs() / (scale_I[:, None] * scale_I)).max()) < 1e-5


def test_inputs_are_not_kept_with_their_graph():
    linear = nn.Linear(2, 2)
    with collected(gram=True, linear=linear) as statistics:
        linear(torch.ones(1, 2, requires_grad=True))
    assert not statistics["linear"].squares_I.requires_grad
    assert not statistics["linear"].gram_II.requires_grad


@pytest.mark.parametrize("raises", [False, True])
def test_nothing_is_observed_afterwards(attention, batches, raises):
    try:
        with collect(attention, find_prunables(attention), gram=False) as statistics:
            attention(batches[0])
            if raises:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert raises
    squares_I = statistics["o"].squares_I.clone()
    attention(batches[0])
    assert {name: found.tokens for name, found in statistics.items()} == dict.fromkeys("qkvo", 15)
    assert torch.equal(statistics["o"].squares_I, squares_I)


def test_observing_changes_no_result(attention, batches):
    expected = attention(batches[0])
    with collect(attention, find_prunables(attention), gram=True):
        assert torch.equal(attention(batches[0]), expected)


@pytest.mark.parametrize("gram", [True, False])
def test_what_no_token_reached_has_statistics_of_none(gram):
    first, second = nn.Linear(2, 2), nn.Linear(3, 5)
    with collected(gram, first=first, second=second) as statistics:
        first(torch.ones(4, 2))
    assert set(statistics) == {"first", "second"}
    assert (statistics["first"].tokens, statistics["second"].tokens) == (4, 0)
    assert statistics["second"].squares_I.tolist() == [0, 0, 0]
    assert statistics["second"].squares_I.dtype == torch.float64
    if gram:
        assert statistics["second"].gram_II.tolist() == [[0, 0, 0]] * 3
    else:
        assert statistics["second"].gram_II is None


def test_products_with_other_tensors_do_not_count():
    linear, other = nn.Linear(2, 2), nn.Linear(2, 2)
    with collected(gram=False, linear=linear) as statistics:
        other(torch.ones(3, 2))
        torch.ones(3, 2) @ torch.ones(2, 2)
        linear(torch.ones(1, 2)).norm()
    assert set(statistics) == {"linear"}
    assert statistics["linear"].tokens == 1


PRODUCTS = {
    "linear": lambda x_TI, w_OI: nn.functional.linear(x_TI, w_OI),
    "addmm": lambda x_TI, w_OI: torch.addmm(torch.zeros(5), x_TI, w_OI.T),
    "matmul": lambda x_TI, w_OI: torch.matmul(x_TI, w_OI.T),
    "method": lambda x_TI, w_OI: x_TI.matmul(w_OI.T),
    "operator": lambda x_TI, w_OI: x_TI @ w_OI.T,
    "batched": lambda x_TI, w_OI: torch.bmm(x_TI[None], w_OI.T[None])[0],
    "linear by names": lambda x_TI, w_OI: nn.functional.linear(input=x_TI, weight=w_OI),
    "addmm by names": lambda x_TI, w_OI: torch.addmm(torch.zeros(5), mat1=x_TI, mat2=w_OI.T),
    "matmul by names": lambda x_TI, w_OI: torch.matmul(input=x_TI, other=w_OI.T),
    "mm": lambda x_TI, w_OI: torch.mm(x_TI, mat2=w_OI.T),
    "mm method": lambda x_TI, w_OI: x_TI.mm(w_OI.T),
    "batched by names": lambda x_TI, w_OI: torch.bmm(input=x_TI[None], mat2=w_OI.T[None])[0],
    "baddbmm": lambda x_TI, w_OI: torch.baddbmm(torch.zeros(1, 1, 5), batch1=x_TI[None], batch2=w_OI.T[None])[0],
    "one for all": lambda x_TI, w_OI: torch.matmul(x_TI.reshape(2, 1, 3), w_OI.T[None])[:, 0],
    "on the left": lambda x_TI, w_OI: (w_OI @ x_TI.T).T,
    "einsum": lambda x_TI, w_OI: torch.einsum("ti,oi->to", x_TI, w_OI),
    "einsum, weight first": lambda x_TI, w_OI: torch.einsum("oi, ...i -> ...o", w_OI, x_TI),
    "einsum of a list": lambda x_TI, w_OI: torch.einsum("ti,io->to", [x_TI, w_OI.T]),
}


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("product", PRODUCTS)
def test_products_are_told_by_the_weight_whatever_computes_them(product, transposed):
    block = nn.Module()
    block.weight = nn.Parameter(torch.randn((3, 5) if transposed else (5, 3)), requires_grad=False)
    prunable = Prunable("weight", 5, 3, transposed)
    x_TI = torch.tensor([[1.0, 2.0, 3.0], [1.0, 0.0, -1.0]])
    with collect(block, {"w": prunable}, gram=True) as statistics:
        y_TO = PRODUCTS[product](x_TI, prunable.of(block.weight))
    torch.testing.assert_close(y_TO, x_TI @ prunable.of(block.weight).T)
    assert statistics["w"].tokens == 2
    assert statistics["w"].squares_I.tolist() == [2, 4, 10]
    assert statistics["w"].gram_II.tolist() == [[2, 2, 2], [2, 4, 6], [2, 6, 10]]


def test_a_conv1d_is_observed():
    conv = Conv1D(5, 3)
    with collected(gram=False, conv=conv) as statistics:
        conv(torch.tensor([[[1.0, 2.0, 3.0], [1.0, 0.0, -1.0]]]))
    assert statistics["conv"].tokens == 2
    assert statistics["conv"].squares_I.tolist() == [2, 4, 10]


@pytest.fixture
def experts():
    """Three experts (E, O, I) of which each forward pass uses those it is told."""
    block = nn.Module()
    block.stack = nn.Parameter(torch.randn(3, 4, 2, generator=torch.Generator().manual_seed(0)), requires_grad=False)
    return block, {f"stack.{expert}": Prunable("stack", 4, 2, expert=expert) for expert in range(3)}


def test_experts_count_the_tokens_that_reach_them(experts):
    block, prunables = experts
    with collect(block, prunables, gram=False) as statistics:
        nn.functional.linear(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), block.stack[0])
        nn.functional.linear(torch.tensor([[5.0, 6.0]]), block.stack[2])
        nn.functional.linear(torch.tensor([[1.0, 1.0]]), block.stack[2])
    assert [statistics[name].tokens for name in prunables] == [2, 0, 2]
    assert [statistics[name].squares_I.tolist() for name in prunables] == [[10, 20], [0, 0], [26, 37]]


@pytest.mark.parametrize(
    "product", [torch.bmm, torch.matmul, lambda x_ETI, w_EIO: torch.einsum("eti,eio->eto", x_ETI, w_EIO)]
)
def test_experts_multiplied_all_at_once_count_apart(experts, product):
    block, prunables = experts
    x_ETI = torch.arange(12.0).reshape(3, 2, 2)
    with collect(block, prunables, gram=False) as statistics:
        product(x_ETI, block.stack.transpose(1, 2))
    for expert, name in enumerate(prunables):
        assert statistics[name].tokens == 2
        assert statistics[name].squares_I.tolist() == x_ETI[expert].square().sum(dim=0).tolist()


def test_experts_that_all_get_the_same_tokens_count_them_each(experts):
    block, prunables = experts
    x_TI = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    with collect(block, prunables, gram=False) as statistics:
        torch.matmul(x_TI, block.stack.transpose(1, 2))
    assert [statistics[name].squares_I.tolist() for name in prunables] == [[10, 20]] * 3


def test_sums_that_are_no_plain_product_do_not_count():
    linear = nn.Linear(3, 3, bias=False)
    with collected(gram=False, linear=linear) as statistics:
        torch.einsum("ti,oi->t", torch.ones(2, 3), linear.weight)
        torch.einsum("ti,oi", torch.ones(2, 3), linear.weight)
        torch.einsum("ii->i", linear.weight)
    assert statistics["linear"].tokens == 0


@pytest.mark.parametrize("rows", [3, 5])
def test_a_product_the_other_way_round_does_not_count_and_of_an_expert_is_refused(rows):
    """A square matrix is told by how it lies in memory."""
    block = nn.Module()
    block.weight = nn.Parameter(torch.randn(rows, 5))
    with collect(block, {"w": Prunable("weight", rows, 5)}, gram=False) as statistics:
        torch.ones(2, rows) @ block.weight
    assert statistics["w"].tokens == 0
    with (
        pytest.raises(
            BesaError,
            match=r"^w is multiplied in transposed form, which besa does not support: the model cannot be pruned\.$",
        ),
        collect(block, {"w": Prunable("weight", rows, 5, routed=True)}, gram=False),
    ):
        torch.ones(2, rows) @ block.weight


def gathered(x_TI) -> InputStatistics:
    statistics = InputStatistics.empty(x_TI.shape[1], True, x_TI.device)
    statistics.add(x_TI)
    return statistics


def test_hessian_is_damped_and_dead_channels_count_one():
    statistics = gathered(torch.tensor([[1.0, 0.0, 2.0], [1.0, 0.0, -1.0]]))
    # Diagonal 2, 0, 5: the dead channel becomes 1, and a tenth of the mean, 8/3, is added.
    extra = 0.1 * 8 / 3
    expected_II = torch.tensor([[2 + extra, 0, 1], [0, 1 + extra, 0], [1, 0, 5 + extra]])
    torch.testing.assert_close(statistics.hessian(0.1), expected_II)
    assert statistics.gram_II.tolist() == [[2, 0, 1], [0, 0, 0], [1, 0, 5]]  # not changed


def test_inverse_hessian():
    generator = torch.Generator().manual_seed(0)
    statistics = gathered(torch.randn(50, 8, generator=generator))
    inverse_II = torch.linalg.inv(statistics.hessian(0.01).double())
    torch.testing.assert_close(statistics.inverse_hessian(0.01).double(), inverse_II, rtol=1e-4, atol=1e-7)


def test_inverse_hessian_is_of_all_tokens_so_far_and_of_the_damping_asked_for():
    statistics = gathered(torch.ones(1, 1))
    assert statistics.inverse_hessian(1.0).item() == pytest.approx(1 / 2)
    assert statistics.inverse_hessian(3.0).item() == pytest.approx(1 / 4)
    statistics.add(torch.ones(1, 1))
    assert statistics.inverse_hessian(1.0).item() == pytest.approx(1 / 4)


def test_fewer_tokens_than_channels_need_damping():
    statistics = gathered(torch.eye(3, 8) + 1)
    assert statistics.inverse_hessian(0.01).isfinite().all()


@pytest.mark.parametrize("gram", [[[1.0, 2.0], [2.0, 1.0]], [[torch.nan, 0.0], [0.0, 1.0]]])
def test_what_is_not_positive_definite_is_refused(gram):
    statistics = InputStatistics(torch.ones(2, dtype=torch.float64), torch.tensor(gram), torch.zeros(2, 2), 1)
    with pytest.raises(BesaError, match=r"not positive definite: .*\.$") as caught:
        statistics.inverse_hessian(0.01)
    assert "\n" not in str(caught.value)


class Residual(nn.Module):
    """A block of two linears in a row, added to its input."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(6, 4, bias=False), nn.Linear(4, 6, bias=False)

    def forward(self, x):
        return x + self.down(self.up(x).relu())


class Twice(Residual):
    """The first linear has another turn after the second."""

    def forward(self, x):
        y = super().forward(x)
        return y + self.up(y).sum(dim=-1, keepdim=True)


class Chosen(Residual):
    """The second linear has only the tokens that begin with a positive number."""

    def forward(self, x):
        y = x.clone()
        y[x[..., 0] > 0] += self.down(self.up(x[x[..., 0] > 0]))
        return self.up(y).sum(dim=-1, keepdim=True) + y


@pytest.mark.parametrize(("kind", "skipped"), [(Residual, 2), (Twice, 0), (Chosen, 0)])
@pytest.mark.parametrize("gram", [False, True])
def test_a_look_is_as_good_as_whole_passes_and_ends_early_where_it_may(kind, skipped, gram):
    torch.manual_seed(0)
    modules = [kind().requires_grad_(False) for _ in range(2)]
    arguments = {(n, 5): {} for n in (1, 2)}
    blocks = []
    for i, module in enumerate(modules):
        prunables = {f"b{i}.{name}": own for name, own in find_prunables(module).items()}
        blocks.append(Block(i, f"b{i}", module, prunables, arguments))
    x_NTC = torch.randn(5, 5, 6)
    with (
        collect(modules[0], blocks[0].prunables, gram) as first,
        collect(modules[1], blocks[1].prunables, gram) as last,
    ):
        for own_NTC in x_NTC.split(2):
            modules[1](modules[0](own_NTC))
    calls = [0, 0]

    def count(place):
        def hook(*_):
            calls[place] += 1

        return hook

    for place, module in enumerate(modules):
        module.down.register_forward_hook(count(place))
    found = look(Unit(tuple(blocks)), x_NTC, 2, gram, Share(3, 8, 8))
    assert list(found) == [*first, *last]
    for name, expected in (first | last).items():
        assert found[name].tokens == expected.tokens
        assert torch.equal(found[name].squares_I, expected.squares_I)
        assert (found[name].gram_II is None) if not gram else torch.equal(found[name].gram_II, expected.gram_II)
        assert (
            (found[name].held_II is None) if not gram else not found[name].held_II.any()
        )  # none is at a multiple of 8
    assert calls == [3, 3 - skipped]


@pytest.mark.parametrize("batch", [1, 3, 20])
def test_every_eighth_sequence_is_held_out(batch):
    """Of nine sequences of a set of 20, from place 7 on, those at 8 and at 15 + 1."""
    torch.manual_seed(0)
    module = Residual().requires_grad_(False)
    block = Block(0, "b", module, find_prunables(module), {(n, 5): {} for n in (1, 2, 3, 11)})
    x_NTC = torch.randn(11, 5, 6)
    found = look(Unit((block,)), x_NTC, batch if batch < 20 else 11, True, Share(7, 18, 20))
    rows = {"up": x_NTC, "down": module.up(x_NTC).relu()}
    for name, x in rows.items():
        held, rest = x[[1, 9]].flatten(0, 1).double(), x[[0, *range(2, 9), 10]].flatten(0, 1).double()
        torch.testing.assert_close(found[name].held_II, (held.T @ held).float())
        torch.testing.assert_close(found[name].gram_II, (rest.T @ rest).float())
        torch.testing.assert_close(found[name].squares_I, x.double().square().sum(dim=(0, 1)), rtol=1e-5, atol=0)


@pytest.mark.parametrize("batch", [1, 3, 11])
def test_of_experts_too_every_eighth_sequence_is_held_out(batch):
    """Which tokens reach an expert in which order, a family decides: top-2 experts get all first choices first."""
    torch.manual_seed(0)
    config = MixtralConfig(hidden_size=6, intermediate_size=7, num_local_experts=5, num_experts_per_tok=2)
    module = MixtralSparseMoeBlock(config).requires_grad_(False)
    for parameter in module.parameters():
        parameter.normal_()
    block = Block(0, "b", module, find_prunables(module), {(n, 5): {} for n in range(1, 12)})
    x_NTC = torch.randn(11, 5, 6)
    found = look(Unit((block,)), x_NTC, batch, True, Share(7, 18, 20))
    for places, sums in (([1, 9], "held_II"), ([0, *range(2, 9), 10], "gram_II")):
        with collect(module, block.prunables, gram=True) as expected:
            block(x_NTC[places])
        assert len(expected) == len(found) == 10
        for name, one in found.items():
            torch.testing.assert_close(getattr(one, sums), expected[name].gram_II, rtol=1e-5, atol=1e-5)


def test_a_single_sequence_is_solved_for_and_judged_by():
    torch.manual_seed(0)
    module = Residual().requires_grad_(False)
    block = Block(0, "b", module, find_prunables(module), {(1, 5): {}})
    found = look(Unit((block,)), torch.randn(1, 5, 6), 1, True, Share.whole(1))
    assert found["up"].gram_II.any()
    assert torch.equal(found["up"].gram_II, found["up"].held_II)


def test_a_look_at_a_share_of_the_sequences_sees_these_alone_whoever_has_them():
    torch.manual_seed(0)
    module = Residual().requires_grad_(False)
    block = Block(0, "b", module, find_prunables(module), {(n, 5): {} for n in (1, 2)})
    x_NTC = torch.randn(8, 5, 6)
    found = look(Unit((block,)), x_NTC, 2, False, Share.whole(8), 3)
    expected = look(Unit((block,)), x_NTC[[0, 3, 6]], 1, False, Share.whole(3))
    halves = [
        look(Unit((block,)), x_NTC[part], 2, False, Share(part.start, part.stop, 8), 3)
        for part in (slice(0, 4), slice(4, 8))
    ]
    nothing = look(Unit((block,)), x_NTC[4:6], 2, False, Share(4, 6, 8), 3)
    assert list(found) == list(expected) == list(nothing)
    for name, one in found.items():
        assert one.tokens == 15
        assert torch.equal(one.squares_I, expected[name].squares_I)
        assert torch.equal(one.squares_I, halves[0][name].squares_I + halves[1][name].squares_I)
        assert nothing[name].tokens == 0
