"""Batched log-probabilities against a plain forward pass, one row at a time."""

import pytest

torch = pytest.importorskip("torch")

import mlx.core as mx
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_mla.backends.mlx.load import build_model as build_mlx
from mlx_mla.backends.mlx.score import MLXScorer
from mlx_mla.backends.torch.load import build_model as build_torch
from mlx_mla.backends.torch.score import TorchScorer
from mlx_mla.data.tokenizer import ByteTokenizer
from mlx_mla.errors import UserError
from mlx_mla.evaluation.scoring import Request, RowBatch, score
from mlx_mla.evaluation.tasks.base import TaskSetup
from mlx_mla.model.config import ModelConfig
from mlx_mla.model.weights import initial_weights

CONFIGS = {
    "mla": {"attention": "mla", "kv_lora_rank": 8},
    "rope": {"attention": "mla", "kv_lora_rank": 8, "qk_rope_head_dim": 4},
    "mha": {"attention": "mha", "kv_lora_rank": None},
}


@pytest.fixture(scope="module")
def scorers():
    tokenizer = ByteTokenizer().fast_tokenizer()
    made = {}
    for name, values in CONFIGS.items():
        config = ModelConfig(
            vocab_size=272, n_layer=2, n_head=2, n_embd=24, n_positions=40, **values
        ).resolved()
        weights = initial_weights(config, 1, 0.4)
        model = build_torch(config, weights, torch.device("cpu"))
        made[name] = (
            MLXScorer(mx.Device(mx.cpu), build_mlx(config, weights), tokenizer),
            TorchScorer(model, tokenizer),
            model,
        )
    return made


def alone(model, context, target, n_positions=40):
    """Log-probabilities of a continuation, by PyTorch in float64, and whether all are the
    likeliest."""
    row = (list(context) + list(target))[-n_positions - 1 :]
    with torch.no_grad():
        logits = model(torch.tensor([row[:-1]])).logits[0, -len(target) :, :257].double()
    logprobs = logits.log_softmax(-1)[torch.arange(len(target)), torch.tensor(target)]
    return float(logprobs.sum()), bool((logits.argmax(-1) == torch.tensor(target)).all())


tokens = st.lists(st.integers(0, 256), min_size=1, max_size=36).map(tuple)
short = st.lists(st.integers(0, 256), min_size=1, max_size=12).map(tuple)
request = st.tuples(tokens, st.lists(short, min_size=1, max_size=4).map(tuple)).map(
    lambda p: Request(*p)
)


@pytest.mark.parametrize("name", CONFIGS)
@settings(max_examples=10)
@given(requests=st.lists(request, min_size=1, max_size=9), batch_size=st.integers(1, 8))
def test_batches_score_what_single_rows_do(scorers, name, requests, batch_size):
    mlx, other, model = scorers[name]
    for scorer in (mlx, other):
        found = score(scorer, requests, batch_size)
        assert sorted(found) == list(range(len(requests)))
        for i, r in enumerate(requests):
            expected = [alone(model, r.context, t) for t in r.targets]
            assert found[i].logprob == pytest.approx([s for s, _ in expected], abs=1e-3)
            assert list(found[i].greedy) == [g for _, g in expected]


class Counting:
    """A scorer that computes nothing, and keeps how many tokens it was given."""

    tokenizer, n_positions, vocab_size = None, 1024, 50257

    def __init__(self):
        self.tokens, self.blocks = 0, []

    def run(self, prefix, blocks):
        self.tokens += 0 if prefix is None else prefix.size
        self.tokens += sum(block.ids.size for block in blocks)
        self.blocks += [block.ids.shape for block in blocks]
        scored = sum(len(block.where) for block in blocks)
        return np.zeros(scored, np.float32), np.ones(scored, bool)


@pytest.mark.parametrize("endings", [1, 4])
def test_padding_is_less_than_a_tenth_of_what_is_computed(endings):
    """Contexts of 10 to 110 tokens and endings of 5 to 60, as HellaSwag's, or to 8."""
    rng = np.random.default_rng(0)
    longest = 60 if endings > 1 else 8
    requests = [
        Request((1,) * n, tuple((2,) * m for m in rng.integers(5, longest, endings)))
        for n in rng.integers(10, 110, 400)
    ]
    scorer = Counting()
    assert len(score(scorer, requests, 32)) == 400
    needed = 0
    for r in requests:
        shared = (len(r.context) - 1) // 8 * 8 if endings > 1 else 0
        needed += shared + sum(len(r.context) - shared + len(t) - 1 for t in r.targets)
    assert needed <= scorer.tokens < 1.1 * needed
    assert max(rows for rows, _ in scorer.blocks) <= 32


def test_rows_that_pad_the_vocabulary_get_no_probability(scorers):
    for scorer in scorers["mla"][:2]:
        every = score(scorer, [Request((1, 2), tuple((t,) for t in range(257)))], 64)[0]
        assert np.exp(every.logprob).sum() == pytest.approx(1, abs=1e-5)


def test_a_continuation_past_the_table_is_refused(scorers):
    with pytest.raises(UserError, match="41 tokens does not fit this model's n_positions=40"):
        score(scorers["mla"][0], [Request((1,), (tuple(range(41)),))])


@pytest.mark.parametrize("backend", [0, 1], ids=["mlx", "torch"])
@pytest.mark.parametrize("fails_at", [1, 2], ids=["prefix", "rows"])
def test_a_pass_that_fails_leaves_the_cache_as_it_was(scorers, monkeypatch, backend, fails_at):
    scorer = scorers["mla"][backend]
    kind, calls = type(scorer.model.transformer), []
    name = "__call__" if backend == 0 else "forward"
    whole = getattr(kind, name)

    def fails(*args, **kwargs):
        calls.append(args)
        if len(calls) == fails_at:
            raise MemoryError
        return whole(*args, **kwargs)

    monkeypatch.setattr(kind, name, fails)
    ones = np.ones((1, 4), np.int64)
    with pytest.raises(MemoryError):
        scorer.run(ones, [RowBatch(ones, np.array([0]), np.array([3]), np.array([1]))])
    blocks = scorer.model.layers if backend == 0 else scorer.model.transformer.h
    assert not any(block.attn.materialize_cache for block in blocks)


def test_the_likeliest_continuation_is_greedy(scorers):
    mlx, _, model = scorers["mha"]
    context = (5, 6, 7)
    with torch.no_grad():
        best = int(model(torch.tensor([context])).logits[0, -1, :257].argmax())
    assert score(mlx, [Request(context, ((best,), ((best + 1) % 257,)))])[0].greedy == (True, False)


def test_blanks_before_the_ending_belong_to_it():
    setup = TaskSetup(ByteTokenizer().fast_tokenizer(), 8, 8)
    assert setup.choices("a  ", ["b"]) == Request((97,), ((32, 32, 98),))
    assert setup.choices("", [" b", " c"]) == Request((256,), ((32, 98), (32, 99)))
