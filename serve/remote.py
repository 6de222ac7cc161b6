"""Ask a server for its ``/trinv/status``."""

from __future__ import annotations

import json
import urllib.error
import urllib.parse
import urllib.request
from typing import Any

from sglang_trinv.serve.config import ServeError

PATH = "/trinv/status"
TIMEOUT_S = 30.0
ABSENT = (
    "the server has no /trinv/status: the plugin is not loaded in the process that answers "
    "(not installed there, SGLANG_TRINV=0, --tokenizer-worker-num above 1, or an SGLang before "
    "0.5.11)"
)


def status(url: str, api_key: str | None = None, timeout_s: float = TIMEOUT_S) -> dict[str, Any]:
    """What the server at ``url`` (http://host:port) reports; see ``routes.ServerStatus``.

    Raises:
        ServeError: the url is none, nothing answers, it wants a key, or it has no such route.
    """
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise ServeError(f"--url: want http://HOST:PORT, got {url!r}")
    request = urllib.request.Request(url.rstrip("/") + PATH)
    if api_key:
        request.add_header("Authorization", f"Bearer {api_key}")
    try:
        with urllib.request.urlopen(request, timeout=timeout_s) as answer:
            found = json.load(answer)
    except urllib.error.HTTPError as error:
        raise ServeError(_refusal(url, error.code)) from None
    except OSError as error:
        raise ServeError(f"--url: {url} does not answer: {error}") from None
    except ValueError:
        raise ServeError(f"--url: {url}{PATH} is not JSON: no SGLang there?") from None
    if not isinstance(found, dict) or "processes" not in found:
        raise ServeError(f"--url: {url}{PATH} is not what sglang_trinv answers")
    return found


def _refusal(url: str, code: int) -> str:
    if code == 401:
        return f"--api-key: {url} wants its API key (or in the variable OPENAI_API_KEY)"
    return f"--url: {url}: {ABSENT if code == 404 else f'answers {code} to {PATH}'}"
