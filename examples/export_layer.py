#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Writes a Python LocalMHA, LocalAttention or LocalTransformer, or the attention layer of a
published model, with inputs and outputs, to a file that verify_layer checks.

As a script, for a layer with random weights:

    export_layer.py case.safetensors --kind LocalMHA --kwargs '{"dim": 64, "window_size": 16}'

or for a module that torch.save() wrote:

    export_layer.py case.safetensors --module layer.pt

or for the attention layer of a model that transformers loads, by its name or folder:

    export_layer.py case.safetensors --model mistralai/Mistral-7B-v0.1 --layer 0 --seqlen 200

or of a small one of random weights, by its model_type:

    export_layer.py case.safetensors --model mistral --config '{"hidden_size": 64,
        "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 1,
        "intermediate_size": 64, "vocab_size": 100, "sliding_window": 8}'

With --gradients, those of inputs and weights, too.

As a module, for a layer of your own and inputs that you choose:

    from export_layer import export_layer
    export_layer(layer, "case.safetensors", x, mask=mask)

Then:

    verify_layer case.safetensors

The outputs are computed in float64 by a copy of the layer in evaluation mode, so that they say what
is right to the last digit; the layer itself is left alone, and its weights are written as they are.
Frequencies of the rotary embedding, which Python rounds to float32, are recomputed in float64 for
that. The package masks the padding that it adds only when it gets a mask, so it always gets one.
For queries that see no key, Python gives the mean of all keys and local_mha gives zeros: choose a
mask that leaves everyone something to see.

Needs torch, and local-attention where a layer is made or loaded, or transformers where --model is:

    pip install torch local-attention transformers
"""

import argparse
import contextlib
import copy
import ctypes
import importlib
import inspect
import json
import re
import sys

try:
    import torch
except ModuleNotFoundError:
    torch = None  # --help works without

_DTYPES = {
    "torch.float64": "F64", "torch.float32": "F32", "torch.float16": "F16",
    "torch.bfloat16": "BF16", "torch.int64": "I64", "torch.int32": "I32", "torch.int16": "I16",
    "torch.int8": "I8", "torch.uint8": "U8", "torch.bool": "BOOL",
}

KINDS = ("LocalMHA", "LocalAttention", "LocalTransformer")


def write_safetensors(path, tensors, metadata):
    """Writes a dict of tensors and a dict of texts in the safetensors format."""
    header = {"__metadata__": metadata}
    parts = []
    offset = 0
    # The widest elements first, so that all are aligned.
    for name in sorted(tensors, key=lambda name: (-tensors[name].element_size(), name)):
        tensor = tensors[name].detach().cpu().contiguous()
        size = tensor.numel() * tensor.element_size()
        parts.append(ctypes.string_at(tensor.data_ptr(), size) if size else b"")
        header[name] = {"dtype": _DTYPES[str(tensor.dtype)], "shape": list(tensor.shape),
                        "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for part in parts:
            file.write(part)


def _attention_kwargs(attention):
    kwargs = {"look_backward": attention.look_backward, "look_forward": attention.look_forward,
              "use_rotary_pos_emb": attention.rel_pos is not None}
    if attention.rel_pos is not None and attention.use_xpos:
        kwargs["use_xpos"] = True
        kwargs["xpos_scale_base"] = attention.rel_pos.scale_base
    return kwargs


def _mha_kwargs(layer):
    attention = layer.attn_fn
    inner = layer.to_out.in_features
    kwargs = {"dim": layer.to_out.out_features, "window_size": attention.window_size,
              "dim_head": inner // layer.heads, "heads": layer.heads, "causal": attention.causal,
              "prenorm": layer.norm is not None, "qk_rmsnorm": layer.qk_rmsnorm,
              "exact_windowsize": attention.exact_windowsize}
    if layer.qk_rmsnorm:
        kwargs["qk_scale"] = attention.scale
    if getattr(layer, "to_v_gate", None) is not None:
        kwargs["gate_values_per_head"] = True
    return {**kwargs, **_attention_kwargs(attention)}


def infer_kwargs(module):
    """The keyword arguments that a module was made with, as its attributes tell them."""
    kind = type(module).__name__
    if kind == "LocalMHA":
        return _mha_kwargs(module)
    if kind == "LocalAttention":
        kwargs = {"window_size": module.window_size, "causal": module.causal,
                  "shared_qk": module.shared_qk, "autopad": module.autopad,
                  "exact_windowsize": module.exact_windowsize, "scale": module.scale}
        if module.rel_pos is not None:
            kwargs["dim"] = 2 * module.rel_pos.inv_freq.numel()
        return {**kwargs, **_attention_kwargs(module)}
    if kind == "LocalTransformer":
        num_tokens, dim = module.token_emb.weight.shape
        connection = module.layers[0][0] if len(module.layers) > 0 else None
        streams = len(connection.static_beta) if hasattr(connection, "static_beta") else 1
        kwargs = {"num_tokens": num_tokens, "max_seq_len": module.pos_emb.weight.shape[0],
                  "dim": dim, "depth": len(module.layers), "num_residual_streams": streams,
                  "ignore_index": module.ignore_index,
                  "local_attn_window_size": module.local_attn_window_size,
                  "use_dynamic_pos_bias": module.dynamic_pos_bias is not None}
        if len(module.layers) == 0:
            return kwargs
        attention, feed_forward = (getattr(part, "branch", part) for part in module.layers[0])
        hidden = feed_forward[1].out_features // 2
        # int(dim * ff_mult * 2 / 3) is the hidden width.
        kwargs["ff_mult"] = next(mult for mult in (4, hidden * 3 / (2 * dim),
                                                   (hidden + 0.5) * 3 / (2 * dim))
                                 if int(dim * mult * 2 / 3) == hidden)
        layer = _mha_kwargs(attention)
        for name in ("dim", "window_size", "prenorm", "use_rotary_pos_emb"):
            layer.pop(name)
        return {**kwargs, **layer}
    raise ValueError(f"module: expected one of {', '.join(KINDS)}, got {kind}")


def _in_float64(module):
    """A copy in float64, evaluation mode and on the CPU, that rounds nothing on its way."""
    module = copy.deepcopy(module).cpu().double().eval()
    for part in module.modules():
        buffers = part._buffers
        if buffers.get("inv_freq") is not None:
            dim = 2 * buffers["inv_freq"].numel()
            even = torch.arange(0, dim, 2, dtype=torch.float64)
            buffers["inv_freq"] = 10000.0 ** (-even / dim)
            if buffers.get("scale") is not None:
                buffers["scale"] = (even + 0.4 * dim) / (1.4 * dim)
        if isinstance(part, torch.nn.Linear):
            # The dynamic position bias makes its distances in float32.
            part.register_forward_pre_hook(lambda _, args: tuple(arg.double() for arg in args))
    return module


def _as_float64(tensor):
    return None if tensor is None else tensor.detach().cpu().double()


def _gradients(module):
    """Those of the parameters, under the names that verify_layer has: of separate projections as
    one matrix, of a transformer's layers with the `branch.` that older versions have not."""
    found = {name: torch.zeros_like(weight) if weight.grad is None else weight.grad
             for name, weight in module.named_parameters()}
    for name in [name for name in found if name.endswith("to_q.weight")]:
        prefix = name[:-len("q.weight")]
        found[prefix + "qkv.weight"] = torch.cat(
            [found.pop(f"{prefix}{part}.weight") for part in "qkv"])
    return {re.sub(r"^(layers\.\d+\.[01]\.)(?!branch\.)", r"\1branch.", name): gradient
            for name, gradient in found.items()}


def export_layer(module, path, *inputs, mask=None, attn_bias=None, window_size=None, kind=None,
                 kwargs=None, note="", reference=None, gradients=False):
    """Writes a module with its weights, inputs and outputs.

    module     LocalMHA, LocalAttention or LocalTransformer, or whatever has their state dict and
               call, such as zeta's LocalMHA
    path       of the file to write
    inputs     LocalMHA: x [B, N, dim]; LocalAttention: q, k, v [B, H, N, D]; LocalTransformer:
               tokens [B, N + 1], of which the last N are the labels of the loss; nothing: the
               weights alone are written
    mask       [B, N], True = attend, as the Python modules take it
    attn_bias  [heads, w, (1 + look_backward + look_forward) * w]
    window_size  of the call, LocalAttention with xPos only
    kind       one of KINDS; None: the name of the module's class
    kwargs     the constructor's keyword arguments; None: read off the module
    note       for people
    reference  a module with the same weights, called in the module's place: zeta's LocalMHA, for
               one, fails at every call, and local-attention's takes its state dict
    gradients  whether to write gradients, too: of the loss for a LocalTransformer, and for the
               other kinds of inputs and weights for a random gradient of the output
    """
    kind = kind or type(module).__name__
    if kind not in KINDS:
        raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {kind}")
    names = {"LocalMHA": ["x"], "LocalAttention": ["q", "k", "v"], "LocalTransformer": ["tokens"]}
    if inputs and len(inputs) != len(names[kind]):
        raise ValueError(f"inputs: expected {', '.join(names[kind])}, got {len(inputs)} tensors")
    if gradients and not inputs:
        raise ValueError("gradients: expected inputs, got none")
    kwargs = infer_kwargs(module) if kwargs is None else kwargs

    tensors = {"param/" + name: value for name, value in module.state_dict().items()}
    if inputs:
        run = _in_float64(module if reference is None else reference)
        if kind == "LocalTransformer":
            inputs = [tensor.detach().cpu().long() for tensor in inputs]
            batch, length = inputs[0].shape
            seqlen = length - 1
        else:
            inputs = [_as_float64(tensor) for tensor in inputs]
            if kind == "LocalAttention" and any(tensor.dim() != 4 for tensor in inputs):
                raise ValueError("q, k, v: expected four dimensions [B, H, N, D], got " +
                                 ", ".join(str(list(tensor.shape)) for tensor in inputs))
            batch, seqlen = inputs[0].shape[0], inputs[0].shape[-2]
        keep = torch.ones(batch, seqlen, dtype=torch.bool) if mask is None else mask.cpu().bool()
        options = {"mask": keep}
        if attn_bias is not None:
            options["attn_bias"] = _as_float64(attn_bias)
        if window_size is not None:
            options["window_size"] = window_size
        # What gradients are for, besides the weights.
        leaves = {} if kind == "LocalTransformer" else dict(zip(names[kind], inputs))
        if attn_bias is not None:
            leaves["attn_bias"] = options["attn_bias"]
        if gradients:
            for leaf in [*leaves.values(), *run.parameters()]:
                leaf.requires_grad_()
                leaf.grad = None  # what a training left
        with torch.set_grad_enabled(gradients):
            if kind == "LocalTransformer":
                tokens = inputs[0]
                tensors["output/logits"] = run(tokens[:, :-1], **options)
                loss = run(tokens, return_loss=True, **options)
                tensors["output/loss"] = loss.reshape(1)
                if gradients:
                    loss.backward()
            else:
                y = tensors["output/y"] = run(*inputs, **options)
                if gradients:
                    generator = torch.Generator().manual_seed(0)
                    grad_y = torch.randn(y.shape, dtype=y.dtype, generator=generator)
                    tensors["input/grad_y"] = grad_y
                    y.backward(grad_y)
        if gradients:
            for name, leaf in leaves.items():
                tensors["grad/" + name] = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
            for name, gradient in _gradients(run).items():
                tensors["grad/param/" + name] = gradient
        for name, value in zip(names[kind], inputs):
            tensors["input/" + name] = value
        if mask is not None:
            tensors["input/keep_mask"] = keep.to(torch.uint8)
        if attn_bias is not None:
            tensors["input/attn_bias"] = options["attn_bias"]

    case = {"kind": kind, "kwargs": kwargs, "note": note,
            "call": {} if window_size is None else {"window_size": window_size}}
    write_safetensors(path, tensors, {"case": json.dumps(case),
                                      "source": f"export_layer.py, torch {torch.__version__}"})


# Children by which an attention module is known.
_PROJECTIONS = {"q_proj", "qkv_proj", "Wqkv", "query", "q"}


def find_attention(model, layer):
    """Name and module of a layer's self-attention: the first one whose name has the number."""
    names = []
    for name, module in model.named_modules():
        number = re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)
        children = {child for child, _ in module.named_children()}
        if number is None or "vision" in name or not children & _PROJECTIONS:
            continue
        if int(number.group(1)) == layer:
            return name, module
        names.append(name)
    raise ValueError(f"--layer: expected a layer of the model ({', '.join(names[:50])}), "
                     f"got {layer}")


@contextlib.contextmanager
def _float64_for_float32():
    """Models turn positions, normalize and take the softmax in float32 whatever their weights are:
    here, in float64."""
    kept = torch.float32, torch.float, torch.Tensor.float, torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.float32 = torch.float = torch.float64
    torch.Tensor.float = torch.Tensor.double
    try:
        yield
    finally:
        torch.float32, torch.float, torch.Tensor.float = kept[:3]
        torch.set_default_dtype(kept[3])


def _call_of(model, module, batch, seqlen, generator):
    """The arguments that a model gives its module for random embeddings, and a mask of global rows
    if it has them."""
    seen = []
    handle = module.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((args, kwargs)), with_kwargs=True)
    config = model.config
    size = getattr(config, "hidden_size", None) or config.d_model
    x = torch.randn(batch, seqlen, size, generator=generator, dtype=torch.float64)
    global_mask = None
    with torch.no_grad():
        if config.model_type == "mimi":
            model.encoder_transformer(x)
        else:
            stack = model.get_encoder() if config.is_encoder_decoder else model
            options = {}
            if config.model_type in ("longformer", "led"):
                global_mask = torch.zeros(batch, seqlen, dtype=torch.long)
                global_mask[:, 0] = 1
                options["global_attention_mask"] = global_mask
            stack(inputs_embeds=x, **options)
    handle.remove()
    if not seen:
        raise ValueError("--layer: expected one that the model calls, got one that it does not")
    return (*seen[0], global_mask)


def _rotary_of(args, kwargs):
    """Frequencies and the factor on cosine and sine, as the cosines and sines that a module is
    given tell them: those of position 1 are of the frequencies, and those of 0 the factor."""
    for value in [*args, *kwargs.values()]:
        if isinstance(value, tuple) and len(value) == 2 and all(map(torch.is_tensor, value)):
            cos, sin = (tensor.reshape(-1, *tensor.shape[-2:])[0].double() for tensor in value)
            break
    else:
        return None, None
    half = cos.shape[-1] // 2
    if torch.equal(cos[:, :half], cos[:, half:]):
        cos, sin = cos[:, :half], sin[:, :half]
    elif torch.equal(cos[:, 0::2], cos[:, 1::2]):
        cos, sin = cos[:, 0::2], sin[:, 0::2]
    return torch.atan2(sin[1], cos[1]), cos[0, 0].item()


def export_model_layer(model, path, layer, batch=2, seqlen=50, seed=0, gradients=False):
    """Writes the attention layer of a model of transformers, with what the model gives it for
    random embeddings, and what it makes of that."""
    if seqlen < 2:
        raise ValueError(f"seqlen: expected at least 2, got {seqlen}")
    import transformers

    generator = torch.Generator().manual_seed(seed)
    model = copy.deepcopy(model).cpu().double().eval().requires_grad_(False)
    model.config.use_cache = False
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # the others have no float64
    name, module = find_attention(model, layer)
    window = getattr(model.config, "sliding_window", None)
    if isinstance(window, int) and window >= seqlen:
        print(f"export_layer.py: {seqlen} positions are all within the window of {window}: a "
              "longer --seqlen says more", file=sys.stderr)
    with _float64_for_float32():
        args, kwargs, global_mask = _call_of(model, module, batch, seqlen, generator)
        args = list(args)
        given = kwargs.get("hidden_states", args[0] if args else None)
        if given is None or given.dim() != 3:
            raise ValueError(f"{name}: expected hidden states [B, N, dim], got another call")
        x = given.detach().clone()
        if "hidden_states" in kwargs:
            kwargs["hidden_states"] = x
        else:
            args[0] = x
        weights = dict(module.named_parameters())
        for leaf in [x, *weights.values()]:
            leaf.requires_grad_(gradients)
        with torch.set_grad_enabled(gradients):
            y = module(*args, **kwargs)
            y = y if torch.is_tensor(y) else y[0]
        tensors = {"param/" + key: value for key, value in module.state_dict().items()}
        # LongT5's first layer holds the table of all.
        table = "relative_attention_bias.weight"
        if model.config.model_type == "longt5" and "param/" + table not in tensors:
            first = find_attention(model, 0)[1]
            tensors["param/" + table] = first.state_dict()[table]
        tensors.update({"input/x": x, "output/y": y})
        if gradients:
            grad_y = torch.randn(y.shape, dtype=y.dtype, generator=generator)
            tensors["input/grad_y"] = grad_y
            found = torch.autograd.grad(y, [x, *weights.values()], grad_y, allow_unused=True)
            for key, leaf, gradient in zip(["x", *("param/" + key for key in weights)],
                                           [x, *weights.values()], found):
                tensors["grad/" + key] = torch.zeros_like(leaf) if gradient is None else gradient
        frequencies, factor = _rotary_of(args, kwargs)
        if frequencies is not None:
            tensors["input/inv_freq"] = frequencies
        if global_mask is not None:
            tensors["input/global_mask"] = global_mask.to(torch.uint8)

    config = getattr(model.config, "text_config", None) or model.config
    case = {"kind": type(module).__name__, "family": config.model_type, "layer": layer,
            "config": json.loads(config.to_json_string(use_diff=False)), "module": name,
            "transformers": transformers.__version__}
    if factor is not None:
        case["rotary_scale"] = factor
    write_safetensors(path, tensors, {"case": json.dumps(case),
                                      "source": f"export_layer.py, torch {torch.__version__}"})


def load_model(model, config=None, seed=0):
    """A model of transformers by its name or folder; with a configuration, one of random weights
    by its model_type."""
    try:
        import transformers
    except ModuleNotFoundError:
        raise ImportError("--model needs transformers, which is not installed: "
                          "pip install transformers") from None
    if config is None:
        return transformers.AutoModel.from_pretrained(model, attn_implementation="eager")
    torch.manual_seed(seed)
    made = transformers.AutoModel.from_config(
        transformers.AutoConfig.for_model(model, **config), attn_implementation="eager")
    with torch.no_grad():
        for weight in made.parameters():  # many are 0 or 1 at first
            weight += 0.1 * torch.randn_like(weight)
    return made


def _random_inputs(kind, module, kwargs, batch, seqlen, generator):
    if kind == "LocalTransformer":
        seqlen = min(seqlen, kwargs["max_seq_len"])
        return [torch.randint(kwargs["num_tokens"], (batch, seqlen + 1), generator=generator)]
    if kind == "LocalMHA":
        return [torch.randn(batch, seqlen, module.to_out.out_features, generator=generator)]
    if not module.autopad:
        seqlen += -seqlen % module.window_size
    shape = (batch, 2, seqlen, kwargs.get("dim") or 8)
    return [torch.randn(shape, generator=generator) for _ in range(3)]


def _construct(kind, package, kwargs):
    modules = [package, package + ".transformer"]
    for name in modules:
        try:
            module_class = getattr(importlib.import_module(name), kind, None)
        except ModuleNotFoundError:
            if name == package:
                raise
            module_class = None
        if module_class is not None:
            break
    else:
        raise ValueError(f"--package: expected one with {kind}, got {package}")
    # The package's default changed from version to version: the file says which it is.
    streams = inspect.signature(module_class.__init__).parameters.get("num_residual_streams")
    if streams is not None and streams.default is not inspect.Parameter.empty:
        kwargs.setdefault("num_residual_streams", streams.default)
    return module_class(**kwargs)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", metavar="CASE.safetensors", help="the file to write")
    parser.add_argument("--kind", choices=KINDS, help="what to make, or what --module is")
    parser.add_argument("--kwargs", type=json.loads, metavar="JSON",
                        help="the constructor's keyword arguments; with --module: read off it")
    parser.add_argument("--module", metavar="LAYER.pt",
                        help="a module that torch.save() wrote; loading one runs code that it "
                        "holds, so take none that you do not trust")
    parser.add_argument("--package", default="local_attention",
                        help="where --kind is imported from (%(default)s)")
    parser.add_argument("--reference", metavar="PACKAGE",
                        help="where a layer of the same kind is imported from that takes the "
                        "weights and computes the outputs, if the first cannot be called (zeta's)")
    parser.add_argument("--model", metavar="NAME",
                        help="a model that transformers loads, by its name or folder: the "
                        "attention of one of its layers is written")
    parser.add_argument("--layer", type=int, default=0, help="of --model (%(default)s)")
    parser.add_argument("--config", type=json.loads, metavar="JSON",
                        help="makes --model one of random weights with this configuration; its "
                        "name is a model_type")
    parser.add_argument("--batch", type=int, default=2, help="sequences (%(default)s)")
    parser.add_argument("--seqlen", type=int, default=50, help="positions (%(default)s)")
    parser.add_argument("--lengths", type=json.loads, metavar="JSON",
                        help="positions of each sequence that are not padding, [40, 50]")
    parser.add_argument("--seed", type=int, default=0, help="of weights and inputs (%(default)s)")
    parser.add_argument("--weights-only", action="store_true",
                        help="write no inputs and outputs")
    parser.add_argument("--gradients", action="store_true",
                        help="write gradients of inputs and weights, too: of a LocalTransformer's "
                        "loss, of another layer for a random gradient of its output")
    args = parser.parse_args()
    if args.gradients and args.weights_only:
        parser.error("--gradients: expected without --weights-only")
    if args.model and (args.module or args.kind or args.lengths or args.weights_only):
        parser.error("--model: expected without --module, --kind, --lengths and --weights-only")
    if args.config is not None and not args.model:
        parser.error("--config: expected with --model")
    if torch is None:
        sys.exit("export_layer.py: needs torch, which is not installed: pip install torch")

    if args.model:
        return export_model_layer(load_model(args.model, args.config, args.seed), args.path,
                                  args.layer, args.batch, args.seqlen, args.seed, args.gradients)
    torch.manual_seed(args.seed)
    if args.module:
        module = torch.load(args.module, map_location="cpu", weights_only=False)
        kind = args.kind or type(module).__name__
    elif args.kind and args.kwargs is not None:
        kind = args.kind
        module = _construct(kind, args.package, args.kwargs)
    else:
        parser.error("expected --model, or --module, or --kind and --kwargs")
    kwargs = args.kwargs if args.kwargs is not None else infer_kwargs(module)

    inputs, mask = [], None
    if not args.weights_only:
        generator = torch.Generator().manual_seed(args.seed)
        inputs = _random_inputs(kind, module, kwargs, args.batch, args.seqlen, generator)
        if args.lengths is not None:
            seqlen = inputs[0].shape[1] - 1 if kind == "LocalTransformer" else inputs[0].shape[-2]
            mask = torch.arange(seqlen) < torch.tensor(args.lengths)[:, None]
    reference = None
    if args.reference:
        reference = _construct(kind, args.reference, dict(kwargs))
        reference.load_state_dict(module.state_dict())
    export_layer(module, args.path, *inputs, mask=mask, kind=kind, kwargs=kwargs,
                 reference=reference, gradients=args.gradients)


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError, TypeError, AssertionError, ImportError, RuntimeError) as error:
        sys.exit(f"export_layer.py: {error}")
