# Sourced by the scripts beside it: goes to the checkout's root and makes .venv what requirements.lock says.
#
# The stamp .venv/.lock is written last, so an interrupted installation is taken up again, and a
# changed lock file is installed over the old one. PYTHON=/a/python chooses the interpreter.

cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PIP_DISABLE_PIP_VERSION_CHECK=1

find_python() {
  local candidate
  for candidate in "${PYTHON:-python3}" python3.12 python3.11 python3.13 python3.10; do
    if "$candidate" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14))' 2>/dev/null; then
      if "$candidate" -c 'import ensurepip, venv' 2>/dev/null; then
        echo "$candidate"
        return
      fi
      echo "error: $candidate has no venv; install it (Debian, Ubuntu: apt install python3-venv)" >&2
      return 1
    fi
  done
  echo "error: no Python from 3.10 to 3.13 found; install one, or set PYTHON=/path/to/python" >&2
  return 1
}

# One line that moves where someone looks on, a plain start and end where a log is written.
install() {
  local started=$SECONDS line log=.venv/install.log
  if [ -t 2 ]; then
    if ! .venv/bin/pip install "$@" 2>&1 | tee -a "$log" | while read -r line; do
      printf '\r\033[K[%4d s] %.90s' $((SECONDS - started)) "$line" >&2
    done; then failed "$log"; fi
    printf '\r\033[K' >&2
  elif ! .venv/bin/pip install "$@" >>"$log" 2>&1; then
    failed "$log"
  fi
}

failed() {
  printf '\n' >&2
  grep -i error "$1" | tail -n 3 >&2 || true
  echo "error: the installation failed; all of its output is in $1, and the same command tries again" >&2
  exit 1
}

make_environment() {
  local stamp python
  stamp=$(cat requirements.lock requirements-no-deps.lock pyproject.toml | sha256sum | cut -d ' ' -f 1)
  if [ "$(cat .venv/.lock 2>/dev/null)" = "$stamp" ]; then
    return
  fi
  python=$(find_python)
  echo "Setting up .venv from requirements.lock, once: 1 to 2 GB, some minutes …" >&2
  [ -x .venv/bin/pip ] || "$python" -m venv .venv
  : >.venv/install.log
  install -r requirements.lock
  install --no-deps -r requirements-no-deps.lock
  install --no-deps --no-build-isolation -e .
  echo "$stamp" >.venv/.lock
  echo "… done in $SECONDS s." >&2
}

set -euo pipefail
make_environment
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}" # threads that spin for each other starve a busy machine
