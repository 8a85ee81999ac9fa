"""Errors of all methods at equal cost, from the rows that `against_peers.py` measured, and how they are told."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median

import numpy as np

from race import FEWER, LEARNED, OURS, Race
from results import FOLDER, Row, read_rows, table
from setting import name_of
from stepmask import zoo
from stepmask.drawing import blank
from stepmask.drawing import save as save_figure

SHARES = (0.6, 0.5, 0.42, 0.35, 0.3, 0.25)
"""Of the reference's measured time, where errors are compared."""

GOAL = 0.6
"""Our error over the best other's, at most."""

STEADY = 0.05
"""How far fewer steps may be from their share of the time; further off, the reference was disturbed."""

MEAN, TYPICAL = "error", "geometric_error"
"""Columns of errors: one hard sample of a few makes a mean, and does not make a geometric mean."""

RATIOS = (
    "Latent error of stepmask over the best other's, at shares of the reference's measured time, mean of all samples:"
)
TYPICAL_RATIOS = "The same of geometric means, which one hard sample does not make:"

HEAD = ["", *(f"{share:g}" for share in SHARES)]
"""Of every table of errors."""

COSTS = {"time": "measured time of the denoiser", "macs": "MACs"}
"""By column, what people call them."""

BEYOND = "where all settings of a method are cheaper, that of its dearest"

STYLES = [{"linewidth": 1, "linestyle": line, "color": f"C{colour}"} for line in ("-", "--") for colour in range(10)]
"""Of lines, so that no two methods look alike."""


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


Errors = Mapping[str, Mapping[float, float | None]]
"""By method and share of a cost."""


def at_equal(cost: str, found: Sequence[Row], error: str = MEAN) -> Errors:
    """Errors, of a column that says what of all samples, of every method at the shares of a cost, "time" or "macs"."""
    methods = sorted({row["method"] for row in found})
    curves = {name: [(row[cost], row[error]) for row in found if row["method"] == name] for name in methods}
    return {name: {share: at_cost(curve, share) for share in SHARES} for name, curve in curves.items()}


def pace(found: Sequence[Row]) -> float:
    """What fewer steps take over their share of the steps, the median: their evaluations are the reference's own."""
    return median(float(row["time"] / row["macs"]) for row in found if row["method"] == FEWER)


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
    figure.suptitle(f"{found[0]['pipeline']}, {found[0]['steps']:g} steps")
    save_figure(figure, path)


def results(pipeline: str, steps: int, ending: str = "csv") -> Path:
    """Where all rows lie, and beside them what they come to."""
    return FOLDER / f"peers-{name_of(pipeline)}-{steps}.{ending}"


def read(pipeline: str, steps: int) -> list[Row]:
    """All rows, as they were measured."""
    return read_rows(results(pipeline, steps))


def _short(error: float | None) -> str:
    return "–" if error is None else f"{error:.2g}"
