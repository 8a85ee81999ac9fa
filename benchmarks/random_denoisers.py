"""Denoisers of large models alone, with random weights: what they are made of and called with, full-size and tiny."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stepmask.denoiser.values import prediction

Inputs = dict[str, Any]

TINY_UNET: dict[str, Any] = {"block_out_channels": (8, 16), "norm_num_groups": 4, "cross_attention_dim": 8}
TINY_HEADS = {"num_attention_heads": 2, "attention_head_dim": 8}


@dataclass(frozen=True)
class RandomDenoiser:
    """A denoiser in a plain sampling loop.

    Args:
        make: Makes it: tiny, or at full size.
        inputs: What it is called with besides the latent and the timestep, alike.
        latent: Shape of the latent at full size, of one sample; and of a tiny one.
        first: What it calls the latent.
        time: A timestep of its own scale.
    """

    make: Callable[[bool], nn.Module]
    inputs: Callable[[bool], Inputs]
    latent: tuple[tuple[int, ...], tuple[int, ...]]
    first: str
    time: float


class Loop:
    """x ← .9·x + .1·D(x, t), so many times: a sampling without a scheduler.

    Args:
        told: The denoiser.
        device: Where it runs.
        dtype: In what.
        steps: Of the loop.
        tiny: Whether it is tiny.
    """

    def __init__(self, told: RandomDenoiser, device: torch.device, dtype: torch.dtype, steps: int, tiny: bool) -> None:
        torch.manual_seed(0)
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)  # a large one in float32 would not fit beside itself
        try:
            with device:
                self.denoiser = told.make(tiny).eval().requires_grad_(False)
                self.inputs = told.inputs(tiny)
                self.latent = torch.randn(1, *told.latent[tiny])
                self.time = torch.full((1,), told.time)
        finally:
            torch.set_default_dtype(before)
        self.first, self.steps = told.first, steps

    @torch.no_grad()
    def __call__(self) -> Tensor:
        """One sampling; its final latent."""
        x = self.latent
        for _ in range(self.steps):
            said = prediction(self.denoiser(**{self.first: x, "timestep": self.time, **self.inputs}))
            assert isinstance(said, Tensor)
            x = 0.9 * x + 0.1 * said[:, : x.shape[1]]
        return x


def sd15(tiny: bool) -> Any:
    from diffusers import UNet2DConditionModel

    if tiny:
        kinds = {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D")}
        ups = {"up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")}
        return UNet2DConditionModel(**TINY_UNET, **kinds, **ups, sample_size=8, attention_head_dim=4)
    return UNet2DConditionModel(sample_size=64, cross_attention_dim=768)


def sdxl(tiny: bool) -> Any:
    from diffusers import UNet2DConditionModel

    added = {"addition_embed_type": "text_time", "use_linear_projection": True}
    if tiny:
        kinds = {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D")}
        ups = {"up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D")}
        sizes = {"addition_time_embed_dim": 4, "projection_class_embeddings_input_dim": 32}
        return UNet2DConditionModel(**TINY_UNET, **kinds, **ups, **added, **sizes, sample_size=8, attention_head_dim=4)
    return UNet2DConditionModel(
        sample_size=128, block_out_channels=(320, 640, 1280), cross_attention_dim=2048, attention_head_dim=(5, 10, 20),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10), addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816, **added,
    )  # fmt: skip


def sdxl_inputs(tiny: bool) -> Inputs:
    text, pooled = ((5, 8), 8) if tiny else ((77, 2048), 1280)
    added = {"text_embeds": torch.randn(1, pooled), "time_ids": torch.zeros(1, 6)}
    return {"encoder_hidden_states": torch.randn(1, *text), "added_cond_kwargs": added}


def pixart(tiny: bool) -> Any:
    from diffusers import PixArtTransformer2DModel

    if tiny:
        sizes = {"sample_size": 8, "cross_attention_dim": 16, "caption_channels": 8, "num_layers": 2}
        return PixArtTransformer2DModel(**TINY_HEADS, **sizes, use_additional_conditions=False)
    return PixArtTransformer2DModel(
        num_attention_heads=16, attention_head_dim=72, num_layers=28, sample_size=128, cross_attention_dim=1152,
        caption_channels=4096, use_additional_conditions=False,
    )  # fmt: skip


def pixart_inputs(tiny: bool) -> Inputs:
    words = torch.randn(1, 5, 8) if tiny else torch.randn(1, 120, 4096)
    return {"encoder_hidden_states": words, "added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}


def flux(tiny: bool) -> Any:
    from diffusers import FluxTransformer2DModel

    if tiny:
        sizes = {"in_channels": 4, "num_layers": 2, "num_single_layers": 2, "joint_attention_dim": 8}
        return FluxTransformer2DModel(**TINY_HEADS, **sizes, pooled_projection_dim=8, axes_dims_rope=(4, 2, 2))
    return FluxTransformer2DModel()


def flux_inputs(tiny: bool) -> Inputs:
    side, words, width, pooled = (4, 5, 8, 8) if tiny else (64, 512, 4096, 768)
    places = torch.cartesian_prod(torch.zeros(1), torch.arange(float(side)), torch.arange(float(side)))
    return {
        "encoder_hidden_states": torch.randn(1, words, width),
        "pooled_projections": torch.randn(1, pooled),
        "img_ids": places,
        "txt_ids": torch.zeros(words, 3),
    }


def words(width: int) -> Callable[[bool], Inputs]:
    """Texts of a U-Net."""
    return lambda tiny: {"encoder_hidden_states": torch.randn(1, 5, 8) if tiny else torch.randn(1, 77, width)}


RANDOM_DENOISERS = {
    "Stable Diffusion 1.5, 512": RandomDenoiser(sd15, words(768), ((4, 64, 64), (4, 8, 8)), "sample", 500.0),
    "PixArt-XL/2, 1024": RandomDenoiser(pixart, pixart_inputs, ((4, 128, 128), (4, 8, 8)), "hidden_states", 500.0),
    "SDXL, 1024": RandomDenoiser(sdxl, sdxl_inputs, ((4, 128, 128), (4, 8, 8)), "sample", 500.0),
    "FLUX, 1024": RandomDenoiser(flux, flux_inputs, ((4096, 64), (16, 4)), "hidden_states", 0.5),
}
