"""Runs schemathesis against a real daemon: no crash, no answer beside its OpenAPI document, no byte left.

`cargo xtask fuzz-api` runs it as `target/venv/bin/python tools/api_fuzz.py target/debug/vramd`.
Schemathesis loads this file too, for its hooks.
"""

import argparse
import json
import os
import random
import signal
import struct
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

import schemathesis

CONFIG = """
# Errors that pass: no memory now, a wait that ended, a file or a store that failed.
[checks]
not_a_server_error.expected-statuses = ["2xx", "3xx", "4xx", 503, 504, 507]
positive_data_acceptance.expected-statuses = ["2xx", 400, 403, 404, 409, 422, 503, 504, 507]
"""


# Ids and names that the daemon has told, by the parameter that takes them.
known: dict[str, list[str]] = {
    "deviceId": ["sim:0", "cpu:0"],
    "name": ["tiny"],
    "model": ["tiny"],
    "allocationId": [],
    "operationId": [],
}
chance = random.Random(1)


@schemathesis.hook
def before_call(context: schemathesis.HookContext, case: schemathesis.Case, kwargs: Any) -> None:
    """Lets most sound requests name something that is there, and none wait for room for a day."""
    body = case.body if isinstance(case.body, dict) else {}
    seconds = body.get("timeoutSeconds")
    if body.get("onShortage") == "wait" and seconds is None:
        body["timeoutSeconds"] = 0
    if body.get("onShortage") in ("wait", "evict") and isinstance(seconds, int) and 0 <= seconds <= 86400:
        body["timeoutSeconds"] = 0
    components = case.meta.components if case.meta else {}
    unsound = {location.value for location, info in components.items() if info.mode.value == "negative"}
    if "path" not in unsound:
        for name in case.path_parameters or {}:
            if known.get(name) and chance.random() < 0.7:
                case.path_parameters[name] = chance.choice(known[name])
        if case.method == "DELETE" and case.path_parameters.get("name") == "tiny":
            # It stays, for others to load it.
            case.path_parameters["name"] = "minilm"
    if "body" not in unsound and chance.random() < 0.7:
        if case.operation.path == "/api/models":
            for component in body.get("components", {}).values():
                component["path"] = os.environ["VRAMD_FUZZ_MODEL"]
        if case.operation.path.endswith("/load"):
            body.pop("components", None)
        if "deviceId" in body:
            body["deviceId"] = chance.choice(known["deviceId"])


@schemathesis.hook
def after_call(
    context: schemathesis.HookContext, case: schemathesis.Case, response: schemathesis.Response
) -> None:
    """Remembers the last things that were made."""
    data = response.json().get("data") if response.status_code in (200, 201, 202) else None
    for name in known if isinstance(data, dict) else ():
        if name in data and data[name] not in known[name]:
            known[name] = [*known[name][:1], *known[name][1:][-3:], data[name]]


class Daemon:
    """`vramd serve` with a simulated device and a small model, in a directory of its own."""

    def __init__(self, binary: Path, directory: Path) -> None:
        (directory / "models").mkdir()
        model = directory / "models" / "tiny.safetensors"
        header = json.dumps({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}).encode()
        model.write_bytes(struct.pack("<Q", len(header)) + header + bytes(16))
        ready = directory / "ready.json"
        self.log = directory / "log"
        arguments = ["serve", "--listen", "127.0.0.1:0", "--sim", "1TiB", "--cpu-limit", "64MiB"]
        places = {
            "socket": "socket",
            "state-dir": "state",
            "model-root": "models",
            "ready-file": "ready.json",
        }
        for option, name in places.items():
            arguments += [f"--{option}", str(directory / name)]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen([binary, *arguments], stdout=log, stderr=log)
        deadline = time.monotonic() + 60
        while not ready.exists():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"the daemon did not start:\n{self.log.read_text()}")
            time.sleep(0.02)
        self.url = "http://" + json.loads(ready.read_text())["address"]
        self.model = str(model)
        self.call("POST", "/api/models", {"name": "tiny", "components": {"weights": {"path": self.model}}})

    def call(self, method: str, path: str, body: Any = None) -> Any:
        request = urllib.request.Request(self.url + path, method=method)
        if body is not None:
            request.data = json.dumps(body).encode()
            request.add_header("Content-Type", "application/json")
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)["data"]

    def faults(self) -> list[str]:
        """Gives everything back and stops; what was not as it should be."""
        found = []
        while held := self.call("GET", "/api/memory/allocations?pageSize=1000")["allocations"]:
            clients = [one for one in held if one["owner"] != "vramd"]
            if not clients:
                break
            for one in clients:
                self.call("DELETE", f"/api/memory/allocations/{one['allocationId']}")
        for model in self.call("GET", "/api/models")["models"]:
            self.call("POST", f"/api/models/{model['name']}/unpin")
            if any(component["residency"] for component in model["components"]):
                self.call("POST", f"/api/models/{model['name']}/unload?wait=30", {})
        for device in self.call("GET", "/api/memory/status")["devices"]:
            if device["allocatedBytes"] or device["reservedBytes"]:
                found.append(f"{device['deviceId']} still counts bytes: {device}")
        self.process.send_signal(signal.SIGTERM)
        if (code := self.process.wait(timeout=30)) != 0:
            found.append(f"the daemon ended with {code}")
        if "panicked" in self.log.read_text():
            found.append("the daemon panicked")
        return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("binary", type=Path)
    parser.add_argument("--examples", type=int, default=25, help="for each operation")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="vramd-fuzz-") as name:
        directory = Path(name)
        (directory / "schemathesis.toml").write_text(CONFIG)
        daemon = Daemon(arguments.binary.resolve(), directory)
        try:
            command = [str(Path(sys.executable).parent / "schemathesis")]
            command += ["--config-file", str(directory / "schemathesis.toml")]
            command += ["run", daemon.url + "/api/openapi.json", "--checks", "all", "--no-color"]
            # The stream of events does not end.
            command += ["--exclude-path", "/api/events", "--request-timeout", "30"]
            command += ["--max-examples", str(arguments.examples), "--seed", str(arguments.seed)]
            environment = {**os.environ, "SCHEMATHESIS_HOOKS": Path(__file__).stem}
            environment["VRAMD_FUZZ_MODEL"] = daemon.model
            environment["PYTHONPATH"] = str(Path(__file__).parent)
            code = subprocess.run(command, env=environment, cwd=directory, check=False).returncode
            faults = daemon.faults()
        finally:
            daemon.process.kill()
            daemon.process.wait()
        for fault in faults:
            print(f"error: {fault}", file=sys.stderr)
        if code or faults:
            print(f"--- the end of the daemon's log\n{daemon.log.read_text()[-4000:]}", file=sys.stderr)
        return 1 if code or faults else 0


if __name__ == "__main__":
    sys.exit(main())
