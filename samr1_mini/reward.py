"""The reward: text -> answer (box, points) -> SAM's mask -> IoU with the true mask -> eq. (5), and two terms for the
format.

    reward = accuracy (0, 2, 3 or 4) + reasoning format (0 or 1) + segmentation format (0 or 1)

No network is trained here and nothing is learnt from boxes: the policy is paid for what Segment Anything makes of its
prompt. Frames: answers count pixels of the square picture the policy sees; SAM and the true mask keep the picture's
own size [H, W].
"""

import json
import pickle
import re
from collections import OrderedDict
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path

import numpy as np
import torch
from segment_anything import SamPredictor, sam_model_registry
from transformers import AutoConfig, AutoImageProcessor, AutoModelForMaskGeneration

from .config import UserError
from .data import Sample
from .metrics import box_iou, filled, intersection_union, iou, tight_box
from .tiny import build as _tiny  # registers the tiny SAM beside vit_b, vit_l and vit_h

MAX_TEXT = 20_000  # characters; nothing that long is an answer


# ---------------------------------------------------------------------------------------------------- parse


@dataclass
class Answer:
    """What a text says. `box` and `points` are in the policy's pixels, and set only where the segmentation format
    holds."""

    box: tuple[float, float, float, float] | None = None
    points: list[tuple[float, float, int]] = field(default_factory=list)
    reasoning_format: bool = False
    segmentation_format: bool = False
    why: str = ""  # what broke the format, for people
    lenient_box: tuple[float, float, float, float] | None = None  # a box found in any shape, for gIoU_lenient

    @property
    def in_format(self) -> bool:
        return self.reasoning_format and self.segmentation_format


def _number(value) -> float:
    """A finite JSON number as a float; anything else (true, "3", NaN, 1e999) is a ValueError."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < 1e9:
        raise ValueError(f"{str(value)[:20]!r} is not a number")
    return float(value)


def _box(value, width: int, height: int) -> tuple[float, float, float, float]:
    """Four numbers, clipped to the picture; reversed and empty boxes are refused."""
    if not isinstance(value, (list, tuple)) or len(value) != 4:
        raise ValueError("bbox is not a list of four numbers")
    x1, y1, x2, y2 = map(_number, value)
    x1, x2 = min(max(x1, 0.0), width), min(max(x2, 0.0), width)
    y1, y2 = min(max(y1, 0.0), height), min(max(y2, 0.0), height)
    if x1 >= x2 or y1 >= y2:
        raise ValueError("bbox is reversed, empty or outside the picture")
    return x1, y1, x2, y2


def _points(value, width: int, height: int, max_points: int) -> list[tuple[float, float, int]]:
    """Labelled points [[x, y, 0 or 1], ...], clipped to the picture."""
    if not isinstance(value, list) or not value:
        raise ValueError("points is not a list of [x, y, label]")
    if len(value) > max_points:  # without a cap a trained policy emits ever more of them
        raise ValueError(f"{len(value)} points, at most {max_points} are allowed")
    points = []
    for point in value:
        if not isinstance(point, list) or len(point) != 3:
            raise ValueError("a point is not [x, y, label]")
        x, y, label = map(_number, point)
        if label not in (0, 1):
            raise ValueError(f"label {label:g} is neither 0 nor 1")
        points.append((min(max(x, 0.0), width - 1), min(max(y, 0.0), height - 1), int(label)))
    return points


# A box in any of the shapes that people and models write: [x1, y1, x2, y2] in brackets of either kind, or Qwen's
# (x1,y1),(x2,y2). Two points in a list, more than two points and what is called "points" are no box. A text is cut
# into numbers, words and signs first, so that line breaks and quotes around numbers do not matter; a number is then
# read for the one bracket before it, so the time is linear.
_TOKEN = re.compile(r"""-?\d+(?:\.\d+)?(?!\w)|\w+|[^\s"'\w]""")
_NUMBER = r"(-?\d+(?:\.\d+)?)"
_FOUR = re.compile(
    r"(?<!points : )[\[(] " + " , ".join([_NUMBER] * 4) + r" [\])]"
    rf"|(?<!\[ )(?<!\) , )\( {_NUMBER} , {_NUMBER} \) , \( {_NUMBER} , {_NUMBER} \)(?! , \()"
)


def lenient_box(text: str, width: int, height: int) -> tuple[float, float, float, float] | None:
    """The last box in the answer part, which need not be closed; where that holds none, the last in the whole text."""
    answer = text.rpartition("<answer>")[2].partition("</answer>")[0]
    for part in (answer, text):
        for match in reversed(list(_FOUR.finditer(" ".join(_TOKEN.findall(part))))):
            try:
                return _box([float(v) for v in match.groups() if v is not None], width, height)
            except ValueError:
                continue
    return None


def parse(text: str, width: int, height: int, max_points: int = 8) -> Answer:
    """Read an answer to a `width` x `height` picture. Never raises, runs in linear time; `why` says what is wrong.

    >>> parse('<think>Left.</think><answer>{"bbox": [1, 2, 9, 8], "points": [[5, 5, 1]]}</answer>', 28, 28).box
    (1.0, 2.0, 9.0, 8.0)
    """
    answer, text = Answer(), text[:MAX_TEXT].strip()
    answer.lenient_box = lenient_box(text, width, height)
    tags = ("<think>", "</think>", "<answer>", "</answer>")
    places = [text.find(tag) for tag in tags]
    whole = all(text.count(tag) == 1 for tag in tags) and places == sorted(places)
    between = text[places[1] + len(tags[1]) : places[2]].strip() if whole else ""
    answer.reasoning_format = whole and text.startswith(tags[0]) and text.endswith(tags[3]) and not between
    if not answer.reasoning_format:
        answer.why = "not <think>...</think><answer>...</answer>"
    try:
        if text.count(tags[2]) != 1 or text.count(tags[3]) != 1 or places[3] < places[2]:
            raise ValueError("not exactly one <answer>...</answer>")
        inside = text[places[2] + len(tags[2]) : places[3]].strip()
        inside = inside.removeprefix("```json").removeprefix("```").removesuffix("```")
        said = json.loads(inside)
        if not isinstance(said, dict):
            raise ValueError("the answer is not a JSON object")
        box = _box(said.get("bbox"), width, height)
        points = _points(said.get("points"), width, height, max_points)
        answer.box, answer.points, answer.segmentation_format, answer.lenient_box = box, points, True, box
    except (ValueError, RecursionError) as error:  # JSON errors are ValueErrors; deep nesting is a RecursionError
        answer.why = "; ".join(filter(None, [answer.why, str(error) or "nested too deep"]))
    return answer


# ---------------------------------------------------------------------------------------------------- segment


class Segmenter:
    """A frozen SAM: pictures and prompts in, masks out. One encoder pass a picture; the last `remember` pictures are
    kept.

    A group is scored at once, so training and evaluation need no more than one."""

    def __init__(self, predictor, remember: int = 1):
        self.predictor, self.remember, self.encoded = predictor, remember, OrderedDict()

    def look_at(self, image: np.ndarray) -> None:
        """Encode a picture, uint8 RGB [H, W, 3], unless it is remembered."""
        key = blake2b(np.ascontiguousarray(image), digest_size=16).digest() + str(image.shape).encode()
        if key not in self.encoded:
            self.predictor.set_image(image, image_format="RGB")
            self.encoded[key] = (self.predictor.features, self.predictor.original_size, self.predictor.input_size)
            while len(self.encoded) > self.remember:
                self.encoded.popitem(last=False)
        self.encoded.move_to_end(key)
        self.predictor.features, self.predictor.original_size, self.predictor.input_size = self.encoded[key]
        self.predictor.is_image_set = True

    @torch.no_grad()
    def masks(self, image: np.ndarray, boxes: list[tuple], points: list[list[tuple]]) -> np.ndarray:
        """Masks bool [n, H, W] for n prompts in the picture's own pixels: a box (x1, y1, x2, y2) and points [(x, y,
        label), ...].

        Of SAM's three masks the one with the highest predicted score counts, in training and in evaluation alike. All
        prompts with the same number of points share one decoder pass: padding shorter ones would make a mask depend on
        its neighbours. Only the chosen masks are brought to the picture's size, one at a time: all of 8 prompts would
        be 1.1 GB for 12 megapixels.
        """
        self.look_at(image)
        predictor, found = self.predictor, np.zeros((len(boxes), *image.shape[:2]), bool)
        for count in sorted({len(p) for p in points}):
            rows = [i for i, p in enumerate(points) if len(p) == count]
            box = torch.tensor([boxes[i] for i in rows], dtype=torch.float32, device=predictor.device)  # [n, 4]
            box = predictor.transform.apply_boxes_torch(box, predictor.original_size)
            place = label = None
            if count:
                mark = torch.tensor([points[i] for i in rows], dtype=torch.float32, device=predictor.device)  # [n, count, 3]
                place = predictor.transform.apply_coords_torch(mark[..., :2], predictor.original_size)
                label = mark[..., 2]
            logits, scores = self.decode(place, label, box)  # [n, 3, h, w], [n, 3]
            model = predictor if isinstance(predictor, Sam2Predictor) else predictor.model
            for row, three, best in zip(rows, logits, scores.argmax(1)):
                logit = three[None, best, None]  # [1, 1, h, w]
                logit = model.postprocess_masks(logit, predictor.input_size, predictor.original_size)  # [1, 1, H, W]
                found[row] = (logit[0, 0] > model.mask_threshold).cpu().numpy()
        return found

    def decode(self, points: torch.Tensor | None, labels: torch.Tensor | None, boxes: torch.Tensor):
        """n prompts in SAM's own pixels -> low-resolution logits [n, 3, h, w], predicted IoU [n, 3]: predict_torch,
        not upscaled."""
        if isinstance(self.predictor, Sam2Predictor):
            return self.predictor.decode(points, labels, boxes)
        sam, points = self.predictor.model, None if points is None else (points, labels)
        sparse, dense = sam.prompt_encoder(points=points, boxes=boxes, masks=None)
        return sam.mask_decoder(
            image_embeddings=self.predictor.features, image_pe=sam.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse, dense_prompt_embeddings=dense, multimask_output=True,
        )


SAM2_KINDS = ("sam2", "sam2_video", "sam3_tracker", "sam3_video")


class Sam2Predictor:
    """transformers' SAM 2, 2.1 or SAM 3 tracker behind what Segmenter uses of SamPredictor and its model."""

    mask_threshold = 0.0

    def __init__(self, name: str, device: str = "cpu"):
        self.model = AutoModelForMaskGeneration.from_pretrained(name).to(device).eval().requires_grad_(False)
        self.read, self.transform, self.device = AutoImageProcessor.from_pretrained(name), self, device

    @torch.no_grad()
    def set_image(self, image: np.ndarray, image_format: str = "RGB") -> None:
        pixels = self.read(images=image, return_tensors="pt").pixel_values.to(self.device)  # [1, 3, S, S]: squeezed square
        self.features, self.original_size, self.input_size = self.model.get_image_embeddings(pixels), image.shape[:2], pixels.shape[-2:]

    def apply_coords_torch(self, coords: torch.Tensor, original_size: tuple[int, int]) -> torch.Tensor:
        """Pixels [..., 2] of the picture -> pixels of the square that the encoder saw."""
        return coords * torch.tensor([self.input_size[1] / original_size[1], self.input_size[0] / original_size[0]], device=coords.device)

    def apply_boxes_torch(self, boxes: torch.Tensor, original_size: tuple[int, int]) -> torch.Tensor:
        return self.apply_coords_torch(boxes.view(-1, 2, 2), original_size).view(-1, 4)

    def decode(self, points: torch.Tensor | None, labels: torch.Tensor | None, boxes: torch.Tensor):
        """See Segmenter.decode."""
        marks = {} if points is None else {"input_points": points[None], "input_labels": labels[None].long()}
        out = self.model(image_embeddings=self.features, multimask_output=True, input_boxes=boxes[None], **marks)
        return out.pred_masks[0], out.iou_scores[0]

    def postprocess_masks(self, masks: torch.Tensor, input_size: tuple, original_size: tuple) -> torch.Tensor:
        """Logits [n, c, h, w] -> logits [n, c, H, W] of the picture's size."""
        return torch.nn.functional.interpolate(masks.float(), original_size, mode="bilinear", align_corners=False)


# segment_anything's files: bytes and SHA-256, checked before they are read.
SAM_FOLDER = Path.home() / ".cache" / "samr1_mini"
SAM_URL = "https://dl.fbaipublicfiles.com/segment_anything/"
SAM_FILES = {
    "vit_b": ("sam_vit_b_01ec64.pth", 375_042_383, "ec2df62732614e57411cdcf32a23ffdf28910380d03139ee0f4fcbe91eb8c912"),
    "vit_l": ("sam_vit_l_0b3195.pth", 1_249_524_607, "3adcc4315b642a4d2101128f611684e8734c41232a17c648ed1693702a49a622"),
    "vit_h": ("sam_vit_h_4b8939.pth", 2_564_550_879, "a7bf3b02f3ebf1267aba913ff637d9a2d5c33d3173bb679e46d9f338c26f262e"),
}


def sam_bytes(kind: str, checkpoint: str = "") -> int:
    """Bytes of segment_anything's file for `kind` that are still to be downloaded."""
    if checkpoint or kind not in SAM_FILES:
        return 0
    name, size, _ = SAM_FILES[kind]
    return 0 if (SAM_FOLDER / name).exists() and (SAM_FOLDER / name).stat().st_size == size else size


def check_segmenter(kind: str) -> None:
    """Raises UserError where `kind` is no Segment Anything. Nothing large is loaded."""
    if kind == "tiny" or kind in SAM_FILES:
        return
    try:
        found = AutoConfig.from_pretrained(kind).model_type
        if found not in SAM2_KINDS:
            raise ValueError(f"it is a {found} model")
    except (OSError, ValueError) as error:
        why = str(error).splitlines()[0]
        raise UserError(f"--sam {kind}: none of tiny, {', '.join(SAM_FILES)}, nor the folder or hub id of a SAM 2 or 3 ({why})") from None


def sam_file(kind: str) -> Path:
    """The weights of "vit_b", "vit_l" or "vit_h", downloaded once into the cache, with a progress bar and checked
    against their hash."""
    name, size, digest = SAM_FILES[kind]
    path = SAM_FOLDER / name
    if sam_bytes(kind):  # a file gets its name only after its hash was checked
        path.parent.mkdir(parents=True, exist_ok=True)
        print(f"downloading {SAM_URL}{name} ({size / 1e9:.1f} GB) to {path}")
        try:
            torch.hub.download_url_to_file(SAM_URL + name, str(path), hash_prefix=digest)
        except (OSError, RuntimeError) as error:  # RuntimeError: the hash differs
            raise UserError(f"--sam {kind}: {SAM_URL}{name} could not be fetched ({error}); fetch it yourself and name it as --sam-checkpoint") from None
    return path


def load_segmenter(kind: str, checkpoint: str | Path | None = None, device: str = "cpu") -> Segmenter:
    """A frozen Segment Anything: "tiny" (weights in the package), "vit_b", "vit_l", "vit_h" (from the file
    `checkpoint`, else downloaded), or a SAM 2 or 3 by its hub id or folder. Raises UserError where there are no such
    weights."""
    if kind == "tiny":
        return Segmenter(SamPredictor(sam_model_registry["tiny"](checkpoint or _tiny.SAM).to(device).requires_grad_(False)))
    if kind in SAM_FILES:
        path, sam = checkpoint or sam_file(kind), sam_model_registry[kind]()
        try:
            sam.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        except (OSError, RuntimeError, pickle.UnpicklingError) as error:
            raise UserError(f"--sam-checkpoint {path}: not the weights of {kind} ({str(error).splitlines()[0]})") from None
        return Segmenter(SamPredictor(sam.to(device).requires_grad_(False)))
    check_segmenter(kind)
    return Segmenter(Sam2Predictor(kind, device))


# ---------------------------------------------------------------------------------------------------- reward


@dataclass
class Reward:
    """The reward of one answer, its terms, and what they were computed from."""

    total: float
    accuracy: float
    answer: Answer
    iou: float  # of SAM's mask; 0 where the answer cannot be read, whatever the truth is
    box_iou: float  # of the answer's box and the tight box of the true mask
    pair: tuple[int, int]  # its intersection and union, pixels
    mask: np.ndarray | None  # bool [H, W]


def accuracy_term(kind: str, mask_iou: float, answer_box_iou: float = 0.0) -> float:
    """Eq. (5), 0 to 4, and what the paper's table 3 and we compare it with; "box-iou" puts the box's IoU through the
    same tiers."""
    if kind.startswith("threshold:"):
        return 4.0 * (mask_iou > float(kind.split(":")[1]))
    if kind == "iou":
        return 4.0 * mask_iou
    if kind not in ("tiered", "box-iou"):
        raise ValueError(f"no accuracy term is called {kind}")
    value = answer_box_iou if kind == "box-iou" else mask_iou
    return 4.0 if value > 0.8 else 3.0 if value > 0.7 else 2.0 if value > 0.5 else 0.0  # eq. (5)


def to_picture(answer_box: tuple, points: list[tuple], sample: Sample, size: int) -> tuple[tuple, list[tuple]]:
    """An answer's coordinates from the policy's size x size square to the picture's own pixels."""
    sx, sy = sample.image.width / size, sample.image.height / size
    x1, y1, x2, y2 = answer_box
    return (x1 * sx, y1 * sy, x2 * sx, y2 * sy), [(x * sx, y * sy, label) for x, y, label in points]


def score_group(
    segmenter: Segmenter, sample: Sample, texts: list[str], size: int, accuracy: str = "tiered", weights=(1.0, 1.0, 1.0),
    max_points: int = 8, points: bool = True, lenient: bool = False,
) -> list[Reward]:
    """Reward G texts that answer one sample, in coordinates of a `size` x `size` square (Policy.frame).

    `weights` are those of accuracy, reasoning format and segmentation format. Without `points` SAM gets the box alone.
    `lenient` segments with a box found anywhere in the text where there is no proper answer: for evaluation beside the
    strict figure, never for training.
    """
    answers = [parse(text, size, size, max_points) for text in texts]
    boxes = [a.lenient_box if lenient else a.box for a in answers]
    read = [i for i, box in enumerate(boxes) if box is not None]
    prompts = [to_picture(boxes[i], answers[i].points if points else [], sample, size) for i in read]
    if sample.box_only:  # no true mask to compare with, so boxes stand for masks and SAM has nothing to do
        masks = {i: filled(box, *sample.mask.shape) for i, (box, _) in zip(read, prompts)}
    else:
        masks = dict(zip(read, segmenter.masks(np.asarray(sample.image), *map(list, zip(*prompts))))) if read else {}
    prompted, rewards = dict(zip(read, prompts)), []
    for i, answer in enumerate(answers):
        pair = intersection_union(masks.get(i), sample.mask, sample.ignore)
        value = iou(*pair)
        close = box_iou(prompted[i][0], tight_box(sample.mask)) if i in masks else 0.0
        terms = (accuracy_term(accuracy, value, close), float(answer.reasoning_format), float(answer.segmentation_format))
        total = sum(w * t for w, t in zip(weights, terms))
        rewards.append(Reward(total, terms[0], answer, value, close, pair, masks.get(i)))
    return rewards
