import sys, json
from samr1_mini.tiny import pretrain as p
from samr1_mini.policy import load_policy
from samr1_mini.segmenter import load_segmenter
m=p.measure_policy(load_policy('tiny'), load_segmenter('tiny'), int(sys.argv[1]), 4)
json.dump(m,open('/tmp/w/quick.json','w'))
print(m['styles']); 
for k,v in m['unasked'].items(): print(k,v)
for k,v in m['asked'].items(): print(k,v)
