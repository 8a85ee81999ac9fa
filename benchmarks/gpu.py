"""All that has to be seen on a GPU, in one run of eight minutes that needs nothing but this repository.

What masks cost; speed-ups and stores of large denoisers with random weights in bfloat16, eager and compiled by repeated
blocks; the zoo's learned tables, whose errors must be those of the CPU; and learning, with its time and peak memory.
Every part is a process of its own with its own time: one that is not finished by then is ended, and what it has found
so far stands beside a note. `--tiny` runs all of it on the CPU with tiny denoisers, compiled by no compiler, and files
nothing unless told where.
"""

import argparse
import json
import multiprocessing
import subprocess
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean, median
from typing import Any

import diffusers
import numpy as np
import torch

import stepmask
from frontier import SCHEDULES
from random_denoisers import RANDOM_DENOISERS, Loop
from results import FOLDER, paired_ratio
from setting import SAMPLES, Setting, by_sample
from stepmask import Budget, MaskSchedule, zoo
from stepmask.denoiser.clock import Clock
from stepmask.denoiser.memory import peak_memory
from stepmask.denoiser.regions import modules_by_name, repeated_regions
from stepmask.errors import RunError
from stepmask.evaluation.measure import machine
from stepmask.files import write_whole
from stepmask.learning.rounding import round_scores
from stepmask.learning.trained import TrainedForecasts
from stepmask.schedule.baselines import fixed_interval
from stepmask.schedule.fingerprint import SamplerFingerprint
from stepmask.schedule.rectify import lower

MOST_OVER_BARE = 1.01
"""Of the bare denoiser's time, what an all-compute table may take."""

SAME = 0.05
"""How far a table's error may be from the CPU's, relatively."""

Found = dict[str, Any]


@dataclass(frozen=True)
class Part:
    """What a part is given.

    Args:
        device: Where to run.
        tiny: Whether all is tiny.
        path: Where what it has found so far is kept.
    """

    device: torch.device
    tiny: bool
    path: Path

    @property
    def steps(self) -> int:
        """Of a loop."""
        return 4 if self.tiny else 8

    @property
    def rounds(self) -> int:
        """Of paired timings."""
        return 2 if self.tiny else 8

    @property
    def options(self) -> dict[str, Any]:
        """Of `torch.compile`."""
        return {"backend": "eager"} if self.tiny else {}

    @property
    def pipeline(self) -> str:
        """Of the zoo, to learn from."""
        return "ddpm-emoji" if self.tiny else "dit-emoji"

    def tell(self, found: Found) -> None:
        """Keep what has been found so far."""
        write_whole(self.path, json.dumps(found))

    def timed(self, run: Callable[[], Any]) -> Callable[[], Any]:
        """A function that returns when the device is done."""
        clock = Clock(self.device)

        def wait() -> None:
            run()
            clock.now()

        return wait

    def seconds(self, run: Callable[[], Any]) -> float:
        """How long a function takes, the device's work included."""
        clock = Clock(self.device)
        started = clock.now()
        run()
        return clock.now() - started


def tables(loop: Loop) -> dict[str, MaskSchedule]:
    """All computed; every other step with Taylor's first order; single cells of a half, over all steps and blocks."""
    run = stepmask.record(loop.denoiser, run=loop)
    graph = stepmask.trace(loop.denoiser, run, granularity="block", prove=False)
    alone = SamplerFingerprint("", (0.0,) * loop.steps)  # the same timestep at every step: none is compared
    full = MaskSchedule.all_compute(graph, run.denoiser, alone)
    scores = np.random.default_rng(0).random(full.rows.shape)
    scores[:, -1] = np.inf
    return {
        "all computed": full,
        "interval 2, Taylor 1": fixed_interval(full, 0.5, order=1),
        "single cells": round_scores(scores, full, Budget(macs=0.5), max_age=loop.steps),
    }


def overhead(part: Part) -> Found:
    """An all-compute table over the bare denoiser, in turns, and whether it changes nothing."""
    told = RANDOM_DENOISERS["Stable Diffusion 1.5, 512"]
    loop = Loop(told, part.device, torch.bfloat16, part.steps, part.tiny)
    full = tables(loop)["all computed"]
    handles: list[Any] = []

    def put() -> None:
        handles.append(stepmask.apply(loop.denoiser, full))

    ratio = paired_ratio(
        part.timed(loop), part.timed(loop), 2 * part.rounds, before_b=put, after_b=lambda: handles.pop().remove()
    )
    bare = loop()
    with stepmask.apply(loop.denoiser, full):
        return {"over_bare": ratio, "bitwise_equal": torch.equal(loop(), bare)}


def large(name: str, part: Part) -> Found:
    """Speed-ups over the bare denoiser and stores of one architecture: eager first, then compiled."""
    loop = Loop(RANDOM_DENOISERS[name], part.device, torch.bfloat16, part.steps, part.tiny)
    ours = tables(loop)
    del ours["all computed"]
    found: Found = {"bare_ms_per_evaluation": 1000 * part.seconds(loop) / loop.steps}
    found["eager"] = {label: speedup(part, loop, table, part.rounds // 2) for label, table in ours.items()}
    part.tell(found)

    found["CUDA graphs"] = graphs_refused(loop, ours["single cells"])
    for region in repeated_regions(loop.denoiser, list(ours["single cells"].graph.names[:-1])):
        modules_by_name(loop.denoiser)[region].compile(**part.options)
    found["compiling_s"] = part.seconds(loop)
    found["bare_compiled_ms_per_evaluation"] = 1000 * part.seconds(loop) / loop.steps
    part.tell(found)
    found["compiled, over compiled"] = {}
    for label, table in ours.items():
        found["compiled, over compiled"][label] = speedup(part, loop, table, part.rounds // 2, compiles=True)
        part.tell(found)
    eager, compiled = found["bare_ms_per_evaluation"], found["bare_compiled_ms_per_evaluation"]
    return {**found, "bare compiled, over eager": eager / compiled}


def speedup(part: Part, loop: Loop, table: MaskSchedule, rounds: int, *, compiles: bool = False) -> Found:
    """The bare loop's time over the masked one's, by turns, beside what the MACs promise; and the store."""

    def masked(*, compiles: bool = False) -> float:
        with stepmask.apply(loop.denoiser, table) as handle:
            if compiles:
                handle.compile(**part.options)
            seconds = part.seconds(loop)
            stores.append(handle.peak_store_bytes)
        return seconds

    stores: list[int] = []
    started = time.perf_counter()
    masked(compiles=compiles)  # warms up; what is compiled stays so
    warm = time.perf_counter() - started
    part.seconds(loop)
    turns = [part.seconds(loop) / masked() for _ in range(max(rounds, 2))]
    return {
        "macs": lower(table).macs_share,
        "speedup": median(turns),
        "slowest": min(turns),
        "fastest": max(turns),
        "over_promise": median(turns) * lower(table).macs_share,
        "store_bytes": max(stores),
        "first_s": warm,
    }


def graphs_refused(loop: Loop, table: MaskSchedule) -> str:
    """Why masks do not run in CUDA graphs here."""
    if loop.latent.device.type != "cuda":
        return "no CUDA"
    with stepmask.apply(loop.denoiser, table) as handle:
        try:
            handle.compile(mode="reduce-overhead")
        except RunError as error:
            return str(error)
    return "not refused, and not measured"


def learned_tables(part: Part) -> Found:
    """Errors of the zoo's learned tables on the device, beside those of the same samples on the CPU."""
    found: Found = {}
    for name in [part.pipeline] if part.tiny else zoo.names():
        table = MaskSchedule.from_pretrained(SCHEDULES / name / "20-0.5")
        here, there = (errors_on(name, table, place, 1 if part.tiny else 4) for place in ("cpu", part.device))
        found[name] = {"cpu": here, "device": there, "off_by": abs(there / here - 1)}
        part.tell(found)
    return found


def errors_on(name: str, table: MaskSchedule, device: torch.device | str, samples: int) -> float:
    """The mean of a table's latent errors; noise is drawn on the CPU wherever the pipeline is."""
    setting = Setting(f"zoo:{name}", table.steps)
    setting.pipe.to(device)
    return fmean(by_sample(setting.record(samples, 1, held_out=True), table))


def learning(part: Part) -> Found:
    """Learning a table: seconds, the memory that came on top, and what it gains."""
    samples, passes, steps = (1, 0.1, 4) if part.tiny else (SAMPLES, 4, 20)
    setting = Setting(f"zoo:{part.pipeline}", steps)
    setting.pipe.to(part.device)
    runs = [setting.record(samples, seed) for seed in range(100, 101 if part.tiny else 102)]
    held_out = setting.record(samples, 1, held_out=True)
    regular = fixed_interval(setting.full, 0.5, order=1)
    found: Found = {"reference_sampling_s": part.seconds(lambda: setting.record(samples, 99)), "samples": samples}
    found["pipeline"] = part.pipeline
    part.tell(found)
    with peak_memory(part.device) as peak:
        started = time.perf_counter()
        table = stepmask.learn(setting.pipe, runs, setting.budget(0.5), learner=TrainedForecasts(passes=passes))
        found["seconds"] = time.perf_counter() - started
    found["peak_bytes"] = peak.grown
    found["error"], found["interval's"] = (fmean(by_sample(held_out, each)) for each in (table, regular))
    return found


PARTS: dict[str, tuple[float, Callable[[Part], Found]]] = {
    "overhead": (40, overhead),
    "learned tables": (60, learned_tables),
    "learning": (80, learning),
    **{name: (70, partial(large, name)) for name in RANDOM_DENOISERS},
}
"""Seconds that each part may take, and what it does: 460 seconds together."""


def run_part(name: str, part: Part) -> None:
    """One part, in a process of its own; an error is a result, too."""
    torch.set_num_threads(torch.get_num_threads() if part.device.type != "cpu" else 1)
    diffusers.utils.logging.set_verbosity_error()
    try:
        found = PARTS[name][1](part)
    except Exception as error:  # the other parts go on
        traceback.print_exc()
        before = json.loads(part.path.read_text()) if part.path.exists() else {}
        found = {**before, "failed": f"{type(error).__name__}: {error}"}
    part.tell(found)


def results(device: torch.device, tiny: bool, asked: list[str]) -> Iterator[tuple[str, Found]]:
    """What each part found, and a note where its time was over."""
    context = multiprocessing.get_context("fork")  # with all modules loaded, and no device touched yet
    with tempfile.TemporaryDirectory() as folder:
        for number, name in enumerate(asked):
            part, limit = Part(device, tiny, Path(folder) / f"{number}.json"), PARTS[name][0]
            started = time.perf_counter()
            process = context.Process(target=run_part, args=(name, part))
            process.start()
            process.join(limit)
            note = {}
            if process.is_alive():
                process.kill()
                process.join()
                note = {"skipped": f"the rest: {limit:g} seconds were over"}
            elif process.exitcode:
                note = {"failed": f"the process ended with {process.exitcode}"}
            found = json.loads(part.path.read_text()) if part.path.exists() else {}
            print(f"{name}: {time.perf_counter() - started:.0f} s", flush=True)
            yield name, {**found, **note, "part_s": time.perf_counter() - started}


def met(found: dict[str, Found]) -> bool:
    """Whether all parts finished, masks are as good as free, and tables are as exact as on the CPU."""
    if any("skipped" in part or "failed" in part for part in found.values()):
        return False
    free = found["overhead"]["bitwise_equal"] and found["overhead"]["over_bare"]["median"] <= MOST_OVER_BARE
    exact = [each["off_by"] <= SAME for each in found["learned tables"].values() if isinstance(each, dict)]
    return bool(free) and all(exact)


def commit() -> str | None:
    """Of this repository, where it is one."""
    told = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    asked = subprocess.run(told, capture_output=True, text=True, check=False)
    return asked.stdout.strip() or None


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--tiny", action="store_true", help="everything tiny, on the CPU")
    arguments.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    arguments.add_argument("--device", default="cuda")
    arguments.add_argument("--out", type=Path, help="a JSON file; results/gpu.json unless tiny")
    arguments.add_argument("--commit", default=commit(), help="if this is no clone")
    asked = arguments.parse_args()
    device = torch.device("cpu" if asked.tiny else asked.device)
    out = asked.out or (None if asked.tiny else FOLDER / "gpu.json")
    found = dict(results(device, asked.tiny, asked.parts))
    result = {
        "what": "tiny denoisers on the CPU" if asked.tiny else "random weights in bfloat16; the zoo in float32",
        "parts": found,
        "goal": f"all computed at most {MOST_OVER_BARE} and bitwise equal; errors of learned tables within {SAME:g} "
        "of the CPU's, relatively; every part within its time",
        "met": set(found) == set(PARTS) and met(found),
        "machine": machine(device),
        "commit": asked.commit,
    }
    print(json.dumps(result, indent=1))
    if out is not None:
        write_whole(out, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
