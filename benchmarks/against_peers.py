"""stepmask against the caches that a user would install, each tuned over its own knobs, at equal measured time.

What is learned at shares of the MACs comes from `frontier.py`, which leaves its tables in results/schedules; tables at
shares of the measured time are learned here and left there, too. Every peer is tuned on calibration seeds; its settings
that are best there for their time are measured on held-out seeds, all in one run. `--again` measures them with the
settings that were found before: new tables beside them, or more samples. Peers that are named there are tuned anew.
"""

import argparse
import csv
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import geometric_mean
from typing import Any

import numpy as np

import stepmask
from frontier import SCHEDULES, paper
from peers import PEERS, CannotRun, Peer
from results import FOLDER, save, table
from rules import SmoothCache, learning_to_cache
from setting import Setting, by_sample, name_of, timed
from stepmask import Budget, MaskSchedule, Trajectory, zoo
from stepmask.denoiser.sampling import Sampling
from stepmask.drawing import blank
from stepmask.drawing import save as save_figure
from stepmask.evaluation.compare import evaluate
from stepmask.evaluation.measure import machine
from stepmask.evaluation.metrics import latent_errors
from stepmask.learning.learn import Learner
from stepmask.learning.trained import TrainedForecasts
from stepmask.progress import progress
from stepmask.schedule.rectify import lower

RUNS = Path("runs") / "peers"

TUNED_ON = 8
"""Calibration samples."""

BATCH = 16
"""Held-out samples at once."""

EXACT = 1e-12
"""Errors below are rounding: nothing was skipped."""

MOST = 7
"""Settings of one peer that are measured on held-out samples."""

DEAREST = 0.8
"""Of the reference's time on the calibration samples, which such a setting takes at most: what lies far above the
shares says little there, for errors between two settings are interpolated."""

SHARES = (0.6, 0.5, 0.42, 0.35, 0.3, 0.25)
"""Of the reference's measured time, where errors are compared."""

GOAL = 0.6
"""Our error over the best other's, at most."""

MEAN, TYPICAL = "error", "geometric_error"
"""Columns of errors: one hard sample of a few makes a mean, and does not make a geometric mean."""

RATIOS = (
    "Latent error of stepmask over the best other's, at shares of the reference's measured time, mean of all samples:"
)
TYPICAL_RATIOS = "The same of geometric means, which one hard sample does not make:"

HEAD = ["", *(f"{share:g}" for share in SHARES)]
"""Of every table of errors."""

SMOOTH = (0.02, 0.04, 0.06, 0.08, 0.12, 0.16, 0.24, 0.32, 0.48, 0.64, 0.9)
PRICES = (0.003, 0.01, 0.03, 0.1, 1.0)

COSTS = {"time": "measured time of the denoiser", "macs": "MACs"}
"""By column, what people call them."""

BEYOND = "where all settings of a method are cheaper, that of its dearest"

STYLES = [{"linewidth": 1, "linestyle": line, "color": f"C{colour}"} for line in ("-", "--") for colour in range(10)]
"""Of lines, so that no two methods look alike."""

OURS, PAPER, PER_TIMESTEP = "stepmask", "stepmask, per timestep", "per-timestep"
LEARNED = (OURS, PAPER)
FEWER, SMOOTHCACHE, LEARNING_TO_CACHE = "fewer steps", "SmoothCache", "Learning-to-Cache"

Row = dict[str, Any]
"""Of the CSV file: one setting of one method on held-out samples."""

WORDS = ("pipeline", "method", "setting")
"""Columns that are no numbers."""


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
            return learning_to_cache(self.reference, self.full, float(setting))
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
        tables = {price: learning_to_cache(self.reference, self.full, price) for price in PRICES}
        return [self.table(f"{LEARNING_TO_CACHE}: {price:g}", table) for price, table in tables.items()]

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
            self.leave(f"time-{share:g}", share, TrainedForecasts(), lambda: self.runs)
            self.leave(f"{PER_TIMESTEP}-time-{share:g}", share, paper(share), lambda: [self.record(4, 0)])

    def leave(self, name: str, share: float, learner: Learner, runs: Callable[[], list[Trajectory]]) -> None:
        """A table at a share of the time in results/schedules, where it stays."""
        folder = SCHEDULES / name_of(self.pipeline) / f"{self.steps}-{name}"
        if not folder.exists():
            kept = RUNS / f"{name_of(self.pipeline)}-{folder.name}"
            schedule = stepmask.learn(self.pipe, runs(), Budget(time=share), learner=learner, folder=kept)
            schedule.save_pretrained(folder)

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
    places = np.unique(np.linspace(0, len(kept) - 1, min(MOST, len(kept))).round().astype(int)) if kept else []
    return [kept[place] for place in places]


def at_cost(points: Sequence[tuple[float, float]], share: float) -> float | None:
    """The error at a share of the reference's cost: on the lower envelope of (cost, error), log error linear in cost.

    `None` below the cheapest; the dearest's where all are cheaper.
    """
    envelope: list[tuple[float, float]] = []
    for cost, error in sorted(points):
        if not envelope or error < envelope[-1][1]:
            envelope.append((cost, error))
    if not envelope or share < envelope[0][0]:
        return None
    costs, logs = [cost for cost, _ in envelope], [np.log(error) for _, error in envelope]
    return float(np.exp(np.interp(share, costs, logs)))


def rows(
    race: Race, learned: Mapping[str, MaskSchedule], rivals: Mapping[str, Any], batches: int, repeats: int
) -> Iterator[Row]:
    """Everything measured on held-out samples in one run; times are of the first batch."""
    first, *others = learned.items()
    call, seeds = race.call(BATCH, 1, held_out=True), range(1, 1 + batches)
    report = evaluate(race.pipe, first[1], rivals={**dict(others), **rivals}, repeats=repeats, seed=seeds, **call)
    for row in report.rows[1:]:
        method, _, setting = (first[0] if row.name == "schedule" else row.name).partition(": ")
        speed, slowest, fastest = report.speedup(row.name)
        yield {
            "pipeline": race.pipeline,
            "steps": race.steps,
            "method": method,
            "setting": setting,
            "macs": row.macs_executed,
            "time": 1 / speed,
            "speedup": speed,
            "speedup_low": slowest,
            "speedup_high": fastest,
            "error": row.latent_error,
            "geometric_error": typical(row.latent_errors),
        }


Errors = Mapping[str, Mapping[float, float | None]]
"""By method and share of a cost."""


def at_equal(cost: str, found: Sequence[Row], error: str = MEAN) -> Errors:
    """Errors, of a column that says what of all samples, of every method at the shares of a cost, "time" or "macs"."""
    methods = sorted({row["method"] for row in found})
    curves = {name: [(row[cost], row[error]) for row in found if row["method"] == name] for name in methods}
    return {name: {share: at_cost(curve, share) for share in SHARES} for name, curve in curves.items()}


def best_other(errors: Errors, share: float) -> tuple[str, float] | None:
    """The best of all methods but our two learners at a share, and its error; `None` where nobody gets so far."""
    others = {name: found[share] for name, found in errors.items() if name not in LEARNED}
    reached = [(name, error) for name, error in others.items() if error is not None]
    return min(reached, key=lambda other: other[1], default=None)


def over_the_best(errors: Errors) -> dict[float, float]:
    """Our error over that of the best other method, at the shares that both reach."""
    ratios = {}
    for share in SHARES:
        ours, other = errors[OURS][share], best_other(errors, share)
        if ours is not None and other is not None:
            ratios[share] = ours / other[1]
    return ratios


def markdown(race: Race, errors_by_cost: Mapping[str, Errors], told: str) -> str:
    """Both comparisons as tables for people, with what they were measured by and who could not run."""
    parts = [f"# {race.pipeline}, {race.steps} steps", told]
    for cost, errors in errors_by_cost.items():
        lines = [[name, *(_short(at[share]) for share in SHARES)] for name, at in errors.items()]
        lines.append(["stepmask over the best other", *_judged(over_the_best(errors))])
        parts += [f"Latent error (mean) at shares of the reference's {COSTS[cost]}; {BEYOND}:", table([HEAD, *lines])]
    if race.absent:
        parts += ["Not run:", "\n".join(f"- {name}: {why}" for name, why in race.absent.items())]
    return "\n\n".join(parts) + "\n"


def overview() -> str:
    """All results for people: ratios at equal time; then in a cell ours / the best other's error, by either cost."""
    parts = ["# stepmask beside other caches", RATIOS, headlines(), TYPICAL_RATIOS, headlines(TYPICAL)]
    parts.append("Latent error (mean) of stepmask / of the best other.")
    for cost, name in COSTS.items():
        found = {case: at_equal(cost, read(*case)) for case in cases()}
        lines = [[title(case), *(_beside(errors, share) for share in SHARES)] for case, errors in found.items()]
        parts += [f"At shares of the reference's {name}:", table([HEAD, *lines])]
    pages = ", ".join(f"[{pipeline}, {steps} steps]({results(pipeline, steps).stem}.md)" for pipeline, steps in cases())
    return "\n\n".join([*parts, f"All methods, machines, settings and who could not run: {pages}."]) + "\n"


def headlines(error: str = MEAN) -> str:
    """Our error over the best other's at equal measured time, the goal's misses in bold, as README has it, too."""
    found = {case: over_the_best(at_equal("time", read(*case), error)) for case in cases()}
    return table([HEAD, *([title(case), *_judged(ratios)] for case, ratios in found.items())])


def cases() -> list[tuple[str, int]]:
    """Pipelines and numbers of steps that were measured."""
    known = [(f"zoo:{name}", steps) for steps in (20, 50) for name in zoo.names()]
    return [case for case in known if results(*case).exists()]


def title(case: tuple[str, int]) -> str:
    """A pipeline and number of steps, for people."""
    return f"`{case[0]}`, {case[1]} steps"


def _judged(ratios: Mapping[float, float]) -> list[str]:
    words = {share: f"{ratio:.2f}" if ratio <= GOAL else f"**{ratio:.2f}**" for share, ratio in ratios.items()}
    return [words.get(share, "–") for share in SHARES]


def _beside(errors: Errors, share: float) -> str:
    ours, other = errors[OURS][share], best_other(errors, share)
    if ours is None or other is None:
        return "–"
    name, error = other
    return f"{_short(ours)} / {_short(error)} {name.split(' (')[0]}"


def plot(found: Sequence[Row], path: Path) -> None:
    figure = blank(14.0, 5.0)
    axes = figure.subplots(1, 2)
    for axis, key, label in zip(axes, ("speedup", "macs"), ("denoiser speed-up", "share of MACs"), strict=True):
        for index, method in enumerate(sorted({row["method"] for row in found})):
            points = sorted((row[key], row["error"]) for row in found if row["method"] == method)
            style = {"linewidth": 2.5, "color": "black"} if method == OURS else STYLES[index % len(STYLES)]
            axis.plot(*zip(*points, strict=True), marker="o", markersize=4, label=method, **style)
        axis.set(yscale="log", xlabel=label, ylabel="latent error")
    axes[1].legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.02, 1.0), frameon=False)
    figure.suptitle(f"{found[0]['pipeline']}, {found[0]['steps']} steps")
    save_figure(figure, path)


def results(pipeline: str, steps: int, ending: str = "csv") -> Path:
    """Where all rows lie, and beside them what they come to."""
    return FOLDER / f"peers-{name_of(pipeline)}-{steps}.{ending}"


def read(pipeline: str, steps: int) -> list[Row]:
    """All rows, as they were measured."""
    with results(pipeline, steps).open(newline="") as file:
        return [
            {key: value if key in WORDS else float(value) for key, value in row.items()} | {"steps": steps}
            for row in csv.DictReader(file)
        ]


def publish(race: Race, found: Sequence[Row], what: str) -> None:
    """Everything as CSV, the comparison as a picture, for people and with its goal."""
    case = race.pipeline, race.steps
    with results(*case).open("w", newline="") as file:
        writer = csv.DictWriter(file, found[0])
        writer.writeheader()
        writer.writerows(found)
    plot(found, results(*case, "png"))
    command = f"`benchmarks/against_peers.py --pipeline {race.pipeline} --steps {race.steps}`"
    here = ", ".join(f"{key} {value}" for key, value in machine().items())
    errors = {cost: at_equal(cost, found) for cost in COSTS}
    results(*case, "md").write_text(markdown(race, errors, f"{command}: {what}; {here}."))
    (FOLDER / "peers.md").write_text(overview())
    by_time, by_macs = map(over_the_best, errors.values())
    save(
        results(*case).stem,
        {"what": what, "over_the_best_at_equal_time": by_time, "at_equal_macs": by_macs, "absent": race.absent},
        goal=f"at most {GOAL} of the best peer's error at equal measured time",
        met=all(ratio <= GOAL for ratio in by_time.values()) and by_time.keys() == set(SHARES),
    )


def _counts(steps: int) -> list[int]:
    return sorted({round(share * steps) for share in (0.75, 0.6, 0.5, 0.42, 0.35, 0.3, 0.25, 0.2)})


def _short(error: float | None) -> str:
    return "–" if error is None else f"{error:.2g}"


def _spelled(knobs: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in knobs.items())


def compare(race: Race, rivals: Mapping[str, Any], batches: int, repeats: int) -> None:
    """What was learned and all others, in one run."""
    found = list(rows(race, race.learned(), rivals, batches, repeats))
    publish(race, found, f"{batches * BATCH} held-out samples, times of {BATCH} at once in {repeats} turns")


def found_before(race: Race, anew: Sequence[str]) -> dict[str, Any]:
    """All others by name, with the settings of their rows; but some peers are tuned anew."""
    said = json.loads(results(race.pipeline, race.steps, "json").read_text())
    race.absent = {name: why for name, why in said["absent"].items() if name.partition(":")[0] not in anew}
    measured = [(row["method"], row["setting"]) for row in read(race.pipeline, race.steps)]
    kept = [(name, setting) for name, setting in measured if name not in (*LEARNED, *anew)]
    settled = {f"{name}: {setting}": race.contender(name, setting) for name, setting in kept}
    return {**settled, **race.peers([peer for peer in PEERS if peer.name in anew])}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--pipeline", default="zoo:dit-emoji")
    arguments.add_argument("--steps", type=int, default=20)
    arguments.add_argument("--batches", type=int, default=2, help=f"of {BATCH} held-out samples")
    arguments.add_argument("--repeats", type=int, default=3)
    arguments.add_argument(
        "--shares", type=float, nargs="*", default=[0.6, 0.42, 0.3, 0.25], help="of the time, to learn"
    )
    arguments.add_argument("--again", nargs="*", metavar="PEER", help="settings as before, but for these peers")
    asked = arguments.parse_args()
    logging.disable(logging.WARNING)  # cache-dit says eight lines for each setting
    race = Race(asked.pipeline, asked.steps)
    race.learn(asked.shares)
    rivals = race.contenders() if asked.again is None else found_before(race, asked.again)
    compare(race, rivals, asked.batches, asked.repeats)


if __name__ == "__main__":
    main()
