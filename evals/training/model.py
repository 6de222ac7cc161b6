"""Qwen3.5's hybrid text model for several candidates at once, in plain torch.

Every weight carries transformers' name and a leading candidate dimension ``E``, so one candidate is
exported by taking its slice. Linear layers are batched matrix products over ``E``; the delta rule
sees candidates and rows as one batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 64


def shapes(c: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every weight of a config."""
    D, I, hd = c["hidden_size"], c["intermediate_size"], c["head_dim"]
    q, kv = c["num_attention_heads"] * hd, c["num_key_value_heads"] * hd
    H = c["linear_num_value_heads"]
    K, V = c["linear_num_key_heads"] * c["linear_key_head_dim"], H * c["linear_value_head_dim"]
    yield "model.embed_tokens.weight", (c["vocab_size"], D)
    for i, kind in enumerate(c["layer_types"]):
        p = f"model.layers.{i}."
        yield p + "input_layernorm.weight", (D,)
        if kind == "full_attention":
            yield p + "self_attn.q_proj.weight", (2 * q, D)
            yield p + "self_attn.k_proj.weight", (kv, D)
            yield p + "self_attn.v_proj.weight", (kv, D)
            yield p + "self_attn.o_proj.weight", (D, q)
            yield p + "self_attn.q_norm.weight", (hd,)
            yield p + "self_attn.k_norm.weight", (hd,)
        else:
            yield p + "linear_attn.in_proj_qkv.weight", (2 * K + V, D)
            yield p + "linear_attn.in_proj_z.weight", (V, D)
            yield p + "linear_attn.in_proj_b.weight", (H, D)
            yield p + "linear_attn.in_proj_a.weight", (H, D)
            yield p + "linear_attn.conv1d.weight", (2 * K + V, 1, c["linear_conv_kernel_dim"])
            yield p + "linear_attn.out_proj.weight", (D, V)
            yield p + "linear_attn.norm.weight", (c["linear_value_head_dim"],)
            yield p + "linear_attn.A_log", (H,)
            yield p + "linear_attn.dt_bias", (H,)
        yield p + "post_attention_layernorm.weight", (D,)
        yield p + "mlp.gate_proj.weight", (I, D)
        yield p + "mlp.up_proj.weight", (I, D)
        yield p + "mlp.down_proj.weight", (D, I)
    yield "model.norm.weight", (D,)
    if not c["tie_word_embeddings"]:
        yield "lm_head.weight", (c["vocab_size"], D)


def initial(name: str, shape: tuple[int, ...], layers: int, generator: torch.Generator) -> Tensor:
    """Initial value of one candidate's weight."""
    normal = torch.randn(shape, generator=generator)
    uniform = torch.rand(shape, generator=generator)
    if name.endswith("A_log"):
        return torch.log(1 + 3 * uniform)
    if name.endswith("dt_bias"):  # decay of 0.0003 to 0.1 a token at first: a long memory
        dt = torch.exp(math.log(3e-4) + uniform * math.log(0.03 / 3e-4))
        return torch.log(torch.expm1(dt))
    if name.endswith("linear_attn.norm.weight"):
        return torch.ones(shape)
    if name.endswith("norm.weight"):
        return torch.zeros(shape)  # the model adds 1
    if name.endswith("conv1d.weight"):
        return normal * 0.3 + torch.tensor([0.0, 0.0, 0.3, 0.5])
    if name.endswith("embed_tokens.weight"):
        return normal * 0.5
    if name.endswith("in_proj_a.weight"):
        return normal * 0.1 / math.sqrt(shape[1])
    scale = 1 / math.sqrt(shape[1])
    if name.endswith(("o_proj.weight", "out_proj.weight", "down_proj.weight")):
        scale /= math.sqrt(2 * layers)
    return normal * scale


class InverseUnitLower(torch.autograd.Function):
    """``(I + A)^-1`` of strictly lower ``A`` [..., n, n], n a power of 2, exactly.

    Inverted diagonal blocks are merged pairwise: log2(n) steps of full-size products, stable where
    the product of powers of A is not. Backward is two products.
    """

    @staticmethod
    def forward(ctx: Any, A: Tensor) -> Tensor:
        n = A.shape[-1]
        i = torch.arange(n, device=A.device)
        X = torch.eye(n, device=A.device, dtype=A.dtype).expand_as(A)
        for s in range(n.bit_length() - 1):
            pair = (i[:, None] >> (s + 1)) == (i[None] >> (s + 1))
            M = A * (pair & ((i[:, None] >> s) != (i[None] >> s)))
            X = X - (X @ (M @ X) if s else M)
        ctx.save_for_backward(X)
        return X

    @staticmethod
    def backward(ctx: Any, dX: Tensor) -> Tensor:
        (X,) = ctx.saved_tensors
        Xt = X.transpose(-1, -2)
        return -(Xt @ dX @ Xt).tril(-1)


def gated_delta_rule(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    """Chunked gated delta rule. q, k [N, T, Hk, K], v [N, T, H, V], g, beta [N, T, H] -> like v."""
    N, T, H, V = v.shape
    Hk, C = q.shape[2], min(CHUNK, T)
    assert T % C == 0, "pad to whole chunks"

    def chunks(x: Tensor, groups: int) -> Tensor:  # [N, Hk, groups, T/C, C, -1]
        return x.reshape(N, T // C, C, Hk, groups, -1).permute(0, 3, 4, 1, 2, 5)

    G = H // Hk
    q, k, v, beta = chunks(q, 1), chunks(k, 1), chunks(v, G), chunks(beta, G)
    g = chunks(g, G)[..., 0].cumsum(-1)
    lower = torch.ones(C, C, dtype=torch.bool, device=v.device).tril()
    decay = (g[..., None] - g[..., None, :]).masked_fill(~lower, -math.inf).exp()
    kt, eg = k.transpose(-1, -2), g.exp()[..., None]
    Ai = InverseUnitLower.apply((beta * decay * (k @ kt)).tril(-1))
    u, w = Ai @ (beta * v), Ai @ (beta * eg * k)
    P = decay * (q @ kt)
    qg, last = q * eg, g[..., -1:]
    kg = (k * (last - g).exp()[..., None]).transpose(-1, -2)
    keep = last.exp()[..., None]
    S, out = None, []
    for i in range(T // C):
        if S is None:
            new = u[:, :, :, i]
            out.append(P[:, :, :, i] @ new)
            S = kg[:, :, :, i] @ new
        else:
            new = u[:, :, :, i] - w[:, :, :, i] @ S
            out.append(qg[:, :, :, i] @ S + P[:, :, :, i] @ new)
            S = keep[:, :, :, i] * S + kg[:, :, :, i] @ new
    return torch.stack(out, 3).permute(0, 3, 4, 1, 2, 5).reshape(N, T, H, V)


class Stack:
    """``E`` candidates of one architecture; all weights in one leaf tensor ``flat`` [E, P]."""

    def __init__(self, config: dict[str, Any], seeds: list[int], device: str) -> None:
        self.config = config
        self.names = dict(shapes(config))
        rows = []
        for seed in seeds:
            generator = torch.Generator().manual_seed(seed)
            layers = config["num_hidden_layers"]
            weights = [initial(n, s, layers, generator) for n, s in self.names.items()]
            rows.append(torch.cat([w.reshape(-1) for w in weights]))
        self.flat = torch.stack(rows).to(device).requires_grad_()
        self.dtype = torch.bfloat16 if device == "cuda" else torch.float32

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """Weights by name, [E, *shape]; one node in the graph for all of them."""
        sizes = [math.prod(s) for s in self.names.values()]
        parts = flat.split(sizes, 1)
        return {n: p.view(-1, *s) for (n, s), p in zip(self.names.items(), parts, strict=True)}

    def export(self, i: int) -> dict[str, Tensor]:
        """Candidate ``i`` as transformers' state dict in bfloat16."""
        views = self.views(self.flat.detach()).items()
        return {name: w[i].to(torch.bfloat16).cpu().contiguous() for name, w in views}

    def forward(self, x: Tensor, flat: Tensor | None = None) -> Tensor:
        """Logits [E, B, T, vocabulary] of tokens [B, T]; T is a multiple of the chunk."""
        W = self.views(self.flat if flat is None else flat)
        c, E, (B, T) = self.config, len(self.flat if flat is None else flat), x.shape
        eps = c["rms_norm_eps"]
        emb = W["model.embed_tokens.weight"]
        onehot = F.one_hot(x.reshape(-1), c["vocab_size"]).to(self.dtype)
        h = torch.matmul(onehot, emb.to(self.dtype)).float()
        for i, kind in enumerate(c["layer_types"]):
            p = f"model.layers.{i}."
            y = rms_norm(h, W[p + "input_layernorm.weight"][:, None], eps)
            mixer = self.attention if kind == "full_attention" else self.delta_net
            h = h + mixer(W, p, y, E, B, T)
            y = rms_norm(h, W[p + "post_attention_layernorm.weight"][:, None], eps)
            gate = F.silu(self.linear(W[p + "mlp.gate_proj.weight"], y))
            y = gate * self.linear(W[p + "mlp.up_proj.weight"], y)
            h = h + self.linear(W[p + "mlp.down_proj.weight"], y)
        h = rms_norm(h, W["model.norm.weight"][:, None], eps)
        return self.linear(W.get("lm_head.weight", emb), h).float().view(E, B, T, -1)

    def linear(self, weight: Tensor, x: Tensor) -> Tensor:
        """[E, rows, in] -> [E, rows, out]."""
        return x.to(self.dtype) @ weight.to(self.dtype).transpose(1, 2)

    def delta_net(self, W: dict[str, Tensor], p: str, x: Tensor, E: int, B: int, T: int) -> Tensor:
        """Gated DeltaNet mixer."""
        c, p = self.config, p + "linear_attn."
        Hk, H = c["linear_num_key_heads"], c["linear_num_value_heads"]
        K, V = c["linear_key_head_dim"], c["linear_value_head_dim"]
        mixed = self.linear(W[p + "in_proj_qkv.weight"], x).view(E, B, T, -1)
        taps = W[p + "conv1d.weight"].to(mixed.dtype)[:, :, 0]
        n = taps.shape[-1]
        mixed = F.pad(mixed, (0, 0, n - 1, 0))
        mixed = sum(mixed[:, :, j : j + T] * taps[:, None, None, :, j] for j in range(n))
        mixed = F.silu(mixed).view(E * B, T, -1).float()
        q, k, v = mixed.split([Hk * K, Hk * K, H * V], -1)
        q, k = l2norm(q.reshape(E * B, T, Hk, K)), l2norm(k.reshape(E * B, T, Hk, K))
        beta = self.linear(W[p + "in_proj_b.weight"], x).float().sigmoid()
        a = self.linear(W[p + "in_proj_a.weight"], x).float()
        g = -W[p + "A_log"].exp()[:, None] * F.softplus(a + W[p + "dt_bias"][:, None])
        o = gated_delta_rule(q * K**-0.5, k, v.reshape(E * B, T, H, V),
                             g.view(E * B, T, H), beta.view(E * B, T, H))  # fmt: skip
        o = o.reshape(E, B * T, H, V)
        o = o * torch.rsqrt(o.pow(2).mean(-1, keepdim=True) + c["rms_norm_eps"])
        z = self.linear(W[p + "in_proj_z.weight"], x).view(E, B * T, H, V)
        o = o * W[p + "norm.weight"][:, None, None] * F.silu(z.float())
        return self.linear(W[p + "out_proj.weight"], o.reshape(E, B * T, H * V))

    def attention(self, W: dict[str, Tensor], p: str, x: Tensor, E: int, B: int, T: int) -> Tensor:
        """Gated full attention with partial rotary positions."""
        c, p = self.config, p + "self_attn."
        heads, kv, hd = c["num_attention_heads"], c["num_key_value_heads"], c["head_dim"]
        q = self.linear(W[p + "q_proj.weight"], x).view(E, B * T, heads, 2 * hd)
        q, gate = q.chunk(2, -1)
        k = self.linear(W[p + "k_proj.weight"], x).view(E, B * T, kv, hd)
        v = self.linear(W[p + "v_proj.weight"], x).view(E * B, T, kv, hd)
        q = rms_norm(q.float(), W[p + "q_norm.weight"][:, None, None], c["rms_norm_eps"])
        k = rms_norm(k.float(), W[p + "k_norm.weight"][:, None, None], c["rms_norm_eps"])
        q, k = rotate(q.view(E * B, T, heads, hd), c), rotate(k.view(E * B, T, kv, hd), c)
        k, v = (y.repeat_interleave(heads // kv, 2) for y in (k, v))
        o = F.scaled_dot_product_attention(
            *(y.transpose(1, 2).to(self.dtype) for y in (q, k, v)), is_causal=True
        )
        o = o.transpose(1, 2).reshape(E, B * T, heads * hd)
        o = o * torch.sigmoid(gate.reshape(E, B * T, heads * hd))
        return self.linear(W[p + "o_proj.weight"], o)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root mean square norm; the stored weight is the scale less 1."""
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * (1 + weight)


def l2norm(x: Tensor) -> Tensor:
    """Unit length along the last dimension."""
    return x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + 1e-6)


def rotate(x: Tensor, c: dict[str, Any]) -> Tensor:
    """Rotary positions on the first part of the head dimension. x [N, T, heads, head_dim]."""
    rope = c["rope_parameters"]
    dim, T = int(c["head_dim"] * rope["partial_rotary_factor"]), x.shape[1]
    inv = 1 / rope["rope_theta"] ** (torch.arange(0, dim, 2, device=x.device).float() / dim)
    angle = torch.arange(T, device=x.device).float()[:, None, None] * inv
    cos, sin = torch.cat([angle, angle], -1).cos(), torch.cat([angle, angle], -1).sin()
    a, b, rest = x[..., : dim // 2], x[..., dim // 2 : dim], x[..., dim:]
    turned = torch.cat([a, b], -1) * cos + torch.cat([-b, a], -1) * sin
    return torch.cat([turned, rest], -1)
