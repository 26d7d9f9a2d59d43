"""Encoders and tokenisers: statistics of the weights, and one line where one cannot be built."""
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

import data
import encoders
import runs
from conftest import CONFIG
from data import UserError

IMAGE = {"weights": None, "statistics": "model", "options": {}}
TEXT = {"name": None, "options": {}, "max_length": 16}
BERT = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


def image_encoder(name, size, **more):
    return encoders.build_image_encoder(IMAGE | {"name": name, "size": size} | more, pretrained=False).eval()


def test_statistics_are_the_weights_own_or_imagenets():
    assert image_encoder("vit_tiny_patch16_224", 32).statistics == ((0.5,) * 3, (0.5,) * 3)
    imagenet = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    assert image_encoder("vit_tiny_patch16_224", 32, statistics="imagenet").statistics == imagenet
    with pytest.warns(UserWarning, match="deprecated|Mapping"):
        old = image_encoder("vit_tiny_patch16_224_in21k", 32)      # timm builds it under its present name
    assert old.statistics == ((0.5,) * 3, (0.5,) * 3)


@pytest.mark.parametrize("backbone", ["vit_b_224", "vit_b_384", "swin_b_224", "swin_b_384"])
def test_the_papers_encoders_have_weights_on_the_hub_by_their_tag(backbone):
    import timm
    name = runs.load_config(CONFIG, backbone)["image"]["name"]
    assert "." in name and timm.get_pretrained_cfg(name).hf_hub_id == f"timm/{name}"


def test_an_encoder_with_more_rows_than_words_comes_back(tmp_path):
    """Multilingual encoders have them: the checkpoint's own description counts, not the tokeniser."""
    folder = str(tmp_path / "bert")
    transformers.BertModel(transformers.BertConfig(vocab_size=50, **BERT)).save_pretrained(folder)
    encoder = encoders.build_text_encoder(TEXT | {"name": folder}, True, 40, 0)
    again = encoders.build_text_encoder(TEXT, False, 40, 0, encoder.config)
    again.load_state_dict(encoder.state_dict())


def test_of_an_encoder_with_a_decoder_the_encoder_is_taken(tmp_path):
    sizes = {f"{part}_{key}": 2 for part in ("encoder", "decoder") for key in ("layers", "attention_heads")}
    model = transformers.BartForConditionalGeneration(transformers.BartConfig(
        vocab_size=50, d_model=32, encoder_ffn_dim=32, decoder_ffn_dim=32, **sizes)).eval()
    model.half().save_pretrained(tmp_path)
    encoder = encoders.build_text_encoder(TEXT | {"name": str(tmp_path)}, True, 50, 1).eval()
    again = encoders.build_text_encoder(TEXT, False, 50, 1, encoder.config).eval()
    again.load_state_dict(encoder.state_dict())
    ids = torch.tensor([[0, 7, 8, 9, 2]])
    with torch.no_grad():
        expected = model.float().model.encoder(input_ids=ids).last_hidden_state
        for hidden, *_ in (encoder(ids, ids >= 0), again(ids, ids >= 0)):
            torch.testing.assert_close(hidden, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("family, positions", [("bert", 64), ("roberta", 66)])     # RoBERTa's start at 2
def test_captions_longer_than_the_encoders_positions_are_one_line(family, positions):
    options = BERT | {"model_type": family, "max_position_embeddings": positions}
    build = encoders.build_text_encoder
    assert build(TEXT | {"options": options, "max_length": 64}, False, 40, 1).width == 32
    with pytest.raises(UserError, match="^text.max_length is 128; .* at most 64 tokens"):
        build(TEXT | {"options": options, "max_length": 128}, False, 40, 1)


@pytest.mark.parametrize("family, lost, said", [
    ("bert", "layer.0.output.dense.weight", "no weights for encoder.layer.0.output.dense.weight"),
    ("bert", None, "finite"), ("fnet", "pooler.dense.weight", "padding")])
def test_a_text_encoder_that_will_not_do_is_one_line(family, lost, said, tmp_path):
    """For lack of a weight, unless it is the pooler's; its states are not finite; it reads padding."""
    config = transformers.AutoConfig.for_model(family, vocab_size=50, **BERT)
    model = transformers.AutoModel.from_config(config)
    weights = {key: value if lost else value / 0 for key, value in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict={
        key: value for key, value in weights.items() if not lost or not key.endswith(lost)})
    with pytest.raises(UserError, match=said) as error:
        encoders.build_text_encoder(TEXT | {"name": str(tmp_path)}, True, 50, 0)
    assert "\n" not in str(error.value)


def test_a_misspelt_option_of_a_text_encoder_is_named():
    with pytest.raises(UserError, match="no hidden_sise; close: hidden_size"):
        encoders.build_text_encoder(TEXT | {"options": {"hidden_sise": 32}}, False, 40, 0)


def test_a_long_batch_of_captions_is_encoded_as_each_alone():
    """A CPU encodes a batch in parts of similar length."""
    encoder = encoders.build_text_encoder(TEXT | {"options": BERT}, False, 40, 0).eval()
    valid = torch.arange(12) < torch.randint(2, 13, (17, 1))
    ids = torch.randint(1, 40, (17, 12)) * valid
    with torch.no_grad():
        hidden, embeddings, _ = encoder(ids, valid)
        for row in range(17):
            own = valid[row]
            alone, words, _ = encoder(ids[row:row + 1, own], valid[row:row + 1, own])
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


def test_a_tokenizer_without_padding_and_with_gaps_in_its_ids_will_do(tmp_path):
    tokenizer = Tokenizer(models.WordLevel({"dog": 3, "dogs": 5, "the": 19}, unk_token="the"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path)
    loaded = encoders.load_tokenizer(str(tmp_path))
    again = encoders.tokenizer_from_state(encoders.tokenizer_state(loaded))
    assert loaded.pad_token_id == again.pad_token_id and loaded.pad_token_id in (3, 5, 19)
    for one in (loaded, again):
        caption, = data.tokenize(one, ["the dogs dog"], 8)
        assert caption.tolist() == [[19, 5, 3], [1, 1, 1]] and encoders.rows_needed(one) == 20
    transformers.BertModel(transformers.BertConfig(vocab_size=19, **BERT)).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="the tokenizer needs 20 rows of embeddings, .* has 19") as error:
        encoders.build_text_encoder(TEXT | {"name": str(tmp_path)}, True, 20, loaded.pad_token_id)
    assert "\n" not in str(error.value)
    untrained = encoders.build_text_encoder(TEXT | {"options": BERT}, False, 20, loaded.pad_token_id)
    assert untrained(torch.tensor([[19]]), torch.tensor([[True]]))[1].shape == (1, 1, 32)


@pytest.mark.parametrize("family, file", [("t5", "spiece.model"), ("bert", "nothing.txt")])
def test_a_folder_without_a_fast_tokenizer_is_one_true_line(family, file, tmp_path):
    """transformers reads no spiece.model by itself, and of no file at all makes a tokeniser without words."""
    (tmp_path / "config.json").write_text(f'{{"model_type": "{family}"}}')
    (tmp_path / file).write_bytes(bytes(range(256)))
    with pytest.raises(UserError, match=f"'{tmp_path}'.*tokenizer.json.*sentencepiece and protobuf") as error:
        encoders.load_tokenizer(str(tmp_path))
    assert "\n" not in str(error.value) and "tiktoken" not in str(error.value)


def test_without_a_network_the_error_says_what_to_get(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="text.name=PATH.*vit_micro"):
        encoders.build_text_encoder(TEXT | {"name": "no/such-model"}, True, 40, 0)
    with pytest.raises(UserError, match="image.weights=PATH.*vit_micro"):
        encoders.build_image_encoder(IMAGE | {"name": "resnet18", "size": 64}, pretrained=True)


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
