"""What a pipeline drew, as pictures, bytes and PNG files."""

from io import BytesIO
from typing import Any

import numpy as np
import numpy.typing as npt

from stepmask.errors import RunError
from stepmask.evaluation.metrics import Images, images_of
from stepmask.extras import extra


def pictures_of(output: Any) -> Images:
    """The pictures in a pipeline's output, (N, H, W, C) in [0, 1].

    Raises:
        RunError: There are none.
    """
    if (images := images_of(output)) is None:
        raise RunError(given="a pipeline without pictures", expected="images", advice="Choose another pipeline")
    return images


def as_bytes(images: Images) -> npt.NDArray[np.uint8]:
    """Numbers in [0, 1] as a file keeps them; what lies outside is clipped."""
    return (images * 255).round().clip(0, 255).astype(np.uint8)


def png(picture: Images) -> bytes:
    """A picture, (H, W, C) in [0, 1], as a PNG file.

    Raises:
        MissingExtra: Pillow is not installed.
    """
    with extra("evaluate", "Pillow", "PNG files"):
        from PIL import Image
    buffer = BytesIO()
    Image.fromarray(as_bytes(picture)).save(buffer, format="PNG")
    return buffer.getvalue()
