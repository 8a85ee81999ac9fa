"""What may be chosen when a pipeline is loaded; without torch, for a command line that answers at once."""

from typing import Literal

Dtype = Literal["float32", "float16", "bfloat16"]
"""Of the weights."""

Offload = Literal["none", "model", "group"]
"""What lies in the CPU's memory until it is called."""
