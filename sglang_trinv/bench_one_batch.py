"""SGLang's bench_one_batch with plugins: by itself it builds a model runner and loads none.

    python -m sglang_trinv.bench_one_batch --model-path MODEL --batch-size 1 --input-len 4096 ...

The arguments are SGLang's. A release without a plugin system is patched and needs no more.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import runpy
import sys

MODULES = ("sglang.benchmark.one_batch", "sglang.bench_one_batch")  # newer releases, older ones


def main(arguments: list[str]) -> None:
    """Load SGLang's plugins, then run its program in this process.

    Raises:
        TargetMissing: this SGLang has no such program.
    """
    from sglang_trinv.errors import TargetMissing

    module = next((name for name in MODULES if _exists(name)), None)
    if module is None:
        raise TargetMissing(f"SGLang has none of the modules {', '.join(MODULES)}")
    if _exists("sglang.srt.plugins"):
        from sglang.srt.plugins import load_plugins

        load_plugins()
    # The ranks of --tp inherit the hooks; newer Pythons would start them afresh.
    multiprocessing.set_start_method("fork", force=True)
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _exists(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


if __name__ == "__main__":
    main(sys.argv[1:])
