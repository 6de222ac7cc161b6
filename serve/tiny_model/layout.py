"""Everything of the embedded model but its weights: configuration, tokenizer, names and shapes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

Architecture = Literal["text", "conditional"]

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>",
           "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")  # fmt: skip
TOKEN_ID = {token: 256 + i for i, token in enumerate(SPECIAL)}
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

VOCAB, HIDDEN, INTERMEDIATE, LAYERS, INTERVAL = 320, 128, 192, 4, 4
HEADS, KV_HEADS, HEAD_DIM = 2, 1, 64
# 128 keeps FlashInfer eligible on a GPU; 1 key head to 3 value heads is the ratio of Qwen3.5-27B.
K_HEADS, V_HEADS, LINEAR_DIM, CONV = 1, 3, 128, 4
MAX_LENGTH = 32768

TEXT: dict[str, Any] = {
    "model_type": "qwen3_5_text",
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": MAX_LENGTH,
    "attention_bias": False,
    "attn_output_gate": True,
    "full_attention_interval": INTERVAL,  # SGLang reads this, transformers layer_types
    "layer_types": [
        "linear_attention" if (i + 1) % INTERVAL else "full_attention" for i in range(LAYERS)
    ],
    "linear_conv_kernel_dim": CONV,
    "linear_key_head_dim": LINEAR_DIM,
    "linear_value_head_dim": LINEAR_DIM,
    "linear_num_key_heads": K_HEADS,
    "linear_num_value_heads": V_HEADS,
    "mamba_ssm_dtype": "float32",
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
    "bos_token_id": None,
    "eos_token_id": TOKEN_ID["<|im_end|>"],
    "pad_token_id": TOKEN_ID["<|endoftext|>"],
    "partial_rotary_factor": 0.25,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10_000_000,
        "partial_rotary_factor": 0.25,
        "mrope_interleaved": True,
        "mrope_section": [3, 3, 2],  # halves of the 16 rotated dimensions; text uses them alike
    },
}
# One block that a text request never runs: the conditional class cannot be built without a tower.
VISION: dict[str, Any] = {
    "model_type": "qwen3_5",
    "depth": 1,
    "hidden_size": 32,
    "hidden_act": "gelu_pytorch_tanh",
    "intermediate_size": 64,
    "num_heads": 2,
    "in_channels": 3,
    "patch_size": 16,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "out_hidden_size": HIDDEN,
    "num_position_embeddings": 64,
    "deepstack_visual_indexes": [],
}
_IMAGES: dict[str, Any] = {
    "size": {"longest_edge": 16777216, "shortest_edge": 65536},
    "patch_size": VISION["patch_size"],
    "temporal_patch_size": VISION["temporal_patch_size"],
    "merge_size": VISION["spatial_merge_size"],
    "image_mean": [0.5] * 3,
    "image_std": [0.5] * 3,
    "processor_class": "Qwen3VLProcessor",
}


def config(architecture: Architecture) -> dict[str, Any]:
    """``config.json``; "conditional" is the one class that SGLang 0.5.16 knows."""
    if architecture == "text":
        return {"architectures": ["Qwen3_5ForCausalLM"], **TEXT}
    return {
        "architectures": ["Qwen3_5ForConditionalGeneration"],
        "model_type": "qwen3_5",
        "dtype": "bfloat16",
        "tie_word_embeddings": False,
        "image_token_id": TOKEN_ID["<|image_pad|>"],
        "video_token_id": TOKEN_ID["<|video_pad|>"],
        "vision_start_token_id": TOKEN_ID["<|vision_start|>"],
        "vision_end_token_id": TOKEN_ID["<|vision_end|>"],
        "text_config": TEXT,
        "vision_config": VISION,
    }


def write(out: Path, architecture: Architecture) -> None:
    """Write every file but the weights into ``out``."""
    out.mkdir(parents=True, exist_ok=True)
    tokenizer().save(str(out / "tokenizer.json"))
    _json(out / "config.json", config(architecture))
    names = {} if architecture == "text" else _VISION_TOKENS
    _json(out / "tokenizer_config.json", {**_TOKENIZER_CONFIG, **names})
    ends = [TOKEN_ID["<|im_end|>"], TOKEN_ID["<|endoftext|>"]]
    pad = TOKEN_ID["<|endoftext|>"]
    _json(out / "generation_config.json", {"eos_token_id": ends, "pad_token_id": pad})
    if architecture == "conditional":
        image = {**_IMAGES, "image_processor_type": "Qwen2VLImageProcessorFast"}
        video = {**_IMAGES, "video_processor_type": "Qwen3VLVideoProcessor"}
        _json(out / "preprocessor_config.json", image)
        _json(out / "video_preprocessor_config.json", video)
        (out / "chat_template.jinja").write_text(
            CHAT_TEMPLATE
        )  # the processor reads no other place


def tokenizer() -> Tokenizer:
    """One token a byte, its id the byte's value; the special tokens follow."""
    vocab = {character: byte for byte, character in _byte_characters().items()}
    made = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    return made


_TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": None,
    "eos_token": "<|im_end|>",
    "pad_token": "<|endoftext|>",
    "model_max_length": MAX_LENGTH,
    "clean_up_tokenization_spaces": False,
    "chat_template": CHAT_TEMPLATE,
}
_VISION_TOKENS = {
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "vision_bos_token": "<|vision_start|>",
    "vision_eos_token": "<|vision_end|>",
}


def _byte_characters() -> dict[int, str]:
    """GPT-2's printable character for every byte: itself, or the next one from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {
        byte: chr(byte) if byte in printable else chr(256 + others.index(byte))
        for byte in range(256)
    }


def _json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n")
