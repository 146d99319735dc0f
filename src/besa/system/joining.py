"""Joining the ranks that torchrun has started: one process for each device, on one machine or several."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
from torch import distributed as dist

from besa.system import ranks

FOREVER = timedelta(days=100)  # no timeout of torch's own: some phases are long


def launched() -> bool:
    """Whether torchrun, or another launcher that sets its variables, has started several processes."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


@contextmanager
def joined() -> Iterator[None]:
    """While open, this process works with the others that were launched with it; alone if there are none."""
    if not launched():
        yield
        return
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if torch.cuda.is_available():
        torch.cuda.set_device(local)
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=FOREVER)
    try:
        with ranks.together(dist.get_rank(), dist.get_world_size(), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))):
            yield
    finally:
        dist.destroy_process_group()
