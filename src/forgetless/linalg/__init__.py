"""Tensors in, tensors out: second moments, subspaces and low-rank factors. Imports torch only."""
