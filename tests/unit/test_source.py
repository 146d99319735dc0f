"""The identity of a model: what a run, a comparison and a cache of text know it by."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from besa.models import source
from besa.models.source import Source, fingerprint


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(source, "EDGE", 64)  # of such small files
    monkeypatch.setattr(source, "PLACE", 16)
    (tmp_path / "config.json").write_text("{}")
    write(tmp_path, {})
    return tmp_path


def write(folder: Path, changes: dict[str, float]) -> None:
    tensors = {name: torch.full((40, 40), changes.get(name, 1.0)) for name in ("embed", "o_proj", "v_proj")}
    save_file(tensors, folder / "model.safetensors")


def print_of(folder: Path, gguf: str | None = None) -> str:
    return fingerprint(Source(str(folder), str(folder), gguf))


@pytest.mark.parametrize("name", ["embed", "o_proj", "v_proj"])
def test_every_tensor_counts(folder: Path, name: str) -> None:
    """As of a model in which an adapter was merged into one kind of linear."""
    before = print_of(folder)
    write(folder, {name: 1.5})
    assert print_of(folder) != before
    write(folder, {})
    assert print_of(folder) == before


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "modeling_own.py"])
def test_so_do_files_that_decide_tokens_and_code(folder: Path, name: str) -> None:
    before = print_of(folder)
    (folder / name).write_text("{}")
    first = print_of(folder)
    (folder / name).write_text("[]")
    assert len({before, first, print_of(folder)}) == 3


def test_but_not_results_and_cards(folder: Path) -> None:
    before = print_of(folder)
    for name in ("README.md", "besa_eval.json", "besa_run.json", "generation_config.json", "x.partial"):
        (folder / name).write_text("{}")
    assert print_of(folder) == before


def test_of_a_gguf_file_all_parts_count_and_its_name_is_no_pattern(tmp_path: Path) -> None:
    path = tmp_path / "a[1].gguf"
    path.write_bytes(b"GGUF" + bytes(3 << 20))
    before = print_of(tmp_path, path.name)
    content = bytearray(path.read_bytes())
    content[3 << 19 : (3 << 19) + 8192] = bytes([1]) * 8192
    path.write_bytes(content)
    assert print_of(tmp_path, path.name) != before


HEADERS = [b"{nope}", b"[1]", b'"x"', b'{"a": 1}'] + [
    json.dumps({"a": {"data_offsets": offsets}}).encode() for offsets in ([-99, 1], [10**30, 1], [1.5, 2], ["x"], [])
]


@pytest.mark.parametrize(
    "content",
    [b"", b"\x02", bytes(8) + b"{}", b"x" * 99, *(len(h).to_bytes(8, "little") + h + bytes(9) for h in HEADERS)],
)
def test_a_damaged_file_has_one_too(folder: Path, content: bytes) -> None:
    (folder / "model.safetensors").write_bytes(content)
    assert len(print_of(folder)) == 64
