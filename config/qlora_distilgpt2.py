# The run that people know: distilgpt2 (82M) in 4 bits with LoRA beside it, 600 steps on Alpaca.
#   pip install -r requirements-qlora.txt
#   python prepare/alpaca.py
#   python train.py config/qlora_distilgpt2.py
out_dir = 'out-qlora'
init_from = 'distilbert/distilgpt2'
dataset = 'alpaca'
quantize_base = 'nf4'
lora_rank = 16
lora_alpha = 32.0
lora_dropout = 0.05
max_iters = 600
max_minutes = 0.0
batch_size = 4
block_size = 512
weight_decay = 0.0
eval_interval = 200
eval_iters = 50
sample_interval = 600
sample_ask = 'Name three primary colours.'
