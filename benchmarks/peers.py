"""What a user would install instead, each on a pipeline of its own, with the knobs that it is tuned over.

Everything comes from the packages themselves: diffusers' hooks, cache-dit, DeepCache. Nothing of theirs is fixed but
what keeps them from running on pipelines that never reset them: between two runs their state is reset, and hooks that
ask for a cache context get one.
"""

import ast
import contextlib
import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from diffusers import hooks
from diffusers.hooks.hooks import CacheContext, HookRegistry, _set_cache_context

from stepmask.denoiser.conditioning import Conditioning
from stepmask.denoiser.families import denoiser_of

Knobs = Mapping[str, Any]

SUBLAYERS = [r".*transformer_blocks\.\d+\.(attn1|attn2|ff)", r".*(resnets|downsamplers|upsamplers)\.\d+"]
"""What TaylorSeer is told to forecast: its own patterns fit no module of these denoisers."""


class CannotRun(Exception):
    """A peer that does nothing, or fails, on this pipeline; says why."""


@dataclass(frozen=True)
class Peer:
    """A cache of another package.

    Args:
        name: As in the tables.
        knobs: What it is tuned over.
        enable: Puts it on a pipeline, for a number of steps; that pipeline is used for nothing else.
    """

    name: str
    knobs: Sequence[Knobs]
    enable: Callable[..., None]

    def put_on(self, pipe: Any, steps: int, **knobs: Any) -> Any:
        """The pipeline, which is used for nothing else, with the cache on it.

        Raises:
            CannotRun: It does not attach.
        """
        pipe.set_progress_bar_config(disable=True)
        pipe.__class__ = type(type(pipe).__name__, (type(pipe),), {})  # cache-dit changes the class, for everybody
        self.enable(pipe, steps, **knobs)
        return pipe


def taylorseer(pipe: Any, steps: int, **knobs: Any) -> None:
    told = {"cache_identifiers": SUBLAYERS, "taylor_factors_dtype": torch.float32}
    _hook(pipe, hooks.apply_taylorseer_cache, hooks.TaylorSeerCacheConfig(**told, **knobs))


def taylorseer_lite(pipe: Any, steps: int, **knobs: Any) -> None:
    if not hasattr(denoiser_of(pipe), "proj_out"):
        raise CannotRun("its lite mode forecasts a module called proj_out, which there is not")
    _hook(pipe, hooks.apply_taylorseer_cache, hooks.TaylorSeerCacheConfig(use_lite_mode=True, **knobs))


def first_block(pipe: Any, steps: int, threshold: float) -> None:
    _need_transformer(pipe)
    _hook(pipe, hooks.apply_first_block_cache, hooks.FirstBlockCacheConfig(threshold))


def magcache(pipe: Any, steps: int, **knobs: Any) -> None:
    _need_transformer(pipe)
    denoiser = denoiser_of(pipe)
    hooks.apply_mag_cache(denoiser, hooks.MagCacheConfig(num_inference_steps=steps, calibrate=True))
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        pipe(**Conditioning.of(pipe).call(8, 0), num_inference_steps=steps)
    ratios = ast.literal_eval(re.findall(r"^\[[\d., e-]+\]$", printed.getvalue(), re.MULTILINE)[-1])
    _hook(pipe, hooks.apply_mag_cache, hooks.MagCacheConfig(num_inference_steps=steps, mag_ratios=ratios, **knobs))


def attention_broadcast(pipe: Any, steps: int, every: int, within: tuple[int, int]) -> None:
    _need_transformer(pipe)
    places = "spatial", "cross"
    told: dict[str, Any] = {f"{place}_attention_block_skip_range": every for place in places}
    told |= {f"{place}_attention_timestep_skip_range": within for place in places}
    config = hooks.PyramidAttentionBroadcastConfig(**told, current_timestep_callback=_clock(pipe))
    _hook(pipe, hooks.apply_pyramid_attention_broadcast, config)


def fastercache(pipe: Any, steps: int, **knobs: Any) -> None:
    _need_transformer(pipe)
    told = {"is_guidance_distilled": True, "tensor_format": "BCHW", "current_timestep_callback": _clock(pipe)}
    _hook(pipe, hooks.apply_faster_cache, hooks.FasterCacheConfig(**told, **knobs))


def cache_dit(pipe: Any, steps: int, order: int = 0, every: int | None = None, **knobs: Any) -> None:
    import cache_dit as package

    _need_transformer(pipe)
    mask = None if every is None else [int(step % every == 0) for step in range(steps)]
    config = package.DBCacheConfig(
        **{"Bn_compute_blocks": 0, "num_inference_steps": steps, "enable_separate_cfg": False, **knobs},
        steps_computation_mask=mask,
        steps_computation_policy="static",
    )
    calibrator = package.TaylorSeerCalibratorConfig(taylorseer_order=order) if order else None
    package.enable_cache(pipe, cache_config=config, calibrator_config=calibrator)


def deepcache(pipe: Any, steps: int, interval: int, branch: int) -> None:
    from DeepCache import DeepCacheSDHelper

    if not hasattr(pipe, "unet"):
        raise CannotRun("it knows U-Nets only")
    helper = DeepCacheSDHelper(pipe=pipe)
    helper.set_params(cache_interval=interval, cache_branch_id=branch)
    helper.enable()


def _grid(**values: Sequence[Any]) -> list[Knobs]:
    return [dict(zip(values, chosen, strict=True)) for chosen in product(*values.values())]


THRESHOLDS = (0.03, 0.06, 0.09, 0.12, 0.15, 0.2, 0.25, 0.5, 1.0)
WARM_UPS = (1, 3)

PEERS = (
    Peer(
        "TaylorSeer (diffusers)",
        _grid(cache_interval=range(2, 8), max_order=(1, 2), disable_cache_before_step=WARM_UPS),
        taylorseer,
    ),
    Peer(
        "TaylorSeer, lite (diffusers)",
        _grid(cache_interval=range(2, 8), max_order=(1, 2), disable_cache_before_step=WARM_UPS),
        taylorseer_lite,
    ),
    Peer("FirstBlockCache (diffusers)", _grid(threshold=THRESHOLDS), first_block),
    Peer(
        "MagCache (diffusers)",
        _grid(threshold=THRESHOLDS, max_skip_steps=(2, 5), retention_ratio=(0.1,)),
        magcache,
    ),
    Peer(
        "PyramidAttentionBroadcast (diffusers)",
        _grid(every=(2, 3, 5), within=((-1, 1001), (100, 800))),
        attention_broadcast,
    ),
    Peer("FasterCache (diffusers)", _grid(spatial_attention_block_skip_range=(2, 3, 5)), fastercache),
    Peer(
        "DBCache (cache-dit)",
        _grid(Fn_compute_blocks=(1,), residual_diff_threshold=THRESHOLDS, max_warmup_steps=WARM_UPS),
        cache_dit,
    ),
    Peer(
        "DBCache with TaylorSeer (cache-dit)",
        _grid(order=(1, 2), Fn_compute_blocks=(1,), residual_diff_threshold=THRESHOLDS, max_warmup_steps=WARM_UPS),
        cache_dit,
    ),
    Peer(
        "step mask (cache-dit)",
        _grid(order=(0, 1, 2), every=range(2, 6), Fn_compute_blocks=(1,)),
        cache_dit,
    ),
    Peer("DeepCache (package)", _grid(interval=range(2, 7), branch=range(4)), deepcache),
)


def _hook(pipe: Any, apply: Callable[[Any, Any], None], config: Any) -> None:
    """Put diffusers' hooks on the denoiser, and let every run begin as the first does."""
    denoiser = denoiser_of(pipe)
    apply(denoiser, config)
    registries = (getattr(module, "_diffusers_hook", None) for module in denoiser.modules())
    if not any(registry.hooks for registry in registries if registry is not None):
        raise CannotRun("it attaches no hook")
    free = pipe.maybe_free_model_hooks

    def begin() -> None:
        HookRegistry.check_if_exists_or_initialize(denoiser).reset_stateful_hooks()
        HookRegistry.check_if_exists_or_initialize(denoiser).invalidate_child_registries_cache()
        _set_cache_context(denoiser, CacheContext("run"))

    def end() -> None:
        free()
        begin()

    pipe.maybe_free_model_hooks = end
    begin()


def _need_transformer(pipe: Any) -> None:
    if not hasattr(pipe, "transformer"):
        raise CannotRun("it looks for transformer blocks at the top of a transformer")


def _clock(pipe: Any) -> Callable[[], float]:
    """The timestep that the denoiser was last given, for hooks that ask their pipeline for it."""
    now = [1000.0]

    def read(_: Any, args: Any, kwargs: Any) -> None:
        now[0] = float(torch.as_tensor(kwargs["timestep"]).flatten()[0])

    denoiser_of(pipe).register_forward_pre_hook(read, with_kwargs=True)
    return lambda: now[0]
