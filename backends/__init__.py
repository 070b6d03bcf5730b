"""The contract between the engine and an accelerator: start at plugin.py and backend.py."""
