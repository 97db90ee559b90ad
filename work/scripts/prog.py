import json, sys, numpy as np
from collections import Counter
from samr1_mini.tiny.answers import style_of
R=sys.argv[1]
def rd(f):
    out=[]
    for l in open(f):
        try: out.append(json.loads(l))
        except Exception: pass
    return out
m=rd(R+'/metrics.jsonl'); an=rd(R+'/answers.jsonl')
for a in range(0,len(m),15):
    w=m[a:a+15]; f=lambda k: round(float(np.mean([x[k] for x in w])),3)
    A=[x for x in an if a<x['step']<=a+15]
    c=Counter(style_of(x['text']) for x in A)
    kinds={k[:4]:round(np.mean([x['iou'] for x in A if x['kind']==k]),2) for k in ('attribute','part','relation','indirect','combined')}
    pl={k[:4]:round(np.mean([style_of(x['text'])=='places' for x in A if x['kind']==k]),2) for k in ('attribute','part','relation','indirect','combined')}
    print(a,{k:f(k) for k in ('reward','iou','zero_variance','length','kl','truncated')},dict(c),kinds,'places',pl)
