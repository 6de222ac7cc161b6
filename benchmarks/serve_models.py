"""Models with the shapes of real ones and no weights: SGLang fills them by itself.

Served with ``--load-format dummy``. Time does not depend on the numbers: kernels, shapes and memory
traffic are those of the real model's text part. The tokenizer is the embedded model's.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from sglang_trinv.serve.tiny_model import layout

VOCABULARY = 248320
MAX_TOKENS = 65536
HEAD_DIM = 256
MROPE_SECTION = [11, 11, 10]  # halves of the quarter of 256 dimensions that is rotated


@dataclass(frozen=True)
class Shape:
    """Sizes of a Qwen3.5 text model; three of four layers are Gated DeltaNet."""

    hidden: int
    layers: int
    intermediate: int
    heads: int
    kv_heads: int
    linear_k_heads: int
    linear_v_heads: int


# The model cards of Qwen/Qwen3.5-4B and -9B; 0.8B after THUDM/slime scripts/models/qwen3.5-0.8B.sh
SHAPES = {
    "tiny": Shape(128, 4, 192, 2, 1, 1, 3),  # to try the command on a CPU
    "qwen3.5-0.8b": Shape(1024, 24, 3584, 8, 2, 16, 16),
    "qwen3.5-4b": Shape(2560, 32, 9216, 16, 4, 16, 32),
    "qwen3.5-9b": Shape(4096, 32, 12288, 16, 4, 16, 32),
}


def write(name: str, out: Path) -> Path:
    """Write the files of ``SHAPES[name]`` but the weights into ``out`` and return it."""
    shape = SHAPES[name]
    layout.write(out, "conditional")
    made = layout.config("conditional")
    text = dict(made["text_config"])
    text |= {
        "vocab_size": VOCABULARY,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": HEAD_DIM,
        "max_position_embeddings": MAX_TOKENS,
        "layer_types": [
            "linear_attention" if (i + 1) % layout.INTERVAL else "full_attention"
            for i in range(shape.layers)
        ],
        "linear_num_key_heads": shape.linear_k_heads,
        "linear_num_value_heads": shape.linear_v_heads,
        "rope_parameters": text["rope_parameters"] | {"mrope_section": MROPE_SECTION},
    }
    vision = made["vision_config"] | {"out_hidden_size": shape.hidden}
    made |= {"text_config": text, "vision_config": vision}
    (out / "config.json").write_text(json.dumps(made, indent=1) + "\n")
    return out
