"""`llmprune generate`: what is refused before the model is loaded, and what is printed."""

import json

import pytest

import llmprune
from llmprune.api import generation


@pytest.mark.parametrize(
    ("prompt", "new", "said"),
    [
        ("", 4, "the prompt has no token; give some text"),
        ("x", 300, "has 1 token, and with 300 new ones .* limit of 256; use --max-new-tokens 255 or less"),
        ("x = 1\n" * 200, 4, r"with 4 new ones that is over the model's limit of 256; give a shorter prompt"),
    ],
)
def test_a_prompt_that_does_not_fit_is_refused_before_loading(prompt, new, said, monkeypatch):
    monkeypatch.setattr(generation, "load", lambda *_, **__: pytest.fail("the model was loaded"))
    with pytest.raises(ValueError, match=said) as told:
        llmprune.generate("demo", prompt, max_new_tokens=new)
    assert "\n" not in str(told.value)


def test_the_prompt_stands_before_its_text_and_not_before_an_error(typed):
    code, out, err = typed("generate", "demo", "import os", "--max-new-tokens", 6)
    assert (code, err) == (0, "") and out.startswith("import os")
    text, _, table = out.partition("\n\nGenerated\n")
    found = json.loads(typed("generate", "demo", "import os", "--max-new-tokens", 6, "--json")[1])
    assert text.rstrip() == "import os" + found["text"].rstrip() and "new tokens" in table
    code, out, err = typed("generate", "demo", "x", "--max-new-tokens", 300)
    assert (code, out) == (1, "") and err.startswith("llmprune: the prompt has 1 token")
    assert typed("generate", "demo", "import os", "--max-new-tokens", 6, "--quiet") == (0, "", "")
