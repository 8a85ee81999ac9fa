"""What a pipeline drew, as pictures, bytes and PNG files."""

from io import BytesIO
from typing import Any

import numpy as np
import numpy.typing as npt

from stepmask.errors import MissingExtra, RunError
from stepmask.evaluation.metrics import Images, images_of


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
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingExtra(
            given="no Pillow", expected="it, for PNG files", advice="pip install 'stepmask[evaluate]'"
        ) from error
    buffer = BytesIO()
    Image.fromarray(as_bytes(picture)).save(buffer, format="PNG")
    return buffer.getvalue()
