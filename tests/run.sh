#!/usr/bin/env bash
# Sets up and passes the tests: `bash tests/run.sh [pytest options]`. Uses the active virtual environment, else makes .venv.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ -z "${VIRTUAL_ENV:-}" ] && ! [ "$(command -v python || true)" = "$PWD/.venv-ci/bin/python" ]; then
  [ -x .venv/bin/python ] || "$(command -v python3.11 || command -v python3)" -m venv .venv
  export PATH="$PWD/.venv/bin:$PATH"
fi
python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
ruff check .
ruff format --check .
mypy
# Each file in one worker, in the order of the tree: else the files of few and long tests come last, and one worker waits
# for the others. Three workers for two cores, as whole jobs wait for their network half the time; more threads than
# cores would wait for each other.
export OMP_NUM_THREADS=1
python -m pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder "$@"
