"""Fused kernels and the whole decoder layer as one step, for training on a GPU; each has a plain twin."""
