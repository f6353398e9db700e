"""What an unfinished evaluation has already measured, so that the same one, asked for again, goes on from there."""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ssmcompress.checkpoint.output import MARKER
from ssmcompress.errors import InputError, UnsupportedError
from ssmcompress.events import Emit, Note

FOLDER = ".finished"


class Measures:
    """The finished measures in the folder of a run, a file each, which is there whole or not at all."""

    def __init__(self, folder: Path, emit: Emit) -> None:
        self._folder = folder / FOLDER
        self._folder.mkdir(exist_ok=True)
        if done := self._names():
            emit(Note(f"An earlier run was interrupted: going on after {', '.join(done)}."))

    def get(self, name: str, measure: Callable[[], Any]) -> Any:
        """What `measure` returns, in JSON's types; it is called where no earlier run has finished it."""
        path = self._folder / f"{name.replace('/', '__')}.json"
        if not path.exists():
            part = path.with_suffix(".part")
            part.write_text(json.dumps(measure(), allow_nan=False), encoding="utf-8")
            part.rename(path)
        return json.loads(path.read_text(encoding="utf-8"))

    @contextmanager
    def kept(self, *beside: str) -> Iterator[None]:
        """When the work inside is whole nothing of this stays; when it is cut short only this and `beside` do.

        Nothing stays where the next run would fail too, or would have nothing to go on from.
        """
        try:
            yield
        except BaseException as error:
            hopeless = isinstance(error, InputError | UnsupportedError) or not self._names()
            worth = set() if hopeless else {FOLDER, MARKER, *beside}
            for path in self._folder.parent.iterdir():
                if path.name not in worth:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            if hopeless:
                self._folder.parent.rmdir()
            raise
        shutil.rmtree(self._folder)

    def _names(self) -> list[str]:
        return [path.stem for path in sorted(self._folder.glob("*.json"), key=lambda path: path.stat().st_mtime_ns)]
