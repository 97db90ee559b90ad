import json,sys,base64
nb=json.load(open(f"tutorials/{sys.argv[1]}.ipynb"))
for i,c in enumerate(nb['cells']):
    for k,o in enumerate(c.get('outputs',[])):
        for m,e in (("image/png","png"),("image/jpeg","jpg")):
            if m in o.get('data',{}): open(f"/tmp/w/nbw/{sys.argv[1][0]}_{i}_{k}.{e}","wb").write(base64.b64decode(o['data'][m]))
