"""Text encoders of fourteen families, each with a tokeniser of its own layout, in a folder as users have."""
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

import data
import encoders
import eval_grm
import runs
from conftest import TINY, run_train

CAPTIONS = ["Two dogs run on the grass .", "two men", "A red circle left of a blue square , and the grass ."]
SIZE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}


def word_tokenizer(marks):
    """Whole words in lower case, as BERT has its frequent ones."""
    ids = {token: i for i, token in enumerate(dict.fromkeys([*marks, *" ".join(CAPTIONS).lower().split()]))}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=marks[2]))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.BertPreTokenizer()
    return tokenizer


def byte_tokenizer(marks):
    """Pairs of bytes, as GPT-2: a space is part of the word that follows."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.train_from_iterator(CAPTIONS, trainers.BpeTrainer(special_tokens=marks, show_progress=False))
    return tokenizer


def clip_tokenizer(marks):
    """Pairs of characters in lower case; the last of a word says so."""
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(CAPTIONS, trainers.BpeTrainer(
        special_tokens=marks, end_of_word_suffix="</w>", show_progress=False))
    return tokenizer


def piece_tokenizer(marks):
    """SentencePiece's pieces: a word starts with a bar."""
    pieces = dict.fromkeys([*marks, *(f"▁{word}" for word in " ".join(CAPTIONS).split())])
    tokenizer = Tokenizer(models.Unigram([(piece, -1.0) for piece in pieces], unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    return tokenizer


BERT, FAIR, XLNET = (["[PAD]", "[CLS]", "[UNK]", "[SEP]"], ["<s>", "<pad>", "<unk>", "</s>"],
                     ["<pad>", "<sep>", "<unk>", "<cls>"])
END, CLIP, LLAMA, T5 = ["<end>"], ["<s>", "</s>"], ["<s>", "</s>", "<unk>"], ["<pad>", "</s>", "<unk>"]
QWEN3 = {"num_key_value_heads": 1, "head_dim": 16}
TOWERS = {"vision_config": SIZE | {"image_size": 32, "patch_size": 16}}
# The model, its text part; the tokeniser, its special tokens, which it adds, padding, its side; more settings
FAMILIES = {
    "bert": ("BertForMaskedLM", "bert", word_tokenizer, BERT, "[CLS] $A [SEP]", "[PAD]", "right", {}),
    "roberta": ("RobertaForMaskedLM", "roberta", byte_tokenizer, FAIR, "<s> $A </s>", "<pad>", "right", {}),
    "distilbert": ("DistilBertModel", "", word_tokenizer, BERT, "[CLS] $A [SEP]", "[PAD]", "right", {}),
    "mpnet": ("MPNetModel", "", word_tokenizer, FAIR, "<s> $A </s>", "<pad>", "right", {}),
    "deberta-v2": ("DebertaV2Model", "", piece_tokenizer, BERT, "[CLS] $A [SEP]", "[PAD]", "right", {}),
    "modernbert": ("ModernBertModel", "", byte_tokenizer, BERT, "[CLS] $A [SEP]", "[PAD]", "right", {}),
    "xlm-roberta": ("XLMRobertaModel", "", piece_tokenizer, FAIR, "<s> $A </s>", "<pad>", "right", {}),
    "gpt2": ("GPT2LMHeadModel", "transformer", byte_tokenizer, END, "$A", None, "right", {}),
    "llama": ("LlamaForCausalLM", "model", piece_tokenizer, LLAMA, "<s> $A", None, "left", {}),
    "qwen3": ("Qwen3ForCausalLM", "model", byte_tokenizer, END, "$A <end>", "<end>", "left", QWEN3),
    "xlnet": ("XLNetModel", "", piece_tokenizer, XLNET, "$A <sep> <cls>", "<pad>", "left", {"d_head": 16}),
    "t5": ("T5ForConditionalGeneration", "encoder", piece_tokenizer, T5, "$A </s>", "<pad>", "right", {}),
    "clip": ("CLIPModel", "text_model", clip_tokenizer, CLIP, "<s> $A </s>", "</s>", "right", TOWERS),
    "siglip": ("SiglipModel", "text_model", piece_tokenizer, T5, "$A </s>", "</s>", "right", TOWERS),
}


def save_folder(family, folder):
    """Writes tokeniser and model -> the model's text part."""
    name, place, build, marks, template, padding, side, more = FAMILIES[family]
    tokenizer = build(marks)
    tokenizer.add_special_tokens(marks)
    added = [(mark, i) for i, mark in enumerate(marks) if mark in template.split()]
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=added)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=padding, padding_side=side).save_pretrained(folder)
    size = SIZE | {"vocab_size": tokenizer.get_vocab_size(), "pad_token_id": padding and marks.index(padding)}
    size = {"text_config": size | {"eos_token_id": 1}} if more is TOWERS else size
    torch.manual_seed(0)
    model = getattr(transformers, name)(transformers.AutoConfig.for_model(family, **size, **more)).eval()
    model.save_pretrained(folder)
    return model.get_submodule(place)


@pytest.mark.parametrize("family", [
    family if family in ("gpt2", "siglip") else pytest.param(family, marks=pytest.mark.slow)
    for family in FAMILIES])
def test_a_text_encoder_of_this_family_is_read_trained_and_restored(family, tmp_path):
    folder = str(tmp_path / "encoder")
    text_part, template = save_folder(family, folder), FAMILIES[family][4].split()
    tokenizer = encoders.load_tokenizer(folder)
    captions = data.tokenize(tokenizer, CAPTIONS, 64)

    # The caption's own tokens are its words and punctuation, and around them is what the family adds.
    for text, (ids, words) in zip(CAPTIONS, captions):
        tokens = tokenizer.convert_ids_to_tokens(ids.tolist())
        said = [token.strip("▁Ġ").removesuffix("</w>").lower() for token, own in zip(tokens, words) if own]
        assert said == text.lower().split()
        before = template.index("$A")
        assert [*tokens[:before], "$A", *tokens[before + len(said):]] == template

    # The weights are the folder's.
    settings = {"name": folder, "options": {}, "max_length": 64}
    rows = encoders.rows_needed(tokenizer)
    read = encoders.build_text_encoder(settings, True, rows, tokenizer.pad_token_id)
    ids = torch.from_numpy(captions[0][:1]).long()
    with torch.no_grad():
        hidden = text_part(input_ids=ids).last_hidden_state
        torch.testing.assert_close(read.eval()(ids, ids >= 0)[0], hidden, rtol=0, atol=1e-5)

    # It trains.
    assert run_train("--backbone", "vit_micro", "--out", tmp_path / "run", "--set", *TINY,
                     "train.max_steps=2", "text.pretrained=true", f"text.name={folder}") is None

    # Neither padding nor the size of a batch changes a caption's features.
    grm = eval_grm.load(tmp_path / "run" / "best.pt")
    together = grm.encode_texts(3 * CAPTIONS)
    for row, text in enumerate(CAPTIONS):
        alone = grm.encode_texts([text])
        for batch, single in zip(together, alone):
            torch.testing.assert_close(batch[row, :single.shape[1]], single[0], rtol=0, atol=1e-5)

    # What the checkpoint restored is the tokeniser and the encoder of the folder, with the trained weights.
    trained = runs.load_checkpoint(tmp_path / "run" / "best.pt")["model"]
    read.load_state_dict({key.removeprefix("text_encoder."): value for key, value in trained.items()
                          if key.startswith("text_encoder.")})
    grm.model.text_encoder, grm.tokenizer = read, tokenizer
    for restored, expected in zip(together, grm.encode_texts(3 * CAPTIONS)):
        assert torch.equal(restored, expected)
    assert not torch.equal(read(ids, ids >= 0)[0], hidden)
