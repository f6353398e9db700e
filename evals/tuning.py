"""What the methods of `tune-state` are worth beside one another: E2E on both reference checkpoints, in equal steps.

python -m evals.tuning --data DIR [mamba|mamba2]   hours on one core: it goes on where it was, in evals/results/tuning-*
python -m evals.tuning                             writes the tables from what is kept

DIR holds e2e-nlg/. Learning rates are chosen on the validation set, with one seed; the test set (its first 200 prompts)
is looked at once, with the best rate and three seeds.
"""

import argparse
import json
import resource
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch

import ssmcompress
from ssmcompress.arch.tunable import TUNABLE
from ssmcompress.errors import InputError
from ssmcompress.events import Emit, Note, Terminal
from ssmcompress.tune_state import LORA_LR

KEPT = Path(__file__).parent / "results"
STEPS, EVERY, PROMPTS, SEEDS = 300, 60, 200, (0, 1, 2)
FACTORS = (0.25, 1.0, 4.0, 16.0, 64.0)  # of the usual learning rate
METHODS: dict[str, dict[str, Any]] = {
    "state-offset": {"method": "state-offset"},
    "state-offset, low-rank 1": {"method": "state-offset", "form": "low-rank"},
    "state-offset, per-head": {"method": "state-offset", "form": "per-head"},
    "output-offset": {"method": "output-offset"},
    "initial-state": {"method": "initial-state"},
    "bitfit": {"method": "bitfit"},
    "lora, rank 2": {"method": "lora", "rank": 2},
    "lora, rank 8": {"method": "lora", "rank": 8},
    "full": {"method": "full"},
}
COLUMNS = ("", "parameters", "lr", "bits per byte", "BLEU", "chrF", "ROUGE-L", "s a step", "memory")


def main() -> None:
    """Measures what is not measured yet where asked to, and writes the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=["mamba", "mamba2"])
    parser.add_argument("--data", type=Path)
    options = parser.parse_args()
    with Terminal() as tell:
        for model in options.models:
            path = KEPT / f"tuning-{model}.json"
            found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
            if options.data:
                for name, method in cases(model):
                    measure(model, name, method, options.data / "e2e-nlg", found, path, tell)
            (KEPT / f"tuning-{model}.md").write_text(table(model, found), encoding="utf-8")


def cases(model: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The methods that the model has."""
    return ((name, method) for name, method in METHODS.items() if model != "mamba" or method.get("form") != "per-head")


def measure(
    model: str, name: str, method: dict[str, Any], data: Path, found: dict[str, Any], path: Path, tell: Emit
) -> None:
    """A learning rate by the validation set, then the test with it; what is there already is not measured again."""
    each = found.setdefault(name, {"validation": {}, "test": {}})
    usual = LORA_LR if method["method"] == "lora" else TUNABLE[method["method"]].usual
    for factor in FACTORS:
        rate = f"{usual * factor:g}"
        if rate not in each["validation"]:
            made = run(model, method, data, lr=float(rate))
            each["validation"][rate] = made["after"]["bits_per_byte"] if made else None
            keep(path, found)
            tell(Note(f"{model}, {name}, {rate}: {each['validation'][rate]}"))
    best = min((bits, rate) for rate, bits in each["validation"].items() if bits is not None)[1]
    for seed in SEEDS:
        if str(seed) not in each["test"]:
            test = {"test": str(data / "testset_w_refs.csv"), "limit": PROMPTS}
            made = run(model, method, data, lr=float(best), seed=seed, **test)
            each["test"][str(seed)] = made | {"lr": best}
            keep(path, found)
            tell(Note(f"{model}, {name}, seed {seed}: {made['after']['bits_per_byte']:.4f}"))


def run(*arguments: Any, **options: Any) -> dict[str, Any]:
    """The figures of one run, in a process of its own, whose memory is its own too."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as alone:
        return alone.submit(tuned, *arguments, **options).result()


def tuned(model: str, method: dict[str, Any], data: Path, **options: Any) -> dict[str, Any]:
    """The figures of one run; none where its loss is no number."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        out, sides = Path(folder) / "adapter", {"data": "trainset.csv", "valid": "devset.csv"}
        files = {name: str(data / file) for name, file in sides.items()}
        try:
            found = ssmcompress.tune_state(
                f"ref:{model}", task="e2e", steps=STEPS, every=EVERY, out=out, **files, **method, **options
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


def table(model: str, found: dict[str, Any]) -> str:
    """Markdown: the mean of the seeds, and how far they lie apart."""
    rows = [COLUMNS, ("---",) * len(COLUMNS)]
    rows += [row(name, list(each["test"].values())) for name, each in found.items() if each["test"]]
    return f"### ref:{model}\n\n" + "\n".join("| " + " | ".join(cells) + " |" for cells in rows) + "\n"


def row(name: str, runs: list[dict[str, Any]]) -> tuple[str, ...]:
    """Cells of one method."""
    figures = {each["name"]: [run["figures"][i]["value"] for run in runs] for i, each in enumerate(runs[0]["figures"])}
    bits = [run["after"]["bits_per_byte"] for run in runs]
    metrics = (_spread(values, 1) for values in figures.values())
    seconds = f"{np.median([run['seconds'] for run in runs]):.2f}"
    return (name, f"{runs[0]['trainable']:,}", runs[0]["lr"], _spread(bits, 4), *metrics, seconds, _memory(runs))


def _spread(values: list[float], digits: int) -> str:
    return f"{np.mean(values):.{digits}f} ({min(values):.{digits}f}–{max(values):.{digits}f})"


def _memory(runs: list[dict[str, Any]]) -> str:
    return f"{max(run['memory'] for run in runs) / 2**20:,.0f} MiB"


if __name__ == "__main__":
    main()
