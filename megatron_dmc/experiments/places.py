"""Where the experiments find their recipes: in a source checkout, or where pip has put them."""

import sysconfig
from pathlib import Path

import megatron_dmc
from megatron_dmc.config import ConfigError

_RECIPES = Path("examples", "quickstart")


def checkout() -> Path | None:
    """The root of the source tree that this package runs from; None: it is installed elsewhere."""
    root = Path(megatron_dmc.__file__).resolve().parents[1]
    return root if (root / "setup.py").is_file() and (root / _RECIPES / "base.yaml").is_file() else None


def small_recipes() -> Path:
    """The folder with the small model's recipes (``examples/quickstart``). Raises ConfigError: it is nowhere."""
    return _installed(_RECIPES, "base.yaml")


def real_model_recipes() -> Path:
    """The folder with the real model's recipes (``examples/smollm2``). Raises ConfigError: it is nowhere."""
    return _installed(Path("examples", "smollm2"), "train.yaml")


def comparison_recipes() -> Path:
    """The folder with the recipes of a comparison (``examples/compare``). Raises ConfigError: it is nowhere."""
    return _installed(Path("examples", "compare"), "dms.yaml")


def _installed(recipes: Path, one: str) -> Path:
    # setup.py's data_files.
    installed = Path(sysconfig.get_path("data"), "share", "megatron-dmc")
    for root in (checkout(), installed):
        if root is not None and (root / recipes / one).is_file():
            return root / recipes
    raise ConfigError(f"{recipes} is neither beside the package nor in {installed}; run this from a source checkout")
