"""`python -m mlx_mla.serve`, and stock `mlx_lm.server` on our folders, under requests that are
wrong or too long: every good request is answered as it is alone, every bad one is refused."""

import concurrent.futures
import json
import math
import threading
import time
import urllib.error
import urllib.request
from typing import Any

import pytest
from helpers import ask, ran, serving, started

from mlx_mla import checkpoint
from mlx_mla.backends import get_backend
from mlx_mla.decoding.http_request import RequestChecks
from mlx_mla.decoding.request import GenerationOptions
from mlx_mla.errors import UserError
from mlx_mla.model.config import ModelConfig
from mlx_mla.model.weights import initial_weights

STOCK = "import mlx_mla.backends.mlx; from mlx_lm.server import main; main()"
N_POSITIONS = 48  # of the tiny run
PROMPTS = ["The st", "A longer prompt of words", "x", "def f(self)", "1, 2, 3"]


@pytest.fixture(scope="module")
def port(folder):
    with serving(folder, "--dtype float32") as port:
        yield port


def good(prompt: str) -> dict:
    return {"prompt": prompt, "max_tokens": 12, "temperature": 0}


BAD = [
    {"prompt": "x" * N_POSITIONS}, {"prompt": "x" * 5000},
    {"prompt": "The", "max_tokens": N_POSITIONS}, {"prompt": "The", "max_tokens": 0},
    {"prompt": "The", "max_completion_tokens": -1}, {"prompt": ""}, {"prompt": ["a", "b"]},
    {"prompt": [1, 2]}, {"prompt": "\ud800"}, {}, {"prompt": "x", "stop": 5},
    {"prompt": "x", "stop": [""]}, {"prompt": "x", "stop": "y" * 1001},
    {"prompt": "x", "logit_bias": {"9999": 1}}, {"prompt": "x", "logit_bias": {"1": None}},
    {"prompt": "x", "logit_bias": [1]}, {"prompt": "x", "top_k": 257, "temperature": 1},
    {"prompt": "x", "top_k": 10**30}, {"prompt": "x", "temperature": math.nan},
    {"prompt": "x", "temperature": True}, {"prompt": "x", "top_p": 1e-320},
    {"prompt": "x", "repetition_penalty": math.inf}, {"prompt": "x", "repetition_penalty": 1e-40},
    {"prompt": "x", "top_logprobs": 12}, {"prompt": "x", "repetition_context_size": 10**30},
    {"prompt": "x", "xtc_probability": 1.0, "xtc_threshold": 0.9}, {"prompt": "x", "seed": -1},
    {"prompt": "x", "model": "another/one"}, {"prompt": "x", "adapters": "/tmp"},
    {"prompt": "x", "stream_options": 3, "stream": True}, b"[1]", b"{", b"\xff\xfe", b"[" * 100_000,
    b'{"prompt": ' + b"9" * 5000 + b"}",
]  # fmt: skip


def test_bad_requests_get_a_400_that_says_why(port):
    for body in BAD:
        status, answer = ask(port, body)
        assert status == 400, (body, answer)
        assert answer["error"], body
    for body in (
        {"messages": []},
        {"messages": [1]},
        {"messages": [{"content": "x"}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "http://x"}]}]},
        {"messages": [{"role": "user", "content": "x" * 100}]},
    ):  # fmt: skip
        assert ask(port, body, "/v1/chat/completions")[0] == 400, body
    assert ask(port, good("x"))[0] == 200


def test_requests_without_a_limit_get_what_fits(port):
    status, answer = ask(port, {"prompt": "The st", "temperature": 0})
    assert status == 200
    assert answer["usage"]["completion_tokens"] <= N_POSITIONS - 6
    assert (
        ask(port, {**good("The st"), "temperature": 1e-40})[1]["choices"]
        == (ask(port, good("The st"))[1]["choices"])
    )
    chat = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 5}
    assert ask(port, chat, "/v1/chat/completions")[0] == 200
    streamed = {**good("The st"), "stream": True, "stream_options": {}}
    assert ask(port, streamed)[0] == 200


def test_the_models_are_the_one_served(port, folder):
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models", timeout=60) as answer:
        names = [m["id"] for m in json.loads(answer.read())["data"]]
    assert names == [str(folder), "default_model"]
    for name in names:
        status, answer = ask(port, {**good("x"), "model": name})
        assert (status, answer["model"]) == (200, name)


def test_a_burst_of_connections_is_answered(port):
    with concurrent.futures.ThreadPoolExecutor(64) as pool:
        answers = list(pool.map(lambda _: ask(port, {"prompt": ""})[0], range(1000)))
    assert answers == [400] * 1000


def under_load(port: int, seconds: float, texts: "Texts") -> tuple[int, int]:
    """16 clients that hold conversations: each request is the last one and its answer. A tenth of
    the requests are bad. Returns how many were good and bad."""
    end = time.monotonic() + seconds

    def client(number: int) -> list[int]:
        counts, turn = [0, 0], number
        prompt = PROMPTS[number % len(PROMPTS)]
        while time.monotonic() < end or min(counts) == 0:
            turn += 1
            if turn % 10 == 3:
                status, answer = ask(port, BAD[turn // 10 % len(BAD)])
                assert 400 <= status < 500, answer
                counts[1] += 1
                continue
            status, answer = ask(port, {"prompt": prompt, "max_tokens": 5, "temperature": 0})
            assert (status, answer["choices"][0]["text"]) == (200, texts(prompt, 5)), prompt
            counts[0] += 1
            prompt += answer["choices"][0]["text"]
            if len(prompt.encode()) > N_POSITIONS - 5:
                prompt = PROMPTS[turn % len(PROMPTS)]
        return counts

    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        counts = list(pool.map(client, range(16)))
    return sum(good for good, _ in counts), sum(bad for _, bad in counts)


class Texts:
    """The greedy text after a prompt, without server, batch or an earlier cache."""

    def __init__(self, folder):
        self.decoder = get_backend("mlx").decoder(checkpoint.ModelFolder(folder))
        self.lock, self.known = threading.Lock(), {}

    def __call__(self, prompt: str, max_tokens: int, stop: tuple[str, ...] = ()) -> str:
        key = prompt, max_tokens, stop
        with self.lock:
            if key not in self.known:
                options = GenerationOptions(max_tokens=max_tokens, temp=0, stop=stop)
                tokens = self.decoder.tokenizer.encode(prompt)
                pieces = self.decoder.stream(tokens, options)
                self.known[key] = "".join(piece.text for piece in pieces)
            return self.known[key]


@pytest.fixture(scope="module")
def texts(folder):
    return Texts(folder)


def test_sixteen_conversations_of_which_some_requests_are_wrong(port, texts):
    under_load(port, 2, texts)


@pytest.mark.slow
def test_sixteen_conversations_for_longer(port, texts):
    good, bad = under_load(port, 15, texts)
    assert good > 8 * bad
    assert ask(port, {"prompt": "x", "max_tokens": 1})[0] == 200


@pytest.mark.parametrize("more", [{}, {"seed": 1}], ids=["batched", "single"])
def test_a_prompt_with_its_own_answer_is_answered_as_without_a_cache(port, texts, more):
    """mlx-lm's cache has all of it, and leaves no token to compute."""
    prompt = "def "
    for _ in range(4):
        status, answer = ask(port, {**good(prompt), "max_tokens": 8, **more})
        assert (status, answer["choices"][0]["text"]) == (200, texts(prompt, 8))
        prompt += texts(prompt, 8)
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] > 16


@pytest.mark.parametrize("more", [{}, {"seed": 1}], ids=["batched", "single"])
def test_a_penalty_counts_the_whole_prompt_also_when_it_is_sent_again(port, more):
    request = {**good("abcabcabdabeabf"), "max_tokens": 16, "repetition_penalty": 1.8, **more}
    first, *others = (ask(port, request)[1]["choices"][0]["text"] for _ in range(3))
    assert others == [first, first]


def test_stock_mlx_lm_outlives_a_request_that_is_too_long(folder):
    """Stock `mlx_lm.server`, on our model file alone: the long request ends, others continue."""
    with started("-c", STOCK, "--model", folder, "--trust-remote-code") as served:
        port = served.port
        alone = ask(port, good("The st"))
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            long = pool.submit(ask, port, {"prompt": "x" * 100, "max_tokens": 9})
            default = pool.submit(ask, port, {"prompt": "The st", "temperature": 0})  # 512 tokens
            others = [pool.submit(ask, port, good("The st")) for _ in range(4)]
            for other in others:
                assert other.result()[1]["choices"] == alone[1]["choices"]
            for status, answer in (long.result(), default.result()):
                assert status == 200
                assert answer["choices"][0]["finish_reason"] == "stop"
            assert long.result()[1]["choices"][0]["text"] == ""
            assert default.result()[1]["usage"]["completion_tokens"] <= N_POSITIONS - 6 + 2
        assert ask(port, good("The st"))[1]["choices"] == alone[1]["choices"]


def test_the_answer_gets_the_room_that_the_prompt_leaves():
    checks = RequestChecks(10, 257, ["m", "default_model"], 512)
    assert checks.room([1, 2, 3], None) == 7
    assert checks.room([1] * 9, 1) == 1
    with pytest.raises(UserError, match="10 prompt tokens exceed the model's n_positions=10"):
        checks.room([1] * 10, None)
    with pytest.raises(UserError, match="3 prompt tokens and max_tokens 8 exceed"):
        checks.room([1, 2, 3], 8)
    with pytest.raises(UserError, match="does not belong to this model"):
        checks.room([1, 257], None)


TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'robot' %}{{ raise_exception('no robots') }}{% endif %}"
    "{{ m.role }}: {{ m.content }}{% if m.tool_calls %}{{ m.tool_calls[0].function.arguments.x }}"
    "{% endif %}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.fixture(scope="module")
def bpe(tmp_path_factory, text_file):
    """A model folder whose tokens are several characters long, with a chat template."""
    import tokenizers
    import transformers

    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<|endoftext|>"], initial_alphabet=sorted(alphabet)
    )
    tokenizer.train_from_iterator([text_file.read_text(encoding="utf-8"), "a\n\nb " * 99], trainer)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>", chat_template=TEMPLATE
    )
    model = ModelConfig(
        n_layer=2, n_head=2, n_embd=32, n_positions=128, kv_lora_rank=16, vocab_size=len(fast)
    ).resolved()
    folder = tmp_path_factory.mktemp("bpe") / "model"
    folder.mkdir()
    checkpoint.write_model(folder, model, initial_weights(model, 3, 0.3), fast, "")
    return folder


@pytest.fixture(scope="module")
def bpe_port(bpe):
    with serving(bpe, "--dtype float32") as port:
        yield port


def streamed(port: int, body: dict, path: str = "/v1/completions") -> tuple[str, str]:
    """Text and reason of the end of an answer that comes in events."""
    data = json.dumps({**body, "stream": True}).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data)
    with urllib.request.urlopen(request, timeout=120) as answer:
        events = [line[6:] for line in answer.read().splitlines() if line.startswith(b"data: {")]
    choices = [json.loads(event)["choices"][0] for event in events]
    return "".join(c["text"] for c in choices), choices[-1]["finish_reason"]


def test_stop_texts_are_matched_on_text(bpe, bpe_port):
    """Where a stop text ends inside a token, as `generate` stops."""
    texts, prompt = Texts(bpe), "The "
    whole = texts(prompt, 60)
    inside = [whole[i : i + n] for i in range(3, len(whole) - 3, 7) for n in (1, 2, 3)]
    for stop in [[s] for s in inside] + [inside[::5]]:
        expected = texts(prompt, 60, tuple(stop))
        assert len(expected) < len(whole)
        body = {**good(prompt), "max_tokens": 60, "stop": stop}
        answer = ask(bpe_port, body)[1]["choices"][0]
        assert (answer["text"], answer["finish_reason"]) == (expected, "stop"), stop
        assert streamed(bpe_port, body) == (expected, "stop"), stop
    body = {**good(prompt), "max_tokens": 60, "stop": ["nowhere", whole[-2:] + "x"], "seed": 1}
    answer = ask(bpe_port, body)[1]["choices"][0]
    assert (answer["text"], answer["finish_reason"]) == (whole, "length")
    assert streamed(bpe_port, body) == (whole, "length")


def chat(port: int, *messages: dict, **more: Any) -> tuple[int, dict]:
    body = {"messages": list(messages), "max_tokens": 5, "temperature": 0, **more}
    return ask(port, body, "/v1/chat/completions")


@pytest.mark.parametrize("name", ["port", "bpe_port"])
def test_content_may_be_parts_or_null_beside_tool_calls(name, request):
    port = request.getfixturevalue(name)
    text = {"role": "user", "content": "ab"}
    parts = {"role": "user", "content": [{"type": "text", "text": t} for t in "ab"]}
    status, plain = chat(port, text)
    assert status == 200
    assert chat(port, parts)[1]["choices"] == plain["choices"]
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    called = {"role": "assistant", "content": None, "tool_calls": [call]}
    assert chat(port, called, {"role": "tool", "content": "2"})[0] == 200


@pytest.mark.parametrize(
    "message",
    [
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]},
        {"role": "user", "content": [{"type": "text"}]},
        {"role": "user", "content": ["a"]},
        {"role": "user", "content": 5},
        {"role": "user", "content": {"text": "a"}},
        {"role": "user", "content": "a\ud800"},
        {"role": "assistant", "content": None, "tool_calls": [{"function": {"arguments": "{"}}]},
        {"role": "assistant", "content": None, "tool_calls": [1]},
        {"role": "robot", "content": "a"},
    ],
)
def test_malformed_messages_get_a_400(bpe_port, message):
    status, answer = chat(bpe_port, {"role": "user", "content": "a"}, message)
    assert status == 400
    assert "messages" in answer["error"]


def test_the_template_counts_against_the_context(bpe_port):
    """With the words that it adds for the answer, and no template of the client's own."""
    message = {"role": "user", "content": "word " * 20}
    tokens = chat(bpe_port, message)[1]["usage"]["prompt_tokens"]
    assert chat(bpe_port, message, max_tokens=128 - tokens)[0] == 200
    status, answer = chat(bpe_port, message, max_tokens=129 - tokens)
    assert (status, f"{tokens} prompt tokens" in answer["error"]) == (400, True)
    own = {"chat_template": "{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}x"}
    status, answer = chat(bpe_port, message, chat_template_kwargs=own)
    assert (status, "chat_template" in answer["error"]) == (400, True)


@pytest.mark.parametrize(
    ("field", "value"),
    [("n", 2), ("n", True), ("best_of", 3), ("echo", True), ("suffix", "x"),
     ("response_format", {"type": "json_object"})],
)  # fmt: skip
def test_what_is_not_done_is_refused_by_name(port, field, value):
    status, answer = ask(port, {**good("x"), field: value})
    assert status == 400
    assert field in answer["error"]


def test_what_is_done_anyway_may_be_asked_for(port):
    more = {"n": 1, "best_of": 1, "echo": False, "suffix": None, "xtc_probability": 0}
    assert ask(port, {**good("x"), **more})[0] == 200


def test_mlx_lms_messages_are_seen():
    code = (
        "import logging; from mlx_mla import serve\n"
        "serve._flags(['--log-level', 'DEBUG']); logging.debug('seen')"
    )
    assert "DEBUG - seen" in ran("-c", code).stderr
