"""Runs the smoke recipes on the reference checkpoints and compares what comes out with the baselines.

python -m evals.regress            a table for each run; exit code 5 where something got worse than its tolerance
python -m evals.regress --rebase   renews evals/baselines on purpose

A baseline holds what every item scored, so that runs are compared in pairs: what got worse fails where its own paired
interval, after Holm, excludes zero and the loss exceeds a tolerance. That is half the width of the paired interval of
what the recipe itself costs, which the items at hand can tell apart, but at most a tenth (ten points of an accuracy):
a loss beyond that is never let through because the items are few. Where they cannot exclude one, it says `undecided`.
"""

import argparse
import hashlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

import ssmcompress
from ssmcompress.assess import COMPRESSED, DENSE
from ssmcompress.checkpoint import manifest
from ssmcompress.evaluate.compare import Difference, Samples, differences
from ssmcompress.evaluate.comparison import Row
from ssmcompress.evaluate.results import read
from ssmcompress.events import Note, Table, Terminal, number

BASELINES = Path(__file__).parent / "baselines"
RECIPES = ("smoke/magnitude-50", "smoke/wanda-50", "smoke/sparsegpt-2-4")
MODELS = ("ref:mamba", "ref:mamba2")
COLUMNS = ("measure", "items", "baseline", "now", "change [adjusted interval]", "tolerance", "")
WIDEST = 0.1  # of all tolerances
FAILED = 5
Baseline = dict[str, Any]


def main() -> None:
    """Compares, or renews the baselines, and leaves with the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rebase", action="store_true")
    rebase = parser.parse_args().rebase
    worse = []
    with Terminal() as tell, tempfile.TemporaryDirectory() as work:
        for model in MODELS:
            for recipe in RECIPES:
                name = f"{model.removeprefix('ref:')}-{Path(recipe).name}"
                now = measured(model, recipe, Path(work) / name)
                path = BASELINES / f"{name}.json"
                if rebase:
                    path.write_text(json.dumps(now, indent=1) + "\n", encoding="utf-8")
                    tell(Note(f"{path.name}: renewed."))
                    continue
                rows, failed = judged(json.loads(path.read_text(encoding="utf-8")), now)
                tell(Table(name, COLUMNS, tuple(rows)))
                worse += [f"{name}: {each}" for each in failed]
        for each in worse:
            tell(Note(each, "warning"))
    sys.exit(FAILED if worse else 0)


def measured(model: str, recipe: str, out: Path) -> Baseline:
    """Runs a recipe and gathers what a baseline holds."""
    ssmcompress.run(recipe, [f"model={model}"], out=out)
    dense, compressed = (read(out / manifest.EVALUATION / name) for name in (DENSE, COMPRESSED))
    made = manifest.read(out)
    cost = differences(list(dense.samples.values()), list(compressed.samples.values()))
    tolerances = {each.measure: _tolerance(each) for each in cost}
    return {
        "model": model,
        "recipe": recipe,
        "provenance": {
            "recipe_sha256": made.recipe_sha256,
            "versions": made.versions,
            "source": made.source.sha256,
            "backend": made.backend,
        },
        "exact": {"params": compressed.summary.params, "sparsity": round(made.sparsity, 6)},
        "measures": {name: _measure(each, tolerances[name]) for name, each in compressed.samples.items()},
    }


def judged(baseline: Baseline, now: Baseline) -> tuple[list[tuple[str, ...]], list[str]]:
    """A row for each measure, and a sentence for each that got worse or cannot be compared."""
    failed = [
        f"{name} was {value}, is {now['exact'][name]}"
        for name, value in baseline["exact"].items()
        if now["exact"][name] != value
    ]
    old, new = baseline["measures"], now["measures"]
    failed += [f"{name} is measured no more" for name in old if name not in new]
    names = [name for name in old if name in new and old[name]["items_sha256"] == new[name]["items_sha256"]]
    failed += [f"{name} has other items than the baseline" for name in old if name in new and name not in names]
    pairs = [_samples(name, measures[name]) for measures in (old, new) for name in names]
    rows = []
    for found in differences(pairs[: len(names)], pairs[len(names) :]):
        tolerance = old[found.measure]["tolerance"]
        row = Row.of(found, tolerance)
        low, high = found.adjusted or (found.change, found.change)
        change = f"{found.change:+.4f} [{low:+.4f}, {high:+.4f}]"
        told = (found.measure, str(found.items), number(found.a), number(found.b), change, f"{tolerance:.4f}")
        rows.append((*told, row.gate or ""))
        if row.gate == "fails":
            failed.append(f"{found.measure} lost {found.loss:.4f}, more than {tolerance:.4f}")
    return rows, failed


def _tolerance(cost: Difference) -> float:
    """What may be lost of a measure, from what the recipe costs; one item at least, where answers are counted."""
    low, high = cost.interval or (-WIDEST, WIDEST)
    one = 1 / cost.items if cost.kind != "log_likelihood" else 0.0
    return min(max((high - low) / 2, one), WIDEST)


def _measure(samples: Samples, tolerance: float) -> dict[str, Any]:
    return {
        "kind": samples.kind,
        "figure": samples.figure,
        "tolerance": tolerance,
        "chance": samples.chance,
        "items_sha256": hashlib.sha256("".join(samples.items).encode()).hexdigest(),
        "values": [round(value, 6) for value in samples.values.tolist()],
        "weights": sorted(set(samples.weights.tolist()))
        if len(set(samples.weights)) == 1
        else samples.weights.tolist(),
    }


def _samples(name: str, kept: dict[str, Any]) -> Samples:
    values = np.array(kept["values"], float)
    weights = np.broadcast_to(np.array(kept["weights"], float), values.shape)
    return Samples(name, kept["kind"], tuple(map(str, range(len(values)))), values, weights, kept["chance"])


if __name__ == "__main__":
    main()
