# GPT-2's largest size, 1.56B parameters, on 10 billion tokens in GPT-2's vocabulary: by the plan of
# --dry_run --world_size=8 three days of one H100, or about nine hours of eight.
out_dir = 'out-gpt2-xl'
dataset = 'fineweb_edu'
vocab_size = 50304
block_size = 1024
batch_size = 4
gradient_accumulation_steps = 128
max_iters = 19074  # of 524,288 tokens = 10 billion

n_layer = 48
n_head = 25
n_kv_head = 0
head_dim = 0
n_embd = 1600
bias = False
dropout = 0.0
n_inner = 0
position = 'learned'
norm = 'layernorm'
norm_eps = 1e-5
activation = 'gelu'
qk_norm = False
tie_embeddings = True

optimizer = 'adamw'
learning_rate = 2e-4  # larger models take smaller steps (Brown et al. 2020, table 2.1)
min_lr = 2e-5
lr_schedule = 'cosine'
weight_decay = 0.1
beta1 = 0.9
beta2 = 0.95
grad_clip = 1.0
lr_decay_iters = 0
warmup_iters = 700
max_minutes = 0.0
eval_interval = 500
eval_iters = 100
sample_interval = 1000
