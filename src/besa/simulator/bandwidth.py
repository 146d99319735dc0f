"""What an accelerator reads and writes for a pruned weight, and how long that takes. Ours: Table 4 leaves it out.

- The denser engine's columns are stored whole, as it multiplies their zeros too and no index says where they are. Of
  the sparser engine's columns the non-zeros are stored, each with its row, and where every column begins (CSC).
- Outputs stay in the array until they are complete, and leave once. A tile of them, r rows × t tokens, must fit into
  the output buffer as accumulators.
- Tile follows tile, first down the rows, then to the next tokens: the whole weight is read ⌈T / t⌉ times, unless it
  stays in its buffers, and the inputs of t tokens ⌈R / r⌉ times, unless they stay in theirs.
- Of all tiles, the one with the least traffic is taken. Loading and computing overlap.
"""

from __future__ import annotations

import math

import torch

from besa.simulator.vitcod import Accelerator


def load_cycles(rows: int, columns: int, dense_columns: int, rest: int, tokens: int, accelerator: Accelerator) -> int:
    """Cycles that the memory interface is busy with a weight, its inputs and outputs.

    Args:
        rows: R of the weight.
        columns: C of the weight.
        dense_columns: columns of the denser engine.
        rest: non-zeros of the sparser engine.
        tokens: T input vectors.
        accelerator: what computes.
    """
    values = (rows * dense_columns + rest) * accelerator.weight_bits
    index = rest * (rows - 1).bit_length() + (columns - dense_columns) * rest.bit_length()
    moved = (
        _least_traffic(values, index, rows, columns, tokens, accelerator) + rows * tokens * accelerator.activation_bits
    )
    return math.ceil(moved / 8 * accelerator.clock_hz / accelerator.bandwidth)


def _least_traffic(values: int, index: int, rows: int, columns: int, tokens: int, accelerator: Accelerator) -> int:
    """Bits that are read with the best tile; one of a width is best as high as the output buffer allows.

    Args:
        values: bits of the weight's values.
        index: bits of their index.
        rows: R of the weight.
        columns: C of the weight.
        tokens: T input vectors.
        accelerator: what computes.
    """
    room = 8 * accelerator.output_buffer // accelerator.accumulator_bits
    width_T = torch.arange(1, min(tokens, room) + 1)
    height_T = (room // width_T).clamp(max=rows)
    weight_stays = values <= 8 * accelerator.weight_buffer and index <= 8 * accelerator.index_buffer
    inputs_stay_T = columns * accelerator.activation_bits * width_T <= 8 * accelerator.input_buffer
    weight_reads_T = 1 if weight_stays else -(-tokens // width_T)
    input_reads_T = torch.where(inputs_stay_T, 1, -(-rows // height_T))
    bits_T = (values + index) * weight_reads_T + columns * tokens * accelerator.activation_bits * input_reads_T
    return int(bits_T.min())
