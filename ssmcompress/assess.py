"""What a recipe wants measured: the dense model and the result from disk, the two compared, and the gate."""

from pathlib import Path

from ssmcompress.checkpoint import manifest
from ssmcompress.checkpoint.source import resolve
from ssmcompress.evaluate.comparison import compare, require_known
from ssmcompress.evaluate.evaluation import evaluate, measures
from ssmcompress.evaluate.results import NAME
from ssmcompress.events import Emit, ignore
from ssmcompress.recipe import Recipe

DENSE, COMPRESSED, COMPARISON = "dense", "compressed", "comparison"


def foresee(recipe: Recipe) -> None:
    """InputError, before anything is computed, for an eval section or a gate of a recipe that will not do."""
    assert recipe.eval is not None
    found = measures(**recipe.eval.model_dump())
    if recipe.gate:
        require_known(recipe.gate.max_drop, found)


def assess(recipe: Recipe, folder: Path, emit: Emit = ignore) -> None:
    """Evaluates what a run wrote beside its source, below `folder`/eval; what is there already is not measured again.

    Raises GateError, once all is told and written, where more was lost than the recipe's gate lets through.
    """
    assert recipe.eval is not None
    results = folder / manifest.EVALUATION
    settings = recipe.eval.model_dump() | recipe.model_dump(include={"seed", "device", "dtype", "backend"})
    for name, model in ((DENSE, recipe.model), (COMPRESSED, str(folder))):
        if not (results / name / NAME).exists():
            evaluate(model, out=results / name, emit=emit, **settings)
    gate = recipe.gate
    bounds = (
        [str(bound) if name == "all" else f"{name}={bound}" for name, bound in gate.max_drop.items()] if gate else []
    )
    pair = (results / DENSE, results / COMPRESSED)
    strict = gate is not None and gate.strict
    compare(*pair, max_drop=bounds, strict=strict, out=results / COMPARISON, overwrite=True, emit=emit)


def left_to_assess(recipe: Recipe, folder: Path) -> bool:
    """Whether this recipe wrote the model in the folder, which is as it was written, but did not get to compare it."""
    if not (folder / manifest.NAME).exists() or (folder / manifest.EVALUATION / COMPARISON).exists():
        return False
    return manifest.read(folder).recipe_sha256 == _portable(recipe).sha256() and not manifest.changed(folder)


def _portable(recipe: Recipe) -> Recipe:
    return recipe.portable(resolve(recipe.model).label)
