# Preferences (DPO), behind SFT: what was chosen becomes likelier than what was rejected.
#   python train.py config/dpo.py
# with your own: python prepare/preferences.py --input=pairs.jsonl --name=pairs --tokenizer=...
#                python train.py config/dpo.py --dataset=pairs --init_from=out-mine/ckpt.pt
out_dir = 'out-dpo'
init_from = 'out-sft/ckpt.pt'
dataset = 'stdlib_pairs'
objective = 'dpo'
dpo_beta = 0.1
target_epochs = 1
max_minutes = 0.0
batch_size = 4  # rows, each of several whole pairs
block_size = 512  # the longest pair
optimizer = 'adamw'
learning_rate = 1e-5  # with more, or for longer, answers shrink to nothing; adapters want 1e-4
weight_decay = 0.0
warmup_iters = 10
eval_interval = 50
sample_interval = 50  # look at them: a model that answers nothing can have the best of numbers
sample_ask = 'What does os.path.join do?'
sample_repetition_penalty = 1.0
