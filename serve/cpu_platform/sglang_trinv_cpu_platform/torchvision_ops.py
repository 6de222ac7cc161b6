"""Let torchvision's Python code be imported beside a torch that its binary was not built for.

The usual torchvision wheel is built for CUDA. Beside a CPU build of torch its library does not
load, ``torchvision::nms`` and ``torchvision::qnms`` do not exist, and ``import torchvision`` fails
while it registers their fake kernels. ``import sglang`` and parts of transformers import it.

This module is named in a .pth file, so it must stay cheap: only the standard library at import, and
torch only once somebody asks for torchvision. A platform's ``activate()`` comes too late: SGLang
imports torchvision a few lines before it resolves its platform.
"""

from __future__ import annotations

import sys
from importlib.machinery import PathFinder

# torchvision/_meta_registrations.py registers fakes of both without looking whether they exist.
OPS = ("nms", "qnms")
SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


class _BeforeTorchvision:
    """Meta path finder that acts once, at the first look-up of torchvision, and finds nothing."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        """Declare the missing operators when ``name`` is torchvision."""
        if name == "torchvision":
            sys.meta_path.remove(self)
            declare()


def declare_on_import() -> None:
    """Arrange that the operators exist before torchvision's own code runs. Idempotent."""
    waiting = any(isinstance(finder, _BeforeTorchvision) for finder in sys.meta_path)
    if not waiting and "torchvision" not in sys.modules:  # site runs a .pth file twice in a venv
        sys.meta_path.insert(0, _BeforeTorchvision())


def declare() -> bool:
    """Declare the operators without a kernel, unless torchvision's own library loads.

    Returns:
        declared (bool): False if torchvision is absent or brings working operators.
    """
    spec = PathFinder.find_spec("torchvision")
    if spec is None or not spec.submodule_search_locations or _keep:
        return False
    from pathlib import Path

    import torch

    for library in Path(spec.submodule_search_locations[0]).glob("_C*.so"):
        try:
            torch.ops.load_library(library)
        except OSError:
            continue  # built for another torch: the case this module is for
        return False
    namespace = torch.library.Library("torchvision", "FRAGMENT")
    for op in OPS:
        namespace.define(op + SCHEMA)
    _keep.append(namespace)
    return True


_keep: list[object] = []  # a torch Library takes its operators back when it is collected
