"""Generation in MLX, on mlx-lm's own decoding loop, samplers and caches."""

import contextlib
import dataclasses
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import (
    BatchGenerator,
    generate_step,
    speculative_generate_step,
    wired_limit,
)
from mlx_lm.models.cache import trim_prompt_cache
from mlx_lm.sample_utils import (
    apply_min_p,
    apply_top_k,
    apply_top_p,
    make_logits_processors,
)
from mlx_lm.sample_utils import make_sampler as mlx_lm_sampler

from mlx_mla.backends.contract import decoding_dtype
from mlx_mla.backends.mlx import prompt_cache
from mlx_mla.backends.mlx.caches import KVCache, UnusedCache, make_cache
from mlx_mla.backends.mlx.device import DTYPES, device_type, on_device
from mlx_mla.backends.mlx.load import load
from mlx_mla.checkpoint import ModelFolder
from mlx_mla.decoding.request import (
    OVERFLOWS,
    CacheChoice,
    GenerationOptions,
    cache_of,
    check_draft,
    check_request,
    fit_context,
    is_greedy,
)
from mlx_mla.decoding.text import Continuation, Piece
from mlx_mla.errors import UserError
from mlx_mla.hub import find_model
from mlx_mla.model.config import InferenceDType
from mlx_mla.model.model_mlx import Model

GROUP_SIZES = (64, 32)  # of mlx's quantizer, the one we prefer first


class WithoutCache(nn.Module):
    """Recomputes the whole context for every token, the way the original project decoded.

    To mlx-lm it looks like a model of one layer, whose stock cache holds the token ids.
    """

    def __init__(self, model: Model):
        super().__init__()
        self.model = model
        self.layers = [None]

    def __call__(self, inputs: mx.array, cache: Any = None) -> mx.array:
        L = inputs.shape[1]
        ids = inputs[:, None, :, None]
        ids, _ = cache[0].update_and_fetch(ids, mx.zeros((*ids.shape[:3], 0), ids.dtype))
        # The head is for the new tokens alone.
        hidden = self.model.transformer(ids[:, 0, :, 0])[:, -L:]
        return self.model.head(hidden)


@dataclasses.dataclass
class DecodingState:
    """Tokens that were read or generated, and the cache with those of them that the model has
    seen."""

    tokens: list[int]
    cache: list[Any]

    @property
    def unseen(self) -> list[int]:
        return self.tokens[self.cache[0].offset :]


def make_sampler(options: GenerationOptions) -> Callable[[mx.array], mx.array]:
    """mlx-lm's sampler of log-probabilities (1, vocabulary), with random numbers of its own: in a
    batch each request has one, so that none depends on the others."""
    if is_greedy(options):
        return mlx_lm_sampler(temp=0)
    state = mx.random.key(options.seed)

    def sample(logprobs: mx.array) -> mx.array:
        nonlocal state
        if options.top_p < 1:
            logprobs = apply_top_p(logprobs, options.top_p)
        if options.min_p > 0:
            logprobs = apply_min_p(logprobs, options.min_p)
        if options.top_k > 0:
            logprobs = apply_top_k(logprobs, options.top_k)
        state, own = mx.random.split(state)
        return mx.random.categorical(logprobs.astype(mx.float32) * (1 / options.temp), key=own)

    return sample


def _check_finite(token: int, logprobs: mx.array) -> None:
    """Refuse a model whose scores are not finite, by the first token it chose.

    Later tokens are not looked at, since that would wait for the step that is already under way.
    """
    if not mx.isfinite(logprobs[token]).item():
        raise UserError(OVERFLOWS)


class MLXDecoder:
    """See `mlx_mla.backends.contract.Decoder`.

    Args:
        folder: The model, which mlx-lm may have quantized.
        dtype: Type of weights, computation and cache. None: by device.

    Raises:
        UserError: If mlx-lm cannot load the weights.
    """

    def __init__(
        self,
        device: mx.Device,
        folder: ModelFolder,
        cache: CacheChoice = "latent",
        dtype: InferenceDType | None = None,
    ):
        self.device = device
        self.dtype = decoding_dtype(dtype, device_type(device))
        with mx.stream(device):
            model = load(folder, self.dtype)
        self.folder, self.requested_cache = folder, cache
        self.config = folder.config
        self.cache = cache_of(self.config, cache)
        model.materialize_cache(self.cache == "materialized")
        self.model: Any = WithoutCache(model) if cache == "none" else model
        self.tokenizer = folder.tokenizer
        self.vocab_size = model.args.vocab_size
        self.n_positions = model.args.n_positions
        self._draft: tuple[str, Model] | None = None

    @on_device
    def stream(self, prompt: Sequence[int], options: GenerationOptions) -> Iterator[Piece]:
        context = self._new_context(prompt, options)
        max_tokens = check_request(context.tokens, options, self.vocab_size, self.n_positions)
        mx.reset_peak_memory()
        text = self._continuation(prompt, max_tokens, options)
        accepted = 0
        with self._wired():
            with contextlib.closing(self._tokens(context, max_tokens, options)) as tokens:
                for token, from_draft in tokens:
                    held = 0 if self.cache == "none" else sum(c.nbytes for c in context.cache)
                    piece = text.add(token, held)
                    accepted += from_draft
                    if options.draft_model:
                        piece.figures["accepted_draft_tokens"] = accepted
                    yield piece
                    if piece.finish_reason:
                        break
            if options.save_prompt_cache:
                self._save(context, options.save_prompt_cache)

    @on_device
    def batch(
        self, prompts: Sequence[Sequence[int]], options: GenerationOptions
    ) -> Iterator[tuple[int, Piece]]:
        self._check_cache(options)
        limits = [check_request(p, options, self.vocab_size, self.n_positions) for p in prompts]
        alone = (options.kv_bits, options.max_kv_size, options.draft_model, options.prompt_cache)
        if self.cache == "none" or any(alone):
            # mlx-lm batches none of these, so the prompts take turns.
            for i, prompt in enumerate(prompts):
                for piece in self.stream(prompt, options):
                    yield i, piece
            return
        mx.reset_peak_memory()
        generator = BatchGenerator(
            self.model,
            logits_processors=self._logits_processors(options),
            completion_batch_size=max(32, len(prompts)),
            stream=mx.default_stream(self.device),
        )
        samplers = [make_sampler(options) for _ in prompts]
        uids = generator.insert([list(p) for p in prompts], limits, samplers=samplers)
        index = {uid: i for i, uid in enumerate(uids)}
        texts = [self._continuation(p, n, options) for p, n in zip(prompts, limits)]
        unfinished = set(uids)
        try:
            while unfinished and (responses := generator.next_generated()):
                for response in responses:
                    if response.uid not in unfinished:
                        continue
                    i = index[response.uid]
                    if texts[i].tokens == 0:
                        _check_finite(response.token, response.logprobs)
                    piece = texts[i].add(response.token, generator.prompt_cache_nbytes)
                    if piece.finish_reason:
                        unfinished.discard(response.uid)
                        if response.finish_reason is None:
                            generator.remove([response.uid])
                    yield i, piece
        finally:
            generator.close()

    def _continuation(
        self, prompt: Sequence[int], max_tokens: int, options: GenerationOptions
    ) -> Continuation:
        return Continuation(
            self.tokenizer, options.stop, len(prompt), max_tokens, mx.get_peak_memory
        )

    def _check_cache(self, options: GenerationOptions) -> None:
        if options.kv_bits is not None:
            self._group_size()
        if self.cache == "none" and (
            options.prompt_cache or options.save_prompt_cache or options.draft_model
        ):
            raise UserError(
                "--prompt-cache, --save-prompt-cache and --draft-model need a cache, not --cache "
                "none"
            )

    def _wired(self) -> contextlib.AbstractContextManager[None]:
        """Keeps the model in memory while it generates; only a GPU has such memory."""
        if self.device == mx.cpu:
            return contextlib.nullcontext()
        return wired_limit(self.model, [mx.default_stream(self.device)])

    def _new_context(self, prompt: Sequence[int], options: GenerationOptions) -> DecodingState:
        self._check_cache(options)
        if options.save_prompt_cache:
            prompt_cache.check_target(options.save_prompt_cache)
        if options.prompt_cache is None:
            return DecodingState(list(prompt), make_cache(self.model))
        if self.requested_cache == "materialized":
            raise UserError("--prompt-cache: files keep latents; leave out --cache materialized")
        cache, tokens = prompt_cache.load(options.prompt_cache, self.folder, DTYPES[self.dtype])
        bits = getattr(cache[0], "bits", None)
        if bits is not None and options.kv_bits not in (None, bits):
            raise UserError(
                f"{options.prompt_cache}: has {bits} bits per value; leave out --kv-bits "
                f"{options.kv_bits}"
            )
        return DecodingState([*tokens, *prompt], cache)

    def _save(self, context: DecodingState, path: Path) -> None:
        """Write the cache with all tokens of the context in it, and none that was only begun."""
        trim_prompt_cache(context.cache, max(0, context.cache[0].offset - len(context.tokens)))
        if context.unseen:
            self.model(mx.array([context.unseen]), cache=context.cache)
        prompt_cache.save(path, context.cache, context.tokens, self.folder)

    def _tokens(
        self, context: DecodingState, max_tokens: int, options: GenerationOptions
    ) -> Generator[tuple[int, bool], None, None]:
        """Generated token ids, each with whether the draft model had guessed it; adds them to the
        context."""
        limit = options.max_kv_size or self.n_positions
        draft = self._draft_model(options, min(limit, len(context.tokens) + max_tokens))
        sampler = make_sampler(options)
        left = max_tokens
        while left:
            fitted = fit_context(context.tokens, limit)
            if fitted is not context.tokens:
                context.tokens, context.cache = fitted, make_cache(self.model)
            if not context.unseen:
                # The next token's logits come from reading the last again.
                trim_prompt_cache(context.cache, 1)
            n = min(left, limit - len(context.tokens))
            common = {
                "max_tokens": n,
                "sampler": sampler,
                "logits_processors": self._logits_processors(options, context.tokens),
                "stream": mx.default_stream(self.device),
            }
            bits: dict[str, int] = {}
            if options.kv_bits is not None:
                bits = {"group_size": self._group_size(), "bits": options.kv_bits}
            steps: Iterator[Any]
            prompt = mx.array(context.unseen)
            if draft is None:
                undrafted = generate_step(
                    prompt,
                    self.model,
                    prompt_cache=context.cache,
                    quantized_kv_start=0,
                    **{f"kv_{name}": value for name, value in bits.items()},
                    **common,
                )
                steps = ((token, logprobs, False) for token, logprobs in undrafted)
            else:
                # mlx-lm would quantize the draft's cache, too, and in a list of its own.
                if bits:
                    context.cache = [
                        c.to_quantized(**bits) if isinstance(c, KVCache) else c
                        for c in context.cache
                    ]
                draft_cache = make_cache(draft)
                if seen := context.tokens[: context.cache[0].offset]:
                    draft(mx.array([seen]), cache=draft_cache)
                # mlx-lm cuts this list at the number of layers, of which some may share a cache.
                unused = len(self.model.layers) - len(context.cache)
                caches = [*context.cache, *(UnusedCache() for _ in range(unused)), *draft_cache]
                steps = speculative_generate_step(
                    prompt,
                    self.model,
                    draft,
                    num_draft_tokens=options.num_draft_tokens,
                    prompt_cache=caches,
                    **common,
                )
            for i, (token, logprobs, guessed) in enumerate(steps):
                if i == 0:
                    _check_finite(token, logprobs)
                context.tokens.append(int(token))
                yield int(token), guessed
            left -= n

    def _draft_model(self, options: GenerationOptions, context: int) -> Model | None:
        """The draft model that the options name, after checking that it can guess for this one."""
        if options.draft_model is None:
            return None
        if self._draft is None or self._draft[0] != options.draft_model:
            folder = find_model(options.draft_model)
            check_draft(options.draft_model, self.tokenizer, folder.tokenizer)
            self._draft = options.draft_model, load(folder, self.dtype)
        draft = self._draft[1]
        if draft.args.n_positions < context:
            raise UserError(
                f"--draft-model {options.draft_model}: has n_positions={draft.args.n_positions}, "
                f"and prompt and text together take {context}; use fewer --max-tokens, or a draft "
                "model with a longer context"
            )
        return draft

    def _logits_processors(
        self, options: GenerationOptions, context: Sequence[int] = ()
    ) -> list[Any]:
        """mlx-lm's processors of logits.

        Args:
            context: Tokens that are there already. mlx-lm shows penalties only the last of them:
                by version, with a cache and with a draft it is those of the prompt, or a single
                one.
        """
        processors: list[Any] = []
        if options.repetition_penalty != 1.0:
            recent, before = options.repetition_context_size, list[mx.array]()
            (penalize,) = make_logits_processors(
                repetition_penalty=options.repetition_penalty, repetition_context_size=recent
            )
            there = list(context)

            def penalized(tokens: mx.array, logits: mx.array) -> Any:
                if not before:
                    hidden = there[: max(0, len(there) - tokens.size)]
                    before.append(mx.array(hidden[-recent:], mx.uint32))
                return penalize(mx.concatenate([before[0], tokens.astype(mx.uint32)]), logits)

            processors.append(penalized)
        # Rows that pad the vocabulary stand for no token (a draft model may have fewer or more of
        # them).
        n = len(self.tokenizer)
        if self.vocab_size > n or options.draft_model:
            processors.append(
                lambda _, logits: mx.where(mx.arange(logits.shape[-1]) < n, logits, -mx.inf)
            )
        return processors

    def _group_size(self) -> int:
        """The quantizer's group of values that share a scale, which must divide the width of every
        layer's cache."""
        if self.cache == "none":
            raise UserError("--kv-bits needs a cache; leave out --cache none")
        spec, materialized = self.config.attention_spec, self.cache == "materialized"
        layers = range(self.config.n_layer)
        widths = {width for i in layers for _, width in spec.cached(i, materialized)}
        for group_size in GROUP_SIZES:
            if all(width % group_size == 0 for width in widths):
                return group_size
        found = " or ".join(map(str, sorted(widths)))
        raise UserError(
            f"--kv-bits: the cache is {found} wide, but the quantizer needs multiples of 32; a "
            f"width of {-(-max(widths) // 32) * 32} would fit, in groups of 32"
        )
