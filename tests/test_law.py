"""The law of masked runs, over random networks: what the table says, or an error of ours; never another sample.

A masked sample is compared with an oracle's, which follows the same table with a private copy of every value, drops
nothing, and shares no code with the runtime. `make slow` runs 10,000 networks.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

import stepmask
from stepmask import MaskSchedule, StepmaskError, Trajectory
from stepmask.schedule.forecasts import PLAIN

from random_networks import (
    FORECASTS,
    HARMLESS,
    LOOPS,
    TRAITS,
    Description,
    Network,
    Oracle,
    Table,
    Undefined,
    Wire,
    descriptions,
    sample,
    tables,
    timesteps,
)

Verdict = Literal["right", "refused"]
TOGETHER = (
    ("the network answers a block's answer", "writes the answer"),
    ("the network answers a block's answer", "keeps answers"),
    ("the network answers in a static buffer", "writes the answer"),
    ("the network reads its latent as it is", "writes the latent"),
    ("answers its argument", "writes the latent"),
)
MASKS = st.tuples(*map(tables, FORECASTS))

quick = settings().max_examples <= 100
"""Whether this is `make test`, whose examples are the same ones every time."""


def examples(count: int, slow: int) -> settings:
    """So many networks, and so many in `make slow`."""
    return settings(
        max_examples=count if quick else slow,
        derandomize=quick,
        report_multiple_bugs=False,
        phases=(Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink),  # an explanation takes minutes
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )


def judge(description: Description, masks: Sequence[Table]) -> Verdict:
    """Whether the network was masked right by all computed and by every table, or was refused by any.

    Raises:
        AssertionError: Neither.
        Exception: What came out of our own calls and is none of our errors.
    """
    network = Network(description)
    bare = sample(network, description)
    classes = [type(module) for module in network.modules()]
    try:
        verdict = _masked(network, description, masks, bare)
    except Exception as error:
        error.add_note(str(description))
        raise
    assert [type(module) for module in network.modules()] == classes
    assert torch.equal(sample(network, description), bare), f"the bare network is another after it\n{description}"
    return verdict


def _masked(network: Network, description: Description, masks: Sequence[Table], bare: Tensor) -> Verdict:
    run = partial(sample, network, description)
    try:
        trajectory = stepmask.record(network, run=run)
        wanted: Any = {f"blocks.{number}": wire.reuse for number, wire in enumerate(description.wires)}
        graph = stepmask.trace(network, trajectory, blocks=wanted)
        whole = MaskSchedule.all_compute(graph, trajectory.denoiser, _sampler(trajectory, description))
    except StepmaskError:
        return "refused"
    assert torch.equal(trajectory.sampled.latent, bare), f"recorded another sample\n{description}"
    verdicts = {_follows(network, description, table, whole, bare) for table in (Table(), *masks)}
    return "refused" if "refused" in verdicts else "right"


def _sampler(trajectory: Trajectory, description: Description) -> Any:
    """The loop as recorded; two calls a step told as such where they share a row."""
    sampler = trajectory.sampler
    if description.branches in ("one", "two rows") or sampler.branches == 2:
        return sampler
    return replace(sampler, timesteps=sampler.timesteps[::2], branches=2)


def _follows(network: Network, description: Description, table: Table, whole: MaskSchedule, bare: Tensor) -> Verdict:
    """Whether a masked run is the oracle's, or was refused."""
    schedule = table.of(whole)
    try:
        with stepmask.apply(network, schedule) as masked:
            said = sample(network, description)
            masked.restart()
            again = sample(network, description)
    except StepmaskError:
        return "refused"
    except Exception as error:
        error.add_note(str(table))
        raise
    off = _off(said, description, schedule, bare)
    plain = bool((schedule.forecasts == np.array(PLAIN)).all())
    assert off <= (0.0 if plain else 1e-8), f"a sample off by {off:.3g}, {table}"
    assert torch.equal(said, again), f"another sample at the second run, {table}"
    return "right"


def _off(said: Tensor, description: Description, schedule: MaskSchedule, bare: Tensor) -> float:
    """How far a sample is from the oracle's, which is the bare network's where all is computed; 0 = to the bit."""
    try:
        wanted = sample(Oracle(description, schedule), description)
    except Undefined:
        return torch.inf
    if schedule.rows.all() and (schedule.forecasts == np.array(PLAIN)).all():
        assert torch.equal(wanted, bare), "the oracle is wrong"
    return 0.0 if torch.equal(said, wanted) else float((said - wanted).norm() / wanted.norm())


class TestLaw:
    @examples(200, slow=10_000)
    @given(descriptions(), MASKS)
    def test_a_masked_sample_is_the_tables_or_refused(self, description: Description, masks: Sequence[Table]) -> None:
        judge(description, masks)

    @pytest.mark.parametrize("name", TRAITS)
    def test_of_a_trait(self, name: str) -> None:
        @examples(6, slow=200)
        @given(descriptions(names=HARMLESS, forced=name), MASKS)
        def hold(description: Description, masks: Sequence[Table]) -> None:
            judge(description, masks)

        hold()

    @pytest.mark.parametrize("loop", LOOPS, ids=": ".join)
    def test_of_a_loop(self, loop: tuple[str, str]) -> None:
        @examples(6, slow=200)
        @given(descriptions(names=HARMLESS, loop=loop), MASKS)
        def hold(description: Description, masks: Sequence[Table]) -> None:
            judge(description, masks)

        hold()

    @pytest.mark.parametrize(("name", "sampler"), TOGETHER)
    def test_of_a_sampler_that_writes_into_what_a_block_was_given_or_said(self, name: str, sampler: str) -> None:
        @examples(6, slow=200)
        @given(descriptions(names=HARMLESS, forced=name, loop=("sampler", sampler)), MASKS)
        def hold(description: Description, masks: Sequence[Table]) -> None:
            judge(description, masks)

        hold()

    @examples(50, slow=1000)
    @given(descriptions(names=HARMLESS), MASKS)
    def test_what_is_harmless_is_not_refused(self, description: Description, masks: Sequence[Table]) -> None:
        assert judge(description, masks) == "right", description


class TestRefused:
    """What no table is defined for, whatever the network."""

    @examples(6, slow=200)
    @given(descriptions(names=HARMLESS), tables(), st.permutations(range(4)))
    def test_other_timesteps(self, description: Description, table: Table, order: list[int]) -> None:
        description = replace(description, steps=4, branches="one")
        own = timesteps(description)
        other = [own[place] for place in order]
        assume(other != own)
        network = Network(description)
        trajectory = stepmask.record(network, run=partial(sample, network, description))
        wanted: Any = {f"blocks.{number}": wire.reuse for number, wire in enumerate(description.wires)}
        graph = stepmask.trace(network, trajectory, blocks=wanted)
        schedule = table.of(MaskSchedule.all_compute(graph, trajectory.denoiser, trajectory.sampler))
        with pytest.raises(StepmaskError), stepmask.apply(network, schedule):
            sample(network, description, other)

    @pytest.mark.parametrize("calls", [(3, 3, 1, 1), (1, 1, 3, 3), (2, 2, 1, 3), (4, 2, 1, 1)])
    def test_unequal_numbers_of_calls_a_step(self, calls: tuple[int, ...]) -> None:
        from diffusers import DDIMScheduler

        class Pipeline:
            """As many calls of the denoiser at each step as it is told."""

            def __init__(self) -> None:
                self.transformer = Network(Description((Wire("same", 0, 0, "output"),) * 2))
                self.scheduler = DDIMScheduler()

            def __call__(self, num_inference_steps: int = 4, generator: Any = None) -> Any:
                self.scheduler.set_timesteps(num_inference_steps)
                x = torch.randn(2, 4, generator=generator, dtype=torch.float64)
                for t, count in zip(self.scheduler.timesteps, calls, strict=True):
                    said = sum(self.transformer(x + call, t / 1000) for call in range(count))
                    x = self.scheduler.step(said, t, x, return_dict=False)[0]
                return (x,)

        with pytest.raises(StepmaskError):
            stepmask.record(Pipeline())
