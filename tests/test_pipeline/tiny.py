"""A study of a few small images, and how to draw them."""

import numpy as np

from stages.inputs.images import decode_image, list_images

ID_SETS = """
name = "tiny"
work = "work"

[backbone]
name = "tf_efficientnet_lite0"
weights = "embedded"
image_size = 32

[cache]
root = "caches"

[[sets]]
name = "train"
role = "id-train"
images = "images/train"

[[sets]]
name = "test"
role = "id-test"
images = "images/test"
"""
STUDY = (
    ID_SETS
    + """
[[sets]]
name = "threes"
role = "near-ood"
images = "images/threes"

[[sets]]
name = "photos"
role = "far-ood"
images = "images/photos.tar"

[train]
experts = 2
epochs = 1

[score]
bootstrap = 100
scores = ["msp", "energy", "knn", "knn+energy"]
"""
)
# The same with experts that train in a moment, on cls alone: for what is not about experts.
ADAPTERS = STUDY.replace("[train]\n", '[train]\nexpert = "adapter"\n')


def by_network(network, study):
    """The text of a study by another network, as `stages.config.BackboneConfig` names it: what is small trains soon."""
    for key, value in {"name": "tf_efficientnet_lite0", "weights": "embedded"}.items():
        assert f'{key} = "{value}"' in study
        study = study.replace(f'{key} = "{value}"', f'{key} = "{getattr(network, key)}"')
    return study


def draw(folder, source, per_class, start=0, nested=True):
    """Write some images of an embedded set as PNG files, in a folder for each class or in one."""
    table = list_images(source)
    reader = table.reader()
    for label, name in enumerate(table.class_names):
        for row in np.flatnonzero(table.labels == label)[start : start + per_class]:
            path = folder / f"digit {name}" if nested else folder
            path.mkdir(parents=True, exist_ok=True)
            decode_image(reader.read(row)).save(path / f"{row:04d}.png")
