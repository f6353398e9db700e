"""The training run: it learns, it goes on where it was killed, and it says what is wrong."""

import copy
import shutil

import pytest
import torch
import torch.nn.functional as F

from ssmcompress.arch.registry import arch_for
from ssmcompress.arch.tunable import DRAWN, TUNABLE, install
from ssmcompress.errors import InputError, SsmcompressError
from ssmcompress.events import Advance, ignore
from ssmcompress.tune.examples import Example
from ssmcompress.tune.fit import batch, fit, score
from ssmcompress.tune.lora import wrap
from ssmcompress.tune.objective import IGNORED, Objective
from ssmcompress.tuning import TuneState
from tests.unit.arch import models

FAMILIES = ["mamba", "mamba2-grouped"]


def examples(count, seed=0):
    draw = torch.Generator().manual_seed(seed)
    made = []
    for index in range(count):
        length = int(torch.randint(4, 14, (), generator=draw))
        ids = torch.randint(1, 9, (length,), generator=draw)  # few words, so that there is something to learn
        made.append(Example(tuple(ids.tolist()), 3, 9, str(index), str(index)))
    return made


TRAIN, VALID = examples(40), examples(8, seed=1)


def alive(name):
    """A random model whose states hold something."""
    model = models.ours(name)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "mixer" in key and parameter.dim() == 2 and not key.endswith("A_log"):
                parameter.mul_(8)
    return model


def learning(name, step, seed=0):
    model = alive(name)
    arch = arch_for(model.config)
    torch.manual_seed(seed)
    if step.method == "lora":
        return model, wrap(model, arch, step)[0]
    return model, install(model, arch, step.method, step.form or "full", step.size)


@torch.no_grad()
def loss(model, teacher, rows, hidden):
    return float(Objective(model, teacher, hidden)(**rows))


def run(name, step, store, emit=ignore, lr=0.02, teacher=None, valid=VALID):
    model, learned = learning(name, step)
    store.mkdir(exist_ok=True)
    options = {"lr": lr, "seed": 0, "store": store, "emit": emit}
    course = fit(Objective(model, teacher, step.hidden or 0.0), learned, TRAIN, valid, step, **options)
    return model, learned, course


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("method", [*TUNABLE, "lora"])
def test_every_method_learns_and_nothing_else_moves(tmp_path, name, method):
    step = TuneState(method=method, data="-", steps=6, batch_size=4, every=3)
    dense = alive(name)
    before = -sum(nats for nats, _ in score(dense, TRAIN, 4)) / 120
    model, learned, course = run(name, step, tmp_path / "store", valid=TRAIN)
    assert [at for at, _ in course.validation] == [0, 3, 6]
    assert course.validation[0][1] == pytest.approx(before, rel=0.1 if method in DRAWN else 1e-5)
    assert course.best > 0 and dict(course.validation)[course.best] < before
    after = -sum(nats for nats, _ in score(model, TRAIN, 4)) / 120
    assert after == pytest.approx(dict(course.validation)[course.best], rel=1e-4)
    moved = dict(model.named_parameters())
    for key, parameter in dense.named_parameters():
        if key not in learned and key in moved:
            assert torch.equal(parameter, moved[key]), key


@pytest.mark.parametrize("method", ["state-offset", "lora"])
@pytest.mark.parametrize("killed", [1, 3, 4, 6, 8])
def test_a_killed_run_goes_on_to_the_same_weights(tmp_path, method, killed):
    step = TuneState(method=method, data="-", steps=9, batch_size=4, accumulate=2, every=2)
    _, expected, course = run("mamba", step, tmp_path / "whole")

    def kill(event):
        kill.steps += event.done if isinstance(event, Advance) else 0
        if kill.steps >= killed:
            raise KeyboardInterrupt

    kill.steps = 0
    with pytest.raises(KeyboardInterrupt):
        run("mamba", step, tmp_path / "killed", kill)
    _, found, again = run("mamba", step, tmp_path / "killed")
    assert {key: parameter.tolist() for key, parameter in found.items()} == {
        key: parameter.tolist() for key, parameter in expected.items()
    }
    assert (again.validation, again.loss, again.best) == (course.validation, course.loss, course.best)


def test_a_checkpoint_that_was_not_written_to_its_end_is_not_gone_on_from(tmp_path):
    step = TuneState(data="-", steps=4, batch_size=4, every=2)
    _, expected, _ = run("mamba", step, tmp_path / "store")
    last = tmp_path / "store" / "checkpoint-4"
    (last / "whole").unlink()
    (last / "optimizer.pt").write_bytes(b"half")
    _, found, _ = run("mamba", step, tmp_path / "store")
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_gradients_summed_over_batches_are_those_of_one_large_batch(tmp_path):
    ends = []
    for size, parts in ((8, 1), (2, 4)):
        step = TuneState(method="output-offset", data="-", steps=3, batch_size=size, accumulate=parts, every=3)
        ends.append(run("mamba2", step, tmp_path / str(size))[1])
    for key, one in ends[0].items():
        torch.testing.assert_close(one, ends[1][key], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_loss_counts_what_is_scored_and_nothing_else(name):
    model, rows = models.ours(name), batch([{"input_ids": each.ids, "scored": each.scored} for each in TRAIN[:5]])
    logits = model(rows["input_ids"], use_cache=False).logits
    expected = F.cross_entropy(
        logits[:, :-1].flatten(0, 1), rows["labels"][:, 1:].flatten(), ignore_index=IGNORED, reduction="sum"
    )
    torch.testing.assert_close(Objective(model)(**rows), expected)
    scored = score(model, TRAIN[:5], 2)
    assert -sum(nats for nats, _ in scored) == pytest.approx(expected.item(), rel=1e-4)


def test_a_model_is_no_distance_from_itself_and_learns_from_a_teacher(tmp_path):
    teacher, rows = models.ours("mamba", seed=1), batch([{"input_ids": each.ids, "scored": 3} for each in TRAIN[:5]])
    assert loss(teacher, copy.deepcopy(teacher), rows, 1.0) == pytest.approx(0, abs=1e-4)
    student = models.ours("mamba")
    apart = loss(student, teacher, rows, 0.5)
    assert apart > loss(student, teacher, rows, 0.0) > 0
    step = TuneState(method="full", data="-", steps=8, batch_size=8, every=8, objective="distill", hidden=0.5)
    model, _, _ = run("mamba", step, tmp_path / "store", lr=5e-3, teacher=teacher)
    assert loss(model, teacher, rows, 0.5) < 0.8 * apart


def test_less_memory_gives_the_same_weights(tmp_path):
    ends = []
    for checkpointing in (False, True):
        step = TuneState(data="-", steps=3, batch_size=4, every=3, checkpointing=checkpointing)
        ends.append(run("mamba", step, tmp_path / str(checkpointing))[1])
    for key, one in ends[0].items():
        torch.testing.assert_close(one, ends[1][key])


def test_a_loss_that_is_no_number_ends_the_run(tmp_path):
    step = TuneState(method="full", data="-", steps=9, batch_size=4, every=9)
    with pytest.raises(InputError, match=r"The loss is (nan|inf) at step \d") as error:
        run("mamba", step, tmp_path / "store", lr=1e8)
    assert "lower --lr than 1e+08" in error.value.hint


def test_a_tensor_that_nothing_is_learned_in_is_an_error(tmp_path):
    step = TuneState(data="-", steps=4, batch_size=4, every=4)
    model, learned = learning("mamba", step)
    idle = torch.nn.Parameter(torch.zeros(3))
    store = tmp_path / "store"
    store.mkdir()
    options = {"lr": 0.01, "seed": 0, "store": store, "emit": ignore}
    with pytest.raises(SsmcompressError, match="Nothing is learned in idle"):
        fit(Objective(model), learned | {"idle": idle}, TRAIN, VALID, step, **options)
    shutil.rmtree(store)
