"""A hub repository's card with the table's picture and with what a report measured."""

from collections.abc import Sequence
from contextlib import suppress
from html import escape

from stepmask.drawing import encoded
from stepmask.errors import InvalidReport, MissingExtra
from stepmask.evaluation.report import Report
from stepmask.hub import Card
from stepmask.schedule.rectify import lower
from stepmask.schedule.schedule import MaskSchedule

PICTURE = "schedule.png"
CAPTION = "Steps from top to bottom, blocks in call order from left to right, and the share of MACs of each step."


def card(
    schedule: MaskSchedule,
    *,
    report: Report | None = None,
    base_model: str | None = None,
    license: str | None = None,
    tags: Sequence[str] = (),
) -> Card:
    """What `push_to_hub` shows of a schedule: its table as a picture, where matplotlib is installed, and a report.

        schedule.push_to_hub("me/dit-20", card=card(schedule, report=report, license="apache-2.0"))

    Args:
        schedule: The schedule that is pushed.
        report: Of `evaluate` with this schedule; `None` = nothing is said of what it is worth.
        base_model: Hub id of the pipeline that it is for; `None` = not told, and the code begins with a pipeline.
        license: Of the schedule, as the hub abbreviates it; `None` = not told.
        tags: By which the hub finds it, besides stepmask's own.

    Raises:
        InvalidReport: The report is of another schedule.
    """
    pictures = _pictures(schedule)
    parts = [f"## The table\n\n![{CAPTION}]({PICTURE})\n\n{CAPTION}"] if pictures else []
    if report is not None:
        _check(report, schedule)
        parts.append(_measured(report))
    return Card(base_model, license, tags, "\n\n".join(parts), pictures)


def _pictures(schedule: MaskSchedule) -> dict[str, bytes]:
    """The heat map as PNG; none without matplotlib."""
    with suppress(MissingExtra):
        return {PICTURE: encoded(schedule.plot(), "png")}
    return {}


def _check(report: Report, schedule: MaskSchedule) -> None:
    """Refuse a report that was not made with the schedule. One read from a file tells by its planned MACs alone."""
    planned, share = report.rows[1].macs_planned, lower(schedule).macs_share
    if abs(planned - share) > 1e-9 or report.schedule not in (None, schedule):
        raise InvalidReport(
            given=f"a report of a schedule that computes {planned:.6f} of the MACs",
            expected=f"one of this schedule, which computes {share:.6f}",
            advice="Measure it with evaluate, and give that report",
        )


def _measured(report: Report) -> str:
    """The report as Markdown."""
    heads, *rows = report.table()
    lines = [heads, ("---",) * len(heads), *rows]
    samples, runs = len(report.rows[1].latent_errors), len(report.rows[1].denoiser_ms)
    return "\n\n".join(
        [
            "## Measured",
            "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines),
            "MACs are those of the blocks that ran, over the reference's; latent error is ‖x_0 − x_0 ref‖² / "
            f"‖x_0 ref‖², the mean of {samples} samples; times are medians of {runs} runs, speed-ups medians "
            "(smallest–largest) of ratios paired run by run.",
            f"```\n{report.facts}\n```",
        ]
    )


def _cell(text: str) -> str:
    """A text as a cell of a Markdown table shows it."""
    return escape(text, quote=False).replace("|", "\\|")
