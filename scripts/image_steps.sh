#!/usr/bin/env bash
# The Dockerfile's steps, without Docker: install what the image installs into a fresh virtual environment, and prove
# that it serves, answers its health check, asks for a key, and holds no torch. `make image-steps`.
set -euo pipefail
cd "$(dirname "$0")/.."
work=$(mktemp -d)
server=
trap '[ -z "$server" ] || kill "$server" 2>/dev/null || true; [ -z "$server" ] || wait "$server" 2>/dev/null || true; rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/ratchet"
"$work/ratchet/bin/pip" --disable-pip-version-check install --quiet --no-deps --require-hashes -r locks/core.txt
mkdir "$work/source"
cp -R pyproject.toml README.md ratchet.py proxy collector optimize "$work/source"
"$work/ratchet/bin/pip" --disable-pip-version-check install --quiet --no-deps "$work/source"
"$work/ratchet/bin/pip" check
if "$work/ratchet/bin/python" -c 'import torch' 2>/dev/null; then echo "torch is in the serving image"; exit 1; fi

cd "$work"
if RATCHET_CONFIG="$OLDPWD/configs/docker.yaml" "$work/ratchet/bin/ratchet" serve --port 0 2>"$work/refused"; then
  echo "it served on all addresses without a key"; exit 1
fi
grep -q RATCHET_KEY "$work/refused"

export RATCHET_CONFIG="$OLDPWD/configs/docker.yaml" RATCHET_DATA_DIR="$work/data" RATCHET_KEY=image-steps-key
"$work/ratchet/bin/ratchet" serve --host 127.0.0.1 --port 0 >"$work/log" 2>&1 &
server=$!
for _ in $(seq 300); do [ -s "$work/data/server.json" ] && break; sleep 0.1; done
url=$("$work/ratchet/bin/python" -c "import json; print(json.load(open('$work/data/server.json'))['url'])")
"$work/ratchet/bin/python" - "$url" <<'PY'
import sys
import urllib.error
import urllib.request

url = sys.argv[1]
assert urllib.request.urlopen(f"{url}/healthz", timeout=5).status == 200
try:
    urllib.request.urlopen(f"{url}/api/slots", timeout=5)
except urllib.error.HTTPError as error:
    assert error.code == 401, error.code
else:
    raise SystemExit("the API answered without a key")
request = urllib.request.Request(f"{url}/api/slots", headers={"authorization": "Bearer image-steps-key"})
assert urllib.request.urlopen(request, timeout=5).status == 200
PY
"$work/ratchet/bin/ratchet" doctor --json >"$work/doctor.json" || { cat "$work/doctor.json"; exit 1; }
du -sm "$work/ratchet" | awk '{print "installed size: " $1 " MB"}'
echo "the image's steps work"
