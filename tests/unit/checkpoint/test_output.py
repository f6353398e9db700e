"""The output folder: whole under its name or not there, one writer, nothing of anybody else's deleted."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from ssmcompress.checkpoint import shards
from ssmcompress.checkpoint.output import CHECKPOINT, COMPARISON, RESULTS, carry, output, write
from ssmcompress.checkpoint.source import load, resolve
from ssmcompress.errors import InputError, ResourceError
from ssmcompress.events import Note
from tests.unit.checkpoint.folders import save


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def finish(folder: Path, text: str = "{}", **options: object) -> None:
    with output(folder, **{"marked": RESULTS} | options) as partial:  # type: ignore[arg-type]
        (partial / "config.json").write_text(text)
        (partial / str(options.get("marked", RESULTS))).write_text('{"schema_version": 1}')


def test_written_under_another_name_then_renamed(tmp_path: Path) -> None:
    final = tmp_path / "deep" / "out"
    with output(final) as partial:
        (partial / "config.json").write_text("{}")
        assert partial == tmp_path / "deep" / "out.partial" and not final.exists()
    assert names(tmp_path / "deep") == ["out"] and names(final) == ["config.json"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, InputError])
def test_a_failure_leaves_nothing(error: type[BaseException], tmp_path: Path) -> None:
    with pytest.raises(error), output(tmp_path / "out") as partial:
        (partial / "config.json").write_text("{}")
        raise error("stop")
    assert names(tmp_path) == []


def test_a_failed_overwrite_keeps_the_old(tmp_path: Path) -> None:
    finish(tmp_path / "out", "old")
    with pytest.raises(KeyboardInterrupt), output(tmp_path / "out", marked=RESULTS, overwrite=True):
        raise KeyboardInterrupt
    assert names(tmp_path) == ["out"] and (tmp_path / "out" / "config.json").read_text() == "old"


def test_a_failed_rename_brings_the_old_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finish(tmp_path / "out", "old")
    rename = Path.rename

    def fail(self: Path, target: Path) -> Path:
        if self.name == "out.partial":
            raise OSError(errno.EACCES, "denied", str(self))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(ResourceError, match="permission"):
        finish(tmp_path / "out", "new", overwrite=True)
    assert names(tmp_path) == ["out"] and (tmp_path / "out" / "config.json").read_text() == "old"


def test_existing_output_is_refused_unless_overwritten(tmp_path: Path) -> None:
    finish(tmp_path / "out", "old")
    with pytest.raises(InputError) as caught:
        finish(tmp_path / "out", "new")
    assert "--overwrite" in caught.value.hint and caught.value.exit_code == 2
    finish(tmp_path / "out", "new", overwrite=True)
    assert names(tmp_path) == ["out"] and (tmp_path / "out" / "config.json").read_text() == "new"


def test_an_empty_folder_is_no_output_yet(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    finish(tmp_path / "out")
    assert names(tmp_path / "out") == ["config.json", "summary.json"]


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_what_is_not_ours_is_never_replaced(kind: str, tmp_path: Path) -> None:
    if kind == "folder":
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "thesis.tex").write_text("years")
    else:
        (tmp_path / "out").write_text("years")
    with pytest.raises(InputError, match="does not look like"):
        finish(tmp_path / "out", overwrite=True)
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("old", [CHECKPOINT, RESULTS, COMPARISON])
@pytest.mark.parametrize("new", [CHECKPOINT, RESULTS, COMPARISON])
def test_only_an_output_of_the_same_kind_is_replaced(old: str, new: str, tmp_path: Path) -> None:
    finish(tmp_path / "out", "old", marked=old)
    if old == new:
        return finish(tmp_path / "out", "new", marked=new, overwrite=True)
    with pytest.raises(InputError, match="is not replaced by"):
        finish(tmp_path / "out", "new", marked=new, overwrite=True)
    assert names(tmp_path) == ["out"] and (tmp_path / "out" / "config.json").read_text() == "old"


def test_a_checkpoint_with_results_in_it_is_a_checkpoint(tmp_path: Path) -> None:
    finish(tmp_path / "out", marked=CHECKPOINT)
    (tmp_path / "out" / RESULTS).write_text('{"schema_version": 1}')
    with pytest.raises(InputError, match="holds a checkpoint"):
        finish(tmp_path / "out", overwrite=True)


def test_a_second_writer_is_refused(tmp_path: Path) -> None:
    with output(tmp_path / "out") as partial:
        (partial / "config.json").write_text("{}")
        with pytest.raises(ResourceError, match="Another run") as caught:
            finish(tmp_path / "out", overwrite=True)
        assert caught.value.exit_code == 4
        finish(tmp_path / "other")
    assert names(tmp_path) == ["other", "out"]


KILLED = """
import os, sys
from ssmcompress.checkpoint.output import output
with output(sys.argv[1], recipe_hash="abc", resumable=True) as partial:
    (partial / "half").write_text("half")
    os.kill(os.getpid(), 9)
"""


def test_a_killed_run_blocks_nobody_and_may_be_resumed(tmp_path: Path) -> None:
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "out")], cwd=Path.cwd(), check=False)
    assert killed.returncode == -signal.SIGKILL and not (tmp_path / "out").exists()
    with pytest.raises(KeyboardInterrupt), output(tmp_path / "out", recipe_hash="abc", resumable=True) as partial:
        assert (partial / "half").read_text() == "half"
        raise KeyboardInterrupt
    with output(tmp_path / "out", recipe_hash="abc", resumable=True) as partial:
        assert (partial / "half").exists()
    assert names(tmp_path) == ["out"] and names(tmp_path / "out") == ["half"]


def test_a_reader_who_leaves_costs_nothing_that_was_finished(tmp_path: Path) -> None:
    with pytest.raises(BrokenPipeError), output(tmp_path / "out", recipe_hash="abc", resumable=True) as partial:
        (partial / "half").write_text("half")
        raise BrokenPipeError
    assert (partial / "half").exists()


@pytest.mark.parametrize(
    ("error", "settings", "left"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), {}, True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), {}, True),
        (MemoryError(), {}, True),
        (InputError("NaN"), {}, False),
        (InputError("NaN"), {"whatever_fails": True}, True),
    ],
)
def test_what_is_left_depends_on_what_failed(error: Exception, settings: dict, left: bool, tmp_path: Path) -> None:
    given = {"recipe_hash": "abc", "resumable": True} | settings
    with pytest.raises(type(error)), output(tmp_path / "out", **given) as partial:
        (partial / "half").write_text("half")
        raise error
    assert (partial / "half").exists() == left


@pytest.mark.parametrize("again", [{}, {"recipe_hash": "other", "resumable": True}, {"recipe_hash": "abc"}])
def test_another_recipe_starts_afresh(again: dict, tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / ".recipe").write_text("abc")
    (tmp_path / "out.partial" / "half").write_text("half")
    with output(tmp_path / "out", **again) as partial:
        assert not (partial / "half").exists()
        (partial / "config.json").write_text("{}")
    assert names(tmp_path / "out") == ["config.json"]


def test_what_goes_is_said_and_a_mistake_costs_nothing_that_was_finished(tmp_path: Path) -> None:
    def begun(again: str, error: BaseException) -> list[str]:
        heard: list[object] = []
        told = {"recipe_hash": again, "resumable": True, "emit": heard.append}
        with pytest.raises(type(error)), output(tmp_path / "out", **told) as folder:  # type: ignore[arg-type]
            (folder / "half").write_text("1")
            raise error
        return [event.text for event in heard if isinstance(event, Note)]

    assert begun("a", KeyboardInterrupt("stop")) == []
    assert begun("a", InputError("There is no file.")) == [] and (tmp_path / "out.partial/half").exists()
    assert ["of another recipe" in text for text in begun("b", InputError("There is no file."))] == [True]
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("kind", ["file", "fifo", "link", "dangling", "marker", "lock", "linked lock"])
def test_odd_things_in_the_way_are_said_and_left(tmp_path: Path, kind: str) -> None:
    place, lock = tmp_path / "out.partial", tmp_path / ".out.lock"
    match kind:
        case "file":
            place.write_text("1")
        case "fifo":
            os.mkfifo(place)
        case "link" | "dangling":
            place.symlink_to(tmp_path / "elsewhere")
            if kind == "link":
                (tmp_path / "elsewhere").mkdir()
        case "marker":
            (place / ".recipe").mkdir(parents=True)
        case "lock":
            lock.mkdir()
        case _:
            lock.symlink_to(tmp_path)
    before = names(tmp_path)
    with pytest.raises((InputError, ResourceError), match="in the way"), output(tmp_path / "out"):
        pass
    assert names(tmp_path) == before


def test_a_marker_that_is_no_text_is_one_of_another_run(tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial/.recipe").write_bytes(b"\xff\x00")
    finish(tmp_path / "out", recipe_hash="a", resumable=True)
    assert names(tmp_path) == ["out"]


def test_a_kill_between_the_last_renames_is_mended(tmp_path: Path) -> None:
    finish(tmp_path / "out.replaced", "old")
    with pytest.raises(InputError, match="exists already"):
        finish(tmp_path / "out", "new")
    assert names(tmp_path) == ["out"] and (tmp_path / "out" / "config.json").read_text() == "old"


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES, errno.EDQUOT, errno.EROFS])
def test_a_lack_of_the_machine_is_said_as_one(code: int, tmp_path: Path) -> None:
    with pytest.raises(ResourceError) as caught, output(tmp_path / "out"):
        raise OSError(code, os.strerror(code), "weights")
    assert caught.value.exit_code == 4 and "weights" in caught.value.message
    assert names(tmp_path) == []


def test_a_full_disk_as_safetensors_tells_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    save("mamba", tmp_path / "in")
    checkpoint = load(str(tmp_path / "in"))
    monkeypatch.setattr(shards, "save_file", full)
    with pytest.raises(ResourceError, match="No space left"), output(tmp_path / "out") as partial:
        write(checkpoint, partial)
    assert names(tmp_path) == ["in"]


def test_what_travels_with_every_output(tmp_path: Path) -> None:
    save("mamba2", tmp_path / "in", tokenizer=True)
    (tmp_path / "in" / "LICENSE").write_text("free")
    (tmp_path / "in" / "chat_template.jinja").write_text("{{ messages }}")
    (tmp_path / "in" / "modeling_evil.py").write_text("raise SystemExit")
    checkpoint = load(str(tmp_path / "in"))
    state = {name: tensor * 0 for name, tensor in checkpoint.stored.items()}
    with output(tmp_path / "out", source=checkpoint.source) as partial:
        write(checkpoint, partial, state)
    assert names(tmp_path / "out") == sorted({*names(tmp_path / "in"), "config.json"} - {"modeling_evil.py"})
    for name in set(names(tmp_path / "out")) - {"config.json", "model.safetensors"}:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "in" / name).read_bytes()
    written = load(str(tmp_path / "out"))
    assert all(torch.equal(tensor, torch.zeros_like(tensor)) for tensor in written.model.state_dict().values())
    assert written.model.config.to_dict() == checkpoint.model.config.to_dict()


def test_a_full_disk_is_told_by_the_file_that_is_written(tmp_path: Path, full_disk) -> None:
    save("mamba", tmp_path / "in")
    (tmp_path / "in" / "tokenizer.json").write_text("x" * 5000)
    source = resolve(str(tmp_path / "in"))
    with pytest.raises(ResourceError) as caught, output(tmp_path / "out") as folder, full_disk(1000):
        carry(source, folder)
    assert "out.partial/tokenizer.json" in caught.value.message and "/in/" not in caught.value.message


def test_impossible_places(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for out in (Path("/"), tmp_path / "file" / "out", Path("/dev/null/out")):
        with pytest.raises(InputError, match="cannot be a folder"):
            finish(out, overwrite=True)


def test_output_over_its_source_is_refused(tmp_path: Path) -> None:
    save("mamba", tmp_path / "models" / "in")
    source = load(str(tmp_path / "models" / "in")).source
    for out in (tmp_path / "models", tmp_path / "models" / "in"):
        with pytest.raises(InputError, match="holds the model"):
            finish(out, overwrite=True, source=source)
    assert load(str(tmp_path / "models" / "in"))


def test_a_folder_of_somebody_else_is_never_replaced(tmp_path: Path) -> None:
    project = tmp_path / "project"
    project.mkdir()
    (project / "config.json").write_text('{"port": 80}')
    with pytest.raises(InputError, match="does not look like"):
        finish(project, overwrite=True)
    assert names(project) == ["config.json"]


@pytest.mark.parametrize("ending", [".partial", ".replaced"])
def test_a_neighbour_with_our_ending_is_left_alone(tmp_path: Path, ending: str) -> None:
    neighbour = tmp_path / f"out{ending}"
    neighbour.mkdir()
    (neighbour / "thesis.txt").write_text("precious")
    with pytest.raises(InputError):
        finish(tmp_path / "out")
    assert names(neighbour) == ["thesis.txt"]


def test_files_have_the_mode_the_umask_grants(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with output(tmp_path / "out") as partial:
            (partial / "model.safetensors").touch(mode=0o600)
    finally:
        os.umask(before)
    assert (tmp_path / "out" / "model.safetensors").stat().st_mode & 0o777 == 0o640
