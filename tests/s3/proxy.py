"""A proxy in front of an S3 server that drops, delays or replaces chosen answers: what a bad network and a busy store do."""

from __future__ import annotations

import http.client
import http.server
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from urllib.parse import urlsplit

ANSWERS = {
    "busy": b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>",
    "skewed": b"<Error><Code>RequestTimeTooSkewed</Code><Message>The difference is too large.</Message></Error>",
    "expired": b"<Error><Code>ExpiredToken</Code><Message>The provided token has expired.</Message></Error>",
}


STATUS = {"busy": 503, "skewed": 403, "expired": 400}


@dataclass
class Rule:
    """What happens to the next `times` requests whose "METHOD path?query" the regular expression `what` finds.

    lost   it is done, and the connection closed without an answer
    busy   it is not done: 503 SlowDown
    reset  it is not done, and the connection closed
    torn   it is done, and half of the answer's body comes back
    held   it is done; the answer waits for `until`
    expired  it is not done: 400 ExpiredToken; skewed: 403 RequestTimeTooSkewed
    """

    what: str
    fault: str
    times: int = 1
    until: threading.Event = field(default_factory=threading.Event)
    reached: threading.Event = field(default_factory=threading.Event)


class Proxy(http.server.ThreadingHTTPServer):
    """Listens on a port of its own; `seen`: the requests so far."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, upstream: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.upstream = urlsplit(upstream).netloc
        self.rules: list[Rule] = []
        self.seen: list[str] = []
        self.delay = 0.0  # seconds by which every answer is late
        self.fetched = 0  # bytes of what was read of objects
        self.dropped: set[str] = set()  # names of headers, in small letters, that do not reach the server
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def meet(self, request: str) -> Rule | None:
        with self.lock:
            self.seen.append(request)
            for rule in self.rules:
                if rule.times > 0 and re.search(rule.what, request):
                    rule.times -= 1
                    rule.reached.set()
                    return rule
        return None

    def handle_error(self, *_: object) -> None:
        """A client that went away is nothing to tell."""


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Proxy

    def log_message(self, *_: object) -> None:
        pass

    def do_any(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        rule = self.server.meet(f"{self.command} {self.path}")
        fault = rule.fault if rule else ""
        if fault == "reset":
            self.close_connection = True
            return
        if fault in ANSWERS:
            self._answer(STATUS[fault], [("Content-Type", "application/xml")], ANSWERS[fault])
            return
        upstream = http.client.HTTPConnection(self.server.upstream, timeout=60)
        try:
            upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in {"expect", "connection", *self.server.dropped}:
                    upstream.putheader(name, value)
            upstream.endheaders(body or None)
            answer = upstream.getresponse()
            data = answer.read()
        except OSError:
            self.close_connection = True
            return
        finally:
            upstream.close()
        if self.server.delay:
            time.sleep(self.server.delay)  # a slow network, for benchmarks
        if rule and fault == "held":
            rule.until.wait(60)
        if self.command == "GET" and answer.status in (200, 206):
            with self.server.lock:
                self.server.fetched += len(data)
        if fault == "lost":
            self.close_connection = True
            return
        self._answer(answer.status, answer.getheaders(), data, cut=fault == "torn")

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = do_any

    def _answer(self, status: int, headers: list[tuple[str, str]], data: bytes, cut: bool = False) -> None:
        self.send_response_only(status)
        names = {n.lower() for n, _ in headers}
        for name, value in headers:
            if name.lower() not in ("transfer-encoding", "connection", "content-length"):
                self.send_header(name, value)
        length = next((v for n, v in headers if n.lower() == "content-length"), str(len(data)))
        self.send_header(
            "Content-Length", length if self.command == "HEAD" and "content-length" in names else str(len(data))
        )
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[: len(data) // 2] if cut else data)
        if cut:
            self.close_connection = True


@contextmanager
def proxy(upstream: str) -> Iterator[Proxy]:
    server = Proxy(upstream)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        for rule in server.rules:
            rule.until.set()
        server.shutdown()
        server.server_close()
        thread.join()
