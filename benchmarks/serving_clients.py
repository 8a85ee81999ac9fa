"""Clients of `serving.py`'s server, in a process of their own; orders come by standard input.

python benchmarks/serving_clients.py PORT CLIENTS < orders.json
"""

import hashlib
import http.client
import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

POLL_S = 0.1


def asked(port: int, method: str, path: str, body: Any = None) -> http.client.HTTPConnection:
    """A connection on which a request was sent."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    connection.request(method, path, None if body is None else json.dumps(body), {"Content-Type": "application/json"})
    return connection


def is_running(port: int, name: str) -> bool:
    response = asked(port, "GET", f"/requests/{name}").getresponse()
    return bool(json.load(response)["state"] == "running")


def done(port: int, order: dict[str, Any], cancel: str | None) -> str | None:
    """What an order was answered with, as a digest; `None` of one that was cancelled."""
    connection = asked(port, "POST", "/generate", order)
    if cancel is None:
        response = connection.getresponse()
        body = response.read()
        assert response.status == 200, body
        return hashlib.sha256(body).hexdigest()
    while not is_running(port, order["id"]):
        time.sleep(POLL_S)
    if cancel == "DELETE":
        assert asked(port, "DELETE", f"/requests/{order['id']}").getresponse().status == 202
        assert connection.getresponse().status == 410
    connection.close()
    return None


def main() -> None:
    port, clients = map(int, sys.argv[1:])
    orders = json.load(sys.stdin)
    started = time.perf_counter()
    with ThreadPoolExecutor(clients) as threads:
        digests = list(threads.map(lambda each: done(port, *each), orders))
    json.dump({"seconds": time.perf_counter() - started, "digests": digests}, sys.stdout)


if __name__ == "__main__":
    main()
