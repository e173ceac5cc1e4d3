"""Read documents from a dataset on the Hugging Face hub."""

from collections.abc import Iterator
from functools import partial
from typing import Any

from mlx_mla.data.blocks import Reading, Source, TextBlock, check_position, grouped, listed
from mlx_mla.errors import UserError, one_line


class HubSource:
    """One file of a dataset that `datasets` streams.

    A position is the dataset's state and the number of rows before it.
    """

    def __init__(self, dataset: Any, name: str, size: float, column: str):
        self.dataset, self.name, self.size, self.column = dataset, name, size, column

    def blocks(self, start: Any, limit: int) -> Iterator[TextBlock]:
        done = 0
        check_position(start, dict, self.name)
        try:
            if start is not None:
                self.dataset.load_state_dict(start["state"])
                done = start["rows"]
            for texts, end in grouped(map(self._text, self.dataset), done, done, limit):
                position = {"rows": end, "state": self.dataset.state_dict()}
                yield TextBlock(partial(list, texts), position, end)
        except UserError:
            raise
        except Exception as e:  # datasets, fsspec and the network raise many types
            raise UserError(
                f"{self.name}: reading failed ({one_line(e)}); run the command again to resume"
            ) from e

    def _text(self, row: dict[str, Any]) -> str | None:
        if self.column not in row or not isinstance(row[self.column], str | None):
            raise UserError(
                f"{self.name}: has no text column {self.column!r}, but {listed(row)}; choose one "
                "with --text-column"
            )
        return row[self.column]


def hub_sources(src: str, reading: Reading) -> list[Source]:
    """The files of a dataset OWNER/NAME:CONFIG; UserError if it cannot be opened."""
    import datasets  # slow to import, and needed only here
    from huggingface_hub import HfApi

    name, _, config = src.partition(":")
    try:
        # The commit becomes part of the sources' names, so a preparation never resumes with other
        # data.
        commit = HfApi().dataset_info(name, revision=reading.revision).sha or ""
        data = datasets.load_dataset(
            name, config or None, split="train", streaming=True, revision=commit or None
        )
        files = data.num_shards
        splits = data.info.splits or {}
        rows = splits["train"].num_examples if "train" in splits else 0
    except Exception as e:  # datasets, fsspec and the network raise many types
        raise UserError(
            f"{src}: no such file or folder, and the dataset could not be opened ({one_line(e)})"
        ) from None
    return [
        HubSource(
            data.shard(files, i), f"{src}@{commit}#{i:05d}", (rows or 0) / files, reading.column
        )
        for i in range(files)
    ]
