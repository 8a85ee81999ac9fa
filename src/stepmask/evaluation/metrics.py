"""How far a masked run is from the reference on the same seeds."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from stepmask.extras import extra
from stepmask.learning.objective import sample_errors

Images = npt.NDArray[np.float32]

SSIM_WINDOW = 11


def latent_errors(latent: Tensor, reference: Tensor) -> list[float]:
    """‖x_0 − x_0 ref‖² / ‖x_0 ref‖² of each sample."""
    return [float(error) for error in sample_errors(latent.double(), reference.double())]


def psnr(images: Images, reference: Images) -> list[float]:
    """Peak signal-to-noise ratio of each image, in dB; images of shape (N, H, W, C) in [0, 1]. 100 where equal."""
    from_skimage = _skimage_metrics().peak_signal_noise_ratio
    return [
        100.0 if np.array_equal(a, b) else float(from_skimage(b, a, data_range=1.0))
        for a, b in zip(images, reference, strict=True)
    ]


def ssim(images: Images, reference: Images) -> list[float]:
    """Structural similarity of each image (Wang et al. 2004); empty for images smaller than its 11×11 window."""
    if min(images.shape[1:3]) < SSIM_WINDOW:
        return []
    similarity = _skimage_metrics().structural_similarity
    options = {"data_range": 1.0, "channel_axis": -1, "gaussian_weights": True, "use_sample_covariance": False}
    return [float(similarity(b, a, **options)) for a, b in zip(images, reference, strict=True)]


def images_of(output: Any) -> Images | None:
    """The images in a pipeline's output as (N, H, W, C) in [0, 1]; `None` if it holds none."""
    found = getattr(output, "images", None)
    if isinstance(found, np.ndarray):
        return found.astype(np.float32)
    if isinstance(found, Sequence) and found and hasattr(found[0], "convert"):
        return np.stack([np.asarray(image.convert("RGB"), dtype=np.float32) / 255 for image in found])
    return None


def _skimage_metrics() -> Any:
    with extra("evaluate", "scikit-image", "PSNR and SSIM"):
        from skimage import metrics
    return metrics
