#!/usr/bin/env bash
# Exports a checkpoint and compares every export with it: what the action runs, and any other CI can.
#
#     CHECKPOINT=RUN/checkpoint TEXT=held_out.txt ./parity.sh
#
# Environment: CHECKPOINT and TEXT as for l4q-parity; FORMATS ("gguf onnx"); EXPORTS, a folder of exports made before,
# one folder per format (empty: they are made anew); WINDOWS (4) and WINDOW (512 tokens); REPORT (l4q-parity), the folder
# for report.html, report.json and summary.txt. Exit codes are those of l4q-export and l4q-parity, 4 if a runtime differs.
set -euo pipefail

: "${CHECKPOINT:?the L4Q checkpoint folder}" "${TEXT:?a UTF-8 file of held-out text}"
report=${REPORT:-l4q-parity}
read -r -a formats <<<"${FORMATS:-gguf onnx}"
exports=${EXPORTS:-}

mkdir -p "$report"
if [ -z "$exports" ]; then
  exports=$(mktemp -d)
  trap 'rm -rf "$exports"' EXIT
  l4q-export "$CHECKPOINT" --to "${formats[@]}" --out "$exports"
fi

code=0
l4q-parity "$CHECKPOINT" "${formats[@]/#/$exports/}" --text "$TEXT" --windows "${WINDOWS:-4}" --window "${WINDOW:-512}" \
  --report "$report" --no-card >"$report/summary.txt" || code=$?
cat "$report/summary.txt"
if [ -n "${GITHUB_STEP_SUMMARY:-}" ]; then
  { echo '```'; cat "$report/summary.txt"; echo '```'; } >>"$GITHUB_STEP_SUMMARY"
fi
exit "$code"
