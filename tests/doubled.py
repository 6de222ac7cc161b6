"""The embedded model with every linear attention head twice: the same function, cut by two ranks.

The copies of a head answer alike, and each counts for half in the output projection.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from sglang_trinv.serve.tiny_model import layout, make

K, V = (heads * layout.LINEAR_DIM for heads in (layout.K_HEADS, layout.V_HEADS))


def write(out: Path, architecture: layout.Architecture = "conditional") -> Path:
    """Write the model folder and return it."""
    text = {name: doubled(name, x) for name, x in load_file(make.EMBEDDED).items()}
    layout.write(out, architecture)
    made = text if architecture == "text" else make.conditional_weights(text)
    save_file(made, out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((out / "config.json").read_text())
    part = config if architecture == "text" else config["text_config"]
    part["linear_num_key_heads"] = 2 * layout.K_HEADS
    part["linear_num_value_heads"] = 2 * layout.V_HEADS
    (out / "config.json").write_text(json.dumps(config, indent=1))
    return out


def doubled(name: str, x: torch.Tensor) -> torch.Tensor:
    """The weight called ``name``, its heads twice."""
    last = name.rpartition("linear_attn.")[2]
    if last in ("in_proj_qkv.weight", "conv1d.weight"):
        return torch.cat([y for part in x.split([K, K, V]) for y in (part, part)])
    if last in ("in_proj_z.weight", "in_proj_b.weight", "in_proj_a.weight", "A_log", "dt_bias"):
        return torch.cat([x, x])
    return torch.cat([x / 2, x / 2], 1) if last == "out_proj.weight" else x
