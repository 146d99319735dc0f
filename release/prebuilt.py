"""Check, where a wheel with compiled kernels is installed, that all of them come from it and give what torch gives."""

from __future__ import annotations

import warnings

import torch

from besa.kernels import build, masked, native, reference


def main() -> None:
    """Load all libraries without a compiler, and call one."""
    build.compiler = lambda: None
    warnings.simplefilter("error")
    sources = sorted(build.HERE.glob("*.cpp"))
    for source in sources:
        assert build.load(source.name) is not None, f"{source.name} is not in the wheel"
    w_OI = torch.randn(8, 64)
    ranks_OI, counts_O = w_OI.abs().argsort().argsort().to(torch.int16), torch.arange(8)
    ours_OI, theirs_OI = torch.empty(8, 64), torch.empty(8, 64)
    masked(w_OI, ranks_OI, counts_O, ours_OI)
    reference.masked(w_OI, ranks_OI, counts_O, theirs_OI)
    assert torch.equal(ours_OI, theirs_OI)
    print(f"{len(sources)} libraries; instruction sets: {', '.join(native.paths())}")


if __name__ == "__main__":
    main()
