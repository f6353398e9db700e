"""Which modules a pruning step touches, and how much of each it zeroes."""

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches

from ssmcompress.arch.base import DECAYS, Arch
from ssmcompress.errors import InputError, UnsupportedError
from ssmcompress.prune.masks import parse_pattern
from ssmcompress.recipe import Recipe
from ssmcompress.steps import SPARSESSM, Cut, Prune, ReduceTokens, Step, usual_scope


@dataclass(frozen=True)
class Target:
    """How one kind of module is pruned: a share of each row or of the tensor, or all but n of every m inputs."""

    sparsity: float
    pattern: tuple[int, int] | None
    scope: str


def targets(arch: Arch, step: Prune) -> dict[str, Target]:
    """What the step prunes: every block's projections, or A_log by SparseSSM, unless it says otherwise.

    Raises InputError for a module this family does not have, UnsupportedError for a method a module has no form of.
    """
    known = (*arch.prunable, DECAYS, *arch.outer)
    scopes = step.scope if isinstance(step.scope, dict) else {}
    for name in (*step.include, *step.exclude, *step.modules, *scopes):
        if name not in known:
            near = get_close_matches(name, known, n=1)
            hint = f"Did you mean {near[0]!r}?" if near else f"Choose from {', '.join(known)}."
            raise InputError(f"{arch.model_type} has no prunable module {name!r}.", hint=hint)
    usual = (DECAYS,) if step.method in SPARSESSM else arch.projections
    wanted = step.include or tuple(dict.fromkeys((*usual, *step.modules)))
    chosen = [name for name in known if name in wanted and name not in step.exclude]
    for name in step.modules:
        if name not in chosen:
            raise InputError(
                f"modules gives {name} a ratio, but it is not among the modules to prune.",
                hint=f"Add {name} to include, take it out of exclude, or leave out its ratio.",
            )
    if not chosen:
        raise InputError("Nothing is left to prune.", hint=f"Choose from {', '.join(known)}.")
    _require_form(arch, step, chosen)
    if {"embeddings", "lm_head"} <= set(chosen) and arch.config.tie_word_embeddings:
        raise InputError("embeddings and lm_head are one tied weight.", hint="Include one of them.")
    return {name: _target(step, name) for name in chosen}


def _require_form(arch: Arch, step: Prune, chosen: Sequence[str]) -> None:
    """UnsupportedError where the method has no form for something it should prune."""
    others = [name for name in chosen if name != DECAYS]
    if step.method in SPARSESSM and others:
        raise UnsupportedError(
            f"{step.method} has no form for {', '.join(others)}: it scores the entries of A_log.",
            hint="Leave the modules out; `--method wanda` prunes them, in a step or a run of its own.",
        )
    if DECAYS in chosen and step.method not in ("magnitude", *SPARSESSM):
        raise UnsupportedError(
            f"{step.method} has no form for A_log, which no input is multiplied with.",
            hint="Use --method sparsessm, sparsessm_v2 or magnitude: entries of A_log become memoryless.",
        )
    if DECAYS in chosen and step.pattern and "head" in arch.axes():
        raise UnsupportedError(
            f"{arch.model_type} has one entry of A_log a head, and no row of states for a pattern.",
            hint="Use --sparsity.",
        )
    if "embeddings" in chosen and step.method != "magnitude":
        raise UnsupportedError(
            f"{step.method} has no form for the embeddings: they are looked up, not multiplied.",
            hint="Use --method magnitude, or --include lm_head, which is the same weight where the two are tied.",
        )
    if step.method == "sparsegpt" and "conv1d" in chosen:
        raise UnsupportedError(
            "SparseGPT has no form for the short convolution: its inputs are not shared between rows.",
            hint="Use --method wanda for conv1d, or --exclude conv1d.",
        )


def formless(arch: Arch, steps: Sequence[Step]) -> frozenset[str]:
    """The prunable modules that no step's method has a form for."""
    methods = {step.method for step in steps if isinstance(step, Prune)} - set(SPARSESSM)
    if not methods and any(isinstance(step, Prune) for step in steps):
        return frozenset(arch.prunable)
    return frozenset({"conv1d"} if methods == {"sparsegpt"} else ())


def written_out(arch: Arch, recipe: Recipe) -> Recipe:
    """The same recipe, by hash too, with the method of every axis, and the scope every module has where scores compete.

    The modules are those of the source: no step that removes units changes what modules there are.
    """
    steps = (_written_out(arch, step) for step in recipe.made)
    return recipe.model_copy(update={"steps": (*steps, *recipe.tuned)})


def _written_out(arch: Arch, step: Step) -> Step:
    if isinstance(step, Cut):
        return step.model_copy(update={"method": step.criterion, "correct": step.correction, "scope": step.reach})
    if isinstance(step, ReduceTokens) or step.pattern or step.grouped or isinstance(step.scope, str):
        return step
    scopes = {name: target.scope for name, target in targets(arch, step).items()} | (step.scope or {})
    plain = step.scope is None and set(scopes.values()) == {"tensor"}
    return step.model_copy(update={"scope": "tensor" if plain else scopes})


def _target(step: Prune, module: str) -> Target:
    asked = step.scope.get(module) if isinstance(step.scope, dict) else step.scope
    # a convolution row has K = 4 weights, and a share of so few is coarse
    scope = "tensor" if module == "conv1d" else asked or usual_scope(step.method, module)
    pattern = parse_pattern(step.pattern) if step.pattern else None
    return Target(step.modules.get(module, step.sparsity or 0.0), pattern, scope)
