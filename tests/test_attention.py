"""The attention that is drawn is the one that the model computes with."""

import pytest
import torch
from conftest import shared

from encoder_decoder import make_model
from fledge import UserError, checkpoint, cpu, quantize
from fledge.attention import Maps, attention_of, draw, draw_attention, label
from fledge.formats import huggingface
from fledge.tokenizer import byte_tokenizer, load_tokenizer
from model import GPT, GPTConfig

TEXT = 'Once upon a time, there was a little girl named Lily.'


def small_model(**switches):
    torch.manual_seed(0)
    sizes = dict(n_layer=2, n_head=4, n_kv_head=2, n_embd=32, block_size=128, vocab_size=259)
    model = GPT(GPTConfig(**sizes, **switches)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3)  # so that attention is far from even
    return model


def numbers(n=20):
    return torch.arange(n)[None] * 7 % 259


def size_of_png(path):
    content = path.read_bytes()
    assert content.startswith(b'\x89PNG') and content.endswith(b'IEND\xaeB`\x82')
    return int.from_bytes(content[16:20]), int.from_bytes(content[20:24])


def test_it_is_transformers_attention():
    transformers = pytest.importorskip('transformers')
    folder = shared('stories260k')
    ids = torch.tensor([load_tokenizer(folder).encode_prompt(TEXT)])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation='eager')
    with torch.no_grad():
        expected = theirs(ids, output_attentions=True).attentions
    model = checkpoint.load_model(huggingface.load(folder), folder).eval()
    ours = attention_of(model, ids)
    assert len(ours) == len(expected) == 5
    for layer, layer_of_theirs in zip(ours, expected, strict=True):
        torch.testing.assert_close(layer, layer_of_theirs[0], rtol=0, atol=1e-5)


def sped_up(model):
    return cpu.speed_up(model, packed=True)


def in_16_bits(model):
    return model.to(torch.bfloat16)


def plain(model):
    return model


def learning(model):
    return cpu.speed_up(model)


@pytest.mark.parametrize('change', [plain, learning, sped_up, quantize.apply, in_16_bits])
def test_rows_sum_to_one_see_no_later_token_and_leave_the_model_as_it_was(change):
    model, idx = small_model(position='rope', norm='rmsnorm', qk_norm=True), numbers()
    reference = attention_of(model, idx)
    model = change(model)
    with torch.no_grad():
        before = model(idx)[0]
    layers = attention_of(model, idx)
    assert [layer.shape for layer in layers] == [(4, 20, 20)] * 2
    for layer, close in zip(layers, reference, strict=True):
        torch.testing.assert_close(layer.sum(dim=-1), torch.ones(4, 20))
        assert not layer.triu(1).any() and layer.max() > 0.5 and layer.std(dim=0).max() > 0.1
        assert (layer - close).abs().mean() < 0.01
    with torch.no_grad():
        assert torch.equal(model(idx)[0], before)
    assert not any('attend' in vars(module) for module in model.modules())


def test_an_edited_attention_is_the_one_that_is_seen(monkeypatch):
    from model import CausalSelfAttention

    attend = CausalSelfAttention.attend

    def attend_to_few(self, q, k, v, mask):  # a window of three
        near = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril().triu(-2)
        return attend(self, q, k, v, near)

    monkeypatch.setattr(CausalSelfAttention, 'attend', attend_to_few)
    for layer in attention_of(small_model(), numbers()):
        assert not layer.tril(-3).any() and layer.tril(-2).any()


def test_what_a_mask_hides_is_not_read():
    sizes = dict(n_layer=2, n_head=4, n_embd=32, block_size=32, vocab_size=259)
    model = make_model(GPTConfig(n_encoder_layer=2, position='sinusoidal', **sizes)).eval()
    source = numbers(9)
    source[0, 6:] = -1  # padding
    encoder = [block.attn for block in model.transformer.encoder]
    cross = [block.cross_attn for block in model.transformer.h]
    for attentions in (encoder, cross):
        for layer in attention_of(model, numbers(5), attentions, source):
            assert layer[:, :, :6].all() and not layer[:, :, 6:].any()


def test_a_text_too_long_leaves_the_model_as_it_was():
    model = small_model()
    with pytest.raises(ValueError, match='longer than block_size'):
        attention_of(model, numbers(129))
    assert not any('attend' in vars(module) for module in model.modules())


@pytest.mark.slow
def test_a_picture_has_room_for_each_token_and_no_more_than_fits(tmp_path, capsys):
    model, path = small_model(), tmp_path / 'attention.png'
    draw_attention(model, byte_tokenizer(), list(b'$x_1$ = 2\n'), str(path))
    width, height = size_of_png(path)
    assert width > 4 * 10 * 10 and height > 2 * 10 * 10 and width > height
    assert not capsys.readouterr().err
    draw_attention(model, byte_tokenizer(), [256] + list(range(200, 256)) * 2, str(path))
    assert 'the first 64 of 113 tokens' in capsys.readouterr().err
    width, height = size_of_png(path)
    assert 2000 < width < 3500 and height < 3500
    with pytest.raises(UserError, match='nowhere/a.png cannot be written: No such file'):
        draw_attention(model, byte_tokenizer(), [1], str(tmp_path / 'nowhere/a.png'))
    with pytest.raises(UserError, match='token 5000 is beyond the vocabulary'):
        draw_attention(model, byte_tokenizer(), [1, 5000], str(path))


def test_those_that_read_need_not_be_those_that_are_read(tmp_path):
    layers = [torch.full((1, 3, 30), 1 / 30)] * 2
    draw([Maps('', layers, [b'a'] * 3, [b'b'] * 30)], str(tmp_path / 'cross.png'))
    width, height = size_of_png(tmp_path / 'cross.png')
    assert width > 2 * height


def test_labels_show_what_cannot_be_seen():
    assert label(b' the') == '␣the' and label(b'\n\t') == '\\n\\t' and label('é'.encode()) == 'é'
    assert label(b'\xe6\xbc') == '\\xe6\\xbc' and label('漢'.encode()) == '\\u6f22'
    assert label(b' ' * 50) == '␣' * 11 + '…' and label(b'') == ''
