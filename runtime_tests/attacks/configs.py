"""config.json and tokenizer files that say what cannot be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from runtime_tests.attacks.edit import CONFIG, Change, config, drop, grown, json_file, link, raw, section, without

TOKENIZER = "tokenizer.json"
SETTINGS = "tokenizer_config.json"
MODULE = "model.layers.0.mlp.down_proj"
PARTS = ("codes", "scales", "zeros")
_DEEP = b'{"a":' * 100_000


def _pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _vocabulary(value: Any) -> Change:
    return json_file(TOKENIZER, lambda content: content["model"]["vocab"].update({"lie": value}))


def _added(value: Any) -> Change:
    return json_file(TOKENIZER, lambda content: content.update(added_tokens=value))


# Any model folder
CONFIGS: dict[str, Change] = {
    "config missing": lambda folder: (folder / CONFIG).unlink(),
    "config empty": raw(b"", CONFIG),
    "config not JSON": raw(b"{", CONFIG),
    "config a list": raw(b"[]", CONFIG),
    "config not UTF-8": raw(b'{"a": "\xff"}', CONFIG),
    "config nested 100,000 deep": raw(_DEEP, CONFIG),
    "config nested 200 deep": raw(b'{"a":' * 200 + b"1" + b"}" * 200, CONFIG),
    "config of 40 MB": grown(CONFIG, 40 << 20),
    "config an integer of 5,000 digits": raw(b'{"num_hidden_layers": ' + b"9" * 5000 + b"}", CONFIG),
    "config a link to /dev/zero": link(CONFIG, "/dev/zero"),
    "a billion layers": config(num_hidden_layers=10**9),
    "minus one layer": config(num_hidden_layers=-1),
    "layers as text": config(num_hidden_layers="2"),
    "layers a boolean": config(num_hidden_layers=True),
    "layers a fraction": config(num_hidden_layers=2.0),
    "layers NaN": config(num_hidden_layers=float("nan")),
    "a thousand layers": config(num_hidden_layers=1000),
    "a billion heads": config(num_attention_heads=10**9),
    "heads a list of objects": config(num_attention_heads=[{}]),
    "a billion labels": config(num_labels=10**9),
    "a billion experts": config(num_local_experts=10**9),
    "hidden size 2**60": config(hidden_size=1 << 60),
    "hidden size negative": config(hidden_size=-128),
    "vocabulary of 10**12": config(vocab_size=10**12),
    "vocabulary a boolean": config(vocab_size=True),
    "intermediate size as text": config(intermediate_size="256"),
    "context of 10**30": config(max_position_embeddings=10**30),
    "epsilon NaN": config(rms_norm_eps=float("nan")),
    "epsilon negative": config(rms_norm_eps=-1.0),
    "RoPE base infinite": config(rope_theta=float("inf")),
    "RoPE base 0 inside": config(rope_parameters={"rope_theta": 0.0, "rope_type": "default"}),
    "architectures as text": config(architectures="LlamaForCausalLM"),
    "architectures of numbers": config(architectures=[1]),
    "quantization_config a list": config(quantization_config=[1]),
    "weights in a pickle": _pickle,
}

# L4Q checkpoints
SECTIONS: dict[str, Change] = {
    "no quantization_config": without("quantization_config"),
    "quant_method a list": section(quant_method=["l4q"]),
    "format_version 99": section(format_version=99),
    "format_version as text": section(format_version="1"),
    "bits 1000": section(bits=1000),
    "bits 0": section(bits=0),
    "bits negative": section(bits=-4),
    "bits a boolean": section(bits=True),
    "bits a fraction": section(bits=4.0),
    "bits a list": section(bits=[4]),
    "bits missing": section(bits=None),
    "group_size 0": section(group_size=0),
    "group_size -1.0": section(group_size=-1.0),
    "group_size -64": section(group_size=-64),
    "group_size 31": section(group_size=31),
    "group_size 2**40": section(group_size=1 << 40),
    "group_size as text": section(group_size="64"),
    "another group_size than the tensors": section(group_size=64),
    "zero_point unknown": section(zero_point="some"),
    "zero_point a list": section(zero_point=["integer"]),
    "scale_grid unknown": section(scale_grid="fp4"),
    "scale_grid an object": section(scale_grid={}),
    "grid of a K type": section(scale_grid="q4_k"),
    "modules a list": section(modules=[1]),
    "modules of no grid": section(modules={MODULE: {"bits": 1000, "group_size": 32, "zero_point": "none"}}),
    "modules of no such name": section(modules={"x": {"bits": 3, "group_size": 32, "zero_point": "none"}}),
    "fewer layers than tensors": config(num_hidden_layers=1),
    "more layers than tensors": config(num_hidden_layers=3),
    "a smaller vocabulary than the embedding": config(vocab_size=300),
    "another hidden size than the embedding": config(hidden_size=64),
    "no embedding": drop("model.embed_tokens.weight"),
    "a layer without one linear": drop(*(f"{MODULE}.{part}" for part in PARTS)),
    "a layer without one norm": drop("model.layers.1.input_layernorm.weight"),
}
# Files that exports copy
LINKS: dict[str, Change] = {
    "licence a link out of the folder": link("LICENSE", "/etc/hostname"),
    "tokenizer a link out of the folder": link(TOKENIZER, "/etc/hostname"),
}

TOKENIZERS: dict[str, Change] = {
    "tokenizer random bytes": raw(bytes(range(256)) * 8, TOKENIZER),
    "tokenizer a list": raw(b"[1]", TOKENIZER),
    "tokenizer nested 100,000 deep": raw(_DEEP, TOKENIZER),
    "tokenizer id 2**40": _vocabulary(1 << 40),
    "tokenizer id negative": _vocabulary(-1),
    "tokenizer id as text": _vocabulary("7"),
    "tokenizer id a fraction": _vocabulary(0.5),
    "tokenizer vocabulary a list": json_file(TOKENIZER, lambda content: content["model"].update(vocab=[1, 2])),
    "tokenizer merges of numbers": json_file(TOKENIZER, lambda content: content["model"].update(merges=[1, 2])),
    "tokenizer added tokens of numbers": _added([1]),
    "tokenizer added tokens an object": _added({"a": 1}),
    "tokenizer added id 2**62": _added([{"id": 1 << 62, "content": "x", "special": True}]),
    "tokenizer model a list": json_file(TOKENIZER, lambda content: content.update(model=[1])),
    "tokenizer pre_tokenizer unknown": json_file(TOKENIZER, lambda content: content.update(pre_tokenizer=[])),
    "tokenizer settings a list": raw(b"[]", SETTINGS),
    "tokenizer settings not JSON": raw(b"\x00\x01", SETTINGS),
}

CODE: dict[str, Change] = {
    "code in config.json": config(auto_map={"AutoModelForCausalLM": "evil.Model", "AutoConfig": "evil.Config"}),
}
