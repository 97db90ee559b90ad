from samr1_mini.tiny import pretrain as p
import numpy as np
pol=p.new_policy(); rng=np.random.default_rng(0); t=pol.processor.tokenizer
for i in range(8):
    ids,m=p.astray_row(pol,p.make_scene(7*10**7+i),p.make_scene(8*10**7+i),rng,.4)
    whole=t(t.decode(ids)).input_ids
    print(list(ids)==whole, repr(t.decode(ids)),'LEARNT',repr(t.decode(ids[m])))
