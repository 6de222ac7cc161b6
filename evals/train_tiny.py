"""Train the embedded tiny model: several (seed, learning rate) candidates at once, one is kept.

    python -m sglang_trinv.evals.train_tiny --out DIR [--device cuda|cpu] [--minutes 4]

Writes DIR/model.safetensors (transformers' names, bfloat16), DIR/config.json and
DIR/train_log.json, at every check and at the end, so a run that is cut off leaves the best so far.
Needs torch, numpy and safetensors. ``--steps`` instead of ``--minutes`` repeats a run's schedule.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import sys
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from sglang_trinv.evals.training import data
from sglang_trinv.evals.training.check import check
from sglang_trinv.evals.training.model import Stack

CONFIG = Path(__file__).resolve().parent.parent / "serve" / "tiny_model" / "config.json"
CANDIDATES = "1:1e-3,2:2e-3,3:2e-3,4:3e-3,5:3e-3,6:5e-3"  # seed:learning rate
LANGUAGE_WEIGHT = 0.1
WEIGHT_DECAY, BETAS, CLIP, WARMUP_STEPS = 0.01, (0.9, 0.98), 1.0, 100
AHEAD = 48  # batches made ahead by the workers


class Optimizer:
    """AdamW over the stacked candidates, each with its own learning rate and gradient norm."""

    def __init__(self, stack: Stack, rates: list[float]) -> None:
        self.flat = stack.flat
        self.rates = torch.tensor(rates, device=self.flat.device)[:, None]
        self.m, self.v = torch.zeros_like(self.flat), torch.zeros_like(self.flat)
        decays = [torch.full((math.prod(s),), float(len(s) == 2)) for s in stack.names.values()]
        self.decay = (torch.cat(decays) * WEIGHT_DECAY).to(self.flat.device)
        self.steps = 0

    @torch.no_grad()
    def step(self, done: float) -> torch.Tensor:
        """Apply the gradient; ``done`` (0 to 1) sets the cosine. Returns the gradient norms [E]."""
        self.steps += 1
        grad, (b1, b2) = self.flat.grad, BETAS
        norm = grad.norm(dim=1, keepdim=True)
        grad = torch.nan_to_num(grad * (CLIP / norm.clamp_min(CLIP)))  # one bad step is skipped
        self.m.lerp_(grad, 1 - b1)
        self.v.mul_(b2).addcmul_(grad, grad, value=1 - b2)
        shape = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
        rate = self.rates * (shape * min(1.0, self.steps / WARMUP_STEPS))
        update = (self.m / (1 - b1**self.steps)) / ((self.v / (1 - b2**self.steps)).sqrt() + 1e-8)
        self.flat -= rate * (update + self.decay * self.flat)
        self.flat.grad = None
        return norm[:, 0]


class Run:
    """A training run: its clock, its log and the files it leaves."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.started = args, time.monotonic()
        self.out = Path(args.out)
        self.out.mkdir(parents=True, exist_ok=True)
        self.config = json.loads(Path(args.config).read_text())
        self.seeds, self.rates = candidates(args.candidates)
        self.best = -math.inf
        self.log: dict[str, Any] = {
            "command": ["sglang_trinv.evals.train_tiny", *sys.argv[1:]],
            "python": platform.python_version(), "torch": torch.__version__,
            "device": device_name(args.device), "minutes": args.minutes, "steps": None,
            "tokens_per_step": args.tokens, "data_seed": args.data_seed,
            "candidates": [{"seed": s, "lr": lr, "curve": []} for s, lr in
                           zip(self.seeds, self.rates, strict=True)],
            "chosen": None,
        }  # fmt: skip

    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self.started

    def done(self, step: int) -> float:
        """Share of the run that is over: of the steps if they are given, else of the time."""
        if self.args.steps:
            return step / self.args.steps
        return self.seconds() / (60 * self.args.minutes)

    def judge(self, stack: Stack, step: int, final: bool) -> None:
        """Check every candidate; write the best one if it is the best so far, or the last check."""
        n = self.args.check_docs if final else max(8, self.args.check_docs // 4)
        records = check(stack, n, most_tokens=self.args.check_tokens, long=final)
        for candidate, record in zip(self.log["candidates"], records, strict=True):
            candidate["final" if final else "last_check"] = {"step": step, **record}
        best = max(range(len(records)), key=lambda i: records[i]["score"])
        print(f"{self.seconds():6.1f} s  step {step}  scores "
              + " ".join(f"{r['score']:.3f}" for r in records)
              + f"  best {best}: {brief(records[best])}", flush=True)  # fmt: skip
        self.log["steps"] = step
        if final or records[best]["score"] > self.best:
            self.best = records[best]["score"]
            self.log["chosen"] = {"index": best, "seed": self.seeds[best], "lr": self.rates[best],
                                  "step": step, **records[best]}  # fmt: skip
            temporary = self.out / "model.safetensors.part"
            save_file(stack.export(best), temporary, metadata={"format": "pt"})
            temporary.chmod(0o644)
            os.replace(temporary, self.out / "model.safetensors")
        (self.out / "config.json").write_text(json.dumps(self.config, indent=1) + "\n")
        temporary = self.out / "train_log.json.part"
        temporary.write_text(json.dumps(self.log, indent=1) + "\n")
        os.replace(temporary, self.out / "train_log.json")


def batches(run: Run, pool: ProcessPoolExecutor | None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Endless batches in order, made ahead by ``pool``, or one by one without it."""
    seed, tokens = run.args.data_seed, run.args.tokens
    if pool is None:
        index = 0
        while True:
            yield data.batch(seed, index, min(1.0, run.done(index)), tokens)
            index += 1
    ahead: deque[Future] = deque()
    index = 0
    while True:
        while len(ahead) < AHEAD:
            done = min(1.0, run.done(index))
            ahead.append(pool.submit(data.batch, seed, index, done, tokens))
            index += 1
        yield ahead.popleft().result()


def losses(stack: Stack, x: torch.Tensor, kinds: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and accuracy on answers, each [E]."""
    logits = stack.forward(x)[:, :, :-1]
    target, kind = x[:, 1:], kinds[:, 1:]
    weight = (kind == data.ANSWER) + LANGUAGE_WEIGHT * (kind == data.LANGUAGE)
    E = len(logits)
    each = F.cross_entropy(
        logits.flatten(0, 2), target.expand(E, -1, -1).flatten(), reduction="none"
    ).view(E, *target.shape)
    answers = (kind == data.ANSWER).float()
    right = ((logits.detach().argmax(-1) == target) * answers).sum((1, 2))
    return (each * weight).sum((1, 2)) / weight.sum(), right / answers.sum().clamp_min(1)


def train(run: Run, stack: Stack, pool: ProcessPoolExecutor | None) -> int:
    """Train until the run is over; return the number of steps."""
    optimizer, source = Optimizer(stack, run.rates), batches(run, pool)
    device, step, told, checked = stack.flat.device, 0, run.seconds(), run.seconds()
    while (done := run.done(step)) < 1:
        x, kinds = (torch.from_numpy(a.astype(np.int64)).to(device) for a in next(source))
        loss, accuracy = losses(stack, x, kinds)
        loss.sum().backward()
        norm = optimizer.step(done)
        step += 1
        if step == 1 or run.seconds() - told > run.args.tell_s:
            told = run.seconds()
            print(f"{told:6.1f} s  step {step}  T {x.shape[1]}  loss "
                  + " ".join(f"{v:.3f}" for v in loss.tolist()) + "  answers "
                  + " ".join(f"{v:.3f}" for v in accuracy.tolist()) + "  |g| "
                  + " ".join(f"{v:.1f}" for v in norm.tolist()), flush=True)  # fmt: skip
            values = zip(run.log["candidates"], loss.tolist(), accuracy.tolist(), strict=True)
            for candidate, a, b in values:
                candidate["curve"].append([step, round(told, 1), round(a, 4), round(b, 4)])
        if run.seconds() - checked > run.args.check_s:
            run.judge(stack, step, final=False)
            checked = run.seconds()
    return step


def candidates(text: str) -> tuple[list[int], list[float]]:
    """Seeds and learning rates from ``seed:rate,seed:rate``."""
    pairs = [part.split(":") for part in text.split(",")]
    return [int(seed) for seed, _ in pairs], [float(rate) for _, rate in pairs]


def brief(record: dict[str, Any]) -> str:
    """A record in one line."""
    cells = " ".join(f"{name}={value:.2f}" for name, value in record["accuracy"].items())
    return f"bits {record['bits_per_byte']:.2f} {cells}"


def device_name(device: str) -> str:
    """The GPU's name, or how many threads."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"cpu, {torch.get_num_threads()} threads"


def parser() -> argparse.ArgumentParser:
    """Command line."""
    p = argparse.ArgumentParser(description="Train the embedded tiny model.")
    p.add_argument("--out", required=True, help="folder for weights, config and log")
    p.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    p.add_argument("--minutes", type=float, default=4.0, help="training time; checks come on top")
    p.add_argument("--steps", type=int, help="end after so many steps instead")
    p.add_argument("--config", default=str(CONFIG), help="config.json of the model to train")
    p.add_argument("--candidates", default=CANDIDATES, help="seed:learning rate, by commas")
    p.add_argument("--tokens", type=int, default=16384, help="tokens of a batch")
    p.add_argument("--workers", type=int, default=8, help="processes that make batches; 0: none")
    p.add_argument("--threads", type=int, default=1, help="torch's threads on a CPU")
    p.add_argument("--data-seed", type=int, default=20)
    p.add_argument("--check-docs", type=int, default=256)
    p.add_argument("--check-tokens", type=int, default=32768)
    p.add_argument("--check-s", type=float, default=45.0)
    p.add_argument("--tell-s", type=float, default=8.0)
    return p


def main() -> None:
    """Train, check, write."""
    args = parser().parse_args()
    torch.set_float32_matmul_precision("high")  # TF32 on a GPU
    pool = ProcessPoolExecutor(args.workers) if args.workers else None
    if pool:  # fork every worker before CUDA starts
        list(pool.map(data.batch, [0] * args.workers, range(args.workers),
                      [0.0] * args.workers, [64] * args.workers))  # fmt: skip
    if args.device == "cpu":
        torch.set_num_threads(args.threads)
        torch.set_flush_denormal(True)
    run = Run(args)
    stack = Stack(run.config, run.seeds, args.device)
    print(f"{len(run.seeds)} candidates of {stack.flat.shape[1] / 1e6:.2f} M weights on "
          f"{run.log['device']}", flush=True)  # fmt: skip
    try:
        step = train(run, stack, pool)
    finally:
        if pool:
            pool.shutdown(wait=False, cancel_futures=True)
    run.judge(stack, step, final=True)
    print(f"{run.seconds():6.1f} s  written: {run.out}", flush=True)


if __name__ == "__main__":
    main()
