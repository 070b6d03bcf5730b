"""Layers of a model, written against the contract only."""
