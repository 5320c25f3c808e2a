"""A model file of a given size: 400 tensors, shaped like a language model's, of seeded random bytes."""

from __future__ import annotations

import json
import math
import os

import numpy as np

from .machine import Setup, forget, say

LAYERS = 44
VOCABULARY = 24_000
PIECE_BYTES = 32 << 20


def shapes(quick: bool) -> dict[str, tuple[int, ...]]:
    hidden = 704 if quick else 2048
    narrow, wide = hidden // 4, hidden * 21 // 8
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, hidden)}
    for layer in range(LAYERS):
        parts = {
            "input_layernorm": (hidden,),
            "mlp.down_proj": (hidden, wide), "mlp.gate_proj": (wide, hidden), "mlp.up_proj": (wide, hidden),
            "post_attention_layernorm": (hidden,),
            "self_attn.k_proj": (narrow, hidden), "self_attn.o_proj": (hidden, hidden),
            "self_attn.q_proj": (hidden, hidden), "self_attn.v_proj": (narrow, hidden),
        }  # fmt: skip
        found |= {f"model.layers.{layer}.{part}.weight": shape for part, shape in parts.items()}
    return found | {
        "model.norm.weight": (hidden,),
        "model.rotary_emb.scale": (hidden,),
        "lm_head.weight": (VOCABULARY, hidden),
    }


def ensure(setup: Setup) -> None:
    """Writes the model file, unless it is there."""
    table = {}
    end = 0
    for name, shape in shapes(setup.quick).items():
        begin, end = end, end + 2 * math.prod(shape)
        table[name] = {"dtype": "F16", "shape": shape, "data_offsets": [begin, end]}
    header = json.dumps(table, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # as the format's own library pads it
    if setup.model.exists() and setup.model.stat().st_size == 8 + len(header) + end:
        return
    say(f"writing {setup.model.name}: {len(table)} tensors, {end / 1e9:.2f} GB")
    seeded = np.random.default_rng(8726)
    unfinished = setup.model.with_suffix(".part")
    with open(unfinished, "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for begin in range(0, end, PIECE_BYTES):
            file.write(seeded.bytes(min(PIECE_BYTES, end - begin)))
        file.flush()
        os.fsync(file.fileno())
    unfinished.rename(setup.model)
    forget(setup.model)
