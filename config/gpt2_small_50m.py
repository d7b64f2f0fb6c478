# A GPT-2 of half the usual smallest size, 51M parameters, on 1 billion tokens: 20 a parameter.
out_dir = 'out-gpt2-50m'
dataset = 'fineweb_edu'
vocab_size = 50304
block_size = 1024
batch_size = 16
gradient_accumulation_steps = 8
max_iters = 7630  # of 131,072 tokens = 1 billion

n_layer = 8
n_head = 8
n_kv_head = 0
head_dim = 0
n_embd = 512
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
learning_rate = 1e-3
min_lr = 1e-4
lr_schedule = 'cosine'
weight_decay = 0.1
beta1 = 0.9
beta2 = 0.95
grad_clip = 1.0
lr_decay_iters = 0
warmup_iters = 500
max_minutes = 0.0
eval_interval = 250
eval_iters = 100
sample_interval = 1000
