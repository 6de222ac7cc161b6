"""``doctor --gpu``: the start-up self-check on the layer shapes of the models that people serve.

    python -m sglang_trinv.serve.gpu_check

Prints one JSON line a shape: what ``selfcheck.run`` returns, or ``{"shape": ..., "error": ...}``.
A process of its own, since it imports SGLang and a kernel may end it.
"""

from __future__ import annotations

import json
import sys

import torch

from sglang_trinv import selfcheck, targets
from sglang_trinv.config import Config
from sglang_trinv.warmup import Shape

# Key and value heads of one GPU: Qwen3.5 0.8B, 4B to 35B-A3B and Qwen3-Next, 27B, 122B and 397B
HEADS = ((16, 16), (16, 32), (16, 48), (16, 64))
HEAD_DIM = 128


def main() -> int:
    """Check every shape on this GPU, one on a CPU; exit code 1 if one fails."""
    import sglang

    device = "cuda" if torch.cuda.is_available() else "cpu"
    target = targets.find(sglang.__version__)
    stock, _ = targets.resolve(target)
    failed = False
    for Hg, H in HEADS if device == "cuda" else HEADS[:1]:
        shape = Shape(Hg, H, HEAD_DIM, HEAD_DIM, torch.bfloat16, device)
        try:
            found = selfcheck.run(target.adapter, shape, Config.from_env().method, stock)
        except Exception as error:
            failed = True
            reason = str(error).strip().splitlines() or [""]
            found = {"shape": str(shape), "error": f"{type(error).__name__}: {reason[0]}"}
        print(json.dumps(found), flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
