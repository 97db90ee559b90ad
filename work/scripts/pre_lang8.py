import sys, torch
from pathlib import Path
from safetensors.torch import load_file
from samr1_mini.tiny import pretrain as p
W=Path("/tmp/w/pre8"); W.mkdir(exist_ok=True); steps=int(sys.argv[1])
pol=p.new_policy(); pol.base.load_state_dict(load_file("/tmp/w/pre/ground.safetensors"))
p.train_language(pol, steps, W)
pol.base.to(torch.bfloat16).save_pretrained(W/'policy'); pol.processor.save_pretrained(W/'policy')
