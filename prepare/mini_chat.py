"""A mix to make a small model talk: conversations, school maths, code, and articles.

python prepare/mini_chat.py     writes data/mini_chat
"""

import os
import random
import sys

sys.path.insert(0, os.path.join(os.path.dirname(__file__), os.pardir))  # where fledge/ is

from fledge.corpus import Hub, Made, OrElse, Skip, Stage, configure, prepare
from fledge.corpus.records import article, conversation, exchange, is_title

name = 'mini_chat'  # folder under data/
cap = 20000  # examples of each source; where one cannot be had, as much arithmetic
settings = configure(globals())


def tree(rows):
    """A conversation of a tree of messages: at each turn the English answer ranked first."""
    messages, parent = [], None
    while replies := [row for row in rows if is_reply(row, parent)]:
        best = min(replies, key=lambda r: (r.get('rank') is None, r.get('rank'), r['message_id']))
        role = 'user' if best['role'] == 'prompter' else 'assistant'
        messages.append(dict(role=role, content=best['text']))
        parent = best['message_id']
    if not messages:
        raise Skip('no English message')
    if messages[-1]['role'] == 'user':  # nobody answered
        messages.pop()
    return conversation(dict(messages=messages))


def is_reply(row, parent):
    return row['parent_id'] == parent and row.get('lang') == 'en' and not row.get('deleted')


def is_new_tree(row, before):
    return row['message_tree_id'] != before['message_tree_id']


def arithmetic(i):
    rng = random.Random(f'{settings["seed"]} {i}')
    a, b = rng.randrange(10000), rng.randrange(10000)
    sign, result = rng.choice([('+', a + b), ('-', a - b), ('times', a * b)])
    return exchange(f'What is {a} {sign} {b}?', f'{a} {sign} {b} = {result}')


def stage(first, source, documents):
    """At most cap examples of a source, or where it cannot be had the sums from number first on."""

    def examples(record):
        return [arithmetic(record)] if isinstance(record, int) else documents(record)

    sums = Made('synthetic arithmetic', cap, lambda i: first + i)
    return Stage(OrElse(source, sums), examples, limit=cap)


oasst = Hub('OpenAssistant/oasst1', starts=is_new_tree)
gsm8k = Hub('openai/gsm8k', 'main')
code = Hub('sahil2801/CodeAlpaca-20k')
wikitext = Hub('Salesforce/wikitext', 'wikitext-2-raw-v1', columns=['text'], starts=is_title)
stages = [
    stage(0, oasst, lambda rows: [tree(rows)]),
    stage(cap, gsm8k, lambda row: [conversation(row)]),
    stage(2 * cap, code, lambda row: [conversation(row)]),
    stage(3 * cap, wikitext, lambda rows: [article(rows)]),
]
prepare(settings, 'oasst1, gsm8k, CodeAlpaca-20k, wikitext', stages, masked=True)
