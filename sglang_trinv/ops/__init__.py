"""The public operations: host side of the kernels. The import needs torch and Triton, no GPU."""

from sglang_trinv.ops.chunk_gated_delta_rule import chunk_gated_delta_rule
from sglang_trinv.ops.fwd_intra import fwd_intra, kkt_solve
from sglang_trinv.ops.kda_intra import chunk_kda_fwd_intra
from sglang_trinv.ops.methods import METHODS, implementation
from sglang_trinv.ops.solve_tril import solve_tril

__all__ = [
    "METHODS",
    "chunk_gated_delta_rule",
    "chunk_kda_fwd_intra",
    "fwd_intra",
    "implementation",
    "kkt_solve",
    "solve_tril",
]
