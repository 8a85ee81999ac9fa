"""All methods on one pipeline and number of steps: what was learned, and every peer's best settings."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import geometric_mean
from typing import Any

import numpy as np

import stepmask
from frontier import SCHEDULES, paper
from peers import PEERS, CannotRun, Peer
from results import kept_table
from rules import SmoothCache, learning_to_cache
from setting import Setting, by_sample, name_of, timed
from stepmask import Budget, MaskSchedule, Trajectory, zoo
from stepmask.denoiser.sampling import Sampling
from stepmask.evaluation.metrics import latent_errors
from stepmask.learning.learn import Learner
from stepmask.learning.trained import TrainedForecasts
from stepmask.progress import progress
from stepmask.schedule.rectify import lower

RUNS = Path("runs") / "peers"

TUNED_ON = 8
"""Calibration samples."""

EXACT = 1e-12
"""Errors below are rounding: nothing was skipped."""

MOST = 7
"""Settings of one peer that are measured on held-out samples."""

DEAREST = 0.8
"""Of the reference's time on the calibration samples, which such a setting takes at most: what lies far above the
shares says little there, for errors between two settings are interpolated."""

SMOOTH = (0.02, 0.04, 0.06, 0.08, 0.12, 0.16, 0.24, 0.32, 0.48, 0.64, 0.9)
PRICES = (0.003, 0.01, 0.03, 0.1, 1.0)

OURS, PAPER, PER_TIMESTEP = "stepmask", "stepmask, per timestep", "per-timestep"
LEARNED = (OURS, PAPER)
FEWER, SMOOTHCACHE, LEARNING_TO_CACHE = "fewer steps", "SmoothCache", "Learning-to-Cache"


@dataclass(frozen=True)
class Tried:
    """One setting of one method on the calibration samples: its share of the cost, its error, and what samples so."""

    name: str
    cost: float
    error: float
    contender: Any


class Race(Setting):
    """All methods on one pipeline and number of steps."""

    def __init__(self, pipeline: str, steps: int) -> None:
        super().__init__(pipeline, steps)
        self.pipeline, self.reference = pipeline, self.record(TUNED_ON, 0)
        self.absent: dict[str, str] = {}

    def contenders(self) -> dict[str, Any]:
        """What is measured on held-out samples, by name: "method: setting"."""
        found = {f"{FEWER}: {count}": count for count in _counts(self.steps)}
        return {**found, **self.peers(PEERS), **named(self.smoothcache()), **named(self.learning_to_cache())}

    def peers(self, peers: Sequence[Peer]) -> dict[str, Any]:
        """The best settings of some peers, by name."""
        return {name: contender for peer in peers for name, contender in named(self.tuned(peer)).items()}

    def contender(self, method: str, setting: str) -> Any:
        """What samples by a setting that a row of results names, made anew."""
        if method == FEWER:
            return int(setting)
        if method in LEARNED:
            return MaskSchedule.from_pretrained(SCHEDULES / name_of(self.pipeline) / setting)
        if method == SMOOTHCACHE:
            return self.smooth.table(float(setting))
        if method == LEARNING_TO_CACHE:
            return self.router(float(setting))
        peer = next(peer for peer in PEERS if peer.name == method)
        knobs = next(knobs for knobs in peer.knobs if _spelled(knobs) == setting)
        return peer.put_on(zoo.load(self.pipeline), self.steps, **knobs)

    def tuned(self, peer: Peer) -> list[Tried]:
        """All settings of a peer, on the calibration samples."""
        found = []
        for knobs in progress(peer.knobs, peer.name):
            try:
                found.append(self.tried(peer, knobs))
            except CannotRun as error:
                self.absent[peer.name] = str(error)
                break
            except Exception as error:  # a peer's own failure, whatever it is, is a row of the table
                self.absent[f"{peer.name}: {_spelled(knobs)}"] = f"{type(error).__name__}: {error}".splitlines()[0]
        return found

    def tried(self, peer: Peer, knobs: Mapping[str, Any]) -> Tried:
        """One setting of a peer."""
        pipe = peer.put_on(zoo.load(self.pipeline), self.steps, **knobs)
        sampling = Sampling(pipe, self.reference.sampling.call)
        sampled, seconds = timed(sampling)
        error = typical(latent_errors(sampled.latent, self.reference.sampled.latent))
        return Tried(f"{peer.name}: {_spelled(knobs)}", seconds / self.seconds, error, pipe)

    def smoothcache(self) -> list[Tried]:
        """SmoothCache's rule at several thresholds."""
        return [self.table(f"{SMOOTHCACHE}: {threshold:g}", self.smooth.table(threshold)) for threshold in SMOOTH]

    def learning_to_cache(self) -> list[Tried]:
        """Learning-to-Cache's learner at several prices."""
        return [self.table(f"{LEARNING_TO_CACHE}: {price:g}", self.router(price)) for price in PRICES]

    def router(self, price: float) -> MaskSchedule:
        """What Learning-to-Cache's learner makes of a price, from its folder if it was trained before."""
        folder = RUNS / f"{name_of(self.pipeline)}-{self.steps}-router-{price:g}"
        return kept_table(folder, lambda: learning_to_cache(self.reference, self.full, price))

    def table(self, name: str, table: MaskSchedule) -> Tried:
        """A table; its MACs stand for its time."""
        return Tried(name, lower(table).macs_share, typical(by_sample(self.reference, table)), table)

    def learned(self) -> dict[str, MaskSchedule]:
        """All that was learned for this pipeline and number of steps."""
        folders = sorted((SCHEDULES / name_of(self.pipeline)).glob(f"{self.steps}-*"))
        names = (f"{PAPER if PER_TIMESTEP in folder.name else OURS}: {folder.name}" for folder in folders)
        return {name: MaskSchedule.from_pretrained(folder) for name, folder in zip(names, folders, strict=True)}

    def learn(self, shares: Sequence[float]) -> None:
        """Tables of both learners at shares of the measured time, those that are not there yet."""
        for share in shares:
            self.leave(share, f"time-{share:g}", TrainedForecasts(), lambda: self.runs)
            self.leave(share, f"{PER_TIMESTEP}-time-{share:g}", paper(share), lambda: [self.record(4, 0)])

    def leave(self, share: float, name: str, learner: Learner, runs: Callable[[], list[Trajectory]]) -> None:
        """A table at a share of the time in results/schedules, where it stays."""
        folder = SCHEDULES / name_of(self.pipeline) / f"{self.steps}-{name}"
        kept, budget = RUNS / f"{name_of(self.pipeline)}-{folder.name}", Budget(time=share)
        kept_table(folder, lambda: stepmask.learn(self.pipe, runs(), budget, learner=learner, folder=kept))

    @cached_property
    def seconds(self) -> float:
        """What the reference takes on the calibration samples."""
        return timed(self.reference.sampling)[1]

    @cached_property
    def smooth(self) -> SmoothCache:
        """SmoothCache's rule, calibrated."""
        return SmoothCache(self.reference, self.full)

    @cached_property
    def runs(self) -> list[Trajectory]:
        """What the default learner learns from."""
        return self.calibration(64)


def typical(latent_errors: Sequence[float]) -> float:
    """The geometric mean: one sample does not decide which setting is best."""
    return geometric_mean(max(error, EXACT) for error in latent_errors)


def named(tried: Sequence[Tried]) -> dict[str, Any]:
    """The best settings of a method, by name."""
    return {each.name: each.contender for each in best(tried)}


def best(tried: Sequence[Tried]) -> list[Tried]:
    """The settings that no other beats in both cost and error, at most `MOST`, spread over their costs.

    Those that cost more than `DEAREST` are left out, if there are others.
    """
    kept: list[Tried] = []
    cheap = [each for each in tried if each.cost <= DEAREST] or tried
    for each in sorted(cheap, key=lambda each: each.cost):
        if np.isfinite(each.error) and each.error > 2 * EXACT and (not kept or each.error < kept[-1].error):
            kept.append(each)
    places: list[int] = (
        np.unique(np.linspace(0, len(kept) - 1, min(MOST, len(kept))).round().astype(int)).tolist() if kept else []
    )
    return [kept[place] for place in places]


def _counts(steps: int) -> list[int]:
    return sorted({round(share * steps) for share in (0.75, 0.6, 0.5, 0.42, 0.35, 0.3, 0.25, 0.2)})


def _spelled(knobs: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in knobs.items())
