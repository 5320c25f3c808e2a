#!/usr/bin/env bash
# The demonstration: a real model held once, used by two processes. Ends by itself.
set -euo pipefail
cd "$(dirname "$0")/.."

tools/build.sh
tools/venv.sh --model
if ! target/venv/bin/python examples/demo.py --vramd target/demo/vramd; then
    printf 'error: the demonstration failed\nhint: see the message above, and run: target/demo/vramd doctor\n' >&2
    exit 1
fi
