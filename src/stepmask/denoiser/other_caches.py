"""Other caches on a pipeline or a denoiser: what is recorded or masked under one of them is not the pipeline."""

from typing import Any

from torch import nn

from stepmask.denoiser.families import denoisers_of
from stepmask.errors import AlreadyApplied

_OWN_OF_DIFFUSERS = (
    *("faster_cache_", "fbc_", "mag_cache_", "pyramid_attention_broadcast", "sea_cache_", "taylorseer_cache"),
    "text_kv_cache_",
)
"""How the names of the hooks of diffusers' caches begin; other hooks (offloading, casting) may stay."""


def refuse_other_caches(pipe: Any) -> None:
    """Refuse a pipeline, or a denoiser, that something else caches.

    Raises:
        AlreadyApplied: diffusers, cache-dit, ParaAttention, TeaCache or DeepCache does.
    """
    for denoiser in denoisers_of(pipe):
        _refuse_cached(pipe, denoiser)


def _refuse_cached(pipe: Any, denoiser: nn.Module) -> None:
    if getattr(denoiser, "is_cache_enabled", False) or _hooked(denoiser):
        raise _cached(denoiser, "diffusers", "Call denoiser.disable_cache() first")
    if any(vars(part).get("_is_cached", False) is True for part in (pipe, denoiser)):  # classes have it for all
        raise _cached(denoiser, "cache-dit or ParaAttention", "Call cache_dit.disable_cache(pipe) first")
    if getattr(denoiser, "enable_teacache", False) is True:  # with its forward, on the class
        raise _cached(denoiser, "TeaCache", "Load the pipeline where TeaCache has not replaced its denoiser's forward")
    if any(_is_of(module, "DeepCache") for module in denoiser.modules()):
        raise _cached(denoiser, "DeepCache", "Call helper.disable() first")


def _hooked(denoiser: nn.Module) -> bool:
    """Whether hooks of diffusers' caches are there, whoever put them on."""
    registries = (vars(module).get("_diffusers_hook") for module in denoiser.modules())
    return any(
        name.startswith(_OWN_OF_DIFFUSERS) for found in registries for name in getattr(found, "hooks", None) or ()
    )


def _is_of(module: nn.Module, package: str) -> bool:
    """Whether a package has replaced a module's forward."""
    source = getattr(vars(module).get("forward"), "__module__", None)
    return source is not None and source.split(".")[0] == package


def _cached(denoiser: nn.Module, by: str, advice: str) -> AlreadyApplied:
    return AlreadyApplied(
        given=f"a {type(denoiser).__name__} that is cached by {by} already",
        expected="a denoiser that nothing else skips",
        advice=advice,
    )
