"""Train a GPT from scratch, go on with a run, or start from a checkpoint.

One process:         python train.py config/shakespeare_char.py --batch_size=32
Several on a node:   torchrun --standalone --nproc_per_node=4 train.py config/gpt2_124m.py
Several nodes:       torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 train.py ...
"""

import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import fields

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from fledge import UserError, checkpoint, int8, optimizers, replacing
from fledge.configurator import at_least, configure, one_line, one_of
from fledge.device import autocast_to, choose_device, choose_dtype, keep_memory, peak_flops
from fledge.formats import huggingface
from fledge.runlog import RunLog
from fledge.tokenizer import find_tokenizer, load_tokenizer
from fledge.tokens import Tokens, split_files
from model import GPT, GPTConfig

# -----------------------------------------------------------------------------
# The settings. As they stand they are the default run: see config/stdlib.py.
# where the run lives
out_dir = 'out'  # checkpoints, metrics.jsonl, train.log, settings.json, samples, loss.png
init_from = 'scratch'  # scratch, resume (goes on with out_dir's ckpt.pt), a checkpoint file, or a Hugging Face model: its folder or name
auto_resume = (
    False  # resume where out_dir has a checkpoint, else start: for jobs that are started again
)
seed = 1337  # of the weights, the order of the data, dropout and samples
# evaluation, checkpoints, logs
eval_interval = 500  # steps between evaluations, each followed by a checkpoint
eval_iters = 0  # batches of val in one evaluation, always the same ones; 0: all of val
eval_only = False  # evaluate once and stop
always_save_checkpoint = True  # False: only where val loss improved
early_stopping_patience = 0  # stop after so many evaluations without a better val loss; 0: never
log_interval = 20  # steps between lines of progress
sample_interval = 500  # steps between samples_step_*.txt; 0: none
sample_start = '<|endoftext|>'  # what the samples begin with: here the start of a document
sample_tokens = 200  # length of each of the three samples
sample_repetition_penalty = (
    1.2  # keeps a small model out of loops; 1 where the tokens are characters
)
dry_run = False  # say what the run will take, from one real step, and write nothing
wandb_log = False  # log to Weights & Biases (WANDB_MODE=offline needs no account)
wandb_project = 'fledge'  # the project there
wandb_run_name = 'run'  # the name of the run there
tensorboard = False  # log to out_dir/tensorboard
# data
dataset = 'stdlib'  # a folder under data/
gradient_accumulation_steps = 1  # micro-batches in a step, over all processes
batch_size = 4  # rows in a micro-batch
block_size = 512  # tokens in a row: the context
# model; the default is Qwen3's block, which every runtime loads
n_layer = 4  # depth
n_head = 3  # query heads
n_kv_head = 1  # key and value heads, shared by the query heads; 0: n_head
head_dim = 64  # 0: n_embd / n_head
n_embd = 192  # width
n_inner = 0  # width of the MLP; 0: 4 n_embd, for swiglu 8/3 n_embd
vocab_size = 0  # 0: the dataset's
dropout = 0.0  # share of activations dropped in training
bias = False  # biases in the linear layers and LayerNorms
qkv_bias = 'auto'  # biases on queries, keys and values: auto (as bias), True, False
position = 'rope'  # rope, learned
rope_theta = 10000.0  # base of RoPE's wavelengths
norm = 'rmsnorm'  # rmsnorm, layernorm
norm_eps = 1e-6  # added under the root of the norms
activation = 'swiglu'  # swiglu, gelu, gelu_tanh, relu2
qk_norm = True  # normalize each head's queries and keys
tie_embeddings = True  # the head is the token embedding
gradient_checkpointing = False  # less memory for about a third more time
# optimizer
optimizer = 'muon'  # muon (the blocks' matrices; AdamW for the rest), adamw
learning_rate = 1e-2  # highest
max_iters = 4000  # steps
target_tokens = 0  # instead of max_iters: as many steps as see this many tokens
target_epochs = 0.0  # instead of max_iters: as many steps as see the data so often
max_minutes = 5.0  # lower max_iters to what this machine does in this time; 0: no limit
weight_decay = 0.1  # of the matrices (and embeddings, with adamw)
beta1 = 0.9  # of AdamW's first moment
beta2 = 0.95  # of AdamW's second moment
grad_clip = 1.0  # clip the gradient's norm to this; 0: do not
# learning rate schedule
decay_lr = True  # False: learning_rate throughout
lr_schedule = 'linear'  # linear, cosine, wsd (constant, then linear over the last fifth)
warmup_iters = 20  # steps of linear warmup
lr_decay_iters = 0  # the step at which min_lr is reached; 0: max_iters
min_lr = 0.0  # where the schedule ends
# the machine
device = 'auto'  # auto, cpu, cuda, cuda:1, mps
dtype = 'auto'  # auto, float32, bfloat16, float16
compile = (
    'auto'  # auto, True, False: torch.compile; auto is on for CUDA, off where it gains nothing
)
backend = 'auto'  # of torchrun's processes: auto, nccl, gloo
objective = (
    None  # a config file may define objective(model, batch) -> loss; batch is (inputs, targets)
)
config = configure(globals())
ckpt_path = os.path.join(out_dir, 'ckpt.pt')
if auto_resume and os.path.exists(ckpt_path):
    init_from = 'resume'
resuming = init_from == 'resume'
start = (
    None
    if init_from == 'scratch'
    else checkpoint.load(ckpt_path)
    if resuming
    else huggingface.load(init_from, block_size)
)
if resuming:  # the run's own settings hold, but for those given now
    once = ('init_from', 'auto_resume', 'out_dir', 'eval_only', 'dry_run')
    saved = start['config']
    config = configure(globals(), saved={k: v for k, v in saved.items() if k not in once})
    changed = {k: v for k, v in saved.items() if k not in once and config.get(k, v) != v}
    config['init_from'] = saved.get('init_from', 'scratch')  # how the run began
# -----------------------------------------------------------------------------
at_least(
    config,
    eval_interval=1,
    log_interval=1,
    gradient_accumulation_steps=1,
    batch_size=1,
    block_size=1,
    max_iters=0,
    target_tokens=0,
    target_epochs=0,
    max_minutes=0,
    eval_iters=0,
    warmup_iters=0,
    lr_decay_iters=0,
    seed=0,
    learning_rate=0,
    weight_decay=0,
    grad_clip=0,
    sample_interval=0,
    sample_tokens=0,
    early_stopping_patience=0,
)
one_of(
    config,
    lr_schedule=('linear', 'cosine', 'wsd'),
    compile=('auto', True, False),
    backend=('auto', 'nccl', 'gloo'),
)
if sample_repetition_penalty <= 0 or seed >= 2**63:
    raise UserError(
        f'sample_repetition_penalty={sample_repetition_penalty} must be above 0, and seed={seed} below 2^63'
    )

# ---- processes, device, precision
rank, local_rank, world = (
    int(os.environ.get(k, d)) for k, d in (('RANK', 0), ('LOCAL_RANK', 0), ('WORLD_SIZE', 1))
)
main = rank == 0  # this process alone speaks and writes
device = choose_device(
    'cuda' if world > 1 and str(device).startswith('cuda') else device, local_rank
)  # a GPU each
device_type = device.split(':')[0]
keep_memory()
if device_type == 'cuda':
    torch.cuda.set_device(device)
    torch.set_float32_matmul_precision('high')  # tf32
if world > 1:
    dist.init_process_group(
        'gloo' if device_type != 'cuda' else 'nccl' if backend == 'auto' else backend
    )
    sys.excepthook = one_line  # torch.distributed has put its own in the way
dtype = choose_dtype(dtype, device)
autocast = autocast_to(dtype, device)
scaler = torch.amp.GradScaler(device_type, enabled=dtype == torch.float16)
rows_per_step = gradient_accumulation_steps * batch_size  # over all processes
if rows_per_step % world:
    raise UserError(
        f'{rows_per_step} rows a step (gradient_accumulation_steps x batch_size) do not divide among {world} processes'
    )
rows_per_process = rows_per_step // world

# ---- data; the default corpus is made on the spot, any other has to be there
log, data_dir = (
    RunLog(main, None if dry_run or eval_only else out_dir),
    os.path.join('data', dataset),
)
if main and not split_files(data_dir, 'train'):
    script = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'prepare', f'{dataset}.py')
    if dataset != 'stdlib' or dry_run:
        other = f'text.py --input=YOUR_FILES --name={dataset} --tokenizer=' + (
            'gpt2' if vocab_size in (0, 50257, 50304) else f'train --vocab_size={vocab_size}'
        )
        raise UserError(
            f'{data_dir} has no train.bin; make it with: python prepare/{dataset + ".py" if os.path.exists(script) else other}'
        )
    if subprocess.run([sys.executable, script]).returncode:
        raise UserError('python prepare/stdlib.py failed; see above')
if world > 1:
    dist.barrier()
tokenizer = find_tokenizer(data_dir)
if (
    start and not resuming
):  # the tokenizer comes along with the weights, and the data has to be in it
    folder = start.get('folder') or os.path.dirname(init_from) or '.'
    theirs = find_tokenizer(folder)
    if tokenizer and theirs and not theirs.agrees_with(tokenizer):
        raise UserError(
            f'{data_dir} was prepared with another tokenizer than the one of {init_from}: prepare it with --tokenizer={folder}'
        )
    if theirs and not tokenizer and theirs.vocab_size != 50257:
        log.say(f'{data_dir} has no tokenizer.json: its tokens are taken for those of {init_from}')
    tokenizer = tokenizer or theirs

# ---- model
torch.manual_seed(seed)
if start is None:
    if not vocab_size:  # GPT-2's 50257 is rounded up to what hardware likes
        vocab_size = tokenizer.vocab_size if tokenizer and tokenizer.vocab_size != 50257 else 50304
    qkv_bias = bias if qkv_bias == 'auto' else qkv_bias
    try:
        model = GPT(
            GPTConfig(**{f.name: globals()[f.name] for f in fields(GPTConfig) if f.name in config})
        )
    except ValueError as e:
        raise UserError(str(e)) from None
else:
    model = checkpoint.load_model(start, ckpt_path if resuming else init_from, dropout=dropout)
    if int8.is_quantized(model) and not eval_only:
        raise UserError(
            f'{ckpt_path if resuming else init_from} has 8-bit weights, which cannot be trained: start from what it was made of'
        )
    if block_size < model.config.block_size:
        model.crop_block_size(block_size)
    for k in config:
        if hasattr(model.config, k) and config[k] != getattr(model.config, k):
            if resuming and config[k] not in (0, 'auto'):
                log.say(
                    f'{k}={config[k]!r} is ignored: the checkpoint has {getattr(model.config, k)!r}'
                )
            config[k] = getattr(model.config, k)
block_size, vocab_size = model.config.block_size, model.config.vocab_size
model.to(device).gradient_checkpointing = gradient_checkpointing
if tokenizer is None and vocab_size in (
    50257,
    50304,
):  # nanoGPT's folders say nothing where the vocabulary is GPT-2's
    try:
        tokenizer = load_tokenizer('gpt2')
    except UserError as e:
        log.say(f'{e}: no samples, no bits per byte')
train_data = Tokens(data_dir, 'train', block_size, vocab_size, seed)
val_data = Tokens(data_dir, 'val', block_size, vocab_size)
tokens_per_step = rows_per_step * block_size
if target_tokens or target_epochs:
    max_iters = math.ceil((target_tokens or target_epochs * train_data.n_tokens) / tokens_per_step)
bytes_of = tokenizer.text_bytes(vocab_size) if tokenizer else np.zeros(vocab_size, np.int64)

# ---- optimizers, and what else a resumed run goes on with
opts = (
    []
    if eval_only
    else optimizers.make_optimizers(model, optimizer, learning_rate, weight_decay, (beta1, beta2))
)
first_step, elapsed, best_val_loss, evaluations_since_best, last_evaluation = (
    0,
    0.0,
    math.inf,
    0,
    None,
)
total_steps = max_iters
if resuming:
    if start.get('objective') and not objective:
        raise UserError(
            'this run has an objective of its own: name the config file that defines it again'
        )
    if 'iter_num' not in start or 'best_val_loss' not in start:
        raise UserError(
            f'{ckpt_path} is no checkpoint of a run: start from it with --init_from={ckpt_path} and another --out_dir'
        )
    first_step, best_val_loss = start['iter_num'], float(start['best_val_loss'])
    if 'optimizer' in start and opts:
        optimizers.load_state_dict(opts, start['optimizer'])
    if start.get('scaler') and scaler.is_enabled():
        scaler.load_state_dict(start['scaler'])
    elapsed, evaluations_since_best = (
        start.get('elapsed', 0.0),
        start.get('evaluations_since_best', 0),
    )  # not in nanoGPT's
    last_evaluation = start.get('evaluation')
    if changed.keys() & {'dataset', 'block_size', 'eval_iters', 'batch_size'} or bool(
        objective
    ) != start.get('objective', False):  # it would differ now
        last_evaluation = None
    if 'dataset' in changed:
        best_val_loss = math.inf
    if max_minutes and start.get(
        'time_is_short'
    ):  # the run does not fit its time: go on with the steps that do
        total_steps = min(
            max_iters,
            int(start['total_steps'] * (max_minutes / (saved.get('max_minutes') or max_minutes))),
        )
del start
log.open(config, first_step if resuming else None)
if tokenizer and log.out_dir and not resuming:
    tokenizer.save(log.path('tokenizer.json'))
log.say('settings: ' + ' '.join(f'{k}={v!r}' for k, v in config.items()))
log.connect(config, wandb_log, tensorboard)
peak = peak_flops(device, dtype)
log.say(
    f'{model.get_num_params(non_embedding=False) / 1e6:.2f}M parameters, {device} in {str(dtype)[6:]}, peak {peak / 1e12:.2f} TFLOP/s; '
    f'{tokens_per_step:,} tokens a step, {max_iters:,} steps, {max_iters * tokens_per_step / train_data.n_tokens:.2f} epochs of {train_data.n_tokens:,} tokens'
)
if resuming:
    log.say(
        f'resuming at step {first_step}'
        + ''.join(f'; {k} was {v!r}, now {config[k]!r}' for k, v in changed.items())
    )


def loss_of(network, x, y):
    """The loss of inputs and targets, numpy (rows, block_size): float32 scalar on the device."""
    x, y = torch.from_numpy(x), torch.from_numpy(y)
    if device_type == 'cuda':
        x, y = x.pin_memory(), y.pin_memory()  # so that the copy does not wait
    x, y = x.to(device, non_blocking=True), y.to(device, non_blocking=True)
    with autocast:
        return objective(network, (x, y)) if objective else network(x, y, return_logits=False)[1]


compiled = model
if compile is True or (compile == 'auto' and device_type == 'cuda'):
    try:
        compiled = torch.compile(model)
        loss_of(
            compiled, *train_data.rows(0, min(batch_size, rows_per_process))
        ).backward()  # it compiles at the first use
    except Exception as e:
        compiled = model
        log.say(
            f'torch.compile failed ({type(e).__name__}: {str(e).strip().partition(chr(10))[0][:120]}); going on without it'
        )
    model.zero_grad(set_to_none=True)
network = compiled
if world > 1:  # the RoPE tables are the same everywhere
    network = DistributedDataParallel(
        compiled,
        device_ids=[local_rank] if device_type == 'cuda' else None,
        broadcast_buffers=False,
    )


def lr_at(step, total_steps):
    """The learning rate of a step of a run of total_steps."""
    if not decay_lr:
        return learning_rate
    end = lr_decay_iters or total_steps
    if step < warmup_iters:
        return learning_rate * (step + 1) / (warmup_iters + 1)
    if step >= end:
        return min_lr
    start = max(warmup_iters, 0.8 * end) if lr_schedule == 'wsd' else warmup_iters
    done = max(0.0, (step - start) / (end - start))  # of the decay, 0 to 1
    share = 0.5 * (1 + math.cos(math.pi * done)) if lr_schedule == 'cosine' else 1 - done
    return min_lr + share * (learning_rate - min_lr)


def train_step(step, lr):
    """Forward, backward and update on the rows of one step. Returns this process's mean loss and the gradient's norm, tensors."""
    # dropout's randomness is a function of the step, as the rows are: nothing to save, nothing to replay
    torch.manual_seed(int(np.random.SeedSequence([seed, step, rank]).generate_state(1)[0]))
    first_row, total = (
        step * rows_per_step + rank * rows_per_process,
        torch.zeros((), device=device),
    )
    for done in range(0, rows_per_process, batch_size):
        count = min(batch_size, rows_per_process - done)
        if world > 1:  # the processes average their gradients once a step
            network.require_backward_grad_sync = done + count == rows_per_process
        loss = loss_of(network, *train_data.rows(first_row + done, count)) * (
            count / rows_per_process
        )
        scaler.scale(loss).backward()
        total += loss.detach()
    for o in opts:
        scaler.unscale_(o)
    grad_norm = torch.nn.utils.get_total_norm(
        [p.grad for p in model.parameters() if p.grad is not None]
    )
    if grad_clip:
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), grad_clip, grad_norm)
    for o in opts:
        for group in o.param_groups:
            group['lr'] = lr
        if not scaler.is_enabled() or math.isfinite(
            grad_norm
        ):  # an overflow in float16 skips the step, in all optimizers alike
            scaler.step(o)
    scaler.update()
    model.zero_grad(set_to_none=True)
    return total, grad_norm


@torch.no_grad()
def evaluate():
    """Loss on val in nats a token and in bits a byte (None without a tokenizer), over the same rows each time."""
    model.eval()
    rows = val_data.evaluation_rows(eval_iters * batch_size or None)
    sums = np.zeros(3)  # nats, tokens, bytes
    for first in range(rank * batch_size, len(rows), batch_size * world):
        x, y = val_data.evaluation_batch(rows[first : first + batch_size])
        known = y[y >= 0]
        sums += loss_of(model, x, y).item() * len(known), len(known), bytes_of[known].sum()
    model.train()
    if world > 1:
        sums = torch.from_numpy(sums).to(device)
        dist.all_reduce(sums)
    nats, tokens, size = sums.tolist()
    return nats / tokens, nats / math.log(2) / size if size else None


def in_words(val_loss, val_bpb):
    """An evaluation as a person reads it."""
    return f'val loss {val_loss:.4f}, perplexity {math.exp(min(val_loss, 700)):.6g}' + (
        f', {val_bpb:.4f} bits per byte' if val_bpb else ''
    )


def write_samples(step):
    """samples_step_*.txt: three continuations of sample_start."""
    model.eval()
    try:
        prompt = tokenizer.encode(sample_start, allow_special=True) or [0]
    except UserError:  # a vocabulary of characters without this one
        prompt = [0]
    with autocast:
        rows = model.generate(
            [prompt] * 3,
            sample_tokens,
            temperature=0.8,
            top_p=0.95,
            repetition_penalty=sample_repetition_penalty,
            seed=seed,
        )
    model.train()
    with replacing(log.path(f'samples_step_{step:06d}.txt')) as f:
        f.write('\n---------------\n'.join(tokenizer.decode(row) for row in rows) + '\n')


def save_checkpoint(step, best):
    checkpoint.save(
        ckpt_path,
        dict(
            model=model.state_dict(),
            optimizer=optimizers.state_dict(opts),
            model_args=model.config.model_args(),
            iter_num=step,
            config=config,
            best_val_loss=best_val_loss,
            scaler=scaler.state_dict(),
            objective=objective is not None,
            total_steps=total_steps,
            time_is_short=total_steps < max_iters,
            elapsed=elapsed,
            evaluation=last_evaluation,
            evaluations_since_best=evaluations_since_best,
        ),
    )
    if best:
        checkpoint.link(ckpt_path, log.path('best.pt'))


if eval_only:
    log.say(in_words(*evaluate()))
    raise SystemExit
if dry_run:
    train_step(0, 0.0)[0].item()  # warms up
    t = time.perf_counter()
    train_step(1, 0.0)[0].item()
    seconds, n_params, tokens = (
        time.perf_counter() - t,
        model.get_num_params(non_embedding=False),
        max_iters * tokens_per_step,
    )
    state = sum(
        v.numel() * v.element_size()
        for o in opts
        for s in o.state.values()
        for v in s.values()
        if torch.is_tensor(v)
    )
    if device_type == 'cuda':
        memory = torch.cuda.max_memory_allocated()
    else:
        import resource

        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
            1 if sys.platform == 'darwin' else 1024
        )
    log.say(
        f'parameters: {n_params:,}\ntokens: {tokens:,}\nFLOPs: {6 * n_params * tokens:.3g} (6ND)\n'
        f'memory: {memory / 1e9:.2f} GB at the peak, of which weights, gradients and optimizer state are {(8 * n_params + state) / 1e9:.2f} GB\n'
        f'time: {seconds:.2f} s a step, {seconds * max_iters / 3600:.2f} hours in all ({tokens_per_step / seconds:,.0f} tokens/s)'
    )
    raise SystemExit


def on_signal(number, frame):
    """The first SIGINT or SIGTERM asks for a checkpoint and a stop, the next ends the process (torchrun repeats the first within a second)."""
    global stop_asked
    if stop_asked and (world == 1 or time.monotonic() - stop_asked > 1):
        os._exit(128 + number)
    first, stop_asked = not stop_asked, stop_asked or time.monotonic()
    if first and main:
        print(
            '\nsaving and stopping after this step; once more stops at once',
            file=sys.stderr,
            flush=True,
        )


stop_asked = 0.0
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, on_signal)

# ---- the training loop
step, evaluating, beside = first_step, 0.0, 0.0  # beside: seconds that were not training
log.start_bar(step, total_steps)
began = time.monotonic() - elapsed
mark, marked_step, aside = (
    time.monotonic(),
    step,
    0.0,
)  # of the interval being timed; aside: its seconds that were not training
while True:
    elapsed, stopping = time.monotonic() - began, bool(stop_asked)
    if step == first_step + 3:  # everything is warm
        warm = elapsed
    if (
        max_minutes and step >= first_step + 8 and total_steps > step
    ):  # fit the run, its last evaluation included, into its time
        pace = (elapsed - warm) / (step - first_step - 3)
        fit = step + max(0, int((60 * max_minutes - elapsed - 2 * evaluating) / pace))
        if fit < max_iters and total_steps == max_iters:
            log.say(
                f'max_minutes={max_minutes:g} leaves time for about {fit:,} of {max_iters:,} steps on this machine'
            )
        total_steps = min(max_iters, fit)
    if world > 1:  # all processes stop at the same step
        agreed = torch.tensor([stopping, -total_steps], device=device)
        dist.all_reduce(agreed, dist.ReduceOp.MAX)
        stopping, total_steps = bool(agreed[0]), -int(agreed[1])

    # evaluate, save, sample
    done, evaluation = step >= total_steps, None
    if last_evaluation and last_evaluation[0] == step:
        evaluation = last_evaluation[
            1:
        ]  # made right before the checkpoint that this run goes on from
    elif not stopping and (step % eval_interval == 0 or done):
        evaluation = evaluate()
        val_loss = evaluation[0]
        last_evaluation, evaluating = (
            [step, *evaluation],
            max(evaluating, time.monotonic() - began - elapsed),
        )
        log.say(f'step {step}: {in_words(*evaluation)}')
        if not math.isfinite(val_loss):
            raise UserError(
                f'val loss is {val_loss} at step {step}: the run diverged; lower learning_rate (the last checkpoint is kept)'
            )
        best = val_loss < best_val_loss
        evaluations_since_best = 0 if best else evaluations_since_best + 1
        best_val_loss = min(best_val_loss, val_loss)
        if main and (step > first_step or resuming) and (best or always_save_checkpoint):
            save_checkpoint(step, best)
    if evaluation and early_stopping_patience and evaluations_since_best >= early_stopping_patience:
        log.say(f'no better val loss in {evaluations_since_best} evaluations: stopping early')
        done = True
    if (
        main
        and tokenizer
        and sample_interval
        and step > 0
        and (step % sample_interval == 0 or done)
        and not stopping
    ):
        write_samples(step)
    if main and evaluation and step > 0 and not done:
        log.draw()
    spent = time.monotonic() - began - elapsed
    aside, beside = aside + spent, beside + spent
    if done or stopping:
        break

    lr = lr_at(step, total_steps)
    loss, grad_norm = train_step(step, lr)
    if step % log_interval == 0 or evaluation:
        if world > 1:
            dist.all_reduce(loss)
        loss = loss.item() / world  # an accelerator has finished its work here
        now = time.monotonic()
        speed = (step + 1 - marked_step) * tokens_per_step / (now - mark - aside)
        mark, marked_step, aside = now, step + 1, 0.0
        val_loss, val_bpb = evaluation or (None, None)
        log.metrics(
            total_steps,
            step=step,
            tokens=step * tokens_per_step,
            train_loss=loss,
            val_loss=val_loss,
            val_bpb=val_bpb,
            lr=lr,
            grad_norm=grad_norm.item(),
            tokens_per_second=speed,
            mfu=speed * model.flops_per_token() / (peak * world),
            elapsed=elapsed,
        )
        if not math.isfinite(loss):
            raise UserError(
                f'the loss is {loss} at step {step}: the run diverged; lower learning_rate (the last checkpoint is kept)'
            )
    step += 1
    log.advance(total_steps)

log.close_bar()
if main:
    if stopping:
        save_checkpoint(step, False)
    elif evaluation:
        log.metrics(
            total_steps,
            step=step,
            tokens=step * tokens_per_step,
            val_loss=evaluation[0],
            val_bpb=evaluation[1],
            elapsed=elapsed,
        )
        log.draw()
    log.say(
        f'{"stopped" if stopping else "done"} at step {step} after {(time.monotonic() - began) / 60:.1f} minutes ({beside:.1f} s went to evaluations, checkpoints and samples); best val loss {best_val_loss:.4f}. '
        + (
            f'To go on: python train.py --init_from=resume --out_dir={out_dir}'
            if stopping
            else f'Try it: python sample.py --out_dir={out_dir}'
        )
    )
if world > 1:
    dist.barrier()  # nobody hangs up while another still speaks
    dist.destroy_process_group()
