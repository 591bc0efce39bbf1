"""Requests to Google Cloud Storage, repeated with growing pauses while they may still succeed."""

import contextlib
import functools
import importlib.util
import os
import random
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

from flowhn_jax.storage.errors import StorageError
from flowhn_jax.utils.text import one_line

T = TypeVar("T")

# Seconds for which a request is repeated. A permission that is missing does not come back soon,
# but a new token or a rate limit gives the same answer for some seconds.
_SECONDS = {403: 20.0}
_SECONDS_OTHERWISE = 120.0
_REPEATED = (403, 408, 429, 500, 502, 503, 504)
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 16.0  # seconds
PACKAGES = {"gcsfs": "gcsfs", "google.cloud.storage": "google-cloud-storage"}
sleep = time.sleep


def prepare_packages() -> None:
    """Set how the libraries use a bucket: no cached listings, no requests of their own.

    Orbax lists a bucket through gcsfs, whose cache misses what others do there.

    Raises:
      ValueError: a package that gs:// needs is missing.
    """
    missing = [package for module, package in PACKAGES.items() if not _is_installed(module)]
    if missing:
        raise ValueError(
            f"gs:// needs the package{'s' * (len(missing) > 1)} {' and '.join(missing)}: pip "
            f"install {' '.join(missing)}"
        )
    import fsspec.config

    fsspec.config.conf.setdefault("gs", {})["use_listings_cache"] = False
    # Recent clients ask for a bucket's metadata next to each request, for traces.
    os.environ.setdefault("DISABLE_GCS_PYTHON_CLIENT_OTEL_BUCKET_METADATA", "true")


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # its parent package
        return False


def client() -> Any:
    """Return this process's client of Google Cloud Storage.

    Raises:
      ValueError: there are no credentials, or a package is missing.
    """
    return _client(os.getpid())


@functools.cache
def _client(process: int) -> Any:
    prepare_packages()
    from google.auth.exceptions import DefaultCredentialsError
    from google.cloud import storage

    try:
        return storage.Client()
    except DefaultCredentialsError as error:
        raise ValueError(
            f"gs:// needs credentials of Google Cloud: {one_line(error)} Type: gcloud auth "
            "application-default login"
        ) from error


def repeated(what: str, request: Callable[[], T], seconds: float = _SECONDS_OTHERWISE) -> T:
    """Return the result of a request, repeated while the answer is one that may pass.

    The first failure is reported on standard error. All requests made here may be repeated:
    they read, write whole objects, or have a precondition.

    Args:
      what: names the object and what is done with it, for messages.
      request: sends it.
      seconds: how long it is repeated.

    Raises:
      FileNotFoundError: there is no such object.
      StorageError: the store refuses the request, or did not answer for this long.
    """
    from google.api_core.exceptions import GoogleAPICallError, NotFound, PreconditionFailed
    from google.auth.exceptions import RefreshError, TransportError
    from google.resumable_media import DataCorruption, InvalidResponse
    from requests.exceptions import RequestException

    start, pause, is_reported = time.monotonic(), _FIRST_PAUSE, False
    while True:
        try:
            return request()
        except NotFound as error:
            raise FileNotFoundError(f"{what}: {_reason(error)}") from error
        except PreconditionFailed:
            raise
        except RefreshError as error:  # the credentials have expired, or were revoked
            raise StorageError(f"{what} failed: {one_line(error)}") from error
        except (
            GoogleAPICallError,
            InvalidResponse,
            DataCorruption,
            RequestException,
            TransportError,
            ConnectionError,
        ) as error:
            code = _code(error)
            limit = min(seconds, _SECONDS.get(code or 0, seconds))
            may_pass = code is None or code in _REPEATED
            if not may_pass or time.monotonic() - start + pause > limit:
                raise StorageError(f"{what} failed: {_reason(error)}") from error
            if not is_reported:
                _report(f"{what}: {_reason(error)}; trying again for up to {limit:.0f} s")
                is_reported = True
        sleep(pause * random.uniform(0.75, 1.25))
        pause = min(2 * pause, _LONGEST_PAUSE)


def _code(error: BaseException) -> int | None:
    """Return the HTTP status of an answer; None: there was no answer."""
    response = getattr(error, "response", None)
    code = getattr(error, "code", None) or getattr(response, "status_code", None)
    return int(code) if code is not None else None


def _reason(error: BaseException) -> str:
    """Return the status and the message of an answer, or what went wrong without one."""
    code = _code(error)
    if code is None:
        return one_line(error)
    message = getattr(error, "message", "")
    with contextlib.suppress(Exception):  # a body of another form
        response: Any = getattr(error, "response", None)
        message = response.json()["error"]["message"]
    return f"{code} {one_line(message)}"


_lock = threading.Lock()


def _report(text: str) -> None:
    with _lock:
        print(text, file=sys.stderr, flush=True)
