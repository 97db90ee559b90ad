"""SAM-R1 in miniature: a vision-language model learns to reason and to segment.

The reward is the IoU of Segment Anything's mask.
"""

import logging
import warnings

# bitsandbytes looks for an optional CPU kernel, works without it, and prints this at every start.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
# peft calls transformers by an old name. A user cannot change this.
warnings.filterwarnings(
    "ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning
)
# Pillow warns of odd EXIF data and of pictures above 90 megapixels. Unreadable files raise errors.
warnings.filterwarnings("ignore", module=r"PIL\.")
