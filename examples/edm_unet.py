"""A U-Net with EDM's preconditioning (arXiv 2206.00364) and Heun's method, written out. Random weights: load yours."""

from itertools import pairwise

import torch
from torch import Tensor, nn

import stepmask

STEPS = 6
SIGMAS = torch.cat([torch.linspace(80 ** (1 / 7), 0.002 ** (1 / 7), STEPS) ** 7, torch.zeros(1)])  # equation 5, ρ = 7


def block(inward: int, outward: int, stride: int = 1) -> nn.Module:
    norm = nn.GroupNorm(4, inward)
    return nn.Sequential(norm, nn.SiLU(), nn.Conv2d(inward, outward, 3, stride=stride, padding=1))


class Denoiser(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.inward, self.noise = nn.Conv2d(3, width, 3, padding=1), nn.Linear(1, width)
        self.down = nn.ModuleList([block(width, width), block(width, 2 * width, stride=2)])
        self.middle = block(2 * width, 2 * width)
        self.up = nn.ModuleList([block(4 * width, width), block(2 * width, width)])
        self.outward = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        skip, out, inner = 1 / (sigma**2 + 1), sigma / (sigma**2 + 1).sqrt(), 1 / (sigma**2 + 1).sqrt()
        h = self.inward(inner * x) + self.noise(sigma.log().view(1, 1) / 4).view(1, -1, 1, 1)
        top = self.down[0](h)
        low = self.down[1](top)
        low = self.up[0](torch.cat([self.middle(low), low], dim=1))
        high = nn.functional.interpolate(low, scale_factor=2.0)
        return skip * x + out * self.outward(self.up[1](torch.cat([high, top], dim=1)))


def sample() -> Tensor:
    x = SIGMAS[0] * torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    for sigma, below in pairwise(SIGMAS):
        slope = (x - denoiser(x, sigma)) / sigma
        euler = x + (below - sigma) * slope
        if below > 0:  # a step of its own
            slope = (slope + (euler - denoiser(euler, below)) / below) / 2
        x = x + (below - sigma) * slope
    return x


torch.manual_seed(0)
denoiser = Denoiser()
trajectory = stepmask.record(denoiser, run=sample)
blocks = {"down.*": "output", "middle": "output", "up.*": "output"}
graph = stepmask.trace(denoiser, trajectory, blocks=blocks)
schedule = stepmask.learn(denoiser, trajectory, budget=0.6, graph=graph)
print(stepmask.evaluate(denoiser, schedule, run=sample))
