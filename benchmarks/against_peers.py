"""stepmask against the caches that a user would install, each tuned over its own knobs, at equal measured time.

What is learned at shares of the MACs comes from `frontier.py`, which leaves its tables in results/schedules; tables at
shares of the measured time are learned here and left there, too. Every peer is tuned on calibration seeds; its settings
that are best there for their time are measured on held-out seeds, all in one run. `--again` measures them with the
settings that were found before: new tables beside them, or more samples. Peers that are named there are tuned anew.
"""

import argparse
import json
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from equal_cost import (
    COSTS,
    GOAL,
    SHARES,
    STEADY,
    at_equal,
    markdown,
    over_the_best,
    overview,
    pace,
    plot,
    read,
    results,
)
from peers import PEERS
from race import LEARNED, Race, typical
from results import FOLDER, Row, save, write_rows
from stepmask import MaskSchedule
from stepmask.evaluation.compare import evaluate
from stepmask.evaluation.measure import machine

BATCH = 16
"""Held-out samples at once."""


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


def publish(race: Race, found: Sequence[Row], what: str) -> None:
    """Everything as CSV, the comparison as a picture, for people and with its goal."""
    case = race.pipeline, race.steps
    write_rows(results(*case), found)
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


def compare(race: Race, rivals: Mapping[str, Any], batches: int, repeats: int) -> None:
    """What was learned and all others, in one run; nothing is published of a run that was disturbed."""
    found = list(rows(race, race.learned(), rivals, batches, repeats))
    if abs(pace(found) - 1) > STEADY:
        sys.exit(f"Fewer steps took {pace(found):.2f} of their share of the time: measure on a quieter machine")
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
