"""The training pictures: emoji in three drawing styles, with their names and groups."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

STYLES = ("noto", "twemoji", "fluent")

PLAIN_NAMES = {"heavy black heart": "red heart", "slice of pizza": "pizza"}
"""Where the Unicode name is not what anybody would type."""

TONED = 5
"""Skin tones of a drawing."""


@dataclass(frozen=True)
class Emoji:
    """Pictures and what is known of them.

    Args:
        images: uint8, (N, 3, 64, 64), on white.
        groups: (N,), Unicode group of each.
        styles: (N,), index into `STYLES`.
        names: Unicode names.
        group_names: By group.
    """

    images: Tensor
    groups: Tensor
    styles: Tensor
    names: list[str]
    group_names: list[str]

    @classmethod
    def load(cls, path: Path) -> "Emoji":
        """Read what `build_data.py` wrote."""
        data = np.load(path)
        return cls(
            torch.from_numpy(data["images"]).permute(0, 3, 1, 2).contiguous(),
            torch.from_numpy(data["labels"]),
            torch.tensor([STYLES.index(style) for style in data["styles"]]),
            [str(name) for name in data["captions"]],
            [str(name) for name in data["classes"]],
        )

    @property
    def labels(self) -> Tensor:
        """3 · group + style, shape (N,)."""
        return len(STYLES) * self.groups + self.styles

    @property
    def label_names(self) -> dict[int, str]:
        """What each label means; without commas, at which diffusers splits them."""
        pairs = [f"{group} ({style})" for group in self.group_names for style in STYLES]
        return dict(enumerate(pairs))

    @property
    def captions(self) -> list[str]:
        """A sentence for each picture: "a twemoji drawing of red heart"."""
        return [
            caption(STYLES[style], name) for style, name in zip(self.styles.tolist(), self.plain_names, strict=True)
        ]

    @property
    def plain_names(self) -> list[str]:
        """Names as people say them."""
        flags = self.group_names.index("Flags")
        return [_plain(name, group == flags) for name, group in zip(self.names, self.groups.tolist(), strict=True)]

    def pixels(self, indices: Tensor, size: int) -> Tensor:
        """Pictures in [−1, 1], scaled down to a size by averaging, shape (…, 3, size, size)."""
        pictures = self.images[indices].float() / 127.5 - 1
        return torch.nn.functional.avg_pool2d(pictures, self.images.shape[-1] // size)

    def draw(self, count: int) -> Tensor:
        """Indices at random, by `weights`."""
        return torch.multinomial(self.weights, count, replacement=True)

    @cached_property
    def weights(self) -> Tensor:
        """How often each picture is drawn, shape (N,).

        The skin tones of a drawing weigh as much as the drawing itself, and groups as the square root of what is in
        them, or people would be six of ten.
        """
        toned = torch.tensor(["skin tone" in name for name in self.names])
        weights = torch.where(toned, 1 / TONED, 1.0).double()
        return weights * torch.bincount(self.groups, weights).rsqrt()[self.groups]

    def prompts(self, count: int) -> list[str]:
        """Captions of as many pictures, evenly spread, none of them a skin tone."""
        plain = [text for text in self.captions if "skin tone" not in text]
        return [plain[index * len(plain) // count] for index in range(count)]


def caption(style: str, name: str) -> str:
    """What a text encoder is told."""
    return f"a {style} drawing of {name}"


def _plain(name: str, flag: bool) -> str:
    if flag and name.endswith(" flag"):
        return f"flag of {name.removesuffix(' flag')}"
    return PLAIN_NAMES.get(name, name)
