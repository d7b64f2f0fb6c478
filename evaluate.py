"""Measure models: loss, bits per byte and accuracy on prepared data, tasks, what they say, speed.

python evaluate.py --out_dir=out --split=val --json
python evaluate.py --init_from=out/int8.pt                                what 8 bits cost
python evaluate.py --init_from=HuggingFaceTB/SmolLM2-135M --dataset=stories     anybody's model
python evaluate.py --out_dir=out-sentiment --labels                             a classifier
python evaluate.py --out_dir=out-translate --num_beams=4                        sources, targets
python evaluate.py --out_dir=out-a,out-b --tasks=blimp.jsonl,lambada.jsonl      two models
python evaluate.py --out_dir=out-a,out-b --prompts --speed                      what they say

loss is in nats a token, perplexity its exponential, accuracy the share of tokens that were the
likeliest, accuracy_top5 of those among the five likeliest, calibration_error how far a model's
certainty is from how often it is right. Models with different tokenizers compare by bits per byte
alone. Each token is predicted once, from at most block_size tokens before it in its row; with
--stride=N windows of block_size tokens move on by N, as in transformers' documentation.

--tasks asks which answer is likeliest, scored as lm-evaluation-harness does (fledge/tasks.py has
the forms of a line). --prompts shows what the models go on with, how varied that is and how often
it repeats itself; --answers, in gsm8k's form, how often the number at the end of a greedy answer is
right; --speed how fast a model reads and writes. With these the data is left alone, unless
--dataset or --split asks for it.

On data with sources and targets exact_match is how often a greedy target, or with --num_beams a
searched one, is right in every token; chrf and bleu are sacrebleu's.

--labels adds how often a document was given the right label (label_accuracy), precision, recall and
F1 of each label, and the table of which is taken for which, drawn in confusion.png beside the
weights. The model chooses among the labels alone.
"""

import json as json_
import math
import os
import sys
import time

from fledge import UserError, checkpoint, cpu, read_meta
from fledge.configurator import configure, given
from fledge.device import Machine
from fledge.documents import open_split
from fledge.evaluation import Windows, evaluate, evaluate_labels, in_words
from fledge.formats import huggingface
from fledge.generation import Sampling
from fledge.labels import draw_confusion, find_labels, label_scores, label_tables
from fledge.prompts import read_prompts
from fledge.replies import PROMPTS, measure_answers, measure_prompts, measure_speed, read_questions
from fledge.report import draw_loss_by_position, draw_tasks, folder_of_pictures, table
from fledge.targets import measure_targets
from fledge.tasks import read_task, run_task
from fledge.tokenizer import common_tokenizer
from fledge.tokens import Tokens, split_files, spread

# -----------------------------------------------------------------------------
init_from = 'resume'  # resume (out_dir's ckpt.pt), a checkpoint file, a Hugging Face folder or name
out_dir = 'out'  # a run's folder; of this and of init_from several, with commas between them
dataset = ''  # a folder under data/; '': the one that the (first) run was trained on
split = 'val'  # train, val, or test where the data has one
eval_iters = 0  # batches, spread evenly over the split; 0: all of it
batch_size = 4  # rows in a batch
block_size = 0  # tokens in a row; 0: the run's, of another model its context, at most 1024
stride = 0  # tokens by which a window moves on; 0: rows follow one another
labels = False  # how well the labels of prepare/classify.py are told apart
tasks = ''  # .jsonl files of questions with answers, with commas between them
prompts = 'auto'  # a file of texts to go on with; --prompts alone: three of our own; auto: none
answers = ''  # a .jsonl file of questions whose answers end with a number, as gsm8k's
speed = False  # how fast a prompt is read and an answer written
max_new_tokens = 200  # of a prompt or an answer
temperature = 0.8  # of what is drawn behind prompts; 0 is greedy
num_beams = 1  # of targets: 1 is greedy
length_penalty = 1.0  # of beams: the higher the likelier are longer targets
seed = 1337  # of the draws
device = 'auto'  # auto, cpu, cuda, cuda:1, mps
dtype = 'auto'  # auto, float32, bfloat16, float16
json = False  # the last line of output is one JSON object
configure(globals())
# -----------------------------------------------------------------------------
examples = {path: read_task(path) for path in tasks.split(',') if path}
texts = PROMPTS if prompts is True else []
if prompts not in ('auto', True, False):
    texts = read_prompts(prompts)
questions = read_questions(answers) if answers else []
measures_split = labels or bool(given & {'dataset', 'split'})
measures_split = measures_split or not (examples or texts or questions or speed)
idle = {}  # why settings have no effect: their names
if not measures_split:
    idle['--dataset or --split'] = {'eval_iters', 'stride'}
if not texts:
    idle['--prompts'] = {'temperature', 'seed'}
if not texts and not questions:
    idle['--prompts or --answers'] = {'max_new_tokens'}
for why, names in idle.items():
    if names & given:
        print(f'without effect without {why}: {", ".join(sorted(names & given))}', file=sys.stderr)
sources = []
for source in init_from.split(','):
    folders = out_dir.split(',') if source == 'resume' else [out_dir]
    sources += [(source, folder) for folder in folders]

machine = Machine(device, dtype)
say = print if machine.main else lambda line: None  # under torchrun one process speaks
results = {}  # of each model, by the path of its weights
for source, folder in sources:
    # ---- the model
    state, path, tokenizer = huggingface.load_with_tokenizer(source, folder, dataset)
    run = state['config']
    objective = run.get('objective', 'next_token')
    model_folder = state.get('folder') or ''
    model = checkpoint.load_model(state, path).to(machine.device)
    del state
    machine.wrap(model)
    model.eval()
    context, vocab_size = model.config.block_size, model.config.vocab_size
    has_encoder = model.config.n_encoder_layer > 0
    if has_encoder and (examples or texts or questions or speed):
        raise UserError(
            f'{path} is an encoder-decoder, which is measured on sources and targets: leave out '
            '--tasks, --prompts, --answers and --speed'
        )
    row_length = block_size or min(context, run.get('block_size', 1024))
    if row_length > context:
        raise UserError(f'block_size={block_size} is more than the context of {path}, {context}')
    n_tokens = batch_size * row_length  # read together, of tasks and of generations
    targets = None  # data with sources and targets
    result = results[path] = {}

    # ---- a split of prepared data
    if measures_split:
        dataset = dataset or run.get('dataset')
        if not dataset:
            raise UserError(
                f'{path} does not say what it was trained on: name the data with --dataset'
            )
        data_dir = os.path.join('data', dataset)
        of_split = (data_dir, split, row_length, vocab_size)
        data = open_split(*of_split, with_sources=has_encoder)
        if has_encoder:
            targets = data
        elif read_meta(data_dir).get('separator'):
            targets = open_split(*of_split, with_sources=True)
        if common_tokenizer(data_dir, tokenizer, path, say).begin != tokenizer.begin:
            say(
                f'documents of {data_dir} do not begin with the tokens that they began with for '
                f'{path}'
            )
        if data.pairs:
            raise UserError(
                f'{data_dir} has preferences: the run that learns from them measures them as it '
                'goes, in its metrics.jsonl'
            )
        if stride and not isinstance(data, Tokens):
            raise UserError(f'--stride needs a stream of tokens, and {data_dir} has documents')
        if stride >= row_length:
            raise UserError(f'stride={stride} must be less than block_size={row_length}')
        if objective != 'next_token':
            say(f'the run learned by {objective}; what is measured here is next-token loss')
        if labels:
            # the model may give labels that this split lacks
            paths = sorted({*split_files(data_dir, 'train'), *data.paths})
            words = find_labels(paths, tokenizer, data_dir)
            if len(words) < 2 or max(words) >= vocab_size:
                raise UserError(
                    f'{data_dir} has the labels {", ".join(words.values())}: a classifier needs '
                    f'two at least, all of them in the vocabulary of {path} ({vocab_size:,} tokens)'
                )
        began = time.monotonic()
        rows = Windows(data, stride) if stride else data
        measured = evaluate(model, rows, machine, batch_size, eval_iters, tokenizer, detailed=True)
        tokens_per_second = measured['tokens'] / (time.monotonic() - began)
        computed_in = str(machine.dtype)[6:]
        if not math.isfinite(measured['loss']):
            raise UserError(
                f'the loss of {path} on {split} of {dataset} is {measured["loss"]} in '
                f'{computed_in}: its weights are broken, or need --dtype=float32'
            )
        result |= dict(dataset=dataset, split=split) | measured
        named = f'{path}: ' if len(sources) > 1 else ''
        say(
            f'{named}{split} of {dataset}: {in_words(measured)}, accuracy '
            f'{measured["accuracy"]:.2%}; {measured["tokens"]:,} tokens, '
            f'{measured["bytes"]:,} bytes, in rows of {row_length}, {computed_in}, '
            f'{tokens_per_second:,.0f} tokens/s'
        )
        if labels:
            confusion = evaluate_labels(model, data, machine, batch_size, eval_iters, list(words))
            of_labels = label_scores(confusion, list(words.values()))
            result |= of_labels
            if machine.main:
                picture = os.path.join(folder_of_pictures(path), 'confusion.png')
                print(label_tables(of_labels))
                draw_confusion(of_labels, picture)
        result |= dict(
            block_size=row_length, dtype=computed_in, tokens_per_second=tokens_per_second
        )

    # ---- tasks
    for name, of_task in examples.items():
        measured = run_task(model, tokenizer, model_folder, of_task, machine, n_tokens)
        result.setdefault('tasks', {})[name] = measured

    # ---- what it says, and how fast
    of_beams = given & {'num_beams', 'length_penalty'}
    if of_beams and not targets:
        names = ', '.join(sorted(of_beams))
        print(f'without effect without sources and targets: {names}', file=sys.stderr)
    if targets or texts or questions or speed:
        model.to(machine.dtype)
        if machine.type == 'cpu':
            cpu.speed_up(model, packed=True)
    try:
        if targets:
            beams = dict(num_beams=num_beams, length_penalty=length_penalty)
            sampling = Sampling(temperature=0, ends=tuple(huggingface.ends(tokenizer)), **beams)
            numbers = spread(range(targets.n_documents), eval_iters * batch_size or None)
            result |= measure_targets(model, tokenizer, targets, numbers, sampling)
        if texts:
            sampling = Sampling(max_new_tokens, temperature, seed=seed)
            result['prompts'] = measure_prompts(
                model, tokenizer, texts, sampling, machine, n_tokens
            )
        if questions:
            result['answers'] = measure_answers(model, tokenizer, questions, max_new_tokens)
        if speed:
            result['speed'] = measure_speed(model, tokenizer)
    except ValueError as e:
        raise UserError(f'{e}: the weights of {path} are broken') from None

# ---- all of them, for people and for programs
if not machine.main:
    machine.leave()
    raise SystemExit
for i, text in enumerate(texts):
    print(f'---------------\n{text if isinstance(text, str) else text[-1]["content"]}')
    for path, result in results.items():
        print(f'[{path}] {result["prompts"]["generations"][i]["text"]}')
print(table(results))
pictures = folder_of_pictures(next(iter(results)))
if measures_split:
    draw_loss_by_position(results, os.path.join(pictures, 'loss_by_position.png'))
if examples:
    draw_tasks(results, os.path.join(pictures, 'tasks.png'))
if json:
    if len(results) > 1:
        print(json_.dumps(dict(models=[dict(model=path) | r for path, r in results.items()])))
    else:
        print(json_.dumps(result))
machine.leave()
