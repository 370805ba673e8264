"""`gllm generate`: text from a prompt, piece by piece, or one JSON object."""

from __future__ import annotations

import json
import logging
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from ..errors import GllmError
from .console import Console
from .options import SEED_MAX, DeviceType, TextType, TokensType, check_sampling, read_prompt
from .outcome import EXIT_CODES, guarded, interrupted_code

if TYPE_CHECKING:
    from ..generation import GenerationResult, TextStream
    from ..llm import LLM

log = logging.getLogger("gllm_driver.cli")

POSITIVE = click.IntRange(min=1)
_SAMPLING = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
)


@click.command(epilog=EXIT_CODES, short_help="Continue a text.")
@click.argument("prompt", nargs=-1, metavar="[PROMPT]")
@click.option(
    "--model", type=TextType(), metavar="M", help="HF directory, .gguf file or hub id; without it, the demo model."
)
@click.option("--device", type=DeviceType(), default="auto", show_default=True, help="Where to run.")
@click.option(
    "--dtype",
    type=click.Choice(["auto", "f32", "f16", "bf16"]),
    default="auto",
    show_default=True,
    help="Type of float weights and of the KV cache; auto: as stored.",
)
@click.option(
    "--max-tokens", type=POSITIVE, metavar="N", default=256, show_default=True, help="Tokens to generate at most."
)
@click.option("--temperature", type=float, metavar="T", help="0 always takes the best token.")
@click.option("--top-k", type=int, metavar="K", help="Draw from the K best tokens; 0: all.")
@click.option("--top-p", type=float, metavar="P", help="Draw from the best tokens that together have probability P.")
@click.option("--min-p", type=float, metavar="P", help="Leave out tokens below P times the best one's probability.")
@click.option("--repetition-penalty", type=float, metavar="X", help="Divide the score of tokens seen before; 1: off.")
@click.option(
    "--presence-penalty", type=float, metavar="X", help="Subtract once from tokens already generated; 0: off."
)
@click.option(
    "--frequency-penalty", type=float, metavar="X", help="Subtract for each time a token was generated; 0: off."
)
@click.option("--seed", type=click.IntRange(0, SEED_MAX), metavar="N", help="Makes the draws repeatable.")
@click.option("--stop", type=TextType(), multiple=True, metavar="S", help="End before this text. Repeatable.")
@click.option("--ignore-eos", is_flag=True, help="Go on past the model's end tokens.")
@click.option("--threads", type=POSITIVE, metavar="N", help="CPU threads; without it, all this process may use.")
@click.option(
    "--context", type=POSITIVE, metavar="N", help="Tokens of prompt and output together; without it, the model's."
)
@click.option(
    "--deterministic", is_flag=True, help="The same bits whatever shares a step on the GPU; the CPU always does that."
)
@click.option(
    "--kv-store",
    type=TextType(),
    metavar="SPEC",
    help="Keep KV of prompts for later runs: memory:2GiB,disk:/path?cap=20GiB,redis://host:6379/0 or some of these.",
)
@click.option(
    "--kv-distill",
    metavar="2|4|8",
    help="Where memory for KV runs short, merge so many old tokens into one before swapping; changes the output.",
)
@click.option("--chat", is_flag=True, help="PROMPT is a user's message; apply the model's chat template.")
@click.option("--system", type=TextType(), help="With --chat: the system message.")
@click.option("--tokens", type=TokensType(), help="Token ids instead of PROMPT.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object at the end, and nothing else.")
@click.option("--quiet", is_flag=True, help="Nothing on standard error but errors.")
@click.option("--verbose", is_flag=True, help="Say at the end how tokens, KV pages and time were used.")
@click.option("--debug", is_flag=True, help="Show tracebacks and the log.")
@guarded
def generate(
    *,
    prompt: tuple[str, ...],
    model: str | None,
    device: str,
    dtype: str,
    max_tokens: int,
    stop: tuple[str, ...],
    ignore_eos: bool,
    threads: int | None,
    context: int | None,
    deterministic: bool,
    kv_store: str | None,
    kv_distill: str | None,
    chat: bool,
    system: str | None,
    tokens: tuple[int, ...] | None,
    as_json: bool,
    quiet: bool,
    verbose: bool,
    debug: bool,
    **sampling: Any,
) -> None:
    """Continue PROMPT, which is a text, - for standard input, or @FILE.

    The text is printed as it comes, without the prompt. Sampling options that are left out take what the model's
    authors recommend; where they say nothing, the best token is taken. A PROMPT that begins with @ is written @@.
    """
    console: Console = click.get_current_context().obj
    console.configure(quiet=quiet, debug=debug)
    if tokens is not None and prompt:
        raise click.UsageError("PROMPT and --tokens exclude each other.")
    if tokens is not None and chat:
        raise click.UsageError("--tokens and --chat exclude each other: a chat template needs text.")
    if system is not None and not chat:
        raise click.UsageError("--system needs --chat.")
    if quiet and verbose:
        raise click.UsageError("--quiet and --verbose exclude each other.")
    options = check_sampling({name: sampling[name] for name in _SAMPLING})
    text_or_ids = read_prompt(prompt) if tokens is None else tokens

    import gllm_driver as gllm

    if model is None:
        console.note("no --model: this is the built-in demonstration model, which only imitates Python code")
    log.debug("loading %s", model or "the demonstration model")
    with gllm.load(
        model,
        device=device,
        dtype=dtype,
        threads=threads,
        context_length=context,
        deterministic=deterministic,
        kv_store=kv_store,
        kv_distill=kv_distill,
        progress=console.progress,
    ) as llm:
        start = _chat(llm, str(text_or_ids), system) if chat else text_or_ids
        stream = llm.stream(start, max_tokens=max_tokens, stop=stop, ignore_eos=ignore_eos, **options)
        result, interrupt = _print(stream, console, as_json=as_json)
    if verbose:
        console.write(f"{llm.metrics}\n")
    if interrupt is not None:
        console.warn(f"interrupted: {_summary(result)}")
        click.get_current_context().exit(interrupted_code(interrupt))
    console.note(_summary(result))


def _chat(llm: LLM, text: str, system: str | None) -> list[int]:
    messages = [{"role": "system", "content": system}] if system is not None else []
    return llm.chat_tokens([*messages, {"role": "user", "content": text}])


def _print(stream: TextStream, console: Console, *, as_json: bool) -> tuple[GenerationResult, KeyboardInterrupt | None]:
    """Run the generation to its end or to an interrupt, printing as asked."""
    interrupt: KeyboardInterrupt | None = None
    # A terminal or file that cannot hold a character gets a question mark; JSON is UTF-8 by its standard.
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(**({"encoding": "utf-8"} if as_json else {"errors": "replace"}))
    with console.printing() as output, stream:
        try:
            log.debug("generating")
            for piece in stream:
                if not as_json:
                    output.write(piece)
        except KeyboardInterrupt as error:
            interrupt = error
            stream.close()
        except GllmError:
            output.end_line()
            raise
        result = stream.result
        if as_json:
            output.write(json.dumps(as_object(result), ensure_ascii=False))
        output.end_line()
    return result, interrupt


def as_object(result: GenerationResult) -> dict[str, Any]:
    """The object that --json prints (docs/cli.md has its schema)."""
    return {
        "prompt_tokens": result.prompt_tokens,
        "tokens": list(result.tokens),
        "text": result.text,
        "finish_reason": result.finish_reason,
        "device": result.device,
        "timings": asdict(result.timings),
        "traffic": asdict(result.traffic),
    }


def _summary(result: GenerationResult) -> str:
    t = result.timings
    return (
        f"prompt {result.prompt_tokens} tokens in {t.prefill_s:.2f} s ({t.prefill_tokens_per_s:.1f}/s), "
        f"output {len(result.tokens)} tokens in {t.decode_s:.2f} s ({t.decode_tokens_per_s:.1f}/s), "
        f"loaded in {t.load_s:.2f} s, {result.device}"
    )
