"""`Outcome`: what a reproduced recipe measured, beside what others published."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from stepmask.reproduction.recipe import Published, Recipe


@dataclass(frozen=True)
class Row:
    """One way of sampling.

    Args:
        name: "reference", or "budget" and its share.
        macs: Of the plan over those of the reference.
        speedup: Time of the reference in the denoiser over that of this row, the median over batches.
        metrics: Numbers by name; none for what is itself compared with.
    """

    name: str
    macs: float
    speedup: float
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class Outcome:
    """The measured rows of a recipe.

    Args:
        recipe: The recipe as it was run.
        measure: Name of the network that saw the pictures.
        real: Whether they were compared with real pictures, or else with the reference's samples of the same seeds.
        rows: The reference first.
        floor: What the measure says of two halves of that set; nothing where only its statistics are known.
        machine: What it ran on.
    """

    recipe: Recipe
    measure: str
    real: bool
    rows: Sequence[Row]
    floor: Mapping[str, float]
    machine: Mapping[str, Any]

    def to_json(self) -> str:
        """All numbers as JSON."""
        return json.dumps(asdict(self), indent=1, default=str)

    def __str__(self) -> str:
        metrics = list(dict.fromkeys(name for found in self._all_metrics() for name in found))
        lines = [["", "MACs", "speed-up", *metrics, "source"]]
        for row in self.rows:
            lines.append(
                [row.name, f"{row.macs:.3f}", f"{row.speedup:.2f}×", *_cells(row.metrics, metrics), "measured"]
            )
        if self.floor:
            lines.append(["floor: halves of it", "", "", *_cells(self.floor, metrics), "measured"])
        for other in self.recipe.published:
            lines.append([_named(other), *_cost(other), *_cells(other.metrics, metrics), _source(other)])
        widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
        table = "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines
        )
        return "\n".join(line.rstrip() for line in f"{self._title()}\n\n{table}\n\n{self.recipe.notes}".splitlines())

    def _all_metrics(self) -> list[Mapping[str, float]]:
        return [*(row.metrics for row in self.rows), self.floor, *(other.metrics for other in self.recipe.published)]

    def _title(self) -> str:
        told, sampler = self.recipe, self.recipe.sampler
        against = "the reference pictures" if self.real else "the reference's samples of the same seeds"
        return (
            f"{told.title}: {sampler.steps} steps of {sampler.name}, {told.samples.count} samples on {self.measure},"
            f" against {against}.\nPublished: {told.metric.name} ({told.metric.tool}) against {told.metric.reference}."
            " Only equal metrics with equal references and sample counts compare."
        )


def _named(other: Published) -> str:
    return other.method if other.steps is None else f"{other.method}, {other.steps} steps"


def _cost(other: Published) -> list[str]:
    macs = "" if other.macs is None else f"{other.macs:g} G"
    speedup = "" if other.speedup is None else f"{other.speedup:.2f}×"
    return [macs, f"{other.latency_s:g} s" if other.latency_s and not speedup else speedup]


def _source(other: Published) -> str:
    return f"{other.source} (secondary)" if other.secondary else other.source


def _cells(found: Mapping[str, float], metrics: Sequence[str]) -> list[str]:
    return [f"{found[name]:.4g}" if name in found else "" for name in metrics]
