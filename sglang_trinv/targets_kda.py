"""The KDA rows of the table in ``targets``: which releases' intra-chunk function is replaced."""

from __future__ import annotations

from sglang_trinv import targets
from sglang_trinv.errors import TargetMissing
from sglang_trinv.targets import REQUIRED, Target

# No row: 0.5.10 to 0.5.16, whose function also takes disable_recompute. They
# hand the kernels gates of the wrong base (targets.kda_refusal).
TARGETS = (
    Target(
        releases=("0.5.17", "0.5.18", "0.5.19", "0.5.20", "0.5.21", "0.5.22", "0.5.23"),
        fla="sglang.kernels.ops.attention.fla",
        gdn_config="",
        prefill_default="",
        prefill_flag="none",
        module="chunk_intra",
        function="chunk_kda_fwd_intra",
        importers=("kda",),
        parameters=(
            ("q", REQUIRED),
            ("k", REQUIRED),
            ("v", REQUIRED),
            ("gk", None),
            ("beta", None),
            ("scale", None),
            ("cu_seqlens", None),
            ("chunk_size", 64),
            ("chunk_indices", None),
            ("safe_gate", False),
            ("fuse_recompute", False),
            ("fuse_diagonal", False),
        ),
        adapter="kda_intra",
    ),
)
RELEASES = tuple(release for target in TARGETS for release in target.releases)


def find(release: str) -> Target:
    """Return the row of ``release``.

    Raises:
        TargetMissing: no row of ``targets`` or of this table has the release.
    """
    targets.find(release)
    refusal = targets.kda_refusal(release)
    if refusal:
        raise TargetMissing(refusal)
    public = release.partition("+")[0]
    for target in TARGETS:
        if public in target.releases:
            return target
    raise TargetMissing(f"SGLang {release} has no row for KDA; supported are {', '.join(RELEASES)}")


def prefill_backend_of(backend: object) -> str | None:
    """Name of the kernels that ``backend`` prefills KDA with; None without KDA layers."""
    linear = getattr(backend, "linear_attn_backend", None)
    if type(linear).__name__ != "KDAAttnBackend":
        return None
    kernel = getattr(getattr(linear, "kernel_dispatcher", None), "extend_kernel", None)
    name = type(kernel).__name__
    return name.removesuffix("KDAKernel").lower() if name.endswith("KDAKernel") else "unknown"
