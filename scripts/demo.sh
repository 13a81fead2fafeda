#!/usr/bin/env bash
# Set everything up, make a small AWQ checkpoint (symmetric, so that its codes are kept), convert it, verify the result.
# Files go to demo/. PYTHON and VENV are scripts/setup.sh's.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv=${VENV:-.venv}
scripts/setup.sh
"$venv"/bin/python scripts/checkpoints/make_demo_checkpoint.py demo/tiny-llama-awq
"$venv"/bin/w4a8-convert demo/tiny-llama-awq demo/tiny-llama-w4a8 --overwrite
"$venv"/bin/w4a8 verify demo/tiny-llama-w4a8 --source demo/tiny-llama-awq
