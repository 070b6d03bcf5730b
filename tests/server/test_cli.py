"""The command line: what it imports, what it refuses, and what it ends with."""

import subprocess
import sys
from pathlib import Path

import pytest

from chipset import __version__
from chipset.server.cli import COMMANDS
from chipset.server.launch import engine_launch
from chipset.server.parser import CommandLine, UsageError, read_settings
from chipset.server.settings import ServerSettings, flags, size

from .fakes import FILES

HEAVY = ("torch", "transformers", "fastapi", "numpy", "huggingface_hub", "tokenizers")


def chipset(
    *arguments: str, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "chipset", *arguments],
        capture_output=True,
        text=True,
        env=environment,
        timeout=60,
    )


def settings(*arguments: str, **environment: str) -> ServerSettings:
    return read_settings(CommandLine().parse(arguments), environment)


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "from chipset.server.cli import main\n"
        "try:\n    main(['--help'])\n"
        "except SystemExit as end:\n    assert end.code == 0\n"
        f"print('loaded', *[name for name in {HEAVY!r} if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "loaded"
    listed = {line.split()[0] for line in done.stdout.splitlines() if line.startswith("    ")}
    assert set(COMMANDS) <= listed


def test_the_api_process_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys\n"
        "import chipset.server.serving, chipset.server.chat, chipset.server.cli\n"
        "from chipset.server.cli import _check_backend\n"
        "_check_backend('cpu')\n"
        "print([name for name in ('torch', 'transformers') if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        CommandLine().parse([command, "--help"])
    assert end.value.code == 0
    assert command in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["serve", "--prot", "1"], "unknown flag '--prot' (did you mean --port?)"),
        (["serve", "a", "b"], "unknown argument 'b'"),
        (["srve"], "no command 'srve' (did you mean serve?)"),
        ([], "COMMAND"),
        (["rm"], "NAME"),
        (["serve", "--port"], "--port"),
        (["serve", "--port", "x"], "--port: not 'x'; give a whole number from 0 to 65535"),
        (["serve", "--port", "65536"], "--port"),
        (["serve", "--dtype", "fp4"], "one of auto, float32, bfloat16, float16"),
        (["serve", "--kv-cache-memory", "lots"], "such as 512MiB or 2GiB"),
        (["serve", "--memory-utilisation", "1.5"], "above 0 and at most 1"),
        (["serve", "--memory-utilisation", "nan"], "above 0 and at most 1"),
        (["serve", "--shutdown-timeout", "inf"], "seconds"),
        (["serve", "a", "--model-id", "b"], "give one of them"),
        (["serve", "--api-key", ""], "a text that is not empty"),
        (["run", "a", "b", "--temperature", "nan"], "not 'nan'; give a number from 0 to 100"),
        (["run", "a", "b", "--max-new-tokens", "0"], "a whole number from 1"),
    ],
)
def test_a_wrong_word_is_one_line_with_the_cure(arguments: list[str], text: str) -> None:
    with pytest.raises(UsageError) as caught:
        settings(*arguments)
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["serve", "--port", "x"], 2, "--port"),
        (["serve", "--backend", "cpuu"], 2, "did you mean cpu?"),
        (["serve", "--backend", "cuda"], 11, "backend cuda"),
        (["rm", "no/such-model"], 3, "no/such-model"),
        (["pull", "/no/such/folder"], 3, "/no/such/folder"),
    ],
)
def test_errors_are_one_line_and_a_code_of_their_own(
    arguments: list[str], code: int, text: str
) -> None:
    done = chipset(*arguments)
    assert done.returncode == code
    [line] = done.stderr.splitlines()
    assert line.startswith("chipset: error: ")
    assert text in line


def test_debug_shows_the_traceback() -> None:
    done = chipset("rm", "no/such-model", "--debug")
    assert done.returncode == 3
    assert "Traceback" in done.stderr


def test_version_and_ls_answer_on_standard_output(tmp_path: Path) -> None:
    assert chipset("version").stdout == f"chipset {__version__}\n"
    empty = {"CHIPSET_CACHE": str(tmp_path), "HF_HOME": str(tmp_path), "PATH": ""}
    done = chipset("ls", environment=empty)
    assert (done.returncode, done.stdout) == (0, "")


def test_a_flag_goes_before_its_variable_and_that_before_the_default() -> None:
    assert settings("serve").port == 8080
    assert settings("serve", CHIPSET_PORT="1").port == 1
    assert settings("serve", "--port", "2", CHIPSET_PORT="1").port == 2
    assert settings("serve", CHIPSET_NO_PREFIX_CACHE="true").no_prefix_cache is True
    assert settings("serve", CHIPSET_NO_PREFIX_CACHE="0").no_prefix_cache is False
    with pytest.raises(UsageError, match="CHIPSET_PORT: not 'x'"):
        settings("serve", CHIPSET_PORT="x")


def test_aliases_name_the_same_setting() -> None:
    assert settings("serve", "--max-model-len", "99").max_total_tokens == 99
    assert settings("serve", "--hostname", "::1").host == "::1"
    assert settings("serve", "some/model").model == "some/model"
    assert settings("serve", "--model-id", "some/model").model == "some/model"


def test_settings_reach_the_engine() -> None:
    options = settings(
        "serve", "--dtype", "float32", "--max-total-tokens", "64", "--max-batch-size", "3",
        "--max-batch-prefill-tokens", "32", "--kv-cache-memory", "1GiB", "--block-size", "8",
        "--memory-utilisation", "0.5", "--kv-cache-dtype", "bfloat16",
    ).engine_options  # fmt: skip
    assert options.dtype == "float32"
    assert options.kv_dtype == "bfloat16"
    assert options.max_context == 64
    assert options.max_batch_rows == 3
    assert options.max_batch_tokens == 32
    assert options.kv_bytes == 2**30
    assert options.block_size == 8
    assert options.memory_utilisation == 0.5


def test_sizes_are_decimal_or_binary() -> None:
    texts = ("1048576", "512MiB", "2GiB", "1.5GB", "2g", "1k", "3 TiB")
    assert [size(text) for text in texts] == [
        1048576, 512 * 2**20, 2**31, 1_500_000_000, 2_000_000_000, 1000, 3 * 2**40,
    ]  # fmt: skip


def test_an_api_key_is_never_repeated() -> None:
    for name, flag in flags():
        if name == "api_key":
            assert flag.default is None
    with pytest.raises(UsageError) as caught:
        settings("serve", "--api-key", "s3cret", "--port", "x")
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "number", "sharded"),
    [
        ([], 1, False),
        (["--num-shard", "4"], 4, False),
        (["--tensor-parallel-size", "2"], 2, False),
        (["--sharded", "true"], 1, True),
        (["--sharded", "true", "--num-shard", "2"], 2, False),
        (["--sharded", "false"], 1, False),
        (["--sharded", "false", "--num-shard", "1"], 1, False),
    ],
)
def test_shards_are_told_to_the_engine(arguments: list[str], number: int, sharded: bool) -> None:
    launch = engine_launch(settings("serve", *arguments), FILES)
    assert (launch.options.parallel.tensor, launch.sharded) == (number, sharded)


@pytest.mark.parametrize(("sharded", "number"), [("true", "1"), ("false", "2")])
def test_shard_flags_that_disagree_are_refused(sharded: str, number: str) -> None:
    with pytest.raises(UsageError, match=f"--sharded {sharded} and --num-shard {number} disagree"):
        settings("serve", "--sharded", sharded, CHIPSET_NUM_SHARD=number)


def test_the_format_of_the_weights_is_told_to_the_engine() -> None:
    assert engine_launch(settings("run", "--quantize", "int8"), FILES).quantize == "int8"
