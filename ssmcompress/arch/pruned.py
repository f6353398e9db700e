"""Models whose blocks have sizes of their own: the families of Mamba and Mamba-2, by the config written beside them."""

from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from ssmcompress.arch import modeling_ssmcompress as modeling
from ssmcompress.arch.backbone import lead
from ssmcompress.arch.base import Arch
from ssmcompress.arch.gated import GatedMixer, GatedMixer2
from ssmcompress.arch.mamba import Mamba, MambaMixer, MambaModel
from ssmcompress.arch.mamba2 import Mamba2, Mamba2Mixer, Mamba2Model
from ssmcompress.arch.mixer import adopt
from ssmcompress.steps import GROUP

CODE = Path(modeling.__file__)  # what must lie beside the weights, so that they load without this package


def auto_map(model: PreTrainedModel) -> dict[str, str]:
    """Where the classes of a pruned model are found in `CODE`, as its config.json tells transformers."""
    found = {"AutoConfig": type(model.config).__name__, "AutoModelForCausalLM": type(model).__name__}
    return {kind: f"{CODE.stem}.{name}" for kind, name in found.items()}


class PrunedMambaForCausalLM(modeling.PrunedMambaForCausalLM):
    """`PrunedMambaForCausalLM` with our mixer in every block."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        adopt(self.backbone.layers, MambaMixer, OffsetMambaMixer, GatedMixer)
        lead(self, MambaModel)


class OffsetMambaMixer(MambaMixer, modeling.OffsetMambaMixer):
    """The mixer of Mamba-1 with an offset of its state."""


class MergedMamba2Mixer(Mamba2Mixer, modeling.MergedMamba2Mixer):
    """The mixer of Mamba-2 whose norm has more groups than B and C."""


class RotatedMamba2Mixer(Mamba2Mixer, modeling.RotatedMamba2Mixer):
    """The mixer of Mamba-2 whose states live in a basis of their own."""

    def _basis(self, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
        return self.rotation(B, C)


class PrunedMamba2ForCausalLM(modeling.PrunedMamba2ForCausalLM):
    """`PrunedMamba2ForCausalLM` with our mixer in every block."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        adopt(self.backbone.layers, Mamba2Mixer, MergedMamba2Mixer, RotatedMamba2Mixer, GatedMixer2)
        lead(self, Mamba2Model)


class _Pruned(Arch):
    """A family by its pruned config."""

    stock = False

    @property
    def sizes(self) -> tuple[dict[str, int], ...]:
        """The size of every axis, a mapping a layer."""
        return tuple({axis: block[axis] for axis in self.config.axes} for block in self.config.block_sizes)

    @property
    def rotated(self) -> tuple[int | None, ...]:
        """How many states each layer's B and C have before they are taken to a basis of fewer; None: they are not."""
        return tuple(block.get("rotated_from") for block in self.config.block_sizes)

    @property
    def out_proj_bias(self) -> bool:
        """Whether out_proj has a bias where in_proj has none."""
        return self.config.out_proj_bias and not self.config.use_bias

    @property
    def offset(self) -> bool:
        """Whether every scan reads a state that never changes."""
        return self.config.state_offset


class PrunedMamba(_Pruned, Mamba):
    """Mamba-1 with channels, states and a dt rank of each block."""

    model_type = "ssmcompress_mamba"
    model_class = PrunedMambaForCausalLM


class PrunedMamba2(_Pruned, Mamba2):
    """Mamba-2 with heads, head channels, states and groups of each block."""

    model_type = "ssmcompress_mamba2"
    model_class = PrunedMamba2ForCausalLM

    @property
    def sizes(self) -> tuple[dict[str, int], ...]:
        """The size of every axis, a mapping a layer: without a scan there are no groups either."""
        told = (block.get(GROUP, self.config.n_groups) for block in self.config.block_sizes)
        pairs = zip(super().sizes, told, strict=True)
        return tuple(sizes | {GROUP: groups if sizes["state"] else 0} for sizes, groups in pairs)
