"""Save every N steps, at the end, and when a stop signal asks for it."""

from __future__ import annotations

from ...checkpoint.store import Store
from ..loop import Step
from ..state import TrainState


class Checkpointing:
    """Writes checkpoints and says where."""

    def __init__(self, state: TrainState, store: Store, every: int) -> None:
        self.state, self.store, self.every = state, store, every

    def after_step(self, step: Step) -> None:
        """Save when due."""
        if step.number % self.every == 0 or step.last or step.stopping:
            folder = self.state.save(self.store)
            step.say(f"checkpoint {folder}")
