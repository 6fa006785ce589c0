"""What the outputs of experts' heads stand for, and the targets that they learn from."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Outputs(NamedTuple):
    """Which output of its expert's head stands for each class; "other", where there is one, is a head's last.

    Attributes:
        group: ``[C]`` the expert of each class.
        column: ``[C]`` the output of its head.
        n_outputs: ``[E]`` how many each head has.
        most: of the longest.
    """

    group: Tensor
    column: Tensor
    n_outputs: Tensor
    most: int

    def to(self, device: str | torch.device) -> "Outputs":
        """The same on another device."""
        return Outputs(self.group.to(device), self.column.to(device), self.n_outputs.to(device), self.most)

    def class_targets(self, labels: Tensor, expert: int | Tensor, smoothing: float = 0.0) -> Tensor:
        """Soft targets ``[B, O]`` of an expert's head; a class outside its group is "other".

        Args:
            labels: ``[B]`` classes.
            expert: of all rows; or ``[B]`` of each, O being that of the longest head.
            smoothing: of labels.
        """
        if isinstance(expert, int):
            every = torch.full_like(labels, expert)
            return self.class_targets(labels, every, smoothing)[:, : int(self.n_outputs[expert])]
        n_outputs = self.n_outputs[expert]
        index = torch.where(self.group[labels] == expert, self.column[labels], n_outputs - 1)
        return self.smooth(F.one_hot(index, self.most).float(), expert, smoothing)

    def group_targets(self, targets: Tensor, expert: Tensor) -> Tensor:
        """Targets ``[B, C]`` of rows, each within the group of its ``[B]`` expert, as ``[B, O]`` of that one's head."""
        class_of = self.group.new_full((len(self.n_outputs), self.most), -1)
        class_of = class_of.index_put((self.group, self.column), torch.arange(len(self.group), device=targets.device))[
            expert
        ]
        return targets.gather(1, class_of.clamp(min=0)).where(class_of >= 0, 0)

    def smooth(self, targets: Tensor, expert: Tensor, smoothing: float) -> Tensor:
        """Label smoothing of targets ``[B, O]`` over the outputs that each row's expert has."""
        n_outputs = self.n_outputs[expert][:, None]
        share = (smoothing / n_outputs.double()).to(targets.dtype)
        has = torch.arange(targets.shape[1], device=targets.device) < n_outputs
        return targets * (1 - smoothing) + share.where(has, 0)
