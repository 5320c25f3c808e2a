"""Model files of a given size: 400 tensors, shaped like a language model's, of seeded random bytes."""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Mapping
from pathlib import Path

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
    _safetensors(setup.model, shapes(setup.quick), 8726)


def files(setup: Setup, kind: str) -> list[Path]:
    """The same model as one file, as four shards with their index, or quantised as GGUF."""
    name = setup.model.stem
    if kind == "safetensors":
        ensure(setup)
        return [setup.model]
    if kind == "gguf":
        path = setup.work / f"{name}.gguf"
        _gguf(path, setup.model.stat().st_size, 8727)
        return [path]
    folder = setup.work / f"{name}-shards"
    folder.mkdir(exist_ok=True)
    all_shapes = list(shapes(setup.quick).items())
    paths, weights = [], {}
    for number in range(4):
        part = dict(all_shapes[number::4])
        paths.append(folder / f"model-{number + 1:05}-of-00004.safetensors")
        weights |= dict.fromkeys(part, paths[-1].name)
        _safetensors(paths[-1], part, number)
    index = {
        "metadata": {"total_size": sum(2 * math.prod(it) for _, it in all_shapes)},
        "weight_map": weights,
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return paths


def registered(paths: list[Path]) -> Path:
    """What names them all."""
    return paths[0] if len(paths) == 1 else paths[0].with_name("model.safetensors.index.json")


def small(setup: Setup, name: str, size: int) -> Path:
    """A file of one tensor."""
    path = setup.work / f"{name}.safetensors"
    _safetensors(path, {"weight": (size // 2048, 1024)}, size + len(name))
    return path


def _safetensors(path: Path, all_shapes: Mapping[str, tuple[int, ...]], seed: int) -> None:
    table = {}
    end = 0
    for name, shape in all_shapes.items():
        begin, end = end, end + 2 * math.prod(shape)
        table[name] = {"dtype": "F16", "shape": shape, "data_offsets": [begin, end]}
    header = json.dumps(table, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # as the format's own library pads it
    _write(path, len(header).to_bytes(8, "little") + header, end, seed)


def _gguf(path: Path, size: int, seed: int) -> None:
    """Tensors of Q8_0: blocks of 32 weights in 34 bytes."""

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    count, rows, align = 400, 1024, 32
    columns = size // count // rows * 32 // 34 // 32 * 32
    each = rows * columns // 32 * 34
    header = b"GGUF" + struct.pack("<IQQ", 3, count, 1) + text("general.architecture") + struct.pack("<I", 8)
    header += text("llama")
    for number in range(count):
        header += text(f"blk.{number}.weight") + struct.pack("<IQQ", 2, columns, rows)
        header += struct.pack("<IQ", 8, number * (each + -each % align))
    header += bytes(-len(header) % align)
    _write(path, header, count * (each + -each % align), seed)


def _write(path: Path, header: bytes, payload: int, seed: int) -> None:
    if path.exists() and path.stat().st_size == len(header) + payload:
        return
    say(f"writing {path.name}: {payload / 1e9:.2f} GB")
    seeded = np.random.default_rng(seed)
    unfinished = path.with_suffix(".part")
    with open(unfinished, "wb") as file:
        file.write(header)
        for begin in range(0, payload, PIECE_BYTES):
            file.write(seeded.bytes(min(PIECE_BYTES, payload - begin)))
        file.flush()
        os.fsync(file.fileno())
    unfinished.rename(path)
    forget(path)
