import io
import json
import math
import time

import pytest

from ssmcompress import events
from ssmcompress.events import (
    Advance,
    Failed,
    Finished,
    JsonLines,
    LayerDone,
    Metric,
    Note,
    Phase,
    Table,
    Terminal,
    fan,
    ignore,
    number,
)


class Screen(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def piped():
    out, err = io.StringIO(), io.StringIO()
    return Terminal(out, err), out, err


def test_events_are_plain_data():
    event = LayerDone(layer=0, layers=8, seconds=1.5, error=float("nan"), kept=0.5)
    assert event.to_dict() == {
        "event": "layer_done",
        "layer": 0,
        "layers": 8,
        "seconds": 1.5,
        "error": None,
        "kept": 0.5,
    }
    assert Table("t", ("a",), (("1",),)).to_dict() == {
        "event": "table",
        "title": "t",
        "columns": ["a"],
        "rows": [["1"]],
    }


def test_events_cannot_be_changed():
    with pytest.raises(AttributeError):
        Note("x").text = "y"


def test_fan_tells_all_listeners_in_order():
    heard = []
    emit = fan(lambda event: heard.append(("first", event)), ignore, lambda event: heard.append(("second", event)))
    emit(Note("x"))
    assert heard == [("first", Note("x")), ("second", Note("x"))]


def test_json_lines_append_to_a_file_with_the_time(tmp_path):
    path = tmp_path / "events.jsonl"
    before = time.time()
    for text in ("one", "zwei ½"):
        with JsonLines(path) as emit:
            emit(Note(text))
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [line["text"] for line in lines] == ["one", "zwei ½"]
    assert all(before - 1 <= line["time"] <= time.time() + 1 for line in lines)


def test_json_lines_leave_a_given_stream_open_and_never_write_nan():
    stream = io.StringIO()
    with JsonLines(stream) as emit:
        emit(Metric("perplexity", math.inf, low=1.0, high=math.nan))
    line = json.loads(stream.getvalue(), parse_constant=pytest.fail)
    assert (line["event"], line["value"], line["low"], line["high"]) == ("metric", None, 1.0, None)


def test_results_go_to_stdout_and_progress_to_stderr(piped):
    terminal, out, err = piped
    for event in (Phase("pruning", 2), LayerDone(0, 12, 1.234, 0.01234, 0.5), Advance(1), Note("a note")):
        terminal(event)
    terminal(Note("careful", level="warning"))
    terminal(Metric("bits_per_byte", 1.7123456, low=1.69, high=1.73))
    terminal(Finished("out/wanda50"))
    assert err.getvalue().splitlines() == [
        "pruning",
        "layer  1/12    1.23 s  error 0.0123  kept  50.0%",
        "a note",
        "warning: careful",
    ]
    metric, written = out.getvalue().splitlines()
    assert metric.split() == ["bits_per_byte", "1.712", "[1.690,", "1.730]"]
    assert written == "written: out/wanda50"


def test_a_layer_without_figures_has_none(piped):
    terminal, _, err = piped
    terminal(LayerDone(7, 8, 0.5))
    assert err.getvalue() == "layer 8/8    0.50 s\n"


def test_tables_align_numbers_to_the_right_and_never_wrap_in_a_pipe(piped):
    terminal, out, _ = piped
    long = "state-spaces/" + "m" * 150
    rows = (("dense", "1.712", "2,048", ""), (long, "12.80 [12.1, 13.0]", "16", "+3.1 %"))
    terminal(Table("Perplexity [held out]", ("model", "bits per byte", "documents", "change"), rows))
    title, header, rule, dense, pruned = out.getvalue().splitlines()[1:]
    assert title == "Perplexity [held out]"
    assert set(rule) == {"─"}
    assert dense.index("1.712") + len("1.712") == pruned.index("12.80 [12.1, 13.0]") + len("12.80 [12.1, 13.0]")
    assert dense.index("2,048") + len("2,048") == header.index("documents") + len("documents")
    assert dense.startswith("dense ") and pruned.startswith(long + " ")


def test_no_bars_and_no_colours_where_nobody_looks(piped):
    terminal, out, err = piped
    terminal(Phase("pruning", 100))
    terminal(Note("careful", level="warning"))
    terminal(Failed("wrong"))
    assert "\x1b" not in out.getvalue() + err.getvalue()
    assert "%" not in err.getvalue() and "━" not in err.getvalue()


def test_a_bar_on_a_terminal_is_gone_before_results(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.delenv("NO_COLOR", raising=False)
    screen = Screen()
    with Terminal(screen, screen) as terminal:
        terminal(Phase("observing and pruning", 2))
        terminal(LayerDone(0, 2, 0.1))
        terminal(Phase("writing", 4))
        terminal(Table("t", ("a",), (("1",),)))
        assert terminal._bar is None
    shown = screen.getvalue()
    assert "observing and pruning" in shown and "━" in shown and "layer 1/2" in shown and "writing" in shown


def test_a_failure_is_a_sentence_and_a_hint(piped):
    terminal, out, err = piped
    terminal(Failed("No model [x].", "Try ref:mamba."))
    assert (out.getvalue(), err.getvalue()) == ("", "error: No model [x].\nhint: Try ref:mamba.\n")


def test_a_reader_that_left_is_told_as_such():
    class Gone(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        Terminal(Gone(), io.StringIO())(Finished("out"))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (2_500_000, "2,500,000"),
        (2_500_000.0, "2,500,000"),
        (1.71234, "1.712"),
        (12.3456, "12.35"),
        (1234.5, "1,234"),
        (0.5, "0.5000"),
        (-3.2, "-3.200"),
        (1.5e-9, "1.5e-09"),
        (math.inf, "inf"),
    ],
)
def test_numbers_have_four_digits(value, text):
    assert number(value) == text


def test_cells_that_are_numbers_are_known():
    for cell in (
        "1",
        "-1.5",
        "+0.11 [0.1, 0.12]",
        "12.80 (11, 13)",
        "50.0%",
        "1e-05",
        "2,048",
        "3.1 GiB",
        "1.2×",
        "12 ms",
        "-1.6 points",
        "100.0% [94.3%, 100.0%]",
    ):
        assert events.NUMBER.fullmatch(cell), cell
    for cell in ("2:4", "ref:mamba", "4 cores of 8", "layer 3", "1.0.2-rc", "3 layers"):
        assert not events.NUMBER.fullmatch(cell), cell
