import sys; sys.path.insert(0,'.')
import json, re
import matplotlib; matplotlib.use("agg")
nb=json.load(open('tutorials/2_sam_as_the_reward.ipynb'))
src=''.join(nb['cells'][1]['source']).replace('%matplotlib inline','').replace('set_num_threads(2)','set_num_threads(1)')
exec(src)
def wider(box, part):
    x1, y1, x2, y2 = box; w, h = part * (x2 - x1), part * (y2 - y1)
    return tuple(np.clip([x1 - w, y1 - h, x2 + w, y2 + h], 0, 112).tolist())

for i in (27,29,30,39,42,46,53):
    x,scene=samples[i],scenes[i]; rng=np.random.default_rng(0)
    thing=next(t for t in scene.things if (t.mask & x.mask).any()); beside=neighbour(thing,scene)
    true=tight_box(x.mask); on, off = points_on(thing.mask, rng, 1, 1), points_on(beside.mask, rng, 1, 0)
    ps=[.3,.32,.34,.36,.38,.4,.45,.5]
    m=segmenter.masks(np.asarray(x.image),[tuple(round(v) for v in wider(true,p)) for p in ps],[on]*len(ps))
    print(i,[round(iou(*intersection_union(a,x.mask)),2) for a in m])
    segmenter.look_at(np.asarray(x.image))
    box = segmenter.predictor.transform.apply_boxes_torch(torch.tensor([wider(true,.4)], dtype=torch.float32), (112,112))
    three, guesses, _ = segmenter.predictor.predict_torch(None, None, box, multimask_output=True)
    print("   ",[(round(g,2),round(iou(*intersection_union(k,x.mask)),2)) for k,g in zip(three[0].numpy(),guesses[0].tolist())])
