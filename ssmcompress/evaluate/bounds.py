"""What may be lost at most, by measure, task or kind: the bounds of a gate."""

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence

from ssmcompress.errors import InputError

ALL = "all"  # the key of a bound for every measure


def read(given: Sequence[str | float]) -> dict[str, float]:
    """The bounds of --max-drop by measure or task, that of every measure as `all`; InputError for what is none."""
    found: dict[str, float] = {}
    for text in map(str, given):
        name, _, value = text.rpartition("=")
        name = name or ALL
        try:
            bound = float(value)
        except ValueError:
            bound = math.nan
        if not 0 <= bound < math.inf:
            raise InputError(
                f"--max-drop {text} holds no number of at least 0.", hint="Write 0.01 or TASK=0.01: one point of 100."
            )
        if name in found:
            raise InputError(
                f"--max-drop is given twice for {'every measure' if name == ALL else name}.", hint="Give it once."
            )
        found[name] = bound
    return found


def nearest(bounds: Mapping[str, float], measure: str) -> float | None:
    """The bound of a measure: its own, its task's, or that of every one."""
    keys = (measure, measure.partition("/")[0], ALL)
    return next((bounds[key] for key in keys if key in bounds), None)


def require_known(bounds: Iterable[str], measures: Sequence[str]) -> None:
    """InputError for a bound on what is not among the measures, nor the task or kind of one."""
    known = sorted({*measures, *(name.partition("/")[0] for name in measures)})
    for key in bounds:
        if key != ALL and key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            hint = f"Did you mean {close[0]!r}?" if close else f"Measured: {', '.join(measures)}."
            raise InputError(f"There is a bound on {key!r}, which is not measured.", hint=hint)
