#!/usr/bin/env bash
# usage: bash deploy/shutdown.sh
# Ends the server and every site that is connected.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$here/network.sh"
nvflare system shutdown all --force --timeout 180 --startup-kit "$admin"
