"""Tracing: blocks, order, reads, shapes and MACs, from fake tensors."""

from functools import lru_cache
from threading import Lock
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import flex_attention

import stepmask
from denoisers import at, build, denoiser
from stepmask.errors import NoSuchBlock, TraceError
from stepmask.schedule.graph import DENOISER

from toys import Chain, Scale, Skips, tiny_dit, tiny_pixart, tiny_pixel_unet, tiny_unet, unet_graph

DIT_INPUTS = {
    "hidden_states": torch.zeros(2, 4, 8, 8),
    "timestep": torch.tensor([5, 5]),
    "class_labels": torch.tensor([1, 2]),
}
UNET_INPUTS = {
    "sample": torch.zeros(2, 4, 8, 8),
    "timestep": torch.tensor(5),
    "encoder_hidden_states": torch.zeros(2, 3, 8),
}


def test_reads_of_a_unet_follow_its_skips() -> None:
    graph = stepmask.trace(Skips(), (torch.zeros(1),), blocks=dict.fromkeys(Skips.names, "output"))
    assert graph.names == unet_graph().names
    assert [set(block.reads) for block in graph.blocks] == [set(block.reads) for block in unet_graph().blocks]


def test_nothing_is_computed_and_nothing_stays_attached() -> None:
    denoiser = Chain()
    stepmask.trace(denoiser, (torch.full((2,), torch.nan), 0.0), blocks="layers.*")
    assert [type(layer) for layer in denoiser.layers] == [Scale, Scale]


@pytest.mark.parametrize(
    "name", ["AnyFlowTransformer3DModel", "BriaFibo2Transformer2DModel", "QwenImageTransformer2DModel"]
)
def test_nothing_fake_stays_in_what_a_denoiser_keeps_for_later(name: str) -> None:
    traced, inputs = build(name)
    example = {"timestep": at(900.0), **inputs}
    stepmask.trace(traced, example)
    assert torch.equal(traced(**example).sample, denoiser(name)(**example).sample)


@lru_cache(maxsize=1)
def embedding(t: float) -> Tensor:
    """Of a timestep, kept by the module that it is in, as rotary tables often are."""
    return torch.full((4,), t)


class Cached(nn.Module):
    """x ↦ first(x + e) + second(x + e), e = the embedding of the timestep."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])

    def forward(self, x: Tensor, t: float) -> Tensor:
        x = x + embedding(t)
        return self.layers[0](x) + self.layers[1](x)


def test_nothing_fake_stays_in_a_cache_outside_of_the_denoiser() -> None:
    denoiser = Cached()

    def run() -> Tensor:
        x = torch.ones(2, 4)
        for step in range(4):
            x = x - 0.1 * denoiser(x, 1 - step / 4)
        return x

    trajectory = stepmask.record(denoiser, run=run)
    graph = stepmask.trace(denoiser, trajectory, prove=False)
    assert type(embedding(0.25)) is type(embedding(1.0)) is Tensor  # the last and the first timestep that were traced
    stepmask.sweep(denoiser, trajectory, graph=graph, probes=1)
    assert type(embedding(1.0)) is Tensor
    assert torch.equal(run(), trajectory.sampled.latent)


def test_what_cannot_be_copied_is_evaluated() -> None:
    chain = Chain()
    chain.lock = Lock()
    assert len(stepmask.trace(chain, (torch.ones(2), 0.0), blocks="layers.*").blocks) == 3


class Added(nn.Module):
    """x ↦ x + first(x + t) + second(x + t)."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Sequential(nn.Linear(4, 4))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return x + self.first(x + t) + self.second(x + t)


class Wrapped(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        said: Tensor = self.inner(x, t)
        return x - said


@pytest.mark.parametrize(
    "compiled",
    [torch.jit.script, lambda module: torch.jit.trace(module, (torch.ones(2, 4), torch.ones(())))],
)
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_blocks_inside_a_module_of_torch_jit_are_refused_and_itself_is_one(compiled: Any) -> None:
    inner = compiled(Added())

    def loop(network: nn.Module) -> Tensor:
        x = torch.ones(2, 4)
        for step in range(3):
            x = x - 0.1 * network(x, torch.tensor(1 - step / 4))
        return x

    trajectory = stepmask.record(inner, run=lambda: loop(inner))
    assert trajectory.sampler.timesteps == (1.0, 0.75, 0.5)
    with pytest.raises(TraceError, match=r"block 'first' inside a module that torch\.jit has compiled, the denoiser"):
        stepmask.trace(inner, trajectory, blocks=["first", "second"])

    outer = Wrapped(inner)
    whole = stepmask.record(outer, run=lambda: loop(outer))
    with pytest.raises(TraceError, match=r"block 'inner\.second\.0' inside .*, 'inner'"):
        stepmask.trace(outer, whole, blocks="inner.second.0")
    assert stepmask.trace(outer, whole, blocks={"inner": "output"}).names == ("inner", DENOISER)


def test_shapes_decide_how_a_pattern_is_reused() -> None:
    denoiser = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 5))
    graph = stepmask.trace(denoiser, (torch.zeros(7, 3),), blocks="*")
    assert [block.reuse for block in graph.blocks] == ["delta", "output", "output"]


def test_macs_and_bytes_by_hand() -> None:
    # 7 rows through 3 → 4 → 5: 7·3·4 and 7·4·5 MACs; values of 7·4 and 7·5 floats
    denoiser = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5))
    graph = stepmask.trace(denoiser, (torch.zeros(7, 3),), blocks="*")
    assert graph.macs.tolist() == [84, 140, 0]
    assert [block.bytes for block in graph.blocks] == [112, 140, 140]
    assert [block.shapes for block in graph.blocks] == [((7, 4),), ((7, 5),), ((7, 5),)]


def test_dit_macs_match_the_formula_of_its_layers() -> None:
    graph = stepmask.trace(tiny_dit(layers=1), DIT_INPUTS)
    width, tokens, batch = 16, 16, 2
    attention = batch * (4 * tokens * width * width + 2 * tokens * tokens * width)  # projections; QKᵀ and AV
    feed_forward = batch * 2 * tokens * width * 4 * width
    assert graph.macs[:2].tolist() == [attention, feed_forward]
    assert graph.names == ("transformer_blocks.0.attn1", "transformer_blocks.0.ff", DENOISER)


@pytest.mark.parametrize(
    ("make", "inputs", "granularity", "count"),
    [
        (tiny_dit, DIT_INPUTS, "block", 3),
        (tiny_dit, DIT_INPUTS, "sublayer", 6),
        (tiny_pixart, {**DIT_INPUTS, "encoder_hidden_states": torch.zeros(2, 3, 8),
                       "added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}, "sublayer", 9),
        (tiny_unet, UNET_INPUTS, "block", 14),
        (tiny_unet, UNET_INPUTS, "sublayer", 30),
        (tiny_pixel_unet, {"sample": torch.zeros(2, 3, 8, 8), "timestep": 5}, "block", 14),
    ],
)  # fmt: skip
def test_known_families(make: Any, inputs: dict[str, Any], granularity: Any, count: int) -> None:
    inputs = {name: value for name, value in inputs.items() if make is not tiny_pixart or name != "class_labels"}
    graph = stepmask.trace(make(), inputs, granularity=granularity)
    assert len(graph) - 1 == count
    assert all(block.macs > 0 and block.bytes > 0 for block in graph.blocks)


def test_a_unet_reads_its_skips() -> None:
    graph = stepmask.trace(tiny_unet(), UNET_INPUTS, granularity="block")
    last_resnet = graph.blocks[graph.column("up_blocks.1.resnets.1")]
    assert last_resnet.reads == ("up_blocks.1.attentions.0",)  # the other half of its input is conv_in, no block
    first = graph.blocks[graph.column("up_blocks.1.resnets.0")]
    assert "down_blocks.0.attentions.0" in first.reads


def test_a_pattern_without_a_match_is_an_error() -> None:
    with pytest.raises(NoSuchBlock, match=r"'layer\.\*'.*layers\.0"):
        stepmask.trace(Chain(), (torch.zeros(2), 0.0), blocks="layer.*")
    with pytest.raises(NoSuchBlock):
        stepmask.trace(Chain(), (torch.zeros(2), 0.0), blocks={"layers.*": "output", "typo.*": "output"})


def test_an_unknown_class_has_the_elements_of_its_module_lists_as_blocks() -> None:
    graph = stepmask.trace(Chain(), (torch.zeros(2), 0.0))
    assert graph.names == ("layers.0", "layers.1", DENOISER)


def test_an_unknown_class_that_repeats_nothing_asks_for_names() -> None:
    with pytest.raises(TraceError, match=r"blocks=\['down0', 'down1', 'mid', 'up1', 'up0'\]"):
        stepmask.trace(Skips(), (torch.zeros(2),))


def test_blocks_inside_blocks_are_refused() -> None:
    with pytest.raises(TraceError, match="contains block"):
        stepmask.trace(
            tiny_dit(), DIT_INPUTS, blocks={"transformer_blocks.*": "delta", "transformer_blocks.*.ff": None}
        )


class Odd(nn.Module):
    """Does to its layer what a denoiser should not."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.layer, self.spare, self.kind = Scale(2.0), Scale(2.0), kind

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        if self.kind == "twice":
            return self.layer(y)
        return y.view(-1).add_(1) if self.kind == "in place" else y


@pytest.mark.parametrize(
    ("kind", "blocks", "message"),
    [
        ("twice", "layer", r"called twice.*hand over that network as the denoiser"),
        ("in place", "layer", "in place"),
        ("fine", "*", "did not call"),
    ],
)
def test_what_cannot_be_masked_is_refused(kind: str, blocks: str, message: str) -> None:
    with pytest.raises(TraceError, match=message):
        stepmask.trace(Odd(kind), (torch.zeros(2),), blocks=blocks)


class Flexible(nn.Module):
    """A block of flex attention."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Scale(2.0)])

    def forward(self, x: Tensor) -> Tensor:
        heads = self.layers[0](x)[:, None]
        return flex_attention(heads, heads, heads)[:, 0]  # type: ignore[no-any-return, index]


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_is_refused() -> None:
    with pytest.raises(TraceError, match="flex_attention"):
        stepmask.trace(Flexible(), (torch.randn(1, 16, 8),), blocks="layers.*")


def test_delta_needs_a_stream() -> None:
    with pytest.raises(TraceError, match="has not the shape of its input"):
        stepmask.trace(nn.Sequential(nn.Linear(3, 5)), (torch.zeros(7, 3),), blocks={"*": "delta"})


def test_a_pipeline_without_a_denoiser_is_refused() -> None:
    with pytest.raises(TraceError, match="neither a transformer nor a U-Net"):
        stepmask.trace(object(), (torch.zeros(1),))


class Assembled(nn.Module):
    """x ↦ (2x, 3x) side by side, each written into its place, then 5 times that."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.both = Scale(2.0), Scale(3.0), Scale(5.0)

    def forward(self, x: Tensor) -> Tensor:
        joined = x.new_zeros(2, len(x))
        joined[0] = self.left(x)
        joined[1] = self.right(x)
        return self.both(joined)


def test_what_is_written_into_a_part_is_read_with_the_whole() -> None:
    graph = stepmask.trace(Assembled(), (torch.zeros(3),), blocks=dict.fromkeys(("left", "right", "both"), "output"))
    assert graph.blocks[2].reads == ("left", "right")


class Fed(nn.Module):
    """Layers behind norms: `norm` before both layers, what it answers scaled and shifted or used in other ways."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.norm, self.way = nn.Sequential(Scale(0.5), Scale(2.0)), way
        self.layers = nn.ModuleList([Scale(3.0), Scale(5.0)])

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        if self.way == "twice":
            h = self.norm(x)
        if self.way == "its numbers matter":
            h = h.cumsum(0)
        if self.way == "changed in place":
            h.add_(1)
        x = x + self.layers[0](h.view(-1) * 2 + 1)
        x = x + self.layers[1](h[:, None].to(torch.float64).squeeze(1))
        return x + h if self.way == "read by the denoiser" else x


def test_what_only_blocks_read_feeds_them() -> None:
    graph = stepmask.trace(Fed("blocks alone"), (torch.ones(3),), blocks={"layers.*": "output"})
    assert graph.fed == {"norm": (0, 1)}
    assert graph.blocks[0].feeders == ("norm",)


@pytest.mark.parametrize("way", ["twice", "its numbers matter", "changed in place", "read by the denoiser"])
def test_what_others_read_feeds_nobody(way: str) -> None:
    assert stepmask.trace(Fed(way), (torch.ones(3),), blocks={"layers.*": "output"}).fed == {}


def test_what_is_reused_by_delta_reads_its_stream() -> None:
    assert stepmask.trace(Fed("blocks alone"), (torch.ones(3),), blocks={"layers.*": "delta"}).fed == {}
