"""``python -m vramd.worker``: a worker with every action of the protocol, and no model server around it."""

from __future__ import annotations

import argparse
import signal
import sys

from ..errors import VramdError
from .server import Worker


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m vramd.worker", description=__doc__)
    parser.add_argument("--name", default="worker", help="what it is called [default: worker]")
    parser.add_argument("--device", help="the device that it uses, such as cuda:0 [default: cpu:0]")
    parser.add_argument("--socket", help="the daemon's socket [default: VRAMD_SOCKET, or the usual place]")
    options = parser.parse_args()
    worker = Worker(options.name, device=options.device, socket=options.socket)

    def stop(*_: object) -> None:
        raise SystemExit(0)

    signal.signal(signal.SIGTERM, stop)
    try:
        worker.run()
    except VramdError as error:
        print(f"vramd.worker: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
