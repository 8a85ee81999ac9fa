"""What two processes find of a denoiser whose weights or tokens are split between them. Run by tests/test_parallel.py.

python parallel_jobs.py RANK FOLDER: checks everything in turn and writes what went wrong, by name, to FOLDER/RANK.json.
"""

import json
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

warnings.filterwarnings("ignore")

import diffusers
import numpy as np
import torch
import torch.distributed as dist
from diffusers.hooks import tensor_parallel
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import stepmask
from pipelines import make
from promises import all_compute, half_of, without_feeders
from stepmask import MaskSchedule, Trajectory
from stepmask.errors import LearningError, StepmaskError
from stepmask.learning.chain import loss_and_gradients
from stepmask.learning.per_timestep import PerTimestep
from stepmask.schedule.baselines import fixed_interval

WORLD = 2
CHECKS: dict[str, Callable[[], None]] = {}


def check(function: Callable[[], None]) -> Callable[[], None]:
    CHECKS[function.__name__] = function
    return function


def tiny() -> tuple[Any, dict[str, Any]]:
    pipe, call = make("FluxPipeline")
    return pipe, {**call, "num_inference_steps": 3}


def sample(pipe: Any, call: dict[str, Any]) -> Tensor:
    images: Tensor = pipe(**call, generator=torch.Generator().manual_seed(0)).images
    return images


def masked(pipe: Any, call: dict[str, Any], table: MaskSchedule) -> Tensor:
    with stepmask.apply(pipe, table):
        return sample(pipe, call)


def tables(pipe: Any, call: dict[str, Any]) -> Iterator[MaskSchedule]:
    """A random table, of sublayers, and one of forecasts, of whole blocks."""
    run = stepmask.record(pipe, **call)
    yield half_of(all_compute(pipe, run, "sublayer"))
    yield fixed_interval(all_compute(pipe, run, "block"), 0.5, order=1)


def shard(pipe: Any) -> None:
    for block in (*pipe.transformer.transformer_blocks, *pipe.transformer.single_transformer_blocks):
        fully_shard(block)
    fully_shard(pipe.transformer)


@check
def sharded_weights_sample_the_same() -> None:
    pipe, call = tiny()
    found = [(table, masked(pipe, call, table)) for table in tables(pipe, call)]
    bare = sample(pipe, call)
    later, _ = tiny()
    with stepmask.apply(later, found[0][0]):
        shard(later)
        assert torch.equal(sample(later, call), found[0][1]), "sharded after the schedule was applied"
    assert torch.equal(sample(later, call), bare), "bare again"
    for table, expected in found:
        assert torch.equal(masked(later, call, table), expected), "sharded before"


def check_learned(split: Callable[[Any], None]) -> None:
    """The blocks, sweeps, gradients and tables of one process."""
    pipe, call = tiny()
    run = stepmask.record(pipe, **call)
    full = all_compute(pipe, run, "block")
    expected = found(pipe, run, full)
    split(pipe)
    run = stepmask.record(pipe, **call)
    assert stepmask.trace(pipe, run, granularity="block").names == full.graph.names
    (sweep, gradients, rows), (own_sweep, own_gradients, own_rows) = expected, found(pipe, run, full)
    assert np.allclose(own_sweep, sweep, atol=1e-4 * np.abs(sweep).max()), "another sweep"
    assert np.allclose(own_gradients, gradients, atol=1e-4 * np.abs(gradients).max()), "other gradients"
    assert np.array_equal(own_rows, rows), "another table"


def found(pipe: Any, run: Trajectory, full: MaskSchedule) -> tuple[Any, ...]:
    """What a sweep, the default learner's gradients and the other learner find."""
    swept = stepmask.sweep(pipe, run, graph=full.graph, probes=1, ages=2)
    table = fixed_interval(full, 0.7)
    weights = torch.tensor(table.forecasts, dtype=torch.float32)
    _, gradients = loss_and_gradients(run, table, weights, lambda latent: latent.square().sum())
    learned = stepmask.learn(pipe, run, 0.7, graph=full.graph, learner=PerTimestep(iterations=1, rounds=1))
    return swept.inner, gradients.numpy(), learned.rows


@check
def sharded_weights_are_traced_and_learned_from() -> None:
    check_learned(shard)


@contextmanager
def one_accelerator() -> Iterator[None]:
    """diffusers asks torch how many accelerators there are, and there are none."""
    count = torch.accelerator.device_count
    torch.accelerator.device_count = lambda: 1  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.accelerator.device_count = count


def split_tokens(pipe: Any) -> None:
    mesh = init_device_mesh("cpu", (1, WORLD), mesh_dim_names=("ring", "ulysses"))
    with one_accelerator():
        pipe.transformer.enable_parallelism(config=diffusers.ContextParallelConfig(ulysses_degree=WORLD, mesh=mesh))


def split_layers(pipe: Any) -> None:
    """As the class's own plan has it, which diffusers asks of accelerators only."""
    tensor_parallel._SUPPORTED_TP_DEVICES = ("cpu",)
    mesh = init_device_mesh("cpu", (WORLD,), mesh_dim_names=("tp",))
    config = diffusers.TensorParallelConfig(tp_degree=WORLD, mesh=mesh)
    config.setup(dist.get_rank(), WORLD, torch.device("cpu"), mesh)
    tensor_parallel.apply_tensor_parallel(pipe.transformer, config, pipe.transformer._tp_plan)


def check_split(split: Callable[[Any], None]) -> None:
    """Samples as those of one process, to rounding; all-compute is bitwise the split pipeline without a schedule."""
    pipe, call = tiny()
    found = [(table, masked(pipe, call, table)) for table in tables(pipe, call)]
    bare = sample(pipe, call)
    later, _ = tiny()
    with stepmask.apply(later, found[0][0]):
        split(later)
        after = sample(later, call)
    alone = sample(later, call)
    rounding = (alone - bare).abs().max()
    assert rounding < 1e-4, f"the bare one is {rounding} off"
    assert (after - found[0][1]).abs().max() < 1e-4, "split after the schedule was applied"
    for table, expected in found:
        again = masked(later, call, table)
        off = (again - expected).abs().max()
        assert off < 1e-4, f"split before: {off}, the bare one {rounding}"
        assert torch.equal(masked(later, call, without_feeders(table)), again)
    full = found[0][0].with_rows(torch.ones(found[0][0].rows.shape, dtype=torch.bool).numpy())
    assert torch.equal(masked(later, call, full), alone), "all computed"


@check
def split_tokens_sample_the_same() -> None:
    check_split(split_tokens)


@check
def split_layers_sample_the_same() -> None:
    check_split(split_layers)


def check_not_learned(split: Callable[[Any], None], what: str) -> None:
    pipe, call = tiny()
    split(pipe)
    run = stepmask.record(pipe, **call)
    graph = stepmask.trace(pipe, run)
    for learn in (stepmask.learn, stepmask.sweep):
        try:
            learn(pipe, run, graph=graph)
        except LearningError as error:
            assert f"{what} are split" in str(error)
        else:
            raise AssertionError(f"{learn} was not refused")


@check
def split_tokens_are_not_learned_from() -> None:
    check_not_learned(split_tokens, "tokens")


@check
def split_layers_are_not_learned_from() -> None:
    check_not_learned(split_layers, "layers")


class Halves(nn.Module):
    """Layers of which every other one answers with a DTensor, split by features."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor, t: float) -> Tensor:
        for wide, narrow in zip(self.layers[::2], self.layers[1::2], strict=True):
            x = x + narrow(torch.tanh(wide(x + t)))
        return x


def between(network: nn.Module) -> Callable[[], Tensor]:
    def run() -> Tensor:
        x = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))
        for step in range(5):
            x = x - 0.1 * network(x, 1 - step / 5)
        return x

    return run


@check
def blocks_that_answer_with_parts_are_refused() -> None:
    network = Halves().eval()
    run = stepmask.record(network, run=between(network))
    table = half_of(all_compute(network, run, "block"))
    mesh = init_device_mesh("cpu", (WORLD,))
    plan = {f"layers.{index}": ColwiseParallel(use_local_output=False) for index in (0, 2)}
    plan |= {f"layers.{index}": RowwiseParallel() for index in (1, 3)}
    parallelize_module(network, mesh, plan)
    again = stepmask.record(network, run=between(network))
    assert torch.allclose(again.sampled.latent, run.sampled.latent, atol=1e-6)
    for what in (lambda: stepmask.trace(network, again), lambda: masked_loop(network, table)):
        try:
            what()
        except StepmaskError as error:
            assert "use_local_output" in str(error), error
        else:
            raise AssertionError("not refused")


@check
def blocks_that_answer_with_their_half_alone_are_right() -> None:
    """Reused by what they answer; what they add to their input nobody can tell."""
    network = Halves().eval()
    run = stepmask.record(network, run=between(network))
    blocks = {f"layers.{index}": "output" for index in range(4)}
    graph = stepmask.trace(network, run, blocks=blocks)
    table = fixed_interval(MaskSchedule.all_compute(graph, run.denoiser, run.sampler), 0.5, order=1)
    delta = half_of(all_compute(network, run, "block"))
    expected = masked_loop(network, table)
    plan: dict[str, Any] = {f"layers.{index}": ColwiseParallel() for index in (0, 2)}
    plan |= {f"layers.{index}": RowwiseParallel() for index in (1, 3)}
    parallelize_module(network, init_device_mesh("cpu", (WORLD,)), plan)
    assert torch.allclose(masked_loop(network, table), expected, atol=1e-6)
    try:
        masked_loop(network, delta)
    except StepmaskError as error:
        assert "split between processes" in str(error), error
    else:
        raise AssertionError("what it adds was told")


def masked_loop(network: nn.Module, table: MaskSchedule) -> Tensor:
    with stepmask.apply(network, table), torch.no_grad():
        return between(network)()


def main(rank: int, folder: Path, only: list[str]) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=WORLD, timeout=timedelta(seconds=60))
    failed: dict[str, str] = {}
    checked = 0
    for name, function in CHECKS.items():
        if only and name not in only:
            continue
        try:
            function()
        except Exception:
            failed[name] = traceback.format_exc()
        checked += 1
    (folder / f"{rank}.json").write_text(json.dumps({"failed": failed, "checked": checked}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
