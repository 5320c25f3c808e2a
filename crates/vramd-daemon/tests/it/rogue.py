"""A worker that misbehaves in the way that its argument names."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from typing import Any

MODE = sys.argv[1]
ACTIONS = ["ping", "echo", "slow", "shutdown", "memory.get_model_info"]


def send(message: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


def answer(request: dict[str, Any], data: dict[str, Any]) -> None:
    send({"request_id": request["request_id"], "success": True, "data": data})


def report() -> dict[str, Any]:
    sizes = {"impossible": 1e9, "negative": -4, "changing": 32}
    models = [{"name": "own", "memory_mb": sizes.get(MODE, 8), "idle_seconds": 2, "busy": MODE == "busy"}]
    return {"loaded_models": models}


def at_start() -> None:
    if MODE == "exits":
        sys.exit(0)
    if MODE == "says":
        print("one\x1b[2J line\nand another", file=sys.stderr, flush=True)
    if MODE == "garbage":
        sys.stdout.write("loading model ...\n\x00\xff\n[1, 2]\n{}\n" + '{"event": 3}\n')
    if MODE == "floods":
        for number in range(100_000):
            sys.stdout.write(f"line {number} that is no frame\n")
    if MODE == "huge":
        piece = "x" * (1 << 20)
        for _ in range(64):
            sys.stdout.write(piece)
        sys.stdout.write("\n")
    if MODE == "forks" and os.fork() == 0:
        # A child that outlives its parent, holds its streams and leaves its group.
        os.setsid()
        time.sleep(600)
    if MODE in ("holds", "shares"):
        held.append(bytearray(os.urandom(1 << 20)) * 64)
    if MODE == "shares" and os.fork() == 0:
        # What it holds is its parent's memory still.
        signal.pause()


def chatter() -> None:
    """Never so many faults in a row that it is ended for them."""
    while True:
        os.write(1, b"x\n" * 900 + b'{"event": "nothing"}\n')


def serve() -> None:
    for line in sys.stdin:
        request = json.loads(line)
        action = request["action"]
        if action == "hello":
            version = 99 if MODE == "newer" else 1
            greeting = {"version": version, "actions": ACTIONS, "implementation": "rogue", "framework": None}
            answer(request, greeting)
            if MODE == "half":
                sys.stdout.write('{"event": "mod')
                sys.stdout.flush()
                sys.exit(1)
            if MODE == "dies":
                os.kill(os.getpid(), signal.SIGKILL)
            if MODE == "deaf":
                time.sleep(600)
            if MODE == "chatters":
                threading.Thread(target=chatter, daemon=True).start()
        elif action == "ping":
            if MODE != "silent":
                answer(request, {})
        elif action == "memory.get_model_info":
            answer(request, report())
        elif action == "shutdown":
            if MODE != "hangs":
                answer(request, {})
                sys.exit(0)
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            time.sleep(600)
        elif action == "echo":
            if request["data"].get("fail"):
                error = {"code": "CudaOutOfMemory", "message": "no room"}
                send({"request_id": request["request_id"], "success": False, "error": error})
                continue
            if request["data"].get("fork") and os.fork() == 0:
                time.sleep(600)
            if request["data"].get("end"):
                sys.exit(request["data"]["end"])
            if MODE == "misshapen":
                send({"request_id": request["request_id"], "success": True, "data": [1]})
                continue
            answer(request, {**request["data"], "environment": dict(os.environ)})
            if MODE == "twice":
                answer(request, request["data"])
            if MODE == "unknown":
                answer({"request_id": "never asked"}, {})
        elif action == "slow":
            waiting.append(request)
        elif action == "cancel":
            for one in [one for one in waiting if one["request_id"] == request["request_id"]]:
                waiting.remove(one)
                error = {"code": "CANCELLED", "message": "as you wish"}
                send({"request_id": one["request_id"], "success": False, "error": error})
                send({"event": "log", "data": {"text": "cancelled " + one["request_id"]}})


held: list[bytearray] = []
waiting: list[dict[str, Any]] = []
at_start()
serve()
