"""Numbers and recipes as people read them."""

from ssmcompress.arch.base import DECAYS
from ssmcompress.events import UNITS, number
from ssmcompress.recipe import Recipe
from ssmcompress.report.checkpoints import Made
from ssmcompress.report.measures import Change, Figure
from ssmcompress.steps import SPARSESSM, Cut, Prune, ReduceTokens, Step
from ssmcompress.tuning import TuneState

METHODS = {
    "wanda": "WANDA",
    "magnitude": "magnitude",
    "sparsegpt": "SparseGPT",
    "sparsessm": "SparseSSM",
    "sparsessm_v2": "SparseSSM v2",
}
NOT_MEASURED = "not measured"


def signed(text: str) -> str:
    """With a minus sign instead of a hyphen."""
    return text.replace("-", "−")


def count(value: float) -> str:
    """A number of parameters."""
    size, word, _ = next((unit for unit in UNITS if value >= unit[0]), (1.0, "", ""))
    return f"{value / size:.2f} {word}" if word else f"{value:,.0f}"


def value(figure: Figure) -> str:
    """A figure with its interval in brackets, or its standard error after ±."""
    if figure.unit == "share":
        held = f" [{figure.interval[0]:.1%}, {figure.interval[1]:.1%}]" if figure.interval else ""
        return f"{figure.value:.1%}{held}"
    say = (lambda each: f"{each:.4f}") if figure.unit == "bits" else number
    if figure.interval:
        return f"{say(figure.value)} [{say(figure.interval[0])}, {say(figure.interval[1])}]"
    return say(figure.value) + (f" ± {say(figure.standard_error)}" if figure.standard_error is not None else "")


def change(found: Change, unit: str) -> str:
    """A change with its interval: bits per byte, points of an accuracy, a score's own unit, or percent of another."""

    def say(each: float) -> str:
        told = f"{each:+.4f}" if unit in ("bits", "own") else f"{100 * each:+,.1f}"
        return told if float(told.replace(",", "")) else told[1:]

    tail = " %" if unit == "plain" else ""
    held = f" [{say(found.interval[0])}, {say(found.interval[1])}]" if found.interval else ""
    return signed(f"{say(found.value)}{tail}{held}")


def brief(recipe: Recipe | None, verb: str) -> str:
    """What was done, in a few words."""
    if recipe is None:
        return verb
    return ", then ".join(_brief(step) for step in recipe.steps)


def sentences(made: Made) -> list[str]:
    """What was done, step by step, on what text, and how it was checked."""
    recipe, told = made.recipe, made.manifest
    steps = recipe.made if recipe else ()
    found = [_sentence(step) for step in steps if not isinstance(step, ReduceTokens)]
    found += [told.tokens.told] if told.tokens else []
    if told.verb == "apply":
        found.append("The edits of an earlier run were applied again, without calibration of their own.")
    if told.calibration is not None:
        text = told.calibration
        found.append(f"Calibrated on {text.windows} windows of {text.length} tokens of {text.source}{_mixed(recipe)}.")
    elif any(not isinstance(step, ReduceTokens) for step in steps):
        found.append("No calibration: the scores come from the weights alone.")
    found += [
        f"Then {step.method} was learned from {step.data or 'the shipped text'} in {step.steps} updates,"
        f" {'as the dense model has it' if step.objective == 'distill' else 'by its likelihood'}: an adapter."
        for step in (recipe.tuned if recipe else ())
    ]
    if told.sparsity:
        found.append(f"Of the pruned tensors, {told.sparsity:.1%} of the entries are zero as stored.")
    if (check := told.verification) is not None:
        sides = (("stock transformers", check.transformers), ("ssmcompress", check.ssmcompress))
        loaded = " and ".join(f"{_tiny(gap)} in {name}" for name, gap in sides if gap is not None)
        found.append(f"Loaded again from disk, the logits differ by {loaded} ({_tiny(check.tolerance)} is allowed).")
    return found


def _brief(step: Step | TuneState) -> str:
    if isinstance(step, TuneState):
        return f"{step.method} learned"
    if isinstance(step, Cut):
        return f"{step.axis}s by {step.criterion}, {_amount(step)}"
    if isinstance(step, ReduceTokens):
        return f"tokens by {step.method}, {_saving(step)}"
    much = step.pattern or (f"{step.sparsity:.0%}" if step.sparsity is not None else "")
    much += " and ratios by module" if step.modules else ""
    where = " by row" if step.scope == "row" else ""
    return f"{_method(step)} {much}{where}"


def _sentence(step: Prune | Cut) -> str:
    if isinstance(step, Cut):
        if step.merges:
            return f"Of the {step.axis}s of B and C, {_amount(step)} stay, each of them the mean of its run."
        return f"Of the {step.axis}s, {_amount(step)} stay, chosen by {step.criterion}; the others are removed."
    names = tuple(name for name in step.include if name != DECAYS)
    if step.method in SPARSESSM or (step.include and not names):
        return _forgets(step)
    told = _zeroes(step, _names(names) if names else "every projection")
    return f"{told} {_forgets(step)}" if DECAYS in (*step.include, *step.modules) else told


def _forgets(step: Prune) -> str:
    kept, _, of = (step.pattern or "").partition(":")
    some = f"all but {kept} of every {of}" if of else f"{step.modules.get(DECAYS, step.sparsity or 0):.0%} of the"
    return f"{_method(step)} makes {some} entries of A_log memoryless."


def _zeroes(step: Prune, what: str) -> str:
    what += f" but {_names(step.exclude)}" if step.exclude else ""
    if step.pattern:
        kept, of = step.pattern.split(":")
        return f"{_method(step)} keeps {kept} of every {of} inputs of {what} and sets the others to zero."
    share = f"{step.sparsity or 0:.0%}"
    ratios = ", ".join(f"{name} {ratio:.0%}" for name, ratio in step.modules.items())
    others = f" ({ratios})" if ratios else ""
    if step.method == "sparsegpt":
        where = "the weights that stay make up for those that go"
    elif isinstance(step.scope, dict):
        where = "scores compete within " + ", ".join(f"each {scope} of {name}" for name, scope in step.scope.items())
    else:
        where = f"scores compete within each {step.scope or 'tensor'}"
    return f"{_method(step)} sets {share} of {what} to zero{others}; {where}."


def _saving(step: ReduceTokens) -> str:
    return f"{step.flops:.0%} of the work saved" if step.flops else f"{step.keep:.0%} stay each time"


def _amount(step: Cut) -> str:
    keep = step.keep or 0
    share = f"{keep:.0%}" if keep <= 1 else f"{keep:g}"
    told = share if step.target is None else f"as many as {step.target} allows"
    return f"{told} over the whole model" if step.reach == "model" else told


def _method(step: Prune) -> str:
    name = METHODS[step.method]
    return name[0].upper() + name[1:]


def _tiny(gap: float) -> str:
    return signed(f"{gap:.1e}") if gap else "nothing"


def _mixed(recipe: Recipe | None) -> str:
    return ", with memory exercises among them" if recipe and recipe.calibrate.mix else ""


def _names(names: tuple[str, ...]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
