"""The segmenter: a frozen Segment Anything (SAM, SAM 2, SAM 3), which draws the mask that the policy is paid for.

Shapes: n prompts to one picture of H x W pixels, h x w low-resolution logits.
"""

import json
import zipfile
from functools import partial
from hashlib import blake2b
from pathlib import Path

import numpy as np
import torch
from accelerate import init_empty_weights
from safetensors.torch import load_file
from segment_anything import SamPredictor, sam_model_registry
from segment_anything.modeling import (
    ImageEncoderViT,
    MaskDecoder,
    PromptEncoder,
    Sam,
    TwoWayTransformer,
)
from transformers import AutoConfig, AutoImageProcessor, AutoModelForMaskGeneration

from .config import CACHE, UserError, first_line


class Segmenter:
    """A frozen SAM: pictures and prompts in, masks out. The last picture is not encoded again."""

    def __init__(self, predictor):
        self.predictor, self.seen = predictor, b""

    def look_at(self, image: np.ndarray) -> None:
        """Encode a picture, uint8 RGB [H, W, 3], unless it is the last one."""
        key = (
            blake2b(np.ascontiguousarray(image), digest_size=16).digest()
            + str(image.shape).encode()
        )
        if key != self.seen:
            self.seen = b""  # where the encoder fails, nothing was seen
            self.predictor.set_image(image, image_format="RGB")
            self.seen = key

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
        place = lambda xy: predictor.transform.apply_coords_torch(
            xy, predictor.original_size
        )  # in SAM's own pixels
        for count in sorted({len(p) for p in points}):
            rows = [i for i, p in enumerate(points) if len(p) == count]
            box = torch.tensor(
                [boxes[i] for i in rows], dtype=torch.float32, device=predictor.device
            )  # [n, 4]
            box = place(box.view(-1, 2, 2)).flatten(1)
            xy = label = None
            if count:
                labelled = torch.tensor(
                    [points[i] for i in rows], dtype=torch.float32, device=predictor.device
                )
                xy, label = place(labelled[..., :2]), labelled[..., 2]  # [n, count, 2], [n, count]
            logits, scores = self.decode(xy, label, box)  # [n, 3, h, w], [n, 3]
            for row, three, best in zip(rows, logits, scores.argmax(1)):
                logit = three[None, best, None]  # [1, 1, h, w]
                logit = predictor.model.postprocess_masks(
                    logit, predictor.input_size, predictor.original_size
                )
                found[row] = (logit[0, 0] > predictor.model.mask_threshold).cpu().numpy()  # [H, W]
        return found

    def decode(self, points: torch.Tensor | None, labels: torch.Tensor | None, boxes: torch.Tensor):
        """predict_torch, not upscaled: n prompts in SAM's own pixels -> logits [n, 3, h, w], predicted IoU [n, 3]."""
        if isinstance(self.predictor, Sam2Predictor):
            return self.predictor.decode(points, labels, boxes)
        return decode(self.predictor.model, self.predictor.features, points, labels, boxes)


def decode(
    sam,
    embedding: torch.Tensor,
    points: torch.Tensor | None,
    labels: torch.Tensor | None,
    boxes: torch.Tensor,
):
    """Segmenter.decode on one encoded picture [1, C, h, w], with gradients where there are any."""
    sparse, dense = sam.prompt_encoder(
        points=None if points is None else (points, labels), boxes=boxes, masks=None
    )
    return sam.mask_decoder(
        image_embeddings=embedding,
        image_pe=sam.prompt_encoder.get_dense_pe(),
        sparse_prompt_embeddings=sparse,
        dense_prompt_embeddings=dense,
        multimask_output=True,
    )


class Sam2Predictor:
    """transformers' SAM 2, 2.1 or SAM 3 tracker behind what Segmenter uses of SamPredictor and its model."""

    mask_threshold = 0.0

    def __init__(self, name: str, device: str = "cpu"):
        self.sam = (
            AutoModelForMaskGeneration.from_pretrained(name).to(device).eval().requires_grad_(False)
        )
        self.read, self.device = AutoImageProcessor.from_pretrained(name), device
        self.transform = self.model = self  # what SamPredictor has in parts

    @torch.no_grad()
    def set_image(self, image: np.ndarray, image_format: str = "RGB") -> None:
        pixels = self.read(images=image, return_tensors="pt").pixel_values.to(
            self.device
        )  # [1, 3, S, S], squeezed
        self.features = self.sam.get_image_embeddings(pixels)
        self.original_size, self.input_size = image.shape[:2], pixels.shape[-2:]

    def apply_coords_torch(
        self, coords: torch.Tensor, original_size: tuple[int, int]
    ) -> torch.Tensor:
        """Pixels [..., 2] of the picture -> pixels of the square that the encoder saw."""
        (h, w), (height, width) = self.input_size, original_size
        return coords * torch.tensor([w / width, h / height], device=coords.device)

    def decode(self, points: torch.Tensor | None, labels: torch.Tensor | None, boxes: torch.Tensor):
        """See Segmenter.decode."""
        prompts = {"input_boxes": boxes[None]}
        if points is not None:
            prompts |= {"input_points": points[None], "input_labels": labels[None].long()}
        out = self.sam(image_embeddings=self.features, multimask_output=True, **prompts)
        return out.pred_masks[0], out.iou_scores[0]

    def postprocess_masks(
        self, masks: torch.Tensor, input_size: tuple, original_size: tuple
    ) -> torch.Tensor:
        """Logits [n, c, h, w] -> logits [n, c, H, W] of the picture's size."""
        return torch.nn.functional.interpolate(
            masks.float(), original_size, mode="bilinear", align_corners=False
        )


# ---------------------------------------------------------------------------------------------------- load

SAM2_KINDS = ("sam2", "sam2_video", "sam3_tracker", "sam3_video")
TINY_SAM = Path(__file__).parent / "tiny" / "sam"

# segment_anything's files: bytes and SHA-256, checked before they are read.
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
    """Bytes of segment_anything's file for `kind` that are still to be downloaded."""
    if checkpoint or kind not in SAM_FILES:
        return 0
    name, size, _ = SAM_FILES[kind]
    return 0 if (CACHE / name).exists() and (CACHE / name).stat().st_size == size else size


def small_folder(kind: str) -> Path | None:
    """Where a small Segment Anything lies, with its dimensions in sam.json beside its weights; None for others."""
    folder = TINY_SAM if kind == "tiny" else Path(kind)
    return folder if (folder / "sam.json").is_file() else None


def random_sam(kind: str) -> Sam:
    """segment_anything's Sam of this kind, a small one's folder or "vit_b", "vit_l", "vit_h", with random weights."""
    if not (folder := small_folder(kind)):
        return sam_model_registry[kind]()
    size = json.loads((folder / "sam.json").read_text(encoding="utf-8"))
    side, width = size["image_size"], size["decoder_width"]
    return Sam(
        image_encoder=ImageEncoderViT(
            img_size=side,
            patch_size=size["patch_size"],
            embed_dim=size["encoder_width"],
            depth=size["encoder_depth"],
            num_heads=size["encoder_heads"],
            mlp_ratio=4,
            out_chans=width,
            qkv_bias=True,
            use_rel_pos=True,
            norm_layer=partial(torch.nn.LayerNorm, eps=1e-6),
            window_size=0,
            global_attn_indexes=(),
        ),
        prompt_encoder=PromptEncoder(
            embed_dim=width,
            image_embedding_size=(side // size["patch_size"],) * 2,
            input_image_size=(side, side),
            mask_in_chans=16,
        ),
        mask_decoder=MaskDecoder(
            transformer_dim=width,
            num_multimask_outputs=3,
            iou_head_depth=3,
            iou_head_hidden_dim=width,
            transformer=TwoWayTransformer(
                depth=size["decoder_depth"],
                embedding_dim=width,
                mlp_dim=4 * width,
                num_heads=size["decoder_heads"],
            ),
        ),
        pixel_mean=[123.675, 116.28, 103.53],
        pixel_std=[58.395, 57.12, 57.375],
    ).eval()


def check_segmenter(kind: str, checkpoint: str | Path | None = None) -> None:
    """Raises UserError where `kind` is no Segment Anything, or none that is read from the file `checkpoint`. Nothing
    large is loaded."""
    if checkpoint and kind not in SAM_FILES:
        raise UserError(
            f"--sam-checkpoint goes with --sam {', '.join(SAM_FILES)}, not with {kind}: leave one out"
        )
    if small_folder(kind) or kind in SAM_FILES:
        return
    try:
        found = AutoConfig.from_pretrained(kind).model_type
        if found not in SAM2_KINDS:
            raise ValueError(f"it is a {found} model")
    except (OSError, ValueError) as error:
        names = f"none of tiny, {', '.join(SAM_FILES)}, nor the folder or hub id of a SAM 2 or 3"
        raise UserError(f"--sam {kind}: {names} ({first_line(error)})") from None


def sam_file(kind: str) -> Path:
    """The weights of "vit_b", "vit_l" or "vit_h", downloaded once into the cache and checked against their hash."""
    name, size, digest = SAM_FILES[kind]
    path = CACHE / name
    if sam_bytes(kind):  # a file gets its name only after its hash was checked
        path.parent.mkdir(parents=True, exist_ok=True)
        print(f"downloading {SAM_URL}{name} ({size / 1e9:.1f} GB) to {path}")
        try:
            torch.hub.download_url_to_file(SAM_URL + name, str(path), hash_prefix=digest)
        except (OSError, RuntimeError) as error:  # RuntimeError: the hash differs
            why = f"{SAM_URL}{name} could not be fetched ({first_line(error)})"
            raise UserError(
                f"--sam {kind}: {why}; fetch it yourself and name it as --sam-checkpoint"
            ) from None
    return path


def read_sam(kind: str, path: str | Path) -> Sam:
    """Return segment_anything's Sam of `kind`, "vit_b", "vit_l" or "vit_h", in fp32 with the weights of a file.

    The model is built without numbers and takes the tensors that lie in the file, which is mapped into memory: no
    random weights are drawn, and no second copy is made. Whatever is wrong with the file raises an exception.
    """
    with init_empty_weights():  # of the parameters alone: buffers that the file lacks keep their numbers
        sam = random_sam(kind)
    mapped = zipfile.is_zipfile(path)  # files of torch before 1.6 are none, and cannot be mapped
    weights = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    weights = {name: value.float() for name, value in weights.items()}
    sam.load_state_dict(weights, assign=True)
    return sam.eval()


def load_segmenter(
    kind: str, checkpoint: str | Path | None = None, device: str = "cpu"
) -> Segmenter:
    """A frozen Segment Anything: "vit_b", "vit_l", "vit_h" (from the file `checkpoint`, else downloaded), a SAM 2 or 3
    by its hub id or folder, or a small one, such as the package's "tiny". UserError where there are no such weights.
    """
    check_segmenter(kind, checkpoint)
    if not (small := small_folder(kind)) and kind not in SAM_FILES:
        return Segmenter(Sam2Predictor(kind, device))
    path = small / "model.safetensors" if small else checkpoint or sam_file(kind)
    try:
        if small:
            sam = random_sam(kind)
            sam.load_state_dict(load_file(path))
        else:
            sam = read_sam(kind, path)
    except Exception as error:  # a broken file can raise nearly any
        name = path if small else f"--sam-checkpoint {path}"
        raise UserError(f"{name}: not the weights of {kind} ({first_line(error)})") from None
    return Segmenter(SamPredictor(sam.to(device).requires_grad_(False)))
