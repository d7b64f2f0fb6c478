"""How fast this machine trains and generates with the settings at hand, where the time goes, and how a peer does beside it.

python bench.py config/dolma_75m.py --dropout=0 --only=train --compare=../nanoGPT
python bench.py config/gpt2_124m.py --only=generate --compare=transformers --json
"""

import importlib.util
import json as json_
import math
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from dataclasses import fields

import torch

from fledge import UserError, int8, optimizers
from fledge.configurator import at_least, configure, one_of
from fledge.device import (
    autocast_to,
    choose_device,
    choose_dtype,
    keep_memory,
    peak_flops,
    read_bandwidth,
)
from fledge.tokenizer import find_tokenizer
from fledge.tokens import Tokens, split_files, write_bin
from model import GPT, GPTConfig

# -----------------------------------------------------------------------------
# These settings, and all of train.py's. A step is one micro-batch, batch_size x block_size tokens, and one update.
only = 'all'  # train, generate, all
compare = ''  # a nanoGPT checkout's folder (eager, and compiled but for --compile=False), or transformers (generation alone)
rounds = 5  # runs of each contender, taken in turn
seconds = 2.0  # the least that a run lasts
streams = 1  # texts generated at once
prompt_tokens = 16  # length of each prompt
new_tokens = 128  # generated after each prompt, greedily
long_prompt = 900  # the prompt whose first token is timed; at most block_size - 1
quantize = 'none'  # the weights of fledge's generation: none, int8
profile = False  # write bench_train.json and bench_generate.json, which ui.perfetto.dev opens
json = False  # the last line of output is one JSON object
config = configure(
    globals(), also=os.path.join(os.path.dirname(os.path.abspath(__file__)), 'train.py')
)
# -----------------------------------------------------------------------------


def gpt_config():
    """The GPTConfig that train.py makes of these settings; GPT-2's vocabulary where the data is not there."""
    tokenizer = None if vocab_size else find_tokenizer(os.path.join('data', dataset))
    values = {f.name: config[f.name] for f in fields(GPTConfig) if f.name in config}
    values['vocab_size'] = vocab_size or (
        tokenizer.vocab_size if tokenizer and tokenizer.vocab_size != 50257 else 50304
    )
    values['qkv_bias'] = bias if qkv_bias == 'auto' else qkv_bias
    try:
        return GPTConfig(**values)
    except ValueError as e:
        raise UserError(str(e)) from None


def synchronize():
    if device_type == 'cuda':
        torch.cuda.synchronize()


def clock(f, least):
    """Seconds a call of f, which is called for at least `least` seconds."""
    synchronize()
    began, n = time.perf_counter(), 0
    while n == 0 or time.perf_counter() - began < least:
        f()
        n += 1
        synchronize()
    return (time.perf_counter() - began) / n


def train_fledge():
    """The model; functions for the seconds of a training step as train.py takes it, for those of its parts, and for one step to trace."""
    model = GPT(gpt_config()).to(device)
    model.gradient_checkpointing = gradient_checkpointing
    opts = optimizers.make_optimizers(model, optimizer, learning_rate, weight_decay, (beta1, beta2))
    network = (
        torch.compile(model)
        if compile is True or (compile == 'auto' and device_type == 'cuda')
        else model
    )
    autocast = autocast_to(dtype, device)
    folder = os.path.join('data', dataset)
    with tempfile.TemporaryDirectory() as made:
        if not split_files(folder, 'train'):  # random tokens are as fast as any
            count = 4 * batch_size * block_size + 2
            ids = torch.randint(model.config.vocab_size, (count,)).numpy()
            write_bin(os.path.join(made, 'train.bin'), ids, model.config.vocab_size)
            with open(os.path.join(made, 'meta.json'), 'w') as f:
                f.write('{"source": "random"}')
            folder = made
        data = Tokens(folder, 'train', block_size, model.config.vocab_size, seed)
        data.rows(0, 1)
    step, marks = 0, {}

    def mark(part):
        synchronize()
        marks[part] = time.perf_counter()

    def take_step(mark=lambda part: None):
        nonlocal step
        mark('start')
        x, y = (
            torch.from_numpy(rows).to(device) for rows in data.rows(step * batch_size, batch_size)
        )
        mark('data')
        with autocast:
            loss = network(x, y, return_logits=False)[1]
        mark('head and loss')
        loss.backward()
        mark('backward')
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), grad_clip or math.inf, norm)
        for o in opts:
            o.step()
        model.zero_grad(set_to_none=True)
        mark('optimizer')
        step += 1

    def parts():
        hook = (
            model.transformer.ln_f.register_forward_hook(lambda *_: mark('forward'))
            if network is model
            else None
        )
        take_step(mark)
        if hook:
            hook.remove()
        names = [
            n for n in ('data', 'forward', 'head and loss', 'backward', 'optimizer') if n in marks
        ]
        return {n: marks[n] - marks[before] for before, n in zip(['start', *names], names)}

    return model, (lambda: clock(take_step, seconds)), parts, take_step


def nanogpt(path):
    """nanoGPT's own model.py, of a checkout."""
    try:
        spec = importlib.util.spec_from_file_location(
            'nanogpt_model', os.path.join(path, 'model.py')
        )
        module = importlib.util.module_from_spec(spec)
        sys.modules['nanogpt_model'] = module
        spec.loader.exec_module(module)
        c = gpt_config()
        return module.GPT(
            module.GPTConfig(
                c.block_size, c.vocab_size, c.n_layer, c.n_head, c.n_embd, c.dropout, c.bias
            )
        ).to(device)
    except (OSError, AttributeError, TypeError) as e:
        raise UserError(f'compare={path} is no nanoGPT checkout ({e})') from None


def train_nanogpt(path, compiled):
    """nanoGPT's step, as its train.py takes it: float32 on a CPU, autocast on a GPU, AdamW."""
    model = nanogpt(path)
    opt = model.configure_optimizers(weight_decay, learning_rate, (beta1, beta2), device_type)
    network = torch.compile(model) if compiled else model
    autocast = autocast_to(torch.float32 if device_type == 'cpu' else dtype, device)
    x, y = torch.randint(model.config.vocab_size, (2, batch_size, block_size), device=device)

    def take_step():
        with autocast:
            loss = network(x, y)[1]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)
        opt.step()
        opt.zero_grad(set_to_none=True)

    return model, (lambda: clock(take_step, seconds)), None, None


def generating(model, generate, forward=None):
    """As train_fledge, of generate(prompts, n): the seconds a token of each stream, after the first; parts are those of a long prompt."""
    vocabulary = gpt_config().vocab_size
    prompts = torch.randint(vocabulary, (streams, prompt_tokens), device=device)
    long = torch.randint(vocabulary, (1, min(long_prompt, block_size - 1)), device=device)

    def run():
        first = clock(lambda: generate(prompts, 1), seconds / 4)
        return (clock(lambda: generate(prompts, new_tokens), seconds) - first) / (new_tokens - 1)

    def parts():
        return {
            'first token': clock(lambda: generate(long, 1), 1),
            'forward pass': clock(lambda: forward(long), 1),
        }

    return model, run, parts if forward else None, lambda: generate(prompts, 8)


def generate_fledge():
    model = GPT(gpt_config()).to(device, dtype).eval()
    if quantize == 'int8':
        int8.quantize(model)
    if compile is True:
        model.compile(dynamic=True)
    return generating(
        model, lambda prompts, n: model.generate(prompts, n, temperature=0), torch.no_grad()(model)
    )


def generate_nanogpt(path):
    model = nanogpt(path).eval()
    return generating(model, lambda prompts, n: model.generate(prompts, n))


def generate_transformers(kind):
    """The same shapes in transformers: GPT-2, Llama or Qwen3, its own generate, greedy, with its cache."""
    import transformers

    c = gpt_config()
    shared = dict(
        vocab_size=c.vocab_size,
        bos_token_id=0,
        eos_token_id=None,
        pad_token_id=0,
        tie_word_embeddings=c.tie_embeddings,
    )
    if c.position == 'learned':
        model = transformers.GPT2LMHeadModel(
            transformers.GPT2Config(
                n_positions=c.block_size,
                n_embd=c.n_embd,
                n_layer=c.n_layer,
                n_head=c.n_head,
                n_inner=c.n_inner,
                **shared,
            )
        )
    else:
        family = 'Qwen3' if c.qk_norm else 'Llama'
        model = getattr(transformers, family + 'ForCausalLM')(
            getattr(transformers, family + 'Config')(
                hidden_size=c.n_embd,
                intermediate_size=c.n_inner,
                num_hidden_layers=c.n_layer,
                num_attention_heads=c.n_head,
                num_key_value_heads=c.n_kv_head,
                head_dim=c.head_dim,
                max_position_embeddings=c.block_size,
                **shared,
            )
        )
    model = model.to(device, getattr(torch, kind)).eval()
    return generating(
        model,
        lambda prompts, n: model.generate(
            prompts, max_new_tokens=n, min_new_tokens=n, do_sample=False
        ),
    )


def peak_memory():
    """Bytes that this process has held at most: on the GPU, or all of it."""
    if device_type == 'cuda':
        return torch.cuda.max_memory_allocated()
    try:
        with open('/proc/self/status') as f:
            return next(int(line.split()[1]) * 1024 for line in f if line.startswith('VmHWM'))
    except (OSError, StopIteration):
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
            1 if sys.platform == 'darwin' else 1024
        )


def work(connection, make, args):
    """A contender in a process of its own: makes it, and answers commands until there are none."""
    try:
        if make.endswith('fledge'):
            keep_memory()
        torch.manual_seed(seed)
        model, run, parts, traced = globals()[make](*args)
        size = sum(p.numel() for p in model.parameters())
        run()  # warms up, and compiles
        connection.send(size)
        while (command := connection.recv()) != 'end':
            if command == 'run':
                connection.send(run())
            elif command == 'parts':
                connection.send(parts and [parts() for _ in range(3)][-1])
            else:
                with torch.profiler.profile() as trace:
                    traced()
                trace.export_chrome_trace(command)
                connection.send(None)
        connection.send(peak_memory())
    except EOFError:  # the others have failed
        pass
    except UserError as e:
        connection.send(e)
    except Exception as e:
        connection.send(
            UserError(f'{make}{args}: {type(e).__name__}: {" ".join(str(e).split())[:200]}')
        )


def race(contenders, profile_path):
    """Run contenders, {name: (function, arguments)}, in turn; ours is the first.

    Returns {name: seconds of each run}, {name: bytes of memory}, {name: parameters}, and our times by part.
    """
    context, pipes, processes, sizes = multiprocessing.get_context('spawn'), {}, [], {}

    def ask(name, command):
        pipes[name].send(command)
        return hear(name)

    def hear(name):
        try:
            answer = pipes[name].recv()
        except EOFError:
            answer = UserError('its process died; is the memory too small?')
        if isinstance(answer, UserError):
            raise UserError(f'{name}: {answer}')
        return answer

    try:
        for name, (make, args) in contenders.items():
            pipes[name], theirs = context.Pipe()
            processes.append(context.Process(target=work, args=(theirs, make, args), daemon=True))
            processes[-1].start()
            theirs.close()
            sizes[name] = hear(name)
        times = {name: [] for name in contenders}
        for _ in range(rounds):
            for name in contenders:
                times[name].append(ask(name, 'run'))
        ours = next(iter(contenders))
        parts = ask(ours, 'parts')
        if profile:
            ask(ours, profile_path)
        return times, {name: ask(name, 'end') for name in contenders}, sizes, parts
    finally:
        for process, pipe in zip(processes, pipes.values()):
            pipe.close()  # those still waiting for a command end
            process.join(10)
            process.terminate()


def table(times, memory, sizes, amount, columns):
    """Print a contender a line: amount a second, the shares of columns {title: limit}, memory, how much faster ours is; returns them."""
    print(
        f'  {"":28}{"parameters":>10}{"tokens/s":>10}'
        + ''.join(f'{c:>18}' for c in columns)
        + f'{"peak memory":>14}   fledge is faster by, pair by pair'
    )
    lines, ours = [], next(iter(times))
    for name, t in times.items():
        ratios = [theirs / mine for theirs, mine in zip(t, times[ours])]
        line = dict(
            name=name,
            parameters=sizes[name],
            tokens_per_second=amount / statistics.median(t),
            peak_memory=memory[name],
            ratio=statistics.median(ratios),
            ratio_range=[min(ratios), max(ratios)],
        )
        print(
            f'  {name:28}{sizes[name] / 1e6:>9,.1f}M{line["tokens_per_second"]:>10,.1f}'
            + ''.join(
                f'{line["tokens_per_second"] / limit:>18.1%}' if name == ours else f'{"":18}'
                for limit in columns.values()
            )
            + f'{memory[name] / 1e9:>11.2f} GB'
            + (
                ''
                if name == ours
                else f'   {line["ratio"]:.2f}x ({line["ratio_range"][0]:.2f} to {line["ratio_range"][1]:.2f})'
            )
        )
        lines.append(line)
    return lines


one_of(
    config,
    compile=('auto', True, False),
    only=('train', 'generate', 'all'),
    quantize=('none', 'int8'),
)
at_least(
    config,
    rounds=1,
    streams=1,
    prompt_tokens=1,
    new_tokens=2,
    long_prompt=1,
    seconds=0,
    batch_size=1,
    block_size=2,
)
if only != 'train' and prompt_tokens + new_tokens > block_size:
    raise UserError(
        f'{prompt_tokens} + {new_tokens} tokens (prompt_tokens, new_tokens) are longer than block_size={block_size}'
    )
if compare and compare != 'transformers' and not os.path.exists(os.path.join(compare, 'model.py')):
    raise UserError(
        f"compare={compare} is neither transformers nor a folder with nanoGPT's model.py"
    )
if compare == 'transformers' and (
    only == 'train' or importlib.util.find_spec('transformers') is None
):
    raise UserError(
        'compare=transformers is for generation'
        if only == 'train'
        else 'the package transformers is not installed: pip install transformers'
    )
device = choose_device(device)
device_type = device.split(':')[0]
dtype = choose_dtype(dtype, device)

if __name__ == '__main__':
    with torch.device('meta'):
        model = GPT(gpt_config())
    n_params, peak, bandwidth = (
        model.get_num_params(non_embedding=False),
        peak_flops(device, dtype),
        read_bandwidth(device),
    )
    result = dict(
        device=device,
        dtype=str(dtype)[6:],
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        parameters=n_params,
    )
    if only != 'generate':
        contenders = {'fledge': ('train_fledge', ())}
        if compare and compare != 'transformers':
            contenders |= {
                f'nanoGPT, {"compiled" if c else "eager"}': ('train_nanogpt', (compare, c))
                for c in (False, True)
                if compile is not False or not c
            }
        print(
            f'\ntraining: {n_params / 1e6:.1f}M parameters, {batch_size} x {block_size} tokens a step'
        )
        times, memory, sizes, parts = race(contenders, 'bench_train.json')
        peak = max(peak, peak_flops(device, dtype))  # machines have slow moments
        peers = table(
            times,
            memory,
            sizes,
            batch_size * block_size,
            {'of matmul peak': peak / model.flops_per_token()},
        )
        print(
            '  a step: '
            + ', '.join(
                f'{k} {v * 1e3:,.1f} ms ({v / sum(parts.values()):.1%})' for k, v in parts.items()
            )
        )
        result |= dict(
            train_tokens_per_second=peers[0]['tokens_per_second'],
            peak_share=peers[0]['tokens_per_second'] * model.flops_per_token() / peak,
            train_peak_memory=memory['fledge'],
            parts=parts,
            train_peers=peers[1:],
        )
    if only != 'train':
        contenders = {'fledge': ('generate_fledge', ())}
        if compare == 'transformers':
            contenders |= {
                f'transformers, {kind}': ('generate_transformers', (kind,))
                for kind in dict.fromkeys(('float32', str(dtype)[6:]))
            }
        elif compare:
            contenders['nanoGPT'] = ('generate_nanogpt', (compare,))
        print(f'\ngeneration: {streams} x {new_tokens} tokens after {prompt_tokens}')
        times, memory, sizes, parts = race(contenders, 'bench_generate.json')
        bandwidth = max(bandwidth, read_bandwidth(device))
        read = model.matmul_params() * (
            1 if quantize == 'int8' else torch.finfo(dtype).bits // 8
        )  # bytes of weights a token of all streams
        peers = table(times, memory, sizes, streams, {'of memory read': bandwidth / read * streams})
        print(
            f'  after {min(long_prompt, block_size - 1)} tokens: the first token {parts["first token"]:.3f} s, one forward pass {parts["forward pass"]:.3f} s'
        )
        result |= dict(
            decode_tokens_per_second=peers[0]['tokens_per_second'],
            bandwidth_share=peers[0]['tokens_per_second'] / streams * read / bandwidth,
            first_token_seconds=parts['first token'],
            forward_seconds=parts['forward pass'],
            generate_peers=peers[1:],
        )
    print(
        f'\n{device}, {torch.get_num_threads()} threads, torch {torch.__version__}: {str(dtype)[6:]} matmul peak {peak / 1e9:,.0f} GFLOP/s, memory read {bandwidth / 1e9:.1f} GB/s'
    )
    result |= dict(matmul_peak=peak, memory_bandwidth=bandwidth)
    if json:
        print(json_.dumps(result))
