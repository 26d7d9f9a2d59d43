"""Would better masks pay? Trains on the built-in scenes with perfect masks in the place of the learned ones, and evaluates.

    python tests/perfect_masks.py --masks text --seed 0

text: 1 on every word but those of grammar, which have 0 as punctuation has (grounding.of_grammar); image: the share of each
patch that objects cover, told by their colour, as the ground is grey to brown. All else is as in
`train_grm.py --config configs.yaml --backbone vit_micro`, with whose figures those printed here compare. RESULTS.md has them.
Interrupted and repeated, the command goes on from there.
"""
import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import nn  # noqa: E402

import data  # noqa: E402
import eval_grm  # noqa: E402
import grounding  # noqa: E402
import modules  # noqa: E402
import train_grm  # noqa: E402

PATCH = 8           # pixels, of vit_micro
COLOURFUL = 60      # largest less smallest of red, green and blue, of 255; the ground has up to 44, objects 115 and more


class Given(nn.Module):
    """An adapter whose mask (B, L) was put there before; 0 where invalid."""
    mask = None

    def forward(self, tokens, valid=None):
        return self.mask if valid is None else self.mask * valid


class PerfectMasks(modules.GRM):
    masks = ()          # "image", "text"
    is_content = None   # (vocabulary,) 1 or 0

    def __init__(self, *args, **settings):
        super().__init__(*args, **settings)
        for name in self.masks:
            setattr(self, f"{name}_adapter", Given())

    def encode_image(self, images):
        if "image" in self.masks:
            self.image_adapter.mask = covered(images)
        return super().encode_image(images)

    def encode_text(self, ids, valid):
        if "text" in self.masks:
            self.text_adapter.mask = self.is_content.to(ids.device)[ids]
        return super().encode_text(ids, valid)


def covered(images):
    """(B, L) the share of each patch that objects cover, from images (B, 3, H, W) normalised for vit_micro."""
    mean, std = (images.new_tensor(values)[:, None, None] for values in modules.image_statistics("resnet10t"))
    colours = 255 * (images * std + mean)
    on_object = (colours.amax(1) - colours.amin(1) > COLOURFUL).to(images.dtype)
    return F.avg_pool2d(on_object[:, None], PATCH).flatten(1)


def noting_words(load):
    """`load`, which returns a tokenizer, with PerfectMasks told which words of its vocabulary are not of grammar."""
    def loaded(*arguments):
        tokenizer = load(*arguments)
        PerfectMasks.is_content = torch.zeros(len(tokenizer))
        for word, index in tokenizer.get_vocab().items():
            PerfectMasks.is_content[index] = not grounding.of_grammar(word)
        return tokenizer
    return loaded


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--masks", nargs="+", required=True, choices=("image", "text"), help="which masks are perfect")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", metavar="DIR", help="run folder (default: runs/perfect-<masks>/seed<seed>)")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="settings, as train.max_steps=1200")
    args = parser.parse_args()
    out = args.out or f"runs/perfect-{'-'.join(args.masks)}/seed{args.seed}"
    PerfectMasks.masks, modules.GRM = tuple(args.masks), PerfectMasks
    data.load_tokenizer, data.tokenizer_from_state = map(noting_words, (data.load_tokenizer, data.tokenizer_from_state))
    sys.argv = ["train_grm.py", "--config", str(ROOT / "configs.yaml"), "--backbone", "vit_micro", "--out", out,
                *["--resume"] * (Path(out) / "last.pt").exists(), "--set", f"train.seed={args.seed}", *args.set]
    train_grm.main()
    sys.argv = ["eval_grm.py", "--ckpt", f"{out}/best.pt", "--split", "shapes", "--grounding", "--out", f"{out}/test"]
    eval_grm.main()


if __name__ == "__main__":
    main()
