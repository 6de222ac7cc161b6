"""``python -m sglang_trinv``: the command line."""

from sglang_trinv.cli import app

if __name__ == "__main__":
    app()
