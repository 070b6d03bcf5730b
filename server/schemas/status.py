"""What /info answers."""

from __future__ import annotations

import msgspec

from ...core.messages import Ready


class Info(msgspec.Struct, frozen=True, kw_only=True):
    """TGI's fields, then what the engine said when it was ready."""

    model_id: str
    model_sha: str | None
    model_pipeline_tag: str = "text-generation"
    max_concurrent_requests: int
    max_best_of: int = 1
    max_stop_sequences: int
    max_top_n_tokens: int
    max_input_tokens: int
    max_total_tokens: int
    validation_workers: int = 1
    max_client_batch_size: int
    router: str = "chipset"
    version: str
    sha: str | None = None
    docker_label: str | None = None
    engine: Ready
