"""Exact softmax attention by Pallas kernels, forward and backward."""
