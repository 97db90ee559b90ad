import json,sys
sys.path.insert(0,'tests'); sys.path.insert(0,'.')
m=json.load(open('samr1_mini/tiny/measured.json')); from samr1_mini.tiny.scenes import KINDS
row=lambda *c: "| "+" | ".join(x if isinstance(x,str) else f"{x:.2f}" for x in c)+" |"
p=m['policy']; ks=(*KINDS,'all')
s=open('README.md').read()
s=s.replace('SAM_ROWS','\n'.join(row(n,v) for n,v in m['sam'].items()))
s=s.replace('STYLE_ROWS','\n'.join(row(st,f"{100*p['styles'][st]:.1f} %",*(k[x] for x in ks)) for st,k in p['hinted'].items()))
s=s.replace('KIND_ROWS','\n'.join(row(k,*p['sampled'][k].values()) for k in ks))
open('README.md','w').write(s)
