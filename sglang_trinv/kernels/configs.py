"""Launch configurations: fixed per shape class, never tuned at run time."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class LaunchConfig:
    """How a kernel is cut. One warp a program: the blocks of one chunk stay in its registers."""

    group: int  # value heads a program
    block_k: int = 128  # columns of k read at once for K K^T
    block_d: int = 64  # columns of k and v read at once for w and u
    stages: int = 1  # of the loop over these columns


# Products whose operands are not all split: the other ones take twice the registers.
ONE_PART = ("fp16", "fp16x2", "tf32")

# H200, us, T = 8192: 128 columns of k at once 35.9, 64 columns 38.5 (Hg/H 16/32); all value heads
# of a key head in one program 35.9 against 46.1 one by one, and 55.6 against 79.2 at 16/64.
# Below 132 SMs x 8 programs latency counts and one head a program is faster.
FEW_PROGRAMS = 1056


def kkt_solve_config(ratio: int, chunks: int, key_heads: int) -> LaunchConfig:
    """For ``ratio`` value heads a key head, and the number of chunks and key heads."""
    if chunks * key_heads < FEW_PROGRAMS:
        return LaunchConfig(group=1)
    return LaunchConfig(group=next(g for g in (4, 3, 2, 1) if ratio % g == 0))


def inverse_group(dot: str, ratio: int, chunks: int, key_heads: int) -> int:
    """Value heads a program of the prefill's inverse; with two those of the x3 methods spill."""
    return kkt_solve_config(ratio, chunks, key_heads).group if dot in ONE_PART else 1


# H200, us, T = 8192, Hg/H 16/32: columns by 64 in three stages 106.0, in two 108.6, in one 110.0;
# by 32 in three 110.0; two value heads a program, by 32 in three 111.5. In two nothing spills.
FWD_INTRA = LaunchConfig(group=1, stages=2)


def fwd_intra_config(dot: str) -> LaunchConfig:
    """For products in ``dot``; in two stages those of the x3 methods would spill."""
    return FWD_INTRA if dot in ONE_PART else replace(FWD_INTRA, stages=1)


# H200, us, fp16: 32 columns of the keys, 64 of w and u: 500.5 at 8192 x 32 heads (16 and 32: 623;
# 64 and 64 with two warps: 551) and 134 at 2048 x 32 (155; 147); at 8192 x 4 heads 104 (119), where
# 64 and 64 with two warps take 78.5. One cut for all: another one sums in another order, and a
# sequence has the same bits whatever else is in the batch.
KDA_INTRA = LaunchConfig(group=1, block_k=32, block_d=64)


def kda_intra_config(dot: str) -> LaunchConfig:
    """For products in ``dot``; with 32 columns those of the x3 methods would spill on SM80."""
    return KDA_INTRA if dot in ONE_PART else replace(KDA_INTRA, block_k=16)


@dataclass(frozen=True)
class PrefillConfig:
    """How the whole prefill is cut.

    The portable cut is the one that spills nowhere (benchmarks/results/resources.json).
    """

    state: str = "triton"  # kernels of the state pass: "triton" (any GPU) or "sm90" (Gluon)
    block_v: int = 32  # rows of the state a program
    warps: int = 8  # of a program ("triton")
    stages: int = 2  # chunks in flight
    maxnreg: int | None = None
    own_scores: bool = False  # computed in the state pass ("sm90")
    chunks_regs: int = 240  # of the second warpgroup that goes through the chunks ("sm90")
    scores_regs: int = 104  # of the one that computes scores ("sm90")
    segments: int = 1  # a sequence, worked on at once
    beside: bool = False  # scores by idle multiprocessors meanwhile ("sm90", no segments)


SMS = 132  # of H100 and H200
# H200, us, state pass. Up to one program of 64 rows an SM: 8192 at 16/32 140 (128 rows 212), at
# 16/64 158 (216). Up to one of 128 rows, which share q, k, P and Ai, an SM, if lengths are alike.
# Beyond, memory limits and the pass computes its scores: 16 x 2048 at 16/32 363 with 141 before it
# (304 and 255 with scores_kernel; 422 and 141 with 64 rows). So do segments: 32768 at 16/16 374 and
# 97 (340 and 203); one sequence does not: 8192 at 16/32 189 and 39 (140 and 76).
ALONE = PrefillConfig(state="sm90", block_v=64, stages=3)
SEGMENTED = replace(ALONE, maxnreg=128, own_scores=True)
WIDE = PrefillConfig(state="sm90", block_v=128, stages=3, maxnreg=168)
CROWDED = replace(WIDE, maxnreg=128, own_scores=True, chunks_regs=216, scores_regs=56)
# H200, us, whole calls at 16/32: 64 x 128 tokens 211 with two stages, 219 with three; 16 x 512 178
# and 151.
FEW_CHUNKS, SHORT = 3, replace(CROWDED, stages=2)
# H200, us, whole calls at 16/32, scores beside the pass and before it: 8192 tokens 186 and 210,
# 32768 658 and 741, 64 19 and 22.
BESIDE = replace(ALONE, beside=True)


@functools.cache
def prefill_config(
    capability: tuple[int, int], groups: int, chunks: int, transfer_ratio: int, split: bool,
    single: bool,
) -> PrefillConfig:  # fmt: skip
    """For ``groups`` of 64 state rows (all heads and sequences) and ``chunks`` a sequence.

    Args:
        transfer_ratio: rows of a segment's transfer matrices, for each row of the state.
        split: whether sequences may be cut into segments, and other things be done that change
            bits: ALONE, BESIDE and WIDE give the same.
        single: whether there is one sequence.
    """
    chosen = PrefillConfig()
    if capability == (9, 0):
        crowded = split and groups > 2 * SMS
        many = CROWDED if chunks > FEW_CHUNKS else SHORT
        chosen = ALONE if groups <= SMS else many if crowded else WIDE
    segments = prefill_segments(groups, chunks, transfer_ratio) if split else 1
    if segments == 1:
        return BESIDE if single and chosen is ALONE and groups <= SMS // 2 else chosen
    return replace(SEGMENTED if chosen.state == "sm90" else chosen, segments=segments)


def prefill_forms(hopper: bool) -> list[PrefillConfig]:
    """What ``prefill_config`` may choose, any number of segments being two."""
    if not hopper:
        return [PrefillConfig(), PrefillConfig(segments=2)]
    return [ALONE, BESIDE, WIDE, CROWDED, SHORT, replace(SEGMENTED, segments=2)]


# Per chunk and program 1.09 us in the state pass (H200, 8192 at 16/32, one program an SM); the rest
# fits transfer and combination of 4 to 16 segments: 42 us at 8192 2/4, 119 at 32768 2/4, 167 at
# 32768 16/16, 415 at 131072 4/8 (all 4 segments).
STATE_US, TRANSFER_US, COMBINE_US, LAUNCHES_US = 1.09, 0.8, 2.0, 10.0


def prefill_segments(groups: int, chunks: int, transfer_ratio: int) -> int:
    """The number of segments with the least estimated time."""
    if groups > SMS // 3:
        return 1

    def cost(n: int) -> float:
        size = -(-chunks // n)
        state = STATE_US * size * -(-groups * n // SMS)
        if n == 1:
            return state
        busy = max(1.0, groups * transfer_ratio * (n - 1) / SMS)
        return state + TRANSFER_US * size * busy + COMBINE_US * n + LAUNCHES_US

    return min((1, 2, 4, 8, 16), key=cost)
