"""Broken files, by the thousand: each is read right, or refused in one line."""

import pytest
import torch

from fledge import UserError, checkpoint
from model import GPT, GPTConfig

SIZES = dict(block_size=8, vocab_size=20, n_layer=2, n_head=2, n_embd=8)


def save_checkpoint(path, **more):
    model = GPT(GPTConfig(**SIZES))
    args = checkpoint.model_args(model.config)
    saved = dict(model=model.state_dict(), model_args=args, config=dict(dataset='x'), iter_num=3)
    torch.save(saved | more, path)


def test_a_flipped_bit_in_a_weight_is_found_by_its_checksum(tmp_path):
    path = tmp_path / 'ckpt.pt'
    save_checkpoint(path)
    checkpoint.check_sums(str(path))
    whole = path.read_bytes()
    weight = torch.load(path)['model']['lm_head.weight'].numpy().tobytes()
    broken = bytearray(whole)
    broken[whole.index(weight) + 5] ^= 1
    path.write_bytes(broken)
    with pytest.raises(UserError, match="checksum of 'ckpt/data/[0-9]+' does not match"):
        checkpoint.load(str(path))


def test_a_checkpoint_that_was_saved_without_checksums_is_read(tmp_path):
    path = tmp_path / 'ckpt.pt'
    torch.serialization.set_crc32_options(False)
    try:
        save_checkpoint(path)
    finally:
        torch.serialization.set_crc32_options(True)
    assert checkpoint.load(str(path))['iter_num'] == 3
