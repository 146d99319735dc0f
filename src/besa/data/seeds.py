"""Seeds of random choices."""

from __future__ import annotations

from besa.errors import BesaError

LARGEST = 2**32 - 1


def check_seed(seed: int) -> None:
    """Check that generators accept a seed.

    Raises:
        BesaError: the seed is no whole number from 0 to 2³² − 1.
    """
    if not 0 <= seed <= LARGEST:
        raise BesaError(f"There is no seed {seed}: use a whole number from 0 to {LARGEST:,}.")
