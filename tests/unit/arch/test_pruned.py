"""Blocks of different sizes: the file that goes beside the weights, its configs, and the way there and back."""

import ast
import copy

import pytest
import torch

from ssmcompress.arch import modeling_ssmcompress as modeling
from ssmcompress.arch.pruned import CODE
from ssmcompress.arch.registry import FAMILIES, arch_for
from ssmcompress.arch.surgery import Surgery
from ssmcompress.edits import Keep
from ssmcompress.errors import UnsupportedError
from tests.unit.arch import models
from tests.unit.arch.models import CONFIGS, PRUNED

DAMAGED = [
    ({"block_sizes": None}, "block_sizes is None; expected a list of 2"),
    ({"block_sizes": {"0": {}}}, "expected a list of 2"),
    ({"block_sizes": []}, "block_sizes has 0 entries; expected a list of 2"),
    ({"num_hidden_layers": 3}, "block_sizes has 2 entries; expected a list of 3"),
    ({"out_proj_bias": "yes"}, "out_proj_bias is 'yes'; expected true or false"),
    ({"at": (1, 7)}, r"block_sizes\[1\] holds 7; expected "),
    ({"at": (0, {})}, r"block_sizes\[0\] holds nothing; expected "),
    ({"at": (1, {"width": 4})}, r"block_sizes\[1\] holds width; expected "),
    ({"first": 0}, r"block_sizes\[1\] gives (channel|head) as 0; expected a whole number of at least 1\."),
    ({"state": -3}, "gives state as -3"),
    ({"state": 2.0}, r"gives state as 2\.0"),
    ({"state": "4"}, "gives state as '4'"),
    ({"state": True}, "gives state as True"),
    ({"states": 4}, "holds .*, states; expected "),
    ({"state": None}, "gives state as None"),
]


def damage(said, change):
    """A config as a dict with one thing about its block sizes wrong."""
    said = copy.deepcopy(said)
    for key, value in change.items():
        if key == "at":
            said["block_sizes"][value[0]] = value[1]
        elif key == "first":
            said["block_sizes"][1][next(iter(said["block_sizes"][1]))] = value
        elif key in ("state", "states"):
            said["block_sizes"][1][key] = value
        else:
            said[key] = value
    return said


def test_the_file_imports_nothing_but_torch_and_transformers():
    modules = set()
    for node in ast.walk(ast.parse(CODE.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert not node.level
            modules.add(node.module.partition(".")[0])
        elif isinstance(node, ast.Import):
            modules |= {alias.name.partition(".")[0] for alias in node.names}
    assert modules - {"copy", "typing"} == {"torch", "transformers"}  # the first two are of Python itself
    assert "importlib" not in CODE.read_text() and "__import__" not in CODE.read_text()


@pytest.mark.parametrize("name", ["pruned-mamba", "pruned-mamba2-grouped"])
@pytest.mark.parametrize(("change", "message"), DAMAGED)
def test_block_sizes_that_do_not_fit_are_refused(name, change, message):
    with pytest.raises(ValueError, match=message):
        type(PRUNED[name])(**damage(PRUNED[name].to_dict(), change))


@pytest.mark.parametrize("change", [{"state": 0}, {"state": 0, "dt_rank": 0.0}, {"state": False, "dt_rank": 0}])
def test_a_scan_is_there_or_is_not(change):
    said = PRUNED["pruned-mamba"].to_dict()
    said["block_sizes"][1] |= change
    with pytest.raises(ValueError, match=r"block_sizes\[1\] gives .*at least 1, or state and dt_rank 0 for no scan"):
        modeling.PrunedMambaConfig(**said)


def test_heads_fill_the_groups():
    said = PRUNED["pruned-mamba2-grouped"].to_dict()
    said["block_sizes"][0]["head"] = 3
    with pytest.raises(ValueError, match=r"block_sizes\[0\] gives head as 3; expected a multiple of 2 groups"):
        modeling.PrunedMamba2Config(**said)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"group": 3}, "gives group as 3; expected a divisor of 4 groups"),
        ({"group": 8}, "gives group as 8; expected a divisor of 4 groups"),
        ({"group": 0}, "gives group as 0; expected a whole number of at least 1"),
        ({"group": None}, "gives group as None"),
        ({"group": 2, "state": 0}, "gives group as 2, but no states; expected none without a scan"),
    ],
)
def test_groups_are_merged_in_runs(sizes, message):
    said = PRUNED["merged-mamba2-rotated"].to_dict()
    said["block_sizes"][1] |= sizes
    with pytest.raises(ValueError, match=rf"block_sizes\[1\] {message}"):
        modeling.PrunedMamba2Config(**said)


def test_merged_groups_are_said_by_no_stock_config():
    arch = arch_for(CONFIGS["mamba2-grouped"])
    one = [sizes | {"group": 1} for sizes in arch.sizes]
    with pytest.raises(UnsupportedError, match="one number of groups, for B, C and the norm: not 1 of 2"):
        arch.resized(one, stock=True)
    merged = arch_for(arch.resized(one))
    assert not merged.stock and list(merged.sizes) == one and merged.config.n_groups == 2
    assert [sizes["group"] for sizes in merged.config.block_sizes] == [1, 1]
    again = arch_for(merged.resized([sizes | {"group": 2} for sizes in merged.sizes]))
    assert again.stock and again.sizes == arch.sizes
    bare = arch_for(arch.resized([one[0], one[1] | {"state": 0}]))
    assert [sizes["group"] for sizes in bare.sizes] == [1, 0]


def test_no_fused_kernel_trains_merged_groups(monkeypatch):
    """It would norm as many groups as there are of B and C; of stock blocks it is asked."""

    def fused(*_, **__):
        raise RuntimeError("the fused kernel")

    monkeypatch.setattr(modeling.mamba2, "mamba2_split_conv1d_scan_combined", fused)
    ids = models.tokens(2, 9)
    with pytest.raises(RuntimeError, match="the fused kernel"):
        models.stock(models.ours("pruned-mamba2-grouped")).train()(ids, use_cache=False)
    model = models.ours("merged-mamba2")
    with torch.no_grad():
        found = models.stock(model).train()(ids, use_cache=False).logits
        assert torch.allclose(found, model(ids, use_cache=False).logits, atol=1e-4)


@pytest.mark.parametrize("name", PRUNED)
def test_every_block_has_the_sizes_of_its_own(name):
    arch = arch_for(PRUNED[name])
    assert not arch.stock
    for sizes, before, said in zip(arch.sizes, arch.rotated, PRUNED[name].block_sizes, strict=True):
        groups = said.get("group", getattr(PRUNED[name], "n_groups", 1)) if sizes["state"] else 0
        more = {"group": groups} if "head" in said else {}
        assert sizes == {axis: said[axis] for axis in PRUNED[name].axes} | more and before == said.get("rotated_from")
    blocks = arch.blocks(arch.build())
    for layer, sizes in enumerate(arch.sizes):
        mixer, axes = blocks[layer].mixer, arch.axes(layer)
        assert {axis: axes[axis].size for axis in axes} == sizes
        inner = sizes.get("channel") or sizes["head"] * sizes["head_channel"]
        assert mixer.intermediate_size == mixer.out_proj.in_features == inner
        if "group" in sizes:
            assert getattr(mixer, "n_groups", 0) == sizes["group"]
            assert mixer.norm.group_size == inner // PRUNED[name].n_groups
        assert getattr(mixer, "ssm_state_size", 0) == (arch.rotated[layer] or sizes["state"])
        assert {f"mixer.{key}" for key in mixer.state_dict()}.isdisjoint(arch.scan_only) == (not sizes["state"])
        wanted = PRUNED[name].out_proj_bias or PRUNED[name].use_bias
        assert (mixer.out_proj.bias is not None) == wanted and getattr(mixer, "use_bias", wanted) == wanted
        assert (mixer.in_proj.bias is not None) == PRUNED[name].use_bias


@pytest.mark.parametrize("name", PRUNED)
def test_state_bytes_are_those_of_a_cache(name):
    cache = models.ours(name)(torch.ones(1, 9, dtype=torch.long), use_cache=True).cache_params
    kernel = PRUNED[name].conv_kernel
    states = (each.recurrent_states[0] for each in cache.layers)
    held = sum(state.numel() for state in states if state is not None)
    held += sum(each.conv_states[0].numel() // kernel * (kernel - 1) for each in cache.layers)
    assert arch_for(PRUNED[name]).state_bytes() == 4 * held


@pytest.mark.parametrize("name", [name for name in CONFIGS if CONFIGS[name].model_type != "falcon_mamba"])
def test_a_config_becomes_pruned_where_it_must_and_stock_where_it_can(name):
    arch = arch_for(CONFIGS[name])
    narrow = [dict(sizes) for sizes in arch.sizes]
    narrow[1]["state"] -= 1
    pruned = arch_for(arch.resized(narrow))
    assert not pruned.stock and list(pruned.sizes) == narrow and pruned.model_type not in FAMILIES
    own = ("model_type", "block_sizes", "out_proj_bias", "state_offset")
    said, before = ({k: v for k, v in each.config.to_dict().items() if k not in own} for each in (pruned, arch))
    assert said == before
    assert arch.resized(arch.sizes).to_dict() == arch.config.to_dict() == pruned.resized(arch.sizes).to_dict()
    assert arch_for(pruned.resized(narrow[1:])).stock and arch_for(pruned.resized(narrow)).sizes == pruned.sizes
    biased = arch_for(arch.resized(arch.sizes, out_proj_bias=True))
    assert biased.stock == arch.config.use_bias and biased.out_proj_bias != biased.stock
    assert arch_for(biased.resized(biased.sizes)).out_proj_bias == biased.out_proj_bias


def test_a_stock_config_of_a_pruned_model_says_its_sizes():
    arch = arch_for(PRUNED["pruned-mamba2"])
    config = arch.resized([{"head": 4, "head_channel": 24, "state": 9}])
    assert (config.num_heads, config.head_dim, config.state_size, config.expand) == (4, 24, 9, 3)


@pytest.mark.parametrize("name", ["mamba", "mamba2-grouped"])
def test_equal_sizes_by_either_config_are_the_same_model(name):
    """Without a difference between blocks the pruned classes compute what the stock ones do."""
    model = models.ours(name)
    arch = arch_for(model.config)
    fields = {"block_sizes": [dict(sizes) for sizes in arch.sizes], "out_proj_bias": True}
    config = arch.pruned_config(**{k: v for k, v in model.config.to_dict().items() if k != "model_type"} | fields)
    state = model.state_dict() | {f"backbone.layers.{i}.mixer.out_proj.bias": torch.zeros(32) for i in range(2)}
    twin, ids = arch_for(config).build("cpu").eval(), models.tokens(2, 21)
    twin.load_state_dict(state)
    with torch.no_grad():
        assert torch.equal(twin(ids).logits, model(ids).logits)
        twin.backbone.layers[1].mixer.out_proj.bias += 1
        assert not torch.allclose(twin(ids).logits, model(ids).logits)


@pytest.mark.parametrize("name", ["mamba", "mamba2-grouped"])
def test_units_of_one_layer_can_leave(name):
    model = models.ours(name)
    arch = arch_for(model.config)
    small = Surgery(arch, [Keep("state", 1, torch.arange(arch.sizes[1]["state"]) < 2)]).operate(model)
    left = arch_for(small.config)
    assert not left.stock and left.sizes == (arch.sizes[0], arch.sizes[1] | {"state": 2})
    assert small.backbone.layers[0].mixer.A_log.equal(model.backbone.layers[0].mixer.A_log)


def test_a_fresh_model_is_initialised_whole():
    for name in PRUNED:
        config = copy.deepcopy(PRUNED[name])
        config.rescale_prenorm_residual = True
        assert not type(config)(**config.to_dict()).rescale_prenorm_residual
        for key, parameter in arch_for(PRUNED[name]).build("cpu").named_parameters():
            assert parameter.isfinite().all() and parameter.abs().max() < 10, key
