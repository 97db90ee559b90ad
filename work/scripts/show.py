import json,sys
nb=json.load(open(f"tutorials/{sys.argv[1]}.ipynb"))
want=set(map(int,sys.argv[2:]))
for i,c in enumerate(nb['cells']):
    if want and i not in want: continue
    if c['cell_type']=='markdown': print(f"[{i} md]",''.join(c['source']))
    for o in c.get('outputs',[]):
        t=''.join(o.get('text',[])) or ''.join(o.get('data',{}).get('text/plain',[]))
        print(f"   [{i}] >>",t[:1500])
