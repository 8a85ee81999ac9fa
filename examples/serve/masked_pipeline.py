"""`MaskedPipeline`: a pipeline under tiers that draws one order after the other, in one thread."""

import copy
import inspect
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Event
from time import perf_counter
from typing import Any

import torch
from torch import nn

import stepmask
from serve.order import Drawn, Order
from stepmask.denoiser.sampler import watched
from stepmask.errors import InvalidLoading, ScheduleMismatch

log = logging.getLogger("serve")


class Cancelled(Exception):
    """A run that nobody waits for any more."""


class MaskedPipeline:
    """A pipeline under tiers that draws one order after the other, in one thread.

    Args:
        pipe: A diffusers pipeline of pictures; from now on it is this object's own.
        tiers: Made for it.
        tier: That it begins with.

    Raises:
        InvalidLoading: It takes no generator, so that no seed could be kept to.
        StepmaskError: The tiers are not for this pipeline.
    """

    def __init__(self, pipe: Any, tiers: stepmask.Tiers, tier: str) -> None:
        if "generator" not in inspect.signature(pipe.__call__).parameters:
            raise InvalidLoading(
                given=f"a {type(pipe).__name__}, which takes no generator",
                expected="a pipeline whose noise can be told by a seed",
                advice="Serve another one",
            )
        self.pipe = pipe
        self.tiers = tiers
        self.tier = tier
        self.evaluation_macs = int(tiers[tier][0].graph.macs.sum())
        self.most_stored = 0
        self.masked = stepmask.apply(pipe, tiers, tier=tier)
        self.is_masked = True

    def draw(self, order: Order, cancelled: Event) -> Drawn:
        """Draw what is asked for: under its tier; or with the bare pipeline where no table fits, if that is asked for.

        Args:
            order: With a tier, a number of steps, and whether the bare pipeline may draw it.
            cancelled: Set when nobody waits for it any more: the run ends with its next step.

        Raises:
            Cancelled: It was cancelled.
            StepmaskError: There is no such tier, no table fits, or the order is none for this pipeline.
        """
        told = order.told(self.pipe)
        self._switch(str(order.tier))
        before = self.masked.computed_macs
        try:
            pictures, seconds, steps = self._run(told, order.seed, cancelled)
        except ScheduleMismatch as refusal:  # before anything was computed
            if not order.fallback:
                raise
            log.warning("Order %s is drawn by the bare pipeline: %s", order.id, refusal)
            with self._bare():
                pictures, seconds, steps = self._run(told, order.seed, cancelled)
            return Drawn(pictures, "bare", seconds, steps * self._branches, 1.0, refusal)
        evaluations = steps * self._branches
        computed = self.masked.computed_macs - before
        share = computed / (self.evaluation_macs * evaluations) if evaluations else 1.0
        return Drawn(pictures, self.tier, seconds, evaluations, share)

    def bare_seconds(self, order: Order) -> float:
        """Seconds of the bare pipeline's call, once it is warm."""
        told = order.told(self.pipe)
        with self._bare():
            self._run(told, order.seed, Event())
            return self._run(told, order.seed, Event())[1]

    @property
    def stored_bytes(self) -> int:
        """What the store holds now; any thread may ask."""
        return self.masked.store_bytes

    @property
    def peak_stored_bytes(self) -> int:
        """The most that the store has held."""
        return max(self.most_stored, self.masked.peak_store_bytes)

    @property
    def _branches(self) -> int:
        """Evaluations of the denoiser at each step."""
        return self.tiers[self.tier][0].sampler.branches

    def _switch(self, tier: str) -> None:
        if tier != self.tier:
            self.masked.switch(tier)
            self.tier = tier

    @contextmanager
    def _bare(self) -> Iterator[None]:
        """The pipeline without its schedules while the context lasts."""
        self.most_stored = self.peak_stored_bytes
        self.is_masked = False  # for good, if the schedules cannot be put on again
        self.masked.remove()
        try:
            yield
        finally:
            self.masked = stepmask.apply(self.pipe, self.tiers, tier=self.tier)
            self.is_masked = True

    def _run(self, told: dict[str, Any], seed: int, cancelled: Event) -> tuple[Any, float, int]:
        """Pictures, seconds and steps of a call of the pipeline; however it ends, nothing of it stays.

        A step's end is where any pipeline can be left: diffusers' own `_interrupt` and callbacks are not known to all,
        and an interrupted call still decodes its latent.
        """
        steps = 0

        def end_step(*_: Any, **__: Any) -> None:
            nonlocal steps
            steps += 1
            if cancelled.is_set():
                raise Cancelled

        generator = torch.Generator("cpu").manual_seed(seed)
        started = perf_counter()
        try:
            with watched(self.pipe.scheduler, "step", end_step):
                pictures = self.pipe(**told, generator=generator, output_type="np").images
        except BaseException:
            self.masked.stop()
            self.pipe.maybe_free_model_hooks()
            raise
        return pictures, perf_counter() - started, steps


def copies(pipe: Any, count: int) -> list[Any]:
    """A bare pipeline, and copies of it: modules and schedulers of their own over the very same weights.

    A schedule's hooks stand on modules, not on weights: pipelines that share modules cannot both be masked.
    """
    parts = [part for part in vars(pipe).values() if isinstance(part, nn.Module)]
    weights = {id(weight): weight for part in parts for weight in (*part.parameters(), *part.buffers())}
    return [pipe, *(copy.deepcopy(pipe, dict(weights)) for _ in range(count - 1))]
