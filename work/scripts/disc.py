import numpy as np, re, inspect
from samr1_mini.tiny import pretrain as p
from samr1_mini.tiny.answers import *
from samr1_mini.tiny.scenes import *
from samr1_mini.metrics import *
src=inspect.getsource(p.meant)
for disc in ("0.1","0.05","0.0"):
    ns=dict(vars(p)); exec(src.replace("0.1 * without",disc+" * without"),ns); m=ns['meant']
    rng=np.random.default_rng(0); out={}
    for i in range(120):
        s=make_scene(SPLITS['validation'][0]+i)
        for t in s.things+[t.dot for t in s.things if t.dot]:
            for sl in (0.05,.1,.15,.2,.3,.4):
                b=wide_box(t.box,rng,sl); pts=loose_points(t,rng,sl)
                for k,pp in (('pts',pts),('none',[])):
                    out.setdefault((sl,k),[]).append((iou(*intersection_union(m(s,b,pp),t.mask)),box_iou(b,t.box)))
    print(disc,{k:(round(float(np.mean([a for a,_ in v])),2),'>.8',round(float(np.mean([a>.8 for a,_ in v])),2),'graded',round(float(np.mean([.2<a<.8 for a,_ in v])),2)) for k,v in out.items() if k[1]=='pts' or disc=="0.1"})
