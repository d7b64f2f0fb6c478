"""How fast this machine trains and generates, where the time goes, and how a peer does beside it.

python bench.py config/dolma_75m.py --dropout=0 --only=train --compare=../nanoGPT
python bench.py config/gpt2_124m.py --only=generate --compare=transformers --json
python bench.py config/shakespeare_char_fast.py --only=loss --compare=../nanoGPT
python bench.py --all --compare=../nanoGPT
"""

import contextlib
import functools
import importlib.util
import itertools
import json as json_
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace

import torch
from torch import nn

from encoder_decoder import make_model
from fledge import UserError, benchmark, checkpoint, cpu, depth, time_to_loss
from fledge import quantize as quantization
from fledge.configurator import configure, given, one_of, read_settings
from fledge.device import Machine, flops_per_token, matmul_params, peak_flops, read_bandwidth
from fledge.formats import families
from fledge.tokenizer import find_tokenizer
from fledge.tokens import find_data, split_files, write_bin

TRAIN = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'train.py')
# -----------------------------------------------------------------------------
# These settings, and all of train.py's. A step is one micro-batch and one update.
only = 'all'  # train, generate, all (these two), loss (seconds to nanoGPT's val loss)
all = False  # all of it in ten minutes, with the model's tests, as one table in Markdown
compare = ''  # a nanoGPT checkout's folder (eager and compiled), or transformers (generation alone)
rounds = 5  # runs of each contender, taken in turn
seconds = 2.0  # the least that a run lasts
streams = 1  # texts generated at once
prompt_tokens = 16  # length of each prompt
new_tokens = 128  # generated after each prompt, greedily
long_prompt = 900  # the prompt whose first token is timed; at most block_size - 1
quantize = 'none'  # the weights of fledge's generation: none, int8
picture = 'time_to_loss.png'  # a PNG of what only=loss measures
profile = False  # write bench_train.json and bench_generate.json, which ui.perfetto.dev opens
json = False  # the last line of output is one JSON object
config = configure(globals(), also=TRAIN)
if config['one_dial']:  # of what follows from a depth, its shape is measured
    config = depth.shape_of(config, given, config['n_layer']) | dict(one_dial=False)
s = SimpleNamespace(**config)  # the same; train.py's go by this name
# -----------------------------------------------------------------------------
one_of(config, compile=('auto', True, False), only=('train', 'generate', 'loss', 'all'))
one_of(config, quantize=('none', 'int8'))
if only in ('generate', 'all') and prompt_tokens + new_tokens > s.block_size:
    raise UserError(
        f'{prompt_tokens} + {new_tokens} tokens (prompt_tokens, new_tokens) are longer than '
        f'block_size={s.block_size}'
    )
if compare == 'transformers':
    if only == 'train':
        raise UserError('compare=transformers is for generation')
    if importlib.util.find_spec('transformers') is None:
        raise UserError('the package transformers is not installed: pip install transformers')
elif compare and not os.path.exists(os.path.join(compare, 'model.py')):
    raise UserError(
        f"compare={compare} is neither transformers nor a folder with nanoGPT's model.py"
    )
if only == 'loss' and compare in ('', 'transformers'):
    raise UserError('only=loss is beside nanoGPT: name a checkout of it, --compare=../nanoGPT')
machine = Machine(s.device, s.dtype)


@dataclass
class Contender:
    """A model, and what is timed of it in a process of its own."""

    model: nn.Module
    run: Callable[[], float]  # seconds of a step, or of a token of each stream, again and again
    once: Callable[[], None]  # what --profile traces
    parts: Callable[[], dict] | None = None  # seconds by part, of a run


@dataclass
class Measured:
    """What was measured of a contender."""

    name: str
    n_params: int
    seconds: list = field(default_factory=list)  # of each round
    peak_memory: int = 0  # bytes


def gpt_config():
    """The GPTConfig of these settings; GPT-2's vocabulary where the data is not there."""
    return checkpoint.config_of(config, find_tokenizer(os.path.join('data', s.dataset)))


def clock(f, least):
    """Seconds a call of f, which is called for at least `least` seconds."""
    machine.synchronize()
    began, n = time.perf_counter(), 0
    while n == 0 or time.perf_counter() - began < least:
        f()
        n += 1
        machine.synchronize()
    return (time.perf_counter() - began) / n


def train_script():
    """train.py's names, when it has made all of these settings and --dry_run stops it.

    Where there is no data it trains on random tokens, which are as fast as any; an encoder needs
    real sources and targets.
    """
    if s.n_encoder_layer:
        find_data(s.dataset, s.vocab_size, make_default=True, with_sources=True)
    values = {name: config[name] for name in read_settings(TRAIN) if name in config}
    values |= dict(vocab_size=gpt_config().vocab_size, gradient_accumulation_steps=1)
    values |= dict(init_from='scratch', dry_run=True)
    with tempfile.TemporaryDirectory() as folder:
        if not split_files(os.path.join('data', s.dataset), 'train'):
            values['dataset'] = folder
            for split in ('train', 'val'):
                n_tokens = 4 * s.batch_size * s.block_size + 2
                ids = torch.randint(values['vocab_size'], (n_tokens,)).numpy()
                write_bin(os.path.join(folder, f'{split}.bin'), ids, values['vocab_size'])
        settings = os.path.join(folder, 'settings.json')
        with open(settings, 'w', encoding='utf-8') as f:
            json_.dump(values, f)
        # a config file's objective comes by the file itself
        own = callable(globals()['objective'])
        configs = [a for a in sys.argv[1:] if own and a.endswith('.py')]
        sys.argv = [TRAIN, *configs, settings]
        with open(TRAIN, encoding='utf-8') as f:
            source = f.read()
        names = {'__name__': 'train', '__file__': TRAIN}
        with contextlib.redirect_stdout(None), contextlib.suppress(SystemExit):
            exec(source, names)
    return names


def train_fledge():
    """A Contender that takes train.py's own steps."""
    train = train_script()
    model, step, marks = train['model'], 2, {}

    def take_step():
        nonlocal step
        train['train_step'](step, 0.0)
        step += 1

    def mark(part):
        machine.synchronize()
        marks[part] = time.perf_counter()

    def parts():
        # each part ends where the next begins, and the backward pass with the last gradient
        hooks = [
            model.register_forward_pre_hook(lambda *_: mark('data')),
            model.transformer.ln_f.register_forward_hook(lambda *_: mark('forward')),
            model.register_forward_hook(lambda *_: mark('head and loss')),
        ]
        for p in model.parameters():
            if p.requires_grad:
                hooks.append(p.register_post_accumulate_grad_hook(lambda _: mark('backward')))
        mark('start')
        take_step()
        mark('optimizer')
        for hook in hooks:
            hook.remove()
        ends = itertools.pairwise(marks.items())
        return {part: end - start for (_, start), (part, end) in ends}

    is_compiled = train['network'] is not model  # which hooks would compile again
    run = functools.partial(clock, take_step, seconds)
    return Contender(model, run, take_step, None if is_compiled else parts)


def nanogpt(path):
    """nanoGPT's own model.py, of a checkout."""
    names = ('block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd', 'dropout', 'bias')
    sizes = {name: getattr(gpt_config(), name) for name in names}
    return time_to_loss.load_nanogpt(path, sizes, machine.device)


def train_nanogpt(path, compiled):
    """nanoGPT's step, as its train.py takes it: float32 on a CPU, autocast on a GPU, AdamW."""
    model = nanogpt(path)
    network = torch.compile(model) if compiled else model
    theirs = time_to_loss.nanogpts_machine(machine.device, s.dtype)
    step = time_to_loss.nanogpts_step(model, network, theirs, config)
    shape = (2, s.batch_size, s.block_size)
    x, y = torch.randint(model.config.vocab_size, shape, device=machine.device)

    def take_step():
        step(x, y, learning_rate=0.0)  # any is as fast

    return Contender(model, functools.partial(clock, take_step, seconds), take_step)


def generating(model, generate, forward=None):
    """A Contender that calls generate(prompts, n): seconds a token of each stream, after the first.

    forward(prompt): one pass, beside which the first token after a long prompt is timed.
    """
    vocabulary = gpt_config().vocab_size
    prompts = torch.randint(vocabulary, (streams, prompt_tokens), device=machine.device)
    length = min(long_prompt, s.block_size - 1)
    long = torch.randint(vocabulary, (1, length), device=machine.device)

    def run():
        first = clock(lambda: generate(prompts, 1), seconds / 4)
        return (clock(lambda: generate(prompts, new_tokens), seconds) - first) / (new_tokens - 1)

    def parts():
        least = min(1, seconds)
        first_token = clock(lambda: generate(long, 1), least)
        return {'first token': first_token, 'forward pass': clock(lambda: forward(long), least)}

    return Contender(model, run, lambda: generate(prompts, 8), parts if forward else None)


def generate_fledge():
    model = make_model(gpt_config()).to(machine.device, machine.dtype).eval()
    if quantize == 'int8':
        quantization.apply(model)
    if s.compile is True:
        model.compile()
    elif machine.type == 'cpu':
        cpu.speed_up(model, packed=True)

    has_encoder = model.config.n_encoder_layer > 0

    def generate(prompts, n):
        if has_encoder:  # the prompt is a source
            return model.generate(prompts[:, :1], n, temperature=0, source=prompts)
        return model.generate(prompts, n, temperature=0)

    @torch.no_grad()
    def forward(prompt):
        return model(prompt, source=prompt if has_encoder else None)

    return generating(model, generate, forward)


def generate_nanogpt(path):
    model = nanogpt(path).eval()
    return generating(model, lambda prompts, n: model.generate(prompts, n))


def generate_transformers(kind):
    """The same shapes in transformers: its own generate, greedy, with its cache."""
    import transformers

    theirs = families.config_of(gpt_config())
    theirs |= dict(bos_token_id=0, eos_token_id=None, pad_token_id=0)
    their_config = transformers.AutoConfig.for_model(**theirs)
    model = transformers.AutoModelForCausalLM.from_config(their_config)
    model = model.to(machine.device, getattr(torch, kind)).eval()

    def generate(prompts, n):
        return model.generate(prompts, max_new_tokens=n, min_new_tokens=n, do_sample=False)

    return generating(model, generate)


contender = None  # in a process of its own: the Contender that it times


def make_contender(make, arguments):
    """Have make() make the contender of this process; returns its number of parameters."""
    global contender
    torch.manual_seed(s.seed)
    contender = make(*arguments)
    contender.run()  # warms up, and compiles
    return sum(p.numel() for p in contender.model.parameters())


def run_contender():
    return contender.run()


def parts_of_contender():
    """Its seconds by part, or None where they cannot be told."""
    times = None
    if contender.parts:
        for _ in range(3):  # the first ones warm up
            times = contender.parts()
    return times


def trace_contender(path):
    """Write what it does as a trace, which Perfetto opens."""
    with torch.profiler.profile() as trace:
        contender.once()
    trace.export_chrome_trace(path)


def peak_memory_of_contender():
    return machine.peak_memory()


def race(contenders, trace_path):
    """Run contenders, {name: (function that makes one, its arguments)}, in turn; ours is the first.

    Returns a Measured of each, and our seconds by part. With --profile ours is traced.
    """
    with contextlib.ExitStack() as stack:
        processes, measured = {}, []

        def ask(name, function, *arguments):
            return benchmark.ask(processes[name], name, function, *arguments)

        for name, (make, arguments) in contenders.items():
            processes[name] = stack.enter_context(benchmark.process_of_its_own())
            measured.append(Measured(name, ask(name, make_contender, make, arguments)))
        for _ in range(rounds):
            for each in measured:
                each.seconds.append(ask(each.name, run_contender))
        ours = measured[0].name
        parts = ask(ours, parts_of_contender)
        if profile:
            ask(ours, trace_contender, trace_path)
        for each in measured:
            each.peak_memory = ask(each.name, peak_memory_of_contender)
    return measured, parts


def table(measured, n_tokens, share, limit):
    """Print a line for each Measured; returns them as dicts.

    n_tokens: of a run; limit: the tokens a second of which ours are a share; share: its title.
    """
    titles = f'{"parameters":>10}{"tokens/s":>10}{share:>18}{"peak memory":>14}'
    print(f'  {"":28}{titles}   fledge is faster by, pair by pair')
    lines, ours = [], measured[0]
    for each in measured:
        ratios = [theirs / mine for theirs, mine in zip(each.seconds, ours.seconds, strict=True)]
        line = dict(
            name=each.name,
            parameters=each.n_params,
            tokens_per_second=n_tokens / statistics.median(each.seconds),
            peak_memory=each.peak_memory,
            ratio=statistics.median(ratios),
            ratio_range=[min(ratios), max(ratios)],
        )
        lines.append(line)
        speed = line['tokens_per_second']
        share_of_limit = f'{speed / limit:.1%}' if each is ours else ''
        words = f'  {each.name:28}{each.n_params / 1e6:>9,.1f}M{speed:>10,.1f}'
        words += f'{share_of_limit:>18}{each.peak_memory / 1e9:>11.2f} GB'
        if each is not ours:
            words += f'   {line["ratio"]:.2f}x ({min(ratios):.2f} to {max(ratios):.2f})'
        print(words)
    return lines


def bench_training():
    """Print training's table; returns its entries of the JSON object, and the matmul peak."""
    contenders = {'fledge': (train_fledge, ())}
    if compare and compare != 'transformers':
        contenders['nanoGPT, eager'] = (train_nanogpt, (compare, False))
        if s.compile is not False:
            contenders['nanoGPT, compiled'] = (train_nanogpt, (compare, True))
    words = f'{s.batch_size} x {s.block_size} tokens a step'
    print(f'\ntraining: {parameters / 1e6:.1f}M parameters, {words}')
    before = peak_flops(machine.device, machine.dtype)
    measured, parts = race(contenders, 'bench_train.json')
    peak = max(before, peak_flops(machine.device, machine.dtype))  # machines have slow moments
    limit = peak / flops_per_token(model, s.block_size)
    n_tokens = s.batch_size * s.block_size
    ours, *peers = table(measured, n_tokens, 'of matmul peak', limit)
    if parts:
        total = sum(parts.values())
        shares = [f'{k} {v * 1e3:,.1f} ms ({v / total:.1%})' for k, v in parts.items()]
        print(f'  a step: {", ".join(shares)}')
    speed = ours['tokens_per_second']
    return dict(
        train_tokens_per_second=speed,
        peak_share=speed / limit,
        train_peak_memory=ours['peak_memory'],
        parts=parts,
        train_peers=peers,
        matmul_peak=peak,
    )


def bench_generation():
    """Print generation's table; returns its entries of the JSON object."""
    contenders = {'fledge': (generate_fledge, ())}
    if compare == 'transformers':
        for kind in dict.fromkeys(('float32', str(machine.dtype)[6:])):
            contenders[f'transformers, {kind}'] = (generate_transformers, (kind,))
    elif compare:
        contenders['nanoGPT'] = (generate_nanogpt, (compare,))
    print(f'\ngeneration: {streams} x {new_tokens} tokens after {prompt_tokens}')
    before = read_bandwidth(machine.device)
    measured, parts = race(contenders, 'bench_generate.json')
    bandwidth = max(before, read_bandwidth(machine.device))
    bytes_per_weight = 1 if quantize == 'int8' else machine.dtype.itemsize
    if machine.type == 'cpu' and streams <= cpu.rows_in_float16(model.lm_head.weight):
        bytes_per_weight = min(bytes_per_weight, 2)
    limit = bandwidth / (matmul_params(model) * bytes_per_weight) * streams
    ours, *peers = table(measured, streams, 'of memory read', limit)
    first, forward = parts['first token'], parts['forward pass']
    print(
        f'  after {min(long_prompt, s.block_size - 1)} tokens: the first token {first:.3f} s, '
        f'one forward pass {forward:.3f} s'
    )
    return dict(
        decode_tokens_per_second=ours['tokens_per_second'],
        bandwidth_share=ours['tokens_per_second'] / limit,
        first_token_seconds=first,
        forward_seconds=forward,
        generate_peers=peers,
        memory_bandwidth=bandwidth,
    )


def bench_loss():
    """Print and draw val losses over seconds, ours and nanoGPT's; returns entries of the JSON."""
    find_data(s.dataset, s.vocab_size, make_default=True)
    settings = {name: config[name] for name in read_settings(TRAIN)}
    compiles = machine.type == 'cuda' and s.compile is not False  # as train.py does
    theirs = (s.dataset, gpt_config().vocab_size, machine.device, s.dtype, compiles)
    curves = {'fledge': [], 'nanoGPT': []}
    for seed in range(s.seed, s.seed + rounds):
        for name, function, arguments in (
            ('nanoGPT', time_to_loss.nanogpts_curve, (compare, *theirs, seed)),
            ('fledge', time_to_loss.our_curve, (TRAIN, settings | dict(seed=seed))),
        ):
            with benchmark.process_of_its_own() as process:
                curves[name].append(benchmark.ask(process, name, function, *arguments))
    goals = [curve[-1][1] for curve in curves['nanoGPT']]  # its last losses, one of each seed
    goal = statistics.median(goals)
    result = dict(loss=goal, curves=curves)
    print(f'\nval loss on {s.dataset}: seconds of training to that with which nanoGPT ends')
    times, drawn = {}, {}
    for name, runs in curves.items():
        times[name] = list(map(time_to_loss.seconds_to, goals, runs))
        median = statistics.median(times[name])
        is_reached = math.isfinite(median)
        result[f'{name.lower()}_seconds'] = median if is_reached else None
        words = f'{median:.1f} s to {goal:.3f}' if is_reached else f'{goal:.3f} was not reached'
        label = f'{name}: {words}'
        drawn[label] = runs
        end_seconds, end_loss = map(statistics.median, zip(*[run[-1] for run in runs], strict=True))
        spread = f'({min(times[name]):.1f} to {max(times[name]):.1f})'
        print(f'  {label} {spread}; {end_loss:.4f} at its end, after {end_seconds:.1f} s')
    pairs = zip(times['fledge'], times['nanoGPT'], strict=True)
    ratios = [peers / ours for ours, peers in pairs]
    ratio = statistics.median(ratios)
    print(f'  fledge is faster by {ratio:.2f}x ({min(ratios):.2f} to {max(ratios):.2f})')
    title = f'Val loss on {s.dataset}, and seconds to that with which nanoGPT ends\n'
    title += f'{machine.hardware()}, {torch.get_num_threads()} threads, {time.strftime("%Y-%m-%d")}'
    time_to_loss.draw(drawn, goal, title, picture)
    return result | dict(ratio=ratio, ratio_range=[min(ratios), max(ratios)])


if __name__ == '__main__':
    with torch.device('meta'):  # for its sizes: bench_training and bench_generation read them
        model = make_model(gpt_config())
    parameters = model.get_num_params(non_embedding=False)
    result = dict(device=machine.device, dtype=str(machine.dtype)[6:], parameters=parameters)
    result |= dict(threads=torch.get_num_threads(), torch=torch.__version__)
    result |= dict(hardware=machine.hardware(), cpu=cpu.kind())
    if all:
        own = given - {'all', 'compare', 'json'}
        flags = [f'--{name}={config[name]}' for name in sorted(own)]
        result = benchmark.run_all(machine, compare, flags)
    else:
        if only in ('train', 'all'):
            result |= bench_training()
        if only in ('generate', 'all'):
            result |= bench_generation()
        if only == 'loss':
            result |= bench_loss()
        result.setdefault('matmul_peak', peak_flops(machine.device, machine.dtype))
        if 'memory_bandwidth' not in result:
            result['memory_bandwidth'] = read_bandwidth(machine.device)
        print(
            f'\n{machine.device}: {result["hardware"]}, {result["threads"]} threads, '
            f'torch {torch.__version__}; '
            f'{result["dtype"]} matmul peak {result["matmul_peak"] / 1e9:,.0f} GFLOP/s, '
            f'memory read {result["memory_bandwidth"] / 1e9:.1f} GB/s'
        )
    if json:
        print(json_.dumps(result))
