"""A graph is proven on the recorded run: what a trace cannot see, the numbers show."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

import stepmask
from pipelines import make
from stepmask import MaskSchedule
from stepmask.denoiser.proof import MOST_REPEATED, AnotherPath, check_against_record
from stepmask.errors import LearningError, TraceError
from test_dataflow import STEPS, Network, loop, traced


class Counting(nn.Linear):
    """Says something else at every call, by a Python number that no trace can see."""

    def __init__(self) -> None:
        super().__init__(4, 4)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x) * self.calls


def test_what_was_not_traced_is_refused_with_step_and_block() -> None:
    class Loud(nn.Linear):
        def forward(self, x: Tensor, net: Any) -> Tensor:
            y = super().forward(x)
            net.loudness = y.detach().numpy().max()
            return y

    # Nothing reads what layer 0 answers, but layer 2 is scaled by a number that it left in the network.
    def forward(net: Network, x: Tensor, t: float) -> Tensor:
        net.layers[0](x + t, net)
        return net.layers[2](net.layers[1](x)) * float(net.loudness)

    network = Network(forward)
    network.layers[0] = Loud(4, 4)
    network.loudness = 1.0
    with pytest.raises(TraceError, match=r"at step 1 with block 'layers\.0' left out"):
        traced(network)


def test_a_block_with_a_counter_is_no_denoiser_that_repeats_itself() -> None:
    with pytest.raises(
        TraceError, match=r"does not repeat itself: at step 0.*draws noise, counts its evaluations or keeps something"
    ):
        traced(Network(lambda net, x, t: net.layers[0](x + t), Counting), "layers.0")


@pytest.mark.parametrize("reset", [False, True], ids=["on and on", "from the first timestep on"])
def test_a_counter_of_evaluations_is_refused(reset: bool) -> None:
    def forward(net: Network, x: Tensor, t: float) -> Tensor:
        net.step = 0 if reset and t == 1.0 else getattr(net, "step", -1) + 1
        strength = 2.0 if net.step == 2 else 1.0  # a number that no trace can see
        return net.layers[0](x + t) * strength

    def sampled_from_the_first_step(network: Network) -> Any:
        def run() -> Tensor:
            network.step = -1
            return loop(network)()

        return run

    network = Network(forward)
    trajectory = stepmask.record(network, run=sampled_from_the_first_step(network))
    with pytest.raises(TraceError, match="when the calls come in another order"):
        stepmask.trace(network, trajectory, blocks="layers.0")


def test_training_mode_is_named() -> None:
    generator = np.random.default_rng(0)

    def forward(net: Network, x: Tensor, t: float) -> Tensor:
        noise = generator.normal() if net.training else 0.0  # numpy's, which no trace sees
        return net.layers[0](x + noise + t)

    network = Network(forward)
    network.train()
    with pytest.raises(TraceError, match=r"training mode.*call \.eval\(\)"):
        traced(network, "layers.0")


def test_a_loop_that_draws_other_noise_is_named() -> None:
    network = Network(lambda net, x, t: net.layers[0](x + t))
    generator = torch.Generator().manual_seed(0)

    def sample() -> Tensor:
        x = torch.randn(2, 4, generator=generator)
        for step in range(STEPS):
            x = x - 0.1 * network(x, 1 - step / STEPS)
        return x

    trajectory = stepmask.record(network, run=sample)
    with pytest.raises(TraceError, match="loop that does not repeat itself: at step 0"):
        stepmask.trace(network, trajectory, blocks={"layers.0": "output"})


def test_a_function_that_is_bound_late_is_named() -> None:
    network = Network(lambda net, x, t: net.layers[0](x + t))

    def sample(seed: int) -> Tensor:
        x = torch.randn(2, 4, generator=torch.Generator().manual_seed(seed))
        for step in range(STEPS):
            x = x - 0.1 * network(x, 1 - step / STEPS)
        return x

    trajectories = []
    for number in range(2):
        trajectories.append(stepmask.record(network, run=lambda: sample(number)))  # noqa: B023
    with pytest.raises(TraceError, match="bound late"):
        stepmask.trace(network, trajectories[0], blocks={"layers.0": "output"})
    stepmask.trace(network, trajectories[1], blocks={"layers.0": "output"})

    # another one's graph is proven, and the sweep that learning begins with sees it
    graph = stepmask.trace(network, trajectories[1], blocks={"layers.0": "output"})
    with pytest.raises(LearningError, match=r"away from the recorded.*bound late.*arguments, weights"):
        stepmask.sweep(network, trajectories[0], graph=graph)


def test_dropout_that_is_left_on_is_named() -> None:
    network = Network(lambda net, x, t: net.layers[0](nn.functional.dropout(x + t, 0.5, net.training)))
    network.train()
    with pytest.raises(TraceError, match=r"draws random numbers.*[Cc]all \.eval\(\) if it is dropout"):
        traced(network, "layers.0")


def test_a_sampler_in_the_place_of_its_network_is_told_to_hand_that_over() -> None:
    def guided(net: Network, x: Tensor, t: float) -> Tensor:
        return 2 * net.layers[0](x + t) - net.layers[0](x)

    with pytest.raises(TraceError, match=r"'layers\.0', which is called twice.*hand over that network as the denoiser"):
        traced(Network(guided), "layers.0")


def test_a_step_that_goes_another_way_is_told_by_its_number() -> None:
    def forward(net: Network, x: Tensor, t: float) -> Tensor:
        a, b = net.layers[0](x + t), net.layers[1](x)
        return net.layers[2](b) + (3 * a if t < 0.4 else 0)

    network = Network(forward)
    trajectory = stepmask.record(network, run=loop(network))
    first = stepmask.trace(network, trajectory.calls[0], blocks={"layers.*": "output"})
    with pytest.raises(AnotherPath, match="read by") as caught:
        check_against_record(trajectory, first)
    assert caught.value.evaluation == 4  # t = 1 − 4/6 is the first below .4
    check_against_record(trajectory, stepmask.trace(network, trajectory, blocks={"layers.*": "output"}))


def test_it_may_be_left_out_and_costs_three_samplings_and_some_evaluations() -> None:
    network = Network(lambda net, x, t: net.layers[1](net.layers[0](x + t)))
    trajectory = stepmask.record(network, run=loop(network))
    calls: list[int] = []
    network.register_forward_hook(lambda *_: calls.append(1))
    stepmask.trace(network, trajectory, blocks={"layers.0": "output", "layers.1": "output"}, prove=False)
    traced_alone = len(calls)
    stepmask.trace(network, trajectory, blocks={"layers.0": "output", "layers.1": "output"})
    assert 2 * STEPS < len(calls) - 2 * traced_alone <= 3 * STEPS + MOST_REPEATED  # two of them sparse


def test_a_stream_that_is_changed_unseen_is_refused() -> None:
    class Sneaky(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            if not isinstance(x, FakeTensor):
                x.numpy()[...] *= 0.5  # torch counts no such write
            return y

    network = Network(lambda net, x, t: net.layers[0](x + t))
    network.layers[0] = Sneaky(4, 4)
    with pytest.raises(TraceError, match=r"'layers\.0', which changes its input in place"):
        traced(network, {"layers.0": "delta"})


@pytest.mark.parametrize("at", range(STEPS))
def test_an_output_that_is_changed_unseen_at_any_step_is_refused(at: int) -> None:
    def forward(net: Network, x: Tensor, t: float) -> Tensor:
        y = net.layers[0](x + t)
        if round((1 - t) * STEPS) == at and not isinstance(x, FakeTensor):
            y.numpy()[...] *= 0.5
        return net.layers[1](y)

    with pytest.raises(TraceError, match=r"'layers\.0', whose output is changed in place at evaluation"):
        traced(Network(forward), {"layers.0": "output", "layers.1": "output"})


CACHE: dict[str, Tensor] = {}


def test_nothing_fake_stays_in_a_cache_outside_of_the_denoiser() -> None:
    def forward(net: Network, x: Tensor, t: float) -> Tensor:
        return net.layers[0](x + t) + CACHE.setdefault("twos", x.new_full((4,), 2.0))

    network = Network(forward)
    trajectory = stepmask.record(network, run=loop(network))
    CACHE.clear()  # as in another process than the one that recorded
    stepmask.trace(network, trajectory, blocks={"layers.0": "output"})
    assert not any(isinstance(tensor, FakeTensor) for tensor in CACHE.values())


@pytest.mark.parametrize("kind", ["learn", "sweep"])
def test_learning_begins_with_it(kind: str) -> None:
    network = Network(lambda net, x, t: net.layers[1](net.layers[0](x + t)), Counting)
    trajectory = stepmask.record(network, run=loop(network))
    with pytest.raises(TraceError, match="does not repeat itself"):
        stepmask.learn(network, trajectory, budget=0.6) if kind == "learn" else stepmask.sweep(network, trajectory)


def test_nothing_is_left_on_a_denoiser_that_is_refused() -> None:
    network = Network(lambda net, x, t: net.layers[0](x + t), Counting)
    trajectory = stepmask.record(network, run=loop(network))
    before = [dict(vars(module)) for module in network.modules()]
    with pytest.raises(TraceError):
        stepmask.trace(network, trajectory, blocks={"layers.0": "output"})
    assert [vars(module).keys() for module in network.modules()] == [old.keys() for old in before]


@pytest.mark.parametrize("name", ["DiTPipeline", "QwenImagePipeline"])
def test_a_pipeline_that_samples_the_same_is_proven(name: str) -> None:
    pipe, call = make(name)
    trajectory = stepmask.record(pipe, **call)
    graph = stepmask.trace(pipe, trajectory)
    full = MaskSchedule.all_compute(graph, trajectory.denoiser, trajectory.sampler)
    with stepmask.apply(pipe, full):
        assert torch.equal(trajectory.sampling().latent, trajectory.sampled.latent)
