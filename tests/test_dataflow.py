"""What a trace sees of values that go past a block's arguments and answer: followed, or refused with the reason."""

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import stepmask
from stepmask import BlockGraph, MaskSchedule, Trajectory
from stepmask.errors import NoSuchBlock, TraceError
from stepmask.learning.per_timestep import PerTimestep
from stepmask.learning.trained import TrainedForecasts
from stepmask.schedule.forecasts import taylor_forecasts

STEPS = 6


class Network(nn.Module):
    """Three layers of width 4 and what `forward` makes of them; the weights are always the same."""

    def __init__(self, forward: Callable[..., Tensor], layer: Callable[[], nn.Module] | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList((layer or (lambda: nn.Linear(4, 4)))() for _ in range(3))
        self.wiring = forward
        self.eval()

    def forward(self, x: Tensor, t: float) -> Tensor:
        return self.wiring(self, x, t)


def loop(network: nn.Module) -> Callable[[], Tensor]:
    def sample() -> Tensor:
        x = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
        for step in range(STEPS):
            x = x - 0.1 * network(x, 1 - step / STEPS)
        return x

    return sample


def traced(network: nn.Module, blocks: Any = "layers.*", **options: Any) -> tuple[Trajectory, BlockGraph]:
    if isinstance(blocks, str):
        blocks = {blocks: "output"}
    trajectory = stepmask.record(network, run=loop(network))
    return trajectory, stepmask.trace(network, trajectory, blocks=blocks, **options)


def reads(graph: BlockGraph) -> dict[str, tuple[str, ...]]:
    return {block.label: block.reads for block in graph.blocks}


def sampled(network: nn.Module, trajectory: Trajectory, schedule: MaskSchedule) -> Tensor:
    with torch.no_grad(), stepmask.apply(network, schedule):
        return trajectory.sampling.run()  # type: ignore[misc]


def reused_from(trajectory: Trajectory, graph: BlockGraph, *columns: int, order: int = 0) -> MaskSchedule:
    """Some columns reused at every other step, everything else computed."""
    full = MaskSchedule.all_compute(graph, trajectory.denoiser, trajectory.sampler)
    rows = full.rows.copy()
    for column in columns:
        rows[order + 1 :: 2, column] = False
    return full.with_rows(rows, taylor_forecasts(rows, order))


class TestNumbers:
    """A number that the code around the blocks, or a block, takes out of a tensor."""

    def test_what_the_code_around_the_blocks_looks_at_is_read(self) -> None:
        def forward(net: Network, x: Tensor, t: float) -> Tensor:
            scale = net.layers[0](x + t).abs().max().item()
            return net.layers[2](net.layers[1](x) * scale)

        network = Network(forward)
        trajectory, graph = traced(network)
        assert reads(graph)["(denoiser)"] == ("layers.0", "layers.2")
        full = MaskSchedule.all_compute(graph, trajectory.denoiser, trajectory.sampler)
        assert torch.equal(sampled(network, trajectory, full), trajectory.sampled.latent)

    def test_a_number_that_a_block_returns_is_read(self) -> None:
        class Scaled(nn.Linear):
            def forward(self, x: Tensor) -> Any:
                y = super().forward(x)
                return y, float(y.abs().max())

        def forward(net: Network, x: Tensor, t: float) -> Tensor:
            _, scale = net.layers[0](x + t)
            return net.layers[1](x)[0] * scale + net.layers[2](x)[0]

        network = Network(forward, lambda: Scaled(4, 4))
        trajectory, graph = traced(network)
        assert "layers.0" in reads(graph)["(denoiser)"]
        full = MaskSchedule.all_compute(graph, trajectory.denoiser, trajectory.sampler)
        assert torch.equal(sampled(network, trajectory, full), trajectory.sampled.latent)

    def test_blocks_that_come_later_read_whose_number_was_told(self) -> None:
        def forward(net: Network, x: Tensor, t: float) -> Tensor:
            scale = net.layers[0](x + t).abs().max().item()
            return net.layers[1](x * scale)

        _, graph = traced(Network(forward), {"layers.0": "output", "layers.1": "output"})
        assert reads(graph)["layers.1"] == ("layers.0",)


class TestState:
    """What modules keep, and what is passed along in lists."""

    def test_an_output_that_another_block_finds_in_a_module_is_refused(self) -> None:
        class Stash(nn.Linear):
            def forward(self, x: Tensor, net: Any) -> Tensor:
                net.kept = super().forward(x)
                return net.kept  # type: ignore[no-any-return]

        class Read(nn.Linear):
            def forward(self, x: Tensor, net: Any) -> Tensor:
                return super().forward(x) + net.kept  # type: ignore[no-any-return]

        def forward(net: Network, x: Tensor, t: float) -> Tensor:
            net.layers[0](x + t, net)
            return net.layers[1](x, net)

        network = Network(forward)
        network.layers = nn.ModuleList([Stash(4, 4), Read(4, 4)])
        with pytest.raises(TraceError, match=r"'layers\.0' made or wrote to .* read by block 'layers\.1'"):
            traced(network)

    @pytest.mark.parametrize("holder", ["list", "dict", "module"])
    def test_a_tensor_that_leaves_a_block_unreturned_is_refused(self, holder: str) -> None:
        class Leak(nn.Linear):
            def forward(self, x: Tensor, kept: Any) -> Tensor:
                y = super().forward(x)
                if holder == "list":
                    kept.append(y * 2)
                elif holder == "dict":
                    kept["inner"] = y * 2
                else:
                    kept.inner = y * 2
                return y

        def forward(net: Network, x: Tensor, t: float) -> Tensor:
            kept: Any = {"list": [], "dict": {}, "module": net}[holder]
            y = net.layers[0](x + t, kept)
            inner = kept[-1] if holder == "list" else kept["inner"] if holder == "dict" else kept.inner
            return y + inner

        network = Network(forward)
        network.layers = nn.ModuleList([Leak(4, 4)])
        with pytest.raises(TraceError, match=r"'layers\.0' made or wrote to"):
            traced(network)

    @pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
    @pytest.mark.parametrize("layout", ["nested", "jagged", "sparse"])
    def test_what_is_not_dense_is_refused(self, layout: str) -> None:
        class Ragged(nn.Linear):
            def forward(self, x: Tensor) -> Tensor:
                y = super().forward(x)
                if layout == "sparse":
                    return y.to_sparse()
                return torch.nested.nested_tensor(
                    [y[:1], y[1:]], layout=torch.jagged if layout == "jagged" else torch.strided
                )

        def forward(net: Network, x: Tensor, t: float) -> Tensor:
            y = net.layers[0](x + t)
            return y.to_dense() if layout == "sparse" else torch.cat(list(y.unbind()))

        network = Network(forward, lambda: Ragged(4, 4))
        with pytest.raises(TraceError, match="dense tensors"):
            traced(network)

    def test_a_block_that_adds_up_in_a_buffer_is_refused(self) -> None:
        class Mean(nn.Linear):
            def __init__(self) -> None:
                super().__init__(4, 4)
                self.register_buffer("total", torch.zeros(2, 4))

            def forward(self, x: Tensor) -> Tensor:
                self.total += super().forward(x)
                return self.total * 0.5

        with pytest.raises(TraceError, match="keeps state in a tensor"):
            traced(Network(lambda net, x, t: x + net.layers[0](x + t), Mean))

    def test_a_block_that_answers_in_its_own_buffer_is_right(self) -> None:
        def forward(net: Network, x: Tensor, t: float) -> Tensor:
            for layer in net.layers:
                x = x + torch.tanh(layer(x + t))
            return x

        found = []
        for layer in (Buffered, lambda: nn.Linear(4, 4)):
            network = Network(forward, layer)
            trajectory, graph = traced(network)
            schedule = reused_from(trajectory, graph, 0, 1, 2, order=1)
            found.append(sampled(network, trajectory, schedule))
        assert torch.equal(*found)


class Buffered(nn.Linear):
    """Answers in one piece of memory, again and again."""

    def __init__(self) -> None:
        super().__init__(4, 4)
        self.register_buffer("answer", torch.zeros(2, 4), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        if y.requires_grad:
            return y
        self.answer.copy_(y)
        return self.answer


@pytest.mark.parametrize("learner", [TrainedForecasts(passes=1.2), PerTimestep(iterations=2, rounds=1)])
def test_learning_finds_the_same_where_blocks_answer_in_their_own_buffers(learner: Any) -> None:
    def forward(net: Network, x: Tensor, t: float) -> Tensor:
        for layer in net.layers:
            x = x + torch.tanh(layer(x + t))
        return x

    tables = []
    for layer in (Buffered, lambda: nn.Linear(4, 4)):
        network = Network(forward, layer)
        trajectory, graph = traced(network)
        tables.append(stepmask.learn(network, trajectory, budget=0.6, graph=graph, learner=learner))
    assert tables[0].rows.tolist() == tables[1].rows.tolist()
    assert tables[0].forecasts.tolist() == tables[1].forecasts.tolist()


class TestWrites:
    """Writes in place, inside of blocks and outside."""

    @pytest.mark.parametrize(
        "write",
        [
            lambda y: torch.mul(y, 2.0, out=y),
            lambda y: torch._foreach_mul_([y], 2.0),
            lambda y: y.data.mul_(2.0),
            lambda y: y.copy_(y * 2),
            lambda y: y[:, :2].add_(1),
            lambda y: torch.add(input=y, other=y, out=y),
        ],
        ids=["out", "foreach", "data", "copy", "part", "keywords"],
    )
    def test_into_a_blocks_output_are_refused(self, write: Callable[[Tensor], Any]) -> None:
        def forward(net: Network, x: Tensor, t: float) -> Tensor:
            y = net.layers[0](x + t)
            write(y)
            return net.layers[1](y)

        with pytest.raises(TraceError, match="changes in place"):
            traced(Network(forward))

    def test_of_one_block_into_the_output_of_another_are_refused(self) -> None:
        layer = lambda: nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 4))  # noqa: E731

        def forward(net: Network, x: Tensor, t: float) -> Tensor:
            return net.layers[1](net.layers[0](x + t))

        with pytest.raises(TraceError, match=r"'layers\.1', which changes in place what 'layers\.0' answered"):
            traced(Network(forward, layer))

    def test_into_the_denoisers_input_are_refused(self) -> None:
        layer = lambda: nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 4))  # noqa: E731
        with pytest.raises(TraceError, match="input is changed in place"):
            traced(Network(lambda net, x, t: net.layers[0](x) + t, layer))
        with pytest.raises(TraceError, match="input is changed in place"):
            traced(Network(lambda net, x, t: net.layers[0](x.mul_(0.5)) + t))

    def test_of_a_block_into_what_others_read_later_are_refused(self) -> None:
        class Clamp(nn.Linear):
            def forward(self, x: Tensor) -> Tensor:
                x.clamp_(-0.5, 0.5)  # not done when the block is reused
                return super().forward(x)

        def forward(net: Network, x: Tensor, t: float) -> Tensor:
            h = x + t
            gate = net.layers[0](h)
            return net.layers[2](h) + net.layers[1](gate)

        network = Network(forward)
        network.layers[0] = Clamp(4, 4)
        with pytest.raises(TraceError, match=r"'layers\.0' made or wrote to .* read by block 'layers\.2'"):
            traced(network)

    def test_of_a_block_into_the_buffer_that_it_answers_with_are_refused_where_others_read_it(self) -> None:
        class Static(nn.Linear):
            def forward(self, x: Tensor) -> Tensor:
                return self.answer.copy_(super().forward(x))

        network = Network(lambda net, x, t: net.layers[0](x + t) + net.layers[0].answer)
        network.layers[0] = Static(4, 4)
        network.layers[0].register_buffer("answer", torch.zeros(2, 4))
        with pytest.raises(TraceError, match=r"'layers\.0' made or wrote to .* read by the code around"):
            traced(network, {"layers.0": "output"})

        alone = Network(lambda net, x, t: net.layers[0](x + t) * 2)
        alone.layers[0] = network.layers[0]
        traced(alone, {"layers.0": "output"})

    def test_by_delta_is_not_for_blocks_that_answer_in_another_dtype(self) -> None:
        class Half(nn.Linear):
            def forward(self, x: Tensor) -> Tensor:
                return super().forward(x).bfloat16()

        network = Network(lambda net, x, t: net.layers[0](x + t).float() * 2, lambda: Half(4, 4))
        _, graph = traced(network, {"layers.0": None})
        assert graph.blocks[0].reuse == "output"
        with pytest.raises(TraceError, match="another dtype"):
            traced(network, {"layers.0": "delta"})

    def test_by_delta_is_not_for_blocks_that_change_their_stream(self) -> None:
        class Residual(nn.Linear):
            def forward(self, x: Tensor) -> Tensor:
                x += torch.tanh(super().forward(x))
                return x

        network = Network(lambda net, x, t: net.layers[0](x + t) * 2, lambda: Residual(4, 4))
        _, graph = traced(network, {"layers.0": None})
        assert graph.blocks[0].reuse == "output"
        with pytest.raises(TraceError, match="changes its input in place"):
            traced(network, {"layers.0": "delta"})

    def test_what_is_added_up_in_place_is_read(self) -> None:
        def forward(net: Network, x: Tensor, t: float) -> Tensor:
            h = x + t
            for layer in net.layers:
                h += layer(h)
            return h

        network = Network(forward)
        trajectory, graph = traced(network)
        schedule = reused_from(trajectory, graph, 0, 2)
        with torch.no_grad():
            expected = _by_hand(network, schedule)
        assert torch.equal(sampled(network, trajectory, schedule), expected)


def _by_hand(network: Network, schedule: MaskSchedule) -> Tensor:
    """The loop of the network that adds up in place, with copies of what was computed last."""
    x = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
    stored: list[Tensor] = [torch.empty(0)] * 3
    for step in range(STEPS):
        h = x + (1 - step / STEPS)
        for column, layer in enumerate(network.layers):
            if schedule.rows[step, column]:
                stored[column] = layer(h).clone()
            h = h + stored[column]
        x = x - 0.1 * h
    return x


class TestNoise:
    def test_inside_a_block_is_refused(self) -> None:
        class Noisy(nn.Linear):
            def forward(self, x: Tensor) -> Tensor:
                return super().forward(x) + torch.randn_like(x)

        with pytest.raises(TraceError, match="draws random numbers"):
            traced(Network(lambda net, x, t: x + net.layers[0](x + t), lambda: Noisy(4, 4)))

    def test_dropout_left_on_is_refused(self) -> None:
        network = Network(lambda net, x, t: x + net.layers[0](x + t), lambda: nn.Sequential(nn.Dropout(0.5)))
        network.train()
        with pytest.raises(TraceError, match=r"draws random numbers.*\.eval\(\)"):
            traced(network)


class TestPaths:
    """What later evaluations do, and the first does not."""

    def test_what_is_read_later_is_read(self) -> None:
        def forward(net: Network, x: Tensor, t: float) -> Tensor:
            a, b = net.layers[0](x + t), net.layers[1](x)
            return net.layers[2](b) + (3 * a if t < 0.6 else 0)

        network = Network(forward)
        trajectory, graph = traced(network)
        assert reads(graph)["(denoiser)"] == ("layers.0", "layers.2")
        full = MaskSchedule.all_compute(graph, trajectory.denoiser, trajectory.sampler)
        assert torch.equal(sampled(network, trajectory, full), trajectory.sampled.latent)

    @pytest.mark.parametrize("at", range(1, STEPS))
    def test_what_is_read_at_a_single_step_is_read(self, at: int) -> None:
        def forward(net: Network, x: Tensor, t: float) -> Tensor:
            a, b = net.layers[0](x + t), net.layers[1](x)
            return net.layers[2](b) + (3 * a if round((1 - t) * STEPS) == at else 0)

        network = Network(forward)
        _, graph = traced(network)
        assert reads(graph)["(denoiser)"] == ("layers.0", "layers.2")

    def test_tensors_that_decide_about_the_path_are_looked_at(self) -> None:
        def forward(net: Network, x: Tensor, t: float) -> Tensor:
            a, b = net.layers[0](x + t), net.layers[1](x)
            return net.layers[2](b) + (3 * a if torch.tensor(t) < 0.6 else 0)

        _, graph = traced(Network(forward))
        assert reads(graph)["(denoiser)"] == ("layers.0", "layers.2")

    def test_another_order_is_refused(self) -> None:
        def forward(net: Network, x: Tensor, t: float) -> Tensor:
            first, second = (0, 1) if t > 0.5 else (1, 0)
            return net.layers[2](net.layers[second](net.layers[first](x + t)))

        with pytest.raises(TraceError, match=r"calls block 'layers\.1' where the first one calls 'layers\.0'"):
            traced(Network(forward))

    @pytest.mark.parametrize("at", range(1, STEPS))
    def test_a_block_that_some_step_leaves_out_is_refused(self, at: int) -> None:
        def forward(net: Network, x: Tensor, t: float) -> Tensor:
            y = net.layers[1](net.layers[0](x + t))
            return y if round((1 - t) * STEPS) == at else net.layers[2](y)

        with pytest.raises(TraceError, match=r"layers\.2.*(not call|not called)"):
            traced(Network(forward))

    def test_a_block_that_some_step_calls_twice_is_refused(self) -> None:
        def forward(net: Network, x: Tensor, t: float) -> Tensor:
            y = net.layers[1](net.layers[0](x + t))
            return net.layers[2 if t > 0.5 else 1](y)

        with pytest.raises(TraceError, match="called twice"):
            traced(Network(forward))


class TestFeeders:
    """Modules in front of blocks are skipped only if they do nothing but to answer."""

    @pytest.mark.parametrize("effect", ["answers a number", "sets a number", "writes to its argument"])
    def test_one_with_an_effect_is_always_called(self, effect: str) -> None:
        class Norm(nn.Linear):
            def forward(self, x: Tensor, t: float, net: Any) -> Any:
                y = super().forward(x)
                if effect == "sets a number":
                    net.number = t
                if effect == "writes to its argument":
                    x.mul_(1 + t)
                return (y, t) if effect == "answers a number" else y

        def forward(net: Network, x: Tensor, t: float) -> Tensor:
            net.number = 0.0
            h = x + t
            y = net.norm(h, t, net)
            y, number = y if effect == "answers a number" else (y, net.number)
            return net.layers[0](y) * (1 + number) + h

        network = Network(forward)
        network.norm = Norm(4, 4)
        trajectory = stepmask.record(network, run=loop(network))
        if effect == "sets a number":  # which nothing but the proof can see
            with pytest.raises(TraceError, match="answers otherwise"):
                stepmask.trace(network, trajectory, blocks={"layers.0": "output"})
        else:
            assert stepmask.trace(network, trajectory, blocks={"layers.0": "output"}).fed == {}


class TestOutputs:
    def test_what_is_no_floating_point_is_answered_as_it_was_said_last(self) -> None:
        class Router(nn.Linear):
            def forward(self, x: Tensor) -> Any:
                y = super().forward(x)
                return y, y.argmax(dim=1), y > 0, y.mean()

        def forward(net: Network, x: Tensor, t: float) -> Tensor:
            y, index, mask, mean = net.layers[0](x + t)
            return y * mask + mean + index[:, None]

        network = Network(forward, lambda: Router(4, 4))
        trajectory, graph = traced(network, {"layers.0": "output"})
        schedule = reused_from(trajectory, graph, 0, order=1)

        x, said = torch.randn(2, 4, generator=torch.Generator().manual_seed(0)), []
        with torch.no_grad():
            for step in range(STEPS):
                t = 1 - step / STEPS
                if schedule.rows[step, 0]:
                    said.insert(0, network.layers[0](x + t))
                    y, index, mask, mean = said[0]
                else:
                    w = schedule.forecasts[step, 0]
                    y = w[0] * said[0][0] + w[1] * said[1][0]
                    mean = w[0] * said[0][3] + w[1] * said[1][3]
                    index, mask = said[0][1:3]
                x = x - 0.1 * (y * mask + mean + index[:, None])
        torch.testing.assert_close(sampled(network, trajectory, schedule), x)

    def test_of_whole_numbers_alone_is_reused_by_output(self) -> None:
        class Bucket(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return x * 2

        graph = stepmask.trace(nn.Sequential(Bucket()), (torch.arange(4),), blocks="*")
        assert graph.blocks[0].reuse == "output"


class TestNamedBlocks:
    @pytest.mark.parametrize("collection", [list, tuple, set, iter])
    def test_come_in_any_collection(self, collection: Callable[[Any], Any]) -> None:
        network = Network(lambda net, x, t: net.layers[1](net.layers[0](x + t)))
        graph = stepmask.trace(network, (torch.zeros(2, 4), 0.5), blocks=collection(["layers.0", "layers.1"]))
        assert graph.names == ("layers.0", "layers.1", "")
        with pytest.raises(NoSuchBlock):
            stepmask.trace(network, (torch.zeros(2, 4), 0.5), blocks=["layers.0", "typo"])

    def test_found_by_themselves_they_may_be_few_and_that_is_told(self, caplog: pytest.LogCaptureFixture) -> None:
        class Wide(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
                self.wide = nn.Linear(4, 64)

            def forward(self, x: Tensor) -> Tensor:
                return self.wide(self.layers[1](self.layers[0](x)))  # type: ignore[no-any-return]

        # 2·4·4 MACs a row in the layers, 4·64 outside: 256 / 288 = 89 %
        with caplog.at_level(logging.WARNING):
            stepmask.trace(Wide(), (torch.zeros(2, 4),))
        assert "89 % of the MACs" in caplog.text
        assert "'wide'" in caplog.text
        caplog.clear()
        stepmask.trace(Wide(), (torch.zeros(2, 4),), blocks="layers.*")
        assert not caplog.text


class Encoder(nn.Module):
    """torch's encoder layers, which it runs as one fused operation each where it can."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True) for _ in range(2))
        self.eval()

    def forward(self, x: Tensor, t: float) -> Tensor:
        for layer in self.layers:
            x = layer(x + t)
        return x


class TestFusedLayers:
    def test_their_macs_are_counted(self) -> None:
        graph = stepmask.trace(Encoder(), (torch.zeros(3, 5, 8), 0.5), blocks="layers.*")
        tokens, width, hidden = 5, 8, 16
        attention = 3 * (4 * tokens * width * width + 2 * tokens * tokens * width)
        feed_forward = 3 * 2 * tokens * width * hidden
        assert graph.macs.tolist() == [attention + feed_forward] * 2 + [0]

    def test_all_computed_they_say_the_same_to_the_bit(self) -> None:
        encoder = Encoder()

        def sample() -> Tensor:
            x = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0))
            for step in range(STEPS):
                x = x - 0.1 * encoder(x, 1 - step / STEPS)
            return x

        trajectory = stepmask.record(encoder, run=sample)
        graph = stepmask.trace(encoder, trajectory, blocks="layers.*")
        full = MaskSchedule.all_compute(graph, trajectory.denoiser, trajectory.sampler)
        with torch.no_grad(), stepmask.apply(encoder, full):
            assert torch.equal(sample(), trajectory.sampled.latent)

    def test_what_is_inside_them_is_refused_while_they_are_fused(self) -> None:
        example = (torch.zeros(3, 5, 8), 0.5)
        with pytest.raises(TraceError, match=r"set_fastpath_enabled\(False\)"):
            stepmask.trace(Encoder(), example, blocks="layers.*.self_attn")
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            assert len(stepmask.trace(Encoder(), example, blocks="layers.*.self_attn")) == 3
        finally:
            torch.backends.mha.set_fastpath_enabled(True)


def test_lists_that_are_popped_are_the_calls_own() -> None:
    def forward(net: Network, x: Tensor, control: Any) -> Tensor:
        scales = net.scales(x)
        for layer in net.layers:
            x = layer(x * scales.pop(0)) + control.pop()
        return x

    class Scales(nn.Linear):
        def forward(self, x: Tensor) -> list[Tensor]:
            return [*super().forward(x).chunk(3, dim=-1)]

    network = Network(forward)
    network.scales = Scales(4, 3)
    control = [torch.full((2, 4), float(number)) for number in range(3)]

    def run() -> Tensor:
        x = torch.ones(2, 4)
        with torch.no_grad():
            for _ in range(STEPS):
                x = x - 0.1 * network(x, list(control))
        return x

    bare = run()
    trajectory = stepmask.record(network, run=run)
    graph = stepmask.trace(network, trajectory, blocks={"layers.*": "output"})
    assert graph.fed == {"scales": (0, 1, 2)}
    whole = MaskSchedule.all_compute(graph, trajectory.denoiser, trajectory.sampler)
    with stepmask.apply(network, whole):
        assert torch.equal(run(), bare)
    rows = whole.rows.copy()
    rows[1::2, :-1] = False
    with stepmask.apply(network, whole.with_rows(rows)):
        run()
