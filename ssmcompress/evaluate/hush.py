"""What a library prints, draws and logs, kept off the user's terminal; its warnings become notes."""

import io
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any

from ssmcompress.events import Emit, Note

USUAL = (  # warnings of lm-eval's about what this module does on purpose
    "`pretrained` model kwarg",
    "Passed an already-initialized model",
    "Custom kwargs can be passed",
    "but aggregation is not",
    "but higher_is_better is not",
    "Overwriting default num_fewshot",
    "num_fewshot > 0 but fewshot_split",
    "using test_docs as fewshot_docs",
    "overrides existing task",
)


class _Sink(io.StringIO):
    """Takes what lm-eval prints; rich still finds the stream behind it for the bar of ours."""

    def __init__(self, behind: Any) -> None:
        super().__init__()
        self.rich_proxied_file = getattr(behind, "rich_proxied_file", behind)

    def write(self, text: str) -> int:
        return len(text)


class _Warnings(logging.Handler):
    """Passes each warning of lm-eval's on once, and remembers all it said."""

    def __init__(self, emit: Emit) -> None:
        super().__init__()
        self.said: list[str] = []
        self._emit = emit

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if record.levelno >= logging.WARNING and text not in self.said and not any(usual in text for usual in USUAL):
            self._emit(Note(f"lm-eval: {' '.join(text.split())}", "warning"))
        self.said.append(text)


@contextmanager
def quiet(emit: Emit) -> Iterator[tuple[Emit, list[str]]]:
    """Silences lm-eval's bars, prints and loggers; yields an emit that is heard all the same, and what was logged."""
    out, err = sys.stdout, sys.stderr

    def told(event: Any) -> None:
        with redirect_stdout(out), redirect_stderr(err):
            emit(event)

    logger = logging.getLogger("lm_eval")
    handler, level, handlers, propagate = _Warnings(told), logger.level, logger.handlers, logger.propagate
    logger.handlers, logger.propagate = [handler], False
    logger.setLevel(logging.INFO)
    for name, each in logging.root.manager.loggerDict.items():
        if name.partition(".")[0] == logger.name and isinstance(each, logging.Logger):
            each.disabled = False  # as any library's logging.config leaves it
    try:
        with redirect_stdout(_Sink(out)), redirect_stderr(_Sink(err)):
            yield told, handler.said
    finally:
        logger.handlers, logger.propagate = handlers, propagate
        logger.setLevel(level)
