"""An adapter loses the units that its model loses: the small pair computes what the masked large one does."""

import pytest
import torch

from ssmcompress.arch.base import ROTATION
from ssmcompress.arch.masked import mask
from ssmcompress.arch.mixer import mixers
from ssmcompress.arch.registry import arch_for
from ssmcompress.arch.surgery import Surgery
from ssmcompress.arch.tunable import TUNABLE, install
from ssmcompress.checkpoint import adapter as adapters
from ssmcompress.checkpoint.adapter import attach, find
from ssmcompress.checkpoint.fitting import WEIGHTS
from ssmcompress.checkpoint.learned import Learned
from ssmcompress.checkpoint.reshape import cut
from ssmcompress.checkpoint.shards import Shards
from ssmcompress.edits import Add, Keep
from ssmcompress.errors import UnsupportedError
from ssmcompress.tune.lora import wrap
from ssmcompress.tuning import TuneState
from tests.unit.arch import models

SIZES = {"additional-scan": 3, "prefix": 2, "prompt": 3}
AXES = {
    "mamba": ("channel", "state", "dt_rank", "width", "layer", "ssm"),
    "mamba2-grouped": ("head", "head_channel", "state", "width", "layer", "ssm"),
}
FORMS = {"state-offset": ("full", "low-rank"), "lora": ("full",)}
CASES = [
    (name, method, form, axis)
    for name, axes in AXES.items()
    for method in (*(each for each in TUNABLE if each != "full"), "lora")
    for form in FORMS.get(method, ("full",))
    for axis in axes
]


def keeps(arch, axis):
    draw = torch.Generator().manual_seed(4)
    if axis in ("layer", "ssm"):
        return [Keep(axis, None, torch.tensor([True, False]))]
    if axis == "width":
        return [Keep(axis, None, torch.randperm(arch.width, generator=draw) < arch.width // 2)]
    found = []
    for layer, sizes in enumerate(arch.sizes):
        runs = arch.runs(axis, sizes[axis] // 2)
        part = sizes[axis] // runs
        keep = [torch.randperm(part, generator=draw) < (part + 1) // 2 for _ in range(runs)]
        found.append(Keep(axis, layer, torch.cat(keep)))
    return found


def written(folder, name, method, form):
    """An adapter with values of its own, on disk."""
    model = models.ours(name)
    arch = arch_for(model.config)
    folder.mkdir()
    size = 2 if form == "low-rank" else SIZES.get(method)
    torch.manual_seed(5)
    if method == "lora":
        learned, config = wrap(model, arch, TuneState(method="lora", rank=2))
    else:
        learned, config = install(model, arch, method, form, size), Learned.of(method, form, size)
    draw = torch.Generator().manual_seed(3)
    drawn = {key: each.detach() + 0.3 * torch.randn(each.shape, generator=draw) for key, each in learned.items()}
    adapters.save(folder, config, drawn)
    return config


@torch.no_grad()
@pytest.mark.parametrize(("name", "method", "form", "axis"), CASES)
def test_the_small_pair_computes_what_the_masked_one_does(tmp_path, name, method, form, axis):
    config = written(tmp_path / "large", name, method, form)
    large, ids = models.ours(name), models.tokens(2, 13)
    arch = arch_for(large.config)
    edits = keeps(arch, axis)
    surgery = Surgery(arch, edits)
    small = surgery.operate(large)
    tensors = cut(surgery, Shards(tmp_path / "large", (WEIGHTS,)))
    (tmp_path / "small").mkdir()
    adapters.save(tmp_path / "small", config, tensors)
    attach(small, surgery.arch, find(tmp_path / "small"))
    attach(large, arch, find(tmp_path / "large"))
    mask(large, arch, edits)
    if axis == "ssm":  # what is read beside a scan goes with it
        for port in ("offset", "extra"):
            setattr(list(mixers(large))[1], port, None)
    if axis == "width" and method == "prompt":
        large.backbone.prompt[:, ~edits[0].keep] = 0
    expected, found = (model(ids, use_cache=False).logits for model in (large, small))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("method", "fine"), [("state-offset", False), ("initial-state", False), ("output-offset", True)]
)
def test_states_in_another_basis_are_refused(tmp_path, method, fine):
    written(tmp_path / "large", "mamba2-grouped", method, "full")
    arch = arch_for(models.ours("mamba2-grouped").config)
    states = arch.state(0)[-1]
    bases = [
        Add(arch.prefix(layer) + name, torch.randn(2, states // 2, states)) for layer in range(2) for name in ROTATION
    ]
    weights = Shards(tmp_path / "large", (WEIGHTS,))
    if fine:
        assert len(cut(Surgery(arch, bases), weights)) == 2
        return
    with pytest.raises(UnsupportedError, match="another basis"):
        cut(Surgery(arch, bases), weights)
