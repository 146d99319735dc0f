"""Calibrate on token sequences of your own: here one for each record of a JSON-lines file.

python examples/own_calibration.py RECORDS.jsonl [MODEL]

A plain text needs no program: `besa prune MODEL OUT --calibration FILE`. This is for sequences that you build yourself.
"""

import json
import sys
from pathlib import Path

import torch
from transformers import AutoTokenizer

import besa


def main(records: str, model: str = "HuggingFaceTB/SmolLM2-135M-Instruct", seqlen: int = 256) -> besa.Calibration:
    """Prune on records with the keys "question" and "answer"; returns what the model was calibrated on.

    Args:
        records: a JSON-lines file.
        model: Hugging Face id, or a folder.
        seqlen: tokens of a sequence; a record that is shorter is left out, a longer one is cut.
    """
    tokenizer = AutoTokenizer.from_pretrained(model)
    sequences = []
    with Path(records).open(encoding="utf-8") as lines:
        for line in lines:
            record = json.loads(line)
            ids = tokenizer(f"Question: {record['question']}\nAnswer: {record['answer']}")["input_ids"]
            if len(ids) >= seqlen:
                sequences.append(ids[:seqlen])

    # All sequences have one length: there is no padding that a statistic would have to leave out.
    calibration = besa.Calibration(torch.tensor(sequences), source=Path(records).name, seed=0)
    result = besa.compress(model, "wanda", calibration, out="pruned-on-records")

    print(f"{calibration.samples} sequences of {calibration.seqlen} tokens, sparsity {result.record.sparsity:.4f}")
    print(f"The run record names the data by its digest: {result.record.calibration['sha256'][:16]}…")
    return calibration


if __name__ == "__main__":
    main(*sys.argv[1:])
