"""A mix to make a small model talk: conversations, grade-school maths, code, and articles to keep its English.

python prepare/mini_chat.py     writes data/mini_chat
"""

import random
import os
import sys

sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
from fledge.configurator import configure
from prepare import pipeline
from prepare.pipeline import Stage, prepare
from prepare.records import article, conversation, exchange, is_title, text_of
from prepare.sources import Made, Skip
from prepare.streams import Hub

name = 'mini_chat'  # folder under data/
cap = 20000  # examples of each source
settings = configure(globals(), also=pipeline.__file__)


def tree(rows):
    """A conversation of a tree of messages: at each turn the English answer ranked first."""
    messages, parent = [], None
    while True:
        replies = [
            r
            for r in rows
            if r['parent_id'] == parent and r.get('lang') == 'en' and not r.get('deleted')
        ]
        if not replies:
            break
        best = min(replies, key=lambda r: (r.get('rank') is None, r.get('rank'), r['message_id']))
        messages.append(
            dict(role='user' if best['role'] == 'prompter' else 'assistant', content=best['text'])
        )
        parent = best['message_id']
    if not messages:
        raise Skip('no English message')
    return [
        conversation(dict(messages=messages[: len(messages) - (messages[-1]['role'] == 'user')]))
    ]


def arithmetic(i):
    rng = random.Random(f'{seed} {i}')
    a, b = rng.randrange(10000), rng.randrange(10000)
    sign, result = rng.choice([('+', a + b), ('-', a - b), ('times', a * b)])
    return dict(instruction=f'What is {a} {sign} {b}?', output=f'{a} {sign} {b} = {result}')


def stage(first, source, documents):
    """At most cap examples of a source; where it cannot be had, as much arithmetic."""
    filler = Made('synthetic arithmetic', cap, lambda i: arithmetic(first + i))
    return Stage(
        source,
        documents,
        limit=cap,
        instead=Stage(filler, lambda record: [conversation(record)], limit=cap),
    )


prepare(
    [
        stage(
            0,
            Hub(
                'OpenAssistant/oasst1',
                split='train',
                starts=lambda row, before: (
                    not before or row['message_tree_id'] != before['message_tree_id']
                ),
            ),
            tree,
        ),
        stage(
            cap,
            Hub('openai/gsm8k', 'main', 'train'),
            lambda row: [exchange(text_of(row, 'question'), text_of(row, 'answer'))],
        ),
        stage(
            2 * cap, Hub('sahil2801/CodeAlpaca-20k', split='train'), lambda row: [conversation(row)]
        ),
        stage(
            3 * cap,
            Hub(
                'Salesforce/wikitext',
                'wikitext-2-raw-v1',
                'train',
                columns=['text'],
                starts=is_title,
            ),
            lambda rows: [article(rows)],
        ),
    ],
    'oasst1, gsm8k, CodeAlpaca-20k, wikitext',
    settings,
    masked=True,
)
