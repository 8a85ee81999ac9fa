"""Denoisers that cannot be masked as they are: something else skips, has fused, or stands for their blocks."""

from collections.abc import Iterable
from typing import Any

from torch import nn

from stepmask.denoiser.families import denoiser_of
from stepmask.denoiser.replay import MaskedDenoiser
from stepmask.denoiser.seam import hooks_of, own_compiled_call
from stepmask.errors import AlreadyApplied, RunError


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


def refuse_if_compiled(denoiser: nn.Module) -> None:
    """Refuse a denoiser that is one compiled graph: every row would be another, and soon one too many.

    Raises:
        RunError: It is.
    """
    wrapped = hasattr(denoiser, "_orig_mod")  # by torch.compile(denoiser); denoiser.compile() leaves its class alone
    if wrapped or own_compiled_call(denoiser) is not None:
        raise RunError(
            given=f"a {type(denoiser).__name__} that is compiled as a whole",
            expected="blocks that are compiled each on its own",
            advice="Leave the denoiser as it is, and call masked.compile()",
        )


def refuse_if_inside_compiled(denoiser: nn.Module, names: Iterable[str]) -> None:
    """Refuse blocks and feeders inside compiled modules, whose graphs would not see what stands in front of them.

    Raises:
        RunError: There is one.
    """
    compiled = [name for name, module in denoiser.named_modules() if name and own_compiled_call(module) is not None]
    for name in names:
        if around := next((outer for outer in compiled if name.startswith(f"{outer}.")), None):
            raise RunError(
                given=f"block {name!r}, inside {around!r}, which is compiled",
                expected="blocks that are compiled each on its own, or not at all",
                advice="Mask whole blocks (granularity='block'), or leave them as they are and call masked.compile()",
            )


def refuse_if_replaced(pipe: Any, denoiser: nn.Module) -> None:
    """Refuse a pipeline whose denoiser is not the one that is masked.

    Raises:
        RunError: It is another one, or a compiled wrapper around it.
    """
    now = denoiser_of(pipe)
    if now is denoiser:
        return
    refuse_if_compiled(now)
    raise RunError(
        given=f"a {type(now).__name__} in the pipeline that is not the one which is masked",
        expected=f"the {type(denoiser).__name__} that the schedule was applied to",
        advice="Call .remove(), and apply the schedule to the pipeline as it is now",
    )
