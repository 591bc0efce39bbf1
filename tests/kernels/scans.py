"""What the tests of all scans share: arguments, and checks that each backend runs at its sizes."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from flowhn_jax.bench import formulas
from kernels.scan_inputs import ScanInputs
from tests.kernels.reference import assert_close, cotangents_like, with_gradients


def scan_inputs(args):
    """Return the arguments of the selective scan as its backends take them."""
    return ScanInputs(*(args.get(name) for name in ("u", *ScanInputs._fields[1:])))


def scan_arguments(rng, batch, length, width, states, dtype=np.float32, *, optional=True):
    """Return random arguments of the selective scan, with documents of any lengths."""

    def normal(*shape, dtype=np.float32):
        return jnp.asarray(rng.standard_normal(shape), dtype)

    args = {
        "u": normal(batch, length, width, dtype=dtype),
        "dt": normal(batch, length, width, dtype=dtype) - 1,
        "A": -jnp.exp(normal(width, states)),
        "B": normal(batch, length, states, dtype=dtype),
        "C": normal(batch, length, states, dtype=dtype),
        "D": normal(width),
    }
    if optional:
        args |= {
            "z": normal(batch, length, width, dtype=dtype),
            "dt_bias": normal(width),
            "segment_ids": random_documents(rng, batch, length),
            "initial_state": normal(batch, width, states),
        }
    return args


def random_documents(rng, batch, length):
    """Return segment ids of up to three documents per sequence."""
    return jnp.asarray(np.sort(rng.integers(0, 3, (batch, length)), axis=1))


def documents_starting_at(starts, length):
    """Return segment ids [1, length]; documents that are not neighbours may have the same."""
    return jnp.asarray(np.isin(np.arange(length), sorted(starts)).cumsum() % 3)[None]


def scan_specs(args):
    """Return how the selective scan's arguments and results are cut over `data` and `model`."""
    specs = {name: P("data", None, "model") for name in ("u", "dt", "z")}
    specs |= {name: P("model") for name in ("A", "D", "dt_bias")}
    specs |= {name: P("data") for name in ("B", "C", "segment_ids")}
    specs |= {"initial_state": P("data", "model")}
    return {name: specs[name] for name in args}, (specs["u"], specs["initial_state"])


class Scan:
    """One way to run a scan, and the checks of it.

    Attributes:
      run: (y, final state) of arguments by name.
      run_with_gradients: also the gradients of the float arguments, given cotangents.
    """

    def __init__(self, run, formula, per_token, jit=jax.jit):
        self.function, self.formula, self.per_token, self.jit = run, formula, per_token, jit
        self.run = jit(run)
        self.run_with_gradients = jit(with_gradients(run))

    def cotangents(self, rng, args):
        return cotangents_like(rng, jax.eval_shape(self.run, args))

    def check_against_float64(self, rng, args, output_tolerance=1e-5, gradient_tolerance=1e-4):
        cotangents = self.cotangents(rng, args)
        (y, state), gradients = self.run_with_gradients(args, cotangents)
        assert (y.dtype, state.dtype) == (args[self.per_token[0]].dtype, jnp.float32)
        assert {name: x.dtype for name, x in gradients.items()} == {
            name: args[name].dtype for name in gradients
        }
        expected = formulas.in_float64(self.formula, args, cotangents)
        assert_close((y, state), expected[0], output_tolerance)
        assert_close(gradients, expected[1], gradient_tolerance)

    def check_large_time_steps_forget(self, rng, args, last_input):
        """Check that where exp(delta A) is 0 the state is the last input's, and nothing is NaN."""
        args = args | {"dt": args["dt"] + 1e6, "A": args["A"] - 1}
        (y, state), gradients = self.run_with_gradients(args, self.cotangents(rng, args))
        np.testing.assert_allclose(state, last_input(args), rtol=1e-5)
        assert all(jnp.isfinite(x).all() for x in [y, *gradients.values()])

    def check_two_calls_continue_one(self, args, cut, tolerance):
        """Check that a second call, from the state of the first, continues its document."""
        ids = jnp.asarray(args["segment_ids"])
        args = args | {"segment_ids": ids.at[:, cut].set(ids[:, cut - 1])}
        names = [*self.per_token, "segment_ids"]
        y_first, state = self.run(args | {name: args[name][:, :cut] for name in names})
        rest = {name: args[name][:, cut:] for name in names} | {"initial_state": state}
        y_second, state = self.run(args | rest)
        whole = jax.tree.map(np.asarray, self.run(args))
        assert_close((jnp.concatenate([y_first, y_second], 1), state), whole, tolerance)

    def check_any_document_is_bitwise_alone(self, make_arguments, length, starts, seed):
        """Check one of the documents at `starts`, with random arguments."""
        rng = np.random.default_rng(seed)
        args, others = make_arguments(rng), make_arguments(rng)
        args["segment_ids"] = documents_starting_at(starts, length)
        self.check_a_document_is_bitwise_alone(args, others, sorted(starts)[len(starts) // 2])

    def check_the_second_document_is_bitwise_alone(self, rng, make_arguments):
        """Check the second of two documents, which starts anywhere, with random arguments."""
        args, others = make_arguments(), make_arguments()
        length = args["dt"].shape[1]
        start = int(rng.integers(1, length))
        args["segment_ids"] = documents_starting_at({start}, length)
        self.check_a_document_is_bitwise_alone(args, others, start)

    def check_a_document_is_bitwise_alone(self, args, others, start):
        """Check that what precedes `start` changes no outputs or gradients after it."""
        perturbed = args | {"initial_state": others["initial_state"]}
        for name in self.per_token:
            parts = others[name][:, :start], args[name][:, start:]
            perturbed[name] = jnp.concatenate(parts, axis=1)

        def after_start(args):
            ones = jax.tree.map(jnp.ones_like, jax.eval_shape(self.run, args))
            (y, state), gradients = self.run_with_gradients(args, ones)
            return [state, y[:, start:]] + [gradients[name][:, start:] for name in self.per_token]

        for a, b in zip(after_start(args), after_start(perturbed), strict=True):
            np.testing.assert_array_equal(a, b)

    def check_inside_scan_and_checkpoint(self, rng, args):
        """Check the gradients of `jax.lax.scan` over checkpointed blocks, by a loop of formulas."""
        name = self.per_token[0]
        layers = jnp.asarray(rng.standard_normal((3, *args["D"].shape)), jnp.float32)

        def block(run, x, D):
            return jnp.tanh(run(args | {name: x, "D": D})[0])

        def by_scan(layers):
            step = jax.checkpoint(lambda x, D: (block(self.function, x, D), None))
            return jax.lax.scan(step, args[name], layers)[0].sum()

        def by_loop(layers):
            x = args[name]
            for D in layers:
                x = block(lambda args: self.formula(**args), x, D)
            return x.sum()

        scanned, looped = (self.jit(jax.grad(f))(layers) for f in (by_scan, by_loop))
        np.testing.assert_allclose(scanned, looped, rtol=1e-4, atol=1e-5)

    def check_sharded(self, args, cotangents, specs, expected, tolerance, check_vma=True):
        """Check that over devices the gradients are `expected`."""
        arg_specs, out_specs = specs
        mesh = jax.make_mesh((2, 2), ("data", "model"), (jax.sharding.AxisType.Auto,) * 2)
        sharded = jax.shard_map(
            self.function,
            mesh=mesh,
            in_specs=(arg_specs,),
            out_specs=out_specs,
            check_vma=check_vma,
        )
        gradients = self.jit(with_gradients(sharded))(args, cotangents)[1]
        assert_close(gradients, jax.tree.map(np.asarray, expected), tolerance)

    def check_one_token_after_another(self, step, args, tolerance):
        """Check that steps of one token give the results of the whole sequence."""
        args = {name: x for name, x in args.items() if name != "segment_ids"}
        expected = self.run(args)
        state, ys = args.pop("initial_state"), []
        for t in range(args["dt"].shape[1]):
            token = args | {name: args[name][:, t] for name in self.per_token}
            y, state = step(**token, state=state)
            assert y.dtype == expected[0].dtype
            ys.append(y)
        assert_close((jnp.stack(ys, 1), state), jax.tree.map(np.asarray, expected), tolerance)
