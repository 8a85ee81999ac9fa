"""`MaskSchedule`: the table of what is computed and what is reused at every step, and its explicit changes."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from stepmask.errors import InvalidSchedule, InvalidScheduleFile, ReuseBeforeCompute, ScheduleMismatch
from stepmask.hub import Card, Source, push
from stepmask.schedule import file
from stepmask.schedule.channels import Channels, checked, reads_of
from stepmask.schedule.course import Course, computed_before
from stepmask.schedule.fingerprint import DenoiserFingerprint, SamplerFingerprint
from stepmask.schedule.forecasts import PLAIN, WINDOW, taylor_forecasts
from stepmask.schedule.graph import BlockGraph, columns_of, span_of
from stepmask.schedule.limits import MAX_CELLS, MAX_STEPS, check_plain, is_number, is_whole
from stepmask.schedule.resample import begun_anew, resample_table, rises
from stepmask.text import told

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False)
class MaskSchedule:
    """One row per step, one column per block; a set bit computes the block, a cleared one answers from the store.

    A cell answers Σ_i weights[i] · (i-th newest computed value). Of a reused cell (1) is plain reuse, (1+κ, −κ) a
    first-order forecast. Of a computed cell the newest value is the one just computed: (1) answers with it, anything
    else is a blend of it with older ones. A cell in `channels` answers each channel c by itself:
    bias[c] + Σ_i w[i, c] · (i-th newest)[..., c]; its weights mean nothing and are kept at plain reuse.

    Args:
        graph: The blocks.
        rows: (steps, blocks), true = compute.
        denoiser: The denoiser it is for.
        sampler: The sampler it is for.
        weights: (steps, blocks, 3); `None` = plain reuse everywhere.
        channels: Per-channel forecasts of reused cells by (step, column): arrays (reads + 1, channels), a row of
            weights per stored value, newest first, then the biases. A value's channels lie along its second dimension
            in 4-D and 5-D, else along its last.
        provenance: Where it comes from: plain JSON values, not interpreted.

    Raises:
        InvalidSchedule: Shapes disagree with the graph or the sampler, weights are not finite or all zero,
            a per-channel forecast is for a computed cell or for a block that says several tensors, the table passes a
            limit (docs/file_format.md), or a fingerprint or the provenance is not plain.
        ReuseBeforeCompute: A cell reads more values than were computed before it.
    """

    graph: BlockGraph
    rows: npt.NDArray[np.bool_]
    denoiser: DenoiserFingerprint
    sampler: SamplerFingerprint
    weights: npt.NDArray[np.float64] | None = None
    channels: Channels = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.denoiser.validate()
        self.sampler.validate()
        check_plain("provenance", self.provenance)
        _check_size(self.sampler.steps, len(self.graph))
        rows = np.array(self.rows, dtype=bool)
        if rows.shape != (self.sampler.steps, len(self.graph)):
            raise _wrong_shape("rows", rows.shape, (self.sampler.steps, len(self.graph)))
        weights = np.tile(PLAIN, (*rows.shape, 1)) if self.weights is None else np.array(self.weights, dtype=float)
        if weights.shape != (*rows.shape, WINDOW):
            raise _wrong_shape("weights", weights.shape, (*rows.shape, WINDOW))
        channels = checked(self.channels, self.graph, rows)
        for cell in channels:
            weights[cell] = PLAIN
        object.__setattr__(self, "channels", channels)
        for name, array in (("rows", rows), ("weights", weights)):
            array.setflags(write=False)
            object.__setattr__(self, name, array)
        self._check_weights()
        self._check_reads()

    def _check_weights(self) -> None:
        bad = ~np.isfinite(self.forecasts).all(axis=2) | (self.forecasts == 0).all(axis=2)
        for step, column in np.argwhere(bad)[:1]:
            raise InvalidSchedule(
                given=f"weights {self.forecasts[step, column].tolist()} at step {step}, "
                f"{self.graph.blocks[column].label!r}",
                expected="finite weights, at least one of them not zero",
                advice="Use (1, 0, 0) for plain reuse",
            )

    def _check_reads(self) -> None:
        before = computed_before(self.rows, self.sampler.begins)
        for step, column in np.argwhere(self.windows > before)[:1]:
            begun = max(begin for begin in self.sampler.begins if begin <= step)
            since = f" since the run began anew at step {begun}" if begun else ""
            raise ReuseBeforeCompute(
                given=f"{self.graph.blocks[column].label!r} reads {self.windows[step, column]} stored values at step "
                f"{step}, when {before[step, column]} have been computed{since}",
                expected="every block computed where the run begins (step 0, and where a branch comes back or another "
                "network takes over), and at least as many computations as values read",
                advice="Set more bits before that step, or use fewer weights",
            )

    @property
    def forecasts(self) -> npt.NDArray[np.float64]:
        """Weights of the stored values, shape (steps, blocks, 3)."""
        assert self.weights is not None  # set in __post_init__
        return self.weights

    @cached_property
    def windows(self) -> npt.NDArray[np.int64]:
        """How many stored values each cell reads, shape (steps, blocks); of a computed one besides its own."""
        used = self.forecasts != 0
        reads: npt.NDArray[np.int64] = np.where(used.any(axis=2), WINDOW - np.argmax(used[..., ::-1], axis=2), 0)
        for cell, vectors in self.channels.items():
            reads[cell] = reads_of(vectors)
        return reads - self.rows

    @property
    def steps(self) -> int:
        """Number of steps."""
        return self.sampler.steps

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, MaskSchedule):
            return NotImplemented
        return (
            (self.graph, self.denoiser, self.sampler) == (other.graph, other.denoiser, other.sampler)
            and np.array_equal(self.rows, other.rows)
            and np.array_equal(self.forecasts, other.forecasts)
            and self.channels.keys() == other.channels.keys()
            and all(np.array_equal(vectors, other.channels[cell]) for cell, vectors in self.channels.items())
            and dict(self.provenance) == dict(other.provenance)
        )

    __hash__ = None  # type: ignore[assignment]  # compares by content, so it is no dictionary key

    def __repr__(self) -> str:
        reused = f"{(~self.rows).mean():.0%} of cells reused"
        return f"MaskSchedule({self.steps} steps × {len(self.graph)} blocks of {self.denoised_by}, {reused})"

    @property
    def denoised_by(self) -> str:
        """The denoiser's class and what is beside it, in words ("UNet2DConditionModel and its controlnet")."""
        return " and its ".join((self.denoiser.class_name, *self.graph.companions))

    def is_like(self, other: "MaskSchedule") -> bool:
        """Whether another schedule is of the same denoiser and graph, so that a masked denoiser can turn to it."""
        return self.denoiser.agrees(other.denoiser) and self.graph.untimed() == other.graph.untimed()

    def plot(self) -> "Figure":
        """The table as a heat map beside the MACs of each step, as a matplotlib figure.

        Raises:
            MissingExtra: matplotlib is not installed.
        """
        from stepmask.schedule.picture import heat_map

        return heat_map(self)

    def _repr_html_(self) -> str:
        """The table as a notebook shows it."""
        from stepmask.schedule.picture import html

        return html(self)

    @classmethod
    def all_compute(
        cls, graph: BlockGraph, denoiser: DenoiserFingerprint, sampler: SamplerFingerprint
    ) -> "MaskSchedule":
        """The table that computes everything: the reference, as data."""
        rows = np.ones((sampler.steps, len(graph)), dtype=bool)
        return cls(graph, rows, denoiser, sampler, provenance={"table": "all-compute"})

    def with_rows(
        self,
        rows: npt.NDArray[np.bool_],
        weights: npt.NDArray[np.float64] | None = None,
        *,
        channels: Channels | None = None,
        provenance: Mapping[str, Any] | None = None,
    ) -> "MaskSchedule":
        """The same denoiser and sampler under another table. What is not given is plain: nothing is carried over."""
        return replace(self, rows=rows, weights=weights, channels=channels or {}, provenance=provenance or {})

    def with_taylor(self, rows: npt.NDArray[np.bool_], order: int, *, provenance: Mapping[str, Any]) -> "MaskSchedule":
        """Another table, reused cells forecast by Taylor's formula; all is computed where the run begins anew.

        Args:
            rows: (steps, blocks), true = compute.
            order: Of the forecast, 0 to 2.
            provenance: As of any schedule.
        """
        begins = self.sampler.begins
        begun = rows.copy()
        begun[list(begins)] = True
        return self.with_rows(begun, taylor_forecasts(begun, order, begins), provenance=provenance)

    def resample(self, sampler: SamplerFingerprint) -> "MaskSchedule":
        """This table for another sequence of steps, carried over along log-SNR; for its own it is the table as it is.

        Every block is computed at the same share of the steps, densely where it was dense. A forecast keeps its
        relative length: κ is scaled by the ratio of (age / gap), new over old. Blends are dropped. The result is a
        guess: measure it before you trust it. Per-channel forecasts belong to the step that they were fitted for and
        cannot be resampled.

        Raises:
            ScheduleMismatch: One of the two samplers does not tell its log-SNR, or they go other ways along it; their
                branches differ; the table has per-channel forecasts; or it is for a run whose steps differ in what they
                evaluate, and the sampler does not tell how its own do.
        """
        if sampler == self.sampler:
            return self
        if sampler.branches != self.sampler.branches:
            raise ScheduleMismatch(
                given=f"a sampler with {sampler.branches} branches, for a schedule with {self.sampler.branches}",
                expected="as many calls of the denoiser at each step",
                advice="Describe it with as many, describe_steps(..., branches=schedule.sampler.branches)",
            )
        if self.sampler.course != Course() and sampler.course == Course():
            raise ScheduleMismatch(
                given="a schedule of a run whose steps differ in what they evaluate (guidance that ends part-way, "
                "networks in turn, a cache filled at the first step), to be resampled",
                expected="a sampler that tells how its own steps differ",
                advice="Take it from a recorded run of as many steps: stepmask.record(...).sampler",
            )
        if self.channels:
            raise ScheduleMismatch(
                given=f"a schedule with {len(self.channels)} per-channel forecasts, to be resampled",
                expected="weights that mean something at another step; a channel's weights and bias do not",
                advice="Learn a schedule for this sampler, or say that they may go: "
                "schedule.with_rows(schedule.rows, schedule.forecasts).resample(...)",
            )
        if not self.sampler.log_snr or not sampler.log_snr:
            raise ScheduleMismatch(
                given="a sampler without log-SNR",
                expected="log-SNR per step on both sides",
                advice="Learn a schedule for this sampler instead of resampling one",
            )
        old = np.array(self.sampler.log_snr)
        new = np.array(sampler.log_snr)
        way = next((way for way in (1, -1) if rises(way * old) and rises(way * new)), None)
        if way is None:
            raise ScheduleMismatch(
                given="samplers whose log-SNR does not go one way: one of them adds noise where the other takes it "
                "away, or does both by turns",
                expected="two that go from noise to signal, or two from signal to noise (inversion)",
                advice="Learn a schedule for this sampler instead of resampling one",
            )
        rows, weights = resample_table(self.rows, self.forecasts, way * old, way * new)
        rows, weights = begun_anew(rows, weights, sampler.begins)
        source = {"resampled_from": {"class": self.sampler.class_name, "steps": self.steps}}
        return replace(self, rows=rows, weights=weights, sampler=sampler, provenance={**self.provenance, **source})

    def save_pretrained(self, folder: str | bytes | Path) -> Path:
        """Write `folder/stepmask.json` and return its path.

        Per-channel forecasts go to `folder/stepmask.safetensors`, which the JSON names with its hash.

        Raises:
            UnwritablePath: The folder cannot be written.
        """
        return file.write(folder, file.contents(self.to_json(), self.to_safetensors()))

    @classmethod
    def from_pretrained(
        cls,
        source: str | bytes | Path,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
    ) -> "MaskSchedule":
        """Read a schedule from a folder, a file, or a repository on the Hugging Face hub.

        Args:
            source: A path, or the id of a repository. A path that exists goes first.
            revision: Branch, tag or commit of the repository; `None` = its main branch.
            token: To read it with; `None` = the one that this machine is logged in with, `False` = none.
            cache_dir: Where downloads are kept; `None` = where huggingface_hub keeps all of them.
            local_files_only: Take what was downloaded before, and ask the network for nothing.

        Raises:
            InvalidScheduleFile: There is no such file or repository, the hub does not give it, the file is truncated
                or not a schedule, or its tensor file is missing, truncated or another.
        """
        source = os.fsdecode(source)
        text, tensors = file.read(Source(source, revision, token, cache_dir, local_files_only))
        try:
            return cls.from_json(text, tensors)
        except InvalidScheduleFile as error:
            raise file.not_a_schedule(source, error.parts["given"].removeprefix("the text: ")) from error

    def push_to_hub(
        self,
        repo_id: str,
        *,
        card: Card | None = None,
        revision: str | None = None,
        commit_message: str = "Upload a mask schedule",
        private: bool | None = None,
        token: str | bool | None = None,
        create_pr: bool = False,
    ) -> str:
        """Commit what `save_pretrained` writes, and a README.md, to a repository on the Hugging Face hub.

            schedule.push_to_hub("me/dit-emoji-20")
            schedule = MaskSchedule.from_pretrained("me/dit-emoji-20")

        Args:
            repo_id: owner/name, or a name of the owner of the token. The repository is made if there is none.
            card: What README.md says beyond the schedule's summary and how to use it: licence, base model, pictures,
                measurements (`stepmask.evaluation.card.card`). `None` = nothing, and a README.md that the repository
                has already stays as it is.
            revision: Branch to commit to, made if there is none; `None` = main.
            commit_message: Its first line.
            private: Of a repository that is made; `None` = as its owner's default is.
            token: `None` = the one that this machine is logged in with.
            create_pr: Open a pull request instead.

        Returns:
            The URL of the commit, or of the pull request.

        Raises:
            HubError: The hub cannot be reached, or refuses.
        """
        from stepmask.schedule.readme import readme

        return push(
            repo_id,
            file.contents(self.to_json(), self.to_safetensors()),
            partial(readme, self),
            card=card,
            revision=revision,
            commit_message=commit_message,
            private=private,
            token=token,
            create_pr=create_pr,
        )

    def to_json(self) -> str:
        """As readable JSON text: a block, a row and a forecast a line.

        Of per-channel forecasts it says where they are and names `to_safetensors()`, which holds them, by its hash.

        Raises:
            InvalidSchedule: What was put into its provenance since cannot be written, or it is too long to be read.
        """
        return file.to_text(
            {
                "denoiser": {"class": self.denoiser.class_name, "config": dict(self.denoiser.config)},
                "sampler": {
                    "class": self.sampler.class_name,
                    "branches": self.sampler.branches,
                    "timesteps": list(self.sampler.timesteps),
                    "log_snr": list(self.sampler.log_snr),
                    **({} if self.sampler.mu is None else {"mu": self.sampler.mu}),
                    **self.sampler.course.to_plain(),
                },
                "blocks": self.graph.to_plain(),
                "rows": ["".join("01"[int(bit)] for bit in row) for row in self.rows],
                "forecasts": _forecasts_to_plain(self),
                **file.name_tensors(self.to_safetensors()),
                "provenance": dict(self.provenance),
            }
        )

    def to_safetensors(self) -> bytes | None:
        """The per-channel forecasts as a safetensors file; `None` if there are none."""
        return file.pack(self.channels)

    @classmethod
    def from_json(cls, text: str, tensors: bytes | None = None) -> "MaskSchedule":
        """From what `to_json` and `to_safetensors` gave.

        Raises:
            InvalidScheduleFile: The text is not JSON, not a schedule, or contradicts itself; or the tensors are not
                those that it names.
        """
        data = file.from_text(text)
        try:
            return _from_plain(data, tensors)
        except InvalidScheduleFile:
            raise
        except InvalidSchedule as error:
            raise file.not_a_schedule("the text", str(error)) from error
        except (ValueError, LookupError, TypeError, ArithmeticError, AttributeError, RecursionError) as error:
            raise file.not_a_schedule("the text", f"{type(error).__name__}: {error}") from error


def _from_plain(data: dict[str, Any], tensors: bytes | None) -> MaskSchedule:
    sampler = data["sampler"]
    rows = _rows(data["rows"])
    weights, reads = _forecasts(data["forecasts"], rows.shape)
    return MaskSchedule(
        graph=BlockGraph.from_plain(data["blocks"]),
        rows=rows,
        weights=weights,
        channels=file.unpack(data.get("tensors"), tensors, reads),
        denoiser=DenoiserFingerprint(data["denoiser"]["class"], data["denoiser"]["config"]),
        sampler=SamplerFingerprint(
            sampler["class"],
            tuple(sampler["timesteps"]),
            tuple(sampler["log_snr"]),
            sampler["branches"],
            sampler.get("mu"),
            Course.from_plain(sampler),
        ),
        provenance=data["provenance"],
    )


def _rows(lines: list[str]) -> npt.NDArray[np.bool_]:
    """The bits of lines of 0 and 1.

    Raises:
        ValueError: They are none, or of several lengths.
    """
    if not isinstance(lines, list) or not lines or not all(isinstance(line, str) for line in lines):
        raise ValueError(f"{told(lines)} where a list of rows was expected")
    _check_size(len(lines), len(lines[0]))
    if set("".join(lines)) - {"0", "1"} or len(set(map(len, lines))) > 1:
        raise ValueError("rows that are not as long as each other, or of other characters than 0 and 1")
    return np.array([[bit == "1" for bit in line] for line in lines], dtype=bool)


def _forecasts(
    items: list[dict[str, Any]], shape: tuple[int, ...]
) -> tuple[npt.NDArray[np.float64], dict[tuple[int, int], int]]:
    """The weights of all cells, and how many stored values the per-channel ones read.

    Raises:
        ValueError: An entry is none.
    """
    weights = np.tile(PLAIN, (*shape, 1))
    reads: dict[tuple[int, int], int] = {}
    named = 0
    for item in items:
        step, columns = item["step"], columns_of(item["blocks"], shape[1])
        named += len(columns)
        if not is_whole(step, shape[0] - 1) or named > shape[0] * shape[1]:
            raise ValueError(f"a forecast at step {told(step)} of {shape[0]}, or more forecasts than cells")
        if "channels" in item:
            if not is_whole(item["channels"], WINDOW):
                raise ValueError(f"a forecast per channel from {told(item['channels'])} values")
            reads.update(((step, column), item["channels"]) for column in columns)
            continue
        cell = item["weights"]
        if not isinstance(cell, list) or not 1 <= len(cell) <= WINDOW or not all(map(is_number, cell)):
            raise ValueError(f"the weights of step {step}, which are not from 1 to {WINDOW} finite numbers")
        weights[step, columns] = [*cell, *[0.0] * (WINDOW - len(cell))]
    return weights, reads


def _check_size(steps: int, blocks: int) -> None:
    if not 1 <= steps <= MAX_STEPS or steps * blocks > MAX_CELLS:
        raise InvalidSchedule(
            given=f"a table of {steps} steps × {blocks} blocks",
            expected=f"from 1 to {MAX_STEPS} steps, and at most {MAX_CELLS} cells",
            advice="Mask larger blocks, or sample with fewer steps",
        )


def _forecasts_to_plain(schedule: MaskSchedule) -> list[dict[str, Any]]:
    """Cells with other weights than plain reuse; blocks of one step with equal weights share an entry.

    Of per-channel weights the entry says how many stored values they read.
    """
    entries = []
    for step, row in enumerate(schedule.forecasts):
        columns: dict[int | tuple[float, ...], list[int]] = {}
        for column, weights in enumerate(row.tolist()):
            reads = int(schedule.windows[step, column])
            if (step, column) in schedule.channels:
                columns.setdefault(reads, []).append(column)
            elif tuple(weights) != PLAIN:
                columns.setdefault(tuple(weights[: reads + schedule.rows[step, column]]), []).append(column)
        entries += [{"step": step, "blocks": span_of(where), **_weights_to_plain(w)} for w, where in columns.items()]
    return entries


def _weights_to_plain(weights: int | tuple[float, ...]) -> dict[str, Any]:
    return {"channels": weights} if isinstance(weights, int) else {"weights": list(weights)}


def _wrong_shape(what: str, given: tuple[int, ...], expected: tuple[int, ...]) -> InvalidSchedule:
    return InvalidSchedule(
        given=f"{what} of shape {given}",
        expected=f"shape {expected}: steps of the sampler × blocks of the graph",
        advice="Build tables with MaskSchedule.all_compute(...).with_rows(...)",
    )
