"""Puts the figures of committed logs in the README's places: run in the project's root."""
import json, sys, pathlib
sys.path[:0] = ['tests', '.', 'tutorials']
import re
R = pathlib.Path('tutorials/results'); s = open('README.md').read()
from samr1_mini.tiny.scenes import KINDS
row = lambda *c: "| " + " | ".join(x if isinstance(x, str) else f"{x:.2f}" for x in c) + " |"
if (f := pathlib.Path('samr1_mini/tiny/measured.json')).exists():
    m = json.load(open(f)); p = m['policy']; ks = (*KINDS, 'all')
    s = s.replace('SAM_ROWS', '\n'.join(row(n, v) for n, v in m['sam'].items()))
    s = s.replace('STYLE_ROWS', '\n'.join(row(st, f"{100 * p['styles'][st]:.1f} %", *(k[x] for x in ks)) for st, k in p['hinted'].items()))
    s = s.replace('KIND_ROWS', '\n'.join(row(k, *p['sampled'][k].values()) for k in ks))
if (R / 'seed0/mirror.json').exists():
    import test_readme as t
    rows = list(t.result_rows())
    s = s.replace('KIND_RESULT_ROWS', '\n'.join(rows[1::2])).replace('RESULT_ROWS', '\n'.join(rows[::2]))
    run = json.load(open(R / 'seed0/summary.json')); lines = [json.loads(l) for l in open(R / 'seed0/metrics.jsonl')]
    v = dict(minutes=f"{run['seconds'] / 60:.0f}", memory=f"{max(l['peak_memory_gib'] for l in lines):.1f}", ceiling=f"{run['ceiling']['gIoU']:.2f}",
             trained=f"{run['trained']['gIoU']:.2f}", blank=f"{json.load(open(R / 'seed0/blank.json'))['gIoU']:.2f}", mirror=f"{json.load(open(R / 'seed0/mirror.json'))['gIoU']:.2f}")
    for k, x in v.items(): s = s.replace(f'<<{k}>>', x)
if (R / 'ablations.csv').exists():
    import test_ablations as ta
    s = s.replace('ABLATION_ROWS', '\n'.join(ta.ablation_rows()))
open('README.md', 'w').write(s)
