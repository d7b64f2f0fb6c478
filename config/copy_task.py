# The Transformer of "Attention Is All You Need", on a task that shows that it works: it copies.
# Under a minute on two CPU cores.
#   python train.py config/copy_task.py
#   python evaluate.py --out_dir=out-copy-task        exact_match
#   python sample.py --out_dir=out-copy-task --start=transformer --num_samples=1
# Harder, and learned as well:
#   python prepare/copy_task.py --task=sort --name=sort_task
#   python train.py config/copy_task.py --dataset=sort_task --out_dir=out-sort-task
out_dir = 'out-copy-task'
dataset = 'copy_task'
block_size = 32
batch_size = 16  # rows, each of two or three sequences
max_iters = 800
learning_rate = 1e-2
max_minutes = 0.0

n_encoder_layer = 2
n_layer = 2
n_head = 4
n_kv_head = 0
head_dim = 0
n_embd = 128
n_inner = 0
position = 'sinusoidal'
norm = 'layernorm'
norm_eps = 1e-5
norm_first = False
activation = 'relu'
bias = True
qk_norm = False
tie_embeddings = True

warmup_iters = 100
eval_interval = 200
sample_start = 'transformer'
sample_interval = 200
sample_tokens = 20
sample_repetition_penalty = 1.0
