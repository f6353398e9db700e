"""Runs that are killed at random moments, again and again, end in the bytes of a run that was left alone."""

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

import ssmcompress

KILLS = 4
TIMED = ("events.jsonl", "measured.json", "report.html")  # what tells how long something took
Work = Callable[[Path], object]


def pruned(models, text, out):
    ssmcompress.prune(models["mamba"], calib=text, windows=24, length=48, no_eval=True, out=out)


def cut(models, text, out):
    given = {"axis": "layer", "method": "shedder", "keep": 0.5, "windows": 24, "length": 48, "no_eval": True}
    ssmcompress.prune(models["mamba2"], calib=text, out=out, **given)


def streamed(models, text, out):
    given = {"calib": text, "windows": 24, "length": 48, "no_eval": True, "max_memory": "2GB"}
    ssmcompress.prune(models["mamba"], method="sparsegpt", out=out, **given)


def reduced(models, text, out):
    ssmcompress.reduce_tokens(models["mamba2"], flops=0.1, layers=(0,), no_eval=True, out=out)


def tuned(models, text, out):
    ssmcompress.tune_state(models["mamba2"], data=text, steps=12, every=2, length=32, lr=0.01, out=out)


def evaluated(models, text, out):
    ssmcompress.evaluate(models["mamba"], perplexity=text, recall=True, length=48, out=out)


def run(models, text, out):
    recipe = out.parent / f"{out.name}.yaml"
    recipe.parent.mkdir(exist_ok=True)
    steps = [
        {"step": "prune", "method": "wanda", "sparsity": 0.5},
        {"step": "tune-state", "data": text, "steps": 4, "every": 2, "length": 32, "lr": 0.01},
    ]
    told = {"model": models["mamba"], "calibrate": {"text": text, "windows": 16, "length": 32}, "steps": steps}
    recipe.write_text(yaml.safe_dump(told | {"eval": {"perplexity": text, "recall": False, "length": 48}}))
    ssmcompress.run(str(recipe), out=out)


def killed(work: Work, out: Path, after: float) -> bool:
    """Whether a process that does the work ended before it was killed, so many seconds after its start."""
    child = os.fork()
    if not child:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # which nothing can catch: the process is gone at once
        signal.setitimer(signal.ITIMER_REAL, after)
        try:
            work(out)
        finally:
            os._exit(0)
    return os.waitpid(child, 0)[1] == 0


def contents(folder: Path) -> dict[str, bytes]:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in TIMED)
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("verb", [pruned, cut, streamed, reduced, tuned, evaluated, run])
def test_it_goes_on_to_the_same_bytes(models, text, tmp_path, verb):
    def work(out: Path) -> None:
        verb(models, text, out)

    whole, out = (tmp_path / name / "out" for name in ("whole", "killed"))
    work(tmp_path / "imported" / "out")  # what is imported on the way takes longer than the work
    started = time.perf_counter()
    work(whole)
    took = time.perf_counter() - started
    draw, died = random.Random(verb.__name__), 0
    for share in (0.05, *(draw.uniform(0.05, 0.7) for _ in range(KILLS - 1))):
        if killed(work, out, share * took):
            break
        died += 1
    assert died
    if not out.exists() or verb is run:
        work(out)
    assert contents(out) == contents(whole)
    assert {path.name for path in out.parent.iterdir()} - {".out.lock", "out.yaml"} == {"out"}
