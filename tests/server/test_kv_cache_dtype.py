from __future__ import annotations

import pytest

from chipset.server.settings import build_settings


@pytest.mark.parametrize(
    ("given", "dtype"),
    [
        ("auto", "auto"),
        ("bfloat16", "bfloat16"),
        ("fp8_e4m3fn", "float8_e4m3fn"),
        ("fp8_e4m3", "float8_e4m3fn"),
        ("fp8_e5m2", "float8_e5m2"),
        ("float8_e5m2", "float8_e5m2"),
        ("int8", "int8"),
    ],
)
def test_the_flag_takes_the_names_of_tgi_and_of_torch(given: str, dtype: str) -> None:
    for settings in (
        build_settings({"kv_cache_dtype": given}, {}),
        build_settings({}, {"CHIPSET_KV_CACHE_DTYPE": given}),
    ):
        assert settings.engine_options.kv_dtype == dtype


def test_another_name_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(ValueError, match=r"^--kv-cache-dtype: not 'fp8'; give one of auto,.*int8$"):
        build_settings({"kv_cache_dtype": "fp8"}, {})
