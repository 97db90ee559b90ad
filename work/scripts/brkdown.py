import json,sys,numpy as np
from samr1_mini.tiny.pretrain import about, held_out
from samr1_mini.tiny.scenes import *
from samr1_mini.data import load_data
from samr1_mini.reward import parse
from samr1_mini.metrics import box_iou,tight_box
from samr1_mini.tiny.answers import style_of
R=sys.argv[1]
for n in ('base','trained'):
    rows=json.load(open(f'{R}/test-{n}.json')); data=load_data('shapes','test',500)
    print(list(rows[0])) if n=='base' else 0
    out={}
    for i,r in enumerate(rows):
        x=data[i]; sc=make_scene(SPLITS['test'][0]+i)
        a=parse(r.get('text') or r['texts'][0],112,112); b=a.lenient_box
        ok=about(b,x.mask,sc); bi=box_iou(b,tight_box(x.mask)) if b else 0
        for k in (x.kind,'all'): out.setdefault(k,[]).append((ok,r['iou'],bi,style_of(r.get('text') or r['texts'][0])))
    for k,v in out.items():
        ok=np.array([a for a,*_ in v]); io=np.array([b for _,b,*_ in v]); bi=np.array([c for _,_,c,_ in v])
        print(n,k,len(v),'about',ok.mean().round(2),'IoU|about',io[ok].mean().round(3),'IoU|not',io[~ok].mean().round(2),'>.8|about',(io[ok]>.8).mean().round(2),'.5-.8',((io[ok]>.5)&(io[ok]<=.8)).mean().round(2),'<.5',(io[ok]<=.5).mean().round(2),'boxIoU|about',bi[ok].mean().round(2),'>.5',(bi[ok]>.5).mean().round(2),{s:sum(q[3]==s for q in v) for s in ('sentence','json','short','names','places')})
