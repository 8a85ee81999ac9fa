"""One evaluation on fake tensors: all shapes and dtypes, and nothing computed or held."""

import copy
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.utils import _pytree as pytree

from stepmask.denoiser.call import Call
from stepmask.denoiser.families import moves_weights
from stepmask.denoiser.modes import uncompiled
from stepmask.denoiser.values import tensors
from stepmask.errors import StepmaskError

T = TypeVar("T")


def on_fakes(denoiser: nn.Module, call: Call, watch: Callable[[nn.Module, Call], T]) -> T | None:
    """What `watch` sees of a copy and a call of fake tensors; what the copy keeps for later is fake, too.

    The call is evaluated for real before. `None` where fake tensors do not do: weights are offloaded, sharded or cast
    layer by layer, shapes or paths depend on numbers, these go to numpy, or the denoiser holds what cannot be copied,
    as a lock.
    """
    _warm_up(denoiser, call)
    if moves_weights(denoiser):
        return None
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    mode._allow_unsafe_data_ptr_access = False  # C code would follow a null pointer
    with mode as fake:
        try:
            with FakeCopyMode(fake):
                copied = copy.deepcopy(denoiser)
            return watch(copied, Call(*pytree.tree_map_only(Tensor, fake.from_tensor, (call.args, call.kwargs))))
        except StepmaskError:
            raise
        except Exception:  # whatever it is: an evaluation for real shows whether it is the denoiser's own
            return None


def _warm_up(denoiser: nn.Module, call: Call) -> None:
    """Evaluate once for real: what a call leaves in caches, anywhere, must not be left there by fake tensors."""
    if any(tensor.is_meta for tensor in (*denoiser.parameters(), *tensors((call.args, call.kwargs)))):
        return
    with torch.no_grad(), torch.random.fork_rng(), uncompiled():
        call.evaluate(denoiser)
