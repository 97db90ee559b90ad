import json,sys
import numpy as np
for R in sys.argv[1:]:
    s=json.load(open(R+'/summary.json')); b,t=s['base'],s['trained']
    m=[json.loads(l) for l in open(R+'/metrics.jsonl')]
    f=lambda k,p: round(float(np.mean([x[k] for x in p])),3)
    print(R,round(s['seconds']/60,1),'min; lenient',round(b['gIoU_lenient'],3),round(t['gIoU_lenient'],3),'diff',round(t['gIoU_lenient']-b['gIoU_lenient'],3),'gIoU',round(t['gIoU'],3),'boxes',round(b['box_accuracy'],3),t['box_accuracy'],'format',b['format'],t['format'],'ceil',round(s['ceiling']['gIoU'],3))
    print('  ',{k:(round(b['by_kind'][k]['gIoU_lenient'],2),round(t['by_kind'][k]['gIoU_lenient'],2)) for k in b['by_kind']})
    print('   reward last20 - 20..40',f('reward',m[-20:])-f('reward',m[20:40]),f('reward',m[-20:]),'zv',f('zero_variance',m[-20:]),'len',f('length',m[:5]),f('length',m[-20:]),'mem',max(x['peak_memory_gib'] for x in m))
