#!/usr/bin/env bash
# usage: run.sh [MINUTES]
#
# Runs tests, compute-sanitizer, ceilings, benchmarks, tuning and an A/B of the tuned table on the GPU at hand, each for
# up to MINUTES (default 10). Needs bash, Python with torch, triton, numpy, safetensors, pytest and typer, and no
# network. PYTHON selects the Python. Results go to the folder `results` next to this script; what was measured before
# an interrupt or a time limit is kept.
# Exits with 1 if a test failed or a kernel is wrong, otherwise with 2 if anything did not run, otherwise with 0.
set -u
minutes=${1:-10}
python=$(command -v "${PYTHON:-python3}" || echo "${PYTHON:-python3}")
[[ $python != */* ]] || python=$(cd "$(dirname "$python")" && pwd)/$(basename "$python")
cd "$(dirname "${BASH_SOURCE[0]}")" || exit 2
if ! [[ $minutes =~ ^[1-9][0-9]{0,3}$ ]]; then
    echo "run.sh: expected a whole number of minutes, got $minutes" >&2
    exit 2
fi
mkdir -p site results && : > results/import.log || exit 2
for wheel in wheels/*.whl; do
    "$python" -m zipfile -e "$wheel" site || exit 2
done
export PYTHONPATH=$PWD/site PYTHONDONTWRITEBYTECODE=1 TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$PWD/cache}
if ! gpu=$("$python" -c 'import numpy, pytest, safetensors, torch, triton, typer
print(torch.cuda.get_device_name() if torch.cuda.is_available() else "")' 2> results/import.log); then
    echo "run.sh: $python lacks a package: $(tail -n 1 results/import.log)" >&2
    exit 2
fi

[ -z "$gpu" ] || exec > >(tee results/log.txt) 2>&1
worst=0
running=
trap 'kill $running; wait $running; echo "run.sh: interrupted; results are kept in $PWD/results"; exit 2' INT TERM
step() {
    local name=$1 code
    shift
    if [ -z "$gpu" ]; then
        echo "would run $name: $*"
        return
    fi
    echo "== $name"
    timeout -k 60 "$((60 * minutes + 60))" "$@" & # in the background, as the trap would wait for it otherwise
    running=$!
    wait $running
    code=$?
    [ "$code" = 124 ] && echo "$name: stopped after $minutes minutes; results are kept"
    if [ "$code" = 1 ]; then worst=1; elif [ "$code" != 0 ] && [ $worst = 0 ]; then worst=2; fi
}

indexproj=("$python" -m indexproj)
table=$PWD/results/tuned.json
step test "$python" -m pytest -q -p no:cacheprovider -m "not full" tests/gpu tests/interpreter
step sanitize bash tests/gpu/sanitize.sh
step ceilings "${indexproj[@]}" bench --minutes 0 --output results
step bench "${indexproj[@]}" bench --minutes "$minutes" --output results
step tune "${indexproj[@]}" tune --seconds "$((55 * minutes))" --output "$table"
step ab "${indexproj[@]}" bench --minutes "$minutes" --output results \
    --ab "env INDEXPROJ_TUNED= $(printf %q "$python")" --ab "env INDEXPROJ_TUNED=$(printf %q "$table") $(printf %q "$python")"
step report "${indexproj[@]}" report results
if [ -z "$gpu" ]; then
    echo "no GPU here"
    exit 2
fi
echo "== Results are in $PWD/results"
exit $worst
