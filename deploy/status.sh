#!/usr/bin/env bash
# usage: bash deploy/status.sh [ID]
# Who is connected and which jobs there are; with a job's id, that job.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$here/network.sh"
if [ $# -eq 1 ]; then
  nvflare job meta "$1" --startup-kit "$lead"
else
  nvflare system status --startup-kit "$admin"
  nvflare job list --startup-kit "$admin"
fi
