"""Tiny Qwen3 checkpoints, made on the spot: nothing is downloaded.

A model with random weights is enough to measure and test a KV cache, on one condition: its tokens
must depend on the cached keys and values. With the usual small weights the output hardly notices a
zeroed cache, and a test of "same tokens" would pass on a broken one. So the weights are wide and
the attention is sharp (`ModelShape`).

Comparing tokens: a prompt computed in one piece and the same prompt continued from cached blocks
differ in rounding. In bfloat16 that is enough to change a token of such a model now and then, with
the engine's own prefix cache as well. Compare in float32, or runs that computed the same pieces.

    path = write_checkpoint(Path("checkpoints/tiny"), TINY)
    llm = LLM(model=str(path), dtype="bfloat16")
"""

import json
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
"""Tokens 256, 257 and 258; below them, token `b` is the byte `b`."""

VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

_STAMP_NAME = "checkpoint_stamp.json"
_FORMAT_VERSION = 1
"""Goes up whenever the same shape and seed would give other files."""


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a Qwen3 model, and the spread of its random weights."""

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position: int
    """Longest sequence in tokens."""
    vocab_size: int = VOCAB_SIZE
    initializer_range: float = 0.2
    """Standard deviation of every weight that is not a norm; ten times the usual 0.02."""
    attention_sharpness: float = 2.5
    """Weight of the query and key norms. At 1 attention is near an average over the prompt, so that
    all prompts look alike and the model repeats one token."""

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of KV cache that one token takes in bfloat16, over all layers."""
        return self.num_layers * 2 * self.num_kv_heads * self.head_dim * 2


TINY = ModelShape(
    num_layers=2,
    hidden_size=128,
    intermediate_size=256,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    max_position=4096,
)
"""For tests: everything but the engine's own start-up is fast. 1 KiB of KV a token."""

TTFT = ModelShape(
    num_layers=8,
    hidden_size=128,
    intermediate_size=256,
    num_heads=8,
    num_kv_heads=8,
    head_dim=128,
    max_position=16384,
)
"""For measuring copies: a small model with the KV cache of a large one, 32 KiB a token."""

DEMO = ModelShape(
    num_layers=4,
    hidden_size=512,
    intermediate_size=1024,
    num_heads=8,
    num_kv_heads=4,
    head_dim=64,
    max_position=8192,
)
"""For the prefix-reuse demo: a thousand tokens take about a second on two cores. 4 KiB a token."""


def write_checkpoint(directory: Path, shape: ModelShape, seed: int = 0) -> Path:
    """Make `directory` hold the checkpoint of `shape` and `seed`, unless it does; return it."""
    stamp = {"format": _FORMAT_VERSION, "seed": seed, "shape": asdict(shape)}
    if _read_stamp(directory) == stamp:
        return directory
    directory.mkdir(parents=True, exist_ok=True)
    (directory / _STAMP_NAME).unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(dir=directory, prefix=".partial-") as name:
        partial = Path(name)
        _write_json(partial / "config.json", _model_config(shape))
        _write_weights(partial / "model.safetensors", shape, seed)
        _write_tokenizer(partial, shape.max_position)
        for path in partial.iterdir():
            path.replace(directory / path.name)
        _write_json(partial / _STAMP_NAME, stamp)
        (partial / _STAMP_NAME).replace(directory / _STAMP_NAME)
    return directory


def _read_stamp(directory: Path) -> object:
    """Return what the checkpoint in `directory` was made from; None when absent or unfinished."""
    try:
        return json.loads((directory / _STAMP_NAME).read_text())
    except (OSError, ValueError):
        return None


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def _model_config(shape: ModelShape) -> dict[str, object]:
    """Return the config.json of a Qwen3 model of this shape."""
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "dtype": "bfloat16",
        "num_hidden_layers": shape.num_layers,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "max_position_embeddings": shape.max_position,
        "vocab_size": shape.vocab_size,
        "initializer_range": shape.initializer_range,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 1_000_000.0,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": False,
        "use_cache": True,
        "bos_token_id": None,
        "eos_token_id": 256,
        "pad_token_id": 256,
    }


def _tensor_shapes(shape: ModelShape) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the name and shape of every tensor of the model; the norms are those with one axis."""
    hidden = shape.hidden_size
    yield "model.embed_tokens.weight", (shape.vocab_size, hidden)
    for layer in range(shape.num_layers):
        for name, size in _layer_tensor_shapes(shape):
            yield f"model.layers.{layer}.{name}.weight", size
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (shape.vocab_size, hidden)


def _layer_tensor_shapes(shape: ModelShape) -> list[tuple[str, tuple[int, ...]]]:
    """Return the name and shape of every tensor of one layer."""
    hidden, inner = shape.hidden_size, shape.intermediate_size
    query, key_value = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    return [
        ("input_layernorm", (hidden,)),
        ("self_attn.q_proj", (query, hidden)),
        ("self_attn.k_proj", (key_value, hidden)),
        ("self_attn.v_proj", (key_value, hidden)),
        ("self_attn.o_proj", (hidden, query)),
        ("self_attn.q_norm", (shape.head_dim,)),
        ("self_attn.k_norm", (shape.head_dim,)),
        ("post_attention_layernorm", (hidden,)),
        ("mlp.gate_proj", (inner, hidden)),
        ("mlp.up_proj", (inner, hidden)),
        ("mlp.down_proj", (hidden, inner)),
    ]


def _write_weights(path: Path, shape: ModelShape, seed: int) -> None:
    """Write seeded normal weights (norms: constants) in bfloat16."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, size in _tensor_shapes(shape):
        if len(size) == 1:
            sharp = name.endswith(("q_norm.weight", "k_norm.weight"))
            value = shape.attention_sharpness if sharp else 1.0
            tensors[name] = torch.full(size, value, dtype=torch.bfloat16)
        else:
            values = torch.randn(size, generator=generator) * shape.initializer_range
            tensors[name] = values.to(torch.bfloat16)
    save_file(tensors, path, metadata={"format": "pt"})


def _write_tokenizer(directory: Path, max_length: int) -> None:
    """Write a tokenizer in which every byte is a token, with a chat template."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {symbol: byte for byte, symbol in enumerate(_byte_symbols())}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    fast = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        eos_token=SPECIAL_TOKENS[0],
        pad_token=SPECIAL_TOKENS[0],
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(directory)


def _byte_symbols() -> list[str]:
    """Return the character that byte-level BPE writes for each byte, in byte order."""
    spans = (("!", "~"), ("¡", "¬"), ("®", "ÿ"))
    printable = {byte for first, last in spans for byte in range(ord(first), ord(last) + 1)}
    unprintable = (byte for byte in range(256) if byte not in printable)
    moved = {byte: chr(256 + index) for index, byte in enumerate(unprintable)}
    return [moved.get(byte, chr(byte)) for byte in range(256)]
