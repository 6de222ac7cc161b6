"""lm-eval tasks whose answers depend on the triangular inverse, and what makes their documents.

``lm_eval run --include_path`` of this folder works in any environment that has lm-eval: lm-eval
loads ``documents.py`` by its path.
"""

from __future__ import annotations

from pathlib import Path

PATH = Path(__file__).resolve().parent
