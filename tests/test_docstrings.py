"""The docstrings of the standard library, their names, and which names are held out."""

import asyncio
import sysconfig
from pathlib import Path

import pytest

from neobert import docstrings


def test_docstrings_are_read_without_importing(tmp_path):
    (tmp_path / "module.py").write_text(
        '"""Module."""\nraise SystemExit("imported")\n'
        'class A:\n    """Class."""\n    async def f(self):\n        """Method."""\n'
    )
    (tmp_path / "broken.py").write_text("def f(:\n")
    (tmp_path / "binary.py").write_bytes(b"\x00\xff")
    for ignored in ("site-packages", "tests"):
        (tmp_path / ignored).mkdir()
        (tmp_path / ignored / "module.py").write_text('"""Not ours."""')
    assert list(docstrings.docstrings(tmp_path)) == ["Module.", "Class.", "Method."]


def test_the_standard_library_is_read_once_per_text(monkeypatch):
    folder = Path(asyncio.__file__).parent
    monkeypatch.setattr(sysconfig, "get_path", lambda name: {"stdlib": str(folder)}[name])
    found = docstrings.standard_library_docstrings()
    assert asyncio.sleep.__doc__ in found and len(found) > 200
    every = list(docstrings.docstrings(folder))
    assert len(found) == len(set(every)) < len(every)


def test_names_are_qualified(tmp_path):
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").write_text('"""Package."""')
    (tmp_path / "package" / "module.py").write_text(
        'class A:\n    def f(self):\n        """Method."""\n'
        '        def g():\n            """Inner."""\ndef f():\n    """Function."""\n'
    )
    assert list(docstrings.documented(tmp_path)) == [
        ("package", "Package."),
        ("package.module.f", "Function."),
        ("package.module.A.f", "Method."),
        ("package.module.A.f.g", "Inner."),
    ]


@pytest.mark.parametrize("name, words", [
    ("csv.DictReader.writeheader", "csv dict reader writeheader"),
    ("pandas.read_csv", "pandas read csv"),
    ("html.parser.HTMLParser._feed", "html parser html parser feed"),
    ("base64.b32hexdecode", "base64 b32hexdecode"),
    ("HTTPStatus.MOVED", "http status moved"),
    ("müller.straße", "müller straße"),
])  # fmt: skip
def test_a_name_is_a_query_as_it_is_and_in_words(name, words):
    assert docstrings.as_query(name) == f"{name} {words}"


def test_held_out_names_are_a_fixed_tenth():
    train, held_out = docstrings.name_pairs(False), docstrings.name_pairs(True)
    assert 0.08 < len(held_out) / (len(train) + len(held_out)) < 0.12
    assert not {text for _, text in train} & {text for _, text in held_out}
    assert not {name for name, _ in train} & {name for name, _ in held_out}
    assert docstrings.name_pairs(True) == held_out
    # By the name alone, whatever the library: these are fixed for ever.
    names = ["csv.reader", "json.dumps", "_collections_abc.Set._from_iterable"]
    assert [docstrings.is_held_out(name) for name in names] == [False, False, True]
    assert [docstrings.is_held_out("json.dumps", share) for share in (0.0, 1.0)] == [False, True]
