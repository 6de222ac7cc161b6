"""Every way into SGLang's kernels: the Engine, `sglang serve`, several workers, the benchmark."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sglang_trinv.serve import health, tiny_model
from sglang_trinv.serve.command import CPU_FLAGS, Command, environment
from sglang_trinv.serve.config import ServeConfig, detect_device
from sglang_trinv.serve.health import IMPLEMENTATION
from sglang_trinv.status import read_run_dir
from tests.e2e.client import Client
from tests.e2e.conftest import FLAGS, GPU_FLAGS, clean_environ, started

LAYERS = 3
DEVICE = detect_device()

ENGINE = """
import json, sys
import sglang

if __name__ == "__main__":
    engine = sglang.Engine(**json.loads(sys.argv[1]))
    answer = engine.generate(input_ids=[[101] * 90], sampling_params={"max_new_tokens": 1})
    assert answer[0]["meta_info"]["prompt_tokens"] == 90
    engine.shutdown()
"""

# Another plugin around the same two functions: SGLang's wrapper and the kernel's launcher.
OTHER = """
import os

def register():
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    def around(original, runner, full_attn_backend):
        print("other plugin: wrapper", flush=True)
        return original(runner, full_attn_backend)

    def launcher(original, *args, **kwargs):
        print("other plugin: kernel", flush=True)
        return original(*args, **kwargs)

    HookRegistry.register(os.environ["OTHER_WRAPPER"], around, HookType.AROUND)
    HookRegistry.register(os.environ["OTHER_KERNEL"], launcher, HookType.AROUND)
"""


def flags() -> list[str]:
    """SGLang's flags for the embedded model on this machine."""
    cpu = [x for pair in CPU_FLAGS.items() for x in pair if x is not None]
    return [*(cpu if DEVICE == "cpu" else GPU_FLAGS), *FLAGS]


def keywords() -> dict[str, Any]:
    """The same as arguments of ``Engine``."""
    given, found = flags(), {}
    for i, flag in enumerate(given):
        if flag.startswith("--"):
            value: Any = given[i + 1] if i + 1 < len(given) else ""
            value = True if not value or value.startswith("--") else value
            if value is not True and value.replace(".", "").isdigit():
                value = float(value) if "." in value else int(value)
            found[flag[2:].replace("-", "_")] = value
    return {"model_path": str(tiny_model.PATH), **found}


def environ(run_dir: Path, **more: str) -> dict[str, str]:
    config = ServeConfig(device=DEVICE)
    base = clean_environ(run_dir / "caches") | {"SGLANG_TRINV_STRICT": "1"}
    return environment(config, run_dir, base) | more


def run(run_dir: Path, *command: str, **more: str) -> str:
    """Output of a Python program that succeeds."""
    done = subprocess.run(
        [sys.executable, *command],
        env=environ(run_dir, **more),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def calls(run_dir: Path, role: str) -> list[int]:
    """Calls that our kernel answered, for each process of that role with the hook in place."""
    found = [s for s in read_run_dir(run_dir) if s["role"] == role and s["state"] == "installed"]
    assert all(hook["live"] for status in found for hook in status["hooks"])
    return [health.calls([status], IMPLEMENTATION[DEVICE]) for status in found]


def test_engine_beside_another_plugin_on_the_same_functions(tmp_path: Path) -> None:
    """`sglang.Engine` in a Python program; the other plugin's hooks run as well as ours."""
    import sglang

    from sglang_trinv import targets

    site = tmp_path / "site"
    info = site / "other_plugin-1.0.dist-info"
    info.mkdir(parents=True)
    (site / "other_plugin.py").write_text(OTHER)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: other-plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[sglang.srt.plugins]\nother = other_plugin:register\n")
    program = tmp_path / "program.py"
    program.write_text(ENGINE)
    run_dir = tmp_path / "run"
    out = run(
        run_dir,
        str(program),
        json.dumps(keywords()),
        SGLANG_TRINV_CHECK="1",
        PYTHONPATH=os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")]).rstrip(":"),
        OTHER_WRAPPER=targets.ATTENTION_WRAPPER,
        OTHER_KERNEL=targets.find(sglang.__version__).dotted,
    )
    assert calls(run_dir, "scheduler") == [LAYERS]
    assert out.count("other plugin: wrapper") == 1
    # Ours is set last and answers; what it replaced, the other one, is asked by the checks.
    assert "other plugin: kernel" in out


def test_bench_one_batch_loads_the_plugin(tmp_path: Path) -> None:
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("The quick brown fox jumps over the lazy dog and runs away from it.")
    run_dir = tmp_path / "run"
    arguments = ["--model-path", str(tiny_model.PATH), *flags(), "--correctness-test"]
    arguments += ["--prompt-filename", str(prompt), "--cut-len", "4", "--output-len", "2"]
    out = run(run_dir, "-m", "sglang_trinv", "bench-one-batch", "--", *arguments)
    assert "========== Prompt 0 ==========" in out
    assert calls(run_dir, "main") == [2 * LAYERS]  # the first part of the prompt, then the rest


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="two ranks need two cores")
def test_sglang_serve_with_two_tokenizers_and_two_ranks(make_server, tmp_path: Path) -> None:
    """`sglang serve`; each scheduler installs by itself, the tokenizer workers need nothing."""
    bind = {"SGLANG_CPU_OMP_THREADS_BIND": "0|1"} if DEVICE == "cpu" else {}
    ranks = ("--tokenizer-worker-num", "2", *(("--dp-size", "2") if DEVICE == "cpu" else ()))
    server = make_server("ranks", flags=FLAGS + ranks, SGLANG_TRINV_STRICT="1")
    server.command.env.update(bind)
    argv = list(server.command.argv)
    assert argv[1:3] == ["-m", "sglang.launch_server"]
    argv[:3] = [str(Path(sys.executable).with_name("sglang")), "serve"]
    server.command = Command(tuple(argv), server.command.env)
    started(server)
    client, wanted = Client(server), 2 if DEVICE == "cpu" else 1
    for seed in range(4):  # the ranks take turns
        client.generate([97 + seed] * 70)
    client.calls()
    found = calls(server.run_dir, "scheduler")
    assert len(found) == wanted
    assert all(found)
    assert sum(found) >= 4 * LAYERS
    server.stop()
