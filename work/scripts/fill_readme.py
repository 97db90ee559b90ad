"""Run in the project's root when measured.json, tutorials/results and ablations.csv are there: fills the README's places."""
import json, sys
sys.path[:0] = ["tests", ".", "tutorials"]
import test_readme as t
s = open("README.md").read()
put = lambda name, text: globals().update(s=s.replace(name, text))
results = list(t.result_rows()); kinds, results = results[1::2], results[0::2]
measured = list(t.measured_rows()); m = json.load(open("samr1_mini/tiny/measured.json"))
n_sam, n_style = len(m["sam"]), len(m["policy"]["hinted"])
put("KIND_RESULT_ROWS", "\n".join(kinds)); put("RESULT_ROWS", "\n".join(results))
put("SAM_ROWS", "\n".join(measured[:n_sam])); put("STYLE_ROWS", "\n".join(measured[n_sam:n_sam + n_style]))
put("KIND_ROWS", "\n".join(measured[n_sam + n_style:]))
run = t.load("seed0/summary.json")
lines = [json.loads(x) for x in open("tutorials/results/seed0/metrics.jsonl")]
put("<<minutes>>", f"{run['seconds'] / 60:.0f}"); put("<<memory>>", f"{max(x['peak_memory_gib'] for x in lines):.1f}")
put("<<ceiling>>", f"{run['ceiling']['gIoU']:.2f}"); put("<<trained>>", f"{run['trained']['gIoU']:.2f}")
put("<<blank>>", f"{t.load('seed0/blank.json')['gIoU']:.2f}"); put("<<mirror>>", f"{t.load('seed0/mirror.json')['gIoU']:.2f}")
import numpy as np
runs = list(t.ways()); late = [a for answers in runs for a in answers if a["part"] > 0.9]
share = lambda *kinds: f"{np.mean([a['style'] == 'places' for a in late if a['kind'] in kinds]):.2f}"
put("<<combined>>", share("combined")); put("<<relation>>", share("relation")); put("<<others>>", share("attribute", "part", "indirect"))
for name, low, high in (("<<start>>", 0, 0.05), ("<<end>>", 0.9, 1)):
    put(name, f"{np.mean([a['tokens'] for answers in runs for a in answers if low < a['part'] <= high]):.0f}")
for seed, answers in enumerate(runs):
    put(f"<<places{seed}>>", f"{np.mean([a['style'] == 'places' for a in answers if a['part'] > 0.9]):.2f}")
rises = []
for seed in range(3):
    steps = [json.loads(x)["reward"] for x in open(f"tutorials/results/seed{seed}/metrics.jsonl")]
    rises.append(sum(steps[-20:]) / 20 - sum(steps[20:40]) / 20)
put("<<rise>>", "{:.2f}, {:.2f} and {:.2f}".format(*rises))
import test_ablations as a
if a.ablations.FILE.exists():
    put("ABLATION_ROWS", "\n".join(a.ablation_rows()))
open("README.md", "w").write(s)
