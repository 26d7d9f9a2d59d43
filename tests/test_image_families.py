"""timm's families: a token is a patch in its place, class tokens come first and pixels are normalised as the
model's own were. Whatever cannot have that is refused in one line."""
import pytest
import timm
import torch

import encoders
from data import UserError

SMALL = {"depth": 1, "embed_dim": 96, "num_heads": 3}
STAGES = {"depths": [1, 1, 1, 1]}
MICRO = {"layers": [1, 2, 0, 0], "channels": [32, 96, 96, 96], "stem_width": 16, "output_stride": 8}
FAMILIES = [                        # name, size, options, class tokens, patches of a side, mean of red pixels
    ("vit_tiny_patch16_224.augreg_in21k", 112, {"depth": 1}, 1, 7, 0.5),
    ("deit_tiny_distilled_patch16_224", 64, {"depth": 1}, 2, 4, 0.485),
    ("vit_tiny_patch16_dinov3_qkvb", 64, {"depth": 1}, 5, 4, 0.485),
    ("vit_base_patch16_siglip_224", 64, SMALL, 0, 4, 0.5),
    ("swin_tiny_patch4_window7_224", 224, STAGES | {"embed_dim": 24}, 0, 7, 0.485),
    ("test_mambaout", 160, {}, 0, 5, 0.485),
    ("test_convnext", 160, {}, 0, 5, 0.5),
    ("resnet18", 96, {}, 0, 3, 0.485), ("resnet10t", 64, MICRO, 0, 8, 0.485)]
MORE_FAMILIES = [
    ("vit_tiny_patch16_384", 384, {"depth": 1}, 1, 24, 0.5),
    ("vit_small_patch14_reg4_dinov2", 56, {"depth": 1}, 5, 4, 0.485),
    ("naflexvit_base_patch16_gap", 64, SMALL, 4, 4, 0.5),
    ("beit_base_patch16_224", 64, SMALL, 1, 4, 0.5),
    ("cait_xxs24_224", 64, {}, 1, 4, 0.485),
    ("convit_tiny", 64, {}, 1, 4, 0.485),
    ("xcit_nano_12_p16_224", 64, {}, 1, 4, 0.485),
    ("tnt_s_patch16_224", 64, {}, 1, 4, 0.5),
    ("mvitv2_small_cls", 224, {}, 1, 7, 0.485),
    ("hiera_tiny_224", 224, {}, 0, 7, 0.485),
    ("swinv2_tiny_window8_256", 128, STAGES, 0, 4, 0.485),
    ("sequencer2d_s", 56, {}, 0, 4, 0.485),
    ("twins_pcpvt_small", 128, {}, 0, 4, 0.485),
    ("efficientformer_l1", 224, {}, 0, 7, 0.485),
    ("test_byobnet", 160, {}, 0, 5, 0.485)]


def image_encoder(name, size, options, eval_size=None):
    torch.manual_seed(0)
    config = {"name": name, "size": size, "eval_size": eval_size, "options": options, "weights": None,
              "statistics": "model"}
    return encoders.build_image_encoder(config, pretrained=False).eval()


def slow(rows):
    return [pytest.param(*row, marks=pytest.mark.slow) for row in rows]


@pytest.mark.parametrize("name, size, options, classes, side, red", FAMILIES + slow(MORE_FAMILIES))
def test_the_token_that_moves_most_is_the_patch_that_changes(name, size, options, classes, side, red):
    encoder, patch = image_encoder(name, size, options), size // side
    images = torch.randn(3, size, size).repeat(3, 1, 1, 1)
    images[1, :, :patch, -patch:] += 3                                                   # upper right corner
    images[2, :, -patch:, :patch] += 3                                                   # lower left corner
    with torch.no_grad():
        tokens = encoder(images)
    assert tokens.shape == (3, classes + side ** 2, encoder.width) and encoder.class_tokens == classes
    moved = (tokens[1:] - tokens[0]).norm(dim=-1)[:, classes:].argmax(1)
    assert moved.tolist() == [side - 1, side * (side - 1)]
    assert encoder.statistics[0][0] == red and encoder.statistics[1] == timm.get_pretrained_cfg(name).std


@pytest.mark.parametrize("name, size, other, options, classes, side", [
    ("vit_tiny_patch16_224", 112, 176, {"depth": 1}, 1, 11),
    ("vit_base_patch16_siglip_224", 64, 96, SMALL, 0, 6),
    ("swin_tiny_patch4_window7_224", 224, 320, STAGES | {"embed_dim": 24}, 0, 10),
    ("swinv2_tiny_window8_256", 128, 192, STAGES, 0, 6),
    ("eva02_tiny_patch14_224", 56, 84, {"depth": 1}, 1, 6),
    ("resnet10t", 64, 96, MICRO, 0, 12)])
def test_another_size_in_evaluation_changes_nothing_at_the_own(name, size, other, options, classes, side):
    plain, both = image_encoder(name, size, options), image_encoder(name, size, options, other)
    both.load_state_dict(plain.state_dict())
    images, large = torch.randn(1, 3, size, size), torch.randn(1, 3, other, other).repeat(2, 1, 1, 1)
    large[1, :, :other // side, -(other // side):] += 3                                  # upper right corner
    with torch.no_grad():
        assert torch.equal(plain(images), both(images))
        tokens = both(large)
    assert tokens.shape == (2, classes + side ** 2, plain.width)
    assert (tokens[1] - tokens[0]).norm(dim=-1)[classes:].argmax() == side - 1
    assert {key: x.shape for key, x in both.state_dict().items()} == {
        key: x.shape for key, x in plain.state_dict().items()}


@pytest.mark.parametrize("name, size, said", [
    ("volo_d1_224", 64, "gives no square grid of patches at 64 px: choose"),    # its class token is unsaid
    ("pit_ti_224", 224, "gives no square grid"),
    ("vit_tiny_patch16_dinov3_qkvb", 100, "as image.size .its own size is 256.: .*patch size .16"),
    ("vit_tiny_patch16_224", 100, "last row or column of 100 px: set image.size to a multiple of 16"),
    ("eva02_tiny_patch14_224", 64, "set image.size to a multiple of 14"),
    ("vit_tiny_patch16_224.openai", 224, "no model '.*openai'; close: vit_tiny_patch16_224.augreg_in21k"),
    ("vit_tiny_patch16_22", 224, "close: vit_tiny_patch16_224"),
    ("hf-hub:somebody/resnet18.a1_in1k", 224, "no model .*; close: resnet18.a1_in1k"),
    *slow([("coat_tiny", 64, "gives no square grid"), ("crossvit_tiny_240", 240, "gives no square grid"),
           ("efficientvim_m1", 128, "gives no square grid"), ("inception_v3", 224, "to its own, 299$"),
           ("efficientformer_l1", 256, "256 px as image.size .its own size is 224.: The size of tensor")])])
def test_an_encoder_that_cannot_give_patches_is_refused_in_one_line(name, size, said):
    with pytest.raises(UserError, match=said) as error:
        image_encoder(name, size, {})
    assert "\n" not in str(error.value)


def test_a_hub_name_of_timms_is_the_model():
    encoder = image_encoder("hf-hub:timm/test_resnet.r160_in1k", 64, {})
    assert encoder.timm.pretrained_cfg["tag"] == "r160_in1k"
