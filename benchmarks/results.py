"""Paired timings, and where results go: benchmarks/results/NAME.json with machine and versions."""

import csv
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from stepmask import MaskSchedule
from stepmask.evaluation.measure import machine
from stepmask.evaluation.report import Report
from stepmask.files import write_whole
from stepmask.schedule.file import FILE_NAME

FOLDER = Path(__file__).parent / "results"

Row = dict[str, Any]
"""Of a CSV file."""

WORDS = ("pipeline", "method", "setting")
"""Columns that are no numbers."""


def paired_ratio(
    a: Callable[[], Any],
    b: Callable[[], Any],
    rounds: int,
    *,
    before_b: Callable[[], Any] = lambda: None,
    after_b: Callable[[], Any] = lambda: None,
) -> dict[str, Any]:
    """Time of b over time of a, taken in turns (a b, b a, …): median and quartiles of the ratios."""

    def timed_b() -> float:
        before_b()
        seconds = _seconds(b)
        after_b()
        return seconds

    a()
    timed_b()
    ratios = []
    for turn in range(rounds):
        first, second = (_seconds(a), timed_b()) if turn % 2 == 0 else (timed_b(), _seconds(a))
        ratios.append(second / first if turn % 2 == 0 else first / second)
    low, _, high = quantiles(ratios, n=4)
    return {"median": median(ratios), "quartiles": [low, high], "rounds": rounds}


def gain(report: Report, name: str) -> dict[str, float]:
    """Speed-up of the denoiser in a row of a report, and over the one that the MACs which it ran promise."""
    speedup, slowest, fastest = report.speedup(name)
    over = speedup * report[name].macs_executed
    return {"speedup": speedup, "slowest": slowest, "fastest": fastest, "over_promise": over}


def kept(path: Path, measure: Callable[[], Any]) -> Any:
    """What a JSON file of a finished part says; or measured now and kept there, for a killed run to go on from."""
    if not path.exists():
        write_whole(path, json.dumps(measure()))
    return json.loads(path.read_text())


def kept_table(folder: Path, learn: Callable[[], MaskSchedule]) -> MaskSchedule:
    """The table in a folder; if there is none, what is then learned, which stays there."""
    if not (folder / FILE_NAME).exists():
        learn().save_pretrained(folder)
    return MaskSchedule.from_pretrained(folder)


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """A CSV file with every column that any row has."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(column for row in rows for column in row)))
        writer.writeheader()
        writer.writerows(rows)


def read_rows(path: Path) -> list[Row]:
    """What `write_rows` wrote; where a row has nothing in a column, it has not the column."""
    with path.open(newline="") as file:
        return [
            {name: value if name in WORDS else float(value) for name, value in row.items() if value}
            for row in csv.DictReader(file)
        ]


def table(lines: list[list[str]]) -> str:
    """In Markdown; the first line is that of the heads."""
    heads, *rest = lines
    return "\n".join(f"| {' | '.join(line)} |" for line in (heads, ["---"] * len(heads), *rest))


def _seconds(function: Callable[[], Any]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def alone(script: str, *arguments: str) -> str:
    """What a script prints in a process of its own, whose peak memory is that of what is alive.

    glibc gives freed tensors back at once there, and no heap is fragmented.
    """
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**17)}
    return subprocess.check_output([sys.executable, script, *arguments], text=True, env=environment)


def save(name: str, numbers: dict[str, Any], *, goal: str, met: bool) -> None:
    """Print and write a result; the goal stands beside it, met or missed."""
    result = {**numbers, "goal": goal, "met": met, "machine": machine()}
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
