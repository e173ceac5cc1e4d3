"""Settings: presets, TOML both ways, and what is refused."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_mla import files
from mlx_mla.errors import UserError
from mlx_mla.model import config as c
from mlx_mla.model import presets
from mlx_mla.model.train_config import TrainConfig


@pytest.mark.parametrize("name", presets.PRESETS)
def test_presets_survive_a_round_trip_through_toml(name, tmp_path):
    config = presets.preset(name).resolved()
    path = tmp_path / "config.toml"
    path.write_text(presets.to_toml(config))
    assert presets.overlay(TrainConfig(), files.read_toml(path), "x") == config


@given(
    steps=st.integers(1, 10**9),
    learning_rate=st.floats(1e-12, 1e3),
    data=st.text(st.characters(codec="utf-8", exclude_categories=["Cs"])),
)
def test_any_value_survives_a_round_trip_through_toml(steps, learning_rate, data):
    config = TrainConfig(steps=steps, learning_rate=learning_rate, data=data)
    assert (
        presets.overlay(TrainConfig(), files.parse_toml(presets.to_toml(config), "x"), "x")
        == config
    )


def test_none_is_resolved_from_the_other_fields():
    model = c.ModelConfig(n_embd=96, n_head=4).resolved(257)
    assert (model.kv_lora_rank, model.v_head_dim, model.n_inner, model.vocab_size) == (
        48,
        24,
        384,
        257,
    )
    assert model.attention_bias is False
    assert c.ModelConfig(attention="mha").resolved(257).attention_bias is True
    assert model.resolved(257) == model


def test_positions_that_are_not_named_are_as_before_they_had_a_name():
    for values, positions in (
        ({}, "learned"),
        ({"qk_rope_head_dim": 8}, "rope"),
        ({"attention": "mha"}, "learned"),
    ):
        assert c.ModelConfig(**values).resolved(257).position_embedding_type == positions


def test_a_head_width_of_its_own_needs_no_division():
    model = c.ModelConfig(n_embd=100, n_head=12, head_dim=16).resolved(257)
    assert (model.v_head_dim, model.attention_spec.head_widths) == (16, (16, 16))
    tied = c.ModelConfig(n_embd=100, n_head=12, kv_lora_rank=24, attention_k_eq_v=True)
    assert tied.resolved(257).attention_spec.head_widths == (24, 24)
    assert tied.resolved(257).resolved(257) == tied.resolved(257)


def test_every_comparison_is_one_flag_apart():
    nano = presets.preset("mla-124m").model
    mha = dataclasses.replace(c.ModelConfig(), attention="mha").resolved(50257)
    assert mha == presets.preset("gpt2-124m").resolved().model
    assert dataclasses.replace(
        mha, attention="mla", attention_bias=False, kv_lora_rank=384, v_head_dim=64
    ) == (nano.resolved(50257))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"n_embd": 100, "n_head": 12},
         "--n-embd 100 is not divisible by --n-head 12; try --n-embd 96"),
        ({"n_layer": 0}, "--n-layer must be at least 1"),
        ({"kv_lora_rank": 0}, "--kv-lora-rank must be at least 1, not 0"),
        ({"n_layer": 2, "kv_lora_ranks": [8]},
         "--kv-lora-ranks needs 2 widths, one for each layer with its own latent, not 8"),
        ({"n_layer": 2, "kv_lora_ranks": [8, 0]}, "--kv-lora-ranks must be at least 1, not 0"),
        ({"n_layer": 1, "kv_lora_ranks": [8], "kv_lora_rank": 4},
         "--kv-lora-rank 4 is not the largest"),
        ({"attention": "mha", "kv_lora_ranks": [8] * 12}, "no meaning with --attention mha"),
        ({"kv_lora_rank": -3}, "--kv-lora-rank must be at least 1, not -3"),
        ({"qk_rope_head_dim": 3}, "--qk-rope-head-dim must be even, not 3; use 4"),
        ({"qk_rope_head_dim": -2}, "--qk-rope-head-dim must not be negative, not -2"),
        ({"n_layer": 3_000_000}, "--n-layer must be at most 1,000, not 3000000"),
        ({"n_layer": 1, "kv_lora_ranks": [2**40]}, "--kv-lora-ranks must be at most 1,048,576"),
        ({"layer_norm_epsilon": 0.0}, "--layer-norm-epsilon must be at least 1e-12, not 0.0"),
        ({"layer_norm_epsilon": float("inf")}, "--layer-norm-epsilon must be a finite number"),
        ({"layer_norm_epsilon": -1e-5}, "--layer-norm-epsilon must be at least 1e-12"),
        ({"rope_theta": float("nan")}, "--rope-theta must be a finite number, not nan"),
        ({"rope_theta": 0.0}, "--rope-theta must be at least 1, not 0.0"),
        ({"rope_theta": -5.0}, "--rope-theta must be at least 1"),
        ({"dropout": float("nan")}, "--dropout must be a finite number"),
        ({"vocab_size": 100}, "--vocab-size 100 is smaller than the tokenizer's 257"),
        ({"dropout": 1.0}, "--dropout must be at least 0 and below 1, not 1.0"),
        ({"num_kv_shared_layers": 12}, "--num-kv-shared-layers must be from 0 to 11"),
        ({"num_kv_shared_layers": -1}, "--num-kv-shared-layers must not be negative"),
        ({"n_layer": 3, "num_kv_shared_layers": 1, "kv_lora_ranks": [8] * 3},
         "--kv-lora-ranks needs 2 widths"),
        ({"attention": "mha", "num_kv_shared_layers": 1}, "no meaning with --attention mha"),
        (
            {"attention_k_eq_v": True, "kv_lora_rank": 64, "head_dim": 32},
            "--head-dim 32: with --attention-k-eq-v a head is as wide as the latent, "
            "--kv-lora-rank 64; leave it out",
        ),
        ({"attention_k_eq_v": True, "v_head_dim": 32}, "--v-head-dim 32: with --attention-k-eq-v"),
        ({"n_layer": 1, "attention_k_eq_v": True, "kv_lora_ranks": [64]},
         "use --kv-lora-rank instead of --kv-lora-ranks"),
        ({"attention": "mha", "attention_k_eq_v": True}, "no meaning with --attention mha"),
        ({"head_dim": 0}, "--head-dim must be at least 1"),
        ({"num_key_value_heads": 3}, "--num-key-value-heads has no meaning with --attention mla"),
        ({"attention": "mha", "num_key_value_heads": 5},
         "--num-key-value-heads 5 does not divide --n-head 12; use one of 1, 2, 3, 4, 6, 12"),
        ({"attention": "mha", "num_key_value_heads": -1},
         "--num-key-value-heads must be at least 1"),
        ({"attention": "mha", "head_dim": 5, "position_embedding_type": "rope"},
         "a head is 5 wide; use --head-dim 6"),
        ({"position_embedding_type": "rope"}, "use --qk-rope-head-dim 32"),
        ({"position_embedding_type": "learned", "qk_rope_head_dim": 8},
         "excludes a part with RoPE; use --qk-rope-head-dim 0"),
        ({"attention": "mha", "kv_lora_rank": 8}, "no meaning with --attention mha"),
    ],
)  # fmt: skip
def test_impossible_models_are_refused(values, message):
    with pytest.raises(UserError, match=message):
        c.ModelConfig(**values).resolved(257)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": 0}, "--steps must be at least 1"),
        ({"batch_size": -1}, "--batch-size"),
        ({"learning_rate": 0.0}, "--learning-rate must be positive"),
        ({"learning_rate": float("nan")}, "--learning-rate must be a finite number, not nan"),
        ({"adam_epsilon": float("inf")}, "--adam-epsilon must be a finite number, not inf"),
        ({"seed": -1}, "--seed must not be negative, not -1"),
        ({"seed": 2**64}, "--seed must be at most 9,223,372,036,854,775,807"),
        ({"batch_size": 10**9}, "--batch-size must be at most 1,048,576"),
        ({"weight_decay": -0.1}, "--weight-decay must not be negative"),
        ({"val_fraction": 1.0}, "--val-fraction must be between 0 and 1, not 1.0"),
        ({"val_fraction": 0.0}, "--val-fraction must be between 0 and 1, not 0.0"),
        ({"beta1": 1.0}, "--beta1 must be at least 0 and below 1, not 1.0"),
        ({"min_lr_ratio": 1.5}, "--min-lr-ratio must be from 0 to 1, not 1.5"),
        ({"seq_len": 2000}, r"--seq-len must be from 1 to --n-positions \(1024\)"),
        ({"bpe_dir": "x"}, "--bpe-dir requires --tokenizer gpt2"),
    ],
)
def test_impossible_training_is_refused(values, message):
    with pytest.raises(UserError, match=message):
        TrainConfig(**values).resolved()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stepz = 3", "unknown key 'stepz'; did you mean 'steps'"),
        ("n_embd = 64", r"unknown key 'n_embd'; it belongs under \[model\]"),
        ("[model]\nn_embed = 64", r"\[model\]: unknown key 'n_embed'; did you mean 'n_embd'"),
        ("steps = 'many'", "steps = 'many' is not a value of type int"),
        ("steps = true", "steps = True is not a value of type int"),
        ("dtype = 'fp8'", "dtype = 'fp8' is not one of 'float32', 'bfloat16'"),
        ("model = 3", r"'model' must be a table"),
        (
            "[model]\nposition_embedding_type = 'alibi'",
            r"position_embedding_type = 'alibi' is not one of 'learned', 'rope'",
        ),
        ("[model]\nkv_lora_ranks = [8, 'x']", r"kv_lora_ranks\[1\] = 'x' is not a value of type"),
        ("steps = ", "not valid TOML"),
        ("steps = " + "9" * 5000, "not valid TOML: a number of thousands of digits"),
        ("steps = " + "[" * 5000, "not valid TOML: nested too deeply"),
        ("steps = [[[1]]]", r"steps = \[\[\[1\]\]\] is not a value of type int"),
        (b"data = '\xff'", "not UTF-8 text .byte 0xff at offset 8."),
    ],
)
def test_mistakes_in_toml_are_named(text, message, tmp_path):
    path = tmp_path / "config.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=message):
        presets.overlay(TrainConfig(), files.read_toml(path), str(path))


def test_unknown_preset_names_the_nearest():
    with pytest.raises(UserError, match="did you mean 'mla-124m'"):
        presets.preset("mla-125m")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"n_layer": "twelve"}, "m/config.json: n_layer = 'twelve' is not a value of type int"),
        ({"n_layer": True}, "n_layer = True is not a value of type int"),
        ({"n_embd": [768]}, r"n_embd = \[768\] is not a value of type int"),
        ({"attention": ["mla"]}, "attention = .* is not one of 'mla', 'mha'"),
        ({"kv_lora_ranks": [8, "8"]}, "kv_lora_ranks.1. = .8. is not a value of type"),
        ({"rope_theta": 10**400}, "rope_theta must be a number of at most 64 bits"),
        ({"n_layer": 3_000_000}, "m/config.json: n_layer must be at most 1,000"),
    ],
)
def test_wrong_values_of_a_model_file_are_named(values, message):
    with pytest.raises(UserError, match=message):
        c.ModelConfig.read({"vocab_size": 257, **values}, "m/config.json")
