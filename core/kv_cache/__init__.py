"""KV blocks: who holds which, and which hold what."""
