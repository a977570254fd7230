"""The average of a run's weights (BEMA): TRL's callback, and its state in each checkpoint."""

from pathlib import Path

import torch
from trl import BEMACallback

STATE = "bema.pt"


class Averages(BEMACallback):
    """TRL's BEMACallback that goes on where a checkpoint ends; TRL's own starts anew when a run is resumed."""

    def tensors(self) -> list[torch.Tensor]:
        """All that the callback remembers: the first weights, their average, and the averaged model as last updated."""
        return [*self.theta0_params, *self.ema_params, *self.running_model.parameters()]

    def on_save(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            torch.save(self.tensors(), Path(args.output_dir) / f"checkpoint-{state.global_step}" / STATE)

    @torch.no_grad()
    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        saved = Path(args.output_dir) / f"checkpoint-{state.global_step}" / STATE
        if saved.exists():
            known = torch.load(saved, map_location=self.device, weights_only=True)
            for tensor, before in zip(self.tensors(), known, strict=True):
                tensor.copy_(before)
        elif state.global_step:
            print(f"bema: {saved.parent} holds no average; it starts anew at step {state.global_step}")
