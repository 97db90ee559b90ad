"""COCO's pictures from a server as servers are: they break connections, send errors and wrong files, fall silent."""

import io
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from PIL import Image
from test_public import coco_info, coco_rows, parquet, picture, png

from samr1_mini import decoding
from samr1_mini.config import UserError
from samr1_mini.data import download
from samr1_mini.data import load_data, open_data
from samr1_mini.data import public
from samr1_mini.data.download import download_pictures, picture_name

COCO_URL, NAME = download.COCO_URL, coco_info(1)["file_name"]
ANOTHER_SIZE = io.BytesIO()
Image.new("RGB", (9, 9)).save(ANOTHER_SIZE, "PNG")


class Server(ThreadingHTTPServer):
    """Serves pictures by number. `faults[name]` lists what goes wrong at first, `always[name]` does so each time."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/train2014/"
        self.asked, self.faults, self.always, self.over = [], {}, {}, threading.Event()

    def handle_error(self, *_):
        """A client that hangs up is not news."""


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        server, name = self.server, self.path.removeprefix("/train2014/")
        server.asked.append(name)
        fault = server.always.get(name) or (server.faults.get(name) or [""]).pop(0)
        data = png(int(name.split("_")[-1].split(".")[0]))["bytes"]
        if fault.isdigit():
            return self.send_error(int(fault))
        if fault == "silent":
            return server.over.wait(20)
        if fault == "no HTTP":
            return self.wfile.write(b"SSH-2.0-OpenSSH_9.6\r\n\r\n")
        if fault == "broken chunk":
            return self.wfile.write(
                b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1000\r\n" + data[:200]
            )
        if fault == "slow headers":
            self.wfile.write(b"HTTP/1.0 200 OK\r\nX-Slow: ")
            return self.trickle(b"x" * 1000)
        wrong = {
            "short": data[:200],
            "page": b"<html>busy, come back</html>",
            "another size": ANOTHER_SIZE.getvalue(),
        }
        data = wrong.get(fault, data)
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if fault == "slow":
            return self.trickle(data)
        self.wfile.write(data[: len(data) // 2] if fault == "broken off" else data)

    def trickle(self, data):
        for i in range(len(data)):
            self.wfile.write(data[i : i + 1])
            if self.server.over.wait(0.05):
                return


@pytest.fixture
def server(tmp_path, monkeypatch):
    server = Server()
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(download, "PAUSES", (0.01, 0.02))
    monkeypatch.setattr(download, "COCO_URL", server.url)
    monkeypatch.setattr(download, "PICTURES", tmp_path / "cache")
    monkeypatch.setattr(public, "SETS", tmp_path / "sets")
    yield server
    server.over.set()
    server.shutdown()
    server.server_close()


@pytest.fixture
def impatient(monkeypatch):
    """For servers that fall silent. Not for all: a busy machine is silent for as long now and then."""
    monkeypatch.setattr(download, "SILENCE", 0.3), monkeypatch.setattr(download, "LIMIT", 2.0)


def sizes(*numbers):
    return {coco_info(i)["file_name"]: picture().size for i in numbers}


def stored(folder):
    return sorted(file.name for file in folder.iterdir())


@pytest.mark.parametrize(
    "fault",
    ["500", "broken off", "broken chunk", "no HTTP", "short", "page", "another size", "silent"],
)
def test_what_goes_wrong_twice_is_had_at_the_third_try(server, tmp_path, fault, request):
    if fault == "silent":
        request.getfixturevalue("impatient")
    server.faults[NAME] = [fault, fault]
    assert download_pictures(sizes(1, 2), tmp_path / "a", 0) == {}
    assert server.asked.count(NAME) == 3 and stored(tmp_path / "a") == list(sizes(1, 2))
    assert (tmp_path / "a" / NAME).read_bytes() == png(1)["bytes"]


@pytest.mark.parametrize(
    "fault, tries, reason",
    [
        ("500", 3, "500"),
        ("404", 1, "404"),
        ("410", 1, "410"),
        ("broken off", 3, "broke"),
        ("short", 3, "truncated"),
        ("page", 3, "picture"),
        ("another size", 3, "9 x 9"),
        ("silent", 3, "timed out"),
        ("slow", 1, "2 seconds"),
        ("slow headers", 1, "2 seconds"),
        ("no HTTP", 3, "SSH"),
        ("broken chunk", 3, "Incomplete"),
    ],
)
def test_what_always_goes_wrong_ends_in_time_with_its_reason_and_leaves_nothing(
    server, tmp_path, fault, tries, reason, request
):
    if fault in ("silent", "slow", "slow headers"):
        request.getfixturevalue("impatient")
    server.always[NAME] = fault
    begun = time.perf_counter()
    failed = download_pictures(sizes(1, 2, 3), tmp_path / "a", 1)
    assert time.perf_counter() - begun < 4 and server.asked.count(NAME) == tries
    assert list(failed) == [NAME] and reason in failed[NAME]
    assert stored(tmp_path / "a") == list(sizes(2, 3))


def test_no_address_from_the_data_is_opened(server, tmp_path):
    secret = tmp_path / "secret.png"
    picture(1).save(secret)
    rows = coco_rows(3)
    addresses = (
        f"file://{secret}",
        server.url.replace("train2014", "elsewhere"),
        "http://mscoco.org/images/2",
    )
    for i, (row, address) in enumerate(zip(rows, addresses)):
        row["raw_image_info"] = json.dumps(
            coco_info(i) | {"coco_url": address, "flickr_url": address}
        )
    data = load_data(parquet(tmp_path / "set", "train", rows), "train", 3)
    assert sorted(server.asked) == list(sizes(0, 1, 2)) and len([s.image for s in data]) == 3
    assert COCO_URL == "http://images.cocodataset.org/train2014/"


BAD_NAMES = [
    "a b.png",
    "a.png?x=1",
    "a.png#x",
    "%2e%2e.png",
    "..",
    ".png",
    "x.svg",
    "a\\b.png",
    "a.png\n",
    "",
    7,
    None,
]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_file_name_that_is_not_a_pictures_is_refused_before_anything_is_asked_for(
    server, tmp_path, name
):
    rows = coco_rows(3)
    rows[1]["raw_image_info"] = json.dumps(coco_info(1) | {"file_name": name})
    with pytest.raises(UserError, match="--data .*row 2: "):
        open_data(parquet(tmp_path / "set", "train", rows), "train", 3)
    assert not server.asked


def test_a_picture_that_cannot_be_had_gives_its_place_to_the_next_one_drawn(
    server, tmp_path, capsys
):
    folder = parquet(tmp_path / "set", "train", coco_rows(250))
    plan = open_data(folder, "train", 100, seed=3)
    follow = open_data(folder, "train", 101, seed=3).ids
    gone = [coco_info(int(follow[5].split("-")[0]))["file_name"]]
    server.always[gone[0]] = "404"
    plan.download()
    assert plan.ids == follow[:5] + follow[6:] and plan.missing == gone and len(plan) == 100
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 and gone[0] in lines[0] and "404" in lines[0] and "1 of 100" in lines[0]
    assert all(
        sample.picture not in gone and sample.image.size == picture().size for sample in plan
    )
    asked = len(server.asked)
    plan.download()
    again = open_data(
        folder, "train", 100, seed=3
    )  # another process, or a run that is gone on with
    again.download(missing=gone)
    assert again.ids == plan.ids and len(server.asked) == asked and not capsys.readouterr().out


def test_for_test_the_draw_goes_on_and_where_no_row_is_left_the_set_is_shorter(
    server, tmp_path, capsys
):
    folder = parquet(tmp_path / "set", "test", coco_rows(130))
    gone = coco_info(17)["file_name"]
    server.always[gone] = "404"
    every = load_data(folder, "test", 500)
    assert (
        len(every) == 129
        and every.missing == [gone]
        and every.ids == [f"{i}-0" for i in range(130) if i != 17]
    )
    assert "129" in capsys.readouterr().out
    order = open_data(folder, "test", 129).ids  # not all, so drawn
    place = order.index("17-0")
    count = max(place + 1, 100)
    some = load_data(folder, "test", count)
    assert some.ids == [x for x in order if x != "17-0"][:count] and len(some) == count


def test_more_than_one_in_a_hundred_ends_in_one_line_and_the_rest_is_kept(server, tmp_path):
    folder = parquet(tmp_path / "set", "train", coco_rows(6))
    server.always = {coco_info(i)["file_name"]: "404" for i in (3, 4)}
    with pytest.raises(UserError, match=r"2 of 6 .*\.png.*404") as error:
        load_data(folder, "train", 6)
    assert "\n" not in str(error.value) and stored(tmp_path / "cache") == list(sizes(0, 1, 2, 5))
    server.always.clear()
    server.asked.clear()
    assert len([s.mask for s in load_data(folder, "train", 6)]) == 6
    assert sorted(server.asked) == [coco_info(i)["file_name"] for i in (3, 4)]
    folder = parquet(tmp_path / "larger", "train", coco_rows(199))
    server.always = {coco_info(i)["file_name"]: "404" for i in (3, 150)}
    (tmp_path / "cache" / coco_info(3)["file_name"]).unlink()
    with pytest.raises(UserError, match="2 of 199"):
        load_data(folder, "train", 199)


def test_one_missing_picture_among_few_questions_is_replaced_or_left_out(server, tmp_path, capsys):
    """One in a hundred of 32 is none, and a run must not end for one picture."""
    folder = parquet(tmp_path / "set", "validation", coco_rows(40))
    gone = coco_info(17)["file_name"]
    server.always[gone] = "404"
    some = load_data(folder, "validation", 32)
    every = load_data(folder, "validation", 40)
    assert len(some) == 32 and len(every) == 39 and every.missing == [gone]
    assert gone in capsys.readouterr().out


def test_a_server_that_gives_nothing_is_given_up_before_every_picture_was_tried(server, tmp_path):
    server.always = dict.fromkeys(sizes(*range(300)), "404")
    with pytest.raises(UserError, match="of 300"):
        download_pictures(sizes(*range(300)), tmp_path / "a", 3)
    assert len(server.asked) < 150


def test_a_full_disk_is_said_in_one_line(server, tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    monkeypatch.setattr("os.getpid", lambda: 77)
    (tmp_path / "a" / f"{NAME}.77.part").symlink_to(
        "/dev/full"
    )  # the system's own "no space left on device"
    with pytest.raises(UserError, match="/a: .*disk"):
        download_pictures(sizes(1), tmp_path / "a", 1)
    assert stored(tmp_path / "a") == []


def test_what_is_left_to_download_counts_the_pictures_that_are_not_here(server, tmp_path):
    folder = parquet(tmp_path / "set", "train", coco_rows(6))
    data = open_data(folder, "train", 6)
    assert data.download_bytes == 6 * download.COCO_BYTES and not server.asked and not data.box_only
    load_data(folder, "train", 2)
    (tmp_path / "cache" / server.asked[0]).write_bytes(b"")  # as a loss of power may leave it
    assert data.download_bytes == 5 * download.COCO_BYTES
    data.download()
    assert data.download_bytes == 0 and len(data) == 6


def test_training_on_a_copy_of_refcocog_comes_to_its_end_over_a_bad_connection(
    server, tmp_path, capsys, monkeypatch
):
    """On pictures of noise the base hardly ever finds the format, so one answer of each group is given one; all else is
    real."""
    import train

    real = decoding.generate

    def one_in_the_format(*arguments, **named):
        groups = real(*arguments, **named)
        for group in groups:
            group[0].text = (
                '<think>There.</think><answer>{"bbox": [19, 14, 56, 70], "points": [[40, 40, 1]]}</answer>'
            )
        return groups

    monkeypatch.setattr(decoding, "generate", one_in_the_format)

    monkeypatch.setattr(download, "SILENCE", 2.0)
    folder, start = str(tmp_path / "set"), 0
    for split, count in (("train", 12), ("validation", 9), ("test", 4)):
        rows = [coco_rows(start + count)[i] | {"split": split} for i in range(start, start + count)]
        parquet(tmp_path / "set", split, rows)
        start += count
    names = list(sizes(*range(start)))
    for name, fault in zip(
        names, ("500", "broken off", "short", "page", "another size", "503", "silent")
    ):
        server.faults[name] = [fault]
    server.always[names[15]] = "404"
    options = {
        "preset": "tiny",
        "device": "cpu",
        "data": folder,
        "samples": 8,
        "questions": 4,
        "group": 4,
        "updates": 2,
        "eval-every": 0,
        "eval-samples": 10,
        "test-samples": 4,
        "run": tmp_path / "run",
    }
    train.main([f"--{name}={value}" for name, value in options.items()])
    printed = capsys.readouterr().out
    assert "held-out test, greedy" in printed and f"{names[15]} (HTTP Error 404" in printed
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["samples"] == 8 and summary["trained"]["count"] == 4
    assert len(json.loads((tmp_path / "run/samples.json").read_text())) == 8
    assert (tmp_path / "run/adapter/adapter_model.safetensors").exists()
    assert len(stored(tmp_path / "cache")) == 8 + 8 + 4
    assert json.loads((tmp_path / "run/missing.json").read_text()) == {
        "train": [],
        "validation": [names[15]],
        "test": [],
    }
    server.asked.clear()
    train.main(["--resume", "--run", str(tmp_path / "run")])
    assert not server.asked  # what could not be had is remembered, what could is there


def test_a_pictures_name_may_end_in_capitals():
    assert picture_name("a/COCO_1.JPG") == "COCO_1.JPG"
