"""Mamba and Mamba-2 whose blocks have sizes of their own, on the classes of transformers.

ssmcompress writes this file beside weights that no config of transformers describes; it imports nothing but torch and
transformers. `block_sizes` in config.json holds the sizes of each block; the fields that are one number for all blocks
are those of the model that was cut. A block with no states has no scan. `out_proj_bias` gives out_proj, and nothing
else, a bias. A block of Mamba-2 with `rotated_from` projects that many states of B and C into a basis of fewer before
the scan; one with `group` has so few groups of B and C, though its norm has the `n_groups` of the model that was cut.
With `state_offset` every scan has a state beside its own that each token reads and that never changes.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus
from transformers import Mamba2Config, Mamba2ForCausalLM, MambaConfig, MambaForCausalLM
from transformers.models.mamba import modeling_mamba as mamba
from transformers.models.mamba2 import modeling_mamba2 as mamba2

GROUP, ROTATED = "group", "rotated_from"


def check(config: Any) -> None:
    """ValueError unless block_sizes gives every axis of every block a size, or those of its scan none."""
    sizes, layers = config.block_sizes, config.num_hidden_layers
    if not isinstance(sizes, list) or len(sizes) != layers:
        found = f"has {len(sizes)} entries" if isinstance(sizes, list) else f"is {sizes!r}"
        raise ValueError(f"block_sizes {found}; expected a list of {layers}, one for each layer.")
    for layer, block in enumerate(sizes):
        where = f"block_sizes[{layer}]"
        if not isinstance(block, dict) or set(block) - set(config.optional) != set(config.axes):
            found = ", ".join(map(str, block)) if isinstance(block, dict) else repr(block)
            raise ValueError(f"{where} holds {found or 'nothing'}; expected {', '.join(config.axes)}.")
        scanless = all(block[axis] == 0 for axis in config.scan_axes)
        for axis, size in block.items():
            if type(size) is not int or size < (0 if scanless and axis in config.scan_axes else 1):
                less = f", or {' and '.join(config.scan_axes)} 0 for no scan" if axis in config.scan_axes else ""
                raise ValueError(f"{where} gives {axis} as {size!r}; expected a whole number of at least 1{less}.")
        if block.get("head", 0) % getattr(config, "n_groups", 1):
            raise ValueError(f"{where} gives head as {block['head']}; expected a multiple of {config.n_groups} groups.")
        if GROUP in config.optional and config.n_groups % block.get(GROUP, 1):
            raise ValueError(f"{where} gives group as {block[GROUP]}; expected a divisor of {config.n_groups} groups.")
        if GROUP in block and scanless:
            raise ValueError(f"{where} gives group as {block[GROUP]}, but no states; expected none without a scan.")
        if ROTATED in block and not 1 <= block["state"] <= block[ROTATED]:
            raise ValueError(f"{where} gives state as {block['state']}; expected 1 to the {block[ROTATED]} it was.")
    for name in ("out_proj_bias", "state_offset"):
        if type(value := getattr(config, name)) is not bool:
            raise ValueError(f"{name} is {value!r}; expected true or false.")


class PrunedMambaConfig(MambaConfig):
    """A `MambaConfig` with the sizes of every block."""

    model_type = "ssmcompress_mamba"
    axes = ("channel", "state", "dt_rank")
    optional = ()
    scan_axes = ("state", "dt_rank")
    block_sizes: list[dict[str, int]] | None = None
    out_proj_bias: bool = False
    state_offset: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.rescale_prenorm_residual = False  # it would divide loaded weights
        check(self)

    def fields(self, sizes: dict[str, int]) -> dict[str, Any]:
        """The sizes of a block under the names that its classes read."""
        return {
            "intermediate_size": sizes["channel"],
            "state_size": sizes["state"],
            "time_step_rank": sizes["dt_rank"],
        }

    def state(self, sizes: dict[str, int]) -> tuple[int, ...]:
        """The shape of a block's state."""
        return sizes["channel"], sizes["state"]


class PrunedMamba2Config(Mamba2Config):
    """A `Mamba2Config` with the sizes of every block."""

    model_type = "ssmcompress_mamba2"
    axes = ("head", "head_channel", "state")
    optional = (GROUP, ROTATED)
    scan_axes = ("state",)
    block_sizes: list[dict[str, int]] | None = None
    out_proj_bias: bool = False
    state_offset: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.rescale_prenorm_residual = False  # it would divide loaded weights
        check(self)

    def validate(self) -> None:
        """Before it is saved: the one number of heads for all blocks need not fill the hidden size."""
        check(self)

    def fields(self, sizes: dict[str, int]) -> dict[str, Any]:
        """The sizes of a block under the names that its classes read."""
        inner = sizes["head"] * sizes["head_channel"]
        return {
            "num_heads": sizes["head"],
            "head_dim": sizes["head_channel"],
            "state_size": sizes.get(ROTATED, sizes["state"]),
            "n_groups": sizes.get(GROUP, self.n_groups),
            "expand": (inner + 0.5) / self.hidden_size,  # its mixer multiplies the two and rounds down
        }

    def state(self, sizes: dict[str, int]) -> tuple[int, ...]:
        """The shape of a block's state."""
        return sizes["head"], sizes["head_channel"], sizes["state"]


class StateOffset(nn.Module):
    """A state [D, N] or [H, P, N] that C reads with every token, beside the one that changes (Kang et al., 2025)."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.state = nn.Parameter(torch.zeros(shape))

    def forward(self, C: Tensor) -> Tensor:
        """C [..., N] → [..., D], or [..., G, N] → [..., H, P]."""
        state = self.state.to(C.dtype)
        if state.dim() == 2:
            return C @ state.T
        y = torch.einsum("...gn,ghpn->...ghp", C, state.view(C.shape[-2], -1, *state.shape[1:]))
        return y.flatten(-3, -2)


class Rotation(nn.Module):
    """Takes B and C [..., groups, states] into the basis that the states live in, [..., groups, fewer]."""

    def __init__(self, groups: int, fewer: int, states: int) -> None:
        super().__init__()
        self.B = nn.Parameter(torch.eye(fewer, states).repeat(groups, 1, 1))
        self.C = nn.Parameter(torch.eye(fewer, states).repeat(groups, 1, 1))

    def forward(self, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
        """Each by its own basis [groups, fewer, states]."""
        return rotated(B, self.B), rotated(C, self.C)


def rotated(x: Tensor, basis: Tensor) -> Tensor:
    """x [..., groups, states] in a basis [groups, fewer, states]: [..., groups, fewer]."""
    return torch.einsum("...gn,grn->...gr", x, basis.to(x.dtype))


class MergedMamba2Mixer(mamba2.Mamba2Mixer):
    """The mixer of Mamba-2 without the fused kernel of training, in which a norm has the groups of B and C."""

    def forward(
        self,
        hidden_states: Tensor,
        cache_params: Any = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Hidden states [B, L, d] → [B, L, d]; the cache, where given, is read and brought up to date."""
        batch, length, _ = hidden_states.shape
        grouped, cache = self.n_groups * self.ssm_state_size, cache_params
        state = None if cache is None else cache.get_recurrent_state(self.layer_idx)
        sizes = [self.intermediate_size, self.conv_dim, self.num_heads]
        projected = self.in_proj(mamba2.apply_mask_to_padding_states(hidden_states, attention_mask))
        gate, xBC, dt = projected.split(sizes, dim=-1)
        xBC = mamba2.apply_mask_to_padding_states(convolve(self, xBC, cache), attention_mask)
        x, B, C = xBC.split([self.intermediate_size, grouped, grouped], dim=-1)
        x = x.reshape(batch, length, self.num_heads, self.head_dim)
        B, C = self.basis(*(part.reshape(batch, length, self.n_groups, -1) for part in (B, C)))
        if state is not None and length == 1:
            y, state = self.step(state, x[:, 0], dt[:, 0], B[:, 0], C[:, 0])
        else:
            y, state = mamba2.mamba2_chunk_scan(
                x,
                dt,
                -torch.exp(self.A_log.float()),
                B,
                C,
                chunk_size=self.chunk_size,
                D=self.D,
                dt_bias=self.dt_bias,
                dt_softplus=True,
                dt_limit=self.time_step_limit,
                initial_states=state,
                return_final_states=True,
            )
        if cache is not None:
            cache.update_recurrent_state(state, self.layer_idx)
        if hasattr(self, "offset"):
            y = y.reshape(x.shape) + self.offset(C)
        y = self.norm(y.reshape(batch, length, -1), gate)
        return self.out_proj(y.to(hidden_states.dtype))

    def step(self, state: Tensor, x: Tensor, dt: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
        """One token: state [B, H, P, r], x [B, H, P], dt [B, H], B and C [B, G, r] → y [B, H, P] and the state."""
        heads = self.num_heads // self.n_groups
        delta = softplus((dt + self.dt_bias).float()).clamp(*self.time_step_limit)
        decay = torch.exp(-delta * torch.exp(self.A_log.float()))
        B, C = (part.float().repeat_interleave(heads, dim=1) for part in (B, C))
        state = decay[..., None, None] * state + (delta[..., None] * x)[..., None] * B[:, :, None]
        return torch.einsum("bhpr,bhr->bhp", state, C) + self.D[:, None] * x, state

    def basis(self, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
        """B and C [B, L, G, N] in the basis of the states."""
        return B, C


class OffsetMambaMixer(mamba.MambaMixer):
    """The mixer of Mamba-1 without the fused kernel of training, with an `offset` of its state."""

    def forward(
        self, hidden_states: Tensor, cache_params: Any = None, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        """Hidden states [B, L, d] → [B, L, d]; the cache, where given, is read and brought up to date."""
        length, cache = hidden_states.shape[1], cache_params
        state = None if cache is None else cache.get_recurrent_state(self.layer_idx)
        projected = self.in_proj(mamba.apply_mask_to_padding_states(hidden_states, attention_mask))
        x, gate = projected.chunk(2, dim=-1)
        x = mamba.apply_mask_to_padding_states(convolve(self, x, cache), attention_mask)
        sizes = [self.time_step_rank, self.ssm_state_size, self.ssm_state_size]
        dt, B, C = self.x_proj(x).split(sizes, dim=-1)
        dt = nn.functional.linear(dt, self.dt_proj.weight)
        A, bias = -torch.exp(self.A_log.float()), self.dt_proj.bias.float()
        if state is not None and length == 1:
            y = mamba.mamba_selective_state_update(
                state, x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], self.D, dt_bias=bias, dt_softplus=True
            )[:, None]
        else:
            x, dt, B = x.transpose(1, 2), dt.transpose(1, 2), B.transpose(1, 2)
            y, state = mamba.mamba_selective_scan(
                x,
                dt,
                A,
                B,
                C.transpose(1, 2),
                D=self.D.float(),
                delta_bias=bias,
                delta_softplus=True,
                return_last_state=True,
                use_mambapy=self.use_mambapy,
                use_associative_scan=self.use_associative_scan,
            )
            y = y.transpose(1, 2)
            if cache is not None:
                cache.update_recurrent_state(state, self.layer_idx)
        y = (y + self.offset(C)) * nn.functional.silu(gate)
        return self.out_proj(y.to(hidden_states.dtype))


class RotatedMamba2Mixer(MergedMamba2Mixer):
    """The mixer of Mamba-2 with a `rotation` between convolution and scan."""

    def basis(self, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
        """B and C [B, L, G, N] → [B, L, G, fewer]."""
        return self.rotation(B, C)


def convolve(mixer: Any, x: Tensor, cache: Any) -> Tensor:
    """The short convolution and its activation, [B, L, C] → [B, L, C]; the cache keeps the last inputs."""
    length, x = x.shape[1], x.transpose(1, 2)
    if cache is not None:
        x = cache.update_conv_state(x, mixer.layer_idx, conv_kernel_size=mixer.conv_kernel_size)
    kernel = mixer.conv1d.weight.squeeze(1)
    y = mamba2.causal_conv1d_fn(x, kernel, mixer.conv1d.bias, activation=mixer.activation)
    return y[..., -length:].transpose(1, 2)


class GatedConvolution(nn.Module):
    """What is left of a Mamba-1 mixer without its scan: with C h silent, the scan of x gives D x.

    Without D, which the published code of Mamba-Shedder drops too, it would be the block of MambaOut.
    """

    def __init__(self, config: Any, mixer: Any) -> None:
        super().__init__()
        inner, kernel = mixer.intermediate_size, config.conv_kernel
        self.layer_idx, self.intermediate_size, self.conv_kernel_size = mixer.layer_idx, inner, kernel
        self.activation, self.act = mixer.activation, mixer.act
        self.in_proj = nn.Linear(config.hidden_size, 2 * inner, bias=config.use_bias)
        self.conv1d = nn.Conv1d(inner, inner, kernel, groups=inner, padding=kernel - 1, bias=config.use_conv_bias)
        self.D = nn.Parameter(torch.ones(len(mixer.D)))
        self.out_proj = mixer.out_proj

    def halves(self, projected: Tensor) -> tuple[Tensor, Tensor]:
        """x and z of what in_proj gives."""
        x, z = projected.chunk(2, dim=-1)
        return x, z

    def skip(self, x: Tensor) -> Tensor:
        """D x [B, L, inner], of the dtype of x."""
        return (x * self.D.repeat_interleave(x.shape[-1] // len(self.D))).to(x.dtype)

    def gated(self, y: Tensor, z: Tensor) -> Tensor:
        """What out_proj takes in."""
        return y * nn.functional.silu(z)

    def forward(
        self, hidden_states: Tensor, cache_params: Any = None, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        """Hidden states [B, L, d] → [B, L, d]; the cache keeps the last inputs of the convolution."""
        x, z = self.halves(self.in_proj(hidden_states))
        if attention_mask is not None:
            x = x * attention_mask[:, -x.shape[1] :, None].to(x.dtype)
        y = self.skip(convolve(self, x, cache_params))
        return self.out_proj(self.gated(y, z))


class GatedConvolution2(GatedConvolution):
    """What is left of a Mamba-2 mixer without its scan; D is one number a head, and the gate has a norm."""

    def __init__(self, config: Any, mixer: Any) -> None:
        super().__init__(config, mixer)
        self.norm = mixer.norm

    def halves(self, projected: Tensor) -> tuple[Tensor, Tensor]:
        """x and z of what in_proj gives, where z is first."""
        z, x = projected.chunk(2, dim=-1)
        return x, z

    def gated(self, y: Tensor, z: Tensor) -> Tensor:
        """What out_proj takes in."""
        return self.norm(y, z)


def rebuild(model: Any, kind: Any, scanless: Any, offset: Any) -> None:
    """Gives a model the blocks that its config describes: of a kind, and with these mixers where it says so."""
    blocks = []
    for layer, sizes in enumerate(model.config.block_sizes):
        config = copy.copy(model.config)
        some = {axis: size or 1 for axis, size in sizes.items()}
        vars(config).update(config.fields(some))  # past the checks, which want a whole expand
        blocks.append(block := kind(config, layer_idx=layer))
        if not sizes["state"]:
            block.mixer = scanless(config, block.mixer)
        elif config.state_offset:
            block.mixer.offset = StateOffset(*config.state(sizes))
            block.mixer.__class__ = offset
        if GROUP in sizes:
            block.mixer.norm.group_size = block.mixer.intermediate_size // model.config.n_groups
            block.mixer.__class__ = MergedMamba2Mixer
        if ROTATED in sizes:
            block.mixer.rotation = Rotation(config.n_groups, sizes["state"], sizes[ROTATED])
            block.mixer.__class__ = RotatedMamba2Mixer
        if config.out_proj_bias:
            block.mixer.out_proj = nn.Linear(block.mixer.intermediate_size, config.hidden_size)
            block.mixer.use_bias = True  # the fused kernels ask this
    model.backbone.layers = nn.ModuleList(blocks)
    model.post_init()


class PrunedMambaForCausalLM(MambaForCausalLM):
    """`MambaForCausalLM` with the blocks of a `PrunedMambaConfig`."""

    config_class = PrunedMambaConfig

    def __init__(self, config: PrunedMambaConfig) -> None:
        super().__init__(config)
        rebuild(self, mamba.MambaBlock, GatedConvolution, OffsetMambaMixer)


class PrunedMamba2ForCausalLM(Mamba2ForCausalLM):
    """`Mamba2ForCausalLM` with the blocks of a `PrunedMamba2Config`."""

    config_class = PrunedMamba2Config

    def __init__(self, config: PrunedMamba2Config) -> None:
        super().__init__(config)
        rebuild(self, mamba2.Mamba2Block, GatedConvolution2, MergedMamba2Mixer)
