# nanoGPT's CPU model and token budget on characters of Shakespeare: 4 layers, 128 wide,
# 2,000 x 768 tokens.
out_dir = 'out-shakespeare-char-cpu'
dataset = 'shakespeare_char'
block_size = 64
batch_size = 12
max_iters = 2000
learning_rate = 1e-2
n_layer = 4
n_head = 4
n_kv_head = 4
head_dim = 32
n_embd = 128
n_inner = 320  # keeps the gated MLP at nanoGPT's parameter count
tie_embeddings = True
dropout = 0.0
max_minutes = 0.0
eval_interval = 500
log_interval = 50
sample_interval = 1000
sample_tokens = 500
sample_repetition_penalty = 1.0
