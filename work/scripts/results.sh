#!/bin/bash
# results.sh CODE: all committed runs, into CODE/runs, from the networks in CODE. About 75 minutes on two quiet cores. Each step is skipped if it is done.
set -e
cd $1; O=runs; mkdir -p $O; PY=/tmp/w/venv/bin/python
train() { [ -f $O/$1/summary.json ] || PYTHONPATH=. $PY train.py --samples 3000 --run $O/$1 "${@:2}" $([ -f $O/$1/state.pt ] && echo --resume) > $O/$1.log 2>&1; }
OMP_NUM_THREADS=2 train tiny-seed0
export OMP_NUM_THREADS=1
(train tiny-seed1 --seed 1) & (train tiny-seed2 --seed 2) & wait
(train tiny-seed0-no-accuracy --accuracy-weight 0) & (train film --eval-every 8) & wait
one() { [ -f $O/$1/results.json ] || PYTHONPATH=. $PY eval.py --adapter $O/tiny-seed0/adapter --count 500 --out $O/$1 "${@:2}" > $O/$1.log 2>&1; }
(one blank --blank) & (one mirror --mirror) & wait
PYTHONPATH=. $PY tutorials/animate.py $O/film --out $O/learning.gif
PYTHONPATH=. $PY -m samr1_mini.tiny.phases $O/tiny-seed0 $O/tiny-seed1 $O/tiny-seed2 --out $O/phases.png
echo done > $O/done
