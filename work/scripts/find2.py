import sys; sys.path.insert(0,'.')
import json, re
import matplotlib; matplotlib.use("agg")
nb=json.load(open('tutorials/2_sam_as_the_reward.ipynb'))
src=''.join(nb['cells'][1]['source']).replace('%matplotlib inline','').replace('set_num_threads(2)','set_num_threads(1)')
exec(src)
def wider(box, part):
    x1, y1, x2, y2 = box; w, h = part * (x2 - x1), part * (y2 - y1)
    return tuple(np.clip([x1 - w, y1 - h, x2 + w, y2 + h], 0, 112).tolist())
for i,(x,scene) in enumerate(zip(samples,scenes)):
    if x.kind=="part": continue
    rng=np.random.default_rng(0)
    thing=next(t for t in scene.things if (t.mask & x.mask).any()); beside=neighbour(thing,scene)
    true=x1,y1,x2,y2=tight_box(x.mask)
    on, off = points_on(thing.mask, rng, 1, 1), points_on(beside.mask, rng, 1, 0)
    P=[(true,[]),(wider(true,.2),[]),(wider(true,.3),on),(wider(true,.4),[]),(wider(true,.4),on),(wider(true,.4),on+off),((x1,y1,(x1+x2)/2,y2),[]),(beside.box,on)]
    m=segmenter.masks(np.asarray(x.image),[b for b,_ in P],[p for _,p in P])
    v=[iou(*intersection_union(a,x.mask)) for a in m]
    if v[1]>.85 and v[5]>.8 and .5<v[3]<.8 and .5<v[4]<.8 and v[7]<.3: print(i,x.kind,x.question,[round(a,2) for a in v])
