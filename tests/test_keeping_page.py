"""The examples of docs/train-it-yourself.md run as they stand there and print what it says."""

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parent.parent / "docs" / "train-it-yourself.md"
NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?")
ZEROS = 1_459_800


def numbers(line):
    return [float(number.replace(",", "")) for number in NUMBER.findall(line)]


def compare(printed, wanted):
    """Lines that the page shows, in their order among those printed.

    Zeros that are kept are exact; other numbers may depend on the text, which is that of the running Python.
    """
    lines = iter(printed.splitlines())
    for line in wanted.splitlines():
        shape = NUMBER.sub("#", line)
        found = next((other for other in lines if NUMBER.sub("#", other) == shape), None)
        assert found is not None, f"{line!r} was not printed in\n{printed}"
        for number, other in zip(numbers(found), numbers(line), strict=True):
            assert number == other if other in (0, ZEROS) else number == pytest.approx(other, rel=0.15), found


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_page(tmp_path, monkeypatch, capsys):
    pytest.importorskip("peft", reason="peft is not installed: pip install 'llmprune[peft]'")
    monkeypatch.chdir(tmp_path)
    fences = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE.read_text(), flags=re.M | re.S)
    assert [kind for kind, _ in fences] == ["python", "python", "", "python", "", "python", ""]
    names = {"__name__": "page"}
    with pytest.warns(
        UserWarning, match=r"\d\d\.\d% of the adapter's squared change falls on pruned"
    ) as told:
        for kind, text in fences:
            if kind == "python":
                exec(compile(text, str(PAGE), "exec"), names)
            else:
                compare(capsys.readouterr().out, text)
    (share,) = (numbers(str(w.message))[0] for w in told if "squared change" in str(w.message))
    assert f"{share}%" in PAGE.read_text() or share == pytest.approx(60.0, rel=0.05)
