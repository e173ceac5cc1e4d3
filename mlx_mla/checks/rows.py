"""The list of what is checked, in the order in which it runs: what takes least comes first.

docs/untested-on-apple.md is made from it.
"""

from mlx_mla.checks import metal, models, programs, training  # noqa: F401  (each adds its rows)
from mlx_mla.checks.row import FOUND, Row

ROWS: tuple[Row, ...] = tuple(sorted(FOUND, key=lambda row: row.minutes))
