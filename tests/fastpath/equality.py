"""Run one batch, or a whole training, through two trainers and hold every number of the one against the other's."""

import torch


def batch_of(trainer) -> dict:
    """The trainer's first batch, rows in the order of the data."""
    return trainer._prepare_inputs(trainer.data_collator(list(trainer.train_dataset)))


def outcome(trainer, batch: dict) -> tuple[torch.Tensor, dict, dict]:
    """Loss, logged metrics and gradients of one batch, with checkpointing where the trainer's arguments ask for it."""
    trainer.model.train()
    if trainer.args.gradient_checkpointing:  # Trainer turns it on when it starts to train
        trainer.model.activation_checkpointing_enable(trainer.args.gradient_checkpointing_kwargs)
    loss = trainer.compute_loss(trainer.model, dict(batch))
    loss.backward()
    kept = trainer._metrics["train"] if hasattr(trainer, "_metrics") else trainer._stored_metrics["train"]
    gradients = {name: weight.grad for name, weight in trainer.model.named_parameters() if weight.grad is not None}
    return loss.detach(), {name: values[-1] for name, values in kept.items()}, gradients


def close(ours, theirs, scale=None, tolerance: float = 1e-5) -> bool:
    """Equal to `tolerance` of the largest magnitude at stake."""
    ours, theirs = torch.as_tensor(ours).double(), torch.as_tensor(theirs).double()
    scale = max(theirs.abs().max().item(), 1e-2 if scale is None else scale)
    return (ours - theirs).abs().max().item() <= tolerance * scale


def assert_same(plain, packed, skip: tuple[str, ...] = (), gradients_to: float = 1e-5) -> None:
    """Loss, metrics and gradients of the packed trainer's first batch equal those of TRL's own."""
    assert packed.form
    batch = batch_of(plain)
    loss, metrics, gradients = outcome(plain, batch)
    our_loss, our_metrics, our_gradients = outcome(packed, packed._prepare_inputs(batch))
    assert close(our_loss, loss), (our_loss, loss)
    assert our_metrics.keys() == metrics.keys()
    for name in metrics.keys() - set(skip):
        # rewards are small differences of log-probs, and no more exact than those
        scale = 0.1 * abs(metrics["logps/chosen"]) if name.startswith("rewards/") else None
        assert close(our_metrics[name], metrics[name], scale), (name, our_metrics[name], metrics[name])
    assert our_gradients.keys() == gradients.keys()
    assert gradients
    largest = max(gradient.abs().max().item() for gradient in gradients.values())
    assert largest > 0
    for name, gradient in gradients.items():
        scale = max(gradient.abs().max().item(), largest * 1e-3)
        difference = (our_gradients[name] - gradient).abs().max().item()
        assert difference <= gradients_to * scale, (name, difference / scale)
