"""Head and cross-entropy chunk by chunk, so that the logits never exist all at once.

The exponentials of a row's logits are shifted by a number that is known before the logits: their
mean, the product of the hidden state and the head's mean over the vocabulary. Their sum then needs
no pass for the maximum. It is at least V, and in the range of float32 unless a logit is some 50
above the mean. In that case everything runs a second time, with the maximum as the shift of such
rows, so that every result is as exact as with the maximum as shift.

The gradients of a sum follow, up to one scalar, from the logits, so `weighted_sum` computes them in
the forward pass. `token_losses` cannot, and recomputes the logits in the backward pass.
"""

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import Array, lax

from kernels.custom_vjp import custom_vjp
from kernels.manual_axes import vary_alike
from kernels.reduce_scatter import reduce_scatter

Results = TypeVar("Results")

# Sums of exponentials outside of these bounds are computed again. Within them, a gradient's factor
# scale / sum is a normal number of float32 for scales down to 1e-12.
_LEAST_SUM, _LARGEST_SUM = 1e-3, 1e25


class Exponentials(NamedTuple):
    """Results of a chunk of n tokens for a device's part of the vocabulary; rows in float32."""

    exps: Array | None  # exp(logits - shift) [n, V], if they are kept; bfloat16 if hidden is
    total: Array  # their sum, in float32, [n]
    target: Array  # the target's logit - shift, 0 where the target is not in this part, [n]
    peak: Array  # the largest logit, [n]


class Factors(NamedTuple):
    """Factors of the gradient of each row's logits, float32 [n].

    It is scale * of_target for the target's logit, else scale * of_others * the exponential.
    """

    scale: Array
    of_target: Array
    of_others: Array  # never 0


class Products(NamedTuple):
    """The matrix products of a chunk with what is fused into them, one device's part of them.

    Both take hidden [n, D] and head [D, V] of the same dtype, and targets [n], which are outside of
    0..V-1 where another device has the target.

    Attributes:
      exponentials: (hidden, head, targets, shift [n], keep) -> Exponentials.
      gradients: (exps, hidden, head, targets, factors) -> the gradients [n, D] and [D, V], both
        float32.
    """

    exponentials: Callable[..., Exponentials]
    gradients: Callable[..., tuple[Array, Array]]


class Options(NamedTuple):
    """Options of the functions of this file.

    The axes are those of `jax.shard_map` without `check_vma`, where each device returns its part of
    the gradient of an array that several devices hold.

    Attributes:
      products: the products of a backend.
      chunks: number of chunks, which divides the number of tokens.
      z_loss: weight of lse**2.
      vocabulary: axes that the vocabulary is sharded over: head and its gradient are a device's
        part; hidden, targets and weights are the same on all devices along them.
      shards: axes that the head's D is sharded over. `weighted_sum` gathers the head, and returns
        each device's part of the gradient.
      tokens: axes that the tokens are sharded over.
    """

    products: Products
    chunks: int
    z_loss: float
    vocabulary: tuple[str, ...] = ()
    shards: tuple[str, ...] = ()
    tokens: tuple[str, ...] = ()


@custom_vjp(nondiff_argnums=(0,))
def weighted_sum(
    options: Options, hidden: Array, head: Array, targets: Array, weights: Array
) -> Array:
    """Return the sum of weights * losses over all devices, a float32 scalar.

    hidden is [N, D], head [D, V].
    """
    head = gather_head(head.astype(hidden.dtype), options.shards)
    losses = token_losses(options, hidden, head, targets)
    return _over(lax.psum, options.tokens, jnp.sum(weights * losses))


def _weighted_sum_forward(options, hidden, head, targets, weights):
    product_head = head.astype(hidden.dtype)
    whole, mean = (gather_head(x, options.shards) for x in (product_head, _mean(product_head)))
    losses, dhidden, dhead = _losses_and_gradients(options, hidden, whole, mean, targets, weights)
    for axis in options.shards:
        dhead = reduce_scatter(dhead, axis)
    total = _over(lax.psum, options.tokens, jnp.sum(weights * losses))
    return total, (losses, dhidden, dhead.astype(head.dtype))


def _weighted_sum_backward(options, residuals, dtotal):
    losses, dhidden, dhead = residuals
    dtotal = _over(lax.psum, options.tokens, dtotal)
    dweights = dtotal * losses
    dtotal = _over(lax.psum, options.vocabulary, dtotal)
    dhidden, dhead = ((dtotal * x).astype(x.dtype) for x in (dhidden, dhead))
    return dhidden, dhead, None, dweights


weighted_sum.defvjp(_weighted_sum_forward, _weighted_sum_backward)


def gather_head(head: Array, shards: tuple[str, ...]) -> Array:
    """Return the head with its whole D, of which each device along the axes has a part."""
    for axis in reversed(shards):
        head = lax.all_gather(head, axis, tiled=True)
    return head


@custom_vjp(nondiff_argnums=(0,))
def token_losses(options: Options, hidden: Array, head: Array, targets: Array) -> Array:
    """Return losses [N] in float32, without weights; hidden is [N, D], head [D, V]."""
    head = head.astype(hidden.dtype)
    targets = _in_part(options, head, targets)

    def run(shift: Array) -> tuple[Array, Array]:
        def step(_, chunk):
            hidden, targets, shift = chunk
            rows = _rows(options, hidden, head, targets, shift, keep=False)[1]
            return None, (rows.losses(options), rows.safe_shift())

        chunks = _split((hidden, targets, shift), options.chunks)
        losses, shift = lax.scan(step, None, chunks)[1]
        return _join(losses), _join(shift)

    return _with_safe_shift(options, run, _mean_logits(options, hidden, _mean(head)))


def _token_losses_forward(options, hidden, head, targets):
    return token_losses(options, hidden, head, targets), (hidden, head, targets)


def _token_losses_backward(options, residuals, dlosses):
    hidden, head, targets = residuals
    dlosses = _over(lax.psum, options.vocabulary, dlosses)
    product_head = head.astype(hidden.dtype)
    _, dhidden, dhead = _losses_and_gradients(
        options, hidden, product_head, _mean(product_head), targets, dlosses
    )
    return dhidden, dhead.astype(head.dtype), None


token_losses.defvjp(_token_losses_forward, _token_losses_backward)


def _losses_and_gradients(
    options: Options, hidden: Array, head: Array, mean: Array, targets: Array, scale: Array
) -> tuple[Array, Array, Array]:
    """Return losses [N], and the gradients [N, D] and [D, V] of sum(scale * losses).

    hidden and head have the same dtype; so has the gradient of hidden. That of head is float32.
    mean [D] is the head's mean over this part of the vocabulary.
    """
    targets = _in_part(options, head, targets)

    def run(shift: Array) -> tuple[tuple[Array, Array, Array], Array]:
        def step(dhead, chunk):
            hidden, targets, shift, scale = chunk
            exps, rows = _rows(options, hidden, head, targets, shift, keep=True)
            factors = rows.gradient_factors(options, scale)
            dhidden, more = options.products.gradients(exps, hidden, head, targets, factors)
            outputs = rows.losses(options), dhidden.astype(hidden.dtype), rows.safe_shift()
            return dhead + more, outputs

        chunks = _split((hidden, targets, shift, scale), options.chunks)
        dhead, outputs = lax.scan(step, jnp.zeros_like(head, jnp.float32), chunks)
        losses, dhidden, shift = map(_join, outputs)
        return (losses, dhidden, dhead), shift

    return _with_safe_shift(options, run, _mean_logits(options, hidden, mean))


class _Rows(NamedTuple):
    """Statistics of n tokens over the whole vocabulary, float32 [n]."""

    shift: Array
    total: Array  # sum of exp(logits - shift)
    target: Array  # the target's logit - shift
    peak: Array  # the largest logit

    def losses(self, options: Options) -> Array:
        """Return the losses without weights."""
        nll = jnp.log(self.total) - self.target
        return nll + options.z_loss * self._lse() ** 2 if options.z_loss else nll

    def gradient_factors(self, options: Options, scale: Array) -> Factors:
        """Return the gradient of scale times the losses by the logits."""
        nll = jnp.log(self.total) - self.target
        of_target, of_others = jnp.expm1(-nll), jnp.ones_like(nll)
        if options.z_loss:
            from_z = 2 * options.z_loss * self._lse()
            of_target, of_others = of_target + from_z * jnp.exp(-nll), of_others + from_z
            of_others = jnp.where(jnp.abs(of_others) < 1e-6, 1e-6, of_others)
        return Factors(scale, of_target, of_others / self.total)

    def safe_shift(self) -> Array:
        """Return the shift, or the peak where the sum may be inexact."""
        is_safe = (self.total > _LEAST_SUM) & (self.total < _LARGEST_SUM)
        return jnp.where(is_safe, self.shift, self.peak)

    def _lse(self) -> Array:
        return self.shift + jnp.log(self.total)


def _rows(
    options: Options, hidden: Array, head: Array, targets: Array, shift: Array, *, keep: bool
) -> tuple[Array | None, _Rows]:
    """Return a chunk's exponentials for this part of the vocabulary, and rows for the whole."""
    found = options.products.exponentials(hidden, head, targets, shift, keep)
    axes = options.vocabulary
    total, target = _over(lax.psum, axes, (found.total, found.target))
    return found.exps, _Rows(shift, total, target, _over(lax.pmax, axes, found.peak))


def _in_part(options: Options, head: Array, targets: Array) -> Array:
    """Return the targets' indices in this device's part of the vocabulary."""
    axes = options.vocabulary
    return targets - lax.axis_index(axes) * head.shape[1] if axes else targets


def _mean(head: Array) -> Array:
    """Return the mean of the head [D, V] over its part of the vocabulary, [D] float32."""
    return head.mean(1, dtype=jnp.float32)


def _mean_logits(options: Options, hidden: Array, mean: Array) -> Array:
    """Return the mean of each token's logits over the whole vocabulary, [N] float32."""
    return jnp.sum(hidden * _over(lax.pmean, options.vocabulary, mean), -1)


def _with_safe_shift(
    options: Options, run: Callable[[Array], tuple[Results, Array]], shift: Array
) -> Results:
    """Return the results of `run`, run a second time if the first shift is not safe.

    Args:
      options: if they shard the vocabulary, `run` has collectives, and all devices run it again if
        one has to.
      run: maps a shift per token to results and a safe shift per token, the same one if it is safe.
      shift: the first one, [N].
    """

    def again(state):
        is_first, _, shift, _ = state
        results, safe_shift = run(shift)
        changed = jnp.any(shift != safe_shift)
        if options.vocabulary:
            axes = dict.fromkeys((*options.vocabulary, *options.shards, *options.tokens))
            changed = lax.pmax(changed.astype(jnp.int32), tuple(axes)) > 0
        return jnp.zeros_like(is_first), is_first & changed, safe_shift, results

    empty = jax.tree.map(lambda x: lax.empty(x.shape, x.dtype), jax.eval_shape(run, shift)[0])
    state = vary_alike((jnp.array(True), jnp.array(True), shift, empty))
    return lax.while_loop(lambda state: state[1], again, state)[3]


def _over(collective, axes: tuple[str, ...], x):
    """Return the collective's result on x over the devices along the axes; x if there are none."""
    return collective(x, axes) if axes else x


def _split(arrays, chunks: int):
    """Return arrays [N, ...] as [chunks, N / chunks, ...]."""
    return jax.tree.map(lambda x: x.reshape(chunks, len(x) // chunks, *x.shape[1:]), arrays)


def _join(x: Array) -> Array:
    """Return x [chunks, n, ...] as [chunks * n, ...]."""
    return x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])
