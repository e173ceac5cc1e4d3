"""Generation in PyTorch, on transformers' caches and logits processors."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from transformers import LogitsProcessorList
from transformers.generation import logits_process

from mlx_mla.backends.contract import decoding_dtype
from mlx_mla.backends.torch.caches import FixedCache, GrowingCache, cache_bytes
from mlx_mla.backends.torch.device import peak_memory_bytes
from mlx_mla.backends.torch.load import load
from mlx_mla.checkpoint import ModelFolder
from mlx_mla.decoding.request import (
    OVERFLOWS,
    CacheChoice,
    GenerationOptions,
    cache_of,
    check_request,
    fit_context,
    is_greedy,
)
from mlx_mla.decoding.text import Continuation, Piece
from mlx_mla.errors import UserError, flag
from mlx_mla.model.config import InferenceDType


class TorchDecoder:
    """See `mlx_mla.backends.contract.Decoder`.

    Args:
        dtype: Type of weights, computation and cache. None: by device.

    Raises:
        UserError: If PyTorch cannot read the weights.
    """

    def __init__(
        self,
        folder: ModelFolder,
        cache: CacheChoice,
        device: torch.device,
        dtype: InferenceDType | None = None,
    ):
        config = folder.config
        self.dtype = decoding_dtype(dtype, device.type)
        self.model = load(folder, device, self.dtype)
        self.device, self.config, self.cache = device, config, cache_of(config, cache)
        self.model.materialize_cache(self.cache == "materialized")
        # MPS keeps memory for every shape it has seen (pytorch#132596), so there the cache never
        # grows.
        self.fixed_shapes = device.type == "mps"
        self.tokenizer = folder.tokenizer
        assert config.vocab_size
        self.vocab_size, self.n_positions = config.vocab_size, config.n_positions

    def stream(self, prompt: Sequence[int], options: GenerationOptions) -> Iterator[Piece]:
        for _, piece in self._decode([prompt], options):
            yield piece

    def batch(
        self, prompts: Sequence[Sequence[int]], options: GenerationOptions
    ) -> Iterator[tuple[int, Piece]]:
        if options.max_kv_size or self.cache == "none":
            # Rows would reach the limit at different times, so the prompts take turns.
            for i, prompt in enumerate(prompts):
                for _, piece in self._decode([prompt], options):
                    yield i, piece
        else:
            yield from self._decode(prompts, options)

    def _decode(
        self, prompts: Sequence[Sequence[int]], options: GenerationOptions
    ) -> Iterator[tuple[int, Piece]]:
        for name in ("kv_bits", "prompt_cache", "save_prompt_cache", "draft_model"):
            if getattr(options, name) is not None:
                raise UserError(
                    f"{flag(name)} works only with --backend mlx; use that, or leave it out"
                )
        limits = [check_request(p, options, self.vocab_size, self.n_positions) for p in prompts]
        peak = partial(peak_memory_bytes, self.device)
        texts = [
            Continuation(self.tokenizer, options.stop, len(prompt), limit, peak)
            for prompt, limit in zip(prompts, limits)
        ]
        unfinished = set(range(len(prompts)))
        for tokens, held in self._tokens(prompts, max(limits), options):
            for i in sorted(unfinished):
                piece = texts[i].add(tokens[i], held)
                if piece.finish_reason:
                    unfinished.discard(i)
                yield i, piece
            if not unfinished:
                return

    def _tokens(
        self, prompts: Sequence[Sequence[int]], max_tokens: int, options: GenerationOptions
    ) -> Iterator[tuple[list[int], int]]:
        """The next token of every prompt, and the bytes of the cache, step by step."""
        limit = options.max_kv_size or self.n_positions
        processors = None if is_greedy(options) else self._processors(options)
        # Each prompt has its own, so that none depends on the others of the batch.
        random = [torch.Generator(self.device).manual_seed(options.seed) for _ in prompts]
        contexts, done = [list(p) for p in prompts], 0
        while done < max_tokens:
            contexts = [fit_context(c, limit) for c in contexts]
            # Shorter prompts of a batch stop before the longest, whose room does not bind them.
            room = limit - min(map(len, contexts))
            width = max(map(len, contexts))
            padding = torch.tensor([width - len(c) for c in contexts], device=self.device)
            ids = torch.tensor([[0] * (width - len(c)) + c for c in contexts], device=self.device)
            columns, end = torch.arange(width, device=self.device), width
            steps = min(max_tokens - done, room)
            cache = self._new_cache(width + steps)
            fixed = cache.size if isinstance(cache, FixedCache) else None
            for _ in range(steps):
                with torch.inference_mode():
                    # Rows that are finished may run past the position table; their tokens are not
                    # used.
                    positions = (columns[None] - padding[:, None]).clamp(0, self.n_positions - 1)
                    keys = torch.arange(fixed or end, device=self.device)
                    logits = self.model(
                        ids,
                        attention_mask=(keys[None] >= padding[:, None]).long()
                        if len(prompts) > 1
                        else None,
                        position_ids=positions,
                        past_key_values=cache,
                        use_cache=cache is not None,
                        logits_to_keep=1,
                    ).logits[:, -1]
                    chosen = self._choose(logits.float(), contexts, processors, options, random)
                for context, token in zip(contexts, chosen.tolist()):
                    context.append(token)
                done += 1
                yield chosen.tolist(), cache_bytes(cache)
                end += 1
                if cache is None:
                    ids = torch.cat([ids, chosen[:, None]], dim=1)
                    columns = torch.arange(end, device=self.device)
                else:
                    ids, columns = chosen[:, None], columns[-1:] + 1

    def _new_cache(self, tokens: int) -> Any:
        if self.cache == "none":
            return None
        if self.fixed_shapes:
            return FixedCache(self.config.n_layer, tokens)
        return GrowingCache()

    def _choose(
        self,
        logits: torch.Tensor,
        contexts: list[list[int]],
        processors: LogitsProcessorList | None,
        options: GenerationOptions,
        random: Sequence[torch.Generator],
    ) -> torch.Tensor:
        # Rows that pad the vocabulary stand for no token.
        logits[:, len(self.tokenizer) :] = -torch.inf
        if options.repetition_penalty != 1.0:
            penalty = logits_process.RepetitionPenaltyLogitsProcessor(options.repetition_penalty)
            recent = [
                torch.tensor([c[-options.repetition_context_size :]], device=self.device)
                for c in contexts
            ]
            logits = torch.cat([penalty(r, row[None]) for r, row in zip(recent, logits)])
        if processors is not None:
            logits = processors(torch.empty(0, device=self.device), logits)
        shares = logits.softmax(-1)
        if not shares.isfinite().all():
            raise UserError(OVERFLOWS)
        if processors is None:
            return logits.argmax(-1)
        return torch.cat([torch.multinomial(s, 1, generator=g) for s, g in zip(shares, random)])

    def _processors(self, options: GenerationOptions) -> LogitsProcessorList:
        """The sampling options in mlx-lm's order: filters on the model's own distribution,
        temperature last."""
        chain = LogitsProcessorList()
        if options.top_p < 1:
            chain.append(logits_process.TopPLogitsWarper(options.top_p))
        if options.min_p > 0:
            chain.append(logits_process.MinPLogitsWarper(options.min_p))
        if options.top_k > 0:
            chain.append(logits_process.TopKLogitsWarper(options.top_k))
        chain.append(logits_process.TemperatureLogitsWarper(float(options.temp)))
        return chain
