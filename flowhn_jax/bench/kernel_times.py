"""`bench kernels`: time, memory and error of each operation's backends, next to their floors."""

import platform
import statistics
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import jax
import jax.numpy as jnp
import jaxlib.version

from flowhn_jax.bench import cases as cases_lib
from flowhn_jax.bench import peers as peers_lib
from flowhn_jax.bench.attempt import Row, attempt
from flowhn_jax.bench.case import Case
from flowhn_jax.bench.device import MeasuredRates, measure_rates
from flowhn_jax.bench.output import check_out, save_results
from flowhn_jax.bench.peers import Peer, Run
from flowhn_jax.bench.throughput import memory_sizes
from flowhn_jax.report.table import markdown
from flowhn_jax.utils.progress import log, progress
from flowhn_jax.utils.timing import time_repeats
from kernels.backends import XLA, target_platform
from kernels.operations import OPERATIONS

_COLUMNS = (  # key, heading, format
    ("operation", "operation", "{}"),
    ("size", "size", "{}"),
    ("shape", "shape", "{}"),
    ("backend", "backend", "{}"),
    ("forward_ms", "forward ms", "{:.3f}"),
    ("forward_ratio", "x floor", "{:.1f}"),
    ("both_ms", "fwd+bwd ms", "{:.3f}"),
    ("both_ratio", "x floor", "{:.1f}"),
    ("temporary_mib", "temp MiB", "{:.1f}"),
    ("forward_error", "error", "{:.1e}"),
    ("both_error", "grad error", "{:.1e}"),
)


def bench_kernels(
    operations: Sequence[str],
    sizes: Sequence[str],
    lengths: Sequence[int],
    backends: Sequence[str],
    *,
    tokens: int,
    dtype: str,
    repeats: int,
    with_peers: bool,
    out: str,
) -> list[Row]:
    """Measure the operations, print a line per measurement and a table of all, and return the rows.

    All rows so far are written to `out` after each one, with the device's rates.

    Args:
      operations: among cases.OPERATION_NAMES.
      sizes: among cases.SIZES.
      lengths: the lengths of the sequences.
      backends: names of those to measure; if empty, all that the platform has.
      tokens: per batch.
      dtype: 'float32' or 'bfloat16'.
      repeats: timed calls of each function; the median counts.
      with_peers: whether to measure the installed peers of an operation too.
      out: path of the JSON file.

    Raises:
      ValueError: `out` cannot be written.
    """
    check_out(out)
    rates = measure_rates(dtype)
    device = jax.devices()[0]
    print(
        f"{device.device_kind}, {dtype}: copies {rates.bytes_per_second / 1e9:,.0f} GB/s, matrix "
        f"products {rates.matmul_flops_per_second / 1e12:,.2f} TFLOP/s, "
        f"{rates.exps_per_second / 1e9:,.1f} G exp/s"
    )
    rows: list[Row] = []
    results = {
        "device": device.device_kind,
        "python": platform.python_version(),
        "jax": jax.__version__,
        "jaxlib": jaxlib.version.__version__,
        "dtype": dtype,
        "repeats": repeats,
        "bytes_per_second": rates.bytes_per_second,
        "matmul_flops_per_second": rates.matmul_flops_per_second,
        "exps_per_second": rates.exps_per_second,
        "rows": rows,
    }
    save_results(out, results)
    total = cases_lib.count(operations, sizes, lengths)
    cases = cases_lib.cases(operations, sizes, lengths, tokens, dtype)
    for case in progress(cases, "timing kernels", "cases", total=total):
        for measure in measurements(case, backends, rates, repeats, with_peers):
            rows.append(measure())
            save_results(out, results)
            log(_line(rows[-1]))
    table = [
        [_cell(row, key, form) for key, _, form in _COLUMNS] for row in rows if "failed" not in row
    ]
    print(f"\n{markdown([heading for _, heading, _ in _COLUMNS], table)}")
    print(
        "x floor: time over the minimal time for the operation's bytes, products and exponentials"
    )
    print(f"wrote {out}")
    return rows


def _line(row: Row) -> str:
    """Return a measurement as a line of text."""
    name = f"{row['operation']} {row['size']} {row['shape']} {row['backend']}"
    if "failed" in row:
        return f"{name}: failed: {row['failed']}"
    return f"{name}: forward {row['forward_ms']:.3f} ms, with backward {row['both_ms']:.3f} ms"


def _cell(row: Row, key: str, form: str) -> str:
    value = row.get(key)
    return "-" if value is None else form.format(value)


def measurements(
    case: Case, backends: Sequence[str], rates: MeasuredRates, repeats: int, with_peers: bool
) -> Iterator[Callable[[], Row]]:
    """Yield a function that measures a row, for each of our backends of a case, then for peers.

    Args:
      case: the operation and its arrays.
      backends: names of those to measure; if empty, all that the platform has.
      rates: the rates of the device, for the floors.
      repeats: timed calls of each function.
      with_peers: whether to include the peers that can run on this machine.
    """
    for name in backends_of(case.operation):
        if backends and name not in backends:
            continue
        yield partial(_ours, case, name, rates, repeats)
    if with_peers:
        for make in peers_lib.peers(case):
            yield partial(_peer, case, make, rates, repeats)


def backends_of(operation: str) -> list[str]:
    """Return the names of an operation's backends on the platform that programs target."""
    if operation not in OPERATIONS:
        return [XLA]
    found = OPERATIONS[operation].backends.items()
    return [name for name, backend in found if target_platform() in backend.platforms]


def _ours(case: Case, backend: str, rates: MeasuredRates, repeats: int) -> Row:
    run = partial(case.run, backend=backend)

    def with_gradients(inputs, cotangent):
        integers = {
            name: x for name, x in inputs.items() if not jnp.issubdtype(x.dtype, jnp.floating)
        }
        floats = {name: x for name, x in inputs.items() if name not in integers}
        output, vjp = jax.vjp(lambda floats: run(**floats, **integers), floats)
        return output, vjp(cotangent)[0]

    def measure() -> Row:
        lowered = (
            jax.jit(lambda inputs: run(**inputs)).lower(case.inputs),
            jax.jit(with_gradients).lower(case.inputs, case.cotangent),
        )
        with ThreadPoolExecutor(2) as pool:
            forward, both = pool.map(lambda each: each.compile(), lowered)
        runs = (lambda: forward(case.inputs)), (lambda: both(case.inputs, case.cotangent))
        return {
            **_times(case, runs, rates, repeats),
            "temporary_mib": memory_sizes(both).temp_size_in_bytes / 2**20,
            "forward_error": case.output_error(forward(case.inputs)),
            "both_error": case.gradient_error(both(case.inputs, case.sampled_cotangent)[1]),
        }

    return _row(case, backend, measure)


def _peer(case: Case, make: Callable[[], Peer], rates: MeasuredRates, repeats: int) -> Row:
    def measure() -> Row:
        peer = make()
        known = peer.temporary_bytes
        return {
            "backend": peer.name,
            **_times(case, (peer.forward, peer.both), rates, repeats),
            "temporary_mib": None if known is None else known() / 2**20,
            "forward_error": case.output_error(peer.to_numpy(peer.forward())),
        }

    return _row(case, "peer", measure)


def _row(case: Case, backend: str, measure: Callable[[], Row]) -> Row:
    labels = {
        "operation": case.operation,
        "size": case.size,
        "shape": case.shape,
        "backend": backend,
    }
    return attempt(labels, measure)


def _times(case: Case, runs: tuple[Run, Run], rates: MeasuredRates, repeats: int) -> Row:
    row: Row = {}
    for name, run, work in zip(("forward", "both"), runs, (case.forward, case.both), strict=True):
        seconds = time_repeats(run, repeats)
        floor = work.floor_seconds(rates)
        row |= {
            f"{name}_ms": 1e3 * statistics.median(seconds),
            f"{name}_ms_min": 1e3 * min(seconds),
            f"{name}_ms_max": 1e3 * max(seconds),
            f"{name}_floor_ms": 1e3 * floor,
            f"{name}_ratio": statistics.median(seconds) / floor,
            f"{name}_bytes": work.bytes,
            f"{name}_matmul_flops": work.matmul_flops,
            f"{name}_exps": work.exps,
        }
    return row
