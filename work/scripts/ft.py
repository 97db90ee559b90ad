import torch
from pathlib import Path
from safetensors.torch import load_file
from samr1_mini.tiny import pretrain as p
W=Path('/tmp/w/ft'); W.mkdir(exist_ok=True)
pol=p.new_policy()
st=torch.load('/tmp/w/pre/language.pt',weights_only=True)['parts'][0]; pol.base.load_state_dict(st)
opt=p.policy_optimizers
def slow(m):
    o=opt(m)
    for x in o:
        for g in x.param_groups: g['lr']*=.5
    return o
p.policy_optimizers=slow
orig=p.scenes_from
p.scenes_from=lambda start,count: orig(start+3*10**8,count)
p.train_language(pol, 240, W, slack=.4)
pol.base.to(torch.bfloat16).save_pretrained(W/'policy'); pol.processor.save_pretrained(W/'policy')
