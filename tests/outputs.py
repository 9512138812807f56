"""Output folders, made comparable."""

import json
import re

TIMES = ("seconds", "peak_memory_bytes", "peak_private_memory_bytes", "peak_device_memory_bytes")


def contents(folder):
    """Every file by name; of the record all but times and memory; of the card all but the folder's name; of the report nothing."""
    found = {}
    for path in sorted(folder.iterdir()):
        if path.name == "llmprune.json":
            record = json.loads(path.read_text())
            for key in TIMES:
                record.get("totals", {}).pop(key, None)
            for row in record.get("matrices", []):
                row.pop("seconds")
            found[path.name] = json.dumps(record, sort_keys=True)
        elif path.name == "README.md":
            found[path.name] = re.sub(
                rb'from_pretrained\("[^"]*"', b"from_pretrained(NAME", path.read_bytes()
            )
        elif path.name != "report.html":
            found[path.name] = path.read_bytes()
    return found


def old_output(folder):
    """A folder that passes for the output of an earlier run, with a card that was edited by hand."""
    folder.mkdir(parents=True, exist_ok=True)
    record = {"schema": 1, "totals": {"files": {"config.json": 2}}, "matrices": []}
    (folder / "llmprune.json").write_text(json.dumps(record))
    (folder / "README.md").write_text("years of work")
    return folder
