"""Checkpoints that are whole or absent: megatron-core's distributed format, written aside, checked before it is read.

A checkpoint is a folder ``root/name`` with the files of ``megatron.core.dist_checkpointing`` (``metadata.json``,
``.metadata``, ``common.pt``, ``*.distcp``), ``dmc.json`` (:class:`CheckpointInfo`) and, if given, ``tokenizer/``. It is
written as ``root/.name.tmp-*`` and renamed when every file is on the disk. ``root/latest`` names the newest full one.
``folder`` knows the files, ``companions`` what travels beside the weights, ``save`` writes, ``load`` checks and loads;
``saved_model`` is what all others open one with. ``writer`` writes data files, also of tensors that are made when their turn
comes, and ``in_turn`` gives a model's weights one after the other: neither holds the whole.
"""

from megatron_dmc.checkpoint.companions import copy_tokenizer
from megatron_dmc.checkpoint.folder import (
    CheckpointError,
    CheckpointInfo,
    full_checkpoints,
    prune,
    read_latest,
    update_latest,
)
from megatron_dmc.checkpoint.save import publish, save_checkpoint
from megatron_dmc.checkpoint.saved_model import SavedModel

__all__ = [
    "CheckpointError",
    "CheckpointInfo",
    "SavedModel",
    "copy_tokenizer",
    "full_checkpoints",
    "prune",
    "publish",
    "read_latest",
    "save_checkpoint",
    "update_latest",
]
