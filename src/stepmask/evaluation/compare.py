"""`evaluate`: the reference and a masked run on the same seeds, measured side by side."""

import inspect
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any

from torch import Tensor, nn

from stepmask.denoiser.clock import now
from stepmask.denoiser.memory import peak_memory
from stepmask.denoiser.runtime import apply
from stepmask.denoiser.sampling import Sampled, Sampling
from stepmask.denoiser.seam import attached
from stepmask.errors import RunError
from stepmask.evaluation.measure import MacCounter, Stopwatch, machine
from stepmask.evaluation.metrics import images_of, latent_errors, psnr, ssim
from stepmask.evaluation.report import Report, Row
from stepmask.progress import progress
from stepmask.schedule.rectify import lower
from stepmask.schedule.schedule import MaskSchedule

REFERENCE = "reference"
SCHEDULE = "schedule"


def evaluate(
    pipe: Any,
    schedule: MaskSchedule,
    *,
    rivals: Mapping[str, Any] | None = None,
    seed: int = 1000,
    repeats: int = 3,
    run: Callable[[], Tensor] | None = None,
    **call: Any,
) -> Report:
    """Measure a schedule against the reference, and rivals against both, on seeds that were not learned from.

        report = stepmask.evaluate(pipe, schedule, class_labels=[1, 2, 3], num_inference_steps=20)
        print(report)

    Each way of sampling runs once to warm up and to compare samples, then `repeats` times for its time; the timed
    runs take turns, so that a machine that slows down slows all of them.

    Args:
        pipe: A pipeline, or a plain denoiser with `run`.
        schedule: The schedule.
        rivals: By name: other schedules; the reference with fewer steps, as a number; or another pipeline, sampled as
            it is, with whatever other cache is enabled on it. What the latter computes is counted in its first run.
        seed: Of the generator; choose another than the one the schedule was learned with.
        repeats: Timed runs of each.
        run: For a plain denoiser: a function without arguments that samples with it and returns the final latent.
        **call: Arguments of the pipeline.

    Raises:
        ScheduleMismatch: A schedule is for another denoiser or sampler.
        RunError: `repeats` is less than one, or rivals share a name with the reference or the schedule.
    """
    if repeats < 1 or {REFERENCE, SCHEDULE} & set(rivals or {}):
        raise RunError(
            given=f"repeats={repeats} and rivals {sorted(rivals or {})}",
            expected="at least one timed run, and names other than 'reference' and 'schedule'",
            advice="Change the argument",
        )
    if "output_type" in _parameters(pipe):
        call = {"output_type": "np", **call}
    sampling = Sampling(pipe, call, seed, run)
    contenders = [_Contender(REFERENCE, sampling), _Contender(SCHEDULE, sampling, schedule)]
    contenders += [_contender(name, sampling, rival) for name, rival in (rivals or {}).items()]
    foreign = any(contender.sampling.pipe is not pipe for contender in contenders)
    for contender in contenders:  # what another pipeline computes is in no plan
        contender.counted = foreign and contender.schedule is None
    turns = [contender.warm_up for contender in contenders] + [contender.run for contender in contenders] * repeats
    for turn in progress(turns, "evaluating"):
        turn()
    setting = {**{key: _brief(value) for key, value in call.items()}, "seed": seed, "repeats": repeats}
    rows = [contender.row(contenders[0]) for contender in contenders]
    images = {c.name: found for c in contenders if (found := images_of(c.sampled.output)) is not None}
    return Report(rows, setting, machine(), images, schedule)


@dataclass(eq=False)
class _Contender:
    """One way of sampling, and what has been measured of it."""

    name: str
    sampling: Sampling
    schedule: MaskSchedule | None = None
    counted: bool = False
    denoiser_ms: list[float] = field(default_factory=list)
    pipeline_ms: list[float] = field(default_factory=list)
    sampled: Sampled = field(init=False)
    evaluations: int = 0
    computed_macs: int = 0
    store_bytes: int = 0
    peak_bytes: int | None = None

    def warm_up(self) -> None:
        """The first run: its sample, MACs and memory are kept, its time is not."""
        counter = MacCounter()
        with attached({self.sampling.denoiser: counter} if self.counted else {}):
            self.run()
        self.computed_macs = counter.macs if self.counted else self.computed_macs
        self.denoiser_ms.clear()
        self.pipeline_ms.clear()

    def run(self) -> None:
        stopwatch = Stopwatch()
        with ExitStack() as stack:
            masked = stack.enter_context(apply(self.sampling.pipe, self.schedule)) if self.schedule else None
            stack.enter_context(attached({self.sampling.denoiser: stopwatch}))
            peak = stack.enter_context(peak_memory())
            started = now()
            self.sampled = self.sampling()
            self.pipeline_ms.append(1000 * (now() - started))
        self.denoiser_ms.append(1000 * stopwatch.seconds)
        self.evaluations, self.peak_bytes = stopwatch.calls, peak.bytes
        if masked is not None:
            self.computed_macs, self.store_bytes = masked.computed_macs, masked.peak_store_bytes

    def row(self, reference: "_Contender") -> Row:
        images, originals = images_of(self.sampled.output), images_of(reference.sampled.output)
        pictures = None if images is None or originals is None else (images, originals)
        return Row(
            name=self.name,
            evaluations=self.evaluations,
            macs_planned=lower(self.schedule).macs_share if self.schedule else self.executed(reference),
            macs_executed=self.executed(reference),
            latent_errors=latent_errors(self.sampled.latent, reference.sampled.latent),
            psnr_db=psnr(*pictures) if pictures else (),
            ssim=ssim(*pictures) if pictures else (),
            denoiser_ms=self.denoiser_ms,
            pipeline_ms=self.pipeline_ms,
            store_bytes=self.store_bytes,
            peak_bytes=self.peak_bytes,
            path_errors=self.path_errors(reference),
        )

    def executed(self, reference: "_Contender") -> float:
        """MACs of the blocks that ran, over those of the reference."""
        if self.schedule is not None:
            return self.computed_macs / (int(self.schedule.graph.macs.sum()) * reference.evaluations)
        if self.counted:
            return self.computed_macs / reference.computed_macs
        return self.evaluations / reference.evaluations

    def path_errors(self, reference: "_Contender") -> list[float]:
        """Mean error of the latents after each step, where the steps are the reference's."""
        own, others = self.sampled.latents, reference.sampled.latents
        if len(own) != len(others):
            return []
        return [fmean(latent_errors(*pair)) for pair in zip(own, others, strict=True)]


def _contender(name: str, sampling: Sampling, rival: Any) -> _Contender:
    if isinstance(rival, MaskSchedule):
        return _Contender(name, sampling, rival)
    if isinstance(rival, int):
        return _Contender(name, replace(sampling, call={**sampling.call, "num_inference_steps": rival}))
    return _Contender(name, replace(sampling, pipe=rival))


def _parameters(pipe: Any) -> list[str]:
    """Names of a pipeline's arguments; none for a plain denoiser."""
    return [] if isinstance(pipe, nn.Module) else list(inspect.signature(pipe.__call__).parameters)


def _brief(value: Any) -> Any:
    """A setting as it is shown: long lists by their length."""
    return f"{len(value)} of them" if isinstance(value, list | tuple) and len(value) > 32 else value
