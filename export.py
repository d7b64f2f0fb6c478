"""A checkpoint out to Hugging Face (transformers, vLLM, lm-evaluation-harness), GGUF (llama.cpp, Ollama), ONNX, or to 8 bits.

python export.py --out_dir=out                                                    a folder, out/hf
python export.py --out_dir=out --format=gguf --output=model.gguf --dtype=q8_0
python export.py --out_dir=out --format=onnx --kv_cache
python export.py --out_dir=out --quantize=int8                                    out/int8.pt, for sample.py

The last step loads what was written and compares its logits on a prompt: what differs too much is an error, and is not left behind.
"""
import importlib.util
import json as json_
import os
import re
import shutil

import torch

from fledge import UserError, checkpoint, gguf_file, int8, onnx_file, pretrained
from fledge.configurator import configure
from fledge.tokenizer import CHAT_TEMPLATE, IM_END, IM_START, load_tokenizer
from fledge.tokens import read_meta

# -----------------------------------------------------------------------------
init_from = 'resume'    # resume (out_dir's ckpt.pt), a checkpoint file, or a Hugging Face model: its folder or name
out_dir = 'out'         # a run's folder
format = 'auto'         # hf, gguf, onnx, or ckpt (a checkpoint of weights alone, adapters merged); auto: ckpt with --quantize, else hf
output = ''             # the folder (hf) or file to write; '': hf, model.gguf, model.onnx, model.pt or int8.pt beside the checkpoint, or here
dtype = 'auto'          # float32, float16, bfloat16, for gguf also q8_0; auto: float16 for gguf, else float32
quantize = 'none'       # int8: a checkpoint with 8-bit weights
kv_cache = False        # onnx: the KV cache as inputs and outputs
name = ''               # what the model is called in its card and in GGUF; '': the dataset and the size
start = ''              # the prompt that logits are compared on; '': a few lines of words, numbers and code
json = False            # the last line of output is one JSON object
configure(globals())
# -----------------------------------------------------------------------------
FILES = {'hf': 'hf', 'gguf': 'model.gguf', 'onnx': 'model.onnx', 'ckpt': 'int8.pt' if quantize == 'int8' else 'model.pt'}
DTYPES = {'hf': ('float32', 'float16', 'bfloat16'), 'gguf': tuple(gguf_file.TYPES), 'onnx': ('float32',), 'ckpt': ('float32',)}
NEEDS = {'hf': ('safetensors',), 'gguf': ('gguf',), 'onnx': ('onnx', 'onnxscript', 'onnxruntime'), 'ckpt': ()}
# how far the logits may be off, as a share of the largest; float32 differs by the order of sums alone
TOLERANCE = {'float32': 1e-5, 'float16': 1e-2, 'bfloat16': 3e-2, 'q8_0': 0.1, 'int8': 0.1}
PROMPT = "The café opened at 7:45, before the rain; by noon, 1,200 people had walked past it.\n\ndef main():\n    return 'naïve'  # so far\n"
MADE_HERE = '# made by export.py'
OLLAMA_CHAT = '{{ range .Messages }}<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n{{ end }}<|im_start|>assistant\n'
dtype = {'f32': 'float32', 'f16': 'float16', 'bf16': 'bfloat16'}.get(dtype, dtype)  # GGUF's own names
if quantize not in ('none', 'int8'):
    raise UserError(f'quantize={quantize!r} is none of none, int8')
if format == 'auto':
    format = 'ckpt' if quantize == 'int8' else 'hf'
if format not in FILES:
    raise UserError(f'format={format!r} is none of {", ".join(FILES)}')
if quantize == 'int8' and format != 'ckpt':
    raise UserError(f'--quantize=int8 makes a checkpoint: leave out --format={format}' + ('; 8 bits in GGUF are --dtype=q8_0' if format == 'gguf' else ''))
if dtype == 'auto':
    dtype = 'float16' if format == 'gguf' else 'float32'
if dtype not in DTYPES[format]:
    raise UserError(f'dtype={dtype!r} is none of {", ".join(DTYPES[format])}, which --format={format} has')
if kv_cache and format != 'onnx':
    raise UserError('--kv_cache is of --format=onnx')
for package in NEEDS[format]:
    if not importlib.util.find_spec(package):
        raise UserError(f'--format={format} needs the package {package}: pip install -r requirements.txt')

# ---- the model, its tokenizer, and what it says of a prompt
state, path, tokenizer = pretrained.load_with_tokenizer(init_from, out_dir)
model = checkpoint.load_model(state, path).eval()
config, run = model.config, state.get('config', {})
if int8.is_quantized(model):
    raise UserError(f'{path} has 8-bit weights: export what it was made of')
if tokenizer.vocab_size > config.vocab_size:
    raise UserError(f'the tokenizer has {tokenizer.vocab_size} tokens, and the model of {path} {config.vocab_size}: it was trained with another tokenizer')
start = start or (PROMPT if not tokenizer.chars else ''.join(c for c in PROMPT if c in tokenizer.chars) or ''.join(tokenizer.chars))
ids = torch.tensor([tokenizer.encode(start)[:config.block_size]])


def logits_of(model):
    """(1, T, vocab_size) float32, of the prompt."""
    with torch.no_grad():
        return model(ids, ids)[0].float()


meta = read_meta(os.path.join('data', run['dataset'])) if run.get('dataset') else {}
size = model.get_num_params(non_embedding=False)
size_label = f'{size / 1e6:.1f}M' if size < 1e9 else f'{size / 1e9:.1f}B'
name = name or (f'{run["dataset"]}-{size_label}' if run.get('dataset') else os.path.basename(os.path.abspath(init_from)))
chats = {IM_START, IM_END} <= tokenizer.special.keys()
ends = [i for i in (tokenizer.end_of_text, tokenizer.special.get(IM_END), tokenizer.special.get('<|eot_id|>')) if i is not None]  # where generation stops; Llama 3's
text_of = {i: token for token, i in tokenizer.special.items()}


# ---- the formats: each writes into a folder, reads it back, and returns the logits it then has, and who computed them
def write_json(path, content):
    with open(path, 'w', encoding='utf-8') as f:
        json_.dump(content, f, indent=2, ensure_ascii=False)
        f.write('\n')


def hf(folder):
    """What transformers and all that build on it load: no code of ours is needed there."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file
    content = pretrained.write_config(config)
    special = dict(bos_token_id=tokenizer.begin[0]) if tokenizer.begin else {}
    special |= dict(eos_token_id=ends[-1] if len(ends) < 2 else ends, pad_token_id=ends[0]) if ends else {}
    write_json(f'{folder}/config.json', content | special | dict(torch_dtype=dtype))
    write_json(f'{folder}/generation_config.json', special | dict(do_sample=True, temperature=0.8, top_k=200))
    tensors = {n: t.to(getattr(torch, dtype)).contiguous() for n, t in pretrained.their_tensors(model, content['model_type'])}
    try:
        save_file(tensors, f'{folder}/model.safetensors', {'format': 'pt'})
    except SafetensorError as e:  # a full disk
        raise UserError(f'cannot write {output}: {e}') from None
    shutil.copymode(f'{folder}/config.json', f'{folder}/model.safetensors')  # which safetensors keeps from all others
    tokenizer.save(f'{folder}/tokenizer.json')
    settings = dict(tokenizer_class='PreTrainedTokenizerFast', model_max_length=config.block_size, clean_up_tokenization_spaces=False)
    settings |= dict(bos_token=text_of[tokenizer.begin[0]]) if tokenizer.begin else {}
    settings |= dict(eos_token=text_of[ends[0]], pad_token=text_of[ends[0]]) if ends else {}
    write_json(f'{folder}/tokenizer_config.json', settings | (dict(chat_template=CHAT_TEMPLATE) if chats else {}))
    with open(f'{folder}/README.md', 'w', encoding='utf-8') as f:
        f.write(card(content))
    if not importlib.util.find_spec('transformers'):
        again = checkpoint.load_model(pretrained.load(folder), folder).eval()
        return logits_of(again) if load_tokenizer(folder).encode(start) == tokenizer.encode(start) else None, 'fledge (transformers is not installed)'
    import transformers
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    same = their_tokenizer(start, add_special_tokens=False)['input_ids'] == tokenizer.encode(start)
    return (theirs(ids).logits.detach() if same else None), f'transformers {transformers.__version__}'


def card(content):
    """The model card: what a reader of the folder wants to know, and no more than is known."""
    lines = ['---', 'library_name: transformers', 'pipeline_tag: text-generation', 'tags:', '- fledge']
    began = run.get('init_from', 'scratch') if init_from == 'resume' or init_from.endswith('.pt') else init_from
    if re.fullmatch(r'[\w.-]+/[\w.-]+', began) and not os.path.exists(began) and not began.endswith('.pt'):
        lines += [f'base_model: {began}']
    lines += ['---', '', f'# {name}', '', f'{size:,} parameters, {content["architectures"][0]}: {config.n_layer} layers of {config.n_embd}, context {config.block_size:,}, '
              f'vocabulary {config.vocab_size:,}. Made with fledge; loads without remote code.', '']
    if state.get('iter_num') is not None:
        tokens = state['iter_num'] * run.get('gradient_accumulation_steps', 1) * run.get('batch_size', 1) * config.block_size
        facts = [('data', f'{run.get("dataset", "?")}' + (f' ({meta["source"]})' if meta.get('source') else '')), ('began from', began),
                 ('steps', f'{state["iter_num"]:,}'), ('tokens seen', f'{tokens:,}')]
        if state.get('evaluation'):
            step, loss, bpb = state['evaluation']
            facts += [('validation loss', f'{loss:.4f} nats a token' + (f', {bpb:.4f} bits a byte' if bpb else '') + f', at step {step:,}')]
        facts += [(key.replace('_', ' '), run[key]) for key in ('optimizer', 'learning_rate', 'batch_size', 'gradient_accumulation_steps', 'weight_decay', 'dropout', 'seed') if key in run]
        lines += ['| training | |', '|---|---|', *(f'| {key} | {value} |' for key, value in facts), '']
    lines += ['```python', 'from transformers import AutoModelForCausalLM, AutoTokenizer', '', "folder = '.'  # this one", 'tokenizer = AutoTokenizer.from_pretrained(folder)',
              'model = AutoModelForCausalLM.from_pretrained(folder)', "inputs = tokenizer('Once upon a time', return_tensors='pt')",
              'print(tokenizer.decode(model.generate(**inputs, max_new_tokens=100)[0]))', '```', '']
    return '\n'.join(lines)


def gguf(folder):
    file = f'{folder}/{os.path.basename(output)}'
    gguf_file.write(file, model, tokenizer, dtype, name)
    talks = chats and meta.get('masked', False)  # a model of plain text continues its prompt
    lines = [MADE_HERE, f'FROM ./{os.path.basename(output)}', f'PARAMETER num_ctx {config.block_size}', 'PARAMETER temperature 0.8', 'PARAMETER top_k 200',
             *(f'PARAMETER stop "{text_of[i]}"' for i in ends),
             f'TEMPLATE """{OLLAMA_CHAT if talks else "{{ .Prompt }}"}"""']
    with open(f'{folder}/Modelfile', 'w', encoding='utf-8') as f:
        f.write('\n'.join(lines) + '\n')
    return logits_of(gguf_file.read(file).eval()), 'the file read back, as llama.cpp computes it'


def onnx(folder):
    import onnxruntime
    file = f'{folder}/{os.path.basename(output)}'
    onnx_file.write(file, model, kv_cache)
    tokenizer.save(f'{folder}/tokenizer.json')
    return onnx_file.run(file, ids, kv_cache), f'onnxruntime {onnxruntime.__version__}'


def ckpt(folder):
    """Weights alone, without an optimizer's state: adapters merged, and with --quantize the linear layers in 8 bits, embeddings in 16."""
    if quantize == 'int8':
        int8.quantize(model)
    tensors = {n: t.bfloat16() if quantize == 'int8' and n.startswith(('transformer.wte', 'transformer.wpe')) else t for n, t in model.state_dict().items()}
    file = f'{folder}/{os.path.basename(output)}'
    checkpoint.save(file, dict(model=tensors, model_args=config.model_args(), config={k: v for k, v in run.items() if k != 'lora_alpha'}))
    tokenizer.save(f'{folder}/tokenizer.json')
    return logits_of(checkpoint.load_model(checkpoint.load(file), file).eval()), 'the checkpoint loaded again'


# ---- where it goes; what is there and is not this script's stays
beside = os.path.dirname(path) if os.path.isfile(path) else ''
output = output.rstrip('/') or os.path.join(beside, FILES[format])
folder, temporary, old = os.path.dirname(output) or '.', f'{output}.tmp', f'{output}.old'
if format == 'hf':
    source = state.get('folder') or (init_from if os.path.isdir(init_from) else '')
    known = {'config.json', 'generation_config.json', 'model.safetensors', 'tokenizer.json', 'tokenizer_config.json', 'README.md'}
    if os.path.exists(output) and not os.path.isdir(output):
        raise UserError(f'{output} is a file; --format=hf writes a folder')
    if os.path.isdir(output) and (set(os.listdir(output)) - known or source and os.path.samefile(source, output)):
        raise UserError(f'{output} holds other files, or the very model that is exported: name another folder with --output')
elif os.path.isdir(output):
    raise UserError(f'{output} is a folder; --format={format} writes a file: --output={output}/{FILES[format]}')
elif format in ('onnx', 'ckpt') and os.path.exists(f'{folder}/tokenizer.json') and load_tokenizer(folder).spec != tokenizer.spec:
    raise UserError(f'{folder}/tokenizer.json is another tokenizer, and would be taken for this model\'s: name another folder with --output')
elif os.path.exists(output) and (os.path.samefile(output, path) if os.path.exists(path) else False):
    raise UserError(f'{output} is the checkpoint itself: name another --output')


def made_here(path):
    """Whether the Modelfile at path is this script's, or not there yet."""
    if not os.path.exists(path):
        return True
    with open(path, encoding='utf-8', errors='replace') as f:
        return f.readline().strip() == MADE_HERE


# ---- write, read back, compare, and only then give it its name
expected = logits_of(model)
os.makedirs(folder, exist_ok=True)
if os.path.exists(old) and not os.path.exists(output):  # of a process that was killed, as is the next
    os.rename(old, output)
shutil.rmtree(old, ignore_errors=True)
shutil.rmtree(temporary, ignore_errors=True)
os.mkdir(temporary)
try:
    logits, checked_with = {'hf': hf, 'gguf': gguf, 'onnx': onnx, 'ckpt': ckpt}[format](temporary)
    if logits is None:
        raise UserError(f'{checked_with} reads another tokenizer than the one written: nothing is left of the export' +
                        ('; it takes the tokenizer of every model with qkv_bias for Qwen2\'s own' if config.qkv_bias and config.position == 'rope' else ''))
    difference, largest = (logits - expected).abs().max().item(), expected.abs().max().item()
    tolerance = TOLERANCE['int8' if quantize == 'int8' else dtype] * max(largest, 10.0)
    if not difference <= tolerance:
        raise UserError(f'the logits of what was written differ by {difference:.3g} ({checked_with}), more than {tolerance:.3g}: nothing is left of the export')
    written = sorted(os.listdir(temporary))
    n_bytes = sum(os.path.getsize(f'{temporary}/{file}') for file in written)
    for file in written:
        with open(f'{temporary}/{file}', 'rb') as f:
            os.fsync(f.fileno())
    if format == 'hf':
        if os.path.exists(output):
            os.rename(output, old)
        os.rename(temporary, output)
        shutil.rmtree(old, ignore_errors=True)
    else:
        for file in written:
            if file == 'Modelfile' and not made_here(f'{folder}/Modelfile'):
                print(f'{folder}/Modelfile is somebody\'s own, and stays as it is')
            else:
                os.replace(f'{temporary}/{file}', f'{folder}/{file}')
finally:
    shutil.rmtree(temporary, ignore_errors=True)
print(f'{output}: {size_label} parameters in {"int8" if quantize == "int8" else dtype}, {n_bytes / 1e6:.1f} MB ({", ".join(written)})\n'
      f'logits of a prompt of {ids.shape[1]} tokens differ by at most {difference:.3g}, of {largest:.3g} ({checked_with}; {tolerance:.3g} would be too much)')
if json:
    print(json_.dumps(dict(output=output, format=format, dtype='int8' if quantize == 'int8' else dtype, bytes=n_bytes, files=written,
                           difference=difference, tolerance=tolerance, checked_with=checked_with)))
