"""What the converter reads, spoiled by the fuzzer: configurations, weights of every format and
tokenizers.

A few cases of each by default, thousands among the slow tests.
"""

import io
import json
import pickle
import zipfile

import pytest

torch = pytest.importorskip("torch")

import foreign
import fuzz

from convert import __main__ as convert
from mlx_mla import checkpoint, generate
from mlx_mla.data.tokenizer import ByteTokenizer
from mlx_mla.files import SUMS

SEED = 16
SIZE = {"n_layer": 2, "n_embd": 16, "vocab_size": 257}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Sources of every kind, as bytes by name within a folder."""
    root = tmp_path_factory.mktemp("whole")
    model = foreign.gpt2(**SIZE)
    exact = foreign.gpt2(**SIZE, activation_function="gelu")
    model.save_pretrained(str(root / "hf"))
    tokenizer = ByteTokenizer().fast_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(str(root / "hf"))
    model.save_pretrained(str(root / "shards"), max_shard_size="8KB")
    (root / "bin").mkdir()
    (root / "bin" / "config.json").write_bytes((root / "hf" / "config.json").read_bytes())
    torch.save(model.state_dict(), root / "bin" / "pytorch_model.bin")
    for name in ("nanogpt", "build", "mingpt", "original", "llmc"):
        (root / name).mkdir()
    foreign.save_nanogpt(root / "nanogpt" / "ckpt.pt", exact)
    characters = [chr(i) for i in range(257)]
    meta = {"vocab_size": 257, "itos": dict(enumerate(characters))}
    (root / "nanogpt" / "meta.pkl").write_bytes(pickle.dumps(meta))
    foreign.save_build_nanogpt(root / "build" / "model.pt", model)
    untied = foreign.gpt2(**SIZE, tie_word_embeddings=False)
    foreign.save_mingpt(root / "mingpt" / "model.pt", untied)
    foreign.save_original(root / "original" / "step.pt", foreign.Original(width=16, vocab=257))
    foreign.save_llmc(root / "llmc" / "model.bin", model, 3, 257)
    out = str(root / "ours")
    assert convert.main([str(root / "hf"), "--out", out, "--to", "mla", "--rank", "8"]) == 0
    return {
        folder.name: {p.name: p.read_bytes() for p in folder.iterdir()} for folder in root.iterdir()
    }


def mutate_pickle(random: fuzz.Random, data: bytes) -> bytes:
    """A torch.save archive with other bytes: in its pickle, in its tensors, or of the archive."""
    if random.random() < 0.3:
        return fuzz.mutate_bytes(random, data)
    with zipfile.ZipFile(io.BytesIO(data)) as old:
        entries = {e.filename: old.read(e) for e in old.infolist()}
    names = list(entries)
    pickles = [n for n in names if n.endswith(".pkl")]
    name = random.choice(pickles if random.random() < 0.8 else names)
    mutate = fuzz.mutate_opcodes if name in pickles else fuzz.mutate_bytes
    entries[name] = mutate(random, entries[name])
    if random.random() < 0.1:
        entries.pop(random.choice(names))
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", random.choice((0, 0, 0, 8))) as new:
        for filename, content in entries.items():
            new.writestr(filename, content)
    return buffer.getvalue()


def mutate_json_bytes(random: fuzz.Random, data: bytes) -> bytes:
    return fuzz.mutate_json(random, json.loads(data))


def mutate_tokenizer(random: fuzz.Random, data: bytes) -> bytes:
    """tokenizer.json, most often in its small parts: a vocabulary has many places."""
    values = json.loads(data)
    what = random.randrange(6)
    if what == 0:
        return mutate_json_bytes(random, data)
    if what == 1:
        vocab = values["model"]["vocab"]
        vocab[random.choice([*list(vocab)[:20], "new"])] = random.choice((*fuzz.NUMBERS, 257, "x"))
    elif what == 2:
        patterns = (r"(a+)+$", "[", r"(\w+\s?)+$", "", ".", r"(?=a)", "\\", "x{99999}", r"\p{L}+|")
        values["pre_tokenizer"] = {
            "type": "Split",
            "pattern": {"Regex": random.choice(patterns)},
            "behavior": random.choice(("Isolated", "Removed", "x")),
            "invert": False,
        }
    else:
        part = random.choice(
            ("added_tokens", "pre_tokenizer", "decoder", "normalizer", "post_processor", "padding")
        )
        spoiled = fuzz.mutate_json(random, {part: values.get(part)})
        try:
            values |= json.loads(spoiled)
        except (TypeError, ValueError, RecursionError):
            return spoiled
    return json.dumps(values).encode()


SURFACES = {
    "config": ("hf", "config.json", mutate_json_bytes),
    "safetensors": ("hf", "model.safetensors", fuzz.mutate_safetensors),
    "index": ("shards", "model.safetensors.index.json", mutate_json_bytes),
    "tokenizer": ("hf", "tokenizer.json", mutate_tokenizer),
    "tokenizer config": ("hf", "tokenizer_config.json", mutate_json_bytes),
    "bin": ("bin", "pytorch_model.bin", mutate_pickle),
    "nanogpt": ("nanogpt", "ckpt.pt", mutate_pickle),
    "meta": ("nanogpt", "meta.pkl", fuzz.mutate_opcodes),
    "build": ("build", "model.pt", mutate_pickle),
    "mingpt": ("mingpt", "model.pt", mutate_pickle),
    "original": ("original", "step.pt", mutate_pickle),
    "llmc": ("llmc", "model.bin", fuzz.mutate_bytes),
    "our config": ("ours", "config.json", mutate_json_bytes),
    "our weights": ("ours", checkpoint.WEIGHTS, fuzz.mutate_safetensors),
    "our sums": ("ours", SUMS, lambda random, data: fuzz.mutate_text(random, data.decode())),
}
FILES = {"nanogpt": "ckpt.pt", "build": "model.pt", "mingpt": "model.pt", "original": "step.pt",
         "llmc": "model.bin"}  # fmt: skip
WAYS = ([], [], ["--to", "mla", "--rank", "4"], ["--to", "mla", "--rank-budget", "5"],
        ["--to", "hf"])  # fmt: skip


def spoil(whole, surface: str):
    kind, spoiled, mutate = SURFACES[surface]

    def write(random: fuzz.Random, folder):
        src = folder / "src"
        src.mkdir()
        for name, data in whole[kind].items():
            (src / name).write_bytes(mutate(random, data) if name == spoiled else data)
        if kind == "ours" and spoiled != SUMS:
            (src / SUMS).unlink()  # which alone would refuse it
        # GPT-2's own tokenizer would be downloaded.
        own = (src / "tokenizer.json").exists() or (src / "meta.pkl").exists()
        flags = [] if own else ["--tokenizer", "bytes"]
        flags += ["--n-head", "2"] if kind == "mingpt" else []
        flags += random.choice(WAYS)
        return [str(src / FILES.get(kind, "")), "--out", str(folder / "out"), *flags]

    return write


def convert_and_generate(argv) -> int:
    """What was converted after all is also of use."""
    code = convert.main(argv)
    if code or argv[-2:] == ["--to", "hf"]:
        return code
    prompt = "a <|endoftext|>b\n é"
    flags = ["--prompt", prompt, "--max-tokens", "3", "--backend", "torch", "--device", "cpu"]
    return generate.main(["--model", argv[argv.index("--out") + 1], *flags])


@pytest.mark.parametrize("surface", SURFACES)
def test_spoiled_sources(surface, whole, tmp_path):
    fuzz.fuzz(convert_and_generate, spoil(whole, surface), 6, SEED, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("surface", SURFACES)
def test_spoiled_sources_by_the_hundred(surface, whole, fuzz_many):
    name = f"convert: {surface}"
    codes = fuzz_many(name, convert_and_generate, spoil(whole, surface), 150)
    assert codes[0] and 5 * codes[2] > sum(codes.values())  # some spoiling is harmless
