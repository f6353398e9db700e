"""What a run would change, counted by hand."""

import pytest
import torch

from ssmcompress import plan as plan_function
from ssmcompress.arch.registry import arch_for
from ssmcompress.arch.surgery import Surgery
from ssmcompress.edits import Keep, Mask
from ssmcompress.errors import InputError, ResourceError, SsmcompressError, UnsupportedError
from ssmcompress.events import Note, Table
from ssmcompress.plan import expected_kept, forecast, records_of
from ssmcompress.prune.apply import BLOCK
from ssmcompress.prune.masks import n_of_m, unstructured
from ssmcompress.prune.sizes import Weights, figures
from ssmcompress.prune.targets import Target
from ssmcompress.steps import Cut, Prune, ReduceTokens
from tests.unit.arch.models import ALL, CONFIGS
from tests.unit.checkpoint import folders
from tests.unit.prune.test_sizes import weights


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("mamba")
    folders.save("mamba", path)
    return path


@pytest.mark.parametrize("shape", [(6, 10), (7, 33), (5, 3), (4, 300), (1, 1)])
@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.77])
def test_the_kept_share_is_that_of_the_masks(shape, sparsity):
    torch.manual_seed(0)
    score, size = torch.rand(shape), torch.Size(shape)
    for scope in ("row", "tensor"):
        found = expected_kept(size, "in_proj", Target(sparsity, None, scope), "wanda")
        assert found == pytest.approx(float(unstructured(score, sparsity, scope).double().mean()))
    blocks = [unstructured(part, sparsity, "tensor") for part in score.split(BLOCK, dim=1)]
    found = expected_kept(size, "in_proj", Target(sparsity, None, "row"), "sparsegpt")
    assert found == pytest.approx(float(torch.cat(blocks, dim=1).double().mean()))


@pytest.mark.parametrize("width", [1, 3, 4, 5, 7, 8, 33])
@pytest.mark.parametrize("pattern", [(2, 4), (1, 4), (4, 8), (1, 3)])
def test_the_kept_share_of_a_pattern_counts_its_ragged_group(width, pattern):
    found = expected_kept(torch.Size((6, width)), "in_proj", Target(0.5, pattern, "row"), "wanda")
    assert found == pytest.approx(float(n_of_m(torch.rand(6, width), *pattern).double().mean()))


def test_a_convolution_is_counted_as_it_is_pruned():
    shape = torch.Size((64, 1, 4))
    assert expected_kept(shape, "conv1d", Target(0.3, None, "tensor"), "wanda") == 1 - int(256 * 0.3) / 256
    assert expected_kept(shape, "conv1d", Target(0.3, (1, 4), "tensor"), "wanda") == 0.25


def test_the_counts_of_a_model(folder):
    found = plan_function(str(folder), sparsity=0.25)
    model = arch_for(CONFIGS["mamba"]).build()
    assert found.before == found.after and not found.sizes
    assert found.after.params == sum(parameter.numel() for parameter in model.parameters())
    assert found.after.weight_bytes == 4 * found.after.params
    assert found.after.state_bytes == arch_for(CONFIGS["mamba"]).state_bytes() == 4 * 2 * 64 * (5 + 3)
    rows = {"in_proj": (128, 32), "x_proj": (12, 64), "dt_proj": (64, 2), "out_proj": (32, 64)}
    assert found.zeros == 2 * sum(int(out * width * 0.25) for out, width in rows.values())
    statuses = {record.name: (record.status, record.reason) for record in found.tensors}
    assert statuses["backbone.layers.1.mixer.x_proj.weight"] == ("pruned", "")
    assert statuses["backbone.layers.0.mixer.conv1d.weight"] == ("kept", "not chosen")
    assert statuses["backbone.layers.0.mixer.A_log"] == ("kept", "on purpose")
    assert statuses["backbone.embeddings.weight"] == ("kept", "on purpose")


def test_what_forgets_is_no_zero(folder):
    events: list = []
    found = plan_function(str(folder), method="sparsessm", sparsity=0.3, emit=events.append)
    assert found.zeros == 0 and found.before == found.after
    records = {record.name: record for record in found.tensors}
    told = records["backbone.layers.1.mixer.A_log"]
    assert (told.status, told.kept) == ("memoryless", 1 - int(64 * 5 * 0.3) / 320) and told.nonzero == 1
    assert told.reason == "30.0% of the entries"
    for module in ("in_proj", "conv1d"):
        assert records[f"backbone.layers.0.mixer.{module}.weight"].status == "unsupported"
    assert any("memoryless" in event.text for event in events if isinstance(event, Note))
    both = plan_function(str(folder), method="magnitude", sparsity=0.25, include=("A_log", "out_proj"))
    assert both.zeros == 2 * int(32 * 64 * 0.25)


@pytest.mark.parametrize(
    ("name", "axis", "correct", "renewed"),
    [
        ("mamba2-grouped", "head", "refit", {"out_proj"}),
        ("mamba2-grouped", "head", "none", set()),
        ("mamba2-grouped", "group", "none", {"in_proj", "conv1d"}),
        ("mamba2-grouped", "group", "refit", {"in_proj", "conv1d", "out_proj"}),
        ("gated-mamba2", "group", "none", {"in_proj", "conv1d"}),
    ],
)
def test_zeros_that_new_values_may_fill_are_not_counted(name, axis, correct, renewed):
    """Those of the blocks that are cut: without a scan there are no groups to merge."""
    arch = arch_for(ALL[name])
    zeros = Prune(sparsity=0.5, include=("in_proj", "conv1d", "out_proj"))
    found = forecast(arch, [zeros, Cut(axis=axis, keep=0.5, correct=correct)], weights(name))
    layers = [layer for layer in range(arch.layers) if axis == "head" or arch.has_scan(layer)]
    gone = {arch.weight(layer, module) for layer in layers for module in renewed}
    every = {arch.weight(layer, module) for layer in range(2) for module in ("in_proj", "conv1d", "out_proj")}
    assert set(found.kept) == every - gone and gone <= found.anew


def test_it_reads_no_weight_and_writes_nothing(folder, monkeypatch):
    from ssmcompress.checkpoint.shards import Shards

    def read(self, name):
        raise AssertionError(f"{name} was read")

    before = sorted(folder.rglob("*"))
    monkeypatch.setattr(Shards, "__getitem__", read)
    plan_function(str(folder))
    assert sorted(folder.rglob("*")) == before


def test_it_refuses_what_prune_would_refuse(folder):
    with pytest.raises(InputError, match="N:M"):
        plan_function(str(folder), pattern="4:2")
    with pytest.raises(InputError, match="zzz"):
        plan_function(str(folder), include=("zzz",))
    with pytest.raises(UnsupportedError):
        plan_function(str(folder), method="sparsegpt", include=("conv1d",))


@pytest.mark.parametrize(
    ("override", "message"),
    [("eval.tasks=[arc_easy_lokal]", "arc_easy_lokal"), ("gate.max_drop={arc_hard: 0.1}", "arc_hard")],
)
def test_it_refuses_an_evaluation_that_run_would_refuse(override, message):
    with pytest.raises(SsmcompressError, match=message):
        plan_function("prune/wanda-50", [override])


def test_it_tells_what_changes_who_loads_it_and_what_is_covered(folder):
    events = []
    found = plan_function(str(folder), pattern="2:4", emit=events.append)
    tables = {event.title: event for event in events if isinstance(event, Table)}
    assert ("of them zero", "not counted", f"{found.zeros:,}") in tables["plan"].rows
    kinds = {row[0]: row[2:] for row in tables["coverage"].rows}
    assert kinds["mixer.in_proj.weight"] == ("pruned", "50.0%")
    assert kinds["mixer.conv1d.weight"] == ("kept: not chosen", "100.0%")
    notes = " ".join(event.text for event in events if isinstance(event, Note))
    assert "transformers and ssmcompress" in notes and "neither" in notes


def test_a_recipe_that_is_nearly_meant_is_suggested():
    for given, meant in (("prune/wanda50", "prune/wanda-50"), ("prune/sparsegpt-2:4", "prune/sparsegpt-2-4")):
        with pytest.raises((InputError, ResourceError)) as error:
            plan_function(given)
        assert error.value.hint == f"Did you mean the recipe {meant!r}?"
    with pytest.raises((InputError, ResourceError)) as error:
        plan_function("state-spaces/mamba")
    assert "recipe" not in error.value.hint


def test_records_cover_every_tensor_once():
    arch = arch_for(CONFIGS["mamba2"])
    shapes = {name: parameter.shape for name, parameter in arch.build().named_parameters()}
    mask = Mask("backbone.layers.0.mixer.in_proj.weight", torch.ones(1, dtype=torch.bool))
    records = records_of(Surgery(arch, ()), shapes, {mask.tensor: 0.25})
    assert [record.name for record in records] == list(shapes)
    assert [(record.name, record.kept) for record in records if record.status == "pruned"] == [(mask.tensor, 0.25)]


@pytest.mark.parametrize("correct", ["none", "bias", "refit"])
def test_a_step_that_removes_nothing_changes_nothing(correct):
    arch = arch_for(CONFIGS["mamba"])
    found = forecast(arch, [Prune(sparsity=0.5), Cut(axis="channel", keep=1, correct=correct)], weights("mamba"))
    alone = forecast(arch, [Prune(sparsity=0.5)], weights("mamba"))
    assert found.stock and (found.kept, found.anew) == (alone.kept, alone.anew)
    assert (found.sizes[0].before, found.sizes[0].after) == (64, 64)
    assert figures(found.surgery, weights("mamba")) == figures(Surgery(arch, ()), weights("mamba"))


@pytest.mark.parametrize("scan", [0, 1])
def test_the_last_scan_is_there_for_later_steps(scan):
    """Whichever block it is in, two steps later its states can be cut."""
    arch = arch_for(CONFIGS["mamba"])
    one = Surgery(arch, [Keep("ssm", None, torch.arange(2) == scan)])
    steps = [Cut(axis="layer", keep=0.5), Cut(axis="state", keep=2)]
    found = forecast(one.arch, steps, weights("mamba").after(one))
    assert [block["state"] for block in found.surgery.arch.sizes] == [2]


def test_a_model_of_which_tokens_leave_loses_blocks_one_step_after_the_other():
    arch = arch_for(CONFIGS["mamba"])
    arch = arch_for(arch.resized([arch.sizes[0]] * 6))
    shapes = {name: parameter.shape for name, parameter in arch.build().named_parameters()}
    steps = [ReduceTokens(layers=(1, 4), keep=0.8), Cut(axis="layer", keep=4), Cut(axis="layer", keep=2)]
    found = forecast(arch, steps, Weights(shapes, dict.fromkeys(shapes, 2)))
    assert found.surgery.arch.layers == 2 and found.surgery.arch.policy.layers == (0,)


@pytest.mark.parametrize(
    ("name", "steps", "apart", "exact"),
    [
        ("mamba", [{"axis": "ssm", "keep": 0.5}], set(), True),
        ("mamba", [{"axis": "ssm", "keep": 0.5}, {"axis": "state", "keep": 2}], set(), True),
        ("mamba", [{"axis": "state", "keep": 4, "scope": "model"}], {"state"}, True),
        ("mamba", [{"axis": "state", "keep": 4, "scope": "model"}, {"axis": "ssm", "keep": 0.5}], {"state"}, False),
        ("mamba", [{"axis": "ssm", "keep": 0.5}, {"axis": "layer", "keep": 0.5}], {"ssm"}, False),
        (
            "mamba",
            [{"axis": "ssm", "keep": 0.5}, {"axis": "layer", "keep": 0.5}, {"axis": "state", "keep": 2}],
            {"ssm"},
            False,
        ),
        ("gated-mamba", [{"axis": "width", "keep": 24}], set(), True),
        ("pruned-mamba", [{"axis": "layer", "keep": 0.5}], {"channel", "state", "dt_rank"}, False),
    ],
)
def test_a_forecast_knows_whether_it_depends_on_what_is_chosen(name, steps, apart, exact):
    found = forecast(arch_for(ALL[name]), [Cut(**step) for step in steps], weights(name))
    assert found.exact == exact and found.apart == apart
