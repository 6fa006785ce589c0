"""Names of backbones: one for every spelling, known to timm, and the recipe that belongs to it."""

import pytest
import timm
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from stages.config import BackboneConfig
from stages.config.backbone_names import SISTERS, canonical_name
from stages.errors import InputError
from stages.networks.backbone import build_architecture

DINOV2 = "vit_small_patch14_dinov2.lvd142m"
PASTED = [
    DINOV2,
    f"timm/{DINOV2}",
    f"hf-hub:timm/{DINOV2}",
    f"hf_hub:timm/{DINOV2}",
    f"https://huggingface.co/timm/{DINOV2}",
    f"huggingface.co/timm/{DINOV2}/",
    f" hf-hub: timm/{DINOV2}\n",
    "facebook/dinov2-small",
    "Facebook/DINOv2-Small",
    "https://huggingface.co/facebook/dinov2-small",
    "dinov2_vits14",
]


@pytest.mark.parametrize("pasted", PASTED)
def test_every_spelling_is_one_name(pasted):
    assert BackboneConfig(name=pasted) == BackboneConfig(name=DINOV2)


def test_fingerprint_does_not_depend_on_the_spelling():
    """Untrained weights are drawn anew, so all of the spec but their hash."""
    specs = [
        build_architecture(BackboneConfig(name=name, image_size=160)).feature_spec("float16", "none").to_dict()
        | {"weights_sha": ""}
        for name in ("test_vit.r160_in1k", " hf-hub:timm/test_vit.r160_in1k")
    ]
    assert specs[0] == specs[1]


@given(st.sampled_from(PASTED), st.text(" \t\n", max_size=3), st.text(" \t\n", max_size=3))
def test_blanks_and_a_second_time_change_nothing(pasted, before, after):
    assert canonical_name(f"{before}{pasted}{after}") == DINOV2
    assert canonical_name(canonical_name(pasted)) == DINOV2


def test_sisters_are_weights_that_timm_has():
    assert set(SISTERS.values()) <= set(timm.list_pretrained())
    assert canonical_name("facebook/dinov2-with-registers-giant") == "vit_giant_patch14_reg4_dinov2.lvd142m"
    assert canonical_name("facebook/dinov3-vith16plus-pretrain-lvd1689m") == "vit_huge_plus_patch16_dinov3.lvd1689m"
    assert canonical_name("google/siglip2-so400m-patch14-384") == "vit_so400m_patch14_siglip_378.v2_webli"


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("facebook/dinov2-smal", "did you mean facebook/dinov2-small"),
        ("vit_smal_patch14_dinov2", "did you mean vit_small_patch14_dinov2"),
        ("somebody/their-model", "see timm.list_models"),
    ],
)
def test_unknown_name_suggests_the_nearest(name, nearest):
    with pytest.raises(InputError, match=f"backbone.name: timm has no model '{name}': {nearest}") as refusal:
        build_architecture(BackboneConfig(name=name))
    assert len(str(refusal.value)) < 300


@pytest.mark.parametrize(
    ("name", "recipe"),
    [
        ("facebook/dinov2-base", "official"),
        ("vit_giant_patch14_reg4_dinov2", "official"),
        ("vit_small_patch16_dinov3.lvd1689m", "timm"),
        ("tf_efficientnet_lite0", "timm"),
    ],
)
def test_recipe_is_the_authors_where_it_is_known(name, recipe):
    assert BackboneConfig(name=name).recipe == recipe
    assert BackboneConfig(name=name, recipe="timm").recipe == "timm"
    assert BackboneConfig.model_validate(BackboneConfig(name=name).model_dump()) == BackboneConfig(name=name)


def test_recipe_that_nobody_knows_is_refused():
    with pytest.raises(ValidationError, match=r"'official' given, .* resnet18: give 'timm'"):
        BackboneConfig(name="resnet18", recipe="official")
