"""The encoders and the tokeniser: from the hub, its cache, a local path, or from scratch.

Any timm model whose features are a grid of patches and any Hugging Face text encoder will do. Nothing that is
read can execute code, and nothing hangs where there is no network.
"""
import bisect
import contextlib
import copy
import difflib
import json
import math
import os
import urllib.error
import urllib.request
import warnings

import huggingface_hub
import timm
import torch
import torch.nn.functional as F
import transformers
from huggingface_hub import constants
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor, nn

from data import UserError, require

JOINT = "clip", "siglip"                        # transformers' model types that TextEncoder pools as they do


# ---- images ------------------------------------------------------------------------------------------------
class ImageEncoder(nn.Module):
    """A timm model as a function: images (B, 3, H, W) -> tokens (B, C + G*G, width), C class tokens first.

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

    def projection(self) -> nn.Module:
        """A copy of what takes tokens to a space shared with texts. UserError unless as in CLIP or SigLIP."""
        pool, head, norm = (getattr(self.timm, part, None) for part in ("attn_pool", "head", "fc_norm"))
        kind = nn.Linear if pool is None else nn.Identity                  # CLIP's, SigLIP's
        require(isinstance(head, kind) and isinstance(norm, (nn.Identity, type(None))),
                "model.joint: the image encoder has no projection into a space shared with texts")
        return copy.deepcopy(head) if pool is None else EachAlone(copy.deepcopy(pool))


class EachAlone(nn.Module):
    """Applies SigLIP's pooling head to every token as if it were alone: (B, L, width) -> (B, L, d)."""

    def __init__(self, pool: nn.Module):
        super().__init__()
        self.pool = pool

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.pool.proj(self.pool.kv(tokens).chunk(2, -1)[1])       # over one token, the softmax is 1
        return x + self.pool.mlp(self.pool.norm(x))


def build_image_encoder(config: dict, pretrained: bool, tried=False, joint=False) -> ImageEncoder:
    """The encoder of the configuration's `image` block. UserError for a model that timm does not know or
    cannot build and, unless that was tried before, for one whose features are no patches."""
    sizes = {key: config[key] for key in ("size", "eval_size") if config.get(key) is not None}
    name = config["name"].removeprefix("hf-hub:").removeprefix("timm/")
    tagged = timm.list_models(f"{name.split('/')[-1].split('.')[0]}.*", include_tags=True)
    if not timm.is_model(name) or "." in name and name not in tagged:
        near = difflib.get_close_matches(name, tagged or timm.list_models(), 5, 0.3)
        raise UserError(f"image.name: timm has no model '{name}'; close: {', '.join(near) or 'none'}")
    options = ({} if joint else {"num_classes": 0}) | (config["options"] or {})
    files = {"pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path"} & options.keys()
    # Older versions of timm would execute what is in such a file.
    require(not files, f"image.options takes no {', '.join(files)}: set image.weights")
    try:
        model, options = _sized_model(name, options, *sizes.values())
        if not tried:
            for key, size in sizes.items():
                _try_images(model, name, key, size)
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
        raise UserError(f"image encoder '{name}' cannot be built: {one_line(error)}") from error
    statistics = IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
    if config["statistics"] == "model":
        statistics = tuple(model.pretrained_cfg["mean"]), tuple(model.pretrained_cfg["std"])
    return ImageEncoder(model, statistics)


def _sized_model(name: str, options: dict, size: int, *others: int) -> tuple[nn.Module, dict]:
    """-> a timm model with weights for images of `size` that takes the others too, and its options."""
    several = [{"img_size": size, "dynamic_img_size": True}] if {*others} - {size} else []
    for sized in [*several, {"img_size": size}, {}]:
        try:
            return timm.create_model(name, **(sized | options)), sized | options
        except TypeError as error:                              # CNNs take any size and have no such argument
            if "img_size" not in str(error) or not sized:
                raise


@torch.no_grad()
def _try_images(model: nn.Module, name: str, key: str, size: int):
    """UserError unless tokens are a square grid of patches that sees the image to its last row and column."""
    encoder, own = ImageEncoder(copy.deepcopy(model).eval(), ()), model.pretrained_cfg["input_size"][-1]
    for part, weight in encoder.named_parameters():   # a bias can drown pixels, a weight of 0 would hide them
        if "bias" in part or weight.abs().max() < 0.01:
            weight.fill_(0.0 if "bias" in part else 0.1)
    images = torch.rand(3, size, size, generator=torch.Generator().manual_seed(0)).repeat(3, 1, 1, 1)
    images[1, :, -1] -= 1
    images[2, :, :, -1] -= 1
    try:
        tokens, *moved = [encoder(image[None]) for image in images]            # alone: the same rounding
    except Exception as error:
        raise UserError(f"image encoder '{name}' cannot encode {size} px as image.{key} (its own size is "
                        f"{own}): {one_line(error)}") from error
    shape = tokens.shape if isinstance(tokens, Tensor) and tokens.ndim == 3 else (0, 0, 0)
    patches = shape[1] - encoder.class_tokens
    require(patches > 1 and math.isqrt(patches) ** 2 == patches and shape[2] == encoder.width,
            f"image encoder '{name}' gives no square grid of patches at {size} px: choose another image.name "
            f"or image.{key}")
    stride = model.feature_info[-1]["reduction"]
    advice = f"a multiple of {stride}" if size % stride else f"its own, {own}"
    require(not any(torch.equal(tokens, other) for other in moved),
            f"'{name}' ignores the last row or column of {size} px: set image.{key} to {advice}")


def _timm_weights(name: str, cfg: dict) -> str:
    """The cached or downloaded weight file of a timm model."""
    hub_name = cfg.get("hf_hub_id")
    require(hub_name, f"image.name: timm has no pretrained weights for '{name}'; set image.pretrained=false")
    return _from_hub(hub_name, "image.weights", lambda **where: huggingface_hub.hf_hub_download(
        hub_name, cfg.get("hf_hub_filename") or "model.safetensors", **where))


# ---- text --------------------------------------------------------------------------------------------------
class TextEncoder(nn.Module):
    """The text part of a transformers model: token ids (B, M), valid (B, M), False on padding -> words in
    context (B, M, width), their embeddings (B, M, embedding_width), and, if `joint`, captions in a space
    shared with images (B, d), else (B, 0). config: the whole model's, to build it again. CLIP's projection
    into that space is `head`; SigLIP's is a part of the model, which reads a caption's padding too."""

    def __init__(self, model: nn.Module, width: int, config: dict, pad_id: int, joint: bool = False,
                 head: nn.Module | None = None):
        super().__init__()
        self.hugging, self.width, self.config, self.pad_id = model, width, config, pad_id
        self.joint, self.head = joint, head
        self.embedding_width = model.get_input_embeddings().embedding_dim

    def forward(self, ids: Tensor, valid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        length = ids.shape[1]
        if self.joint and self.head is None:                    # SigLIP: padded as its processor pads
            longer = 0, self.hugging.config.max_position_embeddings - length
            padded = F.pad(ids, longer, value=self.pad_id)
            hidden, pooled = self._states(padded, torch.ones_like(padded))
        elif ids.device.type == "cpu" and len(ids) >= 8:
            # A CPU gains nothing from one large call: four parts of similar length hardly have any padding.
            lengths, parts = valid.sum(1), []
            order = lengths.argsort(stable=True)
            for rows in order.chunk(4):
                longest = int(lengths[rows].max())
                hidden, pooled = self._states(ids[rows, :longest], valid[rows, :longest])
                parts.append((F.pad(hidden, (0, 0, 0, length - longest)), pooled))
            hidden, pooled = (torch.cat(x)[order.argsort()] for x in zip(*parts))
        else:
            hidden, pooled = self._states(ids, valid)
        return hidden[:, :length], self.hugging.get_input_embeddings()(ids), pooled

    def _states(self, ids: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        output = self.hugging(input_ids=ids, attention_mask=valid.long())
        hidden = output.last_hidden_state
        pooled = output.pooler_output if self.joint else hidden.new_zeros(len(ids), 0)
        return hidden, self.head(pooled) if self.head else pooled

    def projection(self) -> nn.Module:
        """A copy of what takes its tokens to that space."""
        return copy.deepcopy(self.head or self.hugging.head)


def build_text_encoder(config: dict, pretrained: bool, vocab_size: int, pad_id: int,
                       encoder_config: dict | None = None, joint: bool = False) -> TextEncoder:
    """The encoder of the configuration's `text` block. `name` is a hub name or a local folder.

    An untrained one is a BERT, or the model_type of `options`, with `options` and the tokeniser's vocabulary;
    or it takes its shape from a checkpoint's encoder_config. UserError if the encoder will not do.
    """
    name, lost = config["name"], ()
    if pretrained:
        require(name, "text.pretrained is true but text.name is empty: name a hub model or a local folder")
        model, lost = _from_hub(name, "text.name", lambda **where: _pretrained_model(name, **where))
    try:
        if not pretrained:
            shape = encoder_config or _untrained_config(config["options"] or {}, vocab_size, pad_id)
            require("attn_implementation" not in str(shape), "its attention would be fetched from the hub")
            shape = transformers.AutoConfig.for_model(**shape)
            model = transformers.AutoModel.from_config(shape, dtype=torch.float32)
        part = _text_part(model).float()
        require(not joint or model.config.model_type in JOINT, f"model.joint: text encoder '{name}' is a "
                f"{model.config.model_type}, must be one of {', '.join(JOINT)}")
        head = getattr(model, "text_projection", None) if joint else None
        rows = part.get_input_embeddings().num_embeddings
        own = {*part.parameters(), *(head or part).parameters()}
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"text encoder '{name}' could not be built: {one_line(error)}") from error
    lost = [key for key in lost if model.get_parameter(key) in own and "pooler" not in key]
    require(not lost, f"text.name: '{name}' has no weights for {', '.join(lost[:2])}: name another")
    require(rows >= vocab_size, f"text.name: the tokenizer needs {vocab_size} rows of embeddings, '{name}' "
            f"has {rows}: use its own tokenizer, or model.resize_token_embeddings({vocab_size}) and save it")
    width = _try_captions(part, config["max_length"], pad_id)
    return TextEncoder(part, width, model.config.to_dict(), pad_id, joint, head)


def _untrained_config(options: dict, vocab_size: int, pad_id: int) -> dict:
    kind = options.get("model_type", "bert")
    known = transformers.AutoConfig.for_model(kind).to_dict().keys()
    unknown = sorted(options.keys() - known)
    near = [close for key in unknown for close in difflib.get_close_matches(key, known, 1)]
    require(not unknown, f"text.options: a {kind} has no {', '.join(unknown)}; "
                         f"close: {', '.join(near) or 'none'}")
    return {"model_type": kind} | options | {"vocab_size": vocab_size, "pad_token_id": pad_id}


def _pretrained_model(name: str, **where) -> tuple[nn.Module, list]:
    """-> a transformers model, the names of its learnt weights that were not in the file."""
    # float32, because transformers keeps the stored type; no remote code, or a folder could ask on the
    # terminal.
    model, report = transformers.AutoModel.from_pretrained(
        name, dtype=torch.float32, trust_remote_code=False, output_loading_info=True, **where)
    with torch.device("meta"):                        # as built, before loading makes sinusoids learnt
        built = transformers.AutoModel.from_config(model.config).named_parameters(remove_duplicate=False)
    return model, [key for key, weight in built if key in report["missing_keys"] and weight.requires_grad]


def _text_part(model: nn.Module) -> nn.Module:
    """What encodes text in a transformers model: its text tower, the encoder before its decoder, or all."""
    text = getattr(model.config, "text_config", None)
    if text is not None:                                         # base_model: without a language model's head
        model = next(part for part in model.modules() if getattr(part, "config", None) is text).base_model
    encoder = model.get_encoder()                                # BERT's are layers, without embeddings
    if isinstance(encoder, transformers.PreTrainedModel):
        return encoder
    require(not model.config.is_encoder_decoder, "its encoder does not work without its decoder")
    return model


@torch.no_grad()
def _try_captions(model: nn.Module, length: int, pad_id: int) -> int:
    """-> the width of the states. UserError unless `length` tokens get one each, whatever padding follows."""
    word = min({0, 1, 2} - {pad_id, model.get_input_embeddings().padding_idx})   # RoBERTa counts no padding

    def states(words: int, padding: int = 0) -> Tensor | str:                    # or what is wrong
        ids = torch.tensor([[word] * words + [pad_id] * padding])
        try:
            mask = torch.arange(words + padding)[None] < words
            return model.eval()(input_ids=ids, attention_mask=mask.long()).last_hidden_state[:, :words]
        except Exception as error:
            return one_line(error)

    kind, whole = f"text encoder {type(model).__name__}", states(length)
    if isinstance(whole, str):
        longest = bisect.bisect_left(range(1, length), True, key=lambda words: isinstance(states(words), str))
        raise UserError(f"text.max_length is {length}; {kind} takes at most {longest} tokens ({whole:.60}): "
                        "lower it or choose another encoder")
    require(whole.shape[:-1] == (1, length) and whole.isfinite().all(),
            f"{kind} does not give each token a finite state: choose another text.name")
    alone, padded = states(length - length // 2), states(length - length // 2, length // 2)
    require((padded - alone).abs().max() <= 1e-4 * alone.abs().max(),
            f"{kind} reads padding as if it were words: choose another text.name")
    return whole.shape[-1]


# ---- the tokeniser -----------------------------------------------------------------------------------------
def load_tokenizer(name: str | None, captions=None):
    """The fast tokeniser `name`, a local folder or a hub name. captions: given for a text encoder from
    scratch; where there is none of that name, their words are the vocabulary."""
    try:
        require(name is not None, "text.name is not set")
        tokenizer = _load(name, lambda **where: _fast_tokenizer(name, **where))
    except (OSError, UserError) as error:
        require(captions, f"text.name: no tokenizer: {error}: give another with --set text.name=DIR")
        if name is not None:
            warnings.warn(f"tokenizer '{name}' cannot be loaded: the captions' words are the vocabulary")
        return build_tokenizer(captions)
    if tokenizer.pad_token_id is None:            # padding is masked everywhere, so any token will do
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token or min(tokenizer.get_vocab())
    return tokenizer


def _fast_tokenizer(name: str, **where):
    """AutoTokenizer's or, where that is a slow one or none, that of tokenizer.json."""
    for kind in (transformers.AutoTokenizer, transformers.PreTrainedTokenizerFast):
        with contextlib.suppress(Exception):
            tokenizer = kind.from_pretrained(name, trust_remote_code=False, **where)
            fast = isinstance(tokenizer, transformers.PreTrainedTokenizerFast)
            if fast and len(tokenizer) > len(tokenizer.added_tokens_decoder) + 1:    # without files, empty
                return tokenizer
    raise OSError("no readable tokenizer.json (from spiece.model alone, transformers makes one where "
                  "sentencepiece and protobuf are installed)")


def rows_needed(tokenizer) -> int:
    """How many rows of embeddings a tokeniser's ids ask for: they may have gaps."""
    return 1 + max(tokenizer.get_vocab().values())


def build_tokenizer(captions):
    """Lower-case words and punctuation; the vocabulary is every word of the captions, frequent ones first."""
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]",
               "mask_token": "[MASK]"}
    tokenizer = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.train_from_iterator(captions, trainers.WordLevelTrainer(
        vocab_size=10 ** 9, special_tokens=[*special.values()], show_progress=False))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def tokenizer_state(tokenizer) -> dict:
    """A tokeniser as plain strings, for a checkpoint that loads with weights_only=True."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state |= {"truncation": None, "padding": None}                # those are of the last call
    special = {key: str(token) for key, token in tokenizer.special_tokens_map.items()
               if isinstance(token, str)}
    return {"tokenizer": json.dumps(state), "special": special}


def tokenizer_from_state(state: dict):
    try:
        backend = Tokenizer.from_str(state["tokenizer"])
        tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend)
        for role, token in state["special"].items():  # the constructor would make a word that pads special
            setattr(tokenizer, role, token)
        return tokenizer
    except Exception as error:
        raise UserError(f"the checkpoint's tokenizer is damaged ({one_line(error)}): train again") from None


# ---- the hub -----------------------------------------------------------------------------------------------
def _load(name: str, from_pretrained):
    """from_pretrained(local_files_only=True), from a folder or the cache, else from the hub if it answers.
    OSError with one line where neither works. A folder is never looked for on the hub."""
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
    except (OSError, ValueError) as error:
        return isinstance(error, urllib.error.HTTPError)          # an answer, whatever it says
    return True


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
