import json, sys, numpy as np
from samr1_mini.tiny.answers import style_of
R,a,b=sys.argv[1],int(sys.argv[2]),int(sys.argv[3]); an=[]
for l in open(R+'/answers.jsonl'):
    try: an.append(json.loads(l))
    except Exception: pass
for st in ('short','names','places'):
    print(st,{k:(len(v:=[x['iou'] for x in an if a<=x['step']<=b and x['kind']==k and style_of(x['text'])==st]), round(float(np.mean(v)),2) if v else None) for k in ('attribute','part','relation','indirect','combined')})
