import torch, numpy as np, sys, collections
torch.set_num_threads(2)
from PIL import Image
from samr1_mini.tiny import pretrain as p
from samr1_mini.tiny.scenes import *
from samr1_mini.policy import encode, logprobs
pol=p.new_policy(); sd=torch.load(sys.argv[1],weights_only=True); print(sd['step']); pol.base.load_state_dict(sd['parts'][0])
rng=np.random.default_rng(5); t=pol.processor.tokenizer
acc=collections.defaultdict(list)
N=int(sys.argv[2])
tail=len(t(f" {p.A_WORD}{p.TURN}").input_ids)
own=len(sys.argv)>3
for i in range(N):
    pic=make_scene(SPLITS['validation'][0]+1000+i); sc=pic if own else make_scene(SPLITS['validation'][0]+5000+i)
    [pr]=encode(pol,[Image.fromarray(pic.image)],[p.A_WORD]); pr=p.cut(pr,len(pr.ids)-tail)
    rows=[];meta=[]
    for kind in ('relation','indirect','combined'):
        for _ in range(2):
            f=ask(sc,rng,kind)
            if not f: continue
            q,th=f
            if th not in sc.things: continue
            ids,m=p.written(pol,(f" {q} Measure first.{p.TURN}{p.listed(sc,'places',q)}",False),(f" {th.name}",True))
            rows.append(ids);meta.append((kind,q,m))
    if not rows: continue
    with torch.no_grad(): lp,_=logprobs(pol,[pr],[rows])
    o=0
    for ids,(kind,q,m) in zip(rows,meta):
        l=lp[o:o+len(ids)][m]; o+=len(ids)
        w=next((w for w in ('left of','right of','above','below','leftmost','rightmost','topmost','bottommost','largest','smallest') if w in q),'-')
        acc[kind,w].append(float(l.sum().exp()))
for k,v in sorted(acc.items()): print(k,len(v),'mean p',round(np.mean(v),2),'p>.5',round(np.mean(np.array(v)>.5),2))
