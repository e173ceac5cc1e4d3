"""Generation in MLX, on mlx-lm's own decoding loop, samplers and caches."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import mlx_mla._openblas  # noqa: F401  (before mlx)
from mlx_mla import checkpoint
from mlx_mla.backend import CacheKind, GenerationOptions, Piece
from mlx_mla.decoding import Meter, TextWriter, check_request, fit_context
from mlx_mla.errors import UserError
from mlx_mla.model_mlx import LatentAttention, Model, ModelArgs

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import BatchGenerator, generate_step, generation_stream, wired_limit
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.sample_utils import make_logits_processors, make_sampler
from mlx_lm.utils import load_model


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
        self.tokenizer = checkpoint.read_tokenizer(folder)
        self.args = model.args
        self.vocab_size = model.args.vocab_size
        self.n_positions = model.args.n_positions
        attentions = [block.attn for block in model.layers]
        self._latent_widths = [
            a.kv_lora_rank + a.qk_rope_head_dim for a in attentions if isinstance(a, LatentAttention)
        ]

    def stream(self, prompt: Sequence[int], options: GenerationOptions) -> Iterator[Piece]:
        max_tokens = self.check(prompt, options)
        mx.random.seed(options.seed)
        mx.reset_peak_memory()
        meter = Meter(len(prompt), mx.get_peak_memory)
        writer = TextWriter(self.tokenizer, options.stop)
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
        meters = [Meter(len(p), mx.get_peak_memory) for p in prompts]
        writers = [TextWriter(self.tokenizer, options.stop) for _ in prompts]
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
        """Refuse what the model cannot do; returns how many tokens to generate."""
        if options.kv_bits is not None:
            self._group_size()
        return check_request(prompt, options, self.vocab_size, self.n_positions)

    def _tokens(
        self, prompt: Sequence[int], max_tokens: int, options: GenerationOptions
    ) -> Iterator[tuple[int, list[Any]]]:
        """Generated token ids, each with the cache as it is then."""
        limit = options.max_kv_size or self.n_positions
        context, left = list(prompt), max_tokens
        while left:
            context = fit_context(context, limit)
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
        latent = self._latent_widths if self.cache == "latent" else None
        widths = latent or [self.args.n_embd // self.args.n_head]
        for group_size in (64, 32):
            if all(width % group_size == 0 for width in widths):
                return group_size
        found = " or ".join(map(str, sorted(set(widths))))
        raise UserError(
            f"--kv-bits: the cache is {found} wide, and the quantiser takes multiples of 32; "
            "a kv_lora_rank that is a multiple of 32 would fit"
        )


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
