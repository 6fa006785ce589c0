"""What long work is given beside its task: who listens, where it computes, and which processes take part."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from stages.machine import default_device
from stages.progress import NullProgress, Progress

if TYPE_CHECKING:
    from torch import Tensor, nn

Item = TypeVar("Item")
Result = TypeVar("Result")


class Cluster(Protocol):
    """Other processes that do items of work, on this machine or on many; all see the same folders.

    Items are plans and paths, and so are results: rows travel by the disk.
    """

    def map(self, fn: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """What a function makes of each item, as it is done and in any order; who stops to ask cancels the rest.

        Args:
            fn: of a module, so that another process finds it.
            items: small and picklable; taken as they are needed, and said by ``str`` where one fails.

        Raises:
            StageError: some of the items cannot be done, and all others are; or there is nobody left to do any.
        """
        ...


@dataclass(frozen=True)
class Ranks:
    """This process among those that do one work together; by default it is alone, and nothing here does anything.

    Those that ``torchrun`` has started are `stages.training.distributed.Joined`.
    """

    rank: int = 0
    world: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.rank == 0

    @property
    def share(self) -> slice:
        """Of the rows of a batch, those that this process computes."""
        return slice(self.rank, None, self.world)

    def add(self, values: "Tensor") -> "Tensor":
        """Sum a tensor over all processes, in place."""
        return values

    def add_gradients(self, parameters: "Sequence[nn.Parameter]") -> None:
        """Sum the gradients over all processes."""

    def agree(self, value: Any) -> Any:
        """What rank 0 holds: a plain value; only rank 0's argument counts."""
        return value


@dataclass(frozen=True)
class Context:
    """Where and before whom work is done; its result is the same whatever this is, on a GPU to rounding.

    Attributes:
        progress: told how far the work is; of several processes the first alone is heard.
        device: where networks run: ``"cpu"``, ``"cuda"``, or ``"auto"`` for a GPU where there is one.
        ranks: the processes that do it together.
        cluster: processes that this one hands work to; None: it does all itself, to the same bits.
    """

    progress: Progress = field(default_factory=NullProgress)
    device: str = "auto"
    ranks: Ranks = Ranks()
    cluster: Cluster | None = None

    def __post_init__(self) -> None:
        if not self.ranks.first:
            object.__setattr__(self, "progress", NullProgress())

    @property
    def place(self) -> str:
        """The device, with ``"auto"`` decided."""
        return default_device() if self.device == "auto" else self.device
