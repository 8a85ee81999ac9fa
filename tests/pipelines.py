"""Real pipelines of diffusers at a tiny size: what is called, and with what; two samples each, no words."""

from collections.abc import Callable
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, DDIMScheduler, FlowMatchEulerDiscreteScheduler

from denoisers import BATCH, Inputs, denoiser, ones, stirred, tokens

STEPS = 4
LATENT = {"output_type": "latent"}  # DiTPipeline has no such thing

Tiny = tuple[Any, Inputs]

torch.manual_seed(0)
GUIDED = {"prompt_embeds": tokens(8), "negative_prompt_embeds": tokens(8)}
POOLED = {
    "pooled_prompt_embeds": torch.randn(BATCH, 8),
    "negative_pooled_prompt_embeds": torch.randn(BATCH, 8),
}


def autoencoder(channels: int = 4) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8,), norm_num_groups=4, latent_channels=channels, shift_factor=0.1, scaling_factor=0.5
    ).eval()


def video_autoencoder(class_name: str, channels: int) -> Any:
    told = {f"latents_{what}": [value] * channels for what, value in (("mean", 0.0), ("std", 1.0))}
    return getattr(diffusers, class_name)(base_dim=3, z_dim=channels, dim_mult=[1] * 4, num_res_blocks=1, **told)


def stable_diffusion(class_name: str = "StableDiffusionPipeline", scheduler: Any = None) -> Tiny:
    scheduler = scheduler or DDIMScheduler(steps_offset=1, clip_sample=False)
    parts = (autoencoder(), None, None, denoiser("UNet2DConditionModel"), scheduler, None, None)
    pipe = getattr(diffusers, class_name)(*parts, requires_safety_checker=False)
    return pipe, {**GUIDED, "height": 8, "width": 8}


def dit() -> Tiny:
    pipe = diffusers.DiTPipeline(denoiser("DiTTransformer2DModel"), autoencoder(), DDIMScheduler(clip_sample=False))
    return pipe, {"class_labels": [1, 2]}


def image_to_image() -> Tiny:
    pipe, _ = stable_diffusion("StableDiffusionImg2ImgPipeline")
    return pipe, {**GUIDED, "image": torch.rand(BATCH, 3, 8, 8), "strength": 0.75}


def inpainting() -> Tiny:
    pipe, call = stable_diffusion("StableDiffusionInpaintPipeline")
    picture, mask = torch.rand(BATCH, 3, 8, 8), torch.ones(BATCH, 1, 8, 8)
    return pipe, {**call, "image": picture, "mask_image": mask, "strength": 0.75}


def perturbed_attention() -> Tiny:
    pipe, call = stable_diffusion("StableDiffusionPAGPipeline")
    return pipe, {**call, "pag_scale": 2.0}


def control_net() -> Tiny:
    unet, scheduler = denoiser("UNet2DConditionModel"), DDIMScheduler(steps_offset=1, clip_sample=False)
    control = stirred(diffusers.ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8,)))
    parts = (autoencoder(), None, None, unet, control, scheduler, None, None)
    pipe = diffusers.StableDiffusionControlNetPipeline(*parts, requires_safety_checker=False)
    return pipe, {**GUIDED, "image": torch.rand(BATCH, 3, 8, 8)}


def sdxl() -> Tiny:
    told = {"addition_embed_type": "text_time", "addition_time_embed_dim": 4}
    unet = denoiser("UNet2DConditionModel", **told, projection_class_embeddings_input_dim=32)
    parts = (autoencoder(), None, None, None, None, unet, diffusers.EulerDiscreteScheduler())
    pipe = diffusers.StableDiffusionXLPipeline(*parts, add_watermarker=False)
    return pipe, {**GUIDED, **POOLED, "height": 8, "width": 8}


def sd3() -> Tiny:
    coders = {f"{part}{number}": None for part in ("text_encoder", "tokenizer") for number in ("", "_2", "_3")}
    transformer, scheduler = denoiser("SD3Transformer2DModel"), FlowMatchEulerDiscreteScheduler()
    pipe = diffusers.StableDiffusion3Pipeline(transformer, scheduler, autoencoder(), **coders)
    return pipe, {**GUIDED, **POOLED, "height": 8, "width": 8}


def flux() -> Tiny:
    coders = {f"{part}{number}": None for part in ("text_encoder", "tokenizer") for number in ("", "_2")}
    transformer, scheduler = denoiser("FluxTransformer2DModel"), FlowMatchEulerDiscreteScheduler()
    pipe = diffusers.FluxPipeline(scheduler, autoencoder(1), transformer=transformer, **coders)
    call = {"prompt_embeds": tokens(8), "pooled_prompt_embeds": torch.randn(BATCH, 8)}
    return pipe, {**call, "height": 16, "width": 16}


def sana() -> Tiny:
    sizes = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8), "attention_head_dim": 4}
    blocks = {f"{part}_block_types": ("ResBlock",) * 2 for part in ("encoder", "decoder")}
    layers = {f"{part}_layers_per_block": (1, 1) for part in ("encoder", "decoder")}
    vae = diffusers.AutoencoderDC(latent_channels=4, **sizes, **blocks, **layers)
    scheduler = diffusers.DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction")
    pipe = diffusers.SanaPipeline(None, None, vae, denoiser("SanaTransformer2DModel"), scheduler)
    masks = {"prompt_attention_mask": ones(), "negative_prompt_attention_mask": ones(), "negative_prompt": None}
    return pipe, {**GUIDED, **masks, "height": 32, "width": 32, "use_resolution_binning": False}


def wan() -> Tiny:
    transformer = denoiser("WanTransformer3DModel", in_channels=16, out_channels=16, rope_max_seq_len=32)
    scheduler = diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    pipe = diffusers.WanPipeline(None, None, video_autoencoder("AutoencoderKLWan", 16), scheduler, transformer)
    return pipe, {**GUIDED, "height": 16, "width": 16, "num_frames": 5}


def qwen() -> Tiny:
    transformer = denoiser("QwenImageTransformer2DModel", in_channels=16, out_channels=4)
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    vae = video_autoencoder("AutoencoderKLQwenImage", 4)
    pipe = diffusers.QwenImagePipeline(scheduler, vae, None, None, transformer)
    masks = {"prompt_embeds_mask": ones(), "negative_prompt_embeds_mask": ones()}
    return pipe, {**GUIDED, **masks, "true_cfg_scale": 3.0, "height": 16, "width": 16}


def z_image() -> Tiny:
    """Takes and gives its samples in lists."""
    vae, scheduler = autoencoder(), FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    pipe = diffusers.ZImagePipeline(scheduler, vae, None, None, denoiser("ZImageTransformer2DModel"))
    return pipe, {**{what: list(words) for what, words in GUIDED.items()}, "height": 16, "width": 16}


PIPELINES: dict[str, Callable[[], Tiny]] = {
    "DiTPipeline": dit,
    "StableDiffusionPipeline": stable_diffusion,
    "StableDiffusionImg2ImgPipeline": image_to_image,
    "StableDiffusionInpaintPipeline": inpainting,
    "StableDiffusionPAGPipeline": perturbed_attention,
    "StableDiffusionControlNetPipeline": control_net,
    "StableDiffusionXLPipeline": sdxl,
    "StableDiffusion3Pipeline": sd3,
    "FluxPipeline": flux,
    "SanaPipeline": sana,
    "WanPipeline": wan,
    "QwenImagePipeline": qwen,
    "ZImagePipeline": z_image,
}


def make(name: str) -> Tiny:
    """A pipeline, and a call of it that ends with the latents."""
    pipe, call = PIPELINES[name]()
    pipe.set_progress_bar_config(disable=True)
    return pipe, {**call, "num_inference_steps": STEPS, **({} if name == "DiTPipeline" else LATENT)}
