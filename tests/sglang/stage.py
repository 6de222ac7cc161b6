"""The real attention wrapper of a release, run with everything that needs a GPU replaced.

Real, taken out of the release's files: ``attn_backend_wrapper``, ``linear/utils.py``, the function
by which SGLang itself chooses FlashInfer, ``GDNKernelDispatcher``, and how flags are overridden.
Fake: kernels, configs, the state pool, and an SM100 GPU with CUDA 13, on which every release that
ever chooses FlashInfer by itself does so.
"""

from __future__ import annotations
import __future__

import ast
import importlib.abc
import importlib.machinery
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

from sglang_trinv import targets
from sglang_trinv.compat import syntax

LINEAR = "sglang.srt.layers.attention.linear"
CONTEXT = "sglang.srt.runtime_context"
GDN = SimpleNamespace(
    linear_key_head_dim=128,
    linear_value_head_dim=128,
    linear_num_key_heads=16,
    linear_num_value_heads=32,  # the pool below holds 4: a tensor parallel size of 8
    full_attention_layer_ids=[3],
)


class Anything(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finder of last resort: any module of SGLang, with a new class under any name asked for."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name.startswith("sglang."):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def exec_module(self, module: ModuleType) -> None:
        module.__getattr__ = lambda name: _new_class(module, name)


def _new_class(module: ModuleType, name: str) -> type:
    if name.startswith("__"):
        raise AttributeError(name)
    made = type(name, (), {})
    setattr(module, name, made)
    return made


def extract(sources: Path, file: str, names: tuple[str, ...], scope: dict[str, Any]) -> None:
    """Run the definitions ``names`` of ``file`` in ``scope``; "Class: a, b" keeps those methods."""
    tree = ast.parse((sources / file).read_text())
    body = []
    for name in names:
        first, _, kept = name.partition(": ")
        node = syntax.definition(tree, first)
        if kept:
            assert isinstance(node, ast.ClassDef)
            node.bases, node.decorator_list = [], []
            wanted = kept.split(", ")
            node.body = [item for item in node.body if getattr(item, "name", None) in wanted]
            assert len(node.body) == len(wanted), f"{file}: {name}"
        body.append(node)
    flags = __future__.annotations.compiler_flag
    code = compile(ast.Module(body, []), str(sources / file), "exec", flags, dont_inherit=True)
    exec(code, scope)


class Stage:
    """One release with the flags of one command line."""

    def __init__(self, sources: Path, target: targets.Target, **flags: Any) -> None:
        self.sources, self.target = sources, target
        self.flags = {
            "linear_attn_backend": "triton",
            "linear_attn_decode_backend": None,
            "linear_attn_prefill_backend": None,
            "linear_attn_verify_backend": None,
            **flags,
        }
        self.log: list[str] = []
        self.runner = self._runner()
        self._modules()
        self.wrapper = self._wrapper()

    def build(self) -> Any:
        """What the server does: build the backend of the runner."""
        return self.wrapper(self.runner, "full attention")

    def _runner(self) -> SimpleNamespace:
        pool = SimpleNamespace(
            mamba_cache=SimpleNamespace(temporal=torch.zeros(3, 2, 4, 128, 128).bfloat16())
        )
        nothing = dict.fromkeys(("mamba2_config", "kimi_linear_config", "hybrid_lightning_config"))
        return SimpleNamespace(
            **nothing,
            hybrid_gdn_config=GDN,
            mambaish_config=GDN,
            model_config=SimpleNamespace(hf_config=object(), hf_text_config=object()),
            req_to_token_pool=SimpleNamespace(mamba_pool=pool),
            server_args=self._server_args(),
            use_mla_backend=False,
            is_draft_worker=False,
        )

    def _server_args(self) -> Any:
        values = {
            **self.flags,
            "attention_backend": "triton",
            "chunked_prefill_size": 8192,
            "enable_dynamic_chunking": False,
            "enable_page_major_kv_layout": False,
            "uses_mamba_radix_cache": False,
        }
        if self.target.prefill_flag != "server_args":
            return SimpleNamespace(**values)
        scope: dict[str, Any] = {}
        methods = ("ServerArgs: override, __setattr__",)
        extract(self.sources, "sglang/srt/server_args.py", methods, scope)
        made = scope["ServerArgs"]()
        vars(made).update(values, _declarations_materialized=True)
        return made

    def _modules(self) -> None:
        configs = str(self.sources / "sglang/srt/configs")
        self._fill("sglang.srt.configs", __path__=[configs])
        loose = SimpleNamespace(SGLANG_STRICT_CONFIG_MUTATION=SimpleNamespace(get=bool))
        self._fill("sglang.srt.environ", envs=loose)
        self._fill("sglang.srt.arg_groups.arg_utils", resolvable_fields=lambda _: set())
        self._fill("sglang.srt.configs.model_config", is_minimax_sparse=lambda _: False)
        self._fill("sglang.srt.layers.attention.qsa.config", is_qwen_qsa=lambda _: False)
        no = dict.fromkeys(("is_blackwell", "is_npu", "is_xpu", "is_sm120_supported"), bool)
        self._fill("sglang.srt.utils", **no)
        self._fill("sglang.srt.utils.common", rank0_log=self.log.append)
        self._context()
        self._gdn_backend()

    def _context(self) -> None:
        scope: dict[str, Any] = {"_ROLE_NS_MODE": "off"}
        if self.target.prefill_flag == "context":
            scope["contextmanager"] = __import__("contextlib").contextmanager
            names = ("_ConfigBag", "RuntimeContext: config_bag, override")
            extract(self.sources, "sglang/srt/runtime_context.py", names, scope)
            mamba, exec_ = scope["_ConfigBag"]("exec.mamba"), scope["_ConfigBag"]("exec")
            for name, value in self.flags.items():
                mamba._set(name, value)
            exec_._set_sub("mamba", mamba)
            off = SimpleNamespace(enable_deterministic_inference=False)
            exec_._set_sub("deterministic", off)
            self.context = scope["RuntimeContext"]()
            vars(self.context).update(
                _config_bags={"exec": exec_}, _overrides_log=[], _server_args=None
            )
            where = dict.fromkeys(self.flags, "exec.mamba")
            self._fill("sglang.srt.arg_groups.arg_utils", namespace_of=lambda _: where)
        else:
            # 0.5.17 records its own choice here too; nothing reads it back.
            self.context = SimpleNamespace(override=lambda source, **fields: None)
        schedule = SimpleNamespace(enable_dynamic_chunking=False, chunked_prefill_size=8192)
        memory = SimpleNamespace(enable_page_major_kv_layout=False)
        self.readers = {
            "get_context": lambda: self.context,
            "get_exec": lambda: self.context.config_bag("exec"),
            "get_schedule": lambda: schedule,
            "get_memory": lambda: memory,
        }
        self._fill(CONTEXT, **self.readers)

    def _gdn_backend(self) -> None:
        self._fill(
            f"{LINEAR}.kernels.gdn_flashinfer",
            FlashInferGDNKernel=type("FlashInferGDNKernel", (), {"supports_target_verify": False}),
            is_flashinfer_gdn_prefill_available=lambda: True,
        )
        self._fill(
            f"{LINEAR}.kernels.gdn_cutedsl",
            CuteDSLGDNKernel=type("CuteDSLGDNKernel", (), {"supports_prefill": True}),
        )
        cuda = SimpleNamespace(get_device_capability=lambda: (10, 0))
        scope = {
            **self.readers,
            "torch": SimpleNamespace(
                cuda=cuda,
                version=SimpleNamespace(cuda="13.0"),
                bfloat16=torch.bfloat16,
                float32=torch.float32,
            ),
            "TritonGDNKernel": type("TritonGDNKernel", (), {}),
            "hybrid_gdn_config": lambda _: GDN,
            "is_cuda": lambda: True,
            "is_xpu": lambda: False,
            "rank0_log": self.log.append,
        }
        names = ("GDNKernelDispatcher", *filter(None, (self.target.prefill_default,)))
        extract(self.sources, "sglang/srt/layers/attention/linear/gdn_backend.py", names, scope)
        module = self._fill(f"{LINEAR}.gdn_backend", **{n: scope[n] for n in names})

        class GDNAttnBackend:
            def __init__(self, runner: Any) -> None:
                if hasattr(runner, "linear_attn_backends"):
                    chosen = runner.linear_attn_backends
                    parts = (chosen.decode, chosen.prefill, chosen.verify)
                else:
                    utils = importlib.import_module(f"{LINEAR}.utils")
                    parts = (
                        utils.get_linear_attn_decode_backend(),
                        utils.get_linear_attn_prefill_backend(),
                    )
                self.kernel_dispatcher = module.GDNKernelDispatcher(*parts)

        class HybridLinearAttnBackend:
            def __init__(self, full: Any, linear: Any, layers: list[int]) -> None:
                self.linear_attn_backend = linear

        module.GDNAttnBackend = GDNAttnBackend
        self._fill(
            "sglang.srt.layers.attention.hybrid_linear_attn_backend",
            HybridLinearAttnBackend=HybridLinearAttnBackend,
        )

    def _wrapper(self) -> Callable[..., Any]:
        scope: dict[str, Any] = {
            **self.readers,
            "logger": logging.getLogger("stage"),
            "hybrid_gdn_config": lambda _: GDN,
            "mambaish_config": lambda _: GDN,
            "_is_npu": False,
        }
        names = ("attn_backend_wrapper",)
        extract(self.sources, "sglang/srt/layers/attention/attention_registry.py", names, scope)
        return scope["attn_backend_wrapper"]

    @staticmethod
    def _fill(name: str, **attributes: Any) -> ModuleType:
        if name not in sys.modules:
            module = ModuleType(name)
            module.__path__ = []
            module.__getattr__ = lambda attribute: _new_class(module, attribute)
            sys.modules[name] = module
        vars(sys.modules[name]).update(attributes)
        return sys.modules[name]
