"""What a recipe wants measured: the dense model and the result from disk, the two compared, and the gate."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ssmcompress import parallel
from ssmcompress.checkpoint import manifest
from ssmcompress.checkpoint.source import resolve
from ssmcompress.errors import InputError
from ssmcompress.evaluate.bounds import require_known
from ssmcompress.evaluate.comparison import compare
from ssmcompress.evaluate.evaluation import evaluate, identity, measures
from ssmcompress.evaluate.results import read as read_results
from ssmcompress.events import Emit, ignore
from ssmcompress.policy import KEY
from ssmcompress.recipe import Recipe
from ssmcompress.recipes import read
from ssmcompress.record import RECIPE

DENSE, COMPRESSED, TUNED, COMPARISON = "dense", "compressed", "tuned", "comparison"


def foresee(recipe: Recipe) -> None:
    """InputError, before anything is computed, for an eval section or a gate of a recipe that will not do."""
    assert recipe.eval is not None
    found = measures(**recipe.eval.model_dump())
    if recipe.gate:
        require_known(recipe.gate.max_drop, found)


def assess(recipe: Recipe, folder: Path, adapters: Sequence[Path] = (), emit: Emit = ignore) -> None:
    """Evaluates what a run wrote beside its source, below `folder`/eval; what was measured so already is not again.

    With adapters the model is measured with them too, and then it is that which the gate judges. Raises GateError, once
    all is told and written, where more was lost than the recipe's gate lets through.
    """
    assert recipe.eval is not None
    results = folder / manifest.EVALUATION
    settings: dict[str, Any] = recipe.eval.model_dump() | recipe.model_dump(
        include={"seed", "device", "dtype", "backend"}
    )
    if settings["context"] is None and resolve(str(folder)).config().to_dict().get(KEY):
        settings["context"] = recipe.eval.length // 2  # of both, or nothing could be compared
    of = {DENSE: (recipe.model, ()), COMPRESSED: (str(folder), ())} | (
        {TUNED: (str(folder), adapters)} if adapters else {}
    )
    for name, (model, learned) in of.items():
        if not _measured(results / name, identity(model, adapter=learned, **settings)):
            evaluate(model, adapter=learned, out=results / name, overwrite=True, emit=emit, **settings)
    gate = recipe.gate
    bounds = (
        [str(bound) if name == "all" else f"{name}={bound}" for name, bound in gate.max_drop.items()] if gate else []
    )
    strict = gate is not None and gate.strict
    judged = [results / name for name in of if not (adapters and gate and name == COMPRESSED)]
    if parallel.first():
        with parallel.alone():
            compare(*judged, max_drop=bounds, strict=strict, out=results / COMPARISON, overwrite=True, emit=emit)


def made_by(recipe: Recipe, folder: Path) -> bool:
    """Whether the folder holds what this recipe makes of its model as it is now, unchanged since it was written."""
    if not (folder / manifest.NAME).exists() or manifest.changed(folder):
        return False
    made, source = manifest.read(folder), resolve(recipe.model)
    if made.verb not in ("prune", "reduce-tokens") or made.source.sha256 != manifest.describe(source).sha256:
        return False
    told = read(str(folder / RECIPE))
    return told.making().sha256() == recipe.portable(source.label).making().sha256()


def _measured(results: Path, key: str) -> bool:
    """Whether results of this identity are there, whole."""
    try:
        return read_results(results).summary.asked_sha256 == key
    except InputError:
        return False
