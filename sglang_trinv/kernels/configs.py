"""Launch configurations: fixed per shape class, never tuned at run time."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LaunchConfig:
    """How a kernel is cut. One warp a program: the blocks of one chunk stay in its registers."""

    group: int  # value heads a program
    block_k: int = 128  # columns of k read at once for K K^T
    block_d: int = 64  # columns of k and v read at once for w and u
    stages: int = 1  # of the loop over these columns
    maxnreg: int | None = None


# H200, us, T = 8192: 128 columns of k at once 35.9, 64 columns 38.5 (Hg/H 16/32); all value heads
# of a key head in one program 35.9 against 46.1 one by one, and 55.6 against 79.2 at 16/64.
# Below 132 SMs x 8 programs latency counts and one head a program is faster.
FEW_PROGRAMS = 1056


def kkt_solve_config(ratio: int, chunks: int, key_heads: int) -> LaunchConfig:
    """For ``ratio`` value heads a key head, and the number of chunks and key heads."""
    if chunks * key_heads < FEW_PROGRAMS:
        return LaunchConfig(group=1)
    return LaunchConfig(group=next(g for g in (4, 3, 2, 1) if ratio % g == 0))


# H200, us, T = 8192, Hg/H 16/32: one value head a program 105.0, two 119.7; columns by 64 in two
# stages 105.0, in one 106.9, by 32 in three 106.8.
FWD_INTRA = LaunchConfig(group=1, stages=2)
# H200, us, T = 8192, 32 heads: 160 registers 52.6, unbounded 56.2, 128 57.5.
SOLVE_TRIL_MAXNREG = 160
# Not measured yet; 16 columns at once is the widest that spills no register on sm_80 and sm_90
# (benchmarks/resources.py): 32 columns spill 128 bytes a thread on sm_90.
KDA_INTRA = LaunchConfig(group=1, block_k=16, block_d=64, stages=1)
