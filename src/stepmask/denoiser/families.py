"""What stepmask knows about diffusers: where a pipeline keeps its denoiser, and which modules of it are blocks.

The only file that knows diffusers' class names. It imports none of them: a class is known by its name.
"""

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any, Literal, get_args

import torch
from torch import nn

from stepmask.denoiser.regions import modules_by_name, unwrapped
from stepmask.denoiser.repeated import largest_parts, repeated_blocks, sublayers
from stepmask.denoiser.split import is_split
from stepmask.errors import NoSuchBlock, TraceError
from stepmask.schedule.fingerprint import DenoiserFingerprint
from stepmask.schedule.graph import Reuse

Granularity = Literal["block", "sublayer"]
Patterns = Mapping[str, Reuse | None]
"""Name pattern to the way its blocks are reused; `None` lets the trace decide by the shapes it sees."""

_TRANSFORMER: dict[Granularity, Patterns] = {
    "block": {"transformer_blocks.*": "delta"},
    "sublayer": {
        "transformer_blocks.*.attn1": "output",
        "transformer_blocks.*.attn2": "output",
        "transformer_blocks.*.ff": "output",
    },
}
_UNET_PLACES = ("down_blocks.*", "mid_block", "up_blocks.*")
_UNET_PARTS = (
    *("resnets", "resnets_in", "resnets_out", "downsamplers", "upsamplers"),
    *("temp_convs", "temp_attentions", "motion_modules"),
)
_UNET_OUTSIDE: Patterns = {
    "transformer_in": "output",
    **{f"{place}.{part}.*": "output" for place in _UNET_PLACES for part in _UNET_PARTS},
}
_UNET: dict[Granularity, Patterns] = {
    "block": {**_UNET_OUTSIDE, **{f"{place}.attentions.*": "output" for place in _UNET_PLACES}},
    "sublayer": {
        **_UNET_OUTSIDE,
        **{
            f"{place}.attentions.*.{blocks}.*.{part}": "output"
            for place in _UNET_PLACES
            for blocks in ("transformer_blocks", "temporal_transformer_blocks")
            for part in ("attn1", "attn2", "ff")
        },
        **{f"{place}.attentions.*.{part}": "output" for place in _UNET_PLACES for part in ("proj_in", "proj_out")},
    },
}


def _at_both(patterns: Patterns) -> dict[Granularity, Patterns]:
    """The same blocks at both granularities."""
    return dict.fromkeys(get_args(Granularity), patterns)


_UNET_PIXEL = _at_both(_UNET["block"])
_CASCADE = _at_both({"down_blocks.*.*": "output", "up_blocks.*.*": "output"})
_KANDINSKY6: dict[Granularity, Patterns] = {
    "block": {"*_text_transformer_blocks.*": None, "visual_transformer_blocks.*": None},
    "sublayer": {
        "*_text_transformer_blocks.*.attn": "output",
        "*_text_transformer_blocks.*.feed_forward": "output",
        "visual_transformer_blocks.*.*_cross_attention": "output",
        "visual_transformer_blocks.*.*_dec_block.*_attention": "output",
        "visual_transformer_blocks.*.*_dec_block.feed_forward": "output",
    },
}
_FF_CALLED_TWICE = _at_both({"transformer_blocks.*": None})

DENOISERS = ("transformer", "transformer_2", "unconditional_transformer", "unet")
"""Where diffusers pipelines keep them. Several take turns (Wan 2.2) or make up a step together (Ideogram 4)."""

COMPANIONS = ("controlnet",)
"""Where diffusers pipelines keep networks that they call before the denoiser at every step, and hand it the answers."""

FAMILIES: dict[str, dict[Granularity, Patterns]] = {
    "CogView4Transformer2DModel": _FF_CALLED_TWICE,
    "DiTTransformer2DModel": _TRANSFORMER,
    "DreamLiteUNetModel": _UNET,
    "EasyAnimateTransformer3DModel": _FF_CALLED_TWICE,
    "GlmImageTransformer2DModel": _FF_CALLED_TWICE,
    "I2VGenXLUNet": _UNET,
    "Kandinsky3UNet": _UNET_PIXEL,
    "Kandinsky6Transformer3DModel": _KANDINSKY6,
    "PixArtTransformer2DModel": _TRANSFORMER,
    "StableCascadeUNet": _CASCADE,
    "UNet1DModel": _UNET_PIXEL,
    "UNet2DConditionModel": _UNET,
    "UNet2DModel": _UNET_PIXEL,
    "UNet3DConditionModel": _UNET,
    "UNetMotionModel": _UNET,
    "UNetSpatioTemporalConditionModel": _UNET,
}


def is_known(denoiser: nn.Module) -> bool:
    """Whether a denoiser's blocks are known by its class."""
    return fingerprint_of(denoiser).class_name in FAMILIES


def denoiser_of(pipe: Any) -> nn.Module:
    """The network that a pipeline's sampler calls, the first of several; a plain module is its own denoiser.

    Raises:
        TraceError: As `denoisers_of`.
    """
    return denoisers_of(pipe)[0]


def denoisers_of(pipe: Any) -> tuple[nn.Module, ...]:
    """The networks that a pipeline's sampler calls: one, or several of one class and configuration.

    Raises:
        TraceError: The object holds no transformer or U-Net, or several that are not alike.
    """
    if isinstance(pipe, nn.Module):
        return (pipe,)
    found = {name: part for name in DENOISERS if isinstance(part := getattr(pipe, name, None), nn.Module)}
    networks = tuple({id(part): part for part in found.values()}.values())
    if not networks:
        raise _no_denoiser(pipe, "neither a transformer nor a U-Net")
    first, *others = map(fingerprint_of, networks)
    if any(other != first for other in others):
        raise _no_denoiser(pipe, f"denoisers that are not alike: {' and '.join(found)}")
    return networks


def companions_of(pipe: Any) -> dict[str, nn.Module]:
    """The networks that a pipeline has beside its denoiser, by the names of its attributes; of a plain module none."""
    if isinstance(pipe, nn.Module):
        return {}
    found = {name: part for name in COMPANIONS if isinstance(part := getattr(pipe, name, None), nn.Module)}
    inside = {id(module) for denoiser in denoisers_of(pipe) for module in denoiser.modules()} if found else set()
    return {name: part for name, part in found.items() if id(unwrapped(part)) not in inside}


def _no_denoiser(pipe: Any, what: str) -> TraceError:
    return TraceError(
        given=f"a {type(pipe).__name__} with {what}",
        expected="a diffusers pipeline with one denoiser, or with several of one class and configuration, or an "
        "nn.Module",
        advice="Choose the denoiser and pass it itself, with run=function to record: pipe.NAME in place of pipe",
    )


def scheduler_of(pipe: Any) -> Any | None:
    """A pipeline's scheduler; `None` for a plain module."""
    return None if isinstance(pipe, nn.Module) else getattr(pipe, "scheduler", None)


def moves_weights(denoiser: nn.Module) -> bool:
    """Whether hooks of diffusers or accelerate bring weights along, or cast them, when a module is called."""
    return any(hasattr(module, hook) for module in denoiser.modules() for hook in ("_diffusers_hook", "_hf_hook"))


def casts_weights(denoiser: nn.Module) -> bool:
    """Whether diffusers casts weights layer by layer, back and forth around each call."""
    registries = (vars(module).get("_diffusers_hook") for module in denoiser.modules())
    return any(found is not None and found.get_hook("layerwise_casting") is not None for found in registries)


def splits_tokens(denoiser: nn.Module) -> bool:
    """Whether diffusers splits tokens between processes (context parallel), so that each sees a part of them."""
    config = getattr(unwrapped(denoiser), "_parallel_config", None)
    return getattr(config, "context_parallel_config", None) is not None


def splits_layers(denoiser: nn.Module) -> bool:
    """Whether single layers are split between processes (tensor parallel); weights in FSDP's shards are not meant."""
    shares: list[Any] = [weight for weight in denoiser.parameters() if is_split(weight)]
    if any(sum(placement.is_shard() for placement in share.placements) > 1 for share in shares):
        return True
    return bool(shares) and not any(
        map(is_fsdp, (cls for module in denoiser.modules() for cls in type(module).__mro__))
    )


def fingerprint_of(denoiser: nn.Module) -> DenoiserFingerprint:
    """A denoiser's class and public configuration; a plain module is known by its number of parameters.

    How weights are held is no part of it: whole, quantised or in shards, it is the same denoiser.
    """
    denoiser = unwrapped(denoiser)
    class_name = next(cls.__name__ for cls in type(denoiser).__mro__ if not is_fsdp(cls))
    config = getattr(denoiser, "config", None)
    if not isinstance(config, Mapping):
        count = _parameters(denoiser)
        return DenoiserFingerprint(class_name, {} if count is None else {"parameters": count})
    public = {key: value for key, value in config.items() if not key.startswith("_") and key not in _HOLDING}
    return DenoiserFingerprint(class_name, {key: _plain(value) for key, value in public.items()})


_HOLDING = ("quantization_config",)
"""What a configuration says of how weights are held."""


def _parameters(denoiser: nn.Module) -> int | None:
    """The number of a module's parameters; `None` where it does not show, for weights are packed (4 bits, GGUF)."""
    is_packed = any(not (p.is_floating_point() or p.is_complex()) for p in denoiser.parameters())
    if is_packed or any(hasattr(module, "_packed_params") for module in denoiser.modules()):
        return None
    return sum(p.numel() for p in denoiser.parameters())


def is_fsdp(cls: type[Any]) -> bool:
    """Whether a class is FSDP's, or one that `fully_shard` made of a module's own."""
    return "FSDPModule" in (cls.__name__, *(base.__name__ for base in cls.__bases__))


def _plain(value: Any) -> Any:
    """A configuration value as JSON would give it back."""
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def find_blocks(
    denoiser: nn.Module, granularity: Granularity, blocks: str | Iterable[str] | Patterns | None
) -> dict[str, Reuse | None]:
    """The names of the modules to mask, each with the way it is reused.

    Raises:
        NoSuchBlock: A pattern matches no module.
        TraceError: The class is unknown and no pattern was given, one block contains another, or one is inside a
            module of torch.jit.
    """
    found: dict[str, Reuse | None] = {}
    for pattern, reuse in _patterns(denoiser, granularity, blocks).items():
        names = [name for name in modules_by_name(denoiser) if name and _matches(name, pattern)]
        if not names and blocks is not None:
            raise _no_match(denoiser, pattern)
        found.update(dict.fromkeys(names, reuse))
    for name in found:
        _check_reachable(denoiser, name)
        if outer := next((other for other in found if name.startswith(f"{other}.")), None):
            raise TraceError(
                given=f"block {outer!r}, which contains block {name!r}",
                expected="blocks that do not contain each other",
                advice="Mask either the one or the other",
            )
    return found


def _check_reachable(denoiser: nn.Module, name: str) -> None:
    """Refuse a block inside a module of torch.jit: such a module calls its parts without Python.

    Raises:
        TraceError: It is inside one.
    """
    parts = name.split(".")
    around = denoiser
    for depth, part in enumerate(parts):
        if isinstance(around, torch.jit.ScriptModule):
            whose = f"{'.'.join(parts[:depth])!r}" if depth else "the denoiser itself"
            raise TraceError(
                given=f"block {name!r} inside a module that torch.jit has compiled, {whose}",
                expected="blocks that Python calls",
                advice="Mask the module before it is scripted or traced, or each block compiled on its own",
            )
        around = getattr(around, part)


def _patterns(denoiser: nn.Module, granularity: Granularity, blocks: str | Iterable[str] | Patterns | None) -> Patterns:
    if isinstance(blocks, str):
        return {blocks: None}
    if isinstance(blocks, Mapping):
        return blocks
    if blocks is not None:
        return dict.fromkeys(blocks)
    class_name = fingerprint_of(denoiser).class_name
    if class_name in FAMILIES:
        return FAMILIES[class_name][granularity]
    if repeated := repeated_blocks(denoiser):
        return dict.fromkeys(repeated) if granularity == "block" else _sublayers(denoiser, repeated)
    largest = largest_parts(denoiser, 5)
    raise TraceError(
        given=f"a {class_name}, whose blocks stepmask does not know, with no class of modules that it repeats",
        expected="modules of one class, in lists or with parts of their own; or the names of blocks",
        advice=f"Name its blocks, for example blocks={largest}" if largest else "Make its parts modules of their own",
    )


def _sublayers(denoiser: nn.Module, blocks: Iterable[str]) -> Patterns:
    """Attention and feed-forward modules of blocks; a block that has none, or projections beside them, as it is."""
    found: dict[str, Reuse | None] = {}
    for block in blocks:
        inside = sublayers(denoiser, block)
        found.update(dict.fromkeys(inside, "output") if inside else {block: None})
    return found


def _matches(name: str, pattern: str) -> bool:
    """Whether a module's name fits a pattern; a star stands for anything within one component."""
    parts = name.split(".")
    wanted = pattern.split(".")
    return len(parts) == len(wanted) and all(fnmatchcase(*pair) for pair in zip(parts, wanted, strict=True))


def _no_match(denoiser: nn.Module, pattern: str) -> NoSuchBlock:
    names = [name for name in modules_by_name(denoiser) if name]
    shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    return NoSuchBlock(
        given=f"pattern {pattern!r}, which matches no module of {type(unwrapped(denoiser)).__name__}",
        expected=f"a pattern over {shown}",
        advice="A star stands for one component of the name: 'layers.*' or 'layers.*.attn'",
    )
