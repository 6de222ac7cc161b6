"""The numerical study: every method, precision, size and input, measured against float64.

``sglang-trinv study`` runs it. Needs the extra ``study``; the captured inputs and the model part
also need transformers. docs/numerics.md says what it found.
"""
