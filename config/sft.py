# Fine-tuning on conversations (SFT): only what the assistant says is learned.
#   python train.py config/sft.py
# with your own: python train.py config/sft.py --dataset=talks --init_from=OWNER/NAME --lora_rank=8
out_dir = 'out-sft'
init_from = 'out/ckpt.pt'  # the default run's
dataset = 'stdlib_chat'
target_epochs = 3
max_minutes = 0.0
batch_size = 4  # rows, each of several whole conversations
block_size = 512  # the longest conversation; with RoPE it may be more than the model had
weight_decay = 0.0
eval_interval = 200
sample_ask = 'What does os.path.join do?'
sample_interval = 200
sample_repetition_penalty = 1.0
