"""Model definitions, written against the contract only."""
