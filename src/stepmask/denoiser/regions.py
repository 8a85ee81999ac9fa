"""Regions of a denoiser that are compiled, or are to be, and which masked blocks lie inside them."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import nn

from stepmask.denoiser.seam import own_compiled_call
from stepmask.errors import RunError

WRAPPED = "_orig_mod"
"""What `torch.compile(module)` calls the module inside the wrapper that it returns."""

ROOM_FOR_GRAPHS = 512
"""Graphs that a class of regions may have beside those of a masked run: bare, of other tables, sizes and modes.

The compiler counts them by function and process. Its own limit, 8, is for functions that are compiled in vain.
"""


def unwrapped(module: nn.Module) -> nn.Module:
    """The module inside the wrapper of `torch.compile(module)`; any other module itself."""
    if type(module).__name__ != "OptimizedModule":
        return module
    inner: Any = module._orig_mod
    return unwrapped(inner)


def modules_by_name(denoiser: nn.Module) -> dict[str, nn.Module]:
    """All modules by the names that they have in the denoiser as it was before anything was compiled.

    Of a wrapped module, the wrapper: it is what is called.
    """
    found: dict[str, nn.Module] = {}
    for name, module in denoiser.named_modules():
        plain = ".".join(part for part in name.split(".") if part != WRAPPED)
        found.setdefault(plain, module)
    return found


def compiled_regions(denoiser: nn.Module) -> dict[str, nn.Module]:
    """The outermost modules that are compiled, by name; the denoiser's own is ""."""
    found: dict[str, nn.Module] = {}
    for name, module in modules_by_name(denoiser).items():
        is_compiled = module is not unwrapped(module) or own_compiled_call(module) is not None
        if is_compiled and region_around(name, found) is None:
            found[name] = module
    return found


def region_around(name: str, regions: Iterable[str]) -> str | None:
    """The region that a module lies in, and is not itself; `None` if there is none."""
    return next(
        (region for region in regions if name != region and (not region or name.startswith(f"{region}."))), None
    )


def repeated_regions(denoiser: nn.Module, blocks: Iterable[str]) -> list[str]:
    """What to compile: the repeated modules around masked blocks, and the blocks that lie in none.

    Repeated are the classes that the denoiser names (`_repeated_blocks` of diffusers), or else the elements of the
    innermost module list with two of a class. A single layer of torch stays as it is: the compiler skips its forward.

    Args:
        denoiser: The denoiser.
        blocks: The names of the masked blocks.
    """
    modules = modules_by_name(denoiser)
    wanted = list(blocks)
    around = {block: _repeated_around(denoiser, modules, block) for block in wanted}
    regions = {region for region in around.values() if region is not None}
    nested = {region for region in regions if any(region_around(other, [region]) for other in regions)}
    chosen = [block if around[block] is None or around[block] in nested else str(around[block]) for block in wanted]
    return [
        name for name in dict.fromkeys(chosen) if not type(unwrapped(modules[name])).__module__.startswith("torch.nn.")
    ]


def compile_repeated(denoiser: nn.Module, blocks: Iterable[str], **options: Any) -> None:
    """Compile the repeated modules around masked blocks, and the blocks that lie in none.

    Args:
        denoiser: The denoiser.
        blocks: The names of the masked blocks.
        **options: Of `torch.compile`.

    Raises:
        RunError: All of them are layers of torch itself.
    """
    modules = modules_by_name(denoiser)
    regions = repeated_regions(denoiser, blocks)
    if not regions:
        raise RunError(
            given=f"a {type(unwrapped(denoiser)).__name__} whose blocks are layers of torch itself, in no repeated "
            "module of another class",
            expected="modules of classes whose forward the compiler traces: torch's own, nn.Sequential too, it skips",
            advice="Make the repeated layers a class of your own, or compile the denoiser as a whole: "
            "denoiser.compile()",
        )
    allow_graphs(ROOM_FOR_GRAPHS)
    for name in regions:
        modules[name].compile(**options)


def allow_graphs(count: int) -> None:
    """Let the compiler make so many graphs of one function, from now on.

    Its limits are the process's, and it counts graphs with masks and without together: bare runs need the room, too,
    once there were masked ones. So limits are raised, and never put back.
    """
    from torch._dynamo import config

    config.recompile_limit = max(config.recompile_limit, count)
    config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, count)


def _repeated_around(denoiser: nn.Module, modules: Mapping[str, nn.Module], block: str) -> str | None:
    named = getattr(denoiser, "_repeated_blocks", None)
    for name in _from_inside(block):
        module = unwrapped(modules[name])
        if named:
            if type(module).__name__ in named:
                return name
            continue
        siblings = modules.get(name.rpartition(".")[0])
        if name and isinstance(siblings, nn.ModuleList):
            return name if Counter(map(type, siblings))[type(modules[name])] > 1 else None
    return None


def _from_inside(name: str) -> Iterator[str]:
    """A module's name, and those of the modules around it, the innermost first."""
    while name:
        yield name
        name = name.rpartition(".")[0]
