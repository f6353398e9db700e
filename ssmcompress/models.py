"""The verb `models`: the families this version knows, from the registry itself, and the checkpoints it ships."""

from dataclasses import dataclass

from transformers import AutoConfig

from ssmcompress import reference
from ssmcompress.arch.registry import FAMILIES, arch_for
from ssmcompress.events import Emit, Table, ignore
from ssmcompress.prune.sizes import expressible
from ssmcompress.steps import LAYER, SSM, WIDTH


@dataclass(frozen=True)
class Family:
    """What can be done to one model type."""

    model_type: str
    prunable: tuple[str, ...]
    axes: tuple[str, ...]
    stock_axes: tuple[str, ...]
    hookless: tuple[str, ...]


def models(*, emit: Emit = ignore) -> list[Family]:
    """The families: prunable modules, axes (apart those a stock config has any size of), weights no hook sees."""
    found = [_family(model_type) for model_type in FAMILIES]
    rows = tuple(
        (each.model_type, ", ".join(each.prunable), ", ".join(each.axes), ", ".join(each.hookless)) for each in found
    )
    emit(Table("families", ("model type", "prunable", "axes", "weights no hook sees"), rows))
    emit(Table("shipped", ("checkpoint",), tuple((f"ref:{name}",) for name in reference.names())))
    return found


def _family(model_type: str) -> Family:
    arch = arch_for(AutoConfig.for_model(model_type))
    axes = arch.axes()
    stock = tuple(name for name, axis in axes.items() if axis.config_key)
    own = () if arch.pruned_config is None else (SSM,)
    wide = (WIDTH,) if expressible(arch, WIDTH, arch.width - 1) else ()
    return Family(model_type, arch.prunable, (*axes, WIDTH, *own, LAYER), (*stock, *wide, LAYER), arch.hookless)
