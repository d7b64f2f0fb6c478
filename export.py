"""A checkpoint out to Hugging Face (transformers, vLLM, lm-evaluation-harness), GGUF (llama.cpp, Ollama), ONNX, or to 8 bits.

python export.py --out_dir=out                                                    a folder, out/hf
python export.py --out_dir=out --format=gguf --output=model.gguf --dtype=q8_0
python export.py --out_dir=out --format=onnx --kv_cache
python export.py --out_dir=out --quantize=int8                                    out/int8.pt, for sample.py and evaluate.py

What was written is loaded again before it gets its name, and its logits on a prompt compared: what differs too much is an error, and is not left behind.
"""

import copy
import importlib.metadata
import importlib.util
import json as json_
import os
import shutil
from contextlib import suppress

import torch

from fledge import (
    UserError,
    checkpoint,
    gguf_file,
    hf_folder,
    int8,
    lock_folder,
    onnx_file,
    pretrained,
)
from fledge.configurator import configure, one_of
from fledge.tokenizer import IM_END, load_tokenizer
from fledge.tokens import read_meta

# -----------------------------------------------------------------------------
init_from = 'resume'  # resume (out_dir's ckpt.pt), a checkpoint file, or a Hugging Face model: its folder or name
out_dir = 'out'  # a run's folder
format = 'auto'  # hf, gguf, onnx, or ckpt (a checkpoint of weights alone, adapters merged); auto: ckpt with --quantize, else hf
output = ''  # the folder (hf) or file to write; '': hf, model.gguf, model.onnx, model.pt or int8.pt beside the checkpoint, or here
dtype = (
    'auto'  # float32, float16, bfloat16, for gguf also q8_0; auto: float16 for gguf, else float32
)
quantize = 'none'  # int8: a checkpoint with 8-bit weights
kv_cache = False  # onnx: the KV cache as inputs and outputs
name = ''  # what the model is called in its card and in GGUF; '': the dataset and the size
start = ''  # the prompt that logits are compared on; '': a few lines of words, numbers and code
json = False  # the last line of output is one JSON object
configure(globals())
# -----------------------------------------------------------------------------
FILES = {
    'hf': 'hf',
    'gguf': 'model.gguf',
    'onnx': 'model.onnx',
    'ckpt': 'int8.pt' if quantize == 'int8' else 'model.pt',
}
DTYPES = {
    'hf': ('float32', 'float16', 'bfloat16'),
    'gguf': tuple(gguf_file.TYPES),
    'onnx': ('float32',),
    'ckpt': ('float32',),
}
NEEDS = {
    'hf': ('safetensors',),
    'gguf': ('gguf',),
    'onnx': ('onnx', 'onnxscript', 'onnxruntime'),
    'ckpt': (),
}
READ_BACK = (
    1e-5  # how far logits may be off, as a share of the largest, after writing and reading back
)
ROUNDED = {
    'float32': 1e-3,
    'float16': 2e-2,
    'bfloat16': 0.1,
    'q8_0': 0.2,
    'int8': 0.2,
}  # and how far rounding the weights to a type may move them
PROMPT = "The café opened at 7:45, before the rain; by noon, 1,200 people had walked past it.\r\n\n\tdef main():\n\t    return 'nai\u0308ve'  # 東京 so far\n"
MADE_HERE = '# made by export.py'
OLLAMA_CHAT = '{{ range .Messages }}<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n{{ end }}<|im_start|>assistant\n'
dtype = {'f32': 'float32', 'f16': 'float16', 'bf16': 'bfloat16'}.get(
    dtype, dtype
)  # GGUF's own names
one_of(globals(), quantize=('none', 'int8'), format=('auto', *FILES))
if format == 'auto':
    format = 'ckpt' if quantize == 'int8' else 'hf'
if quantize == 'int8' and format != 'ckpt':
    raise UserError(
        f'--quantize=int8 makes a checkpoint: leave out --format={format}'
        + ('; 8 bits in GGUF are --dtype=q8_0' if format == 'gguf' else '')
    )
if dtype == 'auto':
    dtype = 'float16' if format == 'gguf' else 'float32'
if dtype not in DTYPES[format]:
    raise UserError(
        f'dtype={dtype!r} is none of {", ".join(DTYPES[format])}, which --format={format} has'
    )
if kv_cache and format != 'onnx':
    raise UserError('--kv_cache is of --format=onnx')
for package in NEEDS[format]:
    if not importlib.util.find_spec(package):
        raise UserError(
            f'--format={format} needs the package {package}: pip install -r requirements.txt'
        )

# ---- the model and its tokenizer
state, path, tokenizer = pretrained.load_with_tokenizer(init_from, out_dir)
model = checkpoint.load_model(state, path).eval().requires_grad_(False)
config, run, source = (
    model.config,
    state['config'],
    state.get('folder', ''),
)  # source: a Hugging Face model's folder
if int8.is_quantized(model):
    raise UserError(f'{path} has 8-bit weights: export what it was made of')
if tokenizer.vocab_size > config.vocab_size:
    raise UserError(
        f'the tokenizer has {tokenizer.vocab_size} tokens, and the model of {path} {config.vocab_size}: it was trained with another tokenizer'
    )
try:
    (start + name).encode()
except UnicodeEncodeError:
    raise UserError('--start or --name is no valid UTF-8') from None
start = start or (
    PROMPT
    if not tokenizer.chars
    else ''.join(c for c in PROMPT if c in tokenizer.chars) or ''.join(tokenizer.chars)
)
ids = torch.tensor([tokenizer.encode(start)[: config.block_size]])
meta = read_meta(os.path.join('data', run['dataset'])) if run.get('dataset') else {}
size = model.get_num_params(non_embedding=False)
size = f'{size / 1e6:.1f}M' if size < 1e9 else f'{size / 1e9:.1f}B'
origin = os.path.basename(os.path.abspath(path if source else os.path.dirname(path)))
name = name or f'{run.get("dataset") or origin}-{size}'
template = hf_folder.chat_template(tokenizer, source)


def earlier_export(path):
    """Whether path is one, and may be replaced: its file of weights says so at its head. A folder is one with nothing else in it, or an empty one."""
    if format == 'ckpt':
        return 'exported_by' in checkpoint.load(path)
    if format == 'hf':
        path, names = f'{path}/model.safetensors', set(os.listdir(path))
        if not names or names - hf_folder.FILES or not os.path.exists(path):
            return not names
    with open(path, 'rb') as f:
        return b'fledge' in f.read(4096)


def write_modelfile(path):
    """Ollama's: the file beside it, and how to prompt it. A model of plain text continues; where that is unknown, Ollama goes by the template in the file."""
    stops = hf_folder.ends(tokenizer)
    lines = [
        MADE_HERE,
        f'FROM ./{file}',
        f'PARAMETER num_ctx {min(config.block_size, 8192)}',
        'PARAMETER temperature 0.8',
        'PARAMETER top_k 200',
    ]
    lines += [f'PARAMETER stop "{token}"' for token, i in tokenizer.special.items() if i in stops]
    if 'masked' in meta:
        lines += [
            f'TEMPLATE """{OLLAMA_CHAT if meta["masked"] and IM_END in tokenizer.special else "{{ .Prompt }}"}"""'
        ]
    with open(path, 'w', encoding='utf-8') as f:
        f.write('\n'.join(lines) + '\n')


def somebodys_own(path):
    """Whether there is a Modelfile at path that was not made here."""
    if not os.path.exists(path):
        return False
    with open(path, encoding='utf-8', errors='replace') as f:
        return f.readline().strip() != MADE_HERE


# ---- where it goes; what is there and is no earlier export stays
ending = os.path.splitext(FILES[format])[1]
output = output or os.path.join(
    os.path.dirname(path) if os.path.isfile(path) else '', FILES[format]
)
output = output.rstrip('/') or '/'
if os.path.islink(output) or os.path.basename(output) in ('', '.', '..'):
    output = os.path.realpath(output)
folder, file = os.path.split(output)
folder = folder or '.'
if os.path.isdir(output) and format != 'hf':
    raise UserError(
        f'{output} is a folder; --format={format} writes a file: --output={os.path.join(output, FILES[format])}'
    )
if os.path.isfile(output) and format == 'hf':
    raise UserError(f'{output} is a file; --format=hf writes a folder')
if not file.endswith(ending):
    raise UserError(f'--output={output}: what --format={format} writes is called *{ending}')
if os.path.exists(output):
    if os.path.samefile(output, source or path):
        raise UserError(f'{output} is the very model that is exported: name another --output')
    if not earlier_export(output):
        raise UserError(f'{output} is there, and is no earlier export: name another --output')
elif (
    format == 'onnx'
    and os.path.exists(f'{output}.data')
    and not os.path.exists(f'{folder}/.export-{file}')
):  # one that was killed goes on
    raise UserError(
        f'{output}.data is there without its model, and would be replaced: name another --output'
    )
if (
    format in ('onnx', 'ckpt')
    and os.path.exists(f'{folder}/tokenizer.json')
    and load_tokenizer(folder).spec != tokenizer.spec
):
    raise UserError(
        f"{folder}/tokenizer.json is another tokenizer, and would be taken for this model's: name another folder with --output"
    )

# ---- the model as it is meant to be written, in the types of the format
written = 'int8' if quantize == 'int8' else dtype
meant = model if written == 'float32' and format != 'gguf' else copy.deepcopy(model)
if format == 'gguf':
    gguf_file.round_weights(meant, dtype)
elif quantize == 'int8':  # the linear layers in 8 bits, embeddings in 16
    int8.quantize(meant)
    for embedding in [m for m in meant.modules() if isinstance(m, torch.nn.Embedding)]:
        embedding.weight = torch.nn.Parameter(
            embedding.weight.bfloat16().float(), requires_grad=False
        )
elif meant is not model:
    for p in meant.parameters():
        p.copy_(p.to(getattr(torch, dtype)))


def settle():
    """The earlier export, set aside as `old`, gets its name back where a crash left nothing in its place; else it is deleted."""
    if os.path.exists(old) and not os.path.exists(output):
        os.rename(old, output)
    shutil.rmtree(old, ignore_errors=True)


# ---- write it into a folder that only this process has, read it back, compare, and then give it its name
temporary, old, made, parent = f'{folder}/.export-{file}', f'{folder}/.replaced-{file}', [], folder
while not os.path.isdir(parent):
    made, parent = [*made, parent], os.path.dirname(parent) or '.'
try:
    os.makedirs(temporary, exist_ok=True)
except OSError as e:
    raise UserError(f'cannot write {output}: {e.strerror}') from None
lock = lock_folder(temporary, wait=False)
for left in os.listdir(temporary):  # by a process that was killed
    os.remove(f'{temporary}/{left}')
settle()
try:
    if format == 'hf':
        began = init_from if source else run.get('init_from', 'scratch')
        hf_folder.write(
            temporary,
            model,
            tokenizer,
            getattr(torch, dtype),
            hf_folder.card(name, model, state, meta, began),
            source,
        )
        logits, by = hf_folder.read(temporary, ids, start, tokenizer)
    elif format == 'gguf':
        gguf_file.write(f'{temporary}/{file}', model, tokenizer, dtype, name, template)
        if somebodys_own(f'{folder}/Modelfile'):
            print(f"{folder}/Modelfile is somebody's own, and stays as it is")
        else:
            write_modelfile(f'{temporary}/Modelfile')
        logits, by = gguf_file.read(f'{temporary}/{file}').eval()(ids, ids)[0], 'the file alone'
    elif format == 'onnx':
        onnx_file.write(f'{temporary}/{file}', model, kv_cache)
        logits, by = (
            onnx_file.run(f'{temporary}/{file}', ids, kv_cache),
            f'onnxruntime {importlib.metadata.version("onnxruntime")}',
        )
    else:
        tensors = {
            n: t.bfloat16()
            if written == 'int8' and n.startswith(('transformer.wte', 'transformer.wpe'))
            else t
            for n, t in meant.state_dict().items()
        }
        checkpoint.save(
            f'{temporary}/{file}',
            dict(
                model=tensors,
                model_args=config.model_args(),
                config={k: v for k, v in run.items() if k != 'lora_alpha'},
                exported_by='fledge',
            ),
        )
        logits, by = (
            checkpoint.load_model(checkpoint.load(f'{temporary}/{file}'), file).eval()(ids, ids)[0],
            'the checkpoint loaded again',
        )
    if format in ('onnx', 'ckpt'):
        tokenizer.save(f'{temporary}/tokenizer.json')
    expected = model(ids, ids)[0]
    rounded = expected if meant is model else meant(ids, ids)[0]
    largest = max(expected.abs().max().item(), 1e-3)
    difference, rounding = (
        (logits - rounded).abs().max().item(),
        (rounded - expected).abs().max().item(),
    )
    tolerance = max(READ_BACK * largest, 1e-5)
    if not difference <= tolerance:
        raise UserError(
            f'the logits read back from {by} are off by {difference:.3g}, more than {tolerance:.3g}: nothing is left of the export'
        )
    if not rounding <= ROUNDED[written] * largest:
        raise UserError(
            f'{written} would move the logits by {rounding:.3g}, of {largest:.3g}: nothing is left of the export; take a larger type'
        )
    names = sorted(os.listdir(temporary))
    n_bytes = sum(os.path.getsize(f'{temporary}/{n}') for n in names)
    for n in names:
        with open(f'{temporary}/{n}', 'rb') as f:
            os.fsync(f.fileno())
    if format == 'hf':
        if os.path.exists(output):
            os.rename(output, old)
        os.rename(temporary, output)
    else:
        if format == 'onnx' and os.path.exists(f'{output}.data') and f'{file}.data' not in names:
            os.remove(f'{output}.data')  # of an earlier export, of a larger model
        for n in sorted(names, key=lambda n: n == file):  # the model itself is last
            os.replace(f'{temporary}/{n}', f'{folder}/{n}')
except OSError as e:
    raise UserError(f'cannot write {output}: {e.strerror or e}') from None
finally:
    shutil.rmtree(temporary, ignore_errors=True)
    settle()
    for parent in made:
        with suppress(OSError):  # nothing but an empty folder goes
            os.rmdir(parent)
print(
    f'{output}: {size} parameters in {written}, {n_bytes / 1e6:.1f} MB ({", ".join(names)})\n'
    f'logits of a prompt of {ids.shape[1]} tokens, up to {largest:.3g}: read back from {by} they are off by {difference:.2g} ({tolerance:.2g} would be too much)'
    + (f'; {written} itself moved them by {rounding:.2g}' if rounding else '')
)
if json:
    print(
        json_.dumps(
            dict(
                output=output,
                format=format,
                dtype=written,
                bytes=n_bytes,
                files=names,
                difference=difference,
                tolerance=tolerance,
                rounding=rounding,
                read_by=by,
            )
        )
    )
