#!/bin/bash
# rl.sh CODE RUN options...
cd $1; shift; R=$1; shift
export OMP_NUM_THREADS=${THREADS:-1}
exec /tmp/w/venv/bin/python train.py --run $R "$@" > $R.log 2>&1
