"""What removing units costs and saves on the reference checkpoints: every axis, score and correction, at 0.75 and 0.5.

python -m evals.axes --data DIR    hours on two cores: it goes on where it was, in evals/results/axes-*.json
python -m evals.axes --speed       prefill and decoding of every size beside dense, on a quiet machine
python -m evals.axes               writes the tables evals/results/axes-*.md from what is kept

DIR holds gutenberg/, whose Jane Eyre was kept out of training and is no test text either: defaults are chosen on it;
the figures to report are those of the shipped test pages.
"""

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from evals.reference.corpus import VALIDATION_NOVELS, novel
from evals.scopes import CHARACTERS, PARTS
from ssmcompress import edits as editing
from ssmcompress.arch.surgery import Surgery
from ssmcompress.calib import data
from ssmcompress.checkpoint.source import Checkpoint, load
from ssmcompress.edits import Add, Edit
from ssmcompress.errors import UnsupportedError
from ssmcompress.evaluate.peak import decode, first_token, prefill
from ssmcompress.evaluate.speed import Ratio, rounds
from ssmcompress.events import Emit, Note, Terminal
from ssmcompress.measure.glance import glance
from ssmcompress.measure.perplexity import DocumentScore, paired_difference, perplexity
from ssmcompress.prune.cut import cut
from ssmcompress.prune.shares import sized
from ssmcompress.prune.sizes import figures, outline, weigh
from ssmcompress.steps import INNER, METHODS, Cut

KEPT = Path(__file__).parent / "results"
MODELS = {
    "mamba": ("state", "channel", "dt_rank", "width", "ssm", "layer"),
    "mamba2": ("state", "head", "head_channel", "width", "ssm", "layer"),
}
ACROSS = {  # of each axis the scores and the correction whose units compete over the whole model too
    "state": (("ghost", "rotate"), "none"),
    "channel": (("taylor", "flap"), "refit"),
    "head": (("taylor", "flap"), "refit"),
}
ROTATED = ("mamba2", "state")
BIASED = {"channel": ("taylor", "flap"), "head": ("taylor", "flap"), "head_channel": ("flap",)}
DENSE, SPEED = "dense", "speed"
COSTS = ("axis", "keep", "score", "correction", "novel", "pages, against dense", "copy 20", "4 pairs")
GAINS = ("axis", "keep", "parameters", "state bytes", "prefill, times as fast", "decoding")
LENGTH, TOKENS, REPEATS = 512, 32, 12


def main() -> None:
    """Measures what is not measured yet where asked to, and writes the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=list(MODELS))
    parser.add_argument("--data", type=Path)
    parser.add_argument("--speed", action="store_true")
    options = parser.parse_args()
    with Terminal() as tell:
        for model in options.models:
            found = _read(model)
            if options.data:
                measure(model, found, documents(options.data), tell)
            if options.speed:
                found[SPEED] = speeds(model, tell)
                _write(model, found)
            (KEPT / f"axes-{model}.md").write_text(tables(model, found), encoding="utf-8")


def documents(folder: Path) -> list[str]:
    """Parts of the validation novel."""
    text = novel(folder, VALIDATION_NOVELS[0])
    return [text[start : start + CHARACTERS] for start in range(0, len(text) - CHARACTERS, len(text) // PARTS)]


def cases(model: str) -> Iterator[Cut]:
    """Every score of every axis; at half of the units with corrections, and over the whole model, too."""
    for axis in MODELS[model]:
        for keep in (0.75, 0.5):
            for method in METHODS[axis]:
                if method == "rotate" and (model, axis) != ROTATED:
                    continue
                usual = axis in INNER and method == METHODS[axis][0]
                more = _corrections(axis, method) if keep == 0.5 or axis == "width" else ("refit",) * usual
                for correct in ("none", *more):
                    yield _case(axis, keep, method, correct)
        methods, correct = ACROSS.get(axis, ((), "none"))
        for method in methods:
            if method != "rotate" or (model, axis) == ROTATED:
                yield _case(axis, 0.5, method, correct, scope="model")
    for method in ("ghost", "rotate") if model == ROTATED[0] else ("ghost",):
        yield _case("state", 0.25, method, "none")
        yield _case("state", 0.25, method, "none", scope="model")


def _corrections(axis: str, method: str) -> Iterator[str]:
    if axis not in ("width", "ssm", "layer", "dt_rank"):
        yield "refit"
    if axis == "width" or (axis in ("head", "head_channel") and method in ("minitron", "flap")):
        yield "rescale"
    if method in BIASED.get(axis, ()):
        yield "bias"


def _case(axis: str, keep: float, method: str, correct: str, **more: Any) -> Cut:
    said = {"axis": axis, "keep": keep, "method": method, "correct": correct, "any_size": True}
    return Cut.model_validate(said | more)


def measure(model: str, found: dict[str, Any], novels: list[str], tell: Emit) -> None:
    """Measures the cases that are not there yet, one after the other."""
    for case in [None, *cases(model)]:
        if (name := _name(case)) not in found:
            found[name] = measured(model, case, novels, found.get(DENSE))
            _write(model, found)
            tell(Note(f"{model}, {name}: {found[name].get('pages', found[name].get('refused'))}"))


def measured(model: str, case: Cut | None, novels: list[str], dense: dict[str, Any] | None) -> dict[str, Any]:
    """Likelihood of novel and pages, the latter paired with dense, memory, and sizes of a model cut in memory."""
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
        surgery = _operate(checkpoint, made)
    with torch.no_grad():
        seen = glance(checkpoint.model, checkpoint.tokenizer)
        validation = perplexity(checkpoint.model, checkpoint.tokenizer, novels)
    pages = [asdict(each) for each in seen.likelihood.documents]
    return {
        "pages": seen.bits_per_byte,
        "novel": validation.bits_per_byte,
        "recall": [(probe.accuracy, probe.standard_error) for probe in seen.memory],
        "change": None if dense is None else paired_difference(_scores(dense["documents"]), _scores(pages)),
        **({"documents": pages} if dense is None else {}),
        **asdict(figures(surgery, weights)),
    }


def speeds(model: str, tell: Emit) -> dict[str, list[tuple[float, float, float]]]:
    """How many times as fast as dense each size is, in turns with it on one thread: prefill, and decoding.

    Speed follows from shapes: the units are the first ones, what is added is random.
    """
    torch.set_num_threads(1)
    found = {}
    for axis in MODELS[model]:
        for keep, method in ((0.75, None), (0.5, None), *([(0.5, "rotate")] if (model, axis) == ROTATED else ())):
            dense, small = (load(f"ref:{model}", dtype=torch.float32) for _ in range(2))
            case = Cut.model_validate({"axis": axis, "keep": keep, "method": method, "any_size": True})
            after = sized(small.arch, case, weigh(small.stored)).after
            _operate(small, [_filled(edit) for edit in outline(small.arch, case, after)])
            found[f"{axis} {keep:g} {method or ''}".strip()] = ratios = _ratios(small.model, dense.model)
            tell(Note(f"{model}, {axis} {keep:g}: {ratios}"))
    return found


def _ratios(small: Any, dense: Any) -> list[tuple[float, float, float]]:
    ids = torch.randint(small.config.vocab_size, (1, LENGTH), generator=torch.Generator().manual_seed(0))
    ratios = []
    for work in (partial(prefill, ids=ids), partial(_written, ids=ids[:, :16])):
        both = {"small": partial(work, small), "dense": partial(work, dense)}
        taken = rounds(both, REPEATS, 2, clock=time.process_time)
        ratio = Ratio.of("", taken["small"], taken["dense"])
        ratios.append((ratio.ratio, *(ratio.interval or (ratio.ratio, ratio.ratio))))
    return ratios


def _written(model: Any, ids: torch.Tensor) -> None:
    decode(model, *first_token(model, ids), TOKENS)


def _operate(checkpoint: Checkpoint, made: list[Edit]) -> Surgery:
    editing.apply(made, dict(checkpoint.model.named_parameters()))
    surgery = Surgery(checkpoint.arch, made)
    checkpoint.model = surgery.operate(checkpoint.model)
    return surgery


def _filled(edit: Edit) -> Edit:
    return replace(edit, values=torch.randn(edit.shape)) if isinstance(edit, Add) else edit


def tables(model: str, found: dict[str, Any]) -> str:
    """Markdown: what each case costs, dense first, and what each size saves."""
    dense, costs, gains = found[DENSE], [], {}
    costs.append((DENSE, "", "", "", f"{dense['novel']:.4f}", f"{dense['pages']:.4f}", *_memory(dense)))
    for case in cases(model):
        each = found.get(_name(case), {})
        if "pages" not in each:
            continue
        change, low, high = each["change"]
        axis = f"{case.axis}, whole model" if case.scope == "model" else case.axis
        told = f"{change:+.4f} [{low:+.4f}, {high:+.4f}]"
        cells = (axis, f"{case.keep:g}", case.criterion, case.correct, f"{each['novel']:.4f}", told)
        costs.append((*cells, *_memory(each)))
        key = f"{case.axis} {case.keep:g}{' rotate' * case.rotates}"
        if key in found.get(SPEED, {}) and key not in gains:
            gains[key] = (
                case.axis + ", rotated" * case.rotates,
                f"{case.keep:g}",
                *(f"{each[size]:,} ({each[size] / dense[size]:.1%})" for size in ("params", "state_bytes")),
                *("{:.2f} [{:.2f}, {:.2f}]".format(*ratio) for ratio in found[SPEED][key]),
            )
    parts = [f"### ref:{model}", _markdown(COSTS, costs)]
    if gains:
        how = f"{LENGTH} tokens and the last one's logits; {TOKENS} tokens one by one; one thread, CPU time, in turns."
        parts += [f"Beside dense in one process ({how})", _markdown(GAINS, list(gains.values()))]
    return "\n\n".join(parts) + "\n"


def _markdown(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in (columns, ("---",) * len(columns), *rows))


def _memory(each: dict[str, Any]) -> tuple[str, ...]:
    return tuple(f"{accuracy:.1%} ± {error:.1%}" for accuracy, error in each["recall"])


def _scores(rows: list[dict[str, Any]]) -> list[DocumentScore]:
    return [DocumentScore(**row) for row in rows]


def _read(model: str) -> dict[str, Any]:
    path = KEPT / f"axes-{model}.json"
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return {name: each for name, each in found.items() if "refused" not in each}


def _write(model: str, found: dict[str, Any]) -> None:
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(each)}" for name, each in found.items())
    (KEPT / f"axes-{model}.json").write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")


def _name(case: Cut | None) -> str:
    if case is None:
        return DENSE
    name = f"{case.axis} {case.keep:g} {case.criterion} {case.correct}"
    return f"{name} {case.scope}" if case.scope == "model" else name


if __name__ == "__main__":
    main()
