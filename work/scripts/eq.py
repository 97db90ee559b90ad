import sys
from samr1_mini.tiny import pretrain as p
import numpy as np, hashlib
pol=p.new_policy(); rng=np.random.default_rng(0); h=hashlib.md5()
for i in range(40):
    ids,m=p.astray_row(pol,p.make_scene(7*10**7+i),p.make_scene(8*10**7+i),rng,.4); h.update(ids.numpy().tobytes()+m.numpy().tobytes())
    s=p.make_scene(i); q=p.ask(s,rng,'relation')
    if q:
        ids,m=p.shown_row(pol,'relation',*q,s,rng,.4); h.update(ids.numpy().tobytes()+m.numpy().tobytes())
print(h.hexdigest())
