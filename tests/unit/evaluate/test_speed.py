"""Speed: turns, spreads and ratios by hand, FLOPs against torch's counter, and one real measurement."""

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from ssmcompress.checkpoint.source import load
from ssmcompress.errors import InputError
from ssmcompress.evaluate import speed as module
from ssmcompress.evaluate.peak import prefill
from ssmcompress.evaluate.speed import Ratio, Speed, Spread, flops, move, parsed, read, rounds, speed, tell
from ssmcompress.events import Advance, Note, Phase, Table
from tests.unit.arch.models import CONFIGS, stock
from tests.unit.checkpoint import folders

CASES = str.upper, str.lower


@pytest.fixture(scope="module", params=["mamba", "mamba2"])
def checkpoint(request, tmp_path_factory):
    path = tmp_path_factory.mktemp(request.param)
    folders.save(request.param, path)
    folders.narrow(path)
    return load(str(path), dtype=torch.float32)


def test_rounds_take_turns_and_drop_those_that_warm_up():
    now, calls = [0.0], []

    def work(name, seconds):
        calls.append(name)
        now[0] += seconds

    asked = {"A": lambda: work("A", 1.0), "B": lambda: work("B", 3.0)}
    events = []
    times = rounds(asked, 3, 2, clock=lambda: now[0], emit=events.append)
    assert "".join(calls) == "ABBAABBAAB"
    assert times == {"A": [1.0] * 3, "B": [3.0] * 3}
    assert events == [Advance()] * 5


def test_what_is_moved_runs_once_before_it_is_timed():
    calls = []
    work, moves = ({name: lambda name=name, case=case: calls.append(case(name)) for name in "AB"} for case in CASES)
    times = rounds(work, 1, 1, moves=moves)
    assert "".join(calls) == "abABAB" + "baBABA"
    assert [len(taken) for taken in times.values()] == [1, 1]


def test_moved_weights_are_the_same_elsewhere_and_still_tied(checkpoint):
    model = checkpoint.model
    values = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    pointer = model.lm_head.weight.data_ptr()
    move(model)
    assert all(torch.equal(weight, values[name]) for name, weight in model.named_parameters())
    assert model.lm_head.weight.data_ptr() != pointer
    tied = model.lm_head.weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()
    assert tied == model.config.tie_word_embeddings


def test_a_spread_is_median_and_quartiles():
    assert Spread.of([5.0, 1.0, 2.0, 4.0, 3.0]) == Spread(median=3.0, low=2.0, high=4.0)
    assert Spread.of([7.0]) == Spread(median=7.0, low=7.0, high=7.0)


def test_a_ratio_is_over_turns_so_that_drift_leaves_it_alone():
    drift = np.linspace(1, 9, 12)
    assert Ratio.of("decode", drift, 2 * drift) == Ratio(figure="decode", ratio=2.0, interval=(2.0, 2.0))
    assert Ratio.of("decode", [2.0], [3.0]) == Ratio(figure="decode", ratio=1.5, interval=None)
    noisy = Ratio.of("decode", [1.0, 1.0, 1.0, 1.0, 1.0], [1.0, 2.0, 3.0, 4.0, 5.0])
    assert (noisy.ratio, noisy.interval) == (3.0, (1.0, 5.0))


def test_the_interval_of_equals_holds_one():
    rng = np.random.default_rng(0)
    held = 0
    for seed in range(100):
        low, high = Ratio.of("decode", *rng.lognormal(0, 0.05, (2, 10)), seed=seed).interval
        held += low <= 1 <= high
    assert held >= 90


@pytest.mark.parametrize("length", [1, 24])
def test_flops_of_matrices_are_what_torch_counts(checkpoint, length):
    with FlopCounterMode(display=False) as counter:
        prefill(checkpoint.model, torch.ones(1, length, dtype=torch.long))
    counted = counter.get_flop_counts()["Global"]
    matrices = sum(counted.get(op, 0) for op in (torch.ops.aten.mm, torch.ops.aten.addmm))
    assert matrices == pytest.approx(length * flops(checkpoint.model, checkpoint.arch, length)["matrices"])


@pytest.mark.parametrize("name", ["mamba", "mamba2", "mamba-biased", "mamba2-grouped", "falcon_mamba"])
def test_flops_of_convolutions_and_states(name, tmp_path):
    folders.save(name, tmp_path)
    checkpoint = load(str(tmp_path), dtype=torch.float32)
    found, ids = flops(checkpoint.model, checkpoint.arch), torch.ones(1, 24, dtype=torch.long)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:  # stock pads at both ends and cuts the rest off
        stock(checkpoint.model)(ids, use_cache=False)
    padded = 24 + CONFIGS[name].conv_kernel - 1
    assert counter.get_flop_counts()["Global"][torch.ops.aten.convolution] == padded * found["convolutions"]
    with torch.no_grad():
        cache = checkpoint.model(ids, use_cache=True).cache_params
    states = sum(state.numel() for layer in cache.layers for state in layer.recurrent_states.values())
    assert found["scan"] == 5 * states


def test_a_model_against_itself(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "peak", lambda *_: (2000, 1000))  # its own tests measure it
    events = []
    found = speed(
        checkpoint, lengths=(16, 8, 16), decode_tokens=4, repetitions=3, against=checkpoint, emit=events.append
    )
    assert [each.length for each in found.model.prefill] == [8, 16]
    for side in (found.model, found.against):
        for spread in [side.decode_tokens_per_s, *(each.tokens_per_s for each in side.prefill)]:
            assert 0 < spread.low <= spread.median <= spread.high
        assert side.weight_bytes < side.weight_bytes_in_memory  # stored in bfloat16
        assert side.state_bytes == checkpoint.arch.state_bytes()
        assert (side.peak_memory_bytes, side.memory_before_bytes) == (2000, 1000)
    figures = ["prefill_8", "first_token_8", "prefill_16", "first_token_16", "decode"]
    assert [ratio.figure for ratio in found.ratios] == figures
    for ratio in found.ratios:
        assert ratio.interval[0] <= ratio.ratio <= ratio.interval[1] and ratio.ratio > 0
    assert (found.threads, found.device, found.repetitions) == (1, "cpu", 3) and set(found.backend) >= {"conv"}
    phases = [event for event in events if isinstance(event, Phase)]
    assert [phase.total for phase in phases] == [sum(isinstance(event, Advance) for event in events)]
    found.write(tmp_path)
    assert read(tmp_path) == found


def test_the_table_has_a_column_for_each_model_and_one_for_the_ratio(checkpoint, monkeypatch):
    monkeypatch.setattr(module, "peak", lambda *_: (2000, 1000))
    for against, columns in ((None, 2), (checkpoint, 4)):
        events = []
        tell(speed(checkpoint, lengths=[8], decode_tokens=1, repetitions=1, against=against), events.append)
        table, note = events
        assert isinstance(table, Table) and isinstance(note, Note) and "load" in note.text
        assert len(table.columns) == columns and {len(row) for row in table.rows} == {columns}
        told = [row[0] for row in table.rows]
        assert "prefill of 8, tokens/s" in told and "decode, tokens/s" in told and len(set(told)) == len(told)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lengths": ()}, "--lengths"),
        ({"lengths": (0, 5)}, "--lengths holds 0"),
        ({"batch": 0}, "batch"),
        ({"decode_tokens": 0}, "decode_tokens"),
        ({"repetitions": 0}, "repetitions"),
    ],
)
def test_sizes_below_one_are_refused(checkpoint, options, words):
    with pytest.raises(InputError, match=words):
        speed(checkpoint, **options)


def test_lengths_are_numbers_with_commas():
    assert parsed("128,512") == (128, 512) and parsed("64") == (64,)
    with pytest.raises(InputError, match="holds no numbers"):
        parsed("128;512")


def test_a_damaged_file_is_refused_and_none_is_none(tmp_path):
    assert read(tmp_path) is None
    for text in ("{", '{"schema_version": 1}'):
        (tmp_path / "speed.json").write_text(text)
        with pytest.raises(InputError, match=r"speed\.json"):
            read(tmp_path)


def test_unknown_fields_are_refused():
    with pytest.raises(ValueError, match="schema_version"):
        Speed.model_validate({"schema_version": 2})
