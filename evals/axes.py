"""What removing units costs the reference checkpoints: every axis, score and correction, at keep 0.75 and 0.5.

python evals/axes.py --data DIR    kept in evals/results/axes-*.md (over an hour on two cores; goes on where it was)

DIR holds gutenberg/, whose Jane Eyre was kept out of training and is no test text either: defaults are chosen on it;
the figures to report are those of the shipped test pages.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from evals.reference.corpus import VALIDATION_NOVELS, novel
from evals.scopes import CHARACTERS, PARTS
from ssmcompress import edits as editing
from ssmcompress.arch.surgery import Surgery
from ssmcompress.calib import data
from ssmcompress.checkpoint.source import Checkpoint, load
from ssmcompress.errors import UnsupportedError
from ssmcompress.events import Note, Terminal
from ssmcompress.measure.glance import Glance, glance
from ssmcompress.measure.perplexity import DocumentScore, Perplexity, paired_difference, perplexity
from ssmcompress.prune.cut import cut
from ssmcompress.prune.sizes import figures, weigh
from ssmcompress.steps import METHODS, Cut

HERE = Path(__file__).parent
KEPT = HERE / "results"
MODELS = {
    "mamba": ("state", "channel", "dt_rank", "width", "ssm", "layer"),
    "mamba2": ("state", "head", "head_channel", "width", "ssm", "layer"),
}
ACROSS = {  # of each axis the scores and the correction whose units compete over the whole model too
    "state": (("ghost",), "none"),
    "channel": (("taylor", "flap"), "refit"),
    "head": (("taylor", "flap"), "refit"),
}
COLUMNS = ("axis", "keep", "score", "correction", "novel", "pages, against dense", "copy 20", "4 pairs")


def main() -> None:
    """Measures what is not measured yet, and keeps the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", default=list(MODELS))
    parser.add_argument("--data", type=Path, required=True)
    options = parser.parse_args()
    text = novel(options.data, VALIDATION_NOVELS[0])
    starts = range(0, len(text) - CHARACTERS, len(text) // PARTS)
    documents = [text[start : start + CHARACTERS] for start in starts]
    with Terminal() as tell:
        for model in options.models:
            found = _read(model)
            for case in [None, *cases(model)]:
                if (name := _name(case)) not in found:
                    found[name] = measured(model, case, documents)
                    (KEPT / f"axes-{model}.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
                    tell(Note(f"{model}, {name}: {found[name].get('pages', 'no format says it')}"))
            (KEPT / f"axes-{model}.md").write_text(table(model, found), encoding="utf-8")


def cases(model: str) -> Iterator[Cut]:
    """Every score of every axis; at half of the units refitted too, and with the norm that heads share rescaled.

    Then half of the units of the whole model, of which layers keep different numbers.
    """
    for axis in MODELS[model]:
        for keep in (0.75, 0.5):
            for method in METHODS[axis]:
                corrections = ["none"]
                if keep == 0.5 and axis not in ("width", "ssm", "layer", "dt_rank"):
                    corrections += ["refit"]
                shared = axis == "width" or (axis in ("head", "head_channel") and method in ("minitron", "flap"))
                if keep == 0.5 and shared:
                    corrections += ["rescale"]
                for correct in corrections:
                    yield Cut.model_validate(
                        {"axis": axis, "keep": keep, "method": method, "correct": correct, "any_size": True}
                    )
        methods, correct = ACROSS.get(axis, ((), "none"))
        for method in methods:
            said = {"axis": axis, "keep": 0.5, "method": method, "correct": correct, "scope": "model"}
            yield Cut.model_validate(said | {"any_size": True})


def measured(model: str, case: Cut | None, documents: list[str]) -> dict[str, Any]:
    """The likelihood of the novel and the pages, memory, and sizes, of a checkpoint cut in memory."""
    checkpoint = load(f"ref:{model}", dtype=torch.float32)
    weights = weigh(checkpoint.stored)
    surgery = Surgery(checkpoint.arch, ())
    if case is not None:
        windows = data.windows(None, checkpoint.tokenizer, count=64, length=512, seed=0).ids
        dtypes = {name: checkpoint.stored.dtype(name) for name in checkpoint.stored}
        try:
            made = cut(checkpoint.model, checkpoint.arch, case, weights, windows, dtypes)
        except UnsupportedError as error:
            return {"refused": error.message}
        editing.apply(made, dict(checkpoint.model.named_parameters()))
        surgery = Surgery(checkpoint.arch, made)
        checkpoint.model = surgery.operate(checkpoint.model)
    return _look(checkpoint, documents) | asdict(figures(surgery, weights))


@torch.no_grad()
def _look(checkpoint: Checkpoint, documents: list[str]) -> dict[str, Any]:
    found: Glance = glance(checkpoint.model, checkpoint.tokenizer)
    validation: Perplexity = perplexity(checkpoint.model, checkpoint.tokenizer, documents)
    return {
        "pages": found.bits_per_byte,
        "novel": validation.bits_per_byte,
        "recall": [(probe.accuracy, probe.standard_error) for probe in found.memory],
        "documents": {
            "pages": [asdict(each) for each in found.likelihood.documents],
            "novel": [asdict(each) for each in validation.documents],
        },
    }


def change(found: dict[str, Any], first: str, second: str, text: str = "pages") -> tuple[float, float, float]:
    """Bits per byte of the second case minus the first on the same documents, with its paired 95 % interval."""
    parts = ([DocumentScore(**each) for each in found[name]["documents"][text]] for name in (first, second))
    return paired_difference(*parts)


def table(model: str, found: dict[str, Any]) -> str:
    """Markdown: a row for every case, dense first."""
    dense = found[_name(None)]
    lines = [COLUMNS, ("---",) * len(COLUMNS)]
    lines.append(("dense", "", "", "", f"{dense['novel']:.4f}", f"{dense['pages']:.4f}", *_memory(dense)))
    for case in cases(model):
        each = found[_name(case)]
        if "pages" in each:
            low, high = change(found, _name(None), _name(case))[1:]
            told = f"{each['pages'] - dense['pages']:+.4f} [{low:+.4f}, {high:+.4f}]"
            axis = f"{case.axis}, whole model" if case.scope == "model" else case.axis
            cells = (axis, f"{case.keep:g}", case.criterion, case.correct, f"{each['novel']:.4f}", told)
            lines.append((*cells, *_memory(each)))
    return f"### ref:{model}\n\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _memory(each: dict[str, Any]) -> tuple[str, ...]:
    return tuple(f"{accuracy:.1%} ± {error:.1%}" for accuracy, error in each["recall"])


def _read(model: str) -> dict[str, Any]:
    path = KEPT / f"axes-{model}.json"
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return {name: each for name, each in found.items() if "refused" not in each}


def _name(case: Cut | None) -> str:
    if case is None:
        return "dense"
    name = f"{case.axis} {case.keep:g} {case.criterion} {case.correct}"
    return f"{name} {case.scope}" if case.scope == "model" else name


if __name__ == "__main__":
    main()
