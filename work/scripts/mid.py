import torch, numpy as np, sys
from PIL import Image
from samr1_mini.tiny import pretrain as p
from samr1_mini.tiny.scenes import *
from samr1_mini.policy import encode, sample
from samr1_mini.reward import parse
torch.set_num_threads(1)
pol=p.new_policy(); sd=torch.load(sys.argv[1],weights_only=True); print(sd['step']); pol.base.load_state_dict(sd['parts'][0])
rng=np.random.default_rng(0); qs=[]
N=int(sys.argv[2])
for i in range(N):
    s=make_scene(SPLITS['validation'][0]+i)
    for k in ('relation','indirect','combined'):
        q=ask(s,rng,k)
        if q: qs.append((s,k,*q))
out={}
for style in ('short','places'):
    with torch.no_grad(): pr=encode(pol,[Image.fromarray(s.image) for s,_,_,_ in qs],[q+p.STYLES[style].hint for _,_,q,_ in qs])
    for (s,k,q,t),[a] in zip(qs,sample(pol,pr,1,112,temperature=0)):
        ok=p.about(parse(a.text,112,112).lenient_box,t.mask,s); out.setdefault((style,k),[]).append(ok)
        if style=='places' and len(out[style,k])<6: print(ok,'Q',q,'| T',p.called(t,s),'|',a.text)
for k,v in out.items(): print(k,len(v),np.mean(v))
