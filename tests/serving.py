"""A server of `examples/serve` on a free port of this machine, and what clients do to it."""

import http.client
import json
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Thread
from typing import Any

import uvicorn

from serve.server import Server


@dataclass
class Answer:
    """What the server has answered."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def told(self) -> Any:
        return json.loads(self.body)


@dataclass
class Running:
    """A server that runs."""

    server: Server
    web: uvicorn.Server
    thread: Thread
    port: int

    def ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> Answer:
        return answer_of(self.send(method, path, body))

    def send(self, method: str, path: str, body: dict[str, Any] | None = None) -> http.client.HTTPConnection:
        """A request whose answer is not waited for."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request(method, path, json.dumps(body) if body else None, {"Content-Type": "application/json"})
        return connection

    def metric(self, line: str) -> float:
        """What stands behind the name, with labels, of a series; 0 before there is one."""
        for text in self.ask("GET", "/metrics").body.decode().splitlines():
            if text.startswith(f"{line} "):
                return float(text.removeprefix(line))
        return 0.0

    def stop(self) -> None:
        """Tell it to stop, as a signal does, and wait until it has."""
        self.web.should_exit = True
        self.thread.join(30)
        assert not self.thread.is_alive()


def answer_of(connection: http.client.HTTPConnection) -> Answer:
    """The answer to what was sent."""
    try:
        response = connection.getresponse()
        return Answer(response.status, dict(response.headers), response.read())
    finally:
        connection.close()


@contextmanager
def running(server: Server) -> Iterator[Running]:
    """Run a server for as long as the context lasts."""
    listening = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(server.app, log_config=None, timeout_graceful_shutdown=10)
    web = uvicorn.Server(config)
    thread = Thread(target=web.run, kwargs={"sockets": [listening]})
    thread.start()
    served = Running(server, web, thread, listening.getsockname()[1])
    try:
        until(lambda: web.started)
        yield served
    finally:
        served.stop()


def until(is_so: Callable[[], bool], seconds: float = 30) -> None:
    """Wait until something is so."""
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.002)
