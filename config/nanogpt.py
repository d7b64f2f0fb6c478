# nanoGPT's defaults and its architecture, GPT-2: put this in front of nanoGPT's config files.
# python train.py config/nanogpt.py their_config.py --batch_size=8
import torch

out_dir = 'out'
eval_interval = 2000
log_interval = 1
eval_iters = 200
eval_only = False
always_save_checkpoint = True
init_from = 'scratch'
wandb_log = False
wandb_project = 'owt'
wandb_run_name = 'gpt2'
dataset = 'openwebtext'
gradient_accumulation_steps = 5 * 8
batch_size = 12
block_size = 1024
n_layer = 12
n_head = 12
n_embd = 768
dropout = 0.0
bias = False
learning_rate = 6e-4
max_iters = 600000
weight_decay = 1e-1
beta1 = 0.9
beta2 = 0.95
grad_clip = 1.0
decay_lr = True
warmup_iters = 2000
lr_decay_iters = 600000
min_lr = 6e-5
backend = 'auto'  # nanoGPT's nccl, and gloo where there is no GPU
device = 'auto'  # nanoGPT's cuda, and the CPU where there is none
dtype = 'auto' if torch.cuda.is_available() else 'float32'
compile = True

# what nanoGPT has no setting for
n_kv_head = 0
head_dim = 0
n_inner = 0
qkv_bias = 'auto'
position = 'learned'
norm = 'layernorm'
norm_eps = 1e-5
activation = 'gelu'
qk_norm = False
tie_embeddings = True
optimizer = 'adamw'
lr_schedule = 'cosine'
max_minutes = 0.0
sample_interval = 0
