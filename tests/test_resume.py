"""A run that goes on under other settings, with other data, or after something went wrong."""

import json
import os

import pytest
from conftest import TINY, fails, free_port, metrics, run, start, write_tiny

from fledge import checkpoint
from fledge.log import DRAW_SECONDS, RunLog, curves_of
from fledge.tokenizer import char_tokenizer, load_tokenizer
from fledge.tokens import Tokens

PLAIN = [*TINY, '--sample_interval=0', '--eval_interval=1000']


# a config file whose objective asks the run to stop in a step
STOPPING = """
def objective(model, batch):
    import os, signal
    loss = model(*batch, return_logits=False)[1]
    global calls
    calls = globals().get('calls', 0) + model.training
    if calls == WHEN:
        os.kill(os.getpid(), signal.SIGTERM)
    return loss
"""


def recording(folder):
    """A config file whose objective writes down the rows that are trained on."""
    (folder / 'record.py').write_text("""
def objective(model, batch):
    if model.training:
        with open('rows.txt', 'a') as f:
            f.writelines(f'{row.tolist()}\\n' for row in batch['inputs'])
    return model(*batch, return_logits=False)[1]
""")
    return 'record.py'


def rows_seen(folder):
    lines = (folder / 'rows.txt').read_text().splitlines()
    (folder / 'rows.txt').unlink()
    return lines


@pytest.mark.slow
def test_rows_and_tokens_are_counted_whatever_the_batch(workdir):
    config = recording(workdir)
    run(workdir, 'train.py', *PLAIN, config, '--batch_size=8', '--target_tokens=2560')
    expected, state = rows_seen(workdir), checkpoint.load(str(workdir / 'out/ckpt.pt'))['run']
    assert (state['rows'], state['tokens'], state['step']) == (160, 2560, 20)
    run(workdir, 'train.py', *PLAIN, config, '--batch_size=8', '--target_tokens=1280')
    resume = [config, '--init_from=resume', '--target_tokens=2560']
    run(workdir, 'train.py', *resume, '--batch_size=2', '--gradient_accumulation_steps=2')
    state = checkpoint.load(str(workdir / 'out/ckpt.pt'))['run']
    assert (state['rows'], state['tokens'], state['step']) == (160, 2560, 30)
    assert rows_seen(workdir) == expected
    assert [m['tokens'] for m in metrics(workdir / 'out')] == [
        *range(0, 1280, 128),
        *range(1280, 2561, 64),
    ]
    assert 'done at step 30' in run(workdir, 'train.py', *resume, '--batch_size=1')
    # longer rows: about as many of them lie behind
    run(workdir, 'train.py', *resume, '--block_size=32', '--batch_size=4', '--target_tokens=2816')
    state = checkpoint.load(str(workdir / 'out/ckpt.pt'))['run']
    assert (state['rows'], state['tokens'], state['step']) == (88, 2816, 31)


@pytest.mark.slow
def test_the_rate_goes_on_by_tokens_where_tokens_end_the_run(workdir):
    flags = [*PLAIN, '--warmup_iters=1', '--target_tokens=2560', '--learning_rate=0.01']
    run(workdir, 'train.py', *flags, '--max_minutes=0', '--batch_size=8')
    whole = {m['tokens']: m['lr'] for m in metrics(workdir / 'out')}
    (workdir / 'half.py').write_text(STOPPING.replace('WHEN', '10'))
    assert 'stopped at step 10' in run(workdir, 'train.py', *flags, 'half.py', '--batch_size=8')
    (workdir / 'half.py').write_text('def objective(model, batch):\n    return model(*batch)[1]\n')
    out = run(workdir, 'train.py', 'half.py', '--init_from=resume', '--batch_size=2')
    assert 'done at step 50' in out and 'rises' not in out
    parts = {m['tokens']: m['lr'] for m in metrics(workdir / 'out')}
    shared = whole.keys() & parts.keys() - {0, 128, 2560}
    assert len(shared) == 18
    assert all(abs(whole[tokens] - parts[tokens]) < 1e-3 for tokens in shared)


@pytest.mark.slow
def test_a_rate_that_rises_again_is_said(workdir):
    run(workdir, 'train.py', *PLAIN, '--max_iters=20')
    out = run(workdir, 'train.py', '--init_from=resume', '--max_iters=200')
    assert 'the learning rate rises again: it was 4.' in out


@pytest.mark.slow
def test_data_that_changed_under_a_run_is_refused(workdir):
    run(workdir, 'train.py', *PLAIN, '--max_iters=4')
    data = workdir / 'data/tiny/train.bin'
    before = data.read_bytes()
    data.write_bytes(before[:3000] + bytes(2) + before[3002:])
    for flags in (['--auto_resume'], ['--init_from=resume', '--max_iters=8']):
        words = fails(workdir, 'train.py', *PLAIN, *flags)
        assert 'data/tiny is not what this run was trained on any more' in words
    data.write_bytes(before)
    run(workdir, 'train.py', *PLAIN, '--auto_resume', '--max_iters=8')
    # another tokenizer for the same tokens, or beside the run
    tokenizer = workdir / 'data/tiny/tokenizer.json'
    mine = tokenizer.read_text()
    char_tokenizer([chr(200 + i) for i in range(64)]).save(str(tokenizer))
    words = fails(workdir, 'train.py', '--init_from=resume', '--max_iters=9')
    assert 'was prepared with another tokenizer than the one of out/ckpt.pt' in words
    os.replace(tokenizer, workdir / 'out/tokenizer.json')
    for script in ('sample.py', 'evaluate.py', 'export.py'):
        assert 'trained with another tokenizer than the one beside it' in fails(workdir, script)
    (workdir / 'out/tokenizer.json').write_text(mine)
    tokenizer.write_text(mine)


@pytest.mark.slow
def test_settings_that_a_run_cannot_go_on_with_are_named(workdir):
    run(workdir, 'train.py', *PLAIN, '--max_iters=4')
    write_tiny(workdir / 'data/more', n_train=3000)
    flags = ['--dataset=more', '--n_layer=3', '--n_kv_head=2', '--optimizer=adamw', '--n_inner=0']
    words = fails(workdir, 'train.py', '--init_from=resume', *flags, '--learning_rate=1e-3')
    for problem in (
        "dataset='more' (it has 'tiny')",
        'n_layer=3 (it has 2)',
        'n_kv_head=2 (it has 1)',
        "optimizer='adamw' (it has 'muon')",
    ):
        assert problem in words
    assert 'n_inner' not in words and 'learning_rate' not in words
    changes = ['--learning_rate=1e-3', '--batch_size=2', '--max_iters=6', '--seed=5']
    out = run(workdir, 'train.py', '--init_from=resume', *changes)
    for change in (
        'learning_rate was 0.006, now 0.001',
        'batch_size was 4, now 2',
        'max_iters was 4, now 6',
        'seed was 1337, now 5',
    ):
        assert change in out


# a config file whose loss is what `calls`, the number of training's calls so far, makes of it
BROKEN = """
def objective(model, batch):
    import os, signal
    loss = model(*batch, return_logits=False)[1]
    global calls
    calls = globals().get('calls', 0) + model.training
    return loss * float('nan') if model.training and (WHEN) else loss
"""


@pytest.mark.slow
def test_a_step_that_is_not_finite_is_skipped(workdir):
    (workdir / 'own.py').write_text(BROKEN.replace('WHEN', 'calls in (3, 6, 7)'))
    out = run(workdir, 'train.py', *PLAIN, 'own.py', '--max_iters=12', '--max_bad_steps=3')
    assert 'step 6: the loss is not finite; skipped, 2 in a row' in out
    lines = metrics(workdir / 'out')
    assert [m['train_loss'] is None for m in lines] == [i in (2, 5, 6, 12) for i in range(13)]
    assert lines[-1]['skipped_steps'] == 3 and 'skipped_steps' not in lines[1]
    saved = checkpoint.load(str(workdir / 'out/ckpt.pt'))
    assert saved['run']['skipped_steps'] == 3
    # a skipped step changes no weight: without its updates the others come to the same
    momenta = saved['optimizer'][0]['state']
    assert {int(entry['step']) for entry in momenta.values()} == {9}


@pytest.mark.slow
def test_a_gradient_alone_that_is_not_finite_is_skipped(workdir):
    (workdir / 'own.py').write_text("""
import torch

class Broken(torch.autograd.Function):
    @staticmethod
    def forward(ctx, loss):
        return loss.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * float('inf')

def objective(model, batch):
    global calls
    calls = globals().get('calls', 0) + model.training
    loss = model(*batch, return_logits=False)[1]
    return Broken.apply(loss) if calls == 3 else loss
""")
    out = run(workdir, 'train.py', *PLAIN, 'own.py', '--max_iters=5')
    assert 'step 2: the gradient is not finite; skipped, 1 in a row' in out
    assert metrics(workdir / 'out')[-1]['skipped_steps'] == 1


@pytest.mark.slow
def test_a_loss_alone_that_is_not_finite_is_skipped(workdir):
    (workdir / 'own.py').write_text(
        BROKEN.replace("loss * float('nan')", "loss + float('inf')").replace('WHEN', 'calls == 3')
    )
    out = run(workdir, 'train.py', *PLAIN, 'own.py', '--max_iters=5')
    assert 'step 2: the loss is not finite; skipped, 1 in a row' in out
    momenta = checkpoint.load(str(workdir / 'out/ckpt.pt'))['optimizer'][0]['state']
    assert {int(entry['step']) for entry in momenta.values()} == {4}


@pytest.mark.slow
def test_a_run_goes_back_once_and_then_stops(workdir):
    flags = [*PLAIN, '--max_iters=20', '--eval_interval=5', '--max_bad_steps=3']
    (workdir / 'own.py').write_text(BROKEN.replace('WHEN', '12 < calls < 16'))
    out = run(workdir, 'train.py', *flags, 'own.py', recording(workdir), '--out_dir=whole')
    steps = rows_seen(workdir)
    assert 'skipped' not in out  # record.py's objective is the later one
    own = (
        (workdir / 'own.py')
        .read_text()
        .replace(
            '    return',
            """    if model.training:
        with open('rows.txt', 'a') as f:
            f.writelines(f'{row.tolist()}\\n' for row in batch['inputs'])
    return""",
        )
    )
    (workdir / 'own.py').write_text(own)
    out = run(workdir, 'train.py', *flags, 'own.py')
    assert 'no loss and gradient was finite in 3 steps at step 15: the run diverged' in out
    assert 'goes on from step 10 with its data in a fresh order' in out and 'done at step 20' in out
    seen = rows_seen(workdir)
    assert seen[:60] == steps[:60] and len(seen) == 100
    assert set(seen[60:]) != set(steps[40:]) and seen[60:] != steps[40:]
    assert [m['step'] for m in metrics(workdir / 'out')] == list(range(21))
    state = checkpoint.load(str(workdir / 'out/ckpt.pt'))['run']
    assert (state['went_back'], state['skipped_steps']) == (True, 3)
    # a run that has broken weights at a signal goes back to what was before it
    flags_of_stop = [*flags, 'stop.py', '--out_dir=stopped']
    stop = STOPPING.replace('WHEN', '13').replace(
        'return loss', "return loss * float('nan') if model.training and calls > 11 else loss"
    )
    (workdir / 'stop.py').write_text(stop)
    assert 'stopped at step 13' in run(workdir, 'train.py', *flags_of_stop)
    (workdir / 'stop.py').write_text(BROKEN.replace('WHEN', 'calls < 2'))
    out = run(workdir, 'train.py', *flags_of_stop, '--auto_resume')
    assert 'finite in 3 steps at step 14' in out and 'goes on from step 10 with its data' in out
    assert 'skipped: the last steps of stopped/ckpt.pt were not finite' in out
    # the fresh order is the run's from then on: a resume has it as well
    (workdir / 'own.py').write_text(own.replace('12 < calls < 16', 'calls > 2'))
    resume = ['own.py', '--init_from=resume', '--max_iters=30']
    words = fails(workdir, 'train.py', *resume)
    assert 'at step 25: the run diverged again, in another order of the data' in words
    assert checkpoint.load(str(workdir / 'out/ckpt.pt'))['iter_num'] == 20
    (workdir / 'own.py').write_text(BROKEN.replace('WHEN', 'True'))
    words = fails(workdir, 'train.py', *flags, 'own.py', '--out_dir=new')
    assert 'at step 3: the run diverged at its beginning; lower learning_rate' in words


@pytest.mark.slow
def test_adapters_go_back_as_well(workdir):
    run(workdir, 'train.py', *PLAIN, '--max_iters=4', '--out_dir=base')
    base = checkpoint.load(str(workdir / 'base/ckpt.pt'))['model']
    (workdir / 'own.py').write_text(BROKEN.replace('WHEN', '12 < calls < 16'))
    flags = [*PLAIN, 'own.py', '--init_from=base/ckpt.pt', '--lora_rank=2', '--eval_interval=5']
    out = run(workdir, 'train.py', *flags, '--max_iters=20', '--max_bad_steps=3')
    assert 'goes on from step 10 with its data in a fresh order' in out and 'done at step 20' in out
    saved = checkpoint.load(str(workdir / 'out/ckpt.pt'))
    assert saved['run']['went_back'] and not saved['model'].keys() & base.keys()


@pytest.mark.slow
def test_a_val_loss_that_is_not_finite_takes_the_run_back(workdir):
    (workdir / 'own.py').write_text("""
def objective(model, batch):
    loss = model(*batch, return_logits=False)[1]
    global calls
    calls = globals().get('calls', 0) + model.training
    return loss * float('nan') if not model.training and calls == 10 else loss
""")
    out = run(workdir, 'train.py', *PLAIN, 'own.py', '--max_iters=20', '--eval_interval=5')
    assert 'val loss is not finite at step 10: the run diverged; it goes on from step 5' in out
    assert [m['step'] for m in metrics(workdir / 'out')] == list(range(21))


@pytest.mark.slow
def test_a_spike_of_the_loss_is_logged_with_its_documents(workdir):
    (workdir / 'own.py').write_text(
        BROKEN.replace("float('nan')", '9').replace('WHEN', 'calls == 111')
    )
    out = run(workdir, 'train.py', *PLAIN, 'own.py', '--max_iters=115', '--learning_rate=1e-4')
    assert out.count('loss spike') == 1 and 'step 110: loss spike: ' in out
    [line] = (workdir / 'out/spikes.jsonl').read_text().splitlines()
    spike = json.loads(line)
    assert spike['step'] == 110 and spike['loss'] > 5 * spike['mean']
    data = Tokens(str(workdir / 'data/tiny'), 'train', 16, 64, seed=1337)
    rows = data.rows(440, 4)['inputs']
    tokenizer = load_tokenizer(str(workdir / 'data/tiny'))
    for document, row in zip(spike['documents'], rows, strict=True):
        assert document['file'] == 'data/tiny/train.bin' and document['tokens'] == 16
        assert data.shards[0][document['position'] :][:16].tolist() == row.tolist()
        assert document['begins'] == tokenizer.decode(row.tolist())


@pytest.mark.slow
def test_the_last_weights_are_kept_in_any_case(workdir):
    out = run(workdir, 'train.py', *PLAIN, '--max_iters=0')
    assert 'Try it: python sample.py --out_dir=out' in out
    assert '012' in run(workdir, 'sample.py', '--start=012', '--num_samples=1')
    flags = ['--always_save_checkpoint=False', '--learning_rate=9', '--grad_clip=0']
    out = run(workdir, 'train.py', *PLAIN, *flags, '--max_iters=7', '--out_dir=worse')
    assert 'best.pt' not in out and not (workdir / 'worse/best.pt').exists()
    assert checkpoint.load(str(workdir / 'worse/ckpt.pt'))['iter_num'] == 7


@pytest.mark.slow
def test_a_logged_loss_is_the_mean_since_the_last_line(workdir):
    run(workdir, 'train.py', *PLAIN, '--max_iters=12', '--dtype=float32')
    single = [m['train_loss'] for m in metrics(workdir / 'out')][:12]
    run(workdir, 'train.py', *PLAIN, '--max_iters=12', '--dtype=float32', '--log_interval=5')
    lines = metrics(workdir / 'out')
    assert [m['step'] for m in lines] == [0, 5, 10, 12]
    assert lines[0]['train_loss'] == single[0]
    for line, steps in zip(lines[1:3], (single[1:6], single[6:11]), strict=True):
        assert abs(line['train_loss'] - sum(steps) / 5) < 1e-6
        assert all(abs(a - b) < 1e-4 for a, b in zip(line['step_losses'], steps, strict=True))
    tokens = [tokens for tokens, _, _ in curves_of(lines)['step_loss']]
    assert tokens == [*(64 * i for i in range(11)), 768]  # the last line is behind the last step
    RunLog(True, str(workdir / 'out')).draw()


def test_loss_png_is_drawn_no_more_often_than_somebody_looks(tmp_path):
    line = dict(step=0, tokens=0, train_loss=4.0, val_loss=4.0, elapsed=1.0, step_losses=[4.0])
    (tmp_path / 'metrics.jsonl').write_text(json.dumps(line) + '\n')
    log, picture = RunLog(True, str(tmp_path)), tmp_path / 'loss.png'
    log.draw_now_and_then()
    assert not picture.exists()  # the run has just begun
    log.drawn_at -= DRAW_SECONDS + 1
    log.draw_now_and_then()
    picture.unlink()
    log.draw_now_and_then()
    assert not picture.exists()
    log.draw()
    assert picture.exists()


@pytest.mark.slow
def test_the_steps_between_two_lines_are_counted_over_a_resume(workdir):
    (workdir / 'own.py').write_text(STOPPING.replace('WHEN', '-1'))
    (workdir / 'stop.py').write_text(STOPPING.replace('WHEN', '8'))
    flags = [*PLAIN, '--log_interval=5', '--dtype=float32', '--max_iters=12']
    run(workdir, 'train.py', *flags, 'own.py')
    whole = [(m['step'], m['train_loss']) for m in metrics(workdir / 'out')]
    assert [step for step, _ in whole] == [0, 5, 10, 12] and whole[-1][1] is not None
    run(workdir, 'train.py', *flags, 'stop.py', '--out_dir=parts')
    run(workdir, 'train.py', 'own.py', '--init_from=resume', '--out_dir=parts')
    assert [(m['step'], m['train_loss']) for m in metrics(workdir / 'parts')] == whole


@pytest.mark.slow
def test_the_best_weights_are_kept_where_the_measure_changes(workdir):
    run(workdir, 'train.py', *PLAIN, '--max_iters=40')
    best = (workdir / 'out/best.pt').read_bytes()
    ruin = ['--learning_rate=1', '--max_iters=44', '--eval_iters=3']
    out = run(workdir, 'train.py', '--init_from=resume', *ruin)
    assert 'best.pt of before is now best-before-step-40.pt' in out
    assert (workdir / 'out/best-before-step-40.pt').read_bytes() == best
    assert (workdir / 'out/best.pt').exists()


@pytest.mark.slow
def test_a_run_that_time_cuts_is_evaluated_ten_times(workdir):
    flags = ['--max_iters=100000', '--eval_interval=100000', '--log_interval=1000']
    run(workdir, 'train.py', *TINY, '--sample_interval=0', *flags, '--max_minutes=0.05')
    evaluated = [m['step'] for m in metrics(workdir / 'out') if m['val_loss'] is not None]
    assert 3 <= len(evaluated) <= 13  # ten, but fewer where a step takes long; else two
    run(workdir, 'train.py', '--init_from=resume', '--max_minutes=0.1')
    again = [m['step'] for m in metrics(workdir / 'out') if m['val_loss'] is not None]
    assert len([step for step in again if step > evaluated[-1]]) >= 2


@pytest.mark.slow
def test_llmcs_shards_are_found(workdir):
    for split, number in (('train', 1), ('val', 0)):
        os.rename(
            workdir / f'data/tiny/{split}.bin', workdir / f'data/tiny/edu_{split}_{number:06d}.bin'
        )
    assert 'done at step 2' in run(workdir, 'train.py', *PLAIN, '--max_iters=2')
    os.rename(workdir / 'data/tiny/edu_val_000000.bin', workdir / 'data/tiny/tiny_val.bin')
    assert 'tokens' in json.loads(run(workdir, 'evaluate.py', '--json').splitlines()[-1])


@pytest.mark.slow
def test_processes_go_on_with_one_run_and_one_dataset(workdir):
    """Two nodes without a shared disk: each process has a folder of its own."""
    run(workdir, 'train.py', *PLAIN, '--max_iters=4')
    for rank, made in enumerate((workdir / 'node0', workdir / 'node1')):
        write_tiny(made / 'data/tiny', n_train=4000 + 100 * rank)
    os.rename(workdir / 'out', workdir / 'node0/out')
    for flags, words in (
        (
            ['--auto_resume', '--max_iters=8'],
            'another checkpoint in out_dir (which all have to share)',
        ),
        (['--out_dir=new'], 'another data under the same name than process 0'),
    ):
        env = dict(WORLD_SIZE='2', MASTER_ADDR='127.0.0.1', MASTER_PORT=str(free_port()))
        nodes = []
        for rank in range(2):
            mine = env | dict(RANK=str(rank), LOCAL_RANK='0')
            nodes.append(start(workdir / f'node{rank}', 'train.py', *PLAIN, *flags, env=mine))
        errors = [node.communicate(timeout=120)[1] for node in nodes]
        assert all(node.returncode for node in nodes), errors
        assert words in ''.join(errors), errors
    assert 'RANK is not' in fails(workdir, 'train.py', *PLAIN, env=dict(WORLD_SIZE='2'))
