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
warmup_iters = 500
max_minutes = 0.0
eval_interval = 250
eval_iters = 100
sample_interval = 1000
