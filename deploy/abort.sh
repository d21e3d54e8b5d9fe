#!/usr/bin/env bash
# usage: bash deploy/abort.sh ID
# Ends a job; also one whose server died, which FLARE goes on listing as running. What its rounds left stays.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$here/network.sh"
nvflare job abort "${1:?usage: bash deploy/abort.sh ID}" --force --startup-kit "$lead"
