"""`sweep`: what every (step, block, age) costs the final sample, measured backwards at one step's memory."""

import logging
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil, isfinite
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.numpy import load, save
from torch import Tensor

from stepmask.denoiser.device import device_of
from stepmask.denoiser.families import denoisers_of
from stepmask.denoiser.identity import claim_for, digest
from stepmask.denoiser.memory import peak_memory
from stepmask.denoiser.modes import autocast_as, own_modes, refuse_made_in_inference_mode, uncompiled
from stepmask.denoiser.quantised import gradients_pass
from stepmask.denoiser.refusals import refuse_if_taken, refuse_split
from stepmask.denoiser.sampling import NOT_REPEATED
from stepmask.denoiser.seam import frozen
from stepmask.denoiser.trace import trace
from stepmask.denoiser.trajectory import Trajectory
from stepmask.errors import LearningError, ScheduleMismatch
from stepmask.executors.filed import Kind, finish
from stepmask.executors.local import Executor, LocalExecutor
from stepmask.files import as_path
from stepmask.learning.floats import lifted, wide
from stepmask.learning.guidance import samples_of
from stepmask.learning.memory import predict
from stepmask.learning.objective import relative_error
from stepmask.learning.profile import Profile, swept_answers
from stepmask.learning.sample_rows import SampleRows
from stepmask.learning.tape import Blocks, Evaluation, Moment, Tape, detached, not_finite
from stepmask.progress import progress
from stepmask.schedule.graph import BlockGraph
from stepmask.schedule.schedule import MaskSchedule

log = logging.getLogger(__name__)

Decode = Callable[[Tensor], Tensor]

FIRST_SEED = 0x50524F42
"""Probes must not be drawn like the noise that a run begins with: the final sample correlates with that."""


@own_modes()
def sweep(
    pipe: Any,
    trajectory: Trajectory | Sequence[Trajectory],
    *,
    graph: BlockGraph | None = None,
    around: MaskSchedule | None = None,
    probes: int = 4,
    ages: int = 6,
    seed: int = 0,
    decode: Decode | None = None,
    checkpoint_blocks: bool = False,
    executor: Executor | None = None,
    folder: str | bytes | Path | None = None,
) -> Profile:
    """Measure to first order what reusing any value of any block at any step does to the final sample.

        profile = stepmask.sweep(pipe, trajectory)
        schedule = profile.schedule(0.5)

    The run is repeated once, and then swept backwards once per probe, an evaluation at a time: about three
    evaluations per step and probe. Memory is that of one evaluation with gradients, and of the gradients of all blocks
    at `ages` steps; around another table than all-compute also of all values that it reuses. It is counted before the
    run (`stepmask.learning.memory.predict`), and stands in the profile's provenance beside what was measured: bytes on
    top of what was in use before, `predicted_bytes` and `measured_bytes`.

    Args:
        pipe: The pipeline, or plain denoiser, that the trajectory was recorded from.
        trajectory: A reference run, or several of the same sampler, whose samples are all measured. Rows of a plain
            denoiser's latent are taken for independent samples.
        graph: The blocks; `None` = those of `around`, or `trace(pipe, trajectory)`.
        around: Sweep the run under this table, gradients through its store included; `None` = the reference run.
        probes: Random measurements per sample.
        ages: The oldest value whose reuse is measured, in steps.
        seed: Probe number p is drawn with FIRST_SEED + seed + p, so that sweeps with other seeds can be merged.
        decode: From the final latent to where the error counts (pixels); `None` = the latent itself.
        checkpoint_blocks: Recompute block by block as well, for denoisers whose evaluation does not fit with gradients.
        executor: Where trajectories are swept, and probes of one trajectory apart where more jobs run at once than
            there are trajectories; `None` = `LocalExecutor()`.
        folder: What is swept is kept here, and a killed sweep goes on where it stopped; `None` = nowhere.

    Raises:
        LearningError: A trajectory is another pipeline's, the pipeline cuts the gradient, numbers are not finite, the
            denoiser casts its weights layer by layer, the run is not the one that was recorded, or a folder is to keep
            what was decoded by a function, which has no name.
        AlreadyApplied: The denoiser is masked, or cached by diffusers, already.
        ScheduleMismatch: `around` is for another denoiser, sampler or graph, or trajectories are of several samplers.
        InvalidSchedule: `around` reuses values that are older than `ages`.
        InvalidRunFolder: The folder holds results of other weights, or damaged ones.
        ClusterError: The executor cannot hand out jobs.
    """
    trajectories = [trajectory] if isinstance(trajectory, Trajectory) else list(trajectory)
    _check(pipe, trajectories, probes, ages)
    with autocast_as(trajectories[0].sampling.autocast):
        graph = graph or (around.graph if around else trace(pipe, trajectories[0]))
    around = around or MaskSchedule.all_compute(graph, trajectories[0].denoiser, trajectories[0].sampler)
    _check_graphs(graph, around.graph)
    for each in trajectories:
        around.denoiser.check(each.denoiser)
        around.sampler.check(each.sampler)
        _check_course(around, each)
    executor, folder = executor or LocalExecutor(), as_path(folder) if folder else None
    if folder:
        _check_named(decode)
        claim_for(pipe, folder)
    with autocast_as(trajectories[0].sampling.autocast):
        predicted = predict(trajectories[0], graph, around=around, ages=ages, checkpoint_blocks=checkpoint_blocks)
    log.info("a sweep is about to take %.0f MiB on top of what is in use", predicted / 2**20)
    parts = min(probes, ceil(executor.workers / len(trajectories)))
    numbers = [range(seed + probes * part // parts, seed + probes * (part + 1) // parts) for part in range(parts)]
    jobs = [_Shard(index, few) for index in range(len(trajectories)) for few in numbers]
    setting = _Setting(trajectories, around, ages, decode, checkpoint_blocks)
    found = finish(setting.kind, executor.share(setting), jobs, executor, folder)
    provenance = {"probes": probes, "seed": seed, "decoded": decode is not None, "predicted_bytes": predicted}
    swept = [_profile(found[first : first + parts], around, provenance) for first in range(0, len(found), parts)]
    return swept[0] if len(swept) == 1 else Profile.merge(*swept)


Arrays = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class _Shard:
    """Some probes of one trajectory.

    Args:
        trajectory: Its index.
        probes: Their numbers; a probe is drawn with FIRST_SEED and its number.
    """

    trajectory: int
    probes: range


@dataclass(frozen=True)
class _Setting:
    """What all shards share."""

    trajectories: Sequence[Trajectory]
    around: MaskSchedule
    ages: int
    decode: Decode | None
    checkpoint_blocks: bool

    @property
    def kind(self) -> Kind[_Shard, Arrays]:
        """A file holds a shard's arrays."""
        return Kind("sweeping", _swept, self.name, save, load)

    def name(self, shard: _Shard) -> str:
        latent = self.trajectories[shard.trajectory].sampled.latent
        return f"sweep-{digest(self.around.to_json(), self.ages, shard.probes, latent)}.safetensors"


def _swept(setting: _Setting, shard: _Shard) -> Arrays:
    """A profile's `inner`, `held` and `offset` for some probes of one trajectory, and the bytes that it took, or −1."""
    trajectory, around = setting.trajectories[shard.trajectory], setting.around
    sampling = trajectory.sampling
    with (
        peak_memory(device_of(sampling.denoiser)) as peak,
        frozen(sampling.pipe),
        gradients_pass(*sampling.denoisers),
    ):
        measure = _Measure.of(trajectory, setting.decode)
        readings = _Readings(trajectory, around.graph, measure.output_samples, setting.ages)
        answered = swept_answers(around, setting.ages)
        tape = Tape(trajectory, around.graph, answered, readings, checkpoint_blocks=setting.checkpoint_blocks)
        latent = _run(tape, trajectory, reference=bool((tape.answered[..., 0] == 1).all()))
        pulls, offsets = zip(*(measure.probe(latent.detach(), number) for number in shard.probes), strict=True)
        for place, (pull, factor) in enumerate(progress(pulls, "probes")):
            readings.begin()
            with uncompiled():  # evaluations are repeated while gradients come back
                torch.autograd.grad(latent, tape.anchor, pull, retain_graph=place < len(pulls) - 1)
            readings.end(factor)
    inner, held = np.concatenate(readings.probes, axis=1)
    took = np.array([-1 if peak.grown is None else peak.grown])
    return {"inner": inner, "held": held, "offset": np.concatenate(offsets).astype(np.float32), "bytes": took}


def _profile(parts: Sequence[Arrays], around: MaskSchedule, provenance: Mapping[str, Any]) -> Profile:
    """The profile of one trajectory, from all shards of its probes."""
    inner, held, offset = (np.concatenate([part[name] for part in parts]) for name in ("inner", "held", "offset"))
    samples = len(offset) // provenance["probes"]
    rows = np.tile(np.arange(samples), provenance["probes"])
    took = max(int(part["bytes"][0]) for part in parts)
    told = {**provenance, "samples": samples, "measured_bytes": None if took < 0 else took}
    return Profile(around, inner, held, offset, rows, told)


def _run(tape: Tape, trajectory: Trajectory, *, reference: bool) -> Tensor:
    """The final latent, with the tape behind it.

    Raises:
        LearningError: It is cut off from the tape, or not what was recorded.
    """
    with tape.attached(), torch.enable_grad(), uncompiled():
        latent = trajectory.sampling.latent()
    if tape.evaluation != len(trajectory.calls) or latent.shape != trajectory.sampled.latent.shape:
        raise _another_run(f"a run of {tape.evaluation} evaluations that ends with shape {tuple(latent.shape)}")
    tape.check_finite()
    error = float(relative_error(latent.detach(), trajectory.sampled.latent.detach()))
    if not (isfinite(error) or torch.isfinite(latent).all()):
        raise not_finite("a final latent")
    if not latent.requires_grad:
        raise detached("after the last evaluation")
    if reference and error > 1e-3:
        raise _another_run(f"a run whose final latent is {error:.2g} (relative squared error) away from the recorded")
    return latent


@dataclass(frozen=True)
class _Measure:
    """Random measurements of a final latent: ⟨v, decoded⟩ / ‖decoded ref‖ per sample, v ~ N(0, 1).

    Args:
        target: What the reference run ended with, decoded.
        decode: From a latent to where the error counts.
        latent_samples: Sample of each row of the latent.
        output_samples: Sample of each row of a step's outputs, all branches below each other.
    """

    target: Tensor
    decode: Decode
    latent_samples: npt.NDArray[np.int64]
    output_samples: npt.NDArray[np.int64]

    @classmethod
    def of(cls, trajectory: Trajectory, decode: Decode | None) -> "_Measure":
        """The measurements of a trajectory; where decoding changes the number of rows, all rows are one sample."""
        decode = decode or (lambda latent: latent)
        with torch.no_grad():
            target = decode(trajectory.sampled.latent.detach())
        latent_samples, output_samples = samples_of(trajectory)
        if len(target) != len(latent_samples):
            latent_samples, output_samples = np.zeros(len(target), np.int64), np.zeros_like(output_samples)
        return cls(target, decode, latent_samples, output_samples)

    @property
    def samples(self) -> int:
        """How many samples there are."""
        return int(self.latent_samples.max()) + 1

    def probe(self, latent: Tensor, seed: int) -> tuple[tuple[Tensor, Tensor], npt.NDArray[np.float64]]:
        """One measurement per sample.

        Returns:
            Its gradient at the latent, `lifted`; its value of x_0 − x_0 ref, shape (samples,).
        """
        energy = self._by_sample(self.target, self.target).sqrt().clamp_min(1e-20)
        generator = torch.Generator().manual_seed(FIRST_SEED + seed)
        v = torch.randn(self.target.shape, generator=generator, dtype=torch.float32)
        scale = energy.float()[torch.from_numpy(self.latent_samples).to(energy.device)]
        v = v.to(scale.device) / scale.reshape(-1, *[1] * (v.ndim - 1))
        with torch.enable_grad():
            leaf = latent.requires_grad_()
            decoded = self.decode(leaf)
            up, factor = lifted(v)
            (pull,) = torch.autograd.grad(decoded, leaf, up.to(decoded.dtype))
        if not torch.isfinite(pull).all():
            raise not_finite("a gradient of decode")
        pull, more = lifted(pull)
        return (pull, factor * more), self._by_sample(v, wide(decoded.detach()) - wide(self.target)).cpu().numpy()

    def _by_sample(self, a: Tensor, b: Tensor) -> Tensor:
        """Inner products per sample, shape (samples,)."""
        rows = (a.double() * b.double()).flatten(1).sum(1)
        index = torch.from_numpy(self.latent_samples).to(rows.device)
        return torch.zeros(self.samples, dtype=rows.dtype, device=rows.device).index_add(0, index, rows)


class _Readings:
    """Inner products of the gradients at each step with what the blocks said then and up to `ages` steps before."""

    def __init__(self, trajectory: Trajectory, graph: BlockGraph, samples: npt.NDArray[np.int64], ages: int) -> None:
        self.steps, self.graph, self.ages = trajectory.steps, graph, ages
        self.sampler = trajectory.sampler
        self.rows = SampleRows(samples, trajectory)
        self.probes: list[npt.NDArray[np.float32]] = []
        self.total = torch.zeros(())  # of this probe, where the gradients are
        self.kept: dict[int, deque[tuple[Evaluation, Blocks, Blocks]]] = {}

    def begin(self) -> None:
        """The next probe."""
        shape = (2, self.rows.count, self.steps, len(self.graph), self.ages + 1)
        self.total = torch.zeros(shape, device=self.rows.device)
        self.kept = {branch: deque() for branch in range(self.sampler.branches)}

    def __call__(self, moment: Moment) -> None:
        """Take in one evaluation; steps come last first."""
        values = moment.values()
        kept = self.kept[moment.branch]
        kept.append((moment.evaluation, moment.gradients, moment.held()))
        for later, *both in kept:
            read = [
                later.batch.part_of(value, moment.evaluation.batch, block.shared)
                for value, block in zip(values, self.graph.blocks, strict=True)
            ]
            products = torch.stack([self._by_sample(pulls, read, later) for pulls in both])
            self.total[:, :, later.step, :, later.step - moment.step] += products.to(self.total)
        while kept and kept[0][0].step >= moment.step + self.ages:  # no earlier value is read with these
            kept.popleft()
        if moment.step in self.sampler.begins:  # nor with any
            kept.clear()

    def end(self, factor: Tensor) -> None:
        """The probe is done: only now an accelerator is waited for.

        Args:
            factor: How many times larger the gradients were than the measurement's.

        Raises:
            LearningError: A gradient is not finite, or samples share a tensor that is read.
        """
        self.rows.check()
        read = (self.total / factor.to(self.total)).cpu().numpy()
        finite = np.isfinite(read).all(axis=(0, 1, 3, 4))
        if not finite.all():
            raise not_finite(f"a gradient at step {np.flatnonzero(~finite)[-1]}")
        self.probes.append(read)

    def _by_sample(self, pulls: Blocks, values: Blocks, at: Evaluation) -> Tensor:
        """⟨gradient, value⟩ of every block, shape (samples, blocks)."""
        triples = zip(self.graph.blocks, pulls, values, strict=True)
        return torch.stack([self.rows.products(at.step, at.branch, block, *pair) for block, *pair in triples], dim=1)


def _check(pipe: Any, trajectories: Sequence[Trajectory], probes: int, ages: int) -> None:
    if not trajectories or probes < 1 or ages < 1:
        raise LearningError(
            given=f"{len(trajectories)} trajectories, {probes} probes and ages up to {ages}",
            expected="at least one of each",
            advice="Leave the defaults, and record a trajectory",
        )
    for trajectory in trajectories:
        trajectory.check_pipe(pipe)
    refuse_made_in_inference_mode(pipe)
    for denoiser in denoisers_of(pipe):
        refuse_split(denoiser)
        refuse_if_taken(denoiser)


def _check_named(decode: Decode | None) -> None:
    if decode is not None:
        raise LearningError(
            given="a folder and a function that decodes",
            expected="one of both: what another function decoded could not be told apart in the folder",
            advice="Leave the folder out",
        )


def _check_graphs(graph: BlockGraph, swept: BlockGraph) -> None:
    if graph != swept:
        raise ScheduleMismatch(
            given=f"a graph of {len(graph)} blocks and a table over {len(swept)} that are not the same",
            expected="the graph of the table that is swept around",
            advice="Leave graph out",
        )


def _check_course(around: MaskSchedule, trajectory: Trajectory) -> None:
    ours, theirs = around.sampler, trajectory.sampler
    if (theirs.branches, theirs.course) != (ours.branches, ours.course):
        raise ScheduleMismatch(
            given=f"trajectories that do not evaluate the same branches at the same steps ({theirs.course} in one)",
            expected=f"{ours.branches} branches, {ours.course}",
            advice="Record all of them with the same guidance",
        )


def _another_run(given: str) -> LearningError:
    return LearningError(
        given=given,
        expected="the recorded run",
        advice=NOT_REPEATED,
    )
