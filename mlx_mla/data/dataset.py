"""The training and validation data of a run."""

from pathlib import Path

import numpy as np

from mlx_mla.data import corpus
from mlx_mla.data.shards import Shard, open_folder, training_part
from mlx_mla.data.tokenizer import Tokenizer
from mlx_mla.data.windows import TokenWindows
from mlx_mla.model.train_config import TrainConfig


class TrainingData:
    """Training and held-out windows of --data.

    Args:
        config: The resolved settings of the run; `config.data` names a text or a folder of shards.

    Raises:
        UserError: If the data cannot be read, is too short, or does not fit the tokenizer.
    """

    def __init__(self, config: TrainConfig, tokenizer: Tokenizer):
        rows = config.model.vocab_size
        assert rows
        self.source, self.tokenizer = config.data, tokenizer
        self.fast_tokenizer = tokenizer.fast_tokenizer()
        train: np.ndarray | list[Shard]
        val: np.ndarray | list[Shard]
        if Path(config.data).is_dir():
            folder = open_folder(Path(config.data))
            folder.check_tokenizer(tokenizer)
            self.fingerprint, self.samples = folder.fingerprint, folder.samples
            train, val = folder.held_out(config.val_fraction)
        else:
            tokens = corpus.tokenize(corpus.read_documents(config.data), tokenizer)
            self.fingerprint = self.samples = corpus.fingerprint(tokens)
            cut = training_part(len(tokens), config.val_fraction)
            train, val = tokens[:cut], tokens[cut:]
        T = config.context
        self.train = TokenWindows(train, T, config.seed, rows, "the training part of --data")
        self.val = TokenWindows(val, T, config.seed, rows, "the held-out part of --data")
