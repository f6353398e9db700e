import os
import subprocess
import sys

import pytest

from ssmcompress.kernels import library, native

FLAGS = ("-shared", "-fPIC")
pytestmark = pytest.mark.skipif(not native.available()[0], reason=native.available()[1])


@pytest.fixture
def source(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("CC", raising=False)
    source = tmp_path / "answer.c"
    source.write_text("int answer(void) { return 42; }\n")
    return source


def kept(tmp_path):
    return sorted(path for path in (tmp_path / "cache").rglob("*") if path.is_file())


def right(built):
    return "" if built.answer() == 42 else f"the answer was {built.answer()}"


def never(built):
    raise AssertionError("built again")


def test_a_library_is_built_once_and_used_again(source, tmp_path):
    assert library.load(source, FLAGS, right)[0].answer() == 42
    assert [path.suffix for path in kept(tmp_path)] == [".sha256", ".so"]
    assert library.load(source, FLAGS, never)[0].answer() == 42


@pytest.mark.parametrize("change", ["source", "flags"])
def test_a_change_builds_another(source, tmp_path, change):
    library.load(source, FLAGS, right)
    if change == "source":
        source.write_text(source.read_text() + "\n")
    library.load(source, (*FLAGS, "-O1") if change == "flags" else FLAGS, right)
    assert len(kept(tmp_path)) == 4


@pytest.mark.parametrize("damage", [b"", b"not a library", None])
def test_a_damaged_library_is_built_again(source, tmp_path, damage):
    library.load(source, FLAGS, right)
    note, path = kept(tmp_path)
    if damage is None:
        note.unlink()
    else:
        path.unlink()  # the process still maps the old file
        path.write_bytes(damage)
    assert library.load(source, FLAGS, right)[0].answer() == 42
    assert len(kept(tmp_path)) == 2


def test_a_library_that_fails_its_check_is_not_kept(source, tmp_path):
    source.write_text("int answer(void) { return 41; }\n")
    assert library.load(source, FLAGS, right) == (None, "the answer was 41")
    assert kept(tmp_path) == []


def test_without_a_writable_cache_it_is_built_privately(source, tmp_path):
    (tmp_path / "cache").write_text("a file where the folder should be")
    assert library.load(source, FLAGS, right)[0].answer() == 42


def test_without_a_compiler_it_says_so(source, monkeypatch):
    monkeypatch.setenv("PATH", "")
    loaded, reason = library.load(source, FLAGS, right)
    assert loaded is None
    assert reason == "there is no C compiler (cc, gcc, clang) on the PATH"
    native._library.cache_clear()
    try:
        assert native.available() == (False, reason)
    finally:
        native._library.cache_clear()


def test_a_compiler_that_fails_is_told(source, monkeypatch, tmp_path):
    broken = tmp_path / "cc"
    broken.write_text("#!/bin/sh\necho 'cannot compile' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CC", str(broken))
    loaded, reason = library.load(source, FLAGS, right)
    assert loaded is None
    assert reason == f"{broken} could not build or load answer.c (cannot compile)"
    assert kept(tmp_path) == []


def test_what_does_not_compile_is_told(source, tmp_path):
    source.write_text("int answer(void) { return forty_two; }\n")
    loaded, reason = library.load(source, FLAGS, right)
    assert loaded is None
    assert "answer.c" in reason
    assert kept(tmp_path) == []


def test_two_processes_at_once_keep_one_library(source, tmp_path):
    code = (
        "import pathlib, sys; from ssmcompress.kernels import library;"
        f"loaded, reason = library.load(pathlib.Path(sys.argv[1]), {FLAGS!r}, lambda built: '');"
        "sys.exit(reason or (0 if loaded.answer() == 42 else 1))"
    )
    running = [
        subprocess.Popen([sys.executable, "-c", code, str(source)], env=os.environ | {"PYTHONPATH": "."})
        for _ in range(2)
    ]
    assert [process.wait(timeout=60) for process in running] == [0, 0]
    assert [path.suffix for path in kept(tmp_path)] == [".sha256", ".so"]
    assert library.load(source, FLAGS, never)[0].answer() == 42
