"""One pair in a notebook: its log-probs under policy and reference, its loss, and steps on it alone, by the functions
that train on thousands (`dpo`)."""

import tempfile
from pathlib import Path

import torch
from transformers import set_seed

from rlaifv.params import TrainParams
from rlaifv.report.reward_view import token_texts
from rlaifv.steps.pairs import Pair, write_pairs
from rlaifv.training.dpo import PairCollator, PairScorer, answer_logps, batch_loss
from rlaifv.training.pair_data import PairData
from rlaifv.training.policy import add_lora, computing, freeze
from rlaifv.training.vision_features import ImageInputs
from rlaifv.vlm.loading import VLM


class OnePair:
    """A pair and the policy that learns from it; the reference is the policy as it is now.

    The policy itself is changed by `step`. Raises ValueError for a pair that cannot be trained on.
    """

    def __init__(self, policy: VLM, pair: Pair, image_root: Path, params: TrainParams, seed: int = 0) -> None:
        self.policy, self.params = policy, params
        self._folder = tempfile.TemporaryDirectory(prefix="one-pair-")  # goes with this object
        folder = Path(self._folder.name)
        write_pairs(folder / "pair.parquet", [pair], image_root, "one pair")
        data = PairData(policy, folder / "pair.parquet", params.max_length, folder / "pairs")
        if data.rejects:
            raise ValueError(f"the pair cannot be trained on: {data.rejects[0].reason}")
        freeze(policy.model, params)
        set_seed(seed)  # of LoRA's first weights
        network = add_lora(policy.model, params) if params.lora_r else policy.model
        self.scorer = PairScorer(network, ImageInputs(data))
        collate = PairCollator(data, policy.tokenizer.pad_token_id, packed=False, segment_weight=params.segment_weight)
        self.batch = collate([0])
        with torch.no_grad():
            self.reference_tokens = self._score()["logps"]
            self.reference = answer_logps({"logps": self.reference_tokens}, self.batch)
        self.learns = [weight for weight in network.parameters() if weight.requires_grad]
        matrices, others = ([w for w in self.learns if (w.ndim > 1) is decays] for decays in (True, False))
        groups = [{"params": matrices, "weight_decay": params.weight_decay}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=params.learning_rate)

    def _score(self) -> dict[str, torch.Tensor]:
        with computing(self.params.dtype, self.policy.device):
            return self.scorer(self.batch)

    def logps(self) -> torch.Tensor:
        """log π(chosen) and log π(rejected) under the policy, in nats, [2]."""
        return answer_logps(self._score(), self.batch)[:, 0]

    def loss(self) -> torch.Tensor:
        """The loss of `params.loss_type`, a number with a gradient."""
        lengths = self.batch["answer_mask"].sum(1).view(2, -1)
        return batch_loss(answer_logps(self._score(), self.batch), self.reference, lengths, self.params)

    def step(self) -> float:
        """A step of AdamW on the pair with the gradient's norm cut as in training; the loss before it."""
        loss = self.loss()
        self.optimizer.zero_grad()
        loss.backward()
        if self.params.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(self.learns, self.params.max_grad_norm)
        self.optimizer.step()
        return loss.item()

    @torch.no_grad()
    def tokens(self) -> dict[str, list[tuple[str, float, float]]]:
        """(text, log-prob under the policy, under the reference) of every token of the chosen and the rejected."""
        now, found = self._score()["logps"], {}
        for row, name in enumerate(("chosen", "rejected")):
            learned = self.batch["answer_mask"][row]
            ids = self.batch["answers"][row][learned].tolist()
            both = [logps[row][learned].tolist() for logps in (now, self.reference_tokens)]
            found[name] = list(zip(token_texts(self.policy, ids), *both, strict=True))
        return found
