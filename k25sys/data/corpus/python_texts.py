"""Text and code that come with Python itself: help topics, modules, functions with what they are for."""

import ast
import sysconfig
import textwrap
from collections.abc import Iterator
from pathlib import Path

from k25sys.data.corpus.part import Part
from k25sys.data.sources.text import TextDocuments, TextFiles
from k25sys.data.tokenizer import Tokenizer
from k25sys.errors import OptionalPackageError, message

_PACKAGES = (
    "asyncio", "collections", "concurrent/futures", "email", "html", "http", "importlib", "json", "logging", "tomllib",
    "unittest", "urllib", "wsgiref", "zoneinfo",
)  # fmt: skip
_FILE_BYTES = (500, 40_000)
_LEAST_DOCSTRING = 40  # characters
_CODE_LINES = (3, 60)


def python_topics(tokenizer: Tokenizer) -> TextDocuments:
    """The topics of Python's `help()`: its language reference, about 0.5 MB of English.

    Raises:
        ImportError: this Python was installed without them.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        hint = "install the whole standard library (Debian: libpython3-stdlib)"
        got = "a Python without pydoc_data"
        raise OptionalPackageError(message("python_topics", "package", got, "pydoc_data", hint)) from error
    return TextDocuments("python-topics", tokenizer, [topics[name].strip() for name in sorted(topics)])


def python_code(tokenizer: Tokenizer, part: Part = Part.WHOLE) -> TextFiles:
    """Modules of the standard library, those of middle size, sorted by path."""
    return TextFiles(part.name("python-code"), tokenizer, part.of(_modules((".", *_PACKAGES))))


def python_functions(tokenizer: Tokenizer, part: Part = Part.WHOLE) -> TextDocuments:
    """Functions and methods of modules of the standard library: where one is from, its docstring, its code without.

    A part has those of the modules that `python_code` has of it.
    """
    modules = set(part.of(_modules((".", *_PACKAGES))))
    documents = [text for file in _modules((".",)) if file in modules for text in _functions(file)]
    return TextDocuments(part.name("python-functions"), tokenizer, documents)


def _modules(packages: tuple[str, ...]) -> list[Path]:
    library = Path(sysconfig.get_path("stdlib"))
    files = sorted(file for package in packages for file in (library / package).glob("*.py"))
    least, most = _FILE_BYTES
    return [file for file in files if not file.name.startswith("_") and least <= file.stat().st_size <= most]


def _functions(file: Path) -> Iterator[str]:
    source = file.read_text("utf-8")
    lines, tree = source.splitlines(), ast.parse(source)
    for outer in [tree, *(node for node in tree.body if isinstance(node, ast.ClassDef))]:
        prefix = f"{file.stem}.{outer.name}" if isinstance(outer, ast.ClassDef) else file.stem
        for node in outer.body:
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                text = _function(node, lines)
                if text:
                    yield f"# {prefix}.{node.name}\n{text}"


def _function(node: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]) -> str:
    """The docstring, a blank line, and the code without it; nothing where one of them is missing or out of bounds."""
    docstring, first = ast.get_docstring(node), node.body[0]
    if not docstring or len(docstring) < _LEAST_DOCSTRING or len(node.body) < 2:
        return ""
    start = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    code = [*lines[start - 1 : first.lineno - 1], *lines[first.end_lineno or first.lineno : node.end_lineno]]
    least, most = _CODE_LINES
    if not least <= len(code) <= most or first.lineno == node.lineno:
        return ""
    return f'"""{docstring}"""\n\n' + textwrap.dedent("\n".join(code)).strip("\n") + "\n"
