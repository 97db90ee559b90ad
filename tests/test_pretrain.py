"""The command that makes the tiny networks: its stages, lessons and measurements.

Every stage runs for two steps and leaves the files that the next stage reads.
"""

import json
import re
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from samr1_mini.config import UserError
from samr1_mini.data import load_data
from samr1_mini.lenient import read_leniently
from samr1_mini.metrics import box_iou, intersection_union, iou
from samr1_mini.policy import Policy, Prompt, encode, load_policy, logprobs
from samr1_mini.reward import read_answer
from samr1_mini.segmenter import TINY_SAM, load_segmenter, random_sam
from samr1_mini.tiny.scenes import SIZE, SPLITS, ask, make_scene
from tutorials.tiny_world import answers, ground, language, measure, pretrain, sam, training
from tutorials.tiny_world import warm_start
from tutorials.tiny_world.answers import STYLES, answer_parts, fair_questions, style_of, wide_box
from tutorials.tiny_world.build import build_policy, build_processor
from tutorials.tiny_world.ground import line_up_numbers, new_policy
from tutorials.tiny_world.sam import box_around, meant, neighbour, points_on

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def processor():
    return build_processor(answers.corpus())


@pytest.fixture
def built_once(processor, monkeypatch):
    """Give new_policy the processor above: to build it takes seconds."""

    def build(texts):
        assert texts == ["the corpus"]
        return processor

    monkeypatch.setattr(ground, "corpus", lambda: ["the corpus"])
    monkeypatch.setattr(ground, "build_processor", build)


# --------------------------------------------------------------------------- what SAM learns


def things_of(count):
    return [(scene, thing) for scene in map(make_scene, range(count)) for thing in scene.things]


def alone(a, b, scene):
    """Whether no third thing reaches into the box around two."""
    return all(
        box_iou(box_around(a, b), t.box) == 0 for t in scene.things if t is not a and t is not b
    )


def test_the_exact_box_of_a_thing_or_of_a_dot_means_it_alone():
    dots = 0
    for scene, thing in things_of(60):
        assert (meant(scene, thing.box, []) == thing.mask).all()
        if thing.dot:
            assert (meant(scene, thing.dot.box, []) == thing.dot.mask).all()
            dots += 1
    assert dots > 30


def test_a_box_around_two_things_means_both_and_points_choose_one():
    rng, pairs = np.random.default_rng(0), 0
    for scene in map(make_scene, range(100)):
        for a, b in combinations(scene.things, 2):
            box = box_around(a, b)
            if box in (a.box, b.box):
                continue
            assert (meant(scene, box, []) == a.mask | b.mask).all()
            for one, other in ((a, b), (b, a)):
                mask = meant(
                    scene, box, points_on(one.mask, rng, 1, 1) + points_on(other.mask, rng, 1, 0)
                )
                assert not (one.mask & ~mask).any() and not (mask & other.mask).any()
                if alone(a, b, scene):
                    assert (mask == one.mask).all()
                    pairs += 1
    assert pairs > 200


def test_in_a_box_of_two_things_a_point_on_one_keeps_both_and_a_point_labelled_0_removes_one():
    both = 0
    for scene, thing in things_of(100):
        other = neighbour(thing, scene)
        x1, y1, x2, y2 = box_around(thing, other)
        box = (x1 - 2, y1 - 2, x2 + 2, y2 + 2)
        if (
            not alone(thing, other, scene)
            or box_iou(box, box_around(thing, other)) < box_iou(box, thing.box) + 0.05
        ):
            continue
        on, off = (
            [*np.argwhere(a.mask & ~b.mask)[0][::-1].tolist()]
            for a, b in ((thing, other), (other, thing))
        )
        assert (meant(scene, box, [[*on, 1]]) == meant(scene, box, [])).all()
        assert not (meant(scene, box, [[*on, 1], [*off, 0]]) & other.mask & ~thing.mask).any()
        both += 1
    assert both > 30


@pytest.mark.parametrize("slack", [0.0, 0.4])
def test_points_that_no_thing_agrees_with_say_nothing(slack):
    rng = np.random.default_rng(0)
    for scene, thing in things_of(40):
        box = wide_box(thing.box, rng, slack)
        beside = points_on(~np.logical_or.reduce([t.mask for t in scene.things]), rng, 2, 1)
        [[x, y, _]] = points_on(thing.mask, rng, 1, 1)
        for points in (beside, [[x, y, 1], [x, y, 0]]):
            assert (meant(scene, box, points) == meant(scene, box, [])).all()


def test_masks_of_wider_boxes_are_less_right_and_most_are_partly_right_at_40_percent():
    rng, found = np.random.default_rng(0), {}
    for slack in (0.0, 0.2, 0.4):
        masks = [
            (meant(scene, wide_box(thing.box, rng, slack), []), thing.mask)
            for scene, thing in things_of(60)
        ]
        found[slack] = np.array([iou(*intersection_union(*pair)) for pair in masks])
    assert (
        (found[0.0] == 1).all()
        and found[0.2].mean() < 0.97
        and found[0.4].mean() < found[0.2].mean() - 0.2
    )
    assert np.mean((found[0.4] > 0.2) & (found[0.4] < 0.8)) >= 0.5


def test_prompts_in_sams_training_are_about_the_thing_and_their_points_are_labelled_rightly():
    rng, wide = np.random.default_rng(0), []
    for scene, thing in things_of(60):
        for count in (0, 3):
            box, points = sam.sam_prompt(thing, scene, rng, count)
            assert len(points) <= count and all(
                thing.mask[y, x] == bool(label) for x, y, label in points
            )
            assert any(label for *_, label in points) == bool(count)
            wide.append(box_iou(box, thing.box))
    assert 0.3 < np.mean(np.array(wide) > 0.75) < 0.6


def test_the_sam_stage_trains_and_what_it_writes_is_a_segmenters_folder_that_is_measured(tmp_path):
    (tmp_path / "sam.json").write_text((TINY_SAM / "sam.json").read_text())
    sam.train_sam(2, tmp_path / "model.safetensors", tmp_path, pictures=2)
    torch.manual_seed(0)
    start, trained = (
        random_sam("tiny").state_dict(),
        load_segmenter(str(tmp_path)).predictor.model.state_dict(),
    )
    assert any((trained[name] - value).abs().max() > 1e-3 for name, value in start.items())
    scene = training.scenes_from(0, 1)[0]
    assert load_segmenter(str(tmp_path)).masks(scene.image, [scene.things[0].box], [[]]).shape == (
        1,
        112,
        112,
    )
    assert all(0 <= value < 0.9 for value in measure.measure_sam(str(tmp_path), 3).values())


def drawing(draw):
    """A segmenter that draws `draw(scene, box, points)` on the validation scenes."""
    scenes = {scene.image.tobytes(): scene for scene in measure.held_out(20)}

    def masks(image, boxes, points):
        points = [[[int(x), int(y), label] for x, y, label in labelled] for labelled in points]
        return np.array([draw(scenes[image.tobytes()], *prompt) for prompt in zip(boxes, points)])

    return SimpleNamespace(masks=masks)


def test_a_sam_that_draws_what_is_meant_measures_one_for_it_and_less_of_the_thing_the_wider_the_box(
    monkeypatch,
):
    monkeypatch.setattr(measure, "load_segmenter", lambda folder: drawing(meant))
    found = measure.measure_sam("tiny", 20)
    exact = [name for name in found if "true" in name or "meant" in name or name == "dot"]
    assert len(exact) == 8 and all(found[name] == 1 for name in exact)
    assert (
        found["sides 10 % out"] > found["sides 20 % out"] > found["sides 40 % out"]
        and found["box of two"] < 0.7
    )
    assert found["box of two, 1 on the thing, 0 on the other"] > found["box of two"] + 0.1
    nothing_for_points = drawing(lambda scene, box, points: meant(scene, box, []) & (not points))
    monkeypatch.setattr(measure, "load_segmenter", lambda folder: nothing_for_points)
    pointed = lambda name: "1 point" in name or "1 on" in name
    assert all(
        (value == 0) == pointed(name) for name, value in measure.measure_sam("tiny", 20).items()
    )


def test_the_committed_sam_draws_a_thing_from_its_exact_box_and_what_a_wide_one_means():
    found = measure.measure_sam("tiny", 10)
    assert found["true box"] > 0.8 and found["sides 40 % out: meant"] > found["sides 40 % out"]


# --------------------------------------------------------------------------- stages


def test_a_command_that_is_done_begins_anew_the_next_time_and_one_that_was_cut_does_not(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(pretrain, "run_stage", lambda stage, work: (work / f"{stage}.pt").touch())
    pretrain.main(["--stages", "sam,vision", "--work", str(tmp_path)])
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(
        pretrain,
        "run_stage",
        lambda stage, work: (work / f"{stage}.pt").touch() if stage == "sam" else 1 / 0,
    )
    with pytest.raises(ZeroDivisionError):
        pretrain.main(["--stages", "sam,vision", "--work", str(tmp_path)])
    assert [file.name for file in tmp_path.iterdir()] == ["sam.pt"]


def learn_a_line(work, steps=250, cut=None, model_seed=0):
    """Train a Linear on numbers that depend on the step alone. Return its weights and its steps.

    `cut` presses Ctrl-C in that step.
    """
    torch.manual_seed(model_seed)
    model, taken = torch.nn.Linear(3, 1), []

    def loss_of(step):
        if step == cut:
            raise KeyboardInterrupt
        taken.append(step)
        x = torch.from_numpy(np.random.default_rng([9, step]).normal(size=(8, 3))).float()
        loss = (model(x) - x.sum(1, keepdim=True)).pow(2).mean()
        return loss, {"loss": loss.item()}

    optimizers = [torch.optim.AdamW([model.bias], lr=0.1), torch.optim.Muon([model.weight], lr=0.1)]
    try:
        training.learn("line", model, optimizers, steps, work, loss_of)
    except KeyboardInterrupt:
        pass
    return torch.cat([p.detach().flatten() for p in model.parameters()]), taken


def test_a_stage_that_was_cut_goes_on_from_its_last_hundred_steps_to_the_same_weights(tmp_path):
    (tmp_path / "cut").mkdir()
    whole, _ = learn_a_line(tmp_path)
    _, before = learn_a_line(tmp_path / "cut", cut=150)
    resumed, after = learn_a_line(tmp_path / "cut", model_seed=1)
    assert before == list(range(150)) and after == list(range(100, 250))
    assert torch.equal(resumed, whole) and (whole - torch.tensor([1.0, 1, 1, 0])).abs().max() < 0.05


@pytest.mark.parametrize("steps", range(1, 13))
def test_a_stage_can_have_any_small_number_of_steps(steps, tmp_path):
    _, taken = learn_a_line(tmp_path, steps)
    assert len(taken) == steps


def test_a_state_of_another_number_of_steps_is_refused(tmp_path):
    learn_a_line(tmp_path, cut=100)
    with pytest.raises(UserError, match="line.pt .* 250 steps, not 300: delete"):
        learn_a_line(tmp_path, steps=300)


def test_what_is_left_by_another_network_or_damaged_is_one_line_that_names_the_file(
    tmp_path, capsys, built_once
):
    torch.save({"steps": pretrain.STEPS["sam"], "parts": [{}, {}, {}]}, tmp_path / "sam.pt")
    for name in ("vision", "ground"):
        (tmp_path / f"{name}.safetensors").write_bytes(b"nothing of use")
    for stage, file in (
        ("sam", "sam.pt"),
        ("ground", "vision.safetensors"),
        ("language", "ground.safetensors"),
    ):
        with pytest.raises(SystemExit) as stopped:
            pretrain.main(["--stages", stage, "--work", str(tmp_path)])
        said = capsys.readouterr().err
        assert stopped.value.code == 2 and str(tmp_path / file) in said and said.count("\n") == 1


def test_what_the_language_stage_learns_from_one_row_of_answers_is_what_each_is_alone(processor):
    torch.manual_seed(0)
    model = build_policy(processor.tokenizer)
    policy = Policy(model, processor)
    scenes = training.scenes_from(0, 2)
    with torch.no_grad():
        prompts = encode(
            policy, [Image.fromarray(scene.image) for scene in scenes], ["the red star", "the ring"]
        )
        groups = [[torch.arange(20, 30), torch.arange(40, 47)], [torch.arange(60, 75)]]
        together, _ = logprobs(policy, prompts, groups)
        alone = [
            logprobs(policy, [p], [[ids]])[0] for p, group in zip(prompts, groups) for ids in group
        ]
    assert torch.allclose(together, torch.cat(alone), atol=1e-5)
    with pytest.raises(AssertionError):
        other = type(model)._from_config(
            model.config, attn_implementation="sdpa"
        )  # answers would see each other
        Policy(other, processor)


def test_a_question_stands_in_pretraining_as_it_stands_in_use_token_by_token(
    processor, tmp_path, monkeypatch
):
    caught, stage = {}, {}
    monkeypatch.setattr(language, "learn", lambda *what: stage.update(loss_of=what[5]))
    monkeypatch.setattr(language, "align_words", lambda *_: 0)
    monkeypatch.setattr(
        language,
        "logprobs",
        lambda policy, prompts, rows: caught.update(prompts=prompts, rows=rows) or 1 / 0,
    )
    policy = Policy(build_policy(processor.tokenizer), processor)
    language.train_language(policy, 10, tmp_path, pictures=3)
    with torch.no_grad(), pytest.raises(ZeroDivisionError):
        stage["loss_of"](0)
    image = Image.fromarray(make_scene(0).image)
    for prompt, rows in zip(caught["prompts"], caught["rows"]):
        questions = [processor.decode(row).partition(language.TURN)[0].strip() for row in rows]
        used = encode(policy, [image] * len(rows), questions)
        assert len(rows) >= 9 and all(
            torch.cat([prompt.ids, row])[: len(u.ids)].equal(u.ids) for row, u in zip(rows, used)
        )


def test_the_command_runs_every_stage_from_nothing_and_what_it_wrote_is_measured(
    tmp_path, monkeypatch, capsys, built_once
):
    monkeypatch.setattr(pretrain, "STEPS", dict.fromkeys(pretrain.STEPS, 2))
    monkeypatch.setattr(pretrain, "POLICY_SCENES", 5)
    monkeypatch.setattr(pretrain, "SAM_SCENES", 3)
    monkeypatch.setattr(pretrain, "TINY", tmp_path / "tiny" / "policy")
    monkeypatch.setattr(pretrain, "TINY_SAM", tmp_path / "tiny" / "sam")
    monkeypatch.setattr(pretrain, "MEASURED", tmp_path / "tiny" / "measured.json")
    (tmp_path / "tiny" / "sam").mkdir(parents=True)
    (tmp_path / "tiny" / "sam" / "sam.json").write_text((TINY_SAM / "sam.json").read_text())
    pretrain.main(["--work", str(tmp_path / "work")])
    start = new_policy().base.state_dict()
    vision = load_file(tmp_path / "work" / "vision.safetensors")
    grounded = load_file(tmp_path / "work" / "ground.safetensors")
    end = load_policy(str(tmp_path / "tiny" / "policy"), load_in="fp32").base.state_dict()
    end = {name.replace(".base_layer", ""): value for name, value in end.items()}
    language_weights = [name for name in grounded if "language_model" in name]
    projections = [name for name in language_weights if name.endswith("q_proj.weight")]
    assert len(projections) == 4
    for name in projections:  # each stage trains
        assert (start[name] != grounded[name]).any() and (grounded[name] != end[name]).any(), name
    assert any((start[f"model.visual.{name}"] != value).any() for name, value in vision.items())
    for name, value in vision.items():  # each stage continues from the one before
        assert (grounded[f"model.visual.{name}"] - value).abs().max() < 0.01, name
    for name in language_weights:
        assert (grounded[name] - end[name]).abs().max() < 0.1, name
    found = json.loads((tmp_path / "tiny" / "measured.json").read_text())
    assert sum(found["policy"]["styles"].values()) == pytest.approx(1, abs=0.01) and set(
        found["policy"]["hinted"]
    ) == set(STYLES)
    assert found == json.loads(capsys.readouterr().out) and 0 <= found["sam"]["true box"] <= 1


def test_a_stage_that_is_not_there_and_one_that_lacks_what_it_starts_from_are_one_line(
    tmp_path, capsys, built_once
):
    for options, words in (
        (
            ["--stages", "sam,visoin"],
            "--stages: visoin",
        ),
        (["--stages", "ground"], "vision.safetensors"),
    ):
        with pytest.raises(SystemExit) as stopped:
            pretrain.main([*options, "--work", str(tmp_path)])
        said = capsys.readouterr().err
        assert stopped.value.code == 2 and words in said and said.count("\n") == 1


def test_numbers_start_on_a_line_on_which_neighbours_are_close(processor):
    torch.manual_seed(0)
    model = build_policy(processor.tokenizer)
    line_up_numbers(model, processor.tokenizer)
    ids = [processor.tokenizer.convert_tokens_to_ids(str(n)) for n in range(113)]
    for table in (model.get_input_embeddings().weight, model.lm_head.weight):
        rows = table[ids].detach()
        likeness = torch.nn.functional.cosine_similarity(
            rows[:, None], rows[None], dim=-1
        )  # [113, 113]
        assert (
            (likeness.diagonal(1) > 0.9).all()
            and likeness[0, 56] < 0.7
            and likeness.topk(3).indices.sub(torch.arange(113)[:, None]).abs().max() <= 2
        )


# --------------------------------------------------------------------------- what the base learns


class Caught(Exception):
    pass


@pytest.fixture
def lessons(processor, tmp_path, monkeypatch):
    """The language stage without a network, as a namespace.

    of(step)         each row about a picture, with the picture's scene
    parts(step)      of each such row: the kind of its question, its text, its learnt text
    described(step)  each picture's scene, with the scene that is described behind it
    policy, optimizers
    """
    caught, stage, read, length, write, astray = (
        {},
        {},
        processor.tokenizer.decode,
        1000,
        language.shown_row,
        [],
    )

    def prompts_of(policy, images, questions):
        caught["images"] = [np.asarray(image).tobytes() for image in images]
        return [
            Prompt(*map(torch.zeros, (length, (length, 1), (3, length), length))) for _ in images
        ]

    def rows_of(policy, prompts, groups):
        caught["rows"] = [[read(row) for row in rows] for rows in groups]
        raise Caught

    def noted(policy, asked, *rest):
        row = write(policy, asked, *rest)
        caught["parts"].append((asked.kind, read(row.ids), read(row.ids[row.learnt])))
        return row

    monkeypatch.setattr(language, "encode", prompts_of)
    monkeypatch.setattr(language, "align_words", lambda *_: 0)
    monkeypatch.setattr(
        language, "text_rows", lambda policy, rng, scene, count: caught["text"].append(scene) or []
    )
    monkeypatch.setattr(language, "shown_row", noted)
    nothing = language.Written(torch.zeros(0, dtype=torch.long), torch.zeros(0, dtype=torch.bool))
    monkeypatch.setattr(
        language,
        "astray_row",
        lambda policy, scene, other, rng, slack: astray.append((scene, other)) or nothing,
    )
    monkeypatch.setattr(language, "logprobs", rows_of)
    monkeypatch.setattr(
        language, "learn", lambda *what: stage.update(optimizers=what[2], loss_of=what[5])
    )
    base = build_policy(processor.tokenizer)
    policy = SimpleNamespace(processor=processor, base=base, device="cpu")
    language.train_language(policy, 1000, tmp_path)

    def parts(step):
        caught.update(parts=[], text=[])
        astray.clear()
        with pytest.raises(Caught):
            stage["loss_of"](step)
        return caught["parts"]

    def lesson(step):
        parts(step)
        scenes = training.scenes_from(2 * 10**7 + step * 8, 8)
        assert [scene.image.tobytes() for scene in scenes] == caught["images"]
        return [(scene, row) for scene, rows in zip(scenes, caught["rows"]) for row in rows if row]

    def described(step):
        parts(step)
        return list(zip(training.scenes_from(2 * 10**7 + step * 8, 8), caught["text"], strict=True))

    return SimpleNamespace(
        of=lesson,
        parts=parts,
        described=described,
        astray=astray,
        policy=policy,
        optimizers=stage["optimizers"],
    )


def taught(row):
    """A row's question, the style of which its hint is ("" for none), and its answer."""
    question, answer = row.removesuffix("<|im_end|>").split(language.TURN)
    style = next((style for style, x in STYLES.items() if question.endswith(x.hint)), "")
    return question.removesuffix(STYLES[style].hint if style else "").strip(), style, answer


def test_every_weight_of_the_base_is_learnt_by_exactly_one_optimizer(lessons):
    learnt = [
        id(p)
        for optimizer in lessons.optimizers
        for group in optimizer.param_groups
        for p in group["params"]
    ]
    assert sorted(learnt) == sorted(id(p) for p in lessons.policy.base.parameters())


def test_questions_about_the_picture_are_never_indirect_or_combined(
    lessons,
):
    kinds = []
    for step in (0, 1, 500, 999):
        for scene, row in lessons.of(step):
            question, style, answer = taught(row)
            fair = {
                kind: dict(fair_questions(scene, kind))
                for kind in ("attribute", "part", "relation")
            }
            assert any(question in questions for questions in fair.values()), question
            kind = next(kind for kind, questions in fair.items() if question in questions)
            kinds.append(kind)
            assert answers.called(fair[kind][question], scene) in answer
            assert not style or style == style_of(answer)
    assert (
        len(kinds) > 200
        and [kinds.count(kind) > 0.03 * len(kinds) for kind in ("attribute", "part", "relation")]
        == [True] * 3
    )


def test_boxes_are_exact_in_the_first_half_and_40_percent_too_wide_in_the_second(
    lessons,
):
    for step, exact in ((0, True), (499, True), (500, False), (999, False)):
        overlaps = []
        for scene, row in lessons.of(step):
            box = read_leniently(taught(row)[2], 112).objects[0].box
            dots = [t.dot for t in scene.things if t.dot]
            overlaps.append(max(box_iou(box, t.box) for t in scene.things + dots))
        assert (min(overlaps) == 1) if exact else (np.mean(overlaps) < 0.6), step


def test_hints_ask_for_a_style_in_six_of_ten_answers_and_seldom_measures_without_a_hint(lessons):
    rows = [(kind, *taught(row)) for step in range(30) for kind, row, _ in lessons.parts(step)]
    hinted = [style for kind, _, style, _ in rows if style and kind != "relation"]
    unhinted = [style_of(answer) for _, _, style, answer in rows if not style]
    assert 0.55 < 1 - len(unhinted) / len(rows) < 0.65
    for style, (share, hinted_share, _, _) in STYLES.items():
        assert hinted.count(style) / len(hinted) == pytest.approx(hinted_share, abs=0.07)
        assert unhinted.count(style) / len(unhinted) == pytest.approx(share, abs=0.07)


def test_comparing_is_learnt_only_in_answers_that_list_coordinates_first(
    lessons,
):
    measured, beginnings = 0, []
    for kind, row, learnt in [part for step in range(12) for part in lessons.parts(step)]:
        question, style, answer = taught(row)
        if kind != "relation" or style:
            assert learnt == f"{answer}<|im_end|>"
            assert kind != "relation" or style == "places"
            measured += kind == "relation"
        else:
            lists = answer.startswith("<think>I see the ")
            assert learnt == (
                answer.partition(" It is the")[0] + " It is the"
                if lists
                else STYLES[style_of(answer)].begins
            )
            assert answer.startswith(learnt)
            beginnings.append(lists)
    assert measured > 50 and beginnings.count(False) > 50 and beginnings.count(True) > 3


def test_an_astray_answer_learns_the_list_of_its_picture_and_the_box_of_the_named_thing_alone(
    processor,
):
    policy, rng, kinds, styles = (
        SimpleNamespace(processor=processor, device="cpu"),
        np.random.default_rng(0),
        set(),
        [],
    )
    for scene, other in zip(training.scenes_from(0, 60), training.scenes_from(100, 60)):
        ids, learnt = language.astray_row(policy, scene, other, rng, 0.0)
        text, mask = processor.decode(ids), learnt.tolist()
        question, style, answer = taught(text)
        kinds |= {
            kind
            for kind in ("attribute", "part", "relation", "indirect", "combined")
            if question in dict(fair_questions(other, kind))
        }
        said, _, box = answer.partition('.</think><answer>{"bbox": [')
        [named] = [
            t
            for t in scene.things
            if t.name == " ".join(said.removesuffix(" fits best").split()[-2:])
        ]
        assert tuple(read_leniently(answer, 112).objects[0].box) == named.box
        pieces = [
            piece
            for piece in "".join(
                processor.decode(i) if m else "\0" for i, m in zip(ids, mask)
            ).split("\0")
            if piece
        ]
        assert pieces[-1] == f"{box}<|im_end|>"
        styles.append(style_of(answer))
        if styles[-1] == "short":
            assert len(pieces) == 1
        else:
            assert len(pieces) == 2 and f"<think>I see the{pieces[0]}" == answers.listed(
                scene, styles[-1], question
            )
    assert kinds == {"attribute", "relation", "indirect", "combined"} and {*styles} == {
        "short",
        "names",
        "places",
    }


def test_pictures_and_the_scenes_that_answers_go_astray_to_are_other_ones(lessons):
    for step in (0, 700):
        lessons.parts(step)
        assert len(lessons.astray) == 16 and all(
            scene.image.tobytes() != other.image.tobytes() for scene, other in lessons.astray
        )


def test_a_described_scene_stands_behind_the_picture_of_another_scene(lessons):
    for step in (0, 700):
        pictures, described = zip(*lessons.described(step))
        shown = {scene.image.tobytes() for scene in pictures}
        assert len(described) == 8
        assert not shown & {scene.image.tobytes() for scene in described}


def test_of_rows_about_text_facts_conclusions_and_the_first_words_of_a_list_with_a_hint_are_learnt(
    processor,
):
    policy, rng, hinted, offhand, count = (
        SimpleNamespace(processor=processor, device="cpu"),
        np.random.default_rng(0),
        0,
        [],
        0,
    )
    for scene in training.scenes_from(0, 12):
        rows = [
            (processor.decode(row), processor.decode(row[learnt]))
            for row, learnt in language.text_rows(policy, rng, scene, 3)
        ]
        (fact, known), *rows = rows
        question, answer = fact.split(language.TURN)
        assert (
            known == answer
            and (question.strip(), answer.removesuffix("<|im_end|>")) in answers.fact_texts()
        )
        for text, learnt in rows:
            question, answer = text.split(language.TURN)
            asked = question.endswith(("Measure first.", "Look around first."))
            if answer == learnt:  # a beginning, and nothing else
                assert not asked and learnt in {style.begins for style in STYLES.values()}
                offhand.append(learnt)
                continue
            assert (
                answer.startswith("<think>I see the ")
                and learnt == "<think>I see the" * asked + answer.split(" It is the")[1]
            )
            assert all(thing.name in answer for thing in scene.things)
            hinted, count = hinted + asked, count + 1
    assert 5 < hinted < count - 3 and len(offhand) > 3 and len(set(offhand)) > 1


# --------------------------------------------------------------------------- what is measured


def test_an_answer_is_about_the_thing_that_its_box_holds_and_fits_best():
    for scene, thing in things_of(40):
        about = lambda box, t: measure.about(box, t.mask, scene)
        assert (
            about(thing.box, thing)
            and not about(None, thing)
            and not about(neighbour(thing, scene).box, thing)
        )
        x1, y1, x2, _ = thing.box
        assert not about(
            (x1, y1, x2, y1 + 1), thing
        )  # it fits no other thing better, and holds next to nothing
        if thing.dot:
            assert about(thing.dot.box, thing.dot) and about(thing.box, thing.dot)


@pytest.fixture
def answered(monkeypatch):
    """Return measure_policy with `say(scene, thing, style)` for the policy.

    The style is None without a hint.
    """

    def measured(say, draw=meant, count=20, group=2):
        data, pairs = load_data("shapes", "validation", count), {}
        for i in range(count):
            scene = make_scene(SPLITS["validation"][0] + i)
            pairs[data[i].question] = pairs.get(data[i].question, {})
            pairs[data[i].question][scene.image.tobytes()] = (
                scene,
                dict(fair_questions(scene, data[i].kind))[data[i].question],
            )

        def prompts_of(policy, images, questions):
            prompts = []
            for image, question in zip(images, questions):
                style = next(
                    (style for style, x in STYLES.items() if question.endswith(x.hint)), None
                )
                question = question.removesuffix(STYLES[style].hint if style else "")
                prompts.append((*pairs[question][np.asarray(image).tobytes()], style))
            return prompts

        texts = lambda policy, prompts, group, tokens, temperature: [
            [SimpleNamespace(text=say(*p))] * group for p in prompts
        ]
        monkeypatch.setattr(measure, "encode", prompts_of)
        monkeypatch.setattr(measure, "generate", texts)
        return measure.measure_policy(None, drawing(draw), count, group)

    return measured


def test_a_base_that_answers_rightly_in_the_style_asked_for_measures_one_everywhere(answered):
    rng = np.random.default_rng(0)
    found = answered(
        lambda scene, thing, style: "".join(answer_parts(thing, scene, rng, 0, style or "short"))
    )
    assert found["styles"] == {style: float(style == "short") for style in (*STYLES, "other")}
    assert set(found["sampled"]) == {"attribute", "part", "relation", "indirect", "combined", "all"}
    for row in found["sampled"].values():
        assert row == {"about": 1, "box IoU": 1, "mask IoU": 1, "graded": 0}
    for style, kinds in found["hinted"].items():
        assert set(kinds) == {*found["sampled"], "kept"} and set(kinds.values()) == {1}


def test_a_base_that_answers_about_a_neighbour_measures_nothing_about_the_object(answered):
    rng = np.random.default_rng(0)

    def say(scene, thing, style):
        other = neighbour(next((t for t in scene.things if t.dot is thing), thing), scene)
        return "".join(answer_parts(other, scene, rng, 0, "json"))

    found = answered(say)
    assert (
        found["styles"]["json"] == 1
        and found["sampled"]["all"]["about"] == 0
        and found["sampled"]["all"]["mask IoU"] < 0.05
    )
    assert {style: kinds["kept"] for style, kinds in found["hinted"].items()} == {
        style: float(style == "json") for style in STYLES
    }
    assert all(kinds["all"] == 0 for kinds in found["hinted"].values())


def test_a_text_without_a_box_measures_nothing_and_half_of_a_mask_is_graded(answered):
    found = answered(lambda scene, thing, style: "I do not know.")
    assert found["styles"]["other"] == 1 and found["sampled"]["all"] == {
        "about": 0,
        "box IoU": 0,
        "mask IoU": 0,
        "graded": 0,
    }

    def half(scene, box, points):
        mask = meant(scene, box, points)
        return mask & (mask.cumsum().reshape(mask.shape) <= mask.sum() / 2)

    rng = np.random.default_rng(0)
    found = answered(
        lambda scene, thing, style: "".join(answer_parts(thing, scene, rng, 0, "short")),
        half,
    )
    assert found["sampled"]["all"]["graded"] == 1 and found["sampled"]["all"][
        "mask IoU"
    ] == pytest.approx(0.5, abs=0.01)


# --------------------------------------------------------------------------- the note


def row(*cells):
    """Return a row of a markdown table, numbers with two digits."""
    return f"| {' | '.join(c if isinstance(c, str) else f'{c:.2f}' for c in cells)} |"


def measured_rows():
    """Return how the rows begin that measured.json gives in tutorials/notes/tiny_world.md."""
    found = json.loads(pretrain.MEASURED.read_text())
    policy = found["policy"]
    prompts = (
        "true box",
        "box of two",
        "box of two, 1 on the thing, 0 on the other",
        "sides 40 % out",
    )
    rows = [row(name, found["sam"][name]) for name in prompts]
    for style, shares in policy["hinted"].items():
        sampled = f"{100 * policy['styles'][style]:.1f} %"
        rows.append(
            row(style, sampled, *(shares[kind] for kind in ("relation", "combined", "all")))
        )
    return rows


def test_the_figures_of_the_note_are_those_of_measured_json_and_of_the_stages():
    text = (ROOT / "tutorials/notes/tiny_world.md").read_text()
    lines = text.splitlines()
    rows = measured_rows()
    assert len(rows) == 9
    missing = [start for start in rows if not any(line.startswith(start) for line in lines)]
    assert not missing, "tiny_world.md should have:\n" + "\n".join(missing)
    sampled = json.loads(pretrain.MEASURED.read_text())["policy"]["sampled"]["all"]
    assert f"{sampled['about']:.2f}" in text and f"{sampled['graded']:.2f}" in text
    for stage, steps in pretrain.STEPS.items():
        assert any(line.startswith(f"| {stage} | `{stage}.py` | {steps:,} |") for line in lines)


def test_the_note_names_files_and_functions_that_exist():
    text = (ROOT / "tutorials/notes/tiny_world.md").read_text()
    for place, names in re.findall(r"\| `([\w/]+\.py)`: (.*) \|", text):
        file = ROOT / place if "/" in place else ROOT / "samr1_mini/tiny" / place
        for name in re.findall(r"`(\w+)`", names):
            assert re.search(rf"^(def )?{name}\b", file.read_text(), re.M), (place, name)
    for file in re.findall(r"\| `(\w+\.py)` \|", text):
        assert (ROOT / "tutorials/tiny_world" / file).exists(), file


def test_answers_of_the_warm_start_are_lists_in_the_format_and_short_enough(processor):
    rng, longest = np.random.default_rng(0), 0
    for seed in range(40):
        scene = make_scene(seed)
        for kind in warm_start.KINDS:
            found = ask(scene, rng, kind)
            if not found:
                continue
            question, things = found
            style = warm_start.draw_style(things, rng)
            text = warm_start.list_answer(things, scene, rng, style, question)
            answer = read_answer(text, SIZE, objects="several")
            assert answer.in_format and len(answer.objects) == len(things), text
            for one in answer.objects:
                assert [label for _, _, label in one.points] == [1]
            assert ("Nothing fits" in text) == (kind == "none")
            longest = max(longest, len(processor.tokenizer(text).input_ids))
    assert 60 < longest < 128  # tokens
