"""Write the embedded model's weights in another layout, or others in the embedded model's.

    python -m sglang_trinv.serve.tiny_model.make --out DIR [--architecture text|conditional]
        [--weights FILE]

``conditional`` is the layout that SGLang 0.5.16 knows: the same text weights under other names, and
a vision tower that text never runs.
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

EMBEDDED = PATH / "model.safetensors"


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


def vision_weight(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """A bfloat16 weight that depends on ``name`` and ``shape`` alone."""
    if "norm" in name or name.endswith(".bias"):
        fill = torch.ones if name.endswith("norm.weight") else torch.zeros
        return fill(shape, dtype=torch.bfloat16)
    generator = np.random.default_rng(zlib.crc32(name.encode()))
    value = generator.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))
    return torch.from_numpy(value).to(torch.bfloat16)


def conditional_weights(text: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """``text`` under the names of Qwen3_5ForConditionalGeneration, and a vision tower."""
    renamed = {_under_language_model(name): weight for name, weight in text.items()}
    return renamed | {name: vision_weight(name, shape) for name, shape in vision_shapes()}


def write(out: Path, architecture: layout.Architecture = "text", weights: Path = EMBEDDED) -> None:
    """Write a model folder; ``weights`` is a text model's safetensors file.

    Raises:
        ValueError: ``weights`` has other names or shapes than the layout.
    """
    text = load_file(weights)
    wanted = dict(text_shapes())
    odd = sorted(n for n in wanted.keys() | text.keys() if _shape(text, n) != wanted.get(n))
    if odd:
        want, got = wanted.get(odd[0]), _shape(text, odd[0])
        raise ValueError(f"{weights}: {odd[0]}: want {want}, got {got}")
    layout.write(out, architecture)
    made = text if architecture == "text" else conditional_weights(text)
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
    parser.add_argument("--weights", type=Path, default=EMBEDDED, help="text weights")
    args = parser.parse_args()
    write(args.out, args.architecture, args.weights)
    size = (args.out / "model.safetensors").stat().st_size
    print(f"{args.out}: {args.architecture}, {size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
