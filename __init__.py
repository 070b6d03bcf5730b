"""Serve language models on any accelerator."""

__version__ = "0.1.0"
