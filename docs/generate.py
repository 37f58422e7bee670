"""Reference and result pages of the site, generated from the code and from docs/results/*.json.

mkdocs runs `on_config` and `on_files` as hooks; tests/test_docs.py calls `pages` directly.
"""

from __future__ import annotations

import inspect
import json
import re
import runpy
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from typer.main import get_command

import safegen
from safegen.cli import app
from safegen.core import registry
from safegen.data.prompts.dialects import DIALECTS

DOCS = Path(__file__).parent
SOURCE = Path(safegen.__file__).parent
NESTED: dict[str, type[BaseModel]] = {}
"""Settings that are tables of their own, by class name; one section each in training.md."""
RECORDS = {
    "Run folder": "safegen.evaluation.run.records",
    "Protocol": "safegen.evaluation.schema",
    "Suite": "safegen.attacks.suite.files",
    "Patch and checkpoint": "safegen.models.checkpoint.metadata",
}
"""Modules with the typed records of files."""

SIGNS = {
    "minimum": ">=",
    "exclusiveMinimum": ">",
    "maximum": "<=",
    "exclusiveMaximum": "<",
    "minLength": "length >=",
}
SERVER = {
    "ServerConfig": "Top level of the file",
    "RequestLimits": "Table limits",
    "UpstreamConfig": "Table upstream",
    "RayConfig": "Table ray",
    "ClientConfig": "Token file, a table per client",
}
"""Headings of the settings of the server, by class."""
ACCESS = {
    "queries": "images on request",
    "text_encoder": "the text encoder",
    "weights": "all weights",
}
FAMILIES = {
    "Edits": "edits/families.py:EDITS_ON_FAMILIES",
    "Guards": "guards/families.py:GUARDS_ON_FAMILIES",
    "Attacks": "attacks/families.py:ATTACKS_ON_FAMILIES",
    "Files of models": "models/families.py:FILES_OF_FAMILIES",
    "Files of LoRAs": "models/lora_families.py:LORAS_OF_FAMILIES",
}
"""Table of the tests by heading: the reason of a refusal by family and name, "" where it works."""
WORDS = {"null": "none", "boolean": "true or false", "object": "table"}
Page = tuple[str, str]
"""Title and Markdown text."""


def pages() -> dict[str, Page]:
    """Return every generated page by its path below docs/."""
    out = {"reference/cli.md": ("Command line", cli())}
    rooms = {"edits": registry.EDITS, "guards": registry.GUARDS, "attacks": registry.ATTACKS}
    for room, table in rooms.items():
        out |= {
            f"reference/{room}/{name}.md": (name, method(registry.resolve(table, name, room), name))
            for name in sorted(table)
        }
    out["reference/adversaries.md"] = ("Adversaries", adversaries())
    out["reference/training.md"] = ("Nested settings", training())
    out["reference/judges.md"] = ("Judges", judges())
    out["reference/server.md"] = ("Server settings", server())
    out["reference/protocols.md"] = ("Protocols", protocols())
    out["reference/dialects.md"] = ("Prompt dialects", dialects())
    out["reference/files.md"] = ("File formats", files())
    out["reference/families.md"] = ("Families of models", families())
    out["reference/python.md"] = ("Python API", python_api())
    order = (DOCS / "results" / "index.md").read_text(encoding="utf-8").find
    for path in sorted((DOCS / "results").glob("*.json"), key=lambda p: order(f"({p.stem}.md)")):
        title, text = result(json.loads(path.read_text(encoding="utf-8")))
        out[f"results/{path.stem}.md"] = (title, text)
    return out


# Markdown


def families() -> str:
    """Return what works on which family, and the reasons where it does not."""
    text = [
        "Made from the tables that the contract tests check cell by cell, on tiny random models "
        "of each family. *yes* says that it runs and keeps its laws, not how well it removes. A "
        "number names the reason why it is refused, or what other programs leave out of it. See "
        "[Families of models](../explanation/families.md).",
        "*sd2-v* is SD 2.x with v-prediction, *sdxl-v* an SDXL fine-tuned to it, *sd3* SD 3 "
        "without T5, *sd35* SD 3.5 medium with T5, *flux* FLUX.1-dev.",
    ]
    for heading, source in FAMILIES.items():
        file, _, name = source.partition(":")
        cells = runpy.run_path(str(DOCS.parent / "tests" / file))[name]
        rows = dict.fromkeys(row for column in cells.values() for row in column)
        reasons = dict.fromkeys(r for row in rows for c in cells.values() if (r := c.get(row)))
        numbers = {reason: str(i) for i, reason in enumerate(reasons, 1)} | {"": "yes"}
        body = [[code(row), *(numbers[c.get(row, "")] for c in cells.values())] for row in rows]
        listed = "\n".join(f"{number}. {escape(r)}" for r, number in numbers.items() if r)
        text.append(f"## {heading}\n\n{table(['', *cells], body)}\n{listed}")
    return "\n\n".join(text) + "\n"


def table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """Return a Markdown table."""
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(cell, line)) + " |" for line in lines) + "\n"


def cell(value: object) -> str:
    """Return a value as one table cell."""
    return escape(" ".join(str(value).split()).replace("|", "\\|"))


def escape(text: str) -> str:
    """Return a text in which `<` outside code is no HTML tag."""
    return re.sub(r"`[^`]*`|<", lambda m: "&lt;" if m[0] == "<" else m[0], text)


def code(value: object) -> str:
    """Return a value as inline code."""
    return f"`{value}`"


def literal(value: object) -> str:
    """Return a default as it is written on the command line."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return code(text if len(text) <= 60 else text[:57] + "...")


def paragraphs(docstring: str | None) -> str:
    """Return a docstring's prose: what stands before its sections."""
    text = inspect.cleandoc(docstring or "")
    prose = re.split(r"\n(?:Args|Returns|Raises|Warns|Attributes|Yields|Example):\n", text)[0]
    return escape(prose.strip())


def sections(docstring: str | None) -> dict[str, dict[str, str]]:
    """Return the entries of a Google-style docstring by section."""
    out: dict[str, dict[str, str]] = {}
    entries: dict[str, str] = {}
    name = ""
    for line in inspect.cleandoc(docstring or "").splitlines():
        if head := re.fullmatch(r"(Args|Raises|Attributes|Returns):", line):
            entries = out.setdefault(head[1], {})
        elif entry := re.match(r" {4}(\w+): (.*)", line):
            name = entry[1]
            entries[name] = entry[2]
        elif name in entries and line.startswith(" " * 8):
            entries[name] += " " + line.strip()
    return out


# settings


def kind(schema: Mapping[str, Any], definitions: Mapping[str, Any]) -> str:
    """Return a JSON schema's type in a few words."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        target = definitions[name]
        text = name if "properties" in target else kind(target, definitions)
    elif "anyOf" in schema or "oneOf" in schema:
        parts = [*schema.get("anyOf", ()), *schema.get("oneOf", ())]
        text = " or ".join(dict.fromkeys(kind(one, definitions) for one in parts))
    elif "enum" in schema or "const" in schema:
        text = ", ".join(code(value) for value in schema.get("enum", [schema.get("const")]))
    elif "prefixItems" in schema:
        text = f"{len(schema['prefixItems'])} x {kind(schema['prefixItems'][0], definitions)}"
    elif schema.get("type") == "array":
        text = f"list of {kind(schema.get('items', {}), definitions)}"
    else:
        bounds = [f"{sign} {schema[key]}" for key, sign in SIGNS.items() if key in schema]
        name = schema.get("type", "any")
        text = f"{WORDS.get(name, name)} {', '.join(bounds)}".strip()
    return text


def settings(model: type[BaseModel], *, of_method: bool = False) -> str:
    """Return a table of a pydantic model's settings.

    Settings of a method link to the pages of nested settings and of adversaries.
    """
    rows = []
    for name, form, default, text in fields(model):
        links = ""
        for nested in models_in(model.model_fields[name].annotation) if of_method else ():
            NESTED[nested.__name__] = nested
            links += f" See [{nested.__name__}](../training.md#{nested.__name__.lower()})."
        if of_method and name == "adversary":
            links += " See [adversaries](../adversaries.md)."
        rows.append((code(name), form, default, text + links))
    return table(("setting", "type", "default", "what it does"), rows) if rows else ""


def models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """Yield the pydantic models that an annotation names."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield from () if inspect.isabstract(annotation) else (annotation,)
    for part in get_args(annotation):
        yield from models_in(part)


def record(model: type[BaseModel]) -> str:
    """Return a table of a stored record's fields."""
    rows = [(code(name), form, text) for name, form, _, text in fields(model)]
    return table(("field", "type", "meaning"), rows)


def fields(model: type[BaseModel]) -> Iterator[tuple[str, str, str, str]]:
    """Yield name, type, default and description of a pydantic model's fields, its own first."""
    schema = model.model_json_schema()
    definitions = schema.get("$defs", {})
    if "$ref" in schema:  # a model that refers to itself
        schema = definitions[model.__name__]
    required = set(schema.get("required", ()))
    own = inspect.get_annotations(model)
    for name, field in sorted(schema["properties"].items(), key=lambda item: item[0] not in own):
        if "const" in field:
            continue  # the name of a guard or adversary
        annotation = model.model_fields[name].annotation
        default = "required" if name in required else literal(field.get("default"))
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            default = changed(model.model_fields[name].default, annotation)
        yield name, kind(field, definitions), default, field.get("description", "")


def changed(value: Any, model: type[BaseModel]) -> str:
    """Return how a nested default differs from its class's own defaults."""
    if not isinstance(value, BaseModel):
        return "required"
    own = {name: field.default for name, field in model.model_fields.items()}
    parts = [f"{k}={v}" for k, v in value.model_dump(mode="json").items() if v != plain(own[k])]
    return code(" ".join(parts)) if parts else "its defaults"


def plain(value: Any) -> Any:
    """Return a value as JSON has it."""
    return json.loads(json.dumps(value, default=str))


def presets(model: Any) -> str:
    """Return a table of a method's presets, or nothing where it has one only."""
    rows = [
        (code(name), ", ".join(f"`{k}={show(v)}`" for k, v in given.items()) or "the defaults")
        for name, given in model.PRESETS.items()
    ]
    return f"\n## Presets\n\n{table(('preset', 'settings'), rows)}" if rows else ""


def show(value: Any) -> str:
    """Return a preset's value in a few characters."""
    if isinstance(value, BaseModel):
        given = value.model_dump(mode="json", exclude_defaults=True)
        name = getattr(value, "name", type(value).__name__)
        return f"{name} {json.dumps(given)}" if given else name
    text = json.dumps(value, default=str)
    return text if len(text) <= 80 else text[:77] + "..."


def method(model: Any, name: str) -> str:
    """Return the page of one edit, guard or attack."""
    return (
        f"# {name}\n\n{linked(description(model))}\n\n"
        f"{sources(model)}\n{parity(model)}\n"
        f"## Settings\n\n{settings(model, of_method=True)}{presets(model)}"
    )


def description(model: Any) -> str:
    """Return a method's description: its class's docstring, else its module's."""
    own = paragraphs(model.__dict__.get("__doc__"))
    module = paragraphs(inspect.getmodule(model).__doc__)
    return module if own.startswith("Settings of") or not own else own


def sources(model: Any) -> str:
    """Return paper, code and deviations of a method."""
    lines = []
    if paper := getattr(model, "paper", ""):
        lines.append(f"- **Paper**: {linked(paper)}")
    if url := getattr(model, "code_url", ""):
        lines.append(f"- **Published code**: <{url}>")
    lines.append(f"- **Source**: `{source_of(model)}`")
    if inputs := getattr(model, "inputs", ""):
        lines.append(f"- **Learns from**: {inputs}")
    if access := getattr(model, "access", ""):
        lines.append(f"- **Needs**: {ACCESS[access]}")
        lines.append(f"- **Tier**: {model.tier}")
        lines.append(f"- **Prompts**: {model.role}, unless others are named")
    return "\n".join(lines) + "\n"


def parity(model: Any) -> str:
    """Return the section about equality with the released code: what is exact, what differs."""
    ours = model.paper.startswith("ours") and not model.code_commit
    head = "The method is ours; there is no released code.\n\n" if ours else ""
    return f"## Parity\n\n{head}{comparison(model)}"


def comparison(model: Any) -> str:
    """Return what is equal to the released code of a method or an adversary, and what differs."""
    lines = []
    if commit := getattr(model, "code_commit", ""):
        lines.append(f"Compared with the released code at commit `{commit}`.\n")
    for title, text in (("Exact", model.parity), ("Different", model.deviations)):
        items = re.split(r"(?<=\.) (?=[A-Z`])", text) if text else []
        lines += [f"**{title}**\n", *(f"- {linked(item)}" for item in items), ""] if items else []
    return "\n".join(lines)


def linked(text: str) -> str:
    """Return a text with arXiv numbers as links."""
    return re.sub(r"arXiv:(\d{4}\.\d{5})", r"[arXiv:\1](https://arxiv.org/abs/\1)", text)


def source_of(value: Any) -> str:
    """Return the file that defines an object, from the repository's root."""
    path = Path(inspect.getsourcefile(inspect.unwrap(value)) or "")
    return f"src/safegen/{path.relative_to(SOURCE).as_posix()}"


def adversaries() -> str:
    """Return the page of the adversaries that an edit can train against."""
    parts = [(DOCS / "reference" / "adversaries.inc").read_text(encoding="utf-8")]
    for name in registry.ADVERSARIES:
        model = registry.resolve(registry.ADVERSARIES, name, "adversary")
        parts.append(
            f"## {name}\n\n{linked(paragraphs(model.__doc__))}\n\n"
            f"{sources(model)}\n{comparison(model)}\n{settings(model)}"
        )
    return "\n".join(parts)


def training() -> str:
    """Return the page of settings that several methods share."""
    for name in registry.EDITS:
        settings(registry.resolve(registry.EDITS, name, "edit"), of_method=True)
    parts = ["# Nested settings\n\nChange one with a dot, as in `--set training.lr=1e-4`.\n"]
    parts += [f"## {n}\n\n{paragraphs(m.__doc__)}\n\n{settings(m)}" for n, m in NESTED.items()]
    return "\n".join(parts)


def judges() -> str:
    """Return the page of the judges, from their classes and constructors."""
    parts = [(DOCS / "reference" / "judges.inc").read_text(encoding="utf-8")]
    for name in registry.JUDGES:
        model = registry.resolve(registry.JUDGES, name, "judge")
        described = sections(model.__init__.__doc__).get("Args", {})
        rows = [
            (
                code(option.name),
                "required" if option.default is option.empty else literal(option.default),
                described.get(option.name, ""),
            )
            for option in list(inspect.signature(model).parameters.values())
        ]
        parts.append(
            f"## {name}\n\n{paragraphs(model.__doc__)}\n\n- **Source**: `{source_of(model)}`\n\n"
            f"{table(('option', 'default', 'what it does'), rows)}"
        )
    rows = [
        (code(name), ", ".join(map(code, labels))) for name, labels in registry.LABEL_SETS.items()
    ]
    parts.append(
        "## Label sets\n\nNames for several labels of `nudenet`, usable wherever labels are "
        f"given.\n\n{table(('name', 'labels'), rows)}"
    )
    return "\n".join(parts)


def server() -> str:
    """Return the page of the settings of `safegen serve`: those of its file and its token file."""
    from safegen.serve import config

    about = (
        "# Server settings\n\nKeys of the TOML file of `safegen serve --config FILE`. Paths in it "
        "are relative to the file. An option of the [command line](cli.md#serve) replaces its "
        "setting. [Operate the server](../how-to/operate.md) explains the most important ones.\n"
    )
    models = {model.__name__: model for model in models_of(config)}
    parts = [
        f"## {title}\n\n{paragraphs(models.pop(name).__doc__)}\n\n{settings(getattr(config, name))}"
        for name, title in SERVER.items()
    ]
    assert not models, f"settings of the server without a heading: {', '.join(models)}"
    return "\n".join([about, *parts])


def protocols() -> str:
    """Return the page of the built-in protocols and of the keys of a protocol file."""
    from safegen.evaluation import protocol, schema

    parts = [(DOCS / "reference" / "protocols.inc").read_text(encoding="utf-8")]
    folder = Path(protocol.__file__).parent / "protocols"
    for name in registry.PROTOCOLS:
        given = tomllib.loads((folder / f"{name}.toml").read_text(encoding="utf-8"))
        rows = [
            (
                one["role"],
                code(one["name"]),
                one.get("prompts", "all"),
                one.get("requires") or code(one.get("source", "")),
            )
            for one in given["lists"]
        ]
        judge = given["judge"]
        parts.append(
            f"### {name}\n\n{given.get('about', '')}\n\n"
            f"- **Judge**: `{judge['name']}`, labels {', '.join(map(code, judge['labels']))}, "
            f"threshold {judge.get('threshold', 0.5)}\n"
            f"- **Seeds**: {seeds(given['seeds'])}\n"
            f"- **Metrics**: {', '.join(map(code, given['metrics']))}\n\n"
            f"{table(('role', 'list', 'prompts', 'source'), rows)}"
        )
    parts.append("## Keys of a protocol file\n")
    models = [protocol.Protocol, *models_of(schema)]
    parts += [f"### {m.__name__}\n\n{paragraphs(m.__doc__)}\n\n{settings(m)}" for m in models]
    return "\n".join(parts)


def seeds(value: Any) -> str:
    """Return a protocol's seeds in words."""
    return "those of the prompt file" if value == "rows" else ", ".join(map(str, value))


def models_of(module: Any) -> Iterator[type[BaseModel]]:
    """Yield the pydantic models that a module defines."""
    for value in vars(module).values():
        if not (isinstance(value, type) and issubclass(value, BaseModel)):
            continue
        if value.__module__ == module.__name__ and value.model_fields:
            yield value


def dialects() -> str:
    """Return the table of prompt dialects."""
    rows = []
    for name, one in DIALECTS.items():
        columns = ", ".join(map(code, (*one.prompts, *one.needs)))
        rows.append(
            (code(name), one.about + (f". **Note**: {one.note}" if one.note else ""), columns)
        )
    return (
        "# Prompt dialects\n\nThe first dialect that fits a file's columns and name is used; "
        "`--dialect` names another. [Prompts](prompts.md) says what holds for all of them.\n\n"
        + table(("dialect", "what it reads", "columns"), rows)
    )


def files() -> str:
    """Return the page of file formats, from the typed records."""
    parts = [(DOCS / "reference" / "files.inc").read_text(encoding="utf-8")]
    for title, name in RECORDS.items():
        if find_spec(name) is None:
            continue
        models = list(models_of(import_module(name)))
        parts.append(f"## {title} records\n\nDefined in `{name}`.\n")
        parts += [f"### {m.__name__}\n\n{paragraphs(m.__doc__)}\n\n{record(m)}" for m in models]
    return "\n".join(parts)


def python_api() -> str:
    """Return the page of the public Python names, as mkdocstrings directives."""
    parts = ["# Python API\n\nEverything that `import safegen` offers.\n"]
    for name in sorted(safegen.__all__, key=str.lower):
        value = getattr(safegen, name)
        parts.append(f"::: {value.__module__}.{value.__qualname__}\n")
    return "\n".join(parts)


def cli() -> str:
    """Return the page of the command line: every command with its arguments and options."""
    about = (DOCS / "reference" / "cli.inc").read_text(encoding="utf-8")
    return f"# Command line\n\n{about}" + "\n".join(command(get_command(app), ["safegen"]))


def command(one: Any, words: list[str]) -> Iterator[str]:
    """Yield the sections of a command and of those below it."""
    context = one.context_class(one, info_name=words[-1])
    if len(words) > 1:
        rows = [
            (", ".join(map(code, p.opts)), bound(p), default(p), p.help or "")
            for p in one.params
            if p.param_type_name == "option" and "--help" not in p.opts and not p.hidden
        ]
        usage = " ".join([*words, *one.collect_usage_pieces(context)])
        yield f"## {' '.join(words[1:])}\n\n{one.help}\n\n```text\n{usage}\n```\n"
        if rows:
            yield table(("option", "value", "default", "what it does"), rows)
    for name, below in sorted(getattr(one, "commands", {}).items()):
        yield from command(below, [*words, name])


def bound(option: Any) -> str:
    """Return what an option takes."""
    kind = option.type_descriptor.annotation
    if kind is bool:
        return "flag"
    if get_origin(kind) is Literal:
        return ", ".join(map(code, get_args(kind)))
    if get_origin(kind) is list:
        (kind,) = get_args(kind)
    names = {str: "text", int: "integer", float: "number", Path: "path"}
    limits = f" >= {option.min}" if option.min is not None else ""
    limits += f" <= {option.max}" if option.max is not None else ""
    return names.get(kind, "text") + limits + (", repeatable" if option.multiple else "")


def default(option: Any) -> str:
    """Return an option's default."""
    if option.required:
        return "required"
    return code(option.default) if option.default not in (None, False, [], ()) else ""


# results


def result(given: Mapping[str, Any]) -> Page:
    """Return a page of results: what was measured, when, how, and its tables."""
    about = [f"---\nhide: [toc]\n---\n\n# {given['title']}\n\n{given['summary']}\n"]
    about.append(
        "\n".join(
            f"- **{key}**: {given[key]}"
            for key in ("model", "date", "machine", "command", "n", "intervals")
            if key in given
        )
        + "\n"
    )
    for one in given["tables"]:
        rows = [[render(value) for value in row] for row in one["rows"]]
        about.append(f"## {one['title']}\n\n{one.get('text', '')}\n\n{table(one['columns'], rows)}")
        about += [f"![{alt}](../images/{name})\n" for name, alt in one.get("images", {}).items()]
    if limits := given.get("limits"):
        about.append("## Limits\n\n" + "\n".join(f"- {line}" for line in limits) + "\n")
    return given["title"], "\n".join(about)


def render(value: Any) -> str:
    """Return a figure as text: a list is a value with its interval."""
    if value is None:
        return ""
    if isinstance(value, list):
        number, low, high = value
        return f"{number} ({low} to {high})"
    return str(value)


# mkdocs hooks


def on_config(config: Any) -> Any:
    """Put the generated pages into the navigation, below their section."""
    made = pages()
    for entry in config.nav:
        (section,) = entry
        if section == "Reference":
            entry[section] = [*navigation(made, "reference"), *entry[section]]
        if section == "Results":
            entry[section] = [*entry[section], *navigation(made, "results")]
    return config


def navigation(made: Mapping[str, Page], room: str) -> list[Any]:
    """Return the navigation entries of one room; sub-folders are sections."""
    flat, nested = [], {}
    for path, (title, _) in made.items():
        parts = path.split("/")
        if parts[0] != room:
            continue
        if len(parts) == 2:
            flat.append({title: path})
        else:
            nested.setdefault(parts[1].capitalize(), []).append({title: path})
    return [*flat[:1], *({k: v} for k, v in nested.items()), *flat[1:]]


def on_files(files: Any, config: Any) -> Any:
    """Add the generated pages to the site."""
    from mkdocs.structure.files import File

    for path, (_, text) in pages().items():
        files.append(File.generated(config, path, content=text))
    return files
