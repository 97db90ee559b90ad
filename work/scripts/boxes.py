import json, sys, numpy as np, collections
R=sys.argv[1]
for n in ('test-base','test-trained'):
    p=f'{R}/{n}.json'
    try: d=json.load(open(p))
    except Exception as e: print(e); continue
    if isinstance(d,list): d=d[0] if 'by_kind' in d[0] else {}; 
    if d: print(n,{k:d[k] for k in ('gIoU','gIoU_lenient','cIoU','format','box_accuracy')},{k:round(v['gIoU_lenient'],3) for k,v in d['by_kind'].items()})
print(open(f'{R}/summary.json').read()[:1500])
from samr1_mini.reward import parse
from samr1_mini.metrics import box_iou, tight_box
from samr1_mini.data import load_data
from samr1_mini.tiny.answers import style_of
data=load_data('shapes','train',3008)
an=[json.loads(l) for l in open(f'{R}/answers.jsonl')]
out=collections.defaultdict(list); ki=collections.defaultdict(list)
for x in an:
    d=(x['step']-1)//10
    ki[d,x['kind'],style_of(x['text'])].append(x['iou'])
    if x['step']%3: continue
    b=parse(x['text'],112,112).lenient_box
    s=data[int(x['id'].split('-')[1])]
    if b and x['iou']>.1: out[d].append(box_iou(b,tight_box(s.mask)))
for k,v in sorted(out.items()): print(k*10, len(v), round(np.mean(v),3), round(np.mean(np.array(v)>.5),3))
