"""The trained tiny Llama that the fast tests prune and measure (tests/assets/tiny-llama/README.md)."""

import copy
import gc
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is first imported, which others may do
os.environ.setdefault("OMP_NUM_THREADS", "1")  # also of what tests start: small models gain nothing from more
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # `make test-gpu` is for GPUs; the pretend accelerator takes their place here
os.environ.pop("COLUMNS", None)  # pytest-xdist sets it, and a console of rich would keep that width

import pytest
import torch
import typer.main
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, BatchEncoding
from transformers.tokenization_utils_tokenizers import TokenizersBackend

from besa.counting import widening

torch.set_num_threads(1)

collect_ignore = ["gpu"]  # `make test-gpu` runs these, without what is set here
TINY_LLAMA = Path(__file__).parent / "assets" / "tiny-llama"
SHALLOW = 3  # blocks, of 8
CHARACTERS = 40_000  # of 200,000
LONG = 20_000  # characters


@pytest.hookimpl(trylast=True)
def pytest_collection_finish() -> None:
    """What is imported stays: the garbage collector need not look at it again and again."""
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def interruptible() -> Iterator[None]:
    """Ctrl-C reaches the tests and what they start, also where they run in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session", autouse=True)
def long_texts_are_tokenised_once() -> Iterator[None]:
    """Most tests calibrate on the same text, and would spend an eighth of their time on its tokens."""
    genuine, known = TokenizersBackend.__call__, {}

    def call(self: TokenizersBackend, *given: Any, **settings: Any) -> BatchEncoding:
        if not (
            given and isinstance(given[0], list) and len(str(given[0])) > LONG and "return_tensors" not in settings
        ):
            return genuine(self, *given, **settings)
        key = (self.backend_tokenizer.to_str(), str(given), str(settings))
        if key not in known:
            known[key] = dict(genuine(self, *given, **settings))
        return BatchEncoding({name: [list(row) for row in rows] for name, rows in known[key].items()})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TokenizersBackend, "__call__", call)
        yield


@pytest.fixture(scope="session", autouse=True)
def nothing_is_drawn_without_memory() -> Iterator[None]:
    """Random numbers on the meta device go nowhere; torch takes four fifths of a model without weights for them."""

    def without(genuine: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda tensor, *given, **settings: tensor if tensor.is_meta else genuine(tensor, *given, **settings)

    with pytest.MonkeyPatch.context() as patch:
        for name in ("normal_", "uniform_"):
            patch.setattr(Tensor, name, without(getattr(Tensor, name)))
        yield


@pytest.fixture(scope="session", autouse=True)
def commands_are_built_once() -> Iterator[None]:
    """Typer builds all commands for each call, of which tests make many in one process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(typer.main, "get_command", cache(typer.main.get_command))
        yield


@pytest.fixture
def torchs_own_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU multiplies half precision as the pretend accelerator does, whatever units it has."""
    monkeypatch.setattr(widening, "slow", frozenset)


@pytest.fixture(scope="session")
def tiny_llama_folder() -> Path:
    return TINY_LLAMA


@pytest.fixture(scope="session")
def shallow_llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its first blocks, with its tokenizer and less text, for what needs no quality: it takes less time."""
    folder = tmp_path_factory.mktemp("models") / "shallow-llama"
    shutil.copytree(TINY_LLAMA, folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    AutoModelForCausalLM.from_pretrained(TINY_LLAMA, num_hidden_layers=SHALLOW).save_pretrained(folder)
    text = folder / "calibration.txt"
    text.write_text(text.read_text(encoding="utf-8")[:CHARACTERS], encoding="utf-8")
    return folder


@pytest.fixture
def shallow_llama(shallow_llama_folder: Path):
    """That of `shallow_llama_folder`, to change at will."""
    return AutoModelForCausalLM.from_pretrained(shallow_llama_folder, dtype=torch.float32).eval().requires_grad_(False)


@pytest.fixture(scope="session")
def tiny_tokenizer():
    return AutoTokenizer.from_pretrained(TINY_LLAMA)


@pytest.fixture(scope="session")
def pristine_tiny_llama():
    """Loaded once; tests take `tiny_llama`, a copy that they may change."""
    return AutoModelForCausalLM.from_pretrained(TINY_LLAMA, dtype=torch.float32).eval().requires_grad_(False)


@pytest.fixture
def tiny_llama(pristine_tiny_llama):
    return copy.deepcopy(pristine_tiny_llama)
