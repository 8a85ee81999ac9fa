"""Random denoiser networks: their description, the network and loop built from it, and an oracle for their masked run.

A description is plain data that hypothesis draws and shrinks. Blocks are tanh layers on (batch, width); *traits* are
what a network or a loop does beside that: writes in place, state, numbers that leave tensors, paths that depend on t.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional
from torch.utils import _pytree as pytree

from stepmask import MaskSchedule
from stepmask.schedule.forecasts import PLAIN

BATCH = 2
EVERY = 6
"""Where a trait is that all blocks have."""


@dataclass(frozen=True)
class Trait:
    """Something out of the ordinary that happens, in a way, at a block or at every one of them."""

    name: str
    at: int
    how: str = ""

    def __str__(self) -> str:
        return f"{self.name} ({self.how})" if self.how else self.name


@dataclass(frozen=True)
class Wire:
    """What a block is given, from the values before it (0 = the newest), and how it is asked to be reused."""

    glue: str
    first: int
    second: int
    reuse: str | None


@dataclass(frozen=True, repr=False)
class Description:
    """A network and the loop that samples with it."""

    wires: tuple[Wire, ...]
    traits: tuple[Trait, ...] = ()
    skip: int = 0  # which value the head reads beside the newest
    width: int = 4
    seed: int = 0
    steps: int = 4
    timestep: str = "number"
    branches: str = "one"
    sampler: str = "plain"

    def __deepcopy__(self, memo: Any) -> "Description":
        return self

    def at(self, block: int, kinds: Any) -> list[Trait]:
        """The traits of some kinds at a block."""
        own = [trait for trait in self.traits if trait.name in kinds]
        return [trait for trait in own if trait.at == EVERY or trait.at % len(self.wires) == block]

    def of(self, name: str) -> list[Trait]:
        """The traits of a name."""
        return [trait for trait in self.traits if trait.name == name]

    def __repr__(self) -> str:
        lines = [
            f"width {self.width}, seed {self.seed}; {self.steps} steps, {self.branches} call(s) a step, "
            f"timestep: {self.timestep}, sampler: {self.sampler}"
        ]
        for block, wire in enumerate(self.wires):
            what = ", ".join(map(str, self.at(block, {**INSIDE, **AFTER, **FLOW}))) or "plain"
            lines.append(f"  b{block} of {wire.glue}(-{wire.first}, -{wire.second}), reuse {wire.reuse}: {what}")
        whole = ", ".join(str(trait) for trait in self.traits if trait.name in WHOLE) or "plain"
        lines.append(f"  head reads newest and -{self.skip}; the network: {whole}")
        return "\n".join(lines)


# --- In-place writes ------------------------------------------------------------------------------------------------


def _set_item(tensor: Tensor) -> None:
    tensor[:, :2] = tensor[:, :2] * 0.5 + 0.1


def _through_a_view(tensor: Tensor) -> None:
    tensor.t()[1:].sub_(0.1)


WRITES: dict[str, Callable[[Tensor], Any]] = {
    "mul_": lambda tensor: tensor.mul_(0.8),
    "add_": lambda tensor: tensor.add_(0.1),
    "setitem": _set_item,
    "copy_": lambda tensor: tensor.copy_(tensor * 0.7 + 0.1),
    "foreach": lambda tensor: torch._foreach_mul_([tensor], 0.8),
    "out": lambda tensor: torch.mul(tensor, 0.8, out=tensor),
    "view": _through_a_view,
    "relu": lambda tensor: functional.relu(tensor, inplace=True),
    "data": lambda tensor: tensor.data.mul_(0.8),
}


# --- What a block does beside its layer -----------------------------------------------------------------------------


@dataclass
class Given:
    """What one call of a block was given."""

    x: Tensor
    extra: Tensor | None = None
    t: Any = None
    skips: list[Tensor] = field(default_factory=list)
    notes: dict[str, Tensor] = field(default_factory=dict)


Inside = Callable[["Layer", Given, Any, str], Any]
BEFORE: dict[str, Inside] = {}
MIDDLE: dict[str, Inside] = {}
ANSWER: dict[str, Inside] = {}
PACKED: dict[str, Inside] = {}
HOWS: dict[str, tuple[str, ...]] = {}
FUNCTION = Callable[..., Any]


def trait(registry: dict[str, Any], name: str, *hows: str) -> Callable[[FUNCTION], FUNCTION]:
    """Enter a trait: its name, and the ways it comes in."""

    def enter(function: FUNCTION) -> FUNCTION:
        registry[name] = function
        HOWS[name] = hows or ("",)
        return function

    return enter


@trait(BEFORE, "writes its argument", *WRITES)
def _(block: "Layer", given: Given, y: Any, how: str) -> None:
    WRITES[how](given.x)


@trait(BEFORE, "writes a keyword argument", *WRITES)
def _(block: "Layer", given: Given, y: Any, how: str) -> None:
    if given.extra is not None:  # a block that another one calls gets none
        WRITES[how](given.extra)


@trait(BEFORE, "writes shared state", "mul_", "add_", "foreach", "out", "setitem")
def _(block: "Layer", given: Given, y: Any, how: str) -> None:
    bank = block.network.bank_for(given.x)
    bank.add_(given.x)
    WRITES[how](bank)


@trait(MIDDLE, "writes its own temporary", *WRITES)
def _(block: "Layer", given: Given, y: Tensor, how: str) -> Tensor:
    WRITES[how](y)
    return y


@trait(MIDDLE, "reads its timestep")
def _(block: "Layer", given: Given, y: Tensor, how: str) -> Tensor:
    return y if given.t is None else y + 0.1 * column(given.t)  # a block that another one calls gets none


@trait(MIDDLE, "reads a keyword argument")
def _(block: "Layer", given: Given, y: Tensor, how: str) -> Tensor:
    return y if given.extra is None else y + 0.5 * given.extra


@trait(MIDDLE, "draws noise", "randn_like", "normal_", "dropout", "rand")
def _(block: "Layer", given: Given, y: Tensor, how: str) -> Tensor:
    if how == "dropout":
        return functional.dropout(y, 0.3, training=True)
    if how == "rand":
        return y + 0.2 * torch.rand(y.shape, dtype=y.dtype)
    return y + 0.2 * (torch.randn_like(y) if how == "randn_like" else torch.empty_like(y).normal_())


@trait(MIDDLE, "keeps a state", "rebound", "in place")
def _(block: "Layer", given: Given, y: Tensor, how: str) -> Tensor:
    old = block.state.setdefault(tuple(y.shape), torch.zeros_like(y))
    answer = y + old
    if how == "rebound":
        block.state[tuple(y.shape)] = 0.5 * old + y
    else:
        old.mul_(0.5).add_(y)
    return answer


@trait(MIDDLE, "counts its calls", "number", "tensor")
def _(block: "Layer", given: Given, y: Tensor, how: str) -> Tensor:
    if how == "tensor":
        block.ticks.add_(1)
        return y * (1 + 0.1 * block.ticks)
    block.calls += 1
    return y * (1 + 0.1 * block.calls)


@trait(MIDDLE, "stores a tensor in the network", "for a block", "for the glue")
def _(block: "Layer", given: Given, y: Tensor, how: str) -> Tensor:
    block.network.stash[how] = y
    return y


@trait(MIDDLE, "stores a number in the network", "for a block", "for the glue")
def _(block: "Layer", given: Given, y: Tensor, how: str) -> Tensor:
    block.network.numbers[how] = y.abs().max().item()
    return y


@trait(MIDDLE, "reads a number of its own", "item", "branch")
def _(block: "Layer", given: Given, y: Tensor, how: str) -> Tensor:
    if how == "item":
        return y / (1 + y.abs().max().item())
    return y * 0.5 if y.mean() > 0 else y


@trait(MIDDLE, "appends to a list")
def _(block: "Layer", given: Given, y: Tensor, how: str) -> Tensor:
    given.skips.append(y * 0.5)
    return y


@trait(MIDDLE, "writes into a dictionary")
def _(block: "Layer", given: Given, y: Tensor, how: str) -> Tensor:
    given.notes["note"] = y * 0.5
    return y


@trait(ANSWER, "answers its argument", "changed", "as it is", "a view")
def _(block: "Layer", given: Given, y: Tensor, how: str) -> Tensor:
    if how == "changed":
        return given.x.add_(y)
    return given.x if how == "as it is" else given.x[:, :]


@trait(ANSWER, "answers a view", "of a bigger tensor", "of a chunk", "transposed")
def _(block: "Layer", given: Given, y: Tensor, how: str) -> Tensor:
    if how == "of a chunk":
        return torch.cat([y, y * 2], dim=1).chunk(2, dim=1)[1]
    return y.t().contiguous().t() if how == "transposed" else torch.cat([y, y * 2])[: len(y)]


@trait(ANSWER, "answers in a static buffer", "copy_", "out", "detached", "state")
def _(block: "Layer", given: Given, y: Tensor, how: str) -> Tensor:
    buffer = block.buffers_by_shape.setdefault(tuple(y.shape), torch.empty_like(y))
    if how == "out":
        return torch.mul(y, 0.9, out=buffer)
    if how == "state":
        block.network.stash["for the glue"] = buffer
    buffer.copy_(y)
    return buffer.detach() if how == "detached" else buffer


@trait(PACKED, "answers a pair", "own", "the same twice", "a view of the first", "a dictionary", "none")
def _(block: "Layer", given: Given, y: Tensor, how: str) -> Any:
    if how == "a dictionary":
        return {"sample": y, "more": y * 2}
    second = {"own": y * 2, "the same twice": y, "a view of the first": y[:, 1:2], "none": None}[how]
    return y, second


@trait(PACKED, "answers integers", "int64", "bool", "uint8", "complex")
def _(block: "Layer", given: Given, y: Tensor, how: str) -> Any:
    if how == "int64":
        return y, y.argmax(dim=1)
    if how == "complex":
        return y, torch.complex(y, 0.5 * y)
    return y, (y > 0) if how == "bool" else (y > 0).to(torch.uint8)


@trait(PACKED, "answers a 0-d tensor")
def _(block: "Layer", given: Given, y: Tensor, how: str) -> Any:
    return y, y.mean()


@trait(PACKED, "answers a number", "float", "int", "bool", "read alone")
def _(block: "Layer", given: Given, y: Tensor, how: str) -> Any:
    return y, {"int": int, "bool": bool}.get(how, float)(10 * y.mean().item())


INSIDE = {**BEFORE, **MIDDLE, **ANSWER, **PACKED}


# --- What the glue does with a block's answer -----------------------------------------------------------------------


@dataclass
class Evaluation:
    """One evaluation on its way through the network."""

    t: Any
    values: list[Tensor]
    late: bool
    skips: list[Tensor] = field(default_factory=list)
    notes: dict[str, Tensor] = field(default_factory=dict)
    sums: list[Tensor] = field(default_factory=list)


After = Callable[["Network", Evaluation, Tensor, str], Tensor]
AFTER: dict[str, After] = {}


@trait(AFTER, "glue reads its numbers", "item", "tolist", "branch", "equal", "nonzero", "numpy")
def _(network: "Network", evaluation: Evaluation, y: Tensor, how: str) -> Tensor:
    older = evaluation.values[0]
    match how:
        case "item":
            return older * y.abs().max().item()
        case "tolist":
            return older + torch.tensor(y.mean(0).tolist(), dtype=y.dtype)
        case "branch":
            return older * 0.5 if y[0, 0] > 0.0371 else older  # no mean, which a norm makes 0 but for rounding
        case "equal":
            return older * 0.5 if torch.allclose(y, torch.zeros_like(y)) else older
        case "nonzero":
            return older * (1 + 0.1 * len((y > 0.1).nonzero()))
        case _:
            return older + torch.from_numpy(y.numpy() * 0.5)


@trait(AFTER, "glue writes it", *WRITES)
def _(network: "Network", evaluation: Evaluation, y: Tensor, how: str) -> Tensor:
    WRITES[how](y)
    return y


@trait(AFTER, "glue writes a view of it", "mul_", "foreach", "out", "setitem")
def _(network: "Network", evaluation: Evaluation, y: Tensor, how: str) -> Tensor:
    WRITES[how](y[:, 1:])
    return y


@trait(AFTER, "glue collects it", "add_", "setitem", "copy_", "foreach", "out")
def _(network: "Network", evaluation: Evaluation, y: Tensor, how: str) -> Tensor:
    if not evaluation.sums:
        evaluation.sums.append(torch.zeros_like(evaluation.values[0]))
    total = evaluation.sums[0]
    match how:
        case "add_":
            total.add_(y)
        case "setitem":
            total[:, 1:] = y[:, 1:]
        case "copy_":
            total.copy_(y)
        case "foreach":
            torch._foreach_add_([total], [y])
        case _:
            torch.add(total, y, out=total)
    return evaluation.values[0]


@trait(AFTER, "glue writes what collects it", "mul_", "foreach", "out")
def _(network: "Network", evaluation: Evaluation, y: Tensor, how: str) -> Tensor:
    evaluation.sums[:] = evaluation.sums or [y]
    WRITES[how](evaluation.sums[0])
    return evaluation.values[0]


@trait(AFTER, "glue keeps it for the next evaluation")
def _(network: "Network", evaluation: Evaluation, y: Tensor, how: str) -> Tensor:
    old = network.kept.get(tuple(y.shape))
    network.kept[tuple(y.shape)] = y
    return evaluation.values[0] if old is None else evaluation.values[0] + old


@trait(AFTER, "read at late steps only")
def _(network: "Network", evaluation: Evaluation, y: Tensor, how: str) -> Tensor:
    return y if evaluation.late else evaluation.values[0]


# --- Which blocks are called, in which order ------------------------------------------------------------------------

Flow = Callable[[list[int], int, bool], list[int]]
"""From the blocks in order, the trait's block, and whether it is late; ~block is called past `__call__`."""

FLOW: dict[str, Flow] = {}


@trait(FLOW, "not called at late steps")
def _(order: list[int], at: int, late: bool) -> list[int]:
    return [block for block in order if block != at] if late else order


@trait(FLOW, "not called at early steps")
def _(order: list[int], at: int, late: bool) -> list[int]:
    return order if late else [block for block in order if block != at]


@trait(FLOW, "called twice")
def _(order: list[int], at: int, late: bool) -> list[int]:
    return [*order, at]


@trait(FLOW, "called twice at late steps")
def _(order: list[int], at: int, late: bool) -> list[int]:
    return [*order, at] if late else order


@trait(FLOW, "called in place of the next at late steps")
def _(order: list[int], at: int, late: bool) -> list[int]:
    return [at if block == at + 1 else block for block in order] if late else order


@trait(FLOW, "called by its forward at late steps")
def _(order: list[int], at: int, late: bool) -> list[int]:
    return [~block if block == at else block for block in order] if late else order


@trait(FLOW, "called inside the one before")
def _(order: list[int], at: int, late: bool) -> list[int]:
    return [block for block in order if block != at]


@trait(FLOW, "called last at late steps")
def _(order: list[int], at: int, late: bool) -> list[int]:
    return [*(block for block in order if block != at), at] if late and at in order else order


WHOLE = {
    "the network draws noise": ("",),
    "the network counts evaluations": ("number", "tensor"),
    "the network answers in a static buffer": ("",),
    "the network answers in a tuple": ("",),
    "the network answers a block's answer": ("",),
    "the network writes its latent": ("mul_", "foreach"),
    "the network reads its latent as it is": ("",),
    "dropout is left on": ("",),
}
SAMPLERS = ("plain", "writes the answer", "writes the latent", "keeps answers")
TIMESTEPS = ("number", "0-d", "of the batch", "keyword")
BRANCHES = ("one", "two rows", "two", "two of other sizes")
GLUES = ("same", "add", "gate", "cat", "norm", "matmul", "narrow")


# --- The network ----------------------------------------------------------------------------------------------------


def column(t: Any) -> Any:
    """A timestep as it can be added to (batch, width)."""
    return t[:, None] if isinstance(t, Tensor) and t.ndim else t


class Layer(nn.Module):
    """A block: tanh(x @ weight + .1), and its traits."""

    def __init__(self, network: "Network", number: int, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.number = number
        self.home = [network]  # in a list, so that it is no child
        self.buffers_by_shape: dict[tuple[int, ...], Tensor] = {}
        self.reset()

    @property
    def network(self) -> "Network":
        return self.home[0]

    def reset(self) -> None:
        self.state: dict[tuple[int, ...], Tensor] = {}
        self.calls = 0
        self.ticks = torch.zeros((), dtype=torch.float64)

    def inner(self) -> list[nn.Module]:
        """The blocks that this one calls."""
        blocks = self.network.blocks
        called = {own.at % len(blocks) for own in self.network.description.of("called inside the one before")}
        return [blocks[number] for number in called if (number - 1) % len(blocks) == self.number]

    def forward(self, hidden_states: Tensor, **more: Any) -> Any:
        given = Given(hidden_states, **more)
        placed = partial(self.network.description.at, self.number)
        for own in placed(BEFORE):
            BEFORE[own.name](self, given, None, own.how)
        y = functional.dropout(torch.tanh(given.x @ self.weight + 0.1), 0.3, training=self.training)
        y = self.network.read_by_block(self, y)
        for block in self.inner():
            y = y + self.network._mixed(block(y))
        for own in placed(MIDDLE):
            y = MIDDLE[own.name](self, given, y, own.how)
        for own in placed(ANSWER):
            y = ANSWER[own.name](self, given, y, own.how)
        for own in placed(PACKED)[:1]:
            y = PACKED[own.name](self, given, y, own.how)
        return y


class Network(nn.Module):
    """A denoiser as described. `reset` forgets what a run left in it."""

    def __init__(self, description: Description) -> None:
        super().__init__()
        self.description = description
        random = torch.Generator().manual_seed(description.seed)
        width = description.width
        draw = lambda *shape: torch.randn(*shape, generator=random, dtype=torch.float64)  # noqa: E731
        layers = [
            Layer(self, number, 1.5 * draw(width, width) / width**0.5) for number in range(len(description.wires))
        ]
        self.blocks = nn.ModuleList(layers)
        self.mixing = nn.Parameter(draw(width, width) / width**0.5)
        self.head = nn.Parameter(draw(width, width) / width**0.5)
        self.flows = [own for own in description.traits if own.name in FLOW]
        self.asks_late = bool(self.flows or description.of("read at late steps only"))
        self.answers: dict[tuple[int, ...], Tensor] = {}
        self.train(bool(description.of("dropout is left on")))
        self.reset()

    def reset(self) -> None:
        self.banks: dict[tuple[int, ...], Tensor] = {}
        self.stash: dict[str, Tensor] = {}
        self.numbers: dict[str, float] = {}
        self.kept: dict[tuple[int, ...], Tensor] = {}
        self.evaluations = 0
        self.ticks = torch.zeros((), dtype=torch.float64)
        for block in self.blocks:
            getattr(block, "inside", block).reset()

    def bank_for(self, x: Tensor) -> Tensor:
        """Memory that blocks write and the head reads."""
        return self.banks.setdefault(tuple(x.shape), torch.zeros_like(x))

    def read_by_block(self, block: Layer, y: Tensor) -> Tensor:
        """What earlier blocks left in the network for later ones."""
        return self._read("for a block", y) if self.reads_stash(block) else y

    def reads_stash(self, block: Layer) -> bool:
        names = ("stores a tensor in the network", "stores a number in the network")
        placed = [own for name in names for own in self.description.of(name) if own.how == "for a block"]
        last = getattr(self.blocks[-1], "inside", self.blocks[-1])
        return bool(placed) and block is last

    def _read(self, place: str, y: Tensor) -> Tensor:
        stashed = self.stash.get(place)
        if stashed is not None and stashed.shape == y.shape:
            y = y + 0.5 * stashed
        return y * self.numbers.get(place, 1.0)

    def forward(self, x: Tensor, t: Any = None, *, timestep: Any = None) -> Any:
        t = timestep if t is None else t
        for own in self.description.of("the network writes its latent"):
            WRITES[own.how](x)
        late = self.asks_late and float(t.max() if isinstance(t, Tensor) else t) < 0.6
        as_it_is = bool(self.description.of("the network reads its latent as it is"))
        evaluation = Evaluation(t, [x if as_it_is else x + 0.3 * column(t)], late)
        order = list(range(len(self.blocks)))
        for own in self.flows:
            order = FLOW[own.name](order, own.at % len(self.blocks), late)
        for number in order:
            self._call(number, evaluation)
        return self._answer(evaluation)

    def _call(self, number: int, evaluation: Evaluation) -> None:
        call: Any = self.blocks[number if number >= 0 else ~number]
        if number < 0:
            number = ~number
            call = call.forward
        wire = self.description.wires[number]
        own = {trait.name for trait in self.description.at(number, INSIDE)}
        given: dict[str, Any] = {}
        if own & {"writes a keyword argument", "reads a keyword argument"}:
            given["extra"] = evaluation.values[-1 - wire.second % len(evaluation.values)]
        if "appends to a list" in own:
            given["skips"] = evaluation.skips
        if "writes into a dictionary" in own:
            given["notes"] = evaluation.notes
        if "reads its timestep" in own:
            given["t"] = evaluation.t
        y = call(self._glue(wire, evaluation.values), **given)
        alone = any(own.how == "read alone" for own in self.description.at(number, PACKED))
        y = evaluation.values[0] + y[1] if alone and isinstance(y, tuple) else self._mixed(y)
        for after in self.description.at(number, AFTER):
            y = AFTER[after.name](self, evaluation, y, after.how)
        evaluation.values.append(y)

    def _glue(self, wire: Wire, values: list[Tensor]) -> Tensor:
        a = values[-1 - wire.first % len(values)]
        b = values[-1 - wire.second % len(values)]
        width = a.shape[1]
        match wire.glue:
            case "add":
                return a + b
            case "gate":
                return a * torch.sigmoid(b)
            case "cat":
                return torch.cat([a, b], dim=1).narrow(1, width // 2, width)
            case "norm":
                return functional.layer_norm(a, (width,))
            case "matmul":
                return torch.tanh(a @ self.mixing)
            case "narrow":
                return torch.cat([a.narrow(1, 0, 2), b.narrow(1, 2, width - 2)], dim=1)
            case _:
                return a

    def _mixed(self, answer: Any) -> Tensor:
        """A block's answer as one tensor; of a single tensor that very one."""
        main, *others = pytree.tree_leaves(answer)
        for other in others:
            if isinstance(other, Tensor):
                other = other.real if other.is_complex() else other
                main = main + 0.1 * (other[:, None] if other.ndim == 1 else other)
            elif other is not None:
                main = main + 0.1 * other
        return main

    def _answer(self, evaluation: Evaluation) -> Any:
        newest = evaluation.values[-1]
        if self.description.of("the network answers a block's answer"):
            return newest
        h = newest + evaluation.values[-1 - self.description.skip % len(evaluation.values)]
        for more in (*evaluation.skips, *evaluation.notes.values(), *evaluation.sums):
            h = h + more
        bank = self.banks.get(tuple(h.shape))
        h = h if bank is None else h + torch.tanh(bank)
        h = self._read("for the glue", h)
        for own in self.description.of("the network counts evaluations"):
            self.evaluations += 1
            self.ticks.add_(1)
            h = h * (1 + 0.1 * (self.evaluations if own.how == "number" else self.ticks))
        if self.description.of("the network draws noise"):
            h = h + 0.2 * torch.randn_like(h)
        answer = torch.tanh(h @ self.head)
        if self.description.of("the network answers in a static buffer"):
            answer = self.answers.setdefault(tuple(answer.shape), torch.empty_like(answer)).copy_(answer)
        return (answer, evaluation.t) if self.description.of("the network answers in a tuple") else answer


# --- The sampling loop ----------------------------------------------------------------------------------------------


def timesteps(description: Description) -> list[float]:
    return [1 - step / description.steps for step in range(description.steps)]


def sample(denoiser: Any, description: Description, at: list[float] | None = None) -> Tensor:
    """Sample from noise with a denoiser that `reset`s itself."""
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(description.seed)  # of this device alone: torch's own takes its time
        denoiser.reset()
        x = torch.randn(BATCH, description.width, dtype=torch.float64)
        older: Any = None
        for t in at or timesteps(description):
            guided = _guided(denoiser, description, x, t)
            match description.sampler:
                case "writes the answer":
                    guided *= -0.3
                    x = x + guided
                case "writes the latent":
                    x -= 0.3 * guided
                case "keeps answers":
                    x = x - 0.3 * (guided if older is None else 1.5 * guided - 0.5 * older)
                    older = guided
                case _:
                    x = x - 0.3 * guided
        return x


def _guided(denoiser: Any, description: Description, x: Tensor, t: float) -> Tensor:
    """The denoiser's answer at a step; of two calls, guidance that writes into the first answer."""
    said = _called(denoiser, description, x, t)
    if description.branches == "one":
        return said
    other = 0.5 * x + 0.2
    if description.branches == "two of other sizes":
        other = torch.cat([other, other + 0.1])
    return said + 0.5 * (said - _called(denoiser, description, other, t)[: len(x)])


def _called(denoiser: Any, description: Description, x: Tensor, t: float) -> Tensor:
    match description.timestep:
        case "0-d":
            said = denoiser(x, torch.tensor(t, dtype=torch.float64))
        case "of the batch":
            said = denoiser(x, torch.full((len(x),), t, dtype=torch.float64))
        case "keyword":
            said = denoiser(x, timestep=t)
        case _:
            said = denoiser(x, t)
    return said[0] if isinstance(said, tuple) else said


# --- Strategies -----------------------------------------------------------------------------------------------------

PLACED = (*INSIDE, *AFTER, *FLOW)
HARMLESS = (
    "writes its own temporary", "reads its timestep", "reads a keyword argument", "answers a view", "answers a pair",
    "answers integers", "answers a 0-d tensor", "the network answers in a tuple",
)  # fmt: skip
"""Traits that no law of stepmask's forbids: such networks are masked, not refused."""

TRAITS = (*PLACED, *WHOLE)
LOOPS = (
    *(("sampler", kind) for kind in SAMPLERS[1:]),
    *(("timestep", kind) for kind in TIMESTEPS[1:]),
    *(("branches", kind) for kind in BRANCHES[1:]),
)


@st.composite
def traits(draw: st.DrawFn, names: tuple[str, ...] = TRAITS) -> Trait:
    name = draw(st.sampled_from(names))
    return Trait(
        name,
        draw(st.sampled_from((0, EVERY, EVERY, 1, 2, 3, 4, 5))),
        draw(st.sampled_from(HOWS.get(name) or WHOLE[name])),
    )


@st.composite
def wires(draw: st.DrawFn, packed: bool) -> Wire:
    reuse = draw(st.sampled_from(("output", "output", None) if packed else ("output", "output", "delta", None)))
    near = st.integers(0, 3)
    return Wire(draw(st.sampled_from(GLUES)), draw(near), draw(near), reuse)


@st.composite
def descriptions(
    draw: st.DrawFn,
    names: tuple[str, ...] = TRAITS,
    forced: str | None = None,
    loop: tuple[str, str] | None = None,
) -> Description:
    """Networks with up to two traits of some names, one of them for certain if it is forced; and loops.

    A loop is the one that is told, or in half of the examples out of the ordinary; with a forced trait it is not.
    """
    count = draw(st.integers(2, 6))
    own = draw(st.lists(traits(names), max_size=2))
    if forced is not None:
        own = [draw(traits((forced,))), *own[:1]]
    packed = [trait.at for trait in own if trait.name in PACKED]
    placed = {number for number in range(count) if any(at == EVERY or at % count == number for at in packed)}
    kinds = dict([loop] if loop else [])
    ordinary = bool(loop or forced)
    for name, choices in (("sampler", SAMPLERS), ("timestep", TIMESTEPS), ("branches", BRANCHES)):
        kinds.setdefault(name, choices[0] if ordinary else draw(st.sampled_from((choices[0], *choices))))
    return Description(
        wires=tuple(draw(wires(number in placed)) for number in range(count)),
        traits=tuple(own),
        skip=draw(st.integers(0, 3)),
        width=draw(st.sampled_from((4, 8))),
        seed=draw(st.integers(0, 3)),
        steps=draw(st.integers(4, 6 if kinds["branches"] == "one" else 4)),
        **kinds,
    )


# --- The table, and the oracle --------------------------------------------------------------------------------------

FORECASTS = {"plain": (1.0, 0.0, 0.0), "linear": (1.5, -0.5, 0.0), "three": (0.5, 0.25, 0.25)}


@dataclass(frozen=True, repr=False)
class Table:
    """What is reused, for a graph and a number of steps not known yet: both are taken around modulo its own."""

    reused: tuple[int, ...] = (0,)  # of each step after the first, the blocks in bits; the denoiser is bit 7
    forecast: str = "plain"  # of reused cells
    special: tuple[tuple[int, int, str], ...] = ()  # other weights, of computed cells too, by step and column

    def of(self, whole: MaskSchedule) -> MaskSchedule:
        """The schedule of this table, from the all-compute one."""
        rows = np.ones_like(whole.rows)
        steps, columns = rows.shape
        for step in range(1, steps):
            bits = self.reused[(step - 1) % len(self.reused)]
            reused = [bool(bits >> column & 1) for column in range(columns - 1)]
            rows[step] = ~np.array([*reused, bool(bits >> 7 & 1)])
        weights = np.where(rows[..., None], PLAIN, FORECASTS[self.forecast])
        for step, column, forecast in self.special:
            weights[step % steps, column % columns] = FORECASTS[forecast]
        known = np.cumsum(rows, axis=0)  # values that a cell may read, its own included
        needed = 1 + np.maximum(2 * (weights[..., 2] != 0), weights[..., 1] != 0)
        weights[needed > known] = PLAIN
        return whole.with_rows(rows, weights)

    def __repr__(self) -> str:
        reused = " ".join(f"{bits:08b}" for bits in self.reused)
        return f"reused at steps 1, 2 ... (denoiser, b6 ... b0): {reused}; forecast {self.forecast}; {self.special}"


class Undefined(Exception):
    """A table that says nothing for what the network does: a value is read of a step that called its block not once."""


class Recall(nn.Module):
    """What stands for a block in the oracle: follows its column of the table with copies of its own."""

    def __init__(self, inside: Callable[..., Any], schedule: MaskSchedule, column: int, clock: "Oracle") -> None:
        super().__init__()
        self.inside = inside
        self.rows = schedule.rows[:, column]
        self.weights = schedule.forecasts[:, column]
        self.delta = schedule.graph.blocks[column].reuse == "delta"
        self.clock = [clock]  # in a list, so that it is no child
        self.said: dict[tuple[int, int], list[Any]] = {}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        branch, step = self.clock[0].now
        before = _stream(args, kwargs).clone() if self.delta else None
        plain = tuple(self.weights[step]) == PLAIN
        if self.rows[step]:
            said = self.inside(*args, **kwargs)
            self.said.setdefault((branch, step), []).append(self.kept(said, before))
            return said if plain else self.answer(branch, step, before)
        return self.answer(branch, step, before)

    def kept(self, said: Any, before: Tensor | None) -> Any:
        return _copied(said) if before is None else said - before

    def answer(self, branch: int, step: int, before: Tensor | None) -> Any:
        last = max(place for place, weight in enumerate(self.weights[step]) if weight)
        computed = [earlier for earlier in range(step, -1, -1) if self.rows[earlier]][: last + 1]
        values = [self.said.get((branch, earlier), []) for earlier in computed]
        if any(len(value) != 1 for value in values):
            raise Undefined
        mixed = _mixed_values(self.weights[step], [value[0] for value in values])
        return mixed if before is None else before + mixed


class Oracle(nn.Module):
    """The network under a table, by its definition: nothing is dropped, nothing that is stored or answered is shared.

    Evaluations that compute no block and reuse the denoiser do not run the network.
    """

    def __init__(self, description: Description, schedule: MaskSchedule) -> None:
        super().__init__()
        self.network = Network(description)
        self.schedule = schedule
        columns = {name: column for column, name in enumerate(schedule.graph.names)}
        for number, block in enumerate(self.network.blocks):
            if (column := columns.get(f"blocks.{number}")) is not None:
                self.network.blocks[number] = Recall(block, schedule, column, self)
        self.whole = Recall(self.network, schedule, len(columns) - 1, self)
        self.reset()

    @property
    def now(self) -> tuple[int, int]:
        """Branch and step of this evaluation."""
        step, branch = divmod(self.evaluation, self.schedule.sampler.branches)
        return branch, step

    def reset(self) -> None:
        self.evaluation = 0
        self.network.reset()
        for part in self.modules():
            if isinstance(part, Recall):
                part.said.clear()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        row = self.schedule.rows[self.now[1]]
        if row[:-1].any() and not row[-1]:
            self.network(*args, **kwargs)
        answer = self.whole(*args, **kwargs)
        self.evaluation += 1
        return answer


def _stream(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return args[0] if args else kwargs["hidden_states"]


def _copied(value: Any) -> Any:
    return pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, value)


def _mixed_values(weights: Any, values: list[Any]) -> Any:
    """Σ weight · value of floating-point tensors, anything else as it was last; newest first."""
    if tuple(weights) == PLAIN:
        return _copied(values[0])

    def mix(newest: Any, *older: Any) -> Any:
        if not isinstance(newest, Tensor) or not (newest.is_floating_point() or newest.is_complex()):
            return newest
        return sum(weight * value for weight, value in zip(weights, (newest, *older), strict=False))

    return pytree.tree_map(mix, *values)


@st.composite
def tables(draw: st.DrawFn, forecast: str = "plain") -> Table:
    """Tables: each step's reused blocks, a forecast of reused cells, and a few cells with other weights."""
    whole = draw(st.booleans())
    bits = st.integers(0, 127)
    if whole:
        bits = st.integers(0, 255)
    cell = st.tuples(st.integers(1, 5), st.integers(0, 6), st.sampled_from(("linear", "three", "plain")))
    return Table(
        reused=tuple(draw(st.lists(bits, min_size=3, max_size=5))),
        forecast=forecast,
        special=tuple(draw(st.lists(cell, max_size=2))),
    )
