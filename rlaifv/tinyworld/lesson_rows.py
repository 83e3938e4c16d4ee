"""Many questions about one image in one row: the image once, every question and answer as its own branch.

A branch sees the image prefix and itself, and its positions go on where the prefix ends, so each branch is computed
exactly as if it stood alone behind its image. Training reads eight questions for little more than the cost of one.
"""

import dataclasses

import torch
from transformers import PreTrainedTokenizerFast

from rlaifv.tinyworld.tokenizer import IMAGE_TOKENS


@dataclasses.dataclass(frozen=True)
class Packed:
    """A batch of packed rows; R rows of n tokens, padded at the end; T target tokens.

    ids, positions: (R, n); mask: (R, 1, n, n), True where a token may look; image_slots: index of the first image
    token; target_at: (T,) flat indices of the tokens whose *next* token is a target; targets, weights: (T,).
    """

    ids: torch.Tensor
    positions: torch.Tensor
    mask: torch.Tensor
    image_slots: int | None
    target_at: torch.Tensor
    targets: torch.Tensor
    weights: torch.Tensor


class Packer:
    """Packs (question, answer, weight) branches; remembers the tokens of texts that it has seen."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, with_image: bool = True, end_weight: float = 0.05):
        self._tokenizer, self._cache, self._end_weight = tokenizer, {}, end_weight
        self._with_image = with_image
        self._prefix = self._encode("USER: " + "<image>" * IMAGE_TOKENS + "\n" if with_image else "USER: ")

    def _encode(self, text: str) -> list[int]:
        if text not in self._cache:
            if len(self._cache) > 200_000:
                self._cache.clear()
            self._cache[text] = self._tokenizer(text, add_special_tokens=False).input_ids
        return self._cache[text]

    def pack(self, rows: list[list[tuple[str, str, float]]]) -> Packed:
        """One row per list of (question, answer, weight of each answer token).

        The weight of a whole one-token answer is its own; the end token of such an answer weighs `end_weight` of
        it, because it is never in doubt; in longer answers it weighs as much as any word.
        """
        prefix = self._prefix
        built = []
        for branches in rows:
            ids, positions, owner = list(prefix), list(range(len(prefix))), [0] * len(prefix)
            at, targets, weights = [], [], []
            for number, (question, answer, weight) in enumerate(branches, start=1):
                # Behind an image the prompt starts a line; without one the space belongs to its first word.
                ask = self._encode(question + " ASSISTANT:")
                reply = [*self._encode(" " + answer), self._tokenizer.eos_token_id]
                start = len(ids)
                ids += ask + reply[:-1]
                length = len(ids) - start
                positions += range(len(prefix), len(prefix) + length)
                owner += [number] * length
                at += range(len(ids) - len(reply), len(ids))
                targets += reply
                last = weight * self._end_weight if len(reply) == 2 else weight
                weights += [weight] * (len(reply) - 1) + [last]
            built.append((ids, positions, owner, at, targets, weights))
        return self._collate(built)

    def _collate(self, built: list[tuple]) -> Packed:
        length = max(len(row[0]) for row in built)
        pad = self._tokenizer.pad_token_id
        ids = torch.full((len(built), length), pad)
        positions = torch.zeros(len(built), length, dtype=torch.long)
        owner = torch.full((len(built), length), -1)
        at, targets, weights = [], [], []
        for row, (row_ids, row_positions, row_owner, row_at, row_targets, row_weights) in enumerate(built):
            ids[row, : len(row_ids)] = torch.tensor(row_ids)
            positions[row, : len(row_ids)] = torch.tensor(row_positions)
            owner[row, : len(row_ids)] = torch.tensor(row_owner)
            at += [row * length + index for index in row_at]
            targets += row_targets
            weights += row_weights
        same = (owner[:, None, :] == owner[:, :, None]) | (owner[:, None, :] == 0)
        mask = (same & torch.ones(length, length, dtype=torch.bool).tril()).unsqueeze(1)
        slots = self._prefix.index(self._encode("<image>")[0]) if self._with_image else None
        return Packed(ids, positions, mask, slots, torch.tensor(at), torch.tensor(targets), torch.tensor(weights))


def target_logits(language_model: torch.nn.Module, packed: Packed, features: torch.Tensor | None) -> torch.Tensor:
    """Logits (T, vocabulary) at the target positions of a LlamaModel with tied embeddings.

    features: projected patch features (R, 9, width) of the rows' images, or None without images.
    """
    table = language_model.embed_tokens
    embeds = table(packed.ids)
    if packed.image_slots is not None:
        start = packed.image_slots
        embeds = torch.cat([embeds[:, :start], features, embeds[:, start + IMAGE_TOKENS :]], dim=1)
    hidden = language_model(
        inputs_embeds=embeds, attention_mask=packed.mask, position_ids=packed.positions, use_cache=False
    ).last_hidden_state
    return hidden.flatten(0, 1)[packed.target_at] @ table.weight.T
