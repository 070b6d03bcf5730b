"""The engine: requests, KV blocks, scheduler, runner, models. Knows no device and no HTTP."""
