"""Denoisers that cannot be masked as they are: something else skips, has fused, or stands for their blocks."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from stepmask.denoiser.families import splits_layers, splits_tokens
from stepmask.denoiser.regions import unwrapped
from stepmask.denoiser.replay import MaskedDenoiser
from stepmask.denoiser.seam import has_other_forward, hooks_of
from stepmask.errors import AlreadyApplied, LearningError, RunError


def refuse_if_taken(denoiser: nn.Module) -> None:
    """Refuse a denoiser whose blocks have hooks in front of them already, or that something else caches.

    Raises:
        AlreadyApplied: It is taken.
    """
    is_masked = any(isinstance(hook, MaskedDenoiser) for hook in hooks_of(denoiser))
    if is_masked or any(hooks_of(module) for name, module in denoiser.named_modules() if name):
        raise AlreadyApplied(
            given=f"a {type(denoiser).__name__} that is masked already",
            expected="a denoiser that nothing else skips",
            advice="Call .remove() on the first schedule",
        )


def refuse_split(denoiser: nn.Module) -> None:
    """Refuse to learn from a denoiser each of whose processes sees a part of its tokens, or has a part of its layers.

    Raises:
        LearningError: Tokens or layers are split.
    """
    if splits_tokens(denoiser):
        what, why = "tokens", "(context parallel): each process would learn another table from its part"
    elif splits_layers(denoiser):
        what, why = "layers", "(tensor parallel), through which gradients are not those of one process"
    else:
        return
    raise LearningError(
        given=f"a {type(unwrapped(denoiser)).__name__} whose {what} are split between processes {why}",
        expected="a denoiser that each process has whole; FSDP's weights in shards are that when they are used",
        advice="Learn before you split it: the schedule holds for it then as well",
    )


MOST_WHOLE_GRAPHS = 16
"""How many graphs a denoiser that is compiled as a whole may need: one for each row that differs from the others."""


def refuse_too_many_graphs(denoiser: nn.Module, count: int) -> None:
    """Refuse a denoiser that is one compiled graph for each of too many different rows.

    Raises:
        RunError: There are too many.
    """
    if count > MOST_WHOLE_GRAPHS:
        raise RunError(
            given=f"a {type(unwrapped(denoiser)).__name__} that is compiled as a whole, and {count} different rows, "
            "each a graph of its own",
            expected=f"at most {MOST_WHOLE_GRAPHS}",
            advice="Compile its repeated blocks instead, which share graphs: leave the denoiser as it is, and call "
            "masked.compile()",
        )


def refuse_hooks_inside(module: nn.Module, slot: Any) -> None:
    """Refuse a block inside a compiled region that has forward hooks, or whose `forward` something else has put there.

    Args:
        module: The block.
        slot: What a masked run has put there itself.

    Raises:
        RunError: Something else has.
    """
    hooks = len(module._forward_hooks) + len(module._forward_pre_hooks)
    if hooks or has_other_forward(module, slot):
        other = f"which has {hooks} forward hooks" if hooks else "whose forward is not that of its class"
        raise RunError(
            given=f"block {slot.name!r}, inside a compiled region, {other}",
            expected="blocks in compiled regions as their class has them: masks stand behind hooks there, not in front",
            advice="Take the hooks off it (accelerate's and diffusers', too), or mask whole blocks "
            "(granularity='block')",
        )


def refuse_cuda_graphs(denoiser: nn.Module, options: Mapping[str, Any]) -> None:
    """Refuse to compile with CUDA graphs, which answer in memory that the next call overwrites.

    Raises:
        RunError: The options ask for them, on a device that has them.
    """
    is_cuda = any(weight.is_cuda for weight in denoiser.parameters())
    asks = options.get("mode") in ("reduce-overhead", "max-autotune")
    asks = asks or bool((options.get("options") or {}).get("triton.cudagraphs"))
    if is_cuda and asks:
        raise RunError(
            given="options of torch.compile that ask for CUDA graphs",
            expected="graphs whose outputs stay as they are until a later step has read them",
            advice="Compile without: mode='default', or mode='max-autotune-no-cudagraphs'",
        )


def refuse_if_counted_otherwise(now: Sequence[nn.Module], denoisers: Sequence[nn.Module]) -> None:
    """Refuse a pipeline that has more or fewer networks than are masked.

    Args:
        now: The pipeline's networks now.
        denoisers: The masked ones.

    Raises:
        RunError: It has.
    """
    if len(now) != len(denoisers):
        raise RunError(
            given=f"{len(now)} networks in the pipeline",
            expected=f"the {len(denoisers)} that the schedule was applied to",
            advice="Call .remove(), and apply the schedule to the pipeline as it is now",
        )


def refuse_if_replaced(now: nn.Module, denoiser: nn.Module) -> None:
    """Refuse a pipeline whose denoiser is not the one that is masked, nor a compiled form of it with its very weights.

    Args:
        now: The pipeline's denoiser now.
        denoiser: The masked one.

    Raises:
        RunError: It is another one.
    """
    same_class = type(unwrapped(now)) is type(unwrapped(denoiser))
    if same_class and list(map(id, now.parameters())) == list(map(id, denoiser.parameters())):
        return
    raise RunError(
        given=f"a {type(unwrapped(now)).__name__} in the pipeline that is not the one which is masked",
        expected=f"the {type(unwrapped(denoiser)).__name__} that the schedule was applied to",
        advice="Call .remove(), and apply the schedule to the pipeline as it is now",
    )
