"""A proxy before an emulator of Google Cloud Storage that answers with errors when asked to."""

import contextlib
import http.client
import http.server
import random
import threading
import urllib.parse
from typing import Any

CODES = (403, 429, 503)
# Its multiples are spread evenly over the numbers from 0 to 1: the number of errors is certain.
_GOLDEN_RATIO = (5**0.5 - 1) / 2
_HOP_HEADERS = ("connection", "transfer-encoding", "content-length", "keep-alive")


class FaultyStore:
    """The proxy, as a context manager.

    Attributes:
      url: where it listens.
      answered: number of errors that it has answered with, by code.
    """

    def __init__(self, upstream: str, seed: int = 0):
        """Forward requests to the emulator at `upstream`."""
        self._upstream = urllib.parse.urlsplit(upstream).netloc
        self._rng = random.Random(seed)
        self._codes: tuple[int, ...] = ()
        self._share = 1.0
        self._place = self._rng.random()  # of the next request among those that are refused
        self.answered = dict.fromkeys(CODES, 0)
        store = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_one_request(self) -> None:
                with contextlib.suppress(ConnectionError, TimeoutError):
                    super().handle_one_request()

            def log_message(self, format: str, *args: Any) -> None:
                pass

            def do_GET(self) -> None:
                store._answer(self)

            do_POST = do_PUT = do_DELETE = do_PATCH = do_HEAD = do_GET

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> "FaultyStore":
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._server.shutdown()
        self._server.server_close()

    def refuse(self, *codes: int, share: float = 1.0) -> None:
        """Answer with errors from now on.

        Args:
          codes: HTTP status codes, of which each answer has a random one.
          share: the share of the requests, spread evenly over them; the others are forwarded.
        """
        self._codes, self._share = codes, share

    def serve(self) -> None:
        """Forward all requests again."""
        self._codes = ()

    def fill(self, pid: int, leave: int) -> None:
        """Refuse all requests with one of the codes, as a full disk does; see SmallDisk."""
        self.refuse(self._rng.choice(CODES))

    def free(self, pid: int) -> None:
        """Forward all requests again; see SmallDisk."""
        self.serve()

    def _answer(self, request: Any) -> None:
        body = _body(request)
        codes = self._codes
        self._place = (self._place + _GOLDEN_RATIO) % 1
        if codes and self._place < self._share:
            code = self._rng.choice(codes)
            self.answered[code] = self.answered.get(code, 0) + 1
            text = f'{{"error": {{"code": {code}, "message": "refused by the proxy"}}}}'.encode()
            _reply(request, code, [("Content-Type", "application/json")], text)
            return
        connection = http.client.HTTPConnection(self._upstream, timeout=60)
        try:
            headers = {
                name: value
                for name, value in request.headers.items()
                if name.lower() not in (*_HOP_HEADERS, "host", "expect")
            }
            headers["Host"] = self._upstream
            connection.request(request.command, request.path, body, headers)
            response = connection.getresponse()
            content = response.read()
            _reply(request, response.status, response.getheaders(), content)
        finally:
            connection.close()


def _body(request: Any) -> bytes:
    if "chunked" not in request.headers.get("Transfer-Encoding", ""):
        return request.rfile.read(int(request.headers.get("Content-Length", 0)))
    parts = []
    while size := int(request.rfile.readline().split(b";")[0], 16):
        parts.append(request.rfile.read(size))
        request.rfile.readline()
    request.rfile.readline()
    return b"".join(parts)


def _reply(request: Any, code: int, headers: list[tuple[str, str]], content: bytes) -> None:
    request.send_response_only(code)
    length = str(len(content))
    for name, value in headers:
        if name.lower() == "content-length" and request.command == "HEAD":
            length = value
        elif name.lower() not in _HOP_HEADERS:
            request.send_header(name, value)
    request.send_header("Content-Length", length)
    request.end_headers()
    if request.command != "HEAD":
        request.wfile.write(content)
