# nanoGPT's model and token budget on characters of Shakespeare: 6 layers, 384 wide,
# 5,000 x 16,384 tokens. With --batch_size=32 --max_iters=1666, a sixth of them, val loss was 1.450
# at its best (nanoGPT's is 1.4697).
out_dir = 'out-shakespeare-char'
dataset = 'shakespeare_char'
block_size = 256
batch_size = 64
max_iters = 5000
learning_rate = 1e-2
n_layer = 6
n_head = 6
n_kv_head = 6
head_dim = 64
n_embd = 384
dropout = 0.2
max_minutes = 0.0
eval_interval = 250
sample_interval = 1000
sample_tokens = 500
sample_repetition_penalty = 1.0
always_save_checkpoint = False  # it overfits: keep the best
