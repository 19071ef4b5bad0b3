"""Whatever a file holds, its parser reads it or says what is wrong with it: nothing else is ever raised.

    FUZZ_CASES=20000 python -m pytest -n auto tests/attacks/test_fuzz.py       (`make fuzz`)

Without FUZZ_CASES each parser gets a few inputs, the same each time; with it so many, others each time.
"""

import os
import re
import warnings

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from parsers import PARSERS

SHORT = 40
WORD = re.compile(rb"\w+")
CASES = int(os.environ.get("FUZZ_CASES", SHORT))


@st.composite
def damaged(draw, parser):
    """A sound example with bytes taken out, put in, doubled and turned, or another file altogether."""
    content = draw(st.sampled_from(parser.examples))
    words = st.sampled_from(parser.words) if parser.words else st.binary(max_size=4)
    for _ in range(draw(st.integers(0, 6))):
        start = draw(st.integers(0, len(content)))
        end = draw(st.integers(start, min(len(content), start + 40)))
        match draw(st.integers(0, 4)):
            case 0:
                content = content[:start] + content[end:]
            case 1:
                content = content[:start] + draw(words) + content[end:]
            case 2:
                content = content[:start] + draw(words) + content[start:]
            case 3:
                content = content[:end] + content[start:]
            case 4:
                content = content[:start] + draw(st.binary(max_size=4)) + content[start + 1 :]
    return content


@st.composite
def exchanged(draw, parser):
    """A sound example with one or two of its words exchanged: what is around them keeps its form."""
    content = draw(st.sampled_from(parser.examples))
    for _ in range(draw(st.integers(1, 2))):
        own = draw(st.sampled_from(list(WORD.finditer(content)) or [re.search(b"$", content)]))
        content = content[: own.start()] + draw(st.sampled_from(parser.words or (b"",))) + content[own.end() :]
    return content


def inputs(parser):
    """Damaged examples, examples with other words, words of the format in any order, and any bytes."""
    words = st.lists(st.sampled_from(parser.words or (b"",)), max_size=12).map(b"".join)
    return st.one_of(damaged(parser), damaged(parser), exchanged(parser), words, st.binary(max_size=200))


@pytest.mark.parametrize("parser", PARSERS, ids=lambda parser: parser.name.replace(" ", "_"))
def test_a_parser_reads_its_file_or_says_what_is_wrong(parser, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "deep" / parser.file
    path.parent.mkdir(parents=True)

    @settings(
        max_examples=CASES, derandomize=CASES == SHORT, deadline=None, database=None,
        phases=[Phase.generate, Phase.shrink], suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(inputs(parser))
    def check(content):
        path.write_bytes(content)
        try:
            parser.read(path)
        except parser.refuses as error:
            assert str(error)

    for example in parser.examples:
        path.write_bytes(example)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check()
    assert not (tmp_path / "canary").exists()
