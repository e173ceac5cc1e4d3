"""No kernel is launched on an empty array: values have no width beside latents, and not every
device guards its kernels for that."""

from unittest import mock

import mlx.core as mx
import numpy as np
import pytest
from helpers import KINDS, difference, random_weights, token_ids
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten
from mlx_lm.models import cache as stock

from mlx_mla import checkpoint, serve, train
from mlx_mla.backends.contract import Start
from mlx_mla.backends.mlx import caches
from mlx_mla.backends.mlx.backend import MLXBackend
from mlx_mla.backends.mlx.load import build_model
from mlx_mla.decoding.request import GenerationOptions
from mlx_mla.model.config import ModelConfig
from mlx_mla.model.train_config import TrainConfig
from mlx_mla.model.weights import initial_weights

quantize = mx.quantize


def of_some(w: mx.array, *args, **kwargs):
    assert w.size, "the quantizer was given an empty array"
    return quantize(w, *args, **kwargs)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, text_file):
    out = tmp_path_factory.mktemp("runs") / "wide"
    shape = "--n-layer 3 --n-head 2 --n-embd 64 --kv-lora-rank 64 --num-kv-shared-layers 1"
    flags = "--n-positions 48 --steps 2 --batch-size 2 --save-every 0 --no-compile"
    argv = [*shape.split(), *flags.split(), "--data", str(text_file), "--out", str(out)]
    assert train.main(argv) == 0
    return checkpoint.latest(out)


def text_of(decoder, prompt=b"The st", **options) -> list[int]:
    options = GenerationOptions(**{"temp": 0, "max_tokens": 6, **options})
    return [t for p in decoder.stream(list(prompt), options) for t in p.token_ids]


@pytest.mark.parametrize("bits", [4, 8])
def test_decoding_quantizes_no_values_of_width_0(folder, tmp_path, bits):
    decoder = MLXBackend("cpu").decoder(checkpoint.ModelFolder(folder))
    file = tmp_path / "context.safetensors"
    with mock.patch.object(mx, "quantize", of_some):
        for options in (
            {"save_prompt_cache": file},
            {"prompt_cache": file},
            {"max_kv_size": 8},
            {"draft_model": str(folder)},
        ):
            assert len(text_of(decoder, kv_bits=bits, **options)) == 6
    # The file is one of mlx-lm's.
    held = stock.load_prompt_cache(str(file))
    assert {type(c) for c in held} == {stock.QuantizedKVCache}
    with mx.stream(mx.cpu):  # which takes the empty arrays of mlx-lm's
        for cache in (held, [caches.adopt(c) for c in held]):
            assert mx.isfinite(decoder.model(mx.array([[65]]), cache=cache)).all().item()


def test_serving_quantizes_no_values_of_width_0(folder):
    provider = serve.Provider(
        mock.Mock(model=str(folder)), checkpoint.ModelFolder(folder), "float32"
    )
    provider._load()
    assert provider.problem is None
    cache = stock.make_prompt_cache(provider.model)
    with mock.patch.object(mx, "quantize", of_some):
        provider.model(mx.array([[65, 66]]), cache=cache)
        cache = [c.to_quantized(group_size=32, bits=8) for c in cache]
        provider.model(mx.array([[67]]), cache=cache)
    assert cache[0].offset == 3


@pytest.fixture
def on_cpu():
    """The device that takes the empty arrays of mlx-lm's own caches."""
    with mx.stream(mx.cpu):
        yield


@pytest.mark.usefixtures("on_cpu")
@given(
    width=st.sampled_from([0, 32, 64]),
    bits=st.sampled_from([4, 8]),
    chunks=st.lists(st.integers(1, 300), min_size=1, max_size=4),
    first=st.integers(0, 2),
)
@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_quantized_caches_hold_what_mlx_lms_do(width, bits, chunks, first):
    """From mlx-lm's own classes, whether quantized from the start, later or not at all."""
    ours, theirs = caches.KVCache(), stock.KVCache()
    rng = np.random.default_rng(sum(chunks))
    for i, length in enumerate(chunks):
        if i == first:
            ours, theirs = (c.to_quantized(group_size=32, bits=bits) for c in (ours, theirs))
        keys, values = (
            mx.array(rng.standard_normal((2, 1, length, w), np.float32)) for w in (64, width)
        )
        got, expected = (c.update_and_fetch(keys, values) for c in (ours, theirs))
        assert ours.offset == theirs.offset
        pairs = zip(tree_flatten(got), tree_flatten(expected))
        for (_, a), (_, b) in pairs:
            assert a.shape == b.shape and a.dtype == b.dtype
            assert mx.array_equal(a, b)


@pytest.mark.torch
@pytest.mark.parametrize("kind", KINDS)
def test_pytorch_computes_nothing_on_empty_tensors(kind):
    """Training with its gradients, and decoding, also as on MPS, with a cache of fixed size."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    from mlx_mla.backends.torch.caches import FixedCache, GrowingCache
    from mlx_mla.backends.torch.session import TorchTrainSession

    touched = set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor)]
            if any(t.numel() == 0 for t in tensors) and not func.is_view:
                touched.add(str(func))
            return out

    config = ModelConfig(
        n_layer=3, n_head=4, n_embd=32, n_positions=24, vocab_size=300, **KINDS[kind]
    ).resolved()
    run = TrainConfig(batch_size=2, model=config, backend="torch", device="cpu").resolved()
    session = TorchTrainSession(torch.device("cpu"), run, Start(initial_weights(config, 0)))
    x = np.arange(16).reshape(2, 8)
    session.model.eval()
    kept = [FixedCache(config.n_layer, config.n_positions), GrowingCache()]
    with Watch():
        session.step(0, 1e-3, [(x, x)])
        for length in (5, 1, 1):
            ids = torch.zeros(1, length, dtype=torch.long)
            for cache in kept:
                session.model(ids, past_key_values=cache, use_cache=True)
    # Memory for values of no width is asked for, and never used.
    assert touched <= {f"aten.{name}" for name in ("zeros.default", "new_empty.default")}
    assert [cache.get_seq_length() for cache in kept] == [7, 7]


@pytest.mark.torch
def test_models_split_nothing_off_that_has_no_width():
    """What replaces torch.split gives the same losses, to the bit."""
    import torch

    from mlx_mla.backends.torch.load import build_model as build_torch
    from mlx_mla.model import model_torch

    config = ModelConfig(n_layer=2, n_head=2, n_embd=32, vocab_size=20).resolved()
    model = build_torch(config, random_weights(config, 0), torch.device("cpu"))
    ids = torch.tensor(np.array(token_ids(config, 2, 9)))

    def gradients():
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    got = gradients()
    with mock.patch.object(model_torch, "parts", lambda x, widths: x.split(widths, dim=-1)):
        expected = gradients()
    assert len(got) == len(expected) > 10
    assert all(torch.equal(a, b) for a, b in zip(got, expected))


def test_a_quantized_cache_of_heads_keeps_its_values():
    config = ModelConfig(
        attention="mha", n_layer=1, n_head=2, n_embd=128, vocab_size=20, n_positions=32
    ).resolved()
    model = build_model(config, random_weights(config, 0))
    x = token_ids(config, 1, 12)
    logits = []
    for classes in (stock, caches):
        cache = [classes.KVCache()]
        model(x[:, :6], cache=cache)
        cache = [c.to_quantized(group_size=64, bits=8) for c in cache]
        logits.append(model(x[:, 6:], cache=cache))
    assert difference(*logits) == 0
