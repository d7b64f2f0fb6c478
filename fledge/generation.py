"""Many replies decoded together: rows of different lengths that share one KV cache.

A reply joins while others go on and leaves when it ends. What a row has read stays in the cache, so
that a prompt which begins like an earlier one, as each turn of a conversation does, costs its new
tokens alone.
"""

import os
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from encoder_decoder import beam_search, join
from fledge import UserError, checkpoint, cpu, quantize
from fledge.device import Machine
from fledge.formats import huggingface
from fledge.threads import Threads
from fledge.tokenizer import TextStream, Tokenizer
from model import GPT, pad, penalize, sample_token


def load(
    machine: Machine, init_from: str, out_dir: str, kind: str = 'none', compile: bool = False
) -> tuple[GPT, str, Tokenizer]:
    """A model that generates, the path of its weights, its tokenizer; fastest on this machine.

    kind: none, or int8 for 8-bit weights. compile: by torch.compile, on a GPU. UserError for what
    cannot be loaded, and for the two together.
    """
    state, path, tokenizer = huggingface.load_with_tokenizer(init_from, out_dir)
    model = checkpoint.load_model(state, path).to(machine.device, machine.dtype).eval()
    if kind == 'int8' and quantize.is_quantized(model):
        print(f'without effect: {path} has 8-bit weights already', file=sys.stderr)
    elif kind == 'int8':
        quantize.apply(model)
    if compile and quantize.is_quantized(model):
        raise UserError('8-bit weights run on kernels of their own: leave out --compile')
    if compile:
        model.compile()
    elif machine.type == 'cpu':
        cpu.speed_up(model, packed=True)
    return model, path, tokenizer


@dataclass
class Sampling:
    """How the tokens of a reply are drawn, and where it ends."""

    max_new_tokens: int = 500
    temperature: float = 0.8  # 0: the likeliest token
    top_k: int = 0  # 0: all
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0  # of the tokens in the prompt and the reply
    presence_penalty: float = 0.0  # off the logits of the tokens in the reply
    frequency_penalty: float = 0.0  # the same, times how often each is there
    stop: tuple = ()  # texts in front of which a reply ends
    ends: tuple = ()  # token ids with which it ends
    seed: int | None = None  # of the draws; None: another each time
    num_beams: int = 1  # above 1 nothing is drawn: see encoder_decoder.beam_search
    length_penalty: float = 1.0  # of beams
    n_logprobs: int | None = None  # keep the log probabilities of each token and of so many more

    def __post_init__(self):
        penalties = self.repetition_penalty, self.presence_penalty, self.frequency_penalty
        self.penalizes = penalties != (1, 0, 0)
        # what sample_token takes: replies that have the same are drawn together
        self.filters = self.temperature, self.top_k or None, self.top_p, self.min_p or None


class Reply:
    """A prompt and what a model says behind it, as far as it has come.

    prompt: token ids. source: those that an encoder reads. ids: those of the reply, its end token
    included. text: all of it that no later token changes, without the end token and the stop text.
    finish_reason: None, 'stop' or 'length'. logprobs: where asked for, (id, log probability, [(id,
    log probability), ...]) of each token and of the likeliest in its place, before any penalty or
    temperature.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: Iterable[int],
        sampling: Sampling,
        source: Iterable[int] = (),
    ):
        self.prompt, self.sampling, self.source = list(prompt), sampling, list(source)
        self.encoded = None  # the Source of its source
        self.ids, self.logprobs = [], []
        self.text, self.finish_reason = '', None
        self.n_read = 0  # tokens of the prompt that were not in the cache
        self.n_taken = 0  # characters
        self.unsure = ''  # text that may be the beginning of a stop text
        self.stream = TextStream(tokenizer, prompt)
        self.generator = torch.Generator()
        if sampling.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(sampling.seed)
        self.seen = self.counts = None  # (vocab_size,) of the tokens so far, if they are penalized

    def take(self) -> str:
        """The text that is new since the last call."""
        new = self.text[self.n_taken :]
        self.n_taken = len(self.text)
        return new

    def draw(self) -> Tensor:
        """A random number from [0, 1), (1, 1)."""
        return torch.rand(1, 1, generator=self.generator)

    def penalized(self, logits: Tensor) -> Tensor:
        """The logits (vocab_size,) of its next token, after its penalties."""
        s = self.sampling
        if self.seen is None:
            self.seen = torch.zeros_like(logits, dtype=torch.bool)
            self.seen[self.prompt] = True
            self.counts = torch.zeros_like(logits)
        if self.ids:
            self.seen[self.ids[-1]] = True
            self.counts[self.ids[-1]] += 1
        logits = penalize(logits, self.seen, s.repetition_penalty)
        return logits - s.presence_penalty * (self.counts > 0) - s.frequency_penalty * self.counts

    def keep_logprobs(self, token: int, logprobs: Tensor) -> None:
        """Keep what a token's place says: logprobs (vocab_size,) of all that may be there."""
        likeliest = logprobs.topk(min(self.sampling.n_logprobs, len(logprobs)))
        pairs = zip(likeliest.indices.tolist(), likeliest.values.tolist(), strict=True)
        self.logprobs.append((token, logprobs[token].item(), list(pairs)))

    def receive(self, token: int) -> None:
        """Go on by a token id."""
        s = self.sampling
        self.ids.append(token)
        if token in s.ends:
            self.finish('stop')
            return
        self.settle(self.stream.add(token))
        if self.finish_reason is None and len(self.ids) >= s.max_new_tokens:
            self.finish('length')

    def settle(self, new: str) -> None:
        """Add new to the text, up to a stop text or to what may become one."""
        self.unsure += new
        stops = self.sampling.stop
        places = [self.unsure.find(stop) for stop in stops if stop in self.unsure]
        if places:
            self.text += self.unsure[: min(places)]
            self.unsure, self.finish_reason = '', 'stop'
            return
        n = max(map(len, stops), default=1) - 1  # the longest beginning of a stop text
        n = min(n, len(self.unsure))
        while n and not any(stop.startswith(self.unsure[-n:]) for stop in stops):
            n -= 1
        sure = len(self.unsure) - n
        self.text += self.unsure[:sure]
        self.unsure = self.unsure[sure:]

    def finish(self, reason: str) -> None:
        """End here: what was not sure is text."""
        self.settle(self.stream.end())
        self.text += self.unsure
        self.unsure = ''
        self.finish_reason = self.finish_reason or reason


def reply_to_source(
    model: GPT, tokenizer: Tokenizer, source: list[int], sampling: Sampling
) -> Reply:
    """The Reply that is the target of a source, token ids, and ends where the context does.

    A decoder alone has the source as its prompt.
    """
    has_encoder = model.config.n_encoder_layer > 0
    prompt = [tokenizer.end_of_text] if has_encoder else source
    room = max(1, model.config.block_size - len(prompt) + 1)  # the last token is not read
    sampling = replace(sampling, max_new_tokens=min(sampling.max_new_tokens, room))
    return Reply(tokenizer, prompt, sampling, source if has_encoder else ())


class Batch:
    """At most `size` replies that go on together, a token each at every step.

    length: tokens of a row of the cache, at most the model's context. A reply that has filled its
    row goes on by reading its last block_size tokens anew for each token, as GPT.generate does.
    A thread at a time may use it. A reply gets the tokens that it gets alone, to rounding.
    """

    def __init__(self, model: GPT, size: int, length: int | None = None):
        self.model, self.size = model, size
        self.length = min(length or model.config.block_size, model.config.block_size)
        self.cache = model.make_cache(size, self.length)
        self.held = [[] for _ in range(size)]  # the token ids that each row of the cache holds
        self.freed = [0] * size  # how many replies had left when the row was last freed
        self.n_left = 0
        self.threads = Threads()
        self.cached = []  # replies; the row of each is its place here
        self.sliding = []  # replies that have no room in a row any more
        self.rows_in_use = None  # the KVCache of the rows of those in `cached`
        self.source_in_use = None  # and their Source, of an encoder-decoder

    @property
    def replies(self) -> list[Reply]:
        return self.cached + self.sliding

    @property
    def room(self) -> int:
        return self.size - len(self.replies)

    @torch.no_grad()
    def add(self, reply: Reply) -> None:
        """Read the prompt of a reply, and draw its first token.

        ValueError for a prompt that is empty, or of another tokenizer.
        """
        if not reply.prompt:
            raise ValueError('a prompt is empty: it needs one token at least')
        vocab_size, largest = self.model.config.vocab_size, max(reply.prompt + reply.source)
        if largest >= vocab_size:
            raise ValueError(
                f'the prompt has token {largest}, and the model has {vocab_size}: '
                'it was trained with another tokenizer'
            )
        device = self.cache.lengths.device
        if reply.source:
            reply.encoded = self.model.encode(torch.tensor([reply.source], device=device))
        if len(reply.prompt) >= self.length:
            self.sliding.append(reply)
            self.choose([reply], self.slide([reply]))
            return
        row = len(self.cached)
        # what a decoder read beside another source is of no use here
        n_held = self.take_row(row, [] if reply.source else reply.prompt)
        reply.n_read = len(reply.prompt) - n_held
        new = torch.tensor([reply.prompt[n_held:]], device=device)
        cache = self.cache.rows(row, row + 1)
        logits = self.model(new, cache=cache, source=reply.encoded)[0][:, -1]
        self.held[row] = list(reply.prompt)
        self.cached.append(reply)
        self.rows_in_use = None
        self.choose([reply], logits)

    @torch.no_grad()
    def step(self) -> None:
        """Draw one more token for each reply; those that end leave."""
        self.threads.adapt()
        for row in reversed(range(len(self.cached))):
            if len(self.held[row]) == self.length:
                self.sliding.append(self.cached[row])
                self.leave_row(row)
        logits = []
        if self.cached:
            if self.rows_in_use is None:
                self.rows_in_use = self.cache.rows(0, len(self.cached))
                if self.cached[0].encoded is not None:
                    self.source_in_use = join([reply.encoded for reply in self.cached])
            for row, reply in enumerate(self.cached):
                self.held[row].append(reply.ids[-1])
            idx = [[reply.ids[-1]] for reply in self.cached]
            idx = torch.tensor(idx, device=self.cache.lengths.device)  # (rows, 1)
            cache, source = self.rows_in_use, self.source_in_use
            logits.append(self.model(idx, cache=cache, source=source)[0][:, -1])
        if self.sliding:
            logits.append(self.slide(self.sliding))
        if logits:
            self.choose(self.replies, torch.cat(logits))

    def slide(self, replies: list[Reply]) -> Tensor:
        """The logits (B, vocab_size) behind the last tokens of each, as many as the context has."""
        window, logits = self.model.config.block_size, []
        for reply in replies:
            last = (reply.prompt + reply.ids)[-window:]
            idx = torch.tensor([last], device=self.cache.lengths.device)
            logits.append(self.model(idx, source=reply.encoded)[0][:, -1])
        return torch.cat(logits)

    def choose(self, replies: list[Reply], logits: Tensor) -> None:
        """Draw the next token of each reply from its row of logits (B, vocab_size)."""
        logits = logits.float()
        logprobs = None
        if any(reply.sampling.n_logprobs is not None for reply in replies):
            logprobs = logits.log_softmax(dim=-1)
        groups = {}
        for row, reply in enumerate(replies):
            if reply.sampling.penalizes:
                logits[row] = reply.penalized(logits[row])
            groups.setdefault(reply.sampling.filters, []).append(row)
        tokens = [0] * len(replies)
        for filters, rows in groups.items():
            draws = torch.cat([replies[row].draw() for row in rows]).to(logits.device)
            chosen = sample_token(logits[rows], draws, *filters).tolist()
            for row, token in zip(rows, chosen, strict=True):
                tokens[row] = token
        for row, reply in enumerate(replies):
            if reply.sampling.n_logprobs is not None:
                reply.keep_logprobs(tokens[row], logprobs[row])
            reply.receive(tokens[row])
            if reply.finish_reason:
                self.remove(reply)

    def remove(self, reply: Reply) -> None:
        """Take a reply out, ended or not."""
        if reply in self.sliding:
            self.sliding.remove(reply)
        elif reply in self.cached:
            self.leave_row(self.cached.index(reply))

    def leave_row(self, row: int) -> None:
        """Free a row: the last one in use takes its place, so that those in use are the first."""
        last = len(self.cached) - 1
        self.swap_rows(row, last)
        self.cached[row] = self.cached[last]
        self.cached.pop()
        self.n_left += 1
        self.freed[last] = self.n_left

    def take_row(self, row: int, prompt: list[int]) -> int:
        """Make the first free row one that holds the beginning of a prompt; how much, in tokens.

        A free row of which the prompt shares half at least is cut to what it shares, and taken: it
        is most likely the same conversation. Else the longest beginning that any row holds is
        copied into the row that has been free for longest, so that other conversations stay.
        """
        # the last token is read in any case: its logits are wanted
        shared = [len(os.path.commonprefix([held, prompt[:-1]])) for held in self.held]
        n = max(shared)
        source = shared.index(n)
        oldest = min(range(row, self.size), key=self.freed.__getitem__)
        if source < row or 2 * n < len(self.held[source]):
            for tensor in (*self.cache.keys, *self.cache.values):
                tensor[oldest, :, :n] = tensor[source, :, :n]
            source = oldest
        self.held[source] = prompt[:n]
        self.swap_rows(row, source)
        self.cache.lengths[row] = n
        return n

    def swap_rows(self, a: int, b: int) -> None:
        """Exchange two rows of the cache, as far as they hold anything."""
        self.rows_in_use = None
        if a == b:
            return
        n = max(len(self.held[a]), len(self.held[b]))
        for tensor in (*self.cache.keys, *self.cache.values):
            tensor[[a, b], :, :n] = tensor[[b, a], :, :n]
        self.cache.lengths[[a, b]] = self.cache.lengths[[b, a]]
        self.held[a], self.held[b] = self.held[b], self.held[a]
        self.freed[a], self.freed[b] = self.freed[b], self.freed[a]


def generate(model: GPT, replies: Iterable[Reply], size: int) -> Iterator[list[Reply]]:
    """Go on with all replies, at most `size` at once, until each has ended.

    A generator that yields at each step those that have ended by it, a list. All are searched by
    beams, or none.
    """
    replies = list(replies)
    if replies and replies[0].sampling.num_beams > 1:
        yield from search(model, replies, size)
        return
    size = min(size, len(replies)) or 1  # a row of the cache is not there for nothing
    longest = max((len(r.prompt) + r.sampling.max_new_tokens for r in replies), default=1)
    batch, waiting, going = Batch(model, size, longest), deque(replies), []
    while True:
        while waiting and batch.room:
            going.append(waiting.popleft())
            batch.add(going[-1])
        yield [reply for reply in going if reply.finish_reason]
        going = batch.replies
        if not (waiting or going):
            return
        batch.step()


def search(model: GPT, replies: list[Reply], size: int) -> Iterator[list[Reply]]:
    """What generate() does, by beams: `size` of them at once."""
    device, alike = model.transformer.wte.weight.device, {}
    for reply in replies:  # those that have the same room
        alike.setdefault((len(reply.prompt), reply.sampling.max_new_tokens), []).append(reply)
    for group in alike.values():
        sampling = group[0].sampling
        options = dict(num_beams=sampling.num_beams, length_penalty=sampling.length_penalty)
        options |= dict(max_new_tokens=sampling.max_new_tokens, stop=sampling.ends)
        together = max(1, size // sampling.num_beams)
        for first in range(0, len(group), together):
            part = group[first : first + together]
            source = None
            if part[0].source:
                source = model.encode(pad([reply.source for reply in part], device, filler=-1))
            found = beam_search(model, [reply.prompt for reply in part], source=source, **options)
            for reply, ids in zip(part, found, strict=True):
                for token in ids[len(reply.prompt) :]:
                    if not reply.finish_reason:
                        reply.receive(token)
                if not reply.finish_reason:
                    reply.finish('length')
            yield part
