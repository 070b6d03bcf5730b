"""Quantised checkpoints: from the layouts of their files to canonical packed tensors, and what is done with those."""
