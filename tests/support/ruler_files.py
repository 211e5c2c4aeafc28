"""RULER's questions as files: few, short, made up, with the official columns."""

import json
from pathlib import Path
from typing import Any

LENGTH = 512
# A chat template that thinks unless it is told not to.
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }} [/]{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}{% if enable_thinking is not false %}<think>{% endif %}"
)
_STORY = "The cat sat on the mat; the dog ran to the log. "


def ruler_rows() -> list[dict[str, Any]]:
    """Two contexts of different lengths for each of three tasks; the first task's second one is asked twice."""
    rows = []
    for task, answers in (("vt", ["cat", "zzz"]), ("niah_single_1", ["mat"]), ("qa_1", ["zzz", "log"])):
        for i in range(2):
            for asked in ("Who sat?", "Who ran?")[: 2 if (task, i) == ("vt", 1) else 1]:
                rows.append(
                    {
                        "context": f"Document {i} of {task}. {_STORY * (9 + 4 * i)}\n",
                        "question": f"Question: {asked}\n",
                        "answer_prefix": "Answer: it was the",
                        "answer": answers,
                        "task": task,
                        "max_new_tokens": 7 + i,
                    }
                )
    return rows


def write_ruler(folder: Path, rows: list[dict[str, Any]], form: str = "jsonl") -> None:
    """``folder/LENGTH/test.FORM``."""
    place = folder / str(LENGTH)
    place.mkdir(parents=True, exist_ok=True)
    if form == "jsonl":
        (place / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), place / "test.parquet")
