"""Torch references of the contract: the specification in code, and the ground that plugins stand on."""
