"""Distillation: the sources are teachers, each on text of its own domain.

The trained model is the student. It is given more than the one token that follows: the KL
divergence of its distribution over the next token from that of the window's own source is added to
the language-model loss (Hinton, Vinyals and Dean, arXiv 1503.02531). No gradient reaches a source.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from symphony_moe.files import reserve
from symphony_moe.model.layer import WINDOWS_TOKENS, device
from symphony_moe.sources.source import Source
from symphony_moe.sources.stock import load_source
from symphony_moe.text.memory_maps import TrainingText

log = logging.getLogger(__name__)

_WAITING_BYTES = 4 * 1024**3
"""Teachers' hidden states that wait on disk at once, at most."""


def are_loaded_together(loading: str, sources: Sequence[Source], num_trained: int) -> bool:
    """Whether all teachers are in memory at once. `loading`: `train.teacher_loading`;
    `num_trained`: parameters of the student that learn."""
    return loading == "together" or (loading == "auto" and fit_in_memory(sources, num_trained))


def fit_in_memory(sources: Sequence[Source], num_trained: int) -> bool:
    """Whether all teachers fit beside the student in training: in half of the memory that is free,
    once Adam's two moments and the gradient have theirs. `num_trained`: parameters of the student
    that learn, with 12 bytes each."""
    needed = sum(source.num_parameters for source in sources) * _teacher_dtype().itemsize
    cuda = torch.cuda.is_available()
    free = torch.cuda.mem_get_info()[0] if cuda else psutil.virtual_memory().available
    return bool(needed < (free - 12 * num_trained) / 2)


def _teacher_dtype() -> torch.dtype:
    """What a teacher computes in: bfloat16 on a GPU that has it."""
    has_bfloat16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    return torch.bfloat16 if has_bfloat16 else torch.float32


def divergence(
    student: Float[Tensor, "tokens vocabulary"],
    teacher: Float[Tensor, "tokens vocabulary"],
    known: Bool[Tensor, " vocabulary"] | None,
    temperature: float,
) -> Float[Tensor, " tokens"]:
    """KL divergence in nats of the student's distribution from the teacher's, both from logits
    divided by the temperature, times its square (so that gradients keep their size).

    `known`: the tokens that the teacher has, where the vocabulary has others. It has no opinion of
    those, and both distributions are over the tokens that it has.
    """
    if known is not None:
        student, teacher = student[:, known], teacher[:, known]
    student_log, teacher_log = (
        torch.log_softmax(logits.float() / temperature, dim=-1) for logits in (student, teacher)
    )
    each = torch.nn.functional.kl_div(student_log, teacher_log, log_target=True, reduction="none")
    return each.sum(dim=-1) * temperature**2


class Teachers:
    """Each window's own source, asked for its logits.

    Where `together`, all sources are in memory. Where not, one after the other is loaded for the
    windows of the next steps; its last hidden states wait on disk, and only output heads stay in
    memory. Both give the same logits.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        text: TrainingText,
        folder: Path,
        *,
        by_documents: bool,
        together: bool,
        share: tuple[int, int, int] = (1, 0, 1),
    ) -> None:
        """`by_documents`: attention does not leave a document. `folder`: where hidden states may
        wait. `share`: (windows in a batch, this process, processes), which take batches in
        turn."""
        self.sources = sources
        self.text, self.by_documents = text, by_documents
        self.known = [None if s.known is None else s.known.to(device()) for s in sources]
        self._models: list[Any] = []
        self._heads: list[Tensor] = []
        self._folder, self._share = folder, share
        self._waiting: dict[int, int] = {}
        self._states: Any = None
        if together:
            self._models = [self._load(source) for source in sources]
            self._heads = [model.get_output_embeddings().weight for model in self._models]

    def _load(self, source: Source) -> Any:
        """A teacher, frozen."""
        model: Any = load_source(source, _teacher_dtype())
        return model.requires_grad_(requires_grad=False)

    @torch.no_grad()
    def logits(
        self, numbers: Sequence[int]
    ) -> Mapping[int, tuple[list[int], Float[Tensor, "windows sequence vocabulary"]]]:
        """Source's number -> (which of the windows asked for are its own, its logits on them).
        `numbers`: of windows. Raises OSError where the disk has no room for hidden states."""
        if not self._models and not all(number in self._waiting for number in numbers):
            self._prepare(min(numbers))  # of all owners' windows
        owners = self.text.owners[list(numbers)].tolist()
        found = {}
        for owner in sorted(set(owners)):
            mine = [place for place, other in enumerate(owners) if other == owner]
            hidden = self._hidden(owner, [numbers[place] for place in mine])
            found[owner] = mine, hidden @ self._heads[owner].to(hidden).T
        return found

    def _hidden(
        self, owner: int, numbers: Sequence[int]
    ) -> Float[Tensor, "windows sequence hidden"]:
        """What the source's output head reads."""
        if self._models:
            return self._run(self._models[owner], numbers)
        rows, own = [self._waiting[number] for number in numbers], self._heads[owner].shape[1]
        return torch.from_numpy(self._states[rows][..., :own]).to(device(), _teacher_dtype())

    def _run(self, model: Any, numbers: Sequence[int]) -> Float[Tensor, "windows sequence hidden"]:
        """A teacher's last hidden states on windows."""
        arguments = {"input_ids": self.text.tokens(numbers).to(device())}
        if self.by_documents:
            arguments["position_ids"] = self.text.positions(numbers).to(device())
        output = model.get_decoder()(**arguments, use_cache=False)
        states: Tensor = output.last_hidden_state
        return states

    def _prepare(self, first: int) -> None:
        """Every source on its own of the next windows, from `first` on: as many as may wait."""
        batch, process, processes = self._share
        hidden = max(source.as_stored.config.hidden_size for source in self.sources)
        length = self.text.sequence_length
        room = max(batch, _WAITING_BYTES // (length * hidden * 4))
        mine = [
            number
            for number in range(first, len(self.text))
            if number // batch % processes == process
        ][:room]
        self._waiting = {number: row for row, number in enumerate(mine)}
        self._folder.mkdir(parents=True, exist_ok=True)
        path, shape = self._folder / f"teachers-{process}.bin", (len(mine), length, hidden)
        with path.open("wb") as file:
            # Writing to a map without space behind it would end the process (SIGBUS).
            reserve(file, math.prod(shape) * 4)
        self._states = np.memmap(path, dtype=np.float32, mode="r+", shape=shape)
        at_once = max(1, WINDOWS_TOKENS // length)
        self._heads = []
        for number, source in enumerate(self.sources):
            own = [window for window in mine if int(self.text.owners[window]) == number]
            log.info("teacher %s: %d windows", source.name, len(own))
            model = self._load(source)
            for begin in range(0, len(own), at_once):
                some = own[begin : begin + at_once]
                rows = [self._waiting[window] for window in some]
                states = self._run(model, some).float().cpu().numpy()
                self._states[rows, :, : states.shape[-1]] = states
            self._heads.append(model.get_output_embeddings().weight.detach().clone())
            del model
