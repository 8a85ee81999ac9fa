"""On an accelerator, a simulated one: the same results as on the CPU, no device mixed with another, and few waits."""

import copy
import pickle
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn

import stepmask
from pipelines import make
from simulated_device import PLACE, Device, simulated
from stepmask import Budget, MaskSchedule, Store, Trajectory
from stepmask.denoiser import clock
from stepmask.denoiser.clock import Clock
from stepmask.denoiser.device import own_device
from stepmask.denoiser.memory import peak_memory
from stepmask.denoiser.timing import time_blocks
from stepmask.denoiser.values import tensors
from stepmask.errors import LearningError
from stepmask.evaluation.contender import Contender
from stepmask.evaluation.measure import Stopwatch
from stepmask.evaluation.shards import write_shards
from stepmask.learning.chain import loss_and_gradients
from stepmask.learning.per_timestep import PerTimestep
from stepmask.learning.sample_rows import SampleRows
from stepmask.learning.trained import TrainedForecasts
from stepmask.schedule.baselines import fixed_interval, whole_step
from stepmask.schedule.graph import BlockGraph
from stepmask.schedule.rectify import lower

from toys import per_channel

WIDTH = 8


class Layer(nn.Module):
    def __init__(self, times: int) -> None:
        super().__init__()
        self.linear, self.times = nn.Linear(WIDTH, WIDTH), times

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.times):
            x = torch.tanh(self.linear(x))
        return x


class Tower(nn.Module):
    """A residual tower that is told its timestep by a number, and a class."""

    def __init__(self, layers: int, times: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(times) for _ in range(layers))
        self.classes = nn.Embedding(2, WIDTH)

    def forward(self, x: Tensor, t: float, classes: Tensor) -> Tensor:
        h = x + self.classes(classes) + 0.001 * t
        for layer in self.layers:
            h = h + layer(h)
        return h


class Guided:
    """A pipeline without a wait of its own: guidance in one call, or in two, and timesteps that lie at the host."""

    def __init__(self, layers: int = 3, calls: int = 1, times: int = 1) -> None:
        torch.manual_seed(0)
        self.transformer, self.scheduler = Tower(layers, times).eval(), DDIMScheduler(clip_sample=False)
        self.calls, self.device = calls, torch.device("cpu")

    def to(self, device: torch.device) -> "Guided":
        moved = copy.deepcopy(self)
        moved.transformer.to(device)
        moved.device = device
        moved.scheduler.alphas_cumprod = moved.scheduler.alphas_cumprod.clone()
        return moved

    def __call__(self, num_inference_steps: int = 6, batch: int = 2, generator: Any = None) -> tuple[Tensor]:
        self.scheduler.set_timesteps(num_inference_steps)
        x = torch.randn(batch, WIDTH, generator=generator).to(self.device)
        told = torch.tensor([0] * batch + [1] * batch).to(self.device)
        for t in self.scheduler.timesteps.tolist():
            if self.calls == 1:
                one, two = self.transformer(torch.cat([x, x]), t, told).chunk(2)
            else:
                one, two = (self.transformer(x, t, few) for few in told.chunk(2))
            x = self.scheduler.step(two + 2 * (one - two), t, x, return_dict=False)[0]
        return (x,)


Made = tuple[Any, dict[str, Any], Trajectory, BlockGraph]


@cache
def on_cpu(name: str) -> Made:
    """A pipeline of diffusers, a call of it, a run and its graph."""
    torch.manual_seed(0)
    pipe, call = make(name)
    call = {**call, "output_type": "np"} if name == "DiTPipeline" else call
    trajectory = stepmask.record(pipe, **call)
    return pipe, call, trajectory, stepmask.trace(pipe, trajectory, prove=False)


def there(value: Any) -> Any:
    return torch.utils._pytree.tree_map(lambda leaf: leaf.to(PLACE) if isinstance(leaf, Tensor) else leaf, value)


def on_device(name: str) -> tuple[Any, dict[str, Any], Trajectory]:
    """The same on the device, recorded there."""
    pipe, call, _, _ = on_cpu(name)
    moved = copy.deepcopy(pipe).to(PLACE)
    return moved, there(call), stepmask.record(moved, **there(call))


def reference_of(trajectory: Trajectory, graph: BlockGraph) -> MaskSchedule:
    return MaskSchedule.all_compute(graph, trajectory.denoiser, trajectory.sampler)


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-4) -> bool:
    return bool((found.cpu() - expected).norm() <= tolerance * expected.norm())


def latent(trajectory: Trajectory, schedule: MaskSchedule, store: Store | None = None) -> Tensor:
    with stepmask.apply(trajectory.sampling.pipe, schedule, store=store):
        return trajectory.sampling().latent


@pytest.fixture
def device() -> Iterator[Device]:
    with simulated() as device:
        yield device


def toy(layers: int = 3, steps: int = 6, calls: int = 1, times: int = 1) -> tuple[Trajectory, MaskSchedule, Trajectory]:
    """A run of a toy on the CPU, its all-compute table, and the same run on the device."""
    pipe = Guided(layers, calls, times)
    run = stepmask.record(pipe, num_inference_steps=steps)
    reference = reference_of(run, stepmask.trace(pipe, run, blocks={"layers.*": "output"}, prove=False))
    return run, reference, stepmask.record(pipe.to(PLACE), num_inference_steps=steps)


def learned(learner: Any, run: Trajectory, reference: MaskSchedule, budget: float | Budget = 0.6) -> MaskSchedule:
    return stepmask.learn(run.sampling.pipe, run, budget, graph=reference.graph, learner=learner)


REAL = ("DiTPipeline", "StableDiffusionPipeline")

TABLES: dict[str, Callable[[MaskSchedule], MaskSchedule]] = {
    "plain": lambda reference: fixed_interval(reference, 0.5),
    "a forecast": lambda reference: fixed_interval(reference, 0.5, order=2),
    "whole steps": lambda reference: whole_step(reference, 0.5, order=1),
    "per channel": lambda reference: per_channel(fixed_interval(reference, 0.5, order=1)),
}

STORES = {
    "where it is": None,
    "at the host": Store(device="cpu"),
    "in bfloat16": Store(dtype=torch.bfloat16),
    "in float8 at the host": Store(device="cpu", dtype=torch.float8_e4m3fn),
}


class TestRealPipelines:
    @pytest.mark.parametrize("name", [*REAL, "StableDiffusionControlNetPipeline", "FluxPipeline"])
    def test_a_run_is_recorded_and_traced_as_on_the_cpu(self, name: str, device: Device) -> None:
        _, _, recorded, graph = on_cpu(name)
        pipe, _, trajectory = on_device(name)
        assert trajectory.sampled.latent.device == PLACE
        assert close(trajectory.sampled.latent, recorded.sampled.latent)
        assert trajectory.sampler == recorded.sampler
        assert stepmask.trace(pipe, trajectory) == graph  # with its proof

    @pytest.mark.parametrize("name", [*REAL, "FluxPipeline"])
    def test_a_masked_run_is_the_cpu_s_with_every_store(self, name: str, device: Device) -> None:
        _, _, recorded, graph = on_cpu(name)
        _, _, trajectory = on_device(name)
        tables = list(TABLES)[:-1] if name == "FluxPipeline" else TABLES  # whose blocks say two tensors each
        for table in tables:
            schedule = TABLES[table](reference_of(recorded, graph))
            for store in STORES.values():
                expected, found = latent(recorded, schedule, store), latent(trajectory, schedule, store)
                rough = 1e-4 if store is None or store.dtype is None else 3e-2  # near a tie it is rounded either way
                assert close(found, expected, rough)

    @pytest.mark.parametrize("name", REAL)
    def test_a_masked_run_waits_for_the_sampler_s_tables_alone(self, name: str, device: Device) -> None:
        _, _, recorded, graph = on_cpu(name)
        _, _, trajectory = on_device(name)
        for table in TABLES.values():
            schedule = table(reference_of(recorded, graph))
            device.forget()
            trajectory.sampling()
            bare, uploads = device.waited, device.uploads
            with stepmask.apply(trajectory.sampling.pipe, schedule):
                device.forget()
                trajectory.sampling()
            assert device.waited - bare in (0, 1)  # the timesteps, where they lie on the device
            assert device.uploads == uploads

    @pytest.mark.parametrize("name", REAL)
    def test_a_sweep_measures_what_the_cpu_s_does(self, name: str, device: Device) -> None:
        pipe, _, recorded, graph = on_cpu(name)
        moved, _, trajectory = on_device(name)
        expected = stepmask.sweep(pipe, recorded, graph=graph, probes=1)
        found = stepmask.sweep(moved, trajectory, graph=graph, probes=1)
        assert np.allclose(found.inner, expected.inner, atol=1e-4 * abs(expected.inner).max())
        assert found.schedule(0.6).rows.tolist() == expected.schedule(0.6).rows.tolist()

    def test_it_learns_by_sweep_by_rows_and_by_training(self, device: Device) -> None:
        _, _, recorded, graph = on_cpu("DiTPipeline")
        _, _, trajectory = on_device("DiTPipeline")
        for learner in (PerTimestep(iterations=2, rounds=2), TrainedForecasts(passes=0.5)):
            schedule = learned(learner, trajectory, reference_of(recorded, graph))
            assert lower(schedule).macs_share <= 0.6
            assert np.isfinite(latent(trajectory, schedule).cpu()).all()

    def test_it_is_evaluated(self, device: Device) -> None:
        pipe, call, recorded, graph = on_cpu("DiTPipeline")
        moved, told, _ = on_device("DiTPipeline")
        schedule = fixed_interval(reference_of(recorded, graph), 0.5, order=1)
        expected = stepmask.evaluate(pipe, schedule, repeats=1, **call)
        found = stepmask.evaluate(moved, schedule, repeats=1, **told)
        for row, other in zip(found.rows, expected.rows, strict=True):
            assert row.latent_errors == pytest.approx(other.latent_errors, rel=1e-2, abs=1e-8)
            assert row.macs_executed == other.macs_executed

    def test_shards_are_written(self, device: Device, tmp_path: Path) -> None:
        _, _, recorded, graph = on_cpu("DiTPipeline")
        pipe, _, _ = on_device("DiTPipeline")
        schedule = fixed_interval(reference_of(recorded, graph), 0.5)
        (path,) = write_shards(pipe, {0: {"class_labels": [1], "num_inference_steps": 4}}, tmp_path, schedule=schedule)
        assert path.stat().st_size > 0


class TestLearning:
    """On a toy, whose numbers are the CPU's to the bit."""

    @pytest.mark.parametrize("calls", [1, 2])
    @pytest.mark.parametrize(
        "learner",
        [PerTimestep(iterations=3, rounds=2), TrainedForecasts(passes=1)],
        ids=lambda made: type(made).__name__,
    )
    def test_a_learner_finds_the_cpu_s_table(self, learner: Any, calls: int, device: Device) -> None:
        run, reference, moved = toy(calls=calls)
        expected, found = learned(learner, run, reference), learned(learner, moved, reference)
        assert np.array_equal(found.rows, expected.rows)
        assert np.allclose(found.forecasts, expected.forecasts, atol=1e-5)

    def test_a_swept_schedule_is_the_cpu_s(self, device: Device) -> None:
        run, reference, moved = toy()
        expected, found = (
            stepmask.sweep(each.sampling.pipe, each, graph=reference.graph, probes=2) for each in (run, moved)
        )
        assert np.allclose(found.inner, expected.inner, rtol=1e-5, atol=1e-6)
        assert np.allclose(found.held, expected.held, rtol=1e-5, atol=1e-6)
        assert np.array_equal(found.schedule(0.5).rows, expected.schedule(0.5).rows)

    @pytest.mark.parametrize("size", [(2, 4), (5, 9)], ids=["small", "large"])
    def test_an_iteration_of_training_waits_three_times(self, size: tuple[int, int], device: Device) -> None:
        _, reference, moved = toy(*size)
        schedule, rows = fixed_interval(reference, 0.5, order=1), SampleRows.of(moved)
        weights = torch.tensor(schedule.forecasts, dtype=torch.float32)

        def iterate() -> None:
            loss_and_gradients(moved, schedule, weights, lambda x: x.square().mean(), rows)

        iterate()  # the indices are brought there
        device.forget()
        iterate()
        assert device.waited == 3  # whether all was finite, the loss, and the gradients
        assert device.uploads == 2  # the pipeline's own: the noise and the classes

    @pytest.mark.parametrize("size", [(2, 4), (5, 9)], ids=["small", "large"])
    def test_a_probe_of_a_sweep_waits_three_times(self, size: tuple[int, int], device: Device) -> None:
        _, reference, moved = toy(*size)
        waited = []
        for probes in (1, 4):
            device.forget()
            stepmask.sweep(moved.sampling.pipe, moved, graph=reference.graph, probes=probes)
            waited.append(device.waited)
        assert waited[1] - waited[0] == 3 * 3  # whether the pull is finite, its value, and the products

    @pytest.mark.parametrize("size", [(2, 4), (5, 9)], ids=["small", "large"])
    def test_an_iteration_of_a_row_waits_a_few_times(self, size: tuple[int, int], device: Device) -> None:
        _, reference, moved = toy(*size)
        waited = []
        for iterations in (2, 4):
            device.forget()
            learned(PerTimestep(iterations=iterations, rounds=1), moved, reference)
            waited.append((device.waited, device.uploads))
        rows = moved.steps - 1
        (few, few_up), (more, more_up) = waited
        assert more - few == 3 * 2 * rows  # whether the loss is finite, and the gradients of scores and of their cost
        assert more_up - few_up == 1 * 2 * rows  # the scores

    def test_what_is_not_finite_is_told_with_its_step(self, device: Device) -> None:
        _, reference, moved = toy()
        with torch.no_grad():
            moved.sampling.denoiser.layers[0].linear.weight.fill_(float("inf"))
        with pytest.raises(LearningError, match="an output at step 0 that is not finite"):
            stepmask.sweep(moved.sampling.pipe, moved, graph=reference.graph)


class TestMaskedRuns:
    @pytest.mark.parametrize("calls", [1, 2])
    @pytest.mark.parametrize("store", STORES)
    @pytest.mark.parametrize("table", TABLES)
    def test_no_wait_is_added(self, table: str, store: str, calls: int, device: Device) -> None:
        run, reference, moved = toy(calls=calls)
        schedule = TABLES[table](reference)
        device.forget()
        moved.sampling()
        bare = device.waited, device.uploads
        with stepmask.apply(moved.sampling.pipe, schedule, store=STORES[store]):
            device.forget()
            found = moved.sampling().latent
            assert (device.waited, device.uploads) == bare
        assert close(found, latent(run, schedule, STORES[store]), 1e-6)

    @pytest.mark.parametrize("dtype", [None, torch.float8_e4m3fn])
    def test_a_store_at_the_host_holds_nothing_on_the_device(self, dtype: torch.dtype | None, device: Device) -> None:
        _, reference, moved = toy()
        held: list[Tensor] = []
        with stepmask.apply(moved.sampling.pipe, fixed_interval(reference, 0.5, order=1),
                            store=Store(device="cpu", dtype=dtype)) as masked:  # fmt: skip
            moved.sampling.denoiser.register_forward_hook(lambda *_: held.extend(masked.run.held_tensors()))
            moved.sampling()
        assert held
        assert all(tensor.device.type == "cpu" and tensor.is_pinned() for tensor in held)

    def test_inference_mode_takes_nothing_away(self, device: Device) -> None:
        run, reference, moved = toy()
        schedule, store = fixed_interval(reference, 0.5, order=1), Store(device="cpu")
        with torch.inference_mode(), stepmask.apply(moved.sampling.pipe, schedule, store=store):
            (found,) = moved.sampling.pipe(6, generator=torch.Generator().manual_seed(0))
        assert close(found, latent(run, schedule), 1e-6)


class TestRecording:
    def test_what_calls_do_not_share_is_not_kept_on_the_device(self, device: Device) -> None:
        _, _, moved = toy()
        for before, call in zip(moved.calls, moved.calls[1:], strict=False):
            assert call.args[0].device == call.args[2].device == PLACE  # whoever asks for a call gets it there
            assert call.args[2] is before.args[2]  # the classes are kept once
        lying = [call.args[0].device.type for call in moved.calls.as_they_lie()]  # type: ignore[attr-defined]
        assert lying == ["cpu"] * (moved.steps - 1) + [PLACE.type]

    def test_features_of_a_control_net_are_not_held_for_all_steps(self, device: Device) -> None:
        _, _, trajectory = on_device("StableDiffusionControlNetPipeline")
        lying = list(tensors([[call.args, call.kwargs] for call in trajectory.calls.as_they_lie()]))  # type: ignore[attr-defined]
        once = {id(tensor): tensor.nbytes for tensor in lying if tensor.device == PLACE}
        call = trajectory.calls[-1]
        assert sum(once.values()) <= sum(tensor.nbytes for tensor in tensors([call.args, call.kwargs]))

    def test_a_run_of_another_process_comes_to_this_one_s_device(self, device: Device) -> None:
        _, reference, moved = toy()
        sent = replace(moved, sampling=replace(moved.sampling, pipe=None))
        arrived: Trajectory = pickle.loads(pickle.dumps(sent))
        assert {tensor.device.type for tensor in tensors([*arrived.outputs])} == set()  # nothing that lies anywhere yet
        arrived.settle(moved.sampling.denoiser)
        arrived = replace(arrived, sampling=moved.sampling)
        pairs = zip(arrived.sampled.handed, moved.sampled.handed, strict=True)
        assert all(one.device == PLACE and torch.equal(one, two) for one, two in pairs)
        for one, two in zip(arrived.calls, moved.calls, strict=True):
            assert all(map(torch.equal, tensors(one.args), tensors(two.args)))
            assert all(tensor.device == PLACE for tensor in tensors(one.args))
        schedule = learned(PerTimestep(iterations=1, rounds=1), arrived, reference)
        assert np.array_equal(schedule.rows, learned(PerTimestep(iterations=1, rounds=1), moved, reference).rows)


class TestTime:
    @pytest.fixture
    def device(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
        with simulated(launch=10e-6, kernel=20e-6, wait=15e-6) as device:
            monkeypatch.setattr(clock, "perf_counter", device.perf_counter)
            yield device

    def test_a_stopwatch_waits_when_it_is_read(self, device: Device) -> None:
        _, _, moved = toy()
        watch = Stopwatch(Clock(PLACE))
        x = torch.zeros(2, WIDTH, device=PLACE)
        device.forget()
        for _ in range(3):
            watch(lambda: x + x, (), {})
        assert (watch.calls, device.waited) == (3, 0)
        assert watch.seconds == pytest.approx(3 * 20e-6, rel=0.2)  # the kernels; before the first one a launch
        assert device.waited == 1
        del moved

    def test_a_pipeline_is_timed_without_a_wait_inside(self, device: Device) -> None:
        _, reference, moved = toy()
        for schedule in (None, fixed_interval(reference, 0.5)):
            contender = Contender("it", moved.sampling, schedule)
            device.forget()
            took = contender.pipeline_ms(0)
            assert dict(device.waits) == {"synchronize": 2}
            assert 0 < took <= 1000 * device.host

    def test_planned_and_measured_shares_agree(self, device: Device) -> None:
        _, reference, moved = toy(layers=4, steps=8, times=10)
        graph = time_blocks(moved.sampling.pipe, moved, reference.graph, repeats=6)
        reference = reference_of(moved, graph)
        budget = Budget(time=0.6)
        tables = [fixed_interval(reference, 0.5, order=2), whole_step(reference, 0.4, order=2)]
        tables.append(stepmask.sweep(moved.sampling.pipe, moved, graph=graph, probes=1).schedule(budget))
        tables.append(learned(TrainedForecasts(passes=0.2), moved, reference, budget))

        def evaluated(schedule: MaskSchedule) -> float:
            contender = Contender("it", moved.sampling, schedule)
            return contender.run(0).denoiser_ms

        whole = evaluated(reference)
        for table in tables:
            planned, measured = budget.spent(lower(table)), evaluated(table) / whole
            assert measured == pytest.approx(planned, rel=0.05)

    def test_a_budget_in_time_is_learned_for(self, device: Device) -> None:
        _, reference, moved = toy()
        schedule = learned(TrainedForecasts(passes=0.2), moved, reference, Budget(time=0.6))
        assert schedule.provenance["times"]["timed_by"] == "stepmask.learn"


class TestPlaces:
    def test_memory_is_the_denoiser_s_device_s(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # and the pipeline on the CPU
        with peak_memory(torch.device("cpu")) as peak:
            held = torch.ones(32 * 2**20)
        assert peak.grown is None or peak.grown >= held.nbytes * 0.9

    def test_a_process_takes_an_accelerator_of_its_own(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
        assert own_device(torch.device("cuda")) == torch.device("cuda")
        for name, value in (("WORLD_SIZE", "8"), ("LOCAL_RANK", "3")):
            monkeypatch.setenv(name, value)
        assert own_device(torch.device("cuda")) == torch.device("cuda:3")
        assert own_device(torch.device("cuda:1")) == torch.device("cuda:1")
        assert own_device(torch.device("cpu")) == torch.device("cpu")
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # the others are hidden from it
        assert own_device(torch.device("cuda")) == torch.device("cuda:0")
