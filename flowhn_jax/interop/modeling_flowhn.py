"""FlowHN, SHM and Hymba in PyTorch, for models trained with flowhn-jax.

`AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)` uses this file, which each
exported folder contains. It is a single file that needs PyTorch and transformers alone, and favors
plain code over speed: the scans are loops over the tokens.

Letters in shapes: B rows, T tokens, D width, H heads, G key-value heads (attention) or groups
(Mamba-2), K size of a head of attention, P of Mamba-2, E channels of a mixer, S states, W taps of a
convolution, R rank of the time steps, C tokens in a cache, V words.

Rows of different lengths are moved to the left with padding after them. `valid` [B, T] marks the
tokens that are not padding.
"""

import inspect
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.utils.generic import ModelOutput

_MAX_LOG = 88.0  # exp(88) is finite in float32
# What this version of transformers calls the cache.
_PARAMETERS = inspect.signature(vars(GenerationMixin)["prepare_inputs_for_generation"]).parameters
_CACHE = "cache" if "cache" in _PARAMETERS else "past_key_values"


class FlowHNConfig(PretrainedConfig):
    """The config of a model.

    Attributes:
      model: the keys of the model's config in flowhn-jax.
      plan: for FlowHN, for each block the positions of attention: those whose remainder modulo
        `period` lies in one of the `runs` [start, stop), or `width` tokens of every window of
        `period`, by their scores. None for a block in which both branches see all tokens; a block
        with one branch has all positions in its runs, or none.
      max_length_of_plan: positions that the plan is made for; None: no limit.
    """

    model_type = "flowhn_jax"

    def __init__(
        self,
        model: dict[str, Any] | None = None,
        plan: list[dict[str, Any] | None] | None = None,
        max_length_of_plan: int | None = None,
        **kwargs: Any,
    ):
        self.model = dict(model or {})
        self.plan = plan
        self.max_length_of_plan = max_length_of_plan
        kwargs.setdefault("tie_word_embeddings", False)
        super().__init__(**kwargs)

    @property
    def vocab_size(self) -> int:
        """V, the number of token ids."""
        return self.model["vocab_size"]

    @property
    def hidden_size(self) -> int:
        """D, the size of the stream between blocks."""
        return self.model["width"]

    @property
    def num_hidden_layers(self) -> int:
        """The number of blocks."""
        return self.model["blocks"]

    @property
    def num_attention_heads(self) -> int:
        """H, the query heads of attention."""
        return self.model["heads"]

    @property
    def max_position_embeddings(self) -> int:
        """The context that the model was trained with, in tokens."""
        return self.model["context"]


class RMSNorm(nn.Module):
    """RMS norm with float32 statistics; the result has the dtype of x."""

    def __init__(self, features: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(features))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Return the normed x [..., features]."""
        wide = x.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (normed * self.weight.float()).to(x.dtype)


class GatedRMSNorm(nn.Module):
    """RMS norm of x * silu(gate) over each group of channels, with float32 statistics."""

    def __init__(self, features: int, groups: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(features))
        self.groups, self.eps = groups, eps

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        """Return the normed channels [..., E] for x and gate [..., E]."""
        gated = x.float() * F.silu(gate.float())
        groups = gated.unflatten(-1, (self.groups, -1))
        groups = groups * torch.rsqrt(groups.square().mean(-1, keepdim=True) + self.eps)
        return (groups.flatten(-2) * self.weight.float()).to(gate.dtype)


class SwiGLU(nn.Module):
    """The gated MLP down(silu(gate(x)) * up(x))."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the transformed tokens [..., D] of x [..., D]."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class KeysValues(NamedTuple):
    """Keys and values [B, C, G, K] of tokens, their positions [B, C], and which are `valid`."""

    k: Tensor
    v: Tensor
    positions: Tensor
    valid: Tensor


class Attention(nn.Module):
    """Causal grouped-query attention; options as in flowhn-jax's layers.attention."""

    def __init__(
        self,
        model: dict[str, Any],
        head_size: int,
        rope_theta: float | None = None,
        window: int | None = None,
        prefix: int = 0,
        borrows: bool = False,
        projects: bool = True,
    ):
        super().__init__()
        width, self.head_size = model["width"], head_size
        self.rope_theta, self.window, self.prefix = rope_theta, window, prefix
        self.borrows, self.projects = borrows, projects
        self.q_proj = nn.Linear(width, model["heads"] * head_size, bias=False)
        if not borrows:
            self.k_proj = nn.Linear(width, model["kv_heads"] * head_size, bias=False)
            self.v_proj = nn.Linear(width, model["kv_heads"] * head_size, bias=False)
        if projects:
            self.o_proj = nn.Linear(model["heads"] * head_size, width, bias=False)

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        valid: Tensor,
        cache: KeysValues | None,
        borrowed: KeysValues | None = None,
    ) -> tuple[Tensor, KeysValues]:
        """Return the outputs for x [B, T, D], and keys and values with those of x."""
        if self.borrows:
            assert borrowed is not None, "the first layer never borrows"
            seen = borrowed
        else:
            k = self._rotate(self._heads(self.k_proj(x)), positions)
            seen = KeysValues(k, self._heads(self.v_proj(x)), positions, valid)
            if cache is not None:
                seen = KeysValues(*(torch.cat(pair, 1) for pair in zip(cache, seen, strict=True)))
        q = self._rotate(self._heads(self.q_proj(x)), positions)
        distance = positions[:, :, None] - seen.positions[:, None]
        visible = (distance >= 0) & seen.valid[:, None]
        if self.window is not None:
            visible &= (distance < self.window) | (seen.positions < self.prefix)[:, None]
        visible |= ~valid[:, :, None]  # padding attends to anything: a row must not be empty
        repeats = q.shape[2] // seen.k.shape[2]
        k, v = (each.repeat_interleave(repeats, 2).transpose(1, 2) for each in seen[:2])
        y = F.scaled_dot_product_attention(q.transpose(1, 2), k, v, attn_mask=visible[:, None])
        y = y.transpose(1, 2).flatten(2)
        return self.o_proj(y) if self.projects else y, seen

    def _heads(self, projected: Tensor) -> Tensor:
        return projected.unflatten(-1, (-1, self.head_size))

    def _rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """Return x [B, T, H, K] with rotary positions, halves rotated as in Llama."""
        if self.rope_theta is None:
            return x
        half = x.shape[-1] // 2
        exponents = torch.arange(half, device=x.device, dtype=torch.float32) / half
        angles = (positions[..., None] * self.rope_theta**-exponents)[:, :, None]
        first, second = x.float().chunk(2, -1)
        cos, sin = angles.cos(), angles.sin()
        return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(x.dtype)


class ScanCache(NamedTuple):
    """The last W - 1 inputs of a convolution, [B, W - 1, C], and the state of a scan, float32."""

    conv: Tensor
    state: Tensor


def _convolve(
    x: Tensor, valid: Tensor, weight: Tensor, bias: Tensor, before: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return silu of the causal depthwise convolution of x [B, T, C], and its last inputs.

    Args:
      x: [B, T, C].
      valid: [B, T] bool; valid tokens come first.
      weight: [C, 1, W].
      bias: [C].
      before: [B, W - 1, C], the inputs before x; None: zeros.
    """
    taps = weight.shape[-1] - 1
    if before is None:
        before = x.new_zeros(x.shape[0], taps, x.shape[2])
    padded = torch.cat((before, x), 1)
    wide = F.conv1d(padded.float().transpose(1, 2), weight.float(), bias.float(), groups=x.shape[2])
    last = valid.sum(1, keepdim=True) + torch.arange(taps, device=x.device)
    after = padded.gather(1, last[:, :, None].expand(-1, -1, x.shape[2]))
    return F.silu(wide.transpose(1, 2)).to(x.dtype), after


class Mamba1(nn.Module):
    """The selective state space of Mamba, with Jamba's norms on dt, B and C."""

    def __init__(self, model: dict[str, Any], projects: bool = True):
        super().__init__()
        width, state, eps = model["width"], model["ssm_state"], model["norm_eps"]
        inner = round(model["ssm_expand"] * width)
        rank = model["ssm_dt_rank"] or -(-width // 16)
        self.sizes = rank, state, state
        self.projects = projects
        self.in_proj = nn.Linear(width, 2 * inner, bias=False)
        self.x_proj = nn.Linear(inner, sum(self.sizes), bias=False)
        self.dt_proj = nn.Linear(rank, inner, bias=False)
        if projects:
            self.out_proj = nn.Linear(inner, width, bias=False)
        self.dt_norm, self.b_norm, self.c_norm = (RMSNorm(size, eps) for size in self.sizes)
        self.conv_weight = nn.Parameter(torch.zeros(inner, 1, model["ssm_conv"]))
        self.conv_bias = nn.Parameter(torch.zeros(inner))
        self.dt_bias = nn.Parameter(torch.zeros(inner))
        self.a_log = nn.Parameter(torch.zeros(inner, state))
        self.d = nn.Parameter(torch.ones(inner))

    def forward(
        self, x: Tensor, positions: Tensor, valid: Tensor, cache: ScanCache | None
    ) -> tuple[Tensor, ScanCache]:
        """Return the mixed tokens [B, T, D], and the cache after each row's tokens."""
        u, z = self.in_proj(x).chunk(2, -1)
        before = None if cache is None else cache.conv
        u, conv = _convolve(u, valid, self.conv_weight, self.conv_bias, before)
        dt, b, c = F.linear(u.float(), self.x_proj.weight.float()).split(self.sizes, -1)
        dt = F.linear(self.dt_norm(dt), self.dt_proj.weight.float())
        dt = F.softplus(dt + self.dt_bias.float()) * valid[..., None]
        b, c, wide = self.b_norm(b), self.c_norm(c), u.float()
        rates = -self.a_log.float().clamp(max=_MAX_LOG).exp()
        state = rates.new_zeros(x.shape[0], *rates.shape) if cache is None else cache.state
        outputs = []
        for t in range(x.shape[1]):
            step = dt[:, t, :, None]
            state = (step * rates).exp() * state + step * wide[:, t, :, None] * b[:, t, None]
            outputs.append((state * c[:, t, None]).sum(-1))
        y = (torch.stack(outputs, 1) + self.d.float() * wide) * F.silu(z.float())
        y = y.to(x.dtype)
        return self.out_proj(y) if self.projects else y, ScanCache(conv, state)


class Mamba2(nn.Module):
    """The mixer of Mamba-2, with the gated norm before the output projection."""

    def __init__(self, model: dict[str, Any]):
        super().__init__()
        width, state = model["width"], model["ssm_state"]
        self.head_dim, self.groups = model["ssm_head_dim"], model["ssm_groups"]
        inner = round(model["ssm_expand"] * width)
        heads, shared = inner // self.head_dim, self.groups * state
        convolved = inner + 2 * shared
        self.sizes = inner, convolved, heads
        self.convolved_sizes = inner, shared, shared
        self.in_proj = nn.Linear(width, sum(self.sizes), bias=False)
        self.out_proj = nn.Linear(inner, width, bias=False)
        self.norm = GatedRMSNorm(inner, self.groups, model["norm_eps"])
        self.conv_weight = nn.Parameter(torch.zeros(convolved, 1, model["ssm_conv"]))
        self.conv_bias = nn.Parameter(torch.zeros(convolved))
        self.dt_bias = nn.Parameter(torch.zeros(heads))
        self.a_log = nn.Parameter(torch.zeros(heads))
        self.d = nn.Parameter(torch.ones(heads))

    def forward(
        self, x: Tensor, positions: Tensor, valid: Tensor, cache: ScanCache | None
    ) -> tuple[Tensor, ScanCache]:
        """Return the mixed tokens [B, T, D], and the cache after each row's tokens."""
        z, xbc, dt = self.in_proj(x).split(self.sizes, -1)
        before = None if cache is None else cache.conv
        xbc, conv = _convolve(xbc, valid, self.conv_weight, self.conv_bias, before)
        u, b, c = xbc.float().split(self.convolved_sizes, -1)
        u = u.unflatten(-1, (-1, self.head_dim))
        b, c = (v.unflatten(-1, (self.groups, -1)) for v in (b, c))
        b, c = (v.repeat_interleave(u.shape[2] // self.groups, 2) for v in (b, c))
        dt = F.softplus(dt.float() + self.dt_bias.float()) * valid[..., None]
        rates = -self.a_log.float().clamp(max=_MAX_LOG).exp()
        state = u.new_zeros(x.shape[0], *u.shape[2:], b.shape[-1]) if cache is None else cache.state
        outputs = []
        for t in range(x.shape[1]):
            step = dt[:, t, :, None, None]
            added = step * u[:, t, :, :, None] * b[:, t, :, None]
            state = (step * rates[:, None, None]).exp() * state + added
            outputs.append((state * c[:, t, :, None]).sum(-1))
        y = torch.stack(outputs, 1) + self.d.float()[:, None] * u
        y = self.norm(y.flatten(2), z)
        return self.out_proj(y), ScanCache(conv, state)


class DecoderLayer(nn.Module):
    """x + mixer(RMS(x)), then x + SwiGLU(RMS(x)) unless `mlp_width` is 0."""

    def __init__(self, model: dict[str, Any], mixer: nn.Module, mlp_width: int):
        super().__init__()
        width, eps = model["width"], model["norm_eps"]
        self.norm = RMSNorm(width, eps)
        self.mixer = mixer
        self.has_mlp = mlp_width > 0
        if self.has_mlp:
            self.mlp_norm = RMSNorm(width, eps)
            self.mlp = SwiGLU(width, mlp_width)

    def forward(
        self, x: Tensor, positions: Tensor, valid: Tensor, cache: Any
    ) -> tuple[Tensor, Any]:
        """Return the stream [B, T, D] after the layer, and the mixer's new cache."""
        mixed, cache = self.mixer(self.norm(x), positions, valid, cache)
        x = x + mixed
        return x + self.mlp(self.mlp_norm(x)) if self.has_mlp else x, cache


def _head_size(model: dict[str, Any]) -> int:
    return model["head_dim"] or model["width"] // model["heads"]


def _leading(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return the columns of the tokens in mask [B, T], in order, and which of them are in it.

    Both are [B, N] for the largest number N of tokens in a row.
    """
    counts = mask.sum(1)
    most = int(counts.max())
    columns = torch.argsort((~mask).to(torch.uint8), dim=1, stable=True)[:, :most]
    return columns, torch.arange(most, device=mask.device) < counts[:, None]


def _take(x: Tensor, columns: Tensor) -> Tensor:
    """Return the columns [B, N] of x [B, T, D]: [B, N, D]."""
    return x.gather(1, columns[:, :, None].expand(-1, -1, x.shape[2]))


def _put(x: Tensor, columns: Tensor, is_new: Tensor, new: Tensor) -> Tensor:
    """Return x [B, T, D] with columns [B, N] replaced by new [B, N, D] where `is_new` [B, N]."""
    new = torch.where(is_new[:, :, None], new, _take(x, columns))
    return x.scatter(1, columns[:, :, None].expand(-1, -1, x.shape[2]), new)


def _make_branch(model: dict[str, Any], name: str) -> DecoderLayer:
    """Return the branch 'ssm' or 'attention' of a FlowHN block."""
    mlp_width = model["mlp_width"]
    if name == "attention":
        rope_theta = model["attention_rope_theta"] or None
        mixer = Attention(model, _head_size(model), rope_theta=rope_theta)
        mlp_width = model["attention_mlp_width"] or mlp_width
    else:
        mixer = Mamba2(model) if model["ssm"] == "mamba2" else Mamba1(model)
    return DecoderLayer(model, mixer, mlp_width if model["branch_mlp"] else 0)


class StemBlock(nn.Module):
    """A block of one branch, for all tokens."""

    def __init__(self, model: dict[str, Any], name: str):
        super().__init__()
        self.layer = _make_branch(model, name)

    def forward(
        self, x: Tensor, positions: Tensor, valid: Tensor, cache: Any
    ) -> tuple[Tensor, Any]:
        """Return the stream [B, T, D] after the block, and the mixer's new cache."""
        return self.layer(x, positions, valid, cache)


class Router(nn.Module):
    """A score of each token, linear in the normed stream, in float32."""

    def __init__(self, model: dict[str, Any]):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(model["width"]))
        self.bias = nn.Parameter(torch.zeros(1))
        self.eps = model["norm_eps"]

    def forward(self, x: Tensor) -> Tensor:
        """Return the scores [B, T] of tokens x [B, T, D]."""
        wide = x.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return normed @ self.weight.float() + self.bias.float()


class FlowHNBlock(nn.Module):
    """An SSM branch and an attention branch, and the fusion of their outputs."""

    def __init__(self, model: dict[str, Any], attended: dict[str, Any] | None):
        super().__init__()
        width, eps = model["width"], model["norm_eps"]
        self.ssm = _make_branch(model, "ssm")
        self.attention = _make_branch(model, "attention")
        self.attended = attended
        self.reads_all = model["split"]["reads"] == "all"
        self.router = Router(model) if attended and "width" in attended else None
        self.has_projections = model["fusion"] == "paper"
        if self.has_projections:
            self.branch_proj = nn.Linear(width if attended else 2 * width, width, bias=False)
            self.norm = RMSNorm(width, eps)
            self.final_proj = nn.Linear(width, width, bias=False)

    def forward(
        self, x: Tensor, positions: Tensor, valid: Tensor, cache: dict[str, Any] | None
    ) -> tuple[Tensor, dict[str, Any]]:
        """Return the stream [B, T, D] after the block, and the branches' new caches by name."""
        cache = cache or {"ssm": None, "attention": None, "attended": None}
        branches = {"ssm": self.ssm, "attention": self.attention}
        new_cache = dict(cache)
        if self.attended is None or self.reads_all:
            outputs = {}
            for name, branch in branches.items():
                outputs[name], new_cache[name] = branch(x, positions, valid, cache[name])
            joined = self._join(x, positions, **outputs)
        else:
            scores = None if self.router is None else self.router(x)
            if scores is None:
                attends = self._attends(positions)
            else:
                routes = self._route(scores, positions, valid, cache["attended"])
                attends, new_cache["attended"] = routes
            joined = torch.zeros_like(x)
            for name, mask in (("ssm", ~attends & valid), ("attention", attends & valid)):
                columns, chosen = _leading(mask)
                if columns.shape[1]:
                    of_branch = _take(x, columns), positions.gather(1, columns), chosen
                    y, new_cache[name] = branches[name](*of_branch, cache[name])
                    joined = _put(joined, columns, chosen, y)
            if scores is not None:
                gates = 2 * torch.sigmoid(torch.where(attends, scores, -scores))[:, :, None]
                joined = (x.float() + gates * (joined.float() - x.float())).to(x.dtype)
        if not self.has_projections:
            return joined, new_cache
        x = x + self.branch_proj(joined)
        return x + self.final_proj(self.norm(x)), new_cache

    def _join(self, x: Tensor, positions: Tensor, ssm: Tensor, attention: Tensor) -> Tensor:
        """Return the outputs of both branches for all tokens x [B, T, D], joined for the fusion."""
        if self.attended is not None:
            return torch.where(self._attends(positions)[:, :, None], attention, ssm)
        if self.has_projections:
            return torch.cat((ssm, attention), -1)
        return (ssm.float() + attention.float() - x.float()).to(x.dtype)

    def _route(
        self, scores: Tensor, positions: Tensor, valid: Tensor, attended: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return which tokens [B, T] go to attention, and how many did in each row's last window.

        A token does if its score is above 0 and its window has sent fewer than `width` tokens, or
        if all that are left of the window must fill it.

        Args:
          scores: [B, T].
          positions: [B, T].
          valid: [B, T].
          attended: [B], tokens of each row's window before; None: no token yet.
        """
        assert self.attended is not None
        period, width = self.attended["period"], self.attended["width"]
        if attended is None:
            attended = torch.zeros_like(positions[:, 0])
        attends = []
        for t in range(scores.shape[1]):
            offset = positions[:, t] % period
            left = width - torch.where(offset == 0, 0, attended)
            is_chosen = (left > 0) & ((scores[:, t] > 0) | (left == period - offset))
            attends.append(is_chosen)
            attended = torch.where(valid[:, t], width - left + is_chosen, attended)
        return torch.stack(attends, 1), attended

    def _attends(self, positions: Tensor) -> Tensor:
        """Return which positions [B, T] attention gets, bool."""
        assert self.attended is not None
        phase = positions % self.attended["period"]
        inside = torch.zeros_like(positions, dtype=torch.bool)
        for start, stop in self.attended["runs"]:
            inside |= (start <= phase) & (phase < stop)
        return inside


class HymbaMixer(nn.Module):
    """The mean of the normed outputs of attention and Mamba heads, projected."""

    def __init__(self, model: dict[str, Any], index: int):
        super().__init__()
        layers = model["blocks"]
        inner = round(model["ssm_expand"] * model["width"])
        self.attention = Attention(
            model,
            inner // model["heads"],
            rope_theta=model["rope_theta"],
            window=None if _is_global(index, layers) else model["window"],
            prefix=model["meta_tokens"],
            borrows=_borrows(index, layers),
            projects=False,
        )
        self.ssm = Mamba1(model, projects=False)
        self.attention_norm = RMSNorm(inner, model["norm_eps"])
        self.ssm_norm = RMSNorm(inner, model["norm_eps"])
        self.out_proj = nn.Linear(inner, model["width"], bias=False)

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        valid: Tensor,
        cache: dict[str, Any],
        borrowed: KeysValues | None,
    ) -> tuple[Tensor, dict[str, Any], KeysValues]:
        """Return the mixed tokens [B, T, D], the new cache, and keys and values."""
        attended, seen = self.attention(x, positions, valid, cache["attention"], borrowed)
        ssm, of_ssm = self.ssm(x, positions, valid, cache["ssm"])
        y = self.out_proj((self.attention_norm(attended) + self.ssm_norm(ssm)) / 2)
        return y, {"attention": None if self.attention.borrows else seen, "ssm": of_ssm}, seen


def _is_global(index: int, layers: int) -> bool:
    """Return whether attention of layer `index` has no window."""
    return index in (0, layers // 2, layers - 1)


def _borrows(index: int, layers: int) -> bool:
    """Return whether layer `index` takes the keys and values of the layer before it."""
    windowed_before = 0
    while windowed_before < index and not _is_global(index - windowed_before - 1, layers):
        windowed_before += 1
    return not _is_global(index, layers) and windowed_before % 2 == 1


class HymbaLayer(nn.Module):
    """x + mixer(RMS(x)), then x + SwiGLU(RMS(x)); keys and values pass from layer to layer."""

    def __init__(self, model: dict[str, Any], index: int):
        super().__init__()
        width, eps = model["width"], model["norm_eps"]
        self.norm = RMSNorm(width, eps)
        self.mixer = HymbaMixer(model, index)
        self.mlp_norm = RMSNorm(width, eps)
        self.mlp = SwiGLU(width, model["mlp_width"])

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        valid: Tensor,
        cache: dict[str, Any] | None,
        borrowed: KeysValues | None,
    ) -> tuple[Tensor, dict[str, Any], KeysValues]:
        """Return the stream [B, T, D], the new cache, and keys and values for the next layer."""
        cache = cache or {"attention": None, "ssm": None}
        mixed, new_cache, seen = self.mixer(self.norm(x), positions, valid, cache, borrowed)
        x = x + mixed
        return x + self.mlp(self.mlp_norm(x)), new_cache, seen


class DecodeCache:
    """The state of generation after the columns so far.

    Attributes:
      blocks: the cache of each block.
      tokens: [B] int64, tokens of each row so far, padding not counted.
      columns: columns of the input so far, padding included.
    """

    def __init__(self, blocks: list[Any], tokens: Tensor, columns: int):
        self.blocks, self.tokens, self.columns = blocks, tokens, columns

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the number of columns that the model has read."""
        return self.columns

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Replace the rows by those of the numbers `beam_idx` [B], for beam search."""
        self.blocks = _rows(self.blocks, beam_idx)
        self.tokens = self.tokens.index_select(0, beam_idx.to(self.tokens.device))


def _rows(cache: Any, rows: Tensor) -> Any:
    """Return a tree of tensors with the given rows of each."""
    if cache is None:
        return None
    if isinstance(cache, Tensor):
        return cache.index_select(0, rows.to(cache.device))
    if isinstance(cache, dict):
        return {name: _rows(each, rows) for name, each in cache.items()}
    found = [_rows(each, rows) for each in cache]
    return found if isinstance(cache, list) else type(cache)(*found)


@dataclass
class FlowHNOutput(ModelOutput):
    """The loss in nats per token, and the logits [B, T, V] in float32.

    The cache is a further entry, under the name that the installed version of transformers uses.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None


class FlowHNForCausalLM(PreTrainedModel, GenerationMixin):
    """A language model: embedding, blocks, final norm and head."""

    config_class = FlowHNConfig
    base_model_prefix = ""
    supports_gradient_checkpointing = False
    _supports_sdpa = True
    _is_stateful = True  # a cache cannot forget its last tokens

    def __init__(self, config: FlowHNConfig):
        super().__init__(config)
        model = config.model
        self.embed = nn.Embedding(model["vocab_size"], model["width"])
        self.blocks = nn.ModuleList(_make_blocks(config))
        self.final_norm = RMSNorm(model["width"], model["norm_eps"])
        is_tied = model["tie_embeddings"]
        self.head = None if is_tied else nn.Linear(model["width"], model["vocab_size"], bias=False)
        self.is_hymba = model["kind"] == "hymba"
        if self.is_hymba:
            self.meta = nn.Parameter(torch.zeros(model["meta_tokens"], model["width"]))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=self.config.model["init_std"])

    def get_input_embeddings(self) -> nn.Module:
        """Return the embedding of the tokens."""
        return self.embed

    def get_output_embeddings(self) -> nn.Module | None:
        """Return the head; None if the embedding's table is its matrix."""
        return self.head

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        cache: DecodeCache | None = None,
        past_key_values: DecodeCache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        inputs_embeds: Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Return the logits, and the loss if there are labels.

        Args:
          input_ids: [B, T], integer.
          attention_mask: [B, T], or with a cache [B, columns so far + T]; 0 marks padding, on
            either side.
          labels: [B, T]; the token after each position is predicted, -100 is ignored.
          cache: from the output of the columns before.
          past_key_values: another name of `cache`.
          use_cache: whether to return a cache.
          logits_to_keep: number of last columns with logits; 0: all.
          inputs_embeds: [B, T, D], in place of `input_ids`.
          return_dict: False: a tuple.
          kwargs: other arguments of generation, which have no effect.

        Raises:
          ValueError: a row is longer than the plan of the split.
        """
        cache = past_key_values if cache is None else cache
        x = self.embed(input_ids) if inputs_embeds is None else inputs_embeds
        batch, columns = x.shape[:2]
        valid = torch.ones(batch, columns, dtype=torch.bool, device=x.device)
        if attention_mask is not None:
            valid = attention_mask[:, -columns:].to(x.device).bool()
        done = valid.new_zeros(batch, dtype=torch.long) if cache is None else cache.tokens
        moved, leading = _leading(valid)
        positions = done[:, None] + torch.arange(moved.shape[1], device=x.device)
        most = self.config.max_length_of_plan
        tokens = done + valid.sum(1)
        if most is not None and int(tokens.max()) > most:
            raise ValueError(
                f"A row must have at most the {most} tokens that the split is planned for; got "
                f"{int(tokens.max())}."
            )
        blocks = [None] * len(self.blocks) if cache is None else cache.blocks
        y, blocks = self._apply_blocks(_take(x, moved), positions, leading, blocks)
        x = _put(torch.zeros_like(x), moved, leading, y)
        kept = x[:, -logits_to_keep:] if logits_to_keep else x
        normed = self.final_norm(kept)
        logits = F.linear(normed, self.embed.weight) if self.head is None else self.head(normed)
        logits = logits.float()
        loss = None
        if labels is not None:
            shifted = labels[:, 1:].to(logits.device)
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), shifted.flatten())
        found = FlowHNOutput(loss=loss, logits=logits)
        if use_cache:
            before = 0 if cache is None else cache.columns
            found[_CACHE] = DecodeCache(blocks, tokens, before + columns)
        return found.to_tuple() if return_dict is False else found

    def _apply_blocks(
        self, x: Tensor, positions: Tensor, valid: Tensor, caches: list[Any]
    ) -> tuple[Tensor, list[Any]]:
        """Return the stream [B, T, D] after all blocks, and their new caches."""
        new_caches: list[Any] = []
        if not self.is_hymba:
            for block, cache in zip(self.blocks, caches, strict=True):
                x, cache = block(x, positions, valid, cache)
                new_caches.append(cache)
            return x, new_caches
        count = len(self.meta)
        positions = positions + count
        is_first = caches[0] is None
        if is_first:
            meta = self.meta.to(x.dtype).expand(x.shape[0], -1, -1)
            before = torch.arange(count, device=x.device).expand(x.shape[0], -1)
            x = torch.cat((meta, x), 1)
            positions = torch.cat((before, positions), 1)
            valid = torch.cat((torch.ones_like(before, dtype=torch.bool), valid), 1)
        seen = None
        for block, cache in zip(self.blocks, caches, strict=True):
            x, cache, seen = block(x, positions, valid, cache, seen)
            new_caches.append(cache)
        return x[:, count:] if is_first else x, new_caches

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # `forward` makes the cache

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, attention_mask: Any = None, use_cache: bool = True, **kwargs: Any
    ) -> dict[str, Any]:
        """Return the arguments of `forward` for the columns that the cache has not read."""
        cache = kwargs.get(_CACHE)
        found = {"attention_mask": attention_mask, "use_cache": use_cache, _CACHE: cache}
        if cache is None and kwargs.get("inputs_embeds") is not None:
            return found | {"inputs_embeds": kwargs["inputs_embeds"]}
        if cache is not None:
            # A prompt that was given as embeddings has no ids: then only the last one is new.
            input_ids = input_ids[:, max(0, min(cache.columns, input_ids.shape[1] - 1)) :]
        return found | {"input_ids": input_ids, "logits_to_keep": kwargs.get("logits_to_keep") or 0}


def _make_blocks(config: FlowHNConfig) -> list[nn.Module]:
    model = config.model
    kind, blocks = model["kind"], range(model["blocks"])
    if kind == "flowhn":
        assert config.plan is not None, "config.json must have a plan"
        branch = model["split"]["stem_kind"]
        stem = 0 if branch == "no_split" else model["split"]["stem"]
        first = [StemBlock(model, branch) for _ in range(stem)]
        return [*first, *(FlowHNBlock(model, attended) for attended in config.plan[stem:])]
    if kind == "hymba":
        return [HymbaLayer(model, index) for index in blocks]
    if kind != "shm":
        raise ValueError(f"model.kind must be flowhn, shm or hymba; got {kind!r}.")
    mixers = (Attention(model, _head_size(model)) if i % 2 else Mamba1(model) for i in blocks)
    return [DecoderLayer(model, mixer, model["mlp_width"]) for mixer in mixers]
