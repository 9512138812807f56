"""Which continuation of a held-out snippet is real: four choices of like length, the wrong ones from
elsewhere. Chance is 25 %.
"""

import random

CONTEXT, CONTINUATION = 8, 2  # lines
QUESTIONS = 200


def dataset(**_):
    """200 questions from the held-out modules of the running interpreter, always the same for one Python
    version.
    """
    import datasets

    from llmprune.demo.text import held_out_documents

    snippets = []
    for document in held_out_documents():
        lines = document.split("\n")
        for start in range(0, len(lines) - 12, 12):
            middle = start + CONTEXT
            context, continuation = (
                "\n".join(lines[start:middle]),
                "\n" + "\n".join(lines[middle : middle + CONTINUATION]),
            )
            if (
                len(context) > 160
                and len(continuation.strip()) > 40
                and len(context) + len(continuation) < 700
            ):
                snippets.append((context, continuation))
    # Neighbours by length: otherwise the shortest choice would be the likeliest, whatever it says.
    snippets.sort(key=lambda snippet: len(snippet[1]))
    rng = random.Random(0)
    rows = []
    for number in rng.sample(range(len(snippets) - 3), QUESTIONS):
        choices = [continuation for _, continuation in snippets[number : number + 4]]
        context, real = snippets[number]
        rng.shuffle(choices)
        rows.append({"context": context, "choices": choices, "label": choices.index(real)})
    return {"test": datasets.Dataset.from_list(rows)}
