"""The dtype of the KV cache from the options to the device."""

from __future__ import annotations

import pytest

from chipset.backends.errors import Incompatible
from chipset.backends.options import EngineOptions
from chipset.core.conformance.checkpoint import WINDOWED, make_checkpoint
from chipset.core.conformance.traffic import Arrival, make_submit, serve
from chipset.core.engine import Engine
from chipset.core.files import ModelFiles
from chipset.core.messages import EngineLaunch
from chipset.core.startup import start_engine

KV_DTYPES = ("bfloat16", "float8_e4m3fn", "float8_e5m2", "int8")
PROMPTS = [list(range(3 + n, 40 + 3 * n)) for n in range(3)]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    return make_checkpoint(WINDOWED, tmp_path_factory.mktemp("model"))


def start(files: ModelFiles, backend: str, kv_dtype: str) -> Engine:
    options = EngineOptions(
        dtype="float32", kv_dtype=kv_dtype, kv_bytes=2**20, max_context=128, max_batch_rows=256
    )
    launch = EngineLaunch(commands="", events="", files=files, backend=backend, options=options)
    return start_engine(launch, lambda *_: None)


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_an_engine_serves_with_a_cache_of_any_dtype(files: ModelFiles, kv_dtype: str) -> None:
    engine = start(files, "cpu", kv_dtype)
    try:
        assert engine.ready.kv_dtype == kv_dtype
        assert {group.dtype for group in engine.runner.launch.model.groups} == {kv_dtype}
        answers = serve(
            engine, [Arrival(submit=make_submit(n, p, 8)) for n, p in enumerate(PROMPTS)]
        )
        assert [len(answer.ids) for answer in answers.values()] == [8, 8, 8]
        assert not any(answer.error for answer in answers.values())
    finally:
        engine.close()


def test_a_backend_without_it_says_what_it_serves_and_which_flag_to_mend(
    files: ModelFiles,
) -> None:
    with pytest.raises(Incompatible, match=r"--kv-cache-dtype\) int8: .* serves auto, bfloat16"):
        start(files, "sim-tpu", "int8")
