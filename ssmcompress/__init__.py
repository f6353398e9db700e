"""Makes pretrained Mamba, Mamba-2 and hybrid checkpoints smaller, and shows what was lost.

Every verb of the command line is a function here, imported when it is first used: `ssmcompress --help` needs no torch.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import Any

__version__ = "0.1.0"

FUNCTIONS = {
    "apply": "ssmcompress.run",
    "compare": "ssmcompress.evaluate.comparison",
    "convert": "ssmcompress.checkpoint.convert",
    "doctor": "ssmcompress.doctor",
    "evaluate": "ssmcompress.evaluate",
    "generate": "ssmcompress.generate",
    "load": "ssmcompress.checkpoint.source",
    "models": "ssmcompress.models",
    "plan": "ssmcompress.plan",
    "prune": "ssmcompress.run",
    "reduce_tokens": "ssmcompress.run",
    "report": "ssmcompress.report.page",
    "run": "ssmcompress.run",
    "tune_state": "ssmcompress.tune_state",
}

__all__ = ["__version__", *FUNCTIONS]


class _Package(ModuleType):
    """Keeps `ssmcompress.prune` the function when the import system sets the subpackage of that name over it."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in FUNCTIONS and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


def __getattr__(name: str) -> Any:
    if name not in FUNCTIONS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    function = getattr(import_module(FUNCTIONS[name]), name)
    globals()[name] = function
    return function


def __dir__() -> list[str]:
    return sorted({*globals(), *FUNCTIONS})


sys.modules[__name__].__class__ = _Package
