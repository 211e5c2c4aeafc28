"""Packed documents in packed_seq_params, which megatron-core hands through all layers and pipeline stages."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron_dmc.ops.attention import Documents
from megatron_dmc.ops.context_parallel import local_positions


@dataclass
class PackedDocuments(PackedSeqParams):
    """packed_seq_params with what all layers share. ``pack_documents`` makes it; GPTModel takes it."""

    documents: Documents | None = None


def pack_documents(document_starts: Tensor, device: torch.device | None = None) -> PackedDocuments:
    """The EOD-reset form: rows of documents one after another, as GPTDataset makes them. Positions restart in each document.

    Args:
        document_starts: bool [batch, seq], true at the first token of a document; the whole sequences, under context
            parallelism too. On the host nothing here waits for a GPU.
        device: of the tokens; None: document_starts'.
    """
    documents = Documents.from_starts(document_starts)
    # Flash kernels take another path, with another form of their result, for a longest document of one token.
    longest = max(int(torch.diff(documents.cu_seqlens).max()), 2)
    ends = documents.cu_seqlens.to(device or document_starts.device, non_blocking=True)
    documents, seq = Documents(ends, documents.tokens, longest), document_starts.shape[1]
    # In this form megatron-core hands every context-parallel rank the rotary angles of all positions.
    return PackedDocuments("thd", ends, ends, max_seqlen_q=seq, max_seqlen_kv=seq, documents=documents)


class TokenPlaces(NamedTuple):
    """The places of this rank's tokens.

    Attributes:
        positions: int64 [seq], in the sample.
        in_document: int64 [batch or 1, seq], in the document.
        remaining: int64 [batch or 1, seq], how many tokens of the document come after each.
        starts: bool [batch, seq], true at a document's first token; None: samples are one document each.
        documents: of the whole samples.
    """

    positions: Tensor
    in_document: Tensor
    remaining: Tensor
    starts: Tensor | None
    documents: Documents | None


def token_places(packed_seq_params: Any, batch: int, seq: int, group: dist.ProcessGroup | None) -> TokenPlaces:
    """From None or any packed_seq_params, whose cu_seqlens_q count the tokens of all rows.

    Where documents are padded, padding comes after each and counts as a part of it that no real token sees.

    Args:
        seq: this rank's tokens.
        group: the ranks that share a sequence; None: this rank has all of it.

    Raises:
        NotImplementedError: other packed_seq_params than pack_documents' under context parallelism.
    """
    positions = local_positions(seq, group)
    length = seq * (1 if group is None else group.size())
    if packed_seq_params is None:
        return TokenPlaces(positions, positions[None], length - 1 - positions[None], None, None)
    if isinstance(packed_seq_params, PackedDocuments):
        documents = packed_seq_params.documents
        assert documents is not None
    else:
        if group is not None:
            raise NotImplementedError("packed sequences under context parallelism must come from pack_documents")
        padded = packed_seq_params.cu_seqlens_q_padded
        ends = packed_seq_params.cu_seqlens_q if padded is None else padded
        longest = max(min(packed_seq_params.max_seqlen_q or length, length), 2)
        documents = Documents(ends, batch * length, longest)
    in_document, remaining, starts = (
        x.view(batch, length) for x in (documents.positions, documents.remaining, documents.starts)
    )
    if group is not None:
        mine = positions.to(starts.device)
        in_document, remaining, starts = in_document[:, mine], remaining[:, mine], starts[:, mine]
    return TokenPlaces(positions, in_document, remaining, starts, documents)
