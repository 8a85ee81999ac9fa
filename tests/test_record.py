"""What `record` takes for a run, how it repeats it, and what it refuses, for the reason that is the true one."""

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from torch import Tensor, nn

import stepmask
from denoisers import stirred
from pipelines import STEPS, autoencoder, dit, make, stable_diffusion
from stepmask.denoiser.call import TIMESTEPS, Call, timestep_of_call
from stepmask.denoiser.modes import Autocast, autocast_now
from stepmask.denoiser.steps import evaluations_counted
from stepmask.denoiser.values import tensors
from stepmask.errors import AlreadyApplied, LearningError, RunError, ScheduleMismatch
from stepmask.learning.per_timestep import PerTimestep
from stepmask.learning.trained import TrainedForecasts
from stepmask.schedule.baselines import fixed_interval

Run = Callable[..., Tensor]


class Network(nn.Module):
    """Two layers beside a stream; a time and a label are added, if there are any."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

    def forward(self, x: Tensor, t: float = 0.0, label: Tensor | None = None) -> Tensor:
        x = x + t if label is None else x + t + label
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return x


@pytest.fixture
def network() -> Network:
    return Network().eval()


def noise(seed: int = 0, rows: int = 2) -> Tensor:
    return torch.randn(rows, 4, generator=torch.Generator().manual_seed(seed))


def counted(network: Network, calls: list[int]) -> Run:
    """A loop of two-call guidance with as many calls a step, at equal timesteps and of one latent."""

    def run() -> Tensor:
        x = noise()
        for step, count in enumerate(calls):
            t = 1 - step / len(calls)
            x = x - 0.1 * sum(network(x, t, torch.full((4,), float(number))) for number in range(count))
        return x

    return run


def all_compute(network: nn.Module, trajectory: stepmask.Trajectory) -> stepmask.MaskSchedule:
    graph = stepmask.trace(network, trajectory, blocks={"layers.*": "output"})
    return stepmask.MaskSchedule.all_compute(graph, trajectory.denoiser, trajectory.sampler)


class TestPlainLoops:
    @pytest.mark.parametrize("branches", [1, 2, 3])
    def test_calls_at_one_timestep_are_branches_of_a_step(self, network: Network, branches: int) -> None:
        trajectory = stepmask.record(network, run=counted(network, [branches] * 4))
        assert trajectory.sampler.branches == branches
        assert trajectory.sampler.timesteps == (1.0, 0.75, 0.5, 0.25)
        assert (trajectory.steps, len(trajectory.calls)) == (4, 4 * branches)

    def test_branches_need_not_be_given_the_same_latent(self, network: Network) -> None:
        def run() -> Tensor:
            x = noise()
            for step in range(5):
                a, b = network(x, 1 - step / 5), network(x + 0.1, 1 - step / 5)
                x = x - 0.1 * (2 * a - b)
            return x

        trajectory = stepmask.record(network, run=run)
        assert (trajectory.steps, trajectory.sampler.branches) == (5, 2)

    def test_guidance_in_two_calls_is_learned_for_and_masked(self, network: Network) -> None:
        run = counted(network, [2] * 6)
        trajectory = stepmask.record(network, run=run)
        table = fixed_interval(all_compute(network, trajectory), 0.6)
        schedule = stepmask.learn(network, trajectory, 0.6, graph=table.graph, learner=TrainedForecasts(passes=1.2))
        assert (schedule.steps, schedule.sampler.branches) == (6, 2)
        report = stepmask.evaluate(network, schedule, run=run, repeats=1)
        assert report.rows[1].macs_executed == pytest.approx(report.rows[1].macs_planned)
        assert 0 < report.rows[1].latent_errors[0] < 1

    def test_a_pipeline_s_call_may_be_the_loop(self) -> None:
        """As for Wan 2.2, which has two denoisers and is guided in two calls."""
        pipe, call = make("WanPipeline")

        def run(seed: int) -> Tensor:
            latent: Tensor = pipe(**call, generator=torch.Generator().manual_seed(seed)).frames
            return latent

        whole, plain = stepmask.record(pipe, **call), stepmask.record(pipe.transformer, run=run)
        assert (plain.sampler.timesteps, plain.sampler.branches) == (whole.sampler.timesteps, 2)
        assert torch.equal(plain.sampled.latent, whole.sampled.latent)

    @pytest.mark.parametrize(
        ("calls", "starts"),
        [
            ([2, 2, 1, 1], ()),
            ([1, 2, 2, 1], (1,)),
            ([4, 4, 2], ()),
            ([1, 2, 2, 2], (1,)),  # as Heun's, but of one latent
        ],
    )
    def test_guidance_in_part_of_the_steps_is_recorded(
        self, network: Network, calls: list[int], starts: tuple[int, ...]
    ) -> None:
        sampler = stepmask.record(network, run=counted(network, calls)).sampler
        assert sampler.course.present == tuple(tuple(range(count)) for count in calls)
        assert (sampler.branches, sampler.course.starts) == (max(calls), starts)

    def test_guidance_that_ends_is_refused_where_nothing_tells_which_half_goes_on(self, network: Network) -> None:
        def run() -> Tensor:
            x = noise()
            for step in range(4):
                x = x - 0.1 * sum(network(x, 1 - step / 4) for _ in range(2 if step < 2 else 1))
            return x

        with pytest.raises(RunError, match="step 2, which evaluates 1 of 2 branches of guidance, and no argument that"):
            stepmask.record(network, run=run)

    def test_a_batch_that_changes_is_refused(self, network: Network) -> None:
        def run() -> Tensor:
            x = noise()
            for step in range(6):
                doubled = torch.cat([x, x]) if 2 <= step < 4 else x
                x = x - 0.1 * network(doubled, 1 - step / 6)[:2]
            return x

        with pytest.raises(RunError, match="step 0, which evaluates 1 of 2 branches of guidance, and no argument that"):
            stepmask.record(network, run=run)

    def test_an_answer_whose_shape_changes_begins_the_run_anew(self) -> None:
        class Growing(nn.Module):
            calls = 0

            def forward(self, x: Tensor, t: float) -> Tensor:
                self.calls += 1
                return x if self.calls < 3 else torch.cat([x, x], 1)

        network = Growing()

        def run() -> Tensor:
            network.calls = 0
            return torch.cat([network(noise(), t) for t in (0.9, 0.8, 0.7, 0.6)], 1)

        assert stepmask.record(network, run=run).sampler.course.starts == (2,)

    def test_a_run_whose_steps_are_mostly_unlike_is_refused(self) -> None:
        class Growing(nn.Module):
            def forward(self, x: Tensor, t: float) -> Tensor:
                return x * t

        network = Growing()

        def run() -> Tensor:
            return torch.cat([network(torch.ones(2, 4 + step), 1 - step / 6) for step in range(6)], 1)

        with pytest.raises(RunError, match="5 of which are called in another form than the one before"):
            stepmask.record(network, run=run)

    def test_what_is_given_at_some_steps_only_is_no_change_of_shape(self, network: Network) -> None:
        def run() -> Tensor:
            x = noise()
            for step in range(4):
                x = x - 0.1 * network(x, 1 - step / 4, torch.ones(4) if step < 2 else None)
            return x

        assert stepmask.record(network, run=run).steps == 4


def heun(network: Network, steps: int = 4) -> Tensor:
    """Evaluations at t0, t1 t1, t2 t2, t3 t3: the corrector of one step, then the predictor of the next."""
    x, h = noise(), 1 / steps
    for step in range(steps):
        t = 1 - step * h
        slope = network(x, t)
        ahead = x - h * slope
        x = ahead if step == steps - 1 else x - h * (slope + network(ahead, t - h)) / 2
    return x


def guided_heun(network: Network, steps: int = 4) -> Tensor:
    class Guided:
        def __call__(self, x: Tensor, t: float) -> Tensor:
            return 2 * network(x, t, torch.ones(4)) - network(x, t)

    return heun(Guided(), steps)  # type: ignore[arg-type]


def linear_multistep(network: Network) -> Tensor:
    """As PLMS begins: twice at the second timestep, once at the others."""
    x, times = noise(), [1.0, 0.75, 0.5, 0.25]
    first = network(x, times[0])
    slope = (first + network(x - 0.25 * first, times[1])) / 2
    for t in times[1:]:
        x = x - 0.25 * slope
        slope = network(x, t)
    return x - 0.25 * slope


def langevin(network: Network) -> Tensor:
    """Annealed: three steps at each of four levels."""
    x = noise()
    for t in (1.0, 0.75, 0.5, 0.25):
        for _ in range(3):
            x = x - 0.1 * network(x, t)
    return x


def without_time(network: Network) -> Tensor:
    x = noise()
    for _ in range(4):
        x = x - 0.1 * network(x)
    return x


def at_one_time(network: Network) -> Tensor:
    x = noise()
    for _ in range(4):
        x = x - 0.1 * network(x, 0.5)
    return x


class TestEvaluationsThatDependOnEachOther:
    """Each is a step of its own, as it always was."""

    @pytest.mark.parametrize(
        ("loop", "timesteps"),
        [
            (heun, (1, 0.75, 0.75, 0.5, 0.5, 0.25, 0.25)),
            (linear_multistep, (1, 0.75, 0.75, 0.5, 0.25)),
            (langevin, (1, 1, 1, 0.75, 0.75, 0.75, 0.5, 0.5, 0.5, 0.25, 0.25, 0.25)),
            (without_time, (0, 1, 2, 3)),
            (at_one_time, (0.5,) * 4),
        ],
    )
    def test_they_are_no_branches(
        self, network: Network, loop: Callable[[Network], Tensor], timesteps: tuple[float, ...]
    ) -> None:
        trajectory = stepmask.record(network, run=lambda: loop(network))
        assert (trajectory.sampler.timesteps, trajectory.sampler.branches) == (timesteps, 1)
        with torch.no_grad():
            assert torch.equal(trajectory.sampled.latent, loop(network))

    def test_but_two_that_do_not_are_at_each_of_them(self, network: Network) -> None:
        trajectory = stepmask.record(network, run=lambda: guided_heun(network))
        assert trajectory.sampler.timesteps == (1, 0.75, 0.75, 0.5, 0.5, 0.25, 0.25)
        assert trajectory.sampler.branches == 2

    def test_the_denoiser_is_not_run_again_to_find_out(self, network: Network) -> None:
        runs: list[int] = []
        with network.register_forward_hook(lambda *_: runs.append(1)):
            trajectory = stepmask.record(network, run=lambda: heun(network))
        assert len(runs) == len(trajectory.calls) == 7

    def test_a_schedule_that_was_made_for_them_goes_on(self, network: Network) -> None:
        trajectory = stepmask.record(network, run=lambda: langevin(network))
        with stepmask.apply(network, fixed_interval(all_compute(network, trajectory), 0.5)):
            again = trajectory.sampling()
        assert not torch.equal(again.latent, trajectory.sampled.latent)


class TestBranchesThatAreTold:
    def test_they_are_taken(self, network: Network) -> None:
        trajectory = stepmask.record(network, run=lambda: langevin(network), branches=3)
        assert (trajectory.sampler.timesteps, trajectory.sampler.branches) == ((1, 0.75, 0.5, 0.25), 3)

    def test_without_timesteps_steps_are_numbered(self, network: Network) -> None:
        trajectory = stepmask.record(network, run=lambda: without_time(network), branches=2)
        assert (trajectory.sampler.timesteps, trajectory.sampler.branches) == ((0, 1), 2)

    @pytest.mark.parametrize("branches", [0, 3, -1])
    def test_a_number_that_does_not_divide_is_refused(self, network: Network, branches: int) -> None:
        with pytest.raises(RunError, match=f"branches={branches} for 4 evaluations"):
            stepmask.record(network, run=lambda: at_one_time(network), branches=branches)

    def test_several_timesteps_in_a_step_are_refused(self, network: Network) -> None:
        with pytest.raises(RunError, match=r"branches=2, and timesteps 1, 0\.75 at step 0"):
            stepmask.record(network, run=counted(network, [1] * 4), branches=2)

    def test_a_pipeline_s_are_counted(self) -> None:
        pipe, call = make("DiTPipeline")
        assert stepmask.record(pipe, branches=1, **call).sampler.branches == 1
        with pytest.raises(RunError, match="branches=2, and 1 evaluations at the fullest step"):
            stepmask.record(pipe, branches=2, **call)


class TestOrder:
    """Guidance in several calls: each has a store of its own, told by its place within the step."""

    @staticmethod
    def loop(network: nn.Module, conditions: Sequence[Any], orders: Sequence[Sequence[int]]) -> Run:
        def run() -> Tensor:
            x = noise()
            for step, order in enumerate(orders):
                said = {place: network(x, 1 - step / len(orders), conditions[place]) for place in order}
                x = x - 0.1 * sum((place + 1) * said[place] for place in sorted(said))
            return x

        return run

    @pytest.mark.parametrize(
        "orders",
        [
            [(0, 1), (1, 0), (0, 1), (1, 0)],
            [(0, 1), (0, 1), (0, 1), (1, 0)],
            [(0, 1, 2), (0, 1, 2), (1, 2, 0)],
            [(0, 1, 2), (0, 2, 1), (0, 1, 2)],
        ],
    )
    @pytest.mark.parametrize("kind", [lambda number: torch.full((4,), float(number)), float, lambda number: [number]])
    def test_one_that_changes_is_refused(self, kind: Callable[[int], Any], orders: Sequence[Sequence[int]]) -> None:
        network = Labelled().eval()
        conditions = [kind(number) for number in range(3)]
        with pytest.raises(RunError, match=r"evaluations a step in changing order: .* as 'label'"):
            stepmask.record(network, run=self.loop(network, conditions, orders))
        same = self.loop(network, conditions, [orders[0]] * len(orders))
        assert stepmask.record(network, run=same).sampler.branches == len(orders[0])

    def test_prompts_that_change_from_step_to_step_are_in_order(self, network: Network) -> None:
        def run() -> Tensor:
            x = noise()
            for step in range(4):
                said = [network(x, 1 - step / 4, torch.full((4,), float(step + more))) for more in (0, 1)]
                x = x - 0.1 * (2 * said[1] - said[0])
            return x

        assert stepmask.record(network, run=run).sampler.branches == 2

    def test_two_calls_for_one_prompt_are_in_order(self, network: Network) -> None:
        run = self.loop(network, [torch.ones(4), torch.ones(4)], [(0, 1), (1, 0), (0, 1)])
        assert stepmask.record(network, run=run).sampler.branches == 2


class Labelled(Network):
    """Takes its label as a tensor, a number or a list of one."""

    def forward(self, x: Tensor, t: float = 0.0, label: Any = None) -> Tensor:
        return super().forward(x, t, torch.as_tensor(label[0] if isinstance(label, list) else label))


@dataclass
class Unregistered:
    """An output class that torch's pytree does not know."""

    sample: Any


class TestDenoisersThatAreRefused:
    @pytest.mark.parametrize("answer", [Unregistered, lambda x: SimpleNamespace(x=x), lambda x: x.detach().numpy()])
    def test_an_answer_without_a_tensor(self, answer: Callable[[Tensor], Any]) -> None:
        class Odd(Network):
            def forward(self, x: Tensor, t: float = 0.0, label: Tensor | None = None) -> Any:
                return answer(super().forward(x, t))

        odd = Odd().eval()
        with torch.no_grad():
            name = type(odd(noise())).__name__
        with pytest.raises(RunError, match=f"answers with a {name}, in which no tensor was found"):
            stepmask.record(odd, run=lambda: (odd(noise(), 0.5), noise())[1])

    def test_one_that_calls_itself(self) -> None:
        class Unbatched(Network):
            def forward(self, x: Tensor, t: float = 0.0, label: Tensor | None = None) -> Tensor:
                return super().forward(x, t) if x.ndim == 2 else self(x[None], t)[0]

        own = Unbatched().eval()
        with pytest.raises(RunError, match="a denoiser that calls itself, in evaluation 1"):
            stepmask.record(own, run=lambda: own(own(noise(), 1.0)[0], 0.5))
        assert stepmask.record(own, run=lambda: own(own(noise(), 1.0), 0.5)).steps == 2

    def test_one_that_failed_in_between(self) -> None:
        class Failing(Network):
            def forward(self, x: Tensor, t: float = 0.0, label: Tensor | None = None) -> Tensor:
                if t > 1:
                    raise ValueError(t)
                return super().forward(x, t)

        failing = Failing().eval()

        def run() -> Tensor:
            with suppress(ValueError):
                failing(noise(), 2.0)
            return failing(noise(), 0.5)

        with pytest.raises(RunError, match="goes on after an evaluation of the denoiser has failed: ValueError"):
            stepmask.record(failing, run=run)

    def test_a_refusal_that_the_run_catches_is_one_all_the_same(self, network: Network) -> None:
        def run() -> Tensor:
            with suppress(RuntimeError):  # as one that falls back when memory runs out
                return torch.vmap(network)(noise())
            return network(noise(), 0.5)

        with pytest.raises(RunError, match=r"inside torch\.vmap"):
            stepmask.record(network, run=run)

    @pytest.mark.parametrize("steps", [1, 2])
    def test_one_inside_vmap(self, network: Network, steps: int) -> None:
        def run() -> Tensor:
            x = noise()
            for _ in range(steps):
                x = x - 0.1 * torch.vmap(network)(x)
            return x

        with pytest.raises(RunError, match=r"inside torch\.vmap"):
            stepmask.record(network, run=run)

    def test_but_one_may_be_differentiated(self, network: Network) -> None:
        def run() -> Tensor:
            x = noise()
            for step in range(2):
                x = x - 0.1 * torch.func.grad(lambda y, t: network(y, t).square().sum())(x, 1 - step / 2)
            return x.detach()

        assert stepmask.record(network, run=run).steps == 2


class TestMissingData:
    """A condition that marks what is missing by NaN."""

    def test_it_is_kept_once_for_all_calls(self, network: Network) -> None:
        condition = torch.tensor([1.0, 2.0, torch.nan, 4.0])

        def run() -> Tensor:
            x = noise()
            for step in range(3):
                x = x - 0.1 * network(x, 1 - step / 3, condition.clone()).nan_to_num()
            return x

        first, *others = stepmask.record(network, run=run).calls
        assert all(call.args[2] is first.args[2] for call in others)

    def test_calls_that_are_given_it_are_branches(self, network: Network) -> None:
        latent = torch.cat([noise(), torch.full((1, 4), torch.nan)])

        def run() -> Tensor:
            x = latent.clone()
            for step in range(3):
                said = [network(x.clone(), 1 - step / 3, torch.full((4,), label)) for label in (1.0, 2.0)]
                x = x - 0.1 * (2 * said[0] - said[1])
            return x[:-1]

        assert stepmask.record(network, run=run).sampler.branches == 2

    def test_the_same_numbers_in_another_dtype_are_kept_as_they_are(self, network: Network) -> None:
        def run() -> Tensor:
            x = noise()
            for dtype in (torch.float32, torch.float64):
                x = x - 0.1 * network(x, torch.ones(4, dtype=dtype)).float()
            return x

        network.double()
        network.forward = lambda x, t: Network.forward(network, x.double(), t)  # type: ignore[method-assign]
        calls = stepmask.record(network, run=run).calls
        assert [call.args[1].dtype for call in calls] == [torch.float32, torch.float64]


def test_the_timestep_of_a_call() -> None:
    x = torch.ones(2)
    assert timestep_of_call(Call((x, 0.5), {}), 3) == 0.5
    assert timestep_of_call(Call((x, torch.tensor([0.0, 0.5])), {}), 3) == 0.5
    assert timestep_of_call(Call((x,), {"sigma": 2}), 3) == 2
    assert timestep_of_call(Call((x,), {"label": 2}), 3) == 3


@pytest.mark.parametrize("name", TIMESTEPS)
def test_the_timestep_has_many_names(name: str) -> None:
    x, prompt = torch.ones(3, 4), torch.full((3, 4), 7.0)
    assert timestep_of_call(Call((x, prompt, 0.5), {}), 3, ("x", "context", name)) == 0.5
    assert timestep_of_call(Call((x, prompt), {name: 0.5}), 3, ("x", "context", name)) == 0.5
    assert timestep_of_call(Call((x, 0.5), {name: None}), 3) == 0.5


@pytest.mark.parametrize(
    "told",
    [
        *(kind(2) for kind in (int, float, Fraction, np.float32, np.float16, np.int64, np.uint8, np.array)),
        *(np.array([0, 2]), torch.tensor(2), torch.tensor([0.0, 2.0])),
        *(torch.tensor([2]), torch.tensor([[2.0], [1.0]]), np.array([[[2.0]]])),
    ],
)
def test_the_timestep_is_any_number(told: Any) -> None:
    x = torch.ones(2, 4)
    assert timestep_of_call(Call((x, told), {}), 3) == 2
    assert timestep_of_call(Call((x,), {"t": told}), 3) == 2


@pytest.mark.parametrize(
    "prompt",
    [
        *(torch.ones(2, 4), torch.ones(3), torch.ones(1, 2), np.ones((2, 4)), torch.ones(0), np.ones(0)),
        *("a prompt", None, np.str_("a prompt"), 1 + 2j, torch.ones((), dtype=torch.complex64), np.complex64(1)),
    ],
)
def test_a_prompt_is_no_timestep(prompt: Any) -> None:
    assert timestep_of_call(Call((torch.full((2, 4), 5.0), prompt), {}), 3) == 3


def test_samples_in_a_list_are_counted() -> None:
    latents = [torch.ones(4, 1, 2), torch.ones(4, 1, 3)]
    assert timestep_of_call(Call((latents, torch.tensor([0.0, 0.5])), {}), 3) == 0.5
    assert timestep_of_call(Call((latents, torch.ones(4)), {}), 3) == 3


class TestNumpyTimesteps:
    @pytest.mark.parametrize("kind", [np.float32, np.float64, np.int64])
    def test_they_are_read_as_python_s(self, network: Network, kind: Any) -> None:
        def loop(timesteps: Sequence[Any]) -> Run:
            def run() -> Tensor:
                x = noise()
                for t in timesteps:
                    said = [network(x, t, torch.full((4,), label)) for label in (0.0, 1.0)]
                    x = x - 0.01 * (said[1] + 0.5 * (said[1] - said[0]))
                return x

            return run

        timesteps = np.arange(4, 0, -1).astype(kind)
        trajectory = stepmask.record(network, run=loop(list(timesteps)))
        assert trajectory.sampler == stepmask.record(network, run=loop(timesteps.tolist())).sampler
        assert (trajectory.sampler.branches, trajectory.sampler.timesteps) == (2, (4, 3, 2, 1))

        schedule = fixed_interval(all_compute(network, trajectory), 0.5)
        with stepmask.apply(network, schedule), pytest.raises(ScheduleMismatch, match="timestep 9 at step 1"):
            loop([4, *timesteps[1:] ** 2])()


class Uneven:
    """A pipeline of as many calls a step as it is told, for each step."""

    def __init__(self, calls: list[int]) -> None:
        self.transformer, self.scheduler, self.calls = Network().eval(), diffusers.DDIMScheduler(), calls

    def __call__(self, generator: torch.Generator) -> tuple[Tensor]:
        self.scheduler.set_timesteps(len(self.calls))
        x = torch.randn(2, 4, generator=generator)
        for t, count in zip(self.scheduler.timesteps, self.calls, strict=True):
            said = [self.transformer(x, 0.001 * float(t), torch.full((4,), float(number))) for number in range(count)]
            x = self.scheduler.step(torch.stack(said).mean(0), t, x, return_dict=False)[0]
        return (x,)


class OwnScheduler:
    """Four steps of Euler's method; how `step` answers and what `timesteps` are is told."""

    def __init__(self, answer: Callable[[Tensor], Any] = lambda x: x, held: Callable[[Tensor], Any] = lambda x: x):
        self.answer, self.held = answer, held

    def set_timesteps(self) -> None:
        self.timesteps = self.held(torch.tensor([1.0, 0.75, 0.5, 0.25]))

    def step(self, eps: Tensor, time: float, x: Tensor) -> Any:
        return self.answer(x - 0.25 * eps)


class OwnPipeline:
    """A pipeline that samples with a scheduler of one's own, and takes its answers apart itself."""

    def __init__(self, scheduler: Any, by_name: bool = False) -> None:
        self.unet, self.scheduler, self.by_name = Network().eval(), scheduler, by_name

    def __call__(self, generator: torch.Generator) -> Tensor:
        self.scheduler.set_timesteps()
        x = torch.randn(2, 4, generator=generator)
        for t in self.scheduler.timesteps:
            eps = self.unet(x, float(t))
            call = self.scheduler.step
            call(x=x, time=t, eps=eps) if self.by_name else call(eps, t, x)
            x = x - 0.25 * eps
        return x


class TestOwnSchedulers:
    """A scheduler that is not diffusers' may answer and be called as it likes, or is refused for the true reason."""

    ANSWERS = (
        *(lambda x: x, lambda x: (x, 3), lambda x: [x], lambda x: {"prev_sample": x}),
        *(lambda x: SimpleNamespace(prev_sample=x), lambda x: DDIMSchedulerOutput(prev_sample=x)),
    )

    @pytest.mark.parametrize("by_name", [False, True])
    @pytest.mark.parametrize("answer", ANSWERS)
    @pytest.mark.parametrize("held", [lambda x: x, list, torch.Tensor.tolist, torch.Tensor.numpy])
    def test_all_are_recorded_alike(self, answer: Any, held: Any, by_name: bool) -> None:
        pipe = OwnPipeline(OwnScheduler(answer, held), by_name)
        trajectory = stepmask.record(pipe)
        assert torch.equal(trajectory.sampled.latent, trajectory.sampled.output)
        assert torch.equal(trajectory.sampling.latent(), trajectory.sampled.output)
        assert trajectory.sampler.timesteps == (1.0, 0.75, 0.5, 0.25)
        assert [*map(torch.equal, trajectory.sampled.handed, trajectory.outputs)] == [True] * 4

    def test_one_is_learned_for_and_masked(self) -> None:
        pipe = OwnPipeline(OwnScheduler(held=torch.Tensor.tolist))
        trajectory = stepmask.record(pipe)
        schedule = fixed_interval(all_compute(pipe.unet, trajectory), 0.5)
        with stepmask.apply(pipe, schedule):
            masked = stepmask.record(pipe).sampled.latent
        assert not torch.equal(masked, trajectory.sampled.latent)
        assert stepmask.learn(pipe, trajectory, 0.9).steps == 4

    @pytest.mark.parametrize("answer", [lambda x: None, lambda x: (), lambda x: {"x": x}, lambda x: x.numpy()])
    def test_an_answer_without_a_latent_is_refused(self, answer: Any) -> None:
        with pytest.raises(RunError, match=r"step returns a .* without a latent"):
            stepmask.record(OwnPipeline(OwnScheduler(answer)))

    @pytest.mark.parametrize("held", [lambda x: None, lambda x: ["first"], lambda x: 3])
    def test_timesteps_that_are_no_numbers_are_refused(self, held: Any) -> None:
        with pytest.raises(RunError, match="whose timesteps are"):
            stepmask.record(OwnPipeline(OwnScheduler(held=held)))

    def test_what_lacks_a_method_is_refused(self) -> None:
        lacking = SimpleNamespace(step=lambda eps, time, x: x, timesteps=[1.0])
        with pytest.raises(RunError, match="on which there is no set_timesteps"):
            stepmask.record(OwnPipeline(lacking))
        with pytest.raises(RunError, match="a pipeline with no scheduler"):
            stepmask.record(OwnPipeline(None))


@pytest.mark.parametrize(
    "odd",
    [lambda x: (x, 3), lambda x: None, lambda x: x.numpy(), list, lambda x: {"x": x}, lambda x: float(x.sum())],
)
def test_a_loop_that_does_not_return_one_tensor_is_refused(network: Network, odd: Callable[[Tensor], Any]) -> None:
    @torch.no_grad()
    def run() -> Any:
        return odd(network(noise(), 0.5))

    with pytest.raises(RunError, match=f"a run= that returns a {type(run()).__name__}"):
        stepmask.record(network, run=run)


class TestPipelines:
    @pytest.mark.parametrize(
        ("calls", "present"),
        [([3, 3, 1, 1], ((0, 1, 2), (0, 1, 2), (0,), (0,))), ([2, 2, 1], ((0, 1), (0, 1), (0,)))],
    )
    def test_evaluations_are_counted_at_each_step(self, calls: list[int], present: Any) -> None:
        sampler = stepmask.record(Uneven(calls)).sampler
        assert (sampler.branches, sampler.course.present) == (max(calls), present)
        assert stepmask.record(Uneven([3, 3, 3])).sampler.branches == 3

    def test_by_hand(self) -> None:
        assert evaluations_counted([2, 4, 6], 6) == [2, 2, 2]
        assert evaluations_counted([2, 4, 5], 5) == [2, 2, 1]
        for done, total in (([2, 4], 6), ([0, 0], 0), ([1, 1, 2, 2], 2)):
            with pytest.raises(RunError, match="at least one evaluation in front of every step"):
                evaluations_counted(done, total)

    def test_an_interrupted_run_is_refused(self) -> None:
        def stop(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            pipe._interrupt = step >= 1
            return tensors

        pipe, call = make("StableDiffusionPipeline")
        with pytest.raises(RunError, match="interrupted after 2 steps"):
            stepmask.record(pipe, **call, callback_on_step_end=stop)
        assert stepmask.record(pipe, **call).steps == STEPS

    def test_a_pipeline_that_only_steps_a_copy_is_refused(self) -> None:
        class Copying(Uneven):
            def __call__(self, generator: torch.Generator) -> tuple[Tensor]:
                self.scheduler.set_timesteps(3)
                own = copy.deepcopy(self.scheduler)
                x = torch.randn(2, 4, generator=generator)
                for t in own.timesteps:
                    x = own.step(self.transformer(x), t, x, return_dict=False)[0]
                return (x,)

        with pytest.raises(RunError, match=r"no steps with pipe.scheduler.*not on a copy of it"):
            stepmask.record(Copying([]))

    def test_timesteps_in_another_order_are_refused(self) -> None:
        class Back(Uneven):
            def __call__(self, generator: torch.Generator) -> tuple[Tensor]:
                self.scheduler.set_timesteps(3)
                x = torch.randn(2, 4, generator=generator)
                for t in self.scheduler.timesteps[[0, 2, 1]]:
                    x = self.scheduler.step(self.transformer(x), t, x, return_dict=False)[0]
                return (x,)

        with pytest.raises(RunError, match="timestep 0 at step 1"):
            stepmask.record(Back([]))

    def test_a_picture_among_the_samples_of_the_first_step_is_refused(self) -> None:
        class Prefixed(Uneven):
            def __call__(self, generator: torch.Generator) -> tuple[Tensor]:
                self.scheduler.set_timesteps(3)
                x = torch.randn(2, 4, generator=generator)
                for step, t in enumerate(self.scheduler.timesteps):
                    given = torch.cat([x, x]) if step == 0 else x  # the picture that is edited, once
                    x = self.scheduler.step(self.transformer(given)[:2], t, x, return_dict=False)[0]
                return (x,)

        with pytest.raises(RunError, match="step 1, which evaluates 1 of 2 branches of guidance, and no argument that"):
            stepmask.record(Prefixed([]))


def animate() -> tuple[Any, dict[str, Any]]:
    """A tiny AnimateDiff, which can run its sampler several times in a call."""
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=1, cross_attention_dim=8,
        attention_head_dim=4, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    motion = diffusers.MotionAdapter(
        block_out_channels=(8, 16), motion_layers_per_block=1, motion_norm_num_groups=4, motion_num_attention_heads=2
    )
    pipe = diffusers.AnimateDiffPipeline(
        vae=autoencoder(), text_encoder=None, tokenizer=None, unet=stirred(unet), motion_adapter=motion,
        scheduler=diffusers.DDIMScheduler(steps_offset=1, clip_sample=False),
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    words = {"prompt_embeds": torch.randn(1, 5, 8), "negative_prompt_embeds": torch.randn(1, 5, 8)}
    return pipe, {**words, "height": 8, "width": 8, "num_frames": 2, "num_inference_steps": 4, "output_type": "latent"}


class TestSeveralPasses:
    @pytest.mark.parametrize("fast", [False, True])
    def test_they_are_refused_by_record_alone(self, fast: bool) -> None:
        pipe, call = animate()
        trajectory = stepmask.record(pipe, **call)
        graph = stepmask.trace(pipe, trajectory)
        full = stepmask.MaskSchedule.all_compute(graph, trajectory.denoiser, trajectory.sampler)
        pipe.enable_free_init(num_iters=2, use_fast_sampling=fast)
        after = 2 if fast else 4
        with pytest.raises(RunError, match=f"several passes: after {after} of its .*Record a call of one pass"):
            stepmask.record(pipe, **call)
        if not fast:  # each pass is as long as the schedule
            bare = pipe(**call, generator=torch.Generator().manual_seed(0)).frames
            with stepmask.apply(pipe, full):
                masked = pipe(**call, generator=torch.Generator().manual_seed(0)).frames
            assert torch.equal(bare, masked)

    def test_steps_that_begin_anew_without_new_timesteps_are_several_passes(self) -> None:
        class Twice(Uneven):
            def __call__(self, generator: torch.Generator) -> tuple[Tensor]:
                self.scheduler.set_timesteps(3)
                x = torch.randn(2, 4, generator=generator)
                for t in [*self.scheduler.timesteps, *self.scheduler.timesteps]:
                    x = self.scheduler.step(self.transformer(x), t, x, return_dict=False)[0]
                return (x,)

        with pytest.raises(RunError, match="several passes: after 3 of its 6 steps"):
            stepmask.record(Twice([]))

    def test_timesteps_that_are_set_twice_before_the_first_step_are_one_pass(self) -> None:
        class Anew(Uneven):
            def __call__(self, generator: torch.Generator) -> tuple[Tensor]:
                self.scheduler.set_timesteps(50)
                return super().__call__(generator)

        assert stepmask.record(Anew([1] * 4)).steps == 4


class TestArgumentsOfALoop:
    def seeded(self, network: Network) -> Run:
        def run(seed: int = 3, num_inference_steps: int = 4) -> Tensor:
            x = noise(seed)
            for step in range(num_inference_steps):
                x = x - 0.1 * network(x, 1 - step / num_inference_steps)
            return x

        return run

    def test_it_is_told_what_it_names(self, network: Network) -> None:
        run = self.seeded(network)
        trajectory = stepmask.record(network, run=run, seed=5, num_inference_steps=6)
        assert trajectory.steps == 6
        with torch.no_grad():
            assert torch.equal(trajectory.sampled.latent, run(5, 6))
            assert torch.equal(trajectory.sampling.latent(), run(5, 6))

    def test_without_a_seed_it_keeps_its_own(self, network: Network) -> None:
        run = self.seeded(network)
        with torch.no_grad():
            assert torch.equal(stepmask.record(network, run=run).sampled.latent, run())
            assert torch.equal(stepmask.record(network, run=partial(run, seed=7), seed=1).sampled.latent, run(7))

    def test_what_it_does_not_name_is_refused(self, network: Network) -> None:
        with pytest.raises(RunError, match=r"guidance_scale for a run=.*names: num_inference_steps, seed"):
            stepmask.record(network, run=self.seeded(network), guidance_scale=3.0)
        with pytest.raises(RunError, match=r"num_inference_steps for a run=.*it has none"):
            stepmask.record(network, run=lambda: noise(), num_inference_steps=3)

    def test_it_may_take_anything(self, network: Network) -> None:
        run = self.seeded(network)
        trajectory = stepmask.record(network, run=lambda **told: run(**told), num_inference_steps=2)
        assert trajectory.steps == 2

    def test_evaluate_samples_with_other_seeds_and_fewer_steps(self, network: Network) -> None:
        run = self.seeded(network)
        trajectory = stepmask.record(network, run=run)
        full = all_compute(network, trajectory)
        report = stepmask.evaluate(network, full, run=run, seed=[1, 2], rivals={"fewer": 2}, repeats=1)
        assert report["fewer"].evaluations == 2
        assert len({*report["fewer"].latent_errors}) == 4  # two seeds of two samples
        assert report["schedule"].latent_errors == [0] * 4

    def test_noise_of_torch_s_own_generator_is_repeated(self, network: Network) -> None:
        def run() -> Tensor:
            x = torch.randn(2, 4)
            for step in range(4):
                x = x - 0.1 * network(x, 1 - step / 4) + 0.01 * torch.randn(2, 4)
            return x

        torch.manual_seed(11)
        before = torch.get_rng_state()
        first, other = stepmask.record(network, run=run), stepmask.record(network, run=run, seed=1)
        with torch.no_grad():
            assert torch.equal(first.sampling.latent(), first.sampled.latent)
        assert torch.equal(first.sampling().latent, first.sampled.latent)
        assert not torch.equal(first.sampled.latent, other.sampled.latent)
        assert torch.equal(torch.get_rng_state(), before)

    def test_a_loop_that_never_calls_the_denoiser_is_refused(self, network: Network) -> None:
        with pytest.raises(RunError, match="never called the denoiser"):
            stepmask.record(network, run=lambda: noise())


class TestGenerators:
    def test_the_caller_s_generator_is_repeated_and_left_untouched(self) -> None:
        pipe, call = make("StableDiffusionPipeline")
        generator = torch.Generator().manual_seed(7)
        torch.randn(3, generator=generator)  # not where a seed leaves it
        state = generator.get_state()
        trajectory = stepmask.record(pipe, **call, generator=generator)
        assert torch.equal(generator.get_state(), state)
        assert torch.equal(trajectory.sampling().latent, trajectory.sampled.latent)
        assert torch.equal(pipe(**call, generator=generator).images, trajectory.sampled.latent)

    def test_so_is_a_list_of_them(self) -> None:
        pipe, call = make("StableDiffusionPipeline")

        def generators() -> list[torch.Generator]:
            return [torch.Generator().manual_seed(seed) for seed in (7, 8)]

        trajectory = stepmask.record(pipe, **call, generator=generators())
        assert torch.equal(trajectory.sampling().latent, trajectory.sampled.latent)
        assert torch.equal(pipe(**call, generator=generators()).images, trajectory.sampled.latent)

    def test_one_that_is_there_twice_is_one(self) -> None:
        pipe, call = make("StableDiffusionPipeline")
        both = [torch.Generator().manual_seed(7)] * 2
        trajectory = stepmask.record(pipe, **call, generator=both)
        assert torch.equal(pipe(**call, generator=both).images, trajectory.sampled.latent)

    def test_a_loop_that_names_it_is_handed_a_fresh_one(self, network: Network) -> None:
        def run(generator: torch.Generator) -> Tensor:
            x = torch.randn(2, 4, generator=generator)
            for step in range(3):
                x = x - 0.1 * network(x, 1 - step / 3)
            return x

        trajectory = stepmask.record(network, run=run, generator=torch.Generator().manual_seed(7))
        with torch.no_grad():
            assert torch.equal(trajectory.sampling.latent(), run(torch.Generator().manual_seed(7)))


MODES = (torch.inference_mode, torch.no_grad, torch.enable_grad)


def kept(trajectory: stepmask.Trajectory) -> list[Tensor]:
    calls = [(call.args, call.kwargs) for call in trajectory.calls]
    sampled = trajectory.sampled
    return list(tensors((calls, trajectory.outputs, sampled.latent, sampled.handed, sampled.latents)))


class TestModes:
    @pytest.mark.parametrize("mode", MODES)
    def test_what_is_kept_can_have_gradients(self, mode: Callable[[], AbstractContextManager[Any]]) -> None:
        pipe, call = make("SanaPipeline")
        plain = stepmask.record(pipe, **call)
        with mode():
            given = {name: v.clone() if isinstance(v, Tensor) else v for name, v in call.items()}
            inside = stepmask.record(pipe, **given)
        assert not any(tensor.is_inference() or tensor.requires_grad for tensor in kept(inside))
        assert all(map(torch.equal, kept(inside), kept(plain)))
        assert stepmask.sweep(pipe, inside, probes=1).inner.any()

    def test_a_loop_that_is_decorated_is_recorded(self, network: Network) -> None:
        trajectory = stepmask.record(network, run=torch.inference_mode()(counted(network, [2, 2])))
        assert not any(tensor.is_inference() for tensor in kept(trajectory))

    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize("learner", [TrainedForecasts(passes=1.2), PerTimestep(iterations=2, rounds=1)])
    def test_learning_is_the_same_in_any_mode(
        self, network: Network, mode: Callable[[], AbstractContextManager[Any]], learner: Any
    ) -> None:
        trajectory = stepmask.record(network, run=counted(network, [1] * 5))
        graph = all_compute(network, trajectory).graph
        plain = stepmask.learn(network, trajectory, 0.6, graph=graph, learner=learner)
        with mode():
            assert stepmask.learn(network, trajectory, 0.6, graph=graph, learner=learner) == plain

    def test_a_pipeline_that_was_loaded_in_inference_mode_is_refused_by_learners(self) -> None:
        with torch.inference_mode():
            pipe, call = make("DiTPipeline")
        trajectory = stepmask.record(pipe, **call)
        with pytest.raises(LearningError, match=r"loaded under torch\.inference_mode"):
            stepmask.learn(pipe, trajectory)
        with pytest.raises(LearningError, match=r"loaded under torch\.inference_mode"):
            stepmask.sweep(pipe, trajectory)

    @pytest.mark.parametrize("mode", MODES)
    def test_the_latent_is_in_the_caller_s_gradient_mode(self, mode: Callable[[], AbstractContextManager[Any]]) -> None:
        pipe, call = dit()
        pipe.set_progress_bar_config(disable=True)
        trajectory = stepmask.record(pipe, **call, num_inference_steps=3)
        with mode():
            expected = torch.is_grad_enabled()
            latent = trajectory.sampling.latent()
            assert (latent.requires_grad, latent.is_inference()) == (expected, False)
            assert torch.is_grad_enabled() == expected


def cast(dtype: torch.dtype = torch.bfloat16) -> torch.autocast:
    return torch.autocast("cpu", dtype)


class TestAutocast:
    @pytest.mark.parametrize("name", ["DiTPipeline", "SanaPipeline"])
    def test_a_run_is_repeated_under_its_own(self, name: str) -> None:
        pipe, call = make(name)
        plain = stepmask.record(pipe, **call)
        with cast():
            inside = stepmask.record(pipe, **call)
        assert not torch.equal(inside.sampled.latent, plain.sampled.latent)
        for trajectory in (inside, plain):
            with torch.no_grad():
                assert torch.equal(trajectory.sampling.latent(), trajectory.sampled.latent)
            with cast(torch.float16), torch.no_grad():
                assert torch.equal(trajectory.sampling.latent(), trajectory.sampled.latent)
                assert torch.equal(trajectory.sampling().latent, trajectory.sampled.latent)
                assert autocast_now() == (("cpu", torch.float16),)

    @pytest.mark.parametrize(
        ("name", "learner"),
        [("SanaPipeline", PerTimestep(iterations=2, rounds=1)), ("DiTPipeline", TrainedForecasts(passes=1.2))],
    )
    def test_learning_does_not_depend_on_the_one_around_it(self, name: str, learner: Any) -> None:
        pipe, call = make(name)
        with cast():
            trajectory = stepmask.record(pipe, **call)
        outside = stepmask.learn(pipe, trajectory, 0.7, learner=learner)
        with cast(torch.float16):
            assert stepmask.learn(pipe, trajectory, 0.7, learner=learner) == outside

    def test_nor_does_a_sweep_of_a_run_without_any(self) -> None:
        pipe, call = make("SanaPipeline")
        trajectory = stepmask.record(pipe, **call)
        outside = stepmask.sweep(pipe, trajectory, probes=1)
        with cast():
            inside = stepmask.sweep(pipe, trajectory, probes=1)
        assert (inside.inner == outside.inner).all()
        assert inside.graph == outside.graph

    def test_gradients_come_back_through_what_was_cast(self, network: Network) -> None:
        with cast():
            trajectory = stepmask.record(network, run=counted(network, [1] * 4))
        graph = all_compute(network, trajectory).graph
        seen: list[Autocast] = []
        with network.register_forward_hook(lambda *_: seen.append(autocast_now())):
            stepmask.sweep(network, trajectory, graph=graph, probes=1)
        assert set(seen) == {(("cpu", torch.bfloat16),)}


class TestOtherCaches:
    """What is recorded under one of them is not the pipeline."""

    def test_diffusers_own(self) -> None:
        pipe, call = make("FluxPipeline")
        pipe.transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.1))
        with pytest.raises(AlreadyApplied, match="cached by diffusers"):
            stepmask.record(pipe, **call)
        pipe.transformer.disable_cache()
        assert stepmask.record(pipe, **call).steps == STEPS

    def test_diffusers_own_hooked_by_hand(self) -> None:
        pipe, call = make("FluxPipeline")
        diffusers.hooks.apply_first_block_cache(pipe.transformer, diffusers.FirstBlockCacheConfig(threshold=0.1))
        assert not pipe.transformer.is_cache_enabled
        with pytest.raises(AlreadyApplied, match="cached by diffusers"):
            stepmask.record(pipe, **call)

    def test_deepcache(self) -> None:
        from DeepCache.extension.deepcache import DeepCacheSDHelper

        pipe, call = stable_diffusion()
        pipe.set_progress_bar_config(disable=True)
        call = {**call, "num_inference_steps": STEPS, "output_type": "latent"}
        helper = DeepCacheSDHelper(pipe=pipe)
        helper.set_params(cache_interval=3, cache_branch_id=0)
        helper.enable()
        with pytest.raises(AlreadyApplied, match="cached by DeepCache"):
            stepmask.record(pipe, **call)
        helper.disable()
        assert stepmask.record(pipe, **call).steps == STEPS

    def test_hooks_that_are_no_caches_may_stay(self) -> None:
        pipe, call = make("DiTPipeline")
        plain = stepmask.record(pipe, **call)
        pipe.transformer.enable_layerwise_casting(storage_dtype=torch.float32, compute_dtype=torch.float32)
        assert torch.equal(stepmask.record(pipe, **call).sampled.latent, plain.sampled.latent)

    @pytest.mark.parametrize("mark", ["_is_cached", "enable_teacache"])
    def test_the_marks_of_others(self, network: Network, mark: str) -> None:
        setattr(network, mark, True)
        with pytest.raises(AlreadyApplied, match=r"cached by (cache-dit|TeaCache)"):
            stepmask.record(network, run=counted(network, [1, 1]))
