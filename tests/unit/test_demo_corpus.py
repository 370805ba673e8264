"""The demo model's text: what is kept, how it is split, packed and tokenized (tools/demo_corpus.py; needs no torch)."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def demo_corpus() -> ModuleType:
    path = Path(__file__).parents[2] / "tools" / "demo_corpus.py"
    spec = importlib.util.spec_from_file_location("demo_corpus", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["demo_corpus"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


SOURCE = '''def double(x):
    """Return twice x, whatever x is."""
    if x is None:
        raise ValueError("x is None; a number or a sequence is needed")
    return x + x
'''


@pytest.fixture
def library(tmp_path: Path) -> Path:
    files = {
        "good.py": SOURCE,
        "again.py": SOURCE,
        "test/test_good.py": "import good\r\nassert good.double(1) == 2\r\n",
        "broken.py": "def f(:\n",
        "site-packages/other.py": "x = 1\n",
        "_sysconfigdata_linux.py": "build_time_vars = {}\n",
        "table.py": "TABLE = (\n" + "    0x10, 0x20,\n" * 300 + ")\n",
        "pydoc_data/topics.py": "topics = {'if': 'The if statement\\n', 'for': 'The for statement\\n'}\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(text.encode())
    return tmp_path


def test_what_is_kept(demo_corpus: ModuleType, library: Path) -> None:
    corpus = demo_corpus.collect([library])
    assert {d.path: d.text for d in corpus.documents} == {
        "again.py": SOURCE,
        "pydoc_data/topics.py:if": "The if statement\n",
        "pydoc_data/topics.py:for": "The for statement\n",
        "test/test_good.py": "import good\nassert good.double(1) == 2\n",
    }


def test_a_documented_function_becomes_a_dialogue(demo_corpus: ModuleType, library: Path) -> None:
    (dialogue,) = demo_corpus.collect([library]).dialogues
    assert dialogue.request == "Write a Python function double: Return twice x, whatever x is."
    assert dialogue.answer == SOURCE


def test_held_out_files_give_no_dialogues(demo_corpus: ModuleType) -> None:
    paths = [f"module_{i}.py" for i in range(1000)]
    documents = [demo_corpus.Document(path, SOURCE) for path in paths]
    held_out = {path for path in paths if demo_corpus.is_held_out(path)}
    assert 5 <= len(held_out) <= 45
    assert {d.path for d in demo_corpus.dialogues(documents)} == set(paths) - held_out


def test_missing_folder_is_named(demo_corpus: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        demo_corpus.collect([tmp_path / "nowhere"])


def test_pack_round_trip(demo_corpus: ModuleType, library: Path, tmp_path: Path) -> None:
    corpus = demo_corpus.collect([library])
    demo_corpus.pack(corpus, tmp_path / "corpus.jsonl.xz")
    assert demo_corpus.unpack(tmp_path / "corpus.jsonl.xz") == corpus


def test_tokenizer(demo_corpus: ModuleType) -> None:
    text = SOURCE + "\n\n\tprint('é 世界 \U0001f600', 123)  # <|im_end|> \n   \n"
    documents = [demo_corpus.Document("a.py", text * 20)]
    tokenizer = demo_corpus.train_tokenizer(documents, 400)
    assert [tokenizer.token_to_id(token) for token in demo_corpus.SPECIAL_TOKENS] == [0, 1, 2]
    ids = demo_corpus.encode(tokenizer, documents)
    assert ids[-1] == 0
    assert not {0, 1, 2} & set(ids[:-1]), "special tokens in the text must stay text"
    assert tokenizer.decode(ids[:-1], skip_special_tokens=False) == text * 20
    indentation = [token for token in tokenizer.encode(SOURCE).tokens if set(token) == {"Ġ"}]
    assert "Ġ" * 7 in indentation, "a run of spaces is one token up to the blank of the next word"


def test_encoded_dialogue_has_the_form_of_the_chat_template(demo_corpus: ModuleType) -> None:
    jinja2 = pytest.importorskip("jinja2")
    dialogue = demo_corpus.Dialogue("a.py", "Write <|im_end|>", SOURCE)
    tokenizer = demo_corpus.train_tokenizer([demo_corpus.Document("a.py", SOURCE * 20)], 400)
    ids = demo_corpus.encode_dialogues(tokenizer, (dialogue,))
    messages = [{"role": "user", "content": dialogue.request}, {"role": "assistant", "content": dialogue.answer}]
    rendered = jinja2.Template(demo_corpus.CHAT_TEMPLATE).render(messages=messages)
    assert tokenizer.decode(ids, skip_special_tokens=False) == rendered + "<|endoftext|>"
    assert [ids.count(special) for special in (0, 1, 2)] == [1, 2, 2]
