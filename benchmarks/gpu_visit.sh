#!/usr/bin/env bash
# Everything that waits for a GPU, in at most eight minutes on an H100, and useful when it is cut short:
#
#     OUT=results benchmarks/gpu_visit.sh [--smoke] [PART ...]
#
# The parts run in the order of their worth. Each has its own time limit and process, and appends what it finds at once:
# to $OUT/visit.txt what it prints, to $OUT/visit.jsonl one row a line. $OUT is benchmarks/gpu_visit_results by default.
# It needs torch, triton, transformers and Lightning under either name; PEFT, bitsandbytes and pytest are used where they
# are, and reported as absent elsewhere. --smoke rehearses on the CPU with tiny sizes.
set -u
cd "$(dirname "$0")/.."
OUT=${OUT:-benchmarks/gpu_visit_results} PYTHON=${PYTHON:-python3} BUDGET=${BUDGET:-475} SMOKE=
[ "${1:-}" = --smoke ] && { SMOKE=--smoke; shift; }
mkdir -p "$OUT"
export OUT PYTHONPATH="$PWD:$PWD/benchmarks:${PYTHONPATH:-}" PYTHONUNBUFFERED=1
if ! "$PYTHON" -c "import importlib.util as u, sys; sys.exit(not u.find_spec('lightning'))"; then
    export PYTHONPATH="$PWD/benchmarks/lightning_alias:$PYTHONPATH"
fi
SECONDS=0

part() {  # NAME LIMIT COMMAND...: run one part, at most until its own limit or the end of the budget
    local name=$1 limit=$2 started=$SECONDS code
    shift 2
    [ $((BUDGET - SECONDS)) -lt "$limit" ] && limit=$((BUDGET - SECONDS))
    if [ "$limit" -le 0 ]; then
        code=-1  # left out, for want of time
    else
        echo "== $name, at most $limit s" | tee -a "$OUT/visit.txt"
        timeout -k 5 "$limit" "$@" >>"$OUT/visit.txt" 2>&1
        code=$?
    fi
    echo "{\"part\": \"$name\", \"exit_code\": $code, \"seconds\": $((SECONDS - started))}" >>"$OUT/visit.jsonl"
    echo "   $name: exit code $code (0 done, 124 out of time, -1 left out), $((SECONDS - started)) s" |
        tee -a "$OUT/visit.txt"
    return $((code != 0))
}

wanted() { [ $# -eq 1 ] || case " ${*:2} " in *" $1 "*) ;; *) false ;; esac; }

measured() { wanted "$1" "${@:3}" && part "$1" "$2" "$PYTHON" benchmarks/gpu_visit.py $SMOKE "$1"; }

measured environment 25 "$@"
measured kernels 80 "$@" && export LIGHTNING_LORA_KERNELS=1  # for all that follows, once they are right
measured layers 60 "$@"
measured profile 20 "$@"
measured trainer 90 "$@"
measured strategies 40 "$@"
measured sweep 35 "$@"
measured shared 30 "$@"
measured quantized 20 "$@"
wanted tests "$@" && part tests 110 "$PYTHON" -m pytest -q -p no:cacheprovider -k "not deepspeed" tests/gpu
measured compile 75 "$@"
exit 0
