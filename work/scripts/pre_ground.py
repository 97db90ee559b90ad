import sys, torch
from pathlib import Path
from safetensors.torch import save_file
from samr1_mini.tiny import pretrain as p
W=Path('/tmp/w/pre')
pol=p.new_policy(W/'vision.safetensors'); p.train_ground(pol, int(sys.argv[1]), W)
save_file({k:v.contiguous() for k,v in pol.base.state_dict().items()}, W/'ground.safetensors')
