"""The model of the tensor parallel test is the embedded one under another cut."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests import doubled
from tests.e2e.client import prompt, reference

transformers = pytest.importorskip("transformers")


def test_it_computes_the_same(tmp_path: Path) -> None:
    folder = doubled.write(tmp_path, "text")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert model.config.linear_num_key_heads == 2
    ids = torch.tensor([prompt(130)])
    with torch.no_grad():
        found, wanted = (m(ids).logits for m in (model, reference()))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
