"""Train a pipeline of the zoo, or go on training it: python zoo/train.py ldm --data runs/emoji64.npz.

State and log are kept in runs/zoo/NAME; a killed run goes on there. At the end, and with --export at any time, the
pipeline of the averaged weights goes to src/stepmask/zoo/NAME in float16, with its grid of samples.
"""

import argparse
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from card import card
from emoji import Emoji
from families import LDM, DiT, PixArt, PixelDDPM
from grid import draw
from stepmask.denoiser.conditioning import PROMPTS_NAME
from training import Family, Training

ZOO = Path(__file__).parent.parent / "src" / "stepmask" / "zoo"
RUNS = Path("runs") / "zoo"

SHARES_VAE = "dit-emoji"
"""Of this pipeline all latent families have the autoencoder."""

PROMPTS = 128
"""Captions that go beside a pipeline that is told any, to draw from."""


def zoo_pipeline() -> Any:
    """The pipeline whose autoencoder all latent families share."""
    return DiffusionPipeline.from_pretrained(ZOO / SHARES_VAE, torch_dtype=torch.float32)


FAMILIES: dict[str, Callable[[Emoji, Path], Family]] = {
    "ddpm": lambda emoji, _: PixelDDPM(emoji),
    "ldm": lambda emoji, kept: LDM(emoji, zoo_pipeline().vae, kept),
    "dit": lambda emoji, _: DiT(emoji, (pipe := zoo_pipeline()).vae, pipe.transformer),
    "pixart": lambda emoji, kept: PixArt(emoji, (pipe := zoo_pipeline()).vae, pipe.transformer, kept),
}
"""By name, of the pictures and the folder of a tokenizer."""


def export(name: str, training: Training) -> None:
    """Put the averaged pipeline into the package, and a grid of its samples, the log and a card beside it."""
    pipe, place = training.averaged(), ZOO / f"{name}-emoji"
    draw(pipe, training.folder / "samples.png")
    pipe.to(torch.float16).save_pretrained(place)
    if "text_encoder" in pipe.components:
        _change(place / "text_encoder" / "config.json", dtype="float32")  # transformers would load it as it lies there
    for config in place.glob("*/config.json"):
        if "_name_or_path" in json.loads(config.read_text()):
            _change(config, _name_or_path=f"zoo:{SHARES_VAE}")  # and not a path of this machine
    if hasattr(pipe, "labels"):
        _change(place / "model_index.json", id2label=training.family.emoji.label_names)  # diffusers does not keep it
    for kept in ("samples.png", "log.jsonl"):
        shutil.copy(training.folder / kept, place / kept)
    (place / "README.md").write_text(card(name, training.family, pipe, place / "log.jsonl"))
    if "tokenizer" in pipe.components:
        (place / PROMPTS_NAME).write_text("\n".join(training.family.emoji.prompts(PROMPTS)) + "\n")


def _change(config: Path, **values: Any) -> None:
    """Set values of a model's configuration."""
    config.write_text(json.dumps({**json.loads(config.read_text()), **values}, indent=2) + "\n")


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("family", choices=FAMILIES)
    arguments.add_argument("--data", type=Path, default=Path("runs") / "emoji64.npz", help="what build_data.py wrote")
    arguments.add_argument("--iterations", type=int, default=20_000)
    arguments.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments.add_argument("--bf16", action="store_true", help="compute in bfloat16; for CPUs with instructions for it")
    arguments.add_argument("--compile", action="store_true", help="a third faster after minutes of compilation")
    arguments.add_argument("--on", action="store_true", help="begin with the zoo's weights, and a new cosine")
    arguments.add_argument("--export", action="store_true", help="export what is trained so far, and stop")
    asked = arguments.parse_args()
    torch.set_num_threads(asked.threads)
    torch.manual_seed(0)
    before, tokenizer = ZOO / f"{asked.family}-emoji", RUNS / asked.family / "tokenizer"
    if asked.on and not tokenizer.exists() and (before / "tokenizer").exists():
        shutil.copytree(before / "tokenizer", tokenizer)
    family = FAMILIES[asked.family](Emoji.load(asked.data), tokenizer)
    training = Training(family, asked.iterations, RUNS / asked.family, bf16=asked.bf16, compiled=asked.compile)
    if asked.on and training.iteration == 0:
        training.begin_with(DiffusionPipeline.from_pretrained(before, torch_dtype=torch.float32))
        shutil.copy(before / "log.jsonl", training.folder / "log.jsonl")
    if not asked.export:
        training.run()
    export(asked.family, training)


if __name__ == "__main__":
    main()
