#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Writes optimizer.safetensors: what PyTorch makes of clipping, AdamW and cross entropy.

    python make_optimizer.py optimizer.safetensors

Needs PyTorch and NumPy.
"""

import json
import struct
import sys

import numpy as np
import torch
import torch.nn.functional as F

IGNORE_INDEX = -1
LEARNING_RATE = 1e-3
STEPS = 5


def random(generator, *shape, scale=1.0):
    """Numbers that a float holds exactly, so that every precision computes from the same ones."""
    numbers = torch.randn(*shape, generator=generator, dtype=torch.float64) * scale
    return numbers.float().double()


def clipping(generator):
    a = torch.nn.Parameter(torch.zeros(3, 4, dtype=torch.float64))
    b = torch.nn.Parameter(torch.zeros(5, dtype=torch.float64))
    a.grad = random(generator, 3, 4, scale=2.0)
    b.grad = random(generator, 5, scale=2.0)
    max_norm = 1.5
    tensors = {"grad_a": a.grad.clone(), "grad_b": b.grad.clone()}
    norm = torch.nn.utils.clip_grad_norm_([a, b], max_norm)
    assert norm > max_norm, "nothing was clipped"
    tensors |= {
        "max_norm": torch.tensor([max_norm], dtype=torch.float64),
        "norm": norm.reshape(1),
        "clipped_a": a.grad,
        "clipped_b": b.grad,
    }
    return tensors


def adamw(generator):
    """The learning rate is PyTorch's default, as is everything else."""
    a = torch.nn.Parameter(random(generator, 3, 4))
    b = torch.nn.Parameter(random(generator, 5))
    tensors = {"param_a": a.detach().clone(), "param_b": b.detach().clone()}
    # Gradients of very different sizes, one of which is 0 at first.
    sizes = torch.logspace(-4, 2, 12, dtype=torch.float64).reshape(3, 4)
    grad_a = (random(generator, STEPS, 3, 4) * sizes).float().double()
    grad_b = random(generator, STEPS, 5)
    grad_b[0, 2] = 0
    optimizer = torch.optim.AdamW([a, b])
    defaults = optimizer.defaults
    assert defaults["lr"] == LEARNING_RATE and defaults["betas"] == (0.9, 0.999)
    assert defaults["eps"] == 1e-8 and defaults["weight_decay"] == 0.01
    after_a, after_b = [], []
    for step in range(STEPS):
        a.grad, b.grad = grad_a[step].clone(), grad_b[step].clone()
        optimizer.step()
        after_a.append(a.detach().clone())
        after_b.append(b.detach().clone())
    tensors |= {
        "grad_a": grad_a,
        "grad_b": grad_b,
        "after_a": torch.stack(after_a),
        "after_b": torch.stack(after_b),
    }
    return tensors


def cross_entropy(generator):
    logits = random(generator, 2, 7, 11, scale=3.0).requires_grad_()
    labels = torch.randint(0, 11, (2, 7), generator=generator)
    labels[0, 0] = labels[0, 4] = labels[1, 6] = IGNORE_INDEX
    loss = F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORE_INDEX)
    loss.backward()
    return {
        "logits": logits.detach(),
        "labels": labels,
        "loss": loss.detach().reshape(1),
        "grad": logits.grad,
    }


def write(path, tensors, metadata):
    header, data = {"__metadata__": metadata}, b""
    for name, tensor in tensors.items():
        array = np.ascontiguousarray(tensor.detach().numpy())
        dtype = {"float64": "F64", "int64": "I64"}[str(array.dtype)]
        content = array.astype(array.dtype.newbyteorder("<")).tobytes()
        header[name] = {
            "dtype": dtype,
            "shape": list(array.shape),
            "data_offsets": [len(data), len(data) + len(content)],
        }
        data += content
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text + data)


def main():
    generator = torch.Generator().manual_seed(0)
    parts = {
        "clip": clipping(generator),
        "adamw": adamw(generator),
        "ce": cross_entropy(generator),
    }
    tensors = {f"{part}/{name}": tensor for part, t in parts.items() for name, tensor in t.items()}
    write(sys.argv[1], tensors, {"note": "torch " + str(torch.__version__)})


if __name__ == "__main__":
    main()
