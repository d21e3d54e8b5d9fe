#!/usr/bin/env bash
# usage: bash deploy/start.sh NAME
# Starts the server or a site from its startup kit: a folder, or a name among the kits of this machine's network.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$here/network.sh"
name=${1:?usage: bash deploy/start.sh NAME}
kit=$kits/$name
[ ! -d "$name/startup" ] || kit=$name
[ -x "$kit/startup/start.sh" ] || { echo "start.sh: no startup kit of a server or site in $kit" >&2; exit 1; }
python3 -c 'import fedcmt, nvflare' || { echo "start.sh: activate the environment that fedcmt is installed in" >&2; exit 1; }
kit=$(cd "$kit" && pwd -P)
if pid=$(cat "$kit/daemon_pid.fl" 2>/dev/null) && kill -0 "$pid" 2>/dev/null; then
  echo "start.sh: $name runs already, as process $pid" >&2
  exit 1
fi
setsid "$kit/startup/start.sh" >>"$kit/console.log" 2>&1 </dev/null
echo "Started $name; its log is $kit/console.log"
