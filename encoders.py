"""The encoders and the tokeniser: from the hub, its cache, a local path, or from scratch.

Any timm model whose features are a grid of patches and any Hugging Face text encoder will do. Nothing that is
read can execute code, and nothing hangs where there is no network.
"""
import difflib
import json
import os
import urllib.error
import urllib.request
import warnings
from collections import Counter

import huggingface_hub
import timm
import torch
import torch.nn.functional as F
import transformers
from huggingface_hub import constants
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn

from data import UserError, require


# ---- images ------------------------------------------------------------------------------------------------
class ImageEncoder(nn.Module):
    """A timm model as a function from images (B, 3, H, W) to tokens (B, C + G*G, width): C class tokens, then
    the patches.

    statistics: the mean and standard deviation, per channel, with which its pixels are normalised.
    """

    def __init__(self, model: nn.Module, statistics: tuple):
        super().__init__()
        self.timm, self.statistics = model, statistics
        self.width, self.class_tokens = model.num_features, getattr(model, "num_prefix_tokens", 0)

    def forward(self, images: Tensor) -> Tensor:
        # On a CPU, convolutions are faster with the channels last; transformers do not mind.
        tokens = self.timm.forward_features(images.contiguous(memory_format=torch.channels_last))
        if isinstance(tokens, Tensor) and tokens.ndim == 4:
            nhwc = getattr(self.timm, "output_fmt", "NCHW") == "NHWC"       # Swin; CNNs give (B, width, G, G)
            tokens = tokens.flatten(1, 2) if nhwc else tokens.flatten(2).transpose(1, 2)
        return tokens


def build_image_encoder(config: dict, pretrained: bool) -> ImageEncoder:
    """The encoder of the configuration's `image` block. `weights` is a local file; without it timm's own are
    loaded.

    UserError for a model that timm does not know or cannot build, and for one whose features are no patches.
    """
    name, size = config["name"], config["size"]
    if not timm.is_model(name):
        near = difflib.get_close_matches(name.split(".")[0], timm.list_models(), 3, 0.3)
        raise UserError(f"image.name: timm has no model '{name}'; close: {', '.join(near) or 'none'}")
    options = {"num_classes": 0, "img_size": size, **(config["options"] or {})}
    try:
        try:
            model = timm.create_model(name, **options)
        except TypeError as error:                              # CNNs take any size and have no such argument
            if "img_size" not in str(error):
                raise
            del options["img_size"]
            model = timm.create_model(name, **options)
        if pretrained:
            weights = config["weights"] or _timm_weights(name, model.pretrained_cfg)
            require(os.path.isfile(weights), f"image.weights: no such file '{weights}'")
            # Read here, so that neither timm's version nor the file's form lets anything execute.
            state = timm.models.load_state_dict(weights, weights_only=True)
            model = timm.create_model(name, **options, pretrained=True,
                                      pretrained_cfg_overlay={"state_dict": state})
            model.pretrained_cfg.pop("state_dict", None)          # or it would hold its weights twice
    except UserError:
        raise
    except Exception as error:                                    # timm raises whatever its model code raises
        raise UserError(f"image encoder '{name}' at {size} px cannot be built: {one_line(error)}") from error
    statistics = IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
    if config["statistics"] == "model":
        statistics = tuple(model.pretrained_cfg["mean"]), tuple(model.pretrained_cfg["std"])
    encoder = ImageEncoder(model, statistics)
    _try_one_image(encoder, name, size)
    return encoder


@torch.no_grad()
def _try_one_image(encoder: ImageEncoder, name: str, size: int):
    """UserError unless a forward pass gives tokens of which more than one is a patch."""
    training = encoder.training
    try:
        tokens = encoder.eval()(torch.zeros(1, 3, size, size))
    except Exception as error:
        raise UserError(f"image encoder '{name}' cannot encode {size} px: {one_line(error)}") from error
    encoder.train(training)
    patches = tokens.shape[1] - encoder.class_tokens if isinstance(tokens, Tensor) and tokens.ndim == 3 else 0
    require(patches > 1, f"image encoder '{name}' gives no patches at {size} px: choose another image.name")


def _timm_weights(name: str, cfg: dict) -> str:
    """The cached or downloaded weight file of a timm model."""
    hub_name = cfg.get("hf_hub_id")
    require(hub_name, f"image.name: timm has no pretrained weights for '{name}'; set image.pretrained=false")
    return _from_hub(hub_name, "image.weights", lambda **where: huggingface_hub.hf_hub_download(
        hub_name, cfg.get("hf_hub_filename") or "model.safetensors", **where))


# ---- text --------------------------------------------------------------------------------------------------
class TextEncoder(nn.Module):
    """A transformers model as a function of token ids (B, M) and valid (B, M), False on padding -> the words
    in context (B, M, width), and the words by themselves, their embeddings (B, M, embedding_width)."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.hugging, self.width = model, model.config.hidden_size
        self.embedding_width = model.get_input_embeddings().embedding_dim

    def forward(self, ids: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        return self.hidden_states(ids, valid), self.hugging.get_input_embeddings()(ids)

    def hidden_states(self, ids: Tensor, valid: Tensor) -> Tensor:
        """(B, M, width). A CPU gains nothing from one large call, so it encodes four parts of similar length,
        which hardly have any padding."""
        def encode(ids, valid):
            return self.hugging(input_ids=ids, attention_mask=valid.long()).last_hidden_state

        if ids.device.type != "cpu" or len(ids) < 8:
            return encode(ids, valid)
        lengths = valid.sum(1)
        order = lengths.argsort(stable=True)
        parts = []
        for rows in order.chunk(4):
            longest = int(lengths[rows].max())
            hidden = encode(ids[rows, :longest], valid[rows, :longest])
            parts.append(F.pad(hidden, (0, 0, 0, ids.shape[1] - longest)))
        return torch.cat(parts)[order.argsort()]


def build_text_encoder(config: dict, pretrained: bool, vocab_size: int, pad_id: int,
                       encoder_config: dict | None = None) -> TextEncoder:
    """The encoder of the configuration's `text` block. `name` is a hub name or a local folder.

    An untrained encoder takes its shape from encoder_config (a checkpoint's), or from `name` where that is at
    hand, or it is a BERT with `options`; its vocabulary is the tokeniser's.
    """
    name = config["name"]
    if pretrained:
        require(name, "text.pretrained is true but text.name is empty: name a hub model or a local folder")
        # float32, because transformers keeps the stored type; no remote code, or a folder could ask on the
        # terminal.
        load = transformers.AutoModel.from_pretrained
        return TextEncoder(_from_hub(name, "text.name", lambda **where: load(
            name, dtype=torch.float32, trust_remote_code=False, **where)))
    if encoder_config is None:                # a checkpoint's may have more rows than the tokeniser has words
        encoder_config = {"model_type": "bert"}
        if name:
            try:
                encoder_config = transformers.AutoConfig.from_pretrained(
                    name, local_files_only=True, trust_remote_code=False).to_dict()
            except Exception:
                warnings.warn(f"text.name '{name}' is not on this machine: an untrained BERT takes its place")
        encoder_config |= config["options"] or {}
        known = transformers.AutoConfig.for_model(encoder_config["model_type"]).to_dict().keys()
        unknown = (config["options"] or {}).keys() - known - {"model_type"}
        near = [close for key in unknown for close in difflib.get_close_matches(key, known, 1)]
        require(not unknown, f"text.options: a {encoder_config['model_type']} has no "
                             f"{', '.join(sorted(unknown))}; close: {', '.join(near) or 'none'}")
        encoder_config |= {"vocab_size": vocab_size, "pad_token_id": pad_id}
    try:
        return TextEncoder(transformers.AutoModel.from_config(
            transformers.AutoConfig.for_model(**encoder_config), dtype=torch.float32))
    except Exception as error:
        raise UserError(f"text encoder '{name}' could not be built: {one_line(error)}") from error


# ---- the tokeniser -----------------------------------------------------------------------------------------
def load_tokenizer(name: str | None, captions=None):
    """The fast tokeniser `name`: a local folder, or a name in the hub's cache or on the hub.

    captions: given for a text encoder from scratch; their words are the vocabulary where `name` is None or
    cannot be loaded.
    """
    try:
        require(name is not None, "text.name is not set")
        tokenizer = _load(name, lambda **where: transformers.AutoTokenizer.from_pretrained(
            name, trust_remote_code=False, **where))
        require(isinstance(tokenizer, transformers.PreTrainedTokenizerFast), "it has no fast tokenizer")
    except (OSError, UserError) as error:
        require(captions, f"text.name: no tokenizer ({error}): give a local folder with --set text.name=DIR")
        if name is not None:
            warnings.warn(f"tokenizer {name!r} cannot be loaded: using a vocabulary built from the captions")
        return build_tokenizer(captions)
    if tokenizer.pad_token is None:               # padding is masked everywhere, so any token will do
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token or tokenizer.convert_ids_to_tokens(0)
    return tokenizer


def build_tokenizer(captions):
    """Lower-case words and punctuation; the vocabulary is every word of the captions, frequent ones first."""
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]",
               "mask_token": "[MASK]"}
    normalizer, splitter = normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer()
    counts = Counter(word for text in captions
                     for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text)))
    words = sorted(counts, key=lambda word: (-counts[word], word))
    ids = {word: i for i, word in enumerate([*special.values(), *words])}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, splitter
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[(mark, ids[mark]) for mark in ("[CLS]", "[SEP]")])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def tokenizer_state(tokenizer) -> dict:
    """A tokeniser as plain strings, for a checkpoint that loads with weights_only=True."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state |= {"truncation": None, "padding": None}                # those are of the last call
    special = {key: str(token) for key, token in tokenizer.special_tokens_map.items()
               if isinstance(token, str)}
    return {"tokenizer": json.dumps(state), "special": special}


def tokenizer_from_state(state: dict):
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(state["tokenizer"]), **state["special"])


# ---- the hub -----------------------------------------------------------------------------------------------
def _load(name: str, from_pretrained):
    """from_pretrained(local_files_only=True), from a folder or the cache, else from the hub if it answers.

    OSError with one line where neither works. A folder is never looked for on the hub.
    """
    try:
        return from_pretrained(local_files_only=True)
    except Exception as error:                             # OSError, ValueError, and each library's own types
        if os.path.isdir(name):
            raise OSError(f"the folder '{name}' holds nothing that loads: {one_line(error)}") from error
    if not _hub_answers():
        raise OSError(f"'{name}' is not here and the hub cannot be reached")
    try:
        return from_pretrained(local_files_only=False)
    except Exception as error:
        raise OSError(f"'{name}' is not here and cannot be downloaded: {one_line(error)}") from error


def _from_hub(name: str, key: str, from_pretrained):
    """`_load` with an error that says what to download, where it goes, and which command works without."""
    try:
        return _load(name, from_pretrained)
    except OSError as error:
        advice = "name another" if os.path.isdir(name) else (
            f"download it from https://huggingface.co/{name} and pass the local path with --set {key}=PATH")
        raise UserError(f"{key}: {error}: {advice}; without data or weights, --backbone vit_micro trains on "
                        "built-in scenes") from error


def _hub_answers(timeout: float = 5.0) -> bool:
    """Whether the hub answers within `timeout` seconds. Its own client would retry for much longer."""
    if constants.HF_HUB_OFFLINE:
        return False
    try:
        urllib.request.urlopen(urllib.request.Request(constants.ENDPOINT, method="HEAD"), timeout=timeout)
    except urllib.error.HTTPError:                                # an answer, whatever it says
        return True
    except (OSError, ValueError):
        return False
    return True


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
