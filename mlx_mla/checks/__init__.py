"""What `python -m mlx_mla.doctor --check` runs: one list of rows (`rows.ROWS`), from which
docs/untested-on-apple.md is made too."""
