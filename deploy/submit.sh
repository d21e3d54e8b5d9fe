#!/usr/bin/env bash
# usage: bash deploy/submit.sh JOB [KIT]
# Submits a job folder, as start_fl.sh --export writes it, and prints the job's id; in the queue it waits for its sites.
# KIT is the submitter's startup kit, by default the lead's.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$here/network.sh"
job=${1:?usage: bash deploy/submit.sh JOB [KIT]}
answer=$(nvflare job submit -j "$job" --startup-kit "${2:-$lead}" --format json) || { echo "$answer" >&2; exit 1; }
python3 -c 'import json, sys; print(json.loads(sys.argv[1].splitlines()[-1])["data"]["job_id"])' "$answer"
