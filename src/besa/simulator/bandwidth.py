"""Memory traffic of an accelerator for a pruned weight, and its cycles. Table 4 of the paper leaves it out.

- The columns of the denser engine are stored whole, because it multiplies their zeros too. For the columns of the
  sparser engine, the non-zeros are stored, each with its row, and the beginning of every column (CSC).
- Outputs stay in the array until they are complete and are written once. A tile of outputs, r rows × t tokens, must fit
  into the output buffer as accumulators.
- Tiles are computed first down the rows, then for the next tokens. The whole weight is read ⌈T / t⌉ times, unless it
  stays in its buffers. The inputs of t tokens are read ⌈R / r⌉ times, unless they stay in theirs.
- The tile with the least traffic is used. Loading and computing overlap.
"""

from __future__ import annotations

import math

import torch

from besa.simulator.vitcod import Accelerator


def load_cycles(rows: int, columns: int, dense_columns: int, rest: int, tokens: int, accelerator: Accelerator) -> int:
    """Cycles in which the memory interface is busy with a weight, its inputs and its outputs.

    Args:
        rows: R of the weight.
        columns: C of the weight.
        dense_columns: columns of the denser engine.
        rest: non-zeros of the sparser engine.
        tokens: T input vectors.
        accelerator: its settings.
    """
    values = (rows * dense_columns + rest) * accelerator.weight_bits
    index = rest * (rows - 1).bit_length() + (columns - dense_columns) * rest.bit_length()
    moved = (
        _least_traffic(values, index, rows, columns, tokens, accelerator) + rows * tokens * accelerator.activation_bits
    )
    return math.ceil(moved / 8 * accelerator.clock_hz / accelerator.bandwidth)


def _least_traffic(values: int, index: int, rows: int, columns: int, tokens: int, accelerator: Accelerator) -> int:
    """Bits read with the best tile. For each width, a tile as high as the output buffer allows is best.

    Args:
        values: bits of the weight's values.
        index: bits of their index.
        rows: R of the weight.
        columns: C of the weight.
        tokens: T input vectors.
        accelerator: its settings.
    """
    accumulators = 8 * accelerator.output_buffer // accelerator.accumulator_bits
    width_T = torch.arange(1, min(tokens, accumulators) + 1, dtype=torch.float64)  # int64 would overflow
    height_T = (accumulators / width_T).floor().clamp(max=rows)
    weight_stays = values <= 8 * accelerator.weight_buffer and index <= 8 * accelerator.index_buffer
    inputs_stay_T = columns * accelerator.activation_bits * width_T <= 8 * accelerator.input_buffer
    weight_reads_T = torch.ones_like(width_T) if weight_stays else (tokens / width_T).ceil()
    input_reads_T = torch.where(inputs_stay_T, 1, (rows / height_T).ceil())
    of_inputs = float(columns * tokens * accelerator.activation_bits)
    return int((float(values + index) * weight_reads_T + of_inputs * input_reads_T).min())
