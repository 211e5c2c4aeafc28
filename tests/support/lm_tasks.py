"""Tasks of lm-eval whose data is a file of this test: one of each output type."""

import json
from pathlib import Path

_WORDS = ("cat", "dog", "log", "mat", "sat", "ran")
_DATA = "dataset_path: json\ndataset_kwargs:\n  data_files: {file}\ntest_split: train\n"
_METRIC = "  - metric: {name}\n    aggregation: {aggregation}\n    higher_is_better: {better}\n"
_TASKS = {
    "local_choice": (
        "output_type: multiple_choice\ndoc_to_text: '{{question}}'\ndoc_to_choice: '{{choices}}'\ndoc_to_target: answer\n",
        [("acc", "mean", "true"), ("acc_norm", "mean", "true")],
    ),
    "local_likelihood": (
        "output_type: loglikelihood\ndoc_to_text: '{{question}}'\ndoc_to_target: '{{target}}'\n",
        [("perplexity", "perplexity", "false"), ("acc", "mean", "true")],
    ),
    "local_rolling": (
        "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{text}}'\n",
        [("bits_per_byte", "bits_per_byte", "false")],
    ),
    # Its score changes with every letter that is generated.
    "local_generate": (
        "output_type: generate_until\ndoc_to_text: '{{question}}'\ndoc_to_target: '{{target}}'\n"
        "process_results: !function letters.checksum\n"
        "generation_kwargs:\n  do_sample: false\n  max_gen_toks: 12\n  until: ['zzz']\n",
        [("checksum", "mean", "true")],
    ),
}
LOCAL_TASKS = tuple(_TASKS)
# As lm-eval calls what dmc_paper asks for.
PAPER_TASKS = ("piqa", "boolq", "arc_challenge", "arc_easy", "hellaswag", "winogrande", "mmlu", "humaneval")


def write_local_tasks(folder: Path, documents: int = 11) -> None:
    """Questions of different lengths; ``LOCAL_TASKS`` ask about them."""
    folder.mkdir()
    rows = [
        {
            "question": f"The {_WORDS[i % 6]} sat on the {'mat; the dog ran to the ' * (i % 4)}log.",
            "choices": [" cat", " dog ran", " log"],
            "answer": i % 3,
            "text": "The cat sat on the mat. " * (i + 1),
            "target": _WORDS[(i + 1) % 6],
        }
        for i in range(documents)
    ]
    file = folder / "documents.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "letters.py").write_text(
        "import zlib\n\n\ndef checksum(document, answers):\n    return {'checksum': zlib.crc32(answers[0].encode())}\n"
    )
    for name, (form, metrics) in _TASKS.items():
        listed = "".join(_METRIC.format(name=m, aggregation=a, better=b) for m, a, b in metrics)
        text = f"task: {name}\n{_DATA.format(file=file)}{form}metric_list:\n{listed}"
        (folder / f"{name}.yaml").write_text(text)


def write_paper_tasks(folder: Path) -> None:
    """Stand-ins for the downloads of dmc_paper under their own names, each the local multiple choice."""
    write_local_tasks(folder)
    for name in PAPER_TASKS:
        unsafe = "unsafe_code: true\n" if name == "humaneval" else ""
        named = name
        if name == "mmlu":
            named = "mmlu_part"
            (folder / "mmlu.yaml").write_text("group: mmlu\ntask:\n  - mmlu_part\n")
        (folder / f"{named}.yaml").write_text(f"include: local_choice.yaml\ntask: {named}\n{unsafe}")
