"""Small text encoders with tokenizers of their own, trained on the captions."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer

WIDTH = 128
VOCABULARY = 2000

TAUGHT = 2000
"""Iterations in which an encoder is taught what captions look like, each of `TOLD` captions."""

TOLD = 192


def clip(captions: Sequence[str], length: int, kept: Path) -> tuple[CLIPTokenizer, CLIPTextModel]:
    """CLIP's tokenizer, byte pairs of the captions, and an untrained encoder, shape (…, length, 128)."""
    tokenizer = _once(CLIPTokenizer(), captions, length, kept)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=length,
        projection_dim=WIDTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return tokenizer, CLIPTextModel(config).requires_grad_(False)


def t5(captions: Sequence[str], length: int, kept: Path) -> tuple[T5Tokenizer, T5EncoderModel]:
    """T5's tokenizer, unigrams of the captions, and an untrained encoder, shape (…, length, 128)."""
    tokenizer = _once(T5Tokenizer(extra_ids=0), captions, length, kept)
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=WIDTH,
        d_kv=WIDTH // 4,
        d_ff=2 * WIDTH,
        num_layers=3,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return tokenizer, T5EncoderModel(config).requires_grad_(False)


def _once(untrained: Any, captions: Sequence[str], length: int, kept: Path) -> Any:
    """The tokenizer in a folder, trained if it is not there: trained again, it would number its pieces otherwise."""
    if not kept.exists():
        trained = untrained.train_new_from_iterator(list(captions), VOCABULARY)
        trained.model_max_length = length
        trained.save_pretrained(kept)
    return type(untrained).from_pretrained(kept)


def teach(
    encoder: nn.Module, summary: Callable[[Tensor], Tensor], draw: Callable[[int], Tensor], pictures: Tensor
) -> None:
    """Let an encoder tell a caption's picture, before any denoiser listens to it; then it stays as it is.

    An untrained encoder says much the same to every caption, and learns from a denoiser's small batches slowly.

    Args:
        encoder: What learns.
        summary: Indices to what the encoder says to their captions, shape (count, width).
        draw: Count to as many pictures' indices.
        pictures: What is to be told, shape (N, …).
    """
    encoder.requires_grad_(True)
    wanted = ((pictures - pictures.mean(0)) / pictures.std()).flatten(1)
    tell = nn.Linear(WIDTH, wanted.shape[1])
    optimiser = torch.optim.AdamW([*encoder.parameters(), *tell.parameters()], weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 1e-3, TAUGHT, pct_start=0.1)
    for _ in range(TAUGHT):
        indices = draw(TOLD)
        loss = nn.functional.mse_loss(tell(summary(indices)), wanted[indices])
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(encoder.parameters(), 1.0)
        optimiser.step()
        schedule.step()
    print(f"the text encoder tells captions with an error of {loss.item():.2f} (1: says nothing)")
    encoder.requires_grad_(False)
