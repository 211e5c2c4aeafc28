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
    """The folder with the small model's recipes (``examples/quickstart``).

    Raises:
        ConfigError: it is nowhere.
    """
    # setup.py's data_files.
    installed = Path(sysconfig.get_path("data"), "share", "megatron-dmc")
    for root in (checkout(), installed):
        if root is not None and (root / _RECIPES / "base.yaml").is_file():
            return root / _RECIPES
    raise ConfigError(f"{_RECIPES} is neither beside the package nor in {installed}; run this from a source checkout")
