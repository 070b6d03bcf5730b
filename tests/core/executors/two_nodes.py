"""What rank 0 of test_torchrun.py runs: python two_nodes.py FOLDER. Prints ids and what else it saw as JSON."""

import json
import sys
from pathlib import Path

import psutil

from chipset.backends.options import EngineOptions
from chipset.core.conformance.checkpoint import FULL, make_checkpoint
from chipset.core.conformance.traffic import random_traffic, serve
from chipset.core.errors import WorkerDied
from chipset.core.messages import EngineLaunch
from chipset.core.startup import start_engine

ARRIVALS = random_traffic(10, vocab_size=300, max_prompt=40, max_new=12, seed=3)
OPTIONS = EngineOptions(dtype="float32", max_context=128, kv_bytes=2**20)


def launch(folder: Path) -> EngineLaunch:
    return EngineLaunch(
        commands="", events="", files=make_checkpoint(FULL, folder), backend="cpu", options=OPTIONS
    )


def ids(folder: Path) -> dict[str, list[int]]:
    """Of an engine that is lost, and told so, then of the one after it."""
    for is_last in (False, True):
        engine = start_engine(launch(folder), lambda *_: None)
        ranks = len(engine.ready.rank_weight_bytes)
        if is_last:
            break
        for child in psutil.Process().children():
            child.kill()
        try:
            serve(engine, ARRIVALS)
        except WorkerDied as error:
            lost = str(error)
        engine.close()
    answers = serve(engine, ARRIVALS)
    engine.close()
    return {"ids": [answers[n].ids for n in sorted(answers)], "ranks": ranks, "lost": lost}


if __name__ == "__main__":
    print(json.dumps(ids(Path(sys.argv[1]))), flush=True)
