"""Build the training pictures: python zoo/build_data.py --out runs/emoji64.npz.

Fetches three npm packages with `npm pack` (Node.js must be there): emoji-datasource-google 16.0.0 (Noto Emoji,
Apache-2.0), emoji-datasource-twitter 16.0.0 (Twemoji, CC-BY 4.0: © Twitter, Inc and other contributors) and
@lobehub/fluent-emoji-3d 1.1.0 (Microsoft Fluent Emoji, MIT). Pictures are laid on white and resized to 64 pixels.
"""

import argparse
import json
import subprocess
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from PIL import Image

PACKAGES = {
    "noto": ("emoji-datasource-google@16.0.0", "package/img/google/64/{}.png"),
    "twemoji": ("emoji-datasource-twitter@16.0.0", "package/img/twitter/64/{}.png"),
    "fluent": ("@lobehub/fluent-emoji-3d@1.1.0", "package/assets/{}.webp"),
}
GROUPS = (
    "Smileys & Emotion",
    "People & Body",
    "Animals & Nature",
    "Food & Drink",
    "Travel & Places",
    "Activities",
    "Objects",
    "Symbols",
    "Flags",
)
TONES = {
    "1F3FB": "light skin tone",
    "1F3FC": "medium-light skin tone",
    "1F3FD": "medium skin tone",
    "1F3FE": "medium-dark skin tone",
    "1F3FF": "dark skin tone",
}
SIZE = 64


@dataclass(frozen=True)
class Named:
    """One emoji: its file without the ending, its name, and its Unicode group."""

    file: str
    name: str
    group: str


def named(entries: list[dict[str, Any]]) -> Iterator[Named]:
    """All emoji of a data source, each followed by its skin tones."""
    for entry in entries:
        if entry["category"] in GROUPS:
            name = entry["name"].lower()
            yield Named(Path(entry["image"]).stem, name, entry["category"])
            for tones, variation in entry.get("skin_variations", {}).items():
                words = ", ".join(TONES[tone] for tone in tones.split("-"))
                yield Named(Path(variation["image"]).stem, f"{name}, {words}", entry["category"])


def on_white(picture: bytes) -> np.ndarray:
    """A picture as uint8, shape (64, 64, 3)."""
    image = Image.open(BytesIO(picture)).convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    return np.asarray(Image.alpha_composite(white, image).convert("RGB").resize((SIZE, SIZE), Image.Resampling.LANCZOS))


def fetch(package: str, folder: Path) -> tarfile.TarFile:
    """A package of the npm registry, opened."""
    packed = subprocess.check_output(["npm", "pack", "--silent", package], cwd=folder, text=True)
    return tarfile.open(folder / packed.split()[-1])


def read(package: tarfile.TarFile, path: str) -> bytes:
    """A file of a package."""
    file = package.extractfile(path)
    assert file is not None  # a folder
    return file.read()


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--out", type=Path, default=Path("runs") / "emoji64.npz")
    asked = arguments.parse_args()
    images, labels, captions, styles = [], [], [], []
    with TemporaryDirectory() as folder:
        opened = {style: fetch(package, Path(folder)) for style, (package, _) in PACKAGES.items()}
        listed = list(named(json.loads(read(opened["noto"], "package/emoji.json"))))
        for style, (_, place) in PACKAGES.items():
            there = set(opened[style].getnames())
            for emoji in listed:
                if (path := place.format(emoji.file)) in there:
                    images.append(on_white(read(opened[style], path)))
                    labels.append(GROUPS.index(emoji.group))
                    captions.append(emoji.name)
                    styles.append(style)
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(
        asked.out, images=np.stack(images), labels=labels, captions=captions, styles=styles, classes=GROUPS
    )
    print(f"{len(images)} pictures in {asked.out}")


if __name__ == "__main__":
    main()
