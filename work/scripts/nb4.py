"""Builds 4_train_and_watch.ipynb: texts that need results are in RESULT of nb4_results.py."""
import sys
import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
sys.path.insert(0, "/tmp/w/nb")
from nb4_results import RESULT
class R(dict):
    __missing__ = lambda self, key: "TODO " + key
R = R(RESULT)

old = nbformat.read("/tmp/w/nb/4_old.ipynb", 4)
src = lambda i: old.cells[i].source
def swap(text, *pairs):
    for a, b in pairs:
        assert a in text, a
        text = text.replace(a, b)
    return text
md, code = new_markdown_cell, new_code_cell
cells = [
md(swap(src(0), ("--test-samples 120", "--test-samples 125 --lr 5e-4"), ("and blank the picture to see whether the policy looks", "and blank and mirror the picture to see whether, and how, the policy looks"))),
code(swap(src(1), ("test_samples=120", "test_samples=125, lr=5e-4"), ("from samr1_mini.data import load_data", "from samr1_mini.data import Mirrored, load_data"),
          ("from samr1_mini.segmenter import load_segmenter", "from samr1_mini.segmenter import load_segmenter\nfrom samr1_mini.tiny.answers import STYLES, style_of\nfrom samr1_mini.tiny.scenes import KINDS"), ("from samr1_mini.grpo import train", "from samr1_mini.grpo import train\nfrom samr1_mini.metrics import intersection_union, iou"), ("from samr1_mini.policy import load_policy", "from samr1_mini.policy import load_policy\nfrom samr1_mini.reward import parse"))),
md(swap(src(2), ("each on a quarter of the questions.", "each on a quarter of the questions. The learning rate is five times the default, so that 20 steps show something; further down is what a slow one does over the whole run."))),
code(src(3)),
md(swap(src(4), ("the same 120 held-out scenes", "the same 125 held-out scenes"))),
code(src(5)),
md(R["log"]),
code(src(7)),
md(src(8)),
code(src(9)),
md("""## Before and after, on the same scenes

`answers.jsonl` keeps one sampled answer to each question. **Predict** how the ways of thinking (notebook 1: *sentence*, *json*, *short*, *names*, *places*) shift from the first five steps to the last five: which grows, which goes?"""),
code("""segmenter = load_segmenter("tiny")
data = list(load_data("shapes", "test", 125))
base, trained = load_policy("tiny"), load_policy("tiny", adapter=folder / "adapter")
before, after = (evaluate(p, segmenter, data, settings).rows for p in (base, trained))
for i in (2, 3, 4):
    print("Question:", data[i].question, "\\n  base:   ", before[i].text, "\\n  trained:", after[i].text, "\\n")
drawn = [json.loads(text) for text in (folder / "answers.jsonl").read_text().splitlines()]
for name, some in (("first five steps", drawn[:80]), ("last five steps", drawn[-80:])):
    print(f"{name:<18}" + "   ".join(f"{style} {np.mean([style_of(a['text']) == style for a in some]):.2f}" for style in STYLES))"""),
code(swap(src(12), ("(2, 5, 8, 11)", "(1, 2, 3)"), ("plt.subplots(2, 4, figsize=(9, 5.2)", "plt.subplots(2, 3, figsize=(6.8, 5.2)"))),
md(R["styles"] + """ By kind of question:"""),
code(swap(src(14), ('for kind in ("attribute", "relation", "indirect"):', "for kind in KINDS:"))),
md(R["kinds"] + """

## The whole run

Twenty steps are the beginning. Here is how the run of 3,000 samples goes on that the README tells of (`results/seed0`, drawn by `python -m samr1_mini.tiny.phases RUN`). **Predict** before you run the cell: which way of thinking comes next, for which kinds of question, and what happens to the length of the answers?"""),
code("""Image(filename=str(root / "tutorials/results/phases.png"))"""),
md(R["phases"] + """

## Does it look at the picture?

A policy can earn rewards without looking: answer with a large box in the middle, say. The check is simple: show it a grey picture (SAM still gets the true one) and score again. **Predict** the score."""),
code(src(16)),
md("""And how does it see *where* things are? In a mirror the picture, its true mask and the words left and right are exchanged, so the questions are as fair as before. Who sees where things are does as well there. **Predict** the score of the trained policy, and then the score of the same boxes on the picture as it was drawn, not mirrored."""),
code("""there = list(Mirrored(load_data("shapes", "test", 125)))
mirror = evaluate(trained, segmenter, there, settings).rows
print(f"IoU with the picture {np.mean([r.iou for r in after]):.2f}, in the mirror {np.mean([r.iou for r in mirror]):.2f}")
boxes = [parse(r.text, 112, 112) for r in mirror]  # said of the mirrored picture, tried on the one as it was drawn
masks = [segmenter.masks(np.asarray(x.image), [b.lenient_box], [b.points])[0] if b.lenient_box else np.zeros_like(x.mask) for x, b in zip(data, boxes)]
print(f"the same boxes on the picture as it was drawn: {np.mean([iou(*intersection_union(m, x.mask)) for m, x in zip(masks, data)]):.2f}")
print("asked of the mirrored picture:", there[2].question)
print("it says:", mirror[2].text)"""),
md(R["mirror"] + """

## Resume

A run can be stopped by Ctrl-C and gone on with, bit for bit as if it had never been stopped; and it can be made longer. Here it gets 80 more questions, 5 steps. On the command line: `python train.py --resume --run FOLDER --samples 400`."""),
code(src(18)),
md(src(19)),
]
nb = new_notebook(cells=cells, metadata=old.metadata)
for i, c in enumerate(nb.cells): c["id"] = f"4-{i:02d}"
nbformat.write(nb, "tutorials/4_train_and_watch.ipynb")
