"""Pipelines of real architectures at full size, with random weights."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

SMALL_DECODER = {"block_out_channels": (8,), "norm_num_groups": 4}
"""Of an autoencoder that is not called."""


@dataclass(frozen=True)
class FullSize:
    """A pipeline of a real architecture.

    Args:
        make: Makes it, with random weights.
        call: Its arguments.
    """

    make: Callable[[], Any]
    call: Callable[[], dict[str, Any]]

    def pipeline(self) -> Any:
        """A new one, always with the same weights."""
        torch.manual_seed(0)
        pipe = self.make()
        pipe.set_progress_bar_config(disable=True)
        for part in pipe.components.values():
            if isinstance(part, torch.nn.Module):
                part.eval()
        return pipe


def dit_xl() -> Any:
    """DiT-XL/2 for 256×256 pictures (arXiv 2212.09748)."""
    from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    transformer = DiTTransformer2DModel(
        num_attention_heads=16, attention_head_dim=72, in_channels=4, out_channels=8, num_layers=28, sample_size=32,
        num_embeds_ada_norm=1000, norm_type="ada_norm_zero", norm_elementwise_affine=False,
    )  # fmt: skip
    scheduler = DDIMScheduler(clip_sample=False)
    return DiTPipeline(transformer=transformer, vae=AutoencoderKL(**SMALL_DECODER), scheduler=scheduler)


def pixart_xl() -> Any:
    """PixArt-α for 512×512 pictures (arXiv 2310.00426)."""
    from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, PixArtAlphaPipeline, PixArtTransformer2DModel

    transformer = PixArtTransformer2DModel(
        num_attention_heads=16, attention_head_dim=72, in_channels=4, out_channels=8, num_layers=28, sample_size=64,
        cross_attention_dim=1152, caption_channels=4096,
    )  # fmt: skip
    return PixArtAlphaPipeline(
        tokenizer=None, text_encoder=None, vae=AutoencoderKL(**SMALL_DECODER), transformer=transformer,
        scheduler=DPMSolverMultistepScheduler(),
    )  # fmt: skip


def stable_diffusion() -> Any:
    """Stable Diffusion 1.5 for 512×512 pictures (arXiv 2112.10752)."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

    return StableDiffusionPipeline(
        vae=AutoencoderKL(**SMALL_DECODER), text_encoder=None, tokenizer=None, safety_checker=None,
        unet=UNet2DConditionModel(sample_size=64, cross_attention_dim=768), feature_extractor=None,
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False), requires_safety_checker=False,
    )  # fmt: skip


def ddpm(side: int, channels: tuple[int, ...], attention: int) -> Any:
    """A U-Net of DDPM (arXiv 2006.11239), with attention at one of its resolutions."""
    from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel

    down = ["DownBlock2D"] * len(channels)
    down[attention] = "AttnDownBlock2D"
    up = [name.replace("Down", "Up") for name in reversed(down)]
    unet = UNet2DModel(
        sample_size=side, block_out_channels=channels, down_block_types=down, up_block_types=up, layers_per_block=2,
        attention_head_dim=None, downsample_padding=0, flip_sin_to_cos=False, freq_shift=1, norm_eps=1e-6,
    )  # fmt: skip
    return DDIMPipeline(unet=unet, scheduler=DDIMScheduler())


ARCHITECTURES = {
    "DiT-XL/2, 256": FullSize(dit_xl, lambda: {"class_labels": [207], "guidance_scale": 1.0, "output_type": "latent"}),
    "PixArt-XL/2, 512": FullSize(
        pixart_xl,
        lambda: {
            "prompt_embeds": torch.randn(1, 120, 4096),
            "prompt_attention_mask": torch.ones(1, 120),
            "negative_prompt": None,
            "guidance_scale": 1.0,
            "use_resolution_binning": False,
            "output_type": "latent",
        },
    ),
    "Stable Diffusion 1.5, 512": FullSize(
        stable_diffusion,
        lambda: {"prompt_embeds": torch.randn(1, 77, 768), "guidance_scale": 1.0, "output_type": "latent"},
    ),
    "DDPM, CIFAR-10, 32": FullSize(lambda: ddpm(32, (128, 256, 256, 256), 1), lambda: {"batch_size": 8}),
    "DDPM, LSUN, 256": FullSize(lambda: ddpm(256, (128, 128, 256, 256, 512, 512), 4), lambda: {"batch_size": 1}),
}
