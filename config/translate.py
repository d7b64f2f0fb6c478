# Sequence to sequence on your own pairs of texts: 7M parameters of today's blocks, with an encoder.
#   python prepare/translate.py --input=pairs.tsv --name=translate --tokenizer=train
#   python train.py config/translate.py
#   python evaluate.py --out_dir=out-translate --num_beams=4       exact_match, chrf, bleu
#   python sample.py --out_dir=out-translate --num_beams=4 --start="Good morning."
#   python sample.py --out_dir=out-translate --num_beams=4 --prompts=texts.txt --output=out.jsonl
out_dir = 'out-translate'
dataset = 'translate'
block_size = 128  # the longest source, and the longest target
batch_size = 16  # rows, each of several pairs
target_epochs = 10
max_minutes = 0.0

n_encoder_layer = 4
n_layer = 4
n_head = 4
n_kv_head = 0
head_dim = 64
n_embd = 256
dropout = 0.1

warmup_iters = 100
learning_rate = 1e-2
eval_interval = 500
eval_iters = 50
always_save_checkpoint = False  # small data is soon known by heart: keep the best
sample_start = 'Good morning.'
sample_interval = 500
sample_tokens = 100
sample_repetition_penalty = 1.0
