"""Runs whose steps are not all alike, on real pipelines at a tiny size: what people do every day."""

import types
from collections.abc import Callable
from typing import Any

import diffusers
import numpy as np
import PIL.Image
import torch
from diffusers.callbacks import SDCFGCutoffCallback
from diffusers.modular_pipelines.wan.modular_blocks_wan import WanCoreDenoiseStep
from torch import Tensor, nn

from denoisers import Inputs, denoiser, stirred
from pipelines import GUIDED, LATENT, qwen, stable_diffusion, video_autoencoder, z_image

STEPS = 8

Situation = tuple[Any, Inputs]


def guidance_cut_off() -> Situation:
    """diffusers' own callback, which serves one picture a call."""
    pipe, call = stable_diffusion()
    one = {name: embeds[:1] for name, embeds in GUIDED.items()}
    return pipe, {**call, **one, "callback_on_step_end": SDCFGCutoffCallback(cutoff_step_ratio=0.5)}


def guidance_cut_off_for_several() -> Situation:
    """The conditional half of the batch goes on, two samples of it."""

    def cut(pipe: Any, step: int, _: Any, given: dict[str, Any]) -> dict[str, Any]:
        if step != STEPS // 2:
            return given
        pipe._guidance_scale = 0.0
        return {**given, "prompt_embeds": given["prompt_embeds"].chunk(2)[1]}

    pipe, call = stable_diffusion()
    return pipe, {
        **call,
        "callback_on_step_end": cut,
        "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"],
    }


def guidance_truncated() -> Situation:
    """Samples in lists, the conditional ones first: Z-Image drops the second half of them."""
    pipe, call = z_image()
    return pipe, {**call, "cfg_truncation": 0.5, "guidance_scale": 4.0}


def prompts_of_two_lengths() -> Situation:
    """Guidance in two calls, the negative prompt half as long."""
    pipe, call = qwen()
    negative = {name: call[name][:, :3] for name in ("negative_prompt_embeds", "negative_prompt_embeds_mask")}
    return pipe, {**call, **negative}


def guider_in_an_interval() -> Situation:
    """A guider of Modular Diffusers that is on for part of the steps, in two calls."""
    network = stirred(denoiser("WanTransformer3DModel", in_channels=16, out_channels=16, rope_max_seq_len=32))
    pipe = WanCoreDenoiseStep().init_pipeline()
    pipe.update_components(
        transformer=network,
        scheduler=diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
        guider=diffusers.ClassifierFreeGuidance(guidance_scale=4.0, start=0.25, stop=0.75),
    )
    return pipe, {**GUIDED, "height": 16, "width": 16, "num_frames": 5}


def networks_in_turn() -> Situation:
    """Wan 2.2: one transformer for the noisy steps, another for the rest, each in two calls a step."""
    told = {"in_channels": 16, "out_channels": 16, "rope_max_seq_len": 32}
    networks = [stirred(denoiser("WanTransformer3DModel", **told)) for _ in range(2)]
    with torch.no_grad():
        for weight in networks[1].parameters():
            weight.mul_(1.1)
    scheduler = diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    vae = video_autoencoder("AutoencoderKLWan", 16)
    pipe = diffusers.WanPipeline(None, None, vae, scheduler, *networks, boundary_ratio=0.6)
    return pipe, {**GUIDED, "height": 16, "width": 16, "num_frames": 5}


class ToldIdeogram(diffusers.Ideogram4Pipeline):
    """Words without a text encoder."""

    def check_inputs(self, *_: Any, **__: Any) -> None: ...

    def encode_prompt(
        self, prompt: Any, grid_h: int, grid_w: int, max_sequence_length: int, device: Any
    ) -> tuple[Tensor, ...]:
        words = max_sequence_length
        count = grid_h * grid_w
        indicator = torch.tensor([3] * words + [2] * count)[None]
        text = torch.randn(1, words + count, 8, generator=torch.Generator().manual_seed(3))
        return text, torch.zeros(1, words + count, 3, dtype=torch.long), torch.ones_like(indicator), indicator


def networks_together() -> Situation:
    """Ideogram 4: the unconditional half of guidance is a network of its own."""
    networks = [denoiser("Ideogram4Transformer2DModel", in_channels=16) for _ in range(2)]
    with torch.no_grad():
        for weight in networks[1].parameters():
            weight.mul_(1.1)
    coder = flux2_autoencoder()
    pipe = ToldIdeogram(diffusers.FlowMatchEulerDiscreteScheduler(), coder, None, None, *networks)
    return pipe, {"prompt": "x", "height": 16, "width": 16, "guidance_scale": 5.0, "max_sequence_length": 6}


def flux2_autoencoder() -> Any:
    return diffusers.AutoencoderKLFlux2(
        block_out_channels=(8,),
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
        norm_num_groups=4,
        latent_channels=4,
        layers_per_block=1,
    ).eval()


class _Vae(nn.Module):
    """Is never asked to decode."""

    def __init__(self) -> None:
        super().__init__()
        self.config = types.SimpleNamespace(z_dim=4)
        self.dtype = torch.float32
        self.device = torch.device("cpu")


class _Processor:
    """Is never asked to encode."""

    tokenizer = types.SimpleNamespace(encode=lambda *_, **__: [7])

    def apply_chat_template(self, *_: Any, **__: Any) -> list[list[int]]:
        return [[1, 2]]


def prefix_cached() -> Situation:
    """Qwen-Image 2.1: keys and values of the prompt are kept at the first step, and its tokens left out afterwards."""
    network = denoiser("QwenImage21Transformer2DModel")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    pipe = diffusers.QwenImage21Pipeline(scheduler, _Vae(), None, _Processor(), network)
    words = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(1))
    return pipe, {"prompt_embeds": words, "height": 64, "width": 64}


def reference_cached() -> Situation:
    """FLUX.2 klein KV: the tokens of a reference picture are there at the first step alone."""
    network = denoiser("Flux2Transformer2DModel", in_channels=16, out_channels=16, guidance_embeds=False)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    pipe = diffusers.Flux2KleinKVPipeline(scheduler, flux2_autoencoder(), None, None, network)
    picture = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    words = torch.randn(1, 6, 8, generator=torch.Generator().manual_seed(1))
    return pipe, {"prompt_embeds": words, "image": [picture], "height": 16, "width": 16}


SITUATIONS: dict[str, Callable[[], Situation]] = {
    "guidance cut off by diffusers' callback": guidance_cut_off,
    "guidance cut off for several samples": guidance_cut_off_for_several,
    "guidance truncated, samples in lists": guidance_truncated,
    "prompts of two lengths in two calls": prompts_of_two_lengths,
    "a guider that starts and stops": guider_in_an_interval,
    "two networks in turn": networks_in_turn,
    "two networks at every step": networks_together,
    "keys and values of the prompt kept": prefix_cached,
    "keys and values of a picture kept": reference_cached,
}


def make(name: str) -> Situation:
    """A pipeline, and a call of it that ends with the latents."""
    pipe, call = SITUATIONS[name]()
    pipe.set_progress_bar_config(disable=True)
    ends = {"output": "latents"} if isinstance(pipe, diffusers.ModularPipeline) else LATENT
    return pipe, {**call, "num_inference_steps": STEPS, **ends}
