"""Encoders and tokenisers: patches in their places, statistics of the weights, and one line where one cannot
be built."""
import pytest
import torch
import transformers

import encoders
import runs
from conftest import CONFIG
from data import UserError

IMAGE = {"weights": None, "statistics": "model", "options": {}}
BERT = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


def image_encoder(name, size, **more):
    return encoders.build_image_encoder(IMAGE | {"name": name, "size": size} | more, pretrained=False).eval()


@pytest.mark.parametrize("name, size, classes, patches", [
    ("vit_tiny_patch16_224", 224, 1, 196), ("vit_tiny_patch16_384", 384, 1, 576), ("resnet18", 96, 0, 9),
    ("swin_tiny_patch4_window7_224", 224, 0, 49), ("vit_tiny_patch16_224", 112, 1, 49)])
def test_tokens_are_the_class_tokens_and_then_the_patches(name, size, classes, patches):
    encoder = image_encoder(name, size)
    with torch.no_grad():
        tokens = encoder(torch.randn(1, 3, size, size))
    assert tokens.shape == (1, classes + patches, encoder.width) and encoder.class_tokens == classes


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "vit_tiny_patch16_224", "resnet18"])
def test_patches_are_in_row_order(name):
    """Change the top right corner of an image, and the token that moves most lies there."""
    encoder = image_encoder(name, 224)
    images = torch.zeros(2, 3, 224, 224)
    images[1, :, :32, 192:] = 3
    with torch.no_grad():
        tokens = encoder(images)[:, encoder.class_tokens:]
    side = round(tokens.shape[1] ** 0.5)
    row, column = divmod((tokens[1] - tokens[0]).norm(dim=-1).argmax().item(), side)
    assert row < side / 3 and column > 2 * side / 3


def test_statistics_are_the_weights_own_or_imagenets():
    assert image_encoder("vit_tiny_patch16_224", 224).statistics == ((0.5,) * 3, (0.5,) * 3)
    imagenet = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    assert image_encoder("vit_tiny_patch16_224", 224, statistics="imagenet").statistics == imagenet
    with pytest.warns(UserWarning, match="deprecated|Mapping"):
        old = image_encoder("vit_tiny_patch16_224_in21k", 32)      # timm builds it under its present name
    assert old.statistics == ((0.5,) * 3, (0.5,) * 3)


@pytest.mark.parametrize("name, size, said", [
    ("vit_tiny_patch16_22", 224, "close: vit_tiny_patch16_224"),
    ("vit_tiny_patch16_224.nonsense", 224, "nonsense"),
    ("crossvit_tiny_240", 240, "no patches"), ("pit_ti_224", 224, "no patches"),
    ("vit_small_patch16_dinov3", 100, "cannot encode 100 px")])
def test_an_image_encoder_that_will_not_do_is_one_line(name, size, said):
    with pytest.raises(UserError, match=said) as error:
        image_encoder(name, size)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("backbone", ["vit_b_224", "vit_b_384", "swin_b_224", "swin_b_384"])
def test_the_papers_encoders_have_weights_on_the_hub_by_their_tag(backbone):
    import timm
    name = runs.load_config(CONFIG, backbone)["image"]["name"]
    assert "." in name and timm.get_pretrained_cfg(name).hf_hub_id == f"timm/{name}"


def test_an_encoder_with_more_rows_than_words_comes_back(tmp_path):
    """Multilingual encoders have them: the checkpoint's own description counts, not the tokeniser."""
    folder = str(tmp_path / "bert")
    transformers.BertModel(transformers.BertConfig(vocab_size=50, **BERT)).save_pretrained(folder)
    settings = {"name": folder, "options": {}}
    encoder = encoders.build_text_encoder(settings, True, 40, 0)
    again = encoders.build_text_encoder(settings, False, 40, 0, encoder.hugging.config.to_dict())
    again.load_state_dict(encoder.state_dict())


def test_a_misspelt_option_of_a_text_encoder_is_named():
    with pytest.raises(UserError, match="no hidden_sise; close: hidden_size"):
        encoders.build_text_encoder({"name": None, "options": {"hidden_sise": 32}}, False, 40, 0)


def test_a_long_batch_of_captions_is_encoded_as_each_alone():
    """A CPU encodes a batch in parts of similar length."""
    encoder = encoders.build_text_encoder({"name": None, "options": BERT}, False, 40, 0).eval()
    valid = torch.arange(12) < torch.randint(2, 13, (17, 1))
    ids = torch.randint(1, 40, (17, 12)) * valid
    with torch.no_grad():
        hidden, embeddings = encoder(ids, valid)
        for row in range(17):
            own = valid[row]
            alone, words = encoder(ids[row:row + 1, own], valid[row:row + 1, own])
            torch.testing.assert_close(hidden[row, own], alone[0], rtol=0, atol=1e-5)
            torch.testing.assert_close(embeddings[row, own], words[0])


def test_a_built_tokenizer_comes_back_from_a_checkpoints_strings():
    tokenizer = encoders.build_tokenizer(["A dog, a cat.", "two dogs"])
    again = encoders.tokenizer_from_state(encoders.tokenizer_state(tokenizer))
    text = "a dog , two birds ."
    assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert again.pad_token_id == tokenizer.pad_token_id
    assert tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"]) == [
        "[CLS]", "a", "dog", ",", "two", "[UNK]", ".", "[SEP]"]


def test_without_a_network_the_error_says_what_to_get(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="text.name=PATH.*vit_micro"):
        encoders.build_text_encoder({"name": "no/such-model", "options": {}}, True, 40, 0)
    with pytest.raises(UserError, match="image.weights=PATH.*vit_micro"):
        encoders.build_image_encoder(IMAGE | {"name": "resnet18", "size": 32}, pretrained=True)


def test_the_hub_is_asked_for_seconds_only(monkeypatch):
    """Its own client would retry for most of a minute."""
    import socket
    import time
    with socket.socket() as deaf:                                  # accepts, and never answers
        deaf.bind(("127.0.0.1", 0))
        deaf.listen()
        monkeypatch.setattr(encoders.constants, "ENDPOINT", f"http://127.0.0.1:{deaf.getsockname()[1]}")
        monkeypatch.setattr(encoders.constants, "HF_HUB_OFFLINE", False)
        started = time.monotonic()
        assert not encoders._hub_answers(timeout=0.5)
        assert time.monotonic() - started < 5
