"""Launch configurations: fixed per shape class, never tuned at run time."""

from __future__ import annotations

from dataclasses import dataclass, replace


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
# Not measured yet. 16 columns of the keys and 32 of w and u at once spill no register with fp16
# products on sm_80 and sm_90; 32 columns of the keys spilled 128 bytes a thread on sm_90, 64
# columns of w and u up to 16 (Triton 3.6 and 3.7.1, benchmarks/resources.py).
KDA_INTRA = LaunchConfig(group=1, block_k=16, block_d=32)


@dataclass(frozen=True)
class PrefillConfig:
    """How the whole prefill is cut."""

    state: str = "triton"  # kernels of the state pass: "triton" (any GPU) or "sm90" (Gluon)
    block_v: int = 64  # rows of the state a program
    warps: int = 4  # of a program ("triton")
    stages: int = 2  # of the loop over chunks ("triton"); of k, v, Ai and factors ("sm90")
    late_stages: int = 1  # of q and P ("sm90")
    maxnreg: int | None = None
    segments: int = 1  # a sequence, worked on at once


SMS = 132  # of H100 and H200
# H200, us, state pass. Up to one program of 64 rows an SM, three stages win: 8192 at 16/32 172 (two
# stages 238, 128 rows 227), 8192 at 16/64 191 (256, 233). Beyond, 128 rows, which share q, k and
# Ai: 16 x 2048 at 16/32 326 (64 rows, two programs an SM: 352, three stages: 412), 8 x 1024 at
# 16/64 176 (187, 224); but two small programs an SM at 64 x 128 at 16/32: 182 (201, 225).
ALONE = PrefillConfig(state="sm90", stages=3, late_stages=2)
WIDE = PrefillConfig(state="sm90", block_v=128, stages=2, late_stages=2, maxnreg=168)
SHORT = PrefillConfig(state="sm90", stages=2, late_stages=1, maxnreg=128)
SHORT_CHUNKS = 4


def prefill_config(
    capability: tuple[int, int], groups: int, chunks: int, transfer_ratio: int, split: bool
) -> PrefillConfig:
    """For ``groups`` of 64 state rows (all heads and sequences) and ``chunks`` a sequence.

    Args:
        transfer_ratio: rows of a segment's transfer matrices, for each row of the state.
        split: whether sequences may be cut into segments.
    """
    chosen = PrefillConfig()
    if capability == (9, 0):
        chosen = ALONE if groups <= SMS else WIDE if chunks > SHORT_CHUNKS else SHORT
    if not split or groups > SMS // 2:
        return chosen
    return replace(chosen, segments=prefill_segments(groups, chunks, transfer_ratio))


# Per chunk and program: 1.34 us in the state pass (H200, 8192 at 16/32, one program an SM). The
# rest is estimated and not measured yet: 0.84 us in the transfer pass, by its share of the
# products; 2 us a segment to combine, 10 us for two more launches.
STATE_US, TRANSFER_US, COMBINE_US, LAUNCHES_US = 1.34, 0.84, 2.0, 10.0


def prefill_segments(groups: int, chunks: int, transfer_ratio: int) -> int:
    """The number of segments with the least estimated time."""

    def cost(n: int) -> float:
        size = -(-chunks // n)
        state = STATE_US * size * -(-groups * n // SMS)
        if n == 1:
            return state
        busy = max(1.0, groups * transfer_ratio * (n - 1) / SMS)
        return state + TRANSFER_US * size * busy + COMBINE_US * n + LAUNCHES_US

    return min((1, 2, 4, 8, 16), key=cost)
