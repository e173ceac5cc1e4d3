"""What `python -m mlx_mla.doctor --check` runs: one list of rows (`rows.ROWS`), which is also the
table of docs/untested-on-apple.md."""
