"""Train the demo model that ships with gllm-driver (see docs/demo-model.md for the data, the licence and the figures).

    python tools/train_demo.py --pack corpus.jsonl.xz                           # collect the text, needs no torch
    python tools/train_demo.py --packed corpus.jsonl.xz --out demo --minutes 6  # train, best on a GPU

The learning-rate schedule follows the clock (--minutes), so a run always ends with its decay; --steps makes it follow
the step count instead, which is how a run is repeated. The checkpoint with the lowest held-out loss is what is written.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import demo_corpus

if TYPE_CHECKING:
    from demo_model import DemoConfig, DemoModel
    from tokenizers import Tokenizer
    from torch import Tensor

WARM_UP, DECAY_FROM = 0.02, 0.35  # fractions of the run: linear warm-up, constant rate, linear decay to zero
SAMPLE_PROMPTS = ("def fibonacci(n):", "import os\n\ndef list_files(path):\n", "class Stack:\n")


def learning_rate_factor(progress: float) -> float:
    """Share of the peak rate at `progress` in [0, 1]: warm-up, plateau, linear decay (Hu et al. 2024, "WSD")."""
    return min(1.0, (progress + 1e-3) / WARM_UP, max(0.0, (1 - progress) / (1 - DECAY_FROM)))


def evaluate(model: DemoModel, tokens: Tensor, batch: int) -> float:
    """Summed negative log-likelihood, in nats, of tokens[1:] in consecutive windows of the model's context."""
    import torch

    context = model.config.max_position_embeddings
    count = math.ceil((len(tokens) - 1) / context)
    ids = torch.zeros(count * context, dtype=torch.long, device=tokens.device)
    targets = torch.full_like(ids, -100)
    ids[: len(tokens) - 1], targets[: len(tokens) - 1] = tokens[:-1], tokens[1:]
    total = 0.0
    model.eval()
    with torch.no_grad():
        windows = zip(ids.view(count, context).split(batch), targets.view(count, context).split(batch), strict=True)
        for window, target in windows:
            total += model.loss(window, target).item()
    model.train()
    return total


def held_out_figures(nats: float, num_tokens: int, nbytes: int) -> dict[str, float]:
    return {
        "loss": nats / num_tokens,
        "perplexity_per_token": math.exp(nats / num_tokens),
        "perplexity_per_byte": math.exp(nats / nbytes),
        "bits_per_byte": nats / nbytes / math.log(2),
    }


def complete(model: DemoModel, tokenizer: Tokenizer, prompt: str, num_tokens: int = 80) -> str:
    """Greedy continuation, for the log and the model card."""
    import torch

    ids = torch.tensor([tokenizer.encode(prompt).ids], device=model.rope.device)
    model.eval()
    with torch.no_grad():
        for _ in range(num_tokens):
            best = model(ids[:, -model.config.max_position_embeddings :])[:, -1].argmax(-1, keepdim=True)
            if best.item() == 0:
                break
            ids = torch.cat([ids, best], dim=1)
    model.train()
    return tokenizer.decode(ids[0].tolist(), skip_special_tokens=False)


def train(args: argparse.Namespace, corpus: demo_corpus.Corpus) -> None:
    import torch
    from demo_model import DemoConfig, DemoModel, Muon

    started = time.perf_counter()
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    train_documents, held_out_documents = corpus.split()
    random.Random(args.seed).shuffle(train_documents)
    tokenizer = demo_corpus.train_tokenizer(train_documents, args.vocab_size)
    text_ids = demo_corpus.encode(tokenizer, train_documents)
    chat_ids = demo_corpus.encode_dialogues(tokenizer, corpus.dialogues)
    tokens = torch.tensor(text_ids + chat_ids, dtype=torch.int32, device=device)
    held_out = torch.tensor(demo_corpus.encode(tokenizer, held_out_documents), dtype=torch.int32, device=device)
    held_out_nbytes = sum(len(d.text.encode()) for d in held_out_documents)
    stats = {
        "source": corpus.source,
        "documents": len(train_documents),
        "nbytes": sum(len(d.text.encode()) for d in train_documents),
        "tokens": len(text_ids),
        "chat_tokens": len(chat_ids),
        "held_out_documents": len(held_out_documents),
        "held_out_nbytes": held_out_nbytes,
        "held_out_tokens": len(held_out) - 1,
    }
    config = DemoConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=args.hidden,
        intermediate_size=args.intermediate,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // args.head_dim,
        num_key_value_heads=max(1, args.hidden // args.head_dim // 2),
        head_dim=args.head_dim,
        max_position_embeddings=args.context,
    )
    model = DemoModel(config, args.dropout).to(device)
    num_parameters = sum(p.numel() for p in model.parameters())
    print(f"{num_parameters:,} parameters, {stats} ({time.perf_counter() - started:.0f} s to prepare)", flush=True)

    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and name.startswith("layers.")]
    muon = Muon(matrices if args.optimizer == "muon" else [], args.weight_decay)
    others = [p for p in model.parameters() if args.optimizer == "adamw" or all(p is not m for m in matrices)]
    adamw = torch.optim.AdamW(
        [
            {"params": [p for p in others if p.ndim == 2], "weight_decay": args.weight_decay},
            {"params": [p for p in others if p.ndim == 1], "weight_decay": 0.0},
        ],
        lr=args.learning_rate,
        betas=(0.9, 0.95),
    )
    loss_of: Callable[[Tensor, Tensor], Tensor] = torch.compile(model.loss) if args.compile else model.loss
    offsets = torch.arange(config.max_position_embeddings + 1, device=device)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")

    def step(factor: float, loss_of: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        start = torch.randint(len(tokens) - config.max_position_embeddings, (args.batch, 1), device=device)
        window = tokens[start + offsets].long()
        with autocast:
            loss = loss_of(window[:, :-1], window[:, 1:]) / window[:, 1:].numel()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(others, 1.0)  # Muon's update has a fixed size whatever the gradient's
        for group in adamw.param_groups:
            group["lr"] = args.learning_rate * factor
        adamw.step()
        muon.step(args.learning_rate * factor)
        model.zero_grad(set_to_none=True)
        return loss.detach()

    try:
        step(0.0, loss_of)  # compiles; at rate zero it moves nothing but the optimizers' averages
    except (RuntimeError, OSError, subprocess.SubprocessError) as error:  # also a missing or failing C compiler
        if not args.compile:
            raise
        print(f"torch.compile does not work here, training without it: {error}", file=sys.stderr, flush=True)
        model.zero_grad(set_to_none=True)
        loss_of = model.loss
    print(f"{time.perf_counter() - started:.0f} s until the first step", flush=True)
    best_loss, best_state, best_step = math.inf, {k: v.clone() for k, v in model.state_dict().items()}, 0
    history: list[dict[str, float]] = []
    clock, num_steps, progress, next_eval = time.perf_counter(), 0, 0.0, 0.0
    recent: list[Tensor] = []
    while progress < 1.0:
        elapsed = time.perf_counter() - clock
        progress = num_steps / args.steps if args.steps else elapsed / (60 * args.minutes)
        progress = min(progress, 1.0)
        if progress >= next_eval or progress == 1.0:
            next_eval = progress + 1 / args.evaluations
            with autocast:
                held_out_loss = evaluate(model, held_out, args.batch) / (len(held_out) - 1)
            train_loss = torch.stack(recent).mean().item() if recent else math.nan
            recent = []
            if not math.isfinite(held_out_loss):
                raise FloatingPointError(f"held-out loss is {held_out_loss} at step {num_steps}; lower --learning-rate")
            num_tokens = num_steps * args.batch * config.max_position_embeddings
            row = {"step": num_steps, "tokens": num_tokens, "seconds": round(time.perf_counter() - clock, 1)}
            history.append(row | {"train_loss": train_loss, "held_out_loss": held_out_loss})
            print(json.dumps(history[-1]), flush=True)
            if held_out_loss < best_loss:
                best_loss, best_step = held_out_loss, num_steps
                best_state = {k: v.clone() for k, v in model.state_dict().items()}
        if progress < 1.0:
            recent.append(step(learning_rate_factor(progress), loss_of))
            num_steps += 1
            if num_steps % 8 == 0:
                recent[-1].item()  # the clock that drives the schedule must not run ahead of the device

    train_seconds = time.perf_counter() - clock
    torch.set_float32_matmul_precision("highest")
    model.load_state_dict({k: v.half().float() for k, v in best_state.items()})  # figures of what is written
    nats = evaluate(model, held_out, args.batch)
    metrics: dict[str, Any] = {
        "parameters": num_parameters,
        "corpus": stats,
        "steps": num_steps,
        "best_step": best_step,
        "tokens": num_steps * args.batch * config.max_position_embeddings,
        "epochs": num_steps * args.batch * config.max_position_embeddings / len(tokens),
        "train_seconds": train_seconds,
        "total_seconds": time.perf_counter() - started,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "torch": torch.__version__,
        "held_out": held_out_figures(nats, len(held_out) - 1, held_out_nbytes),
        "final_train_loss": history[-1]["train_loss"],
        "options": {k: v for k, v in vars(args).items() if k not in {"corpus", "pack", "packed", "out", "device"}},
        "samples": {prompt: complete(model, tokenizer, prompt) for prompt in SAMPLE_PROMPTS},
    }
    write_outputs(args.out, model, config, tokenizer, history, metrics)
    print(json.dumps(metrics, indent=1))


def write_outputs(
    out: Path,
    model: DemoModel,
    config: DemoConfig,
    tokenizer: Tokenizer,
    history: list[dict[str, float]],
    metrics: dict[str, Any],
) -> None:
    """A Hugging Face model directory, the loss curve and metrics.json."""
    from safetensors.torch import save_file

    out.mkdir(parents=True, exist_ok=True)
    end, im_start, im_end = demo_corpus.SPECIAL_TOKENS
    save_file(model.hf_state(), out / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save(str(out / "tokenizer.json"))
    files: dict[str, dict[str, Any]] = {
        "config.json": config.hf(),
        "generation_config.json": {"eos_token_id": [0, 2], "do_sample": False},
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": config.max_position_embeddings,
            "bos_token": None,
            "eos_token": end,
            "additional_special_tokens": [im_start, im_end],
            "clean_up_tokenization_spaces": False,
            "chat_template": demo_corpus.CHAT_TEMPLATE,
        },
        "metrics.json": metrics,
    }
    for name, content in files.items():
        (out / name).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    with open(out / "loss.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(history[0]))
        writer.writeheader()
        writer.writerows(history)
    plot(out / "loss.png", history)


def plot(path: Path, history: list[dict[str, float]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for key, label in (("train_loss", "training (with dropout)"), ("held_out_loss", "held out")):
        axes.plot([row["tokens"] / 1e6 for row in history], [row[key] for row in history], label=label)
    top = min(5.0, history[0]["held_out_loss"])
    axes.set(xlabel="million tokens seen", ylabel="loss, nats per token", ylim=(None, top))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=110)


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--corpus", type=Path, action="append", default=[], help="folder of .py files (default: the standard library)")
    add("--pack", type=Path, help="only write the corpus to this .jsonl.xz file")
    add("--packed", type=Path, help="read the corpus from a file that --pack wrote")
    add("--out", type=Path, help="folder for the trained model")
    add("--minutes", type=float, default=6.0, help="length of the training by the clock, compilation not counted")
    add("--steps", type=int, help="length of the training in steps, instead of --minutes")
    add("--batch", type=int, default=64, help="windows in a step")
    add("--context", type=int, default=1024, help="tokens in a window")
    add("--layers", type=int, default=8)
    add("--hidden", type=int, default=256)
    add("--intermediate", type=int, default=768)
    add("--head-dim", type=int, default=64)
    add("--vocab-size", type=int, default=4096)
    add("--optimizer", choices=["muon", "adamw"], default="muon", help="for the layers' matrices; the rest has AdamW")
    add("--learning-rate", type=float, default=3e-3)
    add("--weight-decay", type=float, default=0.1)
    add("--dropout", type=float, default=0.3, help="less of it overfits long before the text was seen 60 times")
    add("--evaluations", type=int, default=40, help="number of held-out evaluations")
    add("--seed", type=int, default=0)
    add("--device", help="torch device (default: cuda where there is one)")
    add("--compile", action=argparse.BooleanOptionalAction, default=False, help="use torch.compile")
    args = parser.parse_args(argv)
    if not args.pack and not args.out:
        parser.error("one of --pack and --out is needed")
    for name in ("hidden", "intermediate", "head_dim"):
        if getattr(args, name) % 32:
            parser.error(f"--{name.replace('_', '-')} is {getattr(args, name)}; Q8_0 needs multiples of 32")
    if args.hidden % args.head_dim:
        parser.error(f"--hidden {args.hidden} is no multiple of --head-dim {args.head_dim}")
    return args


def main(argv: list[str]) -> None:
    args = parse(argv)
    corpus = demo_corpus.unpack(args.packed) if args.packed else demo_corpus.collect(args.corpus)
    if args.pack:
        demo_corpus.pack(corpus, args.pack)
        nbytes = sum(len(d.text.encode()) for d in corpus.documents)
        print(f"{args.pack}: {len(corpus.documents)} documents, {len(corpus.dialogues)} dialogues, {nbytes:,} bytes")
    else:
        train(args, corpus)


if __name__ == "__main__":
    main(sys.argv[1:])
