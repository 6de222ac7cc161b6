"""Serve a model with SGLang, our kernels or stock, on a GPU or on the CPU platform."""
