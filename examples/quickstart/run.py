"""The whole job on a small model and real text: pretrain, retrofit, compare, export, generate.

Every stage is a command that a user could type in the run's folder; a stage that is done is not done again.
"""

import argparse
import sys
import warnings
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from small_run import REPOSITORY, SmallRun  # noqa: E402


def run(quickstart: SmallRun) -> None:
    quickstart.prepare_text()
    for name in ("base", "control", "recipe", "adapter", "neuron"):
        quickstart.stage(f"training: {name}.yaml", f"checkpoints/{name}/final", quickstart.training(name))
    convert = [sys.executable, str(REPOSITORY / "tools" / "megatron_to_hf.py")]
    for name, folder in (("recipe", "hf"), ("control", "hf-control")):
        quickstart.stage(f"export to Hugging Face: {folder}", folder, [*convert, f"checkpoints/{name}/final", folder])
    evaluate = [sys.executable, str(HERE / "evaluate.py")]
    quickstart.stage("evaluation", "summary.json", [*evaluate, "--smoke"] if quickstart.smoke else evaluate)
    quickstart.stage("figure", "figure.png", [sys.executable, str(HERE / "figure.py"), "summary.json", "figure.png"])
    quickstart.call([*evaluate, "--show"])
    spent = quickstart.seconds
    total = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in spent.items())
    print(f"{sum(spent.values()):.0f} s: {total}" if total else "every stage was done before")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", help="a folder, .txt or .jsonl; by default the sources of Python's standard library")
    parser.add_argument("--smoke", action="store_true", help="everything at toy size")
    parsed = parser.parse_args()
    # megatron-core warns of every optional package that is not there, when it is imported.
    warnings.filterwarnings("ignore", module=r"megatron\.core")
    from megatron_dmc.config import ConfigError

    folder = REPOSITORY / "runs" / ("quickstart-smoke" if parsed.smoke else "quickstart")
    try:
        run(SmallRun(folder, parsed.data and str(Path(parsed.data).resolve()), parsed.smoke))
    except (ConfigError, OSError) as error:
        sys.exit(f"quickstart: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
