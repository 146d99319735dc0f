"""What structures that go whole are called, and what stays of them in words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from besa.models.couplings import CALLED

WHOLE: Mapping[str, str] = {**CALLED, "blocks": "blocks", "attention": "attention layers", "mlp": "MLP layers"}


def stay(blocks: Mapping[int, Mapping[str, tuple[int, int]]]) -> Iterator[str]:
    """What stays of the structures of a model, one phrase for each kind.

    Args:
        blocks: how many a block had and how many stay, by kind, by its number.
    """
    for kind, called in WHOLE.items():
        counts = {index: of_block[kind] for index, of_block in blocks.items() if kind in of_block}
        if not counts:
            continue
        before, after = zip(*counts.values(), strict=True)
        if max(before) == 1:
            gone = [str(index) for index, (_, number) in counts.items() if not number]
            where = f"{'' if called == 'blocks' else 'of '}block{'s' if len(gone) > 1 else ''}"
            going = f" (gone: {where} {', '.join(gone)})" if gone else ""
            yield f"{sum(after):,} of {sum(before):,} {called} stay{going}"
        else:
            yield f"{_range(after)} of {_range(before)} {called} stay in each block"


def _range(numbers: tuple[int, ...]) -> str:
    least, most = min(numbers), max(numbers)
    return f"{least:,}" if least == most else f"{least:,} to {most:,}"
