"""What a text does to a model: moments of every attention layer's input, and perplexity; both
stream."""

import codecs
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from transformers import PreTrainedTokenizerFast

from mlx_mla.backends.torch.loss import head_loss, hidden_states
from mlx_mla.data.corpus import BUILTIN, other_than_text, read_documents
from mlx_mla.data.shards import training_part
from mlx_mla.data.tokenizer import encode
from mlx_mla.errors import UserError
from mlx_mla.model.model_torch import MLAGPT2LMHeadModel

from .latent import Moments

HELD_OUT = 0.1
"""Share of the text, at its end, that is not calibrated on."""
BLOCK = 1 << 20
"""Bytes of text that are read and tokenized at a time."""
BATCH_TOKENS = 2048
LOSS_CHUNK = 256
"""Tokens whose logits are in memory at a time."""


class Text:
    """A text as batches of token ids, read piece by piece.

    Args:
        source: A UTF-8 file, or "builtin".
        tokenizer: The model's.
        context: Longest sequence.

    Raises:
        UserError: If there is no such file, or it is empty or (when that is read) not UTF-8.
    """

    def __init__(self, source: str, tokenizer: PreTrainedTokenizerFast, context: int):
        self.source, self.tokenizer, self.context = source, tokenizer, context
        self.name = source if source == BUILTIN else Path(source).name
        self._builtin = "\n".join(read_documents(BUILTIN)).encode() if source == BUILTIN else None
        try:
            self._size = (
                len(self._builtin) if self._builtin is not None else Path(source).stat().st_size
            )
            if self._builtin is None:
                with Path(source).open("rb") as f:
                    kind = other_than_text(Path(source), f.read(BLOCK))
                if kind is not None:
                    raise UserError(
                        f"--calibration {source}: is {kind}, not text; give a UTF-8 text file"
                    )
        except OSError as e:
            raise UserError(f"--calibration {source}: cannot be read: {e.strerror}") from None

    def calibration(self, max_tokens: int) -> Iterator[np.ndarray]:
        """Batches (B, T + 1) of the first part of the text; windows overlap by the one token that
        is only a target."""
        return self._batches(0, training_part(self._size, HELD_OUT), max_tokens)

    def windows(self, max_tokens: int) -> np.ndarray:
        """The windows of `calibration`, (N, T), without their last targets."""
        return np.concatenate([batch[:, :-1] for batch in self.calibration(max_tokens)])

    def held_out(self, max_tokens: int) -> Iterator[np.ndarray]:
        """The same of the last part."""
        return self._batches(training_part(self._size, HELD_OUT), self._size, max_tokens)

    def _batches(self, start: int, stop: int, max_tokens: int) -> Iterator[np.ndarray]:
        T = self.context
        rows = max(1, BATCH_TOKENS // T)
        eos = self.tokenizer.eos_token_id
        buffer, given = [] if eos is None else [eos], 0
        for text in self._blocks(start, stop):
            buffer += encode(self.tokenizer, text)
            while len(buffer) > rows * T:
                yield _windows(buffer, rows, T)
                given += rows * T
                if max_tokens and given >= max_tokens:
                    return
                del buffer[: rows * T]
        if len(buffer) > T:
            yield _windows(buffer, (len(buffer) - 1) // T, T)
        elif not given and start and len(buffer) > 2:  # the held-out part may be shorter
            yield np.array([buffer])
        elif not given:
            use, window = ("hold out", 2) if start else ("calibrate on", T)
            raise UserError(
                f"--calibration {self.source}: has {len(buffer)} tokens to {use}, fewer than a "
                f"window of {window + 1}; give a longer text"
            )

    def _blocks(self, start: int, stop: int) -> Iterator[str]:
        decoder = codecs.getincrementaldecoder("utf-8")()
        at = start
        while at < stop:
            block = self._read(at, min(BLOCK, stop - at))
            if not block:
                break
            if at == start and start:
                # The part may begin within a character, whose other bytes belong to the part
                # before.
                block = block.lstrip(bytes(range(0x80, 0xC0)))
            at = min(at + BLOCK, stop)
            try:
                yield decoder.decode(block)
            except UnicodeDecodeError:
                raise UserError(
                    f"--calibration {self.source}: not UTF-8 text; convert it with iconv"
                ) from None

    def _read(self, at: int, size: int) -> bytes:
        if self._builtin is not None:
            return self._builtin[at : at + size]
        with Path(self.source).open("rb") as f:
            f.seek(at)
            return f.read(size)


def _windows(buffer: list[int], rows: int, T: int) -> np.ndarray:
    return np.stack([np.array(buffer[i * T : (i + 1) * T + 1]) for i in range(rows)])


def collect_moments(
    model: MLAGPT2LMHeadModel, text: Text, max_tokens: int, gradients: bool, console: Console
) -> tuple[list[Moments], int]:
    """Moments of the input of every attention layer, and the number of tokens they come from.

    Memory beside the model is O(n_embd^2) a layer, whatever the length of the text.

    Args:
        model: Multi-head attention.
        max_tokens: About how many tokens of the text to take, from its beginning. 0: all.
        gradients: Also take the second moment of the loss's gradient at keys and values, three
            times the cost; for GPT-2's attention.
    """
    layers = [_Collector(block.attn.c_attn, gradients) for block in model.transformer.h]
    tokens = 0
    model.requires_grad_(False)
    vocabulary = len(text.tokenizer)
    try:
        with (
            Progress(console=console, disable=not console.is_terminal, transient=True) as bar,
            torch.set_grad_enabled(gradients),
        ):
            task = bar.add_task("calibrating", total=max_tokens or None)
            for batch in text.calibration(max_tokens):
                x, targets = _tensors(batch, model)
                if gradients:
                    _loss(model, x, targets, vocabulary).backward()
                    for layer in layers:
                        layer.take_gradient()
                else:
                    model.transformer(x)
                tokens += x.numel()
                bar.update(task, completed=tokens)
    finally:
        for layer in layers:
            layer.handle.remove()
    return [layer.moments(tokens) for layer in layers], tokens


class _Collector:
    """Sums over the tokens that one layer sees; in float64, of products in float32."""

    def __init__(self, c_attn: torch.nn.Module, gradients: bool):
        self.gradients = gradients
        self.shift: torch.Tensor | None = None
        self.sum: np.ndarray | float = 0.0
        self.products: np.ndarray | float = 0.0
        self.gradient_products: np.ndarray | float = 0.0
        self.probe: torch.Tensor | None = None
        self.handle = c_attn.register_forward_hook(self._hook)

    def _hook(
        self, module: torch.nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor
    ) -> torch.Tensor:
        x = inputs[0].detach().flatten(0, 1)
        if self.shift is None:
            # Near the mean, so that the covariance is no small difference of large sums.
            self.shift = x.mean(0)
        x = x - self.shift
        self.sum += double(x.sum(0))
        self.products += double(x.T @ x)
        if not self.gradients:
            return output
        self.probe = torch.zeros_like(output, requires_grad=True)
        return output + self.probe

    def take_gradient(self) -> None:
        assert self.probe is not None and self.probe.grad is not None
        g = self.probe.grad.flatten(0, 1)
        g = g[:, g.shape[1] // 3 :]  # the part of keys and values
        self.gradient_products += double(g.T @ g)
        self.probe = None

    def moments(self, tokens: int) -> Moments:
        assert self.shift is not None and isinstance(self.products, np.ndarray)
        offset = self.sum / tokens
        gradient = (
            self.gradient_products / tokens
            if isinstance(self.gradient_products, np.ndarray)
            else None
        )
        covariance = self.products / tokens - np.outer(offset, offset)
        return Moments(double(self.shift) + offset, covariance, gradient)


def perplexity(model: MLAGPT2LMHeadModel, text: Text, max_tokens: int) -> tuple[float, int]:
    """exp of the mean loss on the held-out part, each window a context of its own, and the number
    of targets.

    Rows of the vocabulary that stand for no token take no part in the softmax.
    """
    total, tokens = 0.0, 0
    vocabulary = len(text.tokenizer)
    with torch.inference_mode():
        for batch in text.held_out(max_tokens):
            x, targets = _tensors(batch, model)
            total += float(_loss(model, x, targets, vocabulary))
            tokens += x.numel()
    return float(np.exp(total / tokens)), tokens


def _loss(
    model: MLAGPT2LMHeadModel, x: torch.Tensor, targets: torch.Tensor, vocabulary: int
) -> torch.Tensor:
    """The summed cross-entropy, in nats."""
    head = model.lm_head.weight[:vocabulary]
    return head_loss(hidden_states(model.transformer, x), head, targets.flatten(), LOSS_CHUNK)


def _tensors(batch: np.ndarray, model: MLAGPT2LMHeadModel) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.tensor(batch, device=model.device)
    return ids[:, :-1], ids[:, 1:]


def double(t: torch.Tensor) -> np.ndarray:
    """A tensor in float64, which MPS does not have."""
    return t.detach().cpu().double().numpy()
