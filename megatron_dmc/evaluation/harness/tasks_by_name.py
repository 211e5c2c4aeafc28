"""lm-eval's tasks by their names, with their data; whatever goes wrong there is one line here."""

import difflib
import os
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lm_eval.tasks import TaskManager

from megatron_dmc.config import ConfigError
from megatron_dmc.errors import DMCError, in_one_line

FOLDER = Path(__file__).parent / "tasks"
# The group of which HumanEval is a part, where code may run.
PAPER, HUMAN_EVAL = "dmc_paper", "humaneval"
# Of the tasks whose texts have a length.
LONG_TEXT_GROUP = "dmc_ruler"
# Libraries whose errors mean that something is neither here nor to be had.
_DOWNLOADING = ("huggingface_hub", "httpx", "requests", "urllib3", "datasets.exceptions")
_MOST_LETTERS = 200


def task_manager(names: Sequence[str], metadata: dict[str, Any], include: str | None = None) -> TaskManager:
    """An index that has these tasks: of this package and of a user's folder, whose tasks come before lm-eval's own.

    lm-eval's many thousands take seconds to read; they are left out where no name needs them.
    """
    folders = [str(FOLDER), *([] if include is None else [include])]
    small = TaskManager(include_defaults=False, include_path=folders, metadata=metadata)
    if all(_is_whole(small, name) for name in names):
        return small
    return TaskManager(include_path=folders, metadata=metadata)


def long_text_manager(metadata: dict[str, Any]) -> TaskManager:
    """The index of the long-context tasks alone."""
    return TaskManager(include_defaults=False, include_path=str(FOLDER), metadata=metadata)


def long_text_tasks() -> list[str]:
    """Names of the tasks that have a length, and of their group."""
    return sorted({LONG_TEXT_GROUP, *(name for name in long_text_manager({}).all_subtasks)})


def check_names(manager: TaskManager, names: Sequence[str]) -> None:
    """Raises ConfigError for the first name that is no task, group, tag, pattern of them, or YAML file of one."""
    for name in names:
        if manager.match_tasks([name]) or (name.endswith(".yaml") and os.path.isfile(name)):
            continue
        close = difflib.get_close_matches(name, manager.all_tasks, n=3)
        meant = f"did you mean {' or '.join(close)}?" if close else "see lm_eval ls tasks"
        raise ConfigError(
            f"--tasks {name}: lm-eval has no such task; {meant} (--include-path adds a folder of YAML files)"
        )


def load(manager: TaskManager, names: Sequence[str], *, seed: int, runs_code: bool) -> list[Any]:
    """The tasks and groups, with their data: what is not on this machine is downloaded.

    Args:
        seed: of Python's random numbers, which some tasks draw their documents with, as lm-eval sets it.
        runs_code: whether code that the model writes may run.

    Raises:
        ConfigError: one cannot be loaded, or runs such code without leave; names the task.
    """
    for name in names:
        for task in _members(manager, name):
            if manager.task_index[task].cfg.get("unsafe_code") and not runs_code:
                raise _runs_code(task)
    random.seed(seed)
    loaded: list[Any] = []
    for name in names:
        for found in manager.match_tasks([name]) or [name]:
            loaded.append(_load(manager, found, runs_code))
    tasks = [task for each in loaded for task in leaves(each)]
    for task in tasks:
        if getattr(task, "UNSAFE_CODE", False) and not runs_code:
            raise _runs_code(task.task_name)
        if getattr(task, "MULTIMODAL", False):
            raise ConfigError(
                f"--tasks: {task.task_name} asks about images or sounds, the model reads text; leave it out"
            )
    seen: set[str] = set()
    for task in tasks:
        if task.task_name in seen:
            raise ConfigError(f"--tasks: {task.task_name} is named twice, by itself or in a group; name it once")
        seen.add(task.task_name)
    return [each for item in loaded for each in (item if isinstance(item, list) else [item])]


def _load(manager: TaskManager, name: str, runs_code: bool) -> Any:
    try:
        found = manager.load([name])
    except DMCError as error:
        raise ConfigError(f"--tasks {name}: {error}") from None
    # A task's own code may raise anything.
    except Exception as error:
        words = in_one_line(error, _MOST_LETTERS)
        if "HF_ALLOW_CODE_EVAL" in str(error) and not runs_code:
            raise _runs_code(name) from None
        if any(map(_is_of_a_download, _chain(error))):
            raise ConfigError(
                f"--tasks {name}: its data is not on this machine and cannot be downloaded ({words}); run where there is a "
                "network (HF_HOME names the cache, HF_HUB_OFFLINE must not be set), or leave the task out"
            ) from None
        raise ConfigError(
            f"--tasks {name}: lm-eval cannot load it ({words}); mend that, or leave the task out"
        ) from None
    # A group comes before those in it.
    return next(iter(found["groups"].values()), None) or list(found["tasks"].values())


def _inner(manager: TaskManager, name: str) -> list[str]:
    """What a group or a tag names; empty for a task."""
    entry = manager.task_index[name]
    if entry.kind.name == "TAG":
        return sorted(entry.tags)
    inner = (entry.cfg or {}).get("task")
    if entry.kind.name != "GROUP" or not isinstance(inner, list):
        return []
    return [item if isinstance(item, str) else item.get("group") or item.get("task", "") for item in inner]


def _is_whole(manager: TaskManager, name: str) -> bool:
    """Whether an index has a name, and all that it names in turn."""
    return name in manager.task_index and all(_is_whole(manager, each) for each in _inner(manager, name))


def _members(manager: TaskManager, name: str) -> list[str]:
    """The tasks that a name means, as far as the index knows them; nothing of them is loaded."""
    if name not in manager.task_index:
        return [task for match in manager.match_tasks([name]) for task in _members(manager, match)]
    inner = [each for each in _inner(manager, name) if each in manager.task_index]
    return [task for each in inner for task in _members(manager, each)] if inner else [name]


def leaves(item: Any) -> list[Any]:
    """The tasks of an item of :func:`load`."""
    if not hasattr(item, "get_all_tasks") and not isinstance(item, list):
        return [item]
    return item if isinstance(item, list) else list(item.get_all_tasks())


def _runs_code(name: str) -> ConfigError:
    return ConfigError(
        f"--tasks {name} runs code that the model writes; where that can do no harm, such as in a container, add "
        "--confirm-run-unsafe-code"
    )


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _is_of_a_download(error: BaseException) -> bool:
    is_known = isinstance(error, ConnectionError) or type(error).__module__.startswith(_DOWNLOADING)
    return is_known or "Hugging Face Hub" in str(error)
