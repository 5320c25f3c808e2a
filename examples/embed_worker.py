"""A worker of the demonstration: gets the weights, embeds the sentences, reports, and stays until told to go.

usage: embed_worker.py attach SOCKET MODEL | embed_worker.py file PATH
The sentences come as a JSON list on standard input.
"""

from __future__ import annotations

import json
import os
import sys
import time
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import safetensors.numpy

import minilm
import vramd.arrays  # so that the time below is that of attaching, not of an import


def main() -> None:
    how, *where = sys.argv[1:]
    sentences = json.loads(sys.stdin.readline())
    if how == "attach":
        socket, model = where
        start = time.perf_counter()
        with vramd.attach(model, socket=socket) as attachment:
            weights: dict[str, Any] = dict(attachment)
            work(weights, sentences, time.perf_counter() - start)
    else:
        start = time.perf_counter()
        weights = safetensors.numpy.load_file(where[0])
        work(weights, sentences, time.perf_counter() - start)


def work(weights: Mapping[str, Any], sentences: list[str], seconds: float) -> None:
    vectors = minilm.embed(weights, sentences)
    checksum = 0
    for name in sorted(weights):  # reads every byte, so that every page of the weights is in use
        checksum = zlib.crc32(np.ascontiguousarray(weights[name]).data, checksum)
    report = {
        "pid": os.getpid(),
        "seconds": seconds,
        "bytes": sum(array.nbytes for array in weights.values()),
        "checksum": checksum,
        "vectors": vectors.tobytes().hex(),
    }
    print(json.dumps(report), flush=True)
    sys.stdin.readline()


if __name__ == "__main__":
    main()
