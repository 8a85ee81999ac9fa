"""Watching a scheduler: any number at once, gone without a trace in any order, and never on a copy."""

import copy
import inspect
import itertools
import pickle
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

import stepmask
from pipelines import dit
from promises import random_table
from stepmask.denoiser.sampler import describe_steps, watched
from stepmask.schedule.rectify import lower

from toys import tiny_dit

SCHEDULERS = (diffusers.DDIMScheduler, diffusers.FlowMatchEulerDiscreteScheduler, diffusers.UniPCMultistepScheduler)


class Counter:
    """A scheduler whose step counts, on the object that it is called on."""

    def __init__(self) -> None:
        self.timesteps, self.taken = torch.arange(0), 0

    def set_timesteps(self, steps: int) -> None:
        self.timesteps, self.taken = torch.arange(steps), 0

    def step(self, output: Any, timestep: Any, sample: Any) -> tuple[Any]:
        self.taken += 1
        return (sample,)


def step(scheduler: Any, times: int = 1) -> None:
    for _ in range(times):
        scheduler.step(torch.ones(1), 0, torch.ones(1))


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_watchers_leave_in_any_order(order: tuple[int, ...]) -> None:
    scheduler, heard = Counter(), list[int]()
    before = dict(vars(scheduler))
    stacks = [ExitStack() for _ in order]
    for number, stack in enumerate(stacks):
        stack.enter_context(watched(scheduler, "step", lambda *_, number=number: heard.append(number)))
    there = set(range(3))
    for leaves in order:
        heard.clear()
        step(scheduler)
        assert heard == sorted(there)
        stacks[leaves].close()
        stacks[leaves].close()  # twice is fine
        there.remove(leaves)
    heard.clear()
    step(scheduler)
    assert not heard
    assert vars(scheduler).keys() == before.keys()
    assert scheduler.taken == 4


def test_one_function_may_listen_twice() -> None:
    scheduler, heard = Counter(), list[Any]()
    after: Callable[..., None] = lambda *args: heard.append(args)  # noqa: E731
    with watched(scheduler, "step", after):
        with watched(scheduler, "step", after):
            step(scheduler)
        step(scheduler)
    assert len(heard) == 3


def test_what_the_instance_had_itself_is_put_back() -> None:
    scheduler = Counter()
    own = lambda *_: ("mine",)  # noqa: E731
    scheduler.step = own  # type: ignore[method-assign]
    first, second = ExitStack(), ExitStack()
    heard: list[Any] = []
    for stack in (first, second):
        stack.enter_context(watched(scheduler, "step", lambda result, *_: heard.append(result)))
    scheduler.step(1, 2, 3)
    assert heard == [("mine",)] * 2
    first.close()
    second.close()
    assert vars(scheduler)["step"] is own


def test_what_somebody_puts_in_front_meanwhile_stays() -> None:
    scheduler, heard = Counter(), list[Any]()
    with watched(scheduler, "step", lambda *_: heard.append(1)):
        under = scheduler.step
        in_front = lambda *args: under(*args)  # noqa: E731
        scheduler.step = in_front  # type: ignore[method-assign]
        step(scheduler)
    assert heard == [1]
    assert vars(scheduler)["step"] is in_front
    step(scheduler)
    assert heard == [1]
    assert scheduler.taken == 2
    assert vars(scheduler).keys() == {"timesteps", "taken", "step"}


def test_an_exception_of_a_listener_leaves_nothing() -> None:
    scheduler = Counter()

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), watched(scheduler, "step", stop):
        step(scheduler)
    assert vars(scheduler).keys() == {"timesteps", "taken"}


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy, "copy": copy.copy, "pickle": lambda value: pickle.loads(pickle.dumps(value)),
    "inside another object": lambda value: copy.deepcopy({"scheduler": [value]})["scheduler"][0],
}  # fmt: skip


@pytest.mark.parametrize("way", COPIES)
def test_a_copy_is_bare_and_acts_on_itself(way: str) -> None:
    scheduler, heard = Counter(), list[Any]()
    with (
        watched(scheduler, "step", lambda *_: heard.append("step")),
        watched(scheduler, "set_timesteps", lambda *_: heard.append("set")),
    ):
        scheduler.set_timesteps(4)
        step(scheduler)
        other = COPIES[way](scheduler)
        other.set_timesteps(7)
        step(other, times=3)
        assert (len(scheduler.timesteps), len(other.timesteps)) == (4, 7)
        assert (scheduler.taken, other.taken) == (1, 3)
        assert vars(other).keys() == {"timesteps", "taken"}
        assert heard == ["set", "step"]
    step(other)
    assert other.taken == 4


def test_a_copy_keeps_what_the_user_put_on_the_instance() -> None:
    scheduler = Counter()
    scheduler.step = print  # type: ignore[method-assign, assignment]
    with watched(scheduler, "step", lambda *_: None):
        assert vars(copy.deepcopy(scheduler))["step"] is print


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_a_real_scheduler_is_copied_and_described_while_it_is_watched(kind: type[Any]) -> None:
    scheduler = kind()
    signature = inspect.signature(scheduler.set_timesteps)
    bare = describe_steps(scheduler, 6)
    with watched(scheduler, "set_timesteps", lambda *_, **__: None), watched(scheduler, "step", lambda *_, **__: None):
        assert inspect.signature(scheduler.set_timesteps) == signature  # pipelines look whether it takes sigmas
        scheduler.set_timesteps(4)
        other = copy.deepcopy(scheduler)
        other.set_timesteps(7)
        sample = torch.ones(1, 4, 2, 2)
        other.step(sample, other.timesteps[0], sample)
        assert (len(scheduler.timesteps), scheduler.config) == (4, other.config)
        assert describe_steps(scheduler, 6) == bare
        assert not {"step", "set_timesteps", "__getstate__"} & vars(other).keys()
    assert not {"step", "set_timesteps", "__getstate__"} & vars(scheduler).keys()


class WithSound:
    """A pipeline that copies its scheduler inside the call for a second latent, as LTX2 does for its sound."""

    def __init__(self, transformer: Any) -> None:
        self.transformer, self.scheduler = transformer, diffusers.FlowMatchEulerDiscreteScheduler()

    def __call__(self, num_inference_steps: int = 4, generator: Any = None) -> tuple[Tensor, Tensor]:
        self.scheduler.set_timesteps(num_inference_steps)
        of_sound = copy.deepcopy(self.scheduler)
        of_sound.set_timesteps(num_inference_steps)
        x, sound = torch.randn(1, 4, 8, 8, generator=generator), torch.ones(1, 4)
        for t in self.scheduler.timesteps:
            labels = torch.zeros(1, dtype=torch.long)
            out = self.transformer(x, t.expand(1), class_labels=labels, return_dict=False)[0][:, :4]
            x = self.scheduler.step(out, t, x, return_dict=False)[0]
            sound = of_sound.step(sound * 0.1, t, sound, return_dict=False)[0]
        return x, sound


def test_a_pipeline_that_copies_its_scheduler_is_recorded_and_masked() -> None:
    pipe = WithSound(tiny_dit())
    with torch.no_grad():
        bare = pipe(generator=torch.Generator().manual_seed(0))
    trajectory = stepmask.record(pipe)
    assert (trajectory.steps, trajectory.sampler.branches) == (4, 1)
    assert torch.equal(trajectory.sampled.latent, bare[0])
    table = random_table(pipe, trajectory)
    with stepmask.apply(pipe, table) as masked, torch.no_grad():
        x, sound = pipe(generator=torch.Generator().manual_seed(0))
        assert masked.computed_macs == lower(table).macs
    assert not torch.equal(x, bare[0])
    assert torch.equal(sound, bare[1])


def test_two_masks_on_one_scheduler_are_removed_in_any_order() -> None:
    (first, call), (second, _) = dit(), dit()
    call = {**call, "num_inference_steps": 4, "output_type": "np"}
    second.register_modules(scheduler=first.scheduler)
    table = random_table(first, stepmask.record(first, **call))
    masks = [stepmask.apply(pipe, table) for pipe in (first, second)]
    masks[0].remove()
    with_mask = second(**call, generator=torch.Generator().manual_seed(0)).images
    masks[0].remove()
    masks[1].remove()
    assert not {"step", "set_timesteps"} & vars(first.scheduler).keys()
    without = second(**call, generator=torch.Generator().manual_seed(0)).images
    assert (with_mask != without).any()
