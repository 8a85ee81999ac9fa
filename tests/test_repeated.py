"""Blocks that are found by themselves, in networks as public repositories write them."""

from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import stepmask
from promises import check_promises
from public_networks import CLASSES, SIDE, STEPS, Dit, Encoder, Middle, Nested, Row, network, sampler
from stepmask.denoiser.repeated import repeated_blocks
from stepmask.errors import TraceError
from stepmask.schedule.graph import DENOISER
from stepmask.schedule.rectify import lower

GLUE = {
    "attributes": 0.15,
    "dit": 0.05,
    "edm": 0.07,
    "edm of a dit": 0.05,
    "encoder": 0.05,
    "guided diffusion": 0.07,
    "mamba": 0.05,
    "nested lists": 0.07,
    "pairs": 0.05,
    "sequential": 0.05,
    "uvit": 0.05,
}
"""The most of the MACs that may lie outside of the blocks: a first and a last convolution are much of a tiny U-Net."""

NAMES = {
    "attributes": ["down1", "down2", "bot", "up1", "up2"],
    "dit": [f"blocks.{layer}.{part}" for layer in range(3) for part in ("attn", "mlp")],
    "edm": [f"model.{name}" for name in ("enc.8x8_block0", "enc.4x4_block0", "dec.4x4_in0", "dec.8x8_block0")],
    "edm of a dit": ["model.blocks.0.attn", "model.blocks.2.mlp"],
    "encoder": [f"encoder.layers.{layer}" for layer in range(3)],
    "guided diffusion": ["input_blocks.0", "input_blocks.2", "middle_block", "output_blocks.1"],
    "mamba": [f"backbone.layers.{layer}" for layer in range(3)],
    "nested lists": ["downs.0.0", "downs.1.2", "mid_block1", "mid_attn", "mid_block2", "ups.1.1", "final_res_block"],
    "pairs": [f"transformer.layers.{layer}.{part}" for layer in range(3) for part in range(2)],
    "sequential": [f"layers.{layer}.{part}" for layer in range(3) for part in ("attn", "mlp")],
    "uvit": ["in_blocks.0.attn", "mid_block.attn", "mid_block.mlp", "out_blocks.1"],
}
"""Some of the blocks of each."""


@lru_cache(maxsize=1)
def recorded(name: str) -> tuple[nn.Module, stepmask.Trajectory, stepmask.BlockGraph]:
    denoiser = network(name)
    trajectory = stepmask.record(denoiser, run=sampler(denoiser))
    return denoiser, trajectory, stepmask.trace(denoiser, trajectory)


@pytest.fixture(scope="module", params=sorted(NAMES))
def name(request: pytest.FixtureRequest) -> str:
    """Every network, all tests of one before those of the next."""
    return str(request.param)


def test_the_blocks_are_those_that_people_would_name(name: str) -> None:
    _, _, graph = recorded(name)
    assert set(NAMES[name]) <= set(graph.names)
    assert graph.costs[-1] <= GLUE[name]
    assert (graph.macs[:-1] > 0).all()


def test_a_random_table_keeps_its_promises(name: str) -> None:
    check_promises(*recorded(name))


def test_a_schedule_is_learned(name: str) -> None:
    denoiser, trajectory, graph = recorded(name)
    schedule = stepmask.sweep(denoiser, trajectory, graph=graph, probes=1, ages=2).schedule(0.7)
    assert lower(schedule).macs_share <= 0.7
    report = stepmask.evaluate(denoiser, schedule, run=sampler(denoiser), seed=[1, 2], rivals={"2": 2}, repeats=1)
    assert report["2"].macs_executed == 2 / STEPS
    assert 0 < report["schedule"].latent_error < 1


class Plain(nn.Module):
    """Convolutions in a list, in lists of a list, and in a row of their own; projections of the timestep beside."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.ModuleList([self.layer(), self.layer()])
        self.downs = nn.ModuleList(nn.ModuleList([self.layer(), self.layer()]) for _ in range(2))
        self.mid = nn.Sequential(self.layer(), nn.SiLU(), self.layer())
        self.pe_linears = nn.ModuleList([nn.Linear(1, 4), nn.Linear(1, 4)])

    def layer(self) -> nn.Module:
        return nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        for layer, linear in zip(self.first, self.pe_linears, strict=True):
            x = layer(x + linear(t.reshape(1))[:, None, None])
        for level in self.downs:
            for layer in level:  # type: ignore[union-attr]
                x = layer(x)
        return self.mid(x)  # type: ignore[no-any-return]


def test_lists_in_lists_and_rows_of_the_same_layers_leave_no_glue_and_trifles_are_no_blocks() -> None:
    graph = stepmask.trace(Plain(), (torch.randn(2, 4, SIDE, SIDE), torch.tensor(0.5)))
    downs = [f"downs.{level}.{layer}" for level in range(2) for layer in range(2)]
    assert graph.names == ("first.0", "first.1", *downs, "mid.0", "mid.2", DENOISER)
    assert graph.costs[-1] < 1e-3  # the projections


def test_what_is_shared_under_two_names_is_one_block() -> None:
    denoiser = Dit()
    denoiser.again = denoiser.blocks
    assert [name for name in repeated_blocks(denoiser) if not name.startswith("again")] == [
        f"blocks.{layer}" for layer in range(3)
    ]
    graph = stepmask.trace(denoiser, (torch.randn(2, 3, SIDE, SIDE), torch.ones(2)))
    assert graph.names == (*NAMES["dit"], DENOISER)


def test_a_compiled_wrapper_changes_no_name() -> None:
    denoiser = Row()
    plain = repeated_blocks(denoiser)
    wrapped: Any = torch.compile(denoiser)
    assert repeated_blocks(wrapped) == plain == [f"layers.{layer}" for layer in range(3)]


def test_a_network_that_repeats_nothing_is_told_which_modules_to_name() -> None:
    class Once(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.small, self.large = nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 32), nn.SiLU(), nn.Linear(32, 4))

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return self.large(self.small(x + t))  # type: ignore[no-any-return]

    with pytest.raises(TraceError, match=r"blocks=\['large', 'small'\]"):
        stepmask.trace(Once(), (torch.ones(2, 4), torch.ones(())))
    graph = stepmask.trace(Once(), (torch.ones(2, 4), torch.ones(())), blocks=["large", "small"])
    assert graph.names == ("small", "large", DENOISER)


def test_a_middle_alone_is_no_block_and_its_parts_are() -> None:
    class Around(Nested):
        """The middle in a module of its own."""

        def __init__(self) -> None:
            super().__init__()
            del self.mid_block1, self.mid_attn, self.mid_block2
            self.mid = Middle(32)

    names = repeated_blocks(Around())
    assert {"mid.first", "mid.attention", "mid.second"} <= set(names)
    assert "mid" not in names


class TestGuidanceInTwoCalls:
    """The conditional call with labels, the unconditional one with `None` in their place."""

    def test_it_is_masked_and_learned_for(self) -> None:
        denoiser = network("dit")
        trajectory = stepmask.record(denoiser, run=guided(denoiser))
        assert trajectory.sampler.branches == 2
        assert trajectory.sampler.timesteps == (1.0, 0.75, 0.5, 0.25)

        graph = stepmask.trace(denoiser, trajectory)
        check_promises(denoiser, trajectory, graph)
        schedule = stepmask.sweep(denoiser, trajectory, graph=graph, probes=1, ages=2).schedule(0.7)
        report = stepmask.evaluate(denoiser, schedule, run=guided(denoiser), seed=[1, 2], rivals={"3": 3}, repeats=1)
        assert report["3"].evaluations == 6
        assert report["3"].macs_executed == 0.75
        assert 0 < report["schedule"].latent_error < 1


def guided(denoiser: nn.Module) -> Any:
    def sample(seed: int = 0, steps: int = 4) -> Tensor:
        x = torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))
        labels = torch.arange(2) % CLASSES
        for step in range(steps):
            t = torch.full((2,), 1 - step / steps)
            told, untold = denoiser(x, t, labels), denoiser(x, t, None)
            x = x + (untold + 3 * (told - untold)) / steps
        return x

    return sample


class TestTorchsEncoder:
    """Its layers are fused into one operation each: a whole layer is a block, what is inside is none."""

    def test_sublayers_are_refused_unless_the_fast_path_is_off(self) -> None:
        denoiser = Encoder().eval()
        example = (torch.randn(2, 3, SIDE, SIDE), torch.ones(2))
        with pytest.raises(TraceError, match=r"set_fastpath_enabled\(False\) before you record"):
            stepmask.trace(denoiser, example, blocks="encoder.layers.*.self_attn")
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            trajectory = stepmask.record(denoiser, run=sampler(denoiser))
            graph = stepmask.trace(
                denoiser, trajectory, blocks=["encoder.layers.*.self_attn", "encoder.layers.*.linear1"]
            )
            check_promises(denoiser, trajectory, graph)
        finally:
            torch.backends.mha.set_fastpath_enabled(True)

    def test_what_it_computes_is_counted(self) -> None:
        denoiser = Encoder().eval()

        def sample(seed: int = 0, guidance: float | None = 2.0) -> Tensor:
            x = torch.randn(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))
            for t in (1.0, 0.5):
                given = x if guidance is None else torch.cat([x, 0.9 * x])
                said = denoiser(given, torch.full((len(given),), t))
                x = x + (said if guidance is None else said[:1] + guidance * (said[:1] - said[1:])) / 2
            return x

        trajectory = stepmask.record(denoiser, run=sample)
        graph = stepmask.trace(denoiser, trajectory)
        full = stepmask.MaskSchedule.all_compute(graph, trajectory.denoiser, trajectory.sampler)
        rivals = {"unguided": {"guidance": None}}
        report = stepmask.evaluate(denoiser, full, run=sample, rivals=rivals, seed=1, repeats=1)
        assert report["unguided"].evaluations == 2
        assert report["unguided"].macs_executed == pytest.approx(0.5)
        assert report["schedule"].macs_executed == 1
        assert report["schedule"].latent_errors == [0.0]
