#!/usr/bin/env bash
# usage: bash start_fl.sh JOB [options]      (bash start_fl.sh --help lists them)
# Trains a federation. Uses the active Python when it has the packages of requirements.txt, else makes .venv.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

has_packages() { # Found, not imported: that takes seconds.
  "$1" - <<'PY' 2>/dev/null
import sys
from importlib.util import find_spec

needed = "nvflare nnunetv2 torch SimpleITK safetensors tensorboard psutil monai sklearn scipy nibabel matplotlib jinja2 pandas opacus dp_accounting"
sys.exit(not all(map(find_spec, needed.split())))
PY
}

if [ -x "$here/.venv/bin/python" ] && [ -f "$here/.venv/complete" ]; then
  python="$here/.venv/bin/python"
elif command -v python >/dev/null && has_packages python; then
  python=python
else
  base=""
  for candidate in python3.11 python3 python; do
    if command -v "$candidate" >/dev/null && "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then base=$candidate; break; fi
  done
  [ -n "$base" ] || { echo "start_fl.sh: Python 3.11 or newer is needed and was not found on PATH" >&2; exit 1; }
  echo "Making $here/.venv from requirements.txt (once; a few minutes)"
  "$base" -m venv "$here/.venv"
  "$here/.venv/bin/python" -m pip install --quiet --disable-pip-version-check -r "$here/requirements.txt"
  touch "$here/.venv/complete"
  python="$here/.venv/bin/python"
fi
export PYTHONPATH="$here/src${PYTHONPATH:+:$PYTHONPATH}"
exec "$python" -m fedcmt.run "$@"
