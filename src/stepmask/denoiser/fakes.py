"""One evaluation on fake tensors: all shapes and dtypes, and nothing computed or held."""

import copy
from collections.abc import Callable
from typing import TypeVar

from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.utils import _pytree as pytree

from stepmask.denoiser.call import Call
from stepmask.denoiser.families import moves_weights
from stepmask.errors import StepmaskError

T = TypeVar("T")


def on_fakes(denoiser: nn.Module, call: Call, watch: Callable[[nn.Module, Call], T]) -> T | None:
    """What `watch` sees of a copy and a call of fake tensors; what the copy keeps for later is fake, too.

    `None` where fake tensors do not do: weights are offloaded, sharded or cast layer by layer, shapes or paths depend
    on numbers, these go to numpy, or the denoiser holds what cannot be copied, as a lock.
    """
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
