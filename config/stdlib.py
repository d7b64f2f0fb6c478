# The default run, spelled out: 2.4M parameters of Qwen3's architecture on Python's own standard library,
# at most five minutes on two CPU cores. `python train.py` does the same.
dataset = 'stdlib'
block_size = 512
batch_size = (
    4  # small batches: the time allows few tokens, and many small steps learn more from them
)
gradient_accumulation_steps = 1

n_layer = 4
n_head = 3
n_kv_head = 1
head_dim = 64
n_embd = 192
n_inner = 0  # 512
dropout = 0.0
bias = False
position = 'rope'
norm = 'rmsnorm'
activation = 'swiglu'
qk_norm = True
tie_embeddings = True

optimizer = 'muon'
learning_rate = 1e-2
lr_schedule = 'linear'
warmup_iters = 20
min_lr = 0.0
weight_decay = 0.1
max_iters = 4000  # 0.9 epochs
max_minutes = 5.0

eval_interval = 500
eval_iters = 0  # all of val
sample_interval = 500
