"""The training loop of all families: min-SNR weights, cosine, an average of the weights; resumable."""

import io
import json
import time
from pathlib import Path
from typing import Any, Protocol

import torch
from diffusers.optimization import get_cosine_schedule_with_warmup
from diffusers.training_utils import EMAModel, compute_snr
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from emoji import Emoji
from stepmask.files import write_whole

SNR_CAP = 5.0
"""Min-SNR weights (arXiv 2303.09556) with γ = 5."""

KEEP_EVERY = 100
"""Iterations between two saved states."""


class Family(Protocol):
    """A pipeline to train: what is trained, on what, and how it is put together; `modules` is all that has weights."""

    emoji: Emoji
    modules: nn.ModuleDict
    scheduler: Any
    batch: int
    rate: float

    def prepare(self) -> None:
        """What comes before the first iteration."""

    def clean(self, indices: Tensor) -> Tensor:
        """x₀ of some pictures, scaled as the denoiser sees it."""

    def predict(self, noisy: Tensor, timesteps: Tensor, indices: Tensor) -> Tensor:
        """What the denoiser says: ε or v, by the scheduler's `prediction_type`."""

    def draw(self, count: int) -> Tensor:
        """Indices of pictures to train on."""

    def pipeline(self) -> Any:
        """The pipeline of the present weights."""


class Training:
    """Trains a family for a number of iterations, and goes on where a killed run stopped.

    Args:
        family: The pipeline.
        iterations: Of the whole training; the learning rate falls to zero at the last.
        folder: State and log are kept here.
        bf16: Whether the denoiser computes in bfloat16 autocast. A CPU without instructions for it is far slower then.
        compiled: Whether torch.compile makes the prediction; pays from a few thousand iterations on.
    """

    def __init__(
        self, family: Family, iterations: int, folder: Path, *, bf16: bool = False, compiled: bool = False
    ) -> None:
        self.family, self.iterations, self.folder, self.bf16 = family, iterations, folder, bf16
        self.predict = torch.compile(family.predict, dynamic=False) if compiled else family.predict
        self.parameters = [p for p in family.modules.parameters() if p.requires_grad]
        self.optimiser = torch.optim.AdamW(
            self.parameters, family.rate, betas=(0.9, 0.99), weight_decay=0.0, fused=True
        )
        self.schedule = get_cosine_schedule_with_warmup(self.optimiser, 200, iterations)
        self.average = EMAModel(
            self.parameters, decay=0.9995, use_ema_warmup=True, inv_gamma=1.0, power=0.75, foreach=True
        )
        self.iteration, self.seconds, self.prepared = 0, 0.0, False
        self.losses: list[float] = []
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / "state.pt").exists():
            self._load()

    def run(self) -> None:
        """Train to the end."""
        self.family.modules.train()
        if self.iteration == 0 and not self.prepared:
            # a cache of cast weights would outlive their steps
            with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16, cache_enabled=False):
                self.family.prepare()
        started = time.perf_counter() - self.seconds
        while self.iteration < self.iterations:
            self.losses.append(self._step())
            self.iteration += 1
            if self.iteration % KEEP_EVERY == 0 or self.iteration == self.iterations:
                self.seconds = time.perf_counter() - started
                self._keep()

    def begin_with(self, pipe: Any) -> None:
        """Take a trained pipeline's weights to begin with; what comes before the first iteration is done with."""
        for name, module in self.family.modules.items():
            module.load_state_dict(getattr(pipe, name).state_dict())
        self.prepared = True

    def averaged(self) -> Any:
        """The pipeline of the averaged weights."""
        self.average.copy_to(self.parameters)
        self.family.modules.eval()
        return self.family.pipeline()

    @sdpa_kernel(SDPBackend.MATH)  # the fused attention's backward is five times slower in bfloat16 on CPU
    def _step(self) -> float:
        indices = self.family.draw(self.family.batch)
        clean = self.family.clean(indices)
        timesteps = torch.randint(1000, (len(clean),))
        noise = torch.randn_like(clean)
        noisy = self.family.scheduler.add_noise(clean, noise, timesteps)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            predicted = self.predict(noisy, timesteps, indices)
        errors = (predicted.float() - self._wanted(clean, noise, timesteps)).square().flatten(1).mean(1)
        loss = (self._weights(timesteps) * errors).mean()
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimiser.step()
        self.schedule.step()
        self.average.step(self.parameters)
        return float(loss.detach())

    def _wanted(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        scheduler = self.family.scheduler
        wanted: Tensor = scheduler.get_velocity(clean, noise, timesteps) if self._velocity else noise
        return wanted

    def _weights(self, timesteps: Tensor) -> Tensor:
        """Of ε's squared error min(SNR, γ) / SNR; of v's, which is SNR + 1 times x₀'s, with SNR + 1 in place of SNR."""
        snr: Tensor = compute_snr(self.family.scheduler, timesteps) + self._velocity
        return snr.clamp(max=SNR_CAP) / snr

    @property
    def _velocity(self) -> bool:
        return bool(self.family.scheduler.config.prediction_type == "v_prediction")

    def _keep(self) -> None:
        mean = sum(self.losses) / len(self.losses)
        self.losses.clear()
        row = {"iteration": self.iteration, "seconds": round(self.seconds), "loss": round(mean, 4)}
        with (self.folder / "log.jsonl").open("a") as log:
            log.write(json.dumps(row) + "\n")
        state = {
            "modules": self.family.modules.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "schedule": self.schedule.state_dict(),
            "average": self.average.state_dict(),
            "random": torch.get_rng_state(),
            "iteration": self.iteration,
            "seconds": self.seconds,
        }
        buffer = io.BytesIO()
        torch.save(state, buffer)
        write_whole(self.folder / "state.pt", buffer.getvalue())

    def _load(self) -> None:
        state = torch.load(self.folder / "state.pt", weights_only=True)
        self.family.modules.load_state_dict(state["modules"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.schedule.load_state_dict(state["schedule"])
        self.average.load_state_dict(state["average"])
        torch.set_rng_state(state["random"])
        self.iteration, self.seconds = state["iteration"], state["seconds"]
