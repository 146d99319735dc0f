"""Measurements on a running block: statistics of its inputs, errors of its outputs, gradients."""
