# Reviews told apart, positive from negative: the Stanford Sentiment Treebank in three minutes.
#   python prepare/classify.py --input=train.jsonl --val=dev.jsonl --name=sst2 \
#       --labels=negative,positive --tokenizer=train --vocab_size=8000
#   python train.py config/sentiment.py
#   python evaluate.py --out_dir=out-sentiment --labels
# with your own texts and labels: --dataset=NAME
import torch

from fledge import UserError

out_dir = 'out-sentiment'
dataset = 'sst2'
block_size = 256
batch_size = 8  # rows, each of some ten whole documents
n_layer = 1  # so little data teaches words, and hardly more than that
n_head = 4
n_kv_head = 4
n_embd = 256
target_epochs = 2
max_minutes = 0.0
# what keeps a model from learning the texts by heart
dropout = 0.5
weight_decay = 1.0
optimizer = 'adamw'
learning_rate = 3e-3
eval_interval = 100
sample_interval = 0


def objective(model, batch):
    """Each token of a text predicts the label, and not the last one alone: more to learn from."""
    if 'documents' not in batch:
        raise UserError('config/sentiment.py learns labels, which prepare/classify.py prepares')
    inputs, targets, documents = batch['inputs'], batch['targets'], batch['documents']
    loss_of = dict(return_logits=False, documents=documents)
    if not model.training:
        return model(inputs, targets, **loss_of)[1]
    learned = targets >= 0
    is_label = learned.clone()  # of what a document learns, its label and its end, the first
    is_label[:, 1:] &= ~learned[:, :-1]
    label = torch.zeros(int(documents.max()) + 1, dtype=targets.dtype, device=targets.device)
    label[documents[is_label]] = targets[is_label]
    if learned.sum() > 2 * len(label):
        raise UserError('config/sentiment.py learns one token of each document, and here are more')
    is_text = (documents >= 0) & ~learned
    everywhere = torch.where(is_text, label[documents.clamp(min=0)], targets)
    nats = model(inputs, everywhere, reduction='none', **loss_of)[1]
    return nats[learned].mean() + nats[is_text].mean()
