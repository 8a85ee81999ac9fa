"""Which modules of a denoiser are its blocks, where nobody knows its class: those of the classes that it repeats."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from stepmask.denoiser.quantised import is_linear
from stepmask.denoiser.regions import unwrapped

Kinds = set[type[nn.Module]]

LISTS = (nn.ModuleList, nn.ModuleDict)
"""What has no forward of its own: its elements are called one by one."""

SUBLAYERS = ("*attn*", "*attention", "ff*", "*_ff", "mlp*", "*mlp", "feed_forward")
"""What attention and feed-forward modules of a transformer block are called; their norms have "norm" in the name."""

BESIDE = ("*norm*", "*ada*", "*mod*", "*emb*", "*time*")
"""What modules that prepare a block's work are called."""

MOST_BESIDE = 1 / 4
"""Of the weights of a block's attention and feed-forward modules, what others may have that do work of their own."""


MIDDLES = ("mid", "mid_*", "middle*", "bot", "bot[0-9]*", "bottleneck*")
"""What the middle of a U-Net is called, which may be the only one of its class."""


@dataclass(frozen=True)
class Part:
    """A module that is called as a whole, as far as can be told from outside.

    Args:
        module: The module.
        row: The list that it is in, of lists in lists the outermost; "" for none.
    """

    module: nn.Module
    row: str

    @property
    def kind(self) -> type[nn.Module]:
        """Its class."""
        return type(self.module)

    @property
    def is_composite(self) -> bool:
        """Whether it has parts of its own, and a class that tells what it is."""
        return self.kind is not nn.Sequential and next(self.module.children(), None) is not None


def repeated_blocks(denoiser: nn.Module) -> list[str]:
    """The names of the outermost modules of the classes that a denoiser repeats, in its lists above all.

    A class is repeated that two elements of module lists, dictionaries or rows (`nn.Sequential`) have, also of lists in
    lists; a single layer where they are in one list. All its modules are blocks, those outside of lists too (the middle
    of a U-Net), unless it is a single layer. Where no list has any, classes count that are there twice without a list.
    Where there are none either, or a module around them has most of the weights (a wrapper, a preconditioning, an
    encoder), it is looked into. Beside blocks the middle of a U-Net is one whatever its class, unless it is made of
    blocks.
    """
    root = unwrapped(denoiser)
    parts = _parts("", root)
    kinds: Kinds = set()
    total = _weights([root])
    while True:
        kinds |= _listed_kinds(parts)
        parts |= _rows_of_layers(parts, kinds)
        blocks = _blocks(parts, kinds)
        if not blocks:
            outside = _blocks(parts, _kinds_outside(parts))
            blocks = outside if 2 * _weights(outside.values()) >= total else {}

        closed = {name: part for name, part in parts.items() if name not in blocks}
        if blocks:
            closed = {name: part for name, part in closed.items() if 2 * _weights([part.module]) > total}
        opened = {
            name: inner for own, part in closed.items() for name, inner in _parts(own, part.module).items()
            if name not in parts
        }  # fmt: skip
        if not opened:
            return [*blocks, *_middles(parts, blocks)]
        parts |= opened


def sublayers(denoiser: nn.Module, block: str) -> list[str]:
    """The attention and feed-forward modules of a block, where they do most of its work.

    Args:
        denoiser: The denoiser.
        block: The block's name.
    """
    parts = dict(unwrapped(denoiser.get_submodule(block)).named_children())
    inside = {name: part for name, part in parts.items() if _is_sublayer(name)}
    others = [part for name, part in parts.items() if name not in inside and not _is_any(name, BESIDE)]
    has_projections = any(is_linear(part) for part in parts.values())
    if has_projections or _weights(others) > MOST_BESIDE * _weights(inside.values()):
        return []
    return [f"{block}.{name}" for name in inside]


def largest_parts(denoiser: nn.Module, count: int) -> list[str]:
    """The names of the modules that a denoiser calls itself, those with most weights first."""
    parts = _parts("", unwrapped(denoiser))
    return sorted(parts, key=lambda name: -_weights([parts[name].module]))[:count]


def _is_sublayer(name: str) -> bool:
    return "norm" not in name and _is_any(name, SUBLAYERS)


def _is_any(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _parts(name: str, module: nn.Module, row: str = "") -> dict[str, Part]:
    """What a module calls: its children, and in place of a list the elements."""
    found: dict[str, Part] = {}
    for child_name, child in module.named_children():
        inside = f"{name}.{child_name}" if name else child_name
        if isinstance(child, LISTS):
            found |= _parts(inside, child, row or inside)
            continue
        part = Part(unwrapped(child), row)
        is_in_row = isinstance(module, nn.Sequential) and part.is_composite
        found[inside] = Part(part.module, name) if is_in_row else part
    return found


def _listed_kinds(parts: Mapping[str, Part]) -> Kinds:
    """Classes of which two parts are in lists, of single layers in one list."""
    listed = [part for part in parts.values() if part.row]
    composite = Counter(part.kind for part in listed if part.is_composite or part.kind is nn.Sequential)
    single = Counter((part.kind, part.row) for part in listed)
    return {kind for kind, count in composite.items() if count > 1} | {
        kind for (kind, _), count in single.items() if count > 1
    }


def _kinds_outside(parts: Mapping[str, Part]) -> Kinds:
    """Classes of which two parts are there, with parts of their own."""
    counts = Counter(part.kind for part in parts.values() if part.is_composite)
    return {kind for kind, count in counts.items() if count > 1}


def _rows_of_layers(parts: Mapping[str, Part], kinds: Kinds) -> dict[str, Part]:
    """The layers of every `nn.Sequential` that is no block, and whose weights are all in layers of some classes."""
    found: dict[str, Part] = {}
    for name, part in parts.items():
        if part.kind is not nn.Sequential or (part.row and part.kind in kinds):
            continue
        weighty = [layer for layer in part.module.children() if _weights([layer])]
        if weighty and all(type(unwrapped(layer)) in kinds for layer in weighty):
            found |= {inner: Part(own.module, name) for inner, own in _parts(name, part.module).items()}
    return found


def _blocks(parts: Mapping[str, Part], kinds: Kinds) -> dict[str, nn.Module]:
    """The outermost modules of some classes: listed ones of any, and others that have parts of their own."""
    found: dict[str, nn.Module] = {}
    waiting = dict(parts) if kinds else {}
    while waiting:
        name, part = next(iter(waiting.items()))
        del waiting[name]
        if part.kind in kinds and (part.row or part.is_composite):
            found[name] = part.module
        else:
            waiting |= {own: nested for own, nested in _parts(name, part.module).items() if own not in parts}
    return {name: module for name, module in found.items() if not any(map(found.__contains__, _around(name)))}


def _middles(parts: Mapping[str, Part], blocks: Iterable[str]) -> list[str]:
    """The middles of a U-Net outside of all blocks and without a block inside, beside blocks."""
    known = list(blocks)
    inside = {outer for name in known for outer in _around(name)}
    return [
        name
        for name in parts
        if known and _is_any(name.rpartition(".")[2], MIDDLES)
        if name not in inside and name not in known and not set(_around(name)) & set(known)
    ]


def _around(name: str) -> list[str]:
    """The names of the modules around one."""
    components = name.split(".")
    return [".".join(components[:depth]) for depth in range(1, len(components))]


def _weights(modules: Iterable[nn.Module]) -> int:
    """How many numbers some modules hold, those that they share once."""
    weights = {id(weight): weight for module in modules for weight in module.parameters()}
    return sum(weight.numel() for weight in weights.values())
