import torch, numpy as np
from PIL import Image
from samr1_mini.tiny import pretrain as p
from samr1_mini.tiny.scenes import *
from samr1_mini.policy import load_policy, encode, sample
pol=load_policy('tiny'); rng=np.random.default_rng(0); qs=[]
for i in range(8):
    s=make_scene(SPLITS['validation'][0]+i)
    for k in ('indirect','combined'):
        q=ask(s,rng,k)
        if q: qs.append((s,*q))
with torch.no_grad(): pr=encode(pol,[Image.fromarray(s.image) for s,_,_ in qs],[q+p.STYLES['places'][2] for _,q,_ in qs])
for (s,q,t),[a] in zip(qs,sample(pol,pr,1,112,temperature=0)):
    print('Q',q,'| T',p.called(t,s),'|',a.text.split('</think>')[0]); print('   truth', p.look_around(s,True))
