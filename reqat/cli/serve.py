"""Verbs that use a model: `generate` answers one prompt, `serve` answers other programs."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from reqat.cli import arguments
from reqat.cli.app import app, start_computing
from reqat.cli.arguments import Threads
from reqat.config.decoding import SAMPLE
from reqat.config.errors import ReqatError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Model = Annotated[
    str,
    typer.Option(callback=arguments.model, help="A model's folder, ours or any, package:NAME, or owner/name@COMMIT."),
]
Precision = Annotated[
    str | None,
    typer.Option(callback=arguments.precision, help="Default: as the folder was saved, or else BF16."),
]
Head = Annotated[
    str | None,
    typer.Option(
        callback=arguments.head,
        help="Output head of a packed model (and embeddings, where they are one matrix): BF16, INT8, NVFP4 or MXFP4, "
        "with -A8 behind it with inputs in int8. Default: as the model has it.",
    ),
]
Embeddings = Annotated[
    str | None,
    typer.Option(callback=arguments.embeddings, help="Embeddings of a packed model: BF16, INT8, NVFP4 or MXFP4."),
]
Packed = Annotated[
    bool, typer.Option(help="Compute in four bits with kernels, or fake-quantized, as `reqat evaluate` does.")
]


@app.command()
def generate(
    model: Model,
    prompt: Annotated[str, typer.Option(help="Text; it is put into the chat template where there is one.")],
    precision: Precision = None,
    packed: Packed = True,
    head: Head = None,
    embeddings: Embeddings = None,
    prompt_lookup: Annotated[
        int,
        typer.Option(min=0, max=63, help="Tokens to guess a step from the text so far: the same response, sooner."),
    ] = 0,
    decoding: Annotated[str, typer.Option(callback=arguments.policy, help=f"greedy, or {SAMPLE}.")] = SAMPLE,
    seed: Annotated[int, typer.Option(min=0, max=arguments.MOST, help="Of sampling.")] = 0,
    max_new_tokens: Annotated[int, typer.Option(min=1, max=arguments.LONGEST, help="Longest response.")] = 512,
    threads: Threads = 0,
) -> None:
    """Print a model's response to a prompt."""
    start_computing(threads)
    from reqat.config.policy import Decoding
    from reqat.data import encode_prompt
    from reqat.generation import generate as respond
    from reqat.generation import generate_with_lookup
    from reqat.models import load_tokenizer

    tokenizer = load_tokenizer(model)
    ids = encode_prompt(tokenizer, prompt)
    loaded = _loaded(model, precision, packed, head, embeddings)
    policy = Decoding.parse(decoding)
    if prompt_lookup:
        guessed = generate_with_lookup(
            loaded,
            tokenizer,
            ids,
            guesses=prompt_lookup,
            seed=seed,
            row_key="prompt",
            decoding=policy,
            max_new_tokens=max_new_tokens,
        )
        found = guessed.generation
        print(f"{found.n_tokens} tokens in {guessed.steps + 1} passes", file=sys.stderr)
    else:
        (found,) = respond(
            loaded,
            tokenizer,
            [ids],
            seeds=[seed],
            row_keys=["prompt"],
            decoding=policy,
            max_new_tokens=max_new_tokens,
        )
    print(tokenizer.decode(list(found.token_ids), skip_special_tokens=True))


@app.command()
def serve(
    model: Model,
    precision: Precision = None,
    packed: Packed = True,
    head: Head = None,
    embeddings: Embeddings = None,
    host: Annotated[str, typer.Option(help="Address to listen on; others than this machine: 0.0.0.0.")] = "localhost",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 8000,
    threads: Threads = 0,
) -> None:
    """Serve a model by transformers' own server, which speaks OpenAI's protocol, until interrupted.

    Requests name the model as --model does, or not at all. Anyone who reaches the port may use it.
    """
    start_computing(threads)
    from reqat.data import with_bos
    from reqat.hf.serving import check_server
    from reqat.hf.serving import serve as serve_model
    from reqat.models import load_tokenizer, precision_of

    check_server(host, port)
    tokenizer = with_bos(load_tokenizer(model))
    loaded = _loaded(model, precision, packed, head, embeddings)
    # Without a chat template transformers' server answers chats with an internal error.
    asked = "chat/completions" if tokenizer.chat_template else "completions"
    why = "" if tokenizer.chat_template else "; no chat template, so no chats"
    print(f"{model}, {precision_of(loaded)}: http://{host}:{port}/v1/{asked} (Ctrl-C ends it{why})", flush=True)
    serve_model(loaded, tokenizer, model, host, port)


def _loaded(
    model: str, precision: str | None, packed: bool, head: str | None, embeddings: str | None
) -> PreTrainedModel:
    """The model at a precision, packed if that is asked for and anything of it is quantized."""
    chosen = head is not None or embeddings is not None
    if chosen and not packed:
        raise ReqatError("--head and --embeddings are of packed models: leave --no-packed out, or them")
    from reqat.evaluation.loading import load_at
    from reqat.inference import pack
    from reqat.models import precision_of
    from reqat.quant import Precision

    print(
        f"loading {model}", file=sys.stderr, flush=True
    )  # of a published model, most of the time until the first token
    loaded = load_at(model, precision)
    if not packed or (precision_of(loaded) == Precision() and not chosen):
        return loaded
    return pack(loaded, head=head, embeddings=embeddings)
