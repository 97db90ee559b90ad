"""SAM-R1 in miniature: a vision-language model learns to reason and segment; Segment Anything's IoU is the reward."""

import logging
import warnings

# bitsandbytes looks for an optional CPU kernel, does without it, and says so at every start.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
# peft asks transformers by an old name whether activations are recomputed; nothing a user could mend.
warnings.filterwarnings(
    "ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning
)
# Pillow warns of odd EXIF data and of pictures above 90 megapixels; what cannot be read is an error.
warnings.filterwarnings("ignore", module=r"PIL\.")
