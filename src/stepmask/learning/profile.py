"""`Profile`: what a reverse sweep found out, as numbers: the effect of any table on the final sample."""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from stepmask.errors import HubError, InvalidProfile, InvalidSchedule, ScheduleMismatch, StepmaskError
from stepmask.files import as_path, clear_leftovers, read_at_most, write_together
from stepmask.hub import Card, Source, push
from stepmask.learning.allocate import allocate
from stepmask.schedule.answers import answers
from stepmask.schedule.budget import Budget
from stepmask.schedule.file import parsed
from stepmask.schedule.fingerprint import DenoiserFingerprint, SamplerFingerprint
from stepmask.schedule.graph import BlockGraph
from stepmask.schedule.limits import MAX_TEXT, check_plain
from stepmask.schedule.schedule import MaskSchedule
from stepmask.text import shortened, told

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMAT = "stepmask-profile/1"
ARRAYS = ("inner", "held", "offset", "samples")
JSON_NAME, ARRAYS_NAME = "profile.json", "profile.safetensors"

MAX_EFFECT = 1e15
"""Any number of a profile, whatever its sign: squares and sums of such numbers are finite."""

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Profile:
    """First-order effects on the final sample of answering any cell of a table with any older value.

    `inner[p, k, b, j]` = ⟨G_p[k, b], y[k−j, b]⟩: the gradient of the p-th random measurement of the final sample with
    respect to what block b answers at step k, times what the block said j steps earlier; 0 where k − j < 0. A
    measurement is ⟨v, x_0⟩ / ‖x_0 ref‖ of one sample with v ~ N(0, 1), so that the mean over p of the square of a
    change estimates ‖Δx_0‖² / ‖x_0 ref‖² (Hutchinson's estimator).

    A reused block does not react to what others answer at its step, so a cell's gradient depends on who else is reused.
    It is known where every other block of the step answers as in the swept run (`inner`) and where they all hold their
    answers (`held`); in between it is taken in proportion to how many of the blocks downstream are computed.

    Args:
        around: The table of the run that was swept; all-compute for the reference run.
        inner: (rows, steps, blocks, ages + 1), float32; rows = probes × samples.
        held: As `inner`, for the gradient with all other blocks of the step holding their answers.
        offset: (rows,), float32: the measurements of x_0 − x_0 ref in the run that was swept; 0 for the reference.
        samples: (rows,): which sample each row measures, counted from 0.
        provenance: Where it comes from: plain JSON values, not interpreted.

    Raises:
        InvalidProfile: Shapes disagree, numbers are too large or not finite, samples are not counted from 0 without a
            gap, or the provenance is not plain.
    """

    around: MaskSchedule
    inner: npt.NDArray[np.float32]
    held: npt.NDArray[np.float32]
    offset: npt.NDArray[np.float32]
    samples: npt.NDArray[np.int64]
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        inner, held, offset = (np.array(array, dtype=np.float32) for array in (self.inner, self.held, self.offset))
        steps, blocks = self.around.rows.shape
        if inner.ndim != 4 or inner.shape[1:3] != (steps, blocks) or inner.shape[3] < 2:
            raise _invalid(f"inner products of shape {inner.shape}", f"(rows, {steps}, {blocks}, ages + 1)")
        if held.shape != inner.shape:
            raise _invalid(f"held inner products of shape {held.shape}", f"{inner.shape}, as the others")
        if offset.shape != inner.shape[:1] or not len(offset):
            raise _invalid(f"an offset of shape {offset.shape}", f"({len(inner)},), one number a row, at least one")
        if not all((np.abs(array) <= MAX_EFFECT).all() for array in (inner, held, offset)):
            raise _invalid("numbers that are not finite, or too large", f"inner products of at most {MAX_EFFECT:.0e}")
        samples = _samples(self.samples, len(inner))
        try:
            check_plain("provenance", self.provenance)
        except InvalidSchedule as error:
            raise _invalid(error.parts["given"], error.parts["expected"]) from error
        for name, array in (("inner", inner), ("held", held), ("offset", offset), ("samples", samples)):
            array.setflags(write=False)
            object.__setattr__(self, name, array)

    @property
    def graph(self) -> BlockGraph:
        """The blocks."""
        return self.around.graph

    @property
    def denoiser(self) -> DenoiserFingerprint:
        """The denoiser that was swept."""
        return self.around.denoiser

    @property
    def sampler(self) -> SamplerFingerprint:
        """The sampler that was swept."""
        return self.around.sampler

    @property
    def ages(self) -> int:
        """The oldest value whose effect is known, in steps."""
        return int(self.inner.shape[3]) - 1

    def __repr__(self) -> str:
        rows, steps, blocks, _ = self.inner.shape
        return f"Profile({rows} rows, {steps} steps × {blocks} blocks, ages up to {self.ages})"

    @cached_property
    def base(self) -> Floats:
        """What each cell answers in the swept run, as weights by age, shape (steps, blocks, ages + 1)."""
        return swept_answers(self.around, self.ages)

    def mixed(self, share: Floats) -> Floats:
        """Inner products where a share of the blocks downstream is computed, shape as `inner`.

        Args:
            share: (steps, blocks), or anything that broadcasts to it; 1 = all that the swept run computes, 0 = none.
        """
        mixed: Floats = self.held + (self.inner - self.held) * np.asarray(share, dtype=float)[..., None]
        return mixed

    def computed_downstream(self, answered: Floats) -> Floats:
        """Of the blocks that a cell's answer reaches and the swept run computes, the share that a table computes.

        Args:
            answered: What each cell answers, shape (steps, blocks, ages + 1).

        Returns:
            (steps, blocks); 1 where there are none.
        """
        before, now = self.base[..., 0] != 0, answered[..., 0] != 0
        reach = _reach(self.graph)
        reached = before @ reach
        shares: Floats = np.where(reached > 0, (before & now) @ reach / np.maximum(reached, 1), 1.0)
        return shares

    def effects(self, schedule: MaskSchedule) -> Floats:
        """First-order change of every measurement from the swept run to a schedule's, shape (rows,).

        Cells that nobody reads under the schedule change nothing.

        Raises:
            ScheduleMismatch: The schedule is for another denoiser, sampler or other blocks.
            InvalidSchedule: It reuses a value that is older than the profile knows.
        """
        return np.asarray(self._effects_by_cell(schedule).sum(axis=(1, 2)))

    def _effects_by_cell(self, schedule: MaskSchedule) -> Floats:
        """What each cell adds to `effects`, shape (rows, steps, blocks)."""
        self.denoiser.check(schedule.denoiser)
        self.sampler.check(schedule.sampler)
        if _wiring(schedule.graph) != _wiring(self.graph):
            raise ScheduleMismatch(
                given="a schedule over other blocks",
                expected=f"the {len(self.graph)} blocks of the profile",
                advice="Sweep with the graph of the schedule: sweep(pipe, trajectory, graph=schedule.graph)",
            )
        answered = answers(schedule, self.ages)
        change = np.where(answered.any(axis=2, keepdims=True), answered - self.base, 0.0)
        inner = self.mixed(self.computed_downstream(answered))
        effects: Floats = np.einsum("rsba,sba->rsb", inner, change)
        return effects

    def cell_errors(self, schedule: MaskSchedule) -> Floats:
        """What each cell of a schedule would add to the predicted error, were it alone, shape (steps, blocks).

        Raises:
            ScheduleMismatch: As `effects`.
            InvalidSchedule: As `effects`.
        """
        effects = self._effects_by_cell(schedule)
        return np.asarray((np.square(effects) + 2 * self.offset[:, None, None] * effects).mean(axis=0))

    def predicted_errors(self, schedule: MaskSchedule) -> Floats:
        """‖x_0 − x_0 ref‖² / ‖x_0 ref‖² of each sample under a schedule, to first order; shape (samples,).

        First order overstates what happens to the most sensitive samples: to rank tables, compare geometric means.

        Raises:
            ScheduleMismatch: As `effects`.
            InvalidSchedule: As `effects`.
        """
        squares = np.square(self.offset + self.effects(schedule))
        return np.asarray(np.bincount(self.samples, squares) / np.bincount(self.samples))

    def predicted_error(self, schedule: MaskSchedule) -> float:
        """The mean of `predicted_errors`.

        Raises:
            ScheduleMismatch: As `effects`.
            InvalidSchedule: As `effects`.
        """
        return float(self.predicted_errors(schedule).mean())

    def schedule(self, budget: float | Budget) -> MaskSchedule:
        """The table within a budget that predicts the smallest error, among exact paths and regular tables.

        Raises:
            InvalidBudget: The budget is outside (0, 1], no table with ages that the profile knows reaches it, or all
                that do need a larger store.
            NotTimed: The budget is in time, and the profile's graph was not timed.
        """
        return allocate(self, Budget.of(budget))

    def pareto(
        self, budgets: Sequence[float | Budget] = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
    ) -> list[tuple[MaskSchedule, float]]:
        """A schedule per budget with its predicted error.

        Raises:
            InvalidBudget: As `schedule`.
        """
        schedules = [self.schedule(budget) for budget in budgets]
        return [(schedule, self.predicted_error(schedule)) for schedule in schedules]

    def plot(self) -> "Figure":
        """What plain reuse of each cell costs alone, and the predicted error at any budget, as a matplotlib figure.

        Raises:
            MissingExtra: matplotlib is not installed.
        """
        from stepmask.learning.picture import sensitivities

        return sensitivities(self)

    @classmethod
    def merge(cls, *profiles: "Profile") -> "Profile":
        """One profile with the rows of several sweeps of the same pipeline around the same table.

        Raises:
            InvalidProfile: They are of different denoisers, samplers, blocks, tables or ages, or there is none.
        """
        if not profiles:
            raise _invalid("no profile", "at least one")
        first = profiles[0]
        for other in profiles[1:]:
            _check_same(first, other)
        counted = np.cumsum([0, *(profile.samples.max() + 1 for profile in profiles)])
        return cls(
            first.around,
            np.concatenate([profile.inner for profile in profiles]),
            np.concatenate([profile.held for profile in profiles]),
            np.concatenate([profile.offset for profile in profiles]),
            np.concatenate([profile.samples + before for profile, before in zip(profiles, counted, strict=False)]),
            {"merged": [part for profile in profiles for part in _merged(profile.provenance)]},
        )

    def __add__(self, other: "Profile") -> "Profile":
        return Profile.merge(self, other)

    def save_pretrained(self, folder: str | bytes | Path) -> Path:
        """Write `folder/profile.safetensors` and `folder/profile.json`; return the path of the latter.

        Raises:
            InvalidProfile: Its table and provenance are too long to be read again.
            UnwritablePath: The folder cannot be written.
        """
        contents = self._contents()
        folder = as_path(folder)
        clear_leftovers(folder)
        write_together({folder / name: content for name, content in contents.items()})
        return folder / JSON_NAME

    def _contents(self) -> dict[str, str | bytes]:
        """The files by name; the arrays go before the JSON, which names them by their hash."""
        from safetensors.numpy import save

        arrays = save({name: np.ascontiguousarray(getattr(self, name)) for name in ARRAYS})
        data = {
            "format": FORMAT,
            "arrays_sha256": hashlib.sha256(arrays).hexdigest(),
            "provenance": dict(self.provenance),
            "around": json.loads(self.around.to_json()),
        }
        text = json.dumps(data, ensure_ascii=False, indent=1) + "\n"
        if (size := len(text.encode())) > MAX_TEXT:
            raise _invalid(f"a profile whose table and provenance are {size} bytes of text", f"at most {MAX_TEXT}")
        return {ARRAYS_NAME: arrays, JSON_NAME: text}

    @classmethod
    def from_pretrained(
        cls,
        source: str | bytes | Path,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
    ) -> "Profile":
        """Read what `save_pretrained` or `push_to_hub` wrote.

        Args:
            source: Path of a folder, or the id of a repository on the hub. A path that exists goes first.
            revision: As in `MaskSchedule.from_pretrained`, as are the others.
            token: To read the repository with.
            cache_dir: Where downloads are kept.
            local_files_only: Ask the network for nothing.

        Raises:
            InvalidProfile: There is no such folder or repository, the hub does not give it, a file is missing or cut
                short, or the two do not belong together.
        """
        source = os.fsdecode(source)
        place = Source(source, revision, token, cache_dir, local_files_only)
        try:
            path = place.file(JSON_NAME)
            data = parsed(read_at_most(path, MAX_TEXT).decode("utf-8"))
            return cls._from_contents(data, place.beside(path, ARRAYS_NAME).read_bytes(), source)
        except InvalidProfile:
            raise
        except HubError as error:
            raise InvalidProfile(**error.parts) from error
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError, StepmaskError) as error:
            problem = f"{type(error).__name__}: {shortened(str(error), 1000)}"
            raise _invalid(f"{source}: {problem}", "a whole profile") from error

    @classmethod
    def _from_contents(cls, data: dict[str, Any], content: bytes, source: str) -> "Profile":
        from safetensors import SafetensorError
        from safetensors.numpy import load

        if data["format"] != FORMAT:
            raise _invalid(f"{source}: format {told(data['format'])}", f"format {FORMAT}")
        if hashlib.sha256(content).hexdigest() != data["arrays_sha256"]:
            raise _invalid(f"{source}: arrays that are cut short or of another profile", "both files of one save")
        try:
            arrays = load(content)
        except SafetensorError as error:
            raise _invalid(f"{source}: {error}", "a whole profile") from error
        around = MaskSchedule.from_json(json.dumps(data["around"], ensure_ascii=False))
        return cls(around, **{name: arrays[name] for name in ARRAYS}, provenance=data["provenance"])

    def push_to_hub(
        self,
        repo_id: str,
        *,
        card: Card | None = None,
        revision: str | None = None,
        commit_message: str = "Upload a profile",
        private: bool | None = None,
        token: str | bool | None = None,
        create_pr: bool = False,
    ) -> str:
        """Commit what `save_pretrained` writes, and a README.md, to a repository on the Hugging Face hub.

        Args:
            repo_id: As in `MaskSchedule.push_to_hub`, as are the others.
            card: What README.md says beyond what was swept and how to use it; `None` = nothing, and a README.md that
                the repository has already stays as it is.
            revision: Branch to commit to.
            commit_message: Its first line.
            private: Of a repository that is made.
            token: To write with.
            create_pr: Open a pull request instead.

        Returns:
            The URL of the commit, or of the pull request.

        Raises:
            HubError: The hub cannot be reached, or refuses.
        """
        return push(
            repo_id,
            self._contents(),
            self._readme,
            card=card,
            revision=revision,
            commit_message=commit_message,
            private=private,
            token=token,
            create_pr=create_pr,
        )

    def _readme(self, repo_id: str, card: Card) -> str:
        """The README.md of a repository."""
        denoiser = self.denoiser.class_name
        about = (
            f"A sweep's profile of {denoiser} with {self.sampler.class_name or 'a plain loop'}, {self.sampler.steps} "
            f"steps: what reusing any value of its {len(self.graph)} blocks, up to {self.ages} steps old, does to the "
            f"final sample, to first order, in {len(self.offset)} measurements of {self.samples.max() + 1} samples. It "
            "predicts the error of any mask schedule, and gives one for any budget."
        )
        code = (
            f"import stepmask\n\nprofile = stepmask.Profile.from_pretrained({json.dumps(repo_id)})\n"
            "schedule = profile.schedule(0.5)  # half of the MACs\nprint(profile.predicted_error(schedule))"
        )
        tags = ("diffusion", "mask-schedule-profile", denoiser)
        return card.markdown(repo_id.rpartition("/")[2], tags=tags, about=about, code=code)


def _samples(given: npt.ArrayLike, rows: int) -> npt.NDArray[np.int64]:
    """Which sample each row measures, as a copy.

    Raises:
        InvalidProfile: They are not whole numbers, or not counted from 0 without a gap.
    """
    samples = np.array(given)
    whole = samples.shape == (rows,) and samples.dtype.kind in "iu" and samples.min() >= 0 and samples.max() < rows
    if not whole or not np.bincount(samples.astype(np.int64)).all():
        raise _invalid(f"samples of shape {samples.shape}", f"({rows},), a sample a row from 0 on, none left out")
    return samples.astype(np.int64)


def swept_answers(around: MaskSchedule, ages: int) -> Floats:
    """What each cell answers in the run that is swept: as `answers`, but what nobody reads is computed."""
    answered = answers(around, ages)
    answered[~answered.any(axis=2), 0] = 1.0
    return answered


def _reach(graph: BlockGraph) -> Floats:
    """Shape (blocks, blocks); 1 where the answer of a column's block reaches a row's, the denoiser aside."""
    reads = graph.reads.copy()
    reads[-1] = False
    for column in range(len(graph)):
        reads[column] |= reads[reads[column]].any(axis=0)  # readers come after what they read
    return reads.astype(float)


def _wiring(graph: BlockGraph) -> list[tuple[object, ...]]:
    """What must agree between graphs; costs and shapes depend on the traced batch."""
    return [(block.name, block.reads, block.reuse) for block in graph.blocks]


def _merged(provenance: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The provenance of each profile that was merged to this one, or its own."""
    parts = provenance.get("merged")
    return parts if isinstance(parts, list) and len(provenance) == 1 else [dict(provenance)]


def _check_same(first: Profile, other: Profile) -> None:
    try:
        first.denoiser.check(other.denoiser)
        first.sampler.check(other.sampler)
    except ScheduleMismatch as error:
        raise _invalid(f"profiles that differ: {error.parts['given']}", error.parts["expected"]) from error
    same = {
        "blocks": _wiring(first.graph) == _wiring(other.graph),
        "ages": first.ages == other.ages,
        "tables": np.array_equal(first.around.rows, other.around.rows)
        and np.array_equal(first.around.forecasts, other.around.forecasts),
    }
    if differs := [name for name, equal in same.items() if not equal]:
        raise _invalid(f"profiles of different {differs[0]}", f"the same {differs[0]} in all of them")


def _invalid(given: str, expected: str) -> InvalidProfile:
    return InvalidProfile(
        given=given, expected=expected, advice="Make profiles with stepmask.sweep and save them with save_pretrained"
    )
