"""A whole study of N training rows as given arrays, by the command line: what each stage took."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.bench.scale.drawn import DrawnStudy

# All but those that want a matrix for each class (`gmm`), look at all pairs of rows (`nnguide`, `relation`), or draw
# thousands of random features.
SCORES = (
    *("knn", "knn-mean", "msp", "energy", "max-logit", "entropy", "gen", "temperature-scaling", "kl-matching", "react"),
    *("ash-s", "scale", "vra", "dice", "gradnorm", "mahalanobis", "mahalanobis-pp", "relative-mahalanobis", "ssd"),
    *("wdiscood", "vmf", "cosine", "ncm", "vim", "residual", "neco", "cop", "kpca-nystrom", "she", "fdbd"),
    *("knn+energy", "ncm+energy"),
)
ROLES = {"train": "id-train", "val": "id-val", "test": "id-test", "ood-0": "near-ood"}


def run_study(study: DrawnStudy) -> dict[str, dict[str, Any]]:
    """Run what is not fresh; of each stage seconds and the most memory, as the study's record has them."""
    sets = "".join(
        f'[[sets]]\nname = "{name}"\nrole = "{ROLES.get(name, "far-ood")}"\n'
        f'features = "arrays/{name}"\norigin = "drawn"\n\n'
        for name in study.caches
    )
    path = study.folder / "study.toml"
    path.write_text(f'name = "scale"\nwork = "work"\n\n{sets}[score]\nscores = {json.dumps(SCORES)}\n', "utf-8")
    subprocess.run([sys.executable, "-m", "pipeline", "run", str(path)], stdout=subprocess.DEVNULL, check=True)
    stages: dict[str, dict[str, Any]] = json.loads(Path(study.folder / "work" / "record.json").read_text("utf-8"))[
        "stages"
    ]
    return stages
