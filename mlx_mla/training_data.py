"""What a run trains on, and what it holds out."""

from pathlib import Path

from mlx_mla import corpus
from mlx_mla.config import TrainConfig
from mlx_mla.shards import TokenWindows
from mlx_mla.token_files import Shard, open_folder
from mlx_mla.tokenizer import TextEncoder

import numpy as np


class TrainingData:
    """Training and held-out windows of --data: a text, or a folder of token shards."""

    def __init__(self, config: TrainConfig, encoder: TextEncoder):
        assert config.model.vocab_size
        self.encoder = encoder
        self.tokenizer = encoder.fast_tokenizer()
        train: np.ndarray | list[Shard]
        val: np.ndarray | list[Shard]
        if Path(config.data).is_dir():
            folder = open_folder(Path(config.data))
            folder.check_tokenizer(encoder.name)
            self.fingerprint = folder.fingerprint
            train, val = folder.held_out(config.val_fraction)
        else:
            tokens = corpus.tokenize(corpus.read_documents(config.data), encoder)
            self.fingerprint = corpus.fingerprint(tokens)
            cut = int(len(tokens) * (1 - config.val_fraction))
            train, val = tokens[:cut], tokens[cut:]
        T, vocab = config.context, config.model.vocab_size
        self.train = TokenWindows(train, T, config.seed, vocab, "the training part of --data")
        self.val = TokenWindows(val, T, config.seed, vocab, "the held-out part of --data")
