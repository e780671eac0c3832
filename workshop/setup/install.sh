#!/bin/sh
# Installs the workshop from this stick, without a network: sh install.sh [FOLDER]
here=$(cd "$(dirname "$0")" && pwd)
for python in ${PYTHON:-} python3.13 python3.12 python3.11 python3; do
    if command -v "$python" >/dev/null 2>&1 && "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
        exec "$python" "$here/install_offline.py" "$@"
    fi
done
echo "error: Python 3.11 or newer is needed; MISSING.md says where it comes from." >&2
exit 2
