"""The axes: what one unit owns, in closed form, and what is left when units go."""

import copy

import pytest
import torch

from ssmcompress.arch.base import shapes
from ssmcompress.arch.registry import arch_for
from ssmcompress.errors import UnsupportedError
from tests.unit.arch.models import CONFIGS

AXES = [(name, axis) for name, config in CONFIGS.items() for axis in arch_for(config).axes()]
TRAINED = {  # of the families' published models; the closed forms hold for a convolution of four taps with a bias
    "mamba-130m": ("mamba", {"hidden_size": 768, "state_size": 16, "num_hidden_layers": 1}),
    "falcon-mamba": ("falcon_mamba", {"hidden_size": 512, "state_size": 16, "num_hidden_layers": 1}),
    "mamba2-130m": ("mamba2", {"hidden_size": 768, "num_heads": 24, "head_dim": 64, "n_groups": 1, "state_size": 128}),
    "mamba2-grouped": (
        "mamba2",
        {"hidden_size": 512, "num_heads": 16, "head_dim": 64, "n_groups": 8, "state_size": 64},
    ),
}


def block_shapes(config):
    """The shapes of one block's tensors, by their names in the block."""
    arch = arch_for(config)
    return shapes(arch.blocks(arch.build())[0])


def closed_forms(config):
    """Parameters a unit of each axis owns, as written in the table of dependency groups."""
    d, N = config.hidden_size, config.state_size
    if config.model_type == "mamba2":
        P, H, G = config.head_dim, config.num_heads, config.n_groups
        return {
            "head": 3 * P * d + d + 6 * P + 3,
            "head_channel": H * (3 * d + 6),
            "state": G * 2 * (d + 5),
            "group": 2 * N * (d + 5),
        }
    D, R = config.intermediate_size, int(config.time_step_rank)
    return {"channel": 3 * d + 2 * R + 3 * N + 7, "state": 3 * D, "dt_rank": 2 * D}


@pytest.mark.parametrize("name", TRAINED)
def test_a_unit_owns_as_many_parameters_as_the_closed_form_says(name):
    model_type, sizes = TRAINED[name]
    config = copy.deepcopy(next(each for each in CONFIGS.values() if each.model_type == model_type)).__class__(
        **{"vocab_size": 8, "num_hidden_layers": 1} | sizes
    )
    axes, wanted = arch_for(config).axes(), closed_forms(config)
    assert axes.keys() == wanted.keys()
    for axis, parameters in wanted.items():
        assert axes[axis].parameters(block_shapes(config)) == parameters, axis


@pytest.mark.parametrize(("name", "axis"), AXES)
def test_units_own_disjoint_indices_in_range(name, axis):
    found = block_shapes(CONFIGS[name])
    axis = arch_for(CONFIGS[name]).axes()[axis]
    owned = {}
    for part in axis.slices:
        assert part.tensor in found
        size = found[part.tensor][part.dim]
        for unit in range(axis.size):
            indices = part.indices(unit)
            assert len(indices) == len(part.indices(0)) and all(0 <= index < size for index in indices)
            earlier = owned.setdefault((part.tensor, part.dim), set())
            assert not earlier & set(indices), (part.tensor, unit)
            earlier.update(indices)


@pytest.mark.parametrize(("name", "axis"), AXES)
def test_every_unit_owns_the_same_number_of_parameters(name, axis):
    """All units together own whole tensors, or all of one part of them (z and x, B and C)."""
    found = block_shapes(CONFIGS[name])
    axis = arch_for(CONFIGS[name]).axes()[axis]
    total = axis.size * axis.parameters(found)
    owned = {}
    for part in axis.slices:
        indices = {index for unit in range(axis.size) for index in part.indices(unit)}
        owned.setdefault((part.tensor, part.dim), set()).update(indices)
    assert total == sum(
        len(indices) * found[tensor].numel() // found[tensor][dim] for (tensor, dim), indices in owned.items()
    )


@pytest.mark.parametrize(
    ("name", "axis"), [(name, axis) for name, axis in AXES if arch_for(CONFIGS[name]).axes()[axis].config_key]
)
def test_removing_a_unit_gives_the_shapes_of_the_smaller_config(name, axis):
    """Every tensor that must shrink does, and no other: the config that says one unit less builds exactly that."""
    config, axis = CONFIGS[name], arch_for(CONFIGS[name]).axes()[axis]
    smaller = copy.deepcopy(config)
    setattr(smaller, axis.config_key, axis.size - 1)
    left = {key: torch.empty(shape) for key, shape in block_shapes(config).items()}
    for part in {(part.tensor, part.dim) for part in axis.slices}:
        tensor, dim = part
        gone = {i for each in axis.slices if (each.tensor, each.dim) == part for i in each.indices(axis.size - 1)}
        keep = [i for i in range(left[tensor].shape[dim]) if i not in gone]
        left[tensor] = left[tensor].index_select(dim, torch.tensor(keep))
    assert {key: tensor.shape for key, tensor in left.items()} == block_shapes(smaller)


@pytest.mark.parametrize("name", [name for name, config in CONFIGS.items() if config.model_type == "mamba2"])
def test_a_head_owns_what_its_channels_own_and_its_own_step_decay_and_skip(name):
    found, axes = block_shapes(CONFIGS[name]), arch_for(CONFIGS[name]).axes()
    heads = {}
    for part in axes["head"].slices:
        heads.setdefault(part.tensor, []).extend(part.indices(1))
    channels = {}
    width = CONFIGS[name].head_dim
    for part in axes["head_channel"].slices:
        for unit in range(width):
            first = part.indices(unit)
            channels.setdefault(part.tensor, []).append(first[1] if part.repeats > 1 else first[0])
    for tensor in ("mixer.norm.weight", "mixer.out_proj.weight"):
        assert sorted(channels[tensor]) == sorted(heads[tensor])
    rows = {"mixer.in_proj.weight", "mixer.dt_bias", "mixer.A_log", "mixer.D"}
    assert {tensor for tensor in heads if len(heads[tensor]) == 1} == rows - {"mixer.in_proj.weight"}
    assert len(heads["mixer.in_proj.weight"]) == 2 * width + 1
    assert set(heads["mixer.in_proj.weight"]) - set(channels["mixer.in_proj.weight"]) == {
        found["mixer.in_proj.weight"][0] - CONFIGS[name].num_heads + 1
    }


@pytest.mark.parametrize("name", CONFIGS)
def test_state_bytes_are_those_of_a_cache(name):
    model = arch_for(CONFIGS[name]).build("cpu")
    cache = model(torch.ones(1, 9, dtype=torch.long), use_cache=True).cache_params
    kernel = CONFIGS[name].conv_kernel
    held = sum(
        each.recurrent_states[0].numel() + each.conv_states[0].numel() // kernel * (kernel - 1) for each in cache.layers
    )
    assert arch_for(CONFIGS[name]).state_bytes() == 4 * held


@pytest.mark.parametrize("name", CONFIGS)
def test_every_tensor_of_a_block_is_prunable_or_kept_on_purpose(name):
    arch = arch_for(CONFIGS[name])
    for tensor in block_shapes(CONFIGS[name]):
        prunable = tensor in {f"mixer.{module}.weight" for module in arch.prunable}
        assert prunable != arch.kept_on_purpose(tensor), tensor


@pytest.mark.parametrize("name", CONFIGS)
def test_a_resized_config_has_the_sizes_asked_for(name):
    arch = arch_for(CONFIGS[name])
    wanted = {axis: size // 2 for axis, size in arch.sizes[0].items()} | {"state": arch.sizes[0]["state"]}
    if "head" in wanted:
        wanted["head_channel"] = arch.sizes[0]["head_channel"]
        wanted["head"] = max(wanted["head"], arch.config.n_groups)
        wanted["group"] = arch.sizes[0]["group"]
    smaller = arch_for(arch.resized([wanted]))
    assert smaller.stock and smaller.sizes == (wanted,) and arch_for(CONFIGS[name]).sizes == arch.sizes


def test_what_a_stock_config_cannot_say_is_refused_where_it_must_be_one():
    arch = arch_for(CONFIGS["mamba2"])
    with pytest.raises(UnsupportedError, match="56, no multiple of the hidden size 32"):
        arch.resized([arch.sizes[0] | {"head": 7}] * 2, stock=True)
    with pytest.raises(UnsupportedError, match="layer 1 would have 3"):
        arch.resized([arch.sizes[0], arch.sizes[0] | {"state": 3}], stock=True)
    with pytest.raises(UnsupportedError, match="no bias for out_proj alone"):
        arch.resized(arch.sizes, out_proj_bias=True, stock=True)
    falcon = arch_for(CONFIGS["falcon_mamba"])
    with pytest.raises(UnsupportedError, match="layer 1 would have 3"):
        falcon.resized([falcon.sizes[0], falcon.sizes[0] | {"state": 3}])


def test_no_config_has_heads_that_do_not_fill_the_groups():
    arch = arch_for(CONFIGS["mamba2-grouped"])
    with pytest.raises(UnsupportedError, match="head as 3; expected a multiple of 2 groups"):
        arch.resized([arch.sizes[0] | {"head": 3}] * 2)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_narrower_config_keeps_all_other_sizes(name, tmp_path):
    """Those that a config derives from the hidden size too: the rank of dt, the inner width."""
    arch = arch_for(CONFIGS[name])
    config = arch.narrowed(16).resized(arch.sizes)
    (tmp_path / "config.json").write_text(config.to_json_string(use_diff=True))
    again = type(config).from_pretrained(tmp_path)
    for left in map(arch_for, (config, again)):
        assert left.width == 16 and left.sizes == arch.sizes and left.stock
        assert left.config.time_step_rank == arch.config.time_step_rank
    assert arch.width == 32
    if "head" in arch.axes():
        with pytest.raises(UnsupportedError, match="no multiple of the hidden size 24"):
            arch.narrowed(24).resized(arch.sizes, stock=True)
        assert arch_for(arch.narrowed(24).resized(arch.sizes)).width == 24
