"""`Loading`: how a pipeline is loaded, on which device, in which dtype, and what is done to it before it runs."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, get_args

import torch

from stepmask import zoo
from stepmask.denoiser.device import CPU, is_present, module_of, own_device
from stepmask.denoiser.families import denoiser_of, find_blocks
from stepmask.denoiser.regions import compile_repeated
from stepmask.errors import InvalidLoading
from stepmask.zoo.options import Dtype, Offload


@dataclass(frozen=True)
class Loading:
    """How a pipeline is loaded; what this machine cannot do is refused before anything is loaded.

        pipe = Loading("cuda", offload="model").load("PixArt-alpha/PixArt-XL-2-1024-MS")

    Args:
        device: Of torch; `None` = CUDA where there is one, else the CPU. Of several processes on a machine, as torchrun
            and Slurm start them, each takes an accelerator of its own, unless it is told which.
        dtype: Of the weights; `None` = float32 on the CPU, bfloat16 on an accelerator.
        variant: Of the files of the weights, as fp16.
        revision: Branch, tag or commit of a repository on the hub.
        offload: What lies in the CPU's memory until it is called: "none", "model" = each network (accelerate's model
            offloading), "group" = each layer (diffusers' group offloading of leaves).
        compiled: Whether the repeated blocks of the denoiser are compiled (`torch.compile`, full graphs), as
            `Masked.compile` does it: bare runs and masked ones alike.

    Raises:
        InvalidLoading: There is no such device, dtype or offloading, or options exclude each other.
    """

    device: str | None = None
    dtype: str | None = None
    variant: str | None = None
    revision: str | None = None
    offload: str = "none"
    compiled: bool = False

    def __post_init__(self) -> None:
        self._check_names()
        place = self.place
        if not is_present(place):
            raise InvalidLoading(
                given=f"device {self.device!r}, which is not there",
                expected=f"one of this machine: {_devices()}",
                advice="Check the name, and that torch was built for this accelerator",
            )
        if self.offload != "none" and place.type == "cpu":
            raise InvalidLoading(
                given=f"{self.offload} offloading with {'device cpu' if self.device else 'no accelerator'}",
                expected="an accelerator, to which weights are brought from the CPU's memory",
                advice="Leave the offloading out",
            )
        if self.offload == "group" and self.compiled:
            raise InvalidLoading(
                given="group offloading of a compiled denoiser",
                expected="one of both: its hooks move weights inside of compiled regions",
                advice="Use model offloading, or do not compile",
            )

    @cached_property
    def place(self) -> torch.device:
        """The device of this process."""
        return own_device(torch.device(self.device or ("cuda" if torch.cuda.is_available() else "cpu")))

    @property
    def weights(self) -> torch.dtype:
        """The dtype of the weights."""
        told: torch.dtype = getattr(torch, self.dtype or ("float32" if self.place.type == "cpu" else "bfloat16"))
        return told

    def check(self, source: str) -> None:
        """Refuse options that mean nothing for a pipeline of this name.

        Raises:
            InvalidLoading: A revision of what is no repository, or a variant that is not there.
        """
        is_zoo = source.startswith("zoo:")
        is_folder = not is_zoo and Path(source).is_dir()
        if self.revision is not None and (is_zoo or is_folder):
            raise InvalidLoading(
                given=f"revision {self.revision!r} of {source}",
                expected="a repository on the Hugging Face hub, which has revisions",
                advice="Leave the revision out",
            )
        if self.variant is not None and (is_zoo or (is_folder and not _has_variant(Path(source), self.variant))):
            raise InvalidLoading(
                given=f"variant {self.variant!r} of {source}",
                expected="a pipeline with files of this variant, such as diffusion_pytorch_model.fp16.safetensors",
                advice="Leave the variant out; the dtype says in what the weights are loaded",
            )

    def check_cluster(self, gpus: float) -> None:
        """Refuse what does not go to a cluster's workers with the pipeline.

        Args:
            gpus: Of each worker.

        Raises:
            InvalidLoading: Offloading, compiled regions, or a device that workers do not have or have for nothing.
        """
        if self.offload != "none" or self.compiled:
            raise InvalidLoading(
                given=f"{'a compiled denoiser' if self.compiled else f'{self.offload} offloading'} on a cluster",
                expected="a pipeline that can be sent to other processes as it is",
                advice="Leave it out, or start the command with torchrun",
            )
        if (self.place.type != "cpu") != bool(gpus) or self.place.index:
            raise InvalidLoading(
                given=f"workers with {gpus:g} GPUs each, and a pipeline on {self.place}",
                expected="a pipeline on the CPU for workers without GPUs, on the first GPU for workers with one",
                advice="Ask for GPUs of the workers on a machine that has one itself, or for the device cpu",
            )

    def load(self, source: str, blocks: Iterable[str] | None = None) -> Any:
        """The pipeline; its runs show no bar of their own.

        Args:
            source: "zoo:NAME", a folder, or a hub id.
            blocks: Names of the blocks that are masked, around which it is compiled; `None` = those that are found.

        Raises:
            InvalidLoading: An option means nothing for it, or it cannot be offloaded.
            PipelineNotFound: Nothing loadable is there.
            MissingExtra: diffusers is not installed, or transformers, for a pipeline with a text encoder.
            TraceError: It is to be compiled, and no blocks are known.
        """
        self.check(source)
        dtype = None if self.weights == torch.float32 else self.weights  # diffusers' own default is float32
        named = {"variant": self.variant, "revision": self.revision, "torch_dtype": dtype}
        pipe = zoo.load(source, **{name: value for name, value in named.items() if value is not None})
        pipe.set_progress_bar_config(disable=True)

        self._put(pipe)
        if self.compiled:
            denoiser = denoiser_of(pipe)
            found = find_blocks(denoiser, "sublayer", None) if blocks is None else blocks
            compile_repeated(denoiser, found, fullgraph=True)
        return pipe

    def _put(self, pipe: Any) -> None:
        """Bring it to the device, or have it brought there when called; from now on it is this process's own."""
        module = module_of(self.place)
        if self.place.index is not None and hasattr(module, "set_device"):
            module.set_device(self.place)
        if self.offload == "none":
            pipe.to(self.place)
            return
        try:
            if self.offload == "model":
                pipe.enable_model_cpu_offload(device=self.place)
            else:  # without a stream of its own, which would fetch the weights of layers that are not called
                pipe.enable_group_offload(self.place, CPU, offload_type="leaf_level")
        except ValueError as error:
            raise InvalidLoading(
                given=f"{self.offload} offloading of a {type(pipe).__name__} ({error})",
                expected="a pipeline that diffusers can offload so",
                advice="Choose another offloading, or none",
            ) from error

    def _check_names(self) -> None:
        for value, kind, what in ((self.dtype, Dtype, "dtype"), (self.offload, Offload, "offloading")):
            if value is not None and value not in get_args(kind):
                raise InvalidLoading(
                    given=f"{what} {value!r}",
                    expected=f"one of {', '.join(get_args(kind))}",
                    advice="Check the name",
                )
        try:
            torch.device(self.device or "cpu")
        except RuntimeError as error:
            raise InvalidLoading(
                given=f"device {self.device!r}", expected=f"one of this machine: {_devices()}", advice="Check the name"
            ) from error


def _devices() -> str:
    """The devices of this machine, as people name them."""
    kinds = ("cuda", "mps", "xpu")
    return ", ".join(["cpu", *(kind for kind in kinds if is_present(torch.device(kind)))])


def _has_variant(folder: Path, variant: str) -> bool:
    """Whether a pipeline's folder has files of a variant: name.VARIANT.safetensors, or parts of it."""
    return any(f".{variant}." in path.name or f".{variant}-" in path.name for path in folder.rglob("*"))
