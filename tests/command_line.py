"""Command lines in processes forked from one that has imported the package.

A fresh interpreter spends two CPU seconds on imports before it reads its flags.
"""

import multiprocessing
import os
import pathlib
import runpy
import subprocess
import sys
import tempfile
from multiprocessing import reduction

ROOT = pathlib.Path(__file__).parent.parent
_IMPORTED = [
    "flowhn_jax.aot.step_report",
    "flowhn_jax.bench.kernel_times",
    "flowhn_jax.compare.comparison",
    "flowhn_jax.data.prepare",
    "flowhn_jax.evaluation.evaluate",
    "flowhn_jax.interop.transfer",
    "flowhn_jax.run_report.page",
    "flowhn_jax.sweep.sweep",
    "flowhn_jax.training.trainer",
]
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(_IMPORTED)


def call(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `python ARGUMENTS`, FILE.py or -m MODULE, in the root of the repository."""
    with tempfile.TemporaryFile("w+") as stdout, tempfile.TemporaryFile("w+") as stderr:
        environment = dict(os.environ)  # not that in which the server was started
        child = _context.Process(
            target=_run, args=(arguments, environment, _sent(stdout), _sent(stderr))
        )
        child.start()
        child.join()
        texts = []
        for file in (stdout, stderr):
            file.seek(0)
            texts.append(file.read())
    return subprocess.CompletedProcess(arguments, child.exitcode, *texts)


def _sent(file):
    return reduction.DupFd(file.fileno())


def _run(arguments, environment, stdout, stderr):
    os.environ.clear()
    os.environ.update(environment)
    for descriptor, file in ((1, stdout), (2, stderr)):
        os.dup2(file.detach(), descriptor)
    os.environ.pop("XLA_FLAGS", None)  # the tests' own: eight devices
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    if arguments[0] == "-m":
        sys.argv = list(arguments[1:])
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = list(arguments)
        runpy.run_path(arguments[0], run_name="__main__")
