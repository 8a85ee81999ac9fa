"""How far a masked run is from the reference on the same seeds."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from stepmask.errors import RunError
from stepmask.extras import extra
from stepmask.learning.objective import sample_errors

Images = npt.NDArray[np.float32]
Pixels = npt.NDArray[Any]

SSIM_WINDOW = 11


def latent_errors(latent: Tensor, reference: Tensor) -> list[float]:
    """‖x_0 − x_0 ref‖² / ‖x_0 ref‖² of each sample."""
    return [float(error) for error in sample_errors(latent.double(), reference.double())]


def psnr(images: Pixels, reference: Pixels) -> list[float]:
    """Peak signal-to-noise ratio of each image, in dB. 100 where equal.

    Args:
        images: (N, H, W, C); floats in [0, 1], or unsigned integers up to the largest of their type.
        reference: Alike.

    Raises:
        RunError: They are signed integers, which do not tell their white.
    """
    from_skimage = _skimage_metrics().peak_signal_noise_ratio
    return [
        100.0 if np.array_equal(a, b) else float(from_skimage(b, a, data_range=1.0))
        for a, b in zip(_as_floats(images), _as_floats(reference), strict=True)
    ]


def ssim(images: Pixels, reference: Pixels) -> list[float]:
    """Structural similarity of each image (Wang et al. 2004); empty for images smaller than its 11×11 window.

    Args:
        images: As of `psnr`.
        reference: Alike.

    Raises:
        RunError: As `psnr`.
    """
    if min(images.shape[1:3]) < SSIM_WINDOW:
        return []
    similarity = _skimage_metrics().structural_similarity
    options = {"data_range": 1.0, "channel_axis": -1, "gaussian_weights": True, "use_sample_covariance": False}
    pairs = zip(_as_floats(images), _as_floats(reference), strict=True)
    return [float(similarity(b, a, **options)) for a, b in pairs]


def images_of(output: Any) -> Images | None:
    """The images in a pipeline's output as (N, H, W, C) in [0, 1]; `None` if it holds none.

    Raises:
        RunError: They are signed integers.
    """
    found = getattr(output, "images", None)
    if isinstance(found, np.ndarray):
        return _as_floats(found)
    if isinstance(found, Sequence) and found and hasattr(found[0], "convert"):
        return np.stack([np.asarray(image.convert("RGB"), dtype=np.float32) / 255 for image in found])
    return None


def _as_floats(images: Pixels) -> Images:
    """Images with white at 1."""
    if images.dtype.kind == "i":
        raise RunError(
            given=f"images as {images.dtype} numbers",
            expected="floats in [0, 1], or unsigned integers, whose largest is white",
            advice="Ask the pipeline for output_type='np' or 'pil'",
        )
    white = np.iinfo(images.dtype).max if images.dtype.kind == "u" else 1
    return images.astype(np.float32) / np.float32(white)


def _skimage_metrics() -> Any:
    with extra("evaluate", "scikit-image", "PSNR and SSIM"):
        from skimage import metrics
    return metrics
