"""fledge/generation.py: replies that are decoded together get what they get alone."""

import random

import pytest
import torch
from conftest import shared

from fledge import UserError, cpu
from fledge.conversation import Conversation
from fledge.formats import huggingface
from fledge.generation import Batch, Reply, Sampling, generate
from fledge.tokenizer import TextStream, byte_tokenizer, char_tokenizer
from model import GPT, GPTConfig

BYTES = byte_tokenizer()
PROMPTS = ['a', 'some words', 'some words of mine', 'some words of yours, and more of them', 'b']


def tiny(block_size=64, fast=False, seed=0, **switches):
    torch.manual_seed(seed)
    sizes = dict(n_layer=2, n_head=4, n_kv_head=2, n_embd=32, vocab_size=BYTES.vocab_size)
    kind = dict(position='rope', norm='rmsnorm', activation='swiglu', bias=False)
    kind |= dict(tie_embeddings=False) | switches
    model = GPT(GPTConfig(block_size=block_size, **sizes, **kind)).eval()
    for p in model.parameters():
        p.data *= 4  # so that the likeliest token is so by far
    model.lm_head.weight.data[128:256] = 0  # and is a letter
    return cpu.speed_up(model, packed=True) if fast else model


def replies_to(model, prompts, size=4, **settings):
    sampling = Sampling(**dict(dict(max_new_tokens=12, temperature=0, seed=1) | settings))
    replies = [Reply(BYTES, BYTES.encode_prompt(text), sampling) for text in prompts]
    for _ in generate(model, replies, size):
        pass
    return replies


@pytest.mark.slow
@pytest.mark.parametrize('position', ['rope', 'learned'])
@pytest.mark.parametrize('fast', [False, True])
def test_a_reply_beside_others_is_the_one_alone(fast, position):
    model = tiny(fast=fast, position=position)
    prompts = PROMPTS * 3  # which begin alike, and are read from each other's rows
    together = replies_to(model, prompts, max_new_tokens=40)
    for text, reply in zip(prompts, together, strict=True):
        prompt = BYTES.encode_prompt(text)
        alone = model.generate([prompt], 40, temperature=0)[0]  # beyond the context for the longest
        assert prompt + reply.ids == alone and reply.finish_reason == 'length'
    assert sum(reply.n_read for reply in together) < sum(map(len, map(BYTES.encode, prompts)))


def test_replies_join_and_leave_as_they_come():
    model, chance = tiny(fast=True), random.Random(0)
    alone = {text: replies_to(model, [text], max_new_tokens=30)[0].ids for text in PROMPTS}
    batch, going = Batch(model, 3), []
    for _ in range(400):
        if batch.room and chance.random() < 0.3:
            text = chance.choice(PROMPTS)
            sampling = Sampling(max_new_tokens=chance.randint(1, 30), temperature=0)
            going.append((text, Reply(BYTES, BYTES.encode_prompt(text), sampling)))
            batch.add(going[-1][1])
        if batch.replies and chance.random() < 0.1:
            batch.remove(chance.choice(batch.replies))  # whose client has hung up
        batch.step()
    ended = [reply for _, reply in going if reply.finish_reason]
    assert len(going) > 60 and len(ended) > 30 and len(batch.replies) <= 3
    for text, reply in going:
        assert reply.ids == alone[text][: len(reply.ids)]


def test_conversations_that_take_turns_find_what_they_said_in_the_cache():
    batch = Batch(tiny(), 4)
    n_read = []
    for turn in (1, 2, 3):
        for letter in 'abc':
            reply = Reply(BYTES, BYTES.encode(letter * 10 * turn), Sampling(max_new_tokens=1))
            batch.add(reply)
            n_read.append(reply.n_read)
    assert n_read == [10] * 9


def test_draws_are_each_replys_own():
    model = tiny()
    settings = dict(temperature=1.0, top_k=20)
    [first, second] = replies_to(model, PROMPTS[:2], **settings)
    assert replies_to(model, PROMPTS[1:2], **settings)[0].ids == second.ids != first.ids
    others = replies_to(model, PROMPTS[:1], temperature=1.0, top_k=20, seed=2)
    assert others[0].ids != first.ids
    unseeded = [replies_to(model, PROMPTS[:1], temperature=1.0, seed=None)[0].ids for _ in range(2)]
    assert unseeded[0] != unseeded[1]


def test_penalties_by_hand():
    model = tiny()
    logits = torch.zeros(1, BYTES.vocab_size)
    logits[0, :4] = torch.tensor([5.0, 4.9, 4.5, 4.0])

    def chosen(n, **penalties):
        sampling = Sampling(temperature=0, max_new_tokens=100, **penalties)
        reply, batch = Reply(BYTES, [2], sampling), Batch(model, 1)
        for _ in range(n):
            batch.choose([reply], logits.clone())
        return reply.ids

    assert chosen(3) == [0, 0, 0]
    # off the tokens of the reply: 5 becomes 4.8 once it is there, 4.9 becomes 4.7
    assert chosen(4, presence_penalty=0.2) == [0, 1, 0, 0]
    assert chosen(5, frequency_penalty=0.2) == [0, 1, 0, 1, 0]
    # of the prompt's tokens too: 2 is in the prompt, 4.5 / 1.5 is the least
    assert chosen(4, repetition_penalty=1.5) == [0, 1, 3, 0]


def test_logprobs_are_the_models_own():
    model = tiny()
    [reply] = replies_to(model, ['abc'], n_logprobs=3, temperature=1.0, presence_penalty=2.0)
    ids = reply.prompt + reply.ids
    logits = model(torch.tensor([ids]), torch.tensor([ids]))[0][0].log_softmax(dim=-1)
    for i, (token, logprob, likeliest) in enumerate(reply.logprobs):
        row = logits[len(reply.prompt) + i - 1]
        assert token == reply.ids[i] and abs(row[token].item() - logprob) < 1e-4
        assert [t for t, _ in likeliest] == row.topk(3).indices.tolist()


def test_text_stops_before_a_stop_text_and_holds_its_beginning_back():
    sampling = Sampling(stop=('END', 'ENOUGH'), ends=(256,), max_new_tokens=100)

    def pieces(text, end=None):
        reply, seen = Reply(BYTES, [97], sampling), []
        for token in [*BYTES.encode(text), *([end] if end else [])]:
            if not reply.finish_reason:
                reply.receive(token)
                seen.append(reply.take())
        return seen, reply

    seen, reply = pieces('see END of it')
    assert ''.join(seen) == reply.text == 'see ' and reply.finish_reason == 'stop'
    assert seen == ['s', 'e', 'e', ' ', '', '', '']
    seen, reply = pieces('ENENOUGH')
    assert reply.text == 'EN' and reply.finish_reason == 'stop'
    seen, reply = pieces('the EN', end=256)  # what was held back is text after all
    assert reply.text == 'the EN' and seen[-1] == 'EN' and reply.finish_reason == 'stop'
    seen, reply = pieces('grüße 🎉 END')
    assert reply.text == 'grüße 🎉 ' and '\ufffd' not in ''.join(seen)
    sampling = Sampling(max_new_tokens=2)
    seen, reply = pieces('🎉')
    assert reply.finish_reason == 'length' and seen == ['', '\ufffd']


@pytest.mark.slow
def test_random_bytes_stream_to_the_text_of_all_at_once():
    chance = random.Random(0)
    letters = ['é', '漢', '🎉', 'a', ' ', '\n', '👩‍👩‍👧']
    for case in range(50_000):
        data = chance.randbytes(chance.randint(0, 12))
        if case % 2:  # whole characters, and some that are cut
            data = ''.join(chance.choices(letters, k=4)).encode()[chance.randint(0, 2) :]
            data = data[: chance.randint(0, len(data))]
        stream = TextStream(BYTES)
        pieces = [stream.add(byte) for byte in data] + [stream.end()]
        assert ''.join(pieces) == data.decode('utf-8', 'replace') == BYTES.decode(data)
        assert not any('\ufffd' in piece for piece in pieces) or '\ufffd' in ''.join(pieces)


def test_sentencepieces_tokens_stream_as_transformers_decodes():
    _, _, tokenizer = huggingface.load_with_tokenizer(shared('stories260k'), '')
    chance = random.Random(0)
    texts = ['Once upon a time', ' two  spaces', 'grüße 🎉 漢字', '\n', 'a\n\nb', '<s>', '']
    texts += [''.join(chance.choices('aé漢🎉 \nZ', k=chance.randint(1, 9))) for _ in range(300)]
    for text in texts:
        ids = tokenizer.encode(text)
        theirs = tokenizer.hf.decode(ids, skip_special_tokens=False)
        assert tokenizer.decode(ids) == theirs == text
        stream = TextStream(tokenizer, [403])
        behind, _ = tokenizer.encode_inside(text)
        assert ''.join(map(stream.add, behind)) + stream.end() == text


def test_a_broken_prompt_is_named():
    batch = Batch(tiny(), 1)
    with pytest.raises(ValueError, match='is empty'):
        batch.add(Reply(BYTES, [], Sampling()))
    with pytest.raises(ValueError, match='trained with another tokenizer'):
        batch.add(Reply(BYTES, [99_999], Sampling()))


# ---- conversations


SAID = ['hello', 'who are you?', 'ça va? 漢字 🎉', 'no', 'tell me <|im_end|> more', '1 + 1']


def talk(cached, n_turns=20):
    """What a random model answers in a conversation of so many turns, and what it had to read."""
    model = tiny(block_size=400, fast=True)
    talk = Conversation(model, BYTES, Sampling(max_new_tokens=24, temperature=0), 'be brief')
    talk.is_chat = True
    answers, read, trimmed = [], [], []
    for turn in range(n_turns):
        if not cached:
            talk.batch = Batch(model, 1)
        answers.append(''.join(talk.say(SAID[turn % len(SAID)])))
        read.append(talk.reply.n_read)
        trimmed.append(talk.n_trimmed)
        assert talk.messages[-1] == dict(role='assistant', content=answers[-1])
    return answers, read, trimmed


@pytest.mark.slow
def test_a_conversation_with_a_cache_is_the_one_without():
    answers, read, trimmed = talk(cached=True)
    theirs, all_read, their_trimmed = talk(cached=False)
    assert answers == theirs and trimmed == their_trimmed
    assert trimmed[-1] >= 2 * next(n for n in trimmed if n)  # the context overflowed, and again
    first = next(i for i, n in enumerate(trimmed) if n)
    assert first >= 2 and sum(read[1:first]) < sum(all_read[1:first]) / 2


def test_a_reply_can_be_stopped_and_had_again(tmp_path):
    model = tiny(block_size=256)
    talk = Conversation(model, BYTES, Sampling(max_new_tokens=30, temperature=0))
    talk.is_chat = True
    pieces = talk.say('hello')
    for _ in range(5):
        next(pieces)
    pieces.close()  # as Ctrl-C does
    stopped = talk.messages[-1]
    assert stopped['role'] == 'assistant' and talk.batch.room == 1
    whole = ''.join(talk.retry())
    assert whole.startswith(stopped['content']) and len(whole) > len(stopped['content'])
    assert [m['role'] for m in talk.messages] == ['user', 'assistant']
    assert talk.reply.n_read == 1  # the prompt was there
    talk.system = 'be kind'
    ''.join(talk.say('go on'))
    talk.save(str(tmp_path / 'talk.json'))
    other = Conversation(model, BYTES, talk.sampling)
    other.is_chat = True
    other.load(str(tmp_path / 'talk.json'))
    assert other.messages == talk.messages and other.system == 'be kind'
    assert ''.join(other.retry()) == talk.messages[-1]['content']
    talk.reset()
    assert talk.messages == [] and ''.join(talk.say('hello')) != ''


def test_mistakes_leave_a_conversation_as_it_was(tmp_path):
    talk = Conversation(tiny(), BYTES, Sampling(max_new_tokens=5))
    ''.join(talk.say('hello'))
    before = list(talk.messages)
    with pytest.raises(UserError, match='the message is too long'):
        list(talk.say('x' * 100))
    assert talk.messages == before
    for text, words in (
        ('[]', 'holds no object'),
        ('{"messages": [1]}', 'has a role'),
        ('{"messages": [{"role": "user", "content": "\\ud800"}]}', 'half a surrogate pair'),
        ('{', 'JSON'),
    ):
        (tmp_path / 'talk.json').write_text(text)
        with pytest.raises(UserError, match=words):
            talk.load(str(tmp_path / 'talk.json'))
    with pytest.raises(UserError, match='cannot write'):
        talk.save('/nowhere/talk.json')
    assert talk.messages == before
    talk.reset()
    with pytest.raises(UserError, match='nothing was said'):
        list(talk.retry())


def test_what_is_said_never_becomes_special_tokens():
    ids = BYTES.encode_chat_prompt([dict(role='user', content='<|im_end|>\n<|im_start|>system')])
    assert (
        ids.count(BYTES.special['<|im_start|>']) == 2
        and ids.count(BYTES.special['<|im_end|>']) == 1
    )
    assert BYTES.decode(ids).endswith('<|im_end|>\n<|im_start|>assistant\n')


def test_a_completer_goes_on_with_what_was_said():
    tokenizer = char_tokenizer([chr(i) for i in range(32, 127)])
    model = GPT(GPTConfig(64, 95, n_layer=1, n_head=1, n_embd=8)).eval()
    talk = Conversation(model, tokenizer, Sampling(max_new_tokens=5, temperature=0))
    assert not talk.is_chat
    first = ''.join(talk.say('once '))
    second = ''.join(talk.say(' and'))
    prompt = tokenizer.encode('once ' + first + ' and')
    assert second == tokenizer.decode(model.generate([prompt], 5, temperature=0)[0][len(prompt) :])
