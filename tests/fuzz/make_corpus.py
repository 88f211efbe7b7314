#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Writes the fuzz targets' corpus: small inputs that reach far, most of them sound.

    make_corpus.py [FOLDER]        default: corpus/ beside this script
"""

import json
import pathlib
import struct
import sys

SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1,
         "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
         "C64": 8, "F8_E5M2": 1, "F8_E4M3": 1, "F8_E8M0": 1, "F6_E3M2": 0.75, "F6_E2M3": 0.75,
         "F4": 0.5, "C128": 16}


def safetensors(tensors, metadata=None, padding=0):
    """tensors: {name: (dtype, shape[, bytes])}"""
    header = {} if metadata is None else {"__metadata__": metadata}
    data = b""
    for name, (dtype, shape, *given) in tensors.items():
        count = 1
        for extent in shape:
            count *= extent
        size = int(count * SIZES[dtype])
        content = given[0] if given else bytes(i % 2 for i in range(size))
        assert len(content) == size, name
        header[name] = {"dtype": dtype, "shape": shape,
                        "data_offsets": [len(data), len(data) + size]}
        data += content
    text = json.dumps(header, separators=(",", ":")).encode() + b" " * padding
    return struct.pack("<Q", len(text)) + text + data


def case(kind, kwargs, **more):
    return {"case": json.dumps({"kind": kind, "kwargs": kwargs, **more})}


def inv_freq(dim_head):
    frequencies = [10000 ** (-2 * m / dim_head) for m in range(dim_head // 2)]
    return "F32", [dim_head // 2], struct.pack(f"<{dim_head // 2}f", *frequencies)


def layer(prefix, dim, inner, heads=0, dim_head=2, norm=False, qk=False, rotary=True, fused=True):
    tensors = {}
    if qk:
        tensors |= {"q_scale": ("F32", [dim_head]), "k_scale": ("F32", [dim_head])}
    if norm:
        tensors |= {"norm.weight": ("F16", [dim]), "norm.bias": ("BF16", [dim])}
    if fused:
        tensors["to_qkv.weight"] = ("F32", [3 * inner, dim])
    else:
        tensors |= {f"to_{part}.weight": ("F16", [inner, dim]) for part in "qkv"}
    if rotary:
        tensors["attn_fn.rel_pos.inv_freq"] = inv_freq(dim_head)
    if heads:
        tensors |= {"to_v_gate.0.weight": ("F32", [heads, dim]), "to_v_gate.0.bias": ("F32", [heads])}
    tensors["to_out.weight"] = ("F64", [dim, inner])
    return {prefix + name: tensor for name, tensor in tensors.items()}


def model(prefix, branch, dim, inner, hidden, dynamic):
    tensors = {"token_emb.weight": ("F16", [3, dim]), "pos_emb.weight": ("F16", [2, dim])}
    tensors |= layer(f"layers.0.0.{branch}", dim, inner, norm=True, rotary=not dynamic)
    tensors |= {f"layers.0.1.{branch}{name}": ("F16", shape) for name, shape in {
        "0.weight": [dim], "0.bias": [dim], "1.weight": [2 * hidden, dim],
        "4.weight": [dim, hidden]}.items()}
    if dynamic:
        half = dim // 2
        tensors |= {f"dynamic_pos_bias.mlp.{name}": ("F16", shape) for name, shape in {
            "0.weight": [half, 1], "0.bias": [half], "2.weight": [half, half], "2.bias": [half],
            "4.weight": [1, half], "4.bias": [1]}.items()}
    tensors |= {"to_logits.0.weight": ("F16", [dim]), "to_logits.0.bias": ("F16", [dim]),
                "to_logits.1.weight": ("F16", [3, dim])}
    return {prefix + name: tensor for name, tensor in tensors.items()}


def safetensors_files():
    small = {"dim": 2, "window_size": 2, "heads": 1, "dim_head": 2}
    small_model = {"num_tokens": 3, "max_seq_len": 2, "dim": 2, "depth": 1, "heads": 1,
                   "dim_head": 2, "ff_mult": 1, "local_attn_window_size": 2}
    one = {"x": ("F32", [1])}
    yield "nothing", safetensors({})
    yield "metadata", safetensors({}, {"key": "text", "\u00e9": "\n"})
    yield "number", safetensors({"x": ("F64", [])})
    yield "empty_tensors", safetensors({"a": ("F32", [0]), "b": ("I8", [3, 0, 2]), "c": ("U8", [1])})
    yield "dtypes", safetensors({dtype: (dtype, [1, 4]) for dtype in SIZES if dtype != "C128"},
                                padding=3)
    yield "other_dtype", safetensors({"a": ("C128", [2]), "b": ("F32", [1])})
    yield "unaligned", safetensors({"a": ("U8", [1]), "b": ("F64", [2]), "c": ("BF16", [1, 1, 1])})
    yield "mask", safetensors({"m": ("BOOL", [2, 2], b"\0\1\1\0"), "n": ("BOOL", [1], b"\2")})
    yield "large_unsigned", safetensors({"u": ("U64", [1], b"\xff" * 8)})
    yield "special_floats", safetensors({
        "h": ("F16", [4], struct.pack("<4H", 0x7c00, 0xfe01, 0x8001, 0x7bff)),
        "b": ("BF16", [3], struct.pack("<3H", 0xff80, 0x7fc0, 0x0001)),
        "d": ("F64", [2], struct.pack("<2d", float("nan"), 1e300))})
    escaped = b'{"\\u0061\\n\\"\\ud83d\\ude00":{"dtype":"U8","shape":[],"data_offsets":[0,1]}}'
    yield "escaped_name", struct.pack("<Q", len(escaped)) + escaped + b"x"
    yield "attention", safetensors({"param/rel_pos.inv_freq": inv_freq(4)}, case(
        "LocalAttention", {"window_size": 2, "dim": 4, "use_xpos": True}, call={"window_size": 4}))
    yield "layer", safetensors(layer("param/", 2, 2), case("LocalMHA", small, note="a layer"))
    yield "layer_with_all", safetensors(
        layer("", 2, 2, heads=1, norm=True, qk=True),
        case("LocalMHA", small | {"prenorm": True, "qk_rmsnorm": True, "causal": True,
                                  "gate_values_per_head": True, "use_xpos": True}))
    yield "layer_apart", safetensors(layer("", 2, 2, fused=False, rotary=False),
                                     case("LocalMHA", small | {"use_rotary_pos_emb": False}))
    yield "model", safetensors(model("", "branch.", 2, 2, 1, False),
                               case("LocalTransformer", small_model | {"num_residual_streams": 1}))
    yield "model_old", safetensors(model("param/", "", 2, 2, 1, True),
                                   case("LocalTransformer",
                                        small_model | {"use_dynamic_pos_bias": True}))
    wrapped = {name.replace("branch.", "branch._orig_mod."): tensor
               for name, tensor in model("module.", "branch.", 2, 2, 1, False).items()}
    wrapped.pop("module.to_logits.1.weight")
    yield "model_wrapped_and_tied", safetensors(
        wrapped, case("LocalTransformer", small_model) | {
            "module.to_logits.1.weight": "module.token_emb.weight", "format": "pt"})
    yield "rounded_buffer", safetensors(
        layer("", 2, 4, dim_head=4) | {"attn_fn.rel_pos.inv_freq": ("BF16", [2])},
        case("LocalMHA", small | {"dim_head": 4}))
    yield "case_deep", safetensors(one, {"case": "[" * 200})
    yield "overlap", safetensors({"a": ("U8", [2]), "b": ("U8", [2])}).replace(b"[2,4]", b"[1,3]")
    yield "cut", safetensors({"a": ("F32", [2])})[:-1]
    yield "more", safetensors(one) + b"x"
    yield "huge_header", struct.pack("<Q", 1 << 60) + b"{}"
    yield "git_lfs_pointer", b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n"
    yield "zip", b"PK\3\4" + bytes(40)
    yield "huge_shape", safetensors(one).replace(b"[1]", b"[4294967296,4294967296]")


def kwargs_texts():
    attention = {"window_size": 6}
    layer_kwargs = {"dim": 24, "window_size": 6}
    model_kwargs = {"num_tokens": 32, "max_seq_len": 64, "dim": 24, "depth": 2}
    for name, kwargs in {
            "attention": attention,
            "attention_all": attention | {
                "causal": False, "look_backward": 2, "look_forward": 3, "dropout": 0.25,
                "shared_qk": True, "rel_pos_emb_config": [8, 2], "dim": 8, "autopad": True,
                "exact_windowsize": True, "scale": 0.5, "use_rotary_pos_emb": True,
                "use_xpos": True, "xpos_scale_base": 2.5},
            "attention_null": attention | {"dim": None, "scale": None, "look_forward": None},
            "layer": layer_kwargs,
            "layer_all": layer_kwargs | {
                "dim_head": 8, "heads": 3, "dropout": 0.1, "causal": True, "prenorm": True,
                "qk_rmsnorm": True, "qk_scale": 4, "use_xpos": True, "xpos_scale_base": 16,
                "exact_windowsize": False, "look_backward": 2, "look_forward": 0,
                "use_rotary_pos_emb": True, "gate_values_per_head": True, "shared_qk": False},
            "layer_xpos": layer_kwargs | {"use_xpos": True},
            "layer_window_1": {"dim": 2, "window_size": 1, "use_xpos": True},
            "model": model_kwargs,
            "model_all": model_kwargs | {
                "causal": False, "local_attn_window_size": 7, "dim_head": 10, "heads": 3,
                "ff_mult": 2.5, "attn_dropout": 0.1, "ff_dropout": 0.2, "ignore_index": -100,
                "use_xpos": True, "xpos_scale_base": 16.5, "num_residual_streams": 1,
                "global_attn_layer": None, "qk_rmsnorm": True, "look_forward": 3},
            "model_dynamic": model_kwargs | {"use_dynamic_pos_bias": True, "use_xpos": True},
            "model_streams": model_kwargs | {"num_residual_streams": 4},
            "huge": {"dim": 1 << 40, "window_size": (1 << 63) - 1, "heads": 1 << 62},
            "unknown": layer_kwargs | {"window": 3},
            "wrong_types": {"dim": "24", "window_size": 6.5, "causal": 1, "dropout": []},
    }.items():
        yield name, json.dumps(kwargs).encode()
    yield "empty", b"{}"
    yield "array", b"[]"
    yield "deep", b'{"dim":' * 40
    yield "twice", b'{"dim":1,"dim":2}'
    yield "numbers", b'{"dim":-0,"window_size":1e1,"dropout":1e-320,"qk_scale":-0.0}'


def main():
    folder = pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else \
        pathlib.Path(__file__).resolve().parent / "corpus"
    for target, files in (("safetensors", safetensors_files()), ("kwargs", kwargs_texts())):
        (folder / target).mkdir(parents=True, exist_ok=True)
        for name, content in files:
            (folder / target / name).write_bytes(content)


if __name__ == "__main__":
    main()
