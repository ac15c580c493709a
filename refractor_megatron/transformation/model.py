"""Megatron's GPTModel with role embeddings (spec section 3)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..compat.megatron import GPTModel, LanguageModelEmbedding
from ..distinction.roles import DOCUMENT_ROLE, ROLE_ID, ROLES
from ..fabric.context_parallel import local_shard, part_of


class RefractorGPTModel(GPTModel):
    """Adds a |roles| × d_model table to the token embeddings; Megatron calls this a token-type embedding.

    A row says how a role differs from plain text, the row of which stays zero.
    """

    def __init__(self, *args: Any, role_embeddings: bool, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.role_embeddings = role_embeddings
        if role_embeddings and self.pre_process:
            self.embedding = LanguageModelEmbedding(
                config=self.config,
                vocab_size=self.vocab_size,
                max_sequence_length=self.max_sequence_length,
                position_embedding_type=self.position_embedding_type,
                num_tokentypes=len(ROLES),
                tp_group=self.pg_collection.tp,
            )
            # Plain text is what other roles differ from: its row stays zero. A row that is in every token of a corpus
            # would get the sum of all gradients, outgrow the tokens, and eat up the clipping norm of everything else.
            self.embedding.tokentype_embeddings.padding_idx = ROLE_ID[DOCUMENT_ROLE]
            self.setup_embeddings_and_output_layer()  # marks and ties the weights of the table just made

    def forward(self, input_ids: Tensor, position_ids: Tensor, records: Tensor, labels: Tensor | None = None) -> Tensor:
        """Logits, or per-token loss when labels are given.

        Args:
            input_ids, position_ids, labels: int64 [b, s], this rank's shard of the sequence under context parallelism.
            records: int32 [b, cp · s, 4 + R], of the whole sequence: (document, segment, role, mask bits, ids of
                retrieved records), in host memory; reaches core attention as its mask.

        Returns:
            loss [b, s] with labels, else logits [b, s, vocab / tp]; hidden states [s, b, h] before the last stage.
        """
        length = input_ids.shape[1] * part_of(self.cp_group).size
        assert records.shape[:2] == (len(input_ids), length), f"records of {tuple(records.shape)} for {length} tokens"
        decoder_input = None
        if self.role_embeddings and self.pre_process:
            roles = local_shard(records[..., 2], 1, part_of(self.cp_group)).to(input_ids.device).long()  # [b, s]
            decoder_input = self.embedding(input_ids, position_ids, tokentype_ids=roles)
        output: Tensor = super().forward(input_ids, position_ids, records, decoder_input=decoder_input, labels=labels)
        return output
