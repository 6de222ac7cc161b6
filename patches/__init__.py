"""Patches for SGLang releases without a plugin system. There is none to apply yet."""
