"""The embedded model: made again bit for bit, and loadable in both layouts."""

from __future__ import annotations

import hashlib
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from sglang_trinv.serve import tiny_model
from sglang_trinv.serve.tiny_model import layout, make

pytestmark = pytest.mark.filterwarnings("ignore")


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize(
    "name",
    ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"],
)
def test_configuration_and_tokenizer_are_what_the_script_writes(tmp_path, name):
    layout.write(tmp_path, "text")
    assert digest(tmp_path / name) == digest(tiny_model.PATH / name)


def test_writing_the_embedded_weights_changes_no_byte(tmp_path):
    make.write(tmp_path)
    assert digest(tmp_path / "model.safetensors") == digest(make.EMBEDDED)


def test_small_enough_to_commit():
    assert (tiny_model.PATH / "model.safetensors").stat().st_size < 2_000_000


def test_shape_of_the_linear_layers():
    config = json.loads((tiny_model.PATH / "config.json").read_text())
    assert config["layer_types"] == ["linear_attention"] * 3 + ["full_attention"]
    assert config["linear_key_head_dim"] == config["linear_value_head_dim"] == 128
    assert config["linear_num_value_heads"] == 3 * config["linear_num_key_heads"]


def test_a_token_is_a_byte():
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model.PATH)
    text = "Héllo,\n\tworld! 你好 \x00\x7f"
    assert tokenizer(text).input_ids == list(text.encode())
    assert tokenizer.decode(list(text.encode())) == text
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, tokenize=False
    )
    assert chat == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer("<|im_end|>").input_ids == [tokenizer.eos_token_id]


def test_both_layouts_hold_the_same_model(tmp_path):
    from transformers import AutoModelForCausalLM, AutoProcessor, Qwen3_5ForConditionalGeneration

    make.write(tmp_path, "conditional")
    text, of_text = AutoModelForCausalLM.from_pretrained(
        tiny_model.PATH, dtype=torch.float32, output_loading_info=True
    )
    both, of_both = Qwen3_5ForConditionalGeneration.from_pretrained(
        tmp_path, dtype=torch.float32, output_loading_info=True
    )
    for info in (of_text, of_both):
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids = torch.tensor([list(b"the same weights under two names")])
    with torch.no_grad():
        assert torch.equal(text(ids).logits, both(ids).logits)
    AutoProcessor.from_pretrained(tmp_path)


@pytest.mark.parametrize("change", ["missing", "extra", "shape"])
def test_weights_of_another_layout_are_refused(tmp_path, change):
    weights = load_file(tiny_model.PATH / "model.safetensors")
    if change == "missing":
        del weights["lm_head.weight"]
    elif change == "extra":
        weights["lm_head.bias"] = torch.zeros(1)
    else:
        weights["lm_head.weight"] = torch.zeros(1, 1)
    save_file(weights, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"lm_head\."):
        make.write(tmp_path / "out", weights=tmp_path / "other.safetensors")
    assert not (tmp_path / "out").exists()
