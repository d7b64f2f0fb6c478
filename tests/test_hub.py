"""Every source on the hub, end to end, against a hub here with the repositories' real layouts."""

import gzip
import json
import os
import random
import re
import subprocess
import sys

import pytest
from conftest import ROOT, fails, run, start
from hub import Hub, parquet_bytes
from test_prepare import contents, learned_of, texts_of

from fledge import read_meta
from fledge.tokenizer import load_tokenizer

FAST = ['--tokenizer=bytes', '--retries=0']


def readme(**configs):
    """A dataset card that says which files make up which configuration and split."""
    lines = [
        f'- config_name: {config.replace("_", "-")}\n  data_files:\n'
        + ''.join(f'  - split: {s}\n    path: {p}\n' for s, p in splits.items())
        for config, splits in configs.items()
    ]
    return '---\nconfigs:\n' + ''.join(lines) + '---\n'


def stories(n, name='story'):
    return [{'text': f'{name} {i}: once upon a time there were {i} foxes.'} for i in range(n)]


@pytest.fixture(scope='module')
def hub():
    with Hub() as hub:
        hub.add(
            'roneneldan/TinyStories',
            {
                f'data/train-{i:05d}-of-00002.parquet': parquet_bytes(
                    stories(600)[i::2], row_group_size=100
                )
                for i in range(2)
            }
            | {'data/validation-00000-of-00001.parquet': parquet_bytes(stories(60, 'tale'))},
        )
        hub.add(
            'Skylion007/openwebtext',
            {'openwebtext.py': '# a loading script', 'README.md': '---\npretty_name: x\n---\n'},
        )
        hub.add(
            'Skylion007/openwebtext',
            {
                'data/train-00000-of-00093.parquet': parquet_bytes(stories(300, 'page')),
                'README.md': '---\npretty_name: x\n---\n',
            },
            revision='refs/pr/18',
        )
        hub.add('someone/scripted', {'scripted.py': '# a loading script'})
        hub.add(
            'someone/scripted',
            {'default/train/0000.parquet': parquet_bytes(stories(40))},
            revision='refs/convert/parquet',
        )
        web = [
            row
            | dict(
                id=f'<urn:{i}>',
                dump='CC-MAIN-2024-10',
                url=f'http://x/{i}',
                file_path='s3://x',
                language='en',
                language_score=0.9,
                token_count=9,
                score=3.1,
                int_score=3,
            )
            for i, row in enumerate(stories(900, 'web'))
        ]
        hub.add(
            'HuggingFaceFW/fineweb-edu',
            {
                'README.md': readme(
                    default={'train': 'data/*/*'}, sample_10BT={'train': 'sample/10BT/*'}
                )
            }
            | {'data/CC-MAIN-2024-10/000_00000.parquet': parquet_bytes(web[:9])}
            | {
                f'sample/10BT/{i:03d}_00000.parquet': parquet_bytes(
                    web[i * 300 : i * 300 + 300], row_group_size=50
                )
                for i in range(3)
            },
        )
        c4 = [
            row | dict(timestamp='2019-04-25T12:57:54Z', url=f'http://y/{i}')
            for i, row in enumerate(stories(300, 'crawl'))
        ]
        hub.add(
            'allenai/c4',
            {
                'README.md': readme(
                    en={
                        'train': 'en/c4-train.*.json.gz',
                        'validation': 'en/c4-validation.*.json.gz',
                    }
                )
            }
            | {
                f'en/c4-{s}.{i:05d}-of-00002.json.gz': gzip.compress(
                    ''.join(json.dumps(r) + '\n' for r in c4[i::2]).encode()
                )
                for i in range(2)
                for s in ('train', 'validation')
            },
        )
        hub.add(
            'yahma/alpaca-cleaned',
            {
                'alpaca_data_cleaned.json': json.dumps(
                    [
                        dict(
                            instruction=f'Add one to {i}.',
                            input='' if i % 2 else 'As a word.',
                            output=f'{i + 1}',
                        )
                        for i in range(200)
                    ]
                )
            },
        )
        hub.add(
            'openai/gsm8k',
            {'README.md': readme(main={'train': 'main/train-*', 'test': 'main/test-*'})}
            | {
                f'main/{s}-00000-of-00001.parquet': parquet_bytes(
                    [dict(question=f'{s} {i}?', answer=f'It is #### {i}') for i in range(80)]
                )
                for s in ('train', 'test')
            },
        )
        hub.add(
            'sahil2801/CodeAlpaca-20k',
            {
                'code_alpaca_20k.json': json.dumps(
                    [
                        dict(instruction=f'Print {i}.', input='', output=f'print({i})')
                        for i in range(80)
                    ]
                )
            },
        )
        hub.add(
            'OpenAssistant/oasst1',
            {
                'README.md': readme(
                    default={'train': 'data/train-*', 'validation': 'data/validation-*'}
                )
            }
            | {
                f'data/{s}-00000-of-00001-abc.parquet': parquet_bytes(
                    list(oasst(60)), row_group_size=50
                )
                for s in ('train', 'validation')
            },
        )
        hub.add(
            'Salesforce/wikitext',
            {
                'README.md': readme(
                    wikitext_2_raw_v1={
                        s: f'wikitext-2-raw-v1/{s}-*' for s in ('test', 'train', 'validation')
                    },
                    wikitext_103_raw_v1={
                        s: f'wikitext-103-raw-v1/{s}-*' for s in ('test', 'train', 'validation')
                    },
                )
            }
            | {
                f'wikitext-{v}-raw-v1/{s}-00000-of-00001.parquet': parquet_bytes(
                    [{'text': line} for line in article_lines(s, n)], row_group_size=7
                )
                for v, k in ((2, 1), (103, 2))
                for s, n in (('train', 40 * k), ('validation', 5), ('test', 6))
            },
        )
        hub.add(
            'stanfordnlp/imdb',
            {
                'README.md': readme(
                    plain_text={s: f'plain_text/{s}-*' for s in ('train', 'test', 'unsupervised')}
                )
            }
            | {
                f'plain_text/{s}-00000-of-00001.parquet': parquet_bytes(
                    [
                        dict(
                            text=f'{s} film {i}<br /><br />It was {["bad", "good"][i >= 50]}.',
                            label=int(i >= 50),
                        )
                        for i in range(100)
                    ]
                )
                for s in ('train', 'test', 'unsupervised')
            },
        )
        hub.add(
            'someone/pairs',
            {
                'pairs.jsonl': ''.join(
                    json.dumps(dict(prompt=f'{i}?', chosen=f'yes {i}', rejected=f'no {i}')) + '\n'
                    for i in range(50)
                )
            },
        )
        yield hub


def oasst(n):
    """Trees of messages as oasst1 has them: parents before children, a tree after another."""
    for i in range(n):
        lang = 'en' if i % 3 else 'es'
        for name, parent, role, rank, text in (
            ('a', None, 'prompter', None, f'question {i}'),
            ('b', 'a', 'assistant', 1, 'second best'),
            ('c', 'a', 'assistant', 0, f'best {i}'),
            ('d', 'c', 'prompter', None, 'and then?'),
            ('e', 'd', 'assistant', None, 'nothing'),
            ('f', 'e', 'prompter', None, 'unanswered'),
        ):
            yield dict(
                message_id=f'{i}{name}',
                parent_id=parent and f'{i}{parent}',
                user_id='u',
                created_date='2023-02-05T14:23:50',
                text=text,
                role=role,
                lang=lang,
                review_count=3,
                review_result=True,
                deleted=False,
                rank=rank,
                synthetic=False,
                model_name=None,
                message_tree_id=f'{i}a',
                tree_state='ready_for_export',
            )


def article_lines(name, n):
    for i in range(n):
        yield from [
            '',
            f' = {name.title()} = {i} = \n',
            '',
            f' Text <unk> of it = {i} . \n',
            ' = 1 <unk> and <unk> C = \n',
            '',
            ' = = Section = = \n',
            '',
            f' More {i} @-@ text . \n',
        ]


def prepared(hub, folder, script, *flags, name=None):
    out = run(folder, f'prepare/{script}.py', *FAST, *flags, env=hub.env)
    return str(folder / 'data' / (name or script)), out


@pytest.mark.slow
@pytest.mark.parametrize(
    'script, flags, n_train, first',
    [
        ('tinystories', [], 600, 'story 0: once'),
        ('openwebtext', ['--val_fraction=0.1'], 270, 'page 0: once'),
        ('fineweb_edu', ['--val_fraction=0.1'], 810, 'web '),
        (
            'hub',
            [
                '--repo=roneneldan/TinyStories',
                '--split=validation',
                '--name=hub',
                '--val_fraction=0.1',
            ],
            54,
            'tale 0: once',
        ),
    ],
)
def test_text_arrives_whole(hub, tmp_path, script, flags, n_train, first):
    folder, _ = prepared(hub, tmp_path, script, *flags)
    train, val = texts_of(folder, 'train'), texts_of(folder, 'val')
    name = {'openwebtext': 'page', 'fineweb_edu': 'web', 'hub': 'tale'}.get(script, 'story')
    everything = sorted(
        row['text']
        for row in stories(
            {'hub': 60, 'openwebtext': 300, 'fineweb_edu': 900}.get(script, 600), name
        )
        + (stories(60, 'tale') if script == 'tinystories' else [])
    )
    assert (
        sorted(train + val) == everything
        and abs(len(train) - n_train) < 40
        and train[0].startswith(first)
    )
    assert all(path.startswith('/') for _, path in hub.requests)  # nobody else is asked anything
    if script == 'fineweb_edu':
        assert train[:50] != sorted(
            train[:50], key=lambda t: int(t.split()[1][:-1])
        ) and not re.search('web (\\d): .*web (\\d)', ' '.join(train[:3]))


@pytest.mark.slow
def test_a_loading_script_is_not_run_and_its_conversion_is_read(hub, tmp_path):
    process = start(
        tmp_path,
        'prepare/hub.py',
        *FAST,
        '--repo=someone/scripted',
        '--name=x',
        '--val_fraction=0.2',
        env=hub.env,
    )
    err = process.communicate(timeout=100)[1]
    assert (
        process.returncode == 0
        and 'is a loading script, which is not run; its revision refs/convert/parquet is' in err
        and ' read, of which the hub keeps the first 5 GB alone' in err
    )
    assert (
        len(texts_of(str(tmp_path / 'data/x'), 'train') + texts_of(str(tmp_path / 'data/x'), 'val'))
        == 40
    )


@pytest.mark.slow
def test_val_is_read_first_and_keeps_what_is_in_train_too(hub, tmp_path):
    hub.add(
        'roneneldan/TinyStories',
        {
            'data/train-00000-of-00001.parquet': parquet_bytes(stories(50)),
            'data/validation-00000-of-00001.parquet': parquet_bytes(stories(20)),
        },
        revision='both',
    )
    both = hub.repos['roneneldan/TinyStories'].pop('both')
    main, hub.repos['roneneldan/TinyStories']['main'] = (
        hub.repos['roneneldan/TinyStories']['main'],
        both,
    )
    try:
        folder, out = prepared(hub, tmp_path, 'tinystories')
    finally:
        hub.repos['roneneldan/TinyStories']['main'] = main
    assert [len(texts_of(folder, s)) for s in ('train', 'val')] == [
        30,
        20,
    ] and '20 x a duplicate' in out


@pytest.mark.slow
@pytest.mark.parametrize('version', [2, 103])
def test_wikitexts_articles_and_its_own_splits(hub, tmp_path, version):
    folder, _ = prepared(hub, tmp_path, 'wikitext', f'--version={version}')
    assert [len(texts_of(folder, s)) for s in ('train', 'val', 'test')] == [
        40 if version == 2 else 80,
        5,
        6,
    ]
    assert (
        texts_of(folder, 'val')[1]
        == ' = Validation = 1 = \n\n Text <unk> of it = 1 . \n = 1 <unk> and <unk> C = \n\n'
        ' = = Section = = \n\n More 1 @-@ text . \n\n'
    )


@pytest.mark.slow
def test_dolma_is_read_from_its_lists_of_files(hub, tmp_path):
    lines = [
        json.dumps(
            dict(
                id=str(i),
                text=f'dolma {i} ' + ''.join(random.Random(i).choices('abcdefgh ', k=250)),
                added='2023',
                created='2020',
                source='common-crawl',
                metadata={'x': [i] if i % 2 else 'y'},
            )
        )
        for i in range(400)
    ]
    hub.files.update(
        {
            f'v1_5r2_sample-{i:04d}.json.gz': gzip.compress(
                '\n'.join(lines[i::4] + ['{"id": "broken"']).encode()
            )
            for i in range(4)
        }
    )
    hub.add(
        'allenai/dolma',
        {
            'dolma.py': '# a loading script',
            'urls/v1_6-sample.txt': '\n'.join(
                hub.url(f'v1_5r2_sample-{i:04d}.json.gz') for i in range(4)
            )
            + '\n',
        },
    )
    folder, out = prepared(hub, tmp_path, 'dolma', '--target_tokens=60000', '--val_fraction=0.05')
    train = texts_of(folder, 'train')
    n = read_meta(folder)['splits']['train']['tokens']
    assert (
        60_000 <= n < 60_300
        and all(t.startswith('dolma ') for t in train)
        and 'no JSON (http://localhost' in out
        and 'took the place' not in out
    )
    # one file breaks off: what is there is kept, and when it is back the same command ends as if
    # nothing had been
    hub.fail('sample-0000.json.gz', after_bytes=9000)
    command = [
        'prepare/dolma.py',
        *FAST,
        '--target_tokens=0',
        '--name=broken',
        '--val_fraction=0.05',
    ]
    assert re.search(
        r'sample-0000.json.gz fails \(.*\); what is prepared is kept, and the same command goes on',
        fails(tmp_path, *command, env=hub.env),
    )
    assert not (tmp_path / 'data/broken/train.bin').exists() and list(
        (tmp_path / 'data/broken').glob('partial-*/state.json')
    )
    hub.failing.clear()
    run(tmp_path, *command, env=hub.env)
    run(tmp_path, *command[:-2], '--name=whole', '--val_fraction=0.05', env=hub.env)
    assert contents(tmp_path / 'data/broken') == contents(tmp_path / 'data/whole')
    assert (
        len(
            texts_of(str(tmp_path / 'data/whole'), 'train')
            + texts_of(str(tmp_path / 'data/whole'), 'val')
        )
        == 400
    )
    # a break that heals is not seen at all
    hub.fail('sample-0001.json.gz', after_bytes=5000, times=1)
    run(
        tmp_path,
        'prepare/dolma.py',
        '--tokenizer=bytes',
        '--retries=2',
        '--target_tokens=0',
        '--name=healed',
        '--val_fraction=0.05',
        env=hub.env,
    )
    assert (
        contents(tmp_path / 'data/healed') == contents(tmp_path / 'data/whole')
        and not hub.failing.clear()
    )
    del hub.repos['allenai/dolma']


@pytest.mark.slow
def test_c4_takes_the_place_of_a_dolma_that_is_not_there(hub, tmp_path):
    folder, out = prepared(hub, tmp_path, 'dolma', '--target_tokens=9000', '--val_fraction=0.05')
    assert (
        all(t.startswith('crawl ') for t in texts_of(folder, 'train'))
        and read_meta(folder)['splits']['train']['tokens'] >= 9000
    )
    last = out.splitlines()[-1]
    assert last.startswith('allenai/c4, en, train took the place of allenai/dolma')
    assert read_meta(folder)['instead'] == [last] and 'cannot be opened' in last


@pytest.mark.slow
def test_a_corpus_that_only_hiccups_is_not_replaced(hub, tmp_path):
    """A broken answer is tried again, and then an error: no C4 for Dolma, no sums for a corpus."""
    hub.files['one.json.gz'] = gzip.compress(
        b'\n'.join(json.dumps(r).encode() for r in stories(99))
    )
    hub.add('allenai/dolma', {'urls/v1_6-sample.txt': hub.url('one.json.gz')})
    hub.fail('dolma/resolve')
    dolma = ['prepare/dolma.py', '--tokenizer=bytes', '--name=d', '--val_fraction=0.1']
    assert 'allenai/dolma, urls/v1_6-sample.txt cannot be opened' in fails(
        tmp_path, *dolma, '--retries=0', env=hub.env
    )
    hub.failing.clear()
    hub.fail('dolma/resolve', times=1)
    assert 'took the place' not in run(tmp_path, *dolma, '--retries=3', env=hub.env)
    assert len(texts_of(str(tmp_path / 'data/d'), 'train')) > 60
    del hub.repos['allenai/dolma']
    gsm8k = hub.repos['openai/gsm8k']['main']
    broken = {name: data[:-99] if 'train' in name else data for name, data in gsm8k[1].items()}
    hub.repos['openai/gsm8k']['main'] = (gsm8k[0], broken)  # cut short: pyarrow says ValueError
    try:
        err = fails(
            tmp_path, 'prepare/mini_chat.py', *FAST, '--cap=5', '--val_fraction=0.2', env=hub.env
        )
    finally:
        hub.repos['openai/gsm8k']['main'] = gsm8k
    assert 'openai/gsm8k, main, train' in err and 'ArrowInvalid' in err, err


@pytest.mark.slow
def test_alpaca(hub, tmp_path):
    folder, _ = prepared(hub, tmp_path, 'alpaca', '--val_fraction=0.1')
    got = dict(learned_of(folder, 'train') + learned_of(folder, 'val'))
    assert len(got) == 200
    assert (
        got[
            '<|im_start|>user\nAdd one to 4.\n\nAs a word.<|im_end|>\n'
            '<|im_start|>assistant\n5<|im_end|>\n<|endoftext|>'
        ]
        == '5<|im_end|>'
    )


@pytest.mark.slow
def test_imdb_learns_the_label(hub, tmp_path):
    folder, _ = prepared(hub, tmp_path, 'imdb')
    for split in ('train', 'val', 'test'):
        for text, learned in learned_of(folder, split):
            assert text == text.split('Label:')[0] + 'Label:' + learned and learned in (
                ' positive<|endoftext|>',
                ' negative<|endoftext|>',
            )
            assert ('good' in text) == ('positive' in learned) and '<br' not in text
    assert (
        len(learned_of(folder, 'test')) == 100
        and len(learned_of(folder, 'train') + learned_of(folder, 'val')) == 100
    )


@pytest.mark.slow
def test_preferences_of_the_hub(hub, tmp_path):
    folder, _ = prepared(
        hub,
        tmp_path,
        'preferences',
        '--repo=someone/pairs',
        '--name=pairs',
        '--val_fraction=0.2',
        name='pairs',
    )
    got = [learned for split in ('train', 'val') for _, learned in learned_of(folder, split)]
    assert sorted(zip(got[::2], got[1::2], strict=True)) == sorted(
        (f'yes {i}<|im_end|>', f'no {i}<|im_end|>') for i in range(50)
    )
    assert 'one of --input and --repo' in fails(tmp_path, 'prepare/preferences.py', '--name=x')


@pytest.mark.slow
def test_mini_chat_mixes_its_sources_up_to_a_cap(hub, tmp_path):
    folder, out = prepared(hub, tmp_path, 'mini_chat', '--cap=30', '--val_fraction=0.1')
    got = dict(learned_of(folder, 'train') + learned_of(folder, 'val'))
    assert len(got) == 120 and 'took the place' not in out
    assert (
        got[
            '<|im_start|>user\nquestion 4<|im_end|>\n<|im_start|>assistant\nbest 4<|im_end|>\n'
            '<|im_start|>user\nand then?<|im_end|>\n<|im_start|>assistant\nnothing<|im_end|>\n'
            '<|endoftext|>'
        ]
        == 'best 4<|im_end|>nothing<|im_end|>'
    )
    assert not any(
        'question 3<' in text or 'second best' in text or 'unanswered' in text for text in got
    )  # Spanish, not ranked first, without an answer
    assert sum('####' in text for text in got) == sum('print(' in text for text in got) == 30
    articles = [text for text, learned in got.items() if text == learned]  # all of it is learned
    assert len(articles) == 30 and all(' = Train = ' in text for text in articles)
    del hub.repos['openai/gsm8k'], hub.repos['OpenAssistant/oasst1']
    folder, out = prepared(
        hub, tmp_path, 'mini_chat', '--cap=30', '--val_fraction=0.1', '--name=filled', name='filled'
    )
    got = learned_of(folder, 'train') + learned_of(folder, 'val')
    sums = [
        re.fullmatch(r'(\d+) (\+|-|times) (\d+) = (-?\d+)<\|im_end\|>', learned)
        for _, learned in got
    ]
    assert len(got) == 120 and sum(map(bool, sums)) == 60
    for a, sign, b, c in (m.groups() for m in sums if m):
        assert int(c) == {'+': int.__add__, '-': int.__sub__, 'times': int.__mul__}[sign](
            int(a), int(b)
        )
    assert (
        'synthetic arithmetic took the place of openai/gsm8k, main, train' in out
        and 'took the place of OpenAssistant/oasst1' in out
        and 'CodeAlpaca-20k, train:' not in out
    )


@pytest.mark.slow
def test_what_is_not_there_is_one_line(hub, tmp_path):
    def script(*flags):
        return fails(tmp_path, 'prepare/hub.py', *FAST, '--name=x', *flags, env=hub.env)

    assert (
        "a/b, train cannot be opened (DatasetNotFoundError: Dataset 'a/b' doesn't exist on the Hub"
        in script('--repo=a/b')
    )
    assert 'Bad split: nope' in script('--repo=roneneldan/TinyStories', '--split=nope')
    assert "BuilderConfig 'nope' not found" in script('--repo=Salesforce/wikitext', '--subset=nope')
    assert 'Config name is missing' in script('--repo=Salesforce/wikitext')
    assert 'has no field body; it has text' in script(
        '--repo=roneneldan/TinyStories', '--field=body'
    )
    assert '--repo is needed' in script()
    hub.add('a/scripted', {'scripted.py': '# x'})
    assert "Revision 'refs/convert/parquet' doesn't exist" in script('--repo=a/scripted')
    hub.add('a/gated', {'data.jsonl': '{"text": "x"}\n'})
    hub.gated.add('a/gated')
    assert 'is a gated dataset' in script('--repo=a/gated')
    hub.add('a/numbers', {'data.jsonl': '{"text": 1}\n' * 5})
    assert "gives no documents; 5 x a field 'text' that is no text" in script('--repo=a/numbers')
    assert not (tmp_path / 'data/x').exists()


@pytest.mark.slow
def test_shards_of_the_hub(hub, tmp_path):
    """By files where there are enough of them, else by rows; together they are the whole."""
    for rows in (stories(900, 'web'), None):  # of FineWeb-Edu, of WikiText
        for i in range(2):
            flags = [f'--shard={i}', '--num_shards=2']
            if rows:
                prepared(hub, tmp_path, 'fineweb_edu', '--val_fraction=0.2', *flags)
            else:
                prepared(hub, tmp_path, 'wikitext', *flags)
        name = 'fineweb_edu' if rows else 'wikitext'
        parts = [str(path) for path in sorted((tmp_path / 'data' / name).glob('shard_*'))]
        texts = [[t for s in ('train', 'val') for t in texts_of(p, s)] for p in parts]
        assert len(parts) == 2 and not set(texts[0]) & set(texts[1]) and min(map(len, texts)) > 15
        assert len(texts[0]) + len(texts[1]) == (900 if rows else 45)
        run(tmp_path, 'prepare/merge.py', f'--name={name}')
        assert sum(
            n['documents'] for n in read_meta(str(tmp_path / 'data' / name))['splits'].values()
        ) == (900 if rows else 51)


@pytest.mark.slow
def test_the_hub_goes_on_from_a_position_in_another_process(hub):
    """Shuffled, gathered and plain; in windows of 50 rows."""
    code = """
import json, sys
sys.path.insert(0, sys.argv[1])
from fledge.corpus import sources
sources.SHUFFLED = sources.WINDOW = 50
ks = [1, 2, 49, 50, 51, 123, 250, 300, 301, 449]
def is_title(row, before):
    return row['text'].startswith(' = T') and not before['text']
makes = [
    lambda: sources.Hub('HuggingFaceFW/fineweb-edu', 'sample-10BT', columns=['text'], shuffle=3),
    lambda: sources.Hub('Salesforce/wikitext', 'wikitext-103-raw-v1', starts=is_title),
    lambda: sources.Hub('allenai/c4', 'en', columns=['text']),
    lambda: sources.Hub('yahma/alpaca-cleaned'),
]
if len(sys.argv) == 2:
    out = []
    for make in makes:
        for n in (1, 2):
            whole = list(make().read(None, n - 1, n))
            for k in ks:
                if k <= len(whole):
                    rest = [r[:2] for r in whole[k:]]
                    out.append([makes.index(make), n, whole[k - 1][2], rest])
    print(json.dumps(out))
else:
    tried = json.load(sys.stdin)
    for which, n, position, rest in tried:
        got = json.loads(json.dumps([r[:2] for r in makes[which]().read(position, n - 1, n)]))
        assert got == rest, (which, n, position, got[:2], rest[:2])
        if rest:  # and from one of that reading's, before its first window is through
            position = next(makes[which]().read(position, n - 1, n))[2]
            got = json.loads(json.dumps([r[:2] for r in makes[which]().read(position, n - 1, n)]))
            assert got == rest[1:], (which, n, position, got[:2], rest[1:3])
    print(len(tried))
"""
    env = os.environ | hub.env
    first = subprocess.run(
        [sys.executable, '-c', code, ROOT], env=env, capture_output=True, text=True
    )
    assert first.returncode == 0, first.stderr
    second = subprocess.run(
        [sys.executable, '-c', code, ROOT, 'again'],
        input=first.stdout,
        env=env,
        capture_output=True,
        text=True,
    )
    assert second.returncode == 0 and int(second.stdout) > 40, second.stderr


@pytest.mark.slow
def test_a_tokenizer_trained_on_a_stream(hub, tmp_path):
    run(
        tmp_path,
        'prepare/tinystories.py',
        '--retries=0',
        '--tokenizer=train',
        '--vocab_size=275',
        '--train_bytes=10000',
        env=hub.env,
    )
    folder = str(tmp_path / 'data/tinystories')
    assert load_tokenizer(folder).vocab_size == 275 and len(texts_of(folder, 'train')) == 600
    run(
        tmp_path,
        'prepare/hub.py',
        '--repo=roneneldan/TinyStories',
        '--name=again',
        f'--tokenizer={folder}',
        env=hub.env,
    )
    assert load_tokenizer(str(tmp_path / 'data/again')).spec == load_tokenizer(folder).spec


@pytest.mark.slow
def test_a_stream_that_breaks_is_kept_and_goes_on_when_it_is_back(tmp_path):
    """Half a minute, nearly all of it the patience of huggingface_hub, which retries first."""
    rows = [
        {'text': f'{i} ' + ''.join(random.Random(i).choices('abcdefgh ', k=2000))}
        for i in range(4000)
    ]
    with Hub() as hub:
        hub.add(
            'someone/rows',
            {
                f'data/train-{i:05d}-of-00002.parquet': parquet_bytes(
                    rows[i * 2000 : i * 2000 + 2000], row_group_size=200
                )
                for i in range(2)
            },
        )
        command = ['prepare/hub.py', '--repo=someone/rows', *FAST, '--val_fraction=0.1']
        run(tmp_path, *command, '--name=whole', env=hub.env)
        hub.fail('train-00001', after_bytes=2_000_000)
        err = fails(tmp_path, *command, '--name=broken', env=hub.env)
        assert re.search(
            r'someone/rows, train fails after [\d,]+ rows \(.*\); what is prepared is kept, '
            'and the same command goes on',
            err,
        ), err
        state = json.loads(
            next((tmp_path / 'data/broken').glob('partial-*/state.json')).read_text()
        )
        assert 1500 < sum(n['documents'] for n in state['splits'].values()) < 4000
        hub.failing.clear()
        run(tmp_path, *command, '--name=broken', env=hub.env)
        assert contents(tmp_path / 'data/broken') == contents(tmp_path / 'data/whole')


@pytest.mark.slow
def test_no_network_at_all(tmp_path):
    """Half a minute, as above."""
    with Hub() as hub:
        env = hub.env
    assert (
        "train cannot be opened (ConnectionError: Couldn't reach 'someone/rows' on the Hub"
        in fails(tmp_path, 'prepare/hub.py', '--repo=someone/rows', '--name=x', *FAST, env=env)
    )
    assert not os.path.exists(tmp_path / 'data/x')


@pytest.mark.slow
def test_smol_smoltalk(hub, tmp_path):
    def talks(split, n):
        messages = [
            [
                dict(role='user', content=f'{split} question {i}'),
                dict(role='assistant', content=f'answer {i}'),
            ]
            for i in range(n)
        ]
        return parquet_bytes([dict(messages=m, source='x') for m in messages])

    hub.add(
        'HuggingFaceTB/smol-smoltalk',
        {f'data/{s}-00000-of-00001.parquet': talks(s, n) for s, n in (('train', 60), ('test', 7))},
    )
    folder, _ = prepared(hub, tmp_path, 'smol_smoltalk')
    assert len(learned_of(folder, 'train')) == 60 and len(learned_of(folder, 'val')) == 7
    assert any('test question 3' in text for text, _ in learned_of(folder, 'val'))
