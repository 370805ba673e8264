"""Text of the demo model: collecting, packing, splitting and tokenizing the sources of the Python standard library.

The corpus is every ``.py`` file of a CPython standard library, tests included (PSF licence), after these rules, each
one a function below:

* third-party packages, build configuration and files that are not valid Python of the running interpreter are left out;
* files that are mostly literal tables (character maps, generated parser tables) are left out;
* ``pydoc_data/topics.py`` holds the language reference as one huge dictionary: its values become plain text documents;
* equal texts are kept once, newlines are ``\\n``.

Whether a document is held out depends on the hash of its relative path alone, so two versions of one file always fall
on the same side and the split never changes.
"""

from __future__ import annotations

import ast
import hashlib
import json
import lzma
import platform
import re
import sysconfig
import textwrap
import tokenize
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from tokenizers import Tokenizer

HELD_OUT_PERCENT = 2
SKIPPED_FOLDERS = frozenset({"site-packages", "dist-packages", "__pycache__", "_bundled"})
# Build configuration: it describes the machine that built the interpreter, not the language.
SKIPPED_NAMES = re.compile(r"^(_sysconfigdata.*|_sysconfig_vars.*|python-config)\.py$")
TOPICS = "pydoc_data/topics.py"

END_OF_TEXT, IM_START, IM_END = SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")

# The pre-tokenizer that GGUF calls "qwen2". A run of spaces stays one piece up to the blank that belongs to the next
# word, a newline joins the punctuation before it (":\n"), "." or "(" joins the identifier after it, digits stay single.
PRE_TOKENIZER_NAME = "qwen2"
PRE_TOKENIZER_REGEX = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + "
    "'\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


class Document(NamedTuple):
    path: str  # relative to the library's folder; a topic of the reference is "pydoc_data/topics.py:NAME"
    text: str


class Dialogue(NamedTuple):
    path: str  # the file that the answer comes from
    request: str
    answer: str


@dataclass(frozen=True)
class Corpus:
    source: str  # where the text comes from, as the model card says it
    documents: tuple[Document, ...]
    dialogues: tuple[Dialogue, ...]

    def split(self) -> tuple[list[Document], list[Document]]:
        """(training, held-out) documents."""
        held_out = [d for d in self.documents if is_held_out(d.path)]
        return [d for d in self.documents if not is_held_out(d.path)], held_out


def is_held_out(path: str) -> bool:
    digest = hashlib.sha256(path.encode()).digest()
    return int.from_bytes(digest[:8], "little") % 100 < HELD_OUT_PERCENT


def is_table(text: str) -> bool:
    """Whether a source is mostly rows of literals: long, and most lines start with a literal and end with a comma
    or continue a string."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    rows = sum(bool(re.match(r"""^([-+]?\d|0x|[\[({]+['"\d-]|[rbu]?['"])""", line)) for line in lines)
    return len(text) > 2000 and rows > 0.5 * len(lines)


def _read_python(path: Path) -> str | None:
    """The text of a valid Python source, or None."""
    try:
        with tokenize.open(path) as file:
            text = file.read()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # the test suite keeps broken sources on purpose
        return None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _topics(text: str) -> Iterator[Document]:
    """The documents in pydoc's dictionary of the language reference."""
    for node in ast.parse(text).body:
        if isinstance(node, ast.Assign):
            for name, topic in ast.literal_eval(node.value).items():
                yield Document(f"{TOPICS}:{name}", topic.strip() + "\n")


def _documents(root: Path) -> Iterator[Document]:
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if SKIPPED_FOLDERS & set(relative.parts) or SKIPPED_NAMES.match(path.name):
            continue
        text = _read_python(path)
        if text is None or not text.strip():
            continue
        if relative.as_posix() == TOPICS:
            yield from _topics(text)
        elif not is_table(text):
            yield Document(relative.as_posix(), text)


def collect(roots: list[Path]) -> Corpus:
    """Documents of the standard libraries at `roots` (default: that of the running interpreter), equal texts once."""
    unique: dict[str, Document] = {}
    for root in roots or [Path(sysconfig.get_path("stdlib"))]:
        if not root.is_dir():
            raise FileNotFoundError(f"{root}: no such folder; --corpus names a folder of Python sources")
        for document in _documents(root):
            unique.setdefault(hashlib.sha256(document.text.encode("utf-8", "replace")).hexdigest(), document)
    own = f"standard library of CPython {platform.python_version()} (PSF licence), tests included"
    source = own if not roots else f"{len(roots)} folder(s) of Python sources"
    documents = [d for d in unique.values() if _is_encodable(d.text)]
    return Corpus(source, tuple(documents), tuple(dialogues(documents)))


def _is_encodable(text: str) -> bool:
    return not re.search("[\ud800-\udfff\x00]", text)


def dialogues(documents: list[Document]) -> Iterator[Dialogue]:
    """Requests and answers made from the documented functions of the sources: the request quotes the first line of the
    docstring, the answer is the function. They give the chat tokens a meaning. Tests have no useful docstrings, and
    held-out files are left out."""
    for document in documents:
        skipped = {"test", "tests", "idle_test"} & set(document.path.split("/"))
        if skipped or is_held_out(document.path) or not document.path.endswith(".py"):
            continue
        lines = document.text.splitlines(keepends=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(document.text)
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and (summary := ast.get_docstring(node)):
                code = textwrap.dedent("".join(lines[node.lineno - 1 : node.end_lineno]))
                if 100 < len(code) < 1800:
                    request = f"Write a Python function {node.name}: {summary.splitlines()[0]}"
                    yield Dialogue(document.path, request, code)


def pack(corpus: Corpus, path: Path) -> None:
    """Write a corpus as xz-compressed JSON lines: {"source"}, then the documents and the dialogues, one a line."""
    with lzma.open(path, "wt", encoding="utf-8", preset=9) as file:
        file.write(json.dumps({"source": corpus.source}) + "\n")
        for items in (corpus.documents, corpus.dialogues):
            file.writelines(json.dumps(item._asdict()) + "\n" for item in items)


def unpack(path: Path) -> Corpus:
    """Read what `pack` wrote; the text need not be valid Python of the running interpreter."""
    with lzma.open(path, "rt", encoding="utf-8") as file:
        source = json.loads(file.readline())["source"]
        items = [json.loads(line) for line in file]
    documents = tuple(Document(**item) for item in items if "text" in item)
    return Corpus(source, documents, tuple(Dialogue(**item) for item in items if "request" in item))


def train_tokenizer(documents: list[Document], vocab_size: int) -> Tokenizer:
    """Byte-level BPE (Sennrich et al. 2016, bytes as in GPT-2) of `vocab_size` entries, the special ones first."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRE_TOKENIZER_REGEX), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=24,
        show_progress=False,
    )
    tokenizer.train_from_iterator((d.text for d in documents), trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, documents: list[Document]) -> list[int]:
    """Token ids of all documents, each one closed by <|endoftext|>; special tokens in the text stay text."""
    tokenizer.encode_special_tokens = True
    end = SPECIAL_TOKENS.index(END_OF_TEXT)  # as train_tokenizer places them
    ids: list[int] = []
    for encoding in tokenizer.encode_batch([d.text for d in documents], add_special_tokens=False):
        ids += encoding.ids
        ids.append(end)
    tokenizer.encode_special_tokens = False
    return ids


def encode_dialogues(tokenizer: Tokenizer, dialogues: tuple[Dialogue, ...]) -> list[int]:
    """Token ids of the dialogues in the form of CHAT_TEMPLATE, each one closed by <|endoftext|>."""
    end, im_start, im_end = range(len(SPECIAL_TOKENS))
    tokenizer.encode_special_tokens = True
    requests = tokenizer.encode_batch([f"user\n{d.request}" for d in dialogues], add_special_tokens=False)
    answers = tokenizer.encode_batch([f"assistant\n{d.answer}" for d in dialogues], add_special_tokens=False)
    newline = tokenizer.encode("\n", add_special_tokens=False).ids
    tokenizer.encode_special_tokens = False
    ids: list[int] = []
    for request, answer in zip(requests, answers, strict=True):
        ids += [im_start, *request.ids, im_end, *newline, im_start, *answer.ids, im_end, *newline, end]
    return ids
