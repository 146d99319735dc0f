"""What became of a pruned model's files: packed, with a head in 8 bits, or shrunk."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from besa.checkpoint.companions import CONFIG, read_config_json
from besa.storage.entry import besa_entry
from besa.storage.formats.container import header
from besa.storage.weights import WIDTHS


@dataclass(frozen=True)
class Form:
    """The form of a checkpoint.

    Attributes:
        packed: bitmasks and kept values.
        head: format of the head and embeddings if they are rounded, such as ``int8``.
        shrunk: channels, heads, blocks or experts that nothing reads are gone.
        by_block: of a shrunk model, each block has its own widths.
        dtype: of its weights; None if config.json does not say.
    """

    packed: bool = False
    head: str | None = None
    shrunk: bool = False
    by_block: bool = False
    dtype: str | None = None

    def steps(self, pruned: str, final: str, dtype: str | None) -> list[list[str]]:
        """The words of the commands that make this form of what `besa prune` wrote, in their order.

        Args:
            pruned: folder that `besa prune` wrote.
            final: folder of the form.
            dtype: of what `besa prune` wrote; None if nobody knows.
        """
        todo = [["shrink", *(["--by-block"] if self.by_block else [])]] if self.shrunk else []
        if self.packed or self.head:
            other = self.dtype if dtype is not None and self.dtype != dtype else None
            options = {"--head": self.head, "--dtype": other}
            todo.append(["pack", *(word for key, value in options.items() if value for word in (key, value))])
        if self.head and not self.packed:
            todo.append(["unpack"])
        names = [pruned, *(f"{pruned}-{i}" for i in range(1, len(todo))), final]
        return [[words[0], *names[i : i + 2], *words[1:]] for i, words in enumerate(todo)]

    def __str__(self) -> str:
        head = f"with head and embeddings in {self.head}" if self.head else ""
        parts = ("shrunk" if self.shrunk else "", "packed" if self.packed else "", head)
        return ", ".join(part for part in parts if part)


AS_PRUNED = Form()


def form_of(folder: Path) -> Form:
    """The form of the checkpoint in a folder; that of `besa prune` if there is none.

    Raises:
        BesaError: config.json is damaged, or of a format that only a later besa knows.
    """
    packed = header(folder) is not None
    if not (folder / CONFIG).is_file():
        return AS_PRUNED
    config = read_config_json(folder)
    about, widths = besa_entry(config), config.get("quantization_config")
    own_widths = isinstance(widths, dict) and widths.get("quant_method") == WIDTHS
    head, dtype = about.get("head"), config.get("dtype", config.get("torch_dtype"))
    return Form(
        packed=packed,
        head=head if isinstance(head, str) else None,
        shrunk="shrunk" in about,
        by_block=own_widths or about.get("shrunk") == {},
        dtype=dtype if isinstance(dtype, str) else None,
    )
