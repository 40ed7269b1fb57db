#!/bin/sh
# What a container runs: nightschool, and never as root. A folder that was mounted from outside mostly belongs to root;
# it is handed over first, which takes the root that the container starts with. Started as another user, nothing changes hands.
set -eu

uid=${NIGHTSCHOOL_UID:-10001}
data=${NIGHTSCHOOL_HOME%/*}

if [ "$(id -u)" = 0 ]; then
  mkdir -p "$NIGHTSCHOOL_HOME" "$HF_HOME"
  # Only where the owner differs: a home can hold millions of files.
  find "$data" ! -user "$uid" -exec chown -h "$uid:$uid" {} +
  exec setpriv --reuid="$uid" --regid="$uid" --clear-groups --no-new-privs -- "$0" "$@"
fi

if [ ! -w "$data" ]; then
  echo "error: $data cannot be written by user $(id -u). Start the container with --user and the owner of that folder." >&2
  exit 1
fi

# A server that others reach needs a key. The first start makes one, and shows it this once.
if [ "${1-}" = serve ] && [ -z "${NIGHTSCHOOL_API_KEY-}" ] && [ "$(nightschool keys ls --json)" = "[]" ]; then
  nightschool keys create --label "first start"
fi

exec nightschool "$@"
