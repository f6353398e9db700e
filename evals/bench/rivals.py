"""Who runs against whom: our models and their stock twins on the same random weights, and what each is asked to do."""

from copy import deepcopy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Mamba2Config, Mamba2ForCausalLM, MambaConfig, MambaForCausalLM, PreTrainedModel

from ssmcompress.arch.base import Arch
from ssmcompress.arch.registry import arch_for
from ssmcompress.prune.apply import find_edits
from ssmcompress.steps import Prune

STOCK = {"mamba": MambaForCausalLM, "mamba2": Mamba2ForCausalLM}
STEPS = 16
RIVALS = {"mamba": ("stock",), "mamba2": ("stock", "stock, chunk 64")}


@dataclass(frozen=True)
class Shape:
    """A model's size; the default is that of the published 130M checkpoints."""

    width: int = 768
    layers: int = 24
    vocabulary: int = 50280
    heads: int = 24
    head_width: int = 64
    mamba2_states: int = 128

    def arch(self, family: str, layers: int = 0) -> Arch:
        """The family at this shape, with fewer layers where a number is given."""
        shared = {
            "hidden_size": self.width,
            "num_hidden_layers": layers or self.layers,
            "vocab_size": self.vocabulary,
            "tie_word_embeddings": True,
        }
        if family == "mamba":
            return arch_for(MambaConfig(**shared, state_size=16))
        inner = {"num_heads": self.heads, "head_dim": self.head_width, "state_size": self.mamba2_states, "n_groups": 1}
        return arch_for(Mamba2Config(**shared, **inner, chunk_size=256))


def build(arch: Arch, rival: str, dtype: torch.dtype = torch.float32, twin: PreTrainedModel | None = None) -> nn.Module:
    """The random model of one rival in evaluation mode, sharing every weight with its twin where one is given."""
    config = deepcopy(arch.config)
    if rival == "stock, chunk 64":
        config.chunk_size = 64
    kind = arch.model_class if rival == "ours" else STOCK[arch.model_type]
    with torch.device("meta" if twin is not None else "cpu"):
        model = kind(config)
    if twin is not None:
        model.load_state_dict(twin.state_dict(), assign=True)
        model.tie_weights()
    return model.to(dtype).eval()


def tokens(arch: Arch, count: int, length: int) -> Tensor:
    """Random token ids [count, length], always the same."""
    return torch.randint(1, arch.config.vocab_size, (count, length), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def forward(model: nn.Module, ids: Tensor) -> Tensor:
    """The logits of ids [B, L] at every position."""
    return model(ids, use_cache=False).logits


@torch.no_grad()
def prefill(model: nn.Module, ids: Tensor) -> Tensor:
    """The backbone, and the logits of the last token."""
    return model(ids, use_cache=False, logits_to_keep=1).logits


@torch.no_grad()
def decode(model: nn.Module, ids: Tensor) -> None:
    """A short prompt and STEPS tokens after it, one by one."""
    cache = model(ids, use_cache=True).cache_params
    for t in range(STEPS):
        model(ids[:, t % ids.shape[1]][:, None], cache_params=cache, use_cache=True)


def train(model: nn.Module, ids: Tensor) -> None:
    """Forward, the loss of the next token and backward of the whole model; no optimizer."""
    model(ids, labels=ids, use_cache=False).loss.backward()
    model.zero_grad(set_to_none=True)


def train_blocks(model: nn.Module, ids: Tensor) -> None:
    """Forward and backward of embeddings and blocks: the head is left out, beside one block it would weigh too much."""
    model.backbone(ids, use_cache=False).last_hidden_state.float().square().mean().backward()
    model.zero_grad(set_to_none=True)


@torch.no_grad()
def linears(model: nn.Module, inputs: dict[str, Tensor], head: bool = True) -> None:
    """Every nn.Linear of a model, and nothing between them: the least a forward can take. Inputs are by name."""
    for name, rows in inputs.items():
        if head or name != "lm_head":
            linear = model.get_submodule(name)
            F.linear(rows, linear.weight, linear.bias)


def linear_inputs(model: nn.Module, length: int) -> dict[str, Tensor]:
    """Random rows [1, L, in] for each nn.Linear of a model."""
    return {
        name: torch.randn(1, length, module.in_features, dtype=module.weight.dtype)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    }


def our_wanda(arch: Arch, model: nn.Module, windows: Tensor) -> None:
    """Half of each row of every projection, dt_proj among them, as `ssmcompress prune` does it."""
    find_edits(model, arch, Prune(scope="row"), windows)


@torch.no_grad()
def hook_wanda(arch: Arch, model: nn.Module, windows: Tensor) -> None:
    """The same on a stock model by forward hooks, window by window, two passes a block; dt_proj's hook never fires."""
    hidden = [model.get_input_embeddings()(ids[None]) for ids in windows]
    for block in arch.blocks(model):
        sums: dict[nn.Linear, Tensor] = {}

        def watch(module: nn.Linear, inputs: tuple[Tensor, ...], _: Tensor, sums: dict = sums) -> None:
            sums[module] = sums.get(module, 0) + inputs[0].flatten(0, -2).float().square().sum(0)

        found = [module for module in block.modules() if isinstance(module, nn.Linear)]
        handles = [module.register_forward_hook(watch) for module in found]
        for rows in hidden:
            block(rows)
        for handle in handles:
            handle.remove()
        for module, squares in sums.items():
            score = module.weight.float().abs() * squares.sqrt()
            threshold = score.kthvalue(score.shape[1] // 2, dim=1, keepdim=True).values
            module.weight.masked_fill_(score <= threshold, 0)
        hidden = [block(rows) for rows in hidden]
