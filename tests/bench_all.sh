#!/usr/bin/env bash
# Checks, then benchmarks, unattended: on a machine with a GPU in under 8 minutes, whatever happens.
#
#     tests/bench_all.sh                     # tables on stdout, and as JSON and text in output/bench
#     OUT=/tmp/bench tests/bench_all.sh      # … or there
#
# Each has a time of its own after which it is ended and the next begins. The status is 1 if one failed.
# Without a GPU kernels are compiled for one and checked by Triton's interpreter, and benchmarks are small.
set -u
cd "$(dirname "$0")/.."
out=${OUT:-output/bench}
mkdir -p "$out"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
failed=0

run() {                                      # name, seconds, command…
    local name=$1 seconds=$2 began=$SECONDS status
    shift 2
    printf '\n==== %s (at most %s s)\n' "$name" "$seconds"
    timeout --kill-after=5 "$seconds" "$@" 2>&1 | tee "$out/$name.txt"
    status=${PIPESTATUS[0]}
    printf '==== %s: %s, %s s\n' "$name" "$([ "$status" = 0 ] && echo ok || echo "status $status")" $((SECONDS - began))
    [ "$status" = 0 ] || failed=1
}

if python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    gpu=yes golden=45 test=90 kernels=105 pipeline=165              # with the picture 425 s at most, 450 if all are killed
    small=(--ignore=tests/test_kernels_compile.py)
    budget=(--seconds 80) bench=tests/bench_pipeline_gpu.py
    sizes=(--seconds 115 --skip "diffusers max-autotune" "ours, compiled")
else
    gpu=no check=300 test=900 kernels=120 pipeline=300
    small=(-x) budget=() bench=tests/bench_pipeline.py
    sizes=(--dtype fp32 --tiny --rounds 1)
fi

[ $gpu = yes ] || run compile_kernels $check env -u TRITON_INTERPRET python tests/compile_kernels.py
if [ $gpu = yes ]; then                      # most of the tests' time there is the compiler's
    weights=$(mktemp -d)
    trap 'rm -rf "$weights"' EXIT
    timeout 150 python $bench --folder "$weights" --only-write > "$out/weights.txt" 2>&1 &      # beside the tests
    sizes+=(--folder "$weights")
    python -c 'import xdist' 2>/dev/null && small+=(-n 14)
    run goldens $golden python -m pytest "${small[@]:1}" tests/test_golden_sampling.py -k on_a_gpu
fi
run tests $test python -m pytest "${small[@]}" tests/test_kernels_*.py tests/test_{gpu,graph,together}.py
wait
run bench_kernels $kernels python tests/bench_kernels.py "${budget[@]}" --json "$out/bench_kernels.json"
[ $gpu = no ] || run roofline 20 python tests/roofline.py "$out/bench_kernels.json" "$out/roofline.png"
run bench_pipeline $pipeline python $bench "${sizes[@]}" --json "$out/bench_pipeline.json"
printf '\n%s s; JSON and text in %s\n' "$SECONDS" "$out"
exit $failed
