"""Several ranks of one program, for tests: `started` runs a script by torchrun, which waits for all of them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def started(ranks: int, *arguments: str, seconds: float = 600, **environment: str) -> str:
    """What a program prints that torchrun starts so many times, to both of its streams.

    Args:
        ranks: processes.
        arguments: of torchrun, from the script or ``-m`` on.
        seconds: until it is stopped.
        environment: further variables.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    done = subprocess.run(
        [*command, *arguments],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=seconds,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout
