#!/usr/bin/env bash
# usage: bash deploy/download.sh ID
# Waits until a job has ended and fetches what the server kept of it. Models stay at the sites.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$here/network.sh"
id=${1:?usage: bash deploy/download.sh ID}
ended=0
nvflare job wait "$id" --startup-kit "$lead" || ended=$?
nvflare job download "$id" -o "$network/results" --startup-kit "$lead"
exit "$ended"
