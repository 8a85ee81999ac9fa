"""Denoisers in the shapes in which public repositories write them, at tiny size: their names, lists and wrappers."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

WIDTH, SIDE, CLASSES, STEPS = 16, 8, 4, 3


def norm(width: int) -> nn.GroupNorm:
    return nn.GroupNorm(4, width)


def conv(given: int, made: int) -> nn.Conv2d:
    return nn.Conv2d(given, made, 3, padding=1)


def tokens_of(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2)


def picture_of(tokens: Tensor) -> Tensor:
    return tokens.transpose(1, 2).unflatten(2, (SIDE, SIDE))


class Times(nn.Module):
    """What a network is told of the timestep."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(2, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        return self.mlp(torch.stack([t.sin(), t.cos()], -1))  # type: ignore[no-any-return]


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.proj(nn.functional.scaled_dot_product_attention(q, k, v))  # type: ignore[no-any-return]


class Mlp(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))  # type: ignore[no-any-return]


class Block(nn.Module):
    """A transformer's layer, with or without a skip from an earlier one."""

    def __init__(self, width: int = WIDTH, *, skips: bool = False) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width), Attention(width)
        self.norm2, self.mlp = nn.LayerNorm(width), Mlp(width)
        self.skip_linear = nn.Linear(2 * width, width) if skips else None

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        if self.skip_linear is not None:
            x = self.skip_linear(torch.cat([x, skip], -1))
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))  # type: ignore[no-any-return]


class Resnet(nn.Module):
    """A U-Net's layer, told of the timestep by `mlp`, as many call it."""

    def __init__(self, given: int, made: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.SiLU(), nn.Linear(WIDTH, made))
        self.block1 = nn.Sequential(norm(given), nn.SiLU(), conv(given, made))
        self.block2 = nn.Sequential(norm(made), nn.SiLU(), conv(made, made))
        self.res_conv = nn.Conv2d(given, made, 1) if given != made else nn.Identity()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = self.block1(x) + self.mlp(t)[..., None, None]
        return self.block2(h) + self.res_conv(x)  # type: ignore[no-any-return]


class Spatial(nn.Module):
    """Attention between pixels, beside the stream."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.to_qkv, self.to_out = norm(width), nn.Conv2d(width, 3 * width, 1), nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor, *_: Any) -> Tensor:
        q, k, v = (tokens_of(part) for part in self.to_qkv(self.norm(x)).chunk(3, 1))
        said = nn.functional.scaled_dot_product_attention(q, k, v)
        return x + self.to_out(said.transpose(1, 2).unflatten(2, x.shape[2:]))  # type: ignore[no-any-return]


class Row(nn.Module):
    """A ViT whose layers are one `nn.Sequential`."""

    def __init__(self) -> None:
        super().__init__()
        self.to_patch, self.time = nn.Conv2d(3, WIDTH, 1), Times()
        self.layers = nn.Sequential(*[Block() for _ in range(3)])
        self.head = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        tokens = tokens_of(self.to_patch(x)) + self.time(t)[:, None]
        return picture_of(self.head(self.layers(tokens)))


class Dit(nn.Module):
    """A class-conditional DiT; `None` in place of labels is none."""

    def __init__(self) -> None:
        super().__init__()
        self.x_embedder, self.t_embedder = nn.Conv2d(3, WIDTH, 1), Times()
        self.y_embedder = nn.Embedding(CLASSES + 1, WIDTH)
        self.blocks = nn.ModuleList([Block() for _ in range(3)])
        self.final_layer = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        labels = x.new_full((len(x),), CLASSES, dtype=torch.long) if labels is None else labels
        h = tokens_of(self.x_embedder(x)) + (self.t_embedder(t) + self.y_embedder(labels))[:, None]
        for block in self.blocks:
            h = block(h)
        return picture_of(self.final_layer(h))


class Nested(nn.Module):
    """A U-Net whose levels are lists of [resnet, resnet, attention, downsample], the middle in names of its own."""

    def __init__(self) -> None:
        super().__init__()
        wide = 2 * WIDTH
        self.init_conv, self.time_mlp = conv(3, WIDTH), Times()
        self.downs, self.ups = nn.ModuleList(), nn.ModuleList()
        for given, made in ((WIDTH, WIDTH), (WIDTH, wide)):
            last = given != made
            down = conv(given, made) if last else nn.Conv2d(given, made, 4, stride=2, padding=1)
            self.downs.append(nn.ModuleList([Resnet(given, given), Resnet(given, given), Spatial(given), down]))
        self.mid_block1, self.mid_attn, self.mid_block2 = Resnet(wide, wide), Spatial(wide), Resnet(wide, wide)
        for given, made in ((wide, WIDTH), (WIDTH, WIDTH)):
            up = nn.Sequential(nn.Upsample(scale_factor=2), conv(given, made)) if given != made else conv(given, made)
            parts = [Resnet(given + WIDTH, given), Resnet(given + WIDTH, given), Spatial(given), up]
            self.ups.append(nn.ModuleList(parts))
        self.final_res_block, self.final_conv = Resnet(2 * WIDTH, WIDTH), nn.Conv2d(WIDTH, 3, 1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x, told, skips = self.init_conv(x), self.time_mlp(t), []
        first = x.clone()
        for one, two, attention, down in self.downs:  # type: ignore[misc]
            x = one(x, told)
            skips.append(x)
            x = attention(two(x, told))
            skips.append(x)
            x = down(x)
        x = self.mid_block2(self.mid_attn(self.mid_block1(x, told)), told)
        for one, two, attention, up in self.ups:  # type: ignore[misc]
            x = one(torch.cat([x, skips.pop()], 1), told)
            x = two(torch.cat([x, skips.pop()], 1), told)
            x = up(attention(x))
        return self.final_conv(self.final_res_block(torch.cat([x, first], 1), told))  # type: ignore[no-any-return]


class Middle(nn.Module):
    """A middle in a module of its own."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.attention, self.second = Resnet(width, width), Spatial(width), Resnet(width, width)

    def forward(self, x: Tensor, told: Tensor) -> Tensor:
        return self.second(self.attention(self.first(x, told)), told)  # type: ignore[no-any-return]


class Level(nn.Module):
    """Two layers of a U-Net, in a module of their own."""

    def __init__(self, given: int, made: int) -> None:
        super().__init__()
        self.resnet, self.attention = Resnet(given, made), Spatial(made)

    def forward(self, x: Tensor, told: Tensor) -> Tensor:
        return self.attention(self.resnet(x, told))  # type: ignore[no-any-return]


class Attributes(nn.Module):
    """A U-Net without a list: `down1`, `down2`, `up1`, `up2`."""

    def __init__(self) -> None:
        super().__init__()
        self.inc, self.time = conv(3, WIDTH), Times()
        self.down1, self.down2 = Level(WIDTH, WIDTH), Level(WIDTH, WIDTH)
        self.bot = Middle(WIDTH)
        self.up1, self.up2 = Level(2 * WIDTH, WIDTH), Level(2 * WIDTH, WIDTH)
        self.outc = nn.Conv2d(WIDTH, 3, 1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        told = self.time(t)
        one = self.down1(self.inc(x), told)
        two = self.down2(nn.functional.avg_pool2d(one, 2), told)
        x = self.up1(torch.cat([self.bot(two, told), two], 1), told)
        x = self.up2(torch.cat([nn.functional.interpolate(x, scale_factor=2), one], 1), told)
        return self.outc(x)  # type: ignore[no-any-return]


class Told(nn.Sequential):
    """Layers of which some are told of the timestep."""

    def forward(self, x: Tensor, told: Tensor) -> Tensor:  # type: ignore[override]
        for layer in self:
            x = layer(x, told) if isinstance(layer, Resnet) else layer(x)
        return x


class Guided(nn.Module):
    """A U-Net of `input_blocks`, `middle_block` and `output_blocks`, each a sequence that is told of the timestep."""

    def __init__(self) -> None:
        super().__init__()
        self.time_embed = nn.Sequential(nn.Linear(1, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH))
        down = nn.Conv2d(WIDTH, WIDTH, 3, stride=2, padding=1)
        layers = [Told(conv(3, WIDTH)), Told(Resnet(WIDTH, WIDTH), Spatial(WIDTH)), Told(down)]
        self.input_blocks = nn.ModuleList(layers)
        self.middle_block = Told(Resnet(WIDTH, WIDTH), Spatial(WIDTH), Resnet(WIDTH, WIDTH))
        up = nn.Upsample(scale_factor=2)
        self.output_blocks = nn.ModuleList(
            [Told(Resnet(2 * WIDTH, WIDTH), up), Told(Resnet(2 * WIDTH, WIDTH), Spatial(WIDTH))]
        )
        self.out = nn.Sequential(norm(WIDTH), nn.SiLU(), conv(WIDTH, 3))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        told, skips = self.time_embed(t[:, None]), []
        for layers in self.input_blocks:
            x = layers(x, told)
            skips.append(x)
        x = self.middle_block(x, told)
        for layers in self.output_blocks:
            x = layers(torch.cat([x, skips.pop()], 1), told)
        return self.out(x)  # type: ignore[no-any-return]


class Song(nn.Module):
    """A U-Net whose layers are in dictionaries, `enc` and `dec`."""

    def __init__(self) -> None:
        super().__init__()
        self.map_layer0 = Times()
        self.enc = nn.ModuleDict(
            {
                "8x8_conv": conv(3, WIDTH),
                "8x8_block0": Resnet(WIDTH, WIDTH),
                "4x4_down": nn.Conv2d(WIDTH, WIDTH, 3, stride=2, padding=1),
                "4x4_block0": Resnet(WIDTH, WIDTH),
            }
        )
        self.dec = nn.ModuleDict(
            {
                "4x4_in0": Resnet(WIDTH, WIDTH),
                "4x4_block0": Resnet(2 * WIDTH, WIDTH),
                "8x8_up": nn.Sequential(nn.Upsample(scale_factor=2), conv(WIDTH, WIDTH)),
                "8x8_block0": Resnet(2 * WIDTH, WIDTH),
                "8x8_aux_conv": conv(WIDTH, 3),
            }
        )

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        told, skips = self.map_layer0(t), []
        for layer in self.enc.values():
            x = layer(x, told) if isinstance(layer, Resnet) else layer(x)
            skips.append(x)
        for name, layer in self.dec.items():
            if name.endswith("block0"):
                x = torch.cat([x, skips[3] if name.startswith("4") else skips[1]], 1)
            x = layer(x, told) if isinstance(layer, Resnet) else layer(x)
        return x


class Precond(nn.Module):
    """EDM's preconditioning around a network: x ↦ c_skip·x + c_out·model(c_in·x, ln σ / 4)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        scale = (sigma**2 + 0.25).sqrt()[:, None, None, None]
        said = self.model(x / scale, sigma.log() / 4)
        return 0.25 / scale**2 * x + 0.5 * sigma[:, None, None, None] / scale * said


class Mixer(nn.Module):
    """A gated convolution along the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.in_proj, self.out_proj = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.conv1d = nn.Conv1d(2 * WIDTH, 2 * WIDTH, 3, padding=1, groups=2 * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        h, gate = self.in_proj(x).chunk(2, -1)
        h = self.conv1d(h.transpose(1, 2)).transpose(1, 2)
        return self.out_proj(h * gate.sigmoid())  # type: ignore[no-any-return]


class MixerLayer(nn.Module):
    """Norm and mixer, the residual as a second stream beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mixer = nn.LayerNorm(WIDTH), Mixer()

    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        residual = x + residual
        return self.mixer(self.norm(residual)), residual


class Backbone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers, self.norm_f = nn.ModuleList([MixerLayer() for _ in range(3)]), nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        residual = torch.zeros_like(x)
        for layer in self.layers:
            x, residual = layer(x, residual)
        return self.norm_f(x + residual)  # type: ignore[no-any-return]


class Mamba(nn.Module):
    """Mixer layers in a backbone of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed, self.time = nn.Conv2d(3, WIDTH, 1), Times()
        self.backbone, self.decoder = Backbone(), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return picture_of(self.decoder(self.backbone(tokens_of(self.patch_embed(x)) + self.time(t)[:, None])))


class Uvit(nn.Module):
    """A ViT with skips: `in_blocks`, `mid_block`, `out_blocks`."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed, self.time_embed = nn.Conv2d(3, WIDTH, 1), Times()
        self.in_blocks = nn.ModuleList([Block() for _ in range(2)])
        self.mid_block = Block()
        self.out_blocks = nn.ModuleList([Block(skips=True) for _ in range(2)])
        self.decoder_pred = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x, skips = tokens_of(self.patch_embed(x)) + self.time_embed(t)[:, None], []
        for block in self.in_blocks:
            x = block(x)
            skips.append(x)
        x = self.mid_block(x)
        for block in self.out_blocks:
            x = block(x, skips.pop())
        return picture_of(self.decoder_pred(x))


class Encoder(nn.Module):
    """A ViT around torch's own encoder, which runs each layer as one fused operation."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 4 * WIDTH, batch_first=True)
        self.embed, self.time = nn.Conv2d(3, WIDTH, 1), Times()
        self.encoder, self.out = nn.TransformerEncoder(layer, 3), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return picture_of(self.out(self.encoder(tokens_of(self.embed(x)) + self.time(t)[:, None])))


class Pairs(nn.Module):
    """A transformer whose layers are lists of [attention, feed-forward], the residuals outside of them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleList([Attention(WIDTH), Mlp(WIDTH)]) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for attention, feed_forward in self.layers:  # type: ignore[misc]
            x = x + attention(x)
            x = x + feed_forward(x)
        return x


class PairedVit(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_patch_embedding, self.time = nn.Conv2d(3, WIDTH, 1), Times()
        self.transformer, self.mlp_head = Pairs(), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        tokens = tokens_of(self.to_patch_embedding(x)) + self.time(t)[:, None]
        return picture_of(self.mlp_head(self.transformer(tokens)))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "attributes": Attributes,
    "dit": Dit,
    "edm": lambda: Precond(Song()),
    "edm of a dit": lambda: Precond(Dit()),
    "encoder": Encoder,
    "guided diffusion": Guided,
    "mamba": Mamba,
    "nested lists": Nested,
    "pairs": PairedVit,
    "sequential": Row,
    "uvit": Uvit,
}


def network(name: str) -> nn.Module:
    torch.manual_seed(0)
    return NETWORKS[name]().eval()


def sampler(denoiser: nn.Module, steps: int = STEPS) -> Callable[..., Tensor]:
    """x ← x + D(x, t) / steps, from t = 1."""

    def sample(seed: int = 0, steps: int = steps) -> Tensor:
        x = torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))
        for step in range(steps):
            x = x + denoiser(x, torch.full((len(x),), 1 - step / steps)) / steps
        return x

    return sample
