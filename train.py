"""Train a GPT from scratch, go on with a run, or start from a checkpoint.

One process:         python train.py config/shakespeare_char.py --batch_size=32
Several on a node:   torchrun --standalone --nproc_per_node=4 train.py config/gpt2_124m.py
Several nodes:       torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d \\
                         --rdzv_endpoint=HOST:29500 train.py ...
"""

import functools
import math
import os
import shlex
import sys
import time

import numpy as np
import torch

from encoder_decoder import make_model
from fledge import (
    UserError,
    adapters,
    checkpoint,
    depth,
    objectives,
    optimizers,
    quantize,
    run,
    saving,
)
from fledge.configurator import configure, given, read_settings
from fledge.device import Machine, flops_per_token, peak_flops, sharded_as
from fledge.documents import open_split
from fledge.evaluation import evaluate, in_words, samples
from fledge.formats import huggingface
from fledge.log import RunLog
from fledge.objectives import loss_and_numbers
from fledge.plan import dry_run_report, plan_report, why_not_measured
from fledge.state import RunState
from fledge.threads import Threads
from fledge.tokenizer import common_tokenizer, find_tokenizer
from fledge.tokens import digest, find_data

# -----------------------------------------------------------------------------
# The settings; fledge/configurator.py has the bounds of numbers. As they stand they are the default
# run: 1.3M parameters of Qwen3's architecture on Python's own standard library, at most five
# minutes on two CPU cores.
# where the run lives
out_dir = 'out'  # checkpoints, metrics.jsonl, train.log, settings.json, samples, loss.png
init_from = 'scratch'  # scratch, resume, a checkpoint file, or a Hugging Face folder or name
auto_resume = False  # resume where out_dir has a checkpoint, else start: the same command again
seed = 1337  # of the weights, the order of the data, dropout and samples
seeds = 1  # so many runs one after another, of seed, seed + 1, ..., each in out_dir/seed_N
# evaluation, checkpoints, logs
eval_interval = 500  # steps between evaluations, each followed by a checkpoint
eval_iters = 0  # batches of val in one evaluation, always the same ones; 0: all of val
eval_only = False  # evaluate once and stop
always_save_checkpoint = True  # False: only where val loss improved
keep_checkpoints = 2  # the latest, ckpt.pt, and those before it, ckpt_step_*.pt; best.pt stays too
early_stopping_patience = 0  # stop after so many evaluations without a better val loss; 0: never
log_interval = 20  # steps between lines of progress
sample_interval = 500  # steps between samples_step_*.txt; 0: none
sample_start = '<|endoftext|>'  # what the samples begin with: here the start of a document
sample_ask = ''  # in place of that: what a user says, in the form of the model's conversations
sample_tokens = 200  # length of each of the three samples
sample_repetition_penalty = 1.2  # keeps small models out of loops; 1 for characters
dry_run = False  # say what the run will take, from two real steps, and write nothing
world_size = 0  # with dry_run: plan for so many GPUs as well; 0: do not
price_per_hour = 0.0  # of one GPU, for the plan
wandb_log = False  # log to Weights & Biases (WANDB_MODE=offline needs no account)
wandb_project = 'fledge'  # the project there
wandb_run_name = 'run'  # the name of the run there
tensorboard = False  # log to out_dir/tensorboard
# data
dataset = 'stdlib'  # a folder under data/
gradient_accumulation_steps = 1  # micro-batches in a step, over all processes
batch_size = 8  # rows in a micro-batch; small ones: many small steps learn more in five minutes
block_size = 256  # tokens in a row; a new model's context
# model; the default is Qwen3's block, which every runtime loads
one_dial = False  # all follows from n_layer, or from max_minutes: config/depth.py
n_layer = 4  # depth
n_encoder_layer = 0  # depth of an encoder, which reads a source: encoder_decoder.py
n_head = 2  # query heads
n_kv_head = 1  # key and value heads, shared by the query heads; 0: n_head
head_dim = 64  # 0: n_embd / n_head
n_embd = 128  # width
n_inner = 0  # width of the MLP; 0: 4 n_embd, or 8/3 n_embd where the activation is gated
vocab_size = 0  # 0: the dataset's
dropout = 0.0  # share of activations dropped in training
bias = False  # biases in the linear layers and LayerNorms
qkv_bias = 'auto'  # biases on queries, keys and values: auto (as bias), True, False
position = 'rope'  # rope, learned, sinusoidal
rope_theta = 10000.0  # base of RoPE's wavelengths
norm = 'rmsnorm'  # rmsnorm, layernorm
norm_eps = 1e-6  # added under the root of the norms
norm_first = True  # False: behind attention and MLP, as in 2017
activation = 'swiglu'  # a row of model.ACTIVATIONS: swiglu, gelu, gelu_tanh, relu, relu2
qk_norm = True  # normalize each head's queries and keys
tie_embeddings = True  # the head is the token embedding
gradient_checkpointing = False  # less memory for about a third more time
# adapters beside weights that stay as they are (LoRA)
lora_rank = 0  # their width; they alone are trained and saved; 0: all weights are
lora_alpha = 16.0  # they count lora_alpha / lora_rank
lora_dropout = 0.0  # share of their inputs dropped in training
lora_targets = 'attn,mlp'  # where: attn, mlp, or some of attn.c_attn, attn.c_proj, mlp.c_fc, ...
quantize_base = 'none'  # nf4, int8: the frozen weights in 4 or 8 bits (requirements-qlora.txt)
# what is learned
objective = 'next_token'  # next_token, dpo, or a config file's objective(model, batch)
dpo_beta = 0.1  # dpo: how dear it is to depart from the model that it began with
# optimizer
optimizer = 'auto'  # muon (the blocks' matrices; AdamW for the rest), adamw; auto: what suits
learning_rate = 'auto'  # highest; auto: by optimizers.RATES, 1.5e-2 for muon on new weights
max_iters = 4000  # steps
target_tokens = 0  # instead of max_iters: as many steps as see this many tokens
target_epochs = 0.0  # instead of max_iters: as many steps as see the data so often
max_minutes = 5.0  # the schedule ends with this time, if max_iters take longer; 0: no limit
weight_decay = 0.1  # of the matrices (and embeddings, with adamw)
beta1 = 0.9  # of AdamW's first moment
beta2 = 0.95  # of AdamW's second moment
grad_clip = 1.0  # clip the gradient's norm to this; 0: do not
max_bad_steps = 10  # so many in a row without a finite loss and gradient: back to a checkpoint
# learning rate schedule; noam's own height is learning_rate = (n_embd * warmup_iters) ** -0.5
decay_lr = True  # False: learning_rate throughout
lr_schedule = 'linear'  # linear, cosine, wsd (linear over the last fifth), noam (1 / sqrt(step))
warmup_iters = 20  # steps of linear warmup
lr_decay_iters = 0  # the step at which min_lr is reached; 0: max_iters
min_lr = 0.0  # where the schedule ends; noam's floor
# the machine
device = 'auto'  # auto, cpu, cuda, cuda:1, mps
dtype = 'auto'  # auto, float32, bfloat16, float16
compile = 'auto'  # auto, True, False: torch.compile; auto is on for CUDA alone
backend = 'auto'  # of torchrun's processes: auto, nccl, gloo
parallel = 'ddp'  # ddp: each process has the whole model; fsdp: a part of every parameter
ddp_timeout = 600.0  # seconds that processes wait for one another, before they end with one line
config = configure(globals())
defaults = read_settings(__file__)
if seeds > 1:
    raise SystemExit(run.each_seed(config, given))
if auto_resume and saving.files(out_dir):
    init_from = 'resume'
resuming = init_from == 'resume'
start, source, changed, notes = None, init_from, {}, []
if resuming:  # the run's own settings hold, but for those given now
    source, start = saving.newest(out_dir, notes.append)
    start = huggingface.with_base(start, source)
    asked_for = config['init_from']
    config = configure(globals(), saved=run.settings_of(start))
    config['one_dial'] = False  # what followed from it is the run's own
    changed = run.changes_since(start, config)
    run.check_resume(source, start, changed, config)
    config['init_from'] = start['config'].get('init_from', 'scratch')  # how the run began
    if asked_for not in ('resume', 'scratch', config['init_from']):
        notes.append(f'auto_resume goes on with {source}, and init_from={asked_for!r} is not read')
elif init_from != 'scratch':
    start = huggingface.load(init_from)
# -----------------------------------------------------------------------------
run.check_settings(config)
objective = objectives.choose(objective, dpo_beta)

# ---- where it runs
machine = Machine(device, dtype, backend, parallel, ddp_timeout)
reasons = []
if one_dial and not resuming:
    chosen, reasons = depth.settle(config, given, machine)
    config |= chosen
    globals().update(chosen)
threads = Threads()
scaler = torch.amp.GradScaler(machine.type, enabled=machine.dtype == torch.float16)
rows_per_step = gradient_accumulation_steps * batch_size  # over all processes
rows_per_process = machine.share(rows_per_step)
log = RunLog(machine.main, None if dry_run or eval_only else out_dir)
for note in notes:
    log.say(note)
optimizer, learning_rate, why = optimizers.choose(config, start)
trained_by = optimizers.trained_by(start) if start else optimizer
if dry_run and world_size:
    log.say(plan_report(config))
    why_not = why_not_measured(config, machine)
    if why_not:
        log.say(f'no step was measured here: {why_not}')
        raise SystemExit

# ---- data and its tokenizer
data_dir = os.path.join('data', dataset)
if machine.main:
    find_data(dataset, vocab_size, not dry_run, with_sources=n_encoder_layer > 0)
machine.wait_for_all()
theirs = None
if start:  # the tokenizer comes along with the weights
    theirs = find_tokenizer(start.get('folder') or os.path.dirname(source) or '.')
    theirs = theirs and theirs.as_trained(start)
tokenizer = common_tokenizer(data_dir, theirs, source, log.say)

# ---- model
torch.manual_seed(seed)
base, saved_adapters = adapters.base_of(start, config, resuming)
n_new_tokens = 0
if start is None:
    model = make_model(checkpoint.config_of(config, tokenizer))
else:
    n_new_tokens = checkpoint.fit_tokenizer(start, theirs, tokenizer, log.say)
    model = checkpoint.model_to_train(start, source, config, given, log.say)
    if resuming:  # what the run left open stays so in its settings, as in those of its other seeds
        for name, value in run.settings_of(start).items():
            if value in (0, 'auto') and name in config and name not in given:
                config[name] = value
    del start['model']  # which is the model's now, and in few bits no more
    if quantize.is_quantized(model) and not eval_only:
        raise UserError(
            f'{source} has 8-bit weights, which cannot be trained: start from what it was made of'
        )
block_size, vocab_size = config['block_size'], model.config.vocab_size
model.gradient_checkpointing = gradient_checkpointing
if quantize_base != 'none':
    quantize.quantize_base(model, quantize_base, machine.device)
if lora_rank:
    shape = lora_rank, lora_alpha, lora_dropout, lora_targets
    adapters.add(model, *shape, n_new_tokens, saved_adapters, machine.dtype)
try:
    tokenizer = tokenizer or find_tokenizer(vocab_size=vocab_size)
except UserError as e:
    log.say(f'{e}: no samples, no bits per byte')
with_sources = model.config.n_encoder_layer > 0
train_data = open_split(data_dir, 'train', block_size, vocab_size, seed, with_sources)
val_data = open_split(data_dir, 'val', block_size, vocab_size, with_sources=with_sources)
objectives.check_data(config['objective'], train_data, data_dir)
data_digest = digest(train_data.paths + val_data.paths)
tokens_per_step = rows_per_step * block_size

# ---- the state of the run
state = RunState()
if resuming:
    state = RunState.from_checkpoint(start, source)
    state.meet_changes(start, changed, config, data_digest)
    if start.get('scaler') and scaler.is_enabled():
        scaler.load_state_dict(start['scaler'])
references = start.get('reference') if resuming else None
saved_optimizer = start.get('optimizer') if resuming else None
del start
machine.agree('checkpoint in out_dir (which all have to share)', (resuming, state.step))
machine.agree('data under the same name', data_digest)
last_token = target_tokens  # with which the run ends, if it is not steps that end it
if target_epochs and not target_tokens:
    last_token = state.tokens + round(target_epochs * train_data.n_tokens) - state.rows * block_size
if last_token:
    max_iters = state.step + max(0, math.ceil((last_token - state.tokens) / tokens_per_step))
log.open(config, state, resuming, data_digest)
if tokenizer and log.out_dir and not resuming:
    tokenizer.save(log.path('tokenizer.json'))
for reason in reasons:
    log.say(reason)
if dry_run and reasons:
    raise SystemExit
log.say('settings: ' + ' '.join(f'{k}={v!r}' for k, v in config.items()))
if why:
    log.say(f'optimizer={optimizer}: {why}')
if run.without_effect(config, given):
    log.say('without effect here: ' + ', '.join(run.without_effect(config, given)))
peak = peak_flops(machine.device, machine.dtype)
n_params = model.get_num_params(non_embedding=False)
n_epochs = max_iters * tokens_per_step / train_data.n_tokens
log.say(
    f'{n_params / 1e6:.2f}M parameters, {machine.device} in {str(machine.dtype)[6:]}, '
    f'peak {peak / 1e12:.2f} TFLOP/s; {tokens_per_step:,} tokens a step, {max_iters:,} steps, '
    f'{n_epochs:.2f} epochs of {train_data.n_tokens:,} tokens'
)
for name, data in (('train', train_data), ('val', val_data)):
    if data.summary():
        log.say(f'{name}: {data.summary()}')
if quantize_base != 'none':
    log.say(
        f'in {quantize_base} for this run alone: whatever loads the adapters has the whole base'
    )
if resuming:
    changes = [f'; {k} was {v!r}, now {config[k]!r}' for k, v in changed.items() if v != config[k]]
    log.say(f'resuming at step {state.step}' + ''.join(changes))


def loss_of(network, batch):
    """The objective's loss and numbers of a tokens.Batch of numpy arrays."""
    batch = machine.move(batch)
    with machine.autocast():
        return loss_and_numbers(objective, network, batch)


def try_out(network):  # torch.compile compiles at the first use
    loss_of(network, train_data.rows(0, min(batch_size, rows_per_process)))[0].backward()
    model.zero_grad(set_to_none=True)


network = machine.wrap(model, compile, try_out, log.say)
opts = []
if not eval_only:
    rates = (learning_rate, weight_decay, (beta1, beta2))
    opts = optimizers.make_optimizers(model, optimizer, *rates, machine.muon_dtype)
    if resuming:
        optimizers.load_state_dict(opts, saved_optimizer)
del saved_optimizer
if train_data.pairs:
    for data, saved in zip((train_data, val_data), references or (None, None), strict=True):
        objectives.add_reference(model, data, machine, batch_size, saved)
of_val = (val_data, machine, batch_size, eval_iters, tokenizer, objective)
evaluate_val = functools.partial(evaluate, model, *of_val)


def gradients_of(step):
    """Forward and backward on the rows of a step; the parameters hold the gradients then.

    Returns the mean loss of all processes, the gradient's norm, and the objective's mean numbers.
    """
    # dropout's randomness is a function of the step, as the rows are: nothing to save or replay
    entropy = np.random.SeedSequence([seed, step, machine.rank])
    torch.manual_seed(int(entropy.generate_state(1)[0]))
    first_row = state.rows + machine.rank * rows_per_process
    whole = train_data.weight(state.rows, rows_per_step) / machine.world_size
    total_loss, total_numbers = torch.zeros((), device=machine.device), {}
    for done in range(0, rows_per_process, batch_size):
        count = min(batch_size, rows_per_process - done)
        share = train_data.weight(first_row + done, count) / whole  # of what the step's mean is of
        machine.set_gradient_sync(network, done + count == rows_per_process)  # once a step
        loss, numbers = loss_of(network, train_data.rows(first_row + done, count))
        loss = loss * share
        scaler.scale(loss).backward()
        total_loss += loss.detach()
        for name, number in numbers.items():
            number = torch.as_tensor(number, dtype=torch.float32, device=machine.device).detach()
            total_numbers[name] = total_numbers.get(name, 0.0) + number * share
    for opt in opts:
        scaler.unscale_(opt)
    grad_norm = optimizers.gradient_norm(model)
    loss, *means = machine.mean(torch.stack([total_loss, *total_numbers.values()]))
    return loss, grad_norm, dict(zip(total_numbers, means, strict=True))


def update(lr, grad_norm, is_finite=True):
    """Change the weights by the gradients, unless these or the loss are not finite."""
    if is_finite:
        if grad_clip:
            torch.nn.utils.clip_grads_with_norm_(model.parameters(), grad_clip, grad_norm)
        optimizers.set_learning_rate(opts, lr)
        for opt in opts:
            scaler.step(opt)
    scaler.update()
    model.zero_grad(set_to_none=True)


def train_step(step, lr):
    """One step by itself, as a dry run times it."""
    _, grad_norm, _ = gradients_of(step)
    update(lr, grad_norm)


def learning_rate_now(spent):
    """The learning rate of the next step; spent: how much of max_minutes is."""
    position, end = state.step, lr_decay_iters or max_iters
    if last_token and not lr_decay_iters:  # earlier steps may have had another size
        position, end = state.tokens / tokens_per_step, last_token / tokens_per_step
    position = max(position, spent * end)  # a run that is short of time moves on faster
    return optimizers.learning_rate_at(config, state.step, position, end)


def time_share():
    """How much of max_minutes is spent, 0 to 1; the last evaluation has to fit in as well."""
    if not max_minutes:
        return 0.0
    return state.elapsed / max(60 * max_minutes - 2 * state.longest_evaluation, 1e-9)


def evaluation_is_due(spent):
    """Every eval_interval steps; every fifth of max_minutes (spent: of 1) where that is sooner."""
    time_is_ahead = state.progress == spent  # of the share of the steps that are done
    if state.step and time_is_ahead and 0.2 * state.step / spent < eval_interval:
        return spent - state.evaluated_at >= 0.2 and spent < 0.9  # the last one comes at the end
    return state.step % eval_interval == 0


def evaluate_and_save():
    """Evaluate, and save a checkpoint where one is due; returns whether val loss is finite."""
    began = time.monotonic()
    evaluation = evaluate_val()
    if not math.isfinite(evaluation['loss']):
        return False
    with stop.changing():
        is_best = state.note_evaluation(evaluation, time.monotonic() - began)
        log.say(f'step {state.step}: val {in_words(evaluation)}')
        if (state.step > 0 or resuming) and (is_best or always_save_checkpoint):
            save_checkpoint(is_best)
    return True


def save_checkpoint(is_best=False, copy=True):
    """Take a copy of all that the run is, which a thread writes to the disk.

    All processes call it, with stop.lock held: between two steps, while nothing changes. After the
    last step nothing ever will, and copy=False spares the time.
    """
    global saved_step
    saved_step = state.step
    weights = adapters.tensors(model) if base else model.state_dict()
    saved = dict(
        model=machine.whole(weights),
        optimizer=machine.whole(optimizers.state_dict(opts)),
        model_args=checkpoint.model_args(model.config),
        config=config,
        scaler=scaler.state_dict(),
        reference=objectives.references((train_data, val_data)),
        data=data_digest,
        tokenizer=tokenizer.digest() if tokenizer else '',
        begin=tokenizer.begin if tokenizer else [],
        separator=tokenizer.separator if tokenizer else '',
        trained_by=trained_by,
        **state.in_checkpoint(),
    )
    if base:
        saved['base'] = base
    if machine.main:
        saver.save(saved, is_best, copy)


def save_now():
    """Save the state after the last whole step, while another is under way, and end the process."""
    with stop.lock:
        if not stop.is_whole:
            return
        stop.pause_loop()
        try:
            save_and_stop()
        except UserError as e:
            print(f'error: {e}', file=sys.stderr, flush=True)
            os._exit(2)
        machine.end_all()


def save_and_stop():
    """Save because of a signal, and say so."""
    if saved_step != state.step:
        save_checkpoint(copy=False)
    saver.finish()
    stop.is_paused = False  # the loop may hold the terminal
    log.say(f'stopped at step {saved_step} after {clock.elapsed() / 60:.1f} minutes; {GOES_ON}')


def go_back(why):
    """Take the run back to its last good checkpoint, with its data in a fresh order.

    Once: UserError the second time, and where there is no checkpoint. The count of skipped steps
    stays, as do samples and spikes.jsonl; metrics.jsonl is cut back.
    """
    global state, saved_step
    saver.drop()
    machine.wait_for_all()
    problem = f'{why} at step {state.step}: the run diverged'
    if state.went_back or saved_step < 0:
        again = 'again, in another order of the data' if state.went_back else 'at its beginning'
        raise UserError(f'{problem} {again}; lower learning_rate (what was saved before is kept)')
    path, good = saving.newest(out_dir, log.say, before_bad_steps=True)
    with stop.changing(), torch.no_grad():
        own = model.state_dict()
        for name, tensor in good['model'].items():
            own[name].copy_(sharded_as(tensor, own[name]))
        optimizers.load_state_dict(opts, good['optimizer'])
        scaler.load_state_dict(good['scaler'])
        skipped_steps = state.skipped_steps
        state = RunState.from_checkpoint(good, path)
        state.meet_changes(good, run.changes_since(good, config), config, data_digest)
        state.skipped_steps, state.went_back = skipped_steps, True
        order_data()
        clock.start_interval()
        saved_step = state.step
        with log.disk_may_be_full('metrics.jsonl'):
            log.rewind(state.step)
    log.say(f'{problem}; it goes on from step {state.step} with its data in a fresh order')


def order_data():
    """Take the data in the run's order, which is another one after it has gone back."""
    train_data.seed = seed + 10**9 * state.went_back


def note_step(loss, numbers, is_finite):
    """Count a step: its loss and numbers, or that it is skipped."""
    clock.n_steps += 1
    if is_finite:
        spike = state.note_step(loss, numbers)
        if spike:
            seen = train_data.documents_seen(state.rows, rows_per_step)
            log.spike(state.step, loss, *spike, seen, tokenizer)
        return
    state.bad_steps += 1
    state.skipped_steps += 1
    what = 'gradient' if math.isfinite(loss) else 'loss'
    log.say(f'step {state.step}: the {what} is not finite; skipped, {state.bad_steps} in a row')


def log_steps():
    """A line of metrics.jsonl and one of progress: means over the recent steps."""
    losses = state.recent_losses
    if not losses:  # all were skipped, or have been logged
        log.metrics(**state.metrics())
        return
    own_numbers = {}
    for name, values in state.recent_numbers.items():
        own_numbers[name] = sum(values) / len(values)
    line = dict(train_loss=sum(losses) / len(losses), lr=state.lr, grad_norm=state.grad_norm)
    line |= own_numbers
    if clock.n_steps:
        speed = clock.n_steps * tokens_per_step / clock.interval()
        line['tokens_per_second'] = speed
        line['mfu'] = speed * flops_per_token(model, block_size) / (peak * machine.world_size)
    line['step_losses'] = [round(each, 5) for each in losses]
    log.metrics(**state.metrics(), **line)
    log.progress(state, max_iters, line, own_numbers)
    state.recent_losses, state.recent_numbers = [], {}
    clock.start_interval()


if eval_only:
    log.say(f'val {in_words(evaluate_val())}')
    raise SystemExit
if dry_run:
    log.say(dry_run_report(train_step, model, config, tokens_per_step, max_iters, opts, machine))
    raise SystemExit

# ---- the training loop
GOES_ON = f'To go on: python train.py --init_from=resume --out_dir={shlex.quote(out_dir)}'
# where each process has a part of the model, one alone cannot save it in the middle of a step
saves_alone = machine.main and not machine.is_sharded
stop = run.StopSignals(machine.main, save_now if saves_alone else None)
machine.is_asked_to_stop = stop.asked
state.evaluated_at = min(state.evaluated_at, time_share())  # max_minutes may be more now
if state.step > warmup_iters and learning_rate_now(time_share()) > 1.05 * state.lr > 0:
    log.say(f'the learning rate rises again: it was {state.lr:.2e}')
log.start_bar(state.step, max_iters)
clock = run.Clock(state.elapsed)
order_data()
is_latest = resuming and os.path.basename(source) == 'ckpt.pt'
on_disk = state.step if is_latest else None
saver = saving.Saver(out_dir, keep_checkpoints, on_disk)
saved_step = state.step if resuming else -1  # -1: there is no checkpoint yet
first_step = state.step
while True:
    state.elapsed = clock.elapsed()
    # the processes go on, or stop, together
    stopping, spent = machine.largest([stop.asked(), time_share()])
    steps_share = state.tokens / last_token if last_token else state.step / max(max_iters, 1)
    state.progress = max(steps_share, spent)
    done = state.step >= max_iters or spent >= 1
    saver.tend(log.say)
    if machine.type == 'cpu':
        threads.adapt(log.say)

    # once in a while: evaluate, save, sample
    with clock.not_training():
        if (evaluation_is_due(spent) or done) and not stopping:
            if state.evaluated_step != state.step:  # else the checkpoint has this evaluation
                state.evaluated_at = spent
                if not evaluate_and_save():
                    go_back('val loss is not finite')
                    continue
            if early_stopping_patience and state.evaluations_since_best >= early_stopping_patience:
                n = state.evaluations_since_best
                log.say(f'no better val loss in {n} evaluations: stopping early')
                done = True
            if state.step > 0 and not done:
                log.draw_now_and_then()
        due = sample_interval and state.step > 0 and (state.step % sample_interval == 0 or done)
        if due and tokenizer and not stopping:
            prompt = (sample_start, sample_ask)
            options = (sample_tokens, sample_repetition_penalty, seed)
            log.samples(state.step, samples(model, tokenizer, machine, 3, *prompt, *options))
    if done or stopping:
        break

    # one step
    lr = learning_rate_now(spent)
    loss, grad_norm, numbers = gradients_of(state.step)
    is_finite = math.isfinite(loss) and math.isfinite(grad_norm)
    with stop.changing():
        state.lr, state.grad_norm = lr, float(grad_norm)
        update(lr, grad_norm, is_finite)
        note_step(loss, numbers, is_finite)
        if state.step % log_interval == 0 or state.evaluated_step == state.step:
            log_steps()
        state.step += 1
        state.rows += rows_per_step
        state.tokens += tokens_per_step
    if state.bad_steps >= max_bad_steps:
        go_back(f'no loss and gradient was finite in {state.bad_steps} steps')
    log.advance(state, max_iters)

log.close_bar()
stop.lock.acquire()  # and never released: save_now() has no turn any more
if stopping:
    save_and_stop()
    machine.leave()
    raise SystemExit
if saved_step != state.step:  # the last weights are kept in any case
    save_checkpoint(copy=False)
saver.finish()
log_steps()
log.draw()
if state.step > first_step:  # else it had ended before
    log.list_run(config, defaults, state)
folder = shlex.quote(out_dir)
time_is_up = ', all of max_minutes' if spent >= 1 else ''
best = f' ({folder}/best.pt, step {state.best_step})' if state.best_step > 0 else ''
log.say(
    f'done at step {state.step} after {clock.elapsed() / 60:.1f} minutes{time_is_up} '
    f'({clock.aside:.1f} s went to evaluations, checkpoints and samples); best val loss '
    f'{state.best_val_loss:.4f}{best}. Try it: python sample.py --out_dir={folder}'
)
machine.leave()
