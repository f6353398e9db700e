"""Finished measures: taken over whole, and left only where the next run can go on."""

import pytest

from ssmcompress.checkpoint.output import MARKER, output
from ssmcompress.errors import InputError, ResourceError
from ssmcompress.evaluate.finished import FOLDER, Measures
from ssmcompress.events import Note


def refuse():
    pytest.fail("measured again")


def test_what_is_finished_is_not_measured_again(tmp_path):
    events = []
    first = Measures(tmp_path, events.append)
    assert first.get("a/b", lambda: {"value": 0.1}) == {"value": 0.1} and not events
    second = Measures(tmp_path, events.append)
    assert second.get("a/b", refuse) == {"value": 0.1}
    assert [type(event) for event in events] == [Note] and "a__b" in events[0].text


def test_what_is_not_whole_is_measured_again(tmp_path):
    done = Measures(tmp_path, pytest.fail)
    with pytest.raises(KeyboardInterrupt):
        done.get("a", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    (tmp_path / FOLDER / "a.part").write_text('{"val')
    (tmp_path / FOLDER / "a.json").touch()  # as a power cut may leave it
    assert Measures(tmp_path, pytest.fail).get("a", lambda: 2) == 2


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ResourceError("full"), InputError("NaN"), RuntimeError("bug")])
def test_only_what_can_be_gone_on_with_is_left_whatever_failed(tmp_path, error):
    events = []
    settings = {"resumable": True, "whatever_fails": True, "recipe_hash": "abc"}
    with pytest.raises(type(error)), output(tmp_path / "out", **settings) as folder:
        (folder / "lm_eval").mkdir()
        done = Measures(folder, events.append)
        done.get("a", lambda: 1)
        (folder / "summary.json").write_text("half")
        with done.kept("lm_eval"):
            raise error
    assert {path.name for path in folder.iterdir()} == {FOLDER, "lm_eval", MARKER}
    told = [event.text for event in events]
    assert told == ["Finished and kept: a. The same command goes on from there."] * isinstance(error, Exception)


def test_nothing_is_left_where_nothing_is_finished_and_nothing_of_this_where_all_is(tmp_path):
    for name, stop in (("cut", KeyboardInterrupt), ("whole", None)):
        folder = tmp_path / name
        folder.mkdir()
        done = Measures(folder, pytest.fail)
        if stop:
            with pytest.raises(stop), done.kept():
                raise stop
            assert not any(folder.iterdir())
        else:
            with done.kept():
                done.get("a", lambda: 1)
                (folder / "summary.json").write_text("{}")
            assert [path.name for path in folder.iterdir()] == ["summary.json"]
