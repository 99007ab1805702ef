#!/usr/bin/env bash
# Measures one GPU machine in one call, in under 25 minutes (an estimate: not yet run on CUDA hardware):
#   validation/gpu_session.sh [calibrate] [torch] [memory] [kernels]     (all four by default, in this order)
# Needs no network and no installation, only a Python with PyTorch and simtrain's dependencies. Environment:
#   DEVICE  cuda (default) or cpu     QUICK  1: a few steps of each list, to try the machine out
#   OUT     folder of the results, validation/measured by default     PYTHON  the interpreter, python3 by default
#   DATA_SHEET  catalog name or file of the GPU, where its own name is not found
set -uo pipefail
ROOT=$(cd "$(dirname "$0")/.." && pwd)
DEVICE=${DEVICE:-cuda} QUICK=${QUICK:-} PYTHON=${PYTHON:-python3} OUT=${OUT:-$ROOT/validation/measured}
STAMP=$(date -u +%Y-%m-%d_%H%M)
PROFILE=$OUT/profile_${DEVICE}_$STAMP.json
mkdir -p "$OUT" || exit 1
META=$(mktemp -d)
trap 'rm -rf "$META"' EXIT

# The catalog is found through the package's entry points, which an uninstalled checkout lacks.
"$PYTHON" - "$ROOT" "$META" <<'PYTHON' || exit 1
import re, sys, tomllib
from importlib.util import find_spec
from pathlib import Path

root, meta = map(Path, sys.argv[1:])
project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
modules = ["torch", *(re.match(r"[\w-]+", text)[0] for text in project["dependencies"])]
missing = [name for name in modules if find_spec(name) is None]
if missing:
    sys.exit(f"{sys.executable} lacks {', '.join(missing)}: install them, or name another interpreter in PYTHON")
folder = meta / f"{project['name']}-0.dist-info"
folder.mkdir()
(folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: 0\n")
groups = (
    f"[{group}]\n" + "".join(f"{name} = {target}\n" for name, target in points.items())
    for group, points in project["entry-points"].items()
)
(folder / "entry_points.txt").write_text("\n".join(groups))
PYTHON
export PYTHONPATH="$ROOT:$META${PYTHONPATH:+:$PYTHONPATH}"

simtrain() { "$PYTHON" -P -c 'import sys; from simtrain.cli.main import main; sys.exit(main())' "$@"; }
quick=(${QUICK:+--quick})
sheet=(${DATA_SHEET:+--data-sheet "$DATA_SHEET"})
with_profile=()
failed=()

part() {
    local name=$1 start=$SECONDS
    shift
    echo "== $name: simtrain $*"
    if simtrain "$@"; then echo "== $name: $((SECONDS - start)) s"; else echo "== $name FAILED after $((SECONDS - start)) s"; failed+=("$name"); fi
}

for name in "${@:-calibrate torch memory kernels}"; do
    for one in $name; do
        # A profile of an earlier call in the same folder serves as well.
        latest=$(ls -t "$OUT"/profile_"$DEVICE"_*.json 2>/dev/null | head -n 1)
        [ -n "$latest" ] && with_profile=(--profile "$latest")
        case $one in
            calibrate) part calibrate calibrate --device "$DEVICE" --out "$PROFILE" --save "$OUT/calibration_${DEVICE}_$STAMP.json" "${quick[@]}" "${sheet[@]}" ;;
            torch) part torch validate torch --device "$DEVICE" --save "$OUT" "${quick[@]}" "${with_profile[@]}" ;;
            memory) part memory validate memory --device "$DEVICE" --save "$OUT/memory_${DEVICE}_$STAMP.json" "${quick[@]}" "${with_profile[@]}" ;;
            kernels) part kernels validate kernels ;;
            *) echo "unknown part $one: use calibrate, torch, memory, kernels"; exit 2 ;;
        esac
    done
done
if [ ${#failed[@]} -gt 0 ]; then echo "failed: ${failed[*]}"; exit 1; fi
ls -l "$OUT" | tail -n +2
