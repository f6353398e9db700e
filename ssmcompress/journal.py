"""What an unfinished run has already found, layer by layer, so that the next one goes on from there."""

from collections.abc import Iterator, MutableMapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from ssmcompress import edits as editing
from ssmcompress import parallel
from ssmcompress.checkpoint.output import kept, sync
from ssmcompress.edits import Edit
from ssmcompress.errors import InputError
from ssmcompress.events import Emit, JsonLines, fan, ignore

FOLDER, EVENTS = ".journal", "events.jsonl"
NONE = "none"
TOLD = 16  # digits of the hash that names of files hold


class Journal:
    """The finished layers of each step, in the unfinished folder of a run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / FOLDER
        self.tokens = NONE
        self.folder.mkdir(exist_ok=True)

    def calibrate(self, tokens: str) -> int:
        """Drops the layers that were found with other calibration tokens (by hash, "" for none); returns how many."""
        self.tokens = tokens[:TOLD] or NONE
        stale = [path for path in self.folder.iterdir() if not path.name.startswith(f"{self.tokens}-")]
        parallel.wait()
        for path in stale if parallel.first() else ():
            path.unlink()
        parallel.wait()
        return sum(path.suffix == ".safetensors" for path in stale)

    def step(self, index: int) -> MutableMapping[int, list[Edit]]:
        """The finished layers of a step, to which the first process alone adds for a later run."""
        found = Layers(self.folder, f"{self.tokens}-step-{index}-layer-")
        if parallel.first():
            found.sift()
        parallel.wait()
        known = found if parallel.first() else dict(found)
        parallel.wait()  # the first adds to them only now
        return known

    def kept(self) -> AbstractContextManager[None]:
        """When the work inside is whole nothing of the journal stays; when it fails, only the journal does."""
        return kept(self.folder, EVENTS)


@contextmanager
def listener(folder: Path, emit: Emit) -> Iterator[Emit]:
    """A listener that passes on what it is told, and writes it down in the folder; of many processes the first does."""
    if not parallel.first():
        yield ignore
        return
    with JsonLines(folder / EVENTS) as lines:
        yield fan(emit, lines)


class Layers(MutableMapping[int, list[Edit]]):
    """The edits of each finished layer, one file a layer, which is there whole or not at all."""

    def __init__(self, folder: Path, prefix: str) -> None:
        self._folder, self._prefix = folder, prefix

    def __getitem__(self, layer: int) -> list[Edit]:
        path = self._path(layer)
        if not path.exists():
            raise KeyError(layer)
        return list(editing.load(path).items)

    def __setitem__(self, layer: int, edits: list[Edit]) -> None:
        path = self._path(layer)
        part = path.with_suffix(".part")
        editing.save(edits, part)
        sync(part)
        part.rename(path)

    def sift(self) -> None:
        """Drops those that cannot be read: after a power cut a file may be there, and empty."""
        for path in self._files():
            try:
                editing.load(path)
            except InputError:
                path.unlink()

    def __delitem__(self, layer: int) -> None:
        self._path(layer).unlink()

    def __iter__(self) -> Iterator[int]:
        return (int(path.stem.removeprefix(self._prefix)) for path in self._files())

    def __len__(self) -> int:
        return len(self._files())

    def _files(self) -> list[Path]:
        return sorted(self._folder.glob(f"{self._prefix}*.safetensors"))

    def _path(self, layer: int) -> Path:
        return self._folder / f"{self._prefix}{layer:04d}.safetensors"
