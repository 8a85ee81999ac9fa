"""The four families: which modules, which scheduler, how a batch is predicted, which pipeline comes out."""

from abc import abstractmethod
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMPipeline,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from torch import Tensor, nn

from emoji import Emoji
from text import clip, t5, teach

LENGTH = 32
"""Tokens of a caption, padding included."""

WORDLESS = 0.1
"""Share of the captions that are left out, for classifier-free guidance."""

STYLELESS = 0.3
"""Share of the captions that are the name alone."""


VELOCITY: dict[str, Any] = {"beta_schedule": "linear", "prediction_type": "v_prediction"}
"""ε says nothing of the picture where noise is strong, and there captions and outlines are decided."""


class _OnEmoji:
    """What all families share: pictures to draw, and linear betas."""

    batch = 16
    rate = 1e-3

    def __init__(self, emoji: Emoji) -> None:
        self.emoji = emoji
        self.scheduler: Any = DDIMScheduler(**VELOCITY, clip_sample=False)

    def prepare(self) -> None:
        """Most begin at once."""

    def draw(self, count: int) -> Tensor:
        return self.emoji.draw(count)


class PixelDDPM(_OnEmoji):
    """Unconditional, on pixels, 32×32: UNet2DModel.

    It fits into 4 MB, and draws the shapes and colours of emoji, seldom a thing that one can name.
    """

    def __init__(self, emoji: Emoji) -> None:
        super().__init__(emoji)
        self.scheduler = DDIMScheduler(**VELOCITY, clip_sample=True)
        self.unet = UNet2DModel(
            sample_size=32,
            block_out_channels=(32, 64, 96, 64),
            down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            norm_num_groups=16,
            attention_head_dim=32,
        ).to(memory_format=torch.channels_last)
        self.modules = nn.ModuleDict({"unet": self.unet})

    def clean(self, indices: Tensor) -> Tensor:
        return self.emoji.pixels(indices, 32)

    def predict(self, noisy: Tensor, timesteps: Tensor, indices: Tensor) -> Tensor:
        return self.unet(noisy.contiguous(memory_format=torch.channels_last), timesteps).sample

    def pipeline(self) -> DDIMPipeline:
        return DDIMPipeline(self.unet, self.scheduler)


class _Latent(_OnEmoji):
    """Families on the latents of the zoo's autoencoder, 4×16×16; they lie in memory."""

    def __init__(self, emoji: Emoji, vae: AutoencoderKL) -> None:
        super().__init__(emoji)
        self.vae = vae.eval().requires_grad_(False)
        self.latents = self._encode()

    @torch.no_grad()
    def _encode(self) -> Tensor:
        indices = torch.arange(len(self.emoji.images))
        means = [self.vae.encode(self.emoji.pixels(few, 64)).latent_dist.mean for few in indices.split(64)]
        return torch.cat(means) * self.vae.config.scaling_factor

    def clean(self, indices: Tensor) -> Tensor:
        return self.latents[indices]


class DiT(_Latent):
    """By group and style: DiTTransformer2DModel, 64 tokens of width 192.

    Labels 0 to 26 = 3 × group + style (`pipe.labels` names them), 1000 = no class; guidance 4 is its default.
    Before this training it had about 3,100 iterations of batches of 64. Faces, people and flags are recognised,
    most objects are not.
    """

    rate = 5e-4

    def __init__(self, emoji: Emoji, vae: AutoencoderKL, transformer: DiTTransformer2DModel) -> None:
        super().__init__(emoji, vae)
        self.scheduler = DDIMScheduler(beta_schedule="linear", clip_sample=False)  # as it was begun: ε
        self.transformer = transformer  # leaves out a tenth of the labels by itself
        self.modules = nn.ModuleDict({"transformer": transformer})

    def predict(self, noisy: Tensor, timesteps: Tensor, indices: Tensor) -> Tensor:
        return self.transformer(noisy, timestep=timesteps, class_labels=self.emoji.labels[indices]).sample

    def pipeline(self) -> DiTPipeline:
        return DiTPipeline(self.transformer, self.vae, self.scheduler, id2label=self.emoji.label_names)


class _Captioned(_Latent):
    """Families that are told a caption; the text encoder is trained first, and then left alone.

    The tokenizer is kept in a folder of the training's.
    """

    text_encoder: Any

    def __init__(self, emoji: Emoji, vae: AutoencoderKL, tokenizer: Any) -> None:
        super().__init__(emoji, vae)
        self.tokenizer = tokenizer
        padded = {"padding": "max_length", "max_length": LENGTH, "truncation": True, "return_tensors": "pt"}
        texts = emoji.captions + emoji.plain_names + [""] * len(emoji.names)
        self.tokens = tokenizer(texts, **padded)

    def prepare(self) -> None:
        """Teach the text encoder, untrained as it is, the captions' pictures at half their size."""
        teach(self.text_encoder, self.summary, self.draw, nn.functional.avg_pool2d(self.latents, 2))

    @abstractmethod
    def summary(self, indices: Tensor) -> Tensor:
        """What the text encoder says of some captions as a whole, shape (count, width)."""

    def captions(self, indices: Tensor) -> dict[str, Tensor]:
        """Tokens and mask of some captions: with style, a third without, a tenth empty."""
        drawn, count = torch.rand(len(indices)), len(self.emoji.names)
        kind = (drawn < WORDLESS + STYLELESS).long() + (drawn < WORDLESS).long()
        return {key: tokens[indices + kind * count] for key, tokens in self.tokens.items()}


class LDM(_Captioned):
    """Stable Diffusion in small: UNet2DConditionModel and a CLIP text encoder; no attention at full size.

    Colours and outlines follow the prompt; hearts, flags and faces are recognised, most things are not.
    """

    def __init__(self, emoji: Emoji, vae: AutoencoderKL, kept: Path) -> None:
        tokenizer, self.text_encoder = clip(emoji.captions, LENGTH, kept)
        super().__init__(emoji, vae, tokenizer)
        self.scheduler = DDIMScheduler(**VELOCITY, clip_sample=False, steps_offset=1)
        self.unet = UNet2DConditionModel(
            sample_size=16,
            block_out_channels=(128, 128),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            norm_num_groups=16,
            attention_head_dim=4,
            cross_attention_dim=self.text_encoder.config.hidden_size,
        ).to(memory_format=torch.channels_last)
        self.modules = nn.ModuleDict({"unet": self.unet, "text_encoder": self.text_encoder})

    def words(self, indices: Tensor) -> Tensor:
        """States of some captions' tokens, shape (count, length, width)."""
        return self.text_encoder(self.captions(indices)["input_ids"])[0]

    def summary(self, indices: Tensor) -> Tensor:
        return self.words(indices)[:, -1]  # CLIP reads from left to right

    def predict(self, noisy: Tensor, timesteps: Tensor, indices: Tensor) -> Tensor:
        words = self.words(indices)
        noisy = noisy.contiguous(memory_format=torch.channels_last)
        return self.unet(noisy, timesteps, encoder_hidden_states=words).sample

    def pipeline(self) -> StableDiffusionPipeline:
        return StableDiffusionPipeline(
            self.vae,
            self.text_encoder,
            self.tokenizer,
            self.unet,
            self.scheduler,
            None,
            None,
            requires_safety_checker=False,
        )


class PixArt(_Captioned):
    """PixArt-α in small: PixArtTransformer2DModel, a T5 encoder, DPM-Solver++; on from a class-conditional DiT.

    As its paper does (arXiv 2310.00426, "re-parameterization"), it begins with what the DiT has learned of drawing.
    """

    rate = 5e-4

    def __init__(self, emoji: Emoji, vae: AutoencoderKL, dit: DiTTransformer2DModel, kept: Path) -> None:
        tokenizer, self.text_encoder = t5(emoji.captions, LENGTH, kept)
        super().__init__(emoji, vae, tokenizer)
        self.transformer = PixArtTransformer2DModel(
            num_attention_heads=6,
            attention_head_dim=32,
            cross_attention_dim=192,
            num_layers=12,
            sample_size=16,
            in_channels=4,
            out_channels=4,
            caption_channels=self.text_encoder.config.d_model,
            use_additional_conditions=False,
        )
        _take_over(self.transformer, dit)
        self.modules = nn.ModuleDict({"transformer": self.transformer, "text_encoder": self.text_encoder})

    def words(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """States of some captions' tokens, shape (count, length, width), and which of them count."""
        told = self.captions(indices)
        return self.text_encoder(told["input_ids"], attention_mask=told["attention_mask"])[0], told["attention_mask"]

    def summary(self, indices: Tensor) -> Tensor:
        words, mask = self.words(indices)
        return (words * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)

    def predict(self, noisy: Tensor, timesteps: Tensor, indices: Tensor) -> Tensor:
        words, mask = self.words(indices)
        return self.transformer(
            noisy,
            encoder_hidden_states=words,
            encoder_attention_mask=mask,
            timestep=timesteps,
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        ).sample

    def pipeline(self) -> PixArtAlphaPipeline:
        scheduler = DPMSolverMultistepScheduler(**VELOCITY, algorithm_type="dpmsolver++")
        return PixArtAlphaPipeline(self.tokenizer, self.text_encoder, self.vae, self.transformer, scheduler)


@torch.no_grad()
def _take_over(pixart: PixArtTransformer2DModel, dit: DiTTransformer2DModel) -> None:
    """Give a PixArt the blocks of a DiT of its size, as they are to no label halfway through.

    Words change nothing yet, for cross-attention answers zero; nor does the timestep. What is predicted is another
    thing: the last layer is its own.
    """
    left_out = (".norm1.", "proj_out")
    shared = {key: value for key, value in dit.state_dict().items() if not any(part in key for part in left_out)}
    pixart.load_state_dict(shared, strict=False)
    halfway, no_label = torch.tensor([500]), torch.tensor([dit.config.num_embeds_ada_norm])
    nn.init.zeros_(pixart.adaln_single.linear.weight)
    nn.init.zeros_(pixart.adaln_single.linear.bias)
    for block, taught in zip(pixart.transformer_blocks, dit.transformer_blocks, strict=True):
        modulation = taught.norm1.linear(taught.norm1.silu(taught.norm1.emb(halfway, no_label)))
        block.scale_shift_table.copy_(modulation.reshape(6, -1))
        nn.init.zeros_(block.attn2.to_out[0].weight)
        nn.init.zeros_(block.attn2.to_out[0].bias)
