"""Text to token ids and back. On disk a tokenizer is always a Hugging Face tokenizer.json.

Byte-level BPE of any origin (GPT-2's, one trained here, Qwen's) runs on tiktoken, characters on a
dictionary, anything else on the `tokenizers` package.
"""

import codecs
import copy
import functools
import hashlib
import io
import itertools
import json
import os
import pickle
import pickletools
import re
import shlex
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from fledge import UserError, chat_template, read_meta, replacing
from fledge.formats import hub

END_OF_TEXT = '<|endoftext|>'
IM_START, IM_END = '<|im_start|>', '<|im_end|>'  # around a turn, in ChatML
# What a tokenizer that is made here has behind its other ids, and what ChatML adds to any other.
# One more takes an id from the first, and adds a row to the models of the second.
SPECIAL = (END_OF_TEXT, IM_START, IM_END)
# Ends a document where a chat template ends its turns with the end of text.
END_OF_DOCUMENT = '<|end_of_document|>'
# ChatML, as transformers and llama.cpp take it.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n'"
    " + message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHAT_TEMPLATE_WITH_BEGIN = '{{ bos_token }}' + CHAT_TEMPLATE
# A conversation that shows whether a chat template suits a tokenizer.
TRIAL = [
    dict(role='user', content='Où est\r\n the café?'),
    dict(role='assistant', content='12 doors on.'),
    dict(role='user', content='  And then?\n'),
    dict(role='assistant', content='- left\n- right'),
]
# How text is split before merging. llama.cpp knows both by name, so a model that uses them exports
# to GGUF.
PATTERNS = {
    'qwen2': (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r'|\s*[\r\n]+|\s+(?!\S)|\s+'
    ),
    'gpt2': r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
}
# ByteLevel(use_regex=True), as in GPT-2's own tokenizer.json, splits by a pattern that the file
# does not spell out.
BYTE_LEVEL = dict(type='ByteLevel', add_prefix_space=False, trim_offsets=True, use_regex=False)
GPT2_BYTE_LEVEL = BYTE_LEVEL | dict(use_regex=True)
AFFIXES = ('continuing_subword_prefix', 'end_of_word_suffix')  # of BPE that is not byte-level
GPT2_URL = 'https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/vocab.bpe'
GPT2_SHA256 = '1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5'
# What a folder may hold, and the first of them counts. merges.txt alone, as of old, is not read; it
# is looked at only to say so.
TOKENIZER_FILES = ['tokenizer.json', 'meta.pkl', 'merges.txt']
BUILT_IN = ('gpt2', 'bytes')
GPT2_SIZE, GPT2_PADDED_SIZE = 50257, 50304  # hardware likes a multiple of 64


@functools.cache
def byte_to_unicode() -> dict[int, str]:
    """GPT-2's printable stand-in for each byte, as tokenizer.json spells byte-level tokens.

    Source: openai/gpt-2, encoder.py.
    """
    ranges = ('!', '~'), ('¡', '¬'), ('®', 'ÿ')
    printable = [b for first, last in ranges for b in range(ord(first), ord(last) + 1)]
    others = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}


class Tokenizer:
    """One interface over three backends, of which one is at work and the others are None.

    `bpe` is tiktoken's Encoding, `chars` {character: id}, `hf` the Tokenizer of `tokenizers`.
    spec: the parsed tokenizer.json; template: the ChatTemplate that came with it, None where there
    is none or it is ChatML's own. `vocab_size` counts every id, special tokens included;
    `special` maps the text of each special token to its id; `end_of_text` is the id that ends a
    document, or None; `begin` are the ids that stand in front of each document (Llama's
    <|begin_of_text|>), mostly none; `token_bytes` are the bytes behind each id; `separator` is the
    text between a source and its target, where a model or data has these.
    """

    separator = ''

    def __init__(self, spec: dict, template: chat_template.ChatTemplate | None = None):
        is_chatml = template and template.text in (CHAT_TEMPLATE, CHAT_TEMPLATE_WITH_BEGIN)
        self.template = None if is_chatml else template
        # these two would cut a document, or fill it up
        self.spec = spec = spec | dict(truncation=None, padding=None)
        model, added = spec['model'], spec.get('added_tokens') or []
        self.special = {t['content']: t['id'] for t in added if t.get('special')}
        names = (END_OF_DOCUMENT, END_OF_TEXT, '<|end_of_text|>', '</s>')
        self.end_of_text = next((self.special[t] for t in names if t in self.special), None)
        self.begin = _begin(spec)
        vocab = model.get('vocab')
        ids = set(vocab.values() if isinstance(vocab, dict) else range(len(vocab)))
        ids |= {t['id'] for t in added}
        if not ids:
            raise ValueError('it has no tokens')
        for i in ids:
            if type(i) is not int or not 0 <= i < 2**24:
                raise ValueError(f'{i!r} is no id of a token')
        self.vocab_size = max(ids) + 1
        self.has_gaps = len(ids) < self.vocab_size
        self.bpe = self.chars = self.hf = None
        pattern = _byte_level_pattern(spec)
        if pattern is not None:
            import tiktoken

            plain = _bytes_of({t: i for t, i in vocab.items() if t not in self.special})
            # What comes before the look-ahead runs a third faster as one group: its engine can
            # then take all of it at once.
            head, last, rest = pattern.partition(r'|\s+(?!\S)|\s+')
            self.bpe = tiktoken.Encoding(
                'fledge',
                pat_str=f'(?:{head}){last}' if last and not rest else pattern,
                mergeable_ranks={token: i for i, token in plain.items()},
                special_tokens=self.special,
            )
            self.token_bytes = plain | {i: s.encode() for s, i in self.special.items()}
        elif model['type'] == 'WordLevel' and all(len(t) == 1 or t in self.special for t in vocab):
            self.chars = {t: i for t, i in vocab.items() if t not in self.special}
            self.token_bytes = {i: t.encode() for t, i in (self.chars | self.special).items()}
        else:
            import tokenizers

            prefix = model.get('continuing_subword_prefix') or ''
            for first, second in merges_of(model):
                if not second.startswith(prefix):  # which would end the process
                    raise ValueError(f'the merge {first} {second} does not fit {prefix!r}')
            self.hf = tokenizers.Tokenizer.from_str(json.dumps(spec))
            self.token_bytes = self._bytes_by_tokenizers(added)

    @functools.cached_property
    def space_in_front(self) -> int:
        """How many bytes a tokenizer itself puts in front of a text (SentencePiece a space, 1)."""
        if not self.hf:
            return 0
        try:
            ids = self.encode('a')
        except UserError:  # a vocabulary without this letter, and without a token for the unknown
            return 0
        alone = b''.join(self.token_bytes.get(i, b'') for i in ids)
        return len(alone) - 1 if alone.endswith(b' a') else 0

    @functools.cached_property
    def before_texts(self) -> set[int]:
        """The ids of the special tokens behind which a text begins, and so has that space."""
        model = self.spec['model']
        unknown = (model.get('unk_id'), self.special.get(model.get('unk_token')))  # within a text
        within = {i for token, i in self.special.items() if self.puts_space_behind(token)}
        return {self.end_of_text, *self.begin} | within.difference(unknown)

    def puts_space_behind(self, token: str) -> bool:
        """Whether that space is also put in front of a text that stands behind a special token."""
        if not self.space_in_front or token not in self.special:
            return False
        behind = self.encode(f'{token}a', allow_special=True)
        return behind == [self.special[token], *self.encode('a')]

    @functools.cached_property
    def special_pattern(self) -> re.Pattern:
        """Finds special tokens in a text, the longest where several begin; split() keeps them."""
        longest_first = sorted(self.special, key=len, reverse=True)
        any_of_them = '|'.join(map(re.escape, longest_first))
        return re.compile(f'({any_of_them})' if any_of_them else '(?!)')

    def _bytes_by_tokenizers(self, added):
        """token_bytes of a vocabulary that runs on `tokenizers`."""
        decoder = self.spec.get('decoder') or {}
        if 'ByteLevel' in (d.get('type') for d in (decoder, *decoder.get('decoders', []))):
            plain = _bytes_of(self.hf.get_vocab(with_added_tokens=False))
            return plain | {t['id']: t['content'].encode() for t in added}
        found = {}
        for i in range(self.vocab_size):
            # what a token adds after another: alone, SentencePiece's lose their space in front
            once = self.hf.decode([i], skip_special_tokens=False)
            twice = self.hf.decode([i, i], skip_special_tokens=False)
            found[i] = twice[len(once) :].encode()
        for byte in range(256):  # SentencePiece's bytes
            i = self.hf.token_to_id(f'<0x{byte:02X}>')
            if i is not None:
                found[i] = bytes([byte])
        return found

    def encode(self, text: str, allow_special: bool = False) -> list[int]:
        """The ids of text, a list. Special tokens spelled out are text unless allow_special."""
        if self.hf:
            return self._encode_by_tokenizers(text, allow_special).ids
        if allow_special:
            ids = []
            for piece in self.special_pattern.split(text):
                ids += [self.special[piece]] if piece in self.special else self.encode(piece)
            return ids
        if self.bpe:
            return self.encode_array(text).tolist()
        try:
            return [self.chars[c] for c in text]
        except KeyError as e:
            raise UserError(
                f'the character {e.args[0]!r} is not in this vocabulary of '
                f'{len(self.chars)} characters'
            ) from None

    def _encode_by_tokenizers(self, text, allow_special):
        """The Encoding of text that `tokenizers` gives."""
        self.hf.encode_special_tokens = not allow_special  # as text, that is
        try:
            return self.hf.encode(text, add_special_tokens=False)
        except Exception as e:  # a character that has no token, where none stands for the unknown
            raise UserError(f'this tokenizer cannot read {text[:20]!r}: {str(e)[:200]}') from None

    def encode_array(self, text: str) -> np.ndarray:
        """encode(text) as an array of uint32, which spares a corpus its lists."""
        if not self.bpe:
            return np.array(self.encode(text), np.uint32)
        try:
            return self.bpe.encode_to_numpy(text, disallowed_special=())
        except ValueError:
            # on half a million spaces in a row, for example, where the other backend goes on
            import tokenizers

            slow = tokenizers.Tokenizer.from_str(json.dumps(self.spec))
            slow.encode_special_tokens = True
            return np.array(slow.encode(text, add_special_tokens=False).ids, np.uint32)

    def encode_prompt(self, text: str) -> list[int]:
        """The ids of a text that a model is to go on with; special tokens spelled out are such.

        It begins as a document does. <|endoftext|> in front of it is any tokenizer's end of text,
        behind which a new document begins; so is a text without tokens.
        """
        start = []
        if text.startswith(END_OF_TEXT) and self.end_of_text is not None:
            text, start = text.removeprefix(END_OF_TEXT), [self.end_of_text]
        ids = self._after_begin(self.encode(text, allow_special=True))
        return start + ids or [self.end_of_text or 0]

    def encode_source(self, text: str) -> list[int]:
        """The ids of a source with the separator behind it, as prepared data has them.

        Spaces around it are left out, and special tokens spelled out are text.
        """
        if self.separator:
            text = text.strip().removesuffix(self.separator).rstrip() + self.separator
        return self._after_begin(self.encode(text))

    def _after_begin(self, ids):
        """ids with the begin in front; a text or a template may have it spelled out already."""
        return ids if ids[: len(self.begin)] == self.begin else self.begin + ids

    def encode_chat(self, messages: list[dict]) -> tuple[np.ndarray, np.ndarray]:
        """ids of a conversation and, for each, whether it is learned: uint32 and uint8.

        messages: [{'role': 'system', 'user' or 'assistant', 'content': text}, ...]. The form is
        that of the chat template, or ChatML. What the assistant says is learned, with the token
        that ends it, unless a message has learned=False. Special tokens spelled out are text.
        Raises UserError for messages that the template does not take, and where there is no form.
        """
        form = self.chat_form
        if self.template:
            laid_out = chat_template.lay_out(form, messages, self.special_pattern)
        else:
            laid_out = lay_out_chatml(messages, form.tokens.get('bos_token', ''))
        ids, learned = self._encode_pieces(*laid_out)
        whole = self._after_begin(ids)
        learned = [0] * (len(whole) - len(ids)) + learned
        return np.array(whole, np.uint32), np.array(learned, np.uint8)

    def encode_chat_prompt(self, messages: list[dict]) -> list[int]:
        """The ids that a model goes on with to answer messages (see encode_chat).

        Special tokens spelled out in what they say are text. UserError where the model has no form
        for conversations, or the template does not take these.
        """
        form = self.chat_form
        try:
            pieces = chat_template.split_at_messages(form, messages, to_answer=True)
        except UserError:  # it changes a message, as Qwen3's leaves out what was thought
            text = chat_template.render(form, messages, add_generation_prompt=True)
            return self.encode_prompt(text)
        ids, _ = self._encode_pieces(pieces, [])
        return self._after_begin(ids)

    @property
    def has_chat_form(self) -> bool:
        """Whether conversations have a form: a chat template, or ChatML's tokens."""
        return bool(self.template) or {IM_START, IM_END} <= self.special.keys()

    @functools.cached_property
    def chat_form(self) -> chat_template.ChatTemplate:
        """The template that conversations are laid out by; UserError where they have no form."""
        if self.template:
            return self.template
        if not self.has_chat_form:
            raise UserError(
                'this model has no form for conversations: it was never tuned for them; '
                'a text that it can go on with is --start'
            )
        if not self.begin:
            return chat_template.ChatTemplate(CHAT_TEMPLATE, {})
        begin = dict(bos_token=self.decode(self.begin))
        return chat_template.ChatTemplate(CHAT_TEMPLATE_WITH_BEGIN, begin)

    def check_chat_form(self) -> None:
        """UserError where others, who encode a conversation as one text, get other ids."""
        whole = self.encode(chat_template.render(self.chat_form, TRIAL), allow_special=True)
        if self._after_begin(whole) != self.encode_chat(TRIAL)[0].tolist():
            raise UserError(
                'this tokenizer reads a whole conversation as other tokens than message by '
                'message: others would prompt the model with what it never saw'
            )

    def _encode_pieces(self, pieces, spans):
        """encode_chat's two lists of what lay_out gives: no message has special tokens."""
        parts = ['']  # plain text, a special token, plain text, a special token, ..., plain text
        for piece, message in pieces:
            text, *others = self.special_pattern.split(piece) if message is None else [piece]
            parts[-1] += text  # tokens may hold the end of one piece and the beginning of the next
            parts += others
        ids, learned, end = [], [], 0
        for i, part in enumerate(parts):
            start, end = end, end + len(part)  # in the whole text
            # a span ends with a special token: from somewhere on all of a part is learned, or none
            n_unlearned = len(part)
            for first, behind in spans:
                if first < end and start < behind:
                    n_unlearned = max(first - start, 0)
            if i % 2:
                ids.append(self.special[part])
                learned.append(n_unlearned == 0)
            elif part:
                # in front of a whole text, and behind some special tokens, a space is put
                spaced = i == 0 or self.puts_space_behind(parts[i - 1])
                found, ends = self.encode_inside(part, spaced)
                if not self.hf:  # whose ends count bytes
                    n_unlearned = len(part[:n_unlearned].encode())
                ids += found
                learned += [token_end > n_unlearned for token_end in ends]
        return ids, learned

    @functools.cached_property
    def turn_end(self) -> int | None:
        """The id that ends an answer: as the chat template has it, else ChatML's, or None."""
        chatmls = self.special.get(IM_END)
        if not self.template:
            return chatmls
        try:
            ids, learned = self.encode_chat(TRIAL)
        except UserError:
            return chatmls
        answers = ids[learned == 1].tolist()
        return answers[-1] if answers else chatmls

    def for_chats(self) -> 'tuple[Tokenizer, str]':
        """This tokenizer with what conversations need, and why they are in ChatML all the same.

        The second is '' where they are in the chat template's form, or there is no template.
        """
        if not self.template:
            return self.with_special(), ''
        try:
            for name, token in self.template.tokens.items():
                if name in self.template.text and token not in self.special:
                    raise UserError(f'the chat template has {token!r}, which is no special token')
            self.check_chat_form()
        except UserError as e:
            return Tokenizer(self.spec).with_special(), f'conversations are in ChatML, since {e}'
        # a document ends with a token that is nowhere else in it, but perhaps in its begin
        ids, _ = self.encode_chat(TRIAL)
        ends_turns = self.end_of_text in ids[len(self.begin) :]
        return self.with_special([END_OF_DOCUMENT if ends_turns else END_OF_TEXT]), ''

    def encode_inside(self, text: str, space_in_front: bool = False) -> tuple[list[int], list[int]]:
        """The ids of text within a longer one, and where in text each of them ends.

        Nothing is put in front of it, as SentencePiece puts a space, unless space_in_front. The
        ends count bytes, or with `tokenizers` characters.
        """
        before = ''  # what no token joins with the text
        if self.space_in_front and not space_in_front:
            before = 'a' if text.startswith('\n') else '\n'
        skipped = len(self.encode(before))
        if self.hf:
            found = self._encode_by_tokenizers(before + text, allow_special=False)
            ids, ends = found.ids, [end for _, end in found.offsets]
        else:
            ids = self.encode(before + text)
            ends = itertools.accumulate(map(len, map(self.token_bytes.__getitem__, ids)))
        return ids[skipped:], [end - len(before) for end in ends][skipped:]

    def with_special(self, tokens: Iterable[str] = SPECIAL) -> 'Tokenizer':
        """This tokenizer, with those special tokens that it lacks added after its last id."""
        missing = [t for t in tokens if t not in self.special]
        if self.end_of_text is not None:  # by whatever name
            missing = [t for t in missing if t != END_OF_TEXT]
        if not missing:
            return self
        if self.has_gaps:
            raise UserError(
                f'this tokenizer lacks {", ".join(missing)}, which cannot be added: '
                'its ids have gaps, and `tokenizers` would give others'
            )
        added = self.spec.get('added_tokens') or []
        return self.changed(added_tokens=added + _added(missing, self.vocab_size))

    def changed(self, **entries) -> 'Tokenizer':
        """This tokenizer, with other entries of its tokenizer.json."""
        changed = Tokenizer(self.spec | entries, self.template)
        changed.separator = self.separator
        return changed

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; bytes that are no UTF-8 and ids that are no token's become U+FFFD."""
        stream = TextStream(self)
        return ''.join(map(stream.add, map(int, ids))) + stream.end()

    def text_bytes(self, vocab_size: int) -> np.ndarray:
        """How many bytes of text each id stands for, int64 (vocab_size,); special ones for none."""
        sizes, special = np.zeros(vocab_size, np.int64), set(self.special.values())
        for i, token in self.token_bytes.items():
            if i < vocab_size and i not in special:
                sizes[i] = len(token)
        return sizes

    def agrees_with(self, other: 'Tokenizer') -> bool:
        """Whether each id that both have is the same text, and data in one serves the other."""
        theirs = other.token_bytes
        return all(theirs.get(i, token) == token for i, token in self.token_bytes.items())

    def without_begin(self) -> 'Tokenizer':
        """This tokenizer, with nothing in front of a document."""
        return self.changed(post_processor=None) if self.begin else self

    def as_trained(self, checkpoint: dict) -> 'Tokenizer':
        """This tokenizer as the model of a checkpoint knows it: before, documents had no begin."""
        begin = checkpoint.get('begin', 'iter_num' not in checkpoint)
        tokenizer = self if begin else self.without_begin()
        tokenizer.separator = checkpoint.get('separator', '')
        return tokenizer

    def digest(self) -> str:
        """A text that two tokenizers share if they are the same in all that they do."""
        content = json.dumps(self.spec, sort_keys=True).encode()
        return hashlib.blake2b(content, digest_size=16).hexdigest()

    def save(self, path: str) -> None:
        """Write tokenizer.json at path, whole or not at all, and the chat template beside it."""
        with replacing(path) as f:
            json.dump(self.spec, f, ensure_ascii=False)
        chat_template.write(os.path.dirname(path), self.template)


def lay_out_chatml(
    messages: list[dict], begin: str = ''
) -> tuple[list[tuple], list[tuple[int, int]]]:
    """What chat_template.lay_out gives of CHAT_TEMPLATE behind a begin, without Jinja.

    With it to prepare conversations would take a fifth longer.
    """
    pieces, learned, at = [(begin, None)], [], len(begin)
    for i, message in enumerate(messages):
        head = f'{IM_START}{message["role"]}\n'
        pieces += [(head, None), (message['content'], i), (f'{IM_END}\n', None)]
        start = at + len(head)
        end = start + len(message['content']) + len(IM_END)
        if message['role'] == 'assistant' and message.get('learned', True):
            learned.append((start, end))
        at = end + 1
    return pieces, learned


class TextStream:
    """The text of tokens as they come, in whole characters.

    prompt: the ids that come before. Without any, or behind a special token, SentencePiece's kind
    of token loses the space in front of it.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = ()):
        self.tokenizer = tokenizer
        self.at_start = not len(prompt) or prompt[-1] in tokenizer.special.values()
        self.decoder = codecs.getincrementaldecoder('utf-8')('replace')

    def add(self, token: int) -> str:
        """The text that is sure to follow once this token id has come; it may be ''."""
        piece = self.tokenizer.token_bytes.get(token, b'\xff')
        # part of a character, which would be lost if it were decoded alone
        is_part = len(piece) == 1 and not piece.isascii()
        if self.at_start and self.tokenizer.hf and not is_part:
            piece = self.tokenizer.hf.decode([token], skip_special_tokens=False).encode()
        self.at_start = False
        return self.decoder.decode(piece)

    def end(self) -> str:
        """The rest of the text: U+FFFD where it breaks off within a character."""
        return self.decoder.decode(b'', final=True)


def _begin(spec):
    """The ids of the special tokens that a tokenizer.json's template puts in front of a text."""
    post = spec.get('post_processor') or {}
    steps = [post, *post.get('processors', [])]
    template = next((s for s in steps if s.get('type') == 'TemplateProcessing'), {})
    ids = []
    for piece in itertools.takewhile(lambda p: 'SpecialToken' in p, template.get('single', [])):
        ids += template['special_tokens'][piece['SpecialToken']['id']]['ids']
    return ids


def _bytes_of(vocab):
    """{id: bytes} of a byte-level vocabulary; a token that is no stand-in for bytes is its text."""
    byte_of = {letter: byte for byte, letter in byte_to_unicode().items()}
    found = {}
    for token, i in vocab.items():
        try:
            found[i] = bytes(map(byte_of.__getitem__, token))
        except KeyError:
            found[i] = token.encode()
    return found


def merges_of(model: dict) -> list:
    """The merges of a tokenizer.json's model, each a pair; older files have a pair as one text."""
    return [m.split(' ') if isinstance(m, str) else m for m in model.get('merges', [])]


def _byte_level_pattern(spec):
    """The split pattern where tiktoken gives the ids of this tokenizer.json, else None."""
    model, pre = spec['model'], spec.get('pre_tokenizer') or {}
    added = spec.get('added_tokens') or []
    steps = pre['pretokenizers'] if pre.get('type') == 'Sequence' else [pre]
    if model.get('type', 'BPE') != 'BPE' or not steps:
        return None
    if any(model.get(option) for option in ('dropout', 'byte_fallback', *AFFIXES)):
        return None
    if spec.get('normalizer') or not all(t.get('special') for t in added):
        return None
    if any(t.get(option) for t in added for option in ('lstrip', 'rstrip', 'single_word')):
        return None
    byte_level = steps[-1]
    if byte_level.get('type') != 'ByteLevel' or byte_level.get('add_prefix_space'):
        return None
    # tiktoken merges in the order of the ids, needs every byte with its own id, and would find a
    # token that no merge makes
    vocab, letters = model['vocab'], set(byte_to_unicode().values())
    special = {t['content'] for t in added}
    made = [''.join(merge) for merge in merges_of(model)]
    ids = [vocab.get(token, -1) for token in made]
    if -1 in ids or ids != sorted(ids) or not letters <= vocab.keys() - special:
        return None
    if len(set(vocab.values())) < len(vocab):
        return None
    if not vocab.keys() <= letters | special | set(made):
        return None
    by_gpt2s_pattern = byte_level.get('use_regex', True)
    if len(steps) == 1 and by_gpt2s_pattern:
        return PATTERNS['gpt2']
    if len(steps) != 2 or by_gpt2s_pattern:
        return None
    split = steps[0]
    if split.get('type') != 'Split' or split.get('behavior') != 'Isolated' or split.get('invert'):
        return None
    return split['pattern'].get('Regex')


def _added(special, first):
    """The added_tokens of special tokens, whose ids begin with `first`."""
    plain = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
    return [dict(id=first + i, content=token, **plain) for i, token in enumerate(special)]


def _spec(model, special, pre_tokenizer, decoder):
    """A tokenizer.json: model, then special tokens with the ids that follow its own."""
    return dict(
        version='1.0',
        added_tokens=_added(special, len(model['vocab'])),
        normalizer=None,
        pre_tokenizer=pre_tokenizer,
        post_processor=None,
        decoder=decoder,
        model=model,
    )


def _split(pattern):
    return dict(type='Split', pattern=dict(Regex=pattern), behavior='Isolated', invert=False)


def _bpe_spec(vocab, merges, special, pattern):
    """The tokenizer.json of byte-level BPE whose text is split by one of PATTERNS."""
    model = dict(
        type='BPE',
        **dict.fromkeys(('dropout', 'unk_token', *AFFIXES)),
        **dict.fromkeys(('fuse_unk', 'byte_fallback', 'ignore_merges'), False),
        vocab=vocab,
        merges=merges,
    )
    steps = dict(type='Sequence', pretokenizers=[_split(PATTERNS[pattern]), BYTE_LEVEL])
    return _spec(model, special, steps, BYTE_LEVEL)


def train_bpe(texts: Iterable[str], vocab_size: int, split: str = 'qwen2') -> Tokenizer:
    """Byte-level BPE of an iterable of texts; vocab_size counts 256 bytes and SPECIAL."""
    import tokenizers

    letters, least = list(byte_to_unicode().values()), 256 + len(SPECIAL)
    if vocab_size < least:
        raise UserError(f'vocab_size={vocab_size}: a byte-level vocabulary needs at least {least}')
    spec = _bpe_spec({letter: i for i, letter in enumerate(letters)}, [], [], split)
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(spec))

    def bounded():
        # a word of a million characters, as in a data: URL, would take the trainer hours
        for text in texts:
            if re.search(r'\S{1000}|\s{1000}', text):
                yield from (text[i : i + 1000] for i in range(0, len(text), 1000))
            else:
                yield text

    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL), show_progress=False, initial_alphabet=letters
    )
    tokenizer.train_from_iterator(bounded(), trainer)
    model = json.loads(tokenizer.to_str())['model']
    return Tokenizer(_bpe_spec(model['vocab'], model['merges'], SPECIAL, split))


def byte_tokenizer() -> Tokenizer:
    """One token a byte."""
    vocab = {c: b for b, c in sorted(byte_to_unicode().items())}
    return Tokenizer(_bpe_spec(vocab, [], SPECIAL, 'qwen2'))


def char_tokenizer(characters: Iterable[str], special: Sequence[str] = ()) -> Tokenizer:
    """One token a character, ids in the order given. nanoGPT's has no special tokens."""
    vocab = {c: i for i, c in enumerate(characters)}
    model = dict(type='WordLevel', vocab=vocab, unk_token='')
    return Tokenizer(_spec(model, special, _split(r'[\s\S]'), dict(type='Fuse')))


def gpt2_tokenizer() -> Tokenizer:
    """GPT-2's vocabulary, from tiktoken's cache or its address: 256 bytes, then a token a merge."""
    from tiktoken.load import read_file_cached

    try:
        lines = read_file_cached(GPT2_URL, GPT2_SHA256).decode().splitlines()[1:]
    except Exception as e:  # requests' many, a proxy's, a corrupt download
        raise UserError(
            f'the GPT-2 vocabulary is not cached and cannot be fetched ({type(e).__name__}); '
            'to prepare data without it, train one: --tokenizer=train'
        ) from None
    merges = [line.split(' ') for line in lines]
    tokens = [*byte_to_unicode().values(), *map(''.join, merges)]
    spec = _bpe_spec({token: i for i, token in enumerate(tokens)}, merges, [END_OF_TEXT], 'gpt2')
    return Tokenizer(spec | dict(pre_tokenizer=GPT2_BYTE_LEVEL))


class _NoCode(pickle.Unpickler):
    """Plain containers alone: a pickle that names a class or function is refused, and not run."""

    def find_class(self, module, name):
        raise UserError(f'meta.pkl asks to load {module}.{name}; only plain dictionaries are read')


def _read_meta_pkl(path):
    """nanoGPT's vocabulary of characters, out of the meta.pkl that its prepare.py writes."""
    with open(path, 'rb') as f:
        content = f.read()
    # an unpickler takes memory for as many objects as a broken number says
    for opcode, number, _ in pickletools.genops(content):
        if opcode.name in ('PUT', 'LONG_BINPUT') and number > len(content):
            raise ValueError('it is broken')
    meta = _NoCode(io.BytesIO(content)).load()
    return char_tokenizer([meta['itos'][i] for i in range(meta['vocab_size'])])


def load_tokenizer(source: str) -> Tokenizer:
    """A tokenizer by name (gpt2, bytes), from a tokenizer.json, a folder or the Hugging Face hub.

    A folder holds tokenizer.json, a chat template beside it perhaps, or nanoGPT's meta.pkl; on the
    hub it is OWNER/NAME.
    """
    if source in BUILT_IN:
        return gpt2_tokenizer() if source == 'gpt2' else byte_tokenizer()
    if '/' in source and hub.is_name(source):
        source = hub.download(source, TOKENIZER_FILES + chat_template.FILES)
    path, template = source, None
    try:
        if os.path.isdir(source):
            path = file_in(source) or os.path.join(source, 'tokenizer.json')
            template = chat_template.read(source)
        if path.endswith('merges.txt'):
            raise UserError(
                f'{source} has merges.txt and no tokenizer.json: '
                'load and save its tokenizer with transformers'
            )
        if path.endswith('meta.pkl'):
            return _read_meta_pkl(path)
        with open(path, encoding='utf-8') as f:
            return Tokenizer(json.load(f), template)
    except FileNotFoundError:
        raise UserError(
            f'no tokenizer at {source}: it is gpt2, bytes, a tokenizer.json, a folder that holds '
            'one, or OWNER/NAME on the Hugging Face hub'
        ) from None
    except UserError:
        raise
    except Exception as e:  # broken bytes fail in any way
        why = ' '.join(str(e).split())[:300]
        raise UserError(f'{path} is not a readable tokenizer: {why}') from None


def file_in(folder: str) -> str | None:
    """The path of the first of TOKENIZER_FILES that folder holds, or None."""
    paths = [os.path.join(folder, name) for name in TOKENIZER_FILES]
    return next(filter(os.path.exists, paths), None)


def find_tokenizer(*folders, vocab_size: int = 0) -> Tokenizer | None:
    """The tokenizer of the first folder that holds one, or None.

    With the vocab_size of a model, GPT-2's where no folder holds one and vocab_size is GPT-2's:
    nanoGPT's folders say nothing then.
    """
    for folder in folders:
        if file_in(folder):
            # a folder may have the name of a tokenizer that is built in
            return load_tokenizer(os.path.join('.', folder) if folder in BUILT_IN else folder)
    return gpt2_tokenizer() if is_gpt2_size(vocab_size) else None


def is_gpt2_size(vocab_size: int) -> bool:
    """Whether a vocabulary of this size is taken for GPT-2's where nothing says what it is."""
    return vocab_size in (GPT2_SIZE, GPT2_PADDED_SIZE)


def padded_vocab_size(tokenizer: Tokenizer | None) -> int:
    """The vocab_size of a new model: the tokenizer's; of GPT-2's, or None, the padded one."""
    if tokenizer is None or tokenizer.vocab_size == GPT2_SIZE:
        return GPT2_PADDED_SIZE
    return tokenizer.vocab_size


def common_tokenizer(
    data_dir: str, theirs: Tokenizer | None, weights: str, say: Callable[[str], None] = print
) -> Tokenizer | None:
    """The tokenizer of data and of the weights that are trained or measured on it, or None.

    It begins a document as the data does: older data has nothing there, whatever the tokenizer.
    theirs: that of the weights, None where it is not known. weights names them in words. UserError
    where the two differ.
    """
    tokenizer = find_tokenizer(data_dir)
    if tokenizer and theirs and not theirs.agrees_with(tokenizer):
        source = (os.path.dirname(weights) or '.') if os.path.isfile(weights) else weights
        raise UserError(
            f'{data_dir} was prepared with another tokenizer than the one of {weights}: '
            f'prepare it with --tokenizer={shlex.quote(source)}'
        )
    if theirs and not tokenizer and theirs.vocab_size != GPT2_SIZE:
        say(f'{data_dir} has no tokenizer.json: its tokens are taken for those of {weights}')
    common = copy.copy(tokenizer or theirs)
    meta = read_meta(data_dir)
    if common and common.begin and not meta.get('begin'):
        common = common.without_begin()
    if common:
        common.separator = meta.get('separator', '')
    return common
