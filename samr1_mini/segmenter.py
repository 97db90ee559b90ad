"""The segmenter: a frozen Segment Anything (SAM, SAM 2 or SAM 3) turns boxes and points into masks.

The policy is rewarded for these masks. Any object with a method `masks` can be the segmenter.

Shapes: n prompts for one picture of H x W pixels. A prompt is a box with points. SAM's logits have
the smaller size h x w.
"""

import json
import zipfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from accelerate import init_empty_weights
from accelerate.utils import convert_to_fp32
from safetensors.torch import load_file
from segment_anything import SamPredictor, sam_model_registry
from segment_anything.modeling import (
    ImageEncoderViT,
    MaskDecoder,
    PromptEncoder,
    Sam,
    TwoWayTransformer,
)
from torch.nn.functional import interpolate
from transformers import AutoConfig, AutoImageProcessor, AutoModelForMaskGeneration

from .config import CACHE, UserError, first_line
from .files import loading_error, refuse_missing_weights
from .memory import compute_dtype, is_memory_error


class Segmenter(Protocol):
    """Describe an object that can be the segmenter: it needs this one method."""

    def masks(self, image: np.ndarray, boxes: list, points: list) -> np.ndarray:
        """Return masks, bool [n, H, W], for n prompts to one picture.

        image: uint8 RGB [H, W, 3].
        boxes: n boxes (x1, y1, x2, y2) in pixels of the picture.
        points: n lists of points (x, y, label). Label 1 is on the object, 0 off it. A list may be
        empty.
        """


MOST_PROMPTS = 64  # in one pass of the decoder: long lists of objects then fit in memory


def same_sizes(points: list) -> Iterator[list[int]]:
    """Yield the indices of prompts with the same number of points, at most MOST_PROMPTS at once."""
    for count in sorted({len(labelled) for labelled in points}):
        rows = [i for i, labelled in enumerate(points) if len(labelled) == count]
        for start in range(0, len(rows), MOST_PROMPTS):
            yield rows[start : start + MOST_PROMPTS]


@torch.no_grad()
def best_masks(segmenter, image: np.ndarray, boxes: list, points: list) -> np.ndarray:
    """Return for each prompt the mask with the highest predicted IoU, bool [n, H, W].

    Training and evaluation use the same rule. Prompts with the same number of points share one
    decoder pass. With padded lists of points, a mask would depend on the other prompts. Only the
    best mask is brought to the picture's size, one prompt at a time. For 12 megapixels, all masks
    of 8 prompts would take 1.1 GB.
    """
    encode_once(segmenter, image)
    found = np.zeros((len(boxes), *image.shape[:2]), bool)
    for rows in same_sizes(points):
        logits, scores = segmenter.predict([boxes[i] for i in rows], [points[i] for i in rows])
        for row, three, best in zip(rows, logits, scores.argmax(1)):
            found[row] = segmenter.to_mask(three[best]).cpu().numpy()
    return found


def encode_once(segmenter, image: np.ndarray) -> None:
    """Encode a picture, uint8 RGB [H, W, 3], unless it is the last encoded picture."""
    if np.array_equal(image, segmenter.encoded):
        return
    segmenter.encoded = None  # if the encoder fails, no picture counts as encoded
    segmenter.encode(image)
    segmenter.encoded = image.copy()


class SamSegmenter:
    """Segment with SAM, the model of the segment_anything library."""

    def __init__(self, predictor: SamPredictor):
        self.predictor = predictor
        self.encoded = None  # the picture that is encoded

    def masks(self, image: np.ndarray, boxes: list, points: list) -> np.ndarray:
        """Return masks as described in Segmenter. Encodes a repeated picture only once."""
        return best_masks(self, image, boxes, points)

    def encode(self, image: np.ndarray) -> None:
        """Run the encoder on a picture, uint8 RGB [H, W, 3]."""
        self.predictor.set_image(image)

    def predict(self, boxes: list, points: list):
        """Return three masks for each prompt: logits [n, 3, h, w], and predicted IoU [n, 3].

        All prompts have the same number of points.
        """
        device, size = self.predictor.device, self.predictor.original_size
        to_pixels = self.predictor.transform.apply_coords_torch  # pixels of the encoded picture
        corners = torch.tensor(boxes, dtype=torch.float32, device=device).view(-1, 2, 2)
        box = to_pixels(corners, size).flatten(1)  # [n, 4]
        place, label = None, None
        if points[0]:
            labelled = torch.tensor(points, dtype=torch.float32, device=device)  # [n, count, 3]
            place = to_pixels(labelled[..., :2], size)  # [n, count, 2]
            label = labelled[..., 2]  # [n, count]
        return sam_logits(self.predictor.model, self.predictor.features, place, label, box)

    def to_mask(self, logits: torch.Tensor) -> torch.Tensor:
        """Bring the logits of one mask [h, w] to the picture's size -> bool [H, W]."""
        model, predictor = self.predictor.model, self.predictor
        logits = model.postprocess_masks(
            logits[None, None], predictor.input_size, predictor.original_size
        )
        return logits[0, 0] > model.mask_threshold


class Sam2Segmenter:
    """Segment with SAM 2, SAM 2.1 or the tracker of SAM 3, from the library transformers."""

    def __init__(self, name: str, device: str, dtype: torch.dtype):
        """Load the folder or hub id `name`. The encoder computes in `dtype`."""
        model, found = AutoModelForMaskGeneration.from_pretrained(
            name, dtype=torch.float32, output_loading_info=True
        )
        refuse_missing_weights(found, f"--sam {name}")
        set_encoder_dtype(model.vision_encoder, dtype)
        self.model = model.to(device).eval().requires_grad_(False)
        self.processor = AutoImageProcessor.from_pretrained(name)
        self.device = device
        self.encoded = None  # the picture that is encoded

    def masks(self, image: np.ndarray, boxes: list, points: list) -> np.ndarray:
        """Return masks as described in Segmenter. Encodes a repeated picture only once."""
        return best_masks(self, image, boxes, points)

    def encode(self, image: np.ndarray) -> None:
        """Run the encoder on a picture, uint8 RGB [H, W, 3]."""
        pixels = self.processor(images=image, return_tensors="pt").pixel_values.to(self.device)
        self.features = self.model.get_image_embeddings(pixels)
        self.size = image.shape[:2]  # H, W
        # The encoder sees a square [1, 3, S, S]. These factors turn (x, y) into its pixels.
        height, width = self.size
        factors = [pixels.shape[3] / width, pixels.shape[2] / height]
        self.factors = torch.tensor(factors, device=self.device)

    def predict(self, boxes: list, points: list):
        """Return three masks for each prompt: logits [n, 3, h, w], and predicted IoU [n, 3].

        All prompts have the same number of points.
        """
        corners = torch.tensor(boxes, dtype=torch.float32, device=self.device).view(-1, 2, 2)
        prompts = {"input_boxes": (corners * self.factors).flatten(1)[None]}  # [1, n, 4]
        if points[0]:
            labelled = torch.tensor(points, dtype=torch.float32, device=self.device)
            prompts["input_points"] = (labelled[..., :2] * self.factors)[None]  # [1, n, count, 2]
            prompts["input_labels"] = labelled[None, ..., 2].long()  # [1, n, count]
        out = self.model(image_embeddings=self.features, multimask_output=True, **prompts)
        return out.pred_masks[0], out.iou_scores[0]

    def to_mask(self, logits: torch.Tensor) -> torch.Tensor:
        """Bring the logits of one mask [h, w] to the picture's size -> bool [H, W]."""
        logits = logits[None, None].float()
        logits = interpolate(logits, self.size, mode="bilinear", align_corners=False)
        return logits[0, 0] > 0


def sam_logits(
    sam: Sam,
    features: torch.Tensor,
    points: torch.Tensor | None,
    labels: torch.Tensor | None,
    boxes: torch.Tensor,
):
    """Run SAM's decoder on one encoded picture [1, C, h, w]. Gradients flow through it.

    points [n, count, 2] or None, labels [n, count] and boxes [n, 4] are in pixels of the encoded
    picture. Returns logits [n, 3, h, w] and the predicted IoU [n, 3].
    """
    labelled = None
    if points is not None:
        labelled = (points, labels)
    sparse, dense = sam.prompt_encoder(points=labelled, boxes=boxes, masks=None)
    return sam.mask_decoder(
        image_embeddings=features,
        image_pe=sam.prompt_encoder.get_dense_pe(),
        sparse_prompt_embeddings=sparse,
        dense_prompt_embeddings=dense,
        multimask_output=True,
    )


# -------------------- load

SAM2_KINDS = ("sam2", "sam2_video", "sam3_tracker", "sam3_video")
TINY_SAM = Path(__file__).parent / "tiny" / "sam"

# segment_anything's files: name, bytes and SHA-256. A download is checked with these values.
SAM_URL = "https://dl.fbaipublicfiles.com/segment_anything/"
SAM_FILES = {
    "vit_b": (
        "sam_vit_b_01ec64.pth",
        375042383,
        "ec2df62732614e57411cdcf32a23ffdf28910380d03139ee0f4fcbe91eb8c912",
    ),
    "vit_l": (
        "sam_vit_l_0b3195.pth",
        1249524607,
        "3adcc4315b642a4d2101128f611684e8734c41232a17c648ed1693702a49a622",
    ),
    "vit_h": (
        "sam_vit_h_4b8939.pth",
        2564550879,
        "a7bf3b02f3ebf1267aba913ff637d9a2d5c33d3173bb679e46d9f338c26f262e",
    ),
}


def sam_bytes(kind: str, checkpoint: str = "") -> int:
    """Return how many bytes of the file for `kind` must be downloaded. 0 if it is there."""
    if checkpoint or kind not in SAM_FILES:
        return 0
    name, size, _ = SAM_FILES[kind]
    path = CACHE / name
    if path.exists() and path.stat().st_size == size:
        return 0
    return size


def small_folder(kind: str) -> Path | None:
    """Return the folder of a small SAM, with its file sam.json. Return None for other kinds."""
    folder = Path(kind)
    if kind == "tiny":
        folder = TINY_SAM
    if (folder / "sam.json").is_file():
        return folder
    return None


def random_sam(kind: str) -> Sam:
    """Return segment_anything's Sam with random weights.

    kind: "vit_b", "vit_l", "vit_h", "tiny", or the folder of a small SAM. The folder's sam.json
    contains the sizes of the small SAM.
    """
    folder = small_folder(kind)
    if folder is None:
        build = sam_model_registry[kind]
        return build()
    size = json.loads((folder / "sam.json").read_text(encoding="utf-8"))
    side, width = size["image_size"], size["decoder_width"]
    cells = side // size["patch_size"]
    image_encoder = ImageEncoderViT(
        img_size=side,
        patch_size=size["patch_size"],
        embed_dim=size["encoder_width"],
        depth=size["encoder_depth"],
        num_heads=size["encoder_heads"],
        out_chans=width,
        use_rel_pos=True,
        norm_layer=partial(torch.nn.LayerNorm, eps=1e-6),
    )
    prompt_encoder = PromptEncoder(
        embed_dim=width,
        image_embedding_size=(cells, cells),
        input_image_size=(side, side),
        mask_in_chans=16,
    )
    transformer = TwoWayTransformer(
        depth=size["decoder_depth"],
        embedding_dim=width,
        mlp_dim=4 * width,
        num_heads=size["decoder_heads"],
    )
    mask_decoder = MaskDecoder(
        transformer_dim=width,
        iou_head_hidden_dim=width,
        transformer=transformer,
    )
    return Sam(image_encoder, prompt_encoder, mask_decoder).eval()


def check_segmenter(kind: str, checkpoint: str | Path | None = None) -> None:
    """Check a segmenter's name before anything large is loaded.

    Raises UserError if `kind` is not a Segment Anything model, or if it cannot take a `checkpoint`.
    """
    if checkpoint and kind not in SAM_FILES:
        known = ", ".join(SAM_FILES)
        raise UserError(f"--sam-checkpoint needs --sam {known}, not {kind}. Leave one of them out")
    if small_folder(kind) or kind in SAM_FILES:
        return
    try:
        found = AutoConfig.from_pretrained(kind).model_type
        if found not in SAM2_KINDS:
            raise ValueError(f"it is a {found} model")
    except Exception as error:  # transformers raises many kinds of errors for a wrong file
        names = f"it must be tiny, {', '.join(SAM_FILES)}, or the folder or hub id of a SAM 2 or 3"
        raise UserError(f"--sam {kind}: {names} ({first_line(error)})") from None


def sam_file(kind: str) -> Path:
    """Return the file of "vit_b", "vit_l" or "vit_h".

    It is downloaded into the cache once, and checked against its hash. Raises UserError if it
    cannot be fetched.
    """
    name, size, digest = SAM_FILES[kind]
    path = CACHE / name
    if not sam_bytes(kind):
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    print(f"downloading {SAM_URL}{name} ({size / 1e9:.1f} GB) to {path}")
    try:  # the file gets its name only after its hash was checked
        torch.hub.download_url_to_file(SAM_URL + name, str(path), hash_prefix=digest)
    except (OSError, RuntimeError) as error:  # RuntimeError: the hash differs
        why = f"{SAM_URL}{name} could not be fetched ({first_line(error)})"
        advice = "Download it yourself, and give the file as --sam-checkpoint"
        raise UserError(f"--sam {kind}: {why}. {advice}") from None
    return path


def read_sam(kind: str, path: str | Path) -> Sam:
    """Return segment_anything's Sam of a kind ("vit_b", "vit_l" or "vit_h") with a file's weights.

    The model is built without weights, and takes the tensors of the file in fp32. The file is
    mapped into memory. So no random weights are drawn, and no second copy is made. A bad file may
    raise any exception.
    """
    with init_empty_weights():  # only for parameters: the file lacks some buffers
        sam = random_sam(kind)
    mapped = zipfile.is_zipfile(path)  # False for a file of torch before 1.6
    weights = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    weights = {name: value.float() for name, value in weights.items()}
    sam.load_state_dict(weights, assign=True)
    return sam


def set_encoder_dtype(encoder: torch.nn.Module, dtype: torch.dtype) -> None:
    """Let a picture encoder compute in `dtype`. Its input and its output stay fp32."""
    if dtype == torch.float32:
        return
    encoder.to(dtype)
    encoder.register_forward_pre_hook(lambda _, args: (args[0].to(dtype), *args[1:]))
    encoder.register_forward_hook(lambda _, args, out: convert_to_fp32(out))


def frozen_segmenter(sam: Sam, device: str, choice: str) -> SamSegmenter:
    """Return a segmenter with a frozen Sam. `choice` is a value of --sam-dtype."""
    set_encoder_dtype(sam.image_encoder, compute_dtype(choice, device))
    return SamSegmenter(SamPredictor(sam.to(device).requires_grad_(False)))


def load_segmenter(
    kind: str, checkpoint: str | Path | None = None, device: str = "cpu", dtype: str = "auto"
) -> Segmenter:
    """Load a frozen Segment Anything.

    kind: "vit_b", "vit_l", "vit_h", the hub id or folder of a SAM 2 or 3, "tiny", or the folder of
    a small SAM.
    checkpoint: file of "vit_b", "vit_l" or "vit_h". Without it the file is downloaded.
    dtype: dtype of the encoder: bf16, fp32 or auto. The decoder is always fp32.
    Raises UserError if there are no such weights.
    """
    check_segmenter(kind, checkpoint)
    small = small_folder(kind)
    name = f"--sam {kind}"
    if small is not None:
        file = small / "model.safetensors"
        name = str(file)
    elif kind in SAM_FILES:
        file = checkpoint or sam_file(kind)
        name = f"--sam-checkpoint {file}"
    try:
        if small is not None:
            sam = random_sam(kind)
            sam.load_state_dict(load_file(file))
        elif kind in SAM_FILES:
            sam = read_sam(kind, file)
        else:
            return Sam2Segmenter(kind, device, compute_dtype(dtype, device))
    except (torch.OutOfMemoryError, UserError):
        raise
    except Exception as error:  # a broken file may raise any exception
        if is_memory_error(error):
            raise UserError(f"{name} {loading_error(error)}") from None
        raise UserError(
            f"{name}: not the weights of {kind} ({first_line(error)}): download them again"
        ) from None
    return frozen_segmenter(sam, device, dtype)
