"""What every backend shares: the constants of the formula, the argument checks, the release's column averages."""

from typing import Literal, get_args

from torch import Tensor

Normalization = Literal["none", "trace"]
#: Of the Rényi entropy; 1 is the von Neumann entropy.
Order = Literal[1, 2]

#: Eigenvalues below this are raised to it, as in the released code: log stays finite.
EIGENVALUE_FLOOR = 1e-10

#: The released code averages neighbouring columns until this many are left.
RELEASE_COLUMNS = 128


def check_arguments(x: Tensor, *, normalization: str, column_groups: bool, order: int = 1) -> None:
    """Refuse what has no entropy. Only types and shapes are read, so a GPU is never waited for.

    Raises:
        TypeError: ``x`` is not a tensor of real floating numbers.
        ValueError: Any other bad argument; the message says which and why.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a torch.Tensor, got {type(x).__name__}")
    if not x.is_floating_point():
        raise TypeError(f"x must hold real floating numbers, got {x.dtype}")
    if x.ndim < 2:
        raise ValueError(f"x must have shape (..., h, d), got {tuple(x.shape)}")
    h, d = x.shape[-2:]
    if h < 2:
        raise ValueError(f"h must be at least 2 heads, got {h}: H is divided by log h, and log 1 = 0")
    if d < 1:
        raise ValueError(f"d must be at least 1 column, got {d}")
    if column_groups and d % RELEASE_COLUMNS:
        raise ValueError(f"column_groups needs d to be a multiple of {RELEASE_COLUMNS}, got d = {d}")
    if normalization not in get_args(Normalization):
        raise ValueError(f"normalization must be one of {get_args(Normalization)}, got {normalization!r}")
    if order not in get_args(Order):
        raise ValueError(f"order must be one of {get_args(Order)}, got {order!r}")


def average_column_groups(x: Tensor) -> Tensor:
    """(..., h, 128 g) -> (..., h, 128): the mean of each group of g neighbouring columns."""
    return x.unflatten(-1, (RELEASE_COLUMNS, -1)).mean(dim=-1)
