"""/info and /metrics."""

from chipset.server.metrics import STATS

from .fakes import FakeEngine, LiveServer, live_server, stats


def samples(server: LiveServer) -> dict[str, float]:
    lines = server.get("/metrics").text.splitlines()
    return {
        name: float(value)
        for name, value in (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    }


def test_info_has_the_fields_of_tgi_and_what_the_engine_can_do(server: LiveServer) -> None:
    info = server.get("/info").json()
    assert info["model_id"] == "fake/model"
    assert info["model_sha"] == "0123abcd"
    assert info["max_concurrent_requests"] == 128
    assert info["max_input_tokens"] == 511
    assert info["max_total_tokens"] == 512
    assert info["max_client_batch_size"] == 4
    assert info["max_stop_sequences"] == 4
    assert info["max_best_of"] == 1
    assert info["engine"]["backend"] == "cpu"
    assert "logprobs" in info["engine"]["features"]
    assert {"validation_workers", "router", "version", "sha", "docker_label"} <= set(info)


def test_max_input_tokens_can_be_set_lower() -> None:
    with live_server(FakeEngine(), max_input_tokens=5) as server:
        assert server.get("/info").json()["max_input_tokens"] == 5
        assert server.post("/generate", {"inputs": "a" * 5}).status_code == 200
        assert server.post("/generate", {"inputs": "a" * 6}).status_code == 422


def test_requests_are_counted_by_their_end() -> None:
    engine = FakeEngine()
    with live_server(engine) as server:
        server.post("/generate", {"inputs": "a"})
        server.post("/generate", {"inputs": ""})
        server.post("/generate_stream", {"inputs": ""})
        server.post("/v1/completions", {"prompt": "a", "stop": "o"})
        got = samples(server)
    assert got["tgi_request_count"] == 4
    assert got["tgi_request_success"] == 2
    assert got['tgi_request_failure{err="validation"}'] == 2
    assert got["tgi_request_duration_count"] == 2
    assert got["tgi_request_generated_tokens_sum"] == 12 + 5
    assert got["tgi_request_input_length_sum"] == 2
    assert got["vllm:time_to_first_token_seconds_count"] == 2


def test_the_figures_of_the_engine_are_exported() -> None:
    engine = FakeEngine()
    engine.stats = stats(
        running=3, waiting=2, blocks_total=100, blocks_free=75, blocks_held=25, prompt_tokens=11
    )
    with live_server(engine) as server:
        got = samples(server)
    assert got["tgi_batch_current_size"] == 3
    assert got["tgi_queue_size"] == 2
    label = '{model_name="fake/model"}'
    assert got["vllm:num_requests_waiting" + label] == 2
    assert got["vllm:kv_cache_usage_perc" + label] == 0.25
    assert got["vllm:prompt_tokens_total" + label] == 11
    assert got["chipset_kv_blocks_held"] == 25


def test_no_two_figures_share_a_name() -> None:
    assert len({row.name for row in STATS}) == len(STATS)
