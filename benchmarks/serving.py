"""The server of examples/serve under load: whether each picture is right, its memory, what HTTP takes of the speed.

Clients are in a process of their own (`serving_clients.py`). The same orders are handed to the same pool by threads of
this process, too, without HTTP; in turns.
"""

import argparse
import hashlib
import json
import resource
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from threading import Event, Thread
from typing import Any

import torch

from results import FOLDER, alone, kept, save
from serving_clients import POLL_S
from stepmask import MaskSchedule, Tiers

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

import uvicorn

from serve.masked_pipeline import Cancelled, MaskedPipeline
from serve.order import Order
from serve.pool import Pool
from serve.server import Server
from serve.settings import Settings
from stepmask import zoo

PIPELINE, STEPS, PIPELINES, CLIENTS = "zoo:dit-emoji", 20, 2, 8
REQUESTS, PART = 200, 50
TIERS = {"fast": "20-0.35", "quality": "20-0.5"}
"""The learned tables of `frontier.py`."""

RIGHT = Path("runs/serving.json")
"""What single calls give, of a process that has ended."""

Asked = tuple[dict[str, Any], str | None]
"""An order, and how it is cancelled."""

Digests = list[str | None]
"""Of what orders were answered with; nothing of those that were cancelled."""


def orders(count: int) -> list[Asked]:
    """Orders of all tiers in turns; every tenth is cancelled while it is drawn, by its id or by going away."""
    return [
        (
            {
                "labels": [number % 24],
                "seed": number,
                "tier": list(TIERS)[number % 3 == 0],
                "format": "npy",
                "id": f"n{number}",
            },
            None if number % 10 != 9 else ("DELETE", "going")[number % 20 == 9],
        )
        for number in range(count)
    ]


def write_tiers(folder: Path) -> Path:
    """The tiers in a folder."""
    learned = FOLDER / "schedules" / "dit-emoji"
    tiers = {tier: MaskSchedule.from_pretrained(learned / name) for tier, name in TIERS.items()}
    return Tiers(tiers).save_pretrained(folder)


def drawn_alone(tiers: str) -> Digests:
    """What single calls of a fresh pipeline give, one after the other."""
    pipeline = MaskedPipeline(zoo.load(PIPELINE), Tiers.from_pretrained(tiers), "fast")
    pipeline.pipe.set_progress_bar_config(disable=True)
    return [
        None if cancel else digest(pipeline, Order(**asked, steps=STEPS, fallback=False))
        for asked, cancel in orders(REQUESTS)
    ]


def digest(pipeline: MaskedPipeline, order: Order) -> str:
    return hashlib.sha256(pipeline.draw(order, Event()).encoded("npy")).hexdigest()


def directly(pool: Pool, asked: list[Asked]) -> tuple[float, Digests]:
    """Seconds, and what the orders are answered with, by threads that hand them to the pool itself."""

    def done(each: Asked) -> str | None:
        order, cancel = each
        job = pool.submit(Order(**order, steps=STEPS, fallback=False))
        if cancel is None:
            return hashlib.sha256(job.drawn.result().encoded("npy")).hexdigest()
        while pool.state(job.order.id) != "running":
            time.sleep(POLL_S)
        pool.cancel(job.order.id)
        try:
            job.drawn.result()
        except Cancelled:
            return None
        raise AssertionError("the order was not cancelled")

    started = time.perf_counter()
    with ThreadPoolExecutor(CLIENTS) as threads:
        digests = list(threads.map(done, asked))
    return time.perf_counter() - started, digests


def over_http(port: int, asked: list[Asked]) -> tuple[float, Digests]:
    """The same by clients over HTTP."""
    script = str(Path(__file__).parent / "serving_clients.py")
    command = [sys.executable, script, str(port), str(CLIENTS)]
    told = json.loads(subprocess.check_output(command, input=json.dumps(asked), text=True))
    return told["seconds"], told["digests"]


@contextmanager
def served(server: Server) -> Iterator[int]:
    """The port at which the server listens while the context lasts."""
    listening = socket.create_server(("127.0.0.1", 0))
    web = uvicorn.Server(uvicorn.Config(server.app, log_config=None))
    thread = Thread(target=web.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        yield listening.getsockname()[1]
    finally:
        web.should_exit = True
        thread.join()


def cpu_time() -> float:
    """Seconds of processors that this process has taken, and those that it has started and that have ended."""
    both = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return sum(each.ru_utime + each.ru_stime for each in both)


def resident_mib() -> float:
    """Memory of this process now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def measure(server: Server, port: int, right: Digests) -> dict[str, Any]:
    """The requests in parts, each over HTTP and directly, in turns: what others do on the machine disturbs both."""
    ways: dict[str, Callable[[list[Asked]], tuple[float, Digests]]] = {
        "http": lambda asked: over_http(port, asked),
        "direct": lambda asked: directly(server.pool, asked),
    }
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    cpu_seconds = dict.fromkeys(ways, 0.0)
    wrong = 0
    memory = []
    directly(server.pool, orders(CLIENTS))  # to warm up
    for turn, first in enumerate(range(0, REQUESTS, PART)):
        part = slice(first, first + PART)
        for name in list(ways)[:: 1 if turn % 2 == 0 else -1]:
            before = cpu_time()
            seconds, digests = ways[name](orders(REQUESTS)[part])
            cpu_seconds[name] += cpu_time() - before
            wrong += sum(one != other for one, other in zip(digests, right[part], strict=True))
            speeds[name].append(sum(each is not None for each in digests) / seconds)
        memory.append(resident_mib())
    drawn = sum(each is not None for each in right)
    return {
        "pictures": 2 * drawn,
        "wrong": wrong,
        "pictures_per_second": speeds,
        "http_over_direct": [one / other for one, other in zip(speeds["http"], speeds["direct"], strict=True)],
        "cpu_seconds_per_picture": {name: seconds / drawn for name, seconds in cpu_seconds.items()},
        "resident_mib": memory,
        "store_bytes_idle": sum(pipeline.stored_bytes for pipeline in server.pool.pipelines),
        "store_bytes_peak": sum(pipeline.peak_stored_bytes for pipeline in server.pool.pipelines),
    }


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("tiers", nargs="?", help="print what single calls give, of a fresh process")
    told = arguments.parse_args()
    torch.set_num_threads(1)
    if told.tiers:
        print(json.dumps(drawn_alone(told.tiers)))
        return
    with tempfile.TemporaryDirectory() as folder:
        tiers = str(write_tiers(Path(folder, "tiers")))
        right = kept(RIGHT, lambda: json.loads(alone(sys.argv[0], tiers)))
        server = Server(Settings(PIPELINE, tiers, steps=STEPS, pipelines=PIPELINES))
        with served(server) as port:
            numbers = measure(server, port, right)
            speedups = {tier: server.pool.metrics.speedup.labels(tier)._value.get() for tier in TIERS}
    grown = numbers["resident_mib"][-1] / numbers["resident_mib"][0]
    save(
        "serving",
        {
            "what": f"{PIPELINE}, {STEPS} steps, guided, {PIPELINES} pipelines of one thread over the same weights; "
            f"{REQUESTS} requests of one sample by {CLIENTS} clients, every tenth cancelled while it is drawn",
            **numbers,
            "speedup_under_load_over_idle_bare": speedups,
        },
        goal="no wrong picture, memory after 200 requests at most 1.02 of that after 50, an empty store when idle, and "
        "at least .95 of the throughput without HTTP",
        met=not numbers["wrong"]
        and not numbers["store_bytes_idle"]
        and grown <= 1.02
        and median(numbers["http_over_direct"]) >= 0.95,
    )


if __name__ == "__main__":
    main()
