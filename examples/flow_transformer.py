"""A flow-matching transformer of one's own, with a loop of its own. Its weights are random here: load yours."""

import torch
from torch import Tensor, nn

import stepmask

STEPS = 12


class Attention(nn.Module):
    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        self.heads, self.inward, self.outward = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.inward(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(query, key, value)
        return self.outward(mixed.transpose(1, 2).flatten(2))


class Layer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.attn = nn.LayerNorm(width), Attention(width)
        wide = nn.Linear(width, 4 * width)
        self.ff = nn.Sequential(nn.LayerNorm(width), wide, nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm(x))
        return x + self.ff(x)


class Velocity(nn.Module):
    def __init__(self, channels: int = 8, width: int = 64, depth: int = 3) -> None:
        super().__init__()
        self.inward, self.time = nn.Linear(channels, width), nn.Linear(1, width)
        self.layers = nn.ModuleList(Layer(width) for _ in range(depth))
        self.outward = nn.Linear(width, channels)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x = self.inward(x) + torch.sin(self.time(t.view(-1, 1, 1)))
        for layer in self.layers:
            x = layer(x)
        return self.outward(x)


def sample() -> Tensor:
    x = torch.randn(4, 16, 8, generator=torch.Generator().manual_seed(0))
    for step in range(STEPS):
        x = x - velocity(x, torch.full((4,), 1 - step / STEPS)) / STEPS
    return x


torch.manual_seed(0)
velocity = Velocity()
trajectory = stepmask.record(velocity, run=sample)
schedule = stepmask.learn(velocity, trajectory, budget=0.5)  # attention and feed-forward of each layer are its blocks
print(stepmask.evaluate(velocity, schedule, run=sample))
