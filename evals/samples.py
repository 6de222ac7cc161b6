"""lm-eval's sample logs as one short record a document, and pairs of them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sglang_trinv.evals.errors import EvalError

ACCURACIES = ("acc", "exact_match")
FILTERS = ("none", "flexible-extract")  # one metric a document: the first of these that there is


@dataclass(frozen=True)
class Document:
    """What a server said to one document of a task.

    ``correct`` is None for tasks without right answers, ``loglikelihood`` (nats, of all ``tokens``
    of the answer) for generation.
    """

    task: str
    number: int
    digest: str
    correct: bool | None
    loglikelihood: float | None
    tokens: int
    text: str  # the probe asks it again
    generated: str | None = None

    @property
    def per_token(self) -> float:
        """Log-likelihood per token of the answer."""
        assert self.loglikelihood is not None
        return self.loglikelihood / max(1, self.tokens)


def from_lm_eval(folder: Path, count_tokens: Callable[[str], int]) -> list[Document]:
    """Records of every ``samples_TASK_TIME.jsonl`` below ``folder``.

    Raises:
        EvalError: no sample was logged.
    """
    found: list[Document] = []
    for path in sorted(folder.rglob("samples_*.jsonl")):
        task = path.name.removeprefix("samples_").rsplit("_", 1)[0]
        samples = [json.loads(line) for line in path.read_text().splitlines()]
        kept = next((f for f in FILTERS if any(s["filter"] == f for s in samples)), None)
        found += [
            document(task, sample, count_tokens)
            for sample in samples
            if kept is None or sample["filter"] == kept
        ]
    if not found:
        raise EvalError(f"lm-eval logged no sample in {folder}")
    return found


def document(task: str, sample: dict[str, Any], count_tokens: Callable[[str], int]) -> Document:
    """One record from one line of lm-eval's log."""
    arguments = list(sample["arguments"].values())
    answers = sample["filtered_resps"]
    choice = 0
    if len(arguments) > 1:  # multiple choice: the right one's log-likelihood
        choice = int(sample["target"]) if str(sample["target"]).isdigit() else 0
    parts = arguments[choice]
    context = str(parts["arg_0"])
    generated = isinstance(parts.get("arg_1"), dict)
    loglikelihood, tokens, text = None, 0, context
    if not generated:
        answer = answers[choice]
        loglikelihood = float(answer[0] if isinstance(answer, list) else answer)
        continuation = str(parts.get("arg_1", ""))
        text = context + continuation
        tokens = count_tokens(text) - (count_tokens(context) if continuation and context else 0)
    return Document(
        task=task,
        number=int(sample["doc_id"]),
        digest=" ".join(sample[f"{part}_hash"] for part in ("doc", "prompt", "target")),
        correct=correct(sample),
        loglikelihood=loglikelihood,
        tokens=tokens,
        text=text,
        generated=str(answers[0]) if generated else None,
    )


def correct(sample: dict[str, Any]) -> bool | None:
    """Whether the answer was right, if the task says so."""
    for name in ACCURACIES:
        if name in sample:
            return float(sample[name]) >= 1
    lengths = [float(sample[m]) for m in sample["metrics"] if str(m).isdigit()]  # RULER: by length
    known = [value for value in lengths if value >= 0]
    return known[0] >= 1 if known else None


def save(path: Path, documents: Iterable[Document]) -> None:
    """Write records, one JSON a line."""
    path.write_text("".join(json.dumps(asdict(d)) + "\n" for d in documents))


def load(path: Path) -> list[Document]:
    """Read what ``save`` wrote.

    Raises:
        EvalError: the file is missing or damaged.
    """
    try:
        return [Document(**json.loads(line)) for line in path.read_text().splitlines()]
    except (OSError, ValueError, TypeError) as error:
        raise EvalError(f"{path} cannot be read: {error}") from None


def pair(off: list[Document], on: list[Document]) -> list[tuple[Document, Document]]:
    """The same documents from two servers, sorted by task and number.

    Raises:
        EvalError: a document is missing on one side, or its text is another one; or a
            log-likelihood is not finite.
    """
    one, two = ({(d.task, d.number): d for d in side} for side in (off, on))
    if odd := sorted(one.keys() ^ two.keys()):
        raise EvalError(f"{len(odd)} documents are in one run alone, first {odd[0]}")
    pairs = [(one[key], two[key]) for key in sorted(one)]
    for a, b in pairs:
        if a.digest != b.digest:
            raise EvalError(f"document {a.number} of {a.task} is another one in the other run")
        for d in (a, b):
            if d.loglikelihood is not None and not math.isfinite(d.loglikelihood):
                raise EvalError(
                    f"document {d.number} of {d.task}: log-likelihood {d.loglikelihood}"
                )
    return pairs
