"""Turn the folder that tools/train_demo.py wrote into the GGUF file and the model card that ship with gllm-driver.

    python tools/make_demo_gguf.py export demo gllm-demo-q8_0.gguf --packed corpus.jsonl.xz
    python tools/make_demo_gguf.py card demo docs

`export` with --packed also measures the held-out perplexity of the quantized file itself (needs torch, a minute or two
on two cores) and writes it into the folder's metrics.json; `card` fills tools/demo_card.md from metrics.json, so that
no figure is typed by hand.
"""

from __future__ import annotations

import argparse
import json
import shutil
import string
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import demo_corpus
import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType, GGUFWriter

F32Array = npt.NDArray[np.float32]

ROW_MULTIPLE = 32  # values in a block of Q8_0
MAX_NBYTES = 8_000_000
DESCRIPTION = (
    "Demonstration model: completes Python-like text. Trained only on the sources of the CPython standard library "
    "(PSF licence); its output is not to be relied on."
)
# Hugging Face name inside a layer -> GGUF name inside a block
LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def interleave(weight: F32Array, num_heads: int) -> F32Array:
    """Reorder the rows of a Q or K projection [num_heads * head_dim, hidden]: Hugging Face rotates row i against row
    i + head_dim/2 of a head, GGUF's "llama" architecture row 2i against row 2i + 1."""
    return weight.reshape(num_heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def deinterleave(weight: F32Array, num_heads: int) -> F32Array:
    return weight.reshape(num_heads, -1, 2, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def gguf_names(config: dict[str, Any]) -> dict[str, tuple[str, int]]:
    """Hugging Face tensor name -> (GGUF name, heads whose rows are reordered, or 0)."""
    names = {"model.embed_tokens.weight": ("token_embd.weight", 0), "model.norm.weight": ("output_norm.weight", 0)}
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    for layer in range(config["num_hidden_layers"]):
        for theirs, ours in LAYER_NAMES.items():
            names[f"model.layers.{layer}.{theirs}.weight"] = (f"blk.{layer}.{ours}.weight", heads.get(ours, 0))
    return names


def read_json(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def add_metadata(writer: GGUFWriter, config: dict[str, Any], file_type: int) -> None:
    from gguf import GGML_QUANT_VERSION

    writer.add_name("gllm-demo")
    writer.add_description(DESCRIPTION)
    writer.add_license("apache-2.0")
    writer.add_size_label("7M")
    writer.add_tags(["demonstration", "python"])
    writer.add_file_type(file_type)
    writer.add_quantization_version(GGML_QUANT_VERSION)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    # so small a model repeats itself when it always takes the likeliest token
    writer.add_float32("general.sampling.temp", 0.7)
    writer.add_float32("general.sampling.top_p", 0.9)
    writer.add_float32("general.sampling.min_p", 0.05)


def add_tokenizer(writer: GGUFWriter, tokenizer: dict[str, Any], chat_template: str) -> None:
    """The vocabulary of a tokenizer.json: byte-level BPE is GGUF's "gpt2" model."""
    from gguf import TokenType

    vocab: dict[str, int] = tokenizer["model"]["vocab"]
    tokens = sorted(vocab, key=vocab.__getitem__)
    if [vocab[token] for token in tokens] != list(range(len(tokens))):
        raise ValueError("tokenizer.json: token ids have gaps")
    special = {added["content"] for added in tokenizer["added_tokens"]}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(demo_corpus.PRE_TOKENIZER_NAME)
    writer.add_token_list(tokens)
    writer.add_token_types([TokenType.CONTROL if token in special else TokenType.NORMAL for token in tokens])
    writer.add_token_merges([" ".join(merge) for merge in tokenizer["model"]["merges"]])
    writer.add_eos_token_id(vocab[demo_corpus.END_OF_TEXT])
    writer.add_eot_token_id(vocab[demo_corpus.IM_END])
    writer.add_add_bos_token(False)
    writer.add_chat_template(chat_template)


def export(source: Path, target: Path, matrix_type: GGMLQuantizationType) -> None:
    """Write the Hugging Face folder `source` as GGUF: matrices as `matrix_type`, norms F32.

    Raises ValueError where a matrix row does not fill whole blocks, or the weights are not the ones config.json
    asks for."""
    from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType, quants
    from safetensors.numpy import load_file

    config = read_json(source / "config.json")
    weights = load_file(source / "model.safetensors")
    names = gguf_names(config)
    if names.keys() != weights.keys():
        raise ValueError(f"{source}: tensors differ from config.json in {sorted(names.keys() ^ weights.keys())[:5]}")
    file_types = {
        GGMLQuantizationType.F32: LlamaFileType.ALL_F32,
        GGMLQuantizationType.F16: LlamaFileType.MOSTLY_F16,
        GGMLQuantizationType.Q8_0: LlamaFileType.MOSTLY_Q8_0,
    }
    writer = GGUFWriter(target, "llama")
    add_metadata(writer, config, file_types[matrix_type])
    chat_template = read_json(source / "tokenizer_config.json")["chat_template"]
    add_tokenizer(writer, read_json(source / "tokenizer.json"), chat_template)
    for theirs, (ours, num_heads) in names.items():
        weight: F32Array = weights[theirs].astype(np.float32)
        if weight.ndim == 2 and weight.shape[1] % ROW_MULTIPLE:
            raise ValueError(f"{theirs}: rows of {weight.shape[1]} values; a block holds {ROW_MULTIPLE}")
        if num_heads:
            weight = interleave(weight, num_heads)
        kind = matrix_type if weight.ndim == 2 else GGMLQuantizationType.F32
        writer.add_tensor(ours, quants.quantize(weight, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def dequantize(path: Path, config: dict[str, Any]) -> dict[str, F32Array]:
    """The weights of a GGUF file that `export` wrote, float32 under Hugging Face names."""
    from gguf import GGUFReader, quants

    tensors = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
    weights: dict[str, F32Array] = {}
    for theirs, (ours, num_heads) in gguf_names(config).items():
        weight = quants.dequantize(tensors[ours].data, tensors[ours].tensor_type)
        weights[theirs] = deinterleave(weight, num_heads) if num_heads else weight
    return weights


def measure(path: Path, source: Path, corpus: demo_corpus.Corpus) -> dict[str, float]:
    """Held-out figures of the weights in a GGUF file, computed in float32."""
    import dataclasses

    import torch
    import train_demo
    from demo_model import DemoConfig, DemoModel
    from tokenizers import Tokenizer

    settings = read_json(source / "config.json")
    model = DemoModel(DemoConfig(**{f.name: settings[f.name] for f in dataclasses.fields(DemoConfig)}))
    weights = {k.removeprefix("model."): torch.tensor(v) for k, v in dequantize(path, settings).items()}
    model.load_state_dict(weights)
    _, documents = corpus.split()
    tokens = torch.tensor(demo_corpus.encode(Tokenizer.from_file(str(source / "tokenizer.json")), documents))
    nats = train_demo.evaluate(model, tokens, batch=8)
    return train_demo.held_out_figures(nats, len(tokens) - 1, sum(len(d.text.encode()) for d in documents))


def card(source: Path, docs: Path) -> None:
    """Write docs/demo-model.md from tools/demo_card.md and metrics.json; copy the loss curve and the metrics there.

    Raises KeyError naming a figure that the template wants and metrics.json lacks."""
    metrics = read_json(source / "metrics.json")
    config = read_json(source / "config.json")
    samples = "\n\n".join(f"```python\n{text.rstrip()}\n```" for text in metrics["samples"].values())
    fields = _flatten({"config": config, **metrics}) | {"samples": samples, "options": repeat_options(metrics)}
    template = _CardTemplate((Path(__file__).parent / "demo_card.md").read_text(encoding="utf-8"))
    (docs / "demo-model.md").write_text(template.substitute(fields), encoding="utf-8")
    shutil.copyfile(source / "loss.png", docs / "demo-loss.png")
    shutil.copyfile(source / "metrics.json", docs / "demo-metrics.json")


def repeat_options(metrics: dict[str, Any]) -> str:
    """The options of train_demo.py that repeat a run; the clock that ended it is replaced by its count of steps."""
    import train_demo

    defaults = vars(train_demo.parse(["--out", "."]))
    options = {k: v for k, v in metrics["options"].items() if v != defaults[k] and k != "minutes"}
    options["steps"] = metrics["steps"]
    words = [f"--{k.replace('_', '-')}" + ("" if v is True else f" {v}") for k, v in options.items() if v is not False]
    return " ".join(words)


class _CardTemplate(string.Template):
    braceidpattern = r"[a-z0-9_.]+"


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """{"a": {"b": 1.234}} -> {"a.b": "1.23"}; whole numbers get thousands separators."""
    show: dict[type, Callable[[Any], str]] = {int: "{:,}".format, float: "{:,.5g}".format}
    flat: dict[str, str] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = show.get(type(value), str)(value)
    return flat


def main(argv: list[str]) -> None:
    from gguf import GGMLQuantizationType

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    to_gguf = commands.add_parser("export", help="Hugging Face folder to GGUF")
    to_gguf.add_argument("source", type=Path)
    to_gguf.add_argument("target", type=Path)
    to_gguf.add_argument("--type", choices=["q8_0", "f16", "f32"], default="q8_0", help="of the matrices")
    to_gguf.add_argument("--packed", type=Path, help="corpus file: measure the held-out perplexity of the result")
    to_card = commands.add_parser("card", help="fill the model card")
    to_card.add_argument("source", type=Path)
    to_card.add_argument("docs", type=Path)
    args = parser.parse_args(argv)
    if args.command == "card":
        card(args.source, args.docs)
        return
    args.target.parent.mkdir(parents=True, exist_ok=True)
    export(args.source, args.target, GGMLQuantizationType[args.type.upper()])
    nbytes = args.target.stat().st_size
    print(f"{args.target}: {nbytes:,} bytes")
    if args.type == "q8_0" and nbytes > MAX_NBYTES:
        sys.exit(f"{args.target}: {nbytes:,} bytes; what ships may have {MAX_NBYTES:,}")
    if args.packed:
        figures = measure(args.target, args.source, demo_corpus.unpack(args.packed))
        metrics = read_json(args.source / "metrics.json")
        metrics[args.type] = {"nbytes": nbytes, "held_out": figures}
        (args.source / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n", encoding="utf-8")
        print(json.dumps(figures))


if __name__ == "__main__":
    main(sys.argv[1:])
