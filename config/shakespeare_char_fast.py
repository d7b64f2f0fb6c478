# Below nanoGPT's val loss on characters of Shakespeare (1.886 after 2,000 steps of 768 tokens) as
# soon as two CPU cores can: half its layers, 220 steps of 1,024 tokens. Found by trying depths,
# widths, batches and rates.
out_dir = 'out-shakespeare-char-fast'
dataset = 'shakespeare_char'
block_size = 64
batch_size = 16
max_iters = 220
n_layer = 2
n_head = 4
n_kv_head = 4
head_dim = 32
n_embd = 128
dropout = 0.0
learning_rate = 2e-2  # Muon's
warmup_iters = 10
max_minutes = 0.0
eval_interval = 220
log_interval = 50
sample_interval = 220
sample_tokens = 500
sample_repetition_penalty = 1.0
