"""A running vLLM server, spoken to over HTTP."""

from __future__ import annotations

import http.client
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from typing import Any
from urllib.parse import urlsplit

from lightrft.engines.base import EngineError
from lightrft.whereabouts import mark

# Each needs a file descriptor, of which processes often have 1024.
_CONNECTIONS = 512
Take = Callable[[dict[str, Any]], bool]


class VLLMServer:
    """Requests to one server. Each raises :class:`EngineError` with the URL where the server does not answer it.

    Args:
        url: ``http://host:port``, or ``https``, with a path where a proxy wants one.
        api_key_variable: environment variable with the server's API key; read when it is used.
        timeout_seconds: how long the server may say nothing.

    Attributes:
        url: as given.
        host: in the URL.

    Raises:
        ValueError: another kind of URL, or one with a password in it, which would be logged.
    """

    def __init__(self, url: str, api_key_variable: str | None, timeout_seconds: float) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            raise ValueError(f"url is {url!r}; it must be http://host:port or https://host:port.")
        if parts.username is not None or parts.password is not None:
            raise ValueError(
                "url has a user or password in it, which logs and checkpoints would show; put the server's API key "
                "into an environment variable and name that by api_key_variable."
            )
        if not timeout_seconds > 0:
            raise ValueError(f"timeout_seconds is {timeout_seconds}; it must be above 0.")
        self.url, self.host = url.rstrip("/"), parts.hostname
        self.timeout_seconds = timeout_seconds
        self._parts = parts
        self._api_key_variable = api_key_variable

    def ask(self, path: str, body: dict[str, Any] | None = None, wait_seconds: float | None = None) -> Any:
        """POST ``body``, and the JSON of the answer within ``wait_seconds``, which are else ``timeout_seconds``."""
        call = self.call(path, body)
        call.wait_seconds = wait_seconds or self.timeout_seconds
        try:
            return call.answer()
        finally:
            call.end()

    def worker(self, what: str, *arguments: Any, wait_seconds: float | None = None) -> Any:
        """What :class:`~lightrft.engines.server.receiver.WeightReceiver` answers in the server's worker."""
        body = {"method": "lightrft", "args": [what, json.dumps(arguments)]}
        said = self.ask("/collective_rpc", body, wait_seconds)
        try:
            (result,) = said["results"]
            return result["answer"]
        except (TypeError, KeyError, ValueError) as error:
            raise EngineError(f"{self.url} answers /collective_rpc, but not as vLLM does: {said!r:.200}") from error

    @contextmanager
    def answering(self, path: str, body: dict[str, Any]) -> Iterator[tuple[Callable[[], None], Callable[[], None]]]:
        """While it does what ``path`` is for: a function that raises if it does not any more, and one that waits."""
        call = self.call(path, body)
        with ThreadPoolExecutor(1) as thread:
            future = thread.submit(call.answer)

            def watch() -> None:
                if future.done():
                    future.result()
                    raise EngineError(f"vLLM at {self.url} answered {path} before it got all.")

            def finish() -> None:
                if future not in wait([future], self.timeout_seconds).done:
                    raise self.silent(f"answer {path}")
                future.result()

            try:
                yield watch, finish
            finally:
                call.end()

    def generate(self, bodies: Sequence[dict[str, Any]], takes: Sequence[Take]) -> None:
        """Let the server answer all at the same time; if one fails, or this is interrupted, it drops the others.

        Args:
            bodies: of requests to ``/inference/v1/generate``.
            takes: of each, what is called with every event of its answer, by several threads; ``True`` is enough.
        """
        if not bodies:
            return
        calls = _Calls(self)
        with ThreadPoolExecutor(min(len(bodies), _CONNECTIONS)) as threads:
            futures = [threads.submit(calls.run, body, take) for body, take in zip(bodies, takes)]
            try:
                self._await(futures, calls)
            finally:
                calls.end()

    def _await(self, futures: Sequence[Future[None]], calls: _Calls) -> None:
        heard, pending = calls.heard, set(futures)
        while pending:
            done, pending = wait(pending, timeout=min(1.0, self.timeout_seconds / 4), return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()
            if calls.heard != heard:
                heard = calls.heard
                mark()
            elif pending and time.monotonic() - heard > self.timeout_seconds:
                raise self.silent("sample")

    def silent(self, what: str) -> EngineError:
        return EngineError(
            f"vLLM at {self.url} said nothing for {self.timeout_seconds:g} seconds while it was to {what}; see its "
            "log, or raise timeout_seconds."
        )

    def call(self, path: str, body: dict[str, Any] | None) -> _Call:
        headers = {"Content-Type": "application/json"}
        if self._api_key_variable is not None:
            key = os.environ.get(self._api_key_variable)
            if key is None:
                raise EngineError(f"The environment variable {self._api_key_variable} is not set (api_key_variable).")
            headers["Authorization"] = f"Bearer {key}"
        kind = http.client.HTTPSConnection if self._parts.scheme == "https" else http.client.HTTPConnection
        connection = kind(self.host, self._parts.port, timeout=self.timeout_seconds)
        return _Call(self, connection, f"{self._parts.path.rstrip('/')}{path}", json.dumps(body or {}), headers)


class _Call:
    """One request, which another thread may :meth:`end`.

    Attributes:
        wait_seconds: how long to wait for the answer; ``None`` is for ever.
    """

    def __init__(
        self, server: VLLMServer, connection: http.client.HTTPConnection, path: str, body: str, headers: dict[str, str]
    ) -> None:
        self.wait_seconds: float | None = None
        self._server, self._connection = server, connection
        self._path, self._body, self._headers = path, body, headers
        self._socket: socket.socket | None = None
        self._ended = threading.Event()

    def answer(self) -> Any:
        """The JSON of the answer; ``None`` where there is none."""
        with self._response() as response:
            text = response.read()
        try:
            return json.loads(text) if text else None
        except ValueError as error:
            raise EngineError(f"{self._server.url} answers {self._path}, but not as vLLM does.") from error

    def events(self) -> Iterator[dict[str, Any]]:
        """Of an answer that is streamed, the JSON of each event; of another one, the whole."""
        with self._response() as response:
            if "event-stream" not in (response.getheader("Content-Type") or ""):
                yield json.loads(response.read())
                return
            for line in response:
                if line.startswith(b"data: [DONE]"):
                    return
                if line.startswith(b"data: "):
                    yield json.loads(line[6:])
        raise EngineError(f"vLLM at {self._server.url} broke off its answer to {self._path}; see its log.")

    def end(self) -> None:
        """Close the connection, on which the server drops the request."""
        self._ended.set()
        if self._socket is not None:
            with suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)  # closing alone would not wake a thread that reads
        self._connection.close()

    @contextmanager
    def _response(self) -> Iterator[http.client.HTTPResponse]:
        url = self._server.url
        try:
            self._connection.connect()
            self._socket = self._connection.sock  # which the connection forgets where the server closes it
            self._socket.settimeout(self.wait_seconds)
            if self._ended.is_set():
                raise ConnectionAbortedError("ended before it was sent")
            self._connection.request("POST", self._path, self._body, self._headers)
            response = self._connection.getresponse()
            if response.status != 200:
                raise Refused(url, self._path, response.status, response.read().decode(errors="replace"))
            yield response
        except TimeoutError as error:
            raise self._server.silent(f"answer {self._path}") from error
        except (OSError, http.client.HTTPException) as error:
            raise EngineError(f"vLLM at {url} does not answer {self._path} ({error!r}); is it running?") from error


class Refused(EngineError):
    """The server answered, but not with what was asked for.

    Attributes:
        status: of HTTP.
    """

    def __init__(self, url: str, path: str, status: int, text: str) -> None:
        super().__init__(f"vLLM at {url} refused {path} with status {status}: {_message(text)}")
        self.status = status


class _Calls:
    """Those under way together.

    Attributes:
        heard: when one of them was last answered, ``time.monotonic`` seconds.
    """

    def __init__(self, server: VLLMServer) -> None:
        self.heard = time.monotonic()
        self._server = server
        self._lock = threading.Lock()
        self._open: set[_Call] = set()
        self._ended = False

    def run(self, body: dict[str, Any], take: Take) -> None:
        call = self._server.call("/inference/v1/generate", body)
        with self._lock:
            if self._ended:
                return
            self._open.add(call)
        try:
            for event in call.events():
                self.heard = time.monotonic()
                if "error" in event:
                    raise EngineError(f"vLLM at {self._server.url} failed while it sampled: {_message(event)}")
                if take(event):
                    return
        finally:
            call.end()
            with self._lock:
                self._open.discard(call)

    def end(self) -> None:
        with self._lock:
            self._ended = True
            left = list(self._open)
        for call in left:
            call.end()


def _message(said: Any) -> str:
    """What an error says, as vLLM or its web framework words it."""
    if isinstance(said, str):
        try:
            said = json.loads(said)
        except ValueError:
            return str(said)[:500]
    for name in ("error", "message", "detail"):
        if isinstance(said, dict) and name in said:
            said = said[name]
    return str(said)[:500]
