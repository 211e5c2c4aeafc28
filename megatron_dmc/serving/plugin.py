"""What vLLM calls in each of its processes, whichever model it serves (entry point ``vllm.general_plugins``)."""

import logging
import re

# Under vLLM's own logger, whose handler and format it gets.
logger = logging.getLogger("vllm.megatron_dmc")

# The releases whose internals this plugin was tried with, from the first to before the last; setup.py has the same range.
VERSIONS = (0, 32), (0, 34)


def register() -> None:
    """Makes DMC's architectures and their settings known to vLLM. Never raises: other models must be served as before."""
    try:
        import vllm

        if not is_supported(vllm.__version__):
            first, end = (".".join(map(str, version)) for version in VERSIONS)
            logger.warning(
                "megatron-dmc: models with DMC cannot be served by vLLM %s, only by %s or later and before %s; install "
                "'vllm>=%s,<%s'",
                *(vllm.__version__, first, end, first, end),
            )
            return
        _register()
    except Exception as error:  # of whatever kind: vLLM does not catch it
        reason = " ".join(str(error).split()) or type(error).__name__
        logger.warning("megatron-dmc: models with DMC cannot be served here: %s", reason)


def is_supported(version: str) -> bool:
    """Whether a version of vLLM, such as ``0.33.1.dev5+g1234``, is one of VERSIONS."""
    found = re.match(r"(\d+)\.(\d+)", version)
    return found is not None and VERSIONS[0] <= (int(found[1]), int(found[2])) < VERSIONS[1]


def _register() -> None:
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from megatron_dmc.hf import families
    from megatron_dmc.serving.config import DMCSettings

    families.register()
    for family in families.FAMILIES:
        _, exported = families.dmc_classes(family)
        name = exported.__name__
        # Named only: whoever serves another model does not import it.
        ModelRegistry.register_model(name, f"megatron_dmc.serving.families.{family}:{name}")
        MODELS_CONFIG_MAP[name] = DMCSettings
