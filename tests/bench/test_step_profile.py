import concurrent.futures
import multiprocessing
import os
import pathlib
import time

import jax
import jax.numpy as jnp
import pytest
from jax.profiler import ProfileData

import flowhn_jax
from flowhn_jax.bench.device_trace import read_trace
from flowhn_jax.bench.step_profile import Cost, costs_of, largest, profile

ROOT = pathlib.Path(flowhn_jax.__file__).parent.parent
FILE = "tests/bench/test_step_profile.py"
TRIPS = 5


def two_products(x, narrow, wide):
    small = x @ narrow  # SMALL
    return small, x @ wide  # LARGE


def loop(x):
    def body(carry, _):
        return jnp.tanh(carry @ x), None  # LOOP

    return jax.lax.scan(body, x, None, length=TRIPS)[0]


def source_of(mark):
    lines = pathlib.Path(__file__).read_text().splitlines()
    return f"{FILE}:{next(i for i, line in enumerate(lines, 1) if line.endswith('# ' + mark))}"


def profile_compiled(function, *shapes):
    """Return the costs on the default device, and the mean seconds of the traced steps."""
    arguments = [jnp.full(shape, 1e-3) for shape in shapes]
    compiled = jax.jit(function).lower(*arguments).compile()
    seconds = []

    def run():
        start = time.perf_counter()
        jax.block_until_ready(compiled(*arguments))
        seconds.append(time.perf_counter() - start)

    costs = profile(run, compiled.as_text(), steps=3)
    return costs, sum(seconds[1:]) / 3


def profile_other(function):
    """Profile with the text of a program that does not run."""
    x = jnp.ones(100_000)
    profile(lambda: function(x), jax.jit(jnp.sin).lower(x).compile().as_text())


def cosine(x):
    return jnp.cos(x)


def nothing(x):
    pass


@pytest.fixture(scope="module")
def process():
    """Yield a call into a process without libtpu, some versions of which break the profiler."""
    context = multiprocessing.get_context("spawn")
    # One device: with eight, XLA has eight threads, which compete for the cores.
    start = dict(initializer=os.unsetenv, initargs=("XLA_FLAGS",))
    with concurrent.futures.ProcessPoolExecutor(1, context, **start) as pool:
        yield lambda *call: pool.submit(*call).result()


def test_products_of_known_lines(process):
    costs, _ = process(profile_compiled, two_products, (512, 512), (512, 8), (512, 2048))
    assert costs == sorted(costs, key=lambda cost: -cost.seconds)
    assert sum(cost.share for cost in costs) == pytest.approx(1)
    products = {cost.source: cost for cost in costs if cost.operation == "dot_general"}
    small, large = products[source_of("SMALL")], products[source_of("LARGE")]
    assert large.seconds > 4 * small.seconds > 0
    assert (small.count, large.count) == (1, 1)
    assert largest(costs)[0].source == source_of("LARGE")


def test_a_loop_counts_its_body_once(process):
    costs, step_seconds = process(profile_compiled, loop, (512, 512))
    product = next(cost for cost in costs if cost.operation == "dot_general")
    assert product.count == TRIPS
    assert product.source == source_of("LOOP")
    around = [cost for cost in costs if cost.name.startswith("while")]
    assert sum(cost.seconds for cost in around) < product.seconds / 2
    # The workers of the pool, and the thread that starts the program.
    assert sum(cost.seconds for cost in costs) < step_seconds * (os.cpu_count() + 1)


def test_programs_that_do_not_run_are_errors(process):
    with pytest.raises(RuntimeError, match=r"program of `text`, jit_sin, .*has no device events"):
        process(profile_other, nothing)
    with pytest.raises(RuntimeError, match="has only events of jit_cos"):
        process(profile_other, cosine)
    with pytest.raises(ValueError, match="at least 1; got 0"):
        profile(lambda: None, PROGRAM, steps=0)
    with pytest.raises(ValueError, match=r"as_text\(\); got 'module @jit_sin'"):
        costs_of([], "module @jit_sin", steps=1)


# As XLA prints it: the parents of frames are their numbers plus one.
PROGRAM = f"""HloModule jit_step, is_scheduled=true

FileNames
1 "{ROOT}/flowhn_jax/layers/mlp.py"
2 "/somewhere/site-packages/flax/nnx/nn/linear.py"
3 "{ROOT}/flowhn_jax/layers/linear.py"
4 "{ROOT}/kernels/scan.py"

FunctionNames
1 "call"

FileLocations
1 {{file_name_id=1 function_name_id=1 line=32 end_line=32 column=1 end_column=2}}
2 {{file_name_id=2 function_name_id=1 line=200 end_line=200 column=1 end_column=2}}
3 {{file_name_id=3 function_name_id=1 line=49 end_line=49 column=1 end_column=2}}
4 {{file_name_id=4 function_name_id=1 line=7 end_line=7 column=1 end_column=2}}

StackFrames
1 {{file_location_id=1 parent_frame_id=1}}
2 {{file_location_id=2 parent_frame_id=2}}
3 {{file_location_id=3 parent_frame_id=3}}
4 {{file_location_id=4 parent_frame_id=2}}


%fused (p.1: f32[8,8]) -> f32[8,8] {{
  %p.1 = f32[8,8]{{1,0}} parameter(0)
  %dot.9 = f32[8,8]{{1,0}} dot(%p.1, %p.1), lhs_contracting_dims={{1}}, \
rhs_contracting_dims={{0}}, \
metadata={{op_name="jit(step)/transpose(jvp())/transpose" stack_frame_id=3}}
  ROOT %add.9 = f32[8,8]{{1,0}} add(%dot.9, %p.1), metadata={{op_name="jit(step)/add"}}
}}

%fused.1 (p.2: f32[8,8]) -> f32[8,8] {{
  %p.2 = f32[8,8]{{1,0}} parameter(0)
  %exp.1 = f32[8,8]{{1,0}} exponential(%p.2), metadata={{op_name="jit(step)/jvp()/exp" \
stack_frame_id=4}}
  ROOT %bitcast.1 = f32[8,8]{{1,0}} bitcast(%exp.1)
}}

%body (t.1: f32[8,8]) -> f32[8,8] {{
  %t.1 = f32[8,8]{{1,0}} parameter(0)
  %fusion.1 = f32[8,8]{{1,0}} fusion(%t.1), kind=kOutput, calls=%fused, \
metadata={{op_name="jit(step)/add" stack_frame_id=1}}
  ROOT %fusion.2 = f32[8,8]{{1,0}} fusion(%fusion.1), kind=kLoop, calls=%fused.1
}}

%cond (t.2: f32[8,8]) -> pred[] {{
  %t.2 = f32[8,8]{{1,0}} parameter(0)
  ROOT %constant.1 = pred[] constant(false)
}}

ENTRY %main (x.1: f32[8,8]) -> f32[8,8] {{
  %x.1 = f32[8,8]{{1,0}} parameter(0)
  %copy.1 = f32[8,8]{{1,0}} copy(%x.1)
  %while.1 = f32[8,8]{{1,0}} while(%copy.1), condition=%cond, body=%body, \
metadata={{op_name="jit(step)/while" source_file="{ROOT}/kernels/scan.py" source_line=9}}
  ROOT %scan-kernel.1 = f32[8,8]{{1,0}} custom-call(%while.1), custom_call_target="scan", \
metadata={{op_name="jit(step)/transpose(jvp())/checkpoint/rematted_computation/pallas_call" \
stack_frame_id=4}}
}}
"""

MLP = dict(source="flowhn_jax/layers/mlp.py:32", operation="backward/dot_general")
EXP = dict(source="kernels/scan.py:7", operation="forward/exp")
KERNEL = dict(source="kernels/scan.py:7", operation="recompute/pallas_call")
LOOP = dict(source="kernels/scan.py:9", operation="while")
COPY = dict(source="kernels/scan.py:9", operation="copy")


def trace(planes):
    """Return the lines of a trace, after a round trip through its file format.

    Args:
      planes: events (name, start and end in ns, stats) by plane and line.
    """
    text = ""
    for plane, lines in planes.items():
        names, stat_names, body = {}, {}, ""
        for line, events in lines.items():
            body += f"lines {{ name: '{line}' timestamp_ns: 1000\n"
            for name, start, end, stats in events:
                body += f"events {{ metadata_id: {names.setdefault(name, len(names) + 1)} "
                body += f"offset_ps: {start * 1000} duration_ps: {(end - start) * 1000} "
                for key, value in stats.items():
                    number = stat_names.setdefault(key, len(stat_names) + 1)
                    kind = "int64_value: {}" if isinstance(value, int) else "str_value: '{}'"
                    body += f"stats {{ metadata_id: {number} {kind.format(value)} }} "
                body += "}\n"
            body += "}\n"
        for kind, table in (("event", names), ("stat", stat_names)):
            for name, number in table.items():
                body += f"{kind}_metadata {{ key: {number} "
                body += f"value {{ id: {number} name: '{name}' }} }}\n"
        text += f"planes {{ name: '{plane}'\n{body}}}\n"
    return read_trace(ProfileData.from_text_proto(text))


def cost(name, nanoseconds, total, count, **origin):
    origin = origin or dict(source="", operation="")
    seconds = pytest.approx(nanoseconds / 1e9)
    return Cost(name, seconds, pytest.approx(nanoseconds / total), count, **origin)


def test_tpu():
    """Loops contain their bodies, names are full texts, and another program has no source lines."""

    def core(slower):
        ops = [
            ("%copy.1 = f32[8,8]{1,0:T(8,128)} copy(f32[8,8] %x.1)", 0, 100, {}),
            ("%while.1 = f32[8,8] while(f32[8,8] %copy.1), body=%body", 100, 1000, {}),
            ("%fusion.1 = f32[8,8] fusion(f32[8,8] %t.1)", 110, 400 + slower, {}),
            ("%fusion.2 = f32[8,8] fusion(f32[8,8] %fusion.1)", 500, 540, {}),
            ("%fusion.1 = f32[8,8] fusion(f32[8,8] %t.1)", 550, 850, {}),
            ("%fusion.2 = f32[8,8] fusion(f32[8,8] %fusion.1)", 900, 940, {}),
            ("%scan-kernel.1 = f32[8,8] custom-call(f32[8,8] %while.1)", 1000, 1300, {}),
            ("%fusion.1 = f32[] fusion()", 1400, 1410, {}),
        ]
        return {
            "Steps": [("0", 0, 1410, {})],
            "XLA Modules": [("jit_step(17)", 0, 1300, {}), ("jit_other(3)", 1400, 1410, {})],
            "XLA Ops": ops,
            "Async XLA Ops": [("%copy-start.1 = f32[8,8] copy-start()", 0, 900, {})],
        }

    host = {"thread": [("fusion.1", 0, 5000, {"hlo_op": "fusion.1", "hlo_module": "jit_step"})]}
    lines = trace({"/device:TPU:0": core(0), "/device:TPU:1": core(20), "/host:CPU": host})
    assert costs_of(lines, PROGRAM, steps=1) == [
        cost("fusion.1", 600, 1310, 2, **MLP),
        cost("scan-kernel.1", 300, 1310, 1, **KERNEL),
        cost("while.1", 220, 1310, 1, **LOOP),
        cost("copy.1", 100, 1310, 1, **COPY),
        cost("fusion.2", 80, 1310, 2, **EXP),
        cost("jit_other/fusion.1", 10, 1310, 1),
    ]


def test_gpu():
    """Only streams count; a CUDA graph's kernels are found by their names."""

    def of(op, **stats):
        return {"hlo_op": op, "hlo_module": "jit_step", "correlation_id": 5, **stats}

    device = {
        "Stream #13(Compute)": [
            ("nvjet_hsh_128x256", 0, 300, of("fusion.1")),
            ("nvjet_splitk_reduce", 300, 350, of("fusion.1")),
            ("fusion_2", 400, 480, of("while.1")),
            ("scan_kernel_1", 500, 620, {}),
            ("loop_add_kernel", 700, 710, {}),
        ],
        "Stream #14(MemcpyD2D)": [("MemcpyD2D", 0, 40, of("copy.1"))],
        "XLA Ops": [("fusion.1", 0, 350, of("fusion.1"))],
        "XLA Modules": [("jit_step", 0, 710, {})],
    }
    lines = trace({"/device:GPU:0": device})
    assert costs_of(lines, PROGRAM, steps=2) == [
        cost("fusion.1", 175, 300, 1, **MLP),
        cost("scan-kernel.1", 60, 300, 1, **KERNEL),
        cost("fusion.2", 40, 300, 1, **EXP),
        cost("copy.1", 20, 300, 1, **COPY),
        cost("loop_add_kernel", 5, 300, 1),
    ]


LISTENER = "ThreadpoolListener::"


def cpu_op(name, start, end, number):
    stats = {"hlo_op": name, "hlo_module": "jit_step", "device_ordinal": 0, "_pt": 1, "_p": number}
    return name, start, end, stats


def cpu_end(name, time, number):
    return f"end: {name}", time, time, {"_ct": 1, "_c": number}


def cpu_record(time, task):
    return LISTENER + "Record", time, time, {"_pt": 15, "_p": task}


def cpu_region(start, end, task):
    yield LISTENER + "StartRegion", start, start, {"_ct": 15, "_c": task}
    yield LISTENER + "StopRegion", end, end, {}


def test_cpu():
    """Tasks on other threads count for the instruction that scheduled them; waits do not count."""
    main = [
        ("ThunkExecutor::Execute", 0, 1000, {}),
        cpu_op("while.1", 0, 900, 70),
        cpu_op("fusion.1", 100, 800, 71),
        cpu_record(110, 1),
        ("SlinkyThreadPool::Await", 500, 800, {}),
        cpu_end("fusion.1", 801, 71),
    ]
    worker = [
        (LISTENER + "StopRegion", 5, 5, {}),
        *cpu_region(200, 300, 1),
        cpu_record(210, 2),
        *cpu_region(400, 700, 2),
        ("ThunkExecutor::Execute", 450, 600, {}),
        cpu_op("fusion.2", 460, 560, 72),
        *cpu_region(800, 900, 99),
    ]
    lines = trace({"/host:CPU": {"main": main, "worker": worker}})
    assert costs_of(lines, PROGRAM, steps=1) == [
        cost("fusion.1", 400 + 100 + 150, 950, 1, **MLP),
        cost("while.1", 200, 950, 1, **LOOP),
        cost("fusion.2", 100, 950, 1, **EXP),
    ]


def test_cpu_workers_that_outlast_their_instruction():
    """From then on their time counts for the instruction that is running."""
    main = [
        cpu_op("fusion.2", 0, 50, 70),
        cpu_record(10, 1),
        cpu_op("fusion.1", 60, 400, 71),
        cpu_record(70, 2),
        cpu_op("copy.1", 400, 500, 72),
    ]
    first = [*cpu_region(20, 450, 1), cpu_end("fusion.2", 55, 70)]
    second = [*cpu_region(80, 360, 2), cpu_end("fusion.1", 401, 71)]
    lines = trace({"/host:CPU": {"main": main, "first": first, "second": second}})
    assert costs_of(lines, PROGRAM, steps=1) == [
        cost("fusion.1", 340 + 341 + 280, 1146, 1, **MLP),
        cost("copy.1", 100, 1146, 1, **COPY),
        cost("fusion.2", 50 + 35, 1146, 1, **EXP),
    ]


def test_parents_of_frames_as_printed_without_an_offset():
    text = PROGRAM
    for child, parent in ((1, 0), (2, 1), (3, 2), (4, 1)):
        text = text.replace(
            f"{{file_location_id={child} parent_frame_id={parent + 1}}}",
            f"{{file_location_id={child} parent_frame_id={parent}}}",
        )
    lines = trace({"/device:TPU:0": {"XLA Ops": [("fusion.1", 0, 1, {})]}})
    assert (
        costs_of(lines, text, 1)
        == costs_of(lines, PROGRAM, 1)
        == [cost("fusion.1", 1, 1, 1, **MLP)]
    )


def test_costs_are_grouped_by_line_and_operation():
    costs = [
        Cost("fusion.1", 3.0, 0.3, 2, **MLP),
        Cost("fusion.7", 4.0, 0.4, 1, **MLP),
        Cost("fusion.2", 2.0, 0.2, 1, **EXP),
        Cost("kernel_a", 0.6, 0.06, 1, "", ""),
        Cost("kernel_b", 0.4, 0.04, 1, "", ""),
    ]
    assert largest(costs, 2) == [
        Cost("fusion.7 and 1 more", 7.0, 0.7, 3, **MLP),
        Cost("fusion.2", 2.0, 0.2, 1, **EXP),
    ]
    assert [one.name for one in largest(costs)[2:]] == ["kernel_a", "kernel_b"]
