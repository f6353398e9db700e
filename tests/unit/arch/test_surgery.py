"""Removing units: what is left computes what the dense model with those units silent does."""

import itertools
from dataclasses import replace

import pytest
import torch

from ssmcompress import edits
from ssmcompress.arch.base import BIAS
from ssmcompress.arch.masked import mask
from ssmcompress.arch.registry import arch_for
from ssmcompress.arch.surgery import Surgery
from ssmcompress.edits import Add, Keep, Mask, Replace
from ssmcompress.errors import InputError, UnsupportedError
from ssmcompress.steps import LAYER, SSM, WIDTH
from tests.unit.arch import models
from tests.unit.arch.models import ALL

AXES = [(name, axis) for name, config in ALL.items() for axis in (*arch_for(config).axes(), WIDTH, SSM, LAYER)]
AXES.remove(("falcon_mamba", SSM))  # no config says it


def chosen(arch, axis, seed=0):
    """Half of the units of every layer, at random, as many in every group of heads."""
    if axis in (LAYER, SSM):
        return [Keep(axis, None, torch.arange(arch.layers) != (seed + (axis == SSM)) % arch.layers)]
    if axis == WIDTH:
        ranks = torch.rand(arch.width, generator=torch.Generator().manual_seed(seed)).argsort().argsort()
        return [Keep(WIDTH, None, ranks < arch.width - 8)]
    generator = torch.Generator().manual_seed(seed)
    keeps = []
    for layer in range(arch.layers):
        if not (size := arch.sizes[layer][axis]):
            continue
        parts = {"head": getattr(arch.config, "n_groups", 1), "group": max(1, size // 2)}.get(axis, 1)
        ranks = torch.rand(parts, size // parts, generator=generator).argsort(1).argsort(1)
        keeps.append(Keep(axis, layer, (ranks < -(-size // parts // 2)).flatten()))
    return keeps


def close(found, wanted):
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def masked(name, keeps):
    twin = models.ours(name)
    mask(twin, arch_for(ALL[name]), keeps)
    return twin


def rotations(arch, fewer=3, seed=0):
    """Random bases for the states of every layer, of which those of B and C are each other's inverse."""
    generator, made = torch.Generator().manual_seed(seed), []
    for layer in range(arch.layers):
        B, C = torch.randn(2, arch.sizes[layer]["group"], fewer, arch.sizes[layer]["state"], generator=generator) / 2
        C = torch.linalg.solve(C @ B.mT, C)
        made += [Add(arch.prefix(layer) + f"mixer.rotation.{name}", values) for name, values in (("B", B), ("C", C))]
    return made


@pytest.mark.parametrize(("name", "axis"), AXES)
def test_removed_equals_masked(name, axis):
    equal(name, chosen(arch_for(ALL[name]), axis))


@pytest.mark.parametrize("name", ["mamba2", "mamba2-grouped", "mamba2-limited", "pruned-mamba2-grouped"])
def test_rotated_equals_projected(name):
    arch = arch_for(ALL[name])
    equal(name, rotations(arch))
    equal(name, [*chosen(arch, "head"), *rotations(arch)])


@pytest.mark.parametrize("name", ["mamba2-limited", "merged-mamba2"])
def test_what_is_cut_beside_groups_equals_masked(name):
    """Heads, states and channels, in this order and that; and the states of the groups that stay rotated."""
    arch = arch_for(ALL[name])
    groups = chosen(arch, "group")
    others = [edit for axis in ("head_channel", "state", "head") for edit in chosen(arch, axis, seed=3)]
    equal(name, [*groups, *others])
    equal(name, [*others, *groups])
    equal(name, [*groups, *rotations(arch, fewer=2)])


@torch.no_grad()
def test_every_head_reads_the_group_of_its_run():
    """Against rows copied by hand: of eight groups the second of each pair stays."""
    model, twin, ids = models.ours("mamba2-limited"), models.ours("mamba2-limited"), models.tokens(2, 21)
    keep = torch.tensor([False, True] * 4)
    small = Surgery(arch_for(model.config), [Keep("group", layer, keep) for layer in range(2)]).operate(model)
    for block in twin.backbone.layers:
        mixer = block.mixer
        for start in (64, 64 + 8 * 4):  # of B and of C among x, B and C
            for group, n in itertools.product(range(0, 8, 2), range(4)):
                gone, stays = start + 4 * group + n, start + 4 * (group + 1) + n
                for tensor, before in (
                    (mixer.in_proj.weight, 64),
                    (mixer.in_proj.bias, 64),
                    (mixer.conv1d.weight, 0),
                    (mixer.conv1d.bias, 0),
                ):
                    tensor[before + gone] = tensor[before + stays]
    close(small(ids).logits, twin(ids).logits)
    assert small.config.n_groups == 8 and [sizes["group"] for sizes in small.config.block_sizes] == [4, 4]


def test_a_merged_group_learns_from_all_that_read_it():
    """The gradient of a row that stays is the sum of those of the rows of its run in the masked model."""
    model = models.ours("mamba2-limited")
    arch, ids = arch_for(model.config), models.tokens(2, 15)
    keeps = chosen(arch, "group")
    surgery = Surgery(arch, keeps)
    small, twin = surgery.operate(model), masked("mamba2-limited", keeps)
    for each in (small, twin):
        each.train()(ids, labels=ids).loss.backward()
    axis, names = arch.axes()["group"], surgery.names(dict(model.named_parameters()))
    for new, parameter in small.named_parameters():
        whole, tensor = twin.get_parameter(names[new]).grad, new.split(".", 3)[-1]
        for part in axis.slices if "layers" in new else ():
            if part.tensor == tensor:
                keep = keeps[int(new.split(".")[2])].keep
                for start in range(0, axis.size, 2):
                    owned = [whole[part.indices(unit)] for unit in (start, start + 1)]
                    stays = start + int(keep[start + 1])
                    whole[part.indices(stays)] = owned[0] + owned[1]
        close(parameter.grad, surgery.cut(names[new], whole))


@pytest.mark.parametrize("name", ["mamba2-limited", "merged-mamba2"])
def test_groups_merge_step_by_step(name):
    """Half and half again, with heads' states cut between and a mask after, is what the lifted edits do at once."""
    model = models.ours(name)
    arch, shapes = arch_for(model.config), {key: tensor.shape for key, tensor in model.named_parameters()}
    small, found = model, []
    for axis, seed in (("group", 0), ("state", 1), ("group", 2)):
        surgery, now = Surgery(arch, found), arch_for(small.config)
        keeps = chosen(now, axis, seed)
        small = Surgery(now, keeps).operate(small)
        found = edits.compose(found, [surgery.lift(edit, shapes) for edit in keeps])
    whole = Surgery(arch, found)
    marks = [Mask(key, torch.rand(p.shape) < 0.5) for key, p in small.named_parameters() if "mixer.in_proj" in key]
    edits.apply(marks, dict(small.named_parameters()))
    found = edits.compose(found, [whole.lift(edit, shapes) for edit in marks])
    edits.apply(found, dict(model.named_parameters()))
    again = Surgery(arch, found).operate(model)
    assert again.config.block_sizes == small.config.block_sizes
    assert [sizes.get("group") for sizes in small.config.block_sizes] == (
        [2, 2] if name == "mamba2-limited" else [1, 1]
    )
    for (key, one), (other, two) in itertools.zip_longest(again.named_parameters(), small.named_parameters()):
        assert key == other and torch.equal(one, two), key


@pytest.mark.parametrize(
    ("axis", "kept"),
    [("group", [0, 1]), ("group", [0, 1, 2]), ("group", [0, 2, 4, 5]), ("head", [*range(7)])],
)
def test_units_that_stay_unevenly_are_refused(axis, kept):
    keep = torch.zeros(8, dtype=torch.bool).index_fill(0, torch.tensor(kept), True)
    with pytest.raises(InputError, match=rf"layers\.1\.{axis} unevenly") as refused:
        Surgery(arch_for(ALL["mamba2-limited"]), [Keep(axis, 1, keep)])
    assert refused.value.exit_code == 2


def test_groups_go_with_their_scan():
    arch = arch_for(ALL["mamba2-grouped"])
    left = Surgery(arch, [*chosen(arch, "group"), *chosen(arch, SSM)]).arch
    assert [sizes["group"] for sizes in left.sizes] == [1, 0]
    assert [sizes.get("group") for sizes in left.config.block_sizes] == [1, None]
    equal("mamba2-grouped", [*chosen(arch, "group"), *chosen(arch, SSM)])


def equal(name, edits):
    model = models.ours(name)
    small, twin, ids = Surgery(arch_for(model.config), edits).operate(model), masked(name, edits), models.tokens(2, 21)
    with torch.no_grad():
        close(small(ids).logits, twin(ids).logits)
        caches = [each(ids[:, :9], use_cache=True).cache_params for each in (small, twin)]
        for t in range(9, 21):
            steps = [
                each(ids[:, t : t + 1], cache_params=cache, use_cache=True).logits
                for each, cache in zip((small, twin), caches, strict=True)
            ]
            close(*steps)
        close(steps[0][:, 0], small(ids).logits[:, -1])
    written = [each.generate(ids[:, :5], max_new_tokens=8, do_sample=False, pad_token_id=0) for each in (small, twin)]
    assert torch.equal(*written)


@pytest.mark.parametrize(("name", "axis"), AXES)
def test_the_counts_are_those_of_the_closed_forms(name, axis):
    model = models.ours(name)
    arch = arch_for(model.config)
    keeps = chosen(arch, axis)
    smaller = Surgery(arch, keeps).arch
    small = Surgery(arch, keeps).operate(model)
    before, after = (sum(p.numel() for p in each.parameters()) for each in (model, small))
    if axis == LAYER:
        assert before - after == sum(p.numel() for p in arch.blocks(model)[0].parameters())
        first = arch_for(arch.resized(arch.sizes[:1], rotated=arch.rotated[:1]))
        assert smaller.state_bytes() == arch.state_bytes() - first.state_bytes()
        return
    gone = scan_parameters(arch) if axis == SSM else 0
    if axis == WIDTH:
        shapes = {key: p.shape for key, p in model.named_parameters()}
        residual = [part for part in arch.residual().slices if "backbone" in part.tensor or part.tensor in shapes]
        gone = 8 * replace(arch.residual(), slices=residual).parameters(shapes)
        for block in arch.blocks(model):
            gone += 8 * (1 + len(block.mixer.in_proj.weight) + block.mixer.out_proj.weight.shape[1])
            gone += 8 * (block.mixer.out_proj.bias is not None)
    for keep in keeps if axis not in (SSM, WIDTH) else ():
        shapes = {key: p.shape for key, p in arch.blocks(model)[keep.layer].named_parameters()}
        gone += int((~keep.keep).sum()) * arch.axes(keep.layer)[axis].parameters(shapes)
    assert before - after == gone
    assert {key: p.shape for key, p in small.named_parameters()} == {
        new: Surgery(arch, keeps).shape(old, model.get_parameter(old).shape)
        for new, old in Surgery(arch, keeps).names(dict(model.named_parameters())).items()
    }


def scan_parameters(arch):
    """What only the scan of the second block needs: x_proj, dt_proj, A; or of B, C, dt rows, bases, dt_bias, A."""
    config, sizes, before = arch.config, arch.sizes[1], arch.rotated[1]
    if "head" in sizes:
        groups, heads = sizes["group"], sizes["head"]
        shared = 2 * groups * (before or sizes["state"])
        rows = (shared + heads) * (config.hidden_size + config.use_bias)
        bases = 2 * groups * sizes["state"] * (before or 0)
        return rows + shared * (config.conv_kernel + config.use_conv_bias) + bases + 2 * heads
    width, size, rank = sizes["channel"], sizes["state"], sizes["dt_rank"]
    return width * (rank + 2 * size) + width * (rank + 1) + width * size


@pytest.mark.parametrize("name", [name for name, axis in AXES if axis == SSM])
def test_without_a_scan_only_the_inputs_of_the_convolution_are_kept(name):
    arch = arch_for(ALL[name])
    left = Surgery(arch, [Keep(SSM, None, torch.zeros(arch.layers, dtype=torch.bool))]).arch
    widths = (sizes.get("channel") or sizes["head"] * sizes["head_channel"] for sizes in arch.sizes)
    assert left.state_bytes() == 4 * (arch.config.conv_kernel - 1) * sum(widths)
    assert not left.stock and not any(map(left.has_scan, range(left.layers)))


@pytest.mark.parametrize("name", ["mamba-biased", "mamba2-limited"])
@pytest.mark.parametrize("scans", [[], [Keep(SSM, None, torch.tensor([False, True]))]])
def test_a_later_step_speaks_of_the_source(name, scans):
    """Cuts and a mask, one after the other, are the same as what their lifted edits do at once."""
    model = models.ours(name)
    arch = arch_for(model.config)
    first = [*chosen(arch, WIDTH), *chosen(arch, "state"), *chosen(arch, LAYER, seed=1), *scans]
    one = Surgery(arch, first)
    middle = one.operate(model)
    second = [*chosen(one.arch, "state", seed=5), Keep(WIDTH, None, torch.arange(24) % 3 > 0)]
    two = Surgery(one.arch, second)
    small = two.operate(middle)
    generator = torch.Generator().manual_seed(2)
    marks = [
        Mask(key, torch.rand(parameter.shape, generator=generator) < 0.5)
        for key, parameter in small.named_parameters()
        if "mixer" in key
    ]
    edits.apply(marks, dict(small.named_parameters()))
    news = [Replace("backbone.norm_f.weight", torch.full((16,), 2.0))]
    edits.apply(news, dict(small.named_parameters()))

    shapes = {key: parameter.shape for key, parameter in model.named_parameters()}
    lifted = edits.compose(first, [one.lift(edit, shapes) for edit in second])
    whole = Surgery(arch, lifted)
    assert whole.arch.sizes == two.arch.sizes and whole.arch.width == two.arch.width == 16
    lifted = edits.compose(lifted, [whole.lift(edit, shapes) for edit in marks + news])
    edits.apply(lifted, dict(model.named_parameters()))
    again = Surgery(arch, lifted).operate(model)
    for (key, found), (other, wanted) in itertools.zip_longest(again.named_parameters(), small.named_parameters()):
        assert key == other and torch.equal(found, wanted), key


def test_new_tensors_speak_of_the_source_too():
    """States cut, what is left rotated, a bias added, heads, a layer, dimensions cut: lifted, it is done at once."""
    model = models.ours("mamba2")
    arch = arch_for(model.config)
    states = chosen(arch, "state")
    one = Surgery(arch, states)
    middle = one.operate(model)
    news = rotations(one.arch) + [Add(one.arch.prefix(layer) + BIAS, torch.randn(32)) for layer in range(2)]
    two = Surgery(one.arch, news)
    middle = two.operate(middle)
    assert two.arch.rotated == (8, 8) and two.arch.sizes[0]["state"] == 3 and two.arch.out_proj_bias
    last = [*chosen(two.arch, "head"), *chosen(two.arch, LAYER), *chosen(two.arch, WIDTH)]
    small = Surgery(two.arch, last).operate(middle)
    changed = [Replace(arch.prefix(0) + BIAS, torch.full((24,), 0.5))]
    edits.apply(changed, dict(small.named_parameters()))

    shapes = {key: parameter.shape for key, parameter in model.named_parameters()}
    lifted = edits.compose(states, [one.lift(edit, shapes) for edit in news])
    both = Surgery(arch, lifted)
    assert both.added[news[0].tensor].shape == (1, 3, 16)
    lifted = edits.compose(lifted, [both.lift(edit, shapes) for edit in last])
    whole = Surgery(arch, lifted)
    lifted = edits.compose(lifted, [whole.lift(edit, shapes) for edit in changed])
    again = Surgery(arch, lifted).operate(model)
    assert again.config.block_sizes == small.config.block_sizes and again.config.out_proj_bias
    for (key, found), (other, wanted) in itertools.zip_longest(again.named_parameters(), small.named_parameters()):
        assert key == other and torch.equal(found, wanted), key


def test_a_bias_may_be_added_to_dimensions_that_are_left():
    model = models.ours("mamba")
    arch, shapes = arch_for(model.config), {key: parameter.shape for key, parameter in model.named_parameters()}
    one = Surgery(arch, chosen(arch, WIDTH))
    news = [Add(one.arch.prefix(layer) + BIAS, torch.randn(24)) for layer in range(2)]
    small = Surgery(one.arch, news).operate(one.operate(model))
    lifted = [one.lift(edit, shapes) for edit in news]
    assert all(edit.shape == (32,) and not edit.values[~one.keeps[0].keep].any() for edit in lifted)
    again = Surgery(arch, edits.compose(one.keeps, lifted)).operate(model)
    assert all(torch.equal(again.state_dict()[key], tensor) for key, tensor in small.state_dict().items())


def test_bases_go_with_their_scan():
    model = models.ours("mamba2-grouped")
    arch = arch_for(model.config)
    both = Surgery(arch, edits.compose(rotations(arch), chosen(arch, SSM)))
    plain = Surgery(arch, edits.compose(rotations(arch)[:2], chosen(arch, SSM)))
    assert both.arch.rotated == (arch.sizes[0]["state"], None) and both.arch.sizes[1]["state"] == 0
    small, same = both.operate(model).state_dict(), plain.operate(model).state_dict()
    assert small.keys() == same.keys() and all(torch.equal(small[key], same[key]) for key in small)
    assert {key for key in small if "rotation" in key} == {edit.tensor for edit in rotations(arch)[:2]}


def test_tensors_without_a_place_are_refused():
    for name, wrong in {
        "mamba": [Add("backbone.layers.0.mixer.rotation.B", torch.zeros(1, 2, 5))],
        "mamba-biased": [Add(f"backbone.layers.0.{BIAS}", torch.zeros(32))],
        "mamba2": [Add(f"backbone.layers.0.{BIAS}", torch.zeros(31))],
        "mamba2-grouped": [Add(f"backbone.layers.7.{BIAS}", torch.zeros(32))],
        "pruned-mamba2-rotated": [Add("backbone.layers.0.mixer.rotation.B", torch.zeros(2, 2, 8))],
        "gated-mamba2": [Add("backbone.layers.0.mixer.rotation.B", torch.zeros(2, 2, 8))],
        "falcon_mamba": [Add(f"backbone.layers.0.{BIAS}", torch.zeros(32))],
        "pruned-mamba": [Add("backbone.norm_f.bias", torch.zeros(32))],
    }.items():
        with pytest.raises(InputError, match="the model has no place"):
            Surgery(arch_for(ALL[name]), wrong)
    arch = arch_for(ALL["mamba2"])
    for few in (rotations(arch)[:1], rotations(arch)[:2], [*rotations(arch)[:3], rotations(arch, fewer=2)[3]]):
        with pytest.raises(InputError, match="different tensors to different layers"):
            Surgery(arch, few).operate(models.ours("mamba2"))


@pytest.mark.parametrize(("name", "axis"), [("mamba", "channel"), ("mamba2-grouped", "head")])
def test_scans_and_units_go_together(name, axis):
    model = models.ours(name)
    arch, ids = arch_for(model.config), models.tokens(2, 21)
    keeps = [*chosen(arch, "state"), *chosen(arch, SSM), *chosen(arch, axis)]
    small, twin = Surgery(arch, keeps).operate(model), masked(name, keeps)
    assert [sizes["state"] > 0 for sizes in arch_for(small.config).sizes] == [True, False]
    with torch.no_grad():
        close(small(ids).logits, twin(ids).logits)


def test_what_does_not_fit_is_refused():
    arch = arch_for(ALL["mamba"])
    keep = torch.tensor([True, False, True, True, True])
    with pytest.raises(UnsupportedError, match="no axis 'head'"):
        Surgery(arch, [Keep("head", 0, keep)])
    for wrong in (
        Keep("state", 0, keep[:4]),
        Keep("state", 7, keep),
        Keep("state", None, keep),
        Keep("layer", 0, keep),
        Keep("ssm", 0, keep),
        Keep("width", None, keep),
        Keep("ssm", None, keep),
    ):
        with pytest.raises(InputError, match="the model has"):
            Surgery(arch, [wrong])
