"""Write the embedded model, or the same weights in the layout of SGLang 0.5.16.

    python -m sglang_trinv.serve.tiny_model.make --out DIR [--architecture text|conditional]
        [--weights FILE] [--seed N]

The random weights repeat bit for bit anywhere: they are sums of raw integers of PCG64, scaled, so
no libm and no vectorised generator has a part in them.
"""

from __future__ import annotations

import argparse
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from sglang_trinv.serve.tiny_model import PATH, layout

SEED = 20


def text_shapes() -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every weight of the text model, in transformers' names."""
    D, F = layout.HIDDEN, layout.INTERMEDIATE
    q, kv = layout.HEADS * layout.HEAD_DIM, layout.KV_HEADS * layout.HEAD_DIM
    K, V = layout.K_HEADS * layout.LINEAR_DIM, layout.V_HEADS * layout.LINEAR_DIM
    yield "model.embed_tokens.weight", (layout.VOCAB, D)
    for i, kind in enumerate(layout.TEXT["layer_types"]):
        p = f"model.layers.{i}"
        yield f"{p}.input_layernorm.weight", (D,)
        yield f"{p}.post_attention_layernorm.weight", (D,)
        yield f"{p}.mlp.gate_proj.weight", (F, D)
        yield f"{p}.mlp.up_proj.weight", (F, D)
        yield f"{p}.mlp.down_proj.weight", (D, F)
        if kind == "full_attention":
            yield f"{p}.self_attn.q_proj.weight", (2 * q, D)  # the second half is the output gate
            yield f"{p}.self_attn.k_proj.weight", (kv, D)
            yield f"{p}.self_attn.v_proj.weight", (kv, D)
            yield f"{p}.self_attn.o_proj.weight", (D, q)
            yield f"{p}.self_attn.q_norm.weight", (layout.HEAD_DIM,)
            yield f"{p}.self_attn.k_norm.weight", (layout.HEAD_DIM,)
        else:
            yield f"{p}.linear_attn.in_proj_qkv.weight", (2 * K + V, D)
            yield f"{p}.linear_attn.in_proj_z.weight", (V, D)
            yield f"{p}.linear_attn.in_proj_b.weight", (layout.V_HEADS, D)
            yield f"{p}.linear_attn.in_proj_a.weight", (layout.V_HEADS, D)
            yield f"{p}.linear_attn.conv1d.weight", (2 * K + V, 1, layout.CONV)
            yield f"{p}.linear_attn.out_proj.weight", (D, V)
            yield f"{p}.linear_attn.norm.weight", (layout.LINEAR_DIM,)
            yield f"{p}.linear_attn.A_log", (layout.V_HEADS,)
            yield f"{p}.linear_attn.dt_bias", (layout.V_HEADS,)
    yield "model.norm.weight", (D,)
    yield "lm_head.weight", (layout.VOCAB, D)


def vision_shapes() -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every weight of the one-block vision tower."""
    v = layout.VISION
    D, F, merged = v["hidden_size"], v["intermediate_size"], v["hidden_size"] * 4
    p, block = "model.visual", "model.visual.blocks.0"
    patch = (v["in_channels"], v["temporal_patch_size"], v["patch_size"], v["patch_size"])
    yield f"{p}.pos_embed.weight", (v["num_position_embeddings"], D)
    for name, shape in (
        (f"{p}.patch_embed.proj", (D, *patch)),
        (f"{block}.norm1", (D,)),
        (f"{block}.norm2", (D,)),
        (f"{block}.attn.qkv", (3 * D, D)),
        (f"{block}.attn.proj", (D, D)),
        (f"{block}.mlp.linear_fc1", (F, D)),
        (f"{block}.mlp.linear_fc2", (D, F)),
        (f"{p}.merger.norm", (D,)),
        (f"{p}.merger.linear_fc1", (merged, merged)),
        (f"{p}.merger.linear_fc2", (v["out_hidden_size"], merged)),
    ):
        yield f"{name}.weight", shape
        yield f"{name}.bias", shape[:1]


def random_weight(name: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """A bfloat16 weight that depends on ``name``, ``shape`` and ``seed`` alone."""
    count = int(np.prod(shape))
    raw = np.random.PCG64([seed, zlib.crc32(name.encode())]).random_raw(count)
    words = raw.view(np.uint16).reshape(count, 4).astype(np.int64).sum(axis=1)
    unit = words / 2**17 - 1.0  # four uniforms: close to normal, in [-1, 1), deviation 12**-0.5
    normal = unit * 3.4375
    if name.endswith("A_log"):
        value = -1.5 + 1.5 * unit  # decay rates 0.05 to 1
    elif name.endswith("dt_bias"):
        value = -4.0 + 2.0 * unit  # time steps 0.002 to 0.13: a memory of some hundred tokens
    elif name.endswith("linear_attn.norm.weight") or (".visual." in name and "norm" in name):
        value = np.ones(count) if name.endswith("weight") else np.zeros(count)
    elif name.endswith(("norm.weight", ".bias")):
        value = np.zeros(count)  # transformers adds 1 to the norms of the text model
    elif name.endswith("embed_tokens.weight"):
        value = normal
    elif name.endswith("conv1d.weight"):
        value = normal * 0.5
    elif name.endswith("lm_head.weight"):
        value = normal * 0.25  # logits of deviation 3
    else:
        value = normal / np.sqrt(count // shape[0])
    return torch.from_numpy(value.reshape(shape)).to(torch.float32).to(torch.bfloat16)


def text_weights(seed: int = SEED) -> dict[str, torch.Tensor]:
    """Random weights of the text model."""
    return {name: random_weight(name, shape, seed) for name, shape in text_shapes()}


def conditional_weights(text: dict[str, torch.Tensor], seed: int = SEED) -> dict[str, torch.Tensor]:
    """``text`` under the names of Qwen3_5ForConditionalGeneration, and a vision tower."""
    renamed = {_under_language_model(name): weight for name, weight in text.items()}
    return renamed | {name: random_weight(name, shape, seed) for name, shape in vision_shapes()}


def write(
    out: Path,
    architecture: layout.Architecture = "text",
    weights: Path | None = None,
    seed: int = SEED,
) -> None:
    """Write a model folder; ``weights`` is a text model's safetensors file, default random ones.

    Raises:
        ValueError: ``weights`` has other names or shapes than the layout.
    """
    text = load_file(weights) if weights else text_weights(seed)
    wanted = dict(text_shapes())
    odd = sorted(n for n in wanted.keys() | text.keys() if _shape(text, n) != wanted.get(n))
    if odd:
        want, got = wanted.get(odd[0]), _shape(text, odd[0])
        raise ValueError(f"{weights}: {odd[0]}: want {want}, got {got}")
    layout.write(out, architecture)
    made = text if architecture == "text" else conditional_weights(text, seed)
    save_file(made, out / "model.safetensors", metadata={"format": "pt"})
    (out / "model.safetensors").chmod(0o644)  # safetensors makes it readable by its owner alone


def _under_language_model(name: str) -> str:
    return name.replace("model.", "model.language_model.", 1) if name.startswith("model.") else name


def _shape(weights: dict[str, torch.Tensor], name: str) -> tuple[int, ...] | None:
    return tuple(weights[name].shape) if name in weights else None


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Write the embedded model.")
    parser.add_argument("--out", type=Path, default=PATH, help="folder; default: this package")
    parser.add_argument("--architecture", choices=("text", "conditional"), default="text")
    parser.add_argument("--weights", type=Path, help="text weights to use instead of random ones")
    parser.add_argument("--seed", type=int, default=SEED)
    args = parser.parse_args()
    write(args.out, args.architecture, args.weights, args.seed)
    size = (args.out / "model.safetensors").stat().st_size
    print(f"{args.out}: {args.architecture}, {size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
