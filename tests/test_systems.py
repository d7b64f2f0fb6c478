"""Windows and macOS: what they lack is taken away; and Apple's GPUs: one type an operation."""

import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, TINY
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from encoder_decoder import beam_search, make_model
from fledge import optimizers
from model import GPTConfig

# Put before every script: what Windows lacks is gone, and a file that is open keeps its name.
ELSEWHERE = """
import builtins, io, multiprocessing, os, signal, sys, warnings

import psutil  # it and filelock have another way on Windows

warnings.filterwarnings('ignore', message='only soft file lock')
for name in ('fcntl', 'resource', 'pwd', 'grp', 'termios'):
    sys.modules[name] = None
for name in ('fork', 'forkpty', 'link', 'symlink', 'sched_getaffinity', 'getuid', 'fchmod'):
    delattr(os, name)
for name in ('SIGALRM', 'SIGPIPE', 'SIGXFSZ'):
    delattr(signal, name)
multiprocessing.get_all_start_methods = lambda: ['spawn']
listen, real_open, real_os_open = signal.signal, open, os.open


def only_interrupt(number, handler):
    if number != signal.SIGINT:
        raise ValueError('no such signal')
    return listen(number, handler)


def open_text(path, mode='r', buffering=-1, encoding=None, *rest, **options):
    asks = sys._getframe(1).f_globals['__name__']
    if str(path).startswith('/proc') and not asks.startswith(('psutil', 'filelock')):
        raise FileNotFoundError(2, 'no such file', path)
    if 'b' not in mode and encoding in (None, 'locale'):
        encoding = 'cp1252'
    return real_open(path, mode, buffering, encoding, *rest, **options)


def open_number(path, *args, **options):
    if os.path.isdir(path):
        raise PermissionError(13, 'a folder cannot be opened', path)
    return real_os_open(path, *args, **options)


def files_held():
    names = set()
    for number in os.listdir('/proc/self/fd'):
        try:
            names.add(os.readlink('/proc/self/fd/' + number))
        except OSError:
            pass
    with real_open('/proc/self/maps', encoding='utf-8') as f:
        names |= {line.split(maxsplit=5)[5].strip() for line in f if len(line.split()) > 5}
    return names


def only_if_closed(change):
    def call(*paths, **options):
        if not options.get('dir_fd'):
            held = files_held()
            for path in map(os.path.abspath, paths):
                inside = [name for name in held if name == path or name.startswith(path + os.sep)]
                if inside:
                    raise PermissionError(13, f'{inside[0]} is open', path)
        return change(*paths, **options)

    return call


signal.signal = only_interrupt
builtins.open = io.open = open_text
os.open = open_number
for name in ('replace', 'rename', 'remove', 'unlink'):
    setattr(os, name, only_if_closed(getattr(os, name)))
"""
# Names of files are UTF-8 there, what a terminal or a pipe takes is not.
CP1252 = dict(LC_ALL='C.UTF-8', PYTHONUTF8='0', PYTHONIOENCODING='cp1252')


@pytest.fixture
def elsewhere(tmp_path):
    """A function that runs a script of ours in `tmp_path/Ω my files`, and returns its stdout."""
    folder = tmp_path / 'Ω my files'
    folder.mkdir()
    (tmp_path / 'site').mkdir()
    (tmp_path / 'site/sitecustomize.py').write_text(ELSEWHERE, encoding='utf-8')
    env = os.environ | CP1252 | dict(PYTHONPATH=str(tmp_path / 'site'))

    def call(script, *args, **options):
        command = [sys.executable, os.path.join(ROOT, script), *args]
        done = subprocess.run(
            command, cwd=folder, env=env, capture_output=True, timeout=300, **options
        )
        out, err = done.stdout.decode('cp1252'), done.stderr.decode('cp1252', 'replace')
        assert done.returncode == 0, f'{script}\n{out}\n{err}'
        assert 'Warning' not in err, err
        return out

    call.folder = folder
    return call


def write_crlf(path, text):
    path.write_bytes(text.replace('\n', '\r\n').encode())


@pytest.mark.slow
def test_a_model_is_made_and_used_without_what_windows_lacks(elsewhere):
    folder = elsewhere.folder
    words = 'the naïve café, Ωmega and ☀ were there again\n'
    write_crlf(folder / 'größe 1.txt', words * 300)
    write_crlf(folder / 'größe 2.txt', 'another text, with a tab\tand more\n' * 300)
    records = [json.dumps({'text': f'{i} {words}'}, ensure_ascii=False) for i in range(200)]
    write_crlf(folder / 'größe.jsonl', '\n'.join(records) + '\n')
    source = '--input=größe 1.txt,größe 2.txt,größe.jsonl'
    name = '--name=größe Ω'
    train_bpe = ['--tokenizer=train', '--vocab_size=300', '--val_fraction=0.1', '--num_proc=2']
    elsewhere('prepare/text.py', source, name, *train_bpe)
    data = folder / 'data/größe Ω'
    assert sorted(os.listdir(data)) == ['meta.json', 'tokenizer.json', 'train.bin', 'val.bin']
    meta = json.loads((data / 'meta.json').read_text(encoding='utf-8'))
    assert sum(split['documents'] for split in meta['splits'].values()) == 202

    tokens = json.loads((data / 'tokenizer.json').read_text(encoding='utf-8'))['model']['merges']
    assert 'č' not in str(tokens), 'a carriage return'
    assert elsewhere('prepare/look.py', 'größe Ω', '--documents=202').count('\\r') == 0

    write_crlf(data / 'tokenizer.json', (data / 'tokenizer.json').read_text(encoding='utf-8'))
    write_crlf(folder / 'größe.py', "# ☀\nout_dir = 'out größe'\nmax_iters = 20\n")
    write_crlf(folder / 'größe.json', '{\n"sample_start": "Ω\\ncafé"\n}\n')
    tiny = [*TINY[1:], '--dataset=größe Ω', 'größe.py', 'größe.json', '--eval_interval=10']
    elsewhere('train.py', *tiny)
    more = ['--init_from=resume', '--max_iters=40']
    assert 'step' in elsewhere('train.py', *tiny, *more)
    elsewhere('train.py', *tiny)  # the run that is there moves aside
    assert (folder / 'out größe/previous-1/ckpt.pt').exists()
    assert not (folder / 'out größe/.lock').exists()

    out = '--out_dir=out größe'
    write_crlf(folder / 'Fragen ☀.txt', 'Ω one\ncafé two\n')
    elsewhere(
        'sample.py',
        out,
        '--prompts=Fragen ☀.txt',
        '--output=Antworten ☀.json',
        '--max_new_tokens=5',
    )
    answers = (folder / 'Antworten ☀.json').read_text(encoding='utf-8')
    assert 'café two' in answers and '\\r' not in answers
    assert 'perplexity' in elsewhere('evaluate.py', out, '--device=cpu')
    for kind, output in (('hf', 'für Ω'), ('gguf', 'für Ω.gguf')):
        elsewhere('export.py', out, f'--format={kind}', f'--output={output}')
        elsewhere('export.py', out, f'--format={kind}', f'--output={output}', '--overwrite')
    write_crlf(folder / 'für Ω/config.json', (folder / 'für Ω/config.json').read_text())
    elsewhere('sample.py', '--init_from=für Ω', '--start=Ω', '--max_new_tokens=5')
    assert not list(folder.rglob('.export-*')) and not list(folder.rglob('*.tmp'))


def test_pairs_with_windows_line_ends_have_no_carriage_return(elsewhere):
    write_crlf(elsewhere.folder / 'p.tsv', ''.join(f'{i} Ω\té {i}\n' for i in range(200)))
    elsewhere('prepare/translate.py', '--input=p.tsv', '--name=p', '--tokenizer=chars')
    spec = json.loads((elsewhere.folder / 'data/p/tokenizer.json').read_text(encoding='utf-8'))
    assert '\r' not in spec['model']['vocab'] and 'é' in json.dumps(spec, ensure_ascii=False)


@pytest.mark.parametrize('lacking, killed', [(True, False), (False, False), (False, True)])
def test_a_folder_is_one_process_s_until_it_ends(elsewhere, lacking, killed):
    """However it ends; lacking: filelock itself has no fcntl, and leaves a file in its place."""
    folder = elsewhere.folder
    lock = 'import sys; sys.path.insert(0, sys.argv[1]); from fledge import lock_folder\n'
    lock += 'lock = lock_folder(".", wait=False); print("held", flush=True); '
    env = os.environ | CP1252 | dict(PYTHONPATH=str(folder.parent / 'site') if lacking else '')
    command = [sys.executable, '-c', lock + 'input()', ROOT]
    pipes = dict(cwd=folder, env=env, text=True)
    pipes |= dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    first = subprocess.Popen(command, **pipes)
    assert first.stdout.readline() == 'held\n'
    second = subprocess.Popen(command, **pipes)
    assert 'another process is writing to .' in second.communicate()[1]
    if killed:
        first.kill()
    first.communicate('\n')
    third = subprocess.Popen(command, **pipes)
    out, err = third.communicate('\n')
    assert out == 'held\n' and third.returncode == 0, err
    assert not (folder / '.lock').exists()


class OneType(TorchDispatchMode):
    """Each operation takes floating tensors of one type, and none of float64, but for casts.

    Where the caller asks for 16 bits, sums and products of float32 and those are float32 on every
    device: a block's result is added to the residual stream.
    """

    CASTS = ('_to_copy', 'copy_', '_foreach_copy_')
    PROMOTED = ('add', 'mul')

    def __init__(self, autocast):
        super().__init__()
        self.autocast, self.types = autocast, set()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out = operation(*args, **kwargs or {})
        given, made = ({t.dtype for t in floating(x)} for x in ((args, kwargs), out))
        name = operation.overloadpacket.__name__
        assert torch.float64 not in given | made, f'{name} has float64'
        may_mix = self.CASTS + (self.PROMOTED if self.autocast else ())
        assert len(given) < 2 or name in may_mix, f'{name} mixes {given}'
        self.types |= given | made
        return out


def floating(values):
    return [v for v in tree_leaves(values) if torch.is_tensor(v) and v.is_floating_point()]


GPT2 = dict(dropout=0.1)
QWEN3 = dict(n_kv_head=1, position='rope', norm='rmsnorm', activation='swiglu', qk_norm=True)
QWEN3 |= dict(bias=False, tie_embeddings=False)
PAPER = dict(n_encoder_layer=1, position='sinusoidal', norm_first=False, activation='relu')


@pytest.mark.slow
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize('switches', [GPT2, QWEN3, PAPER], ids=['gpt2', 'qwen3', 'paper'])
@pytest.mark.parametrize('optimizer', ['adamw', 'muon'])
def test_no_operation_mixes_types(optimizer, switches, dtype):
    """Apple's GPUs refuse such operations, and have no float64."""
    torch.manual_seed(0)
    sizes = dict(block_size=16, vocab_size=41, n_layer=2, n_head=2, n_embd=16)
    idx = torch.randint(41, (2, 12))
    documents = torch.arange(12).expand(2, 12) // 6
    source = {}
    if switches is PAPER:
        source = dict(source=torch.randint(41, (2, 5)))
    halved = dtype != torch.float32
    whole, autocast = OneType(halved), torch.autocast('cpu', dtype, enabled=halved)
    with whole, sdpa_kernel(SDPBackend.MATH):  # a fused one mixes types of its own
        model = make_model(GPTConfig(**sizes | switches))
        several = optimizers.make_optimizers(model, optimizer, 1e-3, 0.1, (0.9, 0.95), dtype)
        for group in several[0].param_groups:
            group.update(fused=False, foreach=True)  # as on those GPUs
        for _ in range(2):
            with autocast:
                loss = model(idx, idx, return_logits=False, **source)[1]
                if not source:
                    loss = loss + model(idx, idx, documents=documents)[1]
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for each in several:
                each.step()
                each.zero_grad()
        model.eval()
        rows = [[1, 2, 3], [4]]
        with autocast:
            model.generate(rows, 14, 0.8, top_p=0.9, repetition_penalty=1.2, **source)
            model.generate(rows, 5, 0.8, 5, min_p=0.1, **source)
            if source:
                model.generate(rows, 5, num_beams=2, **source)
            else:
                beam_search(model, rows, 5, 2)
    assert whole.types == {torch.float32, dtype}
    state = [t for each in several for t in floating(each.state_dict())]
    assert {t.dtype for t in [*state, *model.parameters()]} == {torch.float32}
