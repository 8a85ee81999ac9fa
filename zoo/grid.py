"""A grid of a pipeline's samples, to look at."""

import inspect
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import make_image_grid

from emoji import STYLES, caption
from stepmask.denoiser.conditioning import Conditioning

NAMES = ("red heart", "flag of Japan", "grinning face", "dog face", "pizza", "rocket", "sunflower", "guitar")
LABELS = list(range(27))
STEPS = 50


def draw(pipe: Any, path: Path) -> None:
    """Sample with the pipeline's own defaults, in 50 steps, and save the pictures."""
    pipe.set_progress_bar_config(disable=True)
    images = pipe(**_call(pipe), num_inference_steps=STEPS, generator=torch.Generator().manual_seed(0)).images
    columns = 9 if len(images) % 9 == 0 else 8
    grid = make_image_grid([image.resize((96, 96)) for image in images], len(images) // columns, columns)
    grid.quantize(256).save(path)  # a third of the bytes


def _call(pipe: Any) -> dict[str, Any]:
    wanted = inspect.signature(pipe.__call__).parameters
    if "class_labels" in wanted:
        return {"class_labels": LABELS}
    if "prompt" not in wanted:
        return {"batch_size": 32}
    prompts = [caption(style, name) for style in STYLES for name in NAMES]
    return Conditioning.prompted(pipe, prompts).call(len(prompts), None)
