"""What an unfinished evaluation has already measured, so that the same one, asked for again, goes on from there."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ssmcompress import parallel
from ssmcompress.checkpoint.output import kept
from ssmcompress.events import Emit, Note

FOLDER = ".finished"


class Measures:
    """The finished measures in the folder of a run, a file each, which is there whole or not at all."""

    def __init__(self, folder: Path, emit: Emit) -> None:
        self._folder, self._emit = folder / FOLDER, emit
        self._folder.mkdir(exist_ok=True)
        if done := self._names():
            emit(Note(f"An earlier run was cut short: going on after {', '.join(done)}."))

    def get(self, name: str, measure: Callable[[], Any]) -> Any:
        """What `measure` returns, in JSON's types; it is called where no earlier run has finished it."""
        path = self._folder / f"{name.replace('/', '__')}.json"
        known = parallel.told(path.read_text(encoding="utf-8") if parallel.first() and _whole(path) else None)
        if known is None:
            known = json.dumps(measure(), allow_nan=False)
            if parallel.first():
                part = path.with_suffix(".part")
                part.write_text(known, encoding="utf-8")
                part.rename(path)
            known = parallel.told(known)
        return json.loads(known)

    @contextmanager
    def kept(self, *beside: str) -> Iterator[None]:
        """When the work inside is whole nothing of this stays; when it is cut short only this and `beside` do."""
        with kept(self._folder, *beside):
            try:
                yield
            except Exception as error:
                if (done := self._names()) and not isinstance(error, BrokenPipeError):
                    self._emit(Note(f"Finished and kept: {', '.join(done)}. The same command goes on from there."))
                raise

    def _names(self) -> list[str]:
        files = sorted(self._folder.glob("*.json"), key=lambda path: path.stat().st_mtime_ns)
        return [path.stem for path in files if _whole(path)]


def _whole(path: Path) -> bool:
    """Whether a file is there and can be read: after a power cut it may be there, and empty."""
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return False
    return True
