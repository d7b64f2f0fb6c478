# GPT-2's smallest size, 124M parameters, on 10 billion tokens in GPT-2's vocabulary.
out_dir = 'out-gpt2-124m'
dataset = 'fineweb_edu'
vocab_size = 50304
block_size = 1024
batch_size = 16
gradient_accumulation_steps = 32
max_iters = 19074  # of 524,288 tokens = 10 billion

n_layer = 12
n_head = 12
n_kv_head = 0
head_dim = 0
n_embd = 768
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
learning_rate = 6e-4
min_lr = 6e-5
lr_schedule = 'cosine'
weight_decay = 0.1
beta1 = 0.9
beta2 = 0.95
grad_clip = 1.0
lr_decay_iters = 0
warmup_iters = 700
max_minutes = 0.0
eval_interval = 250
eval_iters = 100
sample_interval = 1000
