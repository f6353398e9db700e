"""What the methods of `tune-state` are worth beside one another, in equal steps.

python -m evals.tuning --data DIR [e2e|dart|sst2] [mamba|mamba2]   an hour or two on one core; it goes on where it was
python -m evals.tuning                                             writes the tables from what is kept

DIR holds e2e-nlg/, dart/ and glue/SST-2/. Learning rates, four times apart, are chosen on validation examples (128
that are drawn once) with one seed, up or down as long as it gets better; the test set (its first prompts) is looked at
once, with the best rate and three seeds. DART's dev split learns from four fifths of its triple sets and validates on
the rest.
"""

import argparse
import json
import resource
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from math import inf
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch

import ssmcompress
from ssmcompress.arch.tunable import TUNABLE
from ssmcompress.errors import InputError
from ssmcompress.events import Emit, Note, Terminal
from ssmcompress.measure.perplexity import DocumentScore, paired_difference
from ssmcompress.tune_state import LORA_LR

KEPT = Path(__file__).parent / "results"
STEPS, EVERY, SEEDS, VALIDATE = 100, 25, (0, 1, 2), 128
APART, MOST = 4.0, 5  # of one learning rate to the next, and how many of these steps away from the usual one at most
MODELS = ("mamba", "mamba2")
METHODS: dict[str, dict[str, Any]] = {
    "state-offset": {"method": "state-offset"},
    "output-offset": {"method": "output-offset"},
    "lora, rank 8": {"method": "lora", "rank": 8},
    "bitfit": {"method": "bitfit"},
    "prefix": {"method": "prefix"},
    "initial-state": {"method": "initial-state"},
    "full": {"method": "full"},
    "state-offset, low-rank 1": {"method": "state-offset", "form": "low-rank"},
    "state-offset, per-head": {"method": "state-offset", "form": "per-head"},
    "sdt": {"method": "sdt"},
}
ALL, BASE = tuple(METHODS), "state-offset"
MAIN = ALL[:7]
ALONE = {"state-offset, per-head": "mamba2", "sdt": "mamba"}  # methods of one family


@dataclass(frozen=True)
class Case:
    """A task: which methods it compares, how many prompts of its test count, and its files below the data folder."""

    methods: tuple[str, ...]
    prompts: int
    files: Callable[[Path, Path], dict[str, Path]]


def _e2e(data: Path, scratch: Path) -> dict[str, Path]:
    head, *rows = (data / "e2e-nlg/devset.csv").read_text(encoding="utf-8").splitlines(keepends=True)
    drawn = sorted(np.random.default_rng(0).permutation(len(rows))[:VALIDATE])
    (scratch / "valid.csv").write_text(head + "".join(rows[i] for i in drawn), encoding="utf-8")
    files = {"data": "trainset.csv", "test": "testset_w_refs.csv"}
    return {name: data / "e2e-nlg" / file for name, file in files.items()} | {"valid": scratch / "valid.csv"}


def _dart(data: Path, scratch: Path) -> dict[str, Path]:
    """Its dev split by triple sets, drawn once."""
    rows = json.loads((data / "dart/webnlg_and_human_ann_dev.json").read_text(encoding="utf-8"))
    keys = [json.dumps(row["tripleset"]) for row in rows]
    unique = sorted(set(keys))
    apart = set(np.random.default_rng(0).permutation(unique)[: len(unique) // 5].tolist())
    sides = {"data": False, "valid": True}
    for name, side in sides.items():
        chosen = [row for key, row in zip(keys, rows, strict=True) if (key in apart) == side]
        chosen = chosen[:VALIDATE] if side else chosen
        (scratch / f"{name}.json").write_text(json.dumps(chosen), encoding="utf-8")
    return {name: scratch / f"{name}.json" for name in sides} | {"test": data / "dart/webnlg_and_human_ann_test.json"}


def _sst2(data: Path, scratch: Path) -> dict[str, Path]:
    """Its dev split is the test; a twentieth of what is learned from validates."""
    return {"data": data / "glue/SST-2/train.tsv", "test": data / "glue/SST-2/dev.tsv"}


CASES = {"e2e": Case(ALL, 100, _e2e), "dart": Case(MAIN, 100, _dart), "sst2": Case(MAIN, 10_000, _sst2)}


def main() -> None:
    """Measures what is not measured yet where asked to, and writes the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("chosen", nargs="*", choices=[*CASES, *MODELS, []])
    parser.add_argument("--data", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with Terminal() as tell:
        for task in [each for each in CASES if each in options.chosen] or CASES:
            for model in [each for each in MODELS if each in options.chosen] or MODELS:
                path = KEPT / f"tuning-{task}-{model}.json"
                found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
                if options.data:
                    for name in methods(task, model):
                        measure(task, model, name, options.data, found, path, tell)
                if found:
                    path.with_suffix(".md").write_text(table(task, model, found), encoding="utf-8")


def methods(task: str, model: str) -> Iterator[str]:
    """The methods that the model has."""
    return (name for name in CASES[task].methods if ALONE.get(name, model) == model)


def measure(task: str, model: str, name: str, data: Path, found: dict[str, Any], path: Path, tell: Emit) -> None:
    """A learning rate by the validation examples, then the test with it; what is there is not measured again."""
    each = found.setdefault(name, {"validation": {}, "test": {}})
    method = METHODS[name]
    usual = TUNABLE[method["method"]].usual if method["method"] in TUNABLE else LORA_LR

    def bits(power: int) -> float:
        rate = f"{usual * APART**power:g}"
        if rate not in each["validation"]:
            made = tuned(task, model, method, data, lr=float(rate))
            each["validation"][rate] = made["after"]["bits_per_byte"] if made else None
            keep(path, found)
            tell(Note(f"{task}, {model}, {name}, {rate}: {each['validation'][rate]}"))
        return each["validation"][rate] or inf

    best = f"{usual * APART ** climbed(bits):g}"
    for seed in SEEDS:
        if each["test"].get(str(seed), {}).get("lr") != best:
            made = run(task, model, method, data, lr=float(best), seed=seed, tested=True)
            each["test"][str(seed)] = made | {"lr": best}
            keep(path, found)
            tell(Note(f"{task}, {model}, {name}, seed {seed}: {made['after']['bits_per_byte']:.4f}"))


def climbed(bits: Callable[[int], float]) -> int:
    """The power with the fewest bits, from 0 on upwards as long as it gets better, else downwards."""
    best = 0
    for way in (1, -1):
        while abs(best + way) <= MOST and bits(best + way) < bits(best):
            best += way
        if best:
            break
    return best


def run(*arguments: Any, **options: Any) -> dict[str, Any]:
    """The figures of one run, in a process of its own, whose memory is its own too."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as alone:
        return alone.submit(tuned, *arguments, **options).result()


def tuned(
    task: str, model: str, method: dict[str, Any], data: Path, *, tested: bool = False, **options: Any
) -> dict[str, Any]:
    """The figures of one run, of its validation examples unless it is tested; none where its loss is no number."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        scratch, out = Path(folder), Path(folder) / "adapter"
        files = {name: str(file) for name, file in CASES[task].files(data, scratch).items()}
        if tested:
            options["limit"] = CASES[task].prompts
        else:
            del files["test"]
        try:
            found = ssmcompress.tune_state(
                f"ref:{model}", task=task, steps=STEPS, every=EVERY, out=out, **files, **method, **options
            )
        except InputError:
            return {}
        made = json.loads((out / "measured.json").read_text(encoding="utf-8"))
    documents = made["after"]["documents"]
    return {
        "before": {"bits_per_byte": made["before"]["bits_per_byte"]},
        "after": {"bits_per_byte": made["after"]["bits_per_byte"]},
        "nats": [round(each["nats"], 4) for each in documents],
        "bytes": [each["bytes"] for each in documents],
        "figures": made["figures"],
        "seconds": made["seconds_per_step"],
        "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "trainable": found.tuning.trainable,
    }


def keep(path: Path, found: dict[str, Any]) -> None:
    """Writes what is measured so far, a line a method."""
    lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(each)}" for key, each in found.items())
    path.write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")


def table(task: str, model: str, found: dict[str, Any]) -> str:
    """Markdown: the mean of the seeds and how far they lie apart; 95 % intervals over the prompts."""
    tested = {name: list(each["test"].values()) for name, each in found.items() if each["test"]}
    first = next(iter(tested.values()), [])
    figures = [each["name"] for each in first[0]["figures"]] if first else []
    columns = ("", "parameters", "lr", "bits per byte", f"against {BASE}", *figures, "s a step", "memory")
    rows = [columns, ("---",) * len(columns), *(row(name, runs, tested.get(BASE)) for name, runs in tested.items())]
    return f"### {task}, ref:{model}\n\n" + "\n".join("| " + " | ".join(cells) + " |" for cells in rows) + "\n"


def row(name: str, runs: list[dict[str, Any]], base: list[dict[str, Any]] | None) -> tuple[str, ...]:
    """Cells of one method."""
    bits = [run["after"]["bits_per_byte"] for run in runs]
    spread = f"{np.mean(bits):.4f} ({min(bits):.4f}–{max(bits):.4f})"
    apart = ""
    if base not in (None, runs):
        apart = "{:+.4f} [{:+.4f}, {:+.4f}]".format(*paired_difference(_scores(base), _scores(runs)))
    figures = (
        "{:.1f} [{:.1f}, {:.1f}]".format(*np.mean([[each["value"], each["low"], each["high"]] for each in same], 0))
        for same in zip(*(run["figures"] for run in runs), strict=True)
    )
    seconds = f"{np.median([run['seconds'] for run in runs]):.2f}"
    return (name, f"{runs[0]['trainable']:,}", runs[0]["lr"], spread, apart, *figures, seconds, _memory(runs))


def _scores(runs: list[dict[str, Any]]) -> list[DocumentScore]:
    """The examples in turn, each as likely as its seeds make it on the whole."""
    nats = np.mean([run["nats"] for run in runs], 0).tolist()
    return [
        DocumentScore(each, 1, size, str(i)) for i, (each, size) in enumerate(zip(nats, runs[0]["bytes"], strict=True))
    ]


def _memory(runs: list[dict[str, Any]]) -> str:
    return f"{max(run['memory'] for run in runs) / 2**20:,.0f} MiB"


if __name__ == "__main__":
    main()
