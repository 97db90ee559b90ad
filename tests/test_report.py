"""The token log of a run and its page: true numbers, bounded size, safe text, usable in a browser."""

import base64
import html as html_text
import io
import json
import os
import re
import shutil
import signal
import subprocess
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco
from test_photos import PHOTOS, photo_settings

from samr1_mini import decoding, report, trace
from samr1_mini.config import Settings, make_settings
from samr1_mini.data import load_data
from samr1_mini.data.masks import to_rle
from samr1_mini.evaluation import encode_questions
from samr1_mini.grpo import train
from samr1_mini.policy import load_policy, logprobs
from samr1_mini.reward import read_answer, score_group
from samr1_mini.runs import read_log
from samr1_mini.trace import NATS, Trace, packed, read_trace, token_texts

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run of four steps in which steps 1, 2 and 4 are logged at least."""
    folder = tmp_path_factory.mktemp("report") / "run"
    s, _ = make_settings(
        preset="tiny",
        device="cpu",
        run=str(folder),
        samples=16,
        questions=4,
        group=4,
        updates=2,
        eval_every=0,
        eval_samples=4,
        test_samples=6,
        warmup=1,
        trace_every=2,
    )
    train(s)
    return folder, s


def answers_of(step):
    return [(group, answer) for group in step["groups"] for answer in group["answers"]]


def nats(answer, name):
    return np.array(answer[name]) / NATS


# --------------------------------------------------------------------------------- numbers


def test_the_logged_steps_are_the_first_the_last_and_those_at_the_interval(run):
    folder, _ = run
    steps = read_trace(folder)
    assert {1, 2, 4} <= {step["step"] for step in steps}
    for step in steps:
        assert len(step["questions"]) == 4 and 1 <= len(step["groups"]) <= 2
        assert step["groups"][-1]["place"] == 3 or len(step["groups"]) == 1


def test_tokens_before_the_first_update_of_a_step_have_the_ratio_1_and_later_ones_have_not(run):
    first, later = [], []
    for step in read_trace(run[0]):
        for group, answer in answers_of(step):
            gap = np.abs(nats(answer, "new") - nats(answer, "old")).max()
            (first if group["update"] == 1 else later).append(gap)
    assert later and max(later) > 0.001
    assert all(gap < 0.0005 for gap in first)


def test_the_probabilities_after_the_last_step_are_those_of_the_saved_adapter(run):
    folder, s = run
    policy = load_policy("tiny", s.load_in, adapter=folder / "adapter")
    step = read_trace(folder)[-1]
    data = load_data("shapes", "train", s.samples, seed=s.seed)
    group = step["groups"][-1]
    sample = data[12 + group["place"]]
    assert sample.question == group["question"]
    prompts = encode_questions(policy, [sample], s.image_size)
    tokenizer = policy.processor.tokenizer
    for answer in group["answers"]:
        ids = torch.tensor(tokenizer.encode("".join(answer["tokens"]), add_special_tokens=False))
        if len(ids) != len(answer["tokens"]):
            continue  # the sampled tokens of this text are not those of the tokenizer
        with torch.no_grad():
            expected, entropy = logprobs(policy, prompts, [[ids]])
            with policy.as_reference():
                reference, _ = logprobs(policy, prompts, [[ids]])
        assert np.abs(nats(answer, "after") - expected.numpy()).max() < 0.0005
        assert np.abs(nats(answer, "reference") - reference.numpy()).max() < 0.0005
        break
    else:
        pytest.fail("no answer could be compared")


def test_rewards_and_advantages_in_the_log_follow_from_the_logged_texts(run, segmenter):
    folder, s = run
    data = load_data("shapes", "train", s.samples, seed=s.seed)
    for step in read_trace(folder):
        for group in step["groups"]:
            sample = data[4 * (step["step"] - 1) + group["place"]]
            texts = ["".join(a["tokens"]).removesuffix("<|im_end|>") for a in group["answers"]]
            rewards = score_group(segmenter, sample, [read_answer(text, 112) for text in texts], s)
            totals = np.array([reward.total for reward in rewards])
            assert [a["reward"] for a in group["answers"]] == pytest.approx(totals)
            std = totals.std() or 1.0
            expected = (totals - totals.mean()) / std
            assert [a["advantage"] for a in group["answers"]] == pytest.approx(expected, abs=2e-4)
            for answer, reward in zip(group["answers"], rewards):
                if reward.mask is None:
                    assert answer["mask"] is None
                else:
                    assert (coco.decode(answer["mask"]).astype(bool) == reward.mask).all()


def test_the_log_changes_no_number_of_a_run(settings, tmp_path):
    one = replace(settings, trace_every=1, run=str(tmp_path / "one"))
    none = replace(settings, trace_every=0, run=str(tmp_path / "none"))
    logs = []
    for s in (one, none):
        train(s)
        lines = read_log(Path(s.run))
        for line in lines:
            for name in list(line):
                if name.startswith(("seconds", "tokens_per", "peak")):
                    del line[name]
        logs.append(lines)
    assert logs[0] == logs[1]
    assert len(read_trace(Path(one.run))) == 2 and not (tmp_path / "none/trace.jsonl").exists()


def test_a_resumed_run_logs_the_steps_of_a_run_that_was_never_stopped(settings, tmp_path):
    s = replace(settings, samples=16, trace_every=1, save_minutes=1e-9)
    whole = replace(s, run=str(tmp_path / "whole"))
    train(whole)
    train(replace(s, samples=8))
    train(replace(s, resume=True))
    expected, found = read_trace(Path(whole.run)), read_trace(Path(s.run))
    assert [step["step"] for step in found] == [1, 2, 3, 4]
    assert found == expected


def test_lines_after_the_saved_step_are_removed_when_a_run_continues(tmp_path):
    (tmp_path / "trace.jsonl").write_text(packed({"step": 3}) + packed({"step": 8}))
    line = {"step": 3, "grad_norm": 1.0, "clip_low": 0.0, "clip_high": 0.5}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    made = Trace(tmp_path, SimpleNamespace(trace_every=10), 1, 20)
    assert made.largest == {"gradient": 1.0, "clip": 0.5}
    made = Trace(tmp_path, SimpleNamespace(trace_every=10), 5, 20)
    assert [step["step"] for step in read_trace(tmp_path)] == []
    (tmp_path / "trace.jsonl").write_text(packed({"step": 3}) + packed({"step": 8}))
    made = Trace(tmp_path, SimpleNamespace(trace_every=10), 5, 20)
    assert [step["step"] for step in read_trace(tmp_path)] == [3] and made.every == 10


@pytest.mark.parametrize("size", [1_000, 30_000, 300_000, 3_000_000])
def test_the_log_stays_within_its_budget_and_has_the_last_step(size, tmp_path, monkeypatch):
    """Lines of any size. Only the first and the last step may exceed the budget."""
    rng = np.random.default_rng(0)
    content = base64.b64encode(rng.bytes(size * 3 // 4)).decode()
    monkeypatch.setattr(trace, "traced_step", lambda parts, rollouts, step, why: {"step": step})
    monkeypatch.setattr(
        trace, "packed", lambda x: json.dumps({"step": x["step"], "zlib": content}) + "\n"
    )
    made = Trace(tmp_path, SimpleNamespace(trace_every=10), 0, 400)
    for step in range(1, 401):
        values = {"grad_norm": float(rng.random()), "clip_low": 0.0, "clip_high": step / 400}
        made.add(None, [], {"step": step} | values)
    steps = [line["step"] for line in read_log(tmp_path, name="trace")]
    length = len(trace.packed({"step": 100}))
    assert (tmp_path / "trace.jsonl").stat().st_size <= max(trace.BUDGET, length)
    assert steps[-1] == 400
    if size <= 30_000:
        assert len(steps) >= 30
    if size == 300_000:
        assert len(steps) >= 4 and max(np.diff(steps)) < 250


def test_the_texts_of_tokens_join_to_the_text_even_if_tokens_share_a_character(real_vocabulary):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(real_vocabulary)
    for text in ("<think>the 猫 and the 𝔐🙂é</think>", "日本語のテキスト", "a b  c\n\n{"):
        ids = tokenizer.encode(text)
        texts = token_texts(tokenizer, ids)
        assert len(texts) == len(ids) and "".join(texts) == text
        cut = token_texts(tokenizer, ids[:-1])
        assert "".join(cut).rstrip("\ufffd") == tokenizer.decode(ids[:-1]).rstrip("\ufffd")


# ----------------------------------------------------------------------------------- page


def block(html):
    [text] = re.findall(r'<script type="application/json" id="data">(.*?)</script>', html, re.S)
    return json.loads(text)


def test_a_finished_run_has_a_page_with_its_log_its_steps_and_its_test_questions(run):
    folder, s = run
    data = block((folder / "report.html").read_text(encoding="utf-8"))
    log = read_log(folder)
    assert data["log"]["reward"] == pytest.approx([line["reward"] for line in log], rel=1e-4)
    assert data["terms"] == {"accuracy": 1, "reasoning_format": 1, "segmentation_format": 1}
    assert [step["step"] for step in data["steps"]] == [x["step"] for x in read_trace(folder)]
    assert set(data["log"]) <= set(data["columns"])
    trained = json.loads((folder / "test-trained.json").read_text())
    questions = data["test"]["questions"]
    assert sorted(x["after"]["text"] for x in questions) == sorted(x["text"] for x in trained)
    before = json.loads((folder / "test-base.json").read_text())
    scores = [[a["kind"], a["iou"], b["iou"]] for a, b in zip(before, trained)]
    assert data["test"]["scores"] == [pytest.approx(score, abs=1e-4) for score in scores]


def test_a_run_that_ctrl_c_stops_has_a_page_about_its_steps(settings):
    s = replace(settings, samples=16, trace_every=1)
    with pytest.raises(SystemExit) as left:
        train(s, log=lambda line: line["step"] == 2 and os.kill(os.getpid(), signal.SIGINT))
    assert left.value.code == 130
    data = block((Path(s.run) / "report.html").read_text(encoding="utf-8"))
    assert data["log"]["step"] == [1, 2] and [x["step"] for x in data["steps"]] == [1, 2]
    assert data["test"]["questions"] == [] and data["summary"] is None


def test_no_text_of_an_answer_can_leave_the_data_of_the_page(run, tmp_path):
    folder = shutil.copytree(run[0], tmp_path / "run")
    evil = "</script><img src=x onerror=alert(1)><!-- {{SCRIPT}} &lt; \u2028"
    lines = []
    for step in read_trace(folder):
        step["groups"][0]["question"] = evil
        step["groups"][0]["answers"][0]["tokens"] = [evil]
        lines.append(packed(step))
    (folder / "trace.jsonl").write_text("".join(lines))
    html = report.write_report(folder).read_text(encoding="utf-8")
    assert "<img src=x" not in html and html.count("</script>") == 2
    group = block(html)["steps"][0]["groups"][0]
    assert group["question"] == evil and group["answers"][0]["tokens"] == [evil]


def test_the_overlay_darkens_outside_the_mask_and_draws_both_outlines():
    mask, truth = np.zeros((200, 300), bool), np.zeros((200, 300), bool)
    mask[10:20, 10:30], truth[10:30, 30:50] = True, True
    png = base64.b64decode(report.overlay(to_rle(mask), to_rle(truth)))
    pixels = np.asarray(Image.open(io.BytesIO(png)).convert("RGBA"))
    assert (pixels[12:18, 12:28, 3] == 0).all()  # the picture stays visible in the mask
    assert (pixels[35, 5] == [0, 0, 0, 110]).all() and (pixels[15, 8] == [245, 158, 11, 255]).all()
    assert (pixels[20, 50] == 255).all() and (pixels[20, 51] == [0, 0, 0, 255]).all()
    nothing = base64.b64decode(report.overlay(None, to_rle(truth)))
    assert (np.asarray(Image.open(io.BytesIO(nothing)).convert("RGBA"))[35, 5] == 0).all()


def test_the_command_writes_the_same_page_again_and_names_a_folder_without_a_run(
    run, tmp_path, capsys
):
    folder = shutil.copytree(run[0], tmp_path / "run")
    before = (folder / "report.html").read_text(encoding="utf-8")
    (folder / "report.html").unlink()
    report.main([str(folder)])
    assert (folder / "report.html").read_text(encoding="utf-8") == before
    report.main([str(folder), "--without-test"])
    assert block((folder / "report.html").read_text(encoding="utf-8"))["test"]["questions"] == []
    with pytest.raises(SystemExit) as left:
        report.main([str(tmp_path)])
    assert left.value.code == 2 and str(tmp_path) in capsys.readouterr().err


def test_a_run_with_its_own_segmenter_keeps_its_page(run, tmp_path, capsys):
    folder = shutil.copytree(run[0], tmp_path / "run")
    file = folder / "settings.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | {"functions": ["Shapes", "own FillBox"]}))
    (folder / "report.html").write_text("the run's page")
    with pytest.raises(SystemExit):
        report.main([str(folder)])
    assert (folder / "report.html").read_text() == "the run's page"
    assert "--without-test" in capsys.readouterr().err
    report.main([str(folder), "--without-test"])


def test_a_damaged_token_log_is_named_in_one_line(run, tmp_path, capsys):
    folder = shutil.copytree(run[0], tmp_path / "run")
    for damage in ("not json\n", '{"step": 1}\n', '{"step": 1, "zlib": "abcd"}\n'):
        (folder / "trace.jsonl").write_text(damage)
        with pytest.raises(SystemExit) as left:
            report.main([str(folder), "--without-test"])
        message = capsys.readouterr().err.strip()
        assert left.value.code == 2 and "trace.jsonl" in message and "\n" not in message


def test_an_error_of_the_page_is_printed_and_does_not_end_a_run(run, tmp_path, capsys):
    folder = shutil.copytree(run[0], tmp_path / "run")
    (folder / "trace.jsonl").write_text("damaged\n")
    report.try_report(folder)
    assert "trace.jsonl" in capsys.readouterr().out
    report.try_report(folder, lambda: {}["iou"])
    assert "report.html is not written" in capsys.readouterr().out


def test_a_step_without_skipped_updates_has_0_of_them_on_the_page(run, tmp_path):
    folder = shutil.copytree(run[0], tmp_path / "run")
    log = read_log(folder)
    log[1]["skipped_updates"] = 2
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    data = block(report.write_report(folder).read_text(encoding="utf-8"))
    assert data["log"]["skipped_updates"] == [0, 2, 0, 0]


def test_numbers_that_json_cannot_hold_are_left_out_of_the_page(run, tmp_path):
    folder = shutil.copytree(run[0], tmp_path / "run")
    summary = json.loads((folder / "summary.json").read_text())
    summary["ceiling"]["gIoU"] = float("nan")
    (folder / "summary.json").write_text(json.dumps(summary))
    data = block(report.write_report(folder).read_text(encoding="utf-8"))
    assert data["summary"]["ceiling"]["gIoU"] is None


def test_a_run_without_a_token_log_can_be_resumed(settings):
    s = replace(settings, samples=16, trace_every=0)
    train(replace(s, samples=8))
    train(replace(s, resume=True))
    assert len(read_log(Path(s.run))) == 4 and not (Path(s.run) / "trace.jsonl").exists()


def test_a_summary_from_before_the_run_was_continued_is_not_on_the_page(run, tmp_path):
    folder = shutil.copytree(run[0], tmp_path / "run")
    lines = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text(
        lines + lines.splitlines()[-1].replace(": 4,", ": 5,", 1) + "\n"
    )
    data = block(report.write_report(folder).read_text(encoding="utf-8"))
    assert data["log"]["step"] == [1, 2, 3, 4, 5] and data["summary"] is None
    old = {"scores": [["attribute", 0.1, 0.9]], "questions": []}
    data = block(report.write_report(folder, old).read_text(encoding="utf-8"))
    assert data["test"]["scores"] == []


def test_two_questions_with_one_id_are_not_mixed_up(segmenter):
    one, two = load_data("shapes", "test", 2)
    two.id = one.id

    class Test(list):
        ids = [one.id, one.id]

    rows = []
    for sample, ious in ((one, (0.1, 0.5)), (two, (0.2, 0.9))):
        row = {"id": sample.id, "question": sample.question, "kind": sample.kind, "text": ""}
        rows.append([row | {"iou": iou} for iou in ious])
    before, after = [list(each) for each in zip(*rows)]
    found = report.held_out(Test([one, two]), segmenter, Settings(), 112, before, after)
    assert [score[1:] for score in found["scores"]] == [[0.1, 0.5], [0.2, 0.9]]
    changes = {x["question"]: (x["before"]["iou"], x["after"]["iou"]) for x in found["questions"]}
    assert changes == {one.question: (0.1, 0.5), two.question: (0.2, 0.9)}
    for row in before:  # as in older runs
        del row["question"]
    assert (
        len(report.held_out(Test([one, two]), segmenter, Settings(), 112, before, after)["scores"])
        == 2
    )
    before[1]["question"] = two.question
    before[0]["question"] = after[0]["question"] = "a question of older data"
    found = report.held_out(Test([one, two]), segmenter, Settings(), 112, before, after)
    assert [x["question"] for x in found["questions"]] == [two.question]


def test_the_pictures_of_held_out_questions_have_a_budget(run, tmp_path, segmenter, monkeypatch):
    folder, s = run
    before, after = [
        json.loads((folder / f"test-{x}.json").read_text()) for x in ("base", "trained")
    ]
    test = load_data("shapes", "test", 6)
    whole = report.held_out(test, segmenter, s, 112, before, after)
    monkeypatch.setattr(report, "TEST_BYTES", len(json.dumps(whole["questions"][:3])))
    some = report.held_out(test, segmenter, s, 112, before, after)
    assert some["scores"] == whole["scores"] and some["questions"] == whole["questions"][:3]
    changes = [abs(x["after"]["iou"] - x["before"]["iou"]) for x in whole["questions"]]
    assert changes == sorted(changes, reverse=True)


@pytest.mark.parametrize("questions, updates", [(16, 4), (16, 3), (10, 4), (16, 5), (4, 4), (3, 1)])
def test_the_page_names_the_update_to_which_a_group_belongs(questions, updates):
    for k in range(updates):  # the parts of grpo.update
        for place in range(k * questions // updates, (k + 1) * questions // updates):
            assert trace.update_number(place, questions, updates) == k + 1


# -------------------------------------------------------------------------------- browser

CHECK = """
const errors = [];
addEventListener("error", (event) => errors.push(event.message));
addEventListener("securitypolicyviolation", (event) => errors.push(event.violatedDirective));
addEventListener("load", () => {
  const found = {};
  const wait = () => new Promise((done) => setTimeout(done, 20));
  const look = () => document.getElementById("number").textContent;
  (async () => {
    const slider = document.getElementById("slider");
    found.last = look();
    slider.value = slider.min;
    slider.dispatchEvent(new Event("input"));
    found.first = look();
    document.getElementById("forward").click();
    found.forward = look();
    document.querySelectorAll("#colours button")[1].click();
    found.colour = document.querySelector("#colours [aria-pressed=true]").textContent;
    found.answers = document.querySelectorAll("#answers > div").length;
    document.querySelectorAll("#answers > div")[1].focus();
    document.activeElement.dispatchEvent(new KeyboardEvent("keydown", { key: "Enter", bubbles: true }));
    found.focus = document.activeElement.getAttribute("aria-current");
    document.activeElement.dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowRight", bubbles: true }));
    found.key = document.getElementById("tip").textContent;
    found.chosen = document.querySelector("#picture p b").textContent;
    const word = document.querySelector(".tokens span");
    word.dispatchEvent(new PointerEvent("pointerenter"));
    found.tip = document.getElementById("tip").textContent;
    const kind = document.getElementById("kind");
    found.kinds = [...kind.options].map((one) => one.value);
    kind.value = found.kinds[1];
    kind.dispatchEvent(new Event("change"));
    found.cards = document.querySelectorAll("#cards button").length;
    document.querySelector("#cards button").click();
    found.dialog = document.getElementById("pair").open;
    document.getElementById("pair").close();
    await wait();
    found.images = [...document.images].filter((one) => one.naturalWidth === 0).length;
    found.wide = document.documentElement.scrollWidth - innerWidth;
    found.errors = errors;
    document.title = "FOUND" + JSON.stringify(found) + "END";
  })();
});
"""


def browse(page: Path, *options: str) -> subprocess.CompletedProcess:
    """Open a page in headless Chromium. Messages of the page's console are in stderr."""
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    command += ["--enable-logging=stderr", "--virtual-time-budget=4000", *options]
    return subprocess.run([*command, page.as_uri()], capture_output=True, text=True, timeout=120)


def with_check(page: Path, out: Path, check: str = CHECK) -> Path:
    """Return a copy of a page whose policy allows the script `check` too, and which runs it."""
    import hashlib

    digest = base64.b64encode(hashlib.sha256(check.encode()).digest()).decode()
    html = page.read_text(encoding="utf-8")
    html = html.replace("script-src '", f"script-src 'sha256-{digest}' '", 1)
    out.write_text(html.replace("<body>", f"<body><script>{check}</script>", 1), encoding="utf-8")
    return out


def checked(page: Path) -> tuple[dict, str]:
    """Open a page that runs a check. Returns the values found, and the browser's messages."""
    done = browse(page, "--dump-dom", "--window-size=1300,900")
    [text] = re.findall(r"<title>FOUND(.*?)END</title>", done.stdout, re.S)
    return json.loads(html_text.unescape(text)), done.stderr


@pytest.mark.skipif(not CHROMIUM, reason="Chromium is not installed")
def test_the_page_works_in_a_browser_without_an_error(run, tmp_path):
    folder, _ = run
    page = with_check(folder / "report.html", tmp_path / "page.html")
    found, messages = checked(page)
    logged = [step["step"] for step in read_trace(folder)]
    assert found["last"] == "Step 4" and found["first"] == "Step 1"
    assert found["forward"] == f"Step {logged[1]}"
    assert found["colour"] == "ratio" and found["answers"] == 4
    assert re.fullmatch(r"Answer \d of 4", found["chosen"])
    assert "probability" in found["tip"] and "probability" in found["key"]
    assert found["focus"] == "true"  # the chosen answer keeps the focus
    trained = json.loads((folder / "test-trained.json").read_text())
    assert set(found["kinds"]) == {"all kinds", *[row["kind"] for row in trained]}
    assert found["cards"] == sum(row["kind"] == found["kinds"][1] for row in trained)
    assert found["dialog"] and found["images"] == 0 and found["wide"] <= 0
    assert found["errors"] == [] and "CONSOLE" not in messages


@pytest.mark.skipif(not CHROMIUM, reason="Chromium is not installed")
def test_light_and_dark_screenshots_differ_and_a_narrow_window_does_not_scroll_sideways(
    run, tmp_path
):
    folder, _ = run
    means = []
    for name, options in (("light", []), ("dark", ["--force-dark-mode"])):
        shot = tmp_path / f"{name}.png"
        browse(folder / "report.html", f"--screenshot={shot}", "--window-size=1300,900", *options)
        means.append(np.asarray(Image.open(shot).convert("L")).mean())
    assert means[0] > 180 and means[1] < 90
    page = with_check(folder / "report.html", tmp_path / "page.html")
    done = browse(page, "--dump-dom", "--window-size=500,900")
    assert '"wide":0' in done.stdout


CHECK_PARTS = """
addEventListener("load", () => {
  const one = (selector) => document.querySelector(selector);
  const box = (selector) => one(selector).getBoundingClientRect();
  const touch = (node, ...names) => names.forEach((name) =>
    node.dispatchEvent(new PointerEvent(name, { bubbles: name === "pointerdown" })));
  const tip = one("#tip");
  const found = { mapped: one("#mapped").textContent, tabs: one("#map i").tabIndex };
  found.wide = box("#map i:last-child").right - box("#map").right;
  found.over = box("#mapped").bottom - box("#map i").top;
  found.dot = [box("#picture circle").width, box("#picture circle").height];
  found.crosses = document.querySelectorAll("#picture path").length;
  found.dots = document.querySelectorAll("#picture circle").length;
  found.high = box("#picture .picture").height / innerHeight;
  found.shape = box("#picture .picture").height / box("#picture .picture").width;
  const answer = one("#answers > [aria-current=false]");
  found.role = answer.getAttribute("role");
  const token = answer.querySelector(".tokens span");
  touch(token, "pointerenter", "pointerdown", "pointerup", "pointerleave");
  token.click();
  found.tapped = [answer.getAttribute("aria-current"), !tip.hidden, tip.textContent.length > 20];
  touch(document.body, "pointerdown");
  found.elsewhere = [tip.hidden, tip.textContent];
  answer.focus();
  answer.dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowRight", bubbles: true }));
  found.pointed = !tip.hidden;
  answer.blur();
  found.left = tip.hidden;
  found.kinds = [...one("#kind").options].map((each) => each.value);
  one("#kind").selectedIndex = found.kinds.indexOf("all");
  one("#kind").dispatchEvent(new Event("change"));
  found.cards = document.querySelectorAll("#cards button").length;
  one("#cards button").click();
  found.close = document.activeElement === one("#pair > :first-child");
  document.title = "FOUND" + JSON.stringify(found) + "END";
});
"""


@pytest.fixture(scope="module")
def parts(run, tmp_path_factory):
    """The result of CHECK_PARTS: tall pictures, 256 groups of 12 answers, and the kind "all"."""
    if not CHROMIUM:
        pytest.skip("Chromium is not installed")
    data = block((run[0] / "report.html").read_text(encoding="utf-8"))
    data["settings"]["questions"] = 512
    step = data["steps"][-1]
    step["questions"] = [{"question": "?", "rewards": list(range(12))}] * 256
    group = step["groups"][0]
    group["size"] = [100, 400]
    for answer in group["answers"]:
        answer["objects"] = [{"box": [9, 9, 90, 90], "points": [[40, 40, 1], [20, 60, 0]]}]
    data["test"]["questions"][0]["kind"] = "all"
    folder = tmp_path_factory.mktemp("parts")
    (folder / "report.html").write_text(report.page(data), encoding="utf-8")
    return checked(with_check(folder / "report.html", folder / "check.html", CHECK_PARTS))[0]


def test_the_map_of_many_large_groups_stays_in_its_place_and_names_the_first_process(parts):
    assert parts["wide"] <= 0.5 and parts["over"] <= 0
    assert "256 groups" in parts["mapped"] and "first process" in parts["mapped"]


def test_points_on_a_tall_picture_are_round_dots_and_crosses_and_the_picture_fits(parts):
    assert parts["dot"][0] == pytest.approx(parts["dot"][1], rel=0.01)
    assert parts["dots"] == parts["crosses"] == 1
    assert parts["high"] < 0.61 and parts["shape"] == pytest.approx(4, rel=0.01)


def test_an_answer_can_be_read_and_its_numbers_close_when_the_focus_moves_away(parts):
    assert parts["role"] == "group" and parts["tabs"] == 0
    assert parts["pointed"] and parts["left"] and parts["close"]


def test_a_tapped_token_shows_its_numbers_until_the_next_tap_elsewhere(parts):
    assert parts["tapped"] == ["true", True, True] and parts["elsewhere"] == [True, ""]


def test_a_kind_that_is_called_all_is_not_mixed_up_with_all_questions(parts):
    assert parts["kinds"].count("all") == 1 and parts["cards"] == 1


@pytest.mark.skipif(not CHROMIUM, reason="Chromium is not installed")
def test_a_page_is_printed_in_light_colours_in_dark_mode_too(run, tmp_path):
    printed = []
    for options in ([], ["--force-dark-mode"]):
        file = tmp_path / "page.pdf"
        browse(run[0] / "report.html", "--no-pdf-header-footer", f"--print-to-pdf={file}", *options)
        printed.append(re.sub(rb"Date \(.*?\)", b"", file.read_bytes()))
    assert printed[0] == printed[1] and len(printed[0]) > 10_000


@pytest.mark.skipif(not PHOTOS.is_dir(), reason="the photographs are not at hand")
def test_a_photograph_and_an_answer_without_a_mask_get_on_the_page(segmenter, tmp_path):
    sample = load_data(str(PHOTOS), "train", 4)[0]
    texts = [
        "no answer at all",
        '<think>.</think><answer>{"bbox": [10, 20, 300, 400], "points": [[50, 60, 1]]}</answer>',
    ]
    answers = [read_answer(text, 840) for text in texts]
    rewards = score_group(segmenter, sample, answers)
    size = trace.small_size(sample.image.size, trace.SIDE)
    assert max(size) == trace.SIDE
    described = [trace.described_answer(reward, size) for reward in rewards]
    assert described[0]["mask"] is None and described[0]["objects"] == []
    truth = trace.small_rle(sample.mask, size)
    assert truth["size"] == [size[1], size[0]]
    share = coco.decode(truth).mean()
    assert share == pytest.approx(sample.mask.mean(), abs=0.01)
    for one in described:
        assert len(report.overlay(one["mask"], truth)) < 20_000
    assert len(trace.webp(sample.image, size, 85)) < 60_000


# -------------------------------------------------------------------------------- full size

WRITTEN = (
    '<think>Möve, 海, "left".</think>'
    '<answer>{"bbox": [210, 210, 630, 630], "points": [[420, 420, 1]]}</answer>'
)


@pytest.fixture(scope="module")
def photo_run(real_vocabulary, tmp_path_factory):
    """A run with photographs at 840 pixels and Qwen's tokens, by a small random Qwen2.5-VL.

    Its random answers have no mask. So the first answer of each group is replaced by WRITTEN, with
    the log-probabilities of WRITTEN under the policy.
    """
    if not PHOTOS.is_dir():
        pytest.skip("the photographs are not at hand")
    folder = tmp_path_factory.mktemp("photo_report") / "run"
    s = photo_settings(
        real_vocabulary, folder, max_new_tokens=64, group=4, updates=2, test_samples=3
    )
    generate = decoding.generate

    def one_written(policy, prompts, *rest):
        groups = generate(policy, prompts, *rest)
        tokenizer = policy.processor.tokenizer
        ids = torch.tensor(tokenizer(WRITTEN + tokenizer.eos_token)["input_ids"])
        for prompt, group in zip(prompts, groups):
            with torch.no_grad():
                logps, _ = logprobs(policy, [prompt], [[ids]])
            group[0] = decoding.Completion(ids, logps, False, WRITTEN)
        return groups

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoding, "generate", one_written)
        train(s)
    return folder


def test_the_page_of_a_run_with_photographs_has_qwens_tokens_and_answers_without_a_mask(photo_run):
    data = block((photo_run / "report.html").read_text(encoding="utf-8"))
    assert [step["step"] for step in data["steps"]] == [1, 2]
    for group in [group for step in data["steps"] for group in step["groups"]]:
        assert group["side"] == 840 and max(group["size"]) == trace.SIDE
        assert min(group["size"]) < trace.SIDE  # photographs keep their shape
        written, *others = group["answers"]
        assert "".join(written["tokens"]).startswith(WRITTEN)
        assert written["objects"][0]["box"] == [210, 210, 630, 630]
        assert all(answer["objects"] == [] and answer["why"] for answer in others)
        assert written["advantage"] > 0 > others[0]["advantage"]
    assert len(data["test"]["questions"]) == 3
    assert (photo_run / "report.html").stat().st_size < 1_500_000


@pytest.mark.skipif(not CHROMIUM, reason="Chromium is not installed")
def test_the_page_of_a_run_with_photographs_works_in_a_browser(photo_run, tmp_path):
    page = with_check(photo_run / "report.html", tmp_path / "page.html")
    found, messages = checked(page)
    assert found["last"] == "Step 2" and found["answers"] == 4 and found["images"] == 0
    assert "probability" in found["tip"] and found["dialog"] and found["wide"] <= 0
    assert found["errors"] == [] and "CONSOLE" not in messages
