# The 75M GPT (70.3M parameters, counted exactly) on 5 billion tokens of Dolma: a GPU with 12 GB.
# Any data with a vocabulary of at most 32,000 serves: --dataset=NAME.
out_dir = 'out-dolma-75m'
dataset = 'dolma'
vocab_size = 32000
block_size = 1024
batch_size = 12
gradient_accumulation_steps = 4
max_iters = 101726  # of 49,152 tokens = 5 billion

n_layer = 10
n_head = 10
n_kv_head = 0
head_dim = 0
n_embd = 640
dropout = 0.1
bias = False
n_inner = 0
position = 'learned'
norm = 'layernorm'
norm_eps = 1e-5
activation = 'gelu'
qk_norm = False
tie_embeddings = True

optimizer = 'adamw'
learning_rate = 5e-4
min_lr = 5e-5
lr_schedule = 'cosine'
weight_decay = 0.1
beta1 = 0.9
beta2 = 0.95
grad_clip = 1.0
lr_decay_iters = 0
warmup_iters = 2000
max_minutes = 0.0
eval_interval = 1000
eval_iters = 200
sample_interval = 5000
