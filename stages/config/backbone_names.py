"""Names of backbones as people paste them, made one; and which of them have a recipe of their authors'.

Light, since an experiment file is checked with it: neither torch nor timm is imported.
"""

import re

# Of DINOv2 alone it is written here what its authors do to an image and to position embeddings.
_OFFICIAL = re.compile(r"vit_(small|base|large|giant)_patch14(_reg4)?_dinov2(\..+)?")
_PREFIX = re.compile(r"(https?://)?(www\.)?(huggingface\.co|hf\.co)/|hf[-_]hub:", re.IGNORECASE)

_SIZES = {"small": "s", "base": "b", "large": "l", "giant": "g"}


def _sisters() -> dict[str, str]:
    """Timm's name by that of the same weights elsewhere: in Hugging Face's repositories, and with torch.hub."""
    known: dict[str, str] = {}
    for size, letter in _SIZES.items():
        for registers, elsewhere, hub in (("", "dinov2", ""), ("_reg4", "dinov2-with-registers", "_reg")):
            name = f"vit_{size}_patch14{registers}_dinov2.lvd142m"
            known |= {f"facebook/{elsewhere}-{size}": name, f"dinov2_vit{letter}14{hub}": name}
    dinov3 = {"s": "small", "splus": "small_plus", "b": "base", "l": "large", "hplus": "huge_plus", "7b": "7b"}
    for short, size in dinov3.items():
        elsewhere = short.replace("plus", "16plus") if "plus" in short else f"{short}16"
        for data in ("lvd1689m", "sat493m") if short in ("l", "7b") else ("lvd1689m",):
            name = f"vit_{size}_patch16_dinov3.{data}"
            known |= {f"facebook/dinov3-vit{elsewhere}-pretrain-{data}": name}
        known |= {f"dinov3_vit{elsewhere}": f"vit_{size}_patch16_dinov3.lvd1689m"}
    for shape in ("base-patch16-224", "base-patch32-224", "large-patch16-224", "large-patch32-224", "huge-patch14-224"):
        known |= {f"google/vit-{shape}-in21k": f"vit_{shape.replace('-', '_')}.orig_in21k"}
    for shape in ("base-patch16-224", "base-patch16-384", "large-patch32-384"):
        known |= {f"google/vit-{shape}": f"vit_{shape.replace('-', '_')}.orig_in21k_ft_in1k"}
    siglip = {
        "siglip": ("base-patch16-224", "base-patch16-256", "base-patch16-384", "base-patch16-512", "large-patch16-256",
                   "large-patch16-384", "so400m-patch14-224", "so400m-patch14-384"),
        "siglip2": ("base-patch16-224", "base-patch16-256", "base-patch16-384", "base-patch16-512", "base-patch32-256",
                    "large-patch16-256", "large-patch16-384", "large-patch16-512", "so400m-patch14-224",
                    "so400m-patch14-384", "so400m-patch16-256", "so400m-patch16-384", "so400m-patch16-512",
                    "giant-opt-patch16-256", "giant-opt-patch16-384"),
    }  # fmt: skip
    for family, shapes in siglip.items():
        tag = "webli" if family == "siglip" else "v2_webli"
        for shape in shapes:
            size, patch, pixels = shape.replace("giant-opt", "giantopt").split("-")
            if (family, shape) == ("siglip2", "so400m-patch14-384"):
                pixels = "378"  # 27 patches of 14 pixels, under either name
            known |= {f"google/{family}-{shape}": f"vit_{size}_{patch}_siglip_{pixels}.{tag}"}
    return known


SISTERS = _sisters()


def canonical_name(text: str) -> str:
    """The one name of a backbone, however it was pasted.

    >>> canonical_name(" hf-hub:timm/vit_small_patch14_dinov2.lvd142m ")
    'vit_small_patch14_dinov2.lvd142m'
    >>> canonical_name("facebook/dinov2-small")
    'vit_small_patch14_dinov2.lvd142m'
    """
    name = _PREFIX.sub("", text.strip(), count=1).strip().strip("/")
    if name.lower().startswith("timm/"):
        name = name[len("timm/") :].strip()
    return SISTERS.get(name.lower(), name)


def has_official_recipe(name: str) -> bool:
    """Whether the authors' way from an image and stored position embeddings to features is known for a model.

    >>> has_official_recipe("vit_base_patch14_reg4_dinov2.lvd142m"), has_official_recipe("vit_base_patch16_224")
    (True, False)
    """
    return _OFFICIAL.fullmatch(name) is not None
