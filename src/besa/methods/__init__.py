"""Pruning methods: a recipe, and the choices of its stages.

Each stage has a folder, and each choice a file in it; those of quantisation are in `besa.quantization`. Beside the
folders is what several stages share.
"""
