"""`evaluate`: the reference and a masked run on the same seeds, measured side by side."""

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from numbers import Integral
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from stepmask.denoiser.device import device_of
from stepmask.denoiser.identity import claim_for, digest
from stepmask.denoiser.regions import compiled_regions
from stepmask.denoiser.sampling import Sampling
from stepmask.denoiser.tables import schedules_of
from stepmask.errors import InvalidRunFolder, RunError
from stepmask.evaluation.contender import Contender, Fidelity, Timed
from stepmask.evaluation.measure import machine
from stepmask.evaluation.report import Report, Row
from stepmask.executors.filed import Kind, finish
from stepmask.executors.local import Executor, LocalExecutor
from stepmask.files import as_path
from stepmask.progress import progress
from stepmask.schedule.rectify import lower
from stepmask.schedule.schedule import MaskSchedule

REFERENCE = "reference"
SCHEDULE = "schedule"

STEPS = ("num_inference_steps", "steps", "num_steps", "n_steps", "sample_steps")
"""What samplers call their number of steps."""


def evaluate(
    pipe: Any,
    schedule: MaskSchedule,
    *,
    rivals: Mapping[str, Any] | None = None,
    seed: int | Sequence[int] = 1000,
    repeats: int = 3,
    run: Callable[..., Tensor] | None = None,
    executor: Executor | None = None,
    folder: str | bytes | Path | None = None,
    **call: Any,
) -> Report:
    """Measure a schedule against the reference, and rivals against both, on seeds that were not learned from.

        report = stepmask.evaluate(pipe, schedule, class_labels=[1, 2, 3], num_inference_steps=20)
        print(report)

    Every way of sampling runs once per seed to compare samples, and then `repeats` times in this process for the
    denoiser's time and as often for the pipeline's:
    with the first seed, warmed up, and in turns, so that a machine that slows down slows all of them.

    Args:
        pipe: A pipeline, or a plain denoiser with `run`.
        schedule: The schedule.
        rivals: By name: other schedules; the reference with fewer steps, as a number; the reference with other
            arguments, as a mapping (`{"steps": 5}`); or another pipeline, sampled as it is, with whatever other cache
            is enabled on it. What the latter computes is counted, and what other arguments than the number of steps do.
        seed: Of the generator; choose another than the one the schedule was learned with. Of several each is a batch.
        repeats: Timed runs of each: of the denoiser under a stopwatch, and of the pipeline with nothing in front of it.
        run: For a plain denoiser: a function that samples with it and returns the final latent. It is given the seed
            and those of the arguments that it names: `def sample(seed=0, num_inference_steps=10)`. Its number of steps
            may also be called `steps`, `num_steps`, `n_steps` or `sample_steps`.
        executor: Where batches are sampled and compared; `None` = `LocalExecutor()`.
        folder: Finished batches are kept here, and a killed run goes on where it stopped; `None` = nowhere.
        **call: Arguments of the pipeline, or of `run`.

    Raises:
        ScheduleMismatch: A schedule is for another denoiser or sampler.
        RunError: There is no seed or no timed run, rivals share a name with the reference or the schedule, a rival is
            none that can be sampled so, `run` does not name an argument, or different seeds give the same sample.
        InvalidRunFolder: The folder holds results of other weights, or damaged ones; or it is to keep batches of
            something that has no name: another pipeline, a `run`, or arguments such as pictures and functions.
        ClusterError: The executor cannot hand out jobs.
    """
    seeds = [seed] if isinstance(seed, int) else list(seed)
    _check(seeds, repeats, rivals or {})
    _check_rivals(pipe, run, rivals or {})
    if "output_type" in _parameters(pipe):
        call = {"output_type": "np", **call}
    sampling = Sampling(pipe, call, run=run)
    schedules_of(schedule)
    contenders = [Contender(REFERENCE, sampling), Contender(SCHEDULE, sampling, schedule)]
    contenders += [_contender(name, sampling, rival) for name, rival in (rivals or {}).items()]
    if any(_must_be_counted(contender, sampling) for contender in contenders):
        contenders = [replace(each, counted=each.schedule is None) for each in contenders]  # in no plan
    executor, folder = executor or LocalExecutor(), as_path(folder) if folder else None
    batches = finish(_batches(contenders, folder), executor.share(contenders), seeds, executor, folder)
    _check_samples(seeds, [batch[0].sample for batch in batches])
    timed = _timed(contenders, seeds[0], repeats)
    rows = [_row(each, *results) for each, *results in zip(contenders, timed, *batches, strict=True)]
    told = {key: _brief(value) for key, value in call.items()}
    setting = {**told, "seed": seeds[0] if len(seeds) == 1 else _brief(seeds), "repeats": repeats}
    setting |= _placed(sampling.denoiser)
    if schedule.graph.companions:
        setting["MACs"] = f"of {schedule.denoised_by}"
    images = {each.name: own.images for each, own in zip(contenders, timed, strict=True) if own.images is not None}
    return Report(rows, setting, machine(contenders[0].clock.device), images, schedule)


def _placed(denoiser: nn.Module) -> dict[str, Any]:
    """Where a denoiser runs and in which dtype; and that regions of it are compiled, if any are."""
    dtypes = (weight.dtype for weight in denoiser.parameters() if weight.is_floating_point())
    dtype = next(dtypes, torch.get_default_dtype())
    placed = {"device": str(device_of(denoiser)), "dtype": str(dtype).removeprefix("torch.")}
    return {**placed, "compiled": True} if compiled_regions(denoiser) else placed


def _compared(contenders: Sequence[Contender], seed: int) -> list[Fidelity]:
    """A batch of every way of sampling, next to the first one's."""
    reference = contenders[0].counted_run(seed)
    found = [contenders[0].fidelity(reference, reference)]
    for contender in progress(contenders[1:], "sampling"):
        found.append(contender.fidelity(contender.counted_run(seed), reference))
    return found


def _timed(contenders: Sequence[Contender], seed: int, repeats: int) -> list[Timed]:
    """Times of each, in turns; who has not run in this process yet warms up first."""
    for contender in contenders:
        if not contender.warm:
            contender.run(seed)
    found = [Timed() for _ in contenders]
    for contender, own in progress(list(zip(contenders, found, strict=True)) * repeats, "timing"):
        own.add(contender.run(seed), contender.pipeline_ms(seed))
    return found


def _row(contender: Contender, timed: Timed, *batches: Fidelity) -> Row:
    first = batches[0]
    peaks = [batch.peak_bytes for batch in batches if batch.peak_bytes is not None]
    return Row(
        name=contender.name,
        evaluations=first.evaluations,
        macs_planned=lower(contender.schedule).macs_share if contender.schedule else first.macs_executed,
        macs_executed=first.macs_executed,
        latent_errors=[error for batch in batches for error in batch.latent_errors],
        psnr_db=[value for batch in batches for value in batch.psnr_db],
        ssim=[value for batch in batches for value in batch.ssim],
        denoiser_ms=timed.denoiser_ms,
        pipeline_ms=timed.pipeline_ms,
        store_bytes=max(batch.store_bytes for batch in batches),
        peak_bytes=max(peaks) if peaks else None,
        path_errors=[fmean(errors) for errors in zip(*(batch.path_errors for batch in batches), strict=True)],
    )


def _batches(contenders: Sequence[Contender], folder: Path | None) -> Kind[int, list[Fidelity]]:
    """The kind of job that compares a batch; its file is named by what is compared, if it is to be kept."""
    told = _claimed(contenders, folder) if folder else ""
    return Kind("evaluating", _compared, lambda seed: f"batch-{digest(told, seed)}.json", _dump, _load)


def _dump(batch: Sequence[Fidelity]) -> str:
    return json.dumps([asdict(each) for each in batch])


def _load(content: bytes) -> list[Fidelity]:
    return [Fidelity(**each) for each in json.loads(content)]


def _claimed(contenders: Sequence[Contender], folder: Path) -> str:
    """Tie the folder to the denoiser; what tells this comparison from others."""
    sampling = contenders[0].sampling
    if sampling.run or any(contender.sampling.pipe is not sampling.pipe for contender in contenders):
        raise InvalidRunFolder(
            given=f"{folder} to keep results of a function or of another pipeline",
            expected="schedules and numbers of steps, which can be told apart by what they say",
            advice="Leave the folder out",
        )
    claim_for(sampling.pipe, folder)
    return digest(
        [(each.name, dict(each.sampling.call), each.schedule and each.schedule.to_json()) for each in contenders]
    )


def _check(seeds: Sequence[int], repeats: int, rivals: Mapping[str, Any]) -> None:
    if not seeds or repeats < 1 or {REFERENCE, SCHEDULE} & set(rivals):
        raise RunError(
            given=f"{len(seeds)} seeds, repeats={repeats} and rivals {sorted(rivals)}",
            expected="at least one seed and one timed run, and names other than 'reference' and 'schedule'",
            advice="Change the argument",
        )


def _check_rivals(pipe: Any, run: Callable[..., Tensor] | None, rivals: Mapping[str, Any]) -> None:
    """Refuse rivals that cannot be sampled, or would be the reference under another name."""
    sampled = pipe if run is None else run
    for name, rival in rivals.items():
        if isinstance(rival, MaskSchedule):
            continue
        if _is_steps(rival):
            if rival < 1 or _named_steps(sampled) is None:
                raise _no_rival(
                    f"{name!r}, {rival} steps of a sampler that is not told them",
                    "Ask for at least one step, of a pipeline or a run= with a parameter num_inference_steps or steps",
                )
        elif isinstance(rival, Mapping):
            _check_arguments(name, rival, sampled)
        elif run is not None or isinstance(rival, nn.Module) or not callable(rival):
            raise _no_rival(
                f"{name!r}, a {type(rival).__name__}",
                "Evaluate it by itself; run= samples with its own network, whatever the rival is",
            )


def _check_arguments(name: str, rival: Mapping[str, Any], sampled: Any) -> None:
    """Refuse other arguments of the reference that are none, that it does not name, or that are its seed.

    Raises:
        RunError: They are.
    """
    named = _named(sampled)
    unknown = [key for key in rival if key in ("seed", "generator") or (named is not None and key not in named)]
    if unknown or not rival:
        others = sorted((named or set()) - {"seed", "generator"})
        raise _no_rival(
            f"{name!r}, the reference with {f'another {unknown[0]}' if unknown else 'nothing else'}",
            f"Name some of these: {', '.join(others) or 'it has none'}; seeds are those of evaluate(seed=...)",
        )


def _no_rival(given: str, advice: str) -> RunError:
    expected = (
        "schedules, numbers of steps and other arguments of the reference; beside a pipeline also other pipelines"
    )
    return RunError(given=f"the rival {given}", expected=expected, advice=advice)


def _is_steps(rival: Any) -> bool:
    return isinstance(rival, Integral) and not isinstance(rival, bool)


def _named(sampled: Any) -> set[str] | None:
    """The arguments that a pipeline or a function names; `None` if it takes any."""
    parameters = inspect.signature(sampled).parameters
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
        return None
    return set(parameters)


def _named_steps(sampled: Any) -> str | None:
    """What a pipeline or a function calls its number of steps; `None` if it is not told one."""
    named = _named(sampled)
    return next((name for name in STEPS if named is None or name in named), None)


def _must_be_counted(contender: Contender, reference: Sampling) -> bool:
    """Whether neither a plan nor the number of evaluations tells what a contender computes."""
    changed = [
        name for name, value in contender.sampling.call.items() if value is not reference.call.get(name, contender)
    ]
    return contender.sampling.pipe is not reference.pipe or not set(changed) <= set(STEPS)


def _check_samples(seeds: Sequence[int], samples: Sequence[str]) -> None:
    """Refuse seeds that change nothing: one sample would be counted as several."""
    by_sample: dict[str, int] = {}
    for seed, sample in zip(seeds, samples, strict=True):
        if (other := by_sample.setdefault(sample, seed)) != seed:
            raise RunError(
                given=f"the same sample from seed {other} and seed {seed}",
                expected="samples that differ where seeds do",
                advice="Let run= draw its noise with a parameter seed, or from torch's own generator; or pass one seed",
            )


def _contender(name: str, sampling: Sampling, rival: Any) -> Contender:
    if isinstance(rival, MaskSchedule):
        return Contender(name, sampling, rival)
    if _is_steps(rival):
        rival = {_named_steps(sampling.pipe if sampling.run is None else sampling.run): int(rival)}
    if isinstance(rival, Mapping):
        return Contender(name, replace(sampling, call={**sampling.call, **rival}))
    return Contender(name, replace(sampling, pipe=rival))


def _parameters(pipe: Any) -> list[str]:
    """Names of a pipeline's arguments; none for a plain denoiser."""
    return [] if isinstance(pipe, nn.Module) else list(inspect.signature(pipe.__call__).parameters)


def _brief(value: Any) -> Any:
    """A setting as it is shown: long lists by their length."""
    return f"{len(value)} of them" if isinstance(value, list | tuple) and len(value) > 32 else value
