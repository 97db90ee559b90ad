"""Sample answers token by token, with a cache of keys and values, and with CUDA graphs.

The model first reads the prompts (prefill). Then it reads one token of every answer at a time
(decoding). A cache holds the keys and values of all earlier tokens. Sampling and training use the
same distribution (tokens.token_logits).

For one token of a 3B policy, Python starts about 3,600 GPU kernels. It starts most kernels more
slowly than a GPU executes them. Therefore the kernels of one token are recorded as a CUDA graph.
The GPU replays this graph for the next tokens. A graph needs constant sizes. So `FixedCache`
always reads its whole memory, and masks the columns (places of tokens) that are still empty. When
the sizes change, one token is read without a graph as a warm-up. The next token is recorded. If
recording fails, all tokens are read without graphs. This is slower and gives the same numbers.

Shapes: B questions, b of them unfinished, G answers to each, P prompt tokens, L answer tokens,
t answer tokens so far, D model width, V vocabulary size, H query heads, KV key heads, d head width.
"""

from dataclasses import dataclass

import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from .attention import BLOCK, attend_answers, attend_prompt
from .config import Settings, first_line
from .memory import free_memory
from .policy import Policy, Prompt, deepstack
from .sizes import questions_per_batch
from .tokens import answer_text, token_logits

CHECK_EVERY = 8  # tokens between two checks for ended answers; each check waits for the GPU


@dataclass
class Completion:
    """One sampled answer."""

    ids: torch.Tensor  # [L] ends with a stop id, unless the answer was cut off
    logps: torch.Tensor  # [L] fp32, log-probabilities of the tokens when they were drawn
    truncated: bool  # the answer was cut off at max_new_tokens
    text: str  # to parse, log and show. Starts with Prompt.opened, which is not in `ids`


# -------------------- the cache


class Cache:
    """Hold keys and values of b questions: one copy for each prompt, one for each answer.

    First the model reads the prompts [b, P], padded on the right. Then it reads the next token of
    every answer, [b, G], again and again. Call `grow()` before each of these tokens.
    """

    def __init__(self, prompts: list[int], group: int, device):
        """Take the lengths of the b prompts, and the number of answers to each."""
        self.group = group
        self.tokens = 0  # tokens of each answer in the cache, 0 while the prompts are read
        self.prompt = []  # of each layer: keys and values [2, b, KV, P, d]
        self.answers = []  # of each layer: keys and values [2, b, KV, G, capacity, d]
        columns = torch.arange(min(prompts), max(prompts))
        # bool [b, longest - shortest prompt]: True for padding. Padding starts only after the
        # length of the shortest prompt, so earlier columns are left out.
        self.padding = (columns >= torch.tensor(prompts)[:, None]).to(device)

    def grow(self) -> None:
        """Add a column for the answers' next tokens. Allocates a block if no column is free."""
        if self.tokens % BLOCK == 0:
            for i, x in enumerate(self.answers):
                block = x.new_zeros(*x.shape[:4], BLOCK, x.shape[5])
                self.answers[i] = torch.cat([x, block], 4)
        self.tokens += 1

    def drop(self, ended: torch.Tensor) -> torch.Tensor:
        """Remove the questions where `ended`, bool [b], is True.

        Returns the old places of the n remaining questions, [n]. Questions from the end move into
        the gaps. The others stay where they are.
        """
        remaining = (~ended).nonzero()[:, 0]  # [n]
        count = len(remaining)
        gaps = ended[:count].nonzero()[:, 0]
        moved = remaining[count - len(gaps) :]
        place = torch.arange(count, device=ended.device).index_copy(0, gaps, moved)
        for x in self.prompt + self.answers:
            x[:, gaps] = x[:, place[gaps]]
        self.prompt = [x[:, :count] for x in self.prompt]
        self.answers = [x[:, :count] for x in self.answers]
        self.padding = self.padding[place]
        return place

    def attend(self, layer: int, query, key, value, scale: float) -> torch.Tensor:
        """Attend in one layer: prefill before the first `grow()`, decoding after it."""
        if self.tokens == 0:
            return self.attend_prefill(query, key, value, scale)
        return self.attend_decoding(layer, query, key, value, scale)

    def attend_prefill(self, query, key, value, scale: float) -> torch.Tensor:
        """Keep one layer's keys and values of the prompts, and attend.

        The layers call this method in their order, so each call adds a layer to the cache.
        query [b, H, P, d], key and value [b, KV, P, d] -> [b, P, H, d].
        Right padding does not matter, because causal attention never looks to the right.
        """
        self.prompt.append(torch.stack([key, value]))
        b, heads, _, d = key.shape
        self.answers.append(key.new_empty(2, b, heads, self.group, 0, d))
        return attend_prompt(query, key, value, scale).transpose(1, 2)

    def attend_decoding(self, layer: int, query, key, value, scale: float) -> torch.Tensor:
        """Keep the keys and values of the answers' next tokens, and attend.

        query [b, H, G, d], key and value [b, KV, G, d] -> [b, G, H, d].
        """
        answers, empty = self.write(layer, torch.stack([key, value]))
        return attend_answers(query, self.prompt[layer], answers, self.padding, empty, scale)

    def write(self, layer: int, new: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Write the next keys and values [2, b, KV, G, d].

        Returns the keys and values of all tokens so far [2, b, KV, G, t, d], and None. The None
        means that no column is empty.
        """
        answers = self.answers[layer][..., : self.tokens, :]
        answers[..., -1, :] = new
        return answers, None


class FixedCache(Cache):
    """Hold keys and values in tensors of constant size, as a CUDA graph needs them."""

    def __init__(self, prompts: list[int], group: int, device):
        super().__init__(prompts, group, device)
        # The column of the last token is a tensor [1]. A replayed graph reads its current value.
        self.last = torch.full((1,), -1, device=device)

    def grow(self) -> None:
        super().grow()
        self.last += 1

    def write(self, layer: int, new: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the next keys and values [2, b, KV, G, d].

        Returns the whole memory [2, b, KV, G, capacity, d], and bool [capacity]: True if empty.
        """
        answers = self.answers[layer].index_copy_(4, self.last, new[..., None, :])
        columns = torch.arange(answers.shape[4], device=new.device)
        return answers, columns > self.last


# -------------------- one token


def has_graphs(device: torch.device) -> bool:
    """Return True if this kind of device can record CUDA graphs."""
    return device.type == "cuda"


def new_cache(policy: Policy, prompts: list[Prompt], group: int) -> Cache:
    """Return an empty cache. It has a constant size if the device can record CUDA graphs."""
    lengths = [len(p.ids) for p in prompts]
    if policy.cuda_graphs and has_graphs(policy.device):
        return FixedCache(lengths, group, policy.device)
    return Cache(lengths, group, policy.device)


def recorded(read):
    """Record the GPU operations of `read()` as a CUDA graph.

    Returns the output of `read()` and a function. The function replays the graph on the current
    contents of the inputs. It writes the new output over the old one.
    """
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph):  # records, and computes nothing
            out = read()
    except Exception:
        torch.cuda.set_stream(stream)  # a failed recording leaves its own stream as the current one
        raise
    return out, graph.replay


class TokenReader:
    """Read the next token of every answer with the language model."""

    def __init__(self, language, cache: Cache):
        self.language = language
        self.cache = cache
        self.size = None  # the cache's sizes at the last token
        self.replay = None  # runs the graph of a token at these sizes
        self.failed = False  # True after a recording has failed

    def read(self, embeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Read without a graph: embeds [b, G, D], positions [3, b, G] -> hidden [b, G, D]."""
        return self.language(
            inputs_embeds=embeds, position_ids=positions, layout=self.cache, use_cache=False
        ).last_hidden_state

    def __call__(self, embeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Read as `read` does, with a graph if possible. The next call may overwrite the result."""
        if self.failed or not isinstance(self.cache, FixedCache):
            return self.read(embeds, positions)
        size = self.cache.answers[0].shape  # changes with the number of questions and the capacity
        if size != self.size:
            self.size = size
            self.replay = None  # frees the old graph's memory before a new one is recorded
            self.hidden = None
            return self.read(embeds, positions)
        if self.replay is None:
            self.record(embeds, positions)
        if self.failed:  # a second reading is safe: it writes the same column again
            return self.read(embeds, positions)
        self.embeds.copy_(embeds)
        self.positions.copy_(positions)
        self.replay()
        return self.hidden

    def record(self, embeds: torch.Tensor, positions: torch.Tensor) -> None:
        """Record a token, or print the reason why it cannot be recorded.

        If memory runs out here, reading without a graph may still fit.
        """
        try:
            self.embeds = embeds.clone()
            self.positions = positions.clone()
            self.hidden, self.replay = recorded(lambda: self.read(self.embeds, self.positions))
        except Exception as error:
            self.failed = True
            self.embeds = None  # frees the memory of the inputs
            self.positions = None
            tqdm.write(
                "CUDA graphs are not used, so answers take longer: recording failed "
                f"({first_line(error)})"
            )

    def drop(self, ended: torch.Tensor) -> torch.Tensor | None:
        """Remove ended questions, bool [b], as Cache.drop does.

        With graphs, ended questions stay until half of the questions ended, because each new size
        needs a new graph. Returns None if no question is removed.
        """
        few = 1
        if isinstance(self.cache, FixedCache):
            few = max(1, len(ended) // 2)
        if ended.sum() < few:
            return None
        return self.cache.drop(ended)


def choose_tokens(logp: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """Choose tokens [...] by log-probabilities [..., V] and uniform numbers [...] from 0 to 1.

    The probabilities of all tokens are laid end to end. Each uniform number lies in the interval of
    one token, and this token is chosen. A banned token has an empty interval. After
    rounding, all probabilities may sum to less than 1. So each uniform number is multiplied by this
    sum.
    """
    cumulative = logp.double().exp().cumsum(-1)
    target = uniforms.double()[..., None] * cumulative[..., -1:]
    return torch.searchsorted(cumulative, target, right=True)[..., 0]


# -------------------- whole answers


def prefill(policy: Policy, prompts: list[Prompt], cache: Cache) -> torch.Tensor:
    """Read B prompts into the cache -> the hidden state of each prompt's last token [B, D]."""
    embeds = pad_sequence([p.embeds for p in prompts], True)  # [B, P, D]
    positions = pad_sequence([p.positions.T for p in prompts], True)  # [B, P, 3]
    picture = pad_sequence([p.picture for p in prompts], True)  # [B, P]
    hidden = policy.base.model.language_model(
        inputs_embeds=embeds,
        position_ids=positions.permute(2, 0, 1),  # [3, B, P]
        layout=cache,
        use_cache=False,
        **deepstack(prompts, picture),
    ).last_hidden_state  # [B, P, D]
    return torch.stack([row[len(p.ids) - 1] for row, p in zip(hidden, prompts)])


@torch.no_grad()
def generate(
    policy: Policy,
    prompts: list[Prompt],
    group: int,
    max_new_tokens: int,
    temperature: float = 1.0,
    uniforms: torch.Tensor | None = None,
) -> list[list[Completion]]:
    """Sample G = `group` answers to each of B prompts -> B lists of G completions.

    Temperature 0 takes the likeliest token (greedy). There is no top-k, no top-p and no repetition
    penalty. The model's generation_config is ignored. So sampling and training use the same
    distribution. GRPO's ratio requires this.
    uniforms [B, G, L] holds a uniform random number for every token. With these numbers, an answer
    does not depend on the rest of the batch, except for rounding. If `uniforms` is None, torch's
    global generator draws the numbers.
    """
    shape = (len(prompts), group, max_new_tokens)
    if temperature == 0:
        uniforms = None
        temperature = 1.0
    else:
        if uniforms is None:
            uniforms = torch.rand(shape)
        uniforms = uniforms.to(policy.device)
    ids, logps = sample_tokens(policy, prompts, shape, temperature, uniforms)
    return completions(policy, prompts, ids, logps)


def sample_tokens(
    policy: Policy,
    prompts: list[Prompt],
    shape: tuple[int, int, int],
    temperature: float,
    uniforms: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sample tokens. Returns their ids and log-probabilities, both [B, G, L]. `shape` is (B, G, L).

    Tokens after an answer's first stop id have no meaning. If `uniforms` is None, sampling is
    greedy: it takes the likeliest token.
    """
    questions, group, length = shape
    device = policy.device
    embed = policy.base.get_input_embeddings()
    cache = new_cache(policy, prompts, group)
    reader = TokenReader(policy.base.model.language_model, cache)
    hidden = prefill(policy, prompts, cache)  # [B, D]
    hidden = hidden[:, None].expand(-1, group, -1)  # [B, G, D]
    position = torch.tensor([p.next_position for p in prompts], device=device)
    position = position[:, None].expand(-1, group)  # [B, G]
    ids = torch.zeros(shape, dtype=torch.long, device=device)
    logps = torch.zeros(shape, device=device)
    unfinished = torch.arange(questions, device=device)  # [b] questions still in the batch
    for t in range(length):
        logp = token_logits(policy, hidden, temperature).log_softmax(-1)  # [b, G, V]
        if uniforms is None:
            token = logp.argmax(-1)  # [b, G]
        else:
            token = choose_tokens(logp, uniforms[unfinished, :, t])  # [b, G]
        ids[unfinished, :, t] = token
        logps[unfinished, :, t] = logp.gather(-1, token[..., None])[..., 0]
        if t + 1 == length:
            break
        if (t + 1) % CHECK_EVERY == 0:
            stops = torch.isin(ids[unfinished, :, : t + 1], policy.stop)  # [b, G, t + 1]
            ended = stops.any(-1).all(-1)  # [b] all G answers have ended
            if ended.all():
                break
            stay = reader.drop(ended)
            if stay is not None:
                unfinished, token = unfinished[stay], token[stay]
        cache.grow()
        hidden = reader(embed(token), (position[unfinished] + t).expand(3, -1, -1))  # [b, G, D]
    if reader.failed:
        policy.cuda_graphs = False  # do not try to record a graph again
    return ids, logps


def completions(
    policy: Policy, prompts: list[Prompt], ids: torch.Tensor, logps: torch.Tensor
) -> list[list[Completion]]:
    """Cut tokens [B, G, L] and their log-probabilities [B, G, L] into B lists of G completions.

    An answer ends with its first stop token. Sampling continues until all answers have ended. The
    tokens after the stop token are left out.
    """
    length = ids.shape[2]
    stopped = torch.isin(ids, policy.stop)  # [B, G, L]
    truncated = ~stopped.any(-1)  # [B, G]
    lengths = torch.where(truncated, length, stopped.int().argmax(-1) + 1)  # [B, G]
    lengths, truncated = lengths.tolist(), truncated.tolist()
    groups = []
    for b, prompt in enumerate(prompts):
        groups.append([])
        for g, (n, cut) in enumerate(zip(lengths[b], truncated[b])):
            answer = ids[b, g, :n]
            written = answer
            if not cut:
                written = answer[:-1]  # without the stop token
            # Other special tokens stay in the text, where they break the format.
            text = policy.processor.tokenizer.decode(written)
            text = answer_text(prompt.opened, text, cut)
            groups[-1].append(Completion(answer, logps[b, g, :n], cut, text))
    return groups


def generate_groups(
    policy: Policy, prompts: list[Prompt], s: Settings, uniforms: torch.Tensor
) -> list[list[Completion]]:
    """Sample G answers to each prompt, with as many prompts in one batch as memory holds."""
    longest = max(len(prompt.ids) for prompt in prompts)
    count = questions_per_batch(policy.base, len(prompts), longest, s, free_memory(s))
    groups = []
    for i in range(0, len(prompts), count):
        batch = prompts[i : i + count]
        numbers = uniforms[i : i + count]
        groups += generate(policy, batch, s.group, s.max_new_tokens, s.temperature, numbers)
    return groups
