"""Patches for SGLang releases without a plugin system, and what applies them."""
