"""Text to token ids and back. On disk a tokenizer is always a Hugging Face tokenizer.json.

Byte-level BPE of any origin (GPT-2's, one trained here, Qwen's) runs on tiktoken, characters on a dictionary,
anything else on the `tokenizers` package.
"""

import functools
import itertools
import json
import os
import pickle
import re

import numpy as np

from fledge import UserError, hub, read_json, replacing

END_OF_TEXT, IM_START, IM_END = (
    '<|endoftext|>',
    '<|im_start|>',
    '<|im_end|>',
)  # the last two are ChatML's
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)  # encode_chat's form, as transformers and llama.cpp take it
TOKENIZER_FILES = [
    'tokenizer.json',
    'vocab.json',
    'merges.txt',
    'added_tokens.json',
]  # the latter three where an older GPT-2 has no tokenizer.json
# How text is split before merging. llama.cpp knows both by name, so a model that uses them exports to GGUF.
PATTERNS = {
    'qwen2': r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    'gpt2': r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
}
# ByteLevel(use_regex=True), as in GPT-2's own tokenizer.json, splits by a pattern that the file does not spell out.
_BYTE_LEVEL = {
    'type': 'ByteLevel',
    'add_prefix_space': False,
    'trim_offsets': True,
    'use_regex': False,
}


@functools.cache
def byte_to_unicode():
    """GPT-2's printable stand-in for each byte, as tokenizer.json spells byte-level tokens (openai/gpt-2 encoder.py)."""
    printable = [
        *range(ord('!'), ord('~') + 1),
        *range(ord('¡'), ord('¬') + 1),
        *range(ord('®'), ord('ÿ') + 1),
    ]
    others = [b for b in range(256) if b not in printable]
    return {**{b: chr(b) for b in printable}, **{b: chr(256 + i) for i, b in enumerate(others)}}


class Tokenizer:
    """One interface over the backends.

    spec: the parsed tokenizer.json. `vocab_size` counts every id, special tokens included; `special` maps the
    text of each special token to its id; `end_of_text` is the id that ends a document, or None; `begin` are the ids
    that its model wants in front of a text (Llama's <|begin_of_text|>), mostly none.
    """

    def __init__(self, spec):
        self.spec = spec = spec | dict(
            truncation=None, padding=None
        )  # which would cut a document, or fill it up
        model, added = spec['model'], spec.get('added_tokens') or []
        self.special = {t['content']: t['id'] for t in added if t.get('special')}
        self.end_of_text = next(
            (
                self.special[t]
                for t in (END_OF_TEXT, '<|end_of_text|>', '</s>')
                if t in self.special
            ),
            None,
        )
        post = spec.get('post_processor') or {}
        template = next(
            (
                p
                for p in (post, *post.get('processors', []))
                if p.get('type') == 'TemplateProcessing'
            ),
            {},
        )
        first = itertools.takewhile(
            lambda piece: 'SpecialToken' in piece, template.get('single', [])
        )
        self.begin = [
            i
            for piece in first
            for i in template['special_tokens'][piece['SpecialToken']['id']]['ids']
        ]
        vocab = model.get('vocab')
        ids = list(vocab.values()) if isinstance(vocab, dict) else list(range(len(vocab)))
        ids = set(ids) | {t['id'] for t in added}
        self.n_ids, self.vocab_size = len(ids), max(ids, default=-1) + 1
        self.bpe = self.chars = self.hf = None
        pattern = _byte_level_pattern(spec)
        if pattern is not None:
            import tiktoken

            plain = _bytes_of({t: i for t, i in vocab.items() if t not in self.special})
            # What comes before the look-ahead runs a third faster as one group: its engine can then take all of it at once.
            head, last, rest = pattern.partition(r'|\s+(?!\S)|\s+')
            grouped = f'(?:{head}){last}' if last and not rest else pattern
            self.bpe = tiktoken.Encoding(
                'fledge',
                pat_str=grouped,
                mergeable_ranks={token: i for i, token in plain.items()},
                special_tokens=self.special,
            )
            self.token_bytes = plain | {i: s.encode() for s, i in self.special.items()}
        elif model['type'] == 'WordLevel' and all(len(t) == 1 or t in self.special for t in vocab):
            self.chars = {t: i for t, i in vocab.items() if t not in self.special}
            self.token_bytes = {i: t.encode() for t, i in (self.chars | self.special).items()}
        else:
            import tokenizers

            self.hf = tokenizers.Tokenizer.from_str(json.dumps(spec))
            decoder = spec.get('decoder') or {}
            if 'ByteLevel' in (d.get('type') for d in (decoder, *decoder.get('decoders', []))):
                self.token_bytes = _bytes_of(self.hf.get_vocab(with_added_tokens=False)) | {
                    t['id']: t['content'].encode() for t in added
                }
            else:
                decode = functools.partial(self.hf.decode, skip_special_tokens=False)
                # what a token adds after another: alone, SentencePiece's lose the space that they begin with
                self.token_bytes = {
                    i: decode([i, i])[len(decode([i])) :].encode() for i in range(self.vocab_size)
                }
                single = {
                    self.hf.token_to_id(f'<0x{byte:02X}>'): bytes([byte]) for byte in range(256)
                }  # SentencePiece's bytes
                self.token_bytes |= {i: byte for i, byte in single.items() if i is not None}

    def encode(self, text, allow_special=False):
        """The ids of text, a list of int. Special tokens spelled out in it are plain text unless allow_special."""
        if allow_special and self.special and not self.hf:
            parts = re.split(
                '(' + '|'.join(map(re.escape, sorted(self.special, key=len, reverse=True))) + ')',
                text,
            )
            return [
                i
                for part in parts
                for i in ([self.special[part]] if part in self.special else self.encode(part))
            ]
        if self.bpe:
            return self.encode_array(text).tolist()
        if self.hf:
            self.hf.encode_special_tokens = not allow_special  # as text, that is
            return self.hf.encode(text, add_special_tokens=False).ids
        try:
            return [self.chars[c] for c in text]
        except KeyError as e:
            raise UserError(
                f'the character {e.args[0]!r} is not in this vocabulary of {len(self.chars)} characters'
            ) from None

    def encode_array(self, text):
        """encode(text) as an array of uint32, which spares a corpus its lists."""
        if not self.bpe:
            return np.array(self.encode(text), np.uint32)
        try:
            return self.bpe.encode_to_numpy(text, disallowed_special=())
        except ValueError:  # tiktoken's regex gives up on half a million spaces in a row; the other backend does not
            import tokenizers

            slow = tokenizers.Tokenizer.from_str(json.dumps(self.spec))
            slow.encode_special_tokens = True
            return np.array(slow.encode(text, add_special_tokens=False).ids, np.uint32)

    def encode_chat(self, messages):
        """ids of a conversation in ChatML and, for each, whether it is learned: two uint32 and uint8 arrays.

        messages: [{'role': 'system', 'user' or 'assistant', 'content': text}, ...]. What the assistant says is learned,
        with the <|im_end|> that ends it, unless a message has its own 'learned'. Special tokens spelled out are text.
        """
        ids, learned = [], []
        start, end, newline = self.special[IM_START], self.special[IM_END], self.encode('\n')
        for message in messages:
            role, content = self.encode(f'{message["role"]}\n'), self.encode(message['content'])
            ids += [start, *role, *content, end, *newline]
            learned += (
                [0] * (1 + len(role))
                + [message.get('learned', message['role'] == 'assistant')] * (len(content) + 1)
                + [0] * len(newline)
            )
        return np.array(ids, np.uint32), np.array(learned, np.uint8)

    def with_special(self, tokens=(END_OF_TEXT, IM_START, IM_END)):
        """This tokenizer, with those of the special tokens that it lacks added after its last id."""
        missing = [
            t
            for t in tokens
            if t not in self.special and not (t == END_OF_TEXT and self.end_of_text is not None)
        ]
        if missing and self.n_ids != self.vocab_size:
            raise UserError(
                f'this tokenizer lacks {", ".join(missing)}, which cannot be added: its ids have gaps, and `tokenizers` would give others'
            )
        return (
            Tokenizer(
                self.spec
                | dict(
                    added_tokens=(self.spec.get('added_tokens') or [])
                    + _added(missing, self.vocab_size)
                )
            )
            if missing
            else self
        )

    def decode(self, ids):
        """The text of ids; bytes that are no valid UTF-8 and ids that the tokenizer lacks become U+FFFD."""
        if self.hf:
            return self.hf.decode(
                [i for i in ids if i < self.vocab_size], skip_special_tokens=False
            )
        return b''.join(self.token_bytes.get(int(i), b'\xff') for i in ids).decode(
            'utf-8', errors='replace'
        )

    def text_bytes(self, vocab_size):
        """How many bytes of text are behind each id below vocab_size, int64 (vocab_size,); special tokens have none."""
        sizes, special = np.zeros(vocab_size, np.int64), set(self.special.values())
        for i, token in self.token_bytes.items():
            if i < vocab_size and i not in special:
                sizes[i] = len(token)
        return sizes

    def agrees_with(self, other):
        """Whether each id that both have is the same text, so that data in one serves a model of the other."""
        return all(
            other.token_bytes.get(i, token) == token for i, token in self.token_bytes.items()
        )

    def save(self, path):
        """Write tokenizer.json at path, whole or not at all."""
        with replacing(path) as f:
            json.dump(self.spec, f, ensure_ascii=False)


def _bytes_of(vocab):
    """The bytes of each id of a byte-level vocabulary, {token: id}; a token that is no stand-in for bytes is its own text."""
    byte_of, found = {c: b for b, c in byte_to_unicode().items()}.__getitem__, {}
    for token, i in vocab.items():
        try:
            found[i] = bytes(map(byte_of, token))
        except KeyError:
            found[i] = token.encode()
    return found


def _byte_level_pattern(spec):
    """The split pattern, where tiktoken gives the same ids as this tokenizer.json: plain byte-level BPE; else None."""
    model, pre = spec['model'], spec.get('pre_tokenizer') or {}
    steps = pre['pretokenizers'] if pre.get('type') == 'Sequence' else [pre]
    plain = (
        model.get('type', 'BPE') == 'BPE'
        and all(t.get('special') for t in spec.get('added_tokens') or [])
        and not spec.get('normalizer')
        and not model.get('dropout')
        and not model.get('byte_fallback')
        and not model.get('continuing_subword_prefix')
        and not model.get('end_of_word_suffix')
    )
    if (
        not plain
        or not steps
        or steps[-1].get('type') != 'ByteLevel'
        or steps[-1].get('add_prefix_space')
    ):
        return None
    # tiktoken merges in the order of the ids, needs every byte, and would find a token that no merge makes
    made = [''.join(m.split(' ')) if isinstance(m, str) else ''.join(m) for m in model['merges']]
    ids, letters, added = (
        [model['vocab'].get(token, -1) for token in made],
        set(byte_to_unicode().values()),
        {t['content'] for t in spec.get('added_tokens') or []},
    )
    if (
        ids != sorted(ids)
        or -1 in ids
        or not letters <= model['vocab'].keys()
        or not model['vocab'].keys() <= letters | added | set(made)
    ):
        return None
    if len(steps) == 1 and steps[0].get('use_regex', True):
        return PATTERNS['gpt2']
    if (
        len(steps) == 2
        and not steps[1].get('use_regex', True)
        and steps[0].get('type') == 'Split'
        and steps[0].get('behavior') == 'Isolated'
        and not steps[0].get('invert')
        and 'Regex' in steps[0].get('pattern', {})
    ):
        return steps[0]['pattern']['Regex']
    return None


def _added(special, first):
    return [
        dict(
            id=first + i,
            content=token,
            single_word=False,
            lstrip=False,
            rstrip=False,
            normalized=False,
            special=True,
        )
        for i, token in enumerate(special)
    ]


def _spec(model, special, pattern=None):
    """A tokenizer.json: model, then special tokens with the ids that follow it, over a byte-level split by pattern."""
    spec = dict(
        version='1.0',
        truncation=None,
        padding=None,
        added_tokens=_added(special, len(model['vocab'])),
        normalizer=None,
        post_processor=None,
        model=model,
    )
    if model['type'] == 'BPE':
        split = {
            'type': 'Split',
            'pattern': {'Regex': pattern},
            'behavior': 'Isolated',
            'invert': False,
        }
        return spec | dict(
            pre_tokenizer={'type': 'Sequence', 'pretokenizers': [split, _BYTE_LEVEL]},
            decoder=_BYTE_LEVEL,
        )
    each_character = {
        'type': 'Split',
        'pattern': {'Regex': r'[\s\S]'},
        'behavior': 'Isolated',
        'invert': False,
    }
    return spec | dict(pre_tokenizer=each_character, decoder={'type': 'Fuse'})


def _bpe_model(vocab, merges):
    return dict(
        type='BPE',
        dropout=None,
        unk_token=None,
        continuing_subword_prefix=None,
        end_of_word_suffix=None,
        fuse_unk=False,
        byte_fallback=False,
        ignore_merges=False,
        vocab=vocab,
        merges=merges,
    )


def train_bpe(texts, vocab_size, split='qwen2'):
    """Train byte-level BPE on an iterable of texts; vocab_size counts the 256 bytes and the three special tokens."""
    import tokenizers

    special = [END_OF_TEXT, IM_START, IM_END]
    if vocab_size < 256 + len(special):
        raise UserError(
            f'vocab_size={vocab_size}: a byte-level vocabulary needs at least {256 + len(special)}'
        )
    spec = _spec(
        _bpe_model({c: i for i, c in enumerate(byte_to_unicode().values())}, []),
        [],
        PATTERNS[split],
    )
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(spec))

    def bounded():  # a word of a million characters, as in a data: URL, would take the trainer hours
        for text in texts:
            yield from (
                [text[i : i + 1000] for i in range(0, len(text), 1000)]
                if re.search(r'\S{1000}|\s{1000}', text)
                else [text]
            )

    tokenizer.train_from_iterator(
        bounded(),
        tokenizers.trainers.BpeTrainer(
            vocab_size=vocab_size - len(special),
            show_progress=False,
            initial_alphabet=list(byte_to_unicode().values()),
        ),
    )
    model = json.loads(tokenizer.to_str())['model']
    return Tokenizer(_spec(_bpe_model(model['vocab'], model['merges']), special, PATTERNS[split]))


def byte_tokenizer():
    """One token a byte."""
    vocab = {c: b for b, c in sorted(byte_to_unicode().items())}
    return Tokenizer(
        _spec(_bpe_model(vocab, []), [END_OF_TEXT, IM_START, IM_END], PATTERNS['qwen2'])
    )


def char_tokenizer(characters, special=()):
    """One token a character, ids in the order given. nanoGPT's character data has no special tokens."""
    return Tokenizer(
        _spec(
            dict(type='WordLevel', vocab={c: i for i, c in enumerate(characters)}, unk_token=''),
            special,
        )
    )


def gpt2_tokenizer():
    """GPT-2's vocabulary, from tiktoken's cache or its address: the 256 bytes, then one token a merge."""
    from tiktoken.load import read_file_cached

    try:
        lines = (
            read_file_cached(
                'https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/vocab.bpe',
                '1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5',
            )
            .decode()
            .splitlines()[1:]
        )
    except Exception as e:  # requests' many, a proxy's, a corrupt download
        raise UserError(
            f'the GPT-2 vocabulary is not cached and cannot be fetched ({type(e).__name__}); to prepare data without it, train one: --tokenizer=train'
        ) from None
    merges = [line.split(' ') for line in lines]
    vocab = {c: i for i, c in enumerate([*byte_to_unicode().values(), *map(''.join, merges)])}
    return Tokenizer(
        _spec(_bpe_model(vocab, merges), [END_OF_TEXT])
        | dict(pre_tokenizer=_BYTE_LEVEL | {'use_regex': True})
    )


def gpt2_files_tokenizer(folder):
    """A GPT-2 model's own vocabulary as it lay before there was tokenizer.json: in vocab.json, merges.txt and, with some, added_tokens.json."""
    config, vocab, added = (
        read_json(path) if os.path.exists(path) else {}
        for path in (
            os.path.join(folder, n) for n in ('config.json', 'vocab.json', 'added_tokens.json')
        )
    )
    if config.get('model_type') != 'gpt2' or not vocab:
        raise UserError(
            f'{folder} has no tokenizer.json, and merges.txt is read of GPT-2 models alone, beside vocab.json: save the tokenizer again with transformers'
        )
    with open(os.path.join(folder, 'merges.txt'), encoding='utf-8-sig') as f:
        merges = [line.split() for line in f if line.strip() and not line.startswith('#version')]
    ids = {token: i for token, i in vocab.items() if token == END_OF_TEXT} | added
    tokens = [
        token | dict(id=ids[token['content']], special=token['content'] == END_OF_TEXT)
        for token in _added(sorted(ids, key=ids.get), 0)
    ]
    return Tokenizer(
        _spec(_bpe_model(vocab, merges), [])
        | dict(added_tokens=tokens, pre_tokenizer=_BYTE_LEVEL | {'use_regex': True})
    )


class _NoCode(pickle.Unpickler):
    """Plain containers only: a pickle that names any class or function is refused before anything runs."""

    def find_class(self, module, name):
        raise UserError(f'meta.pkl asks to load {module}.{name}; only plain dictionaries are read')


def load_tokenizer(source):
    """A tokenizer by name (gpt2, bytes), from a tokenizer.json, a folder that holds one or nanoGPT's meta.pkl, or the Hugging Face hub (OWNER/NAME)."""
    if source == 'gpt2':
        return gpt2_tokenizer()
    if source == 'bytes':
        return byte_tokenizer()
    if '/' in source and hub.is_name(source):
        source = hub.download(source, ['config.json', *TOKENIZER_FILES])
    path = os.path.join(source, 'tokenizer.json') if os.path.isdir(source) else source
    legacy = os.path.join(source, 'meta.pkl')
    try:
        if not os.path.exists(path) and os.path.exists(legacy):
            with open(legacy, 'rb') as f:
                meta = _NoCode(f).load()
            return char_tokenizer([meta['itos'][i] for i in range(meta['vocab_size'])])
        if not os.path.exists(path) and os.path.exists(os.path.join(source, 'merges.txt')):
            return gpt2_files_tokenizer(source)
        with open(path, encoding='utf-8') as f:
            return Tokenizer(json.load(f))
    except FileNotFoundError:
        raise UserError(
            f'no tokenizer at {source}: it is gpt2, bytes, a tokenizer.json, a folder that holds one, or OWNER/NAME on the Hugging Face hub'
        ) from None
    except UserError:
        raise
    except Exception as e:  # broken bytes fail in any way
        read = next(
            (p for p in (path, legacy, os.path.join(source, 'merges.txt')) if os.path.exists(p)),
            path,
        )
        raise UserError(f'{read} is not a readable tokenizer: {e}') from None


def find_tokenizer(*folders):
    """The tokenizer of the first folder that holds one, or None."""
    for folder in folders:
        if any(
            os.path.exists(os.path.join(folder, name))
            for name in ('tokenizer.json', 'meta.pkl', 'merges.txt')
        ):
            return load_tokenizer(folder)
