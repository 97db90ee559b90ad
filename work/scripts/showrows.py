from samr1_mini.tiny import pretrain as p
import numpy as np
pol=p.new_policy(); rng=np.random.default_rng(0); t=pol.processor.tokenizer
for i in range(60):
    s=p.make_scene(7*10**7+i)
    q=p.ask(s,rng,str(rng.choice(['relation','attribute'])))
    if not q: continue
    ids,m=p.shown_row(pol,str(rng.choice(['relation','attribute'])),*q,s,rng,.4)
    tx=t.decode(ids)
    if i<12: print(repr(tx),'LEARNT',repr(t.decode(ids[m])))
for i in range(6):
    for ids,m in p.text_rows(pol,rng,p.make_scene(i),2): print(repr(t.decode(ids)),'LEARNT',repr(t.decode(ids[m])))
