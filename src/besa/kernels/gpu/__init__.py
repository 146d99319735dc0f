"""Kernels for GPUs, in Triton.

The parameters of a kernel have no annotations besides `tl.constexpr`: Triton looks annotations up when it compiles, and
refuses names that are no constants.
"""
