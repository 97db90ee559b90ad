import sys, torch, numpy as np, collections
torch.set_num_threads(1)
from pathlib import Path
from samr1_mini.tiny import pretrain as p
from samr1_mini.tiny.scenes import *
from samr1_mini.reward import parse
from samr1_mini.metrics import *
from samr1_mini.policy import encode, sample
which, n = sys.argv[1], int(sys.argv[2])
W=Path('/tmp/w/pre')
pol=p.new_policy()
saved=torch.load(W/'language.pt', weights_only=True); pol.base.load_state_dict(saved['parts'][0]); pol.base.eval()
print(which, 'step', saved['step'], saved['shown'])
rng=np.random.default_rng(0)
for kind in (sys.argv[3].split(',') if len(sys.argv)>3 else KINDS):
    qs=[]
    for i in range(n*3):
        sc=make_scene(SPLITS['validation'][0]+i); q=ask(sc,rng,kind)
        if q: qs.append((sc,*q))
        if len(qs)==n: break
    for st,(*_,hint) in p.STYLES.items():
        with torch.no_grad():
            pr=encode(pol,[Image.fromarray(s.image) for s,_,_ in qs],[q+hint for _,q,_ in qs])
            out=sample(pol,pr,1,112,temperature=0)
        ok=[];io=[];name=[]
        for (s,q,t),[a] in zip(qs,out):
            b=parse(a.text,SIZE,SIZE).lenient_box
            ok.append(p.about(b,t.mask,s)); io.append(box_iou(b,t.box) if b else 0); 
            name.append(p.called(t,s) in (a.text.split('It is the')[-1] if 'It is' in a.text else a.text).split('</think>')[0])
        kept=np.mean([p.style_of(a.text)==st for [a] in out])
        print(f'{kind:10} {st:9} about {np.mean(ok):.2f} named {np.mean(name):.2f} boxIoU {np.mean(io):.2f} kept {kept:.2f}', out[0][0].text[:150] if st in('places','short') else '')
