"""Generation in MLX, on mlx-lm's own decoding loop, samplers and caches."""

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from mlx_mla import checkpoint
from mlx_mla.backend import CacheKind, GenerationOptions, Piece
from mlx_mla.errors import UserError
from mlx_mla.model_mlx import LatentAttention, Model, ModelArgs

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import BatchGenerator, generate_step, generation_stream, wired_limit
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.sample_utils import make_logits_processors, make_sampler
from mlx_lm.tokenizer_utils import NaiveStreamingDetokenizer
from mlx_lm.utils import load_model
from transformers import PreTrainedTokenizerFast

DEFAULT_MAX_TOKENS = 200


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
        return self.model(ids[:, 0, :, 0])[:, -L:]


class MLXDecoder:
    """See `mlx_mla.backend.Decoder`.

    Args:
        folder: A model folder of this project, also one quantised by `mlx_lm.convert -q`. The model
            file in it is not executed: the package's own is the same model.
        cache: What to keep between tokens.

    Raises:
        UserError: If it is another kind of model, or mlx-lm cannot load the weights.
    """

    def __init__(self, folder: Path, cache: CacheKind = "latent"):
        checkpoint.read_config(folder)  # refuses other kinds of model
        try:
            model, _ = load_model(
                folder,
                model_config={"model_file": None},
                get_model_classes=lambda config: (Model, ModelArgs),
            )
        except (ValueError, RuntimeError, KeyError) as e:
            raise UserError(f"{folder}: the weights do not fit config.json: {_first_line(e)}") from e
        assert isinstance(model, Model)
        model.materialize_cache(cache == "materialized")
        self.cache = cache
        self.model: Any = WithoutCache(model) if cache == "none" else model
        self.tokenizer = PreTrainedTokenizerFast.from_pretrained(str(folder))
        self.args = model.args
        self.vocab_size = model.args.vocab_size
        self.n_positions = model.args.n_positions
        attn = model.layers[0].attn
        is_mla = isinstance(attn, LatentAttention)
        self._latent_width = attn.kv_lora_rank + attn.qk_rope_head_dim if is_mla else None

    def stream(self, prompt: Sequence[int], options: GenerationOptions) -> Iterator[Piece]:
        max_tokens = self.check(prompt, options)
        mx.random.seed(options.seed)
        mx.reset_peak_memory()
        meter = _Meter(len(prompt))
        writer = _Writer(self.tokenizer, options.stop)
        with wired_limit(self.model, [generation_stream]):
            for token, cache in self._tokens(prompt, max_tokens, options):
                meter.count(0 if self.cache == "none" else sum(c.nbytes for c in cache))
                reason = writer.add(token)
                if reason is None and meter.tokens == max_tokens:
                    reason = "length"
                yield Piece(writer.take(final=reason == "length"), [token], meter.figures(), reason)
                if reason:
                    return

    def batch(self, prompts: Sequence[Sequence[int]], options: GenerationOptions) -> Iterator[tuple[int, Piece]]:
        limits = [self.check(prompt, options) for prompt in prompts]
        if self.cache == "none" or options.kv_bits or options.max_kv_size:
            # mlx-lm batches neither of these, so the prompts take turns.
            for i, prompt in enumerate(prompts):
                for piece in self.stream(prompt, options):
                    yield i, piece
            return
        mx.random.seed(options.seed)
        mx.reset_peak_memory()
        generator = BatchGenerator(
            self.model,
            sampler=self._sampler(options),
            logits_processors=self._logits_processors(options),
            completion_batch_size=max(32, len(prompts)),
        )
        uids = generator.insert([list(p) for p in prompts], limits)
        index = {uid: i for i, uid in enumerate(uids)}
        meters = [_Meter(len(p)) for p in prompts]
        writers = [_Writer(self.tokenizer, options.stop) for _ in prompts]
        unfinished = set(uids)
        try:
            while unfinished and (responses := generator.next_generated()):
                for response in responses:
                    if response.uid not in unfinished:
                        continue
                    i = index[response.uid]
                    meters[i].count(generator.prompt_cache_nbytes)
                    reason = writers[i].add(response.token)
                    if reason:
                        if response.finish_reason is None:
                            generator.remove([response.uid])
                    elif response.finish_reason:
                        reason = "length"
                    if reason:
                        unfinished.discard(response.uid)
                    text = writers[i].take(final=reason == "length")
                    yield i, Piece(text, [response.token], meters[i].figures(), reason)
        finally:
            generator.close()

    def check(self, prompt: Sequence[int], options: GenerationOptions) -> int:
        """Refuse what the model cannot do; returns how many tokens to generate.

        Raises:
            UserError: Naming the option and its remedy.
        """
        if len(prompt) == 0:
            raise UserError("the prompt has no tokens; give some text")
        if max(prompt) >= self.vocab_size or min(prompt) < 0:
            bad = next(t for t in prompt if not 0 <= t < self.vocab_size)
            raise UserError(
                f"the prompt has token id {bad}, outside the model's vocabulary of {self.vocab_size}; "
                "the tokenizer in the folder does not belong to this model"
            )
        _check_sampling(options, self.vocab_size)
        if options.kv_bits is not None:
            self._group_size()
        if options.max_kv_size is not None:
            if not 2 <= options.max_kv_size <= self.n_positions:
                raise UserError(
                    f"--max-kv-size must be from 2 to n_positions ({self.n_positions}), not {options.max_kv_size}"
                )
            return DEFAULT_MAX_TOKENS if options.max_tokens is None else options.max_tokens
        room = self.n_positions - len(prompt)
        if room < 1:
            raise UserError(
                f"the prompt has {len(prompt)} tokens and the model n_positions={self.n_positions}; "
                f"shorten it to {self.n_positions - 1}, or give --max-kv-size {self.n_positions}"
            )
        if options.max_tokens is None:
            return min(DEFAULT_MAX_TOKENS, room)
        if options.max_tokens > room:
            raise UserError(
                f"{len(prompt)} prompt tokens and --max-tokens {options.max_tokens} exceed the model's "
                f"n_positions={self.n_positions}; use --max-tokens {room}, or give --max-kv-size {self.n_positions}"
            )
        return options.max_tokens

    def _tokens(
        self, prompt: Sequence[int], max_tokens: int, options: GenerationOptions
    ) -> Iterator[tuple[int, list[Any]]]:
        """Generated token ids, each with the cache as it is then."""
        limit = options.max_kv_size or self.n_positions
        context, left = list(prompt), max_tokens
        while left:
            if len(context) >= limit:
                # Positions are learned, so a full context cannot slide: its newest half is read again.
                context = context[-max(1, limit // 2) :]
            n = min(left, limit - len(context))
            cache = make_prompt_cache(self.model)
            quantized = (
                {"kv_bits": options.kv_bits, "kv_group_size": self._group_size(), "quantized_kv_start": 0}
                if options.kv_bits
                else {}
            )
            for token, _ in generate_step(
                mx.array(context),
                self.model,
                max_tokens=n,
                sampler=self._sampler(options),
                logits_processors=self._logits_processors(options),
                prompt_cache=cache,
                **quantized,
            ):
                context.append(int(token))
                yield int(token), cache
            left -= n

    def _sampler(self, options: GenerationOptions) -> Callable[[mx.array], mx.array]:
        return make_sampler(temp=options.temp, top_p=options.top_p, min_p=options.min_p, top_k=options.top_k)

    def _logits_processors(self, options: GenerationOptions) -> list[Any]:
        processors = []
        if options.repetition_penalty != 1.0:
            processors += make_logits_processors(
                repetition_penalty=options.repetition_penalty,
                repetition_context_size=options.repetition_context_size,
            )
        if self.vocab_size > len(self.tokenizer):
            # Rows that pad the vocabulary stand for no token.
            is_token = mx.arange(self.vocab_size) < len(self.tokenizer)
            processors.append(lambda _, logits: mx.where(is_token, logits, -mx.inf))
        return processors

    def _group_size(self) -> int:
        if self.cache == "none":
            raise UserError("--kv-bits needs a cache; leave out --cache none")
        latent = self._latent_width if self.cache == "latent" else None
        width = latent or self.args.n_embd // self.args.n_head
        for group_size in (64, 32):
            if width % group_size == 0:
                return group_size
        raise UserError(
            f"--kv-bits: the cache is {width} wide, and the quantiser takes multiples of 32; "
            "a kv_lora_rank that is a multiple of 32 would fit"
        )


def _check_sampling(options: GenerationOptions, vocab_size: int) -> None:
    if options.max_tokens is not None and options.max_tokens < 1:
        raise UserError(f"--max-tokens must be at least 1, not {options.max_tokens}")
    if options.temp < 0:
        raise UserError(f"--temp must not be negative, not {options.temp}; 0 is greedy")
    if not 0 <= options.top_k < vocab_size:
        raise UserError(f"--top-k must be from 0 (off) to {vocab_size - 1}, not {options.top_k}")
    for name, value in (("--top-p", options.top_p), ("--min-p", options.min_p)):
        if not 0 <= value <= 1:
            raise UserError(f"{name} must be between 0 and 1, not {value}")
    if options.repetition_penalty <= 0:
        raise UserError(f"--repetition-penalty must be positive, not {options.repetition_penalty}; 1 is off")
    if options.repetition_context_size < 1:
        raise UserError(f"--repetition-context-size must be at least 1, not {options.repetition_context_size}")
    if "" in options.stop:
        raise UserError("--stop takes strings that are not empty")


class _Writer:
    """Turns token ids into text, holding back what may become a stop string or an incomplete character."""

    def __init__(self, tokenizer: Any, stop: Sequence[str]):
        self._detokenizer = NaiveStreamingDetokenizer(tokenizer)
        self._detokenizer.reset()
        self._end_of_text = tokenizer.eos_token_id
        self._stop = list(stop)
        self._held = ""

    def add(self, token: int) -> str | None:
        """Take one token; returns "stop" at the end of text or at a stop string."""
        if token == self._end_of_text:
            self._detokenizer.finalize()
            self._held += self._detokenizer.last_segment
            self._cut()
            return "stop"
        self._detokenizer.add_token(token)
        self._held += self._detokenizer.last_segment
        return "stop" if self._cut() else None

    def _cut(self) -> bool:
        found = [i for s in self._stop if (i := self._held.find(s)) >= 0]
        if found:
            self._held, self._stop = self._held[: min(found)], []
        return bool(found)

    def take(self, final: bool) -> str:
        """The text that is safe to show; with `final`, all that is left."""
        if final:
            self._detokenizer.finalize()
            self._held += self._detokenizer.last_segment
            self._cut()
        keep = 0
        if not final:
            ends = (n for s in self._stop for n in range(1, len(s)) if self._held.endswith(s[:n]))
            keep = max(ends, default=0)
        text, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return text


class _Meter:
    """Speeds and sizes of one generation."""

    def __init__(self, prompt_tokens: int):
        self.prompt_tokens = prompt_tokens
        self.tokens = 0
        self._start = self._now = self._first = time.perf_counter()
        self._cache_bytes = 0

    def count(self, cache_bytes: int) -> None:
        self._now = time.perf_counter()
        if self.tokens == 0:
            self._first = self._now
        self.tokens += 1
        self._cache_bytes = max(self._cache_bytes, cache_bytes)

    def figures(self) -> dict[str, Any]:
        ttft, rest = self._first - self._start, self._now - self._first
        return {
            "prompt_tokens": self.prompt_tokens,
            "prompt_tps": self.prompt_tokens / ttft if ttft else 0.0,
            # The first token comes with the prompt; the others took `rest`.
            "generation_tps": (self.tokens - 1) / rest if rest else 0.0,
            "ttft_ms": ttft * 1e3,
            "kv_cache_bytes": self._cache_bytes,
            "peak_memory_bytes": mx.get_peak_memory(),
        }


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
