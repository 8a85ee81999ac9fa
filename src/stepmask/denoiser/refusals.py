"""Denoisers that cannot be masked as they are: something else skips their blocks, or has fused them."""

from torch import nn

from stepmask.errors import AlreadyApplied, RunError


def refuse_if_taken(denoiser: nn.Module) -> None:
    """Refuse a denoiser whose blocks have behaviours in front of them already, or that diffusers caches.

    Raises:
        AlreadyApplied: It is taken.
    """
    refuse_if_cached(denoiser)
    if any(hasattr(type(module), "_seam_depth") for name, module in denoiser.named_modules() if name):
        raise _taken(denoiser, "masked", "Call .remove() on the first schedule")


def refuse_if_cached(denoiser: nn.Module) -> None:
    """Refuse a denoiser that diffusers caches.

    Raises:
        AlreadyApplied: It does.
    """
    if getattr(denoiser, "is_cache_enabled", False):
        raise _taken(denoiser, "cached by diffusers", "Call denoiser.disable_cache() first")


def _taken(denoiser: nn.Module, how: str, advice: str) -> AlreadyApplied:
    return AlreadyApplied(
        given=f"a {type(denoiser).__name__} that is {how} already",
        expected="a denoiser that nothing else skips",
        advice=advice,
    )


def refuse_if_compiled(denoiser: nn.Module) -> None:
    """Refuse a denoiser that is one compiled graph: every row would be another, and soon one too many.

    Raises:
        RunError: It is.
    """
    wrapped = hasattr(denoiser, "_orig_mod")  # by torch.compile(denoiser); denoiser.compile() leaves its class alone
    if wrapped or getattr(denoiser, "_compiled_call_impl", None) is not None:
        raise RunError(
            given=f"a {type(denoiser).__name__} that is compiled as a whole",
            expected="blocks that are compiled each on its own",
            advice="Leave the denoiser as it is, and call masked.compile()",
        )
