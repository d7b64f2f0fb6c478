"""A checkpoint out to transformers, vLLM, GGUF (llama.cpp, Ollama), ONNX, peft, or in 8 bits.

python export.py --out_dir=out                                     a folder, out/hf
python export.py --out_dir=out --format=gguf --output=model.gguf --dtype=q8_0
python export.py --out_dir=out --format=onnx --kv_cache
python export.py --out_dir=out --quantize=int8                     out/int8.pt, for sample.py
python export.py --out_dir=out-lora --format=peft                  a folder, out-lora/peft

Adapters (LoRA) are merged into their weights, but for --format=peft, which writes them alone. Its
adapter_config.json names the base: the Hugging Face folder or name that training began from or,
where that was a checkpoint, the folder hf beside it, which `python export.py --init_from=FILE`
writes and which has to be there.

What was written is read again before it gets its name, and compared with what was meant to be
written: what differs too much is an error, and is not left behind.
"""

import copy
import json as json_
import os
import shlex
import shutil
import sys
from contextlib import suppress

import torch

from fledge import UserError, adapters, checkpoint, lock_folder, read_meta, release_folder
from fledge import quantize as quantization
from fledge.configurator import configure, given, one_of
from fledge.formats import families, gguf, huggingface, onnx, peft
from fledge.tokenizer import IM_END, find_tokenizer

# -----------------------------------------------------------------------------
init_from = 'resume'  # resume (out_dir's ckpt.pt), a checkpoint file, a Hugging Face folder or name
out_dir = 'out'  # a run's folder
format = 'auto'  # hf, gguf, onnx, ckpt (weights alone), peft; auto: ckpt with --quantize, else hf
output = ''  # the folder (hf, peft) or file to write; '': hf, model.gguf, ... beside the checkpoint
overwrite = False  # replace what is there already
dtype = 'auto'  # float32, float16, bfloat16, q8_0 (gguf); auto: float16 for gguf, else float32
quantize = 'none'  # int8: a checkpoint with 8-bit weights
kv_cache = False  # onnx: the KV cache as inputs and outputs
name = ''  # what the model is called in its card and in GGUF; '': the dataset and the size
start = ''  # the prompt that logits are compared on; '': a few lines of words, numbers and code
json = False  # the last line of output is one JSON object
configure(globals())
# -----------------------------------------------------------------------------
OUTPUTS = dict(hf='hf', gguf='model.gguf', onnx='model.onnx', ckpt='model.pt', peft='peft')
FOLDERS = dict(hf='config.json', peft=peft.CONFIG)  # of formats that are folders, a file in each
HOLD_TOKENIZER = ('hf', 'gguf')  # and the model's name; others get a tokenizer.json beside them
DTYPES = dict(hf=('float32', 'float16', 'bfloat16'), gguf=tuple(gguf.TYPES))  # else float32 alone
# How far logits may be off, as a share of the largest: after writing and reading back, and because
# the weights are rounded to a type.
READ_BACK = 1e-5
ROUNDED = dict(float32=1e-3, float16=2e-2, bfloat16=0.1, q8_0=0.2, int8=0.2)
PROMPT = """The café opened at 7:45, before the rain; by noon, 1,200 people had walked past it.\r

\tdef main():
\t    return 'nai\u0308ve'  # 東京 so far
"""
OLLAMA_CHAT = """{{ range .Messages }}<|im_start|>{{ .Role }}
{{ .Content }}<|im_end|>
{{ end }}<|im_start|>assistant
"""
one_of(globals(), quantize=('none', 'int8'), format=('auto', *OUTPUTS))
if quantize == 'int8':
    OUTPUTS['ckpt'] = 'int8.pt'
if format == 'auto':
    format = 'ckpt' if quantize == 'int8' else 'hf'
if quantize == 'int8' and format != 'ckpt':
    raise UserError(
        f'--quantize=int8 makes a checkpoint: leave out --format={format}'
        + ('; 8 bits in GGUF are --dtype=q8_0' if format == 'gguf' else '')
    )
if dtype == 'auto':
    dtype = 'float16' if format == 'gguf' else 'float32'
dtype = dict(f32='float32', f16='float16', bf16='bfloat16').get(dtype, dtype)  # GGUF's own names
known = DTYPES.get(format, ('float32',))
if dtype not in known:
    raise UserError(f'dtype={dtype!r} is none of {", ".join(known)}, which --format={format} has')
if kv_cache and format != 'onnx':
    raise UserError('--kv_cache is of --format=onnx')
idle = set()
if format not in HOLD_TOKENIZER:
    idle |= given & {'name'}
if quantize == 'int8':
    idle |= given & {'dtype'}
if idle:
    print(f'without effect with --format={format}: {", ".join(sorted(idle))}', file=sys.stderr)

# ---- the model and its tokenizer
state, path, tokenizer = huggingface.load_with_tokenizer(init_from, out_dir)
model = checkpoint.load_model(state, path).eval().requires_grad_(False)
config, run = model.config, state['config']
source = state.get('folder', '')  # of a Hugging Face model
if quantization.is_quantized(model):
    raise UserError(f'{path} has 8-bit weights: export what it was made of')
if config.n_encoder_layer and format != 'ckpt':
    raise UserError(
        f'{path} is an encoder-decoder, for which --format={format} has no place: its checkpoint '
        'is what there is, and --quantize=int8 makes one of 8 bits'
    )
if format in ('hf', 'gguf', 'peft'):  # which know a model by its family's name
    edited = families.edited(families.config_of(config)['model_type'], config.activation)
    if edited:
        raise UserError(
            f'{edited}: others would load another model than this one; '
            '--format=onnx holds it as it is'
        )
_, own = adapters.split(state.pop('model'))
if format == 'peft':
    if 'base' not in state:
        raise UserError(f'{path} is no checkpoint of adapters, which --format=peft is of')
    base = state['base']['source']
    if base.endswith('.pt'):
        trained_on, base = base, os.path.join(os.path.dirname(base), OUTPUTS['hf'])
        if not os.path.isdir(base):
            raise UserError(
                f'peft loads no base like {trained_on}: '
                f'python export.py --init_from={shlex.quote(trained_on)} writes {base} first'
            )
added = tokenizer.spec.get('added_tokens') or []
beyond = [t['content'] for t in added if t.get('special') and t['id'] >= config.vocab_size]
if beyond and max(tokenizer.begin, default=0) < config.vocab_size:  # such as a <pad>
    added = [t for t in added if t['content'] not in beyond]
    tokenizer = tokenizer.changed(added_tokens=added)
if tokenizer.vocab_size > config.vocab_size:
    raise UserError(
        f'the tokenizer has {tokenizer.vocab_size} tokens, and the model of {path} '
        f'{config.vocab_size}: it was trained with another tokenizer'
    )
if beyond:
    print(f'the embedding has no {", ".join(beyond)}: left out of the tokenizer')
try:
    (start + name).encode()
except UnicodeEncodeError:
    raise UserError('--start or --name is no valid UTF-8') from None
if not start and tokenizer.chars:
    start = ''.join(c for c in PROMPT if c in tokenizer.chars) or ''.join(tokenizer.chars)
start = start or PROMPT
ids = torch.tensor([tokenizer.encode(start)[: config.block_size]])
source_ids = dict(source=ids) if config.n_encoder_layer else {}
meta = read_meta(os.path.join('data', run['dataset'])) if run.get('dataset') else {}
n_params = model.get_num_params(non_embedding=False)
size = f'{n_params / 1e6:.1f}M' if n_params < 1e9 else f'{n_params / 1e9:.1f}B'
origin = os.path.basename(os.path.abspath(path if source else os.path.dirname(path)))
name = name or f'{run.get("dataset") or origin}-{size}'

# ---- where it goes; what is there stays, but for --overwrite
if not output:
    output = os.path.join(os.path.dirname(path) if os.path.isfile(path) else '', OUTPUTS[format])
output = output.rstrip('/') or '/'
if os.path.islink(output) or os.path.basename(output) in ('', '.', '..'):
    output = os.path.realpath(output)
folder, file = os.path.split(output)
folder = folder or '.'
ending = os.path.splitext(OUTPUTS[format])[1]  # '' of a folder
if os.path.isdir(output) and format not in FOLDERS:
    raise UserError(
        f'{output} is a folder; --format={format} writes a file: '
        f'--output={shlex.quote(os.path.join(output, OUTPUTS[format]))}'
    )
if os.path.isfile(output) and format in FOLDERS:
    raise UserError(f'{output} is a file; --format={format} writes a folder')
if not file.endswith(ending):
    raise UserError(f'--output={output}: what --format={format} writes is called *{ending}')
exported = os.path.join(os.path.realpath(source or path), '')
if exported.startswith(os.path.join(os.path.realpath(output), '')):
    raise UserError(f'{output} holds the very model that is exported: name another --output')
if os.path.isdir(output) and os.listdir(output) and FOLDERS[format] not in os.listdir(output):
    raise UserError(f'{output} is a folder of something else: name another --output')
for taken in (output, f'{output}.data') if format == 'onnx' else (output,):
    if os.path.exists(taken) and not overwrite:
        raise UserError(f'{taken} is there: --overwrite replaces it')
beside = None if format in (*HOLD_TOKENIZER, *FOLDERS) else find_tokenizer(folder)
if beside and beside.spec != tokenizer.spec:
    raise UserError(
        f"{folder} has another tokenizer, which would be taken for this model's: "
        'name another folder with --output'
    )

# ---- the model as it is meant to be written, in the types of the format
written = 'int8' if quantize == 'int8' else dtype
meant = model if written == 'float32' and format != 'gguf' else copy.deepcopy(model)
if format == 'gguf':
    gguf.round_weights(meant, dtype)
elif quantize == 'int8':  # the linear layers in 8 bits, embeddings in 16
    quantization.apply(meant)
    for embedding in [m for m in meant.modules() if isinstance(m, torch.nn.Embedding)]:
        weight = embedding.weight.bfloat16().float()
        embedding.weight = torch.nn.Parameter(weight, requires_grad=False)
elif meant is not model:
    for p in meant.parameters():
        p.copy_(p.to(getattr(torch, dtype)))
for n, p in meant.named_parameters():
    if not p.isfinite().all():
        is_finite = model.get_parameter(n).isfinite().all()
        advice = '; take a larger type' if is_finite else ''
        raise UserError(f'{n} of {path} has weights that are not finite in {written}{advice}')
expected = model(ids, ids, **source_ids)[0]  # logits, (1, T, vocab_size)
rounded = expected if meant is model else meant(ids, ids, **source_ids)[0]
largest = max(expected.abs().max().item(), 1e-3)
rounding = (rounded - expected).abs().max().item()
if not rounding <= ROUNDED[written] * largest:
    raise UserError(
        f'{written} would move the logits by {rounding:.3g}, of {largest:.3g}: take a larger type'
    )


def write_modelfile(path):
    """Ollama's: the file beside it, and how to prompt it.

    A model of plain text continues; where that is unknown, Ollama goes by the template in the file.
    """
    stops = huggingface.ends(tokenizer)
    lines = [f'FROM ./{file}', f'PARAMETER num_ctx {min(config.block_size, 8192)}']
    lines += ['PARAMETER temperature 0.8', 'PARAMETER top_k 200']
    lines += [f'PARAMETER stop "{token}"' for token, i in tokenizer.special.items() if i in stops]
    if 'masked' in meta and not (meta['masked'] and tokenizer.template):
        chat = meta['masked'] and IM_END in tokenizer.special
        lines.append(f'TEMPLATE """{OLLAMA_CHAT if chat else "{{ .Prompt }}"}"""')
    with open(path, 'w', encoding='utf-8') as f:
        f.write('\n'.join(lines) + '\n')


@torch.no_grad()  # a graph would hold the files that were read: Windows renames no open one
def write(target):
    """Write target, a folder or a file, and read it back: how far off it is, and what read it.

    What is off are the logits of ids or, of GGUF, the weights.
    """
    if format == 'gguf':
        gguf.write(target, model, tokenizer, dtype, name)
        return gguf.largest_error(target, model, dtype), 'the file alone'
    if format == 'hf':
        began = init_from if source else run.get('init_from', 'scratch')
        card = huggingface.card(name, model, state, meta, began)
        huggingface.write(target, model, tokenizer, getattr(torch, dtype), card, source)
        found, by = huggingface.read(target, ids, start, tokenizer)
    elif format == 'peft':
        peft.write(target, own, config, run, base)
        again = checkpoint.load_model(huggingface.load(target), target).eval()
        found, by = again(ids, ids)[0], f'it on {base}'
    elif format == 'onnx':
        onnx.write(target, model, kv_cache)
        found, by = onnx.run(target, ids, kv_cache), 'onnxruntime'
    else:  # ckpt
        checkpoint.save(target, weights_alone())
        again = checkpoint.load_model(checkpoint.load(target), target).eval()
        found, by = again(ids, ids, **source_ids)[0], 'the checkpoint loaded again'
    return (found - rounded).abs().max().item(), by


def weights_alone():
    """The checkpoint of --format=ckpt: no optimizer, nothing of a run but its settings."""
    tensors = meant.state_dict()
    if quantize == 'int8':
        for n in tensors:
            if n.startswith(('transformer.wte', 'transformer.wpe')):
                tensors[n] = tensors[n].bfloat16()
    return dict(
        model=tensors,
        model_args=checkpoint.model_args(config),
        config={k: v for k, v in run.items() if k != 'lora_alpha'},  # adapters are merged
        begin=tokenizer.begin,
        separator=tokenizer.separator,
        tokenizer=tokenizer.digest(),
    )


# ---- write into a folder of this process alone, read it back, compare, and only then rename
parent = folder
while not os.path.exists(parent):
    parent = os.path.dirname(parent) or '.'
place = os.path.relpath(output, parent).replace(os.sep, '-')  # of no other output in parent
workplace = f'{parent}/.export-{place}'
new, replaced = f'{workplace}/new', f'{workplace}/replaced'


def put_back():
    """The old folder gets its name back where the export ended between the two renames."""
    if os.path.exists(replaced) and not os.path.exists(output):
        os.rename(replaced, output)
    shutil.rmtree(replaced, ignore_errors=True)


try:
    os.makedirs(workplace, exist_ok=True)
    lock = lock_folder(workplace, wait=False)
    put_back()  # what a process was killed over
    shutil.rmtree(new, ignore_errors=True)
    os.mkdir(new)
except OSError as e:
    raise UserError(f'cannot write {output}: {e.strerror}') from None
try:
    difference, by = write(new if format in FOLDERS else f'{new}/{file}')
    what, tolerance = 'logits', max(READ_BACK * largest, 1e-5)
    if format == 'gguf':
        what, tolerance = 'weights', 0.0
    if not difference <= tolerance:
        raise UserError(
            f'the {what} read back from {by} are off by {difference:.3g}, more than '
            f'{tolerance:.3g}: nothing is left of the export'
        )
    if format not in HOLD_TOKENIZER:
        tokenizer.save(f'{new}/tokenizer.json')
    if format == 'gguf' and os.path.exists(f'{folder}/Modelfile') and not overwrite:
        print(f'{folder}/Modelfile stays as it is: --overwrite replaces it')
    elif format == 'gguf':
        write_modelfile(f'{new}/Modelfile')
    names = sorted(os.listdir(new))
    n_bytes = sum(os.path.getsize(f'{new}/{n}') for n in names)
    for n in names:
        with open(f'{new}/{n}', 'rb+') as f:
            os.fsync(f.fileno())
    os.makedirs(folder, exist_ok=True)
    if format in FOLDERS:
        if os.path.exists(output):
            os.rename(output, replaced)
        os.rename(new, output)
    else:
        for n in sorted(names, key=lambda n: n == file):  # the model itself is last
            os.replace(f'{new}/{n}', f'{folder}/{n}')
        if format == 'onnx' and f'{file}.data' not in names:
            with suppress(FileNotFoundError):
                os.remove(f'{output}.data')  # of an earlier, larger model
except OSError as e:
    raise UserError(f'cannot write {output}: {e.strerror or e}') from None
finally:
    put_back()
    shutil.rmtree(new, ignore_errors=True)
    release_folder(lock)
    with suppress(OSError):  # another export has begun in it
        os.rmdir(workplace)
if format == 'peft':
    size = f'{sum(tensor.numel() for tensor in own.values()) / 1e6:.2f}M'
print(f'{output}: {size} parameters in {written}, {n_bytes / 1e6:.1f} MB ({", ".join(names)})')
print(f'the {what} read back from {by} are off by {difference:.2g}, at most {tolerance:.2g}')
moved = f'; {written} itself moved them by {rounding:.2g}' if rounding else ''
print(f'a prompt of {ids.shape[1]} tokens has logits up to {largest:.3g}{moved}')
if json:
    result = dict(output=output, format=format, dtype=written, bytes=n_bytes, files=names)
    result |= dict(difference=difference, tolerance=tolerance, rounding=rounding, read_by=by)
    print(json_.dumps(result))
