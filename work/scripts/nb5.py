"""Builds 5_ablations.ipynb: texts that need results are in RESULT."""
import re, sys
import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
sys.path.insert(0, "/tmp/w/nb")
from nb5_results import RESULT
class R(dict):
    __missing__ = lambda self, key: "TODO " + key
R = R(RESULT)

old = nbformat.read("/tmp/w/nb/5_old.ipynb", 4)
md, code = new_markdown_cell, new_code_cell
sys.path[:0] = ["tutorials", "."]  # run it in the project's root
import ablations
LINES = ablations.read()
there = lambda title: len(ablations.rows_of(LINES, title)) > 1
left = [title for title in ablations.TABLES if not there(title)]
cells = [
md("""# 5. Ablations

What does each part of the method do? The paper answers with a run or so a row at full size. Here the same switches are thrown in the miniature, with several seeds each, so that a difference comes with an interval. You read the committed runs, predict before you look, and run the smallest comparison yourself.

All runs were made by one command, `python tutorials/ablations.py`, a line each in `results/ablations.csv`, with the gIoU of each test scene in `results/ablations/`. It makes only what is missing and can be stopped at any time.

A word on what this can tell. The miniature has drawn scenes, a policy of 3 million parameters and runs of 1,008 questions, where the table does not say otherwise (a third of the first command's, at three times its learning rate: what it finds in 187 steps, these find in 63). A mechanism that shows here is real. A difference that does *not* show here may still show at full size, where pictures are harder, answers longer and training more easily led astray."""),
code(old.cells[1].source.replace("base is the command `python train.py --preset tiny --samples 640`", "base is the command `python train.py --preset tiny --samples 1008 --lr 3e-4`")),
md("""## How to read a difference

Two runs of the same settings with different seeds differ: other questions, other draws. And the same run would have another score on other test scenes. So a mean has an interval for both, over seeds and over scenes.

But rows share their seeds and their scenes: seed 3 draws the same questions for every row, and all runs answer the same 1,000 test scenes. So the *difference* from the base is taken seed by seed and scene by scene. What makes a scene hard for all runs alike drops out, and the interval of a difference is several times narrower than those of the two means. `ablations.interval` says how it is made. If it holds 0, the runs do not show a difference, which is not to say that there is none: look at what else it holds.

**Predict**: how far apart are the seeds of one and the same setting, in gIoU on 1,000 held-out scenes?"""),
code("""base = [line for line in lines if line["row"] == "base"]
for line in base:
    print(f"seed {line['seed']}: gIoU {line['gIoU']:.3f} (before training, lenient: {line['base_gIoU_lenient']:.3f}), combined questions {line['combined']:.3f}, format {line['format']:.2f}")
mean, half = ablations.interval([line["scenes"] for line in base])
print(f"mean {mean:.3f} ± {half:.3f}")"""),
md(R["seeds"] + """

Of twenty rows that in truth differ in nothing, about one will show an interval without 0 by chance; and since all are compared with the same runs of the base, a lucky or unlucky base moves them together.

The column `paper` is its gIoU in percent on ReasonSeg's test set, photographs with questions that need reasoning (or a word, where it gives no figure): compare the order, not the size. The last column is what the mechanism let us expect; it was committed before the first run.

Under some tables stand means of other columns. `attribute` to `combined` (lenient gIoU by kind of question), `format` and `box_accuracy` are of the test scenes; `zero_variance`, `length`, `points`, `kl` and the share of tokens that the clip holds are of the sampled answers in a run's last ten steps; `names` and `places` are the shares of these two ways of thinking (notebook 1) in the last tenth of training."""),
code(old.cells[5].source),
"SPLIT",
md("""## Table 3: tiers or one threshold

Base pays in tiers (4, 3 or 2, eq. (5)); the others pay 4 above one threshold and else nothing. You saw in notebook 2 where they part: at masks of IoU between 0.5 and 0.8.

**Predict** which of the four is best, and which has the most groups without variance (all eight answers paid alike)."""),
code('show("table 3: accuracy reward", "zero_variance", "box_accuracy", "places")'),
md(R["table 3"] + """ Count the masks of the base and of a trained policy (`results/seed0/adapter`) in each tier. **Predict** the shares between 0.5 and 0.8."""),
code("""settings, _ = make_settings(preset="tiny", device="cpu")
data = list(load_data("shapes", "test", 150))
for name, adapter in (("base", None), ("trained", root / "tutorials/results/seed0/adapter")):
    rows = evaluate(load_policy("tiny", adapter=adapter), load_segmenter("tiny"), data, settings).rows
    ious = np.array([row.iou for row in rows])
    shares = [f"up to {high:.1f}: {np.mean((ious > low) & (ious <= high)):>4.0%}" for low, high in ((-0.01, 0.5), (0.5, 0.7), (0.7, 0.8), (0.8, 1))]
    print(f"{name:<9} IoU of the masks", "   ".join(shares))"""),
md(R["tiers"]),
"SPLIT",
md("""## Table 4: how tokens are weighed, and the clip

Base is eq. (4): one normaliser over all tokens of a group, and the clip from 0.8 to 1.3. *GRPO* is eq. (2): each answer's mean, and 0.8 to 1.2. The other two rows have one of the two changes each.

**Predict**: which of the two changes delays a rare way of thinking, whose answers are long? And what share of tokens does the clip hold in the last steps?"""),
code('show("table 4: objective", "names", "places", "length", "clip_high", "clip_low")'),
md(R["table 4"]),
"SPLIT",
md("""## Points

Notebook 2 showed that a point rescues a box that holds two objects. With `--no-points` SAM gets the box alone, in training and in the test. **Predict**: which policy draws tighter boxes (`box_accuracy`: the share of boxes with an IoU above 0.5 with the true box), and which gets better masks?"""),
code('show("points", "box_accuracy", "points")'),
md(R["points"]),
"SPLIT",
md("""## What is paid for: SAM's mask, its plain IoU, or the box

The paper does not compare its reward with the obvious cheap one: the IoU of the box itself (`box IoU`, through the same tiers, so training needs no SAM). Nor with the IoU of the mask without tiers (`continuous mask IoU`, four times the IoU).

**Predict**: which row ends with the tightest boxes? Is it the one with the best masks?"""),
code('show("reward from", "box_accuracy", "zero_variance", "kl", "places")'),
md(R["reward from"]),
"SPLIT",
md("""## The size of the group

Every row sees the same questions; a group of 16 samples eight times as many answers to them as a group of 2.

**Predict** the share of groups without variance for 2, 4, 8 (base) and 16 answers, and from which size on more answers no longer pay off."""),
code('show("group", "zero_variance", "names", "places", "combined")'),
md(R["group"]),
"SPLIT",
md("""## LoRA: rank and learning rate

The paper trains all weights, at 1e-6, and so says nothing of either. Base has rank 32 and a learning rate of 3e-4. **Predict** which of the two matters more: a rank from 4 to 128, or a learning rate from 1e-4 to 1e-3?"""),
code('show("LoRA", "kl", "format", "places", "box_accuracy")'),
md(R["LoRA"]),
"SPLIT",
md("""## KL on and off

The paper's appendix tells of a run without the KL term that collapsed. **Predict** what `--beta 0` does here, and `--beta 0.05`, ten times the base's."""),
code('show("KL", "length", "format", "kl", "places")'),
md(R["KL"]),
"SPLIT",
md("""## How many questions: table 6

The paper trains on 3,000 questions and finds that 10,000 gain nothing on ReasonSeg. **Predict** the shape of the curve (16 questions are a step), and of the share of groups without variance along it."""),
code("""counts = {ablations.SAMPLES: "base"} | {int(row.split()[0]): row for row in ablations.rows_of(lines, "samples")[1:]}
before = np.mean([line["base_gIoU_lenient"] for line in base])
figure, axes = plt.subplots(figsize=(7, 3.4))
for measure, colour in (("gIoU", "black"), ("relation", BLUE), ("indirect", ORANGE), ("combined", "#009E73")):
    means = [ablations.compare(lines, counts[n], measure)["mean"] for n in sorted(counts)]
    axes.errorbar(sorted(counts), [m for m, _ in means], [half for _, half in means], color=colour, marker="o", capsize=3, label=measure)
axes.axhline(before, color="black", ls="--", lw=1)
axes.set_xscale("log"), axes.set_xticks(sorted(counts), sorted(counts)), axes.minorticks_off()
axes.set_xlabel("training questions"), axes.set_ylabel("gIoU on 1,000 held-out scenes"), axes.grid(alpha=0.25)
axes.legend(fontsize=9, title="dashed: before training,\\nlenient", title_fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5));
show("samples", "names", "places", "zero_variance", "box_accuracy")"""),
md(R["samples"]),
"SPLIT",
md("""## Run one yourself

The smallest row, 112 questions or seven steps, with seed 0. The same seed draws the same questions and the same random numbers. **Predict** how far your figures are from those in the CSV, which another machine made."""),
code("""mine = ablations.one_run("112 samples", 0)
[theirs] = [line for line in lines if (line["row"], line["seed"]) == ("112 samples", 0)]
for name in ("gIoU", "gIoU_lenient", "indirect", "format", "zero_variance", "length"):
    print(f"{name:<14} now {float(mine[name]):.4g}   committed {theirs[name]:.4g}")"""),
md(old.cells[26].source.replace("--lr 1.25e-4", "--lr 7.5e-5")),
]
groups = [[]]
for c in cells:
    groups.append([]) if c == "SPLIT" else groups[-1].append(c)
def title_of(group):
    found = [m[1] for c in group if (m := re.search(r'show\("([^"]+)"', c.source)) and "def show" not in c.source]
    return found[0] if found else None
cells = [c for g in groups if title_of(g) is None or there(title_of(g)) for c in g]
if left:
    cells.insert(-3, md(f"""## What is not run yet

{len(left)} of {len(ablations.TABLES)} tables have predictions and no runs yet: {', '.join(left)}. Here they are. `python tutorials/ablations.py --seeds 1 --rows "no points"` makes one of them, in some twenty minutes a run on one core."""))
    cells.insert(-3, code("""for title, rows in ablations.TABLES.items():
    for row in rows:
        if row not in {line["row"] for line in lines}:
            print(f"{title:<26}{row:<22}{ablations.ROWS[row]:<40}{ablations.PREDICTED[row]}")"""))
for c in cells:
    if "TODO" in c.source: print("TODO:", re.findall(r"TODO [\w -]+", c.source))
nb = new_notebook(cells=cells, metadata=old.metadata)
for i, c in enumerate(nb.cells): c["id"] = f"cell-{i:02d}"
nbformat.write(nb, "tutorials/5_ablations.ipynb")
