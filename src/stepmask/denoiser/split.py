"""Tensors that are split between processes: a block's output that is one cannot be stored."""

from torch import Tensor

PLAIN_OUTPUT = "plain tensors, of which each process stores and mixes its own"

MAKE_PLAIN = (
    "Let it answer with its local part or the whole (use_local_output=True, output_layouts=Replicate()), or mask the "
    "module around it"
)


def is_split(tensor: Tensor) -> bool:
    """Whether a tensor is one of torch.distributed's, which says a part of itself on each process."""
    return type(tensor).__name__ == "DTensor"
