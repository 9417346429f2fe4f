"""Writes the tables of docs/api.md from the program: fields of requests, errors, limits."""

import re
import sys
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import msgspec

from cordee import errors
from cordee.api import bodies, embeddings, failures, guard, hidden, ignored, schemas, server, stream
from cordee.cli.main import subclasses
from cordee.endpoints import anthropic_schemas, ollama_schemas, responses_schemas
from cordee.engine.llama import encoder
from cordee.generation import sampling, text
from cordee.grammar import grammar
from cordee.net import doors
from cordee.worker import grammar_child, grammar_trials

TARGET = Path(__file__).resolve().parents[1] / "docs" / "api.md"
SECTION = re.compile(r"(<!-- (\w+) (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
WORDS = {str: "string", int: "integer", float: "number", bool: "boolean", msgspec.Raw: "JSON", dict: "object"}
# Errors of the command line and of loading a model; no request gets them.
ELSEWHERE = {errors.BadModelFile, errors.DoesNotFit, errors.StorageFailed, errors.SetupNeeded}
SHAPES = (schemas, responses_schemas, anthropic_schemas, ollama_schemas, embeddings)

# What bounds a request, and in which unit.
LIMITS = (
    (bodies, "BODY_BYTES_MAX", "bytes of a request's body"),
    (bodies, "BODIES_BYTES_MAX", "bytes of all bodies that are being read"),
    (bodies, "BODY_SECONDS", "seconds that a body may take to arrive"),
    (guard, "REQUESTS_MAX", "requests at work at once"),
    (doors, "ARRIVAL_SECONDS", "seconds until the headers of a request have come"),
    (server, "ARRIVING_MAX", "requests that are on their way at once; the oldest are dropped"),
    (server, "IDLE_MAX", "connections between two requests; the oldest are closed"),
    (server, "IDLE_SECONDS", "seconds that a connection may be idle"),
    (schemas, "MESSAGES_MAX", "messages of a conversation"),
    (schemas, "PARTS_MAX", "content parts of a message"),
    (ignored, "NAMES_MAX", "names in `x-cordee-ignored`"),
    (ignored, "NAME_CHARS_MAX", "characters of such a name"),
    (ignored, "OBJECTS_MAX", "objects of a body that are looked at for it"),
    (responses_schemas, "ITEMS_MAX", "items of a response's input"),
    (schemas, "TOOLS_MAX", "tools of a request"),
    (schemas, "CHOICES_MAX", "answers to one request: prompts times `n`"),
    (embeddings, "INPUTS_MAX", "texts of an embeddings request"),
    (embeddings, "DOCUMENTS_MAX", "documents of a rerank request"),
    (encoder, "TOKENS_MAX", "tokens of one text that becomes a vector, if its model reads so many"),
    (text, "STOPS_MAX", "stop strings"),
    (text, "STOP_CHARS_MAX", "characters of a stop string"),
    (sampling, "LOGIT_BIAS_MAX", "entries of `logit_bias`"),
    (hidden, "CONTROL_TEXTS_MAX", "names of control tokens in a conversation"),
    (grammar, "TEXT_CHARS_MAX", "characters of a JSON schema"),
    (grammar, "GBNF_CHARS_MAX", "characters of a GBNF grammar"),
    (grammar_child, "TRIAL_SECONDS", "seconds of computing to compile a grammar"),
    (grammar_child, "TRIAL_BYTES", "bytes of memory for that"),
    (grammar, "STEP_SECONDS", "seconds of computing for one token of a grammar"),
    (grammar_trials, "WAITING_MAX", "new grammars that wait to be compiled"),
    (stream, "SILENT_CLIENT_SECONDS", "seconds that a client may read nothing of a stream"),
    (failures, "RETRY_AFTER_SECONDS", "seconds in `Retry-After`"),
)


def fields(name: str) -> str:
    """The table of an object's fields."""
    shape = next(getattr(file, name) for file in SHAPES if hasattr(file, name))
    hints = get_type_hints(shape, include_extras=True)
    required = {field.name for field in msgspec.structs.fields(shape) if field.required}
    rows: list[tuple[str, ...]] = []
    for field, meta in schemas.policies(shape).items():
        extra = meta.extra or {}
        if "ignored" in extra:
            rows.append((field, "anything", "ignored", extra["ignored"]))
        elif "unoffered" in extra:
            rows.append((field, "anything", "ignored, and named in the reply", extra["unoffered"]))
        elif "refused" in extra:
            harmless = [f"`{msgspec.json.encode(value).decode()}`" for value in extra["harmless"]]
            rows.append((field, " or ".join(harmless), "else refused", extra["refused"]))
        else:
            state = "required" if field in required else "honoured"
            kind = ", ".join(filter(None, (type_name(hints[field]), extent(field, hints[field]))))
            rows.append((field, kind, state, meta.description or ""))
    return table(("field", "value", "", "why, or what for"), [(f"`{field}`", *rest) for field, *rest in rows])


def type_name(kind: Any) -> str:
    """A type in JSON's words. null means the same as leaving the field out, so it is not named."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return type_name(arguments[0])
    if origin in (Union, UnionType):
        if set(arguments) - {NoneType} == {int, float}:
            return WORDS[int]  # also written as 4.0
        names = [type_name(each) for each in arguments if each is not NoneType]
        return " or ".join(dict.fromkeys(names))
    if origin is list:
        return f"list of ({name})" if " or " in (name := type_name(arguments[0])) else f"list of {name}"
    return WORDS.get(origin or kind, "object")


def extent(field: str, kind: Any) -> str:
    """The range of a number or the length of a list, if it is limited."""
    if field in sampling.RANGES:
        low, high = sampling.RANGES[field]
        return f"{low} to {high}"
    for meta in constraints(kind):
        if meta.ge is not None:
            return f"{meta.ge} to {meta.le}"
        if meta.max_length is not None:
            return f"{meta.min_length or 0} to {meta.max_length} entries"
    return ""


def constraints(kind: Any) -> list[msgspec.Meta]:
    """All constraints within a type."""
    inner = [meta for each in get_args(kind) for meta in constraints(each)]
    return [each for each in getattr(kind, "__metadata__", ()) if isinstance(each, msgspec.Meta)] + inner


def error_table(_: str) -> str:
    """The table of the errors that a request can get."""
    kinds = [kind for kind in subclasses(errors.CordeeError) if kind not in ELSEWHERE]
    rows = sorted((kind.http_status, f"`{kind.code}`", (kind.__doc__ or "").split("\n")[0]) for kind in kinds)
    extra = [
        (500, f"`{errors.CordeeError.code}`", "A fault of the server; its log has the traceback."),
    ]
    return table(
        ("status", "`code`", "meaning"), sorted({(str(status), *rest) for status, *rest in rows + extra})
    )


def limit_table(_: str) -> str:
    """The table of limits."""
    rows = [(f"{getattr(module, name):,}", what, f"`{name}`") for module, name, what in LIMITS]
    return table(("at most", "", "constant"), rows)


def table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A Markdown table."""
    lines = [header, tuple("---" for _ in header), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)


MAKERS = {"fields": fields, "errors": error_table, "limits": limit_table}


def renewed(document: str) -> str:
    """The document with each table between `<!-- fields Name -->` and `<!-- end -->` written anew."""
    return SECTION.sub(lambda match: match[1] + MAKERS[match[2]](match[3]) + match[4], document)


if __name__ == "__main__":
    TARGET.write_text(renewed(TARGET.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"wrote {TARGET.relative_to(Path.cwd())}", file=sys.stderr)
