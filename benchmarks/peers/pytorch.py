#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Times the report's shapes in PyTorch and writes JSON that `local_mha_report --peers` shows beside.

Needs PyTorch 2.5 or newer. Measured, where there:

  local-attention   the package local_attention, if it is installed
  naive bucketed    what that package computes, written out here in plain tensor operations:
                    buckets, look-around by padding and unfolding, masked softmax
  masked SDPA       scaled_dot_product_attention with the band as a mask, which forms all N*N scores
  FlexAttention     compiled, with the band as a block mask; needs a C++ compiler
  cached step       one position after the other: what local-attention's LocalMHA computes with a
                    cache of keys and values, written out here (its keys are kept unrotated, and the
                    whole window is rotated for every position, as there)
  local-attention,  the package's own cached step, if it is installed; its results are another
  cached            matter: from the second position on it rotates keys twice

Cases are named as by local_mha_measure (benchmarks/measuring/case.hpp) and counted the same way:
unmasked pairs only. Every attention's result is checked against exact rows in float64 before it is
timed, and that of a module of transformers against its own plain implementation. A layer with
backward:1 is a step of training: forward, and back to the gradients of x and of the weights; by
local-attention and naive bucketed, which rotates in the buckets as that package does. For it, what
autograd keeps from forward to backward is counted, too (kept_megabytes; without the
input and the weights).

  python3 pytorch.py --threads 1 --output peers.json
  python3 pytorch.py --threads 1 --output peers.json --report build/release/benchmarks/report.json

With --report, figures are shares of the multiply-add peak that the report found (times threads),
otherwise GFLOP/s.

  python3 pytorch.py --cases CASE --against build/release/benchmarks/local_mha_measure --rounds 7

With --against, that program and the peer are measured in turn, in rounds, with as many threads, and
the median of the rounds' ratios is how many times faster local_mha is: on a machine shared with
others, the one figure to trust.
"""
import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time

import torch
from torch.nn.functional import linear, pad, scaled_dot_product_attention, softmax

ATTENTION_CASES = [
    "attention/float/seqlen:8192/dim_head:64/window_size:16",
    "attention/float/seqlen:8192/dim_head:64/window_size:128",
    "attention/float/seqlen:8192/dim_head:64/window_size:256",
    "attention/float/seqlen:8192/dim_head:64/window_size:512",
    "attention/float/seqlen:8192/dim_head:128/window_size:256",
    "attention/float/seqlen:8192/dim_head:64/window_size:256/causal:0",
    "attention/double/seqlen:8192/dim_head:64/window_size:256",
]
DECODE_CASES = [
    "decode/float/seqlen:8192/dim:512/heads:8/dim_head:64/window_size:256/xpos:1/qk_rmsnorm:1",
]
LAYER_CASES = [
    "layer/float/seqlen:8192/dim:256/heads:4/dim_head:64/window_size:128",
    "layer/float/seqlen:8192/dim:768/heads:12/dim_head:64/window_size:128/causal:0",
    "layer/float/seqlen:8192/dim:512/heads:8/dim_head:64/window_size:256/xpos:1/qk_rmsnorm:1",
    "layer/float/seqlen:8192/dim:512/heads:8/dim_head:64/window_size:256/xpos:1/qk_rmsnorm:1"
    "/backward:1",
    "layer/float/seqlen:8192/dim:512/heads:8/dim_head:64/window_size:256/xpos:1/qk_rmsnorm:1"
    "/arithmetic_bits:16",
]
MODEL_CASES = [
    "layer/float/seqlen:8192/dim:1024/heads:16/dim_head:64/window_size:256/token_window:1/left:255"
    "/kv_heads:4",
    "layer/float/seqlen:8192/dim:768/heads:12/dim_head:64/window_size:64/causal:0/token_window:1"
    "/left:64/right:64",
]


class Case:
    """A shape, read from its name. Windows are exact."""

    def __init__(self, name):
        self.name = name
        self.subject, self.scalar, *pairs = name.split("/")
        values = {"batch": 1, "dim": 0, "heads": 1, "causal": 1, "xpos": 0, "qk_rmsnorm": 0}
        values.update({"backward": 0, "token_window": 0, "left": 0, "right": 0, "kv_heads": 0})
        values["arithmetic_bits"] = 0
        values.update((key, int(value)) for key, value in (pair.split(":") for pair in pairs))
        self.__dict__.update(values)
        self.dtype = {"float": torch.float32, "double": torch.float64}[self.scalar]
        if self.arithmetic_bits == 16:
            self.dtype = torch.bfloat16
        self.look_forward = 0 if self.causal else 1

    def sees(self, i, j):
        """Works on numbers and on tensors."""
        if self.token_window:
            return (i - j <= self.left) & (j - i <= self.right)
        behind = i - j <= self.window_size
        ahead = j - i <= self.look_forward * self.window_size
        return behind & ahead

    def pairs(self):
        if self.subject == "decode":
            return (min(self.seqlen - 1, self.window_size) + 1) * self.heads
        n = self.seqlen
        behind, ahead = self.window_size, self.look_forward * self.window_size
        if self.token_window:
            behind, ahead = self.left, self.right
        of_a_head = sum(min(i, behind) + 1 + min(n - 1 - i, ahead) for i in range(n))
        return of_a_head * self.heads * self.batch

    def tokens(self):
        return 1 if self.subject == "decode" else self.batch * self.seqlen

    def flops(self):
        heads = 2 * self.heads + 2 * (self.kv_heads or self.heads)
        projections = 2 * self.tokens() * self.dim * heads * self.dim_head
        attention = 4 * self.dim_head * self.pairs()
        return 3 * projections + 3.5 * attention if self.backward else projections + attention

    def shape(self):
        return (self.batch, self.heads, self.seqlen, self.dim_head)


# ---- Attention: functions of q, k, v [B, H, N, D] ------------------------------------------------


class BucketRotary:
    """Turns buckets of queries and their look-arounds by the places in the look-around; with xPos,
    queries are scaled by a power of zeta and keys by its inverse."""

    def __init__(self, case):
        w, d = case.window_size, case.dim_head
        place = torch.arange((2 + case.look_forward) * w, dtype=torch.float64)
        pair = torch.arange(d // 2, dtype=torch.float64)
        angles = place[:, None] * 10000.0 ** (-2 * pair / d)
        decay = torch.ones_like(angles)
        if case.xpos:
            zeta = (2 * pair + 0.4 * d) / (1.4 * d)
            decay = zeta ** ((place[:, None] - len(place) // 2) / math.sqrt(case.dim))
        both = lambda t: torch.cat([t, t], -1).to(case.dtype)
        self.keys = both(angles.cos() / decay), both(angles.sin() / decay)
        # The queries are the last bucket that the look-around is counted from.
        self.queries = both(angles.cos() * decay)[-w:], both(angles.sin() * decay)[-w:]

    @staticmethod
    def turn(t, cos, sin):
        first, second = t.chunk(2, dim=-1)
        return t * cos + torch.cat([-second, first], -1) * sin

    def __call__(self, q, k):
        return self.turn(q, *self.queries), self.turn(k, *self.keys)


def naive_bucketed(case, rotary=None):
    """What local_attention computes, in the tensor operations that it is made of."""
    w = case.window_size
    buckets = -(-case.seqlen // w)
    padded = buckets * w
    look = 1 + case.look_forward
    positions = torch.arange(padded).view(buckets, w)
    # Keys of the look-around by position; -1 and N mark what lies outside the sequence.
    around = pad(torch.arange(padded), (w, case.look_forward * w), value=-1).unfold(
        0, (1 + look) * w, w
    )
    hidden = ~case.sees(positions[:, :, None], around[:, None, :])
    hidden |= (around < 0)[:, None, :] | (around >= case.seqlen)[:, None, :]

    def look_around(t):
        t = pad(t, (0, 0, w, case.look_forward * w))
        return t.unfold(2, (1 + look) * w, w).transpose(-1, -2)

    def attend(q, k, v):
        b, h, n, d = q.shape
        q, k, v = (pad(t, (0, 0, 0, padded - n)) for t in (q, k, v))
        q, k = q.view(b, h, buckets, w, d) * d**-0.5, look_around(k)
        if rotary is not None:
            q, k = rotary(q, k)
        scores = q @ k.transpose(-1, -2)
        scores = scores.masked_fill(hidden, -torch.finfo(scores.dtype).max)
        out = softmax(scores, dim=-1) @ look_around(v)
        return out.reshape(b, h, padded, d)[:, :, :n]

    return attend


def package(case):
    from local_attention import LocalAttention

    attention = LocalAttention(
        window_size=case.window_size,
        causal=bool(case.causal),
        look_backward=1,
        look_forward=case.look_forward,
        exact_windowsize=True,
        autopad=True,
        use_rotary_pos_emb=False,
    )
    keep = torch.ones(case.batch, case.seqlen, dtype=torch.bool)
    return lambda q, k, v: attention(q, k, v, mask=keep)


def masked_sdpa(case):
    i = torch.arange(case.seqlen)
    band = case.sees(i[:, None], i[None, :])
    return lambda q, k, v: scaled_dot_product_attention(q, k, v, attn_mask=band)


def flex_attention(case):
    from torch.nn.attention import flex_attention as flex

    band = flex.create_block_mask(
        lambda b, h, i, j: case.sees(i, j), None, None, case.seqlen, case.seqlen, device="cpu"
    )
    compiled = torch.compile(flex.flex_attention)
    return lambda q, k, v: compiled(q, k, v, block_mask=band)


ATTENTIONS = {
    "local-attention": package,
    "naive bucketed": naive_bucketed,
    "masked SDPA": masked_sdpa,
    "FlexAttention": flex_attention,
}


# ---- Layer: projections, norm and positions around such an attention ------------------------------


class Layer:
    """LocalMHA around one of the attentions above. Positions are rotated once, absolutely: xPos'
    powers of absolute positions would overflow at this length, so it is left to the package, and
    to attentions that rotate (`rotates`)."""

    def __init__(self, case, attend, rotates=False):
        self.case, self.attend, self.rotates = case, attend, rotates
        inner = case.heads * case.dim_head
        generator = torch.Generator().manual_seed(2)
        weight = lambda rows, columns: (
            torch.randn(rows, columns, generator=generator, dtype=case.dtype) / math.sqrt(columns)
        )
        self.to_qkv, self.to_out = weight(3 * inner, case.dim), weight(case.dim, inner)
        self.q_scale, self.k_scale = (torch.ones(case.dim_head, dtype=case.dtype) for _ in range(2))
        half = torch.arange(case.dim_head // 2, dtype=torch.float64)
        angles = torch.arange(case.seqlen)[:, None] * 10000.0 ** (-2 * half / case.dim_head)
        self.cos = torch.cat([angles, angles], -1).cos().to(case.dtype)
        self.sin = torch.cat([angles, angles], -1).sin().to(case.dtype)

    def parameters(self):
        return [self.to_qkv, self.to_out, self.q_scale, self.k_scale]

    def rotate(self, t):
        if self.rotates:
            return t
        first, second = t.chunk(2, dim=-1)
        return t * self.cos + torch.cat([-second, first], -1) * self.sin

    def __call__(self, x):
        c = self.case
        q, k, v = (
            t.view(c.batch, c.seqlen, c.heads, c.dim_head).transpose(1, 2)
            for t in linear(x, self.to_qkv).chunk(3, dim=-1)
        )
        if c.qk_rmsnorm:
            # Scores times 8 instead of D^-0.5, by way of q.
            q = torch.nn.functional.normalize(q, dim=-1) * self.q_scale
            q = q * (8 * math.sqrt(c.dim_head))
            k = torch.nn.functional.normalize(k, dim=-1) * self.k_scale
        out = self.attend(self.rotate(q), self.rotate(k), v)
        return linear(out.transpose(1, 2).reshape(c.batch, c.seqlen, -1), self.to_out)


def package_layer(case):
    from local_attention.transformer import LocalMHA

    layer = LocalMHA(
        dim=case.dim,
        window_size=case.window_size,
        dim_head=case.dim_head,
        heads=case.heads,
        causal=bool(case.causal),
        qk_rmsnorm=bool(case.qk_rmsnorm),
        use_xpos=bool(case.xpos),
        exact_windowsize=True,
    )
    return layer.to(case.dtype).eval()


# ---- A step: one position after the others, with a cache -----------------------------------------


class CachedStep:
    """LocalMHA's step: causal, exact windows, rotary, with xPos and qk_rmsnorm if asked for. Keys
    and values of the last `w` positions are kept, `[B, H, w, D]`."""

    def __init__(self, case, dtype=None):
        self.case = case
        self.dtype = dtype or case.dtype
        d = case.dim_head
        inner = case.heads * d
        generator = torch.Generator().manual_seed(2)

        def weight(rows, columns):
            values = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
            return (values / math.sqrt(columns)).to(self.dtype)

        self.to_qkv, self.to_out = weight(3 * inner, case.dim), weight(case.dim, inner)
        half = torch.arange(0, d, 2, dtype=torch.float64)
        self.frequencies = (10000.0 ** (-half / d)).to(self.dtype)
        self.scale = ((half + 0.4 * d) / (1.4 * d)).to(self.dtype)
        self.scale_base = math.sqrt(case.dim)
        self.keys = torch.zeros(1, case.heads, 0, d, dtype=self.dtype)
        self.values = torch.zeros(1, case.heads, 0, d, dtype=self.dtype)

    def turns(self, n):
        """Cosine, sine and xPos' powers for `n` positions, [n, D]."""
        positions = torch.arange(n, dtype=self.dtype)
        angles = positions[:, None] * self.frequencies[None, :]
        angles = torch.cat([angles, angles], -1)
        if not self.case.xpos:
            return angles.cos(), angles.sin(), None
        power = (positions - n // 2) / self.scale_base
        scale = self.scale[None, :] ** power[:, None]
        return angles.cos(), angles.sin(), torch.cat([scale, scale], -1)

    @staticmethod
    def rotate(t, cos, sin):
        first, second = t.chunk(2, dim=-1)
        return t * cos + torch.cat([-second, first], -1) * sin

    def __call__(self, x):
        """x: [1, 1, dim]"""
        c = self.case
        q, k, v = (
            t.view(1, 1, c.heads, c.dim_head).transpose(1, 2)
            for t in linear(x, self.to_qkv).chunk(3, dim=-1)
        )
        if c.qk_rmsnorm:
            q = torch.nn.functional.normalize(q, dim=-1) * 8
            k = torch.nn.functional.normalize(k, dim=-1)
        else:
            q = q * c.dim_head**-0.5
        self.keys = torch.cat([self.keys, k], dim=-2)[:, :, -(c.window_size + 1) :]
        self.values = torch.cat([self.values, v], dim=-2)[:, :, -(c.window_size + 1) :]
        n = self.keys.shape[-2]
        cos, sin, scale = self.turns(n)
        q, k = self.rotate(q, cos[-1:], sin[-1:]), self.rotate(self.keys, cos, sin)
        if scale is not None:
            q, k = q * scale[-1:], k / scale
        probabilities = softmax(q @ k.transpose(-1, -2), dim=-1)
        out = (probabilities @ self.values).transpose(1, 2).reshape(1, 1, -1)
        return linear(out, self.to_out)

    def exact(self, x):
        """The last row of x [1, n, dim], from the formulas: a score turns by the distance alone."""
        c, d, n = self.case, self.case.dim_head, x.shape[1]
        q, k, v = (
            t.view(n, c.heads, d).double()
            for t in linear(x[0].double(), self.to_qkv.double()).chunk(3, dim=-1)
        )
        q = q[-1]
        if c.qk_rmsnorm:
            q = q / q.norm(dim=-1, keepdim=True) * 8
            k = k / k.norm(dim=-1, keepdim=True)
        else:
            q = q * d**-0.5
        rows = []
        half = torch.arange(0, d, 2, dtype=torch.float64)
        for h in range(c.heads):
            scores = []
            seen = range(max(0, n - 1 - c.window_size), n)
            for j in seen:
                r = n - 1 - j
                angle = r * 10000.0 ** (-half / d)
                decay = ((half + 0.4 * d) / (1.4 * d)) ** (r / self.scale_base) if c.xpos else 1.0
                (q1, q2), (k1, k2) = q[h].chunk(2), k[j, h].chunk(2)
                along = (q1 * k1 + q2 * k2) * angle.cos()
                across = (q1 * k2 - q2 * k1) * angle.sin()
                scores.append((decay * (along + across)).sum())
            p = softmax(torch.stack(scores), dim=0)
            rows.append(p @ v[seen.start : seen.stop, h])
        return linear(torch.cat(rows), self.to_out.double())


def own_step(case):
    """Checked against the formulas, and with a full window."""
    check = CachedStep(case, torch.float64)
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(1, case.window_size + 40, case.dim, generator=generator, dtype=torch.float64)
    for i in range(x.shape[1]):
        out = check(x[:, i : i + 1])
    exact = check.exact(x)
    error = ((out[0, 0] - exact).abs().max() / exact.abs().max()).item()
    if not error < 1e-10:
        raise RuntimeError(f"wrong result: relative error {error:.2g}")
    step = CachedStep(case)
    x = x.to(case.dtype)
    for i in range(x.shape[1]):
        step(x[:, i : i + 1])
    return lambda: step(x[:, -1:])


def package_step(case):
    layer = package_layer(case)
    x = torch.randn(1, case.window_size + 1, case.dim, dtype=case.dtype)
    _, cache = layer(x, return_cache=True)
    one = x[:, -1:]

    def step():
        nonlocal cache
        out, cache = layer(one, cache=cache, return_cache=True)
        return out

    return step


# ---- Layers of published models ------------------------------------------------------------------


def transformers_module(case, implementation):
    """The attention of a model with the case's window, and a call of it that its model makes for
    random embeddings."""
    import transformers

    sizes = {"hidden_size": case.dim, "num_attention_heads": case.heads, "num_hidden_layers": 2,
             "intermediate_size": 64, "vocab_size": 16, "max_position_embeddings": case.seqlen,
             "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if case.causal and case.right == 0:
        name = "mistral"
        sizes.update({"num_key_value_heads": case.kv_heads or case.heads, "use_cache": False,
                      "head_dim": case.dim_head, "sliding_window": case.left + 1})
    elif not case.causal and case.left == case.right and case.kv_heads in (0, case.heads):
        name = "modernbert"  # whose first layer sees all
        sizes.update({"local_attention": 2 * case.left, "cls_token_id": 1, "sep_token_id": 2})
    else:
        raise RuntimeError("a window of neither Mistral nor ModernBERT")
    torch.manual_seed(2)
    model = transformers.AutoModel.from_config(
        transformers.AutoConfig.for_model(name, **sizes), attn_implementation=implementation
    ).eval()
    names = ("self_attn", ".attn")
    module = [part for name, part in model.named_modules() if name.endswith(names)][1]
    seen = []
    module.register_forward_pre_hook(lambda _, *call: seen.append(call), with_kwargs=True)
    model(inputs_embeds=torch.randn(case.batch, case.seqlen, case.dim))
    args, kwargs = seen[0]

    def run():
        y = module(*args, **kwargs)
        return y if torch.is_tensor(y) else y[0]

    return run


def transformers_layer(implementation):
    def make(case):
        short = Case(case.name)
        short.seqlen = min(case.seqlen, 1024)
        expected = transformers_module(short, "eager")()
        difference = (transformers_module(short, implementation)() - expected).abs().max()
        if not difference <= 1e-4 * expected.abs().max():
            raise RuntimeError(f"wrong result: {difference:.2g} from the plain implementation")
        return transformers_module(case, implementation)

    return make


MODELS = {
    "transformers, sdpa": transformers_layer("sdpa"),
    "transformers, flex": transformers_layer("flex_attention"),
}
STEPS = {"local-attention, cached": package_step, "cached step": own_step}


def bar_of(case, label):
    """How many times faster than this peer local_mha is to be; None: shown beside."""
    if label == "local-attention, cached":
        return 10
    if label == "local-attention" and case.subject == "layer" and case.backward:
        return 3
    if label in MODELS:
        return 4
    return None


# ---- Measuring -----------------------------------------------------------------------------------


def relative_error(case, out, q, k, v):
    """Against single rows by the formula, in float64."""
    largest = difference = 0.0
    keys = torch.arange(case.seqlen)
    for i in (0, 1, case.window_size, case.seqlen // 2, case.seqlen - 1):
        seen = case.sees(i, keys)
        row = q[:, :, i].double()
        scores = torch.einsum("bhd,bhjd->bhj", row, k[:, :, seen].double()) * case.dim_head**-0.5
        exact = torch.einsum("bhj,bhjd->bhd", softmax(scores, -1), v[:, :, seen].double())
        largest = max(largest, exact.abs().max().item())
        difference = max(difference, (out[:, :, i].double() - exact).abs().max().item())
    return difference / largest


def median_seconds(run, budget, most=100):
    """Median over at most `most` runs that take about `budget` seconds together, three at least."""
    run()
    times = []
    while len(times) < 3 or (sum(times) < budget and len(times) < most):
        begin = time.perf_counter()
        run()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def attention_runner(case, make):
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(case.shape(), generator=generator, dtype=case.dtype) for _ in range(3))
    attend = make(case)
    error = relative_error(case, attend(q, k, v), q, k, v)
    tolerances = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 5e-2}
    if not error < tolerances[case.dtype]:
        raise RuntimeError(f"wrong result: relative error {error:.2g}")
    return lambda: attend(q, k, v)


def layer_runner(case, label, make):
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(case.batch, case.seqlen, case.dim, generator=generator, dtype=case.dtype)
    layer = package_layer(case) if label == "local-attention" else Layer(case, make(case))
    return lambda: layer(x)


class Step:
    """A step of training: forward, and back to the gradients of x and of the weights."""

    def __init__(self, case, label):
        generator = torch.Generator().manual_seed(2)
        shape = (case.batch, case.seqlen, case.dim)
        draw = lambda: torch.randn(shape, generator=generator, dtype=case.dtype)
        self.x, self.grad_y = draw().requires_grad_(), draw()
        if label == "local-attention":
            self.layer = package_layer(case)
        elif label == "naive bucketed":
            attend = naive_bucketed(case, BucketRotary(case))
            self.layer = Layer(case, attend, rotates=True)
        else:
            raise RuntimeError("does not rotate as xPos needs it")
        self.parameters = list(self.layer.parameters())
        for parameter in self.parameters:
            parameter.requires_grad_()

    def __call__(self):
        self.x.grad = None
        for parameter in self.parameters:
            parameter.grad = None
        y = self.layer(self.x)
        y.backward(self.grad_y)
        return y

    def check(self):
        """With normalized queries and keys, y is linear in x along x: Euler's theorem."""
        expected = (self().detach().double() * self.grad_y.double()).sum().item()
        got = (self.x.detach().double() * self.x.grad.double()).sum().item()
        if not abs(got - expected) <= 1e-3 * abs(expected):
            raise RuntimeError(f"wrong gradient: {got:.6g} instead of {expected:.6g}")

    def kept_bytes(self):
        """What autograd keeps from forward to backward, without the input and the weights."""
        ours = {t.untyped_storage().data_ptr() for t in [self.x, *self.parameters]}
        kept = {}

        def keep(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in ours:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            y = self.layer(self.x)
        y.backward(self.grad_y)
        return sum(kept.values())


def processor():
    try:
        with open("/proc/cpuinfo") as info:
            return next(line.split(":", 1)[1].strip() for line in info if "model name" in line)
    except (OSError, StopIteration):
        return platform.processor() or "unknown"


def peers_of(case):
    if case.token_window:
        return MODELS
    return STEPS if case.subject == "decode" else ATTENTIONS


def measure(name, label, arguments):
    """Seconds of one case by one attention, in this process, and bytes kept for the way back."""
    torch.set_num_threads(arguments.threads)
    torch.set_num_interop_threads(1)
    case = Case(name)
    make = peers_of(case)[label]
    if label in MODELS and (case.subject != "layer" or case.backward):
        raise RuntimeError("modules of transformers are measured as layers, forward")
    if case.backward:
        if case.subject != "layer" or not case.qk_rmsnorm:
            raise RuntimeError("backward is of a layer with qk_rmsnorm")
        step = Step(case, label)
        step.check()
        return median_seconds(step, arguments.seconds), step.kept_bytes()
    with torch.inference_mode():
        if label in MODELS:
            run = make(case)
        elif case.subject == "decode":
            run = make(case)
            for _ in range(100):
                run()
        elif case.subject == "layer":
            run = layer_runner(case, label, make)
        else:
            run = attention_runner(case, make)
        most = 2000 if case.subject == "decode" else 100
        return median_seconds(run, arguments.seconds, most), 0


def measure_apart(name, label, arguments):
    """The same in a process of its own: a peer that crashes or hangs must not stop the others.
    Raises RuntimeError with the reason."""
    options = ["--threads", str(arguments.threads), "--seconds", str(arguments.seconds)]
    command = [sys.executable, __file__, "--one", name, label, *options]
    try:
        child = subprocess.run(command, capture_output=True, text=True, timeout=arguments.timeout)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"not done after {arguments.timeout:g} s") from None
    if child.returncode != 0:
        lines = [line for line in child.stderr.splitlines() if line.strip()]
        raise RuntimeError(lines[-1] if lines else f"exit status {child.returncode}")
    seconds, kept = child.stdout.split()[-2:]
    return float(seconds), int(kept)


def own_seconds(name, arguments):
    """The same case by local_mha."""
    command = [arguments.against, "--wall", "--rounds", "3", "--seconds", "0.3", name]
    options = {"capture_output": True, "text": True, "check": True, "timeout": arguments.timeout}
    try:
        result = json.loads(subprocess.run(command, **options).stdout)["results"][0]
    except (OSError, subprocess.SubprocessError) as reason:
        raise RuntimeError(f"local_mha: {reason}") from reason
    if not result["correct"]:
        raise RuntimeError(f"local_mha: wrong result: relative error {result['max_error']:.2g}")
    return statistics.median(result["seconds"])


def in_turn(name, counterpart, label, arguments):
    """Seconds of the peer and bytes that it keeps, and for each round how many times faster
    local_mha is."""
    seconds, ratios = [], []
    for _ in range(arguments.rounds):
        taken, kept = measure_apart(name, label, arguments)
        seconds.append(taken)
        if arguments.against:
            ratios.append(taken / own_seconds(counterpart, arguments))
    return statistics.median(seconds), kept, ratios


def write(arguments, peak, rows):
    machine = f"{processor()}, {os.cpu_count()} cores, PyTorch {torch.__version__}"
    found = {"machine": machine, "threads": arguments.threads, "peak": peak, "rows": rows}
    with open(arguments.output, "w") as file:
        json.dump(found, file, indent=2)


def parse_arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=1, help="threads of PyTorch [1]")
    parser.add_argument("--output", default="peers.json", help="where to write [peers.json]")
    parser.add_argument("--report", help="report.json of local_mha_report, for the peak")
    parser.add_argument("--seconds", type=float, default=3, help="per case and attention [3]")
    parser.add_argument(
        "--timeout", type=float, default=180, help="seconds after which a peer is left out [180]"
    )
    parser.add_argument("--against", help="local_mha_measure, measured in turn with the peers")
    parser.add_argument("--rounds", type=int, default=1, help="times that each is measured [1]")
    parser.add_argument("--only", help="attentions whose name holds this")
    parser.add_argument("--cases", nargs="+", help="names of cases [the report's]")
    parser.add_argument("--one", nargs=2, metavar=("CASE", "ATTENTION"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    for option in ("threads", "rounds"):
        if getattr(arguments, option) < 1:
            parser.error(f"--{option}: expected at least 1, got {getattr(arguments, option)}")
    return arguments


def main():
    arguments = parse_arguments()
    if arguments.one:
        print(*measure(*arguments.one, arguments))
        return
    peak = {}
    if arguments.report:
        with open(arguments.report) as file:
            peak = json.load(file)["peak"]

    rows = []
    for name in arguments.cases or ATTENTION_CASES + LAYER_CASES + DECODE_CASES + MODEL_CASES:
        case = Case(name)
        available = peak.get(case.scalar, 0) * arguments.threads
        for label in peers_of(case):
            if arguments.only and arguments.only not in label:
                continue
            what = f"{name}, {label}"
            counterpart = name if arguments.threads == 1 else f"{name}/threads:{arguments.threads}"
            try:
                seconds, kept, ratios = in_turn(name, counterpart, label, arguments)
            except RuntimeError as reason:
                print(f"{what}: left out: {reason}", file=sys.stderr, flush=True)
                continue
            rate = case.flops() / seconds * 1e-9
            row = {
                "name": f"{what}, {arguments.threads} thread(s)",
                "case": counterpart,
                "figure": 100 * rate / available if available else rate,
                "bar": None,
                "unit": "% of peak" if available else "GFLOP/s",
                "met": None,
                "tokens_per_second": case.tokens() / seconds,
            }
            if kept:
                row["kept_megabytes"] = kept * 1e-6
            rows.append(row)
            beside = f", {kept * 1e-6:.0f} MB kept" if kept else ""
            if ratios:
                times = statistics.median(ratios)
                bar = bar_of(case, label)
                met = None if bar is None else times >= bar
                row["local_mha_is_faster"] = {
                    "times": times, "rounds": ratios, "bar": bar, "met": met
                }
                beside += f", local_mha {times:.1f} times faster"
                beside += f" ({min(ratios):.1f} to {max(ratios):.1f})"
                beside += "" if bar is None else f", bar {bar}: {'met' if met else 'NOT MET'}"
            print(f"{what}: {row['figure']:.2f} {row['unit']}{beside}", flush=True)
            # After each row, so that what is done is kept if the rest is broken off.
            write(arguments, peak, rows)


if __name__ == "__main__":
    main()
