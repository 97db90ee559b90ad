"""Figures of the committed runs and networks, and the tables of README and notes made from them.

Each table row of figures is generated from a committed file. A missing row is printed by its test.
"""

import json
import math
from collections import Counter
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from samr1_mini.grpo import advantages
from samr1_mini.reward import accuracy_term
from samr1_mini.tiny import scenes
from samr1_mini.tiny.shapes import Shapes
from tutorials import ablations, diagram
from tutorials.tiny_world import phases

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "tutorials" / "results"
SEEDS = range(5)  # of the committed runs of the first command
PAGES = {
    page.name: page.read_text() for page in [ROOT / "README.md", *ROOT.glob("tutorials/notes/*.md")]
}


def load(name):
    return json.loads((RESULTS / name).read_text())


def log(seed):
    lines = (RESULTS / f"seed{seed}/metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def committed_runs(accuracy_weight):
    for file in sorted(RESULTS.glob("seed*/summary.json")):
        settings = json.loads((file.parent / "settings.json").read_text())
        if settings["accuracy_weight"] == accuracy_weight:
            yield json.loads(file.read_text())


def whole_steps(file="benchmark-step.json"):
    """Whole steps of this project and of TRL, in pairs of equal sizes, each with its best setting."""
    best = {}
    for row in load(file)["rows"]:
        names = ("image_size", "questions", "group", "max_new_tokens", "updates")
        programs = best.setdefault(tuple(row[name] for name in names), {})
        if row["way"] not in programs or row["seconds"] < programs[row["way"]]["seconds"]:
            programs[row["way"]] = row
    for programs in best.values():
        yield programs["ours"], programs["trl"]


def row(*cells):
    """Write a table row of a page."""
    return "| " + " | ".join(cells) + " |"


def with_interval(values, digits=2):
    """Write the mean of one value a seed with its 95 % interval (Student's t)."""
    mean, half = ablations.interval(np.array(values))
    return f"{mean:.{digits}f} ± {half:.{digits}f}"


def summary(run):
    return load(f"{run}/summary.json")


def three_runs(name, read):
    """Write a row: base model, trained (five seeds), control."""
    trained = [read(summary(f"seed{seed}")["trained"]) for seed in SEEDS]
    base = read(summary("seed0")["base"])
    control = read(summary("seed0-no-accuracy")["trained"])
    return row(name, f"{base:.2f}", with_interval(trained), f"{control:.2f}")


def result_rows():
    """README: the result."""
    for name, key in (
        ("gIoU", "gIoU"),
        ("cIoU", "cIoU"),
        ("share of boxes: IoU with the true box above 0.5", "box_accuracy"),
    ):
        yield three_runs(name, lambda scores, key=key: scores[key])
    for kind, example in (
        ("attribute", "the red star"),
        ("relation", "the object left of the blue ring"),
    ):
        name = f'gIoU of questions such as "{example}"'
        yield three_runs(name, lambda scores, kind=kind: scores["by_kind"][kind]["gIoU"])


def seed_rows():
    """results.md: each run."""
    late = list(late_places())
    base = summary("seed0")["base"]
    yield row("base model", f"{base['gIoU']:.2f}", f"{base['box_accuracy']:.2f}") + " |"
    for seed in SEEDS:
        trained = summary(f"seed{seed}")["trained"]
        scores = (trained["gIoU"], trained["box_accuracy"], late[seed])
        yield row(f"seed {seed}", *(f"{score:.2f}" for score in scores))
    control = summary("seed0-no-accuracy")["trained"]
    scores = (control["gIoU"], control["box_accuracy"])
    yield row("control, seed 0", *(f"{score:.2f}" for score in scores)) + " |"


def late_places():
    """The share of the style places in the last tenth of each run."""
    for run in answers_by_run():
        late = [answer["style"] for answer in run if answer["part"] > 0.9]
        yield late.count("places") / len(late)


def kind_rows():
    """results.md: gIoU by kind of question."""
    trained = [summary(f"seed{seed}")["trained"]["by_kind"] for seed in SEEDS]
    base = summary("seed0")["base"]["by_kind"]
    yield row("base model", *(f"{base[kind]['gIoU']:.2f}" for kind in scenes.KINDS))
    means = [with_interval([run[kind]["gIoU"] for run in trained]) for kind in scenes.KINDS]
    yield row("trained, five seeds", *means)


def comparison_rows():
    """results.md: three ways to compare."""
    values = load("by-question.json")
    labels = {
        "side": "by a side",
        "of all": "extreme of all",
        "of its kind": "extreme of its kind",
    }
    for form, name in labels.items():
        numbers = [
            int(sample.id.split("-")[1]) % 10**6 for sample, found in comparing() if found == form
        ]
        base = np.mean([values["base"][i] for i in numbers])
        trained = [np.mean([values[f"seed {seed}"][i] for i in numbers]) for seed in SEEDS]
        yield row(name, str(len(numbers)), f"{base:.2f}", with_interval(trained))


def input_rows():
    """results.md: the grey picture and the mirror."""
    yield row("trained", f"{summary('seed0')['trained']['gIoU']:.2f}")
    yield row("trained, grey picture", f"{load('seed0/blank.json')['gIoU']:.2f}")
    yield row("trained, mirrored picture and question", f"{load('seed0/mirror.json')['gIoU']:.2f}")


def style_rows():
    """results.md: mean rewards of two answer styles."""
    answers = [answer for run in answers_by_run() for answer in run]
    compared = ("relation", "combined")
    for name, comparing_kind in (
        ("relation and combined questions", True),
        ("other questions", False),
    ):
        means = []
        for style in ("short", "places"):
            rewards = [
                answer["reward"]
                for answer in answers
                if answer["part"] > 0.2
                and answer["style"] == style
                and (answer["kind"] in compared) == comparing_kind
            ]
            means.append(f"{np.mean(rewards):.2f}")
        yield row(name, *means)


def memory_rows():
    """README: memory and hours of the forecast and of the rehearsals."""
    forecast = load("forecast-7b.json")["forecast"]
    peak = max(forecast["peak_gib"].values())
    for card in ("RTX 3090", "RTX 4090"):
        hours = [f"{forecast['hours'][card][tokens]:.1f}" for tokens in ("128", "512")]
        yield row("7B, NF4", card, "forecast", f"{peak:.1f}", *hours)
    for name, measured in rehearsals():
        peak = max(measured["peak_gib"][phase] for phase in ("rollout", "reward", "update"))
        hours = {str(measured["max_new_tokens"]): f"{measured['hours_for_3000_samples']:.1f}"}
        cells = [hours.get(tokens, "") for tokens in ("128", "512")]
        card = f"H100, {measured['memory_limit']:.0f} GiB"
        yield row(name, card, "measured", f"{peak:.1f}", *cells).replace("|  |", "| |")


def rehearsals():
    """The names and measurements of the three rehearsals on a GPU."""
    for file, name in (("7b", "7B, NF4"), ("3b", "3B, NF4"), ("3b-bf16", "3B, bf16")):
        yield name, load(f"rehearsal-{file}.json")["measured"]


def rehearsal_rows():
    """gpu.md: seconds, peaks and decoded tokens of the rehearsals; parts of the forecast."""
    phases_of_a_step = ("rollout", "reward", "update")
    for name, measured in rehearsals():
        seconds = [f"{measured['seconds'][phase]:.1f}" for phase in phases_of_a_step]
        peaks = [f"{measured['peak_gib'][phase]:.1f}" for phase in phases_of_a_step]
        token = [f"{measured['token_ms'][way]:.1f}" for way in ("graph", "eager")]
        yield row(name, str(measured["max_new_tokens"]), *seconds, *peaks, *token)
    forecast = load("forecast-7b.json")["forecast"]
    stay, peaks = forecast["staying_gib"], forecast["peak_gib"]
    weights = ("language layers", "embeddings and head", "vision tower", "adapter")
    parts = [sum(stay[name] for name in weights), stay["moments"], stay["SAM"]]
    parts += [peaks[name] for name in ("prefill", "decode", "reward", "update")]
    yield row("7B, GiB", *(f"{part:.2f}" for part in parts))


def ablation_rows():
    """ablations.md: the rows that notebook 5 does not show."""
    lines = ablations.read()
    names = []
    titles = ("points", "reward from", "LoRA", "learning rate", "KL")
    titles += ("samples", "controls", "later objectives")
    for title in titles:
        names += ablations.rows_of(lines, title)[1:]  # without base
    for name in names:
        runs = sorted((line for line in lines if line["row"] == name), key=lambda x: x["seed"])
        places = " ".join(f"{line['places']:.2f}" for line in runs)
        difference = ablations.cells(lines, name)[2]
        prediction = ablations.PREDICTED[name].split(":")[0]
        paired = ablations.paired_cells(lines, name)
        yield row(name, difference, *paired, prediction, places)


def step_rows():
    """speed.md: a whole step against TRL."""
    for file, device in (("benchmark-step-gpu.json", "H100"), ("benchmark-step.json", "CPU")):
        for ours, trl in whole_steps(file):
            if (ours["group"], ours["max_new_tokens"]) not in ((8, 48), (16, 48), (8, 192)):
                continue
            yield row(
                device,
                f"{ours['image_size']} px",
                f"{ours['questions']} x {ours['group']}",
                str(ours["max_new_tokens"]),
                f"{ours['seconds']:.2f}",
                f"{trl['seconds']:.2f}",
                f"{trl['seconds'] / ours['seconds']:.1f}",
            )


def sharing_rows():
    """speed.md: what sharing the prompt saves."""
    for file, device in (("benchmark-3b.json", "H100, 3B"), ("benchmark.json", "CPU, tiny")):
        for sizes in load(file)["results"][1:]:  # the long prompt
            for phase, ways in (
                ("rollout", ("shared prompt", "generate")),
                ("update", ("packed", "padded, features at hand")),
            ):
                seconds = [f"{sizes[phase][way]:.2f}" for way in ways]
                yield row(device, phase, *seconds)


def weights_rows():
    """speed.md: the format of the frozen weights."""
    weights = load("benchmark-3b.json")["weights"]
    for kind in ("nf4", "bf16"):
        seconds = [f"{weights[f'{kind}, {phase}']:.2f}" for phase in ("rollout", "update")]
        yield row("H100, 3B", f"`--load-in {kind}`", *seconds)


TABLES = [
    ("README.md", result_rows),
    ("README.md", memory_rows),
    ("results.md", seed_rows),
    ("results.md", kind_rows),
    ("results.md", comparison_rows),
    ("results.md", input_rows),
    ("results.md", style_rows),
    ("gpu.md", rehearsal_rows),
    ("ablations.md", ablation_rows),
    ("speed.md", step_rows),
    ("speed.md", sharing_rows),
    ("speed.md", weights_rows),
]


@pytest.mark.parametrize("page, rows", TABLES, ids=[rows.__name__ for _, rows in TABLES])
def test_each_table_row_of_figures_comes_from_a_committed_file(page, rows):
    missing = [line for line in rows() if line not in PAGES[page]]
    assert not missing, f"{page} should have:\n" + "\n".join(missing)


def test_the_findings_quote_the_differences_of_their_ablations():
    lines = ablations.read()
    for name in ("GRPO", "G = 2", "threshold 0.8"):
        difference = ablations.with_interval(ablations.differences(lines, name))
        assert difference in PAGES["README.md"] or difference.lstrip("-") in PAGES["README.md"]


def test_readme_and_results_count_the_variants_and_those_that_are_lower():
    lines = ablations.read()
    runs = Counter(line["row"] for line in lines)  # rows with fewer seeds are not finished
    variants = {name for name, count in runs.items() if count >= 5} - {"base"}
    sides = [ablations.side(lines, row) for row in variants]
    assert f"the paper's method and {len(variants)} variants" in PAGES["README.md"]
    lower = f"For {sides.count(-1)} of {len(variants)} variants"
    assert lower in PAGES["results.md"] and 1 not in sides


def test_the_challenge_of_the_readme_starts_with_the_two_best_rows():
    lines = ablations.read()
    for row, change in (("base", "none (*base*)"), ("G = 16", "`--group 16`")):
        runs, giou, *_ = ablations.cells(lines, row)
        assert f"| {change} | {giou} | {runs} |" in PAGES["README.md"]


def test_the_first_table_quotes_speedups_over_trl_on_a_gpu():
    steps = whole_steps("benchmark-step-gpu.json")
    factors = sorted(trl["seconds"] / ours["seconds"] for ours, trl in steps)
    assert f" {factors[0]:.1f} to {factors[-1]:.1f} times faster" in PAGES["README.md"]


def test_readme_and_notebooks_quote_the_measured_minutes():
    measured = load("notebook-seconds.json")["seconds"]
    notebooks = (ROOT / "tutorials").glob("*.ipynb")
    assert measured.keys() == {notebook.stem for notebook in notebooks}
    for name, seconds in measured.items():
        minutes = math.ceil(seconds / 60)
        assert f"(tutorials/{name}.ipynb) | {minutes} |" in PAGES["README.md"]
        title = json.loads((ROOT / f"tutorials/{name}.ipynb").read_text())["cells"][0]["source"]
        words = f"about {minutes} minutes" if minutes > 1 else "about a minute"
        assert f"**Time** {words} on one CPU core" in "".join(title), (name, words)


def test_the_diagram_shows_rewards_and_advantages_that_follow_from_the_ious():
    answers = load("loop.json")["answers"]
    names = ("accuracy", "reasoning_format", "segmentation_format")
    rewards = torch.tensor([[sum(answer[name] for name in names) for answer in answers]])
    assert rewards[0].tolist() == [answer["reward"] for answer in answers]
    for answer in answers:
        assert accuracy_term("tiered", answer["iou"]) == answer["accuracy"]
    shown = torch.tensor([answer["advantage"] for answer in answers])
    torch.testing.assert_close(advantages(rewards)[0], shown, atol=1e-3, rtol=0)


def test_the_diagram_and_the_curve_of_the_readme_are_drawn(tmp_path):
    diagram.draw_loop(tmp_path / "loop.png")
    diagram.draw_curve(tmp_path / "iou.png")
    for name in ("loop.png", "iou.png"):
        with Image.open(tmp_path / name) as drawn, Image.open(RESULTS / name) as committed:
            assert drawn.size == committed.size


def test_the_pages_quote_minutes_and_memory_of_the_first_command():
    memory = max(step["peak_memory_gib"] for step in log(0))  # of one process
    minutes = min(summary(f"seed{seed}")["seconds"] for seed in SEEDS) / 60  # on free cores
    assert f"{minutes:.0f} minutes" in PAGES["README.md"]
    assert f"{memory:.1f} GiB" in PAGES["README.md"]


def test_a_whole_step_is_faster_than_trl():
    steps = {
        (a["image_size"], a["group"], a["max_new_tokens"]): (a["seconds"], b["seconds"])
        for a, b in whole_steps()
    }
    large = max(size for size, *_ in steps)
    tiny, tiny_trl = steps[112, 8, 48]
    long, long_trl = steps[large, 8, 48]
    assert tiny_trl >= 4 * tiny and long_trl >= 5 * long


def test_grpo_after_the_warm_start_adds_to_giou_for_several_objects_and_for_none():
    runs = load("several.json")
    assert [run["seed"] for run in runs] == [0, 1, 2]
    for run in runs:
        base, trained = run["base"], run["trained"]
        assert run["samples"] == 1008 and base["count"] == trained["count"] == 500
        assert trained["gIoU"] - base["gIoU"] >= 0.08
        for kind in ("all", "none"):
            assert trained["by_kind"][kind]["gIoU"] > base["by_kind"][kind]["gIoU"]


def test_learning_continues_through_the_whole_run_for_each_of_five_seeds():
    runs = list(committed_runs(1.0))
    assert {run["seed"] for run in runs} == set(SEEDS)
    flat, gains = [], []
    for run in runs:
        base, trained = run["base"], run["trained"]
        gain = trained["gIoU_lenient"] - base["gIoU_lenient"]
        assert 0.30 <= base["gIoU_lenient"] <= 0.55 and base["count"] >= 500
        assert run["ceiling"]["gIoU"] >= 0.9 and run["samples"] >= 2990
        assert gain >= 0.25 and trained["format"] >= 0.98 and trained["box_accuracy"] >= 0.6
        for kind in ("relation", "combined"):
            before, after = base["by_kind"][kind], trained["by_kind"][kind]
            assert after["gIoU_lenient"] - before["gIoU_lenient"] >= 0.15
        rewards = [step["reward"] for step in log(run["seed"])]
        assert np.mean(rewards[-20:]) - np.mean(rewards[20:40]) >= 0.4
        flat.append(np.mean([step["zero_variance"] for step in log(run["seed"])[-20:]]))
        gains.append(gain)
    assert np.mean(gains) > 0.36 and np.mean(flat) < 0.45


def answers_by_run():
    """The sampled answers of the five committed runs, with "style" and "part" of the run (0 to 1)."""
    for seed in SEEDS:
        _, answers = phases.read_run(RESULTS / f"seed{seed}")
        yield [answer | {"part": answer["step"] / answers[-1]["step"]} for answer in answers]


def test_answer_styles_follow_one_another_and_lists_of_coordinates_get_reward_where_objects_are_compared():
    runs = list(answers_by_run())
    for answers in runs:
        when = {
            style: np.mean([a["part"] for a in answers if a["style"] == style])
            for style in ("sentence", "short", "places")
        }
        assert when["sentence"] < when["short"] < when["places"]
    share = lambda answers, low, high: np.mean(
        [a["style"] == "places" for a in answers if low < a["part"] <= high]
    )
    every = [a for answers in runs for a in answers]  # lists spread through the second half
    assert share(every, 0.9, 1) > 1.25 * share(every, 0.5, 0.6)
    assert all(share(answers, 0.9, 1) > 0.5 for answers in runs)
    compared = ("relation", "combined")
    later = [a for answers in runs for a in answers if a["part"] > 0.2]
    reward = lambda style, comparing: np.mean(
        [a["reward"] for a in later if a["style"] == style and (a["kind"] in compared) == comparing]
    )
    assert reward("places", True) > reward("short", True) + 0.5
    assert reward("places", False) < reward("short", False)


def test_four_of_ten_groups_are_flat_late_and_three_of_five_steps_clip_a_token():
    logs = [log(seed) for seed in SEEDS]
    late = np.mean([step["zero_variance"] for lines in logs for step in lines[-40:]])
    assert 0.35 < late < 0.45
    clipped = [step["clip_low"] + step["clip_high"] > 0 for lines in logs for step in lines]
    assert 0.5 < np.mean(clipped) < 0.7


def things_of(sample):
    return scenes.make_scene(int(sample.id.split("-")[1])).things


@cache
def comparing():
    """The test questions that compare, and how: by a side, or by the extreme of a kind, which may be that of all things
    too."""
    found = []
    for sample in Shapes("test", 500):
        if sample.kind in ("relation", "combined"):
            word, form = sample.question.split()[1], "side"
            if word in scenes._EXTREMES:
                best = scenes._extreme(things_of(sample), word)
                form = (
                    "of all"
                    if len(best) == 1 and (best[0].mask == sample.mask).all()
                    else "of its kind"
                )
            found.append((sample, form))
    return found


def test_a_question_by_a_side_means_the_outermost_thing_and_each_run_answered_as_its_summary_says():
    side_of = {
        "left of": "leftmost",
        "right of": "rightmost",
        "above": "topmost",
        "below": "bottommost",
    }
    for sample, form in comparing():
        if form == "side":
            [word] = [
                word for side, word in side_of.items() if f" object {side} " in sample.question
            ]
            assert any(
                (t.mask == sample.mask).all() for t in scenes._extreme(things_of(sample), word)
            )
    for name, values in load("by-question.json").items():
        when, seed = ("base", 0) if name == "base" else ("trained", int(name[-1]))
        assert np.mean(values) == pytest.approx(
            load(f"seed{seed}/summary.json")[when]["gIoU_lenient"], abs=1e-3
        )


def test_blanked_mirrored_and_grey_pictures_score_far_below_the_others():
    trained = load("seed0/summary.json")["trained"]["gIoU"]
    blank, mirrored, grey = (load(f"seed0/{name}.json") for name in ("blank", "mirror", "grey"))
    assert blank["count"] == mirrored["count"] == grey["count"] == 500
    assert blank["gIoU"] < 0.12 < mirrored["gIoU"] < grey["gIoU"] < trained - 0.5
    assert f"from {trained:.2f} to {grey['gIoU']:.2f}" in (ROOT / "README.md").read_text()


def test_without_the_accuracy_term_the_format_is_learnt_and_no_lenient_gain():
    [run] = committed_runs(0.0)
    assert (
        run["trained"]["format"] > 0.95
        and run["trained"]["gIoU_lenient"] < run["base"]["gIoU_lenient"] + 0.03
    )


def test_the_base_model_can_give_the_answers_that_get_reward_and_seldom_does():
    policy = json.loads((ROOT / "tutorials/tiny_world/measured.json").read_text())["policy"]
    styles, hinted, sampled = policy["styles"], policy["hinted"], policy["sampled"]
    # It finds what is named: 0.95 of the objects, give or take the 0.015 that some 210 questions leave open.
    assert all(kinds["attribute"] >= 0.935 and kinds["kept"] >= 0.95 for kinds in hinted.values())
    assert (
        styles["places"] < 0.015
        and styles["names"] < 0.1 < styles["short"] < 0.6
        and styles["other"] < 0.02
    )
    assert (
        hinted["places"]["relation"] > hinted["short"]["relation"] + 0.15
        and hinted["places"]["combined"] > hinted["short"]["combined"] + 0.15
    )
    assert sampled["all"]["graded"] >= 0.25
