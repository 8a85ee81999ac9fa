"""PixArt's pipelines that draw at the size that their transformer was trained for, whatever that is.

diffusers' own know aspect ratios for four sizes only, look for them unless they are told not to, and refuse any other.
"""

import inspect
from collections.abc import Callable
from types import FunctionType
from typing import Any

import diffusers
import torch

BINNED_SIZES = (32, 64, 128, 256)
"""Of latents, for which diffusers knows aspect ratios."""


def _without_binning(call: Callable[..., Any]) -> Callable[..., Any]:
    """A pipeline's call that looks for no aspect ratio unless it is asked to: the very code, with another default."""
    code: Any = inspect.unwrap(call)
    parameters = inspect.signature(code).parameters.values()
    defaults = {each.name: each.default for each in parameters if each.default is not each.empty}
    defaults["use_resolution_binning"] = False
    told = FunctionType(code.__code__, code.__globals__, code.__name__, tuple(defaults.values()), code.__closure__)
    told.__doc__, told.__annotations__ = code.__doc__, code.__annotations__
    return torch.no_grad()(told)


class PixArtAlphaPipeline(diffusers.PixArtAlphaPipeline):  # type: ignore[misc]  # untyped for mypy
    """diffusers' pipeline of this name, for sizes without aspect ratios; it is saved as that one."""

    __call__ = _without_binning(diffusers.PixArtAlphaPipeline.__call__)


class PixArtSigmaPipeline(diffusers.PixArtSigmaPipeline):  # type: ignore[misc]
    """diffusers' pipeline of this name, for sizes without aspect ratios; it is saved as that one."""

    __call__ = _without_binning(diffusers.PixArtSigmaPipeline.__call__)


OWN = {
    diffusers.PixArtAlphaPipeline: PixArtAlphaPipeline,
    diffusers.PixArtSigmaPipeline: PixArtSigmaPipeline,
}
"""By diffusers' class."""


def at_its_own_size(pipe: Any) -> Any:
    """The pipeline; one of PixArt's with a size that diffusers knows no aspect ratios for is now of the class above."""
    if type(pipe) in OWN and pipe.transformer.config.sample_size not in BINNED_SIZES:
        pipe.__class__ = OWN[type(pipe)]
    return pipe
