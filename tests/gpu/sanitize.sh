#!/usr/bin/env bash
# compute-sanitizer over one case of each kernel and pair of formats. Exits with 1 for an error, 2 without the tool.
set -u
cd "$(dirname "$0")/../.."
if ! command -v compute-sanitizer > /dev/null; then
    echo "sanitize: compute-sanitizer is not installed; it comes with the CUDA toolkit" >&2
    exit 2
fi
export PYTORCH_NO_CUDA_MEMORY_CACHING=1 # every tensor has bounds of its own
worst=0
for tool in memcheck racecheck initcheck; do
    echo "== $tool"
    compute-sanitizer --tool "$tool" --error-exitcode 1 "${PYTHON:-python3}" -m pytest -q -p no:cacheprovider \
        -m "not full" -k test_project_against_fp64 tests/interpreter/test_projection.py || worst=1
done
exit $worst
