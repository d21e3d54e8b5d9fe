#!/usr/bin/env bash
# usage: bash deploy/provision.sh [PROJECT.yml]
# Makes a startup kit for everyone in the project. Run it again after adding a participant: keys that exist are kept.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$here/network.sh"
mkdir -p "$network"
nvflare provision -p "${1:-$here/project.yml}" -w "$network" --force
newest=$(cd "$network/fedcmt" && printf '%s\n' prod_* | sort | tail -n 1)
ln -sfn "fedcmt/$newest" "$kits"
echo "Kits: $kits -> fedcmt/$newest"
