"""One idea, one attention: an answer sees its prompt and itself, so a prompt is read once for all of its G answers.

                  keys
            prompt  a1  a2
     prompt    ◣               the prompt on itself: causal (is_causal)
    answer 1   ■    ◣          an answer on [prompt, answer]: causal at the lower right (causal_lower_right)
    answer 2   ■        ◣      the rest, which a mask would compute and throw away, is not computed

PyTorch has fused kernels for both. A prompt lends its keys and values to its answers, and query heads share a key head
(enable_gqa). A layout knows what stands where: `PackedRow`, whole answers in one row (scoring), or `Cache`, answers that grow
(sampling). The model passes it on to each layer; without `layout=...` it is an ordinary model.
Shapes: B questions, G answers, P prompt, L answer tokens (t so far); H query heads, R to each of KV key heads; width d.
"""

import torch
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention as sdpa
from torch.utils._python_dispatch import _disable_current_modes
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from .tokens import products

IMPLEMENTATION = {
    "": "sdpa",
    "text_config": "shared_prompt",
    "vision_config": "sdpa",
}  # by part of the model


def shared_prompt(module, query, key, value, attention_mask, scaling=None, layout=None, **kwargs):
    """One layer, as transformers calls it: query [b, H, T, d], key and value [b, KV, T, d] -> [b, T, H, d]."""
    if layout is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
    return layout.attend(module.layer_idx, query, key, value, scaling), None


AttentionInterface.register("shared_prompt", shared_prompt)
AttentionMaskInterface.register(
    "shared_prompt", sdpa_mask
)  # for calls without a layout: others need no mask


class PackedRow:
    """Scoring: B questions in one row without padding, [prompt 1, its answers, prompt 2, its answers, ...]."""

    def __init__(self, prompts: list[int], answers: list[list[int]]):
        """Lengths of the B prompts, and of what is read of the answers to each."""
        self.sizes, self.masks = [], []  # of each part of the row; a prompt has no mask
        for prompt, group in zip(prompts, answers):
            self.sizes += [prompt, *group]
            with _disable_current_modes():  # these masks are two numbers and no tensor: modes that watch tensors trip
                self.masks += [None, *(causal_lower_right(n, prompt + n) for n in group)]

    def attend(self, layer: int, query, key, value, scale: float) -> torch.Tensor:
        """Query [1, H, T, d], key and value [1, KV, T, d] -> [1, T, H, d]."""
        out = []
        parts = (x.split(self.sizes, 2) for x in (query, key, value))
        for q, k, v, mask in zip(*parts, self.masks):  # [1, heads, P or L - 1, d]
            if mask is None:
                lent = k, v
                out.append(sdpa(q, k, v, is_causal=True, scale=scale, enable_gqa=True))
            elif q.shape[2]:  # of an answer of one token nothing is read
                k, v = torch.cat([lent[0], k], 2), torch.cat(
                    [lent[1], v], 2
                )  # [1, KV, P + L - 1, d]
                out.append(sdpa(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True))
        return torch.cat(out, 2).transpose(1, 2)


class Cache:
    """Sampling: keys and values of b questions, a prompt's once and each answer's own, written in place.

    The model first reads the prompts, [b, P], padded on the right, where causal attention never looks; then, each time
    after `grow()`, [b, G] tokens: the next of every answer.
    """

    BLOCK = 64  # tokens that room is made for at a time

    def __init__(self, prompts: list[int], group: int, device):
        """Lengths of the b prompts, and G."""
        self.group, self.tokens, self.shortest = (
            group,
            0,
            min(prompts),
        )  # before column `shortest` nothing is padding
        self.padding = (
            torch.arange(self.shortest, max(prompts)) >= torch.tensor(prompts)[:, None]
        ).to(device)
        self.prompt, self.answers = (
            [],
            [],
        )  # keys and values of each layer: [2, b, KV, P, d] and [2, b, KV, G, room, d]

    def grow(self) -> None:
        """Make room for one more token of each answer."""
        if self.tokens % self.BLOCK == 0:
            for i, x in enumerate(self.answers):
                self.answers[i] = torch.cat(
                    [x, x.new_zeros(*x.shape[:4], self.BLOCK, x.shape[5])], 4
                )
        self.tokens += 1

    def drop(self, ended: torch.Tensor) -> torch.Tensor:
        """Forget questions, ended [b] -> where those that stay stood [n]. Only the last move, into the gaps."""
        place = (~ended).nonzero()[:, 0]  # [n]
        gaps = ended[: len(place)].nonzero()[:, 0]
        place = torch.arange(len(place), device=ended.device).index_copy(
            0, gaps, place[len(place) - len(gaps) :]
        )
        for x in self.prompt + self.answers:
            x[:, gaps] = x[:, place[gaps]]
        self.prompt, self.answers = (
            [x[:, : len(place)] for x in kind] for kind in (self.prompt, self.answers)
        )
        self.padding = self.padding[place]
        return place

    def write(self, layer: int, new: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Next keys and values [2, b, KV, G, d] -> all so far [2, b, KV, G, t, d], and which of t are empty (None)."""
        answers = self.answers[layer][..., : self.tokens, :]
        answers[..., -1, :] = new
        return answers, None

    def attend(self, layer: int, query, key, value, scale: float) -> torch.Tensor:
        """Of prompts [b, heads, P, d] -> [b, P, H, d]; then of next tokens [b, heads, G, d] -> [b, G, H, d]."""
        if layer == len(self.prompt):
            self.prompt.append(torch.stack([key, value]))
            self.answers.append(key.new_empty(2, *key.shape[:2], self.group, 0, key.shape[3]))
            return sdpa(query, key, value, is_causal=True, scale=scale, enable_gqa=True).transpose(
                1, 2
            )
        k, v = self.prompt[layer]  # [b, KV, P, d]
        (answer_k, answer_v), empty = self.write(
            layer, torch.stack([key, value])
        )  # [b, KV, G, t, d]
        size, q = (
            k.shape[2],
            query.unflatten(1, (k.shape[1], -1)).transpose(2, 3).contiguous(),
        )  # P, [b, KV, G, R, d]
        score = q.new_empty(
            *q.shape[:4], size + answer_k.shape[3], dtype=torch.float32
        )  # [b, KV, G, R, P + t]
        torch.mul(
            products(q.flatten(2, 3), k).view(*q.shape[:4], size), scale, out=score[..., :size]
        )
        torch.mul(products(q, answer_k), scale, out=score[..., size:])
        score[..., self.shortest : size].masked_fill_(self.padding[:, None, None, None], -torch.inf)
        if empty is not None:
            score[..., size:].masked_fill_(empty, -torch.inf)
        weight = score.softmax(-1).to(v.dtype)  # over prompt and answer in one
        seen = (weight[..., :size].flatten(2, 3) @ v).view_as(q) + weight[
            ..., size:
        ] @ answer_v  # [b, KV, G, R, d]
        return seen.transpose(1, 2).flatten(2, 3)
