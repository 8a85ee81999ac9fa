"""The model card of a trained pipeline, from what its folder and its training say."""

import inspect
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

from torch import nn

DATA = """\
10,934 emoji pictures on white, 64×64, in nine Unicode groups and three styles: Noto Emoji (Apache-2.0), Twemoji (CC-BY
4.0; "Twemoji, © Twitter, Inc and other contributors") and Microsoft Fluent Emoji (MIT), from the npm packages
emoji-datasource-google 16.0.0, emoji-datasource-twitter 16.0.0 and @lobehub/fluent-emoji-3d 1.1.0. `zoo/build_data.py`
in stepmask's repository builds them."""


def card(name: str, family: Any, pipe: Any, log: Path) -> str:
    """The text of README.md.

    Args:
        name: As in `zoo/train.py NAME`.
        family: What was trained.
        pipe: The pipeline that came out.
        log: The training's, a JSON object to a line.
    """
    runs = _last_of_each_run(log)
    commands = [
        f"`python zoo/train.py {name} --iterations {run['iteration']}{' --on' * (run != runs[0])}`" for run in runs
    ]
    parts = [
        f"- `{part}`: `{type(module).__name__}`, {sum(weights.numel() for weights in module.parameters()) / 1e6:.2f} M "
        "parameters"
        for part, module in pipe.components.items()
        if isinstance(module, nn.Module)
    ]
    predicted = "v" if family.scheduler.config.prediction_type == "v_prediction" else "ε"
    return f"""\
---
license: apache-2.0
library_name: diffusers
tags: [diffusion, emoji]
---
# {name}-emoji

{inspect.getdoc(type(family))}

A small `{type(pipe).__name__}` in fp16, trained for stepmask so that its whole way can be shown and tested on real
trained weights.

{chr(10).join(parts)}

![samples](samples.png)

## Training

{", then ".join(commands)}: {predicted}-prediction, linear betas of 1000 steps,
min-SNR-5 loss weights, cosine learning rate from {family.rate:g}, averaged weights, batches of {family.batch};
{sum(run["seconds"] for run in runs) / 3600:.1f} hours on one CPU core. `log.jsonl` has the loss.

## Data

{DATA}

## Licence

The weights: Apache-2.0, with the attribution above.
"""


def _last_of_each_run(log: Path) -> list[dict[str, Any]]:
    """The log's last rows before the iterations begin anew, and its last."""
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    ends = [row for row, after in pairwise(rows) if after["iteration"] < row["iteration"]]
    return [*ends, rows[-1]]
