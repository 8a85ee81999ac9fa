"""`Report`: measured numbers, the machine they were measured on, as JSON and as text."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from html import escape
from pathlib import Path
from statistics import fmean, median
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from stepmask.errors import InvalidReport
from stepmask.files import as_path, write_whole
from stepmask.schedule.schedule import MaskSchedule
from stepmask.text import printable, shortened

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from stepmask.learning.profile import Profile

HEADS = ("", "MACs", "latent error", "PSNR", "SSIM", "denoiser", "speed-up", "pipeline", "store")


@dataclass(frozen=True)
class Row:
    """One way of sampling, measured.

    Args:
        name: What it is.
        evaluations: Calls of the denoiser.
        macs_planned: MACs of its plan over those of the reference.
        macs_executed: MACs of the blocks that ran over those of the reference, counted in the run.
        latent_errors: ‖x_0 − x_0 ref‖² / ‖x_0 ref‖² of each sample.
        psnr_db: Of each image against the reference's.
        ssim: Of each image against the reference's.
        denoiser_ms: Time in the denoiser, of each timed run.
        pipeline_ms: Time of the whole pipeline, of each timed run.
        store_bytes: Largest size of the store, measured.
        peak_bytes: Largest memory of the process (CPU) or of torch (CUDA) during a run.
        path_errors: As the mean of `latent_errors`, but of the latents after each step; none where steps differ from
            the reference's.
    """

    name: str
    evaluations: int
    macs_planned: float
    macs_executed: float
    latent_errors: Sequence[float]
    psnr_db: Sequence[float]
    ssim: Sequence[float]
    denoiser_ms: Sequence[float]
    pipeline_ms: Sequence[float]
    store_bytes: int
    peak_bytes: int | None
    path_errors: Sequence[float] = ()

    @property
    def latent_error(self) -> float:
        """Mean over samples."""
        return fmean(self.latent_errors)


@dataclass(frozen=True, eq=False)
class Report:
    """What a schedule is worth, next to the reference and its rivals.

    Args:
        rows: The reference first, then the schedule, then the rivals.
        setting: Arguments of the pipeline, seed, repeats; the denoiser's device and dtype.
        machine: Processor, threads and versions.
        images: Pictures of each row by name, (N, H, W, C) in [0, 1]; not saved with the numbers.
        schedule: The schedule that was measured; not saved with the numbers.
    """

    rows: Sequence[Row]
    setting: Mapping[str, Any]
    machine: Mapping[str, Any]
    images: Mapping[str, npt.NDArray[np.float32]] = field(default_factory=dict, repr=False)
    schedule: MaskSchedule | None = field(default=None, repr=False)

    def __getitem__(self, name: str) -> Row:
        return {row.name: row for row in self.rows}[name]

    def speedup(self, name: str, *, of: str = "denoiser") -> tuple[float, float, float]:
        """Time of the reference over that of a row, run by run: median, smallest and largest ratio.

        Args:
            name: The row.
            of: "denoiser" or "pipeline".
        """
        pairs = zip(getattr(self.rows[0], f"{of}_ms"), getattr(self[name], f"{of}_ms"), strict=True)
        ratios = [full / masked for full, masked in pairs]
        return median(ratios), min(ratios), max(ratios)

    def to_json(self) -> str:
        """All numbers as JSON."""
        rows = [asdict(row) for row in self.rows]
        return json.dumps({"rows": rows, "setting": self.setting, "machine": self.machine}, indent=1, default=str)

    def save(self, path: str | bytes | Path, *, profile: "Profile | None" = None, command: str = "") -> Path:
        """Write it: as JSON to a path that ends in .json, as one self-contained page to .html, as text to any other.

        Args:
            path: Where to.
            profile: Of a sweep of the same pipeline; the page shows what it predicts.
            command: The command line behind the report; the page shows it.

        Raises:
            UnwritablePath: The path cannot be written.
            MissingExtra: A page, and jinja2 or matplotlib is not installed.
            ScheduleMismatch: A page with a profile of another pipeline.
            InvalidSchedule: A page with a profile that does not know values as old as the schedule reuses.
        """
        path = as_path(path)
        if path.suffix == ".html":
            from stepmask.evaluation.page import render

            return write_whole(path, render(self, profile=profile, command=command))
        return write_whole(path, self.to_json() if path.suffix == ".json" else f"{self}\n")

    def plot(self) -> "Figure":
        """Latent error against MACs and against measured speed, a point a row, as a matplotlib figure.

        Raises:
            MissingExtra: matplotlib is not installed.
        """
        from stepmask.evaluation.plots import frontier

        return frontier(self)

    def _repr_html_(self) -> str:
        """The rows as a table, as a notebook shows it."""
        lines = ["".join(f"<td>{escape(cell)}</td>" for cell in line) for line in self.table()]
        return f"<table>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"

    @classmethod
    def load(cls, path: str | bytes | Path) -> "Report":
        """The numbers of a report that was saved as JSON; pictures and schedule are not in it.

        Raises:
            InvalidReport: The file cannot be read, or is no report.
        """
        path = as_path(path)
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            report = cls([Row(**row) for row in data["rows"]], data["setting"], data["machine"])
            f"{report}{report.rows[1].macs_planned:g}"  # everything that is read of it is there, and what it should be
        except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
            raise InvalidReport(
                given=f"{path}: {type(error).__name__}: {shortened(str(error))}",
                expected="the JSON of a report of the reference and a schedule",
                advice="Write one with report.save('report.json') or stepmask evaluate --report report.json",
            ) from error
        return report

    def table(self) -> list[tuple[str, ...]]:
        """What is measured of each way of sampling, as text, under a line of heads."""
        return [HEADS, *(self._cells(row) for row in self.rows)]

    @property
    def facts(self) -> str:
        """What it was measured with and on, a line each."""
        known = ", ".join(f"{key} {value}" for key, value in self.machine.items() if value is not None)
        return f"{printable(str(self.setting))}\n{printable(known)}"

    def __str__(self) -> str:
        lines = self.table()
        widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
        table = "\n".join("  ".join(_padded(line, widths)).rstrip() for line in lines)
        return f"{table}\n\n{self.facts}"

    def _cells(self, row: Row) -> tuple[str, ...]:
        middle, low, high = self.speedup(row.name)
        whole = self.speedup(row.name, of="pipeline")[0]
        return (
            printable(row.name),
            f"{row.macs_executed:.3f}",
            f"{row.latent_error:.2e}",
            f"{fmean(row.psnr_db):.1f} dB" if row.psnr_db else "–",
            f"{fmean(row.ssim):.3f}" if row.ssim else "–",
            f"{median(row.denoiser_ms):.0f} ms",
            f"{middle:.2f}× ({low:.2f}–{high:.2f})" if len(row.denoiser_ms) > 1 else f"{middle:.2f}×",
            f"{whole:.2f}×",
            f"{row.store_bytes / 2**20:.1f} MiB",
        )


def _padded(line: Sequence[str], widths: Sequence[int]) -> list[str]:
    first, *rest = zip(line, widths, strict=True)
    return [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in rest)]
