"""FlowHN by its definition: every layer runs on all tokens, and masks select what it reads.

Attention has a matrix of all pairs and the scan is a loop over tokens, so that nothing is shared
with the model: no plan is applied by slices, no kernel is called. The routes of a learned split are
found token by token.
"""

import jax
import jax.numpy as jnp
import numpy as np

from flowhn_jax import models
from tests.small import small_config

CONTEXT = 12  # two windows of five tokens, and a part of a third


def config_of(strategy, groups):
    """Return a small config, with the keys of `model` and `split` that `groups` changes."""
    model = {"vocab_size": 32, "context": CONTEXT, **groups.get("model", {})}
    split = {"balance": 0.4, "period": 5, **groups.get("split", {})}
    return small_config(strategy, model=model, split=split).model


def random_case(config):
    """Return a config and random parameters, whose seed a failure prints."""
    seed = np.random.default_rng().integers(2**31)
    print("parameters' seed", seed)
    return config, models.init(config, jax.random.key(seed))


def random_tokens(config, rng, rows=2, length=None):
    shape = rows, length or config.context
    return rng.integers(0, config.vocab_size, shape).astype(np.int32)


def logits_of_changed_tokens(config, params, rng):
    """Return a text's logits [T, V], and those of T texts of which each has another token changed.

    The second result is [T, T, V]; text j differs from the first text at position j alone.
    """
    base = random_tokens(config, rng, rows=1)
    changed = np.repeat(base, CONTEXT, axis=0)
    changed[np.arange(CONTEXT), np.arange(CONTEXT)] ^= 1
    found = models.forward(config, params, np.concatenate([base, changed]))
    return found[0], found[1:]


def check_prefixes(config, params, tokens, lengths):
    """Check that the first logits of tokens [B, T] are those of the prefixes of these lengths."""
    whole = models.forward(config, params, tokens)
    for length in lengths:
        prefix = models.forward(config, params, tokens[:, :length])
        np.testing.assert_allclose(prefix, whole[:, :length], atol=2e-5)


def check_against_definition(config, params, tokens, segment_ids, rng, routes=None):
    """Compare logits, and gradients of their product with random cotangents, in float32.

    Returns the model's gradients. The arguments are those of `logits`.
    """
    cotangents = rng.normal(size=(*tokens.shape, config.vocab_size)).astype(np.float32)

    def ours(params):
        return models.forward(config, params, tokens, np.stack([segment_ids] * len(tokens)))

    def naive(params):
        return logits(config, params, tokens, segment_ids, routes)

    def with_gradients(function):
        def product(params):
            found = function(params)
            return (found * cotangents).sum(), found

        (_, found), gradients = jax.jit(jax.value_and_grad(product, has_aux=True))(params)
        return found, gradients

    found, expected = with_gradients(ours), with_gradients(naive)
    for one, other in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=3e-5 * np.abs(other).max())
    return found[1]


def logits(config, params, tokens, segment_ids, routes=None):
    """Return logits [B, T, V] of tokens [B, T] in documents segment_ids [T], the same in all rows.

    `params` are those of the model; the mixers of the SSM branch are Mamba-1. A learned split needs
    the `routes` of a single row: for each block [T] bool, which tokens go to attention.
    """
    return _run(config, params, tokens, segment_ids, routes)[0]


def learned_routes(config, params, tokens, segment_ids):
    """Return the `routes` of tokens [1, T] that `logits` needs."""
    return _run(config, params, tokens, segment_ids, None)[1]


def _run(config, params, tokens, segment_ids, routes):
    found = []
    x = jnp.asarray(params["embed"]["embedding"])[tokens]
    positions = range(tokens.shape[1])
    for index, (block, plan) in enumerate(
        zip(
            (params["blocks"][i] for i in sorted(params["blocks"])),
            config.plan(tokens.shape[1]).blocks,
            strict=True,
        )
    ):
        if "router" in block:
            attends = routes[index] if routes else _route(block["router"], x, plan, config)
            own = {"attention": attends, "ssm": ~attends}
        else:
            own = {
                name: np.array([getattr(plan, name).contains(position) for position in positions])
                for name in ("attention", "ssm")
            }
        found.append(own["attention"])
        x = _block(config, block, x, own, segment_ids)
    return _rms(params["final_norm"], x, config.norm_eps) @ params["head"]["kernel"], found


def _scores(router, x, eps):
    return _rms({"scale": 1.0}, x, eps) @ router["weight"] + router["bias"]


def _route(router, x, plan, config):
    """Return which tokens of x [1, T, D] go to attention, [T] bool."""
    (scores,) = np.asarray(_scores(router, x, config.norm_eps))
    attends = np.zeros(len(scores), bool)
    window = plan.attention.period
    for t, score in enumerate(scores):
        left = plan.attention.width - attends[t - t % window : t].sum()
        attends[t] = left > 0 and (score > 0 or left == window - t % window)
    return attends


def _block(config, block, x, own, segment_ids):
    mixers = {"attention": _attention, "ssm": _mamba1}
    if "layer" in block:
        (name,) = (name for name in own if own[name].all())
        return _layer(config, block["layer"], mixers[name], x, own[name], segment_ids)
    read = own
    if config.split.reads == "all":
        read = {name: np.ones(x.shape[1], bool) for name in own}
    outputs = {
        name: _layer(config, block[name], mixer, x, read[name], segment_ids)
        for name, mixer in mixers.items()
    }
    changes = {name: outputs[name] - x for name in outputs}
    if "router" in block:
        scores = _scores(block["router"], x, config.norm_eps)[..., None]
        changes["attention"] *= 2 / (1 + jnp.exp(-scores))
        changes["ssm"] *= 2 / (1 + jnp.exp(scores))
        outputs = {name: x + changes[name] for name in outputs}
    if config.fusion == "residual":
        return x + sum(jnp.where(own[name][:, None], changes[name], 0) for name in changes)
    if own["attention"].all() and own["ssm"].all():
        joined = jnp.concatenate((outputs["ssm"], outputs["attention"]), -1)
    else:
        joined = jnp.where(own["attention"][:, None], outputs["attention"], outputs["ssm"])
    x = x + joined @ block["branch_proj"]["kernel"]
    return x + _rms(block["norm"], x, config.norm_eps) @ block["final_proj"]["kernel"]


def _layer(config, layer, mixer, x, reads, segment_ids):
    """Return the stream [B, T, D] after a decoder layer that reads some of the tokens."""
    eps = config.norm_eps
    x = x + mixer(config, layer["mixer"], _rms(layer["norm"], x, eps), reads, segment_ids)
    if "mlp" not in layer:
        return x
    h, mlp = _rms(layer["mlp_norm"], x, eps), layer["mlp"]
    gate, up = (h @ mlp[name]["kernel"] for name in ("gate_proj", "up_proj"))
    return x + (jax.nn.silu(gate) * up) @ mlp["down_proj"]["kernel"]


def _attention(config, mixer, h, reads, segment_ids):
    length, size = h.shape[1], config.head_size
    q, k, v = (
        (h @ mixer[name]["kernel"]).reshape(*h.shape[:2], -1, size)
        for name in ("q_proj", "k_proj", "v_proj")
    )
    if config.attention_rope_theta:
        q, k = (_rotate(y, config.attention_rope_theta) for y in (q, k))
    k, v = (jnp.repeat(y, config.heads // config.kv_heads, axis=2) for y in (k, v))
    visible = np.tril(np.ones((length, length), bool)) & reads
    visible &= segment_ids[:, None] == segment_ids
    visible |= np.eye(length, dtype=bool)  # what no branch selects may see itself
    scores = jnp.einsum("bihk,bjhk->bhij", q, k) * size**-0.5
    weights = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), -1)
    y = jnp.einsum("bhij,bjhk->bihk", weights, v).reshape(*h.shape[:2], -1)
    return y @ mixer["o_proj"]["kernel"]


def _rotate(x, theta):
    """Return x [B, T, H, K] as complex numbers, turned by their positions in the sequence."""
    half = x.shape[-1] // 2
    angles = np.arange(x.shape[1])[:, None] * theta ** (-np.arange(half) / half)
    turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angles)[:, None].astype("c8")
    return jnp.concatenate((turned.real, turned.imag), -1)


def _mamba1(config, mixer, h, reads, segment_ids):
    eps, rank, states = config.norm_eps, config.dt_rank, config.ssm_state
    u, z = jnp.unstack(jnp.einsum("btd,dpe->btpe", h, mixer["in_proj"]["kernel"]), axis=2)
    rates = -jnp.exp(mixer["a_log"])
    outputs = [jnp.zeros_like(u[:, 0])] * h.shape[1]
    for document in np.unique(segment_ids):
        seen = []
        state = jnp.zeros((len(h), *rates.shape))
        for t in np.flatnonzero(reads & (segment_ids == document)):
            seen = [*seen, u[:, t]][-config.ssm_conv :]
            taps = mixer["conv_weight"][-len(seen) :]
            wide = sum(tap * each for tap, each in zip(taps, seen, strict=True))
            wide = jax.nn.silu(wide + mixer["conv_bias"])
            dt, b, c = jnp.split(wide @ mixer["x_proj"]["kernel"], (rank, rank + states), -1)
            dt, b, c = (
                _rms(mixer[f"{name}_norm"], y, eps) for name, y in (("dt", dt), ("b", b), ("c", c))
            )
            dt = jax.nn.softplus(dt @ mixer["dt_proj"]["kernel"] + mixer["dt_bias"])[..., None]
            state = jnp.exp(dt * rates) * state + dt * wide[..., None] * b[:, None]
            y = (state * c[:, None]).sum(-1) + mixer["d"] * wide
            outputs[t] = y * jax.nn.silu(z[:, t])
    return jnp.stack(outputs, 1) @ mixer["out_proj"]["kernel"]


def _rms(norm, x, eps):
    return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + eps) * norm["scale"]
