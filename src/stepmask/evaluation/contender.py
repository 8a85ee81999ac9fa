"""`Contender`: one way of sampling, run and measured."""

from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from statistics import fmean

from torch import Tensor

from stepmask.denoiser.clock import Clock
from stepmask.denoiser.device import device_of
from stepmask.denoiser.families import companions_of
from stepmask.denoiser.identity import digest
from stepmask.denoiser.memory import peak_memory
from stepmask.denoiser.runtime import apply
from stepmask.denoiser.sampling import Sampled, Sampling
from stepmask.denoiser.seam import attached, frozen
from stepmask.evaluation.measure import MacCounter, Stopwatch
from stepmask.evaluation.metrics import Images, images_of, latent_errors, psnr, ssim
from stepmask.schedule.schedule import MaskSchedule


@dataclass(frozen=True)
class Run:
    """One run, measured."""

    sampled: Sampled
    denoiser_ms: float
    evaluations: int
    computed_macs: int
    store_bytes: int
    peak_bytes: int | None

    @property
    def images(self) -> Images | None:
        """Its pictures, if it ends with any."""
        return images_of(self.sampled.output)


@dataclass(frozen=True)
class Fidelity:
    """What a batch of one way of sampling is like, next to the reference's.

    Args:
        sample: A name for the last latent.
    """

    evaluations: int
    macs_executed: float
    latent_errors: Sequence[float]
    psnr_db: Sequence[float]
    ssim: Sequence[float]
    path_errors: Sequence[float]
    store_bytes: int
    peak_bytes: int | None
    sample: str


@dataclass(eq=False)
class Timed:
    """The times of several runs, and the pictures of the last one."""

    denoiser_ms: list[float] = field(default_factory=list)
    pipeline_ms: list[float] = field(default_factory=list)
    images: Images | None = None

    def add(self, run: Run, pipeline_ms: float) -> None:
        """One more run under a stopwatch, and the time of one without."""
        self.denoiser_ms.append(run.denoiser_ms)
        self.pipeline_ms.append(pipeline_ms)
        self.images = run.images


@dataclass(frozen=True, eq=False)
class Contender:
    """One way of sampling.

    Args:
        name: Of its row.
        sampling: The run; its seed is not used.
        schedule: What is applied to it.
        counted: Whether what it computes is counted, for no plan says so.
        warm: What it has run in this process, so that its times may count.
    """

    name: str
    sampling: Sampling
    schedule: MaskSchedule | None = None
    counted: bool = False
    warm: list[bool] = field(default_factory=list)

    def run(self, seed: int) -> Run:
        """Once."""
        stopwatch = Stopwatch(self.clock)
        with ExitStack() as stack:
            masked = stack.enter_context(apply(self.sampling.pipe, self.schedule)) if self.schedule else None
            stack.enter_context(attached(dict.fromkeys(self.sampling.denoisers, stopwatch)))
            peak = stack.enter_context(peak_memory(self.clock.device))
            sampled = replace(self.sampling, seed=seed)()
        self.warm.append(True)
        return Run(
            sampled,
            1000 * stopwatch.seconds,
            stopwatch.calls,
            0 if masked is None else masked.computed_macs,
            0 if masked is None else masked.peak_store_bytes,
            peak.bytes,
        )

    def pipeline_ms(self, seed: int) -> float:
        """How long the pipeline takes, in a run of its own: nothing is watched or kept in it."""
        with apply(self.sampling.pipe, self.schedule) if self.schedule else nullcontext():
            return 1000 * replace(self.sampling, seed=seed).seconds(self.clock)

    @property
    def clock(self) -> Clock:
        """Of the denoiser's device."""
        return Clock(device_of(self.sampling.denoiser))

    def counted_run(self, seed: int) -> Run:
        """Once, and once more with its MACs counted where no plan says them: counting changes rounding."""
        run = self.run(seed)
        if not self.counted:
            return run
        networks = [*self.sampling.denoisers, *companions_of(self.sampling.pipe).values()]
        counters = {network: MacCounter(network) for network in networks}
        with ExitStack() as stack:
            for network in counters:
                stack.enter_context(frozen(network))  # torch's counter hooks what requires gradients
            stack.enter_context(attached(counters))
            self.run(seed)
        return replace(run, computed_macs=sum(counter.macs for counter in counters.values()))

    def fidelity(self, run: Run, reference: Run) -> Fidelity:
        """What a run of it is like, next to one of the reference with the same seed."""
        images, originals = run.images, reference.images
        pictures = None if images is None or originals is None else (images, originals)
        return Fidelity(
            run.evaluations,
            self._executed(run, reference),
            latent_errors(_of_pictures(run), _of_pictures(reference)),
            psnr(*pictures) if pictures else (),
            ssim(*pictures) if pictures else (),
            _path_errors(run.sampled.latents, reference.sampled.latents),
            run.store_bytes,
            run.peak_bytes,
            digest(run.sampled.latent),
        )

    def _executed(self, run: Run, reference: Run) -> float:
        """MACs of the blocks that ran, over those of the reference; of a network without any, its evaluations."""
        if self.schedule is not None and (macs := int(self.schedule.graph.macs.sum())):
            sampler = self.schedule.sampler
            whole = sampler.branches * float(sampler.loads.sum()) / len(sampler.evaluations)  # of an evaluation
            return run.computed_macs / (macs * reference.evaluations * whole)
        if self.counted:
            return run.computed_macs / reference.computed_macs
        return run.evaluations / reference.evaluations


def _of_pictures(run: Run) -> Tensor:
    """The last latent of each picture: diffusers' DiT pipeline carries both halves of guidance, equal, to the end."""
    return run.sampled.latent if run.images is None else run.sampled.latent[: len(run.images)]


def _path_errors(own: Sequence[Tensor], others: Sequence[Tensor]) -> list[float]:
    """Mean error of the latents after each step, where the steps are the reference's."""
    if len(own) != len(others):
        return []
    return [fmean(latent_errors(*pair)) for pair in zip(own, others, strict=True)]
