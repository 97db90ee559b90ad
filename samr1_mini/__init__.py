"""SAM-R1 in miniature: a vision-language model learns to reason and segment, with Segment Anything's IoU as the reward."""

import logging

# bitsandbytes looks for an optional CPU kernel, does without it, and says so at every start.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
