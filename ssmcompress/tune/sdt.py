"""SDT: of the state space only the entries that a first run moves most, with LoRA on out_proj (Galim et al., 2024)."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ssmcompress.arch.base import DECAYS, Arch
from ssmcompress.checkpoint.sdt import ALPHA, DELTA
from ssmcompress.errors import UnsupportedError
from ssmcompress.tune.lora import wrap
from ssmcompress.tuning import TuneState

CHANNELS, STATES = "channels", "states"
Choice = dict[str, Tensor]  # of each layer's decays: which channels [c], and of each which states [c, s]


def require_states(arch: Arch) -> None:
    """UnsupportedError for a family whose states have no decays of their own."""
    if len(arch.state(0)) != 2:
        raise UnsupportedError(
            f"sdt chooses among the decays of single states, and {arch.model_type} has one a head.",
            hint="Take state-offset, lora or a-log.",
        )


def warm_up(model: nn.Module, arch: Arch, step: TuneState) -> dict[str, nn.Parameter]:
    """What the first run learns: all decays, and LoRA; UnsupportedError as of `require_states`."""
    require_states(arch)
    decays = {arch.weight(layer, DECAYS) for layer in range(arch.layers) if arch.has_scan(layer)}
    found = {name: each for name, each in model.named_parameters() if name in decays}
    return found | _lora(model, arch, step)


def choose(before: Mapping[str, Tensor], after: Mapping[str, Tensor], step: TuneState) -> Choice:
    """The channels whose decays moved most, and of each the states that did: A_log [D, N] by name, before and after.

    Of D channels D - round((1 - share) D) are chosen, of N states likewise.
    """
    found: Choice = {}
    for name, old in before.items():
        moved = (after[name] - old).square()
        channels, states = (
            size - round((1 - share) * size) for size, share in zip(moved.shape, step.shares, strict=True)
        )
        rows = moved.sum(1).argsort(descending=True, stable=True)[:channels].sort().values
        columns = moved[rows].argsort(dim=1, descending=True, stable=True)[:, :states].sort(1).values
        found |= {f"{name}.{CHANNELS}": rows, f"{name}.{STATES}": columns}
    return found


def install(
    model: nn.Module, arch: Arch, step: TuneState, choice: Choice
) -> tuple[dict[str, nn.Parameter], Callable[[], dict[str, Tensor]]]:
    """What is learned, by its name in the model, and what is to be stored of it: the chosen entries alone."""
    found: dict[str, nn.Parameter] = {}
    places: dict[str, tuple[str, tuple[Any, ...]]] = {}
    for layer in (layer for layer in range(arch.layers) if arch.has_scan(layer)):
        decays, projection = arch.weight(layer, DECAYS), arch.weight(layer, "x_proj")
        rows, columns = (choice[f"{decays}.{part}"] for part in (CHANNELS, STATES))
        rank = arch.sizes[layer]["dt_rank"]
        places[f"{decays}.{DELTA}"] = decays, (rows[:, None], columns)
        places[f"{projection}.{DELTA}"] = projection, (slice(rank, None), rows)
    before = {}
    for name, where in places.values():
        parameter = model.get_parameter(name)
        alive = torch.zeros_like(parameter, dtype=torch.bool)
        alive[where] = True
        parameter.register_hook(lambda gradient, alive=alive: gradient * alive)
        found[name], before[name] = parameter, parameter.detach().clone()
    lora = _lora(model, arch, step)

    def pack() -> dict[str, Tensor]:
        moved = {key: (found[name].detach() - before[name])[where] for key, (name, where) in places.items()}
        return moved | {name: each.detach() for name, each in lora.items()}

    return found | lora, pack


def count(arch: Arch, step: TuneState) -> int:
    """How many entries are learned; UnsupportedError as of `require_states`."""
    require_states(arch)
    total, rank = 0, step.size or 0
    for layer in (layer for layer in range(arch.layers) if arch.has_scan(layer)):
        channels, states = arch.state(layer)
        some, few = (
            size - round((1 - share) * size) for size, share in zip((channels, states), step.shares, strict=True)
        )
        total += some * few + 2 * states * some + rank * (channels + arch.width)
    return total


def config(step: TuneState, choice: Choice) -> dict[str, Any]:
    """What the adapter's config says: which entries its tensors add to."""
    names = {name.removesuffix(f".{CHANNELS}") for name in choice if name.endswith(f".{CHANNELS}")}
    entries = {name: {part: choice[f"{name}.{part}"].tolist() for part in (CHANNELS, STATES)} for name in sorted(names)}
    return {"peft_type": "SDT", "r": step.size, "lora_alpha": ALPHA, "entries": entries}


def _lora(model: nn.Module, arch: Arch, step: TuneState) -> dict[str, nn.Parameter]:
    return wrap(model, arch, TuneState(method="lora", rank=step.size, alpha=ALPHA, targets=("out_proj",)))[0]
