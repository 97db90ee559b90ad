"""One decoded token as a CUDA graph: recorded once, then started whole.

A token of a 3B policy takes about 3,600 operations. Python starts most of them more slowly than the
GPU executes them. A CUDA graph needs constant sizes. Therefore the whole room of the cache `FixedCache`
is read, with empty places masked. When the room grows (every 64 tokens), or when many questions
have ended, one token is read without a graph as a warm-up. The next token is recorded. If recording
fails, all tokens are read without graphs: slower, but with the same numbers.
"""

import torch
from tqdm import tqdm

from .attention import Cache
from .config import first_line

DEVICES = {"cuda"}  # kinds of device that have graphs


class FixedCache(Cache):
    """A cache in which nothing changes its size from token to token."""

    def __init__(self, prompts: list[int], group: int, device):
        super().__init__(prompts, group, device)
        self.last = torch.full(
            (1,), -1, device=device
        )  # the last token's column: a graph finds a new number there

    def grow(self) -> None:
        super().grow()
        self.last += 1

    def write(self, layer: int, new: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As Cache.write.

        Returns the room [2, b, KV, G, room, d], and bool [room], True where the room is empty.
        """
        answers = self.answers[layer].index_copy_(4, self.last, new[..., None, :])
        return answers, torch.arange(answers.shape[4], device=new.device) > self.last


def recorded(read):
    """Record `read`.

    Return its output, and a function that recomputes this output in place from the current inputs.
    """
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph):  # nothing is carried out here
            out = read()
    except Exception:
        torch.cuda.set_stream(
            stream
        )  # a recording that fails leaves its own stream as the current one
        raise
    return out, graph.replay


class TokenReader:
    """Reads the next token of every answer with the language model."""

    def __init__(self, language, cache: Cache):
        self.language, self.cache, self.size, self.replay = language, cache, None, None
        self.failed = False  # a token could not be recorded

    def read(self, embeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return self.language(
            inputs_embeds=embeds, position_ids=positions, layout=self.cache, use_cache=False
        ).last_hidden_state

    def __call__(self, embeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Embeddings [b, G, D], positions [3, b, G] -> hidden states [b, G, D], which the next call
        may overwrite.
        """
        if self.failed or not isinstance(self.cache, FixedCache):
            return self.read(embeds, positions)
        size = self.cache.answers[0].shape  # it tells questions and room
        if size != self.size:
            self.size, self.replay, self.hidden = (
                size,
                None,
                None,
            )  # the old graph's memory is free before a new one
            return self.read(embeds, positions)
        if self.replay is None:
            self.record(embeds, positions)
        if self.failed:  # reading writes a token's column alone, so it may be done twice
            return self.read(embeds, positions)
        for held, given in zip(self.inputs, (embeds, positions)):
            held.copy_(given)
        self.replay()
        return self.hidden

    def record(self, embeds: torch.Tensor, positions: torch.Tensor) -> None:
        """Record a token, or print why it cannot be recorded.

        If memory runs out during recording, it may still be enough for reading without a graph.
        """
        try:
            self.inputs = embeds.clone(), positions.clone()
            self.hidden, self.replay = recorded(lambda: self.read(*self.inputs))
        except Exception as error:
            self.failed, self.inputs = True, None
            tqdm.write(
                f"CUDA graphs are not used, so answers take longer: recording failed ({first_line(error)})"
            )

    def drop(self, ended: torch.Tensor) -> torch.Tensor | None:
        """Call Cache.drop with ended [b] only if many ended, because each new size needs a new
        graph.
        """
        few = len(ended) // 2 if isinstance(self.cache, FixedCache) else 1
        return self.cache.drop(ended) if ended.sum() >= max(1, few) else None
