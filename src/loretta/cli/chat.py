"""``loretta chat``."""

import io
import sys
from typing import Annotated

import typer

from loretta.cli.options import Cpu, Json, MaxNewTokens, Model, RunFolder, Temperature, TopP, refuse_other_encodings
from loretta.cli.output import print_json, say
from loretta.errors import InputError


def chat(
    run: RunFolder,
    system: Annotated[str | None, typer.Option(help="What the model is told before the first message.")] = None,
    max_new_tokens: MaxNewTokens = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    model: Model = None,
    cpu: Cpu = False,
    as_json: Json = False,
) -> None:
    """Talk to a trained decoder: a message a line, /clear to begin again, the end of the input to leave."""
    from loretta.training.predict import Sampling, answer_chat, load_run, refuse_classifier

    refuse_other_encodings("--system", system or "")
    sampling = Sampling(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p)
    loaded = load_run(run, model=model, cpu=cpu)
    refuse_classifier(loaded, "use `loretta predict`")
    if not loaded.tokenizer.chat_template:
        say("the tokenizer has no chat template: each message is continued as it stands, alone", err=True)
    start = [{"role": "system", "content": system}] if system else []
    messages, turns = list(start), []
    interactive = sys.stdin.isatty()
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # a message in another encoding is told below
    while True:
        if interactive:
            typer.echo("> ", nl=False, err=True)
        line = sys.stdin.readline()
        if not line:
            break
        if not (words := line.strip()):
            continue
        if words == "/clear":
            messages = list(start)
            continue
        messages.append({"role": "user", "content": words})
        try:
            refuse_other_encodings("the message", words)
            answer = answer_chat(loaded, messages, sampling, show=interactive)
        except InputError as error:
            if not interactive:
                raise
            say(f"loretta: {error} (/clear)", err=True)  # the conversation so far is not lost
            messages.pop()
            continue
        messages.append({"role": "assistant", "content": answer})
        turns.append({"message": words, "answer": answer})
        if not interactive and not as_json:
            say(answer)
    if as_json:
        print_json(turns)
