#!/usr/bin/env bash
# Builds target/demo/vramd, and says what to install where something is missing.
set -euo pipefail
cd "$(dirname "$0")/.."

die() { printf 'error: %s\nhint: %s\n' "$1" "$2" >&2; exit 1; }

command -v cargo >/dev/null || die "there is no cargo" "install Rust 1.95 or newer: https://rustup.rs"
command -v cc >/dev/null || die "there is no C compiler" "sudo apt-get install gcc libc6-dev (or your system's package of it)"
echo "building vramd (some minutes the first time)" >&2
cargo build --locked --profile demo --package vramd --target-dir target ||
    die "vramd did not build" "Rust 1.95 or newer is needed (this is $(rustc --version)); otherwise see the message above"
