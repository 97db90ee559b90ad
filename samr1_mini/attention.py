"""One idea: an answer sees its prompt and itself. The prompt is read once for all of its G answers.

                  keys
            prompt  a1  a2
     prompt    ◣               the prompt sees itself: causal attention
    answer 1   ■    ◣          an answer sees the whole prompt and its own earlier tokens
    answer 2   ■        ◣      the empty parts are never computed

There are two layouts. `PackedRow` holds finished answers in one row. It is used
for log-probabilities. `Cache` (decoding.py) holds growing answers. It is used for sampling.
The model passes its layout to each attention layer. Without a layout, attention is the usual one.
PyTorch has fused kernels for the causal parts. Several query heads share a key head (enable_gqa).

Shapes: B questions, G answers to each, P prompt tokens, L answer tokens, t answer tokens so far,
T tokens of a row, H query heads, KV key heads, R query heads for each key head, d head width.
"""

import torch
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention as sdpa
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from .tokens import products

# The attention of each part of the model.
IMPLEMENTATION = {"": "sdpa", "text_config": "shared_prompt", "vision_config": "sdpa"}

BLOCK = 64  # a cache gets memory for this number of tokens at a time


def shared_prompt(module, query, key, value, attention_mask, scaling=None, layout=None, **kwargs):
    """Compute the attention of one layer; transformers calls this function.

    query [b, H, T, d], key and value [b, KV, T, d] -> [b, T, H, d].
    """
    if layout is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
    return layout.attend(module.layer_idx, query, key, value, scaling), None


AttentionInterface.register("shared_prompt", shared_prompt)
# Calls without a layout need the library's mask. A layout ignores it.
AttentionMaskInterface.register("shared_prompt", sdpa_mask)


class PackedRow:
    """Lay B questions in one row without padding: [prompt 1, its answers, prompt 2, ...]."""

    def __init__(self, prompts: list[int], answers: list[list[int]]):
        """Take the lengths of the B prompts, and how many tokens of each answer the model reads."""
        self.sizes = []  # tokens of each part of the row
        self.masks = []  # the mask of each answer, None for a prompt
        for prompt, group in zip(prompts, answers):
            self.sizes.append(prompt)
            self.masks.append(None)
            for length in group:
                self.sizes.append(length)
                self.masks.append(causal_lower_right(length, prompt + length))

    def attend(self, layer: int, query, key, value, scale: float) -> torch.Tensor:
        """Attend in one layer: query [1, H, T, d], key and value [1, KV, T, d] -> [1, T, H, d]."""
        out = []
        queries = query.split(self.sizes, 2)
        keys = key.split(self.sizes, 2)
        values = value.split(self.sizes, 2)
        for q, k, v, mask in zip(queries, keys, values, self.masks):  # [1, heads, part, d]
            if mask is None:
                prompt_k, prompt_v = k, v
                out.append(attend_prompt(q, k, v, scale))
            elif q.shape[2]:  # no query if the answer has one token: the last token is no input
                k = torch.cat([prompt_k, k], 2)  # [1, KV, P + L - 1, d]
                v = torch.cat([prompt_v, v], 2)
                out.append(sdpa(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True))
        return torch.cat(out, 2).transpose(1, 2)


def attend_prompt(query, key, value, scale: float) -> torch.Tensor:
    """Attend from prompts to themselves: [b, H, P, d] and [b, KV, P, d] -> [b, H, P, d]."""
    return sdpa(query, key, value, is_causal=True, scale=scale, enable_gqa=True)


def attend_answers(
    query, prompt: torch.Tensor, answers: torch.Tensor, padding, empty, scale: float
) -> torch.Tensor:
    """Attend from the next token of each answer to its prompt and its tokens so far.

    query [b, H, G, d] -> [b, G, H, d].
    prompt [2, b, KV, P, d]: keys and values of the prompts.
    answers [2, b, KV, G, t, d]: keys and values of the answers, including the next token.
    padding: bool [b, p], True for padding. Only the last p columns of prompts can be padding.
    empty: bool [t], True where a column of the answers is empty; None if all are full.
    """
    prompt_k, prompt_v = prompt  # [b, KV, P, d]
    answer_k, answer_v = answers  # [b, KV, G, t, d]
    size = prompt_k.shape[2]  # P
    start = size - padding.shape[1]  # before this column no prompt has padding
    # The query heads of a key head lie together, so the keys need no copies.
    q = query.unflatten(1, (prompt_k.shape[1], -1)).transpose(2, 3).contiguous()  # [b, KV, G, R, d]
    shape = q.shape[:4]  # b, KV, G, R
    score = q.new_empty(*shape, size + answer_k.shape[3], dtype=torch.float32)  # [.., P + t]
    # Writing in place saves a copy. Here, moving bytes takes most of the time.
    torch.mul(products(q.flatten(2, 3), prompt_k).view(*shape, size), scale, out=score[..., :size])
    torch.mul(products(q, answer_k), scale, out=score[..., size:])
    score[..., start:size].masked_fill_(padding[:, None, None, None], -torch.inf)
    if empty is not None:
        score[..., size:].masked_fill_(empty, -torch.inf)
    weight = score.softmax(-1).to(prompt_v.dtype)  # one softmax over prompt and answer
    seen = (weight[..., :size].flatten(2, 3) @ prompt_v).view_as(q)  # [b, KV, G, R, d]
    seen = seen + weight[..., size:] @ answer_v
    return seen.transpose(1, 2).flatten(2, 3)
