"""What ties a folder of finished work to a pipeline, down to its weights, and tells settings apart."""

from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from stepmask.denoiser.families import denoiser_of, fingerprint_of
from stepmask.denoiser.values import tensors
from stepmask.errors import InvalidRunFolder
from stepmask.executors.filed import claim


def claim_for(pipe: Any, folder: Path, **more: Any) -> None:
    """Tie a folder to a pipeline or plain denoiser, the weights of all its networks included.

    Args:
        pipe: The pipeline.
        folder: The folder.
        **more: Plain JSON values that the folder is tied to as well.

    Raises:
        InvalidRunFolder: It holds results of another one.
    """
    fingerprint = fingerprint_of(denoiser_of(pipe))
    told = {"denoiser": fingerprint.class_name, "config": fingerprint.config, "weights": weights_of(pipe)}
    claim(folder, {**told, **more})


def weights_of(pipe: Any) -> dict[str, str]:
    """A name for the weights of each network of a pipeline; text encoders shape what the denoiser is given."""
    networks = getattr(pipe, "components", None) or {"denoiser": denoiser_of(pipe)}
    return {name: weights_digest(network) for name, network in networks.items() if isinstance(network, nn.Module)}


def weights_digest(network: nn.Module) -> str:
    """A name for a network's weights: read off at most 127 values of each, or off its shape where it is on "meta"."""
    return digest([_named(name, weight) for name, weight in sorted(network.state_dict().items())])


def _named(name: str, weight: Any) -> tuple[Any, ...]:
    """A weight as it is told apart; what torch's own quantised layers keep in its place is no tensor but several."""
    if not isinstance(weight, Tensor):
        return (name, *[_named(name, part) for part in tensors(weight)])
    return name, str(weight.dtype), tuple(weight.shape), _some(weight)


def _some(weight: Tensor) -> Any:
    """Values of a weight, evenly spread: of each tensor that it is made of, where it is quantised or in shards."""
    if weight.is_meta:
        return None
    if hasattr(weight, "__tensor_flatten__"):
        names, _ = weight.__tensor_flatten__()
        return [_some(getattr(weight, name)) for name in names]
    if weight.is_quantized:
        return _some(weight.int_repr())
    plain = weight.as_subclass(Tensor)
    return plain.flatten()[:: max(1, plain.numel() // 64)]


def digest(*values: Any) -> str:
    """A name for plain values, tensors and arrays, in any nesting: equal ones have equal names, on any machine.

    Raises:
        InvalidRunFolder: There is something else among them.
    """
    found = sha256()
    leaves, spec = pytree.tree_flatten(values)
    found.update(str(spec).encode())
    for leaf in leaves:
        found.update(_bytes(leaf))
    return found.hexdigest()[:24]


def _bytes(leaf: Any) -> bytes:
    if isinstance(leaf, Tensor):
        raw = leaf.detach().cpu().contiguous().view(-1).view(torch.uint8)
        return f"{leaf.dtype} {tuple(leaf.shape)}".encode() + raw.numpy().tobytes()
    if isinstance(leaf, np.ndarray):
        return f"{leaf.dtype} {leaf.shape}".encode() + leaf.tobytes()
    if isinstance(leaf, str | int | float | bool | range | None):
        return f"{leaf!r};".encode()
    raise InvalidRunFolder(
        given=f"a {type(leaf).__name__} among what a folder keeps results of",
        expected="numbers, text, tensors and arrays, which have a name on any machine",
        advice="Leave the folder out",
    )
