"""What adapters give back of what pruning took: WANDA, states and heads, each repaired by state-offset, LoRA and both.

python -m evals.repair [mamba|mamba2]   hours on one core; it goes on where it was, in evals/results/repair-*
python -m evals.repair --tables         writes the tables from what is kept

The dense model teaches, on the shipped calibration text. Learning rates are those that are best on the part of it that
is held out, with one seed and fewer steps; the pages and the probes of memory are looked at once, with these.
"""

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ssmcompress
from evals.tuning import APART, climbed
from ssmcompress.arch.tunable import TUNABLE
from ssmcompress.errors import InputError
from ssmcompress.evaluate.results import documents
from ssmcompress.events import Emit, Note, Terminal
from ssmcompress.measure.perplexity import DocumentScore, paired_difference
from ssmcompress.tune_state import LORA_LR

KEPT = Path(__file__).parent / "results"
MODELS = ("mamba", "mamba2")
STEPS, PROBE = 150, 40
LEARNING: dict[str, Any] = {"objective": "distill", "length": 256, "batch_size": 8}
METHODS: dict[str, dict[str, Any]] = {"state-offset": {"method": "state-offset"}, "LoRA": {"method": "lora", "rank": 8}}
BOTH = "both"
PRUNED: dict[str, dict[str, Any]] = {
    "WANDA 60 %": {"method": "wanda", "sparsity": 0.6},
    "half of the states": {"axis": "state", "keep": 0.5},
    "three quarters of the heads": {"axis": "head", "keep": 0.75},
}
COLUMNS = ("", "parameters", "bits per byte", "against dense", "against pruned", "copy 20", "8 pairs")


def main() -> None:
    """Measures what is not measured yet, and writes the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=MODELS)
    parser.add_argument("--tables", action="store_true")
    options = parser.parse_args()
    with Terminal() as tell:
        for model in options.models:
            path = KEPT / f"repair-{model}.json"
            found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
            if not options.tables:
                measure(model, found, path, tell)
            if found:
                path.with_suffix(".md").write_text(table(model, found), encoding="utf-8")


def measure(model: str, found: dict[str, Any], path: Path, tell: Emit) -> None:
    """Dense, then every way of pruning and what repairs it."""

    def keep(name: str, value: dict[str, Any]) -> None:
        found[name] = value
        lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(each)}" for key, each in found.items())
        path.write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")
        tell(Note(f"{model}, {name}: {value.get('bits_per_byte', value)}"))

    if "dense" not in found:
        keep("dense", evaluated(f"ref:{model}"))
    for way, step in PRUNED.items():
        if step.get("axis") == "head" and model == "mamba":
            continue
        if all(name in found for name in (way, *(f"{way}, {each}" for each in (*METHODS, BOTH)))):
            continue
        with tempfile.TemporaryDirectory() as work:
            pruned = Path(work) / "pruned"
            ssmcompress.prune(f"ref:{model}", out=pruned, no_eval=True, **step)
            if way not in found:
                keep(way, evaluated(str(pruned)))
            repair(model, way, pruned, found, keep)


def repair(
    model: str, way: str, pruned: Path, found: dict[str, Any], keep: Callable[[str, dict[str, Any]], None]
) -> None:
    """What each method, and both one on the other, make of a pruned model."""
    rates = found.get("rates", {})
    if rates.keys() != METHODS.keys():
        rates = {name: climb(model, pruned, method) for name, method in METHODS.items()}
        keep("rates", rates)
    made: dict[str, Path] = {}
    for name, method in METHODS.items():
        made[name] = learned(model, pruned, pruned.parent / name, (), lr=rates[name], **method)
        if f"{way}, {name}" not in found:
            keep(f"{way}, {name}", evaluated(str(pruned), [made[name]]))
    if f"{way}, {BOTH}" not in found:
        first, second = METHODS
        below = (made[second],)
        top = learned(model, pruned, pruned.parent / BOTH, below, lr=rates[first], **METHODS[first])
        keep(f"{way}, {BOTH}", evaluated(str(pruned), [*below, top]))


def climb(model: str, pruned: Path, method: dict[str, Any]) -> float:
    """The learning rate after which the text that is held out is likeliest."""
    usual = LORA_LR if method["method"] == "lora" else TUNABLE[method["method"]].usual
    seen: dict[int, float] = {}

    def bits(power: int) -> float:
        if power not in seen:
            out = pruned.parent / f"probe {method['method']} {power}"
            try:
                learned(model, pruned, out, (), lr=usual * APART**power, steps=PROBE, **method)
                seen[power] = json.loads((out / "measured.json").read_text(encoding="utf-8"))["after"]["bits_per_byte"]
            except InputError:  # its loss is no number
                seen[power] = float("inf")
        return seen[power]

    return float(f"{usual * APART ** climbed(bits):g}")


def learned(model: str, pruned: Path, out: Path, below: tuple[Path, ...], **options: Any) -> Path:
    """The adapter that repairs a pruned model."""
    options = {"steps": STEPS} | LEARNING | options
    ssmcompress.tune_state(str(pruned), adapter=below, teacher=f"ref:{model}", out=out, **options)
    return out


def evaluated(model: str, adapters: list[Path] | tuple[()] = ()) -> dict[str, Any]:
    """Likelihood of the pages and memory, from disk."""
    with tempfile.TemporaryDirectory() as work:
        ssmcompress.evaluate(model, adapter=adapters, perplexity="default", recall=True, out=Path(work) / "out")
        summary = json.loads((Path(work) / "out/summary.json").read_text(encoding="utf-8"))
        scored = documents(Path(work) / "out")
    tuned = [json.loads((each / "tuning.json").read_text(encoding="utf-8"))["trainable"] for each in adapters]
    return {
        "bits_per_byte": summary["bits_per_byte"],
        "trainable": sum(tuned),
        "documents": [[round(each.nats, 4), each.tokens, each.bytes, each.sha256] for each in scored],
        "recall": {f"{probe['probe']} {probe['load']}": probe["accuracy"] for probe in summary["recall"]},
    }


def table(model: str, found: dict[str, Any]) -> str:
    """Markdown: every way of pruning, and below it what repairs it."""
    rows = [COLUMNS, ("---",) * len(COLUMNS)]
    for name, each in found.items():
        if name == "rates":
            continue
        way = name.partition(",")[0]
        against = {"dense": found["dense"] if name != "dense" else None, "pruned": found[way] if way != name else None}
        changes = ("" if base is None else change(base, each) for base in against.values())
        recall = (f"{each['recall'][probe]:.1%}" for probe in ("copy 20", "key-value 8"))
        count = f"{each['trainable']:,}" if each["trainable"] else ""
        rows.append((name, count, f"{each['bits_per_byte']:.4f}", *changes, *recall))
    rates = ", ".join(f"{name} {rate:g}" for name, rate in found.get("rates", {}).items())
    text = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    return f"### ref:{model}\n\n{text}\n\nLearning rates: {rates}; {STEPS} steps.\n"


def change(base: dict[str, Any], each: dict[str, Any]) -> str:
    """The paired change in bits per byte, with its 95 % interval."""
    pages = ([DocumentScore(*page) for page in side["documents"]] for side in (base, each))
    return "{:+.4f} [{:+.4f}, {:+.4f}]".format(*paired_difference(*pages))


if __name__ == "__main__":
    main()
