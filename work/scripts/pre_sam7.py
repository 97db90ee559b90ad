import sys, torch
from pathlib import Path
from samr1_mini.tiny import pretrain as p
which, steps = sys.argv[1], int(sys.argv[2])
W=Path('/tmp/w/sam7')
if which=='sam': p.train_sam(steps, W/'sam.safetensors', W)
else: p.train_vision(steps, W/'vision.safetensors', W)
