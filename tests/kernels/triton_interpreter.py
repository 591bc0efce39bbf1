"""Run Triton kernels in Triton's interpreter, on NumPy arrays and without a GPU.

Triton decides whether to interpret when it is imported, so the kernels run in a separate process,
which starts at the first launch and ends with this one.
"""

import contextlib
import functools
import importlib
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from unittest import mock

import jax
import numpy as np

_TYPES = {
    "float32": "fp32",
    "bfloat16": "bf16",
    "float16": "fp16",
    "int32": "i32",
}


def run(launch, module="kernels.selective_scan.triton_kernels"):
    """Run a kernel of the module for a `Launch` of its operation, also inside `jax.jit`."""
    outputs = tuple(launch.outputs.values())

    def call(*inputs):
        arrays = [np.asarray(x) for x in inputs]
        shapes = [(x.shape, x.dtype) for x in outputs]
        job = interpret, module, launch.kernel, arrays, shapes, launch.grid, launch.constants
        return tuple(_process().submit(*job).result())

    return jax.pure_callback(call, outputs, *launch.inputs)


@functools.cache
def _process():
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(1, context)
    with mock.patch.dict(os.environ, TRITON_INTERPRET="1"):
        pool.submit(os.getpid).result()
    return pool


def interpret(module, kernel, inputs, outputs, grid, constants):
    """Run a kernel on every program of the grid; what it does not write is NaN."""
    kernels = importlib.import_module(module)
    inputs = [np.ascontiguousarray(x) for x in inputs]
    results = [np.full(shape, np.nan, dtype) for shape, dtype in outputs]
    tensors = [_Tensor(x) for x in (*inputs, *results)]
    with _exact_bfloat16():
        getattr(kernels, kernel)[grid](*tensors, **constants)
    return results


@contextlib.contextmanager
def _exact_bfloat16():
    """Make the interpreter round to bfloat16, and multiply matrices of it, as a GPU does.

    It truncates, and multiplies the bits as if they were integers.
    """
    builder = importlib.import_module("triton.runtime.interpreter").InterpreterBuilder
    float32 = importlib.import_module("triton.language").float32
    create_dot, create_fp_trunc = builder.create_dot, builder.create_fp_trunc

    def dot_of_floats(self, a, b, *arguments):
        a, b = (self.create_fp_ext(x, float32) if x.dtype.is_bf16() else x for x in (a, b))
        return create_dot(self, a, b, *arguments)

    def round_to_nearest(self, source, dtype):
        result = create_fp_trunc(self, source, dtype)
        if dtype.scalar.is_bf16():
            result.data = source.data.astype(jax.numpy.bfloat16).view(np.uint16)
        return result

    with mock.patch.multiple(builder, create_dot=dot_of_floats, create_fp_trunc=round_to_nearest):
        yield


class _Tensor:
    """The parts of a torch tensor on the CPU that the interpreter uses."""

    def __init__(self, array):
        self.array = array
        self.dtype = _TYPES[array.dtype.name]
        self.shape = array.shape

    def data_ptr(self):
        return self.array.ctypes.data

    def cpu(self):
        return self

    def untyped_storage(self):
        return self

    def new_empty(self, *_, **__):
        return self

    def set_(self, *_):
        return self

    def copy_(self, _):
        return self

    def storage_offset(self):
        return 0

    def size(self):
        return self.shape

    def stride(self):
        return self.array.strides
