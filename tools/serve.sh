#!/usr/bin/env bash
# A daemon on its default address with the demonstration's model loaded, until Ctrl-C; says what to try.
set -euo pipefail
cd "$(dirname "$0")/.."

tools/build.sh
tools/venv.sh --model
exec target/venv/bin/python examples/demo.py --vramd target/demo/vramd --keep
