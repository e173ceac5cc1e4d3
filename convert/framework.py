"""PyTorch, where a conversion cannot do without it."""

import importlib.util

from mlx_mla.errors import UserError


def require_torch(what: str) -> None:
    """Raise UserError if PyTorch is not installed; to be called before it is imported.

    Args:
        what: What needs it, to begin the message with.
    """
    if importlib.util.find_spec("torch") is None:
        raise UserError(f"{what} needs PyTorch; install it with: pip install torch")
